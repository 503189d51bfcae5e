//! Round to nearest: weights to [`QMatrix`].

use alloc::{vec, vec::Vec};

use lowbit_dtypes::{pack, packed_len};
use pulp::{Simd, WithSimd};

use crate::{
    Error, Fit, Mat, MatRef, Params, QMatrix, QuantScheme, Range, Result, ScaleFormat,
    SymmetricScale, ZeroFormat,
    fit::{Grid, Plan},
    qmatrix::Layout,
    range::{self, Extent},
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
    /// the first NaN or infinity, [`Error::ScaleOverflow`] if a scale does not fit its format,
    /// [`Error::ZeroOverflow`] if an offset or a real zero does not.
    pub fn quantize(w: MatRef<'_, f32>, scheme: QuantScheme) -> Result<Self> {
        Self::quantize_with(w, scheme, &Fit::default(), None)
    }

    /// [`quantize`](Self::quantize) with another [`Fit`]. `importance` weighs the input features (a
    /// number for each column, such as a mean of `x²`) in the error of
    /// [`Range::Search`](crate::Range::Search); other ranges do not look at it.
    ///
    /// # Errors
    /// Those of [`quantize`](Self::quantize); [`Error::Parameter`] for an impossible fit, [`Error::Length`] if `importance` does not have `k` elements,
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
        fit.check(scheme)?;
        let (n, k) = w.shape();
        check_importance(importance, k)?;
        let layout = Layout::new(n, k, scheme)?;
        if n == 0 || k == 0 {
            let zeros = scheme.zero.is_stored().then(|| vec![0; layout.zeros]);
            return Self::from_parts(n, k, scheme, Vec::new(), vec![0; layout.scales], zeros);
        }
        let plan = Plan::new(scheme, fit);
        let bits = u32::from(scheme.dtype.bits());
        let (block_rows, block_cols) = layout.block;
        let mut packed = vec![0; layout.codes];
        let mut scales = vec![0; layout.scales];
        let mut zeros = vec![0; layout.zeros];
        let mut row_codes = vec![0; k];
        let mut row_zeros = vec![0; layout.grid.1];
        let mut blocks = Blocks::new(plan, layout.grid.1);
        let block_rows_of =
            |block_row: usize| block_row * block_rows..n.min((block_row + 1) * block_rows);
        // Formats that need to see all scales before any of them is known.
        let two_level = match (scheme.scale_format, scheme.zero.real()) {
            (ScaleFormat::TwoLevel(_), _) | (_, Some(ScaleFormat::TwoLevel(_))) => {
                let mut exact = Mat::zeros(layout.grid.0, layout.grid.1);
                let mut ranges = Vec::with_capacity(layout.grid.0 * layout.grid.1);
                for (block_row, exact) in exact.as_mut().iter_rows_mut().enumerate() {
                    blocks.measure(w, block_rows_of(block_row), block_cols, importance)?;
                    exact.copy_from_slice(&blocks.exact);
                    ranges.extend_from_slice(&blocks.ranges);
                }
                Some(TwoLevelGrids::new(&plan, exact, ranges)?)
            }
            _ => None,
        };
        for block_row in 0..layout.grid.0 {
            let rows = block_rows_of(block_row);
            let first = rows.start;
            let at = block_row * layout.grid.1;
            match &two_level {
                // A search is too slow to be done twice.
                Some(grids) => grids.recall(block_row, &mut blocks),
                None => blocks.measure(w, rows.clone(), block_cols, importance)?,
            }

            let chosen = two_level.as_ref().map(|grids| grids.row(block_row));
            let scale_bytes = match scheme.scale_format.bytes((1, 1)) {
                Some(each) if two_level.is_none() => &mut scales[at * each..],
                _ => &mut [],
            };
            if let Some(b) = simd::dispatch(MakeGrids { blocks: &mut blocks, chosen, scale_bytes })
            {
                let (row, col) = (first, b * block_cols);
                let Params { zero, offset, .. } = blocks.grids[b].params;
                if let Some(format) = scheme.zero.real()
                    && !(zero.is_finite() && offset.is_finite())
                {
                    let zero = if offset.is_finite() { zero } else { blocks.ranges[b].lo };
                    return Err(Error::ZeroOverflow { zero, format: format.name(), row, col });
                }
                let (scale, format) = (blocks.exact[b], scheme.scale_format.name());
                return Err(Error::ScaleOverflow { scale, format, row, col });
            }
            match scheme.zero {
                ZeroFormat::Int => {
                    for (zero, grid) in row_zeros.iter_mut().zip(&blocks.grids) {
                        *zero = grid.params.zero as u8;
                    }
                    let stride = packed_len(layout.grid.1, bits);
                    pack(bits, &row_zeros, &mut zeros[block_row * stride..][..stride])?;
                }
                ZeroFormat::Real(format) | ZeroFormat::Offset(format) if two_level.is_none() => {
                    let each = layout.zeros / (layout.grid.0 * layout.grid.1);
                    let to = zeros[at * each..].chunks_mut(each);
                    for (to, grid) in to.zip(&blocks.grids) {
                        let Params { zero, offset, .. } = grid.params;
                        let real = matches!(scheme.zero, ZeroFormat::Real(_));
                        format.write(if real { zero } else { offset }, to);
                    }
                }
                _ => {}
            }

            for r in rows {
                let row = w.row(r).unwrap_or(&[]);
                let index = r as u64 * k as u64;
                let (blocks, codes) = (&blocks, &mut row_codes);
                simd::dispatch(EncodeRow { row, block_cols, blocks, codes, index });
                pack(bits, &row_codes, &mut packed[r * layout.stride..][..layout.stride])?;
            }
        }
        if let Some(grids) = two_level {
            scales = grids.scales.1;
            if let Some((_, bytes)) = grids.zeros {
                zeros = bytes;
            }
        }
        let zeros = scheme.zero.is_stored().then_some(zeros);
        Ok(Self::assemble(n, k, scheme, packed, scales, zeros))
    }
}

