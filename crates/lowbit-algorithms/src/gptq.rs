//! GPTQ: columns are rounded one after the other, and what rounding has lost is made up for by the
//! columns that are still free, as the second moment of the inputs says. With it, the improvements
//! of this library's own presets: see [`Gptq::improved`].
//!
//! Frantar et al., arXiv:2210.17323, algorithm 1. Letters: W `(n, k)`, `H = 2·Σ xᵀx / tokens`,
//! `H⁻¹ = UᵀU`. Deviations from the authors' code:
//!
//! * the updates are gathered where they are received (see `hessian.rs`), so that neither H is
//!   inverted nor W rewritten; in exact arithmetic every weight is the same;
//! * H is factored in f64; weights, errors and sums are f32;
//! * a group's scale is fitted to its compensated weights whatever the sizes of groups and blocks;
//!   the authors' code misses the updates of the present block of 128;
//! * a symmetric grid is one in every row; theirs is not in rows without negative weights;
//! * if there is no Cholesky factor, the damping is multiplied by ten until there is one.

use std::sync::Arc;

use lowbit_core::{
    BlockParams, Context, Error, Fit, Mat, MatRef, Outliers, Params, QLinear, QMatrix, QuantScheme,
    Result, ScaleFormat, SparseRows, Transform, ZeroFormat, f16,
};
use pulp::Arch;

use crate::{
    Calibration, InputSet, Needs, Plan, Quantized, Quantizer, Report, Uncalibrated,
    feedback::{
        Band, Block, Descend, Free, Grids, LANES, Lanes, LeaveOut, Levels, Run, blocks, map,
    },
    hessian::{Factor, Hessian},
    spqr::OutlierRule,
};

/// GPTQ.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Gptq, Quantizer, Rtn, layer_loss};
/// use lowbit_core::{Context, Granularity, Mat, QuantScheme};
///
/// let ctx = &mut Context::new();
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32 * 0.7).sin());
/// // Inputs of which each resembles the one before it.
/// let x = Mat::from_fn(256, 64, |t, c| ((t * 7 + c) as f32 * 0.05).sin() + (t as f32).cos());
/// let mut calibration = Calibration::with_second_moment(64)?;
/// calibration.observe(x.as_ref(), ctx)?;
///
/// let scheme = QuantScheme::affine(3, Granularity::PerGroup(32));
/// let mut loss = |quantizer: &dyn Quantizer| -> lowbit_core::Result<f64> {
///     let layer = quantizer.quantize(w.as_ref(), &calibration, ctx)?.layer;
///     layer_loss(w.as_ref(), &layer, &calibration)
/// };
/// let (rtn, gptq) = (loss(&Rtn::new(scheme))?, loss(&Gptq::new(scheme))?);
/// assert!(gptq < 0.5 * rtn);
/// assert!(loss(&Gptq::improved(scheme))? < gptq);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gptq {
    /// How the weights are stored. Blocks of more than one row have the scales of the weights
    /// before compensation.
    pub scheme: QuantScheme,
    /// How scales are chosen; the errors of [`Range::Search`](lowbit_core::Range::Search) are weighed
    /// by `1 / U_jj²`.
    pub fit: Fit,
    /// What is added to the diagonal of H, as a share of its mean; the paper's is 0.01.
    pub damping: f64,
    /// What is added to each element of the diagonal of H, as a share of itself: correlations of channels
    /// count `1 / (1 + shrinkage)` times. The paper has none.
    pub shrinkage: f64,
    /// The order in which columns are rounded.
    pub order: Order,
    /// Passes of coordinate descent on `tr(ΔW·H·ΔWᵀ)` over the codes afterwards.
    pub sweeps: u32,
    /// In front of so many of these passes, scales are solved again for the codes.
    pub refits: u32,
    /// Which part of the way the target goes towards the output of the f32 model: see
    /// [`Drift`](crate::Drift).
    pub target_share: f64,
    /// What to do with a layer whose calibration has seen no tokens.
    pub uncalibrated: Uncalibrated,
}

/// The order in which [`Gptq`] rounds columns, and which of them share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// From first to last.
    #[default]
    Given,
    /// By falling diagonal of H (act-order), with scales that are fitted to the weights before
    /// compensation (static groups). Stored as ever.
    Falling,
    /// By falling diagonal of H, where columns are stored in this order too, so that those of like
    /// importance share a scale. Costs a permutation of the inputs, 32 bits a column.
    Sorted,
}

