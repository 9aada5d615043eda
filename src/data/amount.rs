//! Large numbers as people write them: `157k`, `1.5M`, `10B`, `2_097_152`.

use crate::error::{Error, Result};
use serde::de::{Deserializer, Error as _, Visitor};
use std::fmt;

/// Reads a count: digits with optional `_` between them, an optional decimal part, an optional `k`, `M`, `B` (or `G`) or
/// `T` for 10^3, 10^6, 10^9 or 10^12, in either case. `1.5M` is 1,500,000; the result has to be whole.
///
/// # Errors
/// Anything else, and what is above 2^64 - 1, with examples in the message.
pub fn parse_count(text: &str) -> Result<u64> {
    exact_count(text.trim()).ok_or_else(|| {
        Error::usage(format!("`{text}` is not a count"), "write it like 2_097_152, 157k, 1.5M, 20M, 10B or 1T")
    })
}

fn exact_count(text: &str) -> Option<u64> {
    let (number, zeros) = match text.chars().last()?.to_ascii_lowercase() {
        'k' => (&text[..text.len() - 1], 3),
        'm' => (&text[..text.len() - 1], 6),
        'b' | 'g' => (&text[..text.len() - 1], 9),
        't' => (&text[..text.len() - 1], 12),
        _ => (text, 0),
    };
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let decimals = decimals.trim_end_matches('0');
    let is_grouped = !whole.starts_with('_') && !whole.ends_with('_') && !whole.contains("__");
    let digits: String = whole.chars().filter(|&c| c != '_').chain(decimals.chars()).collect();
    if whole.is_empty() || !is_grouped || decimals.len() > zeros || !digits.chars().all(|c| c.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(10u64.pow((zeros - decimals.len()) as u32))
}

struct CountVisitor;

impl Visitor<'_> for CountVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a count such as 2_097_152 or \"20M\"")
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value).map_err(|_| E::custom(format!("`{value}` is not a count; it has to be at least 0")))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<u64, E> {
        parse_count(value).map_err(E::custom)
    }
}

/// For `#[serde(deserialize_with = "..")]`: a number or a string that [`parse_count`] reads.
pub fn deserialize_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_any(CountVisitor)
}

/// As [`deserialize_count`], for a key that may be absent.
pub fn deserialize_optional_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(serde::Deserialize)]
    struct Written(#[serde(deserialize_with = "deserialize_count")] u64);
    let written: Option<Written> = serde::Deserialize::deserialize(deserializer).map_err(D::Error::custom)?;
    Ok(written.map(|Written(count)| count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_as_people_write_them() {
        for (text, count) in [
            ("0", 0),
            ("157k", 157_000),
            ("1.5M", 1_500_000),
            ("20M", 20_000_000),
            ("10B", 10_000_000_000),
            ("2.25g", 2_250_000_000),
            ("1T", 1_000_000_000_000),
            ("2_097_152", 2_097_152),
            ("1.50k", 1500),
            (" 7 ", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_count(text).unwrap(), count, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_count_is_refused_with_examples() {
        for text in
            ["", "k", "M1", "1.2345k", "-5", "1e6", "ten", "1.5", "20 000", "_1", "1__0", "99999999T", "5é", "1.k2"]
        {
            let message = parse_count(text).unwrap_err().to_string();
            let expected = format!("`{text}` is not a count; write it like 2_097_152, 157k, 1.5M, 20M, 10B or 1T");
            assert_eq!(message, expected);
        }
    }
}