/// The range that the grid of a block should reach, and its weight of the largest magnitude.
#[derive(Clone, Copy, Default)]
struct Chosen {
    lo: f32,
    hi: f32,
    extreme: f32,
}

/// What is known of each block in a row of blocks.
struct Blocks {
    plan: Plan,
    extents: Vec<Extent>,
    ranges: Vec<Chosen>,
    exact: Vec<f32>,
    scales: Vec<f32>,
    grids: Vec<Grid>,
}

impl Blocks {
    fn new(plan: Plan, count: usize) -> Self {
        Self {
            plan,
            extents: vec![Extent::NONE; count],
            ranges: vec![Chosen::default(); count],
            exact: vec![0.0; count],
            scales: vec![0.0; count],
            grids: vec![Grid::default(); count],
        }
    }
}

impl Blocks {
    /// Finds the range and the scale before rounding of each block in `rows`.
    fn measure(
        &mut self,
        w: MatRef<'_, f32>,
        rows: core::ops::Range<usize>,
        block_cols: usize,
        importance: Option<&[f32]>,
    ) -> Result<()> {
        self.extents.fill(Extent::NONE);
        for r in rows.clone() {
            let row = w.row(r).unwrap_or(&[]);
            let extents = &mut self.extents;
            if !simd::dispatch(RowExtents { row, block_cols, extents }) {
                let col = row.iter().position(|x| !x.is_finite()).unwrap_or(0);
                return Err(Error::NotFinite { what: "weight", row: r, col });
            }
        }
        // The two things that need another look at the weights.
        for b in 0..if self.plan.is_min_max() { 0 } else { self.extents.len() } {
            let block = Block { w, rows: rows.clone(), col: b * block_cols, cols: block_cols };
            let whole = self.extents[b].ends();
            let extreme = block.extreme(&self.plan, whole);
            let (lo, hi) = block.search(&self.plan, whole, extreme, importance)?;
            self.ranges[b] = Chosen { lo, hi, extreme };
        }
        simd::dispatch(ExactScales(self));
        Ok(())
    }
}

