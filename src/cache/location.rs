//! Where a finished cache is: in a directory of this machine, or at an address.
//!
//! Knows the words of addresses, and nothing of what lies at them.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Whether a location is an address, `s3://bucket/cache`, and not a path.
pub fn is_url(location: impl AsRef<Path>) -> bool {
    let Some((scheme, _)) = location.as_ref().to_str().and_then(|text| text.split_once("://")) else { return false };
    scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// What is called `name` in a directory, or under an address.
pub fn inside(location: impl AsRef<Path>, name: &str) -> PathBuf {
    let location = location.as_ref();
    match location.to_str() {
        Some(url) if is_url(location) => format!("{}/{name}", url.trim_end_matches('/')).into(),
        _ => location.join(name),
    }
}

/// The directory that a `file://` address names; `None` for any other.
///
/// # Errors
/// [`Error::Usage`] when it is on another machine, or no path.
pub(super) fn local_directory(url: &str) -> Result<Option<PathBuf>> {
    let Some(rest) = url.strip_prefix("file://") else { return Ok(None) };
    let wrong = |problem: &str| Error::usage(format!("{url}: {problem}"), "write it as file:///path/to/cache");
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err(wrong("this address names another machine, or no path"));
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut left = path.bytes();
    while let Some(byte) = left.next() {
        let digits = |left: &mut std::str::Bytes<'_>| {
            let digit = |byte: u8| (byte as char).to_digit(16);
            Some(digit(left.next()?)? * 16 + digit(left.next()?)?)
        };
        bytes.push(match byte {
            b'%' => digits(&mut left).ok_or_else(|| wrong("a % is followed by no two hex digits"))? as u8,
            byte => byte,
        });
    }
    let path = String::from_utf8(bytes).map_err(|_| wrong("the path is not UTF-8"))?;
    Ok(Some(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_paths() {
        for url in ["s3://bucket/cache", "gs://b", "https://host:8080/a", "file:///a", "abfs+x://c@a/b"] {
            assert!(is_url(url), "{url}");
        }
        for path in ["runs/a/cache", "/data/s3:/x", "://x", "c:/caches", "3s://x", "a b://c"] {
            assert!(!is_url(path), "{path}");
        }
        assert_eq!(inside("s3://bucket/cache/", "train"), Path::new("s3://bucket/cache/train"));
        assert_eq!(inside("runs/cache", "train"), Path::new("runs/cache/train"));
    }

    #[test]
    fn a_file_address_is_a_directory() {
        assert_eq!(local_directory("s3://bucket/cache").unwrap(), None);
        assert_eq!(local_directory("file:///a/b%20c").unwrap(), Some("/a/b c".into()));
        assert_eq!(local_directory("file://localhost/a").unwrap(), Some("/a".into()));
        for (url, problem) in [
            ("file://host/a", "this address names another machine, or no path"),
            ("file:///a%2", "a % is followed by no two hex digits"),
            ("file:///a%ff", "the path is not UTF-8"),
        ] {
            let error = local_directory(url).unwrap_err().to_string();
            assert_eq!(error, format!("{url}: {problem}; write it as file:///path/to/cache"));
        }
    }
}
