//! SmoothQuant, AWQ and LLM.int8() against an independent program (float64, written from the papers), whose
//! numbers are in `golden/`, and what recipes promise.

use std::sync::Arc;

use lowbit_algorithms::{
    Alpha, Awq, Calibration, ChannelScale, LlmInt8, Needs, Quantizer, Recipe, Rtn, SmoothQuant,
};
use lowbit_core::{
    ActivationScheme, Context, Error, Granularity, Linear, Mat, Outliers, QLinear, QuantScheme,
    ScaleFormat, Transform, presets,
};

fn golden(bytes: &[u8], rows: usize) -> Mat<f32> {
    let numbers: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let cols = numbers.len() / rows;
    Mat::new(numbers, rows, cols).unwrap()
}

fn observed(x: &Mat<f32>) -> Calibration {
    let mut c = Calibration::with_second_moment(x.cols()).unwrap();
    c.observe(x.as_ref(), &mut Context::new()).unwrap();
    c
}

fn forward(layer: &QLinear, x: &Mat<f32>) -> Mat<f32> {
    let mut y = Mat::zeros(x.rows(), layer.out_features());
    layer.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
    y
}

/// Root mean square of the difference from `x·wᵀ`.
fn rmse(layer: &QLinear, w: &Mat<f32>, x: &Mat<f32>) -> f64 {
    let y = forward(layer, x);
    let mut sum = 0.0;
    for (x, y) in x.as_ref().iter_rows().zip(y.as_ref().iter_rows()) {
        for (w, y) in w.as_ref().iter_rows().zip(y) {
            let exact: f64 = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            sum += (exact - f64::from(*y)).powi(2);
        }
    }
    (sum / y.data().len() as f64).sqrt()
}

fn outlier_input() -> (Mat<f32>, Mat<f32>) {
    let x = golden(include_bytes!("golden/smoothquant_x.f32"), 10);
    (golden(include_bytes!("golden/smoothquant_w.f32"), 24), x)
}

#[test]
fn smoothquant_scales_are_those_of_an_independent_program() {
    let (w, x) = outlier_input();
    let w2 = golden(include_bytes!("golden/smoothquant_w2.f32"), 8);
    let calibration = observed(&x);
    for (alpha, bytes) in [
        (0.0, &include_bytes!("golden/smoothquant_s0.0.f32")[..]),
        (0.5, include_bytes!("golden/smoothquant_s0.5.f32")),
        (0.85, include_bytes!("golden/smoothquant_s0.85.f32")),
        (1.0, include_bytes!("golden/smoothquant_s1.0.f32")),
    ] {
        let weights = [w.as_ref(), w2.as_ref()];
        let (s, used) = SmoothQuant::new(alpha).scales(&weights, &calibration).unwrap();
        assert_eq!(used, alpha);
        for (got, expected) in s.iter().zip(golden(bytes, 1).data()) {
            assert!((got / expected - 1.0).abs() < 1e-6, "{alpha}: {got} {expected}");
        }
    }
}

#[test]
fn smoothquant_twice_is_smoothquant_once() {
    let (mut w, x) = outlier_input();
    let mut calibration = observed(&x);
    let rule = SmoothQuant::new(0.7);
    let (s, _) = rule.scales(&[w.as_ref()], &calibration).unwrap();
    let scale = Transform::Scale(s.iter().map(|s| 1.0 / s).collect());
    scale.apply_to_weight(&mut w).unwrap();
    calibration.transform(&scale).unwrap();
    let (again, _) = rule.scales(&[w.as_ref()], &calibration).unwrap();
    assert!(again.iter().all(|s| (s - 1.0).abs() < 1e-5), "{again:?}");
}

