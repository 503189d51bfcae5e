//! Fake quantization for quantization-aware training: the rounding that a deployed model will do,
//! in f32, and the gradients that train through it.
//!
//! Plain functions over slices, for any autodiff framework to wrap: a forward function reads `x`
//! and writes `y`; a gradient function reads the same `x` and `dy`, the gradient of the loss with
//! respect to `y`. What it returns is summed over the slice in f64, from left to right, and rounded
//! once.
//!
//! | trained | forward | gradient of x | gradient of the parameter |
//! |---|---|---|---|
//! | weights only | [`forward`] | [`straight_through`] | none |
//! | scale (LSQ) | [`forward`] | [`straight_through`] | [`scale_gradient`] · [`lsq_gradient_scale`] |
//! | zero-point | [`forward`] | [`straight_through`] | [`zero_gradient`] |
//! | range | [`forward`] on [`Grid::from_range`] | [`straight_through`] | [`range_gradient`] |
//! | clipping level (PACT) | [`forward`] on [`Grid::pact`] | [`pact_gradient`] writes it | [`pact_gradient`] returns it |
//!
//! A function knows one [`Grid`]. For a scale per row or group, call it once for each, as here.
//!
//! # Example
//! One step of learned step size quantization (LSQ) with a scale per row.
//! ```
//! use lowbit_core::Mat;
//! use lowbit_core::fake_quant::{self, Grid};
//!
//! let w = Mat::from_fn(2, 4, |r, c| (r as f32 + 0.5) * (c as f32 - 1.3));
//! let dy = Mat::from_fn(2, 4, |_, c| if c % 2 == 0 { 0.1_f32 } else { -0.2 });
//! let (mut y, mut dw) = (Mat::zeros(2, 4), Mat::zeros(2, 4));
//! let codes = -8..=7;
//! // N is the number of elements of the whole tensor, also where each row has its own scale.
//! let g = fake_quant::lsq_gradient_scale(w.data().len(), 7)?;
//! let rows = w.as_ref().iter_rows().zip(dy.as_ref().iter_rows());
//! for ((w, dy), (y, dw)) in rows.zip(y.data_mut().chunks_mut(4).zip(dw.data_mut().chunks_mut(4))) {
//!     let mut scale = fake_quant::lsq_initial_scale(w, 7)?;
//!     let grid = Grid::new(scale, 0, codes.clone())?;
//!     fake_quant::forward(w, grid, y)?;
//!     fake_quant::straight_through(w, dy, grid, dw)?;
//!     scale -= 0.01 * g * fake_quant::scale_gradient(w, dy, grid)?;
//!     assert!(scale > 0.0);
//! }
//! # Ok::<(), lowbit_core::Error>(())
//! ```

use core::ops::RangeInclusive;

use crate::{Error, Result, rounding::nearest_even};

/// No code is larger than those of 16 bits.
const MAX_CODE: i32 = 65_535;

/// The levels `scale · (code − zero)` for every code from `Qn` to `Qp`: the numbers that fake
/// quantization rounds to. 0 is one of them.
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::Grid;
///
/// let grid = Grid::from_range(-1.0, 3.0, 0..=8)?;
/// assert_eq!((grid.scale(), grid.zero()), (0.5, 2));
/// assert_eq!((grid.code(1.1), grid.value(4)), (4, 1.0));
/// assert_eq!(grid.code(100.0), 8);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    scale: f32,
    zero: i32,
    min: i32,
    max: i32,
}

