//! `adapter_config.json`, read and written.

use std::collections::BTreeMap;

use super::*;

fn read(change: impl FnOnce(&mut Map<String, Value>)) -> Result<LoraSpec, LoraError> {
    let mut value = LoraSpec::new(8, TargetModules::Named(vec!["q_proj".into()])).to_peft_json();
    change(value.as_object_mut().unwrap());
    LoraSpec::from_peft_json(&value.to_string())
}

#[test]
fn what_is_written_is_read_back() {
    let mut spec = LoraSpec::new(4, TargetModules::AllLinear);
    spec.use_rslora = true;
    spec.layers_to_transform = Some(vec![1, 3]);
    spec.target_parameters = vec!["experts.down_proj".into()];
    spec.exclude_modules = Some(ModuleNames::Matching(NamePattern::whole(".*k_proj").unwrap()));
    spec.layers_pattern = vec![NamePattern::before_number("layers").unwrap()];
    // The order counts.
    spec.rank_pattern.push("self_attn.q_proj", 2).unwrap();
    spec.rank_pattern.push(r".*\.0\..*", 3).unwrap();
    spec.alpha_pattern.push("v_proj", 3.5).unwrap();
    spec.base_model_name_or_path = Some("base".into());
    assert_eq!(LoraSpec::from_peft_json(&spec.to_peft_json().to_string()), Ok(spec));
}

#[test]
fn names_are_matched_whole() {
    let spec = read(|_| {}).unwrap();
    assert_eq!(spec.rank("model.layers.0.self_attn.q_proj", Some(0)), Some(8));
    assert_eq!(spec.rank("q_proj", Some(0)), Some(8));
    assert_eq!(spec.rank("model.layers.0.self_attn.eq_proj", Some(0)), None);
    let spec = read(|fields| {
        fields.insert("rank_pattern".into(), json!({ "0.self_attn.q_proj": 2 }));
        fields.insert("alpha_pattern".into(), json!({ "q_proj": 6 }));
    });
    let spec = spec.unwrap();
    assert_eq!(spec.rank("model.layers.0.self_attn.q_proj", Some(0)), Some(2));
    assert_eq!(spec.rank("model.layers.1.self_attn.q_proj", Some(1)), Some(8));
    assert!((spec.scale("model.layers.0.self_attn.q_proj", 2) - 3.0).abs() < 1e-12);
}

/// As `check_target_module_exists` of PEFT 0.21.
#[test]
fn full_names_count_in_every_block_and_no_blocks_are_all() {
    let head = |layers: Value| {
        let spec = read(|fields| {
            fields.insert("target_modules".into(), json!(["lm_head", "a.0.k_proj", "q_proj"]));
            fields.insert("layers_to_transform".into(), layers);
        });
        let spec = spec.unwrap();
        [("lm_head", None), ("x.lm_head", None), ("a.0.k_proj", Some(0)), ("a.0.q_proj", Some(0))]
            .map(|(module, layer)| spec.rank(module, layer).is_some())
    };
    assert_eq!(head(json!([1])), [true, false, true, false]);
    assert_eq!(head(json!([0])), [true, false, true, true]);
    assert_eq!(head(json!([])), [true; 4]);
    assert_eq!(head(Value::Null), [true; 4]);
}

#[test]
fn what_makes_another_model_is_refused_by_name() {
    for (field, value) in [
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("peft_type", json!("IA3")),
        ("something_new", json!(7)),
    ] {
        let error = read(|fields| {
            fields.insert(field.into(), value);
        });
        assert!(
            matches!(error, Err(LoraError::Unsupported { field: ref found, .. }) if found == field)
        );
    }
    for (field, value) in [
        ("r", json!(0)),
        ("r", json!(1e9)),
        ("lora_alpha", json!(-1)),
        ("lora_dropout", json!(1)),
        ("target_modules", json!([])),
        ("layers_to_transform", json!("all")),
        ("layers_pattern", json!("layers")),
        ("target_parameters", json!("experts.down_proj")),
        ("exclude_modules", json!([3])),
    ] {
        let error = read(|fields| {
            fields.insert(field.into(), value);
        });
        assert!(matches!(error, Err(LoraError::Field { field: found, .. }) if found == field));
    }
}

/// What would mean another thing than in Python, or take much memory, is refused with its field.
#[test]
fn adapters_of_changed_weights_are_refused() {
    let read = |init: Value| {
        read(|fields| {
            fields.insert("init_lora_weights".into(), init);
        })
    };
    for init in [json!(true), json!(false), Value::Null, json!("gaussian"), json!("Gaussian")] {
        assert!(read(init.clone()).is_ok(), "{init}");
    }
    for init in ["eva", "orthogonal"] {
        assert!(read(json!(init)).is_ok(), "{init}");
    }
    for init in ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"] {
        let error = read(json!(init)).unwrap_err();
        assert_eq!(error.to_string(), format!("'init_lora_weights' = \"{init}\" is not supported"));
        assert!(error.hints()[0].contains("path_initial_model_for_weight_conversion"));
    }
    assert!(read(json!(1)).is_err());
}

