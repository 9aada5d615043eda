//! Weights that are not plain Hugging Face ones are read as the programs that made them read them: FP8 with scales, GGUF,
//! Meta's names. What is wrong with such a file is said.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use limbeck::checkpoint::{CheckpointReader, SafetensorsFile, read_safetensors};
use limbeck::error::Result;
use limbeck::models::{Decoder, TokenLayout};
use tempfile::TempDir;

mod fp8;
mod gguf;
mod meta;

/// Of logits, absolute (docs/numerics.md): two programs add in different orders.
const LOGITS: f32 = 2e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn temporary() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A copy of a fixture's folder, to be spoilt.
fn copy_of(name: &str) -> TempDir {
    let dir = temporary();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// The message of an error, which must be one line that starts with the path.
fn message<T>(result: Result<T>, path: &Path) -> String {
    let Err(error) = result else { panic!("{} was taken", path.display()) };
    let text = error.to_string();
    assert!(!text.contains('\n'), "more than one line: {text}");
    let prefix = format!("{}: ", path.display());
    text.strip_prefix(&prefix).unwrap_or_else(|| panic!("`{text}` does not start with `{prefix}`")).to_string()
}

fn all(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.load_f32(name, &file.info(name).unwrap().shape.clone()).unwrap()
}

fn load(reader: &CheckpointReader, name: &str) -> Vec<f32> {
    reader.load_f32(name, &reader.info(name).unwrap().shape.clone()).unwrap()
}

/// The model's logits are those of the golden, under this name there.
fn assert_logits(model: &Path, golden: &Path, name: &str) {
    let golden = read_safetensors(golden).unwrap();
    let &[rows, length] = golden.info("input_ids").unwrap().shape.as_slice() else { panic!("ids are a matrix") };
    let ids: Vec<u32> = golden.load_i64("input_ids").unwrap().into_iter().map(|id| id as u32).collect();
    let expected = all(&golden, name);
    let model = Decoder::open(model, &Device::flex()).unwrap();
    let layout = TokenLayout::of_documents(&model.config, ids, length);
    let logits: Vec<f32> = model.logits(model.forward(&layout).0).into_data().try_into_vec().unwrap();
    assert_eq!(logits.len(), expected.len(), "{rows} rows of {length} tokens");
    let worst = logits.iter().zip(&expected).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
    assert!(worst <= LOGITS, "a logit is {worst} off");
}

/// Stacks are read one expert at a time to the same values as whole, and matrices by rows; one expert without a byte of
/// the others.
fn assert_rows(reader: &CheckpointReader) {
    for name in reader.names() {
        let shape = reader.info(name).unwrap().shape.clone();
        let whole = load(reader, name);
        let (rows, width) = (shape[0], shape[1..].iter().product::<usize>());
        for range in [0..rows, 0..1, rows / 2..rows, rows - 1..rows, 1..1] {
            let part = reader.load_f32_rows(name, &shape, range.clone()).unwrap();
            assert_eq!(part, whole[range.start * width..range.end * width], "{name}, rows {range:?}");
        }
        let bytes_of = |range| {
            let before = reader.bytes_read();
            reader.load_f32_rows(name, &shape, range).unwrap();
            reader.bytes_read() - before
        };
        if shape.len() == 3 {
            let all = bytes_of(0..rows);
            assert!(all > 0);
            for expert in 0..rows {
                assert_eq!(bytes_of(expert..expert + 1) * rows as u64, all, "{name}, expert {expert}");
            }
        }
    }
}
