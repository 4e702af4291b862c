//! The paged key/value cache: its layout and how keys and values get into it.
//!
//! A page holds [`PAGE_TOKENS`] consecutive positions of one sequence, all heads of one layer: keys
//! as `[g, k, 16]` (lanes are positions, so that sixteen scores are computed at once), then values
//! as `[g, 16, v]`, unless they are in the keys. Position p of a sequence lies in lane p mod 16
//! of page `blocks[p / 16]`. Slots past a sequence's end hold whatever was there and are never used.

use super::{RaggedBatch, SeqSlot};
use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows};
use crate::memory::BytesMut;
use crate::simd::bf16_from_f32;

/// Positions in a page.
pub const PAGE_TOKENS: usize = 16;

/// How cached numbers are stored.
#[derive(serde::Serialize, serde::Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// As they are.
    F32,
    /// Rounded to bf16, ties to even.
    Bf16,
}

impl CacheType {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Layout of the pages of one layer's cache.
#[derive(serde::Serialize, serde::Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSpec {
    /// How numbers are stored.
    pub dtype: CacheType,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Whether a value is the first columns of its key, and not stored again.
    pub values_in_keys: bool,
}

impl CacheSpec {
    /// Numbers of a page that are keys.
    pub fn page_keys(&self) -> usize {
        self.kv_heads * self.key_dim * PAGE_TOKENS
    }

    /// Numbers in a page.
    pub fn page_numbers(&self) -> usize {
        let values =
            if self.values_in_keys { 0 } else { self.kv_heads * self.value_dim * PAGE_TOKENS };
        self.page_keys() + values
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_numbers() * self.dtype.bytes()
    }

    /// Where column `column` of the key of `head` in lane `lane` is, in numbers from the page's start.
    pub(super) fn key_offset(&self, head: usize, column: usize, lane: usize) -> usize {
        (head * self.key_dim + column) * PAGE_TOKENS + lane
    }

    /// Where column `column` of the value of `head` in lane `lane` is.
    pub(super) fn value_offset(&self, head: usize, lane: usize, column: usize) -> usize {
        if self.values_in_keys {
            return self.key_offset(head, column, lane);
        }
        self.page_keys() + (head * PAGE_TOKENS + lane) * self.value_dim + column
    }

    /// One number of the cache.
    pub(super) fn number(&self, pages: &[u8], page: u32, offset: usize) -> f32 {
        let at = page as usize * self.page_bytes() + offset * self.dtype.bytes();
        match self.dtype {
            CacheType::F32 => {
                f32::from_ne_bytes([pages[at], pages[at + 1], pages[at + 2], pages[at + 3]])
            }
            CacheType::Bf16 => {
                f32::from_bits(u32::from(u16::from_ne_bytes([pages[at], pages[at + 1]])) << 16)
            }
        }
    }

    fn store(&self, pages: &mut [u8], page: u32, offset: usize, x: f32) {
        let at = page as usize * self.page_bytes() + offset * self.dtype.bytes();
        match self.dtype {
            CacheType::F32 => pages[at..at + 4].copy_from_slice(&x.to_ne_bytes()),
            CacheType::Bf16 => pages[at..at + 2].copy_from_slice(&bf16_from_f32(x).to_ne_bytes()),
        }
    }
}

/// Adds the keys and values of a run's tokens to the cache, rounded to its type.
#[derive(Debug)]
pub struct KvWrite<'a> {
    /// Keys, `[t, g, k]`.
    pub k_tgk: &'a [f32],
    /// Values, `[t, g, v]`; empty if they are in the keys.
    pub v_tgv: &'a [f32],
    /// All pages.
    pub pages: &'a mut [u8],
    /// Their layout.
    pub cache: CacheSpec,
    /// The sequences: token i of one goes to position `cached + i`.
    pub batch: RaggedBatch<'a>,
}

