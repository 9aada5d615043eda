//! `precompute-teacher-logits`: fill the cache of a recipe, or one part of it, and stop.

use std::fmt::Write;

use limbeck::Result;
use limbeck::run::RunOptions;

use crate::cli::PrecomputeArgs;
use crate::output::print;
use crate::setup::{recipe_and_options, stop_on_signals};

pub fn run(args: &PrecomputeArgs) -> Result<()> {
    let (recipe, options) = recipe_and_options(&args.run.recipe, &args.run.run)?;
    let mut options = RunOptions { part: args.shard, ..options };
    if let (Some(None), true) = (&args.run.run.profile, options.part.count() > 1) {
        // Each process of a shared cache has a file of its own.
        let name = format!("profile-{}.json", options.part.to_string().replace('/', "-of-"));
        options.profile = Some(options.run_dir(&recipe).join(name));
    }
    stop_on_signals(&options.stop)?;
    let precomputed = limbeck::precompute::run_part(&recipe, &options)?;
    if !precomputed.is_first {
        return Ok(());
    }
    let mut text = format!("cache: {}\n", precomputed.cache_dir.display());
    for (cache, missing) in &precomputed.missing {
        let part = options.part;
        writeln!(text, "part {part} is written, other parts are still missing: {}: {missing}", cache.display())
            .expect("writing to a string");
    }
    print(&text)
}
