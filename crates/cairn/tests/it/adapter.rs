//! Adapters merged into a model's weights, and taken out again.

use cairn_artifacts::safetensors::{self, OutTensor, SafetensorsFile};
use cairn_kernels::encoding::encode;
use cairn_kernels::{Encoding, Layout};
use cairn_spec::DType;
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
    let template = "additional_chat_templates/rag.jinja";
    std::fs::create_dir(base.join("additional_chat_templates")).unwrap();
    std::fs::write(base.join(template), template).unwrap();
    let mut command = cairn(["adapter", "merge", "--model"]);
    command.arg(&base).arg("--adapter").arg(golden("lora_llama")).arg("--output").arg(&merged);
    let text = shown(&command.output().unwrap(), Some(folder.path()));
    assert!(
        text.contains("Left out onnx/, pytorch_model.bin: folders, or the weights before"),
        "{text}"
    );
    for name in ["README.md", "chat_template.jinja", "added_tokens.json", template] {
        assert_eq!(std::fs::read_to_string(merged.join(name)).unwrap(), name);
    }
    assert_eq!(std::fs::read_dir(&merged).unwrap().count(), 6);
}

/// A golden folder with its weights rounded to f16.
fn in_halves(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let base = golden(name);
    std::fs::copy(base.join("config.json"), folder.path().join("config.json")).unwrap();
    let source = SafetensorsFile::open(&base.join("model.safetensors")).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors()
        .map(|tensor| {
            let values = tensor.to_f32().unwrap();
            let mut bytes = vec![0; 2 * values.len()];
            let form = (Encoding::F16, Layout::RowMajor);
            encode(form, (1, values.len()), &values, &mut bytes);
            (tensor.name.to_owned(), tensor.shape.to_vec(), bytes)
        })
        .collect();
    let out = tensors
        .iter()
        .map(|(name, shape, bytes)| OutTensor::bytes(name.as_str(), DType::F16, shape, bytes));
    let mut file = std::fs::File::create(folder.path().join("model.safetensors")).unwrap();
    safetensors::write(&mut file, out.collect(), &Default::default()).unwrap();
    folder
}

#[test]
fn merged_halves_are_halves_and_never_infinite_by_rounding() {
    let out = tempfile::tempdir().unwrap();
    let merged = out.path().join("merged");
    let merge = |base: &std::path::Path, adapter: &std::path::Path| {
        let mut command = cairn(["adapter", "merge", "--model"]);
        command.arg(base).arg("--adapter").arg(adapter);
        command.arg("--output").arg(&merged).output().unwrap()
    };
    let halves = in_halves("llama");
    let output = merge(halves.path(), &golden("lora_llama"));
    assert!(output.status.success(), "{}", shown(&output, None));
    let wide = out.path().join("wide");
    let mut command = cairn(["adapter", "merge", "--model"]);
    command.arg(golden("llama")).arg("--adapter").arg(golden("lora_llama"));
    succeed(command.arg("--output").arg(&wide));
    let open = |folder: &std::path::Path| {
        SafetensorsFile::open(&folder.join("model.safetensors")).unwrap()
    };
    let (merged_file, wide) = (open(&merged), open(&wide));
    for tensor in merged_file.tensors() {
        assert_eq!(tensor.dtype, DType::F16, "{}", tensor.name);
        let exact = wide.tensor(tensor.name).unwrap().to_f32().unwrap();
        for (half, exact) in tensor.to_f32().unwrap().iter().zip(&exact) {
            // The base was rounded, and then the sum.
            assert!((half - exact).abs() <= 1e-3 * exact.abs().max(0.1), "{half} {exact}");
        }
    }
    std::fs::remove_dir_all(&merged).unwrap();
    // The same adapter, millions of times as strong.
    let strong = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(golden("lora_llama").join(name), strong.path().join(name)).unwrap();
    }
    let path = strong.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["lora_alpha"] = 1_000_000_000.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let text = shown(&merge(halves.path(), strong.path()), None);
    assert!(text.contains("is beyond what f16 holds"), "{text}");
    assert!(!merged.exists());
}

