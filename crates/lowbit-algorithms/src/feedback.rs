//! Error feedback on rows of weights: the sums and loops that GPTQ, SpQR and the sweeps share.
//!
//! ```text
//! band    32 rows of weights, one in each lane: [k][32]
//! block   up to 128 columns: what earlier columns add to them is a product [c][32] += aᵀ·d, in tiles
//!         of 8 columns and 32 rows
//! panel   a_ic of 8 columns c for all i in front of their block: [i][8], zero-padded
//! ```
//!
//! Every sum is one chain of fused multiply-adds in the order of i, whatever the vector length or
//! the number of threads.

use pulp::{Simd, WithSimd, bytemuck};

use lowbit_core::{
    Context, Encoder, Fit, Params, QuantScheme, QuantType, Result, Rounding, ZeroFormat, f16,
};
use rayon::prelude::*;

/// Rows of a band.
pub(crate) const LANES: usize = 32;
/// One number for each row of a band.
pub(crate) type Lanes = [f32; LANES];
/// Columns of a panel.
const TILE: usize = 8;
/// Columns of a block.
const BLOCK: usize = 128;
/// Rows of a panel and of `d` that are multiplied at a time: both stay in the first cache.
const CHUNK: usize = 256;

/// The coefficients `a_ic` of one block of columns.
pub(crate) struct Block {
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Of the columns outside the block.
    panels: Vec<Vec<[f32; TILE]>>,
    /// Of those inside, `[i][c]`.
    inner: Vec<f32>,
}

impl Block {
    /// Of the columns `start..end`, where `rows` columns outside have coefficients.
    pub(crate) fn new(
        start: usize,
        end: usize,
        rows: usize,
        a: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let width = end - start;
        let panels = (start..end)
            .step_by(TILE)
            .map(|first| {
                let mut panel = vec![[0.0; TILE]; rows];
                for c in first..end.min(first + TILE) {
                    for (i, row) in panel.iter_mut().enumerate() {
                        row[c - first] = a(i, c);
                    }
                }
                panel
            })
            .collect();
        let inner = (0..width * width).map(|x| a(start + x / width, start + x % width)).collect();
        Self { start, end, panels, inner }
    }

    pub(crate) fn width(&self) -> usize {
        self.end - self.start
    }

    /// Coefficients of column `i` of the block for each of its columns.
    #[inline(always)]
    pub(crate) fn inner(&self, i: usize) -> &[f32] {
        &self.inner[i * self.width()..][..self.width()]
    }

    /// What `d`, one number for each of its columns and rows, adds to each column of the block.
    pub(crate) fn product(&self, d: &[Lanes]) -> Vec<Lanes> {
        let mut y = vec![[0.0; LANES]; self.panels.len() * TILE];
        pulp::Arch::new().dispatch(Product { d, panels: &self.panels, skip: 0, y: &mut y });
        y
    }

    /// [`product`](Self::product) where only the columns from `first` on are not 0; `d` has these.
    pub(crate) fn product_from(&self, first: usize, d: &[Lanes]) -> Vec<Lanes> {
        let mut y = vec![[0.0; LANES]; self.panels.len() * TILE];
        pulp::Arch::new().dispatch(Product { d, panels: &self.panels, skip: first, y: &mut y });
        y
    }
}

/// Blocks of `k` columns whose edges are edges of groups, or that lie in one group.
pub(crate) fn blocks(k: usize, group: usize) -> Vec<(usize, usize)> {
    let group = group.clamp(1, k.max(1));
    let span = if group < BLOCK { BLOCK / group * group } else { group };
    let mut blocks = Vec::new();
    for start in (0..k).step_by(span) {
        let end = k.min(start + span);
        blocks.extend((start..end).step_by(BLOCK).map(|at| (at, end.min(at + BLOCK))));
    }
    blocks
}

/// `y[c] += Σ_i d[i]·panels[c/8][skip + i][c%8]`
struct Product<'a> {
    d: &'a [Lanes],
    panels: &'a [Vec<[f32; TILE]>],
    skip: usize,
    y: &'a mut [Lanes],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (i, d) in self.d.chunks(CHUNK).enumerate() {
            for (panel, y) in self.panels.iter().zip(self.y.as_chunks_mut::<TILE>().0) {
                let Some(a) = panel.get(self.skip + i * CHUNK..) else { return };
                // Two vectors a column; as many columns as leave registers for the factors.
                if S::REGISTER_COUNT >= 32 {
                    tile::<S, TILE>(simd, d, a, y);
                } else {
                    tile::<S, 4>(simd, d, a, y);
                }
            }
        }
    }
}

