//! Tensors of a device as a driver needs them: memory as a kernel takes it, new tensors, views of rows and columns,
//! scratch room, and products into it.

use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeDevice,
    cubecl::{
        client::Client,
        ir::{AddressType, ElemType, FloatKind},
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

/// A kernel's operand: all elements of a tensor without gaps.
pub fn whole(tensor: &CubeTensor) -> BufferArg {
    assert!(tensor.is_contiguous(), "a tensor without gaps");
    buffer(&tensor.handle, tensor.meta.num_elements(), tensor.dtype.size())
}

/// The same, `size` neighbouring elements at a time.
pub fn vectors(tensor: &CubeTensor, size: usize) -> BufferArg {
    let count = tensor.meta.num_elements();
    assert!(tensor.is_contiguous() && count.is_multiple_of(size), "a tensor without gaps, of whole vectors");
    buffer(&tensor.handle, count / size, tensor.dtype.size() * size)
}

/// How many neighbouring elements a kernel reads at once where rows have so many: what the device reads best, and whole
/// vectors in each row.
pub fn vector_size(like: &CubeTensor, width: usize) -> usize {
    let mut sizes = like.client.io_optimized_vector_sizes(like.dtype.size());
    sizes.find(|&size| width.is_multiple_of(size)).unwrap_or(1)
}

/// What a place in the largest of these tensors is counted with.
pub fn address(tensors: &[&CubeTensor]) -> AddressType {
    AddressType::from_len(tensors.iter().map(|tensor| tensor.meta.num_elements()).max().unwrap_or(0))
}

/// A row-major tensor on the device of `like`, of which nothing is written yet. There is memory behind an empty one too.
pub fn empty(like: &CubeTensor, shape: impl Into<Vec<usize>>, dtype: DType) -> CubeTensor {
    let shape = Shape::from(shape.into());
    let handle = like.client.empty(shape.num_elements().max(1) * dtype.size());
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, handle, dtype)
}

/// Whether the kernels can run on a device, with operands of this type.
pub fn takes(device: &CubeDevice, dtype: DType) -> bool {
    let client = device.client();
    element(dtype).is_some() && client.properties().hardware.max_units_per_cube as usize >= UNITS
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

/// So many cubes: in one row as far as every device goes, and in more rows beyond that, so that the last may have no work.
pub fn cubes(count: usize) -> CubeCount {
    const MOST: usize = 65_535;
    let across = count.clamp(1, MOST);
    CubeCount::Static(across as u32, count.div_ceil(across).max(1) as u32, 1)
}

/// Cubes for so many threads.
pub fn threads(count: usize) -> (CubeCount, CubeDim) {
    (cubes(count.div_ceil(UNITS)), cube_dim())
}

pub fn cube_dim() -> CubeDim {
    CubeDim::new_1d(UNITS as u32)
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
