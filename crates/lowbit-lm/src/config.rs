use serde_json::{Map, Value};

use crate::{Error, Result, RopeScaling, files::not_json, rope};

/// The shape of a decoder, as config.json gives it; fields have their names there.
///
/// # Example
/// ```
/// use lowbit_lm::Config;
///
/// let config = Config::parse("config.json", br#"{
///     "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 172,
///     "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
///     "vocab_size": 512, "max_position_embeddings": 512
/// }"#)?;
/// assert_eq!((config.head_dim, config.rope_theta), (8, 10000.0));
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Which model this is.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Tokens.
    pub vocab_size: usize,
    /// The longest context, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// The base of the rotary frequencies.
    pub rope_theta: f32,
    /// Slower rotary frequencies for a longer context.
    pub rope_scaling: Option<RopeScaling>,
    /// What each rotary frequency is divided by, in place of `rope_scaling`: head_dim / 2 numbers, which GGUF
    /// files of Llama 3 store; config.json has none.
    pub rope_factors: Option<Vec<f32>>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have a bias.
    pub mlp_bias: bool,
    /// The token that opens a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_id: Vec<u32>,
}

/// No real dimension is larger, and f32 represents any position exactly.
const MAX: u64 = 1 << 24;

impl Config {
    /// Reads and checks config.json, which error messages call `file`.
    ///
    /// # Errors
    /// [`Error::File`] if it is no JSON object, [`Error::Config`] naming the field that is missing,
    /// out of range or not supported.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json).map_err(|e| Error::File {
            file: file.into(),
            reason: format!("expected a JSON text, but {}", not_json(json, e)),
        })?;
        let Value::Object(map) = &value else {
            return Err(Error::File { file: file.into(), reason: "expected a JSON object".into() });
        };
        let f = Fields { file, map };

        let architecture = Architecture::of(&f)?;
        let qwen2 = architecture == Architecture::Qwen2;
        let hidden_size = f.size("hidden_size")?;
        let num_attention_heads = f.size("num_attention_heads")?;
        let num_key_value_heads = match f.get("num_key_value_heads") {
            None => num_attention_heads,
            Some(_) => f.size("num_key_value_heads")?,
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {num_attention_heads}");
            return Err(f.error("num_key_value_heads", expected, f.get("num_key_value_heads")));
        }
        let head_dim = match f.get("head_dim") {
            Some(_) => f.size("head_dim")?,
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let expected = format!("a divisor of hidden_size, {hidden_size}, or a head_dim");
                return Err(f.error("num_attention_heads", expected, f.get("num_attention_heads")));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(f.error("head_dim", "an even number", Some(&head_dim.into())));
        }
        let max_position_embeddings = match f.get("max_position_embeddings") {
            None => architecture.default_context(),
            Some(_) => f.size("max_position_embeddings")?,
        };
        // Qwen2 states a window that is not used unless use_sliding_window says so.
        if f.get("sliding_window").is_some() && (!qwen2 || f.bool("use_sliding_window", false)?) {
            let window = f.size("sliding_window")?;
            if window < max_position_embeddings {
                let expected = format!(
                    "null or at least max_position_embeddings, {max_position_embeddings} (sliding windows are not supported)"
                );
                return Err(f.error("sliding_window", expected, f.get("sliding_window")));
            }
        }
        let attention_bias = f.bool("attention_bias", false)?;
        let (rope_theta, rope_scaling) = rope::parse(&f, max_position_embeddings)?;
        let vocab_size = f.size("vocab_size")?;
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: f.size("intermediate_size")?,
            num_hidden_layers: f.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            max_position_embeddings,
            rms_norm_eps: f.positive("rms_norm_eps", Some(1e-6))?,
            rope_theta,
            rope_scaling,
            rope_factors: None,
            tie_word_embeddings: f.bool("tie_word_embeddings", false)?,
            qkv_bias: qwen2 || attention_bias,
            o_bias: !qwen2 && attention_bias,
            mlp_bias: f.bool("mlp_bias", false)?,
            bos_token_id: f.tokens("bos_token_id", vocab_size)?.first().copied(),
            eos_token_id: f.tokens("eos_token_id", vocab_size)?,
        };
        config.check_other_fields(&f)?;
        Ok(config)
    }

    /// Refuses what other models of this kind have and this decoder does not compute, unless it is without
    /// effect. Names that are not here are accepted: files are full of what concerns only training, other
    /// programs, or a generation.
    fn check_other_fields(&self, f: &Fields<'_>) -> Result<()> {
        for field in ["hidden_act", "hidden_activation"] {
            match f.get(field) {
                None => {}
                Some(act) if act == "silu" || act == "swish" => {}
                act => return Err(f.error(field, "\"silu\"", act)),
            }
        }
        OFF.iter().try_for_each(|field| f.off(field))?;
        ONE.iter().try_for_each(|field| f.neutral(field, 1.0))?;
        let dim = self.head_dim as f64;
        f.neutral("attention_multiplier", 1.0 / dim.sqrt())?;
        f.neutral("query_pre_attn_scalar", dim)?;
        f.neutral("rotary_dim", dim)?;
        f.neutral("dim_model_base", self.hidden_size as f64)?;
        f.neutral("rotary_emb_base", self.rope_theta.into())?;
        for field in ["is_causal", "scale_attn_weights"] {
            if !f.bool(field, true)? {
                return Err(f.error(field, "true", f.get(field)));
            }
        }
        for field in ["attention_chunk_size", "attention_window_size"] {
            if f.get(field).is_some() && f.size(field)? < self.max_position_embeddings {
                let expected =
                    format!("at least max_position_embeddings, {}", self.max_position_embeddings);
                return Err(f.error(field, expected, f.get(field)));
            }
        }
        // Each with the only value of its elements that this decoder computes.
        let lists: [(_, &[Value]); 2] = [
            ("layer_types", &["full_attention".into(), "sliding_attention".into()]),
            ("no_rope_layers", &[1.into()]),
        ];
        for (field, computed) in lists {
            let got = f.get(field).and_then(|value| match value.as_array() {
                Some(list) => list.iter().find(|x| !computed.contains(x)),
                None => Some(value),
            });
            if got.is_some() {
                let computed: Vec<_> = computed.iter().map(Value::to_string).collect();
                return Err(f.error(field, format!("a list of {}", computed.join(" or ")), got));
            }
        }
        // Llama calls it rms_norm_eps; where only another name is there, its default may be wrong.
        for field in ["layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rms_norm_epsilon"] {
            if f.get("rms_norm_eps").is_none() && f.get(field).is_some() {
                return Err(f.error(field, "the name rms_norm_eps for it", f.get(field)));
            }
        }
        let position = f.get("position_embedding_type").filter(|p| *p != "rope" && *p != "rotary");
        match position {
            Some(_) => Err(f.error("position_embedding_type", "\"rope\"", position)),
            None => Ok(()),
        }
    }

    /// Outputs of q and inputs of o: all query heads side by side.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads.saturating_mul(self.head_dim)
    }

    /// Outputs of k and v: all key heads side by side.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads.saturating_mul(self.head_dim)
    }
}

