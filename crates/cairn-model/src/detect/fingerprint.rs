//! How each family names its tensors, and what its models need that no shape tells.
//!
//! A family is told by endings of names. What is asked are the fields that files of the family set to
//! different values; other fields that are known to change numbers are in [`assumed_fields`], with what
//! transformers takes where a file leaves them out.

use cairn_spec::model::Family;
use serde_json::{Map, Value};

/// What tells a family from the others by its tensors' names. A family may have several.
pub(super) struct Fingerprint {
    pub(super) family: Family,
    /// Endings of tensors that are there.
    pub(super) present: &'static [&'static str],
    /// Endings of tensors that are not.
    pub(super) absent: &'static [&'static str],
}

const Q: &str = "layers.0.self_attn.q_proj.weight";
const Q_NORM: &str = "layers.0.self_attn.q_norm.weight";
const Q_BIAS: &str = "layers.0.self_attn.q_proj.bias";
const O_BIAS: &str = "layers.0.self_attn.o_proj.bias";
const PRE_FEEDFORWARD: &str = "layers.0.pre_feedforward_layernorm.weight";
const INPUT_NORM: &str = "layers.0.input_layernorm.weight";
const LATENT: &str = "layers.0.self_attn.kv_a_proj_with_mqa.weight";
/// The router of any layer: the first ones may be dense.
const ROUTER: &str = "mlp.gate.weight";
const CORRECTION: &str = "mlp.gate.e_score_correction_bias";
const SPARSE_ROUTER: &str = "layers.0.block_sparse_moe.gate.weight";
const STACKED: &str = "layers.0.mlp.experts.gate_up_proj";

/// Of dense models in LLaMA's layout.
const NOT_PLAIN: &[&str] = &[Q_BIAS, Q_NORM, PRE_FEEDFORWARD, LATENT, ROUTER, SPARSE_ROUTER];
const NOT_PLAIN_BUT_BIASED: &[&str] = &[Q_NORM, PRE_FEEDFORWARD, LATENT, ROUTER, SPARSE_ROUTER];

pub(super) const FINGERPRINTS: [Fingerprint; 20] = [
    one(Family::Llama, &[Q, INPUT_NORM], NOT_PLAIN),
    // With `attention_bias`.
    one(Family::Llama, &[Q, INPUT_NORM, Q_BIAS, O_BIAS], NOT_PLAIN_BUT_BIASED),
    one(Family::Mistral, &[Q, INPUT_NORM], NOT_PLAIN),
    one(Family::Qwen2, &[Q, Q_BIAS], &[Q_NORM, PRE_FEEDFORWARD, O_BIAS, ROUTER, SPARSE_ROUTER]),
    one(Family::Qwen3, &[Q, Q_NORM, INPUT_NORM], &[PRE_FEEDFORWARD, ROUTER]),
    // OLMo 3 has the same names, with a window in most layers, and is not known: its hint says so.
    one(Family::Olmo2, &[Q, Q_NORM], &[INPUT_NORM, ROUTER]),
    one(Family::Gemma2, &[Q, PRE_FEEDFORWARD], &[Q_NORM]),
    one(Family::Gemma3Text, &[Q, PRE_FEEDFORWARD, Q_NORM], &[]),
    one(Family::Phi3, &["layers.0.self_attn.qkv_proj.weight"], &[]),
    one(Family::Mixtral, &[Q, SPARSE_ROUTER], &[Q_NORM, Q_BIAS]),
    // As transformers 5 holds it in memory.
    one(Family::Mixtral, &[Q, ROUTER, STACKED], &[Q_NORM, Q_BIAS]),
    one(Family::Qwen3Moe, &[Q, Q_NORM, INPUT_NORM, ROUTER], &[PRE_FEEDFORWARD]),
    one(Family::DeepseekV2, &[LATENT, ROUTER], &[CORRECTION]),
    one(Family::DeepseekV3, &[LATENT, ROUTER, CORRECTION], &[]),
    // Without a layer that has experts, nothing tells the generations apart.
    one(Family::DeepseekV2, &[LATENT], &[ROUTER]),
    one(Family::DeepseekV3, &[LATENT], &[ROUTER]),
    one(Family::Gpt2, &["h.0.attn.c_attn.weight"], &[]),
    one(Family::GptNeox, &["layers.0.attention.query_key_value.weight"], &[]),
    one(Family::Bert, &["encoder.layer.0.attention.self.query.weight"], &[]),
    one(Family::ModernBert, &["layers.0.attn.Wqkv.weight"], &[]),
];

