//! Embeddings: rows of a weight, picked by token id or by position, and their gradient.
//!
//! Dimensions: `t` tokens, `v` rows of the table, `d` width of a row.

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::encoding::{Encoding, Layout, Weight};
use crate::isa::Simd;
use crate::rows::{ScatterRows, add_row, scatter_rows};
use crate::simd::{LANES, f32_from_bf16, f32_from_f16, kernel};

/// `y[t] = weight[ids[t]]`, whatever the encoding and the layout of the weight: a tied head is
/// stored once, in the form its products want.
#[derive(Debug)]
pub struct Embed<'a> {
    /// Row numbers, `[t]`, below the weight's `n`.
    pub ids_t: &'a [u32],
    /// The table: `n` rows of width `k`.
    pub weight: Weight<'a>,
    /// Outputs, `[t, d]`, overwritten.
    pub y_td: &'a mut [f32],
}

/// `dw[ids[t]] += dy[t]` in ascending t.
#[derive(Debug)]
pub struct EmbedGrad<'a> {
    /// Row numbers of the forward call, `[t]`.
    pub ids_t: &'a [u32],
    /// Gradient of the output, `[t, d]`.
    pub dy_td: &'a [f32],
    /// Width of a row.
    pub d: usize,
    /// Gradient of the table, `[v, d]`.
    pub dw_vd: &'a mut [f32],
    /// False starts from zeros everywhere, true from what is there.
    pub accumulate: bool,
}

/// `y[t] = x[t] + weight[positions[t]]`.
#[derive(Debug)]
pub struct PositionEmbed<'a> {
    /// Row numbers, `[t]`, below the weight's `n`.
    pub positions_t: &'a [u32],
    /// What the embedding is added to, `[t, d]`.
    pub x_td: &'a [f32],
    /// The table: `n` rows of width `k`.
    pub weight: Weight<'a>,
    /// Outputs, `[t, d]`, overwritten.
    pub y_td: &'a mut [f32],
}

/// Picks rows of a table.
pub fn embed(cpu: &Cpu, args: Embed<'_>) {
    let Embed { ids_t, weight, y_td } = args;
    let simd = cpu.simd();
    let d = weight.k;
    weight.check();
    assert_eq!(y_td.len(), ids_t.len() * d, "embed: y");
    parallel_rows(cpu, ids_t.len(), rows_per_task(d), RowSlice::new(y_td, d), |rows, y_td, _| {
        for (y_d, &id) in y_td.chunks_exact_mut(d).zip(&ids_t[rows]) {
            row(simd, &weight, id as usize, y_d);
        }
    });
}

/// One row of a table.
fn row(simd: Simd, weight: &Weight<'_>, id: usize, y_d: &mut [f32]) {
    let Weight { layout, n, k, .. } = *weight;
    assert!(id < n, "row {id} of a table with {n} rows");
    match layout {
        Layout::RowMajor => whole_row(simd, weight, id, y_d),
        Layout::Panel => lane_of_panel(weight, id / LANES * k * LANES + id % LANES, id, y_d),
    }
}

/// A row that is contiguous.
fn whole_row(simd: Simd, weight: &Weight<'_>, id: usize, y_d: &mut [f32]) {
    let k = weight.k;
    let start = id * k;
    match weight.encoding {
        Encoding::F32 => y_d.copy_from_slice(&weight.f32s()[start..][..k]),
        Encoding::Bf16 => widen_bf16(simd, &weight.u16s()[start..][..k], y_d),
        Encoding::F16 => widen_f16(simd, &weight.u16s()[start..][..k], y_d),
        Encoding::Bf16z
        | Encoding::Q8
        | Encoding::Q4
        | Encoding::Nf4
        | Encoding::Fp8
        | Encoding::Fp4 => unreachable!("{} weights lie in panels", weight.encoding),
    }
}

/// A row that is one lane of a panel, from `start` on.
fn lane_of_panel(weight: &Weight<'_>, start: usize, id: usize, y_d: &mut [f32]) {
    match weight.encoding {
        Encoding::F32 => {
            let numbers = weight.f32s()[start..].iter().step_by(LANES);
            y_d.iter_mut().zip(numbers).for_each(|(y, &x)| *y = x);
        }
        Encoding::Bf16 => {
            let numbers = weight.u16s()[start..].iter().step_by(LANES);
            y_d.iter_mut().zip(numbers).for_each(|(y, &x)| *y = f32_from_bf16(x));
        }
        Encoding::F16 => {
            let numbers = weight.u16s()[start..].iter().step_by(LANES);
            y_d.iter_mut().zip(numbers).for_each(|(y, &x)| *y = f32_from_f16(x));
        }
        Encoding::Bf16z
        | Encoding::Q8
        | Encoding::Q4
        | Encoding::Nf4
        | Encoding::Fp8
        | Encoding::Fp4 => {
            y_d.iter_mut().enumerate().for_each(|(column, y)| *y = weight.value(id, column));
        }
    }
}