impl Grid {
    /// The grid of `codes = Qn..=Qp`. A learned zero-point is a real number: round it for this
    /// call, and give [`zero_gradient`] to the real one.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `codes` has fewer than two codes or one beyond ±65,535, or if
    /// `zero` is not one of them; [`Error::Parameter`] if `scale` is zero, negative, infinite or
    /// NaN; [`Error::RealRange`] if the outermost levels are too large for f32.
    pub fn new(scale: f32, zero: i32, codes: RangeInclusive<i32>) -> Result<Self> {
        let (min, max) = (*codes.start(), *codes.end());
        for (what, lo, hi, got) in [
            ("lowest code", -MAX_CODE, MAX_CODE - 1, min),
            ("highest code", min.saturating_add(1), MAX_CODE, max),
            ("zero-point", min, max, zero),
        ] {
            if !(lo..=hi).contains(&got) {
                let [min, max, got] = [lo, hi, got].map(i64::from);
                return Err(Error::OutOfRange { what, min, max, got });
            }
        }
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::not_positive("scale", scale));
        }
        let grid = Self { scale, zero, min, max };
        let (lo, hi) = (grid.value(min), grid.value(max));
        if !(lo.is_finite() && hi.is_finite()) {
            return Err(Error::RealRange { lo, hi });
        }
        Ok(grid)
    }

    /// The grid of a learned range: `scale = (hi − lo) / (Qp − Qn)` and
    /// `zero = Qn + round(−lo / scale)`, so that both ends move by up to half a step.
    ///
    /// # Errors
    /// [`Error::RealRange`] unless `lo <= 0 <= hi` and `lo < hi`, both finite; otherwise as
    /// [`new`](Self::new).
    pub fn from_range(lo: f32, hi: f32, codes: RangeInclusive<i32>) -> Result<Self> {
        if !(lo.is_finite() && hi.is_finite() && lo <= 0.0 && hi >= 0.0 && lo < hi) {
            return Err(Error::RealRange { lo, hi });
        }
        let min = *codes.start();
        Self::new(1.0, min, codes.clone())?; // the codes are fit to count with
        let steps = (codes.end() - min) as f32;
        // hi − lo might overflow; and a positive scale does not become zero.
        let scale = (hi / steps - lo / steps).max(f32::from_bits(1));
        Self::new(scale, min + nearest_even((-lo / scale).min(steps)) as i32, codes)
    }

    /// The grid of PACT: `2^bits` levels from 0 to the clipping level `alpha`, that is
    /// `scale = alpha / (2^bits − 1)`. [`forward`] is then `round(clip(x, 0, alpha) / scale)·scale`
    /// (Choi et al., arXiv:1805.06085, equations 1 and 2), within one rounding of `alpha`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `bits` is not in 1..=16, [`Error::Parameter`] if `alpha` is zero,
    /// negative, infinite or NaN, or too small to be divided.
    pub fn pact(alpha: f32, bits: u8) -> Result<Self> {
        if !(1..=16).contains(&bits) {
            return Err(Error::OutOfRange { what: "bits", min: 1, max: 16, got: bits.into() });
        }
        check_alpha(alpha)?;
        let max = (1 << bits) - 1;
        Self::new(alpha / max as f32, 0, 0..=max)
    }

    /// The distance between two levels.
    pub fn scale(self) -> f32 {
        self.scale
    }

    /// The code of 0.
    pub fn zero(self) -> i32 {
        self.zero
    }

    /// `Qn..=Qp`.
    pub fn codes(self) -> RangeInclusive<i32> {
        self.min..=self.max
    }

    /// `clamp(round(x / scale) + zero, Qn, Qp)`, ties to even: what a deployed model stores. NaN
    /// has the code of 0.
    pub fn code(self, x: f32) -> i32 {
        let (low, high) = self.ends();
        // Clamping to integers first gives the same code, and `round` wants small numbers.
        nearest_even((x / self.scale).clamp(low, high)) as i32 + self.zero
    }

    /// `scale · (code − zero)`, rounded once to f32.
    pub fn value(self, code: i32) -> f32 {
        self.scale * (i64::from(code) - i64::from(self.zero)) as f32
    }

    /// The outermost levels in units of the scale, `Qn − zero` and `Qp − zero`.
    fn ends(self) -> (f32, f32) {
        ((self.min - self.zero) as f32, (self.max - self.zero) as f32)
    }
}

fn check_alpha(alpha: f32) -> Result<()> {
    if alpha.is_finite() && alpha > 0.0 {
        return Ok(());
    }
    Err(Error::not_positive("clipping level", alpha))
}

fn check_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}

fn check_finite(x: &[f32]) -> Result<()> {
    match x.iter().position(|x| !x.is_finite()) {
        Some(col) => Err(Error::NotFinite { what: "x", row: 0, col }),
        None => Ok(()),
    }
}

/// `Σ dy · slope(x)`, after checking both.
fn weighted_sum(x: &[f32], dy: &[f32], slope: impl Fn(f32) -> f32) -> Result<f32> {
    check_length("dy", x.len(), dy.len())?;
    check_finite(x)?;
    let products = x.iter().zip(dy).map(|(&x, &dy)| f64::from(dy) * f64::from(slope(x)));
    Ok(products.fold(0.0, |sum, product| sum + product) as f32)
}

/// Writes every `x` rounded to its nearest level, `y = scale · (clamp(round(x / scale) + zero, Qn,
/// Qp) − zero)`, ties to even: what the deployed model will compute with.
///
/// # Errors
/// [`Error::Length`] if `y` is not as long as `x`, [`Error::NotFinite`] (row 0) at the first NaN or
/// infinity. `y` is not written then.
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::{Grid, forward};
///
/// let mut y = [0.0; 4];
/// forward(&[0.3, 0.8, -9.0, 9.0], Grid::new(0.5, 0, -2..=1)?, &mut y)?;
/// assert_eq!(y, [0.5, 0.5, -1.0, 0.5]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn forward(x: &[f32], grid: Grid, y: &mut [f32]) -> Result<()> {
    check_length("y", x.len(), y.len())?;
    check_finite(x)?;
    for (&x, y) in x.iter().zip(y) {
        *y = grid.value(grid.code(x));
    }
    Ok(())
}

