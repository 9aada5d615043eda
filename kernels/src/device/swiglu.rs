//! The gated activation on a device: one launch each way, of one operand or of two.

use burn_cubecl::tensor::CubeTensor;

use super::{
    cube::swiglu as kernels,
    op::{DeviceOp, Spec},
    tensors::{address, element, empty, threads, vector_size, vectors},
};

/// One operand `[N, 2I]`, the gate first in each row, or two `[N, I]`.
#[derive(Debug)]
pub struct Swiglu;

fn result_shape(shape: &[usize], operands: usize) -> [usize; 2] {
    [shape[0], shape[1] / (3 - operands)]
}

impl DeviceOp for Swiglu {
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec> {
        vec![Spec::new(result_shape(&inputs[0].shape, inputs.len()), inputs[0].dtype)]
    }

    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>) {
        let gate = &inputs[0];
        let shape = result_shape(gate.meta.shape(), inputs.len());
        let output = empty(gate, shape, gate.dtype);
        let vector = vector_size(gate, shape[1]);
        let count = output.meta.num_elements() / vector;
        if count == 0 {
            return (output, vec![]);
        }
        let ((cubes, dim), places) = (threads(count), address(&[gate]));
        let element = element(gate.dtype).expect("asked for before");
        match inputs {
            [gate_up] => kernels::swiglu::launch(
                &gate.client,
                cubes,
                dim,
                places,
                vector,
                vectors(gate_up, vector),
                vectors(&output, vector),
                count,
                shape[1] / vector,
                element,
            ),
            [gate, up, ..] => kernels::gated_silu::launch(
                &gate.client,
                cubes,
                dim,
                places,
                vector,
                vectors(gate, vector),
                vectors(up, vector),
                vectors(&output, vector),
                count,
                element,
            ),
            [] => unreachable!("an operation has operands"),
        }
        (output, vec![])
    }

    fn backward(
        &self,
        inputs: &[CubeTensor],
        _: &[CubeTensor],
        grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let grads: Vec<CubeTensor> =
            inputs.iter().map(|input| empty(input, input.meta.shape().to_vec(), input.dtype)).collect();
        let vector = vector_size(&grad, grad.meta.shape()[1]);
        let count = grad.meta.num_elements() / vector;
        if count > 0 {
            let ((cubes, dim), places) = (threads(count), address(&[&inputs[0]]));
            let element = element(grad.dtype).expect("asked for before");
            match (inputs, &grads[..]) {
                ([gate_up], [gate_up_grad]) => kernels::swiglu_backward::launch(
                    &grad.client,
                    cubes,
                    dim,
                    places,
                    vector,
                    vectors(gate_up, vector),
                    vectors(&grad, vector),
                    vectors(gate_up_grad, vector),
                    count,
                    grad.meta.shape()[1] / vector,
                    element,
                ),
                ([gate, up], [gate_grad, up_grad]) => kernels::gated_silu_backward::launch(
                    &grad.client,
                    cubes,
                    dim,
                    places,
                    vector,
                    vectors(gate, vector),
                    vectors(up, vector),
                    vectors(&grad, vector),
                    vectors(gate_grad, vector),
                    vectors(up_grad, vector),
                    count,
                    element,
                ),
                _ => unreachable!("one operand or two"),
            }
        }
        grads.into_iter().zip(needed).map(|(grad, needed)| needed.then_some(grad)).collect()
    }
}
