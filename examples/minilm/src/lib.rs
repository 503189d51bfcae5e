//! A model that lowbit does not know: all-MiniLM-L6-v2, a BERT encoder. It runs in f32 and shows the
//! inputs of its linear layers, which is all that methods of quantization ask for: [`Study`] quantizes
//! the layers of one kind by a recipe, and measures what their outputs lose on other inputs.
//!
//! ```text
//! x ──► query, key, value ──► attention ──► attention.output.dense ──► + x, norm ──► x
//! x ──► intermediate.dense ──► gelu ──► output.dense ──► + x, norm ──► x
//! ```

use std::path::Path;

use lowbit::{
    Calibration, Context, Linear, Mat, MatRef, PackedLinear, QLinear, Quantizer, Recipe,
    formats::TensorSource,
};
use lowbit_lm::{DenseLinear, Tensors, Tokenizer};

/// Whatever goes wrong in an example.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const HIDDEN: usize = 384;
const LAYERS: usize = 6;
const HEADS: usize = 12;
const INTERMEDIATE: usize = 1536;
const POSITIONS: usize = 512;
/// `[CLS]` and `[SEP]`, around every text.
const CLS: u32 = 101;
const SEP: u32 = 102;

/// The encoder, in f32.
pub struct Encoder {
    tokenizer: Tokenizer,
    words: Vec<f32>,
    /// Of position and token type.
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
}

struct Layer {
    qkv: [DenseLinear; 3],
    attention_output: DenseLinear,
    attention_norm: Norm,
    intermediate: DenseLinear,
    output: DenseLinear,
    output_norm: Norm,
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// A kind of linear layer whose input [`Encoder::forward`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `attention.self.query`; key and value have the same input.
    Query,
    /// `intermediate.dense`, behind the norm whose gains make outlier features.
    Intermediate,
}

impl Kind {
    /// Its name in the checkpoint, without that of the layer.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "attention.self.query",
            Self::Intermediate => "intermediate.dense",
        }
    }
}

impl Encoder {
    /// Of a folder with `model.safetensors` and `tokenizer.json`.
    ///
    /// # Errors
    /// Those of the files.
    pub fn open(folder: &Path) -> Result<Self> {
        let source = &Tensors::open(folder)?;
        let json = std::fs::read(folder.join("tokenizer.json"))?;
        let types = tensor(source, "embeddings.token_type_embeddings.weight", 2 * HIDDEN)?;
        let mut positions =
            tensor(source, "embeddings.position_embeddings.weight", POSITIONS * HIDDEN)?;
        for row in positions.chunks_mut(HIDDEN) {
            row.iter_mut().zip(&types).for_each(|(x, add)| *x += add);
        }
        let layer = |i: usize| -> Result<Layer> {
            let name = |name: &str| format!("encoder.layer.{i}.{name}");
            let square = |part: &str| dense(source, &name(part), HIDDEN, HIDDEN);
            Ok(Layer {
                qkv: [
                    square("attention.self.query")?,
                    square("attention.self.key")?,
                    square("attention.self.value")?,
                ],
                attention_output: square("attention.output.dense")?,
                attention_norm: Norm::read(source, &name("attention.output.LayerNorm"))?,
                intermediate: dense(source, &name("intermediate.dense"), INTERMEDIATE, HIDDEN)?,
                output: dense(source, &name("output.dense"), HIDDEN, INTERMEDIATE)?,
                output_norm: Norm::read(source, &name("output.LayerNorm"))?,
            })
        };
        Ok(Self {
            tokenizer: Tokenizer::parse("tokenizer.json", &json)?,
            words: source.tensor("embeddings.word_embeddings.weight")?.to_f32()?,
            positions,
            norm: Norm::read(source, "embeddings.LayerNorm")?,
            layers: (0..LAYERS).map(layer).collect::<Result<_>>()?,
        })
    }

    /// The tokens of `text` in `count` windows of `width`, each between its marks.
    ///
    /// # Errors
    /// Those of the tokenizer; a text that is too short.
    pub fn windows(&self, text: &str, width: usize, count: usize) -> Result<Vec<Vec<u32>>> {
        let tokens = self.tokenizer.encode_plain(text)?;
        let windows: Vec<_> = (tokens.chunks_exact(width.saturating_sub(2).max(1)).take(count))
            .map(|tokens| [&[CLS], tokens, &[SEP]].concat())
            .collect();
        match windows.len() == count {
            true => Ok(windows),
            false => Err(format!("the text has {} windows, not {count}", windows.len()).into()),
        }
    }

