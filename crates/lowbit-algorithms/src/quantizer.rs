use lowbit_core::{Context, MatRef, QLinear, QuantScheme, Result};

use crate::{Calibration, InputSet};

/// Turns weights and statistics of their inputs into a quantized layer.
///
/// A pure function of its operands: any layer can be quantized anywhere, in any order, and the
/// threads of the context do not change a bit of the result.
///
/// # Example
/// ```
/// use lowbit_algorithms::{Calibration, Needs, Quantizer, Rtn};
/// use lowbit_core::{Context, Granularity, Mat, QuantScheme};
///
/// let rtn = Rtn::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)));
/// assert_eq!(rtn.needs(), Needs::Nothing);
/// assert_eq!(rtn.plan(4096, 4096)?.bits_per_weight(), 4.5);
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let quantized = rtn.quantize(w.as_ref(), &Calibration::new(64), &mut Context::new())?;
/// assert_eq!(quantized.layer.bytes(), rtn.plan(16, 64)?.bytes);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub trait Quantizer: Send + Sync {
    /// Quantizes `w`, the `(out_features, in_features)` weight of a linear layer whose inputs
    /// `calibration` has seen. The result has no bias; see [`QLinear::with_bias`].
    ///
    /// # Errors
    /// [`Error::NotFinite`](lowbit_core::Error::NotFinite) at the first NaN or infinity of `w`,
    /// [`Error::Length`](lowbit_core::Error::Length) if `calibration` is of another width, and
    /// what the method itself documents.
    fn quantize(
        &self,
        w: MatRef<'_, f32>,
        calibration: &Calibration,
        ctx: &mut Context,
    ) -> Result<Quantized> {
        self.quantize_in_set(w, &InputSet::new(calibration), ctx)
    }

    /// The same for one of several layers that share an input: what depends on the input alone is
    /// computed once for all of them.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize).
    fn quantize_in_set(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        ctx: &mut Context,
    ) -> Result<Quantized>;

    /// Which statistics [`quantize`](Self::quantize) looks at.
    fn needs(&self) -> Needs;

    /// What quantizing an `out_features × in_features` layer will store and take.
    ///
    /// # Errors
    /// Those of an impossible scheme; [`Error::TooLarge`](lowbit_core::Error::TooLarge).
    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan>;

    /// May the layers that it makes have [outliers](lowbit_core::Outliers)? A layer holds one kind of
    /// them: a [`Recipe`](crate::Recipe) refuses to add another before it does any work.
    fn has_outliers(&self) -> bool {
        false
    }

    /// Which part, 0 to 1, of what the inputs have lost in the layers before this one the layer is
    /// meant to make up for: whoever has its [`Drift`](crate::Drift) hands over the weight of
    /// [`Drift::shift`](crate::Drift::shift) instead of its own.
    fn target_share(&self) -> f64 {
        0.0
    }
}

/// What a method that needs statistics does with a layer whose calibration has seen no tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Uncalibrated {
    /// [`Error::Empty`](lowbit_core::Error::Empty).
    #[default]
    Error,
    /// Rounds it to nearest, and says so in [`Report::fallback`].
    Nearest,
}

impl Uncalibrated {
    /// Whether to round to nearest; also where there are no weights.
    pub(crate) fn is_nearest(self, w: MatRef<'_, f32>, calibration: &Calibration) -> Result<bool> {
        calibration.check(w.cols())?;
        if w.rows() == 0 || w.cols() == 0 || self == Self::Nearest && calibration.tokens() == 0 {
            return Ok(true);
        }
        calibration.check_seen(w.cols())?;
        Ok(false)
    }
}

/// The statistics of a [`Calibration`] that a method looks at; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Needs {
    /// None: an empty calibration of the right width will do.
    Nothing,
    /// Those of each channel.
    Channels,
    /// The second moment, [`Calibration::second_moment`].
    SecondMoment,
}

/// A layer, and how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// What is stored and computed with.
    pub layer: QLinear,
    /// What happened on the way.
    pub report: Report,
}

impl From<QLinear> for Quantized {
    /// Nothing happened that the layer does not say.
    fn from(layer: QLinear) -> Self {
        Self { layer, report: Report::default() }
    }
}

/// What a method decided for one layer, as far as the layer itself does not say it.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// What was added to the diagonal of the second moment, as a share of its mean.
    pub damping: Option<f64>,
    /// The strength of the channel scale: α of SmoothQuant and AWQ.
    pub alpha: Option<f32>,
    /// Input channels without a signal: their weights became 0.
    pub dead_columns: usize,
    /// Weights that are kept beside the quantized ones.
    pub outliers: usize,
    /// Whether the layer was rounded to nearest because nothing is known of its inputs.
    pub fallback: bool,
}

/// What quantizing a layer will store and take, known before anything is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Weights of the layer.
    pub weights: u64,
    /// Bytes stored for them: [`QLinear::bytes`]. An estimate where the number of outliers depends
    /// on the weights.
    pub bytes: usize,
    /// Bytes of memory taken while it is quantized on one thread, the weights, the calibration and the
    /// buffers that linear algebra keeps for a thread (64 MiB, hardly touched by small layers) not included. See [`memory_on`](Self::memory_on) for more threads.
    pub memory: u64,
    /// Of these, what is taken beside the threads' own memory where they have the most.
    pub shared: u64,
    /// What each thread takes for itself then.
    pub each_thread: u64,
    /// How many threads find work at the same time then, at most.
    pub most_threads: usize,
    /// The statistics that are looked at.
    pub needs: Needs,
}

impl Plan {
    /// Of weights in `scheme` that are rounded as they come.
    pub(crate) fn of(scheme: QuantScheme, n: usize, k: usize, needs: Needs) -> Result<Self> {
        let bytes = scheme.bytes(n, k)?;
        let weights = (n as u64).saturating_mul(k as u64);
        let memory = bytes as u64;
        Ok(Self { weights, bytes, memory, shared: memory, each_thread: 0, most_threads: 1, needs })
    }

    /// With so many bytes more, whatever the threads do.
    pub(crate) fn with_more_memory(self, bytes: u64) -> Self {
        let more = |x: u64| x.saturating_add(bytes);
        Self { memory: more(self.memory), shared: more(self.shared), ..self }
    }

    /// Bytes of memory taken while the layer is quantized on so many threads.
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::{Obq, Quantizer};
    /// use lowbit_core::{Granularity, QuantScheme};
    ///
    /// // Each thread has a copy of the inverse second moment.
    /// let plan = Obq::new(QuantScheme::affine(4, Granularity::PerChannel)).plan(64, 512)?;
    /// assert_eq!(plan.memory_on(8) - plan.memory_on(4), 4 * 512 * 512 * 8);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn memory_on(&self, threads: usize) -> u64 {
        let own = self.each_thread.saturating_mul(threads.min(self.most_threads) as u64);
        self.memory.max(self.shared.saturating_add(own))
    }

    /// Stored bits over the number of weights; 0 for a layer without any.
    pub fn bits_per_weight(&self) -> f64 {
        if self.weights == 0 { 0.0 } else { self.bytes as f64 * 8.0 / self.weights as f64 }
    }

    /// Bytes of the [`Calibration`] of a layer with `in_features` inputs.
    pub fn calibration_bytes(&self, in_features: usize) -> u64 {
        match self.needs {
            Needs::Nothing => 0,
            Needs::Channels => Calibration::bytes(in_features, false),
            Needs::SecondMoment => Calibration::bytes(in_features, true),
        }
    }
}
