use alloc::format;

use lowbit_dtypes::{
    F4E2M1, F6E2M3, F6E3M2, F8E4M3, F8E5M2, Format, Overflow, Rounding as Nearest, SmallFloat,
    Table16, encode_slice,
};

use crate::{
    Error, Params, QuantScheme, QuantType, Result, Rounding, ScaleFormat, ZeroFormat,
    range::check_percent,
    rounding::{nearest_even, nearest_even_i32},
};

/// How scales and codes are chosen for given weights: everything about round-to-nearest that is
/// not stored with the result (see [`QuantScheme`] for what is).
///
/// The default is min-max, to nearest even. [`presets`](crate::presets) name what other systems do.
///
/// # Example
/// ```
/// use lowbit_core::{Fit, Granularity, Mat, QMatrix, QuantScheme, Range};
///
/// // One outlier among small weights: on a 4-bit grid it pays to clip it a little.
/// let w = Mat::from_fn(1, 64, |_, c| if c == 7 { 1.0 } else { (c as f32).sin() * 0.4 });
/// let scheme = QuantScheme::symmetric(4, Granularity::PerChannel);
/// let error = |fit: &Fit| -> lowbit_core::Result<f32> {
///     let q = QMatrix::quantize_with(w.as_ref(), scheme, fit, None)?.dequantize();
///     Ok(w.data().iter().zip(q.data()).map(|(w, q)| (w - q).powi(2)).sum())
/// };
/// let searched = error(&Fit { range: Range::MSE, ..Fit::default() })?;
/// assert!(searched < error(&Fit::default())?);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fit {
    /// Which numbers the grid should reach.
    pub range: Range,
    /// Where a symmetric grid puts the largest magnitude.
    pub symmetric: SymmetricScale,
    /// How a weight in steps becomes a code.
    pub rounding: Rounding,
    /// How a weight is divided into steps.
    pub division: Division,
}

/// Which numbers of a block its grid should reach; what lies beyond saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Range {
    /// All of them.
    #[default]
    MinMax,
    /// So many percent, in (0, 100]: of the magnitudes for symmetric grids
    /// ([`range::percentile_abs`](crate::range::percentile_abs)), otherwise with both tails cut
    /// alike ([`range::percentile`](crate::range::percentile)).
    Percentile(f64),
    /// The one of the ranges `i/grid` of the whole, `i = grid, grid − 1, …`, whose
    /// `Σ importance·|w − ŵ|^norm` is smallest; the widest of equals.
    Search {
        /// Steps from the whole range down to nothing.
        grid: u32,
        /// How many of them to try, at most `grid`.
        candidates: u32,
        /// The power of the error: 2 for the mean square.
        norm: f32,
    },
}

impl Range {
    /// The smallest mean squared error, over hundredths of the whole range.
    pub const MSE: Self = Self::Search { grid: 100, candidates: 100, norm: 2.0 };
    /// The search of GPTQ's code: down to a fifth of the range, for the power 2.4.
    pub const GPTQ: Self = Self::Search { grid: 100, candidates: 80, norm: 2.4 };
}

/// Where a symmetric grid of `2^b` codes puts `amax`, the largest magnitude of its range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SymmetricScale {
    /// `scale = amax / ((2^b − 1)/2)`: `−amax` is half a step inside the lowest level, `+amax` half
    /// a step above the highest. All codes are used. GPTQ, compressed-tensors.
    #[default]
    HalfStep,
    /// `scale = amax / (2^(b−1) − 1)`: both signs are reached exactly, and the lowest code is not
    /// used (with 1 bit: as `Full`). AWQ, bitsandbytes, ONNX Runtime, GGUF Q8_0.
    Restricted,
    /// `scale = amax / 2^(b−1)`: `−amax` is reached exactly, `+amax` saturates a step lower.
    Full,
    /// `scale = extreme / −2^(b−1)`, where `extreme` is the weight of the largest magnitude with
    /// its sign (the first of equals): it always gets code 0, and scales may be negative. GGUF
    /// Q4_0, Q5_0.
    SignedExtreme,
}

/// How a weight is divided by the scale when its code is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Division {
    /// By the scale as it will be read back, so that codes are the nearest for what is stored.
    #[default]
    Stored,
    /// Multiplied by the reciprocal of the scale before that was rounded to its format, as ggml
    /// does; an offset is not rounded either.
    ExactReciprocal,
}