/// The independent program measures 0.0129, 0.0059, 0.0118, 0.0176 for α of 0, 0.5, 0.85, 1 with weights
/// and activations quantized as here, but with scales that a second weight shares.
#[test]
fn the_searched_alpha_is_as_good_as_the_best_of_a_few() {
    let (w, x) = outlier_input();
    let error = |alpha| {
        let scale = Some(ChannelScale::SmoothQuant(SmoothQuant { alpha }));
        let recipe = Recipe { scale, ..Recipe::W8A8 };
        let q = recipe.quantize(w.as_ref(), &observed(&x), &mut Context::new()).unwrap();
        rmse(&q.layer, &w, &x)
    };
    let half = error(Alpha::Fixed(0.5));
    assert!((0.0055..0.0065).contains(&half), "{half}");
    assert!((0.012..0.014).contains(&error(Alpha::Fixed(0.0))));
    assert!((0.016..0.019).contains(&error(Alpha::Fixed(1.0))));
    assert!(error(Alpha::Searched) < 1.25 * half, "{}", error(Alpha::Searched));
}

fn awq() -> (Awq, Mat<f32>, Mat<f32>) {
    let (scheme, fit) = presets::awq(4, Granularity::PerGroup(32));
    let scheme = QuantScheme { scale_format: ScaleFormat::F32, ..scheme };
    let w = golden(include_bytes!("golden/awq_w.f32"), 16);
    (Awq { scheme, fit }, w, golden(include_bytes!("golden/awq_x.f32"), 64))
}

#[test]
fn awq_finds_the_scale_of_an_independent_program() {
    let (awq, w, x) = awq();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let mut threads = Context::with_pool(Arc::new(pool));
    for ctx in [&mut Context::new(), &mut threads] {
        let (s, alpha) = awq.scales(&[w.as_ref()], &observed(&x), ctx).unwrap();
        assert_eq!(alpha, 0.55);
        for (got, expected) in
            s.iter().zip(golden(include_bytes!("golden/awq_scale.f32"), 1).data())
        {
            assert!((got / expected - 1.0).abs() < 1e-5, "{got} {expected}");
        }
    }
}

/// Except in the group whose weights are all positive: there our range contains 0, theirs does not.
#[test]
fn awq_finds_the_clipping_bounds_of_an_independent_program() {
    let (awq, mut w, x) = awq();
    let s = golden(include_bytes!("golden/awq_scale.f32"), 1);
    let scale = Transform::Scale(s.data().iter().map(|s| 1.0 / s).collect());
    scale.apply_to_weight(&mut w).unwrap();
    let mut calibration = observed(&x);
    calibration.transform(&scale).unwrap();
    awq.clip(&mut w, &calibration, &mut Context::new()).unwrap();
    let bounds = golden(include_bytes!("golden/awq_clip_max.f32"), 16);
    for (r, row) in w.as_ref().iter_rows().enumerate() {
        for (g, part) in row.chunks(32).enumerate().filter(|(g, _)| (r, *g) != (2, 1)) {
            let largest = part.iter().fold(0.0_f32, |max, w| max.max(w.abs()));
            let expected = bounds.data()[r * 4 + g];
            assert!((largest / expected - 1.0).abs() < 1e-5, "{r} {g}: {largest} {expected}");
        }
    }
}

#[test]
fn awq_never_loses_to_plain_rounding_where_all_rows_are_looked_at() {
    let (awq, w, x) = awq();
    let plain = Rtn { scheme: awq.scheme, fit: awq.fit };
    let recipe = Recipe::rounding(&plain);
    let scaled = Recipe { scale: Some(ChannelScale::Awq(awq)), ..recipe };
    let clipped = Recipe { clip: Some(awq), ..scaled };
    let [plain, scaled, clipped] = [recipe, scaled, clipped].map(|recipe| {
        let q = recipe.quantize(w.as_ref(), &observed(&x), &mut Context::new()).unwrap();
        rmse(&q.layer, &w, &x)
    });
    // The independent program: 0.737, 0.209 and 0.203, with a worse grid for one group.
    assert!(scaled < 0.35 * plain && clipped < scaled, "{plain} {scaled} {clipped}");
}

