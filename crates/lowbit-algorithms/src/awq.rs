//! AWQ: scales for the input channels and bounds for the weights, both searched for what the
//! activations make important.
//!
//! Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
//! arXiv:2306.00978, section 3.2, and the clipping of its code. With `s_X` the mean magnitude of each
//! channel,
//!
//! ```text
//! s = s_X^α,  α* = argmin_α L(s),  L(s) = ‖Q(W·diag(s))·diag(s)⁻¹·X − W·X‖²     (4), (5)
//! ```
//!
//! Deviations:
//! * L is the error of the layers themselves, `tr(ΔW·H·ΔWᵀ)` with the second moment H, not that of the
//!   attention or MLP around them: statistics are enough for it.
//! * It is summed over at most 64 rows of each weight, evenly spaced: exact for small layers.
//! * Channels without a signal have scale 1 and do not count in the normalisation
//!   `s / √(max s · min s)`; in the authors' code their floor of 1e-4 shifts all others.
//! * The range of a one-signed group contains 0 (see [`presets::awq`](lowbit_core::presets::awq)).
//! * Clipping looks at every layer; the authors leave out q and k.

use lowbit_core::{Context, Fit, Mat, MatRef, QMatrix, QuantScheme, Result};
use pulp::{Arch, Simd, WithSimd};

use crate::{
    Calibration,
    feedback::{Grids, LANES, Lanes, Levels, map},
    gptq::{at_block, check_weight},
    quadratic::{block, quadratic},
    recipe::check_widths,
};

/// AWQ's search for channel scales and for clipping bounds, on one grid.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Awq, Calibration};
/// use lowbit_core::{Context, Granularity, Mat, presets};
///
/// let w = Mat::from_fn(8, 64, |r, c| ((r * 64 + c) as f32).sin());
/// // One channel is much larger than the others.
/// let x = Mat::from_fn(32, 64, |r, c| (r as f32 + 0.1 * c as f32).cos() * if c == 5 { 50.0 } else { 1.0 });
/// let mut calibration = Calibration::with_second_moment(64)?;
/// calibration.observe(x.as_ref(), &mut Context::new())?;
///
/// let (scheme, fit) = presets::awq(4, Granularity::PerGroup(32));
/// let (s, alpha) = Awq { scheme, fit }.scales(&[w.as_ref()], &calibration, &mut Context::new())?;
/// assert!(alpha > 0.0 && s[5] > 2.0 * s[6]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Awq {
    /// How the weights will be stored.
    pub scheme: QuantScheme,
    /// How scales and codes will be chosen.
    pub fit: Fit,
}

/// Candidates of α: 0, 1/20, …, 19/20.
const ALPHAS: usize = 20;
/// Rows of a weight that the scale search looks at.
const ROWS: usize = 64;
/// Candidates of a clipping bound: 1, 1 − 1/20, …, 1 − 9/20 of the largest magnitude.
const BOUNDS: usize = 10;

