//! The bridge from burn to operations written over host slices.
//!
//! A [`HostOp`] is a forward and a hand-written backward pass over `f32` slices. [`apply`] runs one on burn's `flex`
//! backend, reading the tensors' memory in place and recording the backward pass when the inputs are tracked.
//! Other backends never come here: each operation's public function takes its form for devices there
//! (`device`, with the features for them), or falls back to its plain-tensor form.

use std::{fmt::Debug, sync::Arc};

use burn::backend::{
    Autodiff, Backend, Dispatch, Flex,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};

use crate::profile;

/// A read-only operand: its shape and its values in row-major order.
#[derive(Debug, Clone, Copy)]
pub struct HostArray<'a> {
    pub shape: &'a [usize],
    pub data: &'a [f32],
}

impl HostArray<'_> {
    /// Elements of the last axis.
    pub fn width(&self) -> usize {
        *self.shape.last().expect("operands have at least one axis")
    }
}

/// What a forward pass gives: the output and whatever its backward pass wants to keep.
#[derive(Debug)]
pub struct Forward {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
    pub saved: Vec<f32>,
}

/// An operation over host slices with a hand-written derivative.
pub trait HostOp: Debug + Send + Sync + 'static {
    /// What the forward and the backward pass are called in profiles.
    fn names(&self) -> [&'static str; 2];

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward;

    /// Gradients of the inputs, each with its input's element count; `None` where `needed` is false.
    fn backward(
        &self,
        inputs: &[HostArray<'_>],
        saved: &[f32],
        output_grad: &[f32],
        needed: &[bool],
    ) -> Vec<Option<Vec<f32>>>;
}

/// Whether host operations can run on this device.
pub fn runs_on(device: &Device) -> bool {
    device.clone().inner() == Device::flex()
}

/// Runs an operation of one to three operands, each flattened by the caller to the rank `D` of the output.
pub fn apply<const D: usize>(op: impl HostOp, inputs: Vec<AnyTensor>) -> Tensor<D> {
    let op: Arc<dyn HostOp> = Arc::new(op);
    let mut inputs = inputs.into_iter().map(|input| input.0);
    let first = inputs.next().expect("at least one operand");
    let output = match (inputs.next(), inputs.next()) {
        (None, _) => <Dispatch as HostOps>::host_op1(first, op),
        (Some(second), None) => <Dispatch as HostOps>::host_op2(first, second, op),
        (Some(second), Some(third)) => <Dispatch as HostOps>::host_op3(first, second, third, op),
    };
    Tensor::from_dispatch(output)
}

/// A tensor of any rank, so that operands of different ranks can stand in one list.
pub struct AnyTensor(burn::backend::DispatchTensor);

#[cfg(feature = "device")]
impl AnyTensor {
    pub(crate) fn into_dispatch(self) -> burn::backend::DispatchTensor {
        self.0
    }
}

impl<const D: usize> From<Tensor<D>> for AnyTensor {
    fn from(tensor: Tensor<D>) -> Self {
        AnyTensor(tensor.into_dispatch())
    }
}

#[backend_extension(Flex, Autodiff)]
trait HostOps: Backend {
    fn host_op1(a: FloatTensor<Self>, op: Arc<dyn HostOp>) -> FloatTensor<Self>;
    fn host_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: Arc<dyn HostOp>) -> FloatTensor<Self>;
    fn host_op3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: Arc<dyn HostOp>,
    ) -> FloatTensor<Self>;
}

/// Backends whose tensors live in host memory.
trait HostBackend: Backend {
    fn run(op: &dyn HostOp, inputs: &[FloatTensor<Self>]) -> (FloatTensor<Self>, Vec<f32>);
    fn run_backward(
        op: &dyn HostOp,
        inputs: &[FloatTensor<Self>],
        saved: &[f32],
        output_grad: FloatTensor<Self>,
        needed: &[bool],
    ) -> Vec<Option<FloatTensor<Self>>>;
}

type FlexTensor = FloatTensor<Flex>;

fn contiguous_f32(tensor: &FlexTensor) -> FlexTensor {
    assert_eq!(tensor.dtype(), DType::F32, "host operations take f32 tensors");
    // Some rows of a tensor lie in order as well, and need no copy.
    if tensor.as_slice::<f32>().is_some() { tensor.clone() } else { tensor.to_contiguous() }
}

fn host_array(tensor: &FlexTensor) -> HostArray<'_> {
    HostArray { shape: tensor.layout().shape(), data: tensor.as_slice::<f32>().expect("made contiguous f32") }
}

