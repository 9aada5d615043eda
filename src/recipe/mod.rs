//! Recipes: what a user writes ([`Recipe`]), and what it amounts to ([`Plan`]).
//!
//! A recipe is read, merged with its overrides and checked in one go ([`Recipe::load`]): one that exists makes sense on
//! its own. A [`Plan`] adds the numbers that follow from it and, once the models are known, what they cost.
//!
//! Knows nothing of how any part of a run is carried out.

mod captured;
mod check;
mod divergence_key;
mod keys;
mod load;
mod memory;
mod memory_key;
mod micro_batch_key;
mod plan;
mod remote_teacher;
mod router;
mod schema;
mod selection_key;
mod student;
mod student_init;
mod tap;
mod train_section;
mod training;
mod url_key;

pub use keys::all_keys;
pub use micro_batch_key::MicroBatch;
pub use plan::{MemoryEstimate, ModelSize, Plan, SequenceCount, cache_bytes};
pub use router::RouterSection;
pub use schema::*;
pub use student_init::StudentInit;
pub use tap::TapSection;
pub use training::{GuardsSection, RouterBalance};
