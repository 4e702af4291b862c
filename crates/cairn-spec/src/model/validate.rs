//! The checks behind [`ModelSpec::new`](super::ModelSpec::new).

use super::rope::LongropeScaling;
use super::{
    Attention, AttentionForm, EXPERTS_OF_ALL_LAYERS_MAX, Family, Gqa, HEAD_DIM_MAX,
    HIDDEN_SIZE_MAX, INTERMEDIATE_SIZE_MAX, MAX_POSITION_EMBEDDINGS_MAX, Mla, Mlp, ModelFields,
    NUM_ATTENTION_HEADS_MAX, NUM_EXPERTS_MAX, NUM_HIDDEN_LAYERS_MAX, Position, Rope, RopeScaling,
    SpecError, VOCAB_SIZE_MAX, WindowedLayers,
    moe::{DenseLayers, GroupScore, Moe},
};

/// Largest accepted factor, base or bound of a rotation: above every file seen, and its square is
/// finite in f32.
const REAL_MAX: f64 = 1e18;

/// Least number that a norm may add. A row of zeros is divided by its root, in f32: by zero, it would
/// become NaN, as it does in transformers.
const EPS_MIN: f64 = 1e-37;

pub(super) fn validate(fields: &ModelFields) -> Result<(), SpecError> {
    size("vocab_size", fields.vocab_size, VOCAB_SIZE_MAX)?;
    size("hidden_size", fields.hidden_size, HIDDEN_SIZE_MAX)?;
    size("num_hidden_layers", fields.num_hidden_layers, NUM_HIDDEN_LAYERS_MAX)?;
    size("max_position_embeddings", fields.max_position_embeddings, MAX_POSITION_EMBEDDINGS_MAX)?;
    size("intermediate_size", fields.mlp.intermediate_size(), INTERMEDIATE_SIZE_MAX)?;
    if let Some(rows) = fields.embedding.type_vocab_size {
        size("type_vocab_size", rows, VOCAB_SIZE_MAX)?;
    }
    optional_real("embedding scale", fields.embedding.scale, REAL_MAX)?;
    let softcap = fields.head.and_then(|head| head.softcap);
    optional_real("final_logit_softcapping", softcap, REAL_MAX)?;
    real(eps_name(fields.family), fields.norm.eps, EPS_MIN, 1.0)?;
    real("initializer_range", fields.initializer_range, 0.0, 1.0)?;
    for (name, rate) in [
        ("embedding dropout", fields.dropout.embd),
        ("attention dropout", fields.dropout.attn),
        ("residual dropout", fields.dropout.resid),
    ] {
        real(name, rate, 0.0, 0.999)?;
    }
    attention(&fields.attention, fields.num_hidden_layers)?;
    if let Mlp::Moe(moe) = &fields.mlp {
        experts(moe, fields.num_hidden_layers)?;
    }
    if let Position::Rope(rope) = &fields.position {
        rotation(rope, rotated_dims(&fields.attention.form))?;
    }
    // Token ids outside the vocabulary are common in files (GPT-2's 50256 in a model cut down to
    // 320 tokens) and change no number, so they are not refused.
    Ok(())
}

/// What the family's files call the number that a norm adds.
const fn eps_name(family: Family) -> &'static str {
    match family {
        Family::Gpt2 => "layer_norm_epsilon",
        Family::Bert | Family::GptNeox => "layer_norm_eps",
        Family::ModernBert => "norm_eps",
        _ => "rms_norm_eps",
    }
}

fn attention(attention: &Attention, num_hidden_layers: usize) -> Result<(), SpecError> {
    match &attention.form {
        AttentionForm::Gqa(gqa) => grouped(gqa)?,
        AttentionForm::Mla(mla) => latent(mla)?,
    }
    optional_real("attn_logit_softcapping", attention.logit_softcap, REAL_MAX)?;
    optional_real("attention scale", attention.scale, REAL_MAX)?;
    let Some(window) = &attention.sliding_window else { return Ok(()) };
    size("sliding_window", window.size, MAX_POSITION_EMBEDDINGS_MAX)?;
    if let WindowedLayers::Listed(layers) = &window.layers
        && layers.len() != num_hidden_layers
    {
        return Err(SpecError::LayerCount {
            field: "layer_types",
            actual: layers.len(),
            num_hidden_layers,
        });
    }
    match &window.rope {
        Some(rope) => rotation(rope, rotated_dims(&attention.form)),
        None => Ok(()),
    }
}

