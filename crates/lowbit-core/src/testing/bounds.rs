//! How large an error can be, computed from the operands: a result further away is wrong, whatever the
//! order of its sums. All bounds are in f64 and in the unit of what they bound.
//!
//! # Sums
//!
//! An operation in f32 returns `(x ∘ y)(1 + δ)` with `|δ| ≤ u = 2^−24`, unless it overflows. A number that
//! goes through c operations carries `(1 + δ₁)…(1 + δ_c)`, which is `1 + θ` with
//! `|θ| ≤ γ_c = c·u / (1 − c·u)` (Higham, *Accuracy and Stability of Numerical Algorithms*, lemma 3.1). In a
//! sum of products every term goes through its own multiplication and through at most as many additions as
//! there are others, in whatever order and in however many lanes. So the computed sum of k products is off
//! by at most `γ_k · Σ|x_j·w_j|` (section 3.1 there, equation 3.5). A fused multiply-add rounds less.
//!
//! A product below 2^−126 loses up to half of 2^−149 instead; that is added for each. Bounds are infinite
//! where a sum may leave the range of f32. Kernels that flush subnormal numbers to zero are outside.
//!
//! # Example
//! ```
//! use lowbit_core::testing::bounds;
//!
//! // 1 − 1 + 2^−25, summed from the left and from the right: both are legal, one is wrong by 100 %.
//! let (x, w) = ([1.0, -1.0, 2.0_f32.powi(-25)], [1.0; 3]);
//! let left: f32 = x.iter().sum();
//! let right: f32 = x.iter().rev().sum();
//! assert_eq!((left, right), (2.0_f32.powi(-25), 0.0));
//! assert!(bounds::dot(&x, &w)? >= 2.0_f64.powi(-25));
//! # Ok::<(), lowbit_core::Error>(())
//! ```

use alloc::{string::ToString, vec, vec::Vec};

use lowbit_dtypes::bf16;

use crate::{
    ActivationScheme, ActivationType, Division, Error, Fit, Mat, MatRef, Outliers, QActivations,
    QLinear, QuantScheme, QuantType, Range, Result, Rounding, ScaleFormat, SymmetricScale,
    Transform, ZeroFormat, fit::F16_ZERO, range,
};

/// Half the distance from 1 to the next f32.
const U: f64 = 1.0 / (1 << 24) as f64;

/// The smallest positive f32, 2^−149.
const TINY: f64 = f32::from_bits(1) as f64;

/// What must not be exceeded on the way: half of the largest f32, so that roundings do not matter.
const HUGE: f64 = f32::MAX as f64 / 2.0;

/// `γ_c = c·u / (1 − c·u)` with `u = 2^−24`: the largest relative error of a number that has gone through
/// `c` roundings. Infinite from 2^24 on, where nothing is known.
///
/// # Example
/// ```
/// use lowbit_core::testing::bounds::gamma;
///
/// assert_eq!(gamma(0), 0.0);
/// assert!((gamma(4096) - 2.0_f64.powi(-12)).abs() < 1e-7);
/// assert_eq!(gamma(1 << 24), f64::INFINITY);
/// ```
pub fn gamma(c: usize) -> f64 {
    let cu = c as f64 * U;
    if cu < 1.0 { cu / (1.0 - cu) } else { f64::INFINITY }
}

/// How far `Σ x·w`, computed in f32 in any order, can be from the real sum: `γ_k·Σ|x·w|`, and 2^−149
/// for each product.
///
/// # Errors
/// [`Error::Length`] if the slices are not equally long.
pub fn dot(x: &[f32], w: &[f32]) -> Result<f64> {
    if x.len() != w.len() {
        return Err(Error::Length { what: "factor", expected: x.len(), got: w.len() });
    }
    let sum: f64 = x.iter().zip(w).map(|(&x, &w)| (f64::from(x) * f64::from(w)).abs()).sum();
    Ok(checked(gamma(x.len()) * sum + x.len() as f64 * TINY, sum))
}

/// `bound`, unless something of the size of `largest` has been computed on the way.
fn checked(bound: f64, largest: f64) -> f64 {
    // NaN is not in the range either.
    if largest <= HUGE { bound } else { f64::INFINITY }
}

