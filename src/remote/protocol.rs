//! What is asked of a server and what it answers, as JSON: vLLM's completions with `prompt_logprobs`, SGLang's `/generate`
//! with `return_logprob`. Both take token ids, and say which token each number is about.
//!
//! llama.cpp's servers have neither: they give log-probabilities of what they generate, or of text.

use serde_json::{Value, json};

use super::client::one_line;
use super::prompts::Prompt;
use super::rows::{Flaw, Given, given};
use crate::import::{Entry, Place, server_places, without_infinities};

/// How a server is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Vllm,
    Sglang,
}

impl Protocol {
    /// What the owner of a model in `/models` says of the server. Gateways put their own name there, in front of vLLM.
    pub fn of_owner(owner: Option<&str>) -> Result<Protocol, &'static str> {
        match owner {
            Some("sglang") => Ok(Protocol::Sglang),
            Some("llamacpp") => {
                Err("it is llama.cpp's server, which gives no log-probabilities of a prompt's token ids")
            }
            _ => Ok(Protocol::Vllm),
        }
    }

    /// The address of completions, from one that ends in `/v1`.
    pub fn address(self, url: &str) -> String {
        let url = url.trim_end_matches('/');
        match self {
            Protocol::Vllm => format!("{url}/completions"),
            Protocol::Sglang => format!("{}/generate", url.strip_suffix("/v1").unwrap_or(url)),
        }
    }

    /// Asks for the `k` likeliest ids at each token of the prompts, and for as little more as can be.
    pub fn request(self, model: &str, prompts: &[Prompt], k: usize) -> Value {
        let ids: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.tokens.as_slice()).collect();
        match self {
            Protocol::Vllm => json!({
                "model": model,
                "prompt": ids,
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": k,
                "return_token_ids": true,
            }),
            Protocol::Sglang => json!({
                "input_ids": ids,
                "sampling_params": { "max_new_tokens": 0, "temperature": 1.0 },
                "return_logprob": true,
                "logprob_start_len": 0,
                "top_logprobs_num": k,
            }),
        }
    }

    /// The rows of an answer, for all prompts one after the other: a row for each token but a prompt's first.
    pub fn answer(self, body: &[u8], prompts: &[Prompt], k: usize) -> Result<Vec<Given>, Flaw> {
        let text = std::str::from_utf8(body).map_err(|_| Flaw::Wrong("it is not UTF-8".into()))?;
        let answer: Value = serde_json::from_str(&without_infinities(text)).map_err(|error| {
            if error.is_eof() {
                return Flaw::Cut("the answer ends in the middle".into());
            }
            let message = error.to_string();
            let place = message.split(" at line ").next().unwrap_or("").to_string();
            let number = if text.contains("NaN") { "; it holds NaN, which is no probability" } else { "" };
            Flaw::Wrong(format!("it is not JSON: {place}{number}"))
        })?;
        let answers = match self {
            Protocol::Vllm => in_order(choices(&answer)?, prompts.len())?,
            Protocol::Sglang => match &answer {
                Value::Array(answers) => answers.iter().collect(),
                Value::Object(_) => vec![&answer],
                _ => return Err(Flaw::Wrong("it is neither a list nor an object".into())),
            },
        };
        if answers.len() != prompts.len() {
            let problem = format!("it has {} answers to {} prompts", answers.len(), prompts.len());
            return Err(Flaw::Wrong(problem));
        }
        let mut rows = vec![];
        for (answer, prompt) in answers.into_iter().zip(prompts) {
            let about = |flaw: Flaw| {
                flaw.about(&format!("the document at token {} of sequence {}", prompt.start, prompt.sequence))
            };
            let places = match self {
                Protocol::Vllm => vllm_places(answer, prompt),
                Protocol::Sglang => sglang_places(answer, prompt),
            };
            let places = places.and_then(|places| one_each(places, prompt)).map_err(about)?;
            for (number, entries) in places.into_iter().enumerate() {
                let about = |flaw: Flaw| {
                    let place = prompt.start + number + 1;
                    flaw.about(&format!("the row about token {place} of sequence {}", prompt.sequence))
                };
                rows.push(given(entries, prompt.tokens[number + 1], k).map_err(about)?);
            }
        }
        Ok(rows)
    }
}

fn choices(answer: &Value) -> Result<&Vec<Value>, Flaw> {
    let choices = answer.get("choices").and_then(Value::as_array);
    choices.ok_or_else(|| Flaw::Wrong("it has no list of `choices`".into()))
}

