//! One rank's part of a model, and how tokens pass it: stages hand hidden states on, summands of matrices that were cut
//! meet, and tokens travel to the experts they chose and back. The layers themselves are those of one device.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use super::{
    dispatch::{Dispatch, Work},
    slices::Slices,
};
use crate::{
    error::Result,
    models::{
        DecoderConfig, Expert, Layer, RoutedLayer, TokenLayout, WeightSource,
        config::FeedForwardConfig,
        ends::{EmbeddingBlock, FinalNorm, HeadBlock},
        llama4::sharding,
    },
    parallel::{Axis, Collective, Group, Mesh, Place, message::values},
    targets::DistillBatch,
};

/// What a rank has of a model.
pub(super) struct RankModel {
    /// With this rank's numbers of heads, and its widths.
    config: DecoderConfig,
    device: Device,
    /// Of the first stage.
    embedding: Option<EmbeddingBlock>,
    layers: Vec<RankLayer>,
    /// Of the last stage.
    head: Option<(FinalNorm, HeadBlock)>,
    /// Most rows that an expert multiplies at once.
    piece: usize,
}

enum RankLayer {
    Dense(Box<Layer>),
    /// With those of the experts that the rank has.
    Routed(Box<RoutedLayer>, Vec<Expert>, Dispatch),
}

/// The ranks that a rank talks to while tokens pass.
pub(super) struct Neighbours<'a> {
    pub world: &'a dyn Collective,
    mesh: Mesh,
    place: Place,
    pub tensor: Group<'a>,
    pub expert: Group<'a>,
    /// Those that have the layers before and after this one's.
    pub previous: Option<usize>,
    pub next: Option<usize>,
}

impl<'a> Neighbours<'a> {
    pub(super) fn new(world: &'a dyn Collective, mesh: &Mesh) -> Self {
        let place = mesh.place(world.rank());
        let stage = |stage: Option<usize>| {
            let stage = stage.filter(|&stage| stage < mesh.pipeline)?;
            Some(mesh.rank(place.with(Axis::Pipeline, stage)))
        };
        Neighbours {
            world,
            mesh: *mesh,
            place,
            tensor: Group::new(world, mesh.group(place, Axis::Tensor)),
            expert: Group::new(world, mesh.group(place, Axis::Expert)),
            previous: stage(place.pipeline.checked_sub(1)),
            next: stage(Some(place.pipeline + 1)),
        }
    }

    /// The experts of each rank of the group that has those of a layer.
    pub(super) fn owners(&self, expert_count: usize) -> Vec<Range<usize>> {
        owners(expert_count, &self.mesh, self.place)
    }
}

impl RankModel {
    /// Loads the slices of one rank, and nothing else.
    pub(super) fn load(
        config: &DecoderConfig,
        mesh: Mesh,
        place: Place,
        source: &dyn WeightSource,
        device: &Device,
        piece: usize,
    ) -> Result<Self> {
        let own = sharding::own_config(config, &mesh, place);
        let slices = Slices { source, config, mesh, place };
        let ids = sharding::vocabulary(config, &mesh, place);
        let embedding = match place.pipeline {
            0 => Some(EmbeddingBlock::load(config, ids.clone(), source, device)?),
            _ => None,
        };
        let load = |index: usize| {
            Ok(match own.layers[index].feed_forward {
                FeedForwardConfig::Dense { .. } => {
                    RankLayer::Dense(Box::new(Layer::load_for_inference(&own, index, &slices, device)?))
                }
                FeedForwardConfig::Experts { expert_count, chosen, .. } => {
                    let layer = RoutedLayer::load(&own, index, &slices, device)?;
                    let experts = sharding::experts(expert_count, &mesh, place);
                    let experts = experts.map(|expert| Expert::load(&own, index, expert, &slices, device));
                    let dispatch = Dispatch { owners: owners(expert_count, &mesh, place), chosen };
                    RankLayer::Routed(Box::new(layer), experts.collect::<Result<_>>()?, dispatch)
                }
            })
        };
        let layers = sharding::layers(config, &mesh, place).map(load).collect::<Result<_>>()?;
        let head = if place.pipeline + 1 == mesh.pipeline {
            let block = match &embedding {
                Some(embedding) if config.tied => embedding.head(),
                _ => HeadBlock::load(config, ids, source, device)?,
            };
            Some((FinalNorm::load(config, source, device)?, block))
        } else {
            None
        };
        Ok(RankModel { config: own, device: device.clone(), embedding, layers, head, piece })
    }

