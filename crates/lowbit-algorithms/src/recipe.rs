use lowbit_core::{
    ActivationScheme, Context, Error, Granularity::PerChannel, Mat, MatRef, Outliers, QuantScheme,
    Result, ScaleFormat, Transform, presets,
};

use crate::{
    Awq, Calibration, InputSet, LlmInt8, Needs, OutlierWeights, Plan, Quantized, Quantizer, Rtn,
    SmoothQuant,
};

/// A way to quantize a layer, put together from independent choices.
///
/// ```text
/// transform    scale of channels (SmoothQuant, AWQ), then a randomized Hadamard rotation
/// clipping     bounds for the weights (AWQ)
/// rounding     a Quantizer: its grid, how scales are stored, how codes are chosen, sparse outliers
/// activation   how inputs are quantized
/// outliers     features beside the quantized product (LLM.int8())
/// ```
///
/// Every method of this crate is a recipe, and any other combination is one too, but that a layer has one
/// kind of outliers: known features and single weights beside each other are refused. They are applied in
/// this order: each sees the weight and the statistics as those before it have left them.
///
/// A scale of channels is the same for all layers that share an input, and vanishes where the layer
/// before can take it: whoever quantizes a whole model asks for [`scales`](Self::scales) first and
/// quantizes without. Quantizing a layer alone keeps its scale as a [`Transform`] at run time.
///
/// # Example
/// SmoothQuant, then a rotation, then int8 weights and activations: no paper's method.
/// ```
/// use lowbit_algorithms::{Calibration, ChannelScale, Quantizer, Recipe, SmoothQuant};
/// use lowbit_core::{Context, Linear, Mat, Transform};
///
/// let recipe = Recipe {
///     scale: Some(ChannelScale::SmoothQuant(SmoothQuant::new(0.5))),
///     rotation: Some(1),
///     ..Recipe::W8A8
/// };
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let x = Mat::from_fn(8, 64, |r, c| if c == 5 { 60.0 } else { (r + c) as f32 % 3.0 });
/// let mut calibration = Calibration::new(64);
/// calibration.observe(x.as_ref(), &mut Context::new())?;
///
/// let layer = recipe.quantize(w.as_ref(), &calibration, &mut Context::new())?.layer;
/// assert!(matches!(layer.transforms(), [Transform::Scale(_), Transform::Hadamard { .. }]));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Recipe<'a> {
    /// A scale for each input channel.
    pub scale: Option<ChannelScale>,
    /// The seed of a [`Transform::hadamard`] behind it.
    pub rotation: Option<u64>,
    /// Bounds for the weights, by AWQ's search.
    pub clip: Option<Awq>,
    /// What makes codes of the weights.
    pub rounding: &'a dyn Quantizer,
    /// How inputs are quantized; `None` leaves that to `rounding`.
    pub activation: Option<ActivationScheme>,
    /// Features that are multiplied in 16 bits.
    pub outliers: Option<LlmInt8>,
}

/// A rule for the scale of each input channel.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a recipe is a constant, or copied once a layer")]
pub enum ChannelScale {
    /// For int8 activations.
    SmoothQuant(SmoothQuant),
    /// For weights of few bits.
    Awq(Awq),
}

impl Recipe<'static> {
    /// Int8 weights with a scale for each row, `max|w| / 127`: the rounding of the methods below.
    pub const INT8: Rtn = Rtn {
        scheme: QuantScheme {
            scale_format: ScaleFormat::F32,
            ..QuantScheme::symmetric(8, PerChannel)
        },
        fit: presets::awq_sym(8, PerChannel).1,
    };
    /// Int8 weights with a scale for each row, int8 activations with one for each token.
    pub const W8A8: Self = Self {
        activation: Some(ActivationScheme::INT8_PER_TOKEN),
        ..Recipe::rounding(&Self::INT8)
    };
    /// LLM.int8(): [`W8A8`](Self::W8A8) with outlier features in 16 bits.
    pub const LLM_INT8: Self = Self { outliers: Some(LlmInt8::PAPER), ..Self::W8A8 };
    /// SmoothQuant: [`W8A8`](Self::W8A8) behind scales of strength 0.5.
    pub const SMOOTHQUANT: Self =
        Self { scale: Some(ChannelScale::SmoothQuant(SmoothQuant::new(0.5))), ..Self::W8A8 };
}

