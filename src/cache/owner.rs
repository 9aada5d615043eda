//! Who writes a file: a name for one writer in one process, by which others can tell whether it is still alive.
//!
//! These names are in leases and in the names of temporary files, and so never in a finished cache.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

/// How long a writer that cannot be asked may be silent.
pub(crate) const SILENCE: Duration = Duration::from_secs(600);

/// This process.
struct Here {
    host: String,
    /// Of host, its start and, in a container, the processes' numbering: 8 hex digits. Process numbers are compared
    /// only where it agrees.
    machine: String,
    /// When the process started, in the system's ticks; 0 where that cannot be known.
    started: u64,
}

fn here() -> &'static Here {
    static HERE: OnceLock<Here> = OnceLock::new();
    HERE.get_or_init(|| {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_string());
        let asked = || {
            let output = Command::new("hostname").output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
        };
        let host = read("/proc/sys/kernel/hostname").or_else(asked).filter(|name| !name.is_empty());
        let host = host.unwrap_or_else(|| "an unknown host".into());
        let start = read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let numbering = fs::read_link("/proc/self/ns/pid").map(|it| it.display().to_string()).unwrap_or_default();
        let machine = blake3::hash(format!("{host}\n{start}\n{numbering}").as_bytes()).to_hex()[..8].to_string();
        Here { host, machine, started: started(std::process::id()).unwrap_or(0) }
    })
}

/// When a process started; `None` when there is none of this number, or none that still runs.
fn started(pid: u32) -> Option<u64> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; after it come the state and numbers.
    let mut fields = line.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // Killed, and not yet waited for.
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Name of the host this process runs on.
pub(crate) fn host() -> &'static str {
    &here().host
}

/// A name for one more writer in this process.
pub(crate) fn name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{}-{}-{}-{number}", here().machine, std::process::id(), here().started)
}

/// Whether the writer of this name is known to be alive, known to be dead, or neither (another machine).
fn is_alive(owner: &str) -> Option<bool> {
    let mut parts = owner.split('-');
    let (machine, pid, start) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse::<u64>().ok()?);
    if machine != here().machine {
        return None;
    }
    if cfg!(target_os = "linux") {
        return Some(started(pid) == Some(start));
    }
    if cfg!(unix) {
        let status = Command::new("ps").args(["-p", &pid.to_string()]).output().ok()?.status;
        return Some(status.success());
    }
    (pid == std::process::id()).then_some(true)
}

/// Whether what `owner` left at `path` is nobody's any more. Who cannot be asked is dead after [`SILENCE`].
pub(crate) fn is_dead(owner: &str, path: &Path) -> bool {
    is_alive(owner).map_or_else(|| silence(path).is_some_and(|silence| silence > SILENCE), |alive| !alive)
}

/// How long ago a file was last changed; `None` when it is gone.
pub(crate) fn silence(path: &Path) -> Option<Duration> {
    let changed = fs::metadata(path).and_then(|metadata| metadata.modified()).ok()?;
    Some(SystemTime::now().duration_since(changed).unwrap_or_default())
}

/// The owner in the name of a temporary file (`<file>.<owner>.tmp`).
pub(crate) fn of_temporary(name: &str) -> Option<&str> {
    let (_, owner) = name.strip_suffix(crate::durable::TEMPORARY)?.rsplit_once('.')?;
    (owner.split('-').count() == 4).then_some(owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_alive_as_long_as_its_process() {
        let folder = tempfile::tempdir().unwrap();
        let (mine, other) = (name(), name());
        assert_ne!(mine, other);
        assert!(!is_dead(&mine, folder.path()));
        assert_eq!(of_temporary(&format!("00001.safetensors.{mine}.tmp")), Some(&*mine));
        assert_eq!(of_temporary("00001.safetensors.tmp"), None);
        let mut parts: Vec<String> = mine.split('-').map(String::from).collect();
        if cfg!(target_os = "linux") {
            // The same number, given to another process later.
            parts[2] = "1".into();
            assert!(is_dead(&parts.join("-"), folder.path()));
            let mut child = Command::new("true").spawn().unwrap();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(started(child.id()), None, "a process that ended and was not waited for");
            child.wait().unwrap();
        }
        parts[0] = "00000000".into();
        let elsewhere = parts.join("-");
        let file = folder.path().join("lease");
        fs::write(&file, "").unwrap();
        assert!(!is_dead(&elsewhere, &file), "of another machine, and fresh");
        let old = SystemTime::now() - SILENCE - Duration::from_secs(5);
        fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        assert!(is_dead(&elsewhere, &file), "of another machine, and silent for long");
    }
}
