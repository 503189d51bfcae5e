//! `tr(D·H·Dᵀ)` in f32: the loss of searches and reports, whose cost it would otherwise be.

use lowbit_core::{Context, Error, MatRef, QLinear, Result};
use rayon::prelude::*;

use crate::{Calibration, transform::triangle_row};

/// Rows of a weight in a task.
const ROWS: usize = 64;

/// [`layer_loss`](crate::layer_loss) over that of a layer without weights, the relative squared error of
/// the outputs, to f32's precision and on the context's threads; 0 where no output has a signal.
///
/// # Errors
/// As [`layer_loss`](crate::layer_loss).
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Quantizer, Rtn, relative_loss};
/// use lowbit_core::{Context, Granularity, Mat, QuantScheme};
///
/// let ctx = &mut Context::new();
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let mut calibration = Calibration::with_second_moment(64)?;
/// calibration.observe(Mat::from_fn(100, 64, |r, c| ((r * c) as f32).cos()).as_ref(), ctx)?;
/// let rtn = Rtn::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)));
/// let layer = rtn.quantize(w.as_ref(), &calibration, ctx)?.layer;
/// assert!(relative_loss(w.as_ref(), &layer, &calibration, ctx)? < 0.01);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn relative_loss(
    w: MatRef<'_, f32>,
    layer: &QLinear,
    calibration: &Calibration,
    ctx: &mut Context,
) -> Result<f64> {
    let mut delta = layer.effective_weight()?;
    let expected = (delta.rows(), delta.cols());
    if w.shape() != expected {
        return Err(Error::Shape { what: "weight", expected, got: w.shape() });
    }
    calibration.check_seen(w.cols())?;
    let triangle = calibration.triangle()?;
    for (delta, w) in delta.as_mut().iter_rows_mut().zip(w.iter_rows()) {
        delta.iter_mut().zip(w).for_each(|(delta, w)| *delta -= w);
    }
    let parts = 0..w.rows().div_ceil(ROWS);
    let part = |i: usize| {
        let rows = i * ROWS..w.rows().min((i + 1) * ROWS);
        let of = |m: MatRef<'_, f32>| {
            m.sub_rows(rows.clone()).map_or(0.0, |rows| quadratic(rows, triangle))
        };
        (of(delta.as_ref()), of(w))
    };
    let parts: Vec<(f64, f64)> = match ctx.pool() {
        Some(pool) => pool.install(|| parts.into_par_iter().map(part).collect()),
        None => parts.map(part).collect(),
    };
    let (loss, signal) =
        parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    Ok(if signal > 0.0 { loss / signal } else { 0.0 })
}

/// `tr(D·H·Dᵀ)` for the lower triangle of H: products in f32, their sums over a row of H in f32, those
/// sums in f64.
pub(crate) fn quadratic(d: MatRef<'_, f32>, triangle: &[f64]) -> f64 {
    let mut h = vec![0.0; d.cols()];
    let mut sum = 0.0;
    for r in 0..d.cols() {
        let row = triangle_row(triangle, r);
        h.iter_mut().zip(row).for_each(|(h, &wide)| *h = wide as f32);
        // Off the diagonal every product occurs twice.
        h[r] *= 0.5;
        for d in d.iter_rows() {
            sum += 2.0 * f64::from(d[r]) * f64::from(dot(&h[..=r], &d[..=r]));
        }
    }
    sum
}

/// The lower triangle of the block `start..end` of H, with half the diagonal.
pub(crate) fn block(triangle: &[f64], start: usize, end: usize) -> Vec<Vec<f32>> {
    let mut rows: Vec<Vec<f32>> = (start..end)
        .map(|r| triangle_row(triangle, r)[start..=r].iter().map(|&h| h as f32).collect())
        .collect();
    rows.iter_mut().filter_map(|row| row.last_mut()).for_each(|diagonal| *diagonal *= 0.5);
    rows
}

/// The same order of additions for every vector length.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl pulp::WithSimd for Dot<'_> {
        type Output = f32;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> f32 {
            let ((a, a_rest), (b, b_rest)) = (self.0.as_chunks::<32>(), self.1.as_chunks::<32>());
            let mut sums = [0.0_f32; 32];
            for (a, b) in a.iter().zip(b) {
                for lane in 0..32 {
                    sums[lane] += a[lane] * b[lane];
                }
            }
            let mut half = 16;
            while half > 0 {
                for lane in 0..half {
                    sums[lane] += sums[lane + half];
                }
                half /= 2;
            }
            let mut sum = sums[0];
            for (a, b) in a_rest.iter().zip(b_rest) {
                sum += a * b;
            }
            sum
        }
    }
    pulp::Arch::new().dispatch(Dot(a, b))
}
