//! What quantization promises, proved with the testing kit over every family of matrices, scheme and
//! fit; and a test for every defect of another library that concerns this layer, named after it.

use lowbit_core::testing::{Family, bounds, proptest::prelude::*, strategies};
use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Context, Division, Error, Fit, Granularity,
    Linear, Mat, QActivations, QLinear, QMatrix, QuantScheme, Range, Rounding, ScaleFormat,
    SymmetricScale, ZeroFormat, metrics, presets, quantize_row_int8, quantize_row_uint8,
};

/// `w`, quantized; `None` where a scale overflows its format, which is an error by design.
fn quantized(w: &Mat<f32>, scheme: QuantScheme, fit: &Fit) -> Option<QMatrix> {
    match QMatrix::quantize_with(w.as_ref(), scheme, fit, None) {
        Ok(q) => Some(q),
        Err(Error::ScaleOverflow { .. } | Error::ZeroOverflow { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// All codes of `q`, row by row.
fn codes(q: &QMatrix) -> Vec<u8> {
    let mut all = vec![0; q.rows() * q.cols()];
    for (r, codes) in all.chunks_mut(q.cols().max(1)).enumerate() {
        q.unpack_row(r, codes).unwrap();
    }
    all
}

fn map(w: &Mat<f32>, f: impl Fn(f32) -> f32) -> Mat<f32> {
    Mat::from_fn(w.rows(), w.cols(), |r, c| f(w.data()[r * w.cols() + c]))
}

/// Matrices without subnormal or huge numbers: those that powers of two scale exactly.
fn tame() -> impl Strategy<Value = Mat<f32>> {
    let wild = [Family::Subnormal, Family::HugeRange, Family::Mixed];
    let families: Vec<_> = Family::ALL.into_iter().filter(|f| !wild.contains(f)).collect();
    strategies::matrices_of(&families, 0..=7, 0..=70)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn every_error_is_within_the_computed_bound(
        w in strategies::matrices(0..=7, 0..=70),
        scheme in strategies::schemes(40),
        fit in strategies::fits(),
    ) {
        let Some(q) = quantized(&w, scheme, &fit) else { return Ok(()) };
        let bound = bounds::quantization(w.as_ref(), scheme, &fit)?;
        let back = q.dequantize();
        for (i, ((w, back), bound)) in
            w.data().iter().zip(back.data()).zip(bound.data()).enumerate()
        {
            let error = (f64::from(*w) - f64::from(*back)).abs();
            prop_assert!(error <= *bound, "element {i}: {w:e} became {back:e}, {error:e} > {bound:e}");
        }
    }

    /// Exactly where the step is a number of 11 bits, so that `127 · scale` fits an f32.
    #[test]
    fn what_was_quantized_quantizes_to_itself(
        w in strategies::matrices(0..=7, 0..=70),
        bits in 2..=8_u8,
        granularity in strategies::granularities(40),
        rounding in strategies::roundings(),
    ) {
        let scheme = QuantScheme::symmetric(bits, granularity);
        let fit = Fit { symmetric: SymmetricScale::Restricted, rounding, ..Fit::default() };
        let Some(q) = quantized(&w, scheme, &fit) else { return Ok(()) };
        let once = q.dequantize();
        let twice = quantized(&once, scheme, &fit).unwrap();
        let (rows, cols) = q.block();
        for (r, row) in once.as_ref().iter_rows().enumerate() {
            for (c, x) in row.iter().enumerate() {
                let block = (r / rows, c / cols);
                let same = q.params(block.0, block.1) == twice.params(block.0, block.1);
                // Scales of fewer bits, and roundings that miss the largest weight, move the range.
                let reaches = fit.rounding == Rounding::NearestEven
                    && q.params(block.0, block.1).scale >= 2.0_f32.powi(-14);
                prop_assert!(same || !reaches, "the scale of block {block:?} changed");
                if same {
                    prop_assert_eq!(*x, *twice.dequantize().as_ref().get(r, c).unwrap());
                }
            }
        }
    }

    /// For `Fit`s whose grid the weights of the block reach at both ends.
    #[test]
    fn every_level_of_a_grid_quantizes_to_itself(
        bits in 2..=8_u8,
        scale in 1..2048_u16,
        exponent in -24..5_i32,
        zero in any::<u8>(),
        kind in 0..6_usize,
        format in strategies::scale_formats(),
        fit in strategies::fits(),
    ) {
        let scheme = QuantScheme::symmetric(bits, Granularity::PerTensor);
        let mid = f32::from(scheme.midpoint());
        let (symmetric, zero_format, zero, lowest) = match kind {
            0 => (SymmetricScale::Restricted, ZeroFormat::Midpoint, mid, 1),
            1 => (SymmetricScale::Full, ZeroFormat::Midpoint, mid, 0),
            2 => (SymmetricScale::SignedExtreme, ZeroFormat::Midpoint, mid, 0),
            3 => (fit.symmetric, ZeroFormat::Int, f32::from(zero & scheme.dtype.max_code()), 0),
            4 => (fit.symmetric, ZeroFormat::Real(ScaleFormat::F32), f32::from(zero), 0),
            _ => (fit.symmetric, ZeroFormat::Offset(ScaleFormat::F32), f32::from(zero), 0),
        };
        // bf16 holds 8 bits.
        let scale = if format == ScaleFormat::Bf16 { scale & 0xff | 1 } else { scale };
        let scale = f32::from(scale) * 2.0_f32.powi(exponent);
        let scheme = QuantScheme { zero: zero_format, scale_format: format, ..scheme };
        let levels: Vec<f32> = (lowest..=scheme.dtype.max_code())
            .map(|code| scale * (f32::from(code) - zero))
            .collect();
        let w = Mat::from_fn(1, levels.len(), |_, c| levels[c]);
        let fit = Fit { symmetric, range: Range::MinMax, division: Division::Stored, ..fit };
        let q = quantized(&w, scheme, &fit).unwrap();
        prop_assert_eq!(q.params(0, 0).scale, scale);
        prop_assert_eq!(q.dequantize(), w);
    }

    /// A restricted range has as many levels on both sides, a signed extreme turns the grid around.
    #[test]
    fn a_matrix_of_the_other_sign_becomes_its_mirror_image(
        w in strategies::matrices(0..=7, 0..=70),
        bits in 2..=8_u8,
        granularity in strategies::granularities(40),
        scale_format in strategies::scale_formats(),
        away in any::<bool>(),
        extreme in any::<bool>(),
        fit in strategies::fits(),
    ) {
        let scheme = QuantScheme { scale_format, ..QuantScheme::symmetric(bits, granularity) };
        let fit = if extreme {
            Fit { symmetric: SymmetricScale::SignedExtreme, ..fit }
        } else {
            let rounding = if away { Rounding::NearestAway } else { Rounding::NearestEven };
            Fit { symmetric: SymmetricScale::Restricted, rounding, ..fit }
        };
        let (Some(q), Some(mirror)) =
            (quantized(&w, scheme, &fit), quantized(&map(&w, |x| -x), scheme, &fit))
        else {
            return Ok(());
        };
        prop_assert_eq!(map(&mirror.dequantize(), |x| -x), q.dequantize());
    }

    #[test]
    fn a_larger_weight_never_becomes_a_smaller_one(
        w in strategies::matrices(0..=7, 0..=70),
        scheme in strategies::schemes(40),
        fit in strategies::fits(),
    ) {
        let Some(q) = quantized(&w, scheme, &fit) else { return Ok(()) };
        if matches!(fit.rounding, Rounding::Stochastic { .. }) {
            return Ok(());
        }
        let back = q.dequantize();
        let (rows, cols) = q.block();
        let mut blocks = std::collections::BTreeMap::<_, Vec<(f32, f32)>>::new();
        for r in 0..w.rows() {
            for c in 0..w.cols() {
                let i = r * w.cols() + c;
                let pair = (w.data()[i], back.data()[i]);
                blocks.entry((r / rows, c / cols)).or_default().push(pair);
            }
        }
        for block in blocks.values_mut() {
            block.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap());
            for pair in block.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].1, "{pair:?}");
            }
        }
    }

    #[test]
    fn scaling_by_a_power_of_two_commutes(
        w in tame(),
        scheme in strategies::schemes(40),
        fit in strategies::fits(),
        exponent in -80..60_i32,
    ) {
        // Narrow formats have an end, and a percentile of zeros has steps of 1 in every unit.
        let zero = match scheme.zero {
            ZeroFormat::Offset(_) => ZeroFormat::Offset(ScaleFormat::F32),
            zero => zero,
        };
        let scheme = QuantScheme { zero, scale_format: ScaleFormat::F32, ..scheme };
        // Powers but the square are rounded, and may choose another one of two candidates.
        let range = match fit.range {
            Range::Search { grid, candidates, .. } => Range::Search { grid, candidates, norm: 2.0 },
            _ => Range::MinMax,
        };
        let fit = Fit { range, ..fit };
        let scaled = map(&w, |x| x * 2.0_f32.powi(exponent));
        let (Some(q), Some(scaled)) = (quantized(&w, scheme, &fit), quantized(&scaled, scheme, &fit))
        else {
            return Ok(());
        };
        prop_assert_eq!(codes(&q), codes(&scaled));
        prop_assert_eq!(map(&q.dequantize(), |x| x * 2.0_f32.powi(exponent)), scaled.dequantize());
    }

    /// The whole range is one of the candidates.
    #[test]
    fn a_search_is_never_worse_than_the_whole_range(
        w in tame(), scheme in strategies::schemes(40), fit in strategies::fits(),
    ) {
        let whole = Fit { range: Range::MinMax, ..fit };
        let searched = Fit { range: Range::Search { grid: 8, candidates: 6, norm: 2.0 }, ..fit };
        let (Some(whole), Some(searched)) =
            (quantized(&w, scheme, &whole), quantized(&w, scheme, &searched))
        else {
            return Ok(());
        };
        let mse = |q: &QMatrix| metrics::mse(w.data(), q.dequantize().data()).unwrap();
        // Squares of f32 differences are rounded to f32.
        prop_assert!(mse(&searched) <= mse(&whole) * (1.0 + 1e-6));
    }

    #[test]
    fn activations_are_within_half_a_step(
        x in strategies::matrices(0..=5, 0..=70), scheme in strategies::activation_schemes(),
    ) {
        if matches!(scheme.dtype, ActivationType::Float(_)) {
            return Ok(());
        }
        // A range of both signs wider than f32's largest number is made smaller, by a step.
        let wide = x.data().iter().any(|x| x.abs() > f32::MAX / 2.0);
        let steps = if wide && scheme.dtype == ActivationType::UInt8 { 1.0 } else { 0.5 };
        let q = QActivations::quantize(x.as_ref(), scheme)?;
        let back = q.dequantize();
        for (i, (x_i, back)) in x.data().iter().zip(back.data()).enumerate() {
            let scale = q.params(i / x.cols(), i % x.cols() / q.group_size()).scale;
            let (x_i, back, scale) = (f64::from(*x_i), f64::from(*back), f64::from(scale));
            // A subnormal scale is off by up to half of 2^−149, and every code of 32767 with it.
            let tiny = 32768.0 * f64::from(f32::from_bits(1));
            let slack = 2.0_f64.powi(-21) * x_i.abs() + tiny;
            prop_assert!((x_i - back).abs() <= steps * scale + slack, "{x_i:e} became {back:e}");
        }
    }
}

