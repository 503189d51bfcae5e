//! Integer-only inference: layers that multiply, add bias, rescale and apply ReLU without a
//! floating-point instruction (Jacob et al., arXiv:1712.05877, section 2).
//!
//! ```text
//! numbers   x = Sx·(X − Zx)      w = Sw·(W − Zw)      y = Sy·(Y − Zy)
//! layer     acc = Σ_k (X − Zx)·(W − Zw) + round(bias / (Sx·Sw))         i32, exact
//!           Y   = clamp(Zy + round(M·acc))      M = Sx·Sw / Sy          M = q31·2^(shift − 31)
//! ```
//!
//! Before deployment, [`Multiplier::new`] and [`quantize_bias`] turn the real scales into integers.
//! Afterwards [`matmul`] and [`requantize`] are all that runs; ReLU is a clamp. In this module
//! clippy's `float_arithmetic` is an error, with `quantize_bias` as the one exception.
//!
//! # Example
//! One layer with two inputs, two outputs and ReLU; `examples/integer_mlp.rs` has a whole network.
//! ```
//! use lowbit_core::integer::{Multiplier, RequantRounding, matmul, quantize_bias, requantize};
//! use lowbit_core::{Mat, MatRef};
//!
//! // x = 0.5·(X − 128), w = 0.25·W, y = 0.5·(Y − 3)
//! let mut bias = [0; 2];
//! quantize_bias(&[1.0, -2.0], 0.5, &[0.25], &mut bias)?;
//! assert_eq!(bias, [8, -16]);
//! let multiplier = Multiplier::new(0.5 * 0.25 / 0.5)?;
//!
//! let x = MatRef::new(&[130_u8, 127], 1, 2)?; // 1.0 and −0.5
//! let w = MatRef::new(&[8_i8, 4, -8, 4], 2, 2)?; // [2, 1], [−2, 1]
//! let mut acc = Mat::zeros(1, 2);
//! matmul(x, 128, w, &[0], Some(&bias), acc.as_mut())?;
//! assert_eq!(acc.data(), [20, -36]); // 2.5 and −4.5, in units of 0.5·0.25
//!
//! let mut y = Mat::zeros(1, 2);
//! let relu = 3..=255_u8; // nothing below the zero-point
//! requantize(acc.as_ref(), &[multiplier], RequantRounding::Single, 3, relu, y.as_mut())?;
//! assert_eq!(y.data(), [8, 3]); // 2.5 and 0
//! # Ok::<(), lowbit_core::Error>(())
//! ```
#![deny(clippy::float_arithmetic)]

use alloc::vec::Vec;
use core::ops::RangeInclusive;

use crate::{Error, MatMut, MatRef, Result};

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for i8 {}
}

/// An 8-bit code: `u8` or `i8`.
///
/// # Example
/// ```
/// use lowbit_core::integer::Code;
///
/// assert_eq!((u8::saturate(-7), i8::saturate(200)), (0, 127));
/// ```
pub trait Code: Copy + Ord + Into<i32> + sealed::Sealed {
    /// The code nearest to `value`.
    fn saturate(value: i32) -> Self;
}

impl Code for u8 {
    #[inline]
    fn saturate(value: i32) -> Self {
        value.clamp(0, 255) as Self
    }
}

impl Code for i8 {
    #[inline]
    fn saturate(value: i32) -> Self {
        value.clamp(-128, 127) as Self
    }
}

/// The largest `|code − zero|`.
fn reach<T: Code>(zero: T) -> i64 {
    let zero: i32 = zero.into();
    let (min, max) = (T::saturate(i32::MIN).into(), T::saturate(i32::MAX).into());
    i64::from((zero - min).max(max - zero))
}

