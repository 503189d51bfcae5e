//! Floats, tables, and scales that are quantized themselves.

use lowbit_core::{
    ActivationScheme, Base, BlockParams, Context, Division, Encoder, Error, Fit, Granularity,
    Levels, Linear, Mat, Params, QLinear, QMatrix, QuantScheme, QuantType, Range, Rounding,
    ScaleFormat, StepFormat, TwoLevel, ZeroFormat, presets,
    testing::{proptest::prelude::*, strategies},
};
use lowbit_dtypes::{
    F8E4M3, F8E8M0, Format, Mx, Nvfp4, Rounding as Nearest, ScaleRule, Specials, Table16,
};

fn weights(n: usize, k: usize) -> Mat<f32> {
    Mat::from_fn(n, k, |r, c| ((r * k + c) as f32 * 0.37).sin() * (1.0 + ((c / 16) % 7) as f32))
}

fn codes(q: &QMatrix) -> Vec<u8> {
    let mut codes = vec![0; q.rows() * q.cols()];
    for (r, row) in codes.chunks_mut(q.cols()).enumerate() {
        q.unpack_row(r, row).unwrap();
    }
    codes
}

proptest! {
    #[test]
    fn every_weight_becomes_the_nearest_level_of_its_block(
        w in (0..6_usize, 0..40_usize).prop_flat_map(|(n, k)| {
            prop::collection::vec(-4.0_f32..4.0, n * k)
                .prop_map(move |data| Mat::new(data, n, k).unwrap())
        }),
        scheme in strategies::level_schemes(40),
    ) {
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let (rows, cols) = q.block();
        let back = q.dequantize();
        let dtype = scheme.dtype;
        for (i, (&x, &got)) in w.data().iter().zip(back.data()).enumerate() {
            let (r, c) = (i / w.cols(), i % w.cols());
            let params = q.params(r / rows, c / cols);
            let best = (0..=dtype.max_code())
                .map(|code| (params.real(dtype.level(code)) - x).abs())
                .filter(|error| error.is_finite())
                .fold(f32::INFINITY, f32::min);
            // Weights are divided by the scale first, which is rounded.
            let slack = 4.0 * f32::EPSILON * (x.abs() + params.scale * dtype.reach());
            prop_assert!((got - x).abs() <= best + slack, "{} for {} of {:?}", got, x, params);
        }
    }

    #[test]
    fn what_is_stored_reads_back_and_its_bytes_are_counted(
        scheme in strategies::level_schemes(40), n in 0..6_usize, k in 0..40_usize,
    ) {
        let q = QMatrix::quantize(weights(n, k).as_ref(), scheme).unwrap();
        let same: QMatrix<&[u8]> =
            QMatrix::from_parts(n, k, scheme, q.codes(), q.scales(), q.zeros()).unwrap();
        prop_assert_eq!(same.dequantize(), q.dequantize());
        prop_assert_eq!(scheme.scale_format.bytes(q.grid()), Some(q.scales().len()));
        let long = [q.scales(), &[0]].concat();
        let wrong = QMatrix::from_parts(n, k, scheme, q.codes(), &long, None);
        prop_assert!(matches!(wrong, Err(Error::Length { .. })), "{wrong:?}");
    }

    #[test]
    fn an_encoder_makes_the_matrix_that_quantizing_makes(
        scheme in prop_oneof![strategies::level_schemes(40), strategies::schemes(40)],
        searched in any::<bool>(),
    ) {
        let w = weights(5, 37);
        let range = if searched { Range::Search { grid: 6, candidates: 4, norm: 2.0 } } else { Range::MinMax };
        let fit = Fit { range, ..Fit::NEAREST };
        let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None);
        prop_assume!(q.is_ok());
        let q = q.unwrap();
        let encoder = Encoder::new(scheme, &fit).unwrap();
        let ((rows, cols), grid) = (q.block(), q.grid());
        let block = |b: usize| {
            let (r, c) = (b / grid.1 * rows, b % grid.1 * cols);
            let places = move |(i, _): &(usize, &f32)| {
                (r..r + rows).contains(&(i / 37)) && (c..c + cols).contains(&(i % 37))
            };
            w.data().iter().enumerate().filter(places).map(|(_, x)| *x).collect::<Vec<_>>()
        };
        let exact: Vec<Params> =
            (0..grid.0 * grid.1).map(|b| encoder.fit(&block(b), None).unwrap()).collect();
        // Real zeros of two-level scales depend on the rounded scale; those are the caller's matter.
        let params = BlockParams::round(scheme, 5, 37, &exact).unwrap();
        let codes: Vec<u8> = w.data().iter().enumerate().map(|(i, &x)| {
            encoder.code(params.params()[i / 37 / rows * grid.1 + i % 37 / cols], x)
        }).collect();
        prop_assert_eq!(QMatrix::from_codes(&params, &codes).unwrap(), q);
    }
}

