//! A server of a real teacher that speaks as vLLM or SGLang do, and fails when told to. Listens on this machine alone, and
//! ends with the test. Its numbers come from a pass over each prompt by itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use limbeck::models::{Decoder, TokenLayout};
use limbeck::targets::{DistillBatch, PackedSequence};
use serde_json::{Map, Value, json};

/// What goes wrong with one answer to a prompt.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// A status with vLLM's form of an error, and a header.
    Status(u16, Option<&'static str>),
    /// The connection ends before the answer.
    Closed,
    /// It ends in the middle of the body.
    Cut,
    /// The body has no length, and ends with the connection, in the middle.
    CutWithoutLength,
    /// The answer comes only after this time.
    Slow(Duration),
    /// The answer, changed.
    Changed(fn(&mut Value)),
    /// Something else in its place.
    Body(&'static str),
}

/// What a server is, beside its model.
#[derive(Debug, Clone)]
pub struct Manner {
    pub owner: &'static str,
    pub model: &'static str,
    pub root: &'static str,
    pub max_logprobs: usize,
    pub max_model_len: usize,
}

pub const VLLM: Manner =
    Manner { owner: "vllm", model: "small", root: "/models/small", max_logprobs: 20, max_model_len: 64 };
pub const SGLANG: Manner = Manner { owner: "sglang", ..VLLM };

#[derive(Debug, Clone)]
pub struct Asked {
    pub at: Instant,
    pub authorization: Option<String>,
    pub body: Value,
}

pub struct PromptServer {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    manner: Manner,
    teacher: Mutex<Decoder>,
    /// What goes wrong with the next answers, and with all after so many.
    faults: Mutex<Vec<Fault>>,
    gone_after: Mutex<Option<usize>>,
    asked: Mutex<Vec<Asked>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
    /// Milliseconds that every answer takes at least.
    pace: AtomicUsize,
    stopped: AtomicBool,
}

impl PromptServer {
    pub fn start(checkpoint: &Path, manner: Manner) -> PromptServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            manner,
            teacher: Mutex::new(Decoder::open(checkpoint, &Device::flex()).unwrap()),
            faults: Mutex::default(),
            gone_after: Mutex::default(),
            asked: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
            pace: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let serving = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (stream, shared) = (stream.unwrap(), serving.clone());
                // A client that hangs up is no failure of the server.
                thread::spawn(move || drop(shared.converse(stream)));
            }
        });
        PromptServer { address, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Makes the next answers to prompts go wrong.
    pub fn fail<const N: usize>(&self, faults: [Fault; N]) {
        self.shared.faults.lock().unwrap().extend(faults);
    }

    pub fn faults_left(&self) -> usize {
        self.shared.faults.lock().unwrap().len()
    }

    /// Ends every connection after so many more prompts; `None` for a server that is back.
    pub fn gone_after(&self, requests: Option<usize>) {
        *self.shared.gone_after.lock().unwrap() = requests;
    }

    /// The requests for completions, in the order they came in.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Has every answer from now on take so many milliseconds, so that requests meet.
    pub fn take_at_least(&self, milliseconds: usize) {
        self.shared.pace.store(milliseconds, Ordering::Relaxed);
    }

    pub fn most_under_way(&self) -> usize {
        self.shared.most_under_way.load(Ordering::Relaxed)
    }
}

impl Drop for PromptServer {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(&self.address);
    }
}

/// Log-probabilities of the whole vocabulary at each token of a prompt but the first.
fn rows(teacher: &Decoder, tokens: &[u32]) -> Vec<Vec<f32>> {
    // The last token is read too, as servers do; its row is about the token that they write.
    let tokens: Vec<u32> = tokens.iter().copied().chain([tokens[0]]).collect();
    let segments = vec![0; tokens.len()];
    let sequence = PackedSequence { tokens, segments };
    let batch = DistillBatch { sequences: vec![sequence], targets: None, row_weights: None };
    let (hidden, _) = teacher.forward(&TokenLayout::of_batch(&teacher.config, &batch));
    let logits = teacher.logits(hidden).into_data().try_into_vec::<f32>().unwrap();
    let log_probs = |row: &[f32]| {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|logit| f64::from(logit - largest).exp()).sum();
        row.iter().map(|logit| (f64::from(logit - largest) - sum.ln()) as f32).collect()
    };
    let mut rows: Vec<Vec<f32>> = logits.chunks(teacher.config.vocab_size).map(log_probs).collect();
    rows.pop();
    rows
}

