//! From text to a model that answers, in a folder of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::{cairn, shown, succeed};

/// A recipe that trains in a second.
const RECIPE: &str = r#"
schema = "train/2"
[run]
name = "tiny"
threads = 1
[model]
family = "llama"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
[data]
corpus = "data/tiny"
seq_len = 32
[optimizer]
learning_rate = 5e-3
[batch]
micro_batch_size = 4
[budget]
steps = 30
[eval]
every = 10
max_tokens = "2k"
[checkpoint]
every = 10
"#;

/// A folder with text, a corpus and a recipe.
struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    /// Text of four groups and a recipe.
    fn with_text() -> Self {
        let workplace = Self { folder: tempfile::tempdir().unwrap() };
        for (group, tree) in ["larch", "birch", "maple", "rowan"].iter().enumerate() {
            for number in 0..6 {
                let text: String = (0..40)
                    .map(|line| {
                        let count = (line * 7 + number * 3 + group) % 11;
                        format!("fn {tree}_{count}() {{ let stones = {count}; stack(stones); }}\n")
                    })
                    .collect();
                workplace.write(&format!("text/{tree}/{number}.rs"), &text);
            }
        }
        workplace.write("tiny.toml", RECIPE);
        workplace
    }

    /// The same with a corpus.
    fn with_corpus() -> Self {
        let workplace = Self::with_text();
        workplace.build();
        workplace
    }

    fn build(&self) -> String {
        let build = ["corpus", "build", "--input", "text", "--output", "data/tiny"];
        succeed(self.cairn(&build).args(["--vocab-size", "300", "--validation-fraction", "0.3"]))
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn cairn(&self, arguments: &[&str]) -> Command {
        let mut command = cairn(arguments);
        command.current_dir(self.path());
        command
    }

    fn train(&self, arguments: &[&str]) -> Command {
        let mut command = self.cairn(&["train", "tiny.toml"]);
        command.args(arguments);
        command
    }

    fn failure(&self, arguments: &[&str]) -> String {
        shown(&self.cairn(arguments).output().unwrap(), Some(self.path()))
    }

    /// Hash of the training state of the newest checkpoint, and its step.
    fn state(&self, run: &str) -> (u64, String) {
        let newest = self.checkpoints(run).pop().unwrap();
        let text = std::fs::read_to_string(newest.join("cairn.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        let hash = manifest["state"]["state_hash"].as_str().unwrap().to_owned();
        (manifest["step"].as_u64().unwrap(), hash)
    }

    fn checkpoints(&self, run: &str) -> Vec<PathBuf> {
        let folder = self.path().join("runs").join(run).join("checkpoints");
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let mut found: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                path.join("cairn.json").exists() && !path.to_string_lossy().contains(".tmp-")
            })
            .collect();
        found.sort();
        found
    }
}

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
fn the_state_depends_on_neither_threads_nor_micro_steps_of_time() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["run.name=one"]));
    succeed(&mut workplace.train(&["run.name=two", "--threads", "2"]));
    assert_eq!(workplace.state("one"), workplace.state("two"));
}

/// Starts a long run and waits until it has a checkpoint.
fn start(workplace: &Workplace, arguments: &[&str]) -> Child {
    let mut command = workplace.train(arguments);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while workplace.checkpoints("tiny").is_empty() {
        std::thread::yield_now();
    }
    child
}

/// Long enough that a signal comes before the end.
const LONG: [&str; 3] = ["budget.steps=400", "checkpoint.every=100", "eval.every=0"];

#[test]
fn interrupted_and_killed_runs_go_on_to_the_same_state() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&LONG));
    let expected = workplace.state("tiny");

    let interrupted = Workplace::with_corpus();
    let child = start(&interrupted, &LONG);
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    let text = shown(&output, None);
    assert!(text.starts_with("exit 0\n") && text.contains("Stopped after step"), "{text}");
    let (step, _) = interrupted.state("tiny");
    assert!((100..400).contains(&step), "stopped at {step}");
    let resumed = interrupted.train(&LONG).output().unwrap();
    assert!(shown(&resumed, None).contains(&format!("Resuming at step {step} of 400")));
    assert_eq!(interrupted.state("tiny"), expected);

    let killed = Workplace::with_corpus();
    let mut child = start(&killed, &LONG);
    child.kill().unwrap();
    child.wait().unwrap();
    succeed(killed.train(&LONG).arg("--resume"));
    assert_eq!(killed.state("tiny"), expected);
}

fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    let status = Command::new("kill").args(["-s", name, &id]).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["budget.steps=10", "--quiet"]));
    let before = workplace.state("tiny");
    // A limit on the size of files, with its signal ignored, is a disk that fills.
    let script = "ulimit -f 64; trap '' XFSZ; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args([
        "-c",
        script,
        "sh",
        env!("CARGO_BIN_EXE_cairn"),
        "train",
        "tiny.toml",
        "budget.steps=20",
    ]);
    let output = command.env_clear().current_dir(workplace.path()).output().unwrap();
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("error: the checkpoint of step 20 could not be saved"), "{text}");
    assert!(text.contains("because: File too large"), "{text}");
    assert_eq!(workplace.state("tiny"), before);
    succeed(&mut workplace.train(&["budget.steps=20"]));
    assert_eq!(workplace.state("tiny").0, 20);
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
    let text = workplace.failure(&["train", "tiny.toml"]);
    assert!(text.contains("train-00000.tokens was altered"), "{text}");
    std::fs::write(&shard, &bytes[..last]).unwrap();
    let text = workplace.failure(&["train", "tiny.toml"]);
    assert!(text.starts_with("exit 1\n") && text.contains("train-00000.tokens"), "{text}");
    std::fs::write(workplace.path().join("data/tiny/tokenizer.json"), "{}").unwrap();
    let text = workplace.failure(&["corpus", "stats", "data/tiny"]);
    assert!(text.starts_with("exit 1\n") && text.contains("tokenizer.json"), "{text}");
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
    error: 'batch.micro_batch_size' is wrong: invalid type: string "many", expected u64
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
    insta::assert_snapshot!(workplace.failure(&["train", "tiny.toml", "data.corpus=elsewhere", "model.vocab_size=300"]), @r#"
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
    assert!(text.contains("hint: this fits in "), "{text}");
    assert!(workplace.checkpoints("tiny").is_empty());
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
        let plan = succeed(command.arg(&path).args(vocab));
        let plan: Value = serde_json::from_str(&plan).unwrap();
        assert!(plan["plan"]["parameters"].as_u64().unwrap() > 0, "{path:?}");
        planned += 1;
    }
    assert!(planned >= 3);
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
    let other = workplace.failure(&["quickstart", "--input", "text"]);
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
