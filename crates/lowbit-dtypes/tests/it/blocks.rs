//! MX and NVFP4 against blocks quantized elsewhere, and against single numbers.

use crate::slices::{ROUNDINGS, at};
use lowbit_dtypes::*;
use proptest::prelude::*;

const ALL: [Mx; 6] = [Mx::Fp8E4M3, Mx::Fp8E5M2, Mx::Fp6E2M3, Mx::Fp6E3M2, Mx::Fp4, Mx::Int8];
const RULES: [ScaleRule; 4] =
    [ScaleRule::Floor, ScaleRule::Ceil, ScaleRule::Even, ScaleRule::Rceil];

const NEAREST: Rounding = Rounding::NearestEven;

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn bits<T: bytemuck::Pod>(x: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(x).to_vec()
}

#[test]
fn mx_blocks_are_the_golden_ones_under_every_rule() {
    let x = f32s(include_bytes!("../data/mx_x.f32"));
    let (mut scales, mut codes) = (vec![F8E8M0::ONE; 16], vec![0; 512]);
    for isa in Isa::available() {
        let golden: [(Mx, &[u8]); 5] = [
            (Mx::Fp8E4M3, include_bytes!("../data/mx_e4m3fn.bin")),
            (Mx::Fp8E5M2, include_bytes!("../data/mx_e5m2.bin")),
            (Mx::Fp6E2M3, include_bytes!("../data/mx_e2m3fn.bin")),
            (Mx::Fp6E3M2, include_bytes!("../data/mx_e3m2fn.bin")),
            (Mx::Fp4, include_bytes!("../data/mx_e2m1fn.bin")),
        ];
        for (mx, golden) in golden {
            for (rule, golden) in RULES.into_iter().zip(golden.chunks(16 + 512)) {
                mx.quantize_on(isa, rule, NEAREST, &x, &mut scales, &mut codes).unwrap();
                assert_eq!(bits(&scales), golden[..16], "{mx:?} {rule:?}");
                assert_eq!(codes, golden[16..], "{mx:?} {rule:?}");
            }
            mx.quantize_on(isa, ScaleRule::Floor, NEAREST, &x, &mut scales, &mut codes).unwrap();
            let mut back = vec![0.0; 512];
            mx.dequantize_on(isa, &scales, &codes, &mut back).unwrap();
            let expected = f32s(&golden[4 * (16 + 512)..]);
            assert_eq!(bits(&back), bits(&expected), "{mx:?}");
        }
        let golden = include_bytes!("../data/mxint8.bin");
        Mx::Int8.quantize_on(isa, ScaleRule::Floor, NEAREST, &x, &mut scales, &mut codes).unwrap();
        assert_eq!(bits(&scales), golden[..16]);
        assert_eq!(codes, golden[16..]);
    }
}

#[test]
fn nvfp4_blocks_are_the_golden_ones() {
    for (golden, one_level) in [
        (include_bytes!("../data/nvfp4.bin"), false),
        (include_bytes!("../data/nvfp4_single_level.bin"), true),
    ] {
        let x = f32s(&golden[..2048]);
        let global = f32s(&golden[2048..2052])[0];
        let nvfp4 =
            if one_level { Nvfp4::with_global(1.0).unwrap() } else { Nvfp4::fit(&x).unwrap() };
        assert_eq!(nvfp4.global(), global);
        for isa in Isa::available() {
            let (mut scales, mut codes) = (vec![F8E4M3::ONE; 32], vec![0; 512]);
            nvfp4.quantize_on(isa, NEAREST, &x, &mut scales, &mut codes).unwrap();
            assert_eq!(bits(&scales), golden[2052..2084]);
            assert_eq!(codes, golden[2084..2596]);
            let mut packed = [0; 256];
            pack(4, &codes, &mut packed).unwrap();
            assert_eq!(packed, golden[2596..2852]);
            let mut back = vec![0.0; 512];
            nvfp4.dequantize_on(isa, &scales, &codes, &mut back).unwrap();
            assert_eq!(bits(&back), bits(&f32s(&golden[2852..])));
        }
    }
}

