//! Ctrl-C and SIGTERM, once and twice, in every command that takes its time: what is said, the exit
//! code, and that nothing is half done.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use crate::running::Running;
use crate::succeed;
use crate::workplace::Workplace;

/// Exit code of what was interrupted before it was done.
const INTERRUPTED: Option<i32> = Some(130);

/// Names in a folder, sorted; none if there is no folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_quickstart_that_is_interrupted_goes_on_where_it_was() {
    let workplace = Workplace::with_text();
    let same = ["quickstart", "--input", "text", "--minutes", "0.25"];
    let mut first = Running::start(&mut workplace.cairn(&same));
    first.wait_for("Training");
    first.signal("INT");
    let (status, said) = first.end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("saved; run it again to go on"), "{said}");
    assert!(!said.contains("Learned"), "{said}");
    let (step, _) = workplace.state("quickstart");
    let total = said.split(" of ").last().unwrap().split(',').next().unwrap().to_owned();

    let (status, said) = Running::start(&mut workplace.cairn(&same)).end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains(&format!("Resuming at step {step} of {total}")), "{said}");
    assert!(said.contains("Learned") && !said.contains("warning"), "{said}");
    let done = workplace.state("quickstart");
    assert_eq!(done.0.to_string(), total);

    let (status, said) = Running::start(&mut workplace.cairn(&same)).end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains(&format!("Complete all {total} steps were done before")), "{said}");
    assert_eq!(workplace.state("quickstart"), done);

    // What the run was not begun with has no influence, and that is said.
    let (_, said) = Running::start(&mut workplace.cairn(&["quickstart", "--minutes", "9"])).end();
    assert!(said.contains("goes on as it was planned: --minutes is for runs"), "{said}");
}

/// Few steps, each of many micro-batches, so that two signals fall into one.
const SLOW: [&str; 4] =
    ["budget.steps=2", "batch.grad_accum_steps=1200", "checkpoint.every=1", "eval.every=0"];

#[test]
fn a_second_interruption_ends_at_once_with_what_was_saved_last() {
    let workplace = Workplace::with_corpus();
    let mut child = Running::start(&mut workplace.train(&SLOW));
    child.wait_for("Saved step 1");
    let saved = workplace.state("tiny");
    // Two signals that wait together are one, so there may have to be more.
    while !child.has_ended() {
        child.signal("INT");
    }
    let (status, said) = child.end();
    assert_eq!(status.code(), INTERRUPTED, "{said}");
    assert!(!said.contains("Stopped") && !said.contains("Saved step 2"), "{said}");
    assert_eq!(workplace.state("tiny"), saved);
    let (status, said) = Running::start(&mut workplace.train(&SLOW)).end();
    assert!(status.success() && said.contains("Resuming at step 1 of 2"), "{said}");
    succeed(workplace.train(&SLOW).arg("run.name=straight"));
    assert_eq!(workplace.state("tiny"), workplace.state("straight"));
}

/// Words that all differ, so that no tokenizer and no compressor is done with them in a moment.
fn long_text(workplace: &Workplace) {
    let mut state = 1_u64;
    for number in 0..80 {
        let text: String = (0..6_000)
            .map(|word| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let end = if word % 8 == 7 { '\n' } else { ' ' };
                format!("{:09x}{end}", state >> 28)
            })
            .collect();
        workplace.write(&format!("long/{number}/words.txt"), &text);
    }
}

