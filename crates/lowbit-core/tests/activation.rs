//! Activation schemes: what each promises, and the reference layer over them.

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Context, Error, Granularity, Linear, Mat,
    MatRef, QActivations, QLinear, QMatrix, QuantScheme, ScaleFormat, ZeroFormat, group_sums,
    quantize_row_int8, quantize_row_uint8,
};
use lowbit_dtypes::Format;
use proptest::prelude::*;

const TYPES: [ActivationType; 6] = [
    ActivationType::Int8,
    ActivationType::UInt8,
    ActivationType::Int16,
    ActivationType::Float(Format::F8E4M3),
    ActivationType::Float(Format::F8E5M2),
    ActivationType::Float(Format::F8E4M3FNUZ),
];

fn scheme() -> impl Strategy<Value = ActivationScheme> {
    let scales = prop_oneof![
        Just(ActivationScales::PerToken),
        Just(ActivationScales::PerTensor),
        (1..40_usize).prop_map(ActivationScales::PerTokenGroup),
    ];
    (prop::sample::select(&TYPES[..]), scales)
        .prop_map(|(dtype, scales)| ActivationScheme { dtype, scales })
}

fn matrix(rows: usize, cols: usize) -> impl Strategy<Value = Mat<f32>> {
    let value = prop_oneof![4 => -3.0_f32..3.0, 1 => Just(0.0), 1 => 0.0_f32..100.0];
    (0..rows, 1..cols).prop_flat_map(move |(m, k)| {
        prop::collection::vec(value.clone(), m * k)
            .prop_map(move |data| Mat::new(data, m, k).unwrap())
    })
}

/// Half a step where `x` lies; floats have larger steps further out.
fn half_step(dtype: ActivationType, x: f32, scale: f32) -> f32 {
    match dtype {
        ActivationType::UInt8 => scale, // the zero-point is rounded as well
        ActivationType::Float(format) => {
            let ulp = 0.5_f32.powi(format.fraction_bits() as i32);
            0.5 * (ulp * x.abs()).max(format.min_positive_subnormal() * scale)
        }
        _ => 0.5 * scale,
    }
}

proptest! {
    #[test]
    fn no_activation_moves_by_more_than_half_a_step(x in matrix(5, 60), scheme in scheme()) {
        let q = QActivations::quantize(x.as_ref(), scheme).unwrap();
        let back = q.dequantize();
        for (r, (x, back)) in x.as_ref().iter_rows().zip(back.as_ref().iter_rows()).enumerate() {
            for (c, (&x, back)) in x.iter().zip(back).enumerate() {
                let scale = q.params(r, c / q.group_size()).scale;
                let bound = half_step(scheme.dtype, x, scale) + x.abs() * 2.0_f32.powi(-22);
                prop_assert!((x - back).abs() <= bound, "{x} became {back}, scale {scale}");
                prop_assert!(x != 0.0 || *back == 0.0);
            }
        }
    }

    #[test]
    fn rows_for_kernels_are_the_reference(x in matrix(4, 300)) {
        let reference = |dtype| {
            let scheme = ActivationScheme { dtype, scales: ActivationScales::PerToken };
            QActivations::quantize(x.as_ref(), scheme).unwrap()
        };
        let (int8, uint8) = (reference(ActivationType::Int8), reference(ActivationType::UInt8));
        let mut signed = vec![0_i8; x.cols()];
        let mut unsigned = vec![0_u8; x.cols()];
        for (r, x) in x.as_ref().iter_rows().enumerate() {
            prop_assert_eq!(quantize_row_int8(x, &mut signed).unwrap(), int8.params(r, 0).scale);
            let (scale, zero) = quantize_row_uint8(x, &mut unsigned).unwrap();
            let params = uint8.params(r, 0);
            prop_assert_eq!((scale, f32::from(zero)), (params.scale, params.zero));
            prop_assert!(signed.iter().zip(int8.row(r).unwrap()).all(|(&a, &b)| i16::from(a) == b));
            prop_assert!(
                unsigned.iter().zip(uint8.row(r).unwrap()).all(|(&a, &b)| i16::from(a) == b)
            );
            let mut sums = vec![0; x.len().div_ceil(7)];
            group_sums(&signed, 7, &mut sums);
            let expected = int8.sums(7).unwrap();
            prop_assert_eq!(Some(&sums[..]), expected.as_ref().row(r));
        }
    }

    /// Every term of the reference, from numbers that can be seen: dequantized weights and
    /// activations in f64.
    #[test]
    fn the_reference_layer_multiplies_what_is_stored(
        x in matrix(4, 50), activation in scheme(), n in 1..5_usize, bits in 2..=8_u8,
        group_size in 1..60_usize, zero in 0..4_usize,
    ) {
        let k = x.cols();
        let w = Mat::from_fn(n, k, |r, c| ((r * k + c) as f32 * 0.7).sin() + 0.1);
        let zero = [
            ZeroFormat::Midpoint,
            ZeroFormat::Int,
            ZeroFormat::Real(ScaleFormat::F32),
            ZeroFormat::Offset(ScaleFormat::F16),
        ][zero];
        let scheme =
            QuantScheme { zero, ..QuantScheme::symmetric(bits, Granularity::PerGroup(group_size)) };
        let bias = (0..n).map(|i| i as f32 - 1.0).collect::<Vec<_>>();
        let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme).unwrap())
            .with_activation(Some(activation))
            .with_bias(Some(bias.clone()))
            .unwrap();
        let mut y = Mat::zeros(x.rows(), n);
        layer.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();

        let w = layer.weight().dequantize();
        let a = QActivations::quantize(x.as_ref(), activation).unwrap().dequantize();
        for (a, y) in a.as_ref().iter_rows().zip(y.as_ref().iter_rows()) {
            for ((w, y), bias) in w.as_ref().iter_rows().zip(y).zip(&bias) {
                let products = w.iter().zip(a).map(|(&w, &a)| f64::from(w) * f64::from(a));
                let (sum, size) = products.fold((0.0, 0.0), |(s, t), p| (s + p, t + p.abs()));
                let expected = sum + f64::from(*bias);
                // A rounding for each number, each term and each sum.
                let roundings = f64::from(k as u32 + 8);
                let bound = (size + f64::from(bias.abs())) * roundings * 2.0_f64.powi(-24);
                prop_assert!((expected - f64::from(*y)).abs() <= bound, "{y} for {expected}");
            }
        }
    }
}

