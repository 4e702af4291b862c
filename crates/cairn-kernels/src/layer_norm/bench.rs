//! LayerNorm as the registry and the benchmark see it.

use super::{LayerNorm, LayerNormGrad, layer_norm, layer_norm_grad};
use crate::TOKEN_BLOCK;
use crate::bench::inputs::{F32_ONLY, case, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Operator, Shape};

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "layer_norm",
        description: "rows to mean 0 and variance 1",
        encodings: F32_ONLY,
        shapes: &[&[("n", 1024), ("d", 768)], &[("n", 1), ("d", 768)]],
        prepare: layer_norm_case,
    },
    Operator {
        name: "layer_norm_grad",
        description: "all gradients of layer_norm in one pass",
        encodings: F32_ONLY,
        shapes: &[&[("n", 1024), ("d", 768)]],
        prepare: layer_norm_grad_case,
    },
];

fn layer_norm_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d] = shape.sizes(["n", "d"]);
    let (x_nd, weight_d, mut y_nd) = (values(n * d, 1), values(d, 2), zeros(n * d));
    let bias = values(d, 3);
    case(7.0 * (n * d) as f64, 2 * n * d, move |cpu| {
        let (x_nd, weight_d, y_nd) = (&x_nd[..], &weight_d[..], &mut y_nd[..]);
        layer_norm(cpu, LayerNorm { x_nd, weight_d, bias_d: Some(&bias), eps: 1e-5, y_nd });
    })
}

fn layer_norm_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d] = shape.sizes(["n", "d"]);
    let (x, dy, weight) = (values(n * d, 1), values(n * d, 2), values(d, 3));
    let (mut dx, mut dw, mut db) = (zeros(n * d), zeros(d), zeros(d));
    case(18.0 * (n * d) as f64, 3 * n * d, move |cpu| {
        let args = LayerNormGrad {
            dy_nd: &dy,
            x_nd: &x,
            weight_d: &weight,
            eps: 1e-5,
            dx_nd: &mut dx,
            accumulate_dx: false,
            dw_d: Some(&mut dw),
            db_d: Some(&mut db),
            rows_per_token: 1,
            row_tokens: TOKEN_BLOCK,
            accumulate_dw: false,
        };
        layer_norm_grad(cpu, args);
    })
}
