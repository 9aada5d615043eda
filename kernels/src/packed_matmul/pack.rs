//! From the bytes of a checkpoint's tensor to panels, without an f32 copy of the whole.

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{
    Numbers, PackedMatrix, Panels,
    rounding::nearest,
    tiles::{Line, PANEL},
};

/// Bytes that a thread looks at at once; a multiple of a tile's.
const PIECE: usize = 1 << 16;
/// Inputs that are turned at once: even, and with a panel's columns small enough for the first-level cache.
const TILE: usize = 64;
/// Panels that a thread fills beside each other, so that it reads more than a cache line of a row that holds all outputs.
const GROUP: usize = 8;

/// How the numbers of a tensor are stored, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F32,
    Bf16,
    F16,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    /// The numbers of `bytes`, one for each place of `values`.
    fn decode(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Element::F32 => {
                for (value, &stored) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(stored);
                }
            }
            Element::Bf16 => {
                for (value, &stored) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(stored)) << 16);
                }
            }
            Element::F16 => {
                // The processor's own conversion works on aligned numbers, which a file does not promise.
                let mut aligned = [f16::ZERO; TILE];
                for (values, bytes) in values.chunks_mut(TILE).zip(bytes.chunks(2 * TILE)) {
                    let aligned = &mut aligned[..values.len()];
                    for (number, &stored) in aligned.iter_mut().zip(bytes.as_chunks().0) {
                        *number = f16::from_le_bytes(stored);
                    }
                    aligned.convert_to_f32_slice(values);
                }
            }
        }
    }

    /// The numbers of `bytes`.
    pub fn values(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.bytes()];
        let pieces = values.par_chunks_mut(PIECE / self.bytes()).zip(bytes.par_chunks(PIECE));
        pieces.for_each(|(values, bytes)| self.decode(bytes, values));
        values
    }

    /// Whether all numbers are of a kind. It is asked of whole stretches, so that no branch stands in the loop.
    fn all(self, bytes: &[u8], is: impl Fn(f32) -> bool + Sync) -> bool {
        let fine = |piece: &[u8]| {
            piece.chunks(TILE * self.bytes()).all(|bytes| {
                let mut values = [0.0; TILE];
                let values = &mut values[..bytes.len() / self.bytes()];
                self.decode(bytes, values);
                values.iter().fold(true, |all, &value| all & is(value))
            })
        };
        bytes.par_chunks(PIECE).all(fine)
    }

    /// Whether there is no NaN and no infinity among the numbers.
    pub fn all_finite(self, bytes: &[u8]) -> bool {
        self.all(bytes, f32::is_finite)
    }

    /// Whether every number is exact in bfloat16.
    fn fits_bf16(self, bytes: &[u8]) -> bool {
        self == Element::Bf16 || self.all(bytes, |value| value.to_bits() & 0xffff == 0)
    }
}

/// Which axis of a stored matrix comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[outputs, inputs]`, as linear layers are stored.
    OutputMajor,
    /// `[inputs, outputs]`, as Llama 4 stores its experts.
    InputMajor,
}

/// A stored matrix.
#[derive(Clone, Copy)]
struct Stored<'a> {
    bytes: &'a [u8],
    element: Element,
    order: Order,
    inputs: usize,
    outputs: usize,
}

/// Some inputs of a panel, in f32.
type Tile = [[f32; PANEL]; TILE];

impl Stored<'_> {
    /// Inputs `first..first + count` of the panel that starts at output `column`; columns that there are not stay zero.
    fn read(&self, tile: &mut Tile, column: usize, first: usize, count: usize) {
        let columns = PANEL.min(self.outputs - column);
        let from = |place: usize| &self.bytes[place * self.element.bytes()..];
        match self.order {
            Order::InputMajor => {
                for (input, line) in (first..first + count).zip(tile) {
                    self.element.decode(from(input * self.outputs + column), &mut line[..columns]);
                }
            }
            Order::OutputMajor => {
                for output in 0..columns {
                    let mut row = [0.0; TILE];
                    self.element.decode(from((column + output) * self.inputs + first), &mut row[..count]);
                    tile.iter_mut().zip(row).for_each(|(line, value)| line[output] = value);
                }
            }
        }
    }

    /// The lines of all panels: `per_line` inputs make one, as `line` says. Missing inputs are zeros. All lines are written,
    /// whatever is in `spare`, whose memory is used if it is enough.
    fn panels<T: Copy + Default + Send + Sync>(
        &self,
        per_line: usize,
        mut spare: Vec<Line<T>>,
        line: impl Fn(&[[f32; PANEL]]) -> [T; PANEL] + Sync,
    ) -> Vec<Line<T>> {
        let lines = self.inputs.div_ceil(per_line);
        let count = self.outputs.div_ceil(PANEL) * lines;
        if spare.capacity() < count {
            spare = Vec::new();
        }
        let mut all = spare;
        all.resize(count, Line([T::default(); PANEL]));
        all.par_chunks_mut(GROUP * lines).enumerate().for_each(|(group, group_lines)| {
            for first in (0..self.inputs).step_by(TILE) {
                let count = TILE.min(self.inputs - first);
                for (panel, places) in group_lines.chunks_mut(lines).enumerate() {
                    let mut tile = [[0.0; PANEL]; TILE];
                    self.read(&mut tile, (group * GROUP + panel) * PANEL, first, count);
                    for (place, inputs) in places[first / per_line..].iter_mut().zip(tile.chunks(per_line)) {
                        place.0 = line(inputs);
                    }
                }
            }
        });
        all
    }
}

