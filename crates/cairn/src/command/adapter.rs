//! `cairn adapter`: low-rank adapters added to a model's weights, or taken out again.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::FileError;
use cairn_artifacts::atomic::FolderDraft;
use cairn_artifacts::checkpoint::TOKENIZER_FILE;
use cairn_artifacts::safetensors::{
    OutTensor, SINGLE_FILE, SafetensorsFile, TensorView, WeightFolder, write,
};
use cairn_kernels::encoding::encode;
use cairn_kernels::{Encoding, Layout};
use cairn_model::{AdapterMap, Merge, MergedSource, TensorSource};
use cairn_spec::lora::ADAPTER_CONFIG_FILE;
use cairn_spec::{DType, LoraSpec};
use clap::{Args, Subcommand};

use crate::context::Context;
use crate::failure::UserError;
use crate::model_folder::{CONFIG_FILE, ModelFolder, ModelWeights};

/// Name of an adapter's tensors beside its description.
const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// Files of a model folder that an adapter does not change.
const KEPT: [&str; 6] = [
    CONFIG_FILE,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];
/// Elements computed at a time.
const CHUNK_ELEMENTS: usize = 1 << 16;

const EXAMPLES: &str = "\
Examples:
  cairn adapter merge --model base/ --adapter adapter/ --output merged/
  cairn adapter unmerge --model merged/ --adapter adapter/ --output base-again/";

/// Add a low-rank adapter to a model's weights, or take it out
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AdapterArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Write a model whose weights contain the adapter
    Merge(Folders),
    /// Write a model whose weights are those before the merge, but for rounding
    Unmerge(Folders),
}

#[derive(Debug, Args)]
struct Folders {
    /// Folder of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter, as PEFT saves it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Merges or unmerges.
pub(crate) fn run(args: &AdapterArgs, context: &Context) -> anyhow::Result<()> {
    let (folders, merge) = match &args.action {
        Action::Merge(folders) => (folders, Merge::Merge),
        Action::Unmerge(folders) => (folders, Merge::Unmerge),
    };
    let Folders { model, adapter, output } = folders;
    if output.exists() {
        return Err(UserError::new(format!("{} exists already", output.display()))
            .hint("name a folder that does not exist")
            .into());
    }
    let base = ModelFolder::open(model, context.terminal)?;
    let ModelWeights::Folder(weights) = &base.weights else {
        return Err(UserError::new(format!("{} is not a folder", model.display()))
            .hint("adapters are merged into models in the Hugging Face layout")
            .into());
    };
    let lora = read_lora(adapter)?;
    let adapters = AdapterMap::new(&base.spec, &lora)
        .map_err(anyhow::Error::from)
        .with_context(|| format!("{} does not fit this model", adapter.display()))?;
    let tensors = SafetensorsFile::open(&adapter.join(ADAPTER_FILE))?;
    let merged = MergedSource::new(&base.spec, &adapters, (weights, &tensors), merge)
        .with_context(|| format!("{} is not what its description says", adapter.display()))?;
    let changed = save((&base.path, weights), &merged, output)?;
    let verb = if merge == Merge::Merge { "Merged" } else { "Unmerged" };
    let text = format!("{changed} tensors, into {}", output.display());
    context.terminal.step(verb, text);
    Ok(())
}

/// Reads an adapter's description.
pub(crate) fn read_lora(folder: &Path) -> anyhow::Result<LoraSpec> {
    let path = folder.join(ADAPTER_CONFIG_FILE);
    if !path.exists() {
        return Err(UserError::new(format!("{} holds no adapter", folder.display()))
            .hint(format!("an adapter is a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}"))
            .into());
    }
    let text = fs::read_to_string(&path).map_err(FileError::on("read", &path))?;
    LoraSpec::from_peft_json(&text)
        .map_err(anyhow::Error::from)
        .with_context(|| format!("{} cannot be used", path.display()))
}

/// Writes the model folder with other weights, each in the type it had; returns how many changed.
fn save(
    (folder, weights): (&Path, &WeightFolder),
    merged: &MergedSource<'_>,
    output: &Path,
) -> anyhow::Result<usize> {
    let tensors: Vec<TensorView<'_>> = weights.tensors().collect();
    let is_changed = |tensor: &&TensorView<'_>| merged.changes(tensor.name);
    let changed = tensors.iter().filter(is_changed).count();
    for tensor in tensors.iter().filter(is_changed) {
        encoding(tensor.dtype).map_err(UserError::new)?;
    }
    let out = tensors.into_iter().map(|tensor| {
        let TensorView { name, dtype, shape, bytes, .. } = tensor;
        if merged.changes(name) {
            let write = move |out: &mut dyn Write| stream(merged, (name, dtype), shape, out);
            OutTensor::stream(name, dtype, shape, write)
        } else {
            OutTensor::bytes(name, dtype, shape, bytes)
        }
    });
    let out: Vec<OutTensor<'_>> = out.collect();
    let draft = FolderDraft::new(output)?;
    draft.write_file(SINGLE_FILE, |file| write(file, out, &std::collections::BTreeMap::new()))?;
    for name in KEPT {
        let path = folder.join(name);
        if path.exists() {
            let bytes = fs::read(&path).map_err(FileError::on("read", &path))?;
            draft.write_file(name, |file| file.write_all(&bytes))?;
        }
    }
    draft.publish()?;
    Ok(changed)
}

/// Writes a changed tensor piece by piece, rounded to the type it had.
fn stream(
    source: &dyn TensorSource,
    (name, dtype): (&str, DType),
    shape: &[usize],
    out: &mut dyn Write,
) -> io::Result<()> {
    let count: usize = shape.iter().product();
    let mut values = vec![0.0; CHUNK_ELEMENTS.min(count)];
    let encoding = encoding(dtype).map_err(io::Error::other)?;
    let mut bytes = vec![0; dtype.size_bytes() * values.len()];
    for first in (0..count).step_by(CHUNK_ELEMENTS) {
        let len = CHUNK_ELEMENTS.min(count - first);
        let (values, bytes) = (&mut values[..len], &mut bytes[..dtype.size_bytes() * len]);
        source.read_f32(name, first..first + len, values).map_err(io::Error::other)?;
        encode((encoding, Layout::RowMajor), (1, len), values, bytes);
        out.write_all(bytes)?;
    }
    Ok(())
}

/// How changed weights of a type are written.
fn encoding(dtype: DType) -> Result<Encoding, String> {
    match dtype {
        DType::F32 => Ok(Encoding::F32),
        DType::Bf16 => Ok(Encoding::Bf16),
        other => Err(format!("merged weights are written as f32 or bf16, not as {other}")),
    }
}
