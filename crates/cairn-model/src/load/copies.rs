//! Tensors that repeat another: a tied model computes with one of the two, so they must be the same.
//!
//! transformers does not tie what a file holds twice with different values. Such a file says two
//! things, and neither is chosen here.

use cairn_spec::ModelSpec;

use super::{LoadError, TensorSource};

/// Elements that are compared at a time.
const ELEMENTS_AT_A_TIME: usize = 1 << 16;

/// Compares every copy in a source, whose tensors have the right shapes, with what it repeats.
pub(super) fn check(spec: &ModelSpec, source: &dyn TensorSource) -> Result<(), LoadError> {
    if spec.head.is_none() {
        // A body computes with the embedding alone.
        return Ok(());
    }
    let naming = source.naming();
    let size = |tensor: &str| Some(source.shape(tensor)?.iter().product::<usize>());
    for (copy, original) in naming.copies(spec) {
        let spellings = naming.spellings(spec.family, &original);
        let found = spellings.into_iter().find(|name| source.shape(name).is_some());
        let (Some(original), Some(elements)) = (found, size(&copy)) else { continue };
        compare(source, (&copy, &original), elements)?;
        source.release(&copy);
        source.release(&original);
    }
    Ok(())
}

fn compare(
    source: &dyn TensorSource,
    (copy, original): (&str, &str),
    elements: usize,
) -> Result<(), LoadError> {
    let [mut copied, mut expected] = [(); 2].map(|()| vec![0.0; ELEMENTS_AT_A_TIME.min(elements)]);
    for start in (0..elements).step_by(ELEMENTS_AT_A_TIME) {
        let range = start..elements.min(start + ELEMENTS_AT_A_TIME);
        for (name, values) in [(copy, &mut copied), (original, &mut expected)] {
            let unreadable = |problem| LoadError::Unreadable { name: name.to_owned(), problem };
            let values = &mut values[..range.len()];
            source.read_f32(name, range.clone(), values).map_err(unreadable)?;
        }
        let mut pairs = copied.iter().zip(&expected).take(range.len());
        if let Some(at) = pairs.position(|(a, b)| a.to_bits() != b.to_bits()) {
            return Err(LoadError::Copy {
                copy: copy.to_owned(),
                original: original.to_owned(),
                element: start + at,
                copied: copied[at].to_string().into(),
                expected: expected[at].to_string().into(),
            });
        }
    }
    Ok(())
}
