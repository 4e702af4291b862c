//! Documents longer than the context, cut into windows.
//!
//! A window of `context` inputs moves on by `stride` tokens. The first window scores all its
//! targets, each further one the last `stride` of its own, so **every token after a document's first
//! is scored exactly once**, with at least `context − stride` tokens before it (fewer only at the
//! document's beginning). `stride = context` cuts the document into pieces, as packing does in
//! training; smaller strides cost `context / stride` times as much and give the model more to go on.
//! Positions restart at 0 in every window.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::EvalError;
use crate::scorer::check_limit;

/// How long documents are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Windows {
    context: usize,
    stride: usize,
}

/// A window of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The tokens that are read; the targets are one further.
    pub inputs: Range<usize>,
    /// How many of its targets, at the front, an earlier window scored.
    pub num_scored_before: usize,
}

impl Windows {
    /// Windows of `context` inputs, `stride` apart.
    ///
    /// # Errors
    ///
    /// [`EvalError::Limit`] unless 1 ≤ stride ≤ context.
    pub fn new(context: usize, stride: usize) -> Result<Self, EvalError> {
        check_limit("context", context, usize::MAX)?;
        check_limit("stride", stride, context)?;
        Ok(Self { context, stride })
    }

    /// Inputs of a window, at most.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Tokens from one window to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The windows of a document of `num_tokens` tokens.
    pub fn of(&self, num_tokens: usize) -> impl Iterator<Item = Window> + use<> {
        let Self { context, stride } = *self;
        let num_targets = num_tokens.saturating_sub(1);
        let more = num_targets.saturating_sub(context).div_ceil(stride);
        let windows = if num_targets == 0 { 0 } else { 1 + more };
        (0..windows).map(move |window| {
            let start = window * stride;
            let end = num_targets.min(start + context);
            let num_scored_before = if window == 0 { 0 } else { context - stride };
            Window { inputs: start..end, num_scored_before }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_scored_once_with_enough_before_it() {
        for context in 1..12 {
            for stride in 1..=context {
                let windows = Windows::new(context, stride).unwrap();
                for num_tokens in 0..50_usize {
                    let mut scored = Vec::new();
                    for Window { inputs, num_scored_before } in windows.of(num_tokens) {
                        assert!(inputs.len() <= context);
                        for input in inputs.clone().skip(num_scored_before) {
                            let before = input + 1 - inputs.start;
                            assert!(before == input + 1 || context - stride < before);
                            scored.push(input + 1);
                        }
                    }
                    let targets: Vec<usize> = (1..num_tokens).collect();
                    assert_eq!(scored, targets, "{windows:?} over {num_tokens}");
                }
            }
        }
    }

    #[test]
    fn impossible_windows_are_refused() {
        assert!(Windows::new(0, 1).is_err());
        assert!(Windows::new(8, 0).is_err());
        let error = Windows::new(8, 9).unwrap_err().to_string();
        assert_eq!(error, "stride is 9, which is not between 1 and 8");
    }
}
