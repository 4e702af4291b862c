//! The products as plain loops: what the kernels compute, in the order they compute it.

use std::ops::Range;

use super::rows::RowList;
use super::{BiasGrad, Matmul, MatmulDw, MatmulDx};
use crate::TOKEN_BLOCK;
use crate::compute::{Compute, bf16_chain, int8_chain};
use crate::encoding::Weight;

/// The token blocks of `t` tokens in batch rows of `row_tokens`: at most [`TOKEN_BLOCK`] long, the
/// first of each row at the row's start.
pub(crate) fn token_blocks(t: usize, row_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = if t == 0 { 0 } else { t.div_ceil(row_tokens) };
    (0..rows).flat_map(move |row| {
        let end = t.min((row + 1) * row_tokens);
        (row * row_tokens..end).step_by(TOKEN_BLOCK).map(move |s| s..end.min(s + TOKEN_BLOCK))
    })
}

/// The blocks of an expert's rows, given the token of each in ascending order: at most
/// [`TOKEN_BLOCK`] rows long, each batch row of `row_tokens` tokens begins a new one.
pub(super) fn row_blocks(
    tokens: RowList<'_>,
    row_tokens: usize,
) -> impl Iterator<Item = Range<usize>> {
    let count = tokens.entries.len();
    let mut start = 0;
    std::iter::from_fn(move || {
        let first = start;
        if first == count {
            return None;
        }
        let batch_row = tokens.at(first) / row_tokens;
        let end = count.min(first + TOKEN_BLOCK);
        start = (first..end).find(|&i| tokens.at(i) / row_tokens != batch_row).unwrap_or(end);
        Some(first..start)
    })
}

/// Defines [`matmul`](super::matmul): plain loops in the canonical order.
pub fn matmul_reference(args: Matmul<'_>) {
    args.check();
    let Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute } = args;
    let Weight { n, k, .. } = weight;
    for token in 0..t {
        for output in 0..n {
            let y = &mut y_tn[token * n + output];
            let start = if accumulate { *y } else { bias_n.map_or(0.0, |bias| bias[output]) };
            let x = |input: usize| x_tk[token * k + input];
            let w = |input: usize| weight.value(output, input);
            *y = match compute {
                Compute::F32 => (0..k).fold(start, |sum, input| x(input).mul_add(w(input), sum)),
                Compute::Bf16 => bf16_chain(start, k, x, w),
                Compute::Int8 => {
                    let parts = |input: usize| weight.code_and_scale(output, input);
                    int8_chain(start, &x_tk[token * k..(token + 1) * k], parts)
                }
            };
        }
    }
}

/// Defines [`matmul_dx`](super::matmul_dx): plain loops in the canonical order.
pub fn matmul_dx_reference(args: MatmulDx<'_>) {
    args.check();
    let MatmulDx { dy_tn, weight, dx_tk, t, accumulate } = args;
    let Weight { n, k, .. } = weight;
    for token in 0..t {
        for input in 0..k {
            let dx = &mut dx_tk[token * k + input];
            let start = if accumulate { *dx } else { 0.0 };
            *dx = (0..n).fold(start, |sum, output| {
                dy_tn[token * n + output].mul_add(weight.value(output, input), sum)
            });
        }
    }
}

/// Defines [`matmul_dw`](super::matmul_dw): plain loops in the canonical order.
pub fn matmul_dw_reference(args: MatmulDw<'_>) {
    args.check();
    let MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens, accumulate } = args;
    for output in 0..n {
        for input in 0..k {
            let dw = &mut dw_nk[output * k + input];
            let start = if accumulate { *dw } else { 0.0 };
            *dw = token_blocks(t, row_tokens).fold(start, |total, block| {
                total
                    + block.fold(0.0, |sum: f32, token| {
                        dy_tn[token * n + output].mul_add(x_tk[token * k + input], sum)
                    })
            });
        }
    }
}

/// Defines [`bias_grad`](super::bias_grad): plain loops in the canonical order.
pub fn bias_grad_reference(args: BiasGrad<'_>) {
    args.check();
    let BiasGrad { dy_tn, db_n, t, row_tokens, accumulate } = args;
    let n = db_n.len();
    for (output, db) in db_n.iter_mut().enumerate() {
        let start = if accumulate { *db } else { 0.0 };
        *db = token_blocks(t, row_tokens).fold(start, |total, block| {
            total + block.fold(0.0, |sum, token| sum + dy_tn[token * n + output])
        });
    }
}
