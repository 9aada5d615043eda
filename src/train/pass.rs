//! One micro-batch forward and backward: sums for the metrics, and gradients for the optimizer. Steps and guards are the
//! trainer's business.
//!
//! There are two ways to the same gradients. The whole graph of a batch keeps everything that each layer's backward pass
//! needs until it comes. Layer by layer, what is kept of a layer is its input: the batch runs forward outside any graph, and
//! then, from the last layer to the first, each is run once more with its graph, which is gone before the next one's is made
//! (Chen et al. 2016, arXiv 1604.06174, with a segment for each layer).

use burn::tensor::{Gradients, Tensor};

use super::{balance::LoadBalance, balance::RouterConfig, router::TeacherRouting, tap::Tap};
use crate::{
    error::Result,
    loss::{DistillLoss, LossOutput, distill::scalar},
    models::{Decoder, TokenLayout, feed_forward::Routing},
    profile::stage,
    targets::DistillBatch,
};

/// What a micro-batch is compared with, and under which numbers.
pub(super) struct Pass<'a> {
    pub step: u64,
    pub loss: &'a DistillLoss,
    pub router: &'a RouterConfig,
    /// Keeps the inputs of layers alone.
    pub by_layers: bool,
}

/// Sums over the tokens of a micro-batch.
pub(super) struct Sums {
    pub output: LossOutput,
    /// The load-balancing loss, unweighted, averaged over blocks; `None` for a model without experts.
    pub balance: Option<f64>,
    /// What routers are trained by beside the loss on tokens.
    pub router: f64,
    /// KL of routers from the teacher's, unweighted, averaged over pairs; `None` where none follows.
    pub router_kl: Option<f64>,
}

/// What is added up over the routers of a micro-batch.
#[derive(Default)]
struct RouterSums {
    loss: f64,
    kl: Option<f64>,
}

