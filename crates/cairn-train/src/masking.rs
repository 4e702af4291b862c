//! Masked-LM: which tokens of a batch are taken away, and what stands in their place.
//!
//! A choice is a function of (seed, step, token) and of nothing else: not of how a batch is cut, nor
//! of what was drawn before it. Only chosen tokens are targets. Special tokens structure a text and
//! are never chosen; neither is filling.
//!
//! Sequences are pieces of documents as they lie in the corpus; nothing is put around them.

use std::collections::BTreeSet;

use cairn_data::loader::LoaderBatch;
use cairn_data::tokenizer::Tokenizer;
use cairn_kernels::splitmix;
use cairn_spec::recipe::MaskedLm;

use crate::error::TrainError;

/// Spellings of the mask token that tokenizers use.
const SPELLINGS: [&str; 3] = ["[MASK]", "<mask>", "<|mask|>"];

/// Draws that decide one token, each a stream of its own.
#[derive(Clone, Copy)]
enum Draw {
    /// Whether it is chosen.
    Choice = 1,
    /// What stands in its place.
    Replacement = 2,
    /// Which random token.
    Token = 3,
}

/// Masks, as a formula.
#[derive(Clone, Debug)]
pub struct Masking {
    settings: MaskedLm,
    mask: u32,
    vocab_size: u32,
    specials: BTreeSet<u32>,
}

impl Masking {
    /// Masks for the tokens of `tokenizer`.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoMaskToken`] if it has no token of the spelling asked for, or of a usual one.
    pub fn new(settings: &MaskedLm, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let spellings: Vec<&str> = match &settings.mask_token {
            Some(spelling) => vec![spelling.as_str()],
            None => SPELLINGS.to_vec(),
        };
        let mask = spellings.iter().find_map(|spelling| tokenizer.token_id(spelling));
        let mask = mask.ok_or_else(|| TrainError::NoMaskToken {
            spellings: spellings.iter().map(|spelling| (*spelling).to_owned()).collect(),
        })?;
        let specials = tokenizer.specials().keys().copied().chain([mask]).collect();
        let vocab_size = tokenizer.vocab_size();
        Ok(Self { settings: settings.clone(), mask, vocab_size, specials })
    }

    /// What stands in the place of token number `token` of a step; `None` if it is not chosen.
    pub fn replaced(&self, id: u32, seed: u64, step: u64, token: u64) -> Option<u32> {
        if self.specials.contains(&id) {
            return None;
        }
        let draw = |draw: Draw| share(bits(seed, step, token, draw));
        if draw(Draw::Choice) >= self.settings.mlm_probability {
            return None;
        }
        let replacement = draw(Draw::Replacement);
        let MaskedLm { mask_replace_prob, random_replace_prob, .. } = self.settings;
        Some(if replacement < mask_replace_prob {
            self.mask
        } else if replacement < mask_replace_prob + random_replace_prob {
            let random = bits(seed, step, token, Draw::Token) % u64::from(self.vocab_size);
            u32::try_from(random).expect("below the vocabulary's size")
        } else {
            id
        })
    }

    /// The batch of a step as it is read and predicted. Where chance chose nothing at all, the first
    /// token that may be chosen is masked: a step without a target has no loss.
    pub fn apply(&self, mut batch: LoaderBatch, seed: u64, step: u64) -> LoaderBatch {
        batch.targets.clone_from(&batch.ids);
        let mut first = None;
        let mut chosen = false;
        for index in 0..batch.ids.len() {
            let id = batch.ids[index];
            let is_text = batch.loss_weights[index] > 0.0 && !self.specials.contains(&id);
            batch.loss_weights[index] = 0.0;
            if !is_text {
                continue;
            }
            first = first.or(Some(index));
            if let Some(replaced) = self.replaced(id, seed, step, index as u64) {
                batch.ids[index] = replaced;
                batch.loss_weights[index] = 1.0;
                chosen = true;
            }
        }
        if let Some(first) = first.filter(|_| !chosen) {
            batch.ids[first] = self.mask;
            batch.loss_weights[first] = 1.0;
        }
        batch
    }
}

fn bits(seed: u64, step: u64, token: u64, draw: Draw) -> u64 {
    splitmix(splitmix(splitmix(splitmix(seed) ^ step) ^ token) ^ draw as u64)
}

/// A number from 0 to below 1.
fn share(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_data::loader::Sequence;

    fn masking() -> Masking {
        let settings = MaskedLm {
            mlm_probability: 0.15,
            mask_replace_prob: 0.8,
            random_replace_prob: 0.1,
            mask_token: None,
        };
        Masking { settings, mask: 4, vocab_size: 1000, specials: (0..5).collect() }
    }

    fn batch(ids: Vec<u32>) -> LoaderBatch {
        let count = ids.len();
        LoaderBatch {
            positions: (0..u32::try_from(count).unwrap()).collect(),
            targets: vec![9; count],
            loss_weights: vec![1.0; count],
            sequences: vec![Sequence { start: 0, len: count }],
            row_tokens: count,
            ids,
        }
    }

    #[test]
    fn shares_are_those_asked_for_and_only_the_chosen_are_targets() {
        let ids: Vec<u32> = (0..200_000).map(|i| 5 + i % 900).collect();
        let masked = masking().apply(batch(ids.clone()), 7, 3);
        assert_eq!(masked.targets, ids);
        let chosen: Vec<usize> = (0..ids.len()).filter(|&i| masked.loss_weights[i] > 0.0).collect();
        let near = |count: usize, of: usize, share: f64| {
            let found = count as f64 / of as f64;
            assert!((found - share).abs() < 0.01, "{found}, expected {share}");
        };
        near(chosen.len(), ids.len(), 0.15);
        let masks = chosen.iter().filter(|&&i| masked.ids[i] == 4).count();
        let kept = chosen.iter().filter(|&&i| masked.ids[i] == ids[i]).count();
        near(masks, chosen.len(), 0.8);
        near(kept, chosen.len(), 0.1);
        let altered = (0..ids.len()).filter(|&i| masked.ids[i] != ids[i]);
        assert!(altered.into_iter().all(|i| masked.loss_weights[i] > 0.0));
    }

    #[test]
    fn a_choice_depends_on_seed_step_and_token_alone() {
        let masking = masking();
        let ids: Vec<u32> = (0..4000).map(|i| 5 + i % 900).collect();
        let whole = masking.apply(batch(ids.clone()), 7, 3);
        assert_eq!(masking.apply(batch(ids.clone()), 7, 3), whole);
        assert_ne!(masking.apply(batch(ids.clone()), 7, 4).ids, whole.ids);
        assert_ne!(masking.apply(batch(ids.clone()), 8, 3).ids, whole.ids);
        let shorter = masking.apply(batch(ids[..100].to_vec()), 7, 3);
        assert_eq!(shorter.ids, whole.ids[..100]);
    }

    #[test]
    fn special_tokens_and_filling_are_never_chosen_and_no_step_is_without_a_target() {
        let mut given = batch(vec![0, 2, 60, 61]);
        given.loss_weights[3] = 0.0;
        for step in 0..200 {
            let masked = masking().apply(given.clone(), 1, step);
            assert_eq!(masked.loss_weights, [0.0, 0.0, 1.0, 0.0], "step {step}");
        }
    }
}
