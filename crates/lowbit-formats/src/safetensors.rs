//! The safetensors container: an 8-byte header length, a JSON header, the tensors back to back.

use std::io::{self, Write};

use safetensors::{SafeTensorError, tensor};

use crate::{Dtype, Error, Result, TensorSource, TensorView, recognize::not_tensors};

const FORMAT: &str = "safetensors";

/// One safetensors file over bytes `S` that the caller owns.
///
/// # Example
/// See the [crate].
#[derive(Debug)]
pub struct Safetensors<S> {
    file: String,
    bytes: S,
    /// First byte behind the header.
    data: usize,
    /// Sorted by name.
    tensors: Vec<(String, tensor::TensorInfo)>,
}

impl<S: AsRef<[u8]>> Safetensors<S> {
    /// Reads the header of `bytes`, the whole file. `file` is what error messages call it.
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::Malformed`] or [`Error::Tensor`] if the file does not hold
    /// what its header says.
    pub fn new(file: impl Into<String>, bytes: S) -> Result<Self> {
        let file = file.into();
        let parsed = read_header(bytes.as_ref());
        let (header, metadata) = parsed.map_err(|e| explain(&file, bytes.as_ref(), &e))?;
        let mut tensors: Vec<_> =
            metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self { file, bytes, data: 8 + header, tensors })
    }

    /// What error messages call the file.
    pub fn file(&self) -> &str {
        &self.file
    }
}

impl<S: AsRef<[u8]>> TensorSource for Safetensors<S> {
    fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn names_under(&self, layer: &str) -> Vec<&str> {
        let prefix = format!("{layer}.");
        let start = self.tensors.partition_point(|(name, _)| *name < prefix);
        let behind = self.tensors[start..].iter().map(|(name, _)| name.as_str());
        behind.take_while(|name| name.starts_with(&prefix)).collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let missing = || Error::Missing { file: self.file.clone(), tensor: name.into() };
        let found = self.tensors.binary_search_by(|(n, _)| n.as_str().cmp(name));
        let (name, info) = &self.tensors[found.map_err(|_| missing())?];
        let (start, end) = info.data_offsets;
        // Bytes may be another slice than in `new` if `S` is strange; then this is still no panic.
        let data = self.bytes.as_ref().get(self.data..).and_then(|data| data.get(start..end));
        Ok(TensorView {
            file: &self.file,
            name,
            dtype: dtype(info.dtype),
            shape: &info.shape,
            bytes: data.ok_or_else(missing)?,
        })
    }
}

/// Writes a safetensors file. Tensors of wide elements come first, so that every element lies at a multiple of its
/// size, as in files of the reference implementation; otherwise tensors keep their order.
///
/// # Errors
/// An [`io::Error`] of `to`; one of kind [`InvalidInput`](io::ErrorKind::InvalidInput) around an
/// [`Error::Tensor`], before anything is written, if a tensor is of a type that safetensors does not
/// have, if its bytes are not as many as its shape says, or if its name occurs twice.
///
/// # Example
/// ```
/// use lowbit_formats::{Safetensors, Tensor, TensorSource, write_safetensors};
///
/// let bias = Tensor::f32("bias", vec![2], &[0.5, -1.0]);
/// let mut bytes = Vec::new();
/// write_safetensors(&mut bytes, &[("format", "pt")], &[bias.view()])?;
/// assert_eq!(Safetensors::new("f", bytes)?.tensor("bias")?.to_f32()?, [0.5, -1.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_safetensors(
    mut to: impl Write,
    metadata: &[(&str, &str)],
    tensors: &[TensorView<'_>],
) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let metadata = metadata.iter().map(|(key, value)| (key.to_string(), (*value).into()));
        header.insert("__metadata__".into(), serde_json::Value::Object(metadata.collect()));
    }
    let mut tensors: Vec<_> = tensors.iter().collect();
    tensors.sort_by_key(|tensor| {
        std::cmp::Reverse(tensor.dtype.block().map_or(0, |(_, bytes)| bytes))
    });
    let mut end = 0;
    for tensor in &tensors {
        let invalid = |error: Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let wrong = |reason: &str| invalid(tensor.error(reason.into()));
        if matches!(tensor.dtype, Dtype::Ggml(_)) || tensor.dtype.block().is_none() {
            return Err(wrong(&format!("it is {}, which safetensors does not have", tensor.dtype)));
        }
        tensor.check_len().map_err(invalid)?;
        let start = end;
        end += tensor.bytes.len();
        let entry = serde_json::json!({
            "dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [start, end]
        });
        if header.insert(tensor.name.into(), entry).is_some() {
            return Err(wrong("its name occurs twice"));
        }
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // The data then begin at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    for tensor in tensors {
        to.write_all(tensor.bytes)?;
    }
    to.flush()
}

