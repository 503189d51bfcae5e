use alloc::format;

use lowbit_dtypes::{Format, Table16};

use crate::{Base, Error, Result, ScaleFormat};

/// What a code means before scale and zero are applied: `real = scale · (level(code) − zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum QuantType {
    /// Unsigned integers of 1 to 8 bits: `level(code) = code`.
    Int {
        /// Bits of a code.
        bits: u8,
    },
    /// Floats of up to 8 bits, such as FP8 E4M3 or FP4 E2M1. A code of NaN or infinity that a file
    /// holds stays one.
    Float(Format),
    /// A list of up to 16 numbers.
    Table(Levels),
}

impl QuantType {
    /// NormalFloat 4 of QLoRA: [`Table16::NF4`].
    pub const NF4: Self = Self::Table(Levels::of(&Table16::NF4));
    /// AbnormalFloat 4 for blocks of 64: [`Table16::AF4`].
    pub const AF4: Self = Self::Table(Levels::of(&Table16::AF4));
    /// The 4-bit float of bitsandbytes: [`Table16::FP4_BNB`].
    pub const FP4_BNB: Self = Self::Table(Levels::of(&Table16::FP4_BNB));
    /// The table of ggml's IQ4_NL and IQ4_XS: [`Table16::IQ4_NL`].
    pub const IQ4_NL: Self = Self::Table(Levels::of(&Table16::IQ4_NL));
    /// The 4 levels of least squared error for normally distributed numbers, the outermost at ±1.
    /// (Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960, table I.)
    pub const LLOYD_MAX4: Self = Self::Table(Levels::both_signs([0.452_78, 1.510_42]));
    /// [`LLOYD_MAX4`](Self::LLOYD_MAX4) with 8 levels.
    pub const LLOYD_MAX8: Self =
        Self::Table(Levels::both_signs([0.245_09, 0.756_01, 1.343_91, 2.151_95]));
    /// [`LLOYD_MAX4`](Self::LLOYD_MAX4) with 16 levels.
    pub const LLOYD_MAX16: Self = Self::Table(Levels::both_signs([
        0.128_40, 0.388_05, 0.656_76, 0.942_34, 1.256_23, 1.618_05, 2.069_02, 2.732_59,
    ]));

    /// Bits of one stored code.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Int { bits } => bits,
            Self::Float(format) => format.bits() as u8,
            Self::Table(levels) => levels.bits,
        }
    }

    /// The largest code, `2^bits − 1`.
    pub const fn max_code(self) -> u8 {
        match self.bits() {
            0 => 0,
            bits @ 1..8 => (1 << bits) - 1,
            _ => u8::MAX,
        }
    }

    /// The number that `code` stands for in units of the scale; bits above the type's are ignored.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::QuantType;
    /// use lowbit_dtypes::Format;
    ///
    /// assert_eq!(QuantType::Int { bits: 4 }.level(9), 9.0);
    /// assert_eq!(QuantType::Float(Format::F4E2M1).level(9), -0.5);
    /// assert_eq!(QuantType::NF4.level(0), -1.0);
    /// ```
    #[inline]
    pub const fn level(self, code: u8) -> f32 {
        let code = code & self.max_code();
        match self {
            Self::Int { .. } => code as f32,
            Self::Float(format) => format.decode(code),
            Self::Table(levels) => levels.levels[code as usize % 16],
        }
    }

    /// The largest magnitude of a finite level.
    pub const fn reach(self) -> f32 {
        match self {
            Self::Int { .. } => self.max_code() as f32,
            Self::Float(format) => format.max(),
            Self::Table(levels) => {
                let (mut reach, mut code) = (0.0, 0);
                while code < 16 {
                    let level = levels.levels[code].abs();
                    if level > reach {
                        reach = level;
                    }
                    code += 1;
                }
                reach
            }
        }
    }

    /// The levels of all codes as integers in a common unit, `level(code) ≈ unit · integers[code]`,
    /// for products with integer activations; `None` for floats of more than 16 bits in that form.
    ///
    /// Integers, FP4, FP6 and tables of whole numbers are exact, and so are tables of multiples of a
    /// common unit that fit a byte. The levels of other tables are rounded to 16 bits,
    /// `unit = reach / 32767`.
    pub fn integer_levels(self) -> Option<IntegerLevels> {
        let unit = match self {
            Self::Int { .. } => 1.0,
            Self::Float(format) => {
                // Multiples of the smallest number.
                let unit = format.min_positive_subnormal();
                if format.max() / unit > 32767.0 || format.nan_code().is_some() {
                    return None;
                }
                unit
            }
            Self::Table(levels) => {
                let whole = |x: &f32| x.abs() < 32768.0 && *x == (*x as i32) as f32;
                let whole = levels.levels.iter().all(whole);
                let divisor = levels.divisor();
                if whole && levels.fit_bytes(1.0) {
                    1.0
                } else if levels.fit_bytes(divisor) {
                    divisor
                } else if whole {
                    1.0
                } else {
                    self.reach() / 32767.0
                }
            }
        };
        let mut integers = [0; 256];
        for (code, integer) in (0..=self.max_code()).zip(&mut integers) {
            *integer = libm::rintf(self.level(code) / unit) as i16;
        }
        Some(IntegerLevels { integers, unit })
    }
}

