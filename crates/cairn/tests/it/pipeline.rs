//! From text to a model that answers, in a folder of its own.

use std::path::Path;

use serde_json::Value;

use crate::workplace::Workplace;
use crate::{cairn, golden, shown, succeed};

#[test]
fn text_becomes_a_model_that_answers() {
    let workplace = Workplace::with_text();
    let built = workplace.build();
    assert!(built.contains("vocabulary  300"), "{built}");
    let stats: Value = serde_json::from_str(&succeed(&mut workplace.cairn(&[
        "corpus",
        "stats",
        "data/tiny",
        "--json",
    ])))
    .unwrap();
    assert_eq!(stats["settings"]["inputs"][0], "text");
    succeed(&mut workplace.cairn(&["corpus", "verify", "data/tiny"]));

    let ended: Value = serde_json::from_str(&succeed(&mut workplace.train(&["--json"]))).unwrap();
    assert_eq!(ended["outcome"]["ending"], "finished");
    assert_eq!(ended["state_hash"], workplace.state("tiny").1.as_str());
    for file in ["recipe.toml", "record.json", "metrics.jsonl", "metrics.csv", "report.html"] {
        assert!(workplace.path().join("runs/tiny").join(file).exists(), "{file}");
    }

    // Without `--model` the last run answers.
    let text = succeed(&mut workplace.cairn(&[
        "generate",
        "--prompt",
        "fn larch",
        "--max-new-tokens",
        "8",
    ]));
    assert!(text.starts_with("fn larch"), "{text}");
    let figures: Value =
        serde_json::from_str(&succeed(&mut workplace.cairn(&["eval", "--json"]))).unwrap();
    assert!(figures["model"]["code"]["bits_per_byte"].as_f64().unwrap() > 0.0);
    assert_eq!(figures["compressors"].as_array().unwrap().len(), 3);
    assert!(workplace.path().join("runs/tiny/eval.json").exists());
    let described = succeed(&mut workplace.cairn(&["inspect"]));
    assert!(described.contains("family        llama"), "{described}");
}

#[test]
fn a_stop_string_ends_the_text() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["--quiet"]));
    let greedy = ["generate", "--prompt", "fn ", "--temperature", "0", "--max-new-tokens", "12"];
    let whole = succeed(&mut workplace.cairn(&greedy));
    let new = whole.strip_prefix("fn ").unwrap().trim_end();
    let stop: String = new.chars().skip(new.chars().count() / 2).take(2).collect();
    let cut = succeed(workplace.cairn(&greedy).args(["--stop", &stop]));
    let expected = &new[..new.find(&stop).unwrap()];
    assert_eq!(cut.strip_prefix("fn ").unwrap().strip_suffix('\n').unwrap(), expected);
}

#[test]
fn tokenizers_are_trained_and_used() {
    let workplace = Workplace::with_text();
    let train =
        ["tokenizer", "train", "--input", "text", "--output", "t.json", "--vocab-size", "280"];
    succeed(&mut workplace.cairn(&train));
    let text = "let stones = 3; ⛰";
    let ids =
        succeed(&mut workplace.cairn(&["tokenizer", "encode", "--tokenizer", "t.json", text]));
    let decode = ["tokenizer", "decode", "--tokenizer", "t.json", ids.trim_end()];
    assert_eq!(succeed(&mut workplace.cairn(&decode)), format!("{text}\n"));
    let wrong = workplace.failure(&["tokenizer", "decode", "--tokenizer", "t.json", "1,x"]);
    insta::assert_snapshot!(wrong, @r#"
    exit 1
    --- stdout
    --- stderr
    error: 'x' is not a token id
    hint: give ids like 64,291,12, separated by commas or spaces
    "#);
}

#[test]
fn a_finished_run_says_so() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&[]));
    let output = workplace.train(&[]).output().unwrap();
    assert!(shown(&output, None).contains("Complete all 30 steps were done before"));
}

#[test]
fn another_recipe_does_not_go_on_with_a_run() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&[]));
    let text = workplace.failure(&["train", "tiny.toml", "optimizer.learning_rate=1e-3"]);
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("error: the run was started with another recipe"), "{text}");
    assert!(text.contains("hint: resume with the recipe the run was started with"), "{text}");
}

