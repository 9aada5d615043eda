//! Large numbers as people write them: `157k`, `1.5M`, `10B`, `2_097_152`.

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};
use std::fmt;

/// Reads a count: digits with optional `_` between them, an optional decimal part, an optional `k`, `M`, `B` (or `G`) or
/// `T` for 10^3, 10^6, 10^9 or 10^12, in either case. `1.5M` is 1,500,000; the result has to be whole.
///
/// `None` for anything else, and above 2^63 - 1: what is read here must be writable as TOML, whose integers are signed.
pub fn parse_count(text: &str) -> Option<u64> {
    let text = text.trim();
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
    let count = digits.parse::<i64>().ok()?.checked_mul(10i64.pow((zeros - decimals.len()) as u32))?;
    Some(count as u64)
}

struct CountVisitor;

impl Visitor<'_> for CountVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a count such as 20000, \"1.5M\" or \"10B\"")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<u64, E> {
        parse_count(value).ok_or_else(|| E::invalid_value(Unexpected::Str(value), &self))
    }
}

/// For `#[serde(deserialize_with = "..")]`: a number, or a string such as `"2_097_152"`, `"157k"`, `"1.5M"` or `"10B"`.
pub fn deserialize_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_any(CountVisitor)
}

/// As [`deserialize_count`], for a key that may be absent.
pub fn deserialize_optional_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(serde::Deserialize)]
    struct Written(#[serde(deserialize_with = "deserialize_count")] u64);
    Ok(Option::deserialize(deserializer)?.map(|Written(count)| count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_as_people_write_them() {
        for (text, count) in [
            ("0", 0),
            ("157k", 157_000),
            ("0.25k", 250),
            ("1.5M", 1_500_000),
            ("20M", 20_000_000),
            ("10B", 10_000_000_000),
            ("2.25g", 2_250_000_000),
            ("1T", 1_000_000_000_000),
            ("2_097_152", 2_097_152),
            ("1.50k", 1500),
            (" 7 ", 7),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(parse_count(text), Some(count), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_count_is_refused() {
        for text in [
            "",
            "k",
            "M1",
            ".5M",
            "1.2345k",
            "-5",
            "1e6",
            "ten",
            "1.5",
            "20 000",
            "10 B ok",
            "_1",
            "1__0",
            "99999999T",
            "9223372036854775808",
            "5é",
            "1.k2",
        ] {
            assert_eq!(parse_count(text), None, "{text}");
        }
    }
}
