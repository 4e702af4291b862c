//! Which model is this: a spec from a `config.json`, confirmed by the tensors; or, where there is
//! no such file, the family from the tensors' names and a question about what shapes cannot tell.
//!
//! Shapes never decide what a configuration says. A file without a configuration is read from what
//! the caller tells (the same names as in `config.json`), and from shapes only where they leave one
//! reading: the vocabulary, the width, the number of layers and experts.
//!
//! - `fingerprint`: how each family names its tensors, and what is asked of its models.
//! - `roberta`: models that name their tensors as BERT does and count their positions from two.
//! - `shapes`: what names and shapes tell.

mod fingerprint;
mod roberta;
mod shapes;

use std::collections::BTreeSet;

use cairn_spec::model::{Family, SpecError};
use cairn_spec::{Hint, ModelSpec};
use serde_json::{Map, Value};

use self::fingerprint::{FINGERPRINTS, Fingerprint, questions};
use crate::load::{LoadError, TensorSource, check_tensors};
use crate::names::TensorMap;

pub use self::fingerprint::assumed_fields;

/// Why it is not known which model this is.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DetectError {
    /// The tensors' names are those of no known family.
    #[error("the tensors are named after no family that is known, for example {example}")]
    UnknownNames {
        /// One of them.
        example: String,
    },
    /// Several families name their tensors like this.
    #[error("the tensors may be those of a model of {}", list(.families))]
    Ambiguous {
        /// The families.
        families: Vec<Family>,
    },
    /// The tensors are, or may be, those of a model that computes something else of tensors that are
    /// named like BERT's.
    #[error(
        "the tensors {} those of roberta, xlm-roberta or camembert, which number positions from 2: {evidence}",
        if *.may_be_bert { "may be those of bert, or" } else { "are" }
    )]
    Roberta {
        /// What of them says so.
        evidence: String,
        /// Whether BERT may have it as well.
        may_be_bert: bool,
    },
    /// The configuration and the tensors' names tell different families.
    #[error(
        "config.json says {configured}, but the tensors are named as in a model of {}",
        list(.named)
    )]
    OtherFamily {
        /// What the configuration says.
        configured: Family,
        /// What the names say.
        named: Vec<Family>,
    },
    /// Shapes cannot tell what the model needs.
    #[error("a {family} model; its tensors do not tell {}", .questions.join(", "))]
    Incomplete {
        /// The family.
        family: Family,
        /// What must be told, by the names of `config.json`.
        questions: Vec<&'static str>,
    },
    /// The configuration does not describe a model.
    #[error("the configuration does not describe a model")]
    Spec(#[from] SpecError),
    /// The configuration and the tensors disagree.
    #[error("the tensors are not those that the configuration describes")]
    Tensors(#[from] LoadError),
}

impl Hint for DetectError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::UnknownNames { .. } => {
                let families: Vec<&str> = Family::ALL.iter().map(|f| f.model_type()).collect();
                vec![format!("known families: {}", families.join(", "))]
            }
            Self::Ambiguous { .. } => vec![
                "set model_type to one of them if the model is of that family".to_owned(),
                "families that are not known, such as gemma and granite, have the same names and \
                 cannot be used"
                    .to_owned(),
            ],
            Self::Roberta { may_be_bert: true, .. } => {
                vec!["set model_type to bert if it is one".to_owned()]
            }
            Self::Roberta { .. } => Vec::new(),
            Self::OtherFamily { .. } => {
                vec!["the config.json and the tensors belong to different models".to_owned()]
            }
            Self::Incomplete { family, .. } => {
                let mut hints = vec![
                    "put the model's own config.json beside the tensors, or set them".to_owned(),
                ];
                if *family == Family::Olmo2 {
                    let why = "most of its layers have a window";
                    hints.push(format!("OLMo 3 has the same names and cannot be used: {why}"));
                }
                hints
            }
            Self::Spec(error) => error.hints(),
            Self::Tensors(_) => Vec::new(),
        }
    }
}

fn list(families: &[Family]) -> String {
    let names: Vec<&str> = families.iter().map(|family| family.model_type()).collect();
    names.join(" or ")
}