/// The ids of a row from the likeliest on.
fn order(row: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    ids.sort_by(|left, right| row[*right as usize].total_cmp(&row[*left as usize]).then(left.cmp(right)));
    ids
}

fn vllm_choice(teacher: &Decoder, tokens: &[u32], k: usize, index: usize) -> Value {
    let mut places = vec![Value::Null];
    for (row, token) in rows(teacher, tokens).iter().zip(&tokens[1..]) {
        let ids = order(row);
        let rank = ids.iter().position(|id| id == token).unwrap();
        let mut place = Map::new();
        for (id, rank) in [(*token, rank)].into_iter().chain(ids[..k].iter().enumerate().map(|(rank, id)| (*id, rank)))
        {
            let entry = json!({ "logprob": row[id as usize], "rank": rank + 1, "decoded_token": format!("<{id}>") });
            place.insert(id.to_string(), entry);
        }
        places.push(Value::Object(place));
    }
    json!({
        "index": index, "text": "x", "logprobs": null, "finish_reason": "length", "stop_reason": null,
        "token_ids": [0], "prompt_token_ids": tokens, "prompt_logprobs": places,
    })
}

fn sglang_answer(teacher: &Decoder, tokens: &[u32], k: usize) -> Value {
    let (mut own, mut top) = (vec![json!([null, tokens[0], null])], vec![Value::Null]);
    for (row, token) in rows(teacher, tokens).iter().zip(&tokens[1..]) {
        own.push(json!([row[*token as usize], token, null]));
        let entries = order(row)[..k].iter().map(|id| json!([row[*id as usize], id, null])).collect();
        top.push(Value::Array(entries));
    }
    let meta = json!({
        "id": "1", "finish_reason": { "type": "length", "length": 0 }, "prompt_tokens": tokens.len(),
        "input_token_logprobs": own, "input_top_logprobs": top, "output_token_logprobs": [],
    });
    json!({ "text": "", "meta_info": meta })
}

