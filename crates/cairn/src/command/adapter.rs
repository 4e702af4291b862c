//! `cairn adapter`: low-rank adapters added to a model's weights, or taken out again.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::FileError;
use cairn_artifacts::atomic::FolderDraft;
use cairn_artifacts::checkpoint::{ADAPTER_FILE, CONFIG_FILE, MANIFEST_FILE};
use cairn_artifacts::safetensors::{
    OutTensor, SINGLE_FILE, SafetensorsFile, TensorView, WeightFolder, write,
};
use cairn_kernels::encoding::encode;
use cairn_kernels::{Encoding, Layout};
use cairn_model::{AdapterMap, Merge, MergedSource, TensorSource};
use cairn_spec::DType;
use clap::{Args, Subcommand};

use crate::context::Context;
use crate::failure::UserError;
use crate::model_folder::{ModelFolder, ModelWeights, read_lora};

/// Endings of files that hold the weights before the change, in one form or another.
const WEIGHT_ENDINGS: [&str; 13] = [
    "safetensors",
    "index.json",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "h5",
    "msgpack",
    "ot",
    "onnx",
    "gguf",
    "npz",
    "tflite",
];
/// The one folder that belongs to a model: further chat templates.
const TEMPLATES: &str = "additional_chat_templates";
/// Elements computed at a time.
const CHUNK_ELEMENTS: usize = 1 << 16;

const EXAMPLES: &str = "\
Examples:
  cairn adapter merge --model base/ --adapter adapter/ --output merged/
  cairn adapter unmerge --model merged/ --adapter adapter/ --output base-again/";

const MERGE_EXAMPLES: &str = "\
Files beside the weights are copied; other forms of the weights are left out and named.

Examples:
  cairn adapter merge --model base/ --adapter adapter/ --output merged/";

const UNMERGE_EXAMPLES: &str = "\
Examples:
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
    #[command(after_help = MERGE_EXAMPLES)]
    Merge(Folders),
    /// Write a model whose weights are those before the merge, but for rounding
    #[command(after_help = UNMERGE_EXAMPLES)]
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
    if base.adapter.is_some() {
        let message = format!("{} is an adapter, not a model", model.display());
        return Err(UserError::new(message).hint("name the model that it was made for").into());
    }
    let ModelWeights::Folder(weights) = &base.weights else {
        return Err(UserError::new(format!("{} is not a folder", model.display()))
            .hint("adapters are merged into models in the Hugging Face layout")
            .into());
    };
    let weights = weights.folder();
    let lora = read_lora(adapter)?;
    let adapters = AdapterMap::new(&base.spec, &lora)
        .map_err(anyhow::Error::from)
        .with_context(|| format!("{} does not fit this model", adapter.display()))?;
    let changes_head = adapters.get("lm_head.weight").is_some();
    if merge == Merge::Unmerge && changes_head && base.spec.tie_word_embeddings {
        let message = format!("the head of {} is its embedding", model.display());
        let hint = "merging an adapter of the head makes a head of its own: name what came of that";
        return Err(UserError::new(message).hint(hint).into());
    }
    let tensors = SafetensorsFile::open(&adapter.join(ADAPTER_FILE))?;
    let merged = MergedSource::new(&base.spec, &adapters, (weights, &tensors), merge)
        .with_context(|| format!("{} is not what its description says", adapter.display()))?;
    let files = Files::of(&base.path)?;
    let changed = save((&base.path, weights), &merged, &files, output)?;
    if !files.left_out.is_empty() {
        let what = "folders, or the weights before the change";
        let text = format!("{}: {what}", files.left_out.join(", "));
        context.terminal.step("Left out", text);
    }
    if let Some((head, table)) = merged.new_head() {
        let text = format!("{head} from {table}: the head is a matrix of its own now");
        context.terminal.step("Untied", text);
    }
    let verb = if merge == Merge::Merge { "Merged" } else { "Unmerged" };
    let text = format!("{changed} tensors, into {}", output.display());
    context.terminal.step(verb, text);
    Ok(())
}

/// What a model folder holds besides the weights: names, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Files {
    /// What the change does not touch: description, tokenizer, templates, notes.
    kept: Vec<String>,
    /// What describes the weights before the change, and folders.
    left_out: Vec<String>,
}

