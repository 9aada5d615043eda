//! `compression_config.yaml`: how DistillKit's rows were compressed. Reads the YAML that such files are made of (one level
//! of keys; lists of words, numbers and small maps), and refuses any other.

use std::path::Path;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// How rows are compressed, under DistillKit's own names.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressionConfig {
    /// Size of the vocabulary, which decides the bits of an id.
    pub d: usize,
    /// Ids in a row.
    pub k: usize,
    /// The first values of a row, stored as they are.
    pub exact_k: usize,
    pub exact_dtype: Float,
    /// Terms of the curve under the other values.
    pub polynomial_terms: Vec<Term>,
    pub term_dtype: Float,
    /// What is left above the curve, quantised.
    pub residual_bins: Vec<ResidualBin>,
    /// Whether each value is stored as its distance from the one before.
    pub delta_encoding: bool,
    /// Whether the curve's argument goes from 0 to 1.
    pub normalize_t: bool,
}

/// A number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Float {
    F16,
    Bf16,
    F32,
    F64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Term {
    Power(i32),
    Sqrt,
    Exp,
}

/// Some values in a row that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidualBin {
    pub scale_dtype: Float,
    pub element_bits: usize,
    pub num_elements: usize,
}

impl Float {
    pub(super) fn bytes(self) -> usize {
        match self {
            Float::F16 | Float::Bf16 => 2,
            Float::F32 => 4,
            Float::F64 => 8,
        }
    }

    /// The nearest number of this format.
    pub(super) fn round(self, value: f64) -> f64 {
        match self {
            Float::F16 => f16::from_f32(value as f32).to_f64(),
            Float::Bf16 => bf16::from_f32(value as f32).to_f64(),
            Float::F32 => f64::from(value as f32),
            Float::F64 => value,
        }
    }

    /// The number in its little-endian bytes.
    pub(super) fn read(self, bytes: &[u8]) -> f64 {
        match self {
            Float::F16 => f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f64(),
            Float::Bf16 => bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f64(),
            Float::F32 => f64::from(f32::from_le_bytes(bytes.try_into().expect("four bytes"))),
            Float::F64 => f64::from_le_bytes(bytes.try_into().expect("eight bytes")),
        }
    }

    /// The format in which numbers of two formats are added.
    pub(super) fn with(self, other: Float) -> Float {
        match (self, other) {
            (Float::F16, Float::Bf16) | (Float::Bf16, Float::F16) => Float::F32,
            _ => self.max(other),
        }
    }

    fn parse(word: &str) -> Result<Float, String> {
        match word {
            "float16" => Ok(Float::F16),
            "bfloat16" => Ok(Float::Bf16),
            "float32" => Ok(Float::F32),
            "float64" => Ok(Float::F64),
            _ => Err(format!("`{word}` is none of float16, bfloat16, float32, float64")),
        }
    }
}

