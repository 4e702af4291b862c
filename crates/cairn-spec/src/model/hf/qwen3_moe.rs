//! `model_type` `qwen3_moe`: `Qwen3MoeConfig` of transformers.

use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::foreign::unsupported;
use super::{Mapping, experts};
use crate::model::moe::{DenseLayers, Moe, Router, Scoring};
use crate::model::{
    AttentionForm, Family, Mlp, ModelFields, ModelSpec, NUM_HIDDEN_LAYERS_MAX, QkNorm,
    SlidingWindow, SpecError, WindowedLayers,
};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "qwen3_moe",
    architecture: "Qwen3MoeForCausalLM",
    body: "Qwen3MoeModel",
    also: &[],
    honors: &[
        "sliding_window",
        "use_sliding_window",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
    ],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults { bos: None, eos: &[], ..Defaults::llama(Family::Qwen3Moe) };

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_mlp_bias(config, Family::Qwen3Moe)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    decoder::with_gqa(&mut fields, |gqa| gqa.qk_norm = Some(QkNorm::PerHead));
    // Unlike in its dense sibling, a window is every layer's.
    if config.flag("use_sliding_window", false)? {
        let size = match config.size("sliding_window")? {
            None if !config.has("sliding_window") => Some(4096),
            size => size,
        };
        let window = |size| SlidingWindow { size, layers: WindowedLayers::All, rope: None };
        fields.attention.sliding_window = size.map(window);
    }
    let dense_layers = dense_layers(config, fields.num_hidden_layers)?;
    experts::replace(&mut fields, |activation, intermediate_size| {
        Ok(Moe {
            activation,
            intermediate_size,
            moe_intermediate_size: config.required_size("moe_intermediate_size")?,
            num_experts: experts::number(config)?,
            num_experts_per_tok: config.required_size("num_experts_per_tok")?,
            shared_intermediate_size: None,
            dense_layers,
            router: Router {
                scoring: Scoring::Softmax,
                correction_bias: false,
                groups: None,
                norm_topk_prob: config.flag("norm_topk_prob", false)?,
                routed_scaling_factor: 1.0,
                aux_loss_coef: experts::aux_loss_coef(config)?,
            },
        })
    })?;
    Ok(fields)
}

/// Layers listed in `mlp_only_layers`, and those between every `decoder_sparse_step`-th.
fn dense_layers(config: &Fields<'_>, layers: usize) -> Result<DenseLayers, SpecError> {
    let step = config.size("decoder_sparse_step")?.unwrap_or(1);
    let listed = match config.value("mlp_only_layers") {
        None => Vec::new(),
        Some(value) => {
            let numbers = value
                .as_array()
                .and_then(|items| items.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
            let refuse = || unsupported(config, "mlp_only_layers", value, Family::Qwen3Moe);
            numbers.ok_or_else(refuse)?
        }
    };
    if step == 0 {
        let value = Value::from(step);
        return Err(unsupported(config, "decoder_sparse_step", &value, Family::Qwen3Moe));
    }
    // The limit on layers is checked later; a list of a million is not made for nothing.
    let dense: Vec<bool> = (0..layers.min(NUM_HIDDEN_LAYERS_MAX))
        .map(|layer| listed.contains(&(layer as u64)) || !(layer + 1).is_multiple_of(step))
        .collect();
    Ok(if dense.contains(&true) { DenseLayers::Listed(dense) } else { DenseLayers::None })
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    let window = spec.attention.sliding_window.as_ref();
    map.insert("use_sliding_window".to_owned(), window.is_some().into());
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        map.insert("attention_bias".to_owned(), gqa.qkv_bias.into());
    }
    if let Mlp::Moe(moe) = &spec.mlp {
        let dense = (0..spec.num_hidden_layers).filter(|&layer| !moe.has_experts(layer));
        map.insert("mlp_only_layers".to_owned(), dense.collect::<Vec<_>>().into());
        map.insert("decoder_sparse_step".to_owned(), 1.into());
        map.insert("moe_intermediate_size".to_owned(), moe.moe_intermediate_size.into());
        // transformers 4 says `num_experts`, 5 `num_local_experts`.
        map.insert("num_experts".to_owned(), moe.num_experts.into());
        map.insert("num_local_experts".to_owned(), moe.num_experts.into());
        map.insert("num_experts_per_tok".to_owned(), moe.num_experts_per_tok.into());
        map.insert("norm_topk_prob".to_owned(), moe.router.norm_topk_prob.into());
        experts::write_aux_loss(moe, &mut map);
    }
    map
}