impl Files {
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let mut files = Self::default();
        for entry in fs::read_dir(folder).map_err(FileError::on("list", folder))? {
            let path = entry.map_err(FileError::on("list", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_weights = |ending: &&str| name.ends_with(&format!(".{ending}"));
            if path.is_dir() && name == TEMPLATES {
                files.take_templates(&path)?;
            } else if path.is_dir() {
                files.left_out.push(format!("{name}/"));
            } else if name == MANIFEST_FILE || WEIGHT_ENDINGS.iter().any(is_weights) {
                // The file that is written anew is no loss.
                files.left_out.extend(Some(name).filter(|name| name != SINGLE_FILE));
            } else if path.is_file() {
                files.kept.push(name);
            } else {
                files.left_out.push(name);
            }
        }
        files.kept.sort();
        files.left_out.sort();
        Ok(files)
    }

    fn take_templates(&mut self, folder: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(folder).map_err(FileError::on("list", folder))? {
            let path = entry.map_err(FileError::on("list", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let list = if path.is_file() { &mut self.kept } else { &mut self.left_out };
            list.push(format!("{TEMPLATES}/{name}"));
        }
        Ok(())
    }
}

/// Writes the model folder with other weights, each in the type it had; returns how many changed.
fn save(
    (folder, weights): (&Path, &WeightFolder),
    merged: &MergedSource<'_>,
    files: &Files,
    output: &Path,
) -> anyhow::Result<usize> {
    let tensors = tensors(weights, merged);
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
    for name in &files.kept {
        let path = folder.join(name);
        if name == CONFIG_FILE && merged.new_head().is_some() {
            let text = untied(&path)?;
            draft.write_file(name, |file| file.write_all(text.as_bytes()))?;
            continue;
        }
        if let Some(inner) = Path::new(name).parent().filter(|inner| *inner != Path::new("")) {
            let inner = draft.path().join(inner);
            fs::create_dir_all(&inner).map_err(FileError::on("create", &inner))?;
        }
        let mut source = fs::File::open(&path).map_err(FileError::on("open", &path))?;
        draft.write_file(name, |file| io::copy(&mut source, file).map(drop))?;
    }
    draft.publish()?;
    Ok(changed)
}

/// What is written: a head that was the embedding lies beside it then, and a copy that repeated the
/// embedding goes.
fn tensors<'a>(weights: &'a WeightFolder, merged: &'a MergedSource<'_>) -> Vec<TensorView<'a>> {
    let mut tensors: Vec<TensorView<'a>> = weights.tensors().collect();
    if let Some((head, table)) = merged.new_head() {
        tensors.retain(|tensor| tensor.name != head);
        let table = tensors.iter().find(|tensor| tensor.name == table).copied();
        tensors.extend(table.map(|table| TensorView { name: head, ..table }));
        for (copy, original) in merged.new_copies() {
            let original = tensors.iter().find(|tensor| tensor.name == original).copied();
            let is_new = tensors.iter().all(|tensor| tensor.name != copy);
            let original = original.filter(|_| is_new);
            tensors.extend(original.map(|original| TensorView { name: copy, ..original }));
        }
    }
    tensors
}

/// A model's description, changed to say that the head is not the embedding.
fn untied(path: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).map_err(FileError::on("read", path))?;
    let mut config: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    config["tie_word_embeddings"] = false.into();
    Ok(serde_json::to_string_pretty(&config)? + "\n")
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
    let bound = encoding.overflow_bound().unwrap_or(f32::INFINITY);
    let mut bytes = vec![0; dtype.size_bytes() * values.len()];
    for first in (0..count).step_by(CHUNK_ELEMENTS) {
        let len = CHUNK_ELEMENTS.min(count - first);
        let (values, bytes) = (&mut values[..len], &mut bytes[..dtype.size_bytes() * len]);
        source.read_f32(name, first..first + len, values).map_err(io::Error::other)?;
        // What was infinite before stays so.
        if let Some(value) = values.iter().find(|x| (bound..f32::INFINITY).contains(&x.abs())) {
            let text = format!("{value:e} in {name} is beyond what {dtype} holds");
            return Err(io::Error::other(text));
        }
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
        DType::F16 => Ok(Encoding::F16),
        other => Err(format!("merged weights are written as f32, bf16 or f16, not as {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_in_a_folder_is_kept_or_named() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "README.md", "vocab.txt", "cairn.json", "model.safetensors"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        for name in ["pytorch_model.bin", "model.safetensors.index.json", "chat_template.jinja"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        fs::create_dir(folder.path().join("onnx")).unwrap();
        fs::create_dir_all(folder.path().join("additional_chat_templates/old")).unwrap();
        fs::write(folder.path().join("additional_chat_templates/rag.jinja"), "").unwrap();
        let files = Files::of(folder.path()).unwrap();
        let template = "additional_chat_templates/rag.jinja";
        let kept = ["README.md", template, "chat_template.jinja", "config.json", "vocab.txt"];
        assert_eq!(files.kept, kept);
        let inner = "additional_chat_templates/old";
        let index = "model.safetensors.index.json";
        let left_out = [inner, "cairn.json", index, "onnx/", "pytorch_model.bin"];
        assert_eq!(files.left_out, left_out);
    }
}
