//! The header of a GGUF file, read with limits and named errors.

use super::cursor::Cursor;
use super::value::{Value, ValueType};
use super::{GgufError, TensorType};

/// Most keys accepted in one file.
pub const KEYS_MAX: usize = 1 << 16;
/// Most tensors accepted in one file.
pub const TENSORS_MAX: usize = 1 << 17;
/// Most dimensions of a tensor.
pub const DIMS_MAX: usize = 4;
/// Where tensors begin, in multiples of so many bytes, if the file does not say.
pub const ALIGNMENT_DEFAULT: usize = 32;
/// Largest accepted alignment, in bytes.
const ALIGNMENT_MAX: usize = 1 << 20;
/// Longest accepted key, in bytes: the limit of the format.
const KEY_BYTES_MAX: usize = (1 << 16) - 1;
/// Longest accepted name of a tensor, in bytes. ggml has 63.
const TENSOR_NAME_BYTES_MAX: usize = 255;
/// Fewest bytes of a key-value pair: a length, a type, a value of one byte.
const KEY_BYTES_MIN: usize = 8 + 4 + 1;
/// Fewest bytes of a tensor's entry: a length, a number of dimensions, a type, an offset.
const TENSOR_BYTES_MIN: usize = 8 + 4 + 4 + 8;

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";

/// A checked header: every value is whole, and tensors lie in the file, aligned and apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    version: u32,
    alignment: usize,
    /// In the order of the file.
    metadata: Vec<(Box<str>, Value)>,
    /// Positions in `metadata`, in the order of keys.
    keys_sorted: Vec<u32>,
    /// In the order of the file.
    tensors: Vec<TensorInfo>,
    /// Positions in `tensors`, in the order of names.
    tensors_sorted: Vec<u32>,
}

/// Where a tensor is, and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: Box<str>,
    /// Its dimensions, outermost first: a matrix is `[outputs, inputs]`. (The file has them the
    /// other way round.)
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub tensor_type: TensorType,
    /// First byte, counted from the beginning of the file.
    pub offset: usize,
    /// Number of bytes.
    pub bytes: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Header {
    /// Reads the header of a whole file's bytes.
    ///
    /// # Errors
    ///
    /// [`GgufError`] saying what is wrong and where, by key or tensor.
    pub fn parse(file: &[u8]) -> Result<Self, GgufError> {
        if !file.starts_with(&MAGIC) {
            let found = file[..file.len().min(MAGIC.len())].to_vec();
            return Err(GgufError::NotGguf { found });
        }
        let mut cursor = Cursor::new(file, MAGIC.len());
        let version = cursor.u32(&|| "the version".to_owned())?;
        match version {
            2 | 3 => {}
            other if (1..=3).contains(&other.swap_bytes()) => {
                return Err(GgufError::BigEndian { version: other.swap_bytes() });
            }
            version => return Err(GgufError::Version { version }),
        }
        let num_tensors = cursor.u64(&|| "the number of tensors".to_owned())?;
        let num_keys = cursor.u64(&|| "the number of keys".to_owned())?;
        let num_keys = fit("keys", num_keys, (KEY_BYTES_MIN, KEYS_MAX), &cursor)?;
        let num_tensors = fit("tensors", num_tensors, (TENSOR_BYTES_MIN, TENSORS_MAX), &cursor)?;
        let mut metadata = Vec::with_capacity(num_keys);
        for _ in 0..num_keys {
            metadata.push(read_pair(&mut cursor)?);
        }
        let keys_sorted = sorted("key", &metadata, |(key, _)| key)?;
        let alignment = match find(&metadata, &keys_sorted, |(key, _)| key, ALIGNMENT_KEY) {
            None => ALIGNMENT_DEFAULT,
            Some((_, value)) => alignment_of(value)?,
        };
        // What is left of the file bounds the entries more closely than before.
        fit("tensors", num_tensors as u64, (TENSOR_BYTES_MIN, TENSORS_MAX), &cursor)?;
        let mut raw = Vec::with_capacity(num_tensors);
        for _ in 0..num_tensors {
            raw.push(read_tensor(&mut cursor)?);
        }
        let tensors = place(raw, &cursor, alignment)?;
        let tensors_sorted = sorted("tensor", &tensors, |tensor| &tensor.name)?;
        Ok(Self { version, alignment, metadata, keys_sorted, tensors, tensors_sorted })
    }

    /// The version of the format.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// Tensors begin at multiples of so many bytes.
    pub const fn alignment(&self) -> usize {
        self.alignment
    }

    /// Keys and values, in the order of the file.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (&**key, value))
    }

    /// The value of a key, or `None`.
    pub fn value(&self, key: &str) -> Option<&Value> {
        find(&self.metadata, &self.keys_sorted, |(key, _)| key, key).map(|(_, value)| value)
    }

    /// The tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name, or `None`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        find(&self.tensors, &self.tensors_sorted, |tensor| &tensor.name, name)
    }
}

/// Whether `count` entries of at least `min` bytes fit into the rest of the file.
fn fit(
    what: &'static str,
    count: u64,
    (min, max): (usize, usize),
    cursor: &Cursor<'_>,
) -> Result<usize, GgufError> {
    let max = (cursor.remaining() / min).min(max);
    let fitting = usize::try_from(count).ok().filter(|&count| count <= max);
    fitting.ok_or(GgufError::TooMany { what, count, max })
}

fn read_pair(cursor: &mut Cursor<'_>) -> Result<(Box<str>, Value), GgufError> {
    let key = cursor.name("a key", KEY_BYTES_MAX)?;
    let what = || format!("the value of {key}");
    let value_type = ValueType::read(cursor, &what)?;
    Ok((key.into(), Value::read(cursor, value_type, &what)?))
}

