//! Recipes that train on a finished cache as it is: `cache.train` takes the place of text and teacher. What they would say
//! is taken from the cache's manifest, so that the rest of the program finds it where it always is.

use super::schema::Recipe;
use crate::cache::{CacheReader, Expectation};
use crate::error::Result;
use crate::targets::TargetSource;

/// Keys that the cache answers.
const DATA_KEYS: [&str; 4] = ["sources", "tokens", "seq_len", "held_out"];
const CACHE_KEYS: [&str; 10] = [
    "selection",
    "top_k",
    "temperatures",
    "codec",
    "levels",
    "log_normalizer",
    "router_layers",
    "reuse",
    "sequences_per_shard",
    "dir",
];

/// Fills in what the cache says.
///
/// # Errors
/// When a key is given beside it that it answers, when it cannot be opened or has no soft targets, and when the
/// held-out cache does not go with it.
pub(super) fn take_over(recipe: &mut Recipe) -> Result<()> {
    let Some(train) = recipe.cache.train.clone() else {
        return match &recipe.cache.held_out {
            None => Ok(()),
            Some(_) => {
                let tip = "give both, or hold text out by data.held_out";
                Err(recipe.error("cache.held_out", "is given without `cache.train`", tip))
            }
        };
    };
    let answered =
        DATA_KEYS.map(|key| format!("data.{key}")).into_iter().chain(CACHE_KEYS.map(|key| format!("cache.{key}")));
    for key in answered.chain(["teacher".into()]) {
        if recipe.says(&key) {
            let problem = "is given beside `cache.train`, whose cache is used as it is";
            return Err(recipe.error(&key, problem, "remove one of the two"));
        }
    }
    let reader = CacheReader::open(&train)?;
    let settings = &reader.manifest().settings;
    let Some(targets) = &settings.soft_targets else {
        let problem = format!("is {}, which has tokens without soft targets", train.display());
        return Err(recipe.error("cache.train", problem, "to train on text alone give data.sources instead"));
    };
    if let Some(held_out) = &recipe.cache.held_out {
        let expectation = Expectation {
            tokenizer_fingerprint: Some(settings.tokenizer.fingerprint.clone()),
            ..Expectation::default()
        };
        let held_out = CacheReader::open_expecting(held_out, &expectation)?;
        let captured = held_out.manifest().settings.soft_targets.as_ref().map(|targets| &targets.temperatures);
        if captured.is_some_and(|temperatures| !temperatures.contains(&1.0)) {
            let problem = "was not captured at temperature 1.0, at which held-out text is compared with the teacher";
            return Err(recipe.error("cache.held_out", problem, "capture it at 1.0 too, or leave the key away"));
        }
    }
    recipe.data.seq_len = settings.seq_len;
    recipe.data.tokens = reader.sequence_count() * settings.seq_len as u64;
    recipe.cache.selection = Some(targets.selection.clone());
    recipe.cache.temperatures = targets.temperatures.iter().map(as_written).collect();
    recipe.cache.codec = settings.codec;
    recipe.cache.levels = settings.levels;
    recipe.cache.log_normalizer = settings.log_normalizer;
    recipe.cache.router_layers = targets.router.as_ref().map_or(vec![], |router| router.layers.clone());
    recipe.cache.sequences_per_shard = settings.sequences_per_shard;
    Ok(())
}

/// The number that a recipe would have for a temperature of a manifest: 0.7 and not 0.699999988.
fn as_written(temperature: &f32) -> f64 {
    temperature.to_string().parse().expect("a number that was just written")
}

/// Takes what the cache says out of a recipe that is to be written, so that it can be read again.
pub(super) fn leave_out(recipe: &Recipe, table: &mut toml::Table) {
    if recipe.cache.train.is_none() {
        return;
    }
    for (section, keys) in [("data", &DATA_KEYS[..]), ("cache", &CACHE_KEYS[..])] {
        if let Some(section) = table.get_mut(section).and_then(toml::Value::as_table_mut) {
            keys.iter().for_each(|key| drop(section.remove(*key)));
        }
    }
}
