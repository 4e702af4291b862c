//! `cairn inspect`: what is in a model folder or a tensor file.

mod gguf;
mod leanpack;
mod tokenizer;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cairn_artifacts::atomic::write_bytes;
use cairn_artifacts::leanpack::PackFile;
use cairn_artifacts::run::{RunFolder, RunRecord};
use cairn_artifacts::safetensors::{SafetensorsFile, TensorView, WeightFolder, WeightsError};
use cairn_model::{BuildOptions, Head, TensorSource, WeightReader, assumed_fields, build_program};
use cairn_program::{Class, Cost, Loss, Program, Workload, differentiate};
use cairn_spec::ModelSpec;
use clap::Args;
use serde_json::{Value, json};

use self::tokenizer::TokenizerFacts;
use crate::context::Context;
use crate::evaluation::run_of;
use crate::failure::UserError;
use crate::figures::{Bytes, Count};
use crate::model_folder::{CONFIG_FILE, ModelFolder, is_adapter, read_spec};
use crate::runs;
use crate::table::Table;
use crate::undescribed;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
Examples:
  cairn inspect runs/quickstart
  cairn inspect model/ --program --training
  cairn inspect model/ --picture model.svg
  cairn inspect model.safetensors
  cairn inspect model/ --set n_head=12 --set layer_norm_epsilon=1e-5 \
      --set activation_function=gelu_new --set scale_attn_weights=true \
      --set scale_attn_by_inverse_layer_idx=false --write-config model/config.json
  cairn inspect model.gguf
  cairn inspect model.leanpack --tensors";

/// Tokens of the run that is accounted, where the model allows as many.
const TOKENS: usize = 1024;

/// Show what is in a model, a run or a tensor file
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InspectArgs {
    /// Folder of a model or a run, or a leanpack, safetensors or GGUF file [default: the last run]
    #[arg(value_name = "PATH")]
    path: Option<PathBuf>,
    /// The same as PATH, as other commands take it
    #[arg(long, value_name = "DIR", conflicts_with = "path")]
    model: Option<PathBuf>,
    #[command(flatten)]
    parts: Parts,
    /// Tokens of the sequence that FLOPs and bytes are counted for [default: 1024, or what the
    /// model allows]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    #[command(flatten)]
    weights: WeightTypeArgs,
    /// What a `config.json` would say, for weights without one: field=JSON; may be repeated
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    told: Vec<String>,
    /// With `--set`: write the `config.json` that says it all, for the other commands to read
    #[arg(long, value_name = "FILE", requires = "told")]
    write_config: Option<PathBuf>,
    /// Draw the program: write an SVG of the forward pass
    #[arg(long, value_name = "FILE.svg")]
    picture: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, conflicts_with = "program")]
    json: bool,
}

/// What to look at besides the summary.
#[derive(Clone, Copy, Debug, Args)]
struct Parts {
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print the program that the model is lowered to
    #[arg(long)]
    program: bool,
    /// With `--program`: the program of a training step
    #[arg(long, requires = "program")]
    training: bool,
}

/// Looks and prints.
pub(crate) fn run(args: &InspectArgs, context: &Context) -> anyhow::Result<()> {
    let path = args.path.as_deref().or(args.model.as_deref());
    if let Some(path) = path.filter(|path| path.is_file()) {
        return match path.parent() {
            Some(folder) if path.ends_with(CONFIG_FILE) => inspect_model(folder, args, context),
            _ if PackFile::is_pack(path) => leanpack::inspect(path, args, context),
            _ if path.extension().is_some_and(|extension| extension == "gguf") => {
                gguf::inspect(path, args, context)
            }
            _ => inspect_file(path, args, context),
        };
    }
    let folder = runs::model_folder(path)?;
    if !args.json
        && !args.parts.program
        && let Some(run) = run_of(&folder)
    {
        context.terminal.print(format_args!("{}\n", run_summary(&run, &folder)?))?;
    }
    inspect_model(&folder, args, context)
}

