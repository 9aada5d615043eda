//! `distill`: one recipe, the whole line.

use limbeck::Result;

use crate::cli::RunArgs;
use crate::output::{print, width};
use crate::setup::{recipe_and_options, stop_on_signals};

pub fn run(args: &RunArgs) -> Result<()> {
    let (recipe, options) = recipe_and_options(&args.recipe, &args.run)?;
    stop_on_signals(&options.stop)?;
    let report = limbeck::distill::run(&recipe, &options)?;
    let page = options.run_dir(&recipe).join("report.html");
    print(&format!("{}\nreport: {}\n", report.table_within(width()).trim_end(), page.display()))
}
