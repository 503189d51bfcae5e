//! The door for algorithms that choose codes themselves.

use alloc::{vec, vec::Vec};

use lowbit_dtypes::{pack, packed_len};

use crate::{
    Division, Error, Fit, Mat, Params, QMatrix, QuantScheme, Result, Rounding, ScaleFormat,
    ZeroFormat,
    fit::{Grid, Plan},
    qmatrix::Layout,
    quantize::search_block,
    range,
};

/// Grids and codes one block at a time, as [`QMatrix::quantize_with`] makes them for a whole matrix:
/// for algorithms that change weights on the way, such as GPTQ.
///
/// # Example
/// ```
/// use lowbit_core::{BlockParams, Encoder, Fit, Granularity, QMatrix, QuantScheme};
///
/// // Error diffusion along a row: what rounding has taken away is added to the next weight.
/// let w = [0.1_f32, 0.13, 0.2, -0.9, 0.33, 0.0];
/// let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(3));
/// let encoder = Encoder::new(scheme, &Fit::NEAREST)?;
/// let (mut codes, mut params, mut rest) = (vec![], vec![], 0.0);
/// for group in w.chunks(3) {
///     let p = encoder.fit(group, None)?;
///     for x in group {
///         let code = encoder.code(p, x + rest);
///         rest += x - encoder.real(p, code);
///         codes.push(code);
///     }
///     params.push(p);
/// }
/// let params = BlockParams::round(scheme, 1, 6, &params)?; // stored as they are: `fit` rounds them
/// let q = QMatrix::from_codes(&params, &codes)?;
/// assert!((q.dequantize().data().iter().sum::<f32>() - w.iter().sum::<f32>()).abs() < 0.1);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Encoder {
    plan: Plan,
}

impl Encoder {
    /// For blocks of `scheme`; its granularity does not matter.
    ///
    /// # Errors
    /// Those of [`QMatrix::quantize_with`] for an impossible scheme or fit. [`Error::Unsupported`] for
    /// [`Rounding::Stochastic`], since a weight alone has no place from which its random bits could come,
    /// and for [`Division::ExactReciprocal`], since parameters do not say what the scale was before it was
    /// rounded.
    pub fn new(scheme: QuantScheme, fit: &Fit) -> Result<Self> {
        scheme.check()?;
        fit.check(scheme)?;
        let refuse = |what: &str| Err(Error::Unsupported { by: "an encoder", what: what.into() });
        if let Rounding::Stochastic { .. } = fit.rounding {
            return refuse(
                "stochastic rounding, which needs the place of each weight; choose another rounding, or round to nearest without error feedback",
            );
        }
        if fit.division == Division::ExactReciprocal {
            return refuse(
                "division by a scale before it is rounded, which codes chosen one by one do not know; choose Division::Stored",
            );
        }
        Ok(Self { plan: Plan::new(scheme, fit) })
    }

    /// Scale and zero for the weights of a block, rounded to their formats; two-level ones, which
    /// depend on other blocks, are left to [`BlockParams::round`]. `importance` weighs the error of
    /// [`Range::Search`](crate::Range::Search), a number for each of `values`.
    ///
    /// # Errors
    /// [`Error::Empty`] without values; [`Error::NotFinite`] at the first NaN or infinity,
    /// [`Error::Length`] for another number of importances, [`Error::ScaleOverflow`] and
    /// [`Error::ZeroOverflow`].
    pub fn fit(&self, values: &[f32], importance: Option<&[f32]>) -> Result<Params> {
        if let Some(importance) = importance
            && importance.len() != values.len()
        {
            let (expected, got) = (values.len(), importance.len());
            return Err(Error::Length { what: "importance", expected, got });
        }
        let whole = range::min_max(values)?;
        let plan = &self.plan;
        let scheme = plan.scheme;
        let (range, extreme) = if plan.is_min_max() {
            (whole, whole.1)
        } else {
            search_block(plan, values, whole, importance)?
        };
        let scale = plan.exact_scale(range, extreme);
        let grid = plan.grid(range, scale, scheme.scale_format.round(scale));
        if plan.reaches_infinity(&grid) {
            let Params { zero, offset, .. } = grid.params;
            return Err(match scheme.zero.real() {
                Some(format) if !(zero.is_finite() && offset.is_finite()) => {
                    let zero = if offset.is_finite() { zero } else { range.0 };
                    Error::ZeroOverflow { zero, format: format.name(), row: 0, col: 0 }
                }
                _ => {
                    let format = scheme.scale_format.name();
                    Error::ScaleOverflow { scale, format, row: 0, col: 0 }
                }
            });
        }
        Ok(grid.params)
    }

