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
use super::grid::{BLOCK_ROWS, Block, Grid, NODE_FLOATS, SCRATCH_FLOATS, within};
use super::product::{Element, Left, Mix, Operand, PANEL, Segments, mix, scores};
use super::scoring::{KeepAll, Scoring};
use super::tiles::{DenseTiles, HeadRows, PagedTiles, RepackedTiles, TileBuffers, Tiles};
use super::tree::{Combine, NodeShape, Tree};
use super::{Attention, AttentionSpec, CacheType, Keys, RaggedBatch, SeqSlot};
use crate::cpu::{Cpu, SharedSlice};
use crate::disjoint::{RowSlice, parallel_rows};
use crate::dropout::DropLanes;
use crate::isa::Simd;
use crate::lanes::{at, put, vectors};
use crate::memory::Bytes;
use crate::pool::Scratch;
use crate::simd::{F32x16, Kernel, LANES, dispatch};
use crate::{KEY_TILE, math};

/// Floats that packed tiles of a dense sequence may take: half of the scratch memory.
const PRELOAD_FLOATS: usize = SCRATCH_FLOATS / 2;
/// Rows that are asked of memory while a block is computed, so that they are there when their turn
/// comes: rows of heads lie far apart, where no prefetcher of the processor finds them. Hints only.
#[derive(Clone, Copy)]
struct Asks<'a> {
    /// Rows of the head that this thread likely computes next.
    next: Option<[HeadRows<'a>; 3]>,
    /// The first of them, by token.
    first: usize,
}

impl Asks<'_> {
    const NONE: Self = Self { next: None, first: 0 };

    #[inline(always)]
    fn ask<V: F32x16>(&self, row: usize) {
        if let Some(next) = &self.next {
            next.iter().for_each(|rows| rows.ask::<V>(self.first + row));
        }
    }
}

/// One block against some tiles. The result is the node in the hand of the tree.
struct BlockJob<'a, 'm, T> {
    block: &'a Block<'a>,
    q_thk: &'a [f32],
    source: &'a T,
    tiles: Range<usize>,
    buffers: TileBuffers<'a>,
    scores: &'a mut [f32],
    asks: Asks<'a>,
    tree: Tree<'m>,
}

