//! What the families that follow LLaMA's names in `config.json` have in common.

use super::fields::Fields;
use super::foreign::unsupported;
use super::{read_dtype, read_tokens, rope_fields};
use crate::Activation;
use crate::model::{
    Attention, AttentionForm, BlockForm, Dropout, Embedding, Family, Gqa, Head, Mlp, ModelFields,
    ModelSpec, Norm, NormKind, Position, SpecError, SpecialTokens,
};
use serde_json::{Map, Value};

/// Gemma's name of the tanh form of GELU.
pub(super) const GELU_TANH: &str = "gelu_pytorch_tanh";

/// What transformers assumes where a file of the family does not say.
#[derive(Clone, Copy)]
pub(super) struct Defaults {
    pub(super) family: Family,
    pub(super) rms_norm_eps: f64,
    /// `head_dim`; an even share of the width if `None`.
    pub(super) head_dim: Option<usize>,
    pub(super) activation: (&'static str, &'static str),
    pub(super) rope: rope_fields::Keys,
    pub(super) tie_word_embeddings: bool,
    pub(super) bos: Option<u32>,
    pub(super) eos: &'static [u32],
    pub(super) pad: Option<u32>,
}

impl Defaults {
    /// LLaMA's, for `family`.
    pub(super) const fn llama(family: Family) -> Self {
        Self {
            family,
            rms_norm_eps: 1e-6,
            head_dim: None,
            activation: ("hidden_act", "silu"),
            rope: rope_fields::Keys::WHOLE_HEAD,
            tie_word_embeddings: false,
            bos: Some(1),
            eos: &[2],
            pad: None,
        }
    }
}

/// Reads a pre-norm decoder with grouped attention, a gated feed-forward part and RMS norms. Its
/// projections have the biases that `attention_bias` and `mlp_bias` ask for.
pub(super) fn read(config: &Fields<'_>, defaults: &Defaults) -> Result<ModelFields, SpecError> {
    let family = defaults.family;
    let gqa = grouped(config, defaults)?;
    let max_position_embeddings = config.required_size("max_position_embeddings")?;
    let around = rope_fields::Around {
        family,
        head_dim: gqa.head_dim,
        max_position_embeddings,
        original_max_position_embeddings: config.size("original_max_position_embeddings")?,
        keys: defaults.rope,
    };
    Ok(ModelFields {
        family,
        vocab_size: config.required_size("vocab_size")?,
        hidden_size: config.required_size("hidden_size")?,
        num_hidden_layers: config.required_size("num_hidden_layers")?,
        max_position_embeddings,
        embedding: Embedding::default(),
        norm: Norm {
            kind: NormKind::Rms,
            eps: config.real("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            plus_one: false,
            bias: false,
        },
        block: BlockForm::PreNorm,
        first_attention_norm: true,
        attention: Attention::causal(gqa),
        position: Position::Rope(rope_fields::read(config, around)?),
        mlp: Mlp::Glu {
            activation: read_activation(config, defaults.activation.0, defaults.activation.1)?,
            intermediate_size: config.required_size("intermediate_size")?,
            bias: config.flag("mlp_bias", false)?,
        },
        head: Some(Head::default()),
        tie_word_embeddings: config.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
        initializer_range: config.real("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            attn: config.real("attention_dropout")?.unwrap_or(0.0),
            ..Dropout::default()
        },
        tokens: read_tokens(
            config,
            &SpecialTokens { bos: defaults.bos, eos: defaults.eos.to_vec(), pad: defaults.pad },
        )?,
        dtype: read_dtype(config, family)?,
    })
}

fn grouped(config: &Fields<'_>, defaults: &Defaults) -> Result<Gqa, SpecError> {
    let hidden_size = config.required_size("hidden_size")?;
    let num_attention_heads = config.required_size("num_attention_heads")?;
    let bias = config.flag("attention_bias", false)?;
    Ok(Gqa {
        num_attention_heads,
        num_key_value_heads: config.size("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim: match config.size("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => share(hidden_size, num_attention_heads)?,
        },
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: None,
    })
}

/// The width of one of `num_attention_heads` even parts.
pub(super) fn share(hidden_size: usize, num_attention_heads: usize) -> Result<usize, SpecError> {
    match hidden_size.checked_rem(num_attention_heads) {
        Some(0) => Ok(hidden_size / num_attention_heads),
        // No heads at all: the check of `num_attention_heads` says so.
        None => Ok(0),
        Some(_) => Err(SpecError::HiddenNotDivisible { hidden_size, num_attention_heads }),
    }
}

pub(super) fn read_activation(
    config: &Fields<'_>,
    field: &str,
    default: &str,
) -> Result<Activation, SpecError> {
    let name = config.text(field)?.unwrap_or_else(|| default.to_owned());
    Activation::from_hf_name(&name).ok_or(SpecError::UnknownActivation { name })
}

/// Changes the grouped attention that [`read`] gave.
pub(super) fn with_gqa(fields: &mut ModelFields, change: impl FnOnce(&mut Gqa)) {
    if let AttentionForm::Gqa(gqa) = &mut fields.attention.form {
        change(gqa);
    }
}

/// Writes what [`read`] reads, under the same names.
pub(super) fn write(spec: &ModelSpec, defaults: &Defaults) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("hidden_size", spec.hidden_size.into());
    set("num_hidden_layers", spec.num_hidden_layers.into());
    set("max_position_embeddings", spec.max_position_embeddings.into());
    set("intermediate_size", spec.mlp.intermediate_size().into());
    set("rms_norm_eps", spec.norm.eps.into());
    set("attention_dropout", spec.dropout.attn.into());
    let activation = match spec.mlp.activation() {
        // Gemma's name for it.
        Activation::GeluTanh if defaults.activation.1 == GELU_TANH => GELU_TANH,
        activation => activation.hf_name(),
    };
    set(defaults.activation.0, activation.into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        set("num_attention_heads", gqa.num_attention_heads.into());
        set("num_key_value_heads", gqa.num_key_value_heads.into());
        set("head_dim", gqa.head_dim.into());
    }
    if let Position::Rope(rope) = &spec.position {
        let head_dim = spec.attention.form.key_dim();
        rope_fields::write(rope, defaults.rope, head_dim, &mut map);
    }
    map
}

/// Refuses `attention_bias` and `mlp_bias` in files of a family that does not know them.
pub(super) fn refuse_biases(config: &Fields<'_>, family: Family) -> Result<(), SpecError> {
    refuse_set(config, family, "attention_bias")?;
    refuse_mlp_bias(config, family)
}

/// Refuses `mlp_bias` in files of a family that does not know it.
pub(super) fn refuse_mlp_bias(config: &Fields<'_>, family: Family) -> Result<(), SpecError> {
    refuse_set(config, family, "mlp_bias")
}

fn refuse_set(config: &Fields<'_>, family: Family, field: &str) -> Result<(), SpecError> {
    match config.value(field) {
        Some(value) if config.flag(field, false)? => Err(unsupported(config, field, value, family)),
        _ => Ok(()),
    }
}
