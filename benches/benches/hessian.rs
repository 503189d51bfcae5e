//! Calibration with the second moment, `H += xᵀx` for x of 512 tokens, beside the f32 product of
//! the same sizes by `gemm-f32` (k x 512 by 512 x k, which is twice the work that a triangle needs
//! and has no sums in f64), and calibration without it.
//!
//! `cargo bench -p lowbit-benches --bench hessian`; ids are `hessian/k1024-t1/observe`.

use std::{hint::black_box, sync::Arc, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowbit::{Calibration, Context, Mat, MatRef};
use lowbit_benches::noise;
use rayon::prelude::*;

const TOKENS: usize = 512;

fn hessian(c: &mut Criterion) {
    let mut noise = noise(1);
    for (k, threads) in [(1024, 1), (2048, 1), (1024, 2), (2048, 2)] {
        let x = Mat::from_fn(TOKENS, k, |_, _| noise());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = Arc::new(pool.expect("threads"));
        let mut ctx = Context::with_pool(pool.clone());
        let mut group = c.benchmark_group(format!("hessian/k{k}-t{threads}"));
        group
            .sample_size(30)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(2))
            .throughput(Throughput::Elements((2 * TOKENS * k * k) as u64));
        let mut y = vec![0.0; k * k];
        group.bench_function("gemm", |b| {
            let strip = (k / threads) * k;
            b.iter(|| {
                let strips = y.par_chunks_mut(strip).enumerate();
                pool.install(|| {
                    strips.for_each(|(i, y)| gemm(black_box(x.as_ref()), i * k / threads, y));
                });
            });
        });
        let mut with = Calibration::with_second_moment(k).expect("memory");
        group.bench_function("observe", |b| {
            b.iter(|| with.observe(black_box(x.as_ref()), &mut ctx).expect("finite"));
        });
        let mut without = Calibration::new(k);
        group.bench_function("observe-without", |b| {
            b.iter(|| without.observe(black_box(x.as_ref()), &mut ctx).expect("finite"));
        });
        group.finish();
    }
}

/// Columns of `xᵀx` from `first` on, as many as `y` has rows of k.
#[allow(unsafe_code, reason = "gemm takes pointers")]
fn gemm(x: MatRef<'_, f32>, first: usize, y: &mut [f32]) {
    let ((tokens, k), x) = (x.shape(), x.data());
    let columns = y.len() / k;
    assert!(x.len() == tokens * k && first + columns <= k && columns * k == y.len());
    // SAFETY: gemm reads x[t·k + i] and x[t·k + first + j] and writes y[j·k + i] for i < k,
    // j < columns, t < tokens: within the slices by the assertion. y is borrowed mutably, and not
    // read (`read_dst` is false).
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            k,
            columns,
            tokens,
            y.as_mut_ptr(),
            k as isize, // column stride, then row stride
            1,
            false,
            x.as_ptr(),
            k as isize,
            1,
            x[first..].as_ptr(),
            1,
            k as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

criterion_group!(benches, hessian);
criterion_main!(benches);
