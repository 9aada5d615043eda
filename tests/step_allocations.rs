//! What a training step and a teacher's batch allocate once they run: bounds on number and bytes, so that no copy comes
//! back unseen. With `LIMBECK_TEST_SIZES=1` the sizes of large blocks are said as well.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

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

/// The system's allocator, counted.
struct Counted;

/// The alignment of what `gemm` packs its inputs into, and of nothing else in a step. It is not counted: how much follows
/// from the machine's caches and vectors.
const PACKING_ALIGN: usize = 128;

static BYTES: AtomicU64 = AtomicU64::new(0);
static BLOCKS: AtomicU64 = AtomicU64::new(0);
/// Sizes of the large blocks, in their order.
static LARGE: [AtomicUsize; 1 << 14] = [const { AtomicUsize::new(0) }; 1 << 14];
static LARGE_COUNT: AtomicUsize = AtomicUsize::new(0);

const SIZES: &str = "LIMBECK_TEST_SIZES";
const LARGE_BYTES: usize = 1 << 15;

fn count(layout: Layout, size: usize) {
    if layout.align() == PACKING_ALIGN {
        return;
    }
    BYTES.fetch_add(size as u64, Relaxed);
    BLOCKS.fetch_add(1, Relaxed);
    if size >= LARGE_BYTES {
        LARGE[LARGE_COUNT.fetch_add(1, Relaxed) % LARGE.len()].store(size, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout, layout.size());
        // SAFETY: the caller's promise is the one that is asked for here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout, layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout, size);
        // SAFETY: as above.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

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
            router: None,
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

/// What was counted with two threads, 150.1 MB in 14,475 blocks and 25.0 MB in 18,035, and a little more: the gradients of
/// the trained matrices copied once are 1.9 MB, new memory for each piece of the teacher's logits 6.3 MB.
const STEP_BYTES: u64 = 151_500_000;
const STEP_BLOCKS: u64 = 15_700;
const BATCH_BYTES: u64 = 26_500_000;
const BATCH_BLOCKS: u64 = 19_500;

/// Bytes and blocks that each of some calls allocates, after the first ones.
fn allocated(what: &str, mut call: impl FnMut()) -> (u64, u64) {
    const CALLS: u64 = 4;
    (0..3).for_each(|_| call());
    let before = (BYTES.load(Relaxed), BLOCKS.load(Relaxed), LARGE_COUNT.load(Relaxed));
    (0..CALLS).for_each(|_| call());
    let (bytes, blocks) = (BYTES.load(Relaxed) - before.0, BLOCKS.load(Relaxed) - before.1);
    let large: Vec<usize> =
        (before.2..LARGE_COUNT.load(Relaxed)).map(|place| LARGE[place % LARGE.len()].load(Relaxed)).collect();
    let (bytes, blocks) = (bytes / CALLS, blocks / CALLS);
    eprintln!("{what}: {bytes} bytes in {blocks} blocks");
    if std::env::var_os(SIZES).is_some() {
        let mut sizes = BTreeMap::<usize, u64>::new();
        large.iter().for_each(|&size| *sizes.entry(size).or_default() += 1);
        for (size, count) in sizes.iter().rev() {
            eprintln!("  {size:9} bytes, {:.2} times", *count as f64 / CALLS as f64);
        }
    }
    (bytes, blocks)
}

/// One test, for what is counted is the whole process's.
#[test]
fn a_step_and_a_batch_allocate_what_they_keep_and_little_else() {
    // What a thread keeps for itself would count with more of them.
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().unwrap();
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
