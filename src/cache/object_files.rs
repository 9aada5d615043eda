//! A finished cache in an object store: S3, Google Cloud Storage, Azure, or any HTTP server that gives ranges.
//!
//! Files are fetched in whole blocks, many in one request where they lie side by side, kept in a bounded amount of memory,
//! and asked for again when they do not come. Nothing here is trusted: `blocks` checks what came, and says when to
//! [`forget`](ShardSource::forget) it. Requests run on a thread of their own, and callers wait for them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::error::Error as _;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, ObjectStoreScheme, Result as StoreResult, RetryConfig,
};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time;
use url::{Position, Url};

use super::blocks::BLOCK_BYTES;
use super::range_store::{Claim, Piece, RangeStore};
use super::source::{CacheFiles, ShardSource};
use crate::error::{Error, Result};

/// What reading from afar may take, and when it gives up.
#[derive(Debug, Clone)]
pub struct ObjectOptions {
    /// Most bytes of files that are kept in memory.
    pub memory: usize,
    /// Bytes that are fetched beyond what is asked for, when a file is read from front to back.
    pub read_ahead: u64,
    /// Most bytes in one request.
    pub request: u64,
    /// How often a range is asked for before the reading fails. Each time the client of the store repeats what a server
    /// refuses, [`client_retries`](Self::client_retries) times.
    pub attempts: u32,
    pub client_retries: usize,
    /// The pause after the first failure; it doubles with each one.
    pub backoff: Duration,
    /// The longest that one attempt may take.
    pub timeout: Duration,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        ObjectOptions {
            memory: 256 << 20,
            read_ahead: 4 << 20,
            request: 8 << 20,
            attempts: 5,
            client_retries: 4,
            backoff: Duration::from_millis(200),
            timeout: Duration::from_secs(120),
        }
    }
}

impl ObjectOptions {
    fn retries(&self) -> RetryConfig {
        let backoff = BackoffConfig { init_backoff: self.backoff, ..BackoffConfig::default() };
        RetryConfig { backoff, max_retries: self.client_retries, retry_timeout: self.timeout }
    }
}

/// What the reading from a store came to. The client's own repetitions are not in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ObjectCounts {
    /// Ranges and lengths that were asked for, repetitions included.
    pub requests: u64,
    /// Attempts that failed and were repeated.
    pub retries: u64,
    /// Blocks that came damaged and were dropped.
    pub damaged: u64,
    /// Bytes that came.
    pub bytes: u64,
}

/// The files of a cache under an address.
#[derive(Clone)]
pub struct ObjectFiles {
    remote: Arc<Remote>,
}

impl ObjectFiles {
    /// The files under a prefix of a store that the caller made.
    ///
    /// # Errors
    /// [`Error::Io`] when no thread can be started.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str, options: ObjectOptions) -> Result<ObjectFiles> {
        let prefix = ObjectPath::from(prefix);
        let name = PathBuf::from(format!("{store}/{prefix}"));
        ObjectFiles::of(store, prefix, name, options)
    }

    /// The files under an address. Credentials come from where the store's own tools look for them: the variables
    /// `AWS_*`, `GOOGLE_*` and `AZURE_*` of the environment, and the machine's role.
    ///
    /// # Errors
    /// [`Error::Usage`] for an address that is none, or that says too little.
    pub fn open(url: &str, options: ObjectOptions) -> Result<ObjectFiles> {
        let parsed = Url::parse(url).map_err(|error| {
            let problem = format!("{url}: this is no address ({})", one_line(&error.to_string()));
            Error::usage(problem, "write it as s3://bucket/path/of/cache")
        })?;
        // What messages say holds no secrets.
        let name = PathBuf::from(&parsed[..Position::BeforeUsername]).as_os_str().to_owned();
        let mut name = name.into_string().expect("an address is text");
        if parsed.password().is_none() && !parsed.username().is_empty() {
            name += &format!("{}@", parsed.username());
        }
        name += &parsed[Position::BeforeHost..Position::AfterPath];
        if parsed.password().is_some() || parsed.query().is_some() || parsed.fragment().is_some() {
            let problem = format!("{name}: its address has a password, a `?` or a `#`, which are not sent");
            return Err(Error::usage(problem, "give credentials in the environment, as AWS_ACCESS_KEY_ID for example"));
        }
        let unusable = |error: String| {
            let tip = "use s3://, gs://, az://, http://, https:// or file://, and give credentials in the environment";
            Error::usage(format!("{name}: this address cannot be used: {error}"), tip)
        };
        let (scheme, prefix) =
            ObjectStoreScheme::parse(&parsed).map_err(|error| unusable(one_line(&error.to_string())))?;
        let store = make_store(&scheme, &parsed, &options)
            .ok_or_else(|| unusable("there is no store of this kind".into()))?
            .map_err(|error| unusable(described(&error)))?;
        ObjectFiles::of(store, prefix, name.into(), options)
    }

    fn of(
        store: Arc<dyn ObjectStore>,
        prefix: ObjectPath,
        name: PathBuf,
        options: ObjectOptions,
    ) -> Result<ObjectFiles> {
        let (runner, handle) = Runner::start().map_err(Error::io(&name))?;
        let kept = RangeStore::new(options.memory);
        let (files, counts) = (Mutex::default(), AtomicCounts::default());
        Ok(ObjectFiles {
            remote: Arc::new(Remote { store, prefix, name, options, handle, _runner: runner, kept, files, counts }),
        })
    }

    /// The address, without secrets.
    pub fn name(&self) -> &Path {
        &self.remote.name
    }

    pub fn counts(&self) -> ObjectCounts {
        let counts = &self.remote.counts;
        ObjectCounts {
            requests: counts.requests.load(Ordering::Relaxed),
            retries: counts.retries.load(Ordering::Relaxed),
            damaged: counts.damaged.load(Ordering::Relaxed),
            bytes: counts.bytes.load(Ordering::Relaxed),
        }
    }
}

