//! What a level and a tail come to as integers, by which the walk of `compact` weighs what is left of a row, and the order
//! of levels.

use super::quantizer::{RowKind, TAIL_CODES};
use super::record::RecordShape;

/// Fixed point of squared levels: 16ths.
const SQUARE: f64 = 16.0;

/// What the walk needs of a row's numbers, by level and by tail.
pub(super) struct Scale {
    pub levels: Vec<ScaledLevel>,
    /// What a tail leaves, as a squared level in 16ths.
    pub masses: Vec<i64>,
    pub by_order: Vec<u16>,
    /// Whether levels are numbers of draws, written by their class.
    pub counts: bool,
    /// The least level.
    least: u32,
}

pub(super) struct ScaledLevel {
    /// In 16ths; 0 for halvings and drawn ids.
    pub square: u32,
    /// Place in the order of decoding.
    pub order: u16,
    /// Of what an id of this level says to later rows.
    pub strength: u8,
}

impl Scale {
    pub(super) fn new(shape: &RecordShape) -> Scale {
        let quantiser = &shape.quantiser;
        let levels = 0..quantiser.level_count() as u16;
        let steps = u32::from(quantiser.steps);
        let counts = matches!(quantiser.kind, RowKind::Sampled { .. });
        let direct = |level: u16| if counts || u32::from(level) > steps { 0 } else { u32::from(level) };
        let mut by_order: Vec<u16> = levels.clone().collect();
        by_order.sort_by(|left, right| quantiser.above(*left, *right).then(left.cmp(right)));
        let mut order = vec![0; by_order.len()];
        by_order.iter().enumerate().for_each(|(place, level)| order[*level as usize] = place as u16);
        let whole = SQUARE * f64::from(steps) * f64::from(steps);
        Scale {
            levels: levels
                .map(|level| ScaledLevel {
                    square: 16 * direct(level) * direct(level),
                    order: order[level as usize],
                    strength: 1 + u8::from(if counts { level > 1 } else { 10 * direct(level) > steps }),
                })
                .collect(),
            masses: (0..TAIL_CODES).map(|code| (quantiser.mass(code as u8) * whole) as i64).collect(),
            by_order,
            counts,
            least: u32::from(!matches!(quantiser.kind, RowKind::ThresholdSampled { .. })),
        }
    }

    /// Strength of what an id of this level says to later rows.
    pub(super) fn strength(&self, level: u16) -> u8 {
        self.levels[level as usize].strength
    }

    #[inline(always)]
    pub(super) fn has(&self, level: u32) -> bool {
        level >= self.least && (level as usize) < self.levels.len()
    }
}
