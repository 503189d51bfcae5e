//! The float formats of at most 8 bits, a line each.

use core::cmp::Ordering;
use core::fmt;
use core::num::FpCategory;
use core::ops::{
    Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Rem, RemAssign, Sub, SubAssign,
};
use core::str::FromStr;

use crate::simd::{Isa, lanes};
use crate::types::small_float;
use crate::{Error, Format, Overflow, Result, Rounding, Specials};

macro_rules! formats {
    ($($(#[$doc:meta])* $name:ident = $exponent:literal $fraction:literal $bias:literal $specials:ident, $($alias:literal)+;)+) => {
        impl Format {
            $($(#[$doc])*
            pub const $name: Self = match Self::new($exponent, $fraction, $bias, Specials::$specials) {
                Ok(format) => format,
                Err(_) => panic!("not a format"),
            };)+

            /// Every format that has a constant.
            ///
            /// ```
            /// use lowbit_dtypes::Format;
            /// assert!(Format::ALL.iter().all(|format| format.bits() <= 8));
            /// ```
            pub const ALL: &[Self] = &[$(Self::$name),+];
        }

        /// In the order of [`Format::ALL`]: the name in ml_dtypes, then other names.
        const NAMES: &[&[&str]] = &[$(&[$($alias),+]),+];

        $(small_float!($(#[$doc])* $name $specials);)+

        crate::pod::pod!($($name)+);
    };
}

formats! {
    /// OCP OFP8 E4M3: 448 is the largest, no infinity.
    F8E4M3 = 4 3 7 NanOnly, "float8_e4m3fn" "f8_e4m3" "f8e4m3" "f8e4m3fn" "e4m3" "e4m3fn" "fp8_e4m3" "fp8";
    /// E4M3 with the infinities of IEEE 754: 240 is the largest. `float8_e4m3` in ml_dtypes, not what OCP calls E4M3.
    F8E4M3IEEE = 4 3 7 Ieee, "float8_e4m3" "f8e4m3ieee" "e4m3ieee";
    /// OCP OFP8 E5M2: f16 cut to 8 bits; 57344 is the largest.
    F8E5M2 = 5 2 15 Ieee, "float8_e5m2" "f8_e5m2" "f8e5m2" "e5m2" "fp8_e5m2";
    /// E4M3 of AMD MI300 and Graphcore: half the value of the same OCP code; 240 is the largest.
    F8E4M3FNUZ = 4 3 8 NanIsNegativeZero, "float8_e4m3fnuz" "f8_e4m3fnuz" "f8e4m3fnuz" "e4m3fnuz";
    /// E5M2 of AMD MI300 and Graphcore: half the value of the same OCP code; 57344 is the largest.
    F8E5M2FNUZ = 5 2 16 NanIsNegativeZero, "float8_e5m2fnuz" "f8_e5m2fnuz" "f8e5m2fnuz" "e5m2fnuz";
    /// E4M3 with bias 11 for activations: 30 is the largest.
    F8E4M3B11FNUZ = 4 3 11 NanIsNegativeZero, "float8_e4m3b11fnuz" "f8e4m3b11fnuz" "e4m3b11fnuz";
    /// E3M4 with the infinities of IEEE 754: 15.5 is the largest.
    F8E3M4 = 3 4 3 Ieee, "float8_e3m4" "f8_e3m4" "f8e3m4" "e3m4";
    /// OCP MX scale: the power of two `2^(code - 127)`.
    F8E8M0 = 8 0 127 Scale, "float8_e8m0fnu" "f8_e8m0" "f8e8m0" "f8e8m0fnu" "e8m0" "e8m0fnu" "ue8m0";
    /// OCP MX FP6 E2M3: 7.5 is the largest, every code finite.
    F6E2M3 = 2 3 1 None, "float6_e2m3fn" "f6_e2m3" "f6e2m3" "f6e2m3fn" "e2m3" "e2m3fn" "fp6_e2m3";
    /// OCP MX FP6 E3M2: 28 is the largest, every code finite.
    F6E3M2 = 3 2 3 None, "float6_e3m2fn" "f6_e3m2" "f6e3m2" "f6e3m2fn" "e3m2" "e3m2fn" "fp6_e3m2";
    /// OCP MX FP4 E2M1: ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}.
    F4E2M1 = 2 1 1 None, "float4_e2m1fn" "f4" "f4_e2m1" "f4e2m1" "f4e2m1fn" "e2m1" "e2m1fn" "fp4_e2m1" "fp4";
    /// FP4 without fraction: ±{0, 0.25, 0.5, 1, 2, 4, 8, 16}. No standard fixes the bias or the code of zero; this
    /// crate takes bias 3 and exponent field 0.
    F4E3M0 = 3 0 3 None, "float4_e3m0" "f4e3m0" "e3m0";
}

impl Format {
    /// The name in ml_dtypes, if the format is one of [`Format::ALL`].
    ///
    /// ```
    /// use lowbit_dtypes::Format;
    /// assert_eq!(Format::F8E4M3.name(), Some("float8_e4m3fn"));
    /// ```
    pub fn name(self) -> Option<&'static str> {
        let i = Self::ALL.iter().position(|&format| format == self)?;
        Some(NAMES[i][0])
    }
}

/// By the name in ml_dtypes or another common one, in any case.
///
/// ```
/// use lowbit_dtypes::Format;
/// assert_eq!("E4M3".parse(), Ok(Format::F8E4M3));
/// assert_eq!("float8_e4m3".parse(), Ok(Format::F8E4M3IEEE)); // as ml_dtypes has it
/// assert_eq!("F8_E4M3".parse(), Ok(Format::F8E4M3)); // as safetensors has it
/// ```
impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let i = NAMES
            .iter()
            .position(|names| names.iter().any(|n| n.eq_ignore_ascii_case(name)))
            .ok_or(Error::Name)?;
        Ok(Self::ALL[i])
    }
}