/// Which model a [`Config`] is of: the class in `architectures`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// `LlamaForCausalLM`
    Llama,
    /// `Qwen2ForCausalLM`
    Qwen2,
    /// `MistralForCausalLM`
    Mistral,
}

impl Architecture {
    /// Its class, its `model_type`, and how far its context reaches where config.json does not say so.
    const ALL: [(Self, &str, &str, usize); 3] = [
        (Self::Llama, "LlamaForCausalLM", "llama", 2048),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2", 32_768),
        (Self::Mistral, "MistralForCausalLM", "mistral", 131_072),
    ];

    /// By the class; by the model type, if there is none. Programs look at either, so both must agree.
    fn of(f: &Fields<'_>) -> Result<Self> {
        let class = f.get("architectures");
        let kind = f.get("model_type");
        let expected = "LlamaForCausalLM, Qwen2ForCausalLM or MistralForCausalLM";
        let found = match (class, kind) {
            (Some(class), _) => Self::ALL.iter().find(|known| class[0] == known.1),
            (None, Some(kind)) => Self::ALL.iter().find(|known| kind == known.2),
            (None, None) => None,
        };
        match (found, kind) {
            (None, _) => Err(f.error("architectures", expected, class)),
            (Some(found), Some(kind)) if kind != found.2 => {
                let expected = format!("{:?}, as architectures says {}", found.2, found.1);
                Err(f.error("model_type", expected, Some(kind)))
            }
            (Some(found), _) => Ok(found.0),
        }
    }

    fn default_context(self) -> usize {
        Self::ALL.iter().find(|known| known.0 == self).map_or(0, |known| known.3)
    }
}

