use super::*;
use limbeck::data::{Position, count, texts};

/// Three kinds of file, several windows and chunks each.
fn mixed(folder: &Path) -> DataConfig {
    write_jsonl(&folder.join("web.jsonl"), &documents("web", 150));
    let rows: Vec<Option<String>> = documents("code", 120).into_iter().map(Some).collect();
    write_parquet(&folder.join("code.parquet"), "content", &[rows[..50].to_vec(), rows[50..].to_vec()]);
    for (number, text) in documents("book", 40).iter().enumerate() {
        fs::write(folder.join(format!("book-{number:02}.txt")), text).unwrap();
    }
    let code = DataSource { weight: 0.3, field: Some("content".into()), ..source(folder.join("code.parquet")) };
    let web = DataSource { weight: 0.6, ..source(folder.join("web.jsonl")) };
    let book = DataSource { weight: 0.1, ..source(folder.join("book-*.txt")) };
    DataConfig { shuffle_window: 4096, ..config(vec![web, code, book]) }
}

#[test]
fn every_document_comes_once_in_an_order_that_only_the_seed_decides() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let config = mixed(folder.path());
    let first = all_sequences(&mut DataLoader::new(&config, &tokenizer).unwrap());
    assert_eq!(first, all_sequences(&mut DataLoader::new(&config, &tokenizer).unwrap()));

    let written: Vec<String> =
        [documents("web", 150), documents("code", 120), documents("book", 40)].into_iter().flatten().collect();
    let read = texts_of(&first, &tokenizer);
    assert_ne!(read, written, "nothing was shuffled");
    assert_eq!(sorted(read.clone()), sorted(written));

    let reseeded = DataConfig { seed: 18, ..config };
    let other = texts_of(&all_sequences(&mut DataLoader::new(&reseeded, &tokenizer).unwrap()), &tokenizer);
    assert_ne!(other, read);
    assert_eq!(sorted(other), sorted(read));
}

#[test]
fn resuming_at_any_position_gives_the_same_sequences() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    for config in [DataConfig { epochs: 2, ..mixed(folder.path()) }, DataConfig { seq_len: 7, ..mixed(folder.path()) }]
    {
        let mut loader = DataLoader::new(&config, &tokenizer).unwrap();
        let mut positions = vec![loader.position()];
        let mut sequences = vec![];
        while let Some(sequence) = loader.next_sequence().unwrap() {
            sequences.push(sequence);
            positions.push(loader.position());
        }
        assert!(sequences.len() > 100);
        for (number, position) in positions.iter().enumerate() {
            // What follows at once from each position, and everything to the end from some.
            let ahead = if number % 37 == 0 { sequences.len() } else { 2 };
            let written = serde_json::to_string(position).unwrap();
            let position: Position = serde_json::from_str(&written).unwrap();
            let mut resumed = DataLoader::resume(&config, &tokenizer, &position).unwrap();
            assert_eq!(resumed.position(), position);
            for expected in sequences[number..].iter().take(ahead) {
                assert_eq!(resumed.next_sequence().unwrap().as_ref(), Some(expected), "after sequence {number}");
            }
            if number + ahead > sequences.len() {
                assert_eq!(resumed.next_sequence().unwrap(), None);
            }
        }
    }
}

#[test]
fn no_source_is_more_than_a_document_ahead_of_its_weight() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let config = DataConfig { seq_len: 1, ..mixed(folder.path()) };
    let longest = ["web", "code", "book"]
        .iter()
        .flat_map(|name| documents(name, 150))
        .map(|text| tokenizer.encode(&text).unwrap().len() + 2)
        .max()
        .unwrap() as f64;
    let mut loader = DataLoader::new(&config, &tokenizer).unwrap();
    // Up to where the first source runs out.
    let mut is_compared = 0;
    for _ in 0..3000 {
        loader.next_sequence().unwrap().unwrap();
        let given: Vec<f64> = loader.source_tokens().into_iter().map(|tokens| tokens as f64).collect();
        let total: f64 = given.iter().sum();
        for (given, weight) in given.iter().zip([0.6, 0.3, 0.1]) {
            assert!(given - weight * total <= longest, "{given} of {total} for {weight}");
            assert!(weight * total - given <= 2.0 * longest, "{given} of {total} for {weight}");
        }
        is_compared += 1;
    }
    assert_eq!(is_compared, 3000);
}

