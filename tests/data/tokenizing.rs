use super::*;
use limbeck::tokenizer::train_byte_level_bpe;
use proptest::prelude::*;

const SPECIALS: [&str; 2] = ["<|begin_of_text|>", "<|end_of_text|>"];

fn train(folder: &Path, vocab_size: usize) -> Tokenizer {
    let texts = documents("training", 200).into_iter().map(Ok);
    train_byte_level_bpe(texts, vocab_size, &SPECIALS, folder).unwrap()
}

fn rewrite(folder: &Path, change: impl FnOnce(&mut serde_json::Value)) -> Tokenizer {
    let path = folder.join("tokenizer.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
    Tokenizer::open(folder).unwrap()
}

proptest! {
    #[test]
    fn any_text_comes_back_and_its_bytes_are_counted(text in "\\PC{0,60}|[ \\n\\tа-яé🎉x(){};]{0,60}") {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode_document(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.clone());
        let lengths = tokenizer.token_byte_lengths();
        prop_assert_eq!(ids.iter().map(|&id| lengths[id as usize] as usize).sum::<usize>(), text.len());

        let mut stream = tokenizer.text_stream();
        let mut printed = String::new();
        for &id in &ids {
            printed += &stream.push(id).unwrap();
        }
        printed += &stream.finish().unwrap();
        prop_assert_eq!(printed, text);
    }
}

#[test]
fn accents_emoji_and_code_come_back() {
    let tokenizer = tokenizer();
    for text in ["Ünïcödé naïve café", "👩‍👩‍👧 🎉", "fn main() {\n\tprintln!(\"{}\", 1_000);\n}\r\n  \n", ""]
    {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    }
}

#[test]
fn these_ids_are_what_transformers_gives() {
    // From transformers 5.23: AutoTokenizer.from_pretrained(folder)(text).input_ids.
    let text = "Ünïcödé 🎉👩‍👩‍👧 fn main() {\n\tprintln!(\"{}\", 1_000);\n}  \n<|end_of_text|> x";
    let ids = [
        129, 252, 79, 129, 109, 68, 129, 116, 69, 129, 104, 222, 174, 255, 238, 233, 174, 255, 241, 104, 265, 237, 174,
        255, 241, 104, 265, 237, 174, 255, 241, 102, 274, 79, 1194, 353, 222, 92, 200, 199, 1060, 526, 77, 79, 2, 9, 3,
        92, 94, 3, 13, 700, 64, 1150, 17, 10, 28, 200, 94, 222, 222, 200, 1, 1442,
    ];
    assert_eq!(tokenizer().encode(text).unwrap(), ids);
}

#[test]
fn a_document_that_mentions_a_special_token_does_not_contain_it() {
    let tokenizer = tokenizer();
    let end = tokenizer.document_end().unwrap();
    let text = "the token <|end_of_text|> ends a document";
    assert!(tokenizer.encode(text).unwrap().contains(&end));
    let document = tokenizer.encode_document(text).unwrap();
    assert!(!document.contains(&end));
    assert_eq!(tokenizer.decode(&document).unwrap(), text);
}

#[test]
fn training_twice_gives_the_same_files() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, second) = (train(one.path(), 320), train(two.path(), 320));
    assert_eq!(first.vocab_size(), 320);
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_eq!(first.files().unwrap().len(), 3);
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        assert_eq!(fs::read(one.path().join(name)).unwrap(), fs::read(two.path().join(name)).unwrap(), "{name}");
    }
    assert_eq!(first.document_start(), first.token_id("<|begin_of_text|>"));
    assert_eq!(first.document_end(), first.token_id("<|end_of_text|>"));
    assert!(first.document_start().is_some() && first.document_end().is_some());
}

