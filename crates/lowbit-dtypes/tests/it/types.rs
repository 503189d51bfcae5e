//! The types of single numbers: the surface of `half`.

use core::cmp::Ordering;
use core::num::FpCategory;

use lowbit_dtypes::*;
use num_traits::{
    AsPrimitive, Bounded, FromBytes, FromPrimitive, Num, NumCast, One, Signed, ToBytes, Zero,
};

/// Runs `$test!(Type)` for every type with a sign.
macro_rules! signed {
    ($test:ident) => {
        $test!(F8E4M3);
        $test!(F8E4M3IEEE);
        $test!(F8E5M2);
        $test!(F8E4M3FNUZ);
        $test!(F8E5M2FNUZ);
        $test!(F8E4M3B11FNUZ);
        $test!(F8E3M4);
        $test!(F6E2M3);
        $test!(F6E3M2);
        $test!(F4E2M1);
        $test!(F4E3M0);
    };
}

macro_rules! all {
    ($test:ident) => {
        signed!($test);
        $test!(F8E8M0);
    };
}

#[test]
fn every_byte_is_a_value_and_bits_above_the_code_are_ignored() {
    macro_rules! test {
        ($t:ident) => {
            let mask = ((1u32 << $t::FORMAT.bits()) - 1) as u8;
            for byte in 0..=255u8 {
                let x = $t::from_bits(byte);
                assert_eq!(x.to_bits(), byte & mask);
                let cast: $t = bytemuck::cast(byte);
                assert_eq!(cast.to_bits(), byte & mask);
                assert_eq!(cast.to_f32().to_bits(), $t::FORMAT.decode(byte).to_bits());
                assert_eq!(Into::<f32>::into(x).to_bits(), x.to_f32().to_bits());
                assert_eq!(x.is_nan(), x.to_f32().is_nan());
                assert_eq!(x.is_infinite(), x.to_f32().is_infinite());
                assert_eq!(x.is_finite(), x.to_f32().is_finite());
                assert_eq!(x.is_sign_negative(), x.to_f32().is_sign_negative());
                assert_eq!(x == x, !x.is_nan());
                if !x.is_nan() {
                    assert_eq!($t::from_f32(x.to_f32()).to_bits(), x.to_bits());
                    assert_eq!($t::from_f64(x.to_f64()).to_bits(), x.to_bits());
                    assert_eq!(x.to_string().parse::<$t>().unwrap().to_bits(), x.to_bits());
                }
            }
        };
    }
    all!(test);
}

#[test]
fn constants_say_what_they_are() {
    macro_rules! test {
        ($t:ident) => {
            let finite = (0..=255).map($t::from_bits).filter(|x| x.is_finite());
            let max = finite.clone().map($t::to_f32).fold(f32::MIN, f32::max);
            let min = finite.clone().map($t::to_f32).fold(f32::MAX, f32::min);
            let positive = finite.clone().map($t::to_f32).filter(|&x| x > 0.0);
            assert_eq!($t::MAX.to_f32(), max);
            assert_eq!($t::MIN.to_f32(), min);
            let smallest = positive.fold(f32::MAX, f32::min);
            assert_eq!($t::MIN_POSITIVE_SUBNORMAL.to_f32(), smallest);
            let normal = finite.filter(|x| x.is_normal() && x.is_sign_positive());
            let smallest = normal.map($t::to_f32).fold(f32::MAX, f32::min);
            assert_eq!($t::MIN_POSITIVE.to_f32(), smallest);
            assert_eq!($t::ONE.to_f32(), 1.0);
            let next = $t::from_bits($t::ONE.to_bits() + 1);
            assert_eq!($t::EPSILON, next.to_f32() - 1.0, stringify!($t));
            assert_eq!(<$t as Bounded>::max_value(), $t::MAX);
            assert_eq!($t::from_f32_saturating(f32::INFINITY), $t::MAX);
            assert_eq!($t::default().to_bits(), 0);
        };
    }
    all!(test);
    macro_rules! test {
        ($t:ident) => {
            assert_eq!($t::ZERO.to_f32(), 0.0);
            assert_eq!($t::NEG_ONE.to_f32(), -1.0);
        };
    }
    signed!(test);
    assert!(F8E5M2::INFINITY.to_f32() == f32::INFINITY && F8E5M2::NEG_INFINITY.is_infinite());
    assert!(F8E4M3::NAN.is_nan() && F8E5M2::NAN.is_nan() && F8E8M0::NAN.is_nan());
    assert!(F8E4M3FNUZ::NAN.is_nan() && F8E3M4::NAN.is_nan());
    assert_eq!(F4E2M1::NEG_ZERO.to_f32().to_bits(), (-0f32).to_bits());
    const IN_CONST: F8E4M3 = F8E4M3::from_f32(3.1);
    assert_eq!(IN_CONST.to_f32(), 3.0);
    // half: from_f32 goes to infinity; without one, to NaN.
    assert!(F8E4M3::from_f32(1e9).is_nan());
    assert_eq!(F8E5M2::from_f32(1e9), F8E5M2::INFINITY);
    assert_eq!(F4E2M1::from_f32(1e9), F4E2M1::MAX);
}

