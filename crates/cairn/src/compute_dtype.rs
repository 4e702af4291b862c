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
        match self.compute_dtype {
            ComputeDtype::F32 => Compute::F32,
            ComputeDtype::Bf16 => Compute::Bf16,
            ComputeDtype::Int8 => Compute::Int8,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ComputeDtype {
    F32,
    Bf16,
    Int8,
}
