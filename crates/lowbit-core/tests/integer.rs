//! Integer-only inference against golden vectors, and against the same arithmetic in plain i128.

mod golden;

use golden::*;
use lowbit_core::integer::{Code, Multiplier, RequantRounding, matmul, quantize_bias, requantize};
use lowbit_core::{Error, Mat, MatRef};
use proptest::prelude::*;

const ROUNDINGS: [RequantRounding; 2] = [RequantRounding::TwoStep, RequantRounding::Single];

#[test]
fn multipliers_and_both_roundings_match_the_golden_vectors() {
    let mut differing = 0;
    for (value, q31, shift, two_step, single) in REQUANT {
        let multiplier = Multiplier::new(value).unwrap();
        assert_eq!((multiplier.q31(), multiplier.shift()), (q31, shift), "{value}");
        assert_eq!(Multiplier::from_parts(q31, shift), Ok(multiplier));
        assert_eq!(
            REQUANT_ACC.map(|acc| multiplier.apply(acc, RequantRounding::TwoStep)),
            two_step
        );
        assert_eq!(REQUANT_ACC.map(|acc| multiplier.apply(acc, RequantRounding::Single)), single);
        differing += two_step.iter().zip(&single).filter(|(a, b)| a != b).count();
    }
    assert_eq!(differing, REQUANT_DIFFERING);
}

/// The transpose of golden matrix B: our weights are `(n, k)`.
fn weight() -> Mat<i8> {
    let (_, k, n) = MATMUL_MKN;
    Mat::from_fn(n, k, |j, i| MATMUL_B[i * n + j])
}

#[test]
fn products_match_matmul_integer() {
    let (m, k, n) = MATMUL_MKN;
    let x = MatRef::new(&MATMUL_A, m, k).unwrap();
    let mut acc = Mat::zeros(m, n);
    matmul(x, MATMUL_ZA, weight().as_ref(), &[MATMUL_ZB], None, acc.as_mut()).unwrap();
    assert_eq!(acc.data(), MATMUL_C);
    matmul(x, MATMUL_ZA, weight().as_ref(), &MATMUL_ZB_PER_COLUMN, None, acc.as_mut()).unwrap();
    assert_eq!(acc.data(), MATMUL_C_PER_COLUMN);
}

/// The operator rescales in f32; no product of these lies near enough to a tie to show it.
#[test]
fn a_layer_matches_qlinear_matmul() {
    let (m, k, n) = MATMUL_MKN;
    let x = MatRef::new(&MATMUL_A, m, k).unwrap();
    let w = Mat::from_fn(n, k, |j, i| (i16::from(MATMUL_B[i * n + j]) + 128) as u8);
    let mut acc = Mat::zeros(m, n);
    matmul(x, MATMUL_ZA, w.as_ref(), &[MATMUL_Q_ZB_U8], None, acc.as_mut()).unwrap();
    let scale = f64::from(MATMUL_Q_SA) * f64::from(MATMUL_Q_SB) / f64::from(MATMUL_Q_SY);
    let multiplier = Multiplier::new(scale).unwrap();
    for rounding in ROUNDINGS {
        let mut y = Mat::zeros(m, n);
        requantize(acc.as_ref(), &[multiplier], rounding, MATMUL_Q_ZY, 0..=255, y.as_mut())
            .unwrap();
        assert_eq!(y.data(), MATMUL_Q_Y, "{rounding:?}");
    }
}

/// `round(numerator / 2^shift)`, ties towards +∞, or away from zero.
fn divide(numerator: i128, shift: u32, away: bool) -> i128 {
    let denominator = 1_i128 << shift;
    let up = (2 * numerator + denominator).div_euclid(2 * denominator);
    let tie = (2 * numerator).rem_euclid(2 * denominator) == denominator;
    if away && tie && numerator < 0 { up - 1 } else { up }
}

/// The definition of [`RequantRounding`], without its tricks.
fn apply(q31: i32, shift: i32, acc: i32, rounding: RequantRounding) -> i32 {
    let saturate = |x: i128| x.clamp(i32::MIN.into(), i32::MAX.into());
    let (q31, acc) = (i128::from(q31), i128::from(acc));
    let result = match rounding {
        RequantRounding::Single => divide(acc * q31, (31 - shift) as u32, false),
        RequantRounding::TwoStep => {
            let shifted = saturate(acc * (1 << shift.max(0)));
            divide(divide(shifted * q31, 31, false), (-shift).max(0) as u32, true)
        }
    };
    saturate(result) as i32
}

