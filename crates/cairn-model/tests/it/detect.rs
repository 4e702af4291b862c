//! Which model a set of tensors is: with a configuration, without one, and with the wrong one.

use std::collections::BTreeMap;
use std::ops::Range;

use cairn_artifacts::safetensors::WeightFolder;
use cairn_model::{DetectError, LoadError, TensorSource, detect_model_spec};
use cairn_spec::model::Family;
use serde_json::{Map, Value, json};

use crate::goldens::{folder, folders, spec};

/// Names and shapes of a golden folder, to change.
struct Shapes(BTreeMap<String, Vec<usize>>);

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

#[test]
fn without_a_configuration_the_family_is_named_and_the_rest_asked_for() {
    for name in folders() {
        let family = spec(&name).family;
        let error = detect_model_spec(&Map::new(), &Shapes::of(&name)).unwrap_err();
        match error {
            DetectError::Incomplete { family: named, questions } => {
                assert_eq!(named, family, "{name}");
                assert!(questions.iter().any(|field| field.contains("head")), "{questions:?}");
            }
            DetectError::Ambiguous { families } => {
                assert!(families.contains(&family), "{name}: {families:?}");
                assert_eq!(families, [Family::Llama, Family::Mistral]);
            }
            DetectError::UnknownNames { .. } => {
                // Mixtures of experts are told by their configuration only.
                let experts = Shapes::of(&name).names().iter().any(|n| n.contains(".experts."));
                assert!(experts, "{name}");
            }
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn answers_complete_what_shapes_tell() {
    let told = json!({"n_head": 6, "layer_norm_epsilon": 1e-5});
    let found = detect_model_spec(told.as_object().unwrap(), &Shapes::of("gpt2")).unwrap();
    assert_eq!(found, spec("gpt2"));
    // Shapes would fit 12 heads as well: what is told decides.
    let told = json!({"n_head": 12, "layer_norm_epsilon": 1e-5});
    let other = detect_model_spec(told.as_object().unwrap(), &Shapes::of("gpt2")).unwrap();
    assert_eq!(other.attention.form.num_attention_heads(), 12);

    let told = json!({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "max_position_embeddings": 256});
    let found = detect_model_spec(told.as_object().unwrap(), &Shapes::of("llama")).unwrap();
    assert_eq!(found, spec("llama"));

    let error = detect_model_spec(&Map::new(), &Shapes(BTreeMap::new())).unwrap_err();
    assert!(matches!(error, DetectError::UnknownNames { .. }), "{error}");
}
