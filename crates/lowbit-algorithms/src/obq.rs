//! Optimal brain damage, surgeon and quantizer: the ancestors of GPTQ, exact and slow.
//!
//! With all other weights held, changing weight j by δ costs `δ²·H_jj / 2` (OBD: LeCun, Denker and
//! Solla, 1989). With all others free to make up for it, it costs `δ² / (2·[H⁻¹]_jj)`, and they move by
//! `−δ / [H⁻¹]_jj · H⁻¹_j` (OBS: Hassibi and Stork, 1992). OBQ (Frantar and Alistarh,
//! arXiv:2208.11580, algorithm 3) quantizes a row that way, always the weight that costs least of
//! those left. H is `2·Σ xᵀx / tokens`.
//!
//! Deviations from the authors' code: H is damped as GPTQ's; a weight beyond its grid goes first as
//! there, which the paper has only in its text. The order is greedy and not the best: GPTQ's fixed
//! one can lose less.

use lowbit_core::{
    BlockParams, Context, Encoder, Fit, Mat, MatRef, Params, QLinear, QMatrix, QuantScheme,
    QuantType, Result,
};

use crate::{
    Calibration, InputSet, Needs, Plan, Quantized, Quantizer, Report, Uncalibrated,
    feedback::map,
    gptq::{check_parameter, check_weight, hessian, nearest},
    hessian::Hessian,
};

/// Optimal brain quantization: `O(k³)` for each row, for small layers.
///
/// Scales are those of rounding to nearest.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Obq, Quantizer, Rtn, layer_loss};
/// use lowbit_core::{Context, Granularity, Mat, QuantScheme};
///
/// let ctx = &mut Context::new();
/// let w = Mat::from_fn(4, 24, |r, c| ((r * 24 + c) as f32 * 0.7).sin());
/// let x = Mat::from_fn(99, 24, |t, c| ((t * 7 + c) as f32 * 0.05).sin() + (t as f32).cos());
/// let mut calibration = Calibration::with_second_moment(24)?;
/// calibration.observe(x.as_ref(), ctx)?;
///
/// let scheme = QuantScheme::affine(3, Granularity::PerChannel);
/// let obq = Obq::new(scheme).quantize(w.as_ref(), &calibration, ctx)?.layer;
/// let rtn = Rtn::new(scheme).quantize(w.as_ref(), &calibration, ctx)?.layer;
/// let loss = |layer| layer_loss(w.as_ref(), layer, &calibration);
/// assert!(loss(&obq)? < 0.5 * loss(&rtn)?);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Obq {
    /// How the weights are stored.
    pub scheme: QuantScheme,
    /// How scales are chosen; the errors of a search are weighed by the diagonal of H.
    pub fit: Fit,
    /// What is added to the diagonal of H, as a share of its mean.
    pub damping: f64,
    /// What to do with a layer whose calibration has seen no tokens.
    pub uncalibrated: Uncalibrated,
}

impl Obq {
    /// With a damping of 0.01.
    pub const fn new(scheme: QuantScheme) -> Self {
        Self { scheme, fit: Fit::NEAREST, damping: 0.01, uncalibrated: Uncalibrated::Error }
    }
}

