//! Which numbers a grid should reach: functions over data, and [`Histogram`], the state that
//! stands for data too large to keep.
//!
//! A range is `(lo, hi)`. Symmetric grids need only `amax = max(|lo|, |hi|)`; the functions for
//! them end in `_abs`.
//!
//! # Example
//! ```
//! use lowbit_core::range::{self, Histogram};
//!
//! let x = [-1.0, 0.25, 0.5, 8.0];
//! assert_eq!(range::min_max(&x)?, (-1.0, 8.0));
//! assert_eq!(range::percentile_abs(&x, 50.0)?, 0.75);
//!
//! // The same batches in any order and grouping give the same histogram.
//! let mut a = Histogram::new();
//! a.observe(&x)?;
//! let mut b = Histogram::new();
//! b.observe(&[-3.0; 100])?;
//! b.merge(&a);
//! assert_eq!((b.count(), b.min_max()), (104, (-3.0, 8.0)));
//! # Ok::<(), lowbit_core::Error>(())
//! ```
//!
//! Sources: the percentile and entropy calibrators of TensorRT as published in
//! pytorch-quantization; Jacob et al., arXiv:1712.05877, section 3.1, for moving averages.

use alloc::{vec, vec::Vec};

use pulp::{Simd, WithSimd};

use crate::{Error, Result, simd};

/// The smallest and the largest element.
///
/// # Errors
/// [`Error::Empty`] without elements, [`Error::NotFinite`] (row 0) at the first NaN or infinity.
pub fn min_max(x: &[f32]) -> Result<(f32, f32)> {
    if x.is_empty() {
        return Err(Error::Empty { what: "numbers to take the range of" });
    }
    let extent = Extent::best(x);
    if extent.is_finite() {
        return Ok(extent.ends());
    }
    let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
    Err(Error::NotFinite { what: "number", row: 0, col })
}

/// The smallest range around the median that keeps `percent` of the elements: half of what is cut
/// off is cut from each tail.
///
/// # Errors
/// [`Error::Parameter`] outside (0, 100], and those of [`min_max`].
pub fn percentile(x: &[f32], percent: f64) -> Result<(f32, f32)> {
    let tail = check_percent(percent).map(|p| (100.0 - p) / 2.0)?;
    min_max(x)?;
    let mut x = x.to_vec();
    Ok((quantile(&mut x, tail / 100.0), quantile(&mut x, 1.0 - tail / 100.0)))
}

/// The `amax` below which `percent` of the `|x|` lie, interpolated linearly between two elements.
///
/// # Errors
/// As [`percentile`].
pub fn percentile_abs(x: &[f32], percent: f64) -> Result<f32> {
    let percent = check_percent(percent)?;
    min_max(x)?;
    let mut x: Vec<f32> = x.iter().map(|x| x.abs()).collect();
    Ok(quantile(&mut x, percent / 100.0))
}

/// The average of ranges that forgets: each new batch moves both ends a share `momentum` of the
/// way to the batch's own; the first one sets them. It depends on the order of the batches.
///
/// # Errors
/// [`Error::Parameter`] if `momentum` is outside (0, 1], or an end of a range is not a finite
/// number or above the other end.
///
/// # Example
/// ```
/// use lowbit_core::range::moving_average;
///
/// let first = moving_average(None, (-1.0, 3.0), 0.01)?;
/// assert_eq!(first, (-1.0, 3.0));
/// assert_eq!(moving_average(Some(first), (-2.0, 3.0), 0.5)?, (-1.5, 3.0));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn moving_average(
    average: Option<(f32, f32)>,
    batch: (f32, f32),
    momentum: f32,
) -> Result<(f32, f32)> {
    if !(momentum > 0.0 && momentum <= 1.0) {
        let value = f64::from(momentum);
        return Err(Error::Parameter {
            what: "momentum",
            value,
            expected: "more than 0, at most 1",
        });
    }
    for (lo, hi) in average.into_iter().chain([batch]) {
        check_range((lo, hi))?;
    }
    // Weighed, not added to: a sum of two parts that cannot cancel.
    let mix = |old: f32, new: f32| {
        let momentum = f64::from(momentum);
        ((1.0 - momentum) * f64::from(old) + momentum * f64::from(new)) as f32
    };
    Ok(match average {
        None => batch,
        Some((lo, hi)) => (mix(lo, batch.0), mix(hi, batch.1)),
    })
}

