//! A network of two layers that is quantized once and then runs on integers alone.
//!
//! `cargo run -p lowbit-core --example integer_mlp`

use lowbit_core::fake_quant::Grid;
use lowbit_core::integer::{Multiplier, RequantRounding, quantize_bias};
use lowbit_core::{Mat, MatRef, Result, quantize_row_int8};

/// All that a device needs.
///
/// Two checks that no float slips in: clippy refuses float arithmetic in this module, and the
/// structs derive `Eq` and `Hash`, which no type with a float in it has.
pub mod inference {
    #![deny(clippy::float_arithmetic)]

    use lowbit_core::integer::{Multiplier, RequantRounding, matmul, requantize};
    use lowbit_core::{Mat, MatRef, Result};

    /// `Y = clamp(Zy + round(M·(Σ (X − Zx)·W + bias)))`, with int8 weights whose zero-point is 0.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    pub struct Layer {
        /// `k`, the columns of `weight`.
        pub in_features: usize,
        /// `n`, the rows of `weight`.
        pub out_features: usize,
        /// `W`, row-major.
        pub weight: Vec<i8>,
        /// In units of the accumulator, one for each output.
        pub bias: Vec<i32>,
        /// `M`, one for each output.
        pub multipliers: Vec<Multiplier>,
        /// How `M` is applied.
        pub rounding: RequantRounding,
        /// `Zx`.
        pub input_zero: u8,
        /// `Zy`.
        pub output_zero: u8,
        /// Whether the output stops at `Zy`.
        pub relu: bool,
    }

    /// Two layers.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    pub struct Network {
        /// The first layer.
        pub hidden: Layer,
        /// The second layer.
        pub output: Layer,
    }

    impl Layer {
        /// `(m, in_features)` codes to `(m, out_features)` codes.
        pub fn forward(&self, x: MatRef<'_, u8>) -> Result<Mat<u8>> {
            let w = MatRef::new(&self.weight, self.out_features, self.in_features)?;
            let mut acc = Mat::zeros(x.rows(), self.out_features);
            matmul(x, self.input_zero, w, &[0], Some(&self.bias), acc.as_mut())?;

            let mut y = Mat::zeros(x.rows(), self.out_features);
            let lowest = if self.relu { self.output_zero } else { 0 };
            requantize(
                acc.as_ref(),
                &self.multipliers,
                self.rounding,
                self.output_zero,
                lowest..=255,
                y.as_mut(),
            )?;
            Ok(y)
        }
    }

    impl Network {
        /// `(m, in_features)` codes to `(m, out_features)` codes.
        pub fn forward(&self, x: MatRef<'_, u8>) -> Result<Mat<u8>> {
            self.output.forward(self.hidden.forward(x)?.as_ref())
        }
    }
}

use inference::{Layer, Network};

/// `y = relu(x·Wᵀ + bias)`, or without `relu`.
pub struct FloatLayer {
    /// `(out_features, in_features)`.
    pub weight: Mat<f32>,
    /// One for each output.
    pub bias: Vec<f32>,
    /// Whether negative outputs become 0.
    pub relu: bool,
}

impl FloatLayer {
    /// `(m, in_features)` to `(m, out_features)`.
    pub fn forward(&self, x: MatRef<'_, f32>) -> Mat<f32> {
        let rows: Vec<&[f32]> = x.iter_rows().collect();
        let weight: Vec<&[f32]> = self.weight.as_ref().iter_rows().collect();
        Mat::from_fn(rows.len(), weight.len(), |r, j| {
            let dot: f32 = rows[r].iter().zip(weight[j]).map(|(x, w)| x * w).sum();
            let y = dot + self.bias[j];
            if self.relu { y.max(0.0) } else { y }
        })
    }
}

/// The levels of u8 codes for the values that were seen: their range, extended to 0.
pub fn calibrate(values: &[f32]) -> Result<Grid> {
    let (lo, hi) = values.iter().fold((0.0_f32, 0.0_f32), |(lo, hi), &x| (lo.min(x), hi.max(x)));
    Grid::from_range(lo, hi, 0..=255)
}

