//! A layer as its tensors show it, and an account of all of them.

use std::{cell::RefCell, collections::BTreeSet};

use lowbit_core::{QLinear, Transform};

use super::{
    Awq, AwqVersion, Bnb4, BnbInt8, CompressedInt, CompressedPacked, Convention, Fp8, Ggml, GptOss,
    Gptq, Lowbit, Mlx, Mxfp4, Nvfp4, QuantizationConfig, compressed_tensors,
    config::{Hints, Inputs},
    parts::Layer,
    rotation,
};
use crate::{Dtype, Error, Result, TensorSource, TensorView};

/// A quantized layer as a file has it.
#[derive(Debug)]
pub struct Stored {
    /// The layer.
    pub layer: QLinear,
    /// How it is stored.
    pub convention: Box<dyn Convention>,
    /// What is done without, of what its tensors hold: sentences for whoever runs the model.
    pub notes: Vec<&'static str>,
}

/// Scales with which other programs round inputs to FP8 or FP4.
pub(super) const INPUT_SCALES: [&str; 6] = [
    "input_scale",
    "input_global_scale",
    "input_scale_ub",
    "activation_scale",
    "act_scale",
    "input_scale_inv",
];

/// Scales and zeros of an attention block, for a KV cache of fewer bits and for what is done with it.
pub(super) const CACHE_SCALES: [&str; 12] = [
    "k_scale",
    "v_scale",
    "kv_scale",
    "q_scale",
    "p_scale",
    "prob_scale",
    "prob_output_scale",
    "k_zero_point",
    "v_zero_point",
    "k_global_scale",
    "v_global_scale",
    "kv_cache_scale",
];

const INPUTS_STAY: &str =
    "inputs of layers stay f32: they are not rounded to FP8 or FP4 as the file says";
const CACHE_STAYS: &str = "the KV cache stays f32: the file's scales for it are not used";
const ROTATED: &str = "queries and keys are not rotated: their products are the same";

/// The convention in which `source` holds `layer`, by its tensors alone. `None` if it is not quantized, or
/// in no convention of this crate.
///
/// What tensors do not say, a [`QuantizationConfig`] may: bits and group sizes that shapes leave open,
/// blocks of FP8 (128 × 128 if nothing says), how inputs are quantized (f32 if nothing says).
///
/// # Example
/// ```
/// use lowbit_formats::{Dtype, Tensor, conventions, gguf::GgmlType};
///
/// let q8_0 = Dtype::Ggml(GgmlType::Q8_0);
/// let tensors = vec![Tensor::new("blk.0.attn_q.weight", q8_0, vec![1, 32], vec![0; 34])];
/// let convention = conventions::detect(&tensors, "blk.0.attn_q").unwrap();
/// assert_eq!(convention.name(), "ggml");
/// assert!(conventions::detect(&tensors, "blk.0.attn_k").is_none());
/// ```
pub fn detect(source: &dyn TensorSource, layer: &str) -> Option<Box<dyn Convention>> {
    choose(source, layer, &Hints::default())
}

fn choose(source: &dyn TensorSource, layer: &str, hints: &Hints) -> Option<Box<dyn Convention>> {
    let Hints { bits, group_size, symmetric, .. } = *hints;
    let mut all: Vec<Box<dyn Convention>> = vec![
        Box::new(Lowbit),
        Box::new(Bnb4),
        Box::new(BnbInt8 { threshold: hints.threshold }),
        Box::new(Nvfp4 { reciprocal: true }),
        Box::new(Nvfp4 { reciprocal: false }),
        Box::new(CompressedPacked { bits, group_size }),
        Box::new(Mxfp4),
        Box::new(CompressedInt::default()),
        Box::new(Fp8 { block: hints.block.unwrap_or((128, 128)), divides: hints.divides }),
        Box::new(GptOss { experts: 1 }),
        Box::new(Ggml),
        Box::new(Mlx { bits, group_size }),
    ];
    all.push(match awq(Layer { source, name: layer }) {
        Some(version) => Box::new(Awq { version, group_size }),
        None => Box::new(Gptq {
            bits,
            group_size,
            v2: hints.v2 == Some(true),
            symmetric: symmetric.unwrap_or(true),
            unlabelled: hints.v2.is_none(),
        }),
    });
    all.into_iter().find(|convention| convention.holds(source, layer))
}

/// The layout of AWQ, if it is one. Words of AWQ hold 8 outputs, those of GPTQ 1; `gemv` has a row for each
/// output.
fn awq(layer: Layer<'_>) -> Option<AwqVersion> {
    let (words, scales) = (layer.find("qweight")?, layer.find("scales")?);
    let same = |dim: usize| words.shape.get(dim) == scales.shape.get(dim);
    match (same(0), same(1)) {
        _ if layer.has("g_idx") => None,
        (_, true) => None,
        (true, false) => Some(AwqVersion::Gemv),
        (false, false) => Some(AwqVersion::Gemm),
    }
}

/// A source that remembers which tensors it was asked for.
struct Recorder<'a> {
    source: &'a dyn TensorSource,
    seen: RefCell<BTreeSet<String>>,
}

