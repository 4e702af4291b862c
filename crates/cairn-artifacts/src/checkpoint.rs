//! A training state as a folder that transformers loads unmodified.
//!
//! The folder is a Hugging Face model (`config.json`, `model.safetensors`,
//! `generation_config.json`, and whatever else is given, such as `tokenizer.json`) with two files
//! more: `optimizer.safetensors` (moments, averages, f32 weights under bf16 ones) and `cairn.json`,
//! the [`Manifest`]: the step, the states that are not tensors, and size and hash of every other
//! file. It appears complete or not at all ([`crate::atomic`]).
//!
//! A run that trains an adapter has that in PEFT's layout in the model's place
//! (`adapter_config.json`, `adapter_model.safetensors`).
//!
//! Nothing in it depends on the time, the path or the machine: equal training states are equal
//! folders.

mod error;
mod series;
#[cfg(test)]
mod tests;

pub use error::CheckpointError;
pub use series::{CheckpointSeries, SavedCheckpoint};

use crate::FileError;
use crate::atomic::FolderDraft;
use crate::hash::{Hash, HashingWriter};
use crate::safetensors::{
    self, OutTensor, SINGLE_FILE, SafetensorsFile, WeightFolder, WrittenFile,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// The schema of `cairn.json` that this version reads and writes.
pub const SCHEMA: &str = "checkpoint/1";
/// The list of everything else, and the states that are not tensors.
pub const MANIFEST_FILE: &str = "cairn.json";
/// The tensors of an adapter, by PEFT.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// The description of an adapter, by PEFT.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// Tensors of the optimizer.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The model, by transformers.
pub const CONFIG_FILE: &str = "config.json";
/// Defaults for sampling, by transformers.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";
/// The tokenizer, by the `tokenizers` crate.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Largest `cairn.json` that is read.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// What `cairn.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// Optimizer steps taken.
    pub step: u64,
    /// Validation loss at this step, where one was measured; decides which checkpoint is best.
    pub validation_loss: Option<f64>,
    /// Hash of the resolved recipe.
    pub recipe_hash: Option<Hash>,
    /// Hash of the training data.
    pub data_hash: Option<Hash>,
    /// States that are not tensors: of the loader, of random numbers, of early stopping …
    pub state: Map<String, Value>,
    /// Size and hash of every other file of the folder.
    pub files: BTreeMap<String, FileRecord>,
}

impl Manifest {
    /// What the tensors are.
    pub fn kind(&self) -> Kind {
        match self.files.contains_key(ADAPTER_FILE) {
            true => Kind::Adapter,
            false => Kind::Model,
        }
    }
}

/// What a file must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its size.
    pub bytes: u64,
    /// The hash of its contents.
    pub hash: Hash,
}

/// What the tensors of a checkpoint are, which decides the names of its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A model, as transformers reads it.
    #[default]
    Model,
    /// A low-rank adapter, as PEFT reads it.
    Adapter,
}

impl Kind {
    /// Names of the tensors' file and of the description.
    const fn files(self) -> (&'static str, &'static str) {
        match self {
            Self::Model => (SINGLE_FILE, CONFIG_FILE),
            Self::Adapter => (ADAPTER_FILE, ADAPTER_CONFIG_FILE),
        }
    }
}

/// What goes into a checkpoint.
#[derive(Debug, Default)]
pub struct Contents<'a> {
    /// What the tensors are.
    pub kind: Kind,
    /// Optimizer steps taken.
    pub step: u64,
    /// Validation loss at this step, where one was measured.
    pub validation_loss: Option<f64>,
    /// Hash of the resolved recipe.
    pub recipe_hash: Option<Hash>,
    /// Hash of the training data.
    pub data_hash: Option<Hash>,
    /// States that are not tensors.
    pub state: Map<String, Value>,
    /// `config.json`, or `adapter_config.json`.
    pub config: Value,
    /// `generation_config.json`; not written if null.
    pub generation_config: Value,
    /// The tensors, under transformers' or PEFT's names.
    pub weights: Vec<OutTensor<'a>>,
    /// The optimizer's tensors; the file is not written if there are none.
    pub optimizer: Vec<OutTensor<'a>>,
    /// Further files, by name.
    pub files: Vec<(String, Vec<u8>)>,
}

