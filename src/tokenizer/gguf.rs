//! The tokenizer inside a GGUF file, as the files of Hugging Face.
//!
//! For byte-level BPE vocabularies (`tokenizer.ggml.model = "gpt2"`) whose way of cutting text before merging is known
//! by the name llama.cpp has for it. Others are refused: cut otherwise, text has other ids.

use serde_json::{Value, json};

use crate::checkpoint::Metadata;
use crate::error::Result;

/// `tokenizer.ggml.token_type` of tokens that stand for no text.
const CONTROL: u64 = 3;
/// Likewise of tokens that are found in text before it is cut.
const USER_DEFINED: u64 = 4;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA4: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How text is cut before pairs are merged.
enum Cut {
    /// By GPT-2's pattern.
    Gpt2,
    /// Each digit by itself, then by GPT-2's pattern.
    Digits,
    /// By a pattern of its own; words that the vocabulary has are not built by merges.
    Pattern(&'static str),
}

/// `tokenizer.json` and `tokenizer_config.json` of what a GGUF file describes.
///
/// # Errors
/// [`crate::Error::Config`] when the vocabulary is of another kind, cut in a way that is not known, or incomplete.
pub(super) fn files(metadata: &Metadata) -> Result<[Value; 2]> {
    const MODEL: &str = "tokenizer.ggml.model";
    const PRE: &str = "tokenizer.ggml.pre";
    let instead = "name the model's own tokenizer.json as data.tokenizer";
    match metadata.text(MODEL)?.ok_or_else(|| metadata.missing(MODEL))? {
        "gpt2" => {}
        other => {
            return Err(metadata.error(
                MODEL,
                format!("`{other}` is not a kind of tokenizer that is read from GGUF"),
                instead,
            ));
        }
    }
    let cut = match metadata.text(PRE)?.unwrap_or("default") {
        "gpt-2" | "gpt2" => Cut::Gpt2,
        "smollm" => Cut::Digits,
        "llama-bpe" | "llama3" | "llama-v3" => Cut::Pattern(LLAMA3),
        "llama4" => Cut::Pattern(LLAMA4),
        other => {
            return Err(metadata.error(PRE, format!("`{other}` is not a way of cutting text that is known"), instead));
        }
    };
    let tokens = texts(metadata, "tokenizer.ggml.tokens")?;
    let merges = texts(metadata, "tokenizer.ggml.merges")?;
    let kinds = metadata.list("tokenizer.ggml.token_type")?.unwrap_or_default();
    let kind = |id: usize| kinds.get(id).and_then(Value::as_u64).unwrap_or(1);
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| matches!(kind(*id), CONTROL | USER_DEFINED))
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind(id) == CONTROL,
            })
        })
        .collect();
    let vocabulary: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();
    if vocabulary.len() != tokens.len() {
        return Err(metadata.error("tokenizer.ggml.tokens", "has a token twice", instead));
    }
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let (cut, whole_words) = match cut {
        Cut::Gpt2 => (bytes(true), false),
        Cut::Digits => (sequence([json!({ "type": "Digits", "individual_digits": true }), bytes(true)]), false),
        Cut::Pattern(pattern) => {
            let split =
                json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
            (sequence([split, bytes(false)]), true)
        }
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": cut,
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole_words,
            "vocab": vocabulary, "merges": merges,
        },
    });
    let mut settings = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false });
    for (key, id_key) in
        [("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")]
    {
        let id_key = format!("tokenizer.ggml.{id_key}");
        settings[key] = match metadata.size(&id_key)? {
            None => Value::Null,
            Some(id) => match usize::try_from(id).ok().and_then(|id| tokens.get(id)) {
                Some(token) => json!(token),
                None => {
                    return Err(metadata.error(
                        &id_key,
                        format!("is {id}, beyond the {} tokens", tokens.len()),
                        instead,
                    ));
                }
            },
        };
    }
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        settings["chat_template"] = json!(template);
    }
    Ok([tokenizer, settings])
}

fn sequence(parts: [Value; 2]) -> Value {
    json!({ "type": "Sequence", "pretokenizers": parts })
}

fn texts<'a>(metadata: &'a Metadata, key: &str) -> Result<Vec<&'a str>> {
    let list = metadata.list(key)?.ok_or_else(|| metadata.missing(key))?;
    let texts: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
    texts.ok_or_else(|| metadata.error(key, "is not a list of strings", "convert the model again"))
}
