//! Which model a set of tensors is: with a configuration, without one, and with the wrong one.

use std::collections::BTreeMap;
use std::ops::Range;

use cairn_artifacts::safetensors::WeightFolder;
use cairn_model::{DetectError, LoadError, TensorSource, assumed_fields, detect_model_spec};
use cairn_spec::model::moe::DenseLayers;
use cairn_spec::model::{AttentionForm, Dropout, Family, Mlp, QkNorm, SpecError, SpecialTokens};
use cairn_spec::{ModelFields, ModelSpec};
use serde_json::{Map, Value, json};

use crate::goldens::{folder, folders, spec};

/// Names and shapes of a golden folder, to change.
pub(crate) struct Shapes(pub(crate) BTreeMap<String, Vec<usize>>);

impl Shapes {
    fn of(name: &str) -> Self {
        let folder = WeightFolder::open(&folder(name)).unwrap();
        Self(
            folder
                .tensors()
                .map(|tensor| (tensor.name.to_owned(), tensor.shape.to_vec()))
                .collect(),
        )
    }
}

impl TensorSource for Shapes {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }

    fn read_f32(&self, _: &str, _: Range<usize>, _: &mut [f32]) -> Result<(), String> {
        Err("shapes only".to_owned())
    }
}

fn config(name: &str) -> Map<String, Value> {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_configuration_decides_and_the_tensors_confirm_it() {
    for name in folders() {
        assert_eq!(
            detect_model_spec(&config(&name), &Shapes::of(&name)),
            Ok(spec(&name)),
            "{name}"
        );
    }
}

#[test]
fn a_configuration_of_another_family_or_other_sizes_is_refused_with_both_readings() {
    let error = detect_model_spec(&config("gpt2"), &Shapes::of("llama")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "config.json says gpt2, but the tensors are named as in a model of llama or mistral"
    );
    let mut wider = config("qwen3");
    wider.insert("vocab_size".to_owned(), 321.into());
    let Err(DetectError::Tensors(LoadError::Mismatch { problems })) =
        detect_model_spec(&wider, &Shapes::of("qwen3"))
    else {
        panic!("the vocabulary disagrees")
    };
    assert_eq!(problems, ["model.embed_tokens.weight is [320, 64], expected [321, 64]"]);
}

/// Fields that a rotation's one object in the newer style answers.
pub(crate) const ROPE: [&str; 8] = [
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "global_rope_theta",
    "local_rope_theta",
];

/// Answers, from a folder's own description, what is asked of its tensors, and nothing else; returns
/// the spec and the fields that were asked for.
fn answered(name: &str) -> (ModelSpec, Vec<&'static str>) {
    let (config, shapes) = (config(name), Shapes::of(name));
    let mut told = Map::new();
    let mut asked = Vec::new();
    for _ in 0..4 {
        match detect_model_spec(&told, &shapes) {
            Ok(spec) => return (spec, asked),
            Err(DetectError::Ambiguous { families }) => {
                assert_eq!(families, [Family::Llama, Family::Mistral], "{name}");
                told.insert("model_type".to_owned(), config["model_type"].clone());
            }
            Err(DetectError::Incomplete { family, questions }) => {
                assert_eq!(family, spec(name).family, "{name}");
                for field in questions {
                    let field_or_object =
                        if ROPE.contains(&field) { "rope_parameters" } else { field };
                    // A file may leave out what its family's class takes for granted.
                    let answer = config.get(field_or_object).cloned().unwrap_or_default();
                    told.insert(field_or_object.to_owned(), answer);
                    asked.push(field);
                }
            }
            Err(other) => panic!("{name}: {other}"),
        }
    }
    panic!("{name}: asked again and again: {asked:?}");
}

/// The fields that change a number of the model's outputs.
pub(crate) fn numbers(spec: &ModelSpec) -> ModelFields {
    let mut fields = ModelFields::clone(spec);
    fields.tokens = SpecialTokens::default();
    fields.dropout = Dropout::default();
    fields.initializer_range = 0.0;
    if let Mlp::Moe(moe) = &mut fields.mlp
        && (0..fields.num_hidden_layers).all(|layer| moe.has_experts(layer))
    {
        moe.dense_layers = DenseLayers::None;
        // The width of layers that there are none of.
        moe.intermediate_size = 0;
    }
    fields
}

#[test]
fn without_a_configuration_what_is_asked_is_what_shapes_do_not_tell() {
    for name in folders() {
        let (found, asked) = answered(&name);
        assert_eq!(numbers(&found), numbers(&spec(&name)), "{name}: {asked:?}");
        assert!(asked.iter().any(|field| field.contains("eps")), "{name}: {asked:?}");
        let asks_for_heads = asked.iter().any(|field| field.contains("head"));
        // A norm over each head has its width.
        let has_told_heads = matches!(
            &found.attention.form,
            AttentionForm::Gqa(gqa) if gqa.qk_norm == Some(QkNorm::PerHead)
        );
        assert_ne!(asks_for_heads, has_told_heads, "{name}: {asked:?}");
        let has_experts = matches!(found.mlp, Mlp::Moe(_));
        assert_eq!(asked.contains(&"num_experts_per_tok"), has_experts, "{name}: {asked:?}");
    }
}

fn refusal(told: &Value, shapes: &Shapes) -> String {
    detect_model_spec(told.as_object().unwrap(), shapes).unwrap_err().to_string()
}

#[test]
fn names_that_fit_two_families_are_refused_with_both() {
    let llama = Shapes::of("llama");
    assert_eq!(
        refusal(&json!({}), &llama),
        "the tensors may be those of a model of llama or mistral"
    );
    // The generations of DeepSeek differ in their experts.
    let mut dense = Shapes::of("deepseek_v3");
    dense.0.retain(|name, _| !name.contains(".layers.1."));
    assert_eq!(
        refusal(&json!({}), &dense),
        "the tensors may be those of a model of deepseek_v2 or deepseek_v3"
    );
    let told = json!({"model_type": "gpt2"});
    let text = "config.json says gpt2, but the tensors are named as in a model of llama or mistral";
    assert_eq!(refusal(&told, &llama), text);
    let told = json!({"model_type": "stones"});
    assert_eq!(
        detect_model_spec(told.as_object().unwrap(), &llama),
        Err(DetectError::Spec(SpecError::UnsupportedFamily { model_type: "stones".to_owned() }))
    );
}

#[test]
fn biases_and_stacked_experts_are_seen_in_the_names() {
    let mut biased = Shapes::of("llama");
    for layer in 0..3 {
        for (module, rows) in [("q", 64), ("k", 32), ("v", 32), ("o", 64)] {
            let name = format!("model.layers.{layer}.self_attn.{module}_proj.bias");
            biased.0.insert(name, vec![rows]);
        }
    }
    let told = json!({"num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "rope_scaling": null, "max_position_embeddings": 256});
    let found = detect_model_spec(told.as_object().unwrap(), &biased).unwrap();
    let AttentionForm::Gqa(gqa) = &found.attention.form else { panic!("grouped") };
    assert_eq!((found.family, gqa.qkv_bias, gqa.o_bias), (Family::Llama, true, true));
    // As transformers 5 holds Mixtral in memory.
    let mut stacked = Shapes::of("mixtral");
    stacked.0.retain(|name, _| !name.contains(".block_sparse_moe."));
    for layer in 0..3 {
        let mlp = format!("model.layers.{layer}.mlp");
        stacked.0.insert(format!("{mlp}.gate.weight"), vec![4, 64]);
        stacked.0.insert(format!("{mlp}.experts.gate_up_proj"), vec![4, 320, 64]);
        stacked.0.insert(format!("{mlp}.experts.down_proj"), vec![4, 64, 160]);
    }
    let DetectError::Incomplete { family, .. } =
        detect_model_spec(&Map::new(), &stacked).unwrap_err()
    else {
        panic!("something is open")
    };
    assert_eq!(family, Family::Mixtral);
}

#[test]
fn a_norm_as_wide_as_all_queries_tells_no_head() {
    // OLMoE names its tensors as Qwen 3 with experts does, and has its norm over all heads.
    let mut shapes = Shapes::of("qwen3_moe");
    for (name, shape) in &mut shapes.0 {
        if name.ends_with("q_norm.weight") {
            *shape = vec![64];
        }
    }
    let DetectError::Incomplete { questions, .. } =
        detect_model_spec(&Map::new(), &shapes).unwrap_err()
    else {
        panic!("something is open")
    };
    assert!(questions.contains(&"num_attention_heads"), "{questions:?}");
}

#[test]
fn answers_complete_what_shapes_tell() {
    let mut told = json!({"n_head": 6, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false});
    let found = detect_model_spec(told.as_object().unwrap(), &Shapes::of("gpt2")).unwrap();
    assert_eq!(found, spec("gpt2"));
    // Shapes would fit 12 heads as well: what is told decides.
    told["n_head"] = 12.into();
    let other = detect_model_spec(told.as_object().unwrap(), &Shapes::of("gpt2")).unwrap();
    assert_eq!(other.attention.form.num_attention_heads(), 12);
    // What no shape tells and files of the family do say.
    told["scale_attn_by_inverse_layer_idx"] = true.into();
    let other = detect_model_spec(told.as_object().unwrap(), &Shapes::of("gpt2")).unwrap();
    assert!(other.attention.scale_by_inverse_layer);
    let asked =
        refusal(&json!({"sliding_window": 8, "model_type": "mistral"}), &Shapes::of("mistral"));
    assert!(asked.contains("layer_types"), "{asked}");
    let told = json!({"sliding_window": null, "model_type": "mistral"});
    let asked = refusal(&told, &Shapes::of("mistral"));
    assert!(!asked.contains("layer_types"), "{asked}");

    let told = json!({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "rope_scaling": null, "max_position_embeddings": 256});
    let found = detect_model_spec(told.as_object().unwrap(), &Shapes::of("llama")).unwrap();
    assert_eq!(found, spec("llama"));

    let error = detect_model_spec(&Map::new(), &Shapes(BTreeMap::new())).unwrap_err();
    assert!(matches!(error, DetectError::UnknownNames { .. }), "{error}");
}

#[test]
fn bodies_of_roberta_are_not_taken_for_berts() {
    let bare = |types: usize, positions: usize| {
        let mut shapes = Shapes(BTreeMap::new());
        for (name, shape) in Shapes::of("bert").0 {
            let Some(name) = name.strip_prefix("bert.") else { continue };
            let shape = match name {
                "embeddings.token_type_embeddings.weight" => vec![types, shape[1]],
                "embeddings.position_embeddings.weight" => vec![positions, shape[1]],
                _ => shape,
            };
            shapes.0.insert(name.to_owned(), shape);
        }
        shapes
    };
    let may_be = |shapes: &Shapes, evidence: &str| {
        let text = refusal(&json!({}), shapes);
        assert!(text.contains("may be those of bert, or those of roberta"), "{text}");
        assert!(text.ends_with(evidence), "{text}");
    };
    may_be(&bare(1, 514), "there is one type of tokens and there are 514 positions");
    may_be(&bare(1, 512), "there is one type of tokens");
    may_be(&bare(2, 8194), "there are 8194 positions");
    let asks = |told: &Value, shapes: &Shapes| {
        let text = refusal(told, shapes);
        assert!(text.starts_with("a bert model; its tensors do not tell"), "{text}");
    };
    asks(&json!({}), &bare(2, 512));
    asks(&json!({"model_type": "bert"}), &bare(1, 514));
    // Under its own name it is no BERT, whoever says so.
    let mut own = Shapes(BTreeMap::new());
    for (name, shape) in bare(1, 514).0 {
        own.0.insert(format!("roberta.{name}"), shape);
    }
    for told in [json!({}), json!({"model_type": "bert"})] {
        let text = refusal(&told, &own);
        assert!(text.contains("are those of roberta, xlm-roberta or camembert"), "{text}");
    }
}

#[test]
fn what_is_assumed_is_what_transformers_takes_and_counts() {
    for name in folders() {
        let (config, spec) = (config(&name), spec(&name));
        for (field, value) in assumed_fields(spec.family) {
            let mut silent = config.clone();
            silent.remove(*field);
            let left_out = ModelSpec::from_hf_config(&Value::Object(silent.clone())).unwrap();
            let value: Value = serde_json::from_str(value).unwrap_or_else(|_| (*value).into());
            silent.insert((*field).to_owned(), value);
            let said = ModelSpec::from_hf_config(&Value::Object(silent)).unwrap();
            assert_eq!(numbers(&left_out), numbers(&said), "{name}: {field}");
        }
    }
}
