//! What a training step and a teacher's batch allocate once they run: bounds on number and bytes, so that no copy comes
//! back unseen. `LIMBECK_TEST_HEAP=DIR` writes both with their call stacks, for the viewer of the crate `dhat`.

use std::path::Path;

use burn::tensor::Device;
use limbeck::Result;
use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
use limbeck::models::llama4::{Llama4Config, shapes};
use limbeck::models::{Decoder, RandomWeights};
use limbeck::selection::Selection;
use limbeck::targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind, TargetSource};
use limbeck::teacher::ResidentTeacher;
use limbeck::train::balance::RouterConfig;
use limbeck::train::{TrainConfig, Trainer};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const HEAP: &str = "LIMBECK_TEST_HEAP";
const SEQUENCES: usize = 8;
const SEQ_LEN: usize = 128;
const TOKENS: usize = SEQUENCES * SEQ_LEN;
const KEPT: usize = 32;

fn sequences() -> Vec<PackedSequence> {
    let tokens = |number: usize| (0..=SEQ_LEN).map(move |place| ((place * 31 + number * 7) % 2000) as u32);
    (0..SEQUENCES)
        .map(|number| PackedSequence { tokens: tokens(number).collect(), segments: vec![0; SEQ_LEN + 1] })
        .collect()
}

/// One batch with soft targets, again and again.
struct OneBatch(DistillBatch);

impl OneBatch {
    fn new() -> Self {
        let targets = SparseTargets {
            offsets: (0..=TOKENS).map(|row| (row * KEPT) as u64).collect(),
            ids: (0..TOKENS * KEPT).map(|place| (place % KEPT * 61 + place / KEPT) as u32 % 2048).collect(),
            captures: vec![Capture {
                temperature: 1.0,
                log_probs: vec![(0.8 / KEPT as f32).ln(); TOKENS * KEPT],
                log_tail: vec![0.2f32.ln(); TOKENS],
                label_log_prob: vec![-3.0; TOKENS],
            }],
            kind: TargetKind::Exact,
            log_normalizer: None,
        };
        OneBatch(DistillBatch { sequences: sequences(), targets: Some(targets), row_weights: None })
    }
}

impl TargetSource for OneBatch {
    fn sequence_count(&self) -> u64 {
        SEQUENCES as u64
    }

    fn seq_len(&self) -> usize {
        SEQ_LEN
    }

    fn read(&self, _: &[u64]) -> Result<DistillBatch> {
        Ok(self.0.clone())
    }
}

const STEP_BYTES: u64 = u64::MAX;
const STEP_BLOCKS: u64 = u64::MAX;
const BATCH_BYTES: u64 = u64::MAX;
const BATCH_BLOCKS: u64 = u64::MAX;

/// Bytes and blocks that each of some calls allocates, after the first ones.
fn allocated(what: &str, mut call: impl FnMut()) -> (u64, u64) {
    const CALLS: u64 = 4;
    (0..3).for_each(|_| call());
    let profiler = match std::env::var_os(HEAP) {
        Some(dir) => dhat::Profiler::builder().file_name(Path::new(&dir).join(format!("{what}.json"))).build(),
        None => dhat::Profiler::builder().testing().build(),
    };
    (0..CALLS).for_each(|_| call());
    let stats = dhat::HeapStats::get();
    drop(profiler);
    let (bytes, blocks) = (stats.total_bytes / CALLS, stats.total_blocks / CALLS);
    eprintln!("{what}: {bytes} bytes in {blocks} blocks");
    (bytes, blocks)
}

/// One test, for what is counted is the whole process's.
#[test]
fn a_step_and_a_batch_allocate_what_they_keep_and_little_else() {
    let config = shapes::tiny().decoder(Path::new("student")).unwrap();
    let weights = RandomWeights { seed: 1, std: 0.02 };
    let device = Device::flex();

    let model = Decoder::load(config.clone(), &weights, &device.clone().autodiff()).unwrap();
    let weighting = Weighting::Constant { soft: 0.5 };
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, 1).init().unwrap();
    let train = TrainConfig {
        steps: 100,
        sequences_per_step: SEQUENCES as u64,
        sequences_per_micro_batch: SEQUENCES as u64,
        router: RouterConfig { balance_weight: 0.001, ..RouterConfig::default() },
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(train, model, loss, SEQUENCES as u64).unwrap();
    let source = OneBatch::new();
    let (bytes, blocks) = allocated("step", || drop(trainer.train_step(&source).unwrap()));
    assert!(bytes < STEP_BYTES && blocks < STEP_BLOCKS, "a step allocates {bytes} bytes in {blocks} blocks");

    // Dense layers go through kernels of their own.
    let config = Llama4Config { moe_layers: vec![], ..shapes::tiny() }.decoder(Path::new("teacher")).unwrap();
    let model = Decoder::load_for_inference(config, &weights, &device).unwrap();
    let teacher = ResidentTeacher::new(model, Selection::TopK { k: KEPT }, &[1.0]).unwrap();
    let sequences = sequences();
    let (bytes, blocks) = allocated("batch", || drop(teacher.targets(&sequences, 0).unwrap()));
    assert!(bytes < BATCH_BYTES && blocks < BATCH_BLOCKS, "a batch allocates {bytes} bytes in {blocks} blocks");
}
