//! A program some of whose weights are stored in encodings of their own: those of a pack, or of a file
//! that has several types.
//!
//! **Invariant:** what comes out verifies, whatever the encodings are: a header that says what no kernel
//! multiplies by is refused here, by the weight's name.

use std::collections::BTreeMap;

use cairn_kernels::{Compute, Encoding};
use cairn_program::{Program, VerifyError};
use cairn_spec::ModelSpec;

use super::{BuildError, BuildOptions, build_adapted_program};
use crate::adapter::AdapterMap;

/// As [`build_adapted_program`], with encodings of their own for some matrices, by name. Names that the
/// program does not have count for nothing: it may be the first blocks of a model. Products are computed
/// in the arithmetic that is asked for wherever it multiplies what their weight is stored as, those of
/// some matrices also where it does not multiply the others.
///
/// # Errors
///
/// As [`build_adapted_program`], and [`BuildError::Stored`] naming a weight that the program cannot
/// multiply by as it would be stored.
pub fn build_stored_program(
    spec: &ModelSpec,
    options: &BuildOptions,
    adapters: &AdapterMap,
    encodings: &BTreeMap<String, Encoding>,
) -> Result<Program, BuildError> {
    if encodings.is_empty() {
        return build_adapted_program(spec, options, adapters);
    }
    let asked = options.compute;
    let multiplies_some = encodings.values().any(|encoding| asked.multiplies(*encoding));
    // What it is told below does not hang on the encoding that most have.
    let compute = if multiplies_some { Compute::F32 } else { asked };
    let options = BuildOptions { compute, ..*options };
    let mut program = build_adapted_program(spec, &options, adapters)?;
    program.store_as(encodings, asked);
    match program.verify() {
        Ok(()) => Ok(program),
        Err(error) => Err(told(error, encodings)),
    }
}

/// Names the weight whose encoding made the error, if that is what did.
fn told(error: VerifyError, encodings: &BTreeMap<String, Encoding>) -> BuildError {
    if let VerifyError::Operand { value, expected, found, .. } = &error
        && encodings.contains_key(value)
    {
        let (weight, expected, found) = (value.clone(), expected.clone(), found.clone());
        return BuildError::Stored { weight, expected, found };
    }
    BuildError::Verify(error)
}
