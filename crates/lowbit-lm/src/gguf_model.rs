//! A model of the Llama family in GGUF: its shape, from the metadata, and its tensors under the names, and in
//! the order of rows, of a checkpoint.
//!
//! `general.architecture` says which model it is. In `llama` the rows of q and k, weights and biases, are
//! sorted for rotary pairs of neighbours, and are sorted back here; in `qwen2` they stay where they are.
//! Every key of the architecture is used, known to be harmless, or refused by its name: llama.cpp reads keys
//! that change what a model computes, and older programs would not notice.

use std::collections::{BTreeMap, BTreeSet};

use lowbit::formats::{
    self, Tensor, TensorSource, TensorView,
    gguf::{Array, Value},
};
use serde_json::{Value as Json, json};

use crate::{
    Config, Error, Result,
    gguf_files::GgufFiles,
    llama_gguf::{checkpoint_name, sort_rows},
    rope::Rope,
};

/// The tensor of the numbers that rotary frequencies are divided by.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Which model a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    Llama,
    Qwen2,
}

impl Architecture {
    fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// Keys behind the architecture's name that [`Description::of`] looks at.
const USED: [&str; 28] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "embedding_scale",
    "feed_forward_length",
    "logit_scale",
    "residual_scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "vocab_size",
];

/// Keys that llama.cpp does not look at in these architectures, or only to show them.
const HARMLESS: [&str; 2] = ["attention.layer_norm_epsilon", "rope.scaling.finetuned"];

/// Keys of what this decoder does not compute; without effect if they are 0 or false.
const OFF: [&str; 18] = [
    "attention.clamp_kqv",
    "attention.kv_lora_rank",
    "attention.max_alibi_bias",
    "attention.q_lora_rank",
    "attention.shared_kv_layers",
    "attn_logit_softcapping",
    "expert_count",
    "expert_feed_forward_length",
    "expert_group_count",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_used_count",
    "final_logit_softcapping",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "pooling_type",
    "rope.scaling.yarn_log_multiplier",
    "use_parallel_residual",
];

/// What the metadata say of a model.
pub(crate) struct Description {
    pub(crate) architecture: Architecture,
    pub(crate) config: Config,
    /// What a config.json would say; without the factors of rotary frequencies.
    pub(crate) json: Json,
}

/// What the metadata say under a key, and config.json in a field.
struct Fact {
    field: &'static str,
    key: String,
    expected: String,
    got: String,
}

