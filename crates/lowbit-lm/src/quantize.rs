//! A whole model, block by block: each block is calibrated on what the quantized blocks before it give.
//!
//! ```text
//! residual stream of every calibration text, as the quantized blocks before have left it
//!   ├─ run the f32 block: statistics of the inputs of its four sets of layers
//!   ├─ scales of channels, folded into the layers before; the seven layers quantized
//!   └─ run the quantized block: the stream that the next block will see
//! ```
//!
//! In memory are one block in f32, its statistics, and the streams: `tokens · hidden_size` numbers. A
//! recipe that makes up for what earlier layers have lost ([`Quantizer::target_share`]) takes the streams of
//! the f32 model beside them.

use std::sync::Arc;

use lowbit::{
    Calibration, Context, Drift, InputSet, Linear, Mat, MatRef, Needs, QLinear, Quantized,
    Quantizer, Recipe, Report, Transform, relative_loss,
};

use crate::{
    Checkpoint, Config, DenseLinear, Error, LinearWeights, Model, Result, Unpacked, Windows,
    checkpoint::{LinearSpec, block_linears, block_norms},
    finished::{Finished, Kept, Key},
    kv::KvBlock,
    model::{Angles, Block, Layer, SETS, norms},
    rope::Rope,
};

/// How a whole model is quantized, beside the [`Recipe`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options<'a> {
    /// Calibrates each set of layers on what the quantized sets before it in the same block give: four
    /// runs of each block instead of one. Scales are then folded into norms only, since the layers before
    /// are quantized already.
    pub true_sequential: bool,
    /// Scales channels only where a layer before can take the scale, as files without a place for
    /// transforms of inputs need it. Otherwise the input is scaled at run time there.
    pub folded_scales_only: bool,
    /// Names of layers that stay as they are. Recipes that scale channels refuse them: the scales would
    /// have to be folded into them.
    pub left_out: &'a [String],
    /// Where to keep finished blocks, and to look for those of an interrupted run.
    pub finished: Option<Finished<'a>>,
}

/// What was done to one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerReport {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its weights.
    pub weights: usize,
    /// [`QLinear::bytes`].
    pub bytes: usize,
    /// `tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ)`, the relative squared error of its outputs on the calibration texts
    /// with exact activations; `None` if nothing needed the second moment H.
    pub error: Option<f64>,
    /// [`relative_error`] of its weights, those that scales have been folded into.
    pub weight_error: f64,
    /// Whether its input is scaled at run time, since no layer before it could take the scale.
    pub scaled_at_run_time: bool,
    /// What the method decided.
    pub report: Report,
}

/// Quantizes the linear layers of `checkpoint` by `recipe`, on statistics of the texts `windows`, which a
/// recipe that needs none can do without.
///
/// `make` turns each quantized layer into what will compute it, such as a
/// [`PackedLinear`](lowbit::PackedLinear). `progress` is called after each layer with its report. Scales
/// of channels go into the norm before (q, k, v; gate, up), into the rows of up (down), and into those of
/// v (o) where every query has its own key; elsewhere the input is scaled at run time.
///
/// # Errors
/// [`Error::File`] and [`Error::Io`] for a folder of finished blocks that is of another run or cannot be
/// written; [`Error::Invalid`] if `checkpoint` is not that of `model`; [`Error::Layer`] with what the recipe or
/// `make` returned; those of [`Model::forward`]. The model is not changed.
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use std::sync::Arc;
/// use lowbit::{Context, PackedLinear, Recipe};
/// use lowbit_lm::{Checkpoint, Model, Windows, quantize};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let windows = Windows::from_tokens(checkpoint.config(), "a text", "1 403 407 261 378 432")?;
/// let model = Model::load(&checkpoint)?;
/// let quantized = quantize::quantize(
///     &model, &checkpoint, &Recipe::SMOOTHQUANT, Some(&windows), quantize::Options::default(),
///     &mut Context::new(),
///     |layer| Ok(Arc::new(PackedLinear::new(layer)?)),
///     |report| println!("{}: alpha {:?}", report.name, report.report.alpha),
/// )?;
/// # let _ = quantized;
/// # Ok(())
/// # }
/// ```
#[allow(clippy::too_many_arguments, reason = "what to quantize, how, and two callbacks")]
pub fn quantize(
    model: &Model,
    checkpoint: &Checkpoint,
    recipe: &Recipe<'_>,
    windows: Option<&Windows>,
    options: Options<'_>,
    ctx: &mut Context,
    mut make: impl FnMut(&QLinear) -> lowbit::Result<Arc<dyn Linear>>,
    mut progress: impl FnMut(&LayerReport),
) -> Result<Model> {
    model.check_checkpoint(checkpoint)?;
    let mut run = Quantization::new(checkpoint, recipe, windows, options)?;
    let mut blocks = Vec::new();
    while let Some(block) = run.next_block(ctx, &mut make, &mut progress)? {
        blocks.push(block.computed);
    }
    Ok(model.with_blocks(blocks))
}

