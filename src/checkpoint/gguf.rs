//! The header of a GGUF file: its metadata, and where each tensor lies.
//!
//! Version 3 of the format, little-endian (and version 2, which has the same layout): the letters `GGUF`, version,
//! counts, key-value pairs, descriptions of tensors, then the data, each tensor at a multiple of the alignment. Every
//! size is compared with the file's length before anything is done by it. What the keys and names mean is in
//! [`super::gguf_models`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};

use super::dtype::{Dtype, TensorInfo, byte_count};
use super::tensor_file::{self, StoredTensor, TensorFile};
use crate::error::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Most axes that a tensor has in this format.
const MAX_AXES: u32 = 4;
const AGAIN: &str = "download it again";
const TRUNCATED: &str = "the file is truncated: download it again";

/// Types of tensors by their number, in ggml's order. Those without a [`Dtype`] are named in the refusal.
const TYPES: [(u32, &str, Option<Dtype>); 34] = [
    (0, "F32", Some(Dtype::F32)),
    (1, "F16", Some(Dtype::F16)),
    (2, "Q4_0", Some(Dtype::Q4_0)),
    (3, "Q4_1", Some(Dtype::Q4_1)),
    (6, "Q5_0", None),
    (7, "Q5_1", None),
    (8, "Q8_0", Some(Dtype::Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", None),
    (11, "Q3_K", None),
    (12, "Q4_K", Some(Dtype::Q4K)),
    (13, "Q5_K", None),
    (14, "Q6_K", Some(Dtype::Q6K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", Some(Dtype::I8)),
    (25, "I16", Some(Dtype::I16)),
    (26, "I32", Some(Dtype::I32)),
    (27, "I64", Some(Dtype::I64)),
    (28, "F64", Some(Dtype::F64)),
    (29, "IQ1_M", None),
    (30, "BF16", Some(Dtype::Bf16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
    (41, "Q1_0", None),
];

/// An open GGUF file. Its header is checked; its data stays on disk until a tensor is asked for.
#[derive(Debug)]
pub struct GgufFile {
    metadata: Metadata,
    tensors: TensorFile,
}

/// The key-value pairs of a GGUF file, with readers whose errors name file and key.
#[derive(Debug, Clone)]
pub struct Metadata {
    path: PathBuf,
    pairs: Map<String, Value>,
}

/// Opens one `.gguf` file and checks its header; reads no weights.
///
/// # Errors
/// A missing, truncated or malformed file, a version or byte order other than version 2 or 3 in little-endian, a tensor
/// of a type that is not implemented, or one whose place and size do not fit the file.
pub fn read_gguf(path: impl AsRef<Path>) -> Result<GgufFile> {
    let path = path.as_ref();
    let file = tensor_file::open(path, ".gguf")?;
    let (pairs, tensors) = parse(path, &file.map)?;
    Ok(GgufFile {
        metadata: Metadata { path: path.to_path_buf(), pairs },
        tensors: TensorFile::new(path, file, tensors),
    })
}

impl GgufFile {
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Names of all tensors as they are stored, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.names()
    }

    /// Type and shape of a tensor, the slowest axis first (the file has it last).
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.info(name)
    }

    /// All values of a tensor, dequantised.
    ///
    /// # Shapes
    /// `shape` is what the caller expects; the result has its product of values, row-major.
    ///
    /// # Errors
    /// A missing tensor, another shape, a type that holds no such numbers, NaN or infinite values.
    pub fn load_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.tensors.load_f32(name, shape)
    }

    pub(super) fn into_parts(self) -> (Metadata, TensorFile) {
        (self.metadata, self.tensors)
    }
}

impl Metadata {
    /// The file it is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn pairs(&self) -> &Map<String, Value> {
        &self.pairs
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.pairs.get(key)
    }

    /// A string; none when the key is not there.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// A whole number; none when the key is not there.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        self.read(key, "a whole number", Value::as_u64)
    }

    /// A number; none when the key is not there.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    /// A list; none when the key is not there.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn list(&self, key: &str) -> Result<Option<&[Value]>> {
        self.read(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    fn read<'a, T>(&'a self, key: &str, kind: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.pairs.get(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(key, format!("is not {kind}"), "convert the model again")),
        }
    }

    /// An error about one key.
    pub fn error(&self, key: &str, problem: impl Into<String>, tip: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), key: key.into(), problem: problem.into(), tip: tip.into() }
    }

    /// The error for a key that must be there and is not.
    pub fn missing(&self, key: &str) -> Error {
        self.error(key, "is missing from the metadata", "convert the model again")
    }
}