#[test]
fn every_code_under_every_scale_dequantizes_as_alone() {
    fn same(x: &[f32], expected: impl Fn(usize) -> f32) {
        for (i, x) in x.iter().enumerate() {
            let expected = expected(i);
            assert_eq!(x.is_nan(), expected.is_nan());
            assert!(x.is_nan() || x.to_bits() == expected.to_bits(), "{i}: {x} {expected}");
        }
    }
    // All codes, and those that are finite in every format.
    let all: Vec<u8> = (0..256 * 32 + 7).map(|i| (i * 31 % 257) as u8).collect();
    let finite: Vec<u8> = all.iter().map(|&code| (code % 0x7c) | (code & 0x80)).collect();
    for codes in [all, finite] {
        let scales: Vec<_> = (0..=256).map(|i| F8E8M0::from_bits(i as u8)).collect();
        let steps: Vec<_> =
            (0..codes.len().div_ceil(16)).map(|i| F8E4M3::from_bits(i as u8)).collect();
        let mut x = vec![0.0; codes.len()];
        for isa in Isa::available() {
            for mx in ALL {
                mx.dequantize_on(isa, &scales, &codes, &mut x).unwrap();
                same(&x, |i| {
                    let element = match mx.format() {
                        Some(format) => format.decode(codes[i]),
                        None => f32::from(codes[i] as i8) / 64.0,
                    };
                    element * scales[i / 32].to_f32()
                });
            }
            let nvfp4 = Nvfp4::with_global(0.3).unwrap();
            nvfp4.dequantize_on(isa, &steps, &codes, &mut x).unwrap();
            same(&x, |i| Format::F4E2M1.decode(codes[i]) * (steps[i / 16].to_f32() * 0.3));
        }
    }
}

#[test]
fn the_error_of_gaussian_blocks_is_the_one_known_for_each_rule() {
    // Mean squared errors of 4096 blocks of unit Gaussians, by another program with another generator.
    let mut state = 0u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let x: Vec<f32> = (0..4096 * 32)
        .map(|_| {
            ((-2.0 * uniform().ln()).sqrt() * (core::f64::consts::TAU * uniform()).cos()) as f32
        })
        .collect();
    let (mut scales, mut codes) = (vec![F8E8M0::ONE; 4096], vec![0; x.len()]);
    let mut back = vec![0.0; x.len()];
    for (mx, known) in [
        (Mx::Fp4, [0.013296, 0.020990, 0.012643, 0.013408]),
        (Mx::Fp8E4M3, [0.000858, 0.000709, 0.000766, 0.000709]),
        (Mx::Fp6E2M3, [0.000811, 0.001341, 0.000802, 0.000808]),
    ] {
        for (rule, known) in RULES.into_iter().zip(known) {
            mx.quantize(rule, NEAREST, &x, &mut scales, &mut codes).unwrap();
            mx.dequantize(&scales, &codes, &mut back).unwrap();
            let sum: f64 = x.iter().zip(&back).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            let error = sum / x.len() as f64;
            assert!((error / known - 1.0).abs() < 0.02, "{mx:?} {rule:?}: {error}");
        }
    }
}

#[test]
fn a_block_that_is_not_finite_reads_as_nan_and_leaves_the_others_alone() {
    for mx in ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.5; 70];
            x[40] = bad;
            let (mut scales, mut codes) = (vec![F8E8M0::ONE; 3], vec![0; 70]);
            mx.quantize(ScaleRule::Rceil, NEAREST, &x, &mut scales, &mut codes).unwrap();
            let mut back = vec![0.0; 70];
            mx.dequantize(&scales, &codes, &mut back).unwrap();
            assert!(back[32..64].iter().all(|x| x.is_nan()));
            assert!(back[..32].iter().chain(&back[64..]).all(|&x| x == 1.5));
        }
    }
    let (mut scales, mut codes) = ([F8E4M3::ONE; 2], [0; 20]);
    let mut x = [1.0; 20];
    x[17] = f32::NEG_INFINITY;
    let error = Err(Error::NotFinite { value: f32::NEG_INFINITY, index: 17 });
    assert_eq!(Nvfp4::fit(&x).map(|_| ()), error);
    let one = Nvfp4::with_global(1.0).unwrap();
    assert_eq!(one.quantize(NEAREST, &x, &mut scales, &mut codes), error);
}

