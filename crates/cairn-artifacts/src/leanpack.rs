//! leanpack/1: one model in one file, in the order in which kernels read it.
//!
//! `docs/leanpack.md` specifies the format for whoever writes another reader. In short: a preamble
//! of fixed size, a header as canonical JSON, zeros up to a multiple of 2 MiB, then the weights and
//! the model's small files, each cut into chunks of 1 MiB whose hashes are in the header.
//!
//! **Invariants.** The hash in the preamble decides every byte of the file: it covers the header,
//! which holds the hashes of all chunks, and what lies between is zero. Nothing in a pack depends
//! on the time, the path or the number of threads. What is read from a pack is copied, or mapped while
//! nobody can change it ([`crate::lease`]): a file that shrinks or changes under a reader is an error,
//! not a signal.

mod assignment;
mod error;
mod header;
mod preamble;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use assignment::{AssignedClass, Assignment};
pub use error::{PackError, PackErrorKind};
pub use header::{
    FileEntry, Header, License, Lineage, Plan, PlannedBytes, Profile, Source, SourceFile,
    SourceTensor, TensorEntry, stored_bytes,
};
pub use preamble::Preamble;
pub use read::PackFile;
pub use write::{Contents, OutWeight, WrittenPack, file_bytes, write};

/// The first bytes of every pack.
pub const MAGIC: [u8; 8] = *b"LEANPACK";
/// The version of the format that this crate reads and writes.
pub const VERSION: u32 = 1;
/// The schema that the header names.
pub const SCHEMA: &str = "leanpack/1";
/// Bytes before the header.
pub const PREAMBLE_BYTES: usize = 128;
/// Longest accepted header, in bytes: room for the hashes of about 1 TB.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// The data begins at a multiple of this.
pub const DATA_ALIGNMENT: u64 = 2 << 20;
/// Each tensor and file begins at a multiple of this within the data.
pub const BLOB_ALIGNMENT: u64 = 64;
/// Bytes under one hash; the last chunk of a tensor or file may be shorter.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Rows that a panel interleaves.
pub const PANEL_WIDTH: u64 = 16;
/// Most tensors of a pack.
pub const TENSORS_MAX: usize = 1 << 20;
/// Most small files of a pack.
pub const FILES_MAX: usize = 64;
/// Largest small file, in bytes.
pub const FILE_BYTES_MAX: u64 = 256 << 20;
/// Longest name of a tensor or a file, in bytes.
pub const NAME_BYTES_MAX: usize = 512;
/// The numeric policies that a reader may be asked for.
pub const POLICIES: [&str; 1] = ["f32/1"];
/// Element encodings of leanpack/1.
pub const ENCODINGS: [&str; 9] = ["f32", "bf16", "bf16z", "f16", "q8", "q4", "nf4", "fp8", "fp4"];
/// Layouts of leanpack/1.
pub const LAYOUTS: [&str; 2] = ["row_major", "panel"];
/// Kinds of machine profile of leanpack/1.
pub const PROFILES: [&str; 2] = ["portable", "host"];
