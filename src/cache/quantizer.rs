//! How probabilities become small whole numbers and back: levels, tails and labels of a row.
//!
//! A level is the square root of a probability in whole steps, because the error of a divergence is about the squared
//! error of the square roots. A row's levels are read relative to each other: their probabilities are scaled to fill
//! what its tail leaves. Below one step the levels halve, so that no probability is too small to have one.
//!
//! Encoding what was decoded gives the same numbers again ([`Quantiser::exact_levels`]).

use super::exact_math::{exp, ln, ln_one_minus, one_minus_exp};

/// Steps of a square root from 0 to 1: at most this many, so that all levels fit a byte.
pub(crate) const MAX_STEPS: u16 = 190;
/// Levels below one step: each is half the square root of the one before.
pub(crate) const HALVINGS: u16 = 62;
/// Steps of the square root of a tail, or of what it leaves, whichever is smaller.
const TAIL_STEPS: f64 = 128.0;
const TAIL_HALF: u8 = 90;
const TAIL_ALL: u8 = 181;
const TAIL_HALVINGS: u8 = 36;
/// Codes of tails, from 0.
pub(crate) const TAIL_CODES: usize = TAIL_ALL as usize + 2 * TAIL_HALVINGS as usize + 1;
/// Steps of a label's log-probability, where the label is not kept.
const LABEL_STEPS: f32 = 256.0;
/// The code of a label with the probability 0.
pub(crate) const LABEL_NOTHING: u16 = u16::MAX;
/// What a tail of 1 leaves to kept ids: enough to have a logarithm.
const LEAST_MASS: f64 = 1.0 / (1u64 << 60) as f64;

/// What the values of a row's kept ids mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RowKind {
    /// Probabilities, with a tail beside them.
    Exact,
    /// Probabilities at or above a threshold, and ids drawn below it that all have the threshold's value; no tail.
    ThresholdSampled {
        /// The value of drawn ids, as they carry it.
        log_threshold: f32,
    },
    /// How often an id was drawn, of so many draws; no tail.
    Sampled { draws: u16 },
}

/// Turns values into levels and back.
///
/// Levels of [`RowKind::Exact`]: 1 to `steps` are the square root in steps of `1 / steps`; `steps + s` is the square
/// root `2^-s / steps`. Of [`RowKind::ThresholdSampled`]: the same without halvings, and 0 for drawn ids. Of
/// [`RowKind::Sampled`]: the number of draws.
#[derive(Debug, Clone)]
pub(crate) struct Quantiser {
    pub kind: RowKind,
    pub steps: u16,
    /// By level: the square root of its probability, in steps.
    roots: Vec<f64>,
    /// By level: the logarithm of `roots` squared; for sampled rows of the value itself.
    logs: Vec<f64>,
    tail_logs: Vec<f32>,
    mass_logs: Vec<f64>,
    masses: Vec<f64>,
}

impl Quantiser {
    pub(crate) fn new(kind: RowKind, steps: u16) -> Self {
        assert!((1..=MAX_STEPS).contains(&steps), "a quantiser of {steps} steps");
        let mut roots: Vec<f64> = (0..=steps).map(f64::from).collect();
        let mut logs: Vec<f64> = vec![];
        match kind {
            RowKind::Exact => {
                roots.extend((1..=HALVINGS).map(|halving| 1.0 / (1u64 << halving) as f64));
                logs.extend(roots.iter().map(|root| if *root > 0.0 { 2.0 * ln(*root) } else { f64::NEG_INFINITY }));
            }
            RowKind::ThresholdSampled { log_threshold } => {
                let all = 2.0 * ln(f64::from(steps));
                logs.push(f64::from(log_threshold));
                logs.extend(roots[1..].iter().map(|root| 2.0 * ln(*root) - all));
            }
            RowKind::Sampled { draws } => {
                let all = ln(f64::from(draws.max(1)));
                logs.push(f64::NEG_INFINITY);
                logs.extend((1..=draws.max(1)).map(|count| ln(f64::from(count)) - all));
            }
        }
        let tails: Vec<(f32, f64)> = (0..TAIL_CODES).map(|code| tail_of(code as u8)).collect();
        Quantiser {
            kind,
            steps,
            roots,
            logs,
            tail_logs: tails.iter().map(|tail| tail.0).collect(),
            mass_logs: tails.iter().map(|tail| ln(tail.1)).collect(),
            masses: tails.iter().map(|tail| tail.1).collect(),
        }
    }

