//! Kernels against references, slopes against differences, and the chunking's invisibility.

use proptest::prelude::*;

use super::*;
use crate::encoding::{Encoding, Layout, encode};
use crate::testing::{
    Numbers, aligned, assert_bits, assert_close, check_bits, check_slope, functional,
};

#[derive(Clone, Copy)]
struct Case<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    targets: &'a [u32],
    /// Gradients of log-probability, log-sum-exp and entropy, of which the last two may be left out; the
    /// first are minus the loss weights.
    grads: [&'a [f32]; 3],
    softcap: Option<f32>,
    bias: Option<&'a [f32]>,
    /// Inputs and matrix of an adapter.
    low_rank: Option<(&'a [f32], &'a [f32])>,
    d: usize,
    row_tokens: usize,
    /// How the head is stored.
    form: (Encoding, Layout),
}

const PLAIN: (Encoding, Layout) = (Encoding::F32, Layout::RowMajor);

/// Log-probability, log-sum-exp, entropy; dx and dw of all three and of cross entropy; its
/// log-probabilities; the gradients of both biases; those of the adapter's inputs and matrix, of both.
fn run(cpu: Option<&Cpu>, case: Case<'_>) -> Vec<Vec<f32>> {
    let Case { x, targets, grads, bias, d, row_tokens, .. } = case;
    let (o, v) = (targets.len(), case.weight.len() / d);
    let (encoding, layout) = case.form;
    let mut bytes = Vec::new();
    let bytes = aligned(Weight::stored_bytes(encoding, layout, v, d), &mut bytes);
    encode(case.form, (v, d), case.weight, bytes);
    let weight = Weight { encoding, layout, n: v, k: d, bytes };
    let rank = case.low_rank.map_or(1, |(_, b)| b.len() / v);
    let head = Head {
        weight,
        bias_v: bias,
        softcap: case.softcap,
        compute: Compute::F32,
        low_rank: case
            .low_rank
            .map(|(low_or, b)| LowRank { low_or, weight: Weight::f32(v, rank, b) }),
    };
    let mut scratch = vec![f32::NAN; head_scratch_len(o, v)];
    let mut out: Vec<Vec<f32>> =
        [o, o, o, o * d, v * d, o * d, v * d, o, v, v].map(|n| vec![0.5; n]).into();
    let (low_len, b_len) = case.low_rank.map_or((0, 0), |(low, b)| (low.len(), b.len()));
    out.extend([low_len, b_len, low_len, b_len].map(|n| vec![0.5; n]));
    let [logprob_o, lse_o, entropy, dx, dw, dx_ce, dw_ce, logprob_ce, db, db_ce, adapter @ ..] =
        out.get_disjoint_mut([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]).unwrap();
    let [dlow, db_low, dlow_ce, db_low_ce] = adapter;
    let args = TokenLogprob {
        x_od: x,
        head,
        targets_o: targets,
        scratch: &mut scratch,
        logprob_o,
        lse_o,
        entropy_o: (!grads[2].is_empty()).then_some(entropy),
    };
    match cpu {
        Some(cpu) => token_logprob(cpu, args),
        None => token_logprob_reference(args),
    }
    let low_rank = |dlow_or, dw_vr| {
        case.low_rank.map(|_| LowRankGrads { dlow_or: Some(dlow_or), dw_vr: Some(dw_vr) })
    };
    let of_logprob = HeadGrads {
        dx_od: Some(dx),
        dw_vd: Some(dw),
        db_v: bias.map(|_| &mut db[..]),
        low_rank: low_rank(&mut dlow[..], &mut db_low[..]),
        accumulate_dw: true,
        row_tokens,
    };
    let of_cross_entropy = HeadGrads {
        dx_od: Some(dx_ce),
        dw_vd: Some(dw_ce),
        db_v: bias.map(|_| &mut db_ce[..]),
        low_rank: low_rank(&mut dlow_ce[..], &mut db_low_ce[..]),
        accumulate_dw: false,
        row_tokens,
    };
    run_gradients(cpu, (head, case), (&mut scratch, logprob_ce), [of_logprob, of_cross_entropy]);
    out
}

