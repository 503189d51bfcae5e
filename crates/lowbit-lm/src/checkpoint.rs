use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use lowbit::{
    Mat, QLinear,
    formats::{
        self, Dtype, Safetensors, TensorSource, TensorView,
        conventions::{QuantizationConfig, Stored},
    },
};
use serde_json::Value;

use crate::{
    Config, Error, Result, Tensors, Tokenizer,
    gguf_files::{self, GgufFiles},
    gguf_model::{Description, GgufModel},
    gguf_tokenizer,
    tensors::read,
};

/// A model as it is stored, checked, and not yet in memory: the Hugging Face layout of
/// `config.json`, `tokenizer.json` and `model.safetensors` (or several files under
/// `model.safetensors.index.json`), or a GGUF file of llama.cpp, whose metadata have the shape and the tokenizer.
///
/// Weights stay in their file until a [`Model`](crate::Model) asks for them, one layer at a time. Linear
/// layers, embedding and head may be quantized, each in the convention of
/// [`conventions`](formats::conventions) that its own tensors show.
///
/// # Example
/// ```no_run
/// let checkpoint = lowbit_lm::Checkpoint::open("models/stories3m")?;
/// println!("{} layers", checkpoint.config().num_hidden_layers);
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
pub struct Checkpoint {
    name: String,
    config: Config,
    tokenizer: Tokenizer,
    tensors: Tensors,
    /// What config.json says of quantized layers.
    quantization: QuantizationConfig,
    notes: Vec<String>,
    texts: Texts,
}

/// The text files of a model, as they are or as they would be.
struct Texts {
    config: Value,
    tokenizer: Vec<u8>,
    /// Do the tensors come from GGUF files?
    gguf: bool,
}

/// The weights of one linear layer, in f32, on their way to whatever will multiply with them.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearWeights {
    /// The layer's name in the checkpoint: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `(out_features, in_features)`; finite.
    pub weight: Mat<f32>,
    /// One number for each output feature.
    pub bias: Option<Vec<f32>>,
}

