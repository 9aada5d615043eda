//! From the step where a run stands to its last one: metrics, evaluations, checkpoints, guards, and the way back.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{
    config::TrainOutput,
    guard::Reaction,
    journal::Journal,
    metrics::{EvalMetrics, GuardMetrics},
    prefetch::{Prefetch, Prefetcher},
    tap::Tap,
    trainer::{StepDone, Trainer, micro_batches},
};
use crate::{
    checkpoint::checkpoint_dir,
    error::{Error, Result},
    targets::TargetSource,
};

/// How a stretch of steps ended.
enum Ended {
    Finished,
    /// The run is at an earlier step again, and other sequences come next.
    Rewound,
}

/// Tokens and time since the last line of metrics.
struct Rate {
    tokens: u64,
    waited: Duration,
    began: Instant,
}

impl Rate {
    fn new() -> Self {
        Rate { tokens: 0, waited: Duration::ZERO, began: Instant::now() }
    }
}

impl Trainer {
    /// Trains to the last step, or until asked to stop; leaves a checkpoint either way. The batches of the next steps are
    /// read in the background.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when asked to stop, once the state is saved; [`Error::Diverged`] when a guard ends the run.
    pub fn run(&mut self, source: &dyn TargetSource, mut output: TrainOutput<'_>) -> Result<()> {
        std::fs::create_dir_all(&output.dir).map_err(Error::io(&output.dir))?;
        if self.step == 0 && self.config.guards.rewinds() {
            self.save_with(&output.dir, &output.files, None)?;
        }
        // Metrics are numbered by steps done, so those up to the checkpoint stay.
        let resumed = (self.step > 0).then_some(self.step + 1);
        let mut journal = Journal::open(&output, &self.config.arm, resumed, self.watch.events)?;
        let placeholder = std::mem::replace(&mut output.progress, crate::progress::Progress::silent());
        let progress = placeholder.starting_at(self.tokens_in(self.step, source));
        loop {
            let (config, mut order, passed) = (self.config.clone(), self.order.clone(), self.watch.passed_over);
            let steps = self.step..config.steps;
            let batches = steps.flat_map(move |step| micro_batches(&config, &mut order, step + passed));
            let ended = Prefetcher::run(source, batches, Prefetch::default(), |batches| {
                self.run_on(batches, source, &mut output, &mut journal, &progress)
            })?;
            match ended {
                Ended::Rewound => progress.set(self.tokens_in(self.step, source)),
                Ended::Finished => break,
            }
        }
        progress.finish();
        Ok(())
    }

    fn run_on(
        &mut self,
        batches: &mut Prefetcher<'_, '_>,
        source: &dyn TargetSource,
        output: &mut TrainOutput<'_>,
        journal: &mut Journal,
        progress: &crate::progress::Progress,
    ) -> Result<Ended> {
        let mut next = || Ok(batches.next_batch()?.expect("as many as the steps take"));
        let mut rate = Rate::new();
        while self.step < self.config.steps {
            let before = self.tokens_seen;
            let numbers = self.batches(self.step);
            let tap = output.tap.as_mut().map(|tap| &mut **tap as &mut dyn Tap);
            let done = self.step_on(&numbers, &mut next, source.sequence_count(), tap)?;
            rate.waited += done.waited;
            rate.tokens += self.tokens_seen - before;
            let counts = done.trouble.is_none();
            if !counts && self.hold_back(&done, output, journal)? == Reaction::Rewind {
                return Ok(Ended::Rewound);
            }
            progress.advance(self.config.sequences_per_step * source.seq_len() as u64);
            let step = self.step;
            let every = |interval: u64| interval > 0 && step.is_multiple_of(interval);
            let last = self.step == self.config.steps;
            if counts && (every(self.config.log_every) || last || self.step == 1) {
                let (mut line, seconds) = (done.metrics, rate.began.elapsed().as_secs_f64());
                line.tokens_per_second = rate.tokens as f64 / seconds;
                line.data_wait = rate.waited.as_secs_f64() / seconds;
                progress.message(&format!("loss {:.3}", line.loss));
                journal.write(line)?;
                rate = Rate::new();
            }
            let mut is_best = false;
            if every(self.config.evaluate_every) || (last && self.config.evaluate_every > 0) {
                is_best = self.evaluate(output, journal)?;
                rate = Rate::new();
            }
            let stop = output.stop.load(Ordering::Relaxed);
            if every(self.config.checkpoint_every) || last || stop || is_best {
                journal.sync()?;
                self.save_with(&output.dir, &output.files, output.tap.as_deref_mut())?;
            }
            if stop && !last {
                return Err(Error::Interrupted { saved: checkpoint_dir(&output.dir, self.step) });
            }
        }
        Ok(Ended::Finished)
    }

