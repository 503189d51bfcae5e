//! Round to nearest: weights to [`QMatrix`].

use alloc::{vec, vec::Vec};

use lowbit_dtypes::{pack, packed_len};

use crate::{
    Error, Fit, MatRef, QMatrix, QuantScheme, Range, Result, SymmetricScale, ZeroFormat,
    fit::Grid,
    qmatrix::Layout,
    range::{self, ordered},
    simd,
};

impl QMatrix {
    /// Rounds every weight to the nearest level of its block (round to nearest, RTN), with the
    /// default [`Fit`].
    ///
    /// With `b` bits and a block's weights `w`:
    ///
    /// * symmetric: `scale = max|w| / ((2^b − 1) / 2)` and `zero = 2^(b − 1)`; all `2^b` codes are
    ///   used, and `+max|w|` lies half a step above the highest level;
    /// * with an integer zero: `scale = (hi − lo) / (2^b − 1)` and `zero = round(−lo / scale)`,
    ///   where `lo = min(w, 0)` and `hi = max(w, 0)`: the range always contains 0, which is exact;
    /// * with a real zero or an offset: the same with `lo = min(w)` and `hi = max(w)`, and
    ///   `zero = −lo / scale` or `offset = lo`, which need not hold 0;
    /// * a block of zeros gets scale 1 and codes equal to its zero.
    ///
    /// With 1 bit there are only 0 and one other level: too few for a block of both signs.
    ///
    /// The scale is rounded to the scheme's [`ScaleFormat`](crate::ScaleFormat) first; then
    /// `code = clamp(round(w / scale) + zero, 0, 2^b − 1)`. All rounding is to nearest, ties to
    /// even. (Jacob et al., arXiv:1712.05877, section 2.1, with the range extended to 0.)
    ///
    /// A three-dimensional weight (experts of `n × k` each) is quantized slice by slice, or at once
    /// as a matrix of all their rows where no block spans rows.
    ///
    /// # Errors
    /// [`Error::Bits`] and [`Error::EmptyBlock`] for an impossible scheme, [`Error::NotFinite`] at
    /// the first NaN or infinity, [`Error::ScaleOverflow`] if a scale does not fit its format.
    pub fn quantize(w: MatRef<'_, f32>, scheme: QuantScheme) -> Result<Self> {
        Self::quantize_with(w, scheme, &Fit::default(), None)
    }

    /// [`quantize`](Self::quantize) with another [`Fit`]. `importance` weighs the input features (a
    /// number for each column, such as a mean of `x²`) in the error of
    /// [`Range::Search`](crate::Range::Search); other ranges do not look at it.
    ///
    /// # Errors
    /// Those of [`quantize`](Self::quantize); [`Error::Percentile`] and [`Error::Parameter`] for an
    /// impossible fit, [`Error::Length`] if `importance` does not have `k` elements,
    /// [`Error::NotFinite`] or [`Error::Parameter`] if one is no number of 0 or more.
    ///
    /// # Example
    /// See [`Fit`].
    pub fn quantize_with(
        w: MatRef<'_, f32>,
        scheme: QuantScheme,
        fit: &Fit,
        importance: Option<&[f32]>,
    ) -> Result<Self> {
        scheme.check()?;
        fit.check()?;
        let (n, k) = w.shape();
        check_importance(importance, k)?;
        let layout = Layout::new(n, k, scheme)?;
        if n == 0 || k == 0 {
            let zeros = (scheme.zero != ZeroFormat::Midpoint).then(Vec::new);
            return Self::from_parts(n, k, scheme, Vec::new(), Vec::new(), zeros);
        }
        let bits = u32::from(scheme.dtype.bits());
        let (block_rows, block_cols) = layout.block;
        let mut codes = vec![0; layout.codes];
        let mut scales = vec![0; layout.scales];
        let mut zeros = vec![0; layout.zeros];
        let mut row_codes = vec![0; k];
        let mut row_zeros = vec![0; layout.grid.1];
        let mut ranges = Vec::new();
        let mut grids = Vec::new();
        for first in (0..n).step_by(block_rows) {
            let rows = first..n.min(first + block_rows);
            let block_row = first / block_rows;

            ranges.clear();
            ranges.resize(layout.grid.1, ordered::NONE);
            for r in rows.clone() {
                let row = w.row(r).unwrap_or(&[]);
                if !simd::dispatch(|| row_ranges(row, block_cols, &mut ranges)) {
                    let col = row.iter().position(|x| !x.is_finite()).unwrap_or(0);
                    return Err(Error::NotFinite { what: "weight", row: r, col });
                }
            }

            grids.clear();
            for (b, &range) in ranges.iter().enumerate() {
                let block = Block { w, rows: rows.clone(), col: b * block_cols, cols: block_cols };
                let grid = block.grid(scheme, fit, ordered::values(range), importance)?;
                let params = grid.params;
                grids.push(grid);
                let at = block_row * layout.grid.1 + b;
                let store = |format: crate::ScaleFormat, value: f32, to: &mut [u8]| {
                    format.write(value, &mut to[at * format.bytes()..][..format.bytes()]);
                };
                store(scheme.scale_format, params.scale, &mut scales);
                match scheme.zero {
                    ZeroFormat::Midpoint => {}
                    ZeroFormat::Int => row_zeros[b] = params.zero as u8,
                    ZeroFormat::Real(format) => store(format, params.zero, &mut zeros),
                    ZeroFormat::Offset(format) => store(format, params.offset, &mut zeros),
                }
            }
            if scheme.zero == ZeroFormat::Int {
                let stride = packed_len(layout.grid.1, bits);
                pack(bits, &row_zeros, &mut zeros[block_row * stride..][..stride])?;
            }

            for r in rows {
                let row = w.row(r).unwrap_or(&[]);
                let index = r as u64 * k as u64;
                simd::dispatch(|| encode_row(row, block_cols, &grids, &mut row_codes, index));
                pack(bits, &row_codes, &mut codes[r * layout.stride..][..layout.stride])?;
            }
        }
        let zeros = (scheme.zero != ZeroFormat::Midpoint).then_some(zeros);
        Ok(Self::assemble(n, k, scheme, codes, scales, zeros))
    }
}

