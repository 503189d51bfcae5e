//! Ranges: against numpy and scipy (`golden/observer_*`: eight batches of 512 numbers), and what
//! must hold whatever the numbers are.

use lowbit_core::{
    Error, Fit, Granularity, Mat, MatRef, QMatrix, QuantScheme, Range, ScaleFormat, SymmetricScale,
    range::{self, Histogram, moving_average},
};
use proptest::prelude::*;

fn trace() -> Vec<f32> {
    let words = include_bytes!("golden/observer_trace.f32").as_chunks::<4>().0;
    words.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

fn close(a: f32, b: f64) {
    assert!((f64::from(a) - b).abs() <= 1e-6 * b.abs(), "{a} for {b}");
}

#[test]
fn ranges_of_a_trace_are_those_of_numpy_and_scipy() {
    let x = trace();
    assert_eq!(range::min_max(&x).unwrap(), (-18.665_728, 21.452_42));
    for (percent, expected) in
        [(99.0, 6.815418672561678), (99.9, 12.497246551514205), (99.99, 20.311269043921847)]
    {
        close(range::percentile_abs(&x, percent).unwrap(), expected);
    }
    let mut average = None;
    for batch in x.chunks(512) {
        average = Some(moving_average(average, range::min_max(batch).unwrap(), 0.01).unwrap());
    }
    let (lo, hi) = average.unwrap();
    close(lo, -4.438355865837458);
    close(hi, 4.308178309029662);
}

#[test]
fn the_entropy_calibration_keeps_the_bins_that_scipy_says() {
    let words = include_bytes!("golden/observer_hist512.u32").as_chunks::<4>().0;
    let bins: Vec<u64> = words.iter().map(|&word| u32::from_le_bytes(word).into()).collect();
    assert_eq!(range::entropy_bins(&bins, 128).unwrap(), 267);
    // Doubling every number leaves the counts, and with them the choice, as they are.
    let mut a = Histogram::new();
    a.observe(&trace()).unwrap();
    let mut b = Histogram::new();
    b.observe(&trace().iter().map(|x| 2.0 * x).collect::<Vec<_>>()).unwrap();
    assert_eq!(2.0 * a.entropy_abs(128).unwrap(), b.entropy_abs(128).unwrap());
    // Near what 512 bins of another width choose.
    assert!((a.entropy_abs(128).unwrap() / 11.187 - 1.0).abs() < 0.1);
}

#[test]
fn the_mse_search_finds_what_numpy_finds() {
    // numpy: the best of amax·i/100 on −127..=127 is 97 hundredths.
    let x = trace();
    let scheme = QuantScheme {
        scale_format: ScaleFormat::F32,
        ..QuantScheme::symmetric(8, Granularity::PerTensor)
    };
    let symmetric = SymmetricScale::Restricted;
    let fit = Fit { range: Range::MSE, symmetric, ..Fit::NEAREST };
    let w = MatRef::new(&x, 8, 512).unwrap();
    let q = QMatrix::quantize_with(w, scheme, &fit, None).unwrap();
    close(q.params(0, 0).scale * 127.0, 20.808846702575682);
    let mut histogram = Histogram::new();
    histogram.observe(&x).unwrap();
    assert!((histogram.mse_abs(127).unwrap() / 20.8088 - 1.0).abs() < 0.05);
}

#[test]
fn percentiles_clip_what_lies_beyond() {
    let mut w: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) / 500.0).collect();
    w[0] = -100.0;
    let w = Mat::new(w, 1, 1000).unwrap();
    for (scheme, low) in [
        (QuantScheme::symmetric(8, Granularity::PerChannel), -1.01),
        (QuantScheme::affine(8, Granularity::PerChannel), -1.01),
    ] {
        let fit = Fit { range: Range::Percentile(99.0), ..Fit::NEAREST };
        let back = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap().dequantize();
        assert!(back.data()[0] > low, "{}", back.data()[0]);
        assert!((back.data()[700] - 0.4).abs() < 0.01);
    }
}