#[test]
fn llm_int8_is_that_of_an_independent_program() {
    let (w, x) = outlier_input();
    let q = Recipe::LLM_INT8.quantize(w.as_ref(), &observed(&x), &mut Context::new()).unwrap();
    let Some(Outliers::Columns(known)) = q.layer.outliers() else { panic!("known columns") };
    assert_eq!((known.columns(), q.report.outliers), (&[5, 60][..], 48));
    let expected = golden(include_bytes!("golden/llm_int8_y_f16.f32"), 10);
    for (got, expected) in forward(&q.layer, &x).data().iter().zip(expected.data()) {
        // Its outlier weights are not rounded to f16.
        assert!((got - expected).abs() < 1e-3, "{got} {expected}");
    }
    let bitsandbytes = Recipe { outliers: Some(LlmInt8::BITSANDBYTES), ..Recipe::LLM_INT8 };
    let int8 = bitsandbytes.quantize(w.as_ref(), &observed(&x), &mut Context::new()).unwrap();
    assert!(rmse(&q.layer, &w, &x) < rmse(&int8.layer, &w, &x));
}

#[test]
fn without_a_choice_a_recipe_is_its_rounding() {
    let (w, x) = outlier_input();
    let rtn = Rtn::new(QuantScheme::affine(3, Granularity::PerGroup(20)));
    let quantize = |q: &dyn Quantizer| {
        q.quantize(w.as_ref(), &observed(&x), &mut Context::new()).unwrap().layer
    };
    assert_eq!(quantize(&Recipe::rounding(&rtn)), quantize(&rtn));
    let activation = Some(ActivationScheme::INT8_PER_TOKEN);
    let with = quantize(&Recipe { activation, ..Recipe::rounding(&rtn) });
    assert_eq!(with, quantize(&rtn).with_activation(activation));
}

#[test]
fn a_plan_says_what_is_stored() {
    let (w, x) = outlier_input();
    let recipe = Recipe { rotation: Some(3), ..Recipe::SMOOTHQUANT };
    assert_eq!(recipe.needs(), Needs::Channels);
    let q = recipe.quantize(w.as_ref(), &observed(&x), &mut Context::new()).unwrap();
    assert_eq!(recipe.plan(24, 96).unwrap().bytes, q.layer.bytes());
}

#[test]
fn bad_statistics_and_strengths_are_errors() {
    let (w, x) = outlier_input();
    let quantize = |recipe: Recipe<'_>, c: &Calibration| {
        recipe.quantize(w.as_ref(), c, &mut Context::new()).map(|_| ()).unwrap_err()
    };
    let none = quantize(Recipe::SMOOTHQUANT, &Calibration::new(96));
    assert_eq!(none, Error::Empty { what: "calibration" });
    let none = quantize(Recipe::LLM_INT8, &Calibration::new(96));
    assert_eq!(none, Error::Empty { what: "calibration" });
    assert!(matches!(quantize(Recipe::W8A8, &Calibration::new(95)), Error::Length { .. }));
    for alpha in [-0.1, 1.1, f32::NAN] {
        let scale = Some(ChannelScale::SmoothQuant(SmoothQuant::new(alpha)));
        let error = quantize(Recipe { scale, ..Recipe::W8A8 }, &observed(&x));
        assert!(matches!(error, Error::Parameter { .. }), "{error}");
    }
    let rotated = Recipe { rotation: Some(1), ..Recipe::LLM_INT8 };
    assert!(matches!(quantize(rotated, &observed(&x)), Error::Unsupported { .. }));
    // Without the second moment.
    let mut channels = Calibration::new(96);
    channels.observe(x.as_ref(), &mut Context::new()).unwrap();
    let scale = Some(ChannelScale::SmoothQuant(SmoothQuant { alpha: Alpha::Searched }));
    let error = quantize(Recipe { scale, ..Recipe::W8A8 }, &channels);
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

/// A dead channel has no signal to weigh, and must not disturb the others.
#[test]
fn dead_channels_keep_their_scale() {
    let (w, mut x) = outlier_input();
    x.data_mut().iter_mut().skip(7).step_by(96).for_each(|x| *x = 0.0);
    let calibration = observed(&x);
    let (s, _) = SmoothQuant::new(0.5).scales(&[w.as_ref()], &calibration).unwrap();
    assert_eq!(s[7], 1.0);
    let (scheme, fit) = presets::awq(4, Granularity::PerGroup(32));
    let awq = Awq { scheme, fit };
    let (s, _) = awq.scales(&[w.as_ref()], &calibration, &mut Context::new()).unwrap();
    assert_eq!(s[7], 1.0);
}