impl<'m, T: Tiles> Kernel for BlockJob<'_, 'm, T> {
    type Output = Tree<'m>;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Tree<'m> {
        let Self { block, q_thk, source, tiles, mut buffers, scores: weights, asks, mut tree } =
            self;
        let buffers = &mut buffers;
        let scoring = Scoring::<V>::new(&block.spec);
        let (spec, rows) = (block.spec, block.rows.len());
        let mut visible: [Range<usize>; BLOCK_ROWS] = std::array::from_fn(|_| 0..0);
        for (r, visible) in visible.iter_mut().enumerate().take(rows) {
            *visible = block.visible(r);
        }
        let dropout = block.dropout.as_ref().map(DropLanes::<V>::new);
        let row_keys = row_keys(block);
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
            let factors = source.factors(tile);
            let [max, sum, out] = tree.in_hand();
            for (r, row) in weights.chunks_exact_mut(KEY_TILE).enumerate().take(rows) {
                (max[r], sum[r]) = match dropout {
                    None => scoring.weigh(row, (&seen(r), factors), KeepAll),
                    Some(lanes) => {
                        let keep = lanes.row(row_keys[r], tile * KEY_TILE);
                        scoring.weigh(row, (&seen(r), None), keep)
                    }
                };
                if tile == tiles.start {
                    asks.ask::<V>(r);
                }
            }
            max[rows..].fill(f32::NEG_INFINITY);
            sum[rows..].fill(0.0);
            let (segments, stride) = source.values(tile, buffers);
            let (next, _) = source.values(ahead, buffers);
            let segments = Operand { now: &segments, next: &next };
            let segments = Segments { segments, stride };
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

/// What the dropout masks of a block's rows are made of.
#[inline(always)]
fn row_keys(block: &Block<'_>) -> [u64; BLOCK_ROWS] {
    let mut keys = [0; BLOCK_ROWS];
    if let Some(mask) = &block.dropout {
        for (r, key) in keys.iter_mut().enumerate().take(block.rows.len()) {
            *key = mask.query_key(block.token_head(r), block.spec.heads);
        }
    }
    keys
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

/// Attends with keys from wherever they are.
pub(super) fn attention_blocks(cpu: &Cpu, args: Attention<'_>) {
    let Attention { q_thk, keys, out_thv, lse_th, batch, spec, dropout } = args;
    check(&batch, &spec, &keys);
    let dropout = dropout.filter(|mask| mask.p > 0.0);
    let is_dense = matches!(keys, Keys::Dense { .. });
    assert!(is_dense || dropout.is_none(), "cached keys are read as they are");
    let grid = Grid::new(spec, dropout, batch);
    let outputs =
        Outputs { out_thv: SharedSlice::new(out_thv), lse_th: lse_th.map(SharedSlice::new) };
    let run = Run { cpu, grid, q_thk, outputs };
    match keys {
        Keys::Dense { k_tgk, v_tgv } => run.dense(k_tgk, v_tgv),
        Keys::Paged { pages, cache } => match cache.dtype {
            CacheType::F32 => run.paged(Bytes::new(pages).f32s(), &[], cache),
            CacheType::Bf16 => run.paged(Bytes::new(pages).u16s(), &[], cache),
            CacheType::Q8 => {
                run.paged(Bytes::new(pages).i8s(), Bytes::new(pages).f32s(), cache);
            }
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
        let (threads, group) = (self.cpu.threads(), grid.spec.group());
        // Queries (of the group's first head), keys and values of a task's head.
        let rows_of = |task: usize| {
            let block = (task < grid.tasks()).then(|| grid.blocks(task).next()).flatten()?;
            let values = if values_in_keys { (k_tgk, key_dim) } else { (v_tgv, value_dim) };
            let (slot, side) = (&block.slot, (block.head, kv_heads));
            let heads = (block.head * group, kv_heads * group);
            Some([
                head_rows(q_thk, slot, heads, (key_dim, key_dim)),
                head_rows(k_tgk, slot, side, (key_dim, key_dim)),
                head_rows(values.0, slot, side, (values.1, value_dim)),
            ])
        };
        let lens = DenseTiles::tile_lens(key_dim, value_dim);
        self.cpu.parallel(grid.tasks(), |task, scratch| {
            let first = grid.blocks(task).next().expect("a task has a block");
            let last = grid.blocks(task).last().expect("a task has a block");
            let tiles = first.tiles().start..last.tiles().end;
            let [_, keys, values] = rows_of(task).expect("a task has rows");
            let preload = tiles.len() * (lens[0] + lens[1]) <= PRELOAD_FLOATS;
            let preloaded_from = preload.then_some(tiles.start);
            let source = DenseTiles { keys, values, preloaded_from };
            let room = if preload { tiles.len() } else { 1 };
            let mut memory = Memory::new(scratch, [room * lens[0], room * lens[1]]);
            if preload {
                let (keys, buffers) = (first.slot.keys(), &mut memory.buffers);
                dispatch(simd, Preload { source: &source, keys, tiles, buffers });
            }
            let next = rows_of(task + threads);
            for block in grid.blocks(task) {
                let tiles = block.tiles();
                let asks = Asks { next, first: block.rows.start / group };
                let tree = memory.run(simd, (&block, q_thk, asks), &source, tiles);
                dispatch(simd, Finish { block: &block, tree, outputs });
            }
        });
    }

    fn paged<E: Element>(&self, numbers: &[E], factors: &[f32], cache: super::CacheSpec) {
        let spec = self.grid.spec;
        assert_eq!(
            (cache.kv_heads, cache.key_dim, cache.value_dim, cache.values_in_keys),
            (spec.kv_heads, spec.key_dim, spec.value_dim, spec.values_in_keys),
            "the cache has another shape than the layer"
        );
        let tiles = |block: &Block<'a>| {
            let (blocks, head) = (block.slot.blocks, block.head);
            PagedTiles { numbers, factors, cache, blocks, head }
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
                let asks = Asks::NONE;
                let tree = memory.run(simd, (&block, q_thk, asks), &source(&block), block.tiles());
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
            let tree = memory.run(simd, (&block, q_thk, Asks::NONE), &source(&block), part);
            let len = tree.shape.len();
            node[..len].copy_from_slice(tree.node());
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
        (block, q_thk, asks): (&Block<'_>, &[f32], Asks<'_>),
        source: &T,
        tiles: Range<usize>,
    ) -> Tree<'s> {
        let shape = NodeShape::new(block.rows.len(), block.spec.value_dim);
        let room = Tree::nodes(tiles.end) * shape.len();
        let tree = Tree::new(shape, &mut self.nodes[..room]);
        let buffers = &mut self.buffers;
        let scores = &mut *self.scores;
        let buffers = buffers.reborrow();
        let job = BlockJob { block, q_thk, source, tiles, buffers, scores, asks, tree };
        run_block(simd, job)
    }
}

/// [`dispatch`] of a block's job.
fn run_block<'m, T: Tiles>(simd: Simd, job: BlockJob<'_, 'm, T>) -> Tree<'m> {
    dispatch(simd, job)
}
