//! Named dimensions: what each axis of a value means, and how large it may get.
//!
//! A shape is a list of [`Dim`]s. Two shapes agree only when names *and* sizes agree in order, so a
//! transposed operand is refused even where the sizes happen to match.
//!
//! | letter | meaning | letter | meaning |
//! |---|---|---|---|
//! | `d` | hidden size | `t` | tokens of this run |
//! | `h` | query heads | `b` | sequences of this run |
//! | `g` | key/value heads | `o` | gathered output rows |
//! | `k` | head dim | `s` | cached keys |
//! | `f` | feed-forward width | `v` | vocabulary |
//! | `r` | low rank or latent | `w` | rows of a learned position table |
//! | `c` | latent plus rotary key width (MLA) | `e` | experts |
//! | `a` | experts that a token goes to | | |
//!
//! Routed rows, `m = t · a` of them, are the two axes `[t, a]`: tokens, and ranks within a token.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an axis means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DimName {
    /// `d`: hidden size.
    Hidden,
    /// `h`: query heads.
    Heads,
    /// `g`: key/value heads.
    KvHeads,
    /// `k`: width of one head.
    HeadDim,
    /// `f`: feed-forward width.
    Intermediate,
    /// `v`: vocabulary.
    Vocab,
    /// `e`: experts.
    Experts,
    /// `a`: experts that a token goes to.
    Chosen,
    /// `r`: low rank or latent.
    Rank,
    /// `c`: latent plus rotary key width.
    LatentKey,
    /// `w`: rows of a learned position table.
    Positions,
    /// `t`: tokens of this run, sequences laid end to end.
    Tokens,
    /// `b`: sequences of this run.
    Sequences,
    /// `o`: gathered output rows.
    Outputs,
    /// `s`: cached keys.
    Cached,
}

impl DimName {
    /// The letter used in shape suffixes and in program text.
    pub fn letter(self) -> char {
        match self {
            Self::Hidden => 'd',
            Self::Heads => 'h',
            Self::KvHeads => 'g',
            Self::HeadDim => 'k',
            Self::Intermediate => 'f',
            Self::Vocab => 'v',
            Self::Experts => 'e',
            Self::Chosen => 'a',
            Self::Rank => 'r',
            Self::LatentKey => 'c',
            Self::Positions => 'w',
            Self::Tokens => 't',
            Self::Sequences => 'b',
            Self::Outputs => 'o',
            Self::Cached => 's',
        }
    }
}

/// One axis of a shape: a name, and a size unless the run decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Dim {
    /// What the axis means.
    pub name: DimName,
    /// Its size; `None` for `t`, `b`, `o`, `s`, which a run decides within the plan's bounds.
    pub size: Option<usize>,
}

impl Dim {
    /// An axis of fixed size.
    pub const fn fixed(name: DimName, size: usize) -> Self {
        Self { name, size: Some(size) }
    }

    /// The token axis `t`.
    pub const TOKENS: Self = Self { name: DimName::Tokens, size: None };
    /// The sequence axis `b`.
    pub const SEQUENCES: Self = Self { name: DimName::Sequences, size: None };
    /// The axis of gathered output rows, `o`.
    pub const OUTPUTS: Self = Self { name: DimName::Outputs, size: None };
    /// The axis of cached keys, `s`.
    pub const CACHED: Self = Self { name: DimName::Cached, size: None };
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.size {
            Some(size) => write!(f, "{}={size}", self.name.letter()),
            None => write!(f, "{}", self.name.letter()),
        }
    }
}

/// A list of axes, outermost first; the empty shape is a scalar.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// A shape from its axes.
    pub fn new(dims: impl Into<Vec<Dim>>) -> Self {
        Self(dims.into())
    }

    /// The shape `[lead, ..rest]`.
    pub fn with_lead(lead: Dim, rest: &[Dim]) -> Self {
        let mut dims = Vec::with_capacity(rest.len() + 1);
        dims.push(lead);
        dims.extend_from_slice(rest);
        Self(dims)
    }

    /// Elements at the given sizes of the dynamic axes.
    pub fn elements(&self, sizes: &Sizes) -> usize {
        self.0.iter().map(|dim| dim.size.unwrap_or_else(|| sizes.of(dim.name))).product()
    }

    /// Product of the fixed axes: the width of one row.
    pub fn row_elements(&self) -> usize {
        self.0.iter().filter_map(|dim| dim.size).product()
    }

    /// Size of the last axis; 1 for a scalar or a dynamic last axis.
    pub fn last(&self) -> usize {
        self.0.last().and_then(|dim| dim.size).unwrap_or(1)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (position, dim) in self.0.iter().enumerate() {
            if position != 0 {
                f.write_str(", ")?;
            }
            write!(f, "{dim}")?;
        }
        f.write_str("]")
    }
}

/// Sizes of the dynamic axes: the bounds of a plan, or the counts of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sizes {
    /// `t`: tokens.
    pub tokens: usize,
    /// `b`: sequences.
    pub sequences: usize,
    /// `o`: output rows.
    pub outputs: usize,
    /// `s`: cached keys, all sequences together.
    pub cached: usize,
}

impl Sizes {
    /// Sizes of a run in which every token is an output and nothing is cached.
    pub fn dense(tokens: usize, sequences: usize) -> Self {
        Self { tokens, sequences, outputs: tokens, cached: 0 }
    }

    fn of(&self, name: DimName) -> usize {
        match name {
            DimName::Tokens => self.tokens,
            DimName::Sequences => self.sequences,
            DimName::Outputs => self.outputs,
            DimName::Cached => self.cached,
            // A fixed axis always carries its size; `Shape` is the only caller.
            DimName::Hidden
            | DimName::Heads
            | DimName::KvHeads
            | DimName::HeadDim
            | DimName::Intermediate
            | DimName::Vocab
            | DimName::Experts
            | DimName::Chosen
            | DimName::Rank
            | DimName::LatentKey
            | DimName::Positions => unreachable!("axis {} has no fixed size", name.letter()),
        }
    }
}
