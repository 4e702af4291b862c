//! Reading a pack: by copies, at offsets, from several threads at once; or mapped.

use super::header::Header;
use super::{
    CHUNK_BYTES, FileEntry, PREAMBLE_BYTES, PackError, PackErrorKind, Preamble, TensorEntry,
};
use crate::FileError;
use crate::file_error::open_regular;
use crate::hash::Hash;
use crate::lease::{LeaseError, LeasedFile, Stamp};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An opened pack: its header is sound, its data is read when asked for.
///
/// Whatever happens to the file, a read gives the bytes that are there or an error; a file that is
/// replaced under its name stays readable here as it was. Only [`map_weights`](PackFile::map_weights)
/// maps, where nobody can change the file meanwhile.
#[derive(Debug)]
pub struct PackFile {
    path: PathBuf,
    file: File,
    preamble: Preamble,
    header: Header,
    by_name: BTreeMap<String, usize>,
    /// What the file was before its header was read.
    stamp: Stamp,
}

/// One part of a pack while it is read: a chunked run of bytes.
#[derive(Clone, Copy)]
struct Part<'a> {
    name: &'a str,
    offset: u64,
    bytes: u64,
    chunks: &'a [Hash],
}

impl PackFile {
    /// Opens a pack and checks its size, its preamble, its header, and that what lies between the
    /// header and the data is zero.
    ///
    /// Memory: the header, which is at most [`HEADER_BYTES_MAX`](super::HEADER_BYTES_MAX) and at most
    /// as long as the file, and its values, at most 32 times as much.
    ///
    /// # Errors
    ///
    /// [`PackError::File`] if the system refuses, [`PackError::Unsound`] naming what is wrong.
    pub fn open(path: &Path) -> Result<Self, PackError> {
        let unsound = PackError::on(path);
        let (file, actual) = open_regular(path)?;
        let stamp = Stamp::of(&file).map_err(FileError::on("read the size of", path))?;
        let mut start = [0; PREAMBLE_BYTES];
        let length = PREAMBLE_BYTES.min(usize::try_from(actual).unwrap_or(PREAMBLE_BYTES));
        file.read_exact_at(&mut start[..length], 0).map_err(FileError::on("read", path))?;
        let preamble = Preamble::parse(&start[..length]).map_err(&unsound)?;
        if preamble.file_bytes != actual {
            let expected = preamble.file_bytes;
            return Err(unsound(PackErrorKind::Length { expected, actual }));
        }
        let mut pack = Self {
            header: read_header(&file, &preamble, path)?,
            path: path.to_owned(),
            file,
            preamble,
            by_name: BTreeMap::new(),
            stamp,
        };
        let names = pack.header.tensors.iter().enumerate();
        pack.by_name = names.map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        let end = PREAMBLE_BYTES as u64 + preamble.header_bytes;
        pack.check_zeros("the header", end..preamble.data_start)?;
        Ok(pack)
    }

    /// Whether the file at `path` begins as packs do. What cannot be read does not.
    pub fn is_pack(path: &Path) -> bool {
        let mut start = [0; super::MAGIC.len()];
        let read = |file: File| file.read_exact_at(&mut start, 0);
        path.is_file() && File::open(path).and_then(read).is_ok() && start == super::MAGIC
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the pack says about itself.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Where everything is.
    pub const fn preamble(&self) -> &Preamble {
        &self.preamble
    }

    /// The weight of this name, or `None`.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name.get(name).map(|&index| &self.header.tensors[index])
    }

