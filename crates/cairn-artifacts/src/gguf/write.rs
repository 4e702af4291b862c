//! Writing a GGUF file: version 3, little endian, every tensor at a multiple of 32 bytes.
//!
//! The same values give the same bytes. `Q8_0` is rounded as ggml rounds weights
//! (`quantize_row_q8_0_ref`): the scale is the largest magnitude over 127, kept as a half; an element
//! is divided by the scale before it became a half, ties away from zero.

use super::{ALIGNMENT_DEFAULT, DIMS_MAX, Format, TensorType};
use crate::safetensors::f32_to_bf16;
use std::io::{self, Write};

/// Magic number and version.
const START: [u8; 8] = *b"GGUF\x03\0\0\0";
/// Elements of a block of `Q8_0`.
const Q8_BLOCK: usize = 32;

/// The value of a key to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum OutValue {
    /// A whole number.
    U32(u32),
    /// A number.
    F32(f32),
    /// A flag.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Whole numbers.
    I32s(Vec<i32>),
    /// Numbers.
    F32s(Vec<f32>),
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutTensor {
    /// Its name.
    pub name: String,
    /// Its dimensions, rows first.
    pub shape: Vec<usize>,
    /// How an element is written.
    pub format: Format,
}

impl OutTensor {
    /// Its bytes.
    pub fn bytes(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        elements / self.format.block_elements() * self.format.block_bytes()
    }
}

impl OutValue {
    /// Type numbers, and of a list the type of its elements.
    const fn types(&self) -> (u32, Option<u32>) {
        const LIST: u32 = 9;
        match self {
            Self::U32(_) => (4, None),
            Self::F32(_) => (6, None),
            Self::Bool(_) => (7, None),
            Self::Text(_) => (8, None),
            Self::Texts(_) => (LIST, Some(8)),
            Self::I32s(_) => (LIST, Some(5)),
            Self::F32s(_) => (LIST, Some(6)),
        }
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let (kind, element) = self.types();
        out.write_all(&kind.to_le_bytes())?;
        if let Some(element) = element {
            out.write_all(&element.to_le_bytes())?;
        }
        match self {
            Self::U32(value) => out.write_all(&value.to_le_bytes()),
            Self::F32(value) => out.write_all(&value.to_le_bytes()),
            Self::Bool(flag) => out.write_all(&[u8::from(*flag)]),
            Self::Text(text) => write_text(text, out),
            Self::Texts(texts) => {
                write_count(texts.len(), out)?;
                texts.iter().try_for_each(|text| write_text(text, out))
            }
            Self::I32s(values) => {
                write_count(values.len(), out)?;
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            }
            Self::F32s(values) => {
                write_count(values.len(), out)?;
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            }
        }
    }
}

/// Writes a whole file. `fill` writes the bytes of the tensor of that index, exactly as many as it
/// has.
///
/// # Errors
///
/// What writing or `fill` ran into; [`io::ErrorKind::InvalidInput`] naming a tensor that has no such
/// form or wrote another number of bytes.
pub fn write(
    out: &mut dyn Write,
    metadata: &[(String, OutValue)],
    tensors: &[OutTensor],
    fill: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut out = Counted { out, bytes: 0 };
    out.write_all(&START)?;
    write_count(tensors.len(), &mut out)?;
    write_count(metadata.len(), &mut out)?;
    for (key, value) in metadata {
        write_text(key, &mut out)?;
        value.write(&mut out)?;
    }
    let mut offset = 0;
    for tensor in tensors {
        write_entry(tensor, offset, &mut out)?;
        offset = (offset + tensor.bytes()).next_multiple_of(ALIGNMENT_DEFAULT);
    }
    out.pad()?;
    for (index, tensor) in tensors.iter().enumerate() {
        let before = out.bytes;
        fill(index, &mut out)?;
        let written = out.bytes - before;
        if written != tensor.bytes() {
            let OutTensor { name, .. } = tensor;
            return Err(invalid(format!("{name} wrote {written} of {} bytes", tensor.bytes())));
        }
        out.pad()?;
    }
    Ok(())
}

