//! Caches of what other programs captured: decoded as they decode it, each row at its own token, and every mistake named.

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use limbeck::cache::{CacheReader, Codec, Selection};
use limbeck::import::{self, ImportOptions, ImportReport, LEAST_TAIL, RowPlace};
use limbeck::targets::TargetSource;
use limbeck::tokenizer::train_byte_level_bpe;
use serde_json::{Value, json};
use tempfile::TempDir;

const VOCABULARY: usize = 320;

fn options(folder: &Path, seq_len: usize) -> ImportOptions {
    let texts = small_run::documents(1, 20).into_iter().map(Ok);
    ImportOptions {
        tokenizer: train_byte_level_bpe(texts, 280, &["<|end_of_text|>"], &folder.join("tokenizer")).unwrap(),
        vocab_size: Some(VOCABULARY),
        teacher_name: "captured".into(),
        teacher_fingerprint: None,
        temperature: 1.0,
        split: "train".into(),
        seq_len,
        sequences_per_shard: 2,
        codec: Codec::Raw,
    }
}

/// A row as a cache has it.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    before: u32,
    label: u32,
    kept: Vec<(u32, u32)>,
    log_tail: f32,
    label_log_prob: f32,
}

/// The valid rows of a cache in their order.
fn rows(cache: &Path) -> Vec<Row> {
    let cache = CacheReader::open(cache).unwrap();
    let mut rows = vec![];
    for number in 0..cache.sequence_count() {
        let batch = cache.read(&[number]).unwrap();
        let (sequence, targets) = (&batch.sequences[0], batch.targets.as_ref().unwrap());
        let capture = &targets.captures[0];
        for row in (0..sequence.seq_len()).filter(|row| sequence.is_valid(*row)) {
            let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
            let bits = capture.log_probs[kept.clone()].iter().map(|log_prob| log_prob.to_bits());
            rows.push(Row {
                before: sequence.tokens[row],
                label: sequence.tokens[row + 1],
                kept: targets.ids[kept].iter().copied().zip(bits).collect(),
                log_tail: capture.log_tail[row],
                label_log_prob: capture.label_log_prob[row],
            });
        }
    }
    rows
}

fn list(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|value| value.as_u64().unwrap() as u32).collect()
}

