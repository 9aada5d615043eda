//! A cache that is far away gives what one beside us gives, whatever the network does to it, and nothing else.

mod cache_samples;
mod range_server;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cache_samples::*;
use limbeck::cache::*;
use limbeck::targets::*;
use limbeck::train::prefetch::{Prefetch, Prefetcher};
use object_store::aws::AmazonS3Builder;
use object_store::memory::InMemory;
use object_store::{ObjectStoreExt, RetryConfig};
use range_server::*;

const COUNT: u64 = 140;

/// Shards of several blocks.
fn sample_cache(directory: &Path, codec: Codec) -> CacheReader {
    let settings = CacheSettings { codec, ..settings(256, 64, &[1.0]) };
    let manifest = write(directory, &settings, COUNT);
    assert_eq!(manifest.shards.len(), 3);
    if codec == Codec::Raw {
        assert!(manifest.shards[0].bytes > 6 * BLOCK_BYTES, "{} bytes", manifest.shards[0].bytes);
    }
    CacheReader::open(directory).unwrap()
}

/// As the default, without the patience.
fn quick() -> ObjectOptions {
    ObjectOptions { backoff: Duration::from_millis(5), timeout: Duration::from_secs(20), ..ObjectOptions::default() }
}

/// Options under which each failure is the library's own to mend.
fn alone() -> ObjectOptions {
    ObjectOptions { client_retries: 0, read_ahead: 0, ..quick() }
}

fn open(files: &ObjectFiles) -> CacheReader {
    CacheReader::open_from(Box::new(files.clone()), files.name()).unwrap()
}

fn assert_same(left: &CacheReader, right: &CacheReader, numbers: &[u64]) {
    let (left, right) = (left.read(numbers).unwrap(), right.read(numbers).unwrap());
    assert_eq!(left.sequences, right.sequences);
    assert_eq!(left.targets, right.targets);
}

#[test]
fn a_store_in_memory_gives_what_the_directory_gives() {
    for codec in [Codec::Raw, Codec::Packed, Codec::Compact] {
        let folder = tempfile::tempdir().unwrap();
        let local = sample_cache(folder.path(), codec);
        let store = Arc::new(InMemory::new());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (name, bytes) in files(folder.path()) {
            runtime.block_on(store.put(&format!("caches/one/{name}").into(), bytes.into())).unwrap();
        }
        // Without memory for two blocks, too, and with requests of one.
        let cramped = ObjectOptions { memory: 70_000, request: BLOCK_BYTES, ..quick() };
        for options in [quick(), cramped] {
            let files = ObjectFiles::new(store.clone(), "caches/one", options).unwrap();
            let far = open(&files);
            assert_eq!(far.manifest().root, local.manifest().root);
            let falling: Vec<u64> = (0..COUNT).rev().collect();
            assert_same(&far, &local, &falling);
            falling.iter().step_by(9).for_each(|&number| assert_same(&far, &local, &[number]));
            far.verify().into_result().unwrap();
            assert_eq!(files.counts().retries + files.counts().damaged, 0);
        }
    }
}

#[test]
fn requests_are_few_and_nothing_is_fetched_twice() {
    let folder = tempfile::tempdir().unwrap();
    let local = sample_cache(folder.path(), Codec::Raw);
    let server = RangeServer::start(files(folder.path()));
    let files = ObjectFiles::open(&server.url("caches/one"), alone()).unwrap();
    let far = open(&files);
    // One of its manifest, and a length of each file.
    assert_eq!(server.requests().iter().filter(|request| request.method == "GET").count(), 1);
    assert_eq!(server.requests().len(), 1 + 1 + 3);
    far.verify_shard(0).unwrap();
    let gets = |server: &RangeServer| server.requests().iter().filter(|request| request.method == "GET").count();
    let (blocks, walked) = (local.manifest().shards[0].bytes.div_ceil(BLOCK_BYTES), gets(&server) as u64);
    // Its list of hashes, its header, and all that is between in one.
    assert!(walked <= 4, "{walked} requests for {blocks} blocks");
    let all: Vec<u64> = (0..64).collect();
    assert_same(&far, &local, &all);
    assert_eq!(gets(&server) as u64, walked, "all of the shard was here");
    for request in server.requests().iter().filter(|request| request.method == "GET") {
        let range = request.range.clone().expect("every request is of a range");
        assert_eq!(range.start % BLOCK_BYTES, 0, "{range:?}");
    }
    assert_eq!(files.counts().bytes, server.bytes_sent());
}

