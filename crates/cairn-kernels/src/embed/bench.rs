//! The embeddings as the registry and the benchmark see them.

use super::{Embed, EmbedGrad, PositionEmbed, embed, embed_grad, position_embed};
use crate::bench::inputs::{F32_ONLY, Table, case, ids, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

const SHAPES: &[&[Dim]] =
    &[&[("t", 4096), ("v", 4096), ("d", 384)], &[("t", 1024), ("v", 50257), ("d", 768)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "embed",
        description: "rows of a table by id",
        encodings: &Encoding::ALL,
        shapes: SHAPES,
        prepare: embed_case,
    },
    Operator {
        name: "embed_grad",
        description: "rows added to a table by id",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: embed_grad_case,
    },
    Operator {
        name: "position_embed",
        description: "rows of a table by position, added",
        encodings: &Encoding::ALL,
        shapes: &[&[("t", 1024), ("v", 1024), ("d", 768)]],
        prepare: position_embed_case,
    },
];

fn embed_case(shape: &Shape, encoding: Encoding) -> Case {
    let [t, v, d] = shape.sizes(["t", "v", "d"]);
    let mut table = Table::warm((encoding, encoding.layouts()[0]), v, d);
    let (ids_t, mut y_td) = (ids(t, v), zeros(t * d));
    let read = table.bytes / v * t / 4;
    case(0.0, t * d + read, move |cpu| {
        embed(cpu, Embed { ids_t: &ids_t, weight: table.weight(), y_td: &mut y_td });
    })
}

fn embed_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, v, d] = shape.sizes(["t", "v", "d"]);
    let (ids_t, dy_td, mut dw_vd) = (ids(t, v), values(t * d, 1), zeros(v * d));
    case((t * d) as f64, 3 * t * d, move |cpu| {
        let (ids_t, dy_td, dw_vd) = (&ids_t[..], &dy_td[..], &mut dw_vd[..]);
        embed_grad(cpu, EmbedGrad { ids_t, dy_td, d, dw_vd, accumulate: true });
    })
}

fn position_embed_case(shape: &Shape, encoding: Encoding) -> Case {
    let [t, v, d] = shape.sizes(["t", "v", "d"]);
    let mut table = Table::warm((encoding, encoding.layouts()[0]), v, d);
    let (positions_t, x_td, mut y_td) = (ids(t, v), values(t * d, 1), zeros(t * d));
    let read = table.bytes / v * t / 4;
    case((t * d) as f64, 2 * t * d + read, move |cpu| {
        let (positions_t, x_td, weight) = (&positions_t[..], &x_td[..], table.weight());
        position_embed(cpu, PositionEmbed { positions_t, x_td, weight, y_td: &mut y_td });
    })
}
