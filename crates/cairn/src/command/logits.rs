//! `cairn logits`: what a model computes, for outside checks.
//!
//! Letters: `b` rows of the input, `t` tokens of a row, `v` vocabulary, `d` hidden size.

use std::path::PathBuf;

use anyhow::Context as _;
use cairn_artifacts::atomic;
use cairn_artifacts::safetensors::{self, OutTensor, SafetensorsFile};
use cairn_kernels::{Compute, Cpu, SeqSlot};
use cairn_model::{BuildOptions, Head, build_stored_program};
use cairn_program::{Feed, KvPlacement, MemoryPlan, ProgramId, Run, SessionProgram, Sizes};
use clap::Args;

use crate::compute_dtype::ComputeDtypeArgs;
use crate::context::Context;
use crate::failure::UserError;
use crate::model_folder::{ModelArgs, ModelFolder};
use crate::storage::Storage;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
The input holds `input_ids` [b, t] of int64. The output holds `logits` [b, t, v] and
`hidden_0 … hidden_L` [b, t, d], all f32: the first block's input, then each block's
output, the last one after the final norm.

Examples:
  cairn logits --model runs/quickstart --input ids.safetensors --output logits.safetensors";

/// Write the logits and hidden states of token ids
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// File with `input_ids`
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    weights: WeightTypeArgs,
    #[command(flatten)]
    compute: ComputeDtypeArgs,
}

/// Computes and writes them.
pub(crate) fn run(args: &LogitsArgs, context: &Context) -> anyhow::Result<()> {
    let model = args.model.open(context)?;
    let input = Input::read(args)?;
    if input.row_tokens > model.spec.max_position_embeddings {
        context.terminal.warn(format_args!(
            "rows of {} tokens are longer than the model's {} positions",
            input.row_tokens, model.spec.max_position_embeddings
        ));
    }
    let arithmetic = args.compute.compute();
    let storage = args.weights.dtype.storage(&model, arithmetic, context)?;
    let outputs = compute(&model, (&storage, arithmetic), &input, context.cpu()?)?;
    let tensors = outputs.iter().map(|(name, width, values)| {
        OutTensor::f32(name.as_str(), &[input.rows, input.row_tokens, *width], values)
    });
    let tensors: Vec<OutTensor<'_>> = tensors.collect();
    atomic::write(&args.output, |file| safetensors::write(file, tensors, &Default::default()))?;
    let (rows, tokens) = (input.rows, input.row_tokens);
    context
        .terminal
        .step("Wrote", format_args!("{} ({rows} × {tokens} tokens)", args.output.display()));
    Ok(())
}

struct Input {
    rows: usize,
    row_tokens: usize,
    ids: Vec<u32>,
}

impl Input {
    fn read(args: &LogitsArgs) -> anyhow::Result<Self> {
        let file = SafetensorsFile::open(&args.input)?;
        let wrong = |problem: String| {
            UserError::new(format!("{}: {problem}", args.input.display()))
                .hint("it must hold input_ids [b, t] of int64")
        };
        let tensor = file
            .tensor("input_ids")
            .ok_or_else(|| wrong("there is no tensor input_ids".to_owned()))?;
        let &[rows, row_tokens] = tensor.shape else {
            return Err(wrong(format!("input_ids is {:?}", tensor.shape)).into());
        };
        if rows == 0 || row_tokens == 0 {
            return Err(wrong(format!("input_ids is empty: {:?}", tensor.shape)).into());
        }
        let ids = tensor.to_i64()?.into_iter().enumerate().map(|(position, id)| {
            u32::try_from(id)
                .map_err(|_| wrong(format!("input_ids holds {id} at position {position}")))
        });
        Ok(Self { rows, row_tokens, ids: ids.collect::<Result<_, _>>()? })
    }
}

/// Names, widths and values `[b, t, width]` of all outputs, one row at a time.
fn compute(
    model: &ModelFolder,
    (storage, compute): (&Storage, Compute),
    input: &Input,
    cpu: Cpu,
) -> anyhow::Result<Vec<(String, usize, Vec<f32>)>> {
    const PROGRAM: ProgramId = ProgramId(0);
    let options = BuildOptions {
        encoding: storage.encoding,
        compute,
        layout: model.layout(),
        keep_hidden: true,
        text_len: Some(input.row_tokens),
        ..BuildOptions::new(Head::Logits)
    };
    let adapters = model.adapters();
    let program = build_stored_program(&model.spec, &options, &adapters, &storage.own)?;
    let sizes = Sizes::dense(input.row_tokens, 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let mut session = model.session(MemoryPlan::new(vec![program], None)?, cpu)?;
    let hidden = (0..=model.spec.num_hidden_layers)
        .map(|layer| (format!("hidden_{layer}"), model.spec.hidden_size));
    let mut outputs: Vec<(String, usize, Vec<f32>)> = hidden
        .chain([("logits".to_owned(), model.spec.vocab_size)])
        .map(|(name, width)| (name, width, Vec::with_capacity(input.ids.len() * width)))
        .collect();
    let positions: Vec<u32> =
        (0..u32::try_from(input.row_tokens).context("too many tokens in a row")?).collect();
    let sequences = [SeqSlot { start: 0, len: input.row_tokens, cached: 0, blocks: &[] }];
    for (row, ids) in input.ids.chunks_exact(input.row_tokens).enumerate() {
        let feeds = [Feed::u32("ids", ids), Feed::u32("positions", &positions)];
        session
            .run(PROGRAM, &Run::forward(&feeds, &sequences))
            .with_context(|| format!("row {row} of the input does not suit the model"))?;
        for (name, _, values) in &mut outputs {
            values.extend_from_slice(session.output(PROGRAM, name));
        }
    }
    Ok(outputs)
}
