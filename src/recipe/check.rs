//! What a recipe may say: ranges and contradictions that need nothing but the recipe, and the few checks that need a
//! model's or tokenizer's numbers.

use super::schema::{
    Dtype, LearningRateKind, LearningRateSection, Recipe, Shape, ShapeName, TeacherMode, TeacherSection,
};
use super::{micro_batch_key::MicroBatch, remote_teacher, router, student_init, tap, training};
use crate::data::{DataSource, HeldOut};
use crate::error::{Error, Result};
use crate::loss::{DistillLossConfig, Divergence, Weighting};
use crate::models::{DecoderConfig, llama4::sharding};

/// Refuses a recipe that cannot be run whatever the models are.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    check_name(recipe)?;
    check_data(recipe)?;
    check_teacher_and_cache(recipe)?;
    check_student(recipe)?;
    check_loss(recipe)?;
    check_sampled(recipe)?;
    router::check(recipe)?;
    check_train(recipe)?;
    training::check(recipe)?;
    tap::check(recipe)
}

impl Recipe {
    /// Refuses a selection that keeps nothing, or more ids than the vocabulary has.
    pub fn check_selection(&self, vocab_size: usize) -> Result<()> {
        if self.teacher.is_none() && vocab_size < usize::MAX {
            return Ok(());
        }
        self.cache.selection().check(vocab_size).map_err(|unusable| {
            let key = match self.cache.top_k {
                Some(_) => "cache.top_k".to_string(),
                None => format!("cache.selection.{}", unusable.parameter),
            };
            self.error(&key, unusable.problem, unusable.tip)
        })
    }

    /// Refuses sequences longer than a model is made for. `model` says whose maximum it is, as in "the teacher".
    pub fn check_seq_len(&self, model: &str, max_position: usize) -> Result<()> {
        if self.data.seq_len <= max_position {
            return Ok(());
        }
        let problem = format!("is {}, but {model} reads at most {max_position} positions", self.data.seq_len);
        Err(self.error("data.seq_len", problem, format!("use at most {max_position}")))
    }

    /// Refuses a mesh that the teacher cannot be laid out on.
    pub fn check_mesh(&self, config: &DecoderConfig) -> Result<()> {
        let Some(teacher) = &self.teacher else { return Ok(()) };
        sharding::check(config, &teacher.mesh)
            .map_err(|unfit| self.error(&format!("teacher.mesh.{}", unfit.axis), unfit.problem, unfit.tip))
    }

    /// Refuses a student that predicts fewer tokens than the tokenizer has, or another number than the teacher does.
    pub fn check_vocabulary(&self, student: usize, tokenizer: usize, teacher: Option<usize>) -> Result<()> {
        let key = if self.student.checkpoint.is_some() { "student.checkpoint" } else { "student.shape.vocab" };
        if student < tokenizer {
            let problem = format!("gives a vocabulary of {student}, but the tokenizer has {tokenizer} tokens");
            return Err(self.error(key, problem, format!("use at least {tokenizer}")));
        }
        match teacher.filter(|teacher| *teacher != student) {
            None => Ok(()),
            Some(teacher) => {
                let problem = format!("gives a vocabulary of {student}, but the teacher's has {teacher} tokens");
                Err(self.error(key, problem, "student and teacher must predict the same tokens"))
            }
        }
    }

    /// Refuses a warm-up that takes the whole run or more.
    pub(super) fn check_warm_up(&self, steps: u64) -> Result<()> {
        let control = self.control.as_ref().and_then(|control| control.lr.as_ref());
        for (key, lr) in [("train.lr.warmup", Some(&self.train.lr)), ("control.lr.warmup", control)] {
            if let Some(lr) = lr.filter(|lr| lr.warmup > 0 && lr.warmup >= steps) {
                let problem = format!("is {}, but the run has only {steps} steps", lr.warmup);
                return Err(self.error(key, problem, format!("use fewer than {steps}")));
            }
        }
        Ok(())
    }

    pub(super) fn positive(&self, key: &str, value: u64) -> Result<()> {
        if value > 0 { Ok(()) } else { Err(self.error(key, "is 0", "use at least 1")) }
    }

