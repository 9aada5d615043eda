//! Remakes the text splits and the tokenizer of the quick start.
//!
//! `cargo run --example prepare_quickstart -- FOLDER_OF_TEXTS` reads the works listed below from FOLDER_OF_TEXTS (plain
//! text, paragraphs separated by blank lines) and writes `recipes/quickstart/text/` and `recipes/quickstart/tokenizer/`.
//! The same texts give the same bytes.
//!
//! Paragraphs are deduplicated across all works and cut into blocks of about 24 KB; whole blocks are dealt to the splits
//! at random, so that no paragraph of one split is in another. The teacher gets by far the largest share: that the
//! student never reads it is what distillation has to offer in the quick start.

use limbeck::error::{Error, Result};
use limbeck::tokenizer::{Tokenizer, train_byte_level_bpe};
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// The works, by the names of their files without `.txt`. See `recipes/quickstart/ATTRIBUTION.md` for their licences.
const WORKS: [&str; 8] = [
    "python_docs",
    "rust_book",
    "rust_cargo",
    "rust_edition-guide",
    "rust_nomicon",
    "rust_reference",
    "rust_rustc",
    "rust_rustdoc",
];
const BLOCK_BYTES: usize = 24_000;
const SEED: u64 = 17;
const VOCAB_SIZE: usize = 2048;
/// Bytes of text dealt to each split, in order; the teacher gets the rest.
const SHARES: [(&str, usize); 3] = [("held_out", 505_000), ("validation", 250_000), ("student", 600_000)];

struct Block {
    work: &'static str,
    text: String,
}

fn main() -> Result<()> {
    let Some(folder) = std::env::args().nth(1) else {
        return Err(Error::usage("no folder of texts is named", "give it as the only argument"));
    };
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart");
    let mut blocks = blocks(Path::new(&folder))?;
    shuffle(&mut blocks);

    let text_folder = out.join("text");
    fs::create_dir_all(&text_folder).map_err(Error::io(&text_folder))?;
    let mut splits: Vec<(&str, Vec<Block>)> = vec![];
    let mut rest = blocks.into_iter();
    for (name, bytes) in SHARES {
        let mut dealt = vec![];
        while dealt.iter().map(|block: &Block| block.text.len()).sum::<usize>() < bytes {
            dealt.push(rest.next().ok_or_else(|| Error::usage("the texts are too short", "name the whole folder"))?);
        }
        write_jsonl(&text_folder.join(format!("{name}.jsonl")), &dealt)?;
        splits.push((name, dealt));
    }
    splits.push(("teacher", rest.collect()));
    write_parquet(&text_folder.join("teacher.parquet"), &splits[3].1)?;

    // Only text that is trained on: a tokenizer fitted to held-out text would flatter every number measured on it.
    let read: Vec<Result<String>> =
        splits[2..].iter().flat_map(|(_, blocks)| blocks).map(|block| Ok(block.text.clone())).collect();
    let special_tokens = ["<|begin_of_text|>", "<|end_of_text|>"];
    let tokenizer = train_byte_level_bpe(read.into_iter(), VOCAB_SIZE, &special_tokens, &out.join("tokenizer"))?;
    for (name, blocks) in &splits {
        let (bytes, tokens) = count(&tokenizer, blocks)?;
        let ratio = bytes as f64 / tokens as f64;
        println!("{name}: {} blocks, {bytes} bytes, {tokens} tokens, {ratio:.3} bytes per token", blocks.len());
    }
    Ok(())
}

fn blocks(folder: &Path) -> Result<Vec<Block>> {
    let mut seen = HashSet::new();
    let mut blocks = vec![];
    for work in WORKS {
        let path = folder.join(format!("{work}.txt"));
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let mut block = String::new();
        for paragraph in text.split("\n\n").map(str::trim).filter(|paragraph| !paragraph.is_empty()) {
            let paragraph = without_marks(paragraph);
            if !seen.insert(*blake3::hash(paragraph.as_bytes()).as_bytes()) {
                continue;
            }
            if !block.is_empty() {
                block.push_str("\n\n");
            }
            block.push_str(&paragraph);
            if block.len() >= BLOCK_BYTES {
                blocks.push(Block { work, text: std::mem::take(&mut block) });
            }
        }
        if !block.is_empty() {
            blocks.push(Block { work, text: block });
        }
    }
    Ok(blocks)
}

/// Takes out the cross-reference marks of the Info format: `*note bytecode: 16f.` becomes `bytecode`.
fn without_marks(paragraph: &str) -> String {
    let mut out = String::with_capacity(paragraph.len());
    let mut rest = paragraph;
    while let Some(start) = rest.find("*note ") {
        let after = &rest[start + "*note ".len()..];
        let mark = after.split_once(": ").and_then(|(name, tail)| {
            let digits = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_hexdigit()).len();
            let tail = &tail[digits..];
            (digits > 0 && name.len() < 80).then_some((name, tail.strip_prefix('.').unwrap_or(tail)))
        });
        let (name, tail) = mark.unwrap_or(("", after));
        out.push_str(&rest[..start]);
        out.push_str(name);
        rest = tail;
    }
    out + rest
}

fn shuffle(blocks: &mut [Block]) {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    for last in (1..blocks.len()).rev() {
        let chosen = (random.next_u64() as u128 * (last as u128 + 1)) >> 64;
        blocks.swap(last, chosen as usize);
    }
}

fn write_jsonl(path: &Path, blocks: &[Block]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    for block in blocks {
        let line = serde_json::json!({"work": block.work, "text": block.text});
        writeln!(file, "{line}").map_err(Error::io(path))?;
    }
    file.sync_all().map_err(Error::io(path))
}

fn write_parquet(path: &Path, blocks: &[Block]) -> Result<()> {
    let failed = |source| Error::file(path, format!("could not be written: {source}"), "check the disk");
    let schema = parse_message_type("message text { required binary work (UTF8); required binary text (UTF8); }")
        .map_err(failed)?;
    let level = ZstdLevel::try_new(19).map_err(failed)?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(level)).build();
    let file = File::create(path).map_err(Error::io(path))?;
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).map_err(failed)?;
    let mut group = writer.next_row_group().map_err(failed)?;
    let columns: [Vec<ByteArray>; 2] = [
        blocks.iter().map(|block| ByteArray::from(block.work)).collect(),
        blocks.iter().map(|block| ByteArray::from(block.text.as_str())).collect(),
    ];
    for values in columns {
        let mut column = group.next_column().map_err(failed)?.expect("the schema has two columns");
        column.typed::<ByteArrayType>().write_batch(&values, None, None).map_err(failed)?;
        column.close().map_err(failed)?;
    }
    group.close().map_err(failed)?;
    writer.close().map_err(failed)?;
    Ok(())
}

fn count(tokenizer: &Tokenizer, blocks: &[Block]) -> Result<(usize, usize)> {
    let mut totals = (0, 0);
    for block in blocks {
        totals.0 += block.text.len();
        totals.1 += tokenizer.encode_document(&block.text)?.len();
    }
    Ok(totals)
}
