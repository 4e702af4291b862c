//! Kernels against references, where keys lie and how sequences are cut, and slopes.

mod dropout;
mod exact;

use proptest::prelude::*;

use super::*;
use crate::memory::{bytes_of, bytes_of_mut};
use crate::testing::{Numbers, assert_bits, check_bits, check_slope, every_cpu, functional};

/// A layer and the sequences of one run, dense.
#[derive(Clone)]
struct Layer {
    spec: AttentionSpec,
    dropout: Option<DropoutMask>,
    lens: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Layer {
    fn new(spec: AttentionSpec, lens: &[usize], seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let t: usize = lens.iter().sum();
        let values = if spec.values_in_keys { 0 } else { t * spec.kv_heads * spec.value_dim };
        Self {
            spec,
            dropout: None,
            lens: lens.to_vec(),
            q: numbers.floats(t * spec.heads * spec.key_dim, 2.0),
            k: numbers.floats(t * spec.kv_heads * spec.key_dim, 2.0),
            v: numbers.floats(values, 1.0),
        }
    }

    fn dropping(self, dropout: Option<DropoutMask>) -> Self {
        Self { dropout, ..self }
    }

    fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    fn slots(&self) -> Vec<SeqSlot<'static>> {
        let mut start = 0;
        let slot = |&len: &usize| {
            start += len;
            SeqSlot { start: start - len, len, cached: 0, blocks: &[] }
        };
        self.lens.iter().map(slot).collect()
    }

    /// Output and log-sum-exp with dense keys.
    fn dense(&self, cpu: Option<&Cpu>) -> Vec<Vec<f32>> {
        let Self { spec, q, k, v, .. } = self;
        let keys = Keys::Dense { k_tgk: k, v_tgv: v };
        run(cpu, (*spec, self.dropout), q, keys, &self.slots(), self.tokens())
    }

    /// The same through pages of `dtype`, each sequence in runs of at most `chunk` tokens.
    fn paged(&self, cpu: Option<&Cpu>, dtype: CacheType, chunk: usize) -> Vec<Vec<f32>> {
        let spec = self.spec;
        let cache = self.cache(dtype);
        let mut blocks = Blocks::new(&self.lens);
        let mut pages = blocks.garbage_pages(&cache);
        let mut out = vec![
            vec![0.0; self.tokens() * spec.heads * spec.value_dim],
            vec![0.0; self.tokens() * spec.heads],
        ];
        let longest = self.lens.iter().copied().max().unwrap_or(0);
        for begin in (0..longest).step_by(chunk) {
            let part = blocks.part(&self.lens, begin, chunk);
            let pick = |x: &[f32], width: usize| -> Vec<f32> {
                part.rows.iter().flat_map(|&row| &x[row * width..][..width]).copied().collect()
            };
            let (k, v) = (
                pick(&self.k, spec.kv_heads * spec.key_dim),
                pick(&self.v, self.v.len() / self.tokens().max(1)),
            );
            let q = pick(&self.q, spec.heads * spec.key_dim);
            let slots: Vec<SeqSlot<'_>> = part.slots(&blocks.blocks);
            let batch = RaggedBatch { sequences: &slots };
            let pages = bytes_of_mut(&mut pages);
            let write = KvWrite { k_tgk: &k, v_tgv: &v, pages, cache, batch };
            match cpu {
                Some(cpu) => kv_write(cpu, write),
                None => kv_write_reference(write),
            }
            let keys = Keys::Paged { pages, cache };
            let found = run(cpu, (spec, None), &q, keys, &slots, part.rows.len());
            for (i, &row) in part.rows.iter().enumerate() {
                for (out, found) in out.iter_mut().zip(&found) {
                    let width = found.len() / part.rows.len();
                    out[row * width..][..width].copy_from_slice(&found[i * width..][..width]);
                }
            }
        }
        out
    }

    /// The pages after the first sequence was written by the reference, and its blocks.
    fn written(&self, cache: &CacheSpec) -> (Vec<f32>, Vec<u32>) {
        let len = self.lens[0];
        let mut blocks = Blocks::new(&[len]);
        let mut pages = blocks.garbage_pages(cache);
        let slots = [SeqSlot { start: 0, len, cached: 0, blocks: &blocks.blocks[0] }];
        kv_write_reference(KvWrite {
            k_tgk: &self.k,
            v_tgv: &self.v,
            pages: bytes_of_mut(&mut pages),
            cache: *cache,
            batch: RaggedBatch { sequences: &slots },
        });
        (pages, blocks.blocks.swap_remove(0))
    }

