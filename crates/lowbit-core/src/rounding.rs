use lowbit_dtypes::random;

/// How a real number of steps becomes an integer.
///
/// Numbers are meant to be small, `|x| < 2^22`: beyond that an f32 has no fraction worth rounding.
///
/// # Example
/// ```
/// use lowbit_core::Rounding::*;
///
/// let round = |rounding: lowbit_core::Rounding| [-2.5, -0.2, 0.5, 1.5].map(|x| rounding.round(x, 0));
/// assert_eq!(round(NearestEven), [-2.0, 0.0, 0.0, 2.0]);
/// assert_eq!(round(NearestAway), [-3.0, 0.0, 1.0, 2.0]);
/// assert_eq!(round(NearestUp), [-2.0, 0.0, 1.0, 2.0]);
/// assert_eq!(round(Floor), [-3.0, -1.0, 0.0, 1.0]);
/// assert_eq!(round(TowardZero), [-2.0, 0.0, 0.0, 1.0]);
/// assert_eq!(round(Stochastic { seed: 1 })[1..2], [0.0]); // −1 in one of five seeds
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To nearest, ties to even: IEEE 754, ONNX, PyTorch.
    #[default]
    NearestEven,
    /// To nearest, ties away from zero: C's `roundf`, GGUF's Q8_0.
    NearestAway,
    /// `floor(x + ½)`, ties up, with the sum rounded to f32: GGUF's Q4_0 to Q5_1.
    NearestUp,
    /// Down.
    Floor,
    /// Toward zero: the weight's own where the zero of its block is an integer; otherwise toward code 0,
    /// since the zero is part of what is rounded.
    TowardZero,
    /// Up with a probability of the fraction, so that the mean is right to 2^-24.
    ///
    /// The random bits depend on the seed and the element's index alone (counted row by row
    /// through the matrix), not on threads or vectors. Integers never move.
    Stochastic {
        /// Names the sequence of random bits.
        seed: u64,
    },
}

impl Rounding {
    /// `x` rounded to an integer; `index` chooses the random bits of
    /// [`Stochastic`](Self::Stochastic).
    #[inline(always)]
    pub fn round(self, x: f32, index: u64) -> f32 {
        let down = |x: f32| {
            let r = nearest_even(x);
            if r > x { r - 1.0 } else { r }
        };
        match self {
            Self::NearestEven => nearest_even(x),
            Self::NearestAway => {
                let r = nearest_even(x);
                // The difference is exact. Half of the ties are rounded toward zero so far.
                let tie = (x - r).abs() == 0.5 && (x - r > 0.0) == (x > 0.0);
                if tie { r + 1.0_f32.copysign(x) } else { r }
            }
            Self::NearestUp => down(x + 0.5),
            Self::Floor => down(x),
            Self::TowardZero => down(x.abs()).copysign(x),
            Self::Stochastic { seed } => {
                let floor = down(x);
                let fraction = ((x - floor) * 4_294_967_296.0) as u64;
                let up = (fraction + u64::from(random(seed, index))) >> 32;
                floor + up as f32
            }
        }
    }

    /// `round(steps) + zero`, where `zero` is an integer.
    #[inline(always)]
    pub(crate) fn code(self, steps: f32, zero: f32, index: u64) -> f32 {
        match self {
            // As ggml computes it: the zero is part of what is rounded.
            Self::NearestUp => self.round(steps + zero, index),
            _ => self.round(steps, index) + zero,
        }
    }
}

/// 1.5 · 2^23: a number around it has a unit of exactly 1, and its lowest bits are an integer.
const MAGIC: f32 = 12_582_912.0;

/// Nearest integer, ties to even, for `|x| < 2^22` and the default rounding mode.
///
/// Written as an addition because `f32::round_ties_even` needs std, and is a library call on
/// x86-64 without SSE4.1.
#[inline(always)]
pub(crate) fn nearest_even(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// [`nearest_even`] as an integer. A conversion with `as` would saturate, in several instructions.
#[inline(always)]
pub(crate) fn nearest_even_i32(x: f32) -> i32 {
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_the_textbooks_on_quarters_and_their_neighbours() {
        for i in -4096..4096 {
            let x = i as f32 / 4.0;
            for x in [x.next_down(), x, x.next_up()] {
                assert_eq!(Rounding::NearestEven.round(x, 0), x.round_ties_even(), "{x}");
                assert_eq!(nearest_even_i32(x), x.round_ties_even() as i32, "{x}");
                assert_eq!(Rounding::NearestAway.round(x, 0), x.round(), "{x}");
                assert_eq!(Rounding::NearestUp.round(x, 0), (x + 0.5).floor(), "{x}");
                assert_eq!(Rounding::Floor.round(x, 0), x.floor(), "{x}");
                assert_eq!(Rounding::TowardZero.round(x, 0), x.trunc(), "{x}");
                let random = Rounding::Stochastic { seed: 1 }.round(x, i as u64);
                assert!(random == x.floor() || random == x.ceil(), "{x} became {random}");
            }
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_leaves_integers_alone() {
        const N: u64 = 1 << 20;
        for x in [-3.7, -0.001, 0.25, 0.5, 7.9] {
            let sum: f64 =
                (0..N).map(|i| f64::from(Rounding::Stochastic { seed: 5 }.round(x, i))).sum();
            // Four standard deviations of the mean of N coins are at most 2/√N = 0.002.
            assert!((sum / N as f64 - f64::from(x)).abs() < 2.0 / (N as f64).sqrt(), "{x}");
        }
        for x in -300..300 {
            let x = x as f32;
            assert!((0..100).all(|i| Rounding::Stochastic { seed: i }.round(x, i) == x));
        }
    }
}