/// How many of a histogram's bins of `|x|` to keep so that, quantized to `levels` magnitudes, the
/// distribution loses the least information: the entropy calibration of TensorRT.
///
/// For every candidate of `levels` bins or more, the reference P is the histogram with all that
/// lies beyond added to the last bin, and Q the histogram without it, merged into `levels` groups
/// of bins whose counts are spread evenly over those of their bins that are not empty. The
/// smallest `KL(P‖Q)` wins, the longest of equals. The first bin counts as much as the second, so
/// that a spike at zero does not decide. int8 has 128 magnitudes.
///
/// # Errors
/// [`Error::Empty`] without counts, [`Error::Parameter`] if `levels` is 0.
///
/// # Example
/// ```
/// // A bell with one far outlier: it is cut off.
/// let mut bins = vec![0; 512];
/// (0..200).for_each(|i| bins[i] = 1000 - 5 * i as u64);
/// bins[511] = 1;
/// assert!(lowbit_core::range::entropy_bins(&bins, 128)? < 300);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn entropy_bins(bins: &[u64], levels: usize) -> Result<usize> {
    if bins.iter().all(|&count| count == 0) {
        return Err(Error::Empty { what: "histogram" });
    }
    if levels == 0 {
        return Err(Error::Parameter { what: "levels", value: 0.0, expected: "at least 1" });
    }
    let mut h: Vec<f64> = bins.iter().map(|&count| count as f64).collect();
    if let [first, second, ..] = &mut h[..] {
        *first = *second;
    }
    let mut best = (f64::INFINITY, h.len());
    let mut beyond: f64 = 0.0;
    for kept in (levels..=h.len()).rev() {
        // Only a strictly smaller divergence wins: the longest of equals was seen first.
        let divergence = divergence(&h[..kept], beyond, levels);
        if divergence < best.0 {
            best = (divergence, kept);
        }
        beyond += h[kept - 1];
    }
    Ok(best.1)
}

/// `KL(P‖Q)` of [`entropy_bins`], both normalised; infinite where Q says that P is impossible.
fn divergence(h: &[f64], beyond: f64, levels: usize) -> f64 {
    let inside: f64 = h.iter().sum();
    let total = inside + beyond;
    if inside == 0.0 {
        return f64::INFINITY;
    }
    let mut sum = 0.0;
    let mut start = 0;
    for level in 0..levels {
        // Bin j belongs to level floor(j · levels / len).
        let end = ((level + 1) * h.len()).div_ceil(levels);
        let bins = &h[start..end];
        let filled = bins.iter().filter(|&&x| x != 0.0).count();
        let q = bins.iter().sum::<f64>() / filled.max(1) as f64 / inside;
        for (j, &x) in bins.iter().enumerate() {
            let last = start + j + 1 == h.len();
            let p = (if last { x + beyond } else { x }) / total;
            if p != 0.0 {
                sum += if x == 0.0 { f64::INFINITY } else { p * libm::log(p / q) };
            }
        }
        start = end;
    }
    sum
}

/// Counts of numbers in bins of equal width: a stream's stand-in for percentiles and searches.
///
/// The width is a power of two, doubled when a number lies beyond the last bin, by adding
/// neighbours. So what has been counted does not depend on the order in which it came, and
/// [`merge`](Self::merge) is exact: associative, commutative, and the same as one long stream.
/// The largest magnitude lies in the upper half of the bins, whose width is therefore between
/// 1/2048 and 1/4096 of it. Memory: 64 KiB. (Counts end at 2^64 − 1.)
///
/// # Example
/// See [the module](self).
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Counts of negative numbers and of the others, by magnitude.
    sides: [Vec<u64>; 2],
    /// Bins are 2^exponent wide; without a number other than 0 there is none.
    exponent: Option<i32>,
    range: (f32, f32),
    count: u64,
}