#[test]
fn the_fingerprint_is_of_what_the_tokenizer_does() {
    let folder = tempfile::tempdir().unwrap();
    let before = train(folder.path(), 320).fingerprint();
    assert_eq!(rewrite(folder.path(), |_| {}).fingerprint(), before, "formatting is no part of it");
    let reordered = rewrite(folder.path(), |value| {
        let map = value.as_object_mut().unwrap();
        let model = map.shift_remove("model").unwrap();
        map.shift_insert(0, "model".into(), model);
        map["truncation"] =
            serde_json::json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    });
    assert_eq!(reordered.fingerprint(), before, "key order and truncation are no part of it");
    assert!(reordered.encode("a text of more than four tokens").unwrap().len() > 4, "nothing is cut");

    train(folder.path(), 320);
    let swapped = rewrite(folder.path(), |value| value["model"]["merges"].as_array_mut().unwrap().swap(10, 11));
    assert_ne!(swapped.fingerprint(), before, "a merge");
    assert_eq!(swapped.vocab_size(), 320);

    train(folder.path(), 320);
    fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    fs::remove_file(folder.path().join("special_tokens_map.json")).unwrap();
    let renamed = rewrite(folder.path(), |value| {
        value["added_tokens"][1]["content"] = "<|over|>".into();
        let vocab = value["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.shift_remove("<|end_of_text|>").unwrap();
        vocab.insert("<|over|>".into(), id);
    });
    assert_ne!(renamed.fingerprint(), before, "a special token");
    assert_eq!(renamed.vocab_size(), 320);
    assert_eq!(renamed.document_end(), None);
}

#[test]
fn document_tokens_are_taken_from_the_files_beside() {
    let folder = tempfile::tempdir().unwrap();
    let texts = documents("training", 20).into_iter().map(Ok);
    train_byte_level_bpe(texts, 300, &["<s>", "</s>", "<|im_end|>"], folder.path()).unwrap();
    let at = |name: &str| folder.path().join(name);
    let ends = || {
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        (tokenizer.document_start(), tokenizer.document_end())
    };
    assert_eq!(ends(), (Some(0), Some(1)));
    fs::write(at("tokenizer_config.json"), r#"{"bos_token": null, "eos_token": {"content": "<|im_end|>"}}"#).unwrap();
    assert_eq!(ends(), (None, Some(2)));
    fs::remove_file(at("tokenizer_config.json")).unwrap();
    fs::remove_file(at("special_tokens_map.json")).unwrap();
    fs::write(at("generation_config.json"), r#"{"eos_token_id": [2, 1]}"#).unwrap();
    assert_eq!(ends(), (Some(0), Some(2)));

    fs::write(at("tokenizer_config.json"), r#"{"bos_token": "<bos>"}"#).unwrap();
    let message = Tokenizer::open(folder.path()).unwrap_err().to_string();
    let expected = format!(
        "{}: `bos_token` is `<bos>`, which tokenizer.json does not have; correct the name, or write null for no such token",
        at("tokenizer_config.json").display()
    );
    assert_eq!(message, expected);
}

#[test]
fn a_tokenizer_that_is_missing_or_broken_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    let message = || Tokenizer::open(folder.path()).unwrap_err().to_string();
    assert_eq!(
        message(),
        format!(
            "{path}: this folder has no tokenizer.json; name a tokenizer.json or its folder, or make one with `limbeck \
             tokenizer train`"
        )
    );
    fs::write(folder.path().join("tokenizer.json"), "{\"model\":").unwrap();
    assert!(message().starts_with(&format!("{path}/tokenizer.json: not a tokenizer: ")), "{}", message());
}

#[test]
fn training_that_cannot_work_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let train = |texts: Vec<limbeck::Result<String>>, vocab_size, specials: &[&str]| {
        train_byte_level_bpe(texts.into_iter(), vocab_size, specials, folder.path()).unwrap_err().to_string()
    };
    let text = || vec![Ok("a text".to_string())];
    assert_eq!(
        train(text(), 100, &SPECIALS),
        "a vocabulary of 100 has no room for 256 bytes and 2 special tokens; ask for at least 258"
    );
    assert_eq!(
        train(text(), 300, &["<s>", "<s>"]),
        "special token `<s>` is empty or given twice; name each token once"
    );
    assert_eq!(
        train(vec![], 300, &SPECIALS),
        "there is no text to train a tokenizer on; name files with some text in them"
    );
    let failed = vec![Ok("one".to_string()), Err(limbeck::Error::usage("the second text is bad", "correct it"))];
    assert_eq!(train(failed, 300, &SPECIALS), "the second text is bad; correct it");
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing is left behind");
}