fn make_store(
    scheme: &ObjectStoreScheme,
    url: &Url,
    options: &ObjectOptions,
) -> Option<StoreResult<Arc<dyn ObjectStore>>> {
    fn shared<S: ObjectStore>(store: StoreResult<S>) -> Option<StoreResult<Arc<dyn ObjectStore>>> {
        Some(store.map(|store| Arc::new(store) as _))
    }
    let (address, retries) = (url.as_str(), options.retries());
    match scheme {
        ObjectStoreScheme::AmazonS3 => {
            shared(AmazonS3Builder::from_env().with_url(address).with_retry(retries).build())
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            shared(GoogleCloudStorageBuilder::from_env().with_url(address).with_retry(retries).build())
        }
        ObjectStoreScheme::MicrosoftAzure => {
            shared(MicrosoftAzureBuilder::from_env().with_url(address).with_retry(retries).build())
        }
        ObjectStoreScheme::Http => {
            let client = ClientOptions::new().with_allow_http(url.scheme() == "http").with_timeout(options.timeout);
            let host = &url[..Position::BeforePath];
            shared(HttpBuilder::new().with_url(host).with_client_options(client).with_retry(retries).build())
        }
        _ => None,
    }
}

/// The thread on which requests run; it ends when this is dropped.
struct Runner(#[expect(dead_code, reason = "dropping it is what ends the thread")] oneshot::Sender<()>);

impl Runner {
    fn start() -> io::Result<(Runner, Handle)> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (sender, dropped) = oneshot::channel();
        std::thread::Builder::new().name("object store".into()).spawn(move || {
            let _ = runtime.block_on(dropped);
            runtime.shutdown_background();
        })?;
        Ok((Runner(sender), handle))
    }
}

#[derive(Default)]
struct AtomicCounts {
    requests: AtomicU64,
    retries: AtomicU64,
    damaged: AtomicU64,
    bytes: AtomicU64,
}

struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: ObjectPath,
    name: PathBuf,
    options: ObjectOptions,
    handle: Handle,
    _runner: Runner,
    kept: RangeStore,
    /// Number and length of each file that was found.
    files: Mutex<HashMap<String, (u32, u64)>>,
    counts: AtomicCounts,
}

impl Remote {
    fn path(&self, name: &str) -> ObjectPath {
        match self.prefix.as_ref() {
            "" => ObjectPath::from(name),
            prefix => ObjectPath::from(format!("{prefix}/{name}")),
        }
    }

    fn found(&self, name: &str) -> Option<(u32, u64)> {
        self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(name).copied()
    }