impl<'a> Recipe<'a> {
    /// Nothing but `rounding`.
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::{Needs, Quantizer, Recipe, Rtn};
    /// use lowbit_core::{Granularity, QuantScheme};
    ///
    /// let int4 = Rtn::new(QuantScheme::symmetric(4, Granularity::PerGroup(32)));
    /// assert_eq!(Recipe::rounding(&int4).needs(), Needs::Nothing);
    /// ```
    pub const fn rounding(rounding: &'a dyn Quantizer) -> Self {
        let (scale, rotation, clip, activation, outliers) = (None, None, None, None, None);
        Self { scale, rotation, clip, rounding, activation, outliers }
    }

    /// The scale `s` for layers with these weights that share this input, and the strength it was made
    /// with: their weights become `W·diag(s)`, the input `x_j / s_j`. `None` if the recipe has none.
    ///
    /// # Errors
    /// Those of [`SmoothQuant::scales`] and [`Awq::scales`].
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::{Calibration, Recipe};
    /// use lowbit_core::{Context, Mat};
    ///
    /// let (q, k) = (Mat::from_fn(4, 2, |r, _| r as f32), Mat::from_fn(2, 2, |_, c| c as f32));
    /// let mut calibration = Calibration::new(2);
    /// calibration.observe(Mat::new(vec![1.0, 60.0], 1, 2)?.as_ref(), &mut Context::new())?;
    /// let weights = [q.as_ref(), k.as_ref()];
    /// let found = Recipe::SMOOTHQUANT.scales(&weights, &calibration, &mut Context::new())?;
    /// let (s, alpha) = found.unwrap();
    /// assert_eq!((s.len(), alpha), (2, 0.5));
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn scales(
        &self,
        weights: &[MatRef<'_, f32>],
        calibration: &Calibration,
        ctx: &mut Context,
    ) -> Result<Option<(Vec<f32>, f32)>> {
        match &self.scale {
            None => Ok(None),
            Some(ChannelScale::SmoothQuant(rule)) => rule.scales(weights, calibration).map(Some),
            Some(ChannelScale::Awq(rule)) => rule.scales(weights, calibration, ctx).map(Some),
        }
    }
}

impl Quantizer for Recipe<'_> {
    /// # Errors
    /// Those of its parts; [`Error::Unsupported`] for known outlier features behind a rotation, where the
    /// range of a feature is not known, and for outlier features beside a rounding that keeps outliers of
    /// its own, such as [`Spqr`](crate::Spqr) or another recipe.
    fn quantize_in_set(
        &self,
        w: MatRef<'_, f32>,
        inputs: &InputSet<'_>,
        ctx: &mut Context,
    ) -> Result<Quantized> {
        inputs.calibration().check(w.cols())?;
        if self.rotation.is_some()
            && self.outliers.is_some_and(|rule| rule.weights == OutlierWeights::F16)
        {
            let what = "outlier features of calibration behind a rotation".into();
            return Err(Error::Unsupported { by: "a recipe", what });
        }
        let two_kinds = || {
            let what = "outlier features beside a rounding that keeps outliers of its own: a layer holds one kind, leave one out";
            Error::Unsupported { by: "a recipe", what: what.into() }
        };
        if self.outliers.is_some() && self.rounding.has_outliers() {
            return Err(two_kinds());
        }
        let mut transforms = Vec::new();
        let mut alpha = None;
        if let Some((s, strength)) = self.scales(&[w], inputs.calibration(), ctx)? {
            transforms.push(Transform::Scale(s.iter().map(|s| 1.0 / s).collect()));
            alpha = Some(strength);
        }
        transforms.extend(self.rotation.map(|seed| Transform::hadamard(w.cols(), seed)));
        if transforms.is_empty() && self.clip.is_none() && self.outliers.is_none() {
            let mut quantized = self.rounding.quantize_in_set(w, inputs, ctx)?;
            if self.activation.is_some() {
                quantized.layer = quantized.layer.with_activation(self.activation);
            }
            return Ok(quantized);
        }

        let mut w = copy(w);
        for transform in &transforms {
            transform.apply_to_weight(&mut w)?;
        }
        let behind = match transforms[..] {
            [] => None,
            _ => Some(inputs.transformed(&transforms)?),
        };
        let inputs = behind.as_deref().unwrap_or(inputs);
        if let Some(clip) = &self.clip {
            clip.clip(&mut w, inputs.calibration(), ctx)?;
        }
        let Quantized { mut layer, mut report } =
            self.rounding.quantize_in_set(w.as_ref(), inputs, ctx)?;
        report.alpha = alpha.or(report.alpha);
        if self.activation.is_some() {
            layer = layer.with_activation(self.activation);
        }
        let own = layer.transforms().to_vec();
        if let Some(rule) = &self.outliers {
            if layer.outliers().is_some() {
                return Err(two_kinds());
            }
            // Rounding may have ordered the features anew.
            let mut calibration = inputs.calibration().clone();
            for transform in &own {
                transform.apply_to_weight(&mut w)?;
                calibration.transform(transform)?;
            }
            let outliers = rule.outliers(&w, &calibration)?;
            if let Outliers::Columns(known) = &outliers {
                report.outliers += known.weight().data().len();
            }
            layer = layer.with_outliers(Some(outliers))?;
        }
        transforms.extend(own);
        Ok(Quantized { layer: layer.with_transforms(transforms)?, report })
    }

