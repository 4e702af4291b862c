//! Moving rows: joining and splitting widths, picking rows by number and putting them back.

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes::{at, put, vectors};
use crate::simd::kernel;

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
pub fn concat(cpu: &Cpu, args: Concat<'_>) {
    let Concat { a_nd, b_ne, d, e, y } = args;
    let width = d + e;
    let n = y.len() / width;
    assert_eq!((a_nd.len(), b_ne.len(), y.len()), (n * d, n * e, n * width), "concat: lengths");
    parallel_rows(cpu, n, rows_per_task(width), RowSlice::new(y, width), |rows, y, _| {
        let a_nd = &a_nd[rows.start * d..rows.end * d];
        let b_ne = &b_ne[rows.start * e..rows.end * e];
        concat_reference(Concat { a_nd, b_ne, d, e, y });
    });
}

/// [`concat()`] in plain loops.
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
pub fn split(cpu: &Cpu, args: Split<'_>) {
    let Split { x, d, e, a_nd, b_ne } = args;
    let width = d + e;
    let n = x.len() / width;
    assert_eq!((a_nd.len(), b_ne.len(), x.len()), (n * d, n * e, n * width), "split: lengths");
    let outputs = [RowSlice::new(a_nd, d), RowSlice::new(b_ne, e)];
    parallel_rows(cpu, n, rows_per_task(width), outputs, |rows, [a_nd, b_ne], _| {
        split_reference(Split { x: &x[rows.start * width..rows.end * width], d, e, a_nd, b_ne });
    });
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
pub fn gather_rows(cpu: &Cpu, args: GatherRows<'_>) {
    let GatherRows { x_td, rows_o, d, y_od } = args;
    assert_eq!(y_od.len(), rows_o.len() * d, "gather_rows: y");
    parallel_rows(cpu, rows_o.len(), rows_per_task(d), RowSlice::new(y_od, d), |rows, y_od, _| {
        gather_rows_reference(GatherRows { x_td, rows_o: &rows_o[rows], d, y_od });
    });
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
pub fn scatter_rows(cpu: &Cpu, args: ScatterRows<'_>) {
    let simd = cpu.simd();
    let ScatterRows { y_od, rows_o, d, x_td, accumulate } = args;
    assert_eq!(y_od.len(), rows_o.len() * d, "scatter_rows: y");
    let t = x_td.len() / d;
    assert!(rows_o.iter().all(|&row| (row as usize) < t), "scatter_rows: a row past the end");
    // Each task owns some rows of the target and looks for what is added to them, so that every
    // row sums in the same order.
    let per_task = t.div_ceil(4 * cpu.threads()).max(rows_per_task(d));
    parallel_rows(cpu, t, per_task, RowSlice::new(x_td, d), |range, x_td, _| {
        if !accumulate {
            x_td.fill(0.0);
        }
        for (y_d, &row) in y_od.chunks_exact(d).zip(rows_o) {
            if range.contains(&(row as usize)) {
                let x_d = &mut x_td[(row as usize - range.start) * d..][..d];
                add_row(simd, y_d, x_d);
            }
        }
    });
}

kernel! {
    /// `x += y`.
    pub(crate) fn add_row<V>(y_d: &[f32], x_d: &mut [f32]) {
        for i in vectors(x_d.len()) {
            put(at::<V>(x_d, i) + at(y_d, i), x_d, i);
        }
    }
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

#[cfg(test)]
mod tests;
