//! Event files are read by TensorBoard: record by record with their checksums, by a reader written here from the formats'
//! descriptions, and by the package itself where `$PYTHON` has it.

mod small_training;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use limbeck::Error;
use limbeck::progress::Progress;
use limbeck::train::metrics::{Metric, read_metrics};
use limbeck::train::{TrainConfig, TrainOutput};
use small_training::*;

/// CRC-32C bit by bit, from its polynomial.
fn checksum(data: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    !data.iter().fold(!0u32, |crc, &byte| (0..8).fold(crc ^ byte as u32, step))
}

fn masked(data: &[u8]) -> u32 {
    let crc = checksum(data);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | byte as u64)
}

/// The data of each record.
fn records(file: &[u8]) -> Vec<&[u8]> {
    let (mut rest, mut found) = (file, vec![]);
    while !rest.is_empty() {
        let length = number(&rest[..8]) as usize;
        assert_eq!(number(&rest[8..12]), masked(&rest[..8]) as u64);
        let data = &rest[12..12 + length];
        assert_eq!(number(&rest[12 + length..16 + length]), masked(data) as u64);
        found.push(data);
        rest = &rest[16 + length..];
    }
    found
}

/// Field numbers and contents of a message; numbers as eight bytes.
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn varint(message: &mut &[u8]) -> u64 {
        let end = message.iter().position(|byte| byte & 0x80 == 0).unwrap();
        let value = message[..=end].iter().rev().fold(0, |sum, byte| sum << 7 | (byte & 0x7f) as u64);
        *message = &message[end + 1..];
        value
    }
    let mut found = vec![];
    while !message.is_empty() {
        let key = varint(&mut message);
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, varint(&mut message).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut message) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, message[..length].to_vec()));
        message = &message[length..];
    }
    found
}

/// Values by tag and step.
fn scalars(path: &Path) -> BTreeMap<(String, u64), f32> {
    let file = fs::read(path).unwrap();
    let records = records(&file);
    let version = fields(records[0]);
    assert_eq!((version[1].0, version[1].1.as_slice()), (3, &b"brain.Event:2"[..]));
    let mut found = BTreeMap::new();
    for event in &records[1..] {
        let event: BTreeMap<u64, Vec<u8>> = fields(event).into_iter().collect();
        assert!(f64::from_le_bytes(event[&1][..].try_into().unwrap()) > 1.7e9, "a time of this century");
        for (_, value) in fields(&event[&5]) {
            let value: BTreeMap<u64, Vec<u8>> = fields(&value).into_iter().collect();
            let tag = String::from_utf8(value[&1].clone()).unwrap();
            let before = found.insert((tag, number(&event[&2])), f32::from_le_bytes(value[&2][..].try_into().unwrap()));
            assert!(before.is_none(), "no step is there twice");
        }
    }
    found
}

fn run(dir: &Path, source: &Source) -> limbeck::Result<()> {
    let config = TrainConfig { evaluate_every: 4, checkpoint_every: 5, ..config() };
    let mut trainer = trainer(config, 1).resume(dir, &burn::tensor::Device::flex().autodiff())?;
    let held_out = Source::new();
    let output = TrainOutput {
        dir: dir.to_path_buf(),
        files: vec![],
        metrics: dir.join("metrics.jsonl"),
        tensorboard: Some(dir.join("tensorboard")),
        progress: Progress::silent(),
        stop: source.stop_at.as_ref().map(|(_, stop)| stop.clone()).unwrap_or_default(),
        evaluate: Some(evaluation(source, &held_out)),
        tap: None,
    };
    trainer.run(source, output)
}

#[test]
fn event_files_hold_the_record_once_however_often_a_run_was_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for evaluation in [1, 1] {
        let error = run(dir, &Source::new().stopping_at(evaluation)).unwrap_err();
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
    }
    run(dir, &Source::new()).unwrap();
    let found = scalars(&dir.join("tensorboard/student/events.out.tfevents.0.limbeck"));
    let mut expected = 0;
    for line in read_metrics(dir.join("metrics.jsonl")).unwrap() {
        let value = |tag: &str| found[&(tag.to_string(), line.step())];
        match &line {
            Metric::Step(step) => {
                assert_eq!(value("train/loss"), step.loss as f32);
                assert_eq!(value("train/soft_loss"), step.soft_loss.unwrap() as f32);
                assert_eq!(value("optimizer/learning_rate"), step.learning_rate as f32);
                expected += 12;
            }
            Metric::Evaluation(evaluation) => {
                assert_eq!(value("held_out/cross_entropy"), evaluation.cross_entropy as f32);
                expected += 5;
            }
            Metric::Guard(_) => {}
        }
    }
    assert_eq!((found.len(), expected), (12 * 12 + 3 * 5, 12 * 12 + 3 * 5));

    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let script = "import sys\n\
                  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n\
                  events = EventAccumulator(sys.argv[1]); events.Reload()\n\
                  print([(e.step, round(e.value, 4)) for e in events.Scalars('held_out/cross_entropy')])";
    let probe = Command::new(&python).args(["-c", "import tensorboard"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!(
            "SKIPPED: reading by TensorBoard itself needs a Python with the package tensorboard, named by PYTHON"
        );
        return;
    }
    let output = Command::new(&python).args(["-c", script]).arg(dir.join("tensorboard/student")).output().unwrap();
    let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{complaint}");
    assert!(said.starts_with("[(4, ") && said.contains("(8, ") && said.contains("(12, "), "{said}");
}