/// Length and content of the header. (`SafeTensors::read_metadata` adds up lengths that the file
/// has chosen, which may overflow.)
fn read_header(bytes: &[u8]) -> Result<(usize, tensor::Metadata), SafeTensorError> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or(SafeTensorError::HeaderTooSmall)?;
    let length = u64::from_le_bytes(*length);
    if length > 100_000_000 {
        return Err(SafeTensorError::HeaderTooLarge);
    }
    let length = length as usize;
    let header = rest.get(..length).ok_or(SafeTensorError::InvalidHeaderLength)?;
    // Deserializing makes sure that tensors lie back to back and are as long as their shapes say.
    let header: tensor::Metadata =
        serde_json::from_slice(header).map_err(SafeTensorError::InvalidHeaderDeserialization)?;
    let ends = header.tensors().into_values().map(|info| info.data_offsets.1);
    if ends.max().unwrap_or(0) != rest.len() - length {
        return Err(SafeTensorError::MetadataIncompleteBuffer);
    }
    Ok((length, header))
}

fn dtype(dtype: tensor::Dtype) -> Dtype {
    use tensor::Dtype as D;
    match dtype {
        D::F32 => Dtype::F32,
        D::F16 => Dtype::F16,
        D::BF16 => Dtype::Bf16,
        D::BOOL => Dtype::Other("BOOL"),
        D::U8 => Dtype::U8,
        D::I8 => Dtype::I8,
        D::U16 => Dtype::Other("U16"),
        D::I16 => Dtype::Other("I16"),
        D::U32 => Dtype::Other("U32"),
        D::I32 => Dtype::I32,
        D::U64 => Dtype::Other("U64"),
        D::I64 => Dtype::I64,
        D::F64 => Dtype::Other("F64"),
        D::C64 => Dtype::Other("C64"),
        D::F4 => Dtype::Other("F4"),
        D::F6_E2M3 => Dtype::Other("F6_E2M3"),
        D::F6_E3M2 => Dtype::Other("F6_E3M2"),
        D::F8_E5M2 => Dtype::F8E5M2,
        D::F8_E4M3 => Dtype::F8E4M3,
        D::F8_E8M0 => Dtype::F8E8M0,
        _ => Dtype::Other("of an unknown type"),
    }
}

/// Says in numbers and names what the parser says in general.
fn explain(file: &str, bytes: &[u8], error: &SafeTensorError) -> Error {
    use SafeTensorError as E;
    let got = bytes.len() as u64;
    let truncated = |expected| Error::Truncated { file: file.into(), expected, got };
    let malformed = |reason: String| Error::Malformed { file: file.into(), format: FORMAT, reason };
    if let Some(kind) = not_tensors(bytes) {
        return malformed(format!("it is {kind}"));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return truncated(8);
    };
    let header_len = u64::from_le_bytes(*length);
    let end = header_len.saturating_add(8);
    match error {
        E::HeaderTooLarge => malformed(format!(
            "its first 8 bytes announce a header of {header_len} bytes; at most 100000000 are allowed"
        )),
        E::HeaderTooSmall | E::InvalidHeaderLength => truncated(end),
        _ => {
            let header = usize::try_from(header_len).ok().and_then(|n| rest.get(..n));
            match header.map(serde_json::from_slice::<serde_json::Value>) {
                Some(Ok(header)) => explain_header(file, &header, end, got)
                    .unwrap_or_else(|| malformed(error.to_string())),
                _ => malformed(error.to_string()),
            }
        }
    }
}