#[test]
fn importance_moves_the_range_to_the_columns_that_count() {
    // One large weight in a column that is never active, small ones in the others.
    let w = Mat::from_fn(1, 64, |_, c| if c == 9 { 4.0 } else { (c as f32 * 0.7).sin() });
    let importance: Vec<f32> = (0..64).map(|c| if c == 9 { 0.0 } else { 1.0 }).collect();
    let scheme = QuantScheme::symmetric(4, Granularity::PerChannel);
    let fit = Fit { range: Range::MSE, ..Fit::NEAREST };
    let scale = |importance: Option<&[f32]>| {
        QMatrix::quantize_with(w.as_ref(), scheme, &fit, importance).unwrap().params(0, 0).scale
    };
    assert!(scale(Some(&importance)) < 0.5 * scale(None));
    assert_eq!(scale(None), scale(Some(&[2.0; 64])));
}

#[test]
fn bad_operands_are_errors_that_carry_them() {
    let x = [1.0, f32::NAN];
    assert_eq!(range::min_max(&[]), Err(Error::Empty { what: "numbers to take the range of" }));
    assert_eq!(range::min_max(&x), Err(Error::NotFinite { what: "number", row: 0, col: 1 }));
    for percent in [0.0, -1.0, 100.1, f64::NAN, f64::INFINITY] {
        let error = range::percentile(&[1.0], percent).unwrap_err();
        assert!(matches!(error, Error::Parameter { what: "percentile", .. }), "{error}");
        let fit = Fit { range: Range::Percentile(percent), ..Fit::NEAREST };
        let scheme = QuantScheme::symmetric(8, Granularity::PerTensor);
        let w = MatRef::new(&[1.0], 1, 1).unwrap();
        assert!(QMatrix::quantize_with(w, scheme, &fit, None).is_err());
    }
    for momentum in [0.0, -0.1, 1.5, f32::NAN] {
        assert!(moving_average(None, (0.0, 1.0), momentum).is_err());
    }
    let scheme = QuantScheme::symmetric(4, Granularity::PerChannel);
    let w = MatRef::new(&[1.0, 2.0], 1, 2).unwrap();
    for (grid, candidates, norm) in
        [(0, 0, 2.0), (10, 0, 2.0), (10, 11, 2.0), (10, 5, 0.0), (10, 5, f32::NAN)]
    {
        let fit = Fit { range: Range::Search { grid, candidates, norm }, ..Fit::NEAREST };
        let error = QMatrix::quantize_with(w, scheme, &fit, None).unwrap_err();
        assert!(matches!(error, Error::Parameter { .. }), "{error}");
    }
    let quantize = |x: &[f32]| QMatrix::quantize_with(w, scheme, &Fit::NEAREST, Some(x));
    assert!(matches!(quantize(&[1.0]), Err(Error::Length { expected: 2, got: 1, .. })));
    assert!(matches!(quantize(&[1.0, f32::NAN]), Err(Error::NotFinite { col: 1, .. })));
    assert!(matches!(quantize(&[1.0, -1.0]), Err(Error::Parameter { .. })));
    let empty = Histogram::new();
    assert_eq!(empty.percentile_abs(50.0), Err(Error::Empty { what: "histogram" }));
    assert!(empty.entropy_abs(128).is_err() && empty.mse_abs(127).is_err());
    let mut histogram = Histogram::new();
    histogram.observe(&[1.0]).unwrap();
    let before = histogram.clone();
    assert!(histogram.observe(&[2.0, f32::INFINITY]).is_err());
    assert_eq!(histogram, before);
    assert!(histogram.mse_abs(0).is_err() && histogram.entropy_abs(0).is_err());
}