kernel! {
    fn widen_bf16<V>(from: &[u16], to: &mut [f32]) {
        let (vectors, tail) = from.as_chunks::<LANES>();
        let (targets, rest) = to.as_chunks_mut::<LANES>();
        for (from, to) in vectors.iter().zip(targets) {
            V::from_bf16(from).store(to);
        }
        rest.iter_mut().zip(tail).for_each(|(y, &x)| *y = f32_from_bf16(x));
    }
}

kernel! {
    fn widen_f16<V>(from: &[u16], to: &mut [f32]) {
        let (vectors, tail) = from.as_chunks::<LANES>();
        let (targets, rest) = to.as_chunks_mut::<LANES>();
        for (from, to) in vectors.iter().zip(targets) {
            V::from_f16(from).store(to);
        }
        rest.iter_mut().zip(tail).for_each(|(y, &x)| *y = f32_from_f16(x));
    }
}

/// [`embed`] in plain loops.
pub fn embed_reference(args: Embed<'_>) {
    let Embed { ids_t, weight, y_td } = args;
    let d = weight.k;
    assert_eq!(y_td.len(), ids_t.len() * d, "embed: y");
    for (y_d, &id) in y_td.chunks_exact_mut(d).zip(ids_t) {
        for (column, y) in y_d.iter_mut().enumerate() {
            *y = weight.value(id as usize, column);
        }
    }
}

/// The gradient of [`embed`]; also of [`position_embed`] with its positions as ids.
pub fn embed_grad(cpu: &Cpu, args: EmbedGrad<'_>) {
    let EmbedGrad { ids_t, dy_td, d, dw_vd, accumulate } = args;
    assert_eq!(dy_td.len(), ids_t.len() * d, "embed_grad: dy");
    scatter_rows(cpu, ScatterRows { y_od: dy_td, rows_o: ids_t, d, x_td: dw_vd, accumulate });
}

/// [`embed_grad`] in plain loops.
pub fn embed_grad_reference(args: EmbedGrad<'_>) {
    let EmbedGrad { ids_t, dy_td, d, dw_vd, accumulate } = args;
    assert_eq!(dy_td.len(), ids_t.len() * d, "embed_grad: dy");
    if !accumulate {
        dw_vd.fill(0.0);
    }
    for (dy_d, &id) in dy_td.chunks_exact(d).zip(ids_t) {
        for (dw, dy) in dw_vd[id as usize * d..][..d].iter_mut().zip(dy_d) {
            *dw += dy;
        }
    }
}

/// Adds rows of a table.
pub fn position_embed(cpu: &Cpu, args: PositionEmbed<'_>) {
    let simd = cpu.simd();
    let PositionEmbed { positions_t, x_td, weight, y_td } = args;
    let d = weight.k;
    weight.check();
    let lens = (positions_t.len() * d, positions_t.len() * d);
    assert_eq!((x_td.len(), y_td.len()), lens, "position_embed: x and y");
    let outputs = RowSlice::new(y_td, d);
    parallel_rows(cpu, positions_t.len(), rows_per_task(d), outputs, |rows, y_td, _| {
        let x_td = &x_td[rows.start * d..rows.end * d];
        for (y_d, &position) in y_td.chunks_exact_mut(d).zip(&positions_t[rows]) {
            row(simd, &weight, position as usize, y_d);
        }
        add_row(simd, x_td, y_td);
    });
}

/// [`position_embed`] in plain loops.
pub fn position_embed_reference(args: PositionEmbed<'_>) {
    let PositionEmbed { positions_t, x_td, weight, y_td } = args;
    assert_eq!(x_td.len(), y_td.len(), "position_embed: x");
    embed_reference(Embed { ids_t: positions_t, weight, y_td });
    for (y, x) in y_td.iter_mut().zip(x_td) {
        *y += x;
    }
}

#[cfg(test)]
mod tests;
