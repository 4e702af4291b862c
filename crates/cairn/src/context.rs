//! What every command is given besides its arguments.

use cairn_kernels::{Cpu, CpuError, Isa};
use cairn_spec::recipe::THREADS_MAX;

use crate::args::Global;
use crate::environment::Environment;
use crate::failure::UserError;
use crate::terminal::Terminal;

/// The outside of a command.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// What the process was given.
    pub(crate) environment: Environment,
    /// Where to print.
    pub(crate) terminal: Terminal,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// Whether a flag or the environment named their number.
    pub(crate) threads_asked: bool,
    /// Instruction set to compute with.
    pub(crate) isa: Isa,
}

impl Context {
    /// Resolves the global flags.
    pub(crate) fn new(
        global: &Global,
        environment: Environment,
        terminal: Terminal,
    ) -> anyhow::Result<Self> {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        let asked = match global.threads {
            Some(threads) => Some(threads),
            None => environment.threads()?,
        };
        let threads = asked.unwrap_or_else(all);
        if !(1..=THREADS_MAX).contains(&threads) {
            let message = format!("cannot compute with {threads} threads");
            return Err(UserError::new(message)
                .hint(format!("choose 1 to {THREADS_MAX}; this machine has {}", all()))
                .into());
        }
        let isa = global.isa.map_or_else(Isa::best, Isa::from);
        if !isa.is_supported() {
            return Err(CpuError::Isa { isa }.into());
        }
        Ok(Self { environment, terminal, threads, threads_asked: asked.is_some(), isa })
    }

    /// The processor, with the wished number of threads and this machine's tuning.
    pub(crate) fn cpu(&self) -> Result<Cpu, CpuError> {
        crate::machine_profile::cpu(self, self.threads)
    }
}
