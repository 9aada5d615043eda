//! What is written to a cache comes back in every bit, is what the manifest says, and nothing wrong gets in.

mod cache_samples;

use std::fs;
use std::path::Path;
use std::process::Command;

use cache_samples::*;
use limbeck::cache::*;
use limbeck::targets::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_raw_codec_gives_back_every_bit(
        seq_len in 1usize..12,
        per_shard in 1usize..5,
        count in 1u64..14,
        temperatures in proptest::sample::subsequence(vec![1.0f32, 0.7, 2.0], 0..=3),
        seed in 0u64..1 << 40,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(seq_len, per_shard, &temperatures);
        let mut writer = CacheWriter::create_or_resume(folder.path(), settings.clone(), WriterPart::WHOLE).unwrap();
        let samples: Vec<_> = (0..count).map(|number| sample(&settings, seed + number)).collect();
        for (sequence, targets, text_bytes) in samples.clone() {
            writer.push(sequence, targets, text_bytes).unwrap();
        }
        let manifest = writer.finish().unwrap();
        let reader = CacheReader::open(folder.path()).unwrap();
        prop_assert_eq!(&manifest, reader.manifest());
        prop_assert_eq!(&manifest.settings, &settings);
        prop_assert_eq!((reader.sequence_count(), reader.seq_len()), (count, seq_len));
        reader.verify().into_result().unwrap();
        // Each alone, in falling order, and all in one batch.
        for number in (0..count).rev() {
            let batch = reader.read(&[number]).unwrap();
            let (sequence, targets, _) = &samples[number as usize];
            prop_assert_eq!(&batch.sequences[..], std::slice::from_ref(sequence));
            prop_assert_eq!(batch.targets.is_some(), targets.is_some());
            if let (Some(read), Some(written)) = (&batch.targets, targets) {
                assert_same_bits(read, written);
            }
        }
        let numbers: Vec<u64> = (0..count).collect();
        let batch = reader.read(&numbers).unwrap();
        prop_assert_eq!(batch.sequences.len() as u64, count);
        let valid: usize = batch.sequences.iter().map(|it| (0..seq_len).filter(|t| it.is_valid(*t)).count()).sum();
        prop_assert_eq!(manifest.counts.valid_rows, valid as u64);
        prop_assert_eq!(manifest.counts.text_bytes, samples.iter().map(|(.., text_bytes)| text_bytes).sum::<u64>());
        if let Some(targets) = &batch.targets {
            prop_assert_eq!(targets.row_count(), batch.row_count());
            prop_assert_eq!(targets.ids.len() as u64, manifest.counts.kept_ids);
            let mut all = SparseTargets::empty(&temperatures);
            samples.iter().for_each(|(_, targets, _)| all.extend(targets.as_ref().unwrap()));
            assert_same_bits(targets, &all);
        }
    }
}

#[test]
fn equal_input_gives_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(6, 2, &[1.0, 0.7]);
    write(&folder.path().join("a"), &settings, 5);
    write(&folder.path().join("b"), &settings, 5);
    assert_eq!(files(&folder.path().join("a")), files(&folder.path().join("b")));
}

#[test]
fn shards_are_plain_safetensors_files() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(6, 2, &[1.0]);
    write(folder.path(), &settings, 3);
    let bytes = fs::read(folder.path().join("shards/00001.safetensors")).unwrap();
    let (header_length, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((header_length + 8) % 8, 0);
    let said = header.metadata().as_ref().unwrap();
    assert_eq!((said["codec"].as_str(), said["shard"].as_str(), said["first_sequence"].as_str()), ("raw", "1", "2"));
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("tokens").unwrap().shape(), [1, 7]);
    let bytes_of_tokens: Vec<u8> = sample(&settings, 2).0.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    assert_eq!(tensors.tensor("tokens").unwrap().data(), bytes_of_tokens);
}