/// The scales and real zeros of all blocks, where formats make them depend on each other.
struct TwoLevelGrids {
    /// What was measured.
    exact: Mat<f32>,
    ranges: Vec<Chosen>,
    scales: (Mat<f32>, Vec<u8>),
    zeros: Option<(Mat<f32>, Vec<u8>)>,
}

impl TwoLevelGrids {
    fn new(plan: &Plan, exact: Mat<f32>, ranges: Vec<Chosen>) -> Result<Self> {
        let scheme = plan.scheme;
        let scales = scheme.scale_format.round_grid(exact.clone())?;
        let Some(format) = scheme.zero.real() else {
            return Ok(Self { exact, ranges, scales, zeros: None });
        };
        let mut zeros = exact.clone();
        for ((zero, scale), range) in zeros.data_mut().iter_mut().zip(scales.0.data()).zip(&ranges)
        {
            // Each for itself, a two-level number is not rounded.
            let Params { zero: z, offset, .. } =
                plan.grid((range.lo, range.hi), *zero, *scale).params;
            *zero = z + offset; // one of them is 0
        }
        let zeros = Some(format.round_grid(zeros)?);
        Ok(Self { exact, ranges, scales, zeros })
    }

    /// What [`Blocks::measure`] has found in a row of blocks.
    fn recall(&self, block_row: usize, blocks: &mut Blocks) {
        let count = blocks.ranges.len();
        blocks.ranges.copy_from_slice(&self.ranges[block_row * count..][..count]);
        blocks.exact.copy_from_slice(&self.exact.data()[block_row * count..][..count]);
    }

    fn row(&self, r: usize) -> (&[f32], Option<&[f32]>) {
        let zeros = self.zeros.as_ref().map(|(zeros, _)| zeros.as_ref().row(r).unwrap_or(&[]));
        (self.scales.0.as_ref().row(r).unwrap_or(&[]), zeros)
    }
}

/// The scale of each block before rounding.
struct ExactScales<'a>(&'a mut Blocks);

impl WithSimd for ExactScales<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Blocks { plan, extents, ranges, exact, .. } = self.0;
        if plan.is_min_max() {
            for (range, extent) in ranges.iter_mut().zip(extents) {
                let (lo, hi) = extent.ends();
                *range = Chosen { lo, hi, extreme: hi };
            }
        }
        for (exact, range) in exact.iter_mut().zip(&*ranges) {
            *exact = plan.exact_scale((range.lo, range.hi), range.extreme);
        }
    }
}

/// Joins the extent of each block of `row` to what other rows have given; whether all is finite.
struct RowExtents<'a> {
    row: &'a [f32],
    block_cols: usize,
    extents: &'a mut [Extent],
}

impl WithSimd for RowExtents<'_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> bool {
        let mut all = Extent::NONE;
        for (values, extent) in self.row.chunks(self.block_cols).zip(self.extents) {
            *extent = extent.join(Extent::of(simd, values));
            all = all.join(*extent);
        }
        all.is_finite()
    }
}

/// Scales and grids from ranges; the first block whose levels are not all finite, if any.
struct MakeGrids<'a> {
    blocks: &'a mut Blocks,
    /// Scales and zeros that are known already.
    chosen: Option<(&'a [f32], Option<&'a [f32]>)>,
    scale_bytes: &'a mut [u8],
}