impl Gptq {
    /// The paper's method: damping of 0.01, columns from first to last.
    pub const fn new(scheme: QuantScheme) -> Self {
        Self {
            scheme,
            fit: Fit::NEAREST,
            damping: 0.01,
            shrinkage: 0.0,
            order: Order::Given,
            sweeps: 0,
            refits: 0,
            target_share: 0.0,
            uncalibrated: Uncalibrated::Error,
        }
    }

    /// All that lowers the loss of a model without a bit more: scales of the smallest weighted error, eight
    /// passes of coordinate descent, scales solved again in front of six of them, a target three quarters
    /// of the way towards the f32 model's output, and, since so much effort fits the calibration texts
    /// closer than others, shrinkage of 0.2.
    pub const fn improved(scheme: QuantScheme) -> Self {
        let range = lowbit_core::Range::Search { grid: 100, candidates: 60, norm: 2.0 };
        let fit = Fit { range, ..Fit::NEAREST };
        Self { fit, shrinkage: 0.2, sweeps: 8, refits: 6, target_share: 0.75, ..Self::new(scheme) }
    }

    /// As [`hessian`], with its options.
    pub(crate) fn hessian<'a>(
        &self,
        w: MatRef<'_, f32>,
        calibration: &'a Calibration,
    ) -> Result<Option<Hessian<'a>>> {
        check_parameter("shrinkage", self.shrinkage)?;
        let act_order = self.order != Order::Given;
        let mut hessian = hessian(w, calibration, self.damping, self.uncalibrated, act_order)?;
        if let Some(hessian) = &mut hessian {
            hessian.shrinkage = self.shrinkage;
        }
        Ok(hessian)
    }
}

impl Quantizer for Gptq {
    fn quantize_in_set(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        ctx: &mut Context,
    ) -> Result<Quantized> {
        let Some(hessian) = self.hessian(w, inputs.calibration())? else {
            return nearest(w, self.scheme, &self.fit);
        };
        Solver { gptq: self, inputs, hessian: &hessian, outliers: None }.solve(w, ctx)
    }

    fn needs(&self) -> Needs {
        Needs::SecondMoment
    }

    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        let plan = Plan::of(self.scheme, out_features, in_features, self.needs())?;
        let (n, k) = (out_features, in_features);
        let times = |a: usize, b: usize| (a as u64).saturating_mul(b as u64);
        let (weights, square) = (plan.weights, times(k, k));
        let grid = Grid::new(self.scheme, n, k, self.order == Order::Falling);
        // Of each weight in a band its target, its error, what is kept of it, and its code; of each block
        // its parameters, as stored and before that; and the target of the whole layer.
        let rows = n.next_multiple_of(LANES);
        let of_bands = times(rows, k).saturating_mul(13).saturating_add(times(rows, k) / 8);
        let of_blocks = times(rows, grid.across).saturating_mul(24);
        let target = weights.saturating_mul(4);
        let always = of_bands.saturating_add(of_blocks).saturating_add(target);
        // Before there are bands, the factor in f64 beside its panels in f32, with squares of 128 columns on the
        // diagonal; these the set of inputs keeps, as it does H in f32 for sweeps; the parameters; codes
        // and what is stored, or the parameters while they are rounded.
        let blocks = times(rows, grid.across) / grid.rows.max(1) as u64;
        let panels = square.saturating_mul(2).saturating_add(times(k, 256));
        let factoring = square.saturating_mul(8).saturating_add(panels);
        let kept = panels.saturating_mul(if self.sweeps > 0 { 3 } else { 1 });
        let sweeping = kept.saturating_add(blocks.saturating_mul(16));
        let storing = weights.saturating_add(plan.memory).max(blocks.saturating_mul(48));
        let storing = storing.saturating_add(kept);
        // The normal equations of 32 rows, and those of one of them twice; four numbers of each weight.
        let refits = self.sweeps > 0 && self.refits > 0 && grid.can_refit;
        let each_thread = match refits {
            true => times(grid.across, grid.across)
                .saturating_mul(8 * (LANES as u64 + 2))
                .saturating_add(times(k, 2 * LANES * 4)),
            false => 0,
        };
        let memory = always.saturating_add(storing).max(target.saturating_add(factoring));
        let shared = always.saturating_add(sweeping);
        let memory = memory.max(shared.saturating_add(each_thread));
        let mut bytes = plan.bytes;
        if self.order == Order::Sorted {
            bytes += 4 * in_features;
        }
        let most_threads = n.div_ceil(LANES * TOGETHER).max(1);
        Ok(Plan { memory, shared, each_thread, most_threads, bytes, ..plan })
    }

    fn target_share(&self) -> f64 {
        self.target_share
    }
}

/// A number of 0 or more.
pub(crate) fn check_parameter(what: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::Parameter { what, value, expected: "a finite number of 0 or more" })
}