impl TensorSource for Recorder<'_> {
    fn names(&self) -> Vec<&str> {
        self.source.names()
    }

    fn names_under(&self, layer: &str) -> Vec<&str> {
        self.source.names_under(layer)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let view = self.source.tensor(name)?;
        self.seen.borrow_mut().insert(name.into());
        Ok(view)
    }
}

impl QuantizationConfig {
    /// The layer called `layer` in the convention that its tensors show; `None` if it is not quantized.
    ///
    /// Each tensor under its name has been read, or is one that changes nothing.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor under its name that nobody has looked at, and for codes whose scale is
    /// not there or not known; [`Error::Config`] where the configuration contradicts the tensors; those of
    /// [`Convention::read`].
    ///
    /// # Example
    /// ```
    /// use lowbit_formats::{Dtype, Tensor, conventions::QuantizationConfig};
    ///
    /// let config = QuantizationConfig::default();
    /// let mut tensors = vec![
    ///     Tensor::new("up.weight", Dtype::F8E4M3, vec![1, 2], vec![0x38, 0xb8]), // 1 and −1
    ///     Tensor::f32("up.weight_scale", vec![1], &[0.5]),
    /// ];
    /// let stored = config.read(&tensors, "up")?.unwrap();
    /// assert_eq!(stored.convention.name(), "fp8");
    /// assert_eq!(stored.layer.weight().dequantize().data(), [0.5, -0.5]);
    ///
    /// tensors.push(Tensor::f32("up.smooth_factor", vec![2], &[1.0, 2.0]));
    /// let error = config.read(&tensors, "up").unwrap_err().to_string();
    /// assert!(error.starts_with("memory: tensor up.smooth_factor: "), "{error}");
    /// # Ok::<(), lowbit_formats::Error>(())
    /// ```
    pub fn read(&self, source: &dyn TensorSource, layer: &str) -> Result<Option<Stored>> {
        let Some(convention) = choose(source, layer, &Hints::default()) else {
            self.plain(Layer { source, name: layer })?;
            return Ok(None);
        };
        let hints = self.hints(layer)?;
        let convention = choose(source, layer, hints).unwrap_or(convention);
        let recorder = Recorder { source, seen: RefCell::default() };
        let tensors = Layer { source: &recorder, name: layer };
        let mut read = convention.read(&recorder, layer)?;
        agrees(Layer { source, name: layer }, hints, &read)?;
        match hints.inputs {
            Inputs::Unsaid => {}
            Inputs::Floats => read = read.with_activation(None),
            Inputs::Dynamic(scheme) => read = read.with_activation(Some(scheme)),
            Inputs::Static => {
                let scheme = compressed_tensors::static_inputs(tensors)?;
                let scheme = scheme.ok_or_else(|| missing(tensors, "input_scale"))?;
                read = read.with_activation(Some(scheme));
            }
        }
        let before = self.before(tensors, read.weight().cols())?;
        if !before.is_empty() {
            let transforms = before.into_iter().chain(read.transforms().iter().cloned()).collect();
            read = read.with_transforms(transforms).map_err(|cause| tensors.error("", cause))?;
        }
        let mut notes = self.account(tensors, &recorder.seen.take(), hints, &*convention)?;
        let floats = matches!(hints.inputs, Inputs::Floats) && !notes.contains(&INPUTS_STAY);
        notes.extend(floats.then_some(INPUTS_STAY));
        Ok(Some(Stored { layer: read, convention, notes }))
    }