#[test]
fn no_pattern_of_blocks_is_passed_over() {
    let read = |count: usize| {
        let patterns: Vec<String> = (0..count).map(|at| format!("layers{at}")).collect();
        read(|fields| {
            fields.insert("layers_to_transform".into(), json!([0]));
            fields.insert("layers_pattern".into(), json!(patterns));
        })
    };
    assert_eq!(read(PATTERNS_MAX).unwrap().layers_pattern.len(), PATTERNS_MAX);
    let field = "layers_pattern";
    let (pattern, reason) = (format!("layers{PATTERNS_MAX}"), too_many());
    assert_eq!(read(PATTERNS_MAX + 1), Err(LoraError::Pattern { field, pattern, reason }));
}

#[test]
fn patterns_that_cannot_be_matched_are_refused() {
    for pattern in [
        "a++b",
        "(?!a)b",
        r"(a)\1",
        "a)(b",
        "[",
        "(?:a{1000}){1000}",
        "[a&&b]",
        "a*+",
        "[[a]",
        "(?#a",
    ] {
        for field in ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"] {
            let error = read(|fields| {
                let is_map = field.ends_with("_pattern");
                let value = if is_map { json!({ pattern: 2 }) } else { json!(pattern) };
                fields.insert(field.into(), value);
            });
            let found = match error {
                Err(LoraError::Pattern { field, pattern, .. }) => Some((field, pattern)),
                _ => None,
            };
            assert_eq!(found, Some((field, pattern.to_owned())));
        }
    }
    let keys = |count: usize, key: fn(usize) -> String| {
        let keys: Map<String, Value> = (0..count).map(|i| (key(i), json!(2))).collect();
        read(|fields| {
            fields.insert("rank_pattern".into(), keys.into());
        })
    };
    assert!(keys(5000, |i| format!("layers.{i}.self_attn.q_proj")).is_ok());
    assert!(matches!(keys(257, |i| format!("{i}|q")), Err(LoraError::Pattern { .. })));
    let error = read(|fields| {
        fields.insert("target_parameters".into(), json!(["experts.down_proj"]));
        fields.insert("lora_dropout".into(), json!(0.1));
    });
    assert_eq!(error, Err(LoraError::DropoutBesideParameters { dropout: "0.1".into() }));
}

/// What PEFT 0.21 does with the same files; `tests/interop/make_peft_rules.py` makes the table.
#[test]
fn the_same_modules_are_adapted_as_peft_adapts() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/peft_rules.json");
    let table: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let names = |key: &str| -> Vec<String> { serde_json::from_value(table[key].clone()).unwrap() };
    let layer = |name: &str| name.split('.').find_map(|part| part.parse::<usize>().ok());
    let cases = table["cases"].as_array().unwrap();
    assert!(cases.len() > 40);
    for case in cases {
        let mut config = case["config"].clone();
        for (key, value) in
            [("peft_type", json!("LORA")), ("r", json!(8)), ("lora_alpha", json!(6))]
        {
            config[key] = value;
        }
        let lora = LoraSpec::from_peft_json(&config.to_string());
        if config.to_string().contains("(?!") {
            assert!(matches!(lora, Err(LoraError::Pattern { .. })), "{config}");
            continue;
        }
        // A target that names nothing is the model's to refuse.
        let nothing = case["why"].as_str().is_some_and(|why| why.contains("not found"));
        let Ok(lora) = lora else {
            assert!(case["adapted"].is_null() && !nothing, "{config}: {lora:?}");
            continue;
        };
        let modules =
            names("modules").into_iter().map(|name| (lora.rank(&name, layer(&name)), name));
        let parameters =
            names("parameters").into_iter().map(|name| (lora.parameter_rank(&name), name));
        let found: BTreeMap<String, (usize, f64)> = modules
            .chain(parameters)
            .filter_map(|(rank, name)| {
                rank.map(|rank| (name.clone(), (rank, lora.scale(&name, rank))))
            })
            .collect();
        let expected: Option<BTreeMap<String, (usize, f64)>> =
            serde_json::from_value(case["adapted"].clone()).unwrap();
        assert!(expected.is_some() || nothing, "{config}");
        assert_eq!(found, expected.unwrap_or_default(), "{config}");
    }
}
