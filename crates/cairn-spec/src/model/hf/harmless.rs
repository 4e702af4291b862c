//! Fields of a `config.json` that say nothing about what the model computes: where it came from, how
//! a library should hold it, how to sample, heads that a language model does not have.
//!
//! Sources: `configuration_utils.py` and the families' `configuration_*.py` of transformers 5.23, and what
//! its earlier versions wrote.

/// In alphabetical order.
const HARMLESS: [&str; 88] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    // What Gemma 3's class keeps of `sliding_window_pattern`; it reads only that.
    "_sliding_window_pattern",
    "auto_map",
    // DeepSeek's own training code.
    "aux_loss_alpha",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "classifier_pooling",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "deterministic_flash_attn",
    "directionality",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "ep_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    // Of fresh weights.
    "initializer_cutoff_factor",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    // Where it is not zero, training refuses it.
    "mlp_dropout",
    // GPT-2's `n_positions` once more; transformers reads it no longer.
    "n_ctx",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    // Layers after the model's own, which predict further tokens.
    "num_nextn_predict_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    // Families that have a loss of it read it.
    "output_router_logits",
    "output_scores",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "prefix",
    // Slices of a product that a cluster computed apart.
    "pretraining_tp",
    "problem_type",
    "reference_compile",
    "remove_invalid_values",
    "repad_logits_with_grad",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    // Where it is not zero, training refuses it.
    "router_jitter_noise",
    "sep_token_id",
    "seq_aux",
    "sparse_pred_ignore_index",
    "sparse_prediction",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Whether a field changes no number of any model.
pub(super) fn is_harmless(field: &str) -> bool {
    HARMLESS.contains(&field)
}
