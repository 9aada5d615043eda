//! Where documents are: files named by path or glob, cut into chunks that can be read in any order.
//!
//! A chunk is the unit of reading and of the coarse shuffle: a whole text file, a byte range of a JSONL file, a run of
//! rows of a parquet file. Finding the chunks costs no pass over the data.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Chunk size where no shuffle window asks for another.
pub(super) const CHUNK_BYTES: u64 = 4 << 20;

/// Documents from one file or from all files that match a pattern, all of one kind.
///
/// The kind follows from the ending of the file names:
/// - `.txt`, `.md`, `.rst`: UTF-8 text; one file is one document, or several when `document_separator` is set;
/// - `.jsonl`, `.ndjson`: one JSON object a line, with the text in `field`;
/// - `.parquet`: one row a document, with the text in the string column `field`.
///
/// Records whose text is the empty string are passed over; a record without text at all is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// A file, or a pattern such as `data/web/**/*.parquet`. Files are taken in the order of their sorted paths.
    pub path: String,
    /// Share of the training tokens, relative to the other sources' weights.
    #[serde(default = "one")]
    pub weight: f64,
    /// Name of the JSON field or parquet column; `text` where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// A line that separates the documents of a plain text file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document_separator: Option<String>,
}

fn one() -> f64 {
    1.0
}

impl DataSource {
    /// A source of weight 1 with the default field.
    pub fn new(path: impl Into<String>) -> DataSource {
        DataSource { path: path.into(), weight: 1.0, field: None, document_separator: None }
    }

    /// The same source, its path taken as relative to `folder` (absolute paths stay as they are).
    pub fn relative_to(mut self, folder: &Path) -> DataSource {
        self.path = folder.join(&self.path).to_string_lossy().into_owned();
        self
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Jsonl,
    Parquet,
}

impl Kind {
    fn of(path: &Path) -> Result<Kind> {
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        match ending.as_str() {
            "txt" | "md" | "rst" => Ok(Kind::Text),
            "jsonl" | "ndjson" => Ok(Kind::Jsonl),
            "parquet" => Ok(Kind::Parquet),
            _ => Err(Error::file(
                path,
                format!("the ending `.{ending}` is none that is read"),
                "give it as .txt, .md, .rst, .jsonl, .ndjson or .parquet, uncompressed",
            )),
        }
    }
}

/// A piece of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Number of the file within the source.
    pub file: usize,
    /// Row group (parquet) or 0.
    pub group: usize,
    /// Bytes (text, JSONL) or rows of the group (parquet).
    pub start: u64,
    pub end: u64,
}

impl Chunk {
    /// Bytes or rows.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// A source whose files have been found.
#[derive(Debug, Clone)]
pub(super) struct OpenSource {
    pub declared: DataSource,
    pub kind: Kind,
    /// Never empty.
    pub files: Vec<PathBuf>,
    /// Bytes of each file.
    pub sizes: Vec<u64>,
    pub chunks: Vec<Chunk>,
}

impl OpenSource {
    pub fn field(&self) -> &str {
        self.declared.field.as_deref().unwrap_or("text")
    }

    pub fn pattern(&self) -> &Path {
        Path::new(&self.declared.path)
    }

    /// Documents of one chunk, in file order, without empty ones.
    pub fn read(&self, chunk: Chunk) -> Result<Vec<String>> {
        super::read::documents(self, chunk)
    }
}

/// Finds the files of all sources; chunks of about `chunk_bytes` where the kind of file allows it.
pub(super) fn open_all(sources: &[DataSource], chunk_bytes: u64) -> Result<Vec<OpenSource>> {
    if sources.is_empty() {
        return Err(Error::usage("no data source is given", "name at least one, such as { path = \"data/*.jsonl\" }"));
    }
    sources.iter().map(|source| open(source, chunk_bytes.max(1))).collect()
}

fn open(declared: &DataSource, chunk_bytes: u64) -> Result<OpenSource> {
    let pattern = Path::new(&declared.path);
    if !(declared.weight.is_finite() && declared.weight > 0.0) {
        let problem = format!("weight {} is not a positive number", declared.weight);
        return Err(Error::file(pattern, problem, "give it a weight above 0, or leave the source out"));
    }
    let files = matching_files(pattern)?;
    let kind = Kind::of(&files[0])?;
    for file in &files {
        if Kind::of(file)? != kind {
            let problem = format!("matches files of two kinds: {} and {}", files[0].display(), file.display());
            return Err(Error::file(pattern, problem, "make two sources of it, one for each ending"));
        }
    }
    if kind == Kind::Text && declared.field.is_some() {
        return Err(Error::file(pattern, "`field` is set, but plain text has no fields", "remove `field`"));
    }
    if kind != Kind::Text && declared.document_separator.is_some() {
        let problem = "`document_separator` is set, but each record is a document already";
        return Err(Error::file(pattern, problem, "remove `document_separator`"));
    }
    if declared.document_separator.as_ref().is_some_and(|line| line.trim().is_empty() || line.contains('\n')) {
        let problem = "`document_separator` has to be one line that is not blank";
        return Err(Error::file(pattern, problem, "use a line such as \"-----\""));
    }
    let mut sizes = Vec::with_capacity(files.len());
    for file in &files {
        sizes.push(fs::metadata(file).map_err(Error::io(file))?.len());
    }
    let mut source = OpenSource { declared: declared.clone(), kind, files, sizes, chunks: vec![] };
    source.chunks = chunks(&source, chunk_bytes)?;
    if source.chunks.is_empty() {
        return Err(Error::file(pattern, "the source has no records", "give it some text, or leave the source out"));
    }
    Ok(source)
}

fn matching_files(pattern: &Path) -> Result<Vec<PathBuf>> {
    // A file whose name has brackets in it is meant literally.
    if pattern.is_file() {
        return Ok(vec![pattern.to_path_buf()]);
    }
    if pattern.is_dir() {
        let tip = format!("add a pattern, such as {}", pattern.join("*.jsonl").display());
        return Err(Error::file(pattern, "this is a folder", tip));
    }
    let paths = glob::glob(&pattern.to_string_lossy()).map_err(|source| {
        Error::file(pattern, format!("not a pattern: {}", source.msg), "see the shell's * ? [ab] **")
    })?;
    let mut files = vec![];
    for path in paths {
        let path = path.map_err(|source| {
            let path = source.path().to_path_buf();
            Error::io(path)(source.into())
        })?;
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::file(pattern, "no file matches", "check the path"));
    }
    Ok(files)
}

fn chunks(source: &OpenSource, chunk_bytes: u64) -> Result<Vec<Chunk>> {
    let mut chunks = vec![];
    for (file, &size) in source.sizes.iter().enumerate() {
        match source.kind {
            // Also an empty file, which reading then names.
            Kind::Text => chunks.push(Chunk { file, group: 0, start: 0, end: size }),
            Kind::Jsonl => {
                let starts = (0..size).step_by(chunk_bytes as usize);
                chunks.extend(starts.map(|start| Chunk { file, group: 0, start, end: size.min(start + chunk_bytes) }));
            }
            Kind::Parquet => {
                for (group, (rows, bytes)) in super::read::row_groups(source, file)?.into_iter().enumerate() {
                    let pieces = bytes.div_ceil(chunk_bytes).clamp(1, rows.max(1));
                    let step = rows.div_ceil(pieces).max(1);
                    let starts = (0..rows).step_by(step as usize);
                    chunks.extend(starts.map(|start| Chunk { file, group, start, end: rows.min(start + step) }));
                }
            }
        }
    }
    Ok(chunks)
}
