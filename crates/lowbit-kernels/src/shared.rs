//! Layers that share an input: it is transformed and quantized once.

use lowbit_core::{Context, Error, Linear, MatMut, MatRef, Result};

use crate::{
    forward::{Threads, pool_for},
    packed::PackedLinear,
};

/// Computes layers that get the same input, such as q, k and v, or gate and up: `outputs[i]`,
/// `(m, out_features of layers[i])`, gets what [`forward`](Linear::forward) of `layers[i]` would give, bit
/// for bit. The input is transformed and quantized once, and all outputs are computed in one go.
///
/// # Errors
/// [`Error::Length`] for another number of outputs than of layers, [`Error::Shape`] for operands that do
/// not fit, [`Error::Unsupported`] naming what two layers differ in: see
/// [`PackedLinear::shares_input_with`]. Nothing has been written then. Otherwise as
/// [`forward`](Linear::forward).
///
/// # Example
/// ```
/// use lowbit_core::{
///     ActivationScheme, Context, Granularity, Linear, Mat, QLinear, QMatrix, QuantScheme,
/// };
/// use lowbit_kernels::{PackedLinear, forward_shared};
///
/// let layer = |n| {
///     let w = Mat::from_fn(n, 64, |r, c| ((r * 64 + c + n) as f32).sin());
///     let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(4, Granularity::PerGroup(32)))?;
///     let int8 = Some(ActivationScheme::INT8_PER_TOKEN);
///     PackedLinear::new(&QLinear::new(q).with_activation(int8))
/// };
/// let (q, k) = (layer(32)?, layer(8)?);
/// let x = Mat::from_fn(3, 64, |r, c| ((r + c) as f32).cos());
/// let ctx = &mut Context::new();
///
/// let (mut of_q, mut of_k) = (Mat::zeros(3, 32), Mat::zeros(3, 8));
/// forward_shared(&[&q, &k], x.as_ref(), &mut [of_q.as_mut(), of_k.as_mut()], ctx)?;
///
/// let mut alone = Mat::zeros(3, 8);
/// k.forward(x.as_ref(), alone.as_mut(), ctx)?;
/// assert_eq!(of_k, alone);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn forward_shared(
    layers: &[&PackedLinear],
    x: MatRef<'_, f32>,
    outputs: &mut [MatMut<'_, f32>],
    ctx: &mut Context,
) -> Result<()> {
    if layers.len() != outputs.len() {
        let (expected, got) = (layers.len(), outputs.len());
        return Err(Error::Length { what: "outputs of layers", expected, got });
    }
    let Some(first) = layers.first() else { return Ok(()) };
    for (layer, y) in layers.iter().zip(&*outputs) {
        lowbit_core::check_shapes(*layer, x, y)?;
        first.shares_input_with(layer)?;
    }
    let n = layers.iter().map(|layer| layer.out_features()).fold(0, usize::saturating_add);
    if x.rows() == 0 || n == 0 {
        return Ok(());
    }
    let work = x.rows().saturating_mul(n).saturating_mul(x.cols());
    let pool = pool_for(ctx, work);
    PackedLinear::forward_f32(layers, x.into(), outputs, ctx, Threads(pool.as_deref()))
}

