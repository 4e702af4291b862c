//! What `inspect` and `doctor` show.

use serde_json::Value;

use crate::{cairn, golden, shown, succeed};

#[test]
fn a_model_is_described() {
    let text = succeed(cairn(["inspect"]).arg(golden("llama")));
    insta::assert_snapshot!(text, @r#"
    family        llama
    parameters    170 k (170432)
    layers        3
    hidden size   64
    feed-forward  160
    attention     4 heads of 16, 2 key/value heads
    vocabulary    320
    positions     256
    weights       666 KiB in 1 file (f32)
    in memory     666 KiB as f32

    one sequence of 256 tokens, operands read and results written once:
    part                         parameters  forward FLOPs     moved  training FLOPs     moved
    embedding, final norm, head      41.0 k         10.6 M   737 KiB          31.7 M  1.04 MiB
    each of blocks 0 to 2            43.1 k         30.7 M  2.86 MiB          96.2 M  7.58 MiB
    all                               170 k          103 M  9.29 MiB           320 M  23.8 MiB
    "#);
}

#[test]
fn the_tokenizer_beside_a_model_is_described() {
    let folder = golden("gguf").join("chat");
    let text = succeed(cairn(["inspect"]).arg(&folder));
    let json = succeed(cairn(["inspect", "--json"]).arg(&folder));
    let object: Value = serde_json::from_str(&json).unwrap();
    let facts = &object["tokenizer"];
    assert_eq!(facts["model"], "BPE");
    let size = facts["vocab_size"].as_u64().unwrap();
    assert!(size <= object["spec"]["vocab_size"].as_u64().unwrap());
    assert!(text.contains(&format!("{size} tokens")), "{text}");
    assert!(text.contains("chat templates") && text.contains("special tokens"), "{text}");
    // Beside a smaller vocabulary it cannot be used, which is said; the model is still described.
    let other = tempfile::tempdir().unwrap();
    let config = golden("llama").join("config.json");
    std::fs::copy(config, other.path().join("config.json")).unwrap();
    std::fs::copy(folder.join("tokenizer.json"), other.path().join("tokenizer.json")).unwrap();
    let output = cairn(["inspect"]).arg(other.path()).output().unwrap();
    let text = shown(&output, Some(other.path()));
    assert!(text.contains("the tokenizer cannot be used") && text.contains("exit 0"), "{text}");
}

#[test]
fn weights_that_are_not_those_of_the_description_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama").join(name), folder.path().join(name)).unwrap();
    }
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let fewer = text.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2");
    assert_ne!(fewer, text);
    std::fs::write(&path, fewer).unwrap();
    let output = cairn(["inspect"]).arg(folder.path()).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("parameters") && text.contains("model.layers.2."), "{text}");
}

#[test]
fn a_description_is_json_on_demand() {
    let text = succeed(cairn(["inspect", "--json", "--tensors"]).arg(golden("gpt2")));
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(object["spec"]["family"], "gpt2");
    let blocks = object["blocks"].as_array().unwrap();
    assert_eq!(
        blocks.len(),
        usize::try_from(object["spec"]["num_hidden_layers"].as_u64().unwrap()).unwrap()
    );
    assert!(blocks[0]["forward"]["flops"].as_f64().unwrap() > 0.0);
    assert!(object["tensors"].as_array().unwrap().len() > 10);
}

#[test]
fn programs_are_printed() {
    let forward = succeed(cairn(["inspect", "--program"]).arg(golden("llama")));
    assert!(forward.starts_with("program vis/4\n  input ids : u32[t]\n"), "{forward}");
    assert!(!forward.contains("backward:"));
    let training = succeed(cairn(["inspect", "--program", "--training"]).arg(golden("llama")));
    assert!(training.contains("\nbackward:\n"));
}

