//! The checkpoints of a run: `<run>/checkpoints/step-002000` and its like.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use crate::durable::{self, PARTIAL};
use crate::error::{Error, Result};

const CHECKPOINTS: &str = "checkpoints";
const PREFIX: &str = "step-";

/// Where a run keeps the checkpoint of a step.
pub fn checkpoint_dir(run_dir: impl AsRef<Path>, step: u64) -> PathBuf {
    run_dir.as_ref().join(CHECKPOINTS).join(format!("{PREFIX}{step:06}"))
}

/// The complete checkpoint of the highest step; none when the run has none yet. Partial ones do not count.
///
/// # Errors
/// The directory cannot be listed.
pub fn latest_checkpoint(run_dir: impl AsRef<Path>) -> Result<Option<(u64, PathBuf)>> {
    Ok(complete_steps(run_dir.as_ref())?.pop())
}

/// A name beside the checkpoints of a run that leads to one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pointer {
    /// `checkpoints/latest`
    Latest,
    /// `checkpoints/best`
    Best,
}

impl Pointer {
    fn name(self) -> &'static str {
        match self {
            Pointer::Latest => "latest",
            Pointer::Best => "best",
        }
    }
}

/// Makes a name lead to the checkpoint of a step: a symbolic link, or a file with the checkpoint's name where there are no
/// such links. It leads to a whole checkpoint at any moment; nothing here depends on it.
///
/// # Errors
/// The directory cannot be written.
pub fn point_at(run_dir: impl AsRef<Path>, pointer: Pointer, step: u64) -> Result<()> {
    let target = checkpoint_dir(&run_dir, step);
    let name = target.file_name().expect("a checkpoint has a name");
    let path = target.with_file_name(pointer.name());
    #[cfg(unix)]
    {
        if fs::read_link(&path).is_ok_and(|there| there.as_os_str() == name) {
            return Ok(());
        }
        let temporary = durable::temporary_path(&path);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&temporary)(error)),
            _ => {}
        }
        std::os::unix::fs::symlink(name, &temporary).map_err(Error::io(&temporary))?;
        fs::rename(&temporary, &path).map_err(Error::io(&path))
    }
    #[cfg(not(unix))]
    durable::write_bytes(&path, name.to_string_lossy().as_bytes())
}

/// Removes all but the `count` latest complete checkpoints, and what interrupted processes left half-written.
/// Returns the steps that were removed. Call it from the one process that writes to the run.
///
/// # Errors
/// `count` is 0; a directory cannot be listed or removed.
pub fn keep_latest(run_dir: impl AsRef<Path>, count: usize) -> Result<Vec<u64>> {
    keep_latest_and(run_dir, count, &[])
}

/// As [`keep_latest`], and some others stay.
///
/// # Errors
/// As [`keep_latest`].
pub fn keep_latest_and(run_dir: impl AsRef<Path>, count: usize, others: &[u64]) -> Result<Vec<u64>> {
    let run_dir = run_dir.as_ref();
    if count == 0 {
        return Err(Error::usage("keeping 0 checkpoints would lose the run", "keep at least 1"));
    }
    remove_partial(run_dir)?;
    let steps = complete_steps(run_dir)?;
    let old = steps.len().saturating_sub(count);
    let mut removed = vec![];
    for (step, path) in steps.into_iter().take(old).filter(|(step, _)| !others.contains(step)) {
        // Removing takes many steps; under this name a half-removed checkpoint is never taken for a whole one.
        let leaving = durable::partial_path(&path)?;
        fs::rename(&path, &leaving).map_err(Error::io(&path))?;
        fs::remove_dir_all(&leaving).map_err(Error::io(&leaving))?;
        removed.push(step);
    }
    Ok(removed)
}

/// Whether a directory holds a configuration and weights; since directories are renamed whole, it holds all then.
pub(super) fn is_complete(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).is_file() && (dir.join(SINGLE_FILE).is_file() || dir.join(INDEX_FILE).is_file())
}

/// Complete checkpoints of a run, by rising step.
fn complete_steps(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut steps = vec![];
    for (name, path) in list(run_dir)? {
        let digits = name.strip_prefix(PREFIX).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        if let Some(step) = digits.and_then(|digits| digits.parse().ok())
            && is_complete(&path)
        {
            steps.push((step, path));
        }
    }
    steps.sort();
    Ok(steps)
}

fn remove_partial(run_dir: &Path) -> Result<()> {
    for (name, path) in list(run_dir)? {
        if name.starts_with(PREFIX) && name.contains(PARTIAL) {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// Names and paths in the run's directory of checkpoints, which need not exist.
fn list(run_dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let checkpoints = run_dir.join(CHECKPOINTS);
    let entries = match fs::read_dir(&checkpoints) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(Error::io(&checkpoints)(error)),
    };
    entries
        .map(|entry| entry.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())))
        .collect::<Result<_, _>>()
        .map_err(Error::io(&checkpoints))
}
