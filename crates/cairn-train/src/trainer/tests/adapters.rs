//! Runs that train a low-rank adapter beside a frozen model.

use cairn_model::AdapterMap;
use cairn_program::Class;
use cairn_spec::LoraSpec;

use super::families::{golden, recipe_of, recipe_with};
use super::*;

/// A recipe that trains an adapter beside the model in `base`.
fn adapter_recipe(base: &Path, overrides: &[&str]) -> TrainRecipe {
    let config = std::fs::read_to_string(base.join("config.json")).unwrap();
    let initial = format!("model.initial={}", base.display());
    let mut all = vec![
        initial.as_str(),
        "adapter.r=4",
        "adapter.lora_dropout=0.1",
        "optimizer.weight_decay=0",
    ];
    all.extend_from_slice(overrides);
    recipe_with(&config, &all)
}

fn open_at(fixture: &Fixture, name: &str, recipe: &TrainRecipe) -> Result<Trainer, TrainError> {
    let base = recipe.initial.clone().unwrap();
    let from = (recipe, Some(Path::new(&base)));
    open_from(&fixture.run_folder(name), &fixture.corpus, from, Cpu::detect(1))
}

/// The weights of the model, without the adapter's.
fn frozen(trainer: &Trainer) -> Vec<Vec<u8>> {
    let session = trainer.learner().session();
    let weights = session.persistent().filter(|(name, class, ..)| {
        *class == Class::Weight && !cairn_model::is_adapter_weight(name)
    });
    weights.map(|(name, ..)| session.stored(name).unwrap().to_vec()).collect()
}

#[test]
fn adapters_learn_beside_frozen_weights_and_resume_bit_for_bit() {
    let fixture = Fixture::new();
    for (base, encoding) in [
        ("llama", "f32"),
        ("llama", "bf16"),
        ("llama", "q8"),
        ("llama", "nf4"),
        ("gpt2", "f32"),
        ("gpt2", "q8"),
        // All linear: experts and routers too.
        ("mixtral", "nf4"),
        ("qwen3_moe", "q8"),
        ("deepseek_v2", "f32"),
        // Stacked experts, as PEFT has them.
        ("mixtral", "f32"),
    ] {
        let name = format!("{base}-{encoding}");
        let mut overrides = vec!["optimizer.ema_decay=0.9"];
        if base == "llama" {
            overrides.push("adapter.target_modules=['q_proj', 'down_proj', 'lm_head']");
        }
        if (base, encoding) == ("mixtral", "f32") {
            overrides.push("adapter.target_parameters=['experts.gate_up_proj', 'down_proj']");
            overrides.push("adapter.lora_dropout=0");
        }
        let encoding = format!("adapter.base_encoding={encoding}");
        overrides.push(&encoding);
        let base = match base {
            // The golden model has no room for the tokens of the corpus.
            "deepseek_v2" => trained(&fixture, base),
            base => golden(base),
        };
        let recipe = adapter_recipe(&base, &overrides);
        let mut straight = open_at(&fixture, &name, &recipe).unwrap();
        let before = frozen(&straight);
        let outcome = straight.run(&FakeHost::new(), &mut Silent).unwrap();
        assert!(frozen(&straight) == before, "{name}: the model itself stays");
        let found = losses(&straight);
        let [first, last] = [&found[..4], &found[20..]]
            .map(|part| part.iter().map(|(_, loss)| f64::from_bits(*loss)).sum::<f64>() / 4.0);
        assert!(last < 0.95 * first, "{name}: from {first} to {last}");
        let stopped = format!("{name}-stopped");
        open_at(&fixture, &stopped, &recipe)
            .unwrap()
            .run(&FakeHost::stopping_after(5), &mut Silent)
            .unwrap();
        let mut resumed = open_at(&fixture, &stopped, &recipe).unwrap();
        assert_eq!(resumed.step(), 5);
        resumed.run(&FakeHost::new(), &mut Silent).unwrap();
        assert_eq!(resumed.state_hash(), straight.state_hash(), "{name}");
        check_layout(&outcome.checkpoint, &base);
        check_layout(&straight.folder().average(), &base);
    }
}