/// The spec of the model that `tensors` hold.
///
/// `config` is what its `config.json` says; or, where there is none, what the caller knows, by the
/// same names. The tensors confirm it: a family that the names do not fit, and tensors that are
/// missing, too many or of other shapes are refused with both readings.
///
/// # Errors
///
/// [`DetectError`] names the families in question, what must be told, or what disagrees.
///
/// ```
/// use cairn_model::{DetectError, TensorSource, detect_model_spec};
/// # use std::ops::Range;
/// # struct Named(Vec<(&'static str, Vec<usize>)>);
/// # impl TensorSource for Named {
/// #     fn names(&self) -> Vec<String> { self.0.iter().map(|(name, _)| (*name).to_owned()).collect() }
/// #     fn shape(&self, name: &str) -> Option<Vec<usize>> {
/// #         self.0.iter().find(|(n, _)| *n == name).map(|(_, shape)| shape.clone())
/// #     }
/// #     fn read_f32(&self, _: &str, _: Range<usize>, _: &mut [f32]) -> Result<(), String> { Ok(()) }
/// # }
/// // GPT-2's shapes fit 12 heads of 64 as well as 24 of 32, so the heads are asked for.
/// let tensors = Named(vec![("h.0.attn.c_attn.weight", vec![768, 2304])]);
/// let error = detect_model_spec(&serde_json::Map::new(), &tensors).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "a gpt2 model; its tensors do not tell n_head, layer_norm_epsilon, activation_function, \
///      scale_attn_weights, scale_attn_by_inverse_layer_idx"
/// );
/// ```
pub fn detect_model_spec(
    config: &Map<String, Value>,
    tensors: &dyn TensorSource,
) -> Result<ModelSpec, DetectError> {
    let names: BTreeSet<String> = tensors.names().into_iter().collect();
    let named = families_named(&names);
    // A configuration says at least how large the vocabulary is; answers need not.
    let spec = if config.contains_key("model_type") && config.contains_key("vocab_size") {
        ModelSpec::from_hf_config(&Value::Object(config.clone()))?
    } else {
        from_tensors(config, tensors, &names, &named)?
    };
    if !named.is_empty() && !named.contains(&spec.family) {
        return Err(DetectError::OtherFamily { configured: spec.family, named });
    }
    let map = TensorMap::of_tensors(&spec, |name| names.contains(name));
    check_tensors(&spec, &map, (tensors, tensors.naming())).map(drop)?;
    Ok(spec)
}

/// Families that name their tensors like this.
fn families_named(names: &BTreeSet<String>) -> Vec<Family> {
    let is_there = |ending: &&str| names.iter().any(|name| ends(name, ending));
    let fits = |print: &&Fingerprint| {
        print.present.iter().all(&is_there) && !print.absent.iter().any(&is_there)
    };
    let families: BTreeSet<Family> =
        FINGERPRINTS.iter().filter(fits).map(|print| print.family).collect();
    families.into_iter().collect()
}

/// Whether a name is `ending`, or ends in it after a dot.
fn ends(name: &str, ending: &str) -> bool {
    name.strip_suffix(ending).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A spec from what the caller told, and from shapes what they tell alone.
fn from_tensors(
    told: &Map<String, Value>,
    tensors: &dyn TensorSource,
    names: &BTreeSet<String>,
    named: &[Family],
) -> Result<ModelSpec, DetectError> {
    let asked = match told.get("model_type").and_then(Value::as_str) {
        None => None,
        Some(name) => Some(Family::from_model_type(name).ok_or_else(|| {
            DetectError::Spec(SpecError::UnsupportedFamily { model_type: name.to_owned() })
        })?),
    };
    roberta::refuse(asked, tensors, names)?;
    let family = match (asked, named) {
        (_, []) => {
            let example = names.first().cloned().unwrap_or_else(|| "no tensor at all".to_owned());
            return Err(DetectError::UnknownNames { example });
        }
        (None, [family]) => *family,
        (None, _) => return Err(DetectError::Ambiguous { families: named.to_vec() }),
        (Some(family), _) if named.contains(&family) => family,
        (Some(configured), _) => {
            return Err(DetectError::OtherFamily { configured, named: named.to_vec() });
        }
    };
    let mut config = shapes::read(family, told, tensors, names);
    let open = questions(family)
        .iter()
        .filter(|question| !question.is_settled(told) && !config.contains_key(question.field));
    let open: Vec<&'static str> = open.map(|question| question.field).collect();
    if !open.is_empty() {
        return Err(DetectError::Incomplete { family, questions: open });
    }
    config.extend(told.clone());
    config.insert("model_type".to_owned(), family.model_type().into());
    Ok(ModelSpec::from_hf_config(&Value::Object(config))?)
}
