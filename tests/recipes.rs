//! Recipes: what is shipped and documented loads, and every mistake is answered with its place and a way out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use limbeck::data::{DataLoader, DataSource, HeldOut};
use limbeck::inputs::Inputs;
use limbeck::loss::Weighting;
use limbeck::recipe::{MicroBatch, Plan, Recipe, all_keys};
use limbeck::run::RunOptions;
use limbeck::schedule::Schedule;
use limbeck::selection::Selection;

const SMALL: &str = r#"name = "small"

[data]
sources = [{ path = "text/*.txt" }]
tokens = "2M"
seq_len = 256

[teacher]
checkpoint = "models/teacher"

[cache]
top_k = 32

[student]
shape = { like = "scout", layers = 4 }

[train]
steps = 100
batch_tokens = 2048
lr = { schedule = "cosine", from = 3e-3, warmup = 50 }
"#;

fn parse(text: &str, overrides: &[&str]) -> limbeck::Result<Recipe> {
    let overrides: Vec<String> = overrides.iter().map(|word| word.to_string()).collect();
    Recipe::parse(text, "/recipes/small.toml", &overrides)
}

/// The message of a mistake, without the file name it starts with.
fn mistake(text: &str, overrides: &[&str]) -> String {
    let error = parse(text, overrides).expect_err("the recipe is wrong");
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    message.strip_prefix("/recipes/small.toml: ").map(String::from).unwrap_or(message)
}

/// The message after replacing a line of the small recipe.
fn mistake_in(line: &str, replacement: &str) -> String {
    assert!(SMALL.contains(line), "{line}");
    mistake(&SMALL.replace(line, replacement), &[])
}

fn toml_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(toml_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files
}

#[test]
fn every_recipe_that_is_shipped_or_documented_loads() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in toml_files(&root.join("recipes")) {
        let recipe = Recipe::load(&path, &[]).unwrap();
        Plan::new(&recipe, &RunOptions::default()).unwrap();
    }
    let documentation = std::fs::read_to_string(root.join("docs/recipes.md")).unwrap();
    let examples: Vec<&str> =
        documentation.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(examples.len(), 2);
    for example in examples {
        Plan::new(&parse(example, &[]).unwrap(), &RunOptions::default()).unwrap();
    }
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    let documentation = include_str!("../docs/recipes.md");
    let ticked = |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(String::from).collect() };
    let mut documented: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut sections = vec![];
    for line in documentation.lines() {
        if let Some(heading) = line.strip_prefix("## ").or(line.strip_prefix("### ")) {
            sections = if heading == "Top level" { vec![String::new()] } else { ticked(heading) };
        } else if line.starts_with("| `") {
            for section in &sections {
                documented.entry(section.clone()).or_default().insert(ticked(line)[0].clone());
            }
        }
    }
    let mut keys: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for key in all_keys() {
        let (section, name) = key.rsplit_once('.').unwrap_or(("", &key));
        keys.entry(section.to_string()).or_default().insert(name.to_string());
    }
    assert_eq!(documented, keys);
}

#[test]
fn a_small_recipe_has_sensible_defaults() {
    let recipe = parse(SMALL, &[]).unwrap();
    assert_eq!(recipe.data.tokens, 2_000_000);
    assert_eq!(recipe.data.sources, [DataSource::new("/recipes/text/*.txt")]);
    assert_eq!(recipe.teacher.as_ref().unwrap().checkpoint, Path::new("/recipes/models/teacher"));
    assert_eq!((recipe.seed, recipe.cache.temperatures.as_slice()), (0, &[1.0][..]));
    assert_eq!(recipe.weighting(), Weighting::Linear { from: 0.9, to: 0.5 });
    assert_eq!(recipe.train.lr.learning_rate().schedule, Schedule::Cosine { from: 3e-3, to: 0.0 });
    assert_eq!((recipe.train.betas, recipe.train.router_aux_weight), ([0.9, 0.95], 0.001));
    assert!(!recipe.has_control());
    assert!(parse(&format!("{SMALL}[control]\n"), &[]).unwrap().has_control());
    assert!(!parse(&format!("{SMALL}[control]\nenabled = false\n"), &[]).unwrap().has_control());

    let pre_training = SMALL.replace("[teacher]\ncheckpoint = \"models/teacher\"\n", "");
    assert_eq!(parse(&pre_training, &[]).unwrap().weighting(), Weighting::hard_only());
}

