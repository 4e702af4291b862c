//! Recipes as people write them, older ones, wrong ones, and back.

use super::*;
use crate::model::{Mlp, Position};
use crate::{DType, Hint, LoraSpec, ModelSpec, TargetModules};
use proptest::prelude::*;

const LLAMA: &str = r#"
schema = "train/2"

[run]
name = "small"
memory_limit = "2GiB"

[model]
family = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 160
rope_theta = 500000.0

[data]
corpus = "data/shards"
seq_len = 128

[schedule]
kind = "wsd"
warmup_steps = 20

[batch]
micro_batch_size = 4
global_batch_size = 16

[budget]
tokens = "2M"
"#;

const FACTS: Facts = Facts { available_threads: 2, tokenizer_vocab_size: Some(512) };

fn parsed(text: &str) -> RecipeFile {
    RecipeFile::parse(text, Format::Toml).unwrap()
}

/// The recipe above, with overrides.
fn resolved(overrides: &[&str]) -> Result<TrainRecipe, RecipeError> {
    parsed(LLAMA).with_overrides(overrides)?.resolve(&FACTS)
}

fn check_refused(overrides: &[&str], message: &str, hints: &[&str]) {
    let error = resolved(overrides).unwrap_err();
    assert_eq!(error.to_string(), message, "{overrides:?}");
    assert_eq!(error.hints(), hints, "{overrides:?}");
}

#[test]
fn what_is_left_open_is_decided() {
    let recipe = resolved(&[]).unwrap();
    assert_eq!(recipe.model.vocab_size, 512);
    assert_eq!(recipe.model.max_position_embeddings, 128);
    assert_eq!(recipe.model.attention.form.key_dim(), 16);
    assert!(matches!(&recipe.model.position, Position::Rope(rope) if rope.theta > 4e5));
    assert_eq!((recipe.run.threads, recipe.run.weights), (2, DType::F32));
    assert_eq!(recipe.run.memory_limit_bytes, Some(2 << 30));
    assert_eq!(recipe.batch, Batch { micro_batch_size: 4, grad_accum_steps: 4 });
    assert_eq!(recipe.tokens_per_step(), 16 * 128);
    assert_eq!(recipe.total_steps(1.0), 2_000_000u64.div_ceil(2048));
    assert_eq!(recipe.schedule.decay_steps_of(100), 20);
    assert_eq!(recipe.early_stop, None);
    assert_eq!(recipe.optimizer.max_grad_norm, Some(1.0));
}

#[test]
fn a_resolved_recipe_prints_as_a_file_that_resolves_to_it() {
    let gpt2: &[&str] = &[
        "model.family=gpt2",
        "dropout.resid=0.1",
        "early_stop.patience=3",
        "optimizer.ema_decay=0.999",
        "eval.every=0",
        "checkpoint.every=0",
        "optimizer.max_grad_norm=0",
        "schedule.decay_steps=7",
        "data.tokenizer=tokenizer.json",
        "run.seed=9007199254740993",
    ];
    let mut file = parsed(LLAMA).with_overrides(gpt2).unwrap();
    file.model.num_key_value_heads = None;
    file.model.rope_theta = None;
    for recipe in [resolved(&[]).unwrap(), file.resolve(&FACTS).unwrap()] {
        let text = recipe.to_toml();
        let elsewhere = Facts { available_threads: 64, tokenizer_vocab_size: None };
        assert_eq!(parsed(&text).resolve(&elsewhere).unwrap(), recipe, "{text}");
        let json = serde_json::to_string(&toml::from_str::<serde_json::Value>(&text).unwrap());
        let json = RecipeFile::parse(&json.unwrap(), Format::Json).unwrap();
        let yaml = serde_yaml_ng::to_string(&toml::from_str::<serde_json::Value>(&text).unwrap());
        let yaml = RecipeFile::parse(&yaml.unwrap(), Format::Yaml).unwrap();
        assert_eq!((&json, &yaml), (&parsed(&text), &parsed(&text)));
    }
}