    /// The last hidden states `(tokens, 384)`. `show` sees the inputs of the linear layers of each kind,
    /// layer by layer.
    ///
    /// # Errors
    /// No or too many tokens, or one that is none; those of `show`.
    pub fn forward(
        &self,
        tokens: &[u32],
        ctx: &mut Context,
        mut show: impl FnMut(usize, Kind, MatRef<'_, f32>) -> Result<()>,
    ) -> Result<Mat<f32>> {
        if !(1..=POSITIONS).contains(&tokens.len()) {
            return Err(format!("expected 1 to {POSITIONS} tokens, got {}", tokens.len()).into());
        }
        let mut x = Mat::zeros(tokens.len(), HIDDEN);
        let rows = x.data_mut().chunks_mut(HIDDEN).zip(self.positions.chunks(HIDDEN));
        for ((x, position), &token) in rows.zip(tokens) {
            let word = self.words.chunks(HIDDEN).nth(token as usize);
            let word = word.ok_or_else(|| format!("there is no token {token}"))?;
            x.iter_mut().zip(word.iter().zip(position)).for_each(|(x, (a, b))| *x = a + b);
        }
        self.norm.apply(&mut x);
        for (i, layer) in self.layers.iter().enumerate() {
            show(i, Kind::Query, x.as_ref())?;
            let [q, k, v] = &layer.qkv;
            let (q, k, v) = (apply(q, &x, ctx)?, apply(k, &x, ctx)?, apply(v, &x, ctx)?);
            let mixed = attention(&q, &k, &v);
            add(&mut x, &apply(&layer.attention_output, &mixed, ctx)?);
            layer.attention_norm.apply(&mut x);
            show(i, Kind::Intermediate, x.as_ref())?;
            let mut h = apply(&layer.intermediate, &x, ctx)?;
            h.data_mut().iter_mut().for_each(|h| *h = gelu(*h));
            add(&mut x, &apply(&layer.output, &h, ctx)?);
            layer.output_norm.apply(&mut x);
        }
        Ok(x)
    }
}

impl Norm {
    fn read(source: &dyn TensorSource, name: &str) -> Result<Self> {
        let part = |part: &str| tensor(source, &format!("{name}.{part}"), HIDDEN);
        Ok(Self { weight: part("weight")?, bias: part("bias")? })
    }