/// [`dot`] of every row of `x` `(m, k)` with every row of `w` `(n, k)`: for f32 GEMMs, `(m, n)`.
///
/// # Errors
/// [`Error::Shape`] if the two have not the same k.
pub fn product(x: MatRef<'_, f32>, w: MatRef<'_, f32>) -> Result<Mat<f64>> {
    if x.cols() != w.cols() {
        let (expected, got) = ((w.rows(), x.cols()), w.shape());
        return Err(Error::Shape { what: "right factor", expected, got });
    }
    let mut bounds = Vec::new();
    for x in x.iter_rows() {
        for w in w.iter_rows() {
            bounds.push(dot(x, w)?);
        }
    }
    Mat::new(bounds, x.rows(), w.rows())
}

/// How far a layer computed in f32 can be from [`QLinear`]'s own `forward`, `(m, out_features)`:
/// dequantized on the fly or before, the scales multiplied in early or late, zeros subtracted from codes
/// or times sums of x, summed in any order.
///
/// With `x̂ = T(x)`, or that as the layer quantizes it, and S and B·A the layer's single weights and adapter, that is
///
/// ```text
/// γ_c · (Σ_j (|scale|·(code_j + |zero|) + |offset|)·|x̂_j| + Σ_j |S_j|·|T(x)_j| + Σ_r |B_r|·Σ_j |A_rj|·|x_j| + |bias|)
///     + Σ_j |w_j|·|Δx̂_j| + Σ_j |S_j|·|ΔT(x)_j|
/// ```
///
/// The first sum is that of the sizes of everything that may be added up separately: codes, zeros and
/// offsets, each with its own rounding (3k additions), three roundings on the way from a code to a weight,
/// two for scales, and what the reference rounds itself: `c = 3k + 10`. Known outlier features count with
/// their own weights, and outliers as they are, not quantized. c grows by 2 for each term that is added to
/// y separately, and by k + 2r + 4 for an adapter of rank r.
///
/// `ΔT(x)` is what another order of operations may change in a scaled or rotated input: in a Hadamard
/// block of b features `2·γ·Σ|x| / √b`, with b roundings and log₂ b + 4 more. Where such an input is then
/// quantized, `Δx̂` has the largest of these and two steps of its scale on top, since codes and scales may
/// be others. Without a transform but permutations both are 0.
///
/// Beside bfloat16 activations, levels of a table may be rounded to bfloat16, which adds `2^−8` times the
/// sum, and numbers below 2^−126 may count as 0.
///
/// # Errors
/// [`Error::Shape`] if `x` has not in_features columns, and those of [`QActivations::quantize`].
pub fn linear(layer: &QLinear, x: MatRef<'_, f32>) -> Result<Mat<f64>> {
    let sizes = Sizes::of(layer)?;
    check_input(layer, x)?;
    let (t, error) = transformed(layer, x)?;
    let (m, k) = x.shape();
    let at = |r: usize, c: usize| r * k + c;
    let size = |r: usize, c: usize| f64::from(t.data()[at(r, c)]).abs();
    let is_outlier = |r: usize, c: usize| {
        layer.outliers().is_some_and(|outliers| outliers.contains(c, t.data()[at(r, c)]))
    };
    let mut x_sizes = Mat::from_fn(m, k, |r, c| Size::plain(size(r, c) + error.data()[at(r, c)]));
    let mut moved = error.clone();
    let mut rest = Rest::F32;
    if let Some(scheme) = layer.activation() {
        let quantized = Mat::from_fn(m, k, |r, c| {
            let x = t.data()[at(r, c)];
            if x.is_finite() && is_outlier(r, c) { 0.0 } else { x }
        });
        let a = QActivations::quantize(quantized.as_ref(), scheme)?;
        let back = a.dequantize();
        let largest = error.data().iter().fold(0.0, |max: f64, e| max.max(*e));
        for r in 0..m {
            for c in (0..k).filter(|&c| !is_outlier(r, c)) {
                let params = a.params(r, c / a.group_size());
                let (scale, zero) = (f64::from(params.scale), f64::from(params.zero));
                let real = f64::from(back.data()[at(r, c)]).abs();
                if largest > 0.0 {
                    moved.data_mut()[at(r, c)] += largest + 2.1 * step(scheme, scale, real);
                }
                // |code| + |zero|, from |code − zero|.
                let code = (real + moved.data()[at(r, c)]) / scale + 2.0 * zero;
                x_sizes.data_mut()[at(r, c)] = Size { code, real: code * scale };
            }
        }
        if scheme.dtype == ActivationType::Bf16 {
            rest = Rest::bf16(layer.weight().scheme().dtype);
        }
    }
    if let Some(Outliers::Threshold(threshold)) = layer.outliers() {
        // An input that another order of operations moves over the threshold.
        for (i, error) in error.data().iter().enumerate().filter(|(_, error)| **error > 0.0) {
            let size = f64::from(t.data()[i]).abs();
            if (size - f64::from(*threshold)).abs() <= *error {
                moved.data_mut()[i] = f64::INFINITY;
            }
        }
    }
    let t = Mat::from_fn(m, k, &size);
    Ok(sizes.linear(layer, &Inputs { x, sizes: x_sizes, moved, t, t_moved: error }, rest))
}

