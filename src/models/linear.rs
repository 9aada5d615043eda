//! Linear maps, alone and in stacks of experts, in the two forms that weights have: tensors of any device, which may
//! be trained, and packed weights on the processor, which may not, and whose products do not depend on the batch.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use half::bf16;
use limbeck_kernels::{
    gather_rows::gather_rows,
    grouped_matmul::grouped_matmul,
    host_op, linear,
    packed_matmul::{self, Numbers, Order, PackedMatrix},
};

use super::parameter::{ParameterRef, WeightSource, load, load_rows};
use crate::error::Result;

/// Where the weights of a model come from, and what becomes of them.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    source: &'a dyn WeightSource,
    device: &'a Device,
    packed: bool,
    numbers: Numbers,
}

impl<'a> Weights<'a> {
    /// Tensors of a device, trainable when it records gradients.
    pub fn tensors(source: &'a dyn WeightSource, device: &'a Device) -> Self {
        Weights { source, device, packed: false, numbers: Numbers::F32 }
    }

    /// The form a model runs fastest in and is never trained in: packed on the processor, tensors elsewhere.
    pub fn for_inference(source: &'a dyn WeightSource, device: &'a Device) -> Self {
        let packed = host_op::runs_on(device) && !device.is_autodiff();
        Weights { source, device, packed, numbers: source.numbers() }
    }

    /// The same weights, multiplied as they are. In bfloat16 every other matrix is rounded, the embedding with the head
    /// that it may be.
    pub fn exact(self) -> Self {
        Weights { numbers: Numbers::F32, ..self }
    }

    /// Makes of numbers what packing makes of them.
    pub fn round(&self, values: &mut [f32]) {
        if self.packed && self.numbers == Numbers::Bf16 {
            values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
    }

    pub fn vector(&self, name: &str, width: usize) -> Result<Tensor<1>> {
        load(self.source, name, [width], self.device)
    }

    /// # Shapes
    /// - the stored tensor `[outputs, inputs]`
    pub fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        self.linear_rows(name, shape, 0..shape[0])
    }

    /// The map to some of the outputs.
    ///
    /// # Shapes
    /// - the stored tensor `[outputs, inputs]`
    pub fn linear_rows(&self, name: &str, shape: [usize; 2], outputs: Range<usize>) -> Result<Linear> {
        if !self.packed {
            return Ok(Linear::Tensor(load_rows(self.source, name, shape, outputs, self.device)?));
        }
        let stored = self.source.stored_rows(name, &shape, outputs.clone())?;
        let packed = stored.pack(Order::OutputMajor, shape[1], outputs.len(), self.numbers, self.source.spare());
        Ok(Linear::Packed(Arc::new(packed)))
    }

    /// # Shapes
    /// - the stored tensor `[experts, inputs, outputs]`
    pub fn stack(&self, name: &str, shape: [usize; 3]) -> Result<Stack> {
        self.stack_rows(name, shape, 0..shape[0])
    }

    /// Some of the matrices of a stack; read one by one where they are packed.
    ///
    /// # Shapes
    /// - the stored tensor `[experts, inputs, outputs]`
    pub fn stack_rows(&self, name: &str, shape: [usize; 3], experts: Range<usize>) -> Result<Stack> {
        if !self.packed {
            return Ok(Stack::Tensor(load_rows(self.source, name, shape, experts, self.device)?));
        }
        let [_, inputs, outputs] = shape;
        let pack = |expert| {
            let stored = self.source.stored_rows(name, &shape, expert..expert + 1)?;
            let packed = stored.pack(Order::InputMajor, inputs, outputs, self.numbers, self.source.spare());
            Ok(Arc::new(packed))
        };
        Ok(Stack::Packed(experts.map(pack).collect::<Result<_>>()?))
    }
}

/// A matrix, `[outputs, inputs]`.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "a model has some hundreds of them, and a box would stand in every use")]
pub enum Linear {
    Tensor(Tensor<2>),
    Packed(Arc<PackedMatrix>),
}

impl Linear {
    /// `x W^T`
    ///
    /// # Shapes
    /// - `x` `[N, inputs]`, result `[N, outputs]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Linear::Tensor(weight) => linear::linear(x, weight.clone()),
            Linear::Packed(weight) => packed_matmul::linear(x, weight),
        }
    }

    /// The rows with these numbers, as an embedding looks them up.
    ///
    /// # Shapes
    /// - result `[N, inputs]`
    pub fn rows(&self, numbers: &Arc<Vec<u32>>) -> Tensor<2> {
        match self {
            Linear::Tensor(weight) => gather_rows(weight.clone(), numbers.clone()),
            Linear::Packed(weight) => packed_matmul::rows(weight, numbers, &Device::flex()),
        }
    }

    /// All weights as a tensor: that of the model itself, or a copy of packed ones.
    ///
    /// # Shapes
    /// - result `[outputs, inputs]`
    pub fn tensor(&self) -> Tensor<2> {
        match self {
            Linear::Tensor(weight) => weight.clone(),
            Linear::Packed(weight) => {
                let shape = [weight.outputs(), weight.inputs()];
                Tensor::from_data(TensorData::new(weight.unpacked(), shape), &Device::flex())
            }
        }
    }

    /// The packed weights, if they are.
    pub fn packed(&self) -> Option<&PackedMatrix> {
        match self {
            Linear::Tensor(_) => None,
            Linear::Packed(weight) => Some(weight),
        }
    }

    /// # Panics
    /// When the weights are packed.
    pub fn parameter(&mut self) -> ParameterRef<'_> {
        match self {
            Linear::Tensor(weight) => ParameterRef::Matrix(weight),
            Linear::Packed(_) => panic!("{PACKED}"),
        }
    }
}

/// One matrix per expert, `[experts, inputs, outputs]`.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "a model has some hundreds of them, and a box would stand in every use")]
pub enum Stack {
    Tensor(Tensor<3>),
    Packed(Vec<Arc<PackedMatrix>>),
}

impl Stack {
    /// Rows `offsets[e]..offsets[e + 1]` of `x` times matrix `e`.
    ///
    /// # Shapes
    /// - `x` `[N, inputs]`, result `[N, outputs]`
    pub fn forward(&self, x: Tensor<2>, offsets: Arc<Vec<usize>>) -> Tensor<2> {
        match self {
            Stack::Tensor(weights) => grouped_matmul(x, weights.clone(), offsets),
            Stack::Packed(weights) => packed_matmul::grouped(x, weights, offsets),
        }
    }

    /// The packed matrices that are nobody else's, for their memory.
    pub fn into_packed(self) -> Vec<PackedMatrix> {
        match self {
            Stack::Tensor(_) => vec![],
            Stack::Packed(weights) => weights.into_iter().filter_map(Arc::into_inner).collect(),
        }
    }

    /// # Panics
    /// When the weights are packed.
    pub fn parameter(&mut self) -> ParameterRef<'_> {
        match self {
            Stack::Tensor(weights) => ParameterRef::Stack(weights),
            Stack::Packed(_) => panic!("{PACKED}"),
        }
    }
}

const PACKED: &str = "a model that was loaded for inference has no parameters";
