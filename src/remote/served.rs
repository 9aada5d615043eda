//! What a server says of the model that it serves, by which one remote teacher is told from another.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

use serde_json::Value;

use super::client::{Client, Outcome, one_line};
use super::pace::GLANCE;
use super::protocol::Protocol;
use super::{Attempts, RemoteConfig, SERVED};
use crate::error::{Error, Result};

/// A model of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Served {
    pub url: String,
    pub protocol: Protocol,
    model: String,
    /// What of the server's words is the same as long as the model is, by name: where it was loaded from, its sizes.
    said: Vec<(String, String)>,
    /// The most tokens of a prompt and its completion together.
    longest: Option<u64>,
}

impl Served {
    /// Asks every address, one after the other; `None` when `stop` was set meanwhile.
    pub fn ask_all(client: &Arc<Client>, config: &RemoteConfig, stop: &AtomicBool) -> Result<Option<Vec<Served>>> {
        let ended = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = channel();
        let (client, config, ending) = (client.clone(), config.clone(), ended.clone());
        std::thread::spawn(move || {
            let ask = |url: &String| Served::ask(&client, url, &config.model, &config.attempts, &ending);
            // Nobody listens any more when it was to stop.
            let _ = sender.send(config.urls.iter().map(ask).collect::<Result<Option<Vec<Served>>>>());
        });
        loop {
            if stop.load(Ordering::Relaxed) {
                ended.store(true, Ordering::Relaxed);
                return Ok(None);
            }
            match receiver.recv_timeout(GLANCE) {
                Ok(served) => return served,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the thread sends once"),
            }
        }
    }

    /// Asks for `/models`; `None` when `stop` was set meanwhile.
    fn ask(client: &Client, url: &str, model: &str, attempts: &Attempts, stop: &AtomicBool) -> Result<Option<Served>> {
        let address = format!("{}/models", url.trim_end_matches('/'));
        let mut attempt = 0;
        let body = loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            match client.get(&address) {
                Outcome::Answer(body) => break body,
                Outcome::Refused { status, problem } => return Err(refused(url, status, &problem)),
                Outcome::Failed { problem, retry_after } => {
                    if attempt == attempts.retries {
                        return Err(gone(url, attempt + 1, &problem));
                    }
                    let until = Instant::now() + attempts.wait(attempt, retry_after);
                    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                        std::thread::sleep(GLANCE.min(until.saturating_duration_since(Instant::now())));
                    }
                    attempt += 1;
                }
            }
        };
        Served::of(url, model, &body).map(Some)
    }

    fn of(url: &str, model: &str, body: &[u8]) -> Result<Served> {
        let answer: Option<Value> = serde_json::from_slice(body).ok();
        let Some(models) = answer.as_ref().and_then(|answer| answer.get("data")?.as_array()) else {
            return Err(Error::Server {
                url: url.into(),
                problem: "its `/models` is no list of models".into(),
                tip: "give the address that OpenAI's interface is below, as in http://host:8000/v1".into(),
            });
        };
        let name = |model: &Value| model.get("id").and_then(Value::as_str).map(str::to_string);
        let Some(found) = models.iter().find(|found| name(found).as_deref() == Some(model)) else {
            let names: Vec<String> = models.iter().filter_map(|model| Some(format!("`{}`", name(model)?))).collect();
            return Err(Error::Server {
                url: url.into(),
                problem: format!("it does not serve `{model}`, but {}", one_line(&names.join(", "))),
                tip: "set teacher.model to one of these".into(),
            });
        };
        let owner = found.get("owned_by").and_then(Value::as_str);
        let protocol = Protocol::of_owner(owner).map_err(|problem| Error::Server {
            url: url.into(),
            problem: problem.into(),
            tip: "run the model with vLLM or SGLang, or give its weights as teacher.checkpoint".into(),
        })?;
        let mut said = vec![];
        for (name, place) in [("root", "/root"), ("parent", "/parent")] {
            said.extend(found.pointer(place).and_then(Value::as_str).map(|value| (name.to_string(), one_line(value))));
        }
        for name in ["n_vocab", "n_embd", "n_params"] {
            let value = found.pointer(&format!("/meta/{name}")).and_then(Value::as_u64);
            said.extend(value.map(|value| (name.to_string(), value.to_string())));
        }
        let longest = found.get("max_model_len").and_then(Value::as_u64);
        Ok(Served { url: url.into(), protocol, model: model.into(), said, longest })
    }

    /// Refuses a server that cannot read a document of so many tokens; they write one more.
    pub fn check_longest(&self, tokens: usize) -> Result<()> {
        match self.longest.filter(|longest| *longest <= tokens as u64) {
            None => Ok(()),
            Some(longest) => Err(Error::Server {
                url: self.url.clone(),
                problem: format!(
                    "it reads and writes at most {longest} tokens, and a sequence may have {tokens} and one that it writes"
                ),
                tip: format!(
                    "use a data.seq_len of at most {}, or start it with more (vLLM: --max-model-len)",
                    longest.saturating_sub(2)
                ),
            }),
        }
    }

    /// Refuses a second server of something else.
    pub fn check_same(&self, other: &Served) -> Result<()> {
        if self.fingerprint() == other.fingerprint() {
            return Ok(());
        }
        Err(Error::Mismatch {
            what: "the teacher".into(),
            left_name: self.url.clone(),
            left: self.to_string(),
            right_name: other.url.clone(),
            right: other.to_string(),
            tip: "start all servers of teacher.url with the same model, from the same path".into(),
        })
    }

    pub fn fingerprint(&self) -> String {
        format!("{SERVED}{}", blake3::hash(self.to_string().as_bytes()).to_hex())
    }
}

impl fmt::Display for Served {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Vllm => "vLLM's",
            Protocol::Sglang => "SGLang's",
        };
        write!(formatter, "served as `{}` by {protocol} protocol", self.model)?;
        self.said.iter().try_for_each(|(name, value)| write!(formatter, ", {name} {value}"))
    }
}

/// What to do about an answer that will be the same every time.
pub(super) fn refused(url: &str, status: Option<u16>, problem: &str) -> Error {
    let tip = match status {
        Some(401 | 403) => "name the environment variable with its key in teacher.api_key_env",
        Some(300..=399 | 404 | 405) => {
            "give the address that OpenAI's interface is below, as in http://host:8000/v1, of vLLM or SGLang"
        }
        Some(422) => "it may take text alone and no token ids; see docs/remote.md for servers that do",
        Some(_) => "its log may say more; see docs/remote.md for how to start it",
        None => "see that the address is right, and docs/remote.md for how to start a server",
    };
    Error::Server { url: url.into(), problem: problem.into(), tip: tip.into() }
}

/// The error after the last attempt.
pub(super) fn gone(url: &str, attempts: u32, problem: &str) -> Error {
    let times = if attempts == 1 { "once".to_string() } else { format!("{attempts} times") };
    Error::Server {
        url: url.into(),
        problem: format!("a request failed {times}, at last so: {problem}"),
        tip: "see that the server runs, and give the same command again: what is sealed is kept".into(),
    }
}
