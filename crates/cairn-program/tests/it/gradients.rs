//! Every differentiable instruction against finite differences, through the real derivation.
//!
//! The loss is `Σ r · y` for a fixed random `r`. Weight by weight, its derivative along random
//! directions in that weight alone is compared with the central difference of the forward pass, so that
//! a wrong gradient of a small bias cannot hide behind those of large matrices.

use cairn_kernels::{Act, Encoding, ExpertGroups, GroupScore, Layout, Mask, Routing, Scoring};
use cairn_program::{
    AttentionAttrs, BalanceAttrs, Builder, Dim, DimName, DropoutAttrs, Feed, HeadAttrs,
    KvPlacement, Loss, NormAttrs, Op, ProgramId, RopeAttrs, Session, ValueId, ValueType,
    differentiate,
};

use crate::harness::{
    IDS, Noise, dim, fill_weights, hidden, run, session, trainable, with_vectors,
};

/// Step of the central difference: its error is of the order of the square, rounding of the inverse.
const STEP: f32 = 1e-2;
/// Relative to the norm of the weight's gradient; f32 sums of some hundred terms over STEP.
const TOLERANCE: f64 = 5e-3;
/// Directions of each weight.
const DIRECTIONS: u64 = 2;

/// Checks all gradients of `y`, which `build` makes from the vectors `x [t, d]`.
fn check(build: impl Fn(&mut Builder, ValueId) -> ValueId) {
    check_with(&[], build);
}

fn check_with(feeds: &[Feed<'_>], build: impl Fn(&mut Builder, ValueId) -> ValueId) {
    let (mut builder, x) = with_vectors();
    let y = build(&mut builder, x);
    builder.output(y);
    let forward = builder.finish().unwrap();
    let weights = trainable(&forward);
    let name = forward.value(y).name.clone();
    let training = differentiate(&forward, &weights, &Loss::Seeds(vec![name.clone()])).unwrap();

    let mut plain = session(forward, KvPlacement::Arena);
    let mut trained = session(training, KvPlacement::Arena);
    fill_weights(&mut plain, 1);
    fill_weights(&mut trained, 1);
    run(&mut plain, feeds);
    let elements = plain.output(ProgramId(0), &name).len();
    let mut seed = vec![0.0; elements];
    Noise(99).fill(&mut seed);
    let seed_name = format!("d.{name}");
    let mut training_feeds = feeds.to_vec();
    training_feeds.push(Feed::f32(&seed_name, &seed));
    run(&mut trained, &training_feeds);

    let loss = |plain: &mut Session| -> f64 {
        run(plain, feeds);
        let y = plain.output(ProgramId(0), &name);
        y.iter().zip(&seed).map(|(&y, &r)| f64::from(y) * f64::from(r)).sum()
    };
    for (index, weight) in weights.iter().enumerate() {
        let gradient = trained.stored_f32(&format!("grad.{weight}")).unwrap();
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.0, "the gradient of {weight} is zero");
        let original = plain.stored_f32(weight).unwrap().to_vec();
        for direction in 0..DIRECTIONS {
            let mut noise = Noise(1000 + 10 * index as u64 + direction);
            let along: Vec<f32> = original.iter().map(|_| noise.next()).collect();
            let [high, low] = [STEP, -STEP].map(|step| {
                let moved = plain.stored_f32_mut(weight).unwrap().iter_mut();
                for ((w, &from), &along) in moved.zip(&original).zip(&along) {
                    *w = from + step * along;
                }
                loss(&mut plain)
            });
            let expected: f64 =
                gradient.iter().zip(&along).map(|(&g, &a)| f64::from(g) * f64::from(a)).sum();
            let measured = (high - low) / (2.0 * f64::from(STEP));
            let error = (measured - expected).abs() / norm;
            assert!(
                error < TOLERANCE,
                "{weight}: derivative {expected}, finite difference {measured}, norm {norm}"
            );
        }
        plain.stored_f32_mut(weight).unwrap().copy_from_slice(&original);
    }
}

fn matrix(builder: &mut Builder, name: &str, outputs: &[Dim], inputs: &[Dim]) -> ValueId {
    builder.matrix(name, outputs, inputs, (Encoding::F32, Layout::RowMajor))
}

