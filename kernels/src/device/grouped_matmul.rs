//! The grouped matrix product on a device: the kernel of [`cube::grouped_matmul`](super::cube::grouped_matmul), launched
//! once for the output and once for each gradient, whatever the number of groups.

use std::sync::Arc;

use burn::tensor::{DType, Device};
use burn_cubecl::{cubecl::prelude::*, tensor::CubeTensor};

use super::{
    cube::{
        grouped_matmul::{GroupedPlan, NUMBERS, grouped_product},
        plans::Cut,
    },
    op::{DeviceOp, Spec, client},
    tensors::{address, buffer, element, empty, upload, vectors},
};

/// The cut for a device, or `None` where it has no kernel for such matrices.
pub fn cut(device: &Device, dtype: DType, inner: usize, outer: usize) -> Option<Cut> {
    Cut::fitting(client(device, dtype)?.properties(), element(dtype)?, inner, outer)
}

/// The product in given tiles.
#[derive(Debug, Clone)]
pub struct GroupedMatmul {
    pub offsets: Arc<Vec<usize>>,
    pub cut: Cut,
}

/// Group, first row and end of the rows of each tile.
fn row_tiles(offsets: &[usize], rows: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let bounds = offsets.windows(2).enumerate().map(|(group, bounds)| (group, bounds[0], bounds[1]));
    bounds.flat_map(move |(group, first, end)| {
        (first..end).step_by(rows).map(move |first| (group, first, end.min(first + rows)))
    })
}

fn dims<const D: usize>(tensor: &CubeTensor) -> [usize; D] {
    tensor.meta.shape().to_vec().try_into().expect("a tensor of this rank")
}

impl GroupedMatmul {
    /// # Shapes
    /// - `x` `[N, D]`, `weights` `[E, D, F]`; result `[N, F]`
    pub fn product(&self, x: &CubeTensor, weights: &CubeTensor) -> CubeTensor {
        let ([rows, width], [_, inner, outer]) = (dims(x), dims(weights));
        assert_eq!(width, inner, "rows as wide as the matrices are high");
        let output = empty(x, [rows, outer], x.dtype);
        let tiles = row_tiles(&self.offsets, self.cut.tile.rows);
        let tiles = tiles.flat_map(|(group, first, end)| [first, end, 0, inner, group * inner, 0]);
        self.launch([x, weights], &output, tiles, [inner, outer], [false, false]);
        output
    }

    /// # Shapes
    /// - `grad` `[N, F]`, `weights` `[E, D, F]`; result `[N, D]`
    pub fn rows_gradient(&self, grad: &CubeTensor, weights: &CubeTensor) -> CubeTensor {
        let ([rows, width], [_, inner, outer]) = (dims(grad), dims(weights));
        assert_eq!(width, outer, "gradients as wide as the matrices");
        let output = empty(grad, [rows, inner], grad.dtype);
        let tiles = row_tiles(&self.offsets, self.cut.tile.rows);
        let tiles = tiles.flat_map(|(group, first, end)| [first, end, 0, outer, group * inner, 0]);
        self.launch([grad, weights], &output, tiles, [outer, outer], [false, true]);
        output
    }

    /// # Shapes
    /// - `x` `[N, D]`, `grad` `[N, F]`; result `[E, D, F]`, zero for groups without rows
    pub fn weights_gradient(&self, x: &CubeTensor, grad: &CubeTensor) -> CubeTensor {
        let ([rows, inner], [own, outer]) = (dims(x), dims(grad));
        assert_eq!(rows, own, "a gradient per row");
        let output = empty(x, [self.offsets.len() - 1, inner, outer], x.dtype);
        let step = self.cut.tile.rows;
        let tiles = self.offsets.windows(2).enumerate().flat_map(|(group, bounds)| {
            let columns = (0..inner).step_by(step);
            columns.flat_map(move |first| [first, inner.min(first + step), bounds[0], bounds[1], 0, group * inner])
        });
        self.launch([x, grad], &output, tiles, [inner, outer], [true, false]);
        output
    }

    fn launch(
        &self,
        [left, right]: [&CubeTensor; 2],
        output: &CubeTensor,
        tiles: impl Iterator<Item = usize>,
        [left_stride, right_stride]: [usize; 2],
        [left_turned, right_turned]: [bool; 2],
    ) {
        assert_eq!(left.dtype, right.dtype, "both operands have one type");
        let tiles: Vec<u32> = tiles.map(|number| u32::try_from(number).expect("rows that 32 bits count")).collect();
        let uploaded = upload(&left.client, &tiles);
        let columns = *output.meta.shape().to_vec().last().expect("a matrix");
        let plan = GroupedPlan { tile: self.cut.tile, left_turned, right_turned };
        let (count, mut first) = (tiles.len() / NUMBERS, 0);
        // One launch, but for lists longer than a grid's side.
        while first < count {
            let here = (count - first).min(65_535);
            grouped_product::launch(
                &left.client,
                CubeCount::Static(here as u32, columns.div_ceil(self.cut.tile.columns) as u32, 1),
                CubeDim::new_1d(self.cut.tile.units() as u32),
                address(&[left, right, output]),
                self.cut.vector,
                vectors(left, self.cut.vector),
                vectors(right, self.cut.vector),
                vectors(output, self.cut.vector),
                buffer(&uploaded, tiles.len(), 4),
                first,
                columns,
                left_stride,
                right_stride,
                plan,
                element(left.dtype).expect("a type that there are kernels for"),
            );
            first += here;
        }
    }
}

impl DeviceOp for GroupedMatmul {
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec> {
        vec![Spec::new([inputs[0].shape[0], inputs[1].shape[2]], inputs[0].dtype)]
    }

    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>) {
        (self.product(&inputs[0], &inputs[1]), vec![])
    }

    fn backward(
        &self,
        inputs: &[CubeTensor],
        _: &[CubeTensor],
        output_grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let (x, weights) = (&inputs[0], &inputs[1]);
        vec![
            needed[0].then(|| self.rows_gradient(&output_grad, weights)),
            needed[1].then(|| self.weights_gradient(x, &output_grad)),
        ]
    }
}
