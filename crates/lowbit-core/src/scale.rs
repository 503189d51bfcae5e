//! How scales, and zeros that are no integers, are stored.

use alloc::vec::Vec;

use lowbit_dtypes::{
    F8E8M0, Overflow, Rounding as Nearest, SmallFloat, bf16, decode_slice, encode_slice, f16,
};

use crate::{
    Error, Fit, Granularity, Mat, QMatrix, QuantScheme, QuantType, Result, ZeroFormat,
    qmatrix::Layout,
};

/// How a scale is stored. Scales are rounded to this format *before* the codes are computed, so
/// the codes are the nearest ones for the scale that will be read back.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ScaleFormat {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes, at most 65504.
    F16,
    /// bfloat16, 2 bytes, the range of f32 with 8 bits of precision.
    Bf16,
    /// A power of two, 1 byte: the scale of the MX formats (OCP Microscaling Formats 1.0).
    ///
    /// A block's scale is then chosen as in its section 6.3, `2^(floor(log2 max|w|) − emax)` with
    /// `2^emax` the largest power of two that is a level: weights above the largest level saturate.
    E8m0,
    /// Quantized again.
    TwoLevel(TwoLevel),
}

/// Scales that are quantized themselves: the grid of scales, one for each block of weights, is a
/// matrix that is stored by a scheme of its own, `scale = step · (level(code) − zero) + minimum`.
///
/// | | dtype | blocks of the grid | base | format |
/// |---|---|---|---|---|
/// | NVFP4 | FP8 E4M3 | the whole grid | `Zero` | f32 |
/// | double quantization with integers | 8 bits | 256 scales of a row | `Minimum` | f32 |
/// | SpQR (arXiv:2306.03078, section 4.3) | 3 bits | 16 scales | `Minimum` | f16 |
/// | GGUF Q6_K | 8 bits | 16 scales of a row | `Midpoint` | f16 |
/// | GGUF Q4_K, and its minima | 6 bits | 8 scales of a row | `Zero` | f16 |
/// | integer group scales | 4 bits | a row | `Zero` | f32 |
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme, QuantType, ScaleFormat, TwoLevel};
///
/// let w = Mat::from_fn(16, 256, |r, c| ((r * 256 + c) as f32).sin() * (1.0 + c as f32 / 64.0));
/// let g32 = QuantScheme::levels(QuantType::NF4, Granularity::PerGroup(32));
/// let two_level = QuantScheme { scale_format: ScaleFormat::TwoLevel(TwoLevel::BILEVEL4), ..g32 };
/// let bits = |scheme| QMatrix::quantize(w.as_ref(), scheme).map(|q| q.bits_per_weight());
/// assert_eq!(bits(g32)?, 4.0 + 16.0 / 32.0);
/// assert_eq!(bits(two_level)?, 4.0 + 4.0 / 32.0 + 32.0 / 512.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TwoLevel {
    /// What a code means.
    pub dtype: QuantType,
    /// Which scales share a step: blocks of the grid of scales, `(grid rows, grid columns)`.
    pub granularity: Granularity,
    /// What code 0 stands for.
    pub base: Base,
    /// How steps and minima are stored.
    pub format: StepFormat,
}

/// What is subtracted from or added to the codes of [`TwoLevel`] scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Base {
    /// Nothing.
    Zero,
    /// `2^(bits − 1)` is subtracted: scales of both signs.
    Midpoint,
    /// A minimum is stored beside each step and added.
    Minimum,
}

/// How the steps of [`TwoLevel`] scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepFormat {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    Bf16,
}

impl From<StepFormat> for ScaleFormat {
    fn from(format: StepFormat) -> Self {
        match format {
            StepFormat::F32 => Self::F32,
            StepFormat::F16 => Self::F16,
            StepFormat::Bf16 => Self::Bf16,
        }
    }
}

impl TwoLevel {
    /// FP8 E4M3 over one f32 step, NVFP4's.
    pub const NVFP4: Self = Self {
        dtype: QuantType::Float(lowbit_dtypes::Format::F8E4M3),
        granularity: Granularity::PerTensor,
        base: Base::Zero,
        format: StepFormat::F32,
    };

    /// 4 bits over an f16 step and minimum that 16 rows share in each column of the grid.
    pub const BILEVEL4: Self = Self {
        dtype: QuantType::Int { bits: 4 },
        granularity: Granularity::PerBlock(16, 1),
        base: Base::Minimum,
        format: StepFormat::F16,
    };

    /// Small integers over one f32 step for each row, so that `code · scale` is an integer too.
    pub const fn integer(bits: u8) -> Self {
        Self {
            dtype: QuantType::Int { bits },
            granularity: Granularity::PerChannel,
            base: Base::Zero,
            format: StepFormat::F32,
        }
    }

