//! What the keys of each architecture say, in the words of its family's `config.json`.

use super::keys::Keys;
use super::{GgufSpecError, bert, deepseek, rope};
use serde_json::{Map, Value, json};

/// Windows, one in so many layers has none, where the file does not say.
const GEMMA3_PATTERN: u64 = 6;
/// Layers of the one size of each generation that scales scores by the width of a share of the hidden
/// state instead of that of a head: Gemma 2 and Gemma 3 with 27 billion parameters.
const GEMMA2_LARGEST: u64 = 46;
const GEMMA3_LARGEST: u64 = 62;

/// Sizes that every decoder with rotated heads has.
#[derive(Clone, Copy)]
struct Sizes {
    layers: u64,
    hidden_size: u64,
    heads: u64,
    head_dim: u64,
}

/// Reads all keys of the architecture but those of vocabulary and head.
pub(super) fn read(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    match keys.architecture() {
        "gpt2" => return read_gpt2(keys, config),
        "bert" => return bert::read(keys, config),
        "deepseek2" => return deepseek::read(keys, config),
        _ => {}
    }
    let sizes = read_sizes(keys, config)?;
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    let model_type = match keys.architecture() {
        "llama" if num_experts(keys)? > 0 => "mixtral",
        "qwen3moe" => "qwen3_moe",
        "gemma3" => "gemma3_text",
        other => other,
    };
    set("model_type", model_type.into());
    let activation = match model_type {
        "gemma2" | "gemma3_text" => ("hidden_activation", "gelu_pytorch_tanh"),
        _ => ("hidden_act", "silu"),
    };
    set(activation.0, activation.1.into());
    match model_type {
        "llama" => {
            set("attention_bias", keys.has_tensor("blk.0.attn_q.bias").into());
            set("mlp_bias", keys.has_tensor("blk.0.ffn_gate.bias").into());
        }
        "mixtral" | "qwen3_moe" => read_experts(keys, model_type, config)?,
        "gemma2" | "gemma3_text" => read_gemma(keys, sizes, config)?,
        "phi3" => read_phi3(keys, sizes, config)?,
        _ => {}
    }
    if !["gemma3_text", "phi3"].contains(&model_type) {
        let parameters = rope::parameters(keys, sizes.head_dim)?;
        config.insert("rope_parameters".to_owned(), parameters);
    }
    Ok(())
}

fn read_gpt2(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("model_type", "gpt2".into());
    set("n_positions", keys.size("context_length")?.into());
    set("n_embd", keys.size("embedding_length")?.into());
    set("n_layer", keys.size("block_count")?.into());
    set("n_inner", keys.size("feed_forward_length")?.into());
    set("n_head", keys.size("attention.head_count")?.into());
    set("layer_norm_epsilon", keys.real("attention.layer_norm_epsilon")?.into());
    set("activation_function", "gelu_new".into());
    Ok(())
}

