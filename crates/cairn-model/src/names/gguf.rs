//! GGUF: one vocabulary of names for all families, each tensor `[outputs, inputs]`.
//!
//! Files of LLaMA's architecture have the rows of each query and key head in another order: ggml
//! rotates neighbors there, so its converter puts the two halves of a head side by side. Row
//! `2 i + j` of a head in the file is row `j · k/2 + i` of ours (`k` rows a head).

use super::{Names, Place, Placement, TensorMap, TensorSlice};
use cairn_spec::ModelSpec;
use cairn_spec::model::{AttentionForm, Family};

const QKV: Place =
    Place::Fused("attn_qkv", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]);
const GATE_EXPERTS: Place = Place::Stacked("ffn_gate_exps.weight", &["mlp.experts.gate_proj"]);
const UP_EXPERTS: Place = Place::Stacked("ffn_up_exps.weight", &["mlp.experts.up_proj"]);
const DOWN_EXPERTS: Place = Place::Stacked("ffn_down_exps.weight", &["mlp.experts.down_proj"]);

const PLACES: &[(&str, Place)] = &[
    ("model.embed_tokens", Place::Module("token_embd")),
    ("model.embed_positions", Place::Module("position_embd")),
    ("model.norm", Place::Module("output_norm")),
    ("lm_head", Place::Module("output")),
    ("input_layernorm", Place::Module("attn_norm")),
    ("self_attn.q_proj", Place::Module("attn_q")),
    ("self_attn.k_proj", Place::Module("attn_k")),
    ("self_attn.v_proj", Place::Module("attn_v")),
    ("self_attn.o_proj", Place::Module("attn_output")),
    ("self_attn.q_norm", Place::Module("attn_q_norm")),
    ("self_attn.k_norm", Place::Module("attn_k_norm")),
    ("post_attention_layernorm", Place::Module("ffn_norm")),
    ("mlp.gate_proj", Place::Module("ffn_gate")),
    ("mlp.up_proj", Place::Module("ffn_up")),
    ("mlp.down_proj", Place::Module("ffn_down")),
    ("mlp.gate", Place::Module("ffn_gate_inp")),
    ("mlp.experts.gate_proj", GATE_EXPERTS),
    ("mlp.experts.up_proj", UP_EXPERTS),
    ("mlp.experts.down_proj", DOWN_EXPERTS),
];

const DECODER: Names = Names {
    block: "blk.{}.",
    places: PLACES,
    wrapper: None,
    ignorable: &[],
    head_bias_copy: None,
    older: &[],
};

const GPT2: Names = Names {
    block: "blk.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("token_embd")),
        ("model.embed_positions", Place::Module("position_embd")),
        ("model.norm", Place::Module("output_norm")),
        ("lm_head", Place::Module("output")),
        ("input_layernorm", Place::Module("attn_norm")),
        ("self_attn.q_proj", QKV),
        ("self_attn.k_proj", QKV),
        ("self_attn.v_proj", QKV),
        ("self_attn.o_proj", Place::Module("attn_output")),
        ("post_attention_layernorm", Place::Module("ffn_norm")),
        ("mlp.up_proj", Place::Module("ffn_up")),
        ("mlp.down_proj", Place::Module("ffn_down")),
    ],
    wrapper: None,
    ignorable: &[],
    head_bias_copy: None,
    older: &[],
};

const GEMMA: Names = Names {
    block: "blk.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("token_embd")),
        ("model.norm", Place::Module("output_norm")),
        ("lm_head", Place::Module("output")),
        ("input_layernorm", Place::Module("attn_norm")),
        ("self_attn.q_proj", Place::Module("attn_q")),
        ("self_attn.k_proj", Place::Module("attn_k")),
        ("self_attn.v_proj", Place::Module("attn_v")),
        ("self_attn.o_proj", Place::Module("attn_output")),
        ("self_attn.q_norm", Place::Module("attn_q_norm")),
        ("self_attn.k_norm", Place::Module("attn_k_norm")),
        ("post_attention_layernorm", Place::Module("post_attention_norm")),
        ("pre_feedforward_layernorm", Place::Module("ffn_norm")),
        ("post_feedforward_layernorm", Place::Module("post_ffw_norm")),
        ("mlp.gate_proj", Place::Module("ffn_gate")),
        ("mlp.up_proj", Place::Module("ffn_up")),
        ("mlp.down_proj", Place::Module("ffn_down")),
    ],
    wrapper: None,
    ignorable: &[],
    head_bias_copy: None,
    older: &[],
};