/// The largest real zero in f16, which is less than half of what f16 holds, so that roundings do
/// not matter.
pub(crate) const F16_ZERO: f32 = 32768.0;

/// What all blocks of a matrix share: how a range becomes a grid, and a weight a code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) scheme: QuantScheme,
    pub(crate) fit: Fit,
    max_code: f32,
    midpoint: f32,
    /// The lowest code in use; the highest is always `max_code`.
    lowest: f32,
    /// What the largest magnitude becomes in a type that is symmetric by itself.
    reach: f32,
    /// The largest magnitude of a level.
    outermost: f32,
    table: Option<Table16>,
}

/// The grid of one block, small because there is one for every 32 weights or fewer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Grid {
    /// What is stored.
    pub(crate) params: Params,
    /// Weights are taken relative to this, then divided by (or multiplied with) `factor`.
    offset: f32,
    factor: f32,
    reciprocal: bool,
}

impl Plan {
    pub(crate) fn new(scheme: QuantScheme, fit: &Fit) -> Self {
        let midpoint = f32::from(scheme.midpoint());
        let restricted = scheme.zero == ZeroFormat::Midpoint
            && fit.symmetric == SymmetricScale::Restricted
            && midpoint > 1.0;
        let outermost = scheme.dtype.reach();
        let reach = outermost;
        let (reach, table) = match scheme.dtype {
            QuantType::Int { .. } => (reach, None),
            // The power of two below it: the rule of the MX formats.
            QuantType::Float(_) if scheme.scale_format == ScaleFormat::E8m0 => {
                (scheme.scale_format.nearest(reach), None)
            }
            QuantType::Float(_) => (reach, None),
            QuantType::Table(levels) => (reach, Some(levels.table())),
        };
        Self {
            reach,
            outermost,
            table,
            scheme,
            fit: *fit,
            max_code: f32::from(scheme.dtype.max_code()),
            midpoint,
            lowest: if restricted { 1.0 } else { 0.0 },
        }
    }

    /// Whether a grid reaches as far down as up.
    pub(crate) fn is_symmetric(&self) -> bool {
        matches!(self.scheme.zero, ZeroFormat::None | ZeroFormat::Midpoint)
    }

    /// Whether the smallest and largest weight of a block say all that its grid depends on.
    #[inline(always)]
    pub(crate) fn is_min_max(&self) -> bool {
        let sign_counts = self.fit.symmetric == SymmetricScale::SignedExtreme;
        self.fit.range == Range::MinMax
            && !(self.scheme.zero == ZeroFormat::Midpoint && sign_counts)
    }

    /// The scale for a range before it is rounded to its format; never 0. `extreme` is the weight of
    /// the largest magnitude.
    #[inline(always)]
    pub(crate) fn exact_scale(&self, range: (f32, f32), extreme: f32) -> f32 {
        let (lo, hi) = self.extend(range);
        let symmetric = self.scheme.zero == ZeroFormat::Midpoint;
        if extreme == 0.0 && lo == hi {
            return 1.0;
        }
        let amax = hi.max(-lo);
        let exact = if matches!(self.scheme.zero, ZeroFormat::Real(_)) && lo == hi && lo != 0.0 {
            // The range from 0 to the one weight: a real zero must not be large.
            lo.abs() / self.max_code
        } else if self.scheme.zero == ZeroFormat::None {
            // Unsigned numbers have no level below 0.
            let unsigned = match self.scheme.dtype {
                QuantType::Int { .. } => true,
                QuantType::Float(format) => !format.is_signed(),
                QuantType::Table(_) => false,
            };
            (if unsigned { hi } else { amax }) / self.reach
        } else if symmetric {
            match self.fit.symmetric {
                SymmetricScale::HalfStep => amax / (self.max_code / 2.0),
                SymmetricScale::Restricted => amax / (self.midpoint - 1.0).max(1.0),
                SymmetricScale::Full => amax / self.midpoint,
                SymmetricScale::SignedExtreme => (-amax / self.midpoint).copysign(-extreme),
            }
        } else if (hi - lo).is_finite() {
            (hi - lo) / self.max_code
        } else {
            hi / self.max_code - lo / self.max_code
        };
        // A narrow range far from 0 has a large zero: steps are made so large that f16 can hold it.
        let exact = match self.scheme.zero {
            ZeroFormat::Real(ScaleFormat::F16) => exact.max(lo.abs() / F16_ZERO),
            _ => exact,
        };
        // A quotient too small for f32, or a range that was cut down to one number.
        if exact == 0.0 { f32::from_bits(1).copysign(exact) } else { exact }
    }

