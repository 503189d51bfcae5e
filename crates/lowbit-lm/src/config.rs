use serde_json::{Map, Value};

use crate::{Error, Result};

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
    pub rope_scaling: Option<Llama3Scaling>,
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

/// Llama 3's rule for stretching rotary frequencies: those of wavelengths beyond
/// `original / low_freq_factor` tokens are divided by `factor`, those below
/// `original / high_freq_factor` are kept, those between are interpolated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// How many times longer the context became.
    pub factor: f32,
    /// Turns per original context below which a frequency is divided.
    pub low_freq_factor: f32,
    /// Turns per original context above which a frequency is kept.
    pub high_freq_factor: f32,
    /// The context before, in tokens.
    pub original_max_position_embeddings: usize,
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
            reason: format!("expected a JSON text, but {e}"),
        })?;
        let Value::Object(map) = &value else {
            return Err(Error::File { file: file.into(), reason: "expected a JSON object".into() });
        };
        let f = Fields { file, map };

        let architecture = f.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        if !matches!(
            architecture,
            Some("LlamaForCausalLM" | "Qwen2ForCausalLM" | "MistralForCausalLM")
        ) {
            let expected = "LlamaForCausalLM, Qwen2ForCausalLM or MistralForCausalLM";
            return Err(f.error("architectures", expected, f.get("architectures")));
        }
        let qwen2 = architecture == Some("Qwen2ForCausalLM");
        match f.get("hidden_act") {
            None => {}
            Some(act) if act == "silu" => {}
            act => return Err(f.error("hidden_act", "\"silu\"", act)),
        }
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
        let max_position_embeddings = f.size("max_position_embeddings")?;
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
        let (rope_theta, rope_scaling) = rope(&f)?;
        let vocab_size = f.size("vocab_size")?;
        Ok(Self {
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
        })
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

/// `rope_theta` and `rope_scaling`, or both in `rope_parameters` as newer files have them.
fn rope(f: &Fields<'_>) -> Result<(f32, Option<Llama3Scaling>)> {
    let parameters = f.object("rope_parameters")?;
    let theta = match &parameters {
        Some(p) if p.get("rope_theta").is_some() => p.positive("rope_theta", None)?,
        _ => f.positive("rope_theta", Some(10000.0))?,
    };
    let (field, scaling) = match parameters {
        Some(p) => ("rope_parameters", Some(p)),
        None => ("rope_scaling", f.object("rope_scaling")?),
    };
    let Some(s) = scaling else { return Ok((theta, None)) };
    let kind = s.get("rope_type").or(s.get("type")).and_then(Value::as_str);
    let scaling = match kind {
        Some("default") => None,
        Some("llama3") => Some(Llama3Scaling {
            factor: s.positive("factor", None)?,
            low_freq_factor: s.positive("low_freq_factor", None)?,
            high_freq_factor: s.positive("high_freq_factor", None)?,
            original_max_position_embeddings: s.size("original_max_position_embeddings")?,
        }),
        _ => return Err(f.error(field, "null or the rope_type default or llama3", f.get(field))),
    };
    if let Some(Llama3Scaling { low_freq_factor, high_freq_factor, .. }) = scaling
        && low_freq_factor >= high_freq_factor
    {
        let expected = format!("less than high_freq_factor, {high_freq_factor}");
        return Err(s.error("low_freq_factor", expected, s.get("low_freq_factor")));
    }
    Ok((theta, scaling))
}

/// The fields of a JSON object; null counts as absent.
struct Fields<'a> {
    file: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &'static str) -> Result<usize> {
        let value = self.get(field);
        match value.and_then(Value::as_u64) {
            Some(n @ 1..=MAX) => Ok(n as usize),
            _ => Err(self.error(field, format!("an integer from 1 to {MAX}"), value)),
        }
    }

    fn positive(&self, field: &'static str, default: Option<f32>) -> Result<f32> {
        let value = self.get(field);
        match (value, default) {
            (None, Some(default)) => Ok(default),
            _ => match value.and_then(Value::as_f64).map(|x| x as f32) {
                Some(x) if x > 0.0 && x.is_finite() => Ok(x),
                _ => Err(self.error(field, "a positive number", value)),
            },
        }
    }

    fn bool(&self, field: &'static str, default: bool) -> Result<bool> {
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

    fn object(&self, field: &'static str) -> Result<Option<Self>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { file: self.file, map })),
            other => Err(self.error(field, "an object", other)),
        }
    }

    fn error(
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
        assert_eq!(old.rope_scaling.unwrap().factor, 8.0);
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
                json!({"rope_scaling": {"type": "yarn"}}),
                r#"config.json: rope_scaling: expected null or the rope_type default or llama3, got {"type":"yarn"}"#,
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
        let error = Config::parse("config.json", b"[1").unwrap_err().to_string();
        assert!(error.starts_with("config.json: expected a JSON text, but EOF"), "{error}");
    }
}
