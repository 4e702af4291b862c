//! What `--help` says, and how soon.

use std::time::{Duration, Instant};

use crate::{cairn, shown, succeed};

/// The help of a command and of all commands below it.
fn helps(command: &[&str]) -> Vec<String> {
    let help = succeed(cairn(command).arg("--help"));
    let below = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = below.take_while(|line| !line.is_empty());
    let names = names.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    let mut all: Vec<String> = names.flat_map(|name| helps(&[command, &[name]].concat())).collect();
    all.push(help);
    all
}

#[test]
fn help_lists_every_command() {
    let help = succeed(&mut cairn(["--help"]));
    insta::assert_snapshot!(help, @r#"
    Text in, a trained model that answers out

    Usage: cairn [OPTIONS] <COMMAND>

    Commands:
      quickstart   Train a small model on real text in a few minutes and let it write
      corpus       Build a corpus from text, look at one, check one
      tokenizer    Train a tokenizer, turn text into ids and back
      plan         Show what a run will take: bytes, FLOPs, minutes
      train        Train a model by a recipe, or go on with a run
      eval         Measure a model on held-out text, beside gzip, xz and zstd
      generate     Continue a prompt
      chat         Talk with a model
      serve        Serve models over HTTP: completions, chats, responses and messages
      embed        Turn texts into vectors, one each
      fill-mask    Guess the masked tokens of texts
      inspect      Show what is in a model, a run or a tensor file
      pack         Pack a model into one file that is loaded as it is
      unpack       Turn a leanpack back into a folder with config.json and safetensors
      verify       Check every byte of a leanpack, or of a model that Cairn saved
      export       Write a model for another engine
      adapter      Add a low-rank adapter to a model's weights, or take it out
      logits       Write the logits and hidden states of token ids
      bench        Measure this machine, the kernels and whole models
      doctor       Show what this machine has, what is missing and which kernels will run
      completions  Print a completion script for a shell

    Options:
      -h, --help     Print help
      -V, --version  Print version

    Global options:
          --threads <N>  Threads to compute with; results do not depend on it [default: all, or
                         `CAIRN_THREADS`]
          --isa <ISA>    Instruction set to compute with; results do not depend on it [default: the
                         widest there is] [possible values: scalar, avx2, avx512]
      -q, --quiet        Print results, warnings and errors only

    Examples:
      cairn quickstart
      cairn generate --prompt 'fn main() {'
      cairn train recipes/llama-12m.toml data.corpus=data/mine
    "#);
}

#[test]
fn every_command_explains_itself_with_examples() {
    let helps = helps(&[]);
    assert!(helps.len() > 30, "{}", helps.len());
    for help in helps {
        assert!(help.contains("Examples:\n  cairn "), "{help}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
}

#[test]
fn help_comes_at_once() {
    let start = || {
        let begin = Instant::now();
        succeed(&mut cairn(["--help"]));
        begin.elapsed()
    };
    // The best of several: the machine has other things to do, too.
    let best = (0..20).map(|_| start()).min().unwrap();
    assert!(best < Duration::from_millis(20), "{best:?}");
}

#[test]
fn completions_are_scripts() {
    for (shell, start) in [("bash", "_cairn()"), ("zsh", "#compdef cairn"), ("fish", "# Print")] {
        let script = succeed(&mut cairn(["completions", shell]));
        assert!(script.starts_with(start), "{shell}: {}", &script[..80]);
    }
    let refused = shown(&cairn(["completions", "tcsh"]).output().unwrap(), None);
    assert!(refused.starts_with("exit 1\n"), "{refused}");
}