    /// Levels are below this.
    pub(crate) fn level_count(&self) -> usize {
        self.logs.len()
    }

    /// Whether rows have tails.
    pub(crate) fn has_tail(&self) -> bool {
        self.kind == RowKind::Exact
    }

    /// The levels of a row's values, which descend; `tail` is its code.
    pub(crate) fn levels(&self, log_probs: &[f32], tail: u8, levels: &mut Vec<u16>) {
        levels.clear();
        let Some(&first) = log_probs.first() else { return };
        match self.kind {
            RowKind::Exact => {
                let mut roots = vec![];
                let mut total = 0.0;
                for log_prob in log_probs {
                    let prob = exp(f64::from(*log_prob) - f64::from(first));
                    total += prob;
                    roots.push(prob);
                }
                let scale = self.masses[tail as usize] / total;
                roots.iter_mut().for_each(|prob| *prob = (*prob * scale).sqrt() * f64::from(self.steps));
                if !self.exact_levels(&roots, levels) {
                    levels.clear();
                    levels.extend(roots.iter().map(|root| self.nearest(*root)));
                }
                // What is decoded from them must lead to them again: of equal proportions, those that it leads to.
                let total: f64 = levels.iter().map(|level| self.square(*level)).sum();
                let scale = f64::from(self.steps) * (self.masses[tail as usize] / total).sqrt();
                roots.clear();
                roots.extend(levels.iter().map(|level| self.roots[*level as usize] * scale));
                let found = levels.clone();
                if !self.exact_levels(&roots, levels) {
                    *levels = found;
                }
            }
            RowKind::ThresholdSampled { log_threshold } => levels.extend(log_probs.iter().map(|log_prob| {
                if log_prob.to_bits() == log_threshold.to_bits() {
                    return 0;
                }
                let root = exp(f64::from(*log_prob) * 0.5) * f64::from(self.steps);
                let level = (root.round_ties_even() as u16).clamp(1, self.steps);
                if (self.logs[level as usize] as f32).to_bits() == log_threshold.to_bits() { 0 } else { level }
            })),
            RowKind::Sampled { draws } => levels.extend(log_probs.iter().map(|log_prob| {
                let count = exp(f64::from(*log_prob)) * f64::from(draws);
                (count.round_ties_even() as u16).clamp(1, draws.max(1))
            })),
        }
    }

    fn square(&self, level: u16) -> f64 {
        self.roots[level as usize] * self.roots[level as usize]
    }

    fn sum_of_squares(&self, levels: &[u16]) -> f64 {
        // Whole numbers add up to the same in any order, which is faster, and to what their floats do.
        if levels.len() < 1 << 16 && levels.iter().fold(0, |most, level| *level.max(&most)) <= self.steps {
            return f64::from(levels.iter().map(|level| u32::from(*level) * u32::from(*level)).sum::<u32>());
        }
        levels.iter().map(|level| self.square(*level)).sum()
    }

    /// The level of a square root in steps, on its own.
    fn nearest(&self, root: f64) -> u16 {
        if root >= 0.75 {
            return (root.round_ties_even() as u16).clamp(1, self.steps);
        }
        let mut halving = 1;
        let mut border = 0.375;
        while root < border && halving < HALVINGS {
            halving += 1;
            border *= 0.5;
        }
        self.steps + halving
    }

    /// If the roots are in the proportion of some levels, as those decoded from a record are: these levels.
    ///
    /// Decoded values were scaled to fill what the tail leaves, so they lie beside the levels they came from, by a
    /// factor that all share. Of several such levels the nearest are taken, wherever the values came from.
    fn exact_levels(&self, roots: &[f64], levels: &mut Vec<u16>) -> bool {
        let first = roots[0];
        let near = |root: f64| (0.6 * first..=1.6 * first + 1e-300).contains(&root);
        let mut tops: Vec<u16> = (1..self.roots.len() as u16).filter(|top| near(self.roots[*top as usize])).collect();
        // In whole numbers, so that rounding does not decide between two that are equally far.
        let distance = |top: u16| ((self.roots[top as usize] - first).abs() * (1u64 << 32) as f64) as u64 >> 12;
        tops.sort_by_key(|top| (distance(*top), *top));
        for top in tops {
            let factor = self.roots[top as usize] / first;
            levels.clear();
            for root in roots {
                let root = root * factor;
                let level = self.nearest(root);
                let found = self.roots[level as usize];
                // The last halving stands for everything below it.
                if (root - found).abs() > 2e-4 * found.min(1.0) {
                    break;
                }
                levels.push(level);
            }
            if levels.len() == roots.len() {
                return true;
            }
        }
        false
    }

