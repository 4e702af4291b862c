//! The header of a pack: everything about the model but its numbers.
//!
//! It is canonical JSON: keys in ascending order of their bytes, no spaces, so that equal headers
//! are equal bytes.

use super::{
    Assignment, BLOB_ALIGNMENT, CHUNK_BYTES, ENCODINGS, FILE_BYTES_MAX, FILES_MAX, LAYOUTS,
    NAME_BYTES_MAX, PANEL_WIDTH, POLICIES, PROFILES, PackErrorKind, SCHEMA, TENSORS_MAX,
};
use crate::hash::{Hash, Hasher};
use cairn_spec::{DType, ModelSpec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Component, Path};

/// Names that belong to what unpacking makes itself.
const RESERVED: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "cairn.json", "optimizer.safetensors"];
/// The only folder that files of a pack may lie in.
const SUBFOLDER: &str = "additional_chat_templates";

/// What a pack says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`SCHEMA`].
    pub schema: String,
    /// What the model computes.
    pub spec: ModelSpec,
    /// The order of every sum, by name.
    pub policy: String,
    /// What the layout is made for.
    pub profile: Profile,
    /// How a generating model was planned to be run; absent for a model that does not generate.
    pub plan: Option<Plan>,
    /// The weights in the order of the program that reads them, which is that of their bytes.
    pub tensors: Vec<TensorEntry>,
    /// Tokenizer, templates, configurations and license texts, after the tensors.
    pub files: Vec<FileEntry>,
    /// What it was made from.
    pub source: Source,
    /// On what terms it may be used.
    pub license: License,
    /// How the model came about, where Cairn trained it.
    pub lineage: Option<Lineage>,
    /// How the encodings were chosen, where the file's bytes were limited.
    pub assignment: Option<Assignment>,
    /// BLAKE3 of the hashes of all tensors, then of all files.
    pub root: Hash,
}

/// What the layout of a pack is made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// `portable` or `host`.
    pub kind: String,
    /// Rows that a panel interleaves.
    pub panel_width: u64,
    /// Bytes that each tensor begins at a multiple of.
    pub alignment: u64,
    /// The instruction set of the host; only with `host`.
    pub isa: Option<String>,
    /// The host's cache line in bytes; only with `host`.
    pub cache_line_bytes: Option<u64>,
    /// As the host's processor names itself; only with `host`.
    pub cpu_model: Option<String>,
}

impl Profile {
    /// The profile of any machine.
    pub fn portable() -> Self {
        Self {
            kind: "portable".to_owned(),
            panel_width: PANEL_WIDTH,
            alignment: BLOB_ALIGNMENT,
            isa: None,
            cache_line_bytes: None,
            cpu_model: None,
        }
    }

    /// The profile of one machine.
    pub fn host(isa: &str, cache_line_bytes: u64, cpu_model: Option<String>) -> Self {
        Self {
            kind: "host".to_owned(),
            isa: Some(isa.to_owned()),
            cache_line_bytes: Some(cache_line_bytes),
            cpu_model,
            ..Self::portable()
        }
    }

    fn check(&self) -> Result<(), PackErrorKind> {
        if !PROFILES.contains(&self.kind.as_str()) {
            return Err(PackErrorKind::UnknownProfile { found: self.kind.clone() });
        }
        let facts = [
            ("panels of", self.panel_width, PANEL_WIDTH),
            ("an alignment of", self.alignment, BLOB_ALIGNMENT),
        ];
        for (what, found, expected) in facts {
            if found != expected {
                let (found, expected) = (found.to_string(), expected.to_string());
                return Err(PackErrorKind::ForeignLayout { what, found, expected });
            }
        }
        let is_host = self.kind == "host";
        let stated = self.isa.is_some() && self.cache_line_bytes.is_some();
        let nothing = self.isa.is_none() && self.cache_line_bytes.is_none();
        if (is_host && stated) || (!is_host && nothing && self.cpu_model.is_none()) {
            return Ok(());
        }
        Err(entry("the profile", "a host's has an instruction set, a portable one nothing of it"))
    }
}

/// How a model was planned to be run, and the bytes that takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Longest sequence, in tokens.
    pub max_context: u64,
    /// Most sequences at once.
    pub max_num_seqs: u64,
    /// Token counts that the program is planned for, ascending.
    pub token_buckets: Vec<u64>,
    /// Element type of cached keys and values.
    pub cache_type: String,
    /// Predicted bytes.
    pub bytes: PlannedBytes,
}

/// Predicted bytes of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedBytes {
    /// Weights, each begun at a multiple of 64.
    pub weights: u64,
    /// Cached keys and values.
    pub cache: u64,
    /// Everything else.
    pub arena: u64,
}

