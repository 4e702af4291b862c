//! One micro-batch: rows of the loader's batch, ready to feed.

use std::ops::Range;

use cairn_data::loader::LoaderBatch;
use cairn_kernels::SeqSlot;
use cairn_program::{Feed, Run};

/// Rows of one run. A row holds one or more sequences; each attends only to itself.
///
/// Letter: `t` tokens of all rows.
#[derive(Clone, Debug)]
pub struct MicroBatch<'a> {
    ids_t: &'a [u32],
    positions_t: &'a [u32],
    targets_t: &'a [u32],
    /// 1 for a target, 0 for filling.
    is_target_t: &'a [f32],
    sequences: Vec<SeqSlot<'static>>,
    row_tokens: usize,
}

impl<'a> MicroBatch<'a> {
    /// All rows of a batch.
    pub fn whole(batch: &'a LoaderBatch) -> Self {
        Self::rows(batch, 0..batch.num_rows())
    }

    /// Some rows of a batch.
    ///
    /// # Panics
    ///
    /// Panics if there are no such rows.
    pub fn rows(batch: &'a LoaderBatch, rows: Range<usize>) -> Self {
        let tokens = rows.start * batch.row_tokens..rows.end * batch.row_tokens;
        // Sequences lie in order and none spans two rows.
        let of_rows = batch.sequences.iter().filter(|sequence| tokens.contains(&sequence.start));
        let sequences = of_rows.map(|sequence| SeqSlot {
            start: sequence.start - tokens.start,
            len: sequence.len,
            cached: 0,
            blocks: &[],
        });
        Self {
            sequences: sequences.collect(),
            ids_t: &batch.ids[tokens.clone()],
            positions_t: &batch.positions[tokens.clone()],
            targets_t: &batch.targets[tokens.clone()],
            is_target_t: &batch.loss_weights[tokens],
            row_tokens: batch.row_tokens,
        }
    }

    /// Tokens of all rows.
    pub fn num_tokens(&self) -> usize {
        self.ids_t.len()
    }

    /// The token to predict after each token, and whether it counts.
    pub fn targets(&self) -> impl Iterator<Item = (u32, bool)> {
        self.targets_t.iter().zip(self.is_target_t).map(|(&target, &weight)| (target, weight > 0.0))
    }

    /// Loss weight of every token: `weight` where there is a target, else 0.
    pub(crate) fn loss_weights(&self, weight: f32) -> Vec<f32> {
        self.is_target_t.iter().map(|is_target| weight * is_target).collect()
    }

    /// Adds the negative log-probabilities of the targets to `sum`, in token order, in f64.
    pub(crate) fn add_negative_log_likelihood(&self, logprob_t: &[f32], sum: &mut f64) {
        for ((_, counts), &logprob) in self.targets().zip(logprob_t) {
            if counts {
                *sum -= f64::from(logprob);
            }
        }
    }

    /// Feeds of the inputs that every program over tokens reads.
    pub(crate) fn feeds(&self) -> [Feed<'_>; 3] {
        [
            Feed::u32("ids", self.ids_t),
            Feed::u32("positions", self.positions_t),
            Feed::u32("targets", self.targets_t),
        ]
    }

    /// A run over this batch without gradients or randomness.
    pub(crate) fn scoring_run<'b>(&'b self, feeds: &'b [Feed<'b>]) -> Run<'b> {
        Run { row_tokens: self.row_tokens, ..Run::forward(feeds, &self.sequences) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_data::loader::Sequence;

    #[test]
    fn rows_take_their_own_sequences() {
        let sequence = |start, len| Sequence { start, len };
        let batch = LoaderBatch {
            ids: (0..12).collect(),
            positions: vec![0, 1, 0, 1, 0, 1, 2, 3, 0, 0, 1, 2],
            targets: (1..13).collect(),
            loss_weights: vec![1.0; 12],
            sequences: vec![
                sequence(0, 2),
                sequence(2, 2),
                sequence(4, 4),
                sequence(8, 1),
                sequence(9, 3),
            ],
            row_tokens: 4,
        };
        let rows = MicroBatch::rows(&batch, 1..3);
        assert_eq!(rows.ids_t, [4, 5, 6, 7, 8, 9, 10, 11]);
        let spans: Vec<_> = rows.sequences.iter().map(|slot| (slot.start, slot.len)).collect();
        assert_eq!(spans, [(0, 4), (4, 1), (5, 3)]);
        assert_eq!(MicroBatch::whole(&batch).sequences.len(), 5);
    }
}
