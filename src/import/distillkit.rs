//! The Parquet files that DistillKit captures a teacher into: `input_ids`, and for each prediction a compressed row.
//!
//! Its rows begin with the second token: row `i` is what the teacher says after tokens `0..=i`, so it is about token
//! `i + 1`. Files as captured have one row fewer than tokens; packing cuts the tokens to the number of rows, and then the
//! last row is about a token that is not there. Packed records number their documents in `attention_mask`.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use rayon::prelude::*;

use super::columns::{self, ListColumn, Lists, unreadable};
use super::compression::CompressionConfig;
use super::quantized::RowDecoder;
use super::{Document, Origin, Row};
use crate::error::{Error, Result};

const CONFIG_FILE: &str = "compression_config.yaml";
const TOKENS: &str = "input_ids";
const VALUES: &str = "compressed_logprobs";
const IDS: &str = "bytepacked_indices";
const DOCUMENTS: &str = "attention_mask";

/// The files to read: those given, and of a directory its Parquet files in the order of their numbers.
pub(super) fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for path in paths {
        if !path.is_dir() {
            if !path.is_file() {
                return Err(Error::file(path, "there is no such file or directory", "check the path"));
            }
            files.push(path.clone());
            continue;
        }
        let mut found = vec![];
        for entry in fs::read_dir(path).map_err(Error::io(path))? {
            let file = entry.map_err(Error::io(path))?.path();
            if file.extension().is_some_and(|ending| ending == "parquet") {
                found.push(file);
            }
        }
        if found.is_empty() {
            return Err(Error::file(
                path,
                "there are no .parquet files here",
                "name the directory that DistillKit wrote",
            ));
        }
        found.sort_by_cached_key(|file| in_order(&file.to_string_lossy()));
        files.extend(found);
    }
    Ok(files)
}

/// A name with its numbers filled up with zeros, so that `data_10` comes after `data_9`.
fn in_order(name: &str) -> String {
    let (mut key, mut digits) = (String::new(), String::new());
    for character in name.chars().chain(['\0']) {
        if character.is_ascii_digit() {
            digits.push(character);
            continue;
        }
        if !digits.is_empty() {
            key.extend([format!("{digits:0>20}")]);
            digits.clear();
        }
        key.push(character);
    }
    key
}

/// The configuration given, or the one beside the files.
pub(super) fn config(given: Option<&Path>, files: &[PathBuf]) -> Result<CompressionConfig> {
    if let Some(path) = given {
        return CompressionConfig::read(path);
    }
    let path = files[0].parent().unwrap_or(Path::new("")).join(CONFIG_FILE);
    if !path.is_file() {
        let problem = "the files do not say how they are compressed, and this file is missing";
        return Err(Error::file(&path, problem, "name DistillKit's compression configuration with --config"));
    }
    CompressionConfig::read(&path)
}

/// The documents in all files, in their order.
pub(super) fn documents(files: Vec<PathBuf>, config: CompressionConfig) -> impl Iterator<Item = Result<Document>> {
    Documents { files, decoder: RowDecoder::new(config), file: 0, open: None, ready: VecDeque::new() }
}

struct Documents {
    files: Vec<PathBuf>,
    decoder: RowDecoder,
    file: usize,
    open: Option<OpenFile>,
    /// Of the record read last.
    ready: VecDeque<Document>,
}

struct OpenFile {
    reader: SerializedFileReader<File>,
    group: usize,
    columns: Option<Columns>,
    /// Records read.
    record: u64,
}

struct Columns {
    tokens: ListColumn,
    values: ListColumn,
    ids: ListColumn,
    documents: Option<ListColumn>,
}

impl Columns {
    fn open(reader: &SerializedFileReader<File>, path: &Path, group: usize) -> Result<Columns> {
        let column = |name, depth| {
            ListColumn::open(reader, path, group, name, depth)?.ok_or_else(|| {
                let names = columns::names(reader);
                let old = names.iter().any(|name| name == "packed_indices");
                let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
                let problem = format!("there is no column `{name}`, only {}", names.join(", "));
                let tip = if old {
                    "capture again with a present DistillKit: its old format holds logits without their normaliser"
                } else {
                    "give files that DistillKit wrote"
                };
                Error::file(path, problem, tip)
            })
        };
        Ok(Columns {
            tokens: column(TOKENS, 1)?,
            values: column(VALUES, 2)?,
            ids: column(IDS, 2)?,
            documents: ListColumn::open(reader, path, group, DOCUMENTS, 1)?,
        })
    }
}

/// One record as it is stored.
struct Record {
    tokens: Vec<i64>,
    values: Lists,
    ids: Lists,
    documents: Option<Vec<i64>>,
}