    /// Refuses a list of temperatures that nothing can be captured at.
    pub(super) fn check_temperatures(&self, section: &str, temperatures: &[f64]) -> Result<()> {
        let key = format!("{section}.temperatures");
        if temperatures.is_empty() {
            return Err(self.error(&key, "is empty", "use [1.0]"));
        }
        for (number, &temperature) in temperatures.iter().enumerate() {
            self.number(&key, temperature, temperature > 0.0, "above 0 for each temperature")?;
            if temperatures[..number].contains(&temperature) {
                return Err(self.error(&key, format!("has {temperature} twice"), "name each temperature once"));
            }
        }
        Ok(())
    }

    /// Refuses a number outside a range given in words.
    pub(super) fn number(&self, key: &str, value: f64, allowed: bool, range: &str) -> Result<()> {
        if value.is_finite() && allowed {
            return Ok(());
        }
        Err(self.error(key, format!("is {value}"), format!("use a number {range}")))
    }
}

fn check_name(recipe: &Recipe) -> Result<()> {
    let name = &recipe.name;
    let plain = name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c));
    if name.is_empty() || !plain || name.starts_with('.') {
        let tip = "use letters, digits, `_`, `-` and `.`, for it names a directory";
        return Err(recipe.error("name", format!("is {name:?}"), tip));
    }
    let seeds = [
        ("seed", Some(recipe.seed)),
        ("student.init_seed", recipe.student.init_seed),
        ("train.seed", recipe.train.seed),
    ];
    for (key, seed) in seeds {
        if let Some(seed) = seed.filter(|seed| *seed > i64::MAX as u64) {
            return Err(recipe.error(key, format!("is {seed}"), format!("use at most {}", i64::MAX)));
        }
    }
    Ok(())
}

fn check_data(recipe: &Recipe) -> Result<()> {
    let data = &recipe.data;
    if recipe.cache.train.is_none() {
        ["sources", "tokens", "seq_len"].iter().try_for_each(|key| recipe.needs("data", key))?;
        check_sources(recipe, "data.sources", &data.sources)?;
    }
    recipe.positive("data.tokens", data.tokens)?;
    recipe.positive("data.seq_len", data.seq_len as u64)?;
    if data.seq_len > u32::MAX as usize {
        return Err(recipe.error("data.seq_len", format!("is {}", data.seq_len), "use less than 2^32"));
    }
    match &data.held_out {
        HeldOut::None => Ok(()),
        HeldOut::Tokens(tokens) => recipe.positive("data.held_out", *tokens),
        HeldOut::Share(share) => recipe.number(
            "data.held_out",
            *share,
            *share > 0.0 && *share < 1.0,
            "above 0 and below 1, or a token amount",
        ),
        HeldOut::Sources(sources) => check_sources(recipe, "data.held_out", sources),
    }
}

fn check_sources(recipe: &Recipe, key: &str, sources: &[DataSource]) -> Result<()> {
    if sources.is_empty() {
        return Err(recipe.error(key, "is empty", "name at least one file, as in [{ path = \"text.txt\" }]"));
    }
    for (number, source) in sources.iter().enumerate() {
        let weight = source.weight;
        recipe.number(&format!("{key}[{number}].weight"), weight, weight > 0.0, "above 0")?;
    }
    Ok(())
}