impl Description {
    /// # Errors
    /// [`Error::File`] naming the key that is missing, contradictory or not known, with its value.
    pub(crate) fn of<S: AsRef<[u8]>>(files: &GgufFiles<S>) -> Result<Self> {
        let architecture = architecture(files)?;
        let metadata = Metadata { files, architecture };
        metadata.check_keys()?;
        let hidden = metadata.size("embedding_length")?;
        let context = metadata.size("context_length")?;
        let heads = metadata.size("attention.head_count")?;
        let head_dim = match metadata.get("attention.key_length") {
            Some(_) => metadata.size("attention.key_length")?,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a divisor of embedding_length, {hidden}");
                return Err(metadata.wrong("attention.head_count", &expected));
            }
        };
        let vocab_size = metadata.vocab_size()?;
        let names: BTreeSet<_> = files.names().into_iter().collect();
        let bias = |layer: &str| names.contains(format!("blk.0.{layer}.bias").as_str());
        let llama = architecture == Architecture::Llama;
        let (qkv, o, mlp) = (bias("attn_q"), bias("attn_output"), bias("ffn_gate"));
        // A Llama with biases on q, k and v alone is what is called Qwen2 elsewhere.
        let class = match llama && (o || !qkv) {
            true => "LlamaForCausalLM",
            false => "Qwen2ForCausalLM",
        };
        let json = json!({
            "architectures": [class],
            "model_type": if class.starts_with("Llama") { "llama" } else { "qwen2" },
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": metadata.size("feed_forward_length")?,
            "num_hidden_layers": metadata.size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": match metadata.get("attention.head_count_kv") {
                None => heads,
                Some(_) => metadata.size("attention.head_count_kv")?,
            },
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": context,
            "rms_norm_eps": decimal(metadata.positive("attention.layer_norm_rms_epsilon", None)?),
            "rope_theta": decimal(metadata.positive("rope.freq_base", Some(10000.0))?),
            "rope_scaling": metadata.rope_scaling(context)?,
            "tie_word_embeddings": !names.contains("output.weight"),
            "attention_bias": llama && qkv,
            "mlp_bias": llama && mlp,
            "bos_token_id": metadata.token("bos_token_id", Some(1), vocab_size)?,
            "eos_token_id": metadata.ends(vocab_size)?,
        });
        metadata.check_neutral(head_dim, context)?;
        let mut config = Config::parse(files.file(), json.to_string().as_bytes())?;
        config.rope_factors = metadata.rope_factors(head_dim)?;
        if config.rope_factors.is_some() && config.rope_scaling.is_some() {
            let reason =
                format!("it has both {ROPE_FACTORS} and {}", metadata.key("rope.scaling.type"));
            return Err(files.wrong(format!("{reason}, of which at most one is expected")));
        }
        Ok(Self { architecture, config, json })
    }

    /// Does config.json, which messages call `file` and which says `config`, speak of this model?
    ///
    /// # Errors
    /// [`Error::Config`] naming the field and both values.
    pub(crate) fn agree<S: AsRef<[u8]>>(
        &self,
        files: &GgufFiles<S>,
        file: &str,
        json: &Json,
        config: &Config,
    ) -> Result<()> {
        let facts = self.facts(json, config);
        let mut differing = facts.into_iter().find(|fact| fact.expected != fact.got);
        // A head that is a copy of the embedding agrees with a config.json that has none.
        let head = |fact: &Fact| fact.field == "tie_word_embeddings" && fact.got == "true";
        if differing.as_ref().is_some_and(head) && head_is_embedding(files)? {
            differing = None;
        }
        let Some(Fact { field, key, expected, got }) = differing.or_else(|| self.rope(config))
        else {
            return Ok(());
        };
        Err(Error::Config {
            file: file.into(),
            field,
            expected: format!("{expected}, by {key} of {}", files.file()),
            got: format!("{got}: mend it, or move it away to go by the GGUF file alone"),
        })
    }

    /// What both say of themselves, but for rotary frequencies; the head last.
    fn facts(&self, json: &Json, c: &Config) -> Vec<Fact> {
        fn fact<T: ToString>(field: &'static str, key: impl Into<String>, m: T, c: T) -> Fact {
            Fact { field, key: key.into(), expected: m.to_string(), got: c.to_string() }
        }
        let m = &self.config;
        let name = self.architecture.name();
        let key = |key: &str| format!("{name}.{key}");
        let bias = |layer: &str| format!("blk.0.{layer}.bias");
        let token = |token: Option<u32>| token.map_or("none".into(), |token| token.to_string());
        let is_qwen2 = match &json["architectures"] {
            Json::Null => json["model_type"] == "qwen2",
            classes => classes[0] == "Qwen2ForCausalLM",
        };
        let architecture = if is_qwen2 { Architecture::Qwen2 } else { Architecture::Llama };
        // Which of several, config.json does not say.
        let eos = m.eos_token_id.first().copied();
        let c_eos =
            eos.filter(|eos| c.eos_token_id.contains(eos)).or(c.eos_token_id.first().copied());
        let quantization = &json["quantization_config"];
        vec![
            fact("architectures", "general.architecture", name, architecture.name()),
            fact("quantization_config", "the tensors", &Json::Null, quantization),
            fact("hidden_size", key("embedding_length"), m.hidden_size, c.hidden_size),
            fact(
                "intermediate_size",
                key("feed_forward_length"),
                m.intermediate_size,
                c.intermediate_size,
            ),
            fact("num_hidden_layers", key("block_count"), m.num_hidden_layers, c.num_hidden_layers),
            fact(
                "num_attention_heads",
                key("attention.head_count"),
                m.num_attention_heads,
                c.num_attention_heads,
            ),
            fact(
                "num_key_value_heads",
                key("attention.head_count_kv"),
                m.num_key_value_heads,
                c.num_key_value_heads,
            ),
            fact("head_dim", key("attention.key_length"), m.head_dim, c.head_dim),
            fact("vocab_size", key("vocab_size"), m.vocab_size, c.vocab_size),
            fact(
                "max_position_embeddings",
                key("context_length"),
                m.max_position_embeddings,
                c.max_position_embeddings,
            ),
            fact(
                "rms_norm_eps",
                key("attention.layer_norm_rms_epsilon"),
                m.rms_norm_eps,
                c.rms_norm_eps,
            ),
            fact("attention_bias", bias("attn_q"), m.qkv_bias, c.qkv_bias),
            fact("attention_bias", bias("attn_output"), m.o_bias, c.o_bias),
            fact("mlp_bias", bias("ffn_gate"), m.mlp_bias, c.mlp_bias),
            fact(
                "bos_token_id",
                "tokenizer.ggml.bos_token_id",
                token(m.bos_token_id),
                token(c.bos_token_id.filter(|_| m.bos_token_id.is_some())),
            ),
            fact(
                "eos_token_id",
                "tokenizer.ggml.eos_token_id",
                token(eos),
                token(c_eos.filter(|_| eos.is_some())),
            ),
            fact(
                "tie_word_embeddings",
                "output.weight",
                m.tie_word_embeddings,
                c.tie_word_embeddings,
            ),
        ]
    }

    /// Where rotary frequencies differ: they may be stretched by a rule there and by numbers here.
    fn rope(&self, config: &Config) -> Option<Fact> {
        let (here, there) = (Rope::new(&self.config), Rope::new(config));
        let here = here.frequencies.iter().chain([&here.scale]);
        let there = there.frequencies.iter().chain([&there.scale]);
        let (m, c) = here.zip(there).find(|(m, c)| (*m - *c).abs() > 1e-5 * c.abs())?;
        let name = self.architecture.name();
        Some(Fact {
            field: "rope_theta and rope_scaling",
            key: format!("{name}.rope.freq_base, {name}.rope.scaling and {ROPE_FACTORS}"),
            expected: format!("rotary frequencies with {m}"),
            got: c.to_string(),
        })
    }

    /// What a config.json says of the model, to be written.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no config.json can say it.
    pub(crate) fn config_json(json: &Json, config: &Config) -> Result<Json> {
        let mut json = json.clone();
        if let Some(factors) = &config.rope_factors {
            json["rope_scaling"] = llama3(config, factors).ok_or_else(|| {
                Error::Invalid(format!(
                    "no rope_scaling of config.json gives the rotary frequencies of {ROPE_FACTORS}: put the model's own config.json beside the GGUF file"
                ))
            })?;
        }
        Ok(json)
    }
}

