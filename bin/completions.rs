//! `completions`: a script that completes commands and flags in a shell.

use clap::CommandFactory;
use limbeck::Result;

use crate::cli::{Cli, CompletionsArgs};
use crate::output::print;

pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut Cli::command(), "limbeck", &mut script);
    print(&String::from_utf8_lossy(&script))
}
