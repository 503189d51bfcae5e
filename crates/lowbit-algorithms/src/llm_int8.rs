//! LLM.int8(): input features with outliers are multiplied in 16 bits, beside the int8 product of the
//! others.
//!
//! Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
//! arXiv:2208.07339. The rule for outliers is here (section 3.2: magnitudes of 6 and more); the whole
//! method, with a scale for each row of the weight and for each token (vector-wise quantization,
//! section 3.1), is [`Recipe::LLM_INT8`](crate::Recipe::LLM_INT8). Deviations:
//!
//! * The paper looks for outlier features in every batch and keeps all weights in 16 bits beside the int8
//!   ones for them. With [`OutlierWeights::F16`] the features are those that calibration has seen outliers
//!   in, and 16-bit weights are kept for these alone; a feature with its first outlier after calibration is
//!   quantized like any other.
//! * With [`OutlierWeights::Int8`], as in bitsandbytes, the features are found at run time and meet the
//!   dequantized int8 weights: nothing more is stored, but the weights' own error remains. A feature is
//!   an outlier in those tokens where it is large, not in the whole batch, so that a token's result does
//!   not depend on its neighbours.

use lowbit_core::{Mat, OutlierColumns, Outliers, Result, f16};

use crate::{Calibration, Needs};

/// Which input features are outliers, and by what weights they are multiplied.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, LlmInt8, Quantizer, Recipe};
/// use lowbit_core::{Context, Mat, Outliers};
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let x = Mat::from_fn(8, 64, |r, c| if c == 5 { 60.0 } else { (r * c) as f32 % 3.0 });
/// let mut calibration = Calibration::new(64);
/// calibration.observe(x.as_ref(), &mut Context::new())?;
/// let q = Recipe::LLM_INT8.quantize(w.as_ref(), &calibration, &mut Context::new())?;
/// let Some(Outliers::Columns(known)) = q.layer.outliers() else { panic!() };
/// assert_eq!(known.columns(), [5]);
///
/// let recipe = Recipe { outliers: Some(LlmInt8::BITSANDBYTES), ..Recipe::LLM_INT8 };
/// let q = recipe.quantize(w.as_ref(), &calibration, &mut Context::new())?;
/// assert_eq!(q.layer.outliers(), Some(&Outliers::Threshold(6.0)));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LlmInt8 {
    /// From which magnitude on an input is an outlier; the paper's is 6.
    pub threshold: f32,
    /// What outliers are multiplied by.
    pub weights: OutlierWeights,
}

/// What outliers are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutlierWeights {
    /// The layer's own weights in f16, for the features that calibration has found.
    F16,
    /// The dequantized int8 weights, for what is found at run time.
    Int8,
}

impl LlmInt8 {
    /// The paper's threshold and weights.
    pub const PAPER: Self = Self { threshold: 6.0, weights: OutlierWeights::F16 };
    /// The same threshold with int8 weights.
    pub const BITSANDBYTES: Self = Self { threshold: 6.0, weights: OutlierWeights::Int8 };

    /// The statistics that [`outliers`](Self::outliers) looks at.
    pub fn needs(&self) -> Needs {
        match self.weights {
            OutlierWeights::F16 => Needs::Channels,
            OutlierWeights::Int8 => Needs::Nothing,
        }
    }

    /// The outliers of a layer with the `(out_features, in_features)` weight `w`.
    ///
    /// # Errors
    /// Those of [`Calibration::check_seen`]; [`Error::NotFinite`](lowbit_core::Error::NotFinite) if a
    /// weight of theirs is too large for f16.
    ///
    /// # Example
    /// See the [type](Self).
    pub fn outliers(&self, w: &Mat<f32>, calibration: &Calibration) -> Result<Outliers> {
        if self.weights == OutlierWeights::Int8 {
            return Ok(Outliers::Threshold(self.threshold));
        }
        calibration.check_seen(w.cols())?;
        let large = calibration.abs_max().into_iter().enumerate();
        let columns: Vec<usize> =
            large.filter(|&(_, max)| max >= self.threshold).map(|(j, _)| j).collect();
        let weight = Mat::from_fn(columns.len(), w.rows(), |r, i| {
            f16::from_f32(w.data()[i * w.cols() + columns[r]])
        });
        Ok(Outliers::Columns(OutlierColumns::new(columns, weight)?))
    }
}