/// The architecture of a file that holds a whole model.
fn architecture<S: AsRef<[u8]>>(files: &GgufFiles<S>) -> Result<Architecture> {
    let kind = files.get("general.type");
    if let Some(kind) = kind.filter(|kind| kind.as_str() != Some("model")) {
        let reason =
            format!("general.type: expected \"model\", got {kind}: give the file of the model");
        return Err(files.wrong(reason));
    }
    let version = files.get("general.quantization_version");
    if let Some(version) = version.filter(|version| version.as_u64() != Some(2)) {
        let reason = format!(
            "general.quantization_version: expected 2, got {version}: convert the model anew"
        );
        return Err(files.wrong(reason));
    }
    if let Some(key) = files.keys().find(|key| key.starts_with("adapter.")) {
        return Err(files.wrong(format!("{key} is there: it is an adapter, expected a model")));
    }
    let found = files.get("general.architecture");
    match found.as_ref().and_then(Value::as_str) {
        Some("llama") => Ok(Architecture::Llama),
        Some("qwen2") => Ok(Architecture::Qwen2),
        _ => {
            let got = found.map_or("nothing".into(), |got| got.to_string());
            Err(files
                .wrong(format!("general.architecture: expected \"llama\" or \"qwen2\", got {got}")))
        }
    }
}