/// Fields that turn something on which this decoder does not compute; without effect if they are null,
/// false, 0 or empty.
const OFF: [&str; 39] = [
    "add_cross_attention",
    "alibi",
    "attention_k_eq_v",
    "attention_sinks",
    "attn_logit_softcapping",
    "attn_temperature_tuning",
    "clip_qkv",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "logits_soft_cap",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "no_rope_layer_interval",
    "num_experts",
    "num_experts_per_tok",
    "num_kv_shared_layers",
    "num_local_experts",
    "num_memory_tokens",
    "parallel_attn",
    "pruned_heads",
    "qk_layernorm",
    "qk_norm",
    "q_lora_rank",
    "kv_lora_rank",
    "rope_interleaved",
    "rope_local_base_freq",
    "scale_attn_by_inverse_layer_idx",
    "scale_depth",
    "use_alibi",
    "use_attention_sinks",
    "use_bidirectional_attention",
    "use_dynamic_ntk",
    "use_logn_attn",
    "use_parallel_residual",
    "use_mup",
    "mup_use_scaling",
    "use_post_norm",
    "use_qk_norm",
];
/// Factors of something that this decoder does not multiply; without effect if they are null or 1.
const ONE: [&str; 18] = [
    "attn_scale",
    "attention_scale",
    "embedding_multiplier",
    "embedding_scale",
    "key_multiplier",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "mup_attn_multiplier",
    "mup_embeddings_multiplier",
    "mup_width_multiplier",
    "partial_rotary_factor",
    "residual_multiplier",
    "rope_pct",
    "rope_ratio",
    "rotary_pct",
    "scale_emb",
    "softmax_scale",
];

