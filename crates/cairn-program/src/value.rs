//! Values: everything an instruction reads or writes, with its class, type and shape.

use std::fmt;

use cairn_kernels::{Encoding, Layout, Weight};
use serde::{Deserialize, Serialize};

use crate::dim::{Shape, Sizes};

/// Index of a value in its program. Only [`crate::Builder`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ValueId(pub(crate) u32);

impl ValueId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Who owns a value and how long it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A parameter of the model: persists, read by instructions, written by optimizers.
    Weight,
    /// The gradient of a weight: persists from the first micro-batch to the update.
    Gradient,
    /// Persists between runs: moments, averages, the KV cache.
    State,
    /// Filled from the batch before a run.
    Input,
    /// Lives in the plan's arena and dies with the run.
    Temp,
}

/// Element type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueType {
    /// 32-bit float, row-major.
    F32,
    /// 64-bit float (norms summed over all parameters).
    F64,
    /// Token ids, positions, row indices.
    U32,
    /// A matrix in a storage encoding and layout; only weights have one.
    Encoded {
        /// How an element is stored.
        encoding: Encoding,
        /// In which order.
        layout: Layout,
        /// Elements of one row: what a product contracts.
        inputs: usize,
    },
}

impl ValueType {
    /// A weight matrix whose rows hold `inputs` elements; row-major `f32` is the plain type.
    pub fn weight(encoding: Encoding, layout: Layout, inputs: usize) -> Self {
        match (encoding, layout) {
            (Encoding::F32, Layout::RowMajor) => Self::F32,
            (encoding, layout) => Self::Encoded { encoding, layout, inputs },
        }
    }

    /// Encoding of a weight of this type; `None` for types that are no weight.
    pub fn encoding(self) -> Option<Encoding> {
        match self {
            Self::F32 => Some(Encoding::F32),
            Self::Encoded { encoding, .. } => Some(encoding),
            Self::F64 | Self::U32 => None,
        }
    }

    /// Bytes of so many elements.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 | Self::U32 => 4 * elements,
            Self::F64 => 8 * elements,
            Self::Encoded { encoding, layout, inputs } => {
                Weight::stored_bytes(encoding, layout, elements / inputs, inputs)
            }
        }
    }

    /// The type of the same weight in another layout.
    #[must_use]
    pub fn laid_out(self, layout: Layout) -> Self {
        match self {
            Self::Encoded { encoding, inputs, .. } => Self::weight(encoding, layout, inputs),
            Self::F32 | Self::F64 | Self::U32 => self,
        }
    }

    /// Layout of a weight of this type.
    pub fn layout(self) -> Layout {
        match self {
            Self::Encoded { layout, .. } => layout,
            Self::F32 | Self::F64 | Self::U32 => Layout::RowMajor,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F64 => f.write_str("f64"),
            Self::U32 => f.write_str("u32"),
            Self::Encoded { encoding, layout: Layout::RowMajor, .. } => write!(f, "{encoding}"),
            Self::Encoded { encoding, layout: Layout::Panel, .. } => write!(f, "{encoding}.panel"),
        }
    }
}

/// A declared value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Value {
    /// Unique within the program. Weights carry their Hugging Face tensor names.
    pub name: String,
    /// Who owns it.
    pub class: Class,
    /// Element type.
    pub value_type: ValueType,
    /// Axes.
    pub shape: Shape,
}

impl Value {
    /// Outputs and inputs of a weight matrix whose last `input_rank` axes are contracted.
    pub fn matrix(&self, input_rank: usize) -> (usize, usize) {
        let split = self.shape.0.len() - input_rank;
        let product = |dims: &[crate::Dim]| dims.iter().filter_map(|dim| dim.size).product();
        (product(&self.shape.0[..split]), product(&self.shape.0[split..]))
    }

    /// Bytes at the given sizes of the dynamic axes.
    pub fn bytes(&self, sizes: &Sizes) -> usize {
        self.value_type.bytes(self.shape.elements(sizes))
    }
}
