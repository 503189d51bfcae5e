//! Quantization algorithms, one paper a file. Each turns a weight matrix and statistics of the
//! layer's inputs into a [`QLinear`]; [`METHODS`] lists them by name.
//!
//! # Example
//! ```
//! use lowbit_algorithms::{Calibration, Quantizer, Rtn};
//! use lowbit_core::{Granularity, Linear, Mat, QuantScheme};
//!
//! let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
//! let rtn = Rtn::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)));
//! let layer = rtn.quantize(w.as_ref(), &Calibration::new(64))?;
//! assert_eq!((layer.out_features(), layer.in_features()), (16, 64));
//! # Ok::<(), lowbit_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod calibration;
pub mod calibrations;
mod llm_int8;
mod methods;
mod rtn;
mod second_moment;

use lowbit_core::{MatRef, QLinear, Result};

pub use calibration::Calibration;
pub use calibrations::Calibrations;
pub use llm_int8::LlmInt8;
pub use methods::{METHODS, Method};
pub use rtn::Rtn;

/// Turns weights and statistics of their inputs into a quantized layer.
///
/// A pure function of its operands: any layer can be quantized anywhere, in any order.
pub trait Quantizer: Send + Sync {
    /// Quantizes `w`, the `(out_features, in_features)` weight of a linear layer whose inputs
    /// `calibration` has seen. The result has no bias; see [`QLinear::with_bias`].
    ///
    /// # Errors
    /// [`Error::NotFinite`](lowbit_core::Error::NotFinite) at the first NaN or infinity of `w`,
    /// [`Error::Length`](lowbit_core::Error::Length) if `calibration` is of another width, and
    /// what the method itself documents.
    fn quantize(&self, w: MatRef<'_, f32>, calibration: &Calibration) -> Result<QLinear>;

    /// Whether [`quantize`](Self::quantize) looks at the calibration's statistics: if not, an empty
    /// one of the right width will do.
    fn needs_calibration(&self) -> bool;
}