    /// The note on a tensor outside of layers that changes nothing here, such as a scale of the KV cache.
    /// `None` for all others.
    ///
    /// # Example
    /// ```
    /// use lowbit_formats::conventions::QuantizationConfig;
    ///
    /// let config = QuantizationConfig::default();
    /// assert!(config.passes_over("model.layers.0.self_attn.k_scale").is_some());
    /// assert!(config.passes_over("model.layers.0.self_attn.relative_bias").is_none());
    /// ```
    pub fn passes_over(&self, tensor: &str) -> Option<&'static str> {
        let (place, part) = tensor.rsplit_once('.')?;
        let attention = place.split('.').any(|part| part.contains("attn") || part == "attention");
        if attention && CACHE_SCALES.contains(&part) {
            return Some(CACHE_STAYS);
        }
        let of_cache = place.ends_with(".k_proj") || place.ends_with(".v_proj");
        if self.cache && of_cache && matches!(part, "output_scale" | "output_zero_point") {
            return Some(CACHE_STAYS);
        }
        let rotated = self.attention_rotations.iter().any(|name| {
            let matrix =
                place.rsplit('.').next().and_then(|place| place.strip_prefix(name.as_str()));
            matches!(matrix, Some("_q_attn" | "_k_cache")) && matches!(part, "weight" | "perm")
        });
        rotated.then_some(ROTATED)
    }

    /// Refuses codes that no convention reads, and transforms of inputs of layers in floats.
    fn plain(&self, layer: Layer<'_>) -> Result<()> {
        let names = layer.source.names_under(layer.name);
        let beside = |but: &str| {
            let parts = names.iter().filter_map(|name| name.get(layer.name.len() + 1..));
            let parts: Vec<_> = parts.filter(|part| *part != but).collect();
            if parts.is_empty() { "nothing".into() } else { parts.join(", ") }
        };
        match layer.find("weight") {
            Some(weight) if is_plain(weight.dtype) => {}
            // An array of numbers that is nobody's code.
            Some(weight) if names.len() == 1 => {
                let (file, tensor) = (weight.file.into(), weight.name.into());
                return Err(Error::Dtype { file, tensor, got: weight.dtype });
            }
            Some(weight) => {
                return Err(weight.error(format!(
                    "it is {}, but its scale is not there under a known name; beside it lies {}",
                    weight.dtype,
                    beside("weight")
                )));
            }
            None => {
                let Some(first) = names.first() else { return Ok(()) };
                return Err(layer.source.tensor(first)?.error(format!(
                    "it belongs to layer {}, which is stored in no known way: of it there is {}",
                    layer.name,
                    beside("")
                )));
            }
        }
        match self.rotations.iter().find(|rotation| rotation.speaks_of(layer.name)) {
            None => Ok(()),
            Some(rotation) => Err(Error::Config {
                reason: format!(
                    "the transform {} is of the input of {}, which is not quantized: that is not computed",
                    rotation.name, layer.name
                ),
            }),
        }
    }

    /// What happens to the input before the layer's own transforms.
    fn before(&self, layer: Layer<'_>, k: usize) -> Result<Vec<Transform>> {
        let mut all = Vec::new();
        for rotation in self.rotations.iter().filter(|rotation| rotation.speaks_of(layer.name)) {
            all.extend(rotation::transforms(layer, rotation, k)?);
        }
        // ModelOpt's AWQ: what weights were divided by, inputs are multiplied with.
        if let Some(scale) = layer.find("pre_quant_scale") {
            let scales = scale.to_f32()?;
            let transform = Transform::Scale(scales);
            transform.check(k).map_err(|cause| layer.error(scale.file, cause))?;
            all.push(transform);
        }
        Ok(all)
    }

    /// Notes on the tensors under the layer's name that were not `seen`; an error for one that matters.
    fn account(
        &self,
        layer: Layer<'_>,
        seen: &BTreeSet<String>,
        hints: &Hints,
        convention: &dyn Convention,
    ) -> Result<Vec<&'static str>> {
        let floats = convention.rounds_inputs_to_floats() || hints.inputs == Inputs::Floats;
        let mut notes = Vec::new();
        for name in layer.source.names_under(layer.name) {
            let Some(part) = name.get(layer.name.len() + 1..).filter(|_| !seen.contains(name))
            else {
                continue;
            };
            let view = layer.source.tensor(name)?;
            let all = |byte: u8| view.bytes.iter().all(|&b| b == byte);
            let note = match part {
                _ if floats && INPUT_SCALES.contains(&part) => Some(INPUTS_STAY),
                // No zero at all, and no groups.
                "weight_zero_point" | "input_zero_point" if all(0) => continue,
                "weight_g_idx" | "g_idx" if all(0xff) => continue,
                _ if self.shared(part) => continue,
                _ => self.passes_over(name),
            };
            match note {
                Some(note) if notes.contains(&note) => {}
                Some(note) => notes.push(note),
                None => {
                    return Err(view.error(format!(
                        "it lies beside the tensors of {}, which does not know it: it might mean other numbers",
                        convention.name()
                    )));
                }
            }
        }
        Ok(notes)
    }

    /// Is it the matrix of a transform that this layer has for others too?
    fn shared(&self, part: &str) -> bool {
        let names = self.rotations.iter().map(|rotation| &rotation.name);
        let mut parts = names.map(|name| part.strip_prefix(name.as_str()));
        parts.any(|part| matches!(part, Some("_input.weight" | "_input.perm")))
    }
}

/// Are the tensors there that the configuration speaks of?
fn agrees(layer: Layer<'_>, hints: &Hints, read: &QLinear) -> Result<()> {
    let groups = read.weight().grid().1;
    let g_idx = ["g_idx", "weight_g_idx"];
    if hints.act_order && groups > 1 && !g_idx.iter().any(|part| layer.has(part)) {
        let part = if layer.has("qweight") { g_idx[0] } else { g_idx[1] };
        return Err(missing(layer, part));
    }
    if hints.zero_points && !layer.has("weight_zero_point") {
        return Err(missing(layer, "weight_zero_point"));
    }
    Ok(())
}

/// Are elements of this type numbers as they are, not codes?
fn is_plain(dtype: Dtype) -> bool {
    let codes = [Dtype::I8, Dtype::U8, Dtype::I32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::F8E8M0];
    let packed = ["U32", "I16", "U16", "F4", "F6_E2M3", "F6_E3M2"].map(Dtype::Other);
    !codes.contains(&dtype) && !packed.contains(&dtype)
}

fn missing(layer: Layer<'_>, part: &str) -> Error {
    let reason = format!("it speaks of the tensor {}.{part}, which is not there", layer.name);
    Error::Config { reason }
}
