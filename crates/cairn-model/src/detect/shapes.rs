//! What names and shapes of tensors tell of a model without a second reading, by the names of
//! `config.json`: sizes, biases, which layers have experts. A number of heads that was told makes the
//! rest of the attention's sizes.

use std::collections::BTreeSet;

use cairn_kernels::Encoding;
use cairn_spec::model::{Family, NUM_HIDDEN_LAYERS_MAX};
use serde_json::{Map, Value};

use super::ends;
use crate::load::TensorSource;

/// Names of the tensors whose shapes tell sizes: embedding, feed-forward projection with the inner
/// width first (last where it is stored transposed), positions.
const fn sizes_of(family: Family) -> [&'static str; 3] {
    match family {
        Family::Gpt2 => ["wte.weight", "h.0.mlp.c_fc.weight", "wpe.weight"],
        Family::GptNeox => ["embed_in.weight", "layers.0.mlp.dense_h_to_4h.weight", ""],
        Family::Bert => [
            "word_embeddings.weight",
            "layer.0.intermediate.dense.weight",
            "position_embeddings.weight",
        ],
        Family::ModernBert => ["tok_embeddings.weight", "layers.0.mlp.Wo.weight", ""],
        Family::Phi3 => ["embed_tokens.weight", "layers.0.mlp.down_proj.weight", ""],
        // The experts' width.
        Family::Mixtral => ["embed_tokens.weight", "", ""],
        // Of any dense layer.
        _ => ["embed_tokens.weight", "mlp.gate_proj.weight", ""],
    }
}

/// Names of tensors with a bias, or a vector, that says that a field is true.
const fn flags_of(family: Family) -> &'static [(&'static str, &'static str)] {
    match family {
        Family::Llama => &[
            ("attention_bias", "layers.0.self_attn.q_proj.bias"),
            ("mlp_bias", "layers.0.mlp.gate_proj.bias"),
        ],
        Family::Qwen3 | Family::Qwen3Moe | Family::Olmo2 | Family::Gemma2 | Family::Gemma3Text => {
            &[("attention_bias", "layers.0.self_attn.q_proj.bias")]
        }
        Family::DeepseekV2 | Family::DeepseekV3 => {
            &[("attention_bias", "layers.0.self_attn.kv_a_proj_with_mqa.bias")]
        }
        Family::GptNeox => &[("attention_bias", "layers.0.attention.query_key_value.bias")],
        Family::ModernBert => &[
            ("attention_bias", "layers.0.attn.Wqkv.bias"),
            ("mlp_bias", "layers.0.mlp.Wi.bias"),
            ("norm_bias", "final_norm.bias"),
            ("classifier_bias", "head.dense.bias"),
            ("decoder_bias", "decoder.bias"),
        ],
        Family::Mistral
        | Family::Mixtral
        | Family::Qwen2
        | Family::Phi3
        | Family::Gpt2
        | Family::Bert => &[],
    }
}

/// Whether a model without a tensor of its own for the head has the embedding there, which is so in
/// families whose files say nothing else; of others, it is asked.
const fn tied_without_head(family: Family) -> Option<bool> {
    match family {
        Family::Gpt2 | Family::Gemma2 | Family::Gemma3Text | Family::Bert | Family::ModernBert => {
            Some(true)
        }
        Family::Llama
        | Family::Mistral
        | Family::Mixtral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Qwen3Moe
        | Family::Olmo2
        | Family::Phi3
        | Family::GptNeox
        | Family::DeepseekV2
        | Family::DeepseekV3 => None,
    }
}

/// Tensors by the endings of their names.
struct Shapes<'a> {
    tensors: &'a dyn TensorSource,
    names: &'a BTreeSet<String>,
}

impl Shapes<'_> {
    fn name(&self, ending: &str) -> Option<&String> {
        self.names.iter().find(|name| !ending.is_empty() && ends(name, ending))
    }

    /// A size of a tensor with so many dimensions.
    fn size(&self, ending: &str, dims: usize, axis: usize) -> Option<usize> {
        let shape = self.tensors.shape(self.name(ending)?)?;
        (shape.len() == dims).then(|| shape[axis])
    }

    fn rows(&self, ending: &str) -> Option<usize> {
        self.size(ending, 2, 0)
    }

    fn columns(&self, ending: &str) -> Option<usize> {
        self.size(ending, 2, 1)
    }

    fn length(&self, ending: &str) -> Option<usize> {
        self.size(ending, 1, 0)
    }
}

