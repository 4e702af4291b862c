//! Thin slices of what the core must carry: encoded weights in all three uses, multi-head latent
//! attention, a paged cache read by prefill and decode, a frozen encoded suffix.

use cairn_kernels::encoding::encode;
use cairn_kernels::{Encoding, Layout, Mask, SeqSlot, Weight};
use cairn_program::{
    AttentionAttrs, Builder, DimName, Feed, KvPlacement, Loss, NormAttrs, Op, Program, ProgramId,
    Run, Session, ValueId, differentiate,
};

use crate::harness::{
    IDS, Noise, POSITIONS, dim, fill_weights, hidden, run, session, trainable, with_vectors,
};

const ID: ProgramId = ProgramId(0);

/// Encodes noise into a weight and returns the values it decodes to.
fn fill_encoded(session: &mut Session, name: &str, n: usize, seed: u64) -> Vec<f32> {
    let (_, _, value_type, _) = session.persistent().find(|(found, ..)| *found == name).unwrap();
    let (encoding, layout) = (value_type.encoding().unwrap(), value_type.layout());
    let mut values = vec![0.0; n];
    Noise(seed).fill(&mut values);
    let shape = (n / 12, 12);
    encode((encoding, layout), shape, &values, session.stored_mut(name).unwrap());
    let bytes = session.stored(name).unwrap();
    Weight { encoding, layout, n: shape.0, k: shape.1, bytes }.decode(&mut values);
    values
}

/// Vectors from an encoded table, through an encoded product.
fn encoded_program(storage: (Encoding, Layout)) -> Program {
    let (mut b, x) = with_vectors();
    let ids = b.find("ids").unwrap();
    let tied = b.matrix("tied", &[dim(DimName::Vocab, 9)], &[hidden()], storage);
    let gathered = b.push("gathered", Op::Embed, &[ids, tied]).unwrap();
    let sum = b.push("sum", Op::Add, &[x, gathered]).unwrap();
    let y = b.push("y", Op::Matmul, &[sum, tied]).unwrap();
    b.output(y);
    b.finish().unwrap()
}

#[test]
fn an_encoded_weight_serves_forward_input_gradient_and_gather() {
    let plain = (Encoding::F32, Layout::RowMajor);
    for encoding in [Encoding::Bf16, Encoding::Q8, Encoding::Q4, Encoding::Nf4] {
        for &layout in encoding.layouts() {
            let make = |storage| {
                let forward = encoded_program(storage);
                // The table alone trains: `tied` is a frozen suffix that its gradient flows through.
                let weights = [String::from("table")].into();
                let loss = Loss::Seeds(vec!["y".into()]);
                let mut training = differentiate(&forward, &weights, &loss).unwrap();
                let y = training.find("y").unwrap();
                training.outputs = vec![y];
                session(training, KvPlacement::Arena)
            };
            let (mut encoded, mut decoded) = (make((encoding, layout)), make(plain));
            fill_weights(&mut encoded, 4);
            fill_weights(&mut decoded, 4);
            let values = fill_encoded(&mut encoded, "tied", 9 * 12, 77);
            decoded.stored_f32_mut("tied").unwrap().copy_from_slice(&values);
            let mut seed = vec![0.0; 7 * 9];
            Noise(5).fill(&mut seed);
            for session in [&mut encoded, &mut decoded] {
                run(session, &[Feed::f32("d.y", &seed)]);
            }
            let what = format!("{encoding} {}", layout.name());
            assert_eq!(encoded.output(ID, "y"), decoded.output(ID, "y"), "{what} forward");
            let gradient = |session: &Session| session.stored_f32("grad.table").unwrap().to_vec();
            assert!(gradient(&encoded).iter().any(|&g| g != 0.0));
            assert_eq!(gradient(&encoded), gradient(&decoded), "{what} input gradient");
        }
    }
}

