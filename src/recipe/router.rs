//! Which of the teacher's routers are kept (`cache.router_layers`), and which of the student's follow them (`loss.router`).

use serde::{Deserialize, Serialize};

use super::schema::{Recipe, TeacherMode};
use crate::{
    cache::RouterSettings,
    error::{Error, Result},
    models::{DecoderConfig, upcycling::evenly_spaced},
    train::router::{RouterDistillation, RouterPair},
};

/// `loss.router`: routers of the student that follow the teacher's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterSection {
    /// Weight of the divergence of the student's routers from the teacher's. Default 0.01.
    #[serde(default = "weight")]
    pub weight: f64,
    /// Pairs of a student's layer and the teacher's whose router it follows, by their numbers from 0.
    pub layers: Vec<[usize; 2]>,
}

fn weight() -> f64 {
    0.01
}

/// What can be checked without the models.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    let key = "cache.router_layers";
    let layers = &recipe.cache.router_layers;
    if let Some(place) = (1..layers.len()).find(|&place| layers[..place].contains(&layers[place])) {
        return Err(recipe.error(key, format!("has {} twice", layers[place]), "name each layer once"));
    }
    if !layers.is_empty() && recipe.cache.train.is_none() {
        let Some(teacher) = &recipe.teacher else {
            return Err(recipe.error(
                key,
                "is given, and this recipe has no teacher",
                "add [teacher], or remove the key",
            ));
        };
        if teacher.mode != TeacherMode::Resident || teacher.mesh.size() > 1 {
            let problem = "asks for routers, which only a teacher that is resident on one device gives";
            return Err(recipe.error(key, problem, "remove it, or teacher.mode and teacher.mesh"));
        }
    }
    let Some(router) = &recipe.loss.router else { return Ok(()) };
    recipe.number("loss.router.weight", router.weight, router.weight > 0.0, "above 0, as in 0.01")?;
    let key = "loss.router.layers";
    if router.layers.is_empty() {
        let tip = "name pairs of a student's and a teacher's layer, as in [[0, 0], [1, 4]]";
        return Err(recipe.error(key, "is empty", tip));
    }
    for (place, [student, teacher]) in router.layers.iter().enumerate() {
        if router.layers[..place].iter().any(|[earlier, _]| earlier == student) {
            let problem = format!("has the student's layer {student} twice");
            return Err(recipe.error(key, problem, "let each of its routers follow one of the teacher's"));
        }
        if !layers.contains(teacher) {
            let problem = format!("names the teacher's layer {teacher}, whose router the cache does not keep");
            let tip = match recipe.cache.train.is_some() {
                true => format!("the cache has those of layers {layers:?}"),
                false => format!("add {teacher} to cache.router_layers"),
            };
            return Err(recipe.error(key, problem, tip));
        }
    }
    Ok(())
}

impl Recipe {
    /// The routers that a cache of this recipe keeps.
    ///
    /// # Errors
    /// When the teacher has none in one of these layers.
    pub fn kept_routers(&self, teacher: &DecoderConfig) -> Result<Option<RouterSettings>> {
        let layers = self.cache.router_layers.clone();
        if layers.is_empty() {
            return Ok(None);
        }
        let experts = teacher.experts_of(&layers).map_err(|error| self.router_error("cache.router_layers", error))?;
        Ok(Some(RouterSettings { layers, experts }))
    }

    /// Which of the student's routers follow which of those that a cache keeps; `None` when none does.
    ///
    /// # Errors
    /// When the student has no router in one of its layers, or more experts than the teacher.
    pub fn router_distillation(
        &self,
        student: &DecoderConfig,
        kept: Option<&RouterSettings>,
    ) -> Result<Option<RouterDistillation>> {
        let (Some(router), Some(kept)) = (&self.loss.router, kept) else { return Ok(None) };
        let key = "loss.router.layers";
        let layers: Vec<usize> = router.layers.iter().map(|[student, _]| *student).collect();
        let experts = student.experts_of(&layers).map_err(|error| self.router_error(key, error))?;
        if experts > kept.experts {
            let problem = format!("pairs routers of {experts} experts with the teacher's of {}", kept.experts);
            return Err(self.error(key, problem, "give the student at most as many, or remove loss.router"));
        }
        let blocks: Vec<usize> = student.expert_layers().into_iter().map(|(layer, _)| layer).collect();
        let place =
            |list: &[usize], layer| list.iter().position(|one| *one == layer).expect("it was looked for before");
        let pairs = router.layers.iter().map(|[student, teacher]| RouterPair {
            block: place(&blocks, *student),
            column: place(&kept.layers, *teacher),
        });
        Ok(Some(RouterDistillation {
            weight: router.weight,
            pairs: pairs.collect(),
            experts: evenly_spaced(experts, kept.experts),
        }))
    }

    fn router_error(&self, key: &str, error: Error) -> Error {
        match error {
            Error::Usage { problem, tip } => self.error(key, format!("cannot be had: {problem}"), tip),
            error => error,
        }
    }
}