/// `[t, heads, width]` from the vectors.
fn heads(builder: &mut Builder, name: &str, x: ValueId, dims: [Dim; 2]) -> ValueId {
    let w = matrix(builder, &format!("{name}.w"), &dims, &[hidden()]);
    builder.push(name, Op::Matmul, &[x, w]).unwrap()
}

#[test]
fn matmul_with_bias() {
    check(|b, x| {
        let out = dim(DimName::Intermediate, 5);
        let w = matrix(b, "w", &[out], &[hidden()]);
        let bias = b.weight("bias", &[out]);
        b.push("y", Op::Matmul, &[x, w, bias]).unwrap()
    });
}

#[test]
fn head_matmul() {
    check(|b, x| {
        let dims = [dim(DimName::Heads, 3), dim(DimName::HeadDim, 4)];
        let q = heads(b, "q", x, dims);
        let w = b.weight("w", &[dims[0], dim(DimName::Rank, 5), dims[1]]);
        b.push("y", Op::HeadMatmul, &[q, w]).unwrap()
    });
    // By the transposed weight, as queries are brought to the latent.
    check(|b, x| {
        let dims = [dim(DimName::Heads, 3), dim(DimName::HeadDim, 4)];
        let q = heads(b, "q", x, dims);
        let w = b.weight("w", &[dims[0], dims[1], dim(DimName::Rank, 5)]);
        b.push("y", Op::HeadMatmulDx, &[q, w]).unwrap()
    });
}

/// Routing on a router whose choice a small step does not change: its logits are far apart.
fn experts(scoring: Scoring, normalize: Option<f32>, groups: Option<ExpertGroups>) {
    check(|b, x| {
        let (e, f) = (dim(DimName::Experts, 4), dim(DimName::Intermediate, 5));
        let router = matrix(b, "router", &[e], &[hidden()]);
        let logits = b.push("logits", Op::Matmul, &[x, router]).unwrap();
        let routing = Routing { top_k: 2, scoring, groups, normalize, scale: 1.3 };
        let names = [Some("experts"), Some("weights")];
        let routed = b.push_slots(Op::Route(routing), vec![Some(logits), None], &names).unwrap();
        let (experts, weights) = (routed[0].unwrap(), routed[1].unwrap());
        let mut product = |name: &str, x, out: Dim, inputs: Dim| {
            let w = matrix(b, &format!("{name}.w"), &[e, out], &[inputs]);
            b.push(name, Op::ExpertMatmul, &[x, w, experts]).unwrap()
        };
        let (gate, up) = (product("gate", x, f, hidden()), product("up", x, f, hidden()));
        let inner = product("inner", up, f, f);
        let mixed = b.push("mixed", Op::Glu(Act::Silu), &[gate, inner]).unwrap();
        let w = matrix(b, "down.w", &[e, hidden()], &[f]);
        let down = b.push("down", Op::ExpertMatmul, &[mixed, w, experts]).unwrap();
        b.push("y", Op::ExpertSum, &[down, weights]).unwrap()
    });
}

/// A token's rows of its experts, added up as they are.
#[test]
fn a_plain_sum_of_experts() {
    check(|b, x| {
        let e = dim(DimName::Experts, 4);
        let router = matrix(b, "router", &[e], &[hidden()]);
        let logits = b.push("logits", Op::Matmul, &[x, router]).unwrap();
        let scoring = Scoring::Sigmoid;
        let routing = Routing { top_k: 3, scoring, groups: None, normalize: None, scale: 1.0 };
        let names = [Some("experts"), Some("weights")];
        let routed = b.push_slots(Op::Route(routing), vec![Some(logits), None], &names).unwrap();
        let w = matrix(b, "w", &[e, dim(DimName::Intermediate, 5)], &[hidden()]);
        let rows = b.push("rows", Op::ExpertMatmul, &[x, w, routed[0].unwrap()]).unwrap();
        let sum = b.push_slots(Op::ExpertSum, vec![Some(rows), None], &[Some("sum")]).unwrap();
        // The router's weights are in the loss too, or it would have no gradient.
        let same = b.push_slots(Op::ExpertSum, vec![Some(rows), routed[1]], &[Some("weighted")]);
        let same = same.unwrap()[0].unwrap();
        b.push("y", Op::Add, &[sum[0].unwrap(), same]).unwrap()
    });
}

