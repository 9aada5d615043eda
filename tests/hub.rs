//! Models on the hub: downloaded once, gone on with where a connection broke, and never taken when they are not what the
//! hub says. The server here speaks the hub's protocol: lists of files, redirects to where large files are, ranges, tags.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use limbeck::checkpoint::CheckpointReader;
use limbeck::hub::{Hub, HubName, Wanted, is_hub};
use serde_json::json;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Requests for content: the file, and the first byte that was asked for.
    asked: Vec<(String, u64)>,
    /// After so many bytes of the file's content the connection ends, each time once.
    breaks: Vec<(String, usize)>,
    /// The hub says another hash of this file.
    wrong_hash: Option<String>,
}

struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn start(fixture: &str) -> Server {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
        let mut state = State::default();
        for name in ["config.json", "model.safetensors"] {
            state.files.insert(name.into(), fs::read(folder.join(name)).unwrap());
        }
        state.files.insert("pytorch_model.bin".into(), vec![0; 10]);
        state.files.insert("original/consolidated.00.pth".into(), vec![0; 10]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(state));
        let shared = (state.clone(), address.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, address) = shared.clone();
                std::thread::spawn(move || drop(answer(stream, &state, &address)));
            }
        });
        Server { address, state }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub::at(&self.address, cache)
    }

    fn asked(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }
}

fn hash(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One request on one connection.
fn answer(stream: TcpStream, state: &Mutex<State>, address: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let mut start = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (from, to) = range.split_once('-').unwrap();
            start = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
        }
    }
    let mut stream = stream;
    let mut send = |status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n")?;
        stream.write_all(body)
    };
    let mut state = state.lock().unwrap();
    if path == "/api/models/org/tiny/revision/main" {
        let siblings: Vec<_> = state.files.keys().map(|name| json!({ "rfilename": name })).collect();
        let body = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return send("200 OK", &format!("Content-Length: {}\r\n", body.len()), body.as_bytes());
    }
    let (name, moved) = match (path.strip_prefix("/org/tiny/resolve/main/"), path.strip_prefix("/content/")) {
        (Some(name), _) => (name.to_string(), false),
        (_, Some(name)) => (name.to_string(), true),
        _ => (String::new(), false),
    };
    let Some(content) = state.files.get(&name).cloned() else {
        return send("404 Not Found", "Content-Length: 0\r\n", b"");
    };
    let large = name.ends_with(".safetensors");
    let tag = match state.wrong_hash.as_ref() == Some(&name) {
        true => "0".repeat(64),
        false if large => hash(&content),
        false => hash(&content)[..40].to_string(),
    };
    if large && !moved {
        let headers = format!(
            "Location: {address}/content/{name}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{tag}\"\r\n\
             X-Linked-Size: {}\r\nContent-Length: 0\r\n",
            content.len()
        );
        return send("302 Found", &headers, b"");
    }
    let (from, to) = start.unwrap_or((0, None));
    if from >= content.len() {
        return send("416 Range Not Satisfiable", "Content-Length: 0\r\n", b"");
    }
    let end = to.map_or(content.len(), |to| (to + 1).min(content.len()));
    let mut body = &content[from..end];
    let headers = format!(
        "ETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{}\r\nContent-Length: {}\r\n",
        end - 1,
        content.len(),
        body.len()
    );
    if to.is_none() {
        state.asked.push((name.clone(), from as u64));
        if let Some(place) = state.breaks.iter().position(|(broken, _)| *broken == name) {
            let (_, after) = state.breaks.remove(place);
            body = &body[..after.min(body.len())];
        }
    }
    send("206 Partial Content", &headers, body)
}

fn name() -> HubName {
    HubName::parse(Path::new("hf:org/tiny")).unwrap()
}

const MODEL: &str = "llama2_tiny";

fn original() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(MODEL)
}

fn asked(name: &str, from: u64) -> (String, u64) {
    (name.into(), from)
}

#[test]
fn a_model_is_downloaded_once_without_what_is_not_needed() {
    let (server, cache) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    let folder = server.hub(cache.path()).fetch(&name(), Wanted::Everything).unwrap();
    // Where other programs look for it.
    assert_eq!(folder, cache.path().join("models--org--tiny/snapshots").join(COMMIT));
    assert_eq!(server.asked(), [asked("config.json", 0), asked("model.safetensors", 0)]);
    let (ours, theirs) = (CheckpointReader::open(&folder).unwrap(), CheckpointReader::open(original()).unwrap());
    assert_eq!(ours.fingerprint().unwrap(), theirs.fingerprint().unwrap());
    server.hub(cache.path()).fetch(&name(), Wanted::Everything).unwrap();
    assert_eq!(server.asked(), []);
}

