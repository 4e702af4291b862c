//! Generation as a user sees it.

use crate::{cairn, golden, shown, succeed};

fn generate(arguments: &[&str]) -> std::process::Command {
    let mut command = cairn(["generate", "--model"]);
    command.arg(golden("llama")).args(arguments);
    command
}

fn failure(arguments: &[&str]) -> String {
    shown(&generate(arguments).output().unwrap(), Some(&golden("llama")))
}

#[test]
fn without_a_tokenizer_ids_are_printed() {
    let text = succeed(&mut generate(&["--prompt-ids", "5,6,7", "--max-new-tokens", "4"]));
    let ids: Vec<u32> = text.trim_end().split(',').map(|id| id.parse().unwrap()).collect();
    assert_eq!((ids.len(), &ids[..3]), (7, &[5, 6, 7][..]));
}

#[test]
fn a_seed_decides() {
    let ids = |seed| {
        let arguments = ["--prompt-ids", "5,6,7", "--max-new-tokens", "16", "--seed", seed];
        succeed(&mut generate(&arguments))
    };
    assert_eq!(ids("1"), ids("1"));
    assert_ne!(ids("1"), ids("2"));
}

#[test]
fn stop_tokens_end_the_output() {
    let greedy = ["--prompt-ids", "5,6,7", "--max-new-tokens", "8", "--temperature", "0"];
    let text = succeed(&mut generate(&greedy));
    let third = text.trim_end().split(',').nth(5).unwrap().to_owned();
    let stopped = succeed(generate(&greedy).args(["--stop-token", &third]));
    assert!(text.starts_with(stopped.trim_end()) && stopped.len() < text.len(), "{stopped}");
}

#[test]
fn beams_give_a_score() {
    let mut command = generate(&["--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--beams", "3"]);
    let object: serde_json::Value = serde_json::from_str(&succeed(command.arg("--json"))).unwrap();
    assert_eq!(object["token_ids"].as_array().unwrap().len(), 7);
    assert!(object["score"].as_f64().unwrap() < 0.0);
}

#[test]
fn guessing_ahead_changes_no_token_and_says_what_came_of_it() {
    let draft = format!("draft:{}", golden("llama").display());
    for sampling in [&["--temperature", "0"][..], &["--seed", "3", "--top-p", "0.9"]] {
        let ask = |more: &[&str]| -> serde_json::Value {
            let mut command = generate(&["--prompt-ids", "5,6,7", "--max-new-tokens", "40"]);
            let command = command.args(sampling).args(more).arg("--json");
            serde_json::from_str(&succeed(command)).unwrap()
        };
        let plain = ask(&["--max-num-batched-tokens", "2"]);
        assert!(plain["speculation"].is_null());
        for method in ["ngram", "depth:2", draft.as_str()] {
            let flags = ["--speculative", method, "--num-speculative-tokens", "3"];
            let found = ask(&[&flags[..], &["--speculative-always"]].concat());
            assert_eq!(found["token_ids"], plain["token_ids"], "{method}");
            let count = |name: &str| found["speculation"][name].as_u64().unwrap();
            assert!(count("num_accepted_tokens") <= count("num_draft_tokens"));
            if method == draft {
                // The model guesses for itself: all right.
                assert_eq!(count("num_accepted_tokens"), count("num_draft_tokens"));
                assert_eq!(count("num_accepted_tokens"), 29);
            }
        }
    }
}

#[test]
fn cached_bytes_are_asked_for_by_name() {
    let arguments = ["--prompt-ids", "5,6,7", "--temperature", "0", "--max-new-tokens", "20"];
    let whole = succeed(generate(&arguments).args(["--kv-cache-dtype", "q8"]));
    let pieces = ["--kv-cache-dtype", "q8", "--max-num-batched-tokens", "1"];
    assert_eq!(succeed(generate(&arguments).args(pieces)), whole);
}

