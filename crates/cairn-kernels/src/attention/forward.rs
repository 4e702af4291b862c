//! Attention forward: blocks of query rows against tiles of keys, tiles combined in their tree.
//!
//! A *block* is up to [`BLOCK_ROWS`] rows (query, query head) that share one key/value head: 64
//! queries without grouping, 8 queries of 8 heads with, or all heads of a single decoded token, so
//! that every key that is read serves all of them. Per tile: scores (a register-tiled product with
//! lanes of keys), weights and their sums row by row, then weights times values.
//!
//! When there are too few blocks for the threads (decoding), a block's tiles are cut into chunks
//! that are whole subtrees of the tree; their nodes are combined afterwards as the tree would have.

use std::ops::Range;

use super::cache::check_blocks;
use super::product::{Element, Left, Mix, Operand, PANEL, Segments, mix, scores};
use super::tiles::{DenseTiles, HeadRows, PagedTiles, RepackedTiles, TileBuffers, Tiles};
use super::{Attention, AttentionSpec, CacheType, Keys, RaggedBatch, SeqSlot};
use crate::cpu::{Cpu, SharedSlice};
use crate::disjoint::{RowSlice, parallel_rows};
use crate::isa::Simd;
use crate::lanes::{at, put, vectors};
use crate::memory::Bytes;
use crate::pool::{SCRATCH_BYTES, Scratch};
use crate::simd::{F32x16, Kernel, LANES, Mask16, dispatch};
use crate::{KEY_TILE, math};

/// Rows of a block, at most.
const BLOCK_ROWS: usize = 64;
/// Floats of scratch memory.
const SCRATCH_FLOATS: usize = SCRATCH_BYTES / 4;
/// Floats that packed tiles of a dense sequence may take: half of the scratch memory.
const PRELOAD_FLOATS: usize = SCRATCH_FLOATS / 2;
/// Floats that the nodes of a block may take.
const NODE_FLOATS: usize = SCRATCH_FLOATS / 4;
/// Tiles of the smallest chunk a block is cut into.
const CHUNK_TILES_MIN: usize = 4;

/// Rows of one key/value head of one sequence.
#[derive(Clone)]
struct Block<'a> {
    spec: AttentionSpec,
    slot: SeqSlot<'a>,
    head: usize,
    /// Row r is query r / group, query head r % group of the group.
    rows: Range<usize>,
}

impl Block<'_> {
    /// The (token, query head) of the block's row `r`, as an index into `[t, h]`.
    #[inline(always)]
    fn token_head(&self, r: usize) -> usize {
        let group = self.spec.heads / self.spec.kv_heads;
        let r = self.rows.start + r;
        (self.slot.start + r / group) * self.spec.heads + self.head * group + r % group
    }

    /// Keys that the block's row `r` sees.
    #[inline(always)]
    fn visible(&self, r: usize) -> Range<usize> {
        let group = self.spec.heads / self.spec.kv_heads;
        let query = (self.rows.start + r) / group;
        self.spec.mask.range(self.slot.cached + query, self.slot.keys())
    }

    /// Tiles that any row sees: ranges grow with the query, so the ends are the first and last row's.
    fn tiles(&self) -> Range<usize> {
        let (first, last) = (self.visible(0), self.visible(self.rows.len() - 1));
        let end = last.end.div_ceil(KEY_TILE);
        (first.start / KEY_TILE).min(end)..end
    }
}

/// Where lane ranges of a tile lie.
#[inline(always)]
pub(super) fn within(visible: &Range<usize>, tile: usize) -> Range<usize> {
    let clamp = |position: usize| position.saturating_sub(tile * KEY_TILE).min(KEY_TILE);
    clamp(visible.start)..clamp(visible.end)
}

/// Layout of a node: maxima, sums, then the weighted values of each row.
#[derive(Clone, Copy)]
struct NodeShape {
    rows: usize,
    padded_rows: usize,
    columns: usize,
}

impl NodeShape {
    fn new(rows: usize, value_dim: usize) -> Self {
        let columns = value_dim.next_multiple_of(LANES);
        Self { rows, padded_rows: rows.next_multiple_of(LANES), columns }
    }