#[test]
fn the_token_budget_ends_the_data_and_a_larger_one_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let whole = mixed(folder.path());
    let short = DataConfig { tokens: Some(321), ..whole.clone() };
    let mut loader = DataLoader::new(&short, &tokenizer).unwrap();
    assert_eq!(loader.sequence_limit(), Some(11));
    let mut sequences = all_sequences(&mut loader);
    assert_eq!(sequences.len(), 11);
    let fingerprint = loader.data_fingerprint().unwrap();

    let mut longer = DataLoader::resume(&whole, &tokenizer, &loader.position()).unwrap();
    assert_eq!(longer.data_fingerprint().unwrap(), fingerprint);
    sequences.extend(all_sequences(&mut longer));
    assert_eq!(sequences, all_sequences(&mut DataLoader::new(&whole, &tokenizer).unwrap()));
}

#[test]
fn further_epochs_read_the_same_documents_in_another_order() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    write_jsonl(&folder.path().join("a.jsonl"), &documents("a", 60));
    let config = DataConfig { epochs: 2, ..config(vec![source(folder.path().join("a.jsonl"))]) };
    let read = texts_of(&all_sequences(&mut DataLoader::new(&config, &tokenizer).unwrap()), &tokenizer);
    let (first, second) = read.split_at(60);
    assert_ne!(first, second);
    assert_eq!(sorted(first.to_vec()), sorted(second.to_vec()));
    assert_eq!(sorted(first.to_vec()), sorted(documents("a", 60)));
}

#[test]
fn the_data_fingerprint_is_of_the_content() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let config = mixed(folder.path());
    let fingerprint = |config: &DataConfig| DataLoader::new(config, &tokenizer).unwrap().data_fingerprint().unwrap();
    let before = fingerprint(&config);
    assert_eq!(fingerprint(&config), before);

    let moved = tempfile::tempdir().unwrap();
    assert_eq!(fingerprint(&mixed(moved.path())), before, "the folder is no part of it");

    let reweighted = |weight| {
        let mut config = config.clone();
        config.sources[0].weight = weight;
        config
    };
    for changed in [
        DataConfig { seed: 1, ..config.clone() },
        DataConfig { seq_len: 33, ..config.clone() },
        DataConfig { epochs: 2, ..config.clone() },
        DataConfig { held_out: limbeck::data::HeldOut::Share(0.1), ..config.clone() },
        reweighted(0.5),
    ] {
        assert_ne!(fingerprint(&changed), before, "{changed:?}");
    }
    // The same length, one letter changed.
    let path = folder.path().join("web.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("retort", "retorn", 1)).unwrap();
    assert_ne!(fingerprint(&config), before);
}

#[test]
fn parquet_jsonl_and_text_give_the_same_documents() {
    let folder = tempfile::tempdir().unwrap();
    let written = documents("same", 30);
    let at = |name: &str| folder.path().join(name);
    let rows: Vec<Option<String>> = written.iter().cloned().map(Some).collect();
    write_parquet(&at("a.parquet"), "text", &[rows[..7].to_vec(), rows[7..].to_vec()]);
    write_jsonl(&at("a.jsonl"), &written);
    fs::write(at("a.txt"), written.join("\n-----\n")).unwrap();
    let separated = DataSource { document_separator: Some("-----".into()), ..source(at("a.txt")) };
    for source in [source(at("a.parquet")), source(at("a.jsonl")), separated] {
        let read: Vec<String> = texts(&[source]).unwrap().map(Result::unwrap).collect();
        let read: Vec<&str> = read.iter().map(|text| text.trim_end()).collect();
        assert_eq!(read, written);
    }
}

