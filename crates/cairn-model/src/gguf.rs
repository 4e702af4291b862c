//! A GGUF file → the spec of its model, and the model's tensors.
//!
//! The keys of a file are turned into the `config.json` that the family's own files have, and that
//! is read as always: so whatever holds for those holds here. Every key under the architecture's
//! name is read, known to change no number, or refused by name.
//!
//! Where a file leaves open what its architecture means, this follows llama.cpp: the activation of
//! the feed-forward part, a head tied to the embedding when there is no tensor `output.weight`, how
//! Gemma scales its scores, which of its layers have a window, that experts' weights add up to one.
//! Tensors come decoded to `f32`; a `Q8_0` tensor that is wanted as `q8`, or a `Q4_0` one as
//! `q4`, keeps its codes and scales, one of F16 or BF16 its bits.
//!
//! The `deepseek2` architecture is V2 and V3, with the keys' and values' part of `kv_b_proj` apart, as
//! converters write them since 2025, or in one tensor, as before. A `bert` file is the body alone.
//! `export` goes the other way, for the other architectures.

mod bert;
mod decoder;
mod deepseek;
mod error;
mod export;
mod keys;
mod rope;

pub use error::GgufSpecError;
pub use export::{GgufExportError, divisors, metadata, same_model};

use crate::load::copy_bits;
use crate::{Naming, TensorSource};
use cairn_artifacts::gguf::{Format, GgufFile};
use cairn_kernels::Encoding;
use cairn_spec::ModelSpec;
use keys::Keys;
use serde_json::{Map, Value, json};
use std::ops::Range;

/// Architectures that are read, as `general.architecture` names them.
pub const ARCHITECTURES: [&str; 10] = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "deepseek2",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "bert",
];

/// The tensor that holds a divisor for each frequency of the rotation.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The divisors of Phi-3's long contexts: within the original length, and beyond.
pub(crate) const ROPE_FACTORS_LONG: [&str; 2] =
    ["rope_factors_short.weight", "rope_factors_long.weight"];

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
    decoder::read(&keys, &mut config)?;
    read_shared(file, &keys, &mut config)?;
    keys.refuse_unread()?;
    Ok(Value::Object(config))
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
        // transformers rounds Gemma's scale of the embedding to the type of the weights; llama.cpp,
        // which such files are made for, does not.
        _ if keys.architecture().starts_with("gemma") => "float32",
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

    fn read_codes(
        &self,
        encoding: Encoding,
        name: &str,
        elements: Range<usize>,
        codes: (&mut [i8], &mut [f32]),
    ) -> Result<bool, String> {
        let format = match encoding {
            Encoding::Q8 => Format::Q8_0,
            Encoding::Q4 => Format::Q4_0,
            _ => return Ok(false),
        };
        self.read_codes(format, name, elements, codes).map_err(|error| error.to_string())
    }

    fn encoding(&self, name: &str) -> Option<Encoding> {
        match self.stored(name)?.0 {
            Format::F32 => Some(Encoding::F32),
            Format::F16 => Some(Encoding::F16),
            Format::Bf16 => Some(Encoding::Bf16),
            Format::Q8_0 => Some(Encoding::Q8),
            Format::Q4_0 => Some(Encoding::Q4),
            Format::Q4K | Format::Q5K | Format::Q6K => None,
        }
    }

    fn read_bits(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<(), String> {
        let Some((Format::F16 | Format::Bf16, bytes)) = self.stored(name) else {
            return Err("its elements do not have sixteen bits".to_owned());
        };
        let bytes = bytes.get(2 * elements.start..2 * elements.end);
        copy_bits(bytes.ok_or_else(|| format!("elements {elements:?} lie outside of it"))?, out)
    }

    fn release(&self, name: &str) {
        self.release(name);
    }

    fn naming(&self) -> Naming {
        Naming::Gguf
    }
}
