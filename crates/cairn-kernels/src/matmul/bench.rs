//! The products as the registry and the benchmark see them.

use super::{
    BiasGrad, HeadMatmul, HeadMatmulDw, HeadMatmulDx, Matmul, MatmulDw, MatmulDx, bias_grad,
    head_matmul, head_matmul_dw, head_matmul_dx, matmul, matmul_dw, matmul_dx,
};
use crate::TOKEN_BLOCK;
use crate::bench::inputs::{F32_ONLY, Table, case, values, zeros};
use crate::compute::Compute;
use crate::encoding::{Encoding, Layout};
use crate::registry::{Case, Dim, Operator, Shape};

/// Tokens up to which a case reads its weights from memory, not from cache.
const COLD_TOKENS: usize = 8;

const fn product(t: usize, n: usize, k: usize) -> [Dim; 3] {
    [("t", t), ("n", n), ("k", k)]
}

/// Layers and heads of the two training configurations that the project is measured on, then decoding.
const FORWARD: &[&[Dim]] = &[
    &product(4096, 384, 384),
    &product(4096, 1024, 384),
    &product(4096, 384, 1024),
    &product(1024, 768, 768),
    &product(1024, 3072, 768),
    &product(1024, 768, 3072),
    &product(256, 4096, 384),
    &product(256, 50257, 768),
    &product(1, 384, 384),
    &product(1, 3072, 768),
    &product(1, 50257, 768),
    &product(4, 384, 384),
    &product(4, 3072, 768),
    &product(4, 50257, 768),
    &product(8, 384, 384),
    &product(8, 3072, 768),
    &product(8, 50257, 768),
];
/// The layers of Qwen3-0.6B, reading and decoding; then the shapes of [`FORWARD`].
const BF16: &[&[Dim]] = &[
    &product(512, 2048, 1024),
    &product(512, 1024, 1024),
    &product(512, 1024, 2048),
    &product(512, 3072, 1024),
    &product(512, 1024, 3072),
    &product(256, 3072, 1024),
    &product(1024, 3072, 768),
    &product(1024, 768, 3072),
    &product(1, 3072, 1024),
    &product(1, 1024, 3072),
    &product(1, 151_936, 1024),
    &product(4, 3072, 1024),
    &product(8, 3072, 1024),
];
/// Without decoding.
const TRAINING: &[&[Dim]] = FORWARD.split_at(8).0;
/// Absorbed latent attention: queries of 128 to latents of 512, of a chunk and of one token.
const HEADS: &[&[Dim]] = &[
    &[("t", 256), ("h", 16), ("o", 512), ("i", 128)],
    &[("t", 1), ("h", 16), ("o", 512), ("i", 128)],
];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "matmul",
        description: "y = x · Wᵀ, one chain over the inputs; panels are streamed for a few tokens",
        encodings: &Encoding::ALL,
        shapes: FORWARD,
        prepare: matmul_case,
    },
    Operator {
        name: "matmul_bf16",
        description: "y = x · Wᵀ of bf16 operands, one chain over pairs of inputs",
        encodings: &[Encoding::Bf16, Encoding::Bf16z],
        shapes: BF16,
        prepare: matmul_bf16_case,
    },
    Operator {
        name: "matmul_rows",
        description: "matmul by a weight in rows, as files hold it",
        encodings: &[Encoding::F32, Encoding::Bf16, Encoding::F16],
        shapes: BF16,
        prepare: matmul_rows_case,
    },
    Operator {
        name: "matmul_rows_bf16",
        description: "matmul_bf16 by a weight in rows, as files hold it",
        encodings: &[Encoding::Bf16],
        shapes: BF16,
        prepare: matmul_rows_bf16_case,
    },
    Operator {
        name: "matmul_int8",
        description: "y = x · Wᵀ of bytes, one chain over groups of 32 inputs",
        encodings: &[Encoding::Q8, Encoding::Q4],
        shapes: BF16,
        prepare: matmul_int8_case,
    },
    Operator {
        name: "matmul_dx",
        description: "dx = dy · W, one chain over the outputs",
        encodings: &Encoding::ALL,
        shapes: TRAINING,
        prepare: matmul_dx_case,
    },
    Operator {
        name: "matmul_dw",
        description: "dw = dyᵀ · x, chains over blocks of 256 tokens folded in order",
        encodings: F32_ONLY,
        shapes: TRAINING,
        prepare: matmul_dw_case,
    },
    Operator {
        name: "bias_grad",
        description: "the sum of dy over tokens, in blocks of 256 folded in order",
        encodings: F32_ONLY,
        shapes: &[&[("t", 1024), ("n", 768)], &[("t", 1024), ("n", 3072)]],
        prepare: bias_grad_case,
    },
    Operator {
        name: "head_matmul",
        description: "one forward product a head",
        encodings: F32_ONLY,
        shapes: HEADS,
        prepare: head_matmul_case,
    },
    Operator {
        name: "head_matmul_dx",
        description: "one input gradient a head",
        encodings: F32_ONLY,
        shapes: HEADS,
        prepare: head_matmul_dx_case,
    },
    Operator {
        name: "head_matmul_dw",
        description: "one weight gradient a head",
        encodings: F32_ONLY,
        shapes: HEADS,
        prepare: head_matmul_dw_case,
    },
];

