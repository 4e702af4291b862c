//! Adapters merged into a model's weights, and taken out again.

use cairn_artifacts::safetensors::{self, OutTensor, SafetensorsFile};
use serde_json::Value;

use crate::workplace::Workplace;
use crate::{cairn, golden, shown, succeed};

#[test]
fn what_is_merged_comes_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let (merged, back) = (folder.path().join("merged"), folder.path().join("back"));
    let run = |action: &str, model: &std::path::Path, output: &std::path::Path| {
        let mut command = cairn(["adapter", action, "--model"]);
        command.arg(model).arg("--adapter").arg(golden("lora_llama"));
        succeed(command.arg("--output").arg(output))
    };
    run("merge", &golden("llama"), &merged);
    run("unmerge", &merged, &back);
    let open = |folder: &std::path::Path| {
        SafetensorsFile::open(&folder.join("model.safetensors")).unwrap()
    };
    let (base, merged_file, back) = (open(&golden("llama")), open(&merged), open(&back));
    let mut changed = 0;
    for tensor in base.tensors() {
        let before = tensor.to_f32().unwrap();
        let between = merged_file.tensor(tensor.name).unwrap().to_f32().unwrap();
        let after = back.tensor(tensor.name).unwrap().to_f32().unwrap();
        let off = before.iter().zip(&after).fold(0.0_f32, |off, (a, b)| off.max((a - b).abs()));
        assert!(off < 1e-6, "{}: {off}", tensor.name);
        changed += usize::from(before != between);
    }
    // Four projections in each of three blocks.
    assert_eq!(changed, 12);
    let ids = ["--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--temperature", "0"];
    let written =
        |folder: &std::path::Path| succeed(cairn(["generate", "--model"]).arg(folder).args(ids));
    assert_ne!(written(&golden("llama")), written(&merged));
}

#[test]
fn nothing_of_the_model_folder_is_lost_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let (base, merged) = (folder.path().join("base"), folder.path().join("merged"));
    std::fs::create_dir_all(base.join("onnx")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama").join(name), base.join(name)).unwrap();
    }
    for name in ["README.md", "chat_template.jinja", "added_tokens.json", "pytorch_model.bin"] {
        std::fs::write(base.join(name), name).unwrap();
    }
    let mut command = cairn(["adapter", "merge", "--model"]);
    command.arg(&base).arg("--adapter").arg(golden("lora_llama")).arg("--output").arg(&merged);
    let text = shown(&command.output().unwrap(), Some(folder.path()));
    assert!(
        text.contains("Left out onnx/, pytorch_model.bin: folders, or the weights before"),
        "{text}"
    );
    for name in ["README.md", "chat_template.jinja", "added_tokens.json"] {
        assert_eq!(std::fs::read_to_string(merged.join(name)).unwrap(), name);
    }
    assert_eq!(std::fs::read_dir(&merged).unwrap().count(), 5);
}

#[test]
fn a_folder_without_adapter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = cairn(["adapter", "merge", "--model"]);
    command.arg(golden("llama")).arg("--adapter").arg(golden("gpt2"));
    command.arg("--output").arg(folder.path().join("merged"));
    let text = shown(&command.output().unwrap(), Some(&golden("gpt2")));
    assert!(text.contains("holds no adapter") && text.contains("adapter_config.json"), "{text}");
    assert!(!folder.path().join("merged").exists());
}

/// Trains an adapter beside the model that the workplace's recipe trains.
const LORA: &str = r#"
schema = "train/2"
[run]
name = "lora"
threads = 1
[adapter]
r = 4
lora_alpha = 16
lora_dropout = 0.1
target_modules = ["q_proj", "v_proj", "down_proj"]
[data]
corpus = "data/tiny"
seq_len = 32
[optimizer]
learning_rate = 5e-3
[batch]
micro_batch_size = 4
[budget]
steps = 8
[eval]
every = 4
max_tokens = "2k"
"#;

/// Logits of a few ids.
fn logits_of(workplace: &Workplace, model: &[&str]) -> Vec<f32> {
    let ids: Vec<u8> = (3_i64..27).flat_map(i64::to_le_bytes).collect();
    let tensor = OutTensor::bytes("input_ids", cairn_spec::DType::I64, &[2, 12], &ids);
    let mut file = std::fs::File::create(workplace.path().join("ids")).unwrap();
    safetensors::write(&mut file, vec![tensor], &Default::default()).unwrap();
    let mut command = workplace.cairn(&["logits", "--input", "ids", "--output", "out"]);
    succeed(command.args(model));
    let file = SafetensorsFile::open(&workplace.path().join("out")).unwrap();
    file.tensor("logits").unwrap().to_f32().unwrap()
}

