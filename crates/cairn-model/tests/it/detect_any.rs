//! Models of every family, drawn at random: their tensors' names and shapes tell the family, and with
//! what is asked the numbers; tensors that are lost, renamed or of other shapes never make another model
//! without a word.

use std::collections::BTreeMap;

use cairn_model::{DetectError, TensorMap, detect_model_spec};
use cairn_spec::ModelSpec;
use cairn_spec::model::Family;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value, json};

use crate::detect::{ROPE, Shapes, numbers};

/// What a model is drawn from; each family takes what it has.
#[derive(Clone, Debug)]
struct Draw {
    layers: usize,
    groups: usize,
    heads_per_group: usize,
    head_dim: usize,
    /// Of families whose heads need not share out the width.
    hidden: usize,
    inner: usize,
    vocab: usize,
    positions: usize,
    theta: f64,
    eps: f64,
    window: usize,
    /// A bit for each choice of a family.
    bits: u32,
}

impl Draw {
    fn bit(&self, number: u32) -> bool {
        self.bits >> number & 1 == 1
    }

    fn heads(&self) -> usize {
        self.groups * self.heads_per_group
    }

    fn window(&self, bit: u32) -> Value {
        if self.bit(bit) { self.window.into() } else { Value::Null }
    }

    fn layer_types(&self, first_bit: u32) -> Value {
        let kind = |layer| {
            let windowed = self.bit(first_bit + u32::try_from(layer).unwrap() % 8);
            if windowed { "sliding_attention" } else { "full_attention" }
        };
        (0..self.layers).map(kind).collect::<Vec<_>>().into()
    }
}

fn draw() -> impl Strategy<Value = Draw> {
    let sizes = (1..4_usize, 1..3_usize, 1..4_usize, (1..5_usize).prop_map(|half| 4 * half));
    let widths = ((1..6_usize).prop_map(|n| 4 * n), 3..30_usize, 5..40_usize, 8..70_usize);
    let reals = (2.0..1e6_f64, 1e-8..1e-3_f64, 2..50_usize, any::<u32>());
    (sizes, widths, reals).prop_map(|(sizes, widths, reals)| Draw {
        layers: sizes.0,
        groups: sizes.1,
        heads_per_group: sizes.2,
        head_dim: sizes.3,
        hidden: widths.0,
        inner: widths.1,
        vocab: widths.2,
        positions: widths.3,
        theta: reals.0,
        eps: reals.1,
        window: reals.2,
        bits: reals.3,
    })
}

/// A `config.json` of the family.
fn config(family: Family, d: &Draw) -> Value {
    let width = d.heads() * d.head_dim;
    let mut config = json!({
        "model_type": family.model_type(), "vocab_size": d.vocab, "hidden_size": d.hidden,
        "num_hidden_layers": d.layers, "num_attention_heads": d.heads(),
        "num_key_value_heads": d.groups, "head_dim": d.head_dim, "intermediate_size": d.inner,
        "max_position_embeddings": d.positions, "rms_norm_eps": d.eps, "rope_theta": d.theta,
        "tie_word_embeddings": d.bit(0),
    });
    let own = match family {
        Family::Llama => json!({"attention_bias": d.bit(1), "mlp_bias": d.bit(2)}),
        Family::Mistral if d.bit(1) => {
            json!({"sliding_window": d.window, "layer_types": d.layer_types(3)})
        }
        Family::Mistral => json!({"sliding_window": d.window(2)}),
        Family::Qwen2 | Family::Qwen3 if d.bit(1) => json!({
            "use_sliding_window": true, "sliding_window": d.window,
            "layer_types": d.layer_types(3),
        }),
        Family::Qwen2 | Family::Qwen3 => json!({}),
        Family::Mixtral => json!({
            "num_local_experts": 4, "num_experts_per_tok": 1 + d.window % 4,
            "sliding_window": d.window(1),
        }),
        Family::Qwen3Moe => json!({
            "num_experts": 4, "num_experts_per_tok": 1 + d.window % 4, "norm_topk_prob": d.bit(1),
            "moe_intermediate_size": d.inner + 1, "use_sliding_window": d.bit(2),
            "sliding_window": d.window, "attention_bias": d.bit(3),
            "mlp_only_layers": if d.bit(4) && d.layers > 1 { json!([0]) } else { json!([]) },
        }),
        Family::DeepseekV2 | Family::DeepseekV3 => deepseek(family, d),
        Family::Olmo2 => {
            json!({"hidden_size": width, "head_dim": null, "attention_bias": d.bit(1)})
        }
        Family::Gemma2 => json!({
            "sliding_window": d.window, "query_pre_attn_scalar": 1 + d.window,
            "attn_logit_softcapping": if d.bit(1) { json!(30.0) } else { Value::Null },
            "tie_word_embeddings": true,
        }),
        Family::Gemma3Text => json!({
            "sliding_window": d.window, "query_pre_attn_scalar": 1 + d.window,
            "layer_types": d.layer_types(3), "rope_local_base_freq": d.theta + 1.0,
            "tie_word_embeddings": true,
        }),
        Family::Phi3 => json!({
            "hidden_size": width, "head_dim": null, "sliding_window": d.window(1),
            "partial_rotary_factor": if d.bit(2) { 0.5 } else { 1.0 },
        }),
        Family::Gpt2 | Family::GptNeox | Family::Bert | Family::ModernBert => {
            unlike_llama(family, d)
        }
    };
    for (field, value) in own.as_object().unwrap() {
        config[field] = value.clone();
    }
    let map = config.as_object_mut().unwrap();
    let may_be_null =
        |field: &str| ["sliding_window", "q_lora_rank", "attn_logit_softcapping"].contains(&field);
    map.retain(|field, value| may_be_null(field) || !value.is_null());
    config
}