#[test]
fn overrides_replace_and_add_keys() {
    let recipe = parse(
        SMALL,
        &[
            "cache.top_k=16",
            "cache.top_k=8",
            "data.tokens=64k",
            "data.held_out=[{ path = \"../held_out.txt\" }]",
            "data.sources.0.weight=2",
            "student.shape.like=maverick",
            "control.enabled=true",
            "control.lr={ schedule = \"constant\", from = 1e-2 }",
            "train.micro_batch_tokens = 1_024",
            "run.dir=/runs/a",
            "name=other-name",
        ],
    )
    .unwrap();
    assert_eq!((recipe.cache.top_k.unwrap(), recipe.data.tokens, recipe.name.as_str()), (8, 64_000, "other-name"));
    assert_eq!(recipe.data.sources[0].weight, 2.0);
    assert_eq!(recipe.data.held_out, HeldOut::Sources(vec![DataSource::new("/held_out.txt")]));
    assert_eq!(recipe.control_learning_rate().schedule, Schedule::Constant { value: 1e-2 });
    assert_eq!(recipe.train.micro_batch_tokens, Some(MicroBatch::Tokens(1024)));
    assert_eq!(recipe.run.dir.as_deref(), Some(Path::new("/runs/a")));
}

#[test]
fn a_frozen_recipe_loads_to_the_same_recipe_anywhere() {
    let overrides =
        ["data.held_out=\"10k\"", "control.enabled=true", "loss.weighting={ kind = \"constant\", soft = 0.7 }"];
    let recipe = parse(SMALL, &overrides).unwrap();
    let frozen = recipe.to_toml();
    let again = Recipe::parse(&frozen, "/elsewhere/recipe.toml", &[]).unwrap();
    assert_eq!(again.to_toml(), frozen);
    assert_eq!(again.data, recipe.data);
    assert_eq!(again.weighting(), Weighting::Constant { soft: 0.7 });
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_likely_one() {
    assert_eq!(mistake_in("top_k = 32", "topk = 32"), "line 12: `topk` is not a key of [cache]; did you mean `top_k`?");
    assert_eq!(
        mistake_in("steps = 100", "steps = 100\nsequences_per = 3"),
        "line 19: `sequences_per` is not a key of [train]; the keys of [train] are `steps`, `epochs`, `batch_tokens`, \
         `micro_batch_tokens`, `checkpoint_activations`, `lr`, `optimizer`, `groups`, `precision`, `ema`, `betas`, `eps`, \
         `momentum`, `weight_decay`, `clip_norm`, `router_aux_weight`, `router_z_weight`, `router_balance`, `guards`, \
         `seed`, `checkpoint_every`, `evaluate_every`, `evaluate_tokens`, `keep_checkpoints`, `log_every`, `tensorboard`"
    );
    assert_eq!(
        mistake_in("steps = 100", "steps = 100\ntop_k = 3"),
        "line 19: `top_k` is not a key of [train]; `top_k` is a key of [cache]"
    );
    assert_eq!(mistake_in("[cache]", "[cahce]"), "line 11: `cahce` is not a key of the recipe; did you mean `cache`?");
    assert_eq!(
        mistake_in("warmup = 50", "warm_up = 50"),
        "line 20: `warm_up` is not a key of [train.lr]; did you mean `warmup`?"
    );
    assert_eq!(
        mistake_in("path = \"text/*.txt\"", "path = \"text/*.txt\", wieght = 2"),
        "line 4: `wieght` is not a key of [data.sources]; did you mean `weight`?"
    );
    assert_eq!(
        mistake(SMALL, &["cache.topk=3"]),
        "--set cache.topk=3: `topk` is not a key of [cache]; did you mean `top_k`?"
    );
    assert_eq!(
        mistake(SMALL, &["chache.top_k=3"]),
        "--set chache.top_k=3: `chache` is not a key of the recipe; did you mean `cache`?"
    );
}

#[test]
fn a_wrong_type_names_key_value_and_what_is_allowed() {
    assert_eq!(
        mistake_in("top_k = 32", "top_k = \"many\""),
        "line 12: `cache.top_k` is string \"many\"; expected a whole number, 0 or more"
    );
    assert_eq!(
        mistake_in("top_k = 32", "top_k = -1"),
        "line 12: `cache.top_k` is integer `-1`; expected a whole number, 0 or more"
    );
    assert_eq!(
        mistake_in("top_k = 32", "temperatures = 1.0"),
        "line 12: `cache.temperatures` is floating point `1.0`; expected a list, as in [1, 2]"
    );
    assert_eq!(
        mistake_in("tokens = \"2M\"", "tokens = \"2 parsecs\""),
        "line 5: `data.tokens` is string \"2 parsecs\"; expected a count such as 20000, \"1.5M\" or \"10B\""
    );
    assert_eq!(
        mistake_in("seq_len = 256", "seq_len = 256\nheld_out = true"),
        "line 7: `data.held_out` is boolean `true`; expected tokens (\"20M\"), a share (\"1%\"), a list of sources or \
         \"none\""
    );
    assert_eq!(
        mistake(SMALL, &["data.held_out=some"]),
        "--set data.held_out=some: `data.held_out` is string \"some\"; expected tokens (\"20M\"), a share (\"1%\"), a list \
         of sources or \"none\""
    );
    assert_eq!(
        mistake_in("seq_len = 256", "seq_len = 256\nheld_out = [\n  { path = \"a.txt\", weight = \"heavy\" },\n]"),
        "line 8: `data.held_out[0].weight` is string \"heavy\"; expected a number"
    );
    assert_eq!(
        mistake_in("[cache]", "[loss]\nweighting = { kind = \"square\" }\n[cache]"),
        "line 12: `loss.weighting.kind` is `square`; allowed: `constant`, `linear`, `cosine`, `wsd`, `magnitude_match`, \
         `gradient_norm`, `uncertainty`, `teacher_confidence`, `teacher_entropy`, `student_gap`, `taid`, `llama4`"
    );
    assert_eq!(
        mistake_in("[teacher]", "[teacher]\nmode = \"resdient\""),
        "line 9: `teacher.mode` is `resdient`; allowed: `resident`, `streamed`, `remote`; did you mean `resident`?"
    );
    assert_eq!(
        mistake_in("path = \"text/*.txt\"", "path = \"text/*.txt\", weight = \"heavy\""),
        "line 4: `data.sources[0].weight` is string \"heavy\"; expected a number"
    );
    assert_eq!(
        mistake(SMALL, &["train.betas=[0.9]"]),
        "--set train.betas=[0.9]: `train.betas` is 1; expected two numbers, as in [0.9, 0.95]"
    );
    assert_eq!(
        mistake(SMALL, &["loss.t_scale=yes"]),
        "--set loss.t_scale=yes: `loss.t_scale` is string \"yes\"; expected true or false"
    );
    assert_eq!(
        mistake(SMALL, &["student=3"]),
        "--set student=3: `student` is integer `3`; expected a table, as in { key = value }"
    );
}

#[test]
fn a_missing_key_is_named_with_its_section() {
    assert_eq!(mistake_in("seq_len = 256\n", ""), "line 3: `data.seq_len` is missing; add `seq_len`");
    assert_eq!(mistake_in("name = \"small\"\n", ""), "`name` is missing; add it at the top of the recipe");
    assert_eq!(
        mistake_in("[student]\nshape = { like = \"scout\", layers = 4 }\n", ""),
        "section [student] is missing; add [student]"
    );
    assert_eq!(mistake_in("path = \"text/*.txt\"", ""), "line 4: `data.sources[0].path` is missing; add `path`");
    assert_eq!(mistake_in("like = \"scout\", ", ""), "line 15: `student.shape.like` is missing; add `like`");
    let weighting = |keys: &str| mistake_in("[cache]", &format!("[loss]\nweighting = {{ {keys} }}\n[cache]"));
    assert_eq!(weighting("soft = 0.5"), "line 12: `loss.weighting.kind` is missing; add `kind`");
    assert_eq!(weighting("kind = \"constant\""), "line 12: `loss.weighting.soft` is missing; add `soft`");
    assert_eq!(weighting("kind = \"linear\", to = 0.5"), "line 12: `loss.weighting.from` is missing; add `from`");
}

#[test]
fn a_recipe_that_cannot_be_read_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let message = |path: &Path| Recipe::load(path, &[]).unwrap_err().to_string();
    let missing = folder.path().join("none.toml");
    assert_eq!(message(&missing), format!("{}: no such recipe; check the path", missing.display()));
    assert_eq!(Recipe::load(&missing, &[]).unwrap_err().exit_code(), 2);
    let directory = folder.path();
    assert_eq!(message(directory), format!("{}: is a directory; name the .toml file in it", directory.display()));
    let binary = folder.path().join("model.bin");
    std::fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
    assert_eq!(message(&binary), format!("{}: is not UTF-8 text; name a .toml file", binary.display()));

    assert!(mistake_in("top_k = 32", "top_k = ").starts_with("line 12: is not TOML: "));
    assert!(mistake_in("top_k = 32", "top_k = 32\ntop_k = 33").starts_with("line 13: is not TOML: duplicate key"));
    assert!(mistake("", &[]).ends_with("is missing; add it at the top of the recipe"));
}

