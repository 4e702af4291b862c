//! Disks that fill: what is said, what is left, and how it goes on.

use std::path::Path;
use std::process::{Command, Output};

use crate::workplace::Workplace;
use crate::{shown, succeed};

/// Runs a script that has a disk of `size` mounted on `folder`, without being root: in a mount
/// namespace of its own. `None`, with a notice, where the system does not allow that.
///
/// In the script `$cairn` is the command and `fill BYTES` leaves so many bytes free.
#[expect(clippy::print_stderr, reason = "a test that is left out says so")]
fn on_small_disk(
    workplace: &Workplace,
    (folder, size): (&str, &str),
    script: &str,
) -> Option<Output> {
    const REFUSED: i32 = 99;
    std::fs::create_dir_all(workplace.path().join(folder)).unwrap();
    let script = format!(
        "mount -t tmpfs -o size={size} none {folder} || exit {REFUSED}
         cairn='{}'
         fill() {{ cat /dev/zero > {folder}/ballast 2>/dev/null; truncate -s -$1 {folder}/ballast; }}
         {script}",
        env!("CARGO_BIN_EXE_cairn"),
    );
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script]);
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    let output = command.current_dir(workplace.path()).env_clear().env("PATH", path).output();
    let refused = match &output {
        Err(_) => true,
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            output.status.code() == Some(REFUSED) || text.starts_with("unshare:")
        }
    };
    if refused {
        eprintln!("skipped: this system mounts no disk without root");
        return None;
    }
    output.ok()
}

#[test]
fn a_disk_that_fills_during_a_checkpoint_leaves_the_last_one() {
    let workplace = Workplace::with_corpus();
    let script = "
        $cairn train tiny.toml --quiet budget.steps=10 || exit 90
        # A checkpoint takes some 300 KiB; what is recorded step by step still fits.
        fill 100K
        $cairn train tiny.toml budget.steps=20 && exit 91
        test ! -e runs/tiny/checkpoints/step-00000020 || exit 92
        test -z \"$(find runs -name '*.tmp-*')\" || exit 93
        $cairn generate --prompt 'fn ' --max-new-tokens 2 --quiet > generated || exit 94
        rm runs/ballast
        $cairn train tiny.toml --resume budget.steps=20 2> resumed || exit 95
        cp runs/tiny/checkpoints/step-00000020/cairn.json manifest.json";
    let Some(output) = on_small_disk(&workplace, ("runs", "4m"), script) else { return };
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 0\n"), "{text}");
    for part in [
        "error: the checkpoint of step 20 could not be saved",
        "because: cannot write runs/tiny/checkpoints/step-00000020/",
        "because: No space left on device",
        "hint: free some space",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let read = |name: &str| std::fs::read_to_string(workplace.path().join(name)).unwrap();
    assert!(read("resumed").contains("Resuming at step 10 of 20"), "{}", read("resumed"));
    // The state is that of a run whose disk had room.
    succeed(&mut workplace.train(&["run.name=roomy", "budget.steps=10"]));
    succeed(&mut workplace.train(&["run.name=roomy", "budget.steps=20"]));
    assert!(read("manifest.json").contains(&workplace.state("roomy").1));
}

#[test]
fn a_disk_that_fills_during_a_step_is_named() {
    let workplace = Workplace::with_corpus();
    let script = "
        $cairn train tiny.toml --quiet budget.steps=10 || exit 90
        fill 4K
        $cairn train tiny.toml budget.steps=300 && exit 91
        rm runs/ballast
        $cairn train tiny.toml --resume --quiet budget.steps=20 || exit 92";
    let Some(output) = on_small_disk(&workplace, ("runs", "4m"), script) else { return };
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("runs/tiny/") && text.contains("No space left on device"), "{text}");
    assert!(text.contains("hint: free some space"), "{text}");
}

#[test]
fn a_disk_that_fills_during_a_shard_leaves_nothing_and_the_build_can_be_repeated() {
    let workplace = Workplace::with_text();
    let build = "corpus build --input text --output data/tiny --vocab-size 300 \
                 --validation-fraction 0.3";
    let script = format!(
        "$cairn {build} && exit 90
         test -z \"$(ls data)\" || exit 91
         mount -o remount,size=4m data || exit 92
         $cairn {build} --quiet || exit 93
         $cairn corpus verify data/tiny"
    );
    let Some(output) = on_small_disk(&workplace, ("data", "12k"), &script) else { return };
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 0\n"), "{text}");
    assert!(text.contains("error: cannot write data/tiny/train-00000.tokens"), "{text}");
    assert!(text.contains("because: No space left on device"), "{text}");
    assert!(text.contains("hint: free some space"), "{text}");
}

/// Where no disk can be mounted, a limit on the size of files (with its signal ignored) is as good.
#[test]
fn a_file_that_cannot_grow_leaves_the_last_checkpoint() {
    let workplace = Workplace::with_corpus();
    succeed(&mut workplace.train(&["budget.steps=10", "--quiet"]));
    let before = workplace.state("tiny");
    let script = "ulimit -f 64; trap '' XFSZ; exec \"$@\"";
    let output = limited(workplace.path(), script, &["train", "tiny.toml", "budget.steps=20"]);
    let text = shown(&output, Some(workplace.path()));
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("error: the checkpoint of step 20 could not be saved"), "{text}");
    assert!(text.contains("because: File too large"), "{text}");
    assert_eq!(workplace.state("tiny"), before);
    succeed(&mut workplace.train(&["budget.steps=20"]));
    assert_eq!(workplace.state("tiny").0, 20);
}

/// The command behind a shell that limits it.
fn limited(folder: &Path, script: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_cairn")]).args(arguments);
    command.env_clear().current_dir(folder).output().unwrap()
}

#[test]
fn threads_that_the_system_does_not_give_are_an_error_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    // Room for the program, not for two megabytes of scratch memory and a stack each.
    let script = "ulimit -v 600000; exec \"$@\"";
    let arguments = ["bench", "peak", "--threads", "1000"];
    let text = shown(&limited(folder.path(), script, &arguments), None);
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("of 1000 threads") || text.contains("1000 threads need"), "{text}");
    assert!(text.contains("hint: ask for fewer threads"), "{text}");
    let text =
        shown(&limited(folder.path(), "exec \"$@\"", &["doctor", "--threads", "4096"]), None);
    assert!(text.starts_with("exit 1\n") && text.contains("hint: choose 1 to 1024"), "{text}");
}