#[test]
fn a_quantized_weight_is_not_trained() {
    let forward = encoded_program((Encoding::Q8, Layout::RowMajor));
    let weights = [String::from("tied")].into();
    let error = differentiate(&forward, &weights, &Loss::Seeds(vec!["y".into()])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tied is stored as q8 and cannot be trained; only f32 and bf16 weights can"
    );
}

/// Widths of the latent attention below: heads, latent, rotary part, key part, value.
const MLA: (usize, usize, usize, usize, usize) = (2, 5, 4, 3, 6);

/// Multi-head latent attention in its absorbed form: one key/value head whose key is the latent and
/// the rotary part, and whose value is the latent. DeepSeek-AI 2024, section 2.1.
fn latent_attention() -> Program {
    let (mut b, x) = with_vectors();
    let (heads, latent, rotary, nope, value) = MLA;
    let h = dim(DimName::Heads, heads);
    let one = dim(DimName::KvHeads, 1);
    let storage = (Encoding::F32, Layout::RowMajor);
    let project = |b: &mut Builder, name: &str, dims: [cairn_program::Dim; 2]| {
        let w = b.matrix(&format!("{name}.w"), &dims, &[hidden()], storage);
        b.push(name, Op::Matmul, &[x, w]).unwrap()
    };
    let rope = |b: &mut Builder, name: &str, x: ValueId| {
        let attrs = cairn_program::RopeAttrs {
            inv_freq: vec![1.0, 0.1],
            attention_scaling: 1.0,
            interleaved: true,
        };
        let positions = b.find("positions").unwrap();
        b.push(name, Op::Rope(attrs), &[x, positions]).unwrap()
    };
    let q_nope = project(&mut b, "q_nope", [h, dim(DimName::HeadDim, nope)]);
    let q_rope = project(&mut b, "q_rope", [h, dim(DimName::HeadDim, rotary)]);
    let q_rope = rope(&mut b, "q_rotated", q_rope);
    let c = project(&mut b, "c", [one, dim(DimName::Rank, latent)]);
    let w = b.weight("c.norm", &[dim(DimName::Rank, latent)]);
    let norm = Op::RmsNorm(NormAttrs { eps: 1e-6, plus_one: false });
    let c = b.push("c.normed", norm, &[c, w]).unwrap();
    let k_rope = project(&mut b, "k_rope", [one, dim(DimName::HeadDim, rotary)]);
    let k_rope = rope(&mut b, "k_rotated", k_rope);
    let absorb = b.weight("absorb", &[h, dim(DimName::Rank, latent), dim(DimName::HeadDim, nope)]);
    let q_latent = b.push("q_latent", Op::HeadMatmul, &[q_nope, absorb]).unwrap();
    let joined = Op::Concat(DimName::LatentKey);
    let q = b.push("q", joined.clone(), &[q_latent, q_rope]).unwrap();
    let k = b.push("k", joined, &[c, k_rope]).unwrap();
    let keys = b.push_slots(Op::KvWrite { site: 0 }, vec![Some(k), None], &[Some("keys")]).unwrap();
    let attrs = AttentionAttrs {
        mask: Mask::CAUSAL,
        scale: 0.3,
        softcap: None,
        values_in_keys: true,
        value_dim: latent,
        dropout: None,
    };
    let inputs = vec![Some(q), keys[0], None];
    let out = b.push_slots(Op::Attention(attrs), inputs, &[Some("mixed"), Some("lse")]).unwrap();
    let expand = b.weight("expand", &[h, dim(DimName::HeadDim, value), dim(DimName::Rank, latent)]);
    let y = b.push("y", Op::HeadMatmul, &[out[0].unwrap(), expand]).unwrap();
    b.output(y);
    b.finish().unwrap()
}

