//! Tiles of keys and values as the products want them: keys in panels, values in rows.
//!
//! A panel is `[k][16]`, lanes are keys, exactly as a page stores them. So cached tiles are read
//! where they lie; dense rows are transposed into scratch once per tile.

use super::product::{Element, PANEL};
use super::{CacheSpec, PAGE_TOKENS};
use crate::KEY_TILE;
use crate::lanes::{at, put, vectors};
use crate::simd::{F32x16, LANES};

/// Panels of a tile.
pub(super) const PANELS: usize = KEY_TILE / PANEL;

/// Sixteen factors: of a panel's keys, or of a segment's values.
pub(super) type Factors = [f32; PANEL];

/// What chains and weights of a tile are multiplied by.
#[derive(Clone, Copy)]
pub(super) struct TileFactors<'a> {
    /// Of each panel's keys.
    pub(super) keys: [&'a Factors; PANELS],
    /// Of each segment's values.
    pub(super) values: [&'a Factors; PANELS],
}

/// Scratch for one or more tiles: panels of keys, then rows of values, padded to whole vectors.
pub(super) struct TileBuffers<'a> {
    pub(super) panels: &'a mut [f32],
    pub(super) rows: &'a mut [f32],
}

impl TileBuffers<'_> {
    /// The same memory for a shorter while.
    pub(super) fn reborrow(&mut self) -> TileBuffers<'_> {
        TileBuffers { panels: self.panels, rows: self.rows }
    }
}

/// Where the tiles of one key/value head of one sequence come from.
pub(super) trait Tiles: Sync {
    /// How keys are stored.
    type Key: Element;
    /// How values are stored.
    type Value: Element;

    /// Brings the first `keys` keys and values of tile `tile` into the buffers, where they have to be.
    fn load<V: F32x16>(&self, tile: usize, keys: usize, buffers: &mut TileBuffers<'_>);

    /// The panels of a loaded tile.
    fn panels<'b>(&'b self, tile: usize, buffers: &'b TileBuffers<'_>)
    -> [&'b [Self::Key]; PANELS];

    /// The factors of a tile's keys and values, where they have some.
    #[inline(always)]
    fn factors(&self, _tile: usize) -> Option<TileFactors<'_>> {
        None
    }

    /// The segments of values of a loaded tile and the distance of their rows.
    fn values<'b>(
        &'b self,
        tile: usize,
        buffers: &'b TileBuffers<'_>,
    ) -> ([&'b [Self::Value]; PANELS], usize);
}

/// Rows of a dense tensor: one head's row of each token.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    /// From the head's row of the sequence's first token on.
    pub(super) numbers: &'a [f32],
    /// Distance of two tokens' rows.
    pub(super) stride: usize,
    /// Width of a row.
    pub(super) width: usize,
}

impl HeadRows<'_> {
    /// The row of a token.
    #[inline(always)]
    pub(super) fn row(&self, token: usize) -> &[f32] {
        &self.numbers[token * self.stride..][..self.width]
    }

    /// Asks memory for a row that is needed later. Past the last row nothing happens.
    #[inline(always)]
    pub(super) fn ask<V: F32x16>(&self, token: usize) {
        let start = self.numbers.as_ptr().wrapping_add(token * self.stride);
        for column in vectors(self.width) {
            V::prefetch_far(start.wrapping_add(column).cast());
        }
    }

    /// Transposes `keys` rows from `first` on into panels `[width][16]`; missing rows become 0.
    #[inline(always)]
    pub(super) fn pack_panels<V: F32x16>(&self, first: usize, keys: usize, panels: &mut [f32]) {
        for (j, panel) in panels.chunks_exact_mut(self.width * LANES).enumerate() {
            let filled = keys.saturating_sub(j * PANEL).min(PANEL);
            if filled == 0 {
                break;
            }
            let (blocks, tail) = panel.as_chunks_mut::<{ LANES * LANES }>();
            for (c, block) in blocks.iter_mut().enumerate() {
                let mut rows = [V::zero(); LANES];
                if filled == PANEL {
                    for (i, row) in rows.iter_mut().enumerate() {
                        *row = at::<V>(self.row(first + j * PANEL + i), c * LANES);
                    }
                } else {
                    for (i, row) in rows.iter_mut().enumerate().take(filled) {
                        *row = at::<V>(self.row(first + j * PANEL + i), c * LANES);
                    }
                }
                for (lanes, to) in V::transpose(rows).into_iter().zip(block.as_chunks_mut().0) {
                    lanes.store(to);
                }
            }
            let columns = self.width - tail.len() / LANES..self.width;
            for (column, to) in columns.zip(tail.as_chunks_mut::<LANES>().0) {
                to.fill(0.0);
                for (i, to) in to.iter_mut().enumerate().take(filled) {
                    *to = self.row(first + j * PANEL + i)[column];
                }
            }
        }
    }

    /// Copies `keys` rows from `first` on, each padded with zeros to whole vectors; so are missing
    /// rows up to a whole segment.
    #[inline(always)]
    pub(super) fn pack_rows<V: F32x16>(&self, first: usize, keys: usize, rows: &mut [f32]) {
        let padded = self.width.next_multiple_of(LANES);
        let whole = keys.next_multiple_of(PANEL);
        for (i, to) in rows.chunks_exact_mut(padded).take(whole).enumerate() {
            if i >= keys {
                to.fill(0.0);
                continue;
            }
            let from = self.row(first + i);
            for column in (0..self.width).step_by(LANES) {
                put(at::<V>(from, column), to, column);
            }
        }
    }
}