impl Awq {
    /// `s`, one for each input channel, and its α, for layers with these `(out_features, in_features)`
    /// weights and this input. The candidate 0 is plain rounding: the result is never worse in L.
    ///
    /// # Errors
    /// Those of an impossible scheme and of weights that are not finite, and those of
    /// [`Calibration::second_moment`].
    pub fn scales(
        &self,
        weights: &[MatRef<'_, f32>],
        calibration: &Calibration,
        ctx: &mut Context,
    ) -> Result<(Vec<f32>, f32)> {
        let k = calibration.in_features();
        check_widths(weights, k)?;
        let triangle = calibration.triangle()?;
        let mean = calibration.abs_mean();
        let sampled: Vec<Mat<f32>> = weights.iter().map(|w| sample(*w)).collect();
        let loss = |i: usize| -> Result<f64> {
            let s = scales(&mean, i as f64 / ALPHAS as f64);
            let mut loss = 0.0;
            for w in &sampled {
                let mut scaled = w.clone();
                for row in scaled.as_mut().iter_rows_mut() {
                    row.iter_mut().zip(&s).for_each(|(w, s)| *w *= s);
                }
                let mut delta =
                    QMatrix::quantize_with(scaled.as_ref(), self.scheme, &self.fit, None)?
                        .dequantize();
                for (delta, w) in delta.as_mut().iter_rows_mut().zip(w.as_ref().iter_rows()) {
                    for ((delta, w), s) in delta.iter_mut().zip(w).zip(&s) {
                        *delta = *delta / s - w;
                    }
                }
                loss += quadratic(delta.as_ref(), triangle);
            }
            Ok(loss)
        };
        let mut best = (f64::INFINITY, 0);
        for (i, loss) in map((0..ALPHAS).collect(), ctx, loss).into_iter().enumerate() {
            let loss = loss?;
            if loss < best.0 {
                best = (loss, i);
            }
        }
        let alpha = best.1 as f64 / ALPHAS as f64;
        Ok((scales(&mean, alpha), alpha as f32))
    }

    /// Cuts `w` to bounds that are searched for each row and group: those whose part of the product
    /// has the least error, `d·H_gg·dᵀ`. The largest magnitude is among the candidates. Two-level scales
    /// count as exact.
    ///
    /// # Errors
    /// As [`scales`](Self::scales).
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::{Awq, Calibration};
    /// use lowbit_core::{Context, Granularity, Mat, presets};
    ///
    /// // One weight is much larger than all others, and its channel hardly has a signal.
    /// let mut w = Mat::from_fn(1, 32, |_, c| if c == 5 { 4.0 } else { (c as f32).sin() });
    /// let x = Mat::from_fn(64, 32, |r, c| ((r * 7 + c * c) as f32).cos() * if c == 5 { 0.01 } else { 1.0 });
    /// let mut calibration = Calibration::with_second_moment(32)?;
    /// calibration.observe(x.as_ref(), &mut Context::new())?;
    /// let (scheme, fit) = presets::awq(4, Granularity::PerGroup(32));
    /// Awq { scheme, fit }.clip(&mut w, &calibration, &mut Context::new())?;
    /// assert!(w.data()[5] < 3.0);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn clip(
        &self,
        w: &mut Mat<f32>,
        calibration: &Calibration,
        ctx: &mut Context,
    ) -> Result<()> {
        let (n, k) = (w.rows(), w.cols());
        check_weight(w.as_ref())?;
        calibration.check(k)?;
        calibration.check_seen(k)?;
        let triangle = calibration.triangle()?;
        let levels = Levels::new(self.scheme, &self.fit)?;
        let (rows, group) = self.scheme.granularity.block(n, k);
        let (rows, group) = (rows.max(1), group.max(1));
        let bounds = |g: usize| -> Result<Vec<f32>> {
            let (start, end) = (g * group, k.min((g + 1) * group));
            let width = end - start;
            let h = block(triangle, start, end);
            let part = Mat::from_fn(n, width, |r, c| w.data()[r * k + start + c]);
            let largest: Vec<f32> = (part.as_ref().iter_rows())
                .map(|row| row.iter().fold(0.0, |max: f32, w| max.max(w.abs())))
                .collect();
            let bands: Vec<Vec<Lanes>> = (part.data().chunks(LANES * width))
                .map(|rows| {
                    let at = |l: usize, c: usize| rows.get(l * width + c).copied().unwrap_or(0.0);
                    (0..width).map(|c| std::array::from_fn(|l| at(l, c))).collect()
                })
                .collect();
            let (mut best, mut least) = (largest.clone(), vec![f32::INFINITY; n]);
            let (mut cut, mut d) = (Vec::new(), vec![[0.0; LANES]; width]);
            let mut grids = vec![Grids::UNIT; bands.len()];
            for i in 0..BOUNDS {
                let share = 1.0 - i as f32 / 20.0;
                let bounds: Vec<f32> = largest.iter().map(|max| max * share).collect();
                // The grid of each block of the weights that are cut.
                let blocks = part.data().chunks(rows * width).zip(bounds.chunks(rows));
                for (b, (block, bounds)) in blocks.enumerate() {
                    cut.clear();
                    for (row, &bound) in block.chunks(width).zip(bounds) {
                        cut.extend(row.iter().map(|w| w.clamp(-bound, bound)));
                    }
                    let params = levels.encoder.fit(&cut, None);
                    let params = params.map_err(|e| at_block(e, b * rows, start))?;
                    for row in b * rows..n.min((b + 1) * rows) {
                        grids[row / LANES].set(row % LANES, params);
                    }
                }
                for (b, (w, grids)) in bands.iter().zip(&grids).enumerate() {
                    let rows = b * LANES..n.min((b + 1) * LANES);
                    let mut bound = [0.0; LANES];
                    bound[..rows.len()].copy_from_slice(&bounds[rows.clone()]);
                    let (levels, h, d, bound) = (&levels, &h, &mut d, &bound);
                    let errors = Arch::new().dispatch(Cut { levels, grids, w, bound, h, d });
                    for (row, error) in rows.zip(errors) {
                        if error < least[row] {
                            (least[row], best[row]) = (error, bounds[row]);
                        }
                    }
                }
            }
            Ok(best)
        };
        let bounds = map((0..k.div_ceil(group)).collect(), ctx, bounds);
        let bounds = bounds.into_iter().collect::<Result<Vec<_>>>()?;
        for (r, row) in w.as_mut().iter_rows_mut().enumerate() {
            for (part, bounds) in row.chunks_mut(group).zip(&bounds) {
                part.iter_mut().for_each(|w| *w = w.clamp(-bounds[r], bounds[r]));
            }
        }
        Ok(())
    }
}

