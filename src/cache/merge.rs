//! Making one finished cache of parts that were written in directories of their own.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::blocks::BLOCK_BYTES;
use super::lease::{Claim, Leases};
use super::manifest::{CODER_FILE, FORMAT_VERSION, MANIFEST_FILE, Manifest, ShardRecord, short};
use super::part::WriterPart;
use super::reader::{OpenShard, refusal};
use super::sealing::{Outcome, check_sealed, complete, file_name, learnt_coder, same_settings, shard_count};
use super::settings::CacheSettings;
use super::shard::{file_name as shard_file, write_synced};
use super::source::{CacheFiles, LocalFiles};
use super::unfinished::{BEGUN_FILE, SEALED_FOLDER, Sealed, Unfinished};
use crate::durable;
use crate::error::{Error, Result};

const OTHERWISE: &str = "merge only parts of one cache";

/// One part.
struct Input {
    directory: PathBuf,
    settings: CacheSettings,
    /// Sequences of all the data, if whoever wrote this part came to its end.
    end: Option<u64>,
    /// Bytes of the coder's tables.
    coder: Option<Vec<u8>>,
    records: BTreeMap<u64, ShardRecord>,
}

impl Input {
    fn open(directory: &Path) -> Result<Input> {
        let (settings, end, records, has_coder) = if directory.join(MANIFEST_FILE).is_file() {
            let manifest = Manifest::load(directory)?;
            if manifest.format_version != FORMAT_VERSION {
                return Err(Error::file(
                    directory,
                    format!("this cache is of format version {}", manifest.format_version),
                    format!("only parts of version {FORMAT_VERSION} can be merged"),
                ));
            }
            let records = (0..).zip(manifest.shards).collect();
            (manifest.settings, Some(manifest.counts.sequences), records, manifest.coder.is_some())
        } else if directory.join(BEGUN_FILE).is_file() {
            let files = Unfinished::open(directory)?;
            check_sealed(&files)?;
            let mut records = BTreeMap::new();
            for number in files.numbers(SEALED_FOLDER)? {
                records.extend(files.record(SEALED_FOLDER, number)?.map(|sealed| (number, sealed.shard)));
            }
            let (end, coder) = (files.end()?, learnt_coder(directory, &files.settings)?);
            (files.settings, end, records, coder.is_some())
        } else {
            let tip = "name the directories that `limbeck precompute-teacher-logits` wrote parts into";
            return Err(Error::file(directory, format!("there is no part of a cache here (no {BEGUN_FILE})"), tip));
        };
        let path = directory.join(CODER_FILE);
        let coder = if has_coder { Some(std::fs::read(&path).map_err(Error::io(&path))?) } else { None };
        Ok(Input { directory: directory.to_path_buf(), settings, end, coder, records })
    }

    fn name(&self) -> String {
        self.directory.display().to_string()
    }
}

/// Whether two parts can be of one cache.
fn agree(left: &Input, right: &Input) -> Result<()> {
    same_settings((left.name(), &left.settings), (right.name(), &right.settings), OTHERWISE)?;
    let differs = |what: &str, ours: String, theirs: String| {
        Err(Error::Mismatch {
            what: what.into(),
            left_name: left.name(),
            left: ours,
            right_name: right.name(),
            right: theirs,
            tip: OTHERWISE.into(),
        })
    };
    if let (Some(ours), Some(theirs)) = (&left.coder, &right.coder)
        && ours != theirs
    {
        let name = |bytes: &[u8]| short(&blake3::hash(bytes).to_hex());
        return differs("the coder", name(ours), name(theirs));
    }
    if let (Some(ours), Some(theirs)) = (left.end, right.end)
        && ours != theirs
    {
        return differs("the number of sequences", ours.to_string(), theirs.to_string());
    }
    for (number, ours) in &left.records {
        if let Some(theirs) = right.records.get(number)
            && ours != theirs
        {
            let name = |record: &ShardRecord| format!("{} bytes, hash {}", record.bytes, short(&record.blake3));
            return differs(&format!("`{}`", ours.file), name(ours), name(theirs));
        }
    }
    Ok(())
}