    fn needs(&self) -> Needs {
        let scale = match &self.scale {
            None => Needs::Nothing,
            Some(ChannelScale::SmoothQuant(rule)) => rule.needs(),
            Some(ChannelScale::Awq(_)) => Needs::SecondMoment,
        };
        let clip = if self.clip.is_some() { Needs::SecondMoment } else { Needs::Nothing };
        let outliers = self.outliers.map_or(Needs::Nothing, |rule| rule.needs());
        self.rounding.needs().max(scale).max(clip).max(outliers)
    }

    fn plan(&self, out_features: usize, in_features: usize) -> Result<Plan> {
        let plan = self.rounding.plan(out_features, in_features)?;
        let scale = if self.scale.is_some() { 4 * in_features } else { 0 };
        let signs = if self.rotation.is_some() { in_features.div_ceil(8) } else { 0 };
        let needs = self.needs();
        let plan = Plan { bytes: plan.bytes + scale + signs, needs, ..plan };
        if scale + signs == 0 && self.clip.is_none() && self.outliers.is_none() {
            return Ok(plan);
        }
        // A copy of the weights, and of the statistics.
        let statistics = Calibration::bytes(in_features, needs == Needs::SecondMoment);
        let copy = plan.weights.saturating_mul(4);
        Ok(plan.with_more_memory(copy.saturating_add(statistics)))
    }

    fn has_outliers(&self) -> bool {
        self.outliers.is_some() || self.rounding.has_outliers()
    }

    fn target_share(&self) -> f64 {
        self.rounding.target_share()
    }
}

/// Do all weights have `k` columns?
pub(crate) fn check_widths(weights: &[MatRef<'_, f32>], k: usize) -> Result<()> {
    match weights.iter().find(|w| w.cols() != k) {
        Some(w) => Err(Error::Length { what: "calibration channels", expected: w.cols(), got: k }),
        None => Ok(()),
    }
}

fn copy(w: MatRef<'_, f32>) -> Mat<f32> {
    let mut to = Mat::zeros(w.rows(), w.cols());
    to.as_mut().iter_rows_mut().zip(w.iter_rows()).for_each(|(to, w)| to.copy_from_slice(w));
    to
}