/// What is found, by the names of `config.json`.
struct Found(Map<String, Value>);

impl Found {
    fn set(&mut self, field: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.0.insert(field.to_owned(), value.into());
        }
    }
}

/// The fields that tensors tell, with what was told of the heads.
pub(super) fn read(
    family: Family,
    told: &Map<String, Value>,
    tensors: &dyn TensorSource,
    names: &BTreeSet<String>,
) -> Map<String, Value> {
    let shapes = Shapes { tensors, names };
    let mut found = Found(Map::new());
    let [embedding, inner, positions] = sizes_of(family);
    found.set("vocab_size", shapes.rows(embedding));
    found.set("hidden_size", shapes.columns(embedding));
    let inner = match family {
        Family::Gpt2 | Family::ModernBert | Family::Phi3 => shapes.columns(inner),
        _ => shapes.rows(inner),
    };
    found.set(if family == Family::Gpt2 { "n_inner" } else { "intermediate_size" }, inner);
    found.set("max_position_embeddings", shapes.rows(positions));
    found.set("num_hidden_layers", Some(blocks(names)));
    found.set("type_vocab_size", shapes.rows("token_type_embeddings.weight"));
    for (field, ending) in flags_of(family) {
        found.set(field, Some(shapes.name(ending).is_some()));
    }
    let heads = ["lm_head.weight", "embed_out.weight", "decoder.weight"];
    let has_own_head = heads.iter().any(|ending| shapes.name(ending).is_some());
    let is_tied = if has_own_head { Some(false) } else { tied_without_head(family) };
    found.set("tie_word_embeddings", is_tied);
    let transform = match family {
        Family::Bert => "cls.predictions.transform.dense.weight",
        Family::ModernBert => "head.dense.weight",
        _ => "",
    };
    if !transform.is_empty() && shapes.name(transform).is_none() {
        found.set("architectures", Some(vec![family.body_architecture()]));
    }
    let encoding = shapes.name(embedding).and_then(|name| tensors.encoding(name));
    found.set("dtype", encoding.and_then(dtype));
    attention(family, told, &shapes, &mut found);
    experts(family, &shapes, &mut found);
    found.0
}

fn dtype(encoding: Encoding) -> Option<&'static str> {
    match encoding {
        Encoding::F32 => Some("float32"),
        Encoding::F16 => Some("float16"),
        Encoding::Bf16 => Some("bfloat16"),
        _ => None,
    }
}

/// Sizes of heads, where one of them was told or a norm over each head has it.
fn attention(family: Family, told: &Map<String, Value>, shapes: &Shapes<'_>, found: &mut Found) {
    let size = |field: &str| {
        let size = told.get(field).and_then(Value::as_u64);
        size.and_then(|size| usize::try_from(size).ok())
    };
    let heads = size("num_attention_heads");
    if let Some(down) = shapes.rows("layers.0.self_attn.kv_a_proj_with_mqa.weight") {
        latent(down, heads, shapes, found);
        return;
    }
    let (queries, keys) = match family {
        // One tensor for queries, keys and values; the output's inputs are the queries'.
        Family::Phi3 => {
            let all = shapes.rows("layers.0.self_attn.qkv_proj.weight");
            let queries = shapes.columns("layers.0.self_attn.o_proj.weight");
            let both = all.zip(queries).and_then(|(all, queries)| all.checked_sub(queries));
            (queries, both.map(|both| both / 2))
        }
        _ => (
            shapes.rows("layers.0.self_attn.q_proj.weight"),
            shapes.rows("layers.0.self_attn.k_proj.weight"),
        ),
    };
    let (Some(queries), Some(keys)) = (queries, keys) else { return };
    let norm_per_head = match family {
        // As wide as all queries, it may be over all heads, in a family that is none of these.
        Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3Text => {
            shapes.length("layers.0.self_attn.q_norm.weight").filter(|width| *width < queries)
        }
        _ => None,
    };
    let share = heads.and_then(|heads| evenly(queries, heads));
    let Some(head_dim) = norm_per_head.or(size("head_dim")).or(share) else { return };
    found.set("head_dim", Some(head_dim));
    found.set("num_attention_heads", evenly(queries, head_dim));
    found.set("num_key_value_heads", evenly(keys, head_dim));
}

