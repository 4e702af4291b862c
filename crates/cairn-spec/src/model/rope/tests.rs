//! Frequencies against transformers, through the reader of `config.json`.

use super::*;
use crate::ModelSpec;
use crate::model::Position;
use serde_json::{Value, json};

/// Two units in the last place of f32: numpy's power and reciprocal may each differ by one from
/// the nearest value.
const TOLERANCE: f64 = 2.0 * f32::EPSILON as f64;

/// The rotation of a file with these `rope_parameters`.
fn rope_of(case: &Value) -> Rope {
    let mut parameters = case.as_object().unwrap().clone();
    for other in ["head_dim", "max_position_embeddings", "inv_freq", "attention_scaling"] {
        parameters.remove(other);
    }
    let spec = ModelSpec::from_hf_config(&json!({
        "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "intermediate_size": 64, "head_dim": case["head_dim"],
        "max_position_embeddings": case["max_position_embeddings"], "rope_parameters": parameters,
    }));
    match spec.unwrap().into_fields().position {
        Position::Rope(rope) => rope,
        Position::Learned => panic!("no rotation"),
    }
}

fn goldens() -> Vec<Value> {
    serde_json::from_str(include_str!("../../../tests/rope/goldens.json")).unwrap()
}

#[test]
fn every_scaling_is_what_transformers_computes() {
    for case in goldens() {
        let rope = rope_of(&case);
        let inv_freq = rope.inv_freq();
        let expected = case["inv_freq"].as_array().unwrap();
        assert_eq!(inv_freq.len(), expected.len());
        for (i, (actual, expected)) in inv_freq.iter().zip(expected).enumerate() {
            let expected = expected.as_f64().unwrap();
            let error = (f64::from(*actual) - expected).abs() / expected;
            assert!(error <= TOLERANCE, "{rope:?} [{i}]: {actual} instead of {expected}");
        }
        let scaling = case["attention_scaling"].as_f64().unwrap();
        assert_eq!(rope.attention_scaling().to_bits(), (scaling as f32).to_bits(), "{rope:?}");
    }
}

#[test]
fn the_goldens_tell_the_scalings_apart() {
    for case in goldens() {
        let rope = rope_of(&case);
        let plain = Rope::new(rope.theta, rope.rotary_dim).inv_freq();
        let ratios: Vec<f32> = plain.iter().zip(rope.inv_freq()).map(|(a, b)| a / b).collect();
        assert!(ratios.iter().any(|ratio| *ratio > 1.5), "{rope:?} changes nothing: {ratios:?}");
    }
}

#[test]
fn plain_frequencies_are_the_nearest_f32_of_the_formula() {
    let inv_freq = Rope::new(10_000.0, 16).inv_freq();
    for (i, freq) in inv_freq.iter().enumerate() {
        let exact = 10_000f64.powf(-2.0 * i as f64 / 16.0);
        assert!((f64::from(*freq) - exact).abs() <= TOLERANCE * exact, "{i}: {freq} {exact}");
    }
    let scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 64 };
    let dynamic = Rope { scaling, ..Rope::new(10_000.0, 16) };
    assert_eq!(dynamic.inv_freq(), inv_freq);
    assert_eq!(dynamic.inv_freq_for(64), inv_freq);
    // A base of 10000 · (2 · 65 / 64 − 1)^(16 / 14).
    let longer = Rope::new(10_000.0 * (130.0 / 64.0 - 1.0f64).powf(16.0 / 14.0), 16);
    assert_eq!(dynamic.inv_freq_for(65), longer.inv_freq());
    assert_ne!(dynamic.inv_freq_for(65), inv_freq);
    assert_eq!(dynamic.attention_scaling().to_bits(), 1f32.to_bits());
}

#[test]
fn a_partial_rotation_has_a_frequency_per_rotated_pair() {
    let rope = Rope { rotary_dim: 8, ..Rope::new(10_000.0, 64) };
    assert_eq!(rope.inv_freq(), Rope::new(10_000.0, 8).inv_freq());
}
