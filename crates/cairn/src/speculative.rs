//! `--speculative`: tokens guessed ahead and checked together; the output stays as it is.

use std::path::PathBuf;

use anyhow::Context as _;
use cairn_engine::{
    DraftMethod, Engine, EngineOptions, NUM_SPECULATIVE_TOKENS_MAX, SpeculationFigures,
    SpeculativeOptions,
};
use clap::Args;

use crate::context::Context;
use crate::figures::Percent;
use crate::model_folder::ModelFolder;
use crate::runs;
use crate::weight_type::WeightType;

/// The flags.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Guessing ahead")]
pub(crate) struct SpeculativeArgs {
    /// Guess tokens and check several at once, without changing the output: `ngram` (what followed
    /// the same words before), `depth:K` (the model's first K blocks), `draft:DIR` (a smaller model)
    #[arg(long, value_name = "METHOD", value_parser = Guesser::parse)]
    pub(crate) speculative: Option<Guesser>,
    /// Tokens guessed at once at most
    #[arg(long, value_name = "N", default_value_t = 4, requires = "speculative")]
    num_speculative_tokens: usize,
    /// Go on guessing where it turns out slower
    #[arg(long, requires = "speculative")]
    speculative_always: bool,
}

/// Who guesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Guesser {
    /// The text itself.
    Ngram,
    /// So many of the model's first blocks.
    Depth(usize),
    /// The model in a folder.
    Draft(PathBuf),
}

impl Guesser {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "ngram" => Ok(Self::Ngram),
            Some(("depth", blocks)) => match blocks.parse() {
                Ok(blocks) => Ok(Self::Depth(blocks)),
                Err(_) => Err(format!("'{blocks}' is no number of blocks")),
            },
            Some(("draft", folder)) if !folder.is_empty() => Ok(Self::Draft(folder.into())),
            _ => Err("expected ngram, depth:K or draft:DIR".to_owned()),
        }
    }

    fn method(&self) -> DraftMethod {
        match self {
            Self::Ngram => DraftMethod::Ngram,
            Self::Depth(blocks) => DraftMethod::Depth(*blocks),
            Self::Draft(_) => DraftMethod::Model,
        }
    }
}

impl SpeculativeArgs {
    /// Sets what was asked for.
    pub(crate) fn apply(&self, options: &mut EngineOptions) {
        let Some(guesser) = &self.speculative else { return };
        let count = self.num_speculative_tokens;
        options.speculative = Some(SpeculativeOptions {
            always: self.speculative_always,
            ..SpeculativeOptions::new(guesser.method(), count)
        });
        // A step must hold the guesses of one sequence.
        let least = options.max_num_seqs + count.min(NUM_SPECULATIVE_TOKENS_MAX);
        options.max_num_batched_tokens = options.max_num_batched_tokens.max(least);
    }

    /// Loads the model that guesses, if one was named.
    pub(crate) fn attach(&self, engine: &mut Engine, context: &Context) -> anyhow::Result<()> {
        let Some(Guesser::Draft(folder)) = &self.speculative else { return Ok(()) };
        let model = ModelFolder::open(&runs::model_folder(Some(folder))?, context.terminal)?;
        let options = engine.options();
        let max_context = options.max_context.min(model.spec.context_limit());
        let mut draft = EngineOptions::new(options.max_num_seqs, max_context);
        let storage = WeightType::AUTO.storage(&model, draft.compute, context)?;
        draft.encoding = storage.encoding;
        let draft = model.engine(draft, &storage, context.cpu()?)?;
        let what = || format!("{} cannot guess for this model", folder.display());
        engine.attach_draft(draft).with_context(what)
    }
}

/// What came of it, for the terminal; `None` where nothing was guessed.
pub(crate) fn summary(figures: Option<&SpeculationFigures>) -> Option<String> {
    let figures = figures?;
    let share = Percent(figures.acceptance()?);
    let SpeculationFigures { num_accepted_tokens, num_draft_tokens, num_stops, .. } = figures;
    let stops = match num_stops {
        0 => String::new(),
        1 => "; off for a while, being slower".to_owned(),
        stops => format!("; {stops} times off for a while, being slower"),
    };
    Some(format!("{num_accepted_tokens} of {num_draft_tokens} tokens ({share}){stops}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_spelled_as_documented() {
        assert_eq!(Guesser::parse("ngram"), Ok(Guesser::Ngram));
        assert_eq!(Guesser::parse("depth:4"), Ok(Guesser::Depth(4)));
        assert_eq!(Guesser::parse("draft:a:b"), Ok(Guesser::Draft("a:b".into())));
        for wrong in ["", "ngrams", "depth", "depth:", "depth:x", "depth:-1", "draft:", "model:x"] {
            assert!(Guesser::parse(wrong).is_err(), "{wrong}");
        }
    }
}
