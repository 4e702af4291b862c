//! GGUF files where a model is asked for.

use std::fs;

use cairn_artifacts::safetensors::{self, OutTensor, SafetensorsFile};
use serde_json::Value;

use crate::chat::with_input;
use crate::gguf_file::{TEMPLATE, write_llama};
use crate::workplace::Workplace;
use crate::{cairn, golden, shown, succeed};

#[test]
fn logits_of_a_gguf_file_are_those_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("ids.safetensors");
    let ids: Vec<u8> = (3_i64..19).flat_map(i64::to_le_bytes).collect();
    let tensor = OutTensor::bytes("input_ids", cairn_spec::DType::I64, &[2, 8], &ids);
    let mut file = fs::File::create(&input).unwrap();
    safetensors::write(&mut file, vec![tensor], &Default::default()).unwrap();
    for family in ["llama", "qwen2", "qwen3", "gpt2"] {
        let logits = |model: &str| {
            let output = folder.path().join("logits.safetensors");
            let mut command = cairn(["logits", "--model"]);
            command.arg(golden("gguf").join(model)).arg("--input").arg(&input);
            succeed(command.arg("--output").arg(&output));
            let file = SafetensorsFile::open(&output).unwrap();
            file.tensor("logits").unwrap().bytes.to_vec()
        };
        assert!(logits(family) == logits(&format!("{family}.gguf")), "{family}");
    }
}

#[test]
fn a_gguf_file_generates_as_the_folder_does() {
    let tokens = |model: &str, weights: &str| {
        let mut command = cairn(["generate", "--json", "--temperature", "0"]);
        command.args(["--prompt-ids", "5,6,7", "--max-new-tokens", "12", "--dtype", weights]);
        let text = succeed(command.arg("--model").arg(golden("gguf").join(model)));
        serde_json::from_str::<Value>(&text).unwrap()["token_ids"].clone()
    };
    for family in ["llama", "gpt2"] {
        let file = format!("{family}.gguf");
        assert_eq!(tokens(&file, "f32"), tokens(family, "f32"), "{family}");
        assert_eq!(tokens(&file, "q8").as_array().unwrap().len(), 15, "{family}");
    }
}

/// What a command answers to a line of text, as JSON.
fn answer(arguments: &[&str], model: &str, input: &str) -> Value {
    let mut command = cairn(arguments);
    command.args(["--json", "--temperature", "0", "--max-new-tokens", "6", "--dtype", "f32"]);
    let output = with_input(command.arg("--model").arg(golden("gguf").join(model)), input);
    assert!(output.status.success(), "{}", shown(&output, None));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_gguf_file_with_a_template_talks_as_the_folder_does() {
    let question = "What is a cairn?\n";
    let object = answer(&["chat"], "chat.gguf", question);
    assert_eq!(object, answer(&["chat"], "chat", question));
    assert_eq!(object["messages"][1]["role"], "assistant");
    // A prompt begins with the token that the file wants in front of a text.
    let arguments = ["generate", "--prompt-file", "-"];
    let object = answer(&arguments, "chat.gguf", "two stones");
    assert_eq!(object["token_ids"][0], 1);
    let token_ids = |model| answer(&arguments, model, "two stones")["token_ids"].clone();
    assert_eq!(token_ids("chat.gguf"), token_ids("chat"));
    let mut command = cairn(["chat", "--template-name", "rag", "--model"]);
    let output = with_input(command.arg(golden("gguf").join("chat.gguf")), question);
    let text = shown(&output, None);
    assert!(text.contains("hint: it has default, tool_use"), "{text}");
}

#[test]
fn weights_kept_as_stored_give_the_bits_of_f32() {
    let text = |dtype: &str| {
        let mut command = cairn(["embed", "--pooling", "mean", "--dtype", dtype, "--model"]);
        succeed(command.arg(golden("gguf").join("chat.gguf")).arg("a stack of stones"))
    };
    // The file's weights are whole numbers up to 127 times 2^-9: every type holds them.
    let exact = text("f32");
    for dtype in ["auto", "bf16", "f16", "q8"] {
        assert_eq!(text(dtype), exact, "{dtype}");
    }
}

#[test]
fn an_encoder_in_a_gguf_file_embeds_as_the_folder_does() {
    let vectors = |model: &str, more: &[&str]| {
        let mut command = cairn(["embed", "--dtype", "f32", "--json"]);
        command.args(["a stone", "Stones, and [MASK] more"]).args(more);
        let text = succeed(command.arg("--model").arg(golden("gguf").join(model)));
        serde_json::from_str::<Value>(&text).unwrap()
    };
    // The file says how it pools, the folder does not.
    let file = vectors("bert.gguf", &[]);
    assert_eq!(file["pooling"], "mean");
    assert_eq!(file, vectors("bert", &["--pooling", "mean"]));
    assert_ne!(file, vectors("bert.gguf", &["--pooling", "cls"]));
    let mut command = cairn(["fill-mask", "[MASK]", "--model"]);
    let output = command.arg(golden("gguf").join("bert.gguf")).output().unwrap();
    let text = shown(&output, None);
    assert!(text.contains("was not made to fill masks"), "{text}");
}

#[test]
fn a_gguf_file_is_described() {
    let text = succeed(cairn(["inspect"]).arg(golden("gguf").join("llama.gguf")));
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    assert_eq!(lines[0], "format      GGUF, version 3");
    assert_eq!(lines[1], "family      llama");
    for line in [
        "general.architecture                    a text  llama",
        "llama.attention.layer_norm_rms_epsilon  f32     0.00001",
        "blk.0.attn_q.weight       Q8_0  [64, 32]   2176",
    ] {
        assert!(lines.contains(&line), "{line}\n{text}");
    }
    assert!(lines.last().unwrap().starts_with("12 tensors, "), "{text}");
    let text =
        succeed(cairn(["inspect", "--json"]).arg(golden("gguf").join("tokenizer-qwen2.gguf")));
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(object["metadata"]["tokenizer.ggml.pre"], "qwen2");
    assert!(object["spec"].is_null());
    let text = succeed(cairn(["inspect", "--program"]).arg(golden("gguf").join("llama.gguf")));
    assert!(text.starts_with("program vis/"), "{text}");
}

#[test]
fn a_gguf_file_that_is_cut_short_or_no_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let whole = fs::read(golden("gguf").join("llama.gguf")).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let output = cairn(["inspect"]).arg(&path).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    assert!(text.contains("error: DIR/model.gguf is not a sound GGUF file"), "{text}");
    assert!(text.contains("hint: the file was probably cut short"), "{text}");
    let mut command = cairn(["generate", "--prompt-ids", "1", "--model"]);
    let output = command.arg(golden("gguf").join("blocks.gguf")).output().unwrap();
    let text = shown(&output, None);
    assert!(text.contains("models of architecture 'test' are not read from GGUF files"), "{text}");
    assert!(text.contains("hint: architectures that are read: llama, "), "{text}");
}

