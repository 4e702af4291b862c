//! Precision gates: every encoding in every arithmetic that multiplies by it, scored on this machine.
//!
//! A pair passes if its product has the bits of its definition, if no output is further from exact
//! arithmetic than the policy allows, and if a weight of fewer bytes than bf16 takes no longer to stream.

use super::inputs::{Table, case, values, zeros};
use super::median_seconds;
use crate::compute::{BYTE_MAX, Compute, GROUP};
use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout, Weight, encode};
use crate::matmul::{Matmul, matmul, matmul_reference};
use crate::memory::{bytes_of, bytes_of_mut};

/// Tokens, outputs and inputs of the products whose bits and errors are looked at: for few tokens and
/// for more than are streamed.
const SMALL: [[usize; 3]; 2] = [[3, 40, 330], [40, 40, 330]];
/// Those of a product out of memory, and of one that computes.
const DECODE: [usize; 3] = [1, 3072, 1024];
const PROMPT: [usize; 3] = [256, 3072, 1024];
/// What measurements may differ by: a pair as fast as bf16 passes.
const TOLERANCE: f64 = 0.95;

/// The score of one pair.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Gate {
    /// How weights are stored.
    pub encoding: Encoding,
    /// The arithmetic.
    pub compute: Compute,
    /// Stored bytes of a weight of the measured shape, per element.
    pub bytes_a_weight: f64,
    /// Whether outputs have the bits of the definition in plain loops.
    pub is_exact: bool,
    /// The largest error of an output against f64, as a share of what the policy allows.
    pub error: f64,
    /// What encoding did to the weights: root mean square of the changes, relative to that of the weights.
    pub weight_error: f64,
    /// Seconds of a product by one token with the weight in memory.
    pub decode_seconds: f64,
    /// How many times as fast that is as bf16 in f32, measured just before.
    pub decode_speed: f64,
    /// Seconds of a product by 256 tokens.
    pub prompt_seconds: f64,
    /// How many times as fast that is as bf16 in f32, measured just before.
    pub prompt_speed: f64,
    /// Whether plans may use the pair.
    pub passed: bool,
}

/// Every encoding with every arithmetic that multiplies by it.
pub fn gate_pairs() -> Vec<(Encoding, Compute)> {
    let pairs = Encoding::ALL.into_iter().flat_map(|e| Compute::ALL.map(|compute| (e, compute)));
    pairs.filter(|(encoding, compute)| compute.multiplies(*encoding)).collect()
}

/// Scores one pair, which takes a second or two.
pub fn measure_gate(cpu: &Cpu, pair: (Encoding, Compute)) -> Gate {
    let (encoding, compute) = pair;
    let accuracies = SMALL.map(|sizes| accuracy(cpu, sizes, pair));
    let plain = (Encoding::Bf16, Compute::F32);
    let (plain_decode, decode_seconds) = (seconds(cpu, DECODE, plain), seconds(cpu, DECODE, pair));
    let (plain_prompt, prompt_seconds) = (seconds(cpu, PROMPT, plain), seconds(cpu, PROMPT, pair));
    let bytes = |encoding| bytes_a_weight(encoding, DECODE[1], DECODE[2]);
    let decode_speed = plain_decode / decode_seconds;
    let is_exact = accuracies.iter().all(|accuracy| accuracy.is_exact);
    let error = accuracies.iter().map(|accuracy| accuracy.error).fold(0.0, f64::max);
    let is_fast = bytes(encoding) >= bytes(Encoding::Bf16) || decode_speed >= TOLERANCE;
    Gate {
        encoding,
        compute,
        bytes_a_weight: bytes(encoding),
        is_exact,
        error,
        weight_error: accuracies[0].weight_error,
        decode_seconds,
        decode_speed,
        prompt_seconds,
        prompt_speed: plain_prompt / prompt_seconds,
        passed: is_exact && error <= 1.0 && is_fast,
    }
}

fn bytes_a_weight(encoding: Encoding, n: usize, k: usize) -> f64 {
    Weight::stored_bytes(encoding, Layout::Panel, n, k) as f64 / (n * k) as f64
}

struct Accuracy {
    is_exact: bool,
    error: f64,
    weight_error: f64,
}