/// The distance of two neighbours in what a number of this size is quantized to.
fn step(scheme: ActivationScheme, scale: f64, size: f64) -> f64 {
    match scheme.dtype {
        ActivationType::Bf16 => size / 128.0,
        ActivationType::Float(format) => {
            let fraction = 1 << format.fraction_bits();
            size / f64::from(fraction) + scale * f64::from(format.min_positive_subnormal())
        }
        _ => scale,
    }
}

/// `T(x)` as the layer computes it, and how far that may be from what another order of operations gives.
fn transformed(layer: &QLinear, x: MatRef<'_, f32>) -> Result<(Mat<f32>, Mat<f64>)> {
    let (m, k) = x.shape();
    let mut t = Mat::from_fn(m, k, |r, c| x.get(r, c).copied().unwrap_or_default());
    let mut errors = Mat::zeros(m, k);
    let mut spare = vec![0.0; k];
    for (t, error) in t.as_mut().iter_rows_mut().zip(errors.as_mut().iter_rows_mut()) {
        for transform in layer.transforms() {
            let sizes: Vec<f64> =
                t.iter().zip(&*error).map(|(t, e)| f64::from(*t).abs() + e).collect();
            transform.apply(t, &mut spare)?;
            match transform {
                Transform::Scale(scales) => {
                    for ((error, s), size) in error.iter_mut().zip(scales).zip(&sizes) {
                        let s = f64::from(*s).abs();
                        *error = s * *error + 3.0 * U * s * size + 2.0 * TINY;
                    }
                }
                Transform::Permute(places) => {
                    let before = error.to_vec();
                    error.iter_mut().zip(places).for_each(|(e, &p)| *e = before[p as usize]);
                }
                Transform::Hadamard { .. } => {
                    let mut start = 0;
                    while start < k {
                        let log = (k - start).ilog2();
                        let block = start..start + (1 << log);
                        let root = libm::sqrt(block.len() as f64);
                        let sum = |x: &[f64]| x[block.clone()].iter().sum::<f64>() / root;
                        let gamma = 2.0 * gamma(block.len() + log as usize + 4);
                        let lost = 4.0 * block.len() as f64 * TINY;
                        let moved = sum(error) + gamma * sum(&sizes) + lost;
                        error[block.clone()].fill(moved);
                        start = block.end;
                    }
                }
            }
        }
    }
    Ok((t, errors))
}

/// What arithmetic loses beside rounding sums.
#[derive(Clone, Copy)]
struct Rest {
    /// Of each product, relative.
    levels: f64,
    /// Below this a number may become 0.
    tiny: f64,
}

impl Rest {
    const F32: Self = Self { levels: 0.0, tiny: TINY };

