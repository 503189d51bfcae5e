//! Layers that share an input share what is computed from it, and nothing else.

use std::sync::Arc;

use lowbit_algorithms::{Calibration, InputSet, METHODS, Needs, Quantizer};
use lowbit_core::{Context, Mat};

fn noise(seed: usize, rows: usize, cols: usize) -> Mat<f32> {
    let at = |r: usize, c: usize| ((seed * 7919 + r * 131 + c * 71) as f32 * 0.37).sin();
    Mat::from_fn(rows, cols, |r, c| at(r, c) * if c % 17 == 3 { 20.0 } else { 1.0 })
}

fn calibration(needs: Needs, k: usize) -> Calibration {
    let mut calibration = match needs {
        Needs::SecondMoment => Calibration::with_second_moment(k).unwrap(),
        _ => Calibration::new(k),
    };
    calibration.observe(noise(9, 96, k).as_ref(), &mut Context::new()).unwrap();
    calibration
}

#[test]
fn every_method_makes_the_same_layer_in_a_set_as_alone() {
    let k = 64;
    let weights = [noise(1, 32, k), noise(2, 16, k), noise(3, 33, k)];
    for method in METHODS {
        let calibration = calibration(method.quantizer.needs(), k);
        let ctx = &mut Context::new();
        let inputs = InputSet::new(&calibration);
        for w in &weights {
            let alone = method.quantizer.quantize(w.as_ref(), &calibration, ctx).unwrap();
            let shared = method.quantizer.quantize_in_set(w.as_ref(), &inputs, ctx).unwrap();
            assert_eq!(shared, alone, "{}", method.name);
        }
    }
}

/// Methods whose factors differ by damping, shrinkage, order and blocks take turns with one set.
#[test]
fn methods_that_share_a_set_do_not_take_each_others_factors() {
    let (k, w) = (64, noise(1, 32, 64));
    let calibration = calibration(Needs::SecondMoment, k);
    let (ctx, inputs) = (&mut Context::new(), InputSet::new(&calibration));
    for _ in 0..2 {
        for method in METHODS.iter().filter(|m| m.quantizer.needs() == Needs::SecondMoment) {
            let alone = method.quantizer.quantize(w.as_ref(), &calibration, ctx).unwrap();
            let shared = method.quantizer.quantize_in_set(w.as_ref(), &inputs, ctx).unwrap();
            assert_eq!(shared, alone, "{}", method.name);
        }
    }
}

#[test]
fn threads_share_a_set() {
    let method = METHODS.iter().find(|method| method.name == "best-int4-g32-zp").unwrap();
    let calibration = calibration(Needs::SecondMoment, 64);
    let inputs = InputSet::new(&calibration);
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (pool, inputs, calibration) = (pool.clone(), &inputs, &calibration);
            scope.spawn(move || {
                let w = noise(seed, 32, 64);
                let ctx = &mut Context::with_pool(pool);
                let shared = method.quantizer.quantize_in_set(w.as_ref(), inputs, ctx).unwrap();
                let alone = &mut Context::new();
                assert_eq!(
                    shared,
                    method.quantizer.quantize(w.as_ref(), calibration, alone).unwrap()
                );
            });
        }
    });
}
