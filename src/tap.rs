//! Codistillation: what a model in training predicts, as a cache for students. The forward passes that a run makes anyway
//! are summed up as a teacher's are, and pushed in the order in which they come; see `[tap]` in `docs/recipes.md`.
//!
//! The cache ends shards where it always does, and a run is interrupted anywhere. So a checkpoint keeps the sequences
//! that are in no sealed shard yet, as a small cache of its own: whoever goes on from it pushes them once more.

use std::path::{Path, PathBuf};

use burn::tensor::Tensor;

use crate::{
    cache::{CacheReader, CacheSettings, CacheWriter, Codec, Next, TrainingSteps, WriterPart},
    error::{Error, Result},
    models::Decoder,
    targets::{DistillBatch, TargetSource},
    teacher::HeadTargets,
    train::Tap,
};

/// Where a checkpoint keeps what is in no sealed shard yet.
const KEPT: &str = "tap";

/// A cache that a run of training fills.
pub struct CacheTap {
    dir: PathBuf,
    steps: TrainingSteps,
    writer: CacheWriter,
    targets: HeadTargets,
    /// Bytes of text that each token id stands for.
    token_bytes: Vec<u32>,
    /// Number of the next sequence that is taken.
    next: u64,
}

impl CacheTap {
    /// Begins the cache, or goes on with it where the run goes on: after `step` steps, from `checkpoint` unless that is 0.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the cache there is that of another run; [`Error::File`] when it lacks what the run has
    /// gone past; [`Error::Usage`] for settings that no cache can have or that name no model in training.
    pub fn resume(
        dir: &Path,
        settings: CacheSettings,
        token_bytes: Vec<u32>,
        step: u64,
        checkpoint: Option<&Path>,
    ) -> Result<Self> {
        let soft_targets = settings.soft_targets.as_ref();
        let steps = soft_targets.and_then(|soft_targets| soft_targets.teacher.in_training.clone());
        let (Some(steps), Some(soft_targets)) = (steps, soft_targets) else {
            return Err(Error::usage(
                "a tap of no model in training",
                "say in its cache's settings which steps it is of",
            ));
        };
        let vocab_size = settings.tokenizer.vocab_size;
        let targets = HeadTargets::new(soft_targets.selection.clone(), &soft_targets.temperatures, vocab_size)?;
        let writer = CacheWriter::create_or_resume(dir, settings, WriterPart::WHOLE)?;
        let next = steps.sequences_until(step);
        let mut tap = CacheTap { dir: dir.to_path_buf(), steps, writer, targets, token_bytes, next };
        // Where it ends is known, so the last shard is sealed by the last step.
        if !tap.writer.is_finished() {
            tap.writer.end(tap.steps.sequences())?;
        }
        if let Next::Sequence(wanted) = tap.writer.next_push()?
            && wanted < next
        {
            tap.push_kept(wanted, checkpoint)?;
        }
        Ok(tap)
    }

    /// Pushes the sequences from `wanted` to `self.next`, which the checkpoint keeps.
    fn push_kept(&mut self, wanted: u64, checkpoint: Option<&Path>) -> Result<()> {
        let kept = checkpoint.map(|checkpoint| checkpoint.join(KEPT)).filter(|kept| kept.is_dir());
        let kept = kept.map(CacheReader::open).transpose()?;
        if let Some(kept) = &kept {
            let count = kept.sequence_count();
            kept.expect_settings(&kept_settings(self.writer.settings(), count))?;
            let first = self.next.saturating_sub(count);
            if first <= wanted {
                for number in wanted..self.next {
                    let batch = kept.read(&[number - first])?;
                    self.push(number, batch)?;
                }
                return Ok(());
            }
        }
        Err(Error::file(
            &self.dir,
            format!("it lacks sequences {wanted} to {}, which the run has gone past", self.next - 1),
            "set tap.from_step to a later step, or start afresh with another --run-dir",
        ))
    }

    /// Pushes one sequence with its targets, unless it is sealed already.
    fn push(&mut self, number: u64, batch: DistillBatch) -> Result<()> {
        if self.writer.next_push()? != Next::Sequence(number) {
            return Ok(());
        }
        let sequence = batch.sequences.into_iter().next().expect("one was asked for");
        let bytes = sequence.text_bytes(&self.token_bytes);
        self.writer.push(sequence, batch.targets, bytes)
    }

    /// Writes the manifest, once the last step was taken.
    ///
    /// # Errors
    /// [`Error::Usage`] when it was not; [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        let manifest = self.writer.finish()?;
        tracing::info!("tap: {} sequences in {}", manifest.counts.sequences, self.dir.display());
        Ok(())
    }
}

impl Tap for CacheTap {
    fn takes(&self, step: u64) -> bool {
        self.steps.has(step)
    }

    fn take(&mut self, step: u64, batch: &DistillBatch, hidden: Tensor<2>, model: &Decoder) -> Result<()> {
        let first = self.next;
        self.next += batch.sequences.len() as u64;
        // What was sealed before the run died is not computed again.
        match self.writer.next_push()? {
            Next::Sequence(wanted) if wanted < self.next => {}
            _ => return Ok(()),
        }
        let found = self.targets.of_hidden(model, hidden, batch, first).map_err(|error| match error {
            Error::NotFinite { .. } => Error::NotFinite {
                what: format!("the forward pass of step {step}"),
                tip: "lower the learning rate, and start again from the last checkpoint".into(),
            },
            error => error,
        })?;
        for (place, (sequence, targets)) in batch.sequences.iter().zip(found).enumerate() {
            let one = DistillBatch { sequences: vec![sequence.clone()], targets: Some(targets), row_weights: None };
            self.push(first + place as u64, one)?;
        }
        Ok(())
    }

    fn keep(&mut self, checkpoint: &Path) -> Result<()> {
        let unsealed: Vec<_> = self.writer.unsealed().collect();
        if unsealed.is_empty() {
            return Ok(());
        }
        let settings = kept_settings(self.writer.settings(), unsealed.len() as u64);
        let mut writer = CacheWriter::create_or_resume(checkpoint.join(KEPT), settings, WriterPart::WHOLE)?;
        for (sequence, targets) in unsealed {
            let bytes = sequence.text_bytes(&self.token_bytes);
            writer.push(sequence, targets, bytes)?;
        }
        writer.finish().map(drop)
    }
}

/// Of the cache that keeps `count` sequences as they are.
fn kept_settings(settings: &CacheSettings, count: u64) -> CacheSettings {
    CacheSettings { sequences_per_shard: count as usize, codec: Codec::Raw, levels: None, ..settings.clone() }
}
