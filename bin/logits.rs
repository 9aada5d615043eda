//! `logits`: token ids in, logits out, both as safetensors.

use std::collections::BTreeMap;

use limbeck::checkpoint::{Dtype, SafetensorsEntry, TensorData, read_safetensors, write_safetensors};
use limbeck::models::{Decoder, TokenLayout};
use limbeck::run::RunOptions;
use limbeck::{Error, Result};

use crate::cli::LogitsArgs;
use crate::output::print;

pub fn run(args: &LogitsArgs) -> Result<()> {
    let device = RunOptions { device: args.device.device.clone(), ..RunOptions::default() }.device()?;
    let file = read_safetensors(&args.tokens)?;
    if !file.contains("input_ids") {
        return Err(wrong(args, "is missing".into(), "give it as i64 of shape [batch, sequence]"));
    }
    let shape = file.info("input_ids")?.shape.clone();
    let [batch, length] = shape[..] else {
        return Err(wrong(args, format!("has shape {shape:?}"), "give it the shape [batch, sequence]"));
    };
    if batch * length == 0 {
        return Err(wrong(args, "is empty".into(), "give at least one token"));
    }
    let model = Decoder::open_for_inference(&args.checkpoint, &device)?;
    let vocab = model.config.vocab_size;
    model.config.check_seq_len(length)?;
    let ids = file.load_i64("input_ids")?;
    if let Some(id) = ids.iter().find(|&&id| id < 0 || id >= vocab as i64) {
        return Err(wrong(args, format!("holds id {id}"), &format!("ids go from 0 to {}", vocab - 1)));
    }
    let mut logits = Vec::with_capacity(ids.len() * vocab);
    for row in ids.chunks(length) {
        let row = row.iter().map(|&id| id as u32).collect();
        let layout = TokenLayout::of_documents(&model.config, row, length);
        let values = model.logits(model.forward(&layout).0).into_data();
        logits.extend(values.try_into_vec::<f32>().expect("logits are f32"));
    }
    let shape = [batch, length, vocab];
    let entry = SafetensorsEntry::new("logits", Dtype::F32, shape.to_vec());
    let mut logits = Some(logits);
    write_safetensors(&args.output, &[entry], &BTreeMap::new(), &mut |_| {
        Ok(TensorData::from(logits.take().expect("asked for once")))
    })?;
    print(&format!("logits: {} {shape:?}\n", args.output.display()))
}

fn wrong(args: &LogitsArgs, problem: String, tip: &str) -> Error {
    Error::Tensor { path: args.tokens.clone(), tensor: "input_ids".into(), problem, tip: tip.into() }
}
