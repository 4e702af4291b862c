//! `model_type` modernbert: `ModernBertConfig` of transformers.

use super::decoder::read_activation;
use super::fields::Fields;
use super::rope_fields::{self, Around, Keys};
use super::windows::{self, FULL, SLIDING};
use super::{Mapping, read_dtype, read_tokens, sizes};
use crate::model::{
    Attention, AttentionForm, BlockForm, Dropout, Embedding, Family, Head, HeadTransform, MaskKind,
    Mlp, ModelFields, ModelSpec, Position, Rope, SlidingWindow, SpecError, SpecialTokens,
};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "modernbert",
    architecture: "ModernBertForMaskedLM",
    body: "ModernBertModel",
    also: &[],
    honors: &["layer_types"],
    read,
    write,
};

/// The rotation of layers that see everything.
const GLOBAL: Keys = Keys {
    theta: "global_rope_theta",
    default_theta: 160_000.0,
    layer_type: Some(FULL),
    ..Keys::WHOLE_HEAD
};
/// The rotation of windowed layers.
const LOCAL: Keys =
    Keys { theta: "local_rope_theta", layer_type: Some(SLIDING), ..Keys::WHOLE_HEAD };

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    let family = Family::ModernBert;
    let sizes = sizes::read(config)?;
    let gqa = sizes::heads(config, sizes, config.flag("attention_bias", false)?)?;
    let rope = |keys| {
        let around = Around {
            family,
            head_dim: gqa.head_dim,
            max_position_embeddings: sizes.max_position_embeddings,
            original_max_position_embeddings: None,
            keys,
        };
        rope_fields::read(config, around)
    };
    let attention = Attention {
        mask: MaskKind::Bidirectional,
        sliding_window: window(config, rope(LOCAL)?)?,
        ..Attention::causal(gqa)
    };
    let tokens = SpecialTokens { bos: Some(50281), eos: vec![50282], pad: Some(50283) };
    Ok(ModelFields {
        family,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        num_hidden_layers: sizes.num_hidden_layers,
        max_position_embeddings: sizes.max_position_embeddings,
        embedding: Embedding { scale: None, norm: true, type_vocab_size: None },
        norm: sizes::layer_norm(config, ("norm_eps", 1e-5), config.flag("norm_bias", false)?)?,
        block: BlockForm::PreNorm,
        first_attention_norm: false,
        attention,
        position: Position::Rope(rope(GLOBAL)?),
        mlp: Mlp::Glu {
            activation: read_activation(config, "hidden_activation", "gelu")?,
            intermediate_size: sizes.intermediate_size,
            bias: config.flag("mlp_bias", false)?,
        },
        head: Some(head(config)?),
        tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        initializer_range: config.real("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            embd: config.real("embedding_dropout")?.unwrap_or(0.0),
            attn: config.real("attention_dropout")?.unwrap_or(0.0),
            resid: 0.0,
        },
        tokens: read_tokens(config, &tokens)?,
        dtype: read_dtype(config, family)?,
    })
}

fn head(config: &Fields<'_>) -> Result<Head, SpecError> {
    Ok(Head {
        transform: Some(HeadTransform {
            activation: read_activation(config, "classifier_activation", "gelu")?,
            bias: config.flag("classifier_bias", false)?,
        }),
        bias: config.flag("decoder_bias", true)?,
        softcap: None,
    })
}

/// `local_attention` counts both sides: a token sees half of it on either side, and itself.
fn window(config: &Fields<'_>, rope: Rope) -> Result<Option<SlidingWindow>, SpecError> {
    let every = config.size("global_attn_every_n_layers")?.unwrap_or(3).max(1);
    let layers =
        windows::windowed_layers(config, Family::ModernBert, |layer| !layer.is_multiple_of(every))?;
    let size = config.size("local_attention")?.unwrap_or(128) / 2 + 1;
    Ok(windows::window(Some(size), layers).map(|mut window| {
        window.rope = Some(rope);
        window
    }))
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = sizes::write(spec);
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("norm_eps", spec.norm.eps.into());
    set("norm_bias", spec.norm.bias.into());
    set("embedding_dropout", spec.dropout.embd.into());
    set("attention_dropout", spec.dropout.attn.into());
    set("hidden_activation", spec.mlp.activation().hf_name().into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        set("attention_bias", gqa.qkv_bias.into());
    }
    if let Mlp::Glu { bias, .. } = &spec.mlp {
        set("mlp_bias", (*bias).into());
    }
    if let Some(head) = spec.head {
        set("decoder_bias", head.bias.into());
        if let Some(transform) = head.transform {
            set("classifier_activation", transform.activation.hf_name().into());
            set("classifier_bias", transform.bias.into());
        }
    }
    let window = spec.attention.sliding_window.as_ref();
    set("local_attention", window.map_or(128, |window| (window.size.max(1) - 1) * 2).into());
    windows::write_layer_types(spec, &mut map);
    if let Position::Rope(full) = &spec.position {
        let local = window.and_then(|window| window.rope.as_ref()).unwrap_or(full);
        rope_fields::write_both((full, GLOBAL), (local, LOCAL), &mut map);
    }
    map
}