fn write_entry(tensor: &OutTensor, offset: usize, out: &mut dyn Write) -> io::Result<()> {
    let OutTensor { name, shape, format } = tensor;
    let columns = shape.last().copied().unwrap_or(0);
    if shape.len() > DIMS_MAX || !columns.is_multiple_of(format.block_elements()) || columns == 0 {
        return Err(invalid(format!("{name} {shape:?} cannot be {}", format.name())));
    }
    write_text(name, out)?;
    let dims = u32::try_from(shape.len()).map_err(io::Error::other)?;
    out.write_all(&dims.to_le_bytes())?;
    // Dimensions are listed from the innermost on.
    shape.iter().rev().try_for_each(|&size| write_count(size, out))?;
    out.write_all(&TensorType::of(*format).id().to_le_bytes())?;
    write_count(offset, out)
}

/// Appends rows of values in a format: whole blocks.
///
/// # Errors
///
/// [`io::ErrorKind::Unsupported`] for a format that is read only.
pub fn encode(format: Format, values: &[f32], bytes: &mut Vec<u8>) -> io::Result<()> {
    match format {
        Format::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Format::Bf16 => {
            bytes.extend(values.iter().flat_map(|&value| f32_to_bf16(value).to_le_bytes()));
        }
        Format::Q8_0 => values.chunks(Q8_BLOCK).for_each(|block| encode_q8_0(block, bytes)),
        Format::F16 | Format::Q4_0 | Format::Q4K | Format::Q5K | Format::Q6K => {
            let message = format!("{} is read, not written", format.name());
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
    }
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "a quotient by the largest is within ±127")]
fn encode_q8_0(block: &[f32], bytes: &mut Vec<u8>) {
    let largest = block.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    bytes.extend(f16_nearest(scale).to_le_bytes());
    bytes.extend(block.iter().map(|x| ((x * inverse).round() as i8).cast_unsigned()));
}

/// The bits of the nearest half to a number that is not negative, ties to even.
fn f16_nearest(value: f32) -> u16 {
    const INFINITE: u32 = 0x7c00;
    let bits = value.to_bits();
    let exponent = bits >> 23;
    let half = match exponent {
        // Below 2^-25 all is nearest to zero, and 2^-25 itself is even at zero.
        0..102 => 0,
        // Subnormal: units of 2^-24.
        102..113 => round_shift((bits & 0x007f_ffff) | 0x0080_0000, 126 - exponent),
        // Rounding may carry into the exponent, up to infinity.
        113..143 => round_shift(bits - (112 << 23), 13).min(INFINITE),
        255 if bits & 0x007f_ffff != 0 => 0x7e00,
        _ => INFINITE,
    };
    u16::try_from(half).unwrap_or(0x7c00)
}

/// Shifts right, to the nearest, ties to even.
fn round_shift(value: u32, by: u32) -> u32 {
    let half = 1 << (by - 1);
    let kept = value >> by;
    let rest = value & ((1 << by) - 1);
    kept + u32::from(rest > half || (rest == half && kept & 1 == 1))
}

fn write_count(count: usize, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&(count as u64).to_le_bytes())
}

fn write_text(text: &str, out: &mut dyn Write) -> io::Result<()> {
    write_count(text.len(), out)?;
    out.write_all(text.as_bytes())
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Knows how many bytes have passed.
struct Counted<'a> {
    out: &'a mut dyn Write,
    bytes: usize,
}