fn read_sizes(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<Sizes, GgufSpecError> {
    let heads = keys.size("attention.head_count")?;
    let hidden_size = keys.size("embedding_length")?;
    let layers = keys.size("block_count")?;
    let head_dim = head_dim(keys, hidden_size, heads)?;
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("max_position_embeddings", keys.size("context_length")?.into());
    set("hidden_size", hidden_size.into());
    set("num_hidden_layers", layers.into());
    set("intermediate_size", keys.size("feed_forward_length")?.into());
    set("num_attention_heads", heads.into());
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    set("num_key_value_heads", kv_heads.into());
    set("head_dim", head_dim.into());
    set("rms_norm_eps", keys.real("attention.layer_norm_rms_epsilon")?.into());
    Ok(Sizes { layers, hidden_size, heads, head_dim })
}

/// Size of a head, and that all of it is rotated where the architecture knows no parts.
fn head_dim(keys: &Keys<'_>, hidden_size: u64, heads: u64) -> Result<u64, GgufSpecError> {
    let even = hidden_size.checked_div(heads).unwrap_or(0);
    let head_dim = keys.optional_size("attention.key_length")?.unwrap_or(even);
    for key in ["attention.value_length", "rope.dimension_count"] {
        let may_differ = keys.architecture() == "phi3" && key == "rope.dimension_count";
        if let Some(other) = keys.optional_size(key)?
            && other != head_dim
            && !may_differ
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

fn num_experts(keys: &Keys<'_>) -> Result<u64, GgufSpecError> {
    Ok(keys.optional_size("expert_count")?.unwrap_or(0))
}

/// The experts of Mixtral and Qwen3-MoE, whose weights add up to one in these files.
fn read_experts(
    keys: &Keys<'_>,
    model_type: &str,
    config: &mut Map<String, Value>,
) -> Result<(), GgufSpecError> {
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("num_local_experts", num_experts(keys)?.into());
    set("num_experts_per_tok", keys.size("expert_used_count")?.into());
    if model_type == "qwen3_moe" {
        set("moe_intermediate_size", keys.size("expert_feed_forward_length")?.into());
        set("norm_topk_prob", true.into());
    }
    Ok(())
}

fn read_gemma(
    keys: &Keys<'_>,
    sizes: Sizes,
    config: &mut Map<String, Value>,
) -> Result<(), GgufSpecError> {
    let Sizes { layers, hidden_size, heads, head_dim } = sizes;
    let is_second = keys.architecture() == "gemma2";
    let largest = if is_second { GEMMA2_LARGEST } else { GEMMA3_LARGEST };
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    let even = hidden_size.checked_div(heads).unwrap_or(0);
    set("query_pre_attn_scalar", if layers == largest { even } else { head_dim }.into());
    // Absent, they are what the generation has.
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        let is_known = is_second || name == "final_logit_softcapping";
        if let Some(cap) = is_known.then(|| keys.optional_real(name)).transpose()?.flatten() {
            set(name, cap.into());
        }
    }
    let window = keys.optional_size("attention.sliding_window")?;
    if is_second {
        window.map(|window| set("sliding_window", window.into()));
        return Ok(());
    }
    set("sliding_window", json!(window.filter(|&window| window > 0)));
    let pattern = keys.optional_size("attention.sliding_window_pattern")?;
    set("sliding_window_pattern", pattern.unwrap_or(GEMMA3_PATTERN).into());
    let local = keys.optional_real("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let rope = json!({
        "full_attention": rope::parameters(keys, head_dim)?,
        "sliding_attention": { "rope_type": "default", "rope_theta": local },
    });
    set("rope_parameters", rope);
    Ok(())
}

fn read_phi3(
    keys: &Keys<'_>,
    sizes: Sizes,
    config: &mut Map<String, Value>,
) -> Result<(), GgufSpecError> {
    let window = keys.optional_size("attention.sliding_window")?;
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("sliding_window", json!(window.filter(|&window| window > 0)));
    if let Some(original) = keys.optional_size("rope.scaling.original_context_length")? {
        set("original_max_position_embeddings", original.into());
    }
    let rotated = keys.optional_size("rope.dimension_count")?.unwrap_or(sizes.head_dim);
    let mut parameters = match rope::longrope(keys)? {
        Some(longrope) => longrope,
        None => rope::parameters(keys, sizes.head_dim)?,
    };
    parameters["partial_rotary_factor"] = share(rotated, sizes.head_dim).into();
    set("rope_parameters", parameters);
    Ok(())
}

/// The share that, of the whole and cut to a whole number, gives the part.
#[expect(clippy::cast_precision_loss, reason = "heads above 2^12 are refused later")]
fn share(part: u64, whole: u64) -> f64 {
    let exact = part as f64 / whole.max(1) as f64;
    if exact * (whole as f64) < part as f64 { exact.next_up() } else { exact }
}
