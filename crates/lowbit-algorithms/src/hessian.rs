//! The second moment made ready for error feedback: scaled, without dead channels, in the order of
//! elimination, damped and factored.
//!
//! GPTQ (arXiv:2210.17323, section 3.3) takes `U` with `H⁻¹ = UᵀU`, U upper triangular, and gives the
//! error of column j to the columns behind it by `U[j, j:]`. The same updates, gathered at the
//! column that receives them, need no inverse (QuIP, arXiv:2307.13304, theorem 6): with `H = R·Rᵀ`,
//! R upper triangular, hence `U = R⁻¹`,
//!
//! ```text
//! w'_c = w_c + Σ_{i<c} (w_i − q_i)·a_ic      a_ic = R_ic / R_cc
//! ```
//!
//! and `1 / U_jj = R_jj`. R is the Cholesky factor of H with rows and columns reversed.

use faer::{
    Auto, MatMut, Par, Spec,
    dyn_stack::{MemBuffer, MemStack},
    linalg::cholesky::llt::factor::{
        LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
    },
};
use lowbit_core::{Context, Error, Result};

use crate::{Calibration, feedback::map, second_moment::row_start};

/// `2·H / tokens` in the order of elimination, with 1 on the diagonal of dead channels.
pub(crate) struct Hessian<'a> {
    triangle: &'a [f64],
    scale: f64,
    /// Whether the order is that of the diagonal, the largest first.
    pub(crate) act_order: bool,
    /// The channel at each position.
    pub(crate) order: Vec<usize>,
    /// By channel.
    pub(crate) diagonal: Vec<f64>,
    pub(crate) dead: Vec<bool>,
    /// What each element of the diagonal is larger by in factors and sweeps, as a share of itself.
    pub(crate) shrinkage: f64,
}

/// R of `H + shrinkage·diag H + damping·mean(diag H)·I = R·Rᵀ`.
pub(crate) struct Factor {
    /// Column-major, lower triangle, with rows and columns reversed.
    r: Vec<f64>,
    k: usize,
    /// What was needed for a factor to exist.
    pub(crate) damping: f64,
}

impl<'a> Hessian<'a> {
    /// Channels in their own order, or with `act_order` by falling diagonal (ties in their own
    /// order).
    pub(crate) fn new(calibration: &'a Calibration, act_order: bool) -> Result<Self> {
        let k = calibration.in_features();
        calibration.check_seen(k)?;
        let Some(triangle) = &calibration.triangle else {
            let what = "the second moment: make it by Calibration::with_second_moment".into();
            return Err(Error::Unsupported { by: "this calibration", what });
        };
        let scale = 2.0 / calibration.tokens() as f64;
        let mut diagonal: Vec<_> =
            (0..k).filter_map(|j| Some(triangle[row_start(j)? + j] * scale)).collect();
        let dead: Vec<_> = diagonal.iter().map(|&x| x == 0.0).collect();
        for (x, _) in diagonal.iter_mut().zip(&dead).filter(|(_, dead)| **dead) {
            *x = 1.0;
        }
        let mut order: Vec<_> = (0..k).collect();
        if act_order {
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        Ok(Self { triangle, scale, act_order, order, diagonal, dead, shrinkage: 0.0 })
    }

    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether no channel has a signal.
    pub(crate) fn is_zero(&self) -> bool {
        self.dead.iter().all(|dead| *dead)
    }

    /// Element of two channels, without damping.
    pub(crate) fn at(&self, a: usize, b: usize) -> f64 {
        if a == b {
            return self.diagonal[a];
        }
        let (row, col) = (a.max(b), a.min(b));
        // The number of elements of a triangle that exists fits.
        row_start(row).map_or(0.0, |start| self.triangle[start + col] * self.scale)
    }

    /// The diagonal as it is factored, by channel. A dead channel has nothing to do with the others.
    pub(crate) fn damped(&self, damping: f64) -> Vec<f64> {
        let added = damping * self.diagonal.iter().sum::<f64>() / self.len().max(1) as f64;
        let damped = |(&x, &dead): (&f64, &bool)| match dead {
            true => x,
            false => x * (1.0 + self.shrinkage) + added,
        };
        self.diagonal.iter().zip(&self.dead).map(damped).collect()
    }

    /// Factors with at least so much `damping`: ten times more each time it fails.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no memory for it.
    pub(crate) fn factor(&self, damping: f64, ctx: &mut Context) -> Result<Factor> {
        let k = self.len();
        let too_large = || Error::TooLarge { rows: k, cols: k };
        let len = k.checked_mul(k).ok_or_else(too_large)?;
        // Is there so much memory? Its upper half is never written, and pages of zeros need none.
        Vec::<f64>::new().try_reserve_exact(len).map_err(|_| too_large())?;
        let mut r = vec![0.0; len];
        let mut damping = damping;
        // With many times the mean on its diagonal any H has a factor.
        while damping < 1e9 {
            let damped = self.damped(damping);
            // The lower triangle, column-major, of H with rows and columns reversed.
            let columns = r.chunks_exact_mut(k.max(1)).enumerate().collect();
            map(columns, ctx, |(q, column)| {
                let channel = self.order[k - 1 - q];
                for (r, x) in column.iter_mut().enumerate().skip(q) {
                    *x = self.at(self.order[k - 1 - r], channel);
                }
                column[q] = damped[channel];
            });
            if cholesky(&mut r, k, ctx)? {
                return Ok(Factor { r, k, damping });
            }
            damping = if damping > 0.0 { damping * 10.0 } else { 1e-10 };
        }
        let expected = "a share with which the second moment has a factor";
        Err(Error::Parameter { what: "damping", value: damping, expected })
    }
}

impl Factor {
    pub(crate) fn len(&self) -> usize {
        self.k
    }

    /// `R_ic`, i at most c: positions.
    pub(crate) fn at(&self, i: usize, c: usize) -> f64 {
        self.r[self.r.len() - 1 - (c * self.k + i)]
    }

    /// `R_cc = 1 / U_cc` at each position.
    pub(crate) fn diagonal(&self) -> impl Iterator<Item = f64> {
        (0..self.k).map(|c| self.at(c, c))
    }
}

/// Factors the column-major lower triangle of `a` in place; whether all pivots are positive.
fn cholesky(a: &mut [f64], k: usize, ctx: &mut Context) -> Result<bool> {
    let mut factor = |par: Par| -> Result<bool> {
        let a = MatMut::from_row_major_slice_mut(&mut *a, k, k).transpose_mut();
        // Twice as wide as faer's own: 5 % less time at k = 11008.
        let params = Spec::new(LltParams { block_size: 256, ..Auto::<f64>::auto() });
        let scratch = cholesky_in_place_scratch::<f64>(k, par, params);
        let memory = MemBuffer::try_new(scratch);
        let mut memory = memory.map_err(|_| Error::TooLarge { rows: k, cols: k })?;
        let stack = MemStack::new(&mut memory);
        let no_floor = LltRegularization::default();
        Ok(cholesky_in_place(a, no_floor, par, stack, params).is_ok())
    };
    // The bits do not depend on the number of threads: there is a test.
    let ok = match ctx.pool().filter(|pool| pool.current_num_threads() > 1) {
        Some(pool) => pool.install(|| factor(Par::rayon(pool.current_num_threads()))),
        None => factor(Par::Seq),
    }?;
    Ok(ok && (0..k).all(|c| a[c * k + c].is_finite() && a[c * k + c] > 0.0))
}
