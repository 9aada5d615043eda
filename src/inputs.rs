//! What a run reads, opened and checked before anything is computed: tokenizer, models' configurations, data settings.

use std::path::Path;

use crate::{
    cache::{CacheReader, CacheSettings, Expectation},
    checkpoint::read_configuration,
    data::{DataConfig, HeldOut},
    durable,
    error::{Error, Result},
    hub, memory,
    models::{DecoderConfig, read_config},
    profile::stage,
    recipe::{MicroBatch, ModelSize, Plan, Recipe},
    run::RunOptions,
    tokenizer::Tokenizer,
};

const RECIPE_FILE: &str = "recipe.toml";
const PLAN_FILE: &str = "plan.json";

/// A recipe's inputs, and its plan with the models' sizes.
pub struct Inputs {
    pub plan: Plan,
    pub tokenizer: Tokenizer,
    pub data: DataConfig,
    pub student: DecoderConfig,
    pub teacher: Option<DecoderConfig>,
}

impl Inputs {
    /// # Errors
    /// When a file is missing or malformed, and when recipe, tokenizer and models do not fit each other.
    pub fn open(recipe: &Recipe, options: &RunOptions) -> Result<Self> {
        let _span = stage("open what the recipe names");
        for (key, checkpoint) in checkpoints(recipe) {
            check_path(
                recipe,
                key,
                checkpoint,
                "give the path of a model directory in Hugging Face layout, or of a .gguf file",
            )?;
        }
        let teacher = match recipe.teacher_checkpoint() {
            Some(checkpoint) => {
                let (path, config) = read_configuration(checkpoint)?;
                Some(read_config(&path, &config)?)
            }
            None => None,
        };
        let tokenizer = tokenizer(recipe)?;
        check_tokenizers(recipe, &tokenizer)?;
        let student = recipe.student_config(&tokenizer)?;
        recipe.check_seq_len("the student", student.max_position)?;
        recipe.check_tap(u64::MAX, student.vocab_size)?;
        let mut routers = None;
        if let Some(teacher) = &teacher {
            recipe.check_seq_len("the teacher", teacher.max_position)?;
            recipe.check_selection(teacher.vocab_size)?;
            recipe.check_mesh(teacher)?;
            routers = recipe.kept_routers(teacher)?;
            recipe.router_distillation(&student, routers.as_ref())?;
        } else if recipe.remote_teacher().is_some() {
            recipe.check_selection(student.vocab_size)?;
        }
        let teacher_vocab = match &recipe.cache.train {
            Some(cache) => {
                let captured = captured(cache, &tokenizer)?;
                recipe.router_distillation(&student, captured.router())?;
                Some(captured.tokenizer.vocab_size)
            }
            None => teacher.as_ref().map(|teacher| teacher.vocab_size),
        };
        recipe.check_vocabulary(student.vocab_size, tokenizer.vocab_size(), teacher_vocab)?;
        let mut plan = Plan::new(recipe, options)?;
        plan.set_routers(routers.map_or(0, |routers| routers.width() as u64))?;
        plan.set_models(size(&student), teacher.as_ref().map(size));
        if recipe.train.micro_batch_tokens == Some(MicroBatch::Auto) {
            if options.device != "cpu" {
                let problem =
                    format!("is \"auto\", and the free memory of `--device {}` is not known here", options.device);
                return Err(recipe.error("train.micro_batch_tokens", problem, "give a number of tokens"));
            }
            plan.fit_micro_batch(memory::free());
        }
        if let Some(upcycling) = recipe.upcycling(&student)?
            && !upcycling.keeps_the_function()
        {
            plan.warnings
                .push("the student begins with parts of student.init.from, and computes something else".into());
        }
        plan.tokenizer = Some(tokenizer.fingerprint());
        plan.held_out_share = kept_share(&plan);
        Ok(Inputs { data: data(recipe, &plan), plan, tokenizer, student, teacher })
    }

    /// Turns an amount of held-out tokens into the share of the documents that it comes to, which takes a pass over the
    /// data. Nothing is left to do when the run directory's plan has the share already.
    ///
    /// # Errors
    /// When the data cannot be read, or has fewer tokens than are to be held out.
    pub fn resolve_held_out(&mut self) -> Result<()> {
        if let HeldOut::Tokens(_) = self.data.held_out {
            self.data.held_out = self.data.resolve_held_out(&self.tokenizer)?;
        }
        if let HeldOut::Share(share) = self.data.held_out {
            self.plan.held_out_share = Some(share);
        }
        Ok(())
    }

    /// Writes recipe and plan into the run directory, for whoever wants to know what was run, and for later runs there.
    pub fn freeze(&self) -> Result<()> {
        let dir = &self.plan.run_dir;
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        durable::write_bytes(&dir.join(RECIPE_FILE), self.plan.recipe.to_toml().as_bytes())?;
        durable::write_bytes(&dir.join(PLAN_FILE), self.plan.to_json().as_bytes())
    }

    /// Whether the text is there, which only filling a cache needs.
    ///
    /// # Errors
    /// When a source is missing or is none that can be read.
    pub fn check_text(&self, recipe: &Recipe) -> Result<()> {
        let held_out = match &recipe.data.held_out {
            HeldOut::Sources(sources) => sources.as_slice(),
            _ => &[],
        };
        let tip = "give the path of a text, JSON Lines or Parquet file";
        for (list, sources) in [("data.sources", recipe.data.sources.as_slice()), ("data.held_out", held_out)] {
            for (number, source) in sources.iter().enumerate() {
                // What a pattern matches is found out below.
                if !source.path.contains(['*', '?', '[']) {
                    check_path(recipe, &format!("{list}[{number}].path"), Path::new(&source.path), tip)?;
                }
            }
        }
        self.data.check_files()
    }