#[test]
fn mx_is_what_the_dtypes_crate_makes() {
    for (mx, format) in
        [(Mx::Fp4, Format::F4E2M1), (Mx::Fp8E4M3, Format::F8E4M3), (Mx::Fp6E2M3, Format::F6E2M3)]
    {
        let w = weights(4, 96);
        let (mut scales, mut expected) = ([F8E8M0::ONE; 12], [0; 384]);
        mx.quantize(ScaleRule::Floor, Nearest::NearestEven, w.data(), &mut scales, &mut expected)
            .unwrap();
        let (scheme, fit) = presets::mx(format);
        let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
        assert_eq!(q.scales(), scales.map(F8E8M0::to_bits));
        assert_eq!(codes(&q), expected);
        let mut back = vec![0.0; 384];
        mx.dequantize(&scales, &expected, &mut back).unwrap();
        assert_eq!(q.dequantize().data(), back);
    }
}

#[test]
fn nvfp4_is_what_the_dtypes_crate_makes() {
    let w = weights(4, 96);
    let nvfp4 = Nvfp4::fit(w.data()).unwrap();
    let (mut scales, mut expected) = ([F8E4M3::ONE; 24], [0; 384]);
    nvfp4.quantize(Nearest::NearestEven, w.data(), &mut scales, &mut expected).unwrap();
    let (scheme, fit) = presets::nvfp4();
    let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
    let (steps, global) = q.scales().split_at(24);
    assert_eq!(steps, scales.map(F8E4M3::to_bits));
    assert_eq!(f32::from_le_bytes(global.try_into().unwrap()), nvfp4.global());
    assert_eq!(codes(&q), expected);
}

#[test]
fn nf4_is_what_the_dtypes_crate_makes() {
    let w = weights(4, 128);
    let (mut scales, mut expected) = ([0.0; 8], [0; 512]);
    Table16::NF4.quantize(64, w.data(), &mut scales, &mut expected).unwrap();
    let (scheme, fit) = presets::nf4(Granularity::PerGroup(64));
    let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
    assert_eq!(codes(&q), expected);
    assert_eq!(q.scales(), scales.map(f32::to_le_bytes).concat());
}

/// Each weight alone has no place in the matrix: all of them were rounded by one random number.
#[test]
fn an_encoder_refuses_what_it_cannot_do() {
    let scheme = QuantScheme::symmetric(4, Granularity::PerChannel);
    for (fit, word) in [
        (Fit { rounding: Rounding::Stochastic { seed: 1 }, ..Fit::NEAREST }, "stochastic"),
        (Fit { division: Division::ExactReciprocal, ..Fit::NEAREST }, "division"),
    ] {
        let error = Encoder::new(scheme, &fit).unwrap_err().to_string();
        assert!(
            error.starts_with("an encoder does not support") && error.contains(word),
            "{error}"
        );
    }
}

#[test]
fn unsigned_floats_have_no_level_below_0() {
    let dtype = QuantType::Float(Format::new(3, 2, 3, Specials::Scale).unwrap());
    let w = Mat::new(vec![-1.0, 0.5, 2.0, 0.0], 1, 4).unwrap();
    let scheme = QuantScheme {
        scale_format: ScaleFormat::F32,
        ..QuantScheme::levels(dtype, Granularity::PerChannel)
    };
    let q = QMatrix::quantize(w.as_ref(), scheme).unwrap().dequantize();
    let lowest = 2.0 * dtype.level(0) / dtype.reach();
    assert!(q.data()[0] == lowest && q.data()[3] == lowest && q.data()[2] == 2.0, "{q:?}");
}