fn table(shape: &Shape, encoding: Encoding) -> Table {
    let [t, ..] = shape.sizes(["t", "n", "k"]);
    let layout = if t <= COLD_TOKENS { Layout::Panel } else { encoding.layouts()[0] };
    layer_table(shape, (encoding, layout))
}

fn flops(sizes: &[usize]) -> f64 {
    sizes.iter().fold(2.0, |product, &size| product * size as f64)
}

fn matmul_case(shape: &Shape, encoding: Encoding) -> Case {
    let table = table(shape, encoding);
    forward_case(shape, table, Compute::F32)
}

fn matmul_rows_case(shape: &Shape, encoding: Encoding) -> Case {
    forward_case(shape, layer_table(shape, (encoding, Layout::RowMajor)), Compute::F32)
}

fn matmul_bf16_case(shape: &Shape, encoding: Encoding) -> Case {
    forward_case(shape, layer_table(shape, (encoding, Layout::Panel)), Compute::Bf16)
}

fn matmul_rows_bf16_case(shape: &Shape, encoding: Encoding) -> Case {
    forward_case(shape, layer_table(shape, (encoding, Layout::RowMajor)), Compute::Bf16)
}

fn matmul_int8_case(shape: &Shape, encoding: Encoding) -> Case {
    forward_case(shape, layer_table(shape, (encoding, Layout::Panel)), Compute::Int8)
}

/// A weight as a session holds it for inference.
fn layer_table(shape: &Shape, form: (Encoding, Layout)) -> Table {
    let [t, n, k] = shape.sizes(["t", "n", "k"]);
    if t <= COLD_TOKENS { Table::cold(form, n, k) } else { Table::warm(form, n, k) }
}

fn forward_case(shape: &Shape, mut table: Table, compute: Compute) -> Case {
    let [t, n, k] = shape.sizes(["t", "n", "k"]);
    let (x_tk, mut y_tn) = (values(t * k, 1), zeros(t * n));
    let case = case(flops(&[t, n, k]), table.bytes / 4 + t * (k + n), move |cpu| {
        let (weight, y_tn) = (table.weight(), &mut y_tn[..]);
        let accumulate = false;
        matmul(cpu, Matmul { x_tk: &x_tk, weight, bias_n: None, y_tn, t, accumulate, compute });
    });
    Case { compute, ..case }
}