    fn bf16(dtype: QuantType) -> Self {
        let exact = (0..=dtype.max_code()).all(|code| {
            let level = dtype.level(code);
            level.is_nan() || bf16::from_f32(level).to_f32() == level
        });
        let levels = if exact { 0.0 } else { 1.0 / 256.0 };
        Self { levels, tiny: f64::from(f32::MIN_POSITIVE) }
    }
}

/// How far a kernel that quantizes its input to int8 for each token can be from the same layer with f32
/// activations, `(m, out_features)`.
///
/// With `s = max|T(x)| / 127`, every input moves by at most `e = s/2` (a little more, since s and `x / s` are
/// rounded), and so y by `Σ_j (|w_j| + |S_j|)·e`. To that comes [`linear`] for inputs that are larger by e.
///
/// The layer's own activation scheme does not matter here. Kernels with larger steps (uint8 with a
/// zero-point has `s/2` more) or fewer tokens to a scale are outside.
///
/// # Errors
/// [`Error::Shape`] if `x` has not in_features columns, [`Error::NotFinite`] if it has a NaN or infinity.
pub fn int8_activations(layer: &QLinear, x: MatRef<'_, f32>) -> Result<Mat<f64>> {
    let sizes = Sizes::of(layer)?;
    check_input(layer, x)?;
    // Refuses what is not finite.
    QActivations::quantize(x, ActivationScheme::INT8_PER_TOKEN)?;
    let (t, mut moved) = transformed(layer, x)?;
    let k = x.cols();
    for (t, moved) in t.as_ref().iter_rows().zip(moved.as_mut().iter_rows_mut()) {
        let largest = |max: f64, (t, e): (&f32, &f64)| max.max(f64::from(*t).abs() + e);
        let max = t.iter().zip(&*moved).fold(0.0, largest);
        // Where s is subnormal it is rounded by up to 2^−150, and 127 times that moves.
        let e = max * (0.5 / 127.0 + 8.0 * U) + 128.0 * TINY;
        moved.iter_mut().for_each(|moved| *moved += e);
    }
    let x_sizes = Mat::from_fn(x.rows(), k, |r, c| {
        let real = f64::from(t.data()[r * k + c]).abs() + moved.data()[r * k + c];
        Size { code: real.max(127.0), real }
    });
    let t = Mat::from_fn(x.rows(), k, |r, c| f64::from(t.data()[r * k + c]).abs());
    let t_moved = moved.clone();
    Ok(sizes.linear(layer, &Inputs { x, sizes: x_sizes, moved, t, t_moved }, Rest::F32))
}

/// `|code| + |zero|`, and the same times the scale.
#[derive(Clone, Copy, Default)]
struct Size {
    code: f64,
    real: f64,
}

impl Size {
    /// Of a number without a scale.
    fn plain(x: f64) -> Self {
        Self { code: x, real: x }
    }
}

/// What is known of the inputs of a layer.
struct Inputs<'a> {
    /// As they come.
    x: MatRef<'a, f32>,
    /// Of what the quantized weights are multiplied by, `(m, k)`.
    sizes: Mat<Size>,
    /// How far a kernel's may be from these.
    moved: Mat<f64>,
    /// `|T(x)|`, and how far a kernel's may be from it.
    t: Mat<f64>,
    t_moved: Mat<f64>,
}

/// The weights of a layer, `(n, k)`: sizes, and magnitudes.
struct Sizes {
    parts: Mat<Size>,
    weights: Mat<f32>,
    /// Are sums of x multiplied by zeros or offsets?
    sums: bool,
}

