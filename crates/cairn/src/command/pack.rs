//! `cairn pack`: a model folder into one file that kernels read as it is.

use std::ops::ControlFlow;
use std::path::PathBuf;

use cairn_convert::{ConvertError, PackJob, PackSettings, ProfileChoice};
use cairn_kernels::Encoding;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Bytes;
use crate::model_folder::{ModelFolder, ModelWeights};
use crate::pack_args::host_profile;
use crate::progress_line::ProgressLine;
use crate::runs;
use crate::signals::StopFlag;

const EXAMPLES: &str = "\
Examples:
  cairn pack runs/quickstart -o model.leanpack
  cairn pack model/ -o model.leanpack --encoding bf16 --profile host
  cairn generate --model model.leanpack --prompt 'fn main() {'";

/// Pack a model into one file that is loaded as it is
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PackArgs {
    /// Folder of a model or a run [default: the last run]
    #[arg(value_name = "MODEL")]
    model: Option<PathBuf>,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Encoding of weight matrices: `auto` (as the model has them), or one that
    /// `--dtype` has: `f32`, `bf16z`, `q8` …
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = encoding)]
    encoding: EncodingChoice,
    /// Machines that it is made for
    #[arg(long, value_enum, default_value_t = ProfileKind::Portable)]
    profile: ProfileKind,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// An encoding, or none: the source's own.
#[derive(Clone, Copy, Debug)]
struct EncodingChoice(Option<Encoding>);

fn encoding(name: &str) -> Result<EncodingChoice, String> {
    if name == "auto" {
        return Ok(EncodingChoice(None));
    }
    let found = Encoding::ALL.into_iter().find(|encoding| encoding.name() == name);
    let names = || Encoding::ALL.map(Encoding::name).join(", ");
    found
        .map(|encoding| EncodingChoice(Some(encoding)))
        .ok_or_else(|| format!("known encodings: auto, {}", names()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProfileKind {
    /// Any machine.
    Portable,
    /// This machine: `--strict` refuses the file on another.
    Host,
}

/// Packs.
pub(crate) fn run(args: &PackArgs, context: &Context) -> anyhow::Result<()> {
    let model = ModelFolder::open(&runs::model_folder(args.model.as_deref())?, context.terminal)?;
    let ModelWeights::Folder(weights) = &model.weights else {
        return Err(UserError::new(format!("{} is no folder of a model", model.path.display()))
            .hint("pack the folder with config.json and safetensors that it was made from")
            .into());
    };
    let stop = StopFlag::listen()?;
    let settings = PackSettings {
        encoding: args.encoding.0,
        profile: match args.profile {
            ProfileKind::Portable => ProfileChoice::Portable,
            ProfileKind::Host => ProfileChoice::Host(host_profile(context.isa)),
        },
    };
    let mut line = ProgressLine::new(context.terminal, "Packing");
    let cpu = context.cpu()?;
    let job = PackJob { folder: &model.path, spec: &model.spec, weights, cpu: &cpu };
    let written = cairn_convert::pack(job, &settings, &args.output, &mut |done, total| {
        line.update(done as f64 / total.max(1) as f64, || {
            format!("{} of {}", Bytes(done as f64), Bytes(total as f64))
        });
        if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    line.finish();
    let written = written.map_err(|error| match error {
        ConvertError::Stopped => UserError::interrupted("interrupted; nothing was written").into(),
        other => anyhow::Error::from(other),
    })?;
    let header = &written.header;
    let rounded = header.tensors.iter().filter(|tensor| !tensor.exact).count();
    if args.json {
        return context.terminal.print(json!({
            "path": args.output,
            "bytes": written.bytes,
            "hash": written.hash,
            "root": header.root,
            "tensors": header.tensors.len(),
            "rounded": rounded,
            "license": header.license.id,
        }));
    }
    let exact = match rounded {
        0 => "every weight as it was".to_owned(),
        rounded => format!("{rounded} of {} weights rounded", header.tensors.len()),
    };
    let (path, bytes) = (args.output.display(), Bytes(written.bytes as f64));
    context.terminal.step("Packed", format_args!("{path}: {bytes}, {exact}"));
    if !header.source.left_out.is_empty() {
        let names = header.source.left_out.join(", ");
        context.terminal.warn(format_args!("left out, being no part of the model: {names}"));
    }
    if header.license.id.is_none() {
        context.terminal.warn(format_args!(
            "nothing in {} states a license; the pack says so",
            model.path.display()
        ));
    }
    Ok(())
}
