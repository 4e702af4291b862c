//! How answers are chosen: flags first, then what the model's authors state, then a default.

use std::fmt::Write as _;

use cairn_data::tokenizer::GenerationConfig;
use cairn_engine::{SamplingFields, SamplingParams};
use clap::Args;

use crate::context::Context;
use crate::model_folder::ModelFolder;

/// Temperature where nobody says anything.
const TEMPERATURE: f32 = 0.8;

/// How tokens of an answer are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling [default: the model's generation_config.json]")]
pub(crate) struct ChatSamplingArgs {
    /// 0 takes the likeliest token, 1 leaves the model's distribution as it is
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
    /// Divide the logits of tokens that occurred in the conversation
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Seed; the same seed gives the same answers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl ChatSamplingArgs {
    /// The settings, and the file they may come from. Says what was taken and what was not.
    pub(crate) fn resolve(
        &self,
        model: &ModelFolder,
        context: &Context,
    ) -> anyhow::Result<(SamplingParams, GenerationConfig)> {
        let found = GenerationConfig::read(&model.path)?;
        let stated = found.clone().unwrap_or_default();
        // In these files, silence about sampling means the likeliest token.
        let stated_temperature = match (&found, stated.do_sample) {
            (None, _) => None,
            (Some(_), Some(true)) => Some(stated.temperature.unwrap_or(1.0)),
            (Some(_), Some(false)) => Some(0.0),
            (Some(_), None) => stated.temperature,
        };
        let temperature = self.temperature.or(stated_temperature).unwrap_or(TEMPERATURE);
        let fields = SamplingFields {
            temperature,
            top_k: self.top_k.or(stated.top_k),
            top_p: self.top_p.or(stated.top_p),
            min_p: self.min_p.or(stated.min_p),
            typical_p: stated.typical_p,
            repetition_penalty: self
                .repetition_penalty
                .or(stated.repetition_penalty)
                .unwrap_or(1.0),
            no_repeat_ngram_size: stated.no_repeat_ngram_size,
            seed: self.seed,
            ..SamplingFields::default()
        };
        if found.is_some() {
            context.terminal.step("Sampling", described(&fields));
        }
        if !stated.ignored.is_empty() {
            context.terminal.warn(format_args!(
                "generation_config.json: there is no {} here; ignored",
                stated.ignored.join(", ")
            ));
        }
        Ok((SamplingParams::new(fields)?, stated))
    }
}

/// The settings that do something.
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
