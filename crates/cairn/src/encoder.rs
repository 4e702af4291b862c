//! Whole texts through a model at once: hidden states, or logits of chosen tokens.
//!
//! Texts lie end to end in a run, each its own sequence, so a text's numbers do not depend on its
//! neighbors.

use std::ops::Range;

use anyhow::Context as _;
use cairn_data::tokenizer::{SpelledSpecials, Tokenizer};
use cairn_kernels::SeqSlot;
use cairn_model::{BuildOptions, Head, build_stored_program};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::model::MaskKind;

use crate::context::Context;
use crate::model_folder::ModelFolder;
use crate::storage::Storage;
use crate::terminal::Terminal;

/// Tokens of a run, where no text is longer.
pub(crate) const RUN_TOKENS: usize = 2048;

const PROGRAM: ProgramId = ProgramId(0);

/// What is wanted of the texts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted<'a> {
    /// The final hidden states of all tokens.
    Hidden,
    /// The logits of so many tokens of each text.
    Logits(&'a [usize]),
}

/// A model that reads whole texts.
pub(crate) struct Encoder {
    session: Session,
    output: String,
}

/// Says where a model's tokenizer has the tokens that encoders read around a text and puts none there:
/// what the file says is done.
pub(crate) fn warn_of_bare_texts(
    model: &ModelFolder,
    tokenizer: &Tokenizer,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let has_both = ["[CLS]", "[SEP]"].iter().all(|name| tokenizer.token_id(name).is_some());
    let reads_around = model.spec.attention.mask == MaskKind::Bidirectional && has_both;
    if reads_around && tokenizer.encode_for_model("", SpelledSpecials::Text)?.is_empty() {
        terminal.warn(
            "the tokenizer puts no [CLS] and [SEP] around texts, though it has them: its \
             tokenizer.json has no post_processor that does (transformers 5 adds them for BERT)",
        );
    }
    Ok(())
}

/// Texts that are run together: which ones.
pub(crate) fn runs_of(texts: &[Vec<u32>]) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut begin = 0;
    let mut tokens = 0;
    for (index, text) in texts.iter().enumerate() {
        if begin < index && RUN_TOKENS < tokens + text.len() {
            runs.push(begin..index);
            (begin, tokens) = (index, 0);
        }
        tokens += text.len();
    }
    if begin < texts.len() {
        runs.push(begin..texts.len());
    }
    runs
}

/// The most of everything that a run of these texts has: a vocabulary's worth of logits is planned
/// for the tokens that are asked for, not for all.
fn sizes_of(texts: &[Vec<u32>], wanted: Wanted<'_>) -> Sizes {
    let runs = runs_of(texts);
    let most = |count: &dyn Fn(Range<usize>) -> usize| {
        runs.iter().map(|run| count(run.clone())).max().unwrap_or(0).max(1)
    };
    let tokens = most(&|run| texts[run].iter().map(Vec::len).sum());
    let outputs = match wanted {
        Wanted::Hidden => tokens,
        Wanted::Logits(rows) => most(&|run| rows[run].iter().sum()),
    };
    Sizes { outputs, ..Sizes::dense(tokens, most(&|run| run.len())) }
}

/// The memory of a model that runs texts of these sizes, and the name of what it gives.
pub(crate) fn plan(
    (model, storage): (&ModelFolder, &Storage),
    sizes: Sizes,
    wanted: Wanted<'_>,
) -> anyhow::Result<(MemoryPlan, String)> {
    let (head, output) = match wanted {
        Wanted::Hidden => (Head::Hidden, format!("hidden_{}", model.spec.num_hidden_layers)),
        Wanted::Logits(_) => (Head::GatheredLogits, "logits".to_owned()),
    };
    let layout = model.layout();
    let encoding = storage.encoding;
    let options = BuildOptions { encoding, layout, ..BuildOptions::new(head) };
    let adapters = model.adapters();
    let program = build_stored_program(&model.spec, &options, &adapters, &storage.own)?;
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    Ok((MemoryPlan::new(vec![program], None)?, output))
}

impl Encoder {
    /// Loads the model for these texts.
    pub(crate) fn load(
        (model, storage): (&ModelFolder, &Storage),
        texts: &[Vec<u32>],
        wanted: Wanted<'_>,
        context: &Context,
    ) -> anyhow::Result<Self> {
        let (plan, output) = plan((model, storage), sizes_of(texts, wanted), wanted)?;
        Self::planned(model, (plan, output), context)
    }

    /// Loads the model as it was planned.
    pub(crate) fn planned(
        model: &ModelFolder,
        (plan, output): (MemoryPlan, String),
        context: &Context,
    ) -> anyhow::Result<Self> {
        let session = model.session(plan, context.cpu()?)?;
        Ok(Self { session, output })
    }

    /// Runs texts together; `rows` lists the tokens whose logits are wanted, counted over all texts.
    pub(crate) fn run(
        &mut self,
        texts: &[Vec<u32>],
        rows: Option<&[u32]>,
    ) -> anyhow::Result<&[f32]> {
        let ids: Vec<u32> = texts.concat();
        let mut positions = Vec::with_capacity(ids.len());
        let mut slots = Vec::with_capacity(texts.len());
        for text in texts {
            let start = positions.len();
            let length = u32::try_from(text.len()).context("a text has too many tokens")?;
            positions.extend(0..length);
            slots.push(SeqSlot { start, len: text.len(), cached: 0, blocks: &[] });
        }
        let mut feeds = vec![Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
        let mut outputs = ids.len();
        if let Some(rows) = rows {
            feeds.push(Feed::u32("rows", rows));
            outputs = rows.len();
        }
        let run = Run { outputs, ..Run::forward(&feeds, &slots) };
        self.session.run(PROGRAM, &run)?;
        Ok(self.session.output(PROGRAM, &self.output))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_in_order_and_not_too_long() {
        let texts: Vec<Vec<u32>> =
            [2000, 40, 9, 5000, 1, 1].into_iter().map(|length| vec![0; length]).collect();
        assert_eq!(runs_of(&texts), [0..2, 2..3, 3..4, 4..6]);
        assert!(runs_of(&[]).is_empty());
    }

    #[test]
    fn logits_are_planned_for_what_is_asked_for() {
        let texts: Vec<Vec<u32>> =
            [2000, 40, 9, 1000].into_iter().map(|length| vec![0; length]).collect();
        assert_eq!(runs_of(&texts), [0..2, 2..4]);
        let sizes = sizes_of(&texts, Wanted::Logits(&[1, 2, 5, 1]));
        assert_eq!((sizes.tokens, sizes.sequences, sizes.outputs), (2040, 2, 6));
        assert_eq!(sizes_of(&texts, Wanted::Hidden).outputs, 2040);
        assert_eq!(sizes_of(&[], Wanted::Logits(&[])), Sizes::dense(1, 1));
    }
}
