//! The configuration of a quantized model: `quantization_config` and its relatives.

use lowbit_core::{ActivationScales, ActivationScheme, ActivationType};
use serde_json::{Map, Value, json};

use super::{
    keys::{self, Method},
    mlx,
    pattern::Pattern,
};
use crate::{Error, Result};

/// What a model's configuration says of its quantized layers: the parts that their tensors leave open.
///
/// Every layer is read by the convention that its own tensors show, so that a model may mix them; see
/// [`read`](Self::read). The configuration is parsed key by key: one that is not known, or of a value that
/// would mean other weights, is an error. `docs/formats.md` lists the keys. The default is that of a model
/// without a configuration.
///
/// # Example
/// ```
/// use lowbit_formats::conventions::QuantizationConfig;
///
/// let model = serde_json::json!({"quantization_config": {"quant_method": "awq", "bits": 4}});
/// let config = QuantizationConfig::from_model(&model)?.unwrap();
/// assert_eq!(config.method(), Some("awq"));
///
/// let five = serde_json::json!({"quant_method": "awq", "bits": 5});
/// let error = QuantizationConfig::parse(&five).unwrap_err().to_string();
/// assert_eq!(error, "quantization_config: bits of awq is 5, expected 4");
/// # Ok::<(), lowbit_formats::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizationConfig {
    method: Option<String>,
    /// For layers that no rule is for.
    all: Hints,
    rules: Vec<Rule>,
    /// Must a quantized layer have a rule?
    strict: bool,
    pub(super) rotations: Vec<Rotation>,
    /// Rotations of queries and keys alike, whose products stay the same.
    pub(super) attention_rotations: Vec<String>,
    /// Is there a scheme for the KV cache?
    pub(super) cache: bool,
    notes: Vec<String>,
}

/// What the tensors of a layer leave open.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Hints {
    pub(super) bits: Option<u8>,
    pub(super) group_size: Option<usize>,
    /// Rows and columns of a block of FP8.
    pub(super) block: Option<(usize, usize)>,
    /// Are FP8 codes divided by `weight_scale_inv`?
    pub(super) divides: bool,
    /// Version 2 of GPTQ, or 1.
    pub(super) v2: Option<bool>,
    pub(super) symmetric: Option<bool>,
    /// Are groups those of `g_idx`?
    pub(super) act_order: bool,
    /// Are there zero points?
    pub(super) zero_points: bool,
    /// From which magnitude on inputs stay f32 in LLM.int8().
    pub(super) threshold: Option<f32>,
    pub(super) inputs: Inputs,
}

/// How the inputs of a layer are quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Inputs {
    /// As the tensors show, or not.
    #[default]
    Unsaid,
    /// To FP8 or FP4, which is not imitated.
    Floats,
    /// To int8 when they arrive.
    Dynamic(ActivationScheme),
    /// To int8 by `input_scale`.
    Static,
}

/// Hints for some layers.
#[derive(Clone, Debug, PartialEq)]
struct Rule {
    targets: Targets,
    hints: Hints,
}

/// A product of a layer's input with a Hadamard matrix, of `transform_config`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rotation {
    /// The layer has the matrix as `{name}_input.weight`.
    pub(super) name: String,
    pub(super) targets: Targets,
    pub(super) ignore: Targets,
    pub(super) inverse: bool,
    /// The width of a block, if it is not the whole row.
    pub(super) block: Option<usize>,
    /// Is the matrix only known from its tensor?
    pub(super) random: bool,
    pub(super) permuted: bool,
}

impl Rotation {
    pub(super) fn speaks_of(&self, layer: &str) -> bool {
        self.targets.rank(layer) > 0 && self.ignore.rank(layer) == 0
    }
}

/// Layers by their names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Targets(Vec<Target>);

#[derive(Clone, Debug, PartialEq)]
enum Target {
    Name(String),
    Pattern(Pattern),
    /// `Linear`: all of them.
    Linear,
}