    /// Takes a batch through this rank's layers. Gives the hidden states where this is the last stage and the batch has
    /// tokens; a rank without tokens of its own serves its experts to others all the same.
    pub(super) fn forward(&self, neighbours: &Neighbours<'_>, batch: &DistillBatch) -> Result<Option<Tensor<2>>> {
        let layout = (batch.row_count() > 0).then(|| TokenLayout::of_batch(&self.config, batch));
        let mut hidden = match (&layout, &self.embedding, neighbours.previous) {
            (None, _, _) => None,
            (Some(layout), Some(embedding), _) => Some(self.sum(&neighbours.tensor, embedding.rows(&layout.ids))?),
            (Some(_), None, previous) => {
                let previous = previous.expect("a stage without an embedding has one before it");
                Some(self.tensor(values(&neighbours.world.receive(previous)?)))
            }
        };
        for layer in &self.layers {
            hidden = self.layer(neighbours, layer, hidden, layout.as_ref())?;
        }
        if let (Some(next), Some(hidden)) = (neighbours.next, &hidden) {
            neighbours.world.send(next, bytemuck::cast_slice(&numbers(hidden.clone())).to_vec())?;
            return Ok(None);
        }
        Ok(hidden)
    }

    fn layer(
        &self,
        neighbours: &Neighbours<'_>,
        layer: &RankLayer,
        hidden: Option<Tensor<2>>,
        layout: Option<&TokenLayout>,
    ) -> Result<Option<Tensor<2>>> {
        let attended = match (hidden, layout) {
            (Some(hidden), Some(layout)) => {
                let update = match layer {
                    RankLayer::Dense(layer) => layer.attention_update(hidden.clone(), layout),
                    RankLayer::Routed(layer, ..) => layer.attention_update(hidden.clone(), layout),
                };
                Some(hidden + self.sum(&neighbours.tensor, update)?)
            }
            _ => None,
        };
        let update = match (layer, &attended) {
            (RankLayer::Dense(_), None) => None,
            (RankLayer::Dense(layer), Some(attended)) => Some(layer.feed_forward_update(attended.clone()).0),
            (RankLayer::Routed(layer, experts, dispatch), attended) => {
                let run = |work: Work| Ok(self.routed(layer, &experts[work.expert], &work));
                let tokens = attended.as_ref().map(|attended| {
                    let choices = layer.choose(attended.clone());
                    (choices, numbers(attended.clone()))
                });
                let routed = dispatch.run(&neighbours.expert, self.config.hidden_size, tokens, run)?;
                attended.as_ref().map(|attended| {
                    // In the order of the experts' numbers, as on one device.
                    let shared = layer.shared(attended.clone());
                    routed.into_iter().fold(shared, |update, output| update + self.tensor(output))
                })
            }
        };
        Ok(match (attended, update) {
            (Some(attended), Some(update)) => Some(attended + self.sum(&neighbours.tensor, update)?),
            _ => None,
        })
    }

    /// What an expert gives, a piece after the other.
    fn routed(&self, layer: &RoutedLayer, expert: &Expert, work: &Work) -> Vec<f32> {
        let mut output = Vec::with_capacity(work.rows.len());
        let pieces = work.rows.chunks(self.piece * self.config.hidden_size).zip(work.scores.chunks(self.piece));
        for (rows, scores) in pieces {
            output.extend(numbers(layer.routed(expert, self.tensor(rows.to_vec()), scores.to_vec())));
        }
        output
    }

    /// Logits of the ids that this rank has.
    ///
    /// # Shapes
    /// - `hidden` `[N, hidden]` before the final norm, result `[N, ids]` row-major
    ///
    /// # Panics
    /// When this is not the last stage.
    pub(super) fn logits(&self, hidden: Tensor<2>) -> Vec<f32> {
        let (norm, head) = self.head.as_ref().expect("the last stage has the head");
        numbers(head.logits(norm.forward(hidden)))
    }

    /// The sum of the ranks' summands.
    fn sum(&self, group: &Group<'_>, summand: Tensor<2>) -> Result<Tensor<2>> {
        if group.size() == 1 {
            return Ok(summand);
        }
        let mut sum = numbers(summand);
        group.all_reduce(&mut sum)?;
        Ok(self.tensor(sum))
    }

    fn tensor(&self, values: Vec<f32>) -> Tensor<2> {
        let width = self.config.hidden_size;
        let rows = values.len() / width;
        Tensor::from_data(TensorData::new(values, [rows, width]), &self.device)
    }
}

/// The experts of each rank that differs from a place along that axis alone.
fn owners(expert_count: usize, mesh: &Mesh, place: Place) -> Vec<Range<usize>> {
    (0..mesh.expert).map(|expert| sharding::experts(expert_count, mesh, place.with(Axis::Expert, expert))).collect()
}

fn numbers(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().expect("hidden states and logits are f32")
}
