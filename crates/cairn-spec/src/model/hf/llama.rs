//! `model_type` llama: `LlamaConfig` of transformers.

use super::fields::Fields;
use super::{read_dtype, read_tokens, rope_fields};
use crate::Activation;
use crate::model::{
    Attention, AttentionForm, BlockForm, Dropout, Embedding, Family, Gqa, Head, MaskKind, Mlp,
    ModelFields, ModelSpec, Norm, NormKind, Position, SpecError, SpecialTokens,
};
use serde_json::{Map, Value};

pub(super) fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    let hidden_size = config.required_size("hidden_size")?;
    let num_attention_heads = config.required_size("num_attention_heads")?;
    let num_key_value_heads = config.size("num_key_value_heads")?.unwrap_or(num_attention_heads);
    let head_dim = read_head_dim(config, hidden_size, num_attention_heads)?;
    let max_position_embeddings = config.required_size("max_position_embeddings")?;
    let attention_bias = config.flag("attention_bias", false)?;
    let around = rope_fields::Around { family: Family::Llama, head_dim, max_position_embeddings };
    Ok(ModelFields {
        family: Family::Llama,
        vocab_size: config.required_size("vocab_size")?,
        hidden_size,
        num_hidden_layers: config.required_size("num_hidden_layers")?,
        max_position_embeddings,
        embedding: Embedding::default(),
        norm: Norm {
            kind: NormKind::Rms,
            eps: config.real("rms_norm_eps")?.unwrap_or(1e-6),
            plus_one: false,
            bias: false,
        },
        block: BlockForm::PreNorm,
        attention: Attention {
            form: AttentionForm::Gqa(Gqa {
                num_attention_heads,
                num_key_value_heads,
                head_dim,
                qkv_bias: attention_bias,
                o_bias: attention_bias,
                qk_norm: None,
            }),
            mask: MaskKind::Causal,
            sliding_window: None,
            logit_softcap: None,
            scale: None,
            scale_by_inverse_layer: false,
        },
        position: Position::Rope(rope_fields::read(config, around)?),
        mlp: Mlp::Glu {
            activation: read_activation(config, "hidden_act", "silu")?,
            intermediate_size: config.required_size("intermediate_size")?,
            bias: config.flag("mlp_bias", false)?,
        },
        head: Head::default(),
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        initializer_range: config.real("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            attn: config.real("attention_dropout")?.unwrap_or(0.0),
            ..Dropout::default()
        },
        tokens: read_tokens(config, &SpecialTokens { bos: Some(1), eos: vec![2], pad: None })?,
        dtype: read_dtype(config, Family::Llama)?,
    })
}

/// `head_dim` where the file has it, else an even share of the width.
fn read_head_dim(
    config: &Fields<'_>,
    hidden_size: usize,
    num_attention_heads: usize,
) -> Result<usize, SpecError> {
    if let Some(head_dim) = config.size("head_dim")? {
        return Ok(head_dim);
    }
    share(hidden_size, num_attention_heads)
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

pub(super) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("hidden_size", spec.hidden_size.into());
    set("num_hidden_layers", spec.num_hidden_layers.into());
    set("max_position_embeddings", spec.max_position_embeddings.into());
    set("intermediate_size", spec.mlp.intermediate_size().into());
    set("rms_norm_eps", spec.norm.eps.into());
    set("attention_dropout", spec.dropout.attn.into());
    set("pretraining_tp", 1.into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        set("num_attention_heads", gqa.num_attention_heads.into());
        set("num_key_value_heads", gqa.num_key_value_heads.into());
        set("head_dim", gqa.head_dim.into());
        set("attention_bias", gqa.qkv_bias.into());
    }
    if let Mlp::Glu { activation, bias, .. } = &spec.mlp {
        set("hidden_act", activation.hf_name().into());
        set("mlp_bias", (*bias).into());
    }
    if let Position::Rope(rope) = &spec.position {
        rope_fields::write(rope, &mut map);
    }
    map
}
