//! What `QMatrix::quantize` promises, for every width, granularity and scale format.

use lowbit_core::{
    ActivationScheme, Context, Error, Granularity, Linear, Mat, MatRef, Params, QLinear, QMatrix,
    QuantScheme, ScaleFormat, ZeroFormat, quantize_row_int8,
};
use proptest::prelude::*;

fn granularity() -> impl Strategy<Value = Granularity> {
    prop_oneof![
        Just(Granularity::PerTensor),
        Just(Granularity::PerChannel),
        Just(Granularity::PerColumn),
        (1..20_usize).prop_map(Granularity::PerGroup),
        (1..5_usize, 1..20_usize).prop_map(|(r, c)| Granularity::PerBlock(r, c)),
    ]
}

fn scale_format() -> impl Strategy<Value = ScaleFormat> {
    prop_oneof![Just(ScaleFormat::F32), Just(ScaleFormat::F16), Just(ScaleFormat::Bf16)]
}

fn zero() -> impl Strategy<Value = ZeroFormat> {
    prop_oneof![
        Just(ZeroFormat::Midpoint),
        Just(ZeroFormat::Int),
        scale_format().prop_map(ZeroFormat::Real),
        scale_format().prop_map(ZeroFormat::Offset),
    ]
}

fn scheme() -> impl Strategy<Value = QuantScheme> {
    (1..=8_u8, granularity(), zero(), scale_format()).prop_map(
        |(bits, granularity, zero, scale_format)| QuantScheme {
            zero,
            scale_format,
            ..QuantScheme::affine(bits, granularity)
        },
    )
}

fn matrix() -> impl Strategy<Value = Mat<f32>> {
    let value = prop_oneof![
        4 => -1.0_f32..1.0,
        1 => Just(0.0_f32),
        1 => (-30..15_i32).prop_map(|e| 2.0_f32.powi(e)),
    ];
    (0..7_usize, 0..40_usize).prop_flat_map(move |(n, k)| {
        prop::collection::vec(value.clone(), n * k)
            .prop_map(move |data| Mat::new(data, n, k).unwrap())
    })
}

/// All levels of the block that `(r, c)` lies in.
fn levels(q: &QMatrix, r: usize, c: usize) -> Vec<f32> {
    let (rows, cols) = q.block();
    let params = q.params(r / rows, c / cols);
    (0..=q.scheme().dtype.max_code()).map(|code| params.real(f32::from(code))).collect()
}

