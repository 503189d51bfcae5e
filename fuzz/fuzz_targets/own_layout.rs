//! A layer in this project's own layout whose header claims any shape and whose buffers have any length: it
//! is an error, or everything that is done with a layer works.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::{
    ActivationScheme, Context, Granularity, Linear, Mat, PackedLinear, QLinear, QMatrix,
    QuantScheme, ScaleFormat, Transform, ZeroFormat,
    formats::{
        Tensor,
        conventions::{Convention, Lowbit},
    },
    presets,
};

fuzz_target!(|input: (u64, u64, u8, u8, u8, u8, &[u8])| {
    let (rows, cols, shifts, scheme, terms, wrong, data) = input;
    // Small sizes that may fit, and any others.
    let (rows, cols) = (rows >> (shifts & 15) * 4, cols >> (shifts >> 4) * 4);
    let (n, k) = ((rows % 9) as usize + 1, (cols % 70) as usize + 1);
    let g16 = Granularity::PerGroup(16);
    let scheme = match scheme % 6 {
        0 => QuantScheme::symmetric(4, g16),
        1 => QuantScheme::affine(3, Granularity::PerBlock(2, 8)),
        2 => presets::nvfp4().0,
        3 => presets::mx(lowbit::dtypes::Format::F8E4M3).0,
        4 => presets::nf4(Granularity::PerChannel).0,
        _ => QuantScheme {
            zero: ZeroFormat::Offset(ScaleFormat::F16),
            ..QuantScheme::affine(8, Granularity::PerTensor)
        },
    };
    let w = Mat::from_fn(n, k, |r, c| ((r * k + c) as f32).sin());
    let Ok(weight) = QMatrix::quantize(w.as_ref(), scheme) else { return };
    let transforms = if terms & 1 == 1 { vec![Transform::hadamard(k, 1)] } else { vec![] };
    let int8 = (terms & 2 == 2).then_some(ActivationScheme::INT8_PER_TOKEN);
    let layer = QLinear::new(weight).with_transforms(transforms).unwrap().with_activation(int8);
    let mut tensors = Lowbit.write(&layer, "l").expect("any layer with elements can be written");

    // The header's shape, and one buffer.
    let header = String::from_utf8(tensors[0].bytes.clone()).expect("JSON");
    let shape = |n: u64, k: u64| format!("\"shape\":[{n},{k}]");
    let claimed = if wrong & 64 == 64 { shape(n as u64, k as u64) } else { shape(rows, cols) };
    let header = header.replace(&shape(n as u64, k as u64), &claimed);
    tensors[0] = Tensor::new("l.lowbit", tensors[0].dtype, vec![header.len()], header.into_bytes());
    let at = usize::from(wrong & 15);
    if let Some(tensor) = tensors.get_mut(at).filter(|_| at > 0) {
        let len = if wrong & 16 == 16 { data.len() } else { tensor.bytes.len() };
        tensor.bytes = data.iter().copied().cycle().take(len * data.len().min(1)).collect();
        if let [len] = &mut tensor.shape[..] {
            *len = tensor.bytes.len();
        }
    }

    let Ok(layer) = Lowbit.read(&tensors, "l") else { return };
    let weight = layer.weight();
    // As `lowbit inspect` walks over it.
    let mut codes = vec![0; weight.cols()];
    for row in 0..weight.rows() {
        weight.unpack_row(row, &mut codes).expect("a row that is there");
    }
    let (down, across) = weight.grid();
    for block in 0..down * across {
        let params = weight.params(block / across, block % across);
        assert!(params.scale.is_finite() && params.zero.is_finite() && params.offset.is_finite());
    }
    assert_eq!(weight.dequantize().data().len(), weight.rows() * weight.cols());
    let back = Lowbit.read(&Lowbit.write(&layer, "l").expect("it was read"), "l");
    assert_eq!(back.expect("it was written"), layer);
    if let Ok(packed) = PackedLinear::new(&layer) {
        let (x, mut y) = (Mat::zeros(2, weight.cols()), Mat::zeros(2, weight.rows()));
        packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).expect("zeros are finite");
    }
});
