//! The command line: its words, its exit codes, and which of its two streams says what.

mod small_run;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use limbeck::models::llama4::Llama4Config;
use limbeck::recipe::Recipe;
use limbeck::tokenizer::train_byte_level_bpe;

struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
}

fn limbeck(arguments: &[&str]) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts");
    Outcome {
        code: output.status.code().expect("it was not killed"),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

const RECIPE: &str = r#"name = "cli"
[data]
sources = [{ path = "text.txt" }]
tokens = "100k"
seq_len = 128
held_out = "10k"
[teacher]
checkpoint = "teacher"
[cache]
top_k = 32
[student]
shape = { like = "scout" }
[control]
[train]
epochs = 2
batch_tokens = 1024
micro_batch_tokens = 512
lr = { schedule = "cosine", from = 3e-3, warmup = 50 }
"#;

/// A fresh directory with a recipe, and the text and teacher it names.
fn with_recipe() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("text.txt"), "The still warms, the retort cools.\n").unwrap();
    let text = std::fs::read_to_string(path("text.txt"));
    let tokenizer = train_byte_level_bpe(text.into_iter().map(Ok), 256, &[], &path("tokenizer")).unwrap();
    let teacher = Llama4Config { max_position_embeddings: 128, ..small_run::scout(2, tokenizer.vocab_size()) };
    small_run::write_random(teacher, &path("teacher"), 5);
    std::fs::copy(tokenizer.path(), path("teacher/tokenizer.json")).unwrap();
    let recipe = path("recipe-under-test.toml");
    std::fs::write(&recipe, RECIPE).unwrap();
    (folder, recipe)
}

#[test]
fn every_command_explains_itself() {
    let commands: [&[&str]; 20] = [
        &[],
        &["precompute-teacher-logits"],
        &["distill"],
        &["evaluate"],
        &["compare"],
        &["plan"],
        &["inspect"],
        &["cache"],
        &["cache", "convert"],
        &["cache", "merge"],
        &["cache", "import"],
        &["cache", "import", "distillkit"],
        &["cache", "import", "jsonl"],
        &["cache", "stats"],
        &["tokenizer"],
        &["tokenizer", "train"],
        &["generate"],
        &["logits"],
        &["export"],
        &["completions"],
    ];
    for command in commands {
        let arguments: Vec<&str> = command.iter().copied().chain(["--help"]).collect();
        let outcome = limbeck(&arguments);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{arguments:?}");
        let name = if command.is_empty() { "limbeck".to_string() } else { command.join("_") };
        insta::assert_snapshot!(format!("help_{name}"), outcome.stdout);
    }
}

#[test]
fn the_readme_names_every_command() {
    let readme = include_str!("../README.md");
    let help = limbeck(&["help"]).stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names: Vec<&str> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"distill"));
    for name in names.iter().filter(|name| **name != "help") {
        assert!(readme.contains(&format!("| `limbeck {name} ")), "the README's table lacks `{name}`");
    }
}