/// Fields of the families that name their tensors in their own ways.
fn unlike_llama(family: Family, d: &Draw) -> Value {
    let width = d.heads() * d.head_dim;
    match family {
        Family::Gpt2 => json!({
            "hidden_size": width, "layer_norm_epsilon": d.eps, "n_inner": d.inner,
            "activation_function": if d.bit(1) { "gelu_new" } else { "relu" },
            "scale_attn_weights": d.bit(2), "scale_attn_by_inverse_layer_idx": d.bit(3),
            "tie_word_embeddings": true,
        }),
        Family::GptNeox => json!({
            "hidden_size": width, "layer_norm_eps": d.eps, "attention_bias": d.bit(1),
            "rotary_pct": if d.bit(2) { 0.5 } else { 1.0 }, "rotary_emb_base": d.theta,
            "rope_theta": null, "head_dim": null, "num_key_value_heads": null,
            "use_parallel_residual": d.bit(3), "hidden_act": if d.bit(4) { "gelu" } else { "relu" },
        }),
        Family::Bert => json!({
            "hidden_size": width, "layer_norm_eps": d.eps, "tie_word_embeddings": true,
            "head_dim": null, "num_key_value_heads": null, "rope_theta": null,
            "hidden_act": if d.bit(4) { "gelu" } else { "relu" },
            "architectures": [if d.bit(1) { "BertModel" } else { "BertForMaskedLM" }],
        }),
        Family::ModernBert => json!({
            "hidden_size": width, "norm_eps": d.eps, "tie_word_embeddings": true,
            "head_dim": null, "num_key_value_heads": null, "rope_theta": null,
            "global_rope_theta": d.theta, "local_rope_theta": d.theta + 1.0,
            "local_attention": 2 * d.window, "layer_types": d.layer_types(3),
            "attention_bias": d.bit(1), "mlp_bias": d.bit(2), "norm_bias": d.bit(13),
            "classifier_bias": d.bit(14), "decoder_bias": d.bit(15),
            "architectures": [if d.bit(16) { "ModernBertModel" } else { "ModernBertForMaskedLM" }],
        }),
        other => panic!("{other} names its tensors as LLaMA does"),
    }
}

fn deepseek(family: Family, d: &Draw) -> Value {
    let mut config = json!({
        "num_key_value_heads": d.heads(), "head_dim": null, "kv_lora_rank": d.hidden + 2,
        "q_lora_rank": if d.bit(1) { json!(d.hidden + 1) } else { Value::Null },
        "qk_nope_head_dim": d.head_dim, "qk_rope_head_dim": 2 + d.head_dim,
        "v_head_dim": d.inner, "attention_bias": d.bit(2), "n_routed_experts": 4,
        "num_experts_per_tok": 1 + d.window % 2, "moe_intermediate_size": d.inner + 3,
        "n_shared_experts": d.window % 3, "first_k_dense_replace": d.window % d.layers,
        "routed_scaling_factor": d.eps * 1e4, "n_group": 2, "topk_group": 1,
    });
    if family == Family::DeepseekV2 {
        config["topk_method"] = if d.bit(3) { "greedy" } else { "group_limited_greedy" }.into();
    } else {
        config["norm_topk_prob"] = d.bit(3).into();
    }
    config
}

/// What the config says of a field that is asked for; where it has no such field, of the one that
/// answers it.
fn answer(field: &'static str, config: &Map<String, Value>) -> (&'static str, Value) {
    let field = match field {
        _ if ROPE.contains(&field) && config.contains_key("rope_parameters") => "rope_parameters",
        "max_window_layers" | "sliding_window_pattern" | "global_attn_every_n_layers" => {
            "layer_types"
        }
        other => other,
    };
    (field, config.get(field).cloned().unwrap_or(Value::Null))
}

