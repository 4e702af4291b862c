//! Runs that are interrupted and killed: wherever that is, they end where an undisturbed run ends.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::workplace::Workplace;
use crate::{cairn, shown, succeed};

/// Starts a run and waits for its first checkpoint.
fn start(workplace: &Workplace, arguments: &[&str], run: &str) -> Child {
    let child = spawn(workplace, arguments);
    while workplace.checkpoints(run).is_empty() {
        std::thread::yield_now();
    }
    child
}

fn spawn(workplace: &Workplace, arguments: &[&str]) -> Child {
    let mut command = workplace.train(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Long enough that a signal comes before the end.
const LONG: [&str; 3] = ["budget.steps=400", "checkpoint.every=100", "eval.every=0"];

fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    let status = Command::new("kill").args(["-s", name, &id]).status().unwrap();
    assert!(status.success());
}

#[test]
fn an_interrupted_run_saves_and_goes_on_to_the_same_state() {
    let workplace = Workplace::with_corpus();
    succeed(workplace.train(&LONG).arg("run.name=straight"));
    for (name, run) in [("INT", "interrupted"), ("TERM", "terminated")] {
        let named = format!("run.name={run}");
        let settings = [&LONG[..], &[named.as_str()]].concat();
        let child = start(&workplace, &settings, run);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let text = shown(&output, None);
        assert!(text.starts_with("exit 0\n") && text.contains("Stopped after step"), "{text}");
        let (step, _) = workplace.state(run);
        assert!((100..400).contains(&step), "stopped at {step}");
        let resumed = workplace.train(&settings).arg("--resume").output().unwrap();
        assert!(shown(&resumed, None).contains(&format!("Resuming at step {step} of 400")));
        assert_eq!(workplace.state(run), workplace.state("straight"));
    }
}

/// Many checkpoints and validations, so that there is much to be killed in.
const BUSY: [&str; 3] = ["budget.steps=300", "checkpoint.every=20", "eval.every=60"];
/// Kills of the run below; half of them wait for a checkpoint that is being written.
const KILLS: u64 = 10;

/// Numbers that look random and are the same every time: splitmix64.
fn drawn(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Whether a folder of checkpoints holds one that is not finished, or one that is being removed.
fn is_writing(workplace: &Workplace) -> bool {
    let Ok(entries) = std::fs::read_dir(workplace.checkpoints_folder("tiny")) else { return false };
    entries
        .filter_map(Result::ok)
        .any(|entry| entry.file_name().to_string_lossy().contains(".tmp-"))
}

/// Runs until `is_time`, then kills; `None` if the run ended before.
fn run_and_kill(workplace: &Workplace, is_time: impl Fn() -> bool) -> Option<()> {
    let mut child = spawn(workplace, &BUSY);
    loop {
        if is_time() {
            child.kill().unwrap();
            child.wait().unwrap();
            return Some(());
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{}", shown(&child.wait_with_output().unwrap(), None));
            return None;
        }
        std::thread::yield_now();
    }
}

/// What a run recorded: every step's loss and every validation's, as written, by step and kind.
fn losses(workplace: &Workplace, run: &str) -> BTreeMap<(u64, String), Value> {
    let mut found = BTreeMap::new();
    for line in workplace.metrics(run) {
        let kind = line["kind"].as_str().unwrap().to_owned();
        let key = (line["step"].as_u64().unwrap(), kind);
        let twice = found.insert(key.clone(), line["loss"].clone());
        assert!(twice.is_none(), "{key:?} is recorded twice");
    }
    found
}

#[test]
fn a_run_killed_again_and_again_ends_where_an_undisturbed_one_does() {
    let workplace = Workplace::with_corpus();
    succeed(workplace.train(&BUSY).arg("run.name=straight"));
    let mut killed_writing = 0;
    for kill in 0..KILLS {
        let killed = if kill % 2 == 0 {
            // Steps beyond those of the last checkpoint, so that some are done again.
            let steps = workplace.metrics("tiny").len() as u64 + drawn(kill) % 30;
            run_and_kill(&workplace, || workplace.metrics("tiny").len() as u64 > steps)
        } else {
            // What the kill before left has to go before something new is being written.
            let fresh = std::cell::Cell::new(false);
            run_and_kill(&workplace, || {
                let writing = is_writing(&workplace);
                fresh.set(fresh.get() || !writing);
                writing && fresh.get()
            })
        };
        if killed.is_none() {
            break;
        }
        killed_writing += u32::from(is_writing(&workplace));
    }
    assert!(killed_writing > 0, "no kill fell into the writing of a checkpoint");
    succeed(&mut workplace.train(&BUSY));
    assert_eq!(workplace.state("tiny"), workplace.state("straight"));
    assert_eq!(losses(&workplace, "tiny"), losses(&workplace, "straight"));
    assert!(!is_writing(&workplace), "what the killed left is cleaned up");
}

#[test]
fn the_state_depends_on_neither_threads_nor_instruction_set() {
    let workplace = Workplace::with_corpus();
    let machine: Value = serde_json::from_str(&succeed(&mut cairn(["doctor", "--json"]))).unwrap();
    let sets = machine["machine"]["instruction_sets"].as_array().unwrap();
    succeed(&mut workplace.train(&["run.name=plain"]));
    for set in ["scalar", "avx2", "avx512"] {
        for threads in ["1", "2"] {
            let name = format!("{set}-{threads}");
            let arguments = [&format!("run.name={name}")[..], "--isa", set, "--threads", threads];
            let output = workplace.train(&arguments).output().unwrap();
            let text = shown(&output, None);
            if sets.iter().any(|supported| supported == set) {
                assert!(text.starts_with("exit 0\n"), "{text}");
                assert_eq!(workplace.state(&name), workplace.state("plain"), "{name}");
                assert_eq!(losses(&workplace, &name), losses(&workplace, "plain"), "{name}");
            } else {
                assert!(text.starts_with("exit 1\n") && text.contains("does not have"), "{text}");
            }
        }
    }
    let text = shown(&workplace.train(&["--isa", "neon"]).output().unwrap(), None);
    assert!(text.starts_with("exit 1\n") && text.contains("[possible values: scalar"), "{text}");
}