#[test]
fn rows_that_predict_nothing_carry_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::create_or_resume(folder.path(), settings(2, 1, &[1.0]), WriterPart::WHOLE).unwrap();
    let sequence = PackedSequence { tokens: vec![1, 2, 3], segments: vec![0, 0, 1] };
    let capture = Capture {
        temperature: 1.0,
        log_probs: vec![-0.5],
        log_tail: vec![-1.0, f32::NAN],
        label_log_prob: vec![-2.0, -3.0],
    };
    writer.push(sequence, Some(exact(vec![0, 1, 1], vec![9], capture)), 4).unwrap();
    writer.finish().unwrap();
    let batch = CacheReader::open(folder.path()).unwrap().read(&[0]).unwrap();
    let capture = &batch.targets.unwrap().captures[0];
    assert_eq!((&capture.log_tail, &capture.label_log_prob), (&vec![-1.0, 0.0], &vec![-2.0, 0.0]));
}

/// Sequences that may not enter a cache, by the change that makes them so, and what is said about them.
#[test]
fn what_no_cache_may_hold_is_refused_by_sequence_and_row() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().display().to_string();
    let good = || {
        let capture = Capture {
            temperature: 1.0,
            log_probs: vec![-0.5, -1.5, -0.25],
            log_tail: vec![-2.0, -3.0],
            label_log_prob: vec![-0.5, -9.0],
        };
        let sequence = PackedSequence { tokens: vec![1, 2, 3], segments: vec![0, 0, 0] };
        (sequence, exact(vec![0, 2, 3], vec![7, 8, 9], capture))
    };
    type Change = fn(&mut PackedSequence, &mut SparseTargets);
    let cases: [(&str, Change); 19] = [
        ("it has 2 tokens, not 3 (seq_len + 1)", |sequence, _| sequence.tokens.truncate(2)),
        ("it has 2 segments, not 3 (seq_len + 1)", |sequence, _| sequence.segments.truncate(2)),
        ("token 1 is 50, outside the vocabulary of 50", |sequence, _| sequence.tokens[1] = 50),
        ("its segments decrease", |sequence, _| sequence.segments = vec![PADDING, 0, 0]),
        ("it has 2 offsets, not 3 (seq_len + 1)", |_, targets| targets.offsets.truncate(2)),
        ("its offsets do not go from 0 to its 3 kept ids", |_, targets| targets.offsets[1] = 4),
        ("its offsets do not go from 0 to its 2 kept ids", |_, targets| targets.ids.truncate(2)),
        ("it is captured at temperatures [2.0], the cache at [1.0]", |_, targets| {
            targets.captures[0].temperature = 2.0
        }),
        ("its log_probs.0 has 2 numbers, not 3", |_, targets| targets.captures[0].log_probs.truncate(2)),
        ("its log_tail.0 has 1 numbers, not 2", |_, targets| targets.captures[0].log_tail.truncate(1)),
        ("its label_log_prob.0 has 1 numbers, not 2", |_, targets| targets.captures[0].label_log_prob.truncate(1)),
        ("row 1 predicts across documents or padding, but keeps ids", |sequence, _| sequence.segments[2] = 1),
        ("row 0 keeps the id 50, outside the vocabulary of 50", |_, targets| targets.ids[1] = 50),
        ("row 0 keeps the id 7 twice", |_, targets| targets.ids[1] = 7),
        ("log_probs.0 of row 0 do not descend", |_, targets| targets.captures[0].log_probs[0] = -1.75),
        ("log_probs.0 of row 1 is 0.5, a probability above 1", |_, targets| targets.captures[0].log_probs[2] = 0.5),
        ("log_tail.0 of row 1 is 0.5, a probability above 1", |_, targets| targets.captures[0].log_tail[1] = 0.5),
        ("label_log_prob.0 of row 0 is 0.5, a probability above 1", |_, targets| {
            targets.captures[0].label_log_prob[0] = 0.5
        }),
        ("row 0 keeps 5 ids, more than 4 under top_k = 4", |_, targets| {
            targets.ids = vec![1, 2, 3, 4, 5];
            targets.offsets = vec![0, 5, 5];
            targets.captures[0].log_probs = vec![-1.0; 5];
        }),
    ];
    let mut writer = CacheWriter::create_or_resume(folder.path(), settings(2, 2, &[1.0]), WriterPart::WHOLE).unwrap();
    let (sequence, targets) = good();
    writer.push(sequence, Some(targets), 1).unwrap();
    for (expected, change) in cases {
        let (mut sequence, mut targets) = good();
        change(&mut sequence, &mut targets);
        let error = writer.push(sequence, Some(targets), 1).unwrap_err().to_string();
        let tip = "correct what makes the sequences; nothing of this one was written";
        assert_eq!(error, format!("{directory}: sequence 1 cannot be stored: {expected}; {tip}"));
        assert_eq!(writer.next_push().unwrap(), Next::Sequence(1));
    }
    let not_finite: [(&str, Change); 4] = [
        ("log_probs.0 of row 0, id 8 (NaN)", |_, targets| targets.captures[0].log_probs[1] = f32::NAN),
        ("log_probs.0 of row 1, id 9 (-inf)", |_, targets| targets.captures[0].log_probs[2] = f32::NEG_INFINITY),
        ("log_tail.0 of row 1 (NaN)", |_, targets| targets.captures[0].log_tail[1] = f32::NAN),
        ("label_log_prob.0 of row 0 (NaN)", |_, targets| targets.captures[0].label_log_prob[0] = f32::NAN),
    ];
    for (expected, change) in not_finite {
        let (mut sequence, mut targets) = good();
        change(&mut sequence, &mut targets);
        let error = writer.push(sequence, Some(targets), 1).unwrap_err().to_string();
        let tip = "look for NaN or infinity in the teacher's weights and in its number format";
        assert_eq!(error, format!("{directory}: sequence 1: {expected} is not finite; {tip}"));
    }
    let error = writer.push(good().0, None, 1).unwrap_err().to_string();
    assert!(error.contains("sequence 1 cannot be stored: it has no soft targets, but the cache is of soft"), "{error}");
    // The refused ones left nothing behind.
    let (sequence, targets) = good();
    writer.push(sequence, Some(targets), 1).unwrap();
    assert_eq!(writer.finish().unwrap().counts.kept_ids, 6);
}