#[test]
fn initial_weights_are_not_ignored_on_a_run_that_has_begun() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["--quiet"]));
    let model = "runs/tiny/checkpoints/step-00000030";
    let tuned = ["run.name=tuned", "--initial", model, "--quiet"];
    succeed(workplace.train(&tuned).arg("budget.steps=10"));
    // The same command goes on.
    succeed(workplace.train(&tuned).arg("budget.steps=20"));
    assert_eq!(workplace.state("tuned").0, 20);
    let other = "runs/tiny/checkpoints/step-00000020";
    let text = workplace.failure(&["train", "tiny.toml", "run.name=tuned", "--initial", other]);
    assert!(text.starts_with("exit 1\n"), "{text}");
    let error = format!("error: the run has begun, with other weights than those of {other}");
    assert!(text.contains(&error) && text.contains(&format!("with those of {model}")), "{text}");
    let text = workplace.failure(&["train", "tiny.toml", "--initial", model]);
    assert!(text.contains("with fresh ones"), "{text}");
    assert!(text.contains("hint: leave the initial weights out to go on"), "{text}");
}

#[test]
fn what_training_validates_and_what_eval_measures_are_one_figure() {
    let workplace = Workplace::with_corpus();
    let everything = "eval.max_tokens=1M";
    // More positions than a row has: the model is measured at the length it was trained on.
    let longer = "model.max_position_embeddings=64";
    let average = "optimizer.ema_decay=0.9";
    succeed(&mut workplace.train(&["--quiet", everything, longer, average]));
    let metrics = workplace.metrics("tiny");
    let last = metrics.iter().rfind(|line| line["kind"] == "validation").unwrap();
    for (model, loss, bits) in [
        ("runs/tiny/checkpoints/step-00000030", "loss", "bits_per_byte"),
        ("runs/tiny/ema", "average_loss", "average_bits_per_byte"),
    ] {
        let command = ["eval", "--model", model, "--json"];
        let found: Value = serde_json::from_str(&succeed(&mut workplace.cairn(&command))).unwrap();
        let figure = |value: &Value| value.as_f64().unwrap();
        let (trained, measured) = (figure(&last[loss]), figure(&found["model"]["loss"]));
        assert!((trained - measured).abs() < 1e-9, "{model}: {trained}, {measured}");
        // The code that is measured is whole bytes.
        let byte = 8.0 / figure(&found["text_bytes"]);
        let difference = figure(&found["model"]["code"]["bits_per_byte"]) - figure(&last[bits]);
        assert!((0.0..=byte).contains(&difference), "{model}: {difference}");
    }
}

#[test]
fn tokens_of_another_tokenizer_are_not_measured() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["--quiet"]));
    for (name, vocab_size) in [("small", "280"), ("large", "320")] {
        let output = format!("data/{name}");
        let build = ["corpus", "build", "--input", "text", "--output", &output, "--quiet"];
        let split = ["--vocab-size", vocab_size, "--validation-fraction", "0.3"];
        succeed(workplace.cairn(&build).args(split));
    }
    let small = workplace.failure(&["eval", "--corpus", "data/small"]);
    assert!(small.starts_with("exit 1\n"), "{small}");
    assert!(small.contains("error: data/small was made with tokenizer "), "{small}");
    assert!(small.contains("hint: build one with the model's"), "{small}");
    let large = workplace.failure(&["eval", "--corpus", "data/large"]);
    assert!(large.contains("error: data/large has 30"), "{large}");
    // Somebody else's folder: no manifest says what belongs in it.
    let model = "runs/tiny/checkpoints/step-00000030";
    for name in ["tokenizer.json", "cairn.json"] {
        std::fs::remove_file(workplace.path().join(model).join(name)).unwrap();
    }
    let text = workplace.failure(&["eval", "--model", model, "--corpus", "data/small"]);
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("has no tokenizer.json, so nothing says"), "{text}");
}

