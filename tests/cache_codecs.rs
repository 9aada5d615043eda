//! The codecs that round: what comes back, what it costs, and that it never depends on who wrote it.

mod cache_samples;

use std::fs;
use std::path::{Path, PathBuf};

use cache_samples::*;
use limbeck::cache::*;
use limbeck::targets::*;

/// Sequences of distributions that add up to 1, as teachers give them, at two temperatures.
fn distributions(settings: &CacheSettings, number: u64) -> (PackedSequence, SparseTargets) {
    let (sequence, targets, _) = sample(settings, number);
    let mut targets = targets.unwrap();
    let vocab = settings.tokenizer.vocab_size as u64;
    for row in (0..settings.seq_len).filter(|row| sequence.is_valid(*row)) {
        let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        // Logits of a made-up teacher: the kept ids in falling order, all others below.
        let logits: Vec<f64> = (0..vocab)
            .map(|id| match targets.ids[kept.clone()].iter().position(|kept| u64::from(*kept) == id) {
                Some(place) => 4.0 - 1.3 * place as f64 - 0.1 * (number % 7) as f64,
                None => -1.0 - ((id * 13 + number) % 11) as f64 / 5.0,
            })
            .collect();
        let ids = targets.ids[kept.clone()].to_vec();
        for capture in &mut targets.captures {
            let weights: Vec<f64> = logits.iter().map(|logit| (logit / f64::from(capture.temperature)).exp()).collect();
            let total: f64 = weights.iter().sum();
            let of = |id: u32| (weights[id as usize] / total).ln() as f32;
            for (place, id) in kept.clone().zip(&ids) {
                capture.log_probs[place] = of(*id);
            }
            let rest: f64 = (0..vocab as u32).filter(|id| !ids.contains(id)).map(|id| weights[id as usize]).sum();
            capture.log_tail[row] = (rest / total).ln() as f32;
            capture.label_log_prob[row] = of(sequence.tokens[row + 1]);
        }
    }
    (sequence, targets)
}

fn of_codec(codec: Codec) -> CacheSettings {
    CacheSettings { codec, ..settings(64, 8, &[1.0, 2.0]) }
}

fn write_distributions(directory: &Path, settings: &CacheSettings, count: u64) -> Manifest {
    write_whole(directory, settings.clone(), |first| {
        (first..count).map(|number| {
            let (sequence, targets) = distributions(settings, number);
            Ok((sequence, Some(targets), number))
        })
    })
    .unwrap()
}

#[test]
fn ids_come_back_exactly_and_values_within_the_error_that_the_manifest_states() {
    for codec in [Codec::Packed, Codec::Compact] {
        let (folder, settings) = (tempfile::tempdir().unwrap(), of_codec(codec));
        let manifest = write_distributions(folder.path(), &settings, 40);
        let stated = manifest.error.unwrap();
        let cache = CacheReader::open(folder.path()).unwrap();
        cache.verify().into_result().unwrap();
        let (mut rows, mut divergence, mut worst) = (0, 0.0, 0.0f64);
        for number in 0..40 {
            let (sequence, truth) = distributions(&settings, number);
            let batch = cache.read(&[number]).unwrap();
            let found = batch.targets.unwrap();
            assert_eq!((&batch.sequences[0], &found.offsets), (&sequence, &truth.offsets));
            for row in (0..64).filter(|row| sequence.is_valid(*row)) {
                let kept = truth.offsets[row] as usize..truth.offsets[row + 1] as usize;
                rows += 1;
                for (truth_at, found_at) in truth.captures.iter().zip(&found.captures) {
                    let mut mass = f64::from(found_at.log_tail[row]).exp();
                    let mut kl = f64::from(truth_at.log_tail[row]).exp()
                        * f64::from(truth_at.log_tail[row] - found_at.log_tail[row]);
                    for place in kept.clone() {
                        let id = truth.ids[place];
                        let other = kept.clone().find(|other| found.ids[*other] == id).expect("the id is kept");
                        let (before, after) =
                            (f64::from(truth_at.log_probs[place]), f64::from(found_at.log_probs[other]));
                        mass += after.exp();
                        kl += before.exp() * (before - after);
                    }
                    assert!((mass - 1.0).abs() < 1e-5, "{codec:?}: row {row} of {number} adds up to {mass}");
                    assert!(kl < 4e-3, "{codec:?}: {kl} nats in row {row} of {number}");
                    assert!((truth_at.label_log_prob[row] - found_at.label_log_prob[row]).abs() < 0.3);
                    if truth_at.temperature == 1.0 {
                        divergence += kl;
                        worst = worst.max(kl);
                    }
                }
            }
        }
        assert_eq!(stated.rows, rows);
        assert!((stated.kl_sum - divergence).abs() < 1e-5 * rows as f64, "{} and {divergence}", stated.kl_sum);
        assert!((stated.kl_max - worst).abs() < 1e-5);
    }
}