/// Detects the model of `shapes`, answering what is asked as the model's own description does.
fn dialogue(spec: &ModelSpec, shapes: &Shapes) -> Result<ModelSpec, DetectError> {
    let config = spec.to_hf_config().unwrap();
    let config = config.as_object().unwrap();
    let mut told = Map::new();
    for _ in 0..6 {
        let open = match detect_model_spec(&told, shapes) {
            Err(DetectError::Ambiguous { .. } | DetectError::Roberta { may_be_bert: true, .. })
                if !told.contains_key("model_type") =>
            {
                vec!["model_type"]
            }
            Err(DetectError::Incomplete { questions, .. }) => questions,
            other => return other,
        };
        for field in open {
            let (field, value) = answer(field, config);
            told.insert(field.to_owned(), value);
        }
    }
    panic!("asked again and again: {told:?}")
}

fn tensors(spec: &ModelSpec) -> Shapes {
    let map = TensorMap::new(spec);
    let tensors = map.tensors().into_iter();
    Shapes(tensors.map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect())
}

fn any_spec() -> impl Strategy<Value = ModelSpec> {
    (any::<Index>(), draw()).prop_filter_map("no model", |(family, draw)| {
        let family = Family::ALL[family.index(Family::ALL.len())];
        let config = config(family, &draw);
        let spec = ModelSpec::from_hf_config(&config);
        Some(spec.unwrap_or_else(|error| panic!("{error}: {config:#}")))
    })
}

/// Something that happens to a file's tensors.
#[derive(Clone, Debug)]
enum Damage {
    Lose(Index),
    Rename(Index, u8),
    Reshape(Index, Index, usize),
    Swap(Index, Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<Index>().prop_map(Damage::Lose),
        (any::<Index>(), 0..5_u8).prop_map(|(tensor, how)| Damage::Rename(tensor, how)),
        (any::<Index>(), any::<Index>(), 0..70_usize)
            .prop_map(|(t, axis, size)| { Damage::Reshape(t, axis, size) }),
        (any::<Index>(), any::<Index>()).prop_map(|(first, second)| Damage::Swap(first, second)),
    ]
}

impl Damage {
    fn apply(&self, tensors: &mut BTreeMap<String, Vec<usize>>) {
        let names: Vec<String> = tensors.keys().cloned().collect();
        if names.is_empty() {
            return;
        }
        match self {
            Self::Lose(tensor) => drop(tensors.remove(tensor.get(&names))),
            Self::Rename(tensor, how) => {
                let name = tensor.get(&names);
                let shape = tensors.remove(name).unwrap();
                let renamed = match how {
                    0 => format!("{name}.x"),
                    1 => format!("roberta.{name}"),
                    2 => name.split_once('.').map_or("", |(_, rest)| rest).to_owned(),
                    3 => name.replacen(".0.", ".18446744073709551615.", 1),
                    _ => name.replace("weight", "bias"),
                };
                tensors.insert(renamed, shape);
            }
            Self::Reshape(tensor, axis, size) => {
                let shape = tensors.get_mut(tensor.get(&names)).unwrap();
                match axis.index(shape.len() + 2) {
                    axis if axis < shape.len() => shape[axis] = *size,
                    axis if axis == shape.len() => shape.push(*size),
                    _ => drop(shape.pop()),
                }
            }
            Self::Swap(first, second) => {
                let (first, second) = (first.get(&names), second.get(&names));
                let (a, b) = (tensors[first].clone(), tensors[second].clone());
                tensors.insert(first.clone(), b);
                tensors.insert(second.clone(), a);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn tensors_and_answers_make_the_model(spec in any_spec()) {
        let found = dialogue(&spec, &tensors(&spec));
        prop_assert_eq!(found.as_ref().map(numbers), Ok(numbers(&spec)));
    }

    #[test]
    fn damaged_tensors_make_no_other_model(
        spec in any_spec(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let mut shapes = tensors(&spec);
        damages.iter().for_each(|damage| damage.apply(&mut shapes.0));
        // Not even without the answers.
        drop(detect_model_spec(&Map::new(), &shapes));
        if let Ok(found) = dialogue(&spec, &shapes) {
            // What is found has every tensor that is there, as it is there, and no other: a LLaMA that
            // lost its only bias of an output is a Qwen 2.
            let expected = tensors(&found).0;
            let known = shapes.0.keys().filter(|name| !TensorMap::is_ignorable(&found, name));
            prop_assert_eq!(known.count(), expected.len());
            let spelled = |name: &String| {
                let spellings = TensorMap::spellings(found.family, name);
                spellings.into_iter().find(|spelling| shapes.0.contains_key(spelling))
            };
            for (name, shape) in &expected {
                prop_assert_eq!(spelled(name).map(|name| &shapes.0[&name]), Some(shape), "{}", name);
            }
        }
    }
}
