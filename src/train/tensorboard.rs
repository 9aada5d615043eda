//! Event files for TensorBoard: the numbers of `metrics.jsonl` once more, as scalars by step.
//!
//! A file is a row of records: the length of the data (8 bytes, little-endian), a masked CRC-32C of those, the data, a masked
//! CRC-32C of it (TensorFlow's `record_writer.h`). The data is an `Event` of TensorFlow's `event.proto`, of which four
//! fields are written; so few that they are put together by hand.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::metrics::Metric;
use crate::error::{Error, Result};

/// TensorBoard looks for this in a file's name.
const FILE: &str = "events.out.tfevents.0.limbeck";

/// Writes the events of one arm.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// A new file in `dir` in the place of an older one, with what was logged so far: a run that goes on leaves no steps
    /// twice.
    pub fn create(dir: &Path, logged: &[&Metric]) -> Result<EventWriter> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join(FILE);
        let temporary = path.with_extension("tmp");
        let file = File::create(&temporary).map_err(Error::io(&temporary))?;
        let mut writer = EventWriter { path: temporary.clone(), file };
        let mut version = Message::default();
        version.double(1, now());
        version.bytes(3, b"brain.Event:2");
        writer.record(&version.0)?;
        logged.iter().try_for_each(|metric| writer.write(metric))?;
        std::fs::rename(&temporary, &path).map_err(Error::io(&path))?;
        Ok(EventWriter { path, ..writer })
    }

    /// Appends one line's numbers; those that are not finite are left out.
    pub fn write(&mut self, metric: &Metric) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in scalars(metric).into_iter().filter(|(_, value)| value.is_finite()) {
            let mut one = Message::default();
            one.bytes(1, tag.as_bytes());
            one.float(2, value as f32);
            summary.bytes(1, &one.0);
        }
        if summary.0.is_empty() {
            return Ok(());
        }
        let mut event = Message::default();
        event.double(1, now());
        event.number(2, metric.step());
        event.bytes(5, &summary.0);
        self.record(&event.0)
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend(length);
        record.extend(masked_checksum(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_checksum(data).to_le_bytes());
        self.file.write_all(&record).map_err(Error::io(&self.path))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A checksum that may stand beside data which holds checksums itself.
fn masked_checksum(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The numbers of a line, by the names that TensorBoard groups by their first part.
fn scalars(metric: &Metric) -> Vec<(&'static str, f64)> {
    let some = |tag, value: Option<f64>| value.map(|value| (tag, value));
    match metric {
        Metric::Step(step) => [
            Some(("train/loss", step.loss)),
            Some(("train/hard_loss", step.hard_loss)),
            some("train/soft_loss", step.soft_loss),
            Some(("weights/soft", step.soft_weight)),
            Some(("weights/hard", step.hard_weight)),
            some("gradients/soft", step.soft_gradient_norm),
            Some(("gradients/hard", step.hard_gradient_norm)),
            Some(("gradients/norm", step.grad_norm)),
            some("router/balance_loss", step.aux_loss),
            some("router/kl_to_teacher", step.router_kl),
            Some(("optimizer/learning_rate", step.learning_rate)),
            Some(("speed/tokens_per_second", step.tokens_per_second)),
            Some(("speed/data_wait", step.data_wait)),
        ]
        .into_iter()
        .flatten()
        .collect(),
        Metric::Evaluation(evaluation) => [
            Some(("held_out/cross_entropy", evaluation.cross_entropy)),
            Some(("held_out/perplexity", evaluation.perplexity)),
            Some(("held_out/bits_per_byte", evaluation.bits_per_byte)),
            some("held_out/kl_to_teacher", evaluation.kl_to_teacher),
            some("held_out/top1_agreement", evaluation.top1_agreement),
            some("held_out/cross_entropy_of_average", evaluation.averaged_cross_entropy),
            some("held_out/kl_to_teacher_of_average", evaluation.averaged_kl_to_teacher),
        ]
        .into_iter()
        .flatten()
        .collect(),
        Metric::Guard(guard) => vec![("guards/held_back", guard.number as f64 + 1.0)],
    }
}

/// A message of protocol buffers.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.varint(field << 3 | wire_type);
    }

    fn number(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_masked_as_tensorflow_masks_them() {
        // The CRC-32C of RFC 3720, section B.4: 32 zero bytes.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_checksum(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn numbers_are_written_in_groups_of_seven_bits() {
        let mut message = Message::default();
        message.number(2, 300);
        assert_eq!(message.0, [0x10, 0xac, 0x02]);
    }
}