#[test]
fn a_bad_override_says_what_one_looks_like() {
    assert_eq!(
        mistake(SMALL, &["cache.top_k"]),
        "`--set cache.top_k` is not an override; use `--set section.key=value`"
    );
    assert_eq!(mistake(SMALL, &["=3"]), "`--set =3` is not an override; use `--set section.key=value`");
    assert_eq!(
        mistake(SMALL, &["cache..top_k=3"]),
        "`--set cache..top_k=3` is not an override; use `--set section.key=value`"
    );
    assert_eq!(mistake(SMALL, &["cache.top_k="]), "`--set cache.top_k=` has no value; use `--set section.key=value`");
    let quoting = "has a value that is not TOML; quote it for the shell, as in --set 'data.document_end=\"</s>\"'";
    for word in ["cache.temperatures=[1.0", "name=\"a", "name=a\\b"] {
        assert_eq!(mistake(SMALL, &[word]), format!("`--set {word}` {quoting}"));
    }
    assert_eq!(
        mistake(SMALL, &["seed=3\nname=a"]),
        "`--set seed=3 ...` goes on after a line break; use one `--set` for each key"
    );
    assert_eq!(
        mistake(SMALL, &["name.first=a"]),
        "--set name.first=a: `name` is not a section; use `section.key=value`"
    );
    assert_eq!(
        mistake(SMALL, &["data.sources.7.weight=2"]),
        "--set data.sources.7.weight=2: `sources.7` is not a section; use `section.key=value`"
    );
}

