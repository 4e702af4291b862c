//! `cairn unpack`: a leanpack back into a folder that transformers loads.

use std::path::PathBuf;

use cairn_artifacts::leanpack::PackFile;
use cairn_model::{PackCheck, PackSource};
use clap::Args;

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Bytes;

const EXAMPLES: &str = "\
Examples:
  cairn unpack model.leanpack -o model/";

/// Turn a leanpack back into a folder with config.json and safetensors
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct UnpackArgs {
    /// The leanpack
    #[arg(value_name = "FILE")]
    pack: PathBuf,
    /// Folder to make; it must not be there yet
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
}

/// Unpacks.
pub(crate) fn run(args: &UnpackArgs, context: &Context) -> anyhow::Result<()> {
    if args.output.symlink_metadata().is_ok() {
        return Err(UserError::new(format!("{} is there already", args.output.display()))
            .hint("name a folder that is not, so that nothing is lost")
            .into());
    }
    let pack = PackFile::open(&args.pack)?;
    // A folder that looks whole must be.
    pack.verify(&mut |_, _| ())?;
    let source = PackSource::new(pack, PackCheck::default())?;
    let report = cairn_convert::unpack(&source, &args.output)?;
    let (path, bytes) = (args.output.display(), Bytes::of(report.bytes));
    let count = report.tensors;
    context.terminal.step("Unpacked", format_args!("{path}: {count} tensors, {bytes}"));
    if !report.rounded.is_empty() {
        context.terminal.warn(format_args!(
            "{} of {count} tensors are not the source's: the pack holds them rounded; they are f32 now",
            report.rounded.len()
        ));
    }
    Ok(())
}
