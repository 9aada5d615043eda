//! Tensors that are put together of stored ones while they are read: scaled, transposed, stacked, side by side.
//!
//! A tensor is one slab or, where it has three axes, one slab per place of the first axis: an expert. A slab is made of
//! pieces, each some rows of a stored matrix. Reading a slab touches the bytes of its pieces and their scales, and no
//! others. Knows nothing of the formats whose tensors it combines.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::convert;
use super::dtype::{Dtype, TensorInfo};
use super::tensor_file::{TensorFile, check_rows, check_shape, missing_tensor};
use crate::error::{Error, Result};

/// Rows of a transposed matrix that are written together: as many as floats fit a line of the processor's cache, twice.
const TRANSPOSED_ROWS: usize = 32;

/// Everything the files of a checkpoint hold, under the names it is stored by.
#[derive(Debug)]
pub(super) struct StoredTensors {
    /// The checkpoint's path, for messages about names that no file has.
    pub(super) path: PathBuf,
    pub(super) files: Vec<TensorFile>,
    /// Tensor name to its place in `files`.
    pub(super) file_of: BTreeMap<String, usize>,
}

impl StoredTensors {
    pub(super) fn file(&self, name: &str) -> Result<&TensorFile> {
        let names = self.file_of.keys().map(String::as_str);
        let file = self.file_of.get(name).ok_or_else(|| missing_tensor(&self.path, name, names))?;
        Ok(&self.files[*file])
    }

    pub(super) fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file(name)?.info(name)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// An error about a stored tensor.
    pub(super) fn error(&self, name: &str, problem: String, tip: &str) -> Error {
        let path = self.file(name).map_or(self.path.as_path(), TensorFile::path);
        Error::Tensor { path: path.to_path_buf(), tensor: name.into(), problem, tip: tip.into() }
    }
}

/// What a name that models ask for stands for.
#[derive(Debug)]
pub(super) enum Presented {
    /// One stored tensor, as it is.
    Stored(String),
    Assembled(Assembly),
}

/// A tensor made of stored ones.
#[derive(Debug)]
pub(super) struct Assembly {
    /// The stored type, and the shape of the whole.
    pub(super) info: TensorInfo,
    pub(super) slabs: Vec<Slab>,
}

/// A matrix made of pieces.
#[derive(Debug)]
pub(super) struct Slab {
    pub(super) pieces: Vec<Piece>,
    pub(super) joined: Joined,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Joined {
    /// One below the other.
    Rows,
    /// Side by side.
    Columns,
}

/// Some rows of a stored matrix. (Of a tensor with more axes, all but the last count as rows.)
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) tensor: String,
    pub(super) rows: Range<u64>,
    pub(super) columns: u64,
    pub(super) scale: Option<Scale>,
    pub(super) arrangement: Arrangement,
}

/// A stored matrix of factors, one for each block of so many rows and columns.
#[derive(Debug, Clone)]
pub(super) struct Scale {
    pub(super) tensor: String,
    pub(super) block: [u64; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrangement {
    AsStored,
    Transposed,
    /// Rows of each head from neighbouring pairs to halves: row `2 i + j` of a head becomes row `j * d / 2 + i`. It is
    /// what the interleaved rotary embedding's weights need to be used with the one that turns halves.
    PairsToHalves {
        heads: u64,
    },
}

impl Assembly {
    /// A matrix or a vector of one slab.
    pub(super) fn matrix(dtype: Dtype, shape: Vec<usize>, pieces: Vec<Piece>) -> Self {
        Assembly { info: TensorInfo { dtype, shape }, slabs: vec![Slab { pieces, joined: Joined::Rows }] }
    }

    pub(super) fn load(&self, stored: &StoredTensors, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        check_shape(self.path(stored), name, &self.info.shape, shape)?;
        match self.slabs.as_slice() {
            [slab] => slab.load(stored),
            slabs => {
                let mut values = Vec::with_capacity(shape.iter().product());
                for slab in slabs {
                    values.extend(slab.load(stored)?);
                }
                Ok(values)
            }
        }
    }

    pub(super) fn load_rows(
        &self,
        stored: &StoredTensors,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
    ) -> Result<Vec<f32>> {
        let path = self.path(stored);
        check_shape(path, name, &self.info.shape, shape)?;
        let row_elements = check_rows(path, name, shape, &rows)?;
        if shape.len() == 3 {
            let mut values = Vec::with_capacity(rows.len() * row_elements as usize);
            for slab in &self.slabs[rows] {
                values.extend(slab.load(stored)?);
            }
            return Ok(values);
        }
        self.slabs[0].load_rows(stored, rows, row_elements as usize)
    }

    /// The file of the first piece, for messages about the whole.
    fn path<'a>(&self, stored: &'a StoredTensors) -> &'a Path {
        stored.file(&self.slabs[0].pieces[0].tensor).map_or(stored.path.as_path(), TensorFile::path)
    }
}

impl Slab {
    fn load(&self, stored: &StoredTensors) -> Result<Vec<f32>> {
        if let [piece @ Piece { arrangement: Arrangement::AsStored, .. }] = self.pieces.as_slice() {
            return piece.load(stored, piece.rows.clone());
        }
        let sizes: Vec<[usize; 2]> = self.pieces.iter().map(Piece::size).collect();
        let (rows, columns) = match self.joined {
            Joined::Rows => (sizes.iter().map(|[rows, _]| rows).sum(), sizes[0][1]),
            Joined::Columns => (sizes[0][0], sizes.iter().map(|[_, columns]| columns).sum::<usize>()),
        };
        let mut values = vec![0.0; rows * columns];
        let (mut row, mut column) = (0, 0);
        for (piece, [piece_rows, piece_columns]) in self.pieces.iter().zip(sizes) {
            let read = piece.load(stored, piece.rows.clone())?;
            let place = row * columns..(row + piece_rows) * columns;
            piece.arrangement.put(&read, piece.columns as usize, &mut values[place], columns, column);
            match self.joined {
                Joined::Rows => row += piece_rows,
                Joined::Columns => column += piece_columns,
            }
        }
        Ok(values)
    }

