//! Where a number goes in a picture and how its axis is labelled.

use crate::quantity::thousands;

/// Size of a picture, and the margins around its plot, in units of the picture.
pub(super) const WIDTH: f64 = 480.0;
pub(super) const HEIGHT: f64 = 270.0;
pub(super) const LEFT: f64 = 60.0;
pub(super) const RIGHT: f64 = 16.0;
pub(super) const TOP: f64 = 26.0;
pub(super) const BOTTOM: f64 = 44.0;

/// Numbers beyond this are drawn as gaps: no axis can show them.
pub(super) const LARGEST: f64 = 1e300;

/// Maps values to places in the picture.
pub(super) struct Axis {
    low: f64,
    high: f64,
    pub(super) log: bool,
    start: f64,
    end: f64,
    /// Ticks at whole numbers only.
    whole: bool,
    wanted: f64,
}

impl Axis {
    pub(super) fn horizontal(low: f64, high: f64, whole: bool) -> Axis {
        let (low, high) = if is_flat(low, high) {
            let around = (1e-6 * low.abs()).max(0.5);
            (low - around, high + around)
        } else {
            (low, high)
        };
        Axis { low, high, log: false, start: LEFT, end: WIDTH - RIGHT, whole, wanted: 6.0 }
    }

    pub(super) fn vertical(low: f64, high: f64, log: bool, from_zero: bool) -> Axis {
        let (mut low, mut high) = if log { (low.log10(), high.log10()) } else { (low, high) };
        if is_flat(low, high) {
            let around = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
            (low, high) = (low - around, high + around);
        }
        let space = 0.05 * (high - low);
        let floor = if from_zero && low >= 0.0 { low } else { low - space };
        Axis { low: floor, high: high + space, log, start: HEIGHT - BOTTOM, end: TOP, whole: false, wanted: 5.0 }
    }

    /// Place of a value in the picture; far outside is held near the frame, where it is clipped.
    pub(super) fn place(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        let share = ((value - self.low) / (self.high - self.low)).clamp(-3.0, 3.0);
        self.start + share * (self.end - self.start)
    }

    /// Round values within the range, with their labels.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let span = self.high - self.low;
        let mut step = nice_step(span / self.wanted);
        if self.whole || self.log {
            step = step.max(1.0);
        }
        let (first, last) = ((self.low / step).ceil(), (self.high / step).floor());
        // The ends of a range of huge numbers can be one step or less apart in floating point.
        let count = (last - first).clamp(0.0, 20.0) as usize;
        let values: Vec<f64> = (0..=count).map(|index| (first + index as f64) * step).collect();
        if self.log {
            return values.into_iter().map(|power| (10f64.powf(power), short_number(10f64.powf(power)))).collect();
        }
        let largest = values.iter().fold(0.0f64, |most, value| most.max(value.abs()));
        values.into_iter().map(|value| (value, tick_label(value, step, largest))).collect()
    }
}

/// Whether a range is too narrow to divide: one value, or values equal but for rounding.
fn is_flat(low: f64, high: f64) -> bool {
    high - low <= 1e-9 * low.abs().max(high.abs())
}

/// The next of 1, 2, 5, 10, ... times a power of ten.
fn nice_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let factor = rough / power;
    power
        * if factor <= 1.0 + 1e-9 {
            1.0
        } else if factor <= 2.0 {
            2.0
        } else if factor <= 5.0 {
            5.0
        } else {
            10.0
        }
}

fn exponent(value: f64) -> i32 {
    // Powers of ten must not fall to the exponent below by rounding.
    (value.abs().log10() + 1e-9).floor() as i32
}

/// A label with the digits that tell it from its neighbours `step` away, alike on the whole axis.
fn tick_label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let text = if !(1e-3..1e15).contains(&largest) {
        let decimals = (exponent(value) - exponent(step)).clamp(0, 9) as usize;
        format!("{value:.decimals$e}")
    } else if largest >= 1e5 && step >= 100.0 {
        let (scale, suffix) = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")]
            .into_iter()
            .find(|(scale, _)| largest >= *scale)
            .unwrap_or((1.0, ""));
        let decimals = (-exponent(step / scale)).max(0) as usize;
        format!("{:.decimals$}{suffix}", value / scale)
    } else {
        let decimals = (-exponent(step)).max(0) as usize;
        if decimals == 0 && value.abs() >= 1000.0 {
            format!("{}{}", if value < 0.0 { "-" } else { "" }, thousands(value.abs().round() as u64))
        } else {
            format!("{value:.decimals$}")
        }
    };
    text.replace('-', "−")
}

/// A number alone, with about four digits that matter.
pub(super) fn short_number(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "?".to_string() } else { if value > 0.0 { "∞" } else { "−∞" }.to_string() };
    }
    if value == 0.0 {
        return "0".to_string();
    }
    let power = exponent(value);
    let text = match power {
        -3..=3 => {
            let text = format!("{value:.*}", (3 - power).clamp(0, 4) as usize);
            if power == 3 {
                return tick_label(value.round(), 1.0, 1e3);
            }
            let trimmed = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
            trimmed.to_string()
        }
        4..=14 => format!("{}{}", if value < 0.0 { "-" } else { "" }, thousands(value.abs().round() as u64)),
        _ => {
            let text = format!("{value:.2e}");
            match text.split_once('e') {
                Some((digits, power)) => format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.')),
                None => text,
            }
        }
    };
    text.replace('-', "−")
}

pub(super) fn is_drawable((x, y): (f64, f64)) -> bool {
    x.abs() < LARGEST && y.abs() < LARGEST
}

/// Smallest and largest; (0, 0) for nothing.
pub(super) fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values
        .fold(None, |range: Option<(f64, f64)>, value| match range {
            None => Some((value, value)),
            Some((low, high)) => Some((low.min(value), high.max(value))),
        })
        .unwrap_or((0.0, 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64) -> Vec<String> {
        Axis::vertical(low, high, false, false).ticks().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_and_labels_tell_them_apart() {
        assert_eq!(labels(3.7, 4.4), ["3.8", "4.0", "4.2", "4.4"]);
        assert_eq!(labels(0.0, 3e-4), ["0", "1e−4", "2e−4", "3e−4"]);
        assert_eq!(labels(0.0, 2e6), ["0.0M", "0.5M", "1.0M", "1.5M", "2.0M"].map(|l| l.replace("0.0M", "0")));
        assert_eq!(labels(-1.0, 1.0), ["−1.0", "−0.5", "0", "0.5", "1.0"]);
        assert_eq!(labels(812.0, 8_000.0), ["2,000", "4,000", "6,000", "8,000"]);
        for (low, high) in [(0.0, 0.0), (5.0, 5.0), (-1e299, 1e299), (1e-300, 2e-300), (1e15, 1e15 + 1.0)] {
            let found = labels(low, high);
            assert!((1..=21).contains(&found.len()), "{low}..{high}: {found:?}");
        }
        let steps = Axis::horizontal(0.0, 3.0, true).ticks();
        assert_eq!(steps.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>(), ["0", "1", "2", "3"]);
    }
}