/// Keys and values of the run's own tokens.
pub(super) struct DenseTiles<'a> {
    pub(super) keys: HeadRows<'a>,
    pub(super) values: HeadRows<'a>,
    /// Whether the buffers hold all tiles from this one on, loaded beforehand; else one at a time.
    pub(super) preloaded_from: Option<usize>,
}

impl DenseTiles<'_> {
    /// Floats of a tile's panels and rows.
    pub(super) fn tile_lens(key_dim: usize, value_dim: usize) -> [usize; 2] {
        [key_dim * KEY_TILE, value_dim.next_multiple_of(LANES) * KEY_TILE]
    }

    fn lens(&self) -> [usize; 2] {
        Self::tile_lens(self.keys.width, self.values.width)
    }

    fn place(&self, tile: usize) -> usize {
        self.preloaded_from.map_or(0, |first| tile - first)
    }

    /// Packs a tile into its place.
    #[inline(always)]
    pub(super) fn pack<V: F32x16>(&self, tile: usize, keys: usize, buffers: &mut TileBuffers<'_>) {
        let ([panels, rows], place) = (self.lens(), self.place(tile));
        let first = tile * KEY_TILE;
        self.keys.pack_panels::<V>(first, keys, &mut buffers.panels[place * panels..][..panels]);
        self.values.pack_rows::<V>(first, keys, &mut buffers.rows[place * rows..][..rows]);
    }
}

/// Cuts a slice into the panels or segments of a tile.
pub(super) fn quarters<T>(tile: &[T]) -> [&[T]; PANELS] {
    let quarter = tile.len() / PANELS;
    std::array::from_fn(|j| &tile[j * quarter..][..quarter])
}

impl Tiles for DenseTiles<'_> {
    type Key = f32;
    type Value = f32;

    #[inline(always)]
    fn load<V: F32x16>(&self, tile: usize, keys: usize, buffers: &mut TileBuffers<'_>) {
        if self.preloaded_from.is_none() {
            self.pack::<V>(tile, keys, buffers);
        }
    }

    #[inline(always)]
    fn panels<'b>(&'b self, tile: usize, buffers: &'b TileBuffers<'_>) -> [&'b [f32]; PANELS] {
        let len = self.lens()[0];
        quarters(&buffers.panels[self.place(tile) * len..][..len])
    }

    #[inline(always)]
    fn values<'b>(
        &'b self,
        tile: usize,
        buffers: &'b TileBuffers<'_>,
    ) -> ([&'b [f32]; PANELS], usize) {
        let len = self.lens()[1];
        let rows = quarters(&buffers.rows[self.place(tile) * len..][..len]);
        (rows, self.values.width.next_multiple_of(LANES))
    }
}

/// Keys and values in pages.
#[derive(Clone, Copy)]
pub(super) struct PagedTiles<'a, E> {
    /// All pages.
    pub(super) numbers: &'a [E],
    /// The same memory, where numbers have factors.
    pub(super) factors: &'a [f32],
    pub(super) cache: CacheSpec,
    /// The sequence's pages.
    pub(super) blocks: &'a [u32],
    /// The key/value head.
    pub(super) head: usize,
}

impl<E: Element> PagedTiles<'_, E> {
    /// The pages of a tile; past the sequence's last page, empty.
    #[inline(always)]
    fn pages(&self, tile: usize) -> [&[E]; PANELS] {
        const { assert!(PAGE_TOKENS == PANEL) };
        let len = self.cache.page_bytes() / size_of::<E>();
        std::array::from_fn(|j| match self.blocks.get(tile * PANELS + j) {
            Some(&block) => &self.numbers[block as usize * len..][..len],
            None => &[],
        })
    }

    #[inline(always)]
    fn key_panels(&self, tile: usize) -> [&[E]; PANELS] {
        let (start, len) = (self.cache.key_offset(self.head, 0, 0), self.cache.key_dim * PANEL);
        self.pages(tile).map(|page| page.get(start..start + len).unwrap_or(&[]))
    }

    /// The sixteen factors that are `start` floats from the beginning of each page of a tile.
    #[inline(always)]
    fn factors_at(&self, tile: usize, start: usize) -> [&Factors; PANELS] {
        /// What a page that is not there stands for: nobody sees its keys.
        const UNSEEN: &Factors = &[0.0; PANEL];
        let len = self.cache.page_bytes() / size_of::<f32>();
        std::array::from_fn(|j| {
            let block = self.blocks.get(tile * PANELS + j);
            let page = block.and_then(|&block| self.factors.get(block as usize * len + start..));
            page.and_then(|page| page.first_chunk()).unwrap_or(UNSEEN)
        })
    }
}

