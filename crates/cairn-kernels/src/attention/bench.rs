//! Attention as the registry and the benchmark see it.
//!
//! Operations count visible pairs of query and key, not the tiles that hold them.

use super::{
    Attention, AttentionGrad, AttentionSpec, CacheSpec, CacheType, Keys, Mask, RaggedBatch,
    SeqSlot, attention, attention_grad,
};
use crate::encoding::Encoding;
use crate::memory::Anonymous;
use crate::operator_bench::{EXP_FLOPS, F32_ONLY, case, operator, values};
use crate::registry::{Case, Operator, Shape};

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