/// What [`QuantType::integer_levels`] gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IntegerLevels {
    /// The level of each code in steps of `unit`; 0 behind the last code.
    pub integers: [i16; 256],
    /// The unit.
    pub unit: f32,
}

/// Up to 16 levels of a [`QuantType::Table`], in any order.
///
/// A weight becomes the nearest of them; of two that are equally near, the lower level.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Levels, Mat, QMatrix, QuantScheme, QuantType};
///
/// let squares = QuantType::Table(Levels::new(&[-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0, 16.0])?);
/// assert_eq!(squares.bits(), 3);
/// let w = Mat::from_fn(1, 4, |_, c| [8.0, 2.2, -2.0, 0.1][c]);
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::levels(squares, Granularity::PerChannel))?;
/// assert_eq!(q.dequantize().data(), [8.0, 2.0, -2.0, 0.0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    bits: u8,
    /// Behind the last one, the first again.
    levels: [f32; 16],
}

impl Levels {
    /// The levels of codes 0, 1, 2, …: 2, 4, 8 or 16 of them.
    ///
    /// # Errors
    /// [`Error::Parameter`] for another number of levels, or if all of them are 0;
    /// [`Error::NotFinite`] at the first that is not finite.
    pub fn new(levels: &[f32]) -> Result<Self> {
        let bits = levels.len().checked_ilog2().unwrap_or(0);
        if !(1..=4).contains(&bits) || levels.len() != 1 << bits {
            let (what, value) = ("levels of a table", levels.len() as f64);
            return Err(Error::Parameter { what, value, expected: "2, 4, 8 or 16" });
        }
        if let Some(col) = levels.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { what: "level", row: 0, col });
        }
        if levels.iter().all(|x| *x == 0.0) {
            return Err(Error::Parameter {
                what: "largest level",
                value: 0.0,
                expected: "another",
            });
        }
        let mut all = [levels[0]; 16];
        all[..levels.len()].copy_from_slice(levels);
        Ok(Self { bits: bits as u8, levels: all })
    }

    /// Ascending positive levels and their negatives, in units of the largest.
    const fn both_signs<const N: usize>(positive: [f32; N]) -> Self {
        let largest = positive[N - 1];
        let mut levels = [-1.0; 16];
        let mut i = 0;
        while i < N {
            levels[N - 1 - i] = -(positive[i] / largest);
            levels[N + i] = positive[i] / largest;
            i += 1;
        }
        Self { bits: (2 * N).ilog2() as u8, levels }
    }

    const fn of(table: &Table16) -> Self {
        Self { bits: 4, levels: *table.levels() }
    }

    /// The greatest number of which every level is a multiple.
    fn divisor(&self) -> f32 {
        // Remainders are exact, and a divisor of an f32 has no more digits than it.
        let euclid = |mut a: f64, mut b: f64| {
            while b != 0.0 {
                (a, b) = (b, a % b);
            }
            a
        };
        self.levels.iter().fold(0.0, |divisor, x| euclid(divisor, f64::from(x.abs()))) as f32
    }

    /// Do levels and 0, in steps of `unit`, lie in a range of 256 integers?
    fn fit_bytes(&self, unit: f32) -> bool {
        let ends = |(lo, hi): (f32, f32), x: &f32| (lo.min(*x), hi.max(*x));
        let (lo, hi) = self.levels.iter().fold((0.0, 0.0), ends);
        f64::from(hi) - f64::from(lo) <= 255.0 * f64::from(unit)
    }

    /// The levels, by code.
    pub fn as_slice(&self) -> &[f32] {
        &self.levels[..1 << self.bits]
    }

    /// What finds the nearest level: of equal ones it takes the first.
    pub(crate) fn table(&self) -> Table16 {
        // Its thresholds are not quite the midpoints.
        if self.levels == *Table16::FP4_BNB.levels() {
            return Table16::FP4_BNB;
        }
        Table16::new(self.levels).unwrap_or(Table16::NF4) // all are finite
    }
}

