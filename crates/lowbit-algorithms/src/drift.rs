//! What a layer's inputs have lost in the quantized layers before it, and a weight that makes up for
//! a part of it.
//!
//! GPTAQ (arXiv:2504.02692) asks for `min ‖W·x̃ − Q·x‖²`, where x̃ is the input in the f32 model and x
//! the one behind quantized layers, and changes GPTQ's updates. The same objective has the plain one
//! with a shifted weight: with `C = Σ (x̃ − x)ᵀx`,
//!
//! ```text
//! W' = W + W·C·H⁻¹      ‖W·x̃ − Q·x‖² = ‖W'·x − Q·x‖² + a constant
//! ```
//!
//! where H is damped by 1 %, and by ten times more as often as it has no Cholesky factor. A layer whose output is added to a residual stream r can also make up
//! for what that stream has lost, `B = Σ (r̃ − r)ᵀx`: `W' = W + (W·C + B)·H⁻¹`. Going a part of the
//! way serves unseen text better than all of it.

use faer::{
    Accum, MatRef as FaerRef, Par,
    linalg::{matmul::matmul, solvers::Llt},
    prelude::{ReborrowMut, Solve},
};
use lowbit_core::{Context, Error, Mat, MatRef, Result};

use crate::{Calibration, InputSet};

/// Sums over pairs of inputs, those of the f32 model and those behind quantized layers.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Drift, InputSet};
/// use lowbit_core::{Context, Mat};
///
/// // The layers before this one have made the second channel half as large.
/// let ctx = &mut Context::new();
/// let x_f32 = Mat::from_fn(64, 2, |t, c| ((t * 3 + c) as f32).sin());
/// let x = Mat::from_fn(64, 2, |t, c| x_f32.data()[t * 2 + c] * if c == 1 { 0.5 } else { 1.0 });
/// let mut calibration = Calibration::with_second_moment(2)?;
/// calibration.observe(x.as_ref(), ctx)?;
/// let mut drift = Drift::new(2, None)?;
/// drift.observe(x.as_ref(), x_f32.as_ref(), None, ctx)?;
///
/// let w = Mat::new(vec![1.0, 1.0], 1, 2)?;
/// let shifted = drift.shift(w.as_ref(), &InputSet::new(&calibration), 1.0, ctx)?;
/// assert!((shifted.data()[1] - 2.0).abs() < 0.05);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Drift {
    tokens: u64,
    /// `Σ (x̃ − x)ᵀx`, (k, k).
    input: Mat<f64>,
    /// `Σ (r̃ − r)ᵀx`, (n, k).
    residual: Option<Mat<f64>>,
}

impl Drift {
    /// Of a layer with `in_features` inputs; `residual` is its number of outputs, if they are added
    /// to a stream whose loss is to be made up for.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is not as much memory.
    pub fn new(in_features: usize, residual: Option<usize>) -> Result<Self> {
        let input = zeros(in_features, in_features)?;
        let residual = residual.map(|n| zeros(n, in_features)).transpose()?;
        Ok(Self { tokens: 0, input, residual })
    }

    /// Adds tokens: inputs `x` behind quantized layers and `x_f32` in the f32 model, both
    /// `(tokens, in_features)`, and `residual`, that of the f32 model less the other one,
    /// `(tokens, out_features)`.
    ///
    /// # Errors
    /// [`Error::Shape`] for other shapes, [`Error::NotFinite`] at the first NaN or infinity. Nothing has
    /// been added then.
    pub fn observe(
        &mut self,
        x: MatRef<'_, f32>,
        x_f32: MatRef<'_, f32>,
        residual: Option<MatRef<'_, f32>>,
        ctx: &mut Context,
    ) -> Result<()> {
        let (tokens, k) = (x.rows(), self.input.cols());
        let empty = MatRef::new(&[], tokens, 0)?;
        let n = self.residual.as_ref().map_or(0, Mat::rows);
        let residual = residual.unwrap_or(empty);
        for (what, x, cols) in
            [("input", x, k), ("input of the f32 model", x_f32, k), ("residual", residual, n)]
        {
            if x.shape() != (tokens, cols) {
                let expected = (tokens, cols);
                return Err(Error::Shape { what, expected, got: x.shape() });
            }
            for (row, values) in x.iter_rows().enumerate() {
                if let Some(col) = values.iter().position(|x| !x.is_finite()) {
                    return Err(Error::NotFinite { what, row, col });
                }
            }
        }
        // In pieces, so that the copies in f64 are small.
        for start in (0..tokens).step_by(512) {
            let rows = start..tokens.min(start + 512);
            let wide = |x: MatRef<'_, f32>, less: Option<MatRef<'_, f32>>| {
                Mat::from_fn(rows.len(), x.cols(), |r, c| {
                    let at = |x: MatRef<'_, f32>| {
                        x.row(rows.start + r).map_or(0.0, |row| f64::from(row[c]))
                    };
                    at(x) - less.map_or(0.0, at)
                })
            };
            let own = wide(x, None);
            add_product(&mut self.input, &wide(x_f32, Some(x)), &own, ctx);
            if let Some(sum) = &mut self.residual {
                add_product(sum, &wide(residual, None), &own, ctx);
            }
        }
        self.tokens += tokens as u64;
        Ok(())
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `w` moved by `share` of the way to the weight that makes up for what the inputs have lost;
    /// the calibration of `inputs` has seen the inputs `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `w` is not of this layer, [`Error::Parameter`] for a share that is not a number
    /// of 0 or more or where no damping makes the second moment positive, and those of a calibration without a second moment or of another width.
    pub fn shift(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        share: f64,
        ctx: &mut Context,
    ) -> Result<Mat<f32>> {
        let (n, k) = (w.rows(), self.input.cols());
        let expected = (self.residual.as_ref().map_or(n, Mat::rows), k);
        if w.shape() != expected {
            return Err(Error::Shape { what: "weight", expected, got: w.shape() });
        }
        crate::gptq::check_parameter("share of the drift", share)?;
        inputs.calibration().check_seen(k)?;
        // Without a signal there is nothing to make up for.
        let Some(factor) = &*inputs.drift_factor(ctx)? else {
            return Ok(Mat::from_fn(n, k, |r, c| w.row(r).map_or(0.0, |row| row[c])));
        };
        let wide = Mat::from_fn(n, k, |r, c| w.row(r).map_or(0.0, |row| f64::from(row[c])));
        let mut target = match &self.residual {
            Some(residual) => residual.clone(),
            None => zeros(n, k)?,
        };
        on_pool(ctx, |par| {
            let mut to = faer::MatMut::from_row_major_slice_mut(target.data_mut(), n, k);
            matmul(to.rb_mut(), Accum::Add, view(&wide), view(&self.input), 1.0, par);
            factor.solve_in_place(to.transpose_mut());
        });
        Ok(Mat::from_fn(n, k, |r, c| {
            (wide.data()[r * k + c] + share * target.data()[r * k + c]) as f32
        }))
    }
}