#[test]
fn distillkits_files_are_decoded_as_distillkit_decodes_them() {
    for name in ["curve", "narrow", "diffused", "exact"] {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/distillkit").join(name);
        let decoded: Vec<Value> = serde_json::from_slice(&fs::read(fixture.join("decoded.json")).unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        // Documents of 9, 3 and 14 tokens: shorter than a sequence, ending in one, and over several.
        let (manifest, report) = import::distillkit(&[fixture], None, &cache, &options(folder.path(), 5)).unwrap();
        let found = rows(&cache);
        let mut expected = vec![];
        for record in &decoded {
            let tokens = list(&record["tokens"]);
            for (place, (ids, bits)) in
                record["ids"].as_array().unwrap().iter().zip(record["bits"].as_array().unwrap()).enumerate()
            {
                expected.push((tokens[place], tokens[place + 1], list(ids), list(bits)));
            }
        }
        assert_eq!(expected.len(), 8 + 2 + 13);
        assert_eq!((report.documents, report.rows, report.rows_unknown), (3, 23, 0));
        assert_eq!(found.len(), expected.len(), "{name}: each prediction is there once");
        let mut equal_bits = 0;
        for (row, (before, label, ids, bits)) in found.iter().zip(&expected) {
            assert_eq!((row.before, row.label), (*before, *label), "{name}");
            let kept: BTreeMap<u32, f32> = row.kept.iter().map(|(id, bits)| (*id, f32::from_bits(*bits))).collect();
            assert_eq!(kept.len(), ids.len(), "{name}");
            let mut sum = 0.0;
            for (id, bits) in ids.iter().zip(bits) {
                let (ours, theirs) = (kept[id], f32::from_bits(*bits));
                assert!((ours - theirs).abs() <= 1e-6, "{name}: {ours} for the id {id}, {theirs} by DistillKit");
                equal_bits += usize::from(ours.to_bits() == *bits);
                sum += f64::from(theirs).exp();
            }
            assert!(row.kept.is_sorted_by(|left, right| f32::from_bits(left.1) >= f32::from_bits(right.1)));
            let tail = (1.0 - sum).max(LEAST_TAIL);
            assert!((f64::from(row.log_tail).exp() - tail).abs() < 1e-6, "{name}: {} {tail}", row.log_tail);
            let shared = tail / (VOCABULARY - ids.len()) as f64;
            let expected = kept.get(label).map_or(shared.ln(), |log_prob| f64::from(*log_prob));
            assert!(
                (f64::from(row.label_log_prob) - expected).abs() < 1e-4,
                "{name}: {} {expected}",
                row.label_log_prob
            );
        }
        let values: usize = expected.iter().map(|(_, _, ids, _)| ids.len()).sum();
        assert_eq!(equal_bits, values, "{name}: equal in every bit");
        let soft_targets = manifest.settings.soft_targets.unwrap();
        assert_eq!(soft_targets.selection, Selection::TopK { k: expected[0].2.len() });
        assert_eq!(soft_targets.teacher.fingerprint, "not known");
        assert_eq!(
            soft_targets.teacher.dtype,
            "not known (imported from DistillKit: tails are 1 - sum, at least 1e-8)"
        );
    }
}

#[test]
fn a_distillkit_capture_that_cannot_be_read_is_named() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/distillkit/exact");
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), 5);
    let cache = folder.path().join("cache");
    let message = |paths: &[PathBuf], config: Option<&Path>, options: &ImportOptions| {
        let error = import::distillkit(paths, config, &cache, options).unwrap_err();
        let fixtures = fixture.parent().unwrap().to_str().unwrap();
        error.to_string().replace(fixtures, "FIXTURES").replace(folder.path().to_str().unwrap(), "DIR")
    };
    let alone = folder.path().join("alone.parquet");
    fs::copy(fixture.join("data_0.parquet"), &alone).unwrap();
    assert_eq!(
        message(std::slice::from_ref(&alone), None, &options),
        "DIR/compression_config.yaml: the files do not say how they are compressed, and this file is missing; name DistillKit's \
         compression configuration with --config"
    );
    let other = fixture.parent().unwrap().join("curve/compression_config.yaml");
    assert_eq!(
        message(&[alone], Some(&other), &options),
        "DIR/alone.parquet: record 1: row 0 of `compressed_logprobs` has 20 bytes, and the compression configuration makes 33; \
         leave the record out, or capture it again"
    );
    let narrow = ImportOptions { vocab_size: Some(100), ..options.clone() };
    assert!(
        message(std::slice::from_ref(&fixture), None, &narrow)
            .starts_with("FIXTURES/exact/data_0.parquet: record 1: the token 106 is outside the vocabulary of 100; "),
        "{}",
        message(std::slice::from_ref(&fixture), None, &narrow)
    );
    assert_eq!(
        message(&[folder.path().join("nowhere")], None, &options),
        "DIR/nowhere: there is no such file or directory; check the path"
    );
}

/// The row about a token: the token itself is second, and the first is an id that names it.
fn about(token: u32) -> Vec<(u32, f64)> {
    vec![(100 + token, 0.5f64.ln()), (token, 0.25f64.ln()), (300, 0.125f64.ln())]
}

