//! A safetensors file of any tensors: every convention makes a layer of them or an error, and what a
//! layer is written as is read as the same weights.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::formats::{
    Safetensors,
    conventions::{
        Awq, AwqVersion, Bnb4, BnbInt8, CompressedFloat, CompressedInt, CompressedPacked,
        Convention, Fp8, GptOss, Gptq, Lowbit, Mxfp4, Nvfp4,
    },
};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Safetensors::new("fuzz", bytes) else { return };
    let conventions: [&dyn Convention; 14] = [
        &Gptq::default(),
        &Gptq { v2: true, symmetric: true, ..Gptq::default() },
        &Awq::default(),
        &Awq { version: AwqVersion::Gemv, group_size: Some(32) },
        &BnbInt8 { threshold: Some(6.0) },
        &Bnb4,
        &CompressedPacked::default(),
        &CompressedInt { dynamic: true },
        &CompressedFloat::default(),
        &Fp8::default(),
        &Mxfp4,
        &GptOss { experts: 1 },
        &Nvfp4 { reciprocal: false },
        &Lowbit,
    ];
    for convention in conventions {
        let Ok(layer) = convention.read(&file, "l") else { continue };
        let weights = layer.weight().dequantize();
        let Ok(tensors) = convention.write(&layer, "l") else { continue };
        let back = convention.read(&tensors, "l").expect("what was written is read");
        let back = back.weight().dequantize();
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        // bitsandbytes stores 127 times the scale.
        assert!(
            convention.name() == "bitsandbytes int8"
                || weights.data().iter().zip(back.data()).all(same)
        );
    }
});