#[test]
fn categories_and_order() {
    assert_eq!(F8E4M3::from_bits(0x01).classify(), FpCategory::Subnormal);
    assert_eq!(F8E4M3::from_bits(0x07).classify(), FpCategory::Subnormal);
    assert_eq!(F8E4M3::from_bits(0x08).classify(), FpCategory::Normal);
    assert_eq!(F8E4M3::from_bits(0x80).classify(), FpCategory::Zero);
    assert_eq!(F8E4M3::from_bits(0x7f).classify(), FpCategory::Nan);
    assert_eq!(F8E5M2::from_bits(0x7c).classify(), FpCategory::Infinite);
    assert_eq!(F8E8M0::from_bits(0).classify(), FpCategory::Normal);

    let mut all: Vec<F8E5M2> = (0..=255).map(F8E5M2::from_bits).collect();
    all.sort_by(F8E5M2::total_cmp);
    assert!(all[0].is_nan() && all[0].is_sign_negative());
    assert!(all[255].is_nan() && all[255].is_sign_positive());
    assert!(all[3..253].windows(2).all(|p| p[0] <= p[1]));
    assert_eq!(F8E5M2::NEG_ZERO.total_cmp(&F8E5M2::ZERO), Ordering::Less);
    assert_eq!(F8E5M2::NEG_ZERO, F8E5M2::ZERO);
    assert_eq!(F8E5M2::NAN.partial_cmp(&F8E5M2::ONE), None);
    assert_eq!(F8E5M2::NAN.max(F8E5M2::ONE), F8E5M2::ONE);
    assert_eq!(F8E5M2::ONE.min(F8E5M2::NAN), F8E5M2::ONE);
    assert_eq!(F8E5M2::ONE.max(F8E5M2::MAX), F8E5M2::MAX);
    assert_eq!(F8E5M2::ONE.min(F8E5M2::ZERO), F8E5M2::ZERO);
}

