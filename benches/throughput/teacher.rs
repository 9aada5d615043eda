//! A teacher's forward pass with its top-k.

use std::time::Instant;

use limbeck::{
    Result,
    models::{Decoder, TokenLayout},
    selection::Selection,
    targets::{DistillBatch, PackedSequence},
    teacher::{HeadTargets, ResidentTeacher},
};

use super::{median, take_turns};

pub fn teacher(model: Decoder, ids: Vec<u32>, batch: usize, sequence: usize, top_k: usize, turns: bool) -> Result<()> {
    let teacher = ResidentTeacher::new(model, Selection::TopK { k: top_k }, &[1.0])?;
    let sequences: Vec<PackedSequence> = (0..batch)
        .map(|number| {
            let tokens = (0..=sequence).map(|t| ids[(number * sequence + t) % ids.len()]).collect();
            PackedSequence { tokens, segments: vec![0; sequence + 1] }
        })
        .collect();
    teacher.targets(&sequences, 0)?;
    if turns {
        let batch = DistillBatch { sequences: sequences.clone(), targets: None, row_weights: None };
        let model = teacher.model();
        let forward = || model.forward(&TokenLayout::of_batch(&model.config, &batch)).0;
        let hidden = forward();
        let head = HeadTargets::new(Selection::TopK { k: top_k }, &[1.0], model.config.vocab_size)?;
        return take_turns(|what| {
            match what {
                "body" => drop(forward()),
                "logits" => {
                    for first in (0..batch.row_count()).step_by(256) {
                        let count = 256.min(batch.row_count() - first);
                        drop(model.logits(hidden.clone().narrow(0, first, count)).into_data());
                    }
                }
                "head" => drop(head.of_hidden(model, hidden.clone(), &batch, 0)?),
                _ => drop(teacher.targets(&sequences, 0)?),
            }
            Ok(())
        });
    }
    let seconds = (0..5).map(|_| {
        let began = Instant::now();
        teacher.targets(&sequences, 0).map(|_| began.elapsed().as_secs_f64())
    });
    let seconds = median(seconds.collect::<Result<_>>()?);
    let rate = (batch * sequence) as f64 / seconds;
    println!(
        "{{\"bench\": \"teacher\", \"batch\": {batch}, \"sequence\": {sequence}, \"top_k\": {top_k}, \"tokens_per_second\": {rate:.0}}}"
    );
    Ok(())
}
