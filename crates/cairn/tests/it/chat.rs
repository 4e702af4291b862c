//! Conversations as a user has them, with a model of random weights.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use cairn_data::tokenizer::{BpeSettings, train_bpe};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{cairn, golden, shown};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";

/// LLaMA in small, with a tokenizer trained here and a template if asked for.
fn model(template: Option<&str>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama").join(name), folder.path().join(name)).unwrap();
    }
    let text = "a cairn is a stack of stones, and stones mark the way. ";
    let settings = BpeSettings { vocab_size: 300, ..BpeSettings::default() };
    let tokenizer = train_bpe(&settings, (0..8).map(|_| Ok(text.to_owned()))).unwrap();
    tokenizer.save(&folder.path().join("tokenizer.json")).unwrap();
    let config = json!({"eos_token": "<|endoftext|>", "chat_template": template});
    write(folder.path(), "tokenizer_config.json", &config);
    folder
}

fn write(folder: &Path, name: &str, content: &Value) {
    std::fs::write(folder.join(name), content.to_string()).unwrap();
}

fn chat(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = cairn(["chat", "--temperature", "0", "--max-new-tokens", "6", "--model"]);
    command.arg(folder).args(arguments);
    command
}

pub(crate) fn with_input(command: &mut Command, input: &str) -> Output {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that refuses before it reads closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// The objects that `--json --lines` prints.
fn objects(folder: &Path, arguments: &[&str], input: &str) -> Vec<Value> {
    let output = with_input(chat(folder, &["--json", "--lines"]).args(arguments), input);
    assert!(output.status.success(), "{}", shown(&output, None));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn one_question_from_a_pipe() {
    let folder = model(Some(TEMPLATE));
    let output = with_input(&mut chat(folder.path(), &["--json"]), "What is a cairn?\n");
    assert!(output.status.success(), "{}", shown(&output, None));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["messages"][0], json!({"role": "user", "content": "What is a cairn?"}));
    assert_eq!(object["messages"][1]["role"], "assistant");
    assert_eq!(object["num_reused_tokens"], 0);
    let answer = object["messages"][1]["content"].as_str().unwrap();
    let plain = with_input(&mut chat(folder.path(), &["--quiet"]), "What is a cairn?\n");
    assert_eq!(String::from_utf8(plain.stdout).unwrap(), format!("{answer}\n"));
}

#[test]
fn turns_run_only_what_is_new_and_say_the_same() {
    let folder = model(Some(TEMPLATE));
    let turns = objects(folder.path(), &["--system", "Be brief."], "a stack\nof stones\nthe way\n");
    assert_eq!(turns.len(), 3);
    for (before, turn) in turns.iter().zip(&turns[1..]) {
        let (held, reused) = (&before["num_prompt_tokens"], &turn["num_reused_tokens"]);
        assert!(held.as_u64() <= reused.as_u64(), "{before} {turn}");
        assert!(reused.as_u64() < turn["num_prompt_tokens"].as_u64());
    }
    // The last answer is what a fresh conversation of the same words gets.
    let messages = turns[2]["messages"].as_array().unwrap();
    assert_eq!(messages.len(), 7);
    let again = objects(folder.path(), &["--system", "Be brief."], "a stack\nof stones\nthe way\n");
    assert_eq!(again, turns);
}

#[test]
fn commands_change_the_conversation() {
    let folder = model(Some(TEMPLATE));
    let file = folder.path().join("saved.json");
    let input = format!(
        "one\n/undo\ntwo\n/save {}\n/reset\nthree\n/system Be kind.\nfour\n/nonsense\n/quit\nnever\n",
        file.display()
    );
    let turns = objects(folder.path(), &[], &input);
    let contents = |turn: &Value| -> Vec<String> {
        let messages = turn["messages"].as_array().unwrap().iter();
        messages.filter(|m| m["role"] != "assistant").map(|m| m["content"].to_string()).collect()
    };
    let found: Vec<Vec<String>> = turns.iter().map(contents).collect();
    let wanted: [&[&str]; 4] =
        [&["\"one\""], &["\"two\""], &["\"three\""], &["\"Be kind.\"", "\"four\""]];
    assert_eq!(found, wanted);
    let saved: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(saved, turns[1]["messages"]);
}

#[test]
fn a_full_context_is_said_or_made_room_in() {
    let folder = model(Some(TEMPLATE));
    let long = "stones and stones and stones and stones and stones\n".repeat(5);
    let arguments = ["--max-context", "100"];
    let output = with_input(chat(folder.path(), &arguments).arg("--lines"), &long);
    let text = shown(&output, None);
    assert!(text.contains("and the context holds 100") && text.contains("--drop-oldest"), "{text}");
    let turns = objects(folder.path(), &["--max-context", "100", "--drop-oldest"], &long);
    assert_eq!(turns.len(), 5);
    assert!(turns.iter().any(|turn| turn["num_dropped_messages"].as_u64() > Some(0)));
    assert!(turns.iter().all(|turn| turn["num_prompt_tokens"].as_u64() < Some(100)));
}

#[test]
fn stated_ends_and_sampling_are_taken_or_named() {
    let folder = model(Some(TEMPLATE));
    let first = objects(folder.path(), &[], "a stack\n");
    let ids = |object: &Value| object["num_new_tokens"].as_u64().unwrap();
    assert_eq!(ids(&first[0]), 6);
    // Any token ends an answer: it is one token long, and greedy by the file.
    let every: Vec<u32> = (0..300).collect();
    let config = json!({"eos_token_id": every, "do_sample": false, "penalty_alpha": 0.6});
    write(folder.path(), "generation_config.json", &config);
    let mut command = cairn(["chat", "--lines", "--json", "--model"]);
    let output = with_input(command.arg(folder.path()), "a stack\n");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((ids(&object), &object["finish"]), (1, &json!("stop")));
    let talk = String::from_utf8(output.stderr).unwrap();
    assert!(talk.contains("at temperature 0") && talk.contains("penalty_alpha"), "{talk}");
}

#[test]
fn a_model_without_a_template_is_refused() {
    let folder = model(None);
    let output = with_input(&mut chat(folder.path(), &[]), "hello");
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r"
    exit 1
    --- stdout
    --- stderr
    error: DIR has no chat template
    hint: give one with --template FILE, written for this model
    hint: a model without one only continues text: cairn generate --prompt TEXT
    ");
    std::fs::write(folder.path().join("mine.jinja"), TEMPLATE).unwrap();
    let file = folder.path().join("mine.jinja");
    let output = with_input(chat(folder.path(), &["--template"]).arg(file), "hello");
    assert!(output.status.success(), "{}", shown(&output, None));
}

#[test]
fn a_template_that_refuses_or_never_ends_is_an_error() {
    for (template, part) in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "takes too much",
        ),
        ("\n{{ messages[0].nothing.more }}", "line 2"),
    ] {
        let folder = model(Some(template));
        let text = shown(&with_input(&mut chat(folder.path(), &[]), "hello"), None);
        assert!(text.starts_with("exit 1\n") && text.contains(part), "{text}");
    }
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let folder = model(Some(TEMPLATE));
    let other = golden("tokenizers").join("byte_level/tokenizer.json");
    std::fs::copy(other, folder.path().join("tokenizer.json")).unwrap();
    let output = with_input(&mut chat(folder.path(), &[]), "hello");
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r"
    exit 1
    --- stdout
    --- stderr
    error: the tokenizer has 439 token ids, the model's vocab_size is 320
    hint: use the tokenizer.json that belongs to this config.json
    ");
}

