//! Which model is this: a spec from a `config.json`, confirmed by the tensors; or, where there is
//! no such file, the family from the tensors' names and a question about what shapes cannot tell.
//!
//! Shapes never decide what a configuration says. A file without a configuration is read from what
//! the caller tells (the same names as in `config.json`), and from shapes only where they leave one
//! reading: the vocabulary, the width, the number of layers.

use std::collections::BTreeSet;

use cairn_spec::model::{Family, SpecError};
use cairn_spec::{Hint, ModelSpec};
use serde_json::{Map, Value};

use crate::load::{LoadError, TensorSource, check_tensors};
use crate::names::TensorMap;

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
            Self::Ambiguous { .. } => vec!["set model_type to one of them".to_owned()],
            Self::OtherFamily { .. } => {
                vec!["the config.json and the tensors belong to different models".to_owned()]
            }
            Self::Incomplete { .. } => {
                vec!["put the model's own config.json beside the tensors, or set them".to_owned()]
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

/// What tells a family from the others by its first block's tensors, and what shapes leave open.
struct Fingerprint {
    family: Family,
    /// Endings of tensors that are there.
    present: &'static [&'static str],
    /// Endings of tensors that are not.
    absent: &'static [&'static str],
    /// Fields that decide numbers and that no shape tells.
    questions: &'static [&'static str],
}

const Q: &str = "layers.0.self_attn.q_proj.weight";
const Q_NORM: &str = "layers.0.self_attn.q_norm.weight";
const Q_BIAS: &str = "layers.0.self_attn.q_proj.bias";
const PRE_FEEDFORWARD: &str = "layers.0.pre_feedforward_layernorm.weight";
const INPUT_NORM: &str = "layers.0.input_layernorm.weight";
/// What no rotated decoder's shapes tell.
const DECODER: &[&str] = &[
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
];
const GEMMA: &[&str] = &[
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "query_pre_attn_scalar",
    "sliding_window",
];

const FINGERPRINTS: [Fingerprint; 12] = [
    Fingerprint {
        family: Family::Llama,
        present: &[Q, INPUT_NORM],
        absent: &[Q_NORM, Q_BIAS, PRE_FEEDFORWARD],
        questions: DECODER,
    },
    Fingerprint {
        family: Family::Mistral,
        present: &[Q, INPUT_NORM],
        absent: &[Q_NORM, Q_BIAS, PRE_FEEDFORWARD],
        questions: DECODER,
    },
    Fingerprint {
        family: Family::Qwen2,
        present: &[Q, Q_BIAS],
        absent: &[Q_NORM, PRE_FEEDFORWARD],
        questions: DECODER,
    },
    Fingerprint {
        family: Family::Qwen3,
        present: &[Q, Q_NORM, INPUT_NORM],
        absent: &[PRE_FEEDFORWARD],
        questions: DECODER,
    },
    Fingerprint {
        family: Family::Olmo2,
        present: &[Q, Q_NORM],
        absent: &[INPUT_NORM],
        questions: DECODER,
    },
    Fingerprint {
        family: Family::Gemma2,
        present: &[Q, PRE_FEEDFORWARD],
        absent: &[Q_NORM],
        questions: GEMMA,
    },
    Fingerprint {
        family: Family::Gemma3Text,
        present: &[Q, PRE_FEEDFORWARD, Q_NORM],
        absent: &[],
        questions: GEMMA,
    },
    Fingerprint {
        family: Family::Phi3,
        present: &["layers.0.self_attn.qkv_proj.weight"],
        absent: &[],
        questions: DECODER,
    },
    Fingerprint {
        family: Family::Gpt2,
        present: &["h.0.attn.c_attn.weight"],
        absent: &[],
        questions: &["n_head", "layer_norm_epsilon"],
    },
    Fingerprint {
        family: Family::GptNeox,
        present: &["layers.0.attention.query_key_value.weight"],
        absent: &[],
        questions: &[
            "num_attention_heads",
            "layer_norm_eps",
            "rotary_pct",
            "rotary_emb_base",
            "use_parallel_residual",
            "max_position_embeddings",
        ],
    },
    Fingerprint {
        family: Family::Bert,
        present: &["encoder.layer.0.attention.self.query.weight"],
        absent: &[],
        questions: &["num_attention_heads", "layer_norm_eps"],
    },
    Fingerprint {
        family: Family::ModernBert,
        present: &["layers.0.attn.Wqkv.weight"],
        absent: &[],
        questions: &[
            "num_attention_heads",
            "norm_eps",
            "local_attention",
            "global_attn_every_n_layers",
            "max_position_embeddings",
        ],
    },
];

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
///     "a gpt2 model; its tensors do not tell n_head, layer_norm_epsilon"
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
    let known = FINGERPRINTS.iter().any(|print| print.family == spec.family);
    if known && !named.is_empty() && !named.contains(&spec.family) {
        return Err(DetectError::OtherFamily { configured: spec.family, named });
    }
    let map = TensorMap::of_tensors(&spec, |name| names.contains(name));
    check_tensors(&spec, &map, (tensors, tensors.naming())).map(drop)?;
    Ok(spec)
}