/// Weights that are finite.
pub(crate) fn check_weight(w: MatRef<'_, f32>) -> Result<()> {
    for (row, values) in w.iter_rows().enumerate() {
        if let Some(col) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { what: "weight", row, col });
        }
    }
    Ok(())
}

/// What the inputs of a layer say, if weights and options are possible; `None` where nothing is known of
/// them, and a method rounds to nearest.
pub(crate) fn hessian<'a>(
    w: MatRef<'_, f32>,
    calibration: &'a Calibration,
    damping: f64,
    uncalibrated: Uncalibrated,
    act_order: bool,
) -> Result<Option<Hessian<'a>>> {
    check_parameter("damping", damping)?;
    check_weight(w)?;
    if uncalibrated.is_nearest(w, calibration)? {
        return Ok(None);
    }
    Ok(Some(Hessian::new(calibration, act_order)?).filter(|hessian| !hessian.is_zero()))
}

/// Rounded to nearest, because nothing is known of the inputs.
pub(crate) fn nearest(w: MatRef<'_, f32>, scheme: QuantScheme, fit: &Fit) -> Result<Quantized> {
    let layer = QLinear::new(QMatrix::quantize_with(w, scheme, fit, None)?);
    Ok(Quantized { layer, report: Report { fallback: true, ..Report::default() } })
}

/// The order as a transform of the inputs.
pub(crate) fn permutation(order: &[usize]) -> Result<Transform> {
    let k = order.len();
    let places = order.iter().map(|&channel| u32::try_from(channel)).collect::<Result<_, _>>();
    Ok(Transform::Permute(places.map_err(|_| Error::TooLarge { rows: 1, cols: k })?))
}

pub(crate) struct Solver<'a> {
    pub(crate) gptq: &'a Gptq,
    pub(crate) inputs: &'a InputSet<'a>,
    pub(crate) hessian: &'a Hessian<'a>,
    /// Which weights are kept beside the codes.
    pub(crate) outliers: Option<OutlierRule>,
}

impl Solver<'_> {
    /// The input channel that is stored in a column.
    fn channel(&self, column: usize) -> usize {
        match self.gptq.order {
            Order::Sorted => self.hessian.order[column],
            Order::Given | Order::Falling => column,
        }
    }

    /// The column at each position of the order of elimination.
    fn columns(&self) -> Vec<usize> {
        match self.gptq.order {
            Order::Falling => self.hessian.order.clone(),
            Order::Given | Order::Sorted => (0..self.hessian.len()).collect(),
        }
    }

    pub(crate) fn solve(&self, w: MatRef<'_, f32>, ctx: &mut Context) -> Result<Quantized> {
        let Self { gptq, inputs, hessian, outliers } = *self;
        let ((n, k), scheme) = (w.shape(), gptq.scheme);
        let levels = Levels::new(scheme, &gptq.fit)?;
        // The weights as they will be stored, without those that no input reaches.
        let target = Mat::from_fn(n, k, |r, column| {
            let channel = self.channel(column);
            let w = w.row(r).map_or(0.0, |row| row[channel]);
            if hessian.dead[channel] { 0.0 } else { w }
        });
        let grid = Grid::new(scheme, n, k, gptq.order == Order::Falling);
        let columns = self.columns();
        let edges = if grid.fresh { grid.cols } else { k };
        let elimination = inputs.elimination(hessian, gptq.damping, edges, ctx)?;

        // Grids that do not depend on what happens on the way.
        let mut stored = None;
        if !grid.fresh {
            let importance: Vec<_> =
                (0..k).map(|column| hessian.diagonal[self.channel(column)] as f32).collect();
            let q = QMatrix::quantize_with(target.as_ref(), scheme, &gptq.fit, Some(&importance))?;
            stored = Some(BlockParams::from(&q));
        }

        let groups: Vec<_> = columns.iter().map(|column| column / grid.cols).collect();
        let mut bands = map((0..n).step_by(LANES).collect(), ctx, |first| {
            Band::new(target.as_ref(), first, &columns, grid.across)
        });
        let mut pass = Pass {
            levels: &levels,
            blocks: &elimination.blocks,
            groups: &groups,
            grid: &grid,
            fixed: !grid.fresh,
            importance: &elimination.importance,
            threshold: None,
        };
        if let Some(stored) = &stored {
            bands.iter_mut().for_each(|band| grid.give(stored.params(), band));
        }
        if let Some(rule) = outliers {
            let unit = sensitivity(target.as_ref(), &columns, &elimination.importance);
            let threshold = rule.threshold(unit, &bands, k, |bands, threshold| {
                Pass { threshold: Some(threshold), ..pass }.run(bands, ctx)
            })?;
            pass.threshold = Some(threshold);
        }
        pass.run(&mut bands, ctx)?;
        if grid.fresh {
            let exact = grid.take(&bands, n);
            let params = BlockParams::round(scheme, n, k, &exact)?;
            if !grid.is_local {
                // Now that all scales are known, those that depend on each other are rounded, and
                // the codes chosen again for what is stored.
                bands.iter_mut().for_each(|band| grid.give(params.params(), band));
                pass.fixed = true;
                pass.run(&mut bands, ctx)?;
            }
            stored = Some(params);
        }
        let damping = elimination.damping;
        drop(elimination);

        if gptq.sweeps > 0 && k > 0 {
            bands.iter_mut().for_each(|band| band.reorder(&columns));
            let sweeps = Sweeps::new(self, &levels, &grid, damping, ctx)?;
            for sweep in 0..gptq.sweeps {
                if sweep < gptq.refits && grid.can_refit {
                    for_each(&mut bands, ctx, |bands| {
                        bands.iter_mut().try_for_each(|band| sweeps.refit(band))
                    })?;
                }
                for_each(&mut bands, ctx, |bands| sweeps.descend(bands))?;
            }
            if gptq.refits > 0 && grid.can_refit {
                let exact = grid.take(&bands, n);
                stored = Some(BlockParams::round(scheme, n, k, &exact)?);
            }
        } else {
            bands.iter_mut().for_each(|band| band.reorder(&columns));
        }

        let mut codes = vec![0; n * k];
        for band in &bands {
            for lane in 0..band.rows {
                let row = &mut codes[(band.first + lane) * k..][..k];
                for (code, lanes) in row.iter_mut().zip(&band.codes) {
                    *code = lanes[lane];
                }
            }
        }
        let stored = stored.ok_or(Error::Empty { what: "scales" })?;
        let mut layer = QLinear::new(QMatrix::from_codes(&stored, &codes)?);
        if gptq.order == Order::Sorted {
            layer = layer.with_transforms(vec![permutation(&hessian.order)?])?;
        }
        let dead_columns = hessian.dead.iter().filter(|dead| **dead).count();
        let mut report = Report { damping: Some(damping), dead_columns, ..Report::default() };
        if outliers.is_some() {
            let rows = kept_weights(&bands, n, k)?;
            report.outliers = rows.values().len();
            layer = layer.with_outliers(Some(Outliers::Sparse(rows)))?;
        }
        Ok(Quantized { layer, report })
    }
}

