//! Each thing that can be wrong with the data, and what is said about it. `DIR` stands for the folder of the test.

use super::*;
use limbeck::data::{HeldOut, texts};
use limbeck::error::Error;

struct Bad {
    folder: tempfile::TempDir,
}

impl Bad {
    fn new() -> Bad {
        Bad { folder: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn message(&self, error: Error) -> String {
        error.to_string().replace(self.folder.path().to_str().unwrap(), "DIR")
    }

    /// What reading this source says.
    fn reading(&self, source: DataSource) -> String {
        let error = match texts(&[source]) {
            Err(error) => error,
            Ok(texts) => texts.into_iter().find_map(Result::err).expect("something is wrong"),
        };
        self.message(error)
    }

    fn at(&self, name: &str) -> DataSource {
        source(self.folder.path().join(name))
    }
}

#[test]
fn a_source_without_files_is_named() {
    let bad = Bad::new();
    assert_eq!(bad.reading(bad.at("web/*.jsonl")), "DIR/web/*.jsonl: no file matches; check the path");
    assert_eq!(
        bad.reading(source(bad.folder.path().to_path_buf())),
        "DIR: this is a folder; add a pattern, such as DIR/*.jsonl"
    );
    bad.file("a.jsonl", "");
    assert_eq!(
        bad.reading(bad.at("a.jsonl")),
        "DIR/a.jsonl: the source has no records; give it some text, or leave the source out"
    );
    let nothing = texts(&[]).err().unwrap();
    assert_eq!(bad.message(nothing), "no data source is given; name at least one, such as { path = \"data/*.jsonl\" }");
}

#[test]
fn a_source_that_contradicts_itself_is_named() {
    let bad = Bad::new();
    bad.file("a.csv", "x");
    bad.file("b.txt", "x");
    bad.file("b.jsonl", "{}");
    assert_eq!(
        bad.reading(bad.at("a.csv")),
        "DIR/a.csv: the ending `.csv` is none that is read; give it as .txt, .md, .rst, .jsonl, .ndjson or .parquet, \
         uncompressed"
    );
    assert_eq!(
        bad.reading(bad.at("b.*")),
        "DIR/b.*: matches files of two kinds: DIR/b.jsonl and DIR/b.txt; make two sources of it, one for each ending"
    );
    assert_eq!(
        bad.reading(DataSource { field: Some("text".into()), ..bad.at("b.txt") }),
        "DIR/b.txt: `field` is set, but plain text has no fields; remove `field`"
    );
    assert_eq!(
        bad.reading(DataSource { document_separator: Some("---".into()), ..bad.at("b.jsonl") }),
        "DIR/b.jsonl: `document_separator` is set, but each record is a document already; remove `document_separator`"
    );
    assert_eq!(
        bad.reading(DataSource { weight: 0.0, ..bad.at("b.txt") }),
        "DIR/b.txt: weight 0 is not a positive number; give it a weight above 0, or leave the source out"
    );
    let unknown = toml::from_str::<DataSource>("path = \"a.jsonl\"\nwieght = 2").unwrap_err().to_string();
    assert!(unknown.contains("unknown field `wieght`"), "{unknown}");
}

#[test]
fn text_that_is_empty_or_not_utf8_is_named_with_its_place() {
    let bad = Bad::new();
    bad.file("empty.txt", " \n");
    bad.file("latin.txt", b"caf\xe9 au lait");
    bad.file("latin.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"caf\xe9\"}\n");
    assert_eq!(
        bad.reading(bad.at("empty.txt")),
        "DIR/empty.txt: record 1: the file has no text; give it some text, or take it out of the source"
    );
    assert_eq!(
        bad.reading(bad.at("latin.txt")),
        "DIR/latin.txt: record 1: not UTF-8 at byte 3 of the file; convert the file to UTF-8, for example with iconv"
    );
    assert_eq!(
        bad.reading(bad.at("latin.jsonl")),
        "DIR/latin.jsonl: record 2: not UTF-8 at byte 29 of the file; convert the file to UTF-8, for example with iconv"
    );
}

#[test]
fn a_jsonl_line_that_cannot_be_used_is_named_with_its_number() {
    let bad = Bad::new();
    bad.file("cut.jsonl", "{\"text\": \"one\"}\n\n{\"text\": \"two\n");
    bad.file("list.jsonl", "[1]\n");
    bad.file("other.jsonl", "{\"text\": \"one\"}\n{\"body\": \"two\", \"id\": 2}\n");
    bad.file("number.jsonl", "{\"text\": 5}\n");
    bad.file("null.jsonl", "{\"text\": null}\n");
    assert_eq!(
        bad.reading(bad.at("cut.jsonl")),
        "DIR/cut.jsonl: record 3: the line is not JSON: control character (\\u0000-\\u001F) found while parsing a string \
         at column 0; write one JSON object a line"
    );
    assert_eq!(
        bad.reading(bad.at("list.jsonl")),
        "DIR/list.jsonl: record 1: the line is an array, not an object; write it like {\"text\": \"..\"}"
    );
    assert_eq!(
        bad.reading(bad.at("other.jsonl")),
        "DIR/other.jsonl: record 2: there is no field `text`, only `body`, `id`; name the field that holds the text in \
         `field`"
    );
    assert_eq!(
        bad.reading(bad.at("number.jsonl")),
        "DIR/number.jsonl: record 1: the field `text` is a number, not a string; name the field that holds the text in \
         `field`, or correct the record"
    );
    assert!(bad.reading(bad.at("null.jsonl")).contains("record 1: the field `text` is null, not a string"));
}

#[test]
fn the_line_number_is_right_in_a_later_chunk() {
    let bad = Bad::new();
    let lines: String = (1..=500).map(|number| format!("{{\"text\": \"line {number}\"}}\n")).collect();
    let path = bad.file("long.jsonl", lines.replace("{\"text\": \"line 400\"}", "oops"));
    let config = DataConfig { shuffle_window: 4000, ..config(vec![source(path)]) };
    let mut loader = DataLoader::new(&config, &tokenizer()).unwrap();
    let error = loop {
        match loader.next_sequence() {
            Ok(sequence) => assert!(sequence.is_some()),
            Err(error) => break error,
        }
    };
    assert_eq!(
        bad.message(error),
        "DIR/long.jsonl: record 400: the line is not JSON: expected value at column 1; write one JSON object a line"
    );
}

#[test]
fn a_parquet_column_that_cannot_be_used_is_named() {
    let bad = Bad::new();
    let path = bad.folder.path().join("a.parquet");
    let row = |text: &str| Some(text.to_string());
    write_parquet(&path, "body", &[vec![row("one"), row("two")], vec![row("three"), None]]);
    assert_eq!(
        bad.reading(bad.at("a.parquet")),
        "DIR/a.parquet: there is no column `text`, only `number`, `body`; name the column that holds the text in `field`"
    );
    assert_eq!(
        bad.reading(DataSource { field: Some("number".into()), ..bad.at("a.parquet") }),
        "DIR/a.parquet: the column `number` is INT64, not a string; name the column that holds the text in `field`"
    );
    assert_eq!(
        bad.reading(DataSource { field: Some("body".into()), ..bad.at("a.parquet") }),
        "DIR/a.parquet: record 4: the column `body` is null; leave the row out, or give it some text"
    );
    let bytes = fs::read(&path).unwrap();
    bad.file("cut.parquet", &bytes[..bytes.len() - 10]);
    let message = bad.reading(bad.at("cut.parquet"));
    assert!(message.starts_with("DIR/cut.parquet: not readable as parquet: "), "{message}");
    assert!(message.ends_with("; write the file again from its source"), "{message}");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let bad = Bad::new();
    let tokenizer = tokenizer();
    let path = bad.file("a.txt", "some words to learn from");
    let good = config(vec![source(path)]);
    let message = |config: &DataConfig| bad.message(DataLoader::new(config, &tokenizer).unwrap_err());
    assert_eq!(
        message(&DataConfig { seq_len: 0, ..good.clone() }),
        "`seq_len` is 0; a sequence predicts at least one token; 512 is a usual start"
    );
    assert_eq!(message(&DataConfig { epochs: 0, ..good.clone() }), "`epochs` is 0; each source is read at least once");
    assert_eq!(
        message(&DataConfig { shuffle_window: 10, ..good.clone() }),
        "`shuffle_window` is 10 bytes; give it 4k at least; 64M is usual"
    );
    assert_eq!(
        message(&DataConfig { held_out: HeldOut::Share(1.5), ..good.clone() }),
        "a held-out share of 1.5 is not between 0 and 1; write it like \"1%\" or 0.01, or tokens like \"20M\""
    );
    let tokens = tokenizer.encode("some words to learn from").unwrap().len() + 2;
    assert_eq!(
        message(&DataConfig { held_out: HeldOut::Tokens(1000), ..good.clone() }),
        format!(
            "1000 tokens are to be held out, but the data has only {tokens}; hold out less, for example \"1%\", or add data"
        )
    );
    assert_eq!(
        bad.message(DataLoader::held_out(&good, &tokenizer).unwrap_err()),
        "nothing is held out; set `held_out`, for example to \"1%\" or \"20M\""
    );
    let everything = DataConfig { held_out: HeldOut::Tokens(1), ..good };
    assert_eq!(
        bad.message(DataLoader::new(&everything, &tokenizer).unwrap().next_sequence().unwrap_err()),
        "DIR/a.txt: no document of this source is left to train on; give it more documents, hold out less, or leave the \
         source out"
    );
}

#[test]
fn a_position_of_other_data_is_refused() {
    let bad = Bad::new();
    let tokenizer = tokenizer();
    let path = bad.file("a.txt", "some words to learn from");
    let saved = DataLoader::new(&config(vec![source(path.clone())]), &tokenizer).unwrap().position();
    let other = DataConfig { seed: 18, ..config(vec![source(path)]) };
    let message = bad.message(DataLoader::resume(&other, &tokenizer, &saved).unwrap_err());
    assert!(message.starts_with("the data to go on with differs: the saved position has "), "{message}");
    assert!(
        message.ends_with("; go on with the same sources, tokenizer, seed and lengths, or start anew"),
        "{message}"
    );
}
