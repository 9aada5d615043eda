//! The second pass on a device: logits once more, and gradients of them.

use burn::{
    backend::ops::FloatTensorOps,
    tensor::{DType, FloatDType, Shape},
};
use burn_cubecl::{
    CubeBackend,
    cubecl::{
        client::Client,
        ir::{AddressType, ElemType},
        prelude::*,
        server::Handle,
    },
    tensor::CubeTensor,
};

use super::{
    cube::{self, FEW_UNITS},
    device::{DeviceGradients, DeviceShard, dims},
    host::Wanted,
    sharded::Finished,
};
use crate::device::tensors::{
    Room, buffer, columns, element, multiply, per_number, per_row, rows, stride, transposed, upload,
};

impl DeviceShard<'_> {
    /// The second pass: the shard's part of the hidden states' gradient `[T, D]`, and the gradient of its rows.
    pub fn gradients(&self, finished: &Finished, wanted: Wanted) -> DeviceGradients {
        let live = self.live.len();
        // Zeros only where nothing else is written.
        let like = |matrix: &CubeTensor, is_written: bool| {
            let (shape, dtype): (_, FloatDType) = (Shape::from(dims(matrix).to_vec()), matrix.dtype.into());
            if is_written {
                CubeBackend::float_empty(shape, &matrix.device, dtype)
            } else {
                CubeBackend::float_zeros(shape, &matrix.device, dtype)
            }
        };
        let hidden_grad = wanted.hidden.then(|| like(&self.hidden, live == self.targets.row_count()));
        let lm_head_grad = wanted.lm_head.then(|| like(&self.lm_head, live > 0));
        if live == 0 || wanted == Wanted::NOTHING {
            return (hidden_grad, lm_head_grad);
        }
        let client = self.client();
        let scale = scale(finished);
        let gradient = UploadedGradient::new(client, &self.live, finished, scale);
        let room = Room::new(&self.hidden, self.tiles.room(), DType::F32);
        let tile_room = Room::new(&self.hidden, self.tiles.token_block * self.tiles.vocab_tile, self.hidden.dtype);
        let sums =
            Room::new(&self.hidden, if wanted.hidden { self.tiles.token_block * self.width() } else { 0 }, DType::F32);
        self.for_each_block(|first_row, block, hidden| {
            let mut first = 0;
            while first < self.vocab() {
                let tile = self.tiles.vocab_tile.min(self.vocab() - first);
                self.write_tile(&hidden, first_row, block, first, tile, &gradient, &room, &tile_room);
                let tile_grad = tile_room.matrix(block, tile);
                if wanted.hidden {
                    let head = rows(&self.lm_head, first, tile);
                    self.add(&tile_grad, &head, &room, 1.0 / scale, first > 0, |columns| {
                        (sums.buffer(block * columns), self.width(), f32_element())
                    });
                }
                if let Some(target) = &lm_head_grad {
                    let stride = stride(target);
                    let element_size = target.dtype.size();
                    let handle = target.handle.clone().offset_start((first * stride * element_size) as u64);
                    self.add(&transposed(tile_grad), &hidden, &room, 1.0 / scale, first_row > 0, |_| {
                        let count = (tile - 1) * stride + self.width();
                        (buffer(&handle, count, element_size), stride, self.element())
                    });
                }
                first += tile;
            }
            if let Some(target) = &hidden_grad {
                let (count, dim) = per_number(block, self.width());
                let stride = stride(target);
                let span = (self.targets.row_count() - 1) * stride + self.width();
                cube::scatter_rows::launch(
                    client,
                    count,
                    dim,
                    AddressType::from_len(span),
                    sums.buffer(block * self.width()),
                    buffer(&self.uploaded.row_ids, live, 4),
                    buffer(&target.handle, span, target.dtype.size()),
                    first_row,
                    block,
                    self.width(),
                    stride,
                    self.element(),
                );
            }
        });
        (hidden_grad, lm_head_grad)
    }

    /// The loss's gradient in `tile` logits of `block` rows.
    #[allow(clippy::too_many_arguments)] // where the tile lies, what it is made of, and where it goes
    fn write_tile(
        &self,
        hidden: &CubeTensor,
        first_row: usize,
        block: usize,
        first: usize,
        tile: usize,
        gradient: &UploadedGradient,
        room: &Room,
        tile_room: &Room,
    ) {
        let (client, live) = (self.client(), self.live.len());
        let mut column = 0;
        while column < tile {
            let piece = self.tiles.piece.min(tile - column);
            multiply(hidden.clone(), transposed(rows(&self.lm_head, first + column, piece)), room);
            let (count, dim) = per_number(block, piece);
            cube::dense_gradient::launch(
                client,
                count,
                dim,
                room.buffer(block * piece),
                tile_room.buffer(block * tile),
                buffer(&gradient.dense, live * 4, 4),
                first_row,
                block,
                piece,
                tile,
                column,
                1.0 / self.settings.temperature,
                self.is_scaled(),
                self.element(),
            );
            column += piece;
        }
        cube::place_kept::launch(
            client,
            per_row(block),
            CubeDim::new_1d(FEW_UNITS as u32),
            tile_room.buffer(block * tile),
            buffer(&self.uploaded.offsets, live + 1, 4),
            self.ids(),
            buffer(&self.uploaded.labels, live, 4),
            buffer(&gradient.kept, self.kept(), 4),
            buffer(&gradient.label, live, 4),
            first_row,
            self.first_id + first,
            tile,
            FEW_UNITS,
            self.element(),
        );
    }

    /// Adds `a b`, a few columns at a time, to a matrix: `target` gives its memory, the distance of its rows and the
    /// type of its elements.
    fn add(
        &self,
        a: &CubeTensor,
        b: &CubeTensor,
        room: &Room,
        scale: f32,
        keep: bool,
        target: impl Fn(usize) -> (BufferArg, usize, ElemType),
    ) {
        let ([height, _], [_, width]) = (dims(a), dims(b));
        let step = self.tiles.columns(height);
        let mut first = 0;
        while first < width {
            let piece = step.min(width - first);
            multiply(a.clone(), columns(b, first, piece), room);
            let (memory, stride, element) = target(width);
            let (count, dim) = per_number(height, piece);
            cube::add_product::launch(
                self.client(),
                count,
                dim,
                memory,
                room.buffer(height * piece),
                height,
                piece,
                stride,
                first,
                scale,
                keep,
                element,
            );
            first += piece;
        }
    }
}

