use alloc::format;

use lowbit_dtypes::{Format, Overflow, bf16};
use pulp::{Simd, WithSimd};

use crate::{
    Error, Mat, MatRef, Params, Result,
    range::{Extent, check_range},
    rounding::{nearest_even, nearest_even_i32},
    simd,
};

/// How a layer's input is quantized before the product. The default, `None` in
/// [`QLinear`](crate::QLinear), keeps it in f32.
///
/// # Example
/// ```
/// use lowbit_core::{ActivationScales, ActivationScheme, ActivationType};
///
/// let dynamic = ActivationScheme::INT8_PER_TOKEN;
/// let (scale, zero_point) = ActivationType::UInt8.params((-1.0, 3.0))?;
/// let calibrated = ActivationScheme {
///     dtype: ActivationType::UInt8,
///     scales: ActivationScales::Static { scale, zero_point },
/// };
/// assert_eq!(zero_point, 64);
/// # let _ = (dynamic, calibrated);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActivationScheme {
    /// What a code means.
    pub dtype: ActivationType,
    /// Who shares a scale, and when it is computed.
    pub scales: ActivationScales,
}

/// What a code of an activation means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ActivationType {
    /// −127..=127, no zero-point: see [`quantize_row_int8`].
    Int8,
    /// 0..=255 with a zero-point: see [`quantize_row_uint8`].
    UInt8,
    /// −32767..=32767, no zero-point.
    Int16,
    /// A float of 8 bits or fewer, such as [`Format::F8E4M3`].
    Float(Format),
    /// bfloat16, without a scale: [`ActivationScheme::BF16`]. Kernels may round the levels of weights to it
    /// too (those of integers and of FP8 and smaller floats are bfloat16 numbers), and sum in f32.
    Bf16,
}

/// Who shares a scale (and a zero-point), and when it is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ActivationScales {
    /// Each row (token), when it arrives.
    PerToken,
    /// So many consecutive features of a row, when it arrives; the last group may be shorter.
    PerTokenGroup(usize),
    /// All rows of a batch, when it arrives. Results then depend on what else is in the batch.
    PerTensor,
    /// Everything, fixed beforehand from calibration; what lies beyond saturates. Only
    /// [`ActivationType::UInt8`] has a zero-point, elsewhere it is 0.
    Static {
        /// The step.
        scale: f32,
        /// The code of real 0.
        zero_point: u8,
    },
}

/// Twice rounded, as `LARGEST / 127 · 127`, it is still finite; `f32::MAX` is not.
const LARGEST: f32 = f32::from_bits(f32::MAX.to_bits() - 1);

/// The largest number of bfloat16.
const BF16_MAX: f32 = f32::from_bits(0x7f7f_0000);

impl ActivationType {
    /// The largest level.
    const fn reach(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::UInt8 => 255.0,
            Self::Int16 => 32767.0,
            Self::Float(format) => format.max(),
            Self::Bf16 => BF16_MAX,
        }
    }

    /// Scale and zero-point for numbers in `lo..=hi`, extended to contain 0.
    ///
    /// Without a zero-point `scale = max(|lo|, |hi|) / reach`, where reach is 127, 32767 or the
    /// format's largest number. Otherwise `scale = (hi − lo) / 255`, `zero_point = round(−lo /
    /// scale)`. `(0, 0)` gives scale 1, and so does bfloat16.
    ///
    /// # Errors
    /// [`Error::Parameter`] if an end is no finite number or `lo > hi`.
    pub fn params(self, (lo, hi): (f32, f32)) -> Result<(f32, u8)> {
        check_range((lo, hi))?;
        if self == Self::Bf16 {
            return Ok((1.0, 0));
        }
        let (lo, hi) = (lo.min(0.0), hi.max(0.0));
        let span = match self {
            Self::UInt8 => hi - lo,
            _ => hi.max(-lo),
        };
        let scale = match span.min(LARGEST) / self.reach() {
            // Half of f32's reach on either side, where hi − lo overflows.
            _ if span == f32::INFINITY => LARGEST / 128.0,
            0.0 => 1.0,
            scale => scale,
        };
        let zero_point = match self {
            Self::UInt8 => nearest_even((-lo / scale).min(255.0)) as u8,
            _ => 0,
        };
        Ok((scale, zero_point))
    }
}

