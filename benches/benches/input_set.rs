//! What q, k and v gain by sharing what is computed from their input: GPTQ of the three, each alone and
//! as a set, with the shapes of Llama 3.2 1B.

use criterion::{Criterion, criterion_group, criterion_main};
use lowbit::{Calibration, Context, InputSet, METHODS, Mat, Quantizer};

const K: usize = 2048;

fn noise(seed: usize, rows: usize) -> Mat<f32> {
    Mat::from_fn(rows, K, |r, c| ((seed * 7919 + r * 131 + c * 71) as f32 * 0.37).sin())
}

fn input_set(c: &mut Criterion) {
    let ctx = &mut Context::new();
    let mut calibration = Calibration::with_second_moment(K).unwrap();
    let x = Mat::from_fn(4096, K, |t, c| ((t * t % 7919 + c * 37) as f32 * 0.61).sin());
    calibration.observe(x.as_ref(), ctx).unwrap();
    let weights = [noise(1, 2048), noise(2, 512), noise(3, 512)];
    let mut group = c.benchmark_group("q, k, v");
    group.sample_size(10);
    for name in ["gptq-int4-g128", "smoothquant-rot-gptq"] {
        let method = METHODS.iter().find(|method| method.name == name).unwrap();
        // A model's scales are made for the whole set: see `Recipe::scales`.
        let recipe = lowbit::Recipe { scale: None, ..method.quantizer };
        group.bench_function(format!("{name}, each alone"), |b| {
            b.iter(|| {
                for w in &weights {
                    recipe.quantize(w.as_ref(), &calibration, ctx).unwrap();
                }
            });
        });
        group.bench_function(format!("{name}, as a set"), |b| {
            b.iter(|| {
                let inputs = InputSet::new(&calibration);
                for w in &weights {
                    recipe.quantize_in_set(w.as_ref(), &inputs, ctx).unwrap();
                }
            });
        });
    }
}

criterion_group!(benches, input_set);
criterion_main!(benches);