#[test]
fn a_cache_of_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let writer = CacheWriter::create_or_resume(folder.path(), settings(2, 2, &[]), WriterPart::WHOLE).unwrap();
    let expected = format!(
        "{}: the cache would hold no sequence; give more text, or a shorter [data] seq_len",
        folder.path().display()
    );
    assert_eq!(writer.finish().unwrap_err().to_string(), expected);
}

#[test]
fn reading_a_sequence_that_is_not_there_says_how_many_there_are() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(2, 2, &[]), 3);
    let error = CacheReader::open(folder.path()).unwrap().read(&[0, 3]).unwrap_err().to_string();
    assert_eq!(error, format!("{}: there is no sequence 3; the cache has 3, from 0", folder.path().display()));
}

#[test]
fn a_cache_that_is_not_the_wanted_one_is_refused_naming_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let (soft, hard) = (folder.path().join("soft"), folder.path().join("hard"));
    write(&soft, &settings(4, 2, &[1.0, 0.7]), 2);
    write(&hard, &settings(4, 2, &[]), 2);
    let again =
        |cache: &Path| format!("or delete {} and run `limbeck precompute-teacher-logits` again", cache.display());
    let wanted = Expectation {
        split: Some("train".into()),
        data_fingerprint: Some("data-0123456789abcdef".into()),
        tokenizer_fingerprint: Some("tokenizer-0123456789abcdef".into()),
        vocab_size: Some(50),
        seq_len: Some(4),
        soft_targets: true,
        teacher_fingerprint: Some("teacher-0123456789abcdef".into()),
        selection: Some(Selection::TopK { k: 4 }),
        temperatures: vec![0.7],
    };
    CacheReader::open_expecting(&soft, &wanted).unwrap();
    let message = |cache: &Path, change: fn(&mut Expectation)| {
        let mut other = wanted.clone();
        change(&mut other);
        CacheReader::open_expecting(cache, &other).map(drop).unwrap_err().to_string()
    };
    let cache = soft.display();
    assert_eq!(
        message(&soft, |wanted| wanted.tokenizer_fingerprint = Some("ffffffffffffffffffff".into())),
        format!(
            "the tokenizer differs: the cache {cache} has token ids of the tokenizer tokenizer-012345... (50 tokens), this \
             run has the tokenizer ffffffffffffffff...; use the tokenizer the cache was made with, {}",
            again(&soft)
        )
    );
    assert_eq!(
        message(&soft, |wanted| wanted.teacher_fingerprint = Some("ffffffffffffffffffff".into())),
        format!(
            "the teacher differs: the cache {cache} has targets of the teacher `Scout` (bf16), fingerprint \
             teacher-01234567..., this run has a teacher with fingerprint ffffffffffffffff...; name the teacher the cache \
             was made with, {}",
            again(&soft)
        )
    );
    assert_eq!(
        message(&soft, |wanted| wanted.vocab_size = Some(51)),
        format!(
            "the vocabulary size differs: the cache {cache} has 50, this run has 51; give the student the vocabulary of the \
             cache, {}",
            again(&soft)
        )
    );
    assert_eq!(
        message(&soft, |wanted| wanted.data_fingerprint = Some("e".into())),
        format!(
            "the data differs: the cache {cache} has data data-0123456789a..., this run has data e; restore the [data] \
             section and files the cache was made with, {}",
            again(&soft)
        )
    );
    assert_eq!(
        message(&soft, |wanted| wanted.seq_len = Some(8)),
        format!("seq_len differs: the cache {cache} has 4, this run has 8; set [data] seq_len = 4, {}", again(&soft))
    );
    assert_eq!(
        message(&soft, |wanted| wanted.split = Some("held_out".into())),
        format!(
            "the split differs: the cache {cache} has `train`, this run has `held_out`; open the cache of the other split"
        )
    );
    assert_eq!(
        message(&soft, |wanted| wanted.selection = Some(Selection::TopK { k: 3 })),
        format!(
            "the selection of kept ids differs: the cache {cache} has top_k = 4, this run has top_k = 3; set [cache] to \
             top_k = 4, {}",
            again(&soft)
        )
    );
    assert_eq!(
        message(&soft, |wanted| wanted.temperatures = vec![2.0]),
        format!(
            "the list of captured temperatures differs: the cache {cache} has [1.0, 0.7], this run has [2.0]; use a temperature \
             that was captured, {}",
            again(&soft)
        )
    );
    assert_eq!(
        message(&hard, |_| ()),
        format!(
            "the kind of cache differs: the cache {} has tokens only, this run has a loss on soft targets; train on the \
             hard target alone, {}",
            hard.display(),
            again(&hard)
        )
    );
}