/// The head of a tied model is the embedding: an adapter of the head is merged into a head of its own.
#[test]
fn a_tied_head_becomes_one_of_its_own_when_it_is_merged() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("adapter")).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}"#;
    std::fs::write(at("adapter/adapter_config.json"), config).unwrap();
    let values = |rows: usize, columns: usize| -> Vec<f32> {
        (0..rows * columns).map(|i| (i % 17) as f32 / 40.0 - 0.2).collect()
    };
    let (a, b) = (values(2, 64), values(320, 2));
    let name = |part: &str| format!("base_model.model.lm_head.lora_{part}.weight");
    let (a_name, b_name) = (name("A"), name("B"));
    let out = vec![OutTensor::f32(&a_name, &[2, 64], &a), OutTensor::f32(&b_name, &[320, 2], &b)];
    let mut file = std::fs::File::create(at("adapter/adapter_model.safetensors")).unwrap();
    safetensors::write(&mut file, out, &Default::default()).unwrap();
    let mut command = cairn(["adapter", "merge", "--model"]);
    command.arg(golden("qwen3")).arg("--adapter").arg(at("adapter"));
    let text = shown(&command.arg("--output").arg(at("merged")).output().unwrap(), None);
    assert!(text.contains("lm_head.weight from model.embed_tokens.weight"), "{text}");
    // What the adapter is in has a head of its own, and a tied model is not that.
    let mut command = cairn(["adapter", "unmerge", "--model"]);
    command.arg(golden("qwen3")).arg("--adapter").arg(at("adapter"));
    let refused = command.arg("--output").arg(at("unmerged")).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("is its embedding"), "{told}");
    let config = std::fs::read(at("merged/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    let open = |folder: &std::path::Path| {
        SafetensorsFile::open(&folder.join("model.safetensors")).unwrap()
    };
    let (base, merged) = (open(&golden("qwen3")), open(&at("merged")));
    assert_eq!(merged.tensors().count(), base.tensors().count() + 1);
    for tensor in base.tensors() {
        assert_eq!(merged.tensor(tensor.name).unwrap().bytes, tensor.bytes, "{}", tensor.name);
    }
    let ids = ["--prompt-ids", "5,6,7", "--max-new-tokens", "8", "--temperature", "0"];
    let written = |model: &std::path::Path, adapter: Option<&std::path::Path>| {
        let mut command = cairn(["generate", "--model"]);
        command.arg(model).args(ids);
        succeed(
            command.args(adapter.iter().flat_map(|path| [std::path::Path::new("--adapter"), path])),
        )
    };
    let beside = written(&golden("qwen3"), Some(&at("adapter")));
    assert_eq!(written(&at("merged"), None), beside);
    assert_ne!(written(&golden("qwen3"), None), beside);
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
    let tensor = OutTensor::bytes("input_ids", DType::I64, &[2, 12], &ids);
    let mut file = std::fs::File::create(workplace.path().join("ids")).unwrap();
    safetensors::write(&mut file, vec![tensor], &Default::default()).unwrap();
    let mut command = workplace.cairn(&["logits", "--input", "ids", "--output", "out"]);
    succeed(command.args(model));
    let file = SafetensorsFile::open(&workplace.path().join("out")).unwrap();
    file.tensor("logits").unwrap().to_f32().unwrap()
}

