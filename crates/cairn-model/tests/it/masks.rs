//! Every form of attention with every mask that a spec can say, against loops in `f64` that know nothing
//! of tiles, caches or the absorbed form: all heads' keys and values are written out.

use cairn_kernels::Cpu;
use cairn_model::{BuildOptions, Head, build_program, init_weights};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::ModelSpec;
use cairn_spec::model::{
    Attention, AttentionForm, MaskKind, Position, Rope, RopeScaling, SlidingWindow, WindowedLayers,
};

use crate::goldens::{positions, slots, spec};

/// Longer than a tile of keys.
const TOKENS: usize = 70;
const LAYER: &str = "model.layers.0.";

/// A matrix of the session's weights, or a vector, as `f64`.
struct Weights<'a>(&'a Session);

impl Weights<'_> {
    fn of(&self, module: &str) -> Vec<f64> {
        let name = format!("{LAYER}{module}.weight");
        let (bytes, _) = self.0.stored(&name).unwrap().as_chunks::<4>();
        bytes.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect()
    }

    /// The projection of every row of `x`.
    fn project(&self, module: &str, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        product(&self.of(module), x)
    }
}

fn product(w: &[f64], x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let of_row = |x: &Vec<f64>| w.chunks(x.len()).map(|w| dot(w, x)).collect();
    x.iter().map(of_row).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + eps).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// A head at a position, rotated.
fn rotated(x: &[f64], position: usize, rope: &Rope) -> Vec<f64> {
    let freqs = rope.inv_freq_for(0);
    let (half, mut out) = (x.len() / 2, x.to_vec());
    for (i, freq) in freqs.iter().enumerate() {
        let (a, b) = if rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (sin, cos) = (position as f64 * f64::from(*freq)).sin_cos();
        (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin);
    }
    out
}

/// Queries, keys and values: `[token][head]`, a key and a value for every query head.
type Heads = Vec<Vec<Vec<f64>>>;

fn heads(spec: &ModelSpec, weights: &Weights<'_>, x: &[Vec<f64>]) -> [Heads; 3] {
    let Position::Rope(rope) = &spec.position else { panic!("rotated") };
    match &spec.attention.form {
        AttentionForm::Gqa(gqa) => {
            let group = gqa.num_attention_heads / gqa.num_key_value_heads;
            let cut = |rows: Vec<Vec<f64>>, repeat: usize, rotates: bool| -> Heads {
                let of_token = |(position, row): (usize, Vec<f64>)| {
                    let heads = row.chunks(gqa.head_dim).flat_map(|head| {
                        let head =
                            if rotates { rotated(head, position, rope) } else { head.to_vec() };
                        vec![head; repeat]
                    });
                    heads.collect()
                };
                rows.into_iter().enumerate().map(of_token).collect()
            };
            [
                cut(weights.project("self_attn.q_proj", x), 1, true),
                cut(weights.project("self_attn.k_proj", x), group, true),
                cut(weights.project("self_attn.v_proj", x), group, false),
            ]
        }
        AttentionForm::Mla(mla) => {
            let size = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
            let q = weights.project("self_attn.q_proj", x);
            let q = q.into_iter().enumerate().map(|(position, row)| {
                let heads = row.chunks(size).map(|head| {
                    let (nope, rotary) = head.split_at(mla.qk_nope_head_dim);
                    [nope, &rotated(rotary, position, rope)].concat()
                });
                heads.collect()
            });
            let norm = weights.of("self_attn.kv_a_layernorm");
            let (k_b, v_b) = (weights.of("self_attn.k_b_proj"), weights.of("self_attn.v_b_proj"));
            let (mut keys, mut values): (Heads, Heads) = (Vec::new(), Vec::new());
            let kv = weights.project("self_attn.kv_a_proj_with_mqa", x);
            for (position, row) in kv.into_iter().enumerate() {
                let (latent, rotary) = row.split_at(mla.kv_lora_rank);
                let latent = [rms_norm(latent, &norm, 1e-6)];
                let rotary = rotated(rotary, position, rope);
                let k = product(&k_b, &latent).remove(0);
                keys.push(k.chunks(mla.qk_nope_head_dim).map(|k| [k, &rotary].concat()).collect());
                let v = product(&v_b, &latent).remove(0);
                values.push(v.chunks(mla.v_head_dim).map(<[f64]>::to_vec).collect());
            }
            [q.collect(), keys, values]
        }
    }
}

