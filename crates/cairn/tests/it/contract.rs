//! `cairn bench contract` against a peer that is played here: a server that says what it is told to.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use serde_json::{Value, json};

use crate::{cairn, golden, shown};

/// What the server of a test answers with.
#[derive(Clone)]
struct Answers {
    /// The file it says it runs.
    model_path: String,
    /// Tokens of the prompt it says it read.
    prompt_tokens: usize,
    /// The tokens it makes.
    tokens: Vec<u32>,
    vocab_size: usize,
}

/// Serves until the test's process ends; returns the address.
fn serve(answers: Answers) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let answers = answers.clone();
            std::thread::spawn(move || talk(&stream.unwrap(), &answers));
        }
    });
    address
}

/// Answers one connection's requests until it is closed.
fn talk(stream: &TcpStream, answers: &Answers) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut first, mut length) = (String::new(), 0);
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').unwrap();
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let answer = answer(&first, &body, answers).to_string();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length:";
        let mut stream = stream;
        write!(stream, "{head} {}\r\n\r\n{answer}", answer.len()).unwrap();
    }
}

fn answer(request: &str, body: &[u8], answers: &Answers) -> Value {
    if request.starts_with("GET /props") {
        return json!({ "model_path": answers.model_path });
    }
    let asked: Value = serde_json::from_slice(body).unwrap();
    if asked.get("n_probs").is_some() {
        let logprob = -(answers.vocab_size as f64).ln();
        let entry = |id| json!({ "id": id, "logprob": logprob });
        let top: Vec<Value> = (0..answers.vocab_size).map(entry).collect();
        return json!({ "completion_probabilities": [{ "top_logprobs": top }] });
    }
    json!({
        "tokens": answers.tokens,
        "timings": {
            "prompt_n": answers.prompt_tokens, "prompt_ms": 10.0,
            "predicted_n": answers.tokens.len(), "predicted_ms": 70.0,
        },
    })
}

/// A small model with a tokenizer, and the size of its vocabulary.
fn model() -> (std::path::PathBuf, usize) {
    let path = golden("gguf").join("chat.gguf");
    let ids = crate::succeed(cairn(["inspect", "--json"]).arg(&path));
    let found: Value = serde_json::from_str(&ids).unwrap();
    let size = found["spec"]["vocab_size"].as_u64().unwrap();
    (path, usize::try_from(size).unwrap())
}

/// Runs a contract of eight and eight tokens; `changes` replace text in its file.
fn run(folder: &Path, changes: &[(&str, &str)], arguments: &[&str]) -> std::process::Output {
    run_on(&model().0, folder, changes, arguments)
}

/// The same on a model.
fn run_on(
    model: &Path,
    folder: &Path,
    changes: &[(&str, &str)],
    arguments: &[&str],
) -> std::process::Output {
    let mut contract = r#"
        schema = "contract/1"
        name = "eight"
        machine = { threads = 1 }
        prompt = { tokens = 8, text = "prose.txt" }
        output = { tokens = 8 }
        measure = { repetitions = 1, kl_positions = 2 }
    "#
    .to_owned();
    for (from, to) in changes {
        assert!(contract.contains(from), "{from}");
        contract = contract.replace(from, to);
    }
    fs::write(folder.join("eight.toml"), contract).unwrap();
    fs::write(folder.join("prose.txt"), "one stone lies upon another, and so on and on ".repeat(4))
        .unwrap();
    let mut command = cairn(["--quiet", "--threads", "1", "bench", "contract"]);
    command.arg(folder.join("eight.toml")).arg("--model").arg(model);
    command.args(["--json"]).args(arguments).output().unwrap()
}

fn record(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(output, None)))
}