fn multiplier() -> impl Strategy<Value = Multiplier> {
    let q31 = prop_oneof![
        3 => (1 << 30)..=i32::MAX,
        1 => prop::sample::select(vec![1 << 30, 3 << 29, (1 << 30) + 1, i32::MAX]),
    ];
    (q31, -31..=30_i32).prop_map(|(q31, shift)| Multiplier::from_parts(q31, shift).unwrap())
}

fn accumulator() -> impl Strategy<Value = i32> {
    prop_oneof![
        2 => any::<i32>(),
        2 => -1000..1000_i32,
        1 => prop::sample::select(vec![i32::MIN, i32::MIN + 1, -1, 0, 1, i32::MAX]),
        // Where halves come from.
        1 => (0..31_u32, any::<bool>())
            .prop_map(|(e, negative)| if negative { -1 << e } else { 1 << e }),
    ]
}

fn rounding() -> impl Strategy<Value = RequantRounding> {
    prop::sample::select(ROUNDINGS.to_vec())
}

/// A matrix product in the naive form.
fn naive<X: Code, W: Code>(
    x: MatRef<'_, X>,
    x_zero: X,
    w: MatRef<'_, W>,
    w_zeros: &[W],
    bias: &[i32],
) -> Mat<i32> {
    Mat::from_fn(x.rows(), w.rows(), |i, j| {
        let mut sum = i128::from(bias[j]);
        for k in 0..x.cols() {
            let x: i32 = (*x.get(i, k).unwrap()).into();
            let w: i32 = (*w.get(j, k).unwrap()).into();
            let (x_zero, w_zero): (i32, i32) =
                (x_zero.into(), w_zeros[j.min(w_zeros.len() - 1)].into());
            sum += i128::from(x - x_zero) * i128::from(w - w_zero);
        }
        i32::try_from(sum).unwrap()
    })
}

/// Mostly any code, often one at the ends.
fn code() -> impl Strategy<Value = u8> {
    prop_oneof![3 => any::<u8>(), 1 => Just(0_u8), 1 => Just(255), 1 => Just(128)]
}

fn codes(rows: usize, cols: usize) -> impl Strategy<Value = Mat<u8>> {
    prop::collection::vec(code(), rows * cols)
        .prop_map(move |data| Mat::new(data, rows, cols).unwrap())
}

fn signed(codes: &Mat<u8>) -> Mat<i8> {
    Mat::new(codes.data().iter().map(|&c| c as i8).collect(), codes.rows(), codes.cols()).unwrap()
}

