//! Leases: which shards of an unfinished cache somebody is writing already.
//!
//! They save work and decide nothing: whoever seals first has sealed, lease or not (docs/cache-format.md, "Sealing").

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::owner;
use super::part::WriterPart;
use crate::durable;
use crate::error::{Error, Result};

pub(crate) const LEASE_FOLDER: &str = "leases";
/// How often a living writer renews its leases.
const RENEWAL: Duration = Duration::from_secs(60);

/// What a lease says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub host: String,
    pub pid: u32,
    /// The part its writer writes, as `2/7`.
    pub part: String,
    pub owner: String,
}

/// What asking for a lease came to.
pub(crate) enum Claim {
    Held,
    /// Somebody alive has it; `None` if what it says cannot be read.
    Busy(Option<Lease>),
}

/// The leases of one writer; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Leases {
    directory: PathBuf,
    lease: Lease,
    held: Held,
    /// Dropping it ends the thread that renews.
    renewing: Option<Sender<()>>,
}

type Held = Arc<Mutex<BTreeMap<u64, PathBuf>>>;

fn locked(held: &Held) -> MutexGuard<'_, BTreeMap<u64, PathBuf>> {
    held.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Leases {
    /// None yet, of the cache in `directory`.
    pub(crate) fn new(directory: &Path, part: WriterPart) -> Leases {
        let lease = Lease {
            host: owner::host().to_string(),
            pid: std::process::id(),
            part: part.to_string(),
            owner: owner::name(),
        };
        Leases { directory: directory.join(LEASE_FOLDER), lease, held: Held::default(), renewing: None }
    }

    /// The name of this writer.
    pub(crate) fn owner(&self) -> &str {
        &self.lease.owner
    }

    fn path(&self, shard: u64) -> PathBuf {
        self.directory.join(format!("{shard:05}"))
    }

    /// Asks for the lease of a shard; takes over that of a dead writer.
    pub(crate) fn claim(&mut self, shard: u64) -> Result<Claim> {
        if locked(&self.held).contains_key(&shard) {
            return Ok(Claim::Held);
        }
        let path = self.path(shard);
        let bytes = serde_json::to_vec(&self.lease).expect("a lease is plain data");
        // Twice, because the second try is behind a dead writer.
        for _ in 0..2 {
            if self.make(&path, &bytes)? {
                locked(&self.held).insert(shard, path);
                self.renew();
                return Ok(Claim::Held);
            }
            let Some(theirs) = living(&path)? else {
                self.bury(&path)?;
                continue;
            };
            return Ok(Claim::Busy(theirs));
        }
        Ok(Claim::Busy(None))
    }

    /// Makes the file whole, and gives it its name if that is free. Not synced: what is lost with the power is void.
    fn make(&self, path: &Path, bytes: &[u8]) -> Result<bool> {
        let temporary = durable::owned_temporary_path(path, self.owner());
        let made = fs::write(&temporary, bytes)
            .map_err(Error::io(&temporary))
            .and_then(|()| durable::link_new(&temporary, path));
        let _ = fs::remove_file(&temporary);
        made
    }

    /// Moves a void lease out of the way, unless somebody else was faster.
    fn bury(&self, path: &Path) -> Result<()> {
        let aside = durable::owned_temporary_path(path, self.owner());
        match fs::rename(path, &aside) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(Error::io(path))?,
        }
        if living(&aside)?.is_some() {
            // It was renewed, or taken over, between the look and the move.
            durable::link_new(&aside, path)?;
        }
        durable::remove(&aside)
    }

    /// Gives the lease of a shard back.
    pub(crate) fn release(&mut self, shard: u64) {
        if let Some(path) = locked(&self.held).remove(&shard) {
            give_back(&path, &self.lease.owner);
        }
    }

    pub(crate) fn release_all(&mut self) {
        let held = std::mem::take(&mut *locked(&self.held));
        held.values().for_each(|path| give_back(path, &self.lease.owner));
    }

    /// Starts to renew what is held, once.
    fn renew(&mut self) {
        if self.renewing.is_some() {
            return;
        }
        let (sender, receiver) = channel::<()>();
        let held = self.held.clone();
        let renewing = std::thread::Builder::new().name("cache leases".into()).spawn(move || {
            while receiver.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
                for path in locked(&held).values() {
                    // A lease that cannot be renewed costs somebody else's time, and nothing here.
                    let renewed = File::options().write(true).open(path);
                    let _ = renewed.and_then(|file| file.set_modified(SystemTime::now()));
                }
            }
        });
        // Without the thread the leases are void to other machines after a while, no more.
        self.renewing = renewing.is_ok().then_some(sender);
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.release_all();
    }
}

