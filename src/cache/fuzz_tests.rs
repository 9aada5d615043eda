//! Bytes that nobody wrote, thrown at everything that reads bytes: each case ends in an error or in a value, and takes no
//! more room than its input and its shape allow. `LIMBECK_FUZZ_CASES` says how many; the usual number is a sample.

use std::path::Path;

use super::blocks::{BlockHasher, Checked};
use super::codec::{Block, Codec};
use super::coder::Coder;
use super::manifest::QuantiserError;
use super::manifest::{AFTER_ROOT, HASH_DIGITS, Manifest};
use super::quantizer::RowKind;
use super::record::RecordShape;
use super::record_tests::{Random, coder_of, sample, shape_of};
use super::shard::TensorIndex;
use super::walk::Workspace;
use super::{compact, packed};

const USUAL_CASES: usize = 20_000;
const VOCAB: usize = 50;

/// Cases of each of the five readers.
fn cases() -> usize {
    let asked = std::env::var("LIMBECK_FUZZ_CASES").ok();
    asked.map_or(USUAL_CASES, |text| text.parse().expect("LIMBECK_FUZZ_CASES is a number")) / 5
}

/// Changes some bytes, cuts, repeats or inserts, or makes all of it noise.
fn damage(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    if random.below(8) == 0 {
        return (0..random.below(2 * bytes.len().min(500) + 2)).map(|_| random.below(256) as u8).collect();
    }
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let place = random.below(bytes.len().max(1)).min(bytes.len());
        let end = (place + random.below(9)).min(bytes.len());
        match random.below(5) {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, random.below(256) as u8),
            2 => drop(bytes.drain(place..end)),
            3 => {
                let piece = bytes[place..end].to_vec();
                bytes.splice(place..place, piece);
            }
            _ if place < bytes.len() => bytes[place] ^= 1 << random.below(8),
            _ => {}
        }
    }
    bytes
}

fn shapes() -> Vec<(RecordShape, RowKind, Coder)> {
    let shape = |kind| {
        let (shape, kind) = shape_of(VOCAB, kind, 64);
        let coder = coder_of(&shape, kind);
        (shape, kind, coder)
    };
    (0..4).map(shape).collect()
}

fn assert_bounded(block: &Block, shape: &RecordShape) {
    let kept = block.targets.as_ref().map_or(0, |targets| targets.ids.len());
    assert!(block.tokens.len() <= shape.seq_len + 1 && block.segments.len() <= shape.seq_len + 1);
    // A row names how many ids it keeps; before it has them all, it is refused for what they would take.
    assert!(kept <= shape.seq_len * (shape.vocab_size + 1), "{kept} ids");
}

#[test]
fn any_record_is_an_error_or_a_block() {
    let shapes = shapes();
    let mut spaces: Vec<Workspace> =
        shapes.iter().map(|(shape, _, coder)| Workspace::new(shape, &coder.model)).collect();
    let mut random = Random(1);
    for case in 0..cases() {
        let (shape, kind, coder) = &shapes[case % shapes.len()];
        let space = &mut spaces[case % 4];
        let (sequence, targets) = sample((case / 64) as u64, shape, *kind, case % 3 > 0);
        let (mut records, mut error) = ([vec![], vec![]], QuantiserError::default());
        packed::encode_sequence(&sequence, Some(&targets), shape, &mut records[0], &mut error);
        compact::encode_sequence(&sequence, Some(&targets), shape, coder, space, &mut records[1], &mut error);
        for record in records.map(|record| damage(&record, &mut random)) {
            let mut blocks = [Block::default(), Block::default()];
            let _ = packed::decode_sequence(&record, shape, &mut blocks[0]);
            let _ = compact::decode_sequence(&record, shape, coder, space, &mut blocks[1]);
            blocks.iter().for_each(|block| assert_bounded(block, shape));
        }
        // What a damaged record leaves behind in the workspace does not reach the next.
        if case % 16 == 0 {
            let (mut record, mut block) = (vec![], Block::default());
            compact::encode_sequence(&sequence, Some(&targets), shape, coder, space, &mut record, &mut error);
            compact::decode_sequence(&record, shape, coder, space, &mut block).unwrap();
            assert_eq!(block.tokens, sequence.tokens);
        }
    }
}

#[test]
fn any_coder_is_an_error_or_decodes() {
    let shapes = shapes();
    let mut random = Random(2);
    for case in 0..cases() {
        let (shape, kind, coder) = &shapes[case % shapes.len()];
        let mut tensors = coder.to_tensors();
        let number = random.below(2);
        tensors[number].1 = damage(&tensors[number].1, &mut random);
        let tensor = |name: &str| tensors.iter().find(|tensor| tensor.0 == name).map(|tensor| tensor.1.clone());
        let Ok(changed) = Coder::from_tensors(tensor, VOCAB) else { continue };
        let (mut usual, mut space) = (Workspace::new(shape, &coder.model), Workspace::new(shape, &changed.model));
        let (sequence, targets) = sample(case as u64, shape, *kind, true);
        let (mut record, mut error, mut block) = (vec![], QuantiserError::default(), Block::default());
        compact::encode_sequence(&sequence, Some(&targets), shape, coder, &mut usual, &mut record, &mut error);
        let _ = compact::decode_sequence(&record, shape, &changed, &mut space, &mut block);
        assert_bounded(&block, shape);
        // Whatever it believes, what it wrote it reads.
        let (mut record, mut block) = (vec![], Block::default());
        compact::encode_sequence(&sequence, Some(&targets), shape, &changed, &mut space, &mut record, &mut error);
        compact::decode_sequence(&record, shape, &changed, &mut space, &mut block).unwrap();
        assert_eq!(block.tokens, sequence.tokens);
    }
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cache_v2/soft").join(name)).unwrap()
}

#[test]
fn any_shard_header_is_an_error_or_an_index() {
    let file = fixture("shards/00000.safetensors");
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut random = Random(3);
    for case in 0..cases() {
        let mut bytes = damage(&file[..header], &mut random);
        let version = 1 + (case % 2) as u32;
        if version == 2 {
            let mut hasher = BlockHasher::default();
            hasher.update(&bytes);
            let list = hasher.finish();
            let hash = blake3::hash(&list).to_hex();
            bytes.extend_from_slice(&list);
            if let Ok(checked) = Checked::open(Box::new(bytes), &hash) {
                let _ = TensorIndex::read(&checked, version, Codec::Raw, 0, 0);
            }
        } else {
            // With something behind it that it may point to.
            bytes.extend_from_slice(&file[header..(header + random.below(64)).min(file.len())]);
            let hash = blake3::hash(&bytes).to_hex();
            if let Ok(checked) = Checked::open_whole(Box::new(bytes), &hash) {
                let _ = TensorIndex::read(&checked, version, Codec::Raw, 0, 0);
            }
        }
    }
}

#[test]
fn any_manifest_is_an_error_or_a_manifest() {
    let file = fixture("manifest.json");
    let before = file.len() - AFTER_ROOT.len() - HASH_DIGITS;
    let mut random = Random(4);
    let path = Path::new("manifest.json");
    // Each once as it is, once with a root that agrees.
    for _ in 0..cases().div_ceil(2) * 2 {
        let mut bytes = damage(&file, &mut random);
        let _ = Manifest::parse(&bytes, path, path);
        bytes = damage(&file[..before], &mut random);
        let root = blake3::hash(&bytes).to_hex();
        bytes.extend_from_slice(root.as_bytes());
        bytes.extend_from_slice(AFTER_ROOT);
        let _ = Manifest::parse(&bytes, path, path);
    }
}