impl Counted<'_> {
    fn pad(&mut self) -> io::Result<()> {
        let zeros = [0; ALIGNMENT_DEFAULT];
        let end = self.bytes.next_multiple_of(ALIGNMENT_DEFAULT);
        self.write_all(&zeros[..end - self.bytes])
    }
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufFile, Value};
    use crate::safetensors::f16_to_f32;

    #[test]
    fn halves_are_the_nearest_ones() {
        for bits in 0..0x7c00_u16 {
            let (this, next) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            assert_eq!(f16_nearest(this), bits, "{bits:#x}");
            if next.is_finite() {
                let middle = f32::midpoint(this, next);
                assert_eq!(f16_nearest(middle), bits + (bits & 1), "{bits:#x}");
                assert_eq!(f16_nearest(middle.next_up()), bits + 1, "{bits:#x}");
                assert_eq!(f16_nearest(middle.next_down()), bits, "{bits:#x}");
            }
        }
        assert_eq!(f16_nearest(65520.0), 0x7c00);
        assert_eq!(f16_nearest(65519.9), 0x7bff);
        assert_eq!(f16_nearest(f32::INFINITY), 0x7c00);
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let metadata = [
            ("general.architecture", OutValue::Text("test".to_owned())),
            ("test.size", OutValue::U32(7)),
            ("test.real", OutValue::F32(0.5)),
            ("test.flag", OutValue::Bool(true)),
            ("test.words", OutValue::Texts(vec!["a".to_owned(), "béton".to_owned()])),
            ("test.kinds", OutValue::I32s(vec![1, -3])),
            ("test.scores", OutValue::F32s(vec![0.0, -1.5])),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        let tensor = |name: &str, shape: &[usize], format| OutTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            format,
        };
        let tensors = [
            tensor("odd", &[3], Format::F32),
            tensor("half", &[2, 5], Format::Bf16),
            tensor("small", &[2, 64], Format::Q8_0),
        ];
        let values = |index: usize| -> Vec<f32> {
            let count: usize = tensors[index].shape.iter().product();
            (0..count).map(|at| (at as f32 - 40.0) / 16.0).collect()
        };
        let mut bytes = Vec::new();
        write(&mut bytes, &metadata, &tensors, &mut |index, out| {
            let mut encoded = Vec::new();
            encode(tensors[index].format, &values(index), &mut encoded)?;
            out.write_all(&encoded)
        })
        .unwrap();
        std::fs::write(&path, bytes).unwrap();
        let file = GgufFile::open(&path).unwrap();
        assert!(matches!(file.value("test.size"), Some(Value::Unsigned(7, _))));
        assert!(matches!(file.value("test.flag"), Some(Value::Bool(true))));
        let Some(Value::List(words)) = file.value("test.words") else { panic!("a list") };
        assert_eq!(file.texts("test.words", words).unwrap(), ["a", "béton"]);
        let Some(Value::List(scores)) = file.value("test.scores") else { panic!("a list") };
        assert_eq!(file.numbers("test.scores", scores).unwrap(), [0.0, -1.5]);
        for (index, tensor) in tensors.iter().enumerate() {
            let expected = values(index);
            let mut found = vec![0.0; expected.len()];
            file.read_f32(&tensor.name, 0..found.len(), &mut found).unwrap();
            let bound = if tensor.format == Format::Q8_0 { 0.04 } else { 0.0 };
            let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= bound;
            assert!(expected.iter().zip(&found).all(is_near), "{}", tensor.name);
            assert_eq!(file.header().tensor(&tensor.name).unwrap().shape, tensor.shape);
        }
    }

    #[test]
    fn rows_of_broken_blocks_and_short_tensors_are_refused() {
        let check = |columns: usize, bytes: usize, expected: &str| {
            let tensor =
                OutTensor { name: "w".to_owned(), shape: vec![2, columns], format: Format::Q8_0 };
            let mut fill = |_, out: &mut dyn Write| out.write_all(&vec![0; bytes]);
            let error = write(&mut Vec::new(), &[], &[tensor], &mut fill).unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        check(48, 0, "w [2, 48] cannot be Q8_0");
        check(32, 67, "w wrote 67 of 68 bytes");
    }
}
