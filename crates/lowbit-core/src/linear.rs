use alloc::{vec, vec::Vec};

use crate::{
    ActivationScales, ActivationScheme, Adapter, Context, Error, IntegerLevels, Mat, MatMut,
    MatRef, Outliers, QActivations, QMatrix, Result, Transform, ZeroFormat,
};

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
    /// [`Error::NotFinite`] if the layer quantizes its input and that has a NaN or infinity; those of
    /// [`QActivations::quantize`] if it does so in an impossible way.
    fn forward(&self, x: MatRef<'_, f32>, y: MatMut<'_, f32>, ctx: &mut Context) -> Result<()>;

    /// The layer, for a caller who knows its type and can do more with that, such as compute several layers
    /// at once; `None` for layers that are just this.
    fn as_any(&self) -> Option<&dyn core::any::Any> {
        None
    }
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
/// ```text
/// y = Q·T(x) + S·T(x) + B·(A·x) + bias
/// Q weight   T transforms   S outliers   B, A adapter
/// ```
///
/// Its own [`forward`](Linear::forward) is the reference: slow, in the order of the equation.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinear<S = Vec<u8>> {
    weight: QMatrix<S>,
    transforms: Vec<Transform>,
    activation: Option<ActivationScheme>,
    outliers: Option<Outliers>,
    adapter: Option<Adapter>,
    bias: Option<Vec<f32>>,
}

impl<S: AsRef<[u8]>> QLinear<S> {
    /// A layer of just a weight, with f32 activations.
    pub fn new(weight: QMatrix<S>) -> Self {
        let (activation, outliers, adapter, bias) = (None, None, None, None);
        Self { weight, transforms: Vec::new(), activation, outliers, adapter, bias }
    }