    fn len(self) -> usize {
        2 * self.padded_rows + self.rows * self.columns
    }

    /// Maxima, sums and values of a node.
    #[inline(always)]
    fn parts(self, node: &mut [f32]) -> [&mut [f32]; 3] {
        let (max, rest) = node.split_at_mut(self.padded_rows);
        let (sum, out) = rest.split_at_mut(self.padded_rows);
        [max, sum, &mut out[..self.rows * self.columns]]
    }

    /// `right = left ∘ right`.
    #[inline(always)]
    fn merge<V: F32x16>(self, left: &mut [f32], right: &mut [f32]) {
        let [left_max, left_sum, left_out] = self.parts(left);
        let [max, sum, out] = self.parts(right);
        for first in vectors(self.padded_rows) {
            let (a_max, b_max) = (at::<V>(left_max, first), at::<V>(max, first));
            let top = a_max.max(b_max);
            // Where neither side saw a key, any finite number keeps both factors at 0.
            let safe = V::select(top.eq(V::splat(f32::NEG_INFINITY)), V::zero(), top);
            let (a, b) = (math::exp(a_max - safe), math::exp(b_max - safe));
            put(top, max, first);
            put(at::<V>(left_sum, first).mul_add(a, at::<V>(sum, first) * b), sum, first);
            let (a, b) = (a.to_array(), b.to_array());
            for i in 0..LANES.min(self.rows - first) {
                let row = (first + i) * self.columns..(first + i + 1) * self.columns;
                let (from, to) = (&left_out[row.clone()], &mut out[row]);
                for column in vectors(self.columns) {
                    let scaled = at::<V>(to, column) * V::splat(b[i]);
                    put(at::<V>(from, column).mul_add(V::splat(a[i]), scaled), to, column);
                }
            }
        }
    }
}

/// Subtrees that wait for their right sibling, like the digits of a binary counter.
struct Tree<'a> {
    shape: NodeShape,
    /// Memory of the nodes.
    nodes: &'a mut [f32],
    /// Where the waiting node of each level is, if `waiting` has its bit.
    places: [usize; LEVELS_MAX],
    waiting: u64,
    /// Where the node in hand is.
    hand: usize,
}

/// Levels of the deepest tree: 2³¹ tiles.
const LEVELS_MAX: usize = 32;

impl<'a> Tree<'a> {
    /// Nodes that a tree over leaves below `end` needs.
    fn nodes(end: usize) -> usize {
        (end.max(1).ilog2() + 2) as usize
    }

    /// An empty tree: the node in hand has seen nothing.
    fn new(shape: NodeShape, nodes: &'a mut [f32]) -> Self {
        let hand = nodes.len() / shape.len() - 1;
        let mut tree = Self { shape, nodes, places: std::array::from_fn(|i| i), waiting: 0, hand };
        let [max, sum, out] = tree.in_hand();
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        out.fill(0.0);
        tree
    }

    /// The parts of the node in hand, where a leaf is made and the result is found.
    #[inline(always)]
    fn in_hand(&mut self) -> [&mut [f32]; 3] {
        let len = self.shape.len();
        self.shape.parts(&mut self.nodes[self.hand * len..][..len])
    }

    /// Merges the waiting node of a level into the one in hand.
    #[inline(always)]
    fn merge<V: F32x16>(&mut self, level: usize) {
        let len = self.shape.len();
        let range = |place: usize| place * len..(place + 1) * len;
        let ranges = [range(self.places[level]), range(self.hand)];
        let [left, right] = self.nodes.get_disjoint_mut(ranges).expect("nodes do not overlap");
        self.shape.merge::<V>(left, right);
        self.waiting &= !(1 << level);
    }

    /// Takes the leaf in hand, number `leaf`, in. Leaves come in ascending order; missing ones are
    /// empty.
    #[inline(always)]
    fn carry<V: F32x16>(&mut self, leaf: usize) {
        let mut level = 0;
        while leaf >> level & 1 == 1 {
            if self.waiting >> level & 1 == 1 {
                self.merge::<V>(level);
            }
            level += 1;
        }
        std::mem::swap(&mut self.places[level], &mut self.hand);
        self.waiting |= 1 << level;
    }