#[test]
fn what_no_distribution_is_comes_back_too() {
    for codec in [Codec::Packed, Codec::Compact] {
        let (folder, settings) = (tempfile::tempdir().unwrap(), of_codec(codec));
        write(folder.path(), &settings, 30);
        let cache = CacheReader::open(folder.path()).unwrap();
        for number in 0..30 {
            let (sequence, truth, _) = sample(&settings, number);
            let (batch, truth) = (cache.read(&[number]).unwrap(), truth.unwrap());
            let found = batch.targets.unwrap();
            assert_eq!((&batch.sequences[0], &found.offsets), (&sequence, &truth.offsets));
            for row in 0..64 {
                let kept = truth.offsets[row] as usize..truth.offsets[row + 1] as usize;
                let sorted = |ids: &[u32]| {
                    let mut ids = ids.to_vec();
                    ids.sort_unstable();
                    ids
                };
                assert_eq!(sorted(&truth.ids[kept.clone()]), sorted(&found.ids[kept]));
            }
        }
    }
}

#[test]
fn any_number_of_writers_and_a_merge_give_one_cache() {
    for codec in [Codec::Packed, Codec::Compact] {
        let settings = CacheSettings { codec, ..settings(16, 2, &[1.0]) };
        let alone = tempfile::tempdir().unwrap();
        write(alone.path(), &settings, 21);
        let expected = files(alone.path());
        assert_eq!(expected.contains_key("coder.safetensors"), codec == Codec::Compact);
        for count in [2, 3, 7] {
            let together = tempfile::tempdir().unwrap();
            std::thread::scope(|scope| {
                for index in 0..count {
                    let (settings, directory) = (&settings, together.path());
                    scope.spawn(move || {
                        let part = WriterPart::new(index, count).unwrap();
                        let mut writer = CacheWriter::create_or_resume(directory, settings.clone(), part).unwrap();
                        fill(&mut writer, 21).unwrap();
                        writer.finish_part().unwrap()
                    });
                }
            });
            let last = CacheWriter::create_or_resume(together.path(), settings.clone(), WriterPart::WHOLE).unwrap();
            last.finish().unwrap();
            assert!(files(together.path()) == expected, "{codec:?}: {count} writers");

            let apart = tempfile::tempdir().unwrap();
            let parts: Vec<PathBuf> = (0..count).map(|index| apart.path().join(index.to_string())).collect();
            for (index, directory) in parts.iter().enumerate() {
                let part = WriterPart::new(index as u64, count).unwrap();
                let mut writer = CacheWriter::create_or_resume(directory, settings.clone(), part).unwrap();
                fill(&mut writer, 21).unwrap();
                writer.finish_part().unwrap();
            }
            let merged = apart.path().join("merged");
            merge(&merged, &parts).unwrap();
            assert!(files(&merged) == expected, "{codec:?}: {count} merged");
        }
    }
}

#[test]
fn rounding_happens_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for codec in [Codec::Packed, Codec::Compact] {
        let name = |step: &str| path(&format!("{codec:?} {step}"));
        write_distributions(&name("first"), &of_codec(codec), 20);
        convert(
            &CacheReader::open(name("first")).unwrap(),
            &name("raw"),
            &Conversion { codec: Codec::Raw, ..Default::default() },
        )
        .unwrap();
        convert(&CacheReader::open(name("raw")).unwrap(), &name("again"), &Conversion { codec, ..Default::default() })
            .unwrap();
        let (first, again) = (files(&name("first")), files(&name("again")));
        let shards = |files: &std::collections::BTreeMap<String, Vec<u8>>| {
            files.iter().filter(|(file, _)| *file != MANIFEST_FILE).map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>()
        };
        assert!(shards(&first) == shards(&again), "{codec:?}");
    }
    // Both codecs write the same numbers when they round alike.
    let raw = CacheReader::open(path("Compact raw")).unwrap();
    convert(&raw, &path("packed"), &Conversion { codec: Codec::Packed, levels: Some(128), ..Default::default() })
        .unwrap();
    let packed = CacheReader::open(path("packed")).unwrap();
    for number in 0..20 {
        let of = |cache: &CacheReader| cache.read(&[number]).unwrap().targets.unwrap();
        assert_same_bits(&of(&raw), &of(&packed));
    }
}

