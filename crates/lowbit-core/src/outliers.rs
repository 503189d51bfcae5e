use alloc::vec::Vec;

use crate::{Error, Mat, Result};

/// Input features that a layer multiplies in f32, beside its integer product: a few features of
/// large language models are so large that int8 codes on one scale lose all others.
///
/// Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 3.2. There a feature that is large in one
/// token is taken out of all tokens of the batch; here each token decides for itself, so that its
/// result does not depend on the batch.
///
/// # Example
/// ```
/// use lowbit_core::{
///     ActivationScheme, Context, Granularity, Linear, Mat, Outliers, QLinear, QMatrix, QuantScheme,
/// };
///
/// let w = Mat::from_fn(1, 64, |_, c| if c == 5 { 0.5 } else { 0.01 * c as f32 });
/// let x = Mat::from_fn(1, 64, |_, c| if c == 5 { 80.0 } else { 0.1 });
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let int8 = QLinear::new(q).with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
/// let llm_int8 = int8.clone().with_outliers(Some(Outliers::Threshold(6.0)))?;
///
/// let exact = 80.0 * 0.5 + (0..64).filter(|c| *c != 5).map(|c| 0.001 * c as f32).sum::<f32>();
/// let error = |layer: &QLinear| -> lowbit_core::Result<f32> {
///     let mut y = Mat::zeros(1, 1);
///     layer.forward(x.as_ref(), y.as_mut(), &mut Context::new())?;
///     Ok((y.data()[0] - exact).abs())
/// };
/// assert!(error(&int8)? > 1.0); // 0.1 is less than half a step of 80/127: lost
/// assert!(error(&llm_int8)? < 0.1);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Outliers {
    /// In each token the features of at least this magnitude, by the dequantized weights. The
    /// paper's threshold is 6.
    Threshold(f32),
    /// Known features, by weights of their own.
    Columns(OutlierColumns),
}

/// Known outlier features and their weights, which need not be quantized.
///
/// # Example
/// ```
/// use lowbit_core::{Mat, OutlierColumns};
///
/// // Features 3 and 17 of a layer with two outputs.
/// let weight = Mat::new(vec![0.1, 0.2, -0.3, 0.4], 2, 2)?;
/// let columns = OutlierColumns::new(vec![3, 17], weight)?;
/// assert_eq!(columns.columns(), [3, 17]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierColumns {
    columns: Vec<usize>,
    weight: Mat<f32>,
}

impl OutlierColumns {
    /// The features `columns`, ascending, and `weight`, `(columns, out_features)`: a row for each.
    ///
    /// # Errors
    /// [`Error::Shape`] if `weight` does not have a row for each column, [`Error::Parameter`] at the
    /// first column that is not larger than the one before it, [`Error::NotFinite`] at the first NaN
    /// or infinity.
    pub fn new(columns: Vec<usize>, weight: Mat<f32>) -> Result<Self> {
        let (expected, got) = ((columns.len(), weight.cols()), (weight.rows(), weight.cols()));
        if expected != got {
            return Err(Error::Shape { what: "outlier weights", expected, got });
        }
        if let Some(pair) = columns.windows(2).find(|pair| pair[0] >= pair[1]) {
            let (what, expected) = ("outlier column", "more than the column before it");
            return Err(Error::Parameter { what, value: pair[1] as f64, expected });
        }
        for (row, values) in weight.as_ref().iter_rows().enumerate() {
            if let Some(col) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::NotFinite { what: "outlier weight", row, col });
            }
        }
        Ok(Self { columns, weight })
    }

    /// The features, ascending.
    pub fn columns(&self) -> &[usize] {
        &self.columns
    }

    /// Their weights, `(columns, out_features)`.
    pub fn weight(&self) -> &Mat<f32> {
        &self.weight
    }
}

impl Outliers {
    /// Do they fit a layer with `n` outputs and `k` inputs?
    pub(crate) fn check(&self, n: usize, k: usize) -> Result<()> {
        match self {
            Self::Threshold(threshold) if !(*threshold > 0.0 && threshold.is_finite()) => {
                Err(Error::not_positive("outlier threshold", *threshold))
            }
            Self::Threshold(_) => Ok(()),
            Self::Columns(OutlierColumns { columns, weight }) => {
                let (expected, got) = ((columns.len(), n), (weight.rows(), weight.cols()));
                if expected != got {
                    return Err(Error::Shape { what: "outlier weights", expected, got });
                }
                match columns.last() {
                    Some(&got) if got >= k => {
                        Err(Error::Length { what: "in_features", expected: got + 1, got: k })
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// Is feature `j` of a token with value `x` one of them?
    pub fn contains(&self, j: usize, x: f32) -> bool {
        match self {
            Self::Threshold(threshold) => x.abs() >= *threshold,
            Self::Columns(known) => known.columns.binary_search(&j).is_ok(),
        }
    }

    /// Bytes stored: an index of 4 bytes and a weight of 4 for each output, for each known feature.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Threshold(_) => 0,
            Self::Columns(known) => 4 * (known.columns.len() + known.weight.data().len()),
        }
    }
}
