//! What other systems compute, bit for bit.
//!
//! The vectors in `golden` come from onnxruntime 1.31.1 (`onnx_*`: QuantizeLinear with given scales
//! and zero-points, DynamicQuantizeLinear) and from the Python package gguf 0.19.0 (`gguf_*`: four
//! rows of 512 numbers, with blocks that are zero, constant, one-signed and tied for the maximum).

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Fit, Granularity, Mat, MatRef,
    QActivations, QMatrix, QuantScheme, fake_quant::Grid, presets, quantize_row_uint8,
};
use lowbit_dtypes::f16;

/// Takes values from the front of `bytes`.
struct Reader(&'static [u8]);

impl Reader {
    fn bytes(&mut self, count: usize) -> &'static [u8] {
        let (front, rest) = self.0.split_at(count);
        self.0 = rest;
        front
    }

    fn f32s(&mut self, count: usize) -> Vec<f32> {
        let words = self.bytes(4 * count).as_chunks::<4>().0;
        words.iter().map(|&word| f32::from_le_bytes(word)).collect()
    }

    fn i32s(&mut self, count: usize) -> Vec<i32> {
        let words = self.bytes(4 * count).as_chunks::<4>().0;
        words.iter().map(|&word| i32::from_le_bytes(word)).collect()
    }
}

fn codes(x: &[f32], scale: f32, zero: i32, range: core::ops::RangeInclusive<i32>) -> Vec<u8> {
    let grid = Grid::new(scale, zero, range).unwrap();
    x.iter().map(|&x| grid.code(x) as u8).collect()
}

#[test]
fn quantize_linear_of_onnx_runtime() {
    let mut golden = Reader(include_bytes!("golden/onnx_linear.bin"));
    let x = golden.f32s(1005);
    for range in [0..=255, -128..=127] {
        for _ in 0..4 {
            let (scale, zero) = (golden.f32s(1)[0], golden.i32s(1)[0]);
            let expected = golden.bytes(x.len());
            assert_eq!(codes(&x, scale, zero, range.clone()), expected, "{scale} {zero}");
            if *range.start() == 0 {
                // The same as a static activation scheme.
                let scales = ActivationScales::Static { scale, zero_point: zero as u8 };
                let scheme = ActivationScheme { dtype: ActivationType::UInt8, scales };
                let x = MatRef::new(&x, 1, x.len()).unwrap();
                let q = QActivations::quantize(x, scheme).unwrap();
                let expected: Vec<i16> = expected.iter().map(|&code| code.into()).collect();
                assert_eq!(q.row(0), Some(&expected[..]));
            }
        }
    }
}

#[test]
fn quantize_linear_of_onnx_runtime_per_axis_and_per_block() {
    let mut golden = Reader(include_bytes!("golden/onnx_blocks.bin"));
    let x = golden.f32s(6 * 64);
    let (scales, zeros) = (golden.f32s(6), golden.i32s(6));
    for ((x, scale), zero) in x.chunks(64).zip(scales).zip(zeros) {
        assert_eq!(codes(x, scale, zero, -128..=127), golden.bytes(64));
    }
    let scales = golden.f32s(6 * 4);
    for (x, scale) in x.chunks(16).zip(scales) {
        assert_eq!(codes(x, scale, 0, 0..=255), golden.bytes(16));
    }
}

#[test]
fn dynamic_quantize_linear_of_onnx_runtime() {
    let mut golden = Reader(include_bytes!("golden/onnx_dynamic.bin"));
    while !golden.0.is_empty() {
        let len = golden.i32s(1)[0] as usize;
        let x = golden.f32s(len);
        let (scale, zero) = (golden.f32s(1)[0], golden.i32s(1)[0]);
        let expected = golden.bytes(len);

        let mut codes = vec![0; len];
        let params = quantize_row_uint8(&x, &mut codes).unwrap();
        assert_eq!((params, &codes[..]), ((scale, zero as u8), expected));

        // The preset is the same rule for weights.
        let (scheme, fit) = presets::onnx(Granularity::PerTensor);
        let w = MatRef::new(&x, 1, len).unwrap();
        let q = QMatrix::quantize_with(w, scheme, &fit, None).unwrap();
        assert_eq!((q.codes(), q.params(0, 0).scale), (expected, scale));
    }
}