impl Targets {
    /// A list of names, `re:` patterns and classes, as compressed-tensors has them.
    fn parse(value: Option<&Value>) -> Result<Self> {
        let list = match value {
            None | Some(Value::Null) => &[],
            Some(Value::Array(list)) => &list[..],
            Some(one) => std::slice::from_ref(one),
        };
        let target = |value: &Value| {
            let Some(text) = value.as_str() else {
                return Err(config_error(format!("expected names of layers, got {value}")));
            };
            match text.strip_prefix("re:") {
                Some(pattern) => self::pattern(pattern),
                None if text == "Linear" => Ok(Target::Linear),
                None => Ok(Target::Name(text.into())),
            }
        };
        Ok(Self(list.iter().map(target).collect::<Result<_>>()?))
    }

    /// How closely they speak of `layer`: 3 by its name, 2 by a pattern, 1 as any linear layer.
    pub(super) fn rank(&self, layer: &str) -> u8 {
        let rank = |target: &Target| match target {
            Target::Name(name) if name == layer => 3,
            Target::Pattern(pattern) if pattern.matches(layer) => 2,
            Target::Linear => 1,
            _ => 0,
        };
        self.0.iter().map(rank).max().unwrap_or(0)
    }
}

/// Do targets speak of what goes into the KV cache?
fn of_cache(targets: Option<&Value>) -> bool {
    let text = targets.map_or_else(String::new, Value::to_string);
    ["k_proj", "v_proj", "attn"].iter().any(|part| text.contains(part))
}

fn pattern(text: &str) -> Result<Target> {
    let wrong = |reason| config_error(format!("the pattern {text:?} is not understood: {reason}"));
    Ok(Target::Pattern(Pattern::new(text).map_err(wrong)?))
}

fn config_error(reason: impl Into<String>) -> Error {
    Error::Config { reason: reason.into() }
}

/// Where config.json may have a configuration, and under which keys.
const PLACES: [&str; 4] = ["text_config", "language_config", "llm_config", "thinker_config"];
const KEYS: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

impl QuantizationConfig {
    /// Files beside config.json that may have the configuration where config.json has none.
    pub const FILES: [&str; 3] =
        ["quantize_config.json", "quant_config.json", "hf_quant_config.json"];

    /// The configuration in a config.json: under `quantization_config`, `compression_config` or
    /// `quantization`, also of its `text_config`. `None` if there is none, or null.
    ///
    /// # Errors
    /// Those of [`parse`](Self::parse).
    ///
    /// # Example
    /// See the [type](Self).
    pub fn from_model(config: &Value) -> Result<Option<Self>> {
        let places = PLACES.iter().filter_map(|place| config.get(place));
        for place in std::iter::once(config).chain(places) {
            let found = KEYS.iter().filter_map(|key| place.get(key));
            if let Some(found) = found.into_iter().find(|value| !keys::is_nothing(value)) {
                return Self::parse(found).map(Some);
            }
        }
        Ok(None)
    }

    /// The configuration itself: what stands under `quantization_config`, or in one of
    /// [`FILES`](Self::FILES).
    ///
    /// # Errors
    /// [`Error::Config`] for a method whose tensors this crate does not read, and for a key that is not
    /// known or has a value that would mean other weights.
    ///
    /// # Example
    /// See the [type](Self).
    pub fn parse(config: &Value) -> Result<Self> {
        let Value::Object(map) = config else {
            return Err(config_error(format!("expected an object, got {config}")));
        };
        if let Some(Value::Object(inner)) = map.get("quantization_config") {
            // compression_config of old: beside it lies how sparse weights are stored.
            let mut inner = inner.clone();
            for (key, value) in map.iter().filter(|(key, _)| *key != "quantization_config") {
                inner.entry(key.clone()).or_insert_with(|| value.clone());
            }
            return Self::parse(&inner.into());
        }
        let name = map.get("quant_method").and_then(Value::as_str).map(str::to_lowercase);
        let Some(name) = name.or_else(|| guess(map).map(Into::into)) else {
            return Err(config_error("it has no quant_method, and no key that tells the method"));
        };
        if let Some(refused) = keys::REFUSED.iter().find(|refused| name.starts_with(**refused)) {
            let reason = format!("tensors of the quant_method {refused} are not read");
            return Err(config_error(reason));
        }
        let method = keys::METHODS.into_iter().find(|m| m.names.contains(&name.as_str()));
        let mut parsed = Self { method: Some(name.clone()), ..Self::default() };
        match method {
            Some(method) => parsed.apply(method, map)?,
            None => {
                let all = keys::METHODS.map(|method| method.keys);
                keys::check(map, &all, &format!("the quant_method {name:?}, which is not known"))?;
                parsed.all = parsed.numbers(map)?;
                parsed.groups(map)?;
                parsed.notes.push(format!(
                    "quantization_config: the quant_method {name:?} is not known; layers are read by what \
                     their tensors show"
                ));
            }
        }
        if parsed.cache {
            parsed
                .notes
                .push("the KV cache stays f32: the file's scheme for it is not used".into());
        }
        Ok(parsed)
    }