#[test]
fn an_encoder_is_refused_with_what_it_can_do() {
    let output = with_input(&mut chat(&golden("bert"), &[]), "hello");
    insta::assert_snapshot!(shown(&output, Some(&golden("bert"))), @r"
    exit 1
    --- stdout
    --- stderr
    error: DIR is a bert model: an encoder, which does not answer
    hint: cairn fill-mask guesses masked words, cairn embed turns texts into vectors
    ");
}

#[test]
fn an_interrupt_stops_the_answer_and_keeps_the_conversation() {
    /// Far more than come before the interrupt.
    const TOKENS: &str = "50000";
    let folder = model(Some("{% for m in messages %}{{ m.content }}{% endfor %}"));
    let path = folder.path();
    // Nothing ends an answer, and there is room for a long one.
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["eos_token_id"] = Value::Null;
    config["max_position_embeddings"] = json!(60000);
    write(path, "config.json", &config);
    let mut tokenizer = std::fs::read_to_string(path.join("tokenizer_config.json")).unwrap();
    tokenizer = tokenizer.replace("\"eos_token\":\"<|endoftext|>\",", "");
    std::fs::write(path.join("tokenizer_config.json"), tokenizer).unwrap();
    let mut command = cairn(["chat", "--lines", "--temperature", "1", "--model"]);
    command.arg(path).args(["--max-context", "60000", "--max-new-tokens", TOKENS]);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"one\n").unwrap();
    // Its first words are there, so the answer has begun.
    let mut output = child.stdout.take().unwrap();
    output.read_exact(&mut [0; 1]).unwrap();
    let interrupt = format!("kill -INT {}", child.id());
    assert!(Command::new("sh").args(["-c", &interrupt]).status().unwrap().success());
    let files = ["first.json", "second.json"].map(|name| path.join(name));
    let [first, second] = files.each_ref().map(|file| file.display());
    input.write_all(format!("/save {first}\n/undo\n/save {second}\n/quit\n").as_bytes()).unwrap();
    drop(input);
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", shown(&done, None));
    let messages = |file: &Path| -> Vec<Value> {
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    };
    let kept = messages(&files[0]);
    assert_eq!((kept.len(), &kept[0]["content"]), (2, &json!("one")));
    let answer = kept[1]["content"].as_str().unwrap().chars().count();
    assert!(0 < answer && answer < 40_000, "{answer} characters came");
    assert_eq!(messages(&files[1]), Vec::<Value>::new());
}