    /// Gradients of queries, keys and values for the output gradient `dout`.
    fn grads(&self, cpu: Option<&Cpu>, dout: &[f32]) -> Vec<Vec<f32>> {
        let Self { spec, q, k, v, .. } = self;
        let forward = self.dense(None);
        let mut grads = [q, k, v].map(|x| vec![0.5; x.len()]);
        let [dq_thk, dk_tgk, dv_tgv] = &mut grads;
        let args = AttentionGrad {
            dout_thv: dout,
            q_thk: q,
            k_tgk: k,
            v_tgv: v,
            out_thv: &forward[0],
            lse_th: &forward[1],
            dq_thk,
            dk_tgk,
            dv_tgv,
            batch: RaggedBatch { sequences: &self.slots() },
            spec: *spec,
            dropout: self.dropout,
        };
        match cpu {
            Some(cpu) => attention_grad(cpu, args),
            None => attention_grad_reference(args),
        }
        grads.into()
    }

    fn cache(&self, dtype: CacheType) -> CacheSpec {
        let AttentionSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = self.spec;
        CacheSpec { dtype, kv_heads, key_dim, value_dim, values_in_keys }
    }
}

/// Pages of sequences, handed out out of order.
struct Blocks {
    blocks: Vec<Vec<u32>>,
    count: usize,
}

/// One run of all sequences that still have tokens.
struct Part {
    /// Rows of the whole batch that this run has.
    rows: Vec<usize>,
    /// (sequence, start, len, cached)
    pieces: Vec<(usize, usize, usize, usize)>,
}

impl Part {
    fn slots<'b>(&self, blocks: &'b [Vec<u32>]) -> Vec<SeqSlot<'b>> {
        let slot = |&(s, start, len, cached): &(usize, usize, usize, usize)| SeqSlot {
            start,
            len,
            cached,
            blocks: &blocks[s],
        };
        self.pieces.iter().map(slot).collect()
    }
}

impl Blocks {
    fn new(lens: &[usize]) -> Self {
        let count: usize = lens.iter().map(|len| len.div_ceil(PAGE_TOKENS)).sum();
        let mut next = 0;
        let mut blocks = Vec::new();
        for len in lens {
            let of_sequence = (0..len.div_ceil(PAGE_TOKENS)).map(|_| {
                next += 1;
                u32::try_from(count - next).unwrap()
            });
            blocks.push(of_sequence.collect());
        }
        Self { blocks, count }
    }

    /// Pages full of what earlier sequences left: here numbers that would show up.
    fn garbage_pages(&mut self, cache: &CacheSpec) -> Vec<f32> {
        vec![f32::NAN; self.count * cache.page_bytes() / 4]
    }

    fn part(&self, lens: &[usize], begin: usize, chunk: usize) -> Part {
        let (mut rows, mut pieces, mut first) = (Vec::new(), Vec::new(), 0);
        for (s, &len) in lens.iter().enumerate() {
            let end = len.min(begin + chunk);
            if begin < end {
                pieces.push((s, rows.len(), end - begin, begin));
                rows.extend(first + begin..first + end);
            }
            first += len;
        }
        Part { rows, pieces }
    }
}