/// `d·H_gg·dᵀ` of 32 rows of a group with `d = ŵ − w`, where weights are cut before they are rounded.
struct Cut<'a> {
    levels: &'a Levels,
    grids: &'a Grids,
    /// Of each column.
    w: &'a [Lanes],
    bound: &'a Lanes,
    /// The lower triangle of `H_gg`, with half the diagonal.
    h: &'a [Vec<f32>],
    d: &'a mut [Lanes],
}

impl WithSimd for Cut<'_> {
    type Output = Lanes;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Lanes {
        let Self { levels, grids, w, bound, h, d } = self;
        let mut sum = [0.0; LANES];
        for (c, h) in h.iter().enumerate() {
            let mut cut = [0.0; LANES];
            for l in 0..LANES {
                cut[l] = w[c][l].max(-bound[l]).min(bound[l]);
            }
            let q = levels.nearest(grids, &cut, &mut [0; LANES]);
            for l in 0..LANES {
                d[c][l] = q[l] - w[c][l];
            }
            let mut y = [0.0; LANES];
            for (d, &h) in d.iter().zip(h) {
                for l in 0..LANES {
                    y[l] = h.mul_add(d[l], y[l]);
                }
            }
            for l in 0..LANES {
                sum[l] = d[c][l].mul_add(y[l], sum[l]);
            }
        }
        sum
    }
}

/// `s_X^α`, normalised so that its extremes are each other's reciprocal.
fn scales(mean: &[f64], alpha: f64) -> Vec<f32> {
    let raw = |x: f64| x.powf(alpha).max(1e-4);
    let live = mean.iter().filter(|&&x| x > 0.0).map(|&x| raw(x));
    let (lo, hi) = live.fold((f64::MAX, 0.0_f64), |(lo, hi), s| (lo.min(s), hi.max(s)));
    let middle = (lo * hi).sqrt();
    let scale = |&x: &f64| if x > 0.0 { (raw(x) / middle) as f32 } else { 1.0 };
    mean.iter().map(scale).collect()
}

/// Evenly spaced rows, at most [`ROWS`].
fn sample(w: MatRef<'_, f32>) -> Mat<f32> {
    let rows = w.rows().min(ROWS);
    Mat::from_fn(rows, w.cols(), |r, c| w.get(r * w.rows() / rows, c).copied().unwrap_or_default())
}