    /// The grid for a range whose scale is `exact`, and `scale` in its format. Its levels may be too
    /// large for f32: see [`reaches_infinity`](Self::reaches_infinity).
    #[inline(always)]
    pub(crate) fn grid(&self, range: (f32, f32), exact: f32, scale: f32) -> Grid {
        let (lo, hi) = self.extend(range);
        let zero = match self.scheme.zero {
            ZeroFormat::None | ZeroFormat::Offset(_) => 0.0,
            ZeroFormat::Midpoint => self.midpoint,
            // A two-level scale may be 0: then all codes stand for 0.
            ZeroFormat::Int | ZeroFormat::Real(_) if scale == 0.0 => 0.0,
            ZeroFormat::Int => nearest_even((-lo / scale).min(self.max_code)),
            ZeroFormat::Real(format) => format.nearest(-lo / scale),
        };
        let offset = match self.scheme.zero {
            ZeroFormat::Offset(format) => format.nearest(lo),
            _ => 0.0,
        };
        let mut grid = Grid::of(Params { scale, zero, offset });
        if self.fit.division == Division::ExactReciprocal && lo != hi && (1.0 / exact).is_finite() {
            grid.factor = 1.0 / exact;
            grid.reciprocal = true;
            if let ZeroFormat::Offset(_) = self.scheme.zero {
                grid.offset = lo;
            }
        }
        grid
    }

    /// The range of an integer zero contains 0.
    #[inline(always)]
    fn extend(&self, (lo, hi): (f32, f32)) -> (f32, f32) {
        match self.scheme.zero {
            ZeroFormat::None | ZeroFormat::Midpoint | ZeroFormat::Int => (lo.min(0.0), hi.max(0.0)),
            ZeroFormat::Real(_) | ZeroFormat::Offset(_) => (lo, hi),
        }
    }

    /// Whether a level, the lowest unused one of a symmetric grid included, is not a finite number.
    #[inline(always)]
    pub(crate) fn reaches_infinity(&self, grid: &Grid) -> bool {
        let lowest =
            if matches!(self.scheme.dtype, QuantType::Int { .. }) { 0.0 } else { -self.outermost };
        !(grid.params.real(lowest).is_finite() && grid.params.real(self.outermost).is_finite())
    }

    /// The code of each of `x`; `index` is that of the first in the matrix.
    #[inline(always)] // into callers that are compiled for newer instruction sets
    pub(crate) fn encode(&self, grid: &Grid, x: &[f32], codes: &mut [u8], index: u64) {
        match (self.scheme.dtype, &self.table) {
            (QuantType::Float(format), _) => return encode_floats(format, grid, x, codes),
            (_, Some(table)) => return encode_table(table, grid, x, codes),
            _ => {}
        }
        let integer = !matches!(self.scheme.zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
        // A loop for each rounding: with the constant known, each is a few instructions.
        match self.fit.rounding {
            Rounding::NearestEven if integer && !grid.reciprocal => {
                self.encode_nearest(grid, x, codes);
            }
            Rounding::NearestEven => self.encode_as(Rounding::NearestEven, grid, x, codes, index),
            Rounding::NearestAway => self.encode_as(Rounding::NearestAway, grid, x, codes, index),
            Rounding::NearestUp => self.encode_as(Rounding::NearestUp, grid, x, codes, index),
            Rounding::Floor => self.encode_as(Rounding::Floor, grid, x, codes, index),
            Rounding::TowardZero => self.encode_as(Rounding::TowardZero, grid, x, codes, index),
            Rounding::Stochastic { .. } => {
                self.encode_as(self.fit.rounding, grid, x, codes, index);
            }
        }
    }

    #[inline(always)]
    fn encode_as(&self, how: Rounding, grid: &Grid, x: &[f32], codes: &mut [u8], index: u64) {
        let zero = grid.params.zero;
        let (real_zero, int_zero) = match self.scheme.zero {
            ZeroFormat::Real(_) => (zero, 0.0),
            _ => (0.0, zero),
        };
        for (i, (&x, code)) in x.iter().zip(codes).enumerate() {
            let x = x - grid.offset;
            let steps = grid.steps(x);
            // Clamped first: rounding wants small numbers, and x / scale may be infinite.
            let steps = (steps + real_zero).clamp(-512.0, 512.0);
            let rounded = how.code(steps, int_zero, index + i as u64);
            *code = nearest_even_i32(rounded.max(self.lowest).min(self.max_code)) as u8;
        }
    }

    /// [`encode_as`](Self::encode_as) in the common case: nothing but a division, and the zero
    /// added as an integer.
    #[inline(always)]
    fn encode_nearest(&self, grid: &Grid, x: &[f32], codes: &mut [u8]) {
        let zero = grid.params.zero;
        let code = Code {
            scale: grid.factor,
            lowest: self.lowest - zero,
            highest: self.max_code - zero,
            zero: nearest_even_i32(zero),
        };
        // Whole vectors for short blocks too.
        let (vectors, x) = x.as_chunks::<32>();
        let (code_vectors, codes) = codes.split_at_mut(32 * vectors.len());
        for (x, codes) in vectors.iter().zip(code_vectors.as_chunks_mut::<32>().0) {
            for i in 0..32 {
                codes[i] = code.of(x[i]);
            }
        }
        for (&x, to) in x.iter().zip(codes) {
            *to = code.of(x);
        }
    }
}

impl Grid {
    /// Weights are divided by the scale as it is stored.
    pub(crate) fn of(params: Params) -> Self {
        let factor = if params.scale == 0.0 { 1.0 } else { params.scale };
        Self { params, offset: params.offset, factor, reciprocal: false }
    }

