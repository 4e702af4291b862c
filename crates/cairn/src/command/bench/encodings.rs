//! `cairn bench encodings`: what each encoding costs each class of a model's weights.

use std::path::PathBuf;

use cairn_artifacts::atomic::write_bytes;
use cairn_convert::{ConvertError, Sensitivity, SensitivityJob, sensitivity};
use cairn_kernels::Encoding;
use clap::Args;

use crate::calibration::corpus_rows;
use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Count};
use crate::model_folder::ModelArgs;
use crate::progress_line::ProgressLine;
use crate::signals::StopFlag;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn bench encodings --model runs/quickstart
  cairn bench encodings --model model/ --corpus data/tiny --json --plot encodings.svg";

/// Measure what each encoding costs each class of weights, on held-out text
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EncodingsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of a corpus [default: that of the run]
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Tokens of text to measure on
    #[arg(long, value_name = "N", default_value_t = 2048)]
    tokens: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the divergences as bars to this file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Measures and prints.
pub(crate) fn run(args: &EncodingsArgs, context: &Context) -> anyhow::Result<()> {
    let stop = StopFlag::listen()?;
    let model = args.model.open(context)?;
    if let Some(adapter) = &model.adapter {
        let message = format!("{} is an adapter beside a model", adapter.path.display());
        let hint = "merge it first: cairn adapter merge --help";
        return Err(UserError::new(message).hint(hint).into());
    }
    let rows = corpus_rows(&model, args.corpus.as_deref(), args.tokens)?;
    let encodings: Vec<Encoding> =
        Encoding::ALL.into_iter().filter(|encoding| *encoding != Encoding::F32).collect();
    let (source, _) = model.tensors();
    let job = SensitivityJob { spec: &model.spec, source, rows: &rows, encodings: &encodings };
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    let measured = sensitivity(&job, context.cpu()?, &mut |done, total| {
        line.update(done as f64 / total.max(1) as f64, || format!("{done} of {total}"));
        !stop.is_set()
    });
    line.finish();
    let measured = measured.map_err(|error| match error {
        ConvertError::Stopped => UserError::interrupted("interrupted; nothing was measured").into(),
        other => anyhow::Error::from(other),
    })?;
    if let Some(path) = &args.plot {
        write_bytes(path, measured.svg().as_bytes())?;
    }
    if args.json {
        return context.terminal.print(serde_json::to_string_pretty(&measured)?);
    }
    context.terminal.print(text_of(&measured))
}

fn text_of(measured: &Sensitivity) -> String {
    let head = ["weights", "encoding", "matrices", "elements", "bytes", "KL, nats", "Δ perplexity"];
    let mut table = Table::new(&head).with_text_columns(2);
    for class in &measured.classes {
        for cost in &class.rounded {
            table.row([
                &class.class,
                &cost.encoding,
                &class.matrices,
                &Count(class.elements as f64),
                &Bytes(cost.bytes as f64),
                &format!("{:.2e}", cost.kl),
                &format!("{:+.4}", cost.perplexity_change),
            ]);
        }
    }
    let Sensitivity { tokens, loss, perplexity, .. } = measured;
    format!("{table}\n\nas stored: loss {loss:.4}, perplexity {perplexity:.3}, on {tokens} tokens")
}