#[test]
fn mixtures_of_experts() {
    let groups = Some(ExpertGroups { count: 2, kept: 1, score: GroupScore::BestTwo });
    experts(Scoring::Softmax, None, None);
    experts(Scoring::Softmax, Some(0.0), None);
    experts(Scoring::Sigmoid, Some(1e-20), groups);
}

/// Two routers whose choices and probabilities are counted together. The choices are given: that a small
/// step changes one is a jump of the loss, and no part of its slope.
#[test]
fn the_loss_that_spreads_tokens_over_experts() {
    let chosen = [0, 1, 0, 2, 1, 0, 3, 0, 0, 1, 2, 3, 1, 2];
    check_with(&[Feed::u32("chosen", &chosen)], |b, x| {
        let e = dim(DimName::Experts, 4);
        let ranks = [Dim::TOKENS, dim(DimName::Chosen, 2)];
        let chosen = b.input("chosen", ValueType::U32, &ranks);
        let mut load = [None, None];
        for layer in 0..2 {
            let router = matrix(b, &format!("router.{layer}"), &[e], &[hidden()]);
            let logits = b.push(&format!("logits.{layer}"), Op::Matmul, &[x, router]).unwrap();
            let names = [format!("choices.{layer}"), format!("mass.{layer}")];
            let names = [Some(names[0].as_str()), Some(names[1].as_str())];
            let slots = vec![Some(logits), Some(chosen), load[0], load[1]];
            let counted = b.push_slots(Op::ExpertLoad, slots, &names).unwrap();
            load = [counted[0], counted[1]];
        }
        let attrs = BalanceAttrs { top_k: 2, coefficient: 3.0 };
        let operands = [load[0].unwrap(), load[1].unwrap()];
        b.push("y", Op::BalanceLoss(attrs), &operands).unwrap()
    });
}

#[test]
fn norms() {
    let attrs = |plus_one| NormAttrs { eps: 1e-5, plus_one };
    for plus_one in [false, true] {
        check(|b, x| {
            let w = b.weight("norm.w", &[hidden()]);
            b.push("y", Op::RmsNorm(attrs(plus_one)), &[x, w]).unwrap()
        });
    }
    check(|b, x| {
        let (w, bias) = (b.weight("norm.w", &[hidden()]), b.weight("bias", &[hidden()]));
        b.push("y", Op::LayerNorm(attrs(false)), &[x, w, bias]).unwrap()
    });
    // ModernBERT's norms have no bias.
    check(|b, x| {
        let w = b.weight("norm.w", &[hidden()]);
        b.push("y", Op::LayerNorm(attrs(false)), &[x, w]).unwrap()
    });
    // A norm over each head, as Qwen3 and Gemma 3 have on queries and keys.
    check(|b, x| {
        let dims = [dim(DimName::Heads, 3), dim(DimName::HeadDim, 4)];
        let q = heads(b, "q", x, dims);
        let w = b.weight("norm.w", &[dims[1]]);
        b.push("y", Op::RmsNorm(attrs(false)), &[q, w]).unwrap()
    });
}

#[test]
fn residual_sums_every_use() {
    check(|b, x| {
        let w = b.weight("norm.w", &[hidden()]);
        let attrs = NormAttrs { eps: 1e-5, plus_one: false };
        let normed = b.push("normed", Op::RmsNorm(attrs), &[x, w]).unwrap();
        let m = matrix(b, "m", &[hidden()], &[hidden()]);
        let fed = b.push("fed", Op::Matmul, &[normed, m]).unwrap();
        let again = b.push("again", Op::Matmul, &[normed, m]).unwrap();
        let sum = b.push("sum", Op::Add, &[fed, again]).unwrap();
        b.push("y", Op::Add, &[x, sum]).unwrap()
    });
}

/// Of eight columns all are rotated, or the first six, or none but two.
#[test]
fn rope_whole_and_partial_in_both_pairings() {
    let frequencies: [&[f32]; 3] = [&[1.0, 0.3, 0.1, 0.03], &[1.0, 0.3, 0.1], &[0.7]];
    let pairings = [false, true];
    for (inv_freq, interleaved) in frequencies.iter().flat_map(|f| pairings.map(|i| (f, i))) {
        check(|b, x| {
            let q = heads(b, "q", x, [dim(DimName::Heads, 3), dim(DimName::HeadDim, 8)]);
            let inv_freq = inv_freq.to_vec();
            let attrs = RopeAttrs { inv_freq, attention_scaling: 1.1, interleaved };
            let positions = b.find("positions").unwrap();
            b.push("y", Op::Rope(attrs), &[q, positions]).unwrap()
        });
    }
}

