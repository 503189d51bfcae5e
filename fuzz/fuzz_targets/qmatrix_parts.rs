//! Bytes of the right length make a matrix whose every accessor works, others an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::{Granularity, Mat, QMatrix, QuantScheme, ScaleFormat, ZeroFormat};

fuzz_target!(|input: (u8, u8, u8, u8, u8, u8, u8, u8, &[u8])| {
    let (rows, cols, bits, granularity, a, b, zero, wrong, data) = input;
    let (rows, cols) = (usize::from(rows % 40), usize::from(cols % 40));
    let granularity = match granularity % 5 {
        0 => Granularity::PerTensor,
        1 => Granularity::PerChannel,
        2 => Granularity::PerColumn,
        3 => Granularity::PerGroup(a.into()),
        _ => Granularity::PerBlock(a.into(), b.into()),
    };
    let zero = match zero % 4 {
        0 => ZeroFormat::Midpoint,
        1 => ZeroFormat::Int,
        2 => ZeroFormat::Real(ScaleFormat::F16),
        _ => ZeroFormat::Offset(ScaleFormat::F32),
    };
    let scheme = QuantScheme { zero, ..QuantScheme::affine(bits, granularity) };
    // Quantizing zeros tells how long the buffers are; `wrong` makes one of them longer.
    let Ok(model) = QMatrix::quantize(Mat::zeros(rows, cols).as_ref(), scheme) else { return };
    let buffer = |len: usize, longer: bool| {
        data.iter().copied().cycle().chain([0]).take(len + usize::from(longer)).collect::<Vec<u8>>()
    };
    let codes = buffer(model.codes().len(), wrong == 1);
    let scales = buffer(model.scales().len(), wrong == 2);
    let zeros = model.zeros().map(|zeros| buffer(zeros.len(), wrong == 3));
    if let Ok(q) = QMatrix::from_parts(rows, cols, scheme, codes, scales, zeros) {
        assert_eq!(q.bytes(), model.bytes());
        assert_eq!(q.dequantize().data().len(), rows * cols);
    }
});