    fn apply(&self, x: &mut Mat<f32>) {
        for row in x.data_mut().chunks_mut(HIDDEN) {
            let mean = row.iter().sum::<f32>() / HIDDEN as f32;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / HIDDEN as f32;
            let scale = 1.0 / (variance + 1e-12).sqrt();
            for (x, (weight, bias)) in row.iter_mut().zip(self.weight.iter().zip(&self.bias)) {
                *x = (*x - mean) * scale * weight + bias;
            }
        }
    }
}

/// A tensor of `len` elements.
fn tensor(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>> {
    let elements = source.tensor(name)?.to_f32()?;
    match elements.len() == len {
        true => Ok(elements),
        false => Err(format!("{name}: expected {len} elements, got {}", elements.len()).into()),
    }
}

/// The `(n, k)` weight of a linear layer.
fn weight(source: &dyn TensorSource, name: &str, n: usize, k: usize) -> Result<Mat<f32>> {
    Ok(Mat::new(tensor(source, &format!("{name}.weight"), n * k)?, n, k)?)
}

fn dense(source: &dyn TensorSource, name: &str, n: usize, k: usize) -> Result<DenseLinear> {
    let bias = tensor(source, &format!("{name}.bias"), n)?;
    Ok(DenseLinear::new(weight(source, name, n, k)?.as_ref(), Some(bias))?)
}

fn apply(layer: &dyn Linear, x: &Mat<f32>, ctx: &mut Context) -> Result<Mat<f32>> {
    let mut y = Mat::zeros(x.rows(), layer.out_features());
    layer.forward(x.as_ref(), y.as_mut(), ctx)?;
    Ok(y)
}

fn add(x: &mut Mat<f32>, y: &Mat<f32>) {
    x.data_mut().iter_mut().zip(y.data()).for_each(|(x, y)| *x += y);
}

/// `softmax(q·kᵀ / √d)·v`, head by head, every token on all others.
fn attention(q: &Mat<f32>, k: &Mat<f32>, v: &Mat<f32>) -> Mat<f32> {
    let (tokens, d) = (q.rows(), HIDDEN / HEADS);
    let scale = 1.0 / (d as f32).sqrt();
    let mut mixed = Mat::zeros(tokens, HIDDEN);
    let mut scores = vec![0.0; tokens];
    for (q, mixed) in q.data().chunks(HIDDEN).zip(mixed.data_mut().chunks_mut(HIDDEN)) {
        for head in (0..HIDDEN).step_by(d).map(|first| first..first + d) {
            for (score, k) in scores.iter_mut().zip(k.data().chunks(HIDDEN)) {
                let products = q[head.clone()].iter().zip(&k[head.clone()]);
                *score = products.map(|(q, k)| q * k).sum::<f32>() * scale;
            }
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().for_each(|score| *score = (*score - max).exp());
            let sum: f32 = scores.iter().sum();
            for (score, v) in scores.iter().zip(v.data().chunks(HIDDEN)) {
                for (mixed, v) in mixed[head.clone()].iter_mut().zip(&v[head.clone()]) {
                    *mixed += score / sum * v;
                }
            }
        }
    }
    mixed
}

/// The exact one.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The layers of one kind, with statistics of their inputs and other inputs to measure errors on.
pub struct Study {
    /// Of each layer.
    layers: Vec<Subject>,
}

struct Subject {
    weight: Mat<f32>,
    calibration: Calibration,
    /// A window each, with the outputs of the f32 layer.
    windows: Vec<(Mat<f32>, Mat<f32>)>,
}

impl Study {
    /// Of the layers of `kind` of the model in `folder`: calibrated on the windows `seen`, measured on
    /// the windows `unseen`.
    ///
    /// # Errors
    /// Those of [`Encoder::forward`] and of the files.
    pub fn new(
        encoder: &Encoder,
        folder: &Path,
        kind: Kind,
        (seen, unseen): (&[Vec<u32>], &[Vec<u32>]),
        ctx: &mut Context,
    ) -> Result<Self> {
        let source = Tensors::open(folder)?;
        let n = if kind == Kind::Query { HIDDEN } else { INTERMEDIATE };
        let mut layers = Vec::new();
        for i in 0..LAYERS {
            let name = format!("encoder.layer.{i}.{}", kind.name());
            layers.push(Subject {
                weight: weight(&source, &name, n, HIDDEN)?,
                calibration: Calibration::with_second_moment(HIDDEN)?,
                windows: Vec::new(),
            });
        }
        let mut own = context(ctx);
        for tokens in seen {
            encoder.forward(tokens, ctx, |i, shown, x| {
                if shown == kind {
                    layers[i].calibration.observe(x, &mut own)?;
                }
                Ok(())
            })?;
        }
        for tokens in unseen {
            encoder.forward(tokens, ctx, |i, shown, x| {
                if shown == kind {
                    let x = Mat::new(x.data().to_vec(), x.rows(), x.cols())?;
                    let dense = DenseLinear::new(layers[i].weight.as_ref(), None)?;
                    let y = apply(&dense, &x, &mut own)?;
                    layers[i].windows.push((x, y));
                }
                Ok(())
            })?;
        }
        Ok(Self { layers })
    }

    /// `Σ (y − ŷ)² / Σ y²` of each layer quantized by `recipe`, without its bias.
    ///
    /// # Errors
    /// Those of the recipe.
    pub fn errors(&self, recipe: &Recipe<'_>, ctx: &mut Context) -> Result<Vec<f64>> {
        let error = |subject: &Subject| -> Result<f64> {
            let Subject { weight, calibration, windows } = subject;
            let layer = recipe.quantize(weight.as_ref(), calibration, ctx)?.layer;
            let layer = linear(layer)?;
            let (mut lost, mut all) = (0.0, 0.0);
            for (x, y) in windows {
                let q = apply(layer.as_ref(), x, ctx)?;
                for (&q, &y) in q.data().iter().zip(y.data()) {
                    lost += f64::from(q - y) * f64::from(q - y);
                    all += f64::from(y) * f64::from(y);
                }
            }
            Ok(lost / all)
        };
        self.layers.iter().map(error).collect()
    }

    /// Bits stored for each weight.
    ///
    /// # Errors
    /// Those of the recipe.
    pub fn bits_per_weight(&self, recipe: &Recipe<'_>) -> Result<f64> {
        let (mut bytes, mut weights) = (0, 0);
        for Subject { weight, .. } in &self.layers {
            let plan = recipe.plan(weight.rows(), weight.cols())?;
            (bytes, weights) = (bytes + plan.bytes, weights + weight.data().len());
        }
        Ok(bytes as f64 * 8.0 / weights as f64)
    }
}

/// The geometric mean.
pub fn mean(errors: &[f64]) -> f64 {
    (errors.iter().map(|e| e.ln()).sum::<f64>() / errors.len() as f64).exp()
}

/// By a fast kernel, where there is one.
fn linear(layer: QLinear) -> Result<Box<dyn Linear>> {
    Ok(match PackedLinear::new(&layer) {
        Ok(packed) => Box::new(packed),
        Err(lowbit::Error::Unsupported { .. }) => Box::new(layer),
        Err(e) => return Err(e.into()),
    })
}

/// Another one on the same threads.
fn context(ctx: &Context) -> Context {
    ctx.pool().map_or_else(Context::new, |pool| Context::with_pool(pool.clone()))
}
