//! The codec of 8 bits and fewer against the tables, the slow exact model and ml_dtypes.

use crate::reference::{Reference, csv_values, widen};
use lowbit_dtypes::{Format, Overflow, Rounding, Specials, bf16, f16};
use proptest::prelude::*;

const BOTH: [Overflow; 2] = [Overflow::Saturate, Overflow::Infinity];
const ROUNDINGS: [Rounding; 5] = [
    Rounding::NearestEven,
    Rounding::NearestAway,
    Rounding::TowardZero,
    Rounding::Stochastic { seed: 0, index: 0 },
    Rounding::Stochastic { seed: 7, index: u64::MAX },
];

fn formats() -> Vec<(Format, Reference)> {
    let all: Vec<_> =
        Reference::small().into_iter().map(|r| (r.name.parse::<Format>().unwrap(), r)).collect();
    assert_eq!(all.len(), Format::ALL.len());
    all
}

#[track_caller]
fn check(format: Format, reference: &Reference, x: f32, roundings: &[Rounding]) {
    for &rounding in roundings {
        for overflow in BOTH {
            let expected = reference.encode(widen(x), rounding, overflow) as u8;
            let got = format.encode_with(x, rounding, overflow);
            assert_eq!(got, expected, "{} {x:e} {rounding:?} {overflow:?}", reference.name);
            assert_eq!(format.encode_f64(widen(x), rounding, overflow), expected);
            if rounding == Rounding::NearestEven {
                assert_eq!(format.encode(x, overflow), expected);
            }
        }
    }
}

#[test]
fn every_code_decodes_to_the_value_of_the_tables() {
    macro_rules! table {
        ($format:expr, $name:literal) => {{
            let values = csv_values(include_str!(concat!("../data/tables/", $name, ".csv")));
            assert_eq!(values.len(), 1 << $format.bits());
            for (code, &value) in values.iter().enumerate() {
                let got = $format.decode(code as u8);
                let bits = if value.is_nan() {
                    0x7fc0_0000 | (value.is_sign_negative() as u32) << 31
                } else {
                    (value as f32).to_bits()
                };
                assert_eq!(got.to_bits(), bits, "{} {code:#x}: {got} {value}", $name);
            }
        }};
    }
    table!(Format::F8E4M3, "float8_e4m3fn");
    table!(Format::F8E4M3IEEE, "float8_e4m3");
    table!(Format::F8E5M2, "float8_e5m2");
    table!(Format::F8E4M3FNUZ, "float8_e4m3fnuz");
    table!(Format::F8E5M2FNUZ, "float8_e5m2fnuz");
    table!(Format::F8E4M3B11FNUZ, "float8_e4m3b11fnuz");
    table!(Format::F8E3M4, "float8_e3m4");
    table!(Format::F8E8M0, "float8_e8m0fnu");
    table!(Format::F6E2M3, "float6_e2m3fn");
    table!(Format::F6E3M2, "float6_e3m2fn");
    table!(Format::F4E2M1, "float4_e2m1fn");
    table!(Format::F4E3M0, "fp4_e3m0_convention");
}

#[test]
fn every_code_comes_back_in_every_mode() {
    for (format, _) in formats() {
        for code in 0..=255u8 {
            let x = format.decode(code);
            let code = code & ((1u32 << format.bits()) - 1) as u8;
            if !x.is_finite() {
                continue;
            }
            for rounding in ROUNDINGS {
                for overflow in BOTH {
                    assert_eq!(format.encode_with(x, rounding, overflow), code, "{format:?}");
                }
            }
        }
    }
}

#[test]
fn every_f16_and_every_bf16_encodes_as_the_exact_model_does() {
    for (format, reference) in formats() {
        for bits in 0..=u16::MAX {
            check(format, &reference, f16::from_bits(bits).to_f32(), &ROUNDINGS);
            check(format, &reference, bf16::from_bits(bits).to_f32(), &ROUNDINGS);
        }
    }
}

#[test]
fn every_midpoint_rounds_to_nearest_even_and_its_neighbours_to_theirs() {
    for (format, reference) in formats() {
        let mut ends = reference.values.clone();
        ends.push(reference.next);
        for (low, pair) in ends.windows(2).enumerate() {
            let middle = pair[0] + (pair[1] - pair[0]) / 2.0;
            let low = low as u32;
            let even = match reference.has_fraction {
                true => low + (low & 1),
                false => low + u32::from(low > 0 || !format.is_signed()),
            };
            // With the largest finite number above, "one more" is an overflow.
            let code = |magnitude: u32, overflow| match overflow {
                _ if magnitude <= u32::from(format.max_code()) => magnitude,
                Overflow::Saturate => u32::from(format.max_code()),
                Overflow::Infinity => reference.overflow,
            } as u8;
            for overflow in BOTH {
                let encode = |x| format.encode_f64(x, Rounding::NearestEven, overflow);
                assert_eq!(encode(middle), code(even, overflow), "{} {middle}", reference.name);
                assert_eq!(encode(middle.next_down()), code(low, overflow), "{middle}");
                assert_eq!(encode(middle.next_up()), code(low + 1, overflow), "{middle}");
            }
            let middle = middle as f32;
            for x in [middle, middle.next_down(), middle.next_up(), pair[0] as f32] {
                for x in [x, -x, x.next_up(), x.next_down()] {
                    check(format, &reference, x, &ROUNDINGS);
                }
            }
        }
    }
}