/// Which weights share a scale (and a zero): every granularity is a block of `(rows, cols)`.
///
/// Blocks need not divide the matrix: those at the right and lower edges are smaller.
///
/// # Example
/// ```
/// use lowbit_core::Granularity;
///
/// assert_eq!(Granularity::PerChannel.block(64, 100), (1, 100));
/// assert_eq!(Granularity::PerGroup(32).block(64, 100), (1, 32));
/// assert_eq!(Granularity::PerGroup(32).grid(64, 100), (64, 4)); // 32 + 32 + 32 + 4
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// One block: the whole matrix.
    PerTensor,
    /// One block for each output channel (row).
    PerChannel,
    /// One block for each input channel (column).
    PerColumn,
    /// `group_size` consecutive weights of a row.
    PerGroup(usize),
    /// Two-dimensional blocks of `(rows, cols)`.
    PerBlock(usize, usize),
}

impl Granularity {
    /// Rows and columns of a full block in an `n × k` matrix.
    ///
    /// Where a block is at least as large as the matrix, the matrix's size is given (at least 1).
    pub const fn block(self, n: usize, k: usize) -> (usize, usize) {
        const fn whole(size: usize) -> usize {
            if size == 0 { 1 } else { size }
        }
        const fn at_most(block: usize, size: usize) -> usize {
            if block < whole(size) { block } else { whole(size) }
        }
        match self {
            Self::PerTensor => (whole(n), whole(k)),
            Self::PerChannel => (1, whole(k)),
            Self::PerColumn => (whole(n), 1),
            Self::PerGroup(group_size) => (1, at_most(group_size, k)),
            Self::PerBlock(rows, cols) => (at_most(rows, n), at_most(cols, k)),
        }
    }

    /// How many blocks there are down and across an `n × k` matrix; `(0, 0)` for an empty block.
    pub const fn grid(self, n: usize, k: usize) -> (usize, usize) {
        match self.block(n, k) {
            (0, _) | (_, 0) => (0, 0),
            (rows, cols) => (n.div_ceil(rows), k.div_ceil(cols)),
        }
    }
}

/// What is subtracted from a code, and how it is stored.
///
/// Texts and files know two conventions. With a zero-point `Z`, `real = scale · (code − Z)` (Jacob
/// et al., arXiv:1712.05877, equation 1); with an offset `O`, `real = scale · code + O` (GGUF Q4_1,
/// KIVI). [`Params`] converts one into the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ZeroFormat {
    /// Nothing: code 0 of an integer is 0, and floats and tables have a 0 of their own.
    None,
    /// `Z = 2^(bits − 1)` in every block, not stored: symmetric quantization with integers.
    Midpoint,
    /// An integer `Z` of `bits` bits for each block. Real 0 has a code of its own.
    Int,
    /// A real `Z` for each block; not in E8M0, which has no 0.
    Real(ScaleFormat),
    /// An offset `O` for each block, in the unit of the weights; not in E8M0.
    Offset(ScaleFormat),
}

impl ZeroFormat {
    /// Whether there is a buffer of zeros.
    pub(crate) const fn is_stored(self) -> bool {
        matches!(self, Self::Int | Self::Real(_) | Self::Offset(_))
    }

    /// The format of a stored real number; `None` for integers.
    pub(crate) const fn real(self) -> Option<ScaleFormat> {
        match self {
            Self::None | Self::Midpoint | Self::Int => None,
            Self::Real(format) | Self::Offset(format) => Some(format),
        }
    }
}

