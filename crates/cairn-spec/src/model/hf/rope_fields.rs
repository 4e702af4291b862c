//! The rotation in a `config.json`, in its newer (`rope_parameters`) and older (`rope_theta`,
//! `rope_scaling`) style.

use super::fields::{Fields, quote};
use super::foreign::unsupported;
use super::windows::{FULL, SLIDING};
use crate::model::validate;
use crate::model::{
    Family, HEAD_DIM_MAX, Llama3Scaling, LongropeScaling, Rope, RopeScaling, SpecError, YarnScaling,
};
use serde_json::{Map, Value, json};

/// What a family calls the parts of its rotation, and what they are where the file does not say.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    /// Name of the base outside `rope_parameters`.
    pub(super) theta: &'static str,
    /// The base, where the file does not say.
    pub(super) default_theta: f64,
    /// Name of the rotated share of a head outside `rope_parameters`, and that share where the
    /// file does not say; `None` for a family that always rotates whole heads.
    pub(super) partial: Option<(&'static str, f64)>,
    /// The kind of layer under whose name `rope_parameters` has this rotation, for a family that
    /// has one for each kind.
    pub(super) layer_type: Option<&'static str>,
    /// Whether `rope_scaling` is about this rotation.
    pub(super) scaled: bool,
}

impl Keys {
    /// LLaMA's.
    pub(super) const WHOLE_HEAD: Self = Self {
        theta: "rope_theta",
        default_theta: 10_000.0,
        partial: None,
        layer_type: None,
        scaled: true,
    };
}

/// Names that a rotation object may hold. A rule reads those it knows and, like transformers,
/// leaves the others alone.
const KNOWN: [&str; 15] = [
    "short_factor",
    "long_factor",
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
];

/// The kinds of layers that may have a rotation each.
const LAYER_TYPES: [&str; 2] = [FULL, SLIDING];

/// What a rotation needs to know about the rest of the file.
#[derive(Clone, Copy)]
pub(super) struct Around {
    pub(super) family: Family,
    pub(super) head_dim: usize,
    pub(super) max_position_embeddings: usize,
    /// Outside the rotation's own object, where the file has it (Phi-3).
    pub(super) original_max_position_embeddings: Option<usize>,
    pub(super) keys: Keys,
}

/// Reads the rotation of a family that pairs the halves of what it rotates.
pub(super) fn read(config: &Fields<'_>, around: Around) -> Result<Rope, SpecError> {
    let newer = newer_object(config, around)?;
    let older = config.object("rope_scaling")?.filter(|_| around.keys.scaled);
    let newer = newer.map(|object| read_object(config, &object, around)).transpose()?;
    let older = older.map(|object| read_object(config, &object, around)).transpose()?;
    let quoted = |field| config.value(field).map(quote).unwrap_or_default();
    match (newer, older) {
        (Some(newer), Some(older)) if newer != older => Err(SpecError::Contradiction {
            first: "rope_parameters".to_owned(),
            first_value: quoted("rope_parameters"),
            second: "rope_scaling".to_owned(),
            second_value: quoted("rope_scaling"),
        }),
        (Some(rope), _) | (None, Some(rope)) => Ok(rope),
        (None, None) => {
            let theta = config.real(around.keys.theta)?.unwrap_or(around.keys.default_theta);
            Ok(Rope::new(theta, rotary_dim(config, None, around)?))
        }
    }
}

fn newer_object<'a>(config: &Fields<'a>, around: Around) -> Result<Option<Fields<'a>>, SpecError> {
    let (Some(all), Some(layer_type)) = (config.object("rope_parameters")?, around.keys.layer_type)
    else {
        return config.object("rope_parameters");
    };
    for key in all.keys() {
        if let (Some(value), false) = (all.value(key), LAYER_TYPES.contains(&key.as_str())) {
            return Err(unsupported(&all, key, value, around.family));
        }
    }
    all.object(layer_type)
}

fn read_object(
    config: &Fields<'_>,
    object: &Fields<'_>,
    around: Around,
) -> Result<Rope, SpecError> {
    for key in object.keys() {
        let value = object.value(key);
        let partial = key == "partial_rotary_factor"
            && (around.keys.partial.is_some()
                || value.is_none_or(|v| v.as_f64().is_some_and(|v| v.total_cmp(&1.0).is_eq())));
        if let (Some(value), false) = (value, partial || KNOWN.contains(&key.as_str())) {
            return Err(unsupported(object, key, value, around.family));
        }
    }
    Ok(Rope {
        theta: read_theta(config, object, around.keys)?,
        rotary_dim: rotary_dim(config, Some(object), around)?,
        interleaved: false,
        scaling: read_scaling(object, around)?,
    })
}

