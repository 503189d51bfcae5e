//! The terms of a layer beside its quantized product: transforms, sparse weights, the adapter.

use lowbit_core::{
    ActivationScheme, Adapter, Context, Error, Granularity, Linear, Mat, OutlierColumns, Outliers,
    QLinear, QMatrix, QuantScheme, Result, SparseRows, Transform, f16,
};

const N: usize = 5;
const K: usize = 44;

const SIGNS: [i8; 16] = [-1, 1, 1, -1, 1, 1, 1, 1, -1, 1, 1, 1, 1, 1, 1, -1];

fn wave(rows: usize, cols: usize, seed: usize) -> Mat<f32> {
    Mat::from_fn(rows, cols, |r, c| (((r * cols + c) * 7 + seed) as f32 * 0.37).sin())
}

fn layer() -> QLinear {
    let scheme = QuantScheme::affine(4, Granularity::PerGroup(16));
    QLinear::new(QMatrix::quantize(wave(N, K, 1).as_ref(), scheme).unwrap())
}

fn transforms() -> Vec<Transform> {
    vec![
        Transform::Scale((0..K).map(|j| 0.5 + (j % 5) as f32).collect()),
        Transform::Permute((0..K as u32).map(|j| (j * 5 + 3) % K as u32).collect()),
        Transform::hadamard(K, 1),
    ]
}

fn sparse() -> SparseRows {
    let values = [0.5, -2.0, 0.25].map(f16::from_f32).to_vec();
    SparseRows::new(N, K, vec![0, 1, 1, 3, 3, 3], vec![43, 0, 7], values).unwrap()
}

fn forward(layer: &QLinear, x: &Mat<f32>) -> Result<Mat<f32>> {
    let mut y = Mat::zeros(x.rows(), layer.out_features());
    layer.forward(x.as_ref(), y.as_mut(), &mut Context::new())?;
    Ok(y)
}

#[test]
fn all_terms_together_are_the_product_with_the_effective_weight() {
    let columns = OutlierColumns::new(vec![3, 40], {
        let w = wave(2, N, 9);
        Mat::from_fn(2, N, |r, c| f16::from_f32(w.data()[r * N + c]))
    });
    let x = wave(3, K, 2);
    for outliers in [Outliers::Sparse(sparse()), Outliers::Columns(columns.unwrap())] {
        let layer = layer()
            .with_transforms(transforms())
            .and_then(|layer| layer.with_outliers(Some(outliers)))
            .and_then(|l| l.with_adapter(Some(Adapter::new(wave(2, K, 3), wave(N, 2, 4))?)))
            .and_then(|layer| layer.with_bias(Some(vec![0.5; N])))
            .unwrap();
        let w = layer.effective_weight().unwrap();
        let y = forward(&layer, &x).unwrap();
        for (x, y) in x.as_ref().iter_rows().zip(y.as_ref().iter_rows()) {
            for (w, y) in w.as_ref().iter_rows().zip(y) {
                let dot: f32 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                assert!((dot + 0.5 - y).abs() < 1e-4, "{dot} {y}");
            }
        }
    }
}

#[test]
fn sparse_weights_are_added_and_the_quantized_ones_stay() {
    let x = wave(2, K, 5);
    for activation in [None, Some(ActivationScheme::INT8_PER_TOKEN)] {
        let plain = layer().with_activation(activation);
        let mut expected = forward(&plain, &x).unwrap();
        sparse().add(x.as_ref(), expected.as_mut()).unwrap();
        let with = plain.with_outliers(Some(Outliers::Sparse(sparse()))).unwrap();
        assert_eq!(forward(&with, &x).unwrap(), expected);
    }
}

#[test]
fn an_outlier_threshold_looks_at_the_transformed_input() {
    let x = Mat::from_fn(1, K, |_, c| if c == 7 { 50.0 } else { 0.1 });
    let scale = Transform::Scale((0..K).map(|j| if j == 7 { 0.01 } else { 1.0 }).collect());
    let tamed = layer()
        .with_activation(Some(ActivationScheme::INT8_PER_TOKEN))
        .with_transforms(vec![scale])
        .unwrap();
    let guarded = tamed.clone().with_outliers(Some(Outliers::Threshold(6.0))).unwrap();
    assert_eq!(forward(&tamed, &x).unwrap(), forward(&guarded, &x).unwrap());
}

