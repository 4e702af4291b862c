//! RMSNorm as the registry and the benchmark see it.

use super::{RmsNorm, RmsNormGrad, rms_norm, rms_norm_grad};
use crate::TOKEN_BLOCK;
use crate::bench::inputs::{F32_ONLY, case, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Operator, Shape};

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "rms_norm",
        description: "rows over their root mean square",
        encodings: F32_ONLY,
        shapes: &[&[("n", 4096), ("d", 384)], &[("n", 1), ("d", 384)]],
        prepare: rms_norm_case,
    },
    Operator {
        name: "rms_norm_grad",
        description: "both gradients of rms_norm in one pass",
        encodings: F32_ONLY,
        shapes: &[&[("n", 4096), ("d", 384)]],
        prepare: rms_norm_grad_case,
    },
];

fn rms_norm_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d] = shape.sizes(["n", "d"]);
    let (x_nd, weight_d, mut y_nd) = (values(n * d, 1), values(d, 2), zeros(n * d));
    case(4.0 * (n * d) as f64, 2 * n * d, move |cpu| {
        let (x_nd, weight_d, y_nd) = (&x_nd[..], &weight_d[..], &mut y_nd[..]);
        rms_norm(cpu, RmsNorm { x_nd, weight_d, eps: 1e-5, plus_one: false, y_nd });
    })
}

fn rms_norm_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d] = shape.sizes(["n", "d"]);
    let (x, dy, weight) = (values(n * d, 1), values(n * d, 2), values(d, 3));
    let (mut dx, mut dw) = (zeros(n * d), zeros(d));
    case(12.0 * (n * d) as f64, 3 * n * d, move |cpu| {
        let args = RmsNormGrad {
            dy_nd: &dy,
            x_nd: &x,
            weight_d: &weight,
            eps: 1e-5,
            plus_one: false,
            dx_nd: &mut dx,
            accumulate_dx: false,
            dw_d: Some(&mut dw),
            rows_per_token: 1,
            row_tokens: TOKEN_BLOCK,
            accumulate_dw: false,
        };
        rms_norm_grad(cpu, args);
    })
}
