//! What general compressors make of the same text: the yardstick beside the model.
//!
//! `gzip -9`, `xz -9` and `zstd -19` through their libraries, whole files with headers and
//! checksums as the commands write them (without a file name). Differences from the commands: the
//! deflate encoder is not GNU's (its files were within 0.4 % on source text), and zstd leaves out
//! its optional 4-byte checksum.
//!
//! Memory is bounded: gzip and zstd need a few MiB, xz about ten times its dictionary, which is
//! never larger than the text it is told of (the result is the same, only the memory is not).

use std::fmt;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};

/// The dictionary of `xz -9`.
const XZ_DICTIONARY_MAX: u64 = 64 << 20;
/// The smallest dictionary that xz allows.
const XZ_DICTIONARY_MIN: u64 = 4 << 10;

/// A general compressor at its usual strongest setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Compressor {
    /// `gzip -9`.
    #[serde(rename = "gzip -9")]
    Gzip9,
    /// `xz -9`.
    #[serde(rename = "xz -9")]
    Xz9,
    /// `zstd -19`.
    #[serde(rename = "zstd -19")]
    Zstd19,
}

impl Compressor {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gzip9, Self::Xz9, Self::Zstd19];

    /// The command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip9 => "gzip -9",
            Self::Xz9 => "xz -9",
            Self::Zstd19 => "zstd -19",
        }
    }

    /// Bytes of `parts`, one after the other, as one compressed file.
    ///
    /// # Errors
    ///
    /// The library's error; memory is the usual reason.
    pub fn compressed_bytes<'a>(
        self,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> io::Result<u64> {
        let total: u64 = parts.clone().map(|part| part.len() as u64).sum();
        let sink = ByteCount(0);
        match self {
            Self::Gzip9 => {
                let level = flate2::Compression::new(9);
                let mut encoder = flate2::write::GzEncoder::new(sink, level);
                parts.clone().try_for_each(|part| encoder.write_all(part))?;
                Ok(encoder.finish()?.0)
            }
            Self::Xz9 => {
                let mut encoder = liblzma::write::XzEncoder::new_stream(sink, xz_stream(total)?);
                parts.clone().try_for_each(|part| encoder.write_all(part))?;
                Ok(encoder.finish()?.0)
            }
            Self::Zstd19 => {
                let mut encoder = zstd::stream::write::Encoder::new(sink, 19)?;
                encoder.set_pledged_src_size(Some(total))?;
                parts.clone().try_for_each(|part| encoder.write_all(part))?;
                Ok(encoder.finish()?.0)
            }
        }
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `xz -9` for a text of `total` bytes.
fn xz_stream(total: u64) -> io::Result<liblzma::stream::Stream> {
    let dictionary = total.next_power_of_two().clamp(XZ_DICTIONARY_MIN, XZ_DICTIONARY_MAX);
    let mut options = liblzma::stream::LzmaOptions::new_preset(9)?;
    options.dict_size(u32::try_from(dictionary).expect("at most 64 MiB"));
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&options);
    Ok(liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc64)?)
}

/// Counts what is written to it.
#[derive(Debug)]
struct ByteCount(u64);

impl Write for ByteCount {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
