//! Moving rows: joining and splitting widths, picking rows by number and putting them back.

use crate::cpu::Cpu;

/// `y[i] = a[i] ++ b[i]`, row by row.
///
/// Shapes: `a_nd` `[n, d]`, `b_ne` `[n, e]`, `y` `[n, d + e]`.
#[derive(Debug)]
pub struct Concat<'a> {
    /// Left parts.
    pub a_nd: &'a [f32],
    /// Right parts.
    pub b_ne: &'a [f32],
    /// Width of a left part.
    pub d: usize,
    /// Width of a right part.
    pub e: usize,
    /// Joined rows, overwritten.
    pub y: &'a mut [f32],
}

/// The inverse of [`Concat`], and its adjoint.
#[derive(Debug)]
pub struct Split<'a> {
    /// Joined rows.
    pub x: &'a [f32],
    /// Width of a left part.
    pub d: usize,
    /// Width of a right part.
    pub e: usize,
    /// Left parts, overwritten.
    pub a_nd: &'a mut [f32],
    /// Right parts, overwritten.
    pub b_ne: &'a mut [f32],
}

/// `y[o] = x[rows[o]]`.
#[derive(Debug)]
pub struct GatherRows<'a> {
    /// Source, `[t, d]`.
    pub x_td: &'a [f32],
    /// Which row each output row copies.
    pub rows_o: &'a [u32],
    /// Width of a row.
    pub d: usize,
    /// Outputs, `[o, d]`, overwritten.
    pub y_od: &'a mut [f32],
}

/// `x[rows[o]] += y[o]` in ascending o: the adjoint of [`GatherRows`].
#[derive(Debug)]
pub struct ScatterRows<'a> {
    /// What is added, `[o, d]`.
    pub y_od: &'a [f32],
    /// Which row each is added to.
    pub rows_o: &'a [u32],
    /// Width of a row.
    pub d: usize,
    /// Target, `[t, d]`.
    pub x_td: &'a mut [f32],
    /// False starts from zeros everywhere, true from what is there.
    pub accumulate: bool,
}

/// Joins rows.
pub fn concat(_cpu: &Cpu, args: Concat<'_>) {
    concat_reference(args);
}

/// [`concat`] in plain loops.
pub fn concat_reference(args: Concat<'_>) {
    let Concat { a_nd, b_ne, d, e, y } = args;
    let n = y.len() / (d + e);
    assert_eq!((a_nd.len(), b_ne.len(), y.len()), (n * d, n * e, n * (d + e)), "concat: lengths");
    for i in 0..n {
        let row = &mut y[i * (d + e)..][..d + e];
        row[..d].copy_from_slice(&a_nd[i * d..][..d]);
        row[d..].copy_from_slice(&b_ne[i * e..][..e]);
    }
}

/// Splits rows.
pub fn split(_cpu: &Cpu, args: Split<'_>) {
    split_reference(args);
}

/// [`split`] in plain loops.
pub fn split_reference(args: Split<'_>) {
    let Split { x, d, e, a_nd, b_ne } = args;
    let n = x.len() / (d + e);
    assert_eq!((a_nd.len(), b_ne.len(), x.len()), (n * d, n * e, n * (d + e)), "split: lengths");
    for i in 0..n {
        let row = &x[i * (d + e)..][..d + e];
        a_nd[i * d..][..d].copy_from_slice(&row[..d]);
        b_ne[i * e..][..e].copy_from_slice(&row[d..]);
    }
}

/// Copies chosen rows.
pub fn gather_rows(_cpu: &Cpu, args: GatherRows<'_>) {
    gather_rows_reference(args);
}

/// [`gather_rows`] in plain loops.
pub fn gather_rows_reference(args: GatherRows<'_>) {
    let GatherRows { x_td, rows_o, d, y_od } = args;
    assert_eq!(y_od.len(), rows_o.len() * d, "gather_rows: y");
    for (y_d, &row) in y_od.chunks_exact_mut(d).zip(rows_o) {
        y_d.copy_from_slice(&x_td[row as usize * d..][..d]);
    }
}

/// Adds rows to chosen rows.
pub fn scatter_rows(_cpu: &Cpu, args: ScatterRows<'_>) {
    scatter_rows_reference(args);
}

/// [`scatter_rows`] in plain loops.
pub fn scatter_rows_reference(args: ScatterRows<'_>) {
    let ScatterRows { y_od, rows_o, d, x_td, accumulate } = args;
    assert_eq!(y_od.len(), rows_o.len() * d, "scatter_rows: y");
    if !accumulate {
        x_td.fill(0.0);
    }
    for (y_d, &row) in y_od.chunks_exact(d).zip(rows_o) {
        for (x, y) in x_td[row as usize * d..][..d].iter_mut().zip(y_d) {
            *x += y;
        }
    }
}