#[test]
fn bytes_count_every_term() {
    let plain = layer().bytes();
    let with = layer()
        .with_transforms(transforms())
        .and_then(|layer| layer.with_outliers(Some(Outliers::Sparse(sparse()))))
        .and_then(|l| l.with_adapter(Some(Adapter::new(wave(2, K, 3), wave(N, 2, 4))?)))
        .unwrap();
    // Places of a permutation, columns and starts are 32-bit integers in memory and in files.
    let transforms = 4 * K + 4 * K + K.div_ceil(8);
    let sparse = 3 * (2 + 4) + 4 * (N + 1);
    assert_eq!(with.bytes(), plain + transforms + sparse + 4 * (2 * K + N * 2));
}

#[test]
fn terms_of_another_layer_are_refused() {
    assert!(layer().with_transforms(vec![Transform::hadamard(K + 1, 1)]).is_err());
    assert!(layer().with_transforms(vec![Transform::Permute(vec![0; K])]).is_err());
    let adapter = Adapter::new(wave(2, K + 1, 3), wave(N, 2, 4)).unwrap();
    assert!(layer().with_adapter(Some(adapter)).is_err());
    assert!(Adapter::new(wave(2, K, 3), wave(N, 3, 4)).is_err());
    assert!(Adapter::new(Mat::new(vec![f32::NAN], 1, 1).unwrap(), wave(N, 1, 4)).is_err());

    let sparse = |starts: &[u32], columns: &[u32], values: &[f32]| {
        let values = values.iter().copied().map(f16::from_f32).collect();
        SparseRows::new(2, 3, starts.to_vec(), columns.to_vec(), values)
    };
    let fits = sparse(&[0, 2, 2], &[0, 2], &[1.0, 2.0]).unwrap();
    assert!(layer().with_outliers(Some(Outliers::Sparse(fits))).is_err());
    for (starts, columns, values) in [
        (&[0, 2][..], &[0, 2][..], &[1.0, 2.0][..]),
        (&[1, 2, 2], &[0, 2], &[1.0, 2.0]),
        (&[0, 2, 1], &[0], &[1.0]),
        (&[0, 2, 2], &[0], &[1.0, 2.0]),
        (&[0, 2, 2], &[0, 3], &[1.0, 2.0]),
        (&[0, 2, 2], &[2, 2], &[1.0, 2.0]),
        (&[0, 2, 2], &[0, 2], &[1.0, 1e30]),
    ] {
        assert!(sparse(starts, columns, values).is_err(), "{starts:?} {columns:?} {values:?}");
    }
}

#[test]
fn an_input_that_is_not_finite_is_named_by_its_own_place() {
    let layer = layer()
        .with_activation(Some(ActivationScheme::INT8_PER_TOKEN))
        .with_transforms(transforms())
        .unwrap();
    let mut x = wave(3, K, 2);
    x.data_mut()[K + 9] = f32::NAN;
    let expected = Error::NotFinite { what: "activation", row: 1, col: 9 };
    assert_eq!(forward(&layer, &x).unwrap_err(), expected);
}

/// `golden/rotation_x.f32` is X, `(10, 16)`, and `golden/rotation_xr.f32` X·R, both in f64 by an
/// independent program and rounded, for `R = H·D` with the Sylvester matrix over 4 and these signs.
/// Ours goes the other way: `R` is our `Mᵀ`.
#[test]
fn the_rotation_is_that_of_an_independent_program() {
    let read = |bytes: &[u8]| {
        let numbers = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        Mat::new(numbers.collect(), 10, 16).unwrap()
    };
    let x = read(include_bytes!("golden/rotation_x.f32"));
    let expected = read(include_bytes!("golden/rotation_xr.f32"));
    let transform = Transform::Hadamard { negate: SIGNS.map(|sign| sign < 0).to_vec() };
    let mut rotated = x.clone();
    transform.undo_on_weight(&mut rotated).unwrap();
    for (got, expected) in rotated.data().iter().zip(expected.data()) {
        assert!((got - expected).abs() <= 2e-6, "{got} {expected}");
    }
    transform.apply_to_weight(&mut rotated).unwrap();
    for (got, expected) in rotated.data().iter().zip(x.data()) {
        assert!((got - expected).abs() <= 2e-6, "{got} {expected}");
    }
}
