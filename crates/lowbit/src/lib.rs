//! Quantize language-model weights and multiply with them, on the CPU.
//!
//! This crate is the one to depend on: it re-exports what the focused crates under it define.
//!
//! | to | use |
//! |---|---|
//! | view weights and activations you own | [`MatRef`], [`MatMut`], [`Mat`] |
//! | say how a matrix is stored | [`QuantScheme`], [`Granularity`], [`ScaleFormat`] |
//! | quantize | a [`Quantizer`] such as [`Rtn`], by name through [`METHODS`], with a [`Calibration`] |
//! | collect such statistics, add them up, keep them in files | [`Calibration`], [`calibrations`] |
//! | keep, save and inspect the result | [`QLinear`], [`QMatrix`] |
//! | multiply, fast | [`PackedLinear`], through the trait [`Linear`], on the threads of a [`Context`] |
//! | read checkpoints | [`formats`] |
//! | convert numbers | [`dtypes`] |
//! | measure what was lost | [`metrics`] |
//! | test kernels of your own | `testing`, with the feature of that name |
//!
//! # Example
//! ```
//! use lowbit::{Calibration, Context, Linear, MatRef, Mat, Method, PackedLinear, Quantizer};
//!
//! // A weight of 3 output and 4 input features, as bytes of an f32 buffer that we own.
//! let w = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0, 1.1, -1.2];
//! let method = Method::named("int8").unwrap();
//! let ctx = &mut Context::new();
//! let w = MatRef::new(&w, 3, 4)?;
//! let layer = method.quantizer.quantize(w, &Calibration::new(4), ctx)?.layer;
//! assert!(layer.weight().bits_per_weight() > 8.0); // codes and scales
//!
//! let layer = PackedLinear::new(&layer)?;
//! let x = [1.0, 1.0, 1.0, 1.0];
//! let mut y = Mat::zeros(1, 3);
//! layer.forward(MatRef::new(&x, 1, 4)?, y.as_mut(), ctx)?;
//! assert!((y.data()[0] + 0.2).abs() < 0.01);
//! # Ok::<(), lowbit::Error>(())
//! ```
#![forbid(unsafe_code)]

pub use lowbit_algorithms::{
    Alpha, Awq, Calibration, Calibrations, ChannelScale, Drift, Gptq, InputSet, LlmInt8, METHODS,
    Method, Needs, Obq, Order, OutlierRule, OutlierWeights, Plan, Quantized, Quantizer, Recipe,
    Report, Rtn, SmoothQuant, Spqr, Uncalibrated, calibrations, layer_loss, obd_saliency,
    obs_saliency, relative_loss,
};
#[cfg(feature = "testing")]
pub use lowbit_core::testing;
pub use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Base, BlockParams, Context,
    Division, Encoder, Error, Fit, Granularity, IntegerLevels, Levels, Linear, Mat, MatMut, MatRef,
    OutlierColumns, Outliers, Params, QActivations, QLinear, QMatrix, QuantScheme, QuantType,
    Range, Result, Rounding, ScaleFormat, SparseRows, StepFormat, SymmetricScale, Transform,
    TwoLevel, ZeroFormat, check_shapes, encode_row_int8, encode_row_uint8, group_sums, metrics,
    presets, quantize_row_int8, quantize_row_uint8, range,
};
pub use lowbit_kernels::{
    Input, Output, PackedLinear, Route, forward_experts, forward_shared, kernels, roofline,
};

pub use lowbit_core::{fake_quant, integer};
pub use lowbit_dtypes as dtypes;
pub use lowbit_formats as formats;

/// Compiles and runs the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// Compiles and runs the examples of the testing guide.
#[cfg(all(doctest, feature = "testing"))]
#[doc = include_str!("../../../docs/testing.md")]
struct Testing;