/// What a run is and where it stands.
fn run_summary(run: &RunFolder, model: &Path) -> anyhow::Result<String> {
    let mut table = Table::new(&[]).with_text_columns(2);
    table.row([&"run", &run.root().display()]);
    if run.record().exists() {
        let record = RunRecord::load(&run.record())?;
        let status = serde_json::to_value(record.status)?;
        table.row([&"status", &status.as_str().unwrap_or("unknown")]);
        table.row([&"started", &record.started.as_deref().unwrap_or("unknown")]);
        table.row([&"code", &record.code.revision.as_deref().unwrap_or("unknown")]);
    }
    let saved = run.checkpoints().list()?;
    let steps: Vec<String> = saved.iter().map(|saved| saved.manifest.step.to_string()).collect();
    table.row([&"checkpoints", &format!("of steps {}", steps.join(", "))]);
    let shown = saved.iter().find(|saved| saved.folder == model);
    if let Some(loss) = shown.and_then(|saved| saved.manifest.validation_loss) {
        table.row([&"validation", &format!("loss {loss:.4} in the checkpoint below")]);
    }
    Ok(table.to_string())
}

fn inspect_file(path: &Path, args: &InspectArgs, context: &Context) -> anyhow::Result<()> {
    if path.extension().is_none_or(|extension| extension != "safetensors") {
        return Err(UserError::new(format!("{} is not a tensor file", path.display()))
            .hint(format!(
                "inspect reads runs, model folders, {CONFIG_FILE}, leanpacks and .safetensors files"
            ))
            .into());
    }
    let file = SafetensorsFile::open(path)?;
    let tensors: Vec<TensorView<'_>> = file.tensors().collect();
    let wants_model = args.parts.program || args.picture.is_some() || !args.told.is_empty();
    let is_described = path.parent().is_some_and(|folder| folder.join(CONFIG_FILE).exists());
    if is_described && wants_model {
        let folder = path.parent().unwrap_or(path).display();
        return Err(UserError::new(format!("{folder} has a {CONFIG_FILE}, which says more"))
            .hint(format!("inspect the folder: cairn inspect {folder}"))
            .into());
    }
    let model = match (!is_described).then(|| detected(path, &file, args, context)) {
        None => None,
        Some(Ok(spec)) => {
            let stored = Stored { files: 1, bytes: tensors.iter().map(|t| t.bytes.len()).sum() };
            let folder = path.parent();
            let parts = ModelParts { stored: Some(stored), tensors, source: Some(&file), folder };
            return inspect_spec(&spec, parts, args, context);
        }
        Some(Err(error)) if wants_model => return Err(error),
        Some(Err(error)) => Some(error),
    };
    if args.json {
        let list: Vec<Value> = tensors.iter().map(tensor_json).collect();
        let object = json!({ "tensors": list, "model": model.as_ref().map(causes) });
        return context.terminal.print(serde_json::to_string_pretty(&object)?);
    }
    context.terminal.print(tensor_table(&tensors))?;
    if let Some(error) = model {
        context.terminal.say(format_args!("\nThe model: {}.", causes(&error)));
        crate::failure::hints(&error).iter().for_each(|hint| context.terminal.hint(hint));
    }
    Ok(())
}

/// Why it is not known which model it is.
fn causes(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Weights on disk.
#[derive(Clone, Copy, Debug)]
struct Stored {
    files: usize,
    bytes: usize,
}

/// What there is of a model besides its description.
struct ModelParts<'a> {
    stored: Option<Stored>,
    tensors: Vec<TensorView<'a>>,
    source: Option<&'a dyn TensorSource>,
    /// Where a tokenizer may lie.
    folder: Option<&'a Path>,
}