/// All pairs of codes: f32 arithmetic rounded again is the exact result rounded once, which f64 gives.
#[test]
fn arithmetic_rounds_once() {
    macro_rules! test {
        ($t:ident) => {
            let count = 1u32 << $t::FORMAT.bits();
            for (a, b) in (0..count).flat_map(|a| (0..count).map(move |b| (a, b))) {
                let (a, b) = ($t::from_bits(a as u8), $t::from_bits(b as u8));
                let (x, y) = (a.to_f64(), b.to_f64());
                for (got, exact) in [(a + b, x + y), (a - b, x - y), (a * b, x * y), (a / b, x / y)] {
                    let expected = $t::from_f64(exact);
                    let same = got.is_nan() && expected.is_nan() || got.to_bits() == expected.to_bits();
                    // A sum of opposite zeros and NaN in formats without one may differ in sign only.
                    assert!(same || got == expected, "{a} {b}: {got} {expected}");
                }
                let mut c = a;
                c += b;
                assert!(c.is_nan() || c == a + b);
            }
            for a in (0..count).map(|a| $t::from_bits(a as u8)).filter(|a| !a.is_nan()) {
                assert_eq!((-a).to_f32(), -a.to_f32());
                assert_eq!(a.abs().to_f32(), a.to_f32().abs());
                assert_eq!(a.signum().to_f32(), a.to_f32().signum());
                let negative = a.copysign($t::NEG_ONE);
                assert_eq!(negative.to_f32(), -a.to_f32().abs());
            }
        };
    }
    signed!(test);
    let sum: F8E4M3 = (0..100).map(|_| F8E4M3::from_f32(0.0625)).sum();
    assert_eq!(sum.to_f32(), 6.0); // of 6.25, a tie; one by one it would stop at 1
    let product: F8E4M3 = [2.0, 3.0, 4.0].map(F8E4M3::from_f32).into_iter().product();
    assert_eq!(product.to_f32(), 24.0);
}

#[test]
fn text_is_that_of_f32_or_of_the_code() {
    let x = F8E4M3::from_f32(-1.75);
    assert_eq!(format!("{x} {x:?} {x:.3} {x:e}"), "-1.75 -1.75 -1.750 -1.75e0");
    assert_eq!(format!("{x:x} {x:#X} {x:b} {x:o}"), "be 0xBE 10111110 276");
    assert_eq!("1e3".parse(), Ok(F8E5M2::from_f32(1024.0)));
    assert!("nan".parse::<F8E4M3>().unwrap().is_nan());
    assert_eq!("one".parse::<F8E4M3>(), Err(Error::Parse));
    assert_eq!(F8E4M3::from_str_radix("1.1", 2), Ok(F8E4M3::from_f32(1.5)));
    assert_eq!(F8E4M3::from_str_radix("1.1", 1), Err(Error::Parse));
    assert_eq!(F8E4M3::from_str_radix("1.1", 99), Err(Error::Parse));
}

#[test]
fn num_traits_see_numbers() {
    assert_eq!(F8E4M3::from_i64(-3), Some(F8E4M3::from_f32(-3.0)));
    assert_eq!(<F8E4M3 as NumCast>::from(17u8), Some(F8E4M3::from_f32(16.0)));
    let n: i32 = F8E4M3::from_f32(-3.5).as_();
    assert_eq!(n, -3);
    let x: F8E4M3 = 2.5f64.as_();
    assert_eq!(x.to_f32(), 2.5);
    assert_eq!(num_traits::ToPrimitive::to_u8(&F8E4M3::MAX), None);
    assert_eq!(num_traits::ToPrimitive::to_u16(&F8E4M3::MAX), Some(448));
    assert!(F8E4M3::zero().is_zero() && F8E4M3::one() == F8E4M3::ONE);
    assert!(Signed::is_negative(&F8E4M3::NEG_ONE));
    assert_eq!(F8E4M3::ONE.to_le_bytes(), [0x38]);
    assert_eq!(F8E4M3::from_be_bytes(&[0x38]), F8E4M3::ONE);
}

#[test]
fn formats_are_found_by_every_name() {
    for &format in Format::ALL {
        let name = format.name().unwrap();
        assert_eq!(name.parse(), Ok(format));
        assert_eq!(name.to_uppercase().parse(), Ok(format));
    }
    assert_eq!("float7".parse::<Format>(), Err(Error::Name));
    assert_eq!(Format::new(4, 2, 7, Specials::None).unwrap().name(), None);
}

#[cfg(feature = "serde")]
#[test]
fn serde_writes_codes() {
    let json = serde_json::to_string(&[F8E4M3::ONE, F8E4M3::MAX]).unwrap();
    assert_eq!(json, "[56,126]");
    assert_eq!(serde_json::from_str::<[F8E4M3; 2]>(&json).unwrap(), [F8E4M3::ONE, F8E4M3::MAX]);
}