#[inline(always)]
fn tile<S: Simd, const COLS: usize>(
    simd: S,
    d: &[Lanes],
    a: &[[f32; TILE]],
    y: &mut [Lanes; TILE],
) {
    for c in (0..TILE).step_by(COLS) {
        for l in (0..LANES).step_by(2 * S::F32_LANES) {
            let mut sums = [[simd.splat_f32s(0.0); 2]; COLS];
            for (sums, y) in sums.iter_mut().zip(&y[c..]) {
                if let [y0, y1, ..] = S::as_simd_f32s(&y[l..]).0 {
                    *sums = [*y0, *y1];
                }
            }
            for (d, a) in d.iter().zip(a) {
                let (Some(a), [d0, d1, ..]) =
                    (a[c..].first_chunk::<COLS>(), S::as_simd_f32s(&d[l..]).0)
                else {
                    break; // never: COLS divides TILE, and two vectors LANES
                };
                for (sums, &a) in sums.iter_mut().zip(a) {
                    let a = simd.splat_f32s(a);
                    sums[0] = simd.mul_add_f32s(a, *d0, sums[0]);
                    sums[1] = simd.mul_add_f32s(a, *d1, sums[1]);
                }
            }
            for (sums, y) in sums.iter().zip(&mut y[c..]) {
                let sums: &[f32] = bytemuck::cast_slice(sums);
                let end = LANES.min(l + 2 * S::F32_LANES);
                y[l..end].copy_from_slice(&sums[..end - l]);
            }
        }
    }
}

/// The parameters of one block of each row of a band.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Grids {
    scale: Lanes,
    zero: Lanes,
    offset: Lanes,
}

impl Grids {
    pub(crate) const UNIT: Self =
        Self { scale: [1.0; LANES], zero: [0.0; LANES], offset: [0.0; LANES] };

    pub(crate) fn get(&self, lane: usize) -> Params {
        let (scale, zero, offset) = (self.scale[lane], self.zero[lane], self.offset[lane]);
        Params { scale, zero, offset }
    }

    pub(crate) fn set(&mut self, lane: usize, params: Params) {
        (self.scale[lane], self.zero[lane], self.offset[lane]) =
            (params.scale, params.zero, params.offset);
    }
}

/// Nearest codes and levels of whole bands.
pub(crate) struct Levels {
    pub(crate) encoder: Encoder,
    pub(crate) dtype: QuantType,
    /// The lowest and highest code, where rounding is a few vector instructions.
    integer: Option<(f32, f32)>,
    /// Whether zeros are added before rounding.
    real_zero: bool,
}

impl Levels {
    pub(crate) fn new(scheme: QuantScheme, fit: &Fit) -> Result<Self> {
        let encoder = Encoder::new(scheme, fit)?;
        let lowest = encoder
            .code(Params { scale: 1.0, zero: f32::from(scheme.midpoint()), offset: 0.0 }, -1e6);
        let integer = match scheme.dtype {
            QuantType::Int { .. } if fit.rounding == Rounding::NearestEven => {
                Some((f32::from(lowest), f32::from(scheme.dtype.max_code())))
            }
            _ => None,
        };
        let real_zero = matches!(scheme.zero, ZeroFormat::Real(_));
        Ok(Self { encoder, dtype: scheme.dtype, integer, real_zero })
    }

    /// The nearest code of each lane, and what it stands for.
    #[inline(always)]
    pub(crate) fn nearest(&self, grids: &Grids, w: &Lanes, codes: &mut [u8; LANES]) -> Lanes {
        let mut q = [0.0; LANES];
        if let Some((lowest, highest)) = self.integer {
            for l in 0..LANES {
                let (scale, zero) = (grids.scale[l], grids.zero[l]);
                let steps = (w[l] - grids.offset[l]) / if scale == 0.0 { 1.0 } else { scale };
                let (before, behind) = if self.real_zero { (zero, 0.0) } else { (0.0, zero) };
                let steps = (steps + before).clamp(-512.0, 512.0);
                // To nearest even: the sum has no bits behind the point.
                let rounded = (steps + 12_582_912.0) - 12_582_912.0 + behind;
                let level = rounded.max(lowest).min(highest);
                codes[l] = level as i32 as u8;
                q[l] = scale * (level - zero) + grids.offset[l];
            }
        } else {
            for l in 0..LANES {
                let params = grids.get(l);
                codes[l] = self.encoder.code(params, w[l]);
                q[l] = self.encoder.real(params, codes[l]);
            }
        }
        q
    }
}

impl Levels {
    /// Keeps weight `w` of a lane beside the codes: in f16, less what its code stands for. Gives what
    /// is kept and what both are together.
    pub(crate) fn keep(&self, params: Params, code: u8, w: f32) -> (f32, f32) {
        let dense = self.encoder.real(params, code);
        let largest = f16::MAX.to_f32();
        let extra = f16::from_f32((w - dense).clamp(-largest, largest)).to_f32();
        (extra, dense + extra)
    }
}