fn grouped(gqa: &Gqa) -> Result<(), SpecError> {
    size("num_attention_heads", gqa.num_attention_heads, NUM_ATTENTION_HEADS_MAX)?;
    size("num_key_value_heads", gqa.num_key_value_heads, NUM_ATTENTION_HEADS_MAX)?;
    size("head_dim", gqa.head_dim, HEAD_DIM_MAX)?;
    if !gqa.num_attention_heads.is_multiple_of(gqa.num_key_value_heads) {
        return Err(SpecError::UnevenHeads {
            num_attention_heads: gqa.num_attention_heads,
            num_key_value_heads: gqa.num_key_value_heads,
        });
    }
    Ok(())
}

fn latent(mla: &Mla) -> Result<(), SpecError> {
    size("num_attention_heads", mla.num_attention_heads, NUM_ATTENTION_HEADS_MAX)?;
    if let Some(rank) = mla.q_lora_rank {
        size("q_lora_rank", rank, HIDDEN_SIZE_MAX)?;
    }
    size("kv_lora_rank", mla.kv_lora_rank, HIDDEN_SIZE_MAX)?;
    size("qk_nope_head_dim", mla.qk_nope_head_dim, HEAD_DIM_MAX)?;
    size("qk_rope_head_dim", mla.qk_rope_head_dim, HEAD_DIM_MAX)?;
    size("v_head_dim", mla.v_head_dim, HEAD_DIM_MAX)
}

fn experts(moe: &Moe, num_hidden_layers: usize) -> Result<(), SpecError> {
    size("moe_intermediate_size", moe.moe_intermediate_size, INTERMEDIATE_SIZE_MAX)?;
    size("num_experts", moe.num_experts, NUM_EXPERTS_MAX)?;
    if moe.num_experts * num_hidden_layers > EXPERTS_OF_ALL_LAYERS_MAX {
        let (num_experts, max) = (moe.num_experts, EXPERTS_OF_ALL_LAYERS_MAX);
        return Err(SpecError::TooManyExperts { num_experts, num_hidden_layers, max });
    }
    size("num_experts_per_tok", moe.num_experts_per_tok, moe.num_experts)?;
    if let Some(width) = moe.shared_intermediate_size {
        size("shared experts' intermediate_size", width, INTERMEDIATE_SIZE_MAX)?;
    }
    optional_real("routed_scaling_factor", Some(moe.router.routed_scaling_factor), REAL_MAX)?;
    optional_nonnegative("router_aux_loss_coef", moe.router.aux_loss_coef)?;
    if let DenseLayers::Listed(layers) = &moe.dense_layers
        && layers.len() != num_hidden_layers
    {
        let actual = layers.len();
        return Err(SpecError::LayerCount { field: "dense layers", actual, num_hidden_layers });
    }
    let Some(groups) = moe.router.groups else { return Ok(()) };
    size("n_group", groups.n_group, moe.num_experts)?;
    size("topk_group", groups.topk_group, groups.n_group)?;
    let size = moe.num_experts / groups.n_group;
    let least = if groups.score == GroupScore::TopTwo { 2 } else { 1 };
    let fits = moe.num_experts.is_multiple_of(groups.n_group)
        && size >= least
        && size * groups.topk_group >= moe.num_experts_per_tok;
    if !fits {
        return Err(SpecError::ExpertGroups {
            num_experts: moe.num_experts,
            num_experts_per_tok: moe.num_experts_per_tok,
            n_group: groups.n_group,
            topk_group: groups.topk_group,
        });
    }
    Ok(())
}

/// Dimensions of a key that a rotation may reach.
fn rotated_dims(form: &AttentionForm) -> usize {
    match form {
        AttentionForm::Gqa(gqa) => gqa.head_dim,
        AttentionForm::Mla(mla) => mla.qk_rope_head_dim,
    }
}