    /// Replaces what is done to an input before anything else, from first to last. The weight is one for
    /// inputs so transformed: see [`Transform::apply_to_weight`].
    ///
    /// # Errors
    /// Those of [`Transform::check`] for in_features.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Context, Granularity, Linear, Mat, QLinear, QMatrix, QuantScheme, Transform};
    ///
    /// let mut w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
    /// let x = Mat::from_fn(1, 64, |_, c| if c == 5 { 80.0 } else { 0.1 });
    /// let exact: f32 = w.data()[..64].iter().zip(x.data()).map(|(w, x)| w * x).sum();
    ///
    /// let rotation = Transform::hadamard(64, 1);
    /// rotation.apply_to_weight(&mut w)?;
    /// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
    /// let layer = QLinear::new(q).with_transforms(vec![rotation])?;
    /// let mut y = Mat::zeros(1, 4);
    /// layer.forward(x.as_ref(), y.as_mut(), &mut Context::new())?;
    /// assert!((y.data()[0] - exact).abs() < 0.3);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn with_transforms(self, transforms: Vec<Transform>) -> Result<Self> {
        transforms.iter().try_for_each(|transform| transform.check(self.weight.cols()))?;
        Ok(Self { transforms, ..self })
    }

    /// Replaces the way in which inputs are quantized. Whether it has a meaning is said by
    /// [`forward`](Linear::forward), as by [`QActivations::quantize`].
    pub fn with_activation(self, activation: Option<ActivationScheme>) -> Self {
        Self { activation, ..self }
    }

    /// Replaces the features, or the single weights, that are multiplied in f32. They count in the
    /// order after the [transforms](Self::with_transforms).
    ///
    /// # Errors
    /// [`Error::Parameter`] for a threshold that is no positive number; [`Error::Shape`] and
    /// [`Error::OutOfRange`] if known columns or sparse weights are not of this layer.
    pub fn with_outliers(self, outliers: Option<Outliers>) -> Result<Self> {
        if let Some(outliers) = &outliers {
            outliers.check(self.weight.rows(), self.weight.cols())?;
        }
        Ok(Self { outliers, ..self })
    }

    /// Replaces the low-rank term, which sees the input as it comes.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not of this layer.
    pub fn with_adapter(self, adapter: Option<Adapter>) -> Result<Self> {
        if let Some(adapter) = &adapter {
            let expected = (self.weight.rows(), self.weight.cols());
            let got = (adapter.b().rows(), adapter.a().cols());
            if expected != got {
                return Err(Error::Shape { what: "adapter's B·A", expected, got });
            }
        }
        Ok(Self { adapter, ..self })
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

    /// Every byte that the layer's weights take where they are stored, with those of known outliers,
    /// transforms and the adapter; the bias is not among them.
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
            + self.transforms.iter().map(Transform::bytes).sum::<usize>()
            + self.outliers.as_ref().map_or(0, Outliers::bytes)
            + self.adapter.as_ref().map_or(0, Adapter::bytes)
    }

    /// The `(out_features, in_features)` weight that this layer stands for in the basis of its input:
    /// `(Q + S)·T + B·A`. Outlier columns count with their own weights; activations are not looked at. What is
    /// beyond f32 in that basis is infinite.
    ///
    /// # Errors
    /// None for a layer that could be built.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, Transform};
    ///
    /// let w = Mat::new(vec![1.0, 2.0, 3.0, 4.0], 2, 2)?;
    /// let scale = Transform::Scale(vec![2.0, 0.5]);
    /// let mut scaled = w.clone();
    /// scale.apply_to_weight(&mut scaled)?;
    /// let q = QMatrix::quantize(scaled.as_ref(), QuantScheme::affine(8, Granularity::PerChannel))?;
    /// let back = QLinear::new(q).with_transforms(vec![scale])?.effective_weight()?;
    /// assert!(w.data().iter().zip(back.data()).all(|(w, b)| (w - b).abs() < 0.02));
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn effective_weight(&self) -> Result<Mat<f32>> {
        let mut w = self.weight.dequantize();
        let (n, k) = (w.rows(), w.cols());
        match &self.outliers {
            Some(Outliers::Columns(known)) => {
                for (&j, column) in known.columns().iter().zip(known.weight().as_ref().iter_rows())
                {
                    for (w, value) in w.data_mut().iter_mut().skip(j).step_by(k).zip(column) {
                        *w = value.to_f32();
                    }
                }
            }
            Some(Outliers::Sparse(sparse)) => {
                for r in 0..n {
                    for (c, value) in sparse.row(r) {
                        w.data_mut()[r * k + c] += value;
                    }
                }
            }
            Some(Outliers::Threshold(_)) | None => {}
        }
        for transform in self.transforms.iter().rev() {
            transform.undo_on_weight(&mut w)?;
        }
        if let Some(adapter) = &self.adapter {
            for (w, b) in w.as_mut().iter_rows_mut().zip(adapter.b().as_ref().iter_rows()) {
                for (a, &b) in adapter.a().as_ref().iter_rows().zip(b) {
                    w.iter_mut().zip(a).for_each(|(w, a)| *w += b * a);
                }
            }
        }
        Ok(w)
    }

    /// What is done to an input before anything else, from first to last.
    pub fn transforms(&self) -> &[Transform] {
        &self.transforms
    }

    /// The low-rank term.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// How inputs are quantized; `None` for f32.
    pub fn activation(&self) -> Option<ActivationScheme> {
        self.activation
    }

    /// The features or single weights that are multiplied in f32.
    pub fn outliers(&self) -> Option<&Outliers> {
        self.outliers.as_ref()
    }

    /// The bias, one number for each output feature.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }
}