#[test]
fn zeros_stay_zeros() {
    let x = [0.0; 33];
    for mx in ALL {
        let (mut scales, mut codes, mut back) = ([F8E8M0::ONE; 2], [9; 33], [9.0; 33]);
        mx.quantize(ScaleRule::Floor, NEAREST, &x, &mut scales, &mut codes).unwrap();
        mx.dequantize(&scales, &codes, &mut back).unwrap();
        assert_eq!((scales, codes, back), ([F8E8M0::MIN; 2], [0; 33], x));
    }
    let (mut scales, mut codes, mut back) = ([F8E4M3::ONE; 3], [9; 33], [9.0; 33]);
    let nvfp4 = Nvfp4::fit(&x).unwrap().with_min_scale(F8E4M3::MIN_POSITIVE);
    nvfp4.quantize(NEAREST, &x, &mut scales, &mut codes).unwrap();
    nvfp4.dequantize(&scales, &codes, &mut back).unwrap();
    assert_eq!((scales, codes, back), ([F8E4M3::MIN_POSITIVE; 3], [0; 33], x));
}

#[test]
fn lengths_that_differ_are_errors_before_anything_is_written() {
    let x = [1.0; 33];
    let (mut scales, mut codes) = ([F8E8M0::ONE; 1], [9; 33]);
    assert_eq!(
        Mx::Fp4.quantize(ScaleRule::Floor, NEAREST, &x, &mut scales, &mut codes),
        Err(Error::Length { what: "scales", expected: 2, got: 1 })
    );
    assert_eq!(
        Mx::Fp4.dequantize(&scales, &codes[..31], &mut [0.0; 32]),
        Err(Error::Length { what: "codes", expected: 32, got: 31 })
    );
    let nvfp4 = Nvfp4::fit(&x).unwrap();
    assert_eq!(
        nvfp4.quantize(NEAREST, &x, &mut [F8E4M3::ONE; 3], &mut codes[..32]),
        Err(Error::Length { what: "codes", expected: 33, got: 32 })
    );
    assert_eq!(
        nvfp4.dequantize(&[F8E4M3::ONE; 4], &codes, &mut [0.0; 33]),
        Err(Error::Length { what: "scales", expected: 3, got: 4 })
    );
    assert_eq!(codes, [9; 33]);
    assert_eq!(Nvfp4::with_global(0.0), Err(Error::Scale { value: 0.0 }));
}

/// The smallest E with `max <= largest · 2^E`, by trying.
fn rceil(max: f64, largest: f64) -> i32 {
    (-127..128).find(|&e| max <= largest * 2f64.powi(e)).unwrap_or(127)
}

/// x as an integer of 8 bits.
fn integer(x: f64, rounding: Rounding) -> i8 {
    let x = x.clamp(-127.0, 127.0);
    let rounded = match rounding {
        Rounding::NearestEven => x.round_ties_even(),
        Rounding::NearestAway => x.round(),
        Rounding::TowardZero => x.trunc(),
        Rounding::Stochastic { seed, index } => {
            let fixed = (x.abs() * 2f64.powi(32)) as u64 + u64::from(random(seed, index));
            x.signum() * (fixed >> 32) as f64
        }
    };
    rounded as i8
}