    /// The scheme by which the grid of scales is stored.
    pub fn scheme(self) -> QuantScheme {
        let scale_format = ScaleFormat::from(self.format);
        let zero = match self.base {
            Base::Zero => ZeroFormat::None,
            Base::Midpoint => ZeroFormat::Midpoint,
            Base::Minimum => ZeroFormat::Offset(scale_format),
        };
        QuantScheme { dtype: self.dtype, granularity: self.granularity, zero, scale_format }
    }

    /// The grid of scales as a matrix over its bytes: codes, then steps, then minima.
    pub(crate) fn open(self, bytes: &[u8], grid: (usize, usize)) -> Option<QMatrix<&[u8]>> {
        let scheme = self.scheme();
        let layout = Layout::new(grid.0, grid.1, scheme).ok()?;
        let (codes, rest) = bytes.split_at_checked(layout.codes)?;
        let (steps, minima) = rest.split_at_checked(layout.scales)?;
        let minima = scheme.zero.is_stored().then_some(minima);
        Some(QMatrix::assemble(grid.0, grid.1, scheme, codes, steps, minima))
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

/// `count` numbers of 16 bits; those behind the end are 0.
fn read_halves<H: SmallFloat + bytemuck::Pod>(bytes: &[u8], count: usize) -> Vec<f32> {
    const CHUNK: usize = 64;
    let mut halves = [H::zeroed(); CHUNK];
    let mut numbers = alloc::vec![0.0; count];
    let (bytes, _) = bytes.as_chunks::<2>();
    for (numbers, bytes) in numbers.chunks_mut(CHUNK).zip(bytes.chunks(CHUNK)) {
        for (half, &bytes) in halves.iter_mut().zip(bytes) {
            *half = bytemuck::cast(u16::from_le_bytes(bytes));
        }
        // Lengths differ only behind the end.
        let len = numbers.len().min(bytes.len());
        let _ = decode_slice(&halves[..len], &mut numbers[..len]);
    }
    numbers
}

/// 2^-127, the smallest number of E8M0.
const E8M0_MIN: f32 = f32::from_bits(1 << 22);

impl ScaleFormat {
    /// The name by which errors speak of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::E8m0 => "E8M0",
            Self::TwoLevel(_) => "two-level scales",
        }
    }

