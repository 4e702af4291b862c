//! The encoding that keeps a model as its files hold it.

use cairn_kernels::Encoding;
use cairn_program::Class;
use cairn_spec::ModelSpec;

use super::{LoadError, TensorSource};
use crate::build::{BuildError, BuildOptions, Head, build_program};

/// Why a model's stored encoding cannot be told.
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

/// The encoding in which the weight matrices of a model take the fewest bytes without a change of any
/// value: that in which all of them are stored, or `f32` where they are stored in several, or in one
/// that Cairn decodes only.
///
/// # Errors
///
/// As [`stored_encodings`].
pub fn stored_encoding(
    spec: &ModelSpec,
    source: &dyn TensorSource,
) -> Result<Encoding, StoredError> {
    Ok(match stored_encodings(spec, source)?.as_slice() {
        [Some(encoding)] => *encoding,
        _ => Encoding::F32,
    })
}

/// The encodings in which the weight matrices of a model are stored, each once, in the order of the
/// program; `None` for those that Cairn decodes only.
///
/// Weights that a program holds in `f32` whatever it is asked for, such as norms and routers, do not
/// count. Tensors that are missing do not count either; loading lists them.
///
/// # Errors
///
/// [`StoredError`] if no program or no names are known for the model.
pub fn stored_encodings(
    spec: &ModelSpec,
    source: &dyn TensorSource,
) -> Result<Vec<Option<Encoding>>, StoredError> {
    // Whatever is stored in the encoding that is asked for follows it.
    let asked = Encoding::Bf16;
    let head = if spec.head.is_some() { Head::Logits } else { Head::Hidden };
    let program =
        build_program(spec, &BuildOptions { encoding: asked, ..BuildOptions::new(head) })?;
    let map = source.naming().map(spec, |tensor| source.shape(tensor).is_some())?;
    let entries = map.by_weight();
    let mut found = Vec::new();
    for (_, weight) in program.of_class(Class::Weight) {
        if weight.value_type.encoding() != Some(asked) {
            continue;
        }
        for slice in entries.get(weight.name.as_str()).copied().unwrap_or_default() {
            let spellings = source.naming().spellings(spec.family, &slice.tensor);
            let Some(tensor) = spellings.into_iter().find(|name| source.shape(name).is_some())
            else {
                continue;
            };
            let encoding = source.encoding(&tensor);
            if !found.contains(&encoding) {
                found.push(encoding);
            }
        }
    }
    Ok(found)
}