#[test]
fn a_tensor_file_is_listed() {
    let text = succeed(cairn(["inspect"]).arg(golden("llama").join("model.safetensors")));
    assert!(text.contains("model.norm.weight"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("30 tensors, "), "{text}");
}

/// What tensors do not tell of the GPT-2 that is tested with.
const TOLD: [&str; 5] = [
    "--set=n_head=6",
    "--set=layer_norm_epsilon=1e-5",
    "--set=activation_function=gelu_new",
    "--set=scale_attn_weights=true",
    "--set=scale_attn_by_inverse_layer_idx=false",
];

#[test]
fn weights_without_a_description_are_described_as_far_as_they_tell() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::copy(golden("gpt2").join("model.safetensors"), &file).unwrap();
    let output = cairn(["inspect"]).arg(&file).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    assert!(text.starts_with("exit 0\n") && text.contains(" tensors, "), "{text}");
    let talk = text.split("--- stderr\n").last().unwrap();
    insta::assert_snapshot!(talk, @r#"

    The model: a gpt2 model; its tensors do not tell n_head, layer_norm_epsilon, activation_function, scale_attn_weights, scale_attn_by_inverse_layer_idx.
    hint: tell them, and have it written: cairn inspect DIR/model.safetensors --set n_head=… --set layer_norm_epsilon=… --set activation_function=… --set scale_attn_weights=… --set scale_attn_by_inverse_layer_idx=… --write-config DIR/config.json
    hint: put the model's own config.json beside the tensors, or set them
    "#);
    let output = cairn(["inspect"]).arg(folder.path()).output().unwrap();
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR has no config.json
      because: a gpt2 model; its tensors do not tell n_head, layer_norm_epsilon, activation_function, scale_attn_weights, scale_attn_by_inverse_layer_idx
    hint: tell them, and have it written: cairn inspect DIR --set n_head=… --set layer_norm_epsilon=… --set activation_function=… --set scale_attn_weights=… --set scale_attn_by_inverse_layer_idx=… --write-config DIR/config.json
    hint: put the model's own config.json beside the tensors, or set them
    "#);
    // What is told and what the tensors tell is what the description would say.
    let mut told = TOLD.to_vec();
    told.push("--json");
    let described = |path: &std::path::Path, told: &[&str]| -> Value {
        let text = succeed(cairn(["inspect"]).arg(path).args(told));
        serde_json::from_str::<Value>(&text).unwrap()["blocks"].clone()
    };
    let expected = described(&golden("gpt2"), &["--json"]);
    assert!(expected.as_array().is_some_and(|blocks| !blocks.is_empty()));
    assert_eq!(described(&file, &told), expected);
    assert_eq!(described(folder.path(), &told), expected);
    let mut wrong = TOLD.to_vec();
    wrong.push("--set=n_head=5");
    wrong.remove(0);
    let output = cairn(["inspect"]).arg(&file).args(wrong).output().unwrap();
    let text = shown(&output, None);
    assert!(text.starts_with("exit 1\n") && text.contains("not a multiple of 5"), "{text}");
    let output = cairn(["inspect", "--set", "n_head=6"]).arg(golden("gpt2")).output().unwrap();
    assert!(shown(&output, None).contains("--set is for weights without one"));
}

#[test]
fn every_command_asks_for_a_description_and_takes_the_one_that_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let weights = golden("gpt2").join("model.safetensors");
    std::fs::copy(weights, folder.path().join("model.safetensors")).unwrap();
    let golden_ids = golden("gpt2").join("golden.safetensors");
    let (out, golden_ids) = (folder.path().join("out"), golden_ids.to_str().unwrap());
    let logits = ["logits", "--input", golden_ids, "--output", out.to_str().unwrap()];
    let commands: [&[&str]; 6] = [
        &["generate", "--prompt-ids", "1,2"],
        &logits,
        &["eval", "--corpus", "nowhere"],
        &["embed", "stones"],
        &["fill-mask", "stones"],
        &["chat"],
    ];
    for command in commands {
        let output = cairn(command).arg("--model").arg(folder.path()).output().unwrap();
        let text = shown(&output, Some(folder.path()));
        let asked = "error: DIR has no config.json\n  because: a gpt2 model; its tensors do not tell \
            n_head, layer_norm_epsilon, activation_function, scale_attn_weights, \
            scale_attn_by_inverse_layer_idx\n";
        assert!(text.starts_with("exit 1\n") && text.contains(asked), "{command:?}: {text}");
        assert!(text.contains("--write-config DIR/config.json"), "{command:?}: {text}");
    }
    let written = folder.path().join("config.json");
    let mut describe = cairn(["inspect"]);
    describe.arg(folder.path()).args(TOLD).arg("--write-config");
    succeed(describe.arg(&written));
    // Not a second time: what is there may be the model's own.
    let before = std::fs::read(&written).unwrap();
    let file = folder.path().join("model.safetensors");
    let mut again = cairn(["inspect"]);
    again.arg(&file).args(TOLD).arg("--write-config");
    let text = shown(&again.arg(&written).output().unwrap(), Some(folder.path()));
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(std::fs::read(&written).unwrap() == before);
    let generated = |model: &std::path::Path| {
        let arguments = [
            "generate",
            "--prompt-ids",
            "1,2,3",
            "--max-new-tokens",
            "8",
            "--temperature",
            "0",
            "--json",
        ];
        succeed(cairn(arguments).arg("--model").arg(model))
    };
    let ids = |text: String| serde_json::from_str::<Value>(&text).unwrap()["token_ids"].clone();
    let expected = ids(generated(&golden("gpt2")));
    assert!(expected.is_array(), "{expected}");
    assert_eq!(ids(generated(folder.path())), expected);
}