    #[inline(always)]
    fn steps(&self, x: f32) -> f32 {
        if self.reciprocal { x * self.factor } else { x / self.factor }
    }
}

/// Numbers that are scaled at a time, before they are encoded.
const CHUNK: usize = 64;

fn encode_floats(format: Format, grid: &Grid, x: &[f32], codes: &mut [u8]) {
    match format {
        Format::F8E4M3 => encode_as_type::<F8E4M3>(grid, x, codes),
        Format::F8E5M2 => encode_as_type::<F8E5M2>(grid, x, codes),
        Format::F6E2M3 => encode_as_type::<F6E2M3>(grid, x, codes),
        Format::F6E3M2 => encode_as_type::<F6E3M2>(grid, x, codes),
        Format::F4E2M1 => encode_as_type::<F4E2M1>(grid, x, codes),
        _ => {
            // Without a sign, what is negative saturates at the lowest level.
            let lowest = if format.is_signed() { f32::NEG_INFINITY } else { 0.0 };
            for (&x, code) in x.iter().zip(codes) {
                *code = format.encode(grid.steps(x).max(lowest), Overflow::Saturate);
            }
        }
    }
}

fn encode_as_type<T: SmallFloat + bytemuck::Pod>(grid: &Grid, x: &[f32], codes: &mut [u8]) {
    for (x, codes) in x.chunks(CHUNK).zip(codes.chunks_mut(CHUNK)) {
        let (mut steps, mut small) = ([0.0; CHUNK], [T::zeroed(); CHUNK]);
        for (steps, &x) in steps.iter_mut().zip(x) {
            *steps = grid.steps(x);
        }
        // It fails only on unequal lengths.
        let _ = encode_slice(&steps, &mut small, Nearest::NearestEven, Overflow::Saturate);
        codes.copy_from_slice(&bytemuck::cast_slice(&small)[..codes.len()]);
    }
}

fn encode_table(table: &Table16, grid: &Grid, x: &[f32], codes: &mut [u8]) {
    for (x, codes) in x.chunks(CHUNK).zip(codes.chunks_mut(CHUNK)) {
        let mut steps = [0.0; CHUNK];
        for (steps, &x) in steps.iter_mut().zip(x) {
            *steps = grid.steps(x);
        }
        // It fails only on unequal lengths.
        let _ = table.encode_slice(&steps[..codes.len()], codes);
    }
}

/// `clamp(round(x / scale), lowest, highest) + zero`
#[derive(Clone, Copy)]
struct Code {
    scale: f32,
    lowest: f32,
    highest: f32,
    zero: i32,
}

impl Code {
    #[inline(always)]
    fn of(self, x: f32) -> u8 {
        let steps = (x / self.scale).max(self.lowest).min(self.highest);
        (nearest_even_i32(steps) + self.zero) as u8
    }
}

impl Fit {
    /// The default as a constant: the whole range, to nearest even.
    pub const NEAREST: Self = Self {
        range: Range::MinMax,
        symmetric: SymmetricScale::HalfStep,
        rounding: Rounding::NearestEven,
        division: Division::Stored,
    };