impl WithSimd for MakeGrids<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Option<usize> {
        let Blocks { plan, ranges, exact, scales, grids, .. } = self.blocks;
        match self.chosen {
            Some((chosen, _)) => scales.copy_from_slice(chosen),
            None => plan.scheme.scale_format.round_slice(exact, scales, self.scale_bytes),
        }
        for (b, grid) in grids.iter_mut().enumerate() {
            *grid = plan.grid((ranges[b].lo, ranges[b].hi), exact[b], scales[b]);
            if let Some((_, Some(zeros))) = self.chosen {
                let Params { scale, .. } = grid.params;
                *grid = Grid::of(match plan.scheme.zero {
                    ZeroFormat::Offset(_) => Params { scale, zero: 0.0, offset: zeros[b] },
                    _ => Params { scale, zero: zeros[b], offset: 0.0 },
                });
            }
            if plan.reaches_infinity(grid) {
                return Some(b);
            }
        }
        None
    }
}

struct EncodeRow<'a> {
    row: &'a [f32],
    block_cols: usize,
    blocks: &'a Blocks,
    codes: &'a mut [u8],
    index: u64,
}

impl WithSimd for EncodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { row, block_cols, blocks, codes, index } = self;
        let chunks = row.chunks(block_cols).zip(codes.chunks_mut(block_cols));
        for (b, ((values, codes), grid)) in chunks.zip(&blocks.grids).enumerate() {
            blocks.plan.encode(grid, values, codes, index + (b * block_cols) as u64);
        }
    }
}

/// The part of the range of one block that the fit asks for, and its weight of the largest
/// magnitude.
pub(crate) fn search_block(
    plan: &Plan,
    values: &[f32],
    whole: (f32, f32),
    importance: Option<&[f32]>,
) -> Result<((f32, f32), f32)> {
    let w = MatRef::new(values, 1, values.len())?;
    let block = Block { w, rows: 0..1, col: 0, cols: values.len() };
    let extreme = block.extreme(plan, whole);
    Ok((block.search(plan, whole, extreme, importance)?, extreme))
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

    /// The weight of the largest magnitude.
    fn extreme(&self, plan: &Plan, (lo, hi): (f32, f32)) -> f32 {
        // Where the sign counts, the first of two equal magnitudes decides.
        if plan.fit.symmetric == SymmetricScale::SignedExtreme && hi == -lo {
            let first = self.rows().flat_map(|(_, row)| row).find(|x| x.abs() == hi);
            return first.copied().unwrap_or(hi);
        }
        if hi >= -lo { hi } else { lo }
    }

    /// The part of the range that the fit asks for.
    fn search(
        &self,
        plan: &Plan,
        (lo, hi): (f32, f32),
        extreme: f32,
        importance: Option<&[f32]>,
    ) -> Result<(f32, f32)> {
        match plan.fit.range {
            Range::MinMax => Ok((lo, hi)),
            Range::Percentile(percent) if plan.is_symmetric() => {
                let amax = range::percentile_abs(&self.values(), percent)?;
                Ok((-amax, amax))
            }
            Range::Percentile(percent) => range::percentile(&self.values(), percent),
            Range::Search { grid, candidates, norm } => {
                let importance = importance.map(|x| &x[self.col..]);
                let mut codes = vec![0; self.cols];
                let mut best = (f64::INFINITY, (lo, hi));
                for i in 0..candidates {
                    let share = (grid - i) as f32 / grid as f32;
                    let range = (lo * share, hi * share);
                    let exact = plan.exact_scale(range, extreme);
                    let grid = &plan.grid(range, exact, plan.scheme.scale_format.round(exact));
                    let mut error = 0.0;
                    for (index, x) in self.rows() {
                        let codes = &mut codes[..x.len()];
                        let row = RowError { x, codes, plan, grid, index, importance, norm };
                        error += simd::dispatch(row);
                    }
                    // An error of infinity or NaN is never smaller.
                    if error < best.0 {
                        best = (error, range);
                    }
                }
                Ok(best.1)
            }
        }
    }
}

/// `Σ importance·|x − level(code)|^norm`, in eight sums so that it can be vectorized.
struct RowError<'a> {
    x: &'a [f32],
    codes: &'a mut [u8],
    plan: &'a Plan,
    grid: &'a Grid,
    index: u64,
    importance: Option<&'a [f32]>,
    norm: f32,
}

