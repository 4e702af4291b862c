//! Runs of every family: from a `config.json`, and from the weights of a folder.

use super::*;

/// Goldens that together hold every family.
const GOLDENS: [&str; 16] = [
    "llama",
    "gpt2",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_neox",
    "phi3",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "bert",
    "modernbert",
];

/// Longer than the runs above, so that a loss has time to fall.
const STEPS: [&str; 4] =
    ["budget.steps=24", "optimizer.learning_rate=0.01", "eval.every=0", "checkpoint.every=0"];

pub(super) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

/// The recipe of [`recipe`] with the model of a `config.json`.
pub(super) fn recipe_with(config: &str, overrides: &[&str]) -> TrainRecipe {
    let mut file = recipe(&[]).to_file();
    file.model = cairn_spec::recipe::ModelSection::default();
    file.dropout = cairn_spec::recipe::DropoutSection::default();
    let (file, _) = file.with_model_config(config).unwrap();
    let file = file.with_overrides(&STEPS).unwrap().with_overrides(overrides).unwrap();
    file.resolve(&Facts { available_threads: 1, tokenizer_vocab_size: None }).unwrap()
}

/// A golden's model with room for the tokens of the tests' corpus.
pub(super) fn recipe_of(name: &str) -> TrainRecipe {
    recipe_with_balance(name, name == "mixtral")
}

