//! A warm context allocates nothing: not for any kernel, nor for outliers, nor on a pool.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Context, Granularity, Linear, Mat,
    Outliers, QLinear, QMatrix, QuantScheme, Transform, f16,
};
use lowbit_kernels::{
    Input, Output, PackedLinear, Route, forward_experts, forward_shared, kernels,
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The only test of this file, so that nobody else allocates meanwhile.
///
/// On a pool it runs on one of the pool's threads. From outside, rayon hands the work over through
/// a queue that allocates a block once in a while.
#[test]
fn a_warm_context_allocates_nothing() {
    let (m, n, k) = (40, 100, 300);
    let w = Mat::from_fn(n, k, |r, c| ((r * k + c) as f32).sin());
    let x = Mat::from_fn(m, k, |r, c| ((r * k + c) as f32).cos() * 7.0);
    let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(4, Granularity::PerGroup(32)));
    let layer = QLinear::new(q.unwrap()).with_bias(Some(vec![1.0; n])).unwrap();
    let int8 = layer.clone().with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let outliers = int8.clone().with_outliers(Some(Outliers::Threshold(6.0))).unwrap();
    let rotated = int8.clone().with_transforms(vec![Transform::hadamard(k, 1)]).unwrap();
    let uint8 = layer.clone().with_activation(Some(ActivationScheme {
        dtype: ActivationType::UInt8,
        scales: ActivationScales::PerTokenGroup(64),
    }));
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    // Threads that start allocate: all of them have started, and taken work, before anything counts.
    for _ in 0..100 {
        pool.broadcast(|_| ());
        pool.install(|| rayon::join(|| (), || ()));
    }
    let count = |what: &str, run: &mut (dyn FnMut(&mut Context) + Send)| {
        let mut count = |ctx: &mut Context| {
            (0..3).for_each(|_| run(ctx));
            let before = ALLOCATIONS.load(Ordering::SeqCst);
            (0..10).for_each(|_| run(ctx));
            ALLOCATIONS.load(Ordering::SeqCst) - before
        };
        assert_eq!(count(&mut Context::new()), 0, "{what}");
        let on_pool = pool.install(|| count(&mut Context::with_pool(pool.clone())));
        assert_eq!(on_pool, 0, "{what}, on a pool");
    };
    let mut y = Mat::zeros(m, n);
    let mut halves = Mat::<f16>::zeros(m, n);
    let mut codes = Mat::<u8>::zeros(m, n);
    let embedding =
        QMatrix::quantize(w.as_ref(), QuantScheme::affine(4, Granularity::PerGroup(32)));
    let embedding = embedding.unwrap();
    let mut gathered = Mat::zeros(3, k);
    count("gathered rows", &mut |_| {
        embedding.dequantize_rows(&[7, 99, 7], gathered.as_mut()).unwrap();
    });
    let routes: Vec<_> = (0..80).map(|i| Route { token: i / 2, expert: i * 7 % 3 }).collect();
    let mut routed = Mat::zeros(routes.len(), n);
    let mut other = Mat::zeros(m, n);
    let int8_x = Mat::from_fn(m, k, |r, c| (r * k + c) as i8 / 2);
    for kernel in kernels() {
        for layer in [&layer, &int8, &uint8, &outliers, &rotated] {
            let packed = PackedLinear::with_kernel(layer, kernel).unwrap();
            count(&format!("{packed:?}"), &mut |ctx| {
                packed.forward(x.as_ref(), y.as_mut(), ctx).unwrap();
            });
        }
        for layer in [&layer, &rotated] {
            let packed = PackedLinear::with_kernel(layer, kernel).unwrap();
            count(&format!("{packed:?}, shared"), &mut |ctx| {
                let outputs = &mut [y.as_mut(), other.as_mut()];
                forward_shared(&[&packed, &packed], x.as_ref(), outputs, ctx).unwrap();
            });
            let experts = vec![packed; 3];
            count(&format!("{:?}, as experts", experts[0]), &mut |ctx| {
                forward_experts(&experts, &routes, x.as_ref(), routed.as_mut(), ctx).unwrap();
            });
        }
        let packed = PackedLinear::with_kernel(&int8, kernel).unwrap();
        count(&format!("{kernel}, codes to halves"), &mut |ctx| {
            let x = Input::Int8 { codes: int8_x.as_ref(), scales: &[0.1] };
            packed.forward_to(x, halves.as_mut(), ctx).unwrap();
        });
        count(&format!("{kernel}, numbers to codes"), &mut |ctx| {
            let y = Output::UInt8 { codes: codes.as_mut(), scale: 0.1, zero_point: 100 };
            packed.forward_to(x.as_ref(), y, ctx).unwrap();
        });
    }
}
