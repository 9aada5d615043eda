//! What a trainer needs beside the weights to go on as if it had not stopped.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::dtype::Dtype;
use super::safetensors_file::read_safetensors;
use super::safetensors_writer::{SafetensorsEntry, TensorData, write_safetensors};
use crate::durable;
use crate::error::{Error, Result};

const NUMBERS_FILE: &str = "train_state.json";
const TENSORS_FILE: &str = "train_state.safetensors";
/// Rises when the files change so that an older reader would misunderstand them.
const FORMAT: u64 = 1;

/// The state of training after a step: counters, anything the trainer puts in `values`, and tensors such as the
/// optimizer's moments. Kept in `train_state.json` and `train_state.safetensors` of a checkpoint directory.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    pub step: u64,
    pub tokens_seen: u64,
    /// Position in the data, state of random numbers ... Decimal fractions survive to the last bit as a string or as
    /// a tensor only.
    pub values: Value,
    /// Name to shape and values, row-major.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl TrainState {
    /// Writes both files into `dir`: for
    /// [`CheckpointWriter::with_extra`](super::CheckpointWriter::with_extra), so that weights and state become
    /// visible together.
    ///
    /// # Errors
    /// A tensor whose values do not fill its shape; input/output errors.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let entries: Vec<SafetensorsEntry> = self
            .tensors
            .iter()
            .map(|(name, (shape, _))| SafetensorsEntry::new(name, Dtype::F32, shape.clone()))
            .collect();
        let metadata = BTreeMap::from([("step".to_string(), self.step.to_string())]);
        write_safetensors(dir.join(TENSORS_FILE), &entries, &metadata, &mut |name| {
            Ok(TensorData::F32(Cow::Borrowed(&self.tensors[name].1)))
        })?;
        let numbers = json!({
            "format": FORMAT,
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "tensor_count": self.tensors.len(),
            "values": self.values,
        });
        durable::write_json(&dir.join(NUMBERS_FILE), &numbers)
    }

    /// Reads what [`TrainState::save`] wrote.
    ///
    /// # Errors
    /// A missing or malformed file, a newer format, two files of different steps, tensors that are not finite.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join(NUMBERS_FILE);
        let again = "resume from another checkpoint of the run";
        let missing = "this checkpoint has weights only: resume from one that training wrote, or start a new run";
        let mut numbers = durable::read_json_object(&path, missing, again)?;
        let number = |key: &str| {
            let found = numbers.get(key).and_then(Value::as_u64);
            found.ok_or_else(|| Error::file(&path, format!("has no whole number `{key}`"), again))
        };
        let format = number("format")?;
        if format != FORMAT {
            let problem = format!("has format {format}, this version reads {FORMAT}");
            return Err(Error::file(&path, problem, "resume with the version that wrote it"));
        }
        let (step, tokens_seen, tensor_count) = (number("step")?, number("tokens_seen")?, number("tensor_count")?);
        let values =
            numbers.get_mut("values").map(Value::take).ok_or_else(|| Error::file(&path, "has no `values`", again))?;

        let file = read_safetensors(dir.join(TENSORS_FILE))?;
        let found = file.metadata().get("step").map_or("none", String::as_str);
        if found != step.to_string() {
            let problem = format!("belongs to step {found}, {NUMBERS_FILE} to step {step}");
            return Err(Error::file(file.path(), problem, again));
        }
        if file.names().len() as u64 != tensor_count {
            let problem = format!("holds {} tensors, {NUMBERS_FILE} counts {tensor_count}", file.names().len());
            return Err(Error::file(file.path(), problem, again));
        }
        let mut tensors = BTreeMap::new();
        for name in file.names() {
            let shape = file.info(name)?.shape.clone();
            let values = file.load_f32(name, &shape)?;
            tensors.insert(name.to_string(), (shape, values));
        }
        Ok(TrainState { step, tokens_seen, values, tensors })
    }
}
