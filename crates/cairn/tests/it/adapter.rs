//! Adapters merged into a model's weights, and taken out again.

use cairn_artifacts::safetensors::SafetensorsFile;

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
    assert!(text.contains("Left out onnx/, pytorch_model.bin: the model before"), "{text}");
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
