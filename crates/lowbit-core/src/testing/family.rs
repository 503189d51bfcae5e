use alloc::vec::Vec;

use super::random::Random;
use crate::Mat;

/// A kind of matrix that occurs, or that other libraries got wrong.
///
/// # Example
/// ```
/// use lowbit_core::testing::Family;
///
/// for family in Family::ALL {
///     let w = family.matrix(4, 64, 7);
///     assert!(w.data().iter().all(|w| w.is_finite()), "{family:?}");
///     assert_eq!(w, family.matrix(4, 64, 7)); // the seed decides
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Normal with a deviation of 0.02: a layer as it is initialized and, mostly, as it is trained.
    Normal,
    /// Student's t with 3 degrees of freedom, times 0.02: rare weights are a hundred times the rest.
    HeavyTails,
    /// Normal, with one column in 16 (at least one) 20 to 100 times as large: activations of
    /// language models (Dettmers et al., arXiv:2208.07339).
    OutlierChannels,
    /// One number everywhere.
    Constant,
    /// Zeros, some of them negative.
    Zeros,
    /// Normal, but every other row is zero.
    ZeroRows,
    /// Numbers below 2^−126, whose reciprocal may be infinite.
    Subnormal,
    /// Every magnitude that f32 has is equally likely, subnormal numbers included. Scales in f16
    /// overflow, and so do sums.
    HugeRange,
    /// Positive, in a range that may be far from zero: `c·[0.9, 0.9 + d]` with d of 0.1, 1 or 10.
    Positive,
    /// [`Positive`](Self::Positive) with the other sign.
    Negative,
    /// −1 and 1: every number at an end of the range.
    Extremes,
    /// Every row of another family, [`HugeRange`](Self::HugeRange) aside.
    Mixed,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Normal,
        Self::HeavyTails,
        Self::OutlierChannels,
        Self::Constant,
        Self::Zeros,
        Self::ZeroRows,
        Self::Subnormal,
        Self::HugeRange,
        Self::Positive,
        Self::Negative,
        Self::Extremes,
        Self::Mixed,
    ];

    /// A `(rows, cols)` member of the family, finite and the same for the same seed; like `vec![]`,
    /// it needs the memory to exist.
    pub fn matrix(self, rows: usize, cols: usize, seed: u64) -> Mat<f32> {
        let mut random = Random(seed);
        let random = &mut random;
        match self {
            Self::Normal => Mat::from_fn(rows, cols, |_, _| 0.02 * random.normal()),
            Self::HeavyTails => Mat::from_fn(rows, cols, |_, _| {
                let chi2: f32 = (0..3).map(|_| random.normal()).map(|x| x * x).sum();
                0.02 * random.normal() / (chi2 / 3.0).max(1e-6).sqrt()
            }),
            Self::OutlierChannels => {
                let mut factors: Vec<f32> = (0..cols).map(|_| 1.0).collect();
                for _ in 0..cols.div_ceil(16) {
                    factors[random.below(cols)] = 20.0 + 80.0 * random.unit();
                }
                Mat::from_fn(rows, cols, |_, c| 0.02 * random.normal() * factors[c])
            }
            Self::Constant => {
                let x = random.sign() * (0.01 + random.unit());
                Mat::from_fn(rows, cols, |_, _| x)
            }
            Self::Zeros => Mat::from_fn(rows, cols, |_, _| 0.0 * random.sign()),
            Self::ZeroRows => {
                let odd = random.below(2);
                Mat::from_fn(
                    rows,
                    cols,
                    |r, _| {
                        if r % 2 == odd { 0.0 } else { 0.02 * random.normal() }
                    },
                )
            }
            Self::Subnormal => Mat::from_fn(rows, cols, |_, _| {
                let bits = random.bits() as u32 & 0x007f_ffff;
                random.sign() * f32::from_bits(bits >> random.below(23))
            }),
            // An exponent field of 255 would be infinity or NaN.
            Self::HugeRange => Mat::from_fn(rows, cols, |_, _| {
                let exponent = random.below(255) as u32;
                let mantissa = random.bits() as u32 & 0x007f_ffff;
                random.sign() * f32::from_bits(exponent << 23 | mantissa)
            }),
            Self::Positive | Self::Negative => {
                let sign = if self == Self::Positive { 1.0 } else { -1.0 };
                let size = sign * (0.01 + random.unit());
                let width = [0.1, 1.0, 10.0][random.below(3)];
                Mat::from_fn(rows, cols, |_, _| size * (0.9 + width * random.unit()))
            }
            Self::Extremes => Mat::from_fn(rows, cols, |_, _| random.sign()),
            Self::Mixed => {
                let others = Self::ALL.map(|family| match family {
                    Self::Mixed | Self::HugeRange => Self::Normal,
                    family => family,
                });
                let rows: Vec<Mat<f32>> = (0..rows)
                    .map(|_| others[random.below(others.len())].matrix(1, cols, random.bits()))
                    .collect();
                Mat::from_fn(rows.len(), cols, |r, c| rows[r].data()[c])
            }
        }
    }
}