#[test]
fn resolved_settings_look_like_this() {
    insta::assert_snapshot!(resolved(&[]).unwrap().to_toml(), @r#"
    schema = "train/2"

    [run]
    name = "small"
    seed = 0
    threads = 2
    memory_limit = "2GiB"
    recompute = "auto"
    weights = "f32"

    [model]
    family = "llama"
    vocab_size = 512
    hidden_size = 64
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    head_dim = 16
    intermediate_size = 160
    max_position_embeddings = 128
    rope_theta = 500000.0
    rms_norm_eps = 0.00001
    hidden_act = "silu"
    attention_bias = false
    mlp_bias = false
    tie_word_embeddings = true
    initializer_range = 0.02

    [dropout]
    embd = 0.0
    attn = 0.0
    resid = 0.0

    [data]
    corpus = "data/shards"
    seq_len = 128

    [optimizer]
    learning_rate = 0.001
    betas = [0.9, 0.95]
    eps = 0.00000001
    weight_decay = 0.1
    decay = "matrices"
    max_grad_norm = 1.0

    [schedule]
    kind = "wsd"
    warmup_steps = 20
    min_lr_ratio = 0.1

    [batch]
    micro_batch_size = 4
    global_batch_size = 16
    grad_accum_steps = 4

    [budget]
    tokens = "2M"

    [eval]
    every = 250
    max_tokens = "1M"

    [checkpoint]
    every = 250
    keep_last = 2
    keep_best = true
    "#);
}

#[test]
fn an_older_file_is_migrated() {
    let older = include_str!("../../tests/recipes/train-1.toml");
    let newer = include_str!("../../tests/recipes/train-1.as-2.toml");
    assert_eq!(parsed(older), parsed(newer));
    assert_eq!(parsed(older).resolve(&FACTS).unwrap().run.seed, 7);

    let error = RecipeFile::parse(&older.replace("clip", "clop"), Format::Toml).unwrap_err();
    assert_eq!(error.to_string(), "unknown key 'clop' in section [train]");
}

#[test]
fn other_schemas_are_refused_by_name() {
    let error = RecipeFile::parse("schema = \"train/3\"", Format::Toml).unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown recipe schema 'train/3'; this version reads up to train/2"
    );
    for text in ["", "schema = 2", "[run]\nseed = 1"] {
        let error = RecipeFile::parse(text, Format::Toml).unwrap_err();
        assert_eq!(error.hints(), ["begin the file with schema = \"train/2\""]);
    }
    for (text, format) in [("schema = ", Format::Toml), ("a: [", Format::Yaml), ("{", Format::Json)]
    {
        let error = RecipeFile::parse(text, format).unwrap_err();
        assert!(matches!(error, RecipeError::Parse { .. }), "{error}");
    }
    assert!(Format::from_extension("ini").is_err());
    assert_eq!(Format::from_extension("yml"), Ok(Format::Yaml));
}

#[test]
fn unknown_keys_come_with_a_suggestion() {
    for (change, message, hint) in [
        (
            "optimizer.learning_rat=1",
            "unknown key 'learning_rat' in section [optimizer]",
            "did you mean 'optimizer.learning_rate'?",
        ),
        (
            "model.num_heads=4",
            "unknown key 'num_heads' in section [model]",
            "did you mean 'model.num_hidden_layers'?",
        ),
        (
            "run.learning_rate=1",
            "unknown key 'learning_rate' in section [run]",
            "did you mean 'optimizer.learning_rate'?",
        ),
        ("optimiser.learning_rate=1", "unknown section [optimiser]", "did you mean [optimizer]?"),
    ] {
        check_refused(&[change], message, &[hint]);
    }
    check_refused(&["model.zzz=4"], "unknown key 'zzz' in section [model]", &[]);
}

