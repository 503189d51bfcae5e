//! What a plan announces is what a method takes, to a tenth.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use lowbit_algorithms::{Calibration, Gptq, Obq, Order, OutlierRule, Quantizer, Rtn, Spqr};
use lowbit_core::{Context, Granularity, Mat, QuantScheme};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(now, Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let now = NOW.fetch_add(size, Ordering::SeqCst) + size - layout.size();
        NOW.fetch_sub(layout.size(), Ordering::SeqCst);
        PEAK.fetch_max(now, Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn noise(rows: usize, cols: usize, seed: usize) -> Mat<f32> {
    Mat::from_fn(rows, cols, |r, c| {
        let x = ((r * cols + c + 1000 * seed) as f64 * 12.9898).sin() * 43_758.545_3;
        (x - x.floor()) as f32 - 0.5
    })
}

/// The only test of this file, so that nobody else allocates meanwhile.
#[test]
fn a_plan_announces_the_memory_that_is_taken() {
    let group = |size| QuantScheme::affine(4, Granularity::PerGroup(size));
    let row = QuantScheme::symmetric(4, Granularity::PerChannel);
    let improved = |scheme| Gptq { sweeps: 2, refits: 1, ..Gptq::improved(scheme) };
    let sorted = Gptq { order: Order::Sorted, ..Gptq::new(group(64)) };
    let spqr = Spqr { outliers: OutlierRule::Threshold(0.2), ..Spqr::new(4) };
    type Case = (&'static str, (usize, usize), Box<dyn Quantizer>);
    let cases: [Case; 9] = [
        ("rtn", (512, 512), Box::new(Rtn::new(group(32)))),
        ("gptq", (128, 384), Box::new(Gptq::new(group(32)))),
        ("gptq of rows", (1024, 256), Box::new(Gptq::new(row))),
        ("gptq sorted", (64, 448), Box::new(sorted)),
        ("improved", (128, 320), Box::new(improved(group(64)))),
        // The normal equations of 128 groups in each of five bands.
        ("improved, many groups", (160, 256), Box::new(improved(group(2)))),
        ("spqr", (128, 320), Box::new(spqr)),
        ("obq", (16, 256), Box::new(Obq::new(row))),
        ("obq wide", (8, 320), Box::new(Obq::new(group(32)))),
    ];
    // Threads live until the end: what one of them frees when it ends would count as taken less.
    let pools = [1, 4].map(|threads| {
        Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
    });
    for (name, (n, k), method) in cases {
        let (w, mut calibration) = (noise(n, k, 1), Calibration::with_second_moment(k).unwrap());
        calibration.observe(noise(2 * k, k, 2).as_ref(), &mut Context::new()).unwrap();
        let plan = method.plan(n, k).unwrap();
        for pool in &pools {
            let threads = pool.current_num_threads();
            let ctx = &mut Context::with_pool(pool.clone());
            // Linear algebra keeps buffers for each thread, which begin to exist in one run or another.
            let runs = (0..threads + 2).map(|_| {
                let before = NOW.load(Ordering::SeqCst);
                PEAK.store(before, Ordering::SeqCst);
                let quantized = method.quantize(w.as_ref(), &calibration, ctx).unwrap();
                let taken = PEAK.load(Ordering::SeqCst) - before;
                drop(quantized);
                taken
            });
            let taken = runs.min().unwrap() as f64 / plan.memory_on(threads) as f64;
            println!("{name} on {threads}: {taken:.3}");
            // Threads need not all be at their busiest at the same time.
            let least = if threads == 1 { 0.9 } else { 0.0 };
            assert!((least..1.1).contains(&taken), "{name} on {threads}: {taken}");
        }
    }
}
