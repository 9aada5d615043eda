//! `inspect`: what a path holds, decided by what it is.

use limbeck::cache::is_url;
use limbeck::checkpoint::is_gguf;
use limbeck::hub::is_hub;
use limbeck::inputs::Inputs;
use limbeck::recipe::{Plan, Recipe};
use limbeck::run::RunOptions;
use limbeck::{Error, Result};

use crate::cli::InspectArgs;
use crate::output::print;
use crate::{inspect_cache, inspect_checkpoint};

pub fn run(args: &InspectArgs) -> Result<()> {
    let path = &args.path;
    if is_url(path) {
        if args.tensors || !args.set.is_empty() {
            let problem = format!("{} is the address of a cache", path.display());
            return Err(Error::usage(problem, "use --set with recipes and --tensors with checkpoints only"));
        }
        return inspect_cache::run(args);
    }
    if is_hub(path) {
        return inspect_checkpoint::run(args);
    }
    if !path.exists() {
        let problem = format!("there is nothing at {}", path.display());
        return Err(Error::usage(
            problem,
            "name a recipe, a .gguf file, or the directory of a cache, a checkpoint or a run",
        ));
    }
    let holds = |name: &str| path.join(name).is_file();
    let is_gguf = path.is_file() && is_gguf(path);
    let is_recipe = path.is_file() && !is_gguf || holds("recipe.toml");
    if !is_recipe && !args.set.is_empty() {
        return Err(Error::usage(format!("{} is not a recipe", path.display()), "use --set with recipes only"));
    }
    let is_cache = !is_recipe && (holds("manifest.json") || holds("train/manifest.json"));
    if args.verify && !is_cache {
        let problem = format!("{} is not a cache", path.display());
        return Err(Error::usage(problem, "use --verify with caches only: the `cache` folder of a run, for example"));
    }
    for (flag, given) in [("--json", args.json), ("--html", args.html.is_some())] {
        if given && !is_cache {
            let problem = format!("{} is not a cache", path.display());
            return Err(Error::usage(problem, format!("use {flag} with caches only")));
        }
    }
    if args.tensors && (is_recipe || is_cache) {
        let problem = format!("{} is not a checkpoint", path.display());
        return Err(Error::usage(
            problem,
            "use --tensors with checkpoints only: a step in a run's `checkpoints` folder",
        ));
    }
    if is_recipe {
        let (file, run_dir) =
            if path.is_file() { (path.clone(), None) } else { (path.join("recipe.toml"), Some(path.clone())) };
        let recipe = Recipe::load(file, &args.set)?;
        print(&plan(&recipe, &RunOptions { run_dir, ..RunOptions::default() })?.to_string())
    } else if is_cache {
        inspect_cache::run(args)
    } else if is_gguf || holds("config.json") || holds("params.json") {
        inspect_checkpoint::run(args)
    } else {
        Err(Error::file(
            path,
            "holds no recipe.toml, manifest.json, config.json or params.json",
            "name a recipe, a .gguf file, or the directory of a cache, a checkpoint or a run",
        ))
    }
}

/// The plan with the models' sizes; without them, and with a warning, when they cannot be had.
fn plan(recipe: &Recipe, options: &RunOptions) -> Result<Plan> {
    match Inputs::open(recipe, options) {
        Ok(inputs) => Ok(inputs.plan),
        Err(error) => {
            let mut plan = Plan::new(recipe, options)?;
            plan.warnings.push(format!("the models' sizes are not known: {error}"));
            Ok(plan)
        }
    }
}
