//! Whole texts through a model at once: hidden states, or logits of chosen tokens.
//!
//! Texts lie end to end in a run, each its own sequence, so a text's numbers do not depend on its
//! neighbors.

use std::ops::Range;

use anyhow::Context as _;
use cairn_kernels::SeqSlot;
use cairn_model::{BuildOptions, Head, build_program, load_weights};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};

use crate::context::Context;
use crate::model_folder::ModelFolder;

/// Tokens of a run, where no text is longer.
const RUN_TOKENS: usize = 2048;

const PROGRAM: ProgramId = ProgramId(0);

/// A model that reads whole texts.
pub(crate) struct Encoder {
    session: Session,
    output: String,
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

impl Encoder {
    /// Loads the model for these texts; `head` is [`Head::Hidden`] or [`Head::GatheredLogits`].
    pub(crate) fn load(
        model: &ModelFolder,
        head: Head,
        texts: &[Vec<u32>],
        context: &Context,
    ) -> anyhow::Result<Self> {
        let runs = runs_of(texts);
        let tokens = |run: &Range<usize>| texts[run.clone()].iter().map(Vec::len).sum::<usize>();
        let most_tokens = runs.iter().map(tokens).max().unwrap_or(0).max(1);
        let most_texts = runs.iter().map(Range::len).max().unwrap_or(0).max(1);
        let program = build_program(&model.spec, &BuildOptions::new(head))?;
        let sizes = Sizes::dense(most_tokens, most_texts);
        let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
        let mut session = Session::new(MemoryPlan::new(vec![program], None)?, context.cpu()?)?;
        load_weights(&mut session, &model.spec, &model.weights)
            .with_context(|| format!("cannot load {}", model.path.display()))?;
        let output = match head {
            Head::Hidden => format!("hidden_{}", model.spec.num_hidden_layers),
            _ => "logits".to_owned(),
        };
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
}
