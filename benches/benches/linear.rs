//! Every kernel of this machine against a dense f32 product, on one thread.
//!
//! `cargo bench -p lowbit-benches --bench linear`; ids are `linear/m1/int4-g32/avx2`.

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowbit::{Calibration, Context, Linear, Mat, Method, PackedLinear, Quantizer, kernels};
use lowbit_benches::noise;
use lowbit_lm::DenseLinear;

const N: usize = 2048;
const K: usize = 2048;

fn linear(c: &mut Criterion) {
    let mut noise = noise(1);
    let w = Mat::from_fn(N, K, |_, _| noise());
    let dense = DenseLinear::new(w.as_ref(), None).expect("shapes fit");
    let calibration = Calibration::new(K);
    for m in [1, 16, 256] {
        let x = Mat::from_fn(m, K, |_, _| noise());
        let mut y = Mat::zeros(m, N);
        let mut ctx = Context::new();
        let mut group = c.benchmark_group(format!("linear/m{m}"));
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_secs(1))
            .throughput(Throughput::Elements((m * N * K) as u64));
        let mut run = |id: String, layer: &dyn Linear| {
            group.bench_function(id, |b| {
                b.iter(|| layer.forward(black_box(x.as_ref()), y.as_mut(), &mut ctx));
            });
        };
        run("f32/gemm".to_string(), &dense);
        for name in ["int8", "w8a8", "int4-g128", "int4-g32"] {
            let method = Method::named(name).expect("registered");
            let quantized =
                method.quantizer.quantize(w.as_ref(), &calibration, &mut Context::new());
            let layer = quantized.expect("finite").layer;
            for kernel in kernels().filter(|&kernel| m == 1 || kernel != "scalar") {
                let packed = PackedLinear::with_kernel(&layer, kernel).expect("available");
                run(format!("{name}/{kernel}"), &packed);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, linear);
criterion_main!(benches);
