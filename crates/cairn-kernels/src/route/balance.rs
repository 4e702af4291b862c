//! How a router spreads tokens over experts, and the loss that asks it to spread them evenly.
//!
//! Letters: `t` tokens, `e` experts, `a` experts chosen for a token.
//!
//! The loss is that of Fedus et al. 2022, section 2.2 (<https://arxiv.org/abs/2101.03961>), over the
//! rows of all layers together, as transformers' `load_balancing_loss_func` computes it:
//! `coefficient · e · Σ_e share_e · mean_e`, where `share_e` is how often the expert was chosen a row
//! and `mean_e` the mean of its probability. How often has no gradient; the probability has one.
//!
//! Sums over tokens are one chain in ascending order, so they do not depend on threads. They do depend
//! on which tokens are in the batch: the loss is no sum over tokens.

use super::softmax;
use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes::{at, row_dot, sweep};
use crate::simd::kernel;

/// Counts choices and adds up probabilities.
#[derive(Debug)]
pub struct ExpertLoad<'a> {
    /// The router's product, `[t, e]`.
    pub logits_te: &'a [f32],
    /// The experts of each token, `[t, a]`.
    pub experts_ta: &'a [u32],
    /// Experts.
    pub num_experts: usize,
    /// Choices and probabilities of the layers before, `[e]` each.
    pub before: Option<(&'a [f32], &'a [f32])>,
    /// How often each expert was chosen, `[e]`, overwritten.
    pub choices_e: &'a mut [f32],
    /// The sum of its probabilities, `[e]`, overwritten.
    pub mass_e: &'a mut [f32],
}

/// The gradient of the probabilities of [`ExpertLoad`] for the logits.
#[derive(Debug)]
pub struct ExpertLoadGrad<'a> {
    /// Gradient of the sums, `[e]`.
    pub dmass_e: &'a [f32],
    /// The logits of the forward call, `[t, e]`.
    pub logits_te: &'a [f32],
    /// Gradient of the logits, `[t, e]`, overwritten.
    pub dlogits_te: &'a mut [f32],
}

impl ExpertLoad<'_> {
    fn check(&self) {
        let e = self.num_experts;
        assert!(e > 0 && self.logits_te.len().is_multiple_of(e), "expert_load: logits");
        assert_eq!((self.choices_e.len(), self.mass_e.len()), (e, e), "expert_load: sums");
        let fits = |(choices, mass): (&[f32], &[f32])| choices.len() == e && mass.len() == e;
        assert!(self.before.is_none_or(fits), "expert_load: sums before");
    }

    /// Starts both sums and counts the choices: whole numbers, exact up to 2²⁴.
    fn start(&mut self) {
        match self.before {
            None => {
                self.choices_e.fill(0.0);
                self.mass_e.fill(0.0);
            }
            Some((choices, mass)) => {
                self.choices_e.copy_from_slice(choices);
                self.mass_e.copy_from_slice(mass);
            }
        }
        for &expert in self.experts_ta {
            self.choices_e[expert as usize] += 1.0;
        }
    }
}

kernel! {
    fn add_to<V>(x: &[f32], sum: &mut [f32]) {
        sweep!(sum, i => at::<V>(sum, i) + at::<V>(x, i));
    }
}

kernel! {
    /// `probability · (dmass − Σ dmass · probability)`, the probabilities in `scores`.
    fn mass_slope<V>(dmass: &[f32], scores: &[f32], dlogits: &mut [f32]) {
        let shared = V::splat(row_dot::<V>(dmass, scores));
        sweep!(dlogits, i => at::<V>(scores, i) * (at::<V>(dmass, i) - shared));
    }
}

/// Counts choices and adds up probabilities. See [`expert_load_reference`] for its definition.
pub fn expert_load(cpu: &Cpu, mut args: ExpertLoad<'_>) {
    args.check();
    args.start();
    let ExpertLoad { logits_te, num_experts: e, mass_e, .. } = args;
    let simd = cpu.simd();
    // One task: a row is short, and its sum stands in a chain with that of every other.
    cpu.parallel_chunks(mass_e, e, |_, mass_e, scratch| {
        let [scores] = scratch.f32_parts([e]);
        for logits_e in logits_te.chunks_exact(e) {
            softmax(simd, logits_e, scores);
            add_to(simd, scores, mass_e);
        }
    });
}

/// The gradient of [`expert_load`]. See [`expert_load_grad_reference`] for its definition.
pub fn expert_load_grad(cpu: &Cpu, args: ExpertLoadGrad<'_>) {
    let ExpertLoadGrad { dmass_e, logits_te, dlogits_te } = args;
    let (e, simd) = (dmass_e.len(), cpu.simd());
    assert_eq!(logits_te.len(), dlogits_te.len(), "expert_load_grad: logits");
    assert!(logits_te.len().is_multiple_of(e), "expert_load_grad: rows");
    let outputs = RowSlice::new(dlogits_te, e);
    let rows = logits_te.len() / e;
    parallel_rows(cpu, rows, rows_per_task(e * 8), outputs, |rows, dlogits, scratch| {
        let [scores] = scratch.f32_parts([e]);
        for (row, dlogits_e) in rows.zip(dlogits.chunks_exact_mut(e)) {
            softmax(simd, &logits_te[row * e..][..e], scores);
            mass_slope(simd, dmass_e, scores, dlogits_e);
        }
    });
}

