//! Attention on a device: the kernels of [`cube::attention`](super::cube::attention) and
//! [`cube::attention_gradients`](super::cube::attention_gradients), with memory in proportion to the tokens.

use burn::tensor::{DType, Device};
use burn_cubecl::{
    cubecl::{prelude::*, server::Handle},
    tensor::CubeTensor,
};

use super::{
    cube::{
        attention::{AttentionPlan, attention_forward},
        attention_gradients::{ROWS, attention_key_gradients, attention_query_gradient, row_numbers},
        plans::Plans,
    },
    op::{DeviceOp, Spec, client},
    tensors::{address, buffer, cube_dim, cubes, element, empty, upload, vectors, whole},
};
use crate::attention::{Heads, KeyRanges};

/// The plans for a device, or `None` where it has no kernels for such heads.
pub fn plans(device: &Device, dtype: DType, heads: Heads) -> Option<Plans> {
    Plans::fitting(client(device, dtype)?.properties(), element(dtype)?, heads)
}

/// Attention in given tiles.
#[derive(Debug, Clone)]
pub struct Attention {
    pub heads: Heads,
    pub ranges: KeyRanges,
    pub plans: Plans,
}

impl Attention {
    fn scale(&self) -> f32 {
        (self.heads.head_dim as f32).sqrt().recip()
    }

    /// Tokens, and sequences.
    fn counts(&self) -> (usize, usize) {
        let tokens = self.ranges.first_key.len();
        (tokens, tokens / self.ranges.sequence_len)
    }

    /// A cube for each tile of `rows` in a sequence, each key head and each sequence.
    fn cubes(&self, rows: usize, plan: &AttentionPlan) -> CubeCount {
        let tiles = rows.div_ceil(plan.side());
        CubeCount::Static(tiles as u32, self.heads.key_heads as u32, self.counts().1 as u32)
    }

    fn rows(&self) -> usize {
        self.ranges.sequence_len * self.heads.query_heads / self.heads.key_heads
    }

    /// Output, and the logarithm of each row's sum.
    ///
    /// # Shapes
    /// - as in [`attention`](crate::attention::attention); the logarithms `[N, query_heads]`, f32
    pub fn run(&self, query: &CubeTensor, key: &CubeTensor, value: &CubeTensor) -> (CubeTensor, CubeTensor) {
        self.check(&[query, key, value]);
        let (tokens, _) = self.counts();
        let output = empty(query, query.meta.shape().to_vec(), query.dtype);
        let log_sums = empty(query, [tokens, self.heads.query_heads], DType::F32);
        if tokens > 0 {
            let plan = self.plans.forward;
            attention_forward::launch(
                &query.client,
                self.cubes(self.rows(), &plan),
                CubeDim::new_1d(plan.tile.units() as u32),
                address(&[query]),
                self.plans.vector,
                vectors(query, self.plans.vector),
                vectors(key, self.plans.vector),
                vectors(value, self.plans.vector),
                buffer(&upload(&query.client, &self.ranges.first_key), tokens, 4),
                vectors(&output, self.plans.vector),
                whole(&log_sums),
                self.ranges.sequence_len,
                self.scale(),
                plan,
                element(query.dtype).expect("a type that there are kernels for"),
            );
        }
        (output, log_sums)
    }

    /// Gradients of query, key and value, of which only those are computed that are needed.
    pub fn gradients(
        &self,
        [query, key, value]: [&CubeTensor; 3],
        output: &CubeTensor,
        log_sums: &CubeTensor,
        output_grad: &CubeTensor,
        needed: [bool; 3],
    ) -> [Option<CubeTensor>; 3] {
        self.check(&[query, key, value]);
        let (tokens, _) = self.counts();
        let grads = [query, key, value].map(|input| empty(input, input.meta.shape().to_vec(), input.dtype));
        if tokens > 0 {
            let numbers = self.row_numbers(output, log_sums, output_grad);
            let ranges = self.upload_ranges(query);
            if needed[0] {
                self.launch_query_gradient([query, key, value], output_grad, &numbers, &ranges, &grads[0]);
            }
            if needed[1] || needed[2] {
                self.launch_key_gradients([query, key, value], output_grad, &numbers, &ranges, &grads);
            }
        }
        let mut needed = needed.into_iter();
        grads.map(|grad| needed.next().expect("three").then_some(grad))
    }

    fn row_numbers(&self, output: &CubeTensor, log_sums: &CubeTensor, output_grad: &CubeTensor) -> CubeTensor {
        let rows = self.counts().0 * self.heads.query_heads;
        let numbers = empty(output, [rows, 2], DType::F32);
        row_numbers::launch(
            &output.client,
            cubes(rows.div_ceil(ROWS)),
            cube_dim(),
            address(&[output]),
            self.plans.vector,
            vectors(output, self.plans.vector),
            vectors(output_grad, self.plans.vector),
            whole(log_sums),
            whole(&numbers),
            rows,
            self.heads.head_dim,
            element(output.dtype).expect("a type that there are kernels for"),
        );
        numbers
    }

