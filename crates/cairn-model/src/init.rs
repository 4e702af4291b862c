//! Fresh weights: a pure function of the spec and a seed.
//!
//! Each element is drawn from a counter-based generator keyed by (seed, weight name, index), so the
//! values depend neither on threads nor on the order in which weights are filled.

use cairn_kernels::{Cpu, Encoding, FillNormal, Layout, fill_normal, splitmix};
use cairn_program::{Class, Session, ValueType};
use cairn_spec::ModelSpec;
use cairn_spec::model::{Family, Norm};

use crate::adapter::{A_SUFFIX, AdapterMap, is_adapter_weight};
use crate::load::encode_rows;
use crate::names::TensorSlice;

/// Elements encoded at a time, at most: they stay in the cache.
const ELEMENTS_AT_A_TIME: usize = 1 << 18;

/// Fills the weights of a session.
///
/// Matrices are normal with the spec's `initializer_range`; GPT-2 divides that of the projections
/// back into the residual stream by `√(2 · num_hidden_layers)` (Radford et al. 2019, section 2.3).
/// Norm weights are one (zero where they count from one), biases zero.
pub fn init_weights(session: &mut Session, spec: &ModelSpec, seed: u64) {
    let weights: Vec<(String, ValueType, usize, usize)> = session
        .persistent()
        .filter(|(name, class, ..)| *class == Class::Weight && !is_adapter_weight(name))
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
        let key = hash_name(&name) ^ splitmix(seed);
        let encoding = value_type.encoding().expect("a weight has an encoding");
        let form = (encoding, value_type.layout());
        let (cpu, stored) = session.stored_mut_with_cpu(&name).expect("listed by the session");
        if form == (Encoding::F32, Layout::RowMajor) {
            fill.fill(cpu, key, 0, stored.f32s());
            continue;
        }
        let stored = stored.u8s();
        let rows_at_a_time = (ELEMENTS_AT_A_TIME / columns).max(16) / 16 * 16;
        let mut values = vec![0.0; rows_at_a_time.min(rows) * columns];
        for first in (0..rows).step_by(rows_at_a_time) {
            let count = rows_at_a_time.min(rows - first);
            let values = &mut values[..count * columns];
            fill.fill(cpu, key, (first * columns) as u64, values);
            encode_rows(form, columns, first, values, stored);
        }
    }
}

/// Fills the weights of adapters alone, so that they change nothing yet: `A` is normal with the
/// variance `1 / 3·inputs` of PEFT's uniform numbers, `B` is zero. Experts without an adapter, beside
/// some that have one, have zeros in both.
pub fn init_adapter(session: &mut Session, adapters: &AdapterMap, seed: u64) {
    let map = adapters.tensor_map();
    for slices in map.slices.chunk_by(|slice, next| slice.weight == next.weight) {
        let (name, columns) = (&slices[0].weight, slices[0].columns);
        let found = session.persistent().find(|(found, ..)| found == name);
        let Some((value_type, elements)) =
            found.map(|(_, _, value_type, shape)| (value_type, shape.row_elements()))
        else {
            continue;
        };
        let encoding = value_type.encoding().expect("a weight has an encoding");
        let (cpu, stored) = session.stored_mut_with_cpu(name).expect("listed by the session");
        let mut values = vec![0.0; elements];
        if name.ends_with(A_SUFFIX) {
            let fill = Fill::a(columns);
            let key = hash_name(name) ^ splitmix(seed);
            for range in slices.iter().map(TensorSlice::elements) {
                fill.fill(cpu, key, range.start as u64, &mut values[range]);
            }
        }
        encode_rows((encoding, value_type.layout()), columns, 0, &values, stored.u8s());
    }
}

/// How the elements of one weight start.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Constant(f32),
    Normal { deviation: f32 },
}

impl Fill {
    fn of(name: &str, spec: &ModelSpec) -> Self {
        let Norm { plus_one, .. } = spec.norm;
        if name.ends_with("bias") {
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
        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
        let deviation = deviation as f32;
        Self::Normal { deviation }
    }

    /// An adapter's `A` of so many inputs.
    fn a(inputs: usize) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "the spec limits the widths")]
        let inputs = inputs as f32;
        Self::Normal { deviation: (3.0 * inputs).sqrt().recip() }
    }

    /// Elements from number `first` on.
    fn fill(self, cpu: &Cpu, key: u64, first: u64, y: &mut [f32]) {
        match self {
            Self::Constant(value) => y.fill(value),
            Self::Normal { deviation } => fill_normal(cpu, FillNormal { key, first, deviation, y }),
        }
    }
}

/// FNV-1a of a name, spread by [`splitmix`].
fn hash_name(name: &str) -> u64 {
    let offset = 0xcbf2_9ce4_8422_2325_u64;
    splitmix(name.bytes().fold(offset, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)))
}
