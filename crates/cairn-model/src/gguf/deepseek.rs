//! DeepSeek's keys: latent attention, leading dense layers, shared experts, experts in groups.
//!
//! What the file scores experts by tells V2 (softmax) from V3 (sigmoid). Files since 2025 describe
//! latent attention as one head over the latent, and say the sizes of the expanded heads beside it;
//! older ones say those alone. A file that speaks of no groups has none: its model is computed without,
//! as llama.cpp does. V2 judges a group by its best expert, as its authors do.

use super::keys::{Keys, shortest};
use super::{GgufSpecError, rope};
use serde_json::{Map, Value};

/// Numbers of the scorings in `expert_gating_func`; 0 in a file from before there was a choice.
const SOFTMAX: [u64; 2] = [0, 1];
const SIGMOID: u64 = 2;
/// What YaRN's key holds for each unit of `mscale_all_dim`.
const LOG_MULTIPLIER: f64 = 0.1;

/// Reads all keys of the architecture but those of vocabulary and head.
pub(super) fn read(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    let is_v3 = match keys.optional_size("expert_gating_func")?.unwrap_or(SOFTMAX[0]) {
        SIGMOID => true,
        scoring if SOFTMAX.contains(&scoring) => false,
        _ => return Err(keys.unsupported(&keys.full("expert_gating_func"))),
    };
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("model_type", if is_v3 { "deepseek_v3" } else { "deepseek_v2" }.into());
    set("hidden_act", "silu".into());
    set("max_position_embeddings", keys.size("context_length")?.into());
    set("hidden_size", keys.size("embedding_length")?.into());
    set("num_hidden_layers", keys.size("block_count")?.into());
    set("intermediate_size", keys.size("feed_forward_length")?.into());
    set("rms_norm_eps", keys.real("attention.layer_norm_rms_epsilon")?.into());
    read_attention(keys, config)?;
    read_experts(keys, is_v3, config)
}

fn read_attention(keys: &Keys<'_>, config: &mut Map<String, Value>) -> Result<(), GgufSpecError> {
    let heads = keys.size("attention.head_count")?;
    // One head over the latent, or the heads that it expands to.
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    if ![1, heads].contains(&kv_heads) {
        return Err(keys.unsupported(&keys.full("attention.head_count_kv")));
    }
    let latent = keys.size("attention.kv_lora_rank")?;
    let rotary = keys.size("rope.dimension_count")?;
    let (key_name, key, value) = match keys.optional_size("attention.key_length_mla")? {
        None => {
            let name = "attention.key_length";
            (name, keys.size(name)?, keys.size("attention.value_length")?)
        }
        Some(key) => {
            keys.expect("attention.key_length", latent.saturating_add(rotary))?;
            keys.expect("attention.value_length", latent)?;
            ("attention.key_length_mla", key, keys.size("attention.value_length_mla")?)
        }
    };
    let nope = key.checked_sub(rotary).ok_or_else(|| GgufSpecError::Contradiction {
        first: keys.full(key_name),
        first_value: key.to_string(),
        second: keys.full("rope.dimension_count"),
        second_value: rotary.to_string(),
    })?;
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("num_attention_heads", heads.into());
    set("num_key_value_heads", heads.into());
    set("q_lora_rank", keys.optional_size("attention.q_lora_rank")?.into());
    set("kv_lora_rank", latent.into());
    set("qk_nope_head_dim", nope.into());
    set("qk_rope_head_dim", rotary.into());
    set("v_head_dim", value.into());
    set("head_dim", rotary.into());
    set("rope_parameters", rotation(keys, rotary)?);
    Ok(())
}

/// The rotation. YaRN's factor on cosine and sine is 1 in these files, that on the scores is stated.
fn rotation(keys: &Keys<'_>, rotary: u64) -> Result<Value, GgufSpecError> {
    let key = "rope.scaling.yarn_log_multiplier";
    let multiplier = keys.optional_real(key)?;
    let mut parameters = rope::parameters(keys, rotary)?;
    if parameters["rope_type"] == "yarn" {
        let missing = || GgufSpecError::Missing { key: keys.full(key) };
        let multiplier = multiplier.ok_or_else(missing)?;
        if multiplier <= 0.0 {
            return Err(keys.unsupported(&keys.full(key)));
        }
        for name in ["mscale", "mscale_all_dim"] {
            parameters[name] = shortest(multiplier / LOG_MULTIPLIER).into();
        }
    }
    Ok(parameters)
}

fn read_experts(
    keys: &Keys<'_>,
    is_v3: bool,
    config: &mut Map<String, Value>,
) -> Result<(), GgufSpecError> {
    let groups = keys.optional_size("expert_group_count")?.unwrap_or(1);
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    set("n_routed_experts", keys.size("expert_count")?.into());
    set("num_experts_per_tok", keys.size("expert_used_count")?.into());
    set("moe_intermediate_size", keys.size("expert_feed_forward_length")?.into());
    set("n_shared_experts", keys.optional_size("expert_shared_count")?.unwrap_or(0).into());
    set(
        "first_k_dense_replace",
        keys.optional_size("leading_dense_block_count")?.unwrap_or(0).into(),
    );
    set("routed_scaling_factor", keys.optional_real("expert_weights_scale")?.unwrap_or(1.0).into());
    set("norm_topk_prob", keys.optional_flag("expert_weights_norm")?.unwrap_or(false).into());
    set("n_group", groups.into());
    set("topk_group", keys.optional_size("expert_group_used_count")?.unwrap_or(groups).into());
    let method = match (is_v3, groups) {
        (true, _) => "noaux_tc",
        (false, 0 | 1) => "greedy",
        (false, _) => "group_limited_greedy",
    };
    set("topk_method", method.into());
    Ok(())
}
