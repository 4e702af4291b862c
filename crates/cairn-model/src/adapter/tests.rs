//! Which weights have adapters, and where those lie in PEFT's files.

use cairn_spec::{LoraSpec, ModelSpec, TargetModules};

use super::*;
use crate::load::{Naming, TensorSource, check_tensors};

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
}

/// What PEFT 0.21 with transformers 5 takes on the golden folders (`get_peft_model`, then the names of
/// what it made): in models with experts these, their routers and the attention.
#[test]
fn all_linear_is_what_peft_makes_of_it() {
    let attention =
        ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("self_attn.{name}"));
    let latent = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"];
    let latent = latent.map(|name| format!("self_attn.{name}"));
    let experts = |names: [&str; 3]| names.map(|name| format!("experts.{name}"));
    let plain = experts(["gate_proj", "up_proj", "down_proj"]);
    for (name, expected) in [
        ("mixtral", [&attention[..], &experts(["w1", "w2", "w3"]), &["moe.gate".into()]].concat()),
        ("qwen3_moe", [&attention[..], &plain, &["mlp.gate".into()]].concat()),
        (
            "deepseek_v2",
            [&latent[..], &plain, &["mlp.gate".into(), "self_attn.q_proj".into()]].concat(),
        ),
        ("bert", ["key", "query", "value", "dense"].map(|name| format!("_.{name}")).to_vec()),
    ] {
        let spec = spec(name);
        let adapters = AdapterMap::new(&spec, &LoraSpec::new(2, TargetModules::AllLinear)).unwrap();
        // The last two parts of a name, without an expert's number.
        let ends: BTreeSet<String> = adapters
            .modules()
            .into_iter()
            .map(|module| {
                let parts: Vec<&str> =
                    module.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
                let [.., before, last] = &parts[..] else { panic!("{module}") };
                let before = match *before {
                    "block_sparse_moe" => "moe",
                    "self" | "output" | "intermediate" | "transform" => "_",
                    before => before,
                };
                format!("{before}.{last}")
            })
            .collect();
        assert_eq!(ends, expected.into_iter().collect(), "{name}");
    }
    let bert = AdapterMap::new(&spec("bert"), &LoraSpec::new(2, TargetModules::AllLinear)).unwrap();
    assert!(bert.modules().contains(&"cls.predictions.transform.dense"));
    assert!(!bert.modules().contains(&"cls.predictions.decoder"));
}

#[test]
fn experts_are_stacked_and_what_no_file_has_is_left_open() {
    let spec = spec("mixtral");
    let adapters = AdapterMap::new(&spec, &lora(&["experts.2.w1", "experts.0.w1"])).unwrap();
    let adapted = adapters.get("model.layers.1.mlp.experts.gate_proj.weight").unwrap();
    let map = adapters.tensor_map();
    let rows = |weight: &str| -> Vec<(usize, usize)> {
        map.slices_of(weight).iter().map(|slice| (slice.first_row, slice.rows)).collect()
    };
    let f = spec.mlp.intermediate_size();
    assert_eq!(rows(&adapted.a), [(0, 4), (8, 4)]);
    assert_eq!(rows(&adapted.b), [(0, f), (2 * f, f)]);
    assert!(!adapters.shares_weights());
    let mut unlike = lora(&["w1", "w2"]);
    unlike.rank_pattern.push("experts.1.w2", 2).unwrap();
    let error = AdapterMap::new(&spec, &unlike).unwrap_err();
    assert_eq!(
        error.to_string(),
        "adapters of experts of one layer differ: model.layers.0.block_sparse_moe.experts.0.w2 has \
         rank 4 and scale 2, model.layers.0.block_sparse_moe.experts.1.w2 has rank 2 and scale 4"
    );
    assert!(error.hints()[0].contains("rank_pattern"));
}

#[test]
fn the_parts_of_kv_b_proj_share_a() {
    let spec = spec("deepseek_v2");
    let adapters = AdapterMap::new(&spec, &lora(&["kv_b_proj"])).unwrap();
    let [k, v] = ["k_b_proj", "v_b_proj"]
        .map(|part| adapters.get(&format!("model.layers.0.self_attn.{part}.weight")).unwrap());
    assert_eq!(k.a, v.a);
    assert_ne!(k.b, v.b);
    assert!(adapters.shares_weights());
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
    for (name, module) in [("llama", "embed_tokens"), ("gpt2", "wte"), ("bert", "word_embeddings")]
    {
        let error = AdapterMap::new(&spec(name), &lora(&[module])).unwrap_err();
        assert!(matches!(error, AdapterError::Table { .. }), "{name} {module}: {error:?}");
    }
}

