//! `student.init`: a new student that begins with layers of a model that is there.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::schema::{Recipe, Shape, ShapeName};
use crate::{
    checkpoint::read_configuration,
    error::Result,
    models::{
        DecoderConfig, RandomWeights, read_config,
        upcycling::{Upcycling, evenly_spaced},
    },
};

/// `student.init`: which model, and which of its layers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentInit {
    /// A model directory, a GGUF file or a model on the hub.
    pub from: PathBuf,
    /// Numbers of its layers, from 0, in the student's order. Default: all, or `shape.layers` of them, evenly spaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Routed experts in a mixture layer, as `shape.experts`. Default: the model's own, else the shape's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
}

pub(super) fn check(recipe: &Recipe, init: &StudentInit, shape: &Shape) -> Result<()> {
    if let Some(experts) = init.experts {
        recipe.positive("student.init.experts", experts as u64)?;
        if shape.like == ShapeName::Llama {
            let problem = "is for students with experts, and this one is like `llama`";
            return Err(recipe.error("student.init.experts", problem, "remove it, or use like = \"scout\""));
        }
        if shape.experts.is_some_and(|own| own != experts) {
            let problem = format!("is {experts}, but `student.shape.experts` is {}", shape.experts.unwrap_or_default());
            return Err(recipe.error("student.init.experts", problem, "give only one of the two"));
        }
    }
    let Some(layers) = &init.layers else { return Ok(()) };
    if layers.is_empty() {
        return Err(recipe.error("student.init.layers", "is empty", "name layers, as in [0, 4, 8], or remove it"));
    }
    if let Some(count) = shape.layers.filter(|count| *count != layers.len()) {
        let problem = format!("has {} layers, but `student.shape.layers` is {count}", layers.len());
        return Err(recipe.error("student.init.layers", problem, "give only one of the two"));
    }
    Ok(())
}

impl Recipe {
    /// The model that a new student begins with, and its layers; `None` for one that begins at random.
    pub fn donor(&self) -> Result<Option<(DecoderConfig, Vec<usize>)>> {
        let (Some(init), Some(shape)) = (&self.student.init, &self.student.shape) else { return Ok(None) };
        let (path, config) = read_configuration(&init.from)?;
        let donor = read_config(&path, &config)?;
        let layers = match (&init.layers, shape.layers) {
            (Some(layers), _) => layers.clone(),
            (None, Some(count)) => evenly_spaced(count, donor.layers.len()),
            (None, None) => (0..donor.layers.len()).collect(),
        };
        if let Some(layer) = layers.iter().find(|layer| **layer >= donor.layers.len()) {
            let problem = format!("names layer {layer}, and {} has {}", init.from.display(), donor.layers.len());
            let tip = format!("use numbers below {}", donor.layers.len());
            return Err(self.error("student.init.layers", problem, tip));
        }
        Ok(Some((donor, layers)))
    }

    /// How the student's weights come out of its donor's; `None` for one that begins at random.
    ///
    /// # Errors
    /// When the two do not fit.
    pub fn upcycling(&self, student: &DecoderConfig) -> Result<Option<Upcycling>> {
        let Some((donor, layers)) = self.donor()? else { return Ok(None) };
        let fresh = RandomWeights { seed: self.student.init_seed.unwrap_or(self.seed), std: self.student.init_std() };
        Upcycling::new(donor, layers, student.clone(), fresh)
            .map(Some)
            .map_err(|unfit| self.error("student.init.from", unfit.problem, unfit.tip))
    }
}
