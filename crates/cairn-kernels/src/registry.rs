//! What exists: every operator, the encodings and instruction sets it has kernels for, by name.
//!
//! A kernel's name is `operator.encoding.isa`, for instance `matmul.bf16.avx512`. An operator
//! describes itself in a table beside its code (`matmul/bench.rs`); the benchmark and the tuner know
//! operators only through [`operators`].

use std::fmt;

use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::encoding::Encoding;
use crate::isa::Isa;

/// The tables of all operators.
const TABLES: [&[Operator]; 14] = [
    crate::matmul::bench::OPERATORS,
    crate::expert_bench::OPERATORS,
    crate::attention::bench::OPERATORS,
    crate::token_logprob::bench::OPERATORS,
    crate::embed::bench::OPERATORS,
    crate::rms_norm::bench::OPERATORS,
    crate::layer_norm::bench::OPERATORS,
    crate::rope::bench::OPERATORS,
    crate::activation::bench::OPERATORS,
    crate::pointwise::bench::OPERATORS,
    crate::rows::bench::OPERATORS,
    crate::dropout::bench::OPERATORS,
    crate::optimizer::bench::OPERATORS,
    crate::normal::bench::OPERATORS,
];

/// Every operator that has kernels.
pub fn operators() -> impl Iterator<Item = &'static Operator> {
    TABLES.into_iter().flatten()
}

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

    /// Several sizes at once, as [`size`](Self::size) gives them.
    pub(crate) fn sizes<const N: usize>(&self, names: [&str; N]) -> [usize; N] {
        names.map(|name| self.size(name))
    }

    /// The same with no size above `limit`: what a test has time for.
    #[cfg(test)]
    pub(crate) fn capped(&self, limit: usize) -> Self {
        Self(self.0.iter().map(|&(name, size)| (name, size.min(limit))).collect())
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
    /// The arithmetic that its operations are of: which peak they are held against.
    pub compute: Compute,
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
    /// The instruction's name, for instance `matmul`, or that of one form of it.
    pub name: &'static str,
    /// One line on what it computes and how.
    pub description: &'static str,
    /// Encodings of its weight; `[Encoding::F32]` for an operator without one.
    pub encodings: &'static [Encoding],
    /// Shapes worth measuring, the most telling first.
    pub shapes: &'static [&'static [Dim]],
    /// Allocates inputs for one case.
    pub prepare: fn(&Shape, Encoding) -> Case,
}

impl Operator {
    /// The shapes worth measuring.
    pub fn shapes(&self) -> impl Iterator<Item = Shape> {
        self.shapes.iter().map(|dims| Shape(dims.to_vec()))
    }
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

impl KernelEntry {
    /// `operator.encoding.isa`.
    pub fn name(&self) -> String {
        format!("{}.{}.{}", self.operator.name, self.encoding, self.isa)
    }
}

/// A kernel that does not exist.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No kernel of that name.
    #[error("there is no kernel {name:?}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The most similar names that exist.
        nearest: Vec<String>,
    },
}

impl RegistryError {
    /// What the user can ask for instead, one line each.
    pub fn hints(&self) -> Vec<String> {
        match self {
            Self::Unknown { nearest, .. } => {
                nearest.iter().map(|name| format!("did you mean {name}?")).collect()
            }
        }
    }
}

/// Every kernel there is, on any machine: ask [`Isa::is_supported`] whether it runs on this one.
pub fn kernels() -> Vec<KernelEntry> {
    let of_operator = |operator: &'static Operator| {
        operator.encodings.iter().flat_map(move |&encoding| {
            Isa::ALL.into_iter().map(move |isa| KernelEntry { operator, encoding, isa })
        })
    };
    operators().flat_map(of_operator).collect()
}

/// The kernel called `name`.
///
/// # Errors
/// [`RegistryError::Unknown`] with the nearest names, if there is none.
pub fn find(name: &str) -> Result<KernelEntry, RegistryError> {
    let all = kernels();
    if let Some(found) = all.iter().find(|entry| entry.name() == name) {
        return Ok(*found);
    }
    let mut by_distance: Vec<(usize, String)> =
        all.iter().map(|entry| (distance(name, &entry.name()), entry.name())).collect();
    by_distance.sort();
    let nearest = by_distance.into_iter().take(NEAREST).map(|(_, name)| name).collect();
    Err(RegistryError::Unknown { name: name.to_owned(), nearest })
}