/// `‖W − Ŵ‖ / ‖W‖`, for the [weights](QLinear::effective_weight) Ŵ that a layer computes with; 0 for
/// weights that are all 0.
///
/// # Errors
/// [`lowbit::Error::Shape`] if `layer` is of another shape.
///
/// # Example
/// ```
/// use lowbit::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_lm::quantize::relative_error;
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let int8 = QuantScheme::symmetric(8, Granularity::PerChannel);
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), int8)?);
/// assert!(relative_error(w.as_ref(), &layer)? < 0.01);
/// # Ok::<(), lowbit::Error>(())
/// ```
pub fn relative_error(w: MatRef<'_, f32>, layer: &QLinear) -> lowbit::Result<f64> {
    /// Rows that are dequantized at a time: few enough to stay in the cache, and in memory that the system
    /// has cleared once.
    const BAND: usize = 64;
    let (expected, got) = (w.shape(), (layer.out_features(), layer.in_features()));
    if expected != got {
        return Err(lowbit::Error::Shape { what: "quantized weight", expected, got });
    }
    let mut sums = ErrorSums::default();
    let weight = layer.weight();
    let plain = layer.transforms().is_empty()
        && layer.outliers().is_none()
        && layer.adapter().is_none()
        && weight.scale_grid().is_none(); // opened for every row, it would take longer
    if plain {
        let ids: Vec<u32> = (0..w.rows() as u32).collect();
        for (ids, band) in ids.chunks(BAND).zip((0..w.rows()).step_by(BAND)) {
            let mut computed = Mat::zeros(ids.len(), w.cols());
            weight.dequantize_rows(ids, computed.as_mut())?;
            for (row, computed) in (band..).zip(computed.as_ref().iter_rows()) {
                sums.add(w.row(row).unwrap_or(&[]), computed);
            }
        }
    } else {
        let computed = layer.effective_weight()?;
        for (w, computed) in w.iter_rows().zip(computed.as_ref().iter_rows()) {
            sums.add(w, computed);
        }
    }
    Ok(sums.relative())
}

/// `Σ (w − ŵ)²` and `Σ w²`, in sums side by side, so that none waits for the one before.
#[derive(Default)]
struct ErrorSums {
    error: [f64; 8],
    norm: [f64; 8],
}

impl ErrorSums {
    fn add(&mut self, w: &[f32], computed: &[f32]) {
        for (w, computed) in w.chunks(self.error.len()).zip(computed.chunks(self.error.len())) {
            for (i, (&w, &computed)) in w.iter().zip(computed).enumerate() {
                let difference = f64::from(w - computed);
                self.error[i] += difference * difference;
                self.norm[i] += f64::from(w) * f64::from(w);
            }
        }
    }

    fn relative(&self) -> f64 {
        let (error, norm): (f64, f64) = (self.error.iter().sum(), self.norm.iter().sum());
        if norm == 0.0 { 0.0 } else { (error / norm).sqrt() }
    }
}