    /// What `quant_method` says, or the keys where it is not there; `None` without a configuration.
    ///
    /// # Example
    /// See the [type](Self).
    pub fn method(&self) -> Option<&str> {
        self.method.as_deref()
    }

    /// What is done without, of all that the configuration asks for: sentences for whoever runs the model.
    ///
    /// # Example
    /// ```
    /// use lowbit_formats::conventions::QuantizationConfig;
    ///
    /// let config = serde_json::json!({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}});
    /// let notes = QuantizationConfig::parse(&config)?;
    /// let notes = notes.notes();
    /// assert_eq!(notes, ["the KV cache stays f32: the file's scheme for it is not used"]);
    /// # Ok::<(), lowbit_formats::Error>(())
    /// ```
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What is known of a quantized layer.
    pub(super) fn hints(&self, layer: &str) -> Result<&Hints> {
        let ranked: Vec<_> =
            self.rules.iter().map(|rule| (rule.targets.rank(layer), &rule.hints)).collect();
        match ranked.iter().max_by_key(|(rank, _)| *rank) {
            Some(&(rank, hints)) if rank > 0 => {
                if ranked.iter().any(|(other, h)| *other == rank && *h != hints) {
                    return Err(config_error(format!("two rules speak of layer {layer}")));
                }
                Ok(hints)
            }
            _ if self.strict => {
                Err(config_error(format!("no group of config_groups targets layer {layer}")))
            }
            _ => Ok(&self.all),
        }
    }

    fn apply(&mut self, method: &Method, map: &Map<String, Value>) -> Result<()> {
        match method.name() {
            "mlx" => return self.mlx(map),
            "modelopt" => self.modelopt(map)?,
            _ => keys::check(map, &[method.keys], method.name())?,
        }
        self.all = self.numbers(map)?;
        self.cache |= [
            "kv_cache_scheme",
            "kv_cache_quant_algo",
            "kv_cache_quant_config",
            "kv_cache_quant_method",
        ]
        .iter()
        .filter_map(|key| map.get(*key))
        .any(|value| !keys::is_nothing(value) && value != "none");
        match method.name() {
            "gptq" | "awq" => self.overrides(map.get("dynamic"), method)?,
            "auto-round" => self.auto_round(map, method)?,
            "bitsandbytes" => {
                let is = |key: &str| map.get(key).and_then(Value::as_bool).unwrap_or(false);
                if is("load_in_8bit") || is("_load_in_8bit") {
                    // A threshold of 0 means none: all features are int8.
                    let threshold = map.get("llm_int8_threshold").and_then(Value::as_f64);
                    self.all.threshold = Some(threshold.unwrap_or(6.0) as f32);
                }
            }
            "compressed-tensors" => {
                sparsity(map)?;
                self.transforms(map)?;
            }
            "fp8" if map.get("activation_scheme").is_some_and(|scheme| scheme != "none") => {
                self.all.inputs = Inputs::Floats;
            }
            "quark" => self.quark(map)?,
            _ => {}
        }
        self.groups(map)
    }

    fn is(&self, method: &Method) -> bool {
        self.method.as_deref().is_some_and(|name| method.names.contains(&name))
    }

