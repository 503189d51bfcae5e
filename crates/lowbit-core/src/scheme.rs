use lowbit_dtypes::{bf16, f16};

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

    /// `scale` rounded to nearest, ties to even. A positive scale never becomes zero (it becomes
    /// the smallest positive number of the format); one beyond the largest number becomes infinite.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::ScaleFormat;
    ///
    /// assert_eq!(ScaleFormat::F16.round(1.0 + 1e-4), 1.0);
    /// assert_eq!(ScaleFormat::F16.round(1e-30), 2.0_f32.powi(-24));
    /// assert_eq!(ScaleFormat::F16.round(1e6), f32::INFINITY);
    /// ```
    pub fn round(self, scale: f32) -> f32 {
        let (rounded, smallest) = match self {
            Self::F32 => (scale, f32::from_bits(1)),
            Self::F16 => (f16::from_f32(scale).to_f32(), f16::MIN_POSITIVE_SUBNORMAL.to_f32()),
            Self::Bf16 => (bf16::from_f32(scale).to_f32(), bf16::MIN_POSITIVE_SUBNORMAL.to_f32()),
        };
        if rounded == 0.0 && scale > 0.0 { smallest } else { rounded }
    }

    /// Writes a scale that [`round`](Self::round) has made, little-endian.
    pub(crate) fn write(self, scale: f32, to: &mut [u8]) {
        match self {
            Self::F32 => to.copy_from_slice(&scale.to_le_bytes()),
            Self::F16 => to.copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
            Self::Bf16 => to.copy_from_slice(&bf16::from_f32(scale).to_le_bytes()),
        }
    }

    /// Reads the scale at `index`; zero behind the end.
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

/// How a matrix is stored: what a code means, who shares a scale, and in which form.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, QuantScheme, ScaleFormat};
///
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::Bf16,
///     ..QuantScheme::affine(4, Granularity::PerGroup(128))
/// };
/// assert!(!scheme.symmetric);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantScheme {
    /// What a code means.
    pub dtype: QuantType,
    /// Which weights share a scale and a zero.
    pub granularity: Granularity,
    /// `true`: the zero is `2^(bits − 1)` everywhere and not stored. `false`: each block stores an
    /// integer zero of `bits` bits.
    pub symmetric: bool,
    /// How the scales are stored.
    pub scale_format: ScaleFormat,
}

impl QuantScheme {
    /// Integers of `bits` bits around a fixed zero of `2^(bits − 1)`, with f16 scales.
    pub const fn symmetric(bits: u8, granularity: Granularity) -> Self {
        Self {
            dtype: QuantType::Int { bits },
            granularity,
            symmetric: true,
            scale_format: ScaleFormat::F16,
        }
    }

    /// Integers of `bits` bits with a zero of its own for each block, with f16 scales.
    pub const fn affine(bits: u8, granularity: Granularity) -> Self {
        Self { symmetric: false, ..Self::symmetric(bits, granularity) }
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
