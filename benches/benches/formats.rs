//! Layers in and out of files, on one thread, in GB/s of the f32 that they stand for.
//!
//! `cargo bench -p lowbit-benches --bench formats`. Weights are 4096 x 4096 (64 MiB of f32).
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowbit::{
    Fit, Granularity, Mat, QLinear, QMatrix, QuantScheme, dtypes::Format, formats::conventions::*,
    presets,
};

fn formats(c: &mut Criterion) {
    let mut group = c.benchmark_group("formats");
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_millis(800));

    let mut state = 1_u64;
    let w = Mat::from_fn(4096, 4096, |_, _| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    });
    group.throughput(Throughput::Bytes(size_of_val(w.data()) as u64));
    let mut out = Mat::zeros(4096, 4096);
    let row = Granularity::PerChannel;
    let groups = Granularity::PerGroup;
    let nearest = |scheme| (scheme, Fit::NEAREST);
    let int4 = nearest(QuantScheme::symmetric(4, groups(128)));
    let int4_g32 = nearest(QuantScheme::symmetric(4, groups(32)));
    let gptq3 = nearest(QuantScheme::symmetric(3, groups(128)));
    let mut bench = |name: &str, (scheme, fit): (QuantScheme, Fit), convention: &dyn Convention| {
        let quantize = || QMatrix::quantize_with(w.as_ref(), scheme, &fit, None).unwrap();
        group.bench_function(format!("{name}/round"), |b| b.iter(quantize));
        let layer = QLinear::new(quantize());
        group.bench_function(format!("{name}/write"), |b| {
            b.iter(|| convention.write(black_box(&layer), "x").unwrap());
        });
        let tensors = convention.write(&layer, "x").unwrap();
        group.bench_function(format!("{name}/read"), |b| {
            b.iter(|| convention.read(black_box(&tensors), "x").unwrap());
        });
        group.bench_function(format!("{name}/dequantize"), |b| {
            b.iter(|| black_box(&layer).weight().dequantize_into(out.as_mut()));
        });
    };
    bench("lowbit int4-g128", int4, &Lowbit);
    bench("gptq int4-g128", int4, &Gptq::default());
    bench("gptq int3-g128", gptq3, &Gptq::default());
    bench("awq int4-g128", int4, &Awq::default());
    bench("awq int4-g128-zp", nearest(QuantScheme::affine(4, groups(128))), &Awq::default());
    bench("bnb int8", presets::bitsandbytes_int8(), &BnbInt8 { threshold: None });
    bench("bnb nf4-g64", presets::nf4(groups(64)), &Bnb4);
    bench("compressed-tensors int4-g128", int4, &CompressedPacked::default());
    bench("compressed-tensors fp8", presets::fp8(Format::F8E4M3, row), &CompressedFloat::default());
    bench("compressed-tensors nvfp4", presets::nvfp4(), &Nvfp4 { reciprocal: true });
    bench("ggml Q4_0", int4_g32, &Ggml);
    bench("ggml Q8_0", nearest(QuantScheme::symmetric(8, groups(32))), &Ggml);
    bench("ggml MXFP4", presets::mx(Format::F4E2M1), &Ggml);
    group.finish();
}

criterion_group!(benches, formats);
criterion_main!(benches);
