//! Attention backward with dense keys: recomputed weights, tile by tile.
//!
//! A task is one key/value head of one sequence, because its keys' gradients are one chain over all
//! its query heads and queries. Tiles of keys are the outer loop, so that a tile's gradients stay in
//! scratch while query blocks pass; a query's own gradient continues its chain from the output, tile
//! after tile. Five products a pair of blocks: scores, `dout · vᵀ`, and the three gradients.

use std::ops::Range;

use super::forward::{check, head_rows};
use super::grid::within;
use super::product::{Left, Mix, Operand, PANEL, Segments, mix, scores};
use super::scoring::{KeepAll, RowSlope, Scoring};
use super::tiles::{HeadRows, PANELS, quarters};
use super::{AttentionGrad, AttentionSpec, Keys, SeqSlot};
use crate::KEY_TILE;
use crate::cpu::{Cpu, SharedSlice};
use crate::dropout::{DropLanes, DropoutMask};
use crate::lanes::{self, at, put, vectors};
use crate::pool::Scratch;
use crate::simd::{F32x16, Kernel, LANES, dispatch};

/// Queries of a block.
const BLOCK_QUERIES: usize = 64;
const _: () = assert!(BLOCK_QUERIES == PANELS * PANEL && KEY_TILE == PANELS * PANEL);

/// What every task reads.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    spec: AttentionSpec,
    dout_thv: &'a [f32],
    q_thk: &'a [f32],
    k_tgk: &'a [f32],
    v_tgv: &'a [f32],
    out_thv: &'a [f32],
    lse_th: &'a [f32],
    dropout: Option<DropoutMask>,
}

impl<'a> Inputs<'a> {
    /// The keys and values of one key/value head of one sequence.
    fn keys_and_values(&self, slot: &SeqSlot<'_>, head: usize) -> [HeadRows<'a>; 2] {
        let Self { spec, k_tgk, v_tgv, .. } = *self;
        let AttentionSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = spec;
        let (values, dim) = if values_in_keys { (k_tgk, key_dim) } else { (v_tgv, value_dim) };
        let side = (head, kv_heads);
        [
            head_rows(k_tgk, slot, side, (key_dim, key_dim)),
            head_rows(values, slot, side, (dim, value_dim)),
        ]
    }
}

/// What tasks write parts of.
struct Grads<'a> {
    dq_thk: SharedSlice<'a, f32>,
    dk_tgk: SharedSlice<'a, f32>,
    dv_tgv: SharedSlice<'a, f32>,
}

/// The scratch memory of a task.
struct Buffers<'m> {
    /// Keys and values of a tile in panels, keys in rows.
    key_panels: &'m mut [f32],
    value_panels: &'m mut [f32],
    key_rows: &'m mut [f32],
    /// Queries and output gradients of a block in rows.
    query_rows: &'m mut [f32],
    dout_rows: &'m mut [f32],
    /// Scores, then weights; weights' gradients, then scores' gradients. `[query][KEY_TILE]`.
    weights: &'m mut [f32],
    slopes: &'m mut [f32],
    /// Gradients of the block's queries and the tile's keys and values, in rows.
    dq: &'m mut [f32],
    dk: &'m mut [f32],
    dv: &'m mut [f32],
    /// `Σ dout · out` of each query of each query head, if there are at most [`DELTAS_MAX`].
    deltas: &'m mut [f32],
}

/// Rows of `dout` and `out` that are asked of memory before they are read: heads' rows lie far
/// apart, where no prefetcher of the processor finds them.
const ROWS_AHEAD: usize = 8;
/// Queries whose `Σ dout · out` is kept; of longer sequences it is computed anew for each tile.
const DELTAS_MAX: usize = 1 << 16;

impl<'m> Buffers<'m> {
    fn new(scratch: &'m mut Scratch, spec: &AttentionSpec, queries: usize) -> Self {
        let (k, v) = (spec.key_dim, spec.value_dim);
        let [key_rows, value_rows] = [k, v].map(|dim| dim.next_multiple_of(LANES) * KEY_TILE);
        let pairs = BLOCK_QUERIES * KEY_TILE;
        let lens = [
            k * KEY_TILE,
            v * KEY_TILE,
            key_rows,
            key_rows,
            value_rows,
            pairs,
            pairs,
            key_rows,
            key_rows,
            value_rows,
            if queries <= DELTAS_MAX { queries } else { 0 },
        ];
        let [
            key_panels,
            value_panels,
            key_rows,
            query_rows,
            dout_rows,
            weights,
            slopes,
            dq,
            dk,
            dv,
            deltas,
        ] = scratch.f32_parts(lens);
        Self {
            key_panels,
            value_panels,
            key_rows,
            query_rows,
            dout_rows,
            weights,
            slopes,
            dq,
            dk,
            dv,
            deltas,
        }
    }
}