/// A checkpoint that is quantized block by block, without ever being in memory as a whole.
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use std::sync::Arc;
/// use lowbit::{Context, PackedLinear, Recipe};
/// use lowbit_lm::{Checkpoint, Windows, quantize::{Options, Quantization}};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let windows = Windows::from_tokens(checkpoint.config(), "a text", "1 403 407 261 378 432")?;
/// let (recipe, options) = (Recipe::SMOOTHQUANT, Options::default());
/// let mut run = Quantization::new(&checkpoint, &recipe, Some(&windows), options)?;
/// println!("{} bytes of memory", run.memory(1)?);
/// let make = |layer: &lowbit::QLinear| Ok(Arc::new(PackedLinear::new(layer)?) as _);
/// while let Some(block) = run.next_block(&mut Context::new(), make, |_| ())? {
///     for (layer, report) in &block.layers {
///         println!("{}: {} bytes", report.name, layer.bytes());
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Quantization<'a> {
    checkpoint: &'a Checkpoint,
    recipe: &'a Recipe<'a>,
    options: Options<'a>,
    wanted: Wanted,
    rope: Rope,
    texts: Vec<Text>,
    /// What all blocks depend on, for those that are kept.
    key: Key,
    next: usize,
}

/// What a block has become.
pub struct QuantizedBlock {
    /// The gains before attention and before the MLP under the names of their tensors; scales of channels
    /// have been folded into them.
    pub norms: [(String, Vec<f32>); 2],
    /// q, k, v, o, gate, up and down, but for those that are left out.
    pub layers: Vec<(QLinear, LayerReport)>,
    computed: Block,
}

impl QuantizedBlock {
    /// The layers that the reference computes where the blocks behind are calibrated, as `make` made them.
    pub fn unpacked(&self) -> Vec<Unpacked> {
        let layers = self.computed.layers.iter();
        layers.filter_map(|layer| Unpacked::of(&layer.name, &*layer.linear)).collect()
    }
}

impl<'a> Quantization<'a> {
    /// The arguments are those of [`quantize`].
    ///
    /// # Errors
    /// [`Error::Token`] if `windows` are of another model; [`Error::Invalid`] for layers that are left out
    /// beside a recipe that scales channels.
    pub fn new(
        checkpoint: &'a Checkpoint,
        recipe: &'a Recipe<'a>,
        windows: Option<&Windows>,
        options: Options<'a>,
    ) -> Result<Self> {
        if recipe.scale.is_some() && !options.left_out.is_empty() {
            return Err(Error::Invalid(
                "layers cannot be left out where scales of channels are folded into their neighbours: \
                 choose a method without scales of channels, such as gptq"
                    .into(),
            ));
        }
        let wanted = Wanted { needs: recipe.needs(), share: recipe.target_share() };
        let mut texts = Vec::new();
        if wanted.needs > Needs::Nothing {
            for tokens in windows.iter().flat_map(|windows| windows.iter()) {
                texts.push(Text::new(checkpoint, tokens, wanted.share > 0.0)?);
            }
        }
        let mut key = Key::EMPTY;
        if let Some(finished) = &options.finished {
            key.add(finished.label.bytes().map(u32::from));
            key.add([options.true_sequential, options.folded_scales_only].map(u32::from));
            key.add(options.left_out.iter().flat_map(|name| name.bytes().map(u32::from)));
            key.add(windows.iter().flat_map(|windows| windows.iter()).flatten().copied());
        }
        let rope = Rope::new(checkpoint.config());
        Ok(Self { checkpoint, recipe, options, wanted, rope, texts, key, next: 0 })
    }

    /// Bytes of memory that the largest block will take on so many threads, with its statistics and the streams
    /// of all texts: an estimate from above. The mapped files, and what is done with the results, are not counted.
    ///
    /// # Errors
    /// [`Error::Layer`] for a scheme that is impossible.
    pub fn memory(&self, threads: usize) -> Result<u64> {
        let c = self.checkpoint.config();
        let number = |x: usize| 4 * x as u64;
        let texts = || self.texts.iter().map(|text| text.tokens);
        let with_f32 = self.wanted.share > 0.0;
        // While a block runs: norm, q, k, v, attention and output, or gate, up and output; and what it
        // shows of the f32 model.
        let wide = 3 * c.hidden_size + 2 * c.q_size() + 4 * c.kv_size() + 2 * c.intermediate_size;
        let shown = 6 * c.hidden_size + c.q_size() + c.intermediate_size;
        let longest = texts().max().unwrap_or(0);
        let mut memory =
            number(texts().sum::<usize>() * c.hidden_size * (1 + usize::from(with_f32)));
        memory += number(longest * (c.hidden_size + wide + if with_f32 { shown } else { 0 }));

        let specs = block_linears(c, 0);
        let mut busiest = 0;
        for LinearSpec { name, shape: (n, k), .. } in &specs {
            let plan = self.recipe.plan(*n, *k);
            let plan = plan.map_err(|cause| Error::Layer { layer: name.clone(), cause })?;
            // Loaded, transposed for the f32 block, and perhaps shifted; stored and packed.
            memory += number(n * k * (2 + usize::from(with_f32))) + 3 * plan.bytes as u64;
            // Beside what the method takes: the error of its result.
            busiest = busiest.max(plan.memory_on(threads) + number(2 * n * k));
        }
        let mut largest = 0;
        let mut all = 0;
        for set in SETS {
            let (n, k) = specs[set.start].shape;
            let second = self.wanted.needs == Needs::SecondMoment;
            let mut bytes = lowbit::Calibration::bytes(k, second);
            if with_f32 {
                let residual = if set.len() == 1 { n } else { 0 };
                bytes += 2 * number(k * (k + residual));
            }
            largest = largest.max(bytes);
            all += bytes;
        }
        Ok(memory + busiest + if self.options.true_sequential { largest } else { all })
    }

