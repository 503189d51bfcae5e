use std::sync::Arc;

use lowbit::{Context, Linear, Mat, MatMut, MatRef, PackedLinear, dtypes::random, forward_shared};

use crate::{
    Checkpoint, Config, DenseLinear, Error, KvCache, LinearWeights, Result, Unpacked,
    checkpoint::{EMBEDDING, HEAD, LinearSpec, NORM, block_linears, block_norms},
    kv::KvBlock,
    ops,
    pack::pack,
    rope::Rope,
};

/// A decoder of the Llama family. In each block, with `norm` for RMSNorm:
///
/// ```text
/// h = norm(x)    x += o(attention(rope(q(h)), rope(k(h)), v(h)))
/// h = norm(x)    x += down(silu(gate(h)) · up(h))
/// ```
///
/// The seven linear layers of a block are any [`Linear`]; embedding, norms and head are f32 and
/// shared by all models made from one another with [`with_linears`](Self::with_linears).
///
/// # Example
/// See the [crate].
pub struct Model {
    trunk: Arc<Trunk>,
    blocks: Vec<Block>,
}

/// What swapping linear layers leaves alone.
struct Trunk {
    config: Config,
    embedding: Mat<f32>,
    norm: Vec<f32>,
    head: DenseLinear,
    rope: Rope,
}

/// The linear layers of a block, and the gains before attention and before the MLP.
#[derive(Clone)]
pub(crate) struct Block {
    pub(crate) norms: Arc<[Vec<f32>; 2]>,
    /// q, k, v, o, gate, up and down.
    pub(crate) layers: [Layer; 7],
}

#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) linear: Arc<dyn Linear>,
}

/// The layers of a block that share an input: q, k and v; o; gate and up; down.
pub(crate) const SETS: [std::ops::Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

/// Sine and cosine of the rotary embeddings, `(tokens, head_dim / 2)`, from token `past` on.
pub(crate) struct Angles {
    past: usize,
    sin: Vec<f32>,
    cos: Vec<f32>,
}

impl Angles {
    /// Those of `m` tokens from `past` on.
    pub(crate) fn new(rope: &Rope, past: usize, m: usize) -> Self {
        let angle = |p| rope.frequencies.iter().map(move |f| p as f32 * f);
        let both = |angle: f32| (angle.sin() * rope.scale, angle.cos() * rope.scale);
        let (sin, cos) = (past..past + m).flat_map(angle).map(both).unzip();
        Self { past, sin, cos }
    }
}

/// What a block shows of itself while it computes.
pub(crate) struct Seen<'a> {
    /// Index of [`SETS`]: the layers that are about to get `x`.
    pub(crate) set: usize,
    pub(crate) layers: &'a [Layer],
    pub(crate) x: MatRef<'a, f32>,
    /// The residual stream so far.
    pub(crate) residual: &'a [f32],
}

