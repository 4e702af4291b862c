//! Specs from real files, from broken files, and back.

use super::*;
use crate::Hint;
use proptest::prelude::*;
use serde_json::{Value, json};

fn golden(name: &str) -> Value {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens");
    let text = std::fs::read_to_string(format!("{folder}/{name}/config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Every golden folder.
fn folders() -> Vec<String> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens");
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    let folders = entries.filter(|entry| entry.path().join("config.json").exists());
    let mut names: Vec<String> =
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() > 8, "the goldens are gone");
    names
}

/// Whether `ours` says what `theirs` does, and perhaps a default more.
fn says(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            theirs.iter().all(|(key, value)| ours.get(key).is_some_and(|ours| says(ours, value)))
        }
        // Null is a default, which is written out.
        (_, Value::Null) => true,
        _ => ours == theirs,
    }
}

/// Reads the golden `name` after `changes`; a `null` change removes the field.
fn read_changed(name: &str, changes: Value) -> Result<ModelSpec, SpecError> {
    let mut config = golden(name);
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().remove(key);
        } else {
            config[key] = value.clone();
        }
    }
    ModelSpec::from_hf_config(&config)
}

fn check_refused(name: &str, changes: Value, message: &str) {
    let error = read_changed(name, changes.clone()).unwrap_err();
    assert_eq!(error.to_string(), message, "{changes}");
}

fn rope(spec: &ModelSpec) -> &Rope {
    match &spec.position {
        Position::Rope(rope) => rope,
        Position::Learned => panic!("no rotation"),
    }
}

#[test]
fn llama_golden_is_read_field_by_field() {
    let spec = ModelSpec::from_hf_config(&golden("llama")).unwrap();
    let AttentionForm::Gqa(gqa) = &spec.attention.form else { panic!("not grouped") };
    assert_eq!((gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim), (4, 2, 16));
    assert_eq!((spec.vocab_size, spec.hidden_size, spec.num_hidden_layers), (320, 64, 3));
    assert_eq!(spec.norm.eps.to_bits(), 1e-5f64.to_bits());
    assert_eq!(
        spec.mlp,
        Mlp::Glu { activation: Activation::Silu, intermediate_size: 160, bias: false }
    );
    assert_eq!(rope(&spec), &Rope::new(10_000.0, 16));
    assert_eq!(spec.tokens, SpecialTokens { bos: Some(1), eos: vec![2], pad: None });
    assert!(!spec.tie_word_embeddings);
}

#[test]
fn gpt2_golden_has_six_heads_whatever_its_width_suggests() {
    let spec = ModelSpec::from_hf_config(&golden("gpt2")).unwrap();
    let AttentionForm::Gqa(gqa) = &spec.attention.form else { panic!("not grouped") };
    assert_eq!((gqa.num_attention_heads, gqa.head_dim), (6, 8));
    assert_eq!(spec.mlp.intermediate_size(), 192);
    assert_eq!(spec.dropout, Dropout { embd: 0.1, attn: 0.1, resid: 0.1 });
    assert_eq!(spec.position, Position::Learned);
    assert!(spec.tie_word_embeddings);
}

#[test]
fn written_configs_read_back_equal() {
    for name in folders() {
        let name = name.as_str();
        let spec = ModelSpec::from_hf_config(&golden(name)).unwrap();
        let written = spec.to_hf_config().unwrap();
        assert_eq!(ModelSpec::from_hf_config(&written).unwrap(), spec, "{name}");
        // Every field of the original that decides the model is there with the same value.
        for (key, value) in golden(name).as_object().unwrap() {
            if let Some(ours) = written.get(key)
                && !["n_inner", "max_window_layers", "original_max_position_embeddings"]
                    .contains(&key.as_str())
            {
                assert!(says(ours, value), "{name}: {key} is {value}, written as {ours}");
            }
        }
    }
}

