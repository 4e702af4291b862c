//! The update as the registry and the benchmark see it.

use super::{AdamW, AdamWStep, Ema, SumSquares, adamw, ema, sum_squares};
use crate::bench::inputs::{F32_ONLY, case, filled, values};
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

const SHAPES: &[&[Dim]] = &[&[("n", 12_000_000)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "global_norm",
        description: "the squared norm of a tensor",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: sum_squares_case,
    },
    Operator {
        name: "adamw",
        description: "one optimizer step; bf16 with the rounded copy",
        encodings: &[Encoding::F32, Encoding::Bf16],
        shapes: SHAPES,
        prepare: adamw_case,
    },
    Operator {
        name: "ema",
        description: "the moving average of a weight",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: ema_case,
    },
];

fn sum_squares_case(shape: &Shape, _encoding: Encoding) -> Case {
    let x = values(shape.size("n"), 1);
    case(2.0 * x.len() as f64, x.len(), move |cpu| {
        let mut total = 0.0;
        sum_squares(cpu, SumSquares { x: &x, total: &mut total });
        std::hint::black_box(total);
    })
}

fn adamw_case(shape: &Shape, encoding: Encoding) -> Case {
    let n = shape.size("n");
    let (mut w, grad, mut m, mut v) = (values(n, 1), values(n, 2), filled(0.1, n), filled(0.1, n));
    let mut copy = vec![0; if encoding == Encoding::Bf16 { n } else { 0 }];
    let step = AdamWStep {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 10,
        grad_scale: 1.0,
    };
    case(14.0 * n as f64, 7 * n + copy.len() / 2, move |cpu| {
        let bf16_copy = (!copy.is_empty()).then_some(&mut copy[..]);
        adamw(cpu, AdamW { w: &mut w, bf16_copy, grad: &grad, m: &mut m, v: &mut v, step });
    })
}

fn ema_case(shape: &Shape, _encoding: Encoding) -> Case {
    let n = shape.size("n");
    let (w, mut average) = (values(n, 1), values(n, 2));
    case(3.0 * n as f64, 3 * n, move |cpu| {
        ema(cpu, Ema { w: &w, ema: &mut average, decay: 0.999 });
    })
}