type Observer<'a> = &'a mut (dyn FnMut(Seen<'_>) -> Result<()> + Send);

impl Model {
    /// Reads the whole model into memory: layers that are quantized as they are, all others in f32.
    ///
    /// Quantized layers that no kernel takes are [`unpacked`](Self::unpacked).
    ///
    /// # Errors
    /// None for a checkpoint whose files have not changed since it was opened.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let trunk = Arc::new(Trunk::load(checkpoint)?);
        let make = |LinearSpec { name, .. }: &LinearSpec| {
            let error = |cause| Error::Layer { layer: name.clone(), cause };
            match checkpoint.quantized(name)? {
                None => dense(checkpoint.linear(name)?).map_err(error),
                Some(layer) => pack(&layer).map_err(error),
            }
        };
        Ok(Self { trunk, blocks: blocks(checkpoint.config(), all_norms(checkpoint)?, make)? })
    }

    /// Reads the model, with linear layers that `make` builds from their weights: called for each
    /// layer in the order of [`Checkpoint::linear_names`], with one layer's f32 weights in memory
    /// at a time.
    ///
    /// # Errors
    /// [`Error::Layer`] with what `make` returned, [`Error::LayerShape`] if its layer does not fit.
    pub fn load_with(
        checkpoint: &Checkpoint,
        make: impl FnMut(LinearWeights) -> lowbit::Result<Arc<dyn Linear>>,
    ) -> Result<Self> {
        let trunk = Arc::new(Trunk::load(checkpoint)?);
        let norms = all_norms(checkpoint)?;
        Ok(Self {
            trunk,
            blocks: blocks(checkpoint.config(), norms, from_weights(checkpoint, make))?,
        })
    }

    /// A model of this shape that nobody has trained, to measure speed with: weights are uniform random
    /// numbers of variance 1 / in_features, the same every time, norms are 1. Linear layers are built as in
    /// [`load_with`](Self::load_with), and have no bias.
    ///
    /// # Errors
    /// As [`load_with`](Self::load_with).
    ///
    /// # Example
    /// ```
    /// use std::sync::Arc;
    /// use lowbit::{Context, QLinear, QMatrix, QuantScheme, Granularity};
    /// use lowbit_lm::{Config, KvCache, Model};
    ///
    /// let config = Config::parse("config.json", br#"{
    ///     "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    ///     "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    ///     "max_position_embeddings": 16
    /// }"#)?;
    /// let int8 = QuantScheme::symmetric(8, Granularity::PerChannel);
    /// let model = Model::random(config, |layer| {
    ///     Ok(Arc::new(QLinear::new(QMatrix::quantize(layer.weight.as_ref(), int8)?)))
    /// })?;
    /// let mut cache = KvCache::new(model.config());
    /// let logits = model.forward_last(&[1, 2, 3], &mut cache, &mut Context::new())?;
    /// assert!(logits.iter().all(|x| x.is_finite()));
    /// # Ok::<(), lowbit_lm::Error>(())
    /// ```
    pub fn random(
        config: Config,
        mut make: impl FnMut(LinearWeights) -> lowbit::Result<Arc<dyn Linear>>,
    ) -> Result<Self> {
        let mut seed = 0;
        let mut weight = |rows, cols| {
            seed += 1;
            noise(rows, cols, seed)
        };
        let c = &config;
        let embedding = weight(c.vocab_size, c.hidden_size);
        let head = match c.tie_word_embeddings {
            true => None,
            false => Some(weight(c.vocab_size, c.hidden_size)),
        };
        let random = |spec: &LinearSpec| {
            let weight = weight(spec.shape.0, spec.shape.1);
            let name = spec.name.clone();
            make(LinearWeights { name: name.clone(), weight, bias: None })
                .map_err(|cause| Error::Layer { layer: name, cause })
        };
        let norm = vec![1.0; c.hidden_size];
        let shared = Arc::new([norm.clone(), norm.clone()]);
        let norms = (0..c.num_hidden_layers).map(|_| shared.clone()).collect();
        let blocks = blocks(c, norms, random)?;
        let trunk = Trunk::new(config, embedding, head, norm)?;
        Ok(Self { trunk: Arc::new(trunk), blocks })
    }

    /// This model with other blocks.
    pub(crate) fn with_blocks(&self, blocks: Vec<Block>) -> Self {
        Self { trunk: self.trunk.clone(), blocks }
    }

    /// This model with other linear layers, built as in [`load_with`](Self::load_with) from its
    /// checkpoint. Everything else is shared with this one.
    ///
    /// # Errors
    /// As [`load_with`](Self::load_with); [`Error::Invalid`] if `checkpoint` is of another shape.
    pub fn with_linears(
        &self,
        checkpoint: &Checkpoint,
        make: impl FnMut(LinearWeights) -> lowbit::Result<Arc<dyn Linear>>,
    ) -> Result<Self> {
        self.check_checkpoint(checkpoint)?;
        let norms = self.blocks.iter().map(|block| block.norms.clone()).collect();
        Ok(self.with_blocks(blocks(checkpoint.config(), norms, from_weights(checkpoint, make))?))
    }

    /// Is `checkpoint` of the shape of this model?
    pub(crate) fn check_checkpoint(&self, checkpoint: &Checkpoint) -> Result<()> {
        if *checkpoint.config() == self.trunk.config {
            return Ok(());
        }
        let name = checkpoint.name();
        Err(Error::Invalid(format!("{name} is not the checkpoint of this model")))
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.trunk.config
    }

    /// The linear layers of the blocks with their names, from first to last.
    pub fn linears(&self) -> impl Iterator<Item = (&str, &Arc<dyn Linear>)> {
        self.blocks
            .iter()
            .flat_map(|block| &block.layers)
            .map(|layer| (layer.name.as_str(), &layer.linear))
    }

    /// The linear layers that no kernel takes and the reference computes.
    pub fn unpacked(&self) -> Vec<Unpacked> {
        self.linears().filter_map(|(name, linear)| Unpacked::of(name, &**linear)).collect()
    }

    /// The logits after each of `tokens`, `(tokens, vocab_size)`. The tokens continue those in
    /// `cache` and join them.
    ///
    /// # Errors
    /// [`Error::Token`], [`Error::Context`] or [`Error::Empty`] if `tokens` make no sense;
    /// [`Error::Invalid`] if `cache` is of another model; [`Error::Layer`] if a layer refuses its
    /// input. `cache` is unchanged then.
    pub fn forward(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        ctx: &mut Context,
    ) -> Result<Mat<f32>> {
        let x = self.run(tokens, cache, ctx, &mut |_| Ok(()))?;
        self.trunk.logits(&x, ctx)
    }

    /// As [`forward`](Self::forward), but only the logits after the last token.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_last(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        ctx: &mut Context,
    ) -> Result<Vec<f32>> {
        let x = self.run(tokens, cache, ctx, &mut |_| Ok(()))?;
        let last = x.len().saturating_sub(self.trunk.config.hidden_size);
        Ok(self.trunk.logits(&x[last..], ctx)?.data().to_vec())
    }

    /// Runs the blocks and shows the input of every linear layer to `observe`, with the names of
    /// the layers that share it: q, k and v; o; gate and up; down.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and what `observe` returns.
    pub fn observe(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        ctx: &mut Context,
        mut observe: impl FnMut(&[&str], MatRef<'_, f32>) -> Result<()> + Send,
    ) -> Result<()> {
        self.run(tokens, cache, ctx, &mut |seen| {
            let names: Vec<_> = seen.layers.iter().map(|layer| layer.name.as_str()).collect();
            observe(&names, seen.x)
        })
        .map(|_| ())
    }

    /// The residual stream behind the last block, before the norm.
    fn run(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        ctx: &mut Context,
        observe: Observer<'_>,
    ) -> Result<Vec<f32>> {
        let c = &self.trunk.config;
        if tokens.is_empty() {
            return Err(Error::Empty { what: "no tokens: a model needs at least one".into() });
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= c.vocab_size) {
            return Err(Error::Token { token, vocab_size: c.vocab_size });
        }
        if cache.blocks.len() != c.num_hidden_layers || cache.kv_size != c.kv_size() {
            return Err(Error::Invalid("the KV cache belongs to another model".into()));
        }
        let past = cache.len();
        let (context, total) = (c.max_position_embeddings, past + tokens.len());
        if total > context {
            return Err(Error::Context { what: "a text", tokens: total, context });
        }
        // Rows that a call which panicked has left behind.
        cache.truncate(past);
        // Once inside the pool, the many small tasks below start without crossing threads.
        let result = match ctx.pool().cloned() {
            Some(pool) => pool.install(|| self.run_blocks(tokens, cache, ctx, observe)),
            None => self.run_blocks(tokens, cache, ctx, observe),
        };
        match result {
            Ok(_) => cache.advance(tokens.len()),
            Err(_) => cache.truncate(past),
        }
        result
    }

    fn run_blocks(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        ctx: &mut Context,
        observe: Observer<'_>,
    ) -> Result<Vec<f32>> {
        let past = cache.len();
        let mut x = self.embed(tokens);
        let angles = Angles::new(&self.trunk.rope, past, tokens.len());
        for (block, kv) in self.blocks.iter().zip(&mut cache.blocks) {
            block.run(&self.trunk.config, &mut x, &angles, kv, ctx, observe)?;
        }
        Ok(x)
    }

    /// The residual stream before the first block, `(tokens, hidden_size)`. Tokens have been checked.
    fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let embedding = self.trunk.embedding.as_ref();
        let row = |&token: &u32| embedding.row(token as usize).unwrap_or(&[]);
        tokens.iter().flat_map(row).copied().collect()
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", self.config()).finish_non_exhaustive()
    }
}