#[test]
fn older_and_newer_style_are_the_same_spec() {
    let newer = ModelSpec::from_hf_config(&golden("llama_sharded")).unwrap();
    let older = read_changed(
        "llama_sharded",
        json!({"rope_parameters": null, "dtype": null, "rope_theta": 500_000.0,
               "rope_scaling": null, "torch_dtype": "float32", "head_dim": null}),
    );
    assert_eq!(older.unwrap(), newer);

    let older = json!({"rope_parameters": null, "rope_theta": 10000.0,
                       "rope_scaling": {"type": "linear", "factor": 4.0}});
    let newer = json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                       "rope_theta": 10000.0}});
    assert_eq!(read_changed("llama", older).unwrap(), read_changed("llama", newer).unwrap());
}

#[test]
fn settings_that_change_the_numbers_are_honored() {
    let spec = read_changed("llama", json!({"attention_bias": true, "mlp_bias": true})).unwrap();
    let AttentionForm::Gqa(gqa) = &spec.attention.form else { panic!("not grouped") };
    assert!(gqa.qkv_bias && gqa.o_bias);
    assert!(matches!(spec.mlp, Mlp::Glu { bias: true, .. }));

    let spec = read_changed("llama", json!({"head_dim": 32, "eos_token_id": [2, 7]})).unwrap();
    assert_eq!((spec.attention.form.key_dim(), rope(&spec).rotary_dim), (32, 32));
    assert_eq!(spec.tokens.eos, [2, 7]);

    let changes = json!({"scale_attn_by_inverse_layer_idx": true, "scale_attn_weights": false});
    let spec = read_changed("gpt2", changes).unwrap();
    assert_eq!(spec.attention.score_scale(0).to_bits(), 1f64.to_bits());
    assert_eq!(spec.attention.score_scale(3).to_bits(), 0.25f64.to_bits());

    let spec =
        read_changed("gpt2", json!({"n_inner": 100, "n_head": null, "num_attention_heads": 4}));
    let spec = spec.unwrap();
    assert_eq!((spec.mlp.intermediate_size(), spec.attention.form.key_dim()), (100, 12));
}

#[test]
fn written_configs_keep_every_setting() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5});
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "mscale": 1.0,
        "original_max_position_embeddings": 64, "truncate": false});
    for (name, changes) in [
        ("llama", json!({ "rope_parameters": llama3 })),
        ("llama", json!({ "rope_parameters": yarn })),
        ("llama", json!({"rope_parameters": {"rope_type": "linear", "factor": 2.5}})),
        ("llama", json!({"attention_bias": true, "mlp_bias": true, "dtype": "bfloat16"})),
        ("llama", json!({"attention_dropout": 0.25, "head_dim": 6, "eos_token_id": [1, 2]})),
        ("gpt2", json!({"scale_attn_by_inverse_layer_idx": true, "scale_attn_weights": false})),
        ("gpt2", json!({"embd_pdrop": 0.0, "activation_function": "relu", "n_inner": 7})),
    ] {
        let spec = read_changed(name, changes.clone()).unwrap();
        let written = spec.to_hf_config().unwrap();
        assert_eq!(ModelSpec::from_hf_config(&written).unwrap(), spec, "{changes}");
        // transformers 4 reads only the older names.
        let mut older = written;
        for newer in ["rope_parameters", "dtype"] {
            older.as_object_mut().unwrap().remove(newer);
        }
        assert_eq!(ModelSpec::from_hf_config(&older).unwrap(), spec, "{changes}");
    }
}