    /// Numbers at the top of a configuration, under the names that several methods have for them.
    fn numbers(&self, map: &Map<String, Value>) -> Result<Hints> {
        let text = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or("");
        let whole = |keys: &[&str]| {
            // −1 is a whole row.
            let value = keys.iter().find_map(|key| map.get(*key)).and_then(Value::as_u64)?;
            usize::try_from(value).ok().filter(|&value| value > 0)
        };
        let format = [text("checkpoint_format"), text("format")].join(" ");
        let symmetric = map.get("sym").and_then(Value::as_bool);
        let packing = text("packing_format");
        let auto_round = self.is(&keys::AUTO_ROUND);
        let packing = if packing.is_empty() && auto_round { text("backend") } else { packing };
        let gptq = self.is(&keys::GPTQ);
        // Old files of GPTQ have no format, but they say whether they are symmetric.
        let v2 = match format.to_lowercase() {
            format if format.contains("gptq_v2") => Some(true),
            format if format.contains("gptq") => Some(false),
            _ => packing_version(packing).or((gptq && symmetric.is_some()).then_some(false)),
        };
        let block = map.get("weight_block_size").filter(|block| !block.is_null());
        Ok(Hints {
            bits: whole(&["bits", "w_bit"]).and_then(|bits| u8::try_from(bits).ok()),
            group_size: whole(&["group_size", "q_group_size"]),
            block: block.map(block_size).transpose()?,
            divides: text("weight_scale_semantics") == "inverse",
            v2,
            symmetric,
            act_order: gptq && map.get("desc_act").and_then(Value::as_bool).unwrap_or(false),
            ..Hints::default()
        })
    }

    /// `dynamic` of GPTQModel: `-:pattern` leaves layers out, `+:pattern` or `pattern` has other numbers.
    fn overrides(&mut self, dynamic: Option<&Value>, method: &Method) -> Result<()> {
        for (key, value) in dynamic.and_then(Value::as_object).into_iter().flatten() {
            if key.starts_with("-:") {
                continue; // As the tensors show.
            }
            let Value::Object(value) = value else {
                let reason = format!("dynamic: expected an object under {key:?}, got {value}");
                return Err(config_error(reason));
            };
            let owner = format!("{} for {key:?}", method.name());
            keys::check(value, &[method.keys], &owner)?;
            let target = pattern(key.strip_prefix("+:").unwrap_or(key))?;
            self.rule(Targets(vec![target]), value)?;
        }
        Ok(())
    }

    /// The numbers of `map` in the place of those of the whole model.
    fn rule(&mut self, targets: Targets, map: &Map<String, Value>) -> Result<()> {
        let own = self.numbers(map)?;
        let all = &self.all;
        let hints = Hints {
            bits: own.bits.or(all.bits),
            // −1 takes the group size of the others away.
            group_size: if map.contains_key("group_size") {
                own.group_size
            } else {
                all.group_size
            },
            v2: all.v2,
            symmetric: own.symmetric.or(all.symmetric),
            act_order: if map.contains_key("desc_act") { own.act_order } else { all.act_order },
            ..all.clone()
        };
        self.rules.push(Rule { targets, hints });
        Ok(())
    }

    fn auto_round(&mut self, map: &Map<String, Value>, method: &Method) -> Result<()> {
        let inputs = |map: &Map<String, Value>| -> Result<Inputs> {
            let bits = map.get("act_bits").and_then(Value::as_u64).unwrap_or(16);
            let text = |key: &str| map.get(key).and_then(Value::as_str);
            let kind = text("act_data_type").or(text("data_type")).unwrap_or("int");
            match bits {
                9.. => Ok(Inputs::Unsaid),
                _ if kind.contains("fp") => Ok(Inputs::Floats),
                _ => Err(config_error(format!(
                    "act_bits of auto-round is {bits} (of {kind}), expected 16: such inputs are not computed"
                ))),
            }
        };
        self.all.inputs = inputs(map)?;
        let extra = map.get("extra_config").and_then(Value::as_object);
        for (key, value) in extra.into_iter().flatten() {
            let Value::Object(value) = value else { continue };
            keys::check(value, &[method.keys], &format!("auto-round for {key:?}"))?;
            let inputs = inputs(value)?;
            let target = match key.contains(['*', '+', '[', '(', '^', '$', '\\']) {
                true => pattern(key)?,
                false => Target::Name(key.clone()),
            };
            self.rule(Targets(vec![target]), value)?;
            if let Some(rule) = self.rules.last_mut()
                && value.contains_key("act_bits")
            {
                rule.hints.inputs = inputs;
            }
        }
        Ok(())
    }