fn alignment_of(value: &Value) -> Result<usize, GgufError> {
    let wrong = |alignment: String| GgufError::Alignment { alignment, max: ALIGNMENT_MAX };
    match value {
        Value::Unsigned(number, _) => usize::try_from(*number)
            .ok()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= ALIGNMENT_MAX)
            .ok_or_else(|| wrong(number.to_string())),
        other => Err(wrong(other.value_type().to_string())),
    }
}

/// A tensor's entry, with its offset from the beginning of the data.
fn read_tensor(cursor: &mut Cursor<'_>) -> Result<(TensorInfo, u64), GgufError> {
    let name = cursor.name("the name of a tensor", TENSOR_NAME_BYTES_MAX)?;
    let what = || format!("the entry of tensor '{name}'");
    let impossible = |dims| GgufError::ImpossibleShape { name: name.to_owned(), dims };
    let num_dims = cursor.u32(&what)?;
    let num_dims = usize::try_from(num_dims).unwrap_or(usize::MAX);
    if num_dims > DIMS_MAX {
        return Err(impossible(Vec::new()));
    }
    let mut dims = [0; DIMS_MAX];
    let dims = &mut dims[..num_dims];
    for dim in &mut *dims {
        *dim = cursor.u64(&what)?;
    }
    let id = cursor.u32(&what)?;
    let offset = cursor.u64(&what)?;
    let tensor_type = TensorType::from_id(id)
        .ok_or_else(|| GgufError::UnknownTensorType { name: name.to_owned(), id })?;
    let (shape, bytes) = sizes(dims, tensor_type).ok_or_else(|| impossible(dims.to_vec()))?;
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(tensor_type.block_elements()) {
        return Err(GgufError::UnevenRow {
            name: name.to_owned(),
            row,
            block: tensor_type.block_elements(),
            tensor_type: tensor_type.name(),
        });
    }
    Ok((TensorInfo { name: name.into(), shape, tensor_type, offset: 0, bytes }, offset))
}

/// Shape and bytes of a tensor, unless a number overflows.
fn sizes(dims: &[u64], tensor_type: TensorType) -> Option<(Vec<usize>, usize)> {
    let mut shape = Vec::with_capacity(dims.len());
    // A dimension of zero does not hide that the others are absurd.
    let mut elements = 1_usize;
    for &dim in dims.iter().rev() {
        let dim = usize::try_from(dim).ok()?;
        elements = elements.checked_mul(dim.max(1))?;
        shape.push(dim);
    }
    let blocks = elements.div_ceil(tensor_type.block_elements());
    let bytes = blocks.checked_mul(tensor_type.block_bytes())?;
    Some((shape, if dims.contains(&0) { 0 } else { bytes }))
}

/// Gives tensors their place in the file; the data begins at the next multiple of the alignment.
fn place(
    raw: Vec<(TensorInfo, u64)>,
    cursor: &Cursor<'_>,
    alignment: usize,
) -> Result<Vec<TensorInfo>, GgufError> {
    let end = cursor.offset() + cursor.remaining();
    let data_start = cursor.offset().next_multiple_of(alignment);
    let available = end.saturating_sub(data_start);
    let mut tensors = Vec::with_capacity(raw.len());
    for (mut tensor, offset) in raw {
        let name = || tensor.name.to_string();
        if !offset.is_multiple_of(alignment as u64) {
            return Err(GgufError::Misaligned { name: name(), offset, alignment });
        }
        let bytes = tensor.bytes;
        let start = usize::try_from(offset).ok().filter(|&start| {
            start.checked_add(bytes).is_some_and(|tensor_end| tensor_end <= available)
        });
        let Some(start) = start else {
            return Err(GgufError::TensorPastEnd { name: name(), offset, bytes, available });
        };
        tensor.offset = data_start + start;
        tensors.push(tensor);
    }
    refuse_overlaps(&tensors)?;
    Ok(tensors)
}

fn refuse_overlaps(tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut in_order: Vec<&TensorInfo> = tensors.iter().filter(|tensor| tensor.bytes > 0).collect();
    in_order.sort_unstable_by_key(|tensor| tensor.offset);
    for pair in in_order.windows(2) {
        let [first, second] = pair else { unreachable!("windows of two") };
        if second.offset < first.offset + first.bytes {
            return Err(GgufError::Overlap {
                first: first.name.to_string(),
                second: second.name.to_string(),
            });
        }
    }
    Ok(())
}

/// Positions of `items` in the order of their names, which must differ.
fn sorted<T>(
    what: &'static str,
    items: &[T],
    name: impl Fn(&T) -> &str,
) -> Result<Vec<u32>, GgufError> {
    let count = u32::try_from(items.len()).expect("the limits are below 2^32");
    let mut order: Vec<u32> = (0..count).collect();
    order.sort_unstable_by_key(|&position| name(&items[position as usize]));
    let twice = order
        .windows(2)
        .find(|pair| name(&items[pair[0] as usize]) == name(&items[pair[1] as usize]));
    if let Some(pair) = twice {
        let name = name(&items[pair[0] as usize]).to_owned();
        return Err(GgufError::Duplicate { what, name });
    }
    Ok(order)
}

fn find<'a, T>(
    items: &'a [T],
    order: &[u32],
    name: impl Fn(&T) -> &str,
    wanted: &str,
) -> Option<&'a T> {
    let found = order.binary_search_by(|&position| name(&items[position as usize]).cmp(wanted));
    found.ok().map(|found| &items[order[found] as usize])
}