impl Stored<'_> {
    fn bf16_panels(&self, spare: Vec<Line<u32>>) -> Vec<Line<u32>> {
        self.panels(2, spare, |two| {
            // Of numbers that are exact in bfloat16 this is the number itself.
            std::array::from_fn(|column| nearest(two[0][column]) | nearest(two[1][column]) << 16)
        })
    }
}

impl PackedMatrix {
    /// Packs a stored matrix: in bfloat16 when it holds every number exactly, else in f32. Some rows of a tensor, or
    /// one expert of a stack, are a part of the tensor's bytes.
    ///
    /// # Panics
    /// When `bytes` are not those of a matrix of this size, or a side is 0.
    pub fn pack(bytes: &[u8], element: Element, order: Order, inputs: usize, outputs: usize) -> PackedMatrix {
        Self::pack_into(None, bytes, element, order, inputs, outputs, Numbers::F32)
    }

    /// [`pack`](Self::pack) of weights that are rounded to bfloat16, for rows that are.
    ///
    /// # Panics
    /// As [`pack`](Self::pack).
    pub fn rounded(bytes: &[u8], element: Element, order: Order, inputs: usize, outputs: usize) -> PackedMatrix {
        Self::pack_into(None, bytes, element, order, inputs, outputs, Numbers::Bf16)
    }

    /// [`pack`](Self::pack) into the memory of a matrix that is not needed any more, if it is enough. Memory that is new
    /// costs a system about as much time as the packing.
    ///
    /// # Panics
    /// As [`pack`](Self::pack).
    pub fn pack_into(
        spare: Option<PackedMatrix>,
        bytes: &[u8],
        element: Element,
        order: Order,
        inputs: usize,
        outputs: usize,
        numbers: Numbers,
    ) -> PackedMatrix {
        assert!(inputs > 0 && outputs > 0, "a matrix of {inputs} inputs and {outputs} outputs");
        assert_eq!(bytes.len(), inputs * outputs * element.bytes(), "the bytes of {inputs} x {outputs} {element:?}");
        let stored = Stored { bytes, element, order, inputs, outputs };
        let fits = numbers == Numbers::Bf16 || element.fits_bf16(bytes);
        // What is of the other kind is given back before new memory is taken.
        let panels = match (fits, spare.map(|matrix| matrix.panels)) {
            (true, Some(Panels::Bf16(lines))) => Panels::Bf16(stored.bf16_panels(lines)),
            (false, Some(Panels::F32(lines))) => Panels::F32(stored.panels(1, lines, |one| one[0])),
            (true, other) => {
                drop(other);
                Panels::Bf16(stored.bf16_panels(Vec::new()))
            }
            (false, other) => {
                drop(other);
                Panels::F32(stored.panels(1, Vec::new(), |one| one[0]))
            }
        };
        PackedMatrix { inputs, outputs, panels, rows: numbers }
    }

    /// [`pack`](Self::pack) of numbers in memory.
    pub fn pack_f32(values: &[f32], order: Order, inputs: usize, outputs: usize) -> PackedMatrix {
        Self::pack(bytemuck::cast_slice(values), Element::F32, order, inputs, outputs)
    }
}

impl PackedMatrix {
    /// The weights of one output, as they were before they were packed.
    ///
    /// # Shapes
    /// - `row` `[inputs]`
    pub fn row(&self, output: usize, row: &mut [f32]) {
        assert_eq!(row.len(), self.inputs, "a place for each input");
        let (panel, column) = (output / PANEL, output % PANEL);
        match &self.panels {
            Panels::F32(lines) => {
                let lines = &lines[panel * self.inputs..][..self.inputs];
                row.iter_mut().zip(lines).for_each(|(value, line)| *value = line.0[column]);
            }
            Panels::Bf16(lines) => {
                let pairs = self.inputs.div_ceil(2);
                for (values, line) in row.chunks_mut(2).zip(&lines[panel * pairs..][..pairs]) {
                    let both = [line.0[column] << 16, line.0[column] & 0xffff_0000];
                    values.iter_mut().zip(both).for_each(|(value, bits)| *value = f32::from_bits(bits));
                }
            }
        }
    }

    /// All weights in f32.
    ///
    /// # Shapes
    /// - result `[outputs, inputs]`
    pub fn unpacked(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.outputs * self.inputs];
        values.par_chunks_mut(self.inputs).enumerate().for_each(|(output, row)| self.row(output, row));
        values
    }
}
