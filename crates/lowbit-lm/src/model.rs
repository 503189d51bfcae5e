use std::{f32::consts::TAU, sync::Arc};

use lowbit::{Context, Linear, Mat, MatMut, MatRef, PackedLinear};

use crate::{
    Checkpoint, Config, DenseLinear, Error, KvCache, LinearWeights, Result,
    checkpoint::{EMBEDDING, HEAD, NORM, block_linears, block_norms},
    kv::KvBlock,
    ops,
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
    /// Before attention and before the MLP of each block.
    norms: Vec<[Vec<f32>; 2]>,
    norm: Vec<f32>,
    head: DenseLinear,
    /// Radians per position, for each pair of a head.
    frequencies: Vec<f32>,
}

/// The linear layers of a block.
struct Block {
    q: Layer,
    k: Layer,
    v: Layer,
    o: Layer,
    gate: Layer,
    up: Layer,
    down: Layer,
}

struct Layer {
    name: String,
    linear: Arc<dyn Linear>,
}

/// Called with the names of the linear layers that are about to get the input beside them.
type Observer<'a> = &'a mut (dyn FnMut(&[&str], MatRef<'_, f32>) -> Result<()> + Send);

impl Model {
    /// Reads the whole model into memory: layers that are quantized as they are, all others in f32.
    ///
    /// A quantized layer for which this CPU has no kernel is multiplied by its weights in f32.
    ///
    /// # Errors
    /// [`Error::Layer`] for a layer that quantizes its inputs in a way that no kernel can. None else for
    /// a checkpoint whose files have not changed since it was opened.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let trunk = Arc::new(Trunk::load(checkpoint)?);
        let make = |name: &str| {
            let error = |cause| Error::Layer { layer: name.into(), cause };
            match checkpoint.quantized(name)? {
                None => dense(checkpoint.linear(name)?).map_err(error),
                Some(layer) => match PackedLinear::new(&layer) {
                    Ok(packed) => Ok(Arc::new(packed) as Arc<dyn Linear>),
                    Err(lowbit::Error::Unsupported { .. }) if layer.activation().is_none() => {
                        dense(checkpoint.linear(name)?).map_err(error)
                    }
                    Err(cause) => Err(error(cause)),
                },
            }
        };
        Ok(Self { trunk, blocks: blocks(checkpoint, make)? })
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
        Ok(Self { trunk, blocks: blocks(checkpoint, from_weights(checkpoint, make))? })
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
        if *checkpoint.config() != self.trunk.config {
            let name = checkpoint.name();
            return Err(Error::Invalid(format!("{name} is not the checkpoint of this model")));
        }
        let blocks = blocks(checkpoint, from_weights(checkpoint, make))?;
        Ok(Self { trunk: self.trunk.clone(), blocks })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.trunk.config
    }

    /// The linear layers of the blocks with their names, from first to last.
    pub fn linears(&self) -> impl Iterator<Item = (&str, &Arc<dyn Linear>)> {
        self.blocks
            .iter()
            .flat_map(|b| [&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down])
            .map(|layer| (layer.name.as_str(), &layer.linear))
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
        let x = self.run(tokens, cache, ctx, &mut |_, _| Ok(()))?;
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
        let x = self.run(tokens, cache, ctx, &mut |_, _| Ok(()))?;
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
        self.run(tokens, cache, ctx, &mut observe).map(|_| ())
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
        let Trunk { config: c, embedding, norms, frequencies, .. } = &*self.trunk;
        let (m, hidden, half) = (tokens.len(), c.hidden_size, c.head_dim / 2);
        let past = cache.len();

        let mut x = Vec::with_capacity(m * hidden);
        for &token in tokens {
            x.extend_from_slice(embedding.as_ref().row(token as usize).unwrap_or(&[]));
        }
        let angles = (past..past + m).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();

        let zeros = |cols| vec![0.0; m * cols];
        let (mut h, mut y) = (zeros(hidden), zeros(hidden));
        let (mut q, mut k, mut v) = (zeros(c.q_size()), zeros(c.kv_size()), zeros(c.kv_size()));
        let mut a = zeros(c.q_size());
        let (mut gate, mut up) = (zeros(c.intermediate_size), zeros(c.intermediate_size));

        for ((block, norms), kv) in self.blocks.iter().zip(norms).zip(&mut cache.blocks) {
            ops::rms_norm(ctx, &x, &norms[0], c.rms_norm_eps, &mut h);
            apply([&block.q, &block.k, &block.v], &h, [&mut q, &mut k, &mut v], m, ctx, observe)?;
            ops::rope(ctx, &mut q, c.q_size(), half, (&cos, &sin));
            ops::rope(ctx, &mut k, c.kv_size(), half, (&cos, &sin));
            kv.k.extend_from_slice(&k);
            kv.v.extend_from_slice(&v);
            attention(c, ctx, &q, kv, past, &mut a);
            apply([&block.o], &a, [&mut y], m, ctx, observe)?;
            ops::add(ctx, &mut x, &y);

            ops::rms_norm(ctx, &x, &norms[1], c.rms_norm_eps, &mut h);
            apply([&block.gate, &block.up], &h, [&mut gate, &mut up], m, ctx, observe)?;
            ops::swiglu(ctx, &mut gate, &up);
            apply([&block.down], &gate, [&mut y], m, ctx, observe)?;
            ops::add(ctx, &mut x, &y);
        }
        Ok(x)
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
            true => DenseLinear::new(embedding.as_ref(), None),
            false => DenseLinear::new(checkpoint.matrix(HEAD)?.as_ref(), None),
        };
        let head = head.map_err(|cause| Error::Layer { layer: HEAD.into(), cause })?;
        let norms = (0..config.num_hidden_layers)
            .map(|layer| {
                let [attention, mlp] = block_norms(layer);
                Ok([checkpoint.vector(&attention)?, checkpoint.vector(&mlp)?])
            })
            .collect::<Result<_>>()?;
        let norm = checkpoint.vector(NORM)?;
        Ok(Self { frequencies: frequencies(&config), config, embedding, norms, norm, head })
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

/// Hands the f32 weights of the layer of a name to `make`.
fn from_weights(
    checkpoint: &Checkpoint,
    mut make: impl FnMut(LinearWeights) -> lowbit::Result<Arc<dyn Linear>>,
) -> impl FnMut(&str) -> Result<Arc<dyn Linear>> {
    move |name| {
        let weights = checkpoint.linear(name)?;
        make(weights).map_err(|cause| Error::Layer { layer: name.into(), cause })
    }
}

fn blocks(
    checkpoint: &Checkpoint,
    mut make: impl FnMut(&str) -> Result<Arc<dyn Linear>>,
) -> Result<Vec<Block>> {
    let c = checkpoint.config();
    (0..c.num_hidden_layers)
        .map(|layer| {
            let mut layers = Vec::with_capacity(7);
            for spec in block_linears(c, layer) {
                let (name, expected) = (spec.name, spec.shape);
                let linear = make(&name)?;
                let got = (linear.out_features(), linear.in_features());
                if got != expected {
                    return Err(Error::LayerShape { layer: name, expected, got });
                }
                layers.push(Layer { name, linear });
            }
            match <[Layer; 7]>::try_from(layers) {
                Ok([q, k, v, o, gate, up, down]) => Ok(Block { q, k, v, o, gate, up, down }),
                Err(_) => Err(Error::Invalid("a block has seven linear layers".into())),
            }
        })
        .collect()
}

/// Applies layers that share the input `x` of `m` rows.
fn apply<const N: usize>(
    layers: [&Layer; N],
    x: &[f32],
    outputs: [&mut Vec<f32>; N],
    m: usize,
    ctx: &mut Context,
    observe: Observer<'_>,
) -> Result<()> {
    let error = |layer: &Layer| {
        let layer = layer.name.clone();
        |cause| Error::Layer { layer, cause }
    };
    let x = MatRef::new(x, m, layers[0].linear.in_features()).map_err(error(layers[0]))?;
    observe(&layers.map(|layer| layer.name.as_str()), x)?;
    for (layer, y) in layers.into_iter().zip(outputs) {
        MatMut::new(y, m, layer.linear.out_features())
            .and_then(|y| layer.linear.forward(x, y, ctx))
            .map_err(error(layer))?;
    }
    Ok(())
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

/// Radians per position of each pair `(i, i + head_dim/2)`: `theta^(−2i/head_dim)`, scaled.
fn frequencies(c: &Config) -> Vec<f32> {
    (0..c.head_dim / 2)
        .map(|i| {
            let frequency = 1.0 / c.rope_theta.powf((2 * i) as f32 / c.head_dim as f32);
            let Some(s) = c.rope_scaling else { return frequency };
            // 0 where the wave is long, 1 where it is short
            let turns = s.original_max_position_embeddings as f32 * frequency / TAU;
            let keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
            let keep = keep.clamp(0.0, 1.0);
            frequency * keep + frequency / s.factor * (1.0 - keep)
        })
        .collect()
}
