//! `tokenizer train`: text in, tokenizer.json out.

use limbeck::Result;
use limbeck::data::{DataSource, texts};
use limbeck::tokenizer::train_byte_level_bpe;

use crate::cli::TokenizerTrainArgs;
use crate::output::print;

pub fn run(args: &TokenizerTrainArgs) -> Result<()> {
    let special_tokens: Vec<&str> = args.special_token.iter().map(String::as_str).collect();
    let sources: Vec<DataSource> = args
        .input
        .iter()
        .map(|path| DataSource { field: args.field.clone(), ..DataSource::new(path.to_string_lossy()) })
        .collect();
    let tokenizer = train_byte_level_bpe(texts(&sources)?, args.vocab_size, &special_tokens, &args.output)?;
    let file = args.output.join("tokenizer.json");
    print(&format!("tokenizer: {}, {} tokens\n", file.display(), tokenizer.vocab_size()))
}