    /// Whether it has a meaning for `scheme`, which is valid.
    pub(crate) fn check(&self, scheme: QuantScheme) -> Result<()> {
        if !matches!(scheme.dtype, QuantType::Int { .. }) && self.rounding != Rounding::NearestEven
        {
            let what = format!("{} to {}", self.rounding, scheme.dtype);
            return Err(Error::Unsupported { by: "round to nearest", what });
        }
        let parameter = |what, value, expected| Err(Error::Parameter { what, value, expected });
        match self.range {
            Range::Percentile(percent) => check_percent(percent).map(drop),
            Range::Search { grid: 0, .. } => parameter("grid", 0.0, "at least 1"),
            Range::Search { grid, candidates, .. } if candidates == 0 || candidates > grid => {
                parameter("candidates", f64::from(candidates), "at least 1, at most grid")
            }
            Range::Search { norm, .. } if !(norm > 0.0 && norm.is_finite()) => {
                parameter("norm", f64::from(norm), "more than 0")
            }
            _ => Ok(()),
        }
    }
}

/// What other systems do, by name: the scheme that they store and the fit that they use.
///
/// Group scales and codes are theirs; the layout of the codes in a file is another matter. Where
/// another system has a defect, it is left out, and said so.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QMatrix, presets};
///
/// // GGUF's Q4_0: the extreme weight, −0.9, is code 0 (−8), and the scale keeps its sign.
/// let w = Mat::from_fn(1, 32, |_, c| if c == 5 { -0.9 } else { 0.01 * c as f32 });
/// let (scheme, fit) = presets::gguf_q4_0();
/// let q = QMatrix::quantize_with(w.as_ref(), scheme, &fit, None)?;
/// assert!((q.params(0, 0).scale - 0.9 / 8.0).abs() < 1e-4);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub mod presets {
    use super::*;
    use crate::Granularity;

    const NEAREST: Fit = Fit::NEAREST;
    const RESTRICTED: Fit = Fit { symmetric: SymmetricScale::Restricted, ..NEAREST };

    /// GPTQ (AutoGPTQ, GPTQModel), symmetric: `absmax / 7.5` for 4 bits.
    ///
    /// Theirs leaves the minimum of an all-positive group at 0, which shrinks it to 0.467.
    pub const fn gptq_sym(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        (QuantScheme::symmetric(bits, granularity), NEAREST)
    }

    /// GPTQ with zero-points: `(max − min) / (2^b − 1)` over a range with 0 in it.
    pub const fn gptq(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        (QuantScheme::affine(bits, granularity), NEAREST)
    }

    /// AWQ, symmetric: `absmax / 7` for 4 bits.
    pub const fn awq_sym(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        (QuantScheme::symmetric(bits, granularity), RESTRICTED)
    }

    /// AWQ with zero-points: `(max − min) / (2^b − 1)`.
    ///
    /// Theirs does not put 0 into the range of a one-signed group, and clamps its zero-point:
    /// weights between 0.9 and 1.0 come back as 0 to 0.1.
    pub const fn awq(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        gptq(bits, granularity)
    }

    /// compressed-tensors (vLLM), symmetric: `absmax / ((2^b − 1) / 2)`, scales in bf16.
    pub const fn compressed_tensors_sym(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::symmetric(bits, granularity);
        (QuantScheme { scale_format: ScaleFormat::Bf16, ..scheme }, NEAREST)
    }

    /// compressed-tensors with zero-points, scales in bf16.
    pub const fn compressed_tensors(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::affine(bits, granularity);
        (QuantScheme { scale_format: ScaleFormat::Bf16, ..scheme }, NEAREST)
    }

    /// ONNX Runtime's weights, int8 and symmetric: `absmax / 127`, scales in f32.
    pub const fn onnx_sym(granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::symmetric(8, granularity);
        (QuantScheme { scale_format: ScaleFormat::F32, ..scheme }, RESTRICTED)
    }

