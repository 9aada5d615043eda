//! A checkpoint's identity, independent of its sharding and of the layout of its configuration.

use rayon::prelude::*;
use serde_json::{Number, Value};

use super::reader::CheckpointReader;
use crate::error::Result;

/// Separates these hashes from all others; changes with what is hashed.
const DOMAIN: &[u8] = b"limbeck checkpoint fingerprint 1";

/// Integers up to here are exact in f64, so that `500000` and `500000.0` say the same.
const EXACT: f64 = 9_007_199_254_740_992.0;

pub(super) fn fingerprint(reader: &CheckpointReader) -> Result<String> {
    let names: Vec<&str> = reader.stored_names().collect();
    // Parallel over tensors, and inside each: a checkpoint has both many small and few huge ones.
    let contents = names
        .par_iter()
        .map(|name| {
            let mut hasher = blake3::Hasher::new();
            reader.each_piece(name, |bytes| {
                hasher.update_rayon(bytes);
            })?;
            Ok(*hasher.finalize().as_bytes())
        })
        .collect::<Result<Vec<[u8; 32]>>>()?;

    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        // With its length before it, no field can be taken for a part of its neighbour.
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(DOMAIN);
    add(canonical(reader.stored_config()).as_bytes());
    for (name, content) in names.iter().zip(&contents) {
        let info = reader.stored_info(name)?;
        add(name.as_bytes());
        add(info.dtype.name().as_bytes());
        let shape: Vec<u8> = info.shape.iter().flat_map(|&size| (size as u64).to_le_bytes()).collect();
        add(&shape);
        add(content);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// JSON in one form: keys sorted, no blanks, whole numbers without a fraction.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            let entries: Vec<String> = entries
                .into_iter()
                .map(|(key, value)| format!("{}:{}", Value::from(key.as_str()), canonical(value)))
                .collect();
            format!("{{{}}}", entries.join(","))
        }
        Value::Array(values) => {
            let values: Vec<String> = values.iter().map(canonical).collect();
            format!("[{}]", values.join(","))
        }
        Value::Number(number) => canonical_number(number),
        other => other.to_string(),
    }
}

fn canonical_number(number: &Number) -> String {
    match number.as_f64() {
        Some(value) if number.is_f64() && value.fract() == 0.0 && value.abs() <= EXACT => (value as i64).to_string(),
        _ => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canonical_form_ignores_order_blanks_and_spelling_of_numbers() {
        let one: Value = serde_json::from_str(r#"{"b": [1, 2.5, null], "a": {"y": 5e5, "x": "é\n"}}"#).unwrap();
        let other: Value = serde_json::from_str(r#"{"a":{"x":"\u00e9\n","y":500000},"b":[1.0,2.50,null]}"#).unwrap();
        assert_eq!(canonical(&one), r#"{"a":{"x":"é\n","y":500000},"b":[1,2.5,null]}"#);
        assert_eq!(canonical(&one), canonical(&other));
    }

    #[test]
    fn the_canonical_form_keeps_what_differs_apart() {
        let parse = |text: &str| canonical(&serde_json::from_str(text).unwrap());
        assert_ne!(parse(r#"{"a": "1"}"#), parse(r#"{"a": 1}"#));
        assert_ne!(parse(r#"{"a": 1e-5}"#), parse(r#"{"a": 1e-6}"#));
        assert_ne!(parse(r#"{"a": [1, 2]}"#), parse(r#"{"a": [2, 1]}"#));
        assert_ne!(parse(r#"{"a": 18446744073709551615}"#), parse(r#"{"a": 18446744073709551614}"#));
    }
}