impl Sizes {
    fn of(layer: &QLinear) -> Result<Self> {
        let weight = layer.weight();
        let (block_rows, block_cols) = weight.block();
        let mut parts = Mat::zeros(weight.rows(), weight.cols());
        let mut codes = vec![0; weight.cols()];
        for (r, row) in parts.as_mut().iter_rows_mut().enumerate() {
            weight.unpack_row(r, &mut codes)?;
            for (c, (size, &code)) in row.iter_mut().zip(&codes).enumerate() {
                let params = weight.params(r / block_rows, c / block_cols);
                let level = f64::from(weight.scheme().dtype.level(code)).abs();
                let code = level + f64::from(params.zero).abs();
                let real = f64::from(params.scale).abs() * code + f64::from(params.offset).abs();
                *size = Size { code, real };
            }
        }
        let mut weights = weight.dequantize();
        let k = weight.cols();
        if let Some(Outliers::Columns(known)) = layer.outliers() {
            for (&j, column) in known.columns().iter().zip(known.weight().as_ref().iter_rows()) {
                for (i, w) in column.iter().enumerate() {
                    weights.data_mut()[i * k + j] = w.to_f32();
                    parts.data_mut()[i * k + j] = Size::plain(f64::from(w.to_f32()).abs());
                }
            }
        }
        Ok(Self { parts, weights, sums: weight.scheme().zero != ZeroFormat::None })
    }

    /// [`linear`] for these inputs.
    fn linear(&self, layer: &QLinear, inputs: &Inputs<'_>, rest: Rest) -> Mat<f64> {
        let (n, k) = (self.parts.rows(), self.parts.cols());
        let sparse = match layer.outliers() {
            Some(Outliers::Sparse(sparse)) => Some(sparse),
            _ => None,
        };
        let features = if layer.outliers().is_some() && sparse.is_none() { 2 * k + 2 } else { 0 };
        let rank = layer.adapter().map(|adapter| adapter.a().rows());
        let inner = layer.adapter().map(|adapter| {
            let a = adapter.a().as_ref();
            Mat::from_fn(inputs.x.rows(), a.rows(), |r, q| {
                let pairs =
                    a.row(q).into_iter().flatten().zip(inputs.x.row(r).into_iter().flatten());
                pairs.map(|(&a, &x)| (f64::from(a) * f64::from(x)).abs() + TINY).sum::<f64>()
            })
        });
        Mat::from_fn(inputs.x.rows(), n, |r, i| {
            let bias = layer.bias().map_or(0.0, |b| f64::from(b[i]).abs());
            let (mut product, mut largest, mut lost, mut moved) = (0.0, bias, 0.0, 0.0);
            for j in 0..k {
                let (w, x) = (self.parts.data()[i * k + j], inputs.sizes.data()[r * k + j]);
                product += w.real * x.real;
                // Scales may come in at any time: the sums are as large with or without them.
                let alone = if self.sums { 1.0 } else { 0.0 };
                largest += w.code.max(w.real).max(alone) * x.code.max(x.real);
                // Any product of some of the factors may be subnormal, and the rest then multiplied.
                lost += rest.tiny * (1.0 + w.code + w.real) * (1.0 + x.code + x.real);
                let by = inputs.moved.data()[r * k + j];
                if by > 0.0 {
                    moved += f64::from(self.weights.data()[i * k + j]).abs() * by;
                }
            }
            let (mut sum, mut roundings) = (product + bias, 3 * k + 10 + features);
            if let Some(sparse) = sparse {
                roundings += 2 * sparse.row(i).len() + 2;
                for (j, value) in sparse.row(i) {
                    let value = f64::from(value).abs();
                    sum += value * inputs.t.data()[r * k + j];
                    moved += value * inputs.t_moved.data()[r * k + j];
                    lost += TINY;
                }
            }
            if let (Some(adapter), Some(inner), Some(rank)) = (layer.adapter(), &inner, rank) {
                roundings += k + 2 * rank + 4;
                let b = adapter.b().as_ref().row(i).into_iter().flatten();
                for (b, inner) in b.zip(inner.as_ref().row(r).into_iter().flatten()) {
                    sum += f64::from(*b).abs() * inner;
                    lost += TINY * (1.0 + f64::from(*b).abs() * k as f64);
                    largest += inner;
                }
            }
            largest += sum + moved;
            checked(
                gamma(roundings) * (sum + moved) + rest.levels * product + moved + lost,
                largest,
            )
        })
    }
}

fn check_input(layer: &QLinear, x: MatRef<'_, f32>) -> Result<()> {
    let (expected, got) = ((x.rows(), layer.weight().cols()), x.shape());
    if expected == got { Ok(()) } else { Err(Error::Shape { what: "input", expected, got }) }
}

