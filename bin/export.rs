//! `export`: a checkpoint once more without its training state, in another number format or shard size.

use limbeck::Result;
use limbeck::checkpoint::StoredDtype;
use limbeck::models::Decoder;
use limbeck::run::RunOptions;
use limbeck::tokenizer::Tokenizer;
use limbeck::train::trainer::{Export, write_model};
use limbeck::{Error, data::parse_count};

use crate::cli::{ExportArgs, ExportDtype};
use crate::output::print;

pub fn run(args: &ExportArgs) -> Result<()> {
    let device = RunOptions::default().device()?;
    let mut model = Decoder::open(&args.checkpoint, &device)?;
    let dtype = match args.dtype {
        ExportDtype::F32 => StoredDtype::F32,
        ExportDtype::Bf16 => StoredDtype::Bf16,
        ExportDtype::F16 => StoredDtype::F16,
    };
    let Some(max_shard_bytes) = parse_count(&args.max_shard_bytes) else {
        let problem = format!("--max-shard-bytes is `{}`", args.max_shard_bytes);
        return Err(Error::usage(problem, "give a number of bytes such as 500M or 5B"));
    };
    let files = match Tokenizer::of_checkpoint(&args.checkpoint)? {
        Some(file) => Tokenizer::open(&file)?.files()?,
        None => vec![],
    };
    let export = Export { dtype, max_shard_bytes: Some(max_shard_bytes), replace: args.replace };
    write_model(&mut model, &args.output, &export, &files, None)?;
    print(&format!("checkpoint: {}\n", args.output.display()))
}
