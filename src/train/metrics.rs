//! `metrics.jsonl`: what a run logs about itself, one JSON object a line, append-only.
//!
//! The arms of a run share the file. A number that is not finite is written as `null` and read back as NaN. This is
//! the record only: curves and tables are made from it in `eval::report`.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use super::guard::Reaction;
use crate::durable;
use crate::error::{Error, Result};

/// One logged event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Metric {
    Step(StepMetrics),
    Evaluation(EvalMetrics),
    Guard(GuardMetrics),
}

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// "student" or "control".
    pub arm: String,
    pub step: u64,
    pub total_steps: u64,
    /// Predicted tokens so far, this step included.
    pub tokens_seen: u64,
    pub epoch: u64,
    /// What the step minimised, in nats per token: the weighted losses and the router's balance loss.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Divergence from the teacher in nats per token, unweighted; `None` without soft targets.
    pub soft_loss: Option<f64>,
    /// Cross-entropy of the labels in nats per token, unweighted.
    #[serde(deserialize_with = "number_or_nan")]
    pub hard_loss: f64,
    #[serde(deserialize_with = "number_or_nan")]
    pub soft_weight: f64,
    #[serde(deserialize_with = "number_or_nan")]
    pub hard_weight: f64,
    /// Root of the mean square of the divergence's gradient in a token's logits, before its weight; `None` without soft
    /// targets.
    #[serde(default)]
    pub soft_gradient_norm: Option<f64>,
    /// The same of the cross-entropy.
    #[serde(default = "unknown", deserialize_with = "number_or_nan")]
    pub hard_gradient_norm: f64,
    /// The router's load-balancing loss, unweighted; `None` for a dense model.
    pub aux_loss: Option<f64>,
    /// KL of the student's routers from the teacher's that they follow, unweighted, in nats per token; `None` where none
    /// does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_kl: Option<f64>,
    #[serde(deserialize_with = "number_or_nan")]
    pub learning_rate: f64,
    /// Euclidean norm of all gradients, before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// This and the next are the fields that depend on the clock.
    #[serde(deserialize_with = "number_or_nan")]
    pub tokens_per_second: f64,
    /// Share (0..1) of the time since the last line in which the step stood still for its data.
    #[serde(default = "unknown", deserialize_with = "number_or_nan")]
    pub data_wait: f64,
    /// `[mixture-of-experts layers][experts]`: share of the step's tokens sent to each expert.
    #[serde(default, deserialize_with = "rows_or_nan")]
    pub expert_load: Vec<Vec<f32>>,
}

/// One evaluation on the held-out text during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// "student" or "control".
    pub arm: String,
    pub step: u64,
    /// Nats per token.
    #[serde(deserialize_with = "number_or_nan")]
    pub cross_entropy: f64,
    #[serde(deserialize_with = "number_or_nan")]
    pub perplexity: f64,
    #[serde(deserialize_with = "number_or_nan")]
    pub bits_per_byte: f64,
    /// Nats per token; `None` without a teacher.
    pub kl_to_teacher: Option<f64>,
    /// Share (0..1) of the tokens on which student and teacher rank the same token first; `None` without a teacher.
    pub top1_agreement: Option<f64>,
    /// Nats per token of the running mean of the weights; `None` where none is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub averaged_cross_entropy: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub averaged_kl_to_teacher: Option<f64>,
}

/// A step that a guard held back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardMetrics {
    /// "student" or "control".
    pub arm: String,
    pub step: u64,
    /// How many were held back before it.
    pub number: u64,
    pub reaction: Reaction,
    pub reason: String,
    /// The step of the checkpoint that the run went back to, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_to: Option<u64>,
}

impl Metric {
    pub fn arm(&self) -> &str {
        match self {
            Metric::Step(metrics) => &metrics.arm,
            Metric::Evaluation(metrics) => &metrics.arm,
            Metric::Guard(metrics) => &metrics.arm,
        }
    }

    pub fn step(&self) -> u64 {
        match self {
            Metric::Step(metrics) => metrics.step,
            Metric::Evaluation(metrics) => metrics.step,
            Metric::Guard(metrics) => metrics.step,
        }
    }
}

impl From<StepMetrics> for Metric {
    fn from(metrics: StepMetrics) -> Metric {
        Metric::Step(metrics)
    }
}

