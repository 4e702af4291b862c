//! Contracts are read whole or refused by key, unlike sides are told apart, and agreement is measured.

use super::*;

const TEXT: &str = r#"
schema = "contract/1"
name = "decode_64_256"
model = { dtype = "bf16" }
machine = { threads = 2, bandwidth_min_gbs = 25.0 }
prompt = { tokens = 64, text = "text/prose.txt" }
output = { tokens = 256 }
"#;

#[test]
fn a_contract_is_read_with_its_defaults() {
    let contract = Contract::parse(TEXT).unwrap();
    assert_eq!((contract.prompt.tokens, contract.output.tokens), (64, 256));
    assert_eq!(contract.measure, ContractMeasure { repetitions: 5, kl_positions: 4 });
    let path = contract.text_path(Path::new("contracts/a.toml"));
    assert_eq!(path, Path::new("contracts/text/prose.txt"));
    let ids: Vec<u32> = (0..70).collect();
    assert_eq!(contract.prompt_of(Path::new("a.toml"), &ids).unwrap(), ids[..64]);
    let short = contract.prompt_of(Path::new("a.toml"), &ids[..63]).unwrap_err();
    assert_eq!(
        short.to_string(),
        "text/prose.txt has 63 tokens for this model, the prompt wants 64"
    );
}

#[test]
fn what_makes_no_sense_is_refused_by_key() {
    for (from, to, expected) in [
        ("contract/1", "contract/2", "the contract's schema is contract/2"),
        ("threads = 2", "threads = 0", "machine.threads is 0, which is not at least 1"),
        ("tokens = 64", "tokens = 0", "prompt.tokens is 0"),
        ("tokens = 256", "tokens = 1", "output.tokens is 1, which is not at least 2"),
        ("threads = 2", "threads = 2, cores = 3", "unknown field `cores`"),
        ("output =", "sampling = { temperature = 0.7 }\noutput =", "sampling.temperature is 0.7"),
        ("output =", "measure = { repetitions = 0 }\noutput =", "measure.repetitions is 0"),
    ] {
        let error = Contract::parse(&TEXT.replace(from, to)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn unlike_sides_are_told_apart() {
    let ours = Ran {
        prompt_tokens: 64,
        output_tokens: 256,
        threads: Some(2),
        weight_bytes: Some(1_000_000),
    };
    let near = Ran { weight_bytes: Some(1_009_000), ..ours.clone() };
    assert_eq!(Evenness::of(&ours, &near), Evenness::default());
    for (theirs, expected) in [
        (Ran { prompt_tokens: 65, ..ours.clone() }, "tokens of the prompt: 64 here, 65 there"),
        (Ran { output_tokens: 9, ..ours.clone() }, "tokens of the output: 256 here, 9 there"),
        (Ran { threads: Some(1), ..ours.clone() }, "threads: 2 here, 1 there"),
        (Ran { threads: None, ..ours.clone() }, "threads: 2 here, unknown there"),
        (
            Ran { weight_bytes: Some(530_000), ..ours.clone() },
            "bytes of weights for a token: 1000000 here, 530000 there",
        ),
        (
            Ran { weight_bytes: None, ..ours.clone() },
            "bytes of weights for a token: 1000000 here, unknown there",
        ),
    ] {
        assert_eq!(Evenness::of(&ours, &theirs).uneven, [expected]);
    }
}

#[test]
fn agreement_is_measured() {
    assert_eq!(first_divergence(&[1, 2, 3], &[1, 2, 3]), None);
    assert_eq!(first_divergence(&[1, 2, 3], &[1, 4, 3]), Some(1));
    assert_eq!(first_divergence(&[1, 2, 3], &[1, 2]), Some(2));
    let [p, q] = [[0.5_f32, 0.25, 0.25, 0.0], [0.25, 0.5, 0.125, 0.125]];
    let logs = |values: [f32; 4]| values.map(f32::ln);
    let expected = 0.5 * 2.0_f64.ln() + 0.25 * 0.5_f64.ln() + 0.25 * 2.0_f64.ln();
    assert!((divergence_of(&logs(p), &logs(q)) - expected).abs() < 1e-7);
    assert!(divergence_of(&logs(p), &logs(p)).abs() < 1e-12);
    let agreement = Agreement { kl: vec![1.0, 3.0], ..Agreement::default() };
    assert_eq!((agreement.kl_mean(), Agreement::default().kl_mean()), (Some(2.0), None));
}
