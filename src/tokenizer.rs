//! Text to token ids and back, with a fingerprint of what the tokenizer does.
//!
//! Wraps Hugging Face `tokenizer.json` files and what GGUF files hold of them, and trains byte-level BPE ones that
//! `transformers` reads too.
//! Knows nothing of documents, packing or models.
//!
//! Two ways to encode, because text that merely *mentions* a special token must not become one:
//! [`Tokenizer::encode`] reads `<|end_of_text|>` in a prompt as the special token, as `transformers` does;
//! [`Tokenizer::encode_document`] reads everything as plain text, and is what training data goes through.

mod gguf;

use crate::checkpoint::{is_gguf, read_gguf};
use crate::durable;
use crate::error::{Error, Result};
use crate::hub::{self, Wanted};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};
use tokenizers::{TokenizerBuilder, TokenizerImpl};

/// Names that mark the start of a document where no file beside `tokenizer.json` says so.
const KNOWN_STARTS: [&str; 2] = ["<|begin_of_text|>", "<s>"];
/// Names that mark the end of a document where no file beside `tokenizer.json` says so.
const KNOWN_ENDS: [&str; 3] = ["<|end_of_text|>", "<|endoftext|>", "</s>"];
/// The trainer counts pairs in 32 bits; below this many bytes no count can overflow.
const LARGEST_TRAINING_TEXT: u64 = i32::MAX as u64;

/// A tokenizer read from a `tokenizer.json`. Cloning is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    /// Names and content of the files that a GGUF file stands for; empty for files that are there themselves.
    made: Vec<(String, Vec<u8>)>,
    /// Recognises special tokens that are spelt out in the text.
    prompts: tokenizers::Tokenizer,
    /// Reads everything as text.
    documents: tokenizers::Tokenizer,
    vocab_size: usize,
    document_start: Option<u32>,
    document_end: Option<u32>,
    fingerprint: OnceLock<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, {} ids)", self.shared.path.display(), self.shared.vocab_size)
    }
}

