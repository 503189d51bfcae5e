//! LLM.int8(): int8 weights and activations, with outlier features multiplied in f32.
//!
//! Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
//! arXiv:2208.07339. Weights have a scale for each row, `max|w| / 127`, activations one for each token
//! over what is not an outlier (vector-wise quantization, section 2). Deviations:
//!
//! * A feature is an outlier in those tokens where it is large, not in the whole batch (section 3.2),
//!   so that a token's result does not depend on its neighbours.
//! * Outliers meet the dequantized int8 weights, as in bitsandbytes; the paper keeps f16 ones.

use lowbit_core::{ActivationScheme, Context, MatRef, Outliers, QLinear, QMatrix, Result, presets};

use crate::{Calibration, Needs, Plan, Quantized, Quantizer};

/// LLM.int8() with outliers found at run time.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, LlmInt8, Quantizer};
/// use lowbit_core::{Context, Mat, Outliers};
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let llm_int8 = LlmInt8::default();
/// let quantized = llm_int8.quantize(w.as_ref(), &Calibration::new(64), &mut Context::new())?;
/// assert_eq!(quantized.layer.outliers(), Some(&Outliers::Threshold(6.0)));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LlmInt8 {
    /// From which magnitude on a feature of a token is an outlier; the paper's is 6.
    pub threshold: f32,
}

impl LlmInt8 {
    /// The paper's threshold.
    pub const PAPER: Self = Self { threshold: 6.0 };
}

impl Default for LlmInt8 {
    fn default() -> Self {
        Self::PAPER
    }
}

impl Quantizer for LlmInt8 {
    fn quantize(
        &self,
        w: MatRef<'_, f32>,
        calibration: &Calibration,
        _: &mut Context,
    ) -> Result<Quantized> {
        calibration.check(w.cols())?;
        let (scheme, fit) = presets::bitsandbytes_int8();
        let weight = QMatrix::quantize_with(w, scheme, &fit, None)?;
        let layer = QLinear::new(weight)
            .with_activation(Some(ActivationScheme::INT8_PER_TOKEN))
            .with_outliers(Some(Outliers::Threshold(self.threshold)))?;
        Ok(layer.into())
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        Plan::of(presets::bitsandbytes_int8().0, out_features, in_features, self.needs())
    }
}
