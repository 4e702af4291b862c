//! Choices are bit-equal, used, explained, and survive storage.

use super::*;
use crate::matmul::{Matmul, matmul};
use crate::testing::every_cpu;

fn case(product: ProductKind, encoding: Encoding) -> TuneCase {
    TuneCase { product, encoding, t: 70, n: 90, k: 430 }
}

/// What a trial of `case` computes with each candidate, the estimate first.
fn outputs(cpu: &Cpu, case: TuneCase, layout: Layout) -> Vec<Vec<u32>> {
    let mut room = vec![0.0; Trial::len_of(case, layout)];
    let mut trial = Trial::new(case, layout, &mut room).unwrap();
    let candidates = case.candidates(cpu);
    assert!(candidates.len() > 1, "{case:?} has nothing to choose from");
    let run = |blocking| {
        trial.run(cpu, blocking);
        trial.output().iter().map(|x| x.to_bits()).collect()
    };
    candidates.iter().map(run).collect()
}

#[test]
fn every_candidate_gives_the_same_bits() {
    let weighted = [ProductKind::Matmul, ProductKind::MatmulDx]
        .into_iter()
        .flat_map(|product| Encoding::forms().into_iter().map(move |form| (product, form)))
        .map(|(product, (encoding, layout))| (product, encoding, layout));
    let in_bf16 =
        Layout::ALL.map(|layout| (ProductKind::MatmulBf16, Encoding::Bf16, layout)).into_iter();
    let plain = (ProductKind::MatmulDw, Encoding::F32, Layout::RowMajor);
    for (product, encoding, layout) in weighted.chain(in_bf16).chain([plain]) {
        for (t, n, k) in [(37, 49, 290), (300, 37, 51), (33, 217, 19)] {
            let case = TuneCase { product, encoding, t, n, k };
            let expected = std::cell::OnceCell::new();
            every_cpu(|cpu| {
                let outputs = outputs(cpu, case, layout);
                // The first candidate of the first handle; whatever it is, the others equal it.
                let first = expected.get_or_init(|| outputs[0].clone());
                let equal = outputs.iter().all(|output| output == first);
                assert!(equal, "{case:?} {layout:?} on {} ×{}", cpu.isa(), cpu.threads());
            });
        }
    }
}

#[test]
fn choices_are_made_once_and_explained() {
    let cpu = Cpu::detect(1);
    let cases =
        [case(ProductKind::Matmul, Encoding::Bf16), case(ProductKind::MatmulDw, Encoding::F32)];
    let mut tuning = Tuning::default();
    let mut lines = Vec::new();
    tuning.measure(&cpu, &cases, |line| lines.push(line.to_owned()));
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("matmul.bf16."), "{}", lines[0]);
    assert_eq!(tuning.explain().len(), 2);
    tuning.measure(&cpu, &cases, |line| panic!("measured again: {line}"));
}

#[test]
fn without_time_the_estimate_is_kept_and_said_to_be_one() {
    let cpu = Cpu::detect(1);
    let small = case(ProductKind::Matmul, Encoding::F32);
    let large = TuneCase { t: 256, n: 640, k: 512, ..small };
    let mut tuning = Tuning::default();
    assert_eq!(tuning.worthwhile(&cpu, &[small, large, large]), [large]);
    let mut room = vec![0.0; Trial::len_of(large, Layout::RowMajor)];
    tuning.measure_within(&cpu, &[small, large], 0.0, &mut room[1..]);
    assert_eq!(tuning.choice(&cpu, large), None, "it did not fit");
    tuning.measure_within(&cpu, &[small, large], 0.0, &mut room);
    let choice = *tuning.choice(&cpu, large).unwrap();
    assert_eq!((choice.blocking, choice.candidates, choice.rounds), (choice.unmeasured, 1, 1));
    assert!(tuning.explain()[0].contains("no time to be sure"), "{:?}", tuning.explain());
    assert_eq!(tuning.choice(&cpu, small), None);
    assert_eq!(tuning.worthwhile(&cpu, &[small, large]), []);
}

#[test]
fn products_use_the_choice() {
    let mut cpu = Cpu::detect(2);
    let case = case(ProductKind::Matmul, Encoding::F32);
    let (x_tk, w_nk) = (vec![0.3; case.t * case.k], vec![0.7; case.n * case.k]);
    let run = |cpu: &Cpu| {
        let mut y_tn = vec![0.0; case.t * case.n];
        let weight = crate::Weight::f32(case.n, case.k, &w_nk);
        let y = &mut y_tn[..];
        let t = case.t;
        let (accumulate, compute) = (false, crate::Compute::F32);
        matmul(cpu, Matmul { x_tk: &x_tk, weight, bias_n: None, y_tn: y, t, accumulate, compute });
        y_tn.iter().map(|y| y.to_bits()).collect::<Vec<_>>()
    };
    let expected = run(&cpu);
    let odd = Blocking { rows: 5, columns: 16, steps: 32 };
    let choice = Choice {
        blocking: odd,
        seconds: 1.0,
        unmeasured: odd,
        unmeasured_seconds: 1.0,
        candidates: 1,
        rounds: 2,
    };
    let mut tuning = Tuning::default();
    tuning.choices.insert(Key::new(case, &cpu), choice);
    assert_eq!(tuning.choice(&cpu, case).map(|choice| choice.blocking), Some(odd));
    cpu.set_tuning(tuning);
    assert_eq!(cpu.tuning().len(), 1);
    assert_eq!(run(&cpu), expected);
}