#[test]
fn the_version_is_the_packages() {
    let outcome = limbeck(&["--version"]);
    assert_eq!((outcome.code, outcome.stdout), (0, format!("limbeck {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn a_wrong_command_line_exits_2_and_says_so_on_stderr() {
    let wrong: [&[&str]; 5] =
        [&[], &["distil"], &["distill"], &["distill", "a.toml", "--topk", "3"], &["generate", "model"]];
    for arguments in wrong {
        let outcome = limbeck(arguments);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{arguments:?}");
        assert!(outcome.stderr.contains("Usage:"), "{arguments:?}: {}", outcome.stderr);
    }
    let outcome = limbeck(&["completions", "csh"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""));
    assert!(outcome.stderr.contains("[possible values: bash, elvish, fish, powershell, zsh]"), "{}", outcome.stderr);
}

#[test]
fn a_wrong_recipe_exits_2_with_one_line_on_stderr() {
    let (folder, recipe) = with_recipe();
    let recipe = recipe.to_str().unwrap();
    let missing = folder.path().join("none.toml");
    let missing = missing.to_str().unwrap();
    let cases: [(&[&str], String); 6] = [
        (&["distill", missing, "--dry-run"], format!("error: {missing}: no such recipe; check the path\n")),
        (
            &["distill", recipe, "--dry-run", "--set", "cache.topk=3"],
            format!("error: {recipe}: --set cache.topk=3: `topk` is not a key of [cache]; did you mean `top_k`?\n"),
        ),
        (
            &["precompute-teacher-logits", recipe, "--dry-run", "--set", "top_k"],
            "error: `--set top_k` is not an override; use `--set section.key=value`\n".to_string(),
        ),
        (
            &["evaluate", recipe, "--dry-run", "--device", "gpu"],
            "error: `--device gpu` names no device; use `cpu`, `cuda`, `cuda:N`, `wgpu` or `tch`\n".to_string(),
        ),
        (
            &["inspect", missing],
            format!(
                "error: there is nothing at {missing}; name a recipe, a .gguf file, or the directory of a cache, a checkpoint or a run\n"
            ),
        ),
        (
            &["inspect", folder.path().to_str().unwrap(), "--set", "seed=3"],
            format!("error: {} is not a recipe; use --set with recipes only\n", folder.path().display()),
        ),
    ];
    for (arguments, message) in cases {
        let outcome = limbeck(arguments);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{arguments:?}");
        assert_eq!(outcome.stderr, message);
    }
}

#[test]
fn a_directory_that_is_nothing_exits_1() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let outcome = limbeck(&["inspect", path]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""));
    assert_eq!(
        outcome.stderr,
        format!(
            "error: {path}: holds no recipe.toml, manifest.json, config.json or params.json; name a recipe, a .gguf file, or the directory of a cache, \
             a checkpoint or a run\n"
        )
    );
}

#[test]
fn inspect_refuses_flags_that_would_do_nothing() {
    let (folder, recipe) = with_recipe();
    let recipe = recipe.to_str().unwrap();
    for (flag, problem) in [("--verify", "is not a cache"), ("--tensors", "is not a checkpoint")] {
        let outcome = limbeck(&["inspect", recipe, flag]);
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        assert!(outcome.stderr.contains(&format!("{recipe} {problem}; use {flag} with")), "{}", outcome.stderr);
        assert_eq!(outcome.stdout, "");
    }
    drop(folder);
}

#[test]
fn a_run_directory_is_found_by_its_frozen_recipe() {
    let (folder, recipe) = with_recipe();
    let run_dir = folder.path().join("run");
    std::fs::create_dir(&run_dir).unwrap();
    std::fs::write(run_dir.join("recipe.toml"), Recipe::load(recipe, &[]).unwrap().to_toml()).unwrap();
    let path = run_dir.to_str().unwrap();
    let outcome = limbeck(&["evaluate", path, "--dry-run"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stdout.contains(&format!("run         {path}, on cpu\n")), "{}", outcome.stdout);
    assert_eq!(outcome.stdout, limbeck(&["inspect", path]).stdout);

    let outcome = limbeck(&["evaluate", path, "--dry-run", "--run-dir", "elsewhere"]);
    assert_eq!(outcome.code, 2);
    let message = format!("error: {path} is a run directory, and --run-dir is given as well; name one of the two\n");
    assert_eq!(outcome.stderr, message);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_this_build_lacks_is_refused_with_the_way_to_get_it() {
    let (_folder, recipe) = with_recipe();
    let outcome = limbeck(&["distill", recipe.to_str().unwrap(), "--device", "cuda", "--dry-run"]);
    assert_eq!(outcome.code, 2);
    assert_eq!(
        outcome.stderr,
        "error: `--device cuda` needs a build with the `cuda` feature; build with `cargo build --release --features cuda`, or \
         use `--device cpu`\n"
    );
}

#[test]
fn a_dry_run_prints_the_plan_on_stdout_and_writes_nothing() {
    let (folder, recipe) = with_recipe();
    let run_dir = folder.path().join("run");
    let arguments = ["distill", recipe.to_str().unwrap(), "--run-dir", run_dir.to_str().unwrap(), "--dry-run"];
    let outcome = limbeck(&arguments);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let root = folder.path().canonicalize().unwrap();
    let plan =
        outcome.stdout.replace(folder.path().to_str().unwrap(), "/runs").replace(root.to_str().unwrap(), "/runs");
    insta::assert_snapshot!("dry_run", plan);
    assert!(!run_dir.exists());
}

#[test]
fn inspect_of_a_recipe_whose_models_are_missing_warns_of_them() {
    let (folder, recipe) = with_recipe();
    std::fs::remove_dir_all(folder.path().join("teacher")).unwrap();
    let outcome = limbeck(&["inspect", recipe.to_str().unwrap(), "--set", "run.dir=run"]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let root = folder.path().canonicalize().unwrap();
    let plan =
        outcome.stdout.replace(root.to_str().unwrap(), "/runs").replace(folder.path().to_str().unwrap(), "/runs");
    insta::assert_snapshot!("inspect_recipe", plan);
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let outcome = limbeck(&["completions", shell]);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{shell}");
        for command in
            ["precompute-teacher-logits", "distill", "evaluate", "inspect", "tokenizer", "generate", "logits"]
        {
            assert!(outcome.stdout.contains(command), "{shell} knows no {command}");
        }
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}