/// Trains on from an adapter, whose form holds where the recipe does not say.
fn go_on_from(workplace: &Workplace, base: &str, adapter: &str) {
    let first = format!("adapter.initial={adapter}");
    let open = ["adapter.r=null", "adapter.target_modules=null", "budget.steps=1"];
    let onward = ["train", "lora.toml", base, &first, "run.name=onward"];
    succeed(workplace.cairn(&onward).args(open));
    let none = ["train", "lora.toml", base, "adapter.initial=nowhere", "run.name=none"];
    let text = workplace.failure(&none);
    assert!(text.contains("nowhere holds no adapter"), "{text}");
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
    go_on_from(&workplace, &initial, adapter);
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

#[test]
fn weights_of_several_types_are_each_kept_as_they_are_stored() {
    let halves = in_halves("llama");
    let path = halves.path().join("model.safetensors");
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = {
        let file = SafetensorsFile::open(&path).unwrap();
        let tensors = file.tensors().map(|tensor| {
            (tensor.name.to_owned(), tensor.shape.to_vec(), tensor.to_f32().unwrap())
        });
        tensors.collect()
    };
    let held = |flags: &[&str]| {
        let text = succeed(cairn(["inspect", "--json"]).args(flags).arg(halves.path()));
        let object: Value = serde_json::from_str(&text).unwrap();
        let bytes = object["in_memory"]["bytes"].as_u64().unwrap();
        (object["in_memory"]["dtype"].as_str().unwrap().to_owned(), bytes)
    };
    let generated = |flags: &[&str]| {
        let mut command = cairn(["generate", "--json", "--prompt-ids", "5", "--temperature", "0"]);
        succeed(command.args(flags).arg("--model").arg(halves.path()))
    };
    let (encoding, narrow_bytes) = held(&[]);
    assert_eq!(encoding, "f16");
    // One matrix in f32, the others in halves.
    let stored: Vec<(DType, Vec<u8>)> = tensors
        .iter()
        .map(|(name, _, values)| {
            let is_wide = name.contains("layers.1.mlp.up_proj");
            let encoding = if is_wide { Encoding::F32 } else { Encoding::F16 };
            let dtype = if is_wide { DType::F32 } else { DType::F16 };
            let mut bytes = vec![0; dtype.size_bytes() * values.len()];
            encode((encoding, Layout::RowMajor), (1, values.len()), values, &mut bytes);
            (dtype, bytes)
        })
        .collect();
    let out = tensors.iter().zip(&stored).map(|((name, shape, _), (dtype, bytes))| {
        OutTensor::bytes(name.as_str(), *dtype, shape, bytes)
    });
    let mut file = std::fs::File::create(&path).unwrap();
    safetensors::write(&mut file, out.collect(), &Default::default()).unwrap();
    drop(file);
    let (encoding, bytes) = held(&[]);
    assert_eq!(encoding, "f16, 1 matrix f32");
    // 160 rows of 64.
    assert_eq!(bytes, narrow_bytes + 2 * 160 * 64);
    assert_eq!(held(&["--dtype", "bf16"]), ("bf16".to_owned(), narrow_bytes), "asked for");
    let ids = |text: String| serde_json::from_str::<Value>(&text).unwrap()["token_ids"].clone();
    assert_eq!(ids(generated(&[])), ids(generated(&["--dtype", "f32"])));
}

#[test]
fn products_in_bf16_are_asked_for_on_every_command_that_computes() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&[]));
    let model = workplace.checkpoints("tiny").pop().unwrap();
    let model = ["--model", model.to_str().unwrap(), "--dtype", "bf16"];
    let in_bf16 = [&model[..], &["--compute-dtype", "bf16"]].concat();
    let (plain, rounded) = (logits_of(&workplace, &model), logits_of(&workplace, &in_bf16));
    let largest = plain.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let off = plain.iter().zip(&rounded).fold(0.0_f32, |off, (a, b)| off.max((a - b).abs()));
    assert!(0.0 < off && off < 0.033 * largest, "{off} of {largest}");
    let eval = |flags: &[&str]| -> f64 {
        let found = succeed(workplace.cairn(&["eval", "--json"]).args(flags));
        serde_json::from_str::<Value>(&found).unwrap()["model"]["loss"].as_f64().unwrap()
    };
    let off = (eval(&model) - eval(&in_bf16)).abs();
    assert!(0.0 < off && off < 0.05, "{off}");
    let record = workplace.path().join("runs/tiny/eval.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    assert_eq!(record["settings"]["compute"], "bf16", "{record}");
    let text = workplace.failure(&["eval", "--dtype", "f32", "--compute-dtype", "bf16"]);
    assert!(
        text.contains("bf16 products need weights stored as bf16 or bf16z; these are f32"),
        "{text}"
    );
}