    /// Folds what waits into the node in hand, from the smallest subtree upward.
    #[inline(always)]
    fn fold<V: F32x16>(&mut self) {
        if self.waiting == 0 {
            return;
        }
        let lowest = self.waiting.trailing_zeros() as usize;
        std::mem::swap(&mut self.places[lowest], &mut self.hand);
        self.waiting &= !(1 << lowest);
        for level in lowest + 1..LEVELS_MAX {
            if self.waiting >> level & 1 == 1 {
                self.merge::<V>(level);
            }
        }
    }
}

/// Turns the visible scores of a row into weights, hidden ones into 0, and gives their maximum and
/// the weights' sum.
#[inline(always)]
fn weigh<V: F32x16>(row: &mut [f32], seen: Range<usize>, spec: &AttentionSpec) -> (f32, f32) {
    if seen.is_empty() {
        row.fill(0.0);
        return (f32::NEG_INFINITY, 0.0);
    }
    let hidden = V::splat(f32::NEG_INFINITY);
    let mut scores = [hidden; KEY_TILE / LANES];
    let mut max = hidden;
    let used = seen.end.div_ceil(LANES);
    for (j, to) in scores.iter_mut().enumerate().take(used) {
        let first = j * LANES;
        let mut score = at::<V>(row, first) * V::splat(spec.scale);
        if let Some(cap) = spec.softcap {
            score = V::splat(cap) * math::tanh(score * V::splat(1.0 / cap));
        }
        if seen.end < first + LANES || seen.start > first {
            let past = V::Mask::first(seen.start.saturating_sub(first)).not();
            let shown = V::Mask::first(seen.end - first).and(past);
            score = V::select(shown, score, hidden);
        }
        max = max.max(score);
        *to = score;
    }
    let max = max.max_lane();
    let mut sum = V::zero();
    for (j, score) in scores.into_iter().enumerate() {
        let weight = if j < used { math::exp(score - V::splat(max)) } else { V::zero() };
        sum = sum + weight;
        put(weight, row, j * LANES);
    }
    (max, sum.sum())
}

/// One block against some tiles. The result is the node in the hand of the tree.
struct BlockJob<'a, 'm, T> {
    block: &'a Block<'a>,
    q_thk: &'a [f32],
    source: &'a T,
    tiles: Range<usize>,
    buffers: TileBuffers<'a>,
    scores: &'a mut [f32],
    tree: Tree<'m>,
}

impl<'m, T: Tiles> Kernel for BlockJob<'_, 'm, T> {
    type Output = Tree<'m>;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Tree<'m> {
        let Self { block, q_thk, source, tiles, mut buffers, scores: weights, mut tree } = self;
        let buffers = &mut buffers;
        let (spec, rows) = (block.spec, block.rows.len());
        let mut visible: [Range<usize>; BLOCK_ROWS] = std::array::from_fn(|_| 0..0);
        for (r, visible) in visible.iter_mut().enumerate().take(rows) {
            *visible = block.visible(r);
        }
        let queries =
            Left { numbers: q_thk, start: |r| block.token_head(r) * spec.key_dim, step: 1 };
        for tile in tiles.clone() {
            let keys = (block.slot.keys() - tile * KEY_TILE).min(KEY_TILE);
            let seen = |r: usize| within(&visible[r], tile);
            source.load::<V>(tile, keys, buffers);
            let ahead = if tile + 1 < tiles.end { tile + 1 } else { tile };
            let (panels, next) = (source.panels(tile, buffers), source.panels(ahead, buffers));
            let panels = Operand { now: &panels[..keys.div_ceil(PANEL)], next: &next };
            scores::<V, _, _>(&queries, (rows, spec.key_dim), panels, weights, |group| {
                seen(group.end - 1).end.div_ceil(PANEL)
            });
            let [max, sum, out] = tree.in_hand();
            for (r, row) in weights.chunks_exact_mut(KEY_TILE).enumerate().take(rows) {
                (max[r], sum[r]) = weigh::<V>(row, seen(r), &spec);
            }
            max[rows..].fill(f32::NEG_INFINITY);
            sum[rows..].fill(0.0);
            let (segments, stride) = source.values(tile, buffers);
            let (next, _) = source.values(ahead, buffers);
            let segments = Segments { segments: Operand { now: &segments, next: &next }, stride };
            let columns = spec.value_dim.next_multiple_of(LANES);
            let weights = Left { numbers: weights, start: |r| r * KEY_TILE, step: 1 };
            mix::<V, _, _>(&weights, segments, Mix { rows, columns, out, keep: false }, |group| {
                seen(group.start).start..seen(group.end - 1).end
            });
            tree.carry::<V>(tile);
        }
        tree.fold::<V>();
        tree
    }
}

