//! What a run logs, wherever it goes: `metrics.jsonl`, and event files for TensorBoard where they are asked for.
//! The first is the record; the second is made from it.

use super::{
    config::TrainOutput,
    metrics::{Metric, MetricsWriter, read_metrics},
    tensorboard::EventWriter,
};
use crate::error::Result;

/// One arm's lines.
pub(super) struct Journal {
    metrics: MetricsWriter,
    events: Option<EventWriter>,
}

impl Journal {
    /// Opens the record where a run goes on; see [`MetricsWriter::open_after`].
    pub fn open(output: &TrainOutput<'_>, arm: &str, resumed: Option<u64>, guard_events: u64) -> Result<Journal> {
        let metrics = MetricsWriter::open_after(&output.metrics, arm, resumed, guard_events)?;
        let events = match &output.tensorboard {
            None => None,
            Some(dir) => {
                let lines = read_metrics(&output.metrics)?;
                let own: Vec<&Metric> = lines.iter().filter(|line| line.arm() == arm).collect();
                Some(EventWriter::create(&dir.join(arm), &own)?)
            }
        };
        Ok(Journal { metrics, events })
    }

    pub fn write(&mut self, metric: impl Into<Metric>) -> Result<()> {
        let metric = metric.into();
        if let Some(events) = &mut self.events {
            events.write(&metric)?;
        }
        self.metrics.write(metric)
    }

    /// Waits until the record is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.metrics.sync()
    }
}