#[test]
fn the_summary_counts_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::create_or_resume(folder.path(), settings(4, 2, &[1.0]), WriterPart::WHOLE).unwrap();
    // Two sequences: rows with (1/2, 1/4 | tail 1/4), (1 | tail 0), none kept, and one across documents.
    let (half, quarter) = (0.5f32.ln(), 0.25f32.ln());
    for number in 0..2 {
        let sequence = PackedSequence { tokens: vec![1, 2, 3, 4, 5], segments: vec![0, 0, 0, 0, 1] };
        let capture = Capture {
            temperature: 1.0,
            log_probs: vec![half, quarter, 0.0],
            log_tail: vec![quarter, f32::NEG_INFINITY, 0.0, 0.0],
            label_log_prob: vec![quarter, 0.0, quarter, 0.0],
        };
        let targets = exact(vec![0, 2, 3, 3, 3], vec![3, 9, 4], capture);
        writer.push(sequence, Some(targets), 10 + number).unwrap();
    }
    writer.finish().unwrap();
    let summary = CacheReader::open(folder.path()).unwrap().summary().unwrap();
    let counts = Counts { sequences: 2, tokens: 8, valid_rows: 6, kept_ids: 6, text_bytes: 21 };
    assert_eq!((summary.counts, summary.shards, summary.sequences_read), (counts, 1, 2));
    assert_eq!((summary.kept_min, summary.kept_mean, summary.kept_max), (0, 1.0, 2));
    let capture = &summary.captures[0];
    let close = |left: f64, right: f64| assert!((left - right).abs() < 1e-6, "{left} {right}");
    close(capture.tail_mean, (0.25 + 0.0 + 1.0) / 3.0);
    close(capture.entropy, (0.5 * 2f64.ln() + 0.5 * 4f64.ln()) / 3.0);
    close(capture.label_loss, 2.0 * 4f64.ln() / 3.0);
    close(capture.mass_error, 0.0);
    let deciles = capture.tail_deciles;
    close(deciles[0], 0.0);
    close(deciles[5], 0.25);
    close(deciles[10], 1.0);
    assert!(deciles.is_sorted());
    assert_eq!(summary.parts.iter().map(|part| part.bytes).sum::<u64>(), summary.bytes);
    let part = |name| summary.parts.iter().find(|part| part.name == name).unwrap();
    assert_eq!((part("ids").bytes, part("ids").bytes_per_token), (24, 4.0));
    assert_eq!(part("offsets").bytes, 72);
}

