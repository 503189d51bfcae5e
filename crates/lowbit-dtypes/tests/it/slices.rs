//! Slices against single numbers on every instruction set, and the 16-bit types against the exact model.

use crate::reference::{Reference, widen};
use lowbit_dtypes::*;
use proptest::prelude::*;

const BOTH: [Overflow; 2] = [Overflow::Saturate, Overflow::Infinity];
pub(crate) const ROUNDINGS: [Rounding; 4] = [
    Rounding::NearestEven,
    Rounding::NearestAway,
    Rounding::TowardZero,
    Rounding::Stochastic { seed: 3, index: u64::MAX - 5 },
];

pub(crate) fn at(rounding: Rounding, i: usize) -> Rounding {
    match rounding {
        Rounding::Stochastic { seed, index } => {
            Rounding::Stochastic { seed, index: index.wrapping_add(i as u64) }
        }
        _ => rounding,
    }
}

/// Every binade, every place where a format can round, the neighbours, both signs; NaN and infinities among them.
fn dense() -> Vec<f32> {
    let mut x = Vec::new();
    for exponent in 0..=255u32 {
        for step in 0..64u32 {
            let middle = exponent << 23 | step << 17;
            for bits in [middle.wrapping_sub(1), middle, middle + 1, middle + 0x1234] {
                x.extend([bits & 0x7fff_ffff, bits | 0x8000_0000].map(f32::from_bits));
            }
        }
    }
    x
}

/// Formats with corners that no constant has.
fn more_formats() -> Vec<Format> {
    let mut formats = Format::ALL.to_vec();
    for (e, m, bias, specials) in [
        (7, 0, 63, Specials::None),
        (6, 1, 31, Specials::Ieee),
        (7, 0, 0, Specials::NanOnly),
        (2, 5, -124, Specials::None),             // reaches 2^127
        (4, 3, 130, Specials::NanIsNegativeZero), // subnormal in f32
        (1, 6, 1, Specials::Ieee),
        (5, 3, 15, Specials::Scale),
        (3, 1, 3, Specials::NanIsNegativeZero),
        (2, 5, 127, Specials::None),
    ] {
        formats.push(Format::new(e, m, bias, specials).unwrap());
    }
    formats
}

#[test]
fn slices_equal_single_numbers_on_every_instruction_set() {
    let x = dense();
    let mut wide: Vec<f64> = x.iter().map(|&x| f64::from(x) * (1.0 + 1e-10)).collect();
    // Beyond f32, at its edge and below its subnormals.
    let edges = [1e300, 2f64.powi(128), 2f64.powi(128).next_down(), 1e-50, 5e-324];
    wide.splice(0..10, edges.iter().flat_map(|&x| [x, -x]));
    let mut codes = vec![0; x.len()];
    for format in more_formats() {
        for rounding in ROUNDINGS {
            for overflow in BOTH {
                let expected: Vec<u8> = x
                    .iter()
                    .enumerate()
                    .map(|(i, &x)| format.encode_with(x, at(rounding, i), overflow))
                    .collect();
                for isa in Isa::available() {
                    codes.fill(0xaa);
                    format.encode_slice_on(isa, &x, &mut codes, rounding, overflow).unwrap();
                    for (i, (got, expected)) in codes.iter().zip(&expected).enumerate() {
                        assert_eq!(
                            got,
                            expected,
                            "{format:?} {rounding:?} {overflow:?} {} {:#x}",
                            isa.name(),
                            x[i].to_bits()
                        );
                    }
                }
                let expected: Vec<u8> = wide
                    .iter()
                    .enumerate()
                    .map(|(i, &x)| format.encode_f64(x, at(rounding, i), overflow))
                    .collect();
                for isa in Isa::available() {
                    format.encode_slice_on(isa, &wide, &mut codes, rounding, overflow).unwrap();
                    assert!(codes == expected, "f64 {format:?} {rounding:?} {}", isa.name());
                }
            }
        }
    }
}

#[test]
fn every_f16_and_bf16_slice_encodes_like_its_f32() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let halves: Vec<f16> = all.iter().map(|&b| f16::from_bits(b)).collect();
    let brains: Vec<bf16> = all.iter().map(|&b| bf16::from_bits(b)).collect();
    let mut codes = vec![0; all.len()];
    for &format in Format::ALL {
        for rounding in ROUNDINGS {
            for isa in Isa::available() {
                format
                    .encode_slice_on(isa, &halves, &mut codes, rounding, Overflow::Infinity)
                    .unwrap();
                for (i, x) in halves.iter().enumerate() {
                    let x = x.to_f32();
                    assert_eq!(
                        codes[i],
                        format.encode_with(x, at(rounding, i), Overflow::Infinity)
                    );
                }
                format
                    .encode_slice_on(isa, &brains, &mut codes, rounding, Overflow::Infinity)
                    .unwrap();
                for (i, x) in brains.iter().enumerate() {
                    let x = x.to_f32();
                    assert_eq!(
                        codes[i],
                        format.encode_with(x, at(rounding, i), Overflow::Infinity)
                    );
                }
            }
        }
    }
}