/// The mean over columns of `var(W_j) / U_jj²`: the unit of SpQR's threshold.
fn sensitivity(w: MatRef<'_, f32>, columns: &[usize], importance: &[f32]) -> f64 {
    let (n, k) = w.shape();
    let (mut sums, mut squares) = (vec![0.0_f64; k], vec![0.0_f64; k]);
    for row in w.iter_rows() {
        for (c, &w) in row.iter().enumerate() {
            sums[c] += f64::from(w);
            squares[c] += f64::from(w) * f64::from(w);
        }
    }
    let spread = columns.iter().zip(importance).map(|(&c, &importance)| {
        let degrees = n.saturating_sub(1).max(1) as f64;
        let variance = (squares[c] - sums[c] * sums[c] / n as f64) / degrees;
        variance.max(0.0) * f64::from(importance)
    });
    spread.sum::<f64>() / k.max(1) as f64
}

/// What the bands keep beside their codes, by row.
fn kept_weights(bands: &[Band], n: usize, k: usize) -> Result<SparseRows> {
    let index = |x: usize| u32::try_from(x).map_err(|_| Error::TooLarge { rows: n, cols: k });
    let (mut starts, mut columns, mut values) = (vec![0], Vec::new(), Vec::new());
    for band in bands {
        for lane in 0..band.rows {
            for (c, (&kept, extra)) in band.kept.iter().zip(&band.extra).enumerate() {
                if kept >> lane & 1 == 1 && extra[lane] != 0.0 {
                    columns.push(index(c)?);
                    values.push(f16::from_f32(extra[lane]));
                }
            }
            starts.push(index(columns.len())?);
        }
    }
    SparseRows::new(n, k, starts, columns, values)
}

/// How blocks of weights lie in the matrix, and what follows for their scales.
pub(crate) struct Grid {
    scheme: QuantScheme,
    /// Rows and columns of a block.
    rows: usize,
    pub(crate) cols: usize,
    /// Blocks side by side.
    pub(crate) across: usize,
    /// Whether each block is fitted to its compensated weights, when its first column is due.
    pub(crate) fresh: bool,
    /// Whether the stored scales of a band do not depend on other bands and groups.
    pub(crate) is_local: bool,
    /// Whether the scales of a row may change when its codes are known.
    can_refit: bool,
}

