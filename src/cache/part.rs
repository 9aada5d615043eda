//! Which shards of a cache a writer fills.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use crate::error::{Error, Result};

/// Writer `index` (from 0) of `count`: fills the shards `s` with `s % count == index`. Reads as `1/4`, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriterPart {
    index: u64,
    count: u64,
}

impl WriterPart {
    /// The only writer there is.
    pub const WHOLE: WriterPart = WriterPart { index: 0, count: 1 };

    /// # Errors
    /// [`Error::Usage`] unless `index` is below `count`.
    pub fn new(index: u64, count: u64) -> Result<WriterPart> {
        if index < count {
            return Ok(WriterPart { index, count });
        }
        let problem = format!("there is no part {} of {count}", index.saturating_add(1));
        Err(Error::usage(problem, "parts are 1/N, 2/N, and so on to N/N"))
    }

    /// From 0.
    pub fn index(self) -> u64 {
        self.index
    }

    /// How many parts there are.
    pub fn count(self) -> u64 {
        self.count
    }

    pub fn is_whole(self) -> bool {
        self.count == 1
    }
}

impl Default for WriterPart {
    fn default() -> Self {
        WriterPart::WHOLE
    }
}

impl Display for WriterPart {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.index + 1, self.count)
    }
}

impl FromStr for WriterPart {
    type Err = Error;

    fn from_str(text: &str) -> Result<WriterPart> {
        let parts = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match parts {
            Some((index @ 1.., count)) => WriterPart::new(index - 1, count),
            _ => Err(Error::usage(format!("`{text}` names no part"), "parts are 1/N, 2/N, and so on to N/N")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_from_one_and_others_refused() {
        for text in ["1/1", "1/4", "4/4", "12/1000"] {
            assert_eq!(text.parse::<WriterPart>().unwrap().to_string(), text);
        }
        assert_eq!("3/4".parse::<WriterPart>().unwrap(), WriterPart { index: 2, count: 4 });
        let message = |text: &str| text.parse::<WriterPart>().unwrap_err().to_string();
        assert_eq!(message("5/4"), "there is no part 5 of 4; parts are 1/N, 2/N, and so on to N/N");
        for text in ["0/4", "", "3", "1/", "a/4", "1/4/2", "-1/4"] {
            assert_eq!(message(text), format!("`{text}` names no part; parts are 1/N, 2/N, and so on to N/N"));
        }
    }
}
