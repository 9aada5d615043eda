//! Results on stdout. A reader that goes away early is not a failure.

use std::io::{ErrorKind, Write};

use limbeck::{Error, Result};

const STDOUT: &str = "<stdout>";

/// Writes results, and lets the reader have them now.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::io(STDOUT))
}

/// Whether an error says no more than that nobody reads our results any longer.
pub fn is_closed(error: &Error) -> bool {
    matches!(error, Error::Io { path, source } if path.as_os_str() == STDOUT && source.kind() == ErrorKind::BrokenPipe)
}
