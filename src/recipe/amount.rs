//! Amounts with three digits, as the plan prints them. Reading amounts is the business of `data`.

/// `1234567` as `1.23M`.
pub(super) fn short_count(count: u64) -> String {
    short(count, ["", "k", "M", "B", "T", "Q"])
}

/// `1234567` bytes as `1.23 MB`.
pub(super) fn short_bytes(bytes: u64) -> String {
    short(bytes, [" B", " kB", " MB", " GB", " TB", " PB"])
}

/// `0.0123` as `1.23%`.
pub(super) fn percent(share: f64) -> String {
    format!("{}%", three_digits(100.0 * share))
}

fn short(count: u64, units: [&str; 6]) -> String {
    let (mut value, mut unit) = (count as f64, 0);
    // 999,600 is nearer to 1M than to 1000k.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{}{}", three_digits(value), units[unit])
}

/// Without the zeros that end a decimal part.
fn three_digits(value: f64) -> f64 {
    format!("{value:.2e}").parse().expect("a formatted number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_print_three_digits() {
        for (count, text) in [(0, "0"), (999, "999"), (1_000, "1k"), (163_840, "164k"), (999_600, "1M")] {
            assert_eq!(short_count(count), text);
        }
        assert_eq!(short_count(10_000_000_000), "10B");
        assert_eq!(short_count(1_234_567), "1.23M");
        assert_eq!(short_bytes(280_000_000_000), "280 GB");
        assert_eq!(short_bytes(12), "12 B");
        assert_eq!([0.01, 0.081_234, 0.000_002].map(percent), ["1%", "8.12%", "0.0002%"]);
    }
}
