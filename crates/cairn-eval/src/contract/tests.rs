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
    assert_eq!(contract.measure, ContractMeasure { repetitions: 5, kl_positions: 4, kl_max: None });
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
        ("output =", "measure = { kl_max = nan }\noutput =", "measure.kl_max is NaN"),
        (
            "dtype = \"bf16\"",
            "even = \"values\"",
            "measure.kl_max is not there, which is needed for even = \"values\"",
        ),
        (
            "dtype = \"bf16\"",
            "even = \"quality\"",
            "measure.kl_positions is 4, which is not at least 8",
        ),
        (
            "output =",
            "measure = { kl_max = 1, kl_positions = 0 }\noutput =",
            "measure.kl_max is 1, which asks for positions",
        ),
    ] {
        let error = Contract::parse(&TEXT.replace(from, to)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn ran() -> Ran {
    Ran {
        prompt_tokens: 64,
        output_tokens: 256,
        threads: Some(2),
        weight_bytes: Some(1_000_000),
        values: Some(vec!["bf16".to_owned()]),
    }
}

fn by(even: Even) -> Contract {
    let mut contract = Contract::parse(TEXT).unwrap();
    contract.model.even = even;
    contract
}

#[test]
fn unlike_sides_are_told_apart() {
    let (ours, nothing) = (ran(), Agreement::default());
    let near = Ran { weight_bytes: Some(1_009_000), ..ours.clone() };
    let uneven = |theirs: &Ran| Evenness::of(&by(Even::Bytes), (&ours, theirs), &nothing).uneven;
    assert!(uneven(&near).is_empty());
    for (theirs, expected) in [
        (Ran { prompt_tokens: 65, ..ran() }, "tokens of the prompt: 64 here, 65 there"),
        (Ran { output_tokens: 9, ..ran() }, "tokens of the output: 256 here, 9 there"),
        (Ran { threads: Some(1), ..ran() }, "threads: 2 here, 1 there"),
        (Ran { threads: None, ..ran() }, "threads: 2 here, unknown there"),
        (
            Ran { weight_bytes: Some(530_000), ..ran() },
            "bytes of weights for a token: 1000000 here, 530000 there",
        ),
        (
            Ran { weight_bytes: None, ..ran() },
            "bytes of weights for a token: 1000000 here, unknown there",
        ),
    ] {
        assert_eq!(uneven(&theirs), [expected]);
    }
}

#[test]
fn equal_values_may_lie_in_other_bytes() {
    let (ours, nothing) = (ran(), Agreement::default());
    let uneven = |theirs: &Ran| Evenness::of(&by(Even::Values), (&ours, theirs), &nothing).uneven;
    assert!(uneven(&Ran { weight_bytes: Some(1_300_000), ..ran() }).is_empty());
    let mixed = Some(vec!["bf16".to_owned(), "q8_0".to_owned()]);
    for (values, said) in [(mixed, "bf16 and q8_0"), (None, "unknown")] {
        let expected = format!("values of the weights: bf16 here, {said} there");
        assert_eq!(uneven(&Ran { values, ..ran() }), [expected]);
    }
    let grouped = Ran { values: Some(vec!["q8_0".to_owned()]), ..ran() };
    let both = Evenness::of(&by(Even::Values), (&grouped, &grouped), &nothing);
    assert_eq!(both.uneven.len(), 1, "two sides need not put values in groups alike");
    let unknown = Ran { values: None, ..ran() };
    let both = Evenness::of(&by(Even::Values), (&unknown, &unknown), &nothing);
    assert_eq!(both.uneven, ["values of the weights: unknown here, unknown there"]);
}

#[test]
fn ours_must_not_be_further_from_the_exact_model() {
    let small = Ran { weight_bytes: Some(1), values: None, ..ran() };
    let uneven = |source_kl: Option<SourceKl>| {
        let said = Agreement { source_kl, ..Agreement::default() };
        Evenness::of(&by(Even::Quality), (&small, &ran()), &said).uneven
    };
    let kl = |ours: &[f64], theirs: &[f64]| {
        Some(SourceKl { ours: ours.to_vec(), theirs: theirs.to_vec() })
    };
    assert!(uneven(kl(&[0.1, 0.3], &[0.2, 0.2])).is_empty());
    let worse = uneven(kl(&[0.1, 0.4], &[0.2, 0.2]));
    assert_eq!(worse, ["nats from the exact model: 2.500e-1 here, 2.000e-1 there"]);
    assert_eq!(uneven(kl(&[], &[])).len(), 1, "nothing measured is nothing shown");
    assert_eq!(uneven(None), ["nats from the exact model: unknown on both sides"]);
}

#[test]
fn different_models_are_not_compared() {
    let mut contract = by(Even::Bytes);
    contract.measure.kl_max = Some(0.1);
    let uneven = |kl: &[f64]| {
        let said = Agreement { kl: kl.to_vec(), ..Agreement::default() };
        Evenness::of(&contract, (&ran(), &ran()), &said).uneven
    };
    assert!(uneven(&[0.05, 0.15]).is_empty());
    let expected = "models: 1.500e-1 nats between the sides, 1.000e-1 are allowed";
    assert_eq!(uneven(&[0.1, 0.2]), [expected]);
    assert_eq!(uneven(&[]).len(), 1, "what nobody measured is not small");
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
