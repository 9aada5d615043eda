//! A finished cache in the place of text and teacher: what is trained on it, and what may not be said beside it.

mod small_run;

use std::fs;

use limbeck::cache::{CacheReader, Codec};
use limbeck::eval::report::Role;
use limbeck::import::{self, ImportOptions};
use limbeck::recipe::Recipe;
use limbeck::tokenizer::Tokenizer;
use limbeck::{distill, precompute};
use serde_json::json;
use small_run::*;

/// The recipe of [`RECIPE`] on caches that are there.
fn captured(train: &str, held_out: Option<&str>) -> String {
    let (before, rest) = RECIPE.split_once("[data]").unwrap();
    let (_, after) = rest.split_once("[student]").unwrap();
    let held_out = held_out.map_or(String::new(), |held_out| format!("held_out = {held_out:?}\n"));
    let data = "[data]\ntokenizer = \"tokenizer\"\n";
    format!("{before}{data}[cache]\ntrain = {train:?}\n{held_out}[student]{after}")
}

#[test]
fn training_on_a_finished_cache_is_training_on_what_made_it() {
    let small = SmallRun::new();
    distill::run(&small.recipe(&[]), &small.options("run")).unwrap();
    fs::rename(small.path("teacher"), small.path("teacher is gone")).unwrap();
    fs::remove_file(small.path("text.jsonl")).unwrap();
    fs::write(small.path("recipe.toml"), captured("run/cache/train", Some("run/cache/held_out"))).unwrap();
    let recipe = small.recipe(&[]);
    let report = distill::run(&recipe, &small.options("again")).unwrap();
    for arm in ["", "control/"] {
        let weights = |run: &str| {
            let file = format!("{run}/{arm}checkpoints/step-000024/model.safetensors");
            fs::read(small.path(&file)).unwrap()
        };
        assert!(weights("run") == weights("again"), "{arm}");
    }
    let roles: Vec<Role> = report.arms.iter().map(|arm| arm.role).collect();
    assert_eq!(roles, [Role::Student, Role::Control], "nothing is known of the teacher's parameters");
    assert!(report.cache.is_some() && report.arms[0].evaluation.kl_to_teacher.is_some());
    let frozen = Recipe::load(small.path("again/recipe.toml"), &[]).unwrap();
    assert_eq!(frozen.to_toml(), recipe.to_toml());
    assert_eq!((frozen.data.seq_len, frozen.cache.temperatures.as_slice()), (32, &[1.0, 2.0][..]));
    // Once more does nothing, from the frozen recipe too.
    assert_eq!(distill::report(&frozen, &small.options("again")).unwrap().arms.len(), 2);
    let error = precompute::run_part(&recipe, &small.options("other")).map(drop).unwrap_err();
    assert_eq!(
        small.shortened(&error.to_string()),
        "DIR/recipe.toml: `cache.train` names a finished cache, so there is nothing to compute; train on it, with \
         `limbeck distill`"
    );
}

#[test]
fn an_import_is_trained_on() {
    let small = SmallRun::new();
    let tokenizer = Tokenizer::open(&small.path("tokenizer")).unwrap();
    let lines = documents(3, 40).into_iter().map(|text| {
        let ids = tokenizer.encode(&text).unwrap();
        let row = |id: &u32| {
            let other = (id + 1) % small.vocab_size as u32;
            json!({ id.to_string(): { "logprob": -0.4, "rank": 1 }, other.to_string(): { "logprob": -1.4, "rank": 2 } })
        };
        let rows: Vec<_> = std::iter::once(json!(null)).chain(ids[1..].iter().map(row)).collect();
        json!({ "prompt_token_ids": ids, "prompt_logprobs": rows }).to_string()
    });
    fs::write(small.path("rows.jsonl"), lines.collect::<Vec<_>>().join("\n")).unwrap();
    let options = ImportOptions {
        tokenizer,
        vocab_size: None,
        teacher_name: "a server".into(),
        teacher_fingerprint: None,
        temperature: 1.0,
        split: "train".into(),
        seq_len: 16,
        sequences_per_shard: 8,
        codec: Codec::Compact,
    };
    import::jsonl(&[small.path("rows.jsonl")], None, &small.path("imported"), &options).unwrap();
    fs::write(small.path("recipe.toml"), captured("imported", Some("imported"))).unwrap();
    let report = distill::run(&small.recipe(&[]), &small.options("run")).unwrap();
    let [student, _] = &report.arms[..] else { panic!("{:?}", report.arms) };
    // The row has its label at e^-0.4; a student that had learnt nothing would be near ln V = 5.8.
    assert!(student.evaluation.cross_entropy < 5.0, "{:?}", student.evaluation);
    assert!(CacheReader::open(small.path("imported")).unwrap().manifest().counts.valid_rows > 100);
}

#[test]
fn what_the_cache_answers_may_not_be_said_beside_it() {
    let small = SmallRun::new();
    precompute::run(&small.recipe(&[]), &small.options("run")).unwrap();
    let recipe = captured("run/cache/train", None);
    let mistake = |text: &str, overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|word| word.to_string()).collect();
        let error = Recipe::parse(text, small.path("recipe.toml"), &overrides).map(drop).unwrap_err();
        small.shortened(&error.to_string()).replace("DIR/recipe.toml: ", "")
    };
    for set in ["data.tokens=5", "data.seq_len=5", "cache.top_k=3", "cache.temperatures=[1.0]", "cache.dir=elsewhere"] {
        let key = set.split_once('=').unwrap().0;
        let problem = "is given beside `cache.train`, whose cache is used as it is; remove one of the two";
        assert_eq!(mistake(&recipe, &[set]), format!("--set {set}: `{key}` {problem}"));
    }
    assert_eq!(
        mistake(RECIPE, &["cache.held_out=elsewhere"]),
        "--set cache.held_out=elsewhere: `cache.held_out` is given without `cache.train`; give both, or hold text out \
         by data.held_out"
    );
    assert_eq!(
        mistake(&recipe, &["loss.temperature=3.0"]),
        "--set loss.temperature=3.0: `loss.temperature` is 3.0, but the cache `cache.train` was captured at [1.0, 2.0]; \
         use one of these"
    );
    for key in ["sources", "tokens", "seq_len"] {
        let text: String = RECIPE
            .lines()
            .filter(|line| !line.starts_with(&format!("{key} = ")))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(mistake(&text, &[]), format!("line 3: `data.{key}` is missing; add `{key}`"));
    }
}
