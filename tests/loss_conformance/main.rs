//! What a distillation loss promises, and proof that the promises are checked.
//!
//! [`subject`] is what is tested: one optimizer step from raw logits. [`library`] is limbeck, [`fused`] its operation
//! alone, [`plain`] the same in loops that can be told to make one of the [`mistakes`] that such code has shipped with.
//! All three keep every promise of [`checks`]; whatever makes a mistake breaks at least one.

mod case_files;
mod checks;
mod checks_cache;
mod checks_divergence;
mod checks_refusals;
mod checks_sampled;
mod checks_scale;
mod checks_step;
mod fused;
mod library;
mod material;
mod mistakes;
mod plain;
mod plain_divergence;
mod plain_row;
mod plain_teacher;
mod subject;
mod truth;

use std::fs;

use checks::{CHECKS, CHECKS_OF_THE_CACHE, broken};
use fused::Fused;
use library::Limbeck;
use plain::Plain;
use rayon::prelude::*;

#[test]
fn the_fused_operation_keeps_every_promise() {
    let broken = broken(&Fused);
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn limbeck_keeps_every_promise() {
    let broken = broken(&Limbeck { through_files: false });
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn limbeck_keeps_the_caches_promises_through_files() {
    let subject = Limbeck { through_files: true };
    for check in CHECKS_OF_THE_CACHE {
        (check.run)(&subject).unwrap_or_else(|how| panic!("{}: {how}", check.name));
    }
}

#[test]
fn the_plain_pipeline_keeps_every_promise() {
    let broken = broken(&Plain { mistake: None });
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_mistake_breaks_a_promise() {
    let caught: Vec<_> =
        mistakes::ALL.par_iter().map(|&(mistake, what)| (what, broken(&Plain { mistake: Some(mistake) }))).collect();
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/conformance.md")).expect("the page");
    let section = page.split("## What the suite catches").nth(1).expect("the page has the section");
    let mut stale = vec![];
    for (what, broken) in &caught {
        let names: Vec<&str> = broken.iter().map(|(name, _)| *name).collect();
        println!("| {what} | {} |", names.join(", "));
        // The page names one of those promises, in a row of its own.
        let listed = |line: &str| {
            let (promise, mistakes) = line.strip_prefix("| `")?.strip_suffix(" |")?.split_once("` | ")?;
            mistakes.split("; ").any(|mistake| mistake == *what).then(|| promise.to_string())
        };
        if !section.lines().find_map(listed).is_some_and(|promise| names.contains(&promise.as_str())) {
            stale.push(format!("{what}: {}", names.join(", ")));
        }
    }
    let survivors: Vec<&str> = caught.iter().filter(|(_, broken)| broken.is_empty()).map(|(what, _)| *what).collect();
    assert!(survivors.is_empty(), "nothing catches {survivors:#?}");
    let idle: Vec<&str> = CHECKS
        .iter()
        .map(|check| check.name)
        .filter(|name| !caught.iter().any(|(_, broken)| broken.iter().any(|(broken, _)| broken == name)))
        .collect();
    assert!(idle.is_empty(), "these checks catch nothing: {idle:?}");
    assert!(stale.is_empty(), "docs/conformance.md does not say what catches\n{}", stale.join("\n"));
}

#[test]
fn a_hundred_thousand_draws_are_unbiased() {
    checks_sampled::unbiased(&Fused, 100_000).unwrap();
    checks_sampled::unbiased(&Limbeck { through_files: false }, 100_000).unwrap();
}
