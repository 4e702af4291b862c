//! A GGUF file → the spec of its model, and the model's tensors.
//!
//! The keys of a file are turned into the `config.json` that the family's own files have, and that
//! is read as always: so whatever holds for those holds here. Every key under the architecture's
//! name is read, known to change no number, or refused by name.
//!
//! Where a file leaves open what its architecture means, this follows llama.cpp: the activation of
//! the feed-forward part, a head tied to the embedding when there is no tensor `output.weight`.
//! Tensors come decoded to `f32`; a `Q8_0` tensor that is wanted as `q8` keeps its bytes and
//! scales.

mod error;
mod keys;
mod rope;

pub use error::GgufSpecError;

use crate::{Naming, TensorSource};
use cairn_artifacts::gguf::GgufFile;
use cairn_spec::ModelSpec;
use keys::Keys;
use serde_json::{Map, Value, json};
use std::ops::Range;

/// Architectures that are read, as `general.architecture` names them.
pub const ARCHITECTURES: [&str; 4] = ["llama", "qwen2", "qwen3", "gpt2"];

/// The tensor that holds a divisor for each frequency of the rotation.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Reads what the model of a GGUF file computes.
///
/// # Errors
///
/// [`GgufSpecError`] naming the key that is missing, contradictory or not supported.
pub fn spec(file: &GgufFile) -> Result<ModelSpec, GgufSpecError> {
    Ok(ModelSpec::from_hf_config(&hf_config(file)?)?)
}

/// The `config.json` that says what the keys of a GGUF file say.
///
/// # Errors
///
/// As [`spec`].
pub fn hf_config(file: &GgufFile) -> Result<Value, GgufSpecError> {
    let keys = Keys::new(file)?;
    let mut config = Map::new();
    config.insert("model_type".to_owned(), keys.architecture().into());
    if keys.architecture() == "gpt2" {
        read_gpt2(&keys, &mut config)?;
    } else {
        read_decoder(&keys, &mut config)?;
    }
    read_shared(file, &keys, &mut config)?;
    keys.refuse_unread()?;
    Ok(Value::Object(config))
}

fn read_gpt2(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("n_positions", keys.size("context_length")?.into());
    set("n_embd", keys.size("embedding_length")?.into());
    set("n_layer", keys.size("block_count")?.into());
    set("n_inner", keys.size("feed_forward_length")?.into());
    set("n_head", keys.size("attention.head_count")?.into());
    set("layer_norm_epsilon", keys.real("attention.layer_norm_epsilon")?.into());
    set("activation_function", "gelu_new".into());
    Ok(())
}

/// LLaMA, Qwen 2 and Qwen 3.
fn read_decoder(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    let heads = keys.size("attention.head_count")?;
    let hidden_size = keys.size("embedding_length")?;
    let head_dim = head_dim(keys, hidden_size, heads)?;
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("max_position_embeddings", keys.size("context_length")?.into());
    set("hidden_size", hidden_size.into());
    set("num_hidden_layers", keys.size("block_count")?.into());
    set("intermediate_size", keys.size("feed_forward_length")?.into());
    set("num_attention_heads", heads.into());
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    set("num_key_value_heads", kv_heads.into());
    set("head_dim", head_dim.into());
    set("rms_norm_eps", keys.real("attention.layer_norm_rms_epsilon")?.into());
    set("hidden_act", "silu".into());
    set("rope_parameters", rope::parameters(keys, head_dim)?);
    if keys.architecture() == "llama" {
        set("attention_bias", keys.has_tensor("blk.0.attn_q.bias").into());
        set("mlp_bias", keys.has_tensor("blk.0.ffn_gate.bias").into());
    }
    Ok(())
}

/// Size of a head, and that all of it is rotated.
fn head_dim(keys: &Keys<'_>, hidden_size: u64, heads: u64) -> Result<u64, GgufSpecError> {
    let even = hidden_size.checked_div(heads).unwrap_or(0);
    let head_dim = keys.optional_size("attention.key_length")?.unwrap_or(even);
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = keys.optional_size(key)?
            && other != head_dim
        {
            return Err(GgufSpecError::Contradiction {
                first: keys.full("attention.key_length"),
                first_value: head_dim.to_string(),
                second: keys.full(key),
                second_value: other.to_string(),
            });
        }
    }
    Ok(head_dim)
}

/// Vocabulary, head, special tokens and element type.
fn read_shared(
    file: &GgufFile,
    keys: &Keys<'_>,
    config: &mut Map<String, Value>,
) -> Result<(), GgufSpecError> {
    let embedding = file.header().tensor("token_embd.weight");
    let rows = embedding.and_then(|tensor| tensor.shape.first()).copied().unwrap_or(0) as u64;
    let stated = keys.optional_size("vocab_size")?;
    let vocab_size = stated.unwrap_or(rows);
    let tokens = keys.optional_list_len("tokenizer.ggml.tokens")?;
    let contradiction = |second: &str, value: u64| GgufSpecError::Contradiction {
        first: "rows of token_embd.weight".to_owned(),
        first_value: rows.to_string(),
        second: second.to_owned(),
        second_value: value.to_string(),
    };
    if vocab_size != rows {
        return Err(contradiction(&keys.full("vocab_size"), vocab_size));
    }
    // Converters fill the list up to the rows; a longer one has tokens without an embedding.
    if let Some(tokens) = tokens.filter(|&tokens| tokens > rows) {
        return Err(contradiction("length of tokenizer.ggml.tokens", tokens));
    }
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("vocab_size", vocab_size.into());
    set("tie_word_embeddings", (!keys.has_tensor("output.weight")).into());
    for (name, key) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        let id = keys.optional_whole(&format!("tokenizer.ggml.{key}_token_id"))?;
        set(&format!("{name}_token_id"), json!(id));
    }
    let stored = file.header().tensor("blk.0.ffn_down.weight");
    let dtype = match stored.map(|tensor| tensor.tensor_type.name()) {
        Some("F16") => "float16",
        Some("BF16") => "bfloat16",
        _ => "float32",
    };
    set("dtype", dtype.into());
    Ok(())
}

impl TensorSource for GgufFile {
    fn names(&self) -> Vec<String> {
        self.tensors().map(|tensor| tensor.name.to_string()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.header().tensor(name).map(|tensor| tensor.shape.clone())
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        self.read_f32(name, elements, out).map_err(|error| error.to_string())
    }

    fn read_q8(
        &self,
        name: &str,
        elements: Range<usize>,
        values: &mut [i8],
        scales: &mut [f32],
    ) -> Result<bool, String> {
        self.read_q8_0(name, elements, values, scales).map_err(|error| error.to_string())
    }

    fn naming(&self) -> Naming {
        Naming::Gguf
    }
}