/// Adds keys and values to the cache.
pub fn kv_write(cpu: &Cpu, args: KvWrite<'_>) {
    let KvWrite { k_tgk, v_tgv, pages, cache, batch } = args;
    batch.sequences.iter().for_each(check_blocks);
    let all = pages.len() / cache.page_bytes();
    // Each task owns some pages and looks for the tokens that go there.
    let per_task = all.div_ceil(4 * cpu.threads()).max(1);
    let rows = RowSlice::new(pages, cache.page_bytes());
    parallel_rows(cpu, all, per_task, rows, |range, pages, _| {
        for (row, page, lane) in batch.sequences.iter().flat_map(SeqSlot::places) {
            if range.contains(&(page as usize)) {
                let page = &mut pages[(page as usize - range.start) * cache.page_bytes()..];
                let page = &mut page[..cache.page_bytes()];
                match cache.dtype {
                    CacheType::F32 => {
                        let numbers = BytesMut::new(page).f32s();
                        write_token(&cache, (k_tgk, v_tgv, row), (numbers, lane), |x| x);
                    }
                    CacheType::Bf16 => {
                        let numbers = BytesMut::new(page).u16s();
                        write_token(&cache, (k_tgk, v_tgv, row), (numbers, lane), bf16_from_f32);
                    }
                }
            }
        }
    });
}

/// Writes the keys and values of one token into one lane of a page.
fn write_token<E>(
    cache: &CacheSpec,
    (k_tgk, v_tgv, row): (&[f32], &[f32], usize),
    (page, lane): (&mut [E], usize),
    encode: impl Fn(f32) -> E,
) {
    let CacheSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = *cache;
    let (keys, values) = page.split_at_mut(cache.page_keys());
    let k_gk = &k_tgk[row * kv_heads * key_dim..][..kv_heads * key_dim];
    for (to, &x) in keys.chunks_exact_mut(PAGE_TOKENS).zip(k_gk) {
        to[lane] = encode(x);
    }
    if values_in_keys {
        return;
    }
    let v_gv = &v_tgv[row * kv_heads * value_dim..][..kv_heads * value_dim];
    let heads = values.chunks_exact_mut(PAGE_TOKENS * value_dim);
    for (head, v_v) in heads.zip(v_gv.chunks_exact(value_dim)) {
        for (to, &x) in head[lane * value_dim..].iter_mut().zip(v_v) {
            *to = encode(x);
        }
    }
}

impl SeqSlot<'_> {
    /// Row, page and lane of each of the run's tokens.
    fn places(&self) -> impl Iterator<Item = (usize, u32, usize)> {
        (0..self.len).map(|i| {
            let position = self.cached + i;
            (self.start + i, self.blocks[position / PAGE_TOKENS], position % PAGE_TOKENS)
        })
    }
}

/// [`kv_write`] in plain loops.
pub fn kv_write_reference(args: KvWrite<'_>) {
    let KvWrite { k_tgk, v_tgv, pages, cache, batch } = args;
    for slot in batch.sequences {
        check_blocks(slot);
        for i in 0..slot.len {
            let (row, position) = (slot.start + i, slot.cached + i);
            let (page, lane) = (slot.blocks[position / PAGE_TOKENS], position % PAGE_TOKENS);
            for g in 0..cache.kv_heads {
                for (column, &x) in head_row(k_tgk, row, g, cache.kv_heads, cache.key_dim) {
                    cache.store(pages, page, cache.key_offset(g, column, lane), x);
                }
                if cache.values_in_keys {
                    continue;
                }
                for (column, &x) in head_row(v_tgv, row, g, cache.kv_heads, cache.value_dim) {
                    cache.store(pages, page, cache.value_offset(g, lane, column), x);
                }
            }
        }
    }
}

fn head_row(
    x_tgk: &[f32],
    row: usize,
    head: usize,
    heads: usize,
    dim: usize,
) -> impl Iterator<Item = (usize, &f32)> {
    x_tgk[(row * heads + head) * dim..][..dim].iter().enumerate()
}

/// A slot has a page for each of its positions.
pub(super) fn check_blocks(slot: &SeqSlot<'_>) {
    assert!(
        slot.keys() <= slot.blocks.len() * PAGE_TOKENS,
        "{} keys do not fit in {} pages",
        slot.keys(),
        slot.blocks.len()
    );
}
