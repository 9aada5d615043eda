//! Promises that both codecs of records keep.

use proptest::prelude::*;

use super::calibrate::CalibrationSettings;
use super::codec::Block;
use super::coder::Coder;
use super::manifest::QuantiserError;
use super::quantizer::RowKind;
use super::record::RecordShape;
use super::walk::Workspace;
use super::{compact, packed};
use crate::targets::{PADDING, PackedSequence, SparseTargets};

/// Numbers that look random, the same for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit
    }

    fn unit(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 20) as f32
    }
}

const THRESHOLD: f32 = -4.6;

/// A sequence that a cache may hold. Tokens and ids are skewed, so that coders find something to learn; now and then
/// a row keeps nothing, everything, or values that no softmax gives.
pub(super) fn sample(seed: u64, shape: &RecordShape, kind: RowKind, sane: bool) -> (PackedSequence, SparseTargets) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let vocab_size = shape.vocab_size;
    let places = shape.seq_len + 1;
    let padding_from = if random.below(4) == 0 { random.below(places + 1) } else { places };
    let mut segment = if sane { 0 } else { random.below(1000) as u32 };
    let skewed = |random: &mut Random| {
        let limit = 1 + random.below(vocab_size);
        (random.below(limit).pow(2) / limit) as u32
    };
    let mut sequence = PackedSequence { tokens: vec![], segments: vec![] };
    for place in 0..places {
        segment += u32::from(random.below(9) == 0);
        sequence.segments.push(if place < padding_from { segment } else { PADDING });
        sequence.tokens.push(skewed(&mut random));
    }
    let mut targets = SparseTargets::empty(&shape.temperatures);
    for row in 0..shape.seq_len {
        if !sequence.is_valid(row) {
            super::record::push_empty_row(&mut targets);
            continue;
        }
        let count = match random.below(if sane { 30 } else { 6 }) {
            0 if vocab_size <= 5000 => vocab_size,
            1 => 0,
            2 => 1,
            _ => random.below(vocab_size.min(40)),
        };
        let mut ids: Vec<u32> = if count == vocab_size {
            (0..count as u32).collect()
        } else {
            let near = sequence.tokens[row] as usize;
            (0..count).map(|place| ((near + place * place) % vocab_size) as u32).collect()
        };
        ids.sort_unstable();
        ids.dedup();
        let start = random.below(ids.len().max(1));
        ids.rotate_left(start);
        targets.ids.extend_from_slice(&ids);
        targets.offsets.push(targets.ids.len() as u64);
        for capture in &mut targets.captures {
            let mut log_probs: Vec<f32> = (0..ids.len())
                .map(|_| match (kind, random.below(if sane { 100 } else { 8 })) {
                    (_, 0) => -69.0,
                    (_, 1) if !sane => 1e-4,
                    (_, 2) if !sane => -1e30,
                    (RowKind::ThresholdSampled { log_threshold }, 3..60) => log_threshold,
                    _ => -random.unit() * 9.0,
                })
                .collect();
            log_probs.sort_by(|left, right| right.total_cmp(left));
            capture.log_probs.extend(log_probs);
            capture.log_tail.push(match random.below(5) {
                0 => f32::NEG_INFINITY,
                1 if !sane => 5e-4,
                2 => -60.0 * random.unit(),
                _ => -3.0 * random.unit(),
            });
            capture.label_log_prob.push(if random.below(9) == 0 { f32::NEG_INFINITY } else { -20.0 * random.unit() });
        }
    }
    (sequence, targets)
}

pub(super) fn shape_of(vocab_size: usize, kind: u8, steps: u16) -> (RecordShape, RowKind) {
    let (kind, temperatures): (_, &[f32]) = match kind % 4 {
        0 => (RowKind::Exact, &[1.0]),
        1 => (RowKind::Exact, &[1.0, 2.0, 0.5]),
        2 => (RowKind::ThresholdSampled { log_threshold: THRESHOLD }, &[1.0]),
        _ => (RowKind::Sampled { draws: 50 }, &[1.0]),
    };
    (RecordShape::new(24, vocab_size, temperatures, kind, steps).unwrap(), kind)
}

pub(super) fn coder_of(shape: &RecordShape, kind: RowKind) -> Coder {
    let sample: Vec<_> = (1000..1024).map(|seed| sample(seed, shape, kind, true)).collect();
    let sequences = sample.iter().map(|(sequence, targets)| (sequence, Some(targets)));
    Coder::calibrate(sequences, shape, CalibrationSettings::default())
}