// Defects of other libraries.

/// AutoGPTQ's symmetric mode mirrors the minimum only if it is negative: `scale = max/15`, zero 8, and
/// the largest weight comes back as 7/15 of itself.
#[test]
fn an_all_positive_group_is_not_reconstructed_at_half_its_size() {
    for sign in [1.0, -1.0] {
        let w = Mat::from_fn(4, 128, |r, c| sign * (1.0 + ((r * 128 + c) as f32).sin().abs()));
        for (scheme, fit) in [
            presets::gptq_sym(4, Granularity::PerGroup(128)),
            presets::awq_sym(4, Granularity::PerGroup(128)),
            presets::gguf_q4_0(),
        ] {
            let back = quantized(&w, scheme, &fit).unwrap().dequantize();
            for (w, back) in w.data().iter().zip(back.data()) {
                assert!((back / w - 1.0).abs() < 0.15, "{w} became {back} with {fit:?}");
            }
        }
    }
}

/// AutoAWQ does not put 0 into the range and clamps the zero-point to 0..=15: 1.0 comes back as 0.1.
#[test]
fn a_group_between_0_9_and_1_is_not_reconstructed_as_a_tenth() {
    for sign in [1.0, -1.0] {
        let w = Mat::from_fn(1, 128, |_, c| sign * (0.9 + 0.1 * c as f32 / 127.0));
        let zeros = [
            ZeroFormat::Int,
            ZeroFormat::Real(ScaleFormat::F16),
            ZeroFormat::Offset(ScaleFormat::F16),
        ];
        for (zero, worst) in zeros.into_iter().zip([0.034, 0.02, 0.005]) {
            let scheme = QuantScheme { zero, ..QuantScheme::affine(4, Granularity::PerGroup(128)) };
            let back = QMatrix::quantize(w.as_ref(), scheme).unwrap().dequantize();
            let error = metrics::max_abs_error(w.data(), back.data()).unwrap();
            assert!(error < worst, "{error} with {zero:?}");
        }
    }
}