/// The first tensor, in the order of their data, that contradicts itself or the others, or else
/// the file's length.
fn explain_header(file: &str, header: &serde_json::Value, start: u64, got: u64) -> Option<Error> {
    let mut entries: Vec<_> =
        header.as_object()?.iter().filter(|(name, _)| *name != "__metadata__").collect();
    let offset = |entry: &serde_json::Value, i| entry.get("data_offsets")?.get(i)?.as_u64();
    entries.sort_by_key(|(_, entry)| (offset(entry, 0), offset(entry, 1)));
    let mut end = 0;
    for (name, entry) in entries {
        let wrong =
            |reason| Some(Error::Tensor { file: file.into(), tensor: name.clone(), reason });
        let known = entry.get("dtype").cloned();
        let Some(dtype) = known.and_then(|d| serde_json::from_value::<tensor::Dtype>(d).ok())
        else {
            let got = entry.get("dtype").map_or("nothing".into(), ToString::to_string);
            return wrong(format!(
                "unknown dtype {got}, expected F32, F16 or BF16: convert the checkpoint"
            ));
        };
        let shape = entry.get("shape").cloned();
        let Some(shape) = shape.and_then(|s| serde_json::from_value::<Vec<u64>>(s).ok()) else {
            return wrong("expected a shape of non-negative integers".into());
        };
        let (Some(from), Some(to)) = (offset(entry, 0), offset(entry, 1)) else {
            return wrong("expected two data_offsets".into());
        };
        if from != end {
            return wrong(format!("expected its data at byte {end}, got {from}"));
        }
        let elements = shape.iter().try_fold(1_u64, |n, &d| n.checked_mul(d));
        let size = elements.and_then(|n| n.checked_mul(dtype.bitsize() as u64)).map(|n| n / 8);
        if size.is_none() || to.checked_sub(from) != size {
            let size = size.map_or("more than 2^61".into(), |n| n.to_string());
            return wrong(format!(
                "a {dtype} of shape {shape:?} has {size} bytes, but its data_offsets are {from} and {to}"
            ));
        }
        end = to;
    }
    let expected = start.checked_add(end)?;
    match expected.cmp(&got) {
        std::cmp::Ordering::Greater => Some(Error::Truncated { file: file.into(), expected, got }),
        std::cmp::Ordering::Less => Some(Error::Malformed {
            file: file.into(),
            format: FORMAT,
            reason: format!("it has {got} bytes and its header describes {expected}"),
        }),
        std::cmp::Ordering::Equal => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    const HEADER: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[4,10]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;

    fn error(header: &str, data: usize) -> String {
        Safetensors::new("m.safetensors", file(header, &vec![0; data])).unwrap_err().to_string()
    }

    #[test]
    fn tensors_are_found_by_name_at_any_alignment() {
        let data = [0, 0, 0x80, 0x3f, 0x80, 0x3f, 0, 0xc0, 0, 0];
        let bytes = file(HEADER, &data);
        for offset in 0..4 {
            let mut moved = vec![0; offset];
            moved.extend(&bytes);
            let file = Safetensors::new("f", &moved[offset..]).unwrap();
            assert_eq!(file.names(), ["a", "b"]);
            assert_eq!(file.tensor("a").unwrap().to_f32().unwrap(), [1.0]);
            let b = file.tensor("b").unwrap();
            assert_eq!((b.dtype, b.shape), (Dtype::Bf16, &[1, 3][..]));
            assert_eq!(b.to_f32().unwrap(), [1.0, -2.0, 0.0]);
            assert_eq!(file.tensor("c").unwrap_err().to_string(), "f: tensor c is missing");
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_that_gives_both_lengths() {
        let bytes = file(HEADER, &[0; 10]);
        for len in 0..bytes.len() {
            let error = Safetensors::new("f", &bytes[..len]).unwrap_err();
            let Error::Truncated { expected, got, .. } = error else { panic!("{len}: {error}") };
            assert_eq!(got, len as u64);
            // before the header is complete, the file's length is unknown
            let known = if len < 8 { 8 } else { 8 + HEADER.len() };
            let known = if len < 8 + HEADER.len() { known } else { bytes.len() };
            assert_eq!(expected, known as u64);
        }
        let mut long = bytes;
        long.push(0);
        let error = Safetensors::new("f", long).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }

    #[test]
    fn lengths_that_add_up_to_almost_everything_are_errors() {
        let size = (1_u64 << 61) - 1;
        let entries: Vec<_> = (0..8)
            .map(|i| {
                let (from, to) = (i * size, (i + 1) * size);
                format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{from},{to}]}}"#)
            })
            .collect();
        let error = error(&format!("{{{}}}", entries.join(",")), 16);
        assert!(error.contains("m.safetensors"), "{error}");
    }

    #[test]
    fn errors_name_the_tensor_and_both_sides() {
        let one = |entry: &str| format!(r#"{{"w":{entry}}}"#);
        for (header, data, expected) in [
            (
                one(r#"{"dtype":"F5","shape":[1],"data_offsets":[0,4]}"#),
                4,
                r#"m.safetensors: tensor w: unknown dtype "F5", expected F32, F16 or BF16: convert the checkpoint"#,
            ),
            (
                one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,4]}"#),
                4,
                "m.safetensors: tensor w: a F32 of shape [3] has 12 bytes, but its data_offsets are 0 and 4",
            ),
            (
                one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#),
                4,
                "m.safetensors: tensor w: a F32 of shape [4294967296, 4294967296] has more than 2^61 bytes, but its data_offsets are 0 and 4",
            ),
            (
                one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#),
                8,
                "m.safetensors: tensor w: expected its data at byte 0, got 4",
            ),
            (
                one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#),
                4,
                "m.safetensors: tensor w: expected a shape of non-negative integers",
            ),
            ("[]".into(), 0, ""),
            ("{".into(), 0, ""),
        ] {
            let got = error(&header, data);
            if expected.is_empty() {
                let start =
                    "m.safetensors: expected a safetensors file, but invalid JSON in header";
                assert!(got.starts_with(start), "{got}");
            } else {
                assert_eq!(got, expected);
            }
        }
    }

    #[test]
    fn a_huge_header_is_refused_before_it_is_read() {
        for length in [100_000_001, u64::MAX, u64::MAX - 8] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend([b'{'; 100]);
            let error = Safetensors::new("f", bytes).unwrap_err().to_string();
            assert!(error.contains(&format!("header of {length} bytes")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_result(bytes: Vec<u8>) {
            let _ = Safetensors::new("f", bytes);
        }

        #[test]
        fn any_change_of_a_byte_gives_a_result(at in 0..HEADER.len() + 18, value: u8) {
            let mut bytes = file(HEADER, &[0; 10]);
            bytes[at] = value;
            if let Ok(file) = Safetensors::new("f", bytes) {
                for name in file.names() {
                    let _ = file.tensor(name).unwrap().to_f32();
                }
            }
        }
    }
}
