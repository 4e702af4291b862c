//! Which weights have adapters, and where those lie in PEFT's files.

use cairn_spec::{LoraSpec, ModelSpec, TargetModules};

use super::*;

fn spec(name: &str) -> ModelSpec {
    let path = format!("{}/../../tests/goldens/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
    ModelSpec::from_hf_json(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn lora(names: &[&str]) -> LoraSpec {
    let names = names.iter().map(|&name| name.to_owned()).collect();
    LoraSpec::new(4, TargetModules::Named(names))
}

#[test]
fn fused_projections_share_a_and_split_b() {
    let adapters = AdapterMap::new(&spec("gpt2"), &lora(&["c_attn"])).unwrap();
    let parts = ["q_proj", "k_proj", "v_proj"].map(|part| {
        adapters.get(&format!("model.layers.0.self_attn.{part}.weight")).unwrap().clone()
    });
    assert!(parts.iter().all(|part| part.a == "transformer.h.0.attn.c_attn.lora_A.weight"));
    let map = adapters.tensor_map();
    let d = spec("gpt2").hidden_size;
    for (index, part) in parts.iter().enumerate() {
        let [slice] = map.slices_of(&part.b) else { panic!("{part:?}") };
        assert_eq!(slice.tensor, "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight");
        assert_eq!(slice.shape, [3 * d, 4]);
        assert_eq!(slice.placement, Placement::Rows { start: index * d, run: d, stride: d });
    }
}

#[test]
fn all_linear_leaves_tables_norms_and_head_alone() {
    let spec = spec("llama");
    let adapters = AdapterMap::new(&spec, &LoraSpec::new(2, TargetModules::AllLinear)).unwrap();
    assert_eq!(adapters.weights().len(), 2 * 7 * spec.num_hidden_layers);
    assert!(adapters.get("lm_head.weight").is_none());
    assert!(adapters.get("model.embed_tokens.weight").is_none());
    // Beside experts it is the attention's projections.
    let spec = self::spec("deepseek_v2");
    let adapters = AdapterMap::new(&spec, &LoraSpec::new(2, TargetModules::AllLinear)).unwrap();
    let modules = adapters.modules();
    assert!(modules.len() >= 3 * spec.num_hidden_layers, "{modules:?}");
    assert!(modules.iter().all(|module| module.contains(".self_attn.")), "{modules:?}");
}

#[test]
fn names_that_are_not_there_are_refused_with_those_that_are() {
    let error = AdapterMap::new(&spec("llama"), &lora(&["q_proj", "query"])).unwrap_err();
    assert!(matches!(&error, AdapterError::NoSuchModule { target, .. } if target == "query"));
    assert!(error.hints()[0].contains("q_proj"), "{error:?}");
    let mut beyond = lora(&["q_proj"]);
    beyond.layers_to_transform = Some(vec![99]);
    let error = AdapterMap::new(&spec("llama"), &beyond).unwrap_err();
    assert!(matches!(&error, AdapterError::Nothing { .. }) && error.hints()[0].contains("99"));
    for (name, module) in [
        ("llama", "embed_tokens"),
        ("llama", "lm_head"),
        ("mixtral", "gate"),
        ("deepseek_v2", "kv_b_proj"),
        ("bert", "decoder"),
    ] {
        let error = AdapterMap::new(&spec(name), &lora(&[module])).unwrap_err();
        let is_named = matches!(
            error,
            AdapterError::NotAProjection { .. } | AdapterError::NoSuchModule { .. }
        );
        assert!(is_named, "{name} {module}: {error:?}");
    }
}
