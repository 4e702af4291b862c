//! `RoBERTa`, XLM-R and `CamemBERT`: their bodies have BERT's tensors under BERT's names, but their first
//! position is 2 (the padding token's is 1), so the same tensors mean other numbers.
//!
//! Sources: transformers' `modeling_roberta.py` (`create_position_ids_from_input_ids`) and the files of
//! `FacebookAI/roberta-base` (514 positions, one type of tokens).

use std::collections::BTreeSet;

use cairn_spec::model::Family;

use super::{DetectError, ends};
use crate::load::TensorSource;

const QUERY: &str = "encoder.layer.0.attention.self.query.weight";
/// Names that BERT's files do not have.
const OWN: [&str; 3] = ["roberta.", "lm_head.dense.", "lm_head.layer_norm."];
/// Positions that are none: those before the first token's.
const OFFSET: usize = 2;

/// Refuses tensors that are named as those of `RoBERTa`, and bodies named as BERT's whose shapes are
/// `RoBERTa`'s, unless `asked` says that they are BERT's.
pub(super) fn refuse(
    asked: Option<Family>,
    tensors: &dyn TensorSource,
    names: &BTreeSet<String>,
) -> Result<(), DetectError> {
    if !names.iter().any(|name| ends(name, QUERY)) {
        return Ok(());
    }
    let own = names.iter().find(|name| OWN.iter().any(|prefix| name.starts_with(prefix)));
    if let Some(evidence) = own {
        return Err(DetectError::Roberta { evidence: evidence.clone(), may_be_bert: false });
    }
    let is_bare = names.contains(QUERY);
    if !is_bare || asked == Some(Family::Bert) {
        return Ok(());
    }
    let rows = |ending: &str| {
        let name = names.iter().find(|name| ends(name, ending))?;
        tensors.shape(name)?.first().copied()
    };
    let mut signs = Vec::new();
    if rows("token_type_embeddings.weight") == Some(1) {
        signs.push("there is one type of tokens".to_owned());
    }
    let positions = rows("position_embeddings.weight").unwrap_or(0);
    if positions.checked_sub(OFFSET).is_some_and(|rest| rest > OFFSET && rest.is_power_of_two()) {
        signs.push(format!("there are {positions} positions"));
    }
    if signs.is_empty() {
        return Ok(());
    }
    Err(DetectError::Roberta { evidence: signs.join(" and "), may_be_bert: true })
}
