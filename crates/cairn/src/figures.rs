//! Numbers as people read them.

use std::fmt;

/// Bytes in binary units: `1.4 GiB`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes(pub(crate) f64);

impl Bytes {
    /// A size in memory.
    pub(crate) fn of(bytes: usize) -> Self {
        Self(bytes as f64)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB"];
        f.pad(&scaled(self.0, 1024.0, &units))
    }
}

/// A count in decimal units: `12.3 M`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count(pub(crate) f64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = scaled(self.0, 1000.0, &["", "k", "M", "G", "T", "P", "E"]);
        f.pad(text.trim_end())
    }
}

/// Three digits that count, and the unit.
fn scaled(value: f64, base: f64, units: &[&str]) -> String {
    let mut scaled = value;
    let mut unit = 0;
    // 999.5 would print as four digits.
    while scaled >= 999.5 && unit + 1 < units.len() {
        scaled /= base;
        unit += 1;
    }
    let decimals = match scaled {
        _ if unit == 0 => 0,
        x if x < 9.995 => 2,
        x if x < 99.95 => 1,
        _ => 0,
    };
    format!("{scaled:.decimals$} {}", units[unit])
}

/// A length of time: `4 m 03 s`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seconds(pub(crate) f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.is_finite() || self.0 < 0.0 {
            return f.pad("?");
        }
        if self.0 < 0.000_999_5 {
            return f.pad(&format!("{:.0} µs", self.0 * 1e6));
        }
        if self.0 < 1.0 {
            return f.pad(&format!("{:.0} ms", self.0 * 1000.0));
        }
        if self.0 < 59.95 {
            return f.pad(&format!("{:.1} s", self.0));
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked above"
        )]
        let whole = self.0.round() as u64;
        let (days, hours) = (whole / 86_400, whole / 3600 % 24);
        let (minutes, seconds) = (whole / 60 % 60, whole % 60);
        f.pad(&match (days, hours) {
            (0, 0) => format!("{minutes} m {seconds:02} s"),
            (0, _) => format!("{hours} h {minutes:02} m"),
            _ => format!("{days} d {hours:02} h"),
        })
    }
}

/// A part of a whole: `41 %`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Percent(pub(crate) f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.0;
        let decimals = usize::from(percent < 9.95);
        f.pad(&format!("{percent:.decimals$} %"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_binary_units() {
        let check = |bytes: f64, expected: &str| assert_eq!(Bytes(bytes).to_string(), expected);
        check(0.0, "0 B");
        check(999.0, "999 B");
        check(1000.0, "0.98 KiB");
        check(1536.0 * 1024.0, "1.50 MiB");
        check(12.34 * 1024.0 * 1024.0 * 1024.0, "12.3 GiB");
    }

    #[test]
    fn counts_have_decimal_units() {
        let check = |count: f64, expected: &str| assert_eq!(Count(count).to_string(), expected);
        check(12.0, "12");
        check(999_999.0, "1.00 M");
        check(124_439_808.0, "124 M");
        check(3.1e12, "3.10 T");
    }

    #[test]
    fn times_have_the_units_that_matter() {
        let check =
            |seconds: f64, expected: &str| assert_eq!(Seconds(seconds).to_string(), expected);
        check(0.000_029, "29 µs");
        check(0.0123, "12 ms");
        check(59.96, "1 m 00 s");
        check(243.0, "4 m 03 s");
        check(7260.0, "2 h 01 m");
        check(200_000.0, "2 d 07 h");
        check(f64::NAN, "?");
    }

    #[test]
    fn percentages_keep_two_digits() {
        assert_eq!(Percent(0.412).to_string(), "41 %");
        assert_eq!(Percent(0.0123).to_string(), "1.2 %");
    }
}