#[test]
fn normalizers_are_kept_exactly_where_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let normalizer = |number: u64, row: usize| 20.0 + number as f32 / 3.0 - row as f32 * 0.7;
    let write = |directory: &Path, settings: &CacheSettings| {
        write_whole(directory, settings.clone(), |first| {
            (first..20).map(move |number| {
                let (sequence, mut targets) = distributions(settings, number);
                targets.log_normalizer = Some((0..64).map(|row| normalizer(number, row)).collect());
                Ok((sequence, Some(targets), number))
            })
        })
        .unwrap()
    };
    let of = |directory: &Path, numbers: &[u64]| {
        let cache = CacheReader::open(directory).unwrap();
        cache.verify().into_result().unwrap();
        cache.read(numbers).unwrap().targets.unwrap().log_normalizer
    };
    let given = |numbers: &[u64]| {
        numbers.iter().flat_map(|&number| (0..64).map(move |row| normalizer(number, row))).collect::<Vec<f32>>()
    };
    for codec in [Codec::Raw, Codec::Packed, Codec::Compact] {
        let path = |name: &str| folder.path().join(format!("{codec:?} {name}"));
        let with = |log_normalizer| CacheSettings { log_normalizer, ..of_codec(codec) };
        let bytes = |manifest: Manifest| manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>();
        let kept = bytes(write(&path("kept"), &with(Some(true))));
        let left_out = bytes(write(&path("left out"), &with(Some(false))));
        assert_eq!(of(&path("kept"), &[19, 0, 8]).unwrap(), given(&[19, 0, 8]), "{codec:?}");
        assert_eq!(of(&path("left out"), &[3]), None, "{codec:?}");
        let difference = kept - left_out;
        // Four bytes a row; in each of three shards a header's line and perhaps one more hash beside them.
        assert!((20 * 64 * 4..20 * 64 * 4 + 3 * 256).contains(&difference), "{codec:?}: {difference}");
        write(&path("usual"), &with(None));
        assert_eq!(of(&path("usual"), &[3]).is_some(), codec == Codec::Raw, "{codec:?}");

        let kept = CacheReader::open(path("kept")).unwrap();
        let conversion = Conversion { codec: Codec::Compact, ..Default::default() };
        convert(&kept, &path("again"), &conversion).unwrap();
        assert_eq!(of(&path("again"), &[5]).unwrap(), given(&[5]), "{codec:?}");
        convert(&kept, &path("without"), &Conversion { log_normalizer: Some(false), ..conversion.clone() }).unwrap();
        assert_eq!(of(&path("without"), &[5]), None, "{codec:?}");
        let without = CacheReader::open(path("without")).unwrap();
        let wanting = Conversion { log_normalizer: Some(true), ..conversion };
        let error = convert(&without, &path("back"), &wanting).unwrap_err().to_string();
        let expected = "sequence 0 cannot be stored: it has no log_normalizer, but the cache is one that keeps it";
        assert!(error.contains(expected), "{error}");
        let error = Reuse::open(&[path("left out")], &with(Some(true))).map(drop).unwrap_err().to_string();
        assert!(error.contains("log_normalizer"), "{error}");
        assert!(Reuse::open(&[path("kept")], &with(Some(false))).is_ok());
    }
    let tokens_only = CacheSettings { soft_targets: None, log_normalizer: Some(true), ..of_codec(Codec::Raw) };
    let error = CacheWriter::create_or_resume(folder.path(), tokens_only, WriterPart::WHOLE).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a cache of tokens only has no logits whose log_normalizer could be kept; \
         leave out [cache] log_normalizer, or name a teacher"
    );
}

/// With routers of layers 1 and 4, and what they said of each row.
fn with_routers(settings: CacheSettings) -> CacheSettings {
    let router = Some(RouterSettings { layers: vec![1, 4], experts: 5 });
    let soft_targets = settings.soft_targets.clone().map(|soft_targets| SoftTargetSettings { router, ..soft_targets });
    CacheSettings { soft_targets, ..settings }
}

fn codes(number: u64) -> RouterCodes {
    let mut codes = RouterCodes::empty(2, 5);
    for place in 0..64 * 2 {
        let logit = |expert: u64| ((number * 31 + place * 7 + expert * expert * 5) % 17) as f32 / 3.0 - 2.0;
        codes.push(&(0..5).map(logit).collect::<Vec<f32>>());
    }
    codes
}

