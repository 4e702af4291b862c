//! Plans against what is allocated, and what is offered where one does not fit.

use cairn_kernels::Cpu;

use super::*;
use crate::learner::Learner;
use crate::trainer::tests::recipe;

fn plan(overrides: &[&str]) -> Result<Plan, PlanError> {
    let recipe = recipe(overrides);
    let pace = Some(Pace { flops_per_s: 1e9, update_s_per_parameter: 1e-9 });
    let request = PlanRequest { recipe: &recipe, baseline_bytes: 1000, scratch_bytes: 2000, pace };
    Plan::new(&request)
}

fn limit(bytes: u64) -> String {
    format!("run.memory_limit={bytes}")
}

/// Wide rows, so that activations weigh more than weights.
const WIDE: [&str; 2] = ["data.seq_len=256", "batch.micro_batch_size=16"];

#[test]
fn what_is_planned_is_what_is_allocated() {
    for overrides in [&[][..], &WIDE, &["run.recompute=blocks", "run.weights=bf16"]] {
        let plan = plan(overrides).unwrap();
        let learner = Learner::new(plan.memory_plan().unwrap(), Cpu::detect(1)).unwrap();
        assert_eq!(learner.session().bytes(), plan.bytes.session, "{overrides:?}");
        let rest = plan.bytes.scratch + plan.bytes.host + plan.bytes.baseline;
        assert_eq!(plan.bytes.total(), plan.bytes.session.total() as u64 + rest);
    }
}

#[test]
fn automatic_recomputation_is_the_least_that_fits() {
    let deep = [WIDE[0], WIDE[1], "model.num_hidden_layers=5"];
    let mut bytes = 512_u64 << 30;
    let mut flops = 0.0;
    let mut chosen = Vec::new();
    while let Ok(plan) = plan(&[&deep[..], &[&limit(bytes - 1)]].concat()) {
        assert!(plan.bytes.total() < bytes && plan.flops_per_step > flops, "{plan:?}");
        (bytes, flops) = (plan.bytes.total(), plan.flops_per_step);
        chosen.push(plan.shape.recompute);
    }
    // The last block is computed again at once, so dropping it as well need not save anything.
    let expected = policies(&recipe(&deep).model);
    assert!(chosen == expected || chosen == expected[..expected.len() - 1], "{chosen:?}");
}

#[test]
fn recomputation_does_not_count_as_the_models_arithmetic() {
    let none = plan(&["run.recompute=none"]).unwrap();
    let blocks = plan(&["run.recompute=blocks"]).unwrap();
    assert!((none.model_flops_per_step - blocks.model_flops_per_step).abs() < 1.0);
    assert!(none.flops_per_step < blocks.flops_per_step);
    assert!((none.flops_per_step - none.model_flops_per_step).abs() < 1.0);
    // Forward and backward of N weights in products cost 6N a token, attention comes on top.
    let weights = f64::from(2 * (4 * 32 * 32 + 3 * 32 * 64) + 300 * 32);
    let per_token = none.model_flops_per_step / none.tokens_per_step as f64;
    assert!((1.0..1.7).contains(&(per_token / (6.0 * weights))), "{per_token} {weights}");
}

#[test]
fn a_plan_over_the_limit_is_refused_with_the_nearest_that_fits() {
    let asked = plan(&[WIDE[0], WIDE[1], "run.recompute=none"]).unwrap();
    let limit_bytes = asked.bytes.total() / 2;
    let refused = plan(&[WIDE[0], WIDE[1], "run.recompute=none", &limit(limit_bytes)]);
    let Err(PlanError::OverLimit { needed, limit, nearest, .. }) = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!((*needed, *limit), (asked.bytes.total(), limit_bytes));
    let (shape, bytes) = nearest.expect("a smaller micro-batch fits");
    assert_eq!(shape.micro_batch_size * shape.grad_accum_steps, 16);
    assert!(shape.micro_batch_size < 16 && bytes <= limit_bytes);
    let hint = &refused.unwrap_err().hints()[0];
    // What is offered resolves to a plan that fits.
    let offered: Vec<&str> = hint.split(' ').filter(|word| word.contains('=')).collect();
    let limit_setting = format!("run.memory_limit={limit_bytes}");
    let overrides = [&[WIDE[0], &limit_setting][..], &offered].concat();
    let taken = plan(&overrides).unwrap();
    assert!(taken.bytes.total() <= limit_bytes, "{hint}");
}

#[test]
fn a_model_that_never_fits_is_refused_with_the_least_it_takes() {
    let error = plan(&[&limit(5000)]).unwrap_err();
    let PlanError::OverLimit { nearest: None, smallest, .. } = error else { panic!("{error:?}") };
    assert!(smallest > 5000);
    assert!(error.hints()[0].contains(&RoundedBytes(smallest).to_string()), "{error:?}");
}

#[test]
fn time_follows_the_pace() {
    let plan = plan(&[]).unwrap();
    let step = plan.flops_per_step / 1e9 + plan.parameters as f64 * 1e-9;
    let expected = step * plan.total_steps as f64;
    assert!((plan.seconds.unwrap() / expected - 1.0).abs() < 0.05, "{plan:?}");
}