/// Bins of each sign.
const BINS: usize = 4096;

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// No numbers.
    pub fn new() -> Self {
        let side = || vec![0; BINS];
        Self {
            sides: [side(), side()],
            exponent: None,
            range: (f32::INFINITY, f32::NEG_INFINITY),
            count: 0,
        }
    }

    /// Counts the numbers of `x`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] (row 0) at the first NaN or infinity; nothing is counted then.
    pub fn observe(&mut self, x: &[f32]) -> Result<()> {
        if x.is_empty() {
            return Ok(());
        }
        let (lo, hi) = min_max(x)?;
        let amax = hi.max(-lo);
        if amax > 0.0 {
            self.widen(exponent_for(amax));
        }
        self.range = (self.range.0.min(lo), self.range.1.max(hi));
        self.count = self.count.saturating_add(x.len() as u64);
        let width = self.width();
        for &x in x {
            // Exact: the width is a power of two. At most BINS − 1, by the choice of the width.
            let bin = (f64::from(x.abs()) / width) as usize;
            let count = &mut self.sides[usize::from(x >= 0.0)][bin.min(BINS - 1)];
            *count = count.saturating_add(1);
        }
        Ok(())
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        if let Some(exponent) = other.exponent {
            self.widen(exponent);
        }
        if let Some(exponent) = self.exponent {
            other.widen(exponent);
        }
        for (to, from) in self.sides.iter_mut().flatten().zip(other.sides.iter().flatten()) {
            *to = to.saturating_add(*from);
        }
        self.range = (self.range.0.min(other.range.0), self.range.1.max(other.range.1));
        self.count = self.count.saturating_add(other.count);
    }

    /// Numbers counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The smallest and the largest number, exactly; `(0, 0)` before the first.
    pub fn min_max(&self) -> (f32, f32) {
        if self.count == 0 { (0.0, 0.0) } else { self.range }
    }

    /// Counts of `|x|` in bins of [`width`](Self::width), up to the last one that has any.
    pub fn abs_bins(&self) -> Vec<u64> {
        let mut bins: Vec<u64> =
            self.sides[0].iter().zip(&self.sides[1]).map(|(a, b)| a.saturating_add(*b)).collect();
        bins.truncate(bins.iter().rposition(|&count| count != 0).map_or(0, |last| last + 1));
        bins
    }

    /// The width of a bin; 1 while only zeros have been counted.
    pub fn width(&self) -> f64 {
        libm::exp2(f64::from(self.exponent.unwrap_or(0)))
    }

    /// The `amax` below which `percent` of the `|x|` lie: the right edge of the bin in which that
    /// share is reached, never more than the largest `|x|`.
    ///
    /// # Errors
    /// [`Error::Parameter`] outside (0, 100], [`Error::Empty`] before the first number.
    pub fn percentile_abs(&self, percent: f64) -> Result<f32> {
        let share = check_percent(percent)? / 100.0;
        let bins = self.filled()?;
        let target = share * self.count as f64;
        let mut sum = 0_u64;
        for (bin, &count) in bins.iter().enumerate() {
            sum = sum.saturating_add(count);
            if sum as f64 >= target {
                return Ok(self.edge(bin + 1));
            }
        }
        Ok(self.edge(bins.len()))
    }

    /// The range that keeps `percent` of the numbers, half of what is cut off cut from each tail, out
    /// to the edges of its bins: [`percentile`] to a bin.
    ///
    /// # Errors
    /// As [`percentile_abs`](Self::percentile_abs).
    pub fn percentile(&self, percent: f64) -> Result<(f32, f32)> {
        let tail = (100.0 - check_percent(percent)?) / 200.0 * self.count as f64;
        self.filled()?;
        let [negative, positive] = &self.sides;
        // From the far end of a side inwards, then through the other one outwards.
        let end = |far: &[u64], near: &[u64]| {
            let mut cut = 0_u64;
            for (bin, &count) in far.iter().enumerate().rev() {
                cut = cut.saturating_add(count);
                if cut as f64 > tail {
                    return (bin as f64 + 1.0) * self.width();
                }
            }
            for (bin, &count) in near.iter().enumerate() {
                cut = cut.saturating_add(count);
                if cut as f64 > tail {
                    return -(bin as f64) * self.width();
                }
            }
            0.0
        };
        let (lo, hi) = self.min_max();
        let (low, high) = (-end(negative, positive) as f32, end(positive, negative) as f32);
        Ok((low.max(lo), high.min(hi)))
    }

    /// The `amax` that [`entropy_bins`] chooses for a grid of `levels` magnitudes (128 for int8).
    ///
    /// # Errors
    /// As [`entropy_bins`].
    pub fn entropy_abs(&self, levels: usize) -> Result<f32> {
        self.filled()?;
        Ok(self.edge(entropy_bins(&self.abs_bins(), levels)?))
    }

    /// The `amax` whose grid of `2·max_level + 1` levels has the smallest mean squared error on the
    /// counted numbers, taken at the middle of their bins; searched over `i/100` of the largest.
    ///
    /// # Errors
    /// [`Error::Empty`] before the first number, [`Error::Parameter`] if `max_level` is 0.
    pub fn mse_abs(&self, max_level: u32) -> Result<f32> {
        let bins = self.filled()?;
        if max_level == 0 {
            return Err(Error::Parameter { what: "max_level", value: 0.0, expected: "at least 1" });
        }
        let (levels, amax) = (f64::from(max_level), f64::from(self.edge(bins.len())));
        let mut best = (f64::INFINITY, amax);
        for i in (1..=100).rev() {
            let candidate = amax * f64::from(i) / 100.0;
            let scale = candidate / levels;
            let mut error = 0.0;
            for (bin, &count) in bins.iter().enumerate().filter(|(_, count)| **count != 0) {
                let x = (bin as f64 + 0.5) * self.width();
                let e = libm::rint(x / scale).min(levels) * scale - x;
                error += count as f64 * e * e;
            }
            if error < best.0 {
                best = (error, candidate);
            }
        }
        Ok(best.1 as f32)
    }

    fn filled(&self) -> Result<Vec<u64>> {
        match self.count {
            0 => Err(Error::Empty { what: "histogram" }),
            _ => Ok(self.abs_bins()),
        }
    }

    /// The right edge of the first `bins` bins, at most the largest `|x|`.
    fn edge(&self, bins: usize) -> f32 {
        let (lo, hi) = self.min_max();
        ((bins as f64 * self.width()) as f32).min(hi.max(-lo))
    }

    /// Makes bins at least `2^exponent` wide.
    fn widen(&mut self, exponent: i32) {
        // Zeros alone lie in the first bin, however wide it is.
        let folds = self.exponent.map_or(0, |now| (exponent - now).max(0));
        for _ in 0..folds.min(BINS.ilog2() as i32) {
            for side in &mut self.sides {
                for bin in 0..BINS / 2 {
                    side[bin] = side[2 * bin].saturating_add(side[2 * bin + 1]);
                }
                side[BINS / 2..].fill(0);
            }
        }
        self.exponent = Some(self.exponent.map_or(exponent, |now| now.max(exponent)));
    }
}