#[test]
fn elementwise() {
    for op in [Op::Scale(-1.5), Op::Softcap(0.7), Op::Dropout(DropoutAttrs { p: 0.3, site: 2 })] {
        check(|b, x| b.push("y", op.clone(), &[x]).unwrap());
    }
}

/// Every one, alone and as the gate of a GLU. The rectifiers' kinks lie off the inputs.
#[test]
fn activations() {
    for act in [
        Act::Silu,
        Act::Gelu,
        Act::GeluTanh,
        Act::Relu,
        Act::ReluSquared,
        Act::QuickGelu,
        Act::Tanh,
        Act::Sigmoid,
    ] {
        check(|b, x| b.push("y", Op::Activation(act), &[x]).unwrap());
        check(|b, x| {
            let inner = dim(DimName::Intermediate, 6);
            let (g, u) =
                (matrix(b, "g", &[inner], &[hidden()]), matrix(b, "u", &[inner], &[hidden()]));
            let gate = b.push("gate", Op::Matmul, &[x, g]).unwrap();
            let up = b.push("up", Op::Matmul, &[x, u]).unwrap();
            b.push("y", Op::Glu(act), &[gate, up]).unwrap()
        });
    }
}

#[test]
fn lookups() {
    check(|b, x| {
        let w = matrix(b, "w", &[dim(DimName::Positions, 9)], &[hidden()]);
        let positions = b.find("positions").unwrap();
        b.push("y", Op::PositionEmbed, &[x, positions, w]).unwrap()
    });
    check_with(&[Feed::u32("rows", &[5, 0, 5])], |b, x| {
        let rows = b.input("rows", ValueType::U32, &[Dim::OUTPUTS]);
        b.push("y", Op::GatherRows, &[x, rows]).unwrap()
    });
}

/// The loss sees the first half, the second, or both; whatever it sees has columns of both operands.
#[test]
fn concat_and_split() {
    for (seen, widths) in [(&[0][..], (6, 2)), (&[1], (2, 6)), (&[0, 1], (4, 4))] {
        check(|b, x| {
            let h = dim(DimName::Heads, 2);
            let first = heads(b, "first", x, [h, dim(DimName::Rank, 5)]);
            let second = heads(b, "second", x, [h, dim(DimName::HeadDim, 3)]);
            let joined =
                b.push("joined", Op::Concat(DimName::LatentKey), &[first, second]).unwrap();
            let halves =
                Op::Split(dim(DimName::HeadDim, widths.0), dim(DimName::HeadDim, widths.1));
            let names = [Some("left"), Some("right")];
            let parts = b.push_slots(halves, vec![Some(joined)], &names).unwrap();
            let mut wave = |half: usize| {
                let name = format!("wave.{half}");
                b.push(&name, Op::Activation(Act::Silu), &[parts[half].unwrap()]).unwrap()
            };
            match *seen {
                [half] => wave(half),
                _ => {
                    let (left, right) = (wave(0), wave(1));
                    b.push("y", Op::Add, &[left, right]).unwrap()
                }
            }
        });
    }
}

fn attention(mask: Mask, kv_heads: usize, value_dim: usize, softcap: Option<f32>) {
    let some = Some(DropoutAttrs { p: 0.3, site: 1 });
    for dropout in [None, some] {
        check(|b, x| {
            let g = dim(DimName::KvHeads, kv_heads);
            let q = heads(b, "q", x, [dim(DimName::Heads, 4), dim(DimName::HeadDim, 6)]);
            let k = heads(b, "k", x, [g, dim(DimName::HeadDim, 6)]);
            let v = heads(b, "v", x, [g, dim(DimName::HeadDim, value_dim)]);
            let names = [Some("keys"), Some("values")];
            let site = Op::KvWrite { site: 0 };
            let kv = b.push_slots(site, vec![Some(k), Some(v)], &names).unwrap();
            let values_in_keys = false;
            let attrs =
                AttentionAttrs { mask, scale: 0.4, softcap, values_in_keys, value_dim, dropout };
            let inputs = vec![Some(q), kv[0], kv[1]];
            let names = [Some("y"), Some("lse")];
            b.push_slots(Op::Attention(attrs), inputs, &names).unwrap()[0].unwrap()
        });
    }
}