impl From<GuardMetrics> for Metric {
    fn from(metrics: GuardMetrics) -> Metric {
        Metric::Guard(metrics)
    }
}

impl From<EvalMetrics> for Metric {
    fn from(metrics: EvalMetrics) -> Metric {
        Metric::Evaluation(metrics)
    }
}

/// Appends to `metrics.jsonl`. One writer at a time has the file.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Opens the file for the lines of one arm, and first drops what this run will log again: that arm's lines from
    /// `resume_step` on (all of them for a run that starts afresh, `None`), and a last line that a crash tore. Lines of
    /// other arms stay. A resumed run's file thus equals an undisturbed one's, but for what depends on the clock.
    ///
    /// `resume_step` is the first step number that will be logged again; log an evaluation under a number below it,
    /// and before the checkpoint, for it to outlive the resume.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when a line other than the last is no metric.
    pub fn open(path: impl AsRef<Path>, arm: &str, resume_step: Option<u64>) -> Result<MetricsWriter> {
        MetricsWriter::open_after(path, arm, resume_step, u64::MAX)
    }

    /// As [`MetricsWriter::open`], for a run that had `guard_events` steps held back up to where it goes on. Their lines stay
    /// whatever their steps were, for a run that goes back to a checkpoint does not undo them; later ones will be logged
    /// again.
    ///
    /// # Errors
    /// As [`MetricsWriter::open`].
    pub fn open_after(
        path: impl AsRef<Path>,
        arm: &str,
        resume_step: Option<u64>,
        guard_events: u64,
    ) -> Result<MetricsWriter> {
        let path = path.as_ref();
        let first_dropped = resume_step.unwrap_or(0);
        if path.exists() {
            let text = std::fs::read(path).map_err(Error::io(path))?;
            let mut kept = Vec::with_capacity(text.len());
            for (line, metric) in parse(path, &text)? {
                let stays = match &metric {
                    Metric::Guard(guard) if guard_events < u64::MAX => {
                        resume_step.is_some() && guard.number < guard_events
                    }
                    metric => metric.step() < first_dropped,
                };
                if metric.arm() != arm || stays {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
            if kept != text {
                durable::write_bytes(path, &kept)?;
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        Ok(MetricsWriter { path: path.to_path_buf(), file })
    }

    /// Appends one line and hands it to the operating system at once, so that it survives a crash of this process.
    pub fn write(&mut self, metric: impl Into<Metric>) -> Result<()> {
        let mut line = serde_json::to_vec(&metric.into()).map_err(|error| Error::io(&self.path)(error.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io(&self.path))
    }

    /// Waits until the lines are on the disk: call before a checkpoint that counts on them is made visible.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.path))
    }
}

/// All complete lines of a metrics file, in the order they were logged; a torn last line is left out.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when a line other than the last is no metric.
pub fn read_metrics(path: impl AsRef<Path>) -> Result<Vec<Metric>> {
    let path = path.as_ref();
    let text = std::fs::read(path).map_err(Error::io(path))?;
    Ok(parse(path, &text)?.into_iter().map(|(_, metric)| metric).collect())
}

fn parse<'a>(path: &Path, text: &'a [u8]) -> Result<Vec<(&'a [u8], Metric)>> {
    let mut lines: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
    if lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    let mut metrics = Vec::with_capacity(lines.len());
    for (index, &line) in lines.iter().enumerate() {
        match serde_json::from_slice::<Metric>(line) {
            Ok(metric) => metrics.push((line, metric)),
            Err(_) if index + 1 == lines.len() => {}
            Err(error) => {
                let problem = format!("line {}: not a metric ({error})", index + 1);
                return Err(Error::file(path, problem, "delete that line, or move the file away to start a new one"));
            }
        }
    }
    Ok(metrics)
}

/// A number that files of earlier versions lack.
fn unknown() -> f64 {
    f64::NAN
}

/// Reads the `null` that JSON has for a number that is not finite.
pub(crate) fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// As [`number_or_nan`], for a matrix.
pub(crate) fn rows_or_nan<'de, D, T>(deserializer: D) -> Result<Vec<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + From<f32>,
{
    let rows = Vec::<Vec<Option<T>>>::deserialize(deserializer)?;
    let number = |value: Option<T>| value.unwrap_or_else(|| T::from(f32::NAN));
    Ok(rows.into_iter().map(|row| row.into_iter().map(number).collect()).collect())
}
