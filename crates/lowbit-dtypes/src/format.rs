//! One const codec for every float of 8 bits and fewer, and, inside the crate, for f16, bf16 and TF32.

use crate::{Error, Result};

/// A binary floating-point format: sign, exponent, fraction, most significant first.
///
/// A code with exponent field `e`, fraction field `f` of `M` bits and sign `s` stands for
///
/// ```text
/// e > 0:  (-1)^s · 2^(e - bias) · (1 + f/2^M)
/// e = 0:  (-1)^s · 2^(1 - bias) · f/2^M           (zero and the subnormals)
/// ```
///
/// except for the codes that [`Specials`] takes away. The constants are the formats of the field; a format of your
/// own is one [`Format::new`]. Codes are the low [`bits`](Self::bits) of a byte; the bits above them are ignored.
///
/// ```
/// use lowbit_dtypes::{Format, Overflow, Specials};
///
/// assert_eq!(Format::F8E4M3.decode(0x7e), 448.0);
/// assert_eq!(Format::F8E4M3.encode(1.0625, Overflow::Saturate), 0x38); // a tie: 1 is even, 1.125 is odd
///
/// let e4m2 = Format::new(4, 2, 7, Specials::None)?;
/// assert_eq!((e4m2.bits(), e4m2.max()), (7, 448.0));
/// # Ok::<(), lowbit_dtypes::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    exponent_bits: u32,
    fraction_bits: u32,
    bias: i32,
    specials: Specials,
}

/// Which codes of a [`Format`] are not finite numbers. The letters are those of ml_dtypes and LLVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Specials {
    /// The top exponent is infinity (fraction 0) and NaN (any other), as in IEEE 754.
    Ieee,
    /// No infinity; NaN where all bits but the sign are ones (`fn`: finite, NaN).
    NanOnly,
    /// No infinity; the one NaN takes the place of negative zero (`fnuz`: finite, NaN, unsigned zero).
    NanIsNegativeZero,
    /// Every code is a finite number (`fn` of the formats of 6 and 4 bits).
    None,
    /// A scale: no sign bit, no zero, no subnormals (`e = 0` follows the rule of `e > 0`); NaN is all ones (`fnu`).
    Scale,
}

/// How a number between two codes becomes one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest; a tie goes to the even significand, or, where both are odd because there are no fraction
    /// bits, to the larger magnitude (IEEE 754-2019, 4.3.1). The default.
    #[default]
    NearestEven,
    /// To the nearest; a tie goes away from zero, as PTX `cvt.rna` does.
    NearestAway,
    /// To the one nearer to zero: truncation.
    TowardZero,
    /// Up or down at random, with a chance in proportion to the distance, so that the mean of many results is the
    /// number itself. A number that has a code keeps it.
    ///
    /// The draw depends on `seed` and the element's index alone: element `i` of a slice has index `index + i`, so a
    /// slice cut in pieces gives the same codes as the whole, on any number of threads and any instruction set.
    /// The chance is a multiple of 2^-32, rounded down.
    Stochastic {
        /// Chooses the stream of random numbers.
        seed: u64,
        /// The index of the (first) element.
        index: u64,
    },
}

impl Rounding {
    /// For the element `offset` places further on.
    pub(crate) const fn at(self, offset: usize) -> Self {
        match self {
            Self::Stochastic { seed, index } => {
                Self::Stochastic { seed, index: index.wrapping_add(offset as u64) }
            }
            _ => self,
        }
    }
}

/// What becomes of a number that rounds beyond the largest finite one. (Rounding comes first, as though the
/// exponent had no end: 464 is a tie that E4M3 rounds to its largest, 448.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overflow {
    /// The largest finite number; infinities too. OCP's saturating mode, `cvt.satfinite`.
    Saturate,
    /// Infinity, or NaN where the format has no infinity, or the largest finite number where it has neither.
    /// What ml_dtypes does.
    Infinity,
}

/// A number taken apart without loss: `±significand · 2^exponent`.
#[derive(Clone, Copy)]
pub enum Parts {
    Nan { negative: bool },
    Infinite { negative: bool },
    Finite { negative: bool, significand: u64, exponent: i32 },
}

impl Parts {
    pub(crate) const fn of_f64(x: f64) -> Self {
        let bits = x.to_bits();
        Self::of(bits >> 63 != 0, (bits >> 52 & 0x7ff) as i32, bits & ((1 << 52) - 1), 11, 52)
    }

    pub(crate) const fn of_f32(x: f32) -> Self {
        let bits = x.to_bits() as u64;
        Self::of(bits >> 31 != 0, (bits >> 23 & 0xff) as i32, bits & ((1 << 23) - 1), 8, 23)
    }