/// The codes of `values` on the levels of `grid`, which must be those of [`calibrate`].
pub fn encode(values: &Mat<f32>, grid: Grid) -> Result<Mat<u8>> {
    let codes = values.data().iter().map(|&x| grid.code(x) as u8).collect();
    Mat::new(codes, values.rows(), values.cols())
}

/// Quantizes a layer between inputs on `input` and outputs on `output`: int8 weights with a scale
/// for each output, and everything that is real folded into `bias` and `multipliers`.
pub fn quantize(
    layer: &FloatLayer,
    input: Grid,
    output: Grid,
    rounding: RequantRounding,
) -> Result<Layer> {
    let (out_features, in_features) = (layer.weight.rows(), layer.weight.cols());
    let mut weight = vec![0; out_features * in_features];
    let mut scales = Vec::new();
    for (row, codes) in layer.weight.as_ref().iter_rows().zip(weight.chunks_mut(in_features)) {
        scales.push(quantize_row_int8(row, codes)?);
    }
    let mut bias = vec![0; out_features];
    quantize_bias(&layer.bias, input.scale(), &scales, &mut bias)?;
    let multipliers = scales.iter().map(|&scale| {
        Multiplier::new(f64::from(input.scale()) * f64::from(scale) / f64::from(output.scale()))
    });
    Ok(Layer {
        in_features,
        out_features,
        weight,
        bias,
        multipliers: multipliers.collect::<Result<_>>()?,
        rounding,
        input_zero: input.zero() as u8,
        output_zero: output.zero() as u8,
        relu: layer.relu,
    })
}

/// Quantizes a network for inputs like `samples`. Also returns the levels of its input, its hidden
/// features and its output.
pub fn quantize_network(
    [hidden, output]: &[FloatLayer; 2],
    samples: &Mat<f32>,
    rounding: RequantRounding,
) -> Result<(Network, [Grid; 3])> {
    let features = hidden.forward(samples.as_ref());
    let results = output.forward(features.as_ref());
    let grids =
        [calibrate(samples.data())?, calibrate(features.data())?, calibrate(results.data())?];
    let network = Network {
        hidden: quantize(hidden, grids[0], grids[1], rounding)?,
        output: quantize(output, grids[1], grids[2], rounding)?,
    };
    Ok((network, grids))
}

/// Numbers that look random, in −1..1.
pub fn noise(rows: usize, cols: usize, seed: u32) -> Mat<f32> {
    let mut state = seed;
    Mat::from_fn(rows, cols, |_, _| {
        // The generator of Numerical Recipes; its upper bits are good enough here.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// 16 inputs, 32 hidden features with ReLU, 10 outputs.
pub fn network(seed: u32) -> [FloatLayer; 2] {
    let layer = |n, k, seed, relu| FloatLayer {
        weight: noise(n, k, seed),
        bias: noise(1, n, seed ^ 1).data().to_vec(),
        relu,
    };
    [layer(32, 16, seed, true), layer(10, 32, seed ^ 2, false)]
}

fn main() -> Result<()> {
    let layers = network(1);
    let samples = noise(64, 16, 7);
    let (quantized, [input, _, output]) =
        quantize_network(&layers, &samples, RequantRounding::Single)?;

    let x = encode(&samples, input)?;
    let codes = quantized.forward(x.as_ref())?; // integers only

    let hidden = layers[0].forward(samples.as_ref());
    let exact = layers[1].forward(hidden.as_ref());
    println!("   float  integer");
    for (y, &code) in exact.data().iter().zip(codes.data()).take(10) {
        println!("{y:8.4} {:8.4}", output.value(code.into()));
    }
    let errors = exact.data().iter().zip(codes.data());
    let largest =
        errors.map(|(y, &code)| (y - output.value(code.into())).abs()).fold(0.0, f32::max);
    println!("largest error {largest:.4}, which is {:.1} steps", largest / output.scale());
    Ok(())
}