#[test]
fn configurations_come_without_weights() {
    let (server, cache) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    server.hub(cache.path()).fetch(&name(), Wanted::Configuration).unwrap();
    assert_eq!(server.asked(), [asked("config.json", 0)]);
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let (server, cache) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    let weights = || "model.safetensors".to_string();
    server.state.lock().unwrap().breaks = vec![(weights(), 1000), (weights(), 3000)];
    let folder = server.hub(cache.path()).fetch(&name(), Wanted::Everything).unwrap();
    assert_eq!(
        server.asked(),
        [
            asked("config.json", 0),
            asked("model.safetensors", 0),
            asked("model.safetensors", 1000),
            asked("model.safetensors", 4000)
        ]
    );
    let files = [folder.join("model.safetensors"), original().join("model.safetensors")];
    assert!(fs::read(&files[0]).unwrap() == fs::read(&files[1]).unwrap(), "the pieces do not make up the file");
}

#[test]
fn a_download_that_is_not_what_the_hub_says_is_removed() {
    let (server, cache) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().wrong_hash = Some("model.safetensors".into());
    let fetch = || server.hub(cache.path()).fetch(&name(), Wanted::Everything);
    let content = fs::read(original().join("model.safetensors")).unwrap();
    assert_eq!(
        fetch().unwrap_err().to_string(),
        format!(
            "hf:org/tiny@main: model.safetensors has the SHA-256 {}, and the hub says {}; it was removed; run the same command again",
            hash(&content),
            "0".repeat(64)
        )
    );
    server.state.lock().unwrap().wrong_hash = None;
    let folder = fetch().unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == content);
}

#[test]
fn what_is_in_the_cache_has_to_do_when_there_is_no_hub() {
    let (server, cache) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    let folder = server.hub(cache.path()).fetch(&name(), Wanted::Everything).unwrap();
    let none = Hub::at("http://127.0.0.1:9", cache.path());
    assert_eq!(none.fetch(&name(), Wanted::Everything).unwrap(), folder);
    let other = HubName::parse(Path::new("hf:org/other")).unwrap();
    let error = none.fetch(&other, Wanted::Everything).unwrap_err().to_string();
    assert!(error.starts_with("hf:org/other@main: the list of its files could not be downloaded: "), "{error}");
    assert!(error.ends_with("; run the same command again: what has arrived is kept"), "{error}");
}

#[test]
fn models_and_files_that_are_not_there_are_named() {
    let (server, cache) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    let refusal = |text: &str| {
        let name = HubName::parse(Path::new(text)).unwrap();
        server.hub(cache.path()).fetch(&name, Wanted::Everything).unwrap_err().to_string()
    };
    let missing = refusal("hf:org/none");
    assert!(missing.ends_with("404; check the names of the model and of the revision"), "{missing}");
    assert_eq!(
        refusal("hf:org/tiny/m.gguf"),
        "hf:org/tiny@main: m.gguf is not among its files; check its name on the hub"
    );
    server.state.lock().unwrap().files.remove("model.safetensors");
    assert_eq!(
        refusal("hf:org/tiny"),
        "hf:org/tiny@main: has no weights in safetensors; use a model that is stored as safetensors or GGUF"
    );
}

#[test]
fn names_are_read_and_wrong_ones_refused() {
    let read = |text: &str| HubName::parse(Path::new(text)).map(|name| (name.model, name.revision, name.file));
    assert_eq!(read("hf:a/b.c").unwrap(), ("a/b.c".into(), "main".into(), None));
    assert_eq!(read("hf:a/b@refs/pr/1").unwrap(), ("a/b".into(), "refs/pr/1".into(), None));
    assert_eq!(read("hf:a/b/q/m.gguf@v1").unwrap(), ("a/b".into(), "v1".into(), Some("q/m.gguf".into())));
    for (text, problem) in [
        ("hf:a", "a model has the name of its owner, a slash, and its own name"),
        ("hf:a/..", "a model has the name of its owner, a slash, and its own name"),
        ("hf:a/b@", "its revision is not the name of a branch, a tag or a commit"),
        ("hf:a/b/../c", "its file is not the name of a file"),
        ("a/b", "this is no name on the hub"),
    ] {
        let error = read(text).unwrap_err().to_string();
        assert_eq!(error, format!("{text}: {problem}; write it as hf:org/name or hf:org/name@revision"));
    }
    assert!(is_hub(Path::new("hf:a/b")) && !is_hub(Path::new("models/hf:a")));
}

#[test]
fn commands_take_names_on_the_hub_where_they_take_directories() {
    let (server, home) = (Server::start(MODEL), tempfile::tempdir().unwrap());
    let output = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .args(["inspect", "hf:org/tiny"])
        .env("HF_ENDPOINT", &server.address)
        .env("HF_HOME", home.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let fingerprint = CheckpointReader::open(original()).unwrap().fingerprint().unwrap();
    assert!(text.contains(&fingerprint), "{text}");
}
