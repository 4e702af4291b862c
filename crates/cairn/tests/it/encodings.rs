//! What encodings cost, from the command line: measured, chosen by, refused by, and exported.

use std::path::Path;

use cairn_artifacts::machine::Machine;
use cairn_artifacts::safetensors::{self, OutTensor};
use cairn_kernels::profile::KERNELS_VERSION;
use cairn_kernels::{Encoding, Isa};
use cairn_spec::DType;
use serde_json::{Value, json};

use crate::workplace::Workplace;
use crate::{cairn, golden, shown, succeed};

fn trained() -> Workplace {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["--quiet"]));
    workplace
}

fn told(workplace: &Workplace, arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(&mut workplace.cairn(arguments))).unwrap()
}

#[test]
fn encodings_are_measured_for_each_class_of_weights() {
    let workplace = trained();
    let bench = ["bench", "encodings", "--tokens", "128", "--json", "--plot", "kl.svg", "--quiet"];
    let found = told(&workplace, &bench);
    let classes = found["classes"].as_array().unwrap();
    let names: Vec<&str> = classes.iter().map(|class| class["class"].as_str().unwrap()).collect();
    assert!(names.contains(&"self_attn.q_proj") && names.ends_with(&["all"]), "{names:?}");
    for class in classes {
        let rounded = class["rounded"].as_array().unwrap();
        // All but f32 itself.
        assert_eq!(rounded.len(), Encoding::ALL.len() - 1);
        let of = |name: &str, key: &str| {
            let cost = rounded.iter().find(|cost| cost["encoding"] == name).unwrap();
            cost[key].as_f64().unwrap()
        };
        assert!(of("q4", "kl") > of("q8", "kl"), "{class}");
        assert!(of("q8", "bytes") > of("q4", "bytes"), "{class}");
        assert!(of("q4", "perplexity_change").is_finite());
    }
    let svg = std::fs::read_to_string(workplace.path().join("kl.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.contains("self_attn.q_proj") && svg.contains("q4 "));
    let text = succeed(&mut workplace.cairn(&bench[..4]));
    assert!(text.contains("Δ perplexity") && text.contains("as stored: loss "), "{text}");
}

#[test]
fn a_pack_is_made_to_fit_its_bytes() {
    let workplace = trained();
    let pack = |more: &[&str]| {
        let all = [&["pack", "-o", "model.leanpack", "--json", "--quiet"], more].concat();
        told(&workplace, &all)
    };
    let whole = pack(&[]);
    assert_eq!(whole["assignment"], Value::Null);
    let whole = whole["bytes"].as_u64().unwrap();
    let limit = (whole - 20_000).to_string();
    let fitted = pack(&["--bytes", &limit, "--calibration-tokens", "64"]);
    assert!(fitted["bytes"].as_u64().unwrap() <= whole - 20_000, "{fitted}");
    assert!(fitted["assignment"]["kl"].as_f64().unwrap() > 0.0, "{fitted}");
    let shown = succeed(&mut workplace.cairn(&["inspect", "model.leanpack"]));
    for part in ["KL alone, nats", "mlp.down_proj", "all together: KL ", "resident"] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let generate =
        ["generate", "--model", "model.leanpack", "--strict", "--prompt", "fn", "--json", "-q"];
    assert!(told(&workplace, &generate)["num_new_tokens"].as_u64().unwrap() > 0);
    let few = workplace.failure(&["pack", "-o", "m.leanpack", "--bytes", "1kB", "--quiet"]);
    assert!(few.contains("are too few: the smallest encodings take about"), "{few}");
    assert!(!workplace.path().join("m.leanpack").exists());
}

#[test]
fn calibration_text_is_asked_for_where_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    let mut command = cairn(["pack", "--bytes", "1GB"]);
    let output = command.arg(golden("llama")).arg("-o").arg(&path).output().unwrap();
    let text = shown(&output, None);
    assert!(text.contains("is no run's, so there is no text"), "{text}");
    assert!(text.contains("--calibration FILE") && !path.exists(), "{text}");
}

/// Gates as `bench gates` keeps them, of q8 in f32.
fn gates(folder: &Path, verdict: &str) {
    let gates = json!({
        "schema": "gates/1",
        "machine": Machine::read().cpu_model,
        "kernels": KERNELS_VERSION,
        "isa": Isa::supported().last(),
        "pairs": [["q8", "f32", verdict]],
    });
    std::fs::write(folder.join("gates.json"), gates.to_string()).unwrap();
}

#[test]
fn what_did_not_pass_its_gate_is_not_used() {
    let cache = tempfile::tempdir().unwrap();
    let run = |dtype: &str| {
        let mut command = cairn(["generate", "--prompt-ids", "5,6,7", "--max-new-tokens", "2"]);
        command.args(["--temperature", "0", "--json", "--dtype", dtype, "--model"]);
        command.arg(golden("llama")).env("CAIRN_CACHE_DIR", cache.path());
        shown(&command.output().unwrap(), None)
    };
    gates(cache.path(), "wrong");
    let refused = run("q8");
    assert!(refused.starts_with("exit 1"), "{refused}");
    assert!(refused.contains("q8 in f32 gives wrong numbers on this machine"), "{refused}");
    assert!(run("bf16").starts_with("exit 0"), "only what failed is refused");
    gates(cache.path(), "slow");
    let warned = run("q8");
    assert!(warned.starts_with("exit 0") && warned.contains("is slower than bf16"), "{warned}");
    gates(cache.path(), "passed");
    assert!(!run("q8").contains("slower"));
    // What cannot be read allows nothing.
    for damaged in ["{\"schema\": \"gates/1\"", "{\"schema\": \"gates/1\", \"pairs\": 3}", "[]"] {
        std::fs::write(cache.path().join("gates.json"), damaged).unwrap();
        let refused = run("q8");
        assert!(refused.starts_with("exit 1"), "{refused}");
        assert!(refused.contains("cannot be read") && refused.contains("gates.json"), "{refused}");
    }
    std::fs::write(cache.path().join("gates.json"), "{\"schema\": \"gates/0\"}").unwrap();
    assert!(run("q8").starts_with("exit 0"), "another version's");
}

#[test]
fn every_command_that_computes_asks_the_gates() {
    let cache = tempfile::tempdir().unwrap();
    gates(cache.path(), "wrong");
    let ids = cache.path().join("ids.safetensors");
    let bytes = [1_i64, 2].map(i64::to_le_bytes).concat();
    let tensor = OutTensor::bytes("input_ids", DType::I64, &[1, 2], &bytes);
    let mut file = std::fs::File::create(&ids).unwrap();
    safetensors::write(&mut file, vec![tensor], &Default::default()).unwrap();
    let (ids, out) = (ids.to_str().unwrap(), cache.path().join("out"));
    let logits = ["logits", "--input", ids, "--output", out.to_str().unwrap()];
    let decode = ["bench", "decode", "--prompt-tokens", "4", "--new-tokens", "4"];
    for (command, model) in [
        (&["generate", "--prompt-ids", "5"][..], "llama"),
        (&logits[..], "llama"),
        (&decode[..], "llama"),
        (&["embed", "--pooling", "mean", "a stack"][..], "gguf/chat"),
    ] {
        let mut command = cairn(command);
        command.args(["--dtype", "q8", "--model"]).arg(golden(model));
        let text = shown(&command.env("CAIRN_CACHE_DIR", cache.path()).output().unwrap(), None);
        assert!(text.starts_with("exit 1"), "{command:?}: {text}");
        assert!(text.contains("gives wrong numbers on this machine"), "{command:?}: {text}");
    }
}

#[test]
fn an_exported_file_generates_what_its_folder_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let tokens = |model: &Path, dtype: &str| {
        let mut command = cairn(["generate", "--prompt-ids", "5,6,7", "--max-new-tokens", "8"]);
        command.args(["--temperature", "0", "--json", "--dtype", dtype, "--model"]).arg(model);
        let told: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
        told["token_ids"].clone()
    };
    for (gguf, dtype) in [("f32", "f32"), ("bf16", "bf16"), ("q8_0", "q8")] {
        let mut command = cairn(["export", "--gguf", "--quiet", "--json", "--dtype", gguf]);
        succeed(command.arg(golden("qwen3")).arg("-o").arg(&path));
        assert_eq!(tokens(&path, "auto"), tokens(&golden("qwen3"), dtype), "{gguf}");
    }
    let mut command = cairn(["export"]);
    let output = command.arg(golden("qwen3")).arg("-o").arg(&path).output().unwrap();
    assert!(shown(&output, None).contains("--gguf"), "a form has to be named");
}

#[test]
fn the_ledger_counts_what_is_there() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = cairn(["bench", "ledger", "--json", "--source"]);
    command.arg(source).arg("--model").arg(golden("llama"));
    let told: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
    let own = &told["figures"]["sides"][0];
    let program = std::fs::metadata(env!("CARGO_BIN_EXE_cairn")).unwrap().len();
    assert!(own["program_bytes"].as_u64().unwrap() >= program);
    assert!(own["code_lines"]["rs"].as_u64().unwrap() > 10_000, "{own}");
    for figure in ["packages", "libraries", "settings", "processes", "resident_bytes"] {
        assert!(own[figure].as_u64().unwrap() > 0, "{figure} of {own}");
    }
    assert!(own["start_s"].as_f64().unwrap() > 0.0);
}