/// PEFT's module of the head is there also where the head is the embedding.
#[test]
fn the_head_may_have_one_where_it_is_named() {
    for (name, module) in [
        ("llama", "lm_head"),
        ("gpt2", "lm_head"),
        ("gpt_neox", "embed_out"),
        ("gpt_neox", "lm_head"),
        ("bert", "decoder"),
    ] {
        let adapters = AdapterMap::new(&spec(name), &lora(&[module])).unwrap();
        assert!(adapters.get("lm_head.weight").is_some(), "{name}");
        assert!(adapters.modules()[0].ends_with(module), "{name}: {:?}", adapters.modules());
        // Where only some blocks have adapters, the head has one under its full name alone.
        let mut blocks = lora(&[module]);
        blocks.layers_to_transform = Some(vec![0]);
        match AdapterMap::new(&spec(name), &blocks) {
            Ok(adapters) => {
                assert_ne!(name, "bert");
                assert!(adapters.get("lm_head.weight").is_some(), "{name}");
            }
            Err(error) => {
                assert_eq!(name, "bert", "{error:?}");
                assert!(matches!(error, AdapterError::Nothing { .. }), "{error:?}");
            }
        }
        blocks.layers_to_transform = Some(Vec::new());
        let everywhere = AdapterMap::new(&spec(name), &blocks).unwrap();
        assert!(everywhere.get("lm_head.weight").is_some(), "{name}");
    }
}

struct Shapes(BTreeMap<String, Vec<usize>>);

impl TensorSource for Shapes {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }
    fn read_f32(&self, _: &str, _: std::ops::Range<usize>, _: &mut [f32]) -> Result<(), String> {
        Err("shapes only".to_owned())
    }
}

/// PEFT 0.21 saves an adapted head's own weight beside the adapter.
#[test]
fn the_heads_own_weight_beside_its_adapter_is_left_aside() {
    let spec = spec("llama");
    let map = AdapterMap::new(&spec, &lora(&["q_proj", "lm_head"])).unwrap().tensor_map();
    let tensors = map.tensors().into_iter();
    let own: BTreeMap<String, Vec<usize>> =
        tensors.map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect();
    let checked = |name: &str, shape: &[usize]| {
        let mut tensors = own.clone();
        tensors.insert(format!("{WRAPPER}{name}"), shape.to_vec());
        let checked = check_tensors(&spec, &map, (&Shapes(tensors), Naming::Peft));
        checked.map(|_| ()).map_err(|error| error.to_string())
    };
    let (v, d) = (spec.vocab_size, spec.hidden_size);
    assert_eq!(checked("lm_head.base_layer.weight", &[v, d]), Ok(()));
    let error = checked("lm_head.base_layer.weight", &[v + 1, d]).unwrap_err();
    assert!(error.contains("lm_head.base_layer.weight is ["), "{error}");
    // Of modules without an adapter there is none.
    for name in ["model.embed_tokens.base_layer.weight", "lm_head.weight"] {
        let error = checked(name, &[v, d]).unwrap_err();
        assert!(error.contains("has no place in the model"), "{error}");
    }
}

#[test]
fn parameters_are_stacks_or_modules_by_their_newer_names() {
    let mixtral = spec("mixtral");
    let stacked = |parameters: &[&str], modules: &[&str]| {
        let parameters = parameters.iter().map(|&name| name.to_owned()).collect();
        let lora = LoraSpec { target_parameters: parameters, ..lora(modules) };
        AdapterMap::new(&mixtral, &lora)
    };
    let tensors = |adapters: &AdapterMap| -> Vec<(String, Vec<usize>)> {
        let map = adapters.tensor_map();
        let of_layer = map.tensors().into_iter().filter_map(|(name, shape)| {
            let name = name.strip_prefix("base_model.model.model.layers.1.mlp.")?;
            Some((name.to_owned(), shape.to_vec()))
        });
        of_layer.collect()
    };
    let named = |list: &[(&str, [usize; 2])]| -> Vec<(String, Vec<usize>)> {
        list.iter().map(|(name, shape)| (format!("{name}.weight"), shape.to_vec())).collect()
    };
    // Names and shapes as PEFT 0.21 saves them.
    let both = stacked(&["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"], &[]);
    let both = both.unwrap();
    assert_eq!(
        tensors(&both),
        named(&[
            ("gate.lora_A", [4, 64]),
            ("gate.lora_B", [4, 4]),
            ("experts.base_layer.lora_A", [16, 64]),
            ("experts.base_layer.lora_B", [320, 16]),
            ("experts.lora_A", [16, 160]),
            ("experts.lora_B", [64, 16]),
        ])
    );
    assert!(both.has_parameters() && both.shares_weights());
    let one = stacked(&["experts.gate_up_proj"], &["q_proj"]).unwrap();
    assert_eq!(
        tensors(&one),
        named(&[("experts.lora_A", [16, 64]), ("experts.lora_B", [320, 16])])
    );
    let adapted = ["gate", "up"]
        .map(|part| one.get(&format!("model.layers.1.mlp.experts.{part}_proj.weight")).unwrap());
    assert!(adapted[0].a == adapted[1].a && adapted[0].b != adapted[1].b);
    let error = stacked(&["experts.gate_up_proj"], &["w3"]).unwrap_err();
    assert!(matches!(error, AdapterError::Twice { .. }), "{error}");
    let error = stacked(&["experts.w1"], &[]).unwrap_err();
    let attention = "k_proj.weight, lm_head.weight, o_proj.weight, q_proj.weight, v_proj.weight";
    let hint =
        format!("there are down_proj, embed_tokens.weight, gate.weight, gate_up_proj, {attention}");
    assert_eq!(error.hints(), [hint]);
    let transposed = LoraSpec { target_parameters: vec!["c_proj.weight".into()], ..lora(&[]) };
    let error = AdapterMap::new(&spec("gpt2"), &transposed).unwrap_err();
    assert!(matches!(error, AdapterError::Transposed { .. }), "{error}");
}