/// Names offered when one is unknown.
const NEAREST: usize = 3;

/// Levenshtein distance: insertions, deletions and replacements that turn one name into the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        let all = kernels();
        for entry in &all {
            let found = find(&entry.name()).unwrap();
            assert_eq!(found.name(), entry.name());
            assert_eq!(all.iter().filter(|other| other.name() == entry.name()).count(), 1);
        }
        assert!(find("matmul.bf16.avx512").is_ok());
    }

    /// The sources of this crate.
    fn sources(folder: &Path, into: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, into);
            } else {
                into.push(std::fs::read_to_string(path).unwrap());
            }
        }
    }

    /// A kernel is a public function of a handle and a struct of arguments: a new one cannot be left
    /// out of the registry, nor be without a definition in plain loops, nor without a test of random
    /// shapes that compares the two.
    #[test]
    fn every_kernel_is_registered_and_compared_with_a_reference() {
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        // Words of the files with tests of random shapes, definitions left out.
        let words: BTreeSet<&str> = files
            .iter()
            .filter(|file| file.contains("proptest! {"))
            .flat_map(|file| file.lines())
            .filter(|line| !line.starts_with("pub fn "))
            .flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'))
            .collect();
        let text = files.concat();
        let names: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("pub fn ")?.split_once("(cpu: &Cpu, args: "))
            .map(|(name, _)| name)
            .collect();
        assert!(names.len() >= 48 && names.contains(&"matmul"), "{names:?}");
        for name in names {
            // The norm of all gradients is the sum of each one's squares.
            let operator = if name == "sum_squares" { "global_norm" } else { name };
            assert!(operators().any(|known| known.name == operator), "{name} is not registered");
            let definition = format!("\npub fn {name}_reference(");
            assert!(text.contains(&definition), "{name} has no definition in plain loops");
            let reference = format!("{name}_reference");
            assert!(words.contains(reference.as_str()), "{name} is not compared");
        }
    }

    /// An operator that reads a weight has kernels for every encoding of one.
    #[test]
    fn encodings_are_the_ones_an_operator_meets() {
        let weights: &[&str] = &[
            "matmul",
            "matmul_dx",
            "expert_matmul",
            "expert_matmul_dx",
            "embed",
            "position_embed",
            "token_logprob",
            "token_logprob_grad",
            "cross_entropy",
        ];
        let cached = ["attention_decode", "kv_write"];
        for operator in operators() {
            let expected: &[Encoding] = match operator.name {
                name if weights.contains(&name) => &Encoding::ALL,
                name if cached.contains(&name) => &[Encoding::F32, Encoding::Bf16, Encoding::Q8],
                "adamw" => &[Encoding::F32, Encoding::Bf16],
                "matmul_bf16" => &[Encoding::Bf16, Encoding::Bf16z],
                "matmul_rows" => &[Encoding::F32, Encoding::Bf16, Encoding::F16],
                "matmul_rows_bf16" => &[Encoding::Bf16],
                "matmul_int8" => &[Encoding::Q8, Encoding::Q4],
                _ => &[Encoding::F32],
            };
            assert_eq!(operator.encodings, expected, "{}", operator.name);
        }
        let all = kernels().len();
        let encodings: usize = operators().map(|operator| operator.encodings.len()).sum();
        assert_eq!(all, encodings * Isa::ALL.len());
    }

    #[test]
    fn unknown_names_are_refused_with_the_nearest() {
        let error = find("matmull.bf16.avx2").unwrap_err();
        assert_eq!(error.to_string(), "there is no kernel \"matmull.bf16.avx2\"");
        assert_eq!(error.hints()[0], "did you mean matmul.bf16.avx2?");
        assert_eq!(error.hints().len(), NEAREST);
    }
}