#[test]
fn values_out_of_range_are_refused_with_what_is_allowed() {
    let cases = [
        ("name=\"a/b\"", "`name` is \"a/b\"; use letters, digits, `_`, `-` and `.`, for it names a directory"),
        ("data.sources=[]", "`data.sources` is empty; name at least one file, as in [{ path = \"text.txt\" }]"),
        ("data.sources.0.weight=0", "`data.sources[0].weight` is 0; use a number above 0"),
        ("data.tokens=0", "`data.tokens` is 0; use at least 1"),
        ("data.seq_len=0", "`data.seq_len` is 0; use at least 1"),
        ("data.held_out=0", "`data.held_out` is 0; use at least 1"),
        ("data.held_out=100%", "`data.held_out` is 1; use a number above 0 and below 1, or a token amount"),
        ("data.held_out=[]", "`data.held_out` is empty; name at least one file, as in [{ path = \"text.txt\" }]"),
        ("teacher.batch_tokens=0", "`teacher.batch_tokens` is 0; use at least 1"),
        (
            "teacher.mode=remote",
            "line 9: `teacher.checkpoint` is for a teacher that runs here, and this one is remote; remove it",
        ),
        (
            "teacher.memory=\"2GiB\"",
            "`teacher.memory` is for a teacher that is streamed, and this one is not; remove it, or use \
             teacher.mode = \"streamed\"",
        ),
        (
            "teacher.spill=never",
            "`teacher.spill` is for a teacher that is streamed, and this one is not; remove it, or use \
             teacher.mode = \"streamed\"",
        ),
        ("cache.top_k=0", "`cache.top_k` is 0; keep at least 1 id per prediction"),
        (
            "cache.selection={ kind = \"min_prob\", theta = 0 }",
            "`cache.selection.theta` is 0; use a number above 0 and at most 1, as in 0.001",
        ),
        (
            "cache.selection={ kind = \"min_prob\", cap = 0 }",
            "`cache.selection.cap` is 0; keep at least 1 id per prediction",
        ),
        (
            "cache.selection={ kind = \"top_p\", p = 2.5 }",
            "`cache.selection.p` is 2.5; use a number above 0 and at most 1, as in 0.95",
        ),
        (
            "cache.selection={ kind = \"threshold_sampled\", threshold = nan }",
            "`cache.selection.threshold` is NaN; use a number from 0.00001 to 1, as in 0.01",
        ),
        (
            "cache.selection={ kind = \"sampled\", draws = 0 }",
            "`cache.selection.draws` is 0; keep at least 1 id per prediction",
        ),
        ("cache.temperatures=[]", "`cache.temperatures` is empty; use [1.0]"),
        ("cache.temperatures=[0]", "`cache.temperatures` is 0; use a number above 0 for each temperature"),
        ("cache.temperatures=[1, 2, 1]", "`cache.temperatures` has 1 twice; name each temperature once"),
        ("cache.sequences_per_shard=0", "`cache.sequences_per_shard` is 0; use at least 1"),
        ("student.init_std=0", "`student.init_std` is 0; use a number above 0, as in 0.02"),
        ("student.shape.layers=0", "`student.shape.layers` is 0; use at least 1"),
        ("student.shape.head_dim=7", "`student.shape.head_dim` is 7; use an even number, for positions rotate pairs"),
        ("student.shape.rope_theta=-1", "`student.shape.rope_theta` is -1; use a number above 0"),
        (
            "student.shape.max_position=128",
            "line 6: `data.seq_len` is 256, but the student reads at most 128 positions; use at most 128",
        ),
        (
            "loss.temperature=2",
            "`loss.temperature` is 2.0, but `cache.temperatures` = [1.0] does not capture it; add 2.0 to cache.temperatures",
        ),
        ("loss.temperature=inf", "`loss.temperature` is inf; use a number above 0"),
        ("train.steps=0", "`train.steps` is 0; use at least 1"),
        ("train.batch_tokens=0", "`train.batch_tokens` is 0; use at least 1"),
        (
            "train.batch_tokens=1000",
            "`train.batch_tokens` is 1000, which is not a multiple of `data.seq_len` = 256; use 768 or 1024",
        ),
        (
            "train.micro_batch_tokens=100",
            "`train.micro_batch_tokens` is 100, which is not a multiple of `data.seq_len` = 256; use 256 or 512",
        ),
        (
            "train.micro_batch_tokens=768",
            "`train.micro_batch_tokens` is 768, which does not divide `train.batch_tokens` = 2048; use 256 times a \
             divisor of 8",
        ),
        ("train.lr.from=0", "`train.lr.from` is 0; use a number above 0"),
        ("train.lr.to=-1", "`train.lr.to` is -1; use a number of 0 or more"),
        ("train.lr.decay=0.1", "`train.lr.decay` is for a `wsd` schedule alone; remove it"),
        ("train.lr.warmup=100", "`train.lr.warmup` is 100, but the run has only 100 steps; use fewer than 100"),
        ("train.betas=[0.9, 1]", "`train.betas` is 1; use a number from 0 to below 1 for each"),
        ("train.eps=0", "`train.eps` is 0; use a number above 0"),
        ("train.weight_decay=-0.1", "`train.weight_decay` is -0.1; use a number of 0 or more"),
        ("train.clip_norm=nan", "`train.clip_norm` is NaN; use a number of 0 or more"),
        ("train.router_aux_weight=-1", "`train.router_aux_weight` is -1; use a number of 0 or more"),
        ("train.ema=1", "`train.ema` is 1; use a number from 0 to below 1, as in 0.999"),
        ("train.momentum=0.9", "`train.momentum` is Muon's, and the optimizer is another; remove it"),
        ("train.router_z_weight=-1", "`train.router_z_weight` is -1; use a number of 0 or more"),
        ("train.router_balance={rate=0}", "`train.router_balance.rate` is 0; use a number above 0, as in 0.001"),
        (
            "train.router_balance={release=2}",
            "`train.router_balance.release` is 2; use a number from 0 to 1, as in 0.2",
        ),
        (
            "train.guards.not_finite=off",
            "`train.guards.not_finite` is `off`, which would let a step without a finite loss into the weights; use `stop`, \
             `skip` or `rewind`",
        ),
        ("train.guards.spike_factor=0", "`train.guards.spike_factor` is 0; use a number above 0, as in 10"),
        ("train.guards.spike_window=0", "`train.guards.spike_window` is 0; use at least 1"),
        ("train.guards.limit=0", "`train.guards.limit` is 0; use at least 1"),
        (
            "train.groups=[{match=\"*\", lr=-1}]",
            "`train.groups[0]` is not usable: lr -1 is out of range; use a number of 0 or more",
        ),
        (
            "student.init={from=\"x\", layers=[]}",
            "`student.init.layers` is empty; name layers, as in [0, 4, 8], or remove it",
        ),
        (
            "student.init={from=\"x\", layers=[0, 1]}",
            "`student.init.layers` has 2 layers, but `student.shape.layers` is 4; give only one of the two",
        ),
        ("student.init={from=\"x\", experts=0}", "`student.init.experts` is 0; use at least 1"),
        ("train.keep_checkpoints=0", "`train.keep_checkpoints` is 0; use at least 1"),
        ("train.log_every=0", "`train.log_every` is 0; use at least 1"),
    ];
    for (word, message) in cases {
        let found = mistake(SMALL, &[word]);
        assert_eq!(found.strip_prefix(&format!("--set {word}: ")).unwrap_or(&found), message, "--set {word}");
    }
    assert_eq!(mistake_in("top_k = 32", "top_k = 0"), "line 12: `cache.top_k` is 0; keep at least 1 id per prediction");
}

