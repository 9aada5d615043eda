//! From what was typed to a recipe and the options of its run; logging and signals.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use limbeck::profile::PROFILE_FILE;
use limbeck::recipe::Recipe;
use limbeck::run::RunOptions;
use limbeck::{Error, Result};
use tracing::Level;

use crate::cli::{RunFlags, Verbosity};
use crate::output::say;

/// Sends the log to stderr.
pub fn log(verbosity: &Verbosity) {
    let level = match (verbosity.quiet, verbosity.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::INFO,
        (false, 1) => Level::DEBUG,
        (false, _) => Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(level == Level::TRACE)
        .without_time()
        // By default it panics where stderr is closed, and a run would end with whoever reads its log.
        .log_internal_errors(false)
        .init();
}

/// The recipe at `target`, or the frozen one of the run directory `target`, and the options of its run.
pub fn recipe_and_options(target: &Path, flags: &RunFlags) -> Result<(Recipe, RunOptions)> {
    let frozen = target.join("recipe.toml");
    let (path, run_dir) = if frozen.is_file() {
        if flags.run_dir.is_some() {
            let problem = format!("{} is a run directory, and --run-dir is given as well", target.display());
            return Err(Error::usage(problem, "name one of the two"));
        }
        (frozen.as_path(), Some(target.to_path_buf()))
    } else {
        (target, flags.run_dir.clone())
    };
    let recipe = Recipe::load(path, &flags.set)?;
    let mut options = RunOptions { run_dir, device: flags.device.device.clone(), ..RunOptions::default() };
    if let Some(file) = &flags.profile {
        options.profile = Some(file.clone().unwrap_or_else(|| options.run_dir(&recipe).join(PROFILE_FILE)));
    }
    // Refused here, before anything is read or computed.
    options.device()?;
    Ok((recipe, options))
}

/// Makes the first Ctrl-C, or the first SIGTERM of a scheduler, ask the run to stop, and the second one end it at once.
/// A terminal that hangs up is left to `nohup` and the shell.
pub fn stop_on_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    let stop = stop.clone();
    let handler = move || {
        if stop.swap(true, Ordering::Relaxed) {
            say("error: stopped before the state was saved; the same command goes on from what was saved earlier");
            std::process::exit(1);
        }
        say("stopping as soon as the state is saved; press Ctrl-C again to stop at once");
    };
    on_signals(handler).map_err(|problem| {
        Error::usage(format!("signals cannot be handled: {problem}"), "run in an ordinary terminal session")
    })
}

#[cfg(unix)]
fn on_signals(handler: impl Fn() + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    std::thread::spawn(move || signals.forever().for_each(|_| handler()));
    Ok(())
}

#[cfg(not(unix))]
fn on_signals(handler: impl Fn() + Send + 'static) -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(handler)
}
