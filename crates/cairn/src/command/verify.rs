//! `cairn verify`: whether every byte of a model is what it was when it was written.

use std::path::{Path, PathBuf};

use cairn_artifacts::checkpoint::{MANIFEST_FILE, verify_model};
use cairn_artifacts::leanpack::PackFile;
use clap::Args;
use serde_json::json;

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Bytes;
use crate::progress_line::ProgressLine;
use crate::runs;

const EXAMPLES: &str = "\
Examples:
  cairn verify model.leanpack
  cairn verify runs/quickstart";

/// Check every byte of a leanpack, or of a model that Cairn saved
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct VerifyArgs {
    /// A leanpack, or the folder of a model or a run
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Checks.
pub(crate) fn run(args: &VerifyArgs, context: &Context) -> anyhow::Result<()> {
    if args.path.is_file() {
        return verify_pack(&args.path, args.json, context);
    }
    let folder = runs::model_folder(Some(&args.path))?;
    if !folder.join(MANIFEST_FILE).exists() {
        let message = format!("{} has no {MANIFEST_FILE}", folder.display());
        return Err(UserError::new(message)
            .hint("only what Cairn saved says what its bytes should be")
            .hint("a leanpack does: cairn pack MODEL -o FILE.leanpack")
            .into());
    }
    verify_model(&folder)?;
    if args.json {
        return context.terminal.print(json!({ "path": folder, "sound": true }));
    }
    context.terminal.print(format_args!("{}: every hash is right", folder.display()))
}

fn verify_pack(path: &Path, json: bool, context: &Context) -> anyhow::Result<()> {
    let pack = PackFile::open(path)?;
    let mut line = ProgressLine::new(context.terminal, "Verifying");
    let verified = pack.verify(&mut |done, total| {
        line.update(done as f64 / total.max(1) as f64, || {
            format!("{} of {}", Bytes(done as f64), Bytes(total as f64))
        });
    });
    line.finish();
    verified?;
    let (hash, root) = (pack.preamble().header_hash, pack.header().root);
    if json {
        let object = json!({ "path": path, "sound": true, "hash": hash, "root": root });
        return context.terminal.print(object);
    }
    context.terminal.print(format_args!("{}: every hash is right\nblake3 {hash}", path.display()))
}
