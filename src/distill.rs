//! The second driver: fill the cache, train the student and its control, measure both, write the report.

use std::{path::Path, time::Instant};

use burn::tensor::Device;

use crate::{
    cache::{CacheReader, Summary, TeacherIdentity, TokenizerIdentity},
    checkpoint::{CheckpointReader, TrainState, latest_checkpoint},
    error::{Error, Result},
    eval::{
        cache_page,
        held_out::{evaluate, teacher_evaluation},
        report::{Arm, CacheFacts, Curves, Fact, Report, Role},
    },
    inputs::Inputs,
    loss::{DistillLossConfig, Weighting},
    models::{Decoder, RandomWeights, parameter::CheckpointWeights},
    precompute::{self, Caches},
    profile::{record, stage},
    progress::{Progress, Unit},
    recipe::{MicroBatch, Recipe},
    run::RunOptions,
    selection::Selection,
    tap::CacheTap,
    targets::{TargetKind, TargetSource},
    train::{
        TrainConfig, TrainOutput, Trainer,
        balance::RouterConfig,
        metrics::{EvalMetrics, read_metrics},
        trainer::AVERAGE_DIR,
    },
};

/// Runs a recipe from text to report.
///
/// # Errors
/// Whatever is wrong with the recipe and its files; [`Error::Interrupted`] when asked to stop, with the state saved.
pub fn run(recipe: &Recipe, options: &RunOptions) -> Result<Report> {
    record(options.profile.as_deref(), "distill", || run_all(recipe, options))
}

fn run_all(recipe: &Recipe, options: &RunOptions) -> Result<Report> {
    let mut inputs = Inputs::open(recipe, options)?;
    let caches = precompute::fill(recipe, &mut inputs, options)?;
    for warning in &inputs.plan.warnings {
        tracing::warn!("{warning}");
    }
    let run = Run { recipe, options, inputs: &inputs, caches: &caches, device: options.device()? };
    for role in run.roles() {
        let trainer = run.trainer(role)?;
        // Only now: a run that refuses to go on with other settings must not lose the ones it was made with.
        inputs.freeze()?;
        run.train(role, trainer)?;
    }
    run.report()
}

/// Measures the latest checkpoints of a finished run once more, and writes its report again.
pub fn report(recipe: &Recipe, options: &RunOptions) -> Result<Report> {
    record(options.profile.as_deref(), "evaluate", || {
        let mut inputs = Inputs::open(recipe, options)?;
        let caches = precompute::open(&inputs)?;
        inputs.plan.set_sequence_count(caches.train.sequence_count())?;
        Run { recipe, options, inputs: &inputs, caches: &caches, device: options.device()? }.report()
    })
}

/// What the fingerprint of a teacher in training starts with: it is of the run, and not of weights.
const IN_TRAINING: &str = "training:";

struct Run<'a> {
    recipe: &'a Recipe,
    options: &'a RunOptions,
    inputs: &'a Inputs,
    caches: &'a Caches,
    device: Device,
}