/// How [`Multiplier::apply`] rounds `multiplier · acc`.
///
/// The two differ by at most 1, in few results, while `acc·2^shift` fits an i32; beyond, `TwoStep`
/// saturates first. A model gives the same bits elsewhere only if both
/// sides use the same rule, so a file should say which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequantRounding {
    /// The two roundings of gemmlowp and of TFLite's default build.
    ///
    /// 1. `SaturatingRoundingDoublingHighMul`, `t = round(acc·2^max(shift, 0)·q31 / 2^31)`, ties
    ///    towards +∞ (NEON's `sqrdmulh`); the shifted `acc` saturates to i32;
    /// 2. `RoundingDivideByPOT`, `round(t / 2^max(−shift, 0))`, ties away from zero.
    TwoStep,
    /// One rounding of the exact product, ties towards +∞: `⌊acc·q31·2^(shift − 31) + 1/2⌋`,
    /// saturating to i32. TFLite's `TFLITE_SINGLE_ROUNDING`.
    Single,
}

/// A positive real number as `q31 · 2^(shift − 31)`, with `q31` in `2^30..2^31`: 31 significant
/// bits, by which integers are multiplied with integers alone.
///
/// `shift` lies in −31..=30, so the number lies in `2^−32..2^30`. Source: Jacob et al.,
/// arXiv:1712.05877, section 2.2.
///
/// # Example
/// ```
/// use lowbit_core::integer::{Multiplier, RequantRounding};
///
/// let third = Multiplier::new(1.0 / 3.0)?;
/// assert_eq!((third.q31(), third.shift()), (1_431_655_765, -1));
/// assert_eq!(third.apply(100, RequantRounding::Single), 33);
///
/// // The first rounding makes 0.4995 · 5 = 2.4975 a tie, which the second one takes upwards.
/// let m = Multiplier::new(0.4995)?;
/// assert_eq!(m.apply(5, RequantRounding::Single), 2);
/// assert_eq!(m.apply(5, RequantRounding::TwoStep), 3);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
// Eq and Hash: no field is a float.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Multiplier {
    q31: i32,
    shift: i32,
}

impl Multiplier {
    /// The nearest multiplier to `value`, ties away from zero; `Sx·Sw / Sy` for a layer.
    ///
    /// # Errors
    /// [`Error::Parameter`] if `value` is zero, negative, infinite or NaN;
    /// [`Error::OutOfRange`] with the shift it would need if it is outside `2^−32..2^30`.
    pub fn new(value: f64) -> Result<Self> {
        if !(value.is_finite() && value > 0.0) {
            return Err(Error::not_positive("multiplier", value));
        }
        // value = significand · 2^(exponent − 52). (Not for subnormal numbers, but their shift is
        // far out of range all the same.)
        let exponent = (value.to_bits() >> 52) as i32 - 1023;
        let significand = value.to_bits() & ((1 << 52) - 1) | 1 << 52;
        let q31 = (significand + (1 << 21)) >> 22;
        if q31 == 1 << 31 {
            return Self::from_parts(1 << 30, exponent + 2);
        }
        Self::from_parts(q31 as i32, exponent + 1)
    }

    /// The multiplier `q31 · 2^(shift − 31)`, as stored in a file.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `q31` is below `2^30` or `shift` outside −31..=30.
    pub fn from_parts(q31: i32, shift: i32) -> Result<Self> {
        for (what, min, max, got) in [
            ("q31 of a multiplier", 1 << 30, i32::MAX, q31),
            ("shift of a multiplier", -31, 30, shift),
        ] {
            if !(min..=max).contains(&got) {
                let [min, max, got] = [min, max, got].map(i64::from);
                return Err(Error::OutOfRange { what, min, max, got });
            }
        }
        Ok(Self { q31, shift })
    }

    /// The significant bits, in `2^30..2^31`.
    pub fn q31(self) -> i32 {
        self.q31
    }

    /// The exponent, in −31..=30: negative shifts to the right.
    pub fn shift(self) -> i32 {
        self.shift
    }

    /// `round(self · acc)`, saturating to i32.
    ///
    /// Off from `value · acc`, for the `value` given to [`new`](Self::new), by at most
    /// `1/2 + |acc|·2^(shift − 32)`; [`TwoStep`](RequantRounding::TwoStep) adds at most
    /// `2^−(max(−shift, 0) + 1)`. (Unless it saturates, which takes a positive `shift`.)
    #[inline]
    pub fn apply(self, acc: i32, rounding: RequantRounding) -> i32 {
        match rounding {
            RequantRounding::TwoStep => {
                let shifted = saturate(i64::from(acc) << self.shift.max(0));
                divide_by_power_of_two(doubling_high_mul(shifted, self.q31), (-self.shift).max(0))
            }
            RequantRounding::Single => {
                let product = i64::from(acc) * i64::from(self.q31); // below 2^62
                saturate((product + (1 << (30 - self.shift))) >> (31 - self.shift))
            }
        }
    }
}