impl Trunk {
    fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config().clone();
        let embedding = checkpoint.matrix(EMBEDDING)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(checkpoint.matrix(HEAD)?),
        };
        Self::new(config, embedding, head, checkpoint.vector(NORM)?)
    }

    /// Without a head of its own, the embedding is the head.
    fn new(
        config: Config,
        embedding: Mat<f32>,
        head: Option<Mat<f32>>,
        norm: Vec<f32>,
    ) -> Result<Self> {
        let head = DenseLinear::new(head.as_ref().unwrap_or(&embedding).as_ref(), None)
            .map_err(|cause| Error::Layer { layer: HEAD.into(), cause })?;
        Ok(Self { rope: Rope::new(&config), config, embedding, norm, head })
    }

    fn logits(&self, x: &[f32], ctx: &mut Context) -> Result<Mat<f32>> {
        let Config { hidden_size, rms_norm_eps, vocab_size, .. } = self.config;
        let mut h = Mat::zeros(x.len() / hidden_size, hidden_size);
        ops::rms_norm(ctx, x, &self.norm, rms_norm_eps, h.data_mut());
        let mut logits = Mat::zeros(h.rows(), vocab_size);
        (self.head.forward(h.as_ref(), logits.as_mut(), ctx))
            .map_err(|cause| Error::Layer { layer: HEAD.into(), cause })?;
        Ok(logits)
    }
}