#[test]
fn wrong_types_are_named_with_section_and_key() {
    for (change, message) in [
        (
            "optimizer.learning_rate=fast",
            "'optimizer.learning_rate' is wrong: invalid type: string \"fast\", expected a number",
        ),
        (
            "optimizer.learning_rate=nan",
            "'optimizer.learning_rate' is wrong: it has no value, or one that is not a finite number",
        ),
        (
            "model.hidden_size=-1",
            "'model.hidden_size' is wrong: invalid value: integer `-1`, expected a whole number, 0 or more",
        ),
        (
            "model.hidden_size=1.5",
            "'model.hidden_size' is wrong: invalid type: floating point `1.5`, expected a whole number, 0 or more",
        ),
        (
            "optimizer.betas=[0.9]",
            "'optimizer.betas' is wrong: invalid length 1, expected an array of length 2",
        ),
        (
            "model.hidden_act=xielu",
            "'model.hidden_act' is wrong: 'xielu', expected one of silu, swish, gelu, gelu_new, \
          gelu_pytorch_tanh, gelu_fast, quick_gelu, relu",
        ),
        ("run.memory_limit=2XB", "'run.memory_limit' is wrong: '2XB' is not a number of bytes"),
        ("run.weights=f3", "'run.weights' is wrong: unknown dtype 'f3'"),
        (
            "model.family=mamba",
            "'model.family' is wrong: unknown variant `mamba`, expected one of `llama`, `gpt2`, \
             `mistral`, `qwen2`, `qwen3`, `mixtral`, `qwen3_moe`, `deepseek_v2`, `deepseek_v3`, \
             `gpt_neox`, `phi3`, `olmo2`, `gemma2`, `gemma3_text`, `bert`, `modernbert`",
        ),
        (
            "schedule.kind=linear",
            "'schedule.kind' is wrong: unknown variant `linear`, expected one of `cosine`, `wsd`, `constant`",
        ),
    ] {
        check_refused(&[change], message, &[]);
    }
    check_refused(
        &["model.family=qwen3"],
        "a recipe cannot describe a qwen3 model",
        &["keys describe llama and gpt2; give the Hugging Face file of any other model: \
           model.config=DIR/config.json"],
    );
    let error = RecipeFile::parse("schema = \"train/2\"\nmodel = 3", Format::Toml).unwrap_err();
    assert_eq!(error.to_string(), "'model' is wrong: it is a section, not the value 3");
}

#[test]
fn impossible_settings_are_refused_with_what_to_do() {
    check_refused(&["data.seq_len=0"], "'data.seq_len' must be between 1 and 16777216, not 0", &[]);
    check_refused(
        &["model.vocab_size=100"],
        "model.vocab_size 100 is smaller than the tokenizer's 512",
        &["set model.vocab_size to at least 512, or leave it out to take the tokenizer's"],
    );
    check_refused(
        &["model.max_position_embeddings=64"],
        "data.seq_len 128 exceeds model.max_position_embeddings 64",
        &["shorten data.seq_len or raise model.max_position_embeddings"],
    );
    check_refused(
        &["batch.global_batch_size=18"],
        "batch.global_batch_size 18 is not a multiple of batch.micro_batch_size 4",
        &["choose a multiple of 4"],
    );
    check_refused(
        &["batch.grad_accum_steps=3"],
        "'batch.grad_accum_steps' must be global_batch_size / micro_batch_size = 4, not 3",
        &[],
    );
    check_refused(
        &["budget.steps=10"],
        "set exactly one of budget.steps, budget.tokens, budget.flops; budget.steps and \
         budget.tokens are set",
        &["a change leaves the recipe's other keys as they are; take out what is not meant: \
           budget.steps=null or budget.tokens=null"],
    );
    check_refused(
        &["budget.tokens=null"],
        "set exactly one of budget.steps, budget.tokens, budget.flops; none is set",
        &[],
    );
    check_refused(&["run.threads=4096"], "'run.threads' must be between 1 and 1024, not 4096", &[]);
    check_refused(&["run.weights=f16"], "'run.weights' must be f32 or bf16, not f16", &[]);
    check_refused(
        &["run.name=../x"],
        "'run.name' must be letters, digits, '-', '_' and '.', at most 100 of them, not ../x",
        &[],
    );
    check_refused(
        &["early_stop.min_delta=0.1"],
        "'early_stop.patience' is missing",
        &["add it to the file, or pass early_stop.patience=VALUE"],
    );
    check_refused(
        &["optimizer.betas=[1.0, 0.9]"],
        "'optimizer.betas' must be between 0 and 0.999999, not 1",
        &[],
    );
}