/// The smallest `e` with `amax < BINS · 2^e`.
fn exponent_for(amax: f32) -> i32 {
    // amax = m · 2^e with m in [1/2, 1): it is less than 2^e.
    libm::frexpf(amax).1 - BINS.ilog2() as i32
}

/// Rejects ends that are no finite numbers in order.
pub(crate) fn check_range((lo, hi): (f32, f32)) -> Result<()> {
    if lo.is_finite() && hi.is_finite() && lo <= hi {
        return Ok(());
    }
    let value = f64::from(if lo.is_finite() { hi } else { lo });
    let expected = "two finite numbers, the smaller one first";
    Err(Error::Parameter { what: "end of a range", value, expected })
}

pub(crate) fn check_percent(percent: f64) -> Result<f64> {
    if percent > 0.0 && percent <= 100.0 {
        return Ok(percent);
    }
    let (what, expected) = ("percentile", "more than 0, at most 100");
    Err(Error::Parameter { what, value: percent, expected })
}

/// The element at share `q` of the sorted `x`, interpolated linearly between two neighbours.
fn quantile(x: &mut [f32], q: f64) -> f32 {
    let at = q * (x.len() - 1) as f64;
    let below = at as usize;
    let (_, &mut lower, above) = x.select_nth_unstable_by(below, f32::total_cmp);
    let upper = above.iter().copied().min_by(f32::total_cmp).unwrap_or(lower);
    let (lower, upper) = (f64::from(lower), f64::from(upper));
    (lower + (upper - lower) * (at - below as f64)) as f32
}

/// Both ends of a set of numbers, and whether all of them are finite.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    lo: f32,
    hi: f32,
    /// `Σ 0·x`: NaN if one of them is not finite.
    zero: f32,
}

impl Extent {
    /// Of no numbers.
    pub(crate) const NONE: Self = Self { lo: f32::INFINITY, hi: f32::NEG_INFINITY, zero: 0.0 };

    #[inline(always)]
    pub(crate) fn of<S: Simd>(simd: S, x: &[f32]) -> Self {
        let (vectors, rest) = S::as_simd_f32s(x);
        let mut lo = simd.splat_f32s(f32::INFINITY);
        let mut hi = simd.splat_f32s(f32::NEG_INFINITY);
        let mut zero = simd.splat_f32s(0.0);
        for &x in vectors {
            lo = simd.min_f32s(lo, x);
            hi = simd.max_f32s(hi, x);
            zero = simd.mul_add_e_f32s(x, simd.splat_f32s(0.0), zero);
        }
        let (lo, hi) = (simd.reduce_min_f32s(lo), simd.reduce_max_f32s(hi));
        let mut all = Self { lo, hi, zero: simd.reduce_sum_f32s(zero) };
        for &x in rest {
            all = all.join(Self { lo: x, hi: x, zero: 0.0 * x });
        }
        all
    }

    #[inline(always)]
    pub(crate) fn join(self, other: Self) -> Self {
        Self { lo: self.lo.min(other.lo), hi: self.hi.max(other.hi), zero: self.zero + other.zero }
    }

    #[inline(always)]
    pub(crate) fn is_finite(self) -> bool {
        self.zero == 0.0
    }

    /// The ends. Adding 0 makes −0, which vectors may prefer or not, into 0.
    pub(crate) fn ends(self) -> (f32, f32) {
        (self.lo + 0.0, self.hi + 0.0)
    }

    /// [`of`](Self::of) on the instructions of this CPU.
    pub(crate) fn best(x: &[f32]) -> Self {
        struct Of<'a>(&'a [f32]);
        impl WithSimd for Of<'_> {
            type Output = Extent;

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) -> Extent {
                Extent::of(simd, self.0)
            }
        }
        simd::dispatch(Of(x))
    }
}
