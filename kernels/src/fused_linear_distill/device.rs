//! The operation on a device: a few rows by a few ids of logits at a time, by the backend's own matrix product and the
//! kernels in [`cube`](super::cube).
//!
//! Two passes over the logits, which are computed anew in the second. After the first, a few numbers per row come to the
//! host, where [`finish`](sharded::finish) makes loss and gradient of them in f64; so every divergence is the same to the
//! device. f32 operands are multiplied as the backend multiplies f32: on NVIDIA's tensor cores that is TF32. Gradients
//! are added up in f32, but that of a head in half precision is rounded once per block of rows.

use burn::tensor::DType;
use burn_cubecl::{
    cubecl::{
        client::Client,
        ir::{AddressType, ElemType},
        prelude::*,
        server::Handle,
    },
    kernel::into_contiguous,
    tensor::CubeTensor,
};

use super::{
    LossSettings, RowTargets, Weigh,
    cube::{self, FEW_UNITS, NOTHING, STATISTICS, UNITS},
    host::{Output, Wanted},
    rows::{Mass, RowStatistics},
    sharded::{self, ShardStatistics},
    tiles::{BUDGET, Problem, Tiles},
};
use crate::device::tensors::{
    Room, buffer, download, element, multiply, per_number, per_row, rows, stride, takes, transposed, upload,
};

/// Gradients on the device: of the hidden states, and of the head.
pub type DeviceGradients = (Option<CubeTensor>, Option<CubeTensor>);

/// Runs the operation. The gradients are in the operands' type, and not in [`Output`].
///
/// # Shapes
/// - `hidden` `[T, D]`, `lm_head` `[V, D]`, targets of T rows; both f32, f16 or bf16
///
/// # Panics
/// When shapes or types do not fit, or an id lies beyond the vocabulary: [`RowTargets::check`] says the last without a
/// panic.
pub fn run(
    hidden: CubeTensor,
    lm_head: CubeTensor,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &Weigh<'_>,
    wanted: Wanted,
) -> (Output, DeviceGradients) {
    let shard = DeviceShard::new(hidden, lm_head, 0, targets, settings, None);
    let finished = sharded::finish(targets, settings, &shard.statistics(), weigh);
    let gradients = shard.gradients(&finished, wanted);
    let output = Output { loss: finished.loss, rows: finished.rows, hidden_grad: None, lm_head_grad: None };
    (output, gradients)
}

/// Hidden states, some rows of a head, and targets, on a device. A head that is whole is one shard.
#[derive(Debug)]
pub struct DeviceShard<'a> {
    pub(super) hidden: CubeTensor,
    pub(super) lm_head: CubeTensor,
    pub(super) first_id: usize,
    pub(super) targets: &'a RowTargets,
    pub(super) settings: LossSettings,
    pub(super) tiles: Tiles,
    /// Rows that have a target.
    pub(super) live: Vec<u32>,
    pub(super) uploaded: Uploaded,
}

/// Targets of the live rows.
#[derive(Debug)]
pub(super) struct Uploaded {
    pub(super) row_ids: Handle,
    pub(super) offsets: Handle,
    pub(super) ids: Handle,
    pub(super) labels: Handle,
}

impl<'a> DeviceShard<'a> {
    /// Brings the targets to the device. `first_id` is the id of the shard's first row.
    ///
    /// # Shapes
    /// - `hidden` `[T, D]`, `lm_head` `[rows of the shard, D]`, targets of T rows; both f32, f16 or bf16
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn new(
        hidden: CubeTensor,
        lm_head: CubeTensor,
        first_id: usize,
        targets: &'a RowTargets,
        settings: &LossSettings,
        tiles: Option<Tiles>,
    ) -> DeviceShard<'a> {
        assert!(takes(&hidden.device, hidden.dtype), "f32, f16 or bf16, on a device with groups of {UNITS} threads");
        assert_eq!(hidden.dtype, lm_head.dtype, "hidden states and head have one type");
        let ([row_count, width], [vocab, head_width]) = (dims(&hidden), dims(&lm_head));
        assert_eq!(row_count, targets.row_count(), "one row of targets per hidden state");
        assert_eq!(width, head_width, "hidden states and head are of one width");
        assert!(targets.ids.len().max(first_id + vocab) <= u32::MAX as usize, "ids and their places have 32 bits");
        let has_gaps = |matrix: &CubeTensor| matrix.meta.strides()[1] != 1;
        let plain = |matrix: CubeTensor| if has_gaps(&matrix) { into_contiguous(matrix) } else { matrix };
        let (hidden, lm_head) = (plain(hidden), plain(lm_head));