#[test]
fn what_a_family_cannot_say_is_not_written() {
    let mut fields = ModelSpec::from_hf_config(&golden("llama")).unwrap().into_fields();
    fields.head = Some(Head { softcap: Some(30.0), ..Head::default() });
    let error = ModelSpec::new(fields).unwrap().to_hf_config().unwrap_err();
    assert_eq!(error, SpecError::NotRepresentable { family: Family::Llama });
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    check_refused("llama", json!({"model_type": "mamba"}), "model_type mamba is not supported yet");
    for (name, field, value) in [
        ("llama", "architectures", json!(["LlamaForSequenceClassification"])),
        ("llama", "sliding_window", json!(4096)),
        ("llama", "quantization_config", json!({"bits": 4})),
        ("llama", "final_logit_softcapping", json!(30.0)),
        ("llama", "num_local_experts", json!(8)),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "layer_types", json!(["full_attention", "sliding_attention"])),
        // What OLMo 3 is described by, whose tensors are those of OLMo 2.
        ("olmo2", "architectures", json!(["Olmo3ForCausalLM"])),
        ("olmo2", "sliding_window", json!(4096)),
        ("olmo2", "layer_types", json!(["sliding_attention", "full_attention"])),
        ("llama", "dtype", json!("float8_e4m3fn")),
        ("gpt2", "add_cross_attention", json!(true)),
        ("gpt2", "pruned_heads", json!({"0": [1]})),
    ] {
        let error = read_changed(name, json!({ field: value })).unwrap_err();
        assert!(
            matches!(&error, SpecError::Unsupported { field: named, .. } if named == field),
            "{error}"
        );
    }
    check_refused(
        "llama",
        json!({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}),
        "'rope_parameters.rope_type' = \"proportional\" is not supported for llama models",
    );
    check_refused(
        "llama",
        json!({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0],
               "long_factor": [1.0], "original_max_position_embeddings": 64}}),
        "'short_factor' has 1 entries for 8 pairs of dimensions",
    );
    check_refused(
        "gemma3_text",
        json!({"rope_parameters": {"rope_type": "default"}}),
        "'rope_parameters.rope_type' = \"default\" is not supported for gemma3_text models",
    );
    for (name, field, value) in [
        ("bert", "is_decoder", json!(true)),
        ("bert", "position_embedding_type", json!("relative_key")),
        ("gemma2", "use_bidirectional_attention", json!(true)),
        ("mistral", "attention_bias", json!(true)),
        ("phi3", "mlp_bias", json!(true)),
        ("qwen2", "layer_types", json!(vec!["sliding_attention"; 3])),
        ("modernbert", "layer_types", json!(vec!["chunked_attention"; 3])),
        ("qwen3", "num_experts", json!(4)),
        ("gemma3_text", "attn_logit_softcapping", json!(5)),
        (
            "mistral",
            "layer_types",
            json!(["full_attention", "chunked_attention", "full_attention"]),
        ),
    ] {
        let error = read_changed(name, json!({ field: value })).unwrap_err();
        assert!(
            matches!(&error, SpecError::Unsupported { field: named, .. } if named == field),
            "{error}"
        );
    }
    check_refused(
        "llama",
        json!({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}),
        "'rope_parameters.mrope_section' = [1] is not supported for llama models",
    );
    check_refused("llama", json!({"hidden_act": "xielu"}), "activation 'xielu' is not supported");
}

#[test]
fn families_keep_what_is_their_own() {
    let read = |name| ModelSpec::from_hf_config(&golden(name)).unwrap();
    let spec = read("gemma2");
    assert_eq!(spec.attention.score_scale(0).to_bits(), 20f64.powf(-0.5).to_bits());
    assert_eq!(spec.embedding.scale, Some(f64::from(32f32.sqrt())));
    assert_eq!(spec.head.unwrap().softcap, Some(2.0));
    assert_eq!([0, 1, 2].map(|layer| spec.attention.window(layer)), [Some(8), None, Some(8)]);
    // 45.254834 between 45.25 and 45.5 in bf16, between 45.25 and 45.28125 in f16.
    for (dtype, expected) in
        [("bfloat16", 45.25), ("float16", 45.25), ("float32", 2048f32.sqrt().into())]
    {
        let changes = json!({"hidden_size": 2048, "dtype": dtype});
        let scale = read_changed("gemma2", changes).unwrap().embedding.scale;
        assert_eq!(scale, Some(expected), "{dtype}");
    }
    let spec = read("gemma3_text");
    let thetas: Vec<f64> = (0..4).map(|layer| spec.rope(layer).unwrap().theta).collect();
    assert_eq!(thetas, [1e4, 1e4, 1e6, 1e4]);
    let spec = read("modernbert");
    assert_eq!([0, 1, 2].map(|layer| spec.attention.window(layer)), [None, Some(5), Some(5)]);
    assert!(!spec.has_attention_norm(0) && spec.has_attention_norm(1));
    let spec = read("phi3_partial");
    assert_eq!((rope(&spec).rotary_dim, spec.context_limit()), (6, 16));
    assert_eq!(read("llama_dynamic").context_limit(), 24);
    assert_eq!(read("llama_yarn").context_limit(), 128);
    assert_eq!(read("gpt_neox").block, BlockForm::ParallelResidual);
    assert_eq!(read("gpt_neox_serial").block, BlockForm::PreNorm);
}

