//! Every operator but the products, as the registry and the benchmark see it.
//!
//! Costs count each byte that must move once, and for the elementary functions the operations of
//! their polynomials roughly (20 an exponential), so that the fraction of the arithmetic peak means
//! something where arithmetic, not memory, is the bound.

use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout, Weight, encode};
use crate::memory::{ALIGNMENT, Anonymous};
use crate::registry::{Case, Operator, Shape};
use crate::{
    Act, Activation, ActivationGrad, AdamW, AdamWStep, Add, Attention, AttentionGrad,
    AttentionSpec, CacheSpec, CacheType, CrossEntropy, DropoutAssign, DropoutMask, Embed,
    EmbedGrad, Glu, GluGrad, Head, HeadGrads, Keys, LayerNorm, LayerNormGrad, Mask, RaggedBatch,
    RmsNorm, RmsNormGrad, Rope, RopePairing, SeqSlot, SumSquares, TOKEN_BLOCK, TokenLogprob,
    activation, activation_grad, adamw, add, attention, attention_grad, cross_entropy,
    dropout_assign, embed, embed_grad, glu, glu_grad, head_scratch_len, layer_norm,
    layer_norm_grad, rms_norm, rms_norm_grad, rope, sum_squares, token_logprob,
};

/// Operations of an exponential, and of the functions made of one.
const EXP_FLOPS: f64 = 20.0;
const F32_ONLY: &[Encoding] = &[Encoding::F32];

/// The constant of an operator without weights.
macro_rules! operator {
    ($name:ident, $text:literal, $description:literal, $encodings:expr, $shapes:expr, $prepare:expr) => {
        pub(crate) const $name: Operator = Operator {
            name: $text,
            description: $description,
            encodings: $encodings,
            shapes: || $shapes.map(|dims| Shape(dims.to_vec())).to_vec(),
            prepare: $prepare,
        };
    };
}

