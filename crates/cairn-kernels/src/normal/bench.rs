//! Fresh weights as the registry and the benchmark see them.

use super::{FillNormal, fill_normal};
use crate::bench::inputs::{EXP_FLOPS, F32_ONLY, case, zeros};
use crate::registry::Operator;

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[Operator {
    name: "fill_normal",
    description: "normally distributed numbers, functions of their place",
    encodings: F32_ONLY,
    shapes: &[&[("n", 1 << 20)]],
    prepare: |shape, _| {
        let n = shape.size("n");
        let mut y = zeros(n);
        // A logarithm a pair, and a sine or cosine each.
        case(1.5 * EXP_FLOPS * n as f64, n, move |cpu| {
            fill_normal(cpu, FillNormal { key: 1, first: 0, deviation: 0.02, y: &mut y });
        })
    },
}];