#[test]
fn attention_in_every_form() {
    attention(Mask::CAUSAL, 4, 6, None);
    attention(Mask::CAUSAL, 2, 5, None);
    attention(Mask::CAUSAL, 1, 6, Some(0.8));
    attention(Mask::BIDIRECTIONAL, 2, 6, None);
    attention(Mask { window: Some(2), ..Mask::CAUSAL }, 2, 6, None);
    attention(Mask { prefix: Some(2), ..Mask::CAUSAL }, 4, 6, None);
    attention(Mask { block: Some(2), ..Mask::CAUSAL }, 4, 6, None);
}

/// The values are columns of the keys (MLA), with and without dropout.
#[test]
fn attention_to_latents() {
    for dropout in [None, Some(DropoutAttrs { p: 0.3, site: 1 })] {
        check(|b, x| {
            let q = heads(b, "q", x, [dim(DimName::Heads, 4), dim(DimName::LatentKey, 7)]);
            let k = heads(b, "k", x, [dim(DimName::KvHeads, 1), dim(DimName::LatentKey, 7)]);
            let site = Op::KvWrite { site: 0 };
            let kv = b.push_slots(site, vec![Some(k), None], &[Some("keys")]).unwrap();
            let attrs = AttentionAttrs {
                mask: Mask::CAUSAL,
                scale: 0.4,
                softcap: None,
                values_in_keys: true,
                value_dim: 5,
                dropout,
            };
            let names = [Some("y"), Some("lse")];
            let inputs = vec![Some(q), kv[0], None];
            b.push_slots(Op::Attention(attrs), inputs, &names).unwrap()[0].unwrap()
        });
    }
}

/// One table looks tokens up and makes the logits: its gradient is the sum of both uses.
#[test]
fn tied_weights() {
    check(|b, x| {
        let table = b.find("table").unwrap();
        let wave = b.push("wave", Op::Activation(Act::Tanh), &[x]).unwrap();
        b.push("y", Op::Matmul, &[wave, table]).unwrap()
    });
    let targets: Vec<u32> = IDS.iter().map(|id| (id + 2) % 7).collect();
    check_with(&[Feed::u32("targets", &targets)], |b, x| {
        let table = b.find("table").unwrap();
        let wave = b.push("wave", Op::Activation(Act::Tanh), &[x]).unwrap();
        let targets = b.input("targets", ValueType::U32, &[Dim::TOKENS]);
        let inputs = vec![Some(wave), Some(table), Some(targets)];
        let names = [Some("y"), Some("lse")];
        b.push_slots(Op::TokenLogprob(HeadAttrs::default()), inputs, &names).unwrap()[0].unwrap()
    });
}

#[test]
fn token_logprob_with_a_seed() {
    let targets: Vec<u32> = IDS.iter().map(|id| (id + 2) % 5).collect();
    check_with(&[Feed::u32("targets", &targets)], |b, x| {
        let w = matrix(b, "w", &[dim(DimName::Vocab, 5)], &[hidden()]);
        let targets = b.input("targets", ValueType::U32, &[Dim::TOKENS]);
        let names = [Some("y"), Some("lse")];
        let inputs = vec![Some(x), Some(w), Some(targets)];
        b.push_slots(Op::TokenLogprob(HeadAttrs::default()), inputs, &names).unwrap()[0].unwrap()
    });
}

#[test]
fn token_logprob_with_a_bias_and_a_softcap() {
    let targets: Vec<u32> = IDS.iter().map(|id| (id + 2) % 5).collect();
    check_with(&[Feed::u32("targets", &targets)], |b, x| {
        let w = matrix(b, "w", &[dim(DimName::Vocab, 5)], &[hidden()]);
        let bias = b.weight("bias", &[dim(DimName::Vocab, 5)]);
        let targets = b.input("targets", ValueType::U32, &[Dim::TOKENS]);
        let names = [Some("y"), Some("lse")];
        let inputs = vec![Some(x), Some(w), Some(targets), Some(bias)];
        let op = Op::TokenLogprob(HeadAttrs { softcap: Some(1.5) });
        b.push_slots(op, inputs, &names).unwrap()[0].unwrap()
    });
}