    /// The tokenizer's files, as a checkpoint carries them.
    pub fn tokenizer_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.tokenizer.files()
    }
}

/// The settings of a finished cache, whose token ids must be the tokenizer's.
fn captured(cache: &Path, tokenizer: &Tokenizer) -> Result<CacheSettings> {
    let expectation = Expectation { tokenizer_fingerprint: Some(tokenizer.fingerprint()), ..Expectation::default() };
    Ok(CacheReader::open_expecting(cache, &expectation)?.manifest().settings.clone())
}

/// The held-out share that the run directory's plan has for the same data. So documents stay on their side of the split
/// when files are added, and the data is not read again for it.
fn kept_share(plan: &Plan) -> Option<f64> {
    let text = std::fs::read(plan.run_dir.join(PLAN_FILE)).ok()?;
    // A plan that cannot be read any more is as good as none: it is written again.
    let kept: Plan = serde_json::from_slice(&text).ok()?;
    let decisive = |plan: &Plan| (plan.recipe.data.clone(), plan.recipe.seed, plan.tokenizer.clone());
    kept.held_out_share.filter(|_| decisive(&kept) == decisive(plan))
}

/// The checkpoints a recipe names, each under its key.
fn checkpoints(recipe: &Recipe) -> impl Iterator<Item = (&'static str, &Path)> {
    let teacher = recipe.teacher_checkpoint().into_iter().map(|teacher| ("teacher.checkpoint", teacher.as_path()));
    let student = recipe.student.checkpoint.iter().map(|checkpoint| ("student.checkpoint", checkpoint.as_path()));
    let donor = recipe.student.init.iter().map(|init| ("student.init.from", init.from.as_path()));
    teacher.chain(student).chain(donor)
}

/// Refuses a path that leads nowhere, as the slip in the recipe that it is.
fn check_path(recipe: &Recipe, key: &str, path: &Path, tip: &str) -> Result<()> {
    if hub::is_hub(path) || path.exists() {
        return Ok(());
    }
    Err(recipe.error(key, format!("is {}, which does not exist", path.display()), tip))
}

/// Refuses a tokenizer other than the one a model was made with: its token ids would mean something else.
fn check_tokenizers(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<()> {
    for (key, checkpoint) in checkpoints(recipe) {
        let Some(own) = Tokenizer::of_checkpoint(checkpoint)?.filter(|own| own != tokenizer.path()) else { continue };
        let own = match Tokenizer::open(&own) {
            // A vocabulary of a kind that is not read from there; the recipe names another in its place.
            Err(error @ Error::Config { .. }) => {
                tracing::warn!("the tokenizer that `{key}` holds is not compared with the one in use: {error}");
                continue;
            }
            own => own?,
        };
        if own.fingerprint() != tokenizer.fingerprint() {
            let side = |tokenizer: &Tokenizer| {
                let fingerprint: String = tokenizer.fingerprint().chars().take(16).collect();
                format!("{} tokens, fingerprint {fingerprint}...", tokenizer.vocab_size())
            };
            return Err(Error::Mismatch {
                what: "the tokenizer".into(),
                left_name: format!("`{key}` {}", checkpoint.display()),
                left: side(&own),
                right_name: tokenizer.path().display().to_string(),
                right: side(tokenizer),
                tip: "make `data.tokenizer` the model's own, or leave it away".into(),
            });
        }
    }
    Ok(())
}

fn tokenizer(recipe: &Recipe) -> Result<Tokenizer> {
    let teacher = recipe.teacher_checkpoint();
    let Some(path) = recipe.data.tokenizer.as_ref().or(teacher).or(recipe.student.checkpoint.as_ref()) else {
        let tip = "name a tokenizer.json or its folder, or make one with `limbeck tokenizer train`";
        return Err(recipe.error("data.tokenizer", "is missing and no model brings one", tip));
    };
    let tip = "name a tokenizer.json or its folder, or make one with `limbeck tokenizer train`";
    check_path(recipe, "data.tokenizer", path, tip)?;
    let data = &recipe.data;
    Tokenizer::open(path)?.with_document_tokens(data.document_start.as_deref(), data.document_end.as_deref())
}

/// The data as a recipe says, with the held-out share of the plan in an amount's place.
fn data(recipe: &Recipe, plan: &Plan) -> DataConfig {
    DataConfig {
        tokens: Some(recipe.data.tokens),
        held_out: plan.held_out_share.map_or(recipe.data.held_out.clone(), HeldOut::Share),
        seed: recipe.seed,
        ..DataConfig::new(recipe.data.sources.clone(), recipe.data.seq_len)
    }
}

fn size(config: &DecoderConfig) -> ModelSize {
    let (total_parameters, active_parameters) = config.parameter_counts();
    let experts = config.expert_layers().first().map_or(String::new(), |(_, count)| format!(" of {count} experts"));
    let kind = config.json.get("model_type").and_then(|kind| kind.as_str()).unwrap_or("decoder");
    ModelSize {
        description: format!("{kind}, {} layers{experts}", config.layers.len()),
        total_parameters,
        active_parameters,
        layers: config.layers.len() as u64,
        hidden: config.hidden_size as u64,
        heads: config.heads.query_heads as u64,
        vocab: config.vocab_size as u64,
    }
}