/// The reference. In what follows `x` is the input after the [`Transform`]s, each rounded to f32 as
/// [`Transform::apply`] says.
///
/// * f32 activations: `y = Σ_j w_j·x_j + bias` over the dequantized weights, summed in f64 and
///   rounded once.
/// * Integer activations and weights with [integer levels](crate::QuantType::integer_levels): let `G` be the runs of features within which neither the weight's nor the
///   activation's scale changes. Then
///   `y = (Σ_G Σ_{j∈G} (level_j − zero_G)·(a_j − z_G) · (scale_G·unit)) · s + bias`, where `s` is the
///   scale of the token; with a scale for each group of a token, every term of the outer sum is multiplied
///   by it instead. A real zero is made an offset first ([`Params::to_offset`](crate::Params::to_offset));
///   after the term of a group with an offset, `offset_G·Σ(a_j − z_G)` is added. Sums over `j` are exact
///   integers, then rounded to f32; the outer one goes from left to right in
///   f32, every product and sum rounded on its own (no fused multiply-add). Kernels reproduce it bit
///   for bit.
///   Scales that are integers over one step for each row
///   ([`has_integer_scales`](crate::QuantScheme::has_integer_scales)) belong to the integers, unless a
///   token has a scale for each group:
///   `y = (Σ_G scale_G·Σ_{j∈G} (code_j − zero_G)·(a_j − z)) · step · s + bias`, with one rounding of the
///   whole sum to f32.
/// * [`Outliers`] that are features count as 0 in all of this. Then, feature by feature in ascending
///   order, `x_j·w_j` is added to y, product and sum each rounded to f32. Single weights are added
///   likewise, and nothing counts as 0 for them.
/// * At last the [`Adapter`] adds its term, from the input before the transforms.
/// * Other activations (floats), or weights without integer levels (FP8): as f32 activations, over the
///   dequantized activations.
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
        let input = x;
        let transformed = self.transform(x)?;
        let x = transformed.as_ref().map_or(x, Mat::as_ref);
        let rest = self.outliers.as_ref().map(|outliers| {
            Mat::from_fn(x.rows(), x.cols(), |r, c| match x.get(r, c) {
                // What is not finite stays, to be refused.
                Some(&x) if x.is_finite() && outliers.contains(c, x) => 0.0,
                x => x.copied().unwrap_or_default(),
            })
        });
        let all = x;
        let x = rest.as_ref().map_or(all, Mat::as_ref);
        let a = self.activation.map(|scheme| QActivations::quantize(x, scheme)).transpose()?;
        match a {
            None => self.forward_f64(x, &mut y),
            Some(a) => match self.weight.scheme().dtype.integer_levels().filter(|_| a.is_integer())
            {
                Some(levels) => self.forward_integers(&a, &levels, &mut y)?,
                None => self.forward_f64(a.dequantize().as_ref(), &mut y),
            },
        }
        match &self.outliers {
            Some(Outliers::Sparse(sparse)) => sparse.add(all, y.reborrow())?,
            Some(outliers) => self.add_outliers(outliers, all, &mut y),
            None => {}
        }
        match &self.adapter {
            Some(adapter) => adapter.add(input, y),
            None => Ok(()),
        }
    }
}

impl<S: AsRef<[u8]>> QLinear<S> {
    /// `T(x)`; `None` if that is `x`.
    fn transform(&self, x: MatRef<'_, f32>) -> Result<Option<Mat<f32>>> {
        if self.transforms.is_empty() {
            return Ok(None);
        }
        let mut to = Mat::zeros(x.rows(), x.cols());
        let mut spare = vec![0.0; x.cols()];
        for (row, (to, x)) in to.as_mut().iter_rows_mut().zip(x.iter_rows()).enumerate() {
            // Behind a transform, its place in the input would be unknown.
            if let Some(col) = x.iter().position(|x| !x.is_finite() && self.activation.is_some()) {
                return Err(Error::NotFinite { what: "activation", row, col });
            }
            to.copy_from_slice(x);
            for transform in &self.transforms {
                transform.apply(to, &mut spare)?;
            }
        }
        Ok(Some(to))
    }

