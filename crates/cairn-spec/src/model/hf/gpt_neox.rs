//! `model_type` `gpt_neox`: `GPTNeoXConfig` of transformers.

use super::decoder::read_activation;
use super::fields::Fields;
use super::rope_fields::{self, Around, Keys};
use super::{Mapping, read_dtype, read_tokens, sizes};
use crate::model::{
    Attention, AttentionForm, BlockForm, Dropout, Embedding, Family, Head, Mlp, ModelFields,
    ModelSpec, Position, SpecError, SpecialTokens,
};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "gpt_neox",
    architecture: "GPTNeoXForCausalLM",
    body: "GPTNeoXModel",
    also: &[],
    honors: &["use_parallel_residual", "rotary_pct", "partial_rotary_factor"],
    read,
    write,
};

const KEYS: Keys =
    Keys { theta: "rotary_emb_base", partial: Some(("rotary_pct", 0.25)), ..Keys::WHOLE_HEAD };

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    let family = Family::GptNeox;
    let sizes = sizes::read(config)?;
    let gqa = sizes::heads(config, sizes, config.flag("attention_bias", true)?)?;
    let around = Around {
        family,
        head_dim: gqa.head_dim,
        max_position_embeddings: sizes.max_position_embeddings,
        original_max_position_embeddings: None,
        keys: KEYS,
    };
    let hidden_dropout = config.real("hidden_dropout")?.unwrap_or(0.0);
    Ok(ModelFields {
        family,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        num_hidden_layers: sizes.num_hidden_layers,
        max_position_embeddings: sizes.max_position_embeddings,
        embedding: Embedding::default(),
        norm: sizes::layer_norm(config, ("layer_norm_eps", 1e-5), true)?,
        block: if config.flag("use_parallel_residual", true)? {
            BlockForm::ParallelResidual
        } else {
            BlockForm::PreNorm
        },
        first_attention_norm: true,
        attention: Attention::causal(gqa),
        position: Position::Rope(rope_fields::read(config, around)?),
        mlp: Mlp::Plain {
            activation: read_activation(config, "hidden_act", "gelu")?,
            intermediate_size: sizes.intermediate_size,
            bias: true,
        },
        head: Some(Head::default()),
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        initializer_range: config.real("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            embd: hidden_dropout,
            attn: config.real("attention_dropout")?.unwrap_or(0.0),
            resid: hidden_dropout,
        },
        tokens: read_tokens(config, &SpecialTokens { bos: Some(0), eos: vec![2], pad: None })?,
        dtype: read_dtype(config, family)?,
    })
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = sizes::write(spec);
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("layer_norm_eps", spec.norm.eps.into());
    set("hidden_dropout", spec.dropout.resid.into());
    set("attention_dropout", spec.dropout.attn.into());
    set("use_parallel_residual", (spec.block == BlockForm::ParallelResidual).into());
    set("hidden_act", spec.mlp.activation().hf_name().into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        set("attention_bias", gqa.qkv_bias.into());
    }
    if let Position::Rope(rope) = &spec.position {
        rope_fields::write(rope, KEYS, spec.attention.form.key_dim(), &mut map);
    }
    map
}