impl Quantizer for Obq {
    fn quantize_in_set(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        ctx: &mut Context,
    ) -> Result<Quantized> {
        let calibration = inputs.calibration();
        let hessian = hessian(w, calibration, self.damping, self.uncalibrated, false)?;
        let Some(hessian) = hessian else { return nearest(w, self.scheme, &self.fit) };
        let encoder = Encoder::new(self.scheme, &self.fit)?;
        let (n, k) = w.shape();
        let dead = &hessian.dead;
        let target =
            Mat::from_fn(n, k, |r, c| w.row(r).map_or(0.0, |w| if dead[c] { 0.0 } else { w[c] }));
        let importance: Vec<_> = hessian.diagonal.iter().map(|&h| h as f32).collect();
        let rtn =
            QMatrix::quantize_with(target.as_ref(), self.scheme, &self.fit, Some(&importance))?;
        let (inverse, damping) = inverse(&hessian, self.damping, ctx)?;

        let params = BlockParams::from(&rtn);
        let ((block_rows, block_cols), (_, across)) = (rtn.block(), rtn.grid());
        let mut codes = vec![0; n * k];
        let rows: Vec<_> =
            codes.chunks_mut(k).zip(target.as_ref().iter_rows()).enumerate().collect();
        map(rows, ctx, |(r, (codes, target))| {
            let params = &params.params()[r / block_rows * across..][..across];
            let integers = matches!(self.scheme.dtype, QuantType::Int { .. });
            let row = Row { encoder: &encoder, params, block_cols, integers };
            row.quantize(target, &inverse, codes);
        });
        let layer = QLinear::new(QMatrix::from_codes(&params, &codes)?);
        let dead_columns = dead.iter().filter(|dead| **dead).count();
        let report = Report { damping: Some(damping), dead_columns, ..Report::default() };
        Ok(Quantized { layer, report })
    }

    fn needs(&self) -> Needs {
        Needs::SecondMoment
    }

    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        let plan = Plan::of(self.scheme, out_features, in_features, self.needs())?;
        let square = (in_features as u64).saturating_mul(in_features as u64).saturating_mul(8);
        // Of each weight a copy and its code; the inverse, and a copy of it for each row at work. Before
        // that, the inverse beside a factor.
        let shared = plan.memory.saturating_add(plan.weights.saturating_mul(5));
        let shared = shared.saturating_add(square);
        let (memory, most_threads) = (shared.saturating_add(square), out_features.max(1));
        Ok(Plan { memory, shared, each_thread: square, most_threads, ..plan })
    }
}

struct Row<'a> {
    encoder: &'a Encoder,
    params: &'a [Params],
    block_cols: usize,
    /// Whether all steps are as long as the scale.
    integers: bool,
}

impl Row<'_> {
    fn quantize(&self, target: &[f32], inverse: &Mat<f64>, codes: &mut [u8]) {
        let k = target.len();
        let mut inverse = inverse.data().to_vec();
        let mut w: Vec<_> = target.iter().map(|&w| f64::from(w)).collect();
        let mut left: Vec<_> = (0..k).collect();
        while !left.is_empty() {
            // The weight that costs least; before it those beyond their grids, the farthest first.
            let mut best = (0, f64::INFINITY, 0_u8, 0.0);
            let mut beyond = 0.0;
            for (place, &j) in left.iter().enumerate() {
                let params = self.params[j / self.block_cols];
                let code = self.encoder.code(params, w[j] as f32);
                let level = f64::from(self.encoder.real(params, code));
                let error = (w[j] - level).abs();
                // On a grid of equal steps, a nearest level further away than half of one is the last.
                let half = f64::from(params.scale.abs()) / 2.0;
                if self.integers && error > half * (1.0 + 1e-6) {
                    if error > beyond {
                        (best, beyond) = ((place, 0.0, code, level), error);
                    }
                } else if beyond == 0.0 {
                    let cost = error * error / inverse[j * k + j];
                    if cost < best.1 {
                        best = (place, cost, code, level);
                    }
                }
            }
            let (place, _, code, level) = best;
            let j = left.remove(place);
            codes[j] = code;
            let pivot = inverse[j * k + j];
            let error = (w[j] - level) / pivot;
            for &i in &left {
                w[i] -= error * inverse[j * k + i];
            }
            // Row and column j leave the inverse: their Schur complement stays.
            for &a in &left {
                let factor = inverse[j * k + a] / pivot;
                for &b in &left {
                    inverse[a * k + b] -= factor * inverse[j * k + b];
                }
            }
        }
    }
}

