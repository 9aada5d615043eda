//! Which shard a writer fills next: of those of its part the first that nobody has sealed or is at work on, and before
//! that what the coder lacks.

use std::path::Path;

use super::calibration::{self, calibration_shards};
use super::codec::Block;
use super::lease::{Claim, Lease, Leases};
use super::manifest::Counts;
use super::part::WriterPart;
use super::sealing::{Filled, LearntCoder, learnt_coder, seal, seal_calibration, shard_count};
use super::settings::CacheSettings;
use super::unfinished::{CALIBRATION_FOLDER, Position, Unfinished};
use crate::error::{Error, Result};

/// An unfinished cache in the hands of one writer.
#[derive(Debug)]
pub(crate) struct Open {
    pub files: Unfinished,
    pub leases: Leases,
    pub target: Target,
    /// Sequences of all the data, once known.
    pub end: Option<u64>,
    pub coder: Option<LearntCoder>,
}

/// What the next sequence is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Not looked for yet.
    Unknown,
    Shard(u64),
    /// A shard for the coder to learn from.
    Calibration(u64),
    /// Others hold what this one needs.
    Wait,
    Nothing,
}

impl Open {
    /// How many sequences the shard being filled will have.
    pub(crate) fn length(&self, settings: &CacheSettings) -> Option<u64> {
        let (Target::Shard(number) | Target::Calibration(number)) = self.target else { return None };
        let full = settings.sequences_per_shard as u64;
        Some(self.end.map_or(full, |end| end.saturating_sub(number * full).min(full)))
    }

    /// Seals the shard being filled, and finds the next.
    pub(crate) fn seal(
        &mut self,
        part: WriterPart,
        counts: Counts,
        block: &Block,
        position: Option<Position>,
    ) -> Result<()> {
        let target = self.target;
        match target {
            Target::Shard(number) => {
                // Before this one is sealed, so that a second process of this part always finds a lease of the first.
                let next = find(self, part, Some(number));
                let filled = Filled { number, counts, block, position };
                seal(&self.files, self.leases.owner(), self.coder.as_ref(), filled)?;
                self.leases.release(number);
                self.target = Target::Unknown;
                self.target = next?;
            }
            Target::Calibration(number) => {
                let filled = Filled { number, counts, block, position };
                seal_calibration(&self.files, self.leases.owner(), filled)?;
                self.leases.release(number);
                self.target = Target::Unknown;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Looks for what this writer fills next, and takes its lease. `sealing`: a shard that counts as sealed.
pub(crate) fn find(open: &mut Open, part: WriterPart, sealing: Option<u64>) -> Result<Target> {
    if open.end.is_none() {
        open.end = open.files.end()?;
    }
    let learning = calibration_shards(&open.files.settings, open.end);
    if learning > 0 && open.coder.is_none() {
        open.coder = learnt_coder(&open.files.directory, &open.files.settings)?;
        if open.coder.is_none()
            && let Some(target) = find_calibration(open, part, learning)?
        {
            return Ok(target);
        }
    }
    let last = open.end.map(|end| shard_count(&open.files.settings, end));
    let mut number = part.index();
    loop {
        if last.is_some_and(|last| number >= last) {
            return Ok(Target::Nothing);
        }
        if sealing != Some(number) && !open.files.is_sealed(number) && is_claimed(open, part, number)? {
            let learnt_from = if learning > 0 { calibration::sample(&open.files, number)? } else { None };
            if open.files.is_sealed(number) {
                open.leases.release(number);
            } else if let Some(sample) = learnt_from {
                let calibration::Sample { block, counts, position } = sample;
                let filled = Filled { number, counts, block: &block, position };
                seal(&open.files, open.leases.owner(), open.coder.as_ref(), filled)?;
                calibration::discard(&open.files, number)?;
                open.leases.release(number);
            } else {
                return Ok(Target::Shard(number));
            }
        }
        number += part.count();
    }
}

/// Looks for a shard that the coder still lacks; learns it when none is lacking.
fn find_calibration(open: &mut Open, part: WriterPart, count: u64) -> Result<Option<Target>> {
    let mut is_pending = false;
    for number in 0..count {
        let record = open.files.record_path(CALIBRATION_FOLDER, number);
        if record.is_file() {
            continue;
        }
        let folder = open.files.directory.join(CALIBRATION_FOLDER);
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        if !is_claimed(open, part, number)? {
            is_pending = true;
        } else if record.is_file() || learnt_coder(&open.files.directory, &open.files.settings)?.is_some() {
            open.leases.release(number);
        } else {
            return Ok(Some(Target::Calibration(number)));
        }
    }
    if is_pending {
        open.coder = learnt_coder(&open.files.directory, &open.files.settings)?;
        return Ok(open.coder.is_none().then_some(Target::Wait));
    }
    open.coder = match learnt_coder(&open.files.directory, &open.files.settings)? {
        Some(coder) => Some(coder),
        None => Some(calibration::learn(&open.files, count, open.leases.owner())?),
    };
    Ok(None)
}

/// Whether this writer has the lease of a shard now.
fn is_claimed(open: &mut Open, part: WriterPart, number: u64) -> Result<bool> {
    match open.leases.claim(number)? {
        Claim::Held => Ok(true),
        Claim::Busy(Some(lease)) if lease.part == part.to_string() => Err(busy(&open.files.directory, &lease)),
        Claim::Busy(_) => Ok(false),
    }
}

fn busy(directory: &Path, lease: &Lease) -> Error {
    let Lease { host, pid, part, .. } = lease;
    let tip = "wait for it to end, or stop it and start this one again";
    Error::file(directory, format!("part {part} of this cache is being written by process {pid} on {host}"), tip)
}