    /// Bytes of the scales of a grid of blocks; `None` if that does not fit `usize`.
    pub fn bytes(self, grid: (usize, usize)) -> Option<usize> {
        let each = match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E8m0 => 1,
            Self::TwoLevel(two) => {
                let layout = Layout::new(grid.0, grid.1, two.scheme()).ok()?;
                return layout.codes.checked_add(layout.scales)?.checked_add(layout.zeros);
            }
        };
        grid.0.checked_mul(grid.1)?.checked_mul(each)
    }

    /// `scale` rounded to nearest, ties to even (to the power of two below it for E8M0). A scale
    /// other than 0 never becomes 0 (it becomes the smallest number of the format and its sign);
    /// one beyond the largest becomes infinite, as does a negative one for E8M0.
    ///
    /// What becomes of a two-level scale depends on the whole grid: this leaves it alone.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::ScaleFormat;
    ///
    /// assert_eq!(ScaleFormat::F16.round(1.0 + 1e-4), 1.0);
    /// assert_eq!(ScaleFormat::F16.round(1e-30), 2.0_f32.powi(-24));
    /// assert_eq!(ScaleFormat::F16.round(1e6), f32::INFINITY);
    /// assert_eq!(ScaleFormat::E8m0.round(7.9), 4.0);
    /// ```
    #[inline]
    pub fn round(self, scale: f32) -> f32 {
        let smallest = match self {
            Self::F32 | Self::TwoLevel(_) => f32::from_bits(1),
            Self::F16 => f16::MIN_POSITIVE_SUBNORMAL.to_f32(),
            Self::Bf16 => bf16::MIN_POSITIVE_SUBNORMAL.to_f32(),
            Self::E8m0 => E8M0_MIN,
        };
        let rounded = self.nearest(scale);
        if rounded == 0.0 && scale != 0.0 { smallest.copysign(scale) } else { rounded }
    }

    /// [`round`](Self::round) of each of `exact`, also written to the front of `bytes`, for formats
    /// that store each for itself.
    pub(crate) fn round_slice(self, exact: &[f32], rounded: &mut [f32], bytes: &mut [u8]) {
        let each = match self {
            Self::F32 => {
                rounded.copy_from_slice(exact);
                for (x, bytes) in exact.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = x.to_le_bytes();
                }
                4
            }
            Self::F16 => {
                round_halves::<f16>(exact, rounded, bytes);
                2
            }
            Self::Bf16 => {
                round_halves::<bf16>(exact, rounded, bytes);
                2
            }
            Self::E8m0 => {
                for ((exact, rounded), byte) in exact.iter().zip(&mut *rounded).zip(&mut *bytes) {
                    *rounded = self.round(*exact);
                    self.write(*rounded, core::slice::from_mut(byte));
                }
                1
            }
            Self::TwoLevel(_) => return,
        };
        for (i, (&exact, rounded)) in exact.iter().zip(rounded).enumerate() {
            if *rounded == 0.0 && exact != 0.0 {
                *rounded = self.round(exact);
                self.write(*rounded, &mut bytes[i * each..][..each]);
            }
        }
    }

    /// `x` rounded to nearest, ties to even; small numbers may become 0.
    #[inline]
    pub(crate) fn nearest(self, x: f32) -> f32 {
        match self {
            Self::F32 | Self::TwoLevel(_) => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
            Self::E8m0 => {
                // The exponent alone, which for subnormal numbers is 2^-127 or 0.
                let power = f32::from_bits(x.to_bits() & 0x7f80_0000);
                match () {
                    () if x < 0.0 => f32::NEG_INFINITY,
                    () if x < f32::MIN_POSITIVE => {
                        if x < E8M0_MIN {
                            0.0
                        } else {
                            E8M0_MIN
                        }
                    }
                    () => power,
                }
            }
        }
    }

    /// Writes a number that this format holds, little-endian.
    #[inline]
    pub(crate) fn write(self, scale: f32, to: &mut [u8]) {
        match self {
            Self::F32 => to.copy_from_slice(&scale.to_le_bytes()),
            Self::F16 => to.copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
            Self::Bf16 => to.copy_from_slice(&bf16::from_f32(scale).to_le_bytes()),
            Self::E8m0 => to[0] = F8E8M0::from_f32(scale).to_bits(),
            Self::TwoLevel(_) => {}
        }
    }

    /// Reads the number of the block at `(row, col)` of the grid; zero behind the end.
    pub(crate) fn read(self, bytes: &[u8], grid: (usize, usize), row: usize, col: usize) -> f32 {
        let index = row * grid.1 + col;
        let number = |size: usize| bytes.get(index * size..(index + 1) * size);
        match self {
            Self::F32 => number(4)
                .and_then(<[u8]>::first_chunk)
                .map_or(0.0, |bytes| f32::from_le_bytes(*bytes)),
            Self::F16 => number(2)
                .and_then(<[u8]>::first_chunk)
                .map_or(0.0, |bytes| f16::from_le_bytes(*bytes).to_f32()),
            Self::Bf16 => number(2)
                .and_then(<[u8]>::first_chunk)
                .map_or(0.0, |bytes| bf16::from_le_bytes(*bytes).to_f32()),
            Self::E8m0 => number(1).map_or(0.0, |byte| F8E8M0::from_bits(byte[0]).to_f32()),
            Self::TwoLevel(two) => two.open(bytes, grid).map_or(0.0, |grid| grid.real(row, col)),
        }
    }

    /// All numbers of a grid.
    pub(crate) fn read_all(self, bytes: &[u8], grid: (usize, usize)) -> Vec<f32> {
        if let Self::TwoLevel(two) = self {
            return two.open(bytes, grid).map_or_else(Vec::new, |q| q.dequantize().data().to_vec());
        }
        let count = grid.0 * grid.1;
        match self {
            Self::F16 => read_halves::<f16>(bytes, count),
            Self::Bf16 => read_halves::<bf16>(bytes, count),
            _ => (0..count).map(|i| self.read(bytes, (1, 0), 0, i)).collect(),
        }
    }

    /// Rounds a grid of numbers to this format: what will be read, and its bytes. A number that is
    /// too large becomes infinite.
    pub(crate) fn round_grid(self, exact: Mat<f32>) -> Result<(Mat<f32>, Vec<u8>)> {
        let (rows, cols) = (exact.rows(), exact.cols());
        if let Self::TwoLevel(two) = self {
            let q = QMatrix::quantize_with(exact.as_ref(), two.scheme(), &Fit::NEAREST, None)?;
            let mut bytes = q.codes().to_vec();
            bytes.extend(q.scales());
            bytes.extend(q.zeros().unwrap_or(&[]));
            return Ok((q.dequantize(), bytes));
        }
        let len = self.bytes((rows, cols)).ok_or(Error::TooLarge { rows, cols })?;
        let mut bytes = alloc::vec![0; len];
        let mut rounded = Mat::zeros(rows, cols);
        self.round_slice(exact.data(), rounded.data_mut(), &mut bytes);
        Ok((rounded, bytes))
    }
}
