//! The GGUF container of llama.cpp, versions 2 and 3: metadata, descriptions of tensors, their data.
//!
//! Layout (ggml `docs/gguf.md`), little-endian, strings as u64 length and bytes:
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 entries
//! entries: key, u32 type, value                       an array: u32 type, u64 length, items
//! tensors: name, u32 dimensions, u64 each (innermost first), u32 type, u64 offset
//! padding to `general.alignment` (32), then the data that the offsets count from
//! ```

mod decode;
mod ggml_type;
mod value;
mod write;

use std::ops::Range;

pub(crate) use decode::{decode, scale_and_min, trit};
pub use ggml_type::GgmlType;
pub use value::{Array, Value};
pub use write::{DEFAULT_ALIGNMENT, write};

use crate::{
    Dtype, Error, Result, TensorSource, TensorView,
    recognize::{is_safetensors, not_tensors},
};

const FORMAT: &str = "GGUF";
const MAX_DIMS: usize = 4;

/// One GGUF file over bytes `S` that the caller owns.
///
/// Opening reads the header alone: its time does not depend on the size of the tensors. Metadata are
/// checked for their lengths and decoded when [`get`](Self::get) asks for them. Shapes are given
/// outermost dimension first, `[out_features, in_features]`, the reverse of the file's order.
///
/// # Example
/// ```
/// use lowbit_formats::{Dtype, TensorSource, TensorView, gguf::{self, GgmlType, Gguf, Value}};
///
/// let q8_0 = [[0x00, 0x3c].as_slice(), &[2; 32]].concat(); // scale 1, 32 codes 2
/// let tensor = TensorView {
///     file: "", name: "w", dtype: Dtype::Ggml(GgmlType::Q8_0), shape: &[1, 32], bytes: &q8_0 };
/// let mut bytes = Vec::new();
/// gguf::write(&mut bytes, &[("general.name", "tiny".into())], &[tensor])?;
///
/// let file = Gguf::new("tiny.gguf", bytes)?;
/// assert_eq!(file.get("general.name").and_then(|v| v.as_str().map(String::from)), Some("tiny".into()));
/// assert_eq!(file.tensor("w")?.to_f32()?, [2.0; 32]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Gguf<S> {
    file: String,
    bytes: S,
    version: u32,
    /// Key, and the position of its type; sorted by key.
    metadata: Vec<(String, usize)>,
    /// Sorted by name.
    tensors: Vec<Info>,
}

#[derive(Debug)]
struct Info {
    name: String,
    dtype: Dtype,
    /// Outermost first; the first `dims`.
    shape: [usize; MAX_DIMS],
    dims: usize,
    /// Where its data lie in the file.
    data: Range<usize>,
}

