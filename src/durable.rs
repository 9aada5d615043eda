//! Files that are whole or absent: written under a temporary name, synced, renamed. Knows bytes and paths only.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// What a file is called while it is being written: its name and this. A crash's leftover is written over.
pub(crate) const TEMPORARY: &str = ".tmp";

/// Between a final name and the process number, in the names of directories still being written.
pub(crate) const PARTIAL: &str = ".partial-";

/// Longest JSON file read into memory; the index of the largest known checkpoint has 2 MB.
const MAX_JSON_BYTES: u64 = 100_000_000;

/// The name under which a file is written before it is complete: `<path>.tmp`, beside it.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMPORARY);
    name.into()
}

/// [`temporary_path`] of one of several writers of the same file: `<path>.<owner>.tmp`.
pub(crate) fn owned_temporary_path(path: &Path, owner: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{owner}"));
    temporary_path(Path::new(&name))
}

/// The name under which a directory is written before it is complete: `<path>.partial-<process>`, beside it.
pub(crate) fn partial_path(path: &Path) -> Result<PathBuf> {
    sibling(path, PARTIAL)
}

/// `<path><infix><process>`.
pub(crate) fn sibling(path: &Path, infix: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::usage(format!("cannot write to `{}`", path.display()), "give a path that ends with a name"));
    };
    let mut name = OsString::from(name);
    name.push(format!("{infix}{}", std::process::id()));
    Ok(path.with_file_name(name))
}

/// Writes a file so that `path` holds either its former content or all of the new one, whenever the machine stops.
pub(crate) fn write_file(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let temporary = temporary_path(path);
    let written = write_and_sync(&temporary, fill).and_then(|()| fs::rename(&temporary, path).map_err(Error::io(path)));
    if written.is_err() {
        // The first error is the one to tell; a temporary file that stays behind is never read.
        let _ = fs::remove_file(&temporary);
        return written;
    }
    sync_directory(parent(path))
}

fn write_and_sync(temporary: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let file = File::create(temporary).map_err(Error::io(temporary))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|error| Error::io(temporary)(error.into_error()))?;
    file.sync_all().map_err(Error::io(temporary))
}

/// Writes a file that no other process may have written first: whole, synced, and linked to a name that is free.
///
/// `Ok(false)` when the name is taken; what is there stays.
pub(crate) fn write_new(path: &Path, owner: &str, bytes: &[u8]) -> Result<bool> {
    let temporary = owned_temporary_path(path, owner);
    let written = write_and_sync(&temporary, |writer| writer.write_all(bytes).map_err(Error::io(&temporary)))
        .and_then(|()| link_new(&temporary, path));
    // The link keeps the file; after an error the first one is the one to tell.
    let _ = fs::remove_file(&temporary);
    if written? {
        sync_directory(parent(path))?;
        return Ok(true);
    }
    Ok(false)
}

/// Gives a file a second name, which must be free; `Ok(false)` when it is taken.
pub(crate) fn link_new(from: &Path, to: &Path) -> Result<bool> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        // No hard links here (FAT, some network file systems): as near as a rename comes to it.
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {
            if to.exists() {
                return Ok(false);
            }
            fs::rename(from, to).map(|()| true).map_err(Error::io(to))
        }
        Err(error) => Err(Error::io(to)(error)),
    }
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// Names of the files in a folder, in their order; none when there is no such folder.
pub(crate) fn file_names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let mut names = vec![];
    for entry in entries {
        let entry = entry.map_err(Error::io(folder))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        names.extend(entry.file_name().into_string().ok().filter(|_| is_file));
    }
    names.sort_unstable();
    Ok(names)
}

/// [`write_file`] of bytes at hand.
pub(crate) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |writer| writer.write_all(bytes).map_err(Error::io(path)))
}

/// [`write_file`] of indented JSON.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("JSON values always serialise");
    bytes.push(b'\n');
    write_bytes(path, &bytes)
}

/// Makes renames inside `directory` survive a power failure.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    // Other systems cannot open a directory as a file, and need no such call.
    if cfg!(unix) {
        File::open(directory).and_then(|opened| opened.sync_all()).map_err(Error::io(directory))?;
    }
    Ok(())
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Reads a JSON object; `missing` is the way out when there is no such file, `malformed` when it does not parse.
pub(crate) fn read_json_object(path: &Path, missing: &str, malformed: &str) -> Result<Value> {
    let length = match fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Error::file(path, "is missing", missing));
        }
        Err(error) => return Err(Error::io(path)(error)),
    };
    if length > MAX_JSON_BYTES {
        let problem = format!("has {length} bytes, more than the {MAX_JSON_BYTES} that are read");
        return Err(Error::file(path, problem, malformed));
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::file(path, format!("is not valid JSON: {error}"), malformed))?;
    if !value.is_object() {
        return Err(Error::file(path, "is not a JSON object", malformed));
    }
    Ok(value)
}