    const fn of(
        negative: bool,
        field: i32,
        fraction: u64,
        exponent_bits: u32,
        fraction_bits: u32,
    ) -> Self {
        let bias = (1 << (exponent_bits - 1)) - 1;
        if field == 2 * bias + 1 {
            return if fraction == 0 {
                Self::Infinite { negative }
            } else {
                Self::Nan { negative }
            };
        }
        let (significand, field) =
            if field == 0 { (fraction, 1) } else { (fraction | 1 << fraction_bits, field) };
        Self::Finite { negative, significand, exponent: field - bias - fraction_bits as i32 }
    }
}

impl Format {
    pub(crate) const F16: Self = Self::unchecked(5, 10, 15, Specials::Ieee);
    pub(crate) const BF16: Self = Self::unchecked(8, 7, 127, Specials::Ieee);
    pub(crate) const TF32: Self = Self::unchecked(8, 10, 127, Specials::Ieee);

    /// A format with these fields.
    ///
    /// # Errors
    /// [`Error::Format`] unless the code fits 8 bits, there are at least 2 bits besides the sign (and a fraction bit
    /// if the format is [`Specials::Ieee`], whose NaN needs one), and every value is exact in `bf16`, so in `f32`.
    pub const fn new(
        exponent_bits: u32,
        fraction_bits: u32,
        bias: i32,
        specials: Specials,
    ) -> Result<Self> {
        let error = Err(Error::Format { exponent_bits, fraction_bits, bias });
        if exponent_bits < 1 || exponent_bits > 8 || fraction_bits > 7 {
            return error;
        }
        let format = Self::unchecked(exponent_bits, fraction_bits, bias, specials);
        let magnitude_bits = exponent_bits + fraction_bits;
        let no_nan = matches!(specials, Specials::Ieee) && fraction_bits == 0;
        if magnitude_bits < 2 || format.bits() > 8 || no_nan || bias < -256 || bias > 256 {
            return error;
        }
        let lowest = format.lowest_exponent() - fraction_bits as i32;
        let highest = (format.max_code() >> fraction_bits) as i32 - bias;
        if lowest < -133 || highest > 127 { error } else { Ok(format) }
    }

    pub(crate) const fn unchecked(
        exponent_bits: u32,
        fraction_bits: u32,
        bias: i32,
        specials: Specials,
    ) -> Self {
        Self { exponent_bits, fraction_bits, bias, specials }
    }

    /// Width of the exponent field.
    pub const fn exponent_bits(self) -> u32 {
        self.exponent_bits
    }

    /// Width of the fraction field.
    pub const fn fraction_bits(self) -> u32 {
        self.fraction_bits
    }

    /// What is subtracted from the exponent field.
    pub const fn bias(self) -> i32 {
        self.bias
    }

    /// Which codes are not finite numbers.
    pub const fn specials(self) -> Specials {
        self.specials
    }

    /// Whether there is a sign bit.
    pub const fn is_signed(self) -> bool {
        !matches!(self.specials, Specials::Scale)
    }

    /// Width of a code: 4 for E2M1.
    pub const fn bits(self) -> u32 {
        self.is_signed() as u32 + self.exponent_bits + self.fraction_bits
    }

    /// The codes of positive numbers are below this; it is the sign bit where there is one.
    pub(crate) const fn sign_bit(self) -> u32 {
        1 << (self.exponent_bits + self.fraction_bits)
    }

    /// The exponent of the lowest binade, which the subnormals share.
    pub(crate) const fn lowest_exponent(self) -> i32 {
        self.is_signed() as i32 - self.bias
    }

    pub(crate) const fn max_bits(self) -> u32 {
        match self.specials {
            Specials::Ieee => self.infinity_bits() - 1,
            Specials::NanOnly | Specials::Scale => self.sign_bit() - 2,
            Specials::NanIsNegativeZero | Specials::None => self.sign_bit() - 1,
        }
    }

    /// Only meaningful for [`Specials::Ieee`].
    const fn infinity_bits(self) -> u32 {
        ((1 << self.exponent_bits) - 1) << self.fraction_bits
    }

    pub(crate) const fn nan_bits(self) -> Option<u32> {
        match self.specials {
            Specials::Ieee => Some(self.infinity_bits() | 1 << (self.fraction_bits - 1)),
            Specials::NanOnly | Specials::Scale => Some(self.sign_bit() - 1),
            Specials::NanIsNegativeZero => Some(self.sign_bit()),
            Specials::None => None,
        }
    }

    /// What [`Overflow::Infinity`] makes of a positive number beyond the range.
    pub(crate) const fn overflow_bits(self) -> u32 {
        match (self.specials, self.nan_bits()) {
            (Specials::Ieee, _) => self.infinity_bits(),
            (_, Some(nan)) => nan,
            (_, None) => self.max_bits(),
        }
    }

