//! Writing a pack: one tensor at a time, and the header when all hashes are known.

use super::header::{FileEntry, Header, TensorEntry, align, hash_of_hashes, stored_bytes};
use super::preamble::{Preamble, data_start};
use super::{
    Assignment, CHUNK_BYTES, DATA_ALIGNMENT, HEADER_BYTES_MAX, License, Lineage, PackError,
    PackErrorKind, Plan, Profile, SCHEMA, Source, TENSORS_MAX,
};
use crate::atomic;
use crate::hash::{Hash, Hasher};
use cairn_spec::ModelSpec;
use std::io::{self, Read as _, Seek, SeekFrom, Write};
use std::path::Path;

/// A weight to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutWeight {
    /// Its name in the program.
    pub name: String,
    /// Rows and columns, or the length of a vector.
    pub dims: Vec<u64>,
    /// One of [`ENCODINGS`](super::ENCODINGS).
    pub encoding: String,
    /// One of [`LAYOUTS`](super::LAYOUTS).
    pub layout: String,
}

/// What goes into a pack besides the weights' bytes.
#[derive(Clone, Debug)]
pub struct Contents {
    /// What the model computes.
    pub spec: ModelSpec,
    /// The order of every sum, by name.
    pub policy: String,
    /// What the layout is made for.
    pub profile: Profile,
    /// How the model is planned to be run.
    pub plan: Option<Plan>,
    /// The weights, in the order of their bytes.
    pub weights: Vec<OutWeight>,
    /// Small files by name.
    pub files: Vec<(String, Vec<u8>)>,
    /// What it is made from.
    pub source: Source,
    /// On what terms it may be used.
    pub license: License,
    /// How the model came about.
    pub lineage: Option<Lineage>,
    /// How the encodings were chosen, where the file's bytes were limited.
    pub assignment: Option<Assignment>,
}

/// What came of writing a pack.
#[derive(Clone, Debug, PartialEq)]
pub struct WrittenPack {
    /// Size of the file.
    pub bytes: u64,
    /// Its header.
    pub header: Header,
    /// The hash of its header, which decides every byte.
    pub hash: Hash,
}

/// The size of the file that [`write()`] makes of such contents; `path` is only told in errors.
///
/// # Errors
///
/// [`PackError::Unsound`] if the contents would not make a sound pack.
pub fn file_bytes(path: &Path, contents: &Contents) -> Result<u64, PackError> {
    let (header, _) = draft(contents.clone()).map_err(PackError::on(path))?;
    let ends = |(offset, bytes): (u64, u64)| offset + bytes;
    let tensors = header.tensors.iter().map(|tensor| ends((tensor.offset, tensor.bytes)));
    let files = header.files.iter().map(|file| ends((file.offset, file.bytes)));
    let end = tensors.chain(files).max().unwrap_or(0);
    Ok(data_start(header.to_json().len() as u64) + end)
}

/// Writes a pack under `path`, which appears complete or not at all. `fill` writes the bytes of the
/// weight of that index, exactly as many as its form says, and returns whether every value is the
/// source's.
///
/// # Errors
///
/// [`PackError::Unsound`] if the contents would not make a sound pack, before `fill` is asked for
/// anything; [`PackError::File`] if writing fails, `fill` included (a full disk, a tensor that
/// writes another number of bytes).
pub fn write(
    path: &Path,
    contents: Contents,
    fill: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<bool>,
) -> Result<WrittenPack, PackError> {
    let unsound = PackError::on(path);
    let (mut header, files) = draft(contents).map_err(&unsound)?;
    // Hashes have one length and no flag is longer than `false`, so the draft is as long as the
    // header can become.
    let draft_bytes = header.to_json().len() as u64;
    if draft_bytes > HEADER_BYTES_MAX {
        return Err(unsound(PackErrorKind::HeaderTooLong { bytes: draft_bytes }));
    }
    let start = data_start(draft_bytes);
    let mut found = None;
    let written = atomic::write(path, |out| {
        out.seek(SeekFrom::Start(start))?;
        let mut blocks = BlockWriter { out, block: Vec::new() };
        let end = write_data(&mut blocks, &mut header, &files, fill)?;
        blocks.flush()?;
        let json = header.to_json();
        let preamble = Preamble {
            header_bytes: json.len() as u64,
            data_start: start,
            file_bytes: start + end,
            header_hash: Hash::of_bytes(&json),
        };
        let preamble_bytes = preamble.to_bytes();
        // What was written is read back as a reader would, before it gets its name.
        let parsed = Header::parse(&json, end).and_then(|_| Preamble::parse(&preamble_bytes));
        parsed.map_err(|kind| {
            let error = io::Error::other(kind.to_string());
            found = Some(kind);
            error
        })?;
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&preamble_bytes)?;
        out.write_all(&json)?;
        if end == 0 {
            out.flush()?;
            out.get_ref().set_len(start)?;
        }
        Ok(preamble)
    });
    if let Some(kind) = found {
        return Err(unsound(kind));
    }
    let written = written?;
    Ok(WrittenPack { bytes: written.file_bytes, header, hash: written.header_hash })
}