#[test]
fn reading_from_front_to_back_is_ahead_of_itself() {
    let folder = tempfile::tempdir().unwrap();
    sample_cache(folder.path(), Codec::Raw);
    let server = RangeServer::start(files(folder.path()));
    let options = ObjectOptions { read_ahead: 4 * BLOCK_BYTES, ..alone() };
    let files = ObjectFiles::open(&server.url("caches/one"), options).unwrap();
    let name = "shards/00000.safetensors";
    let shard = files.open(name).unwrap();
    let expected = std::fs::read(folder.path().join(name)).unwrap();
    let blocks = shard.length().div_ceil(BLOCK_BYTES);
    assert!(blocks >= 8);
    for block in 0..blocks {
        let range = block * BLOCK_BYTES..((block + 1) * BLOCK_BYTES).min(shard.length());
        let (start, end) = (range.start as usize, range.end as usize);
        assert_eq!(&shard.read(range).unwrap()[..], &expected[start..end]);
        if block == 1 {
            // What comes next is on its way though nobody asked.
            let deadline = Instant::now() + Duration::from_secs(10);
            while files.counts().bytes < 6 * BLOCK_BYTES {
                assert!(Instant::now() < deadline, "{:?}", files.counts());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    assert_eq!(files.counts().bytes, shard.length(), "each byte once");
}

#[test]
fn failures_are_repeated_until_the_bytes_are_here() {
    let folder = tempfile::tempdir().unwrap();
    let local = sample_cache(folder.path(), Codec::Raw);
    let all: Vec<u64> = (0..COUNT).collect();
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Dropped(0),
        Fault::Dropped(30_000),
        Fault::Short(1000),
        Fault::Whole,
    ];
    for fault in faults {
        let server = RangeServer::start(files(folder.path()));
        let files = ObjectFiles::open(&server.url("caches/one"), alone()).unwrap();
        let far = open(&files);
        let before = files.counts();
        // Three in a row, and one later.
        server.fail("shards/00001", [fault, fault, fault]);
        server.fail("shards/00002", [fault]);
        assert_same(&far, &local, &all);
        assert_eq!(server.faults_left(), 0, "{fault:?}");
        assert_eq!(files.counts().retries - before.retries, 4, "{fault:?}");
        assert_eq!(files.counts().damaged, 0);
    }
}

#[test]
fn what_came_damaged_is_refused_and_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let local = sample_cache(folder.path(), Codec::Raw);
    let all: Vec<u64> = (64..128).collect();
    let server = RangeServer::start(files(folder.path()));
    let files = ObjectFiles::open(&server.url("caches/one"), alone()).unwrap();
    let far = open(&files);
    // Once: the list of hashes, then a block.
    for (already, place) in [(0, None), (1, Some(200_000))] {
        let fault = place.map_or(Fault::FlippedLast, Fault::Flipped);
        server.fail("shards/00001", [fault]);
        if place.is_some() {
            far.verify_shard(1).unwrap();
        } else {
            assert_same(&far, &local, &[64]);
        }
        assert_eq!(server.faults_left(), 0);
        assert!(files.counts().damaged > already);
        assert_eq!(files.counts().retries, 0);
    }
    assert_same(&far, &local, &all);

    // Each time: the damage is named, nothing is handed out, and what is whole later is read.
    let server = RangeServer::start(cache_samples::files(folder.path()));
    let far = open(&ObjectFiles::open(&server.url("caches/one"), alone()).unwrap());
    far.read(&[64]).unwrap();
    server.fail("shards/00001", [Fault::Flipped(200_000), Fault::Flipped(200_000)]);
    let error = far.read(&all).unwrap_err().to_string();
    assert!(error.contains("caches/one: shard shards/00001.safetensors: block "), "{error}");
    assert!(error.contains(" is damaged: its list names the hash "), "{error}");
    assert_eq!(server.faults_left(), 0);
    assert_same(&far, &local, &all);
}

#[test]
fn an_answer_that_does_not_come_is_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let local = sample_cache(folder.path(), Codec::Raw);
    let server = RangeServer::start(files(folder.path()));
    let options = ObjectOptions { timeout: Duration::from_millis(700), ..alone() };
    let files = ObjectFiles::open(&server.url("caches/one"), options).unwrap();
    let far = open(&files);
    server.fail("shards/00000", [Fault::Slow(Duration::from_secs(5))]);
    assert_same(&far, &local, &[0, 63]);
    assert_eq!((files.counts().retries, server.faults_left()), (1, 0));
    // Slow, but not too slow.
    server.fail("shards/00001", [Fault::Slow(Duration::from_millis(100))]);
    assert_same(&far, &local, &[64]);
    assert_eq!(files.counts().retries, 1);
}

