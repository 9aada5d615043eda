//! HTTP: one request and its whole answer, and what became of it. What an answer says is no matter here.

use std::time::Duration;

/// The longest answer to a question about models, and what is added to every other limit.
pub(super) const SMALL_ANSWER: u64 = 16 << 20;
/// What a server may ask one to wait.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Connections that are kept, and what goes with every request.
pub(super) struct Client {
    agent: ureq::Agent,
    api_key: Option<String>,
}

/// What came of a request.
pub(super) enum Outcome {
    /// The body of a success.
    Answer(Vec<u8>),
    /// What may be different another time, and how long the server asks to wait.
    Failed { problem: String, retry_after: Option<Duration> },
    /// What will be the same every time. No status: there was no answer.
    Refused { status: Option<u16>, problem: String },
}

impl Client {
    pub fn new(timeout: Duration, api_key: Option<&str>) -> Client {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            // A key must not follow to another host, and the body of a POST does not.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_idle_connections(1024)
            .max_idle_connections_per_host(1024)
            .user_agent(concat!("limbeck/", env!("CARGO_PKG_VERSION")))
            .build();
        Client { agent: config.new_agent(), api_key: api_key.map(str::to_string) }
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.api_key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        }
    }

    pub fn get(&self, url: &str) -> Outcome {
        self.outcome(self.authorized(self.agent.get(url)).call(), SMALL_ANSWER)
    }

    /// Sends JSON; refuses an answer of more than `most_bytes`.
    pub fn post(&self, url: &str, json: &[u8], most_bytes: u64) -> Outcome {
        let request = self.authorized(self.agent.post(url).header("Content-Type", "application/json"));
        self.outcome(request.send(json), most_bytes.saturating_add(SMALL_ANSWER))
    }

    fn outcome(&self, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>, most_bytes: u64) -> Outcome {
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(error) => return failed(&error),
        };
        let status = answer.status().as_u16();
        let retry_after =
            answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let retry_after = retry_after.map(|seconds| Duration::from_secs(seconds).min(LONGEST_RETRY_AFTER));
        let body = match answer.body_mut().with_config().limit(most_bytes).read_to_vec() {
            Ok(body) => body,
            Err(error) if status < 300 => return failed(&error),
            // That it failed is known; only the reason is lost.
            Err(_) => vec![],
        };
        match status {
            200..300 => Outcome::Answer(body),
            408 | 425 | 429 | 500.. => {
                Outcome::Failed { problem: format!("it answers {status}{}", self.reason(&body)), retry_after }
            }
            _ => {
                Outcome::Refused { status: Some(status), problem: format!("it answers {status}{}", self.reason(&body)) }
            }
        }
    }

    /// What a server says of its failure: the message of an error in JSON, else the beginning of the text. Some repeat
    /// the key that they refuse: it is not shown.
    fn reason(&self, body: &[u8]) -> String {
        let text = String::from_utf8_lossy(body);
        let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
        let said = json.as_ref().and_then(|json| {
            let places = ["/error/message", "/message", "/detail", "/error"];
            places.iter().find_map(|place| json.pointer(place)?.as_str())
        });
        let said = said.unwrap_or(&text);
        let said = match &self.api_key {
            Some(key) => one_line(&said.replace(key.as_str(), "<the key>")),
            None => one_line(said),
        };
        if said.is_empty() { said } else { format!(": {said}") }
    }
}

fn failed(error: &ureq::Error) -> Outcome {
    let problem = match error {
        ureq::Error::Timeout(_) => "it did not answer in time".to_string(),
        ureq::Error::HostNotFound => "there is no such host".to_string(),
        error => one_line(&error.to_string()),
    };
    match error {
        ureq::Error::BadUri(_)
        | ureq::Error::BodyExceedsLimit(_)
        | ureq::Error::RequireHttpsOnly(_)
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::InvalidProxyUrl => Outcome::Refused { status: None, problem },
        _ => Outcome::Failed { problem, retry_after: None },
    }
}

/// Text as a part of a message: one line, of bounded length.
pub(super) fn one_line(text: &str) -> String {
    const LONGEST: usize = 300;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_is_one_line_without_the_key() {
        let client = Client::new(Duration::from_secs(1), Some("s3cret-key"));
        let said = |body: &str| client.reason(body.as_bytes());
        assert_eq!(said("{\"error\": {\"message\": \"wrong key:\\n s3cret-key\"}}"), ": wrong key: <the key>");
        assert_eq!(said("no s3cret-key here, Bearer s3cret-key"), ": no <the key> here, Bearer <the key>");
        // Nor a part of it, where the text is cut.
        let long = format!("{}s3cret-key", "x".repeat(295));
        assert_eq!(said(&long), format!(": {}<the ...", "x".repeat(295)));
        assert_eq!(said(" \n"), "");
    }
}
