//! Mixtures of experts in a `config.json`: what the families have in common.

use super::fields::Fields;
use crate::model::{Mlp, ModelFields, SpecError, moe::Moe};
use serde_json::{Map, Value};

/// transformers' factor on the load-balancing loss where a file says none.
const AUX_LOSS_COEF: f64 = 0.001;

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

/// The factor on the load-balancing loss; `None` where the file does not ask for one.
pub(super) fn aux_loss_coef(config: &Fields<'_>) -> Result<Option<f64>, SpecError> {
    let factor = config.real("router_aux_loss_coef")?.unwrap_or(AUX_LOSS_COEF);
    let is_asked_for = config.flag("output_router_logits", false)?;
    Ok(Some(factor).filter(|factor| is_asked_for && *factor != 0.0))
}

pub(super) fn write_aux_loss(moe: &Moe, map: &mut Map<String, Value>) {
    let factor = moe.router.aux_loss_coef;
    map.insert("output_router_logits".to_owned(), factor.is_some().into());
    if let Some(factor) = factor {
        map.insert("router_aux_loss_coef".to_owned(), factor.into());
    }
}

#[cfg(test)]
mod tests;
