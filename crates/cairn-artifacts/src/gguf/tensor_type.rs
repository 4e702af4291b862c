//! The types of tensors, with the size of their blocks.
//!
//! Numbers, names and sizes are those of `ggml_type` and `GGML_QUANT_SIZES` of the gguf package.

use super::Format;
use std::fmt;

/// The type of a tensor: how many elements make a block, and how many bytes that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorType(&'static Known);

#[derive(Debug, PartialEq, Eq)]
struct Known {
    id: u32,
    name: &'static str,
    block_elements: usize,
    block_bytes: usize,
    format: Option<Format>,
}

const fn known(
    id: u32,
    name: &'static str,
    (block_elements, block_bytes): (usize, usize),
) -> Known {
    Known { id, name, block_elements, block_bytes, format: None }
}

const fn read(id: u32, format: Format) -> Known {
    Known {
        id,
        name: format.name(),
        block_elements: format.block_elements(),
        block_bytes: format.block_bytes(),
        format: Some(format),
    }
}

/// Every type there is; those with a format are read.
static TYPES: [Known; 34] = [
    read(0, Format::F32),
    read(1, Format::F16),
    read(2, Format::Q4_0),
    known(3, "Q4_1", (32, 20)),
    known(6, "Q5_0", (32, 22)),
    known(7, "Q5_1", (32, 24)),
    read(8, Format::Q8_0),
    known(9, "Q8_1", (32, 40)),
    known(10, "Q2_K", (256, 84)),
    known(11, "Q3_K", (256, 110)),
    read(12, Format::Q4K),
    read(13, Format::Q5K),
    read(14, Format::Q6K),
    known(15, "Q8_K", (256, 292)),
    known(16, "IQ2_XXS", (256, 66)),
    known(17, "IQ2_XS", (256, 74)),
    known(18, "IQ3_XXS", (256, 98)),
    known(19, "IQ1_S", (256, 50)),
    known(20, "IQ4_NL", (32, 18)),
    known(21, "IQ3_S", (256, 110)),
    known(22, "IQ2_S", (256, 82)),
    known(23, "IQ4_XS", (256, 136)),
    known(24, "I8", (1, 1)),
    known(25, "I16", (1, 2)),
    known(26, "I32", (1, 4)),
    known(27, "I64", (1, 8)),
    known(28, "F64", (1, 8)),
    known(29, "IQ1_M", (256, 56)),
    read(30, Format::Bf16),
    known(34, "TQ1_0", (256, 54)),
    known(35, "TQ2_0", (256, 66)),
    known(39, "MXFP4", (32, 17)),
    known(40, "NVFP4", (64, 36)),
    known(41, "Q1_0", (128, 18)),
];

impl TensorType {
    /// The type with this number in files, or `None`.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|known| known.id == id).map(Self)
    }

    /// The type whose blocks mean what the format says.
    ///
    /// # Panics
    ///
    /// Never: every format is one of the types.
    pub fn of(format: Format) -> Self {
        let found = TYPES.iter().find(|known| known.format == Some(format));
        Self(found.expect("every format is listed"))
    }

    /// The number of the type in files.
    pub const fn id(self) -> u32 {
        self.0.id
    }

    /// Its name, as in ggml.
    pub const fn name(self) -> &'static str {
        self.0.name
    }

    /// Elements of a block; rows are whole blocks.
    pub const fn block_elements(self) -> usize {
        self.0.block_elements
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.0.block_bytes
    }

    /// What its blocks mean; `None` if Cairn does not read them.
    pub const fn format(self) -> Option<Format> {
        self.0.format
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}
