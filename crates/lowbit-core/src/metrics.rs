//! How far one tensor is from another. Everything is summed in f64.
//!
//! `x` is the original and `y` what became of it. NaN and infinities are numbers like others here:
//! they come out as a NaN or infinite result, never as a small one.
//!
//! | | formula | empty | both zero | only x zero |
//! |---|---|---|---|---|
//! | [`mse`] | `Σ(x − y)² / n` | 0 | 0 | > 0 |
//! | [`sqnr_db`] | `10·log₁₀(Σx² / Σ(x − y)²)` | ∞ | ∞ | −∞ |
//! | [`cosine_similarity`] | `Σxy / √(Σx²·Σy²)` | 1 | 1 | 0 |
//! | [`max_abs_error`] | `max ǀx − yǀ` | 0 | 0 | > 0 |
//! | [`kl_divergence`] | `Σ p·(ln p − ln q)`, softmax of each | 0 | 0 | ≥ 0 |
//!
//! A matrix without gaps between its rows is measured by its [`data`](crate::Mat::data).
//!
//! # Example
//! ```
//! use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme, metrics};
//!
//! // 6.02 dB for every bit (of a uniform source).
//! let w = Mat::from_fn(16, 256, |r, c| ((r * 256 + c) as f32 * 0.618).fract() - 0.5);
//! for bits in [4, 8] {
//!     let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(bits, Granularity::PerChannel))?;
//!     let db = metrics::sqnr_db(w.data(), q.dequantize().data())?;
//!     assert!((db - 6.02 * f64::from(bits)).abs() < 1.0, "{db}");
//! }
//! # Ok::<(), lowbit_core::Error>(())
//! ```

use crate::{Error, Result};

/// Both slices as pairs of f64.
fn pairs<'a>(x: &'a [f32], y: &'a [f32]) -> Result<impl Iterator<Item = (f64, f64)> + Clone + 'a> {
    if x.len() != y.len() {
        return Err(Error::Length { what: "compared tensor", expected: x.len(), got: y.len() });
    }
    Ok(x.iter().zip(y).map(|(&x, &y)| (f64::from(x), f64::from(y))))
}

/// Mean squared error, `Σ(x − y)² / n`, in squared units of x; 0 without elements.
///
/// # Errors
/// [`Error::Length`] if the slices are not equally long.
///
/// # Example
/// ```
/// assert_eq!(lowbit_core::metrics::mse(&[1.0, 2.0], &[1.0, 4.0])?, 2.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn mse(x: &[f32], y: &[f32]) -> Result<f64> {
    let noise: f64 = pairs(x, y)?.map(|(x, y)| (x - y) * (x - y)).sum();
    Ok(if x.is_empty() { 0.0 } else { noise / x.len() as f64 })
}

/// Signal to quantization noise ratio in decibels, `10·log₁₀(Σx² / Σ(x − y)²)`: the relative error
/// `‖x − y‖/‖x‖` is `10^(−dB/20)`.
///
/// Infinite where there is no noise (also without elements), −∞ where there is noise only.
///
/// # Errors
/// [`Error::Length`] if the slices are not equally long.
///
/// # Example
/// ```
/// let db = lowbit_core::metrics::sqnr_db(&[10.0, -10.0], &[11.0, -9.0])?;
/// assert!((db - 20.0).abs() < 1e-9); // an amplitude of 10 over one of 1
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn sqnr_db(x: &[f32], y: &[f32]) -> Result<f64> {
    let (signal, noise) = pairs(x, y)?
        .fold((0.0, 0.0), |(signal, noise), (x, y)| (signal + x * x, noise + (x - y) * (x - y)));
    Ok(if noise == 0.0 { f64::INFINITY } else { 10.0 * (signal / noise).log10() })
}

/// `Σxy / √(Σx²·Σy²)`: 1 where the two point the same way, whatever their lengths. Two zero vectors
/// (or empty ones) count as the same, 1; one zero vector has nothing in common with another, 0.
///
/// # Errors
/// [`Error::Length`] if the slices are not equally long.
///
/// # Example
/// ```
/// use lowbit_core::metrics::cosine_similarity;
///
/// assert_eq!(cosine_similarity(&[3.0, 4.0], &[6.0, 8.0])?, 1.0);
/// assert_eq!(cosine_similarity(&[1.0, 0.0], &[0.0, 1.0])?, 0.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn cosine_similarity(x: &[f32], y: &[f32]) -> Result<f64> {
    let (xy, xx, yy) = pairs(x, y)?
        .fold((0.0, 0.0, 0.0), |(xy, xx, yy), (x, y)| (xy + x * y, xx + x * x, yy + y * y));
    Ok(match (xx == 0.0, yy == 0.0) {
        (true, true) => 1.0,
        (true, false) | (false, true) => 0.0,
        // Two roots: the product of two large squares might overflow.
        (false, false) => xy / (xx.sqrt() * yy.sqrt()),
    })
}

