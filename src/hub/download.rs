//! Downloads from the hub: which files of a model, in pieces if need be, and checked by size and SHA-256.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo, Metadata};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::{HubName, Wanted};
use crate::error::{Error, Result};

/// Attempts at a file that bring nothing new before giving up.
const ATTEMPTS: u32 = 5;
/// Before the second attempt; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The hub's own ending of what has arrived so far.
const PARTIAL: &str = "part";

const CONFIGURATION: [&str; 2] = ["config.json", "params.json"];
const TOKENIZER: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"];
const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A hub, and the folder of this machine that holds what came from it.
#[derive(Debug, Clone)]
pub struct Hub {
    cache: Cache,
    endpoint: Option<String>,
}

/// What was asked for in this process, and where it is.
static KNOWN: Mutex<BTreeMap<(PathBuf, Wanted), PathBuf>> = Mutex::new(BTreeMap::new());

pub(super) fn remembered(path: &Path, name: &HubName, wanted: Wanted) -> Result<PathBuf> {
    // Held while downloading: two threads that want the same files wait for one download.
    let mut known = KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let key = (path.to_path_buf(), wanted);
    if let Some(found) = known.get(&key) {
        return Ok(found.clone());
    }
    let found = Hub::from_environment().fetch(name, wanted)?;
    known.insert(key, found.clone());
    Ok(found)
}

impl Hub {
    /// The hub and the cache that other programs use: `HF_ENDPOINT`, `HF_HOME` and the token in it, as the `hf-hub` crate
    /// reads them.
    pub fn from_environment() -> Hub {
        Hub { cache: Cache::from_env(), endpoint: None }
    }

    /// A hub at an address, and a folder of its own for what comes from it.
    pub fn at(endpoint: impl Into<String>, cache: impl Into<PathBuf>) -> Hub {
        Hub { cache: Cache::new(cache.into()), endpoint: Some(endpoint.into()) }
    }

    /// The folder with a model's files, or the one file that its name names. What is in the cache already is not
    /// downloaded again; when the hub cannot be reached, what is in the cache has to do.
    ///
    /// # Errors
    /// The model or the revision is not there, a file cannot be had, or is not what the hub says it is.
    pub fn fetch(&self, name: &HubName, wanted: Wanted) -> Result<PathBuf> {
        let repo = Repo::with_revision(name.model.clone(), RepoType::Model, name.revision.clone());
        let api = self.api(name)?;
        let remote = api.repo(repo.clone());
        let info = match remote.info() {
            Ok(info) => info,
            Err(error) => return self.cached(name, repo, wanted, &error),
        };
        let listed: Vec<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let files = select(name, &listed, wanted)?;
        let mut folder = None;
        for file in &files {
            let path = self.file(name, &api, &remote, &repo, &info.sha, file)?;
            folder = path.ancestors().nth(Path::new(file).components().count()).map(Path::to_path_buf);
        }
        let folder = folder.ok_or_else(|| problem(name, "has no files that are needed".into(), "check its name"))?;
        Ok(name.file.as_ref().map_or(folder.clone(), |file| folder.join(file)))
    }

    fn api(&self, name: &HubName) -> Result<Api> {
        // Without the crate's own repetitions: they count what has arrived in this process alone.
        let mut builder = match self.endpoint {
            Some(_) => ApiBuilder::from_cache(self.cache.clone()),
            None => ApiBuilder::from_env(),
        };
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        builder.with_progress(false).with_retries(0).build().map_err(|error| failed(name, "the hub's client", &error))
    }

    /// What an earlier run downloaded, when the hub does not answer.
    fn cached(&self, name: &HubName, repo: Repo, wanted: Wanted, error: &ApiError) -> Result<PathBuf> {
        let first: Vec<&str> = match (&name.file, wanted) {
            (Some(file), _) => vec![file],
            (None, Wanted::Tokenizer) => vec!["tokenizer.json"],
            (None, _) => CONFIGURATION.to_vec(),
        };
        let cached = self.cache.repo(repo);
        let found = (!refused(error)).then(|| first.iter().find_map(|file| cached.get(file))).flatten();
        let Some(found) = found else { return Err(failed(name, "the list of its files", error)) };
        tracing::warn!("hf:{} is taken from {} as it is: {}", name.model, found.display(), one_line(error));
        Ok(if name.file.is_some() { found } else { found.parent().unwrap_or(Path::new("")).to_path_buf() })
    }

    fn file(
        &self,
        name: &HubName,
        api: &Api,
        remote: &ApiRepo,
        repo: &Repo,
        commit: &str,
        file: &str,
    ) -> Result<PathBuf> {
        let cached = self.cache.repo(repo.clone());
        let place = cached.pointer_path(commit).join(file);
        if place.is_file() {
            return Ok(place);
        }
        let url = remote.url(file);
        let (mut idle, mut pause, mut arrived) = (0, FIRST_PAUSE, 0);
        loop {
            let before = arrived;
            let result = api.metadata(&url).and_then(|metadata| {
                let blob = cached.blob_path(metadata.etag());
                let partial = blob.with_extension(PARTIAL);
                let size = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
                if size(&partial) >= metadata.size() as u64 && partial.is_file() {
                    // Nothing is left to ask for, so it is another file's, or its end was reached and not seen.
                    fs::remove_file(&partial).map_err(ApiError::from)?;
                }
                tracing::info!("downloading {file} of hf:{}, {} bytes", name.model, metadata.size());
                let path = remote.download(file);
                arrived = arrived.max(size(&partial));
                path.map(|path| (path, metadata))
            });
            let error = match result {
                Ok((path, metadata)) => {
                    check(name, file, &path, &metadata)?;
                    if metadata.commit_hash() != commit {
                        let problem = "was changed while it was being downloaded".into();
                        return Err(problem_with(name, file, problem, "run the same command again"));
                    }
                    return Ok(path);
                }
                Err(error) => error,
            };
            // What has arrived is kept, so an attempt that brought something is progress, however often it breaks.
            idle = if arrived > before { 0 } else { idle + 1 };
            if refused(&error) || idle >= ATTEMPTS {
                return Err(failed(name, file, &error));
            }
            tracing::warn!("{file} of hf:{} goes on after {arrived} bytes: {}", name.model, one_line(&error));
            std::thread::sleep(pause);
            pause = if idle == 0 { FIRST_PAUSE } else { pause * 2 };
        }
    }
}

