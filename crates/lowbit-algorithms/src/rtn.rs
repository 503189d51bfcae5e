//! Round to nearest: the baseline. Every weight becomes the nearest level of its block, whatever
//! the layer's inputs are; see [`QMatrix::quantize`].

use lowbit_core::{ActivationScheme, MatRef, QLinear, QMatrix, QuantScheme, Result};

use crate::{Calibration, Quantizer};

/// Round to nearest (RTN).
///
/// # Example
/// ```
/// use lowbit_algorithms::Rtn;
/// use lowbit_core::{ActivationScheme, Granularity, QuantScheme};
///
/// // Int8 weights and activations, W8A8.
/// let w8a8 = Rtn {
///     activation: Some(ActivationScheme::Int8PerToken),
///     ..Rtn::new(QuantScheme::symmetric(8, Granularity::PerChannel))
/// };
/// assert_eq!(w8a8.scheme.dtype.bits(), 8);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtn {
    /// How the weights are stored.
    pub scheme: QuantScheme,
    /// How the layer will quantize its input; `None` for f32.
    pub activation: Option<ActivationScheme>,
}

impl Rtn {
    /// Weights in `scheme`, activations in f32.
    pub const fn new(scheme: QuantScheme) -> Self {
        Self { scheme, activation: None }
    }
}

impl Quantizer for Rtn {
    fn quantize(&self, w: MatRef<'_, f32>, calibration: &Calibration) -> Result<QLinear> {
        calibration.check(w.cols())?;
        let weight = QMatrix::quantize(w, self.scheme)?;
        Ok(QLinear::new(weight).with_activation(self.activation))
    }

    fn needs_calibration(&self) -> bool {
        false
    }
}