/// The header with hashes that are not known yet; everything else about it is sound.
fn draft(contents: Contents) -> Result<(Header, Vec<Vec<u8>>), PackErrorKind> {
    let unknown = Hash::from_bytes([0; 32]);
    let chunks =
        |bytes: u64| vec![unknown; usize::try_from(bytes).unwrap_or(0).div_ceil(CHUNK_BYTES)];
    let (mut next, mut end) = (0, 0);
    let mut place = |bytes: u64| {
        let offset = next;
        end = u64::saturating_add(offset, bytes);
        next = align(end);
        offset
    };
    let count = contents.weights.len();
    if count > TENSORS_MAX {
        return Err(PackErrorKind::TooMany { what: "tensors", found: count, max: TENSORS_MAX });
    }
    let mut tensors = Vec::with_capacity(count);
    for OutWeight { name, dims, encoding, layout } in contents.weights {
        // A form that there is none of is found below, by its name.
        let bytes = stored_bytes(&encoding, &layout, &dims).unwrap_or(0);
        let (offset, chunks) = (place(bytes), chunks(bytes));
        let hash = unknown;
        let exact = false;
        tensors.push(TensorEntry {
            name,
            dims,
            encoding,
            layout,
            exact,
            offset,
            bytes,
            hash,
            chunks,
        });
    }
    let mut files = Vec::new();
    let mut entries = Vec::new();
    for (name, contents) in contents.files {
        let bytes = contents.len() as u64;
        let (offset, chunks) = (place(bytes), chunks(bytes));
        entries.push(FileEntry { name, offset, bytes, hash: unknown, chunks });
        files.push(contents);
    }
    let header = Header {
        schema: SCHEMA.to_owned(),
        spec: contents.spec,
        policy: contents.policy,
        profile: contents.profile,
        plan: contents.plan,
        tensors,
        files: entries,
        source: contents.source,
        license: contents.license,
        lineage: contents.lineage,
        assignment: contents.assignment,
        root: unknown,
    };
    header.check_form(end)?;
    Ok((header, files))
}

/// Writes tensors and files and completes the header; returns the bytes of data.
fn write_data(
    out: &mut dyn Write,
    header: &mut Header,
    files: &[Vec<u8>],
    fill: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<bool>,
) -> io::Result<u64> {
    let mut at = 0;
    for (index, tensor) in header.tensors.iter_mut().enumerate() {
        pad(out, tensor.offset - at)?;
        let mut writer = ChunkWriter::new(out);
        tensor.exact = fill(index, &mut writer)?;
        let (bytes, chunks) = writer.finish();
        if bytes != tensor.bytes {
            let message = format!("{} wrote {bytes} of {} bytes", tensor.name, tensor.bytes);
            return Err(invalid(message));
        }
        tensor.hash = hash_of_hashes(chunks.iter());
        tensor.chunks = chunks;
        at = tensor.offset + bytes;
    }
    for (file, contents) in header.files.iter_mut().zip(files) {
        pad(out, file.offset - at)?;
        let mut writer = ChunkWriter::new(out);
        writer.write_all(contents)?;
        let (bytes, chunks) = writer.finish();
        file.hash = hash_of_hashes(chunks.iter());
        file.chunks = chunks;
        at = file.offset + bytes;
    }
    header.root = header.root_of_entries();
    Ok(at)
}

fn pad(out: &mut dyn Write, bytes: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(bytes), &mut &mut *out).map(|_| ())
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Passes on whole blocks of [`DATA_ALIGNMENT`], from an aligned place in the file on: what the system
/// gets so it keeps in huge pages, and those it can map as such.
struct BlockWriter<'a, W: Write> {
    out: &'a mut W,
    block: Vec<u8>,
}

impl<W: Write> Write for BlockWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let block_bytes = usize::try_from(DATA_ALIGNMENT).unwrap_or(usize::MAX);
        let written = bytes.len().min(block_bytes - self.block.len());
        self.block.extend_from_slice(&bytes[..written]);
        if self.block.len() == block_bytes {
            self.out.write_all(&self.block)?;
            self.block.clear();
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.block)?;
        self.block.clear();
        self.out.flush()
    }
}

/// Hashes what passes through, chunk by chunk.
struct ChunkWriter<'a> {
    out: &'a mut dyn Write,
    hasher: Hasher,
    in_chunk: usize,
    bytes: u64,
    chunks: Vec<Hash>,
}

impl<'a> ChunkWriter<'a> {
    fn new(out: &'a mut dyn Write) -> Self {
        Self { out, hasher: Hasher::new(), in_chunk: 0, bytes: 0, chunks: Vec::new() }
    }

    fn end_chunk(&mut self) {
        self.chunks.push(self.hasher.finish());
        self.hasher = Hasher::new();
        self.in_chunk = 0;
    }

    fn finish(mut self) -> (u64, Vec<Hash>) {
        if self.in_chunk > 0 {
            self.end_chunk();
        }
        (self.bytes, self.chunks)
    }
}

impl Write for ChunkWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK_BYTES - self.in_chunk;
        let written = self.out.write(&bytes[..bytes.len().min(room)])?;
        self.hasher.update(&bytes[..written]);
        self.in_chunk += written;
        self.bytes += written as u64;
        if self.in_chunk == CHUNK_BYTES {
            self.end_chunk();
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