    /// Measures the model, and the running mean of its weights; whether that is the best so far.
    fn evaluate(&mut self, output: &mut TrainOutput<'_>, journal: &mut Journal) -> Result<bool> {
        let Some(evaluate) = &mut output.evaluate else { return Ok(false) };
        let mut evaluation = evaluate(&self.model())?;
        if let Some(averaged) = self.averaged_model() {
            let averaged = evaluate(&averaged)?;
            evaluation.averaged_cross_entropy = Some(averaged.cross_entropy);
            evaluation.averaged_kl_to_teacher = averaged.kl_to_teacher;
        }
        let evaluation = EvalMetrics { arm: self.config.arm.clone(), step: self.step, ..evaluation };
        let is_best = self.rank(&evaluation);
        journal.write(evaluation)?;
        Ok(is_best)
    }

    /// Does what was asked for with a step that a guard holds back; the model is as it was before that step.
    ///
    /// # Errors
    /// When the run is to end, or too many were held back in a row, or there is nothing to go back to.
    fn hold_back(&mut self, done: &StepDone, output: &mut TrainOutput<'_>, journal: &mut Journal) -> Result<Reaction> {
        let trouble = done.trouble.as_ref().expect("it is held back");
        let number = self.watch.events;
        let too_often = self.watch.hold_back(&self.config.guards, self.step + 1);
        let reaction = if too_often { Reaction::Stop } else { self.config.guards.reaction(trouble) };
        let mut line = GuardMetrics {
            arm: self.config.arm.clone(),
            step: self.step + 1,
            number,
            reaction,
            reason: trouble.to_string(),
            back_to: None,
        };
        tracing::warn!("{}: step {}: {trouble}; {}", line.arm, line.step, words(reaction));
        match reaction {
            Reaction::Off | Reaction::Stop => {
                journal.write(line)?;
                journal.sync()?;
                Err(self.diverged(trouble, too_often))
            }
            Reaction::Skip => {
                self.step += 1;
                journal.write(line)?;
                Ok(reaction)
            }
            Reaction::Rewind => {
                let back_to = self.last_scheduled();
                let path = checkpoint_dir(&output.dir, back_to);
                let watch = self.watch.clone();
                let device = self.model.lm_head().device();
                self.restore(&path, &device)?;
                self.watch = watch.rewound(self.watch.clone(), back_to);
                line.back_to = Some(back_to);
                *journal = Journal::open(output, &self.config.arm, Some(back_to + 1), number)?;
                journal.write(line)?;
                Ok(reaction)
            }
        }
    }

    fn tokens_in(&self, steps: u64, source: &dyn TargetSource) -> u64 {
        steps * self.config.sequences_per_step * source.seq_len() as u64
    }
}

fn words(reaction: Reaction) -> &'static str {
    match reaction {
        Reaction::Off | Reaction::Stop => "the run ends",
        Reaction::Skip => "it is skipped",
        Reaction::Rewind => "going back to the last checkpoint, and on with other sequences",
    }
}
