use alloc::{vec, vec::Vec};

use lowbit_dtypes::{pack, packed_len, unpack};

use crate::{Error, Mat, MatRef, QuantScheme, Result};

/// A quantized `(out_features, in_features)` weight matrix: bit-packed codes, scales and zeros.
///
/// `w[r][c] ≈ scale · (code[r][c] − zero)`, where scale and zero are those of the block that
/// `(r, c)` lies in ([`Granularity`](crate::Granularity)).
///
/// All three buffers are plain bytes, so that a matrix can be borrowed from a file as well as
/// owned (`S = Vec<u8>`):
///
/// | buffer | elements | layout |
/// |---|---|---|
/// | codes | `n × k` unsigned integers of `bits` bits | row-major, LSB first, each row padded to whole bytes |
/// | scales | one per block, [`ScaleFormat`](crate::ScaleFormat), little-endian | row-major over the grid of blocks |
/// | zeros | one code per block, absent if symmetric | as codes, over the grid of blocks |
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme};
///
/// let w = Mat::from_fn(2, 3, |r, c| r as f32 - c as f32);
/// let owned = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let borrowed: QMatrix<&[u8]> = QMatrix::from_parts(
///     2, 3, owned.scheme(), owned.codes(), owned.scales(), owned.zeros())?;
/// assert_eq!(borrowed.dequantize(), owned.dequantize());
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct QMatrix<S = Vec<u8>> {
    rows: usize,
    cols: usize,
    scheme: QuantScheme,
    codes: S,
    scales: S,
    zeros: Option<S>,
}

impl QMatrix {
    /// Rounds every weight to the nearest level of its block (round to nearest, RTN).
    ///
    /// With `b` bits and a block's weights `w`:
    ///
    /// * symmetric: `scale = max|w| / ((2^b − 1) / 2)` and `zero = 2^(b − 1)`; all `2^b` codes are
    ///   used, and `+max|w|` lies half a step above the highest level;
    /// * affine: `scale = (hi − lo) / (2^b − 1)` and `zero = round(−lo / scale)`, where
    ///   `lo = min(w, 0)` and `hi = max(w, 0)`: the range always contains 0, which is exact;
    /// * a block of zeros gets scale 1 and codes equal to its zero.
    ///
    /// With 1 bit there are only 0 and one other level: too few for a block of both signs.
    ///
    /// The scale is rounded to the scheme's [`ScaleFormat`](crate::ScaleFormat) first; then
    /// `code = clamp(round(w / scale) + zero, 0, 2^b − 1)`. All rounding is to nearest, ties to
    /// even. (Jacob et al., arXiv:1712.05877, section 2.1, with the range extended to 0.)
    ///
    /// # Errors
    /// [`Error::Bits`] and [`Error::EmptyBlock`] for an impossible scheme, [`Error::NotFinite`] at
    /// the first NaN or infinity, [`Error::ScaleOverflow`] if a scale does not fit its format.
    pub fn quantize(w: MatRef<'_, f32>, scheme: QuantScheme) -> Result<Self> {
        scheme.check()?;
        let (n, k) = w.shape();
        let layout = Layout::new(n, k, scheme)?;
        if n == 0 || k == 0 {
            let zeros = (!scheme.symmetric).then(Vec::new);
            return Self::from_parts(n, k, scheme, Vec::new(), Vec::new(), zeros);
        }
        for (row, values) in w.iter_rows().enumerate() {
            if let Some(col) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::NotFinite { what: "weight", row, col });
            }
        }
        let bits = u32::from(scheme.dtype.bits());
        let max_code = f32::from(scheme.dtype.max_code());
        let mut codes = vec![0; layout.codes];
        let mut scales = vec![0; layout.scales];
        let mut zeros = vec![0; layout.zeros];
        let mut row_codes = vec![0; k];
        let mut row_zeros = vec![0; layout.grid.1];
        let mut ranges = Vec::new();
        for first in (0..n).step_by(layout.block.0) {
            let rows = first..n.min(first + layout.block.0);
            let block_row = first / layout.block.0;

            ranges.clear();
            ranges.resize(layout.grid.1, (0.0_f32, 0.0_f32));
            for r in rows.clone() {
                let row = w.row(r).unwrap_or(&[]);
                for (values, (lo, hi)) in row.chunks(layout.block.1).zip(&mut ranges) {
                    (*lo, *hi) =
                        values.iter().fold((*lo, *hi), |(lo, hi), &x| (lo.min(x), hi.max(x)));
                }
            }

            // From here on a block's pair is (scale, zero).
            for (b, range) in ranges.iter_mut().enumerate() {
                let (lo, hi) = *range;
                let exact = if scheme.symmetric {
                    hi.max(-lo) / (max_code / 2.0)
                } else {
                    hi / max_code - lo / max_code
                };
                let scale = match exact {
                    0.0 if lo == 0.0 && hi == 0.0 => 1.0,
                    _ => scheme.scale_format.round(exact.max(f32::from_bits(1))),
                };
                let zero = if scheme.symmetric {
                    f32::from(scheme.midpoint())
                } else {
                    round((-lo / scale).min(max_code))
                };
                // Both ends of the range must be numbers: the lowest level is −zero · scale.
                if !(scale * zero.max(max_code - zero)).is_finite() {
                    let (row, col) = (first, b * layout.block.1);
                    let format = scheme.scale_format;
                    return Err(Error::ScaleOverflow { scale: exact, format, row, col });
                }
                let at = (block_row * layout.grid.1 + b) * scheme.scale_format.bytes();
                scheme.scale_format.write(scale, &mut scales[at..at + scheme.scale_format.bytes()]);
                *range = (scale, zero);
            }
            if !scheme.symmetric {
                for (z, range) in row_zeros.iter_mut().zip(&ranges) {
                    *z = range.1 as u8;
                }
                let stride = packed_len(layout.grid.1, bits);
                pack(bits, &row_zeros, &mut zeros[block_row * stride..][..stride])?;
            }

            for r in rows {
                let row = w.row(r).unwrap_or(&[]);
                let blocks = row.chunks(layout.block.1).zip(row_codes.chunks_mut(layout.block.1));
                for ((values, codes), &(scale, zero)) in blocks.zip(&ranges) {
                    for (x, code) in values.iter().zip(codes) {
                        // Clamped first: `round` wants small numbers, and x / scale may be infinite.
                        let steps = (x / scale).clamp(-512.0, 512.0);
                        *code = (round(steps) + zero).clamp(0.0, max_code) as u8;
                    }
                }
                pack(bits, &row_codes, &mut codes[r * layout.stride..][..layout.stride])?;
            }
        }
        let zeros = (!scheme.symmetric).then_some(zeros);
        Ok(Self { rows: n, cols: k, scheme, codes, scales, zeros })
    }
}

