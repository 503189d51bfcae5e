use alloc::vec::Vec;

use lowbit_dtypes::f16;

use crate::{Error, Mat, MatMut, MatRef, Result};

/// What a layer multiplies in f32 beside its quantized product: whole input features, or single
/// weights.
///
/// Features: a few of them are so large in large language models that int8 codes on one scale lose all
/// others. Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 3.2. There a feature that is large
/// in one token is taken out of all tokens of the batch; here each token decides for itself, so that
/// its result does not depend on the batch.
///
/// Single weights: what quantization would lose most by, arXiv:2306.03078 (SpQR). See [`SparseRows`].
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
    /// Single weights, added to the quantized ones.
    Sparse(SparseRows),
}

/// Known outlier features and their weights in f16.
///
/// # Example
/// ```
/// use lowbit_core::{Mat, OutlierColumns, f16};
///
/// // Features 3 and 17 of a layer with two outputs.
/// let weight = Mat::new([0.1, 0.2, -0.3, 0.4].map(f16::from_f32).to_vec(), 2, 2)?;
/// let columns = OutlierColumns::new(vec![3, 17], weight)?;
/// assert_eq!(columns.columns(), [3, 17]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierColumns {
    columns: Vec<usize>,
    weight: Mat<f16>,
}

impl OutlierColumns {
    /// The features `columns`, ascending, and `weight`, `(columns, out_features)`: a row for each.
    ///
    /// # Errors
    /// [`Error::Shape`] if `weight` does not have a row for each column, [`Error::Parameter`] at the
    /// first column that is not larger than the one before it, [`Error::NotFinite`] at the first NaN
    /// or infinity.
    pub fn new(columns: Vec<usize>, weight: Mat<f16>) -> Result<Self> {
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
    pub fn weight(&self) -> &Mat<f16> {
        &self.weight
    }
}

/// Single weights in f16, row by row (compressed sparse rows): the matrix `S` of `y = Q·T(x) + S·T(x)`.
///
/// They are added: where `S` has a value, the weight is the sum of it and of the quantized one, which
/// stays what its code says. Whoever keeps a weight `w` exactly stores `w − ŵ` (SpQR's CUDA kernel adds
/// too, its other loader replaces; see section 4 of arXiv:2306.03078).
///
/// # Example
/// ```
/// use lowbit_core::{Mat, SparseRows, f16};
///
/// // ( 0  0  0.5 )
/// // ( 0  0   0  )
/// // (-2  0  0.25)
/// let values = [0.5, -2.0, 0.25].map(f16::from_f32).to_vec();
/// let s = SparseRows::new(3, 3, vec![0, 1, 1, 3], vec![2, 0, 2], values)?;
///
/// let mut y = Mat::zeros(1, 3);
/// s.add(Mat::new(vec![1.0, 9.0, 4.0], 1, 3)?.as_ref(), y.as_mut())?;
/// assert_eq!(y.data(), [2.0, 0.0, -1.0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct SparseRows {
    cols: usize,
    starts: Vec<u32>,
    columns: Vec<u32>,
    values: Vec<f16>,
}

impl SparseRows {
    /// A `(rows, cols)` matrix whose row `r` has the entries `starts[r]..starts[r + 1]` of `columns`,
    /// ascending within a row, and `values`.
    ///
    /// # Errors
    /// [`Error::Length`] if `starts` has not `rows + 1` elements, or `columns` and `values` not as many as
    /// its last one says; [`Error::Parameter`] if it does not begin with 0 or falls, and at the first column
    /// that is not below `cols` or not larger than the one before it in its row; [`Error::NotFinite`] at
    /// the first NaN or infinity.
    pub fn new(
        rows: usize,
        cols: usize,
        starts: Vec<u32>,
        columns: Vec<u32>,
        values: Vec<f16>,
    ) -> Result<Self> {
        let length = |what, expected, got| Err(Error::Length { what, expected, got });
        if starts.len() != rows.saturating_add(1) {
            return length("starts of sparse rows", rows.saturating_add(1), starts.len());
        }
        let ascending = starts.windows(2).find(|pair| pair[0] > pair[1]).map(|pair| pair[1]);
        if let Some(start) = ascending.or(starts.first().copied().filter(|&first| first != 0)) {
            let (what, expected) = ("start of a sparse row", "0, then never less than before");
            return Err(Error::Parameter { what, value: f64::from(start), expected });
        }
        let entries = starts.last().map_or(0, |&last| last as usize);
        for (what, got) in
            [("columns of sparse rows", columns.len()), ("values of sparse rows", values.len())]
        {
            if got != entries {
                return length(what, entries, got);
            }
        }
        for (row, ends) in starts.windows(2).enumerate() {
            let (start, end) = (ends[0] as usize, ends[1] as usize);
            let entries = columns[start..end].iter().zip(&values[start..end]);
            let mut least = 0;
            for (&column, value) in entries {
                if (column as usize) < least || column as usize >= cols {
                    let (what, value) = ("column of a sparse weight", f64::from(column));
                    let expected = "less than in_features and more than the column before it";
                    return Err(Error::Parameter { what, value, expected });
                }
                if !value.is_finite() {
                    let (what, col) = ("sparse weight", column as usize);
                    return Err(Error::NotFinite { what, row, col });
                }
                least = column as usize + 1;
            }
        }
        Ok(Self { cols, starts, columns, values })
    }

