//! Every differentiable instruction against finite differences, through the real derivation.
//!
//! The loss is `Σ r · y` for a fixed random `r`. Its derivative along a random direction in the
//! weights is compared with the central difference of the forward pass.

use cairn_kernels::{Act, Encoding, ExpertGroups, GroupScore, Layout, Mask, Routing, Scoring};
use cairn_program::{
    AttentionAttrs, Builder, Dim, DimName, Feed, HeadAttrs, KvPlacement, Loss, NormAttrs, Op,
    ProgramId, RopeAttrs, ValueId, ValueType, differentiate,
};

use crate::harness::{
    IDS, Noise, dim, fill_weights, hidden, run, session, trainable, with_vectors,
};

/// Step of the central difference: its error is of the order of the square, rounding of the inverse.
const STEP: f32 = 1e-2;
/// Relative to the gradient's norm along the direction; f32 sums of some hundred terms over STEP.
const TOLERANCE: f64 = 5e-3;

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

    let mut expected = 0.0;
    let mut scale = 0.0_f64;
    let mut losses = [0.0_f64; 2];
    for (side, loss) in losses.iter_mut().enumerate() {
        fill_weights(&mut plain, 1);
        for (index, weight) in weights.iter().enumerate() {
            let mut noise = Noise(1000 + index as u64);
            let sign = if side == 0 { STEP } else { -STEP };
            plain
                .stored_f32_mut(weight)
                .unwrap()
                .iter_mut()
                .for_each(|w| *w += sign * noise.next());
        }
        run(&mut plain, feeds);
        let y = plain.output(ProgramId(0), &name);
        *loss = y.iter().zip(&seed).map(|(&y, &r)| f64::from(y) * f64::from(r)).sum();
    }
    for (index, weight) in weights.iter().enumerate() {
        let mut noise = Noise(1000 + index as u64);
        let gradient = trained.stored_f32(&format!("grad.{weight}")).unwrap();
        let part: f64 = gradient.iter().map(|&g| f64::from(g) * f64::from(noise.next())).sum();
        assert!(gradient.iter().any(|&g| g != 0.0), "the gradient of {weight} is zero");
        scale += gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        expected += part;
    }
    let measured = (losses[0] - losses[1]) / (2.0 * f64::from(STEP));
    let error = (measured - expected).abs() / scale.sqrt();
    assert!(error < TOLERANCE, "derivative {expected}, finite difference {measured}");
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

#[test]
fn mixtures_of_experts() {
    let groups = Some(ExpertGroups { count: 2, kept: 1, score: GroupScore::BestTwo });
    experts(Scoring::Softmax, None, None);
    experts(Scoring::Softmax, Some(0.0), None);
    experts(Scoring::Sigmoid, Some(1e-20), groups);
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

#[test]
fn rope_both_pairings() {
    for interleaved in [false, true] {
        check(|b, x| {
            let q = heads(b, "q", x, [dim(DimName::Heads, 3), dim(DimName::HeadDim, 8)]);
            let attrs =
                RopeAttrs { inv_freq: vec![1.0, 0.3, 0.1], attention_scaling: 1.1, interleaved };
            let positions = b.find("positions").unwrap();
            b.push("y", Op::Rope(attrs), &[q, positions]).unwrap()
        });
    }
}

#[test]
fn elementwise() {
    for op in [
        Op::Activation(Act::Silu),
        Op::Activation(Act::Gelu),
        Op::Activation(Act::GeluTanh),
        Op::Activation(Act::QuickGelu),
        Op::Scale(-1.5),
        Op::Softcap(0.7),
        Op::Dropout { p: 0.3, site: 2 },
    ] {
        check(|b, x| b.push("y", op.clone(), &[x]).unwrap());
    }
    check(|b, x| {
        let inner = dim(DimName::Intermediate, 6);
        let (g, u) = (matrix(b, "g", &[inner], &[hidden()]), matrix(b, "u", &[inner], &[hidden()]));
        let gate = b.push("gate", Op::Matmul, &[x, g]).unwrap();
        let up = b.push("up", Op::Matmul, &[x, u]).unwrap();
        b.push("y", Op::Glu(Act::Silu), &[gate, up]).unwrap()
    });
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

#[test]
fn concat_and_split() {
    check(|b, x| {
        let h = dim(DimName::Heads, 2);
        let first = heads(b, "first", x, [h, dim(DimName::Rank, 3)]);
        let second = heads(b, "second", x, [h, dim(DimName::HeadDim, 4)]);
        let joined = b.push("joined", Op::Concat(DimName::LatentKey), &[first, second]).unwrap();
        let halves = Op::Split(dim(DimName::HeadDim, 5), dim(DimName::Rank, 2));
        let names = [Some("left"), Some("right")];
        let parts = b.push_slots(halves, vec![Some(joined)], &names).unwrap();
        b.push("y", Op::Activation(Act::Silu), &[parts[0].unwrap()]).unwrap()
    });
}

fn attention(mask: Mask, kv_heads: usize, value_dim: usize, softcap: Option<f32>) {
    check(|b, x| {
        let g = dim(DimName::KvHeads, kv_heads);
        let q = heads(b, "q", x, [dim(DimName::Heads, 4), dim(DimName::HeadDim, 6)]);
        let k = heads(b, "k", x, [g, dim(DimName::HeadDim, 6)]);
        let v = heads(b, "v", x, [g, dim(DimName::HeadDim, value_dim)]);
        let names = [Some("keys"), Some("values")];
        let site = Op::KvWrite { site: 0 };
        let kv = b.push_slots(site, vec![Some(k), Some(v)], &names).unwrap();
        let attrs = AttentionAttrs { mask, scale: 0.4, softcap, values_in_keys: false, value_dim };
        let inputs = vec![Some(q), kv[0], kv[1]];
        let names = [Some("y"), Some("lse")];
        b.push_slots(Op::Attention(attrs), inputs, &names).unwrap()[0].unwrap()
    });
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
