//! Every method on statistics that say little, and on operands that make no sense.

use lowbit_algorithms::{
    Calibration, METHODS, Needs, Obq, Quantizer, Rtn, Uncalibrated, relative_loss,
};
use lowbit_core::{Context, Error, Granularity, Mat, QuantScheme};

const N: usize = 24;
const K: usize = 80;

fn noise(rows: usize, cols: usize, seed: usize) -> Mat<f32> {
    Mat::from_fn(rows, cols, |r, c| {
        let x = ((r * cols + c + 1000 * seed) as f64 * 12.9898).sin() * 43_758.545_3;
        (x - x.floor()) as f32 - 0.5
    })
}

fn observed(x: &Mat<f32>) -> Calibration {
    let mut calibration = Calibration::with_second_moment(x.cols()).unwrap();
    calibration.observe(x.as_ref(), &mut Context::new()).unwrap();
    calibration
}

/// The methods with names, and OBQ, which is for small layers.
fn methods() -> Vec<(&'static str, Box<dyn Quantizer>)> {
    let mut methods: Vec<(_, Box<dyn Quantizer>)> = Vec::new();
    for method in METHODS {
        methods.push((method.name, Box::new(method.quantizer)));
    }
    let scheme = QuantScheme::affine(4, Granularity::PerGroup(32));
    methods.push(("obq", Box::new(Obq::new(scheme))));
    methods
}

#[test]
fn poor_statistics_give_layers_that_keep_their_outputs() {
    let (w, ctx) = (noise(N, K, 1), &mut Context::new());
    // One token; one direction; fewer tokens than channels; most channels without a signal; numbers near
    // the ends of f32 (their squares in f64).
    let poor = [
        noise(1, K, 2),
        Mat::from_fn(50, K, |t, c| (1 + t) as f32 * (c as f32 + 1.0).sin()),
        noise(K / 3, K, 3),
        Mat::from_fn(60, K, |t, c| if c % 9 == 0 { ((t * 7 + c) as f32).cos() } else { 0.0 }),
        Mat::from_fn(200, K, |t, c| noise(1, K, t).data()[c] * 1e-15),
        Mat::from_fn(200, K, |t, c| noise(1, K, t).data()[c] * 1e15),
    ];
    for (i, x) in poor.iter().enumerate() {
        let calibration = observed(x);
        for (name, method) in methods() {
            let q = method.quantize(w.as_ref(), &calibration, ctx);
            let q = q.unwrap_or_else(|e| panic!("{name} on {i}: {e}"));
            let loss = relative_loss(w.as_ref(), &q.layer, &calibration, ctx).unwrap();
            let bound = if name.contains("int2") || name.contains("l4") { 0.6 } else { 0.1 };
            assert!(loss < bound, "{name} on {i}: {loss}");
        }
    }
}

#[test]
fn inputs_that_are_always_zero_leave_weights_rounded_to_nearest() {
    let (w, ctx) = (noise(N, K, 1), &mut Context::new());
    let calibration = observed(&Mat::zeros(40, K));
    for (name, method) in methods() {
        let q = method.quantize(w.as_ref(), &calibration, ctx);
        let q = q.unwrap_or_else(|e| panic!("{name}: {e}"));
        let back = q.layer.effective_weight().unwrap();
        for (w, q) in w.data().iter().zip(back.data()) {
            assert!((w - q).abs() < 0.3, "{name}: {q} for {w}");
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_every_method() {
    let (w, ctx) = (noise(N, K, 1), &mut Context::new());
    let seen = observed(&noise(100, K, 2));
    let unseen = Calibration::with_second_moment(K).unwrap();
    for (name, method) in methods() {
        let mut refused = |w: &Mat<f32>, c: &Calibration| {
            let q = method.quantize(w.as_ref(), c, ctx);
            q.map(|_| ()).expect_err(name)
        };
        for k in [K - 1, K + 1] {
            let error = refused(&noise(N, k, 1), &seen);
            assert!(matches!(error, Error::Length { .. } | Error::Shape { .. }), "{name}: {error}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut w = noise(N, K, 1);
            w.data_mut()[3 * K + 70] = bad;
            let error = refused(&w, &seen);
            assert!(matches!(error, Error::NotFinite { row: 3, .. }), "{name}: {error}");
        }
        if method.needs() > Needs::Nothing {
            assert_eq!(refused(&w, &unseen), Error::Empty { what: "calibration" }, "{name}");
        }
        if method.needs() == Needs::SecondMoment {
            let mut channels = Calibration::new(K);
            channels.observe(noise(100, K, 2).as_ref(), &mut Context::new()).unwrap();
            let error = refused(&w, &channels);
            assert!(matches!(error, Error::Unsupported { .. }), "{name}: {error}");
        }
    }
}

#[test]
fn an_uncalibrated_layer_is_rounded_to_nearest_on_request_and_says_so() {
    let (w, ctx) = (noise(N, K, 1), &mut Context::new());
    let scheme = QuantScheme::affine(4, Granularity::PerGroup(32));
    let unseen = Calibration::with_second_moment(K).unwrap();
    let obq = Obq { uncalibrated: Uncalibrated::Nearest, ..Obq::new(scheme) };
    let q = obq.quantize(w.as_ref(), &unseen, ctx).unwrap();
    assert!(q.report.fallback);
    assert_eq!(q.layer, Rtn::new(scheme).quantize(w.as_ref(), &unseen, ctx).unwrap().layer);
}

#[test]
fn a_batch_that_is_not_finite_changes_nothing() {
    let ctx = &mut Context::new();
    let mut calibration = observed(&noise(30, K, 2));
    let before = calibration.clone();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = noise(30, K, 3);
        x.data_mut()[29 * K + 7] = bad;
        let error = calibration.observe(x.as_ref(), ctx).unwrap_err();
        assert!(matches!(error, Error::NotFinite { row: 29, col: 7, .. }), "{error}");
        assert_eq!(calibration, before);
    }
    assert!(calibration.observe(noise(30, K + 1, 3).as_ref(), ctx).is_err());
    assert_eq!(calibration, before);
}
