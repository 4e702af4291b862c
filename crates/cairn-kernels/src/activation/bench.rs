//! The nonlinearities as the registry and the benchmark see them.

use super::{
    Act, Activation, ActivationGrad, Glu, GluGrad, activation, activation_grad, glu, glu_grad,
};
use crate::bench::inputs::{EXP_FLOPS, F32_ONLY, case, values, zeros};
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

const GATED: &[&[Dim]] = &[&[("n", 4096), ("f", 1024)]];
const PLAIN: &[&[Dim]] = &[&[("n", 1024), ("f", 3072)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "glu",
        description: "silu(gate) · up",
        encodings: F32_ONLY,
        shapes: GATED,
        prepare: glu_case,
    },
    Operator {
        name: "glu_grad",
        description: "both gradients of glu",
        encodings: F32_ONLY,
        shapes: GATED,
        prepare: glu_grad_case,
    },
    Operator {
        name: "activation",
        description: "gelu, tanh form",
        encodings: F32_ONLY,
        shapes: PLAIN,
        prepare: activation_case,
    },
    Operator {
        name: "activation_grad",
        description: "the gradient of gelu, tanh form",
        encodings: F32_ONLY,
        shapes: PLAIN,
        prepare: activation_grad_case,
    },
];

fn len(shape: &Shape) -> usize {
    shape.sizes(["n", "f"]).into_iter().product()
}

fn glu_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (gate, up, mut y) = (values(len, 1), values(len, 2), zeros(len));
    case((EXP_FLOPS + 4.0) * len as f64, 3 * len, move |cpu| {
        glu(cpu, Glu { gate_nf: &gate, up_nf: &up, act: Act::Silu, y_nf: &mut y });
    })
}

fn glu_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (gate, up, dy) = (values(len, 1), values(len, 2), values(len, 3));
    let (mut dgate, mut dup) = (zeros(len), zeros(len));
    case((EXP_FLOPS + 9.0) * len as f64, 5 * len, move |cpu| {
        let args = GluGrad {
            dy_nf: &dy,
            gate_nf: &gate,
            up_nf: &up,
            act: Act::Silu,
            dgate_nf: &mut dgate,
            dup_nf: &mut dup,
        };
        glu_grad(cpu, args);
    })
}

fn activation_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (x, mut y) = (values(len, 1), zeros(len));
    case((EXP_FLOPS + 20.0) * len as f64, 2 * len, move |cpu| {
        activation(cpu, Activation { x: &x, act: Act::GeluTanh, y: &mut y });
    })
}

fn activation_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = len(shape);
    let (x, dy, mut dx) = (values(len, 1), values(len, 2), zeros(len));
    case((EXP_FLOPS + 30.0) * len as f64, 3 * len, move |cpu| {
        activation_grad(cpu, ActivationGrad { dy: &dy, x: &x, act: Act::GeluTanh, dx: &mut dx });
    })
}
