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
}