proptest! {
    /// NVFP4's codes are those of single numbers, too.
    #[test]
    fn nvfp4_elements_are_rounded_as_single_numbers_are(
        x in proptest::collection::vec(-100f32..100.0, 0..100),
    ) {
        let nvfp4 = Nvfp4::with_global(0.01).unwrap();
        for rounding in ROUNDINGS {
            for isa in Isa::available() {
                let (mut scales, mut codes) = (vec![F8E4M3::ONE; x.len().div_ceil(16)], vec![0; x.len()]);
                nvfp4.quantize_on(isa, rounding, &x, &mut scales, &mut codes).unwrap();
                for (i, x) in x.iter().enumerate() {
                    let scaled = x / (scales[i / 16].to_f32() * nvfp4.global());
                    let code = Format::F4E2M1.encode_with(scaled, at(rounding, i), Overflow::Saturate);
                    prop_assert_eq!(codes[i], code, "{:?} {} {}", rounding, isa.name(), scaled);
                }
            }
        }
    }

    /// Codes are those of `Format::encode` on `x / scale`, for any length, on every instruction set.
    #[test]
    fn elements_are_rounded_as_single_numbers_are(
        bits in proptest::collection::vec(any::<u32>(), 0..100), spread in 0u32..32,
    ) {
        // Exponents within 2^spread of the middle.
        let x: Vec<f32> = bits
            .iter()
            .map(|b| f32::from_bits(b & 0x807f_ffff | (127 - spread / 2 + (b >> 23 & 0xff) % (spread + 1)) << 23))
            .collect();
        for mx in ALL {
            for (rule, rounding) in RULES.into_iter().flat_map(|rule| ROUNDINGS.map(|rounding| (rule, rounding))) {
                for isa in Isa::available() {
                    let (mut scales, mut codes) = (vec![F8E8M0::ONE; x.len().div_ceil(32)], vec![0; x.len()]);
                    mx.quantize_on(isa, rule, rounding, &x, &mut scales, &mut codes).unwrap();
                    for (i, &x) in x.iter().enumerate() {
                        let scaled = f64::from(x) / scales[i / 32].to_f64();
                        let code = match mx.format() {
                            Some(format) => format.encode_f64(scaled, at(rounding, i), Overflow::Saturate),
                            None => integer(scaled * 64.0, at(rounding, i)) as u8,
                        };
                        prop_assert_eq!(codes[i], code, "{:?} {:?} {} {}", mx, rounding, isa.name(), scaled);
                    }
                    if rule == ScaleRule::Rceil {
                        let largest = mx.format().map_or(127.0 / 64.0, |f| f.max().into());
                        for (block, scale) in x.chunks(32).zip(&scales) {
                            let max = block.iter().fold(0f64, |m, &x| m.max(f64::from(x).abs()));
                            prop_assert_eq!(scale.to_f64(), 2f64.powi(rceil(max, largest)));
                        }
                    }
                }
            }
        }
    }

    /// Scaling by a power of two moves the scale and leaves the codes.
    #[test]
    fn powers_of_two_move_into_the_scale(
        x in proptest::collection::vec(-100f32..100.0, 32), k in -40i32..40,
    ) {
        let y: Vec<f32> = x.iter().map(|x| x * 2f32.powi(k)).collect();
        for mx in ALL {
            for rule in RULES {
                let (mut scale, mut codes) = ([F8E8M0::ONE], [0; 32]);
                mx.quantize(rule, NEAREST, &x, &mut scale, &mut codes).unwrap();
                let (mut moved, mut same) = ([F8E8M0::ONE], [0; 32]);
                mx.quantize(rule, NEAREST, &y, &mut moved, &mut same).unwrap();
                if x.iter().any(|&x| x.abs() > 1e-3) {
                    prop_assert_eq!(i32::from(moved[0].to_bits()), i32::from(scale[0].to_bits()) + k);
                    prop_assert_eq!(codes, same);
                }
            }
        }
        let a = Nvfp4::fit(&x).unwrap();
        let b = Nvfp4::fit(&x.iter().map(|x| x * 2.0).collect::<Vec<_>>()).unwrap();
        prop_assert_eq!(b.global(), if x.iter().all(|&x| x == 0.0) { 1.0 } else { 2.0 * a.global() });
    }

    #[test]
    fn no_input_panics(bits in proptest::collection::vec(any::<u32>(), 0..80), global: f32) {
        let x: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let (mut scales, mut codes) = (vec![F8E8M0::ONE; x.len().div_ceil(32)], vec![0; x.len()]);
        for mx in ALL {
            for rule in RULES {
                mx.quantize(rule, NEAREST, &x, &mut scales, &mut codes).unwrap();
            }
        }
        if let Ok(nvfp4) = Nvfp4::with_global(global) {
            let _ = nvfp4.quantize(NEAREST, &x, &mut vec![F8E4M3::ONE; x.len().div_ceil(16)], &mut codes);
        }
        let _ = Table16::NF4.quantize(7, &x, &mut vec![0.0; x.len().div_ceil(7)], &mut codes);
    }
}
