//! The operation as a node of the gradient's graph: on `flex` the host form, on a device that there are kernels for the
//! device's form, elsewhere the plain tensor form.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use burn::backend::{
    Autodiff, Backend, Dispatch, Flex,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::FloatTensorOps,
    tensor::FloatTensor,
};
use burn::tensor::{DType, Shape, Tensor, TensorData};
use half::bf16;

use super::{
    LossSettings, RowMeasures, RowTargets, RowWeights,
    host::{self, HostMatrix, Wanted},
    logits,
};
use crate::{host_op, profile};

/// The weights of a row, kept by a node of the graph.
pub type SharedWeigh = Arc<dyn Fn(usize, &RowMeasures) -> RowWeights + Send + Sync>;

/// Measures and weights of each row that has a target.
pub type Found = Vec<Option<(RowMeasures, RowWeights)>>;

/// The loss of T rows.
#[derive(Debug)]
pub struct LinearDistill {
    /// `sum_t [ w_soft c d + w_hard ce ]`, `[1]`: what to call `backward` on.
    pub loss: Tensor<1>,
    /// The same, in f64.
    pub value: f64,
    /// Measures and weights of each row that has a target.
    pub rows: Found,
}

/// Loss of `hidden` under `lm_head`, with gradients in both.
///
/// # Shapes
/// - `hidden` `[T, D]`, `lm_head` `[V, D]`, targets of T rows; both f32, or both bf16
///
/// Tensors that are not tracked get no gradient, and none is computed for them.
///
/// # Panics
/// When shapes do not fit, or an id lies beyond the vocabulary: [`RowTargets::check`] says so without a panic.
pub fn linear_distill(
    hidden: Tensor<2>,
    lm_head: Tensor<2>,
    targets: Arc<RowTargets>,
    settings: LossSettings,
    weigh: SharedWeigh,
) -> LinearDistill {
    if !has_node(&hidden) {
        return linear_distill_reference(hidden, lm_head, &targets, &settings, &weigh);
    }
    let job = Arc::new(Job { targets, settings, weigh, done: Mutex::default() });
    let loss =
        <Dispatch as LinearDistillOps>::linear_distill(hidden.into_dispatch(), lm_head.into_dispatch(), job.clone());
    let (value, rows) = std::mem::take(&mut *job.done.lock().expect("the operation has run"));
    LinearDistill { loss: Tensor::from_dispatch(loss), value, rows }
}

/// Whether there is more than plain tensor operations for these operands.
fn has_node(hidden: &Tensor<2>) -> bool {
    #[cfg(feature = "device")]
    if crate::device::op::runs_on(&hidden.device(), hidden.dtype()) {
        return true;
    }
    host_op::runs_on(&hidden.device())
}

/// [`linear_distill`] in plain tensor operations, with the logits of all rows in memory.
pub fn linear_distill_reference(
    hidden: Tensor<2>,
    lm_head: Tensor<2>,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &SharedWeigh,
) -> LinearDistill {
    let logits = hidden.matmul(lm_head.transpose());
    distill_logits(logits, targets, settings, weigh)
}

/// The same loss of logits that are there already.
///
/// # Shapes
/// - `logits` `[T, V]`, targets of T rows
pub fn distill_logits(
    logits: Tensor<2>,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &SharedWeigh,
) -> LinearDistill {
    let (value, found, slope) = slopes(logits, targets, settings, weigh);
    let slope = slope.sum();
    // A sum whose gradient is the one that was computed, moved to where its value is the loss.
    let loss = slope.clone() - slope.detach() + value;
    LinearDistill { loss, value, rows: found }
}

/// What each row's loss is, and a number per row whose gradient in the logits is that loss's.
///
/// # Shapes
/// - `logits` `[T, V]`, targets of T rows; result `[T]`
pub fn row_slopes(
    logits: Tensor<2>,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &SharedWeigh,
) -> (Found, Tensor<1>) {
    let (_, found, slope) = slopes(logits, targets, settings, weigh);
    (found, slope)
}

fn slopes(
    logits: Tensor<2>,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &SharedWeigh,
) -> (f64, Found, Tensor<1>) {
    let ([rows, vocab], device, dtype) = (logits.dims(), logits.device(), logits.dtype());
    assert_eq!(rows, targets.row_count(), "one row of targets per row of logits");
    let data = logits.clone().inner().into_data().convert::<f32>();
    let mut values = data.try_into_vec::<f32>().expect("converted to f32");
    let (value, found) =
        logits::finish_logits(&mut values, vocab, targets, settings, &|row, measures| weigh(row, measures));
    let gradient = Tensor::<2>::from_data(TensorData::new(values, [rows, vocab]), &device).cast(dtype);
    (value, found, (logits * gradient).sum_dim(1).reshape([rows]))
}

/// One call, and what it found beside the loss.
pub(super) struct Job {
    pub(super) targets: Arc<RowTargets>,
    pub(super) settings: LossSettings,
    pub(super) weigh: SharedWeigh,
    pub(super) done: Mutex<(f64, Found)>,
}