#[test]
fn a_pattern_takes_its_files_in_sorted_order() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("deep")).unwrap();
    for (name, text) in [("b.txt", "second"), ("a.txt", "first"), ("deep/c.txt", "third"), ("a.md", "other")] {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let read = |pattern: &str| -> Vec<String> {
        texts(&[source(folder.path().join(pattern))]).unwrap().map(Result::unwrap).collect()
    };
    assert_eq!(read("*.txt"), ["first", "second"]);
    assert_eq!(read("**/*.txt"), ["first", "second", "third"]);
    fs::write(folder.path().join("[x].txt"), "literal").unwrap();
    assert_eq!(read("[x].txt"), ["literal"]);
}

#[test]
fn chunks_of_any_size_give_every_line_once() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let path = folder.path().join("a.jsonl");
    let written = documents("line", 400);
    write_jsonl(&path, &written);
    // Blank lines, Windows line ends, an empty text and no newline at the end change nothing.
    let text = fs::read_to_string(&path).unwrap().replace('\n', "\r\n\n") + "{\"text\": \"\"}";
    fs::write(&path, text).unwrap();
    for shuffle_window in [4000, 4999, 10_000, 1 << 20] {
        let config = DataConfig { shuffle_window, ..config(vec![source(path.clone())]) };
        let read = texts_of(&all_sequences(&mut DataLoader::new(&config, &tokenizer).unwrap()), &tokenizer);
        assert_eq!(sorted(read), sorted(written.clone()));
    }
}

#[test]
fn counting_small_sources_is_exact() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let config = mixed(folder.path());
    let mut loader = DataLoader::new(&config, &tokenizer).unwrap();
    all_sequences(&mut loader);
    let counts = count(&config, &tokenizer).unwrap();
    assert!(counts.iter().all(|count| count.is_exact));
    assert_eq!(counts.iter().map(|count| count.tokens).collect::<Vec<_>>(), loader.source_tokens());
    assert_eq!(counts.iter().map(|count| count.documents).collect::<Vec<_>>(), [150, 120, 40]);
    assert_eq!(counts[2].files, 40);
}

#[test]
fn counting_large_sources_is_close() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let path = folder.path().join("a.jsonl");
    let written: Vec<String> = documents("large", 1000);
    let repeated: Vec<String> = (0..300).flat_map(|_| written.clone()).collect();
    write_jsonl(&path, &repeated);
    let estimated = &count(&config(vec![source(path)]), &tokenizer).unwrap()[0];
    assert!(!estimated.is_exact);
    let once: usize = written.iter().map(|text| tokenizer.encode(text).unwrap().len() + 2).sum();
    let ratio = estimated.tokens as f64 / (once * 300) as f64;
    assert!((ratio - 1.0).abs() < 0.02, "{ratio}");
    assert!((estimated.documents as f64 / 300_000.0 - 1.0).abs() < 0.02);
}

#[test]
fn a_recipes_data_section_is_read_as_written() {
    let text = r#"
        sources  = [{ path = "web/*.parquet", weight = 0.8 }, { path = "/code/*.jsonl", weight = 0.2, field = "content" }]
        tokens   = "10B"
        seq_len  = 8192
        held_out = "20M"
    "#;
    let read: DataConfig = toml::from_str(text).unwrap();
    let code = DataSource { weight: 0.2, field: Some("content".into()), ..DataSource::new("/code/*.jsonl") };
    let web = DataSource { weight: 0.8, ..DataSource::new("web/*.parquet") };
    let expected = DataConfig {
        tokens: Some(10_000_000_000),
        held_out: limbeck::data::HeldOut::Tokens(20_000_000),
        ..DataConfig::new(vec![web, code], 8192)
    };
    assert_eq!(read, expected);
    assert_eq!(toml::from_str::<DataConfig>(&toml::to_string(&expected).unwrap()).unwrap(), expected);
    let paths: Vec<String> = read.relative_to(Path::new("/r")).sources.into_iter().map(|source| source.path).collect();
    assert_eq!(paths, ["/r/web/*.parquet", "/code/*.jsonl"]);
    let error = toml::from_str::<DataConfig>("sources = []\nseq_len = 8\ntokens = \"lots\"").unwrap_err().to_string();
    assert!(
        error.contains("invalid value: string \"lots\", expected a count such as 20000, \"1.5M\" or \"10B\""),
        "{error}"
    );
}
