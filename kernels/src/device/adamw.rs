//! AdamW's update on a device: one launch, into the memory of weight and moments where nobody else holds it.

use burn::backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::{DType, Tensor};
use burn_cubecl::{CubeBackend, cubecl::prelude::*, kernel::into_contiguous, tensor::CubeTensor};

use super::{
    cube::adamw as kernels,
    op,
    tensors::{address, empty, threads, vector_size, vectors},
};

/// The numbers of an update as the kernel takes them, for all weights.
#[derive(Debug, Clone, Copy)]
pub struct Numbers {
    pub scale: f32,
    pub beta1: f32,
    pub rest1: f32,
    pub beta2: f32,
    pub rest2: f32,
    pub second_correction: f32,
    pub eps: f32,
    /// What the decay leaves of a weight.
    pub keep: f32,
    /// The learning rate, with the first moment's correction.
    pub rate: f32,
}

/// Whether [`update`] takes these: f32, on a device with kernels, and no part of a graph.
pub fn takes(tensors: &[&Tensor<1>]) -> bool {
    tensors.iter().all(|tensor| {
        let device = tensor.device();
        !device.is_autodiff() && tensor.dtype() == DType::F32 && op::runs_on(&device, DType::F32)
    })
}

/// The new weight, first and second moment.
///
/// # Shapes
/// - all tensors `[N]`
pub fn update(weight: Tensor<1>, gradient: Tensor<1>, moments: [Tensor<1>; 2], numbers: Numbers) -> [Tensor<1>; 3] {
    let [first, second] = moments.map(Tensor::into_dispatch);
    let (weight, first, second) =
        <Dispatch as UpdateOps>::adamw(weight.into_dispatch(), gradient.into_dispatch(), first, second, numbers);
    [weight, first, second].map(Tensor::from_dispatch)
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")))]
trait UpdateOps: Backend {
    fn adamw(
        weight: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        numbers: Numbers,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// Where the kernel's operands stand, for an output that is one of them.
const WEIGHT: usize = 0;
const FIRST: usize = 2;
const SECOND: usize = 3;

/// [`update`] of a device's tensors.
pub fn update_tensors(
    weight: CubeTensor,
    gradient: CubeTensor,
    first: CubeTensor,
    second: CubeTensor,
    numbers: Numbers,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [weight, gradient, first, second] = [weight, gradient, first, second].map(into_contiguous);
    let elements = weight.meta.num_elements();
    assert!([&gradient, &first, &second].iter().all(|other| other.meta.num_elements() == elements), "one length");
    if elements == 0 {
        return (weight, first, second);
    }
    let vector = vector_size(&weight, elements);
    let place = |tensor: &CubeTensor, position: usize| {
        if tensor.handle.can_mut() {
            return (None, BufferArg::alias(position, elements / vector));
        }
        let output = empty(tensor, tensor.meta.shape().to_vec(), DType::F32);
        let operand = vectors(&output, vector);
        (Some(output), operand)
    };
    let (new_weight, weight_operand) = place(&weight, WEIGHT);
    let (new_first, first_operand) = place(&first, FIRST);
    let (new_second, second_operand) = place(&second, SECOND);
    let (cubes, dim) = threads(elements / vector);
    kernels::adamw::launch(
        &weight.client,
        cubes,
        dim,
        address(&[&weight]),
        vector,
        vectors(&weight, vector),
        vectors(&gradient, vector),
        vectors(&first, vector),
        vectors(&second, vector),
        weight_operand,
        first_operand,
        second_operand,
        elements / vector,
        numbers.scale,
        numbers.beta1,
        numbers.rest1,
        numbers.beta2,
        numbers.rest2,
        numbers.second_correction,
        numbers.eps,
        numbers.keep,
        numbers.rate,
    );
    (new_weight.unwrap_or(weight), new_first.unwrap_or(first), new_second.unwrap_or(second))
}

impl UpdateOps for CubeBackend {
    fn adamw(
        weight: CubeTensor,
        gradient: CubeTensor,
        first: CubeTensor,
        second: CubeTensor,
        numbers: Numbers,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        update_tensors(weight, gradient, first, second, numbers)
    }
}

#[cfg(feature = "fusion")]
mod fused {
    use burn::backend::fusion::Fusion;

    use super::*;
    use crate::device::op::{Spec, queue};

    impl UpdateOps for Fusion<CubeBackend> {
        fn adamw(
            weight: FloatTensor<Self>,
            gradient: FloatTensor<Self>,
            first: FloatTensor<Self>,
            second: FloatTensor<Self>,
            numbers: Numbers,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
            let outputs = [&weight, &first, &second].map(Spec::of).to_vec();
            let work = move |operands: Vec<CubeTensor>| {
                let [weight, gradient, first, second] = operands.try_into().expect("the four that were queued");
                let (weight, first, second) = update_tensors(weight, gradient, first, second, numbers);
                vec![weight, first, second]
            };
            let new = queue("limbeck_adamw", vec![weight, gradient, first, second], outputs, Box::new(work));
            let [weight, first, second] = new.try_into().expect("as many as were said beforehand");
            (weight, first, second)
        }
    }
}