operator!(
    EMBED,
    "embed",
    "rows of a table by id",
    &Encoding::ALL,
    [[("t", 4096), ("v", 4096), ("d", 384)], [("t", 1024), ("v", 50257), ("d", 768)]],
    embed_case
);
operator!(
    EMBED_GRAD,
    "embed_grad",
    "rows added to a table by id",
    F32_ONLY,
    [[("t", 4096), ("v", 4096), ("d", 384)], [("t", 1024), ("v", 50257), ("d", 768)]],
    embed_grad_case
);
operator!(
    RMS_NORM,
    "rms_norm",
    "rows over their root mean square",
    F32_ONLY,
    [[("n", 4096), ("d", 384)], [("n", 1), ("d", 384)]],
    rms_norm_case
);
operator!(
    RMS_NORM_GRAD,
    "rms_norm_grad",
    "both gradients of rms_norm in one pass",
    F32_ONLY,
    [[("n", 4096), ("d", 384)]],
    rms_norm_grad_case
);
operator!(
    LAYER_NORM,
    "layer_norm",
    "rows to mean 0 and variance 1",
    F32_ONLY,
    [[("n", 1024), ("d", 768)], [("n", 1), ("d", 768)]],
    layer_norm_case
);
operator!(
    LAYER_NORM_GRAD,
    "layer_norm_grad",
    "all gradients of layer_norm in one pass",
    F32_ONLY,
    [[("n", 1024), ("d", 768)]],
    layer_norm_grad_case
);
operator!(
    ROPE,
    "rope",
    "heads turned by position, in place",
    F32_ONLY,
    [[("t", 4096), ("h", 6), ("k", 64)]],
    rope_case
);
operator!(GLU, "glu", "silu(gate) · up", F32_ONLY, [[("n", 4096), ("f", 1024)]], glu_case);
operator!(
    GLU_GRAD,
    "glu_grad",
    "both gradients of glu",
    F32_ONLY,
    [[("n", 4096), ("f", 1024)]],
    glu_grad_case
);
operator!(
    ACTIVATION,
    "activation",
    "gelu, tanh form",
    F32_ONLY,
    [[("n", 1024), ("f", 3072)]],
    activation_case
);
operator!(
    ACTIVATION_GRAD,
    "activation_grad",
    "the gradient of gelu, tanh form",
    F32_ONLY,
    [[("n", 1024), ("f", 3072)]],
    activation_grad_case
);
operator!(ADD, "add", "the sum of two tensors", F32_ONLY, [[("n", 4096), ("d", 384)]], add_case);
operator!(
    DROPOUT,
    "dropout",
    "elements zeroed by a hash of their place",
    F32_ONLY,
    [[("n", 4096), ("d", 384)]],
    dropout_case
);
operator!(
    SUM_SQUARES,
    "sum_squares",
    "the squared norm of a tensor",
    F32_ONLY,
    [[("n", 12_000_000)]],
    sum_squares_case
);
operator!(ADAMW, "adamw", "one optimizer step", F32_ONLY, [[("n", 12_000_000)]], adamw_case);
operator!(
    TOKEN_LOGPROB,
    "token_logprob",
    "log-probabilities by the chunked head",
    &Encoding::ALL,
    [[("o", 1024), ("v", 4096), ("d", 384)]],
    token_logprob_case
);
operator!(
    CROSS_ENTROPY,
    "cross_entropy",
    "head, loss and gradients in chunks",
    F32_ONLY,
    [[("o", 4096), ("v", 4096), ("d", 384)], [("o", 1024), ("v", 50257), ("d", 768)]],
    cross_entropy_case
);
operator!(
    ATTENTION,
    "attention",
    "causal attention of a training batch",
    F32_ONLY,
    [
        [("b", 16), ("s", 256), ("h", 6), ("k", 64)],
        [("b", 4), ("s", 256), ("h", 12), ("k", 64)],
        [("b", 1), ("s", 2048), ("h", 6), ("k", 64)]
    ],
    attention_case
);
operator!(
    ATTENTION_GRAD,
    "attention_grad",
    "the gradients of causal attention",
    F32_ONLY,
    [[("b", 16), ("s", 256), ("h", 6), ("k", 64)], [("b", 4), ("s", 256), ("h", 12), ("k", 64)]],
    attention_grad_case
);
operator!(
    ATTENTION_DECODE,
    "attention_decode",
    "one token against a paged cache",
    &[Encoding::F32, Encoding::Bf16],
    [[("s", 2048), ("h", 6), ("g", 6), ("k", 64)], [("s", 8192), ("h", 32), ("g", 8), ("k", 128)]],
    decode_case
);

/// Every operator of this file.
pub(crate) const OTHERS: [&Operator; 20] = [
    &EMBED,
    &EMBED_GRAD,
    &RMS_NORM,
    &RMS_NORM_GRAD,
    &LAYER_NORM,
    &LAYER_NORM_GRAD,
    &ROPE,
    &GLU,
    &GLU_GRAD,
    &ACTIVATION,
    &ACTIVATION_GRAD,
    &ADD,
    &DROPOUT,
    &SUM_SQUARES,
    &ADAMW,
    &TOKEN_LOGPROB,
    &CROSS_ENTROPY,
    &ATTENTION,
    &ATTENTION_GRAD,
    &ATTENTION_DECODE,
];

/// Values in (−1, 1), others for every seed.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as f32 / u32::MAX as f32).mul_add(2.0, -1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// Row numbers that jump about.
fn ids(len: usize, limit: usize) -> Vec<u32> {
    let id = |i: usize| i.wrapping_mul(2_654_435_761) % limit;
    (0..len).map(|i| u32::try_from(id(i)).expect("tables have fewer than 2³² rows")).collect()
}

/// A case that moves `floats` floats.
fn case(flops: f64, floats: usize, run: impl FnMut(&Cpu) + 'static) -> Case {
    Case { flops, bytes: 4.0 * floats as f64, run: Box::new(run) }
}