impl WithSimd for RowError<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        const LANES: usize = 8;
        let Self { x, codes, plan, grid, index, importance, norm } = self;
        plan.encode(grid, x, codes, index);
        let mut sums = [0.0_f64; LANES];
        for (c, (x, codes)) in x.chunks(LANES).zip(codes.chunks(LANES)).enumerate() {
            for (i, ((&x, &code), sum)) in x.iter().zip(codes).zip(&mut sums).enumerate() {
                // In f64 the square of any f32 is a number.
                let e = f64::from(x) - f64::from(grid.params.real(plan.scheme.dtype.level(code)));
                let e = if norm == 2.0 { e * e } else { libm::pow(e.abs(), f64::from(norm)) };
                let weight = importance.map_or(1.0, |x| x[c * LANES + i]);
                *sum += f64::from(weight) * e;
            }
        }
        sums.iter().sum()
    }
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

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;
    use crate::{Granularity, Mat, Rounding};

    /// Every loop on plain instructions and on the newest ones of this CPU.
    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let k = 203;
        let w = Mat::from_fn(3, k, |r, c| ((r * k + c) as f32 * 0.37).sin() * (c as f32 - 90.0));
        let roundings = [
            Rounding::NearestEven,
            Rounding::NearestAway,
            Rounding::NearestUp,
            Rounding::Floor,
            Rounding::TowardZero,
            Rounding::Stochastic { seed: 3 },
        ];
        let zeros = [
            ZeroFormat::Midpoint,
            ZeroFormat::Int,
            ZeroFormat::Real(crate::ScaleFormat::F16),
            ZeroFormat::Offset(crate::ScaleFormat::Bf16),
        ];
        for (rounding, zero) in roundings.into_iter().flat_map(|r| zeros.map(|z| (r, z))) {
            for block_cols in [1, 7, 32, 64, k] {
                let scheme =
                    QuantScheme { zero, ..QuantScheme::affine(4, Granularity::PerChannel) };
                let plan = Plan::new(scheme, &Fit { rounding, ..Fit::NEAREST });
                let count = k.div_ceil(block_cols);
                for row in w.as_ref().iter_rows() {
                    let run = |plain: bool| {
                        let mut blocks = Blocks::new(plan, count);
                        let mut scale_bytes = vec![0; 2 * count];
                        let mut codes = vec![0; k];
                        let extents = &mut blocks.extents;
                        let ranges = RowExtents { row, block_cols, extents };
                        assert!(if plain {
                            ranges.with_simd(Scalar)
                        } else {
                            simd::dispatch(ranges)
                        });
                        let bytes = &mut scale_bytes;
                        if plain {
                            ExactScales(&mut blocks).with_simd(Scalar)
                        } else {
                            simd::dispatch(ExactScales(&mut blocks))
                        }
                        let blocks_mut = &mut blocks;
                        let grids =
                            MakeGrids { blocks: blocks_mut, chosen: None, scale_bytes: bytes };
                        let bad =
                            if plain { grids.with_simd(Scalar) } else { simd::dispatch(grids) };
                        assert_eq!(bad, None);
                        let (blocks, to) = (&blocks, &mut codes);
                        let encode = EncodeRow { row, block_cols, blocks, codes: to, index: 5 };
                        if plain {
                            encode.with_simd(Scalar)
                        } else {
                            simd::dispatch(encode)
                        }
                        let grid = &blocks.grids[0];
                        let mut first = vec![0; block_cols];
                        let error = RowError {
                            x: &row[..block_cols],
                            codes: &mut first,
                            plan: &plan,
                            grid,
                            index: 5,
                            importance: None,
                            norm: 2.4,
                        };
                        let error =
                            if plain { error.with_simd(Scalar) } else { simd::dispatch(error) };
                        (scale_bytes, codes, error.to_bits())
                    };
                    assert_eq!(run(true), run(false), "{rounding:?} {zero:?} {block_cols}");
                }
            }
        }
    }
}
