//! Specs of models with experts: from real files, back, and what is refused.

use crate::model::moe::{DenseLayers, GroupScore, Moe, RouterGroups, Scoring};
use crate::model::{AttentionForm, Mlp, ModelSpec, Position, SpecError};
use serde_json::{Value, json};

fn golden(name: &str) -> Value {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens");
    let text = std::fs::read_to_string(format!("{folder}/{name}/config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Reads the golden `name` after `changes`.
fn read_changed(name: &str, changes: Value) -> Result<ModelSpec, SpecError> {
    let mut config = golden(name);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelSpec::from_hf_config(&config)
}

fn moe(spec: &ModelSpec) -> &Moe {
    match &spec.mlp {
        Mlp::Moe(moe) => moe,
        other => panic!("no experts: {other:?}"),
    }
}

#[test]
fn configs_read_back_equal_and_keep_every_field() {
    for name in ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"] {
        let spec = ModelSpec::from_hf_config(&golden(name)).unwrap();
        let written = spec.to_hf_config().unwrap();
        assert_eq!(ModelSpec::from_hf_config(&written).unwrap(), spec, "{name}");
        for (key, value) in golden(name).as_object().unwrap() {
            let derived = ["head_dim", "rope_parameters"].contains(&key.as_str());
            if let (Some(ours), false) = (written.get(key), derived) {
                assert_eq!(ours, value, "{name}: {key}");
            }
        }
    }
}

#[test]
fn mixtral_and_qwen_differ_in_what_they_divide_by() {
    let mixtral = ModelSpec::from_hf_config(&golden("mixtral")).unwrap();
    assert_eq!((moe(&mixtral).num_experts, moe(&mixtral).num_experts_per_tok), (4, 2));
    assert_eq!(moe(&mixtral).moe_intermediate_size, 160);
    assert!(moe(&mixtral).router.norm_topk_prob);
    let qwen = read_changed("qwen3_moe", json!({"norm_topk_prob": false})).unwrap();
    assert!(!moe(&qwen).router.norm_topk_prob);
    assert_eq!((moe(&qwen).moe_intermediate_size, moe(&qwen).intermediate_size), (48, 160));
}

#[test]
fn qwens_dense_layers_are_listed_or_between_steps() {
    let dense = |changes| {
        let spec = read_changed("qwen3_moe", changes).unwrap();
        assert_eq!(ModelSpec::from_hf_config(&spec.to_hf_config().unwrap()).unwrap(), spec);
        moe(&spec).dense_layers.clone()
    };
    assert_eq!(dense(json!({})), DenseLayers::None);
    let listed = DenseLayers::Listed(vec![false, true, false]);
    assert_eq!(dense(json!({"mlp_only_layers": [1]})), listed);
    let stepped = DenseLayers::Listed(vec![true, false, true]);
    assert_eq!(dense(json!({"decoder_sparse_step": 2})), stepped);
}

#[test]
fn deepseek_is_read_field_by_field() {
    let v2 = ModelSpec::from_hf_config(&golden("deepseek_v2")).unwrap();
    let AttentionForm::Mla(mla) = &v2.attention.form else { panic!("not latent") };
    assert_eq!((mla.q_lora_rank, mla.kv_lora_rank), (None, 16));
    assert_eq!((mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim), (8, 4, 6));
    let Position::Rope(rope) = &v2.position else { panic!("no rotation") };
    assert_eq!((rope.rotary_dim, rope.interleaved), (4, true));
    let router = moe(&v2).router;
    assert_eq!((router.scoring, router.correction_bias), (Scoring::Softmax, false));
    let groups = |score| Some(RouterGroups { n_group: 4, topk_group: 2, score });
    assert_eq!(router.groups, groups(GroupScore::Max));
    assert_eq!(moe(&v2).shared_intermediate_size, Some(32));
    assert_eq!(moe(&v2).dense_layers, DenseLayers::First(1));

    let v3 = ModelSpec::from_hf_config(&golden("deepseek_v3")).unwrap();
    let AttentionForm::Mla(mla) = &v3.attention.form else { panic!("not latent") };
    assert_eq!(mla.q_lora_rank, Some(12));
    let router = moe(&v3).router;
    assert_eq!((router.scoring, router.correction_bias), (Scoring::Sigmoid, true));
    assert_eq!(router.groups, groups(GroupScore::TopTwo));
    // 12^-1/2 · (0.1 · ln 4 + 1)²
    let mscale = 0.1 * 4.0_f64.ln() + 1.0;
    let expected = 12.0_f64.powf(-0.5) * mscale * mscale;
    assert!((v3.attention.score_scale(0) - expected).abs() < 1e-12);

    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}});
    let plain = read_changed("deepseek_v3", plain).unwrap();
    assert!((plain.attention.score_scale(0) - 12.0_f64.powf(-0.5)).abs() < 1e-12);
}