#[test]
fn fields_of_a_description_that_nobody_knows_are_named() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["--quiet"]));
    let config = workplace.path().join("runs/tiny/checkpoints/step-00000030/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let with = text.replacen('{', "{\"hiden_size\": 7, \"id2label\": {}, \"a_gate\": true,", 1);
    std::fs::write(&config, with).unwrap();
    let text = workplace.failure(&["inspect", "runs/tiny/checkpoints/step-00000030"]);
    assert!(text.starts_with("exit 0\n"), "{text}");
    let warning = "config.json has fields that nothing here knows: a_gate, hiden_size\n";
    assert!(text.contains(warning), "{text}");
}

/// Hashes in a text: what a file has and what it should have.
fn hashes(text: &str) -> usize {
    let words = text.split(|c: char| !c.is_ascii_hexdigit());
    words.filter(|word| word.len() == 64).count()
}

#[test]
fn damaged_files_are_named() {
    let workplace = Workplace::with_corpus();
    let shard = workplace.path().join("data/tiny/train-00000.tokens");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    let text = workplace.failure(&["corpus", "verify", "data/tiny"]);
    assert!(
        text.starts_with("exit 1\n") && text.contains("train-00000.tokens was altered"),
        "{text}"
    );
    assert_eq!(hashes(&text), 2, "{text}");
    let text = workplace.failure(&["train", "tiny.toml"]);
    assert!(text.contains("train-00000.tokens was altered"), "{text}");
    std::fs::write(&shard, &bytes[..last]).unwrap();
    let text = workplace.failure(&["train", "tiny.toml"]);
    assert!(text.starts_with("exit 1\n") && text.contains("train-00000.tokens"), "{text}");
    std::fs::write(workplace.path().join("data/tiny/tokenizer.json"), "{}").unwrap();
    let text = workplace.failure(&["corpus", "stats", "data/tiny"]);
    assert!(text.starts_with("exit 1\n") && text.contains("tokenizer.json"), "{text}");
    assert_eq!(hashes(&text), 2, "{text}");
}

#[test]
fn a_checkpoint_of_another_schema_is_refused_and_nothing_is_lost() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&[]));
    let run = workplace.path().join("runs/tiny");
    for entry in std::fs::read_dir(run.join("checkpoints")).unwrap() {
        let manifest = entry.unwrap().path().join("cairn.json");
        let text = std::fs::read_to_string(&manifest).unwrap();
        assert!(text.contains("checkpoint/1"), "{text}");
        std::fs::write(&manifest, text.replace("checkpoint/1", "checkpoint/9")).unwrap();
    }
    let history = std::fs::read(run.join("metrics.jsonl")).unwrap();
    let text = workplace.failure(&["train", "tiny.toml", "budget.steps=40"]);
    assert!(text.starts_with("exit 1\n") && text.contains("checkpoint/9"), "{text}");
    assert_eq!(std::fs::read(run.join("metrics.jsonl")).unwrap(), history);
    let text = workplace.failure(&["generate", "--prompt", "fn"]);
    assert!(text.starts_with("exit 1\n") && text.contains("checkpoint/9"), "{text}");
}