impl Pass<'_> {
    /// Runs one micro-batch; `gather` is given its gradients, in one piece or in several that add up. `None` when the hidden
    /// states are not finite, which no loss is defined for.
    pub fn run(
        &self,
        model: &mut Decoder,
        balance: &mut LoadBalance,
        batch: &DistillBatch,
        tap: Option<(&mut dyn Tap, &Decoder)>,
        gather: &mut dyn FnMut(&mut Decoder, Gradients),
    ) -> Result<Option<Sums>> {
        if self.by_layers {
            return self.layers(model, balance, batch, tap, gather);
        }
        let span = stage("forward").with("tokens", batch.row_count() as u64);
        let layout = TokenLayout::of_batch(&model.config, batch);
        let teacher = self.teacher(batch)?;
        let (hidden, routings) = model.forward(&layout);
        drop(span);
        self.show(tap, batch, &hidden)?;
        if !is_finite(&hidden) {
            return Ok(None);
        }
        let span = stage("loss");
        let mut output = self.loss.forward(self.step, hidden, model.lm_head(), batch)?;
        balance.count(&routings);
        let mut sum = output.sum.clone();
        let (mut router, blocks) = (RouterSums::default(), routings.len());
        for (block, routing) in routings.iter().enumerate() {
            if let Some(loss) = self.router_loss(balance, teacher.as_ref(), (block, blocks), routing, &mut router) {
                sum = sum + loss;
            }
        }
        let balance = self.balance(balance, &routings);
        output.sum = sum.clone().inner();
        drop(span);
        gather(model, backward(&sum));
        Ok(Some(Sums { output, balance, router: router.loss, router_kl: router.kl }))
    }

    fn layers(
        &self,
        model: &mut Decoder,
        balance: &mut LoadBalance,
        batch: &DistillBatch,
        tap: Option<(&mut dyn Tap, &Decoder)>,
        gather: &mut dyn FnMut(&mut Decoder, Gradients),
    ) -> Result<Option<Sums>> {
        let layout = TokenLayout::of_batch(&model.config, batch);
        let teacher = self.teacher(batch)?;
        let span = stage("forward").with("tokens", batch.row_count() as u64);
        let mut inputs = Vec::with_capacity(model.layer_count());
        let mut routings: Vec<Routing> = vec![];
        let last = {
            let frozen = model.frozen();
            let mut hidden = frozen.embed(&layout);
            for index in 0..frozen.layer_count() {
                inputs.push(hidden.clone());
                let output = frozen.layer(index, hidden, &layout);
                hidden = output.hidden;
                routings.extend(output.routing);
            }
            hidden.autodiff().require_grad()
        };
        let hidden = model.final_norm(last.clone());
        drop(span);
        self.show(tap, batch, &hidden)?;
        if !is_finite(&hidden) {
            return Ok(None);
        }
        let span = stage("loss");
        let mut output = self.loss.forward(self.step, hidden, model.lm_head(), batch)?;
        drop(span);
        let mut gradients = backward(&output.sum);
        output.sum = output.sum.inner();
        let mut slope = last.grad_remove(&mut gradients).expect("the loss depends on the hidden states");
        gather(model, gradients);
        balance.count(&routings);
        let (blocks, mut block, mut router) = (routings.len(), routings.len(), RouterSums::default());
        for index in (0..inputs.len()).rev() {
            let input = inputs.pop().expect("one for each layer").autodiff().require_grad();
            let again = model.layer(index, input.clone(), &layout);
            // The gradient of this product in the layer's output is the one that came from above.
            let mut sum = (again.hidden * Tensor::from_inner(slope)).sum();
            if let Some(routing) = &again.routing {
                block -= 1;
                if let Some(loss) = self.router_loss(balance, teacher.as_ref(), (block, blocks), routing, &mut router) {
                    sum = sum + loss;
                }
            }
            let mut gradients = backward(&sum);
            slope = input.grad_remove(&mut gradients).expect("a layer's output depends on its input");
            gather(model, gradients);
        }
        let sum = (model.embed(&layout) * Tensor::from_inner(slope)).sum();
        gather(model, backward(&sum));
        let balance = self.balance(balance, &routings);
        Ok(Some(Sums { output, balance, router: router.loss, router_kl: router.kl }))
    }

    fn teacher(&self, batch: &DistillBatch) -> Result<Option<TeacherRouting<'_>>> {
        self.router.follow.as_ref().map(|config| TeacherRouting::of_batch(config, batch)).transpose()
    }

    /// What the router of a block is trained by beside the loss on tokens, `[1]`; `block` is its place and the number of all.
    fn router_loss(
        &self,
        balance: &LoadBalance,
        teacher: Option<&TeacherRouting<'_>>,
        (block, blocks): (usize, usize),
        routing: &Routing,
        sums: &mut RouterSums,
    ) -> Option<Tensor<1>> {
        let mut loss = balance.router_loss(self.router, block, blocks, routing);
        if let (Some(kl), Some(config)) =
            (teacher.and_then(|teacher| teacher.divergence(block, routing)), &self.router.follow)
        {
            *sums.kl.get_or_insert(0.0) += scalar(&kl);
            let kl = kl * config.weight;
            loss = Some(match loss {
                Some(loss) => loss + kl,
                None => kl,
            });
        }
        sums.loss += loss.as_ref().map_or(0.0, scalar);
        loss
    }

    fn show(&self, tap: Option<(&mut dyn Tap, &Decoder)>, batch: &DistillBatch, hidden: &Tensor<2>) -> Result<()> {
        match tap {
            Some((tap, model)) => tap.take(self.step + 1, batch, hidden.clone().inner(), model),
            None => Ok(()),
        }
    }

    fn balance(&self, balance: &LoadBalance, routings: &[Routing]) -> Option<f64> {
        let losses = routings.iter().enumerate().map(|(block, routing)| {
            let routing = Routing { logits: routing.logits.clone().detach(), experts: routing.experts.clone() };
            scalar(&balance.block_loss(block, &routing))
        });
        (!routings.is_empty()).then(|| losses.sum::<f64>() / routings.len() as f64)
    }
}

fn backward(sum: &Tensor<1>) -> Gradients {
    let _span = stage("backward");
    sum.backward()
}

/// Whether all of some normed hidden states are numbers: their sum is one then, for none of them is large.
fn is_finite(hidden: &Tensor<2>) -> bool {
    scalar(&hidden.clone().inner().sum()).is_finite()
}