        let live: Vec<u32> = (0..row_count as u32).filter(|&row| targets.has_target(row as usize)).collect();
        let labels: Vec<u32> = live.iter().map(|&row| targets.labels[row as usize]).collect();
        // Rows without target keep nothing, so that the ids of all rows are those of the live ones.
        let mut offsets: Vec<u32> = live.iter().map(|&row| targets.offsets[row as usize] as u32).collect();
        offsets.push(targets.ids.len() as u32);
        let client = &hidden.client;
        let uploaded = Uploaded {
            row_ids: upload(client, &live),
            offsets: upload(client, &offsets),
            ids: upload(client, &targets.ids),
            labels: upload(client, &labels),
        };
        let problem = Problem {
            rows: live.len(),
            width,
            vocab,
            kept: targets.ids.len(),
            element: hidden.dtype.size(),
            gathers: !is_run(&live),
        };
        let tiles = tiles.unwrap_or_else(|| Tiles::fitting(&problem, BUDGET));
        tiles.check();
        DeviceShard { hidden, lm_head, first_id, targets, settings: *settings, tiles, live, uploaded }
    }

    /// The first pass: what the shard knows of every row.
    pub fn statistics(&self) -> ShardStatistics {
        let (row_count, live) = (self.targets.row_count(), self.live.len());
        let mut found = ShardStatistics {
            rows: vec![RowStatistics::NONE; row_count],
            kept_logits: vec![f32::NEG_INFINITY; self.targets.ids.len()],
            label_logits: vec![f32::NEG_INFINITY; row_count],
        };
        if live == 0 {
            return found;
        }
        let client = self.client();
        let statistics = self.upload_statistics();
        let argmax = upload(client, &vec![u32::MAX; live]);
        let kept_logits = upload(client, &found.kept_logits);
        let label_logits = upload(client, &vec![f32::NEG_INFINITY; live]);
        let room = Room::new(&self.hidden, self.tiles.room(), DType::F32);
        self.for_each_block(|first_row, block, hidden| {
            let mut first = 0;
            while first < self.vocab() {
                let piece = self.tiles.piece.min(self.vocab() - first);
                let count = block * piece;
                multiply(hidden.clone(), transposed(rows(&self.lm_head, first, piece)), &room);
                cube::gather_kept::launch(
                    client,
                    per_row(block),
                    CubeDim::new_1d(FEW_UNITS as u32),
                    room.buffer(count),
                    buffer(&self.uploaded.offsets, live + 1, 4),
                    self.ids(),
                    buffer(&self.uploaded.labels, live, 4),
                    buffer(&kept_logits, self.kept(), 4),
                    buffer(&label_logits, live, 4),
                    first_row,
                    self.first_id + first,
                    piece,
                    FEW_UNITS,
                );
                self.launch_statistics(&room, &statistics, &argmax, first_row, block, first, piece);
                first += piece;
            }
        });
        let numbers: Vec<f32> = download(client, statistics, live * STATISTICS);
        let argmax: Vec<u32> = download(client, argmax, live);
        let label_logits: Vec<f32> = download(client, label_logits, live);
        for (place, numbers) in numbers.chunks(STATISTICS).enumerate() {
            let row = self.live[place] as usize;
            found.rows[row] = self.row_statistics(numbers, argmax[place]);
            found.label_logits[row] = label_logits[place];
        }
        if !self.targets.ids.is_empty() {
            found.kept_logits = download(client, kept_logits, self.targets.ids.len());
        }
        found.with_kept(self.targets)
    }

    /// Running statistics of rows of which nothing has been seen.
    pub(super) fn upload_statistics(&self) -> Handle {
        let start = [NOTHING, 0.0, 0.0, 0.0, 0.0];
        upload(self.client(), &std::iter::repeat_n(start, self.live.len()).flatten().collect::<Vec<f32>>())
    }

    /// Joins a tile into the running statistics.
    #[allow(clippy::too_many_arguments)] // what is joined into what, and where the tile lies
    pub(super) fn launch_statistics(
        &self,
        room: &Room,
        statistics: &Handle,
        argmax: &Handle,
        first_row: usize,
        block: usize,
        first: usize,
        piece: usize,
    ) {
        cube::row_statistics::launch(
            self.client(),
            per_row(block),
            CubeDim::new_1d(UNITS as u32),
            room.buffer(block * piece),
            buffer(statistics, self.live.len() * STATISTICS, 4),
            buffer(argmax, self.live.len(), 4),
            first_row,
            self.first_id + first,
            piece,
            1.0 / self.settings.temperature,
            self.is_scaled(),
            UNITS,
        );
    }

    /// Calls `work` with each block of rows that have targets: its first row among them, how many, their hidden states.
    pub(super) fn for_each_block(&self, mut work: impl FnMut(usize, usize, CubeTensor)) {
        let (live, width) = (self.live.len(), self.width());
        let gathered =
            (!is_run(&self.live)).then(|| Room::new(&self.hidden, self.tiles.token_block * width, self.hidden.dtype));
        let mut first = 0;
        while first < live {
            let block = self.tiles.token_block.min(live - first);
            let hidden = match &gathered {
                None => rows(&self.hidden, self.live[first] as usize, block),
                Some(room) => {
                    let (count, dim) = per_number(block, width);
                    let stride = stride(&self.hidden);
                    let span = (self.targets.row_count() - 1) * stride + width;
                    cube::gather_rows::launch(
                        self.client(),
                        count,
                        dim,
                        AddressType::from_len(span),
                        buffer(&self.hidden.handle, span, self.hidden.dtype.size()),
                        buffer(&self.uploaded.row_ids, live, 4),
                        room.buffer(block * width),
                        first,
                        block,
                        width,
                        stride,
                        self.element(),
                    );
                    room.matrix(block, width)
                }
            };
            work(first, block, hidden);
            first += block;
        }
    }

    pub(super) fn row_statistics(&self, numbers: &[f32], argmax: u32) -> RowStatistics {
        let largest = if numbers[0] == NOTHING { f32::NEG_INFINITY } else { numbers[0] };
        let mass = |sum: f32, squares: f32| Mass { largest, sum: sum as f64, squares: squares as f64 };
        let rest_unscaled = mass(numbers[1], numbers[2]);
        let rest = if self.is_scaled() { mass(numbers[3], numbers[4]) } else { rest_unscaled };
        RowStatistics { rest, rest_unscaled, largest, argmax }
    }

    pub(super) fn client(&self) -> &Client {
        &self.hidden.client
    }

    pub(super) fn width(&self) -> usize {
        dims(&self.hidden)[1]
    }

    pub(super) fn vocab(&self) -> usize {
        dims(&self.lm_head)[0]
    }

    /// Kept ids, or the one place that stands for none.
    pub(super) fn kept(&self) -> usize {
        self.targets.ids.len().max(1)
    }

    pub(super) fn ids(&self) -> BufferArg {
        buffer(&self.uploaded.ids, self.kept(), 4)
    }

    pub(super) fn is_scaled(&self) -> bool {
        self.settings.temperature != 1.0
    }

    pub(super) fn element(&self) -> ElemType {
        element(self.hidden.dtype).expect("checked when the shard was made")
    }
}

fn is_run(live: &[u32]) -> bool {
    live.first().zip(live.last()).is_none_or(|(first, last)| (last - first) as usize + 1 == live.len())
}

pub(super) fn dims(matrix: &CubeTensor) -> [usize; 2] {
    let shape = matrix.meta.shape();
    assert_eq!(shape.num_dims(), 2, "a matrix");
    [shape[0], shape[1]]
}
