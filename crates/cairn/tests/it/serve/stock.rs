//! Several models in one process: loaded, forgotten and loaded again while others answer, within a budget of memory
//! and within one folder.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Server, events, greedy, never_ending};
use crate::{cairn, golden, succeed};

/// A folder of models: `one.gguf`, `two.gguf`, an adapter `bent`, and a link that leads out.
fn stock() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["one.gguf", "two.gguf"] {
        fs::copy(golden("gguf").join("chat.gguf"), at(name)).unwrap();
    }
    fs::create_dir(at("bent")).unwrap();
    write_adapter(&at("bent"));
    std::os::unix::fs::symlink("/etc", at("out")).unwrap();
    folder
}

/// An adapter of the chat model that changes what it says.
fn write_adapter(folder: &Path) {
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 64, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["down_proj"], "base_model_name_or_path": "chat",
    });
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let name =
        |half: &str| format!("base_model.model.model.layers.0.mlp.down_proj.lora_{half}.weight");
    let header = json!({
        name("A"): { "dtype": "F32", "shape": [1, 32], "data_offsets": [0, 128] },
        name("B"): { "dtype": "F32", "shape": [32, 1], "data_offsets": [128, 256] },
    })
    .to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    for index in 0..64_u8 {
        bytes.extend((f32::from(index % 7) - 3.0).to_le_bytes());
    }
    fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
}