/// Every exponent of f32, and in each every place where any of these formats can round, with the neighbours.
#[test]
fn every_binade_of_f32_encodes_as_the_exact_model_does() {
    let formats = formats();
    for exponent in 0..=255u32 {
        for step in 0..64u32 {
            let middle = exponent << 23 | step << 17;
            for bits in [middle.wrapping_sub(1), middle, middle + 1, middle + 0x1234] {
                for bits in [bits & 0x7fff_ffff, bits | 0x8000_0000] {
                    for (format, reference) in &formats {
                        check(*format, reference, f32::from_bits(bits), &ROUNDINGS[..4]);
                    }
                }
            }
        }
    }
}

#[test]
fn f64_is_rounded_once() {
    // Just above a midpoint by less than an f32 can tell: rounded through f32 it would become a tie.
    for (format, reference) in formats() {
        for pair in reference.values.windows(2) {
            let middle = pair[0] + (pair[1] - pair[0]) / 2.0;
            for x in [middle.next_up(), middle.next_down(), middle * (1.0 + 1e-12)] {
                for rounding in ROUNDINGS {
                    assert_eq!(
                        u32::from(format.encode_f64(x, rounding, Overflow::Saturate)),
                        reference.encode(x, rounding, Overflow::Saturate),
                        "{} {x}",
                        reference.name
                    );
                }
            }
        }
    }
    for x in [5e-324, 1e-320, 1e-300, 1e300, f64::MAX, f64::INFINITY, 0.0] {
        for x in [x, -x] {
            for (format, reference) in formats() {
                for rounding in ROUNDINGS {
                    for overflow in BOTH {
                        assert_eq!(
                            u32::from(format.encode_f64(x, rounding, overflow)),
                            reference.encode(x, rounding, overflow)
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn codes_are_those_of_ml_dtypes() {
    macro_rules! golden {
        ($format:expr, $name:literal) => {
            let records = include_bytes!(concat!("../data/from_f32_", $name, ".bin"));
            for &[a, b, c, d, code, saturating] in records.as_chunks::<6>().0 {
                let bits = u32::from_le_bytes([a, b, c, d]);
                let x = f32::from_bits(bits);
                // ml_dtypes makes a zero of NaN and inverts its sign; here it is +0.
                let nan_is_zero = x.is_nan() && $format.nan_code().is_none();
                let (code, saturating) = if nan_is_zero { (0, 0) } else { (code, saturating) };
                // Between 2^-127 and 1.5·2^-127, subnormal in f32, ml_dtypes goes up to 2^-126; nearest is 2^-127.
                let below_tie = $name == "float8_e8m0fnu" && (0x40_0001..0x60_0000).contains(&bits);
                let (code, saturating) = if below_tie { (0, 0) } else { (code, saturating) };
                assert_eq!($format.encode(x, Overflow::Infinity), code, "{} {bits:#x}", $name);
                assert_eq!($format.encode(x, Overflow::Saturate), saturating, "{bits:#x}");
            }
        };
    }
    golden!(Format::F8E4M3, "float8_e4m3fn");
    golden!(Format::F8E4M3IEEE, "float8_e4m3");
    golden!(Format::F8E5M2, "float8_e5m2");
    golden!(Format::F8E4M3FNUZ, "float8_e4m3fnuz");
    golden!(Format::F8E5M2FNUZ, "float8_e5m2fnuz");
    golden!(Format::F8E4M3B11FNUZ, "float8_e4m3b11fnuz");
    golden!(Format::F8E3M4, "float8_e3m4");
    golden!(Format::F8E8M0, "float8_e8m0fnu");
    golden!(Format::F6E2M3, "float6_e2m3fn");
    golden!(Format::F6E3M2, "float6_e3m2fn");
    golden!(Format::F4E2M1, "float4_e2m1fn");
}

/// The mean of many draws is the number: five standard errors are 6e-4 of a step at most, so a bias of 1e-3 fails.
#[test]
fn stochastic_rounding_has_no_bias() {
    const DRAWS: u64 = 1 << 24;
    for (k, (format, x)) in
        [(Format::F8E4M3, 1.03f32), (Format::F4E2M1, -2.3), (Format::F8E5M2, 3e-5)]
            .into_iter()
            .enumerate()
    {
        let low = format.decode(format.encode_with(x, Rounding::TowardZero, Overflow::Saturate));
        let away = format.encode_with(x, Rounding::TowardZero, Overflow::Saturate) + 1;
        let high = format.decode(away);
        let chance = f64::from(x - low) / f64::from(high - low);
        let mut ups = 0u64;
        for index in 0..DRAWS {
            let rounding = Rounding::Stochastic { seed: k as u64, index };
            let code = format.encode_with(x, rounding, Overflow::Saturate);
            assert!(code == away || code == away - 1);
            ups += u64::from(code == away);
        }
        let error = ups as f64 / DRAWS as f64 - chance;
        let deviation = (chance * (1.0 - chance) / DRAWS as f64).sqrt();
        assert!(deviation * 5.0 < 1e-3);
        assert!(error.abs() < 5.0 * deviation, "{format:?} {x}: {error} of a step");
    }
}

#[test]
fn seeds_and_indices_draw_independently() {
    // The codes of a tie under two seeds, or one index apart, agree half the time.
    let draws = |seed, first: u64| -> Vec<bool> {
        (0..1 << 16)
            .map(|i| {
                let rounding = Rounding::Stochastic { seed, index: first + i };
                Format::F8E4M3.encode_with(1.0625, rounding, Overflow::Saturate) == 0x39
            })
            .collect()
    };
    let a = draws(1, 0);
    for b in [draws(2, 0), draws(1, 1), draws(1 << 32 | 1, 0), draws(1, 1 << 40)] {
        let agree = a.iter().zip(&b).filter(|(a, b)| a == b).count();
        // Half of 65536; five standard deviations of 128.
        assert!((32768 - 640..32768 + 640).contains(&agree), "{agree}");
    }
}

#[test]
fn facts_of_the_formats_are_the_published_ones() {
    // max, smallest normal, smallest
    for (format, max, normal, smallest) in [
        (Format::F8E4M3, 448.0, 2f32.powi(-6), 2f32.powi(-9)),
        (Format::F8E4M3IEEE, 240.0, 2f32.powi(-6), 2f32.powi(-9)),
        (Format::F8E5M2, 57344.0, 2f32.powi(-14), 2f32.powi(-16)),
        (Format::F8E4M3FNUZ, 240.0, 2f32.powi(-7), 2f32.powi(-10)),
        (Format::F8E5M2FNUZ, 57344.0, 2f32.powi(-15), 2f32.powi(-17)),
        (Format::F8E4M3B11FNUZ, 30.0, 2f32.powi(-10), 2f32.powi(-13)),
        (Format::F8E3M4, 15.5, 2f32.powi(-2), 2f32.powi(-6)),
        (Format::F8E8M0, 2f32.powi(127), 2f32.powi(-127), 2f32.powi(-127)),
        (Format::F6E2M3, 7.5, 1.0, 0.125),
        (Format::F6E3M2, 28.0, 0.25, 0.0625),
        (Format::F4E2M1, 6.0, 1.0, 0.5),
        (Format::F4E3M0, 16.0, 0.25, 0.25),
    ] {
        assert_eq!(format.max(), max, "{format:?}");
        assert_eq!(format.min_positive(), normal, "{format:?}");
        assert_eq!(format.min_positive_subnormal(), smallest, "{format:?}");
        assert_eq!(format.max_exponent(), max.log2().floor() as i32);
    }
}

proptest! {
    /// A format that `new` takes never panics, and what it decodes encodes to the same code.
    #[test]
    fn any_format_that_is_accepted_works(
        exponent_bits in 0u32..12, fraction_bits in 0u32..12, bias in -300i32..300, kind in 0..5, bits: u64,
    ) {
        let specials = [Specials::Ieee, Specials::NanOnly, Specials::NanIsNegativeZero, Specials::None,
            Specials::Scale][kind as usize];
        if let Ok(format) = Format::new(exponent_bits, fraction_bits, bias, specials) {
            prop_assert!(format.bits() <= 8);
            for code in 0..=255u8 {
                let x = format.decode(code);
                prop_assert!(x.is_nan() || bf16::from_f32(x).to_f32() == x);
                for rounding in ROUNDINGS {
                    let back = format.encode_with(x, rounding, Overflow::Infinity);
                    if x.is_nan() {
                        prop_assert!(format.decode(back).is_nan());
                    } else {
                        prop_assert_eq!(back, code & ((1u32 << format.bits()) - 1) as u8);
                    }
                    let _ = format.encode_f64(f64::from_bits(bits), rounding, Overflow::Saturate);
                }
            }
        }
    }

    #[test]
    fn rounding_keeps_order_and_sign(a: f32, b: f32) {
        for &format in Format::ALL {
            for rounding in &ROUNDINGS[..3] {
                let round = |x| format.decode(format.encode_with(x, *rounding, Overflow::Saturate));
                if a <= b {
                    prop_assert!(round(a) <= round(b));
                }
                if format.is_signed() && !a.is_nan() {
                    prop_assert_eq!(round(-a), -round(a));
                }
            }
        }
    }
}
