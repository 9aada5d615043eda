//! Results on stdout. A reader that goes away early is not a failure.

use std::io::{ErrorKind, IsTerminal, Write};

use limbeck::{Error, Result};

const STDOUT: &str = "<stdout>";

/// Writes results, and lets the reader have them now.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::io(STDOUT))
}

/// Characters in a line of the terminal that results go to: what `COLUMNS` says, else the terminal itself. `None` where
/// they go to a file or a pipe.
pub fn width() -> Option<usize> {
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).filter(|columns| *columns > 0);
    let terminal = || console::Term::stdout().size_checked().map(|(_, columns)| usize::from(columns));
    if std::io::stdout().is_terminal() { said.or_else(terminal) } else { None }
}

/// Says something on stderr. Whoever reads that may be gone, which is no reason to end a run.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Whether an error says no more than that nobody reads our results any longer.
pub fn is_closed(error: &Error) -> bool {
    matches!(error, Error::Io { path, source } if path.as_os_str() == STDOUT && source.kind() == ErrorKind::BrokenPipe)
}