#[test]
fn an_interrupted_corpus_build_leaves_nothing_and_can_be_repeated() {
    let workplace = Workplace::with_text();
    long_text(&workplace);
    let build = ["corpus", "build", "--input", "long", "--output", "data/long", "--threads", "1"];
    for (signal, moment) in [("TERM", "Read "), ("INT", "Trained"), ("TERM", "Tokenizing")] {
        let mut child = Running::start(&mut workplace.cairn(&build));
        child.wait_for(moment);
        child.signal(signal);
        let (status, said) = child.end();
        assert_eq!(status.code(), INTERRUPTED, "{moment}: {said}");
        assert!(said.contains("error: interrupted; nothing was written"), "{said}");
        assert_eq!(names(&workplace.path().join("data")), [""; 0], "{moment}");
    }
    // A process that is killed cannot clean up, but nothing has the final name.
    let mut child = Running::start(&mut workplace.cairn(&build));
    child.wait_for("Tokenizing");
    child.signal("KILL");
    assert_eq!(child.end().0.signal(), Some(9));
    assert!(!workplace.path().join("data/long").exists());
    let left = names(&workplace.path().join("data"));
    assert!(matches!(left.as_slice(), [draft] if draft.starts_with("long.tmp-")), "{left:?}");
    let mut again = workplace.cairn(&build);
    let (status, said) = Running::start(again.args(["--vocab-size", "300"])).end();
    assert!(status.success(), "{said}");
    assert!(said.contains(&format!("data/{} was left by a build that was killed", left[0])));
    succeed(&mut workplace.cairn(&["corpus", "verify", "data/long"]));
}

#[test]
fn an_interrupted_evaluation_leaves_the_earlier_record() {
    let workplace = Workplace::with_text();
    long_text(&workplace);
    let build = ["corpus", "build", "--input", "long", "--output", "data/tiny"];
    let split = ["--vocab-size", "300", "--validation-fraction", "0.5", "--quiet"];
    succeed(workplace.cairn(&build).args(split));
    succeed(&mut workplace.train(&["--quiet"]));
    succeed(&mut workplace.cairn(&["eval", "--max-bytes", "20kB", "--quiet"]));
    let record = workplace.path().join("runs/tiny/eval.json");
    let before = std::fs::read(&record).unwrap();
    for signal in ["INT", "TERM"] {
        let mut child = Running::start(&mut workplace.cairn(&["eval"]));
        child.wait_for("compressing one by one");
        child.signal(signal);
        let (status, said) = child.end();
        assert_eq!(status.code(), INTERRUPTED, "{said}");
        assert!(said.contains("error: interrupted; nothing was measured"), "{said}");
        assert_eq!(std::fs::read(&record).unwrap(), before);
    }
    assert!(!names(&workplace.path().join("runs/tiny")).iter().any(|name| name.contains(".tmp-")));
}

/// Whether a signal is ignored by this process and so by its children, as SIGINT is in a job that a
/// script put into the background.
fn is_ignored(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

#[test]
fn an_interrupted_generation_ends_by_the_signal() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["model.max_position_embeddings=110000", "--quiet"]));
    // More text than a pipe holds: it cannot be done before the signal comes.
    let generate = ["generate", "--prompt", "fn ", "--max-new-tokens", "100000", "--ignore-eos"];
    for (name, number) in [("INT", 2), ("TERM", 15)] {
        if is_ignored(number) {
            continue;
        }
        let child = Running::start_and_read(&mut workplace.cairn(&generate));
        child.signal(name);
        // What shells show as 130 and 143.
        let (status, said) = child.end();
        assert_eq!(status.signal(), i32::try_from(number).ok(), "{said}");
    }
}

#[test]
fn two_runs_in_one_folder_are_not_let_in_each_others_way() {
    let workplace = Workplace::with_corpus();
    let long = ["budget.steps=100000", "eval.every=0", "checkpoint.every=100000"];
    let mut first = Running::start(&mut workplace.train(&long));
    first.wait_for("Training");
    let (status, said) = Running::start(&mut workplace.train(&long)).end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("error: another process is training in runs/tiny"), "{said}");
    assert!(said.contains("hint: wait for it, or give this run another folder"), "{said}");
    // The first one has not noticed.
    first.signal("TERM");
    let (status, said) = first.end();
    assert!(status.success() && said.contains("Stopped after step"), "{said}");
    assert_eq!(workplace.checkpoints("tiny").len(), 1);
}
