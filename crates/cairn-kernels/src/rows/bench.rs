//! The movers of rows as the registry and the benchmark see them.

use super::{Concat, GatherRows, ScatterRows, Split, concat, gather_rows, scatter_rows, split};
use crate::bench::inputs::{F32_ONLY, case, ids, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

/// Heads of latent attention: 128 columns without position, 64 with.
const JOINED: &[&[Dim]] = &[&[("n", 4096), ("d", 128), ("e", 64)]];
/// One row of eight of a batch.
const PICKED: &[&[Dim]] = &[&[("t", 4096), ("o", 512), ("d", 384)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "concat",
        description: "rows joined",
        encodings: F32_ONLY,
        shapes: JOINED,
        prepare: concat_case,
    },
    Operator {
        name: "split",
        description: "rows cut in two",
        encodings: F32_ONLY,
        shapes: JOINED,
        prepare: split_case,
    },
    Operator {
        name: "gather_rows",
        description: "rows picked by number",
        encodings: F32_ONLY,
        shapes: PICKED,
        prepare: gather_rows_case,
    },
    Operator {
        name: "scatter_rows",
        description: "rows added where they were picked, zeros elsewhere",
        encodings: F32_ONLY,
        shapes: PICKED,
        prepare: scatter_rows_case,
    },
];

fn concat_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d, e] = shape.sizes(["n", "d", "e"]);
    let (a, b, mut y) = (values(n * d, 1), values(n * e, 2), zeros(n * (d + e)));
    case(0.0, 2 * n * (d + e), move |cpu| {
        concat(cpu, Concat { a_nd: &a, b_ne: &b, d, e, y: &mut y });
    })
}

fn split_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [n, d, e] = shape.sizes(["n", "d", "e"]);
    let (x, mut a, mut b) = (values(n * (d + e), 1), zeros(n * d), zeros(n * e));
    case(0.0, 2 * n * (d + e), move |cpu| {
        split(cpu, Split { x: &x, d, e, a_nd: &mut a, b_ne: &mut b });
    })
}

fn gather_rows_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, o, d] = shape.sizes(["t", "o", "d"]);
    let (x_td, rows_o, mut y_od) = (values(t * d, 1), ids(o, t), zeros(o * d));
    case(0.0, 2 * o * d, move |cpu| {
        gather_rows(cpu, GatherRows { x_td: &x_td, rows_o: &rows_o, d, y_od: &mut y_od });
    })
}

fn scatter_rows_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, o, d] = shape.sizes(["t", "o", "d"]);
    let (y_od, rows_o, mut x_td) = (values(o * d, 1), ids(o, t), zeros(t * d));
    case((o * d) as f64, t * d + o * d, move |cpu| {
        let (y_od, rows_o, x_td) = (&y_od[..], &rows_o[..], &mut x_td[..]);
        scatter_rows(cpu, ScatterRows { y_od, rows_o, d, x_td, accumulate: false });
    })
}