    /// `bits` and `group_size` of all layers, and under the names of layers those of one.
    fn mlx(&mut self, map: &Map<String, Value>) -> Result<()> {
        let of_layer = |value: &Value| value.is_object() || value.is_boolean();
        let (layers, own): (Vec<_>, Vec<_>) =
            map.clone().into_iter().partition(|(_, value)| of_layer(value));
        let own: Map<_, _> = own.into_iter().collect();
        keys::check(&own, &[keys::MLX.keys], "mlx")?;
        self.all = self.numbers(&own)?;
        debug_assert!(self.all.bits.is_none_or(|bits| mlx::BITS.contains(&bits)));
        for (name, value) in layers {
            let Value::Object(value) = value else { continue };
            keys::check(&value, &[keys::MLX.keys], &format!("mlx for {name:?}"))?;
            self.rule(Targets(vec![Target::Name(name)]), &value)?;
        }
        Ok(())
    }

    /// ModelOpt says it at the top, or one level deeper.
    fn modelopt(&mut self, map: &Map<String, Value>) -> Result<()> {
        let inner = map.get("quantization").and_then(Value::as_object);
        for map in [Some(map), inner].into_iter().flatten() {
            keys::check(map, &[keys::MODELOPT.keys], "modelopt")?;
            let text = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or("");
            self.cache |= !matches!(text("kv_cache_quant_algo"), "" | "none" | "NONE");
        }
        Ok(())
    }

    /// Quark says how inputs and outputs are quantized; weights are as their tensors show.
    fn quark(&mut self, map: &Map<String, Value>) -> Result<()> {
        let layers = ["layer_quant_config", "layer_type_quant_config"];
        let layers = layers.iter().filter_map(|key| map.get(*key)).filter_map(Value::as_object);
        let all = map.get("global_quant_config").into_iter();
        for spec in all.chain(layers.flat_map(Map::values)) {
            for part in ["input_tensors", "output_tensors", "bias"] {
                let Some(value) = spec.get(part).filter(|value| !keys::is_nothing(value)) else {
                    continue;
                };
                let dtype = value.get("dtype").and_then(Value::as_str).unwrap_or("");
                if part == "input_tensors" && dtype.starts_with("fp") {
                    self.all.inputs = Inputs::Floats;
                    continue;
                }
                if part == "output_tensors" && self.cache {
                    continue; // Of k and v.
                }
                let reason = format!("{part} of quark is {}, expected nothing", short(value));
                return Err(config_error(reason));
            }
        }
        Ok(())
    }

    /// `config_groups` of compressed-tensors and of ModelOpt.
    fn groups(&mut self, map: &Map<String, Value>) -> Result<()> {
        let groups = map.get("config_groups").and_then(Value::as_object);
        for (name, group) in groups.into_iter().flatten() {
            let Value::Object(group) = group else {
                return Err(config_error(format!("expected an object for {name}, got {group}")));
            };
            keys::check(group, &[keys::CONFIG_GROUP], name)?;
            let targets = Targets::parse(group.get("targets"))?;
            let part = |key: &str| group.get(key).filter(|value| !keys::is_nothing(value));
            if let Some(output) = part("output_activations") {
                if !of_cache(group.get("targets")) {
                    return Err(config_error(format!(
                        "output_activations of {name} is {}, expected null: such layers are not computed",
                        short(output)
                    )));
                }
                // What k and v give goes into the cache.
                self.cache = true;
            }
            let Some(weights) = part("weights") else {
                if let Some(input) = part("input_activations") {
                    return Err(config_error(format!(
                        "input_activations of {name} is {}, but its weights are not quantized",
                        short(input)
                    )));
                }
                continue;
            };
            let hints = weight_hints(name, weights, part("input_activations"), &self.all)?;
            self.rules.push(Rule { targets, hints });
        }
        match &self.rules[..] {
            [one] if groups.is_some() => self.all = one.hints.clone(),
            _ => self.strict = groups.is_some() && self.rules.len() > 1,
        }
        Ok(())
    }

