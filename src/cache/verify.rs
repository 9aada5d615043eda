//! Walking every byte of a cache.

use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::reader::CacheReader;
use crate::error::{Error, Result};

/// What a walk over every byte found.
#[derive(Debug)]
pub struct Verification {
    pub shards: usize,
    /// Bytes of all shards.
    pub bytes: u64,
    pub elapsed: Duration,
    /// One error per damaged shard, in their order.
    pub damage: Vec<Error>,
}

impl Verification {
    /// Speed of the walk, in 10^6 bytes per second.
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The first damage as an error.
    pub fn into_result(mut self) -> Result<Verification> {
        if self.damage.is_empty() { Ok(self) } else { Err(self.damage.remove(0)) }
    }
}

impl CacheReader {
    /// Checks every byte of every shard, in parallel. The manifest was checked by [`CacheReader::open`].
    #[must_use = "the damage is in what it returns"]
    pub fn verify(&self) -> Verification {
        let started = Instant::now();
        let shards = &self.manifest().shards;
        let damage = (0..shards.len()).into_par_iter().filter_map(|number| self.verify_shard(number).err()).collect();
        let bytes = shards.iter().map(|shard| shard.bytes).sum();
        Verification { shards: shards.len(), bytes, elapsed: started.elapsed(), damage }
    }
}
