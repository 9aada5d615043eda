//! From a file and `--set` words to a [`Recipe`], with messages that say where each mistake was made.
//!
//! A `--set` is parsed at a made-up place behind the end of the file, so that one kind of byte span says which line or
//! which `--set` a value came from.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::captured;
use super::check::check;
use super::keys::{heading, sections, tip_for_unknown};
use super::schema::Recipe;
use crate::cache::is_url;
use crate::data::HeldOut;
use crate::error::{Error, Result};
use crate::hub::is_hub;

/// Where the keys of a recipe were written.
#[derive(Debug, Clone, Default)]
pub(super) struct Origin {
    path: PathBuf,
    /// `line 12` or `--set cache.top_k=0`, for each key that was written.
    places: BTreeMap<String, String>,
}

impl Recipe {
    /// Reads a recipe, applies the overrides (`section.key=value`, TOML or a bare word) and checks it.
    ///
    /// Relative paths, those of overrides too, are taken from the recipe's folder.
    ///
    /// # Errors
    /// [`Error::Recipe`] when the file cannot be read or says something unknown, contradictory or impossible;
    /// [`Error::Usage`] when an override is not `key=value`.
    pub fn load(path: impl AsRef<Path>, overrides: &[String]) -> Result<Recipe> {
        let path = path.as_ref();
        let unreadable = |problem: String, tip: &str| Error::Recipe { path: path.into(), problem, tip: tip.into() };
        if path.is_dir() {
            return Err(unreadable("is a directory".into(), "name the .toml file in it"));
        }
        let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => unreadable("no such recipe".into(), "check the path"),
            std::io::ErrorKind::InvalidData => unreadable("is not UTF-8 text".into(), "name a .toml file"),
            _ => unreadable(format!("cannot be read: {error}"), "check the path and its permissions"),
        })?;
        Recipe::parse(&text, path, overrides)
    }

    /// [`Recipe::load`] for text that is already read; `path` is for messages and relative paths.
    pub fn parse(text: &str, path: impl AsRef<Path>, overrides: &[String]) -> Result<Recipe> {
        let mut written = Written { path: path.as_ref().to_path_buf(), text, overrides: vec![], nodes: vec![] };
        // Each override gets its own byte range; all of them must outlive the table that borrows from them.
        let mut end = text.len() + 1;
        let mut padded = vec![];
        for word in overrides {
            let (key, value) = split_override(word)?;
            let range = end..end + word.len() + 16;
            end = range.end;
            padded.push((key, pad(range.start, value)));
            written.overrides.push((range, word.as_str()));
        }
        let mut table = DeTable::parse(text).map_err(|error| written.syntax_error(&error))?;
        for ((key, value), (range, word)) in padded.iter().zip(&written.overrides) {
            let document = DeTable::parse(value).map_err(|_| not_a_value(word))?.into_inner();
            let (1, Some((_, value))) = (document.len(), document.into_iter().next()) else {
                return Err(not_a_value(word));
            };
            let parts: Vec<&str> = key.split('.').collect();
            make_room(table.get_mut(), &parts);
            set(table.get_mut(), &parts, value, range).map_err(|part| {
                let problem = format!("--set {word}: `{part}` is not a section");
                written.error(problem, "use `section.key=value`".into())
            })?;
        }

        written.visit("", table.get_ref());
        written.refuse_unknown_keys(table.get_ref())?;
        let places = written.places();
        let mut recipe =
            Recipe::deserialize(toml::de::Deserializer::from(table)).map_err(|error| written.type_error(&error))?;
        recipe.origin = Origin { path: written.path, places };
        recipe.make_paths_absolute()?;
        captured::take_over(&mut recipe)?;
        check(&recipe)?;
        if recipe.cache.top_k.is_none() {
            // So that a frozen recipe means the same when the default is another one day.
            recipe.cache.selection = Some(recipe.cache.selection());
        }
        if let Some(tap) = recipe.tap.as_mut().filter(|tap| tap.top_k.is_none()) {
            tap.selection = Some(tap.selection());
        }
        Ok(recipe)
    }

    /// The whole recipe as TOML: overrides applied, defaults filled in, paths absolute. Loading it gives an equal recipe.
    pub fn to_toml(&self) -> String {
        let mut table = toml::Table::try_from(self).expect("every value of a checked recipe can be written as TOML");
        captured::leave_out(self, &mut table);
        toml::to_string(&table).expect("it was a recipe")
    }

    /// The file this recipe came from.
    pub fn path(&self) -> &Path {
        &self.origin.path
    }

    /// Whether a key was written, in the file or by an override.
    pub(super) fn says(&self, key: &str) -> bool {
        self.origin.places.contains_key(key)
    }

    /// Refuses a recipe in which a key was not written; an error of the place where its section was.
    pub(super) fn needs(&self, section: &str, key: &str) -> Result<()> {
        if self.says(&format!("{section}.{key}")) {
            return Ok(());
        }
        let place = self.origin.places.get(section).map(|place| format!("{place}: ")).unwrap_or_default();
        let problem = format!("{place}`{section}.{key}` is missing");
        Err(Error::Recipe { path: self.origin.path.clone(), problem, tip: format!("add `{key}`") })
    }

    /// An error about one key (`cache.top_k`), which says where the key was written.
    pub fn error(&self, key: &str, problem: impl AsRef<str>, tip: impl Into<String>) -> Error {
        let place = self.origin.places.get(key).map(|place| format!("{place}: ")).unwrap_or_default();
        let problem = format!("{place}`{key}` {}", problem.as_ref());
        Error::Recipe { path: self.origin.path.clone(), problem, tip: tip.into() }
    }

    fn make_paths_absolute(&mut self) -> Result<()> {
        let folder =
            self.origin.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Without symbolic links, so that `..` can be taken back by its words alone.
        let folder = folder.canonicalize().or_else(|_| std::path::absolute(folder)).map_err(Error::io(folder))?;
        let held_out = match &mut self.data.held_out {
            HeldOut::Sources(sources) => &mut sources[..],
            _ => &mut [],
        };
        for source in self.data.sources.iter_mut().chain(held_out) {
            source.path = absolute(&folder, Path::new(&source.path)).to_string_lossy().into_owned();
        }
        let cache = &mut self.cache;
        let others = [&mut self.data.tokenizer, &mut self.student.checkpoint, &mut self.run.dir];
        let others = others.into_iter().chain([&mut cache.dir, &mut cache.train, &mut cache.held_out]);
        let teacher = self.teacher.iter_mut().map(|teacher| &mut teacher.checkpoint);
        let teacher = teacher.filter(|checkpoint| !checkpoint.as_os_str().is_empty());
        let donor = self.student.init.iter_mut().map(|init| &mut init.from);
        for path in others.flatten().chain(teacher).chain(donor).chain(&mut cache.reuse) {
            *path = absolute(&folder, path);
        }
        Ok(())
    }
}