impl ActivationScheme {
    /// Symmetric int8, one scale for each token.
    pub const INT8_PER_TOKEN: Self =
        Self { dtype: ActivationType::Int8, scales: ActivationScales::PerToken };

    /// bfloat16, to the nearest, ties to even; what lies beyond its largest number saturates.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{ActivationScheme, Mat, QActivations};
    ///
    /// let x = Mat::new(vec![1.0, 1.001, -3.02], 1, 3)?;
    /// let q = QActivations::quantize(x.as_ref(), ActivationScheme::BF16)?;
    /// assert_eq!(q.dequantize().data(), [1.0, 1.0, -3.015625]);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub const BF16: Self = Self {
        dtype: ActivationType::Bf16,
        scales: ActivationScales::Static { scale: 1.0, zero_point: 0 },
    };

    /// Rejects what has no meaning.
    ///
    /// # Errors
    /// [`Error::EmptyBlock`] for groups of 0, [`Error::Parameter`] for a static scale that is no
    /// positive finite number, [`Error::Unsupported`] for a zero-point or a type that cannot be, and for
    /// bfloat16 with other scales than a static 1.
    pub fn check(self) -> Result<()> {
        if self.dtype == ActivationType::Bf16 && self != Self::BF16 {
            let what = format!("{} for bfloat16, which has none", self.scales);
            return Err(Error::Unsupported { by: "an activation scheme", what });
        }
        if let ActivationType::Float(format) = self.dtype
            && !format.is_signed()
        {
            let what = format!("{}, which has no negative numbers", self.dtype);
            return Err(Error::Unsupported { by: "an activation scheme", what });
        }
        match self.scales {
            ActivationScales::PerTokenGroup(0) => Err(Error::EmptyBlock { rows: 1, cols: 0 }),
            ActivationScales::Static { scale, .. } if !(scale > 0.0 && scale.is_finite()) => {
                let value = f64::from(scale);
                Err(Error::Parameter { what: "static scale", value, expected: "more than 0" })
            }
            ActivationScales::Static { zero_point, .. }
                if zero_point != 0 && self.dtype != ActivationType::UInt8 =>
            {
                let what = format!("{} with zero-point {zero_point}", self.dtype);
                Err(Error::Unsupported { by: "a symmetric activation scheme", what })
            }
            _ => Ok(()),
        }
    }

    /// Features that share a scale in a row of `k`.
    fn group_size(self, k: usize) -> usize {
        match self.scales {
            ActivationScales::PerTokenGroup(group_size) => group_size.min(k).max(1),
            _ => k.max(1),
        }
    }
}

/// Activations, quantized: the reference for what kernels do on the way in.
///
/// `x[r][c] ≈ scale · (level(code[r][c]) − zero)` with the [`Params`] of the token and group.
///
/// # Example
/// ```
/// use lowbit_core::{ActivationScheme, Mat, QActivations};
///
/// let x = Mat::new(vec![0.5, -1.27, 0.004, 0.0, 0.0, 0.0], 2, 3)?;
/// let q = QActivations::quantize(x.as_ref(), ActivationScheme::INT8_PER_TOKEN)?;
/// assert_eq!(q.row(0), Some(&[50, -127, 0][..]));
/// assert_eq!(q.params(0, 0).scale, 0.01);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct QActivations {
    scheme: ActivationScheme,
    codes: Mat<i16>,
    params: Mat<Params>,
}