/// Dimensions that are rotated: a share of the head, cut to a whole number.
fn rotary_dim(
    config: &Fields<'_>,
    object: Option<&Fields<'_>>,
    around: Around,
) -> Result<usize, SpecError> {
    let Some((name, default)) = around.keys.partial else { return Ok(around.head_dim) };
    let inner = object.map_or(Ok(None), |object| object.real("partial_rotary_factor"))?;
    let (name, outer) = match config.real(name)? {
        None => ("partial_rotary_factor", config.real("partial_rotary_factor")?),
        share => (name, share),
    };
    let share = match (inner, outer) {
        (Some(inner), Some(outer)) if inner.total_cmp(&outer).is_ne() => {
            return Err(SpecError::Contradiction {
                first: object
                    .map_or_else(String::new, |object| object.name("partial_rotary_factor")),
                first_value: inner.to_string(),
                second: name.to_owned(),
                second_value: outer.to_string(),
            });
        }
        (inner, outer) => inner.or(outer).unwrap_or(default),
    };
    validate::real("partial_rotary_factor", share, 0.0, 1.0)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "cut as transformers cuts it; a head above 2^12 is refused later"
    )]
    let dims = (around.head_dim.min(HEAD_DIM_MAX + 1) as f64 * share) as usize;
    Ok(dims)
}

fn read_theta(config: &Fields<'_>, object: &Fields<'_>, keys: Keys) -> Result<f64, SpecError> {
    match (object.real("rope_theta")?, config.real(keys.theta)?) {
        (Some(inner), Some(outer)) if inner.total_cmp(&outer).is_ne() => {
            Err(SpecError::Contradiction {
                first: object.name("rope_theta"),
                first_value: inner.to_string(),
                second: keys.theta.to_owned(),
                second_value: outer.to_string(),
            })
        }
        (inner, outer) => Ok(inner.or(outer).unwrap_or(keys.default_theta)),
    }
}

fn read_scaling(object: &Fields<'_>, around: Around) -> Result<RopeScaling, SpecError> {
    let rope_type = match (object.text("rope_type")?, object.text("type")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(SpecError::Contradiction {
                first: object.name("rope_type"),
                first_value: new,
                second: object.name("type"),
                second_value: old,
            });
        }
        (new, old) => new.or(old).unwrap_or_else(|| "default".to_owned()),
    };
    match rope_type.as_str() {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: object.required_real("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3(Llama3Scaling {
            factor: object.required_real("factor")?,
            low_freq_factor: object.required_real("low_freq_factor")?,
            high_freq_factor: object.required_real("high_freq_factor")?,
            original_max_position_embeddings: original_length(object, around)?,
        })),
        // Phi-3 files once called its own rule by these names.
        "su" | "yarn" if around.family == Family::Phi3 => read_longrope(object, around),
        "yarn" => read_yarn(object, around),
        "longrope" => read_longrope(object, around),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: object.required_real("factor")?,
            original_max_position_embeddings: around.max_position_embeddings,
        }),
        _ => Err(unsupported(object, "rope_type", &rope_type.into(), around.family)),
    }
}

fn read_yarn(object: &Fields<'_>, around: Around) -> Result<RopeScaling, SpecError> {
    let original = original_length(object, around)?;
    // As in transformers: a factor that is null is the ratio of the lengths, and zero counts as
    // absent for the two bounds.
    #[expect(clippy::cast_precision_loss, reason = "lengths above 2^24 are refused later")]
    let ratio = around.max_position_embeddings as f64 / original as f64;
    let nonzero = |value: Option<f64>| value.filter(|value| *value != 0.0);
    Ok(RopeScaling::Yarn(YarnScaling {
        factor: object.real("factor")?.unwrap_or(ratio),
        original_max_position_embeddings: original,
        beta_fast: nonzero(object.real("beta_fast")?).unwrap_or(32.0),
        beta_slow: nonzero(object.real("beta_slow")?).unwrap_or(1.0),
        attention_factor: object.real("attention_factor")?,
        mscale: object.real("mscale")?,
        mscale_all_dim: object.real("mscale_all_dim")?,
        truncate: object.flag("truncate", true)?,
    }))
}

