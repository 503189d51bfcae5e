use lowbit_dtypes::{
    Overflow, Rounding as Nearest, SmallFloat, bf16, decode_slice, encode_slice, f16,
};

use crate::{Error, Result};

/// What a code means before scale and zero are applied: `real = scale · (level(code) − zero)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantType {
    /// Unsigned integers of 1 to 8 bits: `level(code) = code`.
    Int {
        /// Bits of a code.
        bits: u8,
    },
}

impl QuantType {
    /// Bits of one stored code.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Int { bits } => bits,
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

/// As [`ScaleFormat::round_slice`], but that small numbers become 0.
fn round_halves<H: SmallFloat + bytemuck::Pod>(
    exact: &[f32],
    rounded: &mut [f32],
    bytes: &mut [u8],
) {
    const CHUNK: usize = 64;
    let mut halves = [H::zeroed(); CHUNK];
    let (bytes, _) = bytes.as_chunks_mut::<2>();
    let chunks = exact.chunks(CHUNK).zip(rounded.chunks_mut(CHUNK)).zip(bytes.chunks_mut(CHUNK));
    for ((exact, rounded), bytes) in chunks {
        let halves = &mut halves[..exact.len()];
        // They fail only on unequal lengths.
        let _ = encode_slice(exact, halves, Nearest::NearestEven, Overflow::Infinity);
        let _ = decode_slice(halves, rounded);
        for (half, bytes) in halves.iter().zip(bytes) {
            *bytes = bytemuck::cast::<H, u16>(*half).to_le_bytes();
        }
    }
}

/// How a scale is stored. Scales are rounded to this format *before* the codes are computed, so
/// the codes are the nearest ones for the scale that will be read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScaleFormat {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes, at most 65504.
    F16,
    /// bfloat16, 2 bytes, the range of f32 with 8 bits of precision.
    Bf16,
}

impl ScaleFormat {
    /// Bytes of one stored scale.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `scale` rounded to nearest, ties to even. A scale other than 0 never becomes 0 (it becomes
    /// the smallest number of the format and its sign); one beyond the largest becomes infinite.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::ScaleFormat;
    ///
    /// assert_eq!(ScaleFormat::F16.round(1.0 + 1e-4), 1.0);
    /// assert_eq!(ScaleFormat::F16.round(1e-30), 2.0_f32.powi(-24));
    /// assert_eq!(ScaleFormat::F16.round(1e6), f32::INFINITY);
    /// ```
    #[inline]
    pub fn round(self, scale: f32) -> f32 {
        let smallest = match self {
            Self::F32 => f32::from_bits(1),
            Self::F16 => f16::MIN_POSITIVE_SUBNORMAL.to_f32(),
            Self::Bf16 => bf16::MIN_POSITIVE_SUBNORMAL.to_f32(),
        };
        let rounded = self.nearest(scale);
        if rounded == 0.0 && scale != 0.0 { smallest.copysign(scale) } else { rounded }
    }