/// How far `w`, quantized by [`QMatrix::quantize_with`](crate::QMatrix::quantize_with) with this scheme and
/// fit, can be from itself: `|w − ŵ|` for each element, `(n, k)`. Nothing of the quantized matrix is looked
/// at, so a scale or a zero that is wrong shows.
///
/// For a block whose range is `lo..=hi` the grid is known but for the rounding of what is stored: its step
/// s from the table of [`SymmetricScale`], or `(hi − lo)/(2^b − 1)`; its first and last level A and B. Then
///
/// ```text
/// |w − ŵ| ≤ max(r·s', dist(w, A..B) + t) + d + f
/// ```
///
/// | | |
/// |---|---|
/// | r | ½ for rounding to nearest, 1 for all other |
/// | s' | `s + δ(s)`, where `δ(s) = ρ·s + η`: ρ = 2^−22 for f32, 2^−11 for f16, 2^−8 for bf16 and 2^−22 more for both; η the format's smallest number, since no scale becomes 0 |
/// | dist | how far w lies outside the grid: it saturates |
/// | t | how far A or B may be from where they should be: `δ(s)` times the codes between the end and zero; half a step for an integer zero, which is rounded; `s·δ(zero)` or `δ(offset)` for a real one |
/// | d | for [`Division::ExactReciprocal`], where codes are not those of what is stored: δ(s) for every step from zero or the offset to w, `2^b·δ(s)` or (with a real zero) `(2^b + |w|/s)·δ(s)`, and `δ(offset)` |
/// | f | for the roundings of f32 in between: `2^−21·(|w| + |lo| + s) + 2^−146` |
///
/// Percentiles give the range directly. A search ends at some share of the range: s is that of the whole,
/// dist the larger of those to the whole and to the smallest candidate. A range of one number holds that number;
/// others saturate there.
///
/// # Errors
/// [`Error::NotFinite`] at the first NaN or infinity; those of an impossible scheme or fit;
/// [`Error::Unsupported`] for floats, tables, E8M0 and two-level scales, and integers without zero.
///
/// # Example
/// ```
/// use lowbit_core::testing::bounds;
/// use lowbit_core::{Fit, Granularity, Mat, QuantScheme};
///
/// // 4 bits around zero: the step is 1/7.5, and half of it is 0.0667.
/// let w = Mat::new(vec![1.0, 0.9, 0.95, 0.0], 1, 4)?;
/// let scheme = QuantScheme::symmetric(4, Granularity::PerChannel);
/// let bound = bounds::quantization(w.as_ref(), scheme, &Fit::default())?;
/// assert!(bound.data().iter().all(|b| (0.0666..0.0672).contains(b)), "{bound:?}");
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn quantization(w: MatRef<'_, f32>, scheme: QuantScheme, fit: &Fit) -> Result<Mat<f64>> {
    scheme.check()?;
    fit.check(scheme)?;
    let two_level = |format| matches!(format, ScaleFormat::E8m0 | ScaleFormat::TwoLevel(_));
    if !matches!(scheme.dtype, QuantType::Int { .. })
        || two_level(scheme.scale_format)
        || scheme.zero.real().is_some_and(two_level)
        || scheme.zero == ZeroFormat::None
    {
        let what = scheme.to_string();
        return Err(Error::Unsupported { by: "the bound of quantization", what });
    }
    let (n, k) = w.shape();
    for (row, values) in w.iter_rows().enumerate() {
        if let Some(col) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { what: "weight", row, col });
        }
    }
    let (block_rows, block_cols) = scheme.granularity.block(n, k);
    let grid = scheme.granularity.grid(n, k);
    let mut grids = Vec::new();
    for b in 0..grid.0 * grid.1 {
        let (r, c) = (b / grid.1 * block_rows, b % grid.1 * block_cols);
        let block: Vec<f32> = (r..n.min(r + block_rows))
            .flat_map(|r| w.row(r).and_then(|row| row.get(c..k.min(c + block_cols))))
            .flatten()
            .copied()
            .collect();
        grids.push(Grid::of(&block, scheme, fit)?);
    }
    Ok(Mat::from_fn(n, k, |r, c| {
        let grid_index = r / block_rows * grid.1 + c / block_cols;
        let w = w.get(r, c).map_or(0.0, |&x| f64::from(x));
        let [a, b] = &grids[grid_index];
        a.bound(w).max(b.bound(w))
    }))
}

