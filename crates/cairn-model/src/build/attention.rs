//! The attention of a block.

use cairn_kernels::Mask;
use cairn_program::{AttentionAttrs, Dim, DimName, Op, RopeAttrs, ValueId, VerifyError};
use cairn_spec::model::{AttentionForm, Gqa, MaskKind, QkNorm};

use super::{Lowering, to_f32};

impl Lowering<'_> {
    pub(super) fn attention(&mut self, layer: usize, x: ValueId) -> Result<ValueId, VerifyError> {
        match &self.spec.attention.form {
            AttentionForm::Gqa(gqa) => self.grouped_attention(layer, x, gqa),
            AttentionForm::Mla(mla) => self.latent_attention(layer, x, mla),
        }
    }

    fn grouped_attention(
        &mut self,
        layer: usize,
        x: ValueId,
        gqa: &Gqa,
    ) -> Result<ValueId, VerifyError> {
        let Gqa { num_attention_heads, num_key_value_heads, head_dim, qkv_bias, o_bias, .. } = *gqa;
        let heads = Dim::fixed(DimName::Heads, num_attention_heads);
        let kv_heads = Dim::fixed(DimName::KvHeads, num_key_value_heads);
        let head = Dim::fixed(DimName::HeadDim, head_dim);
        let prefix = format!("model.layers.{layer}.self_attn");
        let width = [self.width];
        let mut project = |what: &str, count: Dim| {
            let names = (format!("{layer}.attn.{what}"), format!("{prefix}.{what}_proj"));
            self.project((&names.0, &names.1), x, (&[count, head], &width), qkv_bias)
        };
        let (q, k, v) = (project("q", heads)?, project("k", kv_heads)?, project("v", kv_heads)?);
        let q = self.position_head(layer, ("q", heads), q, gqa)?;
        let k = self.position_head(layer, ("k", kv_heads), k, gqa)?;
        let site = u32::try_from(layer).expect("the spec limits the layers");
        let keys = format!("{layer}.attn.keys");
        let values = format!("{layer}.attn.values");
        let names = [Some(keys.as_str()), Some(values.as_str())];
        let cached =
            self.builder.push_slots(Op::KvWrite { site }, vec![Some(k), Some(v)], &names)?;
        let attrs = AttentionAttrs {
            mask: self.mask(layer),
            scale: to_f32(self.spec.attention.score_scale(layer)),
            softcap: self.spec.attention.logit_softcap.map(to_f32),
            values_in_keys: false,
            value_dim: head_dim,
            dropout: self.dropout(self.spec.dropout.attn),
        };
        let out = format!("{layer}.attn.out");
        let lse = format!("{layer}.attn.lse");
        let inputs = vec![Some(q), cached[0], cached[1]];
        let names = [Some(out.as_str()), Some(lse.as_str())];
        let results = self.builder.push_slots(Op::Attention(attrs), inputs, &names)?;
        let out = results[0].expect("slot 0 was named");
        let names = (format!("{layer}.attn.o"), format!("{prefix}.o_proj"));
        self.project((&names.0, &names.1), out, (&width, &[heads, head]), o_bias)
    }

    /// Norm and rotation of queries or keys, where the spec has them.
    fn position_head(
        &mut self,
        layer: usize,
        (what, heads): (&str, Dim),
        x: ValueId,
        gqa: &Gqa,
    ) -> Result<ValueId, VerifyError> {
        let mut x = x;
        if let Some(over) = gqa.qk_norm {
            let name = format!("{layer}.attn.{what}.normed");
            let module = format!("model.layers.{layer}.self_attn.{what}_norm");
            let head = Dim::fixed(DimName::HeadDim, gqa.head_dim);
            let all = [heads, head];
            let axes = if over == QkNorm::PerHead { &all[1..] } else { &all[..] };
            x = self.norm((&name, &module), x, axes)?;
        }
        if let Some(rope) = self.spec.rope(layer) {
            let longest = self.options.text_len.unwrap_or(0);
            let attrs = RopeAttrs {
                inv_freq: rope.inv_freq_for(longest),
                attention_scaling: rope.attention_scaling(),
                interleaved: rope.interleaved,
            };
            let positions = self.builder.find("positions").expect("declared with the embedding");
            let name = format!("{layer}.attn.{what}.rotated");
            x = self.builder.push(&name, Op::Rope(attrs), &[x, positions])?;
        }
        Ok(x)
    }

    pub(super) fn mask(&self, layer: usize) -> Mask {
        Mask {
            causal: self.spec.attention.mask == MaskKind::Causal,
            window: self.spec.attention.window(layer),
            ..Mask::default()
        }
    }
}