#[test]
fn impossible_models_name_the_cause() {
    for (changes, cause) in [
        (
            &["model.num_attention_heads=5"][..],
            "hidden_size 64 is not a multiple of 5 attention heads",
        ),
        (&["model.num_key_value_heads=3"], "4 attention heads cannot share 3 key/value heads"),
        (&["model.num_hidden_layers=0"], "'num_hidden_layers' must be between 1 and 4096, not 0"),
        (&["dropout.attn=1"], "'attention dropout' must be between 0 and 0.999, not 1"),
        (&["dropout.resid=1.5"], "'residual dropout' must be between 0 and 0.999, not 1.5"),
        (
            &["model.layer_norm_epsilon=1e-5"],
            "'layer_norm_epsilon' = any value is not supported for llama models",
        ),
        (
            &["model.family=gpt2"],
            "'num_key_value_heads' = any value is not supported for gpt2 models",
        ),
    ] {
        let error = resolved(changes).unwrap_err();
        let RecipeError::Model(source) = &error else { panic!("{error}") };
        assert_eq!(source.to_string(), cause);
    }
    let mut file = parsed(LLAMA);
    file.model.hidden_size = None;
    let error = file.resolve(&FACTS).unwrap_err();
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "'hidden_size' is missing");
}

#[test]
fn overrides_take_toml_values_and_bare_words() {
    let recipe = resolved(&[
        "optimizer.betas=[0.8, 0.9]",
        "schedule.kind=constant",
        "data.corpus=/a/b c",
        "run.name=\"quoted\"",
        "eval.max_tokens = 3k",
        "optimizer.learning_rate=1e-2",
        "optimizer.learning_rate=3e-3",
    ])
    .unwrap();
    assert_eq!(recipe.optimizer.betas.map(f64::to_bits), [0.8f64, 0.9].map(f64::to_bits));
    assert_eq!(recipe.schedule.kind, ScheduleKind::Constant);
    assert_eq!((&recipe.data.corpus[..], &recipe.run.name[..]), ("/a/b c", "quoted"));
    assert_eq!(recipe.eval.max_tokens, 3000);
    assert_eq!(recipe.optimizer.learning_rate.to_bits(), 3e-3f64.to_bits());
    let steps = resolved(&["budget.tokens=null", "budget.steps=7"]).unwrap();
    assert_eq!(steps.budget, Budget::Steps(7));
    // The section's other keys stay.
    let batch = resolved(&["batch.global_batch_size=null"]).unwrap().batch;
    assert_eq!(batch, Batch { micro_batch_size: 4, grad_accum_steps: 1 });
    let typo = resolved(&["budget.tokes=null"]).unwrap_err();
    assert_eq!(typo.hints(), ["did you mean 'budget.tokens'?"], "{typo}");
    for text in ["seed=1", "run.seed", "run.seed=", ".seed=1", "run.=1"] {
        let error = resolved(&[text]).unwrap_err();
        assert!(matches!(error, RecipeError::BadOverride { .. }), "{text}: {error}");
    }
    // A line break would let a value set other keys.
    assert!(resolved(&["run.seed=1\nother = 2"]).is_err());
}

#[test]
fn a_sweep_is_the_grid_of_its_values() {
    let runs = expand_sweep(&[
        "optimizer.learning_rate=1e-3, 3e-4",
        "optimizer.betas=[0.9,0.95],[0.8,0.9]",
    ]);
    assert_eq!(
        runs.unwrap(),
        [
            ["optimizer.learning_rate=1e-3", "optimizer.betas=[0.9,0.95]"],
            ["optimizer.learning_rate=1e-3", "optimizer.betas=[0.8,0.9]"],
            ["optimizer.learning_rate=3e-4", "optimizer.betas=[0.9,0.95]"],
            ["optimizer.learning_rate=3e-4", "optimizer.betas=[0.8,0.9]"],
        ]
    );
    assert_eq!(expand_sweep(&["run.name='a,b',c"]).unwrap(), [["run.name='a,b'"], ["run.name=c"]]);
    assert_eq!(expand_sweep(&[""; 0]).unwrap(), [Vec::<String>::new()]);
    let thirty_two =
        format!("run.seed={}", (0..32).map(|i| i.to_string()).collect::<Vec<_>>().join(","));
    let error = expand_sweep(&[&thirty_two, &thirty_two]).unwrap_err();
    assert_eq!(error, RecipeError::SweepTooLarge { runs: 1024, max: SWEEP_RUNS_MAX });
}

