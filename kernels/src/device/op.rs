//! The bridge from burn to operations that run kernels on a device: what [`host_op`](crate::host_op) is to the processor.
//!
//! A [`DeviceOp`] is a forward and a hand-written backward pass over tensors in a device's memory. [`apply`] runs one on
//! burn's CubeCL backend, recording the backward pass when the inputs are tracked. With burn's fusion, both passes wait
//! in its queue like any other operation, so an operation says beforehand what it gives, and must not let the host look
//! at a result: one that does resolves its operands as the fused loss does.

use std::{fmt::Debug, sync::Arc};

use burn::backend::{
    Autodiff, Backend, Dispatch, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::{CubeBackend, cubecl::client::Client, kernel::into_contiguous, tensor::CubeTensor};

use super::tensors;
use crate::host_op::AnyTensor;

/// Shape and type of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl Spec {
    pub fn new(shape: impl Into<Vec<usize>>, dtype: DType) -> Spec {
        Spec { shape: shape.into(), dtype }
    }

    pub fn of(tensor: &impl TensorMetadata) -> Spec {
        Spec { shape: tensor.shape().to_vec(), dtype: tensor.dtype() }
    }
}

/// An operation over tensors of a device with a hand-written derivative. All tensors it is given are row-major and
/// without gaps.
pub trait DeviceOp: Debug + Send + Sync + 'static {
    /// What [`forward`](DeviceOp::forward) gives for such inputs: the output, then each saved tensor.
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec>;

    /// Whether the backward pass reads the inputs. Where not, it is given none, and none is kept in memory for it.
    fn reads_inputs(&self) -> bool {
        true
    }

    /// The output, and what its backward pass wants to keep.
    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>);

    /// Gradients of the inputs, each in its input's shape and type; `None` where, and only where, `needed` is false.
    fn backward(
        &self,
        inputs: &[CubeTensor],
        saved: &[CubeTensor],
        output_grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>>;
}

/// Whether device operations can run on this device, with operands of this type.
pub fn runs_on(device: &Device, dtype: DType) -> bool {
    client(device, dtype).is_some()
}

/// The client of a device that device operations can run on, with operands of this type.
pub fn client(device: &Device, dtype: DType) -> Option<Client> {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if let burn::backend::DispatchDevice::Cube(device) = device.clone().inner().as_dispatch() {
        return tensors::takes(device, dtype).then(|| device.client());
    }
    let _ = (device, dtype);
    None
}

/// Runs an operation of one to three operands whose output has rank `D`.
pub fn apply<const D: usize>(op: impl DeviceOp, inputs: Vec<AnyTensor>) -> Tensor<D> {
    let op: Arc<dyn DeviceOp> = Arc::new(op);
    let mut inputs = inputs.into_iter().map(AnyTensor::into_dispatch);
    let first = inputs.next().expect("at least one operand");
    let output = match (inputs.next(), inputs.next()) {
        (None, _) => <Dispatch as DeviceOps>::device_op1(first, op),
        (Some(second), None) => <Dispatch as DeviceOps>::device_op2(first, second, op),
        (Some(second), Some(third)) => <Dispatch as DeviceOps>::device_op3(first, second, third, op),
    };
    Tensor::from_dispatch(output)
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Autodiff)]
trait DeviceOps: Backend {
    fn device_op1(a: FloatTensor<Self>, op: Arc<dyn DeviceOp>) -> FloatTensor<Self>;
    fn device_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: Arc<dyn DeviceOp>) -> FloatTensor<Self>;
    fn device_op3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: Arc<dyn DeviceOp>,
    ) -> FloatTensor<Self>;
}

/// Backends whose tensors live, in the end, in a device's memory.
trait DeviceBackend: Backend {
    /// The output, then what was saved.
    fn run(op: &Arc<dyn DeviceOp>, inputs: Vec<FloatTensor<Self>>) -> Vec<FloatTensor<Self>>;

    /// The gradients that are needed, in the order of the inputs.
    fn run_backward(kept: Kept<Self>, output_grad: FloatTensor<Self>, needed: &[bool]) -> Vec<FloatTensor<Self>>;
}

/// Everything a backward pass needs, kept until it runs. Inputs are shared handles, not copies.
#[derive(Debug, Clone)]
struct Kept<B: Backend> {
    op: Arc<dyn DeviceOp>,
    #[cfg_attr(not(feature = "fusion"), allow(dead_code, reason = "only a fused graph asks"))]
    specs: Vec<Spec>,
    inputs: Vec<FloatTensor<B>>,
    saved: Vec<FloatTensor<B>>,
}

