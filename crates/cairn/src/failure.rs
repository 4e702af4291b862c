//! Errors as people see them: what happened, why, and what to do about it.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use cairn_spec::Hint;

use crate::terminal::Terminal;

/// Exit code for the user's mistakes and the machine's limits.
pub(crate) const EXIT_USER: u8 = 1;
/// Exit code of what was interrupted before it was done: the one shells give for Ctrl-C.
pub(crate) const EXIT_INTERRUPTED: u8 = 130;
/// Exit code for bugs of ours.
pub(crate) const EXIT_BUG: u8 = 2;

/// A mistake that the command line noticed itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct UserError {
    message: String,
    hints: Vec<String>,
    exit_code: u8,
}

impl UserError {
    /// An error in lower case, without a final period.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hints: Vec::new(), exit_code: EXIT_USER }
    }

    /// The end of something that someone asked to stop.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self { exit_code: EXIT_INTERRUPTED, ..Self::new(message) }
    }

    /// Adds something the user can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl Hint for UserError {
    fn hints(&self) -> Vec<String> {
        self.hints.clone()
    }
}

/// Prints an error with its causes and hints; a closed pipe is no error.
pub(crate) fn report(error: &anyhow::Error, terminal: &Terminal) {
    if is_closed_pipe(error) {
        return;
    }
    terminal.error(error);
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if text != last {
            terminal.cause(&text);
        }
        last = text;
    }
    for hint in hints(error) {
        terminal.hint(hint);
    }
}

/// The exit code of an error.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    if is_closed_pipe(error) {
        return ExitCode::SUCCESS;
    }
    let own = error.chain().find_map(|cause| cause.downcast_ref::<UserError>());
    ExitCode::from(own.map_or(EXIT_USER, |error| error.exit_code))
}

/// Whoever read our output has seen enough (`cairn … | head`).
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Hints of every error in the chain that has some, outermost first, each once.
pub(crate) fn hints(error: &anyhow::Error) -> Vec<String> {
    let mut hints: Vec<String> = Vec::new();
    for hint in error.chain().flat_map(hints_of) {
        if !hints.contains(&hint) {
            hints.push(hint);
        }
    }
    hints
}

/// Looks for the first of the listed types that the error is.
macro_rules! hints_of_types {
    ($error:expr; $($type:ty),* $(,)?) => {
        $(if let Some(error) = $error.downcast_ref::<$type>() {
            return error.hints();
        })*
    };
}

fn hints_of(error: &(dyn Error + 'static)) -> Vec<String> {
    hints_of_types!(error;
        UserError,
        crate::undescribed::Undescribed,
        cairn_kernels::CpuError,
        cairn_serve::ServeError,
        cairn_serve::NoRoom,
        cairn_serve::TlsError,
        cairn_spec::SpecError,
        cairn_spec::LoraError,
        cairn_model::AdapterError,
        cairn_model::DetectError,
        cairn_model::LoadError,
        cairn_spec::RecipeError,
        cairn_spec::units::UnitError,
        cairn_artifacts::FileError,
        cairn_artifacts::CheckpointError,
        cairn_artifacts::run::RecordError,
        cairn_artifacts::safetensors::ReadError,
        cairn_artifacts::safetensors::WeightsError,
        cairn_artifacts::gguf::GgufReadError,
        cairn_artifacts::leanpack::PackError,
        cairn_convert::ConvertError,
        cairn_model::gguf::GgufSpecError,
        cairn_data::tokenizer::TokenizerError,
        cairn_data::chat::ChatError,
        cairn_data::chat::ConversationError,
        cairn_data::corpus::CorpusError,
        cairn_data::corpus::ReadError,
        cairn_engine::SamplingError,
        cairn_engine::EngineError,
        cairn_engine::GenerateError,
        cairn_eval::EvalError,
        cairn_train::PlanError,
        cairn_train::TrainError,
    );
    Vec::new()
}