#[test]
fn a_budget_of_operations_is_whole_steps() {
    let mut file = parsed(LLAMA);
    file.budget = BudgetSection { flops: Some(1e9), ..BudgetSection::default() };
    let recipe = file.resolve(&FACTS).unwrap();
    assert_eq!((recipe.total_steps(3e8), recipe.total_steps(1e12)), (3, 1));
}

proptest! {
    #[test]
    fn any_override_is_refused_or_resolves(
        section in any::<prop::sample::Index>(),
        key in any::<prop::sample::Index>(),
        value in prop_oneof![
            "\\PC{1,12}", any::<i64>().prop_map(|v| v.to_string()), any::<f64>().prop_map(|v| v.to_string()),
            Just("nan".to_owned()), Just("[]".to_owned()), Just("{a=1}".to_owned()), Just("true".to_owned()),
            (0u32..100).prop_map(|v| v.to_string()),
        ],
    ) {
        let known = RecipeFile::known_keys();
        let (section, keys) = section.get(&known);
        let text = format!("{section}.{}={value}", key.get(keys));
        if let Ok(recipe) = resolved(&[&text]) {
            prop_assert_eq!(parsed(&recipe.to_toml()).resolve(&FACTS).unwrap(), recipe);
        }
    }

    #[test]
    fn any_text_is_refused_or_read(
        text in "\\PC{0,200}",
        lines in prop::collection::vec("[a-z\\[\\]=:\\-\\{\\}\"0-9 .]{0,20}", 0..8),
    ) {
        for text in [text, format!("schema = \"train/2\"\n{}", lines.join("\n"))] {
            for format in [Format::Toml, Format::Yaml, Format::Json] {
                let _ = RecipeFile::parse(&text, format);
            }
        }
    }
}

/// A small model of a family that keys cannot describe, with what TOML cannot say: nulls.
const MISTRAL: &str = r#"{
    "model_type": "mistral", "vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 256, "sliding_window": null, "bos_token_id": 1,
    "eos_token_id": [2, 3], "pad_token_id": null, "tie_word_embeddings": false,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.1, "made_up": 7
}"#;

/// The recipe above without its model.
fn without_model(model: &str) -> RecipeFile {
    let (before, rest) = LLAMA.split_once("[model]").unwrap();
    let (_, after) = rest.split_once("[data]").unwrap();
    parsed(&format!("{before}[model]\n{model}\n[data]{after}"))
}

#[test]
fn a_config_file_describes_any_family() {
    let file = without_model("config = \"mistral/config.json\"");
    assert_eq!(file.unread_config(), Some("mistral/config.json"));
    let unread = file.resolve(&FACTS).unwrap_err().to_string();
    assert!(unread.contains("mistral/config.json"), "{unread}");
    let (file, ignored) = file.with_model_config(MISTRAL).unwrap();
    assert_eq!(
        (file.unread_config(), ignored),
        (None, vec!["made_up".to_owned(), "router_aux_loss_coef".to_owned()])
    );
    let recipe = file.resolve(&FACTS).unwrap();
    assert_eq!(recipe.model.tokens.eos, [2, 3]);
    assert_eq!(recipe.model.attention.sliding_window, None);
    let text = recipe.to_toml();
    assert_eq!(parsed(&text).resolve(&FACTS).unwrap(), recipe, "{text}");
    let error = file.with_overrides(&["model.hidden_size=32"]).unwrap().resolve(&FACTS);
    let message = "'model.hidden_size' is set, and a config.json describes the model";
    assert_eq!(error.unwrap_err().to_string(), message);
    let initial = without_model("initial = \"mistral\"");
    assert_eq!(initial.unread_config(), Some("mistral"));
    // Then it is the recipe's own model, and the weights only are the folder's.
    let described = resolved(&["model.initial=llama"]).unwrap();
    assert_eq!(described.initial.as_deref(), Some("llama"));
    assert_eq!(parsed(&described.to_toml()).resolve(&FACTS).unwrap(), described);
}