#[test]
fn an_adapter_is_planned_trained_used_and_merged() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["budget.steps=12"]));
    let base = workplace.checkpoints("tiny").pop().unwrap();
    let base = base.to_str().unwrap();
    workplace.write("lora.toml", LORA);
    let initial = format!("model.initial={base}");
    let plan = ["plan", "lora.toml", &initial, "--no-pace", "--json"];
    let plan: Value = serde_json::from_str(&succeed(&mut workplace.cairn(&plan))).unwrap();
    let bytes = |class: &str| plan["plan"]["bytes"]["session"][class].as_u64().unwrap();
    // Gradients and moments are the adapter's alone.
    assert_eq!(2 * bytes("gradients"), bytes("states"));
    assert!(10 * bytes("gradients") < bytes("weights"), "{plan}");
    succeed(
        workplace
            .cairn(&["train", "lora.toml", "--initial", base])
            .arg("adapter.base_encoding=f32"),
    );
    let (step, hash) = workplace.state("lora");
    assert_eq!(step, 8);
    // Again, in two goes.
    let again = ["train", "lora.toml", &initial, "run.name=again", "budget.steps=4"];
    succeed(workplace.cairn(&again).arg("schedule.kind=constant"));
    let straight = ["train", "lora.toml", &initial, "run.name=straight", "schedule.kind=constant"];
    succeed(&mut workplace.cairn(&straight));
    let on = ["train", "lora.toml", &initial, "run.name=again", "schedule.kind=constant"];
    succeed(workplace.cairn(&on).arg("--resume"));
    assert_eq!(workplace.state("again"), workplace.state("straight"));
    assert_ne!(workplace.state("again").1, hash);
    let adapter = workplace.checkpoints("lora").pop().unwrap();
    let adapter = adapter.to_str().unwrap();
    succeed(&mut workplace.cairn(&[
        "adapter",
        "merge",
        "--model",
        base,
        "--adapter",
        adapter,
        "--output",
        "merged",
    ]));
    let logits = |model: &[&str]| logits_of(&workplace, model);
    let worst =
        |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0_f32, |w, (a, b)| w.max((a - b).abs()));
    let beside = logits(&["--model", base, "--adapter", adapter]);
    let off = worst(&beside, &logits(&["--model", "merged"]));
    assert!(off <= 1e-5, "merged and beside are {off} apart");
    assert!(worst(&beside, &logits(&["--model", base])) > 1e-3, "the adapter does something");
    // A run that trained an adapter is one with its model.
    assert_eq!(beside, logits(&["--model", "runs/lora"]));
    assert_eq!(beside, logits(&["--adapter", "runs/lora"]));
    let inspected = succeed(&mut workplace.cairn(&["inspect", "runs/lora"]));
    assert!(inspected.contains("llama"), "{inspected}");
    let generated = |model: &[&str]| {
        let flags = ["generate", "--prompt", "fn larch_", "--temperature", "0", "--quiet"];
        succeed(workplace.cairn(&flags).args(model))
    };
    let text = generated(&["--model", base, "--adapter", adapter]);
    assert_eq!(text, generated(&["--model", "merged"]));
    let loss = |model: &[&str]| -> f64 {
        let flags = ["eval", "--corpus", "data/tiny", "--context", "32", "--json"];
        let found = succeed(workplace.cairn(&flags).args(model));
        let found: Value = serde_json::from_str(&found).unwrap();
        found["model"]["loss"].as_f64().unwrap()
    };
    let tuned = loss(&["--model", base, "--adapter", adapter]);
    assert!((tuned - loss(&["--model", "merged"])).abs() < 1e-5);
    assert!(tuned < loss(&["--model", base]), "it learned");
}

#[test]
fn an_adapter_of_an_adapter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("lora_llama");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    let path = folder.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["base_model_name_or_path"] = folder.path().to_str().unwrap().into();
    std::fs::write(&path, config.to_string()).unwrap();
    let mut command = cairn(["generate", "--prompt-ids", "5", "--adapter"]);
    let text = shown(&command.arg(folder.path()).output().unwrap(), Some(folder.path()));
    assert!(text.contains("which is an adapter itself"), "{text}");
    assert!(text.contains("hint: merge that one into its model first"), "{text}");
}

#[test]
fn an_adapter_without_its_model_asks_for_it() {
    let adapter = golden("lora_llama");
    let mut command = cairn(["generate", "--prompt-ids", "5", "--adapter"]);
    let text = shown(&command.arg(&adapter).output().unwrap(), Some(&adapter));
    assert!(text.contains("hint: name its model: --model DIR --adapter"), "{text}");
    let mut command = cairn(["generate", "--prompt-ids", "5", "--max-new-tokens", "2", "--model"]);
    command.arg(golden("llama")).arg("--adapter").arg(&adapter);
    succeed(&mut command);
    let mut command = cairn(["generate", "--prompt-ids", "5", "--model"]);
    command.arg(golden("gpt2")).arg("--adapter").arg(&adapter);
    let text = shown(&command.output().unwrap(), Some(&adapter));
    assert!(text.contains("does not fit this model"), "{text}");
}