    /// The small file of this name, or `None`.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.header.files.iter().find(|file| file.name == name)
    }

    /// Reads bytes of a tensor from `first` on, unchecked.
    ///
    /// # Errors
    ///
    /// [`PackErrorKind::CutShort`] if the file ends before, [`PackError::File`] if it cannot be read.
    ///
    /// # Panics
    ///
    /// Panics if the bytes lie outside of the tensor.
    pub fn read_at(
        &self,
        tensor: &TensorEntry,
        first: u64,
        out: &mut [u8],
    ) -> Result<(), PackError> {
        self.read_part(Part::of_tensor(tensor), first, out)
    }

    /// Reads whole chunks of a tensor from `first` on, a multiple of the chunk's size, and compares
    /// each with its hash.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at); [`PackErrorKind::Altered`] names tensor and chunk.
    ///
    /// # Panics
    ///
    /// Panics if the bytes lie outside of the tensor or do not end with a chunk.
    pub fn read_checked_at(
        &self,
        tensor: &TensorEntry,
        first: u64,
        out: &mut [u8],
    ) -> Result<(), PackError> {
        self.read_checked_part(Part::of_tensor(tensor), first, out)
    }

    /// Maps the weights, from where the data begins to the end of the last tensor, as long as the
    /// system holds back whoever wants to change the file.
    ///
    /// # Errors
    ///
    /// [`LeaseError::Changed`] if the header may be another file's by now; any other [`LeaseError`] says
    /// why they can be read by copies only.
    pub fn map_weights(&self) -> Result<LeasedFile, LeaseError> {
        let end = self.header.tensors.last().map_or(0, |tensor| tensor.offset + tensor.bytes);
        let bytes = usize::try_from(end).map_err(|_| LeaseError::CutShort(end))?;
        let mapped = LeasedFile::map(&self.file, self.preamble.data_start, bytes)?;
        // From here on nobody changes it; whoever did between the header and now is seen.
        if mapped.stamp().has_contents_of(&self.stamp) {
            return Ok(mapped);
        }
        Err(LeaseError::Changed)
    }

    /// Checks, after parts were read, that they are of the file whose header was read.
    ///
    /// # Errors
    ///
    /// [`PackError::File`] if it was changed meanwhile.
    pub fn check_unchanged(&self) -> Result<(), PackError> {
        let now = Stamp::of(&self.file).map_err(FileError::on("read the size of", &self.path))?;
        if now.has_contents_of(&self.stamp) {
            return Ok(());
        }
        let what = "it was changed since it was opened";
        let source = io::Error::new(io::ErrorKind::InvalidData, what);
        Err(FileError { action: "read", path: self.path.clone(), source }.into())
    }

    /// Compares a chunk of a tensor with its hash; `data` is what [`map_weights`](Self::map_weights)
    /// mapped.
    ///
    /// # Errors
    ///
    /// [`PackErrorKind::Altered`] names tensor and chunk.
    ///
    /// # Panics
    ///
    /// Panics if the tensor has no such chunk or `data` ends before it.
    pub fn check_chunk(
        &self,
        tensor: &TensorEntry,
        chunk: usize,
        data: &[u8],
    ) -> Result<(), PackError> {
        let index = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let first = (chunk as u64) * CHUNK_BYTES as u64;
        let end = tensor.bytes.min(first + CHUNK_BYTES as u64);
        let bytes = &data[index(tensor.offset + first)..index(tensor.offset + end)];
        self.check_hash(Part::of_tensor(tensor), chunk, bytes)
    }

    /// Reads a small file and compares it with its hashes; `None` if there is none of this name.
    ///
    /// # Errors
    ///
    /// As [`read_checked_at`](Self::read_checked_at).
    pub fn read_file(&self, name: &str) -> Result<Option<Vec<u8>>, PackError> {
        let Some(file) = self.file(name) else { return Ok(None) };
        let bytes = usize::try_from(file.bytes).unwrap_or(usize::MAX);
        let mut contents = vec![0; bytes];
        self.read_checked_part(Part::of_file(file), 0, &mut contents)?;
        Ok(Some(contents))
    }

    /// Reads everything and compares it with its hashes, padding included; `progress` is told bytes
    /// done and bytes in all.
    ///
    /// # Errors
    ///
    /// As [`read_checked_at`](Self::read_checked_at), for the first part that was altered;
    /// [`PackErrorKind::Padding`] where bytes between parts are not zero.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), PackError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let total = self.preamble.file_bytes - self.preamble.data_start;
        for part in self.parts() {
            for first in (0..part.bytes).step_by(CHUNK_BYTES) {
                let rest = usize::try_from(part.bytes - first).unwrap_or(usize::MAX);
                let chunk = &mut buffer[..CHUNK_BYTES.min(rest)];
                self.read_checked_part(part, first, chunk)?;
                progress(part.offset + first + chunk.len() as u64, total);
            }
        }
        self.verify_padding()
    }

    /// Checks that the bytes between tensors and files are zero.
    ///
    /// # Errors
    ///
    /// [`PackErrorKind::Padding`] where they are not.
    pub fn verify_padding(&self) -> Result<(), PackError> {
        let parts: Vec<Part<'_>> = self.parts().collect();
        for pair in parts.windows(2) {
            let start = self.preamble.data_start;
            let end = start + pair[0].offset + pair[0].bytes;
            self.check_zeros(pair[0].name, end..start + pair[1].offset)?;
        }
        Ok(())
    }

    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let tensors = self.header.tensors.iter().map(Part::of_tensor);
        tensors.chain(self.header.files.iter().map(Part::of_file))
    }

    fn read_part(&self, part: Part<'_>, first: u64, out: &mut [u8]) -> Result<(), PackError> {
        let end = first + out.len() as u64;
        assert!(end <= part.bytes, "bytes {first} to {end} of {}", part.name);
        let at = self.preamble.data_start + part.offset + first;
        self.file.read_exact_at(out, at).map_err(|source| self.failed(part.name, source))
    }

    fn read_checked_part(
        &self,
        part: Part<'_>,
        first: u64,
        out: &mut [u8],
    ) -> Result<(), PackError> {
        assert!(first.is_multiple_of(CHUNK_BYTES as u64), "chunks of {}", part.name);
        let end = first + out.len() as u64;
        assert!(end.is_multiple_of(CHUNK_BYTES as u64) || end == part.bytes, "chunks");
        let chunks = out.chunks_mut(CHUNK_BYTES);
        for (at, chunk) in (first..).step_by(CHUNK_BYTES).zip(chunks) {
            self.read_part(part, at, chunk)?;
            let index = usize::try_from(at / CHUNK_BYTES as u64).unwrap_or(usize::MAX);
            self.check_hash(part, index, chunk)?;
        }
        Ok(())
    }

    fn check_hash(&self, part: Part<'_>, index: usize, chunk: &[u8]) -> Result<(), PackError> {
        let (expected, actual) = (part.chunks[index], Hash::of_bytes(chunk));
        if expected == actual {
            return Ok(());
        }
        let part = format!("{} (MiB {index})", part.name);
        Err(PackError::on(&self.path)(PackErrorKind::Altered { part, expected, actual }))
    }

    fn check_zeros(&self, part: &str, range: std::ops::Range<u64>) -> Result<(), PackError> {
        let mut buffer = vec![0; 1 << 16];
        let mut at = range.start;
        while at < range.end {
            let length = buffer.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
            let bytes = &mut buffer[..length];
            self.file.read_exact_at(bytes, at).map_err(|source| self.failed(part, source))?;
            if let Some(place) = bytes.iter().position(|&byte| byte != 0) {
                let (part, found) = (part.to_owned(), bytes[place]);
                let kind = PackErrorKind::Padding { part, at: at + place as u64, found };
                return Err(PackError::on(&self.path)(kind));
            }
            at += length as u64;
        }
        Ok(())
    }

    fn failed(&self, part: &str, source: io::Error) -> PackError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return PackError::on(&self.path)(PackErrorKind::CutShort { part: part.to_owned() });
        }
        FileError { action: "read", path: self.path.clone(), source }.into()
    }
}

impl<'a> Part<'a> {
    fn of_tensor(tensor: &'a TensorEntry) -> Self {
        let TensorEntry { name, offset, bytes, chunks, .. } = tensor;
        Self { name, offset: *offset, bytes: *bytes, chunks }
    }

    fn of_file(file: &'a FileEntry) -> Self {
        let FileEntry { name, offset, bytes, chunks, .. } = file;
        Self { name, offset: *offset, bytes: *bytes, chunks }
    }
}

/// Reads the header. The file is known to be as long as the preamble says, so the header's length is
/// within it.
fn read_header(file: &File, preamble: &Preamble, path: &Path) -> Result<Header, PackError> {
    let unsound = PackError::on(path);
    let mut json = vec![0; usize::try_from(preamble.header_bytes).unwrap_or(usize::MAX)];
    let read = file.read_exact_at(&mut json, PREAMBLE_BYTES as u64);
    read.map_err(FileError::on("read", path))?;
    let (expected, actual) = (preamble.header_hash, Hash::of_bytes(&json));
    if expected != actual {
        let part = "the header".to_owned();
        return Err(unsound(PackErrorKind::Altered { part, expected, actual }));
    }
    Header::parse(&json, preamble.file_bytes - preamble.data_start).map_err(unsound)
}
