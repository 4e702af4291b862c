//! Attention in plain loops: the meaning of [`attention`](super::attention) and its gradients.

use std::ops::Range;

use super::{Attention, AttentionGrad, AttentionSpec, CacheSpec, Keys, PAGE_TOKENS, SeqSlot};
use crate::dropout::DropoutMask;
use crate::{KEY_TILE, lanes, math};

/// What a range of tiles contributes: the greatest score, the sum of `e^(score − max)` and the
/// values weighted by it.
struct Node {
    max: f32,
    sum: f32,
    out_v: Vec<f32>,
}

/// Keys and values of one key/value head of one sequence, by position.
struct HeadKeys<'a> {
    keys: Keys<'a>,
    slot: SeqSlot<'a>,
    spec: AttentionSpec,
    head: usize,
}

/// One query of one head.
struct Query<'a> {
    q_k: &'a [f32],
    /// Positions of the keys it sees.
    visible: Range<usize>,
    dropped: Dropped,
}

/// What dropout makes of a query's probabilities.
struct Dropped {
    mask: Option<DropoutMask>,
    key: u64,
}

impl Dropped {
    /// The query in row `row` of `[t, h]`.
    fn new(mask: Option<DropoutMask>, row: usize, heads: usize) -> Self {
        Self { mask, key: mask.map_or(0, |mask| mask.query_key(row, heads)) }
    }

    fn apply(&self, position: usize, x: f32) -> f32 {
        self.mask.map_or(x, |mask| mask.apply(self.key, position, x))
    }
}

/// The page of a position of a sequence.
fn page_of<'a>(
    pages: &'a [u8],
    cache: &CacheSpec,
    slot: &SeqSlot<'_>,
    position: usize,
) -> &'a [u8] {
    let block = slot.blocks[position / PAGE_TOKENS] as usize;
    &pages[block * cache.page_bytes()..][..cache.page_bytes()]
}

impl HeadKeys<'_> {
    fn key(&self, position: usize, column: usize) -> f32 {
        match self.keys {
            Keys::Dense { k_tgk, .. } => {
                let row = (self.slot.start + position) * self.spec.kv_heads + self.head;
                k_tgk[row * self.spec.key_dim + column]
            }
            Keys::Paged { pages, cache } => {
                let page = page_of(pages, &cache, &self.slot, position);
                cache.key(page, (self.head, position % PAGE_TOKENS), column)
            }
        }
    }

    fn value(&self, position: usize, column: usize) -> f32 {
        match self.keys {
            _ if self.spec.values_in_keys => self.key(position, column),
            Keys::Dense { v_tgv, .. } => {
                let row = (self.slot.start + position) * self.spec.kv_heads + self.head;
                v_tgv[row * self.spec.value_dim + column]
            }
            Keys::Paged { pages, cache } => {
                let page = page_of(pages, &cache, &self.slot, position);
                cache.value(page, (self.head, position % PAGE_TOKENS), column)
            }
        }
    }

    /// What a key's chain is multiplied by.
    fn key_factor(&self, position: usize) -> f32 {
        match self.keys {
            Keys::Dense { .. } => 1.0,
            Keys::Paged { pages, cache } => {
                let page = page_of(pages, &cache, &self.slot, position);
                cache.key_factor(page, (self.head, position % PAGE_TOKENS))
            }
        }
    }

    /// What the weight of a value is multiplied by.
    fn value_factor(&self, position: usize) -> f32 {
        match self.keys {
            _ if self.spec.values_in_keys => self.key_factor(position),
            Keys::Dense { .. } => 1.0,
            Keys::Paged { pages, cache } => {
                let page = page_of(pages, &cache, &self.slot, position);
                cache.value_factor(page, (self.head, position % PAGE_TOKENS))
            }
        }
    }

    /// The score of a visible key, and the tanh of the soft cap (0 without one).
    fn score(&self, q_k: &[f32], position: usize) -> (f32, f32) {
        let mut chain = 0.0_f32;
        for (column, &q) in q_k.iter().enumerate() {
            chain = q.mul_add(self.key(position, column), chain);
        }
        let score = chain * self.key_factor(position) * self.spec.scale;
        match self.spec.softcap {
            Some(cap) => {
                let t = math::tanh(score * (1.0 / cap));
                (cap * t, t)
            }
            None => (score, 0.0),
        }
    }

    /// One tile of a query's visible keys; `None` if it has none.
    fn tile(&self, query: &Query<'_>, tile: usize) -> Option<Node> {
        let (first, visible) = (tile * KEY_TILE, &query.visible);
        let seen = visible.start.max(first)..visible.end.min(first + KEY_TILE);
        if seen.is_empty() {
            return None;
        }
        let mut scores = [f32::NEG_INFINITY; KEY_TILE];
        for position in seen.clone() {
            scores[position - first] = self.score(query.q_k, position).0;
        }
        let max = lanes::max(scores);
        let weights = scores.map(|score| math::exp(score - max));
        let mut out_v = vec![0.0_f32; self.spec.value_dim];
        for position in seen {
            let weight = query.dropped.apply(position, weights[position - first]);
            let weight = weight * self.value_factor(position);
            for (column, out) in out_v.iter_mut().enumerate() {
                *out = weight.mul_add(self.value(position, column), *out);
            }
        }
        Some(Node { max, sum: lanes::sum(weights), out_v })
    }

    /// The subtree of `size` tiles (a power of two) from tile `first`.
    fn tree(&self, query: &Query<'_>, first: usize, size: usize) -> Option<Node> {
        if size == 1 {
            return self.tile(query, first);
        }
        let left = self.tree(query, first, size / 2);
        let right = self.tree(query, first + size / 2, size / 2);
        match (left, right) {
            (Some(left), Some(right)) => Some(merge(left, &right)),
            (left, right) => left.or(right),
        }
    }
}

