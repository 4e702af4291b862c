//! `model_type` mixtral: `MixtralConfig` of transformers.
//!
//! The router's softmax runs over all experts; the weights of those chosen are divided by their sum.

use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::rope_fields::Keys;
use super::{Mapping, experts};
use crate::model::moe::{DenseLayers, Moe, Router, Scoring};
use crate::model::{Family, Mlp, ModelFields, ModelSpec, SlidingWindow, SpecError, WindowedLayers};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    body: "MixtralModel",
    also: &[],
    honors: &["sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults {
    rms_norm_eps: 1e-5,
    rope: Keys { default_theta: 1e6, ..Keys::WHOLE_HEAD },
    ..Defaults::llama(Family::Mixtral)
};

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_biases(config, Family::Mixtral)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    let window = |size| SlidingWindow { size, layers: WindowedLayers::All, rope: None };
    fields.attention.sliding_window = config.size("sliding_window")?.map(window);
    experts::replace(&mut fields, |activation, intermediate_size| {
        Ok(Moe {
            activation,
            intermediate_size,
            moe_intermediate_size: intermediate_size,
            num_experts: experts::number(config)?,
            num_experts_per_tok: config.size("num_experts_per_tok")?.unwrap_or(2),
            shared_intermediate_size: None,
            dense_layers: DenseLayers::None,
            router: Router {
                scoring: Scoring::Softmax,
                correction_bias: false,
                groups: None,
                norm_topk_prob: true,
                routed_scaling_factor: 1.0,
                aux_loss_coef: experts::aux_loss_coef(config)?,
            },
        })
    })?;
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    let window = spec.attention.sliding_window.as_ref();
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    if let Mlp::Moe(moe) = &spec.mlp {
        map.insert("num_local_experts".to_owned(), moe.num_experts.into());
        map.insert("num_experts_per_tok".to_owned(), moe.num_experts_per_tok.into());
        experts::write_aux_loss(moe, &mut map);
    }
    map
}