fn matmul_dx_case(shape: &Shape, encoding: Encoding) -> Case {
    let [t, n, k] = shape.sizes(["t", "n", "k"]);
    let mut table = table(shape, encoding);
    let (dy_tn, mut dx_tk) = (values(t * n, 1), zeros(t * k));
    case(flops(&[t, n, k]), table.bytes / 4 + t * (k + n), move |cpu| {
        let (weight, dx_tk) = (table.weight(), &mut dx_tk[..]);
        matmul_dx(cpu, MatmulDx { dy_tn: &dy_tn, weight, dx_tk, t, accumulate: false });
    })
}

fn matmul_dw_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, n, k] = shape.sizes(["t", "n", "k"]);
    let (dy_tn, x_tk, mut dw_nk) = (values(t * n, 1), values(t * k, 2), zeros(n * k));
    case(flops(&[t, n, k]), t * (k + n) + 2 * n * k, move |cpu| {
        let (dy_tn, x_tk, dw_nk) = (&dy_tn[..], &x_tk[..], &mut dw_nk[..]);
        let (row_tokens, accumulate) = (TOKEN_BLOCK, true);
        matmul_dw(cpu, MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens, accumulate });
    })
}

fn bias_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, n] = shape.sizes(["t", "n"]);
    let (dy_tn, mut db_n) = (values(t * n, 1), zeros(n));
    case((t * n) as f64, t * n, move |cpu| {
        let (row_tokens, accumulate) = (TOKEN_BLOCK, true);
        bias_grad(cpu, BiasGrad { dy_tn: &dy_tn, db_n: &mut db_n, t, row_tokens, accumulate });
    })
}

/// Floats that a product of heads moves at least: both inputs and the output.
fn head_floats([t, heads, outputs, inputs]: [usize; 4]) -> usize {
    heads * (t * (inputs + outputs) + inputs * outputs)
}

fn head_matmul_case(shape: &Shape, _encoding: Encoding) -> Case {
    let sizes @ [t, heads, outputs, inputs] = shape.sizes(["t", "h", "o", "i"]);
    let (x_thi, w_hoi) = (values(t * heads * inputs, 1), values(heads * outputs * inputs, 2));
    let mut y_tho = zeros(t * heads * outputs);
    case(flops(&sizes), head_floats(sizes), move |cpu| {
        let (x_thi, w_hoi, y_tho) = (&x_thi[..], &w_hoi[..], &mut y_tho[..]);
        head_matmul(cpu, HeadMatmul { x_thi, w_hoi, y_tho, t, heads, inputs, outputs });
    })
}

fn head_matmul_dx_case(shape: &Shape, _encoding: Encoding) -> Case {
    let sizes @ [t, heads, outputs, inputs] = shape.sizes(["t", "h", "o", "i"]);
    let (dy_tho, w_hoi) = (values(t * heads * outputs, 1), values(heads * outputs * inputs, 2));
    let mut dx_thi = zeros(t * heads * inputs);
    case(flops(&sizes), head_floats(sizes), move |cpu| {
        let (dy_tho, w_hoi, dx_thi) = (&dy_tho[..], &w_hoi[..], &mut dx_thi[..]);
        let accumulate = false;
        let args = HeadMatmulDx { dy_tho, w_hoi, dx_thi, t, heads, inputs, outputs, accumulate };
        head_matmul_dx(cpu, args);
    })
}

fn head_matmul_dw_case(shape: &Shape, _encoding: Encoding) -> Case {
    let sizes @ [t, heads, outputs, inputs] = shape.sizes(["t", "h", "o", "i"]);
    let (dy_tho, x_thi) = (values(t * heads * outputs, 1), values(t * heads * inputs, 2));
    let mut dw_hoi = zeros(heads * outputs * inputs);
    let floats = head_floats(sizes) + heads * outputs * inputs;
    case(flops(&sizes), floats, move |cpu| {
        let args = HeadMatmulDw {
            dy_tho: &dy_tho,
            x_thi: &x_thi,
            dw_hoi: &mut dw_hoi,
            t,
            heads,
            inputs,
            outputs,
            row_tokens: TOKEN_BLOCK,
            accumulate: true,
        };
        head_matmul_dw(cpu, args);
    })
}