impl Shared {
    /// Answers request after request, until the client hangs up or the answer is that.
    fn converse(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream);
        loop {
            let mut head = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                if line.trim_end().is_empty() {
                    break;
                }
                head.push(line.trim_end().to_string());
            }
            let path = head[0].split(' ').nth(1).unwrap().to_string();
            let header = |name: &str| {
                let named =
                    |line: &&String| line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
                head[1..].iter().find(named).map(|line| line.split_once(':').unwrap().1.trim().to_string())
            };
            let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
            reader.read_exact(&mut body)?;
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            let going_on = match (path.as_str(), self.manner.owner) {
                ("/v1/models", _) => {
                    let model = json!({
                        "id": self.manner.model, "object": "model", "created": 1, "owned_by": self.manner.owner,
                        "root": self.manner.root, "parent": null, "max_model_len": self.manner.max_model_len,
                    });
                    send(&mut writer, 200, None, &json!({ "object": "list", "data": [model] }).to_string())?;
                    true
                }
                ("/v1/completions", "vllm") | ("/generate", "sglang") => {
                    let body: Value = serde_json::from_slice(&body).unwrap();
                    let asked =
                        Asked { at: Instant::now(), authorization: header("authorization"), body: body.clone() };
                    self.asked.lock().unwrap().push(asked);
                    let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
                    self.most_under_way.fetch_max(now, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(self.pace.load(Ordering::Relaxed) as u64));
                    let going_on = self.complete(&mut writer, &body);
                    self.under_way.fetch_sub(1, Ordering::Relaxed);
                    going_on?
                }
                _ => {
                    send(&mut writer, 404, None, "{\"detail\":\"Not Found\"}")?;
                    true
                }
            };
            if !going_on {
                return Ok(());
            }
        }
    }

    /// Whether the connection goes on.
    fn complete(&self, writer: &mut TcpStream, body: &Value) -> std::io::Result<bool> {
        if let Some(left) = self.gone_after.lock().unwrap().as_mut() {
            if *left == 0 {
                return Ok(false);
            }
            *left -= 1;
        }
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            if faults.is_empty() { None } else { Some(faults.remove(0)) }
        };
        match fault {
            Some(Fault::Status(status, header)) => {
                let error = json!({ "error": { "message": "the engine\nhas other work", "code": status } });
                send(writer, status, header, &error.to_string())?;
                return Ok(true);
            }
            Some(Fault::Closed) => return Ok(false),
            Some(Fault::Slow(time)) => thread::sleep(time),
            Some(Fault::Body(text)) => {
                send(writer, 200, None, text)?;
                return Ok(true);
            }
            _ => {}
        }
        let mut answer = match self.answer(body) {
            Ok(answer) => answer,
            Err(message) => {
                let error = json!({ "error": { "message": message, "type": "BadRequestError", "code": 400 } });
                send(writer, 400, None, &error.to_string())?;
                return Ok(true);
            }
        };
        if let Some(Fault::Changed(change)) = fault {
            change(&mut answer);
        }
        let text = answer.to_string();
        match fault {
            Some(Fault::Cut) => {
                write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", text.len())?;
                writer.write_all(&text.as_bytes()[..text.len() / 2])?;
                Ok(false)
            }
            Some(Fault::CutWithoutLength) => {
                write!(writer, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
                writer.write_all(&text.as_bytes()[..text.len() / 2])?;
                Ok(false)
            }
            _ => send(writer, 200, None, &text).map(|()| true),
        }
    }

    fn answer(&self, body: &Value) -> Result<Value, String> {
        let vllm = self.manner.owner == "vllm";
        let number = |name: &str| body[name].as_u64().unwrap() as usize;
        let k = if vllm { number("prompt_logprobs") } else { number("top_logprobs_num") };
        if vllm && k > self.manner.max_logprobs {
            let most = self.manner.max_logprobs;
            return Err(format!(
                "Requested prompt logprobs of {k}, which is greater than max allowed: {most} \
                 (parameter=prompt_logprobs, value={k})"
            ));
        }
        let prompts = body[if vllm { "prompt" } else { "input_ids" }].as_array().unwrap();
        let teacher = self.teacher.lock().unwrap();
        let answers = prompts.iter().enumerate().map(|(index, prompt)| {
            let tokens: Vec<u32> = prompt.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert!(tokens.len() < self.manner.max_model_len && !tokens.is_empty());
            if vllm { vllm_choice(&teacher, &tokens, k, index) } else { sglang_answer(&teacher, &tokens, k) }
        });
        let answers: Vec<Value> = answers.collect();
        Ok(if vllm {
            assert_eq!((body["model"].as_str(), body["max_tokens"].as_u64()), (Some(self.manner.model), Some(1)));
            json!({ "id": "cmpl-1", "object": "text_completion", "model": self.manner.model, "choices": answers })
        } else {
            assert_eq!((body["return_logprob"].as_bool(), body["logprob_start_len"].as_u64()), (Some(true), Some(0)));
            Value::Array(answers)
        })
    }
}

fn send(writer: &mut TcpStream, status: u16, header: Option<&str>, body: &str) -> std::io::Result<()> {
    let header = header.map(|header| format!("{header}\r\n")).unwrap_or_default();
    write!(writer, "HTTP/1.1 {status} Status\r\nContent-Length: {}\r\n{header}\r\n{body}", body.len())
}