impl<S: AsRef<[u8]>> Gguf<S> {
    /// Reads the header of `bytes`, the whole file. `file` is what error messages call it.
    ///
    /// Tensors of a type that this crate does not know are kept, for [`TensorSource::tensor`] to
    /// give their bytes (up to the next tensor) and for [`TensorView::to_f32`] to refuse.
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::Malformed`] or [`Error::Tensor`] if the file does not hold what
    /// its header says: among them other versions, big-endian files, names that occur twice, tensors
    /// that overlap.
    pub fn new(file: impl Into<String>, bytes: S) -> Result<Self> {
        let file = file.into();
        let mut header = Cursor { file: &file, bytes: bytes.as_ref(), at: 0 };
        let version = version(&mut header)?;
        let (tensors, entries) = (header.count("tensors", 24)?, header.count("entries", 13)?);
        let metadata = entries_of(&mut header, entries)?;
        let alignment = alignment(&header, &metadata)?;
        let tensors = tensors_of(&mut header, tensors, alignment)?;
        Ok(Self { file, bytes, version, metadata, tensors })
    }

    /// What error messages call the file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The version of the container, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The keys of all metadata, sorted.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.metadata.iter().map(|(key, _)| key.as_str())
    }

    /// The value of `key`, or `None` if there is no such entry.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        value_of(self.bytes.as_ref(), &self.metadata, key)
    }
}

impl<S: AsRef<[u8]>> TensorSource for Gguf<S> {
    fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let missing = || Error::Missing { file: self.file.clone(), tensor: name.into() };
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name));
        let info = &self.tensors[found.map_err(|_| missing())?];
        Ok(TensorView {
            file: &self.file,
            name: &info.name,
            dtype: info.dtype,
            shape: &info.shape[..info.dims],
            // Bytes may be another slice than in `new` if `S` is strange; then this is still no panic.
            bytes: self.bytes.as_ref().get(info.data.clone()).ok_or_else(missing)?,
        })
    }
}

/// Reads a header from left to right, and knows what it is reading when the file ends.
struct Cursor<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { file: self.file.into(), format: FORMAT, reason }
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| Error::Truncated {
            file: self.file.into(),
            expected: (self.at as u64).saturating_add(len),
            got: self.bytes.len() as u64,
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(self.take(4)?.first_chunk().map_or(0, |&b| u32::from_le_bytes(b)))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(self.take(8)?.first_chunk().map_or(0, |&b| u64::from_le_bytes(b)))
    }

    /// A number of things of at least `size` bytes each, so of no more than the file has room for.
    fn count(&mut self, what: &str, size: u64) -> Result<usize> {
        let count = self.u64()?;
        let room = (self.bytes.len() - self.at) as u64 / size;
        match usize::try_from(count) {
            Ok(count) if count as u64 <= room => Ok(count),
            _ => {
                Err(self.malformed(format!("it announces {count} {what} and has room for {room}")))
            }
        }
    }

    fn string(&mut self, what: &str) -> Result<&'a str> {
        let start = self.at;
        let len = self.u64()?;
        let not_text = |_| self.malformed(format!("the {what} at byte {start} is not UTF-8"));
        let bytes = Cursor { ..*self }.take(len)?;
        let text = str::from_utf8(bytes).map_err(not_text)?;
        self.at += bytes.len();
        Ok(text)
    }
}

fn version(header: &mut Cursor<'_>) -> Result<u32> {
    let magic = header.take(4)?;
    if magic != b"GGUF" {
        return Err(header.malformed(match not_tensors(header.bytes) {
            Some(kind) => format!("it is {kind}"),
            None if is_safetensors(header.bytes) => "it is a safetensors file".into(),
            None => format!("it starts with {magic:02x?}, not with \"GGUF\""),
        }));
    }
    match header.u32()? {
        version @ 2..=3 => Ok(version),
        // 2 and 3 with their bytes reversed
        0x0200_0000 | 0x0300_0000 => Err(header.malformed("it is big-endian".into())),
        version => Err(header.malformed(format!("it has version {version}, expected 2 or 3"))),
    }
}

fn entries_of(header: &mut Cursor<'_>, count: usize) -> Result<Vec<(String, usize)>> {
    let mut metadata = Vec::with_capacity(count);
    for _ in 0..count {
        let key = header.string("key")?;
        let at = header.at;
        let value = value::len(&header.bytes[at..]);
        let Some(len) = value else {
            return Err(header.malformed(format!(
                "the value of {key} at byte {at} has an unknown type or passes the end of the file"
            )));
        };
        header.at += len;
        metadata.push((key.to_string(), at));
    }
    metadata.sort();
    match metadata.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        None => Ok(metadata),
        Some(pair) => Err(header.malformed(format!("the key {} occurs twice", pair[0].0))),
    }
}

fn value_of<'a>(bytes: &'a [u8], metadata: &[(String, usize)], key: &str) -> Option<Value<'a>> {
    let found = metadata.binary_search_by(|(k, _)| k.as_str().cmp(key)).ok()?;
    Value::decode(bytes.get(metadata[found].1..)?)
}

fn alignment(header: &Cursor<'_>, metadata: &[(String, usize)]) -> Result<usize> {
    match value_of(header.bytes, metadata, "general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok(alignment as usize),
        Some(_) => Err(header.malformed("its general.alignment is no u32 power of two".into())),
    }
}

fn tensors_of(header: &mut Cursor<'_>, count: usize, alignment: usize) -> Result<Vec<Info>> {
    let mut tensors = Vec::with_capacity(count);
    for _ in 0..count {
        let name = header.string("tensor name")?.to_string();
        let file = header.file;
        let wrong = |reason| Error::Tensor { file: file.into(), tensor: name.clone(), reason };
        let dims = header.u32()? as usize;
        if dims > MAX_DIMS {
            return Err(wrong(format!("it has {dims} dimensions, expected at most {MAX_DIMS}")));
        }
        let mut shape = [1; MAX_DIMS];
        for at in (0..dims).rev() {
            let size = header.u64()?;
            shape[at] = usize::try_from(size)
                .map_err(|_| wrong(format!("a dimension of {size} is too large")))?;
        }
        let id = header.u32()?;
        let offset = header.u64()?;
        let dtype = ggml_type::dtype(id);
        let len = dtype.tensor_len(&shape[..dims]).map_err(&wrong)?.unwrap_or(0);
        if !offset.is_multiple_of(alignment as u64) {
            return Err(wrong(format!("its offset {offset} is not a multiple of {alignment}")));
        }
        // Until it is known where the data begin.
        let start = usize::try_from(offset).ok();
        let data = start.and_then(|start| Some(start..start.checked_add(len)?));
        let data = data.ok_or_else(|| wrong(format!("its offset {offset} is too large")))?;
        tensors.push(Info { name, dtype, shape, dims, data });
    }
    place(header, &mut tensors, alignment)?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        None => Ok(tensors),
        Some(pair) => Err(header.malformed(format!("the tensor {} occurs twice", pair[0].name))),
    }
}

/// From offsets to positions in the file, behind the header that ends at the cursor.
fn place(header: &Cursor<'_>, tensors: &mut [Info], alignment: usize) -> Result<()> {
    let got = header.bytes.len();
    let start = header.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    tensors.sort_by_key(|tensor| (tensor.data.start, tensor.data.end));
    for i in 0..tensors.len() {
        let next = tensors.get(i + 1).map(|next| next.data.start);
        let Info { name, dtype, data, .. } = &mut tensors[i];
        if let Some(next) = next.filter(|&next| next < data.end) {
            let (name, at) = (name.clone(), data.start);
            let reason = format!(
                "its data at offset {at} overlap those of {name} at {next}",
                name = tensors[i + 1].name
            );
            return Err(Error::Tensor { file: header.file.into(), tensor: name, reason });
        }
        let truncated = |expected: usize| Error::Truncated {
            file: header.file.into(),
            expected: expected as u64,
            got: got as u64,
        };
        let shifted = |offset: usize| start.saturating_add(offset);
        let (from, mut to) = (shifted(data.start), shifted(data.end));
        if from > got || to > got {
            // An empty tensor behind the header may lack the padding before it.
            if data.start == data.end && data.start == 0 && dtype.block().is_some() {
                *data = got..got;
                continue;
            }
            return Err(truncated(to));
        }
        if dtype.block().is_none() {
            to = next.map_or(got, shifted).min(got);
        }
        *data = from..to;
    }
    Ok(())
}