#[test]
fn what_a_config_asks_of_training_alone_is_refused_by_name() {
    let file = without_model("config = \"c\"");
    for (field, value) in [("output_router_logits", "true"), ("router_jitter_noise", "0.01")] {
        let text = MISTRAL.replace("\"made_up\": 7", &format!("\"{field}\": {value}"));
        let error = file.with_model_config(&text).unwrap_err();
        let RecipeError::TrainingField { field: named, .. } = &error else { panic!("{error}") };
        assert!(*named == field || *named == "router_aux_loss_coef", "{error}");
        assert_eq!(error.hints().len(), 1);
    }
}

#[test]
fn a_load_balancing_loss_is_part_of_the_model() {
    let mixtral = r#"{"model_type": "mixtral", "vocab_size": 600, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 256, "num_local_experts": 4,
        "output_router_logits": true}"#;
    let factor = |text: &str| {
        let (file, ignored) = without_model("config = \"c\"").with_model_config(text).unwrap();
        assert_eq!(ignored, Vec::<String>::new());
        let recipe = file.resolve(&FACTS).unwrap();
        assert_eq!(parsed(&recipe.to_toml()).resolve(&FACTS).unwrap(), recipe);
        let written = ModelSpec::from_hf_config(&recipe.model.to_hf_config().unwrap()).unwrap();
        assert_eq!(written.mlp, recipe.model.mlp);
        let Mlp::Moe(moe) = &recipe.model.mlp else { panic!("no experts") };
        moe.router.aux_loss_coef
    };
    assert_eq!(factor(mixtral), Some(0.001));
    let with = |coefficient: &str| {
        mixtral.replace("true}", &format!("true, \"router_aux_loss_coef\": {coefficient}}}"))
    };
    assert_eq!(factor(&with("0.02")), Some(0.02));
    assert_eq!(factor(&with("0")), None);
    assert_eq!(factor(&with("0.02").replace("\"output_router_logits\": true, ", "")), None);
    let error = without_model("config = \"c\"").with_model_config(&with("-1")).unwrap_err();
    let RecipeError::Model(error) = error else { panic!("{error}") };
    assert!(error.to_string().contains("router_aux_loss_coef"), "{error}");
}