/// A weight of the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name in the program.
    pub name: String,
    /// Rows (outputs) and columns (inputs) of a matrix; the length of a vector.
    pub dims: Vec<u64>,
    /// How an element is written: one of [`ENCODINGS`].
    pub encoding: String,
    /// In which order: one of [`LAYOUTS`].
    pub layout: String,
    /// Whether every value is the source's, bit for bit.
    pub exact: bool,
    /// First byte, counted from where the data begins.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// BLAKE3 of the chunks' hashes.
    pub hash: Hash,
    /// BLAKE3 of each chunk of 1 MiB.
    pub chunks: Vec<Hash>,
}

/// A small file of the model, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name in the model's folder.
    pub name: String,
    /// First byte, counted from where the data begins.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// BLAKE3 of the chunks' hashes.
    pub hash: Hash,
    /// BLAKE3 of each chunk of 1 MiB.
    pub chunks: Vec<Hash>,
}

/// What a pack was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The format of its files: `safetensors`.
    pub format: String,
    /// Its tensors: what unpacking writes.
    pub tensors: Vec<SourceTensor>,
    /// Tensors that are no part of the model, such as copies of a tied embedding; they are not in the
    /// pack.
    pub left_out: Vec<String>,
    /// Its files with their hashes.
    pub files: Vec<SourceFile>,
}

/// A tensor of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions.
    pub dims: Vec<u64>,
}

/// A file of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Its name in the source's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its contents.
    pub hash: Hash,
}

/// On what terms a model may be used, as far as its folder says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct License {
    /// The license's name as stated; absent where nothing states it.
    pub id: Option<String>,
    /// The file that states it.
    pub stated_in: Option<String>,
    /// Files of the pack with its text.
    pub files: Vec<String>,
}

/// How a model came about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// Optimizer steps taken.
    pub step: u64,
    /// Hash of the resolved recipe.
    pub recipe_hash: Option<Hash>,
    /// Hash of the training data.
    pub data_hash: Option<Hash>,
}

/// The part of a header that says how to read the rest.
#[derive(Deserialize)]
struct Named {
    schema: String,
}

impl Header {
    /// Reads and checks a header, followed by `data_bytes` of data.
    ///
    /// # Errors
    ///
    /// [`PackErrorKind`] naming the schema, encoding, layout, profile or policy that is unknown, or
    /// the tensor or file that cannot be where or what the header says.
    pub fn parse(json: &[u8], data_bytes: u64) -> Result<Self, PackErrorKind> {
        let malformed =
            |error: serde_json::Error| PackErrorKind::Header { reason: error.to_string() };
        // Before anything else: another schema may have other fields.
        let Named { schema } = serde_json::from_slice(json).map_err(malformed)?;
        if schema != SCHEMA {
            return Err(PackErrorKind::UnknownSchema { found: schema });
        }
        let header: Self = serde_json::from_slice(json).map_err(malformed)?;
        header.check(data_bytes)?;
        Ok(header)
    }

    fn check(&self, data_bytes: u64) -> Result<(), PackErrorKind> {
        self.check_form(data_bytes)?;
        self.check_hashes()
    }

    /// Everything that does not need the hashes: a writer asks this before it writes anything.
    pub(super) fn check_form(&self, data_bytes: u64) -> Result<(), PackErrorKind> {
        if !POLICIES.contains(&self.policy.as_str()) {
            return Err(PackErrorKind::UnknownPolicy { found: self.policy.clone() });
        }
        self.profile.check()?;
        self.assignment.as_ref().map_or(Ok(()), Assignment::check)?;
        at_most("tensors", self.tensors.len(), TENSORS_MAX)?;
        at_most("files", self.files.len(), FILES_MAX)?;
        let mut names = BTreeSet::new();
        for tensor in &self.tensors {
            tensor.check()?;
            if !names.insert(&tensor.name) {
                return Err(entry(&tensor.name, "it is there twice"));
            }
        }
        let mut names = BTreeSet::new();
        for file in &self.files {
            file.check()?;
            if !names.insert(&file.name) {
                return Err(entry(&file.name, "it is there twice"));
            }
        }
        self.check_places(data_bytes)?;
        self.check_plan()
    }

    fn check_hashes(&self) -> Result<(), PackErrorKind> {
        for TensorEntry { name, bytes, hash, chunks, .. } in &self.tensors {
            check_chunks(name, (*bytes, hash, chunks))?;
        }
        for FileEntry { name, bytes, hash, chunks, .. } in &self.files {
            check_chunks(name, (*bytes, hash, chunks))?;
        }
        if self.root == self.root_of_entries() {
            return Ok(());
        }
        Err(entry("the root", "it is not the hash of the tensors' and files' hashes"))
    }