#[test]
fn what_routers_said_is_kept_exactly_by_every_codec_in_a_byte_for_each_expert() {
    let folder = tempfile::tempdir().unwrap();
    let sequences = |settings: &CacheSettings, first: u64| {
        let settings = settings.clone();
        (first..20).map(move |number| {
            let (sequence, mut targets) = distributions(&settings, number);
            targets.router = Some(codes(number));
            Ok((sequence, Some(targets), number))
        })
    };
    let write = |directory: &Path, settings: &CacheSettings| {
        write_whole(directory, settings.clone(), |first| sequences(settings, first)).unwrap()
    };
    // What is in a cache, zeros in rows that predict nothing.
    let holds = |directory: &Path| {
        let cache = CacheReader::open(directory).unwrap();
        cache.verify().into_result().unwrap();
        let numbers = [19, 0, 8, 9];
        let batch = cache.read(&numbers).unwrap();
        let found = batch.targets.unwrap().router?;
        assert_eq!((found.layers, found.experts, found.codes.len()), (2, 5, 4 * 64 * 10));
        let mut silent = 0;
        for (row, found) in found.codes.chunks(10).enumerate() {
            let (place, number) = (row % 64, numbers[row / 64]);
            match batch.sequences[row / 64].is_valid(place) {
                true => assert_eq!(found, &codes(number).codes[place * 10..place * 10 + 10]),
                false => assert_eq!(found, [0; 10]),
            }
            silent += usize::from(found == [0; 10]);
        }
        assert!((1..200).contains(&silent), "rows of both kinds");
        Some(found)
    };
    for codec in [Codec::Raw, Codec::Packed, Codec::Compact] {
        let path = |name: &str| folder.path().join(format!("{codec:?} {name}"));
        let settings = with_routers(of_codec(codec));
        let bytes = |manifest: Manifest| manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>();
        let kept = bytes(write(&path("kept"), &settings));
        assert!(holds(&path("kept")).is_some(), "{codec:?}");
        // Who does not ask for them has a cache as it was before there were any.
        let left_out = bytes(write(&path("left out"), &of_codec(codec)));
        assert!(holds(&path("left out")).is_none(), "{codec:?}");
        write_distributions(&path("without"), &of_codec(codec), 20);
        assert!(files(&path("left out")) == files(&path("without")));
        assert!(!fs::read_to_string(path("without").join("manifest.json")).unwrap().contains("router"));
        let difference = kept - left_out;
        assert!((20 * 64 * 10..20 * 64 * 10 + 3 * 512).contains(&difference), "{codec:?}: {difference}");

        // Interrupted after some sequences, and written in parts that are merged: the same bytes.
        let mut writer = CacheWriter::create_or_resume(path("stopped"), settings.clone(), WriterPart::WHOLE).unwrap();
        for sequence in sequences(&settings, 0).take(11) {
            let (sequence, targets, bytes) = sequence.unwrap();
            writer.push(sequence, targets, bytes).unwrap();
        }
        drop(writer);
        write(&path("stopped"), &settings);
        assert!(files(&path("stopped")) == files(&path("kept")), "{codec:?}");
        if codec.default_levels().is_none() {
            let parts = [path("part 1"), path("part 2")];
            for (part, directory) in (0..).zip(&parts) {
                let part = WriterPart::new(part, 2).unwrap();
                let mut writer = CacheWriter::create_or_resume(directory, settings.clone(), part).unwrap();
                loop {
                    match writer.next_push().unwrap() {
                        Next::Sequence(number) if number < 20 => {
                            let (sequence, targets, bytes) = sequences(&settings, number).next().unwrap().unwrap();
                            writer.push(sequence, targets, bytes).unwrap();
                        }
                        Next::Sequence(_) => writer.end(20).unwrap(),
                        Next::Wait => unreachable!("nothing is learnt"),
                        Next::Done => break,
                    }
                }
                writer.finish_part().unwrap();
            }
            merge(path("merged"), &parts).unwrap();
            assert!(files(&path("merged")) == files(&path("kept")));
        }

        let cache = CacheReader::open(path("kept")).unwrap();
        let selection = Some(Selection::TopK { k: 2 });
        convert(&cache, &path("again"), &Conversion { codec: Codec::Compact, selection, ..Default::default() })
            .unwrap();
        assert_eq!(holds(&path("again")), holds(&path("kept")));

        // Targets are taken from caches that listened to the same routers.
        assert!(Reuse::open(&[path("kept")], &settings).is_ok());
        let error = Reuse::open(&[path("left out")], &settings).map(drop).unwrap_err().to_string();
        assert!(error.contains("soft_targets.router"), "{error}");
    }
}