impl Run<'_> {
    fn roles(&self) -> Vec<Role> {
        if self.recipe.has_control() { vec![Role::Student, Role::Control] } else { vec![Role::Student] }
    }

    /// Where an arm keeps its checkpoints: the student in the run directory itself.
    fn arm_dir(&self, role: Role) -> std::path::PathBuf {
        match role {
            Role::Control => self.inputs.plan.run_dir.join("control"),
            _ => self.inputs.plan.run_dir.clone(),
        }
    }

    fn metrics(&self) -> std::path::PathBuf {
        self.inputs.plan.run_dir.join("metrics.jsonl")
    }

    /// A new student, or the one to go on from; the same weights for student and control.
    fn student(&self) -> Result<Decoder> {
        let tracked = self.device.clone().autodiff();
        let student = &self.recipe.student;
        match &student.checkpoint {
            Some(checkpoint) => Decoder::open(checkpoint, &tracked),
            None => {
                let seed = student.init_seed.unwrap_or(self.recipe.seed);
                let fresh = RandomWeights { seed, std: student.init_std() };
                match (&student.init, self.recipe.upcycling(&self.inputs.student)?) {
                    (Some(init), Some(upcycling)) => {
                        let reader = CheckpointReader::open(&init.from)?;
                        let donor = CheckpointWeights::new(&reader);
                        Decoder::load(self.inputs.student.clone(), &upcycling.weights(&donor), &tracked)
                    }
                    _ => Decoder::load(self.inputs.student.clone(), &fresh, &tracked),
                }
            }
        }
    }

    /// An arm where it stands: at its latest checkpoint, or before its first step.
    fn trainer(&self, role: Role) -> Result<Trainer> {
        let (recipe, plan) = (self.recipe, &self.inputs.plan);
        let (learning_rate, weighting) = match role {
            Role::Control => (recipe.control_learning_rate(), Weighting::hard_only()),
            _ => (recipe.train.lr.learning_rate(), recipe.weighting()),
        };
        let mut loss = DistillLossConfig::new(recipe.loss.divergence)
            .with_tail(recipe.loss.tail)
            .with_temperature(recipe.loss.temperature as f32, recipe.loss.t_scale)
            .with_weighting(weighting, plan.steps);
        if recipe.has_sampled_targets() {
            loss = loss.with_sampled_targets();
        }
        let loss = loss.init()?;
        let train = &recipe.train;
        let kept = self.caches.train.manifest().settings.router();
        // A control has the text alone.
        let follow = match role {
            Role::Control => None,
            _ => recipe.router_distillation(&self.inputs.student, kept)?,
        };
        let config = TrainConfig {
            arm: role.name().into(),
            steps: plan.steps,
            sequences_per_step: plan.sequences_per_step,
            sequences_per_micro_batch: plan.sequences_per_micro_batch,
            learning_rate,
            automatic_micro_batch: train.micro_batch_tokens == Some(MicroBatch::Auto),
            optimizer: train.optimizer(),
            router: RouterConfig { follow, ..train.router() },
            guards: train.guards.clone(),
            average: train.ema,
            checkpoint_activations: train.checkpoint_activations,
            seed: train.seed.unwrap_or(recipe.seed),
            checkpoint_every: train.checkpoint_every,
            keep_checkpoints: train.keep_checkpoints,
            log_every: train.log_every,
            evaluate_every: train.evaluate_every.unwrap_or(train.checkpoint_every),
            data: self.caches.train.manifest().root.clone(),
        };
        let trainer = Trainer::new(config, self.student()?, loss, self.caches.train.sequence_count())?;
        trainer.resume(&self.arm_dir(role), &self.device.clone().autodiff())
    }

    fn train(&self, role: Role, mut trainer: Trainer) -> Result<()> {
        let _span = stage(if role == Role::Control { "train the control" } else { "train the student" });
        let (train, plan) = (&self.recipe.train, &self.inputs.plan);
        let mut tap = if role == Role::Student { self.tap(&trainer)? } else { None };
        if trainer.step_count() == plan.steps {
            return tap.map_or(Ok(()), CacheTap::finish);
        }
        let output = TrainOutput {
            dir: self.arm_dir(role),
            files: self.inputs.tokenizer_files()?,
            metrics: self.metrics(),
            tensorboard: train.tensorboard.then(|| plan.run_dir.join("tensorboard")),
            progress: Progress::new(role.name(), plan.trained_tokens, Unit::Tokens),
            stop: self.options.stop.clone(),
            tap: tap.as_mut().map(|tap| tap as _),
            evaluate: self.caches.held_out.as_ref().map(|held_out| {
                let bytes_per_token = bytes_per_token(held_out);
                let tokens = train.evaluate_tokens;
                Box::new(move |model: &Decoder| {
                    let measured = evaluate(model, held_out, bytes_per_token, Some(tokens))?;
                    Ok(EvalMetrics {
                        arm: String::new(),
                        step: 0,
                        cross_entropy: measured.cross_entropy,
                        perplexity: measured.perplexity,
                        bits_per_byte: measured.bits_per_byte,
                        kl_to_teacher: measured.kl_to_teacher,
                        top1_agreement: measured.top1_agreement,
                        averaged_cross_entropy: None,
                        averaged_kl_to_teacher: None,
                    })
                }) as _
            }),
        };
        trainer.run(&self.caches.train, output)?;
        tap.map_or(Ok(()), CacheTap::finish)
    }

    /// What the student predicts while it is trained, as a cache, from where the trainer is.
    fn tap(&self, trainer: &Trainer) -> Result<Option<CacheTap>> {
        let (recipe, plan) = (self.recipe, &self.inputs.plan);
        let Some(section) = &recipe.tap else { return Ok(None) };
        let train = &self.caches.train.manifest().settings;
        let start = match &recipe.student.checkpoint {
            Some(checkpoint) => CheckpointReader::open(checkpoint)?.fingerprint()?,
            None => {
                let fresh =
                    format!("{} {}", recipe.student.init_seed.unwrap_or(recipe.seed), recipe.student.init_std());
                match &recipe.student.init {
                    None => fresh,
                    Some(init) => {
                        let donor = CheckpointReader::open(&init.from)?.fingerprint()?;
                        format!("{fresh} {donor} {:?}", init.layers)
                    }
                }
            }
        };
        let run = serde_json::json!([trainer.identity(), start]);
        let steps = section.steps(plan.steps, plan.sequences_per_step);
        // What is seen, and in which order, follows from the cache that is trained on and from the run.
        let data = serde_json::json!([trainer.identity()["data"], trainer.identity()["seed"], steps]);
        let hash = |value: serde_json::Value| blake3::hash(value.to_string().as_bytes()).to_hex().to_string();
        let teacher = TeacherIdentity {
            name: recipe.name.clone(),
            fingerprint: format!("{IN_TRAINING}{}", hash(run)),
            dtype: "f32".into(),
            in_training: Some(steps),
        };
        let tokenizer = TokenizerIdentity {
            fingerprint: train.tokenizer.fingerprint.clone(),
            vocab_size: self.inputs.student.vocab_size,
        };
        let settings = section.settings(teacher, hash(data), tokenizer, train.seq_len);
        let token_bytes = self.inputs.tokenizer.token_byte_lengths();
        let checkpoint = latest_checkpoint(self.arm_dir(Role::Student))?.map(|(_, path)| path);
        CacheTap::resume(&plan.tap_dir(), settings, token_bytes, trainer.step_count(), checkpoint.as_deref()).map(Some)
    }

    fn report(&self) -> Result<Report> {
        let _span = stage("report");
        let plan = &self.inputs.plan;
        let mut report = Report::new(&self.recipe.name);
        let metrics = if self.metrics().is_file() { read_metrics(self.metrics())? } else { vec![] };
        for role in self.roles() {
            let dir = self.arm_dir(role);
            let Some((_, checkpoint)) = latest_checkpoint(&dir)? else {
                return Err(Error::file(&dir, "there is no checkpoint", "train first, with `limbeck distill`"));
            };
            let curves = Curves::from_metrics(role, &metrics);
            report.arms.extend(self.arm(role, &checkpoint, &curves)?);
            // The control is there to compare the student with, as it was trained.
            if role == Role::Student && checkpoint.join(AVERAGE_DIR).is_dir() {
                report.arms.extend(self.arm(Role::Averaged, &checkpoint.join(AVERAGE_DIR), &curves)?);
            }
            report.curves.push(curves);
        }
        if let (Some(held_out), Some(teacher)) = (&self.caches.held_out, &self.inputs.teacher) {
            let (parameters_total, parameters_active) = teacher.parameter_counts();
            report.arms.push(Arm {
                role: Role::Teacher,
                name: file_name(&self.recipe.teacher.as_ref().expect("has a teacher").checkpoint),
                parameters_total,
                parameters_active,
                evaluation: teacher_evaluation(held_out, bytes_per_token(held_out))?,
                train_seconds: None,
                tokens_seen: None,
                tokens_per_second: None,
                best: None,
            });
        }
        if self.caches.held_out.is_some() && self.recipe.has_soft_targets() {
            let summary = self.caches.train.summary()?;
            report.histograms = cache_page::histograms(&summary);
            report.cache = Some(self.cache_facts(&summary));
        }
        report.plan = plan
            .to_string()
            .lines()
            .map(|line| {
                let (name, value) = line.split_at(line.len().min(12));
                Fact::new(name.trim(), value.trim())
            })
            .collect();
        report.recipe = self.recipe.to_toml();
        report.commands = vec![format!("limbeck distill {}", self.recipe.path().display())];
        report.write(&plan.run_dir)?;
        Ok(report)
    }

    /// The arm's measures on all held-out text; nothing when nothing was held out.
    fn arm(&self, role: Role, checkpoint: &Path, curves: &Curves) -> Result<Option<Arm>> {
        let Some(held_out) = &self.caches.held_out else { return Ok(None) };
        let began = Instant::now();
        let model = Decoder::open(checkpoint, &self.device)?;
        let (parameters_total, parameters_active) = model.config.parameter_counts();
        let evaluation = evaluate(&model, held_out, bytes_per_token(held_out), None)?;
        tracing::debug!("{}: measured in {:.1} s", role.name(), began.elapsed().as_secs_f64());
        let rates: Vec<f64> =
            curves.tokens_per_second.iter().map(|&(_, rate)| rate).filter(|rate| rate.is_finite()).collect();
        let mean_rate = (!rates.is_empty()).then(|| rates.len() as f64 / rates.iter().map(|r| 1.0 / r).sum::<f64>());
        // The running mean lies in the checkpoint of the weights.
        let trained = if role == Role::Averaged { checkpoint.parent().expect("it is in one") } else { checkpoint };
        let state = TrainState::load(trained)?;
        let tokens_seen = state.tokens_seen;
        Ok(Some(Arm {
            role,
            name: self.recipe.name.clone(),
            parameters_total,
            parameters_active,
            evaluation,
            train_seconds: mean_rate.map(|rate| tokens_seen as f64 / rate),
            tokens_seen: Some(tokens_seen),
            tokens_per_second: mean_rate,
            best: serde_json::from_value(state.values["best"].clone()).unwrap_or_default(),
        }))
    }

    fn cache_facts(&self, summary: &Summary) -> CacheFacts {
        let capture = summary.captures.iter().find(|capture| capture.temperature == 1.0).or(summary.captures.first());
        let settings = &self.caches.train.manifest().settings;
        let selection = settings.soft_targets.as_ref().map(|soft_targets| &soft_targets.selection);
        // Weights of drawn ids have no tail, and an entropy that is not the teacher's.
        let capture = capture.filter(|_| selection.is_some_and(|selection| selection.kind() == TargetKind::Exact));
        let mut more = vec![
            Fact::new("codec", settings.codec.name()),
            Fact::new("kept", selection.map_or("nothing".into(), Selection::summary)),
        ];
        more.extend(capture.map(|capture| Fact::new("teacher's entropy", format!("{:.3} nats", capture.entropy))));
        more.push(Fact::new("root", &self.caches.train.manifest().root));
        CacheFacts {
            row_count: summary.counts.valid_rows,
            byte_count: summary.bytes,
            bytes_per_token: summary.bytes_per_token,
            kept_per_row: summary.kept_mean,
            tail_mass: capture.map_or(f64::NAN, |capture| capture.tail_mean),
            vocabulary_size: Some(settings.tokenizer.vocab_size as u64),
            more,
        }
    }
}

fn bytes_per_token(cache: &CacheReader) -> f64 {
    let counts = &cache.manifest().counts;
    counts.text_bytes as f64 / counts.valid_rows.max(1) as f64
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
