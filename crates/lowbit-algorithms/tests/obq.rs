//! OBQ against a float64 reference (`golden/obq_*`, with the weights and inputs of `gptq.rs`), and the
//! saliencies it is made of.

use lowbit_algorithms::{
    Calibration, Gptq, Obq, Quantizer, Rtn, layer_loss, obd_saliency, obs_saliency,
};
use lowbit_core::{Context, Granularity, Mat, QuantScheme, ScaleFormat};

fn floats(bytes: &[u8], cols: usize) -> Mat<f32> {
    let data: Vec<_> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let rows = data.len() / cols;
    Mat::new(data, rows, cols).unwrap()
}

fn golden() -> (Mat<f32>, Calibration) {
    let x = floats(include_bytes!("golden/gptq_x.f32"), 64);
    let mut calibration = Calibration::with_second_moment(64).unwrap();
    calibration.observe(x.as_ref(), &mut Context::new()).unwrap();
    (floats(include_bytes!("golden/gptq_w.f32"), 64), calibration)
}

const SCHEME: QuantScheme = QuantScheme {
    scale_format: ScaleFormat::F32,
    ..QuantScheme::affine(4, Granularity::PerChannel)
};

#[test]
fn weights_are_those_of_the_reference() {
    let (w, calibration) = golden();
    let expected = floats(include_bytes!("golden/obq_4.f32"), 64);
    let q = Obq::new(SCHEME).quantize(w.as_ref(), &calibration, &mut Context::new()).unwrap();
    let layer = q.layer.effective_weight().unwrap();
    for (i, (q, expected)) in layer.data().iter().zip(expected.data()).enumerate() {
        assert!((q - expected).abs() < 1e-6, "row {}, column {}", i / 64, i % 64);
    }
    let loss = 2.0 * layer_loss(w.as_ref(), &q.layer, &calibration).unwrap();
    assert!((loss / 3.447_421_323_651_876 - 1.0).abs() < 1e-3, "{loss}");
}

#[test]
fn on_small_layers_without_strong_channels_it_loses_less_than_gptq() {
    // The case of the reference has one channel eight times as strong as the others; there GPTQ wins.
    let k = 16;
    let noise = |a: usize, b: usize| {
        let x = ((a * 7919 + b * 104_729) as f64).sin() * 43_758.545_3;
        (x - x.floor()) as f32 - 0.5
    };
    let (mut losses, ctx) = ([0.0; 3], &mut Context::new());
    for seed in 0..20 {
        let x = Mat::from_fn(64, k, |t, c| noise(t * k + c, seed) + 0.5 * noise(t, seed + 99));
        let w = Mat::from_fn(8, k, |r, c| noise(r * k + c, seed + 50));
        let mut calibration = Calibration::with_second_moment(k).unwrap();
        calibration.observe(x.as_ref(), ctx).unwrap();
        let quantizers: [&dyn Quantizer; 3] =
            [&Obq::new(SCHEME), &Gptq::new(SCHEME), &Rtn::new(SCHEME)];
        for (loss, quantizer) in losses.iter_mut().zip(quantizers) {
            let q = quantizer.quantize(w.as_ref(), &calibration, ctx).unwrap();
            *loss += layer_loss(w.as_ref(), &q.layer, &calibration).unwrap();
        }
    }
    assert!(losses.is_sorted(), "{losses:?}");
}

#[test]
fn saliencies_are_what_removing_a_weight_costs() {
    let (w, calibration) = golden();
    let ctx = &mut Context::new();
    let held = obd_saliency(w.as_ref(), &calibration).unwrap();
    let free = obs_saliency(w.as_ref(), &calibration, 0.01, ctx).unwrap();
    let h = calibration.second_moment().unwrap();
    let scale = 2.0 / calibration.tokens() as f64;
    for (i, (held, free)) in held.data().iter().zip(free.data()).enumerate() {
        let (r, j) = (i / 64, i % 64);
        let w = f64::from(w.as_ref().row(r).unwrap()[j]);
        let expected = 0.5 * w * w * scale * h.data()[j * 64 + j];
        assert!((held - expected).abs() <= 1e-9 * expected, "row {r}, column {j}");
        // Those that are free can only help; damping is not in the first.
        assert!(*free <= 1.2 * held + 1e-12 && (*free > 0.0) == (*held > 0.0), "{free} {held}");
    }
}