#[inline]
fn saturate(value: i64) -> i32 {
    value.clamp(i32::MIN.into(), i32::MAX.into()) as i32
}

/// gemmlowp's `SaturatingRoundingDoublingHighMul`: `round(a·b / 2^31)`, ties towards +∞. Only
/// `i32::MIN` squared saturates.
#[inline]
fn doubling_high_mul(a: i32, b: i32) -> i32 {
    saturate((i64::from(a) * i64::from(b) + (1 << 30)) >> 31)
}

/// gemmlowp's `RoundingDivideByPOT`: `round(x / 2^n)`, ties away from zero, for `n` in 0..=31.
#[inline]
fn divide_by_power_of_two(x: i32, n: i32) -> i32 {
    let half = (1_i64 << n) >> 1;
    let magnitude = (i64::from(x).abs() + half) >> n;
    saturate(if x < 0 { -magnitude } else { magnitude })
}

/// Checks that `values` has one element for all `n` columns, or one for each.
fn check_per_column<T>(what: &'static str, values: &[T], n: usize) -> Result<()> {
    if values.len() == 1 || values.len() == n {
        return Ok(());
    }
    Err(Error::Length { what, expected: n, got: values.len() })
}

/// The element for column `j`, after [`check_per_column`].
#[inline]
fn per_column<T: Copy>(values: &[T], j: usize) -> T {
    if values.len() == 1 { values[0] } else { values[j] }
}

fn check_shape(what: &'static str, expected: (usize, usize), got: (usize, usize)) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Shape { what, expected, got }) }
}

/// Writes `round(bias / (input_scale · weight_scale))`, ties to even, to `codes`: the bias in the
/// unit of the accumulators, with zero-point 0 (Jacob et al., section 2.4). Runs before deployment,
/// in f64.
///
/// `weight_scales` has one element for all outputs, or one for each.
///
/// # Errors
/// [`Error::Length`] if `codes` or `weight_scales` do not fit `bias`, [`Error::Parameter`] for an
/// impossible scale, [`Error::NotFinite`] (row 0) and [`Error::BiasOverflow`] with the position of
/// the first such bias. `codes` is not written then.
///
/// # Example
/// ```
/// use lowbit_core::{Error, integer::quantize_bias};
///
/// let mut codes = [0; 2];
/// quantize_bias(&[0.75, -3.0], 0.5, &[0.5, 0.25], &mut codes)?;
/// assert_eq!(codes, [3, -24]);
///
/// let too_large = quantize_bias(&[0.0, 1e9], 0.5, &[0.5], &mut codes).unwrap_err();
/// assert_eq!(too_large, Error::BiasOverflow { index: 1, bias: 1e9, scale: 0.25 });
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[expect(clippy::float_arithmetic, reason = "runs before deployment")]
pub fn quantize_bias(
    bias: &[f32],
    input_scale: f32,
    weight_scales: &[f32],
    codes: &mut [i32],
) -> Result<()> {
    if codes.len() != bias.len() {
        return Err(Error::Length { what: "bias codes", expected: bias.len(), got: codes.len() });
    }
    check_per_column("weight scales", weight_scales, bias.len())?;
    let weights = weight_scales.iter().map(|&scale| ("weight scale", scale));
    for (what, scale) in weights.chain([("input scale", input_scale)]) {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::not_positive(what, scale));
        }
    }
    let code = |index: usize| {
        // The product of two f32 is exact in f64, and not subnormal.
        let scale = f64::from(input_scale) * f64::from(per_column(weight_scales, index));
        let bias = bias[index];
        if !bias.is_finite() {
            return Err(Error::NotFinite { what: "bias", row: 0, col: index });
        }
        let steps = f64::from(bias) / scale;
        const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 · 2^52: the sum has a unit of exactly 1
        let code = (steps.clamp(-1e10, 1e10) + MAGIC) - MAGIC;
        if !(f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&code) {
            return Err(Error::BiasOverflow { index, bias, scale });
        }
        Ok(code as i32)
    };
    for index in 0..bias.len() {
        code(index)?;
    }
    for (index, to) in codes.iter_mut().enumerate() {
        *to = code(index)?;
    }
    Ok(())
}

