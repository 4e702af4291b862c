//! The encodings that keep a model as its files hold it, matrix by matrix.

use std::collections::BTreeMap;
use std::fmt;

use cairn_kernels::encoding::Q8_BLOCK;
use cairn_kernels::{Encoding, Layout};
use cairn_program::{Class, DimName, Value};
use cairn_spec::ModelSpec;

use super::{LoadError, TensorSource};
use crate::build::{BuildError, BuildOptions, Head, build_program};
use crate::names::TensorSlice;

/// Rows of a panel: what is stored in panels only needs as many in each of its parts.
const PANEL_ROWS: usize = 16;

/// Why a model's stored encodings cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoredError {
    /// The model has no program.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The tensors have no names here.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// The weight matrices of a model with the encodings that keep every value as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredWeights {
    /// In the order of the program.
    matrices: Vec<StoredMatrix>,
}

/// One matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
struct StoredMatrix {
    weight: String,
    elements: usize,
    encoding: Result<Encoding, Widening>,
}

/// Why no encoding keeps a matrix as it is stored, so that it is held in `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Widening {
    /// It is stored in a way that Cairn decodes only.
    Decoded,
    /// It lies in tensors that are stored unlike each other.
    Unlike,
    /// Its rows do not fill the groups or panels of what it is stored in.
    Unfilled(Encoding),
}

impl fmt::Display for Widening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decoded => f.write_str("is stored in a way that is decoded only"),
            Self::Unlike => f.write_str("lies in tensors of different types"),
            Self::Unfilled(encoding) => {
                write!(f, "does not fill the groups and panels of {encoding}")
            }
        }
    }
}

impl StoredWeights {
    /// The encodings there are, each once, in the order of the program; `None` for matrices that are
    /// [`widened`](Self::widened).
    pub fn encodings(&self) -> Vec<Option<Encoding>> {
        let mut found = Vec::new();
        for matrix in &self.matrices {
            let encoding = matrix.encoding.ok();
            if !found.contains(&encoding) {
                found.push(encoding);
            }
        }
        found
    }

    /// The matrices that no encoding keeps as they are stored, and why, in the order of the program.
    pub fn widened(&self) -> Vec<(&str, Widening)> {
        let found = self.matrices.iter();
        found.filter_map(|matrix| Some((matrix.weight.as_str(), matrix.encoding.err()?))).collect()
    }

    /// The encoding of most elements, `f32` only where there is no narrower one.
    pub fn most(&self) -> Encoding {
        let mut elements: Vec<(Encoding, usize)> = Vec::new();
        for matrix in &self.matrices {
            let kept = matrix.encoding.ok();
            let Some(encoding) = kept.filter(|kept| *kept != Encoding::F32) else {
                continue;
            };
            match elements.iter_mut().find(|(known, _)| *known == encoding) {
                Some((_, sum)) => *sum += matrix.elements,
                None => elements.push((encoding, matrix.elements)),
            }
        }
        // Of equally many, the first in the program.
        let most = elements.into_iter().rev().max_by_key(|(_, elements)| *elements);
        most.map_or(Encoding::F32, |(encoding, _)| encoding)
    }

    /// The encodings of the matrices that have another than [`most`](Self::most), by name; what is
    /// decoded only is `f32`, which holds its values.
    pub fn others(&self) -> BTreeMap<String, Encoding> {
        let most = self.most();
        let all = self.matrices.iter();
        all.map(|matrix| (matrix.weight.clone(), matrix.encoding.unwrap_or(Encoding::F32)))
            .filter(|(_, encoding)| *encoding != most)
            .collect()
    }
}

/// Looks how the weight matrices of a model are stored.
///
/// Weights that a program holds in `f32` whatever it is asked for, such as norms and routers, do not
/// count. Tensors that are missing do not count either; loading lists them.
///
/// # Errors
///
/// [`StoredError`] if no program or no names are known for the model.
pub fn stored_weights(
    spec: &ModelSpec,
    source: &dyn TensorSource,
) -> Result<StoredWeights, StoredError> {
    // Whatever is stored in the encoding that is asked for follows it.
    let asked = Encoding::Bf16;
    let head = if spec.head.is_some() { Head::Logits } else { Head::Hidden };
    let program =
        build_program(spec, &BuildOptions { encoding: asked, ..BuildOptions::new(head) })?;
    let map = source.naming().map(spec, |tensor| source.shape(tensor).is_some())?;
    let entries = map.by_weight();
    let mut matrices = Vec::new();
    for (_, value) in program.of_class(Class::Weight) {
        if value.value_type.encoding() != Some(asked) {
            continue;
        }
        let slices = entries.get(value.name.as_str()).copied().unwrap_or_default();
        let Some(stored) = encoding_of(spec, slices, source) else { continue };
        matrices.push(StoredMatrix {
            weight: value.name.clone(),
            elements: value.shape.row_elements(),
            encoding: stored.and_then(|encoding| match can_have(value, slices, encoding) {
                true => Ok(encoding),
                false => Err(Widening::Unfilled(encoding)),
            }),
        });
    }
    Ok(StoredWeights { matrices })
}

/// The encoding of all tensors that hold a weight; `None` if there is none of them.
fn encoding_of(
    spec: &ModelSpec,
    slices: &[TensorSlice],
    source: &dyn TensorSource,
) -> Option<Result<Encoding, Widening>> {
    let found = slices.iter().filter_map(|slice| {
        let spellings = source.naming().spellings(spec.family, &slice.tensor);
        let tensor = spellings.into_iter().find(|name| source.shape(name).is_some())?;
        Some(source.encoding(&tensor).ok_or(Widening::Decoded))
    });
    found.reduce(
        |all, other| if all == other { all } else { all.and(other).and(Err(Widening::Unlike)) },
    )
}

/// Whether the weight can be held in that encoding without a change of any value.
fn can_have(value: &Value, slices: &[TensorSlice], encoding: Encoding) -> bool {
    if encoding.layouts().contains(&Layout::RowMajor) {
        return true;
    }
    let dims = &value.shape.0;
    let parts = dims.first().filter(|dim| dim.name == DimName::Experts).and_then(|dim| dim.size);
    let columns = slices.first().map_or(1, |slice| slice.columns).max(1);
    let rows = value.shape.row_elements() / columns / parts.unwrap_or(1).max(1);
    let is_in_panels = parts.is_none() || rows.is_multiple_of(PANEL_ROWS);
    // Codes are taken over in whole groups, and a transposed matrix has them the other way round.
    let keeps_groups =
        columns.is_multiple_of(Q8_BLOCK) && slices.iter().all(TensorSlice::keeps_rows);
    is_in_panels && keeps_groups
}