const fn one(
    family: Family,
    present: &'static [&'static str],
    absent: &'static [&'static str],
) -> Fingerprint {
    Fingerprint { family, present, absent }
}

/// A field that decides numbers and that shapes may not tell.
pub(super) struct Question {
    pub(super) field: &'static str,
    /// Other fields that answer it as well.
    or: &'static [&'static str],
    /// Asked only where this field was answered so.
    when: Option<(&'static str, Answer)>,
}

/// An answer that makes another question.
enum Answer {
    True,
    Something,
    Text(&'static str),
}

impl Question {
    /// Whether there is an answer, or none is needed.
    pub(super) fn is_settled(&self, told: &Map<String, Value>) -> bool {
        let is_told = |field: &&str| told.contains_key(*field);
        let is_asked = self.when.as_ref().is_none_or(|(field, answer)| {
            let actual = told.get(*field).unwrap_or(&Value::Null);
            match answer {
                Answer::True => actual == &Value::Bool(true),
                Answer::Something => !actual.is_null(),
                Answer::Text(text) => actual.as_str() == Some(text),
            }
        });
        !is_asked || is_told(&self.field) || self.or.iter().any(is_told)
    }
}

const fn ask(field: &'static str) -> Question {
    Question { field, or: &[], when: None }
}

const fn ask_or(field: &'static str, or: &'static [&'static str]) -> Question {
    Question { field, or, when: None }
}

const fn ask_when(field: &'static str, when: (&'static str, Answer)) -> Question {
    Question { field, or: &[], when: Some(when) }
}

/// The newer style has all of a rotation in one object.
const ROPE: &[&str] = &["rope_parameters"];
const HEADS: Question = ask("num_attention_heads");
const EPS: Question = ask("rms_norm_eps");
const THETA: Question = ask_or("rope_theta", ROPE);
const SCALING: Question = ask_or("rope_scaling", ROPE);
const LENGTH: Question = ask("max_position_embeddings");
const WINDOW: Question = ask("sliding_window");
const PER_TOKEN: Question = ask("num_experts_per_tok");
const HAS_WINDOW: Question = ask("use_sliding_window");
const OPTIONAL_WINDOW: Question = ask_when("sliding_window", ("use_sliding_window", Answer::True));
const WINDOWED_LAYERS: Question = Question {
    field: "max_window_layers",
    or: &["layer_types"],
    when: Some(("use_sliding_window", Answer::True)),
};
/// Which layers have the window that there is.
const LAYERS_OF_WINDOW: Question = ask_when("layer_types", ("sliding_window", Answer::Something));
/// Without a tensor of the head: the head may be the embedding, or lost with a shard, or this is the
/// body alone (`architectures`).
const TIED: Question = ask_or("tie_word_embeddings", &["architectures"]);
const SCORE_SCALE: Question = ask("query_pre_attn_scalar");
const EXPERT_SCALE: Question = ask("routed_scaling_factor");
const GROUP_LIMITED: (&str, Answer) = ("topk_method", Answer::Text("group_limited_greedy"));

/// What decides a family's numbers, in the order in which it is asked.
const QUESTIONS: [(&[Family], &[Question]); 14] = [
    (&[Family::Llama, Family::Olmo2], &[HEADS, EPS, THETA, SCALING, LENGTH, TIED]),
    (&[Family::Mistral], &[HEADS, EPS, THETA, SCALING, LENGTH, WINDOW, LAYERS_OF_WINDOW, TIED]),
    (&[Family::Mixtral], &[HEADS, EPS, THETA, SCALING, LENGTH, WINDOW, PER_TOKEN, TIED]),
    (
        &[Family::Qwen2, Family::Qwen3],
        &[HEADS, EPS, THETA, SCALING, LENGTH, HAS_WINDOW, OPTIONAL_WINDOW, WINDOWED_LAYERS, TIED],
    ),
    (
        &[Family::Qwen3Moe],
        &[
            HEADS,
            EPS,
            THETA,
            SCALING,
            LENGTH,
            HAS_WINDOW,
            OPTIONAL_WINDOW,
            PER_TOKEN,
            ask("norm_topk_prob"),
            TIED,
        ],
    ),
    (
        &[Family::DeepseekV2],
        &[
            HEADS,
            EPS,
            THETA,
            SCALING,
            LENGTH,
            PER_TOKEN,
            EXPERT_SCALE,
            ask("topk_method"),
            ask_when("n_group", GROUP_LIMITED),
            ask_when("topk_group", GROUP_LIMITED),
            TIED,
        ],
    ),
    (
        &[Family::DeepseekV3],
        &[
            HEADS,
            EPS,
            THETA,
            SCALING,
            LENGTH,
            PER_TOKEN,
            EXPERT_SCALE,
            ask("norm_topk_prob"),
            ask("n_group"),
            ask("topk_group"),
            TIED,
        ],
    ),
    (
        &[Family::Gemma2],
        &[
            HEADS,
            EPS,
            THETA,
            SCALING,
            LENGTH,
            WINDOW,
            SCORE_SCALE,
            ask("attn_logit_softcapping"),
            ask("final_logit_softcapping"),
        ],
    ),
    (
        &[Family::Gemma3Text],
        &[
            HEADS,
            EPS,
            THETA,
            ask_or("rope_local_base_freq", ROPE),
            SCALING,
            LENGTH,
            WINDOW,
            ask_or("sliding_window_pattern", &["layer_types"]),
            SCORE_SCALE,
        ],
    ),
    (
        &[Family::Phi3],
        &[
            HEADS,
            EPS,
            THETA,
            SCALING,
            ask_or("partial_rotary_factor", ROPE),
            ask_when("original_max_position_embeddings", ("rope_scaling", Answer::Something)),
            LENGTH,
            WINDOW,
            TIED,
        ],
    ),
    (
        &[Family::Gpt2],
        &[
            ask_or("n_head", &["num_attention_heads"]),
            ask("layer_norm_epsilon"),
            ask("activation_function"),
            ask("scale_attn_weights"),
            ask("scale_attn_by_inverse_layer_idx"),
        ],
    ),
    (
        &[Family::GptNeox],
        &[
            HEADS,
            ask("layer_norm_eps"),
            ask_or("rotary_pct", &["partial_rotary_factor", "rope_parameters"]),
            ask_or("rotary_emb_base", ROPE),
            SCALING,
            LENGTH,
            ask("use_parallel_residual"),
            ask("hidden_act"),
            TIED,
        ],
    ),
    (&[Family::Bert], &[HEADS, ask("layer_norm_eps"), ask("hidden_act")]),
    (
        &[Family::ModernBert],
        &[
            HEADS,
            ask("norm_eps"),
            ask("local_attention"),
            ask_or("global_attn_every_n_layers", &["layer_types"]),
            ask_or("global_rope_theta", ROPE),
            ask_or("local_rope_theta", ROPE),
            LENGTH,
        ],
    ),
];

/// What is asked of a family's models.
pub(super) fn questions(family: Family) -> &'static [Question] {
    let found = QUESTIONS.iter().find(|(families, _)| families.contains(&family));
    found.map_or(&[], |(_, questions)| *questions)
}