fn check_teacher_and_cache(recipe: &Recipe) -> Result<()> {
    let cache = &recipe.cache;
    recipe.positive("cache.sequences_per_shard", cache.sequences_per_shard as u64)?;
    if cache.top_k.is_some() && cache.selection.is_some() {
        return Err(recipe.error("cache.top_k", "is given beside `cache.selection`", "give only one of the two"));
    }
    recipe.check_selection(usize::MAX)?;
    recipe.check_temperatures("cache", &cache.temperatures)?;
    match &recipe.teacher {
        Some(teacher) => {
            let streamed_only = [
                ("memory", teacher.memory, teacher.memory.is_some()),
                ("sweep_tokens", teacher.sweep_tokens, teacher.sweep_tokens.is_some()),
                ("spill", None, teacher.spill.is_some()),
            ];
            for (name, value, given) in streamed_only {
                let key = format!("teacher.{name}");
                if given && teacher.mode != TeacherMode::Streamed {
                    let problem = "is for a teacher that is streamed, and this one is not";
                    return Err(recipe.error(&key, problem, "remove it, or use teacher.mode = \"streamed\""));
                }
                recipe.positive(&key, value.unwrap_or(1))?;
            }
            check_mesh(recipe, teacher)?;
            remote_teacher::check(recipe, teacher)?;
            if teacher.dtype == Dtype::Bf16 && teacher.mode == TeacherMode::Remote {
                let problem = "is `bf16`, and the server decides what a remote teacher computes in";
                return Err(recipe.error("teacher.dtype", problem, "remove it"));
            }
            if recipe.has_held_out() && !cache.temperatures.contains(&1.0) {
                let problem = "lacks 1.0, at which held-out text is compared with the teacher";
                return Err(recipe.error("cache.temperatures", problem, "add 1.0"));
            }
            recipe.positive("teacher.batch_tokens", teacher.batch_tokens)
        }
        None if recipe.has_control() && !recipe.has_soft_targets() => Err(recipe.error(
            "control",
            "compares with a run that has a teacher, and this recipe has none",
            "add [teacher], or remove [control]",
        )),
        None => Ok(()),
    }
}

fn check_mesh(recipe: &Recipe, teacher: &TeacherSection) -> Result<()> {
    for (name, size) in teacher.mesh.axes() {
        recipe.positive(&format!("teacher.mesh.{name}"), size as u64)?;
    }
    if teacher.mesh.size() > u16::MAX as usize {
        let problem = format!("has {} devices", teacher.mesh.size());
        return Err(recipe.error("teacher.mesh", problem, format!("use at most {}", u16::MAX)));
    }
    Ok(())
}

fn check_student(recipe: &Recipe) -> Result<()> {
    let student = &recipe.student;
    match (&student.init, &student.shape) {
        (Some(init), Some(shape)) => student_init::check(recipe, init, shape)?,
        (Some(_), None) => {
            let problem = "is given without `student.shape`, which says what the layers become";
            return Err(recipe.error("student.init", problem, "add it, as in shape = { like = \"scout\" }"));
        }
        (None, _) => {}
    }
    match (&student.shape, &student.checkpoint) {
        (None, None) => {
            let problem = "has neither `shape` nor `checkpoint`";
            Err(recipe.error("student", problem, "give one, as in shape = { like = \"scout\", layers = 4 }"))
        }
        (Some(_), Some(_)) => {
            Err(recipe.error("student.checkpoint", "is given beside `student.shape`", "give only one of the two"))
        }
        (None, Some(_)) => {
            let given = [("init_std", student.init_std.is_some()), ("init_seed", student.init_seed.is_some())];
            match given.iter().find(|(_, given)| *given) {
                None => Ok(()),
                Some((key, _)) => {
                    let problem = "is for a new model, and this student starts from `student.checkpoint`";
                    Err(recipe.error(&format!("student.{key}"), problem, "remove one of the two"))
                }
            }
        }
        (Some(shape), None) => {
            let std = student.init_std();
            recipe.number("student.init_std", std, std > 0.0, "above 0, as in 0.02")?;
            check_shape(recipe, shape)
        }
    }
}

