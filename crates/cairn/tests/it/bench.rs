//! Benchmarks run and print records.

use serde_json::Value;

use crate::workplace::Workplace;
use crate::{cairn, golden, shown, succeed};

fn record(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(cairn(["bench"]).args(arguments).arg("--json")))
        .expect("a record in JSON")
}

#[test]
fn the_machine_is_measured() {
    let peak = record(&["peak"]);
    assert_eq!(
        (peak["what"].as_str(), peak["status"].as_str()),
        (Some("bench peak"), Some("finished"))
    );
    assert!(peak["figures"]["gflops"].as_f64().unwrap() > 0.0);
    assert!(peak["code"]["version"].is_string() && peak["machine"]["num_cpus"].is_u64());
}

#[test]
fn decoding_is_measured_against_the_bandwidth() {
    let folder = golden("llama");
    let arguments = ["decode", "--fresh", "--new-tokens", "8", "--repetitions", "1", "--model"];
    let mut command = cairn(["bench"]);
    command.args(arguments).arg(&folder).arg("--json");
    let record: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
    let share = record["figures"]["bandwidth_share"].as_f64().unwrap();
    assert!(share > 0.0 && share.is_finite());
}

#[test]
fn building_a_corpus_is_measured_and_leaves_nothing() {
    let workplace = Workplace::with_text();
    let before = std::fs::read_dir(workplace.path()).unwrap().count();
    let arguments = ["bench", "corpus", "--input", "text", "--vocab-size", "300", "--json"];
    let mut command = workplace.cairn(&arguments);
    let text = succeed(command.args(["--folder", ".", "--out", "record.json"]));
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["what"], "bench corpus");
    let figure = |name: &str| record["figures"][name].as_f64().unwrap();
    let mut bytes = 0;
    for group in std::fs::read_dir(workplace.path().join("text")).unwrap() {
        for file in std::fs::read_dir(group.unwrap().path()).unwrap() {
            bytes += file.unwrap().metadata().unwrap().len();
        }
    }
    assert_eq!(record["figures"]["text_bytes"], bytes);
    assert_eq!(record["figures"]["documents"], 24);
    let passes = (figure("scan_s") + figure("build_s")) * 100e6 / bytes as f64;
    let expected = figure("tokenizer_s") + passes;
    assert!((figure("seconds_per_100_mb") / expected - 1.0).abs() < 1e-9, "{text}");
    let speed = bytes as f64 / 1e6 / figure("seconds");
    assert!((figure("mb_per_s") / speed - 1.0).abs() < 1e-9, "{text}");
    assert!(figure("peak_resident_bytes") > bytes as f64);
    let parts = figure("scan_s") + figure("tokenizer_s") + figure("build_s");
    assert!((parts - figure("seconds")).abs() < 1e-9, "{text}");
    // Nothing but the record.
    assert_eq!(std::fs::read_dir(workplace.path()).unwrap().count(), before + 1);
    let saved = std::fs::read_to_string(workplace.path().join("record.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&saved).unwrap(), record);
}

#[test]
fn an_unknown_kernel_is_refused() {
    let output = cairn(["bench", "kernels", "--filter", "nonsense"]).output().unwrap();
    insta::assert_snapshot!(shown(&output, None), @r#"
    exit 1
    --- stdout
    --- stderr
    error: no kernel's name contains 'nonsense'
    hint: list them: cairn doctor --kernels
    "#);
}

#[test]
fn kernels_of_an_instruction_set_are_measured_against_its_own_ceilings() {
    let found = record(&["kernels", "--filter", "rms_norm.f32", "--all-isas", "--threads", "1"]);
    let figures = &found["figures"];
    let [ceilings, rows] = ["ceilings", "rows"].map(|key| figures[key].as_array().unwrap());
    assert!(!ceilings.is_empty() && rows.len() == 2 * ceilings.len(), "{figures}");
    for row in rows {
        assert!(row["fraction"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["limit"].is_string(), "{row}");
    }
}

#[test]
fn a_planted_slow_down_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let kernels =
        ["bench", "kernels", "--filter", "rms_norm.f32.scalar", "--isa", "scalar", "--out"];
    succeed(cairn(kernels).arg(path("before.json")));
    let text = std::fs::read_to_string(path("before.json")).unwrap();
    let slower = |factor: f64| {
        let mut record: Value = serde_json::from_str(&text).unwrap();
        let seconds = &mut record["figures"]["rows"][1]["seconds"];
        *seconds = Value::from(seconds.as_f64().unwrap() * factor);
        std::fs::write(path("after.json"), record.to_string()).unwrap();
        cairn(["bench", "compare", &path("before.json"), &path("after.json")]).output().unwrap()
    };
    assert_eq!(slower(1.0).status.code(), Some(0));
    assert_eq!(slower(1.04).status.code(), Some(0));
    let output = slower(1.1);
    let shown = shown(&output, Some(folder.path()));
    assert_eq!(output.status.code(), Some(1), "{shown}");
    assert!(shown.contains("rms_norm.f32.scalar n1 d384"), "{shown}");
    assert!(shown.contains("error: 1 of 2 figures are more than 5 % worse"), "{shown}");
    succeed(&mut cairn(["bench", "peak", "--out", &path("peak.json")]));
    let output =
        cairn(["bench", "compare", &path("before.json"), &path("peak.json")]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be compared"));
}