fn inspect_model(folder: &Path, args: &InspectArgs, context: &Context) -> anyhow::Result<()> {
    if is_adapter(folder) {
        let model = ModelFolder::open(folder, context.terminal)?;
        let text = format!("the model that {} adapts: {}", folder.display(), model.path.display());
        context.terminal.step("Inspecting", text);
        return inspect_model(&model.path, args, context);
    }
    // A description alone is worth a look too, and weights alone tell much.
    let weights = match WeightFolder::open(folder) {
        Ok(weights) => Some(weights),
        Err(WeightsError::NoWeights { .. }) => None,
        Err(error) if folder.is_dir() => return Err(error.into()),
        Err(_) => None,
    };
    let is_described = folder.join(CONFIG_FILE).exists();
    let spec = match &weights {
        Some(weights) if !is_described => detected(folder, weights, args, context)?,
        _ if is_described && !args.told.is_empty() => {
            let message = format!("{} has a {CONFIG_FILE}", folder.display());
            return Err(UserError::new(message)
                .hint("--set is for weights without one; change the file itself")
                .into());
        }
        _ => read_spec(folder, context.terminal)?,
    };
    let stored = weights.as_ref().map(|w| Stored { files: w.files().len(), bytes: w.bytes() });
    let mut tensors: Vec<TensorView<'_>> =
        weights.as_ref().map(|weights| weights.tensors().collect()).unwrap_or_default();
    tensors.sort_by(|a, b| a.name.cmp(b.name));
    let source = weights.as_ref().map(|weights| weights as &dyn TensorSource);
    inspect_spec(&spec, ModelParts { stored, tensors, source, folder: Some(folder) }, args, context)
}

/// A model that is known, its tensors and its tokenizer. Weights that are not those of the
/// description are an error, after it was shown.
fn inspect_spec(
    spec: &ModelSpec,
    ModelParts { stored, tensors, source, folder }: ModelParts<'_>,
    args: &InspectArgs,
    context: &Context,
) -> anyhow::Result<()> {
    draw(spec, args, context)?;
    if args.parts.program {
        return Ok(());
    }
    let tokens = args.tokens.unwrap_or(TOKENS.min(spec.max_position_embeddings));
    let account = Account::new(spec, tokens)?;
    let storage = args.weights.dtype.storage_of(spec, source)?;
    let held = storage.weight_bytes(spec)?;
    let fits = || match source {
        Some(source) => WeightReader::new(spec, source).map(|_| ()),
        None => Ok(()),
    };
    let tokenizer = folder.map(|folder| TokenizerFacts::read(folder, spec)).transpose();
    // A model may be looked at without one that can be used.
    let tokenizer = tokenizer.unwrap_or_else(|error| {
        let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
        context.terminal.warn(format_args!("the tokenizer cannot be used: {}", causes.join(": ")));
        None
    });
    if args.json {
        let mut object = account.json(spec)?;
        object["tokenizer"] = json!(tokenizer);
        object["in_memory"] = json!({ "dtype": storage.to_string(), "bytes": held });
        if args.parts.tensors {
            object["tensors"] = tensors.iter().map(tensor_json).collect();
        }
        context.terminal.print(serde_json::to_string_pretty(&object)?)?;
        return Ok(fits()?);
    }
    let held = format!("{} as {storage}", Bytes::of(held));
    let mut text = format!("{}\n\n{}", summary(spec, stored, &held), account.table(spec));
    if args.parts.tensors {
        let _ = write!(text, "\n\n{}", tensor_table(&tensors));
    }
    if let Some(Some(tokenizer)) = &tokenizer {
        let _ = write!(text, "\n\n{}", tokenizer.table());
    }
    context.terminal.print(text)?;
    Ok(fits()?)
}

/// Writes, draws and prints what was asked for.
fn draw(spec: &ModelSpec, args: &InspectArgs, context: &Context) -> anyhow::Result<()> {
    if let Some(path) = &args.write_config {
        if path.exists() {
            return Err(UserError::new(format!("{} is there already", path.display()))
                .hint("remove it, or name another file")
                .into());
        }
        let config = format!("{:#}\n", spec.to_hf_config()?);
        write_bytes(path, config.as_bytes())?;
        context.terminal.step("Described", path.display());
    }
    if let Some(path) = &args.picture {
        let picture = program_of(spec, false)?.picture();
        write_bytes(path, picture.as_bytes())?;
        context.terminal.step("Drawn", path.display());
    }
    if args.parts.program {
        context.terminal.print_piece(&program_of(spec, args.parts.training)?.to_string())?;
    }
    Ok(())
}