impl Tokenizer {
    /// Opens a directory that holds `tokenizer.json`, that file itself, or a GGUF file with a vocabulary in it.
    ///
    /// Truncation and padding that the file may ask for are switched off: training text is never silently cut.
    ///
    /// # Errors
    /// The file is missing or malformed, or a file beside it names a document token that it does not have.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let path = &hub::local(path, Wanted::Tokenizer)?;
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        if !file.is_file() {
            let problem = if path.is_dir() { "this folder has no tokenizer.json" } else { "there is no such file" };
            return Err(Error::file(
                path,
                problem,
                "name a tokenizer.json or its folder, or make one with `limbeck tokenizer train`",
            ));
        }
        if is_gguf(&file) {
            return Self::open_gguf(file);
        }
        let bytes = fs::read(&file).map_err(Error::io(&file))?;
        let folder = file.parent().unwrap_or(Path::new("")).to_path_buf();
        Self::build(file, &bytes, vec![], |tokenizer| {
            let start = document_token(&folder, tokenizer, "bos_token", &KNOWN_STARTS)?;
            Ok((start, document_token(&folder, tokenizer, "eos_token", &KNOWN_ENDS)?))
        })
    }

    fn open_gguf(file: PathBuf) -> Result<Tokenizer> {
        let [tokenizer, settings] = gguf::files(read_gguf(&file)?.metadata())?;
        let bytes = |value: &Value| serde_json::to_vec_pretty(value).expect("JSON values always serialise");
        let text = bytes(&tokenizer);
        let made = vec![("tokenizer.json".into(), text.clone()), ("tokenizer_config.json".into(), bytes(&settings))];
        Self::build(file, &text, made, |tokenizer| {
            let id = |key: &str| settings[key].as_str().and_then(|token| tokenizer.token_to_id(token));
            Ok((id("bos_token"), id("eos_token")))
        })
    }

    fn build(
        file: PathBuf,
        bytes: &[u8],
        made: Vec<(String, Vec<u8>)>,
        document_tokens: impl Fn(&tokenizers::Tokenizer) -> Result<(Option<u32>, Option<u32>)>,
    ) -> Result<Tokenizer> {
        let malformed = |source: tokenizers::Error| {
            Error::file(&file, format!("not a tokenizer: {}", one_line(&source)), "write it again from its source")
        };
        let mut prompts = tokenizers::Tokenizer::from_bytes(bytes).map_err(malformed)?;
        prompts.with_truncation(None).map_err(malformed)?;
        prompts.with_padding(None);
        let mut documents = prompts.clone();
        documents.set_encode_special_tokens(true);
        let vocab_size = prompts.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err(Error::file(&file, "the vocabulary is empty", "train the tokenizer on some text"));
        }
        let (document_start, document_end) = document_tokens(&prompts)?;
        let fingerprint = OnceLock::new();
        let shared =
            Shared { path: file, made, prompts, documents, vocab_size, document_start, document_end, fingerprint };
        Ok(Tokenizer { shared: Arc::new(shared) })
    }

    /// The same tokenizer with other tokens around documents, each by its spelling; `""` for none, `None` to leave it.
    ///
    /// # Errors
    /// The vocabulary has no such token.
    pub fn with_document_tokens(self, start: Option<&str>, end: Option<&str>) -> Result<Tokenizer> {
        let find = |spelling: &str| match (spelling, self.token_id(spelling)) {
            ("", _) => Ok(None),
            (_, Some(id)) => Ok(Some(id)),
            (_, None) => Err(Error::file(
                self.path(),
                format!("there is no token `{spelling}`"),
                "name one of the vocabulary for document_start and document_end, or `\"\"` for none",
            )),
        };
        let document_start = start.map_or(Ok(self.document_start()), find)?;
        let document_end = end.map_or(Ok(self.document_end()), find)?;
        let shared = Shared {
            path: self.shared.path.clone(),
            made: self.shared.made.clone(),
            prompts: self.shared.prompts.clone(),
            documents: self.shared.documents.clone(),
            vocab_size: self.shared.vocab_size,
            document_start,
            document_end,
            fingerprint: self.shared.fingerprint.clone(),
        };
        Ok(Tokenizer { shared: Arc::new(shared) })
    }

    /// The file this was read from.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Token ids of a prompt. Special tokens spelt out in the text become themselves; none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(&self.shared.prompts, text)
    }

    /// Token ids of a document: all of it is text, also what looks like a special token. None is added.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(&self.shared.documents, text)
    }

    fn ids(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
        let encoding = tokenizer.encode_fast(text, false).map_err(|source| self.failed("encode the text", &source))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids, without special tokens. Ids that the vocabulary lacks (a model may have more rows than its
    /// tokenizer has ids) and bytes that are not UTF-8 are treated as `transformers` does: the former give nothing,
    /// the latter `U+FFFD`.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.shared.prompts.decode(ids, true).map_err(|source| self.failed("decode token ids", &source))
    }

    /// Text that grows token by token, for printing while a model generates.
    pub fn text_stream(&self) -> TextStream {
        TextStream { tokenizer: self.clone(), ids: vec![], given: 0 }
    }

    fn failed(&self, what: &str, source: &tokenizers::Error) -> Error {
        let problem = format!("could not {what}: {}", one_line(source));
        Error::file(&self.shared.path, problem, "check the tokenizer with a short text")
    }

    /// The largest token id plus one; holes in the numbering count.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.shared.prompts.token_to_id(token)
    }

    /// The token written before each document, if the tokenizer has one.
    ///
    /// Taken from `bos_token` in `tokenizer_config.json` or `special_tokens_map.json` (a string or
    /// `{"content": ..}`; an explicit `null` means none), then from `bos_token_id` in `generation_config.json`, then
    /// from well-known names (`<|begin_of_text|>`, `<s>`).
    pub fn document_start(&self) -> Option<u32> {
        self.shared.document_start
    }

    /// The token written after each document, if the tokenizer has one; found as [`Tokenizer::document_start`] is,
    /// under `eos_token` (well-known names `<|end_of_text|>`, `<|endoftext|>`, `</s>`).
    pub fn document_end(&self) -> Option<u32> {
        self.shared.document_end
    }

    /// Bytes of raw text that each id stands for, special tokens 0: the denominator of bits per byte.
    ///
    /// # Shapes
    /// One number per id, `vocab_size()` of them. For byte-level vocabularies the sum over a text's ids is exactly
    /// its length in bytes; for vocabularies that normalise their input, it is the length of the normalised text.
    pub fn token_byte_lengths(&self) -> Vec<u32> {
        let tokenizer = &self.shared.prompts;
        let byte_level = self.is_byte_level();
        let added = tokenizer.get_added_tokens_decoder();
        let mut lengths = vec![0; self.shared.vocab_size];
        for (token, id) in tokenizer.get_vocab(true) {
            let length = match added.get(&id) {
                Some(added) if added.special => 0,
                Some(added) => added.content.len(),
                // Each character of a byte-level vocabulary stands for one byte.
                None if byte_level => token.chars().count(),
                None if token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') => 1,
                // SentencePiece writes a space as U+2581, three bytes long.
                None => token.len() - 2 * token.matches('\u{2581}').count(),
            };
            lengths[id as usize] = length as u32;
        }
        lengths
    }

    fn is_byte_level(&self) -> bool {
        fn mentions(value: &Value) -> bool {
            match value {
                Value::Object(map) => {
                    map.get("type").is_some_and(|kind| kind == "ByteLevel") || map.values().any(mentions)
                }
                Value::Array(items) => items.iter().any(mentions),
                _ => false,
            }
        }
        let tokenizer = &self.shared.prompts;
        let parts = [
            serde_json::to_value(tokenizer.get_pre_tokenizer()),
            serde_json::to_value(tokenizer.get_normalizer()),
            serde_json::to_value(tokenizer.get_decoder()),
        ];
        parts.iter().flatten().any(mentions)
    }

    /// Hex BLAKE3 of what decides ids: normaliser, pre-tokenizer, model (vocabulary, merges) and added tokens.
    ///
    /// Not of the file: its formatting, key order, post-processor, truncation and padding make no difference.
    pub fn fingerprint(&self) -> String {
        self.shared.fingerprint.get_or_init(|| fingerprint(&self.shared.prompts)).clone()
    }

    /// Where the tokenizer of a checkpoint is: beside its weights, or inside its GGUF file. None when it has none.
    ///
    /// # Errors
    /// It is on the hub, and cannot be had from there.
    pub fn of_checkpoint(checkpoint: &Path) -> Result<Option<PathBuf>> {
        let checkpoint = hub::local(checkpoint, Wanted::Tokenizer)?;
        let file = if is_gguf(&checkpoint) { checkpoint } else { checkpoint.join("tokenizer.json") };
        Ok(file.is_file().then_some(file))
    }

    /// Names and content of the tokenizer's files: what a checkpoint written with it has to carry along.
    ///
    /// # Errors
    /// A file cannot be read any more.
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        if !self.shared.made.is_empty() {
            return Ok(self.shared.made.clone());
        }
        let folder = self.shared.path.parent().unwrap_or(Path::new(""));
        let mut files = vec![self.shared.path.clone()];
        let beside = ["tokenizer_config.json", "special_tokens_map.json"];
        files.extend(beside.iter().map(|name| folder.join(name)).filter(|file| file.is_file()));
        let read = |path: PathBuf| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            Ok((name, fs::read(&path).map_err(Error::io(&path))?))
        };
        files.into_iter().map(read).collect()
    }
}