/// An encoded weight that owns its bytes.
struct Table {
    encoding: Encoding,
    n: usize,
    k: usize,
    bytes: usize,
    memory: Anonymous,
}

impl Table {
    fn new(encoding: Encoding, n: usize, k: usize) -> Self {
        let bytes = Weight::stored_bytes(encoding, Layout::RowMajor, n, k);
        let room = bytes.next_multiple_of(ALIGNMENT);
        let mut memory = Anonymous::new(room).expect("memory for the benchmark");
        let to = &mut memory.as_mut()[..bytes];
        encode((encoding, Layout::RowMajor), (n, k), &values(n * k, 9), to);
        Self { encoding, n, k, bytes, memory }
    }

    fn weight(&self) -> Weight<'_> {
        let bytes = &self.memory.as_ref()[..self.bytes];
        Weight { encoding: self.encoding, layout: Layout::RowMajor, n: self.n, k: self.k, bytes }
    }
}

fn embed_case(shape: &Shape, encoding: Encoding) -> Case {
    let (t, v, d) = (shape.size("t"), shape.size("v"), shape.size("d"));
    let (table, ids_t, mut y_td) = (Table::new(encoding, v, d), ids(t, v), vec![0.0; t * d]);
    case(0.0, 2 * t * d, move |cpu| {
        embed(cpu, Embed { ids_t: &ids_t, weight: table.weight(), y_td: &mut y_td });
    })
}

fn embed_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (t, v, d) = (shape.size("t"), shape.size("v"), shape.size("d"));
    let (ids_t, dy_td, mut dw_vd) = (ids(t, v), values(t * d, 1), vec![0.0; v * d]);
    case((t * d) as f64, 3 * t * d, move |cpu| {
        let (ids_t, dy_td, dw_vd) = (&ids_t[..], &dy_td[..], &mut dw_vd[..]);
        embed_grad(cpu, EmbedGrad { ids_t, dy_td, d, dw_vd, accumulate: true });
    })
}

fn rms_norm_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (n, d) = (shape.size("n"), shape.size("d"));
    let (x_nd, weight_d, mut y_nd) = (values(n * d, 1), values(d, 2), vec![0.0; n * d]);
    case(4.0 * (n * d) as f64, 2 * n * d, move |cpu| {
        let (x_nd, weight_d, y_nd) = (&x_nd[..], &weight_d[..], &mut y_nd[..]);
        rms_norm(cpu, RmsNorm { x_nd, weight_d, eps: 1e-5, plus_one: false, y_nd });
    })
}

fn rms_norm_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (n, d) = (shape.size("n"), shape.size("d"));
    let (x, dy, weight) = (values(n * d, 1), values(n * d, 2), values(d, 3));
    let (mut dx, mut dw) = (vec![0.0; n * d], vec![0.0; d]);
    case(12.0 * (n * d) as f64, 3 * n * d, move |cpu| {
        let args = RmsNormGrad {
            dy_nd: &dy,
            x_nd: &x,
            weight_d: &weight,
            eps: 1e-5,
            plus_one: false,
            dx_nd: &mut dx,
            accumulate_dx: false,
            dw_d: Some(&mut dw),
            rows_per_token: 1,
            row_tokens: TOKEN_BLOCK,
            accumulate_dw: false,
        };
        rms_norm_grad(cpu, args);
    })
}

fn layer_norm_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (n, d) = (shape.size("n"), shape.size("d"));
    let (x_nd, weight_d, mut y_nd) = (values(n * d, 1), values(d, 2), vec![0.0; n * d]);
    let bias = values(d, 3);
    case(7.0 * (n * d) as f64, 2 * n * d, move |cpu| {
        let (x_nd, weight_d, y_nd) = (&x_nd[..], &weight_d[..], &mut y_nd[..]);
        layer_norm(cpu, LayerNorm { x_nd, weight_d, bias_d: Some(&bias), eps: 1e-5, y_nd });
    })
}