impl Checkpoint {
    /// Opens a model and checks everything in it, reading each weight once: what is opened can be loaded.
    /// The weights are mapped, not read into memory: do not change the files meanwhile.
    ///
    /// `path` is a folder, or a GGUF file of any name: one that starts with the bytes `GGUF`. A folder that has
    /// no safetensors may hold one GGUF model under its own name. Of a model in several parts
    /// (`NAME-00001-of-00003.gguf`) any part will do. config.json and tokenizer.json beside a GGUF file are
    /// used, and must not contradict its metadata; without them the metadata serve.
    ///
    /// # Errors
    /// One that names the file and the tensor, field or key: [`Error::Io`], [`Error::File`],
    /// [`Error::Config`], [`Error::Format`], [`Error::TensorShape`], [`Error::TensorUnknown`] or
    /// [`Error::NotFinite`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let folder = path.as_ref();
        if let Some(files) = gguf_files::find(folder)? {
            return Self::open_gguf(folder, &files).map_err(|e| match e {
                // What this decoder does not know is no reason to read the tensors alone, under other names.
                Error::Tokenizer { file, reason } => Error::File { file, reason },
                Error::Config { file, field, expected, got } => {
                    Error::File { file, reason: format!("{field}: expected {expected}, got {got}") }
                }
                e => e,
            });
        }
        check_folder(folder)?;
        let path = |file: &str| folder.join(file);
        let name = |file: &str| path(file).display().to_string();
        let json = read(&path("config.json"))?;
        let config = Config::parse(&name("config.json"), &json)?;
        let tokenizer_json = read(&path("tokenizer.json"))?;
        let tokenizer = Tokenizer::parse(&name("tokenizer.json"), &tokenizer_json)?;
        let (tensors, quantization) = (Tensors::open(folder)?, quantization_config(folder)?);
        let texts = Texts { config: value(&json), tokenizer: tokenizer_json, gguf: false };
        Self::new(folder.display().to_string(), config, quantization, tokenizer, tensors, texts)
    }

    /// `files` are all parts of what `path`, one of them or their folder, stands for.
    fn open_gguf(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let (parts, maps) = Tensors::map_gguf(files)?;
        let parts = GgufFiles::new(parts)?;
        let description = Description::of(&parts)?;
        let beside = |name: &str| files[0].with_file_name(name);
        let present = |file: &Path| file.exists().then(|| read(file)).transpose();

        let file = beside("config.json");
        let (config, config_json) = match present(&file)? {
            Some(bytes) => {
                let (file, json) = (file.display().to_string(), value(&bytes));
                let config = Config::parse(&file, &bytes)?;
                description.agree(&parts, &file, &json, &config)?;
                (config, json)
            }
            None => (description.config.clone(), description.json.clone()),
        };
        let file = beside("tokenizer.json");
        let (tokenizer, tokenizer_json) = match present(&file)? {
            Some(bytes) => {
                let file = file.display().to_string();
                let tokenizer = Tokenizer::parse(&file, &bytes)?;
                gguf_tokenizer::agree(&parts, &file, &value(&bytes))?;
                (tokenizer, bytes)
            }
            None => {
                let (json, lacking) = gguf_tokenizer::json(&parts)?;
                let bytes = json.to_string().into_bytes();
                (Tokenizer::parse(parts.file(), &bytes)?.lacking(lacking), bytes)
            }
        };
        let tensors = Tensors::of(GgufModel::new(parts, &description)?, maps);
        let texts = Texts { config: config_json, tokenizer: tokenizer_json, gguf: true };
        // Its own tensors show how each layer is stored.
        let quantization = QuantizationConfig::default();
        Self::new(path.display().to_string(), config, quantization, tokenizer, tensors, texts)
    }

    /// The same from the contents of the three files, for a model that is part of a program; error
    /// messages call it `name`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(
        name: &str,
        config: &[u8],
        safetensors: impl Into<Cow<'static, [u8]>>,
        tokenizer: &[u8],
    ) -> Result<Self> {
        let quantization = parse(config)?.unwrap_or_default();
        let texts = Texts { config: value(config), tokenizer: tokenizer.into(), gguf: false };
        let config = Config::parse(&format!("{name}/config.json"), config)?;
        let tokenizer = Tokenizer::parse(&format!("{name}/tokenizer.json"), tokenizer)?;
        let tensors = Safetensors::new(format!("{name}/model.safetensors"), safetensors.into())?;
        let tensors = Tensors::of(tensors, Vec::new());
        Self::new(name.into(), config, quantization, tokenizer, tensors, texts)
    }

    fn new(
        name: String,
        config: Config,
        quantization: QuantizationConfig,
        tokenizer: Tokenizer,
        tensors: Tensors,
        texts: Texts,
    ) -> Result<Self> {
        let notes = Vec::new();
        let mut checkpoint = Self { name, config, tokenizer, tensors, quantization, notes, texts };
        checkpoint.notes = checkpoint.check()?;
        Ok(checkpoint)
    }

    /// What is done without, of all that the files ask for, such as an FP8 KV cache: sentences to be shown
    /// to whoever runs the model.
    ///
    /// # Example
    /// ```no_run
    /// for note in lowbit_lm::Checkpoint::open("Llama-3.1-8B-FP8-KV")?.notes() {
    ///     eprintln!("note: {note}");
    /// }
    /// # Ok::<(), lowbit_lm::Error>(())
    /// ```
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The folder or file, or the name given to [`from_bytes`](Self::from_bytes).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What config.json says.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What tokenizer.json says.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// A config.json of the model: its own, or what the metadata of a GGUF file say.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no config.json can say what the metadata do.
    ///
    /// # Example
    /// ```no_run
    /// let checkpoint = lowbit_lm::Checkpoint::open("model.gguf")?;
    /// std::fs::write("config.json", checkpoint.config_json()?.to_string()).unwrap();
    /// std::fs::write("tokenizer.json", checkpoint.tokenizer_json()).unwrap();
    /// # Ok::<(), lowbit_lm::Error>(())
    /// ```
    pub fn config_json(&self) -> Result<Value> {
        Description::config_json(&self.texts.config, &self.config)
    }

    /// A tokenizer.json of the model: its own, or what the metadata of a GGUF file say.
    pub fn tokenizer_json(&self) -> &[u8] {
        &self.texts.tokenizer
    }

    /// Do the weights come from GGUF files?
    pub fn is_gguf(&self) -> bool {
        self.texts.gguf
    }

    /// The tensors as they are stored.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The linear layers that a model may swap, from first to last: q, k, v, o, gate, up and down
    /// of each block. Embedding and head are not among them.
    pub fn linear_names(&self) -> Vec<String> {
        let linears = |layer| block_linears(&self.config, layer).map(|spec| spec.name);
        (0..self.config.num_hidden_layers).flat_map(linears).collect()
    }

    /// The tensors that belong to none of the [`linear_names`](Self::linear_names): embedding, norms and
    /// head.
    pub fn other_names(&self) -> Vec<&str> {
        let linears = self.linear_names();
        let of_a_linear = |tensor: &str| {
            tensor.rmatch_indices('.').any(|(dot, _)| linears.iter().any(|l| *l == tensor[..dot]))
        };
        self.tensors.names().into_iter().filter(|name| !of_a_linear(name)).collect()
    }

    /// The linear layer called `name` as it is stored, if it is quantized.
    ///
    /// # Errors
    /// [`Error::Format`] if its tensors make no layer.
    pub fn quantized(&self, name: &str) -> Result<Option<QLinear>> {
        Ok(self.stored(name)?.map(|stored| stored.layer))
    }

    /// The same with how it is stored.
    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        let Some(mut stored) = self.quantization.read(&self.tensors, name)? else {
            return Ok(None);
        };
        let bias = stored.layer.bias();
        if bias.is_some_and(is_zero) && !self.expects_bias(name) {
            let plain = stored.layer.clone().with_bias(None);
            stored.layer = plain.map_err(|cause| Error::Layer { layer: name.into(), cause })?;
        }
        Ok(Some(stored))
    }

    /// Does config.json announce a bias of the layer called `name`?
    fn expects_bias(&self, name: &str) -> bool {
        let block = name.split('.').nth(2).and_then(|block| block.parse().ok()).unwrap_or(0);
        block_linears(&self.config, block).iter().any(|spec| spec.name == name && spec.bias)
    }

    /// The weights of the linear layer called `name`, one of [`linear_names`](Self::linear_names),
    /// in f32; those that a quantized layer computes with.
    ///
    /// # Errors
    /// [`Error::Format`] if there is none.
    pub fn linear(&self, name: &str) -> Result<LinearWeights> {
        if let Some(layer) = self.quantized(name)? {
            let weight = layer.effective_weight();
            return Ok(LinearWeights {
                name: name.into(),
                weight: weight.map_err(|cause| Error::Layer { layer: name.into(), cause })?,
                bias: layer.bias().map(<[f32]>::to_vec),
            });
        }
        let bias = format!("{name}.bias");
        let has_bias = self.expects_bias(name);
        Ok(LinearWeights {
            name: name.into(),
            weight: self.matrix(&format!("{name}.weight"))?,
            bias: has_bias.then(|| self.vector(&bias)).transpose()?,
        })
    }

    /// Rows of the embedding, `(tokens, hidden_size)`.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        if let Some(layer) = self.quantized_matrix(EMBEDDING)? {
            let vocab_size = self.config.vocab_size;
            if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
                return Err(Error::Token { token, vocab_size });
            }
            let mut rows = Mat::zeros(tokens.len(), self.config.hidden_size);
            let done = layer.weight().dequantize_rows(tokens, rows.as_mut());
            done.map_err(|cause| Error::Layer { layer: EMBEDDING.into(), cause })?;
            return Ok(rows.data().to_vec());
        }
        let all = self.tensors.tensor(EMBEDDING)?;
        let len = all.bytes.len() / self.config.vocab_size;
        let mut rows = Vec::with_capacity(tokens.len() * self.config.hidden_size);
        for &token in tokens {
            let row = all.bytes.chunks_exact(len.max(1)).nth(token as usize);
            let vocab_size = self.config.vocab_size;
            let bytes = row.ok_or(Error::Token { token, vocab_size })?;
            rows.extend(TensorView { bytes, ..all }.to_f32()?);
        }
        Ok(rows)
    }

    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.tensors.tensor(name)?.to_f32()?)
    }

    /// The layer of a weight called `name`, embedding or head, if it is quantized.
    fn quantized_matrix(&self, name: &str) -> Result<Option<QLinear>> {
        match self.tensors.tensor(name).map(|tensor| tensor.dtype) {
            // These are decoded from where they are.
            Ok(Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::Ggml(_)) => Ok(None),
            _ => self.quantized(name.strip_suffix(".weight").unwrap_or(name)),
        }
    }

    pub(crate) fn matrix(&self, name: &str) -> Result<Mat<f32>> {
        if let Some(layer) = self.quantized_matrix(name)? {
            let weight = layer.effective_weight();
            return weight.map_err(|cause| Error::Layer { layer: name.into(), cause });
        }
        let tensor = self.tensors.tensor(name)?;
        let [rows, cols] = *tensor.shape else {
            return Err(Error::TensorShape {
                file: tensor.file.into(),
                tensor: name.into(),
                expected: vec![0, 0],
                got: tensor.shape.into(),
            });
        };
        Mat::new(tensor.to_f32()?, rows, cols)
            .map_err(|cause| Error::Layer { layer: name.into(), cause })
    }

    /// Are all tensors there, of the right shape and type, finite, and no others? Gives what is to be noted.
    fn check(&self) -> Result<Vec<String>> {
        let c = &self.config;
        let mut checked = Checked::default();
        self.check_matrix(EMBEDDING, (c.vocab_size, c.hidden_size), &mut checked)?;
        for layer in 0..c.num_hidden_layers {
            // What the blocks before had in memory is not looked at again.
            self.tensors.release();
            for norm in block_norms(layer) {
                self.check_tensor(&norm, &[c.hidden_size])?;
                checked.known.insert(norm);
            }
            for spec in block_linears(c, layer) {
                self.check_linear(spec, &mut checked)?;
            }
        }
        self.check_tensor(NORM, &[c.hidden_size])?;
        checked.known.insert(NORM.into());
        if !c.tie_word_embeddings {
            self.check_matrix(HEAD, (c.vocab_size, c.hidden_size), &mut checked)?;
        }
        self.check_others(&mut checked)?;
        if let Some(method) = self.quantization.method()
            && checked.quantized.is_empty()
        {
            return Err(Error::Invalid(format!(
                "{}: the quantization_config says {method}, but no layer is quantized: take it out of \
                 config.json if the weights are right as they are",
                self.name
            )));
        }
        let notes = checked.notes.into_iter().map(String::from);
        let all: BTreeSet<_> = notes.chain(self.quantization.notes().iter().cloned()).collect();
        Ok(all.into_iter().collect())
    }

    fn check_linear(&self, spec: LinearSpec, checked: &mut Checked) -> Result<()> {
        let LinearSpec { name, shape, bias } = spec;
        if let Some(Stored { layer, notes, .. }) = self.stored(&name)? {
            let got = (layer.weight().rows(), layer.weight().cols());
            if got != shape {
                return Err(Error::LayerShape { layer: name, expected: shape, got });
            }
            match (bias, layer.bias()) {
                (true, None) => {
                    self.tensors.tensor(&format!("{name}.bias"))?;
                }
                (false, Some(_)) => return Err(self.unexpected_bias(&name)),
                (true, Some(_)) | (false, None) => {}
            }
            checked.notes.extend(notes);
            checked.quantized.insert(name);
            return Ok(());
        }
        let (weight, own) = (format!("{name}.weight"), format!("{name}.bias"));
        self.check_tensor(&weight, &[shape.0, shape.1])?;
        checked.known.insert(weight);
        if bias {
            self.check_tensor(&own, &[shape.0])?;
            checked.known.insert(own);
        }
        Ok(())
    }

    fn unexpected_bias(&self, layer: &str) -> Error {
        Error::Invalid(format!(
            "{}: tensor {layer}.bias is not zero, but config.json announces no bias there: set \
             attention_bias or mlp_bias if the model has one",
            self.name
        ))
    }

    /// Embedding or head.
    fn check_matrix(&self, name: &str, shape: (usize, usize), checked: &mut Checked) -> Result<()> {
        let layer = name.strip_suffix(".weight").unwrap_or(name);
        let Some(quantized) = self.quantized_matrix(name)? else {
            self.check_tensor(name, &[shape.0, shape.1])?;
            checked.known.insert(name.into());
            return Ok(());
        };
        let got = (quantized.weight().rows(), quantized.weight().cols());
        if got != shape {
            return Err(Error::LayerShape { layer: layer.into(), expected: shape, got });
        }
        // Only their weights are looked at.
        if quantized.bias().is_some() {
            return Err(self.unexpected_bias(layer));
        }
        if name == EMBEDDING && !quantized.transforms().is_empty() {
            return Err(Error::Invalid(format!(
                "{layer}: expected an embedding without a transform of its input"
            )));
        }
        checked.quantized.insert(layer.into());
        Ok(())
    }

    /// An ignored tensor, such as a bias that config.json does not announce, would silently give wrong
    /// results. Two are known to be redundant: rotary frequencies, and a tied head.
    fn check_others(&self, checked: &mut Checked) -> Result<()> {
        for name in self.tensors.names() {
            let of_layer =
                name.match_indices('.').any(|(dot, _)| checked.quantized.contains(&name[..dot]));
            let redundant = name.ends_with(".rotary_emb.inv_freq") || name == HEAD;
            if of_layer || redundant || checked.known.contains(name) {
                continue;
            }
            if let Some(note) = self.quantization.passes_over(name) {
                checked.notes.insert(note);
                continue;
            }
            let file = self.tensors.tensor(name)?.file.to_string();
            let tensor = name.to_string();
            let beside = |(dot, _)| checked.known.contains(&format!("{}.weight", &name[..dot]));
            return Err(match name.match_indices('.').any(beside) && !name.ends_with(".bias") {
                true => Error::Format(formats::Error::Tensor {
                    file,
                    tensor,
                    reason: "it lies beside weights in floats, to which it might mean something: it is not \
                             known"
                        .into(),
                }),
                false => Error::TensorUnknown { file, tensor },
            });
        }
        Ok(())
    }

    fn check_tensor(&self, name: &str, expected: &[usize]) -> Result<()> {
        let tensor = self.tensors.tensor(name)?;
        if tensor.shape != expected {
            return Err(Error::TensorShape {
                file: tensor.file.into(),
                tensor: name.into(),
                expected: expected.into(),
                got: tensor.shape.into(),
            });
        }
        let Some(mut index) = tensor.first_not_finite()? else { return Ok(()) };
        let mut position = vec![0; expected.len()];
        for (at, &size) in position.iter_mut().zip(expected).rev() {
            *at = index % size;
            index /= size;
        }
        Err(Error::NotFinite { file: tensor.file.into(), tensor: name.into(), position })
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, config, tokenizer, tensors: _, quantization, notes, texts: _ } = self;
        f.debug_struct("Checkpoint")
            .field("name", name)
            .field("config", config)
            .field("tokenizer", tokenizer)
            .field("quantization", quantization)
            .field("notes", notes)
            .finish_non_exhaustive()
    }
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// A linear layer that config.json asks for.
pub(crate) struct LinearSpec {
    pub(crate) name: String,
    /// `(out_features, in_features)`.
    pub(crate) shape: (usize, usize),
    pub(crate) bias: bool,
}

