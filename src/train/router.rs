//! Routers that follow a teacher's: the divergence of a student's choice of experts from what a cache has of the teacher's.
//!
//! Like every loss it is a sum over tokens, so that it does not depend on how a step is cut. Knows caches only by what is in
//! a batch, and which layers go together by their places alone.

use burn::tensor::{Tensor, TensorData, activation::log_softmax};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    models::feed_forward::Routing,
    targets::DistillBatch,
};

/// Which routers follow which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouterDistillation {
    /// Weight of KL(teacher's router || student's), in nats, averaged over the pairs.
    pub weight: f64,
    pub pairs: Vec<RouterPair>,
    /// For each of the student's experts, the teacher's that it stands for. What the teacher gives to others is left out, and
    /// the rest counts as the whole.
    pub experts: Vec<usize>,
}

/// A router of the student, and the one of the teacher that it follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterPair {
    /// Place among the student's blocks with experts.
    pub block: usize,
    /// Place among the layers whose routers the targets have.
    pub column: usize,
}

/// What the teacher's routers say of the tokens of a batch.
pub(super) struct TeacherRouting<'a> {
    config: &'a RouterDistillation,
    /// For each pair: `[tokens, experts]`, the teacher's probabilities times the weight of the token's row, and the sum of
    /// all `p ln p` of them.
    probabilities: Vec<(Vec<f32>, f64)>,
}

impl<'a> TeacherRouting<'a> {
    /// # Errors
    /// When the batch has nothing of the teacher's routers.
    pub(super) fn of_batch(config: &'a RouterDistillation, batch: &DistillBatch) -> Result<Self> {
        let Some(codes) = batch.targets.as_ref().and_then(|targets| targets.router.as_ref()) else {
            return Err(Error::usage(
                "the student's routers are to follow the teacher's, and these targets have nothing of those",
                "name layers in [cache] router_layers when the cache is made",
            ));
        };
        let (rows, seq_len) = (batch.row_count(), batch.seq_len());
        let row_weight = |row: usize| {
            let valid = batch.sequences[row / seq_len].is_valid(row % seq_len);
            let weight = batch.row_weights.as_ref().map_or(1.0, |weights| weights[row]);
            if valid { weight } else { 0.0 }
        };
        let of_pair = |pair: &RouterPair| {
            let (mut probabilities, mut entropy) = (Vec::with_capacity(rows * config.experts.len()), 0.0f64);
            for row in 0..rows {
                let all: Vec<f32> = codes.weights(row, pair.column).collect();
                let sum: f32 = config.experts.iter().map(|&expert| all[expert]).sum();
                // Of a token that goes to none of these experts, the teacher says nothing here.
                let scale = if sum > 0.0 { 1.0 / sum } else { 0.0 };
                let weight = row_weight(row);
                probabilities.extend(config.experts.iter().map(|&expert| {
                    let p = all[expert] * scale;
                    entropy += if p > 0.0 { (weight * p) as f64 * (p as f64).ln() } else { 0.0 };
                    weight * p
                }));
            }
            (probabilities, entropy)
        };
        Ok(TeacherRouting { config, probabilities: config.pairs.iter().map(of_pair).collect() })
    }

