//! Rows gathered from a quantized matrix, and the whole matrix, against one number at a time.

use lowbit_core::{
    Error, Granularity, Mat, OutlierColumns, Outliers, QLinear, QMatrix, QuantScheme,
    testing::{proptest::prelude::*, strategies},
};

/// What [`QMatrix::dequantize`] promises for row `r`.
fn row(q: &QMatrix, r: usize) -> Vec<f32> {
    let (rows, cols) = q.block();
    let mut codes = vec![0; q.cols()];
    q.unpack_row(r, &mut codes).unwrap();
    let real = |(c, &code)| q.params(r / rows, c / cols).real(q.scheme().dtype.level(code));
    codes.iter().enumerate().map(real).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_row_or_column_that_is_not_there_is_named() {
    let q = QMatrix::quantize(
        Mat::zeros(5, 3).as_ref(),
        QuantScheme::symmetric(4, Granularity::PerChannel),
    );
    let q = q.unwrap();
    let error = q.unpack_row(9, &mut [0; 3]).unwrap_err();
    assert_eq!(error.to_string(), "row of a matrix: expected 0 to 4, got 9");
    let known = OutlierColumns::new(vec![1, 7], Mat::zeros(2, 5)).unwrap();
    let error = QLinear::new(q).with_outliers(Some(Outliers::Columns(known))).unwrap_err();
    assert_eq!(error.to_string(), "outlier column: expected 0 to 2, got 7");
}

proptest! {
    /// Rows are unpacked in pieces of 512: up to three of them, and groups that straddle two.
    #[test]
    fn gathered_rows_are_those_of_the_dequantized_matrix(
        scheme in prop_oneof![strategies::level_schemes(700), strategies::schemes(700)],
        n in 1..7_usize,
        k in prop_oneof![0..40_usize, 500..530_usize, 1000..1300_usize],
        picks in prop::collection::vec(any::<u32>(), 0..9),
    ) {
        let w = Mat::from_fn(n, k, |r, c| ((r * k + c) as f32 * 0.37).sin());
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let whole = q.dequantize();
        for r in 0..n {
            let (got, expected) = (whole.as_ref().row(r).unwrap(), row(&q, r));
            prop_assert_eq!(bits(got), bits(&expected));
        }
        let ids: Vec<_> = picks.into_iter().map(|pick| pick % n as u32).collect();
        let mut gathered = Mat::zeros(ids.len(), k);
        q.dequantize_rows(&ids, gathered.as_mut()).unwrap();
        for (&id, got) in ids.iter().zip(gathered.as_ref().iter_rows()) {
            prop_assert_eq!(bits(got), bits(&row(&q, id as usize)));
        }
    }
}

#[test]
fn a_row_that_is_not_there_is_refused_before_anything_is_written() {
    let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(32));
    let q = QMatrix::quantize(Mat::from_fn(3, 40, |r, c| (r + c) as f32).as_ref(), scheme).unwrap();
    let mut to = Mat::from_fn(2, 40, |_, _| 7.0);
    let error = q.dequantize_rows(&[2, 3], to.as_mut()).unwrap_err();
    assert_eq!(error.to_string(), "row of a matrix: expected 0 to 2, got 3");
    for ids in [&[0][..], &[0, 1, 2]] {
        let error = q.dequantize_rows(ids, to.as_mut()).unwrap_err();
        assert!(matches!(error, Error::Shape { got: (2, 40), .. }), "{error}");
    }
    let mut narrow = Mat::from_fn(2, 39, |_, _| 7.0);
    assert!(q.dequantize_rows(&[0, 1], narrow.as_mut()).is_err());
    assert!(to.data().iter().chain(narrow.data()).all(|&x| x == 7.0));
}