impl Documents {
    /// The next record, with its number from 1; `None` after the last of all files.
    fn record(&mut self) -> Result<Option<(Origin, Record)>> {
        loop {
            let Some(path) = self.files.get(self.file) else { return Ok(None) };
            let open = match &mut self.open {
                Some(open) => open,
                None => {
                    let reader = columns::open(path)?;
                    self.open.insert(OpenFile { reader, group: 0, columns: None, record: 0 })
                }
            };
            if open.group == open.reader.num_row_groups() {
                (self.open, self.file) = (None, self.file + 1);
                continue;
            }
            let columns = match &mut open.columns {
                Some(columns) => columns,
                None => open.columns.insert(Columns::open(&open.reader, path, open.group)?),
            };
            let origin = Origin { file: self.file, record: open.record + 1 };
            let one = |column: &mut ListColumn| match column.read(path, 1)? {
                Ok(mut records) => Ok(records.pop()),
                Err((_, problem)) => Err(damaged(path, origin, problem)),
            };
            let flat = |lists: Option<Lists>| lists.map(|lists| lists.into_iter().next().unwrap_or_default());
            let tokens = flat(one(&mut columns.tokens)?);
            let (values, ids) = (one(&mut columns.values)?, one(&mut columns.ids)?);
            let documents = match &mut columns.documents {
                Some(column) => flat(one(column)?),
                None => None,
            };
            match (tokens, values, ids) {
                (Some(tokens), Some(values), Some(ids)) => {
                    open.record += 1;
                    return Ok(Some((origin, Record { tokens, values, ids, documents })));
                }
                (None, None, None) => (open.columns, open.group) = (None, open.group + 1),
                _ => {
                    let error = columns_end(open.group);
                    return Err(unreadable(path)(error));
                }
            }
        }
    }

    fn decode(&self, origin: Origin, record: Record) -> Result<Vec<Document>, String> {
        let (tokens, rows) = (record.tokens.len(), record.values.len());
        if record.ids.len() != rows {
            return Err(format!("it has {rows} rows of values and {} rows of ids", record.ids.len()));
        }
        if rows != tokens && rows + 1 != tokens {
            return Err(format!(
                "it has {tokens} tokens and {rows} rows, not a row for each token or for each but one"
            ));
        }
        let (value_bytes, id_bytes) = self.decoder.row_bytes();
        for (name, lists, expected) in [(VALUES, &record.values, value_bytes), (IDS, &record.ids, id_bytes)] {
            if let Some((row, list)) = lists.iter().enumerate().find(|(_, list)| list.len() != expected) {
                let found = list.len();
                return Err(format!(
                    "row {row} of `{name}` has {found} bytes, and the compression configuration makes {expected}"
                ));
            }
        }
        let tokens: Vec<u32> = record
            .tokens
            .iter()
            .map(|&token| u32::try_from(token).map_err(|_| format!("the token {token} is no token id")))
            .collect::<Result<_, String>>()?;
        // The row after the last token is about a token that is not here.
        let wanted = tokens.len().saturating_sub(1);
        let decoder = &self.decoder;
        let rows: Vec<Option<Row>> = record.values[..wanted]
            .par_iter()
            .zip(&record.ids[..wanted])
            .map(|(values, ids)| {
                let bytes = |list: &[i64]| list.iter().map(|byte| *byte as u8).collect::<Vec<u8>>();
                let (ids, log_probs) = (decoder.ids(&bytes(ids)), decoder.log_probs(&bytes(values)));
                Some(Row { ids, log_probs, label_log_prob: None })
            })
            .collect();
        let Some(numbers) = record.documents else { return Ok(vec![Document { tokens, rows, origin }]) };
        if numbers.len() != tokens.len() {
            return Err(format!("it has {} tokens and {} entries of `{DOCUMENTS}`", tokens.len(), numbers.len()));
        }
        let mut documents = vec![];
        let mut start = 0;
        for run in numbers.chunk_by(|left, right| left == right) {
            let end = start + run.len();
            // 0 is padding.
            if run[0] != 0 {
                let (tokens, rows) = (tokens[start..end].to_vec(), rows[start..end - 1].to_vec());
                documents.push(Document { tokens, rows, origin });
            }
            start = end;
        }
        Ok(documents)
    }
}

fn damaged(path: &Path, origin: Origin, problem: String) -> Error {
    let tip = "leave the record out, or capture it again".into();
    Error::Data { path: path.to_path_buf(), record: origin.record, problem, tip }
}

fn columns_end(group: usize) -> parquet::errors::ParquetError {
    parquet::errors::ParquetError::General(format!("the columns of row group {group} are not equally long"))
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(document) = self.ready.pop_front() {
                return Some(Ok(document));
            }
            match self.record() {
                Err(error) => return Some(Err(error)),
                Ok(None) => return None,
                Ok(Some((origin, record))) => match self.decode(origin, record) {
                    Ok(documents) => self.ready = documents.into(),
                    Err(problem) => return Some(Err(damaged(&self.files[origin.file], origin, problem))),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_in_the_order_of_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["data_10.parquet", "data_9.parquet", "data_0.parquet", "compression_config.yaml"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let names: Vec<String> = files(&[folder.path().to_path_buf()])
            .unwrap()
            .iter()
            .map(|file| file.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["data_0.parquet", "data_9.parquet", "data_10.parquet"]);
    }
}