impl Server {
    fn names(&self) -> Vec<String> {
        let (_, models) = self.get("/v1/models");
        let models: Value = serde_json::from_str(&models).unwrap();
        let models = models["data"].as_array().unwrap();
        models.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Bytes of a model.
    fn bytes(&self, name: &str) -> u64 {
        let (_, model) = self.get(&format!("/v1/models/{name}"));
        serde_json::from_str::<Value>(&model).unwrap()["bytes"].as_u64().unwrap()
    }

    /// What a model says.
    fn said_by(&self, model: &str) -> String {
        let mut body = greedy("one stone", 12);
        body["model"] = model.into();
        self.complete(&body)
    }
}

#[test]
fn models_come_and_go_while_others_answer() {
    let folder = stock();
    let models = folder.path().to_str().unwrap();
    let server = Server::start(&["--models-dir", models]);
    let good = server.said_by("chat");
    let mut body = greedy("stone", 240);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    let running = server.stream("/v1/completions", &body);
    let load = |body: Value| server.post("/v1/models/load", &body.to_string());
    let (status, answer) = load(json!({ "model": "first", "path": "one.gguf" }));
    assert_eq!((status, &answer["id"]), (200, &json!("first")), "{answer}");
    assert_eq!(load(json!({ "model": "two.gguf" })).0, 200);
    assert_eq!(server.names(), ["chat", "first", "two.gguf"]);
    assert_eq!(server.said_by("first"), good);
    let (status, answer) = load(json!({ "model": "first", "path": "one.gguf" }));
    assert_eq!((status, &answer["error"]["code"]), (409, &json!("model_exists")), "{answer}");
    let (status, answer) = server.post("/v1/models/unload", r#"{"model": "first"}"#);
    assert_eq!((status, &answer["status"]), (200, &json!("unloaded")), "{answer}");
    let (status, answer) = server.post("/v1/completions", r#"{"model": "first", "prompt": "a"}"#);
    assert_eq!(status, 404, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("'chat', 'two.gguf' are served"));
    assert_eq!(server.post("/v1/models/unload", r#"{"model": "first"}"#).0, 404);
    assert_eq!(events(running).last().unwrap()["choices"][0]["finish_reason"], "length");
    // The last one may go as well; then the server says that it is not ready.
    for name in ["two.gguf", "chat"] {
        let body = json!({ "model": name }).to_string();
        assert_eq!(server.post("/v1/models/unload", &body).0, 200);
    }
    assert_eq!((server.get("/ready").0, server.get("/health").0), (503, 200));
    assert_eq!(load(json!({ "model": "one.gguf" })).0, 200);
    assert_eq!(server.get("/ready").0, 200);
    assert_eq!(server.said_by("one.gguf"), good);
}

#[test]
fn what_does_not_fit_is_refused_and_the_others_go_on() {
    let folder = stock();
    let models = folder.path().to_str().unwrap();
    let server = Server::start(&["--models-dir", models]);
    let bytes = server.bytes("chat");
    drop(server);
    // Room for two of them and a half.
    let memory = (bytes * 5 / 2).to_string();
    let server = Server::start(&["--models-dir", models, "--memory", &memory]);
    let good = server.said_by("chat");
    let load = |name: &str| server.post("/v1/models/load", &json!({ "model": name }).to_string());
    assert_eq!(load("one.gguf").0, 200);
    let (status, answer) = load("two.gguf");
    assert_eq!((status, &answer["error"]["code"]), (409, &json!("memory_budget")), "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains(&bytes.to_string()) && message.contains(&memory), "{message}");
    // A model that is loaded again is there twice for a moment.
    assert_eq!(server.post("/v1/models/reload", r#"{"model": "chat"}"#).0, 409);
    assert_eq!(server.said_by("chat"), good);
    assert_eq!(server.post("/v1/models/unload", r#"{"model": "one.gguf"}"#).0, 200);
    assert_eq!(server.post("/v1/models/reload", r#"{"model": "chat"}"#).0, 200);
    assert_eq!((load("two.gguf").0, server.said_by("chat")), (200, good));

    let mut small = cairn(["serve", "--port", "0", "--memory", "1KiB"]);
    let refused = small.arg(golden("gguf").join("chat.gguf")).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("of 1024 for all models 0 are taken"), "{said}");
    assert!(said.contains("raise --memory"), "{said}");
}

#[test]
fn nothing_outside_the_folder_is_loaded() {
    let folder = stock();
    let server = Server::start(&["--models-dir", folder.path().to_str().unwrap()]);
    let inside = folder.path().join("one.gguf");
    for path in [
        "..",
        "../one.gguf",
        "bent/../../one.gguf",
        "/etc/passwd",
        inside.to_str().unwrap(),
        "out/passwd",
        "out",
        ".",
        "./one.gguf",
        "",
        "nothing",
        "one.gguf\0",
    ] {
        let body = json!({ "model": "a", "path": path }).to_string();
        let (status, answer) = server.post("/v1/models/load", &body);
        assert_eq!((status, &answer["error"]["param"]), (400, &json!("path")), "{path}: {answer}");
        let body = json!({ "lora_name": "a", "lora_path": path }).to_string();
        let (status, answer) = server.post("/v1/load_lora_adapter", &body);
        assert_eq!(status, 400, "{path}: {answer}");
        assert_eq!(answer["error"]["param"], "lora_path", "{path}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(!message.contains("root:"), "{message}");
    }
    for name in ["", "a\nb", &"a".repeat(300)] {
        let body = json!({ "model": name, "path": "one.gguf" }).to_string();
        assert_eq!(server.post("/v1/models/load", &body).0, 400, "{name:?}");
    }
    // What is there and no model is refused with the reason.
    let (status, answer) =
        server.post("/v1/models/load", r#"{"model": "bent/adapter_config.json"}"#);
    assert_eq!(status, 400, "{answer}");
    assert_eq!(server.names(), ["chat"]);
    let closed = Server::start(&[]);
    let (status, answer) = closed.post("/v1/models/load", r#"{"model": "one.gguf"}"#);
    assert_eq!(status, 400);
    assert!(answer["error"]["message"].as_str().unwrap().contains("--models-dir"), "{answer}");
}

#[test]
fn adapters_are_models_beside_their_base() {
    let folder = stock();
    let models = folder.path().to_str().unwrap();
    let server = Server::start(&["--models-dir", models]);
    let good = server.said_by("chat");
    let load = |body: Value| server.post("/v1/load_lora_adapter", &body.to_string());
    let (status, answer) = load(json!({ "lora_name": "bent", "lora_path": "bent" }));
    assert_eq!(status, 200, "{answer}");
    let bent = server.said_by("bent");
    assert_ne!(bent, good, "the adapter changes what is said");
    assert_eq!(server.said_by("chat"), good);
    // It says what the command says with the adapter.
    let mut command = cairn(["--quiet", "generate", "--prompt", "one stone", "--json"]);
    command.args(["--temperature", "0", "--max-new-tokens", "12", "--model"]);
    command.arg(golden("gguf").join("chat.gguf")).arg("--adapter").arg(folder.path().join("bent"));
    let printed: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
    assert_eq!(printed["text"], bent.as_str());
    let again = json!({ "lora_name": "other", "lora_path": "bent", "base_model_name": "bent" });
    let (status, answer) = load(again);
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("base_model_name")), "{answer}");
    assert_eq!(server.post("/v1/unload_lora_adapter", r#"{"lora_name": "chat"}"#).0, 400);
    assert_eq!(server.post("/v1/unload_lora_adapter", r#"{"lora_name": "bent"}"#).0, 200);
    assert_eq!(server.names(), ["chat"]);
    drop(server);
    let named = format!("bent={}", folder.path().join("bent").display());
    let server = Server::start(&["--adapter", &named]);
    assert_eq!(
        (server.names(), server.said_by("bent")),
        (vec!["chat".to_owned(), "bent".to_owned()], bent)
    );
}

#[test]
fn a_model_that_is_replaced_is_the_old_one_until_it_is_loaded_again() {
    let folder = stock();
    let pack = folder.path().join("model.leanpack");
    let model = golden("gguf").join("chat");
    succeed(cairn(["--quiet", "pack"]).arg(&model).arg("-o").arg(&pack));
    let name = format!("packed={}", pack.display());
    let server = Server::start_with(&[&name, "--models-dir", folder.path().to_str().unwrap()]);
    let good = server.said_by("packed");
    // Another file in its place, and then one that is written over where it lies: both are what careless
    // deployments do.
    let other = folder.path().join("other.leanpack");
    let mut pack_other = cairn(["--quiet", "pack", "--encoding", "q4"]);
    succeed(pack_other.arg(&model).arg("-o").arg(&other));
    fs::rename(&other, &pack).unwrap();
    assert_eq!(server.said_by("packed"), good);
    let (status, answer) = server.post("/v1/models/reload", r#"{"model": "packed"}"#);
    assert_eq!(status, 200, "{answer}");
    let replaced = server.said_by("packed");
    let bytes = fs::read(&pack).unwrap();
    fs::write(&pack, vec![0_u8; bytes.len()]).unwrap();
    assert_eq!(server.said_by("packed"), replaced);
    let (status, answer) = server.post("/v1/models/reload", r#"{"model": "packed"}"#);
    assert_eq!(status, 400, "{answer}");
    assert_eq!(server.said_by("packed"), replaced, "what cannot be loaded replaces nothing");
}
