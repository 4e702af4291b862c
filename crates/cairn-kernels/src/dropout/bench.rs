//! Dropout as the registry and the benchmark see it.

use super::{Dropout, DropoutAssign, DropoutMask, dropout, dropout_assign};
use crate::bench::inputs::{F32_ONLY, case, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

const SHAPES: &[&[Dim]] = &[&[("n", 4096), ("d", 384)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "dropout",
        description: "elements zeroed by a hash of their place",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: dropout_case,
    },
    Operator {
        name: "dropout_assign",
        description: "elements zeroed by a hash of their place, in place",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: dropout_assign_case,
    },
];

fn mask() -> DropoutMask {
    DropoutMask { p: 0.1, seed: 1, step: 1, site: 0, first_token: 0 }
}

fn dropout_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d] = shape.sizes(["n", "d"]);
    let (x, mut y) = (values(n * d, 1), zeros(n * d));
    case((n * d) as f64, 2 * n * d, move |cpu| {
        dropout(cpu, Dropout { x_td: &x, y_td: &mut y, d, mask: mask() });
    })
}

fn dropout_assign_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d] = shape.sizes(["n", "d"]);
    let mut y = values(n * d, 1);
    case((n * d) as f64, 2 * n * d, move |cpu| {
        dropout_assign(cpu, DropoutAssign { y_td: &mut y, d, mask: mask() });
    })
}
