//! Round to nearest: the baseline. Every weight becomes the nearest level of its block, whatever
//! the layer's inputs are; see [`QMatrix::quantize_with`].

use lowbit_core::{ActivationScheme, Context, Fit, MatRef, QLinear, QMatrix, QuantScheme, Result};

use crate::{Calibration, Needs, Plan, Quantized, Quantizer};

/// Round to nearest (RTN).
///
/// # Example
/// ```
/// use lowbit_algorithms::Rtn;
/// use lowbit_core::{ActivationScheme, Granularity, QuantScheme};
///
/// // Int8 weights and activations, W8A8.
/// let w8a8 = Rtn {
///     activation: Some(ActivationScheme::INT8_PER_TOKEN),
///     ..Rtn::new(QuantScheme::symmetric(8, Granularity::PerChannel))
/// };
/// assert_eq!(w8a8.scheme.dtype.bits(), 8);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rtn {
    /// How the weights are stored.
    pub scheme: QuantScheme,
    /// How scales and codes are chosen.
    pub fit: Fit,
    /// How the layer will quantize its input; `None` for f32.
    pub activation: Option<ActivationScheme>,
}

impl Rtn {
    /// Weights in `scheme`, over their whole range, activations in f32.
    pub const fn new(scheme: QuantScheme) -> Self {
        Self { scheme, fit: Fit::NEAREST, activation: None }
    }
}

impl Quantizer for Rtn {
    fn quantize(
        &self,
        w: MatRef<'_, f32>,
        calibration: &Calibration,
        _: &mut Context,
    ) -> Result<Quantized> {
        calibration.check(w.cols())?;
        let weight = QMatrix::quantize_with(w, self.scheme, &self.fit, None)?;
        Ok(QLinear::new(weight).with_activation(self.activation).into())
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        Plan::of(self.scheme, out_features, in_features, self.needs())
    }
}
