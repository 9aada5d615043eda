//! `logits`: token ids in, logits out, both as safetensors.

use limbeck::Result;
use limbeck::run::RunOptions;

use crate::cli::LogitsArgs;
use crate::output::print;

pub fn run(args: &LogitsArgs) -> Result<()> {
    let device = RunOptions { device: args.device.device.clone(), ..RunOptions::default() }.device()?;
    let shape = limbeck::generate::logits(&args.checkpoint, &args.tokens, &args.output, &device)?;
    print(&format!("logits: {} {shape:?}\n", args.output.display()))
}
