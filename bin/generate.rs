//! `generate`: prompt in, text out, token by token.

use limbeck::models::Decoder;
use limbeck::models::generate::{Sampling, generate};
use limbeck::run::RunOptions;
use limbeck::tokenizer::Tokenizer;
use limbeck::{Error, Result};

use crate::cli::GenerateArgs;
use crate::output::print;

pub fn run(args: &GenerateArgs) -> Result<()> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Error::usage(format!("--temperature is {}", args.temperature), "use a number of 0 or more"));
    }
    let device = RunOptions { device: args.device.device.clone(), ..RunOptions::default() }.device()?;
    let tokenizer = Tokenizer::open(&args.checkpoint)?;
    let model = Decoder::open_for_inference(&args.checkpoint, &device)?;
    let prompt: Vec<u32> = tokenizer.document_start().into_iter().chain(tokenizer.encode(&args.prompt)?).collect();
    let (length, most) = (prompt.len().saturating_add(args.max_tokens), model.config.max_position);
    if length > most {
        let problem = format!("the prompt has {} tokens, --max-tokens is {}", prompt.len(), args.max_tokens);
        let tip = "ask for fewer tokens, or shorten the prompt";
        return Err(Error::usage(format!("{problem}, and the model reads at most {most} positions"), tip));
    }
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, seed: args.seed };
    print(&args.prompt)?;
    let mut text = tokenizer.text_stream();
    generate(&model, &prompt, args.max_tokens, &sampling, &mut |token| print(&text.push(token)?))?;
    print(&format!("{}\n", text.finish()?))
}