#[test]
fn who_cannot_guess_is_refused() {
    insta::assert_snapshot!(failure(&["--prompt-ids", "5", "--speculative", "depth:3"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: depth is 3, which is not between 1 and 2
    hint: depth can be at most 2
    "#);
    let other = format!("draft:{}", golden("gemma2").display());
    let refused = failure(&["--prompt-ids", "5", "--speculative", &other]);
    assert!(refused.contains("the draft model has 96 tokens, the model 320"), "{refused}");
}

#[test]
fn a_prompt_outside_the_vocabulary_is_refused() {
    insta::assert_snapshot!(failure(&["--prompt-ids", "5,999"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: the request is refused
      because: prompt: token 999 at position 1 is not below 320
    hint: is this the tokenizer the model was trained with?
    "#);
}

#[test]
fn text_without_a_tokenizer_is_refused() {
    insta::assert_snapshot!(failure(&["--prompt", "hello"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: DIR has no tokenizer.json
    hint: copy the tokenizer.json that belongs to the model beside its weights
    hint: or continue token ids: cairn generate --prompt-ids 5,6,7
    "#);
}

#[test]
fn too_many_tokens_are_refused() {
    let arguments = ["--prompt-ids", "5,6,7", "--max-new-tokens", "1000"];
    insta::assert_snapshot!(failure(&arguments), @r#"
    exit 1
    --- stdout
    --- stderr
    error: 3 prompt tokens and 1000 new ones are asked for, but the model has 256 positions
    hint: ask for at most 253 new tokens
    "#);
}

#[test]
fn an_impossible_setting_is_refused() {
    insta::assert_snapshot!(failure(&["--prompt-ids", "5", "--top-p", "2"]), @r#"
    exit 1
    --- stdout
    --- stderr
    error: top_p is 2, which is not in (0, 1]
    hint: set top_p to a number in (0, 1]
    "#);
}

#[test]
fn a_prompt_is_required() {
    let text = failure(&[]);
    assert!(text.starts_with("exit 1\n") && text.contains("--prompt-ids <IDS>"), "{text}");
}

#[test]
fn without_a_run_there_is_no_default_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = cairn(["generate", "--prompt", "x"]);
    let output = command.current_dir(folder.path()).output().unwrap();
    insta::assert_snapshot!(shown(&output, None), @r#"
    exit 1
    --- stdout
    --- stderr
    error: there is no run in runs/ to take the model from
    hint: pass --model DIR, or train one: cairn quickstart
    "#);
}

#[test]
fn settings_that_would_do_nothing_are_refused() {
    let text = failure(&["--prompt-ids", "5", "--stop", "x"]);
    assert!(text.starts_with("exit 1\n") && text.contains("--stop-token ID"), "{text}");
    let text = failure(&["--prompt-ids", "5", "--beams", "2", "--temperature", "0.5"]);
    assert!(text.starts_with("exit 1\n") && text.contains("cannot be used with"), "{text}");
}

/// Products in bf16 give the same tokens on every instruction set and number of threads.
#[test]
fn bf16_products_do_not_depend_on_the_machine() {
    let ids = |more: &[&str]| {
        let arguments = ["--prompt-ids", "5,6,7", "--max-new-tokens", "60", "--seed", "3"];
        let mut command = generate(&arguments);
        succeed(command.args(["--weights", "bf16", "--compute-dtype", "bf16"]).args(more))
    };
    let expected = ids(&[]);
    for isa in cairn_kernels::Isa::supported() {
        assert_eq!(ids(&["--threads", "1", "--isa", isa.name()]), expected, "{isa}");
    }
}

#[test]
fn bf16_products_of_other_weights_are_refused() {
    let arguments = ["--prompt-ids", "5,6", "--weights", "f32", "--compute-dtype", "bf16"];
    insta::assert_snapshot!(failure(&arguments), @r#"
    exit 1
    --- stdout
    --- stderr
    error: the model cannot be lowered to a program
      because: bf16 products need weights stored as bf16 or bf16z; these are f32
    hint: hold the weights as bf16 or bf16z, or compute in f32
    "#);
}

#[test]
fn what_no_flag_says_the_models_generation_config_does() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama").join(name), folder.path().join(name)).unwrap();
    }
    let stated = |text: &str| {
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
    };
    let run = |arguments: &[&str]| {
        let mut command = cairn(["generate", "--prompt-ids", "5,6,7", "--max-new-tokens", "16"]);
        let output = command.arg("--model").arg(folder.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", shown(&output, None));
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    };
    let greedy = run(&["--temperature", "0"]).0;
    stated(r#"{"do_sample": false}"#);
    let (text, talk) = run(&[]);
    assert_eq!(text, greedy);
    assert!(talk.contains("Sampling at temperature 0"), "{talk}");
    // One candidate is the likeliest, at any temperature.
    stated(
        r#"{"do_sample": true, "temperature": 1.5, "top_k": 1, "top_p": 0.9, "eta_cutoff": 0.1}"#,
    );
    let (text, talk) = run(&[]);
    assert_eq!(text, greedy);
    assert!(talk.contains("Sampling at temperature 1.5, top_k 1, top_p 0.9"), "{talk}");
    assert!(talk.contains("eta_cutoff") && talk.contains("ignored"), "{talk}");
    // A flag stands before the file, and settings that no flag names stay.
    let (text, talk) = run(&["--top-k", "300"]);
    assert_ne!(text, greedy);
    assert!(talk.contains("temperature 1.5, top_k 300, top_p 0.9"), "{talk}");
    stated(r#"{"bos_token_id": 1}"#);
    let (_, talk) = run(&["--temperature", "0"]);
    assert!(!talk.contains("Sampling"), "{talk}");
}
