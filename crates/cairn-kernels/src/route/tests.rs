//! The kernel against sorting, gradients against slopes, and what ties and not-a-numbers do.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits, check_slope, every_cpu, functional};

const PLAIN: Routing =
    Routing { top_k: 2, scoring: Scoring::Softmax, groups: None, normalize: Some(0.0), scale: 1.0 };

fn any_routing() -> impl Strategy<Value = (usize, Routing)> {
    let scoring = prop::sample::select(&[Scoring::Softmax, Scoring::Sigmoid][..]);
    let normalize = prop::sample::select(&[None, Some(0.0), Some(1e-20)][..]);
    let group_score = prop::sample::select(&[GroupScore::Best, GroupScore::BestTwo][..]);
    let groups = (1..6_usize, 2..9_usize, group_score, any::<bool>()).prop_flat_map(
        |(count, size, score, limited)| {
            (1..=count).prop_flat_map(move |kept| {
                let groups = limited.then_some(ExpertGroups { count, kept, score });
                let eligible = if limited { kept * size } else { count * size };
                (Just(count * size), Just(groups), 1..=eligible.min(8))
            })
        },
    );
    (scoring, normalize, groups, 0.5..3.0_f32).prop_map(|(scoring, normalize, groups, scale)| {
        let (num_experts, groups, top_k) = groups;
        (num_experts, Routing { top_k, scoring, groups, normalize, scale })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn kernels_equal_references(
        t in 0..30_usize,
        (num_experts, routing) in any_routing(),
        (biased, coarse) in (any::<bool>(), any::<bool>()),
        seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let mut logits = numbers.floats(t * num_experts, 4.0);
        if coarse {
            // Whole numbers: ties everywhere.
            logits.iter_mut().for_each(|logit| *logit = logit.round());
        }
        let bias = numbers.floats(num_experts, 0.3);
        let dweights = numbers.floats(t * routing.top_k, 1.0);
        check_bits("route", |cpu| {
            let mut experts_ta = vec![9; t * routing.top_k];
            let mut weights_ta = vec![9.0; t * routing.top_k];
            let mut dlogits_te = vec![9.0; t * num_experts];
            let args = Route {
                logits_te: &logits,
                bias_e: biased.then_some(&bias[..]),
                routing,
                num_experts,
                experts_ta: &mut experts_ta,
                weights_ta: &mut weights_ta,
            };
            match cpu {
                Some(cpu) => route(cpu, args),
                None => route_reference(args),
            }
            let args = RouteGrad {
                dweights_ta: &dweights,
                logits_te: &logits,
                experts_ta: &experts_ta,
                routing,
                num_experts,
                dlogits_te: &mut dlogits_te,
            };
            match cpu {
                Some(cpu) => route_grad(cpu, args),
                None => route_grad_reference(args),
            }
            let experts = experts_ta.iter().map(|&expert| expert as f32).collect();
            vec![experts, weights_ta, dlogits_te]
        });
    }
}

#[test]
fn gradients_are_slopes() {
    let (t, num_experts) = (3, 8);
    let groups = Some(ExpertGroups { count: 4, kept: 2, score: GroupScore::BestTwo });
    for (scoring, groups, normalize) in [
        (Scoring::Softmax, None, None),
        (Scoring::Softmax, None, Some(0.0)),
        (Scoring::Softmax, groups, Some(0.1)),
        (Scoring::Sigmoid, None, None),
        (Scoring::Sigmoid, groups, Some(1e-20)),
    ] {
        let routing = Routing { top_k: 3, scoring, groups, normalize, scale: 1.7 };
        let mut numbers = Numbers::new(4);
        let logits = numbers.floats(t * num_experts, 2.0);
        let dweights = numbers.floats(t * routing.top_k, 1.0);
        let weigh = |logits_te: &[f32]| {
            let (mut experts, mut weights) = (vec![0; t * 3], vec![0.0; t * 3]);
            let (experts_ta, weights_ta) = (&mut experts[..], &mut weights[..]);
            let args =
                Route { logits_te, bias_e: None, routing, num_experts, experts_ta, weights_ta };
            route_reference(args);
            (experts, weights)
        };
        let experts = weigh(&logits).0;
        let mut dlogits = vec![0.0; t * num_experts];
        route_grad_reference(RouteGrad {
            dweights_ta: &dweights,
            logits_te: &logits,
            experts_ta: &experts,
            routing,
            num_experts,
            dlogits_te: &mut dlogits,
        });
        check_slope("route_grad", &logits, &dlogits, 2e-3, 2e-3, |logits| {
            let (moved, weights) = weigh(logits);
            assert_eq!(moved, experts, "the step is too small to choose otherwise");
            functional(&weights, &dweights)
        });
    }
}

fn chosen(logits_te: &[f32], routing: Routing) -> (Vec<u32>, Vec<f32>) {
    let (mut experts, mut weights) = (vec![0; routing.top_k], vec![0.0; routing.top_k]);
    every_cpu(|cpu| {
        let (mut own, mut own_weights) = (vec![0; routing.top_k], vec![0.0; routing.top_k]);
        route(
            cpu,
            Route {
                logits_te,
                bias_e: None,
                routing,
                num_experts: logits_te.len(),
                experts_ta: &mut own,
                weights_ta: &mut own_weights,
            },
        );
        assert!(own.iter().all(|&expert| (expert as usize) < logits_te.len()));
    });
    let cpu = Cpu::detect(1);
    route(
        &cpu,
        Route {
            logits_te,
            bias_e: None,
            routing,
            num_experts: logits_te.len(),
            experts_ta: &mut experts,
            weights_ta: &mut weights,
        },
    );
    (experts, weights)
}

#[test]
fn ties_go_to_the_lower_number() {
    let (experts, weights) = chosen(&[1.0, 2.0, 2.0, 2.0, 0.0], PLAIN);
    assert_eq!(experts, [1, 2]);
    assert_eq!(weights, [0.5, 0.5]);
}

#[test]
fn whatever_the_logits_the_experts_exist_and_differ() {
    for logits in [
        [f32::NAN; 6],
        [f32::NEG_INFINITY; 6],
        [f32::INFINITY, f32::NAN, 1.0, f32::NEG_INFINITY, f32::INFINITY, 0.0],
    ] {
        for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
            let groups = Some(ExpertGroups { count: 3, kept: 2, score: GroupScore::BestTwo });
            let (mut experts, _) = chosen(&logits, Routing { top_k: 4, scoring, groups, ..PLAIN });
            experts.sort_unstable();
            experts.dedup();
            assert_eq!(experts.len(), 4, "{logits:?}");
        }
    }
}

#[test]
fn what_cannot_be_chosen_is_refused() {
    let groups = |count, kept, score| Some(ExpertGroups { count, kept, score });
    assert!(PLAIN.fits(2) && !PLAIN.fits(1));
    assert!(!Routing { groups: groups(3, 1, GroupScore::Best), ..PLAIN }.fits(8), "unequal");
    assert!(!Routing { groups: groups(8, 1, GroupScore::Best), ..PLAIN }.fits(8), "too few");
    assert!(!Routing { groups: groups(8, 4, GroupScore::BestTwo), ..PLAIN }.fits(8), "pairs");
    assert!(!Routing { groups: groups(0, 0, GroupScore::Best), ..PLAIN }.fits(8), "none");
    assert!(Routing { groups: groups(4, 1, GroupScore::BestTwo), ..PLAIN }.fits(8));
}