/// What turns the levels of one block into numbers: `real = scale · (level − zero) + offset`.
///
/// One of `zero` and `offset` is 0, depending on the [`ZeroFormat`].
///
/// # Example
/// ```
/// use lowbit_core::Params;
///
/// let zero_point = Params { scale: 0.5, zero: 3.0, offset: 0.0 };
/// assert_eq!(zero_point.real(7.0), 2.0);
///
/// let additive = zero_point.to_offset();
/// assert_eq!(additive, Params { scale: 0.5, zero: 0.0, offset: -1.5 });
/// assert_eq!(additive.to_zero_point(), zero_point);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Params {
    /// The step between two levels; negative where the extreme weight's sign is kept in it.
    pub scale: f32,
    /// The level of real 0; an integer for [`ZeroFormat::Int`] and [`ZeroFormat::Midpoint`].
    pub zero: f32,
    /// What code 0 stands for, for [`ZeroFormat::Offset`]; otherwise 0.
    pub offset: f32,
}

impl Params {
    /// The number that a [`QuantType::level`] stands for; every operation is rounded once to f32.
    #[inline]
    pub fn real(self, level: f32) -> f32 {
        self.scale * (level - self.zero) + self.offset
    }

    /// The same levels (but for rounding) as `scale · code + offset`.
    #[must_use]
    pub fn to_offset(self) -> Self {
        Self { zero: 0.0, offset: self.offset - self.scale * self.zero, ..self }
    }

    /// The same levels (but for rounding) as `scale · (code − zero)`, where scale is not 0.
    #[must_use]
    pub fn to_zero_point(self) -> Self {
        if self.scale == 0.0 {
            return self;
        }
        Self { zero: self.zero - self.offset / self.scale, offset: 0.0, ..self }
    }
}

/// How a matrix is stored: what a code means, who shares a scale, and in which form.
///
/// How scales and codes are chosen is not part of it: see [`Fit`](crate::Fit).
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, QuantScheme, ScaleFormat, ZeroFormat};
///
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::Bf16,
///     ..QuantScheme::affine(4, Granularity::PerGroup(128))
/// };
/// assert_eq!(scheme.zero, ZeroFormat::Int);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantScheme {
    /// What a code means.
    pub dtype: QuantType,
    /// Which weights share a scale and a zero.
    pub granularity: Granularity,
    /// What is subtracted from a code.
    pub zero: ZeroFormat,
    /// How the scales are stored.
    pub scale_format: ScaleFormat,
}

impl QuantScheme {
    /// Integers of `bits` bits around a fixed zero of `2^(bits − 1)`, with f16 scales.
    pub const fn symmetric(bits: u8, granularity: Granularity) -> Self {
        Self {
            dtype: QuantType::Int { bits },
            granularity,
            zero: ZeroFormat::Midpoint,
            scale_format: ScaleFormat::F16,
        }
    }

    /// Integers of `bits` bits with an integer zero for each block, with f16 scales.
    pub const fn affine(bits: u8, granularity: Granularity) -> Self {
        Self { zero: ZeroFormat::Int, ..Self::symmetric(bits, granularity) }
    }