fn layer_norm_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (n, d) = (shape.size("n"), shape.size("d"));
    let (x, dy, weight) = (values(n * d, 1), values(n * d, 2), values(d, 3));
    let (mut dx, mut dw, mut db) = (vec![0.0; n * d], vec![0.0; d], vec![0.0; d]);
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

fn rope_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (t, heads, head_dim) = (shape.size("t"), shape.size("h"), shape.size("k"));
    let mut x = values(t * heads * head_dim, 1);
    let positions = ids(t, t);
    let inv_freq = values(head_dim / 2, 2).iter().map(|x| x.abs()).collect::<Vec<f32>>();
    let flops = (3 * t * heads * head_dim) as f64 + 20.0 * (t * head_dim) as f64;
    case(flops, 2 * t * heads * head_dim, move |cpu| {
        let args = Rope {
            x_thk: &mut x,
            positions_t: &positions,
            inv_freq: &inv_freq,
            attention_scaling: 1.0,
            heads,
            head_dim,
            pairing: RopePairing::Half,
            inverse: false,
        };
        rope(cpu, args);
    })
}

fn glu_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = shape.size("n") * shape.size("f");
    let (gate, up, mut y) = (values(len, 1), values(len, 2), vec![0.0; len]);
    case((EXP_FLOPS + 4.0) * len as f64, 3 * len, move |cpu| {
        glu(cpu, Glu { gate_nf: &gate, up_nf: &up, act: Act::Silu, y_nf: &mut y });
    })
}

fn glu_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = shape.size("n") * shape.size("f");
    let (gate, up, dy) = (values(len, 1), values(len, 2), values(len, 3));
    let (mut dgate, mut dup) = (vec![0.0; len], vec![0.0; len]);
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
    let len = shape.size("n") * shape.size("f");
    let (x, mut y) = (values(len, 1), vec![0.0; len]);
    case((EXP_FLOPS + 20.0) * len as f64, 2 * len, move |cpu| {
        activation(cpu, Activation { x: &x, act: Act::GeluTanh, y: &mut y });
    })
}

fn activation_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = shape.size("n") * shape.size("f");
    let (x, dy, mut dx) = (values(len, 1), values(len, 2), vec![0.0; len]);
    case((EXP_FLOPS + 30.0) * len as f64, 3 * len, move |cpu| {
        activation_grad(cpu, ActivationGrad { dy: &dy, x: &x, act: Act::GeluTanh, dx: &mut dx });
    })
}

fn add_case(shape: &Shape, _encoding: Encoding) -> Case {
    let len = shape.size("n") * shape.size("d");
    let (a, b, mut y) = (values(len, 1), values(len, 2), vec![0.0; len]);
    case(len as f64, 3 * len, move |cpu| add(cpu, Add { a: &a, b: &b, y: &mut y }))
}

fn dropout_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (n, d) = (shape.size("n"), shape.size("d"));
    let mut y = values(n * d, 1);
    let mask = DropoutMask { p: 0.1, seed: 1, step: 1, site: 0, first_token: 0, d };
    case((n * d) as f64, 2 * n * d, move |cpu| {
        dropout_assign(cpu, DropoutAssign { y_td: &mut y, mask });
    })
}

fn sum_squares_case(shape: &Shape, _encoding: Encoding) -> Case {
    let x = values(shape.size("n"), 1);
    case(2.0 * x.len() as f64, x.len(), move |cpu| {
        let mut total = 0.0;
        sum_squares(cpu, SumSquares { x: &x, total: &mut total });
        std::hint::black_box(total);
    })
}

