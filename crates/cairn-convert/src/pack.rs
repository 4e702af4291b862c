//! A model folder → one file: weights in the form the generation plan wants, everything else beside
//! them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use cairn_artifacts::checkpoint::{MANIFEST_FILE, read_manifest};
use cairn_artifacts::hash::Hash;
use cairn_artifacts::leanpack::{
    self, Assignment, Contents, FILE_BYTES_MAX, Lineage, OutWeight, Plan, PlannedBytes, Profile,
    Source, SourceFile, SourceTensor, WrittenPack,
};
use cairn_artifacts::safetensors::{INDEX_FILE, WeightFolder};
use cairn_artifacts::{FileError, atomic};
use cairn_engine::{EngineOptions, EnginePlan};
use cairn_kernels::memory::bytes_of_mut;
use cairn_kernels::{Cpu, Encoding, Layout};
use cairn_model::{
    AdapterMap, BuildOptions, Head, LoadError, TensorMap, WeightReader, build_stored_program,
    head_weight,
};
use cairn_program::{Class, Program, Sizes, Value};
use cairn_spec::model::MaskKind;
use cairn_spec::{DType, ModelSpec};

use crate::assign::Chosen;
use crate::error::ConvertError;
use crate::license;
use crate::sensitivity::class_of;

/// The numeric policy of every program there is.
const POLICY: &str = "f32/1";
/// Longest context that the recorded plan is made for, in tokens.
const PLAN_CONTEXT_MAX: usize = 4096;
/// Files of a model folder that go into a pack, besides those with terms of use.
const FILES: [&str; 11] = [
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];
/// The folder of further chat templates.
const TEMPLATES: &str = "additional_chat_templates";

/// What a layout is to be made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProfileChoice {
    /// Any machine.
    Portable,
    /// This one.
    Host(Profile),
}

/// How a model is packed.
#[derive(Clone, Debug, PartialEq)]
pub struct PackSettings {
    /// Of weight matrices; the source's own where absent.
    pub encoding: Option<Encoding>,
    /// Of the head, and of the embedding where that is the head; like other matrices where absent.
    pub head: Option<Encoding>,
    /// What was chosen for single matrices, to fit a limit of bytes.
    pub chosen: Option<Chosen>,
    /// What the layout is made for.
    pub profile: ProfileChoice,
}

/// A model to be packed.
#[derive(Clone, Copy, Debug)]
pub struct PackJob<'a> {
    /// Its folder.
    pub folder: &'a Path,
    /// What it computes.
    pub spec: &'a ModelSpec,
    /// Its tensors.
    pub weights: &'a WeightFolder,
    /// The threads that encode them.
    pub cpu: &'a Cpu,
}

/// Packs a model into the file `path`, which appears complete or not at all, and within the limit of
/// bytes if there is one. `progress` is told bytes
/// of weights done and in all.
///
/// # Errors
///
/// [`ConvertError`] naming the file or tensor; [`ConvertError::Stopped`] if `progress` breaks.
pub fn pack(
    job: PackJob<'_>,
    settings: &PackSettings,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<WrittenPack, ConvertError> {
    let reader = WeightReader::new(job.spec, job.weights)?;
    let encoding = match settings.encoding {
        Some(encoding) => encoding,
        None => automatic(&source_tensors(job.weights, &reader)?)?,
    };
    let mut encodings = match &settings.chosen {
        Some(chosen) => chosen.encodings.clone(),
        None => BTreeMap::new(),
    };
    if let Some(head) = settings.head {
        let name = head_weight(job.spec).ok_or(ConvertError::NoHead)?;
        encodings.insert(name.to_owned(), head);
    }
    let packing = Packing { job, reader: &reader, settings, encoding };
    match packing.write(&encodings, path, progress) {
        // The sizes of all weights stand in the header: one that does not fit begins anew. Nearly always
        // all do, and each is encoded once.
        Err(ConvertError::Load(LoadError::Unencodable { encoding: Encoding::Bf16z, .. })) => {
            packing.widen(&mut encodings)?;
            packing.write(&encodings, path, progress)
        }
        written => written,
    }
}

/// A model that is being packed.
#[derive(Clone, Copy)]
struct Packing<'a> {
    job: PackJob<'a>,
    reader: &'a WeightReader<'a>,
    settings: &'a PackSettings,
    /// Of matrices without one of their own.
    encoding: Encoding,
}

