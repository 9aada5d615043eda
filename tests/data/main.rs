//! What tokenizer and data promise.

mod bad_input;
mod loading;
mod packing;
mod splitting;
mod tokenizing;

use limbeck::data::{DataConfig, DataLoader, DataSource};
use limbeck::targets::{PADDING, PackedSequence};
use limbeck::tokenizer::Tokenizer;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The quick start's tokenizer.
fn tokenizer() -> Tokenizer {
    Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/tokenizer")).unwrap()
}

/// Documents of differing lengths, each of which says who it is.
fn documents(name: &str, count: usize) -> Vec<String> {
    let words = ["alembic", "retort", "still", "vapour", "condenser", "spirit", "heat", "drop"];
    (0..count)
        .map(|number| {
            let body: Vec<&str> = (0..number * 7 % 23 + 1).map(|word| words[(word * 3 + number) % 8]).collect();
            format!("{name} {number}: {}", body.join(" "))
        })
        .collect()
}

fn write_jsonl(path: &Path, documents: &[String]) {
    let lines: Vec<String> = documents.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

/// A parquet file of the given row groups, with a column of numbers beside the text; `None` is a null.
fn write_parquet(path: &Path, column: &str, groups: &[Vec<Option<String>>]) {
    let schema = format!("message m {{ required int64 number; optional binary {column} (UTF8); }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for rows in groups {
        let mut group = writer.next_row_group().unwrap();
        let mut numbers = group.next_column().unwrap().unwrap();
        let values: Vec<i64> = (0..rows.len() as i64).collect();
        numbers.typed::<parquet::data_type::Int64Type>().write_batch(&values, None, None).unwrap();
        numbers.close().unwrap();
        let mut texts = group.next_column().unwrap().unwrap();
        let levels: Vec<i16> = rows.iter().map(|row| row.is_some() as i16).collect();
        let values: Vec<ByteArray> = rows.iter().flatten().map(|row| ByteArray::from(row.as_str())).collect();
        texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        texts.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn source(path: PathBuf) -> DataSource {
    DataSource::new(path.to_str().unwrap())
}

fn config(sources: Vec<DataSource>) -> DataConfig {
    DataConfig { seed: 17, ..DataConfig::new(sources, 32) }
}

fn all_sequences(loader: &mut DataLoader) -> Vec<PackedSequence> {
    std::iter::from_fn(|| loader.next_sequence().unwrap()).collect()
}

/// Texts of the documents in the sequences, in their order, put together again across sequences.
fn texts_of(sequences: &[PackedSequence], tokenizer: &Tokenizer) -> Vec<String> {
    let start = tokenizer.document_start().unwrap();
    let mut documents: Vec<Vec<u32>> = vec![];
    for sequence in sequences {
        for (place, (&token, &segment)) in sequence.tokens.iter().zip(&sequence.segments).enumerate() {
            if segment == PADDING {
                break;
            }
            if token == start {
                documents.push(vec![]);
            } else if place > 0 {
                documents.last_mut().unwrap().push(token);
            }
        }
    }
    // A document whose first token alone was left at the end of a sequence starts again in the next one.
    documents.retain(|document| !document.is_empty());
    documents.iter().map(|document| tokenizer.decode(document).unwrap()).collect()
}

fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}