impl fmt::Debug for Job {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Job").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[backend_extension(Flex, Cube: cfg(any(feature = "wgpu", feature = "cuda")), Autodiff)]
pub(super) trait LinearDistillOps: Backend {
    fn linear_distill(hidden: FloatTensor<Self>, lm_head: FloatTensor<Self>, job: Arc<Job>) -> FloatTensor<Self>;
}

/// Backends that compute loss and gradients in one go.
pub(super) trait LinearDistillBackend: Backend {
    fn run(
        hidden: FloatTensor<Self>,
        lm_head: FloatTensor<Self>,
        job: &Job,
        wanted: Wanted,
    ) -> (FloatTensor<Self>, Grads<Self>);

    /// `gradient` times the single number in `factor`.
    fn scale(gradient: FloatTensor<Self>, factor: &FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Gradients of hidden states and head at a loss of weight 1.
#[derive(Debug, Clone)]
pub(super) struct Grads<B: Backend> {
    pub(super) hidden: Option<FloatTensor<B>>,
    pub(super) lm_head: Option<FloatTensor<B>>,
}

type FlexTensor = FloatTensor<Flex>;

fn host_matrix(tensor: &FlexTensor) -> HostMatrix<'_> {
    match tensor.dtype() {
        DType::BF16 => HostMatrix::Bf16(tensor.as_slice::<bf16>().expect("made contiguous bf16")),
        _ => HostMatrix::F32(tensor.as_slice::<f32>().expect("made contiguous f32")),
    }
}

fn like(gradient: Vec<f32>, tensor: &FlexTensor) -> FlexTensor {
    let shape = Shape::from(tensor.layout().shape().to_vec());
    match tensor.dtype() {
        DType::BF16 => {
            let narrow: Vec<bf16> = gradient.into_iter().map(bf16::from_f32).collect();
            FlexTensor::from_data(TensorData::new(narrow, shape))
        }
        _ => FlexTensor::from_data(TensorData::new(gradient, shape)),
    }
}

impl LinearDistillBackend for Flex {
    fn run(hidden: FlexTensor, lm_head: FlexTensor, job: &Job, wanted: Wanted) -> (FlexTensor, Grads<Flex>) {
        assert!(matches!(hidden.dtype(), DType::F32 | DType::BF16), "hidden states are f32 or bf16");
        assert_eq!(hidden.dtype(), lm_head.dtype(), "hidden states and head have one type");
        let (hidden, lm_head) = (hidden.to_contiguous(), lm_head.to_contiguous());
        let width = lm_head.layout().shape()[1];
        let _span = profile::op("fused loss").with("rows", job.targets.row_count() as u64);
        let weigh = |row: usize, measures: &RowMeasures| (job.weigh)(row, measures);
        let output =
            host::run(host_matrix(&hidden), host_matrix(&lm_head), width, &job.targets, &job.settings, &weigh, wanted);
        *job.done.lock().expect("one call at a time") = (output.loss, output.rows);
        let loss = FlexTensor::from_data(TensorData::new(vec![output.loss as f32], Shape::from(vec![1])));
        let grads = Grads {
            hidden: output.hidden_grad.map(|gradient| like(gradient, &hidden)),
            lm_head: output.lm_head_grad.map(|gradient| like(gradient, &lm_head)),
        };
        (loss, grads)
    }

    fn scale(gradient: FlexTensor, factor: &FlexTensor) -> FlexTensor {
        let factor = factor.to_contiguous().as_slice::<f32>().expect("the loss is f32")[0];
        // A loss that is itself what `backward` starts from: nothing to do to a gradient as large as the head.
        if factor == 1.0 { gradient } else { Flex::float_mul_scalar(gradient, factor.into()) }
    }
}

impl LinearDistillOps for Flex {
    fn linear_distill(hidden: FlexTensor, lm_head: FlexTensor, job: Arc<Job>) -> FlexTensor {
        Self::run(hidden, lm_head, &job, Wanted::NOTHING).0
    }
}

#[derive(Debug)]
struct LinearDistillBackward;

impl<B: LinearDistillBackend> Backward<B, 2> for LinearDistillBackward {
    type State = Grads<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let output_grad = grads.consume::<B>(&ops.node);
        let [hidden, lm_head] = ops.parents;
        for (parent, gradient) in [(hidden, ops.state.hidden), (lm_head, ops.state.lm_head)] {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, B::scale(gradient, &output_grad));
            }
        }
    }
}

impl<B: LinearDistillBackend, C: CheckpointStrategy> LinearDistillOps for Autodiff<B, C> {
    fn linear_distill(hidden: FloatTensor<Self>, lm_head: FloatTensor<Self>, job: Arc<Job>) -> FloatTensor<Self> {
        let wanted = Wanted { hidden: hidden.is_tracked(), lm_head: lm_head.is_tracked() };
        let nodes = [hidden.node(), lm_head.node()];
        match LinearDistillBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let (loss, grads) = B::run(hidden.into_primitive(), lm_head.into_primitive(), &job, wanted);
                prepared.finish(grads, loss)
            }
            OpsKind::UnTracked(prepared) => {
                prepared.finish(B::run(hidden.into_primitive(), lm_head.into_primitive(), &job, Wanted::NOTHING).0)
            }
        }
    }
}
