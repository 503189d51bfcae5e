use std::fmt;

use half::{bf16, f16};
use lowbit_dtypes::Format;

use crate::{
    Error, Result,
    gguf::{self, GgmlType},
};

/// Named tensors, wherever they are stored.
///
/// See [`Safetensors`](crate::Safetensors), [`Sharded`](crate::Sharded) and
/// [`Gguf`](crate::gguf::Gguf).
pub trait TensorSource {
    /// The names of all tensors, sorted.
    fn names(&self) -> Vec<&str>;

    /// The names that begin with `layer` and a dot, sorted.
    ///
    /// # Example
    /// ```
    /// use lowbit_formats::{Tensor, TensorSource};
    ///
    /// let tensors = ["up.weight", "up.bias", "upper.weight"].map(|name| Tensor::f32(name, vec![0], &[]));
    /// assert_eq!(tensors.to_vec().names_under("up"), ["up.bias", "up.weight"]);
    /// ```
    fn names_under(&self, layer: &str) -> Vec<&str> {
        let under =
            |name: &&str| name.strip_prefix(layer).is_some_and(|rest| rest.starts_with('.'));
        self.names().into_iter().filter(under).collect()
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is none.
    fn tensor(&self, name: &str) -> Result<TensorView<'_>>;
}

/// The type of a tensor's elements, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an F32.
    Bf16,
    /// Signed bytes.
    I8,
    /// Bytes, often of packed codes.
    U8,
    /// Signed words, often of packed codes.
    I32,
    /// Signed double words.
    I64,
    /// [`Format::F8E4M3`].
    F8E4M3,
    /// [`Format::F8E5M2`].
    F8E5M2,
    /// [`Format::F8E8M0`].
    F8E8M0,
    /// A block format of ggml, or an unknown type in a GGUF file.
    Ggml(GgmlType),
    /// Another type, under its name in the file.
    Other(&'static str),
}

impl Dtype {
    /// Elements and bytes of the smallest unit that is stored; `None` for types of unknown size.
    ///
    /// # Example
    /// ```
    /// use lowbit_formats::{Dtype, gguf::GgmlType};
    ///
    /// assert_eq!(Dtype::F16.block(), Some((1, 2)));
    /// assert_eq!(Dtype::Ggml(GgmlType::Q4_0).block(), Some((32, 18)));
    /// ```
    pub fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            Self::F32 | Self::I32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::I8 | Self::U8 | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => (1, 1),
            Self::I64 => (1, 8),
            Self::Ggml(dtype) => return dtype.block(),
            Self::Other("BOOL") => (1, 1),
            Self::Other("I16" | "U16") => (1, 2),
            Self::Other("U32") => (1, 4),
            Self::Other("F64" | "U64" | "C64") => (1, 8),
            Self::Other(_) => return None,
        })
    }

    /// Bytes of a tensor of `shape`; `None` for types of unknown size, a reason if there is no such
    /// tensor.
    pub(crate) fn tensor_len(self, shape: &[usize]) -> Result<Option<usize>, String> {
        let Some((weights, bytes)) = self.block() else { return Ok(None) };
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(weights) {
            return Err(format!("rows of {row} are no whole number of {self} blocks of {weights}"));
        }
        let elements = shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
        let len = elements.and_then(|n| (n / weights).checked_mul(bytes));
        // What is allocated to convert it must have a length, too.
        match len.filter(|_| elements.is_some_and(|n| n <= isize::MAX as usize / 8)) {
            Some(len) => Ok(Some(len)),
            None => Err(format!("its shape {shape:?} is too large")),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::Ggml(dtype) => return dtype.fmt(f),
            Self::Other(name) => name,
        })
    }
}

