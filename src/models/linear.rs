//! Linear maps, alone and in stacks of experts, in the two forms that weights have: tensors of any device, which may
//! be trained, and packed weights on the processor, which may not, and whose products do not depend on the batch.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use limbeck_kernels::{
    gather_rows::gather_rows,
    grouped_matmul::grouped_matmul,
    host_op,
    packed_matmul::{self, Order, PackedMatrix},
};

use super::parameter::{ParameterRef, WeightSource, load};
use crate::error::Result;

/// Where the weights of a model come from, and what becomes of them.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    source: &'a dyn WeightSource,
    device: &'a Device,
    packed: bool,
}

impl<'a> Weights<'a> {
    /// Tensors of a device, trainable when it records gradients.
    pub fn tensors(source: &'a dyn WeightSource, device: &'a Device) -> Self {
        Weights { source, device, packed: false }
    }

    /// The form a model runs fastest in and is never trained in: packed on the processor, tensors elsewhere.
    pub fn for_inference(source: &'a dyn WeightSource, device: &'a Device) -> Self {
        Weights { source, device, packed: host_op::runs_on(device) && !device.is_autodiff() }
    }

    pub fn vector(&self, name: &str, width: usize) -> Result<Tensor<1>> {
        load(self.source, name, [width], self.device)
    }

    /// # Shapes
    /// - the stored tensor `[outputs, inputs]`
    pub fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        if !self.packed {
            return Ok(Linear::Tensor(load(self.source, name, shape, self.device)?));
        }
        let stored = self.source.stored(name, &shape)?;
        let [outputs, inputs] = shape;
        let packed = PackedMatrix::pack(&stored.bytes, stored.element, Order::OutputMajor, inputs, outputs);
        Ok(Linear::Packed(Arc::new(packed)))
    }

    /// # Shapes
    /// - the stored tensor `[experts, inputs, outputs]`
    pub fn stack(&self, name: &str, shape: [usize; 3]) -> Result<Stack> {
        if !self.packed {
            return Ok(Stack::Tensor(load(self.source, name, shape, self.device)?));
        }
        let stored = self.source.stored(name, &shape)?;
        let [experts, inputs, outputs] = shape;
        let each = stored.bytes.chunks(stored.bytes.len() / experts);
        let pack = |bytes| PackedMatrix::pack(bytes, stored.element, Order::InputMajor, inputs, outputs);
        Ok(Stack::Packed(each.map(|bytes| Arc::new(pack(bytes))).collect()))
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
            Linear::Tensor(weight) => x.matmul(weight.clone().transpose()),
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
