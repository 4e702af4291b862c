//! `model_type` `deepseek_v2` and `deepseek_v3`: transformers' `DeepseekV2Config` and `DeepseekV3Config`.
//!
//! Latent attention, leading dense layers, shared experts. V2 scores by softmax and judges groups by
//! their best expert; V3 by sigmoid with a correction bias, groups by their two best. YaRN's
//! `mscale_all_dim` also sharpens the scores: their factor is multiplied by its square.

use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::foreign::unsupported;
use super::{Mapping, experts};
use crate::model::moe::{DenseLayers, GroupScore, Moe, Router, RouterGroups, Scoring};
use crate::model::{
    AttentionForm, Family, Mla, Mlp, ModelFields, ModelSpec, Position, RopeScaling, SpecError,
    YarnScaling,
};
use serde_json::{Map, Value};

const HONORS: &[&str] = &["kv_lora_rank", "n_routed_experts", "num_experts_per_tok"];

pub(super) const V2: Mapping = Mapping {
    model_type: "deepseek_v2",
    architecture: "DeepseekV2ForCausalLM",
    body: "DeepseekV2Model",
    also: &[],
    honors: HONORS,
    read: |config| read(config, Family::DeepseekV2),
    write,
};

pub(super) const V3: Mapping = Mapping {
    model_type: "deepseek_v3",
    architecture: "DeepseekV3ForCausalLM",
    body: "DeepseekV3Model",
    also: &[],
    honors: HONORS,
    read: |config| read(config, Family::DeepseekV3),
    write,
};

const fn defaults(family: Family) -> Defaults {
    let llama = Defaults::llama(family);
    // What is rotated is `qk_rope_head_dim`, whatever `head_dim` says.
    let head_dim = Some(64);
    match family {
        Family::DeepseekV3 => Defaults { head_dim, bos: Some(0), eos: &[1], ..llama },
        _ => Defaults { head_dim, ..llama },
    }
}

fn read(config: &Fields<'_>, family: Family) -> Result<ModelFields, SpecError> {
    decoder::refuse_mlp_bias(config, family)?;
    let mut fields = decoder::read(config, &defaults(family))?;
    let mla = latent(config, family)?;
    if let Position::Rope(rope) = &mut fields.position {
        rope.rotary_dim = mla.qk_rope_head_dim;
        rope.interleaved = family == Family::DeepseekV2 || config.flag("rope_interleave", true)?;
        fields.attention.scale = score_scale(&mla, &rope.scaling);
    }
    fields.attention.form = AttentionForm::Mla(mla);
    experts::replace(&mut fields, |activation, intermediate_size| {
        let moe_intermediate_size = config.required_size("moe_intermediate_size")?;
        let shared = config.size("n_shared_experts")?.filter(|count| *count > 0);
        let dense = config.size("first_k_dense_replace")?;
        let default_dense = if family == Family::DeepseekV3 { 3 } else { 0 };
        Ok(Moe {
            activation,
            intermediate_size,
            moe_intermediate_size,
            num_experts: config.required_size("n_routed_experts")?,
            num_experts_per_tok: config.required_size("num_experts_per_tok")?,
            shared_intermediate_size: shared.map(|n| n.saturating_mul(moe_intermediate_size)),
            dense_layers: DenseLayers::First(dense.unwrap_or(default_dense)),
            router: router(config, family)?,
        })
    })?;
    Ok(fields)
}

fn latent(config: &Fields<'_>, family: Family) -> Result<Mla, SpecError> {
    let num_attention_heads = config.required_size("num_attention_heads")?;
    // The latent is one head's; what it expands to is every query head's own.
    if let Some(value) = config.value("num_key_value_heads")
        && config.size("num_key_value_heads")? != Some(num_attention_heads)
    {
        return Err(unsupported(config, "num_key_value_heads", value, family));
    }
    if !config.has("q_lora_rank") {
        return Err(config.missing("q_lora_rank"));
    }
    let qk_nope_head_dim = config.required_size("qk_nope_head_dim")?;
    let qk_rope_head_dim = config.required_size("qk_rope_head_dim")?;
    confirm_head_dims(config, [qk_nope_head_dim, qk_rope_head_dim])?;
    Ok(Mla {
        num_attention_heads,
        q_lora_rank: config.size("q_lora_rank")?,
        kv_lora_rank: config.required_size("kv_lora_rank")?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: config.required_size("v_head_dim")?,
        bias: config.flag("attention_bias", false)?,
    })
}

/// A key has two parts, and files may say how long it is in all. transformers writes and goes by the
/// rotated part's length as `head_dim`, others by the whole key's; any other number is of another model.
fn confirm_head_dims(config: &Fields<'_>, [nope, rope]: [usize; 2]) -> Result<(), SpecError> {
    let key = nope.saturating_add(rope);
    let contradiction = |field: &str, actual: usize| SpecError::Contradiction {
        first: field.to_owned(),
        first_value: actual.to_string(),
        second: "qk_nope_head_dim + qk_rope_head_dim".to_owned(),
        second_value: format!("{nope} + {rope}"),
    };
    match (config.size("qk_head_dim")?, config.size("head_dim")?) {
        (Some(actual), _) if actual != key => Err(contradiction("qk_head_dim", actual)),
        (_, Some(actual)) if actual != key && actual != rope => {
            Err(contradiction("head_dim", actual))
        }
        _ => Ok(()),
    }
}

