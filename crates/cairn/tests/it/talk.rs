//! What is said besides the results: on a terminal, in a log, and when quiet is asked for.

use crate::shown;
use crate::workplace::Workplace;

#[test]
fn a_line_that_moves_is_for_terminals() {
    let workplace = Workplace::with_corpus();
    let output = workplace.train(&[]).output().unwrap();
    let text = shown(&output, None);
    assert!(text.starts_with("exit 0\n") && text.contains("Saved step 30"), "{text}");
    // A log gets whole lines, the next one after ten seconds, and nothing that moves or colors.
    assert!(!text.contains(['\r', '\x1b']), "{text:?}");
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(" Training ")).collect();
    assert!(lines.len() < 4 && lines[0].contains("Training 1/30  loss "), "{text}");
    for part in ["tokens/s", "of peak", "iB  ", " left"] {
        assert!(lines[0].contains(part), "{part}: {text}");
    }
    let output = workplace.train(&["run.name=quiet", "--quiet"]).output().unwrap();
    assert_eq!(shown(&output, None), "exit 0\n--- stdout\n--- stderr\n");
}