impl Packing<'_> {
    /// Writes the pack, single matrices in encodings of their own.
    fn write(
        self,
        encodings: &BTreeMap<String, Encoding>,
        path: &Path,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<WrittenPack, ConvertError> {
        let Self { job, reader, settings, encoding } = self;
        let (program, plan) = program(job.spec, encoding, encodings)?;
        let weights: Vec<&Value> =
            program.of_class(Class::Weight).map(|(_, value)| value).collect();
        if let Some(Chosen { assignment, .. }) = &settings.chosen {
            let sizes = Sizes::dense(0, 0);
            let least = other_bytes(job)? + matrix_bytes(&weights, &sizes);
            if least > assignment.limit_bytes {
                let limit = assignment.limit_bytes;
                return Err(ConvertError::ByteLimit { limit, least });
            }
        }
        let contents = self.contents(&weights, plan)?;
        // Before anything is written: what lies under `path` is replaced only by what was asked for.
        if let Some(chosen) = &settings.chosen {
            let limit = chosen.assignment.limit_bytes;
            let least = leanpack::file_bytes(path, &contents)?;
            if least > limit {
                return Err(ConvertError::ByteLimit { limit, least });
            }
        }
        write(path, contents, &weights, (reader, job.cpu), progress)
    }

    /// Everything of the pack but the weights' bytes.
    fn contents(self, weights: &[&Value], plan: Option<Plan>) -> Result<Contents, ConvertError> {
        let Self { job, reader, settings, .. } = self;
        let names = file_names(job.folder)?;
        let mut files = Vec::new();
        for name in &names {
            files.push((name.clone(), read_bounded(&job.folder.join(name))?));
        }
        let chosen = settings.chosen.as_ref();
        Ok(Contents {
            spec: job.spec.clone(),
            policy: POLICY.to_owned(),
            profile: match &settings.profile {
                ProfileChoice::Portable => Profile::portable(),
                ProfileChoice::Host(profile) => profile.clone(),
            },
            plan,
            weights: out_weights(job.spec, weights),
            files,
            source: source(job, reader, &names)?,
            license: license::license(job.folder, &names)?,
            lineage: lineage(job.folder)?,
            assignment: chosen.map(|chosen| as_packed(&chosen.assignment, weights)),
        })
    }

    /// Makes matrices bf16 that were to be bf16z and whose exponents are too many for it.
    fn widen(self, encodings: &mut BTreeMap<String, Encoding>) -> Result<(), ConvertError> {
        let Self { job, reader, encoding, .. } = self;
        let (asked, _) = program(job.spec, encoding, encodings)?;
        let mut buffer: Vec<f32> = Vec::new();
        for (_, weight) in asked.of_class(Class::Weight) {
            if weight.value_type.encoding() != Some(Encoding::Bf16z) {
                continue;
            }
            let bytes = weight.bytes(&Sizes::dense(0, 0));
            buffer.resize(bytes.div_ceil(4), 0.0);
            let stored = &mut bytes_of_mut(&mut buffer)[..bytes];
            match reader.read(&weight.name, weight.value_type, job.cpu, stored) {
                Err(LoadError::Unencodable { .. }) => {
                    encodings.insert(weight.name.clone(), Encoding::Bf16);
                }
                read => {
                    read?;
                }
            }
        }
        Ok(())
    }
}

/// What was chosen, with what its classes have become: a matrix whose exponents are too many for bf16z
/// is bf16.
fn as_packed(assignment: &Assignment, weights: &[&Value]) -> Assignment {
    let mut packed = assignment.clone();
    for class in &mut packed.classes {
        let of_class = weights.iter().filter(|weight| class_of(&weight.name) == class.class);
        let matrices: Vec<&&Value> = of_class.filter(|weight| weight.shape.0.len() > 1).collect();
        let encodings = matrices.iter().filter_map(|weight| weight.value_type.encoding());
        let mut names: Vec<&str> = encodings.map(Encoding::name).collect();
        names.sort_unstable();
        names.dedup();
        if class.encoding == Encoding::Bf16z.name() && names.contains(&Encoding::Bf16.name()) {
            class.encoding = names.join(" and ");
            let sizes = Sizes::dense(0, 0);
            class.bytes = matrices.iter().map(|weight| weight.bytes(&sizes) as u64).sum();
        }
    }
    packed
}

