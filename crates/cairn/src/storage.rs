//! How a model's weight matrices are held in memory: most of them in one encoding, some in their own.

use std::collections::BTreeMap;

use cairn_kernels::{Encoding, Layout};
use cairn_model::{AdapterMap, BuildOptions, Head, build_stored_program};
use cairn_program::{Class, Program, Sizes};
use cairn_spec::ModelSpec;

/// Encodings of weight matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Storage {
    /// That of every matrix that has none of its own.
    pub(crate) encoding: Encoding,
    /// Those of single matrices, by name.
    pub(crate) own: BTreeMap<String, Encoding>,
}

impl Storage {
    /// All matrices in one encoding.
    pub(crate) fn uniform(encoding: Encoding) -> Self {
        Self { encoding, own: BTreeMap::new() }
    }

    /// The encodings there are.
    pub(crate) fn in_use(&self) -> Vec<Encoding> {
        let is_used =
            |known: &Encoding| *known == self.encoding || self.own.values().any(|own| own == known);
        Encoding::ALL.into_iter().filter(is_used).collect()
    }

    /// Bytes of a model's weights, as generation lays them out.
    pub(crate) fn weight_bytes(&self, spec: &ModelSpec) -> anyhow::Result<usize> {
        let program = self.program(spec, Layout::Panel)?;
        let sizes = Sizes::dense(1, 1);
        Ok(program.of_class(Class::Weight).map(|(_, weight)| weight.bytes(&sizes)).sum())
    }

    /// The program that generates with weights so held, or reads whole texts with them.
    pub(crate) fn program(&self, spec: &ModelSpec, layout: Layout) -> anyhow::Result<Program> {
        let head = if spec.head.is_some() { Head::Logits } else { Head::Hidden };
        let options = BuildOptions { encoding: self.encoding, layout, ..BuildOptions::new(head) };
        Ok(build_stored_program(spec, &options, &AdapterMap::default(), &self.own)?)
    }
}

impl std::fmt::Display for Storage {
    /// `q4`, or `q4, 3 of them f32 or q8`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.encoding)?;
        let others: Vec<Encoding> =
            self.in_use().into_iter().filter(|known| *known != self.encoding).collect();
        if others.is_empty() {
            return Ok(());
        }
        let count = self.own.values().filter(|own| **own != self.encoding).count();
        let names: Vec<&str> = others.into_iter().map(Encoding::name).collect();
        let plural = if count == 1 { "matrix" } else { "matrices" };
        write!(f, ", {count} {plural} {}", names.join(" or "))
    }
}
