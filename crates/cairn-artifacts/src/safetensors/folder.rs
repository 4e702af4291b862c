//! The weights of a model folder: one `model.safetensors`, or shards with an index.

use super::error::TensorMismatch;
use super::{HEADER_BYTES_MAX, SafetensorsFile, TensorView, WeightsError};
use crate::FileError;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// Name of the only file of weights.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of the list of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Most files an index may name.
pub const SHARDS_MAX: usize = 4096;

/// The mapped weights of a model folder. How they are cut into files makes no difference.
#[derive(Clone, Debug)]
pub struct WeightFolder {
    folder: PathBuf,
    files: Vec<SafetensorsFile>,
    /// The position in `files` of each tensor's file.
    file_of: BTreeMap<String, usize>,
}

impl WeightFolder {
    /// Maps the weights of `folder` and checks headers and index; tensor bytes are not touched.
    ///
    /// `model.safetensors` wins over an index, as in transformers.
    ///
    /// # Errors
    ///
    /// [`WeightsError`] naming the file, or the tensors that index and files disagree about.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        let single = folder.join(SINGLE_FILE);
        if single.exists() {
            return Ok(Self::of_files(folder, vec![SafetensorsFile::open(&single)?]));
        }
        let index = folder.join(INDEX_FILE);
        if !index.exists() {
            return Err(WeightsError::NoWeights {
                folder: folder.to_owned(),
                single: SINGLE_FILE,
                index: INDEX_FILE,
            });
        }
        open_sharded(folder, &index)
    }

    /// Maps the one file of this name, whatever else lies in `folder`.
    ///
    /// # Errors
    ///
    /// [`WeightsError`] naming the file.
    pub fn open_file(folder: &Path, name: &str) -> Result<Self, WeightsError> {
        Ok(Self::of_files(folder, vec![SafetensorsFile::open(&folder.join(name))?]))
    }

    fn of_files(folder: &Path, files: Vec<SafetensorsFile>) -> Self {
        let mut file_of = BTreeMap::new();
        for (position, file) in files.iter().enumerate() {
            for tensor in file.tensors() {
                file_of.insert(tensor.name.to_owned(), position);
            }
        }
        Self { folder: folder.to_owned(), files, file_of }
    }

    /// The tensor of this name, or `None`.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.files[*self.file_of.get(name)?].tensor(name)
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.file_of.iter().filter_map(|(name, &file)| self.files[file].tensor(name))
    }

    /// The file that holds the tensor of this name, for readers that keep offsets.
    pub fn file_of(&self, name: &str) -> Option<&SafetensorsFile> {
        self.file_of.get(name).map(|&position| &self.files[position])
    }

    /// The mapped files.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.bytes.len()).sum()
    }

    /// Checks that there are exactly the tensors of `expected`, each of its shape. Names that
    /// `ignore` accepts may be there or not.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Mismatch`] listing every tensor that is missing, extra or misshaped.
    pub fn check<'a>(
        &self,
        expected: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        ignore: impl Fn(&str) -> bool,
    ) -> Result<(), WeightsError> {
        let mut mismatch = TensorMismatch::default();
        let mut known = BTreeSet::new();
        for (name, shape) in expected {
            known.insert(name);
            match self.tensor(name) {
                None => mismatch.missing.push(name.to_owned()),
                Some(tensor) if tensor.shape != shape => {
                    let shapes = (name.to_owned(), shape.to_vec(), tensor.shape.to_vec());
                    mismatch.misshaped.push(shapes);
                }
                Some(_) => {}
            }
        }
        let names = self.file_of.keys();
        let extra = names.filter(|name| !known.contains(name.as_str()) && !ignore(name));
        mismatch.extra = extra.cloned().collect();
        refuse(&self.folder, mismatch)
    }
}

fn refuse(folder: &Path, mismatch: TensorMismatch) -> Result<(), WeightsError> {
    if mismatch.is_empty() {
        return Ok(());
    }
    Err(WeightsError::Mismatch { folder: folder.to_owned(), mismatch })
}

fn open_sharded(folder: &Path, index_path: &Path) -> Result<WeightFolder, WeightsError> {
    let index = read_index(index_path)?;
    let names: BTreeSet<&str> = index.weight_map.0.iter().map(|(_, file)| file.as_str()).collect();
    if names.len() > SHARDS_MAX {
        return Err(WeightsError::TooManyShards { path: index_path.to_owned(), max: SHARDS_MAX });
    }
    for name in &names {
        let mut components = Path::new(name).components();
        let is_plain = matches!(components.next(), Some(Component::Normal(only)) if only == *name);
        if !is_plain || components.next().is_some() {
            return Err(WeightsError::OutsideFolder {
                path: index_path.to_owned(),
                file: (*name).to_owned(),
            });
        }
    }
    let files = names.iter().map(|name| SafetensorsFile::open(&folder.join(name)));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let shards: Vec<(&str, &SafetensorsFile)> = names.iter().copied().zip(&files).collect();
    refuse(folder, disagreement(&index.weight_map.0, &shards))?;
    Ok(WeightFolder::of_files(folder, files))
}

/// What the index promises and the shards do not keep, or the other way round.
fn disagreement(index: &[(String, String)], shards: &[(&str, &SafetensorsFile)]) -> TensorMismatch {
    let mut found: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (file_name, file) in shards {
        for tensor in file.header().tensors() {
            found.entry(&tensor.name).or_default().push((*file_name).to_owned());
        }
    }
    let mut mismatch = TensorMismatch::default();
    let mut promised = BTreeMap::new();
    for (name, file) in index {
        if let Some(before) = promised.insert(name.as_str(), file.as_str()) {
            mismatch.duplicate.push((name.clone(), vec![before.to_owned(), file.clone()]));
        }
    }
    for (name, file) in &promised {
        if !found.get(name).is_some_and(|files| files.iter().any(|found| found == file)) {
            mismatch.missing.push((*name).to_owned());
        }
    }
    for (name, files) in found {
        if files.len() > 1 {
            mismatch.duplicate.push((name.to_owned(), files));
        } else if !promised.contains_key(name) {
            mismatch.extra.push(name.to_owned());
        }
    }
    mismatch
}

#[derive(Deserialize)]
struct Index {
    weight_map: Pairs,
}

/// A JSON object of texts as pairs, so that a name given twice is seen.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that gives each tensor's file")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            if pairs.len() >= super::TENSORS_MAX {
                return Err(de::Error::custom("too many tensors"));
            }
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}

fn read_index(path: &Path) -> Result<Index, WeightsError> {
    let bytes = fs::metadata(path).map_err(FileError::on("read the size of", path))?.len();
    let malformed = |reason| WeightsError::MalformedIndex { path: path.to_owned(), reason };
    if bytes > HEADER_BYTES_MAX {
        return Err(malformed(format!("{bytes} bytes, at most {HEADER_BYTES_MAX} are accepted")));
    }
    let mut text = String::new();
    let file = File::open(path).map_err(FileError::on("open", path))?;
    file.take(HEADER_BYTES_MAX).read_to_string(&mut text).map_err(FileError::on("read", path))?;
    serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))
}