/// The adjoint, and the loss with its gradients in one pass.
fn run_gradients(
    cpu: Option<&Cpu>,
    (head, case): (Head<'_>, Case<'_>),
    (scratch, logprob_o): (&mut [f32], &mut [f32]),
    [of_logprob, of_cross_entropy]: [HeadGrads<'_>; 2],
) {
    let Case { x, targets, grads, .. } = case;
    let args = TokenLogprobGrad {
        x_od: x,
        head,
        targets_o: targets,
        dlogprob_o: grads[0],
        dlse_o: (!grads[1].is_empty()).then_some(grads[1]),
        dentropy_o: (!grads[2].is_empty()).then_some(grads[2]),
        scratch,
        grads: of_logprob,
    };
    match cpu {
        Some(cpu) => token_logprob_grad(cpu, args),
        None => token_logprob_grad_reference(args),
    }
    let weights: Vec<f32> = grads[0].iter().map(|grad| -grad).collect();
    let ignored: Vec<u32> =
        targets.iter().zip(&weights).map(|(&t, &w)| if w == 0.0 { u32::MAX } else { t }).collect();
    let args = CrossEntropy {
        x_od: x,
        head,
        targets_o: &ignored,
        weights_o: &weights,
        scratch,
        logprob_o,
        grads: of_cross_entropy,
    };
    match cpu {
        Some(cpu) => cross_entropy(cpu, args),
        None => cross_entropy_reference(args),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn kernels_equal_references(
        o in 0..600_usize, v in 1..80_usize, d in 1..8_usize, row_tokens in 1..600_usize,
        capped: bool, biased: bool, rank in 0..6_usize, left_out in 0..3_usize, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let (x, weight) = (numbers.floats(o * d, 1.0), numbers.floats(v * d, 4.0));
        let targets = numbers.indices(o, v);
        let mut grads = [0, 1, 2].map(|_| numbers.floats(o, 1.0));
        grads[0].iter_mut().step_by(3).for_each(|grad| *grad = 0.0);
        let mut grads = grads.each_ref().map(|grads| &grads[..]);
        grads[1..][..left_out].fill(&[]);
        let softcap = capped.then_some(5.0);
        let bias = numbers.floats(v, 1.0);
        let bias = biased.then_some(&bias[..]);
        let (low, b) = (numbers.floats(o * rank, 1.0), numbers.floats(v * rank, 1.0));
        let low_rank = (rank != 0).then_some((&low[..], &b[..]));
        for form in Encoding::forms() {
            let (x, weight, targets) = (&x, &weight, &targets);
            let case =
                Case { x, weight, targets, grads, softcap, bias, low_rank, d, row_tokens, form };
            check_bits(&format!("head {form:?}"), |cpu| run(cpu, case));
        }
    }
}

#[test]
fn a_row_of_logits_has_the_head_s_log_sum_exp() {
    for v in [1, 15, 16, 17, 320, 1001] {
        // One input of 1 makes the weight the logits.
        let logits = Numbers::new(v as u64).floats(v, 6.0);
        let mut lse = [0.0];
        let mut scratch = vec![0.0; head_scratch_len(1, v)];
        token_logprob_reference(TokenLogprob {
            x_od: &[1.0],
            head: Head {
                weight: Weight::f32(v, 1, &logits),
                bias_v: None,
                softcap: None,
                compute: Compute::F32,
                low_rank: None,
            },
            targets_o: &[0],
            scratch: &mut scratch,
            logprob_o: &mut [0.0],
            lse_o: &mut lse,
            entropy_o: None,
        });
        check_bits("log_sum_exp", |cpu| match cpu {
            Some(cpu) => vec![vec![log_sum_exp(cpu, &logits)]],
            None => vec![lse.to_vec()],
        });
    }
}

#[test]
fn gradients_are_slopes() {
    let mut numbers = Numbers::new(3);
    let (o, v, d) = (6, 21, 5);
    let (x, weight) = (numbers.floats(o * d, 1.0), numbers.floats(v * d, 2.0));
    let targets = numbers.indices(o, v);
    let zeros = vec![0.0; o];
    let some = numbers.floats(o, 1.0);
    let bias = numbers.floats(v, 1.0);
    let (low, b) = (numbers.floats(o * 3, 1.0), numbers.floats(v * 3, 1.0));
    for softcap in [None, Some(3.0)] {
        for which in 0..3 {
            let mut grads = [&zeros[..]; 3];
            grads[which] = &some;
            let case = Case {
                x: &x,
                weight: &weight,
                targets: &targets,
                grads,
                softcap,
                bias: Some(&bias),
                low_rank: Some((&low, &b)),
                d,
                row_tokens: o,
                form: PLAIN,
            };
            let out = run(None, case);
            let loss = |case: Case<'_>| functional(&run(None, case)[which], &some);
            let dw: Vec<f32> = out[4].iter().map(|dw| dw - 0.5).collect();
            let db: Vec<f32> = out[8].iter().map(|db| db - 0.5).collect();
            check_slope("dx", &x, &out[3], 4e-3, 6e-3, |x| loss(Case { x, ..case }));
            check_slope("dw", &weight, &dw, 4e-3, 6e-3, |weight| loss(Case { weight, ..case }));
            check_slope("db", &bias, &db, 4e-3, 6e-3, |bias| {
                loss(Case { bias: Some(bias), ..case })
            });
            check_slope("dlow", &low, &out[10], 4e-3, 6e-3, |low| {
                loss(Case { low_rank: Some((low, &b)), ..case })
            });
            let db_low: Vec<f32> = out[11].iter().map(|db| db - 0.5).collect();
            check_slope("db of the adapter", &b, &db_low, 4e-3, 6e-3, |b| {
                loss(Case { low_rank: Some((&low, b)), ..case })
            });
        }
    }
}

/// An adapter's chains go on from the head's: inputs and weights laid side by side are one head, to the
/// bit, and so are its gradients.
#[test]
fn an_adapter_continues_the_chains_of_the_head() {
    let mut numbers = Numbers::new(7);
    let (o, v, d, rank) = (300, 33, 7, 3);
    let (x, weight) = (numbers.floats(o * d, 1.0), numbers.floats(v * d, 2.0));
    let (low, b) = (numbers.floats(o * rank, 1.0), numbers.floats(v * rank, 2.0));
    let beside = |left: &[f32], right: &[f32]| -> Vec<f32> {
        let rows = left.chunks_exact(d).zip(right.chunks_exact(rank));
        rows.flat_map(|(left, right)| [left, right].concat()).collect()
    };
    let (joined_x, joined_weight) = (beside(&x, &low), beside(&weight, &b));
    let (targets, bias) = (numbers.indices(o, v), numbers.floats(v, 1.0));
    let some = [0; 3].map(|_| numbers.floats(o, 1.0));
    let case = Case {
        x: &x,
        weight: &weight,
        targets: &targets,
        grads: some.each_ref().map(|grads| &grads[..]),
        softcap: Some(5.0),
        bias: Some(&bias),
        low_rank: Some((&low, &b)),
        d,
        row_tokens: 100,
        form: PLAIN,
    };
    let (x, weight) = (&joined_x[..], &joined_weight[..]);
    let whole = Case { x, weight, low_rank: None, d: d + rank, ..case };
    for cpu in [None, Some(Cpu::detect(2))] {
        let (parts, whole) = (run(cpu.as_ref(), case), run(cpu.as_ref(), whole));
        for index in [0, 1, 2, 7, 8, 9] {
            assert_bits(&parts[index], &whole[index], "a figure of a row");
        }
        for (left, right, joined) in [(3, 10, 3), (4, 11, 4), (5, 12, 5), (6, 13, 6)] {
            let found = beside(&parts[left], &parts[right]);
            assert_bits(&found, &whole[joined], "a gradient");
        }
    }
}

#[test]
fn cross_entropy_is_the_gradient_of_weighted_log_probabilities() {
    let mut numbers = Numbers::new(4);
    let (o, v, d) = (300, 33, 7);
    let (x, weight) = (numbers.floats(o * d, 1.0), numbers.floats(v * d, 2.0));
    let targets = numbers.indices(o, v);
    let zeros = vec![0.0; o];
    let mut weights = numbers.floats(o, 1.0);
    weights[7] = 0.0;
    let grads = [&weights[..], &zeros, &zeros];
    let case = Case {
        x: &x,
        weight: &weight,
        targets: &targets,
        grads,
        softcap: None,
        bias: None,
        low_rank: None,
        d,
        row_tokens: 100,
        form: PLAIN,
    };
    let out = run(None, case);
    assert_bits(&out[5], &out[3], "dx");
    for i in (0..o).filter(|&i| i != 7) {
        assert_eq!(out[7][i].to_bits(), out[0][i].to_bits());
    }
    assert_eq!(out[7][7].to_bits(), 0);
    assert!(out[5][7 * d..8 * d].iter().all(|&dx| dx == 0.0));
}

#[test]
fn log_probabilities_are_close_to_f64() {
    let mut numbers = Numbers::new(5);
    let (o, v, d) = (4, 1000, 16);
    let (x, weight) = (numbers.floats(o * d, 1.0), numbers.floats(v * d, 3.0));
    let targets = numbers.indices(o, v);
    let zeros = vec![0.0; o];
    let case = Case {
        x: &x,
        weight: &weight,
        targets: &targets,
        grads: [&zeros; 3],
        softcap: None,
        bias: None,
        low_rank: None,
        d,
        row_tokens: 4,
        form: PLAIN,
    };
    let out = run(None, case);
    for row in 0..o {
        let logits: Vec<f64> = (0..v)
            .map(|t| (0..d).map(|i| f64::from(x[row * d + i]) * f64::from(weight[t * d + i])).sum())
            .collect();
        let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        let entropy: f64 = logits.iter().map(|l| (l - lse).exp() * (lse - l)).sum();
        let exact = [logits[targets[row] as usize] - lse, lse, entropy];
        for (which, exact) in exact.into_iter().enumerate() {
            // Logits up to 15 round to 1e-6; sums over a thousand tokens add a little.
            assert!((f64::from(out[which][row]) - exact).abs() < 1e-5, "{which}: {exact}");
        }
    }
}

#[test]
fn gradients_are_close_to_f64() {
    let mut numbers = Numbers::new(6);
    let (o, v, d) = (300, 77, 9);
    let (x, weight) = (numbers.floats(o * d, 1.0), numbers.floats(v * d, 2.0));
    let (targets, bias) = (numbers.indices(o, v), numbers.floats(v, 1.0));
    let (zeros, some) = (vec![0.0; o], numbers.floats(o, 1.0));
    for softcap in [None, Some(3.0_f32)] {
        let grads = [&some[..], &zeros, &zeros];
        let (row_tokens, form, bias) = (o, PLAIN, Some(&bias[..]));
        let (x, weight, targets) = (&x[..], &weight[..], &targets[..]);
        let low_rank = None;
        let case = Case { x, weight, targets, grads, softcap, bias, low_rank, d, row_tokens, form };
        let out = run(Some(&Cpu::detect(2)), case);
        let number = |x: &[f32], i: usize| f64::from(x[i]);
        let (mut dx, mut dw, mut db) = (vec![0.0; o * d], vec![0.0; v * d], vec![0.0; v]);
        for row in 0..o {
            // Logits and their slopes by what was before the cap.
            let logits: Vec<(f64, f64)> = (0..v)
                .map(|t| {
                    let dot: f64 =
                        (0..d).map(|i| number(x, row * d + i) * number(weight, t * d + i)).sum();
                    let logit = dot + number(bias.unwrap(), t);
                    let Some(cap) = softcap.map(f64::from) else { return (logit, 1.0) };
                    let tanh = (logit / cap).tanh();
                    (cap * tanh, 1.0 - tanh * tanh)
                })
                .collect();
            let sum: f64 = logits.iter().map(|(logit, _)| logit.exp()).sum();
            for (t, (logit, slope)) in logits.into_iter().enumerate() {
                let hit = f64::from(u8::from(targets[row] as usize == t));
                let dlogit = number(&some[..], row) * (hit - logit.exp() / sum) * slope;
                db[t] += dlogit;
                for i in 0..d {
                    dx[row * d + i] += dlogit * number(weight, t * d + i);
                    dw[t * d + i] += dlogit * number(x, row * d + i);
                }
            }
        }
        // Of the adjoint, which adds to 0.5, and of the loss with its gradient in one pass.
        let more = |dw: &[f64]| dw.iter().map(|dw| dw + 0.5).collect::<Vec<f64>>();
        for (name, found, exact) in [
            ("dx", &out[3], dx.clone()),
            ("dw", &out[4], more(&dw)),
            ("db", &out[8], more(&db)),
            ("cross entropy dx", &out[5], dx.clone()),
            ("cross entropy dw", &out[6], dw.clone()),
            ("cross entropy db", &out[9], db.clone()),
        ] {
            assert_close(name, found, &exact, 1e-5);
        }
    }
}