    /// The next block; `None` after the last one. `make` and `progress` as in [`quantize`].
    ///
    /// # Errors
    /// As [`quantize`].
    pub fn next_block(
        &mut self,
        ctx: &mut Context,
        mut make: impl FnMut(&QLinear) -> lowbit::Result<Arc<dyn Linear>>,
        mut progress: impl FnMut(&LayerReport),
    ) -> Result<Option<QuantizedBlock>> {
        let (index, blocks) = (self.next, self.checkpoint.config().num_hidden_layers);
        if index >= blocks {
            return Ok(None);
        }
        let mut work = Work::load(self.checkpoint, index)?;
        let dense = work.dense()?;
        let mut block = dense.clone();
        let mut key = self.key;
        if self.options.finished.is_some() {
            key.add(work.weights.iter().flat_map(|w| w.weight.data()).map(|w| w.to_bits()));
        }
        let quantized = |i: &usize| !self.is_left_out(&work, *i);
        let quantized: Vec<_> = (0..work.specs.len()).filter(quantized).collect();
        let names: Vec<_> = quantized.iter().map(|&i| work.specs[i].name.as_str()).collect();
        let kept = match &self.options.finished {
            Some(finished) => finished.read(index, &names, key.0)?,
            None => None,
        };
        let kept = match kept {
            Some(kept) => {
                for (&i, (layer, report)) in quantized.iter().zip(&kept.layers) {
                    block.layers[i] = work.layer(i, make(layer))?;
                    progress(report);
                }
                block.norms = Arc::new(kept.norms.clone());
                kept
            }
            None => {
                let layers = self.layers(&mut work, &dense, &mut block, ctx, make, progress)?;
                let kept = Kept { norms: work.norms, layers };
                if let Some(finished) = &self.options.finished {
                    finished.write(index, &kept, key.0)?;
                }
                kept
            }
        };
        // Nobody looks at what the last block gives.
        if index + 1 < blocks {
            for text in &mut self.texts {
                text.advance(self.checkpoint.config(), &self.rope, &dense, &block, ctx)?;
            }
        }
        self.next += 1;
        self.checkpoint.tensors().release();
        let [attention, mlp] = block_norms(index);
        let [norm, other] = kept.norms;
        let norms = [(attention, norm), (mlp, other)];
        Ok(Some(QuantizedBlock { norms, layers: kept.layers, computed: block }))
    }

    fn is_left_out(&self, work: &Work, i: usize) -> bool {
        self.options.left_out.contains(&work.specs[i].name)
    }

