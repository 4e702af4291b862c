//! What this machine is for `cairn doctor`: the facts of run records, and what decides speed.

use cairn_artifacts::machine::{Machine, available_memory_bytes};
use cairn_kernels::Isa;
use serde::Serialize;

/// The processor and the memory of this machine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MachineReport {
    /// What run records say about it.
    #[serde(flatten)]
    pub(crate) machine: Machine,
    /// Instruction sets with kernels, plainest first.
    pub(crate) instruction_sets: Vec<&'static str>,
    /// What this process may have of the memory: the least of what is free and of its limits.
    pub(crate) available_bytes: Option<u64>,
    /// The system's policy for transparent huge pages.
    pub(crate) huge_pages: Option<String>,
}

impl MachineReport {
    /// Asks the system.
    pub(crate) fn read() -> Self {
        Self {
            machine: Machine::read(),
            instruction_sets: Isa::supported().into_iter().map(Isa::name).collect(),
            available_bytes: available_memory_bytes(),
            huge_pages: huge_pages(),
        }
    }
}

/// What of allocated memory lies on huge pages here, in a word.
pub(crate) fn huge_page_text() -> String {
    match huge_pages().as_deref() {
        Some(word @ ("always" | "madvise")) => {
            format!("2 MiB where whole ones fit, the rest 4 KiB (the system says {word})")
        }
        Some(word) => format!("4 KiB (the system says {word} to huge ones)"),
        None => "4 KiB (the system has no huge ones)".to_owned(),
    }
}

/// The chosen word of `always [madvise] never`.
fn huge_pages() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}