proptest! {
    #[test]
    fn apply_is_its_definition(
        multiplier in multiplier(), acc in accumulator(), rounding in rounding(),
    ) {
        let expected = apply(multiplier.q31(), multiplier.shift(), acc, rounding);
        prop_assert_eq!(multiplier.apply(acc, rounding), expected);
    }

    #[test]
    fn a_multiplier_is_the_nearest_of_31_bits(
        significand in (1_u64 << 52)..(1 << 53), exponent in -32..30_i32,
    ) {
        let value = significand as f64 * 2.0_f64.powi(exponent - 52);
        let Ok(multiplier) = Multiplier::new(value) else {
            // Rounded up to 2^30.
            prop_assert!(exponent == 29 && significand >= (1 << 53) - (1 << 21));
            return Ok(());
        };
        // Both in units of 2^(exponent − 52 − 1): a carry moves the shift by one.
        let carry = multiplier.shift() - (exponent + 1);
        prop_assert!(carry == 0 || carry == 1 && multiplier.q31() == 1 << 30);
        let got = i128::from(multiplier.q31()) << (22 + carry);
        prop_assert!((got - i128::from(significand)).abs() <= 1 << 21);
    }

    #[test]
    fn the_error_of_apply_is_inside_the_documented_bound(
        significand in (1_u64 << 52)..(1 << 53), exponent in -32..-1_i32, acc in accumulator(),
    ) {
        // value = significand · 2^(exponent − 52) < 1, so nothing saturates.
        let value = significand as f64 * 2.0_f64.powi(exponent - 52);
        let multiplier = Multiplier::new(value).unwrap();
        let shift = multiplier.shift();
        // In units of 2^−84 everything is an integer.
        let exact = (i128::from(significand) * i128::from(acc)) << (exponent - 52 + 84);
        let bound = (1_i128 << 83) + (i128::from(acc).abs() << (84 + shift - 32));
        let error = |rounding| ((i128::from(multiplier.apply(acc, rounding)) << 84) - exact).abs();
        prop_assert!(error(RequantRounding::Single) <= bound);
        prop_assert!(error(RequantRounding::TwoStep) <= bound + (1 << (84 - (-shift).max(0) - 1)));
    }

    #[test]
    fn apply_is_monotone(
        multiplier in multiplier(), a in accumulator(), b in accumulator(), rounding in rounding(),
    ) {
        let (a, b) = (a.min(b), a.max(b));
        prop_assert!(multiplier.apply(a, rounding) <= multiplier.apply(b, rounding));
    }

    #[test]
    fn no_arguments_of_a_multiplier_panic(value in any::<f64>(), q31 in any::<i32>(), shift in any::<i32>()) {
        let _ = Multiplier::new(value);
        let _ = Multiplier::from_parts(q31, shift);
    }

    #[test]
    fn sums_of_rows_and_columns_give_the_naive_product(
        (x, w, zeros, bias) in (0..5_usize, 0..40_usize, 1..6_usize).prop_flat_map(|(m, k, n)| (
            codes(m, k), codes(n, k),
            prop_oneof![Just(1), Just(n)].prop_flat_map(|len| prop::collection::vec(code(), len)),
            prop::collection::vec(-1_000_000..1_000_000, n),
        )),
        x_zero in code(),
    ) {
        let signed_zeros: Vec<i8> = zeros.iter().map(|&z| z as i8).collect();
        let (m, n) = (x.rows(), w.rows());
        let mut acc = Mat::zeros(m, n);
        let (u_x, u_w, s_x, s_w) = (x.as_ref(), w.as_ref(), signed(&x), signed(&w));
        matmul(u_x, x_zero, u_w, &zeros, Some(&bias), acc.as_mut()).unwrap();
        prop_assert_eq!(&acc, &naive(u_x, x_zero, u_w, &zeros, &bias));
        matmul(u_x, x_zero, s_w.as_ref(), &signed_zeros, Some(&bias), acc.as_mut()).unwrap();
        prop_assert_eq!(&acc, &naive(u_x, x_zero, s_w.as_ref(), &signed_zeros, &bias));
        matmul(s_x.as_ref(), x_zero as i8, s_w.as_ref(), &signed_zeros, None, acc.as_mut()).unwrap();
        let no_bias = vec![0; n];
        prop_assert_eq!(&acc, &naive(s_x.as_ref(), x_zero as i8, s_w.as_ref(), &signed_zeros, &no_bias));
    }

    #[test]
    fn a_quantized_bias_is_the_nearest(
        bias in -1e3_f32..1e3, input_scale in 1e-4_f32..1.0, weight_scale in 1e-2_f32..1.0,
    ) {
        let mut codes = [0];
        let scale = f64::from(input_scale) * f64::from(weight_scale);
        quantize_bias(&[bias], input_scale, &[weight_scale], &mut codes).unwrap();
        prop_assert_eq!(f64::from(codes[0]), (f64::from(bias) / scale).round_ties_even());
    }
}

/// The longest sum that is accepted reaches within one product of the end of i32, and the next is
/// refused.
#[test]
fn no_accepted_sum_overflows() {
    fn check<X: Code, W: Code>(x: X, x_zero: X, w: W, w_zero: W, bias: i32, longest: usize) {
        let run = |k: usize| {
            let mut acc = Mat::zeros(1, 1);
            let (x, w) = (Mat::from_fn(1, k, |_, _| x), Mat::from_fn(1, k, |_, _| w));
            matmul(x.as_ref(), x_zero, w.as_ref(), &[w_zero], Some(&[bias]), acc.as_mut())
                .map(|()| acc.data()[0])
        };
        let (x, w): (i32, i32) = (x.into(), w.into());
        let product = (x - x_zero.into()) * (w - w_zero.into());
        let sum = i64::from(product) * longest as i64 + i64::from(bias);
        assert_eq!(run(longest).map(i64::from), Ok(sum));
        assert!((sum + i64::from(product)).abs() > i32::MAX.into());
        let what = "in_features of an i32 sum";
        let (max, got) = (longest as i64, longest as i64 + 1);
        assert_eq!(run(longest + 1), Err(Error::OutOfRange { what, min: 0, max, got }));
    }
    check(255_u8, 0, -128_i8, 0, 0, 65_793);
    check(-128_i8, 0, -128_i8, 0, 0, 131_071);
    check(255_u8, 0, 255_u8, 0, 0, 33_025);
    check(-128_i8, 127, -128_i8, 127, 0, 33_025);
    // The product itself would overflow here, before the zero-points are taken off.
    check(0_u8, 128, 127_i8, -1, 0, 131_071);
    check(255_u8, 0, 127_i8, -128, 1 << 30, 16_512);
    check(0_u8, 255, 127_i8, -128, -(1 << 30), 16_512);
}