fn dense(weights: LinearWeights) -> lowbit::Result<Arc<dyn Linear>> {
    Ok(Arc::new(DenseLinear::new(weights.weight.as_ref(), weights.bias)?))
}

/// The gains of block `layer`.
pub(crate) fn norms(checkpoint: &Checkpoint, layer: usize) -> Result<[Vec<f32>; 2]> {
    let [attention, mlp] = block_norms(layer);
    Ok([checkpoint.vector(&attention)?, checkpoint.vector(&mlp)?])
}

fn all_norms(checkpoint: &Checkpoint) -> Result<Vec<Arc<[Vec<f32>; 2]>>> {
    let layers = 0..checkpoint.config().num_hidden_layers;
    layers.map(|layer| norms(checkpoint, layer).map(Arc::new)).collect()
}

/// Hands the f32 weights of the layer of a name to `make`.
fn from_weights(
    checkpoint: &Checkpoint,
    mut make: impl FnMut(LinearWeights) -> lowbit::Result<Arc<dyn Linear>>,
) -> impl FnMut(&LinearSpec) -> Result<Arc<dyn Linear>> {
    move |LinearSpec { name, .. }| {
        let weights = checkpoint.linear(name)?;
        make(weights).map_err(|cause| Error::Layer { layer: name.clone(), cause })
    }
}