#[test]
fn a_reading_fails_after_its_last_attempt_and_not_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    sample_cache(folder.path(), Codec::Raw);
    let server = RangeServer::start(files(folder.path()));
    let files = ObjectFiles::open(&server.url("caches/one"), ObjectOptions { attempts: 3, ..alone() }).unwrap();
    let far = open(&files);
    server.fail("shards/00000", [Fault::Status(500); 3]);
    let error = far.read(&[5]).unwrap_err().to_string();
    assert!(error.contains("shard shards/00000.safetensors: it cannot be read: "), "{error}");
    assert!(error.contains("500") && error.contains("(after 3 attempts)") && !error.contains('\n'), "{error}");
    assert_eq!(server.faults_left(), 0);
    far.read(&[5]).unwrap();
    // Asking again does not help against a refusal.
    let before = files.counts();
    server.fail("shards/00001", [Fault::Status(403)]);
    let error = far.read(&[64]).unwrap_err().to_string();
    assert!(error.contains("403"), "{error}");
    assert_eq!(files.counts().retries, before.retries);
}

#[test]
fn the_client_of_a_store_repeats_what_it_can_and_goes_on_in_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    let local = sample_cache(folder.path(), Codec::Raw);
    let server = RangeServer::start_with_tags(files(folder.path()));
    let retries = RetryConfig {
        backoff: object_store::BackoffConfig { init_backoff: Duration::from_millis(5), ..Default::default() },
        ..RetryConfig::default()
    };
    // An S3 bucket, its name in the path.
    let store = AmazonS3Builder::new()
        .with_endpoint(server.url("").trim_end_matches('/'))
        .with_allow_http(true)
        .with_region("nowhere-1")
        .with_bucket_name("caches")
        .with_skip_signature(true)
        .with_retry(retries)
        .build()
        .unwrap();
    let files = ObjectFiles::new(Arc::new(store), "one", ObjectOptions { read_ahead: 0, ..quick() }).unwrap();
    let far = open(&files);
    server.fail("shards/00000", [Fault::Status(500), Fault::Dropped(0), Fault::Dropped(40_000)]);
    let all: Vec<u64> = (0..COUNT).collect();
    assert_same(&far, &local, &all);
    far.verify().into_result().unwrap();
    assert_eq!((server.faults_left(), files.counts().retries), (0, 0));
    // What no client sees is ours to mend.
    server.fail("shards/00000", [Fault::Short(1000)]);
    let fresh = ObjectFiles::open(&server.url("caches/one"), quick()).unwrap();
    assert_same(&open(&fresh), &local, &all);
    assert_eq!((server.faults_left(), fresh.counts().retries), (0, 1));
}