    fn add_outliers(&self, outliers: &Outliers, x: MatRef<'_, f32>, y: &mut MatMut<'_, f32>) {
        let w = self.weight.dequantize();
        let known = match outliers {
            Outliers::Columns(known) => Some(known),
            _ => None,
        };
        for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
            for (j, &x) in x.iter().enumerate().filter(|(j, x)| outliers.contains(*j, **x)) {
                let row = known.and_then(|known| known.columns().binary_search(&j).ok());
                for (i, y) in y.iter_mut().enumerate() {
                    let w = match (known, row) {
                        (Some(known), Some(row)) => {
                            known.weight().as_ref().get(row, i).map(|w| w.to_f32())
                        }
                        _ => w.as_ref().get(i, j).copied(),
                    };
                    *y += x * w.unwrap_or_default();
                }
            }
        }
    }

    fn forward_f64(&self, x: MatRef<'_, f32>, y: &mut MatMut<'_, f32>) {
        let w = self.weight.dequantize();
        for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
            for (i, (w, y)) in w.as_ref().iter_rows().zip(y).enumerate() {
                let dot: f64 = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                *y = self.bias.as_ref().map_or(dot, |b| dot + f64::from(b[i])) as f32;
            }
        }
    }

    fn forward_integers(
        &self,
        a: &QActivations,
        levels: &IntegerLevels,
        y: &mut MatMut<'_, f32>,
    ) -> Result<()> {
        let (block_rows, weight_group) = self.weight.block();
        let activation_group = a.group_size();
        let grouped = matches!(a.scheme().scales, ActivationScales::PerTokenGroup(_));
        let integer_zeros =
            !matches!(self.weight.scheme().zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
        let k = self.weight.cols();
        let mut codes = vec![0; k];
        if let Some(scales) = self
            .weight
            .scale_grid()
            .filter(|_| self.weight.scheme().has_integer_scales() && !grouped)
        {
            return self.forward_one_sum(a, &scales, y);
        }
        for i in 0..self.weight.rows() {
            self.weight.unpack_row(i, &mut codes)?;
            for (row, y) in y.iter_rows_mut().enumerate() {
                let a_codes = a.row(row).unwrap_or(&[]);
                let mut sum = 0.0_f32;
                let mut start = 0;
                while start < k {
                    let (wg, ag) = (start / weight_group, start / activation_group);
                    let end = k.min((wg + 1) * weight_group).min((ag + 1) * activation_group);
                    let (w, a) = (self.weight.params(i / block_rows, wg), a.params(row, ag));
                    let w = if integer_zeros { w } else { w.to_offset() };
                    let (w_zero, a_zero) = (w.zero as i64, a.zero as i64);
                    let mut dot = 0;
                    let mut rest = 0;
                    for (&code, &a) in codes[start..end].iter().zip(&a_codes[start..end]) {
                        let level = i64::from(levels.integers[usize::from(code)]);
                        dot += (level - w_zero) * (i64::from(a) - a_zero);
                        rest += i64::from(a) - a_zero;
                    }
                    let group_scale = if grouped { a.scale } else { 1.0 };
                    sum += dot as f32 * (w.scale * levels.unit) * group_scale;
                    if !integer_zeros {
                        sum += w.offset * rest as f32 * group_scale;
                    }
                    start = end;
                }
                let product = if grouped { sum } else { sum * a.params(row, 0).scale };
                y[i] = self.bias.as_ref().map_or(product, |b| product + b[i]);
            }
        }
        Ok(())
    }

    /// As [`forward_integers`](Self::forward_integers), for the grid of scales of a scheme that
    /// [has integer scales](crate::QuantScheme::has_integer_scales).
    fn forward_one_sum(
        &self,
        a: &QActivations,
        scales: &QMatrix<&[u8]>,
        y: &mut MatMut<'_, f32>,
    ) -> Result<()> {
        let (block_rows, group_size) = self.weight.block();
        let mut codes = vec![0; self.weight.cols()];
        let mut group_scales = vec![0; scales.cols()];
        let mut zeros = vec![0_i64; scales.cols()];
        for i in 0..self.weight.rows() {
            self.weight.unpack_row(i, &mut codes)?;
            scales.unpack_row(i / block_rows, &mut group_scales)?;
            let step = scales.params(i / block_rows / scales.block().0, 0).scale;
            for (group, zero) in zeros.iter_mut().enumerate() {
                *zero = self.weight.params(i / block_rows, group).zero as i64;
            }
            for (row, y) in y.iter_rows_mut().enumerate() {
                let a_params = a.params(row, 0);
                let mut sum = 0_i64;
                for (j, (&code, &a)) in codes.iter().zip(a.row(row).unwrap_or(&[])).enumerate() {
                    let group = j / group_size;
                    let w = (i64::from(code) - zeros[group]) * i64::from(group_scales[group]);
                    sum += w * (i64::from(a) - a_params.zero as i64);
                }
                // Added to 0, as groups are: no −0.
                let product = (0.0 + sum as f32 * step) * a_params.scale;
                y[i] = self.bias.as_ref().map_or(product, |b| product + b[i]);
            }
        }
        Ok(())
    }
}