/// Packs all tiles of a dense sequence.
struct Preload<'a, 'm> {
    source: &'a DenseTiles<'a>,
    keys: usize,
    tiles: Range<usize>,
    buffers: &'a mut TileBuffers<'m>,
}

impl Kernel for Preload<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        for tile in self.tiles {
            let keys = (self.keys - tile * KEY_TILE).min(KEY_TILE);
            self.source.pack::<V>(tile, keys, self.buffers);
        }
    }
}

/// Combines the nodes of a block's chunks.
struct Combine<'a, 'm> {
    /// Nodes of consecutive chunks, each at the start of `width` floats.
    nodes: &'a [f32],
    width: usize,
    first_chunk: usize,
    tree: Tree<'m>,
}

impl<'m> Kernel for Combine<'_, 'm> {
    type Output = Tree<'m>;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Tree<'m> {
        let Self { nodes, width, first_chunk, mut tree } = self;
        let len = tree.shape.len();
        for (i, node) in nodes.chunks_exact(width).enumerate() {
            let hand = tree.hand;
            tree.nodes[hand * len..][..len].copy_from_slice(&node[..len]);
            tree.carry::<V>(first_chunk + i);
        }
        tree.fold::<V>();
        tree
    }
}

/// Where results go.
struct Outputs<'a> {
    out_thv: SharedSlice<'a, f32>,
    lse_th: Option<SharedSlice<'a, f32>>,
}

/// Divides a block's values by their weights' sum and writes them out.
struct Finish<'a, 'm> {
    block: &'a Block<'a>,
    tree: Tree<'m>,
    outputs: &'a Outputs<'a>,
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(mut self) {
        let dim = self.block.spec.value_dim;
        let columns = self.tree.shape.columns;
        let [max, sum, out] = self.tree.in_hand();
        for (r, from) in out.chunks_exact(columns).enumerate() {
            let row = self.block.token_head(r);
            // SAFETY: each (token, head) belongs to one block of one task: rows of sequences do
            // not overlap (`attention_blocks` checks).
            let to = unsafe { self.outputs.out_thv.slice_mut(row * dim..(row + 1) * dim) };
            let seen = sum[r] != 0.0;
            let inverse = V::splat(1.0 / sum[r]);
            for i in vectors(dim) {
                let value = at::<V>(from, i) * inverse + V::zero();
                put(if seen { value } else { V::zero() }, to, i);
            }
            if let Some(lse_th) = &self.outputs.lse_th {
                let lse = if seen { max[r] + math::ln(sum[r]) } else { f32::NEG_INFINITY };
                // SAFETY: as above.
                let to = unsafe { lse_th.slice_mut(row..row + 1) };
                to[0] = lse;
            }
        }
    }
}

/// How the rows of a run are cut into tasks.
#[derive(Clone, Copy)]
struct Grid<'a> {
    spec: AttentionSpec,
    batch: RaggedBatch<'a>,
    /// Rows of a block.
    block_rows: usize,
    /// Blocks of a task.
    task_blocks: usize,
}

impl<'a> Grid<'a> {
    fn new(spec: AttentionSpec, batch: RaggedBatch<'a>) -> Self {
        let keys = batch.sequences.iter().map(SeqSlot::keys).max().unwrap_or(0);
        let nodes = Tree::nodes(keys.div_ceil(KEY_TILE));
        let columns = spec.value_dim.next_multiple_of(LANES);
        let fitting = (NODE_FLOATS / nodes).saturating_sub(2 * BLOCK_ROWS) / columns;
        assert!(fitting > 0, "values of {columns} floats do not fit in scratch memory");
        Self { spec, batch, block_rows: fitting.min(BLOCK_ROWS), task_blocks: 1 }
    }