/// `f` of each task in order, on the threads of the context.
pub(crate) fn map<T: Send, R: Send>(
    tasks: Vec<T>,
    ctx: &mut Context,
    f: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    match ctx.pool().filter(|pool| pool.current_num_threads() > 1) {
        Some(pool) => pool.install(|| tasks.into_par_iter().with_max_len(1).map(&f).collect()),
        None => tasks.into_iter().map(f).collect(),
    }
}

/// 32 rows of weights on their way to codes; by position, which is the channel where nothing is
/// said of an order.
#[derive(Clone)]
pub(crate) struct Band {
    /// The first row, and how many there are.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// What the codes should give.
    pub(crate) target: Vec<Lanes>,
    /// `target − level`.
    pub(crate) d: Vec<Lanes>,
    pub(crate) codes: Vec<[u8; LANES]>,
    /// Weights kept beside the codes: which lanes, and what is added to the levels.
    pub(crate) kept: Vec<u32>,
    pub(crate) extra: Vec<Lanes>,
    /// Of each group of columns, as it will be stored.
    pub(crate) grids: Vec<Grids>,
    /// The same before the rounding of two-level scales.
    pub(crate) exact: Vec<Grids>,
}

/// Columns `from..to`, all in one block and one group, from left to right: the nearest codes, and
/// their errors to the columns behind them.
pub(crate) struct Run<'a> {
    pub(crate) levels: &'a Levels,
    pub(crate) grids: &'a Grids,
    pub(crate) block: &'a Block,
    /// Of the block.
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Of the columns of the block: targets, errors, codes, and what is to be added.
    pub(crate) target: &'a [Lanes],
    pub(crate) d: &'a mut [Lanes],
    pub(crate) codes: &'a mut [[u8; LANES]],
    pub(crate) y: &'a mut [Lanes],
    pub(crate) kept: &'a mut [u32],
    pub(crate) extra: &'a mut [Lanes],
    /// Of the columns of the block: a weight is kept from an error of `threshold / importance` on.
    pub(crate) importance: &'a [f32],
    pub(crate) threshold: f32,
}

impl WithSimd for Run<'_> {
    /// Of each lane 0, or NaN if one of its weights was not finite with what was added to it.
    type Output = Lanes;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Lanes {
        let Self { levels, grids, block, from, to, target, d, codes, y, .. } = self;
        let mut finite = [0.0; LANES];
        for j in from..to {
            let mut w = [0.0; LANES];
            for l in 0..LANES {
                w[l] = target[j][l] + y[j][l];
                finite[l] += 0.0 * w[l];
            }
            let mut q = levels.nearest(grids, &w, &mut codes[j]);
            let mut kept = 0;
            for l in 0..LANES {
                let cost = (w[l] - q[l]) * (w[l] - q[l]) * self.importance[j];
                kept |= u32::from(cost > self.threshold) << l;
            }
            self.kept[j] = kept;
            while kept != 0 {
                let l = kept.trailing_zeros() as usize;
                kept &= kept - 1;
                codes[j][l] = levels.encoder.code(grids.get(l), 0.0);
                (self.extra[j][l], q[l]) = levels.keep(grids.get(l), codes[j][l], w[l]);
            }
            let mut error = [0.0; LANES];
            for l in 0..LANES {
                error[l] = target[j][l] - q[l];
            }
            d[j] = error;
            add_to(&mut y[..block.width()], j + 1, &error, block.inner(j));
        }
        finite
    }
}

/// `y[c] += a[c]·d` for c from `from` on.
#[inline(always)]
fn add_to(y: &mut [Lanes], from: usize, d: &Lanes, a: &[f32]) {
    for (y, &a) in y.iter_mut().zip(a).skip(from) {
        for l in 0..LANES {
            y[l] = a.mul_add(d[l], y[l]);
        }
    }
}

/// What the columns `from..to` of a block would be if all of them were free: the weights that a
/// group's grid has to reach. Writes them and their distance from the target.
pub(crate) struct Free<'a> {
    pub(crate) block: &'a Block,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) target: &'a [Lanes],
    pub(crate) d: &'a mut [Lanes],
    pub(crate) y: &'a mut [Lanes],
    pub(crate) w: &'a mut [Lanes],
}

impl WithSimd for Free<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { block, from, to, target, d, y, w } = self;
        for j in from..to {
            let mut error = [0.0; LANES];
            for l in 0..LANES {
                w[j][l] = target[j][l] + y[j][l];
                error[l] = target[j][l] - w[j][l];
            }
            d[j] = error;
            add_to(&mut y[..to], j + 1, &error, block.inner(j));
        }
    }
}