/// The same, with transformers' load-balancing loss or without.
fn recipe_with_balance(name: &str, balance: bool) -> TrainRecipe {
    let text = std::fs::read_to_string(golden(name).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["vocab_size"] = 300.into();
    if balance {
        config["output_router_logits"] = true.into();
        config["router_aux_loss_coef"] = 0.05.into();
    }
    let mut overrides = Vec::new();
    if name.ends_with("bert") {
        overrides.push("objective.mask_token=<|endoftext|>");
    }
    recipe_with(&config.to_string(), &overrides)
}

fn mean(losses: &[(u64, u64)]) -> f64 {
    losses.iter().map(|(_, loss)| f64::from_bits(*loss)).sum::<f64>() / losses.len() as f64
}

#[test]
fn every_family_learns_and_resumes_bit_for_bit() {
    let fixture = Fixture::new();
    for name in GOLDENS {
        let recipe = recipe_of(name);
        let open =
            |run: &str| fixture.open(&format!("{name}-{run}"), &recipe, Cpu::detect(1)).unwrap();
        let mut straight = open("straight");
        let outcome = straight.run(&FakeHost::new(), &mut Silent).unwrap();
        assert!(outcome.best.is_some_and(|best| best.loss.is_finite()), "{name}");
        let found = losses(&straight);
        let (first, last) = (mean(&found[..4]), mean(&found[20..]));
        assert!(last < 0.9 * first, "{name}: from {first} to {last}");
        let mut stopped = open("stopped");
        stopped.run(&FakeHost::stopping_after(5), &mut Silent).unwrap();
        drop(stopped);
        let mut resumed = open("stopped");
        assert_eq!(resumed.step(), 5);
        resumed.run(&FakeHost::new(), &mut Silent).unwrap();
        assert_eq!(resumed.state_hash(), straight.state_hash(), "{name}");
        assert_eq!(losses(&resumed), found, "{name}");
    }
}

#[test]
fn every_family_goes_on_from_a_folder_of_its_own() {
    let fixture = Fixture::new();
    for name in GOLDENS {
        let recipe = recipe_of(name);
        let mut first = fixture.open(name, &recipe, Cpu::detect(1)).unwrap();
        let saved = first.run(&FakeHost::new(), &mut Silent).unwrap();
        let fresh = mean(&losses(&first)[..1]);
        let weights = |trainer: &Trainer| -> Vec<Vec<u8>> {
            let session = trainer.learner().session();
            let names = session
                .persistent()
                .filter(|(_, class, ..)| *class == cairn_program::Class::Weight);
            names.map(|(name, ..)| session.stored(name).unwrap().to_vec()).collect()
        };
        // The folder describes the model as well.
        let config = std::fs::read_to_string(saved.checkpoint.join("config.json")).unwrap();
        let mut overrides = vec!["budget.steps=2"];
        if name.ends_with("bert") {
            overrides.push("objective.mask_token=<|endoftext|>");
        }
        let onward = recipe_with(&config, &overrides);
        let folder = fixture.run_folder(&format!("{name}-onward"));
        let from = (&onward, Some(saved.checkpoint.as_path()));
        let mut second = open_from(&folder, &fixture.corpus, from, Cpu::detect(1)).unwrap();
        assert!(weights(&second) == weights(&first), "{name} begins where it ended");
        second.run(&FakeHost::new(), &mut Silent).unwrap();
        let onward = mean(&losses(&second)[..1]);
        assert!(onward < 0.8 * fresh, "{name}: {fresh} when fresh, {onward} going on");
    }
}

#[test]
fn an_encoder_is_scored_on_what_is_masked_and_without_a_mask_token_refused() {
    let fixture = Fixture::new();
    let recipe = recipe_of("bert");
    let mut trainer = fixture.open("run", &recipe, Cpu::detect(1)).unwrap();
    trainer.run(&FakeHost::new(), &mut Silent).unwrap();
    let metrics = read_metrics(trainer.folder()).unwrap();
    let validation = metrics.iter().find_map(|metric| match metric {
        Metric::Validation(found) => Some(found.clone()),
        Metric::Step(_) => None,
    });
    let validation = validation.unwrap();
    let tokens = fixture.corpus.documents(Split::Validation).num_tokens();
    let share = validation.targets as f64 / tokens as f64;
    assert!((0.05..0.3).contains(&share), "{} of {tokens}", validation.targets);
    assert_eq!((validation.bytes, validation.bits_per_byte), (None, None));
    let file = recipe.to_file().with_overrides(&["objective.mask_token=null"]).unwrap();
    let facts = Facts { available_threads: 1, tokenizer_vocab_size: None };
    let error = fixture.open("none", &file.resolve(&facts).unwrap(), Cpu::detect(1)).unwrap_err();
    assert!(error.to_string().contains("[MASK]"), "{error}");
}

/// What a run is warned of.
struct Warnings(Vec<String>);

impl Observer for Warnings {
    fn observe(&mut self, event: &Event<'_>) {
        if let Event::Warning(warning) = event {
            self.0.push(warning.to_string());
        }
    }
}

#[test]
fn a_loss_that_balances_experts_is_trained_and_its_absence_is_said() {
    let fixture = Fixture::new();
    for (name, is_balanced) in [("mixtral", true), ("qwen3_moe", false)] {
        let mut trainer = fixture.open(name, &recipe_of(name), Cpu::detect(1)).unwrap();
        let mut heard = Warnings(Vec::new());
        trainer.run(&FakeHost::new(), &mut heard).unwrap();
        let is_told = heard.0.iter().any(|text| text.contains("without a load-balancing loss"));
        assert_eq!(is_told, !is_balanced, "{name}: {:?}", heard.0);
        let training = trainer.learner().session().program(crate::programs::TRAIN);
        assert_eq!(training.find("balance_loss").is_some(), is_balanced, "{name}");
        let scoring = trainer.learner().session().program(crate::programs::SCORE);
        assert!(scoring.find("balance_loss").is_none(), "{name}");
    }
    // Without the loss the same run ends elsewhere: it has a gradient.
    let hash = |run: &str, balance: bool| {
        let recipe = recipe_with_balance("mixtral", balance);
        let mut trainer = fixture.open(run, &recipe, Cpu::detect(1)).unwrap();
        trainer.run(&FakeHost::new(), &mut Silent).unwrap();
        trainer.state_hash()
    };
    assert_ne!(hash("balanced", true), hash("plain", false));
}

#[test]
fn a_token_that_is_none_of_the_tokenizers_is_left_out_and_said() {
    let fixture = Fixture::new();
    // Its file says that a text begins with 1 and ends with 2, which are bytes here.
    let mut trainer = fixture.open("run", &recipe_of("llama"), Cpu::detect(1)).unwrap();
    let mut heard = Warnings(Vec::new());
    let outcome = trainer.run(&FakeHost::new(), &mut heard).unwrap();
    assert!(
        heard.0.iter().any(|text| text.contains("bos_token_id 1, eos_token_id 2")),
        "{:?}",
        heard.0
    );
    let config = std::fs::read_to_string(outcome.checkpoint.join("config.json")).unwrap();
    let spec = ModelSpec::from_hf_json(&config).unwrap();
    assert_eq!(spec.tokens.bos, None);
    assert_eq!(spec.tokens.eos, [fixture.corpus.end_of_document()]);
}

#[test]
fn every_family_has_a_pace() {
    for name in GOLDENS {
        let cpu = || Ok(Cpu::detect(1));
        let pace = crate::measure_pace(&recipe_of(name), cpu, &FakeHost::new()).unwrap();
        assert!(pace.flops_per_s > 0.0, "{name}: {pace:?}");
    }
}
