//! Halves of a block, in the form their weights have: packed ones go through the kernels that keep what lies between
//! their operations in cache, tensors through operations of the graph.

use burn::tensor::{Device, Tensor, TensorData};
use limbeck_kernels::{
    packed_layer::{self, Result as Outcome},
    rms_norm::rms_norm,
};

use super::{
    attention::Attention,
    feed_forward::{FeedForward, Routing},
    layout::TokenLayout,
};

/// The weight of a norm and its epsilon.
pub(super) type Norm<'a> = (&'a Tensor<1>, f32);

/// All of a dense block with packed weights; the hidden states as they were for any other.
///
/// # Shapes
/// - `hidden` and result `[N, hidden]`
#[expect(clippy::result_large_err, reason = "the argument, given back untouched")]
pub(super) fn block(
    hidden: Tensor<2>,
    norms: [Norm<'_>; 2],
    attention: &Attention,
    feed_forward: &FeedForward,
    layout: &TokenLayout,
) -> Result<Tensor<2>, Tensor<2>> {
    let FeedForward::Dense(mlp) = feed_forward else { return Err(hidden) };
    // Asked first, for reading a tensor waits for its device.
    if !attention.is_packed() {
        return Err(hidden);
    }
    let [first, second] = norms.map(|(norm, eps)| (numbers(norm.clone()), eps));
    let vectors = attention.vectors(layout);
    let halves = (attention.packed((&first.0, first.1), &vectors, layout), mlp.packed(&second.0, second.1));
    let (Some(attention), Some(feed_forward)) = halves else { return Err(hidden) };
    Ok(in_place(hidden, |hidden| packed_layer::attend(hidden, &attention, Some(&feed_forward), Outcome::Added)))
}

/// Hidden states after the attention half.
///
/// # Shapes
/// - `hidden` and result `[N, hidden]`
pub(super) fn attended(hidden: Tensor<2>, attention: &Attention, norm: Norm<'_>, layout: &TokenLayout) -> Tensor<2> {
    match packed_attention(hidden, attention, norm, layout, Outcome::Added) {
        Ok(hidden) => hidden,
        Err(hidden) => hidden.clone() + attention.forward(rms_norm(hidden, norm.0.clone(), norm.1), layout),
    }
}

/// What the attention half adds to the hidden states.
///
/// # Shapes
/// - `hidden` and result `[N, hidden]`
pub(super) fn attention_update(
    hidden: Tensor<2>,
    attention: &Attention,
    norm: Norm<'_>,
    layout: &TokenLayout,
) -> Tensor<2> {
    match packed_attention(hidden, attention, norm, layout, Outcome::Instead) {
        Ok(update) => update,
        Err(hidden) => attention.forward(rms_norm(hidden, norm.0.clone(), norm.1), layout),
    }
}

#[expect(clippy::result_large_err, reason = "the argument, given back untouched")]
fn packed_attention(
    hidden: Tensor<2>,
    attention: &Attention,
    (norm, eps): Norm<'_>,
    layout: &TokenLayout,
    outcome: Outcome,
) -> Result<Tensor<2>, Tensor<2>> {
    if !attention.is_packed() {
        return Err(hidden);
    }
    let (norm, vectors) = (numbers(norm.clone()), attention.vectors(layout));
    match attention.packed((&norm, eps), &vectors, layout) {
        Some(half) => Ok(in_place(hidden, |hidden| packed_layer::attend(hidden, &half, None, outcome))),
        None => Err(hidden),
    }
}

/// What the feed-forward half adds to the hidden states after the attention half.
///
/// # Shapes
/// - `attended` and result `[N, hidden]`
pub(super) fn feed_forward_update(
    attended: Tensor<2>,
    feed_forward: &FeedForward,
    (norm, eps): Norm<'_>,
) -> (Tensor<2>, Option<Routing>) {
    if let FeedForward::Dense(mlp) = feed_forward
        && mlp.is_packed()
    {
        let weight = numbers(norm.clone());
        if let Some(half) = mlp.packed(&weight, eps) {
            let update = |hidden: &mut [f32]| packed_layer::feed_forward(hidden, &half, Outcome::Instead);
            return (in_place(attended, update), None);
        }
    }
    feed_forward.forward(rms_norm(attended, norm.clone(), eps))
}

/// Changes a tensor of the processor. Its memory is moved and not copied where nobody else has it.
fn in_place(tensor: Tensor<2>, change: impl FnOnce(&mut [f32])) -> Tensor<2> {
    let shape = tensor.dims();
    let mut values = numbers(tensor);
    change(&mut values);
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// The numbers of a tensor of the processor.
pub(super) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().expect("models compute in f32")
}
