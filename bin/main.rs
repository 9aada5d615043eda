//! The command line: parse, log to stderr, dispatch, exit code. What commands do is in the library.

mod cache;
mod cli;
mod compare;
mod completions;
mod distill;
mod evaluate;
mod export;
mod generate;
mod inspect;
mod inspect_cache;
mod inspect_checkpoint;
mod logits;
mod output;
mod plan;
mod precompute;
mod setup;
mod tokenizer;

use std::process::ExitCode;

use clap::Parser;
use limbeck::Result;
use limbeck_kernels::large_blocks::LargeBlocks;

use cli::{Cli, Command};

/// Tensors come and go with every step.
#[global_allocator]
static ALLOCATOR: LargeBlocks = LargeBlocks;

fn main() -> ExitCode {
    let cli = Cli::parse();
    setup::log(&cli.verbosity);
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our results has seen enough: `limbeck inspect x | head` is no failure.
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Plan(args) => plan::estimate(&args),
        Command::PrecomputeTeacherLogits(args) if args.run.dry_run => plan::run(&args.run.recipe, &args.run.run),
        Command::PrecomputeTeacherLogits(args) => precompute::run(&args),
        Command::Distill(args) if args.dry_run => plan::run(&args.recipe, &args.run),
        Command::Distill(args) => distill::run(&args),
        Command::Evaluate(args) if args.dry_run => plan::run(&args.target, &args.run),
        Command::Evaluate(args) => evaluate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Cache(args) => cache::run(&args),
        Command::Tokenizer(args) => match args.command {
            cli::TokenizerCommand::Train(args) => tokenizer::run(&args),
        },
        Command::Generate(args) => generate::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}
