//! Reads a cache without any model: `cargo run --example read_cache -- runs/quickstart_scout/cache/train [SEQUENCE]`.
//!
//! Prints what the cache is, and for some predictions of one sequence the token that came, the ids that the teacher held
//! most likely, and the probability of all the others together.

use std::fmt::Write;
use std::path::Path;

use limbeck::Result;
use limbeck::cache::CacheReader;
use limbeck::targets::TargetSource;

/// Predictions that are printed.
const ROWS: usize = 8;

/// What the cache says of one sequence.
pub fn describe(directory: &Path, number: u64) -> Result<String> {
    let cache = CacheReader::open(directory)?; // checks the manifest; each shard is checked when it is first read
    let (manifest, mut text) = (cache.manifest(), String::new());
    let counts = &manifest.counts;
    let mut line = |words: String| writeln!(text, "{words}").expect("writing to a string");
    line(format!("{} sequences of {}, root {}", counts.sequences, cache.seq_len(), manifest.root));

    let batch = cache.read(&[number])?; // any sequences, in any order
    let sequence = &batch.sequences[0];
    let valid: Vec<usize> = (0..sequence.seq_len()).filter(|row| sequence.is_valid(*row)).collect();
    line(format!("sequence {number}: {} predictions", valid.len()));
    let Some(targets) = &batch.targets else { return Ok(text) };
    for &row in valid.iter().take(ROWS) {
        let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        let capture = &targets.captures[0]; // the first temperature
        let most = targets.ids[kept.clone()].iter().zip(&capture.log_probs[kept]).take(3);
        let most: Vec<String> = most.map(|(id, log_prob)| format!("{id} ({:.3})", log_prob.exp())).collect();
        let (label, likely) = (sequence.tokens[row + 1], capture.label_log_prob[row].exp());
        let (most, rest) = (most.join(", "), capture.log_tail[row].exp());
        line(format!("row {row}: token {label} ({likely:.3}); likely were {most}; not kept {rest:.3}"));
    }
    Ok(text)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = arguments.first().map_or("runs/quickstart_scout/cache/train", String::as_str);
    let number = arguments.get(1).and_then(|number| number.parse().ok()).unwrap_or(0);
    print!("{}", describe(Path::new(directory), number)?);
    Ok(())
}
