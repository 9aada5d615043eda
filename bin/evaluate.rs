//! `evaluate`: the held-out measures of a run's latest checkpoints, once more.

use limbeck::Result;

use crate::cli::EvaluateArgs;
use crate::output::{print, width};
use crate::setup::recipe_and_options;

pub fn run(args: &EvaluateArgs) -> Result<()> {
    let (recipe, options) = recipe_and_options(&args.target, &args.run)?;
    let report = limbeck::distill::report(&recipe, &options)?;
    let page = options.run_dir(&recipe).join("report.html");
    print(&format!("{}\nreport: {}\n", report.table_within(width()).trim_end(), page.display()))
}
