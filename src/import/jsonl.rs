//! JSON Lines with the most probable tokens of each place, as vLLM returns them and as axolotl's data sets hold them.
//! The fields are described in `docs/import.md`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::places::{Entry, Place, entry, server_places, without_infinities};
use super::{Document, Origin, Row};
use crate::error::{Error, Result};

/// Which token a row is about, in records that have as many rows as tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowPlace {
    /// Row `i` is about token `i`; nothing is known of the first.
    Token,
    /// Row `i` is about token `i + 1`; the last is about a token that is not there.
    Next,
}

const TOKEN_FIELDS: [&str; 4] = ["prompt_token_ids", "input_ids", "token_ids", "tokens"];
const ROW_FIELDS: [&str; 2] = ["prompt_logprobs", "logprobs"];

/// The files, which have to be there.
pub(super) fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if let Some(path) = paths.iter().find(|path| !path.is_file()) {
        return Err(Error::file(path, "there is no such file", "name JSON Lines files, one record a line"));
    }
    Ok(paths.to_vec())
}

/// The documents in all files, in their order.
pub(super) fn documents(files: Vec<PathBuf>, place: Option<RowPlace>) -> impl Iterator<Item = Result<Document>> {
    files.into_iter().enumerate().flat_map(move |(file, path)| match File::open(&path) {
        Err(error) => Box::new(std::iter::once(Err(Error::io(&path)(error)))) as Box<dyn Iterator<Item = _>>,
        Ok(opened) => {
            Box::new(BufReader::with_capacity(1 << 20, opened).lines().enumerate().flat_map(move |(number, line)| {
                of_line(&path, Origin { file, record: number as u64 + 1 }, line, place)
            }))
        }
    })
}

fn of_line(
    path: &Path,
    origin: Origin,
    line: std::io::Result<String>,
    place: Option<RowPlace>,
) -> Vec<Result<Document>> {
    let damaged = |problem: String| {
        let tip = "see docs/import.md for what a record has; correct it or leave it out".into();
        vec![Err(Error::Data { path: path.to_path_buf(), record: origin.record, problem, tip })]
    };
    let line = match line {
        Ok(line) => line,
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => return damaged("it is not UTF-8".into()),
        Err(error) => return vec![Err(Error::io(path)(error))],
    };
    if line.trim().is_empty() {
        return vec![];
    }
    match of_record(&line, origin, place) {
        Ok(documents) => documents.into_iter().map(Ok).collect(),
        Err(problem) => damaged(problem),
    }
}

fn of_record(line: &str, origin: Origin, place: Option<RowPlace>) -> Result<Vec<Document>, String> {
    let record: Value = serde_json::from_str(&without_infinities(line)).map_err(|source| {
        let message = source.to_string();
        format!(
            "the line is not JSON: {} at column {}",
            message.split(" at line ").next().unwrap_or(""),
            source.column()
        )
    })?;
    if !record.is_object() {
        return Err("the line is not a JSON object".into());
    }
    // The answer of a server holds one document for each prompt.
    let Some(Value::Array(choices)) = record.get("choices") else {
        return Ok(vec![document(&record, &record, origin, place)?]);
    };
    let documents = choices.iter().enumerate().map(|(number, choice)| {
        document(choice, &record, origin, place).map_err(|problem| format!("choice {number}: {problem}"))
    });
    documents.collect()
}

fn document(record: &Value, outer: &Value, origin: Origin, place: Option<RowPlace>) -> Result<Document, String> {
    let tokens = TOKEN_FIELDS
        .iter()
        .find_map(|name| Some((*name, present(record, name).or_else(|| present(outer, name))?)))
        .ok_or_else(|| format!("there are no token ids: none of {} is there", named(&TOKEN_FIELDS)))?;
    let tokens = numbers(tokens.1, tokens.0)?;
    let (places, of_server) = match ROW_FIELDS.iter().find_map(|name| Some((*name, present(record, name)?))) {
        _ if present(record, "target_token_ids").is_some() => (targets(record)?, false),
        Some((name, places)) => (server_places(places, name)?, name == "prompt_logprobs"),
        None => {
            return Err(format!(
                "there are no log-probabilities: neither {} nor `target_token_ids` is there",
                named(&ROW_FIELDS)
            ));
        }
    };
    // Servers always have the first token's place, and nothing in it.
    let place = if of_server { place.or(Some(RowPlace::Token)) } else { place };
    let places = aligned(tokens.len(), places, place)?;
    let rows = places.into_iter().enumerate().map(|(index, place)| {
        let Some(entries) = place else { return Ok(None) };
        let label = tokens[index + 1];
        // A server gives the token itself even where it is not among the most probable.
        let ranked = entries.iter().all(|entry| entry.rank.is_some());
        if of_server && ranked && !entries.is_empty() && !entries.iter().any(|entry| entry.id == label) {
            return Err(format!(
                "the row about token {} (from 0) lacks that token, {label}: the rows are not about their own tokens",
                index + 1
            ));
        }
        Ok(Some(row(entries, label)))
    });
    let rows = rows.collect::<Result<Vec<_>, String>>()?;
    Ok(Document { rows, tokens, origin })
}