/// The gradients of one key/value head of one sequence.
struct HeadJob<'a, 'm> {
    inputs: Inputs<'a>,
    grads: &'a Grads<'a>,
    slot: SeqSlot<'a>,
    head: usize,
    buffers: Buffers<'m>,
}

/// A block of queries of one query head against a tile of keys.
#[derive(Clone)]
struct Pair {
    head: usize,
    queries: Range<usize>,
    tile: usize,
}

impl Kernel for HeadJob<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(mut self) {
        let (spec, len) = (self.inputs.spec, self.slot.len);
        let group = spec.group();
        let heads = self.head * group..(self.head + 1) * group;
        self.each_dq_row(heads.clone(), |dq_k| dq_k.fill(0.0));
        self.keep_deltas::<V>(heads.clone());
        let [keys, values] = self.inputs.keys_and_values(&self.slot, self.head);
        for tile in 0..len.div_ceil(KEY_TILE) {
            let (first, count) = (tile * KEY_TILE, (len - tile * KEY_TILE).min(KEY_TILE));
            keys.pack_panels::<V>(first, count, self.buffers.key_panels);
            values.pack_panels::<V>(first, count, self.buffers.value_panels);
            keys.pack_rows::<V>(first, count, self.buffers.key_rows);
            for key in first + KEY_TILE..first + 2 * KEY_TILE {
                keys.ask::<V>(key);
                values.ask::<V>(key);
            }
            self.buffers.dk.fill(0.0);
            self.buffers.dv.fill(0.0);
            for head in heads.clone() {
                for begin in (0..len).step_by(BLOCK_QUERIES) {
                    let queries = begin..len.min(begin + BLOCK_QUERIES);
                    let pair = Pair { head, queries, tile };
                    if self.seen(&pair, pair.queries.len() - 1).end > 0
                        && self.seen(&pair, 0).start < KEY_TILE
                    {
                        self.pair::<V>(&pair, count);
                    }
                }
            }
            self.store_tile(first, count);
        }
        // −0 becomes 0, as in the reference.
        self.each_dq_row(heads, |dq_k| dq_k.iter_mut().for_each(|dq| *dq += 0.0));
    }
}