/// Writes a checkpoint to `folder`, replacing what was there; it appears complete or not at all.
///
/// # Errors
///
/// [`CheckpointError::File`] if a file cannot be written (a full disk, a tensor that is not what
/// it says), [`CheckpointError::BadName`] for a further file that is not simply a name.
pub fn write(folder: &Path, contents: Contents<'_>) -> Result<Manifest, CheckpointError> {
    let draft = FolderDraft::new(folder)?;
    let mut files = BTreeMap::new();
    let Contents { weights, optimizer, config, generation_config, .. } = contents;
    let texts = BTreeMap::new();
    let (weights_file, config_file) = contents.kind.files();
    let written = draft.write_file(weights_file, |out| safetensors::write(out, weights, &texts))?;
    files.insert(weights_file.to_owned(), written.into());
    if !optimizer.is_empty() {
        let written =
            draft.write_file(OPTIMIZER_FILE, |out| safetensors::write(out, optimizer, &texts))?;
        files.insert(OPTIMIZER_FILE.to_owned(), written.into());
    }
    let mut plain = vec![(config_file.to_owned(), json_bytes(&config))];
    if !generation_config.is_null() {
        plain.push((GENERATION_CONFIG_FILE.to_owned(), json_bytes(&generation_config)));
    }
    plain.extend(contents.files);
    for (name, bytes) in plain {
        if !is_plain_name(&name) || name == MANIFEST_FILE || files.contains_key(&name) {
            return Err(CheckpointError::BadName { folder: folder.to_owned(), name });
        }
        let written = draft.write_file(&name, |out| write_bytes(out, &bytes))?;
        files.insert(name, written);
    }
    let manifest = Manifest {
        schema: SCHEMA.to_owned(),
        step: contents.step,
        validation_loss: contents.validation_loss.filter(|loss| loss.is_finite()),
        recipe_hash: contents.recipe_hash,
        data_hash: contents.data_hash,
        state: contents.state,
        files,
    };
    let json = serde_json::to_value(&manifest).map_err(io::Error::from);
    let json = json.map_err(FileError::on("write", &folder.join(MANIFEST_FILE)))?;
    draft.write_file(MANIFEST_FILE, |out| out.write_all(&json_bytes(&json)))?;
    draft.publish()?;
    Ok(manifest)
}

impl From<WrittenFile> for FileRecord {
    fn from(written: WrittenFile) -> Self {
        Self { bytes: written.bytes, hash: written.hash }
    }
}

fn write_bytes(out: &mut dyn Write, bytes: &[u8]) -> io::Result<FileRecord> {
    let mut out = HashingWriter::new(out);
    out.write_all(bytes)?;
    Ok(FileRecord { bytes: out.bytes(), hash: out.hash() })
}

/// JSON as people read it, with a line break at the end.
fn json_bytes(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Whether `name` is a file of the folder itself.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let is_only = matches!(components.next(), Some(Component::Normal(only)) if only == name);
    is_only && components.next().is_none()
}

/// How much of a checkpoint is checked when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Sizes and hashes of all files: reads every byte once. For resuming.
    Hashes,
    /// Sizes and hashes of what the model is made of; the optimizer need not be there. For a model
    /// that is used.
    Model,
    /// Sizes only, to list what is there.
    Sizes,
}

/// An opened checkpoint; its tensors are mapped.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    manifest: Manifest,
    weights: WeightFolder,
    optimizer: Option<SafetensorsFile>,
}

