use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use super::{Value, ggml_type};
use crate::{Error, TensorView};

/// Where tensors start in files that do not say otherwise, and in those that [`write`](write()) makes:
/// at multiples of so many bytes.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// Writes a GGUF file of version 3. Tensors keep their order.
///
/// # Errors
/// An [`io::Error`] of `to`; one of kind [`InvalidInput`](io::ErrorKind::InvalidInput) around an
/// [`enum@Error`], before anything is written, if GGUF has no such type, if a tensor has more than
/// four dimensions, if its bytes are not as many as its shape says, if a name or a key occurs twice, or
/// if `general.alignment` is not 32.
///
/// # Example
/// See [`Gguf`](super::Gguf).
pub fn write(
    mut to: impl Write,
    metadata: &[(&str, Value<'_>)],
    tensors: &[TensorView<'_>],
) -> io::Result<()> {
    check_keys(metadata).map_err(|reason| {
        let file = "metadata".into();
        invalid(Error::Malformed { file, format: super::FORMAT, reason })
    })?;
    let mut names = BTreeSet::new();
    let mut header = b"GGUF".to_vec();
    header.extend(3_u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        string(key, &mut header);
        value.encode(&mut header);
    }
    let mut offset = 0;
    for tensor in tensors {
        let invalid = |reason| {
            let (file, tensor) = (tensor.file.into(), tensor.name.into());
            invalid(Error::Tensor { file, tensor, reason })
        };
        if !names.insert(tensor.name) {
            return Err(invalid("it occurs twice".into()));
        }
        let dtype = tensor.dtype;
        let id = ggml_type::id(dtype)
            .ok_or_else(|| invalid(format!("it is {dtype}, which GGUF does not have")))?;
        let (dims, max) = (tensor.shape.len(), super::MAX_DIMS);
        if dims > max {
            return Err(invalid(format!("it has {dims} dimensions, expected at most {max}")));
        }
        let (len, got) = (dtype.tensor_len(tensor.shape).map_err(invalid)?, tensor.bytes.len());
        if len != Some(got) {
            let expected = len.map_or("a type of known size".into(), |len| format!("{len} bytes"));
            return Err(invalid(format!("expected {expected}, got {got} bytes")));
        }
        string(tensor.name, &mut header);
        header.extend((dims as u32).to_le_bytes());
        for &size in tensor.shape.iter().rev() {
            header.extend((size as u64).to_le_bytes());
        }
        header.extend(id.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset += got.next_multiple_of(DEFAULT_ALIGNMENT);
    }
    to.write_all(&header)?;
    pad(&mut to, header.len())?;
    for tensor in tensors {
        to.write_all(tensor.bytes)?;
        pad(&mut to, tensor.bytes.len())?;
    }
    to.flush()
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

fn check_keys(metadata: &[(&str, Value<'_>)]) -> Result<(), String> {
    let mut keys = BTreeSet::new();
    for (key, value) in metadata {
        if !keys.insert(key) {
            return Err(format!("the key {key} occurs twice"));
        }
        if *key == "general.alignment" && *value != Value::U32(DEFAULT_ALIGNMENT as u32) {
            return Err(format!("general.alignment is {value:?}, expected {DEFAULT_ALIGNMENT}"));
        }
    }
    Ok(())
}

fn string(text: &str, to: &mut Vec<u8>) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

fn pad(to: &mut impl Write, len: usize) -> io::Result<()> {
    let padding = [0; DEFAULT_ALIGNMENT];
    to.write_all(&padding[..len.next_multiple_of(DEFAULT_ALIGNMENT) - len])
}
