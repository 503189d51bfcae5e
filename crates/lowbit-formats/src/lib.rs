//! Checkpoint files: containers, read without copying, and the conventions by which they store
//! quantized layers.
//!
//! A container ([`Safetensors`], [`Sharded`], [`gguf::Gguf`]) turns the bytes of its files, which the
//! caller owns (read, mapped or built into the program), into named tensors: [`TensorSource`]. Nothing is
//! copied and no alignment is assumed; [`TensorView::to_f32`] converts. A [convention](conventions) turns the tensors of a layer into a
//! [`QLinear`](lowbit_core::QLinear), and back.
//!
//! # Example
//! ```
//! use lowbit_formats::{Dtype, Safetensors, TensorSource};
//!
//! # let header = br#"{"weight":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]}}"#;
//! # let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
//! # bytes.extend(header);
//! # bytes.extend([0x00, 0x3c, 0x00, 0xc0]);
//! // `bytes` is what model.safetensors holds
//! let file = Safetensors::new("model.safetensors", bytes)?;
//! let weight = file.tensor("weight")?;
//! assert_eq!((weight.dtype, weight.shape), (Dtype::F16, &[1, 2][..]));
//! assert_eq!(weight.to_f32()?, [1.0, -2.0]);
//! # Ok::<(), lowbit_formats::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod conventions;
mod error;
pub mod gguf;
mod recognize;
mod safetensors;
mod sharded;
mod source;
mod tensor;

pub use error::Error;
pub use recognize::recognize;
pub use safetensors::{Safetensors, write_safetensors};
pub use sharded::Sharded;
pub use source::{Dtype, TensorSource, TensorView};
pub use tensor::Tensor;

/// A result whose error is [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