/// AutoGPTQ computes codes again when it packs, with a scale rounded to f16, and ORs them into a word
/// without clamping; it stores zero − 1, so that 0 becomes 0xFFFFFFFF.
#[test]
fn a_code_beyond_its_field_does_not_corrupt_its_neighbours() {
    // f16 rounds 1e-7/15 from 0.112 of its smallest number to that: codes would be 1.7, or with a
    // smaller scale 16.
    for top in [1e-7_f32, 1e-6, 1.0 + 1.0 / 2048.0, 8.0 - 1.0 / 512.0] {
        for bits in 2..=8 {
            let w = Mat::from_fn(3, 33, |_, c| if c % 2 == 0 { top } else { 0.0 });
            let scheme = QuantScheme::affine(bits, Granularity::PerGroup(11));
            let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
            assert_eq!(q.params(0, 0).zero, 0.0);
            for (w, back) in w.data().iter().zip(q.dequantize().data()) {
                assert_eq!(*w == 0.0, *back == 0.0, "{w} became {back}, {bits} bits");
            }
        }
    }
}

/// bitsandbytes types 1/127² as 6.200124e-05: every result of the CPU is 1.8e-5 too large.
#[test]
fn an_int8_product_is_not_18_millionths_too_large() {
    let w = Mat::new(vec![1.0], 1, 1).unwrap();
    let (scheme, fit) = presets::bitsandbytes_int8();
    let layer = QLinear::new(quantized(&w, scheme, &fit).unwrap())
        .with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let mut y = Mat::zeros(1, 1);
    layer.forward(w.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
    assert!((y.data()[0] - 1.0).abs() < 3e-7, "{y:?}");
}

/// bitsandbytes multiplies integers as f32, which is inexact beyond 2^24, from k = 1040 on.
#[test]
fn an_integer_sum_beyond_2_to_the_24_is_exact() {
    let k = 3001;
    let scheme = QuantScheme {
        scale_format: ScaleFormat::F32,
        ..QuantScheme::symmetric(8, Granularity::PerTensor)
    };
    let one = 1.0_f32.to_le_bytes().to_vec();
    let w = QMatrix::from_parts(1, k, scheme, vec![255; k], one, None).unwrap();
    let layer = QLinear::new(w).with_activation(Some(ActivationScheme {
        dtype: ActivationType::Int8,
        scales: ActivationScales::Static { scale: 1.0, zero_point: 0 },
    }));
    let x = Mat::from_fn(1, k, |_, c| if c == 0 { 1.0 } else { 127.0 });
    let mut y = Mat::zeros(1, 1);
    layer.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
    let exact = 127 + 3000 * 127 * 127;
    assert_eq!(y.data(), [exact as f32]);
    let in_f32 = x.data().iter().fold(0.0, |sum, x| sum + 127.0 * x);
    assert_ne!(in_f32, exact as f32);
}

/// bitsandbytes divides 127 by the largest magnitude: a row of zeros is 0·∞, NaN, and any integer.
#[test]
fn a_row_of_zeros_does_not_become_nan() {
    let zeros = Mat::<f32>::zeros(3, 40);
    proptest!(|(scheme in strategies::schemes(40), fit in strategies::fits())| {
        prop_assert_eq!(quantized(&zeros, scheme, &fit).unwrap().dequantize(), zeros.clone());
    });
    proptest!(|(scheme in strategies::activation_schemes())| {
        let q = QActivations::quantize(zeros.as_ref(), scheme)?;
        prop_assert_eq!(q.dequantize(), zeros.clone());
    });
    let (mut int8, mut uint8) = ([9; 40], [9; 40]);
    assert_eq!(quantize_row_int8(&[0.0; 40], &mut int8), Ok(1.0));
    assert_eq!(quantize_row_uint8(&[0.0; 40], &mut uint8), Ok((1.0, 0)));
    assert_eq!((int8, uint8), ([0; 40], [0; 40]));
}

/// ggml's reference of Q8_0 rounds half away and divides; its SIMD versions round half to even and
/// multiply by 127/max. Files differ in the last code.
#[test]
fn a_code_does_not_depend_on_where_its_weight_stands() {
    proptest!(|(
        x in -1.0..1.0_f32, tie in -127..127_i8, fit in strategies::fits(), bits in 2..=8_u8,
    )| {
        if matches!(fit.rounding, Rounding::Stochastic { .. }) {
            return Ok(());
        }
        // Ties and other numbers, at every place of a vector and of what is left after the last.
        for x in [x, (f32::from(tie) + 0.5) / 127.0] {
            let w = Mat::from_fn(1, 71, |_, c| if c == 0 { 1.0 } else { x });
            let scheme = QuantScheme::symmetric(bits, Granularity::PerChannel);
            let codes = codes(&quantized(&w, scheme, &fit).unwrap());
            prop_assert!(codes[1..].iter().all(|code| *code == codes[1]), "{:?}", codes);
            let mut int8 = [0; 71];
            quantize_row_int8(w.data(), &mut int8)?;
            prop_assert!(int8[1..].iter().all(|code| *code == int8[1]), "{:?}", int8);
        }
    });
}

/// ggml's `nearest_int` is right up to 4194303, guarded by an `assert` that release builds leave out.
#[test]
fn a_huge_ratio_saturates_instead_of_wrapping() {
    let x = Mat::new(vec![1e30, -1e30, 4_194_304.0, -4_194_304.0, f32::MAX, 0.0], 1, 6).unwrap();
    for (dtype, zero_point, reach) in [
        (ActivationType::Int8, 0, [127, -127]),
        (ActivationType::Int16, 0, [32767, -32767]),
        (ActivationType::UInt8, 100, [255, 0]),
    ] {
        let scales = ActivationScales::Static { scale: 1e-3, zero_point };
        let q = QActivations::quantize(x.as_ref(), ActivationScheme { dtype, scales }).unwrap();
        let [hi, lo] = reach;
        assert_eq!(q.row(0), Some(&[hi, lo, hi, lo, hi, i16::from(zero_point)][..]), "{dtype:?}");
    }
    // A percentile leaves the outliers outside.
    for zero in [ZeroFormat::Midpoint, ZeroFormat::Int, ZeroFormat::Real(ScaleFormat::F32)] {
        let mut w = Mat::from_fn(1, 1000, |_, c| (c as f32).sin());
        (w.data_mut()[3], w.data_mut()[4]) = (f32::MAX, -f32::MAX);
        let scheme = QuantScheme { zero, ..QuantScheme::symmetric(4, Granularity::PerTensor) };
        let fit = Fit { range: Range::Percentile(99.0), ..Fit::default() };
        let q = quantized(&w, scheme, &fit).unwrap();
        assert_eq!(codes(&q)[3..5], [15, 0]);
    }
}

/// compressed-tensors multiplies by `sign(x)` in its CPU cast: −0 becomes +0.
#[test]
fn a_negative_zero_keeps_its_sign_in_float_activations() {
    let x = Mat::new(vec![-0.0, 0.0, 1.0], 1, 3).unwrap();
    let dtype = ActivationType::Float(lowbit_dtypes::Format::F8E4M3);
    let scheme = ActivationScheme { dtype, scales: ActivationScales::PerToken };
    let q = QActivations::quantize(x.as_ref(), scheme).unwrap();
    assert_eq!(q.row(0).unwrap()[..2], [0x80, 0x00]);
    assert!(q.dequantize().data()[0].is_sign_negative());
}

/// AutoAWQ's scales are at least 1e-5, DeepSeek's activations 1e-4, BitNet's 1e-5: what is smaller
/// becomes zero.
#[test]
fn small_numbers_are_not_rounded_to_zero_by_a_floor() {
    for exponent in [-20, -60, -100] {
        let w = map(&Family::Normal.matrix(4, 64, 1), |x| x * 2.0_f32.powi(exponent));
        for scale_format in [ScaleFormat::F32, ScaleFormat::Bf16] {
            for scheme in [QuantScheme::symmetric, QuantScheme::affine] {
                let scheme = QuantScheme { scale_format, ..scheme(8, Granularity::PerChannel) };
                let back = QMatrix::quantize(w.as_ref(), scheme).unwrap().dequantize();
                let db = metrics::sqnr_db(w.data(), back.data()).unwrap();
                assert!(db > 38.0, "{db} dB at 2^{exponent}");
            }
        }
        for dtype in [ActivationType::Int8, ActivationType::UInt8] {
            let scheme = ActivationScheme { dtype, scales: ActivationScales::PerToken };
            let back = QActivations::quantize(w.as_ref(), scheme).unwrap().dequantize();
            let db = metrics::sqnr_db(w.data(), back.data()).unwrap();
            assert!(db > 38.0, "{db} dB at 2^{exponent}");
        }
    }
}

/// Where a bound is right but loose, it finds nothing: errors come near it.
#[test]
fn the_bound_is_reached() {
    for (fit, least) in [
        (Fit::default(), 0.95),
        (Fit { rounding: Rounding::Floor, ..Fit::default() }, 0.95),
        (Fit { symmetric: SymmetricScale::Restricted, ..Fit::default() }, 0.95),
        (Fit { symmetric: SymmetricScale::Full, ..Fit::default() }, 0.95),
    ] {
        for zero in [ZeroFormat::Midpoint, ZeroFormat::Int, ZeroFormat::Offset(ScaleFormat::F16)] {
            let scheme =
                QuantScheme { zero, ..QuantScheme::symmetric(4, Granularity::PerGroup(32)) };
            let w = Family::Normal.matrix(8, 256, 5);
            let back = quantized(&w, scheme, &fit).unwrap().dequantize();
            let bound = bounds::quantization(w.as_ref(), scheme, &fit).unwrap();
            let ratios = w.data().iter().zip(back.data()).zip(bound.data());
            let ratio = ratios
                .map(|((w, back), bound)| (f64::from(*w) - f64::from(*back)).abs() / bound)
                .fold(0.0, f64::max);
            assert!(ratio > least && ratio <= 1.0, "{ratio} of the bound, {fit:?}, {zero:?}");
        }
    }
}