fn parse(path: &Path, file: &[u8]) -> Result<(Map<String, Value>, BTreeMap<String, StoredTensor>)> {
    let fail = |problem: String, tip: &str| Error::file(path, problem, tip);
    if file.starts_with(b"version https://git-lfs") {
        return Err(fail("is a git-lfs pointer, not the weights themselves".into(), "run `git lfs pull`"));
    }
    if !file.starts_with(MAGIC) {
        return Err(fail("does not start with the letters GGUF".into(), "give the path of a .gguf file"));
    }
    let mut cursor = Cursor { path, file, at: MAGIC.len() };
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err(fail("is a GGUF file in big-endian byte order".into(), "convert it to little-endian"));
        }
        _ => {
            let problem = format!("is a GGUF file of version {version}, and this program reads 2 and 3");
            return Err(fail(problem, "convert the model again"));
        }
    }
    let (tensor_count, pair_count) = (cursor.u64("the number of tensors")?, cursor.u64("the number of keys")?);
    let mut pairs = Map::new();
    for _ in 0..pair_count {
        let key = cursor.text("a key")?;
        let kind = cursor.u32(&format!("the type of `{key}`"))?;
        let value = cursor.value(&key, kind)?;
        if pairs.insert(key.clone(), value).is_some() {
            return Err(fail(format!("has the key `{key}` twice"), AGAIN));
        }
    }
    let alignment = match pairs.get("general.alignment").map(Value::as_u64) {
        None => DEFAULT_ALIGNMENT,
        Some(Some(alignment)) if alignment.is_power_of_two() => alignment,
        Some(_) => return Err(fail("its `general.alignment` is not a power of two".into(), AGAIN)),
    };
    let mut described = vec![];
    for _ in 0..tensor_count {
        described.push(cursor.tensor()?);
    }
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    let data_bytes = (file.len() as u64).saturating_sub(data_start);
    let (mut tensors, mut places) = (BTreeMap::new(), vec![]);
    for (name, dtype, shape, offset) in described {
        let fail = |problem: String, tip: &str| tensor_error(path, &name, problem, tip);
        let bytes = byte_count(dtype, &shape).map_err(|problem| fail(problem, AGAIN))?;
        if shape.last().is_some_and(|columns| !columns.is_multiple_of(dtype.block_elements())) {
            let problem = format!("rows of {:?} values are no whole blocks of {dtype}", shape.last());
            return Err(fail(problem, AGAIN));
        }
        if !offset.is_multiple_of(alignment) {
            return Err(fail(format!("its data starts at {offset}, no multiple of {alignment}"), AGAIN));
        }
        let end = offset.checked_add(bytes).filter(|end| *end <= data_bytes).ok_or_else(|| {
            let problem =
                format!("needs {bytes} bytes from byte {offset} on, but the file holds {data_bytes} bytes of data");
            fail(problem, TRUNCATED)
        })?;
        let shape = shape.iter().map(|&size| usize::try_from(size)).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| fail("its shape is beyond this machine".into(), AGAIN))?;
        places.push((offset, end, name.clone()));
        // Both are at most the file's length, which is a usize.
        let bytes = (data_start + offset) as usize..(data_start + end) as usize;
        if tensors.insert(name.clone(), StoredTensor { info: TensorInfo { dtype, shape }, bytes }).is_some() {
            return Err(tensor_error(path, &name, "is listed twice in the header".into(), AGAIN));
        }
    }
    places.sort();
    let mut neighbours = places.iter().zip(places.iter().skip(1));
    if let Some(((.., previous), (start, _, name))) = neighbours.find(|((_, end, _), (start, ..))| start < end) {
        let problem = format!("its data starts at byte {start}, inside that of `{previous}`");
        return Err(tensor_error(path, name, problem, AGAIN));
    }
    Ok((pairs, tensors))
}