fn absolute(folder: &Path, path: &Path) -> PathBuf {
    if is_url(path) || is_hub(path) {
        return path.to_path_buf();
    }
    let mut result = folder.to_path_buf();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(result.pop()),
            part => result.push(part),
        }
    }
    result
}

/// One key of the merged table: its path, and the bytes of its name and value.
struct Node {
    path: String,
    key: Range<usize>,
    value: Range<usize>,
}

/// What was written, for finding the place of a mistake.
struct Written<'a> {
    path: PathBuf,
    text: &'a str,
    overrides: Vec<(Range<usize>, &'a str)>,
    nodes: Vec<Node>,
}

impl Written<'_> {
    fn error(&self, problem: String, tip: String) -> Error {
        Error::Recipe { path: self.path.clone(), problem, tip }
    }

    fn place(&self, at: usize) -> String {
        if let Some((_, word)) = self.overrides.iter().find(|(range, _)| range.contains(&at)) {
            return format!("--set {word}");
        }
        let line = self.text.as_bytes()[..at.min(self.text.len())].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("line {line}")
    }

    fn places(&self) -> BTreeMap<String, String> {
        self.nodes.iter().map(|node| (node.path.clone(), self.place(node.value.start))).collect()
    }

    fn visit(&mut self, path: &str, table: &DeTable) {
        for (key, value) in table.iter() {
            let path = if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
            self.nodes.push(Node { path: path.clone(), key: key.span(), value: value.span() });
            match value.get_ref() {
                DeValue::Table(inner) => self.visit(&path, inner),
                DeValue::Array(entries) => {
                    for (number, entry) in entries.iter().enumerate() {
                        let path = format!("{path}[{number}]");
                        self.nodes.push(Node { path: path.clone(), key: entry.span(), value: entry.span() });
                        if let DeValue::Table(inner) = entry.get_ref() {
                            self.visit(&path, inner);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    fn refuse_unknown_keys(&self, table: &DeTable) -> Result<()> {
        let sections = sections();
        let mut pending: Vec<(String, &DeTable)> = vec![(String::new(), table)];
        let mut mistakes = vec![];
        while let Some((path, table)) = pending.pop() {
            let Some(section) = sections.iter().find(|section| section.path == path) else { continue };
            for (key, value) in table.iter() {
                let name = key.get_ref();
                let path = if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
                if !section.keys.contains(&&**name) {
                    mistakes.push((key.span().start, path, tip_for_unknown(name, section), heading(section.path)));
                    continue;
                }
                match value.get_ref() {
                    DeValue::Table(inner) => pending.push((path, inner)),
                    DeValue::Array(entries) => {
                        pending.extend(entries.iter().filter_map(|entry| match entry.get_ref() {
                            DeValue::Table(inner) => Some((format!("{path}[]"), inner)),
                            _ => None,
                        }))
                    }
                    _ => {}
                }
            }
        }
        // The first in the file, whatever the order of the tables in memory.
        match mistakes.into_iter().min() {
            None => Ok(()),
            Some((at, path, tip, heading)) => {
                let name = path.rsplit('.').next().unwrap_or(&path);
                Err(self.error(format!("{}: `{name}` is not a key of {heading}", self.place(at)), tip))
            }
        }
    }

    fn syntax_error(&self, error: &toml::de::Error) -> Error {
        let place = error.span().map(|span| format!("{}: ", self.place(span.start))).unwrap_or_default();
        let message = error.message().lines().next().unwrap_or("unreadable").to_string();
        self.error(format!("{place}is not TOML: {message}"), "mend the line".into())
    }

    /// Turns what serde says into key, value and what is allowed.
    fn type_error(&self, error: &toml::de::Error) -> Error {
        let span = error.span();
        // toml's display ends with "in `a.b`"; the span, where it fits a node, also knows the place in a list.
        let display = error.to_string();
        let named = display.lines().last().and_then(|line| line.strip_prefix("in `")?.strip_suffix('`'));
        let exact = span.as_ref().and_then(|span| self.nodes.iter().rev().find(|node| node.value == *span));
        let path = exact.map(|node| node.path.clone()).or(named.map(String::from)).unwrap_or_default();
        let message = error.message();

        if let Some(key) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
            // The span of a missing key is its section's, or nothing at all.
            let section = named.map(|_| path.clone()).unwrap_or_default();
            return if section.is_empty() && ["data", "student", "train"].contains(&key) {
                self.error(format!("section [{key}] is missing"), format!("add [{key}]"))
            } else if section.is_empty() {
                self.error(format!("`{key}` is missing"), "add it at the top of the recipe".into())
            } else {
                self.error(format!("{}`{section}.{key}` is missing", self.prefix(&section)), format!("add `{key}`"))
            };
        }
        let place = self.prefix(&path);
        if let Some((value, allowed)) =
            message.strip_prefix("unknown variant `").and_then(|rest| rest.split_once("`, expected "))
        {
            let allowed = allowed.trim_start_matches("one of ");
            let near = allowed.split('`').find(|word| strsim::normalized_damerau_levenshtein(value, word) >= 0.6);
            let tip = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
            return self.error(format!("{place}`{path}` is `{value}`"), format!("allowed: {allowed}{tip}"));
        }
        // Other unknown keys are found before: this is one of a table whose keys depend on its kind.
        if let Some((key, allowed)) =
            message.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, expected "))
        {
            let key = format!("{path}.{key}");
            return self.error(format!("{}`{key}` is not for this kind", self.prefix(&key)), format!("use {allowed}"));
        }
        let invalid = ["invalid type: ", "invalid value: ", "invalid length "];
        if let Some((value, expected)) = invalid
            .iter()
            .find_map(|prefix| message.strip_prefix(prefix))
            .and_then(|rest| rest.rsplit_once(", expected "))
        {
            return self.error(format!("{place}`{path}` is {value}"), format!("expected {}", in_words(expected)));
        }
        self.error(format!("{place}`{path}`: {message}"), "see docs/recipes.md".into())
    }

    fn prefix(&self, path: &str) -> String {
        let node = self.nodes.iter().find(|node| node.path == path);
        node.map(|node| format!("{}: ", self.place(node.key.start))).unwrap_or_default()
    }
}

fn in_words(expected: &str) -> Cow<'_, str> {
    match expected {
        "u64" | "usize" | "u32" => "a whole number, 0 or more".into(),
        "f64" | "f32" => "a number".into(),
        "a boolean" => "true or false".into(),
        "a sequence" => "a list, as in [1, 2]".into(),
        "path string" => "a path in quotes".into(),
        "an array of length 2" => "two numbers, as in [0.9, 0.95]".into(),
        other if other.starts_with("struct ") => "a table, as in { key = value }".into(),
        other => other.into(),
    }
}

/// `key=value` as its two halves; a value that is not TOML becomes a quoted string.
fn split_override(word: &str) -> Result<(&str, Cow<'_, str>)> {
    let usable = |key: &str| !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
    if let Some((first, _)) = word.split_once('\n') {
        return Err(Error::usage(
            format!("`--set {first} ...` goes on after a line break"),
            "use one `--set` for each key",
        ));
    }
    let (key, value) = word.split_once('=').map(|(key, value)| (key.trim(), value.trim())).unwrap_or(("", ""));
    if !usable(key) || key.split('.').any(str::is_empty) {
        return Err(Error::usage(format!("`--set {word}` is not an override"), "use `--set section.key=value`"));
    }
    if value.is_empty() {
        return Err(Error::usage(format!("`--set {word}` has no value"), "use `--set section.key=value`"));
    }
    if DeTable::parse(&pad(0, value.into())).is_ok() {
        return Ok((key, value.into()));
    }
    // A bare word: anything that could not be the start of something quoted or bracketed.
    if value.contains(['"', '\'', '[', ']', '{', '}', '\\']) {
        return Err(not_a_value(word));
    }
    Ok((key, format!("\"{value}\"").into()))
}

fn not_a_value(word: &str) -> Error {
    Error::usage(
        format!("`--set {word}` has a value that is not TOML"),
        "quote it for the shell, as in --set 'data.document_end=\"</s>\"'",
    )
}

/// A document of one key, whose value starts at byte `start` at the earliest.
fn pad(start: usize, value: Cow<'_, str>) -> String {
    format!("{:start$}v = {value}", "")
}

/// Removes what an override replaces under another name: a recipe has one of the two.
fn make_room(table: &mut DeTable, parts: &[&str]) {
    let (section, other) = match parts {
        [section @ ("cache" | "tap"), "top_k", ..] => (*section, "selection"),
        [section @ ("cache" | "tap"), "selection", ..] => (*section, "top_k"),
        _ => return,
    };
    if let Some(DeValue::Table(section)) = table.get_mut(section).map(Spanned::get_mut) {
        section.remove(other);
    }
}

/// Puts a value at a path, making sections on the way. The error is the part that is no section.
fn set<'i>(
    table: &mut DeTable<'i>,
    parts: &[&'i str],
    value: Spanned<DeValue<'i>>,
    range: &Range<usize>,
) -> std::result::Result<(), String> {
    let (name, rest) = parts.split_first().expect("an override has a key");
    let key = || Spanned::new(range.clone(), Cow::Borrowed(*name));
    if rest.is_empty() {
        // Removed first: inserting over an old entry would keep the old key, and with it the old place.
        table.remove(*name);
        table.insert(key(), value);
        return Ok(());
    }
    if !table.contains_key(*name) {
        table.insert(key(), Spanned::new(range.clone(), DeValue::Table(DeTable::new())));
    }
    let inner = table.get_mut(*name).expect("just inserted").get_mut();
    match inner {
        DeValue::Table(inner) => set(inner, rest, value, range),
        DeValue::Array(entries) if rest.len() > 1 => {
            let entry = rest[0].parse::<usize>().ok().and_then(|number| entries.get_mut(number));
            match entry.map(Spanned::get_mut) {
                Some(DeValue::Table(inner)) => set(inner, &rest[1..], value, range),
                _ => Err(format!("{name}.{}", rest[0])),
            }
        }
        _ => Err(name.to_string()),
    }
}