    fn blocks_of_head(&self, slot: &SeqSlot<'_>) -> usize {
        (slot.len * self.spec.group()).div_ceil(self.block_rows)
    }

    fn tasks_of_head(&self, slot: &SeqSlot<'_>) -> usize {
        self.blocks_of_head(slot).div_ceil(self.task_blocks)
    }

    fn tasks(&self) -> usize {
        let slots = self.batch.sequences.iter();
        slots.map(|slot| self.tasks_of_head(slot) * self.spec.kv_heads).sum()
    }

    /// The blocks of a task: all of one key/value head of one sequence.
    fn blocks(&self, mut task: usize) -> impl Iterator<Item = Block<'a>> + use<'a> {
        let grid = *self;
        let mut slots = self.batch.sequences.iter();
        let slot = loop {
            let slot = slots.next().expect("a task number below the number of tasks");
            let tasks = self.tasks_of_head(slot) * self.spec.kv_heads;
            if task < tasks {
                break *slot;
            }
            task -= tasks;
        };
        let (head, part) = (task / self.tasks_of_head(&slot), task % self.tasks_of_head(&slot));
        let rows = slot.len * self.spec.group();
        let blocks =
            part * self.task_blocks..self.blocks_of_head(&slot).min((part + 1) * self.task_blocks);
        blocks.map(move |block| {
            let first = block * grid.block_rows;
            let rows = first..rows.min(first + grid.block_rows);
            Block { spec: grid.spec, slot, head, rows }
        })
    }

    /// Tiles of the chunks that blocks must be cut into to occupy all threads; `None` if there are
    /// enough blocks, too few tiles, or no room for the nodes.
    fn chunk_tiles(&self, threads: usize) -> Option<usize> {
        let tasks = self.tasks();
        if threads == 1 || tasks >= 2 * threads || tasks == 0 {
            return None;
        }
        let blocks = (0..tasks).flat_map(|task| self.blocks(task));
        let tiles = blocks.map(|block| block.tiles().len()).max().unwrap_or(0);
        let wanted = tiles.div_ceil((4 * threads).div_ceil(tasks));
        let chunk = wanted.max(CHUNK_TILES_MIN).next_power_of_two();
        let node = NodeShape::new(self.block_rows, self.spec.value_dim).len();
        let nodes = tasks * (tiles.div_ceil(chunk) + 1);
        (tiles > chunk && nodes * node <= SCRATCH_FLOATS).then_some(chunk)
    }
}

/// Attends with keys from wherever they are.
pub(super) fn attention_blocks(cpu: &Cpu, args: Attention<'_>) {
    let Attention { q_thk, keys, out_thv, lse_th, batch, spec } = args;
    check(&batch, &spec, &keys);
    let grid = Grid::new(spec, batch);
    let outputs =
        Outputs { out_thv: SharedSlice::new(out_thv), lse_th: lse_th.map(SharedSlice::new) };
    let run = Run { cpu, grid, q_thk, outputs };
    match keys {
        Keys::Dense { k_tgk, v_tgv } => run.dense(k_tgk, v_tgv),
        Keys::Paged { pages, cache } => match cache.dtype {
            CacheType::F32 => run.paged(Bytes::new(pages).f32s(), cache),
            CacheType::Bf16 => run.paged(Bytes::new(pages).u16s(), cache),
        },
    }
}

/// Sequences must not share rows, which the parallel writes rely on.
pub(super) fn check(batch: &RaggedBatch<'_>, spec: &AttentionSpec, keys: &Keys<'_>) {
    spec.check();
    let mut end = 0;
    for slot in batch.sequences {
        assert!(slot.start >= end, "sequences overlap or do not ascend");
        end = slot.start + slot.len;
        match keys {
            Keys::Dense { .. } => assert_eq!(slot.cached, 0, "dense keys have no cache"),
            Keys::Paged { .. } => check_blocks(slot),
        }
    }
}