fn fingerprint(tokenizer: &tokenizers::Tokenizer) -> String {
    fn feed(hasher: &mut blake3::Hasher, value: &Value) {
        match value {
            Value::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort();
                hasher.update(b"{").update(&(keys.len() as u64).to_le_bytes());
                for key in keys {
                    feed_text(hasher, key);
                    feed(hasher, &map[key]);
                }
            }
            Value::Array(items) => {
                hasher.update(b"[").update(&(items.len() as u64).to_le_bytes());
                items.iter().for_each(|item| feed(hasher, item));
            }
            Value::String(text) => feed_text(hasher, text),
            scalar => feed_text(hasher, &scalar.to_string()),
        }
    }
    // Lengths go first, so that no two different structures give the same bytes.
    fn feed_text(hasher: &mut blake3::Hasher, text: &str) {
        hasher.update(b"\"").update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let whole = serde_json::to_value(tokenizer).expect("a tokenizer that was read can be written");
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"limbeck tokenizer 1");
    for part in ["normalizer", "pre_tokenizer", "model", "added_tokens"] {
        feed_text(&mut hasher, part);
        feed(&mut hasher, &whole[part]);
    }
    hasher.finalize().to_hex().to_string()
}

fn document_token(folder: &Path, tokenizer: &tokenizers::Tokenizer, key: &str, known: &[&str]) -> Result<Option<u32>> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let file = folder.join(name);
        let Some(settings) = read_json(&file)? else { continue };
        let token = match settings.get(key) {
            None => continue,
            Some(Value::Null) => return Ok(None),
            Some(Value::String(token)) => token,
            Some(Value::Object(map)) if map.get("content").is_some_and(Value::is_string) => {
                map["content"].as_str().expect("checked to be a string")
            }
            Some(other) => {
                let problem = format!("`{key}` is {other}");
                return Err(Error::file(file, problem, "write it as a string or as {\"content\": \"..\"}"));
            }
        };
        return match tokenizer.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => {
                let problem = format!("`{key}` is `{token}`, which tokenizer.json does not have");
                Err(Error::file(file, problem, "correct the name, or write null for no such token"))
            }
        };
    }
    if let Some(settings) = read_json(&folder.join("generation_config.json"))? {
        let id = match settings.get(format!("{key}_id")) {
            Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
            Some(id) => id.as_u64(),
            None => None,
        };
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()).filter(|&id| tokenizer.id_to_token(id).is_some()) {
            return Ok(Some(id));
        }
    }
    Ok(known.iter().find_map(|name| tokenizer.token_to_id(name)))
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok(Some(value)),
        Err(source) => Err(Error::file(path, format!("not JSON: {source}"), "correct the file or remove it")),
    }
}