const BERT: Names = Names {
    block: "blk.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("token_embd")),
        ("model.embed_positions", Place::Module("position_embd")),
        ("model.embed_token_types", Place::Module("token_types")),
        ("model.embed_norm", Place::Module("token_embd_norm")),
        ("self_attn.q_proj", Place::Module("attn_q")),
        ("self_attn.k_proj", Place::Module("attn_k")),
        ("self_attn.v_proj", Place::Module("attn_v")),
        ("self_attn.o_proj", Place::Module("attn_output")),
        ("post_attention_layernorm", Place::Module("attn_output_norm")),
        ("mlp.up_proj", Place::Module("ffn_up")),
        ("mlp.down_proj", Place::Module("ffn_down")),
        ("post_feedforward_layernorm", Place::Module("layer_output_norm")),
    ],
    wrapper: None,
    ignorable: &[],
    head_bias_copy: None,
    older: &[],
};

/// DeepSeek's modules but the parts of `kv_b_proj`, `$k` and `$v`.
macro_rules! deepseek {
    ($k:expr, $v:expr) => {
        Names {
            block: "blk.{}.",
            places: &[
                ("model.embed_tokens", Place::Module("token_embd")),
                ("model.norm", Place::Module("output_norm")),
                ("lm_head", Place::Module("output")),
                ("input_layernorm", Place::Module("attn_norm")),
                ("self_attn.q_proj", Place::Module("attn_q")),
                ("self_attn.q_a_proj", Place::Module("attn_q_a")),
                ("self_attn.q_a_layernorm", Place::Module("attn_q_a_norm")),
                ("self_attn.q_b_proj", Place::Module("attn_q_b")),
                ("self_attn.kv_a_proj_with_mqa", Place::Module("attn_kv_a_mqa")),
                ("self_attn.kv_a_layernorm", Place::Module("attn_kv_a_norm")),
                ("self_attn.k_b_proj", $k),
                ("self_attn.v_b_proj", $v),
                ("self_attn.o_proj", Place::Module("attn_output")),
                ("post_attention_layernorm", Place::Module("ffn_norm")),
                ("mlp.gate_proj", Place::Module("ffn_gate")),
                ("mlp.up_proj", Place::Module("ffn_up")),
                ("mlp.down_proj", Place::Module("ffn_down")),
                ("mlp.gate.e_score_correction_bias", Place::Tensor("exp_probs_b.bias")),
                ("mlp.gate", Place::Module("ffn_gate_inp")),
                ("mlp.experts.gate_proj", GATE_EXPERTS),
                ("mlp.experts.up_proj", UP_EXPERTS),
                ("mlp.experts.down_proj", DOWN_EXPERTS),
                ("mlp.shared_experts.gate_proj", Place::Module("ffn_gate_shexp")),
                ("mlp.shared_experts.up_proj", Place::Module("ffn_up_shexp")),
                ("mlp.shared_experts.down_proj", Place::Module("ffn_down_shexp")),
            ],
            wrapper: None,
            ignorable: &[],
            head_bias_copy: None,
            older: &[],
        }
    };
}

const KV_B: Place = Place::Interleaved("attn_kv_b", &["self_attn.k_b_proj", "self_attn.v_b_proj"]);

/// The keys' part turned, so that queries meet it without a transposition.
const DEEPSEEK: Names = deepseek!(
    Place::StackedTransposed("attn_k_b.weight"),
    Place::Stacked("attn_v_b.weight", &["self_attn.v_b_proj"])
);

/// As converters wrote it until 2025.
const DEEPSEEK_FUSED: Names = deepseek!(KV_B, KV_B);

const GATE_UP: Place = Place::Fused("ffn_up", &["mlp.gate_proj", "mlp.up_proj"]);

