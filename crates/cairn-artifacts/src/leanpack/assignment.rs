//! How the encodings of a pack were chosen, where its bytes were limited.

use serde::{Deserialize, Serialize};

use super::PackErrorKind;
use crate::hash::Hash;

/// Encodings chosen under a limit of bytes, by what each costs on a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// The limit of the whole file.
    pub limit_bytes: u64,
    /// BLAKE3 of the text's token ids, four bytes each, little-endian.
    pub text: Hash,
    /// How many there are.
    pub tokens: u64,
    /// KL(as it is ‖ as it is packed) of the next token on that text, in nats.
    pub kl: f64,
    /// How much the text's perplexity changes.
    pub perplexity_change: f64,
    /// What each class of weights became, in the order of the program.
    pub classes: Vec<AssignedClass>,
}

/// What a class of weights became.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AssignedClass {
    /// The module, without its layer.
    pub class: String,
    /// Its encoding; a weight that this would not make smaller has the next wider one.
    pub encoding: String,
    /// Bytes of its weights.
    pub bytes: u64,
    /// KL(as it is ‖ with this class alone as it is packed), in nats.
    pub kl: f64,
}

impl Assignment {
    pub(super) fn check(&self) -> Result<(), PackErrorKind> {
        let numbers = [self.kl, self.perplexity_change];
        let mut numbers = numbers.into_iter().chain(self.classes.iter().map(|class| class.kl));
        if numbers.all(f64::is_finite) {
            return Ok(());
        }
        let (part, reason) = ("the assignment", "its measurements are no numbers");
        Err(PackErrorKind::Entry { part: part.to_owned(), reason: reason.to_owned() })
    }
}