/// The adapter of a head, whose inputs come from the head's.
fn adapted_head(b: &mut Builder, x: ValueId, softcap: Option<f32>) -> ValueId {
    let (vocab, rank) = (dim(DimName::Vocab, 5), dim(DimName::Rank, 2));
    let w = matrix(b, "w", &[vocab], &[hidden()]);
    let (first, second) =
        (matrix(b, "first", &[rank], &[hidden()]), matrix(b, "second", &[vocab], &[rank]));
    let low = b.push("low", Op::Matmul, &[x, first]).unwrap();
    let targets = b.input("targets", ValueType::U32, &[Dim::TOKENS]);
    let inputs = vec![Some(x), Some(w), Some(targets), None, Some(low), Some(second)];
    let op = Op::TokenLogprob(HeadAttrs { softcap });
    b.push_slots(op, inputs, &[Some("y"), Some("lse")]).unwrap()[0].unwrap()
}

#[test]
fn token_logprob_with_an_adapter() {
    let targets: Vec<u32> = IDS.iter().map(|id| (id + 2) % 5).collect();
    for softcap in [None, Some(1.5)] {
        check_with(&[Feed::u32("targets", &targets)], |b, x| adapted_head(b, x, softcap));
    }
}

/// Chains that start from a sum that is read again, and from one that is not.
#[test]
fn matmul_onto_a_sum() {
    check(|b, x| {
        let [v, w, again] =
            ["v", "w", "again"].map(|name| matrix(b, name, &[hidden()], &[hidden()]));
        let base = b.push("base", Op::Matmul, &[x, v]).unwrap();
        let onto = |b: &mut Builder, name: &str, w, sum| {
            let inputs = vec![Some(x), Some(w), None, Some(sum)];
            b.push_slots(Op::Matmul, inputs, &[Some(name)]).unwrap()[0].unwrap()
        };
        let y = onto(b, "first", w, base);
        let y = onto(b, "second", again, y);
        b.push("y", Op::Add, &[y, base]).unwrap()
    });
}

/// The logits of generation and the trainer's log-probabilities are made of the same chains; and where
/// nothing before the head is trained, the head's gradients are the same.
#[test]
fn an_adapted_head_is_the_same_in_training_and_generation() {
    let targets: Vec<u32> = IDS.iter().map(|id| (id + 2) % 5).collect();
    let build = |logits: bool| {
        let (mut b, x) = with_vectors();
        let y = adapted_head(&mut b, x, None);
        b.output(y);
        if logits {
            let [w, low, second] = ["w", "low", "second"].map(|name| b.find(name).unwrap());
            let base = b.push("base", Op::Matmul, &[x, w]).unwrap();
            let inputs = vec![Some(low), Some(second), None, Some(base)];
            let y = b.push_slots(Op::Matmul, inputs, &[Some("logits")]).unwrap()[0].unwrap();
            b.output(y);
        }
        b.finish().unwrap()
    };
    let mut plain = session(build(true), KvPlacement::Arena);
    fill_weights(&mut plain, 1);
    run(&mut plain, &[Feed::u32("targets", &targets)]);
    let logits = plain.output(ProgramId(0), "logits");
    let logprob = plain.output(ProgramId(0), "y");
    for ((row, &target), &logprob) in logits.chunks_exact(5).zip(&targets).zip(logprob) {
        let lse = cairn_kernels::log_sum_exp(&cairn_kernels::Cpu::detect(1), row);
        assert_eq!((row[target as usize] - lse).to_bits(), logprob.to_bits());
    }
    let weights = vec![0.25_f32; IDS.len()];
    let feeds = [Feed::u32("targets", &targets), Feed::f32("loss_weights", &weights)];
    let all = trainable(&build(false));
    let adapter = ["first", "second"].map(str::to_owned).into();
    let mut gradients = [&all, &adapter].map(|trained| {
        let training = differentiate(&build(false), trained, &Loss::CrossEntropy).unwrap();
        let mut session = session(training, KvPlacement::Arena);
        fill_weights(&mut session, 1);
        run(&mut session, &feeds);
        session
    });
    let [all, alone] = &mut gradients;
    for name in ["grad.first", "grad.second"] {
        let found = alone.stored_f32(name).unwrap();
        assert_eq!(all.stored_f32(name).unwrap(), found, "{name}");
        assert!(found.iter().any(|&gradient| gradient != 0.0), "{name}");
    }
    assert!(alone.stored_f32("grad.w").is_none());
}