    /// The code of the largest finite number: `0x7e` for E4M3.
    pub const fn max_code(self) -> u8 {
        self.max_bits() as u8
    }

    /// The code of a NaN (positive where NaN has a sign, quiet where there are more), if there is one.
    pub const fn nan_code(self) -> Option<u8> {
        match self.nan_bits() {
            Some(bits) => Some(bits as u8),
            None => None,
        }
    }

    /// The code of positive infinity, if there is one.
    pub const fn infinity_code(self) -> Option<u8> {
        match self.specials {
            Specials::Ieee => Some(self.infinity_bits() as u8),
            _ => None,
        }
    }

    /// The largest finite number: 448 for E4M3, 6 for E2M1.
    pub const fn max(self) -> f32 {
        self.decode(self.max_code())
    }

    /// The smallest positive number that is not subnormal.
    pub const fn min_positive(self) -> f32 {
        pow2(self.lowest_exponent()) as f32
    }

    /// The smallest positive number. Equal to [`min_positive`](Self::min_positive) where there are no subnormals.
    pub const fn min_positive_subnormal(self) -> f32 {
        match self.specials {
            Specials::Scale => self.min_positive(),
            _ => self.decode(1),
        }
    }

    /// The exponent of the largest finite number, `floor(log2(max))`: 8 for E4M3. The MX scale rules call it `emax`.
    pub const fn max_exponent(self) -> i32 {
        (self.max_bits() >> self.fraction_bits) as i32 - self.bias
    }

    /// The number that `code` stands for. Exact; NaN is quiet and keeps the sign bit of the code.
    pub const fn decode(self, code: u8) -> f32 {
        let negative = self.is_signed() && code as u32 & self.sign_bit() != 0;
        let magnitude = code as u32 & (self.sign_bit() - 1);
        let nan_is_zero = matches!(self.specials, Specials::NanIsNegativeZero);
        if magnitude > self.max_bits() || (negative && magnitude == 0 && nan_is_zero) {
            let infinite =
                matches!(self.specials, Specials::Ieee) && magnitude == self.infinity_bits();
            let bits: u32 = if infinite { 0x7f80_0000 } else { 0x7fc0_0000 };
            return f32::from_bits(bits | (negative as u32) << 31);
        }
        let field = magnitude >> self.fraction_bits;
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        let (significand, field) = if field == 0 && self.is_signed() {
            (fraction, 1)
        } else {
            (fraction | 1 << self.fraction_bits, field)
        };
        let exponent = field as i32 - self.bias - self.fraction_bits as i32;
        let x = (significand as f64 * pow2(exponent)) as f32;
        if negative { -x } else { x }
    }

    /// The code nearest to `x`, ties to even; [`encode_with`](Self::encode_with) tells the rest.
    pub const fn encode(self, x: f32, overflow: Overflow) -> u8 {
        self.encode_parts(Parts::of_f32(x), Rounding::NearestEven, overflow) as u8
    }

    /// The code of `x`, rounded once.
    ///
    /// * Zero keeps its sign where the format has a negative zero.
    /// * NaN becomes NaN, its sign kept where there are two; where there is none, +0.
    /// * Infinity becomes what `overflow` says.
    /// * A [`Specials::Scale`] format has no zero and no negative numbers: they become NaN with
    ///   [`Overflow::Infinity`] and the smallest number with [`Overflow::Saturate`]. Positive numbers below the
    ///   smallest become the smallest, whatever the rounding.
    ///
    /// ```
    /// use lowbit_dtypes::{Format, Overflow, Rounding};
    ///
    /// let e4m3 = Format::F8E4M3;
    /// assert_eq!(e4m3.encode_with(1e6, Rounding::NearestEven, Overflow::Saturate), 0x7e);
    /// assert_eq!(e4m3.encode_with(1e6, Rounding::NearestEven, Overflow::Infinity), 0x7f); // NaN
    /// assert_eq!(e4m3.encode_with(1.99, Rounding::TowardZero, Overflow::Saturate), 0x3f); // 1.875
    /// ```
    pub const fn encode_with(self, x: f32, rounding: Rounding, overflow: Overflow) -> u8 {
        self.encode_parts(Parts::of_f32(x), rounding, overflow) as u8
    }

    /// [`encode_with`](Self::encode_with) of an `f64`, rounded once: through `f32` it would be rounded twice.
    pub const fn encode_f64(self, x: f64, rounding: Rounding, overflow: Overflow) -> u8 {
        self.encode_parts(Parts::of_f64(x), rounding, overflow) as u8
    }

