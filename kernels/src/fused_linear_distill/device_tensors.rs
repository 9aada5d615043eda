//! Tensors of a device as the driver needs them: views of rows and columns, scratch room, and products into it.

use burn::tensor::{DType, Shape};
use burn_cubecl::{
    cubecl::{
        client::Client,
        ir::{ElemType, FloatKind},
        prelude::*,
        server::Handle,
    },
    kernel::{
        matmul::{MatmulStrategy, matmul},
        slice,
    },
    tensor::CubeTensor,
};

use super::cube::UNITS;

/// Memory whose shape changes from use to use.
#[derive(Clone)]
pub struct Room {
    client: Client,
    handle: Handle,
    like: CubeTensor,
    dtype: DType,
}

impl Room {
    /// Room for `count` numbers on the device of `like`.
    pub fn new(like: &CubeTensor, count: usize, dtype: DType) -> Room {
        let handle = like.client.empty(count.max(1) * dtype.size());
        Room { client: like.client.clone(), handle, like: like.clone(), dtype }
    }

    /// A row-major matrix at the beginning of the room.
    pub fn matrix(&self, rows: usize, columns: usize) -> CubeTensor {
        assert!(rows * columns * self.dtype.size() <= self.handle.size() as usize, "a matrix that fits the room");
        let shape = Shape::from(vec![rows, columns]);
        CubeTensor::new_contiguous(
            self.client.clone(),
            self.like.device.clone(),
            shape,
            self.handle.clone(),
            self.dtype,
        )
    }

    pub fn buffer(&self, count: usize) -> BufferArg {
        buffer(&self.handle, count, self.dtype.size())
    }
}

/// A kernel's operand: the first `count` elements at a handle.
pub fn buffer(handle: &Handle, count: usize, element: usize) -> BufferArg {
    assert!((count * element) as u64 <= handle.size_in_used(), "an operand that fits its memory");
    // SAFETY: the assertion above keeps the length within the memory behind the handle.
    unsafe { BufferArg::from_raw_parts(handle.clone(), count) }
}

/// Numbers on the device. Never empty, which not every device can bind.
pub fn upload<T: bytemuck::NoUninit + Default>(client: &Client, values: &[T]) -> Handle {
    if values.is_empty() {
        return client.create_from_slice(bytemuck::bytes_of(&T::default()));
    }
    client.create_from_slice(bytemuck::cast_slice(values))
}

/// The first `count` numbers at a handle, brought to the host.
pub fn download<T: bytemuck::Pod>(client: &Client, handle: Handle, count: usize) -> Vec<T> {
    let bytes = client.read_one(handle).expect("what the kernels wrote can be read");
    let mut values = vec![T::zeroed(); count];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(&bytes[..count * size_of::<T>()]);
    values
}

/// Rows `first .. first + count` of a matrix.
pub fn rows(matrix: &CubeTensor, first: usize, count: usize) -> CubeTensor {
    let width = matrix.meta.shape()[1];
    slice(matrix.clone(), &[first..first + count, 0..width])
}

/// Columns `first .. first + count` of a matrix.
pub fn columns(matrix: &CubeTensor, first: usize, count: usize) -> CubeTensor {
    let height = matrix.meta.shape()[0];
    slice(matrix.clone(), &[0..height, first..first + count])
}

pub fn transposed(mut matrix: CubeTensor) -> CubeTensor {
    matrix.meta.swap(0, 1);
    matrix
}

/// `a b`, by the backend's own product, added up in f32 and written to `room`.
pub fn multiply(a: CubeTensor, b: CubeTensor, room: &Room) -> CubeTensor {
    let output = room.matrix(a.meta.shape()[0], b.meta.shape()[1]);
    matmul(a, b, Some(output), MatmulStrategy::default(), DType::F32)
        .unwrap_or_else(|error| panic!("the device has no product of these matrices: {error:?}"))
}

/// One cube per row.
pub fn per_row(rows: usize) -> CubeCount {
    CubeCount::Static(rows as u32, 1, 1)
}

/// One unit per number.
pub fn per_number(rows: usize, columns: usize) -> (CubeCount, CubeDim) {
    (CubeCount::Static(columns.div_ceil(UNITS) as u32, rows as u32, 1), CubeDim::new_1d(UNITS as u32))
}

/// The type of an operand's elements, or `None` for one that the kernels do not know.
pub fn element(dtype: DType) -> Option<ElemType> {
    match dtype {
        DType::F32 => Some(ElemType::Float(FloatKind::F32)),
        DType::F16 => Some(ElemType::Float(FloatKind::F16)),
        DType::BF16 => Some(ElemType::Float(FloatKind::BF16)),
        _ => None,
    }
}

/// Distance between two rows of a matrix whose rows are themselves without gaps.
pub fn stride(matrix: &CubeTensor) -> usize {
    let (shape, strides) = (matrix.meta.shape(), matrix.meta.strides());
    assert!(strides[1] == 1 || shape[1] <= 1, "rows without gaps");
    if shape[0] <= 1 { shape[1] } else { strides[0] }
}
