//! Teachers behind a server that gives the log-probabilities of a prompt's tokens: vLLM, SGLang, and what speaks like one
//! of them. Token ids go there, most probable ids come back, and both are compared: no text is ever tokenised again.
//!
//! ```text
//! packed sequences ─ documents (`prompts.rs`) ─ requests (`work.rs`: threads, attempts; `pace.rs`: when, and whom)
//!   ─ HTTP (`client.rs`) ─ JSON (`protocol.rs`) ─ checked rows (`rows.rs`) ─ targets, in the order of the sequences
//! ```
//! A server knows nothing of packed documents, so each is a prompt of its own. It gives log-probabilities of some ids and
//! no more: a row's **tail** is one minus the sum of what is kept, as in [`import`](crate::import), and there is no
//! normaliser. Nothing here knows of models, recipes or caches; no environment variable is read.

mod client;
mod pace;
mod prompts;
mod protocol;
mod rows;
mod served;
mod work;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::selection::Selection;
use crate::targets::{PackedSequence, SparseTargets, TargetKind};
use client::Client;
use pace::Pace;
use prompts::{requests, targets};
use served::Served;
use work::Work;

/// What the fingerprint of a remote teacher starts with: it is of what the server says of itself, and not of weights.
pub const SERVED: &str = "served:";

/// Where a teacher is served, and how it is asked.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// Addresses with the path that OpenAI's interface is below, as in `http://host:8000/v1`. They share the work.
    pub urls: Vec<String>,
    /// The model's name on all of them.
    pub model: String,
    /// Sent as a bearer token.
    pub api_key: Option<ApiKey>,
    /// Requests under way at once, over all addresses together.
    pub concurrency: usize,
    /// Tokens in one request; a whole document is always sent.
    pub request_tokens: u64,
    /// The longest that one answer may take, from connecting to its last byte.
    pub timeout: Duration,
    /// Most requests begun in a second, over all addresses together.
    pub requests_per_second: Option<f64>,
    pub attempts: Attempts,
}

/// How often a request that failed is made again, and how long after. There is no chance in it: the work is spread over
/// a bounded number of requests already.
#[derive(Debug, Clone, Copy)]
pub struct Attempts {
    /// After the first.
    pub retries: u32,
    /// Before the second; each further wait is twice as long. A server's `Retry-After` is obeyed instead.
    pub first_wait: Duration,
    pub longest_wait: Duration,
}

impl Default for Attempts {
    /// About a minute in all.
    fn default() -> Self {
        Attempts { retries: 7, first_wait: Duration::from_millis(500), longest_wait: Duration::from_secs(30) }
    }
}

/// A secret that no message shows.
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// `None` for what no header can hold.
    pub fn new(key: impl Into<String>) -> Option<ApiKey> {
        let key = key.into();
        (!key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic())).then_some(ApiKey(key))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiKey(..)")
    }
}

/// A teacher behind one or more servers.
pub struct RemoteTeacher {
    work: Arc<Work>,
    served: Served,
    selection: Selection,
    vocab_size: usize,
    longest: usize,
}

impl RemoteTeacher {
    /// Asks every server which models it has. `longest` is the most tokens that a document may have, `vocab_size` the
    /// number of ids that targets may name.
    ///
    /// # Errors
    /// [`Error::Server`] when one cannot be reached, lacks the model, is none that gives log-probabilities of token ids,
    /// or reads fewer tokens; [`Error::Mismatch`] when two of them serve something else under the same name;
    /// [`Error::Usage`] for a selection that no server can give.
    pub fn connect(
        config: RemoteConfig,
        selection: Selection,
        vocab_size: usize,
        longest: usize,
        stop: &AtomicBool,
    ) -> Result<Option<Self>> {
        if config.urls.is_empty() || config.concurrency == 0 {
            return Err(Error::usage(
                "a remote teacher without an address or a connection",
                "give at least one of each",
            ));
        }
        let client = Arc::new(Client::new(config.timeout, config.api_key.as_ref().map(|key| key.0.as_str())));
        let Some(all) = Served::ask_all(&client, &config, stop)? else { return Ok(None) };
        for served in &all {
            served.check_longest(longest)?;
            all[0].check_same(served)?;
        }
        let served = all[0].clone();
        let pace = Pace::new(config.urls.len(), config.requests_per_second);
        let work = Arc::new(Work { protocol: served.protocol, client, pace, config });
        let mut teacher = RemoteTeacher { work, served, selection: Selection::default(), vocab_size, longest };
        teacher.set_selection(selection)?;
        Ok(Some(teacher))
    }

    /// Keeps something else from now on.
    ///
    /// # Errors
    /// For ids that are drawn, which takes whole rows, and for a selection that is none for the vocabulary.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        let name = selection.name();
        if selection.kind() == TargetKind::Sampled {
            let problem =
                format!("the selection {name} draws from whole rows, and a server gives the likeliest ids alone");
            return Err(Error::usage(problem, "use top_k, min_prob or top_p"));
        }
        selection.check(self.vocab_size).map_err(|unusable| {
            Error::usage(
                format!("the selection {name} has a {} that {}", unusable.parameter, unusable.problem),
                unusable.tip,
            )
        })?;
        self.selection = selection;
        Ok(())
    }

    /// What tells this teacher from others: [`SERVED`] and a hash of what the servers say of the model. Weights that were
    /// exchanged under the same name and path have the same.
    pub fn fingerprint(&self) -> String {
        self.served.fingerprint()
    }

    /// What is known of the numbers, and of their error, for a cache's manifest.
    pub fn precision(&self) -> String {
        format!(
            "not known ({}; log-probabilities as decimal text, tails 1 - sum to about 1e-6, at least 1e-8)",
            self.served
        )
    }

    /// How many tokens to ask for at once, so that all connections stay at work.
    pub fn tokens_at_once(&self) -> u64 {
        let config = &self.work.config;
        config.request_tokens.saturating_mul(4 * config.concurrency as u64)
    }

    /// The targets of each sequence, in their order, captured at temperature 1; `None` when `stop` was set meanwhile.
    ///
    /// Each comes with its number in the whole data set, for messages. What comes does not depend on the number of
    /// connections, nor on which server answered, as far as servers agree.
    ///
    /// # Errors
    /// [`Error::Server`] for a server that stays away, refuses, or gives what is no answer.
    pub fn targets(
        &self,
        sequences: &[(u64, &PackedSequence)],
        stop: &AtomicBool,
    ) -> Result<Option<Vec<SparseTargets>>> {
        if let Some((_, sequence)) = sequences.iter().find(|(_, sequence)| sequence.tokens.len() > self.longest) {
            let problem =
                format!("a sequence has {} tokens, more than the {} said", sequence.tokens.len(), self.longest);
            return Err(Error::usage(problem, "connect for sequences as long as they are"));
        }
        if let Some(id) =
            sequences.iter().flat_map(|(_, sequence)| &sequence.tokens).find(|&&id| id as usize >= self.vocab_size)
        {
            let problem = format!("the data has token id {id}, and the vocabulary has {} ids", self.vocab_size);
            return Err(Error::usage(problem, "tokenize the data with the teacher's own tokenizer"));
        }
        let requests = requests(sequences, self.work.config.request_tokens);
        let rows = work::run(&self.work, requests, &self.selection, self.vocab_size, stop)?;
        Ok(rows.map(|rows| targets(sequences, rows)))
    }
}