#[test]
fn both_sides_run_the_same_and_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let alone = run(folder.path(), &[], &[]);
    assert!(alone.status.success(), "{}", shown(&alone, None));
    let alone = record(&alone);
    let own = &alone["figures"]["own"][0];
    let tokens: Vec<u32> = serde_json::from_value(own["token_ids"].clone()).unwrap();
    assert_eq!(tokens.len(), 8);
    assert_eq!(alone["figures"]["peer"], Value::Null);
    let coverage = &alone["figures"]["coverage"];
    let share = coverage["time_share"].as_f64().unwrap();
    assert!(share > 0.0 && share <= 1.0, "{coverage}");
    let has_all = coverage["operators"] == coverage["specialized"];
    assert_eq!(has_all, coverage["missing"] == json!([]), "{coverage}");

    let (path, vocab_size) = model();
    let mut parted = tokens.clone();
    parted[5] = (tokens[5] + 1) % 8;
    let model_path = path.display().to_string();
    let answers = Answers { model_path, prompt_tokens: 8, tokens: parted.clone(), vocab_size };
    let page = folder.path().join("page.html");
    let address = serve(answers);
    let arguments =
        ["--against", &address, "--peer-threads", "1", "--report", page.to_str().unwrap()];
    let output = run(folder.path(), &[], &arguments);
    assert!(output.status.success(), "{}", shown(&output, None));
    let figures = record(&output)["figures"].take();
    assert_eq!(figures["evenness"]["uneven"], json!([]));
    let divergence = &figures["agreement"]["divergence"];
    assert_eq!(divergence["position"], 5);
    assert_eq!(
        (&divergence["ours"], &divergence["theirs"]),
        (&json!(tokens[5]), &json!(parted[5]))
    );
    assert!(divergence["margin"].as_f64().unwrap() >= 0.0, "ours is the likelier one to us");
    let kl: Vec<f64> = serde_json::from_value(figures["agreement"]["kl"].clone()).unwrap();
    assert!(kl.len() == 2 && kl.iter().all(|kl| *kl > 0.0), "{kl:?}");
    // 8 tokens in 10 ms, then 7 in 70.
    let peer = &figures["peer"];
    assert!((peer["prefill_tokens_per_s"][0].as_f64().unwrap() - 800.0).abs() < 1e-6);
    assert!((peer["decode_tokens_per_s"][0].as_f64().unwrap() - 100.0).abs() < 1e-6);
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("<svg") && page.contains("ratio to the peer"), "{page}");
}

