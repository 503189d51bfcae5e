//! Round to nearest on one thread, in GB/s of f32 read.
//!
//! `cargo bench -p lowbit-benches --bench quantize`. Weights are 4096 x 4096 (64 MiB, read from
//! memory), activations one row of 4096 (in cache).
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowbit::{
    Fit, Granularity, Mat, QMatrix, QuantScheme, Range, Rounding, SymmetricScale, group_sums,
    quantize_row_int8, quantize_row_uint8,
};

fn quantize(c: &mut Criterion) {
    let mut group = c.benchmark_group("quantize");
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_millis(1500));

    let mut state = 1_u64;
    let mut value = |_, _| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let w = Mat::from_fn(4096, 4096, &mut value);
    let bytes = size_of_val(w.data()) as u64;
    group.throughput(Throughput::Bytes(bytes));
    let mut copy = w.clone();
    group.bench_function("copy/64MiB", |b| {
        b.iter(|| copy.data_mut().copy_from_slice(black_box(w.data())));
    });
    let mut bench = |name: &str, scheme: QuantScheme, fit: Fit| {
        group.bench_function(format!("{name}/64MiB"), |b| {
            b.iter(|| QMatrix::quantize_with(black_box(w.as_ref()), scheme, &fit, None).unwrap());
        });
    };
    let groups = Granularity::PerGroup;
    for (name, scheme) in [
        ("int8", QuantScheme::symmetric(8, Granularity::PerChannel)),
        ("int8-zp", QuantScheme::affine(8, Granularity::PerChannel)),
        ("int8-g128", QuantScheme::symmetric(8, groups(128))),
        ("int4", QuantScheme::symmetric(4, Granularity::PerChannel)),
        ("int4-g128", QuantScheme::symmetric(4, groups(128))),
        ("int4-g32", QuantScheme::symmetric(4, groups(32))),
        ("int4-g32-zp", QuantScheme::affine(4, groups(32))),
        ("int3-g32", QuantScheme::symmetric(3, groups(32))),
    ] {
        bench(name, scheme, Fit::NEAREST);
    }
    let g32 = QuantScheme::symmetric(4, groups(32));
    let stochastic = Rounding::Stochastic { seed: 1 };
    bench("int4-g32-stochastic", g32, Fit { rounding: stochastic, ..Fit::NEAREST });
    let extreme = SymmetricScale::SignedExtreme;
    bench("int4-g32-extreme", g32, Fit { symmetric: extreme, ..Fit::NEAREST });
    bench("int4-g32-mse", g32, Fit { range: Range::MSE, ..Fit::NEAREST });

    let k = 4096;
    let x = &w.data()[..k];
    let mut codes = vec![0_i8; k];
    let mut unsigned = vec![0_u8; k];
    let mut sums = vec![0_i32; k / 128];
    group.throughput(Throughput::Bytes(4 * k as u64));
    group.bench_function("activation-int8/16KiB", |b| {
        b.iter(|| quantize_row_int8(black_box(x), &mut codes));
    });
    group.bench_function("activation-int8-sums/16KiB", |b| {
        b.iter(|| {
            let scale = quantize_row_int8(black_box(x), &mut codes);
            group_sums(&codes, 128, &mut sums);
            scale
        });
    });
    group.bench_function("activation-uint8/16KiB", |b| {
        b.iter(|| quantize_row_uint8(black_box(x), &mut unsigned));
    });
    group.finish();
}

criterion_group!(benches, quantize);
criterion_main!(benches);