/// The files of a list that are needed. Pickled weights are none.
fn select<'a>(name: &'a HubName, listed: &[&'a str], wanted: Wanted) -> Result<Vec<&'a str>> {
    if let Some(file) = &name.file {
        if !listed.contains(&file.as_str()) {
            return Err(problem_with(name, file, "is not among its files".into(), "check its name on the hub"));
        }
        // The parts of a split model are opened beside the first.
        let parts = match file.split_once("-00001-of-") {
            Some((stem, rest)) => {
                listed.iter().copied().filter(|other| other.starts_with(stem) && other.ends_with(rest)).collect()
            }
            None => vec![file.as_str()],
        };
        return Ok(parts);
    }
    let has = |file: &str| listed.contains(&file);
    let is_weight = |file: &&&str| match () {
        _ if file.contains('/') => false,
        _ if has(SINGLE_FILE) => **file == SINGLE_FILE,
        _ if has(INDEX_FILE) => **file == INDEX_FILE || file.starts_with("model-") && file.ends_with(".safetensors"),
        _ => file.starts_with("consolidated") && file.ends_with(".safetensors"),
    };
    let small = |names: &[&str]| listed.iter().copied().filter(|file| names.contains(file)).collect::<Vec<_>>();
    let mut files = match wanted {
        Wanted::Configuration => small(&CONFIGURATION),
        // With the configuration, as not every model has a tokenizer.
        Wanted::Tokenizer => [small(&CONFIGURATION), small(&TOKENIZER)].concat(),
        Wanted::Everything => [small(&CONFIGURATION), small(&TOKENIZER)].concat(),
    };
    if wanted == Wanted::Everything {
        let weights: Vec<&str> = listed.iter().filter(is_weight).copied().collect();
        if weights.is_empty() {
            let tip = match listed.iter().find(|file| file.ends_with(".gguf")) {
                Some(file) => format!("name a file of it, as in hf:{}/{file}", name.model),
                None => "use a model that is stored as safetensors or GGUF".into(),
            };
            return Err(problem(name, "has no weights in safetensors".into(), &tip));
        }
        files.extend(weights);
    }
    Ok(files)
}

/// Compares a download with what the hub says it is; one that is not is removed.
fn check(name: &HubName, file: &str, path: &Path, metadata: &Metadata) -> Result<()> {
    let size = fs::metadata(path).map_err(Error::io(path))?.len();
    let mut wrong = None;
    if size != metadata.size() as u64 {
        wrong = Some(format!("has {size} bytes, and the hub says {}", metadata.size()));
    } else if metadata.etag().len() == 64 && metadata.etag().bytes().all(|byte| byte.is_ascii_hexdigit()) {
        // Large files have their SHA-256 for a tag; small ones have that of git, which is no hash of the content alone.
        let found = sha256(path)?;
        if !found.eq_ignore_ascii_case(metadata.etag()) {
            wrong = Some(format!("has the SHA-256 {found}, and the hub says {}", metadata.etag()));
        }
    }
    let Some(problem) = wrong else { return Ok(()) };
    // The name in the cache is a link to the content; both have to go, so that the next run downloads it again.
    if let Ok(content) = fs::canonicalize(path) {
        fs::remove_file(&content).map_err(Error::io(&content))?;
    }
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path).map_err(Error::io(path))?;
    }
    Err(problem_with(name, file, problem, "it was removed; run the same command again"))
}

fn sha256(path: &Path) -> Result<String> {
    let mut reader = BufReader::with_capacity(1 << 20, fs::File::open(path).map_err(Error::io(path))?);
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match reader.read(&mut buffer).map_err(Error::io(path))? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether the hub answered, and will not answer otherwise the next time.
fn refused(error: &ApiError) -> bool {
    matches!(error, ApiError::RequestError(source) if source.to_string().contains("status: 4"))
}

fn one_line(error: &ApiError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn problem(name: &HubName, problem: String, tip: &str) -> Error {
    Error::file(format!("hf:{}@{}", name.model, name.revision), problem, tip)
}

fn problem_with(name: &HubName, file: &str, what: String, tip: &str) -> Error {
    problem(name, format!("{file} {what}"), tip)
}

fn failed(name: &HubName, what: &str, error: &ApiError) -> Error {
    let text = one_line(error);
    let tip = if text.contains("status: 401") || text.contains("status: 403") {
        "ask for access to the model on the hub, and put a token where its own programs look for one"
    } else if text.contains("status: 404") {
        "check the names of the model and of the revision"
    } else {
        "run the same command again: what has arrived is kept"
    };
    problem(name, format!("{what} could not be downloaded: {text}"), tip)
}