/// q, k, v, o, gate, up and down of block `layer`.
pub(crate) fn block_linears(c: &Config, layer: usize) -> [LinearSpec; 7] {
    let (hidden, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.q_size(), c.kv_size());
    [
        ("self_attn.q_proj", (q, hidden), c.qkv_bias),
        ("self_attn.k_proj", (kv, hidden), c.qkv_bias),
        ("self_attn.v_proj", (kv, hidden), c.qkv_bias),
        ("self_attn.o_proj", (hidden, q), c.o_bias),
        ("mlp.gate_proj", (inner, hidden), c.mlp_bias),
        ("mlp.up_proj", (inner, hidden), c.mlp_bias),
        ("mlp.down_proj", (hidden, inner), c.mlp_bias),
    ]
    .map(|(name, shape, bias)| LinearSpec {
        name: format!("model.layers.{layer}.{name}"),
        shape,
        bias,
    })
}

/// The gains before attention and before the MLP of block `layer`.
pub(crate) fn block_norms(layer: usize) -> [String; 2] {
    ["input_layernorm", "post_attention_layernorm"]
        .map(|norm| format!("model.layers.{layer}.{norm}.weight"))
}

/// What is no JSON is refused by the parsers of config.json and tokenizer.json.
fn value(json: &[u8]) -> Value {
    serde_json::from_slice(json).unwrap_or_default()
}