    pub(crate) const fn encode_parts(
        self,
        x: Parts,
        rounding: Rounding,
        overflow: Overflow,
    ) -> u32 {
        match x {
            Parts::Nan { negative } => match self.nan_bits() {
                Some(nan) => self.with_sign(nan, negative),
                None => 0,
            },
            Parts::Infinite { negative } => self.beyond(negative, overflow),
            Parts::Finite { negative, significand: 0, .. } => {
                if self.is_signed() {
                    self.with_sign(0, negative)
                } else {
                    self.beyond(true, overflow)
                }
            }
            Parts::Finite { negative: true, .. } if !self.is_signed() => {
                self.beyond(true, overflow)
            }
            Parts::Finite { negative, significand, exponent } => {
                let magnitude = self.round(significand, exponent, rounding);
                if magnitude > self.max_bits() {
                    self.beyond(negative, overflow)
                } else {
                    self.with_sign(magnitude, negative)
                }
            }
        }
    }

    /// The magnitude code of `significand · 2^exponent`, as though there were no largest one.
    const fn round(self, significand: u64, exponent: i32, rounding: Rounding) -> u32 {
        // The place value of the last fraction bit in x's binade; the subnormals share the lowest binade's.
        let top = exponent + 63 - significand.leading_zeros() as i32;
        let lowest = self.lowest_exponent();
        let binade = (if top > lowest { top } else { lowest }) - lowest;
        let shift = binade + lowest - self.fraction_bits as i32 - exponent;
        let significand = if shift <= 0 {
            (significand << -shift) as u32
        } else {
            shift_right(significand, shift as u32, rounding)
        };
        // significand includes the hidden bit of a normal number, which counts as one binade; that is also why a
        // carry out of the fraction raises the exponent by itself.
        let magnitude = significand + ((binade as u32) << self.fraction_bits);
        if self.is_signed() {
            magnitude
        } else {
            // Without subnormals the lowest binade has a hidden bit, too, and nothing lies below it.
            magnitude.saturating_sub(1 << self.fraction_bits)
        }
    }

    const fn beyond(self, negative: bool, overflow: Overflow) -> u32 {
        match (overflow, self.specials) {
            (Overflow::Saturate, Specials::Scale) if negative => 0,
            (Overflow::Saturate, _) => self.with_sign(self.max_bits(), negative),
            (Overflow::Infinity, _) => self.with_sign(self.overflow_bits(), negative),
        }
    }

    const fn with_sign(self, magnitude: u32, negative: bool) -> u32 {
        match self.specials {
            Specials::Scale => magnitude,
            Specials::NanIsNegativeZero if magnitude == 0 => 0,
            _ => magnitude | if negative { self.sign_bit() } else { 0 },
        }
    }
}

/// `2^e`; exact in f64 for the exponents of any format.
pub(crate) const fn pow2(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// `significand / 2^shift` as an integer, `shift` at least 1. The significand has at most 53 bits, and so few above
/// `shift` that the result fits a u32.
const fn shift_right(significand: u64, shift: u32, rounding: Rounding) -> u32 {
    // Half a unit is 2^53 or more from here on: only a random draw could round up.
    let shift = match rounding {
        Rounding::Stochastic { .. } => shift,
        _ if shift >= 54 => return 0,
        _ => shift,
    };
    (match rounding {
        Rounding::NearestEven => {
            (significand + (1 << (shift - 1)) - 1 + (significand >> shift & 1)) >> shift
        }
        Rounding::NearestAway => (significand + (1 << (shift - 1))) >> shift,
        Rounding::TowardZero => significand >> shift,
        Rounding::Stochastic { seed, index } => {
            // The quotient with 32 bits behind the point, plus 32 random bits behind the point.
            let fixed = if shift <= 32 {
                significand << (32 - shift)
            } else if shift < 96 {
                significand >> (shift - 32)
            } else {
                0
            };
            (fixed + random(seed, index) as u64) >> 32
        }
    }) as u32
}

/// Steele, Lea and Flood's SplitMix64 ("Fast splittable pseudorandom number generators", OOPSLA 2014, figures 13 and
/// 14) as a function of a counter: the upper half of output `index` of the generator seeded with a mix of `seed`.
///
/// The random bits of stochastic rounding, here and in the crates above.
///
/// ```
/// use lowbit_dtypes::random;
/// assert_eq!(random(7, 1), random(7, 1));
/// assert_ne!(random(7, 1), random(7, 2));
/// ```
#[inline(always)]
pub const fn random(seed: u64, index: u64) -> u32 {
    let counter = random_key(seed).wrapping_add(index.wrapping_mul(GOLDEN_GAMMA));
    (mix64(counter) >> 32) as u32
}

/// Neighbouring seeds must not give shifted copies of one stream, so the seed is mixed first.
#[inline(always)]
pub(crate) const fn random_key(seed: u64) -> u64 {
    mix64(seed.wrapping_add(GOLDEN_GAMMA))
}

pub(crate) const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline(always)]
pub(crate) const fn mix64(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