    /// Quantizes the layers of a block, each into its place in `block`.
    fn layers(
        &self,
        work: &mut Work,
        dense: &Block,
        block: &mut Block,
        ctx: &mut Context,
        mut make: impl FnMut(&QLinear) -> lowbit::Result<Arc<dyn Linear>>,
        mut progress: impl FnMut(&LayerReport),
    ) -> Result<Vec<(QLinear, LayerReport)>> {
        let mut layers = Vec::new();
        let together = if self.options.true_sequential { 1 } else { SETS.len() };
        for group in (0..SETS.len()).step_by(together).map(|first| first..first + together) {
            let mut statistics = self.observe(work, dense, block, group.clone(), ctx)?;
            for (seen, set) in statistics.iter().zip(group.clone()) {
                work.shift(set, seen, self.wanted.share, ctx)?;
            }
            let mut leftover = [const { None }; 4];
            for (seen, set) in statistics.iter_mut().zip(group.clone()) {
                // Layers that are quantized already take no scale; queries that share a key, and so a
                // row of v, would need several.
                let folded = match SETS_BEFORE[set] {
                    Some(before) => group.contains(&before) && !(set == 1 && work.shared_keys),
                    None => true,
                };
                if folded || !self.options.folded_scales_only {
                    leftover[set] =
                        work.scale(self.recipe, set, &mut seen.calibration, folded, ctx)?;
                }
            }
            // What no layer before can take is scaled at run time; the rest has vanished.
            let recipe = Recipe { scale: None, ..*self.recipe };
            for (seen, set) in statistics.iter().zip(group.clone()) {
                let inputs = InputSet::new(&seen.calibration);
                for i in SETS[set].clone().filter(|&i| !self.is_left_out(work, i)) {
                    let before = leftover[set].clone();
                    let (layer, report) = work.quantize(&recipe, i, &inputs, before, ctx)?;
                    block.layers[i] = work.layer(i, make(&layer))?;
                    progress(&report);
                    layers.push((layer, report));
                }
            }
            // Scales have been folded into them.
            block.norms = Arc::new(work.norms.clone());
        }
        Ok(layers)
    }

    /// Statistics of the inputs of some sets, in the block as it is now and in the f32 one.
    fn observe(
        &self,
        work: &Work,
        dense: &Block,
        block: &Block,
        sets: std::ops::Range<usize>,
        ctx: &mut Context,
    ) -> Result<Vec<Statistics>> {
        let mut statistics = Vec::new();
        for set in sets.clone() {
            let first = SETS[set].start;
            let (n, k) = work.specs[first].shape;
            let new = || {
                let calibration = match self.wanted.needs {
                    Needs::SecondMoment => Calibration::with_second_moment(k)?,
                    _ => Calibration::new(k),
                };
                // o and down are added to the residual stream.
                let residual = SETS_BEFORE[set].map(|_| n);
                let drift = match self.wanted.share > 0.0 {
                    true => Some(Drift::new(k, residual)?),
                    false => None,
                };
                Ok(Statistics { calibration, drift })
            };
            statistics.push(new().map_err(work.error(first))?);
        }
        // The block has the other one while it shows its inputs.
        let mut own = ctx.pool().map_or_else(Context::new, |pool| Context::with_pool(pool.clone()));
        let c = self.checkpoint.config();
        for text in &self.texts {
            let mut x = text.x.clone();
            let angles = Angles::new(&self.rope, 0, text.tokens);
            let inputs = text.f32_inputs(c, &angles, dense, ctx)?;
            let kv = &mut KvBlock::default();
            block.run(c, &mut x, &angles, kv, ctx, &mut |seen| {
                let Some(statistics) = statistics.get_mut(seen.set.wrapping_sub(sets.start)) else {
                    return Ok(());
                };
                let mut add = || {
                    statistics.calibration.observe(seen.x, &mut own)?;
                    let Some(drift) = &mut statistics.drift else { return Ok(()) };
                    let Some((x_f32, residual_f32)) = inputs.get(seen.set) else { return Ok(()) };
                    let (m, k) = seen.x.shape();
                    let lost = residual_f32.iter().zip(seen.residual).map(|(f32, x)| f32 - x);
                    let lost = SETS_BEFORE[seen.set].map(|_| lost.collect::<Vec<f32>>());
                    let lost = lost.as_ref().map(|lost| MatRef::new(lost, m, lost.len() / m));
                    drift.observe(seen.x, MatRef::new(x_f32, m, k)?, lost.transpose()?, &mut own)
                };
                add().map_err(work.error(SETS[seen.set].start))
            })?;
        }
        Ok(statistics)
    }
}

/// The set whose layers can take a scale of another set's input; `None` for a norm.
const SETS_BEFORE: [Option<usize>; 4] = [None, Some(0), None, Some(2)];