fn specs<B: Backend>(inputs: &[FloatTensor<B>]) -> Vec<Spec> {
    inputs.iter().map(Spec::of).collect()
}

fn contiguous(tensors: Vec<CubeTensor>) -> Vec<CubeTensor> {
    tensors.into_iter().map(into_contiguous).collect()
}

fn run_on_device(op: &dyn DeviceOp, inputs: Vec<CubeTensor>) -> Vec<CubeTensor> {
    let (output, saved) = op.forward(&contiguous(inputs));
    std::iter::once(output).chain(saved).collect()
}

fn run_backward_on_device(
    op: &dyn DeviceOp,
    inputs: Vec<CubeTensor>,
    saved: &[CubeTensor],
    output_grad: CubeTensor,
    needed: &[bool],
) -> Vec<CubeTensor> {
    let grads = op.backward(&contiguous(inputs), saved, into_contiguous(output_grad), needed);
    assert!(
        grads.iter().map(Option::is_some).eq(needed.iter().copied()),
        "the gradients that are needed, and no other"
    );
    grads.into_iter().flatten().collect()
}

impl DeviceBackend for CubeBackend {
    fn run(op: &Arc<dyn DeviceOp>, inputs: Vec<CubeTensor>) -> Vec<CubeTensor> {
        run_on_device(&**op, inputs)
    }

    fn run_backward(kept: Kept<Self>, output_grad: CubeTensor, needed: &[bool]) -> Vec<CubeTensor> {
        run_backward_on_device(&*kept.op, kept.inputs, &kept.saved, output_grad, needed)
    }
}

fn untracked<B: DeviceBackend>(op: Arc<dyn DeviceOp>, inputs: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    B::run(&op, inputs).swap_remove(0)
}

impl DeviceOps for CubeBackend {
    fn device_op1(a: CubeTensor, op: Arc<dyn DeviceOp>) -> CubeTensor {
        untracked::<Self>(op, vec![a])
    }
    fn device_op2(a: CubeTensor, b: CubeTensor, op: Arc<dyn DeviceOp>) -> CubeTensor {
        untracked::<Self>(op, vec![a, b])
    }
    fn device_op3(a: CubeTensor, b: CubeTensor, c: CubeTensor, op: Arc<dyn DeviceOp>) -> CubeTensor {
        untracked::<Self>(op, vec![a, b, c])
    }
}

#[derive(Debug)]
struct DeviceOpBackward;

impl<B: DeviceBackend, const N: usize> Backward<B, N> for DeviceOpBackward {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let output_grad = grads.consume::<B>(&ops.node);
        let needed = ops.parents.each_ref().map(Option::is_some);
        let input_grads = B::run_backward(ops.state, output_grad, &needed);
        for (parent, grad) in ops.parents.into_iter().flatten().zip(input_grads) {
            grads.register::<B>(parent.id, grad);
        }
    }
}

fn tracked<B: DeviceBackend, C: CheckpointStrategy, const N: usize>(
    op: Arc<dyn DeviceOp>,
    inputs: [FloatTensor<Autodiff<B, C>>; N],
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = inputs.each_ref().map(|input| input.node());
    match DeviceOpBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            let inputs: Vec<FloatTensor<B>> = inputs.into_iter().map(|input| input.into_primitive()).collect();
            let specs = specs::<B>(&inputs);
            let kept = if op.reads_inputs() { inputs.clone() } else { vec![] };
            let mut saved = B::run(&op, inputs);
            let output = saved.remove(0);
            prepared.finish(Kept { op, specs, inputs: kept, saved }, output)
        }
        OpsKind::UnTracked(prepared) => {
            let inputs: Vec<FloatTensor<B>> = inputs.into_iter().map(|input| input.into_primitive()).collect();
            prepared.finish(untracked::<B>(op, inputs))
        }
    }
}

impl<B: DeviceBackend, C: CheckpointStrategy> DeviceOps for Autodiff<B, C> {
    fn device_op1(a: FloatTensor<Self>, op: Arc<dyn DeviceOp>) -> FloatTensor<Self> {
        tracked::<B, C, _>(op, [a])
    }
    fn device_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: Arc<dyn DeviceOp>) -> FloatTensor<Self> {
        tracked::<B, C, _>(op, [a, b])
    }
    fn device_op3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: Arc<dyn DeviceOp>,
    ) -> FloatTensor<Self> {
        tracked::<B, C, _>(op, [a, b, c])
    }
}

#[cfg(feature = "fusion")]
pub(super) use fused::queue;