#[test]
fn training_does_not_begin_with_a_model_in_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let (gguf, pack) = (golden("gguf").join("llama.gguf"), folder.path().join("model.leanpack"));
    succeed(cairn(["pack", "--quiet"]).arg(golden("llama")).arg("-o").arg(&pack));
    let recipe = golden("../../recipes/continue.toml");
    for (file, what) in [(gguf, "is a GGUF file"), (pack, "is a leanpack")] {
        let mut command = cairn(["train"]);
        let output = command.arg(&recipe).arg("--initial").arg(&file).output().unwrap();
        let text = shown(&output, None);
        let expected = format!("{what}; training begins with a folder");
        assert!(text.contains(&expected) && text.contains("hint: "), "{text}");
    }
}

/// A GGUF file with the tokenizer of the tests' corpus, in the folder of the corpus.
fn beside_a_corpus(template: Option<&str>) -> Workplace {
    let workplace = Workplace::with_corpus();
    let tokenizer = workplace.path().join("data/tiny/tokenizer.json");
    write_llama(&workplace.path().join("model.gguf"), &tokenizer, template);
    workplace
}

#[test]
fn a_gguf_file_is_measured_on_a_corpus_of_its_tokenizer() {
    let workplace = beside_a_corpus(None);
    let eval = ["eval", "--model", "model.gguf", "--corpus", "data/tiny", "--json"];
    let found: Value = serde_json::from_str(&succeed(&mut workplace.cairn(&eval))).unwrap();
    let loss = found["model"]["loss"].as_f64().unwrap();
    // Small random weights know nothing: about the logarithm of the vocabulary.
    assert!((4.5..7.0).contains(&loss), "{loss}");
    let other = ["eval", "--model", "other.gguf", "--corpus", "data/tiny"];
    let tokenizer = golden("tokenizers/byte_level/tokenizer.json");
    write_llama(&workplace.path().join("other.gguf"), &tokenizer, None);
    let text = workplace.failure(&other);
    assert!(text.contains("was made with tokenizer"), "{text}");
}

#[test]
fn a_gguf_file_talks_by_its_own_template() {
    let ask = |workplace: &Workplace, more: &[&str]| {
        let mut command = workplace.cairn(&["chat", "--model", "model.gguf", "--json"]);
        command.args(["--temperature", "0", "--max-new-tokens", "5"]).args(more);
        with_input(&mut command, "stack stones")
    };
    let workplace = beside_a_corpus(Some(TEMPLATE));
    let output = ask(&workplace, &[]);
    assert!(output.status.success(), "{}", shown(&output, None));
    let own: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(own["messages"].as_array().unwrap().len(), 2);
    assert!(own["num_new_tokens"].as_u64() > Some(0), "{own}");
    let workplace = beside_a_corpus(None);
    let text = shown(&ask(&workplace, &[]), Some(workplace.path()));
    assert!(text.contains("model.gguf has no chat template"), "{text}");
    workplace.write("same.jinja", TEMPLATE);
    let output = ask(&workplace, &["--template", "same.jinja"]);
    let given: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(given, own);
}