/// What a recipe wants to know.
#[derive(Clone, Copy)]
struct Wanted {
    needs: Needs,
    /// Of what earlier layers have lost: see [`Quantizer::target_share`].
    share: f64,
}

/// Statistics of the input of a set of layers.
struct Statistics {
    calibration: Calibration,
    drift: Option<Drift>,
}

/// The residual stream of a calibration text.
struct Text {
    x: Vec<f32>,
    /// That of the f32 model, if anyone wants to know.
    x_f32: Option<Vec<f32>>,
    tokens: usize,
}

impl Text {
    fn new(checkpoint: &Checkpoint, tokens: &[u32], with_f32: bool) -> Result<Self> {
        let x = checkpoint.embed(tokens)?;
        Ok(Self { x_f32: with_f32.then(|| x.clone()), x, tokens: tokens.len() })
    }

    fn advance(
        &mut self,
        c: &Config,
        rope: &Rope,
        dense: &Block,
        block: &Block,
        ctx: &mut Context,
    ) -> Result<()> {
        let angles = Angles::new(rope, 0, self.tokens);
        for (block, x) in [(block, Some(&mut self.x)), (dense, self.x_f32.as_mut())] {
            let Some(x) = x else { continue };
            block.run(c, x, &angles, &mut KvBlock::default(), ctx, &mut |_| Ok(()))?;
        }
        Ok(())
    }

    /// The inputs of the four sets in the f32 model, and the residual stream at each.
    fn f32_inputs(
        &self,
        c: &Config,
        angles: &Angles,
        dense: &Block,
        ctx: &mut Context,
    ) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
        let Some(x) = &self.x_f32 else { return Ok(Vec::new()) };
        let mut x = x.clone();
        let mut inputs = Vec::new();
        dense.run(c, &mut x, angles, &mut KvBlock::default(), ctx, &mut |seen| {
            inputs.push((seen.x.data().to_vec(), seen.residual.to_vec()));
            Ok(())
        })?;
        Ok(inputs)
    }
}

/// A block on its way from f32 to codes.
struct Work {
    specs: [LinearSpec; 7],
    norms: [Vec<f32>; 2],
    /// With the scales that were folded into them.
    weights: Vec<LinearWeights>,
    /// What to quantize instead, if that makes up for what earlier layers have lost.
    targets: [Option<Mat<f32>>; 7],
    /// Strengths of the scales of the sets.
    alphas: [Option<f32>; 4],
    /// Queries that share a key: v cannot take o's scale then.
    shared_keys: bool,
}

impl Work {
    fn load(checkpoint: &Checkpoint, index: usize) -> Result<Self> {
        let c = checkpoint.config();
        let specs = block_linears(c, index);
        let weights =
            specs.iter().map(|spec| checkpoint.linear(&spec.name)).collect::<Result<_>>()?;
        let shared_keys = c.num_attention_heads != c.num_key_value_heads;
        Ok(Self {
            norms: norms(checkpoint, index)?,
            specs,
            weights,
            targets: [const { None }; 7],
            alphas: [None; 4],
            shared_keys,
        })
    }

    fn error(&self, i: usize) -> impl Fn(lowbit::Error) -> Error + use<> {
        let layer = self.weights[i].name.clone();
        move |cause| Error::Layer { layer: layer.clone(), cause }
    }

    /// Layer `i`, computed by `linear`.
    fn layer(&self, i: usize, linear: lowbit::Result<Arc<dyn Linear>>) -> Result<Layer> {
        let LinearSpec { name, shape, .. } = &self.specs[i];
        Layer::new(name.clone(), *shape, linear.map_err(self.error(i))?)
    }

    fn dense(&self) -> Result<Block> {
        let layer = |(i, LinearWeights { weight, bias, .. }): (usize, &LinearWeights)| {
            let dense = DenseLinear::new(weight.as_ref(), bias.clone());
            self.layer(i, dense.map(|dense| Arc::new(dense) as Arc<dyn Linear>))
        };
        let layers = self.weights.iter().enumerate().map(layer).collect::<Result<_>>()?;
        Block::new(Arc::new(self.norms.clone()), layers)
    }

