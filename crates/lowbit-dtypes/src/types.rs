//! The types of single numbers, with the surface of `half::f16`: one macro for all formats.

/// Defines the type of a format: a byte whose low bits are the code.
macro_rules! small_float {
    ($(#[$doc:meta])* $name:ident $specials:ident) => {
        $(#[$doc])*
        ///
        /// One byte, the code in its low bits; the bits above are ignored. Arithmetic and comparison are those of the
        /// numbers, and a result is rounded once, to nearest even, to infinity or NaN beyond the range; see
        /// [`Format`] for other ways to round.
        #[derive(Clone, Copy, Default)]
        #[repr(transparent)]
        pub struct $name(u8);

        impl $name {
            /// The format that gives the codes their meaning.
            pub const FORMAT: Format = Format::$name;
            /// The largest finite number.
            pub const MAX: Self = Self(Self::FORMAT.max_code());
            /// The smallest positive number that is not subnormal.
            pub const MIN_POSITIVE: Self =
                Self::from_f32_const(Self::FORMAT.min_positive());
            /// The smallest positive number.
            pub const MIN_POSITIVE_SUBNORMAL: Self =
                Self::from_f32_const(Self::FORMAT.min_positive_subnormal());
            /// 1.
            pub const ONE: Self = Self::from_f32_const(1.0);
            /// The distance from 1 to the next larger number, as an `f32`: not every format can hold it.
            pub const EPSILON: f32 = crate::format::pow2(-(Self::FORMAT.fraction_bits() as i32)) as f32;
            /// Significant binary digits, the hidden one included.
            pub const MANTISSA_DIGITS: u32 = Self::FORMAT.fraction_bits() + 1;
            /// The base of the exponent.
            pub const RADIX: u32 = 2;

            const MASK: u8 = ((1u32 << Self::FORMAT.bits()) - 1) as u8;

            const fn from_f32_const(x: f32) -> Self {
                Self(Self::FORMAT.encode(x, Overflow::Saturate))
            }

            /// The number with this code; the bits above the code are dropped.
            #[inline]
            pub const fn from_bits(bits: u8) -> Self {
                Self(bits & Self::MASK)
            }

            /// The code.
            #[inline]
            pub const fn to_bits(self) -> u8 {
                self.0 & Self::MASK
            }

            /// The nearest number, ties to even, to infinity or NaN beyond the range as in `half` and ml_dtypes.
            #[inline]
            pub const fn from_f32(x: f32) -> Self {
                Self(Self::FORMAT.encode(x, Overflow::Infinity))
            }

            /// The nearest number, ties to even, the largest beyond the range.
            #[inline]
            pub const fn from_f32_saturating(x: f32) -> Self {
                Self(Self::FORMAT.encode(x, Overflow::Saturate))
            }

            /// The number that `rounding` and `overflow` ask for.
            #[inline]
            pub const fn from_f32_with(x: f32, rounding: Rounding, overflow: Overflow) -> Self {
                Self(Self::FORMAT.encode_with(x, rounding, overflow))
            }

            /// [`from_f32`](Self::from_f32) of an `f64`, rounded once.
            #[inline]
            pub const fn from_f64(x: f64) -> Self {
                Self(Self::FORMAT.encode_f64(x, Rounding::NearestEven, Overflow::Infinity))
            }

            /// [`from_f32_with`](Self::from_f32_with) of an `f64`, rounded once.
            #[inline]
            pub const fn from_f64_with(x: f64, rounding: Rounding, overflow: Overflow) -> Self {
                Self(Self::FORMAT.encode_f64(x, rounding, overflow))
            }

            /// The number as an `f32`; exact.
            #[inline]
            pub const fn to_f32(self) -> f32 {
                Self::FORMAT.decode(self.0)
            }

            /// The number as an `f64`; exact.
            #[inline]
            pub const fn to_f64(self) -> f64 {
                self.to_f32() as f64
            }

            /// Whether it is NaN.
            #[inline]
            pub const fn is_nan(self) -> bool {
                self.to_f32().is_nan()
            }

            /// Whether it is an infinity.
            #[inline]
            pub const fn is_infinite(self) -> bool {
                self.to_f32().is_infinite()
            }

            /// Whether it is neither NaN nor an infinity.
            #[inline]
            pub const fn is_finite(self) -> bool {
                self.to_f32().is_finite()
            }

            /// Whether it is neither zero, subnormal, infinite nor NaN.
            #[inline]
            pub const fn is_normal(self) -> bool {
                matches!(self.classify(), FpCategory::Normal)
            }

            /// Its category. Subnormal is what is subnormal in this format.
            pub const fn classify(self) -> FpCategory {
                let x = self.to_f32();
                if x.is_nan() {
                    FpCategory::Nan
                } else if x.is_infinite() {
                    FpCategory::Infinite
                } else if x == 0.0 {
                    FpCategory::Zero
                } else if x.abs() < Self::FORMAT.min_positive() {
                    FpCategory::Subnormal
                } else {
                    FpCategory::Normal
                }
            }

            /// Whether the sign is negative, that of zero and NaN included.
            #[inline]
            pub const fn is_sign_negative(self) -> bool {
                self.to_f32().is_sign_negative()
            }

            /// Whether the sign is positive, that of zero and NaN included.
            #[inline]
            pub const fn is_sign_positive(self) -> bool {
                !self.is_sign_negative()
            }

            /// The total order of IEEE 754: −NaN, −∞, …, −0, +0, …, ∞, NaN.
            #[inline]
            pub fn total_cmp(&self, other: &Self) -> Ordering {
                self.to_f32().total_cmp(&other.to_f32())
            }

            /// The larger of two numbers; the other one if one is NaN.
            #[inline]
            pub fn max(self, other: Self) -> Self {
                if self.is_nan() || self < other { other } else { self }
            }

            /// The smaller of two numbers; the other one if one is NaN.
            #[inline]
            pub fn min(self, other: Self) -> Self {
                if self.is_nan() || self > other { other } else { self }
            }
        }

        small_float!(@special $specials $name);

        impl From<$name> for f32 {
            #[inline]
            fn from(x: $name) -> Self {
                x.to_f32()
            }
        }

        impl From<$name> for f64 {
            #[inline]
            fn from(x: $name) -> Self {
                x.to_f64()
            }
        }

        impl PartialEq for $name {
            #[inline]
            fn eq(&self, other: &Self) -> bool {
                self.to_f32() == other.to_f32()
            }
        }

        impl PartialOrd for $name {
            #[inline]
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                self.to_f32().partial_cmp(&other.to_f32())
            }
        }

        /// As the `f32`.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.to_f32(), f)
            }
        }

        /// As the `f32`.
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.to_f32(), f)
            }
        }

        small_float!(@fmt $name LowerExp to_f32 "As the `f32`.");
        small_float!(@fmt $name UpperExp to_f32 "As the `f32`.");
        small_float!(@fmt $name LowerHex to_bits "The code.");
        small_float!(@fmt $name UpperHex to_bits "The code.");
        small_float!(@fmt $name Binary to_bits "The code.");
        small_float!(@fmt $name Octal to_bits "The code.");

        /// A decimal number, rounded as by [`from_f64`]($name::from_f64) after rounding to `f64`.
        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                s.parse().map(Self::from_f64).map_err(|_| Error::Parse)
            }
        }

        impl crate::convert::sealed::Small for $name {
            const FORMAT: Format = Format::$name;
            type Code = u8;
            fn widen(isa: Isa, src: &[Self], dst: &mut [f32]) {
                lanes::decode(isa, Format::$name, bytemuck::must_cast_slice(src), dst);
            }
        }

        impl num_traits::ToPrimitive for $name {
            fn to_i64(&self) -> Option<i64> {
                num_traits::ToPrimitive::to_i64(&$name::to_f32(*self))
            }
            fn to_u64(&self) -> Option<u64> {
                num_traits::ToPrimitive::to_u64(&$name::to_f32(*self))
            }
            fn to_i128(&self) -> Option<i128> {
                num_traits::ToPrimitive::to_i128(&$name::to_f32(*self))
            }
            fn to_u128(&self) -> Option<u128> {
                num_traits::ToPrimitive::to_u128(&$name::to_f32(*self))
            }
            fn to_f32(&self) -> Option<f32> {
                Some($name::to_f32(*self))
            }
            fn to_f64(&self) -> Option<f64> {
                Some($name::to_f64(*self))
            }
        }

        /// Rounded through `f64`, which is exact up to 2^53.
        impl num_traits::FromPrimitive for $name {
            fn from_i64(n: i64) -> Option<Self> {
                Some(Self::from_f64(n as f64))
            }
            fn from_u64(n: u64) -> Option<Self> {
                Some(Self::from_f64(n as f64))
            }
            fn from_f32(x: f32) -> Option<Self> {
                Some($name::from_f32(x))
            }
            fn from_f64(x: f64) -> Option<Self> {
                Some($name::from_f64(x))
            }
        }

        impl num_traits::NumCast for $name {
            fn from<T: num_traits::ToPrimitive>(n: T) -> Option<Self> {
                n.to_f64().map(Self::from_f64)
            }
        }

        small_float!(@as_to $name f32 f64 i8 i16 i32 i64 u8 u16 u32 u64);
        small_float!(@as_from $name f32 f64 i8 i16 i32 u8 u16 u32);

        impl num_traits::Bounded for $name {
            fn min_value() -> Self {
                Self::MIN
            }
            fn max_value() -> Self {
                Self::MAX
            }
        }

        impl num_traits::ToBytes for $name {
            type Bytes = [u8; 1];
            fn to_be_bytes(&self) -> [u8; 1] {
                [self.to_bits()]
            }
            fn to_le_bytes(&self) -> [u8; 1] {
                [self.to_bits()]
            }
        }

        impl num_traits::FromBytes for $name {
            type Bytes = [u8; 1];
            fn from_be_bytes(bytes: &[u8; 1]) -> Self {
                Self::from_bits(bytes[0])
            }
            fn from_le_bytes(bytes: &[u8; 1]) -> Self {
                Self::from_bits(bytes[0])
            }
        }

        /// As the code, a `u8`.
        #[cfg(feature = "serde")]
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_u8(self.to_bits())
            }
        }

        #[cfg(feature = "serde")]
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                <u8 as serde::Deserialize>::deserialize(deserializer).map(Self::from_bits)
            }
        }
    };

    (@fmt $name:ident $trait:ident $via:ident $doc:literal) => {
        #[doc = $doc]
        impl fmt::$trait for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::$trait::fmt(&self.$via(), f)
            }
        }
    };

    (@as_to $name:ident $($to:ident)*) => {$(
        impl num_traits::AsPrimitive<$to> for $name {
            fn as_(self) -> $to {
                self.to_f64() as $to
            }
        }
    )*};

    (@as_from $name:ident $($from:ident)*) => {$(
        impl num_traits::AsPrimitive<$name> for $from {
            fn as_(self) -> $name {
                $name::from_f64(self as f64)
            }
        }
    )*};

    // What depends on the codes that are not finite numbers.
    (@special Ieee $name:ident) => {
        impl $name {
            /// Infinity.
            pub const INFINITY: Self = Self(Self::FORMAT.overflow_bits() as u8);
            /// Negative infinity.
            pub const NEG_INFINITY: Self = Self(Self::INFINITY.0 | Self::SIGN);
        }
        small_float!(@special NanOnly $name);
    };
    (@special NanOnly $name:ident) => {
        small_float!(@nan $name);
        small_float!(@signed $name);
        impl $name {
            /// −0.
            pub const NEG_ZERO: Self = Self(Self::SIGN);
        }
    };
    (@special NanIsNegativeZero $name:ident) => {
        small_float!(@nan $name);
        small_float!(@signed $name);
    };
    (@special None $name:ident) => {
        small_float!(@signed $name);
        impl $name {
            /// −0.
            pub const NEG_ZERO: Self = Self(Self::SIGN);
        }
    };
    // A scale has no arithmetic: most sums and all differences would be NaN.
    (@special Scale $name:ident) => {
        small_float!(@nan $name);
        impl $name {
            /// The smallest number: there are no negative ones.
            pub const MIN: Self = Self(0);
        }
    };

    (@nan $name:ident) => {
        impl $name {
            /// A NaN.
            pub const NAN: Self = match Self::FORMAT.nan_code() {
                Some(code) => Self(code),
                None => Self(0),
            };
        }
    };

    (@signed $name:ident) => {
        impl $name {
            const SIGN: u8 = Self::FORMAT.sign_bit() as u8;
            /// 0.
            pub const ZERO: Self = Self(0);
            /// −1.
            pub const NEG_ONE: Self = Self::from_f32_const(-1.0);
            /// The finite number farthest below zero.
            pub const MIN: Self = Self(Self::MAX.0 | Self::SIGN);

            /// The magnitude. NaN stays NaN.
            #[inline]
            pub const fn abs(self) -> Self {
                Self(Self::FORMAT.encode(self.to_f32().abs(), Overflow::Infinity))
            }

            /// 1 with the sign of the number, NaN if it is NaN.
            #[inline]
            pub const fn signum(self) -> Self {
                Self(Self::FORMAT.encode(self.to_f32().signum(), Overflow::Infinity))
            }

            /// The magnitude of `self` with the sign of `sign`.
            #[inline]
            pub const fn copysign(self, sign: Self) -> Self {
                let x = self.to_f32().copysign(sign.to_f32());
                Self(Self::FORMAT.encode(x, Overflow::Infinity))
            }
        }

        impl Neg for $name {
            type Output = Self;
            #[inline]
            fn neg(self) -> Self {
                Self::from_f32(-self.to_f32())
            }
        }

        small_float!(@op $name Add add AddAssign add_assign);
        small_float!(@op $name Sub sub SubAssign sub_assign);
        small_float!(@op $name Mul mul MulAssign mul_assign);
        small_float!(@op $name Div div DivAssign div_assign);
        small_float!(@op $name Rem rem RemAssign rem_assign);

        impl core::iter::Sum for $name {
            /// The `f32` sum, rounded at the end.
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
                Self::from_f32(iter.map(Self::to_f32).sum())
            }
        }

        impl core::iter::Product for $name {
            /// The `f32` product, rounded at the end.
            fn product<I: Iterator<Item = Self>>(iter: I) -> Self {
                Self::from_f32(iter.map(Self::to_f32).product())
            }
        }

        impl num_traits::Zero for $name {
            fn zero() -> Self {
                Self::ZERO
            }
            fn is_zero(&self) -> bool {
                *self == Self::ZERO
            }
        }

        impl num_traits::One for $name {
            fn one() -> Self {
                Self::ONE
            }
        }

        impl num_traits::Num for $name {
            type FromStrRadixErr = Error;
            /// Radix 10, and what `f32` takes in others.
            fn from_str_radix(s: &str, radix: u32) -> Result<Self> {
                if radix == 10 {
                    return s.parse();
                }
                if !(2..=36).contains(&radix) {
                    return Err(Error::Parse);
                }
                <f32 as num_traits::Num>::from_str_radix(s, radix).map(Self::from_f32).map_err(|_| Error::Parse)
            }
        }

        impl num_traits::Signed for $name {
            fn abs(&self) -> Self {
                Self::abs(*self)
            }
            fn abs_sub(&self, other: &Self) -> Self {
                if *self <= *other { Self::ZERO } else { *self - *other }
            }
            fn signum(&self) -> Self {
                Self::signum(*self)
            }
            fn is_positive(&self) -> bool {
                self.to_f32() > 0.0
            }
            fn is_negative(&self) -> bool {
                self.to_f32() < 0.0
            }
        }
    };

    // f32 has more than twice the digits plus two, so rounding its result again changes nothing (Figueroa, "When is
    // double rounding innocuous?", 1995).
    (@op $name:ident $op:ident $fn:ident $assign:ident $assign_fn:ident) => {
        impl $op for $name {
            type Output = Self;
            #[inline]
            fn $fn(self, other: Self) -> Self {
                Self::from_f32(self.to_f32().$fn(other.to_f32()))
            }
        }

        impl $assign for $name {
            #[inline]
            fn $assign_fn(&mut self, other: Self) {
                *self = self.$fn(other);
            }
        }
    };
}
pub(crate) use small_float;
