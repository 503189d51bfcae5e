//! SmoothQuant: a scale for each input channel that moves the range of activations into the weights.
//!
//! Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
//! Models", arXiv:2211.10438. With `X` the input and `W` the weights of all layers that share it,
//!
//! ```text
//! Y = (X·diag(s)⁻¹) · (diag(s)·Wᵀ)      (3)
//! s_j = max|X_j|^α / max|W_j|^(1−α)     (4)
//! ```
//!
//! Deviations: `s_j = 1` for channels that calibration has seen no signal in (a clamp would make their
//! weights tiny), and weights below 1e-5 count as 1e-5. The paper chooses α for a model; here it may also
//! be searched for each input, by a loss of our own (see [`Alpha::Searched`]).

use lowbit_core::{Error, MatRef, Result};

use crate::{Calibration, Needs, recipe::check_widths};

/// SmoothQuant's scales, the `s` of equation 4.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Alpha, Calibration, SmoothQuant};
/// use lowbit_core::{Context, Mat};
///
/// let w = Mat::new(vec![0.5, 0.25, -0.25, 0.0625], 2, 2)?;
/// let mut calibration = Calibration::new(2);
/// calibration.observe(Mat::new(vec![2.0, -64.0], 1, 2)?.as_ref(), &mut Context::new())?;
///
/// let (s, alpha) = SmoothQuant::new(0.5).scales(&[w.as_ref()], &calibration)?;
/// assert_eq!((s, alpha), (vec![2.0, 16.0], 0.5)); // √(2 / 0.5) and √(64 / 0.25)
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SmoothQuant {
    /// How much of the range moves: 0 none of the activations', 1 all of it.
    pub alpha: Alpha,
}

/// The strength of the migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// This one. The paper takes 0.5 for most models.
    Fixed(f32),
    /// Of 0, 0.05, …, 1 the one with the least expected error of int8 activations and int8 weights with
    /// a scale for each output. Rounding errors count as uniform within a step:
    ///
    /// ```text
    /// Σ_i (max_j|w_ij·s_j| / 127)² / 12 · Σ_j E[x_j²] / s_j²  +  (x_max / 127)² / 12 · Σ_ij (w_ij·s_j)²
    /// ```
    ///
    /// so it takes statistics instead of samples. `x_max` is the magnitude that a token's largest input
    /// `x_j / s_j` exceeds every second time, if channels were independent and normal: for a scale of each
    /// token. A scale that all tokens share is larger, and does best with a larger α.
    Searched,
}

impl SmoothQuant {
    /// With this α.
    pub const fn new(alpha: f32) -> Self {
        Self { alpha: Alpha::Fixed(alpha) }
    }

    /// The statistics that [`scales`](Self::scales) looks at.
    pub fn needs(&self) -> Needs {
        match self.alpha {
            Alpha::Fixed(_) => Needs::Channels,
            Alpha::Searched => Needs::SecondMoment,
        }
    }

    /// `s`, one for each input channel, and the α it was made with, for layers with these
    /// `(out_features, in_features)` weights and this input.
    ///
    /// # Errors
    /// [`Error::Parameter`] for an α outside 0 to 1; those of
    /// [`Calibration::check_seen`]; if it is searched, those of [`Calibration::second_moment`].
    pub fn scales(
        &self,
        weights: &[MatRef<'_, f32>],
        calibration: &Calibration,
    ) -> Result<(Vec<f32>, f32)> {
        let k = calibration.in_features();
        check_widths(weights, k)?;
        calibration.check_seen(k)?;
        let x_max = calibration.abs_max();
        let mut w_max = vec![1e-5_f32; k];
        for row in weights.iter().flat_map(|w| w.iter_rows()) {
            w_max.iter_mut().zip(row).for_each(|(max, w)| *max = max.max(w.abs()));
        }
        let scales = |alpha: f32| -> Vec<f32> {
            let channels = x_max.iter().zip(&w_max);
            let scale = |(&x, &w): (&f32, &f32)| {
                let (x, w, alpha) = (f64::from(x), f64::from(w), f64::from(alpha));
                let s = if x > 0.0 { x.powf(alpha) / w.powf(1.0 - alpha) } else { 1.0 };
                s.clamp(1e-5, 1e5) as f32
            };
            channels.map(scale).collect()
        };
        let alpha = match self.alpha {
            Alpha::Fixed(alpha) if (0.0..=1.0).contains(&alpha) => alpha,
            Alpha::Fixed(alpha) => {
                let (what, value) = ("alpha of SmoothQuant", f64::from(alpha));
                return Err(Error::Parameter { what, value, expected: "0 to 1" });
            }
            Alpha::Searched => {
                let x_square = calibration.mean_squares()?;
                let mut best = (f64::INFINITY, 0.5);
                for step in 0..=20_u8 {
                    let alpha = f32::from(step) / 20.0;
                    let loss = expected_error(weights, &x_square, &scales(alpha));
                    if loss < best.0 {
                        best = (loss, alpha);
                    }
                }
                best.1
            }
        };
        Ok((scales(alpha), alpha))
    }
}

/// The loss of [`Alpha::Searched`].
fn expected_error(weights: &[MatRef<'_, f32>], x_square: &[f64], s: &[f32]) -> f64 {
    let step_square = |max: f64| (max / 127.0).powi(2) / 12.0;
    let x_square: Vec<_> = x_square.iter().zip(s).map(|(x, &s)| x / f64::from(s).powi(2)).collect();
    let signal: f64 = x_square.iter().sum();
    let x_step = step_square(typical_max(&x_square));
    let mut loss = 0.0;
    for row in weights.iter().flat_map(|w| w.iter_rows()) {
        let (mut max, mut energy) = (0.0_f32, 0.0);
        for (w, s) in row.iter().zip(s) {
            let scaled = w * s;
            max = max.max(scaled.abs());
            energy += f64::from(scaled).powi(2);
        }
        loss += step_square(f64::from(max)) * signal + x_step * energy;
    }
    loss
}

/// The median of the largest magnitude among independent normal numbers with these mean squares.
fn typical_max(squares: &[f64]) -> f64 {
    let live = || squares.iter().filter(|&&square| square > 0.0);
    let below =
        |t: f64| live().map(|square| libm::erf(t / (2.0 * square).sqrt()).ln()).sum::<f64>();
    // Of any number of them, none is 40 deviations away.
    let (mut low, mut high) = (0.0, 40.0 * live().fold(0.0_f64, |max, &x| max.max(x)).sqrt());
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if below(middle) < 0.5_f64.ln() {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}