fn run(
    cpu: Option<&Cpu>,
    (spec, dropout): (AttentionSpec, Option<DropoutMask>),
    q: &[f32],
    keys: Keys<'_>,
    slots: &[SeqSlot<'_>],
    tokens: usize,
) -> Vec<Vec<f32>> {
    let mut out = vec![0.0; tokens * spec.heads * spec.value_dim];
    let mut lse = vec![0.0; tokens * spec.heads];
    let batch = RaggedBatch { sequences: slots };
    let lse_th = Some(&mut lse[..]);
    let args = Attention { q_thk: q, keys, out_thv: &mut out, lse_th, batch, spec, dropout };
    match cpu {
        Some(cpu) => attention(cpu, args),
        None => attention_reference(args),
    }
    vec![out, lse]
}

fn masks() -> impl Strategy<Value = Mask> {
    let option = |most: usize| proptest::option::weighted(0.4, 1..most);
    (any::<bool>(), option(100), option(60), option(20))
        .prop_map(|(causal, window, prefix, block)| Mask { causal, window, prefix, block })
}

fn dropouts() -> impl Strategy<Value = Option<DropoutMask>> {
    let masks = (0.0..0.9_f32, any::<u64>(), 0..9_u64, 0..9_u32, any::<u64>()).prop_map(
        |(p, seed, step, site, first_token)| DropoutMask { p, seed, step, site, first_token },
    );
    proptest::option::of(masks)
}

fn specs() -> impl Strategy<Value = AttentionSpec> {
    let dims = (1..3_usize, 1..4_usize, 1..40_usize, 1..40_usize, any::<bool>(), any::<bool>());
    (dims, masks()).prop_map(|((kv_heads, group, key_dim, value_dim, in_keys, capped), mask)| {
        AttentionSpec {
            heads: kv_heads * group,
            kv_heads,
            key_dim: if in_keys { key_dim.max(value_dim) } else { key_dim },
            value_dim,
            values_in_keys: in_keys,
            mask,
            scale: 0.3,
            softcap: capped.then_some(4.0),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn dense_kernels_equal_the_reference(
        spec in specs(), lens in proptest::collection::vec(0..150_usize, 0..4),
        dropout in dropouts(), seed: u64,
    ) {
        let layer = Layer::new(spec, &lens, seed).dropping(dropout);
        check_bits("attention", |cpu| layer.dense(cpu));
    }

    #[test]
    fn gradient_kernels_equal_the_reference(
        spec in specs(), lens in proptest::collection::vec(0..150_usize, 0..4),
        dropout in dropouts(), seed: u64,
    ) {
        let layer = Layer::new(spec, &lens, seed).dropping(dropout);
        let dout = Numbers::new(!seed).floats(layer.tokens() * spec.heads * spec.value_dim, 1.0);
        check_bits("attention_grad", |cpu| layer.grads(cpu, &dout));
    }

    #[test]
    fn where_keys_lie_and_how_prefill_is_cut_changes_nothing(
        spec in specs(), lens in proptest::collection::vec(1..150_usize, 1..4),
        chunk in 1..200_usize, seed: u64,
    ) {
        // A bidirectional query must find all keys in the cache: only whole runs have them.
        let causal = spec.mask.causal && spec.mask.prefix.is_none() && spec.mask.block.is_none();
        let chunk = if causal { chunk } else { 1000 };
        let layer = Layer::new(spec, &lens, seed);
        // Rounded keys are read by everyone: those of a run by the run itself.
        let whole = |dtype| layer.paged(None, dtype, 1000);
        let expected =
            [layer.dense(None), whole(CacheType::Bf16), whole(CacheType::Q8)];
        let types = [CacheType::F32, CacheType::Bf16, CacheType::Q8];
        every_cpu(|cpu| {
            for (dtype, expected) in types.into_iter().zip(&expected) {
                for (found, expected) in layer.paged(Some(cpu), dtype, chunk).iter().zip(expected) {
                    assert_bits(found, expected, &format!("paged {dtype:?}"));
                }
            }
        });
    }

    #[test]
    fn stored_bytes_are_within_half_a_step(
        spec in specs(), len in 1..40_usize, magnitude in -30..30_i32, seed: u64,
    ) {
        let mut layer = Layer::new(spec, &[len], seed);
        let factor = 2.0_f32.powi(magnitude);
        [&mut layer.k, &mut layer.v].into_iter().flatten().for_each(|x| *x *= factor);
        let cache = layer.cache(CacheType::Q8);
        let (pages, blocks) = layer.written(&cache);
        let AttentionSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = spec;
        for (position, g) in (0..len).flat_map(|s| (0..kv_heads).map(move |g| (s, g))) {
            let page = blocks[position / PAGE_TOKENS] as usize * cache.page_bytes();
            let page = &bytes_of(&pages)[page..][..cache.page_bytes()];
            let place = (g, position % PAGE_TOKENS);
            let row = position * kv_heads + g;
            let check = |x: &[f32], found: &dyn Fn(usize) -> f32| {
                let largest = x.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                for (column, x) in x.iter().enumerate() {
                    // Half of 1/127, and the roundings on the way.
                    assert!((found(column) - x).abs() <= largest * 0.003_94, "{x}");
                }
            };
            let key = cache.key_factor(page, place);
            let k = &layer.k[row * key_dim..][..key_dim];
            check(k, &|column| key * cache.key(page, place, column));
            if !values_in_keys {
                let v = &layer.v[row * value_dim..][..value_dim];
                let value = cache.value_factor(page, place);
                check(v, &|column| value * cache.value(page, place, column));
            }
        }
    }

    #[test]
    fn a_sequence_alone_is_the_same_in_a_batch(
        spec in specs(), lens in proptest::collection::vec(1..150_usize, 2..4), seed: u64,
    ) {
        let layer = Layer::new(spec, &lens, seed);
        let (first, width) = (lens[0], spec.heads * spec.value_dim);
        every_cpu(|cpu| {
            let all = layer.dense(Some(cpu));
            let keys = Keys::Dense { k_tgk: &layer.k, v_tgv: &layer.v };
            let alone = run(Some(cpu), (spec, None), &layer.q, keys, &layer.slots()[..1], first);
            assert_bits(&alone[0], &all[0][..first * width], "alone");
        });
    }
}

const PLAIN: AttentionSpec = AttentionSpec {
    heads: 4,
    kv_heads: 2,
    key_dim: 32,
    value_dim: 16,
    values_in_keys: false,
    mask: Mask::CAUSAL,
    scale: 0.2,
    softcap: None,
};

#[test]
fn decoding_in_chunks_equals_the_reference() {
    // Long caches and few rows: tiles are cut among threads.
    for (spec, len) in [
        (PLAIN, 1500),
        (
            AttentionSpec {
                heads: 16,
                kv_heads: 1,
                key_dim: 48,
                value_dim: 32,
                values_in_keys: true,
                ..PLAIN
            },
            2000,
        ),
        (AttentionSpec { mask: Mask { window: Some(700), ..Mask::CAUSAL }, ..PLAIN }, 1777),
    ] {
        let layer = Layer::new(spec, &[len], 3);
        for dtype in [CacheType::F32, CacheType::Bf16, CacheType::Q8] {
            let cache = layer.cache(dtype);
            let (pages, blocks) = layer.written(&cache);
            let pages = bytes_of(&pages);
            let slots = [SeqSlot { start: 0, len: 1, cached: len - 1, blocks: &blocks }];
            let q = &layer.q[(len - 1) * spec.heads * spec.key_dim..];
            check_bits("decode", |cpu| {
                run(cpu, (spec, None), q, Keys::Paged { pages, cache }, &slots, 1)
            });
        }
    }
}

#[test]
fn bytes_hold_what_they_can_and_say_what_they_cannot() {
    let spec = AttentionSpec { heads: 1, kv_heads: 1, key_dim: 4, value_dim: 4, ..PLAIN };
    let mut layer = Layer::new(spec, &[5], 1);
    let keys = [
        [127.0, -127.0, 1.5, 2.5],
        [0.0, -0.0, 0.0, 0.0],
        [1e-40, 0.0, -1e-40, 0.0],
        [1.0, f32::INFINITY, 0.0, 2.0],
        [f32::NAN, 1.0, 0.0, 2.0],
    ];
    layer.k = keys.concat();
    let cache = layer.cache(CacheType::Q8);
    let (pages, blocks) = layer.written(&cache);
    assert_eq!(blocks, [0]);
    let read = |lane: usize| -> Vec<f32> {
        let factor = cache.key_factor(bytes_of(&pages), (0, lane));
        (0..4).map(|column| factor * cache.key(bytes_of(&pages), (0, lane), column)).collect()
    };
    // Ties go to even bytes.
    assert_bits(&read(0), &[127.0, -127.0, 2.0, 2.0], "bytes");
    assert_bits(&read(1), &[0.0; 4], "zeros");
    assert_bits(&read(2), &[0.0; 4], "subnormal");
    assert!(read(3).iter().chain(&read(4)).all(|x| x.is_nan()));
}

#[test]
fn gradients_are_slopes() {
    let dropout = Some(DropoutMask { p: 0.3, seed: 1, step: 2, site: 3, first_token: 4 });
    for (values_in_keys, softcap, dropout) in [
        (false, None, None),
        (false, Some(2.0), None),
        (true, None, None),
        (false, None, dropout),
        (false, Some(2.0), dropout),
        (true, None, dropout),
    ] {
        let spec = AttentionSpec {
            key_dim: 5,
            value_dim: 4,
            values_in_keys,
            softcap,
            mask: Mask { window: Some(7), ..Mask::CAUSAL },
            ..PLAIN
        };
        let layer = Layer::new(spec, &[6, 9], 11).dropping(dropout);
        let dout = Numbers::new(12).floats(15 * spec.heads * spec.value_dim, 1.0);
        let grads = layer.grads(None, &dout);
        let loss = |q: &[f32], k: &[f32], v: &[f32]| {
            let (q, k, v) = (q.to_vec(), k.to_vec(), v.to_vec());
            functional(&Layer { q, k, v, ..layer.clone() }.dense(None)[0], &dout)
        };
        let Layer { q, k, v, .. } = &layer;
        check_slope("dq", q, &grads[0], 4e-3, 3e-3, |q| loss(q, k, v));
        check_slope("dk", k, &grads[1], 4e-3, 3e-3, |k| loss(q, k, v));
        check_slope("dv", v, &grads[2], 4e-3, 3e-3, |v| loss(q, k, v));
    }
}

#[test]
fn bytes_of_pages_are_their_numbers() {
    let cache = Layer::new(PLAIN, &[1], 1).cache(CacheType::Bf16);
    assert_eq!(cache.page_bytes(), 2 * PAGE_TOKENS * 2 * (32 + 16));
    // A byte each, and a float for each key and each value.
    let cache = CacheSpec { dtype: CacheType::Q8, ..cache };
    assert_eq!(cache.page_bytes(), PAGE_TOKENS * 2 * (32 + 16 + 4 + 4));
    assert_eq!(bytes_of(&[1.0]).len(), 4);
}