impl<'a> HeadJob<'a, '_> {
    /// The rows of one query head in a `[t, h, dim]` tensor.
    fn query_rows(&self, numbers: &'a [f32], head: usize, dim: usize) -> HeadRows<'a> {
        head_rows(numbers, &self.slot, (head, self.inputs.spec.heads), (dim, dim))
    }

    /// Lanes of the pair's tile that its query `r` sees.
    #[inline(always)]
    fn seen(&self, pair: &Pair, r: usize) -> Range<usize> {
        let visible = self.inputs.spec.mask.range(pair.queries.start + r, self.slot.len);
        within(&visible, pair.tile)
    }

    /// The gradient of one query.
    fn dq_row(&self, head: usize, query: usize) -> &'a mut [f32] {
        let dim = self.inputs.spec.key_dim;
        let row = (self.slot.start + query) * self.inputs.spec.heads + head;
        // SAFETY: sequences do not overlap (`check`), a query head belongs to one key/value head,
        // and this task is the only one of this pair; it uses one row at a time.
        unsafe { self.grads.dq_thk.slice_mut(row * dim..(row + 1) * dim) }
    }

    fn each_dq_row(&self, heads: Range<usize>, f: impl Fn(&mut [f32])) {
        for head in heads {
            (0..self.slot.len).for_each(|query| f(self.dq_row(head, query)));
        }
    }

    /// `Σ dout · out` of a query.
    #[inline(always)]
    fn delta<V: F32x16>(&self, head: usize, query: usize) -> f32 {
        let Inputs { spec, dout_thv, out_thv, .. } = self.inputs;
        let douts = self.query_rows(dout_thv, head, spec.value_dim);
        let outs = self.query_rows(out_thv, head, spec.value_dim);
        lanes::row_dot::<V>(douts.row(query), outs.row(query))
    }

    #[inline(always)]
    fn keep_deltas<V: F32x16>(&mut self, heads: Range<usize>) {
        if self.buffers.deltas.is_empty() {
            return;
        }
        let Inputs { spec, dout_thv, out_thv, .. } = self.inputs;
        for (head, i) in heads.zip(0..) {
            let rows = [dout_thv, out_thv].map(|x| self.query_rows(x, head, spec.value_dim));
            for query in 0..self.slot.len {
                rows.iter().for_each(|rows| rows.ask::<V>(query + ROWS_AHEAD));
                self.buffers.deltas[i * self.slot.len + query] = self.delta::<V>(head, query);
            }
        }
    }

    /// One block of queries against the tile in the buffers, of `keys` keys.
    #[inline(always)]
    fn pair<V: F32x16>(&mut self, pair: &Pair, keys: usize) {
        let spec = self.inputs.spec;
        let (begin, count) = (pair.queries.start, pair.queries.len());
        let queries = self.query_rows(self.inputs.q_thk, pair.head, spec.key_dim);
        let douts = self.query_rows(self.inputs.dout_thv, pair.head, spec.value_dim);
        let mut seen: [Range<usize>; BLOCK_QUERIES] = std::array::from_fn(|_| 0..0);
        for (r, seen) in seen.iter_mut().enumerate().take(count) {
            *seen = self.seen(pair, r);
        }
        let panels_of = |group: Range<usize>| seen[group.end - 1].end.div_ceil(PANEL);
        let used = keys.div_ceil(PANEL);
        let Buffers { key_panels, value_panels, weights, slopes, .. } = &mut self.buffers;
        let panels = quarters(key_panels);
        let panels = Operand { now: &panels[..used], next: &[] };
        let rows = row_starts(&queries, begin);
        scores::<V, _, _>(&rows, (count, spec.key_dim), panels, weights, panels_of);
        let panels = quarters(value_panels);
        let panels = Operand { now: &panels[..used], next: &[] };
        let rows = row_starts(&douts, begin);
        scores::<V, _, _>(&rows, (count, spec.value_dim), panels, slopes, panels_of);
        self.slopes::<V>(pair, &seen[..count]);
        queries.pack_rows::<V>(begin, count, self.buffers.query_rows);
        douts.pack_rows::<V>(begin, count, self.buffers.dout_rows);
        self.key_gradients::<V>(keys, &seen[..count]);
        self.query_gradients::<V>(pair, &seen[..count]);
    }

    /// Scores become weights, the weights' gradients the scores'.
    #[inline(always)]
    fn slopes<V: F32x16>(&mut self, pair: &Pair, seen: &[Range<usize>]) {
        let Inputs { spec, lse_th, dropout, .. } = self.inputs;
        let drops = dropout.map(|mask| (mask, DropLanes::<V>::new(&mask)));
        let queries = self.query_rows(self.inputs.q_thk, pair.head, spec.key_dim);
        let in_group = pair.head - self.head * spec.group();
        let scoring = Scoring::<V>::new(&spec);
        for ((query, seen), first) in pair.queries.clone().zip(seen).zip((0..).step_by(KEY_TILE)) {
            let token_head = (self.slot.start + query) * spec.heads + pair.head;
            let kept = self.buffers.deltas.get(in_group * self.slot.len + query).copied();
            let row = RowSlope {
                delta: match kept {
                    Some(delta) => delta,
                    None => self.delta::<V>(pair.head, query),
                },
                lse: lse_th[token_head],
                seen: seen.clone(),
            };
            let Buffers { weights, slopes, .. } = &mut self.buffers;
            let (weights, slopes) = (&mut weights[first..], &mut slopes[first..]);
            match drops {
                None => scoring.slope(weights, slopes, &row, KeepAll),
                Some((mask, lanes)) => {
                    let key = mask.query_key(token_head, spec.heads);
                    scoring.slope(weights, slopes, &row, lanes.row(key, pair.tile * KEY_TILE));
                }
            }
            if pair.tile == 0 {
                queries.ask::<V>(query + BLOCK_QUERIES);
            }
        }
    }

    /// Adds the block's part to the chains of the tile's keys and values.
    #[inline(always)]
    fn key_gradients<V: F32x16>(&mut self, keys: usize, seen: &[Range<usize>]) {
        let spec = self.inputs.spec;
        let queries_of = |group: Range<usize>| {
            // Both ends of `seen` grow with the query.
            let start = seen.partition_point(|seen| seen.end <= group.start);
            start..seen.partition_point(|seen| seen.start < group.end).max(start)
        };
        let Buffers { query_rows, dout_rows, weights, slopes, dk, dv, .. } = &mut self.buffers;
        for (left, right, out, dim) in
            [(weights, dout_rows, dv, spec.value_dim), (slopes, query_rows, dk, spec.key_dim)]
        {
            let left = Left { numbers: left, start: |key| key, step: KEY_TILE };
            let stride = dim.next_multiple_of(LANES);
            let segments = quarters(right);
            let segments = Segments { segments: Operand { now: &segments, next: &[] }, stride };
            let args = Mix { rows: keys, columns: stride, out, keep: true };
            mix::<V, _, _>(&left, segments, args, queries_of);
        }
    }

    /// Continues the chains of the block's queries.
    #[inline(always)]
    fn query_gradients<V: F32x16>(&mut self, pair: &Pair, seen: &[Range<usize>]) {
        let spec = self.inputs.spec;
        let columns = spec.key_dim.next_multiple_of(LANES);
        for (query, row) in pair.queries.clone().zip(0..) {
            let from = self.dq_row(pair.head, query);
            let to = row * columns;
            for i in vectors(spec.key_dim) {
                put(at::<V>(from, i), self.buffers.dq, to + i);
            }
        }
        let Buffers { slopes, key_rows, dq, .. } = &mut self.buffers;
        let left = Left { numbers: slopes, start: |r| r * KEY_TILE, step: 1 };
        let segments = quarters(key_rows);
        let segments =
            Segments { segments: Operand { now: &segments, next: &[] }, stride: columns };
        let args = Mix { rows: seen.len(), columns, out: dq, keep: true };
        mix::<V, _, _>(&left, segments, args, |group| {
            let start = seen[group.start].start;
            start..seen[group.end - 1].end.max(start)
        });
        for (query, row) in pair.queries.clone().zip(0..) {
            let to = self.dq_row(pair.head, query);
            to.copy_from_slice(&self.buffers.dq[row * columns..][..spec.key_dim]);
        }
    }

    /// Writes the gradients of a tile's keys and values out.
    #[inline(always)]
    fn store_tile(&mut self, first: usize, count: usize) {
        let AttentionSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = self.inputs.spec;
        let Buffers { dk, dv, .. } = &mut self.buffers;
        let [key_columns, value_columns] =
            [key_dim, value_dim].map(|dim| dim.next_multiple_of(LANES));
        for i in 0..count {
            let row = (self.slot.start + first + i) * kv_heads + self.head;
            let (dk, dv) = (&dk[i * key_columns..], &dv[i * value_columns..]);
            // SAFETY: sequences do not overlap (`check`), and this task alone has this head.
            let dk_k = unsafe { self.grads.dk_tgk.slice_mut(row * key_dim..(row + 1) * key_dim) };
            for (column, (to, from)) in dk_k.iter_mut().zip(dk).enumerate() {
                let value_part =
                    if values_in_keys && column < value_dim { dv[column] } else { 0.0 };
                *to = from + value_part;
            }
            if !values_in_keys {
                // SAFETY: as above.
                let dv_v =
                    unsafe { self.grads.dv_tgv.slice_mut(row * value_dim..(row + 1) * value_dim) };
                for (to, from) in dv_v.iter_mut().zip(dv) {
                    *to = from + 0.0;
                }
            }
        }
    }
}