#[test]
fn older_styles_of_every_family_are_the_same_spec() {
    for (name, changes) in [
        ("gpt_neox", json!({"rope_parameters": null, "rotary_emb_base": 10000, "rotary_pct": 0.5})),
        (
            "gemma3_text",
            json!({"rope_parameters": null, "layer_types": null, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4, "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ),
        (
            "modernbert",
            json!({"rope_parameters": null, "layer_types": null,
            "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}),
        ),
        ("gemma2", json!({"layer_types": null, "rope_parameters": null, "rope_theta": 10_000.0})),
        ("qwen2_windows", json!({"layer_types": null, "dtype": null, "torch_dtype": "float32"})),
        (
            "phi3_partial",
            json!({"rope_parameters": null, "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2],
                             "long_factor": [1.0, 2.0, 4.0]}}),
        ),
        (
            "llama_yarn",
            json!({"rope_parameters": null, "rope_theta": 10_000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1,
                "truncate": false, "beta_fast": 4.0, "original_max_position_embeddings": 16}}),
        ),
    ] {
        let newer = ModelSpec::from_hf_config(&golden(name)).unwrap();
        assert_eq!(read_changed(name, changes).unwrap(), newer, "{name}");
    }
}

#[test]
fn mistral_has_the_windows_that_layer_types_lists() {
    let windows = |changes| -> Result<Vec<Option<usize>>, SpecError> {
        let spec = read_changed("mistral", changes)?;
        let again = ModelSpec::from_hf_config(&spec.to_hf_config()?)?;
        assert_eq!(again, spec);
        Ok((0..spec.num_hidden_layers).map(|layer| spec.attention.window(layer)).collect())
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    for (layer_types, expected) in [
        (Value::Null, vec![Some(8); 3]),
        (json!([sliding, sliding, sliding]), vec![Some(8); 3]),
        (json!([full, full, full]), vec![None; 3]),
        (json!([full, sliding, full]), vec![None, Some(8), None]),
    ] {
        let changes =
            json!({"sliding_window": 8, "num_hidden_layers": 3, "layer_types": layer_types});
        assert_eq!(windows(changes), Ok(expected));
    }
    let changes = json!({"num_hidden_layers": 3, "layer_types": [full]});
    let error = windows(changes).unwrap_err();
    assert_eq!(error.to_string(), "'layer_types' has 1 entries for 3 layers");
    // Also where no layer of the list has a window.
    let message = "'layer_types' has 2 entries for 3 layers";
    check_refused("gemma2", json!({"layer_types": [full, full]}), message);
    check_refused("qwen2", json!({"layer_types": [full, full]}), message);
    let mut config = golden("mistral");
    config["num_hidden_layers"] = json!(2);
    config["sliding_window"] = Value::Null;
    config["layer_types"] = json!([full, sliding]);
    let error = ModelSpec::from_hf_config(&config).unwrap_err();
    assert!(
        matches!(&error, SpecError::Unsupported { field, .. } if field == "layer_types"),
        "{error}"
    );
}

#[test]
fn zero_where_a_number_divides_is_refused_in_few_words() {
    check_refused(
        "gemma2",
        json!({"attn_logit_softcapping": 0}),
        "'attn_logit_softcapping' must be between 0 (excluded) and 1e18, not 0",
    );
    check_refused(
        "gemma2",
        json!({"query_pre_attn_scalar": 0}),
        "'query_pre_attn_scalar' must be between 0 (excluded) and 1e18, not 0",
    );
    let error = read_changed("phi3_partial", json!({"partial_rotary_factor": 0.5})).unwrap_err();
    let hint = "remove 'rope_parameters.partial_rotary_factor' or 'partial_rotary_factor', whichever is wrong";
    assert_eq!(error.hints(), [hint]);
}

#[test]
fn experts_of_all_layers_together_are_limited() {
    check_refused(
        "mixtral",
        json!({"num_local_experts": 16384, "num_hidden_layers": 4096}),
        "'num_experts' = 16384 in 'num_hidden_layers' = 4096 layers are more than 131072 experts in all",
    );
    let most = json!({"num_local_experts": 32, "num_hidden_layers": 4096});
    assert!(read_changed("mixtral", most).is_ok());
    let one_more = json!({"num_local_experts": 33, "num_hidden_layers": 4096});
    assert!(read_changed("mixtral", one_more).is_err());
}

#[test]
fn neutral_values_of_foreign_settings_are_accepted() {
    let changes = json!({"sliding_window": Value::Null, "use_sliding_window": false,
        "partial_rotary_factor": 1, "num_experts": 0, "no_rope_layers": [],
        "layer_types": ["full_attention"], "_name_or_path": "x", "pretraining_tp": 2});
    assert_eq!(read_changed("llama", changes), ModelSpec::from_hf_config(&golden("llama")));
}

#[test]
fn what_nobody_reads_is_named_unless_it_is_known_to_say_nothing() {
    for name in &folders() {
        let read = hf::HfConfig::from_json(&golden(name).to_string()).unwrap();
        assert_eq!(read.ignored, [""; 0], "{name}");
        // What is written is read whole.
        let written = read.spec.to_hf_config().unwrap().to_string();
        assert_eq!(hf::HfConfig::from_json(&written).unwrap().ignored, [""; 0], "{name}");
    }
    let mut config = golden("llama");
    for name in ["zeta_gate", "id2label", "hiden_act", "_name_or_path", "n_embd"] {
        config[name] = json!("x");
    }
    config["absent_feature"] = Value::Null;
    let read = hf::HfConfig::from_json(&config.to_string()).unwrap();
    // GPT-2's own names mean nothing to a LLaMA.
    assert_eq!(read.ignored, ["hiden_act", "n_embd", "zeta_gate"]);
    assert_eq!(Ok(read.spec), ModelSpec::from_hf_config(&golden("llama")));
}

#[test]
fn what_would_divide_a_row_of_zeros_by_zero_is_refused_by_name() {
    for (name, changes, message) in [
        (
            "llama",
            json!({"rms_norm_eps": -1.0}),
            "'rms_norm_eps' must be between 1e-37 and 1, not -1",
        ),
        ("llama", json!({"rms_norm_eps": 0}), "'rms_norm_eps' must be between 1e-37 and 1, not 0"),
        (
            "bert",
            json!({"layer_norm_eps": 0.0}),
            "'layer_norm_eps' must be between 1e-37 and 1, not 0",
        ),
        (
            "gpt2",
            json!({"layer_norm_epsilon": 0}),
            "'layer_norm_epsilon' must be between 1e-37 and 1, not 0",
        ),
        (
            "modernbert",
            json!({"norm_eps": 1e-50}),
            "'norm_eps' must be between 1e-37 and 1, not 1e-50",
        ),
        (
            "gemma2",
            json!({"query_pre_attn_scalar": 0}),
            "'query_pre_attn_scalar' must be between 0 (excluded) and 1e18, not 0",
        ),
    ] {
        check_refused(name, changes, message);
    }
}

#[test]
fn malformed_fields_are_refused_by_name() {
    for (name, changes, message) in [
        (
            "llama",
            json!({"num_hidden_layers": 1_000_000_000}),
            "'num_hidden_layers' must be between 1 and 4096, not 1000000000",
        ),
        (
            "llama",
            json!({"num_attention_heads": 0, "head_dim": null}),
            "'num_attention_heads' must be between 1 and 4096, not 0",
        ),
        (
            "llama",
            json!({"num_attention_heads": 5, "head_dim": null}),
            "hidden_size 64 is not a multiple of 5 attention heads",
        ),
        (
            "llama",
            json!({"num_key_value_heads": 3}),
            "4 attention heads cannot share 3 key/value heads",
        ),
        (
            "llama",
            json!({"head_dim": 15}),
            "rotary dimension 15 must be even and at most the head's 15",
        ),
        ("llama", json!({"hidden_size": "64"}), "'hidden_size' must be a whole number, not \"64\""),
        ("llama", json!({"hidden_size": -64}), "'hidden_size' must be a whole number, not -64"),
        ("llama", json!({"hidden_size": 64.5}), "'hidden_size' must be a whole number, not 64.5"),
        ("llama", json!({"vocab_size": null}), "'vocab_size' is missing"),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": "NaN"}}),
            "'rope_parameters.rope_theta' must be a number, not \"NaN\"",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": 0.5}}),
            "'rope_theta' must be between 1.000001 and 1e18, not 0.5",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "'rope_parameters.factor' is missing",
        ),
        ("llama", json!({"rope_parameters": []}), "'rope_parameters' must be an object, not []"),
        ("llama", json!({"attention_bias": 1}), "'attention_bias' must be true or false, not 1"),
        ("gpt2", json!({"n_head": 7}), "hidden_size 48 is not a multiple of 7 attention heads"),
        (
            "gpt2",
            json!({"eos_token_id": 5_000_000_000u64}),
            "'eos_token_id' must be a token id, not 5000000000",
        ),
        (
            "gpt2",
            json!({"attn_pdrop": 1.0}),
            "'attention dropout' must be between 0 and 0.999, not 1",
        ),
    ] {
        check_refused(name, changes, message);
    }
    assert_eq!(
        ModelSpec::from_hf_json("[]").unwrap_err().to_string(),
        "config.json must hold an object, not a list"
    );
    // Python writes NaN, which is not JSON.
    let error = ModelSpec::from_hf_json("{\"rope_theta\": NaN}").unwrap_err();
    assert!(matches!(error, SpecError::NotJson { .. }), "{error}");
}

#[test]
fn contradictions_show_both_readings() {
    for (name, changes, message) in [
        (
            "llama",
            json!({"rope_theta": 500_000.0}),
            "'rope_parameters.rope_theta' says 10000, but 'rope_theta' says 500000",
        ),
        (
            "llama",
            json!({"torch_dtype": "bfloat16"}),
            "'dtype' says float32, but 'torch_dtype' says bfloat16",
        ),
        ("gpt2", json!({"hidden_size": 96}), "'n_embd' says 48, but 'hidden_size' says 96"),
        (
            "deepseek_v2",
            json!({"head_dim": 8}),
            "'head_dim' says 8, but 'qk_nope_head_dim + qk_rope_head_dim' says 8 + 4",
        ),
        (
            "deepseek_v3",
            json!({"qk_head_dim": 16}),
            "'qk_head_dim' says 16, but 'qk_nope_head_dim + qk_rope_head_dim' says 8 + 4",
        ),
    ] {
        check_refused(name, changes, message);
    }
    let key = read_changed("deepseek_v2", json!({"head_dim": 12})).unwrap();
    assert_eq!(Ok(key), read_changed("deepseek_v2", json!({})));
    let scaling = json!({"rope_scaling": {"type": "linear", "factor": 2.0}});
    let error = read_changed("llama", scaling).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("'rope_parameters' says {\"rope_theta\":10000.0"), "{text}");
    assert!(text.ends_with("'rope_scaling' says {\"type\":\"linear\",\"factor\":2.0}"), "{text}");
    assert_eq!(error.hints(), ["remove 'rope_parameters' or 'rope_scaling', whichever is wrong"]);
}

#[test]
fn a_key_that_is_there_twice_is_refused_with_both_values() {
    let text = golden("llama").to_string();
    let error = |from: &str, to: &str| {
        let twice = text.replacen(from, to, 1);
        assert_ne!(twice, text);
        ModelSpec::from_hf_json(&twice).unwrap_err()
    };
    let heads = error("{", "{\"num_attention_heads\": 8, ");
    assert_eq!(heads.to_string(), "'num_attention_heads' is there twice, as 8 and as 4");
    assert_eq!(heads.hints(), ["remove the 'num_attention_heads' that is wrong"]);
    let theta = error("\"rope_theta\":", "\"rope_theta\": 5e5, \"rope_theta\":").to_string();
    assert_eq!(theta, "'rope_parameters.rope_theta' is there twice, as 500000.0 and as 10000.0");
}

#[test]
fn parameters_are_counted_as_transformers_counts_them() {
    let count = |name| {
        let spec = ModelSpec::from_hf_config(&golden(name)).unwrap();
        spec.parameter_count().total()
    };
    // Sums over the safetensors files; for the sharded one also `total_parameters` of its index.
    assert_eq!(count("llama"), 170_432);
    assert_eq!(count("llama_sharded"), 143_808);
    assert_eq!(count("gpt2"), 106_416);

    let gpt2_124m = json!({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "vocab_size": 50257});
    let spec = read_changed("gpt2", gpt2_124m).unwrap();
    assert_eq!(spec.parameter_count().total(), 124_439_808);
    let biased = read_changed("llama", json!({"attention_bias": true, "mlp_bias": true})).unwrap();
    assert_eq!(
        biased.parameter_count().total() - count("llama"),
        3 * (64 + 64 + 64 + 160 * 2 + 64)
    );
}

#[test]
fn the_same_fields_make_the_same_spec_through_serde() {
    let spec = ModelSpec::from_hf_config(&golden("llama")).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<ModelSpec>(&text).unwrap(), spec);

    let broken = text.replace("\"num_key_value_heads\":2", "\"num_key_value_heads\":3");
    let error = serde_json::from_str::<ModelSpec>(&broken).unwrap_err().to_string();
    assert!(error.starts_with("4 attention heads cannot share 3 key/value heads"), "{error}");
}

#[test]
fn windows_and_rotations_may_differ_by_layer() {
    let mut fields = ModelSpec::from_hf_config(&golden("llama")).unwrap().into_fields();
    let layers = WindowedLayers::Listed(vec![true, false, true]);
    fields.attention.sliding_window =
        Some(SlidingWindow { size: 8, layers, rope: Some(Rope::new(100.0, 16)) });
    let spec = ModelSpec::new(fields.clone()).unwrap();
    assert_eq!([0, 1, 2].map(|layer| spec.attention.window(layer)), [Some(8), None, Some(8)]);
    let thetas = [0, 1, 2].map(|layer| spec.rope(layer).unwrap().theta.to_bits());
    assert_eq!(thetas, [100f64, 10_000.0, 100.0].map(f64::to_bits));

    let layers = WindowedLayers::Listed(vec![true]);
    fields.attention.sliding_window = Some(SlidingWindow { size: 8, layers, rope: None });
    let error = ModelSpec::new(fields).unwrap_err();
    assert_eq!(error.to_string(), "'layer_types' has 1 entries for 3 layers");
}

/// JSON values that a fuzzer would put into a field.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-zA-Z0-9.]{0,12}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                    "high_freq_factor": 4})),
        Just(json!({"rope_type": "yarn", "factor": 1e17, "truncate": false})),
        Just(json!([1, "a", {}])),
    ]
}

proptest! {
    #[test]
    fn any_change_to_a_config_is_refused_or_gives_a_sound_spec(
        folder in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
    ) {
        let mut config = golden(folder.get(&folders()[..]).as_str());
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (index, value) in changes {
            config[index.get(&keys)] = value;
        }
        match ModelSpec::from_hf_config(&config) {
            Err(error) => prop_assert!(!error.to_string().is_empty()),
            Ok(spec) => {
                prop_assert!(spec.num_hidden_layers <= NUM_HIDDEN_LAYERS_MAX);
                prop_assert!(spec.parameter_count().total() > 0);
                if let Position::Rope(rope) = &spec.position {
                    prop_assert!(rope.inv_freq().iter().all(|freq| freq.is_finite()));
                    prop_assert!(rope.attention_scaling().is_finite());
                }
                prop_assert_eq!(ModelSpec::from_hf_config(&spec.to_hf_config().unwrap()), Ok(spec));
            }
        }
    }

    #[test]
    fn any_text_is_refused_or_read(text in "\\PC{0,200}") {
        let _ = ModelSpec::from_hf_json(&text);
    }
}