/// Writes the pack, one weight at a time.
fn write(
    path: &Path,
    contents: Contents,
    weights: &[&Value],
    (reader, cpu): (&WeightReader<'_>, &Cpu),
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<WrittenPack, ConvertError> {
    let sizes = Sizes::dense(0, 0);
    let total: usize = weights.iter().map(|weight| weight.bytes(&sizes)).sum();
    let mut done = 0;
    // Of floats, so that it is aligned as weights are.
    let mut buffer: Vec<f32> = Vec::new();
    let mut failure = None;
    let mut fill = |index: usize, out: &mut dyn Write| {
        let weight = weights[index];
        let bytes = weight.bytes(&sizes);
        if progress(done as u64, total as u64).is_break() {
            failure = Some(ConvertError::Stopped);
            return Err(io::Error::other("stopped"));
        }
        buffer.resize(bytes.div_ceil(4), 0.0);
        let stored = &mut bytes_of_mut(&mut buffer)[..bytes];
        let exact = match reader.read(&weight.name, weight.value_type, cpu, stored) {
            Ok(exact) => exact,
            Err(error) => {
                failure = Some(error.into());
                return Err(io::Error::other("a tensor cannot be read"));
            }
        };
        out.write_all(stored)?;
        done += bytes;
        Ok(exact)
    };
    let written = leanpack::write(path, contents, &mut fill);
    match failure {
        Some(failure) => Err(failure),
        None => Ok(written?),
    }
}

/// Bytes of a pack that are not those of weight matrices, and a little more: vectors, small files, the
/// header, and what aligns them.
///
/// # Errors
///
/// [`ConvertError`] naming the file that cannot be looked at, or saying why the model has no program.
pub fn other_bytes(job: PackJob<'_>) -> Result<u64, ConvertError> {
    /// What a header says of a tensor or a file, at most, and of the model.
    const ENTRY_BYTES: u64 = 2048;
    const MODEL_BYTES: u64 = 1 << 18;
    let mut files = 0;
    for name in file_names(job.folder)? {
        let path = job.folder.join(name);
        files += fs::metadata(&path).map_err(FileError::on("read the size of", &path))?.len();
        files += ENTRY_BYTES;
    }
    let (program, _) = program(job.spec, Encoding::F32, &BTreeMap::new())?;
    let sizes = Sizes::dense(0, 0);
    let (mut vectors, mut header) = (0, MODEL_BYTES);
    for (_, weight) in program.of_class(Class::Weight) {
        let bytes = weight.bytes(&sizes) as u64;
        vectors += if weight.shape.0.len() == 1 { bytes + leanpack::BLOB_ALIGNMENT } else { 0 };
        // Of a weight in f32: at least as many chunks as in anything smaller.
        header += ENTRY_BYTES + 67 * bytes.div_ceil(leanpack::CHUNK_BYTES as u64);
    }
    Ok(vectors + files + header.next_multiple_of(leanpack::DATA_ALIGNMENT))
}

fn matrix_bytes(weights: &[&Value], sizes: &Sizes) -> u64 {
    let matrices = weights.iter().filter(|weight| weight.shape.0.len() > 1);
    matrices.map(|weight| (weight.bytes(sizes) as u64).next_multiple_of(64)).sum()
}

/// The program whose weights are packed, and how it is planned to be run.
fn program(
    spec: &ModelSpec,
    encoding: Encoding,
    encodings: &BTreeMap<String, Encoding>,
) -> Result<(Program, Option<Plan>), ConvertError> {
    let generates = spec.attention.mask == MaskKind::Causal && spec.head.is_some();
    let head = match (generates, spec.head.is_some()) {
        (true, _) => Head::GatheredLogits,
        (false, true) => Head::Logits,
        (false, false) => Head::Hidden,
    };
    let build = BuildOptions { encoding, layout: Layout::Panel, ..BuildOptions::new(head) };
    let program = build_stored_program(spec, &build, &AdapterMap::default(), encodings)?;
    if !generates {
        return Ok((program, None));
    }
    let context = spec.context_limit().min(PLAN_CONTEXT_MAX);
    let options =
        EngineOptions { encoding, layout: Layout::Panel, ..EngineOptions::new(1, context) };
    let planned = EnginePlan::with_storage(spec, options, &AdapterMap::default(), encodings)?;
    let bytes = planned.bytes();
    let plan = Plan {
        max_context: context as u64,
        max_num_seqs: 1,
        token_buckets: planned.token_buckets().map(|tokens| tokens as u64).collect(),
        cache_type: cache_name(options.cache_type).to_owned(),
        bytes: PlannedBytes {
            weights: bytes.weights as u64,
            cache: bytes.cache as u64,
            arena: bytes.arena as u64,
        },
    };
    Ok((program, Some(plan)))
}

fn cache_name(cache: cairn_kernels::CacheType) -> &'static str {
    match cache {
        cairn_kernels::CacheType::F32 => "f32",
        cairn_kernels::CacheType::Bf16 => "bf16",
        cairn_kernels::CacheType::Q8 => "q8",
    }
}

/// The weights with their rows and columns, which a program may have cut further.
fn out_weights(spec: &ModelSpec, weights: &[&Value]) -> Vec<OutWeight> {
    let map = TensorMap::of_program(spec);
    let shapes: BTreeMap<&str, &[usize]> = map.tensors().into_iter().collect();
    let out = weights.iter().map(|weight| OutWeight {
        name: weight.name.clone(),
        dims: shapes[weight.name.as_str()].iter().map(|&size| size as u64).collect(),
        encoding: weight.value_type.encoding().unwrap_or(Encoding::F32).name().to_owned(),
        layout: weight.value_type.layout().name().to_owned(),
    });
    out.collect()
}

/// The tensors that the weights come from.
fn source_tensors(
    weights: &WeightFolder,
    reader: &WeightReader<'_>,
) -> Result<Vec<SourceTensor>, ConvertError> {
    let mut tensors = Vec::new();
    for name in reader.tensors() {
        let tensor = weights.tensor(&name).expect("the reader found it");
        if !matches!(tensor.dtype, DType::F32 | DType::Bf16 | DType::F16) {
            return Err(ConvertError::Elements { name, dtype: tensor.dtype.name() });
        }
        let dims = tensor.shape.iter().map(|&size| size as u64).collect();
        tensors.push(SourceTensor { name, dtype: tensor.dtype, dims });
    }
    Ok(tensors)
}

/// The encoding that holds every matrix of the source as it is.
fn automatic(tensors: &[SourceTensor]) -> Result<Encoding, ConvertError> {
    let matrices = tensors.iter().filter(|tensor| tensor.dims.len() > 1);
    let mut dtypes: Vec<DType> = matrices.map(|tensor| tensor.dtype).collect();
    dtypes.dedup();
    let dtype = match dtypes[..] {
        [only] => only,
        _ => DType::F32,
    };
    let named = Encoding::ALL.into_iter().find(|encoding| encoding.name() == dtype.name());
    named.ok_or(ConvertError::NoAutomatic { dtype: dtype.name() })
}

/// Names of the files that go into the pack, ascending.
fn file_names(folder: &Path) -> Result<Vec<String>, ConvertError> {
    let mut names = Vec::new();
    for name in list(folder)? {
        let is_file = folder.join(&name).is_file();
        if is_file && (FILES.contains(&name.as_str()) || license::is_terms(&name)) {
            names.push(name);
        }
    }
    let templates = folder.join(TEMPLATES);
    if templates.is_dir() {
        let jinja = list(&templates)?.into_iter().filter(|name| name.ends_with(".jinja"));
        names.extend(jinja.map(|name| format!("{TEMPLATES}/{name}")));
    }
    names.sort();
    Ok(names)
}

fn list(folder: &Path) -> Result<Vec<String>, ConvertError> {
    let entries = fs::read_dir(folder).map_err(FileError::on("list", folder))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(FileError::on("list", folder))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.retain(|name| !atomic::is_temporary(name));
    Ok(names)
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, ConvertError> {
    let bytes = fs::metadata(path).map_err(FileError::on("read the size of", path))?.len();
    if bytes > FILE_BYTES_MAX {
        let (path, max) = (path.to_owned(), FILE_BYTES_MAX);
        return Err(ConvertError::FileTooLarge { path, bytes, max });
    }
    Ok(fs::read(path).map_err(FileError::on("read", path))?)
}

/// What the pack is made from: tensors, and every file with its hash.
fn source(
    job: PackJob<'_>,
    reader: &WeightReader<'_>,
    names: &[String],
) -> Result<Source, ConvertError> {
    let mut all: Vec<String> = names.to_vec();
    for file in job.weights.files() {
        let name = file.path().file_name().and_then(|name| name.to_str());
        all.extend(name.map(str::to_owned));
    }
    if job.weights.files().len() > 1 {
        all.push(INDEX_FILE.to_owned());
    }
    all.sort();
    let mut files = Vec::new();
    for name in all {
        let path = job.folder.join(&name);
        let bytes = fs::metadata(&path).map_err(FileError::on("read the size of", &path))?.len();
        files.push(SourceFile { name, bytes, hash: Hash::of_file(&path)? });
    }
    let tensors = source_tensors(job.weights, reader)?;
    let used: std::collections::BTreeSet<String> = reader.tensors().into_iter().collect();
    let unused = job.weights.tensors().filter(|tensor| !used.contains(tensor.name));
    let left_out = unused.map(|tensor| tensor.name.to_owned()).collect();
    Ok(Source { format: "safetensors".to_owned(), tensors, left_out, files })
}

/// What the folder's manifest says of how the model came about.
fn lineage(folder: &Path) -> Result<Option<Lineage>, ConvertError> {
    if !folder.join(MANIFEST_FILE).exists() {
        return Ok(None);
    }
    let manifest = read_manifest(folder)?;
    let (recipe_hash, data_hash) = (manifest.recipe_hash, manifest.data_hash);
    Ok(Some(Lineage { step: manifest.step, recipe_hash, data_hash }))
}