impl Grid {
    pub(crate) fn new(scheme: QuantScheme, n: usize, k: usize, is_static: bool) -> Self {
        let (rows, cols) = scheme.granularity.block(n, k);
        let (_, across) = scheme.granularity.grid(n, k);
        // Two-level scales that share a step.
        let span = |format: ScaleFormat| match format {
            ScaleFormat::TwoLevel(two) => two.granularity.block(n.div_ceil(rows), across),
            _ => (1, 1),
        };
        let zeros = match scheme.zero {
            ZeroFormat::Real(format) | ZeroFormat::Offset(format) => span(format),
            _ => (1, 1),
        };
        let spans = [span(scheme.scale_format), zeros];
        let in_band = spans.iter().all(|(rows, _)| LANES.is_multiple_of(*rows) || n <= LANES);
        let is_local = in_band && spans.iter().all(|(_, cols)| *cols == 1);
        Self {
            scheme,
            rows,
            cols,
            across,
            fresh: rows == 1 && cols < k && !is_static,
            is_local,
            can_refit: rows == 1 && in_band,
        }
    }

    /// Parameters whose zero is not far from the grid. Zeros of two levels share a step with others, to
    /// which one group far from 0 would leave no precision: its scale is made larger instead.
    fn near_zero(&self, params: Params) -> Params {
        let ZeroFormat::Real(ScaleFormat::TwoLevel(_)) = self.scheme.zero else { return params };
        let highest = f32::from(self.scheme.dtype.max_code());
        let Params { scale, zero, .. } = params;
        let reach = 2.0 * highest;
        // The level nearest to 0 stays.
        if zero < -reach {
            Params { scale: scale * (-zero / reach), zero: -reach, ..params }
        } else if zero > highest + reach {
            let scale = scale * ((zero - highest) / reach);
            Params { scale, zero: highest + reach, ..params }
        } else {
            params
        }
    }

    /// Gives a band the parameters of its blocks.
    fn give(&self, params: &[Params], band: &mut Band) {
        for (g, grids) in band.grids.iter_mut().enumerate() {
            for lane in 0..band.rows {
                let row = (band.first + lane) / self.rows;
                grids.set(lane, params[row * self.across + g]);
            }
        }
        band.exact.copy_from_slice(&band.grids);
    }

    /// The parameters of all blocks, before the rounding of two-level scales.
    fn take(&self, bands: &[Band], n: usize) -> Vec<Params> {
        let mut params = vec![Params::default(); n.div_ceil(self.rows) * self.across];
        for band in bands {
            for lane in 0..band.rows {
                let row = (band.first + lane) / self.rows * self.across;
                for (g, grids) in band.exact.iter().enumerate() {
                    params[row + g] = grids.get(lane);
                }
            }
        }
        params
    }

    /// Rounds the scales of the groups `groups` of a band, which are local, as they will be stored.
    fn round(&self, band: &mut Band, groups: std::ops::Range<usize>) -> Result<()> {
        let count = groups.len();
        let mut params = Vec::with_capacity(band.rows * count);
        for lane in 0..band.rows {
            params.extend(band.exact[groups.clone()].iter().map(|grids| grids.get(lane)));
        }
        let rounded = BlockParams::round(self.scheme, band.rows, count * self.cols, &params)?;
        for (at, params) in rounded.params().iter().enumerate() {
            band.grids[groups.start + at % count].set(at / count, *params);
        }
        Ok(())
    }
}

impl Band {
    /// Up to 32 rows of `w` from `first` on, with the column of each position.
    pub(crate) fn new(w: MatRef<'_, f32>, first: usize, columns: &[usize], groups: usize) -> Self {
        let k = columns.len();
        let rows = LANES.min(w.rows() - first);
        let mut target = vec![[0.0; LANES]; k];
        for lane in 0..rows {
            let row = w.row(first + lane).unwrap_or(&[]);
            for (target, &column) in target.iter_mut().zip(columns) {
                target[lane] = row[column];
            }
        }
        let grids = vec![Grids::UNIT; groups];
        let (d, codes) = (vec![[0.0; LANES]; k], vec![[0; LANES]; k]);
        let (kept, extra) = (vec![0; k], vec![[0.0; LANES]; k]);
        Self { first, rows, target, d, codes, kept, extra, exact: grids.clone(), grids }
    }