    /// Tries until it works, `attempts` times, with growing pauses.
    async fn persist<T, F: Future<Output = StoreResult<T>>>(
        &self,
        mut attempt: impl FnMut() -> F,
        good: impl Fn(&T) -> Result<(), String>,
    ) -> io::Result<T> {
        let mut pause = self.options.backoff;
        let mut number = 1;
        loop {
            self.counts.requests.fetch_add(1, Ordering::Relaxed);
            let error = match time::timeout(self.options.timeout, attempt()).await {
                Ok(Ok(value)) => match good(&value) {
                    Ok(()) => return Ok(value),
                    Err(problem) => io::Error::new(ErrorKind::UnexpectedEof, problem),
                },
                Ok(Err(error)) => as_io(&error),
                Err(_) => io::Error::new(ErrorKind::TimedOut, format!("no answer in {:?}", self.options.timeout)),
            };
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) {
                return Err(error);
            }
            if number >= self.options.attempts.max(1) {
                return Err(io::Error::new(error.kind(), format!("{error} (after {number} attempts)")));
            }
            tracing::debug!("{}: attempt {number}: {error}", self.name.display());
            self.counts.retries.fetch_add(1, Ordering::Relaxed);
            time::sleep(pause).await;
            (pause, number) = (pause * 2, number + 1);
        }
    }

    /// The length of a file, and its number from now on.
    async fn find(&self, name: &str) -> io::Result<Option<u64>> {
        if let Some((_, length)) = self.found(name) {
            return Ok(Some(length));
        }
        let path = self.path(name);
        let head = self.persist(|| self.store.head(&path), |_| Ok(())).await;
        match head {
            Ok(meta) => {
                let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let next = files.len() as u32;
                Ok(Some(files.entry(name.to_string()).or_insert((next, meta.size)).1))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs something on the thread of requests, and waits for it.
    fn wait<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
        let (sender, receiver) = mpsc::channel();
        self.handle.spawn(async move {
            let _ = sender.send(work.await);
        });
        receiver.recv().map_err(|_| stopped())
    }

    /// Fetches blocks that were claimed. Gives them to whoever waits.
    async fn fetch(&self, file: &RemoteFile, blocks: Range<u64>) -> io::Result<Vec<Piece>> {
        let range = blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(file.length);
        let whole = |bytes: usize| match bytes as u64 == range.end - range.start {
            true => Ok(()),
            false => Err(format!("{bytes} bytes came of bytes {} to {}", range.start, range.end)),
        };
        let mut claimed = Claimed { kept: &self.kept, file: file.number, blocks: Some(blocks.clone()) };
        let fetched =
            self.persist(|| self.store.get_range(&file.path, range.clone()), |bytes| whole(bytes.len())).await?;
        self.counts.bytes.fetch_add(fetched.len() as u64, Ordering::Relaxed);
        let pieces: Vec<Piece> = fetched.chunks(BLOCK_BYTES as usize).map(Piece::from).collect();
        self.kept.put(file.number, blocks.start, &pieces);
        claimed.blocks = None;
        Ok(pieces)
    }
}

/// Gives up what was claimed, however the fetching ends.
struct Claimed<'a> {
    kept: &'a RangeStore,
    file: u32,
    blocks: Option<Range<u64>>,
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if let Some(blocks) = self.blocks.take() {
            self.kept.give_up(self.file, blocks);
        }
    }
}

impl CacheFiles for ObjectFiles {
    fn length(&self, name: &str) -> io::Result<Option<u64>> {
        let (remote, name) = (self.remote.clone(), name.to_string());
        self.remote.wait(async move { remote.find(&name).await })?
    }

