use alloc::vec;

use crate::{Error, Mat, MatMut, MatRef, Result};

/// A low-rank term of a layer, `B·(A·x)`, in f32 and on the input as it comes, before any
/// [`Transform`](crate::Transform): LoRA (arXiv:2106.09685), or what LoftQ and L²QER leave beside the
/// quantized weight.
///
/// # Example
/// ```
/// use lowbit_core::{Adapter, Mat};
///
/// // Rank 1, three inputs, two outputs: y = (2, −1)ᵀ · (x_0 + x_2).
/// let a = Mat::new(vec![1.0, 0.0, 1.0], 1, 3)?;
/// let b = Mat::new(vec![2.0, -1.0], 2, 1)?;
/// let adapter = Adapter::new(a, b)?;
/// let mut y = Mat::zeros(1, 2);
/// adapter.add(Mat::new(vec![1.0, 5.0, 2.0], 1, 3)?.as_ref(), y.as_mut())?;
/// assert_eq!(y.data(), [6.0, -3.0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    a: Mat<f32>,
    b: Mat<f32>,
}

impl Adapter {
    /// From `a`, `(r, in_features)`, and `b`, `(out_features, r)`. A factor such as LoRA's `alpha/r`
    /// belongs into one of them.
    ///
    /// # Errors
    /// [`Error::Shape`] if `b` has not as many columns as `a` has rows, [`Error::NotFinite`] at the first
    /// NaN or infinity.
    pub fn new(a: Mat<f32>, b: Mat<f32>) -> Result<Self> {
        if a.rows() != b.cols() {
            let (expected, got) = ((b.rows(), a.rows()), (b.rows(), b.cols()));
            return Err(Error::Shape { what: "adapter's B", expected, got });
        }
        for (what, m) in [("adapter's A", &a), ("adapter's B", &b)] {
            for (row, values) in m.as_ref().iter_rows().enumerate() {
                if let Some(col) = values.iter().position(|x| !x.is_finite()) {
                    return Err(Error::NotFinite { what, row, col });
                }
            }
        }
        Ok(Self { a, b })
    }

    /// A, `(r, in_features)`.
    pub fn a(&self) -> &Mat<f32> {
        &self.a
    }

    /// B, `(out_features, r)`.
    pub fn b(&self) -> &Mat<f32> {
        &self.b
    }

    /// Bytes stored: 4 for each element.
    pub fn bytes(&self) -> usize {
        4 * (self.a.data().len() + self.b.data().len())
    }

    /// Adds `B·(A·x)` to `y` for each row: both products are summed in f64 from left to right and
    /// rounded to f32, then added.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` is not `(m, in_features)` or `y` not `(m, out_features)`.
    ///
    /// # Example
    /// See the [type](Self).
    pub fn add(&self, x: MatRef<'_, f32>, mut y: MatMut<'_, f32>) -> Result<()> {
        let m = x.rows();
        for (what, expected, got) in
            [("input", (m, self.a.cols()), x.shape()), ("output", (m, self.b.rows()), y.shape())]
        {
            if expected != got {
                return Err(Error::Shape { what, expected, got });
            }
        }
        let mut inner = vec![0.0; self.a.rows()];
        for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
            for (u, a) in inner.iter_mut().zip(self.a.as_ref().iter_rows()) {
                *u = dot(a, x);
            }
            for (y, b) in y.iter_mut().zip(self.b.as_ref().iter_rows()) {
                *y += dot(b, &inner);
            }
        }
        Ok(())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}