/// The model that tensors alone belong to; says what was taken as is usual of what they do not tell.
fn detected(
    path: &Path,
    tensors: &dyn TensorSource,
    args: &InspectArgs,
    context: &Context,
) -> anyhow::Result<ModelSpec> {
    let spec = undescribed::spec(path, tensors, &args.told)?;
    let assumed: Vec<String> = assumed_fields(spec.family)
        .iter()
        .filter(|(field, _)| !args.told.iter().any(|told| names(told, field)))
        .map(|(field, value)| format!("{field}={value}"))
        .collect();
    if !assumed.is_empty() {
        let fields = assumed.join(", ");
        let text = "not told by the tensors, and taken as is usual";
        context.terminal.warn(format_args!("{text}: {fields}"));
    }
    Ok(spec)
}

/// Whether `field=value` is about this field.
fn names(told: &str, field: &str) -> bool {
    told.split_once('=').is_some_and(|(name, _)| name.trim() == field)
}

fn program_of(spec: &ModelSpec, training: bool) -> anyhow::Result<Program> {
    if !training {
        return Ok(build_program(spec, &BuildOptions::new(Head::Logits))?);
    }
    // Without dropout: a recipe decides on that, not the description of a finished model.
    let forward = build_program(spec, &BuildOptions::new(Head::TokenLogprob))?;
    let trainable =
        forward.of_class(Class::Weight).map(|(_, weight)| weight.name.clone()).collect();
    Ok(differentiate(&forward, &trainable, &Loss::CrossEntropy)?)
}

fn summary(spec: &ModelSpec, stored: Option<Stored>, held: &str) -> String {
    let count = spec.parameter_count();
    let mut table = Table::new(&[]).with_text_columns(2);
    table.row([&"family", &spec.family]);
    table.row([&"parameters", &format!("{} ({})", Count(count.total() as f64), count.total())]);
    table.row([&"layers", &spec.num_hidden_layers]);
    table.row([&"hidden size", &spec.hidden_size]);
    table.row([&"feed-forward", &feed_forward(spec)]);
    table.row([&"attention", &attention(spec)]);
    let tied = if spec.tie_word_embeddings { ", head tied to the embedding" } else { "" };
    table.row([&"vocabulary", &format!("{}{tied}", spec.vocab_size)]);
    table.row([&"positions", &spec.max_position_embeddings]);
    let stored = stored.map_or_else(
        || "none here".to_owned(),
        |Stored { files, bytes }| {
            let plural = if files == 1 { "" } else { "s" };
            format!("{} in {files} file{plural}", Bytes::of(bytes))
        },
    );
    table.row([&"weights", &format!("{stored} ({})", spec.dtype)]);
    table.row([&"in memory", &held]);
    table.to_string()
}

fn feed_forward(spec: &ModelSpec) -> String {
    let cairn_spec::model::Mlp::Moe(moe) = &spec.mlp else {
        return spec.mlp.intermediate_size().to_string();
    };
    let layers = 0..spec.num_hidden_layers;
    let dense = layers.filter(|&layer| !moe.has_experts(layer)).count();
    let mut text = format!(
        "{} experts of {}, {} for each token",
        moe.num_experts, moe.moe_intermediate_size, moe.num_experts_per_tok
    );
    if let Some(shared) = moe.shared_intermediate_size {
        text += &format!("; {shared} shared by all");
    }
    if dense > 0 {
        text += &format!("; {dense} dense layers of {}", moe.intermediate_size);
    }
    text
}

fn attention(spec: &ModelSpec) -> String {
    match &spec.attention.form {
        cairn_spec::model::AttentionForm::Gqa(gqa) => format!(
            "{} heads of {}, {} key/value heads",
            gqa.num_attention_heads, gqa.head_dim, gqa.num_key_value_heads
        ),
        cairn_spec::model::AttentionForm::Mla(mla) => format!(
            "{} heads of {} (values {}), one latent of {} and {} rotated",
            mla.num_attention_heads,
            mla.qk_nope_head_dim + mla.qk_rope_head_dim,
            mla.v_head_dim,
            mla.kv_lora_rank,
            mla.qk_rope_head_dim
        ),
    }
}

