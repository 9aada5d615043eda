//! `precompute-teacher-logits`: fill the cache of a recipe, and stop.

use limbeck::Result;

use crate::cli::RunArgs;
use crate::output::print;
use crate::setup::{recipe_and_options, stop_on_ctrl_c};

pub fn run(args: &RunArgs) -> Result<()> {
    let (recipe, options) = recipe_and_options(&args.recipe, &args.run)?;
    stop_on_ctrl_c(&options.stop)?;
    let cache = limbeck::precompute::run(&recipe, &options)?;
    print(&format!("cache: {}\n", cache.display()))
}
