//! Blocks of any type and any bytes: decoding to f32 and to a layer agree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::formats::{
    Dtype, Tensor, TensorSource,
    conventions::{Convention, Ggml},
    gguf::Gguf,
};

fuzz_target!(|bytes: &[u8]| {
    // The first byte is the type, as in a GGUF file of one tensor; the rest is its data.
    let Some((&id, data)) = bytes.split_first() else { return };
    let mut header = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend(1_u64.to_le_bytes());
    header.extend(b"w\x01\0\0\0");
    header.extend(256_u64.to_le_bytes());
    header.extend(u32::from(id).to_le_bytes());
    header.extend([0; 8]);
    header.resize(header.len().next_multiple_of(32), 0);
    header.extend(data);
    let Ok(file) = Gguf::new("fuzz", header) else { return };
    let Ok(view) = file.tensor("w") else { return };
    let (Dtype::Ggml(_), Ok(expected)) = (view.dtype, view.to_f32()) else { return };
    let tensors = vec![Tensor::new("l.weight", view.dtype, vec![1, 256], view.bytes.to_vec())];
    let Ok(layer) = Ggml.read(&tensors, "l") else { return };
    for (a, b) in layer.weight().dequantize().data().iter().zip(&expected) {
        assert!(a == b || a.is_nan() && b.is_nan());
    }
});
