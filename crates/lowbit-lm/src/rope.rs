//! Rotary embeddings, as they are and stretched for longer contexts.

use std::f32::consts::TAU;

use serde_json::Value;

use crate::{Config, Result, config::Fields};

/// How rotary frequencies are stretched for a context longer than that of training: what `rope_scaling`, or
/// `rope_parameters` in newer files, says.
///
/// The `dynamic` one stretches nothing within max_position_embeddings, where this decoder stays.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All are divided by this number.
    Linear(f32),
    /// `llama3`: by wavelength.
    Llama3(Llama3Scaling),
    /// `yarn`: by turns within the original context; queries and keys grow, too.
    Yarn(YarnScaling),
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

/// YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2): frequencies of fewer than `beta_slow` turns in the
/// original context are divided by `factor`, those of more than `beta_fast` are kept, those between are
/// interpolated by the index of their pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnScaling {
    /// How many times longer the context became.
    pub factor: f32,
    /// The context before, in tokens.
    pub original_max_position_embeddings: usize,
    /// Turns above which a frequency is kept.
    pub beta_fast: f32,
    /// Turns below which a frequency is divided.
    pub beta_slow: f32,
    /// Queries and keys are multiplied by it, and so attention scores by its square.
    pub attention_factor: f32,
    /// The ends of the ramp are whole indices of pairs.
    pub truncate: bool,
}

/// What rotates the pairs `(i, i + head_dim/2)` of queries and keys.
pub(crate) struct Rope {
    /// Radians per position, for each pair of a head.
    pub(crate) frequencies: Vec<f32>,
    /// Sines and cosines are multiplied by it.
    pub(crate) scale: f32,
}

impl Rope {
    /// `theta^(−2i/head_dim)`, scaled.
    pub(crate) fn new(c: &Config) -> Self {
        let base = unscaled(c);
        let frequencies = match c.rope_scaling {
            _ if c.rope_factors.is_some() => {
                let factors = c.rope_factors.iter().flatten();
                base.zip(factors).map(|(f, factor)| f / factor).collect()
            }
            None => base.collect(),
            Some(RopeScaling::Linear(factor)) => base.map(|f| f / factor).collect(),
            Some(RopeScaling::Llama3(s)) => base.map(|f| s.stretch(f)).collect(),
            Some(RopeScaling::Yarn(s)) => {
                let (low, high) = s.ramp(c);
                let keep = |i: usize| 1.0 - ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                let stretch = |(i, f)| f * keep(i) + f / s.factor * (1.0 - keep(i));
                base.enumerate().map(stretch).collect()
            }
        };
        let scale = match c.rope_scaling {
            Some(RopeScaling::Yarn(s)) => s.attention_factor,
            _ => 1.0,
        };
        Self { frequencies, scale }
    }
}

/// `theta^(−2i/head_dim)` of each pair.
pub(crate) fn unscaled(c: &Config) -> impl Iterator<Item = f32> {
    let (theta, dim) = (c.rope_theta, c.head_dim);
    (0..dim / 2).map(move |i| 1.0 / theta.powf((2 * i) as f32 / dim as f32))
}

impl Llama3Scaling {
    /// 0 where the wave is long, 1 where it is short.
    fn keep(&self, frequency: f32) -> f32 {
        let turns = self.original_max_position_embeddings as f32 * frequency / TAU;
        let keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        keep.clamp(0.0, 1.0)
    }

    fn stretch(&self, frequency: f32) -> f32 {
        let keep = self.keep(frequency);
        frequency * keep + frequency / self.factor * (1.0 - keep)
    }

    /// What `frequency` is divided by.
    pub(crate) fn divisor(&self, frequency: f32) -> f32 {
        match self.keep(frequency) {
            0.0 => self.factor,
            keep => 1.0 / (keep + (1.0 - keep) / self.factor),
        }
    }
}