#[test]
fn a_tap_takes_no_steps_that_do_not_count() {
    let tapped = format!("{SMALL}[tap]\n");
    let problem = "lets the run go on after a step that does not count, and `[tap]` keeps that step's predictions";
    for (key, reaction) in [("not_finite", "skip"), ("spike", "rewind")] {
        let word = format!("train.guards.{key}={reaction}");
        let expected = format!("--set {word}: `train.guards.{key}` {problem}; use `stop`, or remove [tap]");
        assert_eq!(mistake(&tapped, &[&word]), expected);
    }
    parse(&tapped, &["train.guards.spike=stop"]).unwrap();
}

#[test]
fn contradictions_are_refused_with_a_way_out() {
    let cases = [
        (
            &["student.checkpoint=a"][..],
            "`student.checkpoint` is given beside `student.shape`; give only one of the two",
        ),
        (&["cache.router_layers=[0, 1, 0]"], "`cache.router_layers` has 0 twice; name each layer once"),
        (
            &["cache.router_layers=[0]", "teacher.mode=streamed"],
            "`cache.router_layers` asks for routers, which only a teacher that is resident on one device gives; remove it, \
             or teacher.mode and teacher.mesh",
        ),
        (
            &["loss.router={layers=[[0, 1]]}", "cache.router_layers=[0]"],
            "`loss.router.layers` names the teacher's layer 1, whose router the cache does not keep; add 1 to \
             cache.router_layers",
        ),
        (
            &["loss.router={layers=[[0, 0], [0, 1]]}", "cache.router_layers=[0, 1]"],
            "`loss.router.layers` has the student's layer 0 twice; let each of its routers follow one of the teacher's",
        ),
        (
            &["loss.router={layers=[]}"],
            "`loss.router.layers` is empty; name pairs of a student's and a teacher's layer, as in [[0, 0], [1, 4]]",
        ),
        (&["train.epochs=2"], "`train.epochs` is given beside `train.steps`; give only one of the two"),
        (
            &["student.shape.heads=6", "student.shape.kv_heads=4"],
            "`student.shape.kv_heads` is 4, which does not divide `heads` = 6; each key head serves the same number of \
             query heads",
        ),
        (
            &["student.shape.experts=2", "student.shape.experts_per_token=3"],
            "`student.shape.experts_per_token` is 3, but `experts` is 2; use at most 2",
        ),
        (
            &["student.shape.like=llama", "student.shape.experts=2"],
            "`student.shape.experts` is a key of Llama 4 shapes, and this student is like `llama`; remove it, or use like = \
             \"scout\"",
        ),
        (
            &["train.lr.schedule=constant", "train.lr.to=1e-4"],
            "`train.lr.to` is not for a `constant` schedule; remove it",
        ),
        (&["loss.weighting.kind=linear", "loss.weighting.from=0.9"], "`loss.weighting.to` is missing; add `to`"),
        (
            &["loss.weighting={ kind = \"cosine\", soft = 0.5 }"],
            "`loss.weighting.soft` is not for this kind; use `from` or `to`",
        ),
        (
            &["loss.weighting={ kind = \"constant\", soft = 1.5 }"],
            "`loss.weighting.soft` is 1.5; use a number from 0 to 1",
        ),
        (
            &["train.evaluate_every=5"],
            "`train.evaluate_every` asks for evaluations, and this recipe holds nothing out; add data.held_out, as in held_out \
             = \"1M\"",
        ),
    ];
    for (overrides, message) in cases {
        let found = mistake(SMALL, overrides);
        assert!(found.ends_with(message), "{overrides:?}: {found}");
    }

    let no_teacher = SMALL.replace("[teacher]\ncheckpoint = \"models/teacher\"\n", "");
    assert_eq!(
        mistake(&format!("{no_teacher}[control]\n"), &[]),
        "line 19: `control` compares with a run that has a teacher, and this recipe has none; add [teacher], or remove \
         [control]"
    );
    assert_eq!(
        mistake(&no_teacher, &["loss.weighting={ kind = \"constant\", soft = 0.5 }"]),
        "--set loss.weighting={ kind = \"constant\", soft = 0.5 }: `loss.weighting` gives the soft target a weight, and \
         this recipe has no teacher; add [teacher], or remove the key"
    );
    assert_eq!(
        mistake_in("shape = { like = \"scout\", layers = 4 }", ""),
        "line 14: `student` has neither `shape` nor `checkpoint`; give one, as in shape = { like = \"scout\", layers = 4 }"
    );
    assert_eq!(
        mistake_in("shape = { like = \"scout\", layers = 4 }", "checkpoint = \"a\"\ninit_std = 0.1"),
        "line 16: `student.init_std` is for a new model, and this student starts from `student.checkpoint`; remove one of \
         the two"
    );
    assert_eq!(
        mistake_in("steps = 100\n", ""),
        "line 17: `train` has neither `steps` nor `epochs`; give one of the two"
    );
}