impl QActivations {
    /// Quantizes the rows of `x`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] at the first NaN or infinity; for a scheme without meaning,
    /// [`Error::EmptyBlock`], [`Error::Parameter`] or [`Error::Unsupported`].
    pub fn quantize(x: MatRef<'_, f32>, scheme: ActivationScheme) -> Result<Self> {
        scheme.check()?;
        let (m, k) = x.shape();
        let group_size = scheme.group_size(k);
        let mut codes = Mat::zeros(m, k);
        let mut params = Mat::zeros(m, k.div_ceil(group_size));
        if k == 0 {
            return Ok(Self { scheme, codes, params });
        }
        let mut all = Extent::NONE;
        for (row, x) in x.iter_rows().enumerate() {
            let extent = Extent::best(x);
            if !extent.is_finite() {
                return Err(not_finite(x).at_row(row));
            }
            all = all.join(extent);
        }
        let of_range = |extent: Extent| scheme.dtype.params(extent.ends());
        let whole = match scheme.scales {
            ActivationScales::Static { scale, zero_point } => Some((scale, zero_point)),
            ActivationScales::PerTensor if m > 0 && k > 0 => Some(of_range(all)?),
            _ => None,
        };
        let (mut code_rows, mut param_rows) = (codes.as_mut(), params.as_mut());
        let rows = x.iter_rows().zip(code_rows.iter_rows_mut()).zip(param_rows.iter_rows_mut());
        for ((x, codes), params) in rows {
            let groups = x.chunks(group_size).zip(codes.chunks_mut(group_size));
            for ((x, codes), params) in groups.zip(params) {
                let (scale, zero) = match whole {
                    Some(params) => params,
                    None => of_range(Extent::best(x))?,
                };
                for (&x, code) in x.iter().zip(codes) {
                    *code = encode(scheme.dtype, x, scale, zero);
                }
                *params = Params { scale, zero: f32::from(zero), offset: 0.0 };
            }
        }
        Ok(Self { scheme, codes, params })
    }

    /// How they are quantized.
    pub fn scheme(&self) -> ActivationScheme {
        self.scheme
    }

    /// Rows (tokens) and columns (in_features).
    pub fn shape(&self) -> (usize, usize) {
        self.codes.as_ref().shape()
    }

    /// The codes of row `r`: integers, or the bits of the floats; `None` behind the last row.
    pub fn row(&self, r: usize) -> Option<&[i16]> {
        self.codes.as_ref().row(r)
    }

    /// Features that share a scale within a row.
    pub fn group_size(&self) -> usize {
        self.scheme.group_size(self.shape().1)
    }

    /// Scale and zero-point of a group of row `r`; scale 0 outside.
    pub fn params(&self, r: usize, group: usize) -> Params {
        self.params.as_ref().get(r, group).copied().unwrap_or_default()
    }

    /// `Σ code` over each `group_size` features of every row, which the zero-points of weights are
    /// multiplied by: `Σ (q − z)·a = Σ q·a − z·Σ a`.
    ///
    /// # Errors
    /// [`Error::EmptyBlock`] if `group_size` is 0, [`Error::OutOfRange`] if so many codes of this type
    /// may not fit an i32.
    pub fn sums(&self, group_size: usize) -> Result<Mat<i32>> {
        if group_size == 0 {
            return Err(Error::EmptyBlock { rows: 1, cols: 0 });
        }
        let (m, k) = self.shape();
        // The bits of a small float are at most 255, those of bfloat16 i16s.
        let largest: i64 = match self.scheme.dtype {
            ActivationType::Bf16 => 32768,
            ActivationType::Int16 => 32767,
            _ => 255,
        };
        let (max, got) = (i64::from(i32::MAX) / largest, group_size.min(k));
        if got as i64 > max {
            let what = "codes of an i32 sum";
            return Err(Error::OutOfRange { what, min: 1, max, got: got as i64 });
        }
        let mut sums = Mat::zeros(m, k.div_ceil(group_size));
        let mut rows = sums.as_mut();
        for (codes, sums) in self.codes.as_ref().iter_rows().zip(rows.iter_rows_mut()) {
            group_sums(codes, group_size, sums);
        }
        Ok(sums)
    }

    /// Are codes integers, zero-points included?
    pub(crate) fn is_integer(&self) -> bool {
        !matches!(self.scheme.dtype, ActivationType::Float(_) | ActivationType::Bf16)
    }

    /// The numbers that are computed with.
    pub fn dequantize(&self) -> Mat<f32> {
        let ((m, k), group_size) = (self.shape(), self.group_size());
        Mat::from_fn(m, k, |r, c| {
            let code = self.codes.as_ref().get(r, c).copied().unwrap_or_default();
            let params = self.params(r, c / group_size);
            params.scale * (level(self.scheme.dtype, code) - params.zero)
        })
    }
}

