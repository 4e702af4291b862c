//! Multi-head latent attention in its absorbed form (DeepSeek-AI 2024, section 2.1,
//! <https://arxiv.org/abs/2405.04434>).
//!
//! What is cached of a token is one row: its normed latent, then its rotated key. Queries are brought
//! to the latent by the keys' part of `kv_b_proj`, and what they find there is brought back by the
//! values' part, so keys and values of single heads never exist. Training, prefill and decode use the
//! same form, whose sums therefore agree to the bit.
//!
//! An adapter of `kv_b_proj` reads the normed latent `c`: a head's key is `K·c + B_k·a` with
//! `a = s·A·c`, its value `V·c + B_v·a`. So `a` is cached between latent and key, queries meet it by
//! `q·B_k`, and what they find there is brought back by `B_v`. Dropout of the adapter's input is that
//! of `c` on its way into `a`, as in PEFT.

use cairn_program::{AttentionAttrs, Dim, DimName, NormAttrs, Op, RopeAttrs, ValueId, VerifyError};
use cairn_spec::model::Mla;

use super::{Lowering, to_f32};
use crate::adapter::{Adapted, AdapterMap};

/// Epsilon of the norms on the latents: transformers' default, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// The axes of one layer's latent attention, and the adapter of `kv_b_proj`.
struct Axes<'a> {
    layer: usize,
    /// That of the keys' part and that of the values', which share what is cached.
    adapted: Option<(&'a Adapted, &'a Adapted)>,
    heads: Dim,
    one: Dim,
    latent: Dim,
    nope: Dim,
    rotary: Dim,
    value: Dim,
}

impl<'a> Axes<'a> {
    fn new(layer: usize, mla: &Mla, adapters: &'a AdapterMap) -> Self {
        let adapted =
            |part| adapters.get(&format!("model.layers.{layer}.self_attn.{part}_b_proj.weight"));
        Self {
            layer,
            adapted: adapted("k").zip(adapted("v")),
            heads: Dim::fixed(DimName::Heads, mla.num_attention_heads),
            one: Dim::fixed(DimName::KvHeads, 1),
            latent: Dim::fixed(DimName::Rank, mla.kv_lora_rank),
            nope: Dim::fixed(DimName::HeadDim, mla.qk_nope_head_dim),
            rotary: Dim::fixed(DimName::HeadDim, mla.qk_rope_head_dim),
            value: Dim::fixed(DimName::HeadDim, mla.v_head_dim),
        }
    }

    /// Of the adapter's part of what is cached.
    fn rank(adapted: &Adapted) -> Dim {
        Dim::fixed(DimName::Rank, adapted.rank)
    }

    fn name(&self, what: &str) -> String {
        format!("{}.attn.{what}", self.layer)
    }

    fn module(&self, what: &str) -> String {
        format!("model.layers.{}.self_attn.{what}", self.layer)
    }
}