/// `H⁻¹` with at least so much damping.
fn inverse(hessian: &Hessian<'_>, damping: f64, ctx: &mut Context) -> Result<(Mat<f64>, f64)> {
    let factor = hessian.factor(damping, ctx)?;
    let (k, damping) = (factor.len(), factor.damping);
    // U = R⁻¹, upper triangular, column by column; H⁻¹ = UᵀU.
    let mut u = Mat::zeros(k, k);
    for c in 0..k {
        u.data_mut()[c * k + c] = 1.0 / factor.at(c, c);
        for i in (0..c).rev() {
            let sum: f64 = (i + 1..=c).map(|t| factor.at(i, t) * u.data()[t * k + c]).sum();
            u.data_mut()[i * k + c] = -sum / factor.at(i, i);
        }
    }
    drop(factor);
    let inverse = Mat::from_fn(k, k, |a, b| {
        (0..=a.min(b)).map(|t| u.data()[t * k + a] * u.data()[t * k + b]).sum()
    });
    Ok((inverse, damping))
}

/// What removing each weight costs with the others held: `w_j²·H_jj / 2` (OBD), `(n, k)`.
///
/// # Errors
/// [`Error::Length`](lowbit_core::Error::Length) if the calibration is of another width, and those of one without a second moment.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, obd_saliency, obs_saliency};
/// use lowbit_core::{Context, Mat};
///
/// let ctx = &mut Context::new();
/// let x = Mat::from_fn(64, 3, |t, c| if c == 2 { 0.1 } else { 1.0 } * ((t * 5 + c / 2) as f32).sin());
/// let mut calibration = Calibration::with_second_moment(3)?;
/// calibration.observe(x.as_ref(), ctx)?;
/// let w = Mat::new(vec![1.0, 1.0, 1.0], 1, 3)?;
///
/// // The third channel is weak; the first two are the same, so that one can stand in for the other.
/// let held = obd_saliency(w.as_ref(), &calibration)?;
/// let free = obs_saliency(w.as_ref(), &calibration, 0.01, ctx)?;
/// assert!(held.data()[2] < 0.1 * held.data()[0]);
/// assert!(free.data()[0] < 0.1 * held.data()[0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn obd_saliency(w: MatRef<'_, f32>, calibration: &Calibration) -> Result<Mat<f64>> {
    let hessian = checked(w, calibration)?;
    Ok(saliency(w, |j| if hessian.dead[j] { 0.0 } else { hessian.diagonal[j] }))
}

/// What removing each weight costs when the others make up for it: `w_j² / (2·[H⁻¹]_jj)` (OBS),
/// `(n, k)`, with `damping` as a share of the mean diagonal added to H.
///
/// # Errors
/// Those of [`obd_saliency`]; [`Error::Parameter`](lowbit_core::Error::Parameter) for a damping that is no number of 0 or more.
///
/// # Example
/// See [`obd_saliency`].
pub fn obs_saliency(
    w: MatRef<'_, f32>,
    calibration: &Calibration,
    damping: f64,
    ctx: &mut Context,
) -> Result<Mat<f64>> {
    check_parameter("damping", damping)?;
    let hessian = checked(w, calibration)?;
    let (inverse, _) = inverse(&hessian, damping, ctx)?;
    let k = hessian.len();
    Ok(saliency(w, |j| if hessian.dead[j] { 0.0 } else { 1.0 / inverse.data()[j * k + j] }))
}

fn checked<'a>(w: MatRef<'_, f32>, calibration: &'a Calibration) -> Result<Hessian<'a>> {
    calibration.check(w.cols())?;
    check_weight(w)?;
    Hessian::new(calibration, false)
}

fn saliency(w: MatRef<'_, f32>, curvature: impl Fn(usize) -> f64) -> Mat<f64> {
    Mat::from_fn(w.rows(), w.cols(), |r, j| {
        let w = w.row(r).map_or(0.0, |row| f64::from(row[j]));
        w * w * curvature(j) / 2.0
    })
}