    /// [`round`](Self::round) of each of `exact`, also written to the front of `bytes`.
    pub(crate) fn round_slice(self, exact: &[f32], rounded: &mut [f32], bytes: &mut [u8]) {
        match self {
            Self::F32 => {
                rounded.copy_from_slice(exact);
                for (x, bytes) in exact.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = x.to_le_bytes();
                }
            }
            Self::F16 => round_halves::<f16>(exact, rounded, bytes),
            Self::Bf16 => round_halves::<bf16>(exact, rounded, bytes),
        }
        for (i, (&exact, rounded)) in exact.iter().zip(rounded).enumerate() {
            if *rounded == 0.0 && exact != 0.0 {
                *rounded = self.round(exact);
                self.write(*rounded, &mut bytes[i * self.bytes()..][..self.bytes()]);
            }
        }
    }

    /// `x` rounded to nearest, ties to even; small numbers may become 0.
    #[inline]
    pub(crate) fn nearest(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// Writes a number that this format holds, little-endian.
    #[inline]
    pub(crate) fn write(self, scale: f32, to: &mut [u8]) {
        match self {
            Self::F32 => to.copy_from_slice(&scale.to_le_bytes()),
            Self::F16 => to.copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
            Self::Bf16 => to.copy_from_slice(&bf16::from_f32(scale).to_le_bytes()),
        }
    }

    /// Reads the number at `index`; zero behind the end.
    pub(crate) fn read(self, bytes: &[u8], index: usize) -> f32 {
        let at = index * self.bytes();
        match (self, bytes.get(at..at + self.bytes())) {
            (Self::F32, Some(&[a, b, c, d])) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, Some(&[a, b])) => f16::from_le_bytes([a, b]).to_f32(),
            (Self::Bf16, Some(&[a, b])) => bf16::from_le_bytes([a, b]).to_f32(),
            _ => 0.0,
        }
    }
}

/// What is subtracted from a code, and how it is stored.
///
/// Texts and files know two conventions. With a zero-point `Z`, `real = scale · (code − Z)` (Jacob
/// et al., arXiv:1712.05877, equation 1); with an offset `O`, `real = scale · code + O` (GGUF Q4_1,
/// KIVI). [`Params`] converts one into the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroFormat {
    /// `Z = 2^(bits − 1)` in every block, not stored: symmetric quantization.
    Midpoint,
    /// An integer `Z` of `bits` bits for each block. Real 0 has a code of its own.
    Int,
    /// A real `Z` for each block.
    Real(ScaleFormat),
    /// An offset `O` for each block, in the unit of the weights.
    Offset(ScaleFormat),
}

impl ZeroFormat {
    /// The format of a stored real number; `None` for integers.
    pub(crate) const fn real(self) -> Option<ScaleFormat> {
        match self {
            Self::Midpoint | Self::Int => None,
            Self::Real(format) | Self::Offset(format) => Some(format),
        }
    }
}

/// What turns the codes of one block into numbers: `real = scale · (code − zero) + offset`.
///
/// One of `zero` and `offset` is 0, depending on the [`ZeroFormat`].
///
/// # Example
/// ```
/// use lowbit_core::Params;
///
/// let zero_point = Params { scale: 0.5, zero: 3.0, offset: 0.0 };
/// assert_eq!(zero_point.level(7), 2.0);
///
/// let additive = zero_point.to_offset();
/// assert_eq!(additive, Params { scale: 0.5, zero: 0.0, offset: -1.5 });
/// assert_eq!(additive.to_zero_point(), zero_point);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Params {
    /// The step between two levels; negative where the extreme weight's sign is kept in it.
    pub scale: f32,
    /// The code of real 0, in steps; an integer for [`ZeroFormat::Int`] and
    /// [`ZeroFormat::Midpoint`].
    pub zero: f32,
    /// What code 0 stands for, for [`ZeroFormat::Offset`]; otherwise 0.
    pub offset: f32,
}

impl Params {
    /// The number that `code` stands for; every operation is rounded once to f32.
    #[inline]
    pub fn level(self, code: u8) -> f32 {
        self.scale * (f32::from(code) - self.zero) + self.offset
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

    /// The zero of every block of a symmetric scheme, `2^(bits − 1)`.
    pub const fn midpoint(self) -> u8 {
        self.dtype.max_code() / 2 + 1
    }

    /// Rejects widths outside 1..=8 and blocks without elements.
    pub(crate) fn check(self) -> Result<()> {
        let bits = self.dtype.bits();
        if !(1..=8).contains(&bits) {
            return Err(Error::Bits { bits });
        }
        let (rows, cols) = self.granularity.block(usize::MAX, usize::MAX);
        if rows == 0 || cols == 0 {
            return Err(Error::EmptyBlock { rows, cols });
        }
        Ok(())
    }
}