fn check_shape(recipe: &Recipe, shape: &Shape) -> Result<()> {
    let key = |name: &str| format!("student.shape.{name}");
    let sizes = [
        ("layers", shape.layers),
        ("hidden", shape.hidden),
        ("heads", shape.heads),
        ("kv_heads", shape.kv_heads),
        ("head_dim", shape.head_dim),
        ("experts", shape.experts),
        ("experts_per_token", shape.experts_per_token),
        ("expert_width", shape.expert_width),
        ("dense_width", shape.dense_width),
        ("moe_interval", shape.moe_interval),
        ("chunk", shape.chunk),
        ("nope_interval", shape.nope_interval),
        ("vocab", shape.vocab),
        ("max_position", shape.max_position),
    ];
    for (name, size) in sizes {
        recipe.positive(&key(name), size.unwrap_or(1) as u64)?;
    }
    for (name, value) in [("rope_theta", shape.rope_theta), ("norm_eps", shape.norm_eps)] {
        let value = value.unwrap_or(1.0);
        recipe.number(&key(name), value, value > 0.0, "above 0")?;
    }
    if let (Some(heads), Some(kv_heads)) = (shape.heads, shape.kv_heads)
        && heads % kv_heads != 0
    {
        let problem = format!("is {kv_heads}, which does not divide `heads` = {heads}");
        return Err(recipe.error(&key("kv_heads"), problem, "each key head serves the same number of query heads"));
    }
    if let Some(head_dim) = shape.head_dim.filter(|head_dim| head_dim % 2 != 0) {
        let tip = "use an even number, for positions rotate pairs";
        return Err(recipe.error(&key("head_dim"), format!("is {head_dim}"), tip));
    }
    if let (Some(experts), Some(chosen)) = (shape.experts, shape.experts_per_token)
        && chosen > experts
    {
        let problem = format!("is {chosen}, but `experts` is {experts}");
        return Err(recipe.error(&key("experts_per_token"), problem, format!("use at most {experts}")));
    }
    if let Some(position) = shape.max_position {
        recipe.check_seq_len("the student", position)?;
    }
    if shape.like == ShapeName::Llama {
        let mixture_only = [
            ("experts", shape.experts.is_some()),
            ("experts_per_token", shape.experts_per_token.is_some()),
            ("expert_width", shape.expert_width.is_some()),
            ("moe_interval", shape.moe_interval.is_some()),
            ("chunk", shape.chunk.is_some()),
            ("nope_interval", shape.nope_interval.is_some()),
        ];
        if let Some((name, _)) = mixture_only.iter().find(|(_, given)| *given) {
            let problem = "is a key of Llama 4 shapes, and this student is like `llama`";
            return Err(recipe.error(&key(name), problem, "remove it, or use like = \"scout\""));
        }
    }
    Ok(())
}

fn check_loss(recipe: &Recipe) -> Result<()> {
    let loss = &recipe.loss;
    let temperature = loss.temperature;
    recipe.number("loss.temperature", temperature, temperature > 0.0, "above 0")?;
    if recipe.has_soft_targets() && !recipe.cache.temperatures.contains(&temperature) {
        let listed = &recipe.cache.temperatures;
        if recipe.cache.train.is_some() {
            let problem = format!("is {temperature:?}, but the cache `cache.train` was captured at {listed:?}");
            return Err(recipe.error("loss.temperature", problem, "use one of these"));
        }
        let problem = format!("is {temperature:?}, but `cache.temperatures` = {listed:?} does not capture it");
        return Err(recipe.error("loss.temperature", problem, format!("add {temperature:?} to cache.temperatures")));
    }
    if let Err(invalid) = loss.divergence.check() {
        return Err(recipe.error("loss.divergence", format!("is not usable: {}", invalid.problem), invalid.tip));
    }
    let Some(weighting) = &loss.weighting else { return Ok(()) };
    for (name, value, range) in weighting.parameters() {
        recipe.number(&format!("loss.weighting.{name}"), value, range.holds(value), range.words())?;
    }
    if matches!(weighting, Weighting::Taid { .. }) && !matches!(loss.divergence, Divergence::Taid { .. }) {
        let problem = format!("moves a teacher that the divergence `{}` has not", loss.divergence.name());
        return Err(recipe.error("loss.weighting", problem, "use loss.divergence = \"taid\" with it"));
    }
    if !recipe.has_soft_targets() && weighting.needs_soft_targets() {
        let problem = "gives the soft target a weight, and this recipe has no teacher";
        return Err(recipe.error("loss.weighting", problem, "add [teacher], or remove the key"));
    }
    Ok(())
}

/// Refuses a loss that is not linear in a teacher whose ids are drawn.
fn check_sampled(recipe: &Recipe) -> Result<()> {
    if !recipe.has_sampled_targets() {
        return Ok(());
    }
    let selection = recipe.cache.selection();
    let refusal = |loss: DistillLossConfig| match loss.with_sampled_targets().check() {
        Err(Error::Usage { problem, tip }) => {
            Some((format!("does not go with `cache.selection` = `{}`: {problem}", selection.name()), tip))
        }
        _ => None,
    };
    if let Some((problem, tip)) = refusal(DistillLossConfig::new(recipe.loss.divergence)) {
        return Err(recipe.error("loss.divergence", problem, tip));
    }
    let weighted = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(recipe.weighting(), 1);
    match refusal(weighted).filter(|_| matches!(recipe.weighting(), Weighting::TeacherEntropy { .. })) {
        Some((problem, tip)) => Err(recipe.error("loss.weighting", problem, tip)),
        None => Ok(()),
    }
}