/// Rows of the first operand, for profiles.
fn rows(arrays: &[HostArray<'_>]) -> u64 {
    arrays[0].shape[0] as u64
}

fn from_vec(data: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(data, Shape::from(shape.to_vec())))
}

impl HostBackend for Flex {
    fn run(op: &dyn HostOp, inputs: &[FlexTensor]) -> (FlexTensor, Vec<f32>) {
        let inputs: Vec<FlexTensor> = inputs.iter().map(contiguous_f32).collect();
        let arrays: Vec<HostArray> = inputs.iter().map(host_array).collect();
        let _span = profile::op(op.names()[0]).with("rows", rows(&arrays));
        let forward = op.forward(&arrays);
        (from_vec(forward.data, &forward.shape), forward.saved)
    }

    fn run_backward(
        op: &dyn HostOp,
        inputs: &[FlexTensor],
        saved: &[f32],
        output_grad: FlexTensor,
        needed: &[bool],
    ) -> Vec<Option<FlexTensor>> {
        let inputs: Vec<FlexTensor> = inputs.iter().map(contiguous_f32).collect();
        let arrays: Vec<HostArray> = inputs.iter().map(host_array).collect();
        let output_grad = contiguous_f32(&output_grad);
        let _span = profile::op(op.names()[1]).with("rows", rows(&arrays));
        let grads = op.backward(&arrays, saved, host_array(&output_grad).data, needed);
        assert_eq!(grads.len(), inputs.len(), "one gradient slot per operand");
        grads.into_iter().zip(&arrays).map(|(grad, array)| grad.map(|grad| from_vec(grad, array.shape))).collect()
    }
}

impl HostOps for Flex {
    fn host_op1(a: FlexTensor, op: Arc<dyn HostOp>) -> FlexTensor {
        Self::run(&*op, &[a]).0
    }
    fn host_op2(a: FlexTensor, b: FlexTensor, op: Arc<dyn HostOp>) -> FlexTensor {
        Self::run(&*op, &[a, b]).0
    }
    fn host_op3(a: FlexTensor, b: FlexTensor, c: FlexTensor, op: Arc<dyn HostOp>) -> FlexTensor {
        Self::run(&*op, &[a, b, c]).0
    }
}

#[derive(Debug)]
struct HostOpBackward;

/// Everything a backward pass needs, kept until it runs. Inputs are shared handles, not copies.
#[derive(Debug, Clone)]
struct Kept<B: Backend> {
    op: Arc<dyn HostOp>,
    inputs: Vec<FloatTensor<B>>,
    saved: Arc<Vec<f32>>,
}

impl<B: HostBackend, const N: usize> Backward<B, N> for HostOpBackward {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let output_grad = grads.consume::<B>(&ops.node);
        let needed = ops.parents.each_ref().map(Option::is_some);
        let kept = ops.state;
        let input_grads = B::run_backward(&*kept.op, &kept.inputs, &kept.saved, output_grad, &needed);
        for (parent, grad) in ops.parents.into_iter().zip(input_grads) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

fn tracked<B: HostBackend, C: CheckpointStrategy, const N: usize>(
    op: Arc<dyn HostOp>,
    inputs: [FloatTensor<Autodiff<B, C>>; N],
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = inputs.each_ref().map(|input| input.node());
    match HostOpBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            let inputs: Vec<FloatTensor<B>> = inputs.into_iter().map(|input| input.into_primitive()).collect();
            let (output, saved) = B::run(&*op, &inputs);
            prepared.finish(Kept { op, inputs, saved: Arc::new(saved) }, output)
        }
        OpsKind::UnTracked(prepared) => {
            let inputs: Vec<FloatTensor<B>> = inputs.into_iter().map(|input| input.into_primitive()).collect();
            prepared.finish(B::run(&*op, &inputs).0)
        }
    }
}

impl<B: HostBackend, C: CheckpointStrategy> HostOps for Autodiff<B, C> {
    fn host_op1(a: FloatTensor<Self>, op: Arc<dyn HostOp>) -> FloatTensor<Self> {
        tracked::<B, C, _>(op, [a])
    }
    fn host_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: Arc<dyn HostOp>) -> FloatTensor<Self> {
        tracked::<B, C, _>(op, [a, b])
    }
    fn host_op3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: Arc<dyn HostOp>,
    ) -> FloatTensor<Self> {
        tracked::<B, C, _>(op, [a, b, c])
    }
}