/// Parameters, arithmetic and traffic, by block.
struct Account {
    tokens: usize,
    /// Of embedding, final norm and head together.
    outside: Part,
    /// Of each block.
    blocks: Vec<Part>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Part {
    parameters: u64,
    forward: Cost,
    training: Cost,
}

impl Account {
    fn new(spec: &ModelSpec, tokens: usize) -> anyhow::Result<Self> {
        let workload = Workload::causal(1, tokens);
        let mut account = Self {
            tokens,
            outside: Part::default(),
            blocks: vec![Part::default(); spec.num_hidden_layers],
        };
        let programs = [program_of(spec, false)?, program_of(spec, true)?];
        for (training, program) in [false, true].into_iter().zip(&programs) {
            for (instr, cost) in program.instrs.iter().zip(program.account(&workload)) {
                let part = account.part(instr.block);
                *(if training { &mut part.training } else { &mut part.forward }) += cost;
            }
        }
        let count = spec.parameter_count();
        account.outside.parameters = count.embedding + count.final_norm + count.head;
        for (layer, block) in account.blocks.iter_mut().enumerate() {
            block.parameters = spec.block_parameters(layer);
        }
        Ok(account)
    }

    fn part(&mut self, block: Option<u32>) -> &mut Part {
        let index = block.and_then(|block| usize::try_from(block).ok());
        match index.and_then(|index| self.blocks.get_mut(index)) {
            Some(part) => part,
            None => &mut self.outside,
        }
    }

    fn total(&self) -> Part {
        let mut total = self.outside;
        for block in &self.blocks {
            total.parameters += block.parameters;
            total.forward += block.forward;
            total.training += block.training;
        }
        total
    }

    fn table(&self, spec: &ModelSpec) -> String {
        let header = ["part", "parameters", "forward FLOPs", "moved", "training FLOPs", "moved"];
        let mut table = Table::new(&header);
        let mut row = |name: &str, part: &Part| {
            table.row([
                &name,
                &Count(part.parameters as f64),
                &Count(part.forward.flops),
                &Bytes(part.forward.bytes),
                &Count(part.training.flops),
                &Bytes(part.training.bytes),
            ]);
        };
        row("embedding, final norm, head", &self.outside);
        let last = spec.num_hidden_layers - 1;
        match self.blocks.as_slice() {
            [first, .., end] if first.forward == end.forward => {
                row(&format!("each of blocks 0 to {last}"), first);
            }
            blocks => {
                for (index, block) in blocks.iter().enumerate() {
                    row(&format!("block {index}"), block);
                }
            }
        }
        row("all", &self.total());
        format!(
            "one sequence of {} tokens, operands read and results written once:\n{table}",
            self.tokens
        )
    }

    fn json(&self, spec: &ModelSpec) -> anyhow::Result<Value> {
        let part = |part: &Part| {
            json!({
                "parameters": part.parameters,
                "forward": part.forward,
                "training": part.training,
            })
        };
        Ok(json!({
            "spec": serde_json::to_value(spec)?,
            "parameters": spec.parameter_count(),
            "tokens": self.tokens,
            "outside_blocks": part(&self.outside),
            "blocks": self.blocks.iter().map(part).collect::<Vec<_>>(),
            "total": part(&self.total()),
        }))
    }
}

fn tensor_json(tensor: &TensorView<'_>) -> Value {
    json!({
        "name": tensor.name,
        "dtype": tensor.dtype.to_string(),
        "shape": tensor.shape,
        "bytes": tensor.bytes.len(),
    })
}

fn tensor_table(tensors: &[TensorView<'_>]) -> String {
    let mut table = Table::new(&["tensor", "type", "shape", "bytes"]).with_text_columns(3);
    for tensor in tensors {
        let shape = format!("{:?}", tensor.shape);
        table.row([&tensor.name, &tensor.dtype, &shape, &tensor.bytes.len()]);
    }
    let bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    format!("{table}\n{} tensors, {}", tensors.len(), Bytes::of(bytes))
}
