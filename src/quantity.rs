//! Numbers as people read them, the same in the terminal and on the page.

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

/// `1234567` as "1.23M": three digits, without the zeros that end a decimal part.
pub(crate) fn short_count(count: u64) -> String {
    scaled(count, ["", "k", "M", "B", "T", "Q"])
}

/// `1234567` bytes as "1.23 MB"; decimal multiples.
pub(crate) fn short_bytes(count: u64) -> String {
    scaled(count, [" B", " kB", " MB", " GB", " TB", " PB"])
}

fn scaled(count: u64, units: [&str; 6]) -> String {
    let (mut value, mut unit) = (count as f64, 0);
    // 999,600 is nearer to 1M than to 1000k.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{}{}", three_digits(value), units[unit])
}

fn three_digits(value: f64) -> f64 {
    format!("{value:.2e}").parse().expect("a formatted number")
}

/// A share (0..1) with the digits it was given with, three at most: "1%", "8.12%", "0.0002%".
pub(crate) fn short_percent(share: f64) -> String {
    format!("{}%", three_digits(100.0 * share))
}

/// `1234567` as "1,234,567".
pub(crate) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Seconds as "00:12", "1:02:03" or "3d 04:05"; "--:--" when not known.
pub(crate) fn clock(seconds: f64) -> String {
    if !seconds.is_finite() || seconds > 1e9 {
        return "--:--".to_string();
    }
    let seconds = seconds.max(0.0).round() as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes:02}:{:02}", seconds % 60),
        (0, _) => format!("{hours}:{minutes:02}:{:02}", seconds % 60),
        _ => format!("{days}d {hours:02}:{minutes:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_the_digits_that_matter() {
        assert_eq!(
            [0, 999, 1_000, 163_840, 999_499, 999_600, 1_234_567, 17_200_000_000].map(short_count),
            ["0", "999", "1k", "164k", "999k", "1M", "1.23M", "17.2B"]
        );
        assert_eq!([12, 4_096, 280_000_000_000].map(short_bytes), ["12 B", "4.1 kB", "280 GB"]);
        assert_eq!([0.01, 0.081_234, 0.000_002].map(short_percent), ["1%", "8.12%", "0.0002%"]);
        assert_eq!(decimal(-0.0004, 3), "0.000");
        assert_eq!(decimal(-0.4, 3), "−0.400");
        assert_eq!(decimal(12_345.6, 2), "12,346");
        assert_eq!(decimal(1e30, 2), "1.00e30");
        assert_eq!(decimal(f64::NAN, 2), "not a number");
        assert_eq!(percent(0.6123), "61.2%");
    }

    #[test]
    fn counts_and_times_are_readable() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [0.0, 12.4, 3_723.0, 273_900.0, f64::NAN].map(clock),
            ["00:00", "00:12", "1:02:03", "3d 04:05", "--:--"]
        );
    }
}
