//! Mixtures of experts in a `config.json`: what the families have in common.

use super::fields::Fields;
use crate::model::{Mlp, ModelFields, SpecError, moe::Moe};

/// Replaces the feed-forward part that the shared reader gave by the mixture that `make` makes of its
/// activation and inner width.
pub(super) fn replace(
    fields: &mut ModelFields,
    make: impl FnOnce(crate::Activation, usize) -> Result<Moe, SpecError>,
) -> Result<(), SpecError> {
    let (activation, width) = (fields.mlp.activation(), fields.mlp.intermediate_size());
    fields.mlp = Mlp::Moe(make(activation, width)?);
    Ok(())
}

/// The number of experts, under either of transformers' names.
pub(super) fn number(config: &Fields<'_>) -> Result<usize, SpecError> {
    let number = config.size_of_either("num_local_experts", "num_experts")?;
    number.ok_or_else(|| config.missing("num_local_experts"))
}

#[cfg(test)]
mod tests;