#[test]
fn families_that_name_their_tensors_alike_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::copy(golden("llama").join("model.safetensors"), &file).unwrap();
    let output = cairn(["inspect", "--program"]).arg(&file).output().unwrap();
    let text = shown(&output, None);
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("--set model_type=llama or --set model_type=mistral"), "{text}");
}

#[test]
fn what_is_neither_asked_nor_told_by_tensors_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::copy(golden("llama").join("model.safetensors"), &file).unwrap();
    let told = ["model_type=llama", "num_attention_heads=4", "rms_norm_eps=1e-5", "rope_theta=1e4"];
    let told = told.iter().chain(&["rope_scaling=null", "max_position_embeddings=256"]);
    let describe = |more: &[&str], to: Option<&str>| {
        let mut command = cairn(["inspect"]);
        command.arg(&file).args(told.clone().chain(more).flat_map(|told| ["--set", told]));
        if let Some(to) = to {
            command.arg("--write-config").arg(folder.path().join(to));
        }
        shown(&command.output().unwrap(), None)
    };
    // Whether it is written or looked at.
    for to in [None, Some("first.json")] {
        let text = describe(&[], to);
        assert!(text.starts_with("exit 0\n") && text.contains("hidden_act=silu"), "{text}");
    }
    let text = describe(&["hidden_act=gelu"], Some("second.json"));
    assert!(text.starts_with("exit 0\n") && !text.contains("hidden_act=silu"), "{text}");
}

#[test]
fn the_doctor_looks_at_the_machine() {
    let report: Value = serde_json::from_str(&succeed(&mut cairn(["doctor", "--json"]))).unwrap();
    assert!(report["machine"]["num_cpus"].as_u64().unwrap() > 0);
    let registered = report["kernels_registered"].as_u64().unwrap();
    let selected = report["kernels_selected"].as_array().unwrap();
    assert!(!selected.is_empty() && (selected.len() as u64) <= registered);
    // The environment of the test has no home, so there is no registry either.
    assert_eq!(report["findings"].as_array().unwrap().len(), 1, "{report}");
}

#[test]
fn a_model_is_drawn_with_its_equal_blocks_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.svg");
    succeed(cairn(["inspect", "--picture"]).arg(&file).arg(golden("llama")));
    let picture = std::fs::read_to_string(file).unwrap();
    assert!(picture.starts_with("<svg "), "{picture}");
    assert!(picture.contains("blocks 0 to 2, 3 times"), "{picture}");
    assert!(picture.contains("self_attn.q_proj") && picture.contains("attention, causal"));
}