fn blocks(
    c: &Config,
    norms: Vec<Arc<[Vec<f32>; 2]>>,
    mut make: impl FnMut(&LinearSpec) -> Result<Arc<dyn Linear>>,
) -> Result<Vec<Block>> {
    (norms.into_iter().enumerate())
        .map(|(layer, norms)| {
            let mut layers = Vec::with_capacity(7);
            for spec in block_linears(c, layer) {
                let linear = make(&spec)?;
                layers.push(Layer::new(spec.name, spec.shape, linear)?);
            }
            Block::new(norms, layers)
        })
        .collect()
}

impl Layer {
    /// A layer for a place of the shape `expected`.
    pub(crate) fn new(
        name: String,
        expected: (usize, usize),
        linear: Arc<dyn Linear>,
    ) -> Result<Self> {
        let got = (linear.out_features(), linear.in_features());
        if got != expected {
            return Err(Error::LayerShape { layer: name, expected, got });
        }
        Ok(Self { name, linear })
    }
}

impl Block {
    pub(crate) fn new(norms: Arc<[Vec<f32>; 2]>, layers: Vec<Layer>) -> Result<Self> {
        match <[Layer; 7]>::try_from(layers) {
            Ok(layers) => Ok(Self { norms, layers }),
            Err(_) => Err(Error::Invalid("a block has seven linear layers".into())),
        }
    }

    /// Runs the block, of a model with config.json `c`, over the residual stream `x` of the tokens that `angles` are of.
    pub(crate) fn run(
        &self,
        c: &Config,
        x: &mut [f32],
        angles: &Angles,
        kv: &mut KvBlock,
        ctx: &mut Context,
        observe: Observer<'_>,
    ) -> Result<()> {
        let (hidden, half) = (c.hidden_size, c.head_dim / 2);
        let m = x.len() / hidden;
        let Angles { past, sin, cos } = angles;

        let zeros = |cols| vec![0.0; m * cols];
        let (mut h, mut y) = (zeros(hidden), zeros(hidden));
        let (mut q, mut k, mut v) = (zeros(c.q_size()), zeros(c.kv_size()), zeros(c.kv_size()));

        ops::rms_norm(ctx, x, &self.norms[0], c.rms_norm_eps, &mut h);
        self.apply(0, (x, &h), [&mut q, &mut k, &mut v], m, ctx, observe)?;
        ops::rope(ctx, &mut q, c.q_size(), half, (cos, sin));
        ops::rope(ctx, &mut k, c.kv_size(), half, (cos, sin));
        kv.k.extend_from_slice(&k);
        kv.v.extend_from_slice(&v);
        let mut a = zeros(c.q_size());
        attention(c, ctx, &q, kv, *past, &mut a);
        self.apply(1, (x, &a), [&mut y], m, ctx, observe)?;
        ops::add(ctx, x, &y);

        let (mut gate, mut up) = (zeros(c.intermediate_size), zeros(c.intermediate_size));
        ops::rms_norm(ctx, x, &self.norms[1], c.rms_norm_eps, &mut h);
        self.apply(2, (x, &h), [&mut gate, &mut up], m, ctx, observe)?;
        ops::swiglu(ctx, &mut gate, &up);
        self.apply(3, (x, &gate), [&mut y], m, ctx, observe)?;
        ops::add(ctx, x, &y);
        Ok(())
    }

    /// Applies the layers of a set to the input `x` of `m` rows.
    fn apply<const N: usize>(
        &self,
        set: usize,
        (residual, x): (&[f32], &[f32]),
        outputs: [&mut Vec<f32>; N],
        m: usize,
        ctx: &mut Context,
        observe: Observer<'_>,
    ) -> Result<()> {
        let layers = &self.layers[SETS[set].clone()];
        let error = |layer: &Layer| {
            let layer = layer.name.clone();
            |cause| Error::Layer { layer, cause }
        };
        let x = MatRef::new(x, m, layers[0].linear.in_features()).map_err(error(&layers[0]))?;
        observe(Seen { set, layers, x, residual })?;
        let mut views = Vec::with_capacity(N);
        for (layer, y) in layers.iter().zip(outputs) {
            views.push(MatMut::new(y, m, layer.linear.out_features()).map_err(error(layer))?);
        }
        match sharing(layers) {
            Some(packed) => forward_shared(&packed, x, &mut views, ctx).map_err(error(&layers[0])),
            None => layers
                .iter()
                .zip(views)
                .try_for_each(|(layer, y)| layer.linear.forward(x, y, ctx).map_err(error(layer))),
        }
    }
}

