//! `--compute-dtype`: the arithmetic of the products by a model's weight matrices.

use cairn_kernels::Compute;
use clap::{Args, ValueEnum};

/// The flag.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ComputeDtypeArgs {
    /// Type in which weight matrices are multiplied; bf16 wants weights of bf16 or bf16z, int8 of q8 or q4,
    /// and both round what they are multiplied with
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = ComputeDtype::F32)]
    compute_dtype: ComputeDtype,
}

impl ComputeDtypeArgs {
    /// What was asked for.
    pub(crate) fn compute(self) -> Compute {
        self.compute_dtype.compute()
    }
}

impl ComputeDtype {
    /// The arithmetic that it names.
    pub(crate) fn compute(self) -> Compute {
        match self {
            Self::F32 => Compute::F32,
            Self::Bf16 => Compute::Bf16,
            Self::Int8 => Compute::Int8,
        }
    }
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeDtype {
    /// As wide as activations are.
    F32,
    /// Pairs of bf16.
    Bf16,
    /// Bytes.
    Int8,
}