    fn load_rows(&self, stored: &StoredTensors, rows: Range<usize>, row_elements: usize) -> Result<Vec<f32>> {
        let in_order = self.pieces.iter().all(|piece| piece.arrangement == Arrangement::AsStored);
        if self.joined == Joined::Columns && self.pieces.len() > 1 || !in_order {
            // Their rows lie all over the file.
            let mut values = self.load(stored)?;
            values.truncate(rows.end * row_elements);
            return Ok(values.split_off(rows.start * row_elements));
        }
        let (from, to) = (rows.start as u64, rows.end as u64);
        let (mut values, mut first) = (Vec::with_capacity(rows.len() * row_elements), 0);
        for piece in &self.pieces {
            let last = first + piece.rows.end - piece.rows.start;
            let (start, end) = (from.max(first), to.min(last));
            if start < end {
                values.extend(piece.load(stored, piece.rows.start + start - first..piece.rows.start + end - first)?);
            }
            first = last;
        }
        Ok(values)
    }
}

impl Piece {
    /// All rows of a stored matrix or vector.
    pub(super) fn whole(stored: &StoredTensors, tensor: &str) -> Result<Piece> {
        let shape = &stored.info(tensor)?.shape;
        let columns = if shape.len() < 2 { 1 } else { shape[shape.len() - 1] as u64 };
        let rows = stored.info(tensor)?.element_count().checked_div(columns).unwrap_or(0);
        let arrangement = Arrangement::AsStored;
        Ok(Piece { tensor: tensor.into(), rows: 0..rows, columns, scale: None, arrangement })
    }

    pub(super) fn arranged(self, arrangement: Arrangement) -> Piece {
        Piece { arrangement, ..self }
    }

    pub(super) fn rows(self, rows: Range<u64>) -> Piece {
        Piece { rows, ..self }
    }

    /// Rows and columns once arranged.
    fn size(&self) -> [usize; 2] {
        let (rows, columns) = ((self.rows.end - self.rows.start) as usize, self.columns as usize);
        match self.arrangement {
            Arrangement::Transposed => [columns, rows],
            _ => [rows, columns],
        }
    }

    /// Stored rows, scaled, in the stored order.
    fn load(&self, stored: &StoredTensors, rows: Range<u64>) -> Result<Vec<f32>> {
        let file = stored.file(&self.tensor)?;
        let mut values = file.decode(&self.tensor, rows.start * self.columns..rows.end * self.columns)?;
        let Some(Scale { tensor, block: [block_rows, block_columns] }) = &self.scale else { return Ok(values) };
        let per_row = self.columns.div_ceil(*block_columns);
        let first = rows.start / block_rows;
        let factors = stored.file(tensor)?.decode(tensor, first * per_row..rows.end.div_ceil(*block_rows) * per_row)?;
        values.par_chunks_mut(self.columns.max(1) as usize).enumerate().for_each(|(number, row)| {
            let place = (rows.start + number as u64) / block_rows - first;
            let factors = &factors[(place * per_row) as usize..][..per_row as usize];
            for (values, factor) in row.chunks_mut(*block_columns as usize).zip(factors) {
                values.iter_mut().for_each(|value| *value *= factor);
            }
        });
        // A product can leave the range of f32 though its factors are in it.
        if let Some(place) = values.par_iter().position_first(|value| !value.is_finite()) {
            let number = rows.start * self.columns + place as u64;
            let problem = format!("element {number} is not finite once it is scaled by `{tensor}`");
            return Err(stored.error(&self.tensor, problem, "download both again"));
        }
        Ok(values)
    }
}

impl Arrangement {
    /// Puts a matrix of so many columns into `out`, whose rows are `width` wide, from column `at` on.
    fn put(self, values: &[f32], columns: usize, out: &mut [f32], width: usize, at: usize) {
        if values.is_empty() {
            return;
        }
        let rows = values.len() / columns;
        match self {
            Arrangement::AsStored => {
                for (row, out) in values.chunks(columns).zip(out.chunks_mut(width)) {
                    out[at..at + columns].copy_from_slice(row);
                }
            }
            Arrangement::Transposed => {
                out.par_chunks_mut(width * TRANSPOSED_ROWS).enumerate().for_each(|(number, out)| {
                    let first = number * TRANSPOSED_ROWS;
                    let count = out.len() / width;
                    for (row, values) in values.chunks(columns).enumerate() {
                        for (place, value) in values[first..first + count].iter().enumerate() {
                            out[place * width + at + row] = *value;
                        }
                    }
                });
            }
            Arrangement::PairsToHalves { heads } => {
                let half = rows / heads as usize / 2;
                for (row, out) in out.chunks_mut(width).enumerate() {
                    let (head, place) = (row / (2 * half), row % (2 * half));
                    let from = head * 2 * half + 2 * (place % half) + place / half;
                    out[at..at + columns].copy_from_slice(&values[from * columns..(from + 1) * columns]);
                }
            }
        }
    }
}

/// Whether a stored type can be read into an assembly at all.
pub(super) fn check_readable(stored: &StoredTensors, name: &str) -> Result<()> {
    let dtype = stored.info(name)?.dtype;
    if convert::is_float(dtype) {
        return Ok(());
    }
    let problem = format!("has dtype {dtype}, expected F32, BF16 or F16");
    Err(stored.error(name, problem, "use a checkpoint whose weights are of a type this program reads"))
}