impl PackedLinear {
    /// Can [`forward_shared`] compute both layers? They must be packed for the same kernel and have the same
    /// in_features, transforms, activation scheme, outlier features and groups, and both or none of them integer
    /// scales beside integer activations.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the first thing in which they differ.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
    /// use lowbit_kernels::PackedLinear;
    ///
    /// let layer = |bits| {
    ///     let w = Mat::from_fn(8, 64, |r, c| ((r * 64 + c) as f32).sin());
    ///     let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(bits, Granularity::PerGroup(32)));
    ///     PackedLinear::new(&QLinear::new(q?))
    /// };
    /// assert!(layer(4)?.shares_input_with(&layer(4)?).is_ok());
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn shares_input_with(&self, other: &Self) -> Result<()> {
        let layout = |l: &Self| (l.group(), l.padded_group(), l.padded_k(), l.sums_of_row());
        let differ = |what: String| Err(Error::Unsupported { by: "a shared input", what });
        if self.kernel() != other.kernel() {
            return differ(format!("kernels {} and {}", self.kernel(), other.kernel()));
        }
        if self.in_features() != other.in_features() {
            let (a, b) = (self.in_features(), other.in_features());
            return differ(format!("layers of {a} and {b} in_features"));
        }
        if self.activation() != other.activation() {
            let (a, b) = (self.activation(), other.activation());
            return differ(format!("activations of {a:?} and {b:?}"));
        }
        if layout(self) != layout(other) {
            let of = |l: &Self| (l.group().0, l.padded_group(), l.sums_of_row());
            let ((a, a_padded, a_sums), (b, b_padded, b_sums)) = (of(self), of(other));
            return differ(format!(
                "groups of {a}, padded to {a_padded}, in {a_sums} sums, and of {b}, padded to {b_padded}, in {b_sums}"
            ));
        }
        if self.transforms() != other.transforms() {
            return differ("two transforms".to_string());
        }
        if self.outlier_features() != other.outlier_features() {
            return differ("two sets of outlier features".to_string());
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kernels;
    use lowbit_core::{
        ActivationScales, ActivationScheme, ActivationType, Adapter, Granularity, Mat,
        OutlierColumns, Outliers, QLinear, QMatrix, QuantScheme, SparseRows, Transform, f16,
    };
    use proptest::prelude::*;

    fn wave(rows: usize, cols: usize, seed: usize) -> Mat<f32> {
        Mat::from_fn(rows, cols, |r, c| ((r * cols + c) as f32 * 0.7 + seed as f32).sin())
    }

    /// Layers whose terms differ, and whose inputs are prepared alike.
    pub(crate) fn layer(n: usize, k: usize, kind: usize, seed: usize) -> QLinear {
        let g32 = Granularity::PerGroup(32);
        let scheme = [
            QuantScheme::symmetric(4, g32),
            QuantScheme::affine(4, g32),
            QuantScheme::symmetric(8, Granularity::PerChannel),
        ][kind % 3];
        let uint8 = ActivationScheme {
            dtype: ActivationType::UInt8,
            scales: ActivationScales::PerTokenGroup(32),
        };
        let activation = match kind / 3 % 3 {
            0 => None,
            1 => Some(ActivationScheme::INT8_PER_TOKEN),
            _ => Some(uint8),
        };
        let q = QMatrix::quantize(wave(n, k, seed).as_ref(), scheme).unwrap();
        let layer = QLinear::new(q).with_activation(activation);
        let layer = layer.with_bias(Some(vec![seed as f32; n])).unwrap();
        let entries = vec![f16::from_f32(0.37); if k == 0 { 0 } else { n }];
        let columns = entries.iter().map(|_| 0).collect();
        let starts = (0..=n).map(|r| r.min(entries.len()) as u32).collect();
        let sparse = SparseRows::new(n, k, starts, columns, entries).unwrap();
        let adapter = Adapter::new(wave(2, k, seed), wave(n, 2, seed)).unwrap();
        match kind / 9 {
            0 => Ok(layer),
            1 => layer.with_transforms(vec![Transform::hadamard(k, 5)]),
            2 => layer.with_outliers(Some(Outliers::Sparse(sparse))),
            _ if activation.is_some() => layer.with_outliers(Some(Outliers::Threshold(0.9))),
            _ => layer.with_adapter(Some(adapter)),
        }
        .unwrap()
    }

    /// So many kinds does [`layer`] know.
    pub(crate) const KINDS: usize = 36;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn layers_that_share_an_input_compute_what_each_computes_alone(
            sizes in prop::collection::vec(0..70_usize, 1..4),
            (m, k) in (0..40_usize, 0..100_usize),
            kind in 0..KINDS,
        ) {
            let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
            let x = wave(m, k, 9);
            for kernel in kernels() {
                let layers: Vec<_> = (sizes.iter().enumerate())
                    .map(|(i, &n)| {
                        PackedLinear::with_kernel(&layer(n, k, kind, i), kernel).unwrap()
                    })
                    .collect();
                let layers: Vec<_> = layers.iter().collect();
                for mut ctx in [Context::new(), Context::with_pool(pool.clone())] {
                    let mut together: Vec<_> = sizes.iter().map(|&n| wave(m, n, 3)).collect();
                    let mut outputs: Vec<_> = together.iter_mut().map(Mat::as_mut).collect();
                    forward_shared(&layers, x.as_ref(), &mut outputs, &mut ctx).unwrap();
                    for (layer, together) in layers.iter().zip(&together) {
                        let mut alone = Mat::zeros(m, layer.out_features());
                        layer.forward(x.as_ref(), alone.as_mut(), &mut ctx).unwrap();
                        let bits = |y: &Mat<f32>| -> Vec<_> {
                            y.data().iter().map(|y| y.to_bits()).collect()
                        };
                        prop_assert_eq!(bits(together), bits(&alone), "{}", kernel);
                    }
                }
            }
        }
    }

    #[test]
    fn a_layer_without_outputs_may_share_an_input_with_outliers() {
        let layers = [0, 3].map(|n| PackedLinear::new(&layer(n, 4, 30, n)).unwrap());
        let x = wave(1, 4, 9);
        let (mut none, mut y, mut alone) = (Mat::zeros(1, 0), Mat::zeros(1, 3), Mat::zeros(1, 3));
        let ctx = &mut Context::new();
        let outputs = &mut [none.as_mut(), y.as_mut()];
        forward_shared(&[&layers[0], &layers[1]], x.as_ref(), outputs, ctx).unwrap();
        layers[1].forward(x.as_ref(), alone.as_mut(), ctx).unwrap();
        assert_eq!(y, alone);
    }

    #[test]
    fn layers_whose_inputs_differ_are_refused_by_what_they_differ_in() {
        let layer = |k: usize, scheme, activation: Option<ActivationScheme>| {
            let q = QMatrix::quantize(wave(8, k, 1).as_ref(), scheme).unwrap();
            QLinear::new(q).with_activation(activation)
        };
        let pack = |layer: &QLinear| PackedLinear::with_kernel(layer, "scalar").unwrap();
        let (g32, g16) = (Granularity::PerGroup(32), Granularity::PerGroup(16));
        let int8 = Some(ActivationScheme::INT8_PER_TOKEN);
        let plain = layer(64, QuantScheme::symmetric(4, g32), int8);
        let rotated = plain.clone().with_transforms(vec![Transform::hadamard(64, 1)]).unwrap();
        let columns = OutlierColumns::new(vec![3], Mat::from_fn(1, 8, |_, _| f16::ONE)).unwrap();
        let outliers = plain.clone().with_outliers(Some(Outliers::Columns(columns))).unwrap();
        let plain = pack(&plain);
        for (other, words) in [
            (layer(32, QuantScheme::symmetric(4, g32), int8), ["64", "32"]),
            (layer(64, QuantScheme::symmetric(4, g32), None), ["Int8", "None"]),
            (layer(64, QuantScheme::symmetric(4, g16), int8), ["32", "16"]),
            (rotated, ["two", "transforms"]),
            (outliers, ["two", "outlier features"]),
        ] {
            let error = plain.shares_input_with(&pack(&other)).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        if let Some(fast) = kernels().find(|&kernel| kernel != "scalar") {
            let other = layer(64, QuantScheme::symmetric(4, g32), int8);
            let other = PackedLinear::with_kernel(&other, fast).unwrap();
            let error = plain.shares_input_with(&other).unwrap_err().to_string();
            assert!(error.contains("scalar") && error.contains(fast), "{error}");
        }

        let other = pack(&layer(64, QuantScheme::symmetric(4, g32), None));
        let (mut a, mut b) = (wave(2, 8, 7), wave(2, 8, 7));
        let x = wave(2, 64, 1);
        let ctx = &mut Context::new();
        let both = &mut [a.as_mut(), b.as_mut()];
        assert!(forward_shared(&[&plain, &other], x.as_ref(), both, ctx).is_err());
        let error = forward_shared(&[&plain], x.as_ref(), both, ctx).unwrap_err().to_string();
        assert_eq!(error, "outputs of layers: expected 1 elements, got 2");
        let mut narrow = wave(2, 7, 7);
        let shapes = &mut [a.as_mut(), narrow.as_mut()];
        assert!(forward_shared(&[&plain, &plain], x.as_ref(), shapes, ctx).is_err());
        let untouched = [(&a, wave(2, 8, 7)), (&b, wave(2, 8, 7)), (&narrow, wave(2, 7, 7))];
        assert!(untouched.iter().all(|(got, expected)| *got == expected));
    }
}
