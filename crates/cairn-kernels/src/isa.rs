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
    /// AVX2 with FMA and F16C: two 256-bit halves make sixteen lanes.
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
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
fn has_pair_dot() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_pair_dot() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn has_byte_dot() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_byte_dot() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

/// The processor's own name, for instance `AMD EPYC 9R14`, or its architecture where it has none.
pub fn cpu_name() -> String {
    let name = brand_string();
    let trimmed = name.trim_matches(|c: char| c == '\0' || c.is_whitespace());
    if trimmed.is_empty() { std::env::consts::ARCH.to_owned() } else { trimmed.to_owned() }
}

/// Bytes of the largest cache that a core of this machine reads through, if the processor tells.
#[cfg(target_arch = "x86_64")]
pub(crate) fn last_level_cache_bytes() -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    /// Intel's leaf of cache parameters, and AMD's of the same form.
    const LEAVES: [u32; 2] = [0x4, 0x8000_001d];
    const CACHES_MAX: u32 = 16;
    let bytes_of = |leaf: u32, index: u32| {
        let cache = __cpuid_count(leaf, index);
        if cache.eax & 0x1f == 0 {
            return None;
        }
        let field = |from: u32, bits: u32| (cache.ebx >> from & ((1 << bits) - 1)) as usize + 1;
        Some(field(0, 12) * field(12, 10) * field(22, 10) * (cache.ecx as usize + 1))
    };
    let caches = LEAVES.into_iter().flat_map(|leaf| {
        let is_there = __cpuid(leaf & 0x8000_0000).eax >= leaf;
        let count = if is_there { CACHES_MAX } else { 0 };
        (0..count).map_while(move |index| bytes_of(leaf, index))
    });
    caches.max()
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn last_level_cache_bytes() -> Option<usize> {
    None
}

/// Leaves 0x80000002 to 0x80000004 of `cpuid` hold 48 characters.
#[cfg(target_arch = "x86_64")]
fn brand_string() -> String {
    use std::arch::x86_64::__cpuid;
    const LAST_LEAF: u32 = 0x8000_0004;
    if __cpuid(0x8000_0000).eax < LAST_LEAF {
        return String::new();
    }
    let leaves = (LAST_LEAF - 2..=LAST_LEAF).map(__cpuid);
    let registers = leaves.flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    let bytes: Vec<u8> = registers.flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(not(target_arch = "x86_64"))]
fn brand_string() -> String {
    String::new()
}

/// Proof that this machine runs an instruction set: only [`Simd::new`] makes one, and it checks.
///
/// The `kernel!` macro takes it as the first argument of every vector kernel, which is what makes
/// calling the `#[target_feature]` versions sound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simd {
    isa: Isa,
    pair_dot: bool,
    byte_dot: bool,
}

impl Simd {
    /// Checks that the machine has `isa`. A plan that names another machine's instruction set is
    /// refused long before; here it is an invariant.
    pub(crate) fn new(isa: Isa) -> Self {
        assert!(isa.is_supported(), "this machine does not have {isa}");
        let is_widest = isa == Isa::Avx512;
        let (pair_dot, byte_dot) = (is_widest && has_pair_dot(), is_widest && has_byte_dot());
        Self { isa, pair_dot, byte_dot }
    }

    /// The same without `vdpbf16ps`.
    pub(crate) fn without_pair_dot(self) -> Self {
        Self { pair_dot: false, ..self }
    }

    /// The same without `vpdpbusd`.
    pub(crate) fn without_byte_dot(self) -> Self {
        Self { byte_dot: false, ..self }
    }

    /// The proven instruction set.
    pub(crate) fn isa(self) -> Isa {
        self.isa
    }

    /// Whether `vdpbf16ps` on AVX-512 registers is there as well. Proven, too.
    pub(crate) fn has_pair_dot(self) -> bool {
        self.pair_dot
    }

    /// Whether `vpdpbusd` on AVX-512 registers is there as well. Proven, too.
    pub(crate) fn has_byte_dot(self) -> bool {
        self.byte_dot
    }
}
