//! `--dry-run`: the plan of a recipe, and nothing else. `plan`: what its teacher takes on some hardware.

use std::path::Path;

use limbeck::Result;
use limbeck::checkpoint::read_configuration;
use limbeck::estimate::{
    Forecast, Hardware, Job, PRESETS, TeacherWork, WeightType, calibrate, estimates, teacher_text,
};
use limbeck::inputs::Inputs;
use limbeck::models::llama4::shapes;
use limbeck::models::{DecoderConfig, read_config};
use limbeck::recipe::{Recipe, cache_bytes};

use crate::cli::{PlanArgs, RunFlags, WeightsFlag};
use crate::output::print;
use crate::setup::recipe_and_options;

pub fn run(target: &Path, flags: &RunFlags) -> Result<()> {
    let (recipe, options) = recipe_and_options(target, flags)?;
    let inputs = Inputs::open(&recipe, &options)?;
    inputs.check_text(&recipe)?;
    print(&inputs.plan.to_string())
}

pub fn estimate(args: &PlanArgs) -> Result<()> {
    let measured = match &args.calibrate {
        Some(file) => {
            let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
            let disk = args.disk.as_deref().or(parent).unwrap_or(Path::new("."));
            let calibration = calibrate(disk)?;
            calibration.write(file)?;
            Some(calibration)
        }
        None => None,
    };
    let Some(recipe) = &args.recipe else {
        let (file, measured) = args.calibrate.as_ref().zip(measured).expect("the parser asks for one of them");
        return match args.json {
            true => print(&format!("{:#}\n", serde_json::json!(measured.hardware))),
            false => print(&format!("{}{}\n", measured.text(), file.display())),
        };
    };
    let recipe = Recipe::load(recipe, &args.set)?;
    let (name, config) = teacher(&recipe, args.teacher.as_deref())?;
    let (seq_len, tokens) = (recipe.data.seq_len as u64, recipe.data.tokens as f64);
    let batch = recipe.teacher.as_ref().map_or(4096, |teacher| teacher.batch_tokens).max(seq_len) / seq_len * seq_len;
    let weights = match args.weights {
        WeightsFlag::F32 => WeightType::F32,
        WeightsFlag::Bf16 => WeightType::Bf16,
        WeightsFlag::Fp8 => WeightType::Fp8,
    };
    let work = TeacherWork::new(&config, seq_len);
    let memory = args.memory.map(|gigabytes| gigabytes * 1e9);
    let selection = recipe.cache.selection();
    let shard = (recipe.shard_bytes(selection.most_ids() as u64), recipe.shard_bytes(selection.usual_ids() as u64));
    let job = Job { config: &config, weights, seq_len, tokens, batch_tokens: batch, memory, shard };
    let names: Vec<&str> = match args.hardware.is_empty() && measured.is_none() {
        true => PRESETS.to_vec(),
        false => args.hardware.iter().map(String::as_str).collect(),
    };
    let mut machines: Vec<Hardware> = measured.into_iter().map(|measured| measured.hardware).collect();
    machines.extend(names.into_iter().map(Hardware::named).collect::<Result<Vec<_>>>()?);
    machines.iter_mut().for_each(|hardware| hardware.price = args.price.or(hardware.price));
    let (mut text, mut json) = (teacher_text(&name, &work, weights), vec![]);
    let sequences = recipe.data.tokens.div_ceil(seq_len);
    let cache = &recipe.cache;
    let kept = cache.selection().usual_ids();
    let bytes = cache_bytes(cache.codec, sequences, seq_len, kept, cache.temperatures.len() as u64);
    text.push_str(&format!(
        "text        {:.4e} tokens in sequences of {seq_len}, {batch} at once\ncache       {}, about {:.3e} bytes, {:.0} for \
         each token\n",
        tokens,
        cache.codec.name(),
        bytes as f64,
        bytes as f64 / (sequences * seq_len) as f64,
    ));
    for hardware in &machines {
        let ways = estimates(&job, hardware);
        let forecast = Forecast { hardware, estimates: &ways, tokens };
        text.push_str(&forecast.text());
        json.push(forecast.json());
    }
    if args.json {
        let teacher = serde_json::json!({ "name": name, "parameters": work.total(), "flops_per_token": work.flops() });
        let all = serde_json::json!({ "teacher": teacher, "cache_bytes": bytes, "hardware": json });
        return print(&format!("{all:#}\n"));
    }
    print(&text)
}

/// The teacher's name and configuration: a named shape, another directory, or what the recipe says.
fn teacher(recipe: &Recipe, other: Option<&str>) -> Result<(String, DecoderConfig)> {
    let shape = match other {
        Some("scout") => Some(shapes::scout()),
        Some("maverick") => Some(shapes::maverick()),
        Some("behemoth") => Some(shapes::behemoth()),
        _ => None,
    };
    if let (Some(shape), Some(name)) = (shape, other) {
        let name = if name == "behemoth" { "behemoth (a shape assumed by this program)" } else { name };
        return Ok((name.to_string(), shape.decoder(Path::new(name))?));
    }
    if other.is_none() && recipe.remote_teacher().is_some() {
        let problem = "is `remote`, and no server says how large its model is";
        let tip = "give --teacher scout, maverick, behemoth, or the directory of a model";
        return Err(recipe.error("teacher.mode", problem, tip));
    }
    let own = recipe.teacher_checkpoint().map(|checkpoint| checkpoint.as_path());
    let Some(dir) = other.map(Path::new).or(own) else {
        return Err(recipe.error("teacher", "is missing", "add [teacher], or give --teacher"));
    };
    if other.is_none() && !dir.exists() {
        let problem = format!("is {}, which does not exist", dir.display());
        let tip = "give --teacher scout, maverick, behemoth, or the directory of a model";
        return Err(recipe.error("teacher.checkpoint", problem, tip));
    }
    let (config_path, config) = read_configuration(dir)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, read_config(&config_path, &config)?))
}
