//! The paged key/value cache: its layout and how keys and values get into it.
//!
//! A page holds [`PAGE_TOKENS`] consecutive positions of one sequence, all heads of one layer: keys
//! as `[g, k, 16]` (lanes are positions, so that sixteen scores are computed at once), then values
//! as `[g, 16, v]`, unless they are in the keys. Position p of a sequence lies in lane p mod 16
//! of page `blocks[p / 16]`. Slots past a sequence's end hold whatever was there and are never used.
//!
//! With [`CacheType::Q8`] numbers are signed bytes, and behind them the page holds a float for each
//! head's key in each lane, `[g, 16]`, then for each value: 1/127 of its largest magnitude. A key's float is
//! multiplied with its chain, a value's with its weight, so that no number is; a key or value that is not
//! finite is NaN throughout.
//! Everyone reads what was written, the current run's own keys included, so a cache's type decides
//! the results and how a prompt was cut does not.

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
    /// Signed bytes with a factor for each key and each value of each head, ties to even.
    Q8,
}

/// What follows the numbers of a page where they have factors: one for each lane of each head.
const FACTOR_BYTES: usize = 4;
/// Largest magnitude of a stored byte.
const BYTE_MAX: f32 = 127.0;

impl CacheType {
    /// Bytes of a number, without what it shares with others.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Q8 => 1,
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
        self.page_numbers() * self.dtype.bytes() + self.page_factors() * FACTOR_BYTES
    }

    /// Factors in a page: one a lane of each head's keys, then of its values.
    fn page_factors(&self) -> usize {
        let sides = match self.dtype {
            CacheType::F32 | CacheType::Bf16 => 0,
            CacheType::Q8 if self.values_in_keys => 1,
            CacheType::Q8 => 2,
        };
        sides * self.kv_heads * PAGE_TOKENS
    }

    /// Where the factors of a head's keys are, in floats from the page's start.
    pub(super) fn key_factors(&self, head: usize) -> usize {
        self.page_numbers() * self.dtype.bytes() / FACTOR_BYTES + head * PAGE_TOKENS
    }

    /// Where the factors of a head's values are.
    pub(super) fn value_factors(&self, head: usize) -> usize {
        let side = if self.values_in_keys { 0 } else { self.kv_heads };
        self.key_factors(side + head)
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

    /// The key of `head` in `lane` of a page, at `column`, without its factor.
    pub(super) fn key(&self, page: &[u8], (head, lane): (usize, usize), column: usize) -> f32 {
        self.number(page, self.key_offset(head, column, lane))
    }

    /// The factor of that key: 1 where numbers have none.
    pub(super) fn key_factor(&self, page: &[u8], (head, lane): (usize, usize)) -> f32 {
        self.factor(page, self.key_factors(head) + lane)
    }

    /// The value of `head` in `lane` of a page, at `column`, without its factor.
    pub(super) fn value(&self, page: &[u8], (head, lane): (usize, usize), column: usize) -> f32 {
        self.number(page, self.value_offset(head, lane, column))
    }

    /// The factor of that value: 1 where numbers have none.
    pub(super) fn value_factor(&self, page: &[u8], (head, lane): (usize, usize)) -> f32 {
        self.factor(page, self.value_factors(head) + lane)
    }

    /// One number of a page.
    fn number(&self, page: &[u8], offset: usize) -> f32 {
        match self.dtype {
            CacheType::F32 => float(page, 4 * offset),
            CacheType::Bf16 => {
                let bits = u16::from_ne_bytes([page[2 * offset], page[2 * offset + 1]]);
                f32::from_bits(u32::from(bits) << 16)
            }
            CacheType::Q8 => f32::from(page[offset].cast_signed()),
        }
    }

    fn factor(&self, page: &[u8], factor: usize) -> f32 {
        if self.dtype == CacheType::Q8 { float(page, FACTOR_BYTES * factor) } else { 1.0 }
    }

    /// Stores the numbers `x`, which go to `offset(column)`, and what they share.
    fn store(&self, page: &mut [u8], x: &[f32], offset: impl Fn(usize) -> usize, factor: usize) {
        let (shared, inverse) = factors(x.iter().copied());
        for (column, &x) in x.iter().enumerate() {
            let at = offset(column) * self.dtype.bytes();
            match self.dtype {
                CacheType::F32 => page[at..at + 4].copy_from_slice(&x.to_ne_bytes()),
                CacheType::Bf16 => {
                    page[at..at + 2].copy_from_slice(&bf16_from_f32(x).to_ne_bytes());
                }
                CacheType::Q8 => page[at] = byte(x, inverse).cast_unsigned(),
            }
        }
        if self.dtype == CacheType::Q8 {
            page[FACTOR_BYTES * factor..][..4].copy_from_slice(&shared.to_ne_bytes());
        }
    }
}