/// The number that a code stands for before scale and zero-point.
fn level(dtype: ActivationType, code: i16) -> f32 {
    match dtype {
        ActivationType::Float(format) => format.decode(code as u8),
        ActivationType::Bf16 => bf16::from_bits(code as u16).to_f32(),
        _ => f32::from(code),
    }
}

#[inline(always)]
fn encode(dtype: ActivationType, x: f32, scale: f32, zero: u8) -> i16 {
    // |x / scale| is at most the reach, or twice that where the scale is subnormal and was rounded
    // down; anything beyond a static range. Clamped first: rounding wants small numbers.
    let steps = (x / scale).clamp(-65536.0, 65536.0);
    match dtype {
        ActivationType::Int8 => nearest_even(steps).clamp(-127.0, 127.0) as i16,
        ActivationType::UInt8 => (nearest_even(steps) + f32::from(zero)).clamp(0.0, 255.0) as i16,
        ActivationType::Int16 => nearest_even(steps).clamp(-32767.0, 32767.0) as i16,
        ActivationType::Float(format) => i16::from(format.encode(x / scale, Overflow::Saturate)),
        ActivationType::Bf16 => bf16::from_f32(x.clamp(-BF16_MAX, BF16_MAX)).to_bits() as i16,
    }
}

fn not_finite(x: &[f32]) -> Error {
    let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
    Error::NotFinite { what: "activation", row: 0, col }
}

fn same_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}

/// Quantizes one row of activations to int8: `scale = max|x| / 127`, `code = round(x / scale)`,
/// ties to even. Codes lie in −127..=127. A row of zeros gets scale 1.
///
/// Returns the scale. This is [`ActivationScheme::INT8_PER_TOKEN`], for kernels.
///
/// # Errors
/// [`Error::Length`] if `codes` is not as long as `x`; [`Error::NotFinite`] (row 0) at the first
/// NaN or infinity. `codes` is not written then.
///
/// # Example
/// ```
/// let mut codes = [0; 3];
/// let scale = lowbit_core::quantize_row_int8(&[0.5, -1.27, 0.004], &mut codes)?;
/// assert_eq!((codes, scale), ([50, -127, 0], 0.01));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn quantize_row_int8(x: &[f32], codes: &mut [i8]) -> Result<f32> {
    struct Int8<'a>(&'a [f32], &'a mut [i8]);
    impl WithSimd for Int8<'_> {
        type Output = Option<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Option<f32> {
            let Self(x, codes) = self;
            // As integers the absolute values keep their order, and NaN is larger than infinity:
            // the maximum finds both, and the loop vectorizes.
            let max = x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
            if max >= f32::INFINITY.to_bits() {
                return None;
            }
            let scale = match f32::from_bits(max).min(LARGEST) / 127.0 {
                0.0 => 1.0,
                scale => scale,
            };
            for (&x, code) in x.iter().zip(codes) {
                // |x / scale| <= 127.00002, or up to 254 where a subnormal scale was rounded down
                *code = nearest_even_i32((x / scale).clamp(-127.0, 127.0)) as i8;
            }
            Some(scale)
        }
    }
    same_length("int8 codes", x.len(), codes.len())?;
    simd::dispatch(Int8(x, codes)).ok_or_else(|| not_finite(x))
}

/// Quantizes one row of activations to int8 by a scale that is known: `code = round(x / scale)`, ties
/// to even, and −127 or 127 for what lies beyond. For [`ActivationScales::Static`] and
/// [`ActivationScales::PerTensor`], in kernels.
///
/// # Errors
/// [`Error::Length`] if `codes` is not as long as `x`; [`Error::Parameter`] if `scale` is no positive
/// finite number; [`Error::NotFinite`] (row 0) at the first NaN or infinity. `codes` is not written
/// then.
///
/// # Example
/// ```
/// let mut codes = [0; 3];
/// lowbit_core::encode_row_int8(&[0.5, -9.0, 0.004], 0.01, &mut codes)?;
/// assert_eq!(codes, [50, -127, 0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn encode_row_int8(x: &[f32], scale: f32, codes: &mut [i8]) -> Result<()> {
    struct Encode<'a>(&'a [f32], f32, &'a mut [i8]);
    impl WithSimd for Encode<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Self(x, scale, codes) = self;
            for (&x, code) in x.iter().zip(codes) {
                *code = nearest_even_i32((x / scale).clamp(-127.0, 127.0)) as i8;
            }
        }
    }
    same_length("int8 codes", x.len(), codes.len())?;
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Error::not_positive("scale", scale));
    }
    if !Extent::best(x).is_finite() {
        return Err(not_finite(x));
    }
    simd::dispatch(Encode(x, scale, codes));
    Ok(())
}

