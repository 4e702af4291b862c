//! The instruction sets a kernel can be compiled for, and the proof that this machine has one.

use std::fmt;

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{F32x16, Portable};

/// An instruction set that every kernel exists for. All give the same bits.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// Portable code over arrays of sixteen lanes; runs everywhere.
    Scalar,
    /// AVX2 with FMA: two 256-bit halves make sixteen lanes.
    Avx2,
    /// AVX-512 F, BW, DQ and VL: one register makes sixteen lanes.
    Avx512,
}

impl Isa {
    /// Every instruction set, plainest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name used in kernel names and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Vectors and rows of the widest register tile of a product.
    pub(crate) fn tile(self) -> (usize, usize) {
        match self {
            Self::Scalar => Portable::TILE,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::TILE,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::TILE,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => Portable::TILE,
        }
    }

    /// Whether this machine (and its operating system) can run it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Avx2 => has_avx2(),
            Self::Avx512 => has_avx512(),
        }
    }

    /// The instruction sets of this machine, plainest first.
    pub fn supported() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_supported()).collect()
    }

    /// The widest instruction set of this machine.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_supported()).unwrap_or(Self::Scalar)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

/// Proof that this machine runs an instruction set: only [`Simd::new`] makes one, and it checks.
///
/// The `kernel!` macro takes it as the first argument of every vector kernel, which is what makes
/// calling the `#[target_feature]` versions sound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simd(Isa);

impl Simd {
    /// Checks that the machine has `isa`. A plan that names another machine's instruction set is
    /// refused long before; here it is an invariant.
    pub(crate) fn new(isa: Isa) -> Self {
        assert!(isa.is_supported(), "this machine does not have {isa}");
        Self(isa)
    }

    /// The proven instruction set.
    pub(crate) fn isa(self) -> Isa {
        self.0
    }
}
