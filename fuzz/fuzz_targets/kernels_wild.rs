//! Every kind of layer by every kernel, packing included: the bits of the reference with integer activations,
//! within the computed bound with floats, and the same errors.
#![no_main]

use libfuzzer_sys::{
    arbitrary::{Result, Unstructured},
    fuzz_target,
};
use lowbit::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Base, Context, Granularity,
    Levels, Linear, Mat, OutlierColumns, Outliers, PackedLinear, QLinear, QMatrix, QuantScheme,
    QuantType, ScaleFormat, SparseRows, StepFormat, Transform, TwoLevel, ZeroFormat,
    dtypes::{Format, Specials, f16},
    kernels,
    testing::bounds,
};

fn granularity(u: &mut Unstructured<'_>) -> Result<Granularity> {
    let size = |u: &mut Unstructured<'_>| u.int_in_range(1..=70_usize);
    Ok(match u.int_in_range(0..=5)? {
        0 => Granularity::PerTensor,
        1 => Granularity::PerChannel,
        2 => Granularity::PerColumn,
        3 => Granularity::PerBlock(size(u)?, size(u)?),
        _ => Granularity::PerGroup(size(u)?),
    })
}

fn dtype(u: &mut Unstructured<'_>) -> Result<QuantType> {
    let float = |u: &mut Unstructured<'_>| -> Result<_> {
        let specials = [
            Specials::None,
            Specials::Ieee,
            Specials::NanOnly,
            Specials::NanIsNegativeZero,
            Specials::Scale,
        ];
        let (exponent, fraction) = (u.int_in_range(1..=8)?, u.int_in_range(0..=7)?);
        let format =
            Format::new(exponent, fraction, u.int_in_range(-8..=140)?, *u.choose(&specials)?);
        Ok(format.map_or(QuantType::NF4, QuantType::Float))
    };
    Ok(match u.int_in_range(0..=4)? {
        0 => {
            let count = 2 << u.int_in_range(0..=3)?;
            let level = |_| u.arbitrary::<i16>().map_or(1.0, |x| f32::from(x) / 8.0);
            let levels: Vec<f32> = (0..count).map(level).collect();
            Levels::new(&levels).map_or(QuantType::IQ4_NL, QuantType::Table)
        }
        1 => float(u)?,
        _ => QuantType::Int { bits: u.int_in_range(1..=8)? },
    })
}

fn scale_format(u: &mut Unstructured<'_>, two_levels: bool) -> Result<ScaleFormat> {
    let step = |u: &mut Unstructured<'_>| {
        u.choose(&[StepFormat::F32, StepFormat::F16, StepFormat::Bf16]).copied()
    };
    Ok(match u.int_in_range(0..=if two_levels { 5 } else { 3 })? {
        0 => ScaleFormat::F32,
        1 => ScaleFormat::F16,
        2 => ScaleFormat::Bf16,
        3 => ScaleFormat::E8m0,
        _ => {
            let dtype = dtype(u)?;
            let bases = [Base::Zero, Base::Midpoint, Base::Minimum];
            let base = match dtype {
                QuantType::Int { .. } => *u.choose(&bases)?,
                _ => Base::Zero,
            };
            let (granularity, format) = (granularity(u)?, step(u)?);
            ScaleFormat::TwoLevel(TwoLevel { dtype, granularity, base, format })
        }
    })
}

fn scheme(u: &mut Unstructured<'_>) -> Result<QuantScheme> {
    let (dtype, granularity) = (dtype(u)?, granularity(u)?);
    let zero = match (dtype, u.int_in_range(0..=4)?) {
        (QuantType::Int { .. }, 0) => ZeroFormat::Midpoint,
        (QuantType::Int { .. }, 1) => ZeroFormat::Int,
        (QuantType::Int { .. }, 2) => ZeroFormat::Real(scale_format(u, true)?),
        (QuantType::Int { .. }, 3) => ZeroFormat::Offset(scale_format(u, true)?),
        _ => ZeroFormat::None,
    };
    Ok(QuantScheme { dtype, granularity, zero, scale_format: scale_format(u, true)? })
}

/// Mostly of a moderate size, some of any.
fn number(u: &mut Unstructured<'_>) -> f32 {
    match u.arbitrary::<u8>() {
        Ok(0) => u.arbitrary().unwrap_or(0.0),
        Ok(x) => (f32::from(x) - 128.0) / 16.0,
        Err(_) => 1.0,
    }
}

fn matrix(u: &mut Unstructured<'_>, rows: usize, cols: usize) -> Mat<f32> {
    Mat::from_fn(rows, cols, |_, _| number(u))
}

/// Quantized, or of any bytes.
fn weight(u: &mut Unstructured<'_>, n: usize, k: usize) -> Result<Option<QMatrix>> {
    let scheme = scheme(u)?;
    let any_bytes = u.arbitrary()?;
    let w = if any_bytes { Mat::from_fn(n, k, |_, _| 1.0) } else { matrix(u, n, k) };
    let Ok(q) = QMatrix::quantize(w.as_ref(), scheme) else { return Ok(None) };
    if !any_bytes {
        return Ok(Some(q));
    }
    let mut bytes = |len: usize| {
        let seed = u.arbitrary::<u64>().unwrap_or(1);
        let byte = |i: usize| lowbit::dtypes::random(seed, i as u64) as u8;
        // Scales of moderate size where the exponent is spared.
        (0..len).map(byte).collect::<Vec<u8>>()
    };
    let (codes, scales) = (bytes(q.codes().len()), bytes(q.scales().len()));
    let scales = if u.arbitrary()? { scales } else { q.scales().to_vec() };
    let mut bytes = |len: usize| vec![u.arbitrary::<u8>().unwrap_or(0); len];
    let zeros = q.zeros().map(|zeros| bytes(zeros.len()));
    Ok(QMatrix::from_parts(n, k, scheme, codes, scales, zeros).ok())
}

