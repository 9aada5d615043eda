//! What the documentation says about the tree is true: the paths it names exist, the commands it shows parse, and
//! modules import what the architecture allows them to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a run makes, a user provides or a build leaves: not in the repository.
const NOT_IN_THE_TREE: [&str; 6] = ["runs/", "models/", "target/", "cache/", "checkpoints/", "control/checkpoints/"];
/// Looks like a path, and is the name of a model on the Hugging Face hub.
const HUB_NAME: &str = "HuggingFaceTB/SmolLM2-135M";
/// The one file of a run that has an ending of our own files.
const FROZEN_RECIPE: &str = "recipe.toml";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Everything below a folder of the repository, without what builds, runs and users put there.
fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let foreign = ["target", "runs", "models", ".git"].map(|name| root().join(name));
    let entries = entries.filter(|path| !foreign.contains(path));
    entries.flat_map(|path| if path.is_dir() { [below(&path), vec![path]].concat() } else { vec![path] }).collect()
}

/// A document's shell lines, and its text outside of fences.
fn shell_and_text(document: &str) -> (Vec<String>, String) {
    let (mut shell, mut text, mut language) = (vec![], String::new(), None);
    for line in read(document).lines() {
        match (line.strip_prefix("```"), &language) {
            (Some(_), Some(_)) => language = None,
            (Some(name), None) => language = Some(name.to_string()),
            (None, Some(name)) if name == "sh" => shell.push(line.to_string()),
            (None, Some(_)) => {}
            (None, None) => text.extend([line, "\n"]),
        }
    }
    assert_eq!(language, None, "{document}: a fence is not closed");
    (shell, text)
}

/// What stands in backticks.
fn ticked(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Words that can only be meant as paths in the repository: plain names with a slash between them, and names of files
/// with an ending of ours.
fn is_meant_as_a_path(word: &str) -> bool {
    let plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
    let ours = [".rs", ".md", ".py", ".toml"].iter().any(|ending| word.ends_with(ending));
    plain && !word.starts_with(['/', '.', '-']) && (word.contains('/') || ours)
}

#[test]
fn every_path_that_the_documentation_names_exists() {
    let tree = below(root());
    for (document, least) in [("README.md", 8), ("docs/architecture.md", 40), ("recipes/README.md", 5)] {
        let (shell, text) = shell_and_text(document);
        let words = shell.iter().flat_map(|line| shell_words(line)).chain(ticked(&text).map(String::from));
        let paths: BTreeSet<String> = words.filter(|word| is_meant_as_a_path(word)).collect();
        assert!(paths.len() >= least, "{document} names only {paths:?}");
        for path in paths {
            let made = NOT_IN_THE_TREE.iter().any(|start| path.starts_with(start));
            // `schema.rs` in a paragraph on `src/recipe/`, `quickstart/scout.toml` in `recipes/`: the end of a path.
            let found = tree.iter().any(|file| file.ends_with(&path));
            assert!(made || found || path == HUB_NAME || path == FROZEN_RECIPE, "{document}: there is no `{path}`");
        }
    }
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut followed = 0;
    let mut documents = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root().join(name)).to_vec();
    documents.extend(["docs", "recipes"].iter().flat_map(|folder| below(&root().join(folder))));
    for document in documents.into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "md")) {
        let (_, text) = shell_and_text(document.to_str().unwrap());
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let target = document.parent().unwrap().join(link);
            assert!(link.contains("://") || target.exists(), "{}: no {link} to link to", document.display());
            followed += 1;
        }
    }
    assert!(followed >= 20, "only {followed} links found");
}

/// A line as a shell splits it, without comments.
fn shell_words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (vec![], None::<String>, None);
    for character in line.chars() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, ' ') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    assert_eq!(quote, None, "a quote is not closed: {line}");
    words.into_iter().chain(word).collect()
}

#[test]
fn every_command_that_the_documentation_shows_parses() {
    let mut shown = BTreeSet::new();
    for document in ["README.md", "CONTRIBUTING.md", "recipes/README.md", "docs/recipes.md"] {
        let (shell, text) = shell_and_text(document);
        for line in shell.iter().map(String::as_str).chain(ticked(&text)) {
            let programs = ["limbeck ", "./target/release/limbeck ", "cargo run --release -- "];
            let Some(command) = programs.iter().find_map(|program| line.strip_prefix(program)) else { continue };
            // Words in capitals stand for anything, except that a shell is one of a few. With --help at the end nothing
            // runs, and an unknown command or flag before it is still an error.
            let words = shell_words(&command.replace("SHELL", "bash"));
            let output = Command::new(env!("CARGO_BIN_EXE_limbeck"))
                .args(&words)
                .arg("--help")
                .stdin(Stdio::null())
                .output()
                .expect("the program starts");
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "{document}: limbeck {command}: {complaint}");
            shown.insert(words[0].clone());
        }
    }
    for command in ["precompute-teacher-logits", "distill", "evaluate", "inspect", "tokenizer", "generate", "logits"] {
        assert!(shown.contains(command), "the documentation shows no {command}");
    }
}

/// The first names after `crate::` in a source file: `a` and `b` in `use crate::{a::X, b}`. Comments do not count.
fn modules_used_by(source: &str) -> BTreeSet<String> {
    let code: String = source.lines().map(|line| line.split("//").next().unwrap_or("").to_string() + "\n").collect();
    let mut used = BTreeSet::new();
    let mut note = |text: &str| {
        let name: String = text.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        // `crate::Error` and `crate::Result` are short for those of the module `error`.
        used.insert(if ["Error", "Result"].contains(&name.as_str()) { "error".to_string() } else { name });
    };
    for rest in code.split("crate::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            note(rest);
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (place, character) in list.char_indices() {
            match character {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    if !list[start..place].trim().is_empty() {
                        note(&list[start..place]);
                    }
                    start = place + 1;
                    if character == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
    }
    used
}

#[test]
fn modules_import_only_what_the_architecture_allows() {
    let architecture = read("docs/architecture.md");
    let table = architecture.split("## Who may import whom").nth(1).expect("the page has the table");
    let mut allowed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in table.split("\n## ").next().unwrap().lines().filter(|line| line.starts_with("| `")) {
        let mut names = ticked(line).map(String::from);
        allowed.insert(names.next().unwrap(), names.collect());
    }
    let source = root().join("src");
    let mut modules = BTreeSet::new();
    for path in below(&source).into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "rs")) {
        let module =
            path.strip_prefix(&source).unwrap().iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let allowed = allowed.get(module).unwrap_or_else(|| panic!("the table has no row for `{module}`"));
        for used in modules_used_by(&read(&path)) {
            let fine = used == module || allowed.contains(&used);
            assert!(fine, "{} uses `{used}`, which docs/architecture.md does not allow", path.display());
        }
        modules.insert(module.to_string());
    }
    assert_eq!(modules, allowed.into_keys().collect(), "the table has one row for each module");
}