    /// Whether tensors and files follow one another without a gap, up to the end of the data.
    fn check_places(&self, data_bytes: u64) -> Result<(), PackErrorKind> {
        let mut next = 0;
        let mut end = 0;
        for (name, offset, bytes) in self.blobs() {
            if offset != next {
                let reason = format!("it begins at {offset} of the data and should at {next}");
                return Err(entry(name, &reason));
            }
            let past = || entry(name, "it ends after the file does");
            end = offset.checked_add(bytes).filter(|&end| end <= data_bytes).ok_or_else(past)?;
            next = end.checked_next_multiple_of(BLOB_ALIGNMENT).ok_or_else(past)?;
        }
        if end != data_bytes {
            let reason = format!("tensors and files have {end} bytes, the data {data_bytes}");
            return Err(entry("the data", &reason));
        }
        Ok(())
    }

    fn check_plan(&self) -> Result<(), PackErrorKind> {
        let Some(plan) = &self.plan else { return Ok(()) };
        let planned = plan.bytes.weights;
        let stored = self.weight_bytes();
        if planned == stored {
            return Ok(());
        }
        Err(entry("the plan", &format!("it has {planned} bytes of weights, the pack {stored}")))
    }

    /// Bytes of all weights in memory, each begun at a multiple of 64.
    pub fn weight_bytes(&self) -> u64 {
        let aligned = self.tensors.iter().map(|tensor| align(tensor.bytes));
        aligned.fold(0, u64::saturating_add)
    }

    /// Names, offsets and sizes of tensors, then files.
    pub(super) fn blobs(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let tensors = self.tensors.iter().map(|t| (t.name.as_str(), t.offset, t.bytes));
        tensors.chain(self.files.iter().map(|f| (f.name.as_str(), f.offset, f.bytes)))
    }

    /// The hash of all hashes.
    pub(super) fn root_of_entries(&self) -> Hash {
        let tensors = self.tensors.iter().map(|tensor| &tensor.hash);
        hash_of_hashes(tensors.chain(self.files.iter().map(|file| &file.hash)))
    }

    /// The header as canonical JSON.
    ///
    /// # Panics
    ///
    /// Never: everything in a header is text, whole numbers, and finite numbers of a valid spec.
    pub fn to_json(&self) -> Vec<u8> {
        let value = serde_json::to_value(self).expect("a header is JSON");
        serde_json::to_vec(&sorted(value)).expect("JSON is text")
    }
}

impl TensorEntry {
    fn check(&self) -> Result<(), PackErrorKind> {
        check_name(&self.name)?;
        let Self { name, encoding, layout, dims, .. } = self;
        if !ENCODINGS.contains(&encoding.as_str()) {
            let (tensor, found) = (name.clone(), encoding.clone());
            return Err(PackErrorKind::UnknownEncoding { tensor, found });
        }
        if !LAYOUTS.contains(&layout.as_str()) {
            let (tensor, found) = (name.clone(), layout.clone());
            return Err(PackErrorKind::UnknownLayout { tensor, found });
        }
        if dims.len() == 1 && (encoding != "f32" || layout != "row_major") {
            return Err(entry(
                name,
                &format!("a vector is f32 row_major, not {encoding} {layout}"),
            ));
        }
        match stored_bytes(encoding, layout, dims) {
            None => Err(entry(name, &format!("it cannot have the dimensions {dims:?}"))),
            Some(expected) if expected != self.bytes => {
                let reason = format!("it has {} bytes and should have {expected}", self.bytes);
                Err(entry(name, &reason))
            }
            Some(_) => Ok(()),
        }
    }
}

impl FileEntry {
    fn check(&self) -> Result<(), PackErrorKind> {
        check_name(&self.name)?;
        if !is_safe(&self.name) {
            return Err(entry(&self.name, "no file of a model may be called so"));
        }
        let bytes = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let max = usize::try_from(FILE_BYTES_MAX).unwrap_or(usize::MAX);
        at_most("bytes in a file", bytes, max)
    }
}