/// Quantizes one row of activations to uint8: `scale = (hi − lo) / 255` over a range that contains
/// 0, `zero_point = round(−lo / scale)`, `code = clamp(round(x / scale) + zero_point, 0, 255)`; all
/// ties to even, as ONNX's `DynamicQuantizeLinear`. A row of zeros gets scale 1.
///
/// Returns scale and zero-point.
///
/// # Errors
/// As [`quantize_row_int8`].
///
/// # Example
/// ```
/// let mut codes = [0; 3];
/// let (scale, zero_point) = lowbit_core::quantize_row_uint8(&[-1.0, 0.0, 1.55], &mut codes)?;
/// assert_eq!((codes, zero_point), ([0, 100, 255], 100));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn quantize_row_uint8(x: &[f32], codes: &mut [u8]) -> Result<(f32, u8)> {
    same_length("uint8 codes", x.len(), codes.len())?;
    if x.is_empty() {
        return Ok((1.0, 0));
    }
    let extent = Extent::best(x);
    if !extent.is_finite() {
        return Err(not_finite(x));
    }
    let (scale, zero_point) = ActivationType::UInt8.params(extent.ends())?;
    simd::dispatch(Uint8(x, codes, scale, zero_point));
    Ok((scale, zero_point))
}

/// Quantizes one row of activations to uint8 by a scale and zero-point that are known:
/// `code = clamp(round(x / scale) + zero_point, 0, 255)`, ties to even. For
/// [`ActivationScales::Static`] and [`ActivationScales::PerTensor`], in kernels.
///
/// # Errors
/// As [`encode_row_int8`].
///
/// # Example
/// ```
/// let mut codes = [0; 3];
/// lowbit_core::encode_row_uint8(&[-1.0, 0.004, 9.0], 0.01, 50, &mut codes)?;
/// assert_eq!(codes, [0, 50, 255]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn encode_row_uint8(x: &[f32], scale: f32, zero_point: u8, codes: &mut [u8]) -> Result<()> {
    same_length("uint8 codes", x.len(), codes.len())?;
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Error::not_positive("scale", scale));
    }
    if !Extent::best(x).is_finite() {
        return Err(not_finite(x));
    }
    simd::dispatch(Uint8(x, codes, scale, zero_point));
    Ok(())
}

struct Uint8<'a>(&'a [f32], &'a mut [u8], f32, u8);

impl WithSimd for Uint8<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(x, codes, scale, zero_point) = self;
        let zero = i32::from(zero_point);
        let (lowest, highest) = (-f32::from(zero_point), 255.0 - f32::from(zero_point));
        for (&x, code) in x.iter().zip(codes) {
            *code = (nearest_even_i32((x / scale).max(lowest).min(highest)) + zero) as u8;
        }
    }
}

/// `Σ codes` of each `group_size` codes of a row, as far as there is room in `sums`.
///
/// A `group_size` of 0 counts as 1. Exact for groups of fewer than 2^16 codes of 16 bits, or 2^23
/// of 8 bits; beyond that, sums wrap around.
///
/// # Example
/// ```
/// let mut sums = [0; 2];
/// lowbit_core::group_sums(&[1_i8, 2, 3, -4, 5], 3, &mut sums);
/// assert_eq!(sums, [6, 1]);
/// ```
pub fn group_sums<C: Copy + Into<i32>>(codes: &[C], group_size: usize, sums: &mut [i32]) {
    struct Sums<'a, C>(&'a [C], usize, &'a mut [i32]);
    impl<C: Copy + Into<i32>> WithSimd for Sums<'_, C> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (codes, sum) in self.0.chunks(self.1.max(1)).zip(self.2) {
                let mut total = 0_i32;
                for &code in codes {
                    total = total.wrapping_add(code.into());
                }
                *sum = total;
            }
        }
    }
    simd::dispatch(Sums(codes, group_size, sums));
}