/// What the first block's attention adds to the residual stream.
fn reference(spec: &ModelSpec, weights: &Weights<'_>, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let norm = weights.of("input_layernorm");
    let normed: Vec<Vec<f64>> = x.iter().map(|x| rms_norm(x, &norm, spec.norm.eps)).collect();
    let [q, k, v] = heads(spec, weights, &normed);
    let attention = &spec.attention;
    let (scale, window) = (attention.score_scale(0), attention.window(0));
    let sees = |query: usize, key: usize| {
        (attention.mask == MaskKind::Bidirectional || key <= query)
            && window.is_none_or(|window| query.abs_diff(key) < window)
    };
    let mixed = (0..x.len()).map(|query| {
        let of_head = |head: usize| {
            let scores: Vec<(usize, f64)> = (0..x.len())
                .filter(|&key| sees(query, key))
                .map(|key| {
                    let score = scale * dot(&q[query][head], &k[key][head]);
                    let cap = attention.logit_softcap;
                    (key, cap.map_or(score, |cap| cap * (score / cap).tanh()))
                })
                .collect();
            let total: f64 = scores.iter().map(|(_, score)| score.exp()).sum();
            let mut out = vec![0.0; attention.form.value_dim()];
            for (key, score) in scores {
                for (out, v) in out.iter_mut().zip(&v[key][head]) {
                    *out += score.exp() / total * v;
                }
            }
            out
        };
        (0..attention.form.num_attention_heads()).flat_map(of_head).collect()
    });
    weights.project("self_attn.o_proj", &mixed.collect::<Vec<_>>())
}

/// A spec with this attention in both of its layers and an unscaled rotation.
fn with_attention(name: &str, change: impl FnOnce(&mut Attention)) -> ModelSpec {
    let mut fields = spec(name).into_fields();
    fields.num_hidden_layers = 2;
    if let Position::Rope(rope) = &mut fields.position {
        rope.scaling = RopeScaling::Default;
    }
    fields.attention.scale = None;
    change(&mut fields.attention);
    ModelSpec::new(fields).unwrap()
}

/// The second rows of what goes into the first block and what comes out of it.
fn check(what: &str, spec: &ModelSpec) {
    let options = BuildOptions { keep_hidden: true, ..BuildOptions::new(Head::Logits) };
    let program = build_program(spec, &options).unwrap();
    let sizes = Sizes::dense(2 * TOKENS, 2);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
    init_weights(&mut session, spec, 5);
    // Scores that matter, and a feed-forward part that does not.
    for module in ["q_proj", "k_proj", "kv_a_proj_with_mqa", "v_proj", "o_proj"] {
        let name = format!("{LAYER}self_attn.{module}.weight");
        if let Some(bytes) = session.stored_mut(&name) {
            for bytes in bytes.as_chunks_mut::<4>().0 {
                *bytes = (f32::from_le_bytes(*bytes) * 20.0).to_le_bytes();
            }
        }
    }
    session.stored_mut(&format!("{LAYER}mlp.down_proj.weight")).unwrap().fill(0);
    let ids: Vec<u32> = (0..).map(|i: u32| i * 31 % 96).take(2 * TOKENS).collect();
    let positions = positions(2, TOKENS);
    let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
    session.run(ProgramId(0), &Run::forward(&feeds, &slots(2, TOKENS))).unwrap();
    let rows = |hidden: &str| -> Vec<Vec<f64>> {
        let all = session.output(ProgramId(0), hidden).chunks(spec.hidden_size);
        all.skip(TOKENS).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
    };
    let (before, after) = (rows("hidden_0"), rows("hidden_1"));
    let added = reference(spec, &Weights(&session), &before);
    let (mut worst, mut largest) = (0.0_f64, 0.0_f64);
    for ((before, after), added) in before.iter().zip(&after).zip(&added) {
        for ((before, after), added) in before.iter().zip(after).zip(added) {
            worst = worst.max((after - before - added).abs());
            largest = largest.max(added.abs());
        }
    }
    assert!(largest > 0.01, "{what}: the attention adds at most {largest}");
    assert!(worst <= 1e-4 * largest, "{what}: off by {worst} of {largest}");
}

#[test]
fn every_form_of_attention_takes_every_mask() {
    let gqa = |kv_heads: usize| {
        move |attention: &mut Attention| {
            if let AttentionForm::Gqa(gqa) = &mut attention.form {
                gqa.num_key_value_heads = kv_heads;
            }
        }
    };
    let window = |size| {
        Some(SlidingWindow { size, layers: WindowedLayers::Listed(vec![true, false]), rope: None })
    };
    for (form, name, kv_heads) in
        [("mha", "llama", 4), ("gqa", "llama", 2), ("mqa", "llama", 1), ("mla", "deepseek_v2", 0)]
    {
        for mask in [MaskKind::Causal, MaskKind::Bidirectional] {
            for size in [None, Some(1), Some(5), Some(66)] {
                for logit_softcap in [None, Some(0.7)] {
                    let spec = with_attention(name, |attention| {
                        gqa(kv_heads)(attention);
                        attention.mask = mask;
                        attention.sliding_window = size.and_then(window);
                        attention.logit_softcap = logit_softcap;
                    });
                    check(&format!("{form} {mask:?} {size:?} {logit_softcap:?}"), &spec);
                }
            }
        }
    }
}