/// The float at a byte of a page.
fn float(page: &[u8], at: usize) -> f32 {
    f32::from_ne_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

/// The factor of a key or value, and what its numbers are multiplied by to become bytes.
fn factors(x: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
    let largest = x.clone().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    // Neither `max` nor a product with 0 may hide what is no number.
    if !largest.is_finite() || x.clone().any(f32::is_nan) {
        return (f32::NAN, 0.0);
    }
    let factor = largest / BYTE_MAX;
    // A factor below the normal numbers is too coarse to divide by: such a key is zero.
    if factor.is_normal() { (factor, 1.0 / factor) } else { (0.0, 0.0) }
}

/// The byte of a number, ties to even.
#[expect(clippy::cast_possible_truncation, reason = "clamped to what a byte holds")]
fn byte(x: f32, inverse: f32) -> i8 {
    (x * inverse).round_ties_even().clamp(-BYTE_MAX, BYTE_MAX) as i8
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
                    CacheType::Q8 => write_bytes(&cache, (k_tgk, v_tgv, row), (page, lane)),
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

/// As [`write_token`] for bytes with factors.
fn write_bytes(
    cache: &CacheSpec,
    (k_tgk, v_tgv, row): (&[f32], &[f32], usize),
    (page, lane): (&mut [u8], usize),
) {
    let CacheSpec { kv_heads, key_dim, value_dim, values_in_keys, .. } = *cache;
    let (numbers, shared) = page.split_at_mut(cache.page_numbers());
    let (keys, values) = BytesMut::new(numbers).i8s().split_at_mut(cache.page_keys());
    let (key_factors, value_factors) =
        BytesMut::new(shared).f32s().split_at_mut(kv_heads * PAGE_TOKENS);
    let k_gk = &k_tgk[row * kv_heads * key_dim..][..kv_heads * key_dim];
    let heads = keys.chunks_exact_mut(PAGE_TOKENS * key_dim);
    for ((head, k_k), factor) in heads
        .zip(k_gk.chunks_exact(key_dim))
        .zip(key_factors[lane..].iter_mut().step_by(PAGE_TOKENS))
    {
        let inverse;
        (*factor, inverse) = factors(k_k.iter().copied());
        for (to, &x) in head.chunks_exact_mut(PAGE_TOKENS).zip(k_k) {
            to[lane] = byte(x, inverse);
        }
    }
    if values_in_keys {
        return;
    }
    let v_gv = &v_tgv[row * kv_heads * value_dim..][..kv_heads * value_dim];
    let heads = values.chunks_exact_mut(PAGE_TOKENS * value_dim);
    for ((head, v_v), factor) in heads
        .zip(v_gv.chunks_exact(value_dim))
        .zip(value_factors[lane..].iter_mut().step_by(PAGE_TOKENS))
    {
        let inverse;
        (*factor, inverse) = factors(v_v.iter().copied());
        for (to, &x) in head[lane * value_dim..].iter_mut().zip(v_v) {
            *to = byte(x, inverse);
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
            let page = &mut pages[page as usize * cache.page_bytes()..][..cache.page_bytes()];
            for g in 0..cache.kv_heads {
                let k_k = &k_tgk[(row * cache.kv_heads + g) * cache.key_dim..][..cache.key_dim];
                let place = |column| cache.key_offset(g, column, lane);
                cache.store(page, k_k, place, cache.key_factors(g) + lane);
                if cache.values_in_keys {
                    continue;
                }
                let value_dim = cache.value_dim;
                let v_v = &v_tgv[(row * cache.kv_heads + g) * value_dim..][..value_dim];
                let place = |column| cache.value_offset(g, lane, column);
                cache.store(page, v_v, place, cache.value_factors(g) + lane);
            }
        }
    }
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
