//! The nouns of `lowbit`: matrices, quantization schemes, quantized matrices and layers, and the
//! slow reference arithmetic that every fast kernel is tested against.
//!
//! ```text
//! numbers   real = scale · (level(code) − zero) + offset
//! layers    y    = Q·T(x) + S·T(x) + B·(A·x) + bias
//!                  Q quantized, T a transform, S outliers in f16, B·A of low rank
//! letters   m tokens, n out_features, k in_features, g group_size; every matrix row-major
//! ```
//!
//! # Example
//! ```
//! use lowbit_core::{Context, Granularity, Linear, Mat, QLinear, QMatrix, QuantScheme};
//!
//! // Four output features, 48 input features, groups of 32: the last group of each row has 16.
//! let w = Mat::from_fn(4, 48, |r, c| ((r * 48 + c) as f32 * 0.37).sin());
//! let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(4, Granularity::PerGroup(32)))?;
//! assert_eq!(q.bits_per_weight(), 4.0 + 2.0 * (16.0 + 4.0) / 48.0);
//!
//! let layer = QLinear::new(q);
//! let x = Mat::from_fn(1, 48, |_, c| (c as f32).cos());
//! let mut y = Mat::zeros(1, 4);
//! layer.forward(x.as_ref(), y.as_mut(), &mut Context::new())?;
//! # Ok::<(), lowbit_core::Error>(())
//! ```
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod activation;
mod adapter;
mod context;
mod display;
mod encoder;
mod error;
pub mod fake_quant;
mod fit;
pub mod integer;
mod linear;
mod mat;
#[cfg(feature = "std")]
pub mod metrics;
mod outliers;
mod qmatrix;
mod quantize;
pub mod range;
mod rounding;
mod scale;
mod scheme;
mod simd;
#[cfg(feature = "testing")]
pub mod testing;
mod transform;

pub use activation::{
    ActivationScales, ActivationScheme, ActivationType, QActivations, encode_row_int8,
    encode_row_uint8, group_sums, quantize_row_int8, quantize_row_uint8,
};
pub use adapter::Adapter;
pub use context::Context;
pub use encoder::{BlockParams, Encoder};
pub use error::Error;
pub use fit::{Division, Fit, Range, SymmetricScale, presets};
pub use linear::{Linear, QLinear, check_shapes};
/// What a [`QuantType::Float`] is.
pub use lowbit_dtypes::Format;
/// The 16-bit float that outlier weights are stored in.
pub use lowbit_dtypes::f16;
pub use mat::{Mat, MatMut, MatRef};
pub use outliers::{OutlierColumns, Outliers, SparseRows};
pub use qmatrix::QMatrix;
pub use rounding::Rounding;
pub use scale::{Base, ScaleFormat, StepFormat, TwoLevel};
pub use scheme::{Granularity, IntegerLevels, Levels, Params, QuantScheme, QuantType, ZeroFormat};
pub use transform::Transform;

/// A result whose error is [`enum@Error`].
pub type Result<T, E = Error> = core::result::Result<T, E>;
