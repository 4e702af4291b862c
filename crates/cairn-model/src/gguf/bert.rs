//! BERT's keys. These files hold the body alone: hidden states, no head over the vocabulary.
//!
//! They do not name the activation. It is that of every BERT here, the exact GELU, which llama.cpp
//! approximates by tanh.

use super::GgufSpecError;
use super::keys::Keys;
use serde_json::{Map, Value};

/// Reads all keys of the architecture but those of the vocabulary.
pub(super) fn read(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    let key = "attention.causal";
    let missing = || GgufSpecError::Missing { key: keys.full(key) };
    if keys.optional_flag(key)?.ok_or_else(missing)? {
        return Err(keys.unsupported(&keys.full(key)));
    }
    let key = "tokenizer.ggml.token_type_count";
    let types = keys.optional_whole(key)?;
    let missing = || GgufSpecError::Missing { key: key.to_owned() };
    // How a text becomes one vector is no part of the model.
    keys.optional_size("pooling_type")?;
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("model_type", "bert".into());
    set("architectures", vec!["BertModel"].into());
    set("hidden_act", "gelu".into());
    set("max_position_embeddings", keys.size("context_length")?.into());
    set("hidden_size", keys.size("embedding_length")?.into());
    set("num_hidden_layers", keys.size("block_count")?.into());
    set("intermediate_size", keys.size("feed_forward_length")?.into());
    set("num_attention_heads", keys.size("attention.head_count")?.into());
    set("layer_norm_eps", keys.real("attention.layer_norm_epsilon")?.into());
    set("type_vocab_size", types.ok_or_else(missing)?.into());
    Ok(())
}