impl<S: AsRef<[u8]>> QMatrix<S> {
    /// Assembles a matrix from its stored bytes, in the layout described on the type.
    ///
    /// # Errors
    /// [`Error::Bits`] and [`Error::EmptyBlock`] for an impossible scheme, [`Error::Length`] if a
    /// buffer is not exactly as long as the shape and scheme say (or `zeros` are given for a
    /// symmetric scheme, or missing for an affine one), [`Error::NotFinite`] if a scale is not a
    /// number, at its position in the grid of blocks.
    pub fn from_parts(
        rows: usize,
        cols: usize,
        scheme: QuantScheme,
        codes: S,
        scales: S,
        zeros: Option<S>,
    ) -> Result<Self> {
        scheme.check()?;
        let layout = Layout::new(rows, cols, scheme)?;
        let zeros_len = zeros.as_ref().map_or(0, |z| z.as_ref().len());
        for (what, expected, got) in [
            ("packed codes in bytes", layout.codes, codes.as_ref().len()),
            ("scales in bytes", layout.scales, scales.as_ref().len()),
            ("packed zeros in bytes", layout.zeros, zeros_len),
        ] {
            if expected != got {
                return Err(Error::Length { what, expected, got });
            }
        }
        if scheme.symmetric != zeros.is_none() {
            let what = "zeros of a symmetric scheme, in buffers";
            return Err(Error::Length {
                what,
                expected: usize::from(!scheme.symmetric),
                got: zeros.iter().len(),
            });
        }
        for b in 0..layout.grid.0 * layout.grid.1 {
            if !scheme.scale_format.read(scales.as_ref(), b).is_finite() {
                let (row, col) = (b / layout.grid.1, b % layout.grid.1);
                return Err(Error::NotFinite { what: "scale", row, col });
            }
        }
        Ok(Self { rows, cols, scheme, codes, scales, zeros })
    }

    /// Rows: the layer's out_features, `n`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the layer's in_features, `k`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the matrix is stored.
    pub fn scheme(&self) -> QuantScheme {
        self.scheme
    }

    /// The packed codes.
    pub fn codes(&self) -> &[u8] {
        self.codes.as_ref()
    }

    /// The stored scales.
    pub fn scales(&self) -> &[u8] {
        self.scales.as_ref()
    }

    /// The packed zeros; `None` if the scheme is symmetric.
    pub fn zeros(&self) -> Option<&[u8]> {
        self.zeros.as_ref().map(S::as_ref)
    }

    /// The scale and the zero of the block at `(block_row, block_col)` of the grid; scale 0 outside.
    pub fn params(&self, block_row: usize, block_col: usize) -> (f32, u8) {
        let (grid_rows, grid_cols) = self.grid();
        if block_row >= grid_rows || block_col >= grid_cols {
            return (0.0, 0);
        }
        let scale = self.scheme.scale_format.read(self.scales(), block_row * grid_cols + block_col);
        let zero = match self.zeros() {
            None => self.scheme.midpoint(),
            Some(zeros) => {
                let bits = u32::from(self.scheme.dtype.bits());
                let stride = packed_len(grid_cols, bits);
                field(&zeros[block_row * stride..][..stride], bits, block_col)
            }
        };
        (scale, zero)
    }

    /// Rows and columns of a full block.
    pub fn block(&self) -> (usize, usize) {
        self.scheme.granularity.block(self.rows, self.cols)
    }