#[test]
fn a_scale_whose_outermost_level_is_beyond_f32_overflows() {
    // 3 · 2^127 is not an f32; before, only the scale was looked at.
    let scheme = QuantScheme {
        scale_format: ScaleFormat::Bf16,
        ..QuantScheme::levels(QuantType::Float(Format::F4E2M1), Granularity::PerChannel)
    };
    let params = Params { scale: 2.0_f32.powi(126), ..Params::default() };
    let error = BlockParams::round(scheme, 1, 4, &[params]).unwrap_err();
    assert!(matches!(error, Error::ScaleOverflow { row: 0, col: 0, .. }), "{error}");
    // The smallest weight on a real zero and powers of two: the scale was 0, which they do not have.
    let scheme = QuantScheme {
        scale_format: ScaleFormat::E8m0,
        zero: ZeroFormat::Real(ScaleFormat::F32),
        ..QuantScheme::affine(4, Granularity::PerTensor)
    };
    let tiny = Mat::new(vec![8e-45], 1, 1).unwrap();
    let q = QMatrix::quantize(tiny.as_ref(), scheme).unwrap();
    assert_eq!(
        (q.params(0, 0).scale, q.dequantize().data()[0].is_finite()),
        (2.0_f32.powi(-127), true)
    );
}

#[test]
fn integer_levels_are_exact_where_they_can_be() {
    let exact = [
        QuantType::Int { bits: 8 },
        QuantType::IQ4_NL,
        QuantType::Float(Format::F4E2M1),
        QuantType::Float(Format::F6E3M2),
    ];
    for dtype in exact {
        let levels = dtype.integer_levels().unwrap();
        for code in 0..=dtype.max_code() {
            assert_eq!(
                f32::from(levels.integers[usize::from(code)]) * levels.unit,
                dtype.level(code)
            );
        }
    }
    // In units of 0.375, of 100, and of 1 though 3 would do: whole numbers that fit a byte stay.
    let tables: [(&[f32], f32, &[i16]); 3] = [
        (&[-0.375, 0.0, 0.375, 0.75], 0.375, &[-1, 0, 1, 2]),
        (&[-25500.0, -100.0], 100.0, &[-255, -1]),
        (&[-3.0, 0.0, 3.0, 6.0], 1.0, &[-3, 0, 3, 6]),
    ];
    for (levels, unit, integers) in tables {
        let found = QuantType::Table(Levels::new(levels).unwrap()).integer_levels().unwrap();
        assert_eq!((found.unit, &found.integers[..integers.len()]), (unit, integers));
    }
    let nf4 = QuantType::NF4.integer_levels().unwrap();
    for code in 0..16 {
        let error =
            f32::from(nf4.integers[usize::from(code)]) * nf4.unit - QuantType::NF4.level(code);
        assert!(error.abs() <= nf4.unit * 0.501);
    }
    assert_eq!(QuantType::Float(Format::F8E4M3).integer_levels(), None);
}

#[test]
fn int8_activations_meet_tables_as_integers() {
    let (n, k) = (5, 96);
    let x = Mat::from_fn(3, k, |r, c| ((r * 5 + c) as f32).cos());
    for dtype in
        [QuantType::NF4, QuantType::Float(Format::F4E2M1), QuantType::Float(Format::F8E4M3)]
    {
        let scheme = QuantScheme::levels(dtype, Granularity::PerGroup(32));
        let q = QMatrix::quantize(weights(n, k).as_ref(), scheme).unwrap();
        let w = q.dequantize();
        let float = QLinear::new(q.clone());
        let int8 = QLinear::new(q).with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
        let mut y = [Mat::zeros(3, n), Mat::zeros(3, n)];
        for (layer, y) in [float, int8].iter().zip(&mut y) {
            layer.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
        }
        let [float, int8] = y;
        // Half a step of the activations, 1/254 at most, for each weight.
        for (i, (a, b)) in float.data().iter().zip(int8.data()).enumerate() {
            let row = &w.data()[i % n * k..][..k];
            let bound = row.iter().map(|w| w.abs()).sum::<f32>() / 253.0;
            assert!((a - b).abs() < bound && a != b, "{a} and {b} for {dtype:?}");
        }
    }
}