/// A load-balancing loss.
#[derive(Clone, Copy, Debug)]
pub struct Balance {
    /// Experts a row goes to.
    pub top_k: usize,
    /// What the loss is multiplied by.
    pub coefficient: f32,
}

impl Balance {
    /// `coefficient · e / rows²`; nothing was routed where there are no rows.
    fn factor(self, choices_e: &[f32]) -> f32 {
        let rows = choices_e.iter().sum::<f32>() / self.top_k as f32;
        if rows > 0.0 { self.coefficient * choices_e.len() as f32 / (rows * rows) } else { 0.0 }
    }

    /// The loss of rows of all layers together.
    pub fn loss(self, choices_e: &[f32], mass_e: &[f32]) -> f32 {
        let pairs = choices_e.iter().zip(mass_e);
        self.factor(choices_e) * pairs.fold(0.0, |sum, (c, m)| c.mul_add(*m, sum))
    }

    /// The gradient of the loss for the sums of probabilities.
    pub fn loss_grad(self, dloss: f32, choices_e: &[f32], dmass_e: &mut [f32]) {
        let factor = dloss * self.factor(choices_e);
        for (dmass, choices) in dmass_e.iter_mut().zip(choices_e) {
            *dmass = factor * choices;
        }
    }
}

/// Defines [`expert_load`].
pub fn expert_load_reference(mut args: ExpertLoad<'_>) {
    args.check();
    args.start();
    for logits_e in args.logits_te.chunks_exact(args.num_experts) {
        let scores = super::scores_reference(super::Scoring::Softmax, logits_e);
        for (mass, score) in args.mass_e.iter_mut().zip(scores) {
            *mass += score;
        }
    }
}

/// Defines [`expert_load_grad`].
pub fn expert_load_grad_reference(args: ExpertLoadGrad<'_>) {
    let e = args.dmass_e.len();
    let rows = args.logits_te.chunks_exact(e).zip(args.dlogits_te.chunks_exact_mut(e));
    for (logits_e, dlogits_e) in rows {
        let scores = super::scores_reference(super::Scoring::Softmax, logits_e);
        let pairs = args.dmass_e.iter().copied().zip(scores.iter().copied());
        let shared = crate::lanes::dot(pairs);
        for ((dlogit, score), dmass) in dlogits_e.iter_mut().zip(&scores).zip(args.dmass_e) {
            *dlogit = score * (dmass - shared);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::isa::Isa;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn kernels_equal_their_references(
            rows in 0_usize..9,
            e in 1_usize..40,
            top_k in 1_usize..4,
            numbers in proptest::collection::vec(-6.0_f32..6.0, 700),
        ) {
            let top_k = top_k.min(e);
            let logits = &numbers[..rows * e];
            let experts: Vec<u32> =
                (0..rows * top_k).map(|i| u32::try_from((i * 7 + 3) % e).unwrap()).collect();
            let before = (vec![2.0; e], numbers[400..400 + e].to_vec());
            let dmass = &numbers[450..450 + e];
            for before in [None, Some((&before.0[..], &before.1[..]))] {
                let run = |load: &dyn Fn(ExpertLoad<'_>)| {
                    let (mut choices, mut mass) = (vec![9.0; e], vec![9.0; e]);
                    load(ExpertLoad {
                        logits_te: logits,
                        experts_ta: &experts,
                        num_experts: e,
                        before,
                        choices_e: &mut choices,
                        mass_e: &mut mass,
                    });
                    [bits(&choices), bits(&mass)]
                };
                let grad = |slope: &dyn Fn(ExpertLoadGrad<'_>)| {
                    let mut dlogits = vec![9.0; rows * e];
                    slope(ExpertLoadGrad {
                        dmass_e: dmass,
                        logits_te: logits,
                        dlogits_te: &mut dlogits,
                    });
                    bits(&dlogits)
                };
                let expected = run(&|args| expert_load_reference(args));
                let expected_grad = grad(&|args| expert_load_grad_reference(args));
                for isa in Isa::supported() {
                    for threads in [1, 2] {
                        let cpu = Cpu::new(isa, threads);
                        prop_assert_eq!(&run(&|args| expert_load(&cpu, args)), &expected);
                        let found = grad(&|args| expert_load_grad(&cpu, args));
                        prop_assert_eq!(&found, &expected_grad);
                    }
                }
            }
        }
    }

    #[test]
    fn an_even_spread_costs_the_number_of_choices_and_nothing_routed_costs_nothing() {
        let balance = Balance { top_k: 2, coefficient: 1.0 };
        // Four rows to two of four experts each, probabilities a quarter each.
        let even = balance.loss(&[2.0; 4], &[1.0; 4]);
        assert!((even - 2.0).abs() < 1e-6, "{even}");
        let uneven = balance.loss(&[4.0, 4.0, 0.0, 0.0], &[2.0, 2.0, 0.0, 0.0]);
        assert!((uneven - 4.0).abs() < 1e-6, "{uneven}");
        assert!(balance.loss(&[0.0; 4], &[0.0; 4]).to_bits() == 0.0_f32.to_bits());
        let mut slopes = [9.0; 4];
        balance.loss_grad(1.0, &[0.0; 4], &mut slopes);
        assert_eq!(bits(&slopes), bits(&[0.0; 4]));
    }
}