#[test]
fn encoders_learn_what_was_masked() {
    let bert = r#"{"model_type": "bert", "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}"#;
    let file = without_model("config = \"c\"").with_model_config(bert).unwrap().0;
    let with = |overrides: &[&str]| file.with_overrides(overrides).unwrap().resolve(&FACTS);
    let recipe = with(&["objective.mlm_probability=0.3"]).unwrap();
    let Objective::MaskedLm(masked) = &recipe.objective else { panic!() };
    assert_eq!((masked.mlm_probability, masked.mask_replace_prob), (0.3, 0.8));
    assert_eq!(parsed(&recipe.to_toml()).resolve(&FACTS).unwrap(), recipe);
    for (overrides, words) in [
        (&["objective.kind=causal_lm"][..], "bidirectional cannot learn by causal_lm"),
        (&["objective.mlm_probability=0"], "above 0"),
        (&["objective.mask_replace_prob=0.95"], "at most 1 together"),
    ] {
        let error = with(overrides).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    for overrides in [&["objective.kind=masked_lm"][..], &["objective.mlm_probability=0.1"]] {
        let error = resolved(overrides).unwrap_err().to_string();
        assert!(error.contains("causal"), "{error}");
    }
}

#[test]
fn adapters_go_by_pefts_names() {
    let base = "model.initial=base";
    let recipe = resolved(&[
        base,
        "adapter.r=4",
        "adapter.lora_alpha=12",
        "adapter.target_modules=[\"q_proj\", \"v_proj\"]",
        "adapter.rank_pattern={ v_proj = 2 }",
        "adapter.base_encoding=q8",
    ]);
    let recipe = recipe.unwrap();
    let adapter = recipe.adapter.clone().unwrap();
    assert_eq!((adapter.lora.r, adapter.base_encoding), (4, BaseEncoding::Q8));
    assert_eq!(adapter.lora.rank("model.layers.0.self_attn.v_proj", Some(0)), Some(2));
    assert_eq!(adapter.lora.base_model_name_or_path.as_deref(), Some("base"));
    assert_eq!(parsed(&recipe.to_toml()).resolve(&FACTS).unwrap(), recipe);
    for (overrides, words) in [
        (&["adapter.r=4"][..], "'model.initial' is missing"),
        (&[base, "adapter.bias=all"], "[adapter]"),
        (&[base, "adapter.r=0"], "[adapter]"),
        (&[base, "adapter.base_encoding=int3"], "int3"),
        (&[base, "adapter.use_dora=true"], "use_dora"),
        (&[base, "adapter.r=4", "run.weights=bf16"], "run.weights"),
    ] {
        let error = resolved(overrides).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // What the recipe leaves open is as the adapter to go on from has it.
    let onward = parsed(LLAMA).with_overrides(&[base, "adapter.initial=a", "adapter.lora_alpha=3"]);
    let onward = onward.unwrap();
    assert_eq!(onward.initial_adapter(), Some("a"));
    let config = r#"{"peft_type": "LORA", "r": 5, "lora_alpha": 7, "target_modules": ["k_proj"]}"#;
    let onward = onward.with_adapter_config(config).unwrap().resolve(&FACTS).unwrap();
    let adapter = onward.adapter.clone().unwrap();
    assert_eq!((adapter.lora.r, adapter.lora.lora_alpha), (5, 3.0));
    assert_eq!(adapter.initial.as_deref(), Some("a"));
    assert_eq!(adapter.lora.base_model_name_or_path.as_deref(), Some("base"));
    assert_eq!(parsed(&onward.to_toml()).resolve(&FACTS).unwrap(), onward);
    let unsorted = config.replace("\"r\": 5", "\"r\": 5, \"rank_pattern\": {\"v\": 1, \"k\": 2}");
    let error = parsed(LLAMA).with_adapter_config(&unsorted).unwrap_err();
    let RecipeError::Adapter(cause) = &error else { panic!("{error:?}") };
    assert!(cause.to_string().contains("alphabetical"), "{cause}");
    // Stacked parameters, and keys whose order counts.
    let config = r#"{"peft_type": "LORA", "r": 5, "lora_alpha": 7, "target_modules": ".*k_proj",
        "exclude_modules": ["a"], "target_parameters": ["experts.down_proj"],
        "rank_pattern": {"(k|v)_proj": 2, "a_proj": 3, "v_proj": 1}}"#;
    let onward = parsed(LLAMA).with_overrides(&[base, "adapter.initial=a"]).unwrap();
    let onward = onward.with_adapter_config(config).unwrap().resolve(&FACTS).unwrap();
    let (mut expected, found) =
        (LoraSpec::from_peft_json(config).unwrap(), onward.adapter.clone().unwrap().lora);
    expected.base_model_name_or_path = Some("base".to_owned());
    assert_eq!(found, expected);
    assert_eq!(parsed(&onward.to_toml()).resolve(&FACTS).unwrap(), onward);
    let stacked = "adapter.target_parameters=[\"experts.down_proj\"]";
    let adapter = resolved(&[base, stacked]).unwrap().adapter.clone().unwrap();
    assert_eq!(adapter.lora.target_modules, TargetModules::Named(Vec::new()));
    let empty = RecipeFile::parse(&format!("{LLAMA}[adapter]\n"), Format::Toml).unwrap_err();
    assert_eq!(empty, RecipeError::Missing { key: "adapter.r" });
}