/// Latent attention; `down` is the latent with the rotated part of the keys.
fn latent(down: usize, heads: Option<usize>, shapes: &Shapes<'_>, found: &mut Found) {
    let latent = shapes.length("layers.0.self_attn.kv_a_layernorm.weight");
    let rotated = latent.and_then(|latent| down.checked_sub(latent));
    found.set("kv_lora_rank", latent);
    found.set("qk_rope_head_dim", rotated);
    let rank = shapes.rows("layers.0.self_attn.q_a_proj.weight");
    found.0.insert("q_lora_rank".to_owned(), rank.into());
    let queries = shapes.rows(match rank {
        Some(_) => "layers.0.self_attn.q_b_proj.weight",
        None => "layers.0.self_attn.q_proj.weight",
    });
    let of_head = |all: Option<usize>| evenly(all?, heads?);
    let key = of_head(queries).zip(rotated).and_then(|(key, rotated)| key.checked_sub(rotated));
    found.set("qk_nope_head_dim", key);
    found.set("v_head_dim", of_head(shapes.columns("layers.0.self_attn.o_proj.weight")));
}

/// The share of each of `parts`, if it is even.
fn evenly(all: usize, parts: usize) -> Option<usize> {
    (parts > 0 && all.is_multiple_of(parts)).then(|| all / parts)
}

/// Experts: how many, how wide, and in which layers.
fn experts(family: Family, shapes: &Shapes<'_>, found: &mut Found) {
    const ROUTERS: [&str; 2] = ["mlp.gate.weight", "block_sparse_moe.gate.weight"];
    let number = match family {
        Family::Mixtral => "num_local_experts",
        Family::Qwen3Moe => "num_experts",
        Family::DeepseekV2 | Family::DeepseekV3 => "n_routed_experts",
        _ => return,
    };
    found.set(number, ROUTERS.iter().find_map(|router| shapes.rows(router)));
    let stacked = || shapes.size("mlp.experts.gate_up_proj", 3, 1).map(|both| both / 2);
    let width = shapes
        .rows("experts.0.gate_proj.weight")
        .or_else(|| shapes.rows("experts.0.w1.weight"))
        .or_else(stacked);
    if family == Family::Mixtral {
        found.set("intermediate_size", width);
        return;
    }
    found.set("moe_intermediate_size", width);
    if !found.0.contains_key("intermediate_size") {
        // No layer is dense, so that no number depends on it.
        found.set("intermediate_size", width);
    }
    let sparse: BTreeSet<usize> = shapes
        .names
        .iter()
        .filter(|name| ends(name, ROUTERS[0]))
        .filter_map(|name| layer(name))
        .collect();
    if family == Family::Qwen3Moe {
        let layers = 0..blocks(shapes.names).min(NUM_HIDDEN_LAYERS_MAX);
        let dense: Vec<usize> = layers.filter(|layer| !sparse.contains(layer)).collect();
        found.set("mlp_only_layers", Some(dense));
        return;
    }
    let first = sparse.first().copied();
    found.set("first_k_dense_replace", first.or_else(|| Some(blocks(shapes.names))));
    let shared = shapes.rows("mlp.shared_experts.gate_proj.weight").unwrap_or(0);
    found.set("n_shared_experts", width.and_then(|width| evenly(shared, width)));
}

/// One more than the highest number of a block. Layers that predict further tokens, which DeepSeek-V3's
/// files append, are none of the model's.
fn blocks(names: &BTreeSet<String>) -> usize {
    let further = names
        .iter()
        .filter(|name| ends(name, "eh_proj.weight"))
        .filter_map(|name| layer(name))
        .min();
    let last = names.iter().filter_map(|name| layer(name)).max();
    further.unwrap_or_else(|| last.map_or(0, |last| last.saturating_add(1)))
}

/// The number of the block that a tensor belongs to.
fn layer(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.find(|part| ["layers", "layer", "h"].contains(part))?;
    parts.next()?.parse().ok()
}
