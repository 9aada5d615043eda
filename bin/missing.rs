//! Stands in for the commands whose library side is not in this build.

use limbeck::{Error, Result};

pub fn run<T: std::fmt::Debug>(args: &T) -> Result<()> {
    Err(Error::usage(format!("this build cannot do {args:?}"), "use a later version"))
}