/// Families that name the tensors of a first block like this.
fn families_named(names: &BTreeSet<String>) -> Vec<Family> {
    if names.iter().any(|name| name.contains(".experts.")) {
        // Mixtures of experts are told by their configuration only.
        return Vec::new();
    }
    let is_there = |ending: &&str| names.iter().any(|name| ends(name, ending));
    let fits = |print: &&Fingerprint| {
        print.present.iter().all(&is_there) && !print.absent.iter().any(&is_there)
    };
    FINGERPRINTS.iter().filter(fits).map(|print| print.family).collect()
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
    let asked = told.get("model_type").and_then(Value::as_str).and_then(Family::from_model_type);
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
    let print = FINGERPRINTS.iter().find(|print| print.family == family);
    let questions = print.map_or(&[][..], |print| print.questions).iter().copied();
    let open: Vec<&'static str> = questions.filter(|name| !told.contains_key(*name)).collect();
    if !open.is_empty() {
        return Err(DetectError::Incomplete { family, questions: open });
    }
    let mut config = read_shapes(family, tensors, names);
    config.extend(told.clone());
    config.insert("model_type".to_owned(), family.model_type().into());
    Ok(ModelSpec::from_hf_config(&Value::Object(config))?)
}

/// Names of the tensors whose shapes tell sizes: embedding, feed-forward projection with the inner
/// width first (last where it is stored transposed), positions.
const fn sizes_of(family: Family) -> [&'static str; 3] {
    match family {
        Family::Gpt2 => ["wte.weight", "h.0.mlp.c_fc.weight", "wpe.weight"],
        Family::GptNeox => ["embed_in.weight", "layers.0.mlp.dense_h_to_4h.weight", ""],
        Family::Bert => [
            "word_embeddings.weight",
            "layer.0.intermediate.dense.weight",
            "position_embeddings.weight",
        ],
        Family::ModernBert => ["tok_embeddings.weight", "layers.0.mlp.Wo.weight", ""],
        Family::Phi3 => ["embed_tokens.weight", "layers.0.mlp.down_proj.weight", ""],
        _ => ["embed_tokens.weight", "layers.0.mlp.gate_proj.weight", ""],
    }
}

/// The sizes that shapes tell without a second reading.
fn read_shapes(
    family: Family,
    tensors: &dyn TensorSource,
    names: &BTreeSet<String>,
) -> Map<String, Value> {
    let mut config = Map::new();
    let mut set = |name: &str, size: Option<usize>| {
        if let Some(size) = size {
            config.insert(name.to_owned(), size.into());
        }
    };
    let shape = |ending: &str| -> Option<Vec<usize>> {
        let name = names.iter().find(|name| !ending.is_empty() && ends(name, ending))?;
        tensors.shape(name).filter(|shape| shape.len() == 2)
    };
    let [embedding, inner, positions] = sizes_of(family).map(shape);
    set("vocab_size", embedding.as_ref().map(|shape| shape[0]));
    set("hidden_size", embedding.as_ref().map(|shape| shape[1]));
    let inner_axis = match family {
        Family::Gpt2 | Family::ModernBert | Family::Phi3 => 1,
        _ => 0,
    };
    let inner_name = if family == Family::Gpt2 { "n_inner" } else { "intermediate_size" };
    set(inner_name, inner.map(|shape| shape[inner_axis]));
    set("max_position_embeddings", positions.map(|shape| shape[0]));
    set("num_hidden_layers", Some(blocks(names)));
    let tied = !["lm_head.weight", "embed_out.weight", "decoder.weight"]
        .iter()
        .any(|ending| names.iter().any(|name| ends(name, ending)));
    config.insert("tie_word_embeddings".to_owned(), tied.into());
    config
}

/// One more than the highest number of a block.
fn blocks(names: &BTreeSet<String>) -> usize {
    let number = |name: &String| {
        let mut parts = name.split('.');
        parts.find(|part| ["layers", "layer", "h"].contains(part))?;
        parts.next()?.parse::<usize>().ok()
    };
    names.iter().filter_map(number).max().map_or(0, |last| last.saturating_add(1))
}
