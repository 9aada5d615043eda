//! `--dry-run`: the plan of a recipe, and nothing else.

use std::path::Path;

use limbeck::Result;
use limbeck::inputs::Inputs;

use crate::cli::RunFlags;
use crate::output::print;
use crate::setup::recipe_and_options;

pub fn run(target: &Path, flags: &RunFlags) -> Result<()> {
    let (recipe, options) = recipe_and_options(target, flags)?;
    let inputs = Inputs::open(&recipe, &options)?;
    inputs.check_text(&recipe)?;
    print(&inputs.plan.to_string())
}