/// Makes one finished cache in `out` of the shards that lie in `inputs`: directories that writers of one cache wrote
/// their parts into, and finished caches. Every byte is checked on its way. The result is what one writer makes.
///
/// Killed and called again, it goes on where it stopped. The inputs stay as they are.
///
/// # Errors
/// [`Error::Mismatch`] when inputs differ in settings, coder, number of sequences or a shard that several have, naming
/// both; [`Error::File`] when shards are in none of them; [`Error::Shard`] when one is damaged; [`Error::Usage`]
/// without inputs.
pub fn merge(out: impl AsRef<Path>, inputs: &[PathBuf]) -> Result<Manifest> {
    let out = out.as_ref();
    if inputs.is_empty() {
        return Err(Error::usage("no parts to merge", "name the directories they are in"));
    }
    let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if let Some(same) = inputs.iter().find(|input| whole(input) == whole(out)) {
        let problem = format!("{} is both a part and where the parts are merged", same.display());
        return Err(Error::usage(problem, "name another directory for the merged cache"));
    }
    let parts = inputs.iter().map(|input| Input::open(input)).collect::<Result<Vec<_>>>()?;
    for (i, right) in parts.iter().enumerate() {
        parts[..i].iter().try_for_each(|left| agree(left, right))?;
    }
    let first = &parts[0];
    let settings = &first.settings;
    let Some(sequences) = parts.iter().find_map(|part| part.end) else {
        return Err(Error::file(
            out,
            "cannot be merged: none of the parts came to the end of the data",
            "let one of their writers finish",
        ));
    };
    let count = shard_count(settings, sequences);
    let beyond = parts.iter().flat_map(|part| part.records.keys().map(move |number| (part, number)));
    if let Some((part, number)) = beyond.into_iter().find(|(_, number)| **number >= count) {
        let problem = format!("it has `{}`, but the data has only {sequences} sequences", shard_file(*number));
        return Err(Error::file(&part.directory, problem, OTHERWISE));
    }
    let holder = |number: u64| parts.iter().find(|part| part.records.contains_key(&number));
    let missing: Vec<String> = (0..count).filter(|number| holder(*number).is_none()).map(shard_file).collect();
    if let Some(name) = missing.first() {
        let more = if missing.len() > 1 { format!(" and {} more", missing.len() - 1) } else { String::new() };
        let verb = if missing.len() > 1 { "are" } else { "is" };
        let problem = format!("cannot be merged: `{name}`{more} of {count} shards {verb} in none of the parts");
        return Err(Error::file(out, problem, "name all parts, or run the writers of those that are missing"));
    }
    if out.join(MANIFEST_FILE).is_file() {
        let manifest = Manifest::load(out)?;
        let named = format!("the finished cache {}", out.display());
        same_settings((named, &manifest.settings), (first.name(), settings), "name another directory")?;
        let records: Vec<_> = (0..count).filter_map(|number| holder(number)?.records.get(&number)).collect();
        if !manifest.shards.iter().eq(records) {
            return Err(Error::file(out, "there is another finished cache here", "name another directory"));
        }
        super::unfinished::tidy(out, manifest.shards.len())?;
        return Ok(manifest);
    }
    copy(out, &parts, count, sequences)
}

fn copy(out: &Path, parts: &[Input], count: u64, sequences: u64) -> Result<Manifest> {
    let settings = &parts[0].settings;
    let mut leases = Leases::new(out, WriterPart::WHOLE);
    let mut files = Unfinished::begin_or_open(out, settings, leases.owner())?;
    if files.settings != *settings && !files.rebegin(settings, leases.owner())? {
        let named = format!("the unfinished cache {}", out.display());
        same_settings((named, &files.settings), (parts[0].name(), settings), "name another directory")?;
    }
    check_sealed(&files)?;
    files.discard_leftovers()?;
    let coder = parts.iter().find_map(|part| part.coder.as_ref());
    if let Some(bytes) = coder {
        durable::write_new(&out.join(CODER_FILE), leases.owner(), bytes)?;
    }
    let coder = coder.map(|bytes| blake3::hash(bytes).to_hex().to_string());
    for number in 0..count {
        let part = parts.iter().find(|part| part.records.contains_key(&number)).expect("none is missing");
        let record = &part.records[&number];
        if let Claim::Busy(lease) = leases.claim(number)? {
            let who =
                lease.map_or("another process".into(), |lease| format!("process {} on {}", lease.pid, lease.host));
            return Err(Error::file(out, format!("{who} is writing this cache"), "wait for it to end, or stop it"));
        }
        match files.record(SEALED_FOLDER, number)? {
            Some(there) if there.shard == *record => {}
            Some(_) => {
                let problem = format!("`{}` is there already, and is not that of {}", record.file, part.name());
                return Err(Error::file(out, problem, "name another directory"));
            }
            None => {
                let temporary = durable::owned_temporary_path(&out.join(&record.file), leases.owner());
                copy_shard(part, number, record, &temporary)?;
                let sealed = Sealed {
                    shard: record.clone(),
                    written_as: file_name(&temporary),
                    coder: coder.clone(),
                    position: None,
                };
                files.seal(SEALED_FOLDER, number, leases.owner(), &sealed)?;
            }
        }
        leases.release(number);
    }
    files.set_end(sequences, leases.owner())?;
    match complete(&files, leases.owner())? {
        Outcome::Finished(manifest) => Ok(*manifest),
        Outcome::Missing(missing) => Err(Error::file(out, format!("is unfinished: {missing}"), "merge once more")),
    }
}

/// Copies a shard, checking every block before it is written.
fn copy_shard(part: &Input, number: u64, record: &ShardRecord, to: &Path) -> Result<()> {
    let files = LocalFiles::new(&part.directory);
    let damaged = |problem: String| Error::Shard {
        cache: part.directory.clone(),
        shard: record.file.clone(),
        problem,
        tip: "write this part again".into(),
    };
    let all: Vec<ShardRecord> = part.records.values().cloned().collect();
    let shard = OpenShard::open(&files, FORMAT_VERSION, &part.settings, number, record)
        .map_err(|why| damaged(refusal(why, record, &all)))?;
    let path = part.directory.join(&record.file);
    let source = files.open(&record.file).map_err(Error::io(&path))?;
    let data = shard.checked().data_bytes();
    let mut problem = None;
    let copied = write_synced(to, |file| {
        for start in (0..data).step_by(64 * BLOCK_BYTES as usize) {
            match shard.checked().bytes(start..(start + 64 * BLOCK_BYTES).min(data)) {
                Ok(bytes) => file.write_all(&bytes)?,
                Err(why) => {
                    problem = Some(why);
                    return Err(std::io::ErrorKind::InvalidData.into());
                }
            }
        }
        // The list was checked when the shard was opened; it is compared again with what is written.
        let list = source.read(data..record.bytes)?;
        if blake3::hash(&list).to_hex().as_str() != record.blake3 {
            return Err(std::io::Error::other("it changed while it was copied"));
        }
        file.write_all(&list)
    });
    match problem {
        Some(why) => Err(damaged(why)),
        None => copied,
    }
}