/// H with at least 1 % of its mean on the diagonal, factored; `None` if it is 0.
pub(crate) fn factor(calibration: &Calibration, ctx: &mut Context) -> Result<Option<Llt<f64>>> {
    let mut h = calibration.second_moment()?;
    let k = h.cols();
    let diagonal: Vec<_> = (0..k).map(|j| h.data()[j * k + j]).collect();
    let mean = diagonal.iter().sum::<f64>() / k.max(1) as f64;
    if mean <= 0.0 {
        return Ok(None);
    }
    let mut damping = 0.01;
    // With many times the mean on its diagonal any H has a factor.
    while damping < 1e9 {
        for (j, x) in diagonal.iter().enumerate() {
            h.data_mut()[j * k + j] = x + damping * mean;
        }
        let factor = on_pool(ctx, |_| view(&h).llt(faer::Side::Lower));
        let exists = |l: FaerRef<'_, f64>| (0..k).all(|j| l[(j, j)] > 0.0 && l[(j, j)].is_finite());
        if let Some(factor) = factor.ok().filter(|factor| exists(factor.L())) {
            return Ok(Some(factor));
        }
        damping *= 10.0;
    }
    let expected = "a share with which the second moment has a factor";
    Err(Error::Parameter { what: "damping", value: damping, expected })
}

fn view(x: &Mat<f64>) -> FaerRef<'_, f64> {
    FaerRef::from_row_major_slice(x.data(), x.rows(), x.cols())
}

/// `sum += aᵀ·b`
fn add_product(sum: &mut Mat<f64>, a: &Mat<f64>, b: &Mat<f64>, ctx: &mut Context) {
    let (n, k) = (sum.rows(), sum.cols());
    on_pool(ctx, |par| {
        let to = faer::MatMut::from_row_major_slice_mut(sum.data_mut(), n, k);
        matmul(to, Accum::Add, view(a).transpose(), view(b), 1.0, par);
    });
}

fn on_pool<R: Send>(ctx: &mut Context, f: impl FnOnce(Par) -> R + Send) -> R {
    match ctx.pool().filter(|pool| pool.current_num_threads() > 1) {
        Some(pool) => pool.install(|| f(Par::rayon(pool.current_num_threads()))),
        None => f(Par::Seq),
    }
}

fn zeros(rows: usize, cols: usize) -> Result<Mat<f64>> {
    let mut data = Vec::new();
    let len = rows.checked_mul(cols).filter(|&len| data.try_reserve_exact(len).is_ok());
    data.resize(len.ok_or(Error::TooLarge { rows, cols })?, 0.0);
    Mat::new(data, rows, cols)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three channels with correlations of −0.9, as only a file can claim: eigenvalues 1.9, 1.9 and −0.8. The
    /// first damping of 0.01·10ⁱ with a factor is 1.
    #[test]
    fn a_second_moment_without_a_factor_is_damped_until_it_has_one() {
        let ctx = &mut Context::new();
        let mut calibration = Calibration::with_second_moment(3).unwrap();
        calibration.observe(Mat::from_fn(4, 3, |t, c| (t * c) as f32).as_ref(), ctx).unwrap();
        calibration.triangle = Some(vec![1.0, -0.9, 1.0, -0.9, -0.9, 1.0]);
        let mut drift = Drift::new(3, None).unwrap();
        let lost = Mat::new(vec![0.0, 1.0, 0.0], 1, 3).unwrap();
        drift.observe(lost.as_ref(), Mat::zeros(1, 3).as_ref(), None, ctx).unwrap();
        let w = Mat::new(vec![1.0, 1.0, 1.0], 1, 3).unwrap();
        let shifted = drift.shift(w.as_ref(), &InputSet::new(&calibration), 1.0, ctx).unwrap();
        // W·C = (0, −1, 0), and 2·I − 0.9·(J − I) has the inverse (I + 0.9/0.2·J)/2.9.
        let (own, other) = (1.0 - 5.5 / 2.9, 1.0 - 4.5 / 2.9);
        for (got, expected) in shifted.data().iter().zip([other, own, other]) {
            assert!((f64::from(*got) - expected).abs() < 1e-6, "{got} {expected}");
        }
        // No damping makes up for infinity.
        calibration.triangle = Some(vec![1.0, f64::INFINITY, 1.0, 0.0, 0.0, 1.0]);
        let error = drift.shift(w.as_ref(), &InputSet::new(&calibration), 1.0, ctx).unwrap_err();
        assert!(matches!(error, Error::Parameter { what: "damping", .. }), "{error}");
    }
}