impl CompressionConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::File`] naming the line or key that is not understood.
    pub fn read(path: &Path) -> Result<CompressionConfig> {
        let wrong = |problem: String| {
            let tip = "give the compression_config.yaml that DistillKit wrote beside the files, with --config";
            Error::file(path, problem, tip)
        };
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let config = Self::parse(&text).map_err(wrong)?;
        config.check().map_err(wrong)?;
        Ok(config)
    }

    fn parse(text: &str) -> Result<CompressionConfig, String> {
        let mut entries = entries(text)?;
        if let Some(key) = ["polynomial_degree", "vocab_size", "invert_polynomial"]
            .into_iter()
            .find(|key| entries.iter().any(|(name, _)| name == key))
        {
            return Err(format!("`{key}` is of DistillKit's old format, which holds logits without their normaliser"));
        }
        let mut take = |name: &str| {
            let place = entries.iter().position(|(key, _)| key == name)?;
            Some(entries.remove(place).1)
        };
        let mut word = |name: &str, default: Option<&str>| match take(name) {
            Some(Value::Word(word)) => Ok(word),
            Some(_) => Err(format!("`{name}` is a list, not one value")),
            None => default.map(String::from).ok_or(format!("`{name}` is missing")),
        };
        let (d, k, exact_k) = (word("d", None)?, word("k", None)?, word("exact_k", None)?);
        let (exact_dtype, term_dtype) = (word("exact_dtype", Some("float32"))?, word("term_dtype", Some("float32"))?);
        let (delta, normalize) = (word("delta_encoding", Some("true"))?, word("normalize_t", Some("false"))?);
        // It matters to whoever compresses only.
        word("error_diffusion", Some("false"))?;
        let config = CompressionConfig {
            d: number("d", &d)?,
            k: number("k", &k)?,
            exact_k: number("exact_k", &exact_k)?,
            exact_dtype: Float::parse(&exact_dtype)?,
            polynomial_terms: match take("polynomial_terms") {
                None => vec![],
                Some(Value::Word(word)) if ["null", "~", ""].contains(&word.as_str()) => vec![],
                Some(Value::List(items)) => items.iter().map(term).collect::<Result<_, _>>()?,
                Some(Value::Word(word)) => return Err(format!("`polynomial_terms` is `{word}`, not a list")),
            },
            term_dtype: Float::parse(&term_dtype)?,
            residual_bins: match take("residual_bins") {
                Some(Value::List(items)) => items.iter().map(bin).collect::<Result<_, _>>()?,
                Some(Value::Word(word)) => return Err(format!("`residual_bins` is `{word}`, not a list")),
                None => return Err("`residual_bins` is missing".into()),
            },
            delta_encoding: truth("delta_encoding", &delta)?,
            normalize_t: truth("normalize_t", &normalize)?,
        };
        match entries.first() {
            None => Ok(config),
            Some((name, _)) => Err(format!("the key `{name}` is not known")),
        }
    }

    fn check(&self) -> Result<(), String> {
        let binned: usize = self.residual_bins.iter().map(|bin| bin.num_elements).sum();
        if self.d == 0 || self.d > 1 << 31 || self.k == 0 || self.k > self.d || self.exact_k > self.k {
            return Err(format!("d = {}, k = {}, exact_k = {} do not fit each other", self.d, self.k, self.exact_k));
        }
        if binned > self.k - self.exact_k {
            return Err(format!("the residual bins have {binned} elements, more than k - exact_k"));
        }
        match self.residual_bins.iter().find(|bin| !(1..=32).contains(&bin.element_bits)) {
            Some(bin) => Err(format!("element_bits = {}, and 1 to 32 are read", bin.element_bits)),
            None => Ok(()),
        }
    }
}

fn number<T: std::str::FromStr>(name: &str, word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("`{name}` is `{word}`, not a number that it can be"))
}

fn truth(name: &str, word: &str) -> Result<bool, String> {
    match word.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => Ok(true),
        "false" | "no" | "off" => Ok(false),
        _ => Err(format!("`{name}` is `{word}`, not true or false")),
    }
}

fn term(item: &Item) -> Result<Term, String> {
    match item {
        Item::Word(word) if word == "sqrt" => Ok(Term::Sqrt),
        Item::Word(word) if word == "exp" => Ok(Term::Exp),
        Item::Word(word) => Ok(Term::Power(number("polynomial_terms", word)?)),
        Item::Map(_) => Err("`polynomial_terms` holds a map".into()),
    }
}

fn bin(item: &Item) -> Result<ResidualBin, String> {
    let Item::Map(map) = item else { return Err("`residual_bins` holds a word, not a map".into()) };
    let word = |name: &str| {
        let value = map.iter().find(|(key, _)| key == name);
        value.map(|(_, word)| word.as_str()).ok_or(format!("a residual bin has no `{name}`"))
    };
    Ok(ResidualBin {
        scale_dtype: Float::parse(word("scale_dtype")?)?,
        element_bits: number("element_bits", word("element_bits")?)?,
        num_elements: number("num_elements", word("num_elements")?)?,
    })
}

enum Value {
    Word(String),
    List(Vec<Item>),
}

enum Item {
    Word(String),
    Map(Vec<(String, String)>),
}

/// The keys of the file in their order.
fn entries(text: &str) -> Result<Vec<(String, Value)>, String> {
    let mut entries: Vec<(String, Value)> = vec![];
    for (number, line) in text.lines().enumerate() {
        let strange = || format!("line {} is not understood: {}", number + 1, line.trim());
        let content = line.split_once(" #").map_or(line, |(content, _)| content).trim_end();
        let inner = content.trim_start();
        if inner.is_empty() || inner.starts_with('#') || inner == "---" || inner == "..." {
            continue;
        }
        if let Some(item) = inner.strip_prefix("- ") {
            let Some((_, Value::List(items))) = entries.last_mut() else { return Err(strange()) };
            items.push(list_item(item.trim()).ok_or_else(strange)?);
        } else if content.starts_with([' ', '\t']) {
            // A further key of the map that the last item of the list is.
            let Some((_, Value::List(items))) = entries.last_mut() else { return Err(strange()) };
            let Some(Item::Map(map)) = items.last_mut() else { return Err(strange()) };
            map.push(pair(inner).ok_or_else(strange)?);
        } else {
            let (key, value) = inner.split_once(':').ok_or_else(strange)?;
            let value = value.trim();
            let value = match value.strip_prefix('[') {
                _ if value.is_empty() => Value::List(vec![]),
                Some(list) => Value::List(flow_list(list).ok_or_else(strange)?),
                None => Value::Word(unquoted(value)),
            };
            entries.push((unquoted(key), value));
        }
    }
    Ok(entries)
}

fn list_item(text: &str) -> Option<Item> {
    if let Some(map) = text.strip_prefix('{') {
        let map = map.strip_suffix('}')?;
        return Some(Item::Map(map.split(',').map(pair).collect::<Option<_>>()?));
    }
    Some(match pair(text) {
        Some(pair) => Item::Map(vec![pair]),
        None => Item::Word(unquoted(text)),
    })
}

/// `0, 1, sqrt]` or `{..}, {..}]`.
fn flow_list(text: &str) -> Option<Vec<Item>> {
    let text = text.strip_suffix(']')?.trim();
    if text.contains('{') {
        let maps = text.split_inclusive('}').map(|map| map.trim_start_matches([',', ' ']));
        return maps.map(list_item).collect();
    }
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(list_item).collect()
}

fn pair(text: &str) -> Option<(String, String)> {
    let (key, value) = text.split_once(':')?;
    let (key, value) = (unquoted(key), unquoted(value));
    (!key.is_empty() && !value.is_empty()).then_some((key, value))
}

fn unquoted(word: &str) -> String {
    word.trim().trim_matches(['"', '\'']).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_that_distillkit_writes_is_understood() {
        let text = "d: 128257\ndelta_encoding: false\nerror_diffusion: false\nexact_dtype: bfloat16\nexact_k: 16\nk: 50\n\
                    normalize_t: true\npolynomial_terms:\n- 0\n- 1\n- sqrt\nresidual_bins:\n- element_bits: 8\n  num_elements: 20\n  \
                    scale_dtype: float16\n- element_bits: 1\n  num_elements: 14\n  scale_dtype: float32\nterm_dtype: float32\n";
        let config = CompressionConfig::parse(text).unwrap();
        let bin = |scale_dtype, element_bits, num_elements| ResidualBin { scale_dtype, element_bits, num_elements };
        let expected = CompressionConfig {
            d: 128_257,
            k: 50,
            exact_k: 16,
            exact_dtype: Float::Bf16,
            polynomial_terms: vec![Term::Power(0), Term::Power(1), Term::Sqrt],
            term_dtype: Float::F32,
            residual_bins: vec![bin(Float::F16, 8, 20), bin(Float::F32, 1, 14)],
            delta_encoding: false,
            normalize_t: true,
        };
        assert_eq!(config, expected);
        config.check().unwrap();
        // As people write it.
        let by_hand = "# ours\nd: 128257\nk: 50 # few\nexact_k: 16\nexact_dtype: \"bfloat16\"\ndelta_encoding: no\nnormalize_t: True\n\
                       polynomial_terms: [0, 1, sqrt]\nresidual_bins:\n  - {scale_dtype: float16, element_bits: 8, num_elements: 20}\n  \
                       - scale_dtype: float32\n    element_bits: 1\n    num_elements: 14\n";
        assert_eq!(CompressionConfig::parse(by_hand).unwrap(), expected);
        let bare = "d: 8\nk: 2\nexact_k: 2\npolynomial_terms: null\nresidual_bins: []\n";
        assert!(CompressionConfig::parse(bare).unwrap().delta_encoding);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let problem = |text: &str| match CompressionConfig::parse(text) {
            Ok(config) => config.check().unwrap_err(),
            Err(problem) => problem,
        };
        let base = "d: 8\nk: 4\nexact_k: 2\nresidual_bins: []\n";
        assert_eq!(problem("d: 8\n"), "`k` is missing");
        assert_eq!(problem(&format!("{base}levels: 3\n")), "the key `levels` is not known");
        assert_eq!(
            problem(&format!("{base}exact_dtype: float8\n")),
            "`float8` is none of float16, bfloat16, float32, float64"
        );
        assert_eq!(problem(&format!("{base}  deeper: 1\n")), "line 5 is not understood: deeper: 1");
        assert_eq!(
            problem("d: 8\nk: 4\nexact_k: 9\nresidual_bins: []\n"),
            "d = 8, k = 4, exact_k = 9 do not fit each other"
        );
        assert_eq!(
            problem("k: 4\nexact_k: 2\nvocab_size: 8\npolynomial_degree: 2\n"),
            "`polynomial_degree` is of DistillKit's old format, which holds logits without their normaliser"
        );
        let bins =
            "d: 8\nk: 4\nexact_k: 2\nresidual_bins:\n- {scale_dtype: float16, element_bits: 40, num_elements: 2}\n";
        assert_eq!(problem(bins), "element_bits = 40, and 1 to 32 are read");
    }
}