fn tensor_error(path: &Path, tensor: &str, problem: String, tip: &str) -> Error {
    Error::Tensor { path: path.to_path_buf(), tensor: tensor.into(), problem, tip: tip.into() }
}

/// Reads a header from its start, and never beyond the file's end.
struct Cursor<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn bytes(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let left = &self.file[self.at..];
        if count > left.len() as u64 {
            let problem = format!("ends at byte {}, inside {what}", self.file.len());
            return Err(Error::file(self.path, problem, TRUNCATED));
        }
        self.at += count as usize;
        Ok(&left[..count as usize])
    }

    fn array<const WIDTH: usize>(&mut self, what: &str) -> Result<[u8; WIDTH]> {
        Ok(self.bytes(WIDTH as u64, what)?.try_into().expect("as many bytes as were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let bytes = self.bytes(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(Error::file(self.path, format!("{what} is not UTF-8"), AGAIN)),
        }
    }

    /// A value of the type with this number.
    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        let what = format!("the value of `{key}`");
        if kind != 9 {
            return self.scalar(key, kind, &what);
        }
        let (kind, count) = (self.u32(&what)?, self.u64(&what)?);
        if kind == 9 {
            return Err(Error::file(self.path, format!("{what} is a list of lists"), "convert the model again"));
        }
        // Without reserving `count` places: it is the file's word alone until so many values have been read.
        (0..count).map(|_| self.scalar(key, kind, &what)).collect::<Result<_>>().map(Value::Array)
    }

    fn scalar(&mut self, key: &str, kind: u32, what: &str) -> Result<Value> {
        // 0.00001f32 is meant as 0.00001, whose nearest f64 is not that of the f32.
        let float = |value: f32| value.to_string().parse::<f64>().ok().and_then(Number::from_f64);
        Ok(match kind {
            0 => self.array(what).map(u8::from_le_bytes)?.into(),
            1 => self.array(what).map(i8::from_le_bytes)?.into(),
            2 => self.array(what).map(u16::from_le_bytes)?.into(),
            3 => self.array(what).map(i16::from_le_bytes)?.into(),
            4 => self.u32(what)?.into(),
            5 => self.array(what).map(i32::from_le_bytes)?.into(),
            6 => float(self.array(what).map(f32::from_le_bytes)?).map_or(Value::Null, Value::Number),
            7 => (self.array::<1>(what)? != [0]).into(),
            8 => self.text(what)?.into(),
            10 => self.u64(what)?.into(),
            11 => self.array(what).map(i64::from_le_bytes)?.into(),
            12 => Number::from_f64(self.array(what).map(f64::from_le_bytes)?).map_or(Value::Null, Value::Number),
            other => {
                let problem = format!("`{key}` has the unknown type {other}");
                return Err(Error::file(self.path, problem, AGAIN));
            }
        })
    }

    /// Name, type, shape (the slowest axis first, unlike in the file) and offset of a tensor.
    fn tensor(&mut self) -> Result<(String, Dtype, Vec<u64>, u64)> {
        let name = self.text("the name of a tensor")?;
        let what = format!("the description of `{name}`");
        let axes = self.u32(&what)?;
        if axes > MAX_AXES {
            let problem = format!("has {axes} axes, and the format allows {MAX_AXES}");
            return Err(tensor_error(self.path, &name, problem, AGAIN));
        }
        let mut shape = (0..axes).map(|_| self.u64(&what)).collect::<Result<Vec<u64>>>()?;
        shape.reverse();
        let (kind, offset) = (self.u32(&what)?, self.u64(&what)?);
        let refuse = |problem: String| {
            let tip = "use a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K tensors";
            Err(tensor_error(self.path, &name, problem, tip))
        };
        match TYPES.iter().find(|(number, ..)| *number == kind) {
            Some((.., Some(dtype))) => Ok((name, *dtype, shape, offset)),
            Some((_, known, None)) => refuse(format!("is stored as {known}, which this program does not read")),
            None => refuse(format!("has the unknown type number {kind}")),
        }
    }
}