fn adamw_case(shape: &Shape, _encoding: Encoding) -> Case {
    let n = shape.size("n");
    let (mut w, grad, mut m, mut v) = (values(n, 1), values(n, 2), vec![0.1; n], vec![0.1; n]);
    let step = AdamWStep {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 10,
        grad_scale: 1.0,
    };
    case(14.0 * n as f64, 7 * n, move |cpu| {
        let args = AdamW { w: &mut w, bf16_copy: None, grad: &grad, m: &mut m, v: &mut v, step };
        adamw(cpu, args);
    })
}

fn token_logprob_case(shape: &Shape, encoding: Encoding) -> Case {
    let (o, v, d) = (shape.size("o"), shape.size("v"), shape.size("d"));
    let (table, x, targets) = (Table::new(encoding, v, d), values(o * d, 1), ids(o, v));
    let mut scratch = vec![0.0; head_scratch_len(o, v)];
    let (mut logprob, mut lse) = (vec![0.0; o], vec![0.0; o]);
    let floats = o * d + table.bytes / 4;
    case((2 * o * v * d) as f64 + EXP_FLOPS * (o * v) as f64, floats, move |cpu| {
        let args = TokenLogprob {
            x_od: &x,
            head: Head { weight: table.weight(), softcap: None },
            targets_o: &targets,
            scratch: &mut scratch,
            logprob_o: &mut logprob,
            lse_o: &mut lse,
            entropy_o: None,
        };
        token_logprob(cpu, args);
    })
}

fn cross_entropy_case(shape: &Shape, encoding: Encoding) -> Case {
    let (o, v, d) = (shape.size("o"), shape.size("v"), shape.size("d"));
    let (table, x, targets) = (Table::new(encoding, v, d), values(o * d, 1), ids(o, v));
    let mut scratch = vec![0.0; head_scratch_len(o, v)];
    let (weights, mut logprob) = (vec![1.0; o], vec![0.0; o]);
    let (mut dx, mut dw) = (vec![0.0; o * d], vec![0.0; v * d]);
    let flops = (6 * o * v * d) as f64 + 2.0 * EXP_FLOPS * (o * v) as f64;
    case(flops, 2 * o * d + 3 * v * d, move |cpu| {
        let args = CrossEntropy {
            x_od: &x,
            head: Head { weight: table.weight(), softcap: None },
            targets_o: &targets,
            weights_o: &weights,
            scratch: &mut scratch,
            logprob_o: &mut logprob,
            grads: HeadGrads {
                dx_od: &mut dx,
                dw_vd: Some(&mut dw),
                accumulate_dw: false,
                row_tokens: TOKEN_BLOCK,
            },
        };
        cross_entropy(cpu, args);
    })
}

/// Causal self-attention of `b` sequences of `s` tokens: its spec, slots and visible pairs.
fn batch(shape: &Shape) -> (AttentionSpec, Vec<SeqSlot<'static>>, f64) {
    let (b, s, heads, dim) = (shape.size("b"), shape.size("s"), shape.size("h"), shape.size("k"));
    let spec = AttentionSpec {
        heads,
        kv_heads: heads,
        key_dim: dim,
        value_dim: dim,
        values_in_keys: false,
        mask: Mask::CAUSAL,
        scale: 0.125,
        softcap: None,
    };
    let slot = |i: usize| SeqSlot { start: i * s, len: s, cached: 0, blocks: &[] };
    (spec, (0..b).map(slot).collect(), (b * heads * s * (s + 1) / 2) as f64)
}

fn attention_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (spec, slots, pairs) = batch(shape);
    let tokens = shape.size("b") * shape.size("s");
    let len = tokens * spec.heads * spec.key_dim;
    let [q, k, v] = [1, 2, 3].map(|seed| values(len, seed));
    let (mut out, mut lse) = (vec![0.0; len], vec![0.0; tokens * spec.heads]);
    case(pairs * (4.0 * spec.key_dim as f64 + EXP_FLOPS), 4 * len, move |cpu| {
        let args = Attention {
            q_thk: &q,
            keys: Keys::Dense { k_tgk: &k, v_tgv: &v },
            out_thv: &mut out,
            lse_th: Some(&mut lse),
            batch: RaggedBatch { sequences: &slots },
            spec,
        };
        attention(cpu, args);
    })
}