    /// How many blocks there are down and across.
    pub fn grid(&self) -> (usize, usize) {
        self.scheme.granularity.grid(self.rows, self.cols)
    }

    /// Unpacks the codes of row `r`, one a byte.
    ///
    /// # Errors
    /// [`Error::Length`] if `to` is not as long as a row or `r` is behind the last one.
    pub fn unpack_row(&self, r: usize, to: &mut [u8]) -> Result<()> {
        if to.len() != self.cols {
            return Err(Error::Length {
                what: "unpacked codes",
                expected: self.cols,
                got: to.len(),
            });
        }
        if r >= self.rows {
            return Err(Error::Length {
                what: "rows",
                expected: r.saturating_add(1),
                got: self.rows,
            });
        }
        let bits = u32::from(self.scheme.dtype.bits());
        let stride = packed_len(self.cols, bits);
        unpack(bits, &self.codes()[r * stride..][..stride], to)?;
        Ok(())
    }

    /// The matrix that is computed with: `scale · (code − zero)`, each rounded once to f32.
    pub fn dequantize(&self) -> Mat<f32> {
        let mut w = Mat::zeros(self.rows, self.cols);
        if w.data().is_empty() {
            return w;
        }
        let (block_rows, block_cols) = self.block();
        let mut codes = vec![0; self.cols];
        for (r, row) in w.as_mut().iter_rows_mut().enumerate() {
            // Fails only if `S` no longer gives the bytes that `from_parts` has checked.
            if self.unpack_row(r, &mut codes).is_err() {
                continue;
            }
            for (b, (row, codes)) in
                row.chunks_mut(block_cols).zip(codes.chunks(block_cols)).enumerate()
            {
                let (scale, zero) = self.params(r / block_rows, b);
                for (w, &code) in row.iter_mut().zip(codes) {
                    *w = scale * (f32::from(code) - f32::from(zero));
                }
            }
        }
        w
    }

    /// Every byte stored: codes, scales and zeros, padding included.
    pub fn bytes(&self) -> usize {
        self.codes().len() + self.scales().len() + self.zeros().map_or(0, <[u8]>::len)
    }

    /// [`bytes`](Self::bytes) in bits over the number of weights; 0 for a matrix without any.
    pub fn bits_per_weight(&self) -> f64 {
        let weights = self.rows as f64 * self.cols as f64;
        if weights == 0.0 { 0.0 } else { self.bytes() as f64 * 8.0 / weights }
    }
}

/// What shape and scheme say about the three buffers.
struct Layout {
    block: (usize, usize),
    grid: (usize, usize),
    /// Bytes of one row of codes.
    stride: usize,
    codes: usize,
    scales: usize,
    zeros: usize,
}

impl Layout {
    fn new(rows: usize, cols: usize, scheme: QuantScheme) -> Result<Self> {
        let too_large = Error::TooLarge { rows, cols };
        // Eight bits a code at most, four bytes a scale: no product below can overflow after this.
        if rows.checked_mul(cols).is_none_or(|x| x > usize::MAX / 16)
            || rows.max(cols) > usize::MAX / 16
        {
            return Err(too_large);
        }
        let bits = u32::from(scheme.dtype.bits());
        let block = scheme.granularity.block(rows, cols);
        let grid = scheme.granularity.grid(rows, cols);
        let stride = packed_len(cols, bits);
        let zeros = if scheme.symmetric { 0 } else { grid.0 * packed_len(grid.1, bits) };
        let scales = grid.0 * grid.1 * scheme.scale_format.bytes();
        Ok(Self { block, grid, stride, codes: rows * stride, scales, zeros })
    }
}

/// The code of `bits` bits at `index`, in the order of [`unpack`].
fn field(packed: &[u8], bits: u32, index: usize) -> u8 {
    let bit = index * bits as usize;
    let byte = |i: usize| u16::from(packed.get(i).copied().unwrap_or(0));
    let word = byte(bit / 8) | byte(bit / 8 + 1) << 8;
    (word >> (bit % 8)) as u8 & ((1_u16 << bits) - 1) as u8
}

/// Nearest integer, ties to even, for `|x| < 2^22` and the default rounding mode.
///
/// Written as an addition because `f32::round_ties_even` needs std, and is a library call on
/// x86-64 without SSE4.1.
pub(crate) fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2^23: the sum has a unit of exactly 1
    (x + MAGIC) - MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_field_is_what_unpacking_the_row_gives() {
        for bits in 1..=8 {
            let codes: Vec<u8> =
                (0..23).map(|i| (i * 37 + 11) as u8 & ((1_u16 << bits) - 1) as u8).collect();
            let mut packed = vec![0; packed_len(codes.len(), bits)];
            pack(bits, &codes, &mut packed).unwrap();
            assert!(codes.iter().enumerate().all(|(i, &code)| field(&packed, bits, i) == code));
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        for x in [0.5, 1.5, 2.5, -0.5, -1.5, 0.499_999_97, 127.5, -127.5, 511.499_97] {
            assert_eq!(round(x), x.round_ties_even(), "{x}");
        }
    }
}