fn sorted(targets: &SparseTargets) -> Vec<u32> {
    let mut ids = targets.ids.clone();
    for pair in targets.offsets.windows(2) {
        ids[pair[0] as usize..pair[1] as usize].sort_unstable();
    }
    ids
}

/// What the writer asks of rows (rows.rs).
fn assert_legal(block: &Block) {
    let targets = block.targets.as_ref().unwrap();
    for capture in &targets.captures {
        assert!(capture.log_probs.iter().all(|log_prob| log_prob.is_finite() && *log_prob <= 1e-3));
        assert!(capture.log_tail.iter().chain(&capture.label_log_prob).all(|log_prob| *log_prob <= 1e-3));
        for pair in targets.offsets.windows(2) {
            assert!(capture.log_probs[pair[0] as usize..pair[1] as usize].is_sorted_by(|left, right| left >= right));
        }
    }
}

fn check_roundtrip(seed: u64, shape: &RecordShape, kind: RowKind, sane: bool, coder: &Coder) {
    let (sequence, targets) = sample(seed, shape, kind, sane);
    let mut space = Workspace::new(shape, &coder.model);
    let (mut errors, mut blocks) = ([QuantiserError::default(); 2], [Block::default(), Block::default()]);
    let mut records = [vec![], vec![]];
    packed::encode_sequence(&sequence, Some(&targets), shape, &mut records[0], &mut errors[0]);
    compact::encode_sequence(&sequence, Some(&targets), shape, coder, &mut space, &mut records[1], &mut errors[1]);
    packed::decode_sequence(&records[0], shape, &mut blocks[0]).unwrap();
    compact::decode_sequence(&records[1], shape, coder, &mut space, &mut blocks[1]).unwrap();
    assert_eq!(blocks[0], blocks[1]);
    assert_eq!(errors[0], errors[1]);
    let block = &blocks[0];
    assert_eq!((&block.tokens, &block.segments), (&sequence.tokens, &sequence.segments));
    let decoded = block.targets.as_ref().unwrap();
    assert_eq!((&decoded.offsets, sorted(decoded)), (&targets.offsets, sorted(&targets)));
    assert_legal(block);
    let mut again = [vec![], vec![]];
    packed::encode_sequence(&sequence, Some(decoded), shape, &mut again[0], &mut errors[0]);
    compact::encode_sequence(&sequence, Some(decoded), shape, coder, &mut space, &mut again[1], &mut errors[1]);
    assert_eq!(records, again, "a decoded sequence has another record");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn ids_come_back_and_decoded_values_keep_their_record(
        seeds in prop::collection::vec(any::<u64>(), 8),
        vocab_size in prop_oneof![Just(2usize), Just(3), 2usize..100, Just(5000)],
        kind in 0u8..4,
        steps in prop_oneof![Just(63u16), Just(64), Just(96), 1u16..=190],
    ) {
        let (shape, kind) = shape_of(vocab_size, kind, steps);
        let coder = coder_of(&shape, kind);
        for (number, seed) in seeds.into_iter().enumerate() {
            check_roundtrip(seed, &shape, kind, number % 2 == 0, &coder);
        }
    }
}

#[test]
fn a_vocabulary_of_300000_fits() {
    for kind in 0..4 {
        let (shape, kind) = shape_of(300_000, kind, 64);
        let coder = coder_of(&shape, kind);
        (0..4).for_each(|seed| check_roundtrip(seed, &shape, kind, seed % 2 == 0, &coder));
    }
}

#[test]
fn tokens_alone_are_a_record_too() {
    let (with, kind) = shape_of(50, 0, 64);
    let shape = RecordShape::new(24, 50, &[], RowKind::Exact, 64).unwrap();
    let sequences: Vec<_> = (0..8).map(|seed| sample(seed, &with, kind, true).0).collect();
    let coder = Coder::calibrate(sequences.iter().map(|sequence| (sequence, None)), &shape, Default::default());
    let mut space = Workspace::new(&shape, &coder.model);
    for sequence in &sequences {
        let (mut records, mut blocks) = ([vec![], vec![]], [Block::default(), Block::default()]);
        let mut error = QuantiserError::default();
        packed::encode_sequence(sequence, None, &shape, &mut records[0], &mut error);
        compact::encode_sequence(sequence, None, &shape, &coder, &mut space, &mut records[1], &mut error);
        packed::decode_sequence(&records[0], &shape, &mut blocks[0]).unwrap();
        compact::decode_sequence(&records[1], &shape, &coder, &mut space, &mut blocks[1]).unwrap();
        for block in blocks {
            assert_eq!((&block.tokens, &block.segments), (&sequence.tokens, &sequence.segments));
            assert_eq!(block.targets, None);
        }
    }
}