/// The factor on the scores where YaRN changes it.
fn score_scale(mla: &Mla, scaling: &RopeScaling) -> Option<f64> {
    let RopeScaling::Yarn(YarnScaling { factor, mscale_all_dim, .. }) = scaling else {
        return None;
    };
    let by = mscale_all_dim.filter(|by| *by != 0.0)?;
    let mscale = if *factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    #[expect(clippy::cast_precision_loss, reason = "sizes are below 2^24")]
    let key = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) as f64;
    Some(key.powf(-0.5) * mscale * mscale)
}

fn router(config: &Fields<'_>, family: Family) -> Result<Router, SpecError> {
    let is_v3 = family == Family::DeepseekV3;
    let (scoring, methods): (_, &[&str]) =
        if is_v3 { ("sigmoid", &["noaux_tc"]) } else { ("softmax", METHODS_V2) };
    for (field, allowed) in [("scoring_func", &[scoring][..]), ("topk_method", methods)] {
        let text = config.text(field)?;
        if let (Some(text), Some(value)) = (text, config.value(field))
            && !allowed.contains(&text.as_str())
        {
            return Err(unsupported(config, field, value, family));
        }
    }
    if let Some(value) = config.value("moe_layer_freq")
        && config.size("moe_layer_freq")? != Some(1)
    {
        return Err(unsupported(config, "moe_layer_freq", value, family));
    }
    // V2's own code divides by the sum then, transformers does not.
    let norm_topk_prob = config.flag("norm_topk_prob", is_v3)?;
    if let Some(value) = config.value("norm_topk_prob").filter(|_| norm_topk_prob && !is_v3) {
        return Err(unsupported(config, "norm_topk_prob", value, family));
    }
    let limited = is_v3 || config.text("topk_method")?.as_deref() == Some(METHODS_V2[1]);
    let groups = match (limited, config.size("n_group")?, config.size("topk_group")?) {
        (false, ..) | (true, Some(1), Some(1)) => None,
        (true, None, _) => return Err(config.missing("n_group")),
        (true, _, None) => return Err(config.missing("topk_group")),
        (true, Some(n_group), Some(topk_group)) => {
            let score = if is_v3 { GroupScore::TopTwo } else { GroupScore::Max };
            Some(RouterGroups { n_group, topk_group, score })
        }
    };
    let default_scale = if is_v3 { 2.5 } else { 1.0 };
    Ok(Router {
        scoring: if is_v3 { Scoring::Sigmoid } else { Scoring::Softmax },
        correction_bias: is_v3,
        groups,
        norm_topk_prob,
        routed_scaling_factor: config.real("routed_scaling_factor")?.unwrap_or(default_scale),
        // transformers computes no such loss of these models.
        aux_loss_coef: None,
    })
}

/// V2 chooses among all experts, or among those of the best groups.
const METHODS_V2: &[&str] = &["greedy", "group_limited_greedy"];

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &defaults(spec.family));
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    if let AttentionForm::Mla(mla) = &spec.attention.form {
        set("num_attention_heads", mla.num_attention_heads.into());
        set("num_key_value_heads", mla.num_attention_heads.into());
        set("head_dim", mla.qk_rope_head_dim.into());
        set("q_lora_rank", mla.q_lora_rank.into());
        set("kv_lora_rank", mla.kv_lora_rank.into());
        set("qk_nope_head_dim", mla.qk_nope_head_dim.into());
        set("qk_rope_head_dim", mla.qk_rope_head_dim.into());
        set("v_head_dim", mla.v_head_dim.into());
        set("attention_bias", mla.bias.into());
    }
    if let (Position::Rope(rope), Family::DeepseekV3) = (&spec.position, spec.family) {
        set("rope_interleave", rope.interleaved.into());
    }
    if let Mlp::Moe(moe) = &spec.mlp {
        write_experts(spec, moe, &mut map);
    }
    map
}

fn write_experts(spec: &ModelSpec, moe: &Moe, map: &mut Map<String, Value>) {
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    let is_v3 = spec.family == Family::DeepseekV3;
    set("moe_intermediate_size", moe.moe_intermediate_size.into());
    set("n_routed_experts", moe.num_experts.into());
    set("num_experts_per_tok", moe.num_experts_per_tok.into());
    let shared = moe.shared_intermediate_size.unwrap_or(0);
    set("n_shared_experts", shared.checked_div(moe.moe_intermediate_size).into());
    let dense = match &moe.dense_layers {
        DenseLayers::None => 0,
        DenseLayers::First(count) => *count,
        // Not to be said in these files; reading back finds that out.
        DenseLayers::Listed(layers) => layers.iter().take_while(|dense| **dense).count(),
    };
    set("first_k_dense_replace", dense.into());
    set("norm_topk_prob", moe.router.norm_topk_prob.into());
    set("routed_scaling_factor", moe.router.routed_scaling_factor.into());
    let groups = moe.router.groups;
    set("n_group", groups.map_or(1, |groups| groups.n_group).into());
    set("topk_group", groups.map_or(1, |groups| groups.topk_group).into());
    let method = match (is_v3, groups) {
        (true, _) => "noaux_tc",
        (false, None) => METHODS_V2[0],
        (false, Some(_)) => METHODS_V2[1],
    };
    set("topk_method", method.into());
    set("scoring_func", if is_v3 { "sigmoid" } else { "softmax" }.into());
    if is_v3 {
        // Layers that predict further tokens are not part of the model here.
        set("num_nextn_predict_layers", 0.into());
    }
}
