//! The `cairn` command.
//!
//! This crate owns what a person or a script sees: arguments, environment, signals, what is printed
//! and the exit code (0 done, 1 the user's mistake or the machine's limits, 2 a bug of ours, 130
//! interrupted before it was done).
//! Everything else lives in the libraries. Standard output carries data, standard error talk.
#![forbid(unsafe_code)]

mod args;
mod calibration;
mod chat;
mod command;
mod compute_dtype;
mod context;
mod coverage;
mod encoder;
mod environment;
mod evaluation;
mod failure;
mod figures;
mod gate_file;
mod load;
mod log_lines;
mod machine;
mod machine_profile;
mod model_folder;
mod named_values;
mod outside;
mod pack_args;
mod panic_report;
mod plan_text;
mod pooling;
mod progress_line;
mod runs;
mod sampling;
mod served;
mod shell_word;
mod signals;
mod speculative;
mod storage;
mod table;
mod terminal;
mod text_input;
mod train_display;
mod training;
mod undescribed;
mod weight_type;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::context::Context;
use crate::environment::Environment;
use crate::failure::{EXIT_BUG, EXIT_USER};
use crate::terminal::Terminal;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do if even this cannot be printed.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USER } else { 0 });
        }
    };
    panic_report::install();
    // What a panic leaves half done is never looked at again: the process ends.
    match catch_unwind(AssertUnwindSafe(|| run(cli))) {
        Ok(code) => code,
        Err(_) => {
            panic_report::print();
            ExitCode::from(EXIT_BUG)
        }
    }
}

fn run(cli: Cli) -> ExitCode {
    let environment = Environment::read();
    let terminal = Terminal::new(environment.no_color, cli.global.quiet);
    let done = Context::new(&cli.global, environment, terminal)
        .and_then(|context| command::run(cli.command, &context));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            failure::report(&error, &terminal);
            failure::exit_code(&error)
        }
    }
}
