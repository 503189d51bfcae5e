//! Golden vectors, made by other programs than this one: every kernel gives their integers.
//!
//! * `MATMUL` of lowbit-core's tests: onnxruntime 1.31.1, `MatMulInteger` and `QLinearMatMul`.
//! * `s8_*` and `madd_*`: exact integer arithmetic in numpy. The sums of `madd` are those of `vpdpbusd`;
//!   the pairs of some rows do not fit the 16 bits of `vpmaddubsw`.
//! * `llm_int8_*`: LLM.int8() in numpy (integers, then float64), threshold 6, on the input and weight that
//!   lowbit-algorithms tests SmoothQuant with.

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Context, Granularity, Linear, Mat,
    OutlierColumns, Outliers, QLinear, QMatrix, QuantScheme, ScaleFormat, ZeroFormat, f16, presets,
};
use lowbit_kernels::{Input, Output, PackedLinear, kernels};

#[path = "../../lowbit-core/tests/golden/mod.rs"]
mod golden;

/// A layer with these weights, less their zeros, and a scale of `scale`.
fn layer(w: &Mat<i8>, zeros: &[i8], scale: f32) -> QLinear {
    let unsigned = |x: &i8| (*x as u8) ^ 128;
    let scheme = QuantScheme {
        zero: ZeroFormat::Int,
        scale_format: ScaleFormat::F32,
        ..QuantScheme::affine(8, Granularity::PerChannel)
    };
    let (n, k) = (w.rows(), w.cols());
    let zeros: Vec<u8> = (0..n).map(|r| unsigned(&zeros[r % zeros.len()])).collect();
    let codes = w.data().iter().map(unsigned).collect();
    let q = QMatrix::from_parts(n, k, scheme, codes, scale.to_le_bytes().repeat(n), Some(zeros));
    let scales = ActivationScales::PerToken;
    let activation = ActivationScheme { dtype: ActivationType::UInt8, scales };
    QLinear::new(q.unwrap()).with_activation(Some(activation))
}

/// The integers that every kernel gives for `x − zero` by the layer.
fn integers(layer: &QLinear, x: &Mat<u8>, zero: u8) -> Vec<Mat<i32>> {
    let product = |kernel| {
        let packed = PackedLinear::with_kernel(layer, kernel).unwrap();
        let mut y = Mat::zeros(x.rows(), layer.out_features());
        let x = Input::UInt8 { codes: x.as_ref(), scales: &[1.0], zero_points: &[zero] };
        packed.forward_to(x, y.as_mut(), &mut Context::new()).unwrap();
        y
    };
    kernels().map(product).collect()
}

fn i32s(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().map(|&x| i32::from_le_bytes(x)).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
}

fn matmul() -> (Mat<u8>, Mat<i8>) {
    let (m, k, n) = golden::MATMUL_MKN;
    let w = Mat::from_fn(n, k, |j, i| golden::MATMUL_B[i * n + j]);
    (Mat::new(golden::MATMUL_A.to_vec(), m, k).unwrap(), w)
}

#[test]
fn zero_points_are_those_of_onnx() {
    let (x, w) = matmul();
    for (zeros, expected) in [
        (&[golden::MATMUL_ZB][..], &golden::MATMUL_C),
        (&golden::MATMUL_ZB_PER_COLUMN, &golden::MATMUL_C_PER_COLUMN),
    ] {
        for y in integers(&layer(&w, zeros, 1.0), &x, golden::MATMUL_ZA) {
            assert_eq!(y.data(), expected);
        }
    }
}

#[test]
fn results_in_uint8_are_those_of_onnx() {
    let (x, w) = matmul();
    let zero = (golden::MATMUL_Q_ZB_U8 ^ 128) as i8;
    let layer = layer(&w, &[zero], golden::MATMUL_Q_SB);
    for kernel in kernels() {
        let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
        let mut codes = Mat::zeros(x.rows(), w.rows());
        let x = Input::UInt8 {
            codes: x.as_ref(),
            scales: &[golden::MATMUL_Q_SA],
            zero_points: &[golden::MATMUL_ZA],
        };
        let (scale, zero_point) = (golden::MATMUL_Q_SY, golden::MATMUL_Q_ZY);
        let y = Output::UInt8 { codes: codes.as_mut(), scale, zero_point };
        packed.forward_to(x, y, &mut Context::new()).unwrap();
        assert_eq!(codes.data(), golden::MATMUL_Q_Y, "{kernel}");
    }
}