#[test]
fn a_model_that_was_altered_since_it_was_saved_is_not_used() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&[]));
    let checkpoint = "runs/tiny/checkpoints/step-00000030";
    let use_it = ["generate", "--model", checkpoint, "--prompt", "fn", "--max-new-tokens", "2"];
    // Nothing but the model is needed to use it.
    std::fs::remove_file(workplace.path().join(checkpoint).join("optimizer.safetensors")).unwrap();
    succeed(&mut workplace.cairn(&use_it));
    for file in ["model.safetensors", "tokenizer.json"] {
        let path = workplace.path().join(checkpoint).join(file);
        let bytes = std::fs::read(&path).unwrap();
        let mut altered = bytes.clone();
        *altered.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &altered).unwrap();
        let text = workplace.failure(&use_it);
        let expected = format!("{file} was altered");
        assert!(text.starts_with("exit 1\n") && text.contains(&expected), "{text}");
        assert_eq!(hashes(&text), 2, "{text}");
        std::fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn files_that_are_no_text_are_left_out_and_counted() {
    let workplace = Workplace::with_text();
    std::fs::write(workplace.path().join("text/larch/binary.rs"), [0, 159, 146, 150]).unwrap();
    std::fs::write(workplace.path().join("text/larch/latin1.rs"), [b'a', 0xe9]).unwrap();
    workplace.write("text/larch/empty.rs", "");
    workplace.build();
    let stats = succeed(&mut workplace.cairn(&["corpus", "stats", "data/tiny"]));
    for line in ["empty", "binary", "not UTF-8"] {
        assert!(stats.lines().any(|row| row.starts_with(line) && row.ends_with(" 1")), "{stats}");
    }
    let nothing =
        workplace.failure(&["corpus", "build", "--input", "missing", "--output", "data/x"]);
    insta::assert_snapshot!(nothing, @r#"
    exit 1
    --- stdout
    --- stderr
    error: the inputs have no document to take (1 missing)
    hint: check --input, the file kinds, the limits and the license filter
    "#);
}

#[test]
fn a_change_takes_no_other_key_of_the_recipe_away() {
    let workplace = Workplace::with_corpus();
    let plan = |change: &str| workplace.failure(&["plan", "tiny.toml", "--no-pace", change]);
    insta::assert_snapshot!(plan("budget.tokens=1k"), @r#"
    exit 1
    --- stdout
    --- stderr
    error: tiny.toml
      because: set exactly one of budget.steps, budget.tokens, budget.flops; budget.steps and budget.tokens are set
    hint: a change leaves the recipe's other keys as they are; take out what is not meant: budget.steps=null or budget.tokens=null
    "#);
    let replaced = ["plan", "tiny.toml", "--no-pace", "budget.steps=null", "budget.tokens=1k"];
    assert!(succeed(&mut workplace.cairn(&replaced)).contains("8 of 128 tokens"));
}

#[test]
fn mistakes_in_a_recipe_are_named() {
    let workplace = Workplace::with_corpus();
    let plan = |change: &str| workplace.failure(&["plan", "tiny.toml", "--no-pace", change]);
    insta::assert_snapshot!(plan("optimizer.learnin_rate=1"), @r#"
    exit 1
    --- stdout
    --- stderr
    error: unknown key 'learnin_rate' in section [optimizer]
    hint: did you mean 'optimizer.learning_rate'?
    "#);
    insta::assert_snapshot!(plan("data.seq_len=0"), @r#"
    exit 1
    --- stdout
    --- stderr
    error: tiny.toml
      because: 'data.seq_len' must be between 1 and 16777216, not 0
    "#);
    insta::assert_snapshot!(plan("model.num_attention_heads=5"), @r#"
    exit 1
    --- stdout
    --- stderr
    error: tiny.toml
      because: the [model] section does not describe a model
      because: hidden_size 32 is not a multiple of 5 attention heads
    hint: choose a hidden_size such as 35, or set head_dim where the family allows it
    "#);
    insta::assert_snapshot!(plan("model.vocab_size=100"), @r#"
    exit 1
    --- stdout
    --- stderr
    error: tiny.toml
      because: model.vocab_size 100 is smaller than the tokenizer's 300
    hint: set model.vocab_size to at least 300, or leave it out to take the tokenizer's
    "#);
    insta::assert_snapshot!(plan("batch.micro_batch_size=\"many\""), @r#"
    exit 1
    --- stdout
    --- stderr
    error: 'batch.micro_batch_size' is wrong: invalid type: string "many", expected a whole number, 0 or more
    "#);
    insta::assert_snapshot!(plan("nonsense"), @r#"
    exit 1
    --- stdout
    --- stderr
    error: 'nonsense' is not an override: there is no '='
    hint: write section.key=value, for example optimizer.learning_rate=3e-4
    "#);
    insta::assert_snapshot!(workplace.failure(&["plan", "missing.toml"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: cannot read missing.toml
      because: No such file or directory (os error 2)
    hint: check the path
    "#);
    let elsewhere = ["train", "tiny.toml", "data.corpus=elsewhere", "model.vocab_size=300"];
    insta::assert_snapshot!(workplace.failure(&elsewhere), @r#"
    exit 1
    --- stdout
    --- stderr
    error: there is no corpus in elsewhere
    hint: build one: cairn corpus build --input FOLDER --output elsewhere
    hint: or name another: data.corpus=FOLDER
    "#);
}

#[test]
fn a_plan_over_the_memory_is_refused_with_one_that_fits() {
    let workplace = Workplace::with_corpus();
    let arguments = ["plan", "tiny.toml", "--no-pace", "--json", "batch.micro_batch_size=64"];
    let plan: Value = serde_json::from_str(&succeed(&mut workplace.cairn(&arguments))).unwrap();
    let bytes = &plan["plan"]["bytes"];
    let arena = bytes["session"]["arena"].as_u64().unwrap();
    let fixed =
        ["weights", "gradients", "states"].map(|part| bytes["session"][part].as_u64().unwrap());
    let fixed = fixed.iter().sum::<u64>()
        + ["scratch", "host", "baseline"]
            .iter()
            .map(|part| bytes[part].as_u64().unwrap())
            .sum::<u64>();
    let limit = format!("run.memory_limit={}", fixed + arena / 3);
    let text = workplace.failure(&["train", "tiny.toml", "batch.micro_batch_size=64", &limit]);
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("error: the plan needs "), "{text}");
    assert!(workplace.checkpoints("tiny").is_empty());
    // The changes that the hint names are one that fits.
    let hint = text.split_once("hint: this fits in ").unwrap().1.lines().next().unwrap();
    let changes: Vec<&str> = hint.split_whitespace().filter(|word| word.contains('=')).collect();
    assert!(!changes.is_empty(), "{text}");
    succeed(workplace.train(&["--quiet", &limit]).args(changes));
    assert_eq!(workplace.state("tiny").0, 30);
}

#[test]
fn committed_recipes_resolve_and_plan() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut planned = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let mut command = cairn(["plan", "--no-pace", "--json"]);
        // Where a recipe leaves the vocabulary to its corpus, one is needed to plan it here.
        let text = std::fs::read_to_string(&path).unwrap();
        let vocab = (!text.contains("vocab_size")).then_some("model.vocab_size=4096");
        // Those without a model take it from a folder.
        let initial = format!("model.initial={}", golden("llama").display());
        let model = match text.contains("[model]") {
            true => vocab,
            false => Some(initial.as_str()),
        };
        let plan = succeed(command.arg(&path).args(model));
        let plan: Value = serde_json::from_str(&plan).unwrap();
        assert!(plan["plan"]["parameters"].as_u64().unwrap() > 0, "{path:?}");
        planned += 1;
    }
    assert!(planned >= 5);
}

#[test]
fn quickstart_does_it_all_and_then_says_that_it_is_done() {
    let workplace = Workplace::with_text();
    let first = workplace.cairn(&["quickstart", "--input", "text", "--minutes", "0.3"]).output();
    let text = shown(&first.unwrap(), None);
    assert!(text.starts_with("exit 0\n"), "{text}");
    for part in ["all, at the peak", "this model", "Learned", "Next:", "cairn generate"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (step, hash) = workplace.state("quickstart");
    assert!(workplace.path().join("runs/quickstart/eval.json").exists());
    let again = shown(&workplace.cairn(&["quickstart"]).output().unwrap(), None);
    assert!(again.contains(&format!("Complete all {step} steps were done before")), "{again}");
    assert_eq!(workplace.state("quickstart"), (step, hash));
    let other = workplace.failure(&["quickstart", "--input", "tiny.toml"]);
    insta::assert_snapshot!(other, @r#"
    exit 1
    --- stdout
    --- stderr
    error: runs/quickstart has begun with its own text
    hint: leave --input out to go on with it, or begin another with --name NAME
    "#);
}

#[test]
fn too_few_minutes_are_refused() {
    let workplace = Workplace::with_corpus();
    let text = workplace.failure(&["quickstart", "--input", "text", "--minutes", "0.001"]);
    assert!(text.starts_with("exit 1\n") && text.contains("hint: give at least"), "{text}");
    let text = workplace.failure(&["quickstart", "--minutes", "0"]);
    assert!(text.contains("error: --minutes is 0"), "{text}");
}

#[test]
fn tuning_changes_no_bit_and_a_damaged_one_is_left_out() {
    let workplace = Workplace::with_corpus();
    let cache = workplace.path().join("cache");
    succeed(&mut workplace.train(&["run.name=plain"]));
    let tune = ["bench", "tune", "tiny.toml"];
    let chosen = succeed(workplace.cairn(&tune).env("CAIRN_CACHE_DIR", &cache));
    assert!(chosen.contains("matmul"), "{chosen}");
    succeed(workplace.train(&["run.name=tuned"]).env("CAIRN_CACHE_DIR", &cache));
    assert_eq!(workplace.state("plain"), workplace.state("tuned"));
    let doctor = succeed(workplace.cairn(&["doctor"]).env("CAIRN_CACHE_DIR", &cache));
    assert!(doctor.contains("GFLOP/s with"), "training kept the peak it measured: {doctor}");
    assert!(doctor.contains("\n  matmul.f32."), "choices are explained: {doctor}");
    std::fs::write(cache.join("machine.json"), "{}").unwrap();
    let output = workplace.cairn(&["doctor"]).env("CAIRN_CACHE_DIR", &cache).output().unwrap();
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("warning: what was measured before is not used"), "{text}");
    // Training measures again and replaces the damaged file.
    succeed(workplace.train(&["run.name=again"]).env("CAIRN_CACHE_DIR", &cache));
    assert_eq!(workplace.state("plain"), workplace.state("again"));
    let output = workplace.cairn(&["doctor"]).env("CAIRN_CACHE_DIR", &cache).output().unwrap();
    assert!(!shown(&output, None).contains("warning"), "{}", shown(&output, None));
}

#[test]
fn a_cache_folder_that_cannot_be_written_is_a_warning() {
    let workplace = Workplace::with_corpus();
    // A file where the folder should be: nobody can write below it, not even a superuser.
    let cache = workplace.path().join("file");
    std::fs::write(&cache, "").unwrap();
    let mut command = workplace.train(&["run.name=unkept"]);
    let output = command.env("CAIRN_CACHE_DIR", &cache).output().unwrap();
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("warning: what was measured cannot be kept"), "{text}");
}

#[test]
fn what_a_new_user_mistypes_is_said_before_any_work() {
    let workplace = Workplace::with_corpus();
    workplace.write("recipe", "schema = \"train/2\"");
    insta::assert_snapshot!(workplace.failure(&["train", "recipe"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: recipe
      because: a name without an ending is not a recipe format
    hint: use .toml, .yaml, .yml or .json
    "#);
    insta::assert_snapshot!(workplace.failure(&["plan", "tiny.toml", "data.corpus=nowhere"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: tiny.toml
      because: there is no corpus in nowhere
    hint: build one: cairn corpus build --input FOLDER --output nowhere
    hint: or name another: data.corpus=FOLDER
    hint: or say what it will have: model.vocab_size=N
    "#);
    // Nothing was read and no tokenizer trained for this answer.
    insta::assert_snapshot!(workplace.failure(&["corpus", "build", "--input", "text", "--output", "data/tiny"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: data/tiny exists
    hint: name another folder, or let a corpus there be replaced (--replace); a folder that holds something else is never replaced
    "#);
    succeed(&mut workplace.train(&["--quiet"]));
    insta::assert_snapshot!(workplace.failure(&["eval", "--quiet", "--context", "0"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: --context is 0
    hint: choose 1 to 32, the positions of the model
    "#);
    let text = workplace.failure(&["eval", "--max-bytes", "0"]);
    assert!(text.contains("error: --max-bytes is 0, so there is nothing to measure on"), "{text}");
    let text = workplace.failure(&["bench", "train", "tiny.toml", "--steps", "0"]);
    assert!(text.contains("error: --steps is 0"), "{text}");
}