impl YarnScaling {
    /// The pairs between which frequencies are interpolated.
    fn ramp(&self, c: &Config) -> (f32, f32) {
        let (dim, base) = (c.head_dim as f64, f64::from(c.rope_theta));
        // Solved for the index: original · theta^(−2i/dim) = 2π · turns
        let index = |turns: f32| {
            let wave = self.original_max_position_embeddings as f64
                / (f64::from(turns) * std::f64::consts::TAU);
            dim * wave.ln() / (2.0 * base.ln())
        };
        let (mut low, mut high) = (index(self.beta_fast), index(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001; // a step
        }
        (low as f32, high as f32)
    }
}

/// `rope_theta`, and `rope_scaling` or `rope_parameters`, which newer files have instead.
pub(crate) fn parse(
    f: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<(f32, Option<RopeScaling>)> {
    let mut found = Vec::new();
    for field in ["rope_scaling", "rope_parameters"] {
        let Some(s) = f.object(field)?.filter(|s| !s.is_empty()) else { continue };
        let theta = match (s.get("rope_theta"), f.get("rope_theta")) {
            (Some(inner), Some(outer)) if inner.as_f64() != outer.as_f64() => {
                let expected = format!("the rope_theta beside {field}, {outer}");
                return Err(s.error("rope_theta", expected, Some(inner)));
            }
            (Some(_), _) => s.positive("rope_theta", None)?,
            (None, _) => f.positive("rope_theta", Some(10000.0))?,
        };
        found.push((theta, scaling(field, f, &s, max_position_embeddings)?));
    }
    match found.as_slice() {
        [] => Ok((f.positive("rope_theta", Some(10000.0))?, None)),
        [first, others @ ..] if others.iter().all(|other| other == first) => Ok(*first),
        _ => Err(f.error("rope_scaling", "the same as rope_parameters", f.get("rope_scaling"))),
    }
}

/// What the object under the key `field` asks for.
fn scaling(
    field: &'static str,
    f: &Fields<'_>,
    s: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<Option<RopeScaling>> {
    let all = || f.get(field);
    let kind = match (s.get("rope_type"), s.get("type")) {
        (Some(new), Some(old)) if new != old => {
            return Err(f.error(field, "one type of rope", all()));
        }
        (kind, old) => kind.or(old).map_or(Some("default"), Value::as_str),
    };
    // Beside the context before training on a longer one, and what only tells of its training.
    let (original, told) = ("original_max_position_embeddings", "finetuned");
    let known: &[&str] = match kind {
        Some("default") => &[],
        Some("linear") => &["factor", original, told],
        Some("dynamic") => &["factor", original, told],
        Some("llama3") => &["factor", "low_freq_factor", "high_freq_factor", original],
        Some("yarn") => &[
            "factor",
            original,
            told,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
        _ => {
            let expected = "null or the rope_type default, linear, dynamic, llama3 or yarn";
            return Err(f.error(field, expected, all()));
        }
    };
    let everywhere = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    if let Some(key) = s.keys().find(|key| !everywhere.contains(key) && !known.contains(key)) {
        let expected = format!("no {key} with this rope_type");
        return Err(f.error(field, expected, all()));
    }
    s.neutral("partial_rotary_factor", 1.0)?;
    // One beside the object counts more than one in it.
    let original = || match (f.get(original), s.get(original)) {
        (Some(_), _) => f.size(original),
        (None, Some(_)) => s.size(original),
        (None, None) => Ok(max_position_embeddings),
    };
    Ok(match kind {
        Some("linear") => Some(RopeScaling::Linear(s.positive("factor", None)?)),
        Some("dynamic") => {
            s.positive("factor", None)?;
            if original()? != max_position_embeddings {
                let expected = format!(
                    "max_position_embeddings, {max_position_embeddings}, with the rope_type dynamic"
                );
                let got = s.get("original_max_position_embeddings");
                return Err(s.error("original_max_position_embeddings", expected, got));
            }
            None
        }
        Some("llama3") => Some(RopeScaling::Llama3(llama3(s, original()?)?)),
        Some("yarn") => Some(RopeScaling::Yarn(yarn(s, original()?, max_position_embeddings)?)),
        _ => None,
    })
}

fn llama3(s: &Fields<'_>, original: usize) -> Result<Llama3Scaling> {
    let scaling = Llama3Scaling {
        factor: s.positive("factor", None)?,
        low_freq_factor: s.positive("low_freq_factor", None)?,
        high_freq_factor: s.positive("high_freq_factor", None)?,
        original_max_position_embeddings: original,
    };
    if scaling.low_freq_factor >= scaling.high_freq_factor {
        let expected = format!("less than high_freq_factor, {}", scaling.high_freq_factor);
        return Err(s.error("low_freq_factor", expected, s.get("low_freq_factor")));
    }
    Ok(scaling)
}

fn yarn(s: &Fields<'_>, original: usize, max_position_embeddings: usize) -> Result<YarnScaling> {
    let ratio = max_position_embeddings as f32 / original as f32;
    let factor = s.positive("factor", Some(ratio))?;
    // Section 3.4, equation 22: 1/√t = 0.1·ln(factor) + 1
    let grown = |by: f64| match f64::from(factor) {
        ..=1.0 => 1.0,
        factor => 0.1 * by * factor.ln() + 1.0,
    };
    // 0 counts as absent.
    let optional = |field| s.number(field).map(|x| x.filter(|x| *x != 0.0));
    let default = match (optional("mscale")?, optional("mscale_all_dim")?) {
        (Some(numerator), Some(denominator)) => grown(numerator) / grown(denominator),
        _ => grown(1.0),
    };
    let scaling = YarnScaling {
        factor,
        original_max_position_embeddings: original,
        beta_fast: s.positive("beta_fast", Some(32.0))?,
        beta_slow: s.positive("beta_slow", Some(1.0))?,
        attention_factor: s.positive("attention_factor", Some(default as f32))?,
        truncate: s.bool("truncate", true)?,
    };
    if scaling.beta_fast < scaling.beta_slow {
        let expected = format!("at least beta_slow, {}", scaling.beta_slow);
        return Err(s.error("beta_fast", expected, s.get("beta_fast")));
    }
    Ok(scaling)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A model of 8 heads of 32.
    fn config(changes: &Value) -> Result<Config> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 64,
            "max_position_embeddings": 4096
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        Config::parse("config.json", config.to_string().as_bytes())
    }

    /// The right values are those of transformers 5.24: `ROPE_INIT_FUNCTIONS[type](LlamaConfig(**changes))`.
    #[test]
    fn frequencies_and_their_scale_are_those_of_transformers() {
        let llama3 = json!({"rope_theta": 5e5, "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}});
        let qwen = json!({"rope_theta": 1e6, "max_position_embeddings": 131072,
            "rope_scaling": {"type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 32768}});
        let mscale = json!({"rope_scaling": {"rope_type": "yarn", "factor": 40.0,
            "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 1.0}});
        let all = json!({"rope_scaling": {"rope_type": "yarn", "factor": 16.0,
            "original_max_position_embeddings": 2048, "beta_fast": 24, "beta_slow": 2,
            "attention_factor": 0.9, "truncate": false}});
        let ratio = json!({"max_position_embeddings": 8192,
            "original_max_position_embeddings": 2048,
            "rope_scaling": {"rope_type": "yarn", "factor": null}});
        let short = json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}});
        #[rustfmt::skip]
        let cases: [(Value, [f64; 16], f64); 8] = [
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}), [0.25, 0.140585333, 0.079056941, 0.0444569848, 0.0250000004, 0.0140585322, 0.00790569466, 0.00444569858, 0.00249999994, 0.00140585331, 0.000790569466, 0.000444569858, 0.000250000012, 0.000140585325, 7.90569466e-05, 4.44569851e-05], 1.0),
            (llama3, [1.0, 0.440366626, 0.193922758, 0.0853971019, 0.0376060307, 0.0165604409, 0.00729266508, 0.00321144611, 0.000524846022, 7.78465546e-05, 3.42810235e-05, 1.50962178e-05, 6.64786967e-06, 2.92749974e-06, 1.28917316e-06, 5.6770881e-07], 1.0),
            (qwen, [1.0, 0.421696514, 0.177827939, 0.0749894157, 0.0316227786, 0.0133352149, 0.00477990136, 0.00165996165, 0.000549999997, 0.000168678584, 4.44569851e-05, 1.87473561e-05, 7.90569356e-06, 3.33380353e-06, 1.40585337e-06, 5.92843435e-07], 1.138629436111989),
            (mscale, [1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0562341288, 0.0272181761, 0.0128290169, 0.00582142826, 0.00249036867, 0.000959977158, 0.000292145909, 2.49999994e-05, 1.40585325e-05, 7.90569447e-06, 4.44569832e-06], 0.9210423553163399),
            (all, [1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0505155288, 0.0215391871, 0.00825033151, 0.00246771728, 0.000351463328, 0.000197642366, 0.000111142464, 6.2500003e-05, 3.51463314e-05, 1.97642366e-05, 1.11142463e-05], 0.9),
            (ratio, [1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0502090417, 0.02484647, 0.0120668961, 0.00571428565, 0.0026108704, 0.00112938497, 0.000444569858, 0.000250000012, 0.000140585325, 7.90569466e-05, 4.44569851e-05], 1.138629436111989),
            (short, [1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0562341288, 0.0293640085, 0.0152423959, 0.00785714202, 0.00401672348, 0.00203289278, 0.00101615966, 0.000500000024, 0.000281170651, 0.000158113893, 8.89139701e-05], 1.0693147180559945),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), [1.0, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0562341288, 0.0316227786, 0.0177827943, 0.00999999978, 0.00562341325, 0.00316227786, 0.00177827943, 0.00100000005, 0.000562341302, 0.000316227786, 0.00017782794], 1.0),
        ];
        for (changes, frequencies, scale) in cases {
            let rope = Rope::new(&config(&changes).unwrap());
            assert_eq!(rope.frequencies.len(), 16);
            for (got, expected) in rope.frequencies.iter().zip(frequencies) {
                assert!(
                    (f64::from(*got) / expected - 1.0).abs() < 2e-6,
                    "{got} {expected} {changes}"
                );
            }
            assert!((f64::from(rope.scale) / scale - 1.0).abs() < 1e-6, "{changes}");
        }
    }

    #[test]
    fn the_type_may_stand_under_either_name_in_either_place() {
        let of = |field: &str, name: &str| {
            let scaling = json!({name: "yarn", "factor": 4.0, "finetuned": true,
                                 "original_max_position_embeddings": 1024});
            config(&json!({field: scaling})).unwrap()
        };
        let expected = of("rope_scaling", "type");
        assert!(matches!(expected.rope_scaling, Some(RopeScaling::Yarn(_))));
        for (field, name) in [
            ("rope_scaling", "rope_type"),
            ("rope_parameters", "type"),
            ("rope_parameters", "rope_type"),
        ] {
            assert_eq!(of(field, name), expected);
        }
        let linear = json!({"rope_type": "linear", "factor": 4.0});
        let both =
            |other: Value| config(&json!({"rope_scaling": linear, "rope_parameters": other}));
        assert_eq!(both(linear.clone()).unwrap().rope_scaling, Some(RopeScaling::Linear(4.0)));
        assert!(both(json!({"rope_type": "linear", "factor": 2.0})).is_err());
        let theta = json!({"rope_theta": 7.0});
        assert_eq!(config(&json!({"rope_parameters": theta})).unwrap().rope_theta, 7.0);
        assert!(config(&json!({"rope_theta": 8.0, "rope_parameters": theta})).is_err());
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (scaling, expected) in [
            (json!({"type": "su", "short_factor": [1.0]}), "rope_type default, linear, dynamic"),
            (json!({"rope_type": "longrope", "long_factor": [1.0]}), "got {\"long_factor\""),
            (json!({"rope_type": "linear"}), "factor: expected a positive number, got nothing"),
            (json!({"rope_type": "linear", "type": "yarn", "factor": 2.0}), "one type of rope"),
            (json!({"factor": 2.0}), "expected no factor with this rope_type"),
            (json!({"type": "default", "mrope_section": [16, 24, 24]}), "no mrope_section"),
            (json!({"type": "dynamic", "alpha": 1000.0, "factor": 1.0}), "no alpha"),
            (
                json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}),
                "original_max_position_embeddings: expected max_position_embeddings, 4096, with the rope_type dynamic, got 2048",
            ),
            (
                json!({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}),
                "partial_rotary",
            ),
            (json!({"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}), "beta_fast"),
            (json!({"full_attention": {"rope_type": "default"}}), "no full_attention"),
            (json!("linear"), "expected an object"),
        ] {
            let error = config(&json!({"rope_scaling": scaling})).unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && error.contains(expected), "{error}");
        }
    }
}