/// One pass of coordinate descent over the columns of a block, from right to left: each weight is
/// set to the level nearest to where the loss is least with all others as they are.
pub(crate) struct Descend<'a> {
    pub(crate) levels: &'a Levels,
    pub(crate) grids: &'a [Grids],
    /// The group of each column of the block.
    pub(crate) group: &'a [usize],
    pub(crate) block: &'a Block,
    pub(crate) target: &'a [Lanes],
    pub(crate) d: &'a mut [Lanes],
    pub(crate) codes: &'a mut [[u8; LANES]],
    /// `d·H_c / H_cc` of each column of the block over all columns.
    pub(crate) y: &'a mut [Lanes],
    pub(crate) kept: &'a [u32],
    pub(crate) extra: &'a mut [Lanes],
}

impl WithSimd for Descend<'_> {
    /// As of [`Run`].
    type Output = Lanes;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Lanes {
        let Self { levels, grids, group, block, target, d, codes, y, kept, extra } = self;
        let mut finite = [0.0; LANES];
        for j in (0..block.width()).rev() {
            let mut w = [0.0; LANES];
            for l in 0..LANES {
                w[l] = target[j][l] - d[j][l] + y[j][l];
                finite[l] += 0.0 * w[l];
            }
            let (grids, before) = (&grids[group[j]], codes[j]);
            let mut q = levels.nearest(grids, &w, &mut codes[j]);
            let mut kept = kept[j];
            while kept != 0 {
                let l = kept.trailing_zeros() as usize;
                kept &= kept - 1;
                codes[j][l] = before[l];
                (extra[j][l], q[l]) = levels.keep(grids.get(l), before[l], w[l]);
            }
            let mut change = [0.0; LANES];
            for l in 0..LANES {
                let error = target[j][l] - q[l];
                change[l] = error - d[j][l];
                d[j][l] = error;
            }
            add_to(&mut y[..j], 0, &change, block.inner(j));
        }
        finite
    }
}

/// Leaves weights that spoil the grid of their group out of its fit: SpQR's leave-one-out.
///
/// A weight is likely to be an outlier if without it the grid of the others, from their smallest to
/// their largest, lowers the group's error by more than `threshold`. It is replaced by the mean of
/// the weights that are no outliers.
pub(crate) struct LeaveOut<'a> {
    /// The weights of the group.
    pub(crate) w: &'a mut [Lanes],
    pub(crate) importance: &'a [f32],
    pub(crate) threshold: f32,
    /// The highest code.
    pub(crate) steps: f32,
}

impl WithSimd for LeaveOut<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { w, importance, threshold, steps } = self;
        let whole = error_without(w, importance, steps, usize::MAX);
        let mut likely = vec![[false; LANES]; w.len()];
        for (j, likely) in likely.iter_mut().enumerate() {
            let rest = error_without(w, importance, steps, j);
            for l in 0..LANES {
                likely[l] = whole[l] - rest[l] > threshold;
            }
        }
        let (mut sum, mut count) = ([0.0; LANES], [0.0_f32; LANES]);
        for (w, likely) in w.iter().zip(&likely) {
            for l in 0..LANES {
                sum[l] += if likely[l] { 0.0 } else { w[l] };
                count[l] += if likely[l] { 0.0 } else { 1.0 };
            }
        }
        for (w, likely) in w.iter_mut().zip(&likely) {
            for l in 0..LANES {
                w[l] = if likely[l] { sum[l] / count[l].max(1.0) } else { w[l] };
            }
        }
    }
}

/// `Σ importance·(w − ŵ)²` over all columns but `without`, on the grid of these columns.
#[inline(always)]
fn error_without(w: &[Lanes], importance: &[f32], steps: f32, without: usize) -> Lanes {
    let (mut lo, mut hi) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for (j, w) in w.iter().enumerate() {
        if j != without {
            for l in 0..LANES {
                lo[l] = lo[l].min(w[l]);
                hi[l] = hi[l].max(w[l]);
            }
        }
    }
    let mut sum = [0.0; LANES];
    let (mut scale, mut zero) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..LANES {
        // Equal weights are exact.
        scale[l] = if hi[l] > lo[l] { (hi[l] - lo[l]) / steps } else { 1.0 };
        zero[l] = -lo[l] / scale[l];
    }
    for (j, (w, &importance)) in w.iter().zip(importance).enumerate() {
        if j != without {
            for l in 0..LANES {
                let code = (w[l] / scale[l] + zero[l]).clamp(0.0, steps);
                let code = (code + 12_582_912.0) - 12_582_912.0;
                let error = w[l] - scale[l] * (code - zero[l]);
                sum[l] += error * error * importance;
            }
        }
    }
    sum
}
