//! The device form behind the node of the graph, with burn's fusion and without.

use burn::{
    backend::ops::FloatTensorOps,
    tensor::{DType, Shape, TensorData},
};
use burn_cubecl::{CubeBackend, ops::into_data_sync, tensor::CubeTensor};

use super::{
    RowMeasures, device,
    graph::{Grads, Job, LinearDistillBackend, LinearDistillOps},
    host::Wanted,
};

impl LinearDistillBackend for CubeBackend {
    fn run(hidden: CubeTensor, lm_head: CubeTensor, job: &Job, wanted: Wanted) -> (CubeTensor, Grads<Self>) {
        let at = hidden.device.clone();
        let weigh = |row: usize, measures: &RowMeasures| (job.weigh)(row, measures);
        let (output, (hidden, lm_head)) = device::run(hidden, lm_head, &job.targets, &job.settings, &weigh, wanted);
        let loss = Self::float_from_data(TensorData::new(vec![output.loss as f32], Shape::from(vec![1])), &at);
        *job.done.lock().expect("one call at a time") = (output.loss, output.rows);
        (loss, Grads { hidden, lm_head })
    }

    fn scale(gradient: CubeTensor, factor: &CubeTensor) -> CubeTensor {
        assert_eq!(factor.dtype, DType::F32, "the loss is f32");
        let factor = into_data_sync(factor.clone()).try_into_vec::<f32>().expect("the loss is f32")[0];
        // A loss that is itself what `backward` starts from: nothing to do to a gradient as large as the head.
        if factor == 1.0 { gradient } else { Self::float_mul_scalar(gradient, factor.into()) }
    }
}

impl LinearDistillOps for CubeBackend {
    fn linear_distill(hidden: CubeTensor, lm_head: CubeTensor, job: std::sync::Arc<Job>) -> CubeTensor {
        Self::run(hidden, lm_head, &job, Wanted::NOTHING).0
    }
}

/// What the host decides after the first pass depends on what the device computed, so the operation cannot wait in
/// fusion's queue: it asks for its operands, runs, and hands back tensors that are there.
#[cfg(feature = "fusion")]
mod fused {
    use burn::backend::{
        TensorMetadata,
        fusion::{Fusion, NoOp, get_client, stream::StreamId},
        ir::{BackendIr, InitOperationIr, OperationIr, OperationOutput},
        tensor::FloatTensor,
    };

    use super::*;

    type Fused = Fusion<CubeBackend>;

    fn resolve(tensor: FloatTensor<Fused>) -> CubeTensor {
        tensor.client.clone().resolve_tensor_float::<CubeBackend>(tensor)
    }

    fn register(tensor: CubeTensor) -> FloatTensor<Fused> {
        let client = get_client::<CubeBackend>(&tensor.device);
        let (shape, dtype) = (tensor.shape(), tensor.dtype);
        let handle = CubeBackend::float_tensor_handle(tensor);
        let operation = InitOperationIr::create(shape, dtype, || client.register_tensor_handle(handle));
        client.register(StreamId::current(), OperationIr::Init(operation), NoOp::<CubeBackend>::new()).output()
    }

    impl LinearDistillBackend for Fused {
        fn run(
            hidden: FloatTensor<Self>,
            lm_head: FloatTensor<Self>,
            job: &Job,
            wanted: Wanted,
        ) -> (FloatTensor<Self>, Grads<Self>) {
            let (loss, grads) = CubeBackend::run(resolve(hidden), resolve(lm_head), job, wanted);
            let grads = Grads { hidden: grads.hidden.map(register), lm_head: grads.lm_head.map(register) };
            (register(loss), grads)
        }

        fn scale(gradient: FloatTensor<Self>, factor: &FloatTensor<Self>) -> FloatTensor<Self> {
            register(CubeBackend::scale(resolve(gradient), &resolve(factor.clone())))
        }
    }

    impl LinearDistillOps for Fused {
        fn linear_distill(
            hidden: FloatTensor<Self>,
            lm_head: FloatTensor<Self>,
            job: std::sync::Arc<Job>,
        ) -> FloatTensor<Self> {
            Self::run(hidden, lm_head, &job, Wanted::NOTHING).0
        }
    }
}
