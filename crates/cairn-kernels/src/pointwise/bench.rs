//! The elementwise operators as the registry and the benchmark see them.

use super::{
    Add, AddAssign, Fill, Scale, ScaleAssign, Softcap, SoftcapGrad, add, add_assign, fill, scale,
    scale_assign, softcap, softcap_grad,
};
use crate::bench::inputs::{EXP_FLOPS, F32_ONLY, case, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

const SHAPES: &[&[Dim]] = &[&[("n", 4096), ("d", 384)]];
/// Logits, whose soft cap is the one that costs most.
const LOGITS: &[&[Dim]] = &[&[("n", 256), ("d", 4096)]];
const CAP: f32 = 30.0;
/// Close to 1 and exact: an operand that is scaled in place a thousand times stays ordinary.
const FACTOR: f32 = -1.0;

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "add",
        description: "the sum of two tensors",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: add_case,
    },
    Operator {
        name: "add_assign",
        description: "a tensor added to another",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: add_assign_case,
    },
    Operator {
        name: "scale",
        description: "a tensor times a number",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: scale_case,
    },
    Operator {
        name: "scale_assign",
        description: "a tensor times a number, in place",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: scale_assign_case,
    },
    Operator {
        name: "softcap",
        description: "cap · tanh(x / cap)",
        encodings: F32_ONLY,
        shapes: LOGITS,
        prepare: softcap_case,
    },
    Operator {
        name: "softcap_grad",
        description: "the gradient of softcap from its result",
        encodings: F32_ONLY,
        shapes: LOGITS,
        prepare: softcap_grad_case,
    },
    Operator {
        name: "fill",
        description: "one number everywhere",
        encodings: F32_ONLY,
        shapes: SHAPES,
        prepare: fill_case,
    },
];

fn len(shape: &Shape) -> usize {
    shape.sizes(["n", "d"]).into_iter().product()
}

fn add_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (a, b, mut y) = (values(len, 1), values(len, 2), zeros(len));
    case(len as f64, 3 * len, move |cpu| add(cpu, Add { a: &a, b: &b, y: &mut y }))
}

fn add_assign_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (x, mut y) = (values(len, 1), zeros(len));
    case(len as f64, 3 * len, move |cpu| add_assign(cpu, AddAssign { x: &x, y: &mut y }))
}

fn scale_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (x, mut y) = (values(len, 1), zeros(len));
    case(len as f64, 2 * len, move |cpu| scale(cpu, Scale { x: &x, factor: FACTOR, y: &mut y }))
}

fn scale_assign_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let mut y = values(len, 1);
    case(len as f64, 2 * len, move |cpu| {
        scale_assign(cpu, ScaleAssign { factor: FACTOR, y: &mut y });
    })
}

fn softcap_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (x, mut y) = (values(len, 1), zeros(len));
    case((EXP_FLOPS + 6.0) * len as f64, 2 * len, move |cpu| {
        softcap(cpu, Softcap { x: &x, cap: CAP, y: &mut y });
    })
}

fn softcap_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (dy, y, mut dx) = (values(len, 1), values(len, 2), zeros(len));
    case(4.0 * len as f64, 3 * len, move |cpu| {
        softcap_grad(cpu, SoftcapGrad { dy: &dy, y: &y, cap: CAP, dx: &mut dx });
    })
}

fn fill_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let mut y = zeros(len);
    case(0.0, len, move |cpu| fill(cpu, Fill { value: 1.0, y: &mut y }))
}