#[test]
fn an_empty_sum_is_its_bias() {
    let empty = Mat::<u8>::zeros(2, 0);
    let mut acc = Mat::zeros(2, 2);
    let bias = [i32::MIN, i32::MAX];
    matmul(empty.as_ref(), 9, empty.as_ref(), &[9], Some(&bias), acc.as_mut()).unwrap();
    assert_eq!(acc.data(), [i32::MIN, i32::MAX, i32::MIN, i32::MAX]);
    let one = Mat::<u8>::zeros(2, 1);
    assert!(matmul(one.as_ref(), 9, one.as_ref(), &[9], Some(&bias), acc.as_mut()).is_err());
}

#[test]
fn requantized_codes_are_clamped_to_the_activation() {
    let acc = MatRef::new(&[i32::MIN, -300, -1, 0, 1, 300, i32::MAX, 40], 2, 4).unwrap();
    let half = Multiplier::new(0.5).unwrap();
    let four = Multiplier::new(4.0).unwrap();
    let mut codes = Mat::zeros(2, 4);
    for rounding in ROUNDINGS {
        requantize(acc, &[half], rounding, 100, 0..=255_u8, codes.as_mut()).unwrap();
        // −0.5 becomes 0 in both: a half has shift 0, so that only the first step rounds.
        assert_eq!(codes.data(), [0, 0, 100, 100, 101, 250, 255, 120], "{rounding:?}");
        requantize(acc, &[half], rounding, 100, 100..=200_u8, codes.as_mut()).unwrap();
        assert_eq!(codes.data(), [100, 100, 100, 100, 101, 200, 200, 120], "{rounding:?}");
        let mut codes = Mat::zeros(2, 4);
        let each = [half, four, half, four];
        requantize(acc, &each, rounding, -128, -128..=127_i8, codes.as_mut()).unwrap();
        assert_eq!(codes.data(), [-128, -128, -128, -128, -127, 127, 127, 32], "{rounding:?}");
    }
}

/// 1 − 2^−40 has too many bits for 31 and rounds up to 1, which takes another shift.
#[test]
fn a_multiplier_that_rounds_up_to_a_power_of_two_carries() {
    let parts = |value| Multiplier::new(value).map(|m| (m.q31(), m.shift()));
    assert_eq!(parts(1.0 - 2.0_f64.powi(-40)), Ok((1 << 30, 1)));
    assert_eq!(parts(1.0 - 2.0_f64.powi(-32)), Ok((1 << 30, 1))); // a tie
    assert_eq!(parts(1.0 - 2.0_f64.powi(-31)), Ok((i32::MAX, 0)));
}