#[test]
fn every_code_decodes_in_slices_as_alone() {
    for format in more_formats() {
        let finite = |&code: &u8| format.decode(code).is_finite();
        // The loops differ where 512 codes are finite: all codes; finite ones; one special code among those, in the
        // middle or in what is left at the end.
        let mut cases: Vec<Vec<u8>> = vec![
            (0..=255).cycle().take(1500).collect(),
            (0..=255).filter(finite).cycle().take(1500).collect(),
        ];
        for special in (0..=255).filter(|code| !finite(code)) {
            let mut codes = cases[1].clone();
            codes[[512, 777, 1023, 1499][usize::from(special) % 4]] = special;
            cases.push(codes);
        }
        for isa in Isa::available() {
            for codes in &cases {
                decodes_as_alone(isa, format, codes);
            }
        }
    }
}

fn decodes_as_alone(isa: Isa, format: Format, codes: &[u8]) {
    let mut x = vec![0f32; codes.len()];
    format.decode_slice_on(isa, codes, &mut x).unwrap();
    let mut wide = vec![0f64; codes.len()];
    format.decode_slice_on(isa, codes, &mut wide).unwrap();
    let mut brains = vec![bf16::ZERO; codes.len()];
    format.decode_slice_on(isa, codes, &mut brains).unwrap();
    let mut halves = vec![f16::ZERO; codes.len()];
    format.decode_slice_on(isa, codes, &mut halves).unwrap();
    for (i, &code) in codes.iter().enumerate() {
        let expected = format.decode(code);
        assert_eq!(x[i].to_bits(), expected.to_bits(), "{format:?} {code:#x}");
        assert_eq!(wide[i].is_nan(), expected.is_nan());
        if !expected.is_nan() {
            assert_eq!(wide[i], f64::from(expected));
            assert_eq!(brains[i].to_f32(), expected);
            assert_eq!(halves[i], f16::from_f32(expected));
        } else {
            assert!(brains[i].is_nan() && halves[i].is_nan());
        }
    }
}

#[test]
fn every_length_and_alignment_gives_the_same() {
    // One NaN, behind the first 512 of most.
    let mut x: Vec<f32> = (0..1100).map(|i| (i as f32 - 200.0) * 0.37).collect();
    x[900] = f32::NAN;
    let table = Table16::FP4_BNB;
    for isa in Isa::available() {
        for length in (0..140).chain([255, 256, 257, 511, 512, 513, 1030]) {
            for start in 0..17 {
                let src = &x[start..start + length];
                for rounding in ROUNDINGS {
                    // One more on either side, which must stay.
                    let mut codes = vec![0xee; length + start + 2];
                    let dst = &mut codes[start + 1..][..length];
                    Format::F8E4M3
                        .encode_slice_on(isa, src, dst, rounding, Overflow::Saturate)
                        .unwrap();
                    for i in 0..length {
                        let code =
                            Format::F8E4M3.encode_with(src[i], at(rounding, i), Overflow::Saturate);
                        assert_eq!(dst[i], code);
                    }
                    assert_eq!((codes[start], codes[start + 1 + length]), (0xee, 0xee));
                }
                let codes: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
                let mut back = vec![-1f32; length + start + 2];
                Format::F8E4M3
                    .decode_slice_on(isa, &codes, &mut back[start + 1..][..length])
                    .unwrap();
                for i in 0..length {
                    let x = Format::F8E4M3.decode(codes[i]);
                    assert_eq!(back[start + 1 + i].to_bits(), x.to_bits());
                }
                assert_eq!((back[start], back[start + 1 + length]), (-1.0, -1.0));

                let mut codes = vec![0xee; length + 1];
                table.encode_slice_on(isa, src, &mut codes[..length]).unwrap();
                for i in 0..length {
                    assert_eq!(codes[i], table.code(src[i]));
                }
                assert_eq!(codes[length], 0xee);
                let mut back = vec![-1.0; length + 1];
                table
                    .dequantize_on(
                        isa,
                        length.max(1),
                        &[2.0][..length.min(1)],
                        &codes[..length],
                        &mut back[..length],
                    )
                    .unwrap();
                for i in 0..length {
                    assert_eq!(back[i], table.level(codes[i]) * 2.0);
                }
                assert_eq!(back[length], -1.0);
            }
        }
    }
}