/// Decodes generated ids as they come; holds back a character until all of its bytes are there.
pub struct TextStream {
    tokenizer: Tokenizer,
    /// The ids of the last piece given out, and those that wait after it.
    ids: Vec<u32>,
    given: usize,
}

impl TextStream {
    /// The text that `id` completes, often empty in the middle of a character.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        // Decoded together with the piece before, since some decoders treat the start of a text differently.
        let before = self.tokenizer.decode(&self.ids[..self.given])?;
        let now = self.tokenizer.decode(&self.ids)?;
        match now.strip_prefix(&before) {
            Some(new) if !new.is_empty() && !now.ends_with('\u{FFFD}') => {
                self.ids.drain(..self.given);
                self.given = self.ids.len();
                Ok(new.to_string())
            }
            _ => Ok(String::new()),
        }
    }

    /// What is still held back; bytes of an unfinished character come as `U+FFFD`.
    pub fn finish(self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given])?;
        let now = self.tokenizer.decode(&self.ids)?;
        Ok(now.strip_prefix(&before).unwrap_or_default().to_string())
    }
}

/// Trains a byte-level BPE and writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.
///
/// The 256 bytes are always in the vocabulary, so every text can be encoded and decoded without loss. Special tokens
/// come first, then bytes, then merges in the order they were learnt; among them the well-known names (see
/// [`Tokenizer::document_start`]) become `bos_token` and `eos_token`. The same texts give the same files, in any
/// number of threads. Text that has too little variety may give fewer than `vocab_size` ids.
///
/// # Errors
/// An error from `texts`, no text at all, more than 2 GiB of it, a vocabulary too small for the bytes and the special
/// tokens, a special token given twice or empty, or a folder that cannot be written.
pub fn train_byte_level_bpe(
    texts: impl Iterator<Item = Result<String>> + Send,
    vocab_size: usize,
    special_tokens: &[&str],
    out_dir: &Path,
) -> Result<Tokenizer> {
    let alphabet = ByteLevel::alphabet();
    let least = alphabet.len() + special_tokens.len();
    if vocab_size < least {
        return Err(Error::usage(
            format!(
                "a vocabulary of {vocab_size} has no room for 256 bytes and {} special tokens",
                special_tokens.len()
            ),
            format!("ask for at least {least}"),
        ));
    }
    for (number, token) in special_tokens.iter().enumerate() {
        if token.is_empty() || special_tokens[..number].contains(token) {
            return Err(Error::usage(
                format!("special token `{token}` is empty or given twice"),
                "name each token once",
            ));
        }
    }
    let specials: Vec<AddedToken> = special_tokens.iter().map(|&token| AddedToken::from(token, true)).collect();
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(specials)
        .initial_alphabet(alphabet.into_iter().collect())
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    > = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(byte_level.into()))
        .with_post_processor(None)
        .with_decoder(Some(byte_level.into()))
        .build()
        .map_err(|source| Error::file(out_dir, one_line(&source), "this is a defect, please report it"))?;

    let mut byte_count = 0u64;
    let mut stopped_by = None;
    let sequences = texts.map_while(|text| {
        let text = match text {
            Ok(text) if byte_count + text.len() as u64 > LARGEST_TRAINING_TEXT => {
                Err(Error::usage("a tokenizer is trained on at most 2 GiB of text", "give it a sample of the files"))
            }
            other => other,
        };
        match text {
            Ok(text) => {
                byte_count += text.len() as u64;
                Some(text)
            }
            Err(error) => {
                stopped_by = Some(error);
                None
            }
        }
    });
    let trained = tokenizer.train(&mut trainer, sequences).map(|_| ());
    if let Some(error) = stopped_by {
        return Err(error);
    }
    trained.map_err(|source| Error::file(out_dir, one_line(&source), "check the training text"))?;
    if byte_count == 0 {
        return Err(Error::usage("there is no text to train a tokenizer on", "name files with some text in them"));
    }

    let whole = tokenizer
        .to_string(true)
        .map_err(|source| Error::file(out_dir, one_line(&source), "this is a defect, please report it"))?;
    let mut named = serde_json::Map::new();
    for (key, known) in [("bos_token", &KNOWN_STARTS[..]), ("eos_token", &KNOWN_ENDS[..])] {
        if let Some(&token) = known.iter().find(|name| special_tokens.contains(name)) {
            named.insert(key.into(), token.into());
        }
    }
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
    });
    settings.as_object_mut().expect("written as an object").extend(named.clone());
    fs::create_dir_all(out_dir).map_err(Error::io(out_dir))?;
    durable::write_bytes(&out_dir.join("tokenizer_config.json"), format!("{settings:#}\n").as_bytes())?;
    durable::write_bytes(&out_dir.join("special_tokens_map.json"), format!("{:#}\n", Value::Object(named)).as_bytes())?;
    // Last, so that a folder with a tokenizer.json is a finished one.
    durable::write_bytes(&out_dir.join("tokenizer.json"), format!("{whole}\n").as_bytes())?;
    Tokenizer::open(out_dir)
}

fn one_line(source: &tokenizers::Error) -> String {
    source.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