    /// The code of the level nearest to `x`.
    #[inline]
    pub fn code(&self, params: Params, x: f32) -> u8 {
        let mut code = [0];
        self.codes(params, &[x], &mut code);
        code[0]
    }

    /// [`code`](Self::code) of each of `x`, as many as there is room for.
    #[inline]
    pub fn codes(&self, params: Params, x: &[f32], codes: &mut [u8]) {
        let len = x.len().min(codes.len());
        self.plan.encode(&Grid::of(params), &x[..len], &mut codes[..len], 0);
    }

    /// The number that a code stands for.
    #[inline]
    pub fn real(&self, params: Params, code: u8) -> f32 {
        params.real(self.plan.scheme.dtype.level(code))
    }
}

/// The scales and zeros of a whole matrix as they are stored.
///
/// # Example
/// See [`Encoder`].
#[derive(Clone, Debug, PartialEq)]
pub struct BlockParams {
    rows: usize,
    cols: usize,
    scheme: QuantScheme,
    params: Vec<Params>,
    scales: Vec<u8>,
    zeros: Option<Vec<u8>>,
}

impl BlockParams {
    /// Rounds the parameters of all blocks of an `(rows, cols)` matrix, row-major over the grid of
    /// blocks, to the formats of `scheme`. What is representable already stays as it is, except
    /// that two-level scales and zeros are quantized, each grid as a matrix.
    ///
    /// # Errors
    /// Those of [`QMatrix::quantize`] for an impossible scheme, [`Error::Length`] for another number
    /// of blocks, [`Error::NotFinite`] at the first block with a parameter that is not finite,
    /// [`Error::Parameter`] for an integer zero that is no code, [`Error::ScaleOverflow`], also for a scale
    /// whose outermost level is beyond f32, and [`Error::ZeroOverflow`].
    pub fn round(scheme: QuantScheme, rows: usize, cols: usize, params: &[Params]) -> Result<Self> {
        scheme.check()?;
        let layout = Layout::new(rows, cols, scheme)?;
        let (grid_rows, grid_cols) = layout.grid;
        let (expected, got) = (grid_rows * grid_cols, params.len());
        if expected != got {
            return Err(Error::Length { what: "blocks", expected, got });
        }
        let place = |at: usize| {
            let (block_rows, block_cols) = layout.block;
            (at / grid_cols * block_rows, at % grid_cols * block_cols)
        };
        for (at, Params { scale, zero, offset }) in params.iter().enumerate() {
            let (row, col) = place(at);
            if !(scale.is_finite() && zero.is_finite() && offset.is_finite()) {
                return Err(Error::NotFinite { what: "scale or zero", row, col });
            }
            let code = *zero as u8;
            if scheme.zero == ZeroFormat::Int
                && (f32::from(code) != *zero || code > scheme.dtype.max_code())
            {
                let (what, value) = ("integer zero", f64::from(*zero));
                return Err(Error::Parameter { what, value, expected: "a code of the type" });
            }
        }
        let exact = params;
        let mut params = params.to_vec();
        let mut store = |format: ScaleFormat, field: fn(&mut Params) -> &mut f32| {
            let exact = params.iter_mut().map(|p| *field(p)).collect();
            let (rounded, bytes) = format.round_grid(Mat::new(exact, grid_rows, grid_cols)?)?;
            let mut overflow = None;
            for (at, (params, &rounded)) in params.iter_mut().zip(rounded.data()).enumerate() {
                let exact = core::mem::replace(field(params), rounded);
                if !rounded.is_finite() && overflow.is_none() {
                    overflow = Some((exact, format.name(), place(at)));
                }
            }
            Ok::<_, Error>((bytes, overflow))
        };
        let (scales, overflow) = store(scheme.scale_format, |p| &mut p.scale)?;
        if let Some((scale, format, (row, col))) = overflow {
            return Err(Error::ScaleOverflow { scale, format, row, col });
        }
        let real = match scheme.zero {
            ZeroFormat::Real(format) => Some(store(format, |p| &mut p.zero)?),
            ZeroFormat::Offset(format) => Some(store(format, |p| &mut p.offset)?),
            _ => None,
        };
        let zeros = match scheme.zero {
            ZeroFormat::None | ZeroFormat::Midpoint => None,
            ZeroFormat::Real(_) | ZeroFormat::Offset(_) => match real {
                Some((_, Some((zero, format, (row, col))))) => {
                    return Err(Error::ZeroOverflow { zero, format, row, col });
                }
                real => real.map(|(bytes, _)| bytes),
            },
            ZeroFormat::Int => {
                let bits = u32::from(scheme.dtype.bits());
                let stride = packed_len(grid_cols, bits);
                let mut zeros = vec![0; layout.zeros];
                let codes: Vec<u8> = params.iter().map(|p| p.zero as u8).collect();
                for r in 0..grid_rows {
                    let row = &codes[r * grid_cols..][..grid_cols];
                    pack(bits, row, &mut zeros[r * stride..][..stride])?;
                }
                Some(zeros)
            }
        };
        for p in &mut params {
            match scheme.zero {
                ZeroFormat::None => (p.zero, p.offset) = (0.0, 0.0),
                ZeroFormat::Midpoint => (p.zero, p.offset) = (f32::from(scheme.midpoint()), 0.0),
                ZeroFormat::Int | ZeroFormat::Real(_) => p.offset = 0.0,
                ZeroFormat::Offset(_) => p.zero = 0.0,
            }
        }
        let plan = Plan::new(scheme, &Fit::NEAREST);
        if let Some(at) = params.iter().position(|p| plan.reaches_infinity(&Grid::of(*p))) {
            let (scale, format, (row, col)) =
                (exact[at].scale, scheme.scale_format.name(), place(at));
            return Err(Error::ScaleOverflow { scale, format, row, col });
        }
        Ok(Self { rows, cols, scheme, params, scales, zeros })
    }