#[test]
fn the_summary_of_tokens_only_has_no_captures() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(4, 2, &[]), 3);
    let summary = CacheReader::open(folder.path()).unwrap().summary().unwrap();
    assert!(summary.captures.is_empty());
    assert_eq!((summary.kept_max, summary.shards, summary.counts.sequences), (0, 2, 3));
}

#[test]
fn the_reader_in_the_documentation_is_the_one_that_is_tested() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = fs::read_to_string(root.join("tests/python/read_cache.py")).unwrap();
    assert!(script.lines().count() <= 30);
    assert!(fs::read_to_string(root.join("docs/cache-format.md")).unwrap().contains(&script));
}

#[test]
fn python_reads_the_same_numbers() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has_modules = Command::new(&python).args(["-c", "import numpy, safetensors"]).output();
    if !has_modules.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {python} has no numpy and safetensors (name another with PYTHON=...)");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/read_cache.py");
    for temperatures in [vec![], vec![1.0, 0.7]] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &settings(6, 2, &temperatures), 5);
        let output = Command::new(&python).arg(&script).arg(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let reader = CacheReader::open(folder.path()).unwrap();
        let lines: Vec<serde_json::Value> =
            String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 5);
        for (number, line) in lines.iter().enumerate() {
            let batch = reader.read(&[number as u64]).unwrap();
            let rows: Vec<serde_json::Value> = batch
                .targets
                .iter()
                .flat_map(|targets| {
                    (0..targets.row_count())
                        .map(|row| {
                            let row = targets.slice(row, row + 1);
                            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                            let captures: Vec<_> = row
                                .captures
                                .iter()
                                .map(|capture| {
                                    [bits(&capture.log_probs), bits(&capture.log_tail), bits(&capture.label_log_prob)]
                                })
                                .collect();
                            serde_json::json!([row.ids, captures])
                        })
                        .collect::<Vec<_>>()
                })
                .collect();
            let sequence = &batch.sequences[0];
            let expected =
                serde_json::json!({ "tokens": sequence.tokens, "segments": sequence.segments, "rows": rows });
            assert_eq!(*line, expected);
        }
    }
}