/// Combines two subtrees, the left one covering the lower positions.
fn merge(left: Node, right: &Node) -> Node {
    let max = lanes::max([left.max, right.max]);
    let (a, b) = (math::exp(left.max - max), math::exp(right.max - max));
    let mut out_v = left.out_v;
    for (out, right) in out_v.iter_mut().zip(&right.out_v) {
        *out = out.mul_add(a, right * b);
    }
    Node { max, sum: left.sum.mul_add(a, right.sum * b), out_v }
}

/// [`attention`](super::attention) in plain loops.
pub fn attention_reference(args: Attention<'_>) {
    let Attention { q_thk, keys, out_thv, mut lse_th, batch, spec, dropout } = args;
    for slot in batch.sequences {
        let tiles = slot.keys().div_ceil(KEY_TILE).next_power_of_two();
        for (i, h) in (0..slot.len).flat_map(|i| (0..spec.heads).map(move |h| (i, h))) {
            let head = HeadKeys { keys, slot: *slot, spec, head: h / spec.group() };
            let row = (slot.start + i) * spec.heads + h;
            let query = Query {
                q_k: &q_thk[row * spec.key_dim..][..spec.key_dim],
                visible: spec.mask.range(slot.cached + i, slot.keys()),
                dropped: Dropped::new(dropout, row, spec.heads),
            };
            let root = head.tree(&query, 0, tiles);
            let out_v = &mut out_thv[row * spec.value_dim..][..spec.value_dim];
            let lse = match root {
                Some(root) => {
                    let inverse = 1.0 / root.sum;
                    for (out, o) in out_v.iter_mut().zip(&root.out_v) {
                        // The sum with 0 turns −0 into 0: which of the two a chain ends in may
                        // depend on the hidden keys that a kernel multiplies by 0.
                        *out = o * inverse + 0.0;
                    }
                    root.max + math::ln(root.sum)
                }
                None => {
                    out_v.fill(0.0);
                    f32::NEG_INFINITY
                }
            };
            if let Some(lse_th) = &mut lse_th {
                lse_th[row] = lse;
            }
        }
    }
}

/// [`attention_grad`](super::attention_grad) in plain loops.
pub fn attention_grad_reference(args: AttentionGrad<'_>) {
    let AttentionGrad { dout_thv, q_thk, k_tgk, v_tgv, out_thv, lse_th, .. } = args;
    let AttentionGrad { dq_thk, dk_tgk, dv_tgv, batch, spec, dropout, .. } = args;
    let (dk, dv) = (spec.key_dim, spec.value_dim);
    for slot in batch.sequences {
        assert_eq!(slot.cached, 0, "attention_grad: gradients do not reach cached keys");
        for (g, s) in (0..spec.kv_heads).flat_map(|g| (0..slot.len).map(move |s| (g, s))) {
            let head = HeadKeys { keys: Keys::Dense { k_tgk, v_tgv }, slot: *slot, spec, head: g };
            let mut dk_k = vec![0.0_f32; dk];
            let mut dv_v = vec![0.0_f32; dv];
            for (h, i) in group_queries(&spec, g, slot.len) {
                let row = (slot.start + i) * spec.heads + h;
                if s == 0 {
                    dq_thk[row * dk..][..dk].fill(0.0);
                }
                if !spec.mask.range(i, slot.len).contains(&s) {
                    continue;
                }
                let (q_k, dout_v) = (&q_thk[row * dk..][..dk], &dout_thv[row * dv..][..dv]);
                let out_v = &out_thv[row * dv..][..dv];
                let (score, t) = head.score(q_k, s);
                let p = math::exp(score - lse_th[row]);
                let dropped = Dropped::new(dropout, row, spec.heads);
                let kept = dropped.apply(s, p);
                let delta = lanes::dot(dout_v.iter().copied().zip(out_v.iter().copied()));
                let mut dp = 0.0_f32;
                for (column, &dout) in dout_v.iter().enumerate() {
                    dp = dout.mul_add(head.value(s, column), dp);
                    dv_v[column] = kept.mul_add(dout, dv_v[column]);
                }
                let ds = p * (dropped.apply(s, dp) - delta);
                let ds = if spec.softcap.is_some() { ds * (-t).mul_add(t, 1.0) } else { ds };
                let ds = ds * spec.scale;
                for column in 0..dk {
                    let dq = &mut dq_thk[row * dk + column];
                    *dq = ds.mul_add(head.key(s, column), *dq);
                    dk_k[column] = ds.mul_add(q_k[column], dk_k[column]);
                }
            }
            let row = (slot.start + s) * spec.kv_heads + g;
            for (column, x) in dk_k.iter().enumerate() {
                let value_part =
                    if spec.values_in_keys && column < dv { dv_v[column] } else { 0.0 };
                dk_tgk[row * dk + column] = x + value_part;
            }
            if !spec.values_in_keys {
                for (column, x) in dv_v.iter().enumerate() {
                    dv_tgv[row * dv + column] = x + 0.0;
                }
            }
        }
        for x in &mut dq_thk[slot.start * spec.heads * dk..][..slot.len * spec.heads * dk] {
            *x += 0.0;
        }
    }
}

/// The (query head, query) pairs whose gradients one key/value head sums, in order.
fn group_queries(
    spec: &AttentionSpec,
    kv_head: usize,
    queries: usize,
) -> impl Iterator<Item = (usize, usize)> + use<> {
    let group = spec.group();
    (kv_head * group..(kv_head + 1) * group).flat_map(move |h| (0..queries).map(move |i| (h, i)))
}