#[test]
fn what_only_the_models_know_is_checked_with_their_numbers() {
    let recipe = parse(SMALL, &[]).unwrap();
    recipe.check_selection(32).unwrap();
    recipe.check_seq_len("the teacher", 256).unwrap();
    recipe.check_vocabulary(320, 300, Some(320)).unwrap();
    let messages = [
        (
            recipe.check_selection(31),
            "line 12: `cache.top_k` is 32, but the teacher's vocabulary has 31 tokens; use at most 31",
        ),
        (
            recipe.check_seq_len("the teacher", 255),
            "line 6: `data.seq_len` is 256, but the teacher reads at most 255 positions; use at most 255",
        ),
        (
            recipe.check_vocabulary(299, 300, None),
            "`student.shape.vocab` gives a vocabulary of 299, but the tokenizer has 300 tokens; use at least 300",
        ),
        (
            recipe.check_vocabulary(300, 300, Some(320)),
            "`student.shape.vocab` gives a vocabulary of 300, but the teacher's has 320 tokens; student and teacher must \
             predict the same tokens",
        ),
    ];
    for (result, message) in messages {
        let error = result.unwrap_err();
        assert_eq!(error.to_string(), format!("/recipes/small.toml: {message}"));
        assert_eq!(error.exit_code(), 2);
    }
}