/// Says what to give instead of what is no folder.
fn check_folder(path: &Path) -> Result<()> {
    let data = std::fs::metadata(path).map_err(|cause| Error::Io { path: path.into(), cause })?;
    match data.is_dir() {
        true => Ok(()),
        false => Err(Error::File {
            file: path.display().to_string(),
            reason: "expected the folder of a model or a GGUF file, got another file: give the folder that it is in"
                .into(),
        }),
    }
}

/// What has been checked.
#[derive(Default)]
struct Checked {
    /// Tensors.
    known: BTreeSet<String>,
    /// Layers, which know all tensors under their names.
    quantized: BTreeSet<String>,
    notes: BTreeSet<&'static str>,
}

fn is_zero(numbers: &[f32]) -> bool {
    numbers.iter().all(|&x| x == 0.0)
}

/// What the config.json of a folder, or a file beside it such as quantize_config.json, says of quantized
/// layers; the default if nothing does.
///
/// # Errors
/// [`Error::Io`], [`Error::File`], or [`Error::Format`] for a configuration that is not supported.
///
/// # Example
/// ```no_run
/// let config = lowbit_lm::quantization_config("Llama-2-7B-GPTQ".as_ref())?;
/// assert_eq!(config.method(), Some("gptq"));
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
pub fn quantization_config(folder: &Path) -> Result<QuantizationConfig> {
    let config = folder.join("config.json");
    if config.exists()
        && let Some(found) = parse(&read(&config)?)?
    {
        return Ok(found);
    }
    for file in QuantizationConfig::FILES.map(|file| folder.join(file)) {
        if !file.exists() {
            continue;
        }
        let json: Value = serde_json::from_slice(&read(&file)?).map_err(|e| Error::File {
            file: file.display().to_string(),
            reason: format!("expected a JSON text, but {e}"),
        })?;
        return Ok(QuantizationConfig::parse(&json)?);
    }
    Ok(QuantizationConfig::default())
}

/// What a config.json says of quantized layers.
fn parse(json: &[u8]) -> Result<Option<QuantizationConfig>> {
    // What is no JSON is refused by the parser of the rest.
    let config: Option<Value> = serde_json::from_slice(json).ok();
    let found = config.as_ref().map(QuantizationConfig::from_model).transpose()?;
    Ok(found.flatten())
}