fn check_train(recipe: &Recipe) -> Result<()> {
    let train = &recipe.train;
    match (train.steps, train.epochs) {
        (None, None) => return Err(recipe.error("train", "has neither `steps` nor `epochs`", "give one of the two")),
        (Some(_), Some(_)) => {
            return Err(recipe.error("train.epochs", "is given beside `train.steps`", "give only one of the two"));
        }
        (Some(steps), None) => recipe.positive("train.steps", steps)?,
        (None, Some(epochs)) => recipe.number("train.epochs", epochs, epochs > 0.0, "above 0")?,
    }
    let (seq_len, batch) = (recipe.data.seq_len as u64, train.batch_tokens);
    let multiple = |key: &str, tokens: u64| {
        recipe.positive(key, tokens)?;
        if tokens.is_multiple_of(seq_len) {
            return Ok(());
        }
        let below = (tokens / seq_len).max(1) * seq_len;
        let problem = format!("is {tokens}, which is not a multiple of `data.seq_len` = {seq_len}");
        Err(recipe.error(key, problem, format!("use {below} or {}", below + seq_len)))
    };
    multiple("train.batch_tokens", batch)?;
    if let Some(micro) = train.micro_batch_tokens.and_then(MicroBatch::tokens) {
        multiple("train.micro_batch_tokens", micro)?;
        if batch % micro != 0 {
            let problem = format!("is {micro}, which does not divide `train.batch_tokens` = {batch}");
            return Err(recipe.error(
                "train.micro_batch_tokens",
                problem,
                format!("use {seq_len} times a divisor of {}", batch / seq_len),
            ));
        }
    }
    check_learning_rate(recipe, "train.lr", &train.lr)?;
    if let Some(lr) = recipe.control.as_ref().and_then(|control| control.lr.as_ref()) {
        check_learning_rate(recipe, "control.lr", lr)?;
    }
    for beta in train.betas {
        recipe.number("train.betas", beta, (0.0..1.0).contains(&beta), "from 0 to below 1 for each")?;
    }
    recipe.number("train.eps", train.eps, train.eps > 0.0, "above 0")?;
    for (key, value) in [
        ("train.weight_decay", train.weight_decay),
        ("train.clip_norm", train.clip_norm),
        ("train.router_aux_weight", train.router_aux_weight),
    ] {
        recipe.number(key, value, value >= 0.0, "of 0 or more")?;
    }
    recipe.positive("train.keep_checkpoints", train.keep_checkpoints as u64)?;
    recipe.positive("train.log_every", train.log_every)?;
    if train.evaluate_every.is_some_and(|every| every > 0) && !recipe.has_held_out() {
        let problem = "asks for evaluations, and this recipe holds nothing out";
        return Err(recipe.error("train.evaluate_every", problem, "add data.held_out, as in held_out = \"1M\""));
    }
    match train.steps {
        Some(steps) => recipe.check_warm_up(steps),
        None => Ok(()),
    }
}

fn check_learning_rate(recipe: &Recipe, section: &str, lr: &LearningRateSection) -> Result<()> {
    let key = |name: &str| format!("{section}.{name}");
    recipe.number(&key("from"), lr.from, lr.from > 0.0, "above 0")?;
    if let Some(to) = lr.to {
        recipe.number(&key("to"), to, to >= 0.0, "of 0 or more")?;
        if lr.schedule == LearningRateKind::Constant {
            return Err(recipe.error(&key("to"), "is not for a `constant` schedule", "remove it"));
        }
    }
    if let Some(decay) = lr.decay {
        recipe.number(&key("decay"), decay, (0.0..=1.0).contains(&decay), "from 0 to 1")?;
        if lr.schedule != LearningRateKind::Wsd {
            return Err(recipe.error(&key("decay"), "is for a `wsd` schedule alone", "remove it"));
        }
    }
    Ok(())
}