#[test]
fn the_same_sample_gives_the_same_coder() {
    let (shape, kind) = shape_of(50, 0, 64);
    let coder = coder_of(&shape, kind);
    let tensors = coder.to_tensors();
    assert_eq!(coder_of(&shape, kind).to_tensors(), tensors);
    let tensor = |name: &str| tensors.iter().find(|tensor| tensor.0 == name).map(|tensor| tensor.1.clone());
    assert_eq!(Coder::from_tensors(tensor, 50).unwrap(), coder);
    assert_eq!(Coder::from_tensors(tensor, 51).unwrap_err(), "it is for a vocabulary of 50, not 51");
    assert_eq!(Coder::from_tensors(|_| None, 50).unwrap_err(), "it has no tensor `model`");
}

#[test]
fn a_coder_that_saw_nothing_can_code_everything() {
    let (shape, kind) = shape_of(50, 1, 64);
    let coder = Coder::calibrate(std::iter::empty(), &shape, CalibrationSettings::default());
    (0..20).for_each(|seed| check_roundtrip(seed, &shape, kind, false, &coder));
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    let sampled = RowKind::Sampled { draws: 5 };
    let message = |result: Result<RecordShape, String>| result.unwrap_err();
    assert_eq!(message(RecordShape::new(8, 50, &[1.0, 2.0], sampled, 64)), "sampled targets at 2 temperatures, not 1");
    assert_eq!(message(RecordShape::new(8, 50, &[1.0], RowKind::Exact, 191)), "191 levels, not 1 to 190");
}

/// Decodes as both codecs, which must end in an error or a block.
fn decode_both(bytes: &[u8], shape: &RecordShape, coder: &Coder) -> [bool; 2] {
    let (mut space, mut block) = (Workspace::new(shape, &coder.model), Block::default());
    let packed = packed::decode_sequence(bytes, shape, &mut block).is_ok();
    let mut block = Block::default();
    [packed, compact::decode_sequence(bytes, shape, coder, &mut space, &mut block).is_ok()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn damaged_records_and_coders_end_in_an_error_or_a_block(
        seed in any::<u64>(),
        kind in 0u8..4,
        noise in prop::collection::vec(any::<u8>(), 0..300),
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..4),
        cut in any::<usize>(),
    ) {
        thread_local! {
            static CODERS: [(RecordShape, RowKind, Coder); 4] = [0, 1, 2, 3].map(|kind| {
                let (shape, kind) = shape_of(50, kind, 64);
                let coder = coder_of(&shape, kind);
                (shape, kind, coder)
            });
        }
        CODERS.with(|coders| {
            let (shape, kind, coder) = &coders[kind as usize];
            decode_both(&noise, shape, coder);
            let (sequence, targets) = sample(seed, shape, *kind, true);
            let (mut space, mut error) = (Workspace::new(shape, &coder.model), QuantiserError::default());
            let mut records = [vec![], vec![]];
            packed::encode_sequence(&sequence, Some(&targets), shape, &mut records[0], &mut error);
            compact::encode_sequence(&sequence, Some(&targets), shape, coder, &mut space, &mut records[1], &mut error);
            for (codec, record) in records.iter_mut().enumerate() {
                assert!(decode_both(record, shape, coder)[codec]);
                // A record that lacks bytes is never taken for a whole one.
                assert!(!decode_both(&record[..cut % record.len()], shape, coder)[codec]);
                for (place, change) in &changes {
                    let place = place % record.len();
                    record[place] ^= change;
                }
                decode_both(record, shape, coder);
            }
            let mut tensors = coder.to_tensors();
            let number = seed as usize % 2;
            for (place, change) in &changes {
                let place = place % tensors[number].1.len();
                tensors[number].1[place] ^= change;
            }
            let tensor = |name: &str| tensors.iter().find(|tensor| tensor.0 == name).map(|tensor| tensor.1.clone());
            if let Ok(changed) = Coder::from_tensors(tensor, 50) {
                decode_both(&records[1], shape, &changed);
            }
            let noise_alone = |_: &str| Some(noise.clone());
            let _ = Coder::from_tensors(noise_alone, 50);
        });
    }
}