    /// `(rows, cols)`: out_features and in_features.
    pub fn shape(&self) -> (usize, usize) {
        (self.starts.len() - 1, self.cols)
    }

    /// Where each row begins among the entries, and at last how many there are.
    pub fn starts(&self) -> &[u32] {
        &self.starts
    }

    /// The columns of all entries.
    pub fn columns(&self) -> &[u32] {
        &self.columns
    }

    /// The values of all entries.
    pub fn values(&self) -> &[f16] {
        &self.values
    }

    /// The columns and values of row `r`; none behind the last one.
    pub fn row(&self, r: usize) -> impl ExactSizeIterator<Item = (usize, f32)> {
        let at = |r: usize| self.starts.get(r).map_or(self.columns.len(), |&start| start as usize);
        let range = at(r)..at(r.saturating_add(1));
        let entries = self.columns[range.clone()].iter().zip(&self.values[range]);
        entries.map(|(&column, value)| (column as usize, value.to_f32()))
    }

    /// Adds `S·x` to each row of `y`: entry by entry from left to right, product and sum each rounded to
    /// f32.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` is not `(m, cols)` or `y` not `(m, rows)`.
    ///
    /// # Example
    /// See the [type](Self).
    pub fn add(&self, x: MatRef<'_, f32>, mut y: MatMut<'_, f32>) -> Result<()> {
        let (rows, cols) = self.shape();
        let m = x.rows();
        for (what, expected, got) in
            [("input", (m, cols), x.shape()), ("output", (m, rows), y.shape())]
        {
            if expected != got {
                return Err(Error::Shape { what, expected, got });
            }
        }
        for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
            for (r, y) in y.iter_mut().enumerate() {
                for (column, value) in self.row(r) {
                    *y += x[column] * value;
                }
            }
        }
        Ok(())
    }

    /// Bytes stored, in files as in memory: 2 for each value, 4 for its column, 4 for each row and 4 more.
    pub fn bytes(&self) -> usize {
        (2 + 4) * self.values.len() + 4 * self.starts.len()
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
                    Some(&got) if got >= k => Err(Error::no_such("outlier column", k, got)),
                    _ => Ok(()),
                }
            }
            Self::Sparse(sparse) if sparse.shape() != (n, k) => {
                Err(Error::Shape { what: "sparse weights", expected: (n, k), got: sparse.shape() })
            }
            Self::Sparse(_) => Ok(()),
        }
    }

    /// Is feature `j` of a token with value `x` taken out of the quantized product? (For single weights
    /// none is.)
    pub fn contains(&self, j: usize, x: f32) -> bool {
        match self {
            Self::Threshold(threshold) => x.abs() >= *threshold,
            Self::Columns(known) => known.columns.binary_search(&j).is_ok(),
            Self::Sparse(_) => false,
        }
    }

    /// Bytes stored: for each known feature an index of 4 bytes and 2 for each output;
    /// [`SparseRows::bytes`] for single weights.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Threshold(_) => 0,
            Self::Columns(known) => 4 * known.columns.len() + 2 * known.weight.data().len(),
            Self::Sparse(sparse) => sparse.bytes(),
        }
    }
}