/// The straight-through estimator: `dx = dy` where `Qn <= x / scale + zero <= Qp`, and 0 where `x`
/// lies beyond the outermost levels, which are still inside.
///
/// Rounding counts as the identity and clamping as what it is. `x` is looked at before rounding:
/// half a step beyond the last level there is no gradient, although `x` would round to that level.
/// (Bengio et al., arXiv:1308.3432; the mask as in LSQ, arXiv:1902.08153, equation 5, which leaves
/// out the levels at the ends. They stay in here because a scale chosen as `max|x| / Qp` puts the
/// largest weight there.)
///
/// # Errors
/// [`Error::Length`] if `dy` or `dx` is not as long as `x`, [`Error::NotFinite`] (row 0) at the
/// first NaN or infinity in `x`; those in `dy` pass through. `dx` is not written then.
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::{Grid, straight_through};
///
/// let mut dx = [0.0; 4];
/// straight_through(&[0.3, 0.5, 0.6, -9.0], &[1.0, 2.0, 3.0, 4.0], Grid::new(0.5, 0, -2..=1)?, &mut dx)?;
/// assert_eq!(dx, [1.0, 2.0, 0.0, 0.0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn straight_through(x: &[f32], dy: &[f32], grid: Grid, dx: &mut [f32]) -> Result<()> {
    check_length("dy", x.len(), dy.len())?;
    check_length("dx", x.len(), dx.len())?;
    check_finite(x)?;
    let (low, high) = grid.ends();
    for ((&x, &dy), dx) in x.iter().zip(dy).zip(dx) {
        *dx = if (low..=high).contains(&(x / grid.scale)) { dy } else { 0.0 };
    }
    Ok(())
}

/// The gradient of the scale, `Σ dy · ∂y/∂scale`, with `v = x / scale`:
///
/// ```text
/// ∂y/∂scale = Qn − zero       if v <= Qn − zero
///             Qp − zero       if v >= Qp − zero
///             round(v) − v    otherwise
/// ```
///
/// Esser et al., "Learned Step Size Quantization" (LSQ), arXiv:1902.08153, equation 3, where zero
/// is 0 (and `Qn` is written −Q_N). LSQ trains with this times [`lsq_gradient_scale`].
///
/// # Errors
/// [`Error::Length`] if `dy` is not as long as `x`, [`Error::NotFinite`] (row 0) at the first NaN
/// or infinity in `x`.
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::{Grid, scale_gradient};
///
/// let grid = Grid::new(0.5, 0, -2..=1)?;
/// assert_eq!(scale_gradient(&[0.125, -9.0], &[1.0, 10.0], grid)?, -0.25 - 20.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn scale_gradient(x: &[f32], dy: &[f32], grid: Grid) -> Result<f32> {
    let (low, high) = grid.ends();
    weighted_sum(x, dy, |x| match x / grid.scale {
        v if v <= low => low,
        v if v >= high => high,
        v => nearest_even(v) - v,
    })
}

/// The gradient of the zero-point, `Σ dy · ∂y/∂zero`: 0 inside the range, and `−scale` from the
/// outermost levels on, since a zero-point moves both ends by one step.
///
/// The zero-point's own rounding counts as the identity. (LSQ+, Bhalgat et al., arXiv:2004.09576,
/// trains the offset `−scale · zero` in this way.)
///
/// # Errors
/// As [`scale_gradient`].
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::{Grid, zero_gradient};
///
/// let grid = Grid::new(0.5, 1, 0..=3)?; // levels −0.5 … 1.0
/// assert_eq!(zero_gradient(&[0.3, 4.0, -4.0], &[1.0, 2.0, 5.0], grid)?, -0.5 * 7.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn zero_gradient(x: &[f32], dy: &[f32], grid: Grid) -> Result<f32> {
    let (low, high) = grid.ends();
    weighted_sum(x, dy, |x| match x / grid.scale {
        v if v <= low || v >= high => -grid.scale,
        _ => 0.0,
    })
}