/// A recipe over `a.jsonl` in a folder, which holds some tokens out.
fn with_text(folder: &Path) -> Recipe {
    let text =
        |number: usize| format!("{{\"text\": \"document {number} is about {}\"}}\n", "nothing ".repeat(number % 7));
    std::fs::write(folder.join("a.jsonl"), (0..200).map(text).collect::<String>()).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/tokenizer");
    let text = format!(
        "name = \"kept\"\nrun.dir = \"run\"\n[data]\nsources = [{{ path = \"*.jsonl\" }}]\ntokens = \"1k\"\nseq_len = 16\n\
         held_out = 300\ntokenizer = {tokenizer:?}\n[student]\nshape = {{ like = \"llama\", layers = 1 }}\n[train]\n\
         steps = 1\nbatch_tokens = 16\nlr = {{ schedule = \"constant\", from = 1e-3 }}\n"
    );
    Recipe::parse(&text, folder.join("recipe.toml"), &[]).unwrap()
}

#[test]
fn the_plan_keeps_the_held_out_share_for_later_runs_of_the_same_data() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = with_text(folder.path());
    let options = RunOptions::default();
    let held_out = |inputs: &Inputs| {
        let mut loader = DataLoader::held_out(&inputs.data, &inputs.tokenizer).unwrap();
        std::iter::from_fn(|| loader.next_sequence().unwrap()).collect::<Vec<_>>()
    };
    let mut inputs = Inputs::open(&recipe, &options).unwrap();
    assert_eq!((&inputs.data.held_out, inputs.plan.held_out_share), (&HeldOut::Tokens(300), None));
    let sequences = held_out(&inputs);
    inputs.resolve_held_out().unwrap();
    let share = inputs.plan.held_out_share.unwrap();
    assert_eq!(inputs.data.held_out, HeldOut::Share(share));
    assert_eq!(held_out(&inputs), sequences);
    inputs.freeze().unwrap();

    std::fs::copy(folder.path().join("a.jsonl"), folder.path().join("b.jsonl")).unwrap();
    let again = Inputs::open(&recipe, &options).unwrap();
    assert_eq!((&again.data.held_out, again.plan.held_out_share), (&HeldOut::Share(share), Some(share)));
    let frozen = Recipe::load(folder.path().join("run/recipe.toml"), &[]).unwrap();
    assert_eq!(Inputs::open(&frozen, &options).unwrap().plan.held_out_share, Some(share));

    for change in ["seed=1", "data.held_out=400", "data.sources.0.weight=2", "data.document_start=\"\""] {
        let changed = Recipe::load(folder.path().join("run/recipe.toml"), &[change.to_string()]).unwrap();
        assert_eq!(Inputs::open(&changed, &options).unwrap().plan.held_out_share, None, "{change}");
    }
    std::fs::write(folder.path().join("run/plan.json"), "{").unwrap();
    assert_eq!(Inputs::open(&recipe, &options).unwrap().data.held_out, HeldOut::Tokens(300));
}

#[test]
fn held_out_text_needs_targets_at_temperature_one() {
    let overrides = ["data.held_out=1%", "cache.temperatures=[2.0]", "loss.temperature=2.0"];
    let message = mistake(SMALL, &overrides);
    assert!(message.contains("`cache.temperatures` lacks 1.0, at which held-out text is compared"), "{message}");
    parse(SMALL, &["data.held_out=1%", "cache.temperatures=[1.0, 2.0]", "loss.temperature=2.0"]).unwrap();
}

