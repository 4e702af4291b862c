//! Mistakes: what is said, and the exit code.

use std::fs;

use crate::{cairn, golden, shown};

fn failure(arguments: &[&str]) -> String {
    shown(&cairn(arguments).output().unwrap(), None)
}

#[test]
fn an_unknown_command_is_refused() {
    insta::assert_snapshot!(failure(&["inspec"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: unrecognized subcommand 'inspec'

      tip: a similar subcommand exists: 'inspect'

    Usage: cairn [OPTIONS] <COMMAND>

    For more information, try '--help'.
    "#);
}

#[test]
fn a_missing_flag_is_named() {
    insta::assert_snapshot!(failure(&["logits", "--model", "x"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: the following required arguments were not provided:
      --input <FILE>
      --output <FILE>

    Usage: cairn logits --input <FILE> --output <FILE> --model <DIR>

    For more information, try '--help'.
    "#);
}

#[test]
fn a_folder_without_a_model_is_named() {
    insta::assert_snapshot!(failure(&["inspect", "/nowhere/model"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: there is nothing at /nowhere/model
    hint: a model is a folder with config.json and safetensors, a GGUF file or a leanpack
    "#);
}

#[test]
fn what_is_named_as_a_model_and_is_none_is_said_to_be_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("model.safetensors");
    fs::copy(golden("llama").join("model.safetensors"), &weights).unwrap();
    let text = |path: &std::path::Path| {
        let mut command = cairn(["generate", "--prompt-ids", "1", "--model"]);
        shown(&command.arg(path).output().unwrap(), Some(folder.path()))
    };
    insta::assert_snapshot!(text(&weights), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR/model.safetensors holds weights alone
    hint: name the folder, with its config.json: DIR
    "#);
    let notes = folder.path().join("notes.txt");
    fs::write(&notes, "stones").unwrap();
    insta::assert_snapshot!(text(&notes), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR/notes.txt is not a model: a model is a folder with config.json and safetensors, a GGUF file or a leanpack
      because: DIR/notes.txt is not a sound GGUF file
      because: it begins with [73, 74, 6f, 6e] instead of 'GGUF'
    "#);
    fs::remove_file(&weights).unwrap();
    fs::write(folder.path().join("manifest.json"), "{}").unwrap();
    assert!(text(folder.path()).contains("hint: it is a corpus: cairn corpus stats DIR"));
}

#[test]
fn zero_threads_are_refused() {
    let text = failure(&["doctor", "--threads", "0"]);
    let text = text.split("; this machine").next().unwrap();
    insta::assert_snapshot!(text, @r#"
    exit 1
    --- stdout
    --- stderr
    error: cannot compute with 0 threads
    hint: choose 1 to 1024
    "#);
}

#[test]
fn a_malformed_variable_is_named() {
    let output = cairn(["doctor"]).env("CAIRN_THREADS", "many").output().unwrap();
    insta::assert_snapshot!(shown(&output, None), @r#"
    exit 1
    --- stdout
    --- stderr
    error: CAIRN_THREADS is 'many', not a number above 0
    hint: set CAIRN_THREADS to 1 or more, or unset it
    "#);
}

#[test]
fn a_malformed_description_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = fs::read_to_string(golden("llama").join("config.json")).unwrap();
    let config = config.replace("\"num_attention_heads\": 4", "\"num_attention_heads\": 0");
    fs::write(folder.path().join("config.json"), config).unwrap();
    let output = cairn(["inspect"]).arg(folder.path()).output().unwrap();
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR/config.json does not describe a model
      because: 'num_attention_heads' must be between 1 and 4096, not 0
    "#);
}

#[test]
fn a_long_list_of_unknown_fields_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let config = fs::read_to_string(golden("llama").join("config.json")).unwrap();
    let fields: String = (10..35).map(|i| format!("\"stone_{i}\": 1, ")).collect();
    let config = config.replacen('{', &format!("{{{fields}"), 1);
    fs::write(folder.path().join("config.json"), config).unwrap();
    let output = cairn(["inspect"]).arg(folder.path()).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    let warning =
        "warning: DIR/config.json has fields that nothing here knows: stone_10, stone_11, ";
    assert!(text.contains(warning) && text.contains("stone_29 and 5 more\n"), "{text}");
}

#[test]
fn a_truncated_weight_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(golden("llama").join("model.safetensors")).unwrap();
    fs::copy(golden("llama").join("config.json"), folder.path().join("config.json")).unwrap();
    fs::write(folder.path().join("model.safetensors"), &whole[..whole.len() - 100]).unwrap();
    let mut command = cairn(["logits", "--model"]);
    command.arg(folder.path()).arg("--input").arg(golden("llama").join("golden.safetensors"));
    let output = command.args(["--output", "/nowhere/out"]).output().unwrap();
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR/model.safetensors is not a sound safetensors file
      because: the tensors need 681728 bytes, but the file holds 681628
    hint: the file was probably cut short; copy or download it again
    "#);
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let mut command = cairn(["logits", "--model"]);
    command.arg(golden("llama")).arg("--input").arg(golden("llama").join("golden.safetensors"));
    let output = command.args(["--output", "/nowhere/out"]).output().unwrap();
    insta::assert_snapshot!(shown(&output, None), @r#"
    exit 1
    --- stdout
    --- stderr
    error: cannot write /nowhere/out
      because: No such file or directory (os error 2)
    hint: check the path
    "#);
}

#[test]
fn weights_of_another_model_are_named() {
    let mut command = cairn(["logits", "--model"]);
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("gpt2").join("config.json"), folder.path().join("config.json")).unwrap();
    let weights = golden("llama").join("model.safetensors");
    fs::copy(weights, folder.path().join("model.safetensors")).unwrap();
    command.arg(folder.path()).arg("--input").arg(golden("llama").join("golden.safetensors"));
    let output = command.args(["--output", "/nowhere/out"]).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    assert!(text.starts_with("exit 1\n") && text.contains("transformer.wte.weight"), "{text}");
}

#[test]
fn a_file_that_holds_no_tensors_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.toml");
    fs::write(&path, "schema = \"train/2\"").unwrap();
    let output = cairn(["inspect"]).arg(&path).output().unwrap();
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR/tiny.toml is not a tensor file
    hint: inspect reads runs, model folders, config.json, leanpacks and .safetensors files
    "#);
}

#[test]
fn a_tokenizer_that_its_library_chokes_on_is_to_blame_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    // The library panics on a table that is not base 64.
    let json = r#"{"version":"1.0","added_tokens":[],
        "normalizer":{"type":"Precompiled","precompiled_charsmap":"!!"},
        "model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
    fs::write(&path, json).unwrap();
    let mut command = cairn(["tokenizer", "encode", "--tokenizer"]);
    let output = command.arg(&path).arg("a").output().unwrap();
    insta::assert_snapshot!(shown(&output, Some(folder.path())), @r"
    exit 1
    --- stdout
    --- stderr
    error: DIR/tokenizer.json is not a tokenizer.json: the `tokenizers` crate cannot read it
    hint: `cairn tokenizer train` makes a tokenizer.json
    ");
}