/// The layers, if they can transform and quantize their input together.
fn sharing(layers: &[Layer]) -> Option<Vec<&PackedLinear>> {
    fn packed(layer: &Layer) -> Option<&PackedLinear> {
        layer.linear.as_any()?.downcast_ref()
    }
    let packed = layers.iter().map(packed).collect::<Option<Vec<_>>>()?;
    let (first, others) = packed.split_first()?;
    others.iter().all(|other| first.shares_input_with(other).is_ok()).then_some(packed)
}

/// Uniform random numbers of variance 1 / cols.
fn noise(rows: usize, cols: usize, seed: u64) -> Mat<f32> {
    let width = (12.0 / cols.max(1) as f32).sqrt();
    let mut index = 0;
    Mat::from_fn(rows, cols, |_, _| {
        index += 1;
        ((random(seed, index) >> 8) as f32 / (1 << 24) as f32 - 0.5) * width
    })
}

/// Query rows in a task; the scores of so many rows are in memory at a time.
const QUERY_ROWS: usize = 32;
/// Products in a task when there is a single row.
const PRODUCTS: usize = 1 << 15;

/// Causal attention of `q`, whose first row is token `past`, over the keys and values of all
/// tokens: `a = softmax(q·kᵀ / √head_dim)·v`, head by head.
fn attention(c: &Config, ctx: &Context, q: &[f32], kv: &KvBlock, past: usize, a: &mut [f32]) {
    let (dim, q_size, kv_size) = (c.head_dim, c.q_size(), c.kv_size());
    let scale = 1.0 / (dim as f32).sqrt();
    let queries_per_key = c.num_attention_heads / c.num_key_value_heads;
    let m = a.len() / q_size;

    // A task is some heads of a single row, or all heads of some rows.
    let some = (PRODUCTS / (2 * dim * (past + 1))).clamp(1, c.num_attention_heads);
    let task = if m == 1 { some * dim } else { QUERY_ROWS * q_size };
    ops::for_chunks(ctx, a, task, |task, a| {
        let (row, rows, head, heads) = match m {
            1 => (0, 1, task * some, a.len() / dim),
            _ => (task * QUERY_ROWS, a.len() / q_size, 0, c.num_attention_heads),
        };
        let keys = past + row + rows; // the last row sees so many
        let mut scores = vec![0.0; rows * keys];
        for (i, head) in (head..head + heads).enumerate() {
            let at = head / queries_per_key * dim;
            let view = |data, rows, stride| MatRef::with_row_stride(data, rows, dim, stride);
            let (Ok(q), Ok(k), Ok(v), Ok(scores_of_head), Ok(a)) = (
                view(&q[row * q_size + head * dim..], rows, q_size),
                view(&kv.k[at..], keys, kv_size),
                view(&kv.v[at..], keys, kv_size),
                MatMut::new(&mut scores, rows, keys),
                MatMut::with_row_stride(&mut a[i * dim..], rows, dim, q_size),
            ) else {
                return;
            };
            ops::matmul_transposed(q, k, scores_of_head);
            for (r, scores) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, future) = scores.split_at_mut(past + row + r + 1);
                ops::softmax(seen, scale);
                future.fill(0.0);
            }
            if let Ok(scores) = MatRef::new(&scores, rows, keys) {
                ops::matmul(scores, v, a);
            }
        }
    });
}
