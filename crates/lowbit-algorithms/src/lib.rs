//! Quantization algorithms, one paper a file. Each turns a weight matrix and statistics of the
//! layer's inputs into a [`QLinear`](lowbit_core::QLinear); [`METHODS`] lists them by name.
//!
//! # Example
//! ```
//! use lowbit_algorithms::{Calibration, Quantizer, Rtn};
//! use lowbit_core::{Context, Granularity, Linear, Mat, QuantScheme};
//!
//! let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
//! let rtn = Rtn::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)));
//! let layer = rtn.quantize(w.as_ref(), &Calibration::new(64), &mut Context::new())?.layer;
//! assert_eq!((layer.out_features(), layer.in_features()), (16, 64));
//! # Ok::<(), lowbit_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod awq;
mod calibration;
pub mod calibrations;
mod drift;
mod feedback;
mod gptq;
mod hessian;
mod input_set;
mod llm_int8;
mod loss;
mod methods;
mod obq;
mod quadratic;
mod quantizer;
mod recipe;
mod rtn;
mod second_moment;
mod smoothquant;
mod spqr;
mod transform;

pub use awq::Awq;
pub use calibration::Calibration;
pub use calibrations::Calibrations;
pub use drift::Drift;
pub use gptq::{Gptq, Order};
pub use input_set::InputSet;
pub use llm_int8::{LlmInt8, OutlierWeights};
pub use loss::layer_loss;
pub use methods::{METHODS, Method};
pub use obq::{Obq, obd_saliency, obs_saliency};
pub use quadratic::relative_loss;
pub use quantizer::{Needs, Plan, Quantized, Quantizer, Report, Uncalibrated};
pub use recipe::{ChannelScale, Recipe};
pub use rtn::Rtn;
pub use smoothquant::{Alpha, SmoothQuant};
pub use spqr::{OutlierRule, Spqr};