/// A product against its definition and against f64.
fn accuracy(
    cpu: &Cpu,
    [t, n, k]: [usize; 3],
    (encoding, compute): (Encoding, Compute),
) -> Accuracy {
    let (w_nk, x_tk) = (values(n * k, 21), values(t * k, 22));
    let layout = Layout::Panel;
    let bytes = Weight::stored_bytes(encoding, layout, n, k);
    let mut storage = zeros(bytes.div_ceil(4));
    encode((encoding, layout), (n, k), &w_nk, &mut bytes_of_mut(&mut storage[..])[..bytes]);
    let bytes = &bytes_of(&storage[..])[..bytes];
    let weight = Weight { encoding, layout, n, k, bytes };
    let (mut found, mut expected) = (zeros(t * n), zeros(t * n));
    let (bias_n, accumulate, x_tk) = (None, false, &x_tk[..]);
    matmul(cpu, Matmul { x_tk, weight, bias_n, y_tn: &mut found, t, accumulate, compute });
    let y_tn = &mut expected[..];
    matmul_reference(Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute });
    let is_exact = found.iter().zip(&expected[..]).all(|(a, b)| a.to_bits() == b.to_bits());
    let (mut changes, mut squares) = (0.0, 0.0);
    for (index, &w) in w_nk.iter().enumerate() {
        let change = f64::from(weight.value(index / k, index % k)) - f64::from(w);
        changes += change * change;
        squares += f64::from(w) * f64::from(w);
    }
    let error = largest_error(&found, x_tk, weight, compute);
    Accuracy { is_exact, error, weight_error: (changes / squares).sqrt() }
}

/// The largest error of an output, as a share of what the arithmetic allows.
fn largest_error(y_tn: &[f32], x_tk: &[f32], weight: Weight<'_>, compute: Compute) -> f64 {
    let Weight { n, k, .. } = weight;
    let shares = y_tn.iter().enumerate().map(|(index, &y)| {
        let (x_k, output) = (&x_tk[index / n * k..][..k], index % n);
        let (mut sum, mut magnitude, mut rounding) = (0.0, 0.0, 0.0);
        for (group, x) in x_k.chunks(GROUP).enumerate() {
            let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            for (i, &x) in x.iter().enumerate() {
                let w = f64::from(weight.value(output, group * GROUP + i));
                sum += f64::from(x) * w;
                magnitude += f64::from(x).abs() * w.abs();
                rounding += match compute {
                    Compute::F32 => 0.0,
                    Compute::Bf16 => f64::from(x).abs() * 2.0_f64.powi(-9) * w.abs(),
                    Compute::Int8 => f64::from(largest / BYTE_MAX) / 2.0 * (1.0 + 1e-5) * w.abs(),
                };
            }
        }
        let bound = rounding + (k + 3) as f64 * 2.0_f64.powi(-24) * (magnitude + rounding);
        (f64::from(y) - sum).abs() / bound
    });
    // A share that is no number is the largest of all.
    shares.fold(
        0.0,
        |largest: f64, share| {
            if largest.is_nan() || share <= largest { largest } else { share }
        },
    )
}

/// Seconds of a product with the weight in panels; with one token, of weights that no cache holds.
fn seconds(cpu: &Cpu, [t, n, k]: [usize; 3], (encoding, compute): (Encoding, Compute)) -> f64 {
    let form = (encoding, Layout::Panel);
    let mut table = if t == 1 { Table::cold(form, n, k) } else { Table::warm(form, n, k) };
    let (x_tk, mut y_tn) = (values(t * k, 1), zeros(t * n));
    let mut case = case(0.0, 0, move |cpu| {
        let (weight, y_tn, accumulate) = (table.weight(), &mut y_tn[..], false);
        matmul(cpu, Matmul { x_tk: &x_tk, weight, bias_n: None, y_tn, t, accumulate, compute });
    });
    median_seconds(cpu, &mut case)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::every_cpu;

    #[test]
    fn every_pair_is_exact_and_within_its_bound() {
        assert!(gate_pairs().len() >= 13, "{:?}", gate_pairs());
        for pair in gate_pairs() {
            every_cpu(|cpu| {
                for sizes in SMALL {
                    let Accuracy { is_exact, error, weight_error } = accuracy(cpu, sizes, pair);
                    assert!(is_exact && error <= 1.0, "{pair:?} {sizes:?}: {error}");
                    assert_eq!(weight_error == 0.0, pair.0 == Encoding::F32, "{pair:?}");
                }
            });
        }
    }

    #[test]
    fn a_wrong_output_is_seen() {
        let (n, k) = (5, 64);
        let (w_nk, x_tk) = (values(n * k, 1), values(k, 2));
        let weight = Weight::f32(n, k, &w_nk);
        let mut y = vec![0.0; n];
        let (x, y_tn, compute, accumulate) = (&x_tk[..], &mut y[..], Compute::F32, false);
        matmul_reference(Matmul { x_tk: x, weight, bias_n: None, y_tn, t: 1, accumulate, compute });
        assert!(largest_error(&y, &x_tk, weight, Compute::F32) <= 1.0);
        y[3] += 1e-3;
        assert!(largest_error(&y, &x_tk, weight, Compute::F32) > 1.0);
        y[3] = f32::NAN;
        assert!(largest_error(&y, &x_tk, weight, Compute::F32).is_nan());
    }
}