#[test]
fn a_scale_that_becomes_zero_makes_its_block_zero() {
    let mut w = weights(2, 64);
    w.data_mut()[..32].fill(1e-6);
    let two = TwoLevel {
        dtype: QuantType::Int { bits: 2 },
        granularity: Granularity::PerTensor,
        base: Base::Zero,
        format: StepFormat::F32,
    };
    for zero in [ZeroFormat::Midpoint, ZeroFormat::Int, ZeroFormat::Real(ScaleFormat::F16)] {
        let scheme = QuantScheme {
            scale_format: ScaleFormat::TwoLevel(two),
            zero,
            ..QuantScheme::symmetric(4, Granularity::PerGroup(32))
        };
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        assert_eq!(q.params(0, 0).scale, 0.0);
        assert_eq!(q.dequantize().data()[..32], [0.0; 32]);
    }
}

#[test]
fn integer_group_scales_are_integers_times_one_step() {
    let scale_format = ScaleFormat::TwoLevel(TwoLevel::integer(4));
    let scheme =
        QuantScheme { scale_format, ..QuantScheme::symmetric(4, Granularity::PerGroup(32)) };
    let q = QMatrix::quantize(weights(3, 128).as_ref(), scheme).unwrap();
    assert_eq!(q.bytes(), 3 * (64 + 2 + 4));
    for r in 0..3 {
        let step = (0..4).map(|g| q.params(r, g).scale).fold(0.0, f32::max) / 15.0;
        for g in 0..4 {
            let steps = q.params(r, g).scale / step;
            assert!((steps - steps.round()).abs() < 1e-5, "{steps}");
        }
    }
}

#[test]
fn impossible_schemes_are_refused() {
    let w = weights(2, 8);
    let nf4 = QuantScheme::levels(QuantType::NF4, Granularity::PerChannel);
    let quantize = |scheme| QMatrix::quantize(w.as_ref(), scheme).map(drop);
    for zero in [ZeroFormat::Midpoint, ZeroFormat::Int, ZeroFormat::Offset(ScaleFormat::F16)] {
        let error = quantize(QuantScheme { zero, ..nf4 });
        assert!(matches!(error, Err(Error::Unsupported { .. })), "{error:?}");
    }
    let bad = TwoLevel { granularity: Granularity::PerGroup(0), ..TwoLevel::BILEVEL4 };
    let bad = QuantScheme { scale_format: ScaleFormat::TwoLevel(bad), ..nf4 };
    assert!(matches!(quantize(bad), Err(Error::EmptyBlock { .. })));
    let floor = Fit { rounding: Rounding::Floor, ..Fit::NEAREST };
    let error = QMatrix::quantize_with(w.as_ref(), nf4, &floor, None);
    assert!(matches!(error, Err(Error::Unsupported { .. })), "{error:?}");
    for levels in [&[1.0][..], &[0.0, 0.0], &[1.0, f32::NAN], &[1.0; 3], &[1.0; 32]] {
        assert!(Levels::new(levels).is_err(), "{levels:?}");
    }
    let e8m0 = QuantScheme {
        scale_format: ScaleFormat::E8m0,
        ..QuantScheme::symmetric(4, Granularity::PerChannel)
    };
    let negative = Fit { symmetric: lowbit_core::SymmetricScale::SignedExtreme, ..Fit::NEAREST };
    let error =
        QMatrix::quantize_with(Mat::from_fn(1, 2, |_, c| c as f32).as_ref(), e8m0, &negative, None);
    assert!(matches!(error, Err(Error::ScaleOverflow { format: "E8M0", .. })), "{error:?}");
}