proptest! {
    #[test]
    fn every_weight_becomes_the_nearest_level_of_its_block(w in matrix(), scheme in scheme()) {
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let back = q.dequantize();
        for (r, row) in w.as_ref().iter_rows().enumerate() {
            for (c, &x) in row.iter().enumerate() {
                let got = *back.as_ref().get(r, c).unwrap();
                let best = levels(&q, r, c)
                    .into_iter()
                    .map(|level| (f64::from(level) - f64::from(x)).abs())
                    .fold(f64::INFINITY, f64::min);
                // Within the roundings of `w / scale`, of the level and of what is added to them,
                // near a tie.
                let (rows, cols) = q.block();
                let p = q.params(r / rows, c / cols);
                let sizes = [x, got, p.offset, p.scale * p.zero].map(|x| f64::from(x.abs()));
                let slack = sizes.iter().sum::<f64>() * 2.0_f64.powi(-22);
                let error = (f64::from(got) - f64::from(x)).abs();
                prop_assert!(error <= best + slack, "{x} became {got}");
            }
        }
    }

    #[test]
    fn no_weight_moves_by_more_than_half_a_step(
        w in matrix(), granularity in granularity(), bits in 1..=8_u8, symmetric in any::<bool>(),
    ) {
        let zero = if symmetric { ZeroFormat::Midpoint } else { ZeroFormat::Int };
        let scheme = QuantScheme {
            zero, scale_format: ScaleFormat::F32, ..QuantScheme::affine(bits, granularity)
        };
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let (rows, cols) = q.block();
        for (r, (row, back)) in w.as_ref().iter_rows().zip(q.dequantize().as_ref().iter_rows()).enumerate() {
            for (c, (x, back)) in row.iter().zip(back).enumerate() {
                let scale = q.params(r / rows, c / cols).scale;
                // An affine zero is rounded, which moves the range by up to half a step more.
                let steps = if symmetric { 0.5 } else { 1.0 };
                // The scale and the level are rounded to f32.
                let bound = steps * scale + x.abs() * 2.0_f32.powi(-22);
                prop_assert!((x - back).abs() <= bound, "{x} became {back}, scale {scale}");
            }
        }
    }

    #[test]
    fn zero_stays_exactly_zero(w in matrix(), scheme in scheme()) {
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        for (w, back) in w.data().iter().zip(q.dequantize().data()) {
            let real = matches!(scheme.zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
            if *w == 0.0 && !real {
                prop_assert_eq!(*back, 0.0);
            }
        }
    }

    #[test]
    fn borrowing_the_parts_gives_the_same_matrix(w in matrix(), scheme in scheme()) {
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let (n, k) = (q.rows(), q.cols());
        let borrowed =
            QMatrix::from_parts(n, k, scheme, q.codes(), q.scales(), q.zeros()).unwrap();
        prop_assert_eq!(borrowed.dequantize(), q.dequantize());
        prop_assert_eq!(borrowed.bytes(), q.bytes());
    }

    #[test]
    fn a_strided_view_quantizes_like_its_copy(w in matrix(), scheme in scheme(), gap in 1..5_usize) {
        let (n, k) = (w.rows(), w.cols());
        let wide = Mat::from_fn(n, k + gap, |r, c| if c < k { w.data()[r * k + c] } else { f32::NAN });
        let view = MatRef::with_row_stride(wide.data(), n, k, k + gap).unwrap();
        prop_assert_eq!(QMatrix::quantize(view, scheme), QMatrix::quantize(w.as_ref(), scheme));
    }

    #[test]
    fn int8_activations_are_within_half_a_step(x in prop::collection::vec(-1e6_f32..1e6, 0..50)) {
        let mut codes = vec![0; x.len()];
        let scale = quantize_row_int8(&x, &mut codes).unwrap();
        for (x, code) in x.iter().zip(codes) {
            prop_assert!((x - f32::from(code) * scale).abs() <= 0.5001 * scale);
        }
    }
}

#[test]
fn stored_bytes_are_counted_with_their_padding() {
    let w = Mat::from_fn(5, 13, |r, c| (r + c) as f32);
    let q = |scheme| QMatrix::quantize(w.as_ref(), scheme).unwrap();
    // 13 codes of 3 bits are 39 bits: 5 bytes a row. f16 scales, one a row.
    assert_eq!(q(QuantScheme::symmetric(3, Granularity::PerChannel)).bytes(), 5 * 5 + 5 * 2);
    // Groups of 8 and 5; two zeros of 3 bits take one byte a row.
    assert_eq!(q(QuantScheme::affine(3, Granularity::PerGroup(8))).bytes(), 5 * 5 + 5 * 2 * 2 + 5);
    // Blocks of 2 x 6: a grid of 3 x 3.
    let blocks = q(QuantScheme::affine(8, Granularity::PerBlock(2, 6)));
    assert_eq!((blocks.grid(), blocks.bytes()), ((3, 3), 5 * 13 + 9 * 2 + 9));
    assert_eq!(blocks.bits_per_weight(), blocks.bytes() as f64 * 8.0 / 65.0);
    let empty = Mat::zeros(0, 4);
    let empty =
        QMatrix::quantize(empty.as_ref(), QuantScheme::symmetric(8, Granularity::PerTensor));
    assert_eq!(empty.unwrap().bits_per_weight(), 0.0);
}

#[test]
fn scales_are_rounded_before_codes_are_chosen() {
    // absmax / 127.5 = 1.0041…, which f16 rounds to 1.00390625 and bf16 to 1.0078125.
    let w = Mat::new(vec![128.02, 64.45], 1, 2).unwrap();
    for (scale_format, scale, code) in [
        (ScaleFormat::F16, 1.0 + 1.0 / 256.0, 128 + 64),
        (ScaleFormat::Bf16, 1.0 + 1.0 / 128.0, 128 + 64),
    ] {
        let scheme =
            QuantScheme { scale_format, ..QuantScheme::symmetric(8, Granularity::PerTensor) };
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        assert_eq!(q.params(0, 0), Params { scale, zero: 128.0, offset: 0.0 });
        assert_eq!(q.codes(), [255, code]);
    }
}

/// Other systems reconstruct 1.0 as 0.467 (all-positive, symmetric) and as 0.1 (range that leaves
/// out zero, affine).
#[test]
fn one_signed_groups_keep_their_size() {
    let w = Mat::from_fn(1, 16, |_, c| 0.9 + c as f32 / 150.0);
    for scheme in [
        QuantScheme::symmetric(4, Granularity::PerGroup(16)),
        QuantScheme::affine(4, Granularity::PerGroup(16)),
    ] {
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        for (w, back) in w.data().iter().zip(q.dequantize().data()) {
            assert!((w - back).abs() < 0.075, "{scheme:?}: {w} became {back}");
        }
    }
}

#[test]
fn blocks_of_zeros_and_tiny_numbers_are_defined() {
    let tiny = f32::from_bits(1);
    for scale_format in [ScaleFormat::F32, ScaleFormat::F16, ScaleFormat::Bf16] {
        for scheme in [
            QuantScheme::symmetric(4, Granularity::PerGroup(4)),
            QuantScheme::affine(4, Granularity::PerGroup(4)),
        ] {
            let scheme = QuantScheme { scale_format, ..scheme };
            let w = Mat::new(vec![0.0, -0.0, 0.0, 0.0, tiny, -tiny, 0.0, 1e-30], 1, 8).unwrap();
            let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
            assert_eq!(q.params(0, 0).scale, 1.0);
            assert!(q.params(0, 1).scale > 0.0);
            assert_eq!(q.dequantize().data()[..4], [0.0; 4]);
            assert!(q.dequantize().data().iter().all(|x| x.abs() < 1e-6));
        }
    }
}

#[test]
fn the_largest_numbers_do_not_overflow_on_the_way() {
    for scheme in [
        QuantScheme::symmetric(8, Granularity::PerTensor),
        QuantScheme::affine(8, Granularity::PerTensor),
    ] {
        let f32_scales = QuantScheme { scale_format: ScaleFormat::F32, ..scheme };
        let w = |max: f32| Mat::new(vec![max, -max, 0.0, 1.0], 1, 4).unwrap();
        let back = QMatrix::quantize(w(0.99 * f32::MAX).as_ref(), f32_scales).unwrap().dequantize();
        assert!((back.data()[1] / (-0.99 * f32::MAX) - 1.0).abs() < 0.01, "{back:?}");
        // The level −128 would lie beyond the largest f32, and the scale beyond the largest f16.
        for (max, scheme) in [(f32::MAX, f32_scales), (1e30, scheme)] {
            let error = QMatrix::quantize(w(max).as_ref(), scheme);
            assert!(matches!(error, Err(Error::ScaleOverflow { row: 0, col: 0, .. })), "{error:?}");
        }
    }
}

/// Zeros of 65504 and more do not fit f16, however the scale is stored.
#[test]
fn blocks_far_from_zero_are_quantized_or_say_what_does_not_fit() {
    for scale_format in [ScaleFormat::F32, ScaleFormat::F16] {
        for bits in [2, 4, 8] {
            let w = Mat::from_fn(1, 32, |_, c| 1.0 + c as f32 * 1e-4);
            let zero = ZeroFormat::Real(ScaleFormat::F16);
            let scheme = QuantScheme {
                zero,
                scale_format,
                ..QuantScheme::affine(bits, Granularity::PerChannel)
            };
            let back = QMatrix::quantize(w.as_ref(), scheme).unwrap().dequantize();
            for (w, back) in w.data().iter().zip(back.data()) {
                assert!((w - back).abs() < 2e-3, "{w} became {back}, {bits} bits");
            }
        }
    }
    let w = Mat::from_fn(1, 4, |_, c| 1e5 + c as f32);
    let zero = ZeroFormat::Offset(ScaleFormat::F16);
    let scheme = QuantScheme { zero, ..QuantScheme::affine(4, Granularity::PerChannel) };
    assert_eq!(
        QMatrix::quantize(w.as_ref(), scheme),
        Err(Error::ZeroOverflow { zero: 1e5, format: "f16", row: 0, col: 0 })
    );
}

#[test]
fn bad_operands_are_errors_that_carry_them() {
    let mut w = Mat::from_fn(3, 4, |r, c| (r + c) as f32);
    let scheme = QuantScheme::symmetric(4, Granularity::PerChannel);
    for bits in [0, 9, 255] {
        let bad = QuantScheme::symmetric(bits, Granularity::PerChannel);
        assert_eq!(QMatrix::quantize(w.as_ref(), bad), Err(Error::Bits { bits }));
    }
    let bad = QuantScheme::symmetric(4, Granularity::PerGroup(0));
    assert_eq!(QMatrix::quantize(w.as_ref(), bad), Err(Error::EmptyBlock { rows: 1, cols: 0 }));
    let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
    let parts = |codes, scales, zeros| QMatrix::from_parts(3, 4, scheme, codes, scales, zeros);
    assert_eq!(
        parts(&q.codes()[1..], q.scales(), None),
        Err(Error::Length { what: "packed codes in bytes", expected: 6, got: 5 })
    );
    assert!(parts(q.codes(), &q.scales()[..5], None).is_err());
    assert!(parts(q.codes(), q.scales(), Some(&[1][..])).is_err());
    assert!(parts(q.codes(), q.scales(), Some(&[][..])).is_err());
    let infinite = [0, 0x7c, 0, 0, 0, 0];
    assert_eq!(
        parts(q.codes(), &infinite, None),
        Err(Error::NotFinite { what: "scale", row: 0, col: 0 })
    );
    let huge = QMatrix::from_parts(usize::MAX, 2, scheme, &[][..], &[][..], None);
    assert_eq!(huge, Err(Error::TooLarge { rows: usize::MAX, cols: 2 }));
    assert!(q.unpack_row(3, &mut [0; 4]).is_err());
    assert!(q.unpack_row(0, &mut [0; 3]).is_err());
    assert_eq!(q.params(3, 0), Params::default());
    assert!(QLinear::new(q).with_bias(Some(vec![0.0; 2])).is_err());

    w.data_mut()[6] = f32::NAN;
    assert_eq!(
        QMatrix::quantize(w.as_ref(), scheme),
        Err(Error::NotFinite { what: "weight", row: 1, col: 2 })
    );
}

#[test]
fn the_reference_layer_multiplies_by_what_it_stores() {
    let w = Mat::from_fn(3, 10, |r, c| ((r * 10 + c) as f32 * 1.7).sin());
    let x = Mat::from_fn(2, 10, |r, c| ((r * 10 + c) as f32 * 0.3).cos());
    for activation in [None, Some(ActivationScheme::INT8_PER_TOKEN)] {
        let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(6, Granularity::PerBlock(2, 4)));
        let layer = QLinear::new(q.unwrap())
            .with_activation(activation)
            .with_bias(Some(vec![1.0, -2.0, 0.5]))
            .unwrap();
        let mut y = Mat::zeros(2, 3);
        layer.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
        let w = layer.weight().dequantize();
        for (r, x) in x.as_ref().iter_rows().enumerate() {
            for (c, w) in w.as_ref().iter_rows().enumerate() {
                let dot: f32 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                let expected = dot + layer.bias().unwrap()[c];
                // Ten activations of at most 1, each off by at most half of 1/127.
                let tolerance = if activation.is_some() { 10.0 * 0.5 / 127.0 } else { 1e-5 };
                assert!((y.data()[r * 3 + c] - expected).abs() < tolerance);
            }
        }
    }
}

#[test]
fn types_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<QMatrix>();
    shared::<QLinear>();
    shared::<Mat<f32>>();
    shared::<Error>();
}