fn activation(u: &mut Unstructured<'_>) -> Result<Option<ActivationScheme>> {
    let dtype = match u.int_in_range(0..=7)? {
        0 | 1 => return Ok(None),
        2 => return Ok(Some(ActivationScheme::BF16)),
        3 | 4 => ActivationType::Int8,
        5 => ActivationType::Int16,
        _ => ActivationType::UInt8,
    };
    let scales = match u.int_in_range(0..=4)? {
        0 => ActivationScales::PerTensor,
        1 => ActivationScales::PerTokenGroup(u.int_in_range(1..=70)?),
        2 => ActivationScales::Static {
            scale: number(u).abs(),
            zero_point: if dtype == ActivationType::UInt8 { u.arbitrary()? } else { 0 },
        },
        _ => ActivationScales::PerToken,
    };
    Ok(Some(ActivationScheme { dtype, scales }))
}

fn layer(u: &mut Unstructured<'_>, n: usize, k: usize) -> Result<Option<QLinear>> {
    let Some(weight) = weight(u, n, k)? else { return Ok(None) };
    let mut layer = QLinear::new(weight).with_activation(activation(u)?);
    let mut transforms = Vec::new();
    for _ in 0..u.int_in_range(0..=2)? {
        transforms.push(match u.int_in_range(0..=2)? {
            0 => Transform::Scale((0..k).map(|_| number(u)).collect()),
            1 => Transform::Permute((0..k as u32).rev().collect()),
            _ => Transform::hadamard(k, u.arbitrary()?),
        });
    }
    layer = layer.clone().with_transforms(transforms).unwrap_or(layer);
    let outliers = match u.int_in_range(0..=5)? {
        0 => Some(Outliers::Threshold(number(u).abs())),
        1 => {
            let columns: Vec<usize> = (0..k).filter(|_| u.arbitrary() == Ok(true)).collect();
            let weight = Mat::from_fn(columns.len(), n, |_, _| f16::from_f32(number(u)));
            OutlierColumns::new(columns, weight).ok().map(Outliers::Columns)
        }
        2 => {
            let (mut starts, mut columns) = (vec![0], Vec::new());
            for _ in 0..n {
                columns.extend((0..k as u32).filter(|_| u.arbitrary() == Ok(true)));
                starts.push(columns.len() as u32);
            }
            let values = columns.iter().map(|_| f16::from_f32(number(u))).collect();
            SparseRows::new(n, k, starts, columns, values).ok().map(Outliers::Sparse)
        }
        _ => None,
    };
    layer = layer.clone().with_outliers(outliers).unwrap_or(layer);
    if u.int_in_range(0..=3)? == 0 {
        let rank = u.int_in_range(0..=3)?;
        let (a, b) = (matrix(u, rank, k), matrix(u, n, rank));
        layer = layer.clone().with_adapter(Adapter::new(a, b).ok()).unwrap_or(layer);
    }
    if u.arbitrary()? {
        let bias = matrix(u, 1, n).data().to_vec();
        layer = layer.clone().with_bias(Some(bias)).unwrap_or(layer);
    }
    Ok(Some(layer))
}

/// Its bits if it is a number; NaN is NaN.
fn class(y: f32) -> Option<u32> {
    (!y.is_nan()).then_some(y.to_bits())
}

fn compare(bytes: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(bytes);
    let (m, n, k) =
        (u.int_in_range(0..=40)?, u.int_in_range(0..=70)?, u.int_in_range(0..=150_usize)?);
    let Some(layer) = layer(u, n, k)? else { return Ok(()) };
    let x = matrix(u, m, k);
    let ctx = &mut Context::new();
    let mut expected = Mat::zeros(m, n);
    let reference = layer.forward(x.as_ref(), expected.as_mut(), ctx);
    let exact = layer.activation().is_some_and(|scheme| scheme != ActivationScheme::BF16);
    let bound = if exact { None } else { bounds::linear(&layer, x.as_ref()).ok() };
    for kernel in kernels() {
        // Not every kind has a kernel: that is an error.
        let Ok(packed) = PackedLinear::with_kernel(&layer, kernel) else { continue };
        let mut y = Mat::from_fn(m, n, |_, _| 7.0);
        let result = packed.forward(x.as_ref(), y.as_mut(), ctx);
        assert_eq!(result, reference, "{kernel}");
        if result.is_err() {
            assert!(y.data().iter().all(|y| *y == 7.0), "{kernel}");
            continue;
        }
        for (i, (y, expected)) in y.data().iter().zip(expected.data()).enumerate() {
            match &bound {
                None => assert_eq!(class(*y), class(*expected), "{kernel}: {y} {expected} at {i}"),
                Some(bound) => {
                    let (error, bound) = (f64::from(y - expected).abs(), bound.data()[i]);
                    assert!(
                        error <= bound || bound.is_infinite(),
                        "{kernel}: {y} {expected} {bound}"
                    );
                }
            }
        }
        let mut once = Mat::zeros(m, n);
        let best = kernels().next() == Some(kernel);
        if best && PackedLinear::multiply_once(&layer, x.as_ref(), once.as_mut(), ctx).is_ok() {
            let same = |(a, b): (&f32, &f32)| class(*a) == class(*b);
            assert!(y.data().iter().zip(once.data()).all(same), "multiply_once");
        }
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let _ = compare(bytes); // too few bytes
});