/// Joins the range of each block of `row` to what other rows have given; whether all is finite.
#[inline(always)]
fn row_ranges(row: &[f32], block_cols: usize, ranges: &mut [(i32, i32)]) -> bool {
    let mut all = ordered::NONE;
    for (values, range) in row.chunks(block_cols).zip(ranges) {
        *range = ordered::join(*range, ordered::extremes(values));
        all = ordered::join(all, *range);
    }
    ordered::is_finite(all)
}

#[inline(always)]
fn encode_row(row: &[f32], block_cols: usize, grids: &[Grid], codes: &mut [u8], index: u64) {
    let blocks = row.chunks(block_cols).zip(codes.chunks_mut(block_cols));
    for (b, ((values, codes), grid)) in blocks.zip(grids).enumerate() {
        grid.encode(values, codes, index + (b * block_cols) as u64);
    }
}

/// The weights that share a scale.
struct Block<'a> {
    w: MatRef<'a, f32>,
    rows: core::ops::Range<usize>,
    col: usize,
    cols: usize,
}

impl<'a> Block<'a> {
    /// The rows of the block, each with its index in the matrix.
    fn rows(&self) -> impl Iterator<Item = (u64, &'a [f32])> {
        let Self { w, col, .. } = *self;
        let end = w.cols().min(col + self.cols);
        self.rows.clone().map(move |r| {
            let row = w.row(r).unwrap_or(&[]);
            (r as u64 * w.cols() as u64 + col as u64, row.get(col..end).unwrap_or(&[]))
        })
    }

    fn values(&self) -> Vec<f32> {
        self.rows().flat_map(|(_, row)| row).copied().collect()
    }

    /// The grid that `fit` chooses, given the block's smallest and largest weight.
    fn grid(
        &self,
        scheme: QuantScheme,
        fit: &Fit,
        (lo, hi): (f32, f32),
        importance: Option<&[f32]>,
    ) -> Result<Grid> {
        let symmetric = scheme.zero == ZeroFormat::Midpoint;
        let extreme = match fit.symmetric {
            // Of two equal magnitudes the first one decides.
            SymmetricScale::SignedExtreme if symmetric && hi == -lo => {
                let first = self.rows().flat_map(|(_, row)| row).find(|x| x.abs() == hi);
                first.copied().unwrap_or(hi)
            }
            _ if hi >= -lo => hi,
            _ => lo,
        };
        let new = |range| {
            Grid::new(scheme, fit, range, extreme).map_err(|scale| Error::ScaleOverflow {
                scale,
                format: scheme.scale_format,
                row: self.rows.start,
                col: self.col,
            })
        };
        match fit.range {
            Range::MinMax => new((lo, hi)),
            Range::Percentile(percent) if symmetric => {
                let amax = range::percentile_abs(&self.values(), percent)?;
                new((-amax, amax))
            }
            Range::Percentile(percent) => new(range::percentile(&self.values(), percent)?),
            Range::Search { grid, candidates, norm } => {
                let importance = importance.map(|x| &x[self.col..]);
                let mut codes = vec![0; self.cols];
                let mut best = (f64::INFINITY, new((lo, hi))?);
                for i in 0..candidates {
                    let share = (grid - i) as f32 / grid as f32;
                    // A smaller range cannot overflow, but for the rounding of its zero.
                    let Ok(candidate) = new((lo * share, hi * share)) else { continue };
                    let error: f64 = self
                        .rows()
                        .map(|(index, row)| {
                            let codes = &mut codes[..row.len()];
                            simd::dispatch(|| {
                                candidate.encode(row, codes, index);
                                error(row, codes, &candidate, importance, norm)
                            })
                        })
                        .sum();
                    if error < best.0 {
                        best = (error, candidate);
                    }
                }
                Ok(best.1)
            }
        }
    }
}

/// `Σ importance·|x − level(code)|^norm`, in eight sums so that it can be vectorized.
#[inline(always)]
fn error(x: &[f32], codes: &[u8], grid: &Grid, importance: Option<&[f32]>, norm: f32) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0_f64; LANES];
    for (c, (x, codes)) in x.chunks(LANES).zip(codes.chunks(LANES)).enumerate() {
        for (i, ((&x, &code), sum)) in x.iter().zip(codes).zip(&mut sums).enumerate() {
            let e = (x - grid.params.level(code)).abs();
            let e = if norm == 2.0 { e * e } else { libm::powf(e, norm) };
            let weight = importance.map_or(1.0, |x| x[c * LANES + i]);
            *sum += f64::from(weight) * f64::from(e);
        }
    }
    sums.iter().sum()
}

fn check_importance(importance: Option<&[f32]>, k: usize) -> Result<()> {
    let Some(importance) = importance else { return Ok(()) };
    if importance.len() != k {
        return Err(Error::Length { what: "importance", expected: k, got: importance.len() });
    }
    for (col, &x) in importance.iter().enumerate() {
        if !x.is_finite() {
            return Err(Error::NotFinite { what: "importance", row: 0, col });
        }
        if x < 0.0 {
            let value = f64::from(x);
            return Err(Error::Parameter { what: "importance", value, expected: "at least 0" });
        }
    }
    Ok(())
}