/// One call of attention.
struct Run<'a> {
    cpu: &'a Cpu,
    grid: Grid<'a>,
    q_thk: &'a [f32],
    outputs: Outputs<'a>,
}

/// The rows of one head of a dense tensor from a sequence's first token on.
pub(super) fn head_rows<'a>(
    numbers: &'a [f32],
    slot: &SeqSlot<'_>,
    (head, heads): (usize, usize),
    (dim, width): (usize, usize),
) -> HeadRows<'a> {
    let start = (slot.start * heads + head) * dim;
    HeadRows { numbers: &numbers[start.min(numbers.len())..], stride: heads * dim, width }
}

impl<'a> Run<'a> {
    fn dense(&self, k_tgk: &[f32], v_tgv: &[f32]) {
        let mut grid = self.grid;
        let AttentionSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = grid.spec;
        let heads: usize = grid.batch.sequences.len() * kv_heads;
        let parts = (4 * self.cpu.threads()).div_ceil(heads.max(1));
        let blocks = grid.batch.sequences.iter().map(|slot| grid.blocks_of_head(slot)).max();
        grid.task_blocks = blocks.unwrap_or(0).div_ceil(parts).max(1);
        let (simd, q_thk, outputs) = (self.cpu.simd(), self.q_thk, &self.outputs);
        let lens = DenseTiles::tile_lens(key_dim, value_dim);
        self.cpu.parallel(grid.tasks(), |task, scratch| {
            let first = grid.blocks(task).next().expect("a task has a block");
            let last = grid.blocks(task).last().expect("a task has a block");
            let tiles = first.tiles().start..last.tiles().end;
            let values = if values_in_keys { (k_tgk, key_dim) } else { (v_tgv, value_dim) };
            let side = (first.head, kv_heads);
            let preload = tiles.len() * (lens[0] + lens[1]) <= PRELOAD_FLOATS;
            let source = DenseTiles {
                keys: head_rows(k_tgk, &first.slot, side, (key_dim, key_dim)),
                values: head_rows(values.0, &first.slot, side, (values.1, value_dim)),
                preloaded_from: preload.then_some(tiles.start),
            };
            let room = if preload { tiles.len() } else { 1 };
            let mut memory = Memory::new(scratch, [room * lens[0], room * lens[1]]);
            if preload {
                let (keys, buffers) = (first.slot.keys(), &mut memory.buffers);
                dispatch(simd, Preload { source: &source, keys, tiles, buffers });
            }
            for block in grid.blocks(task) {
                let tiles = block.tiles();
                let tree = memory.run(simd, (&block, q_thk), &source, tiles);
                dispatch(simd, Finish { block: &block, tree, outputs });
            }
        });
    }