#[test]
fn an_uneven_comparison_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (path, vocab_size) = model();
    let even = Answers {
        model_path: path.display().to_string(),
        prompt_tokens: 8,
        tokens: vec![1; 8],
        vocab_size,
    };
    let other = golden("gguf").join("gpt2.gguf").display().to_string();
    for (answers, threads, expected) in [
        (
            Answers { prompt_tokens: 3, ..even.clone() },
            "1",
            "tokens of the prompt: 8 here, 3 there",
        ),
        (
            Answers { tokens: vec![1; 7], ..even.clone() },
            "1",
            "tokens of the output: 8 here, 7 there",
        ),
        (even.clone(), "2", "threads: 1 here, 2 there"),
        (Answers { model_path: other, ..even.clone() }, "1", "bytes of weights for a token"),
        (Answers { model_path: "nowhere.gguf".to_owned(), ..even.clone() }, "1", "unknown there"),
    ] {
        let address = serve(answers);
        let output = run(folder.path(), &[], &["--against", &address, "--peer-threads", threads]);
        let text = shown(&output, None);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("the comparison is uneven") && text.contains(expected), "{text}");
        let page = record(&output);
        assert_eq!(page["figures"]["evenness"]["uneven"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn weights_are_compared_by_the_contracts_rule() {
    let folder = tempfile::tempdir().unwrap();
    let (path, vocab_size) = model();
    let plain = folder.path().join("plain.gguf");
    crate::succeed(cairn(["export", "--gguf"]).arg(&path).arg("--output").arg(&plain));
    let model_path = plain.display().to_string();
    let answers = Answers { model_path, prompt_tokens: 8, tokens: vec![1; 8], vocab_size };
    let address = serve(answers);
    let source = path.to_str().unwrap();
    let against = ["--against", &address, "--peer-threads", "1"];
    let run = |model: &str, more: &[&str]| {
        let model = format!("model = {model}\n        machine");
        // What is played here is no model: any distance is allowed.
        let measure = ("kl_positions = 2", "kl_positions = 8, kl_max = 1e3");
        run(folder.path(), &[("machine", &model), measure], &[&against, more].concat())
    };
    let same = run(r#"{ even = "values", dtype = "f32" }"#, &[]);
    assert!(same.status.success(), "{}", shown(&same, None));

    let other = run(r#"{ even = "values", dtype = "bf16" }"#, &[]);
    let text = shown(&other, None);
    assert_eq!(other.status.code(), Some(1), "{text}");
    assert!(text.contains("values of the weights: bf16 here, f32 there"), "{text}");

    // What is played here finds every token as likely: four bits are nearer to the exact model.
    let four = r#"{ even = "quality", dtype = "q4", compute_dtype = "int8" }"#;
    let rounded = run(four, &["--source", source]);
    let text = shown(&rounded, None);
    assert!(text.contains("holds q8") && text.contains("before it was rounded"), "{text}");
    let source = plain.to_str().unwrap();
    let nearer = run(four, &["--source", source]);
    assert!(nearer.status.success(), "{}", shown(&nearer, None));
    let kl = record(&nearer)["figures"]["agreement"]["source_kl"].take();
    let mean = |side: &str| {
        let kl: Vec<f64> = serde_json::from_value(kl[side].clone()).unwrap();
        assert_eq!(kl.len(), 8);
        kl.iter().sum::<f64>() / 8.0
    };
    assert!(0.0 < mean("ours") && mean("ours") < mean("theirs"), "{kl}");

    for (model, more, expected) in [
        (four, &[][..], "say where that is: --source DIR"),
        (
            four,
            &["--source", source, "--compute-dtype", "f32"],
            "the contract fixes another model.compute_dtype",
        ),
        (r#"{ compute_dtype = "int9" }"#, &[], "model.compute_dtype is \"int9\", which is none"),
    ] {
        let refused = run(model, more);
        let text = shown(&refused, None);
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_head_of_its_own_type_is_that_of_a_pack() {
    let folder = tempfile::tempdir().unwrap();
    let packed = |head: &str| {
        let path = folder.path().join(format!("{head}.leanpack"));
        let mut command = cairn(["pack", "--encoding", "q4", "--head-encoding", head]);
        crate::succeed(command.arg(golden("gguf").join("chat")).arg("--output").arg(&path));
        path
    };
    let (right, other) = (packed("q8"), packed("auto"));
    let told = crate::succeed(cairn(["inspect"]).arg(&right));
    assert!(told.contains("q8 panel (") && told.contains("q4 panel ("), "{told}");
    let model = r#"model = { dtype = "q4", head_dtype = "q8" }"#;
    let model = format!("{model}\n        machine");
    let run = |path: &Path| run_on(path, folder.path(), &[("machine", &model)], &[]);
    let found = run(&right);
    assert!(found.status.success(), "{}", shown(&found, None));
    let name = record(&found)["figures"]["own"][0]["name"].take();
    assert!(name.as_str().unwrap().contains("q8") && name.as_str().unwrap().contains("q4"));
    for path in [other, golden("gguf").join("chat")] {
        let refused = run(&path);
        let text = shown(&refused, None);
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(text.contains("is no pack of q4 with a head of q8"), "{text}");
        assert!(text.contains("--encoding q4 --head-encoding q8"), "{text}");
    }
}

#[test]
fn what_a_contract_is_not_about_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (changes, arguments, expected) in [
        (
            ("threads = 1", "threads = 2"),
            &[][..],
            "the contract is about 2 threads, this run has 1",
        ),
        (("threads = 1", "threads = 1, isa = \"neon\""), &[], "the contract is about neon"),
        (("tokens = 8, text", "tokens = 240, text"), &[], "the prompt wants 240"),
        (("prose.txt", "verse.txt"), &[], "verse.txt"),
        (("threads = 1", "threads = 1"), &["--strict"], "--strict asks for a leanpack"),
        (
            ("threads = 1", "threads = 1, bandwidth_min_gbs = 1e6"),
            &[],
            "the run is void: the machine read",
        ),
        (
            ("threads = 1", "threads = 1"),
            &["--against", "server --port {port}"],
            "the peer's command has no {threads}",
        ),
        (
            ("threads = 1", "threads = 1"),
            &["--against", "echo port {port}, threads {threads}, no model >&2; exit 3"],
            "its last words: port",
        ),
    ] {
        let output = run(folder.path(), &[changes], arguments);
        let text = shown(&output, None);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}