fn rotation(rope: &Rope, key_dim: usize) -> Result<(), SpecError> {
    // Above 1, so that the logarithm YaRN divides by is positive.
    real("rope_theta", rope.theta, 1.000_001, REAL_MAX)?;
    size("rotary dimension", rope.rotary_dim, HEAD_DIM_MAX)?;
    if !rope.rotary_dim.is_multiple_of(2) || rope.rotary_dim > key_dim {
        return Err(SpecError::RotaryDim { rotary_dim: rope.rotary_dim, key_dim });
    }
    match &rope.scaling {
        RopeScaling::Default => Ok(()),
        RopeScaling::Linear { factor } => real("rope factor", *factor, 1.0, REAL_MAX),
        RopeScaling::Dynamic { factor, original_max_position_embeddings: original } => {
            size("original_max_position_embeddings", *original, MAX_POSITION_EMBEDDINGS_MAX)?;
            real("rope factor", *factor, 1.0, REAL_MAX)
        }
        RopeScaling::Longrope(longrope) => long_rotation(longrope, rope.rotary_dim),
        RopeScaling::Llama3(llama3) => {
            let original = llama3.original_max_position_embeddings;
            size("original_max_position_embeddings", original, MAX_POSITION_EMBEDDINGS_MAX)?;
            real("rope factor", llama3.factor, 1.0, REAL_MAX)?;
            real("low_freq_factor", llama3.low_freq_factor, 1e-6, 1e6)?;
            // Equal factors would divide by zero; transformers warns and computes NaN.
            real("high_freq_factor", llama3.high_freq_factor, llama3.low_freq_factor + 1e-6, 1e6)
        }
        RopeScaling::Yarn(yarn) => {
            let original = yarn.original_max_position_embeddings;
            size("original_max_position_embeddings", original, MAX_POSITION_EMBEDDINGS_MAX)?;
            real("rope factor", yarn.factor, 1.0, REAL_MAX)?;
            real("beta_slow", yarn.beta_slow, 1e-6, 1e6)?;
            real("beta_fast", yarn.beta_fast, yarn.beta_slow, 1e6)?;
            optional_real("attention_factor", yarn.attention_factor, 1e6)?;
            optional_nonnegative("mscale", yarn.mscale)?;
            optional_nonnegative("mscale_all_dim", yarn.mscale_all_dim)
        }
    }
}

fn long_rotation(longrope: &LongropeScaling, rotary_dim: usize) -> Result<(), SpecError> {
    let original = longrope.original_max_position_embeddings;
    // The logarithm of the length divides.
    let range = (original.to_string(), MAX_POSITION_EMBEDDINGS_MAX);
    if !(2..=range.1).contains(&original) {
        return Err(SpecError::OutOfRange {
            field: "original_max_position_embeddings".to_owned(),
            actual: range.0,
            min: "2".to_owned(),
            max: range.1.to_string(),
        });
    }
    real("rope factor", longrope.factor, 1e-6, REAL_MAX)?;
    optional_real("attention_factor", longrope.attention_factor, 1e6)?;
    for (field, factors) in
        [("short_factor", &longrope.short_factor), ("long_factor", &longrope.long_factor)]
    {
        if factors.len() != rotary_dim / 2 {
            let (actual, pairs) = (factors.len(), rotary_dim / 2);
            return Err(SpecError::FactorCount { field, actual, pairs });
        }
        factors.iter().try_for_each(|factor| real(field, *factor, 1e-6, REAL_MAX))?;
    }
    Ok(())
}

fn size(field: &str, value: usize, max: usize) -> Result<(), SpecError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(SpecError::OutOfRange {
        field: field.to_owned(),
        actual: value.to_string(),
        min: "1".to_owned(),
        max: max.to_string(),
    })
}

pub(super) fn real(field: &str, value: f64, min: f64, max: f64) -> Result<(), SpecError> {
    // Written so that NaN, which is in no range, is refused.
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(SpecError::OutOfRange {
        field: field.to_owned(),
        actual: shown(value),
        // The least positive number is a way to leave out zero.
        min: if min.to_bits() == f64::MIN_POSITIVE.to_bits() {
            "0 (excluded)".to_owned()
        } else {
            shown(min)
        },
        max: shown(max),
    })
}

/// A number without rows of zeros.
fn shown(value: f64) -> String {
    let is_plain = value == 0.0 || !value.is_finite() || (1e-7..1e15).contains(&value.abs());
    if is_plain { value.to_string() } else { format!("{value:e}") }
}

/// A positive number.
pub(super) fn positive(field: &str, value: f64) -> Result<(), SpecError> {
    real(field, value, f64::MIN_POSITIVE, REAL_MAX)
}

/// Absent, or a positive number.
fn optional_real(field: &str, value: Option<f64>, max: f64) -> Result<(), SpecError> {
    value.map_or(Ok(()), |value| real(field, value, f64::MIN_POSITIVE, max))
}

fn optional_nonnegative(field: &str, value: Option<f64>) -> Result<(), SpecError> {
    value.map_or(Ok(()), |value| real(field, value, 0.0, 1e6))
}