fn attention_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let (spec, slots, pairs) = batch(shape);
    let tokens = shape.size("b") * shape.size("s");
    let len = tokens * spec.heads * spec.key_dim;
    let [q, k, v, out, dout] = [1, 2, 3, 4, 5].map(|seed| values(len, seed));
    let lse = vec![6.0; tokens * spec.heads];
    let mut grads = [1, 2, 3].map(|seed| values(len, seed));
    case(pairs * (10.0 * spec.key_dim as f64 + EXP_FLOPS), 8 * len, move |cpu| {
        let [dq_thk, dk_tgk, dv_tgv] = &mut grads;
        let args = AttentionGrad {
            dout_thv: &dout,
            q_thk: &q,
            k_tgk: &k,
            v_tgv: &v,
            out_thv: &out,
            lse_th: &lse,
            dq_thk,
            dk_tgk,
            dv_tgv,
            batch: RaggedBatch { sequences: &slots },
            spec,
        };
        attention_grad(cpu, args);
    })
}

/// Bytes that the layers of a decoding case take together: far beyond any cache.
const CACHE_BYTES: usize = 256 << 20;

fn decode_case(shape: &Shape, encoding: Encoding) -> Case {
    let (s, heads, kv_heads) = (shape.size("s"), shape.size("h"), shape.size("g"));
    let dim = shape.size("k");
    let dtype = if encoding == Encoding::Bf16 { CacheType::Bf16 } else { CacheType::F32 };
    let cache = CacheSpec { dtype, kv_heads, key_dim: dim, value_dim: dim, values_in_keys: false };
    let spec = AttentionSpec {
        heads,
        kv_heads,
        key_dim: dim,
        value_dim: dim,
        values_in_keys: false,
        mask: Mask::CAUSAL,
        scale: 0.125,
        softcap: None,
    };
    let pages = s.div_ceil(16);
    let layer_bytes = pages * cache.page_bytes();
    let layers = CACHE_BYTES.div_ceil(layer_bytes);
    let mut memory = Anonymous::new(layers * layer_bytes).expect("memory for the benchmark");
    // Every number 0.0078 in f32 and about as much in either half as bf16: no subnormals.
    memory.as_mut().as_chunks_mut::<2>().0.fill([0x00, 0x3c]);
    let blocks: Vec<u32> = (0..pages).map(|i| u32::try_from(i).expect("few pages")).collect();
    let (q, mut out, mut layer) = (values(heads * dim, 1), vec![0.0; heads * dim], 0);
    let flops = (4 * heads * dim * s) as f64;
    case(flops, layer_bytes / 4, move |cpu| {
        layer = (layer + 1) % layers;
        let pages = &memory.as_ref()[layer * layer_bytes..][..layer_bytes];
        let slots = [SeqSlot { start: 0, len: 1, cached: s - 1, blocks: &blocks }];
        let args = Attention {
            q_thk: &q,
            keys: Keys::Paged { pages, cache },
            out_thv: &mut out,
            lse_th: None,
            batch: RaggedBatch { sequences: &slots },
            spec,
        };
        attention(cpu, args);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_cases_run() {
        let cpu = Cpu::detect(2);
        for operator in OTHERS {
            let shape = (operator.shapes)().pop().expect("an operator has shapes");
            if shape.0.iter().map(|(_, size)| size).product::<usize>() > 1 << 22 {
                continue;
            }
            for &encoding in operator.encodings {
                let mut case = (operator.prepare)(&shape, encoding);
                (case.run)(&cpu);
                assert!(case.bytes > 0.0, "{}", operator.name);
            }
        }
    }
}
