//! Benchmarks run and print records.

use serde_json::Value;

use crate::{cairn, golden, shown, succeed};

fn record(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(cairn(["bench"]).args(arguments).arg("--json"))).unwrap()
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
fn an_unknown_kernel_is_refused() {
    let output = cairn(["bench", "kernels", "nonsense"]).output().unwrap();
    insta::assert_snapshot!(shown(&output, None), @r#"
    exit 1
    --- stdout
    --- stderr
    error: no kernel's name contains 'nonsense'
    hint: list them: cairn doctor --kernels
    "#);
}
