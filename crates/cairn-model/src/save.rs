//! The weights of a session → tensors in a family's layout, to be written to files.

use std::borrow::Cow;
use std::io::{self, Write};

use cairn_artifacts::safetensors::OutTensor;
use cairn_program::Session;
use cairn_spec::{DType, ModelSpec};

use crate::load::tensor_f32;
use crate::names::{Placement, TensorMap, TensorSlice};

/// Elements turned to bytes at a time.
const CHUNK_ELEMENTS: usize = 1 << 14;

/// The family's tensors of a session, to write. `prefix` picks what is written: empty for the
/// weights themselves, `ema.` for their averages.
///
/// Weights that a family stores as they are go out without a copy; others are gathered one tensor
/// at a time while the file is written.
///
/// # Panics
///
/// Panics if the session lacks a weight of the model, or stores one as neither f32 nor bf16.
pub fn out_tensors<'a>(
    session: &'a Session,
    spec: &ModelSpec,
    prefix: &'a str,
) -> Vec<OutTensor<'a>> {
    let map = TensorMap::new(spec);
    let mut out = out_tensors_of(session, &map, prefix);
    for (copy, original) in TensorMap::saved_copies(spec) {
        let slices: Vec<TensorSlice> =
            map.slices.iter().filter(|slice| slice.tensor == original).cloned().collect();
        let shape = slices.first().expect("a copy repeats a tensor").shape.clone();
        out.push(out_tensor(session, prefix, (&copy, &shape), slices));
    }
    out
}

/// The tensors of a map, an adapter's for instance, as [`out_tensors`] gives a model's.
///
/// # Panics
///
/// As [`out_tensors`].
pub fn out_tensors_of<'a>(
    session: &'a Session,
    map: &TensorMap,
    prefix: &'a str,
) -> Vec<OutTensor<'a>> {
    let (tensors, slices) = (map.tensors(), map.by_tensor());
    let out = tensors.iter().map(|(name, shape)| {
        let slices = slices[name].iter().map(|&slice| slice.clone()).collect();
        out_tensor(session, prefix, (name, shape), slices)
    });
    out.collect()
}

fn out_tensor<'a>(
    session: &'a Session,
    prefix: &'a str,
    (name, shape): (&str, &[usize]),
    slices: Vec<TensorSlice>,
) -> OutTensor<'a> {
    let first = stored(session, prefix, &slices[0].weight);
    match (&first, &slices[..]) {
        (Stored::F32(values), [only]) if only.placement == Placement::Whole => {
            OutTensor::f32(name, shape, &values[only.elements()])
        }
        (Stored::Bf16(bytes), [only]) if only.placement == Placement::Whole => {
            let elements = only.elements();
            OutTensor::bytes(name, DType::Bf16, shape, &bytes[2 * elements.start..2 * elements.end])
        }
        (Stored::F32(_) | Stored::Bf16(_), _) => {
            let dtype = if matches!(first, Stored::F32(_)) { DType::F32 } else { DType::Bf16 };
            let tensor = name.to_owned();
            let write = move |out: &mut dyn Write| gather(session, prefix, &slices, &tensor, out);
            OutTensor::stream(name, dtype, shape, write)
        }
    }
}

/// A weight or state as the session holds it.
enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u8]),
}

impl Stored<'_> {
    fn widened(&self) -> Cow<'_, [f32]> {
        match self {
            Stored::F32(values) => Cow::Borrowed(values),
            Stored::Bf16(bytes) => Cow::Owned(widened_bf16(bytes)),
        }
    }
}

fn stored<'a>(session: &'a Session, prefix: &str, weight: &str) -> Stored<'a> {
    let name = format!("{prefix}{weight}");
    match session.stored_f32(&name) {
        Some(values) => Stored::F32(values),
        None => Stored::Bf16(session.stored(&name).expect("the family's map names only weights")),
    }
}

/// Little-endian bf16 as f32.
///
/// # Panics
///
/// Panics if there is half a number.
pub fn widened_bf16(bytes: &[u8]) -> Vec<f32> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    assert!(rest.is_empty(), "bf16 takes two bytes");
    pairs.iter().map(|&pair| f32::from_bits(u32::from(u16::from_le_bytes(pair)) << 16)).collect()
}

/// Most bytes that writing a tensor of a model takes beside the session: those that are rearranged
/// exist a second time, widened, while they are written.
pub fn gather_bytes_max(spec: &ModelSpec) -> usize {
    gather_bytes_max_of(&TensorMap::new(spec))
}

/// As [`gather_bytes_max`], for the tensors of a map.
pub fn gather_bytes_max_of(map: &TensorMap) -> usize {
    let rearranged = map.slices.iter().filter(|slice| slice.placement != Placement::Whole);
    rearranged.map(|slice| 8 * slice.shape.iter().product::<usize>()).max().unwrap_or(0)
}

/// Writes a tensor made of several weights, or transposed.
fn gather(
    session: &Session,
    prefix: &str,
    slices: &[TensorSlice],
    tensor: &str,
    out: &mut dyn Write,
) -> io::Result<()> {
    let parts: Vec<(&str, Stored<'_>)> = slices
        .iter()
        .map(|slice| (slice.weight.as_str(), stored(session, prefix, &slice.weight)))
        .collect();
    let values: Vec<(&str, Cow<'_, [f32]>)> =
        parts.iter().map(|(weight, part)| (*weight, part.widened())).collect();
    let lookup = |weight: &str| -> Option<&[f32]> {
        values.iter().find(|(name, _)| *name == weight).map(|(_, values)| &values[..])
    };
    let map = TensorMap { slices: slices.to_vec() };
    let (_, gathered) = tensor_f32(&map, tensor, &lookup);
    let narrow = parts.iter().any(|(_, part)| matches!(part, Stored::Bf16(_)));
    let mut bytes = Vec::with_capacity(4 * CHUNK_ELEMENTS);
    for chunk in gathered.chunks(CHUNK_ELEMENTS) {
        bytes.clear();
        for value in chunk {
            // The upper half is exact where the value was widened from bf16.
            let all = value.to_le_bytes();
            bytes.extend_from_slice(if narrow { &all[2..] } else { &all });
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}
