//! A recipe's remote teacher: how it is reached, and when it need not be.

use std::time::Duration;

use crate::{
    cache::{CacheReader, TeacherIdentity, inside},
    error::{Error, Result},
    inputs::Inputs,
    recipe::{Recipe, TeacherSection},
    remote::{ApiKey, Attempts, RemoteConfig, RemoteTeacher, SERVED},
    run::RunOptions,
};

/// Ids that a remote teacher may name. Servers do not say how many there are; the student predicts as many.
pub(super) fn vocab_size(inputs: &Inputs) -> usize {
    inputs.student.vocab_size.max(inputs.tokenizer.vocab_size())
}

/// What finished caches say of their remote teacher, if it is the recipe's: its server need not run any more.
pub(super) fn finished(section: &TeacherSection, inputs: &Inputs) -> Option<TeacherIdentity> {
    let teacher = |split: &str| {
        let cache = CacheReader::open(inside(&inputs.plan.cache_dir, split)).ok()?;
        let teacher = cache.manifest().settings.soft_targets.as_ref()?.teacher.clone();
        (Some(&teacher.name) == section.model.as_ref() && teacher.fingerprint.starts_with(SERVED)).then_some(teacher)
    };
    let train = teacher("train")?;
    (inputs.data.held_out.is_none() || teacher("held_out")? == train).then_some(train)
}

/// Asks the servers of a recipe's remote teacher what they serve.
pub(super) fn connect(
    recipe: &Recipe,
    section: &TeacherSection,
    inputs: &Inputs,
    options: &RunOptions,
) -> Result<RemoteTeacher> {
    let api_key = match &section.api_key_env {
        None => None,
        Some(name) => {
            let key = std::env::var(name).ok().and_then(ApiKey::new).ok_or_else(|| {
                let problem = format!("names `{name}`, which holds no key in this environment");
                recipe.error("teacher.api_key_env", problem, format!("export {name}, or correct the name"))
            })?;
            Some(key)
        }
    };
    let config = RemoteConfig {
        urls: section.url.clone(),
        model: section.model.clone().unwrap_or_default(),
        api_key,
        concurrency: section.concurrency.unwrap_or(8),
        request_tokens: section.batch_tokens,
        timeout: Duration::from_secs_f64(section.timeout.unwrap_or(300.0)),
        requests_per_second: section.requests_per_second,
        attempts: Attempts { retries: section.retries.unwrap_or(Attempts::default().retries), ..Attempts::default() },
    };
    let (vocab_size, longest) = (vocab_size(inputs), inputs.data.seq_len + 1);
    let teacher = RemoteTeacher::connect(config, recipe.cache.selection(), vocab_size, longest, &options.stop)?;
    teacher.ok_or_else(|| Error::Interrupted { saved: inputs.plan.cache_dir.clone() })
}
