//! Weights at the ends of f32, in every scheme, by every algorithm: what comes back is finite, or an error
//! has said that it is not.

use lowbit_algorithms::{
    Awq, Calibration, ChannelScale, Gptq, Obq, Order, OutlierRule, Quantizer, Recipe, Rtn, Spqr,
};
use lowbit_core::testing::{Family, proptest::prelude::*, strategies};
use lowbit_core::{
    Context, Division, Error, Fit, Granularity, Mat, QMatrix, QuantScheme, QuantType, Rounding,
    ScaleFormat, ZeroFormat,
};
use lowbit_dtypes::{Format, Specials};

/// Integers with every kind of scale and zero, tables, and floats of every kind.
fn schemes() -> impl Strategy<Value = QuantScheme> {
    let formats = || strategies::all_scale_formats(8);
    let integers = (strategies::schemes(20), formats(), formats()).prop_map(
        |(scheme, scale_format, zeros)| QuantScheme {
            zero: match scheme.zero {
                _ if zeros == ScaleFormat::E8m0 => scheme.zero,
                ZeroFormat::Real(_) => ZeroFormat::Real(zeros),
                ZeroFormat::Offset(_) => ZeroFormat::Offset(zeros),
                zero => zero,
            },
            scale_format,
            ..scheme
        },
    );
    let specials = [
        Specials::None,
        Specials::Ieee,
        Specials::NanOnly,
        Specials::NanIsNegativeZero,
        Specials::Scale,
    ];
    let float = (strategies::level_schemes(20), 1..=5_u32, 0..=4_u32, 0..20_i32, 0..5_usize);
    let floats =
        float.prop_map(move |(scheme, exponent, fraction, bias, special)| {
            match Format::new(exponent, fraction, bias, specials[special]) {
                Ok(format) => QuantScheme { dtype: QuantType::Float(format), ..scheme },
                Err(_) => scheme,
            }
        });
    prop_oneof![2 => integers, 1 => strategies::level_schemes(20), 2 => floats]
}

/// Members of every family, many of them moved to the ends of f32.
fn weights() -> impl Strategy<Value = Mat<f32>> {
    let factors = vec![1.0, 1.0, 1e-44, 1e-38, 1e6, 1e30, 1e37, 1e38, 3.4e38, 1e39];
    let sizes = (1..=20_usize, 1..=40_usize);
    (0..Family::ALL.len(), sizes, prop::sample::select(factors), any::<u64>()).prop_map(
        |(family, (n, k), factor, seed)| {
            let mut w = Family::ALL[family].matrix(n, k, seed);
            for w in w.data_mut() {
                *w = ((f64::from(*w) * factor) as f32).clamp(f32::MIN, f32::MAX);
            }
            w
        },
    )
}

/// Each method with this scheme and fit.
fn quantize(
    method: usize,
    scheme: QuantScheme,
    fit: Fit,
    w: &Mat<f32>,
    calibration: &Calibration,
) -> lowbit_core::Result<lowbit_algorithms::Quantized> {
    let stored = Fit {
        division: Division::Stored,
        rounding: match fit.rounding {
            Rounding::Stochastic { .. } => Rounding::NearestUp,
            other => other,
        },
        ..fit
    };
    let rounding = match scheme.dtype {
        QuantType::Int { .. } => stored.rounding,
        _ => Rounding::NearestEven,
    };
    let stored = Fit { rounding, ..stored };
    let (rtn, gptq) = (Rtn { scheme, fit: stored }, Gptq { fit: stored, ..Gptq::new(scheme) });
    let order = [Order::Given, Order::Falling, Order::Sorted][method % 3];
    let improved = Gptq { order, fit: stored, ..Gptq::improved(scheme) };
    let outliers = OutlierRule::Share(0.05);
    let awq = Awq { scheme, fit: stored };
    let recipe = Recipe {
        scale: method.is_multiple_of(2).then_some(ChannelScale::Awq(awq)),
        clip: Some(awq),
        ..Recipe::rounding(&rtn)
    };
    let quantizer: &dyn Quantizer = match method {
        0 => &rtn,
        1 => &Gptq { order, ..gptq },
        2..5 => &improved,
        5 => &Obq { fit: stored, ..Obq::new(scheme) },
        6 => &Spqr { rounding: gptq, outliers },
        7..10 => &Spqr { rounding: improved, outliers },
        _ => &recipe,
    };
    quantizer.quantize(w.as_ref(), calibration, &mut Context::new())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_an_algorithm_gives_is_finite(
        w in weights(), scheme in schemes(), fit in strategies::fits(), method in 0..12_usize,
    ) {
        let x = Family::Normal.matrix(30, w.cols(), 5);
        let mut calibration = Calibration::with_second_moment(w.cols()).unwrap();
        calibration.observe(x.as_ref(), &mut Context::new()).unwrap();
        match quantize(method, scheme, fit, &w, &calibration) {
            Ok(quantized) => {
                let weight = quantized.layer.weight();
                prop_assert!(weight.dequantize().data().iter().all(|w| w.is_finite()));
                // In the basis of the input a weight near the largest f32 may round to more than that.
                if quantized.layer.transforms().is_empty() {
                    let effective = quantized.layer.effective_weight().unwrap();
                    prop_assert!(effective.data().iter().all(|w| w.is_finite()), "{effective:?}");
                }
                // What can be written can be read.
                let (scales, zeros) = (weight.scales(), weight.zeros());
                let read = QMatrix::from_parts(
                    weight.rows(), weight.cols(), scheme, weight.codes(), scales, zeros,
                );
                prop_assert!(read.is_ok(), "{read:?}");
            }
            Err(
                Error::ScaleOverflow { .. }
                | Error::ZeroOverflow { .. }
                | Error::NotFinite { .. }
                | Error::Unsupported { .. },
            ) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}

#[test]
fn a_zero_in_a_format_without_0_is_refused() {
    let ctx = &mut Context::new();
    let w = Mat::zeros(1, 2);
    let mut calibration = Calibration::with_second_moment(2).unwrap();
    calibration.observe(Family::Normal.matrix(9, 2, 1).as_ref(), ctx).unwrap();
    for zero in [ZeroFormat::Real(ScaleFormat::E8m0), ZeroFormat::Offset(ScaleFormat::E8m0)] {
        let scheme = QuantScheme { zero, ..QuantScheme::affine(3, Granularity::PerChannel) };
        for method in 0..12 {
            let error = quantize(method, scheme, Fit::NEAREST, &w, &calibration).unwrap_err();
            let text = "a scheme does not support zeros or offsets in E8M0, which has neither 0 nor negative numbers; use f16";
            assert_eq!(error.to_string(), text, "{method}");
        }
    }
}