    /// Floats or a table, which have their own 0, with f16 scales.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme, QuantType, ScaleFormat};
    /// use lowbit_dtypes::Format;
    ///
    /// // MXFP4: FP4 E2M1 in groups of 32, each with a power of two.
    /// let mxfp4 = QuantScheme {
    ///     scale_format: ScaleFormat::E8m0,
    ///     ..QuantScheme::levels(QuantType::Float(Format::F4E2M1), Granularity::PerGroup(32))
    /// };
    /// let w = Mat::from_fn(1, 64, |_, c| c as f32);
    /// let q = QMatrix::quantize(w.as_ref(), mxfp4)?;
    /// assert_eq!(q.bits_per_weight(), 4.25);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub const fn levels(dtype: QuantType, granularity: Granularity) -> Self {
        Self { dtype, granularity, zero: ZeroFormat::None, scale_format: ScaleFormat::F16 }
    }

    /// The zero of every block of a symmetric scheme, `2^(bits − 1)`; 0 without any.
    pub const fn midpoint(self) -> u8 {
        match self.zero {
            ZeroFormat::None => 0,
            _ => self.dtype.max_code() / 2 + 1,
        }
    }

    /// Are scales small integers over one step for each row, so that every `(code − zero) · scale` fits
    /// int8? One integer sum then goes over all groups of a row, multiplied by the step at its end: see
    /// [`QLinear`](crate::QLinear).
    ///
    /// Codes must be integers with integer zeros, scales [`TwoLevel::integer`](crate::TwoLevel::integer) of at
    /// most so many bits:
    ///
    /// | bits of a code | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |
    /// |---|---|---|---|---|---|---|---|---|
    /// | symmetric | 7 | 6 | 5 | 4 | 3 | 2 | 1 | 1 |
    /// | with zero-points | 7 | 5 | 4 | 3 | 2 | 1 | 1 | – |
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, QuantScheme, ScaleFormat, TwoLevel};
    ///
    /// let scales = |bits| QuantScheme {
    ///     scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(bits)),
    ///     ..QuantScheme::symmetric(4, Granularity::PerGroup(32))
    /// };
    /// assert!(scales(4).has_integer_scales()); // −8·15 = −120
    /// assert!(!scales(5).has_integer_scales());
    /// ```
    pub fn has_integer_scales(self) -> bool {
        let max = i32::from(self.dtype.max_code());
        let (lo, hi) = match self.zero {
            ZeroFormat::None => (0, max),
            ZeroFormat::Midpoint => (-i32::from(self.midpoint()), max - i32::from(self.midpoint())),
            ZeroFormat::Int => (-max, max),
            ZeroFormat::Real(_) | ZeroFormat::Offset(_) => return false,
        };
        match (self.dtype, self.scale_format) {
            (QuantType::Int { .. }, ScaleFormat::TwoLevel(two)) => {
                let largest = i32::from(two.dtype.max_code());
                matches!(two.dtype, QuantType::Int { .. })
                    && matches!(two.granularity, Granularity::PerChannel | Granularity::PerTensor)
                    && two.base == Base::Zero
                    && lo * largest >= i8::MIN.into()
                    && hi * largest <= i8::MAX.into()
            }
            _ => false,
        }
    }

    /// Rejects widths outside 1..=8, blocks without elements, and zeros of types that have their own.
    pub(crate) fn check(self) -> Result<()> {
        let bits = self.dtype.bits();
        if !(1..=8).contains(&bits) {
            return Err(Error::Bits { bits });
        }
        let (rows, cols) = self.granularity.block(usize::MAX, usize::MAX);
        if rows == 0 || cols == 0 {
            return Err(Error::EmptyBlock { rows, cols });
        }
        if !matches!(self.dtype, QuantType::Int { .. }) && self.zero != ZeroFormat::None {
            let what = format!("{} for {}", self.zero, self.dtype);
            return Err(Error::Unsupported { by: "a scheme", what });
        }
        if self.zero.real() == Some(ScaleFormat::E8m0) {
            let what =
                "zeros or offsets in E8M0, which has neither 0 nor negative numbers; use f16";
            return Err(Error::Unsupported { by: "a scheme", what: what.into() });
        }
        for format in [Some(self.scale_format), self.zero.real()].into_iter().flatten() {
            if let ScaleFormat::TwoLevel(two) = format {
                two.scheme().check()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TwoLevel;

    #[test]
    fn integer_scales_have_as_many_bits_as_leave_products_in_int8() {
        let most = |zero, bits| {
            let scheme = |scale_bits| QuantScheme {
                zero,
                scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(scale_bits)),
                ..QuantScheme::symmetric(bits, Granularity::PerGroup(32))
            };
            (1..=8).filter(|&scale_bits| scheme(scale_bits).has_integer_scales()).max()
        };
        let symmetric = [7, 6, 5, 4, 3, 2, 1, 1].map(Some);
        let affine = [Some(7), Some(5), Some(4), Some(3), Some(2), Some(1), Some(1), None];
        for bits in 1..=8 {
            let index = usize::from(bits - 1);
            assert_eq!(most(ZeroFormat::Midpoint, bits), symmetric[index], "{bits}");
            assert_eq!(most(ZeroFormat::Int, bits), affine[index], "{bits}");
            assert_eq!(most(ZeroFormat::Real(ScaleFormat::F16), bits), None, "{bits}");
        }
    }
}
