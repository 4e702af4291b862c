//! The rotary embedding as the registry and the benchmark see it.

use super::{Rope, RopePairing, rope};
use crate::bench::inputs::{EXP_FLOPS, F32_ONLY, case, ids, values};
use crate::registry::{Case, Dim, Operator, Shape};

const SHAPES: &[&[Dim]] = &[&[("t", 4096), ("h", 6), ("k", 64)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "rope",
        description: "heads turned by position, in place",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: |shape, _| rope_case(shape, false),
    },
    Operator {
        name: "rope_grad",
        description: "heads turned back",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: |shape, _| rope_case(shape, true),
    },
];

fn rope_case(shape: &Shape, inverse: bool) -> Case {
    let [t, heads, head_dim] = shape.sizes(["t", "h", "k"]);
    let mut x = values(t * heads * head_dim, 1);
    let positions = ids(t, t);
    let inv_freq = values(head_dim / 2, 2).iter().map(|x| x.abs()).collect::<Vec<f32>>();
    let flops = (3 * t * heads * head_dim) as f64 + EXP_FLOPS * (t * head_dim) as f64;
    case(flops, 2 * t * heads * head_dim, move |cpu| {
        let args = Rope {
            x_thk: &mut x,
            positions_t: &positions,
            inv_freq: &inv_freq,
            attention_scaling: 1.0,
            heads,
            head_dim,
            pairing: RopePairing::Half,
            inverse,
        };
        rope(cpu, args);
    })
}