impl Lowering<'_> {
    pub(super) fn latent_attention(
        &mut self,
        layer: usize,
        x: ValueId,
        mla: &Mla,
    ) -> Result<ValueId, VerifyError> {
        let axes = Axes::new(layer, mla, self.adapters);
        let queries = self.latent_queries(&axes, x, mla)?;
        let keys = self.latent_keys(&axes, x, mla)?;
        let site = u32::try_from(layer).expect("the spec limits the layers");
        let names = [Some(axes.name("keys"))];
        let names: Vec<Option<&str>> = names.iter().map(Option::as_deref).collect();
        let slots = vec![Some(keys), None];
        let cached = self.builder.push_slots(Op::KvWrite { site }, slots, &names)?;
        let attrs = AttentionAttrs {
            mask: self.mask(layer),
            scale: to_f32(self.spec.attention.score_scale(layer)),
            softcap: self.spec.attention.logit_softcap.map(to_f32),
            values_in_keys: true,
            value_dim: mla.kv_lora_rank + axes.adapted.map_or(0, |(_, values)| values.rank),
            dropout: self.dropout(self.spec.dropout.attn),
        };
        let (mixed, lse) = (axes.name("mixed"), axes.name("lse"));
        let names = [Some(mixed.as_str()), Some(lse.as_str())];
        let slots = vec![Some(queries), cached[0], None];
        let results = self.builder.push_slots(Op::Attention(attrs), slots, &names)?;
        let mixed = results[0].expect("slot 0 was named");
        let out = self.latent_values(&axes, mixed)?;
        let names = (axes.name("o"), axes.module("o_proj"));
        let (width, inputs) = ([self.width], [axes.heads, axes.value]);
        self.project((&names.0, &names.1), out, (&width, &inputs), mla.bias)
    }

    /// What queries found, as values: `[t, h, value]`.
    fn latent_values(&mut self, axes: &Axes<'_>, mixed: ValueId) -> Result<ValueId, VerifyError> {
        let (module, dims) =
            (axes.module("v_b_proj.weight"), [axes.heads, axes.value, axes.latent]);
        let expand = self.builder.weight(&module, &dims);
        let Some((_, adapted)) = axes.adapted else {
            return self.builder.push(&axes.name("out"), Op::HeadMatmul, &[mixed, expand]);
        };
        let rank = Axes::rank(adapted);
        let names = ("mixed.latent", "mixed.low");
        let (latent, low) = self.halves(axes, names, mixed, (axes.latent, rank))?;
        let base = self.builder.push(&axes.name("out.base"), Op::HeadMatmul, &[latent, expand])?;
        let b = self.builder.weight(&adapted.b, &[axes.heads, axes.value, rank]);
        let delta = self.builder.push(&axes.name("out.lora"), Op::HeadMatmul, &[low, b])?;
        self.builder.push(&axes.name("out"), Op::Add, &[base, delta])
    }

    /// Queries against cached rows: `[t, h, latent (+ rank) + rotary]`.
    fn latent_queries(
        &mut self,
        axes: &Axes<'_>,
        x: ValueId,
        mla: &Mla,
    ) -> Result<ValueId, VerifyError> {
        let size = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
        let outputs = [axes.heads, Dim::fixed(DimName::HeadDim, size)];
        let width = [self.width];
        let q = match mla.q_lora_rank {
            None => {
                let names = (axes.name("q"), axes.module("q_proj"));
                self.project((&names.0, &names.1), x, (&outputs, &width), false)?
            }
            Some(rank) => {
                let rank = [Dim::fixed(DimName::Rank, rank)];
                let names = (axes.name("q.low"), axes.module("q_a_proj"));
                let low = self.project((&names.0, &names.1), x, (&rank, &width), mla.bias)?;
                let low =
                    self.latent_norm(axes, ("q.low.normed", "q_a_layernorm"), low, rank[0])?;
                let names = (axes.name("q"), axes.module("q_b_proj"));
                self.project((&names.0, &names.1), low, (&outputs, &rank), false)?
            }
        };
        let names = ("q.nope", "q.rotary");
        let (nope, rotary) = self.halves(axes, names, q, (axes.nope, axes.rotary))?;
        let rotary = self.rotated(axes, "q.rotated", rotary)?;
        let dims = [axes.heads, axes.nope, axes.latent];
        let absorb = self.builder.weight(&axes.module("k_b_proj.weight"), &dims);
        // By the transposed weight: it is stored as the product that expands keys.
        let latent = &axes.name("q.latent");
        let mut latent = self.builder.push(latent, Op::HeadMatmulDx, &[nope, absorb])?;
        if let Some((adapted, _)) = axes.adapted {
            let b = [axes.heads, axes.nope, Axes::rank(adapted)];
            let b = self.builder.weight(&adapted.b, &b);
            let low = self.builder.push(&axes.name("q.kv_b.low"), Op::HeadMatmulDx, &[nope, b])?;
            let (name, joined) = (axes.name("q.kv_b.joined"), Op::Concat(DimName::Rank));
            latent = self.builder.push(&name, joined, &[latent, low])?;
        }
        let joined = Op::Concat(DimName::LatentKey);
        self.builder.push(&axes.name("q.joined"), joined, &[latent, rotary])
    }

    /// What is cached: `[t, 1, latent (+ rank) + rotary]`.
    fn latent_keys(
        &mut self,
        axes: &Axes<'_>,
        x: ValueId,
        mla: &Mla,
    ) -> Result<ValueId, VerifyError> {
        let size = mla.kv_lora_rank + mla.qk_rope_head_dim;
        let outputs = [axes.one, Dim::fixed(DimName::LatentKey, size)];
        let names = (axes.name("kv"), axes.module("kv_a_proj_with_mqa"));
        let kv = self.project((&names.0, &names.1), x, (&outputs, &[self.width]), mla.bias)?;
        let names = ("kv.latent", "k.rotary");
        let (latent, rotary) = self.halves(axes, names, kv, (axes.latent, axes.rotary))?;
        let names = ("kv.latent.normed", "kv_a_layernorm");
        let mut latent = self.latent_norm(axes, names, latent, axes.latent)?;
        if let Some((adapted, _)) = axes.adapted {
            let sizes = ([axes.one, Axes::rank(adapted)], [axes.one, axes.latent]);
            let low = self.low(&axes.name("kv_b"), adapted, latent, (&sizes.0, &sizes.1))?;
            let (name, joined) = (axes.name("kv_b.joined"), Op::Concat(DimName::Rank));
            latent = self.builder.push(&name, joined, &[latent, low])?;
        }
        let rotary = self.rotated(axes, "k.rotated", rotary)?;
        let joined = Op::Concat(DimName::LatentKey);
        self.builder.push(&axes.name("k.joined"), joined, &[latent, rotary])
    }

    fn latent_norm(
        &mut self,
        axes: &Axes<'_>,
        (name, module): (&str, &str),
        x: ValueId,
        axis: Dim,
    ) -> Result<ValueId, VerifyError> {
        let weight = self.builder.weight(&axes.module(&format!("{module}.weight")), &[axis]);
        let op = Op::RmsNorm(NormAttrs { eps: LATENT_NORM_EPS, plus_one: false });
        self.builder.push(&axes.name(name), op, &[x, weight])
    }

    fn halves(
        &mut self,
        axes: &Axes<'_>,
        names: (&str, &str),
        x: ValueId,
        (first, second): (Dim, Dim),
    ) -> Result<(ValueId, ValueId), VerifyError> {
        let (left, right) = (axes.name(names.0), axes.name(names.1));
        let names = [Some(left.as_str()), Some(right.as_str())];
        let halves = self.builder.push_slots(Op::Split(first, second), vec![Some(x)], &names)?;
        Ok((halves[0].expect("slot 0 was named"), halves[1].expect("slot 1 was named")))
    }

    fn rotated(&mut self, axes: &Axes<'_>, name: &str, x: ValueId) -> Result<ValueId, VerifyError> {
        let Some(rope) = self.spec.rope(axes.layer) else { return Ok(x) };
        let attrs = RopeAttrs {
            inv_freq: rope.inv_freq_for(self.options.text_len.unwrap_or(0)),
            attention_scaling: rope.attention_scaling(),
            interleaved: rope.interleaved,
        };
        let positions = self.builder.find("positions").expect("declared with the embedding");
        self.builder.push(&axes.name(name), Op::Rope(attrs), &[x, positions])
    }
}
