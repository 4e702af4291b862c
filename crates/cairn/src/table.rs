//! Tables in plain text: the first column to the left, the others to the right.

use std::fmt;

/// Rows of cells under a header.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns aligned to the left, from the first.
    text_columns: usize,
}

impl Table {
    /// A table with a header; pass no names for one without.
    pub(crate) fn new(header: &[&str]) -> Self {
        let mut table = Self { rows: Vec::new(), text_columns: 1 };
        if !header.is_empty() {
            table.rows.push(header.iter().map(|&cell| cell.to_owned()).collect());
        }
        table
    }

    /// Aligns the first `count` columns to the left.
    pub(crate) fn with_text_columns(mut self, count: usize) -> Self {
        self.text_columns = count;
        self
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [&dyn fmt::Display; N]) {
        self.add(&cells);
    }

    /// Adds a row of as many cells as there are.
    pub(crate) fn add(&mut self, cells: &[&dyn fmt::Display]) {
        self.rows.push(cells.iter().map(ToString::to_string).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let padding = " ".repeat(widths[column] - cell.chars().count());
                let (before, after) =
                    if column < self.text_columns { ("", &*padding) } else { (&*padding, "") };
                let gap = if column == 0 { "" } else { "  " };
                line += &format!("{gap}{before}{cell}{after}");
            }
            let end = if index + 1 == self.rows.len() { "" } else { "\n" };
            write!(f, "{}{end}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stands_left_and_numbers_right() {
        let mut table = Table::new(&["part", "bytes"]);
        table.row([&"weights", &12]);
        table.row([&"arena", &3456]);
        assert_eq!(table.to_string(), "part     bytes\nweights     12\narena     3456");
    }
}
