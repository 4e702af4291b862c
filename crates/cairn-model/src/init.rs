//! Fresh weights: a pure function of the spec and a seed.
//!
//! Each element is drawn from a counter-based generator keyed by (seed, weight name, index), so the
//! values depend neither on threads nor on the order in which weights are filled.

use cairn_kernels::encoding::encode;
use cairn_program::{Class, Session, ValueType};
use cairn_spec::ModelSpec;
use cairn_spec::model::{Family, Norm};

/// Elements encoded at a time, at most.
const ELEMENTS_AT_A_TIME: usize = 1 << 20;
/// Elements that a thread draws at a time.
const ELEMENTS_OF_TASK: usize = 1 << 14;

/// Fills the weights of a session.
///
/// Matrices are normal with the spec's `initializer_range`; GPT-2 divides that of the projections
/// back into the residual stream by `√(2 · num_hidden_layers)` (Radford et al. 2019, section 2.3).
/// Norm weights are one (zero where they count from one), biases zero.
///
/// # Panics
///
/// Panics if a weight is stored in an encoding that has no fresh values (`q8`).
pub fn init_weights(session: &mut Session, spec: &ModelSpec, seed: u64) {
    let weights: Vec<(String, ValueType, usize, usize)> = session
        .persistent()
        .filter(|(_, class, ..)| *class == Class::Weight)
        .map(|(name, _, value_type, shape)| {
            let elements = shape.row_elements();
            let columns = match value_type {
                ValueType::Encoded { inputs, .. } => inputs,
                ValueType::F32 | ValueType::F64 | ValueType::U32 => shape.last(),
            };
            (name.to_owned(), value_type, elements / columns, columns)
        })
        .collect();
    for (name, value_type, rows, columns) in weights {
        let fill = Fill::of(&name, spec);
        let key = hash_name(&name) ^ mix(seed);
        let storage =
            (value_type.encoding().expect("a weight has an encoding"), value_type.layout());
        let rows_at_a_time = (ELEMENTS_AT_A_TIME / columns).max(16) / 16 * 16;
        let mut values = vec![0.0; rows_at_a_time.min(rows) * columns];
        for first in (0..rows).step_by(rows_at_a_time) {
            let count = rows_at_a_time.min(rows - first);
            let values = &mut values[..count * columns];
            session.cpu().parallel_chunks(values, ELEMENTS_OF_TASK, |start, chunk, _scratch| {
                fill.fill(key, (first * columns + start) as u64, chunk);
            });
            let bytes =
                |rows| cairn_kernels::Weight::stored_bytes(storage.0, storage.1, rows, columns);
            let stored = session.stored_mut(&name).expect("listed by the session");
            let target = &mut stored[bytes(first)..][..bytes(count)];
            encode(storage, (count, columns), values, target);
        }
    }
}

/// How the elements of one weight start.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Constant(f32),
    Normal { deviation: f64 },
}

impl Fill {
    fn of(name: &str, spec: &ModelSpec) -> Self {
        let Norm { plus_one, .. } = spec.norm;
        if name.ends_with(".bias") {
            return Self::Constant(0.0);
        }
        if name.ends_with("norm.weight") {
            return Self::Constant(if plus_one { 0.0 } else { 1.0 });
        }
        let into_residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let mut deviation = spec.initializer_range;
        if spec.family == Family::Gpt2 && into_residual {
            #[expect(clippy::cast_precision_loss, reason = "the spec limits the layers")]
            let additions = 2.0 * spec.num_hidden_layers as f64;
            deviation /= additions.sqrt();
        }
        Self::Normal { deviation }
    }

    /// The elements from number `first` on.
    fn fill(self, key: u64, first: u64, values: &mut [f32]) {
        let deviation = match self {
            Self::Constant(value) => return values.fill(value),
            Self::Normal { deviation } => deviation,
        };
        let mut index = first;
        let mut rest = values;
        while let Some((value, more)) = rest.split_first_mut() {
            let (even, odd) = normal_pair(key, index / 2);
            if index.is_multiple_of(2) {
                *value = scaled(deviation, even);
                let Some((next, more)) = more.split_first_mut() else { return };
                *next = scaled(deviation, odd);
                (index, rest) = (index + 2, more);
            } else {
                *value = scaled(deviation, odd);
                (index, rest) = (index + 1, more);
            }
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
fn scaled(deviation: f64, normal: f64) -> f32 {
    (deviation * normal) as f32
}

/// Two standard normal variates by Box and Muller's method (1958), for elements `2·pair` and the
/// one after it.
fn normal_pair(key: u64, pair: u64) -> (f64, f64) {
    let (a, b) = (mix(key ^ mix(2 * pair)), mix(key ^ mix(2 * pair + 1)));
    // 53 bits, in (0, 1]: the logarithm must not see zero.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64")]
    let uniform = |bits: u64| ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    let radius = (-2.0 * uniform(a).ln()).sqrt();
    let (sine, cosine) = (std::f64::consts::TAU * uniform(b)).sin_cos();
    (radius * cosine, radius * sine)
}

/// The finalizer of `SplitMix64` (Steele et al. 2014): a bijection with full avalanche.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a of a name, spread by [`mix`].
fn hash_name(name: &str) -> u64 {
    let offset = 0xcbf2_9ce4_8422_2325_u64;
    mix(name.bytes().fold(offset, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_do_not_depend_on_how_they_are_cut() {
        let fill = Fill::Normal { deviation: 0.02 };
        let mut whole = vec![0.0; 1001];
        fill.fill(9, 0, &mut whole);
        for cut in [1, 2, 7, 500] {
            let mut parts = vec![0.0; 1001];
            for (index, part) in parts.chunks_mut(cut).enumerate() {
                fill.fill(9, (index * cut) as u64, part);
            }
            assert_eq!(parts, whole, "{cut}");
        }
    }

    #[test]
    fn they_are_normal() {
        let mut values = vec![0.0; 200_000];
        Fill::Normal { deviation: 2.0 }.fill(3, 0, &mut values);
        let moment = |power: i32| {
            values.iter().map(|&x| (f64::from(x) / 2.0).powi(power)).sum::<f64>() / 200_000.0
        };
        // Four standard errors of each.
        for (power, expected, tolerance) in
            [(1, 0.0, 0.009), (2, 1.0, 0.013), (3, 0.0, 0.035), (4, 3.0, 0.09)]
        {
            let found = moment(power);
            assert!((found - expected).abs() < tolerance, "moment {power}: {found}");
        }
        let neighbors: f64 =
            values.windows(2).map(|pair| f64::from(pair[0]) * f64::from(pair[1]) / 4.0).sum();
        assert!((neighbors / 200_000.0).abs() < 0.009, "{neighbors}");
    }
}