/// The fields of a JSON object; null counts as absent.
pub(crate) struct Fields<'a> {
    file: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The names of all that are there.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key.as_str())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.keys().next().is_none()
    }

    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn size(&self, field: &'static str) -> Result<usize> {
        let value = self.get(field);
        match value.and_then(Value::as_u64) {
            Some(n @ 1..=MAX) => Ok(n as usize),
            _ => Err(self.error(field, format!("an integer from 1 to {MAX}"), value)),
        }
    }

    pub(crate) fn positive(&self, field: &'static str, default: Option<f32>) -> Result<f32> {
        let value = self.get(field);
        match (value, default) {
            (None, Some(default)) => Ok(default),
            _ => match value.and_then(Value::as_f64).map(|x| x as f32) {
                Some(x) if x > 0.0 && x.is_finite() => Ok(x),
                _ => Err(self.error(field, "a positive number", value)),
            },
        }
    }

    pub(crate) fn number(&self, field: &'static str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                None => Err(self.error(field, "a number", Some(value))),
                number => Ok(number),
            },
        }
    }

    /// Refuses another number than `expected`, but for rounding.
    pub(crate) fn neutral(&self, field: &'static str, expected: f64) -> Result<()> {
        match self.number(field)? {
            Some(x) if (x / expected - 1.0).abs() > 1e-6 => {
                let expected = format!("{expected} (nothing else is supported)");
                Err(self.error(field, expected, self.get(field)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what is not null, false, 0 or empty.
    fn off(&self, field: &'static str) -> Result<()> {
        let off = match self.get(field) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Bool(true)) => false,
            Some(Value::Number(number)) => number.as_f64() == Some(0.0),
            Some(Value::String(text)) => text.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
        };
        match off {
            true => Ok(()),
            false => Err(self.error(field, "nothing (it is not supported)", self.get(field))),
        }
    }

    pub(crate) fn bool(&self, field: &'static str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            other => Err(self.error(field, "true or false", other)),
        }
    }

    /// A token or a list of them.
    fn tokens(&self, field: &'static str, vocab_size: usize) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(vec![]) };
        let list = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        (list.iter())
            .map(|token| match token.as_u64() {
                Some(t) if t < vocab_size as u64 => Ok(t as u32),
                _ => Err(self.error(
                    field,
                    format!("tokens below vocab_size, {vocab_size}"),
                    Some(value),
                )),
            })
            .collect()
    }

    pub(crate) fn object(&self, field: &'static str) -> Result<Option<Self>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { file: self.file, map })),
            other => Err(self.error(field, "an object", other)),
        }
    }

    pub(crate) fn error(
        &self,
        field: &'static str,
        expected: impl Into<String>,
        got: Option<&Value>,
    ) -> Error {
        let got = got.map_or("nothing".into(), Value::to_string);
        Error::Config { file: self.file.into(), field, expected: expected.into(), got }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(changes: Value) -> Result<Config> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 64,
            "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": [2, 3], "rope_scaling": null
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        Config::parse("config.json", config.to_string().as_bytes())
    }

    #[test]
    fn absent_fields_have_the_defaults_of_llama() {
        let c = parse(json!({})).unwrap();
        assert_eq!((c.head_dim, c.q_size(), c.kv_size()), (8, 64, 32));
        assert_eq!((c.rms_norm_eps, c.rope_theta, c.rope_scaling), (1e-6, 10000.0, None));
        assert!(!c.tie_word_embeddings && !c.qkv_bias && !c.o_bias && !c.mlp_bias);
        assert_eq!((c.bos_token_id, c.eos_token_id), (Some(1), vec![2, 3]));
        let c = parse(json!({"num_key_value_heads": null, "head_dim": 16})).unwrap();
        assert_eq!((c.num_key_value_heads, c.q_size()), (8, 128));
    }

    #[test]
    fn qwen2_has_biases_and_a_sliding_window_that_is_off() {
        let qwen2 = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128});
        let c = parse(qwen2.clone()).unwrap();
        assert!(c.qkv_bias && !c.o_bias);
        let mut on = qwen2;
        on["use_sliding_window"] = true.into();
        assert!(parse(on).is_err());
        let c = parse(json!({"attention_bias": true, "mlp_bias": true})).unwrap();
        assert!(c.qkv_bias && c.o_bias && c.mlp_bias);
    }

    #[test]
    fn rope_is_read_from_either_place() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
        });
        let old = parse(json!({"rope_theta": 5e5, "rope_scaling": llama3})).unwrap();
        let mut parameters = llama3.clone();
        parameters["rope_theta"] = 5e5.into();
        let new = parse(json!({"rope_parameters": parameters})).unwrap();
        assert_eq!(old, new);
        let Some(RopeScaling::Llama3(scaling)) = old.rope_scaling else { panic!("{old:?}") };
        assert_eq!(scaling.factor, 8.0);
        let default = json!({"rope_type": "default", "rope_theta": 7.0});
        assert_eq!(parse(json!({"rope_parameters": default})).unwrap().rope_theta, 7.0);
    }

    #[test]
    fn errors_name_the_field_and_both_sides() {
        for (changes, expected) in [
            (
                json!({"architectures": ["GPT2LMHeadModel"]}),
                r#"config.json: architectures: expected LlamaForCausalLM, Qwen2ForCausalLM or MistralForCausalLM, got ["GPT2LMHeadModel"]"#,
            ),
            (
                json!({"hidden_act": "gelu"}),
                r#"config.json: hidden_act: expected "silu", got "gelu""#,
            ),
            (
                json!({"hidden_size": null}),
                "config.json: hidden_size: expected an integer from 1 to 16777216, got nothing",
            ),
            (
                json!({"num_hidden_layers": 0}),
                "config.json: num_hidden_layers: expected an integer from 1 to 16777216, got 0",
            ),
            (
                json!({"num_key_value_heads": 3}),
                "config.json: num_key_value_heads: expected a divisor of num_attention_heads, 8, got 3",
            ),
            (
                json!({"hidden_size": 60}),
                "config.json: num_attention_heads: expected a divisor of hidden_size, 60, or a head_dim, got 8",
            ),
            (json!({"head_dim": 7}), "config.json: head_dim: expected an even number, got 7"),
            (
                json!({"rms_norm_eps": -1.0}),
                "config.json: rms_norm_eps: expected a positive number, got -1.0",
            ),
            (
                json!({"rope_scaling": {"type": "longrope"}}),
                r#"config.json: rope_scaling: expected null or the rope_type default, linear, dynamic, llama3 or yarn, got {"type":"longrope"}"#,
            ),
            (
                json!({"architectures": ["MistralForCausalLM"], "sliding_window": 256}),
                "config.json: sliding_window: expected null or at least max_position_embeddings, 512 (sliding windows are not supported), got 256",
            ),
            (
                json!({"eos_token_id": 512}),
                "config.json: eos_token_id: expected tokens below vocab_size, 512, got 512",
            ),
            (
                json!({"tie_word_embeddings": 1}),
                "config.json: tie_word_embeddings: expected true or false, got 1",
            ),
        ] {
            assert_eq!(parse(changes).unwrap_err().to_string(), expected);
        }
        let page = Config::parse("config.json", b"<!DOCTYPE html><html>").unwrap_err().to_string();
        assert_eq!(
            page,
            "config.json: expected a JSON text, but it is a web page, perhaps an error of the server: download the file again"
        );
        let error = Config::parse("config.json", b"[1").unwrap_err().to_string();
        assert!(error.starts_with("config.json: expected a JSON text, but EOF"), "{error}");
    }

    #[test]
    fn a_context_that_is_not_told_is_that_of_the_architecture() {
        // The defaults of LlamaConfig, Qwen2Config and MistralConfig in transformers 5.24.
        for (class, kind, context) in [
            ("LlamaForCausalLM", "llama", 2048),
            ("Qwen2ForCausalLM", "qwen2", 32_768),
            ("MistralForCausalLM", "mistral", 131_072),
        ] {
            let changes = json!({"architectures": [class], "max_position_embeddings": null});
            assert_eq!(parse(changes).unwrap().max_position_embeddings, context);
            let by_type = json!({"architectures": null, "model_type": kind,
                                 "max_position_embeddings": null});
            assert_eq!(parse(by_type).unwrap().max_position_embeddings, context);
        }
        let error = parse(json!({"model_type": "granite"})).unwrap_err().to_string();
        assert_eq!(
            error,
            "config.json: model_type: expected \"llama\", as architectures says LlamaForCausalLM, got \"granite\""
        );
    }

    #[test]
    fn what_would_change_the_product_is_refused_by_name() {
        for changes in [
            json!({"attention_multiplier": 0.015625}),
            json!({"logit_scale": 0.0625}),
            json!({"logits_scaling": 8}),
            json!({"residual_multiplier": 0.22}),
            json!({"embedding_multiplier": 12.0}),
            json!({"scale_emb": 12}),
            json!({"scale_depth": 1.4}),
            json!({"dim_model_base": 256}),
            json!({"query_pre_attn_scalar": 256}),
            json!({"final_logit_softcapping": 30.0}),
            json!({"attn_logit_softcapping": 50.0}),
            json!({"partial_rotary_factor": 0.5}),
            json!({"rotary_dim": 4}),
            json!({"rope_interleaved": true}),
            json!({"use_qk_norm": true}),
            json!({"clip_qkv": 8.0}),
            json!({"scale_attn_by_inverse_layer_idx": true}),
            json!({"scale_attn_weights": false}),
            json!({"is_causal": false}),
            json!({"no_rope_layers": [1, 1, 0, 1, 1]}),
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            json!({"attention_chunk_size": 128}),
            json!({"num_local_experts": 8}),
            json!({"pruned_heads": {"0": [1]}}),
            json!({"hidden_activation": "gelu_pytorch_tanh"}),
            json!({"position_embedding_type": "alibi"}),
            json!({"norm_eps": 1e-5}),
            json!({"use_alibi": "yes"}),
        ] {
            let field = changes.as_object().unwrap().keys().next().unwrap();
            let error = parse(changes.clone()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("config.json: {field}: expected ")), "{error}");
        }
    }

    #[test]
    fn what_has_no_effect_and_what_nobody_knows_is_accepted() {
        let plain = parse(json!({})).unwrap();
        for changes in [
            json!({"attention_multiplier": 0.35355339, "logit_scale": 1, "residual_multiplier": 1.0}),
            json!({"final_logit_softcapping": null, "attn_logit_softcapping": 0.0}),
            json!({"use_qk_norm": false, "clip_qkv": null, "pretraining_tp": 2, "num_experts": 0}),
            json!({"no_rope_layers": [1, 1, 1, 1, 1], "no_rope_layer_interval": 0}),
            json!({"layer_types": ["full_attention", "full_attention"], "sliding_window": null}),
            json!({"attention_chunk_size": 512, "rotary_dim": 8, "partial_rotary_factor": 1.0}),
            json!({"pruned_heads": {}, "is_causal": true, "hidden_act": "swish"}),
            json!({"rope_scaling": {}, "rope_parameters": null, "rms_norm_eps": 1e-6, "norm_eps": 1}),
            json!({"torch_dtype": "bfloat16", "_name_or_path": "x", "transformers_version": "4.0",
                   "attention_dropout": 0.1, "use_cache": true, "my_note": [1, {"a": true}]}),
        ] {
            assert_eq!(parse(changes.clone()).unwrap(), plain, "{changes}");
        }
    }
}