/// Writes `acc[i][j] = Σ_k (x[i][k] − x_zero)·(w[j][k] − w_zero[j]) + bias[j]`, exactly, where `x`
/// is `(m, k)`, `w` is `(n, k)` and `acc` is `(m, n)`.
///
/// `w_zeros` has one zero-point for all rows of `w`, or one for each; `bias` has `n` elements,
/// from [`quantize_bias`]. The sum is computed without subtracting anything from a code
/// (Jacob et al., section 2.3):
///
/// ```text
/// acc = Σ x·w − w_zero·Σ x − x_zero·Σ w + k·x_zero·w_zero + bias
/// ```
///
/// so that a fast kernel multiplies stored bytes, with `Σ x` of each row of `x` and `Σ w` of each
/// row of `w` summed once. This is the reference for such kernels.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Length`] if the operands do not fit, [`Error::OutOfRange`] if some
/// `x` and `w` of this `k` could overflow i32: `k` may be at most
/// `(2^31 − 1 − max|bias|) / (max|x − x_zero| · max|w − w_zero|)`, over all codes of the two types.
/// With both zero-points 0 and no bias that is 65,793 for `u8 × i8` and 131,071 for `i8 × i8`.
/// `acc` is not written then.
///
/// # Example
/// ```
/// use lowbit_core::{Mat, MatRef, integer::matmul};
///
/// let x = MatRef::new(&[3_u8, 0, 255], 1, 3)?;
/// let w = MatRef::new(&[1_i8, -1, 2, 0, 5, -128], 2, 3)?;
/// let mut acc = Mat::zeros(1, 2);
/// matmul(x, 1, w, &[0, 5], None, acc.as_mut())?;
/// assert_eq!(acc.data(), [2 + 1 + 508, -10 - 254 * 133]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn matmul<X: Code, W: Code>(
    x: MatRef<'_, X>,
    x_zero: X,
    w: MatRef<'_, W>,
    w_zeros: &[W],
    bias: Option<&[i32]>,
    mut acc: MatMut<'_, i32>,
) -> Result<()> {
    let (m, k, n) = (x.rows(), x.cols(), w.rows());
    check_shape("weight", (n, k), w.shape())?;
    check_shape("accumulators", (m, n), acc.shape())?;
    check_per_column("weight zero-points", w_zeros, n)?;
    if let Some(bias) = bias
        && bias.len() != n
    {
        return Err(Error::Length { what: "bias", expected: n, got: bias.len() });
    }

    let largest_bias = bias.unwrap_or(&[]).iter().map(|b| i64::from(b.unsigned_abs())).max();
    let largest_product = reach(x_zero) * w_zeros.iter().map(|&z| reach(z)).max().unwrap_or(1);
    let max = (i64::from(i32::MAX) - largest_bias.unwrap_or(0)).max(0) / largest_product;
    let got = i64::try_from(k).unwrap_or(i64::MAX);
    if got > max {
        return Err(Error::OutOfRange { what: "in_features of an i32 sum", min: 0, max, got });
    }

    // The terms may pass 2^31 although their sum does not. (A kernel may let its i32 wrap around:
    // modulo 2^32 the sum is the same.)
    let sum = |row: &[W]| row.iter().map(|&w| i64::from(w.into())).sum::<i64>();
    let w_sums: Vec<i64> = w.iter_rows().map(sum).collect();
    let x_zero = i64::from(x_zero.into());
    for (x, acc) in x.iter_rows().zip(acc.iter_rows_mut()) {
        let x_sum: i64 = x.iter().map(|&x| i64::from(x.into())).sum();
        for (j, (w, acc)) in w.iter_rows().zip(acc).enumerate() {
            let w_zero = i64::from(per_column(w_zeros, j).into());
            let dot: i64 = x.iter().zip(w).map(|(&x, &w)| i64::from(x.into() * w.into())).sum();
            let bias = bias.map_or(0, |bias| i64::from(bias[j]));
            let sum = dot - w_zero * x_sum - x_zero * w_sums[j] + got * x_zero * w_zero + bias;
            *acc = saturate(sum); // fits, as checked above
        }
    }
    Ok(())
}