    /// What will be read back for each block, row-major over the grid of blocks.
    pub fn params(&self) -> &[Params] {
        &self.params
    }
}

impl<S: AsRef<[u8]>> From<&QMatrix<S>> for BlockParams {
    /// Those of a matrix, for other codes.
    fn from(q: &QMatrix<S>) -> Self {
        let (grid_rows, grid_cols) = q.grid();
        let blocks = (0..grid_rows * grid_cols).map(|at| (at / grid_cols, at % grid_cols));
        Self {
            rows: q.rows(),
            cols: q.cols(),
            scheme: q.scheme(),
            params: blocks.map(|(row, col)| q.params(row, col)).collect(),
            scales: q.scales().to_vec(),
            zeros: q.zeros().map(<[u8]>::to_vec),
        }
    }
}

impl QMatrix {
    /// A matrix of codes that were chosen elsewhere, `codes` one a byte and row-major.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of codes; [`Error::OutOfRange`] for one that is too
    /// large.
    pub fn from_codes(params: &BlockParams, codes: &[u8]) -> Result<Self> {
        let BlockParams { rows, cols, scheme, ref scales, ref zeros, .. } = *params;
        let layout = Layout::new(rows, cols, scheme)?;
        let (expected, got) = (rows * cols, codes.len());
        if expected != got {
            return Err(Error::Length { what: "codes", expected, got });
        }
        let max = scheme.dtype.max_code();
        if let Some(&code) = codes.iter().find(|code| **code > max) {
            let (max, got) = (i64::from(max), i64::from(code));
            return Err(Error::OutOfRange { what: "code", min: 0, max, got });
        }
        let bits = u32::from(scheme.dtype.bits());
        let mut packed = vec![0; layout.codes];
        if cols > 0 {
            for (codes, packed) in codes.chunks(cols).zip(packed.chunks_mut(layout.stride)) {
                pack(bits, codes, packed)?;
            }
        }
        Ok(Self::assemble(rows, cols, scheme, packed, scales.clone(), zeros.clone()))
    }
}