    /// ONNX's `DynamicQuantizeLinear`: uint8 with a zero-point, scales in f32.
    pub const fn onnx(granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::affine(8, granularity);
        (QuantScheme { scale_format: ScaleFormat::F32, ..scheme }, NEAREST)
    }

    /// bitsandbytes' int8 weights (LLM.int8): a row's `absmax / 127`, in f32.
    ///
    /// Theirs turns a row of zeros into NaN.
    pub const fn bitsandbytes_int8() -> (QuantScheme, Fit) {
        onnx_sym(Granularity::PerChannel)
    }

    const fn ggml_sym(
        bits: u8,
        symmetric: SymmetricScale,
        rounding: Rounding,
    ) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::symmetric(bits, Granularity::PerGroup(32));
        let division = Division::ExactReciprocal;
        (scheme, Fit { symmetric, rounding, division, ..NEAREST })
    }

    const fn ggml_offset(bits: u8) -> (QuantScheme, Fit) {
        let (scheme, fit) = ggml_sym(bits, SymmetricScale::HalfStep, Rounding::NearestUp);
        (QuantScheme { zero: ZeroFormat::Offset(ScaleFormat::F16), ..scheme }, fit)
    }

    /// GGUF Q4_0: groups of 32, the signed extreme over −8.
    pub const fn gguf_q4_0() -> (QuantScheme, Fit) {
        ggml_sym(4, SymmetricScale::SignedExtreme, Rounding::NearestUp)
    }

    /// GGUF Q5_0: groups of 32, the signed extreme over −16.
    pub const fn gguf_q5_0() -> (QuantScheme, Fit) {
        ggml_sym(5, SymmetricScale::SignedExtreme, Rounding::NearestUp)
    }

    /// GGUF Q8_0: groups of 32, `absmax / 127`.
    pub const fn gguf_q8_0() -> (QuantScheme, Fit) {
        ggml_sym(8, SymmetricScale::Restricted, Rounding::NearestAway)
    }

    /// GGUF Q4_1: groups of 32, `scale · code + min`.
    pub const fn gguf_q4_1() -> (QuantScheme, Fit) {
        ggml_offset(4)
    }

    /// GGUF Q5_1: groups of 32, `scale · code + min`.
    pub const fn gguf_q5_1() -> (QuantScheme, Fit) {
        ggml_offset(5)
    }

    /// NF4 as bitsandbytes stores it without double quantization: `absmax` in f32.
    pub const fn nf4(granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::levels(QuantType::NF4, granularity);
        let division = Division::ExactReciprocal;
        (QuantScheme { scale_format: ScaleFormat::F32, ..scheme }, Fit { division, ..NEAREST })
    }

    /// FP8 weights: `absmax` over the largest number of the format, in f32.
    pub const fn fp8(format: Format, granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::levels(QuantType::Float(format), granularity);
        (QuantScheme { scale_format: ScaleFormat::F32, ..scheme }, NEAREST)
    }

    /// MXFP4 and its relatives: `format` in groups of 32, each with a power of two (OCP
    /// Microscaling Formats 1.0, section 6.3).
    pub const fn mx(format: Format) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::levels(QuantType::Float(format), Granularity::PerGroup(32));
        (QuantScheme { scale_format: ScaleFormat::E8m0, ..scheme }, NEAREST)
    }

    /// NVFP4: FP4 E2M1 in groups of 16, each with an E4M3 scale over one f32 for the matrix.
    pub const fn nvfp4() -> (QuantScheme, Fit) {
        let dtype = QuantType::Float(Format::F4E2M1);
        let scheme = QuantScheme::levels(dtype, Granularity::PerGroup(16));
        let scale_format = ScaleFormat::TwoLevel(crate::TwoLevel::NVFP4);
        (QuantScheme { scale_format, ..scheme }, NEAREST)
    }

    /// HQQ's starting point: `(max − min) / (2^b − 1)` and a real zero-point, both in f16.
    pub const fn hqq(bits: u8, granularity: Granularity) -> (QuantScheme, Fit) {
        let scheme = QuantScheme::affine(bits, granularity);
        (QuantScheme { zero: ZeroFormat::Real(ScaleFormat::F16), ..scheme }, NEAREST)
    }
}
