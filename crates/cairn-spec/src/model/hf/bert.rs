//! `model_type` bert: `BertConfig` of transformers.

use super::decoder::read_activation;
use super::fields::Fields;
use super::foreign::unsupported;
use super::{Mapping, read_dtype, read_tokens, sizes};
use crate::model::{
    Attention, BlockForm, Dropout, Embedding, Family, Head, HeadTransform, MaskKind, Mlp,
    ModelFields, ModelSpec, Position, SpecError, SpecialTokens,
};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "bert",
    architecture: "BertForMaskedLM",
    body: "BertModel",
    // The second head, over pairs of sentences, is left aside.
    also: &["BertForPreTraining"],
    honors: &[],
    read,
    write,
};

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    refuse_other_forms(config)?;
    let sizes = sizes::read(config)?;
    let activation = read_activation(config, "hidden_act", "gelu")?;
    let hidden_dropout = config.real("hidden_dropout_prob")?.unwrap_or(0.1);
    Ok(ModelFields {
        family: Family::Bert,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        num_hidden_layers: sizes.num_hidden_layers,
        max_position_embeddings: sizes.max_position_embeddings,
        embedding: Embedding {
            scale: None,
            norm: true,
            type_vocab_size: Some(config.size("type_vocab_size")?.unwrap_or(2)),
        },
        norm: sizes::layer_norm(config, ("layer_norm_eps", 1e-12), true)?,
        block: BlockForm::ResidualNorm,
        first_attention_norm: true,
        attention: Attention {
            mask: MaskKind::Bidirectional,
            ..Attention::causal(sizes::heads(config, sizes, true)?)
        },
        position: Position::Learned,
        mlp: Mlp::Plain { activation, intermediate_size: sizes.intermediate_size, bias: true },
        head: Some(Head {
            transform: Some(HeadTransform { activation, bias: true }),
            bias: true,
            softcap: None,
        }),
        tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        initializer_range: config.real("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            embd: hidden_dropout,
            attn: config.real("attention_probs_dropout_prob")?.unwrap_or(0.1),
            resid: hidden_dropout,
        },
        tokens: read_tokens(config, &SpecialTokens { bos: None, eos: vec![], pad: Some(0) })?,
        dtype: read_dtype(config, Family::Bert)?,
    })
}

/// A decoder's mask and relative positions make other numbers of the same weights.
fn refuse_other_forms(config: &Fields<'_>) -> Result<(), SpecError> {
    if let (Some(value), true) = (config.value("is_decoder"), config.flag("is_decoder", false)?) {
        return Err(unsupported(config, "is_decoder", value, Family::Bert));
    }
    match (config.value("position_embedding_type"), config.text("position_embedding_type")?) {
        (Some(value), Some(kind)) if kind != "absolute" => {
            Err(unsupported(config, "position_embedding_type", value, Family::Bert))
        }
        _ => Ok(()),
    }
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = sizes::write(spec);
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("layer_norm_eps", spec.norm.eps.into());
    set("hidden_dropout_prob", spec.dropout.resid.into());
    set("attention_probs_dropout_prob", spec.dropout.attn.into());
    set("type_vocab_size", spec.embedding.type_vocab_size.into());
    set("hidden_act", spec.mlp.activation().hf_name().into());
    set("is_decoder", false.into());
    set("position_embedding_type", "absolute".into());
    map
}