#[test]
fn impossible_operands_are_errors_and_nothing_is_written() {
    for value in [0.0, -0.0, -1.0, f64::INFINITY, f64::NEG_INFINITY] {
        let error = Multiplier::new(value).unwrap_err();
        assert_eq!(
            error,
            Error::Parameter { what: "multiplier", value, expected: "a positive finite number" }
        );
    }
    assert!(matches!(Multiplier::new(f64::NAN), Err(Error::Parameter { .. })));
    let shift = |got| Error::OutOfRange { what: "shift of a multiplier", min: -31, max: 30, got };
    let (small, large) = (2.0_f64.powi(-32), 2.0_f64.powi(30));
    assert_eq!(Multiplier::new(small).map(Multiplier::shift), Ok(-31));
    assert_eq!(Multiplier::new(small * (1.0 - f64::EPSILON)).map(Multiplier::shift), Ok(-31));
    assert_eq!(Multiplier::new(small * 0.999_999), Err(shift(-32)));
    assert_eq!(Multiplier::new(large * 0.999_999).map(Multiplier::shift), Ok(30));
    assert_eq!(Multiplier::new(large), Err(shift(31)));
    assert_eq!(Multiplier::new(large * (1.0 - f64::EPSILON)), Err(shift(31)));
    assert_eq!(Multiplier::new(f64::MAX), Err(shift(1025)));
    assert_eq!(Multiplier::new(f64::from_bits(1)), Err(shift(-1022)));
    for q31 in [(1 << 30) - 1, 0, -1, i32::MIN] {
        assert!(matches!(Multiplier::from_parts(q31, 0), Err(Error::OutOfRange { .. })));
    }

    let mut codes = [7; 2];
    let length = |what, expected, got| Error::Length { what, expected, got };
    for (bias, input, weights, expected) in [
        (&[1.0, 2.0, 3.0][..], 1.0, &[1.0][..], length("bias codes", 3, 2)),
        (&[1.0, 2.0], 1.0, &[1.0, 1.0, 1.0], length("weight scales", 2, 3)),
        (
            &[1.0, 2.0],
            1.0,
            &[1.0, -0.5],
            Error::Parameter {
                what: "weight scale",
                value: -0.5,
                expected: "a positive finite number",
            },
        ),
        (
            &[1.0, 2.0],
            0.0,
            &[1.0],
            Error::Parameter {
                what: "input scale",
                value: 0.0,
                expected: "a positive finite number",
            },
        ),
        (&[1.0, f32::NAN], 1.0, &[1.0], Error::NotFinite { what: "bias", row: 0, col: 1 }),
        (
            &[1.0, 2_147_483_648.0],
            1.0,
            &[1.0],
            Error::BiasOverflow { index: 1, bias: 2_147_483_648.0, scale: 1.0 },
        ),
        (
            &[1.0, f32::MIN],
            f32::from_bits(1),
            &[f32::from_bits(1)],
            Error::BiasOverflow { index: 0, bias: 1.0, scale: 2.0_f64.powi(-298) },
        ),
    ] {
        assert_eq!(quantize_bias(bias, input, weights, &mut codes), Err(expected));
        assert_eq!(codes, [7; 2]);
    }
    quantize_bias(&[-2_147_483_648.0, 2_147_483_500.0], 1.0, &[1.0], &mut codes).unwrap();
    assert_eq!(codes, [i32::MIN, 2_147_483_520]);

    let (x, w) = (Mat::<u8>::zeros(2, 3), Mat::<i8>::zeros(4, 3));
    let mut acc = Mat::from_fn(2, 4, |_, _| 7);
    let shape = |what, expected, got| Error::Shape { what, expected, got };
    let wide = Mat::<i8>::zeros(4, 2);
    assert_eq!(
        matmul(x.as_ref(), 0, wide.as_ref(), &[0], None, acc.as_mut()),
        Err(shape("weight", (4, 3), (4, 2)))
    );
    assert_eq!(
        matmul(x.as_ref(), 0, w.as_ref(), &[0, 0], None, acc.as_mut()),
        Err(length("weight zero-points", 4, 2))
    );
    assert_eq!(
        matmul(x.as_ref(), 0, w.as_ref(), &[], None, acc.as_mut()),
        Err(length("weight zero-points", 4, 0))
    );
    assert_eq!(
        matmul(x.as_ref(), 0, w.as_ref(), &[0], Some(&[0; 3]), acc.as_mut()),
        Err(length("bias", 4, 3))
    );
    let mut small = Mat::zeros(2, 3);
    assert_eq!(
        matmul(x.as_ref(), 0, w.as_ref(), &[0], None, small.as_mut()),
        Err(shape("accumulators", (2, 4), (2, 3)))
    );
    assert_eq!(acc.data(), [7; 8]);

    let multiplier = Multiplier::new(1.0).unwrap();
    let mut y = Mat::from_fn(2, 4, |_, _| 7_u8);
    let mut requantize = |multipliers: &[_], clamp| {
        requantize(acc.as_ref(), multipliers, ROUNDINGS[1], 0, clamp, y.as_mut())
    };
    assert_eq!(requantize(&[multiplier; 3], 0..=255), Err(length("multipliers", 4, 3)));
    #[expect(clippy::reversed_empty_ranges, reason = "an empty range is what is refused")]
    let empty = requantize(&[multiplier], 9..=8);
    let what = "upper end of the clamp";
    assert_eq!(empty, Err(Error::OutOfRange { what, min: 9, max: 255, got: 8 }));
    assert_eq!(y.data(), [7; 8]);
}