/// Removes a lease that still is the owner's.
fn give_back(path: &Path, owner: &str) {
    if read(path).is_some_and(|lease| lease.owner == owner) {
        let _ = fs::remove_file(path);
    }
}

fn read(path: &Path) -> Option<Lease> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// What the lease at `path` says, if its writer may be alive; `Some(None)` if it says nothing that can be read.
fn living(path: &Path) -> Result<Option<Option<Lease>>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path)(error)),
    };
    match serde_json::from_slice::<Lease>(&bytes) {
        Ok(lease) => Ok((!owner::is_dead(&lease.owner, path)).then_some(Some(lease))),
        // Only a machine that lost its power leaves a lease that is not whole.
        Err(_) => Ok(owner::silence(path).is_some_and(|silence| silence <= owner::SILENCE).then_some(None)),
    }
}

/// Some lease in the cache's directory whose writer may be alive, other than those of `but`.
pub(crate) fn any_living(directory: &Path, but: &str) -> Result<Option<Lease>> {
    let folder = directory.join(LEASE_FOLDER);
    for name in durable::file_names(&folder)? {
        if let Some(Some(lease)) = living(&folder.join(name))?
            && lease.owner != but
        {
            return Ok(Some(lease));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(claim: Claim) -> bool {
        matches!(claim, Claim::Held)
    }

    #[test]
    fn a_lease_is_one_writers_until_it_is_given_back_or_its_process_dies() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(LEASE_FOLDER)).unwrap();
        let mut first = Leases::new(folder.path(), WriterPart::WHOLE);
        let mut second = Leases::new(folder.path(), "2/3".parse().unwrap());
        assert!(held(first.claim(3).unwrap()) && held(first.claim(3).unwrap()) && held(second.claim(4).unwrap()));
        let Claim::Busy(Some(theirs)) = second.claim(3).unwrap() else { panic!("it was given twice") };
        assert_eq!(theirs, first.lease);
        assert_eq!(any_living(folder.path(), second.owner()).unwrap(), Some(theirs));
        first.release(3);
        assert!(held(second.claim(3).unwrap()));
        drop(second);
        assert!(held(first.claim(4).unwrap()));
        // Killed: its lease stays.
        let path = first.path(4);
        let mut dead = first.lease.clone();
        dead.owner = dead.owner.replace(&format!("-{}-", dead.pid), "-4194305-");
        fs::write(&path, serde_json::to_vec(&dead).unwrap()).unwrap();
        let mut third = Leases::new(folder.path(), WriterPart::WHOLE);
        assert!(held(third.claim(4).unwrap()));
        // The late first one does not take away what is no longer its own.
        drop(first);
        assert_eq!(read(&path).unwrap(), third.lease);
        // Not whole: alive for a while, because nobody can tell.
        fs::write(third.path(5), b"{").unwrap();
        assert!(matches!(third.claim(5).unwrap(), Claim::Busy(None)));
        let file = File::options().write(true).open(third.path(5)).unwrap();
        file.set_modified(SystemTime::now() - owner::SILENCE - Duration::from_secs(1)).unwrap();
        assert!(held(third.claim(5).unwrap()));
        drop(third);
        assert!(durable::file_names(&folder.path().join(LEASE_FOLDER)).unwrap().is_empty());
    }
}