/// A block's grid as it is meant to be, and how far the stored one may be from it.
#[derive(Clone, Copy)]
struct Grid {
    /// A number that is not rounded.
    exact: Option<f64>,
    /// `r·s'`.
    inside: f64,
    /// A, B and t for each.
    low: (f64, f64),
    high: (f64, f64),
    /// d and f: a part of their own, and one in proportion to |w|.
    always: f64,
    relative: f64,
}

/// `δ(x)`: what rounding to a format can change.
fn rounding(format: ScaleFormat, x: f64) -> f64 {
    // Numbers are computed in f32 first, in up to three operations.
    let computed = 4.0 * U * x.abs();
    match format {
        ScaleFormat::F32 => computed + TINY,
        ScaleFormat::F16 => {
            computed + x.abs() / 2048.0 + f64::from(format.round(f32::from_bits(1)))
        }
        ScaleFormat::Bf16 => {
            computed + x.abs() / 256.0 + f64::from(format.round(f32::from_bits(1)))
        }
        // Not supported.
        ScaleFormat::E8m0 | ScaleFormat::TwoLevel(_) => f64::INFINITY,
    }
}

impl Grid {
    /// The largest grid that the fit may choose and the smallest: the distance from w to the grids
    /// between is convex in their share, so that it is largest at one of the two.
    fn of(block: &[f32], scheme: QuantScheme, fit: &Fit) -> Result<[Self; 2]> {
        let symmetric = scheme.zero == ZeroFormat::Midpoint;
        let (lo, hi) = match fit.range {
            Range::Percentile(percent) if symmetric => {
                let amax = range::percentile_abs(block, percent)?;
                (-amax, amax)
            }
            Range::Percentile(percent) => range::percentile(block, percent)?,
            Range::MinMax | Range::Search { .. } => range::min_max(block)?,
        };
        let extreme =
            block.iter().fold(0.0, |max: f32, x| if x.abs() > max.abs() { *x } else { max });
        let whole = Self::of_range((lo.into(), hi.into()), extreme, scheme, fit);
        let Range::Search { grid, candidates, .. } = fit.range else { return Ok([whole; 2]) };
        let share = f64::from(grid - candidates + 1) / f64::from(grid);
        let range = (f64::from(lo) * share, f64::from(hi) * share);
        let smallest = Self::of_range(range, extreme, scheme, fit);
        // Where w lies in one of the two it may be at the end of one between them.
        let t = whole.low.1.max(whole.high.1);
        let tolerant = |ends: Self| Self { low: (ends.low.0, t), high: (ends.high.0, t), ..whole };
        Ok([tolerant(whole), tolerant(smallest)])
    }

