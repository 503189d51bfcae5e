use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use faer::linalg::solvers::Llt;
use lowbit_core::{Context, Result, Transform};

use crate::{
    Calibration, drift,
    feedback::Block,
    gptq::{Descent, panels},
    hessian::Hessian,
};

/// The statistics of an input, and what is computed from them alone.
///
/// q, k and v of an attention share their input, as gate and up of an MLP do. GPTQ factors the second
/// moment of that input, `k³ / 3` operations for `k` channels, [`Drift`](crate::Drift) does so again, and a
/// rotation turns it. Layers that are quantized by
/// [`Quantizer::quantize_in_set`](crate::Quantizer::quantize_in_set) with one `InputSet` share all of it:
/// the first one computes it, the others find it. The result is that of
/// [`Quantizer::quantize`](crate::Quantizer::quantize), bit for bit.
///
/// Only the latest of each kind is kept, so that a set takes no more memory than a layer:
/// between layers `6·k²` bytes at most, and once more behind a rotation.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Gptq, InputSet, Quantizer};
/// use lowbit_core::{Context, Granularity, Mat, QuantScheme};
///
/// let ctx = &mut Context::new();
/// let x = Mat::from_fn(256, 64, |t, c| ((t * t + c) as f32).sin());
/// let mut calibration = Calibration::with_second_moment(64)?;
/// calibration.observe(x.as_ref(), ctx)?;
///
/// let [q, k] = [16, 8].map(|n| Mat::from_fn(n, 64, |r, c| ((r * 64 + c) as f32).sin()));
/// let gptq = Gptq::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)));
/// let inputs = InputSet::new(&calibration);
/// for w in [&q, &k] {
///     let shared = gptq.quantize_in_set(w.as_ref(), &inputs, ctx)?;
///     assert_eq!(shared, gptq.quantize(w.as_ref(), &calibration, ctx)?);
/// }
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub struct InputSet<'a> {
    calibration: Cow<'a, Calibration>,
    elimination: Latest<EliminationKey, Elimination>,
    descent: Latest<DescentKey, Descent>,
    transformed: Latest<Vec<Transform>, InputSet<'static>>,
    drift_factor: Latest<(), Option<Llt<f64>>>,
}

impl<'a> InputSet<'a> {
    /// Of layers whose inputs `calibration` has seen.
    pub fn new(calibration: &'a Calibration) -> Self {
        Self::of(Cow::Borrowed(calibration))
    }

    fn of(calibration: Cow<'a, Calibration>) -> Self {
        Self {
            calibration,
            elimination: Latest::default(),
            descent: Latest::default(),
            transformed: Latest::default(),
            drift_factor: Latest::default(),
        }
    }

    /// What is known of the input.
    pub fn calibration(&self) -> &Calibration {
        &self.calibration
    }

    /// The set of the input behind `transforms`.
    pub(crate) fn transformed(&self, transforms: &[Transform]) -> Result<Arc<InputSet<'static>>> {
        self.transformed.get(transforms.to_vec(), || {
            let mut calibration = self.calibration().clone();
            for transform in transforms {
                calibration.transform(transform)?;
            }
            Ok(InputSet::of(Cow::Owned(calibration)))
        })
    }

    /// The factor that [`Drift`](crate::Drift) solves with.
    pub(crate) fn drift_factor(&self, ctx: &mut Context) -> Result<Arc<Option<Llt<f64>>>> {
        self.drift_factor.get((), || drift::factor(self.calibration(), ctx))
    }

    /// The coefficients of error feedback over `hessian`, which is of this input.
    pub(crate) fn elimination(
        &self,
        hessian: &Hessian<'_>,
        damping: f64,
        group: usize,
        ctx: &mut Context,
    ) -> Result<Arc<Elimination>> {
        let numbers = [damping.to_bits(), hessian.shrinkage.to_bits()];
        self.elimination.get((hessian.act_order, numbers, group), || {
            let factor = hessian.factor(damping, ctx)?;
            Ok(Elimination {
                damping: factor.damping,
                importance: factor.diagonal().map(|r| (r * r) as f32).collect(),
                blocks: panels(&factor, group, ctx),
            })
        })
    }

    /// What coordinate descent over `hessian`, which is of this input, looks at; `make` computes it.
    pub(crate) fn descent(
        &self,
        hessian: &Hessian<'_>,
        (damping, sorted, group): (f64, bool, usize),
        make: impl FnOnce() -> Descent,
    ) -> Result<Arc<Descent>> {
        let numbers = [damping.to_bits(), hessian.shrinkage.to_bits()];
        self.descent.get((hessian.act_order, sorted, numbers, group), || Ok(make()))
    }
}

impl fmt::Debug for InputSet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InputSet")
            .field("tokens", &self.calibration.tokens())
            .field("in_features", &self.calibration.in_features())
            .finish_non_exhaustive()
    }
}

/// The factor of a second moment as error feedback reads it.
pub(crate) struct Elimination {
    /// What was needed for a factor to exist.
    pub(crate) damping: f64,
    /// `1 / U_jj²` at each position.
    pub(crate) importance: Vec<f32>,
    /// `R_ic / R_cc`
    pub(crate) blocks: Vec<Block>,
}

/// By falling diagonal; damping and shrinkage; columns of a block.
type EliminationKey = (bool, [u64; 2], usize);
/// By falling diagonal, and stored that way; damping and shrinkage; columns of a block.
type DescentKey = (bool, bool, [u64; 2], usize);

/// A value, and what it was computed for.
struct Latest<K, V>(Mutex<Option<(K, Arc<V>)>>);

impl<K, V> Default for Latest<K, V> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<K: PartialEq, V> Latest<K, V> {
    /// The value for `key`, made if it is not there. Nobody waits for it: two threads that look for the
    /// same value at the same time both make it, since a thread of a pool that waits could be the one that
    /// is waited for.
    fn get(&self, key: K, make: impl FnOnce() -> Result<V>) -> Result<Arc<V>> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = lock().as_ref().filter(|(known, _)| *known == key) {
            return Ok(value.clone());
        }
        // What is no longer of use makes room first.
        *lock() = None;
        let value = Arc::new(make()?);
        *lock() = Some((key, value.clone()));
        Ok(value)
    }
}
