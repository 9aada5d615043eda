//! Where weights come from and how the trainer reaches them, by the names they have in checkpoints.

use std::mem;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use limbeck_kernels::packed_matmul::{Element, Numbers, Order, PackedMatrix};
use rand::SeedableRng;
use rand_distr::{Distribution, Normal};

use crate::{
    checkpoint::{CheckpointReader, Dtype},
    error::Result,
};

/// Gives weights by name, to any number of threads. Shapes are checked by the source.
pub trait WeightSource: Sync {
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>>;

    /// Some rows of the first axis of a tensor, whose shape is that of the whole.
    fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>>;

    /// The same numbers as of [`load_rows`](Self::load_rows), if possible as they are stored.
    fn stored_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Stored> {
        self.load_rows(name, shape, rows).map(Stored::Values)
    }

    /// Some numbers of each of some rows of the first axis, one after the other.
    fn stored_runs(&self, name: &str, shape: &[usize], rows: Range<usize>, runs: &Runs) -> Result<Stored> {
        Ok(self.stored_rows(name, shape, rows)?.cut(shape[1..].iter().product(), runs))
    }

    /// What matrices that are packed are multiplied in.
    fn numbers(&self) -> Numbers {
        Numbers::F32
    }

    /// Memory for matrices that are read from here.
    fn spare(&self) -> Option<&Spare> {
        None
    }
}

pub use crate::checkpoint::Runs;

/// The numbers of a tensor, or of some of its rows.
pub enum Stored {
    /// Little-endian, in their stored type.
    Bytes(Vec<u8>, Element),
    Values(Vec<f32>),
}

impl Stored {
    /// The numbers in f32.
    pub fn values(self) -> Vec<f32> {
        match self {
            Stored::Bytes(bytes, element) => element.values(&bytes),
            Stored::Values(values) => values,
        }
    }

    /// These numbers and others after them.
    pub fn followed_by(self, other: Stored) -> Stored {
        match (self, other) {
            (Stored::Bytes(mut bytes, element), Stored::Bytes(others, other)) if element == other => {
                bytes.extend(others);
                Stored::Bytes(bytes, element)
            }
            (first, second) => Stored::Values([first.values(), second.values()].concat()),
        }
    }

    /// Some numbers of each row of `width` numbers.
    fn cut(self, width: usize, runs: &Runs) -> Stored {
        fn cut<T: Copy>(all: &[T], width: usize, scale: usize, runs: &Runs) -> Vec<T> {
            let rows = all.chunks((width * scale).max(1));
            let runs = |row: &'_ [T]| -> Vec<T> {
                runs.each().flat_map(|run| row[run.start * scale..run.end * scale].to_vec()).collect()
            };
            rows.flat_map(runs).collect()
        }
        match self {
            Stored::Bytes(bytes, element) => Stored::Bytes(cut(&bytes, width, element.bytes(), runs), element),
            Stored::Values(values) => Stored::Values(cut(&values, width, 1, runs)),
        }
    }

    /// A matrix of these numbers, to multiply by, in the memory of a spare one if there is one of its size.
    pub fn pack(
        self,
        order: Order,
        inputs: usize,
        outputs: usize,
        numbers: Numbers,
        spare: Option<&Spare>,
    ) -> PackedMatrix {
        let old = spare.and_then(|spare| spare.take(inputs, outputs));
        match self {
            Stored::Bytes(bytes, element) => {
                let packed = PackedMatrix::pack_into(old, &bytes, element, order, inputs, outputs, numbers);
                if let Some(spare) = spare {
                    *unlocked(&spare.bytes) = bytes;
                }
                packed
            }
            Stored::Values(values) => {
                let bytes = bytemuck::cast_slice(&values);
                PackedMatrix::pack_into(old, bytes, Element::F32, order, inputs, outputs, numbers)
            }
        }
    }
}

/// Memory of matrices that nothing is multiplied by any more, for those of the same size that are read next.
#[derive(Debug, Default)]
pub struct Spare {
    matrices: Mutex<Vec<PackedMatrix>>,
    /// Those that stored numbers were last read into.
    bytes: Mutex<Vec<u8>>,
}

impl Spare {
    pub fn put(&self, matrix: PackedMatrix) {
        unlocked(&self.matrices).push(matrix);
    }