    fn transforms(&mut self, map: &Map<String, Value>) -> Result<()> {
        let Some(config) = map.get("transform_config").filter(|value| !keys::is_nothing(value))
        else {
            return Ok(());
        };
        let groups = config.get("config_groups").and_then(Value::as_object);
        let groups = groups.ok_or_else(|| {
            config_error(format!("transform_config is {}, expected config_groups", short(config)))
        })?;
        for (name, scheme) in groups {
            let owner = format!("the transform {name}");
            let Value::Object(scheme) = scheme else {
                return Err(config_error(format!("expected an object for {owner}, got {scheme}")));
            };
            keys::check(scheme, &[keys::TRANSFORM_SCHEME], &owner)?;
            let permuted = scheme.get("randomize").and_then(Value::as_bool).unwrap_or(false);
            let random = scheme.get("type").is_some_and(|kind| kind != "hadamard");
            let block =
                ["head_dim", "block_size"].iter().find_map(|key| scheme.get(*key)?.as_u64());
            let block = block.and_then(|block| usize::try_from(block).ok());
            let mut of_attention = [None, None];
            for apply in scheme.get("apply").and_then(Value::as_array).into_iter().flatten() {
                let Value::Object(apply) = apply else {
                    return Err(config_error(format!("expected objects in {owner}, got {apply}")));
                };
                keys::check(apply, &[keys::TRANSFORM_ARGS], &owner)?;
                let inverse = apply.get("inverse").and_then(Value::as_bool).unwrap_or(false);
                let targets = Targets::parse(apply.get("targets"))?;
                let ignore = Targets::parse(apply.get("ignore"))?;
                match apply.get("location").and_then(Value::as_str) {
                    // These are in the stored weights.
                    Some("weight_input" | "weight_output") => {}
                    Some("input") => self.rotations.push(Rotation {
                        name: name.clone(),
                        targets,
                        ignore,
                        inverse,
                        block,
                        random: random || permuted,
                        permuted,
                    }),
                    Some("q_attn") => of_attention[0] = Some(inverse),
                    Some("k_cache") => of_attention[1] = Some(inverse),
                    _ => {
                        let location =
                            apply.get("location").map_or("null".into(), Value::to_string);
                        return Err(config_error(format!(
                            "location of {owner} is {location}, expected input, weight_input or weight_output"
                        )));
                    }
                }
            }
            match of_attention {
                [None, None] => {}
                // (q·M)·(k·M)ᵀ = q·kᵀ
                [Some(q), Some(k)] if q == k => self.attention_rotations.push(name.clone()),
                _ => {
                    return Err(config_error(format!(
                        "{owner} turns queries and keys in different ways, expected both in the same"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// The method that keys tell where there is no `quant_method`.
fn guess(map: &Map<String, Value>) -> Option<&'static str> {
    let has = |keys: &[&str]| keys.iter().any(|key| map.get(*key).is_some_and(|v| !v.is_null()));
    let producer = map.get("producer").and_then(|producer| producer.get("name"));
    let methods = [
        (has(&["quant_algo"]) || map.get("quantization").is_some_and(Value::is_object), "modelopt"),
        (producer.is_some_and(|name| name == "modelopt"), "modelopt"),
        (has(&["config_groups"]), "compressed-tensors"),
        (has(&["global_quant_config"]), "quark"),
        (has(&["packing_format", "autoround_version"]), "auto-round"),
        (has(&["load_in_8bit", "load_in_4bit"]), "bitsandbytes"),
        (has(&["w_bit", "q_group_size", "zero_point"]), "awq"),
        (has(&["desc_act", "sym", "damp_percent", "checkpoint_format"]), "gptq"),
        (has(&["weight_block_size", "activation_scheme", "fmt"]), "fp8"),
        (has(&["bits"]) && has(&["group_size", "mode"]), "mlx"),
    ];
    methods.into_iter().find(|(is, _)| *is).map(|(_, method)| method)
}

/// The version of GPTQ that AutoRound's packing has; `None` for tensors that are not GPTQ's.
fn packing_version(packing: &str) -> Option<bool> {
    let has = |part| packing.contains(part);
    match () {
        () if has("gptqmodel") => Some(true),
        () if has("gptq") => Some(false),
        () if has("awq") || has("llm_compressor") || has("fp") => None,
        () if packing.starts_with("auto_round") => Some(true),
        () => None,
    }
}

fn block_size(value: &Value) -> Result<(usize, usize)> {
    let size = |i| {
        let size = value.get(i)?.as_u64()?;
        usize::try_from(size).ok().filter(|&size| size > 0)
    };
    let sizes = size(0).zip(size(1)).filter(|_| value.as_array().is_some_and(|a| a.len() == 2));
    sizes.ok_or_else(|| config_error(format!("expected two sizes of a block, got {value}")))
}

fn sparsity(map: &Map<String, Value>) -> Result<()> {
    let Some(config) = map.get("sparsity_config").filter(|value| !keys::is_nothing(value)) else {
        return Ok(());
    };
    match config.get("format").and_then(Value::as_str) {
        None | Some("dense") => Ok(()),
        Some(format) => Err(config_error(format!(
            "format of sparsity_config is {format:?}, expected \"dense\": sparse weights are not read"
        ))),
    }
}

/// What `weights` and `input_activations` of a group say.
fn weight_hints(name: &str, weights: &Value, input: Option<&Value>, all: &Hints) -> Result<Hints> {
    let owner = format!("weights of {name}");
    let args = Args::new(weights, &owner)?;
    if args.get("dynamic").is_some() {
        return Err(args.wrong("dynamic", "false"));
    }
    let block = args.get("block_structure").map(block_size).transpose()?;
    let actorder = args.text("actorder");
    Ok(Hints {
        bits: args.whole("num_bits").and_then(|bits| u8::try_from(bits).ok()),
        group_size: args.whole("group_size"),
        block: block.or(all.block),
        act_order: matches!(actorder, "group" | "dynamic")
            || args.get("actorder") == Some(&json!(true)),
        zero_points: args.is_int() && !args.symmetric(),
        inputs: input.map_or(Ok(all.inputs), |input| inputs(name, input))?,
        ..all.clone()
    })
}

fn inputs(name: &str, input: &Value) -> Result<Inputs> {
    let owner = format!("input_activations of {name}");
    let args = Args::new(input, &owner)?;
    if !args.is_int() {
        return Ok(Inputs::Floats);
    }
    if args.whole("num_bits").is_some_and(|bits| bits != 8) {
        return Err(args.wrong("num_bits", "8"));
    }
    let strategy = args.text("strategy");
    let scales = match (args.get("dynamic"), strategy) {
        (None, "" | "tensor") => return Ok(Inputs::Static),
        (None, _) => return Err(args.wrong("strategy", "\"tensor\" where dynamic is false")),
        (Some(Value::Bool(true)), "" | "token") => ActivationScales::PerToken,
        (Some(Value::Bool(true)), "tensor") => ActivationScales::PerTensor,
        (Some(Value::Bool(true)), "group") => match args.whole("group_size") {
            Some(size) => ActivationScales::PerTokenGroup(size),
            None => return Err(args.wrong("group_size", "a size")),
        },
        (Some(Value::Bool(true)), _) => {
            return Err(args.wrong("strategy", "\"token\", \"group\" or \"tensor\""));
        }
        _ => return Err(args.wrong("dynamic", "true or false")),
    };
    let dtype = if args.symmetric() { ActivationType::Int8 } else { ActivationType::UInt8 };
    Ok(Inputs::Dynamic(ActivationScheme { dtype, scales }))
}

/// `QuantizationArgs` of compressed-tensors.
struct Args<'a> {
    map: &'a Map<String, Value>,
    owner: &'a str,
}

impl<'a> Args<'a> {
    fn new(value: &'a Value, owner: &'a str) -> Result<Self> {
        let Value::Object(map) = value else {
            return Err(config_error(format!("expected an object for {owner}, got {value}")));
        };
        keys::check(map, &[keys::QUANTIZATION_ARGS], owner)?;
        Ok(Self { map, owner })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !keys::is_nothing(value))
    }

    fn text(&self, key: &str) -> &'a str {
        self.get(key).and_then(Value::as_str).unwrap_or("")
    }

    fn whole(&self, key: &str) -> Option<usize> {
        let value = self.get(key).and_then(Value::as_u64)?;
        usize::try_from(value).ok().filter(|&value| value > 0)
    }

    fn is_int(&self) -> bool {
        matches!(self.text("type"), "" | "int")
    }

    fn symmetric(&self) -> bool {
        self.map.get("symmetric").and_then(Value::as_bool).unwrap_or(true)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let value = self.map.get(key).map_or("null".into(), Value::to_string);
        config_error(format!("{key} of {} is {value}, expected {expected}", self.owner))
    }
}

/// A value on one line that is not too long.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
