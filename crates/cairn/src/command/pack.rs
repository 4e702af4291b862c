//! `cairn pack`: a model folder into one file that kernels read as it is.

use std::ops::ControlFlow;
use std::path::PathBuf;

use cairn_artifacts::leanpack::{Assignment, WrittenPack};
use cairn_convert::{
    ByteLimit, Chosen, ConvertError, PackJob, PackSettings, ProfileChoice, SensitivityJob,
    choose_encodings, other_bytes,
};
use cairn_kernels::{Compute, Encoding};
use cairn_model::head_weight;
use cairn_spec::units::ByteSize;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::calibration::{corpus_rows, file_rows};
use crate::context::Context;
use crate::evaluation::run_of;
use crate::failure::UserError;
use crate::figures::Bytes;
use crate::gate_file::{self, Verdict};
use crate::model_folder::{ModelFolder, ModelWeights};
use crate::pack_args::host_profile;
use crate::progress_line::ProgressLine;
use crate::runs;
use crate::signals::StopFlag;
use crate::table::Table;
use crate::weight_type::WeightType;

const EXAMPLES: &str = "\
Examples:
  cairn pack runs/quickstart -o model.leanpack
  cairn pack model/ -o model.leanpack --encoding bf16 --profile host
  cairn pack model/ -o model.leanpack --encoding q4 --head-encoding q8
  cairn pack model/ -o model.leanpack --bytes 400MB --calibration text.txt
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
    /// Encoding of weight matrices; `auto` keeps the model's own
    #[arg(long, value_enum, value_name = "NAME", default_value_t = WeightType::AUTO)]
    encoding: WeightType,
    /// Encoding of the head, and of the embedding where that is the head; `auto` is that of the others
    #[arg(long, value_enum, value_name = "NAME", default_value_t = WeightType::AUTO)]
    head_encoding: WeightType,
    /// Choose an encoding for each class of weights, so that the file has at most so many bytes and the
    /// model's predictions change least on calibration text: `2.1GB`
    #[arg(long, value_name = "BYTES", conflicts_with_all = ["encoding", "head_encoding"])]
    bytes: Option<ByteSize>,
    /// Calibration text for --bytes [default: held-out text of the run's corpus]
    #[arg(long, value_name = "FILE", requires = "bytes")]
    calibration: Option<PathBuf>,
    /// Tokens of calibration text
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "bytes")]
    calibration_tokens: usize,
    /// Machines that it is made for
    #[arg(long, value_enum, default_value_t = ProfileKind::Portable)]
    profile: ProfileKind,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
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
    let weights = weights.folder();
    let stop = StopFlag::listen()?;
    let cpu = context.cpu()?;
    let job = PackJob { folder: &model.path, spec: &model.spec, weights, cpu: &cpu };
    let chosen = match args.bytes {
        Some(ByteSize(bytes)) => Some(choose(args, (&model, job), bytes, (context, &stop))?),
        None => None,
    };
    let settings = PackSettings {
        encoding: args.encoding.0,
        head: args.head_encoding.0,
        chosen,
        profile: match args.profile {
            ProfileKind::Portable => ProfileChoice::Portable,
            ProfileKind::Host => ProfileChoice::Host(host_profile(context.isa)),
        },
    };
    let mut line = ProgressLine::new(context.terminal, "Packing");
    let written = cairn_convert::pack(job, &settings, &args.output, &mut |done, total| {
        line.update(done as f64 / total.max(1) as f64, || {
            format!("{} of {}", Bytes(done as f64), Bytes(total as f64))
        });
        if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    line.finish();
    let written = written.map_err(interrupted)?;
    tell_wider(&model, &settings, &written, context);
    tell(args, &model, &written, context)
}

/// Says which matrices were to be bf16z and are bf16.
fn tell_wider(
    model: &ModelFolder,
    settings: &PackSettings,
    written: &WrittenPack,
    context: &Context,
) {
    let head = head_weight(&model.spec);
    let asked = |name: &String| {
        let own = settings.chosen.as_ref().and_then(|chosen| chosen.encodings.get(name).copied());
        let head = settings.head.filter(|_| head == Some(name.as_str()));
        own.or(head).or(settings.encoding)
    };
    let matrices = written.header.tensors.iter().filter(|tensor| tensor.dims.len() > 1);
    let wider = matrices
        .filter(|tensor| asked(&tensor.name) == Some(Encoding::Bf16z))
        .filter(|tensor| tensor.encoding == Encoding::Bf16.name());
    let names: Vec<&str> = wider.map(|tensor| tensor.name.as_str()).collect();
    if let Some((first, rest)) = names.split_first() {
        let more =
            if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        context.terminal.warn(format_args!(
            "bf16z does not hold, or not in fewer bytes, what is bf16 now: {first}{more}"
        ));
    }
}

fn interrupted(error: ConvertError) -> anyhow::Error {
    match error {
        ConvertError::Stopped => UserError::interrupted("interrupted; nothing was written").into(),
        other => other.into(),
    }
}

/// Measures every class of weights in every encoding that is smaller than the source's, and chooses.
fn choose(
    args: &PackArgs,
    (model, job): (&ModelFolder, PackJob<'_>),
    bytes: u64,
    (context, stop): (&Context, &StopFlag),
) -> anyhow::Result<Chosen> {
    let tokens = args.calibration_tokens;
    let rows = match &args.calibration {
        Some(path) => file_rows(model, path, tokens)?,
        None if run_of(model.used()).is_some() => corpus_rows(model, None, tokens)?,
        None => {
            let message = format!("{} is no run's, so there is no text", model.path.display());
            return Err(UserError::new(message)
                .hint("name text of the kind that the model is for: --calibration FILE")
                .into());
        }
    };
    let mut encodings = Vec::new();
    for encoding in Encoding::ALL {
        let verdict = gate_file::verdict((encoding, Compute::F32), context)?;
        if matches!(verdict, None | Some(Verdict::Passed)) {
            encodings.push(encoding);
        }
    }
    let probe = SensitivityJob {
        spec: &model.spec,
        source: &model.weights,
        rows: &rows,
        encodings: &encodings,
    };
    let limit = ByteLimit { file: bytes, others: other_bytes(job)? };
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    let chosen = choose_encodings(&probe, limit, context.cpu()?, &mut |done, total| {
        line.update(done as f64 / total.max(1) as f64, || format!("{done} of {total}"));
        !stop.is_set()
    });
    line.finish();
    chosen.map_err(interrupted)
}

/// Says what was written.
fn tell(
    args: &PackArgs,
    model: &ModelFolder,
    written: &WrittenPack,
    context: &Context,
) -> anyhow::Result<()> {
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
            "assignment": header.assignment,
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
    match &header.assignment {
        Some(assignment) => context.terminal.print(assignment_table(assignment)),
        None => Ok(()),
    }
}

/// What each class of weights became, and what it costs.
pub(crate) fn assignment_table(assignment: &Assignment) -> String {
    let mut table =
        Table::new(&["weights", "encoding", "bytes", "KL alone, nats"]).with_text_columns(2);
    for class in &assignment.classes {
        let bytes = Bytes(class.bytes as f64);
        table.row([&class.class, &class.encoding, &bytes, &format!("{:.2e}", class.kl)]);
    }
    let Assignment { limit_bytes, tokens, kl, perplexity_change, .. } = assignment;
    format!(
        "{table}\n\nall together: KL {kl:.2e} nats, perplexity {perplexity_change:+.4}, \
         on {tokens} tokens; at most {limit_bytes} bytes"
    )
}