/// The rows of a block as a left operand.
#[inline(always)]
fn row_starts<'a>(rows: &HeadRows<'a>, begin: usize) -> Left<'a, impl Fn(usize) -> usize + use<>> {
    let stride = rows.stride;
    Left { numbers: rows.numbers, start: move |r| (begin + r) * stride, step: 1 }
}

/// The gradients of attention with dense keys.
pub(super) fn attention_grad_blocks(cpu: &Cpu, args: AttentionGrad<'_>) {
    let AttentionGrad { dout_thv, q_thk, k_tgk, v_tgv, out_thv, lse_th, .. } = args;
    let AttentionGrad { dq_thk, dk_tgk, dv_tgv, batch, spec, dropout, .. } = args;
    let dropout = dropout.filter(|mask| mask.p > 0.0);
    check(&batch, &spec, &Keys::Dense { k_tgk, v_tgv });
    let inputs = Inputs { spec, dout_thv, q_thk, k_tgk, v_tgv, out_thv, lse_th, dropout };
    let grads = Grads {
        dq_thk: SharedSlice::new(dq_thk),
        dk_tgk: SharedSlice::new(dk_tgk),
        dv_tgv: SharedSlice::new(dv_tgv),
    };
    let simd = cpu.simd();
    cpu.parallel(batch.sequences.len() * spec.kv_heads, |task, scratch| {
        let (slot, head) = (batch.sequences[task / spec.kv_heads], task % spec.kv_heads);
        let buffers = Buffers::new(scratch, &spec, slot.len * spec.group());
        dispatch(simd, HeadJob { inputs, grads: &grads, slot, head, buffers });
    });
}
