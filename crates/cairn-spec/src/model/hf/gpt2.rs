//! `model_type` gpt2: `GPT2Config` of transformers.

use super::decoder::{read_activation, share};
use super::fields::Fields;
use super::{Mapping, read_dtype, read_tokens};
use crate::model::{
    Attention, AttentionForm, BlockForm, Dropout, Embedding, Family, Gqa, Head, MaskKind, Mlp,
    ModelFields, ModelSpec, Norm, NormKind, Position, SpecError, SpecialTokens,
};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "gpt2",
    architecture: "GPT2LMHeadModel",
    body: "GPT2Model",
    also: &[],
    honors: &[],
    read,
    write,
};

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    let hidden_size = required(config, "n_embd", "hidden_size")?;
    let num_attention_heads = required(config, "n_head", "num_attention_heads")?;
    // `reorder_and_upcast_attn` only asks for scores in f32, which Cairn always computes; it must
    // still be true or false.
    config.flag("reorder_and_upcast_attn", false)?;
    let scale = if config.flag("scale_attn_weights", true)? { None } else { Some(1.0) };
    Ok(ModelFields {
        family: Family::Gpt2,
        vocab_size: config.required_size("vocab_size")?,
        hidden_size,
        num_hidden_layers: required(config, "n_layer", "num_hidden_layers")?,
        max_position_embeddings: required(config, "n_positions", "max_position_embeddings")?,
        embedding: Embedding::default(),
        norm: Norm {
            kind: NormKind::Layer,
            eps: config.real("layer_norm_epsilon")?.unwrap_or(1e-5),
            plus_one: false,
            bias: true,
        },
        block: BlockForm::PreNorm,
        first_attention_norm: true,
        attention: Attention {
            form: AttentionForm::Gqa(Gqa {
                num_attention_heads,
                num_key_value_heads: num_attention_heads,
                head_dim: share(hidden_size, num_attention_heads)?,
                qkv_bias: true,
                o_bias: true,
                qk_norm: None,
            }),
            mask: MaskKind::Causal,
            sliding_window: None,
            logit_softcap: None,
            scale,
            scale_by_inverse_layer: config.flag("scale_attn_by_inverse_layer_idx", false)?,
        },
        position: Position::Learned,
        mlp: Mlp::Plain {
            activation: read_activation(config, "activation_function", "gelu_new")?,
            intermediate_size: config.size("n_inner")?.unwrap_or(hidden_size.saturating_mul(4)),
            bias: true,
        },
        head: Some(Head::default()),
        tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        initializer_range: config.real("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            embd: config.real("embd_pdrop")?.unwrap_or(0.1),
            attn: config.real("attn_pdrop")?.unwrap_or(0.1),
            resid: config.real("resid_pdrop")?.unwrap_or(0.1),
        },
        tokens: read_tokens(
            config,
            &SpecialTokens { bos: Some(50256), eos: vec![50256], pad: None },
        )?,
        dtype: read_dtype(config, Family::Gpt2)?,
    })
}

/// A size under GPT-2's own name or under the name other families use; transformers takes both.
fn required(config: &Fields<'_>, name: &str, alias: &str) -> Result<usize, SpecError> {
    config.size_of_either(name, alias)?.ok_or_else(|| config.missing(name))
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("n_embd", spec.hidden_size.into());
    set("n_layer", spec.num_hidden_layers.into());
    set("n_positions", spec.max_position_embeddings.into());
    set("n_inner", spec.mlp.intermediate_size().into());
    set("layer_norm_epsilon", spec.norm.eps.into());
    set("embd_pdrop", spec.dropout.embd.into());
    set("attn_pdrop", spec.dropout.attn.into());
    set("resid_pdrop", spec.dropout.resid.into());
    set("scale_attn_weights", spec.attention.scale.is_none().into());
    set("scale_attn_by_inverse_layer_idx", spec.attention.scale_by_inverse_layer.into());
    set("reorder_and_upcast_attn", false.into());
    set("add_cross_attention", false.into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        set("n_head", gqa.num_attention_heads.into());
    }
    if let Mlp::Plain { activation, .. } = &spec.mlp {
        set("activation_function", activation.hf_name().into());
    }
    map
}