    fn paged<E: Element>(&self, numbers: &[E], cache: super::CacheSpec) {
        let spec = self.grid.spec;
        assert_eq!(
            (cache.kv_heads, cache.key_dim, cache.value_dim, cache.values_in_keys),
            (spec.kv_heads, spec.key_dim, spec.value_dim, spec.values_in_keys),
            "the cache has another shape than the layer"
        );
        let tiles = |block: &Block<'a>| {
            let (blocks, head) = (block.slot.blocks, block.head);
            PagedTiles { numbers, cache, blocks, head }
        };
        if RepackedTiles::<E>::needed(&cache) {
            self.cached(|block| RepackedTiles { paged: tiles(block) });
        } else {
            self.cached(tiles);
        }
    }

    fn cached<T: Tiles>(&self, source: impl Fn(&Block<'a>) -> T + Sync) {
        if let Some(chunk) = self.grid.chunk_tiles(self.cpu.threads()) {
            return self.cached_in_chunks(source, chunk);
        }
        let (simd, grid, q_thk) = (self.cpu.simd(), self.grid, self.q_thk);
        let outputs = &self.outputs;
        self.cpu.parallel(grid.tasks(), |task, scratch| {
            for block in grid.blocks(task) {
                let mut memory = Memory::one_tile(scratch, &block.spec);
                let tree = memory.run(simd, (&block, q_thk), &source(&block), block.tiles());
                dispatch(simd, Finish { block: &block, tree, outputs });
            }
        });
    }

    /// As [`cached`](Self::cached), with the tiles of a block cut into chunks of `chunk` tiles.
    fn cached_in_chunks<T: Tiles>(&self, source: impl Fn(&Block<'a>) -> T + Sync, chunk: usize) {
        let (simd, grid, q_thk) = (self.cpu.simd(), self.grid, self.q_thk);
        let block_of = |task: usize| grid.blocks(task).next().expect("a task has a block");
        let chunks_of = |block: &Block<'_>| {
            let tiles = block.tiles();
            tiles.start / chunk..tiles.end.div_ceil(chunk)
        };
        let blocks = grid.tasks();
        let most = (0..blocks).map(|task| chunks_of(&block_of(task)).len()).max().unwrap_or(0);
        let width = NodeShape::new(grid.block_rows, grid.spec.value_dim).len();
        let mut partials = self.cpu.partials();
        let partials = partials.f32s(blocks * most * width);
        let nodes = RowSlice::new(&mut *partials, width);
        parallel_rows(self.cpu, blocks * most, 1, nodes, |task, node, scratch| {
            let block = block_of(task.start / most);
            let (chunks, tiles) = (chunks_of(&block), block.tiles());
            let number = chunks.start + task.start % most;
            if number >= chunks.end {
                return;
            }
            let part = tiles.start.max(number * chunk)..tiles.end.min((number + 1) * chunk);
            let mut memory = Memory::one_tile(scratch, &block.spec);
            let tree = memory.run(simd, (&block, q_thk), &source(&block), part);
            let len = tree.shape.len();
            node[..len].copy_from_slice(&tree.nodes[tree.hand * len..][..len]);
        });
        let (partials, outputs) = (&*partials, &self.outputs);
        self.cpu.parallel(blocks, |task, scratch| {
            let block = block_of(task);
            let chunks = chunks_of(&block);
            let shape = NodeShape::new(block.rows.len(), block.spec.value_dim);
            let memory = Memory::one_tile(scratch, &block.spec);
            let room = Tree::nodes(chunks.end) * shape.len();
            let tree = Tree::new(shape, &mut memory.nodes[..room]);
            let nodes = &partials[task * most * width..][..chunks.len() * width];
            let tree = dispatch(simd, Combine { nodes, width, first_chunk: chunks.start, tree });
            dispatch(simd, Finish { block: &block, tree, outputs });
        });
    }
}

/// The scratch memory of a task, cut up.
struct Memory<'m> {
    buffers: TileBuffers<'m>,
    scores: &'m mut [f32],
    nodes: &'m mut [f32],
}

impl<'m> Memory<'m> {
    fn new(scratch: &'m mut Scratch, [panels, rows]: [usize; 2]) -> Self {
        let lens = [panels, rows, BLOCK_ROWS * KEY_TILE, NODE_FLOATS];
        let [panels, rows, scores, nodes] = scratch.f32_parts(lens);
        Self { buffers: TileBuffers { panels, rows }, scores, nodes }
    }

    fn one_tile(scratch: &'m mut Scratch, spec: &AttentionSpec) -> Self {
        Self::new(scratch, DenseTiles::tile_lens(spec.key_dim, spec.value_dim))
    }

    /// Runs one block against some tiles; the result is in the hand of the tree.
    fn run<'s, T: Tiles>(
        &'s mut self,
        simd: Simd,
        (block, q_thk): (&Block<'_>, &[f32]),
        source: &T,
        tiles: Range<usize>,
    ) -> Tree<'s> {
        let shape = NodeShape::new(block.rows.len(), block.spec.value_dim);
        let room = Tree::nodes(tiles.end) * shape.len();
        let tree = Tree::new(shape, &mut self.nodes[..room]);
        let buffers = &mut self.buffers;
        let scores = &mut *self.scores;
        run_block(
            simd,
            BlockJob { block, q_thk, source, tiles, buffers: buffers.reborrow(), scores, tree },
        )
    }
}

/// [`dispatch`] of a block's job.
fn run_block<'m, T: Tiles>(simd: Simd, job: BlockJob<'_, 'm, T>) -> Tree<'m> {
    dispatch(simd, job)
}