    /// Gives everything back to the system.
    pub fn clear(&self) {
        unlocked(&self.matrices).clear();
        drop(mem::take(&mut *unlocked(&self.bytes)));
    }

    /// A matrix of this size. If there is none, the others are of no use either, and are given back.
    fn take(&self, inputs: usize, outputs: usize) -> Option<PackedMatrix> {
        let mut matrices = unlocked(&self.matrices);
        let place = matrices.iter().position(|matrix| (matrix.inputs(), matrix.outputs()) == (inputs, outputs));
        if place.is_none() {
            matrices.clear();
        }
        place.map(|place| matrices.swap_remove(place))
    }
}

/// A thread that panicked left nothing half done.
fn unlocked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Weights of a checkpoint. Multimodal checkpoints keep their text model under a prefix.
pub struct CheckpointWeights<'a> {
    reader: &'a CheckpointReader,
    prefix: &'static str,
    numbers: Numbers,
    spare: Option<&'a Spare>,
}

impl<'a> CheckpointWeights<'a> {
    pub fn new(reader: &'a CheckpointReader) -> Self {
        const PREFIX: &str = "language_model.";
        let prefixed = reader.contains(&format!("{PREFIX}model.embed_tokens.weight"));
        CheckpointWeights { reader, prefix: if prefixed { PREFIX } else { "" }, numbers: Numbers::F32, spare: None }
    }

    /// The same weights, to be multiplied in these numbers where they are packed.
    pub fn in_numbers(self, numbers: Numbers) -> Self {
        CheckpointWeights { numbers, ..self }
    }

    /// The same weights, whose matrices are put into spare memory.
    pub fn reusing(self, spare: &'a Spare) -> Self {
        CheckpointWeights { spare: Some(spare), ..self }
    }
}

impl WeightSource for CheckpointWeights<'_> {
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.reader.load_f32(&format!("{}{name}", self.prefix), shape)
    }

    fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        self.reader.load_f32_rows(&format!("{}{name}", self.prefix), shape, rows)
    }

    fn stored_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Stored> {
        let full_name = format!("{}{name}", self.prefix);
        if let Some(element) = element(self.reader.info(&full_name)?.dtype)
            && let Some((_, bytes)) = self.reader.stored_rows(&full_name, shape, rows.clone(), self.spare_bytes())?
            && element.all_finite(&bytes)
        {
            return Ok(Stored::Bytes(bytes, element));
        }
        // Other types and forms are converted, and what is wrong is said, by the one reader of values.
        self.load_rows(name, shape, rows).map(Stored::Values)
    }

    fn stored_runs(&self, name: &str, shape: &[usize], rows: Range<usize>, runs: &Runs) -> Result<Stored> {
        let full_name = format!("{}{name}", self.prefix);
        if let Some(element) = element(self.reader.info(&full_name)?.dtype)
            && let Some((_, bytes)) = self.reader.stored_runs(&full_name, shape, rows.clone(), runs)?
            && element.all_finite(&bytes)
        {
            return Ok(Stored::Bytes(bytes, element));
        }
        let values = self.load_rows(name, shape, rows)?;
        Ok(Stored::Values(values).cut(shape[1..].iter().product(), runs))
    }

    fn numbers(&self) -> Numbers {
        self.numbers
    }

    fn spare(&self) -> Option<&Spare> {
        self.spare
    }
}

/// The types that are handed on as they are stored.
fn element(dtype: Dtype) -> Option<Element> {
    match dtype {
        Dtype::F32 => Some(Element::F32),
        Dtype::Bf16 => Some(Element::Bf16),
        Dtype::F16 => Some(Element::F16),
        _ => None,
    }
}

impl CheckpointWeights<'_> {
    fn spare_bytes(&self) -> Vec<u8> {
        self.spare.map_or_else(Vec::new, |spare| mem::take(&mut *unlocked(&spare.bytes)))
    }
}

/// Fresh weights: norms one, biases zero, everything else normal. Each tensor draws from a generator of its own,
/// seeded by its name, so that the order of loading changes nothing.
#[derive(Debug, Clone)]
pub struct RandomWeights {
    pub seed: u64,
    pub std: f64,
}

