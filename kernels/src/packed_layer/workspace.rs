//! Memory that a thread works in: kept from one call to the next, because pages that are new cost a system about as much
//! time as filling them.

use std::sync::{Mutex, PoisonError};

use crate::packed_matmul::{Instructions, Line, RowTiles, TileRows};

#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// Rows before a product, and those between the two of a feed-forward half.
    pub rows: RowTiles,
    pub inner: RowTiles,
    pub row: Vec<f32>,
    pub mixed: Vec<f32>,
    /// Of attention: panels of keys and values, in f32 or as pairs.
    pub keys: Vec<Line<f32>>,
    pub values: Vec<Line<f32>>,
    pub queries: RowTiles,
    pub scores: Vec<TileRows>,
    pub rounded: Vec<TileRows>,
    pub weighted: Vec<f32>,
    pub largest: Vec<f32>,
    pub total: Vec<f32>,
}

static IDLE: Mutex<Vec<Workspace>> = Mutex::new(Vec::new());

/// Lends a workspace that nobody uses, for a piece of a thread's work. There are never more than there were threads at
/// work at one time.
pub(super) fn with_workspace<R>(instructions: Instructions, body: impl FnOnce(&mut Workspace) -> R) -> R {
    let _work = instructions.begin();
    let idle = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut workspace = idle().pop().unwrap_or_default();
    let result = body(&mut workspace);
    idle().push(workspace);
    result
}
