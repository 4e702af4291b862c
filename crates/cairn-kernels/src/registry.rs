//! What exists: every operator, the encodings and instruction sets it has kernels for, by name.
//!
//! A kernel's name is `operator.encoding.isa`, for instance `matmul.bf16.avx512`. An operator
//! describes itself in an [`Operator`] constant beside its code and is listed in [`OPERATORS`]; the
//! benchmark and the tuner know operators only through that list.

use std::fmt;

use crate::cpu::Cpu;
use crate::encoding::Encoding;
use crate::isa::Isa;

/// Every operator that has kernels.
pub const OPERATORS: &[&Operator] = &[];

/// A named size, for instance `("t", 4096)`.
pub type Dim = (&'static str, usize);

/// The sizes of one benchmark case, in the operator's own letters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// The size called `name`.
    ///
    /// # Panics
    /// If the shape has no such size: an operator asks only for its own letters.
    pub fn size(&self, name: &str) -> usize {
        let found = self.0.iter().find(|(letter, _)| *letter == name);
        found.expect("an operator asks for its own letters").1
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, size)) in self.0.iter().enumerate() {
            write!(f, "{}{name}{size}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// One prepared benchmark case: its cost in the abstract, and the call itself.
pub struct Case {
    /// Floating-point operations of one call (a fused multiply-add is two).
    pub flops: f64,
    /// Bytes that one call must read or write at least, each counted once.
    pub bytes: f64,
    /// One call on prepared inputs. What it writes stays inside the case.
    pub run: Box<dyn FnMut(&Cpu)>,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flops, bytes, .. } = self;
        f.debug_struct("Case").field("flops", flops).field("bytes", bytes).finish_non_exhaustive()
    }
}

/// An operator with kernels for every instruction set.
#[derive(Debug)]
pub struct Operator {
    /// The instruction's name, for instance `matmul`.
    pub name: &'static str,
    /// One line on what it computes and how.
    pub description: &'static str,
    /// Encodings of its weight; `[Encoding::F32]` for an operator without one.
    pub encodings: &'static [Encoding],
    /// Shapes worth measuring.
    pub shapes: fn() -> Vec<Shape>,
    /// Allocates inputs for one case.
    pub prepare: fn(&Shape, Encoding) -> Case,
}

/// One kernel: an operator, an encoding and an instruction set.
#[derive(Clone, Copy, Debug)]
pub struct KernelEntry {
    /// The operator.
    pub operator: &'static Operator,
    /// The weight's encoding.
    pub encoding: Encoding,
    /// The instruction set.
    pub isa: Isa,
}