/// Is output.weight a copy of the embedding?
fn head_is_embedding<S: AsRef<[u8]>>(files: &GgufFiles<S>) -> Result<bool> {
    let (embedding, head) = (files.tensor("token_embd.weight")?, files.tensor("output.weight")?);
    Ok((embedding.dtype, embedding.bytes) == (head.dtype, head.bytes))
}

/// An f32 as the decimal number that a config.json has: 1e-5, not 9.999999747378752e-6.
fn decimal(x: f32) -> Json {
    x.to_string().parse().map_or(Json::Null, |x: f64| x.into())
}

/// The metadata under the name of an architecture.
struct Metadata<'a, S> {
    files: &'a GgufFiles<S>,
    architecture: Architecture,
}

impl<S: AsRef<[u8]>> Metadata<'_, S> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    fn get(&self, key: &str) -> Option<Value<'_>> {
        self.files.get(&self.key(key))
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        self.wrong_full(&self.key(key), expected)
    }

    fn wrong_full(&self, key: &str, expected: &str) -> Error {
        let got = self.files.get(key).map_or("nothing".into(), |got| got.to_string());
        self.files.wrong(format!("{key}: expected {expected}, got {got}"))
    }

    /// A number that must be there; one for each layer, if they are the same.
    fn size(&self, key: &str) -> Result<usize> {
        const MAX: u64 = 1 << 24;
        let value = self.get(key);
        let number = match value.as_ref().and_then(Value::as_array) {
            Some(array) => {
                let mut items = array.iter();
                let first = items.next().and_then(|item| item.as_u64());
                if !items.all(|item| item.as_u64() == first) {
                    return Err(self.wrong(key, "the same number for all layers"));
                }
                first
            }
            None => value.and_then(|value| value.as_u64()),
        };
        match number {
            Some(number @ 1..=MAX) => Ok(number as usize),
            _ => Err(self.wrong(key, &format!("an integer from 1 to {MAX}"))),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().or(value.as_u64().map(|x| x as f64));
        match number.map(|x| x as f32).filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(key, "a number")),
        }
    }

    fn positive(&self, key: &str, default: Option<f32>) -> Result<f32> {
        match self.number(key)?.or(default) {
            Some(x) if x > 0.0 => Ok(x),
            _ => Err(self.wrong(key, "a positive number")),
        }
    }

    /// Rows of the embedding; the metadata need not say how many.
    fn vocab_size(&self) -> Result<usize> {
        let embedding = self.files.tensor("token_embd.weight")?;
        let rows = embedding.shape.first().copied().unwrap_or(0);
        match self.get("vocab_size") {
            Some(size) if size.as_u64() != Some(rows as u64) => {
                Err(self.wrong("vocab_size", &format!("{rows}, the rows of token_embd.weight")))
            }
            _ => Ok(rows),
        }
    }

    /// A special token of the tokenizer; `default` in the vocabularies of sentencepiece, which need not name it.
    fn token(&self, key: &str, default: Option<u32>, vocab_size: usize) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{key}");
        let llama = self.files.get("tokenizer.ggml.model");
        let default =
            default.filter(|_| llama.is_some_and(|model| model.as_str() == Some("llama")));
        match self.files.get(&key).map(|value| value.as_u64()) {
            None => Ok(default.filter(|&id| (id as usize) < vocab_size)),
            Some(Some(id)) if id < vocab_size as u64 => Ok(Some(id as u32)),
            Some(_) => Err(self.wrong_full(&key, &format!("a token below {vocab_size}"))),
        }
    }

    /// The tokens that end a text.
    fn ends(&self, vocab_size: usize) -> Result<Vec<u32>> {
        let mut ends = Vec::new();
        for (key, default) in
            [("eos_token_id", Some(2)), ("eot_token_id", None), ("eom_token_id", None)]
        {
            ends.extend(self.token(key, default, vocab_size)?.filter(|id| !ends.contains(id)));
        }
        Ok(ends)
    }

    fn check_keys(&self) -> Result<()> {
        let prefix = self.key("");
        for key in self.files.keys().filter_map(|key| key.strip_prefix(&prefix)) {
            if OFF.contains(&key) {
                let value = self.get(key);
                if !value.as_ref().is_some_and(is_off) {
                    return Err(self.wrong(key, "0, for what this decoder does not compute"));
                }
            } else if !USED.contains(&key) && !HARMLESS.contains(&key) {
                return Err(self.wrong(key, "no such key, whose meaning is not known here"));
            }
        }
        Ok(())
    }

    /// Are those that this decoder computes in one way only set to that?
    fn check_neutral(&self, head_dim: usize, context: usize) -> Result<()> {
        for key in ["rope.dimension_count", "attention.value_length"] {
            if self.get(key).is_some() && self.size(key)? != head_dim {
                return Err(self.wrong(key, &format!("the width of a head, {head_dim}")));
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let yarn = self.get("rope.scaling.type").is_some_and(|kind| kind.as_str() == Some("yarn"));
        let factor = (!yarn).then_some(("rope.scaling.attn_factor", 1.0));
        for (key, neutral) in [
            ("attention.scale", scale),
            ("embedding_scale", 1.0),
            ("logit_scale", 1.0),
            ("residual_scale", 1.0),
            ("rope.scaling.yarn_attn_factor", 1.0),
            ("rope.scaling.yarn_ext_factor", 1.0),
        ]
        .into_iter()
        .chain(factor)
        {
            let number = self.number(key)?.filter(|&x| x != 0.0);
            if number.is_some_and(|x| (x - neutral).abs() > 1e-6 * neutral) {
                return Err(self.wrong(key, &format!("{neutral}, or none")));
            }
        }
        let window = self.get("attention.sliding_window").filter(|window| !is_off(window));
        if window.is_some_and(|window| window.as_u64().is_none_or(|window| window < context as u64))
        {
            let expected = format!(
                "0 or at least context_length, {context} (sliding windows are not supported)"
            );
            return Err(self.wrong("attention.sliding_window", &expected));
        }
        if self.get("attention.causal").is_some_and(|causal| causal != Value::Bool(true)) {
            return Err(self.wrong("attention.causal", "true"));
        }
        // Both names mean the order of rows that all files of this architecture have.
        let layout = self.get("tensor_data_layout");
        let known = [None, Some("reference"), Some("Meta AI original pth")];
        match known.contains(&layout.as_ref().map(|layout| layout.as_str().unwrap_or(""))) {
            true => Ok(()),
            false => Err(self.wrong("tensor_data_layout", "\"reference\"")),
        }
    }

    /// The `rope_scaling` of a config.json.
    fn rope_scaling(&self, context: usize) -> Result<Json> {
        let given = |key| self.number(key).map(|x| x.filter(|&x| x != 0.0));
        let factor = match (given("rope.scaling.factor")?, given("rope.scale_linear")?) {
            (Some(new), Some(old)) if new != old => {
                return Err(
                    self.wrong("rope.scale_linear", &format!("{new}, as rope.scaling.factor"))
                );
            }
            (new, old) => new.or(old),
        };
        let kind = self.get("rope.scaling.type");
        match (kind.as_ref().map(|kind| kind.as_str().unwrap_or("")), factor) {
            (Some("none"), _) | (None | Some("linear"), None | Some(1.0)) => Ok(Json::Null),
            (None | Some("linear"), Some(factor)) => {
                Ok(json!({"rope_type": "linear", "factor": decimal(factor)}))
            }
            (Some("yarn"), Some(factor)) => {
                let original = match self.get("rope.scaling.original_context_length") {
                    None => context,
                    Some(_) => self.size("rope.scaling.original_context_length")?,
                };
                let mut scaling = json!({
                    "rope_type": "yarn",
                    "factor": decimal(factor),
                    "original_max_position_embeddings": original,
                    "beta_fast": decimal(self.positive("rope.scaling.yarn_beta_fast", Some(32.0))?),
                    "beta_slow": decimal(self.positive("rope.scaling.yarn_beta_slow", Some(1.0))?),
                });
                // Beside the factor of the paper.
                if let Some(more) = given("rope.scaling.attn_factor")?.filter(|more| *more != 1.0) {
                    scaling["attention_factor"] = decimal(more * (1.0 + 0.1 * factor.ln()));
                }
                Ok(scaling)
            }
            (Some("yarn"), None) => Err(self.wrong("rope.scaling.factor", "a positive number")),
            _ => Err(self.wrong("rope.scaling.type", "\"none\", \"linear\" or \"yarn\"")),
        }
    }

    /// What rotary frequencies are divided by, unless it is 1 for all.
    fn rope_factors(&self, head_dim: usize) -> Result<Option<Vec<f32>>> {
        if !self.files.names().contains(&ROPE_FACTORS) {
            return Ok(None);
        }
        let tensor = self.files.tensor(ROPE_FACTORS)?;
        if tensor.shape != [head_dim / 2] {
            return Err(Error::TensorShape {
                file: tensor.file.into(),
                tensor: ROPE_FACTORS.into(),
                expected: vec![head_dim / 2],
                got: tensor.shape.into(),
            });
        }
        let factors = tensor.to_f32()?;
        if let Some((at, bad)) =
            factors.iter().enumerate().find(|(_, x)| !(**x > 0.0 && x.is_finite()))
        {
            let reason = format!("{ROPE_FACTORS}: expected positive numbers, got {bad} at {at}");
            return Err(self.files.wrong(reason));
        }
        Ok(Some(factors).filter(|factors| factors.iter().any(|&x| x != 1.0)))
    }
}

fn is_off(value: &Value<'_>) -> bool {
    let zeros = |array: &Array<'_>| array.iter().all(|item| is_off(&item));
    *value == Value::Bool(false)
        || value.as_u64() == Some(0)
        || value.as_f64() == Some(0.0)
        || value.as_array().is_some_and(zeros)
}

/// The `rope_scaling` of type llama3 that divides rotary frequencies by `factors`, if there is one.
///
/// With `f` turns in the original context, `1/factor = keep + (1 − keep)/largest` where
/// `keep = (f − low)/(high − low)`: a line in the frequency, which two points between the ends tell. Only
/// ratios of low, high and the original context count, so low is 1.
fn llama3(config: &Config, factors: &[f32]) -> Option<Json> {
    let plain = Config { rope_factors: None, rope_scaling: None, ..config.clone() };
    let frequencies_of = Rope::new(&plain).frequencies;
    let largest = factors.iter().copied().fold(1.0, f32::max);
    let keep = |factor: f32| {
        let (factor, largest) = (f64::from(factor), f64::from(largest));
        (1.0 / factor - 1.0 / largest) / (1.0 - 1.0 / largest)
    };
    let mut between: Vec<_> = frequencies_of
        .iter()
        .zip(factors)
        .map(|(&f, &factor)| (f64::from(f), keep(factor)))
        .filter(|(_, keep)| *keep > 1e-4 && *keep < 1.0 - 1e-4)
        .collect();
    between.dedup_by(|a, b| a.0 == b.0);
    let (original, high) = match between.as_slice() {
        // Any context will do that stretches the fastest of the frequencies that are stretched.
        [] => {
            let stretched = frequencies_of.iter().zip(factors).find(|(_, factor)| **factor != 1.0);
            (0.999 / f64::from(*stretched?.0), 4.0)
        }
        // All that is known is one ratio: that of all models so far.
        [(f, keep)] => ((1.0 + 3.0 * keep) / f, 4.0),
        [(f0, k0), .., (f1, k1)] => {
            let slope = (k1 - k0) / (f1 - f0);
            let at_zero = k0 - slope * f0; // −low/(high − low)
            (slope / -at_zero, 1.0 - 1.0 / at_zero)
        }
    };
    let original = (original * std::f64::consts::TAU).round();
    let high = (high * 1e4).round() / 1e4;
    let json = json!({
        "rope_type": "llama3",
        "factor": decimal(largest),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    });
    let mut all = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": config.q_size(), "intermediate_size": 1,
        "num_hidden_layers": 1, "num_attention_heads": config.num_attention_heads,
        "head_dim": config.head_dim, "vocab_size": 1,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": decimal(config.rope_theta),
    });
    all["rope_scaling"] = json.clone();
    let there = Rope::new(&Config::parse("", all.to_string().as_bytes()).ok()?).frequencies;
    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs();
    there.iter().zip(&Rope::new(config).frequencies).all(close).then_some(json)
}