impl<E: Element> Tiles for PagedTiles<'_, E> {
    type Key = E;
    type Value = E;

    #[inline(always)]
    fn load<V: F32x16>(&self, _tile: usize, _keys: usize, _buffers: &mut TileBuffers<'_>) {}

    #[inline(always)]
    fn panels<'b>(&'b self, tile: usize, _buffers: &'b TileBuffers<'_>) -> [&'b [E]; PANELS] {
        self.key_panels(tile)
    }

    #[inline(always)]
    fn values<'b>(
        &'b self,
        tile: usize,
        _buffers: &'b TileBuffers<'_>,
    ) -> ([&'b [E]; PANELS], usize) {
        let (start, width) = (self.cache.value_offset(self.head, 0, 0), self.cache.value_dim);
        let rows = |page: &'b [E]| page.get(start..start + width * PANEL).unwrap_or(&[]);
        (self.pages(tile).map(rows), width)
    }

    #[inline(always)]
    fn factors(&self, tile: usize) -> Option<TileFactors<'_>> {
        E::SCALED.then(|| TileFactors {
            keys: self.factors_at(tile, self.cache.key_factors(self.head)),
            values: self.factors_at(tile, self.cache.value_factors(self.head)),
        })
    }
}

/// Pages whose values cannot be read in place: they are in the keys, or not whole vectors wide.
#[derive(Clone, Copy)]
pub(super) struct RepackedTiles<'a, E> {
    pub(super) paged: PagedTiles<'a, E>,
}

impl<E: Element> RepackedTiles<'_, E> {
    /// Whether a cache needs it.
    pub(super) fn needed(cache: &CacheSpec) -> bool {
        cache.values_in_keys || !cache.value_dim.is_multiple_of(LANES)
    }
}

impl<E: Element> Tiles for RepackedTiles<'_, E> {
    type Key = E;
    type Value = f32;

    #[inline(always)]
    fn load<V: F32x16>(&self, tile: usize, keys: usize, buffers: &mut TileBuffers<'_>) {
        let cache = &self.paged.cache;
        let padded = cache.value_dim.next_multiple_of(LANES);
        let segments = buffers.rows.chunks_exact_mut(padded * PANEL);
        let used = keys.div_ceil(PANEL);
        for (page, segment) in self.paged.pages(tile).into_iter().zip(segments).take(used) {
            if cache.values_in_keys {
                let keys = &page[cache.key_offset(self.paged.head, 0, 0)..];
                transpose_values::<V, E>(keys, cache, segment);
                continue;
            }
            let values = &page[cache.value_offset(self.paged.head, 0, 0)..];
            let from = values.chunks_exact(cache.value_dim);
            for (to, from) in segment.chunks_exact_mut(padded).zip(from) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.widen();
                }
            }
        }
    }

    #[inline(always)]
    fn factors(&self, tile: usize) -> Option<TileFactors<'_>> {
        self.paged.factors(tile)
    }

    #[inline(always)]
    fn panels<'b>(&'b self, tile: usize, _buffers: &'b TileBuffers<'_>) -> [&'b [E]; PANELS] {
        self.paged.key_panels(tile)
    }

    #[inline(always)]
    fn values<'b>(
        &'b self,
        _tile: usize,
        buffers: &'b TileBuffers<'_>,
    ) -> ([&'b [f32]; PANELS], usize) {
        let padded = self.paged.cache.value_dim.next_multiple_of(LANES);
        (quarters(&buffers.rows[..padded * KEY_TILE]), padded)
    }
}

/// Turns the first columns of a panel of keys into rows of values.
#[inline(always)]
fn transpose_values<V: F32x16, E: Element>(panel: &[E], cache: &CacheSpec, segment: &mut [f32]) {
    let padded = cache.value_dim.next_multiple_of(LANES);
    for column in (0..cache.value_dim).step_by(LANES) {
        let mut columns = [V::zero(); LANES];
        let whole = (cache.value_dim - column).min(LANES);
        let panel = panel[column * LANES..].as_chunks::<LANES>().0;
        for (lanes, numbers) in columns.iter_mut().zip(panel).take(whole) {
            *lanes = load_chunk::<V, E>(numbers);
        }
        for (key, lanes) in V::transpose(columns).into_iter().enumerate() {
            put(lanes, segment, key * padded + column);
        }
    }
}

#[inline(always)]
fn load_chunk<V: F32x16, E: Element>(numbers: &[E; LANES]) -> V {
    // SAFETY: the array holds sixteen numbers.
    unsafe { E::load(numbers.as_ptr()) }
}