    /// Moves the targets of a set towards the output of the f32 model.
    fn shift(
        &mut self,
        set: usize,
        Statistics { calibration, drift }: &Statistics,
        share: f64,
        ctx: &mut Context,
    ) -> Result<()> {
        let Some(drift) = drift else { return Ok(()) };
        let inputs = InputSet::new(calibration);
        for i in SETS[set].clone() {
            let shifted = drift.shift(self.weights[i].weight.as_ref(), &inputs, share, ctx);
            self.targets[i] = Some(shifted.map_err(self.error(i))?);
        }
        Ok(())
    }

    /// Scales the input of a set, and returns what has to be done at run time.
    fn scale(
        &mut self,
        recipe: &Recipe<'_>,
        set: usize,
        calibration: &mut Calibration,
        folded: bool,
        ctx: &mut Context,
    ) -> Result<Option<Transform>> {
        if recipe.scale.is_none() {
            return Ok(None);
        }
        let layers = SETS[set].clone();
        let error = self.error(layers.start);
        let weights: Vec<_> =
            self.weights[layers.clone()].iter().map(|layer| layer.weight.as_ref()).collect();
        let Some((s, alpha)) = recipe.scales(&weights, calibration, ctx).map_err(&error)? else {
            return Ok(None);
        };
        self.alphas[set] = Some(alpha);
        let scale = Transform::Scale(s.iter().map(|s| 1.0 / s).collect());
        for i in layers {
            scale.apply_to_weight(&mut self.weights[i].weight).map_err(&error)?;
            if let Some(target) = &mut self.targets[i] {
                scale.apply_to_weight(target).map_err(&error)?;
            }
        }
        calibration.transform(&scale).map_err(&error)?;
        let Transform::Scale(inverse) = &scale else { return Ok(None) };
        match set {
            0 | 2 => {
                let gains = &mut self.norms[set / 2];
                gains.iter_mut().zip(inverse).for_each(|(gain, inverse)| *gain *= inverse);
            }
            1 if folded => self.scale_rows(2, inverse),
            3 if folded => self.scale_rows(5, inverse),
            _ => return Ok(Some(scale)),
        }
        Ok(None)
    }

    /// Scales the outputs of layer `i`.
    fn scale_rows(&mut self, i: usize, factors: &[f32]) {
        let LinearWeights { weight, bias, .. } = &mut self.weights[i];
        for matrix in [Some(weight), self.targets[i].as_mut()].into_iter().flatten() {
            for (row, factor) in matrix.as_mut().iter_rows_mut().zip(factors) {
                row.iter_mut().for_each(|w| *w *= factor);
            }
        }
        for (bias, factor) in bias.iter_mut().flatten().zip(factors) {
            *bias *= factor;
        }
    }

    /// Quantizes layer `i`, behind what has to be done at run time.
    fn quantize(
        &self,
        recipe: &Recipe<'_>,
        i: usize,
        inputs: &InputSet<'_>,
        before: Option<Transform>,
        ctx: &mut Context,
    ) -> Result<(QLinear, LayerReport)> {
        let LinearWeights { name, weight, bias } = &self.weights[i];
        let set = SETS.iter().position(|set| set.contains(&i)).unwrap_or(0);
        let calibration = inputs.calibration();
        let quantize = |ctx: &mut Context| {
            let target = self.targets[i].as_ref().unwrap_or(weight);
            let Quantized { layer, mut report } =
                recipe.quantize_in_set(target.as_ref(), inputs, ctx)?;
            report.alpha = self.alphas[set];
            let error = match calibration.has_second_moment() && calibration.tokens() > 0 {
                true => Some(relative_loss(weight.as_ref(), &layer, calibration, ctx)?),
                false => None,
            };
            let weight_error = relative_error(weight.as_ref(), &layer)?;
            let scaled_at_run_time = before.is_some();
            let transforms = before.into_iter().chain(layer.transforms().iter().cloned()).collect();
            let layer = layer.with_transforms(transforms)?.with_bias(bias.clone())?;
            let (weights, bytes, name) = (weight.data().len(), layer.bytes(), name.clone());
            let report = LayerReport {
                name,
                weights,
                bytes,
                error,
                weight_error,
                scaled_at_run_time,
                report,
            };
            Ok((layer, report))
        };
        quantize(ctx).map_err(self.error(i))
    }
}