    fn lengths(&self, names: &[&str]) -> Vec<io::Result<Option<u64>>> {
        // As many questions at once as servers bear.
        const AT_ONCE: usize = 32;
        let mut lengths = Vec::with_capacity(names.len());
        for names in names.chunks(AT_ONCE) {
            let answers: Vec<_> = names
                .iter()
                .map(|name| {
                    let (sender, receiver) = mpsc::channel();
                    let (remote, name) = (self.remote.clone(), name.to_string());
                    self.remote.handle.spawn(async move {
                        let _ = sender.send(remote.find(&name).await);
                    });
                    receiver
                })
                .collect();
            lengths.extend(answers.iter().map(|answer| answer.recv().unwrap_or_else(|_| Err(stopped()))));
        }
        lengths
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ShardSource>> {
        self.length(name)?.ok_or_else(|| io::Error::new(ErrorKind::NotFound, "it is not in the store"))?;
        let (number, length) = self.remote.found(name).expect("it was found just now");
        let path = self.remote.path(name);
        let file = Arc::new(RemoteFile { number, length, path });
        Ok(Box::new(RemoteSource { remote: self.remote.clone(), file, next: AtomicU64::new(u64::MAX) }))
    }
}

struct RemoteFile {
    number: u32,
    length: u64,
    path: ObjectPath,
}

/// A file in a store.
struct RemoteSource {
    remote: Arc<Remote>,
    file: Arc<RemoteFile>,
    /// The block after those that were read last.
    next: AtomicU64,
}

impl RemoteSource {
    /// Starts to fetch blocks that were claimed, in requests of bounded size.
    fn start(&self, runs: Vec<Range<u64>>, mut tell: impl FnMut(Range<u64>) -> Option<Tell>) {
        let most = (self.remote.options.request / BLOCK_BYTES).max(1);
        for run in runs {
            let mut start = run.start;
            while start < run.end {
                let blocks = start..(start + most).min(run.end);
                start = blocks.end;
                let (remote, file, tell) = (self.remote.clone(), self.file.clone(), tell(blocks.clone()));
                self.remote.handle.spawn(async move {
                    let fetched = remote.fetch(&file, blocks.clone()).await;
                    match tell {
                        Some(tell) => drop(tell.send((blocks.start, fetched))),
                        // Whoever comes to need them will meet the error again.
                        None => drop(fetched),
                    }
                });
            }
        }
    }
}

/// Where fetched blocks go, with the number of the first.
type Tell = mpsc::Sender<(u64, io::Result<Vec<Piece>>)>;

impl ShardSource for RemoteSource {
    fn length(&self) -> u64 {
        self.file.length
    }

    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
        if range.start > range.end || range.end > self.file.length {
            let problem = format!("bytes {} to {} of a file of {}", range.start, range.end, self.file.length);
            return Err(io::Error::new(ErrorKind::UnexpectedEof, problem));
        }
        if range.is_empty() {
            return Ok(Cow::Owned(vec![]));
        }
        let (first, end) = (range.start / BLOCK_BYTES, range.end.div_ceil(BLOCK_BYTES));
        let mut have: Vec<Option<Piece>> = vec![None; (end - first) as usize];
        let before = self.next.swap(end, Ordering::Relaxed);
        let mut ahead = before == first || before == first + 1;
        while let Claim::Fetch(runs) = self.remote.kept.claim(self.file.number, first, &mut have) {
            let (sender, receiver) = mpsc::channel();
            self.start(runs, |_| Some(sender.clone()));
            drop(sender);
            if std::mem::take(&mut ahead) {
                self.fetch_ahead(end);
            }
            let mut failure = None;
            for (start, fetched) in receiver {
                match fetched {
                    Ok(pieces) => {
                        let gaps = &mut have[(start - first) as usize..];
                        gaps.iter_mut().zip(pieces).for_each(|(gap, piece)| *gap = Some(piece));
                    }
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            if let Some(error) = failure {
                return Err(error);
            }
        }
        if ahead {
            self.fetch_ahead(end);
        }
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        for (block, piece) in (first..end).zip(&have) {
            let piece = piece.as_deref().ok_or_else(stopped)?;
            let start = block * BLOCK_BYTES;
            let from = range.start.saturating_sub(start) as usize;
            bytes.extend_from_slice(&piece[from..((range.end - start).min(piece.len() as u64)) as usize]);
        }
        Ok(Cow::Owned(bytes))
    }

    fn forget(&self, range: Range<u64>) -> bool {
        let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
        self.remote.counts.damaged.fetch_add(blocks.end - blocks.start, Ordering::Relaxed);
        self.remote.kept.forget(self.file.number, blocks);
        true
    }
}

impl RemoteSource {
    /// Starts to fetch what a reader from front to back will ask for next.
    fn fetch_ahead(&self, from: u64) {
        let until = (from + self.remote.options.read_ahead / BLOCK_BYTES).min(self.file.length.div_ceil(BLOCK_BYTES));
        let runs = self.remote.kept.claim_ahead(self.file.number, from..until);
        self.start(runs, |_| None);
    }
}

fn stopped() -> io::Error {
    io::Error::other("the thread that reads from the store has ended")
}

fn as_io(error: &object_store::Error) -> io::Error {
    use object_store::Error as Store;
    let kind = match error {
        Store::NotFound { .. } => ErrorKind::NotFound,
        Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => ErrorKind::PermissionDenied,
        _ => ErrorKind::Other,
    };
    io::Error::new(kind, described(error))
}

/// An error with its causes, where it does not name them itself.
fn described(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    one_line(&text)
}

/// Messages are one line, and servers answer with pages.
fn one_line(text: &str) -> String {
    const MOST: usize = 400;
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line.trim_end_matches('.').to_string(),
    }
}
