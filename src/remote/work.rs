//! Requests on several threads, each made again when it fails, and their rows in the order of the requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::client::{Client, Outcome};
use super::pace::{GLANCE, Pace};
use super::prompts::Prompt;
use super::protocol::Protocol;
use super::rows::{Flaw, Given, kept};
use super::served::{gone, refused};
use super::{Attempts, RemoteConfig};
use crate::error::{Error, Result};
use crate::import::CompleteRow;
use crate::selection::Selection;

/// An id, its rank, its number and its text, as JSON.
const ENTRY_BYTES: u64 = 1024;

/// What every thread needs.
pub(super) struct Work {
    pub config: RemoteConfig,
    pub protocol: Protocol,
    pub client: Arc<Client>,
    pub pace: Pace,
}

/// Set when it goes out of scope, so that no thread goes on for a caller that has left.
struct Ending(Arc<AtomicBool>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The rows of all requests, one after the other; `None` when `stop` was set meanwhile. Threads that wait for an answer
/// then are left to themselves: they end with it, and nobody hears of it.
pub(super) fn run(
    work: &Arc<Work>,
    requests: Vec<Vec<Prompt>>,
    selection: &Selection,
    vocab_size: usize,
    stop: &AtomicBool,
) -> Result<Option<Vec<CompleteRow>>> {
    let ending = Ending(Arc::default());
    let (requests, next) = (Arc::new(requests), Arc::new(AtomicUsize::new(0)));
    let (sender, receiver) = channel();
    for _ in 0..work.config.concurrency.min(requests.len()) {
        let (work, requests, next) = (work.clone(), requests.clone(), next.clone());
        let (sender, ended, selection) = (sender.clone(), ending.0.clone(), selection.clone());
        std::thread::spawn(move || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(request) = requests.get(number) else { return };
                let Some(rows) = work.rows(request, &selection, vocab_size, &ended).transpose() else { return };
                let failed = rows.is_err();
                if sender.send((number, rows)).is_err() || failed {
                    return;
                }
            }
        });
    }
    drop(sender);
    let mut rows: Vec<Option<Vec<CompleteRow>>> = (0..requests.len()).map(|_| None).collect();
    let mut missing = requests.len();
    while missing > 0 {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match receiver.recv_timeout(GLANCE) {
            Ok((number, found)) => {
                rows[number] = Some(found?);
                missing -= 1;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("threads end after the last request, or with an error"),
        }
    }
    Ok(Some(rows.into_iter().flatten().flatten().collect()))
}

impl Work {
    /// The rows of one request, after as many attempts as there may be; `None` when it is too late for them.
    fn rows(
        &self,
        prompts: &[Prompt],
        selection: &Selection,
        vocab_size: usize,
        ended: &AtomicBool,
    ) -> Result<Option<Vec<CompleteRow>>> {
        let k = selection.most_ids().min(vocab_size);
        let body = serde_json::to_vec(&self.protocol.request(&self.config.model, prompts, k)).expect("plain data");
        let tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let most_bytes = tokens as u64 * (k as u64 + 2) * ENTRY_BYTES;
        for attempt in 0.. {
            let Some(server) = self.pace.turn(ended) else { return Ok(None) };
            let url = &self.config.urls[server];
            let (problem, retry_after) = match self.client.post(&self.protocol.address(url), &body, most_bytes) {
                Outcome::Failed { problem, retry_after } => (problem, retry_after),
                Outcome::Refused { status, problem } => {
                    self.pace.ended(server, None);
                    return Err(too_many(url, k, &problem).unwrap_or_else(|| refused(url, status, &problem)));
                }
                Outcome::Answer(body) => match self.protocol.answer(&body, prompts, k) {
                    Err(Flaw::Cut(problem)) => (problem, None),
                    answer => {
                        self.pace.ended(server, None);
                        let rows = answer.map_err(|flaw| flawed(url, prompts, k, flaw))?;
                        return complete_all(rows, prompts, selection, vocab_size)
                            .map(Some)
                            .map_err(|problem| flawed(url, prompts, k, Flaw::Wrong(problem)));
                    }
                },
            };
            self.pace.ended(server, Some(self.config.attempts.wait(attempt, retry_after)));
            if attempt == self.config.attempts.retries {
                return Err(gone(url, attempt + 1, &problem));
            }
            tracing::debug!("{url}: attempt {}: {problem}", attempt + 1);
        }
        unreachable!("the last attempt returns")
    }
}

impl Attempts {
    /// How long after an attempt, counted from 0, the next one comes.
    pub(super) fn wait(&self, attempt: u32, retry_after: Option<Duration>) -> Duration {
        let doubled = self.first_wait.saturating_mul(2u32.saturating_pow(attempt)).min(self.longest_wait);
        retry_after.unwrap_or(doubled)
    }
}

fn complete_all(
    rows: Vec<Given>,
    prompts: &[Prompt],
    selection: &Selection,
    vocab_size: usize,
) -> Result<Vec<CompleteRow>, String> {
    let places = prompts.iter().flat_map(|prompt| (1..prompt.tokens.len()).map(move |place| (prompt, place)));
    let complete = places.zip(rows).map(|((prompt, place), row)| {
        kept(row, selection, vocab_size).map_err(|problem| {
            format!("the row about token {} of sequence {}: {problem}", prompt.start + place, prompt.sequence)
        })
    });
    complete.collect()
}

/// The error of an answer that is none.
fn flawed(url: &str, prompts: &[Prompt], k: usize, flaw: Flaw) -> Error {
    let (first, last) = (&prompts[0], &prompts[prompts.len() - 1]);
    let request = match (first.sequence, last.sequence) {
        (first, last) if first == last => format!("the answer about sequence {first}"),
        (first, last) => format!("the answer about sequences {first} to {last}"),
    };
    let (problem, tip) = match flaw {
        Flaw::Cut(problem) | Flaw::Wrong(problem) => {
            let tip = "see docs/remote.md for the servers and their settings; what is sealed is kept";
            (format!("{request}: {problem}"), tip.to_string())
        }
        Flaw::Few { got, place } => {
            let problem = format!("{request}: {place}: it has {got} ids, and {k} were asked for");
            (problem, fewer(k, Some(got as u64)))
        }
    };
    Error::Server { url: url.into(), problem, tip }
}

/// The error of a server that gives fewer ids than were asked for, if that is what it says.
fn too_many(url: &str, k: usize, problem: &str) -> Option<Error> {
    if !problem.contains("logprobs") {
        return None;
    }
    let limit = ["max allowed: ", "at most "].iter().find_map(|words| {
        let digits: String = problem.split_once(words)?.1.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    let problem = format!("it does not give {k} ids for a token: {problem}");
    Some(Error::Server { url: url.into(), problem, tip: fewer(k, limit) })
}

fn fewer(k: usize, limit: Option<u64>) -> String {
    let limit = limit.map_or("fewer".to_string(), |limit| format!("at most {limit}"));
    format!(
        "start it so that it does (vLLM: --max-logprobs {k}), or keep {limit}, by cache.top_k or the cap of cache.selection"
    )
}
