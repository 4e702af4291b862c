//! Rotary position embedding, in place.
//!
//! Dimensions: `t` tokens, `h` heads (query or key/value), `k` head dim; `r` rotated pairs.
//!
//! Pair i of a head turns by the angle `position · inv_freq[i]`, one f32 product as in
//! transformers; then the sine and cosine of that f32, times `attention_scaling`. With
//! `c = cos · scaling` and `s = sin · scaling`: `y₀ = x₀·c − x₁·s`, `y₁ = x₁·c + x₀·s`, the first
//! product fused into the sum. Dimensions past the rotated pairs stay as they are.
//!
//! Source: Su et al. 2021, eq. 34. <https://arxiv.org/abs/2104.09864>

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes::{at, put, vectors};
use crate::math;
use crate::simd::kernel;

/// Rotates the heads of tokens by their positions.
#[derive(Debug)]
pub struct Rope<'a> {
    /// Heads to rotate in place, `[t, h, k]`.
    pub x_thk: &'a mut [f32],
    /// Position of each token, below 2²² in angle units (position · largest inverse frequency).
    pub positions_t: &'a [u32],
    /// Inverse frequencies, `[r]`: 2r ≤ k dimensions are rotated.
    pub inv_freq: &'a [f32],
    /// Factor on sine and cosine (YaRN); 1 otherwise.
    pub attention_scaling: f32,
    /// Heads of a token.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Which dimensions make a pair.
    pub pairing: RopePairing,
    /// Turns backwards: the adjoint (for a scaling of 1 also the inverse).
    pub inverse: bool,
}

/// Which two dimensions of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopePairing {
    /// i with i + r, as in Hugging Face's llama.
    Half,
    /// 2i with 2i + 1, as in GPT-J, GLM and the original release of LLaMA.
    Interleaved,
}

/// Rotates the heads of tokens by their positions.
pub fn rope(cpu: &Cpu, args: Rope<'_>) {
    let Rope { x_thk, positions_t, inv_freq, heads, head_dim, .. } = args;
    let (simd, width, r) = (cpu.simd(), heads * head_dim, inv_freq.len());
    assert!(2 * r <= head_dim, "rope: more rotated dimensions than a head has");
    assert_eq!(x_thk.len(), positions_t.len() * width, "rope: x");
    let turn = Turn {
        inv_freq,
        attention_scaling: args.attention_scaling,
        head_dim,
        pairing: args.pairing,
        inverse: args.inverse,
    };
    let rows = RowSlice::new(x_thk, width);
    parallel_rows(cpu, positions_t.len(), rows_per_task(width), rows, |rows, x_thk, scratch| {
        let cos_sin = scratch.f32_parts([r, r]);
        rotate(simd, turn, &positions_t[rows], x_thk, cos_sin);
    });
}

/// What all tokens of a rotation share.
#[derive(Clone, Copy)]
struct Turn<'a> {
    inv_freq: &'a [f32],
    attention_scaling: f32,
    head_dim: usize,
    pairing: RopePairing,
    inverse: bool,
}

kernel! {
    fn rotate<V>(turn: Turn<'_>, positions_t: &[u32], x_thk: &mut [f32], cos_sin: [&mut [f32]; 2]) {
        let [cos, sin] = cos_sin;
        let r = turn.inv_freq.len();
        let scaling = V::splat(turn.attention_scaling);
        let width = x_thk.len() / positions_t.len().max(1);
        for (x_hk, &position) in x_thk.chunks_exact_mut(width).zip(positions_t) {
            let position = V::splat(position as f32);
            for i in vectors(r) {
                let (s, c) = math::sin_cos(position * at::<V>(turn.inv_freq, i));
                let s = s * scaling;
                put(c * scaling, cos, i);
                put(if turn.inverse { -s } else { s }, sin, i);
            }
            for x_k in x_hk.chunks_exact_mut(turn.head_dim) {
                if turn.pairing == RopePairing::Interleaved {
                    let (pairs, _) = x_k.as_chunks_mut::<2>();
                    for ((pair, &c), &s) in pairs.iter_mut().zip(&*cos).zip(&*sin) {
                        let [x0, x1] = *pair;
                        *pair = [x0.mul_add(c, -(x1 * s)), x1.mul_add(c, x0 * s)];
                    }
                    continue;
                }
                let (first, second) = x_k[..2 * r].split_at_mut(r);
                for i in vectors(r) {
                    let (x0, x1) = (at::<V>(first, i), at::<V>(second, i));
                    let (c, s) = (at::<V>(cos, i), at::<V>(sin, i));
                    put(x0.mul_add(c, -(x1 * s)), first, i);
                    put(x1.mul_add(c, x0 * s), second, i);
                }
            }
        }
    }
}

/// [`rope`] in plain loops.
pub fn rope_reference(args: Rope<'_>) {
    let Rope { x_thk, positions_t, inv_freq, heads, head_dim, pairing, .. } = args;
    let r = inv_freq.len();
    assert!(2 * r <= head_dim, "rope: more rotated dimensions than a head has");
    assert_eq!(x_thk.len(), positions_t.len() * heads * head_dim, "rope: x");
    for (x_hk, &position) in x_thk.chunks_exact_mut(heads * head_dim).zip(positions_t) {
        for (i, &inv_freq) in inv_freq.iter().enumerate() {
            let (sin, cos) = math::sin_cos(position as f32 * inv_freq);
            let c = cos * args.attention_scaling;
            let s = sin * args.attention_scaling;
            let s = if args.inverse { -s } else { s };
            let (first, second) = match pairing {
                RopePairing::Half => (i, i + r),
                RopePairing::Interleaved => (2 * i, 2 * i + 1),
            };
            for x_k in x_hk.chunks_exact_mut(head_dim) {
                let (x0, x1) = (x_k[first], x_k[second]);
                x_k[first] = x0.mul_add(c, -(x1 * s));
                x_k[second] = x1.mul_add(c, x0 * s);
            }
        }
    }
}

#[cfg(test)]
mod tests;