/// Choices come in any order, each with its prompt's number.
fn in_order(choices: &[Value], prompts: usize) -> Result<Vec<&Value>, Flaw> {
    let mut ordered = vec![None; prompts];
    for (place, choice) in choices.iter().enumerate() {
        let index = choice.get("index").map_or(Some(place as u64), Value::as_u64);
        let slot = index.and_then(|index| ordered.get_mut(index as usize)).filter(|slot| slot.is_none());
        let Some(slot) = slot else {
            let problem = format!("its choice {place} is number {} of {prompts} prompts", choice["index"]);
            return Err(Flaw::Wrong(problem));
        };
        *slot = Some(choice);
    }
    Ok(ordered.into_iter().flatten().collect())
}

fn vllm_places(choice: &Value, prompt: &Prompt) -> Result<Vec<Place>, Flaw> {
    if let Some(ids) = choice.get("prompt_token_ids").and_then(Value::as_array) {
        same_ids(ids.iter().map(Value::as_u64), &prompt.tokens)?;
    }
    match choice.get("prompt_logprobs") {
        None | Some(Value::Null) => Err(Flaw::Wrong("it has no `prompt_logprobs`".into())),
        Some(places) => {
            let places = server_places(places, "prompt_logprobs").map_err(Flaw::Wrong)?;
            // An object of ids has no order, so ranks say what it is.
            match places.iter().flatten().flatten().find(|entry| entry.rank.is_none()) {
                None => Ok(places),
                Some(entry) => Err(Flaw::Wrong(format!("it has no rank for the id {}", entry.id))),
            }
        }
    }
}

fn sglang_places(answer: &Value, prompt: &Prompt) -> Result<Vec<Place>, Flaw> {
    let list = |name: &str| {
        let list = answer.pointer(&format!("/meta_info/{name}")).and_then(Value::as_array);
        list.ok_or_else(|| Flaw::Wrong(format!("it has no `meta_info.{name}`")))
    };
    let (own, top) = (list("input_token_logprobs")?, list("input_top_logprobs")?);
    same_ids(own.iter().map(|entry| entry.get(1)?.as_u64()), &prompt.tokens)?;
    if own.len() != top.len() {
        let problem = format!("it has {} rows of tokens and {} of likeliest ids", own.len(), top.len());
        return Err(Flaw::Wrong(problem));
    }
    let entry = |entry: &Value| -> Result<Entry, Flaw> {
        let id = entry.get(1).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let log_prob = entry.get(0).and_then(Value::as_f64);
        match (id, log_prob) {
            (Some(id), Some(log_prob)) => Ok(Entry { id, log_prob: log_prob as f32, rank: None }),
            _ => {
                let entry = one_line(&entry.to_string());
                Err(Flaw::Wrong(format!("it has the entry {entry}, which is not a log-probability and an id")))
            }
        }
    };
    let places = own.iter().zip(top).enumerate().map(|(number, (own, top))| {
        let Some(top) = top.as_array() else { return Ok(None) };
        if number == 0 {
            return Ok((!top.is_empty()).then(Vec::new));
        }
        let (own, mut entries) = (entry(own)?, top.iter().map(entry).collect::<Result<Vec<_>, _>>()?);
        if !entries.iter().any(|entry| entry.id == own.id) {
            entries.push(own);
        }
        Ok(Some(entries))
    });
    places.collect()
}

/// Whether a server read the ids that it was sent.
fn same_ids(theirs: impl ExactSizeIterator<Item = Option<u64>>, ours: &[u32]) -> Result<(), Flaw> {
    if theirs.len() != ours.len() {
        return Err(Flaw::Wrong(format!("it is about {} tokens, and {} were sent", theirs.len(), ours.len())));
    }
    match theirs.zip(ours).enumerate().find(|(_, (theirs, ours))| *theirs != Some(u64::from(**ours))) {
        None => Ok(()),
        Some((place, (theirs, ours))) => {
            let theirs = theirs.map_or("none".to_string(), |id| id.to_string());
            Err(Flaw::Wrong(format!("it has the id {theirs} at token {place}, and {ours} was sent")))
        }
    }
}

/// A row for each token but the first.
fn one_each(places: Vec<Place>, prompt: &Prompt) -> Result<Vec<Vec<Entry>>, Flaw> {
    if places.len() != prompt.tokens.len() {
        let problem = format!("it has {} rows for {} tokens", places.len(), prompt.tokens.len());
        return Err(Flaw::Wrong(problem));
    }
    let mut places = places.into_iter();
    if places.next().flatten().is_some() {
        let problem = "its first row is not empty, but nothing is predicted of a first token";
        return Err(Flaw::Wrong(problem.into()));
    }
    let rows = places.enumerate().map(|(number, place)| {
        place.ok_or_else(|| Flaw::Wrong(format!("it says nothing of token {}", prompt.start + number + 1)))
    });
    rows.collect()
}