    /// The first key of each token, then the last token that sees it.
    fn upload_ranges(&self, like: &CubeTensor) -> Handle {
        let mut both = self.ranges.first_key.to_vec();
        both.extend(last_seen(&self.ranges));
        upload(&like.client, &both)
    }

    fn launch_query_gradient(
        &self,
        [query, key, value]: [&CubeTensor; 3],
        output_grad: &CubeTensor,
        numbers: &CubeTensor,
        ranges: &Handle,
        query_grad: &CubeTensor,
    ) {
        let plan = self.plans.backward;
        attention_query_gradient::launch(
            &query.client,
            self.cubes(self.rows(), &plan),
            CubeDim::new_1d(plan.tile.units() as u32),
            address(&[query]),
            self.plans.vector,
            vectors(query, self.plans.vector),
            vectors(key, self.plans.vector),
            vectors(value, self.plans.vector),
            vectors(output_grad, self.plans.vector),
            whole(numbers),
            buffer(ranges, 2 * self.counts().0, 4),
            vectors(query_grad, self.plans.vector),
            self.ranges.sequence_len,
            self.scale(),
            plan,
            element(query.dtype).expect("a type that there are kernels for"),
        );
    }

    fn launch_key_gradients(
        &self,
        [query, key, value]: [&CubeTensor; 3],
        output_grad: &CubeTensor,
        numbers: &CubeTensor,
        ranges: &Handle,
        [_, key_grad, value_grad]: &[CubeTensor; 3],
    ) {
        let plan = self.plans.backward;
        attention_key_gradients::launch(
            &query.client,
            self.cubes(self.ranges.sequence_len, &plan),
            CubeDim::new_1d(plan.tile.units() as u32),
            address(&[query]),
            self.plans.vector,
            vectors(query, self.plans.vector),
            vectors(key, self.plans.vector),
            vectors(value, self.plans.vector),
            vectors(output_grad, self.plans.vector),
            whole(numbers),
            buffer(ranges, 2 * self.counts().0, 4),
            vectors(key_grad, self.plans.vector),
            vectors(value_grad, self.plans.vector),
            self.ranges.sequence_len,
            self.scale(),
            plan,
            element(query.dtype).expect("a type that there are kernels for"),
        );
    }

    /// The kernels trust what is said here.
    fn check(&self, inputs: &[&CubeTensor; 3]) {
        let Heads { query_heads, key_heads, head_dim } = self.heads;
        let (tokens, sequences) = self.counts();
        for (input, heads) in inputs.iter().zip([query_heads, key_heads, key_heads]) {
            assert_eq!(input.meta.shape().to_vec(), [tokens, heads * head_dim], "tokens by heads");
            assert_eq!(input.dtype, inputs[0].dtype, "query, key and value have one type");
        }
        let length = self.ranges.sequence_len;
        assert_eq!(sequences * length, tokens, "whole sequences");
        for (place, first) in self.ranges.first_key.chunks(length).enumerate() {
            let start = (place * length) as u32;
            let rises = first.windows(2).all(|pair| pair[0] <= pair[1]);
            let own = first.iter().zip(start..).all(|(&first, token)| (start..=token).contains(&first));
            assert!(rises && own, "key ranges of sequence {place} neither fall nor leave it");
        }
    }
}

/// The last token that sees each token's key.
fn last_seen(ranges: &KeyRanges) -> Vec<u32> {
    let mut last_seen = Vec::with_capacity(ranges.first_key.len());
    for (sequence, first) in ranges.first_key.chunks(ranges.sequence_len).enumerate() {
        let start = sequence * ranges.sequence_len;
        let mut end = 0;
        for key in start..start + first.len() {
            while end < first.len() && first[end] as usize <= key {
                end += 1;
            }
            last_seen.push((start + end - 1) as u32);
        }
    }
    last_seen
}

impl DeviceOp for Attention {
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec> {
        let output = inputs[0].clone();
        vec![output.clone(), output, Spec::new([self.counts().0, self.heads.query_heads], DType::F32)]
    }

    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>) {
        let (output, log_sums) = self.run(&inputs[0], &inputs[1], &inputs[2]);
        (output.clone(), vec![output, log_sums])
    }

    fn backward(
        &self,
        inputs: &[CubeTensor],
        saved: &[CubeTensor],
        output_grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let needed = [needed[0], needed[1], needed[2]];
        let inputs = [&inputs[0], &inputs[1], &inputs[2]];
        self.gradients(inputs, &saved[0], &saved[1], &output_grad, needed).into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_last_token_that_sees_a_key_is_the_one_whose_range_begins_no_later() {
        // A window of two, then two documents.
        let first_key = vec![0, 0, 1, 2, 4, 4, 6, 6];
        let ranges = KeyRanges { first_key: Arc::new(first_key.clone()), sequence_len: 4 };
        let slow =
            (0..8u32).map(|key| (key / 4 * 4..key / 4 * 4 + 4).rfind(|&t| first_key[t as usize] <= key).unwrap());
        assert_eq!(last_seen(&ranges), slow.collect::<Vec<_>>());
    }
}
