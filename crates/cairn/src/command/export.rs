//! `cairn export`: a model in a form that other engines run.

use std::ops::ControlFlow;
use std::path::PathBuf;

use cairn_artifacts::gguf::Format;
use cairn_convert::{ConvertError, GgufJob};
use cairn_data::tokenizer::gguf_without_tokenizer;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Bytes;
use crate::model_folder::ModelFolder;
use crate::progress_line::ProgressLine;
use crate::runs;
use crate::signals::StopFlag;

const EXAMPLES: &str = "\
Examples:
  cairn export --gguf runs/quickstart -o model.gguf
  cairn export --gguf model.leanpack -o model.gguf --dtype q8_0";

/// Write a model for another engine
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExportArgs {
    /// Folder of a model or a run, or a leanpack [default: the last run]
    #[arg(value_name = "MODEL")]
    model: Option<PathBuf>,
    /// As a GGUF file, which llama.cpp runs
    #[arg(long, required = true)]
    gguf: bool,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Type of the weight matrices; vectors and routers stay f32
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = GgufType::F32)]
    dtype: GgufType,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GgufType {
    /// 32-bit floats.
    F32,
    /// The high half of 32-bit floats.
    Bf16,
    /// Signed bytes, a scale for 32.
    #[value(name = "q8_0")]
    Q8_0,
}

/// Writes.
pub(crate) fn run(args: &ExportArgs, context: &Context) -> anyhow::Result<()> {
    let model = ModelFolder::open(&runs::model_folder(args.model.as_deref())?, context.terminal)?;
    if let Some(adapter) = &model.adapter {
        let message = format!("{} is an adapter beside a model", adapter.path.display());
        return Err(UserError::new(message)
            .hint("merge it first: cairn adapter merge --help")
            .into());
    }
    let tokenizer = model.tokenizer()?;
    let metadata = match &tokenizer {
        Some(tokenizer) => {
            tokenizer.gguf_metadata(&model.tokenizer_config(tokenizer)?, model.spec.vocab_size)?
        }
        None => {
            context.terminal.warn(format_args!(
                "{} has no tokenizer, so the file has none either",
                model.path.display()
            ));
            gguf_without_tokenizer()
        }
    };
    let format = match args.dtype {
        GgufType::F32 => Format::F32,
        GgufType::Bf16 => Format::Bf16,
        GgufType::Q8_0 => Format::Q8_0,
    };
    let stop = StopFlag::listen()?;
    let cpu = context.cpu()?;
    let (source, _) = model.tensors();
    let job = GgufJob { spec: &model.spec, source, tokenizer: &metadata, cpu: &cpu };
    let mut line = ProgressLine::new(context.terminal, "Exporting");
    let written = cairn_convert::export_gguf(job, format, &args.output, &mut |done, total| {
        line.update(done as f64 / total.max(1) as f64, || format!("{done} of {total} tensors"));
        if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    line.finish();
    let report = written.map_err(|error| match error {
        ConvertError::Stopped => UserError::interrupted("interrupted; nothing was written").into(),
        other => anyhow::Error::from(other),
    })?;
    if args.json {
        return context.terminal.print(json!({
            "path": args.output,
            "bytes": report.bytes,
            "tensors": report.tensors,
            "kept_f32": report.kept,
        }));
    }
    let (path, bytes) = (args.output.display(), Bytes(report.bytes as f64));
    let (count, name) = (report.tensors, format.name());
    context.terminal.step("Exported", format_args!("{path}: {count} tensors, {bytes}, {name}"));
    if !report.kept.is_empty() {
        let names = report.kept.join(", ");
        context
            .terminal
            .warn(format_args!("kept in f32, their rows being no whole blocks of {name}: {names}"));
    }
    Ok(())
}