    fn of_range((lo, hi): (f64, f64), extreme: f32, scheme: QuantScheme, fit: &Fit) -> Self {
        let (max, mid) = (f64::from(scheme.dtype.max_code()), f64::from(scheme.midpoint()));
        let scale_error = |s: f64| rounding(scheme.scale_format, s);
        let r = match fit.rounding {
            Rounding::NearestEven | Rounding::NearestAway | Rounding::NearestUp => 0.5,
            Rounding::Floor | Rounding::TowardZero | Rounding::Stochastic { .. } => 1.0,
        };
        let exact = fit.division == Division::ExactReciprocal;
        let (lo, hi) = match scheme.zero {
            ZeroFormat::None | ZeroFormat::Midpoint | ZeroFormat::Int => (lo.min(0.0), hi.max(0.0)),
            ZeroFormat::Real(_) | ZeroFormat::Offset(_) => (lo, hi),
        };
        let amax = hi.max(-lo);
        let always = |s: f64| 8.0 * U * (lo.abs() + s) + 8.0 * TINY;
        // One number: it is the first level, exactly but for what is stored. Others, left out by a
        // percentile, saturate.
        if lo == hi {
            let s = match scheme.zero {
                ZeroFormat::Real(_) if lo != 0.0 => lo.abs() / max,
                _ if extreme == 0.0 => 1.0,
                _ => TINY,
            };
            let t = match scheme.zero {
                _ if lo == 0.0 => 0.0,
                ZeroFormat::None | ZeroFormat::Midpoint | ZeroFormat::Int => 0.0,
                // The zero is the largest code, unless the scale was rounded.
                ZeroFormat::Real(format) => (s + scale_error(s)) * rounding(format, max),
                ZeroFormat::Offset(format) => rounding(format, lo),
            } + (max + 1.0) * scale_error(s);
            let (low, high) = match scheme.zero {
                ZeroFormat::Midpoint => (-mid * s, (max - mid) * s),
                _ => (lo, lo + max * s),
            };
            let stochastic = matches!(fit.rounding, Rounding::Stochastic { .. }) && lo != 0.0;
            return Self {
                exact: (!stochastic).then_some(lo),
                inside: r * (s + scale_error(s)),
                low: (low, t),
                high: (high, t),
                always: always(0.0),
                relative: 8.0 * U,
            };
        }
        let (s, low, high, offset_error) = match scheme.zero {
            ZeroFormat::None | ZeroFormat::Midpoint => {
                let restricted = fit.symmetric == SymmetricScale::Restricted && mid > 1.0;
                let lowest = if restricted { 1.0 } else { 0.0 };
                let s = match fit.symmetric {
                    SymmetricScale::HalfStep => amax / (max / 2.0),
                    SymmetricScale::Restricted => amax / (mid - 1.0).max(1.0),
                    SymmetricScale::Full | SymmetricScale::SignedExtreme => amax / mid,
                };
                let (mut below, mut above) = (mid - lowest, max - mid);
                if fit.symmetric == SymmetricScale::SignedExtreme {
                    // Code 0 is on the side of the extreme; on either if both sides have one.
                    if hi == -lo {
                        below = above;
                    } else if extreme > 0.0 {
                        (below, above) = (above, below);
                    }
                }
                let end = |codes: f64| (codes * s, mid * scale_error(s));
                let (below, above) = (end(below), end(above));
                (s, (-below.0, below.1), above, 0.0)
            }
            ZeroFormat::Int => {
                let s = (hi - lo) / max;
                let (half, all) = (0.5 * (s + scale_error(s)), max * scale_error(s));
                // The zero is at most the largest code, also where a smaller scale would want more.
                (s, (lo, half.max(all)), (hi, half + all), 0.0)
            }
            ZeroFormat::Real(format) => {
                let mut s = (hi - lo) / max;
                if format == ScaleFormat::F16 {
                    s = s.max(lo.abs() / f64::from(F16_ZERO));
                }
                // zero = −lo / scale, so that scale·zero is lo but for the rounding of zero.
                let zero = (s + scale_error(s)) * rounding(format, 0.0) + rounding(format, lo);
                (s, (lo, zero), (lo + max * s, zero + max * scale_error(s)), 0.0)
            }
            ZeroFormat::Offset(format) => {
                let offset = rounding(format, lo);
                let s = (hi - lo) / max;
                (s, (lo, offset), (hi, offset + max * scale_error(s)), offset)
            }
        };
        let d = if exact { (max + 1.0) * scale_error(s) + offset_error } else { 0.0 };
        let relative = match scheme.zero {
            ZeroFormat::Real(_) if exact => scale_error(s) / s,
            _ => 0.0,
        };
        let inside = r * (s + scale_error(s));
        Self { exact: None, inside, low, high, always: d + always(s), relative: relative + 8.0 * U }
    }

    fn bound(&self, w: f64) -> f64 {
        let outside = |distance: f64, t: f64| distance.max(0.0) + t;
        let end = if w - self.low.0 < self.high.0 - w {
            outside(self.low.0 - w, self.low.1)
        } else {
            outside(w - self.high.0, self.high.1)
        };
        let inside = if self.exact == Some(w) { 0.0 } else { self.inside };
        inside.max(end) + self.always + self.relative * w.abs()
    }
}