#[test]
fn batches_are_read_ahead_from_a_slow_store_in_the_order_of_training() {
    let folder = tempfile::tempdir().unwrap();
    let local = sample_cache(folder.path(), Codec::Packed);
    let server = RangeServer::start(files(folder.path()));
    let far = CacheReader::open_url(&server.url("caches/one")).unwrap();
    server.fail("shards/", [Fault::Slow(Duration::from_millis(50)); 4]);
    let order = |batch: u64| (0..6).map(|place| (batch * 6 + place) * 37 % COUNT).collect::<Vec<u64>>();
    Prefetcher::run(&far, (0..20).map(order), Prefetch { threads: 4, batches: 3 }, |prefetcher| {
        for number in 0..20 {
            let (batch, expected) = (prefetcher.next_batch().unwrap().unwrap(), local.read(&order(number)).unwrap());
            assert_eq!((batch.sequences, batch.targets), (expected.sequences, expected.targets));
        }
        assert!(prefetcher.next_batch().unwrap().is_none());
    });
    // An error of the network comes with the batch that it belongs to.
    let files = ObjectFiles::open(&server.url("caches/one"), ObjectOptions { attempts: 2, ..alone() }).unwrap();
    let far = open(&files);
    server.fail("shards/00002", [Fault::Status(404); 50]);
    let numbers = [vec![0, 1], vec![64, 65], vec![2, 130], vec![3]];
    Prefetcher::run(&far, numbers.into_iter(), Prefetch { threads: 2, batches: 4 }, |prefetcher| {
        prefetcher.next_batch().unwrap();
        prefetcher.next_batch().unwrap();
        let error = prefetcher.next_batch().unwrap_err().to_string();
        assert!(error.contains("shards/00002"), "{error}");
    });
}

#[test]
fn an_address_that_cannot_be_used_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    sample_cache(folder.path(), Codec::Raw);
    let mut files = files(folder.path());
    files.remove("shards/00001.safetensors");
    let server = RangeServer::start(files);
    let error = |url: &str| CacheReader::open_url(url).map(drop).unwrap_err().to_string();
    let url = server.url("caches/one");
    let expected = format!("{url}: shard shards/00001.safetensors: it is missing; ");
    assert!(error(&url).starts_with(&expected), "{}", error(&url));
    let url = server.url("caches/two");
    let expected = format!(
        "{url}: there is no finished cache here (no manifest.json); check the address and its credentials; caches are \
         written to directories, and copied once finished"
    );
    assert_eq!(error(&url), expected);
    for (url, problem) in [
        ("ftp://host/a", "ftp://host/a: this address cannot be used: "),
        ("memory:///a", "memory:///a: this address cannot be used: there is no store of this kind; "),
        ("http://", "http://: this is no address (empty host); write it as s3://bucket/path/of/cache"),
        (
            "https://me:secret@host/a",
            "https://host/a: its address has a password, a `?` or a `#`, which are not sent; give credentials in the \
             environment, as AWS_ACCESS_KEY_ID for example",
        ),
        ("https://host/a?sig=secret", "https://host/a: its address has a password, a `?` or a `#`"),
    ] {
        let error = error(url);
        assert!(error.starts_with(problem) && !error.contains("secret") && !error.contains('\n'), "{error}");
    }
    let refused = limbeck::Error::usage("", "").exit_code();
    assert_eq!(CacheReader::open_url("ftp://host/a").map(drop).unwrap_err().exit_code(), refused);
    // An address in place of a directory is one, and a file's needs no store.
    let local = CacheReader::open(folder.path()).unwrap();
    let file = CacheReader::open(format!("file://{}", folder.path().display())).unwrap();
    assert_eq!(file.manifest(), local.manifest());
}
