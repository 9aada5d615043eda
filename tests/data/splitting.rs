use super::*;
use limbeck::data::HeldOut;
use std::collections::HashSet;

fn sides(config: &DataConfig, tokenizer: &Tokenizer) -> (Vec<String>, Vec<String>) {
    let training = all_sequences(&mut DataLoader::new(config, tokenizer).unwrap());
    let held_out = all_sequences(&mut DataLoader::held_out(config, tokenizer).unwrap());
    (texts_of(&training, tokenizer), texts_of(&held_out, tokenizer))
}

fn set(texts: &[String]) -> HashSet<&str> {
    texts.iter().map(String::as_str).collect()
}

#[test]
fn held_out_documents_and_their_copies_are_never_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let (a, b) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
    write_jsonl(&a, &documents("a", 200));
    // Half of the second source repeats the first.
    let copies: Vec<String> = documents("a", 200).into_iter().step_by(2).chain(documents("b", 100)).collect();
    write_jsonl(&b, &copies);
    let config = config(vec![source(a), source(b)]);
    for held_out in [HeldOut::Share(0.1), HeldOut::Tokens(1000)] {
        let config = DataConfig { held_out, ..config.clone() };
        let (training, held_out) = sides(&config, &tokenizer);
        assert!(set(&training).is_disjoint(&set(&held_out)));
        assert_eq!(set(&training).len() + set(&held_out).len(), 300);
        assert_eq!(set(&held_out).len(), held_out.len(), "copies are evaluated once");
        assert!((10..80).contains(&held_out.len()), "{}", held_out.len());
    }
}

#[test]
fn an_amount_of_tokens_is_met_by_less_than_a_document() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let path = folder.path().join("a.jsonl");
    write_jsonl(&path, &documents("a", 300));
    let config = DataConfig { held_out: HeldOut::Tokens(1500), ..config(vec![source(path)]) };
    let (_, held_out) = sides(&config, &tokenizer);
    let lengths: Vec<usize> = held_out.iter().map(|text| tokenizer.encode(text).unwrap().len() + 2).collect();
    let total: usize = lengths.iter().sum();
    assert!(total >= 1500 && total < 1500 + lengths.iter().max().unwrap(), "{total}");
}

#[test]
fn the_split_stays_when_sources_are_added_reordered_or_reweighted() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let (a, b) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
    write_jsonl(&a, &documents("a", 200));
    write_jsonl(&b, &documents("b", 200));
    let amount = DataConfig { held_out: HeldOut::Tokens(2000), ..config(vec![source(a.clone())]) };
    let fixed = amount.resolve_held_out(&tokenizer).unwrap();
    assert!(matches!(fixed, HeldOut::Share(_)));
    // As a plan keeps it: the last decimal may not survive, the split does.
    let written = serde_json::to_string(&fixed).unwrap();
    let fixed: HeldOut = serde_json::from_str(&written).unwrap();

    let fixed = DataConfig { held_out: fixed, ..amount.clone() };
    let (training, held_out) = sides(&fixed, &tokenizer);
    assert_eq!(sides(&amount, &tokenizer), (training.clone(), held_out.clone()));
    let fingerprint = |config: &DataConfig| DataLoader::new(config, &tokenizer).unwrap().data_fingerprint().unwrap();
    assert_eq!(fingerprint(&fixed), fingerprint(&amount));

    let first_b = DataSource { weight: 7.0, ..source(b) };
    let more = DataConfig { sources: vec![first_b, source(a)], ..fixed };
    let (more_training, more_held_out) = sides(&more, &tokenizer);
    assert!(set(&more_training).is_superset(&set(&training)));
    assert!(set(&more_held_out).is_superset(&set(&held_out)));

    // Of an amount, one half is promised: what was trained on is never held out.
    let amount = DataConfig { sources: more.sources.clone(), ..amount };
    let (_, later_held_out) = sides(&amount, &tokenizer);
    assert!(set(&later_held_out).is_disjoint(&set(&training)));

    let reseeded = DataConfig { seed: 99, ..more };
    assert_ne!(sorted(sides(&reseeded, &tokenizer).1), sorted(more_held_out));
}

#[test]
fn held_out_files_are_left_out_of_training() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let (a, b) = (folder.path().join("a.jsonl"), folder.path().join("b.txt"));
    write_jsonl(&a, &documents("a", 50));
    fs::write(&b, &documents("a", 50)[7]).unwrap();
    let config = DataConfig { held_out: HeldOut::Sources(vec![source(b)]), ..config(vec![source(a.clone())]) };
    let (training, held_out) = sides(&config, &tokenizer);
    assert_eq!(held_out, [documents("a", 50)[7].clone()]);
    assert_eq!(training.len(), 49);
    assert!(set(&training).is_disjoint(&set(&held_out)));

    let fingerprint = || DataLoader::held_out(&config, &tokenizer).unwrap().data_fingerprint().unwrap();
    let before = fingerprint();
    write_jsonl(&a, &documents("a", 40));
    assert_eq!(fingerprint(), before, "the held-out side does not depend on training files");
}

#[test]
fn a_held_out_loader_resumes_too() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let path = folder.path().join("a.jsonl");
    write_jsonl(&path, &documents("a", 100));
    let config = DataConfig { held_out: HeldOut::Share(0.4), ..config(vec![source(path)]) };
    let mut loader = DataLoader::held_out(&config, &tokenizer).unwrap();
    for _ in 0..5 {
        loader.next_sequence().unwrap().unwrap();
    }
    let mut resumed = DataLoader::resume(&config, &tokenizer, &loader.position()).unwrap();
    assert_eq!(all_sequences(&mut resumed), all_sequences(&mut loader));
}

#[test]
fn what_is_held_out_is_written_in_one_word() {
    #[derive(serde::Deserialize)]
    struct Written {
        held_out: HeldOut,
    }
    let read = |text: &str| toml::from_str::<Written>(text).map(|written| written.held_out);
    assert_eq!(read("held_out = \"20M\"").unwrap(), HeldOut::Tokens(20_000_000));
    assert_eq!(read("held_out = 150_000").unwrap(), HeldOut::Tokens(150_000));
    assert_eq!(read("held_out = \"2.5%\"").unwrap(), HeldOut::Share(0.025));
    assert_eq!(read("held_out = 0.01").unwrap(), HeldOut::Share(0.01));
    assert_eq!(read("held_out = \"none\"").unwrap(), HeldOut::None);
    let sources = HeldOut::Sources(vec![DataSource::new("a.jsonl")]);
    assert_eq!(read("held_out = [{ path = \"a.jsonl\" }]").unwrap(), sources);
    let message = read("held_out = true").unwrap_err().to_string();
    assert!(
        message.contains("expected tokens (\"20M\"), a share (\"1%\"), a list of sources or \"none\""),
        "{message}"
    );
}

#[test]
fn no_paragraph_of_the_quick_start_is_in_two_splits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/text");
    let mut seen = HashSet::new();
    for name in ["teacher.parquet", "student.jsonl", "held_out.jsonl", "validation.jsonl"] {
        for text in limbeck::data::texts(&[source(folder.join(name))]).unwrap() {
            for paragraph in text.unwrap().split("\n\n") {
                assert!(seen.insert(paragraph.to_string()), "{name}: {paragraph}");
            }
        }
    }
    assert!(seen.len() > 20_000);
}
