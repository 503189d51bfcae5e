use std::fmt;

use half::{bf16, f16};

use crate::{Error, Result};

/// Named tensors, wherever they are stored.
///
/// See [`Safetensors`](crate::Safetensors) and [`Sharded`](crate::Sharded).
pub trait TensorSource {
    /// The names of all tensors, sorted.
    fn names(&self) -> Vec<&str>;

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
    /// A type that no weight has, under its name in the file.
    Other(&'static str),
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
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
    /// The elements as f32; exact.
    ///
    /// # Errors
    /// [`Error::Dtype`] unless they are F32, F16 or BF16.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let (pairs, _) = self.bytes.as_chunks::<2>();
        Ok(match self.dtype {
            Dtype::F32 => {
                let (words, _) = self.bytes.as_chunks::<4>();
                words.iter().map(|&b| f32::from_le_bytes(b)).collect()
            }
            Dtype::F16 => pairs.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::Bf16 => pairs.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::Other(_) => return Err(self.dtype_error()),
        })
    }

    /// The index of the first NaN or infinity, counted through all elements, without converting
    /// them.
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
            Dtype::Other(_) => return Err(self.dtype_error()),
        })
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
        let error = view(Dtype::Other("I64"), &[0; 8]).to_f32().unwrap_err();
        assert_eq!(
            error.to_string(),
            "f: tensor t is I64, expected F32, F16 or BF16: convert the checkpoint"
        );
    }
}
