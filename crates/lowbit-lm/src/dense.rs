use lowbit::{Context, Error, Linear, Mat, MatMut, MatRef, Result, check_shapes};

use crate::ops;

/// Rows of `x` in a task; every task packs all weights for itself, so not too few.
const ROWS: usize = 128;
/// Products in a task when `x` has a single row, and the least columns of `y`: gemm is slow on narrow
/// pieces of a wide weight.
const PRODUCTS: usize = 1 << 18;
const COLUMNS: usize = 512;

/// A linear layer in f32, multiplied by the `gemm` crate: what quantized layers are compared with.
///
/// # Example
/// ```
/// use lowbit::{Context, Linear, Mat};
/// use lowbit_lm::DenseLinear;
///
/// let layer = DenseLinear::new(Mat::new(vec![1.0, 2.0], 1, 2)?.as_ref(), Some(vec![0.5]))?;
/// let mut y = Mat::zeros(1, 1);
/// layer.forward(Mat::new(vec![3.0, 4.0], 1, 2)?.as_ref(), y.as_mut(), &mut Context::new())?;
/// assert_eq!(y.data(), [11.5]);
/// # Ok::<(), lowbit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DenseLinear {
    /// `(in_features, out_features)`: gemm is several times faster on it than on the weight as it
    /// is stored (16 rows by 2048 x 2048: 1.2 against 8.8 ms on an AMD Zen 5).
    transposed: Mat<f32>,
    bias: Option<Vec<f32>>,
}

impl DenseLinear {
    /// A layer with the `(out_features, in_features)` weight, which is copied.
    ///
    /// # Errors
    /// [`Error::Length`] if the bias does not have out_features elements.
    pub fn new(weight: MatRef<'_, f32>, bias: Option<Vec<f32>>) -> Result<Self> {
        let (n, k) = weight.shape();
        if let Some(got) = bias.as_ref().map(Vec::len).filter(|&len| len != n) {
            return Err(Error::Length { what: "bias", expected: n, got });
        }
        let mut transposed = Mat::zeros(k, n);
        for (r, row) in weight.iter_rows().enumerate() {
            for (w, to) in row.iter().zip(transposed.data_mut().chunks_mut(n)) {
                to[r] = *w;
            }
        }
        Ok(Self { transposed, bias })
    }
}

/// Split between threads by shape alone: results have the same bits for every thread count.
impl Linear for DenseLinear {
    fn in_features(&self) -> usize {
        self.transposed.rows()
    }

    fn out_features(&self) -> usize {
        self.transposed.cols()
    }

    fn forward(&self, x: MatRef<'_, f32>, y: MatMut<'_, f32>, ctx: &mut Context) -> Result<()> {
        check_shapes(self, x, &y)?;
        let (m, n) = y.shape();
        let stride = y.row_stride();
        let (w, k) = (self.transposed.data(), self.in_features());
        if m == 0 || n == 0 {
            return Ok(());
        }
        // Pieces of y: a few columns of its only row, or a few rows.
        let (cols, rows) = match m {
            1 => ((PRODUCTS / k.max(1)).next_multiple_of(16).max(COLUMNS), 1),
            _ => (n, ROWS),
        };
        let piece = if m == 1 { cols } else { rows * stride };
        let end = (m - 1) * stride + n;
        ops::for_chunks(ctx, &mut y.into_data()[..end], piece, |i, y| {
            let (r, c) = if m == 1 { (0, i * cols) } else { (i * rows, 0) };
            let (rows, cols) = (rows.min(m - r), cols.min(n - c));
            let w = MatRef::with_row_stride(w.get(c..).unwrap_or(&[]), k, cols, n);
            let (Some(x), Ok(w)) = (x.sub_rows(r..r + rows), w) else { return };
            let Ok(mut y) = MatMut::with_row_stride(y, rows, cols, stride.max(cols)) else {
                return;
            };
            ops::matmul(x, w, y.reborrow());
            if let Some(bias) = &self.bias {
                for row in y.iter_rows_mut() {
                    row.iter_mut().zip(&bias[c..]).for_each(|(y, bias)| *y += bias);
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn pieces_and_threads_do_not_show_in_the_result() {
        let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
        for (m, n, k) in [(1, 1000, 256), (1, 7, 5), (2, 40, 64), (33, 40, 64), (300, 57, 129)] {
            let weight = Mat::from_fn(n, k, |r, c| ((r * 31 + c * 17) % 101) as f32 / 50.0 - 1.0);
            let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let layer = DenseLinear::new(weight.as_ref(), Some(bias)).unwrap();
            let x = Mat::from_fn(m, k, |r, c| ((r * 13 + c * 7) % 89) as f32 / 40.0 - 1.0);
            let stride = n + 3;
            let run = |ctx: &mut Context| {
                let mut y = vec![f32::NAN; m * stride];
                let view = MatMut::with_row_stride(&mut y, m, n, stride).unwrap();
                layer.forward(x.as_ref(), view, ctx).unwrap();
                y
            };
            let y = run(&mut Context::new());
            let parallel = run(&mut Context::with_pool(pool.clone()));
            assert!(y.iter().zip(&parallel).all(|(a, b)| a.to_bits() == b.to_bits()));
            for (r, row) in y.chunks(stride).enumerate() {
                assert!(row[n..].iter().all(|gap| gap.is_nan()));
                for (c, y) in row[..n].iter().enumerate() {
                    let (x, w) = (x.as_ref().row(r).unwrap(), weight.as_ref().row(c).unwrap());
                    let products = x.iter().zip(w);
                    let dot: f64 = products.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    assert!((f64::from(*y) - dot - c as f64).abs() < 1e-3, "{m} {n} {k}");
                }
            }
        }
    }

    #[test]
    fn a_bias_of_another_length_is_an_error() {
        assert!(DenseLinear::new(Mat::zeros(2, 2).as_ref(), Some(vec![0.0; 3])).is_err());
    }
}