#[test]
fn a_static_scheme_saturates_and_ignores_the_batch() {
    let x = Mat::new(vec![0.1, -0.26, 5.0, -5.0], 2, 2).unwrap();
    let scales = ActivationScales::Static { scale: 0.01, zero_point: 0 };
    let scheme = ActivationScheme { dtype: ActivationType::Int8, scales };
    let q = QActivations::quantize(x.as_ref(), scheme).unwrap();
    assert_eq!((q.row(0), q.row(1)), (Some(&[10, -26][..]), Some(&[127, -127][..])));
    let (scale, zero_point) = ActivationType::UInt8.params((-1.0, 1.55)).unwrap();
    let scales = ActivationScales::Static { scale, zero_point };
    let scheme = ActivationScheme { dtype: ActivationType::UInt8, scales };
    let q = QActivations::quantize(x.as_ref(), scheme).unwrap();
    assert_eq!((q.row(0), q.row(1)), (Some(&[110, 74][..]), Some(&[255, 0][..])));
}

#[test]
fn rows_of_zeros_and_huge_numbers_are_defined() {
    for dtype in TYPES {
        for x in [[0.0, 0.0, -0.0], [f32::MAX, -f32::MAX, 1.0], [1e-45, -1e-45, 0.0]] {
            for scales in [ActivationScales::PerToken, ActivationScales::PerTensor] {
                let x = MatRef::new(&x, 1, 3).unwrap();
                let q = QActivations::quantize(x, ActivationScheme { dtype, scales }).unwrap();
                assert!(q.dequantize().data().iter().all(|x| x.is_finite()), "{dtype:?} {q:?}");
            }
        }
    }
    let empty = QActivations::quantize(Mat::zeros(0, 4).as_ref(), ActivationScheme::INT8_PER_TOKEN);
    assert_eq!(empty.unwrap().shape(), (0, 4));
}

#[test]
fn bad_operands_are_errors_that_carry_them() {
    let x = Mat::new(vec![1.0, 2.0, 3.0, f32::NEG_INFINITY], 2, 2).unwrap();
    for scales in [
        ActivationScales::PerToken,
        ActivationScales::PerTensor,
        ActivationScales::PerTokenGroup(1),
        ActivationScales::Static { scale: 1.0, zero_point: 0 },
    ] {
        let scheme = ActivationScheme { dtype: ActivationType::Int8, scales };
        assert_eq!(
            QActivations::quantize(x.as_ref(), scheme),
            Err(Error::NotFinite { what: "activation", row: 1, col: 1 })
        );
    }
    let x = Mat::zeros(1, 2);
    let quantize = |dtype, scales| {
        QActivations::quantize(x.as_ref(), ActivationScheme { dtype, scales }).unwrap_err()
    };
    let int8 = ActivationType::Int8;
    let group = ActivationScales::PerTokenGroup(0);
    assert_eq!(quantize(int8, group), Error::EmptyBlock { rows: 1, cols: 0 });
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let scales = ActivationScales::Static { scale, zero_point: 0 };
        assert!(matches!(quantize(int8, scales), Error::Parameter { .. }));
    }
    let shifted = ActivationScales::Static { scale: 1.0, zero_point: 3 };
    assert!(matches!(quantize(int8, shifted), Error::Unsupported { .. }));
    for range in [(1.0, -1.0), (f32::NAN, 1.0), (0.0, f32::INFINITY)] {
        assert!(matches!(int8.params(range), Err(Error::Parameter { .. })));
    }
    assert!(quantize_row_int8(&[1.0], &mut []).is_err());
    assert!(quantize_row_uint8(&[1.0, f32::NAN], &mut [0; 2]).is_err());
    let unsigned = ActivationType::Float(Format::F8E8M0);
    assert!(matches!(quantize(unsigned, ActivationScales::PerToken), Error::Unsupported { .. }));
    let long =
        ActivationScheme { dtype: ActivationType::Int16, scales: ActivationScales::PerToken };
    let long = QActivations::quantize(Mat::zeros(1, 70_000).as_ref(), long).unwrap();
    assert!(matches!(long.sums(70_000), Err(Error::OutOfRange { max: 65_538, got: 70_000, .. })));
    assert!(long.sums(65_538).is_ok());
    let q = QActivations::quantize(x.as_ref(), ActivationScheme::INT8_PER_TOKEN).unwrap();
    assert_eq!(q.sums(0), Err(Error::EmptyBlock { rows: 1, cols: 0 }));
}