/// `max |x − y|`, in units of x; 0 without elements. One NaN makes it NaN.
///
/// # Errors
/// [`Error::Length`] if the slices are not equally long.
///
/// # Example
/// ```
/// assert_eq!(lowbit_core::metrics::max_abs_error(&[1.0, 2.0], &[1.5, 2.0])?, 0.5);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn max_abs_error(x: &[f32], y: &[f32]) -> Result<f64> {
    // `f64::max` would drop a NaN.
    Ok(pairs(x, y)?
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |max: f64, error| if error > max || error.is_nan() { error } else { max }))
}

/// `Σ p·(ln p − ln q)` in nats, where p and q are the softmax of the logits `x` and `y`; for logits
/// of many tokens, take the mean over rows. 0 without elements.
///
/// A logit of −∞ is a probability of 0: it adds nothing where p has it, and makes the divergence
/// infinite where only q has it.
///
/// # Errors
/// [`Error::Length`] if the slices are not equally long.
///
/// # Example
/// ```
/// use lowbit_core::metrics::kl_divergence;
///
/// // p = 3/4, 1/4 and q = 1/2, 1/2
/// let kl = kl_divergence(&[3.0_f32.ln(), 0.0], &[7.0, 7.0])?;
/// assert!((kl - (0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln())).abs() < 1e-7);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn kl_divergence(x: &[f32], y: &[f32]) -> Result<f64> {
    let pairs = pairs(x, y)?;
    let (p_norm, q_norm) = (log_sum_exp(x), log_sum_exp(y));
    let terms = pairs.map(|(x, y)| {
        let (ln_p, ln_q) = (x - p_norm, y - q_norm);
        match ln_p.exp() {
            0.0 => 0.0,
            p => p * (ln_p - ln_q),
        }
    });
    // Of no terms `sum` makes −0.
    Ok(terms.sum::<f64>() + 0.0)
}

/// `ln Σ exp(x)`, without overflow: `x − log_sum_exp(x)` is the logarithm of the softmax. −∞ without
/// elements.
///
/// # Example
/// ```
/// let x = [1000.0, 1000.0];
/// assert_eq!(lowbit_core::metrics::log_sum_exp(&x), 1000.0 + 2.0_f64.ln());
/// ```
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if max == f64::NEG_INFINITY && x.iter().all(|x| !x.is_nan()) {
        return max;
    }
    let sum: f64 = x.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    max + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_zero_tensors_have_the_values_of_the_table() {
        let zero = [0.0; 3];
        let one = [0.0, 1.0, 0.0];
        type Metric = fn(&[f32], &[f32]) -> Result<f64>;
        let table: [(Metric, f64, f64, f64); 4] = [
            (mse, 0.0, 0.0, 1.0 / 3.0),
            (sqnr_db, f64::INFINITY, f64::INFINITY, f64::NEG_INFINITY),
            (cosine_similarity, 1.0, 1.0, 0.0),
            (max_abs_error, 0.0, 0.0, 1.0),
        ];
        for (metric, empty, same, noise) in table {
            assert_eq!(metric(&[], &[]), Ok(empty));
            assert_eq!(metric(&zero, &zero), Ok(same));
            assert_eq!(metric(&zero, &one), Ok(noise));
            let error = Error::Length { what: "compared tensor", expected: 3, got: 0 };
            assert_eq!(metric(&zero, &[]), Err(error));
        }
        assert_eq!(kl_divergence(&[], &[]).map(f64::to_bits), Ok(0));
        assert_eq!(kl_divergence(&zero, &zero), Ok(0.0));
        assert!(kl_divergence(&zero, &one[..2]).is_err());
    }

    #[test]
    fn a_nan_is_never_a_small_number() {
        let (x, y) = ([1.0, 2.0, 3.0], [1.0, f32::NAN, 3.0]);
        for metric in [mse, sqnr_db, cosine_similarity, max_abs_error, kl_divergence] {
            assert!(metric(&x, &y).unwrap().is_nan());
            assert!(metric(&y, &x).unwrap().is_nan());
        }
    }

    #[test]
    fn numbers_whose_squares_overflow_f32_are_measured() {
        let (x, y) = ([3e38, -3e38], [2.7e38, -3.3e38]);
        assert!((sqnr_db(&x, &y).unwrap() - 20.0).abs() < 1e-5);
        assert!((cosine_similarity(&x, &x).unwrap() - 1.0).abs() < 1e-12);
        assert!(mse(&x, &y).unwrap().is_finite());
    }

    #[test]
    fn divergence_ignores_a_shift_and_survives_masked_and_extreme_logits() {
        let logits = [1.0_f32, -2.5, 3.0, 0.25];
        assert!(kl_divergence(&logits, &logits.map(|l| l + 64.0)).unwrap().abs() < 1e-12);
        assert_eq!(kl_divergence(&logits, &logits), Ok(0.0));
        assert_eq!(kl_divergence(&[-3e38, 3e38], &[-3e38, 3e38]), Ok(0.0));
        let masked = f32::NEG_INFINITY;
        assert_eq!(kl_divergence(&[masked, 0.0], &[masked, 5.0]), Ok(0.0));
        assert_eq!(kl_divergence(&[0.0, 0.0], &[masked, 0.0]), Ok(f64::INFINITY));
    }
}
