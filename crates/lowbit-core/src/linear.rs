use alloc::{vec, vec::Vec};

use crate::{ActivationScheme, Context, Error, MatMut, MatRef, QMatrix, Result, quantize_row_int8};

/// A linear layer `y = x·Wᵀ + bias`, whatever its weights are made of.
///
/// # Example
/// ```
/// use lowbit_core::{Context, Granularity, Linear, Mat, QLinear, QMatrix, QuantScheme, Result};
///
/// fn apply(layer: &dyn Linear, x: &Mat<f32>) -> Result<Mat<f32>> {
///     let mut y = Mat::zeros(x.rows(), layer.out_features());
///     layer.forward(x.as_ref(), y.as_mut(), &mut Context::new())?;
///     Ok(y)
/// }
///
/// let w = Mat::from_fn(2, 2, |r, c| if r == c { 1.0 } else { 0.0 });
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(8, Granularity::PerTensor))?;
/// let y = apply(&QLinear::new(q), &Mat::new(vec![3.0, 5.0], 1, 2)?)?;
/// assert!((y.data()[0] - 3.0).abs() < 1e-3 && (y.data()[1] - 5.0).abs() < 1e-3);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub trait Linear: Send + Sync {
    /// `k`, the columns of `x`.
    fn in_features(&self) -> usize;

    /// `n`, the columns of `y`.
    fn out_features(&self) -> usize;

    /// Writes `x·Wᵀ + bias` to `y`, where `x` is `(m, in_features)` and `y` `(m, out_features)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if a shape is another one; nothing has been written to `y` then.
    /// [`Error::NotFinite`] if the layer quantizes its input and that has a NaN or infinity.
    fn forward(&self, x: MatRef<'_, f32>, y: MatMut<'_, f32>, ctx: &mut Context) -> Result<()>;
}

/// Checks the operands of [`Linear::forward`].
///
/// # Errors
/// [`Error::Shape`] naming the operand that does not fit the layer.
pub fn check_shapes(layer: &dyn Linear, x: MatRef<'_, f32>, y: &MatMut<'_, f32>) -> Result<()> {
    let m = x.rows();
    for (what, expected, got) in [
        ("input", (m, layer.in_features()), x.shape()),
        ("output", (m, layer.out_features()), y.shape()),
    ] {
        if expected != got {
            return Err(Error::Shape { what, expected, got });
        }
    }
    Ok(())
}

/// A quantized layer as plain data: what every algorithm produces, every file format stores and
/// every kernel packs.
///
/// Its own [`forward`](Linear::forward) is the reference: slow, in the order of the equation.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinear<S = Vec<u8>> {
    weight: QMatrix<S>,
    activation: Option<ActivationScheme>,
    bias: Option<Vec<f32>>,
}

impl<S: AsRef<[u8]>> QLinear<S> {
    /// A layer of just a weight, with f32 activations.
    pub fn new(weight: QMatrix<S>) -> Self {
        Self { weight, activation: None, bias: None }
    }

    /// Replaces the way in which inputs are quantized.
    pub fn with_activation(self, activation: Option<ActivationScheme>) -> Self {
        Self { activation, ..self }
    }

    /// Replaces the bias.
    ///
    /// # Errors
    /// [`Error::Length`] if it does not have out_features elements.
    pub fn with_bias(self, bias: Option<Vec<f32>>) -> Result<Self> {
        match &bias {
            Some(b) if b.len() != self.weight.rows() => {
                Err(Error::Length { what: "bias", expected: self.weight.rows(), got: b.len() })
            }
            _ => Ok(Self { bias, ..self }),
        }
    }

    /// The quantized weight.
    pub fn weight(&self) -> &QMatrix<S> {
        &self.weight
    }

    /// Every byte that the layer's weights take where they are stored; the bias is not among them.
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// How inputs are quantized; `None` for f32.
    pub fn activation(&self) -> Option<ActivationScheme> {
        self.activation
    }

    /// The bias, one number for each output feature.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }
}

/// The reference. With weight groups `G` along a row, each with its scale and zero:
///
/// * f32 activations: `y = Σ_j w_j·x_j + bias` over the dequantized weights, summed in f64 and
///   rounded once;
/// * [`ActivationScheme::Int8PerToken`]: with `x ≈ s·a`,
///   `y = (Σ_G scale_G · Σ_{j∈G} (code_j − zero_G)·a_j) · s + bias`. The inner sums are exact
///   integers; the outer one goes from left to right in f32, every product and sum rounded on its
///   own (no fused multiply-add). Kernels reproduce it bit for bit.
impl<S: AsRef<[u8]> + Send + Sync> Linear for QLinear<S> {
    fn in_features(&self) -> usize {
        self.weight.cols()
    }

    fn out_features(&self) -> usize {
        self.weight.rows()
    }

    fn forward(&self, x: MatRef<'_, f32>, mut y: MatMut<'_, f32>, _: &mut Context) -> Result<()> {
        check_shapes(self, x, &y)?;
        if x.rows() == 0 || self.out_features() == 0 {
            return Ok(());
        }
        let (block_rows, block_cols) = self.weight.block();
        let k = self.in_features();
        let mut a = vec![0_i8; k];
        let mut scales = vec![0.0; x.rows()];
        if self.activation.is_some() {
            for (row, (x, scale)) in x.iter_rows().zip(&mut scales).enumerate() {
                *scale = quantize_row_int8(x, &mut a).map_err(|e| e.at_row(row))?;
            }
        }
        let w = self.weight.dequantize();
        let mut codes = vec![0; k];
        for (row, (x, y)) in x.iter_rows().zip(y.iter_rows_mut()).enumerate() {
            if self.activation.is_some() {
                quantize_row_int8(x, &mut a)?;
            }
            for (i, y) in y.iter_mut().enumerate() {
                let bias = self.bias.as_ref().map(|b| b[i]);
                *y = match self.activation {
                    None => {
                        let w = w.as_ref().row(i).unwrap_or(&[]);
                        let dot = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                        let dot: f64 = dot.sum();
                        bias.map_or(dot, |b| dot + f64::from(b)) as f32
                    }
                    Some(ActivationScheme::Int8PerToken) => {
                        self.weight.unpack_row(i, &mut codes)?;
                        let mut sum = 0.0_f32;
                        let groups = codes.chunks(block_cols).zip(a.chunks(block_cols));
                        for (g, (codes, a)) in groups.enumerate() {
                            let (scale, zero) = self.weight.params(i / block_rows, g);
                            let dot: i64 = (codes.iter().zip(a))
                                .map(|(&code, &a)| {
                                    (i64::from(code) - i64::from(zero)) * i64::from(a)
                                })
                                .sum();
                            sum += dot as f32 * scale;
                        }
                        let product = sum * scales[row];
                        bias.map_or(product, |b| product + b)
                    }
                };
            }
        }
        Ok(())
    }
}
