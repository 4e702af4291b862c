//! How tokens are chosen: flags first, then what the model's authors state, then a default.
//!
//! `generation_config.json` stands behind every setting that no flag makes. Where neither says
//! whether to sample, this samples; transformers would take the likeliest token.

use std::fmt::Write as _;

use cairn_data::tokenizer::GenerationConfig;
use cairn_engine::SamplingFields;
use clap::Args;

use crate::context::Context;
use crate::model_folder::ModelFolder;

/// Temperature where nobody says anything.
const TEMPERATURE: f32 = 0.8;

/// How tokens are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling [default: the model's generation_config.json]")]
pub(crate) struct SamplingArgs {
    /// 0 takes the likeliest token, 1 leaves the model's distribution as it is [default: the file's, or
    /// 0.8]
    #[arg(long, value_name = "X")]
    temperature: Option<f32>,
    /// Keep the N likeliest tokens
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Keep the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens with at least this share of the largest probability
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Keep the most typical tokens that together reach this probability
    #[arg(long, value_name = "P")]
    typical_p: Option<f32>,
    /// Divide the logits of tokens that occurred in prompt or output
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Subtract from the logits of tokens that occurred in the output
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_hyphen_values = true)]
    presence_penalty: f32,
    /// Subtract once for every occurrence in the output
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_hyphen_values = true)]
    frequency_penalty: f32,
    /// Let no sequence of N tokens occur twice
    #[arg(long, value_name = "N")]
    no_repeat_ngram_size: Option<usize>,
    /// Seed; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// What the model's authors generate with; says what of it there is not here.
pub(crate) fn stated(model: &ModelFolder, context: &Context) -> anyhow::Result<GenerationConfig> {
    let stated = GenerationConfig::of(model.files())?.unwrap_or_default();
    if !stated.ignored.is_empty() {
        context.terminal.warn(format_args!(
            "generation_config.json: there is no {} here; ignored",
            stated.ignored.join(", ")
        ));
    }
    Ok(stated)
}

impl SamplingArgs {
    /// The settings; says in a line what they are where the file has a part in them.
    pub(crate) fn resolve(&self, stated: &GenerationConfig, context: &Context) -> SamplingFields {
        let fields = self.fields(stated);
        let alone = self.fields(&GenerationConfig::default());
        if described(&fields) != described(&alone) {
            context.terminal.step("Sampling", described(&fields));
        }
        fields
    }

    fn fields(&self, stated: &GenerationConfig) -> SamplingFields {
        let stated_temperature = match stated.do_sample {
            Some(true) => Some(stated.temperature.unwrap_or(1.0)),
            Some(false) => Some(0.0),
            None => stated.temperature,
        };
        SamplingFields {
            temperature: self.temperature.or(stated_temperature).unwrap_or(TEMPERATURE),
            top_k: self.top_k.or(stated.top_k),
            top_p: self.top_p.or(stated.top_p),
            min_p: self.min_p.or(stated.min_p),
            typical_p: self.typical_p.or(stated.typical_p),
            repetition_penalty: self
                .repetition_penalty
                .or(stated.repetition_penalty)
                .unwrap_or(1.0),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            no_repeat_ngram_size: self.no_repeat_ngram_size.or(stated.no_repeat_ngram_size),
            seed: self.seed,
            ..SamplingFields::default()
        }
    }
}

/// The settings that do something, as a line.
fn described(fields: &SamplingFields) -> String {
    let mut text = format!("at temperature {}", fields.temperature);
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            write!(text, ", {name} {value}").expect("a String takes any text");
        }
    };
    add("top_k", fields.top_k.map(|k| k.to_string()));
    add("top_p", fields.top_p.map(|p| p.to_string()));
    add("min_p", fields.min_p.map(|p| p.to_string()));
    add("typical_p", fields.typical_p.map(|p| p.to_string()));
    let penalty = Some(fields.repetition_penalty).filter(|penalty| (penalty - 1.0).abs() > 0.0);
    add("repetition_penalty", penalty.map(|penalty| penalty.to_string()));
    add("no_repeat_ngram_size", fields.no_repeat_ngram_size.map(|n| n.to_string()));
    text
}