/// f16, bf16 and TF32: every finite value, every midpoint, their neighbours, in every mode and on every set.
#[test]
fn sixteen_bit_types_round_as_the_exact_model_does() {
    fn check<T: SmallFloat>(reference: &Reference, stride: usize, bits: impl Fn(T) -> u32) {
        let mut x = dense();
        for pair in reference.values.windows(2).step_by(stride) {
            let middle = (pair[0] + (pair[1] - pair[0]) / 2.0) as f32;
            x.extend([pair[0] as f32, middle, middle.next_up(), middle.next_down(), -middle]);
        }
        let top = ((reference.values[reference.values.len() - 1] + reference.next) / 2.0) as f32;
        x.extend([top, top.next_up(), top.next_down(), f32::MAX, -top]);
        let mut wide: Vec<f64> = x.iter().map(|&x| f64::from(x) * (1.0 - 1e-11)).collect();
        let edges = [1e300, 2f64.powi(128), 2f64.powi(128).next_down(), 1e-50, 5e-324];
        wide.splice(0..10, edges.iter().flat_map(|&x| [x, -x]));
        let mut small = vec![T::zeroed(); x.len()];
        for rounding in ROUNDINGS {
            for overflow in BOTH {
                let model = |wide: &[f64]| -> Vec<u32> {
                    let model = |(i, &x)| reference.encode(x, at(rounding, i), overflow);
                    wide.iter().enumerate().map(model).collect()
                };
                let expected = model(&x.iter().map(|&x| widen(x)).collect::<Vec<_>>());
                let expected_wide = model(&wide);
                for isa in Isa::available() {
                    encode_slice_on(isa, &x, &mut small, rounding, overflow).unwrap();
                    for i in 0..x.len() {
                        let (got, x) = (bits(small[i]), x[i]);
                        assert_eq!(
                            got,
                            expected[i],
                            "{} {x:e} {rounding:?} {overflow:?} {}",
                            reference.name,
                            isa.name()
                        );
                        if Some(isa) == Isa::available().next() {
                            let alone = T::from_f32_with(x, at(rounding, i), overflow);
                            assert_eq!(bits(alone), got);
                        }
                    }
                    encode_slice_on(isa, &wide, &mut small, rounding, overflow).unwrap();
                    for i in 0..x.len() {
                        assert_eq!(
                            bits(small[i]),
                            expected_wide[i],
                            "{} {}",
                            reference.name,
                            wide[i]
                        );
                    }
                }
            }
        }
    }
    check(&Reference::ieee("float16", 5, 10), 1, |x: f16| x.to_bits().into());
    check(&Reference::ieee("bfloat16", 8, 7), 1, |x: bf16| x.to_bits().into());

    let reference = Reference::ieee("tf32", 8, 10);
    let mut x = dense();
    for pair in reference.values.windows(2).step_by(3) {
        let middle = (pair[0] + (pair[1] - pair[0]) / 2.0) as f32;
        x.extend([pair[0] as f32, middle, middle.next_up(), middle.next_down(), -middle]);
    }
    let mut out = vec![0.0; x.len()];
    for rounding in ROUNDINGS {
        for isa in Isa::available() {
            tf32_slice_on(isa, &x, &mut out, rounding).unwrap();
            for (i, &x) in x.iter().enumerate() {
                assert_eq!(tf32(x, at(rounding, i)).to_bits(), out[i].to_bits());
                if !x.is_nan() {
                    let code = reference.encode(f64::from(x), at(rounding, i), Overflow::Infinity);
                    assert_eq!(out[i].to_bits(), code << 13, "{x:e} {rounding:?}");
                }
            }
        }
    }
}

