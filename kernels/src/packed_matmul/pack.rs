//! From the bytes of a checkpoint's tensor to panels, without an f32 copy of the whole.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{
    PackedMatrix, Panels,
    tiles::{Line, PANEL},
};

/// Bytes that a thread looks at at once.
const PIECE: usize = 1 << 16;

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

    #[inline(always)]
    fn read(self, bytes: &[u8], place: usize) -> f32 {
        let two = || [bytes[2 * place], bytes[2 * place + 1]];
        match self {
            Element::F32 => f32::from_le_bytes(bytes[4 * place..][..4].try_into().expect("four bytes")),
            Element::Bf16 => bf16::from_le_bytes(two()).to_f32(),
            Element::F16 => f16::from_le_bytes(two()).to_f32(),
        }
    }

    /// Whether every number is exact in bfloat16.
    fn fits_bf16(self, bytes: &[u8]) -> bool {
        let low_half_is_empty = |value: f32| value.to_bits() & 0xffff == 0;
        match self {
            Element::Bf16 => true,
            Element::F32 => bytes.par_chunks(PIECE).all(|piece| {
                piece.as_chunks::<4>().0.iter().all(|bytes| low_half_is_empty(f32::from_le_bytes(*bytes)))
            }),
            Element::F16 => bytes.par_chunks(PIECE).all(|piece| {
                piece.as_chunks::<2>().0.iter().all(|bytes| low_half_is_empty(f16::from_le_bytes(*bytes).to_f32()))
            }),
        }
    }
}

impl Element {
    /// Whether there is no NaN and no infinity among the numbers.
    pub fn all_finite(self, bytes: &[u8]) -> bool {
        let fine = |piece: &[u8]| (0..piece.len() / self.bytes()).all(|place| self.read(piece, place).is_finite());
        bytes.par_chunks(PIECE).all(fine)
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
    /// Elements from one input to the next, and from one output to the next.
    strides: [usize; 2],
}

impl Stored<'_> {
    /// The weights of outputs `first..first + PANEL` at one input, zeros where there are none.
    #[inline(always)]
    fn column(&self, input: usize, first: usize, outputs: usize) -> [f32; PANEL] {
        let mut column = [0.0; PANEL];
        for (output, place) in (first..outputs).zip(&mut column) {
            *place = self.element.read(self.bytes, input * self.strides[0] + output * self.strides[1]);
        }
        column
    }
}

impl PackedMatrix {
    /// Packs a stored matrix: in bfloat16 when it holds every number exactly, else in f32. Some rows of a tensor, or
    /// one expert of a stack, are a part of the tensor's bytes.
    ///
    /// # Panics
    /// When `bytes` are not those of a matrix of this size, or a side is 0.
    pub fn pack(bytes: &[u8], element: Element, order: Order, inputs: usize, outputs: usize) -> PackedMatrix {
        assert!(inputs > 0 && outputs > 0, "a matrix of {inputs} inputs and {outputs} outputs");
        assert_eq!(bytes.len(), inputs * outputs * element.bytes(), "the bytes of {inputs} x {outputs} {element:?}");
        let strides = match order {
            Order::OutputMajor => [1, inputs],
            Order::InputMajor => [outputs, 1],
        };
        let stored = Stored { bytes, element, strides };
        let panels = match element.fits_bf16(bytes) {
            true => Panels::Bf16(panels(outputs, inputs.div_ceil(2), |first, pair| {
                let low = stored.column(2 * pair, first, outputs).map(|value| value.to_bits() >> 16);
                if 2 * pair + 1 == inputs {
                    return low;
                }
                let high = stored.column(2 * pair + 1, first, outputs).map(f32::to_bits);
                std::array::from_fn(|column| low[column] | high[column])
            })),
            false => Panels::F32(panels(outputs, inputs, |first, input| stored.column(input, first, outputs))),
        };
        PackedMatrix { inputs, outputs, panels }
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

/// Lines of all panels, each panel on some thread.
fn panels<T: Copy + Default + Send + Sync>(
    outputs: usize,
    lines: usize,
    line: impl Fn(usize, usize) -> [T; PANEL] + Sync,
) -> Vec<Line<T>> {
    let mut all = vec![Line([T::default(); PANEL]); outputs.div_ceil(PANEL) * lines];
    all.par_chunks_mut(lines).enumerate().for_each(|(panel, places)| {
        places.iter_mut().enumerate().for_each(|(number, place)| place.0 = line(panel * PANEL, number));
    });
    all
}
