//! The network of `examples/integer_mlp.rs`: equal to its definition in i128, bit for bit, and near
//! the float network it was made from.

#[allow(dead_code, unreachable_pub, reason = "a program of its own, with a main")]
#[path = "../examples/integer_mlp.rs"]
mod example;

use example::inference::{Layer, Network};
use example::{FloatLayer, encode, network, noise, quantize_network};
use lowbit_core::fake_quant::Grid;
use lowbit_core::integer::RequantRounding;
use lowbit_core::{Mat, quantize_row_int8};

const ROUNDINGS: [RequantRounding; 2] = [RequantRounding::TwoStep, RequantRounding::Single];

/// `round(numerator / 2^shift)` by the definition, ties towards +∞ or away from zero.
fn divide(numerator: i128, shift: i32, away: bool) -> i128 {
    let denominator = 1_i128 << shift;
    let floor = numerator.div_euclid(denominator);
    let twice_rest = 2 * numerator.rem_euclid(denominator);
    let up = twice_rest > denominator || twice_rest == denominator && (!away || numerator > 0);
    floor + i128::from(up)
}

/// One layer in the naive form, its bias and its multipliers derived anew from the scales.
fn reference(
    float: &FloatLayer,
    input: Grid,
    output: Grid,
    rounding: RequantRounding,
    x: &[u8],
) -> Vec<u8> {
    let k = float.weight.cols();
    let mut y = Vec::new();
    for (j, row) in float.weight.as_ref().iter_rows().enumerate() {
        let mut w = vec![0; k];
        let w_scale = quantize_row_int8(row, &mut w).unwrap();
        let unit = f64::from(input.scale()) * f64::from(w_scale);
        let bias = (f64::from(float.bias[j]) / unit).round_ties_even() as i128;
        let acc: i128 = (x.iter().zip(&w))
            .map(|(&x, &w)| (i128::from(x) - i128::from(input.zero())) * i128::from(w))
            .sum();
        // m in [1/2, 1) by doubling and halving, which are exact.
        let (mut m, mut shift) = (unit / f64::from(output.scale()), 0);
        while m >= 1.0 {
            (m, shift) = (m / 2.0, shift + 1);
        }
        while m < 0.5 {
            (m, shift) = (m * 2.0, shift - 1);
        }
        let q31 = (m * 2_147_483_648.0 + 0.5).floor() as i128;
        let product = (acc + bias) * q31;
        let steps = match rounding {
            RequantRounding::Single => divide(product, 31 - shift, false),
            RequantRounding::TwoStep => {
                divide(divide(product << shift.max(0), 31, false), (-shift).max(0), true)
            }
        };
        let lowest = if float.relu { i128::from(output.zero()) } else { 0 };
        y.push((steps + i128::from(output.zero())).clamp(lowest, 255) as u8);
    }
    y
}

#[test]
fn the_network_equals_its_definition_bit_for_bit() {
    for seed in 0..20 {
        let layers = network(seed);
        let samples = noise(32, 16, seed + 100);
        for rounding in ROUNDINGS {
            let (quantized, grids) = quantize_network(&layers, &samples, rounding).unwrap();
            // Values beyond the calibrated range too: codes saturate.
            let wild = Mat::from_fn(32, 16, |r, c| 3.0 * samples.data()[r * 16 + c]);
            for values in [&samples, &wild] {
                let x = encode(values, grids[0]).unwrap();
                let y = quantized.forward(x.as_ref()).unwrap();
                for (x, y) in x.as_ref().iter_rows().zip(y.as_ref().iter_rows()) {
                    let hidden = reference(&layers[0], grids[0], grids[1], rounding, x);
                    let expected = reference(&layers[1], grids[1], grids[2], rounding, &hidden);
                    assert_eq!(y, expected);
                }
            }
        }
    }
}

/// How far the integer network may be from the float one, for inputs that it was calibrated on.
///
/// Let `e` bound the error of every input of a layer, `s` the scale of a row of W. Then
///
/// ```text
/// |Σ ŵ·x̂ − Σ w·x| <= Σ |ŵ|·e + Σ s/2·|x|      a bias is off by half an accumulator unit
/// ```
///
/// ReLU makes no error larger. Rescaling adds up to one and a half steps: half for rounding, half
/// where a second rounding follows, half at the ends of the range, where the zero-point was rounded.
/// What f32 itself rounds is counted as 1e-4 of the sum of all magnitudes.
fn bound(layer: &FloatLayer, x: &[f32], input_error: f64, input: Grid, output: Grid) -> f64 {
    let mut largest = 0.0_f64;
    for (j, row) in layer.weight.as_ref().iter_rows().enumerate() {
        let mut codes = vec![0; row.len()];
        let scale = f64::from(quantize_row_int8(row, &mut codes).unwrap());
        let mut error = 0.5 * scale * f64::from(input.scale());
        let mut magnitude = f64::from(layer.bias[j].abs());
        for (&code, &x) in codes.iter().zip(x) {
            let x = f64::from(x.abs());
            error += scale * f64::from(code).abs() * input_error + 0.5 * scale * x;
            magnitude += scale * f64::from(code).abs() * x;
        }
        largest = largest.max(error + 1e-4 * magnitude);
    }
    largest + 1.5 * f64::from(output.scale())
}

#[test]
fn the_network_is_as_near_to_the_float_network_as_its_steps_allow() {
    let mut worst = 0.0_f64;
    for seed in 0..20 {
        let layers = network(seed);
        let samples = noise(64, 16, seed + 100);
        for rounding in ROUNDINGS {
            let (quantized, grids) = quantize_network(&layers, &samples, rounding).unwrap();
            let codes = quantized.forward(encode(&samples, grids[0]).unwrap().as_ref()).unwrap();
            let hidden = layers[0].forward(samples.as_ref());
            let exact = layers[1].forward(hidden.as_ref());
            let range = f64::from(grids[2].scale()) * 255.0;
            let rows = samples.as_ref().iter_rows().zip(hidden.as_ref().iter_rows());
            let results = exact.as_ref().iter_rows().zip(codes.as_ref().iter_rows());
            for ((x, hidden), (exact, codes)) in rows.zip(results) {
                // Half a step, or a whole one at the ends of the range.
                let error = bound(&layers[0], x, f64::from(grids[0].scale()), grids[0], grids[1]);
                let error = bound(&layers[1], hidden, error, grids[1], grids[2]);
                for (&exact, &code) in exact.iter().zip(codes) {
                    let off = f64::from((exact - grids[2].value(code.into())).abs());
                    assert!(off <= error, "{off} instead of {error} at most");
                    worst = worst.max(off / range);
                }
            }
        }
    }
    // The bound adds up the worst of everything; this is what 8 bits give.
    assert!(worst < 0.01, "{worst} of the output's range");
}

/// Compiles only while no field of these is a float, since those have neither `Eq` nor `Hash`; and
/// the function that runs takes and gives integers.
#[test]
fn the_network_holds_no_float() {
    fn no_float<T: Eq + std::hash::Hash>() {}
    no_float::<Network>();
    no_float::<Layer>();
    let _: fn(&Network, lowbit_core::MatRef<'_, u8>) -> lowbit_core::Result<Mat<u8>> =
        Network::forward;
}
