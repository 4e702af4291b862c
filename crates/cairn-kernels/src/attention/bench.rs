//! Attention as the registry and the benchmark see it. FLOPs count visible pairs only.

use super::{
    Attention, AttentionGrad, AttentionSpec, CacheSpec, CacheType, Keys, KvWrite, Mask,
    PAGE_TOKENS, RaggedBatch, SeqSlot, attention, attention_grad, kv_write,
};
use crate::DropoutMask;
use crate::bench::inputs::{CACHED, EXP_FLOPS, F32_ONLY, case, filled, values, zeros};
use crate::encoding::Encoding;
use crate::memory::Anonymous;
use crate::registry::{Case, Dim, Operator, Shape};

/// Bytes that the layers of a decoding case take together: far beyond any cache.
const CACHE_BYTES: usize = 256 << 20;
/// Layers at most.
const LAYERS_MAX: usize = 1024;

const CONFIGURATION_A: [Dim; 4] = [("b", 16), ("s", 256), ("h", 6), ("k", 64)];
const GPT2: [Dim; 4] = [("b", 4), ("s", 256), ("h", 12), ("k", 64)];
const LONG: [Dim; 4] = [("b", 1), ("s", 2048), ("h", 6), ("k", 64)];

/// GPT-2's dropout of probabilities.
const DROPOUT: Option<DropoutMask> =
    Some(DropoutMask { p: 0.1, seed: 1, step: 1, site: 0, first_token: 0 });

/// Every operator of this folder.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "attention",
        description: "causal attention of a training batch",
        encodings: F32_ONLY,
        shapes: &[&CONFIGURATION_A, &GPT2, &LONG],
        prepare: |shape, _| attention_with(shape, None),
    },
    Operator {
        name: "attention_grad",
        description: "the gradients of causal attention",
        encodings: F32_ONLY,
        shapes: &[&CONFIGURATION_A, &GPT2, &LONG],
        prepare: |shape, _| attention_grad_with(shape, None),
    },
    Operator {
        name: "attention_dropout",
        description: "causal attention that drops a tenth of the probabilities",
        encodings: F32_ONLY,
        shapes: &[&CONFIGURATION_A, &GPT2, &LONG],
        prepare: |shape, _| attention_with(shape, DROPOUT),
    },
    Operator {
        name: "attention_dropout_grad",
        description: "the gradients of attention that drops a tenth of the probabilities",
        encodings: F32_ONLY,
        shapes: &[&CONFIGURATION_A, &GPT2, &LONG],
        prepare: |shape, _| attention_grad_with(shape, DROPOUT),
    },
    Operator {
        name: "attention_decode",
        description: "attention of one token to a paged cache",
        encodings: CACHED,
        shapes: &[
            &[("s", 2048), ("h", 6), ("g", 6), ("k", 64)],
            &[("s", 8192), ("h", 32), ("g", 8), ("k", 128)],
        ],
        prepare: decode_case,
    },
    Operator {
        name: "kv_write",
        description: "keys and values into the pages of a cache",
        encodings: CACHED,
        shapes: &[&[("t", 256), ("g", 6), ("k", 64)], &[("t", 1), ("g", 8), ("k", 128)]],
        prepare: kv_write_case,
    },
];

fn causal(heads: usize, kv_heads: usize, dim: usize) -> AttentionSpec {
    AttentionSpec {
        heads,
        kv_heads,
        key_dim: dim,
        value_dim: dim,
        values_in_keys: false,
        mask: Mask::CAUSAL,
        scale: 0.125,
        softcap: None,
    }
}

/// Causal self-attention of `b` sequences of `s` tokens: its spec, slots and visible pairs.
fn batch(shape: &Shape) -> (AttentionSpec, Vec<SeqSlot<'static>>, f64) {
    let [b, s, heads, dim] = shape.sizes(["b", "s", "h", "k"]);
    let slot = |i: usize| SeqSlot { start: i * s, len: s, cached: 0, blocks: &[] };
    let pairs = (b * heads * s * (s + 1) / 2) as f64;
    (causal(heads, heads, dim), (0..b).map(slot).collect(), pairs)
}

