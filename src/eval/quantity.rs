//! Numbers as people read them, the same in the terminal and on the page.

pub(crate) use crate::train::progress::{clock, thousands};

/// Says that there is no such number.
pub(crate) const NONE: &str = "–";

/// `decimals` places; "not finite" is said, not hidden.
pub(crate) fn decimal(value: f64, decimals: usize) -> String {
    if value.is_nan() {
        "not a number".to_string()
    } else if value.is_infinite() {
        "infinite".to_string()
    } else if value.abs() >= 1e15 {
        format!("{value:.2e}")
    } else if value.abs() >= 1e4 {
        let whole = thousands(value.abs().round() as u64);
        if value < 0.0 { format!("−{whole}") } else { whole }
    } else {
        // A negative number that rounds to nothing has no sign.
        let text = format!("{value:.decimals$}");
        if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') {
            text.trim_start_matches('-').to_string()
        } else {
            text.replace('-', "−")
        }
    }
}

/// A share (0..1) as "61.2%".
pub(crate) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{}%", decimal(100.0 * share, 1)) } else { decimal(share, 1) }
}

/// Parameters and bytes: "842", "1.23M", "17.2B"; three digits that matter.
pub(crate) fn short_count(count: u64) -> String {
    scaled(count, &["", "K", "M", "B", "T", "Q"])
}

/// "842 B", "1.23 MB"; decimal multiples.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count, &[" B", " kB", " MB", " GB", " TB", " PB"])
}

fn scaled(count: u64, suffixes: &[&str]) -> String {
    let (mut value, mut index) = (count as f64, 0);
    // 999.5 and more would round to "1000" of its unit.
    while value >= 999.5 && index + 1 < suffixes.len() {
        value /= 1000.0;
        index += 1;
    }
    let decimals = if index == 0 || value >= 99.95 { 0 } else { if value >= 9.995 { 1 } else { 2 } };
    format!("{value:.decimals$}{}", suffixes[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_the_digits_that_matter() {
        assert_eq!(
            [0, 999, 1_000, 999_499, 999_600, 1_234_567, 17_200_000_000].map(short_count),
            ["0", "999", "1.00K", "999K", "1.00M", "1.23M", "17.2B"]
        );
        assert_eq!([12, 4_096].map(bytes), ["12 B", "4.10 kB"]);
        assert_eq!(decimal(-0.0004, 3), "0.000");
        assert_eq!(decimal(-0.4, 3), "−0.400");
        assert_eq!(decimal(12_345.6, 2), "12,346");
        assert_eq!(decimal(1e30, 2), "1.00e30");
        assert_eq!(decimal(f64::NAN, 2), "not a number");
        assert_eq!(percent(0.6123), "61.2%");
    }
}
