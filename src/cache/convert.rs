//! A cache written as a whole by one writer, and a cache written once more in another encoding.

use std::path::Path;
use std::time::Duration;

use super::codec::Codec;
use super::manifest::Manifest;
use super::narrow;
use super::part::WriterPart;
use super::reader::CacheReader;
use super::settings::CacheSettings;
use super::writer::{CacheWriter, Next};
use crate::error::{Error, Result};
use crate::selection::Selection;
use crate::targets::{PackedSequence, SparseTargets, TargetSource};

/// A sequence with its rows, and the bytes of text that its valid rows predict.
pub type WholeSequence = (PackedSequence, Option<SparseTargets>, u64);

/// Writes a cache of all the sequences that `from` gives, from the one with the number it is told.
/// Goes on where an earlier call was interrupted; a finished cache with equal settings is left as it is, and `from` is
/// not called.
///
/// # Errors
/// Those of [`CacheWriter`] and of the sequences.
pub fn write_whole<I>(directory: &Path, settings: CacheSettings, from: impl FnOnce(u64) -> I) -> Result<Manifest>
where
    I: IntoIterator<Item = Result<WholeSequence>>,
{
    let mut writer = CacheWriter::create_or_resume(directory, settings, WriterPart::WHOLE)?;
    let mut from = Some(from);
    // The number of the sequence that the iterator gives next, and the iterator.
    let mut begun: Option<(u64, I::IntoIter)> = None;
    while !writer.is_finished() {
        let number = match writer.next_push()? {
            Next::Sequence(number) => number,
            // Another process writes what the coder learns from.
            Next::Wait => {
                std::thread::sleep(Duration::from_millis(200));
                continue;
            }
            Next::Done => break,
        };
        if let Some(from) = from.take() {
            begun = Some((number, from(number).into_iter()));
        }
        let (next, sequences) = begun.as_mut().expect("begun before the first sequence");
        if *next > number {
            // A shard that somebody else had begun and left; what the iterator had for it is gone by.
            return Err(Error::file(directory, "another process has ended that wrote here", "run the same again"));
        }
        while *next < number && sequences.next().transpose()?.is_some() {
            *next += 1;
        }
        match sequences.next().filter(|_| *next == number) {
            Some(sequence) => {
                let (sequence, targets, text_bytes) = sequence?;
                writer.push(sequence, targets, text_bytes)?;
                *next += 1;
            }
            None => writer.end(*next)?,
        }
    }
    writer.finish()
}

/// How a cache is written once more.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversion {
    pub codec: Codec,
    /// Levels to round to, where the codec rounds; its own number by default.
    pub levels: Option<u16>,
    /// Whether normalisers are kept; what the settings of the input say by default.
    pub log_normalizer: Option<bool>,
    /// Which of the kept ids stay; all by default.
    pub selection: Option<Selection>,
}

/// Writes `input` once more into `directory`. All that `conversion` does not speak of stays: sequences, order, shards,
/// settings and the fingerprints in them, so that whoever asks for the one is served by the other.
///
/// # Errors
/// [`Error::Usage`] when the input lacks ids that the selection keeps; [`Error::Shard`] when it is damaged; those of
/// [`CacheWriter`].
pub fn convert(input: &CacheReader, directory: &Path, conversion: &Conversion) -> Result<Manifest> {
    let manifest = input.manifest();
    let (codec, levels) = (conversion.codec, conversion.levels);
    let mut settings = CacheSettings { codec, levels, ..manifest.settings.clone() };
    settings.log_normalizer = conversion.log_normalizer.or(settings.log_normalizer);
    let mut selection = None;
    if let (Some(wanted), Some(soft_targets)) = (&conversion.selection, &mut settings.soft_targets) {
        narrow::check(&soft_targets.selection, wanted)?;
        soft_targets.selection = wanted.clone();
        selection = Some(wanted);
    }
    let full = settings.sequences_per_shard as u64;
    write_whole(directory, settings, |first| {
        (first..input.sequence_count()).map(move |number| {
            let mut batch = input.read(&[number])?;
            // A cache counts bytes of text by the shard, so the shard's first sequence brings them all.
            let text_bytes = match number.is_multiple_of(full) {
                true => manifest.shards[(number / full) as usize].counts.text_bytes,
                false => 0,
            };
            let targets = match (batch.targets, selection) {
                (Some(targets), Some(selection)) => Some(narrow::narrow(&targets, selection)),
                (targets, _) => targets,
            };
            Ok((batch.sequences.remove(0), targets, text_bytes))
        })
    })
}