#[test]
fn signed_by_signed_bytes_down_to_minus_128_are_exact() {
    let bytes = |bytes: &[u8]| bytes.to_vec();
    let a = Mat::from_fn(7, 64, {
        let a = bytes(include_bytes!("golden/s8_a.i8"));
        move |r, c| a[r * 64 + c] ^ 128
    });
    assert!(a.data().contains(&0), "−128");
    let b = bytes(include_bytes!("golden/s8_b.i8"));
    let w = Mat::from_fn(16, 64, |j, i| b[i * 16 + j] as i8);
    let expected = i32s(include_bytes!("golden/s8_c.i32"));
    for y in integers(&layer(&w, &[0], 1.0), &a, 128) {
        assert_eq!(y.data(), expected);
    }
}

#[test]
fn pairs_that_saturate_elsewhere_are_exact() {
    let a = Mat::new(include_bytes!("golden/madd_a.u8").to_vec(), 50, 64).unwrap();
    let b = include_bytes!("golden/madd_b.i8");
    let w = Mat::from_fn(50, 64, |r, c| b[r * 64 + c] as i8);
    let expected = i32s(include_bytes!("golden/madd_sums.i32"));
    for y in integers(&layer(&w, &[0], 1.0), &a, 0) {
        let diagonal: Vec<_> = (0..50).map(|i| y.data()[i * 50 + i]).collect();
        assert_eq!(diagonal, expected);
    }
}

#[test]
fn llm_int8_is_that_of_the_paper() {
    let (m, n, k) = (10, 24, 96);
    let x = f32s(include_bytes!("../../lowbit-algorithms/tests/golden/smoothquant_x.f32"));
    let w = f32s(include_bytes!("../../lowbit-algorithms/tests/golden/smoothquant_w.f32"));
    let (x, w) = (Mat::new(x, m, k).unwrap(), Mat::new(w, n, k).unwrap());
    let is_outlier = |c: usize| (0..m).any(|r| x.data()[r * k + c].abs() >= 6.0);
    let (scheme, fit) = presets::bitsandbytes_int8();
    let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
    let layer = QLinear::new(q).with_activation(Some(ActivationScheme::INT8_PER_TOKEN));

    // A column that is large in one token leaves all of them, as in the paper.
    let known: Vec<_> = (0..k).filter(|&c| is_outlier(c)).collect();
    assert!(!known.is_empty());
    let rest = Mat::from_fn(m, k, |r, c| if is_outlier(c) { 0.0 } else { x.data()[r * k + c] });
    let sums = i32s(include_bytes!("golden/llm_int8_acc.i32"));
    for kernel in kernels() {
        let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
        let mut y = Mat::<i32>::zeros(m, n);
        packed.forward_to(rest.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
        assert_eq!(y.data(), sums, "{kernel}");
    }

    let columns = Mat::from_fn(known.len(), n, |i, j| f16::from_f32(w.data()[j * k + known[i]]));
    let columns = OutlierColumns::new(known.clone(), columns).unwrap();
    let layer = layer.with_outliers(Some(Outliers::Columns(columns))).unwrap();
    let expected = f32s(include_bytes!("../../lowbit-algorithms/tests/golden/llm_int8_y_f16.f32"));
    for kernel in kernels() {
        let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
        let mut y = Mat::zeros(m, n);
        packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
        for (i, (y, expected)) in y.data().iter().zip(&expected).enumerate() {
            let (r, j) = (i / n, i % n);
            let product = |&c: &usize| (x.data()[r * k + c] * w.data()[j * k + c]).abs();
            // There the weights of these columns are in f32, here in f16.
            let bound = 1e-5 + known.iter().map(product).sum::<f32>() / 2048.0;
            assert!((y - expected).abs() < bound, "{kernel}, {r}, {j}: {y}, {expected}");
        }
    }
}