    /// From positions to columns.
    fn reorder(&mut self, columns: &[usize]) {
        if columns.is_sorted() {
            return;
        }
        let Self { target, d, codes, kept, extra, .. } = self.clone();
        for (position, &column) in columns.iter().enumerate() {
            self.target[column] = target[position];
            self.d[column] = d[position];
            self.codes[column] = codes[position];
            self.kept[column] = kept[position];
            self.extra[column] = extra[position];
        }
    }
}

/// The coefficients `a_ic = R_ic / R_cc` in blocks of columns.
pub(crate) fn panels(factor: &Factor, group: usize, ctx: &mut Context) -> Vec<Block> {
    let k = factor.len();
    map(blocks(k, group), ctx, |(start, end)| {
        Block::new(start, end, start, |i, c| {
            if i < c { (factor.at(i, c) / factor.at(c, c)) as f32 } else { 0.0 }
        })
    })
}

/// Bands that are handled together, so that the coefficients are read once for all of them.
const TOGETHER: usize = 4;

/// Calls `f` for some bands at a time, on the threads of the context. The first error of the first
/// bands is returned, whoever was faster.
fn for_each(
    bands: &mut [Band],
    ctx: &mut Context,
    f: impl Fn(&mut [Band]) -> Result<()> + Sync,
) -> Result<()> {
    map(bands.chunks_mut(TOGETHER).collect(), ctx, f).into_iter().collect()
}

/// One pass of error feedback over all columns.
#[derive(Clone, Copy)]
struct Pass<'a> {
    levels: &'a Levels,
    blocks: &'a [Block],
    /// The group of each position.
    groups: &'a [usize],
    grid: &'a Grid,
    /// Whether all grids are known.
    fixed: bool,
    /// `1 / U_jj²`
    importance: &'a [f32],
    /// From which `(w − ŵ)² / U_jj²` on a weight is kept beside the codes.
    threshold: Option<f32>,
}

impl Pass<'_> {
    fn run(&self, bands: &mut [Band], ctx: &mut Context) -> Result<()> {
        for_each(bands, ctx, |bands| {
            for b in 0..self.blocks.len() {
                for band in &mut *bands {
                    self.block(band, b)?;
                }
            }
            Ok(())
        })
    }

    /// The columns of block `b`.
    fn block(&self, band: &mut Band, b: usize) -> Result<()> {
        let block = &self.blocks[b];
        let (start, end) = (block.start, block.end);
        let mut y = block.product(&band.d[..start]);
        let mut from = 0;
        while from < block.width() {
            let group = self.groups[start + from];
            let same = self.groups[start + from..end].iter().take_while(|g| **g == group).count();
            if !self.fixed && (start + from).is_multiple_of(self.grid.cols) {
                self.fit(band, b, from, &y)?;
            }
            let finite = Arch::new().dispatch(Run {
                levels: self.levels,
                grids: &band.grids[group],
                block,
                from,
                to: from + same,
                target: &band.target[start..end],
                d: &mut band.d[start..end],
                codes: &mut band.codes[start..end],
                y: &mut y,
                kept: &mut band.kept[start..end],
                extra: &mut band.extra[start..end],
                importance: &self.importance[start..end],
                threshold: self.threshold.unwrap_or(f32::INFINITY),
            });
            check_compensated(&finite, band, start + from)?;
            from += same;
        }
        Ok(())
    }

    /// Fits the group that begins with column `from` of block `b` to its compensated weights: what
    /// they would be if all of them were free.
    fn fit(&self, band: &mut Band, b: usize, from: usize, y: &[Lanes]) -> Result<()> {
        let first = self.blocks[b].start + from;
        let end = (first + self.grid.cols).min(self.groups.len());
        let mut free = Vec::with_capacity(end - first);
        for block in &self.blocks[b..] {
            if block.start >= end {
                break;
            }
            let from = first.max(block.start) - block.start;
            let to = end.min(block.end) - block.start;
            // Errors of the group's columns in earlier blocks are in their place meanwhile.
            let mut y =
                if free.is_empty() { y.to_vec() } else { block.product(&band.d[..block.start]) };
            let mut w = vec![[0.0; LANES]; to];
            Arch::new().dispatch(Free {
                block,
                from,
                to,
                target: &band.target[block.start..],
                d: &mut band.d[block.start..],
                y: &mut y,
                w: &mut w,
            });
            free.extend_from_slice(&w[from..]);
        }
        if let Some(threshold) = self.threshold {
            Arch::new().dispatch(LeaveOut {
                w: &mut free,
                importance: &self.importance[first..end],
                threshold,
                steps: f32::from(self.grid.scheme.dtype.max_code()),
            });
        }
        let group = self.groups[first];
        let mut values = vec![0.0; free.len()];
        for lane in 0..band.rows {
            for (value, lanes) in values.iter_mut().zip(&free) {
                *value = lanes[lane];
            }
            let fitted = self.levels.encoder.fit(&values, Some(&self.importance[first..end]));
            let params = fitted.map_err(|e| at_block(e, band.first + lane, first))?;
            band.exact[group].set(lane, self.grid.near_zero(params));
        }
        if self.grid.is_local {
            self.grid.round(band, group..group + 1)
        } else {
            band.grids[group] = band.exact[group];
            Ok(())
        }
    }
}

