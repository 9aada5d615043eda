//! The three kinds of file, read chunk by chunk. What is wrong with a record is said with its file and number.
//!
//! Records are counted from 1: lines of JSONL, rows of parquet, documents of a text file.

use super::source::{Chunk, Kind, OpenSource};
use crate::error::{Error, Result};
use parquet::basic::{ConvertedType, LogicalType, Type as PhysicalType};
use parquet::column::reader::get_typed_column_reader;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

const READ_BUFFER: usize = 1 << 20;

/// Documents of one chunk, in file order, without empty ones.
pub(super) fn documents(source: &OpenSource, chunk: Chunk) -> Result<Vec<String>> {
    let path = &source.files[chunk.file];
    match source.kind {
        Kind::Text => text(path, source.declared.document_separator.as_deref()),
        Kind::Jsonl => jsonl(path, source.field(), chunk),
        Kind::Parquet => parquet(path, source.field(), chunk),
    }
}

fn at_record(path: &Path, record: u64, problem: impl Into<String>, tip: impl Into<String>) -> Error {
    Error::Data { path: path.to_path_buf(), record, problem: problem.into(), tip: tip.into() }
}

fn not_utf8(path: &Path, record: u64, byte: u64) -> Error {
    let problem = format!("not UTF-8 at byte {byte} of the file");
    at_record(path, record, problem, "convert the file to UTF-8, for example with iconv")
}

fn text(path: &Path, separator: Option<&str>) -> Result<Vec<String>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(source) => {
            let byte = source.utf8_error().valid_up_to();
            let before = std::str::from_utf8(&source.as_bytes()[..byte]).expect("valid up to here");
            let record = 1 + separator.map_or(0, |separator| before.lines().filter(|line| *line == separator).count());
            return Err(not_utf8(path, record as u64, byte as u64));
        }
    };
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(&text);
    if text.trim().is_empty() {
        return Err(at_record(path, 1, "the file has no text", "give it some text, or take it out of the source"));
    }
    let Some(separator) = separator else { return Ok(vec![text.to_string()]) };
    let mut documents = vec![String::new()];
    for line in text.split_inclusive('\n') {
        if line.trim_end_matches(['\n', '\r']) == separator {
            documents.push(String::new());
        } else {
            documents.last_mut().expect("starts with one").push_str(line);
        }
    }
    documents.retain(|document| !document.trim().is_empty());
    Ok(documents)
}

/// The lines that *start* within the chunk, so that each line is in exactly one chunk.
fn jsonl(path: &Path, field: &str, chunk: Chunk) -> Result<Vec<String>> {
    let mut reader = BufReader::with_capacity(READ_BUFFER, File::open(path).map_err(Error::io(path))?);
    let mut at = chunk.start;
    let mut line = vec![];
    if at > 0 {
        // From one byte before, since a line starts here exactly if that byte ends one.
        reader.seek(SeekFrom::Start(at - 1)).map_err(Error::io(path))?;
        at += reader.read_until(b'\n', &mut line).map_err(Error::io(path))? as u64 - 1;
    }
    let mut documents = vec![];
    while at < chunk.end {
        line.clear();
        let length = reader.read_until(b'\n', &mut line).map_err(Error::io(path))?;
        if length == 0 {
            break;
        }
        // Counting lines is left to the one time that somebody wants to know.
        let number = || line_number(path, at);
        let content = match std::str::from_utf8(&line) {
            Ok(content) => content,
            Err(source) => return Err(not_utf8(path, number()?, at + source.valid_up_to() as u64)),
        };
        let content = if at == 0 { content.strip_prefix('\u{FEFF}').unwrap_or(content) } else { content };
        if !content.trim().is_empty() {
            match json_text(content, field) {
                Ok(text) if text.is_empty() => {}
                Ok(text) => documents.push(text),
                Err((problem, tip)) => return Err(at_record(path, number()?, problem, tip)),
            }
        }
        at += length as u64;
    }
    Ok(documents)
}

fn json_text(line: &str, field: &str) -> Result<String, (String, String)> {
    let value = serde_json::from_str::<Value>(line).map_err(|source| {
        let message = source.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        let tip = "write one JSON object a line".to_string();
        (format!("the line is not JSON: {message} at column {}", source.column()), tip)
    })?;
    let kind = kind_name(&value);
    let Value::Object(mut object) = value else {
        return Err((format!("the line is {kind}, not an object"), format!("write it like {{\"{field}\": \"..\"}}")));
    };
    match object.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => {
            let tip = "name the field that holds the text in `field`, or correct the record".to_string();
            Err((format!("the field `{field}` is {}, not a string", kind_name(&other)), tip))
        }
        None => {
            let names: Vec<String> = object.keys().take(8).map(|key| format!("`{key}`")).collect();
            let has = if names.is_empty() { "no field at all".into() } else { names.join(", ") };
            let tip = "name the field that holds the text in `field`".to_string();
            Err((format!("there is no field `{field}`, only {has}"), tip))
        }
    }
}