    /// Appends the log-probabilities that levels stand for.
    #[inline]
    pub(crate) fn log_probs(&self, levels: &[u16], tail: u8, log_probs: &mut Vec<f32>) {
        let base = match self.kind {
            RowKind::Exact if !levels.is_empty() => self.mass_logs[tail as usize] - ln(self.sum_of_squares(levels)),
            _ => 0.0,
        };
        log_probs.extend(levels.iter().map(|level| (base + self.logs[*level as usize]) as f32));
    }

    /// Whether `left` stands for more than `right`.
    pub(crate) fn above(&self, left: u16, right: u16) -> std::cmp::Ordering {
        self.logs[right as usize].total_cmp(&self.logs[left as usize])
    }

    pub(crate) fn log_tail(&self, code: u8) -> f32 {
        self.tail_logs[code as usize]
    }

    /// What a tail leaves.
    pub(crate) fn mass(&self, code: u8) -> f64 {
        self.masses[code as usize]
    }

    /// Logarithm of what a tail leaves.
    pub(crate) fn log_mass(&self, code: u8) -> f64 {
        self.mass_logs[code as usize]
    }
}

/// What a tail's code stands for: its logarithm, and what it leaves.
fn tail_of(code: u8) -> (f32, f64) {
    let half = |halving: u8| 1.0 / (1u64 << halving) as f64;
    let of_tail = |root: f64| {
        let tail = root * root / (TAIL_STEPS * TAIL_STEPS);
        (ln(tail) as f32, 1.0 - tail)
    };
    let of_mass = |root: f64| {
        let mass = root * root / (TAIL_STEPS * TAIL_STEPS);
        (ln_one_minus(mass) as f32, mass)
    };
    match code {
        0 => (f32::NEG_INFINITY, 1.0),
        1..=TAIL_HALF => of_tail(f64::from(code)),
        TAIL_ALL => (0.0, LEAST_MASS),
        91..TAIL_ALL => of_mass(f64::from(TAIL_ALL - code)),
        _ if code <= TAIL_ALL + TAIL_HALVINGS => of_tail(half(code - TAIL_ALL)),
        _ => of_mass(half(code - TAIL_ALL - TAIL_HALVINGS)),
    }
}

/// The code of a tail, from its logarithm.
pub(crate) fn tail_code(log_tail: f32) -> u8 {
    let log_tail = f64::from(log_tail.min(0.0));
    let (smaller, other) =
        if log_tail < -std::f64::consts::LN_2 { (exp(log_tail), false) } else { (one_minus_exp(log_tail), true) };
    if smaller == 0.0 {
        // e^-700 is as good as nothing only where nothing is meant.
        return match (other, log_tail == f64::NEG_INFINITY) {
            (true, _) => TAIL_ALL,
            (false, true) => 0,
            (false, false) => TAIL_ALL + TAIL_HALVINGS,
        };
    }
    let root = smaller.sqrt() * TAIL_STEPS;
    if root >= 0.75 {
        let step = (root.round_ties_even() as u8).clamp(1, TAIL_HALF);
        return if other { TAIL_ALL - step } else { step };
    }
    let (mut halving, mut border) = (1, 0.375);
    while root < border && halving < TAIL_HALVINGS {
        halving += 1;
        border *= 0.5;
    }
    TAIL_ALL + halving + if other { TAIL_HALVINGS } else { 0 }
}

/// The code of the log-probability of a label that is not kept.
pub(crate) fn label_code(log_prob: f32) -> u16 {
    if log_prob == f32::NEG_INFINITY {
        return LABEL_NOTHING;
    }
    (-log_prob * LABEL_STEPS).round_ties_even().clamp(0.0, f32::from(LABEL_NOTHING - 1)) as u16
}