/// Writes `codes[i][j] = clamp(zero + round(multiplier[j] · acc[i][j]))`, both matrices `(m, n)`:
/// the accumulators of [`matmul`] become the next layer's input (Jacob et al., section 2.4).
///
/// `multipliers` has one element for all columns, or one for each. `clamp` fuses the activation:
/// `zero..=MAX` is ReLU, `zero..=c` with `c` the code of 6 is ReLU6, all codes is none.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Length`] if the operands do not fit, [`Error::OutOfRange`] if
/// `clamp` is empty. `codes` is not written then.
///
/// # Example
/// ```
/// use lowbit_core::integer::{Multiplier, RequantRounding, requantize};
/// use lowbit_core::{Mat, MatRef};
///
/// let acc = MatRef::new(&[-1000, 50, 100_000], 1, 3)?;
/// let mut codes = Mat::zeros(1, 3);
/// let tenth = Multiplier::new(0.1)?;
/// requantize(acc, &[tenth], RequantRounding::TwoStep, -28, -128..=127_i8, codes.as_mut())?;
/// assert_eq!(codes.data(), [-128, -23, 127]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn requantize<T: Code>(
    acc: MatRef<'_, i32>,
    multipliers: &[Multiplier],
    rounding: RequantRounding,
    zero: T,
    clamp: RangeInclusive<T>,
    mut codes: MatMut<'_, T>,
) -> Result<()> {
    check_shape("codes", acc.shape(), codes.shape())?;
    check_per_column("multipliers", multipliers, acc.cols())?;
    let (min, max) = (*clamp.start(), *clamp.end());
    if min > max {
        let [min, max, got] = [min.into(), T::saturate(i32::MAX).into(), max.into()].map(i64::from);
        return Err(Error::OutOfRange { what: "upper end of the clamp", min, max, got });
    }
    for (acc, codes) in acc.iter_rows().zip(codes.iter_rows_mut()) {
        for (j, (&acc, code)) in acc.iter().zip(codes).enumerate() {
            let steps = per_column(multipliers, j).apply(acc, rounding);
            *code = T::saturate(steps.saturating_add(zero.into())).clamp(min, max);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From `o02_requant.json`: exact integer arithmetic in Python, after gemmlowp's definitions.
    #[test]
    fn both_roundings_of_gemmlowp_are_its_own() {
        for (a, b, expected) in [
            (i32::MIN, i32::MIN, i32::MAX),
            (i32::MIN, i32::MAX, -i32::MAX),
            (i32::MAX, i32::MAX, i32::MAX - 1),
            (1, 1 << 30, 1),
            (-1, 1 << 30, 0),
            (3, 1 << 30, 2),
            (-3, 1 << 30, -1),
            (5, 1 << 29, 1),
            (-5, 1 << 29, -1),
            (0, 7, 0),
            (12_345_678, -87_654_321, -503_916),
        ] {
            assert_eq!(doubling_high_mul(a, b), expected, "{a} {b}");
        }
        for (x, n, expected) in [
            (5, 1, 3),
            (-5, 1, -3),
            (7, 2, 2),
            (-7, 2, -2),
            (6, 2, 2),
            (-6, 2, -2),
            (-2, 2, -1),
            (2, 2, 1),
            (1, 1, 1),
            (-1, 1, -1),
            (-3, 1, -2),
            (0, 5, 0),
            (i32::MIN, 0, i32::MIN),
            (i32::MIN, 31, -1),
            (i32::MAX, 31, 1),
            ((1 << 30) - 1, 31, 0),
        ] {
            assert_eq!(divide_by_power_of_two(x, n), expected, "{x} {n}");
        }
    }
}