/// A tensor where it lies: row-major, at any alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// The file that holds it, for messages.
    pub file: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: &'a [usize],
    /// Its elements.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// The elements as f32: exact for floats, and as ggml decodes them for its blocks.
    ///
    /// # Errors
    /// [`Error::Dtype`] unless they are floats or blocks of ggml that this crate decodes.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let (pairs, _) = self.bytes.as_chunks::<2>();
        let byte = |format: Format| self.bytes.iter().map(|&b| format.decode(b)).collect();
        Ok(match self.dtype {
            Dtype::F32 => {
                let (words, _) = self.bytes.as_chunks::<4>();
                words.iter().map(|&b| f32::from_le_bytes(b)).collect()
            }
            Dtype::F16 => pairs.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::Bf16 => pairs.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F8E4M3 => byte(Format::F8E4M3),
            Dtype::F8E5M2 => byte(Format::F8E5M2),
            Dtype::F8E8M0 => byte(Format::F8E8M0),
            Dtype::Ggml(dtype) => {
                let (weights, bytes) = dtype.block().ok_or_else(|| self.dtype_error())?;
                let mut to = vec![0.0; self.bytes.len() / bytes * weights];
                gguf::decode(dtype, self.bytes, &mut to).ok_or_else(|| self.dtype_error())?;
                to
            }
            _ => return Err(self.dtype_error()),
        })
    }

    /// The index of the first NaN or infinity, counted through all elements; F32, F16 and BF16 are
    /// not converted for it.
    ///
    /// # Errors
    /// As [`to_f32`](Self::to_f32).
    pub fn first_not_finite(&self) -> Result<Option<usize>> {
        let (pairs, _) = self.bytes.as_chunks::<2>();
        // all bits of the exponent set
        let not_finite = |bits: u16, exponent: u16| bits & exponent == exponent;
        Ok(match self.dtype {
            Dtype::F32 => {
                let (words, _) = self.bytes.as_chunks::<4>();
                words.iter().position(|&b| !f32::from_le_bytes(b).is_finite())
            }
            Dtype::F16 => pairs.iter().position(|&b| not_finite(u16::from_le_bytes(b), 0x7c00)),
            Dtype::Bf16 => pairs.iter().position(|&b| not_finite(u16::from_le_bytes(b), 0x7f80)),
            _ => self.to_f32()?.iter().position(|x| !x.is_finite()),
        })
    }

    /// Rows and columns of a matrix with elements, whose bytes are as many as they should be.
    pub(crate) fn matrix_shape(&self) -> Result<[usize; 2]> {
        let [rows, cols] = *self.shape else {
            return Err(self.error(format!("its shape is {:?}, expected a matrix", self.shape)));
        };
        if rows == 0 || cols == 0 {
            return Err(self.error("it is empty".into()));
        }
        self.check_len()?;
        Ok([rows, cols])
    }

    /// Are there as many bytes as type and shape say? A file's tensors have them; others need not.
    pub(crate) fn check_len(&self) -> Result<()> {
        let expected = self.dtype.tensor_len(self.shape).map_err(|reason| self.error(reason))?;
        let got = self.bytes.len();
        match expected {
            Some(expected) if expected != got => {
                Err(self.error(format!("expected {expected} bytes, got {got}")))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn error(&self, reason: String) -> Error {
        Error::Tensor { file: self.file.into(), tensor: self.name.into(), reason }
    }

    fn dtype_error(&self) -> Error {
        Error::Dtype { file: self.file.into(), tensor: self.name.into(), got: self.dtype }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(dtype: Dtype, bytes: &[u8]) -> TensorView<'_> {
        TensorView { file: "f", name: "t", dtype, shape: &[], bytes }
    }

    #[test]
    fn every_16_bit_float_is_converted_and_found_finite_as_half_says() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            for (dtype, expected) in [
                (Dtype::F16, f16::from_bits(bits).to_f32()),
                (Dtype::Bf16, bf16::from_bits(bits).to_f32()),
            ] {
                let v = view(dtype, &bytes);
                assert_eq!(v.to_f32().unwrap()[0].to_bits(), expected.to_bits());
                assert_eq!(v.first_not_finite().unwrap().is_none(), expected.is_finite());
            }
        }
    }

    #[test]
    fn the_first_of_several_bad_values_is_reported() {
        let bytes: Vec<u8> = [1.0, f32::MAX, f32::NAN, f32::INFINITY]
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        assert_eq!(view(Dtype::F32, &bytes).first_not_finite(), Ok(Some(2)));
        assert_eq!(view(Dtype::F32, &bytes[..8]).first_not_finite(), Ok(None));
    }

    #[test]
    fn integers_are_not_weights() {
        let error = view(Dtype::I64, &[0; 8]).to_f32().unwrap_err();
        assert_eq!(
            error.to_string(),
            "f: tensor t is I64, expected F32, F16 or BF16: convert the checkpoint"
        );
    }
}
