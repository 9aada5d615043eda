//! Amounts as people write them: `"10B"`, `"1.5M"`, `4096`. Knows nothing of recipes.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Unexpected, Visitor};
use serde::{Serialize, Serializer};

use super::schema::{HeldOut, HeldOutSources};

/// A number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct TokenCount(pub u64);

const EXPECTED: &str = "a number of tokens such as 20000, \"1.5M\" or \"10B\"";

impl TokenCount {
    /// Reads `10B`, `1.5M`, `4k` or digits. Factors are powers of 1000. `None` when it is no whole number of tokens.
    pub fn parse(text: &str) -> Option<TokenCount> {
        let text = text.trim().replace('_', "");
        let zeros = match text.chars().last()? {
            'k' | 'K' => 3,
            'm' | 'M' => 6,
            'b' | 'B' | 'g' | 'G' => 9,
            't' | 'T' => 12,
            '0'..='9' => 0,
            _ => return None,
        };
        let number = if zeros == 0 { &text[..] } else { &text[..text.len() - 1] };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let fraction = fraction.trim_end_matches('0');
        if whole.is_empty()
            || fraction.len() > zeros
            || !(whole.bytes().chain(fraction.bytes())).all(|b| b.is_ascii_digit())
        {
            return None;
        }
        let digits = format!("{whole}{fraction}{}", "0".repeat(zeros - fraction.len()));
        // TOML integers are signed, and the frozen recipe must be able to say every amount.
        digits.parse::<i64>().ok().map(|tokens| TokenCount(tokens as u64))
    }
}

impl fmt::Display for TokenCount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&short_count(self.0))
    }
}

impl Serialize for TokenCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

struct TokenCountVisitor;

impl Visitor<'_> for TokenCountVisitor {
    type Value = TokenCount;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(EXPECTED)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<TokenCount, E> {
        Ok(TokenCount(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<TokenCount, E> {
        u64::try_from(value).map(TokenCount).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<TokenCount, E> {
        TokenCount::parse(value).ok_or_else(|| E::invalid_value(Unexpected::Str(value), &self))
    }
}

impl<'de> Deserialize<'de> for TokenCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TokenCountVisitor)
    }
}

// Written out, because a derived untagged enum answers every mistake with "did not match any variant".
impl<'de> Deserialize<'de> for HeldOut {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeldOutVisitor;

        impl<'de> Visitor<'de> for HeldOutVisitor {
            type Value = HeldOut;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                write!(formatter, "{EXPECTED}, or a table {{ sources = [...] }}")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<HeldOut, E> {
                TokenCountVisitor.visit_u64(value).map(HeldOut::Tokens)
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<HeldOut, E> {
                TokenCountVisitor.visit_i64(value).map(HeldOut::Tokens)
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<HeldOut, E> {
                TokenCountVisitor.visit_str(value).map(HeldOut::Tokens)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<HeldOut, A::Error> {
                HeldOutSources::deserialize(de::value::MapAccessDeserializer::new(map)).map(HeldOut::Sources)
            }
        }

        deserializer.deserialize_any(HeldOutVisitor)
    }
}

/// `1234567` as `1.23M`.
pub(super) fn short_count(count: u64) -> String {
    let scale = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    // 999,600 is nearer to 1M than to 1000k.
    match scale.iter().find(|(factor, _)| count as f64 >= factor * 0.9995) {
        Some((factor, unit)) => format!("{}{unit}", three_digits(count as f64 / factor)),
        None => count.to_string(),
    }
}

/// `1234567` bytes as `1.23 MB`.
pub(super) fn short_bytes(bytes: u64) -> String {
    let scale = [(1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match scale.iter().find(|(factor, _)| bytes as f64 >= factor * 0.9995) {
        Some((factor, unit)) => format!("{} {unit}", three_digits(bytes as f64 / factor)),
        None => format!("{bytes} B"),
    }
}

fn three_digits(value: f64) -> String {
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    let text = format!("{value:.decimals$}");
    if decimals == 0 { text } else { text.trim_end_matches('0').trim_end_matches('.').to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_as_people_write_them() {
        let cases = [
            ("10B", 10_000_000_000),
            ("20M", 20_000_000),
            ("1.5M", 1_500_000),
            ("4k", 4_000),
            ("0.25k", 250),
            ("1.50M", 1_500_000),
            ("2T", 2_000_000_000_000),
            ("1_000_000", 1_000_000),
            ("163840", 163_840),
        ];
        for (text, tokens) in cases {
            assert_eq!(TokenCount::parse(text), Some(TokenCount(tokens)), "{text}");
        }
        for text in
            ["", "B", "-5", "1.5", "1.0005k", "ten", "10 B ok", "1e9", ".5M", "99999999999999999999", "9999999999B"]
        {
            assert_eq!(TokenCount::parse(text), None, "{text}");
        }
    }

    #[test]
    fn counts_and_bytes_print_three_digits() {
        for (count, text) in [(0, "0"), (999, "999"), (1_000, "1k"), (163_840, "164k"), (999_600, "1M")] {
            assert_eq!(short_count(count), text);
        }
        assert_eq!(short_count(10_000_000_000), "10B");
        assert_eq!(short_count(1_234_567), "1.23M");
        assert_eq!(short_bytes(280_000_000_000), "280 GB");
        assert_eq!(short_bytes(12), "12 B");
        assert_eq!(TokenCount(20_000_000).to_string(), "20M");
    }
}
