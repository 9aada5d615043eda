//! Normalisation by the root mean square on a device: one launch forward, one backward, and one more that adds up the
//! weight's gradient where that is asked for.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    cube::{UNITS, lanes, rms_norm as kernels},
    op::{DeviceOp, Spec},
    tensors::{address, cube_dim, cubes, element, empty, vector_size, vectors, whole},
};

/// Cubes among which rows are divided where a weight's gradient is summed: so many partial sums there are of long rows.
/// Enough for the devices of today, and a number, so that the sum's order is that of every device.
const SUMMING_CUBES: usize = 512;

/// With one operand `[N, D]`, or with a weight `[D]` of the same type.
#[derive(Debug)]
pub struct RmsNorm {
    pub eps: f32,
}

/// How rows are laid out over threads.
struct Layout {
    rows: usize,
    /// Elements read at once.
    vector: usize,
    /// Vectors of a row.
    width: usize,
    lanes: usize,
    inverse_width: f32,
}

impl Layout {
    fn of(x: &CubeTensor) -> Layout {
        let [rows, elements] = [0, 1].map(|axis| x.meta.shape()[axis]);
        let vector = vector_size(x, elements);
        let width = elements / vector;
        Layout { rows, vector, width, lanes: lanes(width), inverse_width: 1.0 / elements as f32 }
    }

    fn rows_per_cube(&self) -> usize {
        UNITS / self.lanes
    }
}

impl DeviceOp for RmsNorm {
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec> {
        vec![inputs[0].clone(), Spec::new([inputs[0].shape[0]], DType::F32)]
    }

    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>) {
        let (x, weight) = (&inputs[0], inputs.get(1));
        let layout = Layout::of(x);
        let output = empty(x, x.meta.shape().to_vec(), x.dtype);
        let inverse = empty(x, [layout.rows], DType::F32);
        if x.meta.num_elements() > 0 {
            kernels::rms_norm::launch(
                &x.client,
                cubes(layout.rows.div_ceil(layout.rows_per_cube())),
                cube_dim(),
                address(&[x]),
                layout.vector,
                vectors(x, layout.vector),
                vectors(weight.unwrap_or(x), layout.vector),
                vectors(&output, layout.vector),
                whole(&inverse),
                layout.rows,
                layout.width,
                layout.inverse_width,
                self.eps,
                weight.is_some(),
                layout.lanes,
                element(x.dtype).expect("asked for before"),
            );
        }
        (output, vec![inverse])
    }

    fn backward(
        &self,
        inputs: &[CubeTensor],
        saved: &[CubeTensor],
        grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let (x, weight, inverse) = (&inputs[0], inputs.get(1), &saved[0]);
        let layout = Layout::of(x);
        let summed = needed.get(1) == Some(&true);
        let element = element(x.dtype).expect("asked for before");
        let x_grad = empty(x, x.meta.shape().to_vec(), x.dtype);
        // Without anything to sum, every row may as well be on its own.
        let rows_each = if summed { layout.rows.div_ceil(SUMMING_CUBES * layout.rows_per_cube()).max(1) } else { 1 };
        let count = layout.rows.div_ceil(rows_each);
        let columns = layout.width * layout.vector;
        let partials = empty(x, if summed { vec![count, columns] } else { vec![1, 1] }, DType::F32);
        if x.meta.num_elements() > 0 {
            kernels::rms_norm_backward::launch(
                &x.client,
                cubes(count.div_ceil(layout.rows_per_cube())),
                cube_dim(),
                address(&[x, &partials]),
                layout.vector,
                vectors(x, layout.vector),
                vectors(weight.unwrap_or(x), layout.vector),
                vectors(&grad, layout.vector),
                whole(inverse),
                vectors(&x_grad, layout.vector),
                whole(&partials),
                layout.rows,
                layout.width,
                rows_each,
                layout.inverse_width,
                weight.is_some(),
                summed,
                layout.lanes,
                layout.width.div_ceil(layout.lanes),
                element,
            );
        }
        let weight_grad = weight.filter(|_| summed).map(|weight| {
            let weight_grad = empty(weight, [columns], weight.dtype);
            if columns > 0 {
                kernels::sum_partials::launch(
                    &x.client,
                    cubes(columns.div_ceil(kernels::COLUMNS)),
                    cube_dim(),
                    address(&[&partials]),
                    whole(&partials),
                    whole(&weight_grad),
                    count,
                    columns,
                    element,
                );
            }
            weight_grad
        });
        let mut grads = vec![needed[0].then_some(x_grad)];
        grads.extend(weight.map(|_| weight_grad));
        grads
    }
}