fn attention_with(shape: &Shape, dropout: Option<DropoutMask>) -> Case {
    let (spec, slots, pairs) = batch(shape);
    let tokens = shape.size("b") * shape.size("s");
    let len = tokens * spec.heads * spec.key_dim;
    let [q, k, v] = [1, 2, 3].map(|seed| values(len, seed));
    let (mut out, mut lse) = (zeros(len), zeros(tokens * spec.heads));
    case(pairs * (4.0 * spec.key_dim as f64 + EXP_FLOPS), 4 * len, move |cpu| {
        let args = Attention {
            q_thk: &q,
            keys: Keys::Dense { k_tgk: &k, v_tgv: &v },
            out_thv: &mut out,
            lse_th: Some(&mut lse),
            batch: RaggedBatch { sequences: &slots },
            spec,
            dropout,
        };
        attention(cpu, args);
    })
}

fn attention_grad_with(shape: &Shape, dropout: Option<DropoutMask>) -> Case {
    let (spec, slots, pairs) = batch(shape);
    let tokens = shape.size("b") * shape.size("s");
    let len = tokens * spec.heads * spec.key_dim;
    let [q, k, v, out, dout] = [1, 2, 3, 4, 5].map(|seed| values(len, seed));
    let lse = filled(6.0, tokens * spec.heads);
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
            dropout,
        };
        attention_grad(cpu, args);
    })
}

fn cache(encoding: Encoding, kv_heads: usize, dim: usize) -> CacheSpec {
    let dtype = match encoding {
        Encoding::Bf16 => CacheType::Bf16,
        Encoding::Q8 => CacheType::Q8,
        _ => CacheType::F32,
    };
    CacheSpec { dtype, kv_heads, key_dim: dim, value_dim: dim, values_in_keys: false }
}

/// The pages of a sequence, in order.
fn blocks(pages: usize) -> Vec<u32> {
    (0..pages).map(|i| u32::try_from(i).expect("few pages")).collect()
}

fn decode_case(shape: &Shape, encoding: Encoding) -> Case {
    let [s, heads, kv_heads, dim] = shape.sizes(["s", "h", "g", "k"]);
    let (cache, spec) = (cache(encoding, kv_heads, dim), causal(heads, kv_heads, dim));
    let pages = s.div_ceil(PAGE_TOKENS);
    let layer_bytes = pages * cache.page_bytes();
    let layers = CACHE_BYTES.div_ceil(layer_bytes).min(LAYERS_MAX);
    let mut memory = Anonymous::new(layers * layer_bytes).expect("memory for the benchmark");
    // Every number 0.0078 in f32 and about as much in either half as bf16: no subnormals.
    memory.as_mut().as_chunks_mut::<2>().0.fill([0x00, 0x3c]);
    let blocks = blocks(pages);
    let (q, mut out, mut layer) = (values(heads * dim, 1), zeros(heads * dim), 0);
    case((4 * heads * dim * s) as f64, layer_bytes / 4, move |cpu| {
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
            dropout: None,
        };
        attention(cpu, args);
    })
}

fn kv_write_case(shape: &Shape, encoding: Encoding) -> Case {
    let [t, kv_heads, dim] = shape.sizes(["t", "g", "k"]);
    let cache = cache(encoding, kv_heads, dim);
    let pages = t.div_ceil(PAGE_TOKENS);
    let mut memory = Anonymous::new(pages * cache.page_bytes()).expect("memory for the benchmark");
    let blocks = blocks(pages);
    let [k, v] = [1, 2].map(|seed| values(t * kv_heads * dim, seed));
    let written = t * cache.page_bytes() / PAGE_TOKENS / 4;
    case(0.0, k.len() + v.len() + written, move |cpu| {
        let slots = [SeqSlot { start: 0, len: t, cached: 0, blocks: &blocks }];
        let args = KvWrite {
            k_tgk: &k,
            v_tgv: &v,
            pages: memory.as_mut(),
            cache,
            batch: RaggedBatch { sequences: &slots },
        };
        kv_write(cpu, args);
    })
}