/// Both passes as operations in fusion's queue, opaque to it.
#[cfg(feature = "fusion")]
mod fused {
    use std::fmt;

    use burn::backend::fusion::{
        ExecutionError, Fusion, FusionBackend, FusionRuntime,
        custom::{CustomOpIr, HandleContainer, Operation, OperationIr, StreamId, TensorIr},
    };
    use burn::tensor::Shape;

    use super::*;

    type Fused = Fusion<CubeBackend>;
    type Runtime = <CubeBackend as FusionBackend>::FusionRuntime;
    type Handles = HandleContainer<<Runtime as FusionRuntime>::FusionHandle>;
    pub(in crate::device) type Work = dyn Fn(Vec<CubeTensor>) -> Vec<CubeTensor> + Send + Sync;

    /// What is done when the queue gets there.
    struct Queued {
        inputs: Vec<TensorIr>,
        outputs: Vec<TensorIr>,
        work: Box<Work>,
    }

    impl fmt::Debug for Queued {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.debug_struct("Queued").field("outputs", &self.outputs).finish_non_exhaustive()
        }
    }

    impl Operation<Runtime> for Queued {
        fn execute(&self, handles: &mut Handles) -> Result<(), ExecutionError> {
            let inputs = self.inputs.iter().map(|input| handles.get_float_tensor::<CubeBackend>(input)).collect();
            let outputs = (self.work)(inputs);
            assert_eq!(outputs.len(), self.outputs.len(), "what was said beforehand");
            for (output, told) in outputs.into_iter().zip(&self.outputs) {
                assert_eq!(Spec::of(&output), Spec::new(told.shape.to_vec(), told.dtype), "what was said beforehand");
                handles.register_float_tensor::<CubeBackend>(&told.id, output);
            }
            Ok(())
        }
    }

    /// Puts `work` in the queue, which gives `outputs` for `inputs` when it is done.
    pub(in crate::device) fn queue(
        name: &'static str,
        inputs: Vec<FloatTensor<Fused>>,
        outputs: Vec<Spec>,
        work: Box<Work>,
    ) -> Vec<FloatTensor<Fused>> {
        let client = inputs[0].client.clone();
        let inputs: Vec<TensorIr> = inputs.into_iter().map(|input| input.into_ir()).collect();
        let outputs: Vec<TensorIr> = outputs
            .into_iter()
            .map(|spec| TensorIr::uninit(client.create_empty_handle(), Shape::from(spec.shape), spec.dtype))
            .collect();
        let description = CustomOpIr::new(name, &inputs, &outputs);
        client.register(StreamId::current(), OperationIr::Custom(description), Queued { inputs, outputs, work })
    }

    impl DeviceBackend for Fused {
        fn run(op: &Arc<dyn DeviceOp>, inputs: Vec<FloatTensor<Self>>) -> Vec<FloatTensor<Self>> {
            let (op, outputs) = (op.clone(), op.outputs(&specs::<Self>(&inputs)));
            queue("limbeck_forward", inputs, outputs, Box::new(move |inputs| run_on_device(&*op, inputs)))
        }

        fn run_backward(kept: Kept<Self>, output_grad: FloatTensor<Self>, needed: &[bool]) -> Vec<FloatTensor<Self>> {
            let (op, needed) = (kept.op, needed.to_vec());
            let outputs = kept.specs.into_iter().zip(&needed).filter_map(|(spec, needed)| needed.then_some(spec));
            let outputs = outputs.collect();
            let (input_count, saved_count) = (kept.inputs.len(), kept.saved.len());
            let operands = kept.inputs.into_iter().chain(kept.saved).chain([output_grad]).collect();
            let work = move |mut operands: Vec<CubeTensor>| {
                let output_grad = operands.pop().expect("the gradient comes last");
                let saved = operands.split_off(input_count);
                assert_eq!(saved.len(), saved_count, "what was saved");
                run_backward_on_device(&*op, operands, &saved, output_grad, &needed)
            };
            queue("limbeck_backward", operands, outputs, Box::new(work))
        }
    }

    impl DeviceOps for Fused {
        fn device_op1(a: FloatTensor<Self>, op: Arc<dyn DeviceOp>) -> FloatTensor<Self> {
            untracked::<Self>(op, vec![a])
        }
        fn device_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: Arc<dyn DeviceOp>) -> FloatTensor<Self> {
            untracked::<Self>(op, vec![a, b])
        }
        fn device_op3(
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            c: FloatTensor<Self>,
            op: Arc<dyn DeviceOp>,
        ) -> FloatTensor<Self> {
            untracked::<Self>(op, vec![a, b, c])
        }
    }
}