fn vllm_place(entries: &[(u32, f64)]) -> Value {
    let ranked = entries.iter().enumerate();
    ranked
        .map(|(rank, (id, log_prob))| {
            (id.to_string(), json!({ "logprob": log_prob, "rank": rank + 1, "decoded_token": "x" }))
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn vllm(tokens: &[u32]) -> Value {
    let places: Vec<Value> =
        std::iter::once(Value::Null).chain(tokens[1..].iter().map(|token| vllm_place(&about(*token)))).collect();
    json!({ "prompt_token_ids": tokens, "prompt_logprobs": places })
}

/// `places[i]` in axolotl's form.
fn axolotl(tokens: &[u32], places: &[Option<Vec<(u32, f64)>>]) -> Value {
    let ids = |place: &Option<Vec<(u32, f64)>>| -> Vec<u32> {
        place.as_ref().map_or(vec![0, 1, 2], |place| place.iter().map(|(id, _)| *id).collect())
    };
    let log_probs = |place: &Option<Vec<(u32, f64)>>| -> Vec<Value> {
        place.as_ref().map_or(vec![Value::Null; 3], |place| place.iter().map(|(_, p)| json!(p)).collect())
    };
    json!({
        "input_ids": tokens,
        "target_token_ids": places.iter().map(ids).collect::<Vec<_>>(),
        "target_logprobs": places.iter().map(log_probs).collect::<Vec<_>>(),
        "target_mask": places.iter().map(|place| vec![u8::from(place.is_some()); 3]).collect::<Vec<_>>(),
    })
}

struct Files {
    folder: TempDir,
}

impl Files {
    fn new() -> Files {
        Files { folder: tempfile::tempdir().unwrap() }
    }

    fn import(
        &self,
        text: &str,
        place: Option<RowPlace>,
        seq_len: usize,
    ) -> Result<(PathBuf, ImportReport), limbeck::Error> {
        let (file, cache) = (self.folder.path().join("rows.jsonl"), self.folder.path().join("cache"));
        fs::write(&file, text).unwrap();
        let _ = fs::remove_dir_all(&cache);
        let (_, report) = import::jsonl(&[file], place, &cache, &options(self.folder.path(), seq_len))?;
        Ok((cache, report))
    }

    fn message(&self, text: &str, place: Option<RowPlace>) -> String {
        let error = self.import(text, place, 4).unwrap_err().to_string();
        error.replace(self.folder.path().to_str().unwrap(), "DIR")
    }
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

/// Whether each row keeps exactly what was said of the token it predicts.
fn assert_about_their_own_tokens(rows: &[Row], documents: &[&[u32]]) {
    let pairs: Vec<(u32, u32)> =
        documents.iter().flat_map(|tokens| tokens.windows(2).map(|pair| (pair[0], pair[1]))).collect();
    assert_eq!(rows.iter().map(|row| (row.before, row.label)).collect::<Vec<_>>(), pairs);
    for row in rows {
        let said: Vec<(u32, u32)> =
            about(row.label).into_iter().map(|(id, log_prob)| (id, (log_prob as f32).to_bits())).collect();
        assert_eq!(row.kept, said, "the row about {}", row.label);
        assert!((row.log_tail - 0.125f32.ln()).abs() < 1e-6);
        assert_eq!(row.label_log_prob, 0.25f32.ln());
    }
}

#[test]
fn every_form_of_json_lines_puts_each_row_at_its_own_token() {
    let documents: [&[u32]; 4] = [&[5, 6, 7, 8], &[9], &[10, 11], &[20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]];
    let of_next = |tokens: &[u32]| tokens[1..].iter().map(|token| Some(about(*token))).collect::<Vec<_>>();
    let forms: Vec<(&str, Vec<Value>, Option<RowPlace>)> = vec![
        ("vllm", documents.iter().map(|tokens| vllm(tokens)).collect(), None),
        (
            "a server's answers",
            vec![
                json!({ "choices": [vllm(documents[0]), vllm(documents[1])] }),
                json!({ "choices": [vllm(documents[2])] }),
                json!({
                    "prompt_token_ids": documents[3],
                    "choices": [{ "prompt_logprobs": vllm(documents[3])["prompt_logprobs"] }],
                }),
            ],
            None,
        ),
        (
            "as many rows as tokens, of each token",
            documents.iter().map(|tokens| axolotl(tokens, &[vec![None], of_next(tokens)].concat())).collect(),
            Some(RowPlace::Token),
        ),
        (
            "as many rows as tokens, of the next token",
            documents.iter().map(|tokens| axolotl(tokens, &[of_next(tokens), vec![None]].concat())).collect(),
            Some(RowPlace::Next),
        ),
        ("one row fewer", documents.iter().map(|tokens| axolotl(tokens, &of_next(tokens))).collect(), None),
        (
            "lists of tokens by name",
            documents
                .iter()
                .map(|tokens| {
                    let place = |token: &u32| -> Vec<Value> {
                        let entries = about(*token).into_iter();
                        entries.map(|(id, p)| json!({ "token": format!("token_id:{id}"), "logprob": p })).collect()
                    };
                    json!({ "input_ids": tokens, "logprobs": tokens[1..].iter().map(place).collect::<Vec<_>>() })
                })
                .collect(),
            None,
        ),
    ];
    for (name, records, place) in forms {
        let files = Files::new();
        let (cache, report) =
            files.import(&lines(&records), place, 4).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_about_their_own_tokens(&rows(&cache), &documents);
        assert_eq!((report.documents, report.documents_left_out, report.rows_unknown), (4, 1, 0), "{name}");
        assert_eq!((report.rows, report.labels_shared, report.tails_raised), (3 + 1 + 10, 0, 0), "{name}");
    }
    // What the records show by themselves.
    let (first, last) = (of_next(documents[0]), of_next(documents[3]));
    for (records, document) in [
        (axolotl(documents[0], &[vec![None], first].concat()), documents[0]),
        (axolotl(documents[3], &[last, vec![None]].concat()), documents[3]),
    ] {
        let files = Files::new();
        assert_about_their_own_tokens(&rows(&files.import(&lines(&[records]), None, 4).unwrap().0), &[document]);
    }
}

#[test]
fn the_label_beside_the_most_probable_ids_is_not_kept() {
    let mut record = vllm(&[5, 6, 7]);
    // Rank 40 among entries of ranks 1 and 2: the sampled token beside the two most probable.
    record["prompt_logprobs"][1] = json!({
        "200": { "logprob": 0.5f64.ln(), "rank": 1 },
        "6": { "logprob": -7.0, "rank": 40 },
        "201": { "logprob": 0.25f64.ln(), "rank": 2 },
    });
    let files = Files::new();
    let (cache, report) = files.import(&lines(&[record]), None, 4).unwrap();
    let row = &rows(&cache)[0];
    assert_eq!(row.kept.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [200, 201]);
    assert_eq!(row.label_log_prob, -7.0);
    assert!((row.log_tail - 0.25f32.ln()).abs() < 1e-6);
    assert_eq!(report.labels_shared, 0);
}

#[test]
fn what_is_masked_is_unknown_and_infinities_are_nothing() {
    // A prompt of two tokens that is masked, as Python writes it.
    let text = "{\"input_ids\": [5, 6, 7, 8], \"note\": \"-Infinity\", \"target_token_ids\": [[0, 1], [0, 1], [7, 107], [8, 9]], \
                \"target_logprobs\": [[-Infinity, -Infinity], [-Infinity, -Infinity], [-0.5, -1.5], [-0.25, -Infinity]], \
                \"target_mask\": [0, 0, 1, 1]}\n";
    let files = Files::new();
    let (cache, report) = files.import(text, None, 3).unwrap();
    let rows = rows(&cache);
    assert_eq!(rows.iter().map(|row| row.kept.len()).collect::<Vec<_>>(), [0, 2, 1]);
    assert_eq!((rows[0].log_tail, rows[0].label_log_prob), (0.0, -(VOCABULARY as f32).ln()));
    assert_eq!(report.rows_unknown, 1);
}

#[test]
fn rows_at_other_tokens_than_their_own_are_refused() {
    let files = Files::new();
    // vLLM's places without their null, and one that is left over at the end: every place is one too early.
    let mut shifted = vllm(&[5, 6, 7, 8]);
    let places = shifted["prompt_logprobs"].as_array_mut().unwrap();
    places[1..].rotate_left(1);
    assert_eq!(
        files.message(&lines(&[vllm(&[1, 2, 3]), shifted]), None),
        "DIR/rows.jsonl: record 2: the row about token 1 (from 0) lacks that token, 6: the rows are not about their own tokens; \
         see docs/import.md for what a record has; correct it or leave it out"
    );
    let full: Vec<_> = [6, 7, 8].map(|token| Some(about(token))).to_vec();
    assert!(files.message(&lines(&[axolotl(&[5, 6, 7], &full)]), None).contains(
        "record 1: it has a row for each token, and does not show which token a row is about: say --rows token"
    ));
    assert!(
        files
            .message(&lines(&[axolotl(&[5, 6, 7], &full)]), Some(RowPlace::Token))
            .contains("record 1: its first row is not empty, but nothing is predicted of the first token")
    );
    // Forty rows, each about the token before its own: no single one shows it, all together do.
    let tokens: Vec<u32> = (0..41).map(|place| (place * 7) % 97).collect();
    let late: Vec<_> = tokens[..40].iter().map(|token| Some(about(*token))).collect();
    assert_eq!(
        files.message(&lines(&[axolotl(&tokens, &late)]), None),
        "DIR/rows.jsonl: 0 of the first 40 rows keep the token they are about, and 40 the token before it: the rows are shifted by \
         one; make each row about the token that follows what the teacher had read (see docs/import.md)"
    );
}

#[test]
fn a_record_that_is_not_understood_is_named_with_its_file() {
    let files = Files::new();
    let good = vllm(&[5, 6, 7]).to_string();
    let message = |record: &str| {
        let message = files.message(&format!("{good}\n\n{record}\n"), None);
        let problem = message.strip_prefix("DIR/rows.jsonl: record 3: ").unwrap_or_else(|| panic!("{message}"));
        problem.split(';').next().unwrap().to_string()
    };
    assert_eq!(message("{"), "the line is not JSON: EOF while parsing an object at column 1");
    assert_eq!(message("[1]"), "the line is not a JSON object");
    assert_eq!(
        message(r#"{"text": "a"}"#),
        "there are no token ids: none of `prompt_token_ids`, `input_ids`, `token_ids`, `tokens` is there"
    );
    assert_eq!(
        message(r#"{"tokens": [1, 2]}"#),
        "there are no log-probabilities: neither `prompt_logprobs`, `logprobs` nor `target_token_ids` is there"
    );
    assert_eq!(message(r#"{"tokens": [1, -2], "logprobs": [null]}"#), "`tokens` holds -2, which is no token id");
    assert_eq!(
        message(r#"{"tokens": [1, 2, 3, 4], "logprobs": [null, {"2": -1}]}"#),
        "it has 4 tokens and 2 rows, not a row for each token or for each but the first"
    );
    assert_eq!(
        message(r#"{"tokens": [1, 2], "logprobs": [null, {"a": -1}]}"#),
        "place 1 of `logprobs` has the key `a`, which is no token id"
    );
    assert_eq!(
        message(r#"{"tokens": [1, 2], "target_token_ids": [[2, 3]], "target_logprobs": [[-1]]}"#),
        "row 0 has 2 ids and 1 log-probabilities"
    );
    assert_eq!(
        message(r#"{"tokens": [1, 2], "logprobs": [{"2": -0.1, "3": -0.2}]}"#),
        "the row about token 1 (from 0): its probabilities come to 1.7236, so these are not logarithms of probabilities"
    );
    assert_eq!(
        message(r#"{"tokens": [1, 2], "logprobs": [{"2": -1, "4000": -2}]}"#),
        "the row about token 1 (from 0): the id 4000 is outside the vocabulary of 320"
    );
    assert_eq!(
        files.message("\n", None),
        "DIR/rows.jsonl: there are no log-probabilities in these files; give records with `prompt_logprobs` or `target_logprobs`"
    );
}

#[test]
fn the_same_files_give_the_same_cache_and_a_finished_one_is_left_alone() {
    let files = Files::new();
    let text = lines(&[vllm(&[5, 6, 7, 8, 9, 10]), vllm(&[11, 12, 13])]);
    let (cache, first) = files.import(&text, None, 3).unwrap();
    let before = small_run::files(&cache);
    let again =
        import::jsonl(&[files.folder.path().join("rows.jsonl")], None, &cache, &options(files.folder.path(), 3));
    let (_, second) = again.unwrap();
    assert_eq!((first.documents, second.documents), (2, 0));
    assert_eq!(small_run::files(&cache), before);
    let (cache, _) = files.import(&text, None, 3).unwrap();
    assert_eq!(small_run::files(&cache), before);
}