/// The gradients `(Σ dy·∂y/∂lo, Σ dy·∂y/∂hi)` of the two ends given to [`Grid::from_range`]. With
/// `v = x / scale` and `n = Qp − Qn`:
///
/// ```text
/// (∂y/∂lo, ∂y/∂hi) = (1, 0)                               if v <= Qn − zero
///                    (0, 1)                               if v >= Qp − zero
///                    (−(round(v) − v), round(v) − v) / n  otherwise
/// ```
///
/// The chain rule applied to [`scale_gradient`] and [`zero_gradient`]; the zero-point's own
/// rounding counts as the identity.
///
/// # Errors
/// As [`scale_gradient`].
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::{Grid, range_gradient};
///
/// let grid = Grid::from_range(-0.5, 1.5, 0..=4)?; // levels −0.5, 0, … 1.5
/// assert_eq!(range_gradient(&[-8.0, 0.625, 8.0], &[1.0, 1.0, 2.0], grid)?, (1.0625, 1.9375));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn range_gradient(x: &[f32], dy: &[f32], grid: Grid) -> Result<(f32, f32)> {
    let (low, high) = grid.ends();
    let slope = |x: f32, below: f32, above: f32, inside: f32| match x / grid.scale {
        v if v <= low => below,
        v if v >= high => above,
        v => (nearest_even(v) - v) * inside / (high - low),
    };
    let lo = weighted_sum(x, dy, |x| slope(x, 1.0, 0.0, -1.0))?;
    Ok((lo, weighted_sum(x, dy, |x| slope(x, 0.0, 1.0, 1.0))?))
}

/// LSQ's factor on the gradient of a scale, `g = 1 / √(elements · Qp)`, which brings it to the size
/// of the weights' own gradients (arXiv:1902.08153, section 2.2).
///
/// `elements` counts the whole weight tensor, also where each row has a scale.
///
/// # Errors
/// [`Error::OutOfRange`] if `elements` is 0 or `max_code`, `Qp`, is not in 1..=65,535.
///
/// # Example
/// ```
/// assert_eq!(lowbit_core::fake_quant::lsq_gradient_scale(4096, 4)?, 1.0 / 128.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn lsq_gradient_scale(elements: usize, max_code: i32) -> Result<f32> {
    check_counts(elements, max_code)?;
    Ok((1.0 / libm::sqrt(elements as f64 * f64::from(max_code))) as f32)
}

/// LSQ's first scale, `2 · mean|x| / √Qp` (arXiv:1902.08153, section 2.1); 1 if `x` is all zeros.
///
/// # Errors
/// [`Error::OutOfRange`] if `x` is empty or `max_code`, `Qp`, is not in 1..=65,535,
/// [`Error::NotFinite`] (row 0) at the first NaN or infinity.
///
/// # Example
/// ```
/// assert_eq!(lowbit_core::fake_quant::lsq_initial_scale(&[1.0, -3.0, 2.0], 4)?, 2.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn lsq_initial_scale(x: &[f32], max_code: i32) -> Result<f32> {
    check_counts(x.len(), max_code)?;
    check_finite(x)?;
    let sum = x.iter().fold(0.0, |sum, &x| sum + f64::from(x.abs()));
    if sum == 0.0 {
        return Ok(1.0);
    }
    let scale = 2.0 * (sum / x.len() as f64) / libm::sqrt(f64::from(max_code));
    Ok((scale as f32).clamp(f32::from_bits(1), f32::MAX))
}

fn check_counts(elements: usize, max_code: i32) -> Result<()> {
    let elements = i64::try_from(elements).unwrap_or(i64::MAX);
    for (what, max, got) in
        [("elements", i64::MAX, elements), ("highest code", MAX_CODE.into(), max_code.into())]
    {
        if !(1..=max).contains(&got) {
            return Err(Error::OutOfRange { what, min: 1, max, got });
        }
    }
    Ok(())
}

/// PACT's gradients: writes `dx = dy` where `0 <= x < alpha` and 0 elsewhere, and returns the
/// gradient of the clipping level, the sum of the `dy` where `x >= alpha` (Choi et al., "PACT:
/// Parameterized Clipping Activation for Quantized Neural Networks", arXiv:1805.06085, equations 1
/// and 3). PACT adds an L2 penalty on `alpha`, which is the caller's.
///
/// [`forward`] on [`Grid::pact`] is what this is the gradient of.
///
/// # Errors
/// [`Error::Parameter`] for an impossible `alpha`; otherwise as [`straight_through`].
///
/// # Example
/// ```
/// use lowbit_core::fake_quant::pact_gradient;
///
/// let mut dx = [0.0; 4];
/// let dalpha = pact_gradient(&[-1.0, 0.5, 2.0, 7.0], &[1.0, 2.0, 3.0, 4.0], 2.0, &mut dx)?;
/// assert_eq!((dx, dalpha), ([0.0, 2.0, 0.0, 0.0], 7.0));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn pact_gradient(x: &[f32], dy: &[f32], alpha: f32, dx: &mut [f32]) -> Result<f32> {
    check_alpha(alpha)?;
    check_length("dx", x.len(), dx.len())?;
    let dalpha = weighted_sum(x, dy, |x| if x >= alpha { 1.0 } else { 0.0 })?;
    for ((x, &dy), dx) in x.iter().zip(dy).zip(dx) {
        *dx = if (0.0..alpha).contains(x) { dy } else { 0.0 };
    }
    Ok(dalpha)
}