/// GGUF files under the names, and in the order of rows, of a checkpoint.
pub(crate) struct GgufModel<S> {
    files: GgufFiles<S>,
    /// Name in the checkpoint to name in the files.
    names: BTreeMap<String, String>,
    /// Tensors whose rows had to be sorted back.
    sorted: BTreeMap<String, Tensor>,
}

impl<S: AsRef<[u8]>> GgufModel<S> {
    pub(crate) fn new(files: GgufFiles<S>, description: &Description) -> Result<Self> {
        let Description { architecture, config, .. } = description;
        let (mut names, mut sorted) = (BTreeMap::new(), BTreeMap::new());
        for gguf in files.names().into_iter().filter(|name| *name != ROPE_FACTORS) {
            let name = checkpoint_name(gguf).unwrap_or_else(|| gguf.into());
            let of = |part: &str| name.contains(&format!(".self_attn.{part}."));
            let heads = match architecture {
                Architecture::Llama if of("q_proj") => Some(config.num_attention_heads),
                Architecture::Llama if of("k_proj") => Some(config.num_key_value_heads),
                _ => None,
            };
            if let Some(heads) = heads {
                let view = TensorView { name: &name, ..files.tensor(gguf)? };
                let invalid = || files.wrong(format!("{gguf}: its rows do not make {heads} heads"));
                sorted.insert(name.clone(), sort_rows(view, heads, true).ok_or_else(invalid)?);
            }
            if let Some(other) = names.insert(name, gguf.into()) {
                return Err(files.wrong(format!("{gguf} and {other} are the same tensor")));
            }
        }
        Ok(Self { files, names, sorted })
    }
}

impl<S: AsRef<[u8]>> TensorSource for GgufModel<S> {
    fn names(&self) -> Vec<&str> {
        self.names.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> formats::Result<TensorView<'_>> {
        match self.names.get_key_value(name) {
            Some((name, gguf)) => {
                let stored = self.files.tensor(gguf)?;
                Ok(match self.sorted.get(name) {
                    Some(sorted) => TensorView { file: stored.file, ..sorted.view() },
                    None => TensorView { name, ..stored },
                })
            }
            None => {
                Err(formats::Error::Missing { file: self.files.file().into(), tensor: name.into() })
            }
        }
    }
}
