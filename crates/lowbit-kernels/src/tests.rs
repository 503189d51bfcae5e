//! Every kernel of this machine against the reference of lowbit-core.

use std::sync::Arc;

use lowbit_core::testing::{Family, LinearProblem, Promise, strategies};
use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Context, Error, Format,
    Granularity, Levels, Linear, Mat, OutlierColumns, Outliers, QActivations, QLinear, QMatrix,
    QuantScheme, QuantType, ScaleFormat, SparseRows, Transform, TwoLevel, ZeroFormat,
    encode_row_int8, encode_row_uint8, f16, presets,
};
use lowbit_dtypes::bf16;
use proptest::prelude::*;

use crate::{Input, Output, PackedLinear, kernels};

#[derive(Clone, Debug)]
struct Problem {
    m: usize,
    n: usize,
    k: usize,
    scheme: QuantScheme,
    activation: Option<ActivationScheme>,
    bias: bool,
    /// Every weight and activation at an end of its range.
    extreme: bool,
    seed: u64,
}

impl Problem {
    fn matrix(&self, rows: usize, cols: usize, seed: u64) -> Mat<f32> {
        let family = if self.extreme { Family::Extremes } else { Family::Normal };
        family.matrix(rows, cols, self.seed ^ seed)
    }

    fn layer(&self) -> QLinear {
        let w = self.matrix(self.n, self.k, 1);
        let bias = self.bias.then(|| self.matrix(1, self.n, 2).data().to_vec());
        QLinear::new(QMatrix::quantize(w.as_ref(), self.scheme).unwrap())
            .with_activation(self.activation)
            .with_bias(bias)
            .unwrap()
    }

    fn input(&self) -> Mat<f32> {
        self.matrix(self.m, self.k, 3)
    }

    fn check(&self) {
        check(self.layer(), self.input());
    }
}

/// Holds every kernel, sequential and on two threads, against the reference: bit for bit with int8
/// activations, within the computed bound with f32.
fn check(layer: QLinear, x: Mat<f32>) {
    let promise = match layer.activation() {
        None | Some(ActivationScheme::BF16) => Promise::Rounding,
        Some(_) => Promise::Bits,
    };
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    let problem = LinearProblem::new(layer, x).unwrap();
    for kernel in kernels() {
        let packed = PackedLinear::with_kernel(problem.layer(), kernel).unwrap();
        let result = problem.check(promise, |_, x, mut y| -> lowbit_core::Result<()> {
            packed.forward(x, y.reborrow(), &mut Context::new())?;
            let mut parallel = Mat::zeros(y.as_ref().rows(), y.as_ref().cols());
            packed.forward(x, parallel.as_mut(), &mut Context::with_pool(pool.clone()))?;
            assert_eq!(parallel.as_ref(), y.as_ref(), "{kernel}: thread counts differ");
            Ok(())
        });
        if let Err(failure) = result {
            panic!("{kernel}, {:?}: {failure}", problem.layer().weight().scheme());
        }
    }
}

fn scheme() -> impl Strategy<Value = QuantScheme> {
    let granularity = prop_oneof![
        Just(Granularity::PerTensor),
        Just(Granularity::PerChannel),
        Just(Granularity::PerColumn),
        (1..70_usize).prop_map(Granularity::PerGroup),
        (1..40_usize, 1..40_usize).prop_map(|(r, c)| Granularity::PerBlock(r, c)),
    ];
    let integers = (1..=8_u8, granularity, strategies::zero_formats()).prop_map(
        |(bits, granularity, zero)| QuantScheme { zero, ..QuantScheme::affine(bits, granularity) },
    );
    let scaled = (integers, strategies::all_scale_formats(40))
        .prop_map(|(scheme, scale_format)| QuantScheme { scale_format, ..scheme });
    // With one sum, or with too many bits for that.
    let integer_scales = (1..=8_u8, 1..=7_u8, 1..70_usize, any::<bool>()).prop_map(
        |(bits, scale_bits, group_size, affine)| QuantScheme {
            zero: if affine { ZeroFormat::Int } else { ZeroFormat::Midpoint },
            scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(scale_bits)),
            ..QuantScheme::affine(bits, Granularity::PerGroup(group_size))
        },
    );
    prop_oneof![3 => scaled, 2 => strategies::level_schemes(70), 2 => integer_scales]
}