/// Bytes of a tensor; `None` where no tensor has such a form.
pub fn stored_bytes(encoding: &str, layout: &str, dims: &[u64]) -> Option<u64> {
    let (rows, columns) = match *dims {
        [rows] => (rows, 1),
        [rows, columns] => (rows, columns),
        _ => return None,
    };
    if rows == 0 || columns == 0 {
        return None;
    }
    let rows = match layout {
        "panel" => rows.checked_next_multiple_of(PANEL_WIDTH)?,
        _ => rows,
    };
    let elements = rows.checked_mul(columns)?;
    if let Some(panel) = panel_bytes(encoding, columns) {
        return if layout == "panel" { (rows / PANEL_WIDTH).checked_mul(panel?) } else { None };
    }
    match encoding {
        "f32" => elements.checked_mul(4),
        "bf16" | "f16" => elements.checked_mul(2),
        _ => None,
    }
}

/// Bytes of sixteen rows of an encoding whose panels stand for themselves; the outer `None` is any other.
fn panel_bytes(encoding: &str, columns: u64) -> Option<Option<u64>> {
    // Bits of a code, inputs of a group, bytes of its scale.
    let (bits, group, scale) = match encoding {
        "bf16z" => return Some(bf16z_panel_bytes(columns)),
        "q8" => (8, 32, 2),
        "q4" => (4, 32, 2),
        "nf4" => (4, 64, 4),
        "fp8" => (8, 128, 4),
        "fp4" => (4, 32, 1),
        _ => return None,
    };
    let codes = columns.div_ceil(32).checked_mul(32 * PANEL_WIDTH * bits / 8);
    let scales = columns.div_ceil(group).checked_mul(PANEL_WIDTH * scale);
    let bytes = codes.zip(scales).and_then(|(codes, scales)| codes.checked_add(scales));
    Some(bytes.and_then(|bytes| bytes.checked_next_multiple_of(BLOB_ALIGNMENT)))
}

/// Bytes of sixteen rows of bf16z: blocks of eight columns, a table, and room for exceptions.
fn bf16z_panel_bytes(columns: u64) -> Option<u64> {
    let blocks = columns.div_ceil(8);
    let capacity = blocks.checked_mul(8 * PANEL_WIDTH)?.div_ceil(128) + 8;
    let bytes = blocks.checked_mul(192)?.checked_add(32 + 6 * capacity)?;
    bytes.checked_next_multiple_of(BLOB_ALIGNMENT)
}

/// The hash of a tensor or file: that of its chunks' hashes.
pub(super) fn hash_of_hashes<'a>(hashes: impl Iterator<Item = &'a Hash>) -> Hash {
    let mut hasher = Hasher::new();
    for hash in hashes {
        hasher.update(hash.as_bytes());
    }
    hasher.finish()
}

/// Where the next tensor or file begins.
pub(super) fn align(end: u64) -> u64 {
    end.checked_next_multiple_of(BLOB_ALIGNMENT).unwrap_or(u64::MAX)
}

fn check_chunks(
    name: &str,
    (bytes, hash, chunks): (u64, &Hash, &[Hash]),
) -> Result<(), PackErrorKind> {
    let expected = bytes.div_ceil(CHUNK_BYTES as u64);
    if chunks.len() as u64 != expected {
        let reason = format!("it has {} chunks and should have {expected}", chunks.len());
        return Err(entry(name, &reason));
    }
    if *hash != hash_of_hashes(chunks.iter()) {
        return Err(entry(name, "its hash is not that of its chunks' hashes"));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), PackErrorKind> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        let shown: String = name.chars().take(40).filter(|c| !c.is_control()).collect();
        return Err(entry(&format!("'{shown}'"), "nothing may be called so"));
    }
    Ok(())
}

/// Whether unpacking may write a file of this name into a folder of its own.
pub(super) fn is_safe(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let mut plain = || match components.next() {
        Some(Component::Normal(part)) => part.to_str().filter(|part| !part.starts_with('.')),
        _ => None,
    };
    let file = match name.split_once('/') {
        None => name,
        Some((folder, file)) if folder == SUBFOLDER && plain() == Some(folder) => file,
        Some(_) => return false,
    };
    plain() == Some(file)
        && !file.contains(['/', '\\'])
        && components.next().is_none()
        && !RESERVED.contains(&file)
}

fn at_most(what: &'static str, found: usize, max: usize) -> Result<(), PackErrorKind> {
    if found > max { Err(PackErrorKind::TooMany { what, found, max }) } else { Ok(()) }
}

fn entry(part: &str, reason: &str) -> PackErrorKind {
    PackErrorKind::Entry { part: part.to_owned(), reason: reason.to_owned() }
}

/// The same value with the keys of every object in ascending order.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut pairs: Vec<(String, Value)> = object.into_iter().collect();
            pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
            let sorted: Map<String, Value> =
                pairs.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            Value::Object(sorted)
        }
        Value::Array(values) => Value::Array(values.into_iter().map(sorted).collect()),
        other => other,
    }
}
