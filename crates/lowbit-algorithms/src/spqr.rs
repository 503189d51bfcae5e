//! SpQR: the few weights whose rounding costs most are kept in f16, beside codes in small groups whose
//! scales and zeros are quantized themselves.
//!
//! Dettmers et al., arXiv:2306.03078, sections 4.1 to 4.3. A weight's sensitivity is `(w − ŵ)² / U_jj²`.
//! In front of each group those are left out of its fit whose absence lowers the group's error by more
//! than the threshold; then, column by column as in GPTQ, those are kept whose own error is above it.
//! The threshold is in units of the mean over columns of `var(W_j) / U_jj²`.
//!
//! Deviations from the authors' code:
//!
//! * what is kept is the distance from the weight to the level of its code, in f16: added to the dense
//!   product as their kernels do, while their quantizer does not subtract it. Its rounding error goes
//!   to the columns behind it;
//! * a group of equal weights, and equal scales, are exact; theirs get the grid from −1 to 1;
//! * second-level steps and minima are rounded to f16 before the codes are chosen, not afterwards;
//! * damping counts a dead channel as GPTQ's does;
//! * any number of rows: the last 16 scales may be fewer.

use lowbit_core::{
    Base, Context, Error, Granularity, MatRef, QuantScheme, QuantType, Result, ScaleFormat,
    StepFormat, TwoLevel, ZeroFormat,
};

use crate::{
    Gptq, InputSet, Needs, Order, Plan, Quantized, Quantizer,
    feedback::{Band, LANES},
    gptq::{Solver, check_parameter, nearest},
};

/// SpQR: GPTQ with weights kept beside the codes.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Quantizer, Spqr};
/// use lowbit_core::{Context, Mat};
///
/// let ctx = &mut Context::new();
/// let mut w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32 * 0.7).sin());
/// w.data_mut()[5 * 64 + 20] = 30.0;
/// let x = Mat::from_fn(256, 64, |t, c| ((t * 7 + c) as f32 * 0.05).sin() + (t as f32).cos());
/// let mut calibration = Calibration::with_second_moment(64)?;
/// calibration.observe(x.as_ref(), ctx)?;
///
/// let q = Spqr::new(4).quantize(w.as_ref(), &calibration, ctx)?;
/// assert!(q.report.outliers > 0);
/// assert!((q.layer.effective_weight()?.data()[5 * 64 + 20] - 30.0).abs() < 1.0);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spqr {
    /// The codes: scheme, order, damping, and what comes after the first pass.
    pub rounding: Gptq,
    /// Which weights are kept beside them.
    pub outliers: OutlierRule,
}

/// Which weights [`Spqr`] keeps in f16.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum OutlierRule {
    /// Those whose sensitivity is more than so many times the mean of `var(W_j) / U_jj²`.
    Threshold(f64),
    /// About this share of them, 0 to 1: the threshold is searched for each layer, on some of its rows.
    Share(f64),
}

impl Spqr {
    /// The paper's near-lossless recipe with codes of `bits` bits: groups of 16, scales and zeros of 3
    /// bits over those of 16 rows, columns sorted, damping of 1, a threshold of 0.2.
    pub const fn new(bits: u8) -> Self {
        let statistics = ScaleFormat::TwoLevel(TwoLevel {
            dtype: QuantType::Int { bits: 3 },
            granularity: Granularity::PerBlock(16, 1),
            base: Base::Minimum,
            format: StepFormat::F16,
        });
        let scheme = QuantScheme {
            dtype: QuantType::Int { bits },
            granularity: Granularity::PerGroup(16),
            zero: ZeroFormat::Real(statistics),
            scale_format: statistics,
        };
        let rounding = Gptq { order: Order::Sorted, damping: 1.0, ..Gptq::new(scheme) };
        Self { rounding, outliers: OutlierRule::Threshold(0.2) }
    }
}

impl OutlierRule {
    fn check(self) -> Result<()> {
        match self {
            Self::Threshold(threshold) => check_parameter("outlier threshold", threshold),
            Self::Share(share) if (0.0..=1.0).contains(&share) => Ok(()),
            Self::Share(value) => {
                let (what, expected) = ("share of outliers", "0 to 1");
                Err(Error::Parameter { what, value, expected })
            }
        }
    }

    /// The threshold for sensitivities, whose mean is `unit`; `run` quantizes bands with one.
    pub(crate) fn threshold(
        self,
        unit: f64,
        bands: &[Band],
        k: usize,
        mut run: impl FnMut(&mut [Band], f32) -> Result<()>,
    ) -> Result<f32> {
        let share = match self {
            Self::Threshold(threshold) => return Ok((threshold * unit) as f32),
            Self::Share(share) => share,
        };
        // Some rows stand for all.
        let every = bands.len().div_ceil(8).max(1);
        let sample: Vec<_> = bands.iter().step_by(every).cloned().collect();
        let weights = sample.iter().map(|band| band.rows).sum::<usize>() * k;
        let wanted = share * weights as f64;
        let (mut low, mut high) = (1e-4_f64, 1e2_f64);
        for _ in 0..9 {
            // Outliers become fewer as the threshold rises.
            let middle = (low * high).sqrt();
            let mut bands = sample.clone();
            run(&mut bands, (middle * unit) as f32)?;
            let mut kept = 0;
            for band in &bands {
                let lanes = u32::MAX >> (LANES - band.rows);
                kept += band.kept.iter().map(|kept| (kept & lanes).count_ones()).sum::<u32>();
            }
            if f64::from(kept) > wanted {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(((low * high).sqrt() * unit) as f32)
    }
}

impl Quantizer for Spqr {
    /// # Errors
    /// Those of [`Gptq`]; [`Error::Parameter`] for an impossible threshold or share.
    fn quantize_in_set(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        ctx: &mut Context,
    ) -> Result<Quantized> {
        let gptq = &self.rounding;
        self.outliers.check()?;
        let Some(hessian) = gptq.hessian(w, inputs.calibration())? else {
            return nearest(w, gptq.scheme, &gptq.fit);
        };
        Solver { gptq, inputs, hessian: &hessian, outliers: Some(self.outliers) }.solve(w, ctx)
    }

    fn needs(&self) -> Needs {
        Needs::SecondMoment
    }

    /// [`Plan::bytes`] is an estimate: the number of outliers depends on the weights. As many are counted as
    /// the share says, or 1 % with a threshold. A layer whose inputs have no signal is rounded to nearest
    /// and has none.
    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        let plan = self.rounding.plan(out_features, in_features)?;
        let share = match self.outliers {
            OutlierRule::Share(share) => share,
            OutlierRule::Threshold(_) => 0.01,
        };
        // A value and a column each, and where each row begins.
        let outliers = (share * plan.weights as f64) as usize * (2 + 4);
        let bytes = plan.bytes + outliers + 4 * (out_features + 1);
        Ok(Plan { bytes, ..plan })
    }

    fn has_outliers(&self) -> bool {
        true
    }

    fn target_share(&self) -> f64 {
        self.rounding.target_share
    }
}