impl Checkpoint {
    /// Opens the checkpoint in `folder` and checks that its files are what its manifest says.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`] naming the file that is missing, altered or of another schema.
    pub fn open(folder: &Path, verify: Verify) -> Result<Self, CheckpointError> {
        let manifest = read_manifest(folder)?;
        check_files(folder, &manifest, verify)?;
        let weights = match manifest.kind() {
            Kind::Model => WeightFolder::open(folder),
            Kind::Adapter => WeightFolder::open_file(folder, ADAPTER_FILE),
        };
        let weights = weights.map_err(Box::new)?;
        let has_optimizer = manifest.files.contains_key(OPTIMIZER_FILE);
        let optimizer = has_optimizer.then(|| SafetensorsFile::open(&folder.join(OPTIMIZER_FILE)));
        let optimizer = optimizer.transpose()?;
        Ok(Self { folder: folder.to_owned(), manifest, weights, optimizer })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What `cairn.json` says.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The tensors of the model or adapter.
    pub const fn weights(&self) -> &WeightFolder {
        &self.weights
    }

    /// The optimizer's tensors, if they were saved.
    pub const fn optimizer(&self) -> Option<&SafetensorsFile> {
        self.optimizer.as_ref()
    }

    /// Reads one of the other files.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::File`] if it cannot be read.
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let path = self.folder.join(name);
        Ok(fs::read(&path).map_err(FileError::on("read", &path))?)
    }
}

/// Reads `cairn.json` alone.
///
/// # Errors
///
/// [`CheckpointError::UnknownSchema`] for a file of another schema, [`CheckpointError::Malformed`]
/// for one that is no manifest, [`CheckpointError::File`] if there is none.
pub fn read_manifest(folder: &Path) -> Result<Manifest, CheckpointError> {
    let path = folder.join(MANIFEST_FILE);
    let malformed = |reason: String| CheckpointError::Malformed { path: path.clone(), reason };
    let bytes = fs::metadata(&path).map_err(FileError::on("read the size of", &path))?.len();
    if bytes > MANIFEST_BYTES_MAX {
        return Err(malformed(format!("{bytes} bytes, at most {MANIFEST_BYTES_MAX} are accepted")));
    }
    let text = fs::read(&path).map_err(FileError::on("read", &path))?;
    let json: Value =
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    // Before anything else: another schema may have other fields.
    match json.get("schema").and_then(Value::as_str) {
        Some(SCHEMA) => {}
        Some(schema) => {
            return Err(CheckpointError::UnknownSchema { path, schema: schema.to_owned() });
        }
        None => return Err(malformed("it does not name its schema".to_owned())),
    }
    let manifest: Manifest =
        serde_json::from_value(json).map_err(|error| malformed(error.to_string()))?;
    match manifest.files.keys().find(|name| !is_plain_name(name)) {
        None => Ok(manifest),
        Some(name) => {
            Err(malformed(format!("it names '{name}', which is not a file of its own folder")))
        }
    }
}

/// Checks the model in a checkpoint against the hashes it was saved with. A folder without a manifest
/// is nobody's checkpoint and passes.
///
/// # Errors
///
/// [`CheckpointError`] naming the file that is missing, cut short or altered.
pub fn verify_model(folder: &Path) -> Result<(), CheckpointError> {
    if !folder.join(MANIFEST_FILE).exists() {
        return Ok(());
    }
    check_files(folder, &read_manifest(folder)?, Verify::Model)
}

fn check_files(folder: &Path, manifest: &Manifest, verify: Verify) -> Result<(), CheckpointError> {
    for (name, expected) in &manifest.files {
        if verify == Verify::Model && name == OPTIMIZER_FILE {
            continue;
        }
        let path = folder.join(name);
        let metadata = fs::metadata(&path).map_err(FileError::on("read the size of", &path))?;
        if metadata.len() != expected.bytes {
            return Err(CheckpointError::WrongSize {
                path,
                expected: expected.bytes,
                actual: metadata.len(),
            });
        }
        if verify != Verify::Sizes {
            let actual = Hash::of_file(&path)?;
            if actual != expected.hash {
                return Err(CheckpointError::Altered { path, expected: expected.hash, actual });
            }
        }
    }
    Ok(())
}