#[test]
fn drawn_targets_and_normalisers_come_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let mut drawn = settings(2, 2, &[1.0, 2.0]);
    drawn.soft_targets.as_mut().unwrap().selection = Selection::ThresholdSampled { threshold: 0.5, seed: 3 };
    let good = || {
        let sequence = PackedSequence { tokens: vec![1, 2, 3], segments: vec![0, 0, 0] };
        let capture = |temperature, log_probs| Capture {
            temperature,
            log_probs,
            log_tail: vec![f32::NEG_INFINITY; 2],
            label_log_prob: vec![-1.0; 2],
        };
        // At the second temperature weights are in no order, and may be above 1.
        let captures = vec![capture(1.0, vec![-0.1, -0.7, -0.2]), capture(2.0, vec![-0.5, 0.25, -0.3])];
        let targets = SparseTargets {
            offsets: vec![0, 2, 3],
            ids: vec![7, 8, 9],
            captures,
            kind: TargetKind::Sampled,
            log_normalizer: Some(vec![12.5, -3.0]),
            router: None,
        };
        (sequence, targets)
    };
    let mut writer = CacheWriter::create_or_resume(folder.path(), drawn, WriterPart::WHOLE).unwrap();
    type Change = fn(&mut SparseTargets);
    let cases: [(&str, Change); 5] = [
        ("its targets are exact, those of threshold_sampled are drawn", |targets| targets.kind = TargetKind::Exact),
        ("log_tail.1 of row 1 is -3, but drawn ids leave no tail", |targets| targets.captures[1].log_tail[1] = -3.0),
        ("log_probs.0 of row 0 do not descend", |targets| targets.captures[0].log_probs[1] = 0.0),
        ("its log_normalizer has 1 numbers, not 2", |targets| targets.log_normalizer = Some(vec![1.0])),
        ("log_normalizer of row 1 (inf) is not finite", |targets| {
            targets.log_normalizer = Some(vec![1.0, f32::INFINITY])
        }),
    ];
    for (expected, change) in cases {
        let (sequence, mut targets) = good();
        change(&mut targets);
        assert_eq!(writer.next_push().unwrap(), Next::Sequence(0));
        let error = writer.push(sequence, Some(targets), 1).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    for number in 0..3 {
        assert_eq!(writer.next_push().unwrap(), Next::Sequence(number));
        let (sequence, targets) = good();
        writer.push(sequence, Some(targets), 1).unwrap();
    }
    writer.next_push().unwrap();
    writer.end(3).unwrap();
    writer.next_push().unwrap();
    writer.finish().unwrap();
    let reader = CacheReader::open(folder.path()).unwrap();
    let found = reader.read(&[2, 0]).unwrap().targets.unwrap();
    let mut truth = good().1;
    truth.extend(&good().1);
    assert_same_bits(&found, &truth);
    assert_eq!(reader.manifest().settings.soft_targets.as_ref().unwrap().selection.kind(), TargetKind::Sampled);

    let mut exact = settings(2, 2, &[1.0, 2.0]);
    exact.data_fingerprint = "another".into();
    let mut writer = CacheWriter::create_or_resume(folder.path().join("exact"), exact, WriterPart::WHOLE).unwrap();
    let (sequence, targets) = good();
    writer.next_push().unwrap();
    let error = writer.push(sequence, Some(targets), 1).unwrap_err().to_string();
    assert!(error.contains("its targets are drawn, those of top_k are exact"), "{error}");
}

#[test]
fn normalisers_are_dropped_where_not_all_rows_have_them() {
    let mut with = SparseTargets::empty(&[1.0]);
    let row = |log_normalizer: Option<f32>| SparseTargets {
        log_normalizer: log_normalizer.map(|value| vec![value]),
        ..exact(
            vec![0, 1],
            vec![4],
            Capture { temperature: 1.0, log_probs: vec![-1.0], log_tail: vec![-0.5], label_log_prob: vec![-2.0] },
        )
    };
    with.extend(&row(Some(3.0)));
    with.extend(&row(Some(4.0)));
    assert_eq!(with.log_normalizer.as_deref(), Some(&[3.0, 4.0][..]));
    assert_eq!(with.slice(1, 2).log_normalizer.as_deref(), Some(&[4.0][..]));
    with.extend(&row(None));
    with.extend(&row(Some(5.0)));
    assert_eq!((with.row_count(), with.log_normalizer), (4, None));
}