const SILU: (&str, &str) = ("hidden_act", "silu");
const GELU_TANH: (&str, &str) = ("hidden_activation", "gelu_pytorch_tanh");
const ONE_WAY: (&str, &str) = ("use_bidirectional_attention", "false");
/// Where the rotation's own object has one, that.
const ORIGINAL: (&str, &str) = ("original_max_position_embeddings", "null");

/// Fields of a family's `config.json` that are known to change numbers, that no tensor tells and that are
/// not asked for: hardly a file of the family says otherwise. They are taken as transformers takes them
/// where a file leaves them out; whatever is told counts.
pub fn assumed_fields(family: Family) -> &'static [(&'static str, &'static str)] {
    match family {
        Family::Gpt2 | Family::GptNeox => &[],
        Family::Bert => &[("is_decoder", "false"), ("position_embedding_type", "absolute")],
        Family::ModernBert => &[("hidden_activation", "gelu"), ("classifier_activation", "gelu")],
        Family::Gemma2 => &[GELU_TANH, ORIGINAL, ("layer_types", "null"), ONE_WAY],
        Family::Gemma3Text => &[GELU_TANH, ORIGINAL, ("final_logit_softcapping", "null"), ONE_WAY],
        // Asked for where it counts.
        Family::Phi3 => &[SILU],
        Family::DeepseekV2 => {
            &[SILU, ORIGINAL, ("scoring_func", "softmax"), ("norm_topk_prob", "false")]
        }
        Family::DeepseekV3 => &[
            SILU,
            ORIGINAL,
            ("scoring_func", "sigmoid"),
            ("topk_method", "noaux_tc"),
            ("rope_interleave", "true"),
        ],
        Family::Llama
        | Family::Mistral
        | Family::Mixtral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Qwen3Moe
        | Family::Olmo2 => &[SILU, ORIGINAL],
    }
}
