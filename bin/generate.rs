//! `generate`: prompt in, text out, token by token.

use limbeck::generate::Sampling;
use limbeck::run::RunOptions;
use limbeck::{Error, Result};

use crate::cli::GenerateArgs;
use crate::output::print;

pub fn run(args: &GenerateArgs) -> Result<()> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Error::usage(format!("--temperature is {}", args.temperature), "use a number of 0 or more"));
    }
    let device = RunOptions { device: args.device.device.clone(), ..RunOptions::default() }.device()?;
    let sampling = Sampling {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
    };
    print(&args.prompt)?;
    limbeck::generate::run(&args.checkpoint, &args.prompt, &sampling, &device, &mut |piece| print(piece))?;
    print("\n")
}