/// Compares codes, scales and offsets with blocks of a GGUF type: [d f16][m f16, if `offset`][high
/// bits, 4 bytes, if `bits` is 5][codes].
fn check_gguf((scheme, fit): (QuantScheme, Fit), bits: u32, offset: bool, golden: &'static [u8]) {
    let x = Reader(include_bytes!("golden/gguf_x.f32")).f32s(4 * 512);
    let w = Mat::new(x, 4, 512).unwrap();
    let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
    let mut golden = Reader(golden);
    let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    let mut row = [0; 512];
    for r in 0..4 {
        q.unpack_row(r, &mut row).unwrap();
        for (b, codes) in row.chunks(32).enumerate() {
            let params = q.params(r, b);
            let d = half(golden.bytes(2));
            // Where all weights are the same, their scale is 0 and ours not.
            assert!(
                d == params.scale || d == 0.0 && codes.windows(2).all(|c| c[0] == c[1]),
                "row {r}, block {b}"
            );
            if offset {
                assert_eq!(half(golden.bytes(2)), params.offset, "row {r}, block {b}");
            }
            let high =
                if bits == 5 { u32::from_le_bytes(golden.bytes(4).try_into().unwrap()) } else { 0 };
            let packed = golden.bytes(if bits == 8 { 32 } else { 16 });
            let expected: Vec<u8> = (0..32)
                .map(|j| match bits {
                    8 => packed[j] ^ 0x80, // −127..=127 there, 1..=255 here
                    _ => (packed[j % 16] >> (4 * (j / 16))) & 15 | ((high >> j) as u8 & 1) << 4,
                })
                .collect();
            assert_eq!(codes, expected, "row {r}, block {b}");
        }
    }
    assert!(golden.0.is_empty());
}

#[test]
fn the_five_simple_types_of_gguf() {
    check_gguf(presets::gguf_q4_0(), 4, false, include_bytes!("golden/gguf_q4_0.bin"));
    check_gguf(presets::gguf_q4_1(), 4, true, include_bytes!("golden/gguf_q4_1.bin"));
    check_gguf(presets::gguf_q5_0(), 5, false, include_bytes!("golden/gguf_q5_0.bin"));
    check_gguf(presets::gguf_q5_1(), 5, true, include_bytes!("golden/gguf_q5_1.bin"));
    check_gguf(presets::gguf_q8_0(), 8, false, include_bytes!("golden/gguf_q8_0.bin"));
}

/// users' conventions: what each makes of a group whose largest weight is 1.0
#[test]
fn scales_are_those_that_the_presets_name() {
    let w = Mat::from_fn(1, 32, |_, c| if c == 3 { 1.0 } else { -(c as f32) / 64.0 });
    let g = Granularity::PerGroup(32);
    for ((scheme, fit), scale) in [
        (presets::gptq_sym(4, g), 1.0 / 7.5),
        (presets::awq_sym(4, g), 1.0 / 7.0),
        (presets::compressed_tensors_sym(8, g), 1.0 / 127.5),
        (presets::onnx_sym(g), 1.0 / 127.0),
        (presets::bitsandbytes_int8(), 1.0 / 127.0),
        (presets::gguf_q4_0(), 1.0 / -8.0),
        (presets::gptq(4, g), (1.0 + 31.0 / 64.0) / 15.0),
        (presets::awq(4, g), (1.0 + 31.0 / 64.0) / 15.0),
        (presets::compressed_tensors(4, g), (1.0 + 31.0 / 64.0) / 15.0),
        (presets::hqq(4, g), (1.0 + 31.0 / 64.0) / 15.0),
    ] {
        let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
        assert_eq!(q.params(0, 0).scale, scheme.scale_format.round(scale));
    }
}
