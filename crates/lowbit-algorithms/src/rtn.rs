//! Round to nearest: the baseline. Every weight becomes the nearest level of its block, whatever
//! the layer's inputs are; see [`QMatrix::quantize_with`].

use lowbit_core::{Context, Fit, MatRef, QLinear, QMatrix, QuantScheme, Result};

use crate::{InputSet, Needs, Plan, Quantized, Quantizer};

/// Round to nearest (RTN).
///
/// # Example
/// ```
/// use lowbit_algorithms::Rtn;
/// use lowbit_core::{Fit, Granularity, QuantScheme, Range};
///
/// // 4 bits in groups of 32, over the range with the least squared error.
/// let rtn = Rtn {
///     fit: Fit { range: Range::MSE, ..Fit::NEAREST },
///     ..Rtn::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)))
/// };
/// assert_eq!(rtn.scheme.dtype.bits(), 4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rtn {
    /// How the weights are stored.
    pub scheme: QuantScheme,
    /// How scales and codes are chosen.
    pub fit: Fit,
}

impl Rtn {
    /// Weights in `scheme`, over their whole range.
    pub const fn new(scheme: QuantScheme) -> Self {
        Self { scheme, fit: Fit::NEAREST }
    }
}

impl Quantizer for Rtn {
    fn quantize_in_set(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        _: &mut Context,
    ) -> Result<Quantized> {
        inputs.calibration().check(w.cols())?;
        let weight = QMatrix::quantize_with(w, self.scheme, &self.fit, None)?;
        Ok(QLinear::new(weight).into())
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        Plan::of(self.scheme, out_features, in_features, self.needs())
    }
}