fn kind_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn line_number(path: &Path, end: u64) -> Result<u64> {
    let mut reader = BufReader::with_capacity(READ_BUFFER, File::open(path).map_err(Error::io(path))?);
    let (mut at, mut number) = (0, 1);
    while at < end {
        let buffer = reader.fill_buf().map_err(Error::io(path))?;
        if buffer.is_empty() {
            break;
        }
        let length = buffer.len().min((end - at) as usize);
        number += buffer[..length].iter().filter(|&&byte| byte == b'\n').count() as u64;
        reader.consume(length);
        at += length as u64;
    }
    Ok(number)
}

fn unreadable(path: &Path) -> impl Fn(ParquetError) -> Error {
    move |source| {
        let message = source.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Error::file(path, format!("not readable as parquet: {message}"), "write the file again from its source")
    }
}

fn open_parquet(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(Error::io(path))?;
    SerializedFileReader::new(file).map_err(unreadable(path))
}

/// Number of the text column among the file's leaf columns.
fn column_number(reader: &SerializedFileReader<File>, path: &Path, field: &str) -> Result<usize> {
    let schema = reader.metadata().file_metadata().schema_descr();
    let top = schema.root_schema().get_fields();
    let Some(column) = top.iter().find(|column| column.name() == field) else {
        let names: Vec<String> = top.iter().take(8).map(|column| format!("`{}`", column.name())).collect();
        let problem = format!("there is no column `{field}`, only {}", names.join(", "));
        return Err(Error::file(path, problem, "name the column that holds the text in `field`"));
    };
    let number = schema.columns().iter().position(|leaf| leaf.path().parts() == [field]);
    let is_text = number.is_some_and(|number| {
        let leaf = schema.column(number);
        // Some writers leave strings without an annotation; other annotations (decimal, JSON, ..) are not text.
        let plain = leaf.converted_type() == ConvertedType::NONE && leaf.logical_type_ref().is_none();
        let string =
            leaf.converted_type() == ConvertedType::UTF8 || leaf.logical_type_ref() == Some(&LogicalType::String);
        leaf.physical_type() == PhysicalType::BYTE_ARRAY && leaf.max_rep_level() == 0 && (plain || string)
    });
    match number {
        Some(number) if is_text => Ok(number),
        _ => {
            let kind = if column.is_primitive() { column.get_physical_type().to_string() } else { "nested".into() };
            let problem = format!("the column `{field}` is {kind}, not a string");
            Err(Error::file(path, problem, "name the column that holds the text in `field`"))
        }
    }
}

/// Rows of each row group, and bytes of its text before compression.
pub(super) fn row_groups(source: &OpenSource, file: usize) -> Result<Vec<(u64, u64)>> {
    let path = &source.files[file];
    let reader = open_parquet(path)?;
    let column = column_number(&reader, path, source.field())?;
    let groups = reader.metadata().row_groups().iter();
    Ok(groups.map(|group| (group.num_rows() as u64, group.column(column).uncompressed_size().max(0) as u64)).collect())
}

fn parquet(path: &Path, field: &str, chunk: Chunk) -> Result<Vec<String>> {
    let reader = open_parquet(path)?;
    let column = column_number(&reader, path, field)?;
    let before: i64 = reader.metadata().row_groups()[..chunk.group].iter().map(|group| group.num_rows()).sum();
    let group = reader.get_row_group(chunk.group).map_err(unreadable(path))?;
    let is_optional = group.metadata().column(column).column_descr().max_def_level() > 0;
    let column_reader = group.get_column_reader(column).map_err(unreadable(path))?;
    let mut column_reader = get_typed_column_reader::<ByteArrayType>(column_reader);
    column_reader.skip_records(chunk.start as usize).map_err(unreadable(path))?;

    let (mut levels, mut values): (Vec<i16>, Vec<ByteArray>) = (vec![], vec![]);
    let mut row_count = 0;
    let wanted = chunk.size() as usize;
    while row_count < wanted {
        let (read, ..) = column_reader
            .read_records(wanted - row_count, is_optional.then_some(&mut levels), None, &mut values)
            .map_err(unreadable(path))?;
        if read == 0 {
            let problem = format!("row group {} ends after {row_count} rows", chunk.group);
            return Err(Error::file(path, problem, "write the file again from its source"));
        }
        row_count += read;
    }
    let first = before as u64 + chunk.start + 1;
    if let Some(row) = levels.iter().position(|&level| level == 0) {
        let problem = format!("the column `{field}` is null");
        return Err(at_record(path, first + row as u64, problem, "leave the row out, or give it some text"));
    }
    let mut documents = Vec::with_capacity(values.len());
    for (row, value) in values.iter().enumerate() {
        match std::str::from_utf8(value.data()) {
            Ok("") => {}
            Ok(text) => documents.push(text.to_string()),
            Err(source) => {
                let problem = format!("not UTF-8 at byte {} of the text", source.valid_up_to());
                return Err(at_record(path, first + row as u64, problem, "write the text as UTF-8"));
            }
        }
    }
    Ok(documents)
}