/// Refuses sums beyond f32, as [`Run`] and [`Descend`] give them from column `col` on.
fn check_compensated(finite: &Lanes, band: &Band, col: usize) -> Result<()> {
    match finite[..band.rows].iter().position(|finite| finite.is_nan()) {
        Some(lane) => {
            let (what, row) = ("compensated weight", band.first + lane);
            Err(Error::NotFinite { what, row, col })
        }
        None => Ok(()),
    }
}

/// The same error at the block that begins there.
pub(crate) fn at_block(error: Error, row: usize, col: usize) -> Error {
    match error {
        Error::ScaleOverflow { scale, format, .. } => {
            Error::ScaleOverflow { scale, format, row, col }
        }
        Error::ZeroOverflow { zero, format, .. } => Error::ZeroOverflow { zero, format, row, col },
        Error::NotFinite { .. } => Error::NotFinite { what: "compensated weight", row, col },
        other => other,
    }
}

/// What comes after the first pass: `tr(ΔW·H·ΔWᵀ)` made smaller with the grids or the codes held.
struct Sweeps<'a> {
    levels: &'a Levels,
    grid: &'a Grid,
    h: Arc<Descent>,
    groups: Vec<usize>,
}

/// A second moment as coordinate descent reads it.
pub(crate) struct Descent {
    /// `H_ic / H_cc` with damping, 0 for i = c inside a block.
    blocks: Vec<Block>,
    /// `H_cc` with damping.
    diagonal: Vec<f64>,
}

impl<'a> Sweeps<'a> {
    fn new(
        solver: &Solver<'_>,
        levels: &'a Levels,
        grid: &'a Grid,
        damping: f64,
        ctx: &mut Context,
    ) -> Result<Self> {
        let (k, hessian) = (solver.hessian.len(), solver.hessian);
        let sorted = solver.gptq.order == Order::Sorted;
        let h = solver.inputs.descent(hessian, (damping, sorted, grid.cols), || {
            let damped = hessian.damped(damping);
            let diagonal: Vec<_> = (0..k).map(|c| damped[solver.channel(c)]).collect();
            let blocks = map(blocks(k, grid.cols), ctx, |(start, end)| {
                Block::new(start, end, k, |i, c| {
                    if i == c {
                        return 1.0;
                    }
                    (hessian.at(solver.channel(i), solver.channel(c)) / diagonal[c]) as f32
                })
            });
            Descent { blocks, diagonal }
        })?;
        let groups = (0..k).map(|c| c / grid.cols).collect();
        Ok(Self { levels, grid, h, groups })
    }

    /// Codes by coordinate descent, from the last column to the first.
    fn descend(&self, bands: &mut [Band]) -> Result<()> {
        for block in self.h.blocks.iter().rev() {
            let (start, end) = (block.start, block.end);
            for band in &mut *bands {
                let mut y = block.product(&band.d);
                let finite = Arch::new().dispatch(Descend {
                    levels: self.levels,
                    grids: &band.grids,
                    group: &self.groups[start..end],
                    block,
                    target: &band.target[start..end],
                    d: &mut band.d[start..end],
                    codes: &mut band.codes[start..end],
                    y: &mut y,
                    kept: &band.kept[start..end],
                    extra: &mut band.extra[start..end],
                });
                check_compensated(&finite, band, start)?;
            }
        }
        Ok(())
    }

