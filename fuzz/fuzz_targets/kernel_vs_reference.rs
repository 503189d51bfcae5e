//! Every kernel multiplies by any int8-activated layer as the reference does, bit for bit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::{
    ActivationScheme, Context, Granularity, Linear, Mat, PackedLinear, QLinear, QMatrix,
    QuantScheme, ZeroFormat, kernels,
};

fuzz_target!(|input: (u8, u8, u8, u8, u8, bool, &[u8])| {
    let (m, n, k, bits, group_size, symmetric, data) = input;
    let (m, n, k) = (usize::from(m % 6), usize::from(n % 70), usize::from(k));
    let value = |i: usize| data.get(i % data.len().max(1)).map_or(0.0, |&b| f32::from(b) - 128.0);
    let w = Mat::from_fn(n, k, |r, c| value(r * k + c));
    let x = Mat::from_fn(m, k, |r, c| value(r + c * 7));
    let zero = if symmetric { ZeroFormat::Midpoint } else { ZeroFormat::Int };
    let scheme =
        QuantScheme { zero, ..QuantScheme::affine(bits, Granularity::PerGroup(group_size.into())) };
    let Ok(q) = QMatrix::quantize(w.as_ref(), scheme) else { return };
    let layer = QLinear::new(q).with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let mut expected = Mat::zeros(m, n);
    layer.forward(x.as_ref(), expected.as_mut(), &mut Context::new()).unwrap();
    for kernel in kernels() {
        let packed = PackedLinear::with_kernel(&layer, kernel).unwrap();
        let mut y = Mat::zeros(m, n);
        packed.forward(x.as_ref(), y.as_mut(), &mut Context::new()).unwrap();
        assert_eq!(y, expected, "{kernel}");
    }
});