const PHI3: Names = Names {
    block: "blk.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("token_embd")),
        ("model.norm", Place::Module("output_norm")),
        ("lm_head", Place::Module("output")),
        ("input_layernorm", Place::Module("attn_norm")),
        ("self_attn.q_proj", QKV),
        ("self_attn.k_proj", QKV),
        ("self_attn.v_proj", QKV),
        ("self_attn.o_proj", Place::Module("attn_output")),
        ("post_attention_layernorm", Place::Module("ffn_norm")),
        ("mlp.gate_proj", GATE_UP),
        ("mlp.up_proj", GATE_UP),
        ("mlp.down_proj", Place::Module("ffn_down")),
    ],
    wrapper: None,
    ignorable: &[],
    head_bias_copy: None,
    older: &[],
};

/// The families that are read from GGUF files.
const READ: [(Family, &Names); 12] = [
    (Family::Llama, &DECODER),
    (Family::Mixtral, &DECODER),
    (Family::Qwen2, &DECODER),
    (Family::Qwen3, &DECODER),
    (Family::Qwen3Moe, &DECODER),
    (Family::DeepseekV2, &DEEPSEEK),
    (Family::DeepseekV3, &DEEPSEEK),
    (Family::Gemma2, &GEMMA),
    (Family::Gemma3Text, &GEMMA),
    (Family::Phi3, &PHI3),
    (Family::Gpt2, &GPT2),
    (Family::Bert, &BERT),
];
/// The families whose files are of LLaMA's architecture.
const LLAMA: [Family; 2] = [Family::Llama, Family::Mixtral];

impl TensorMap {
    /// The map for a model in a GGUF file, or `None` if its family is not read from those.
    pub fn gguf(spec: &ModelSpec) -> Option<Self> {
        let (_, names) = READ.iter().find(|(family, _)| *family == spec.family)?;
        let map = Self::with(spec, names);
        Some(if LLAMA.contains(&spec.family) { map.with_neighbors(spec) } else { map })
    }

    /// The map for a model in a GGUF file among whose tensors are those that `has` knows: files until
    /// 2025 hold DeepSeek's `kv_b_proj` whole.
    pub fn gguf_of_tensors(spec: &ModelSpec, has: impl Fn(&str) -> bool) -> Option<Self> {
        let is_deepseek = [Family::DeepseekV2, Family::DeepseekV3].contains(&spec.family);
        if is_deepseek && has("blk.0.attn_kv_b.weight") {
            return Some(Self::with(spec, &DEEPSEEK_FUSED));
        }
        Self::gguf(spec)
    }

    /// The same with the halves of every query and key head side by side in the file.
    fn with_neighbors(self, spec: &ModelSpec) -> Self {
        let AttentionForm::Gqa(gqa) = &spec.attention.form else { return self };
        let is_rotated =
            |weight: &str| [".q_proj.", ".k_proj."].iter().any(|module| weight.contains(module));
        let slices = self.slices.into_iter().flat_map(|slice| {
            if is_rotated(&slice.weight) { halves(&slice, gqa.head_dim) } else { vec![slice] }
        });
        Self { slices: slices.collect() }
    }
}

/// The halves of each head: every second row of the head in the file, from row 0 or 1 on.
fn halves(whole: &TensorSlice, head_dim: usize) -> Vec<TensorSlice> {
    let half = head_dim / 2;
    let starts = (0..whole.rows / half.max(1)).map(|number| (number / 2 * head_dim, number % 2));
    let slice = |(number, (head, parity)): (usize, (usize, usize))| TensorSlice {
        first_row: number * half,
        rows: half,
        placement: Placement::Rows { start: head + parity, run: 1, stride: 2 },
        ..whole.clone()
    };
    starts.enumerate().map(slice).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Role;

    #[test]
    fn halves_of_a_head_are_every_second_row() {
        let whole = TensorSlice {
            weight: "q".to_owned(),
            role: Role::Attention,
            block: Some(0),
            first_row: 0,
            rows: 8,
            columns: 1,
            tensor: "attn_q".to_owned(),
            shape: vec![8],
            placement: Placement::Whole,
        };
        // Rows of the file for our rows, two heads of four.
        let rows = halves(&whole, 4).into_iter().flat_map(|slice| {
            (0..slice.rows).map(move |row| (slice.first_row + row, slice.run_at(row).0))
        });
        let expected = [(0, 0), (1, 2), (2, 1), (3, 3), (4, 4), (5, 6), (6, 5), (7, 7)];
        assert_eq!(rows.collect::<Vec<_>>(), expected);
    }
}