/// The folder of a small model of a golden's family that knows the tokens of the corpus.
fn trained(fixture: &Fixture, name: &str) -> PathBuf {
    let mut trainer =
        fixture.open(&format!("{name}-base"), &recipe_of(name), Cpu::detect(1)).unwrap();
    trainer.run(&FakeHost::stopping_after(5), &mut Silent).unwrap().checkpoint
}

/// The folder is PEFT's, and nothing of the model is in it.
fn check_layout(folder: &Path, base: &Path) {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let lora = LoraSpec::from_peft_json(&text).unwrap();
    assert_eq!(lora.r, 4);
    assert_eq!(lora.base_model_name_or_path.as_deref(), Some(base.to_str().unwrap()));
    let config = std::fs::read_to_string(base.join("config.json")).unwrap();
    let spec = ModelSpec::from_hf_json(&config).unwrap();
    let saved = Checkpoint::open(folder, Verify::Hashes).unwrap();
    let map = AdapterMap::new(&spec, &lora).unwrap();
    // What PEFT opens: it knows no dropout beside experts and routers.
    assert_eq!(lora.lora_dropout > 0.0, !map.has_parameters());
    let map = map.tensor_map();
    let expected: std::collections::BTreeSet<&str> =
        map.tensors().iter().map(|(name, _)| *name).collect();
    let found: std::collections::BTreeSet<&str> =
        saved.weights().tensors().map(|tensor| tensor.name).collect();
    assert_eq!(found, expected);
    for file in ["model.safetensors", "config.json", "generation_config.json"] {
        assert!(!folder.join(file).exists(), "{file}");
    }
}

#[test]
fn another_model_under_a_trained_adapter_is_refused() {
    let fixture = Fixture::new();
    let base = fixture.run_folder("base");
    std::fs::create_dir(&base).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama").join(file), base.join(file)).unwrap();
    }
    let recipe = adapter_recipe(&base, &[]);
    let mut trainer = open_at(&fixture, "run", &recipe).unwrap();
    trainer.run(&FakeHost::stopping_after(3), &mut Silent).unwrap();
    drop(trainer);
    // Elsewhere it is the same model.
    let moved = fixture.run_folder("moved");
    std::fs::rename(&base, &moved).unwrap();
    let recipe = adapter_recipe(&moved, &[]);
    drop(open_at(&fixture, "run", &recipe).unwrap());
    let path = moved.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = open_at(&fixture, "run", &recipe).unwrap_err();
    let TrainError::Resume(ResumeError::OtherBase { .. }) = &error else { panic!("{error:?}") };
    let none =
        open_from(&fixture.run_folder("none"), &fixture.corpus, (&recipe, None), Cpu::detect(1));
    assert!(matches!(none.unwrap_err(), TrainError::NoBase));
}

#[test]
fn a_run_goes_on_from_an_adapter() {
    let fixture = Fixture::new();
    let base = golden("llama");
    let mut first = open_at(&fixture, "first", &adapter_recipe(&base, &[])).unwrap();
    let saved = first.run(&FakeHost::new(), &mut Silent).unwrap().checkpoint;
    let adapters = |trainer: &Trainer| -> Vec<Vec<u8>> {
        let session = trainer.learner().session();
        let weights = session.persistent().filter(|(name, class, ..)| {
            *class == Class::Weight && cairn_model::is_adapter_weight(name)
        });
        weights.map(|(name, ..)| session.stored(name).unwrap().to_vec()).collect()
    };
    let initial = format!("adapter.initial={}", saved.display());
    let recipe = adapter_recipe(&base, &[&initial, "optimizer.ema_decay=0.9"]);
    let mut second = open_at(&fixture, "second", &recipe).unwrap();
    assert!(adapters(&second) == adapters(&first), "it begins where the first ended");
    second.run(&FakeHost::stopping_after(3), &mut Silent).unwrap();
    let onward = adapters(&second);
    assert!(onward != adapters(&first));
    drop(second);
    // Going on with the second run is no new beginning, wherever the first adapter is now.
    std::fs::remove_file(saved.join("adapter_model.safetensors")).unwrap();
    assert!(adapters(&open_at(&fixture, "second", &recipe).unwrap()) == onward);
    let error = open_at(&fixture, "third", &recipe).unwrap_err();
    let TrainError::InitialAdapter { folder, .. } = &error else { panic!("{error:?}") };
    assert_eq!(folder, &saved);
}