#[test]
fn older_deepseek_files_load() {
    let older = json!({
        "rope_parameters": null, "rope_theta": 10000.0, "head_dim": null,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1},
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1,
        "torch_dtype": "float32", "num_nextn_predict_layers": 1,
    });
    let newer = ModelSpec::from_hf_config(&golden("deepseek_v3")).unwrap();
    assert_eq!(read_changed("deepseek_v3", older).unwrap(), newer);
}

#[test]
fn what_the_numbers_would_not_follow_is_refused_by_name() {
    for (name, changes, field) in [
        ("deepseek_v2", json!({"norm_topk_prob": true}), "norm_topk_prob"),
        ("deepseek_v2", json!({"topk_method": "noaux_tc"}), "topk_method"),
        ("deepseek_v2", json!({"mlp_bias": true}), "mlp_bias"),
        ("deepseek_v3", json!({"scoring_func": "softmax"}), "scoring_func"),
        ("deepseek_v3", json!({"moe_layer_freq": 2}), "moe_layer_freq"),
        ("deepseek_v3", json!({"num_key_value_heads": 1}), "num_key_value_heads"),
        ("deepseek_v3", json!({"quantization_config": {"bits": 8}}), "quantization_config"),
        ("qwen3_moe", json!({"mlp_only_layers": "1"}), "mlp_only_layers"),
        ("qwen3_moe", json!({"decoder_sparse_step": 0}), "decoder_sparse_step"),
        ("mixtral", json!({"n_routed_experts": 4}), "n_routed_experts"),
    ] {
        match read_changed(name, changes) {
            Err(SpecError::Unsupported { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{name} {field}: {other:?}"),
        }
    }
    let uneven = read_changed("deepseek_v3", json!({"n_group": 3})).unwrap_err();
    assert!(matches!(uneven, SpecError::ExpertGroups { .. }), "{uneven}");
    // A group's two best are its score.
    let single = read_changed("deepseek_v3", json!({"n_group": 8, "topk_group": 4})).unwrap_err();
    assert!(matches!(single, SpecError::ExpertGroups { .. }), "{single}");
    let error = read_changed("mixtral", json!({"num_experts": 5})).unwrap_err();
    assert!(matches!(error, SpecError::Contradiction { .. }), "{error}");
    let mut without = golden("deepseek_v3");
    without.as_object_mut().unwrap().remove("q_lora_rank");
    let error = ModelSpec::from_hf_config(&without).unwrap_err();
    assert_eq!(error, SpecError::Missing { field: "q_lora_rank".to_owned() });
}

#[test]
fn parameters_are_those_of_the_files() {
    let count =
        |name: &str| ModelSpec::from_hf_config(&golden(name)).unwrap().parameter_count().total();
    // Sums over the safetensors files.
    assert_eq!(count("mixtral"), 447_680);
    assert_eq!(count("qwen3_moe"), 189_728);
    assert_eq!(count("deepseek_v2"), 31_040);
    assert_eq!(count("deepseek_v3"), 29_344);
}