/// The log-probability that such a code stands for.
pub(crate) fn label_of(code: u16) -> f32 {
    // Not -0.0.
    if code == LABEL_NOTHING { f32::NEG_INFINITY } else { 0.0 - f32::from(code) / LABEL_STEPS }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_code_of_a_tail_or_label_comes_back() {
        let quantiser = Quantiser::new(RowKind::Exact, 64);
        for code in 0..TAIL_CODES {
            assert_eq!(tail_code(quantiser.log_tail(code as u8)), code as u8, "tail {code}");
        }
        for code in 0..=u16::MAX {
            assert_eq!(label_code(label_of(code)), code);
        }
        assert_eq!(tail_code(1e-3), TAIL_ALL);
        assert_eq!(tail_code(-1e30), TAIL_ALL + TAIL_HALVINGS);
    }

    #[test]
    fn a_tail_is_off_by_half_a_step_at_most() {
        let quantiser = Quantiser::new(RowKind::Exact, 64);
        for step in 1..1000 {
            let tail = f64::from(step) / 1000.0;
            let decoded = f64::from(quantiser.log_tail(tail_code(tail.ln() as f32))).exp();
            let root = |tail: f64| tail.min(1.0 - tail).sqrt();
            assert!((root(decoded) - root(tail)).abs() < 0.6 / TAIL_STEPS, "{tail} became {decoded}");
        }
    }

    #[test]
    fn every_levels_own_value_comes_back() {
        for steps in [1, 17, 63, 64, 96, MAX_STEPS] {
            let quantiser = Quantiser::new(RowKind::Exact, steps);
            for level in 1..quantiser.level_count() as u16 {
                assert_eq!(quantiser.nearest(quantiser.roots[level as usize]), level);
            }
        }
    }

    fn rows() -> impl Strategy<Value = (Vec<f32>, f32)> {
        let log_prob = prop_oneof![Just(0.0f32), Just(-70.0), -12.0..0.0f32, -12.0..0.0f32, Just(-1e30), Just(-3.0)];
        let tail = prop_oneof![Just(f32::NEG_INFINITY), Just(0.0f32), -12.0..0.0f32, -1e-6..0.0f32, Just(-80.0)];
        (prop::collection::vec(log_prob, 0..90), tail).prop_map(|(mut log_probs, tail)| {
            log_probs.sort_by(|left, right| right.total_cmp(left));
            (log_probs, tail)
        })
    }

    proptest! {
        #[test]
        fn what_was_decoded_is_encoded_as_before((log_probs, log_tail) in rows(), steps in 1u16..=MAX_STEPS, kind in 0..3) {
            let kind = match kind {
                0 => RowKind::Exact,
                1 => RowKind::ThresholdSampled { log_threshold: -3.0 },
                _ => RowKind::Sampled { draws: steps * 7 },
            };
            let quantiser = Quantiser::new(kind, steps);
            let tail = tail_code(log_tail);
            let (mut levels, mut again, mut decoded) = (vec![], vec![], vec![]);
            quantiser.levels(&log_probs, tail, &mut levels);
            quantiser.log_probs(&levels, tail, &mut decoded);
            prop_assert!(decoded.iter().all(|log_prob| log_prob.is_finite() && *log_prob <= 1e-3));
            prop_assert_eq!(tail_code(quantiser.log_tail(tail)), tail);
            decoded.sort_by(|left, right| right.total_cmp(left));
            levels.sort_by(|left, right| quantiser.above(*left, *right));
            quantiser.levels(&decoded, tail, &mut again);
            prop_assert_eq!(&levels, &again);
        }

        #[test]
        fn scaled_rows_are_near_what_they_were(weights in prop::collection::vec(0.004..1.0f64, 1..60), tail in 0.001..0.9f64) {
            let mut weights = weights;
            weights.sort_by(|left, right| right.total_cmp(left));
            let total: f64 = weights.iter().sum();
            let log_probs: Vec<f32> = weights.iter().map(|weight| (weight / total * (1.0 - tail)).ln() as f32).collect();
            let quantiser = Quantiser::new(RowKind::Exact, 64);
            let code = tail_code(tail.ln() as f32);
            let (mut levels, mut decoded) = (vec![], vec![]);
            quantiser.levels(&log_probs, code, &mut levels);
            quantiser.log_probs(&levels, code, &mut decoded);
            let mut divergence = tail * (tail.ln() - f64::from(quantiser.log_tail(code)));
            for (before, after) in log_probs.iter().zip(&decoded) {
                divergence += f64::from(*before).exp() * f64::from(before - after);
            }
            prop_assert!((-1e-6..4e-3).contains(&divergence), "{}", divergence);
        }
    }
}