/// The expanded form in f64 plain loops: per-head keys and values, as the paper writes it.
fn latent_attention_naive(session: &Session) -> Vec<f64> {
    let (heads, latent, rotary, nope, value) = MLA;
    let weight = |name: &str| -> Vec<f64> {
        session.stored_f32(name).unwrap().iter().map(|&w| f64::from(w)).collect()
    };
    let table = weight("table");
    let project = |name: &str, token: usize| -> Vec<f64> {
        let row = &table[IDS[token] as usize * 12..][..12];
        weight(name).chunks(12).map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum()).collect()
    };
    let rotate = |x: &mut [f64], token: usize| {
        for (pair, freq) in x.chunks_mut(2).zip([1.0, 0.1].iter().cycle()) {
            let (sin, cos) = (f64::from(POSITIONS[token]) * freq).sin_cos();
            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
        }
    };
    let (absorb, expand, norm) = (weight("absorb"), weight("expand"), weight("c.norm"));
    let latents: Vec<Vec<f64>> = (0..7)
        .map(|token| {
            let c = project("c.w", token);
            let mean = c.iter().map(|c| c * c).sum::<f64>() / latent as f64;
            c.iter().zip(&norm).map(|(c, w)| c / (mean + 1e-6).sqrt() * w).collect()
        })
        .collect();
    let mut out = Vec::new();
    for token in 0..7 {
        let first = if token < 4 { 0 } else { 4 };
        let (q_nope, mut q_rope) = (project("q_nope.w", token), project("q_rope.w", token));
        rotate(&mut q_rope, token);
        for head in 0..heads {
            let scores: Vec<f64> = (first..=token)
                .map(|key| {
                    let mut k_rope = project("k_rope.w", key);
                    rotate(&mut k_rope, key);
                    let mut score = 0.0;
                    for i in 0..nope {
                        let k: f64 = (0..latent)
                            .map(|r| absorb[(head * latent + r) * nope + i] * latents[key][r])
                            .sum();
                        score += q_nope[head * nope + i] * k;
                    }
                    for i in 0..rotary {
                        score += q_rope[head * rotary + i] * k_rope[i];
                    }
                    (0.3 * score).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            for o in 0..value {
                let mut y = 0.0;
                for (key, score) in (first..).zip(&scores) {
                    let v: f64 = (0..latent)
                        .map(|r| expand[(head * value + o) * latent + r] * latents[key][r])
                        .sum();
                    y += score / total * v;
                }
                out.push(y);
            }
        }
    }
    out
}

#[test]
fn latent_attention_equals_its_expanded_form() {
    let mut session = session(latent_attention(), KvPlacement::Arena);
    fill_weights(&mut session, 8);
    run(&mut session, &[]);
    let expected = latent_attention_naive(&session);
    let actual = session.output(ID, "y");
    assert_eq!(actual.len(), expected.len());
    for (actual, expected) in actual.iter().zip(expected) {
        assert!((f64::from(*actual) - expected).abs() < 1e-5, "{actual} against {expected}");
    }
}

#[test]
fn latent_attention_has_gradients_for_every_weight() {
    let forward = latent_attention();
    let weights = trainable(&forward);
    let training = differentiate(&forward, &weights, &Loss::Seeds(vec!["y".into()])).unwrap();
    let mut session = session(training, KvPlacement::Arena);
    fill_weights(&mut session, 8);
    let mut seed = vec![0.0; 7 * 2 * 6];
    Noise(3).fill(&mut seed);
    run(&mut session, &[Feed::f32("d.y", &seed)]);
    let derivative = |name: &str| -> Vec<f64> {
        session.stored_f32(&format!("grad.{name}")).unwrap().iter().map(|&g| f64::from(g)).collect()
    };
    let gradients: Vec<(String, Vec<f64>)> =
        weights.iter().map(|name| (name.clone(), derivative(name))).collect();
    let loss = |session: &Session| -> f64 {
        latent_attention_naive(session).iter().zip(&seed).map(|(y, &r)| y * f64::from(r)).sum()
    };
    for (name, gradient) in gradients {
        // The naive form is f64, so a step as small as f32 weights resolve is exact enough.
        let mut sides = [0.0; 2];
        let element = gradient
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
            .map(|(index, _)| index)
            .unwrap();
        let original = session.stored_f32(&name).unwrap()[element];
        for (side, step) in sides.iter_mut().zip([2.0_f32.powi(-10), -(2.0_f32.powi(-10))]) {
            session.stored_f32_mut(&name).unwrap()[element] = original + step;
            *side = loss(&session);
        }
        session.stored_f32_mut(&name).unwrap()[element] = original;
        let measured = (sides[0] - sides[1]) / 2.0_f64.powi(-9);
        let error = (measured - gradient[element]).abs() / gradient[element].abs();
        assert!(error < 1e-3, "{name}: {} against {measured}", gradient[element]);
    }
}

/// Runs tokens `0 .. 7` of one sequence in the given pieces through a paged cache.
fn in_pieces(session: &mut Session, output: &str, pieces: &[usize]) -> Vec<f32> {
    // Blocks out of order: a table that is not the identity.
    let blocks = [5, 2];
    let positions: Vec<u32> = (0..7).collect();
    let mut all = Vec::new();
    let mut done = 0;
    for &piece in pieces {
        let feeds = [
            Feed::u32("ids", &IDS[done..done + piece]),
            Feed::u32("positions", &positions[done..done + piece]),
        ];
        let slot = [SeqSlot { start: 0, len: piece, cached: done, blocks: &blocks }];
        session.run(ID, &Run::forward(&feeds, &slot)).unwrap();
        all.extend_from_slice(session.output(ID, output));
        done += piece;
    }
    all
}

fn check_cache(program: Program) {
    let mut dense = session(program.clone(), KvPlacement::Arena);
    fill_weights(&mut dense, 8);
    let positions: Vec<u32> = (0..7).collect();
    let feeds = [Feed::u32("ids", &IDS), Feed::u32("positions", &positions)];
    let slot = [SeqSlot { start: 0, len: 7, cached: 0, blocks: &[] }];
    dense.run(ID, &Run::forward(&feeds, &slot)).unwrap();
    let expected = dense.output(ID, "y").to_vec();
    let mut paged = session(program, KvPlacement::Paged);
    fill_weights(&mut paged, 8);
    for pieces in [&[7][..], &[1; 7], &[3, 4], &[5, 1, 1]] {
        assert_eq!(in_pieces(&mut paged, "y", pieces), expected, "pieces {pieces:?}");
    }
}

#[test]
fn a_paged_cache_serves_prefill_and_decode_bit_for_bit() {
    let (mut b, x) = with_vectors();
    let storage = (Encoding::F32, Layout::RowMajor);
    let mut project = |name: &str, heads: usize, kind: DimName| {
        let dims = [dim(kind, heads), dim(DimName::HeadDim, 6)];
        let w = b.matrix(&format!("{name}.w"), &dims, &[hidden()], storage);
        b.push(name, Op::Matmul, &[x, w]).unwrap()
    };
    let q = project("q", 4, DimName::Heads);
    let (k, v) = (project("k", 2, DimName::KvHeads), project("v", 2, DimName::KvHeads));
    let names = [Some("keys"), Some("values")];
    let kv = b.push_slots(Op::KvWrite { site: 0 }, vec![Some(k), Some(v)], &names).unwrap();
    let attrs = AttentionAttrs {
        mask: Mask { window: Some(5), ..Mask::CAUSAL },
        scale: 0.4,
        softcap: None,
        values_in_keys: false,
        value_dim: 6,
        dropout: None,
    };
    let inputs = vec![Some(q), kv[0], kv[1]];
    let y = b.push_slots(Op::Attention(attrs), inputs, &[Some("y"), None]).unwrap();
    b.output(y[0].unwrap());
    check_cache(b.finish().unwrap());
}

#[test]
fn the_latent_is_cached_and_read_alike() {
    check_cache(latent_attention());
}