#[test]
fn a_moving_average_stays_between_its_ranges() {
    let far = moving_average(Some((-3e38, 0.0)), (3e38, 3.1e38), 0.5).unwrap();
    assert!(far.0.is_finite() && far.1.is_finite(), "{far:?}");
    let last = moving_average(Some((-1e30, 1e30)), (-1.0, 1.0), 1.0).unwrap();
    assert_eq!(last, (-1.0, 1.0));
    for bad in [(f32::NAN, 1.0), (0.0, f32::INFINITY), (3.0, -3.0)] {
        assert!(matches!(moving_average(None, bad, 0.1), Err(Error::Parameter { .. })));
        assert!(matches!(moving_average(Some(bad), (0.0, 1.0), 0.1), Err(Error::Parameter { .. })));
    }
}

#[test]
fn counts_end_where_their_numbers_do() {
    let mut histogram = Histogram::new();
    histogram.observe(&[1.0]).unwrap();
    for _ in 0..70 {
        histogram.merge(&histogram.clone());
    }
    assert_eq!(histogram.count(), u64::MAX);
    assert_eq!(histogram.percentile_abs(50.0).unwrap(), 1.0);
}

fn batch() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        4 => -1.0_f32..1.0,
        1 => Just(0.0),
        1 => prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::NEGATIVE,
    ];
    prop::collection::vec(value.prop_filter("finite", |x| x.is_finite()), 0..30)
}

proptest! {
    #[test]
    fn histograms_do_not_depend_on_order_or_grouping(
        batches in prop::collection::vec(batch(), 1..6), split in 0..6_usize,
    ) {
        let mut all = Histogram::new();
        for batch in &batches {
            all.observe(batch).unwrap();
        }
        let (left, right) = batches.split_at(split.min(batches.len()));
        let [mut a, mut b] = [(); 2].map(|()| Histogram::new());
        for batch in left.iter().rev() {
            a.observe(batch).unwrap();
        }
        for batch in right {
            b.observe(batch).unwrap();
        }
        let mut ab = a.clone();
        ab.merge(&b);
        b.merge(&a);
        prop_assert_eq!(&ab, &all);
        prop_assert_eq!(&b, &all);
        prop_assert_eq!(all.count(), batches.iter().map(Vec::len).sum::<usize>() as u64);
        prop_assert_eq!(all.abs_bins().iter().sum::<u64>(), all.count());
    }

    #[test]
    fn a_histogram_cuts_both_tails_to_a_bin(
        x in prop::collection::vec(-4.0_f32..4.0, 1..60), percent in 1.0..=100.0_f64,
    ) {
        let mut histogram = Histogram::new();
        histogram.observe(&x).unwrap();
        let (lo, hi) = histogram.percentile(percent).unwrap();
        let (least, most) = range::min_max(&x).unwrap();
        prop_assert!(least <= lo && lo <= hi && hi <= most);
        // No more is cut off a tail than was asked, and a bin more would be too much.
        let tail = (100.0 - percent) / 200.0 * x.len() as f64;
        let bin = histogram.width() as f32 * 1.01;
        let count = |f: &dyn Fn(f32) -> bool| x.iter().filter(|x| f(**x)).count() as f64;
        prop_assert!(count(&|x| x < lo) <= tail && count(&|x| x > hi) <= tail);
        prop_assert!(count(&|x| x <= lo + bin) > tail && count(&|x| x >= hi - bin) > tail);
    }

    #[test]
    fn a_histogram_gives_percentiles_to_a_bin(x in batch(), percent in 1.0..100.0_f64) {
        if x.is_empty() {
            return Ok(());
        }
        let mut histogram = Histogram::new();
        histogram.observe(&x).unwrap();
        let amax = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let got = histogram.percentile_abs(percent).unwrap();
        prop_assert!(got <= amax);
        // At least the share asked for lies at or below it, and less in the bins before its own.
        let share = |limit: f64| x.iter().filter(|x| f64::from(x.abs()) <= limit).count();
        let target = percent / 100.0 * x.len() as f64;
        prop_assert!(share(f64::from(got)) as f64 >= target - 1e-9);
        let below = f64::from(got) - histogram.width() * 1.01;
        prop_assert!(below < 0.0 || (share(below) as f64) < target + 1e-9);
    }
}
