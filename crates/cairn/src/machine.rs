//! What this machine is for `cairn doctor`: the facts of run records, and what decides speed.

use std::path::Path;

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
            available_bytes: available_bytes(),
            huge_pages: huge_pages(),
        }
    }
}

/// Bytes that this process may still take, as far as the system tells.
pub(crate) fn available_bytes() -> Option<u64> {
    let control_group = || {
        let limit = number_in("/sys/fs/cgroup/memory.max")?;
        Some(limit.saturating_sub(number_in("/sys/fs/cgroup/memory.current").unwrap_or(0)))
    };
    [available_memory_bytes(), control_group()].into_iter().flatten().min()
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(Path::new(path)).ok()
}

fn number_in(path: &str) -> Option<u64> {
    read(path)?.trim().parse().ok()
}

/// The chosen word of `always [madvise] never`.
fn huge_pages() -> Option<String> {
    let text = read("/sys/kernel/mm/transparent_hugepage/enabled")?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}