#[test]
fn sixteen_bit_types_equal_half_and_the_golden_vectors() {
    macro_rules! golden {
        ($t:ident, $data:literal) => {
            let data = include_bytes!($data);
            for &[a, b, c, d, lo, hi, slo, shi] in data.as_chunks::<8>().0 {
                let x = f32::from_bits(u32::from_le_bytes([a, b, c, d]));
                let code = u16::from_le_bytes([lo, hi]);
                let saturating = u16::from_le_bytes([slo, shi]);
                let rounded = |overflow| $t::from_f32_with(x, Rounding::NearestEven, overflow);
                let (y, z) = (rounded(Overflow::Infinity), rounded(Overflow::Saturate));
                if x.is_nan() {
                    // NumPy keeps the front of a NaN's payload; here NaN is the quiet NaN of its sign.
                    assert!(y.is_nan() && z.is_nan());
                    assert_eq!(y.is_sign_negative(), x.is_sign_negative());
                    continue;
                }
                assert_eq!(y.to_bits(), code, "{x:e}");
                assert_eq!(z.to_bits(), saturating, "{x:e}");
                assert_eq!(y.to_bits(), $t::from_f32(x).to_bits());
            }
        };
    }
    golden!(f16, "../data/from_f32_float16.bin");
    golden!(bf16, "../data/from_f32_bfloat16.bin");

    let data = include_bytes!("../data/f64_to_f16.bin");
    for record in data.as_chunks::<10>().0 {
        let x = f64::from_le_bytes(record[..8].try_into().unwrap());
        let expected = u16::from_le_bytes([record[8], record[9]]);
        let y = f16::from_f64_with(x, Rounding::NearestEven, Overflow::Infinity);
        assert_eq!(y.to_bits(), expected, "{x:e}");
    }

    let data = include_bytes!("../data/tf32.bin");
    for record in data.as_chunks::<12>().0 {
        let [x, even, away] =
            [0, 4, 8].map(|at| u32::from_le_bytes(record[at..at + 4].try_into().unwrap()));
        let x = f32::from_bits(x);
        assert_eq!(tf32(x, Rounding::NearestEven).to_bits(), even, "{x:e}");
        assert_eq!(tf32(x, Rounding::NearestAway).to_bits(), away, "{x:e}");
    }
}

#[test]
fn lengths_that_differ_are_errors_with_both_numbers() {
    let x = [1f32; 5];
    let mut codes = [7u8; 4];
    let (rounding, overflow) = (Rounding::NearestEven, Overflow::Saturate);
    let error = |what, expected, got| Err(Error::Length { what, expected, got });
    assert_eq!(
        Format::F8E4M3.encode_slice(&x, &mut codes, rounding, overflow),
        error("codes", 5, 4)
    );
    assert_eq!(Format::F8E4M3.decode_slice(&codes, &mut [0f32; 3]), error("dst", 4, 3));
    let mut small = [F8E5M2::ONE; 6];
    assert_eq!(encode_slice(&x, &mut small, rounding, overflow), error("dst", 5, 6));
    assert_eq!(decode_slice(&small, &mut [0f64; 5]), error("dst", 6, 5));
    assert_eq!(tf32_slice(&x, &mut [0.0; 4], rounding), error("dst", 5, 4));
    assert_eq!(Table16::NF4.encode_slice(&x, &mut codes), error("codes", 5, 4));
    assert_eq!(Table16::NF4.decode_slice(&codes, &mut [0.0; 5]), error("codes", 5, 4));
    assert_eq!(codes, [7; 4]);
    assert_eq!(small, [F8E5M2::ONE; 6]);
    assert_eq!(
        error("codes", 5, 4).map_err(|e: Error| e.to_string()),
        Err::<(), _>("expected 5 elements in codes, got 4".into())
    );
}

proptest! {
    /// A slice cut in pieces draws the same numbers as the whole.
    #[test]
    fn stochastic_rounding_does_not_depend_on_the_cut(
        x in proptest::collection::vec(-10f32..10.0, 1..300), cut in 0usize..300, seed: u64, index: u64,
    ) {
        let cut = cut.min(x.len());
        let rounding = Rounding::Stochastic { seed, index };
        let mut whole = vec![bf16::ZERO; x.len()];
        encode_slice(&x, &mut whole, rounding, Overflow::Saturate).unwrap();
        let mut parts = whole.clone();
        let (a, b) = parts.split_at_mut(cut);
        encode_slice(&x[..cut], a, rounding, Overflow::Saturate).unwrap();
        encode_slice(&x[cut..], b, at(rounding, cut), Overflow::Saturate).unwrap();
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn any_f32_and_f64_encode_alike_in_slices_and_alone(
        bits in proptest::collection::vec(any::<u32>(), 1..80), wide in proptest::collection::vec(any::<u64>(), 1..80),
    ) {
        let x: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let wide: Vec<f64> = wide.iter().map(|&b| f64::from_bits(b)).collect();
        for format in more_formats() {
            for rounding in ROUNDINGS {
                let mut codes = vec![0; x.len()];
                format.encode_slice(&x, &mut codes, rounding, Overflow::Infinity).unwrap();
                for (i, &x) in x.iter().enumerate() {
                    prop_assert_eq!(codes[i], format.encode_with(x, at(rounding, i), Overflow::Infinity));
                }
                let mut codes = vec![0; wide.len()];
                format.encode_slice(&wide, &mut codes, rounding, Overflow::Infinity).unwrap();
                for (i, &x) in wide.iter().enumerate() {
                    prop_assert_eq!(codes[i], format.encode_f64(x, at(rounding, i), Overflow::Infinity));
                }
            }
        }
    }
}