/// What the rows' gradients are made of, times a scale.
struct UploadedGradient {
    dense: Handle,
    kept: Handle,
    label: Handle,
}

impl UploadedGradient {
    fn new(client: &Client, live: &[u32], finished: &Finished, scale: f32) -> UploadedGradient {
        // Where nothing is left beside the kept ids the shift is infinite, and what it is a shift of is 0.
        let finite = |shift: f32| if shift == f32::NEG_INFINITY { 0.0 } else { shift };
        let dense: Vec<f32> = live
            .iter()
            .map(|&row| &finished.dense[row as usize])
            .flat_map(|row| [finite(row.shift), row.soft * scale, finite(row.shift_unscaled), row.hard * scale])
            .collect();
        let kept: Vec<f32> = finished.kept_gradient.iter().map(|gradient| gradient * scale).collect();
        let label: Vec<f32> = live.iter().map(|&row| finished.label_gradient[row as usize] * scale).collect();
        UploadedGradient { dense: upload(client, &dense), kept: upload(client, &kept), label: upload(client, &label) }
    }
}

/// A power of two that brings the largest gradient of a logit near the middle of what f16 can hold above 1, so that the
/// probabilities of a large vocabulary do not vanish in it.
fn scale(finished: &Finished) -> f32 {
    let dense = finished.dense.iter().map(|row| row.soft.abs() + row.hard.abs());
    let sparse = finished.kept_gradient.iter().chain(&finished.label_gradient).map(|gradient| gradient.abs());
    let largest = dense.chain(sparse).fold(0.0, f32::max);
    if largest == 0.0 || !largest.is_finite() {
        return 1.0;
    }
    (12.0 - largest.log2().ceil()).clamp(-60.0, 60.0).exp2()
}

fn f32_element() -> ElemType {
    element(DType::F32).expect("f32 is known")
}