/// Those that kernels know beside weights of this scheme. At the static scale a part of the inputs
/// saturates.
fn activation(scheme: QuantScheme, k: usize) -> impl Strategy<Value = Option<ActivationScheme>> {
    use ActivationScales::{PerTensor, PerToken, PerTokenGroup, Static};
    let with = |dtype, scales| Some(ActivationScheme { dtype, scales });
    let int8 = move |scales| with(ActivationType::Int8, scales);
    let uint8 = move |scales| with(ActivationType::UInt8, scales);
    let integer_levels = crate::packed::has_integers(scheme.dtype);
    let real_zeros = matches!(scheme.zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
    // One of the two groups divides the other, or there is one of them.
    let weights = scheme.granularity.block(1, k).1;
    let group = (1..70_usize).prop_map(move |group| match group / weights {
        _ if weights >= k => group,
        0 => (1..=group).rev().find(|&d| weights.is_multiple_of(d)).unwrap_or(1),
        multiple => multiple * weights,
    });
    prop_oneof![
        3 => Just(None),
        3 => Just(Some(ActivationScheme::BF16)),
        2 => Just(int8(PerToken)),
        1 => Just(int8(PerTensor)),
        1 => Just(int8(Static { scale: 0.0002, zero_point: 0 })),
        2 => group.clone().prop_map(move |group| int8(PerTokenGroup(group))),
        2 => Just(uint8(PerToken)),
        1 => Just(uint8(PerTensor)),
        1 => any::<u8>().prop_map(move |zero_point| uint8(Static { scale: 0.0002, zero_point })),
        1 => group.prop_map(move |group| uint8(PerTokenGroup(group))),
    ]
    .prop_map(move |scheme: Option<ActivationScheme>| {
        let known = |scheme: &ActivationScheme| {
            *scheme == ActivationScheme::BF16
                || integer_levels && !(real_zeros && crate::packed::has_zeros_or_groups(*scheme))
        };
        scheme.filter(known)
    })
}

/// Schemes that kernels know beside every kind of 8-bit activations.
fn integer_scheme() -> impl Strategy<Value = QuantScheme> {
    scheme().prop_filter("levels or zeros are real", |scheme| {
        let real_zeros = matches!(scheme.zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
        crate::packed::has_integers(scheme.dtype) && !real_zeros
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(320))]

    #[test]
    fn every_kernel_computes_the_reference(
        (m, n) in (prop_oneof![2 => 0..9_usize, 1 => 9..70_usize], 0..70_usize),
        (k, scheme, activation) in (0..150_usize, scheme()).prop_flat_map(|(k, scheme)| {
            (Just(k), Just(scheme), activation(scheme, k))
        }),
        bias in any::<bool>(),
        extreme in any::<bool>(),
        seed in any::<u64>(),
    ) {
        Problem { m, n, k, scheme, activation, bias, extreme, seed }.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// At these thresholds none, a few, many or all of the inputs are outliers.
    #[test]
    fn outliers_are_added_as_the_reference_does(
        (m, n, k) in (0..5_usize, 0..70_usize, 0..90_usize),
        scheme in integer_scheme(),
        threshold in prop::sample::select(vec![1e9_f32, 0.05, 0.02, 1e-9]),
        known in prop::collection::btree_set(0..90_usize, 0..30),
        bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let activation = Some(ActivationScheme::INT8_PER_TOKEN);
        let problem = Problem { m, n, k, scheme, activation, bias, extreme: false, seed };
        let (layer, x) = (problem.layer(), problem.input());
        let dynamic = Outliers::Threshold(threshold);
        check(layer.clone().with_outliers(Some(dynamic)).unwrap(), x.clone());

        let columns: Vec<_> = known.into_iter().filter(|&j| j < k).collect();
        let w =
            Mat::from_fn(columns.len(), n, |r, c| f16::from_f32(((r * 70 + c) as f32).sin()));
        let known = Outliers::Columns(OutlierColumns::new(columns, w).unwrap());
        let layer = layer.with_outliers(Some(known)).unwrap();
        check(layer.clone(), x.clone());
        let scales = ActivationScales::PerTensor;
        let batch = ActivationScheme { scales, ..ActivationScheme::INT8_PER_TOKEN };
        check(layer.with_activation(Some(batch)), x);
    }

    /// The same bits with int8 activations, within the computed bound with f32 ones.
    #[test]
    fn every_term_of_the_layer_is_computed_as_the_reference_does(
        (m, n, k) in (0..5_usize, 0..70_usize, 0..90_usize),
        scheme in integer_scheme(),
        order in any::<[bool; 3]>(),
        per_row in 0..4_usize,
        rank in 0..4_usize,
        bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let activation = Some(ActivationScheme::INT8_PER_TOKEN);
        let problem = Problem { m, n, k, scheme, activation, bias, extreme: false, seed };
        let (layer, x) = (problem.layer(), problem.input());
        let transforms = [
            Transform::Scale((0..k).map(|j| 0.5 + (j % 5) as f32).collect()),
            Transform::Permute((0..k as u32).rev().collect()),
            Transform::hadamard(k, seed),
        ];
        let transforms = transforms.into_iter().zip(order).filter_map(|(t, used)| used.then_some(t));
        let entries = per_row.min(k) as u32;
        let values = vec![f16::from_f32(0.37); n * entries as usize];
        let columns = (0..n as u32).flat_map(|_| 0..entries).collect();
        let starts = (0..=n as u32).map(|r| r * entries).collect();
        let sparse = SparseRows::new(n, k, starts, columns, values).unwrap();
        let wave = |r, c| ((r * 31 + c) as f32).sin();
        let adapter = Adapter::new(Mat::from_fn(rank, k, wave), Mat::from_fn(n, rank, wave));
        let layer = layer
            .with_transforms(transforms.collect())
            .and_then(|layer| layer.with_outliers(Some(Outliers::Sparse(sparse))))
            .and_then(|layer| layer.with_adapter(Some(adapter.unwrap())))
            .unwrap();
        check(layer.clone(), x.clone());
        check(layer.with_activation(None), x);
    }

    /// Rule 4 of docs/numerics.md, also where weights are small beside what they are the difference of.
    #[test]
    fn f32_products_are_within_the_documented_bound(
        (m, n, k) in (1..4_usize, 1..40_usize, 1..150_usize),
        scheme in scheme(),
        family in prop::sample::select(vec![
            Family::Normal, Family::Positive, Family::Negative, Family::Constant, Family::Mixed,
        ]),
        bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (w, x) = (family.matrix(n, k, seed), family.matrix(m, k, seed ^ 1));
        let q = QMatrix::quantize(w.as_ref(), scheme);
        prop_assume!(q.is_ok());
        let bias = bias.then(|| Family::Normal.matrix(1, n, seed).data().to_vec());
        let layer = QLinear::new(q.unwrap()).with_bias(bias).unwrap();
        let mut expected = Mat::zeros(m, n);
        layer.forward(x.as_ref(), expected.as_mut(), &mut Context::new()).unwrap();
        let bound = documented_bound(&layer, &x);
        for kernel in kernels() {
            let mut y = Mat::zeros(m, n);
            let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
            packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
            for ((y, expected), bound) in y.data().iter().zip(expected.data()).zip(bound.data()) {
                let error = (f64::from(*y) - f64::from(*expected)).abs();
                prop_assert!(error <= *bound, "{} {} for {}: {}", kernel, y, expected, bound);
            }
        }
    }
}

/// `γ · (Σ_j size_j·|x_j| + |bias|)`, where size is `|scale·level| + |offset|` beside offsets and real
/// zeros, otherwise |w|.
fn documented_bound(layer: &QLinear, x: &Mat<f32>) -> Mat<f64> {
    let weight = layer.weight();
    let ((n, k), (block_rows, block_cols)) = ((weight.rows(), weight.cols()), weight.block());
    let c = (2 * k + k.div_ceil(block_cols) + 4) as f64;
    let u = 0.5_f64.powi(24);
    let gamma = c * u / (1.0 - c * u);
    let real_zeros = matches!(weight.scheme().zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
    let mut codes = vec![0; k];
    let mut sizes = Mat::zeros(n, k);
    for (i, row) in sizes.as_mut().iter_rows_mut().enumerate() {
        weight.unpack_row(i, &mut codes).unwrap();
        for (j, size) in row.iter_mut().enumerate() {
            let p = weight.params(i / block_rows, j / block_cols);
            let [scale, zero, offset] = [p.scale, p.zero, p.offset].map(f64::from);
            let level = f64::from(weight.scheme().dtype.level(codes[j]));
            *size = match real_zeros {
                true => (scale * level).abs() + (scale * zero).abs() + offset.abs(),
                false => (scale * (level - zero)).abs(),
            };
        }
    }
    Mat::from_fn(x.rows(), n, |t, i| {
        let products =
            (0..k).map(|j| sizes.data()[i * k + j] * f64::from(x.data()[t * k + j].abs()));
        let bias = layer.bias().map_or(0.0, |bias| f64::from(bias[i].abs()));
        gamma * (products.sum::<f64>() + bias)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// The bits of f32 results that are then converted.
    #[test]
    fn results_of_every_type_are_those_in_f32_rounded_once(
        (m, n) in (0..9_usize, 0..70_usize),
        (k, scheme, activation) in (0..90_usize, scheme()).prop_flat_map(|(k, scheme)| {
            (Just(k), Just(scheme), activation(scheme, k))
        }),
        bias in any::<bool>(),
        scale in prop::sample::select(vec![1e-30_f32, 1e-3, 0.02, 1.0, 1e30]),
        zero_point in any::<u8>(),
        seed in any::<u64>(),
    ) {
        let problem = Problem { m, n, k, scheme, activation, bias, extreme: false, seed };
        let (layer, x) = (problem.layer(), problem.input());
        for kernel in kernels() {
            let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
            let ctx = &mut Context::new();
            let mut y = Mat::zeros(m, n);
            packed.forward(x.as_ref(), y.as_mut(), ctx).unwrap();

            let mut halves = Mat::from_fn(m, n, |_, _| bf16::NAN);
            packed.forward_to(x.as_ref(), halves.as_mut(), ctx).unwrap();
            prop_assert!(halves.data().iter().zip(y.data()).all(|(h, &y)| *h == bf16::from_f32(y)));
            let mut halves = Mat::from_fn(m, n, |_, _| f16::NAN);
            packed.forward_to(x.as_ref(), halves.as_mut(), ctx).unwrap();
            prop_assert!(halves.data().iter().zip(y.data()).all(|(h, &y)| *h == f16::from_f32(y)));

            let (mut codes, mut expected) = (Mat::zeros(m, n), Mat::zeros(m, n));
            let to = Output::Int8 { codes: codes.as_mut(), scale };
            packed.forward_to(x.as_ref(), to, ctx).unwrap();
            encode_row_int8(y.data(), scale, expected.data_mut()).unwrap();
            prop_assert_eq!(codes, expected);

            let (mut codes, mut expected) = (Mat::zeros(m, n), Mat::zeros(m, n));
            let to = Output::UInt8 { codes: codes.as_mut(), scale, zero_point };
            packed.forward_to(x.as_ref(), to, ctx).unwrap();
            encode_row_uint8(y.data(), scale, zero_point, expected.data_mut()).unwrap();
            prop_assert_eq!(codes, expected);
        }
    }

    #[test]
    fn integers_come_out_exactly(
        (m, n, k) in (0..9_usize, 0..70_usize, 0..200_usize),
        bits in 1..=8_u8,
        zero in prop_oneof![Just(ZeroFormat::Midpoint), Just(ZeroFormat::Int)],
        per_tensor in any::<bool>(),
        unsigned in any::<bool>(),
        extreme in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let granularity = if per_tensor { Granularity::PerTensor } else { Granularity::PerChannel };
        let scheme = QuantScheme { zero, ..QuantScheme::affine(bits, granularity) };
        let dtype = if unsigned { ActivationType::UInt8 } else { ActivationType::Int8 };
        let activation = ActivationScheme { dtype, scales: ActivationScales::PerToken };
        let problem =
            Problem { m, n, k, scheme, activation: Some(activation), bias: true, extreme, seed };
        let (layer, x) = (problem.layer(), problem.input());
        let a = QActivations::quantize(x.as_ref(), activation).unwrap();
        let mut w = Mat::zeros(n, k);
        for (r, w) in w.as_mut().iter_rows_mut().enumerate() {
            layer.weight().unpack_row(r, w).unwrap();
        }
        let expected = Mat::from_fn(m, n, |r, c| {
            let w_zero = layer.weight().params(c / layer.weight().block().0, 0).zero as i32;
            let a_zero = a.params(r, 0).zero as i32;
            let pairs = w.as_ref().row(c).unwrap().iter().zip(a.row(r).unwrap());
            pairs.map(|(&w, &a)| (i32::from(w) - w_zero) * (i32::from(a) - a_zero)).sum::<i32>()
        });
        for kernel in kernels() {
            let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
            let mut y = Mat::from_fn(m, n, |_, _| -1);
            packed.forward_to(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
            prop_assert_eq!(&y, &expected, "{}", kernel);
        }
    }

    /// Codes as the layer itself would compute them give what the numbers give.
    #[test]
    fn activations_may_come_in_8_bits(
        (m, n, k) in (1..9_usize, 1..70_usize, 0..150_usize),
        scheme in integer_scheme(),
        scales in prop_oneof![
            Just(ActivationScales::PerToken),
            Just(ActivationScales::PerTensor),
            Just(ActivationScales::Static { scale: 0.0002, zero_point: 0 }),
        ],
        unsigned in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let dtype = if unsigned { ActivationType::UInt8 } else { ActivationType::Int8 };
        let activation = ActivationScheme { dtype, scales };
        let problem = Problem {
            m, n, k, scheme, activation: Some(activation), bias: true, extreme: false, seed,
        };
        let (layer, x) = (problem.layer(), problem.input());
        let a = QActivations::quantize(x.as_ref(), activation).unwrap();
        let rows = if matches!(scales, ActivationScales::PerToken) { m } else { 1 };
        // Without features there is no group, and any scale will do.
        let params: Vec<_> = (0..rows).map(|r| a.params(r, 0)).collect();
        let scale_of = |r: usize| if k == 0 { 1.0 } else { params[r].scale };
        let scales: Vec<_> = (0..rows).map(scale_of).collect();
        let zero_points: Vec<_> = params.iter().map(|params| params.zero as u8).collect();
        let code = |r, c: usize| a.row(r).map_or(0, |row| row[c]);
        for kernel in kernels() {
            let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
            let ctx = &mut Context::new();
            let (mut expected, mut y) = (Mat::zeros(m, n), Mat::zeros(m, n));
            packed.forward(x.as_ref(), expected.as_mut(), ctx).unwrap();
            if unsigned {
                let codes = Mat::from_fn(m, k, |r, c| code(r, c) as u8);
                let (scales, zero_points) = (&scales[..], &zero_points[..]);
                let x = Input::UInt8 { codes: codes.as_ref(), scales, zero_points };
                packed.forward_to(x, y.as_mut(), ctx).unwrap();
            } else {
                let codes = Mat::from_fn(m, k, |r, c| code(r, c) as i8);
                let x = Input::Int8 { codes: codes.as_ref(), scales: &scales };
                packed.forward_to(x, y.as_mut(), ctx).unwrap();
            }
            prop_assert_eq!(&y, &expected, "{}", kernel);
        }
    }
}

#[test]
fn nan_becomes_real_zero_in_codes() {
    let w = Mat::new(vec![1.0, 1.0], 1, 2).unwrap();
    let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel));
    let packed = PackedLinear::new(&QLinear::new(q.unwrap())).unwrap();
    let x =
        Mat::new(vec![f32::NAN, 0.0, f32::INFINITY, 0.0, f32::NEG_INFINITY, 0.0], 3, 2).unwrap();
    let mut codes = Mat::zeros(3, 1);
    let ctx = &mut Context::new();
    let y = Output::Int8 { codes: codes.as_mut(), scale: 1.0 };
    packed.forward_to(x.as_ref(), y, ctx).unwrap();
    assert_eq!(codes.data(), [0, 127, -127]);
    let mut codes = Mat::zeros(3, 1);
    let y = Output::UInt8 { codes: codes.as_mut(), scale: 1.0, zero_point: 7 };
    packed.forward_to(x.as_ref(), y, ctx).unwrap();
    assert_eq!(codes.data(), [7, 255, 0]);
}

#[test]
fn operands_of_other_types_that_do_not_fit_are_errors_and_nothing_is_written() {
    let scheme = QuantScheme::symmetric(8, Granularity::PerChannel);
    let activation = Some(ActivationScheme::INT8_PER_TOKEN);
    let problem =
        Problem { m: 2, n: 3, k: 4, scheme, activation, bias: true, extreme: false, seed: 1 };
    let (layer, x) = (problem.layer(), problem.input());
    let ctx = &mut Context::new();
    let mut y = Mat::from_fn(2, 3, |_, _| 5.0);
    let mut sums = Mat::from_fn(2, 3, |_, _| 5);
    let mut halves = Mat::from_fn(2, 3, |_, _| f16::ONE);
    let codes = Mat::from_fn(2, 4, |r, c| if (r, c) == (1, 2) { -128 } else { 1_i8 });
    let bytes = Mat::from_fn(2, 4, |_, _| 1_u8);

    let packed = PackedLinear::new(&layer).unwrap();
    let int8 = |scales| Input::Int8 { codes: codes.as_ref(), scales };
    let length = packed.forward_to(int8(&[1.0; 3]), y.as_mut(), ctx);
    assert_eq!(length, Err(Error::Length { what: "activation scales", expected: 2, got: 3 }));
    let nan = packed.forward_to(int8(&[1.0, f32::NAN]), y.as_mut(), ctx);
    assert!(matches!(nan, Err(Error::Parameter { .. })));
    let lowest = packed.forward_to(int8(&[1.0]), y.as_mut(), ctx);
    assert!(matches!(lowest, Err(Error::OutOfRange { got: -128, .. })));
    let uint8 = Input::UInt8 { codes: bytes.as_ref(), scales: &[1.0], zero_points: &[0] };
    let other = packed.forward_to(uint8, y.as_mut(), ctx);
    assert!(matches!(other, Err(Error::Unsupported { .. })));
    let mut to = Mat::zeros(2, 3);
    let scale = Output::Int8 { codes: to.as_mut(), scale: 0.0 };
    let scale = packed.forward_to(x.as_ref(), scale, ctx);
    assert!(matches!(scale, Err(Error::Parameter { .. })));
    let shape = packed.forward_to(x.as_ref(), Mat::<f16>::zeros(3, 2).as_mut(), ctx);
    assert_eq!(shape, Err(Error::Shape { what: "output", expected: (2, 3), got: (3, 2) }));

    let plain = PackedLinear::new(&layer.clone().with_activation(None)).unwrap();
    let groups = PackedLinear::new(
        &Problem { scheme: QuantScheme::symmetric(8, Granularity::PerGroup(2)), ..problem }.layer(),
    );
    let outliers = layer.with_outliers(Some(Outliers::Threshold(6.0))).unwrap();
    let outliers = PackedLinear::new(&outliers).unwrap();
    for result in [
        plain.forward_to(x.as_ref(), sums.as_mut(), ctx),
        plain.forward_to(int8(&[1.0]), y.as_mut(), ctx),
        groups.unwrap().forward_to(x.as_ref(), sums.as_mut(), ctx),
        outliers.forward_to(x.as_ref(), halves.as_mut(), ctx),
        outliers.forward_to(int8(&[1.0]), y.as_mut(), ctx),
    ] {
        assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
    }
    assert!(y.data().iter().all(|&y| y == 5.0));
    assert!(sums.data().iter().all(|&y| y == 5));
    assert!(halves.data().iter().all(|&y| y == f16::ONE));
}

#[test]
fn without_outliers_the_layer_is_the_plain_int8_one() {
    let scheme = QuantScheme::symmetric(8, Granularity::PerChannel);
    let activation = Some(ActivationScheme::INT8_PER_TOKEN);
    let problem =
        Problem { m: 3, n: 40, k: 64, scheme, activation, bias: true, extreme: false, seed: 5 };
    let (layer, x) = (problem.layer(), problem.input());
    let forward = |layer: &QLinear| {
        let mut y = Mat::zeros(3, 40);
        PackedLinear::new(layer)
            .unwrap()
            .forward(x.as_ref(), y.as_mut(), &mut Context::new())
            .unwrap();
        y
    };
    let plain = forward(&layer);
    let far = layer.clone().with_outliers(Some(Outliers::Threshold(6.0))).unwrap();
    assert_eq!(forward(&far), plain);
    let near = layer.with_outliers(Some(Outliers::Threshold(0.02))).unwrap();
    assert_ne!(forward(&near), plain);
}

/// GGUF's scales may be negative, and a restricted range leaves out a code.
#[test]
fn layers_of_other_systems_are_computed_too() {
    let groups = Granularity::PerGroup(32);
    for (scheme, fit) in [
        presets::gguf_q4_0(),
        presets::gguf_q5_0(),
        presets::gguf_q8_0(),
        presets::gptq(3, groups),
        presets::awq_sym(4, groups),
        presets::compressed_tensors(8, groups),
        presets::bitsandbytes_int8(),
    ] {
        let w = Family::Normal.matrix(37, 70, 1);
        let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
        for activation in [None, Some(ActivationScheme::INT8_PER_TOKEN)] {
            let layer = QLinear::new(q.clone()).with_activation(activation);
            check(layer, Family::Normal.matrix(13, 70, 2));
        }
    }
}

#[test]
fn what_no_kernel_computes_yet_is_an_error_when_it_is_packed() {
    let w = Family::Normal.matrix(4, 8, 1);
    let quantize = |scheme| QLinear::new(QMatrix::quantize(w.as_ref(), scheme).unwrap());
    let plain = quantize(QuantScheme::symmetric(8, Granularity::PerChannel));
    let fp8 = quantize(presets::fp8(Format::F8E4M3, Granularity::PerChannel).0)
        .with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let with =
        |dtype, scales| plain.clone().with_activation(Some(ActivationScheme { dtype, scales }));
    let outliers = |layer: QLinear| layer.with_outliers(Some(Outliers::Threshold(6.0))).unwrap();
    for layer in [
        fp8,
        with(ActivationType::Int16, ActivationScales::PerToken),
        quantize(QuantScheme::symmetric(8, Granularity::PerGroup(4))).with_activation(Some(
            ActivationScheme {
                dtype: ActivationType::Int8,
                scales: ActivationScales::PerTokenGroup(6),
            },
        )),
        outliers(plain.clone()),
        outliers(with(ActivationType::Int8, ActivationScales::PerTensor)),
    ] {
        let error = PackedLinear::new(&layer).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    let bad = ActivationScales::Static { scale: f32::NAN, zero_point: 0 };
    let error = PackedLinear::new(&with(ActivationType::Int8, bad)).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
}

#[test]
fn what_has_broken_other_kernels_does_not_break_ours() {
    for problem in LinearProblem::adversarial() {
        let x = problem.x();
        let x = Mat::from_fn(x.rows(), x.cols(), |r, c| x.get(r, c).copied().unwrap_or_default());
        check(problem.layer().clone(), x);
    }
}

#[test]
fn every_kernel_is_right_around_the_edges_of_tiles_and_steps() {
    for bits in [3, 4, 5, 8] {
        for activation in [None, Some(ActivationScheme::INT8_PER_TOKEN)] {
            for (m, n, k) in [
                (1, 1, 1),
                (3, 31, 7),
                (4, 32, 8),
                (5, 33, 9),
                (8, 64, 64),
                (65, 65, 127),
                (129, 40, 24),
            ] {
                let scheme = QuantScheme::affine(bits, Granularity::PerGroup(32));
                Problem { m, n, k, scheme, activation, bias: true, extreme: false, seed: 7 }
                    .check();
            }
        }
    }
}

fn uint8_per_group(group_size: usize) -> ActivationScheme {
    let scales = ActivationScales::PerTokenGroup(group_size);
    ActivationScheme { dtype: ActivationType::UInt8, scales }
}

/// Tiles of AMX are 16 rows by 64 features, and 1024 features of nibbles are widened at a time.
#[test]
fn every_kernel_is_right_around_the_edges_of_blocks_and_groups() {
    for bits in [4, 8] {
        for (m, n, k, group_size) in [
            (7, 32, 64, 64),
            (8, 33, 128, 64),
            (9, 1, 60, 60),
            (15, 32, 65, 32),
            (16, 64, 192, 96),
            (17, 31, 200, 100),
            (31, 32, 260, 128),
            (32, 40, 1024, 512),
            (33, 32, 1100, 1100),
            (40, 32, 2113, 2113),
            (47, 96, 63, 20),
            (65, 32, 3200, 1600),
            (300, 70, 68, 36),
        ] {
            let scheme = QuantScheme::affine(bits, Granularity::PerGroup(group_size));
            for (activation, extreme) in [
                (ActivationScheme::INT8_PER_TOKEN, false),
                (ActivationScheme::INT8_PER_TOKEN, true),
                (uint8_per_group(group_size), false),
                (uint8_per_group(group_size), true),
            ] {
                let activation = Some(activation);
                Problem { m, n, k, scheme, activation, bias: true, extreme, seed: 11 }.check();
            }
        }
    }
}

/// 255·127 + 255·127 = 64770 does not fit the i16 that `vpmaddubsw` saturates to.
#[test]
fn no_intermediate_saturates() {
    for bits in [4, 7, 8] {
        for zero in [ZeroFormat::Int, ZeroFormat::Midpoint] {
            for (k, dtype) in [64, 4096]
                .into_iter()
                .flat_map(|k| [(k, ActivationType::Int8), (k, ActivationType::UInt8)])
            {
                let scheme =
                    QuantScheme { zero, ..QuantScheme::affine(bits, Granularity::PerChannel) };
                let scales = ActivationScales::PerToken;
                let activation = Some(ActivationScheme { dtype, scales });
                let (bias, extreme) = (false, true);
                Problem { m: 10, n: 33, k, scheme, activation, bias, extreme, seed: 1 }.check();
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let affine = QuantScheme::affine(4, Granularity::PerGroup(24));
    let int8 = Some(ActivationScheme::INT8_PER_TOKEN);
    let integer_scales = ScaleFormat::TwoLevel(TwoLevel::integer(3));
    for (scheme, activation) in [
        (affine, None),
        (affine, int8),
        (QuantScheme { scale_format: integer_scales, ..affine }, int8),
        (affine, Some(ActivationScheme::BF16)),
        (QuantScheme { scale_format: integer_scales, ..affine }, Some(ActivationScheme::BF16)),
        (presets::fp8(Format::F8E4M3, Granularity::PerChannel).0, Some(ActivationScheme::BF16)),
    ] {
        let problem = Problem {
            m: 71,
            n: 50,
            k: 100,
            scheme,
            activation,
            bias: true,
            extreme: false,
            seed: 3,
        };
        let (layer, x) = (problem.layer(), problem.input());
        for kernel in kernels() {
            let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
            let mut batch = Mat::zeros(71, 50);
            packed.forward(x.as_ref(), batch.as_mut(), &mut Context::new()).unwrap();
            for r in 0..71 {
                let mut alone = Mat::zeros(1, 50);
                let row = x.as_ref().sub_rows(r..r + 1).unwrap();
                packed.forward(row, alone.as_mut(), &mut Context::new()).unwrap();
                assert_eq!(Some(alone.data()), batch.as_ref().row(r), "{kernel}, row {r}");
            }
        }
    }
}

/// More rows than are packed at a time, whose last panel is not full.
#[test]
fn a_layer_that_is_used_once_gives_the_same_bits() {
    let (n, k) = (2 * 1024 + 35, 48);
    for (scheme, _) in [
        presets::gptq(4, Granularity::PerGroup(16)),
        presets::nvfp4(),
        presets::fp8(Format::F8E4M3, Granularity::PerBlock(128, 32)),
    ] {
        for activation in [None, Some(ActivationScheme::INT8_PER_TOKEN)] {
            if activation.is_some() && !crate::packed::has_integers(scheme.dtype) {
                continue;
            }
            let problem =
                Problem { m: 3, n, k, scheme, activation, bias: true, extreme: false, seed: 2 };
            let (layer, x) = (problem.layer(), problem.input());
            let layers = [
                layer.clone(),
                match activation {
                    None => layer,
                    Some(_) => layer.with_outliers(Some(Outliers::Threshold(0.02))).unwrap(),
                },
            ];
            for layer in layers {
                let (mut kept, mut once) = (Mat::zeros(3, n), Mat::zeros(3, n));
                let ctx = &mut Context::new();
                PackedLinear::new(&layer)
                    .and_then(|packed| packed.forward(x.as_ref(), kept.as_mut(), ctx))
                    .unwrap();
                PackedLinear::multiply_once(&layer, x.as_ref(), once.as_mut(), ctx).unwrap();
                assert_eq!(once, kept);
            }
        }
    }
}

#[test]
fn weights_of_nan_are_refused_wherever_they_are() {
    let (n, k) = (2000, 4);
    let w = Mat::from_fn(n, k, |_, _| 1.0);
    let (scheme, fit) = presets::fp8(Format::F8E4M3, Granularity::PerTensor);
    let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
    let mut codes = q.codes().to_vec();
    codes[1999 * k + 2] = 0x7f;
    let q = QMatrix::from_parts(n, k, scheme, codes, q.scales().to_vec(), None).unwrap();
    let expected = Err(Error::NotFinite { what: "weight", row: 1999, col: 2 });
    let (x, mut y) = (Mat::zeros(1, k), Mat::from_fn(1, n, |_, _| 5.0));
    let layer = QLinear::new(q);
    assert_eq!(PackedLinear::new(&layer).map(drop), expected);
    let result = PackedLinear::multiply_once(&layer, x.as_ref(), y.as_mut(), &mut Context::new());
    assert_eq!(result, expected);
    assert!(y.data().iter().all(|y| *y == 5.0));
}

#[test]
fn strided_rows_are_read_and_written_in_place() {
    let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(16));
    let problem = Problem {
        m: 5,
        n: 40,
        k: 48,
        scheme,
        activation: None,
        bias: true,
        extreme: false,
        seed: 9,
    };
    let (layer, x) = (problem.layer(), problem.input());
    let packed = PackedLinear::new(&layer).unwrap();
    let mut dense = Mat::zeros(5, 40);
    packed.forward(x.as_ref(), dense.as_mut(), &mut Context::new()).unwrap();

    let wide = Mat::from_fn(5, 60, |r, c| if c < 48 { x.data()[r * 48 + c] } else { f32::NAN });
    let x = lowbit_core::MatRef::with_row_stride(wide.data(), 5, 48, 60).unwrap();
    let mut y = vec![-1.0; 5 * 44];
    let view = lowbit_core::MatMut::with_row_stride(&mut y, 5, 40, 44).unwrap();
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
    packed.forward(x, view, &mut Context::with_pool(pool)).unwrap();
    for (row, expected) in y.chunks(44).zip(dense.as_ref().iter_rows()) {
        assert_eq!(&row[..40], expected);
        assert_eq!(row[40..], [-1.0; 4]);
    }
}

#[test]
fn bad_operands_are_errors_and_nothing_is_written() {
    let scheme = QuantScheme::symmetric(8, Granularity::PerChannel);
    let activation = Some(ActivationScheme::INT8_PER_TOKEN);
    let problem =
        Problem { m: 3, n: 4, k: 6, scheme, activation, bias: false, extreme: false, seed: 1 };
    let packed = PackedLinear::new(&problem.layer()).unwrap();
    let mut x = problem.input();
    x.data_mut()[2 * 6 + 5] = f32::INFINITY;
    let mut y = Mat::from_fn(3, 4, |_, _| 5.0);
    assert_eq!(
        packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()),
        Err(Error::NotFinite { what: "activation", row: 2, col: 5 })
    );
    let narrow = Mat::zeros(3, 5);
    assert_eq!(
        packed.forward(narrow.as_ref(), y.as_mut(), &mut Context::new()),
        Err(Error::Shape { what: "input", expected: (3, 6), got: (3, 5) })
    );
    let mut short = Mat::zeros(2, 4);
    assert!(packed.forward(x.as_ref(), short.as_mut(), &mut Context::new()).is_err());
    assert!(y.data().iter().all(|&y| y == 5.0));
}

#[test]
fn a_kernel_that_is_not_there_is_an_error_that_lists_those_that_are() {
    let scheme = QuantScheme::symmetric(8, Granularity::PerChannel);
    let problem = Problem {
        m: 1,
        n: 1,
        k: 1,
        scheme,
        activation: None,
        bias: false,
        extreme: false,
        seed: 1,
    };
    let error = PackedLinear::with_kernel(&problem.layer(), "abacus").unwrap_err().to_string();
    assert!(error.contains("abacus") && error.contains("scalar"), "{error}");
}

/// The longest groups: `(2^31 − 1) / (255·128)` and `(2^31 − 1) / (255·255)`.
const LONGEST: [(ActivationType, usize); 2] =
    [(ActivationType::Int8, 65_793), (ActivationType::UInt8, 33_025)];

fn long_layer(k: usize, dtype: ActivationType) -> QLinear {
    let w = Mat::from_fn(2, k, |_, _| 1.0);
    let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(8, Granularity::PerChannel)).unwrap();
    assert_eq!((q.codes()[0], q.params(0, 0).zero), (255, 0.0));
    let scales = ActivationScales::PerToken;
    QLinear::new(q).with_activation(Some(ActivationScheme { dtype, scales }))
}

#[test]
fn a_group_whose_integer_sum_might_overflow_is_refused() {
    for (dtype, longest) in LONGEST {
        let layer = long_layer(longest + 1, dtype);
        assert!(PackedLinear::new(&layer.clone().with_activation(None)).is_ok());
        let error = PackedLinear::new(&layer).unwrap_err().to_string();
        for number in [longest, longest + 1] {
            assert!(error.contains(&number.to_string()), "{error}");
        }
    }
}

/// All codes 255, zero 0, activations at the end of their range: the largest integer sums there are.
#[test]
fn the_longest_group_does_not_overflow() {
    for (dtype, longest) in LONGEST {
        let x = Mat::from_fn(8, longest, |r, _| if r == 0 { 1.0 } else { -1.0 });
        check(long_layer(longest, dtype), x);
    }
}

/// A row of k weights of −8 and scales of 15, whose products are −120.
fn long_row_of_integer_scales(k: usize, dtype: ActivationType) -> QLinear {
    let scheme = QuantScheme {
        scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(4)),
        ..QuantScheme::symmetric(4, Granularity::PerGroup(32))
    };
    let codes = vec![0; k.div_ceil(2)];
    let mut scales = vec![0xff; k.div_ceil(32).div_ceil(2)];
    scales.extend(1.0_f32.to_le_bytes()); // the step
    let activation = ActivationScheme { dtype, scales: ActivationScales::PerToken };
    let q = QMatrix::from_parts(1, k, scheme, codes, scales, None).unwrap();
    assert_eq!(q.dequantize().data()[k - 1], -120.0);
    QLinear::new(q).with_activation(Some(activation))
}

#[test]
fn a_sum_over_all_groups_does_not_overflow_or_is_refused() {
    for (dtype, longest) in [(ActivationType::Int8, 131_071), (ActivationType::UInt8, 65_793)] {
        let layer = long_row_of_integer_scales(longest, dtype);
        assert!(layer.weight().scheme().has_integer_scales());
        check(layer, Mat::from_fn(8, longest, |r, _| if r == 0 { 1.0 } else { -1.0 }));
        let error = PackedLinear::new(&long_row_of_integer_scales(longest + 1, dtype)).unwrap_err();
        assert!(error.to_string().contains(&longest.to_string()), "{error}");
    }
}

#[test]
fn sums_of_integer_scales_are_not_given_out_as_integers() {
    let packed = PackedLinear::new(&long_row_of_integer_scales(32, ActivationType::Int8)).unwrap();
    let (x, mut y) = (Mat::zeros(1, 32), Mat::from_fn(1, 1, |_, _| 7));
    let result = packed.forward_to(x.as_ref(), y.as_mut(), &mut Context::new());
    assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
    assert_eq!(y.data(), [7]);
}

#[test]
fn weights_in_floats_without_a_sign_are_refused() {
    let e8m0 = QuantType::Float(Format::F8E8M0);
    let scheme = QuantScheme::levels(e8m0, Granularity::PerChannel);
    let w = Mat::from_fn(3, 40, |_, c| c as f32);
    let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme).unwrap());
    for activation in [None, Some(ActivationScheme::BF16)] {
        let error = PackedLinear::new(&layer.clone().with_activation(activation)).unwrap_err();
        assert!(error.to_string().contains("exponent_bits: 8"), "{error}");
    }
}

/// Whole or not, in 1 to 4 bits: one table of bytes is enough, and the products are exact.
#[test]
fn levels_that_fit_a_byte_in_a_common_unit_are_looked_up_as_bytes() {
    let tables: [&[f32]; 6] = [
        &[-1.0, 1.0],
        &[-1.0, 0.0, 1.0, 2.0],
        &[-0.75, 0.0, 0.75, 1.5],
        &[-300.0, 0.0, 300.0, 600.0],
        &[-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0, 16.0],
        &[-0.875, 1.0, 0.5, 0.25, 0.125, -0.5, -0.25, 31.0],
    ];
    let byte_tables = |dtype| match crate::panel::Meaning::of(dtype) {
        Some(crate::panel::Meaning::Table(table)) => 1 + usize::from(table.high.is_some()),
        _ => 0,
    };
    assert_eq!(byte_tables(QuantType::NF4), 2);
    use ActivationType::{Int8, UInt8};
    for (levels, dtype) in tables.into_iter().flat_map(|t| [(t, Int8), (t, UInt8)]) {
        let table = QuantType::Table(Levels::new(levels).unwrap());
        assert_eq!(byte_tables(table), 1, "{levels:?}");
        let (n, k) = (37, 150);
        let code = |i: usize, j: usize| (i * 7 + j * j) % levels.len();
        let codes: Vec<u8> = (0..n * k).map(|at| code(at / k, at % k) as u8).collect();
        let scheme = QuantScheme::levels(table, Granularity::PerChannel);
        let one = lowbit_core::Params { scale: 0.5, ..Default::default() };
        let params = lowbit_core::BlockParams::round(scheme, n, k, &vec![one; n]).unwrap();
        let weight = QMatrix::from_codes(&params, &codes).unwrap();
        let scales = ActivationScales::Static { scale: 1.0, zero_point: 0 };
        let layer = QLinear::new(weight).with_activation(Some(ActivationScheme { dtype, scales }));
        for m in [1, 3, 40] {
            let x = Mat::from_fn(m, k, |t, j| ((t * 5 + j * 3) % 120) as f32);
            check(layer.clone(), x.clone());
            let mut y = Mat::zeros(m, n);
            let packed = PackedLinear::new(&layer).unwrap();
            packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
            let expected = Mat::from_fn(m, n, |t, i| {
                (0..k).map(|j| levels[code(i, j)] * 0.5 * x.data()[t * k + j]).sum()
            });
            assert_eq!(y, expected, "{levels:?}");
        }
    }
}

/// Its bits if it is a number; NaN is NaN.
fn class(y: f32) -> Option<u32> {
    (!y.is_nan()).then_some(y.to_bits())
}

#[test]
fn an_infinite_input_is_multiplied_as_the_weights_say() {
    let zeros = [
        ZeroFormat::Midpoint,
        ZeroFormat::Int,
        ZeroFormat::Real(ScaleFormat::F32),
        ZeroFormat::Real(ScaleFormat::F16),
        ZeroFormat::Offset(ScaleFormat::F16),
        ZeroFormat::Offset(ScaleFormat::TwoLevel(TwoLevel::BILEVEL4)),
    ];
    for (i, zero) in zeros.into_iter().enumerate() {
        for (bits, group) in [(1, 40), (2, 32), (3, 40), (4, 5), (5, 64), (6, 16), (8, 150)] {
            let scheme =
                QuantScheme { zero, ..QuantScheme::affine(bits, Granularity::PerGroup(group)) };
            for m in [1, 20] {
                let seed = (i * m) as u64;
                let (activation, bias, extreme) = (None, true, false);
                let problem = Problem { m, n: 40, k: 150, scheme, activation, bias, extreme, seed };
                let (layer, mut x) = (problem.layer(), problem.input());
                for row in 0..m {
                    let at = row * 150 + (row * 37 + group) % 150;
                    x.data_mut()[at] = [f32::INFINITY, f32::NEG_INFINITY, 1.0, f32::NAN][row % 4];
                }
                let mut expected = Mat::zeros(m, 40);
                layer.forward(x.as_ref(), expected.as_mut(), &mut Context::new()).unwrap();
                assert!(bits == 1 || expected.data().iter().any(|y| y.is_infinite()));
                for kernel in kernels() {
                    let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
                    let mut y = Mat::zeros(m, 40);
                    packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
                    for (at, (y, expected)) in y.data().iter().zip(expected.data()).enumerate() {
                        let same = class(*y) == class(*expected);
                        assert!(same || expected.is_finite(), "{kernel} {scheme:?} {at}");
                    }
                }
            }
        }
    }
}

#[test]
fn matrices_without_elements_cost_nothing_however_long_they_are() {
    let table = QuantType::Table(Levels::new(&[-1.0, 1.0]).unwrap());
    let integer_scales = QuantScheme {
        scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(3)),
        ..QuantScheme::symmetric(4, Granularity::PerGroup(32))
    };
    let schemes = [
        QuantScheme::affine(4, Granularity::PerGroup(32)),
        QuantScheme::levels(QuantType::Float(Format::F8E4M3), Granularity::PerGroup(32)),
        QuantScheme::levels(table, Granularity::PerBlock(8, 8)),
        presets::nvfp4().0,
        integer_scales,
    ];
    let uint8 =
        ActivationScheme { dtype: ActivationType::UInt8, scales: ActivationScales::PerToken };
    for scheme in schemes {
        for (rows, cols) in [(1 << 50, 0), (0, 1 << 50), (0, 0)] {
            let zeros = scheme.zero == ZeroFormat::Int;
            let scales = vec![0; scheme.bytes(rows, cols).unwrap()];
            let weight =
                QMatrix::from_parts(rows, cols, scheme, vec![], scales, zeros.then(Vec::new));
            let layer = QLinear::new(weight.unwrap());
            for activation in [None, Some(ActivationScheme::BF16), Some(uint8)] {
                let layer = layer.clone().with_activation(activation);
                let (x, mut y) = (Mat::zeros(0, cols), Mat::zeros(0, rows));
                for kernel in kernels() {
                    // FP8 has no kernel beside uint8, and no sum of 2^50 is sure not to overflow.
                    if let Ok(packed) = PackedLinear::with_kernel(&layer, kernel) {
                        packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
                    }
                }
                let _ = PackedLinear::multiply_once(
                    &layer,
                    x.as_ref(),
                    y.as_mut(),
                    &mut Context::new(),
                );
            }
        }
    }
}

#[test]
fn levels_beyond_bfloat16_saturate() {
    let table = Levels::new(&[3.4e38, 1.0, -1.0, 0.0]).unwrap();
    let scheme = QuantScheme {
        scale_format: ScaleFormat::F32,
        ..QuantScheme::levels(QuantType::Table(table), Granularity::PerChannel)
    };
    let scale = 1e-38_f32.to_le_bytes().to_vec();
    let q = QMatrix::from_parts(1, 5, scheme, vec![0b1110_0100, 0], scale, None).unwrap();
    let layer = QLinear::new(q).with_activation(Some(ActivationScheme::BF16));
    for x in [0.0, 0.01] {
        check(layer.clone(), Mat::from_fn(1, 5, |_, _| x));
    }
}

/// A negative step and activations of 0: sums of 0 that might be −0.
#[test]
fn a_sum_of_nothing_is_not_negative() {
    let scheme = QuantScheme {
        scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(4)),
        ..QuantScheme::symmetric(4, Granularity::PerGroup(16))
    };
    for step in [-1.0_f32, 0.0] {
        let mut scales = vec![0x11];
        scales.extend(step.to_le_bytes());
        let q = QMatrix::from_parts(1, 32, scheme, vec![0; 16], scales, None).unwrap();
        let int8 = QLinear::new(q).with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
        check(int8.clone(), Mat::zeros(2, 32));
        check(int8, Mat::from_fn(2, 32, |_, _| 1.0));
    }
}

/// Prints what a run has covered (with `--nocapture`) and fails if a kernel that
/// `LOWBIT_TEST_KERNELS` names is not among it.
#[test]
fn the_kernels_that_must_be_covered_are() {
    let covered: Vec<_> = kernels().collect();
    println!("kernels covered: {}", covered.join(", "));
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if covered.contains(&"amx_int8") && crate::isa::amx_emulator::is_used() {
        println!("amx_int8 on emulated instructions: this CPU has none");
    }
    let required = std::env::var("LOWBIT_TEST_KERNELS").unwrap_or_default();
    for name in required.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        assert!(covered.contains(&name), "{name} must be covered, and is not: {covered:?}");
    }
    assert!(covered.contains(&"scalar"));
}

#[test]
fn matrices_without_elements_are_multiplied_too() {
    for (m, n, k) in [(0, 0, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)] {
        for granularity in
            [Granularity::PerTensor, Granularity::PerColumn, Granularity::PerGroup(8)]
        {
            for activation in [None, Some(ActivationScheme::INT8_PER_TOKEN)] {
                let scheme = QuantScheme::affine(4, granularity);
                Problem { m, n, k, scheme, activation, bias: true, extreme: false, seed: 1 }
                    .check();
            }
        }
    }
}
