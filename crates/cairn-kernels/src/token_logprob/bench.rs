//! The output head as the registry and the benchmark see it.

use super::{
    CrossEntropy, Head, HeadGrads, TokenLogprob, TokenLogprobGrad, cross_entropy, head_scratch_len,
    token_logprob, token_logprob_grad,
};
use crate::TOKEN_BLOCK;
use crate::bench::inputs::{EXP_FLOPS, Table, case, filled, ids, values, zeros};
use crate::compute::Compute;
use crate::encoding::Encoding;
use crate::registry::{Case, Dim, Operator, Shape};

const SMALL: &[&[Dim]] = &[&[("o", 1024), ("v", 4096), ("d", 384)]];

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "token_logprob",
        description: "log-probabilities by the chunked head",
        encodings: &Encoding::ALL,
        shapes: SMALL,
        prepare: token_logprob_case,
    },
    Operator {
        name: "token_logprob_grad",
        description: "the gradients of token_logprob, logits made again",
        encodings: &Encoding::ALL,
        shapes: SMALL,
        prepare: token_logprob_grad_case,
    },
    Operator {
        name: "cross_entropy",
        description: "head, loss and gradients in chunks",
        encodings: &Encoding::ALL,
        shapes: &[
            &[("o", 4096), ("v", 4096), ("d", 384)],
            &[("o", 1024), ("v", 50257), ("d", 768)],
        ],
        prepare: cross_entropy_case,
    },
];

fn table(shape: &Shape, encoding: Encoding) -> Table {
    let [v, d] = shape.sizes(["v", "d"]);
    Table::warm((encoding, encoding.layouts()[0]), v, d)
}

/// A product of the head, and an exponential of each of its results.
fn pass_flops([o, v, d]: [usize; 3]) -> f64 {
    (o * v) as f64 * (2.0 * d as f64 + EXP_FLOPS)
}

fn token_logprob_case(shape: &Shape, encoding: Encoding) -> Case {
    let sizes @ [o, v, d] = shape.sizes(["o", "v", "d"]);
    let (mut table, x, targets) = (table(shape, encoding), values(o * d, 1), ids(o, v));
    let mut scratch = zeros(head_scratch_len(o, v));
    let (mut logprob, mut lse) = (zeros(o), zeros(o));
    case(pass_flops(sizes), o * d + table.bytes / 4, move |cpu| {
        let args = TokenLogprob {
            x_od: &x,
            head: Head {
                weight: table.weight(),
                bias_v: None,
                softcap: None,
                compute: Compute::F32,
                low_rank: None,
            },
            targets_o: &targets,
            scratch: &mut scratch,
            logprob_o: &mut logprob,
            lse_o: &mut lse,
            entropy_o: None,
        };
        token_logprob(cpu, args);
    })
}

fn token_logprob_grad_case(shape: &Shape, encoding: Encoding) -> Case {
    let sizes @ [o, v, d] = shape.sizes(["o", "v", "d"]);
    let (mut table, x, targets) = (table(shape, encoding), values(o * d, 1), ids(o, v));
    let mut scratch = zeros(head_scratch_len(o, v));
    let dlogprob = values(o, 2);
    let (mut dx, mut dw) = (zeros(o * d), zeros(v * d));
    let flops = pass_flops(sizes) + (4 * o * v * d) as f64;
    case(flops, 2 * o * d + 2 * v * d + table.bytes / 4, move |cpu| {
        let args = TokenLogprobGrad {
            x_od: &x,
            head: Head {
                weight: table.weight(),
                bias_v: None,
                softcap: None,
                compute: Compute::F32,
                low_rank: None,
            },
            targets_o: &targets,
            dlogprob_o: &dlogprob,
            dlse_o: None,
            dentropy_o: None,
            scratch: &mut scratch,
            grads: HeadGrads {
                dx_od: Some(&mut dx),
                dw_vd: Some(&mut dw),
                db_v: None,
                low_rank: None,
                accumulate_dw: false,
                row_tokens: TOKEN_BLOCK,
            },
        };
        token_logprob_grad(cpu, args);
    })
}

fn cross_entropy_case(shape: &Shape, encoding: Encoding) -> Case {
    let sizes @ [o, v, d] = shape.sizes(["o", "v", "d"]);
    let (mut table, x, targets) = (table(shape, encoding), values(o * d, 1), ids(o, v));
    let mut scratch = zeros(head_scratch_len(o, v));
    let (weights, mut logprob) = (filled(1.0, o), zeros(o));
    let (mut dx, mut dw) = (zeros(o * d), zeros(v * d));
    let flops = pass_flops(sizes) + (o * v) as f64 * (4.0 * d as f64 + EXP_FLOPS);
    case(flops, 2 * o * d + 2 * v * d + table.bytes / 4, move |cpu| {
        let args = CrossEntropy {
            x_od: &x,
            head: Head {
                weight: table.weight(),
                bias_v: None,
                softcap: None,
                compute: Compute::F32,
                low_rank: None,
            },
            targets_o: &targets,
            weights_o: &weights,
            scratch: &mut scratch,
            logprob_o: &mut logprob,
            grads: HeadGrads {
                dx_od: Some(&mut dx),
                dw_vd: Some(&mut dw),
                db_v: None,
                low_rank: None,
                accumulate_dw: false,
                row_tokens: TOKEN_BLOCK,
            },
        };
        cross_entropy(cpu, args);
    })
}