impl WeightSource for RandomWeights {
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let count = shape.iter().product();
        if name.ends_with("norm.weight") {
            return Ok(vec![1.0; count]);
        }
        if name.ends_with(".bias") {
            return Ok(vec![0.0; count]);
        }
        let mut key = blake3::Hasher::new();
        key.update(&self.seed.to_le_bytes()).update(name.as_bytes());
        let mut generator = rand_chacha::ChaCha8Rng::from_seed(*key.finalize().as_bytes());
        let normal = Normal::new(0.0, self.std).expect("a standard deviation is finite and not negative");
        Ok((0..count).map(|_| normal.sample(&mut generator) as f32).collect())
    }

    fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        let width: usize = shape[1..].iter().product();
        Ok(self.load(name, shape)?[rows.start * width..rows.end * width].to_vec())
    }
}

/// Loads one tensor onto a device, tracked when the device records gradients.
pub fn load<const D: usize>(
    source: &dyn WeightSource,
    name: &str,
    shape: [usize; D],
    device: &Device,
) -> Result<Tensor<D>> {
    let values = source.load(name, &shape)?;
    let tensor = Tensor::from_data(TensorData::new(values, shape), &device.clone().inner());
    Ok(track(tensor, device.is_autodiff()))
}

/// Loads some rows of the first axis of a tensor, as [`load`] does; `shape` is that of the whole.
pub fn load_rows<const D: usize>(
    source: &dyn WeightSource,
    name: &str,
    mut shape: [usize; D],
    rows: Range<usize>,
    device: &Device,
) -> Result<Tensor<D>> {
    let values = source.load_rows(name, &shape, rows.clone())?;
    shape[0] = rows.len();
    let tensor = Tensor::from_data(TensorData::new(values, shape), &device.clone().inner());
    Ok(track(tensor, device.is_autodiff()))
}

fn track<const D: usize>(tensor: Tensor<D>, tracked: bool) -> Tensor<D> {
    if tracked { tensor.autodiff().require_grad() } else { tensor }
}

/// A weight of a model, of any rank, open to change.
pub enum ParameterRef<'a> {
    Vector(&'a mut Tensor<1>),
    Matrix(&'a mut Tensor<2>),
    Stack(&'a mut Tensor<3>),
}

macro_rules! each_rank {
    ($self:expr, $tensor:ident => $body:expr) => {
        match $self {
            ParameterRef::Vector($tensor) => $body,
            ParameterRef::Matrix($tensor) => $body,
            ParameterRef::Stack($tensor) => $body,
        }
    };
}

impl ParameterRef<'_> {
    pub fn shape(&self) -> Vec<usize> {
        each_rank!(self, tensor => tensor.dims().to_vec())
    }

    /// Vectors (norms and biases) are not decayed.
    pub fn is_vector(&self) -> bool {
        matches!(self, ParameterRef::Vector(_))
    }

    /// The gradient, flat.
    pub fn take_gradient(&self, gradients: &mut Gradients) -> Option<Tensor<1>> {
        each_rank!(self, tensor => tensor.grad_remove(gradients).map(|grad| grad.flatten(0, -1)))
    }

    /// The values, flat, outside any graph.
    pub fn flat(&self) -> Tensor<1> {
        each_rank!(self, tensor => {
            let tensor = (**tensor).clone();
            if tensor.is_autodiff() { tensor.inner() } else { tensor }.flatten(0, -1)
        })
    }

    /// Moves the values out, flat, so that they can be changed in place; [`ParameterRef::set`] must follow.
    pub fn take(&mut self) -> Tensor<1> {
        let flat = self.flat();
        each_rank!(self, tensor => {
            let device = flat.device();
            let unit = tensor.dims().map(|_| 1);
            **tensor = Tensor::zeros(unit, &device);
        });
        flat
    }

    /// Puts values in, tracked or not.
    pub fn set(&mut self, values: Tensor<1>, shape: &[usize], tracked: bool) {
        fn put<const D: usize>(values: Tensor<1>, shape: &[usize], tracked: bool) -> Tensor<D> {
            let shape: [usize; D] = shape.try_into().expect("rank does not change");
            track(values.reshape(shape), tracked)
        }
        match self {
            ParameterRef::Vector(tensor) => **tensor = put(values, shape, tracked),
            ParameterRef::Matrix(tensor) => **tensor = put(values, shape, tracked),
            ParameterRef::Stack(tensor) => **tensor = put(values, shape, tracked),
        }
    }
}
