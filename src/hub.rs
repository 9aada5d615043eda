//! Models on the Hugging Face hub, named `hf:org/name`: found in the local cache, or downloaded into it and checked.
//!
//! A name is `hf:org/name`, with `@revision` (a branch, tag or commit) behind it when it is not `main`, and with
//! `/file.gguf` behind the model's name for one file. The protocol, the cache's folders and the token are those of the
//! `hf-hub` crate; resuming after a broken connection and checking what arrived are here. Knows nothing of what is in
//! the files. Without the feature `hub` every such name is refused.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
pub use download::Hub;

const SCHEME: &str = "hf:";

/// What is needed of a model. Weights can be a thousand times larger than the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wanted {
    Configuration,
    Tokenizer,
    Everything,
}

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`
    pub model: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// One file of it.
    pub file: Option<String>,
}

/// Whether a path is the name of a model on the hub.
pub fn is_hub(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.starts_with(SCHEME))
}

impl HubName {
    /// Reads `hf:org/name[/file][@revision]`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(path: &Path) -> Result<HubName> {
        let wrong = |problem: &str| {
            let tip = "write it as hf:org/name or hf:org/name@revision";
            Err(Error::usage(format!("{}: {problem}", path.display()), tip))
        };
        let Some(name) = path.to_str().and_then(|text| text.strip_prefix(SCHEME)) else {
            return wrong("this is no name on the hub");
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let mut parts = name.splitn(3, '/');
        let (organisation, model, file) =
            (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next());
        let plain = |part: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !part.is_empty() && part != "." && part != ".." && part.bytes().all(allowed)
        };
        if !plain(organisation) || !plain(model) {
            return wrong("a model has the name of its owner, a slash, and its own name");
        }
        if !revision.split('/').all(plain) {
            return wrong("its revision is not the name of a branch, a tag or a commit");
        }
        if !file.is_none_or(|file| file.split('/').all(plain)) {
            return wrong("its file is not the name of a file");
        }
        let file = file.map(str::to_string);
        Ok(HubName { model: format!("{organisation}/{model}"), revision: revision.into(), file })
    }
}

/// Where a path is on this machine: itself, or, for a name on the hub, the folder or file that it is downloaded to.
/// Asks the hub once in a process for each name and what is wanted of it.
///
/// # Errors
/// A name that is none, a model that cannot be had, a download that is not what the hub says it is.
pub fn local(path: &Path, wanted: Wanted) -> Result<PathBuf> {
    if !is_hub(path) {
        return Ok(path.to_path_buf());
    }
    let name = HubName::parse(path)?;
    #[cfg(feature = "hub")]
    return download::remembered(path, &name, wanted);
    #[cfg(not(feature = "hub"))]
    {
        let _ = wanted;
        Err(Error::usage(
            format!("{} is a model on the Hugging Face hub, and this program was built without it", name.model),
            "build it with `--features hub`, or download the model and give the path of its folder",
        ))
    }
}