#[test]
fn norms_over_all_heads() {
    let heads = [dim(DimName::Heads, 2), dim(DimName::HeadDim, 6)];
    for attrs in [false, true].map(|plus_one| NormAttrs { eps: 1e-5, plus_one }) {
        check(|b, x| {
            let w = matrix(b, "w", &heads, &[hidden()]);
            let q = b.push("q", Op::Matmul, &[x, w]).unwrap();
            let scale = b.weight("q_norm", &heads);
            b.push("y", Op::RmsNorm(attrs), &[q, scale]).unwrap()
        });
    }
    check(|b, x| {
        let w = matrix(b, "w", &heads, &[hidden()]);
        let q = b.push("q", Op::Matmul, &[x, w]).unwrap();
        let (scale, shift) = (b.weight("q_norm", &heads), b.weight("shift", &heads));
        let attrs = NormAttrs { eps: 1e-5, plus_one: false };
        b.push("y", Op::LayerNorm(attrs), &[q, scale, shift]).unwrap()
    });
}

#[test]
fn cross_entropy_is_the_seeded_logprob() {
    let targets: Vec<u32> = IDS.iter().map(|id| (id + 2) % 5).collect();
    let weights = [0.1_f32, 0.0, 0.3, 0.2, 0.0, 0.5, 0.7];
    let build = || {
        let (mut b, x) = with_vectors();
        let w = matrix(&mut b, "w", &[dim(DimName::Vocab, 5)], &[hidden()]);
        let targets = b.input("targets", ValueType::U32, &[Dim::TOKENS]);
        let names = [Some("y"), Some("lse")];
        let bias = b.weight("bias", &[dim(DimName::Vocab, 5)]);
        let inputs = vec![Some(x), Some(w), Some(targets), Some(bias)];
        let y = b
            .push_slots(Op::TokenLogprob(HeadAttrs { softcap: Some(2.0) }), inputs, &names)
            .unwrap()[0]
            .unwrap();
        b.output(y);
        b.finish().unwrap()
    };
    let weights_set = trainable(&build());
    let fused = differentiate(&build(), &weights_set, &Loss::CrossEntropy).unwrap();
    let seeded = differentiate(&build(), &weights_set, &Loss::Seeds(vec!["y".into()])).unwrap();
    let mut fused = session(fused, KvPlacement::Arena);
    let mut seeded = session(seeded, KvPlacement::Arena);
    fill_weights(&mut fused, 1);
    fill_weights(&mut seeded, 1);
    let seed: Vec<f32> = weights.iter().map(|w| -w).collect();
    let targets = Feed::u32("targets", &targets);
    run(&mut fused, &[targets, Feed::f32("loss_weights", &weights)]);
    run(&mut seeded, &[targets, Feed::f32("d.y", &seed)]);
    for weight in &weights_set {
        let name = format!("grad.{weight}");
        assert_eq!(fused.stored_f32(&name), seeded.stored_f32(&name), "{weight}");
    }
}

/// The operations that have an adjoint, read off the derivation itself: a new one must be checked here.
#[test]
fn every_differentiable_instruction_is_checked() {
    let derivation = include_str!("../../src/differentiate.rs");
    let (_, body) = derivation.split_once("fn adjoint(").unwrap();
    let (body, _) = body.split_once("\n    }\n").unwrap();
    let arms = body.lines().filter_map(|line| {
        let (pattern, _) = line.trim_start().split_once(" => ")?;
        pattern.starts_with("Op::").then_some(pattern)
    });
    let names: Vec<&str> = arms
        .flat_map(|pattern| pattern.split("Op::").skip(1))
        .map(|rest| rest.split(|c: char| !c.is_alphanumeric()).next().unwrap())
        .collect();
    assert!(names.len() >= 22 && names.contains(&"Attention"), "{names:?}");
    // The lookup of the vectors is the harness's.
    let checks = [include_str!("gradients.rs"), include_str!("harness.rs")].concat();
    for name in names {
        let is_made = |after: char| checks.contains(&format!("Op::{name}{after}"));
        assert!("(, {".chars().any(is_made), "no gradient of {name} is checked");
    }
}