    /// KL(teacher || student) of one block's router, summed over tokens and divided by the number of pairs, before its
    /// weight, `[1]`; `None` for a block that follows no router.
    pub(super) fn divergence(&self, block: usize, routing: &Routing) -> Option<Tensor<1>> {
        let pair = self.config.pairs.iter().position(|pair| pair.block == block)?;
        let (probabilities, entropy) = &self.probabilities[pair];
        let probabilities = TensorData::new(probabilities.clone(), routing.logits.dims());
        let probabilities = Tensor::<2>::from_data(probabilities, &routing.logits.device());
        let cross_entropy = (log_softmax(routing.logits.clone(), 1) * probabilities).sum();
        Some((cross_entropy.neg() + *entropy as f32) / self.config.pairs.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::targets::{PackedSequence, RouterCodes, SparseTargets};

    /// Two sequences of two rows; of the second sequence the first row alone predicts something.
    fn batch(codes: RouterCodes) -> DistillBatch {
        let sequences = vec![
            PackedSequence { tokens: vec![1, 2, 3], segments: vec![0, 0, 0] },
            PackedSequence { tokens: vec![1, 2, 3], segments: vec![0, 0, 1] },
        ];
        let targets = SparseTargets { offsets: vec![0; 5], router: Some(codes), ..SparseTargets::empty(&[]) };
        DistillBatch { sequences, targets: Some(targets), row_weights: Some(vec![1.0, 0.5, 2.0, 1.0]) }
    }

    fn softmax(logits: &[f32]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|&z| (z as f64).exp()).sum();
        logits.iter().map(|&z| (z as f64).exp() / sum).collect()
    }

    #[test]
    fn the_divergence_and_its_gradient_are_those_of_the_definition() {
        let (experts, columns) = (4, 2);
        let value = |seed: usize| ((seed * 7 + 3) % 11) as f32 / 3.0 - 1.5;
        let teacher =
            |row: usize, column: usize| -> Vec<f32> { (0..experts).map(|e| value(row * 8 + column * 4 + e)).collect() };
        let mut codes = RouterCodes::empty(columns, experts);
        for row in 0..4 {
            (0..columns).for_each(|column| codes.push(&teacher(row, column)));
        }
        let batch = batch(codes);
        // A student of three experts, which stand for these of the teacher's; its blocks 0 and 2 follow columns 1 and 0.
        let kept = vec![0, 2, 3];
        let pairs = vec![RouterPair { block: 0, column: 1 }, RouterPair { block: 2, column: 0 }];
        let config = RouterDistillation { weight: 1.0, pairs: pairs.clone(), experts: kept.clone() };
        let routing = TeacherRouting::of_batch(&config, &batch).unwrap();
        let student: Vec<f32> = (0..12).map(|place| value(place * 5 + 2)).collect();
        let logits = Tensor::<2>::from_data(TensorData::new(student.clone(), [4, 3]), &Device::flex().autodiff());
        let logits = Routing { logits: logits.require_grad(), experts: vec![0; 4] };
        assert!(routing.divergence(1, &logits).is_none(), "block 1 follows nobody");
        for RouterPair { block, column } in pairs {
            let loss = routing.divergence(block, &logits).unwrap();
            let (mut truth, mut slopes) = (0.0, vec![]);
            for (row, weight) in [1.0, 0.5, 2.0, 0.0].into_iter().enumerate() {
                let whole = softmax(&teacher(row, column));
                let mass: f64 = kept.iter().map(|&expert| whole[expert]).sum();
                let p: Vec<f64> = kept.iter().map(|&expert| whole[expert] / mass).collect();
                let q = softmax(&student[row * 3..row * 3 + 3]);
                truth += weight * p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>() / 2.0;
                slopes.extend(p.iter().zip(&q).map(|(p, q)| weight * (q - p) / 2.0));
            }
            let found = loss.clone().into_data().convert::<f64>().try_into_vec::<f64>().unwrap()[0];
            // The teacher's probabilities are bytes.
            assert!((found - truth).abs() < 0.01 * truth, "block {block}: {found} {truth}");
            let gradients = loss.backward();
            let gradient = logits.logits.grad(&gradients).unwrap().into_data().try_into_vec::<f32>().unwrap();
            for (place, (found, truth)) in gradient.into_iter().zip(slopes).enumerate() {
                assert!((found as f64 - truth).abs() < 5e-3, "block {block}, place {place}: {found} {truth}");
            }
        }
    }

    #[test]
    fn tokens_that_go_to_experts_the_student_lacks_say_nothing() {
        let mut codes = RouterCodes::empty(1, 3);
        (0..4).for_each(|_| codes.push(&[90.0, 0.0, 0.0]));
        let config =
            RouterDistillation { weight: 1.0, pairs: vec![RouterPair { block: 0, column: 0 }], experts: vec![1, 2] };
        let batch = batch(codes);
        let routing = TeacherRouting::of_batch(&config, &batch).unwrap();
        let logits = Tensor::<2>::from_data(TensorData::new(vec![1.0f32; 8], [4, 2]), &Device::flex());
        let loss = routing.divergence(0, &Routing { logits, experts: vec![0; 4] }).unwrap();
        assert_eq!(loss.into_data().try_into_vec::<f32>().unwrap(), [0.0]);
    }

    #[test]
    fn targets_without_routers_are_refused() {
        let without = SparseTargets { offsets: vec![0; 5], ..SparseTargets::empty(&[]) };
        let batch = DistillBatch { targets: Some(without), ..batch(RouterCodes::empty(1, 1)) };
        let config = RouterDistillation { weight: 1.0, pairs: vec![], experts: vec![] };
        let error = TeacherRouting::of_batch(&config, &batch).map(|_| ()).unwrap_err().to_string();
        assert_eq!(
            error,
            "the student's routers are to follow the teacher's, and these targets have nothing of those; name layers in \
             [cache] router_layers when the cache is made"
        );
    }
}