/// The entries that are the most probable ids without a gap. The label that comes beside them only says its own probability.
fn row(entries: Vec<Entry>, label: u32) -> Row {
    let count = entries.len() as u64;
    let mut row = Row::default();
    for entry in entries {
        if entry.rank.is_none_or(|rank| rank <= count) {
            row.ids.push(entry.id);
            row.log_probs.push(entry.log_prob);
        } else if entry.id == label {
            row.label_log_prob = Some(entry.log_prob);
        }
    }
    row
}

/// One place for each token but the first.
fn aligned(tokens: usize, mut places: Vec<Place>, place: Option<RowPlace>) -> Result<Vec<Place>, String> {
    let count = places.len();
    if count + 1 == tokens {
        return Ok(places);
    }
    if count != tokens {
        return Err(format!(
            "it has {tokens} tokens and {count} rows, not a row for each token or for each but the first"
        ));
    }
    if tokens == 0 {
        return Ok(places);
    }
    let known = |place: &Place| place.as_ref().is_some_and(|entries| !entries.is_empty());
    let place = match (place, known(&places[0]), known(&places[count - 1])) {
        (Some(RowPlace::Token), true, _) => {
            return Err(
                "its first row is not empty, but nothing is predicted of the first token: these rows are of the next \
                        token (--rows next)"
                    .into(),
            );
        }
        (Some(place), ..) => place,
        (None, false, true) => RowPlace::Token,
        (None, true, false) => RowPlace::Next,
        (None, ..) => {
            return Err("it has a row for each token, and does not show which token a row is about: say --rows token \
                        (row i is about token i) or --rows next (about token i + 1)"
                .into());
        }
    };
    match place {
        RowPlace::Token => drop(places.remove(0)),
        RowPlace::Next => drop(places.pop()),
    }
    Ok(places)
}

/// `target_token_ids` and `target_logprobs`, `[rows][k]`, and `target_mask`, `[rows]` or `[rows][k]`.
fn targets(record: &Value) -> Result<Vec<Place>, String> {
    let list = |name: &str| {
        let value = present(record, name).ok_or_else(|| format!("`target_token_ids` is there, but not `{name}`"))?;
        value.as_array().ok_or_else(|| format!("`{name}` is not a list"))
    };
    let (ids, log_probs) = (list("target_token_ids")?, list("target_logprobs")?);
    let mask = present(record, "target_mask").map(|_| list("target_mask")).transpose()?;
    for (name, length) in [("target_logprobs", log_probs.len()), ("target_mask", mask.map_or(ids.len(), Vec::len))] {
        if length != ids.len() {
            return Err(format!("`target_token_ids` has {} rows, `{name}` {length}", ids.len()));
        }
    }
    let place = |row: usize| -> Result<Place, String> {
        let (Some(ids), Some(log_probs)) = (ids[row].as_array(), log_probs[row].as_array()) else {
            return if ids[row].is_null() || log_probs[row].is_null() {
                Ok(None)
            } else {
                Err(format!("row {row} of `target_token_ids` or `target_logprobs` is not a list"))
            };
        };
        if ids.len() != log_probs.len() {
            return Err(format!("row {row} has {} ids and {} log-probabilities", ids.len(), log_probs.len()));
        }
        let masked = |column: usize| {
            let entry = mask.map(|mask| mask[row].get(column).unwrap_or(&mask[row]));
            entry.is_some_and(|entry| entry.as_f64() == Some(0.0) || entry.as_bool() == Some(false))
        };
        let mut entries = vec![];
        for (column, (id, log_prob)) in ids.iter().zip(log_probs).enumerate().filter(|(column, _)| !masked(*column)) {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id =
                id.ok_or_else(|| format!("row {row} of `target_token_ids` has {} in column {column}", ids[column]))?;
            entries.extend(entry(id, log_prob, None).map_err(|problem| format!("row {row} {problem}"))?);
        }
        Ok((!entries.is_empty()).then_some(entries))
    };
    (0..ids.len()).map(place).collect()
}

fn present<'a>(record: &'a Value, name: &str) -> Option<&'a Value> {
    record.get(name).filter(|value| !value.is_null())
}

fn numbers(value: &Value, field: &str) -> Result<Vec<u32>, String> {
    let list = value.as_array().ok_or_else(|| format!("`{field}` is not a list"))?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    list.iter().map(|value| id(value).ok_or_else(|| format!("`{field}` holds {value}, which is no token id"))).collect()
}

fn named(fields: &[&str]) -> String {
    fields.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
