//! The one place where the vocabulary is touched: the log-sum-exp of each row of logits and a few of its entries.
//!
//! Every loss is a function of these; its gradient in the logits is one multiple of the row's softmax plus a few
//! sparse corrections, whatever the divergence.

use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;
use std::sync::Arc;

use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    vector_math::{log_sum_exp, scaled_exp},
};

/// Column 0 of the result is the row's log-sum-exp, column `1 + j` its entry `ids[row][j]`.
///
/// # Shapes
/// - `logits` `[N, V]`, `ids` `[N, K]` row-major, result `[N, 1 + K]`
pub fn logsumexp_gather(logits: Tensor<2>, ids: Arc<Vec<u32>>) -> Tensor<2> {
    if host_op::runs_on(&logits.device()) {
        return host_op::apply(LogsumexpGather { ids }, vec![logits.into()]);
    }
    logsumexp_gather_reference(logits, &ids)
}

/// [`logsumexp_gather`] in plain tensor operations.
pub fn logsumexp_gather_reference(logits: Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let [rows, _] = logits.dims();
    let kept = ids.len() / rows;
    let ids: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, kept]), &logits.device());
    let largest = logits.clone().detach().max_dim(1);
    let sums = (logits.clone() - largest.clone()).exp().sum_dim(1).log() + largest;
    Tensor::cat(vec![sums, logits.gather(1, ids)], 1)
}

#[derive(Debug)]
struct LogsumexpGather {
    ids: Arc<Vec<u32>>,
}

impl HostOp for LogsumexpGather {
    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let logits = inputs[0];
        let (rows, vocab) = (logits.shape[0], logits.width());
        let kept = self.ids.len() / rows;
        let mut output = vec![0.0; rows * (1 + kept)];
        output.par_chunks_mut(1 + kept).zip(logits.data.par_chunks(vocab)).zip(self.ids.par_chunks(kept)).for_each(
            |((output, logits), ids)| {
                output[0] = log_sum_exp(logits);
                for (output, &id) in output[1..].iter_mut().zip(ids) {
                    *output = logits[id as usize];
                }
            },
        );
        let saved = output.iter().step_by(1 + kept).copied().collect();
        Forward { shape: vec![rows, 1 + kept], data: output, saved }
    }

    fn backward(
        &self,
        inputs: &[HostArray<'_>],
        saved: &[f32],
        grad: &[f32],
        needed: &[bool],
    ) -> Vec<Option<Vec<f32>>> {
        if !needed[0] {
            return vec![None];
        }
        let logits = inputs[0];
        let vocab = logits.width();
        let kept = self.ids.len() / logits.shape[0];
        let mut logits_grad = vec![0.0; logits.data.len()];
        logits_grad.par_chunks_mut(vocab).enumerate().for_each(|(row, logits_grad)| {
            let grad = &grad[row * (1 + kept)..][..1 + kept];
            if grad[0] != 0.0 {
                scaled_exp(&logits.data[row * vocab..][..vocab], saved[row], grad[0], logits_grad);
            }
            for (&id, grad) in self.ids[row * kept..][..kept].iter().zip(&grad[1..]) {
                logits_grad[id as usize] += grad;
            }
        });
        vec![Some(logits_grad)]
    }
}
