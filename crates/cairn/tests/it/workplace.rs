//! A folder with text, a corpus and a recipe, in which the command is run.

use std::path::{Path, PathBuf};
use std::process::Command;

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
pub(crate) struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    /// Text of four groups and a recipe.
    pub(crate) fn with_text() -> Self {
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
    pub(crate) fn with_corpus() -> Self {
        let workplace = Self::with_text();
        workplace.build();
        workplace
    }

    pub(crate) fn build(&self) -> String {
        let build = ["corpus", "build", "--input", "text", "--output", "data/tiny"];
        succeed(self.cairn(&build).args(["--vocab-size", "300", "--validation-fraction", "0.3"]))
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(crate) fn cairn(&self, arguments: &[&str]) -> Command {
        let mut command = cairn(arguments);
        command.current_dir(self.path());
        command
    }

    pub(crate) fn train(&self, arguments: &[&str]) -> Command {
        let mut command = self.cairn(&["train", "tiny.toml"]);
        command.args(arguments);
        command
    }

    pub(crate) fn failure(&self, arguments: &[&str]) -> String {
        shown(&self.cairn(arguments).output().unwrap(), Some(self.path()))
    }

    /// Hash of the training state of the newest checkpoint, and its step.
    pub(crate) fn state(&self, run: &str) -> (u64, String) {
        let newest = self.checkpoints(run).pop().unwrap();
        let text = std::fs::read_to_string(newest.join("cairn.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        let hash = manifest["state"]["state_hash"].as_str().unwrap().to_owned();
        (manifest["step"].as_u64().unwrap(), hash)
    }

    pub(crate) fn checkpoints(&self, run: &str) -> Vec<PathBuf> {
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

    /// The checkpoints' folder of a run.
    pub(crate) fn checkpoints_folder(&self, run: &str) -> PathBuf {
        self.path().join("runs").join(run).join("checkpoints")
    }

    /// The whole lines of a run's metrics; none if there is no file.
    pub(crate) fn metrics(&self, run: &str) -> Vec<Value> {
        let path = self.path().join("runs").join(run).join("metrics.jsonl");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}