fn read_longrope(object: &Fields<'_>, around: Around) -> Result<RopeScaling, SpecError> {
    let original = original_length(object, around)?;
    #[expect(clippy::cast_precision_loss, reason = "lengths above 2^24 are refused later")]
    let ratio = around.max_position_embeddings as f64 / original as f64;
    let factors = |field: &str| object.reals(field)?.ok_or_else(|| object.missing(field));
    Ok(RopeScaling::Longrope(LongropeScaling {
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        factor: object.real("factor")?.unwrap_or(ratio),
        attention_factor: object.real("attention_factor")?,
        original_max_position_embeddings: original,
    }))
}

/// The file's own length outside the object counts before the one inside, as in transformers.
fn original_length(object: &Fields<'_>, around: Around) -> Result<usize, SpecError> {
    let inside = object.size("original_max_position_embeddings")?;
    let original = around.original_max_position_embeddings.or(inside);
    Ok(original.unwrap_or(around.max_position_embeddings))
}

/// Writes the rotation in both styles.
pub(super) fn write(rope: &Rope, keys: Keys, head_dim: usize, map: &mut Map<String, Value>) {
    let share = keys.partial.map(|(name, _)| (name, share(rope.rotary_dim, head_dim)));
    let mut parameters = parameters(rope);
    if let Some((name, share)) = share {
        parameters.insert("partial_rotary_factor".to_owned(), share.into());
        map.insert(name.to_owned(), share.into());
    }
    map.insert("rope_parameters".to_owned(), Value::Object(parameters));
    map.insert("rope_scaling".to_owned(), older(rope));
    map.insert(keys.theta.to_owned(), rope.theta.into());
}

/// Writes the rotations of a family that has one for each kind of layer, in both styles.
pub(super) fn write_both(full: (&Rope, Keys), local: (&Rope, Keys), map: &mut Map<String, Value>) {
    let mut both = Map::new();
    for ((rope, keys), layer_type) in [(full, FULL), (local, SLIDING)] {
        both.insert(layer_type.to_owned(), Value::Object(parameters(rope)));
        map.insert(keys.theta.to_owned(), rope.theta.into());
    }
    map.insert("rope_parameters".to_owned(), Value::Object(both));
    // One object for both kinds cannot say two things.
    let sayable = !local.1.scaled || full.0.scaling == local.0.scaling;
    let scaling = if sayable { older(full.0) } else { Value::Null };
    map.insert("rope_scaling".to_owned(), scaling);
}

/// The newer style's object.
fn parameters(rope: &Rope) -> Map<String, Value> {
    let (rope_type, scaling) = match &rope.scaling {
        RopeScaling::Default => ("default", Map::new()),
        RopeScaling::Linear { factor } => ("linear", object(json!({ "factor": factor }))),
        RopeScaling::Dynamic { factor, .. } => ("dynamic", object(json!({ "factor": factor }))),
        RopeScaling::Llama3(llama3) => ("llama3", object(json!(llama3))),
        RopeScaling::Yarn(yarn) => ("yarn", object(json!(yarn))),
        RopeScaling::Longrope(longrope) => ("longrope", object(json!(longrope))),
    };
    let mut parameters: Map<String, Value> =
        scaling.into_iter().filter(|(_, value)| !value.is_null()).collect();
    parameters.insert("rope_type".to_owned(), rope_type.into());
    parameters.insert("rope_theta".to_owned(), rope.theta.into());
    parameters
}

/// The older style's object.
fn older(rope: &Rope) -> Value {
    let mut parameters = parameters(rope);
    parameters.remove("rope_theta");
    if rope.scaling == RopeScaling::Default { Value::Null } else { Value::Object(parameters) }
}

/// The share of a head that is rotated, such that cutting it to whole dimensions gives them back.
fn share(rotary_dim: usize, head_dim: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "heads are below 2^12")]
    let (dims, head) = (rotary_dim as f64, head_dim as f64);
    let exact = dims / head;
    // The quotient may have been rounded down past the whole number.
    if exact * head < dims { exact.next_up() } else { exact }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("a struct serializes to an object"),
    }
}