#[test]
fn rows_without_what_their_routers_said_are_refused() {
    let settings = with_routers(of_codec(Codec::Raw));
    let folder = tempfile::tempdir().unwrap();
    let (sequence, targets) = distributions(&settings, 1);
    let valid = (0..64).find(|row| sequence.is_valid(*row)).unwrap();
    let message = |change: &dyn Fn(&mut Option<RouterCodes>)| {
        let mut targets = SparseTargets { router: Some(codes(1)), ..targets.clone() };
        change(&mut targets.router);
        let mut writer = CacheWriter::create_or_resume(folder.path(), settings.clone(), WriterPart::WHOLE).unwrap();
        let error = writer.push(sequence.clone(), Some(targets), 0).unwrap_err().to_string();
        error.split("cannot be stored: ").nth(1).unwrap().split(';').next().unwrap().to_string()
    };
    assert_eq!(
        message(&|router| *router = None),
        "it has nothing of the teacher's routers, but the cache is one that keeps them"
    );
    let other = "its routers are not those of 2 layers with 5 experts";
    assert_eq!(message(&|router| *router = Some(RouterCodes::empty(2, 5))), other);
    assert_eq!(message(&|router| router.as_mut().unwrap().experts = 4), other);
    assert_eq!(
        message(&|router| router.as_mut().unwrap().codes[valid * 10 + 5..valid * 10 + 10].fill(3)),
        format!("the router of layer 4 has no likeliest expert in row {valid}")
    );
    // A router that gives no numbers.
    for broken in [f32::NAN, f32::INFINITY] {
        let mut codes = RouterCodes::empty(1, 3);
        codes.push(&[0.5, broken, 1.0]);
        assert_eq!(codes.codes, [0; 3]);
    }
}

#[test]
fn settings_that_a_codec_cannot_have_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |settings: CacheSettings| {
        CacheWriter::create_or_resume(folder.path(), settings, WriterPart::WHOLE).unwrap_err().to_string()
    };
    let raw = CacheSettings { levels: Some(64), ..of_codec(Codec::Raw) };
    assert_eq!(
        refused(raw),
        "the codec `raw` rounds nothing, and has no levels; leave out [cache] levels, or choose packed or compact"
    );
    let fine = CacheSettings { levels: Some(191), ..of_codec(Codec::Compact) };
    assert_eq!(
        refused(fine),
        "probabilities cannot be rounded to 191 levels; give [cache] levels from 1 to 190, as 128"
    );
    let mut drawn = of_codec(Codec::Compact);
    drawn.soft_targets.as_mut().unwrap().selection = Selection::ThresholdSampled { threshold: 0.1, seed: 0 };
    assert_eq!(
        refused(drawn),
        "the codec `compact` cannot hold drawn ids at several temperatures; \
         set [cache] codec = \"raw\", or give one temperature"
    );
}

#[test]
fn equal_sequences_take_their_targets_from_finished_caches() {
    let folder = tempfile::tempdir().unwrap();
    let (old, settings) = (folder.path().join("old"), of_codec(Codec::Raw));
    write(&old, &settings, 10);
    let more = CacheSettings { data_fingerprint: "more data".into(), codec: Codec::Compact, ..settings.clone() };
    let reuse = Reuse::open(std::slice::from_ref(&old), &more).unwrap();
    assert_eq!(reuse.sequence_count(), 10);
    for number in 0..10 {
        let (sequence, targets, _) = sample(&settings, number);
        assert_same_bits(&reuse.targets(&sequence).unwrap().unwrap(), &targets.unwrap());
        let mut other = sequence.clone();
        other.tokens[3] = (other.tokens[3] + 1) % 50;
        assert_eq!(reuse.targets(&other).unwrap(), None);
        let mut other = sequence;
        other.segments[64] = PADDING - 1;
        assert_eq!(reuse.targets(&other).unwrap(), None);
    }

    let refused = |settings: &CacheSettings, from: &Path| {
        Reuse::open(&[from.to_path_buf()], settings).map(drop).unwrap_err().to_string()
    };
    let mut another = more.clone();
    another.soft_targets.as_mut().unwrap().teacher.fingerprint = "another".into();
    let error = refused(&another, &old);
    assert!(error.contains("the teacher") && error.contains("named in [cache] reuse"), "{error}");
    let rounded = folder.path().join("rounded");
    write(&rounded, &of_codec(Codec::Packed), 10);
    let error = refused(&more, &rounded);
    assert!(error.contains("its targets are rounded to 63 levels (packed), which cannot be undone"), "{error}");
    assert!(Reuse::open(&[rounded], &CacheSettings { levels: Some(63), ..more.clone() }).is_ok());
    let error = refused(&more, folder.path());
    assert!(error.contains("there is no finished cache to take targets from"), "{error}");
}
