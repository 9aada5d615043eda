//! `inspect` of a model directory: its configuration, its parameters and, when asked, each tensor.

use std::fmt::Write;

use limbeck::Result;
use limbeck::checkpoint::CheckpointReader;

use crate::cli::InspectArgs;
use crate::output::print;

pub fn run(args: &InspectArgs) -> Result<()> {
    let reader = CheckpointReader::open(&args.path)?;
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<12}{value}").expect("writing to a string");
    line("checkpoint", args.path.display().to_string());
    let config = reader.config();
    // Multimodal models keep the decoder's numbers one level down.
    let decoder = config.get("text_config").unwrap_or(config);
    let keys = [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
    ];
    for (key, value) in keys.iter().filter_map(|key| Some((key, decoder.get(key)?))) {
        line("", format!("{key} = {value}"));
    }
    line(
        "size",
        format!(
            "{} parameters in {} tensors, {} bytes",
            reader.parameter_count(),
            reader.names().len(),
            reader.byte_count()
        ),
    );
    line("fingerprint", reader.fingerprint()?);
    if args.tensors {
        for name in reader.names() {
            let info = reader.info(name)?;
            line("", format!("{:<10}{:<20}{name}", info.dtype.to_string(), format!("{:?}", info.shape)));
        }
    }
    print(&text)
}
