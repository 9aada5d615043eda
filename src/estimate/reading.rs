//! How fast this machine reads weights: a file as it is, and a checkpoint until its layers can be multiplied by.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use burn::tensor::Device;
use rayon::ThreadPoolBuilder;
use serde_json::json;

use crate::checkpoint::{CheckpointReader, CheckpointWriter, StoredDtype, TensorSpec};
use crate::error::{Error, Result};
use crate::models::parameter::CheckpointWeights;
use crate::models::{Decoder, RandomWeights, WeightSource, read_config};

/// Times the file is read; the shortest counts, because whatever else the machine does only adds.
const REPEATS: usize = 3;
/// Bytes of the file that is written and read.
const FILE_BYTES: usize = 256 << 20;
/// Seconds that the checkpoint is loaded for, again and again.
const LOADING_SECONDS: f64 = 1.5;

/// Bytes per second of a file that was just written: from the page cache, where memory has room for it, as checkpoints
/// are that were read before.
pub(super) fn read_rate(directory: &Path) -> Result<f64> {
    let path = scratch_path(directory);
    let mut file = File::create_new(&path).map_err(Error::io(&path))?;
    let mut buffer = vec![0u8; 16 << 20];
    let written = (|| {
        for _ in 0..FILE_BYTES / buffer.len() {
            file.write_all(&buffer)?;
        }
        file.sync_all()?;
        let mut shortest = f64::INFINITY;
        for _ in 0..REPEATS {
            let begun = Instant::now();
            let mut read = File::open(&path)?;
            while read.read(&mut buffer)? > 0 {}
            shortest = shortest.min(begun.elapsed().as_secs_f64());
        }
        Ok(FILE_BYTES as f64 / shortest)
    })();
    // Whatever became of it, nobody needs the file.
    let _ = std::fs::remove_file(&path);
    written.map_err(Error::io(&path))
}

/// Bytes of weights per second that one thread reads and makes ready to multiply by.
pub(super) fn loading_rate(directory: &Path) -> Result<f64> {
    let path = scratch_path(directory);
    let rate = write_checkpoint(&path).and_then(|()| load_again_and_again(&path));
    let _ = std::fs::remove_dir_all(&path);
    rate
}

fn scratch_path(directory: &Path) -> PathBuf {
    directory.join(format!(".limbeck-calibration-{}", std::process::id()))
}

/// Two wide layers of random weights in bf16.
fn write_checkpoint(path: &Path) -> Result<()> {
    let json = json!({
        "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 512,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    let random = RandomWeights { seed: 1, std: 0.02 };
    let listed = Listed { random: &random, seen: Mutex::default() };
    Decoder::load_for_inference(read_config(path, &json)?, &listed, &Device::flex())?;
    let specs = listed.seen.into_inner().expect("nobody panicked");
    let mut fetch = |name: &str| {
        let spec = specs.iter().find(|spec| spec.name == name).expect("asked for by its name");
        random.load(name, &spec.shape)
    };
    CheckpointWriter::new(path, &json, StoredDtype::Bf16).write(&specs, &mut fetch)
}

fn load_again_and_again(path: &Path) -> Result<f64> {
    let pool = ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.map_err(|error| {
        Error::usage(format!("no thread to read weights on: {error}"), "allow this program more threads")
    })?;
    pool.install(|| {
        let reader = CheckpointReader::open(path)?;
        let config = read_config(reader.config_path(), reader.config())?;
        let load =
            || Decoder::load_for_inference(config.clone(), &CheckpointWeights::new(&reader), &Device::flex()).map(drop);
        load()?;
        let (begun, mut bytes) = (Instant::now(), 0);
        while bytes == 0 || begun.elapsed().as_secs_f64() < LOADING_SECONDS {
            load()?;
            bytes += reader.byte_count();
        }
        Ok(bytes as f64 / begun.elapsed().as_secs_f64())
    })
}

/// Random weights, and a list of what was asked for.
struct Listed<'a> {
    random: &'a RandomWeights,
    seen: Mutex<Vec<TensorSpec>>,
}

impl Listed<'_> {
    fn list(&self, name: &str, shape: &[usize]) {
        let mut seen = self.seen.lock().expect("nobody panicked");
        if seen.iter().all(|spec| spec.name != name) {
            seen.push(TensorSpec::new(name, shape));
        }
    }
}

impl WeightSource for Listed<'_> {
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.list(name, shape);
        self.random.load(name, shape)
    }

    fn load_rows(&self, name: &str, shape: &[usize], rows: std::ops::Range<usize>) -> Result<Vec<f32>> {
        self.list(name, shape);
        self.random.load_rows(name, shape, rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_be_read_does_not_stay() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_rate(folder.path()).unwrap() > 1e6);
        assert!(loading_rate(folder.path()).unwrap() > 1e5);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let missing = read_rate(&folder.path().join("missing")).unwrap_err().to_string();
        assert!(missing.contains("missing"), "{missing}");
    }
}
