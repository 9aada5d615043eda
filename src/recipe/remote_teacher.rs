//! `[teacher]` with `mode = "remote"`: which keys it takes, and what they may be.

use super::schema::{Recipe, TeacherMode, TeacherSection};
use crate::error::Result;
use crate::targets::TargetKind;

/// Keys for a teacher behind a server alone.
const REMOTE_KEYS: [&str; 7] =
    ["url", "model", "concurrency", "timeout", "retries", "requests_per_second", "api_key_env"];

/// Refuses keys that do not go with the mode, and for a remote teacher what no server can give.
pub(super) fn check(recipe: &Recipe, teacher: &TeacherSection) -> Result<()> {
    let remote = teacher.mode == TeacherMode::Remote;
    let (foreign, problem, tip) = if remote {
        (&["checkpoint"][..], "is for a teacher that runs here, and this one is remote", "remove it")
    } else {
        let tip = "remove it, or use teacher.mode = \"remote\"";
        (&REMOTE_KEYS[..], "is for a teacher behind a server, and this one runs here", tip)
    };
    let foreign = foreign.iter().map(|name| format!("teacher.{name}")).find(|key| recipe.says(key));
    if let Some(key) = foreign {
        return Err(recipe.error(&key, problem, tip));
    }
    if !remote {
        return recipe.needs("teacher", "checkpoint");
    }
    ["url", "model"].iter().try_for_each(|key| recipe.needs("teacher", key))?;
    if teacher.url.is_empty() {
        return Err(recipe.error("teacher.url", "is empty", "give an address, as in \"http://host:8000/v1\""));
    }
    for url in &teacher.url {
        let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        let Some(host) = host.filter(|host| !host.is_empty() && !host.contains(char::is_whitespace)) else {
            let tip = "give the address that OpenAI's interface is below, as in \"http://host:8000/v1\"";
            return Err(recipe.error("teacher.url", format!("is `{url}`, which is no address"), tip));
        };
        // Not shown: it is a secret.
        if host.split('/').next().is_some_and(|host| host.contains('@')) || host.contains('?') {
            let tip = "give a key by teacher.api_key_env, which names an environment variable";
            return Err(recipe.error("teacher.url", "holds a name and password, or parameters", tip));
        }
    }
    for (key, value) in [("model", &teacher.model), ("api_key_env", &teacher.api_key_env)] {
        if value.as_ref().is_some_and(|value| value.is_empty()) {
            return Err(recipe.error(&format!("teacher.{key}"), "is empty", "give a name"));
        }
    }
    let concurrency = teacher.concurrency.unwrap_or(1) as f64;
    let range = "from 1 to 1024";
    recipe.number("teacher.concurrency", concurrency, (1.0..=1024.0).contains(&concurrency), range)?;
    let retries = f64::from(teacher.retries.unwrap_or(0));
    recipe.number("teacher.retries", retries, retries <= 100.0, "from 0 to 100")?;
    let timeout = teacher.timeout.unwrap_or(1.0);
    recipe.number(
        "teacher.timeout",
        timeout,
        timeout > 0.0 && timeout <= 86_400.0,
        "of seconds above 0, up to a day",
    )?;
    let rate = teacher.requests_per_second.unwrap_or(1.0);
    let range = "of at least 0.001";
    recipe.number("teacher.requests_per_second", rate, rate >= 0.001, range)?;
    let cache = &recipe.cache;
    if cache.selection().kind() == TargetKind::Sampled {
        let problem = format!(
            "is `{}`, which draws from whole rows, and a server gives the likeliest ids alone",
            cache.selection().name()
        );
        return Err(recipe.error("cache.selection", problem, "use top_k, min_prob or top_p"));
    }
    if cache.temperatures != [1.0] {
        let problem = "asks for other temperatures than 1.0, and a server gives log-probabilities at that alone";
        return Err(recipe.error("cache.temperatures", problem, "use [1.0]"));
    }
    Ok(())
}