    /// The scales of each row by least squares under H, codes held: with `b = level − zero` in the
    /// columns of group g and 0 elsewhere as `B_g`, `M = B·H·Bᵀ` and `M·scale = B·H·target`. A row
    /// keeps its scales where the rounded new ones are not better.
    fn refit(&self, band: &mut Band) -> Result<()> {
        let (k, count) = (self.groups.len(), self.grid.across);
        let mut b = vec![[0.0; LANES]; k];
        let mut target = band.target.clone();
        for c in 0..k {
            let grids = &band.grids[self.groups[c]];
            for l in 0..LANES {
                let Params { zero, offset, .. } = grids.get(l);
                b[c][l] = self.levels.dtype.level(band.codes[c][l]) - zero;
                target[c][l] -= offset;
                if band.kept[c] >> l & 1 == 1 {
                    // It stays what it is.
                    (b[c][l], target[c][l]) = (0.0, band.d[c][l]);
                }
            }
        }
        // Of each lane, row-major over groups.
        let mut m = vec![[0.0_f64; LANES]; count * count];
        let mut rhs = vec![[0.0_f64; LANES]; count];
        for block in &self.h.blocks {
            let columns = block.start..block.end;
            let add = |y: &[Lanes], to: &mut [[f64; LANES]], stride: usize, at: usize| {
                for (c, y) in columns.clone().zip(y) {
                    let to = &mut to[self.groups[c] * stride + at];
                    for l in 0..LANES {
                        to[l] += f64::from(b[c][l]) * self.h.diagonal[c] * f64::from(y[l]);
                    }
                }
            };
            add(&block.product(&target), &mut rhs, 1, 0);
            for g in 0..count {
                let first = g * self.grid.cols;
                let end = k.min(first + self.grid.cols);
                add(&block.product_from(first, &b[first..end]), &mut m, count, g);
            }
        }
        let old = band.exact.clone();
        let mut solved = [false; LANES];
        for lane in 0..band.rows {
            let m: Vec<_> = m.iter().map(|lanes| lanes[lane]).collect();
            let rhs: Vec<_> = rhs.iter().map(|lanes| lanes[lane]).collect();
            let Some(scales) = solve(&m, &rhs) else { continue };
            let fits = |scale: &f64| scale.is_finite() && (*scale as f32).is_normal();
            if scales.iter().all(fits) {
                for (exact, scale) in band.exact.iter_mut().zip(&scales) {
                    let params = exact.get(lane);
                    exact.set(lane, Params { scale: *scale as f32, ..params });
                }
                solved[lane] = true;
            }
        }
        let before = band.grids.clone();
        if self.grid.round(band, 0..count).is_err() {
            // A scale that its format cannot hold.
            (band.exact, band.grids) = (old, before);
            return Ok(());
        }
        // `sᵀMs − 2·sᵀrhs` is the loss but for a constant.
        let mut keep = false;
        for lane in 0..band.rows {
            let loss = |grids: &[Grids]| {
                let mut loss = 0.0;
                for g in 0..count {
                    let mut sum = -2.0 * rhs[g][lane];
                    for h in 0..count {
                        sum += m[g * count + h][lane] * f64::from(grids[h].get(lane).scale);
                    }
                    loss += sum * f64::from(grids[g].get(lane).scale);
                }
                loss
            };
            if !solved[lane]
                || loss(&band.grids) > loss(&before)
                || band.grids.iter().any(|g| g.get(lane).scale == 0.0)
            {
                keep = true;
                for (exact, old) in band.exact.iter_mut().zip(&old) {
                    exact.set(lane, old.get(lane));
                }
            }
        }
        if keep {
            self.grid.round(band, 0..count)?;
        }
        for c in 0..k {
            let grids = &band.grids[self.groups[c]];
            for l in 0..LANES {
                let params = grids.get(l);
                let q = if band.kept[c] >> l & 1 == 1 {
                    let w = band.target[c][l] - band.d[c][l];
                    let (extra, q) = self.levels.keep(params, band.codes[c][l], w);
                    band.extra[c][l] = extra;
                    q
                } else {
                    params.real(self.levels.dtype.level(band.codes[c][l]))
                };
                band.d[c][l] = band.target[c][l] - q;
            }
        }
        Ok(())
    }
}

/// Solves `m·x = rhs` for a symmetric positive `m`, row-major; `None` if it is not that.
fn solve(m: &[f64], rhs: &[f64]) -> Option<Vec<f64>> {
    let n = rhs.len();
    let trace: f64 = (0..n).map(|i| m[i * n + i]).sum();
    let floor = 1e-7 * trace / n as f64;
    let mut l = m.to_vec();
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|t| l[i * n + t] * l[j * n + t]).sum();
            if i == j {
                let pivot = m[i * n + i] + floor - dot;
                if !(pivot > 0.0 && pivot.is_finite()) {
                    return None;
                }
                l[i * n + i] = pivot.sqrt();
            } else {
                l[i * n + j] = (0.5 * (m[i * n + j] + m[j * n + i]) - dot) / l[j * n + j];
            }
        }
    }
    let mut x = rhs.to_vec();
    for i in 0..n {
        let dot: f64 = (0..i).map(|t| l[i * n + t] * x[t]).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|t| l[t * n + i] * x[t]).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
    Some(x)
}