#[test]
fn a_selection_is_a_name_a_table_or_a_number_of_ids() {
    let selection = |overrides: &[&str]| parse(SMALL, overrides).unwrap().cache.selection();
    assert_eq!(selection(&[]), Selection::TopK { k: 32 });
    let without = SMALL.replace("[cache]\ntop_k = 32\n", "");
    let recipe = parse(&without, &[]).unwrap();
    assert_eq!(recipe.cache.selection(), Selection::MinProb { theta: 1e-3, cap: 128 });
    assert_eq!(recipe.cache.selection(), Selection::default());
    // The default is frozen with the recipe.
    assert!(recipe.to_toml().contains("theta = 0.001"), "{}", recipe.to_toml());

    // An override of one takes the place of the other, and later ones that of earlier ones.
    assert_eq!(selection(&["cache.selection=min_prob"]), Selection::default());
    assert_eq!(
        selection(&["cache.selection={ kind = \"threshold_sampled\", threshold = 3e-3, seed = 5 }"]),
        Selection::ThresholdSampled { threshold: 3e-3, seed: 5 }
    );
    assert_eq!(
        selection(&["cache.selection=sampled", "cache.selection={ kind = \"top_p\" }", "cache.selection.p=0.8"]),
        Selection::TopP { p: 0.8, cap: 128 }
    );
    assert_eq!(selection(&["cache.selection=sampled", "cache.top_k=5"]), Selection::TopK { k: 5 });
    assert_eq!(
        selection(&["cache.selection={ kind = \"sampled\", draws = 9 }"]),
        Selection::Sampled { draws: 9, seed: 0 }
    );
    let frozen = parse(SMALL, &["cache.selection=threshold_sampled"]).unwrap().to_toml();
    let again = Recipe::parse(&frozen, "/elsewhere/recipe.toml", &[]).unwrap();
    assert_eq!(again.cache.selection(), Selection::ThresholdSampled { threshold: 1e-2, seed: 0 });
    assert_eq!(again.to_toml(), frozen);
}

#[test]
fn a_selection_that_cannot_be_is_refused_with_its_place() {
    assert_eq!(
        mistake_in("top_k = 32", "top_k = 32\nselection = \"min_prob\""),
        "line 12: `cache.top_k` is given beside `cache.selection`; give only one of the two"
    );
    assert_eq!(
        mistake_in("top_k = 32", "selection = \"min_probe\""),
        "line 12: `cache.selection` is `min_probe`; allowed: `min_prob`, `top_k`, `top_p`, `threshold_sampled`, \
         `sampled`; did you mean `min_prob`?"
    );
    assert_eq!(
        mistake_in("top_k = 32", "selection = { kind = \"min_prob\", thteta = 1e-3 }"),
        "line 12: `thteta` is not a key of [cache.selection]; did you mean `theta`?"
    );
    assert_eq!(
        mistake_in("top_k = 32", "selection = { kind = \"min_prob\", draws = 3 }"),
        "line 12: `cache.selection.draws` is not for this kind; use `theta` or `cap`"
    );
    assert_eq!(
        mistake_in("top_k = 32", "selection = { theta = 1e-3 }"),
        "line 12: `cache.selection.kind` is missing; add `kind`"
    );
    assert_eq!(
        mistake_in("top_k = 32", "selection = 3"),
        "line 12: `cache.selection` is integer `3`; expected the name of a selection, or a table with its `kind`"
    );
    let recipe = parse(SMALL, &["cache.selection={ kind = \"top_k\", k = 50 }"]).unwrap();
    let error = recipe.check_selection(40).unwrap_err().to_string();
    assert!(error.ends_with("`cache.selection.k` is 50, but the teacher's vocabulary has 40 tokens; use at most 40"));
    // A cap is no promise that there are as many.
    parse(SMALL, &["cache.selection=min_prob"]).unwrap().check_selection(40).unwrap();
}

#[test]
fn losses_that_drawn_targets_would_bias_are_refused_with_their_place() {
    let drawn = "cache.selection=threshold_sampled";
    assert_eq!(
        mistake(&SMALL.replace("[cache]", "[loss]\ndivergence = \"reverse_kl\"\n[cache]"), &[drawn]),
        "line 12: `loss.divergence` does not go with `cache.selection` = `threshold_sampled`: reverse_kl of sampled \
         targets is biased; use `forward_kl` or `soft_cross_entropy`, or keep the likeliest ids"
    );
    assert_eq!(
        mistake(SMALL, &["loss.weighting={ kind = \"teacher_entropy\", soft = 0.5 }", "cache.selection=sampled"]),
        "--set loss.weighting={ kind = \"teacher_entropy\", soft = 0.5 }: `loss.weighting` does not go with \
         `cache.selection` = `sampled`: the entropy of sampled targets is not the teacher's; use another weighting, or \
         keep the likeliest ids"
    );
    for fine in ["forward_kl", "soft_cross_entropy"] {
        let recipe = parse(SMALL, &[drawn, &format!("loss.divergence={fine}")]).unwrap();
        assert!(recipe.has_sampled_targets());
    }
    assert!(!parse(SMALL, &["loss.divergence=reverse_kl", "cache.selection=top_p"]).unwrap().has_sampled_targets());
}
