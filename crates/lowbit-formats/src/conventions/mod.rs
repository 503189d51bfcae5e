//! How checkpoints store quantized layers: which tensors, in which order of bits.
//!
//! A [`Convention`] turns the named tensors of a layer into a [`QLinear`] and back, bit by bit; it
//! looks at nothing else. [`from_config`] finds the one that a `config.json` speaks of.

mod awq;
mod bitsandbytes;
mod compressed_tensors;
mod fp4;
mod fp8;
mod ggml;
mod gptq;
mod lowbit;
mod parts;

use std::fmt;

use lowbit_core::QLinear;
use serde_json::{Value, json};

pub use awq::{Awq, AwqVersion};
pub use bitsandbytes::{Bnb4, BnbInt8};
pub use compressed_tensors::{CompressedInt, CompressedPacked};
pub use fp4::{GptOss, Mxfp4, Nvfp4};
pub use fp8::{CompressedFloat, Fp8};
pub use ggml::Ggml;
pub use gptq::Gptq;
pub use lowbit::Lowbit;

use crate::{Error, Result, Tensor, TensorSource};

/// A way to store quantized layers as named tensors.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_formats::conventions::{Convention, Gptq};
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(32));
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
///
/// let tensors = Gptq::default().write(&layer, "q_proj")?;
/// assert_eq!(tensors[0].name, "q_proj.qweight");
/// assert_eq!(Gptq::default().read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Convention: fmt::Debug + Send + Sync {
    /// What messages and reports call it.
    fn name(&self) -> &'static str;

    /// Does `source` have the tensors of `layer` in this convention? Only their names count.
    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool;

    /// The layer called `layer`, whose tensors are `layer.…`.
    ///
    /// # Errors
    /// [`Error::Missing`] for a tensor that is not there, [`Error::Tensor`] for one of the wrong type
    /// or shape, [`Error::Layer`] for numbers that no layer has, such as an infinite scale.
    fn read(&self, source: &dyn TensorSource, layer: &str) -> Result<QLinear>;

    /// The tensors of `layer` under the name `name`. Reading them gives a layer of the same weights.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a layer that the convention cannot hold.
    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>>;

    /// The `quantization_config` of a `config.json` for a model of layers such as `layer`; `None` where
    /// files need none.
    fn config(&self, layer: &QLinear) -> Option<Value>;
}

/// The convention that a `quantization_config` of `config.json` (or a `quantize_config.json`) speaks
/// of.
///
/// # Errors
/// [`Error::Config`] if this crate cannot read it.
///
/// # Example
/// ```
/// use lowbit_formats::conventions;
///
/// let config = serde_json::json!({"quant_method": "awq", "bits": 4, "group_size": 128});
/// assert_eq!(conventions::from_config(&config)?.name(), "awq");
/// # Ok::<(), lowbit_formats::Error>(())
/// ```
pub fn from_config(config: &Value) -> Result<Box<dyn Convention>> {
    let error = |reason: String| Error::Config { reason };
    let text = |key| config.get(key).and_then(Value::as_str);
    match text("quant_method") {
        // Files of AutoGPTQ's own have no quant_method.
        Some("gptq") => Ok(Box::new(Gptq::from_config(config)?)),
        None if config.get("desc_act").is_some() => Ok(Box::new(Gptq::from_config(config)?)),
        Some("lowbit") => Ok(Box::new(Lowbit)),
        Some("awq") => Ok(Box::new(Awq::from_config(config)?)),
        Some("bitsandbytes") => bitsandbytes::from_config(config),
        Some("fp8" | "fbgemm_fp8") => Ok(Box::new(Fp8::from_config(config))),
        Some("mxfp4") => Ok(Box::new(GptOss { experts: 1 })),
        Some("modelopt") => match text("quant_algo") {
            Some("NVFP4") => Ok(Box::new(Nvfp4 { reciprocal: false })),
            Some("FP8") => Ok(Box::new(Fp8::from_config(config))),
            other => Err(error(format!("the quant_algo {other:?} of modelopt is not supported"))),
        },
        Some("compressed-tensors") => compressed_tensors::from_config(config),
        Some(method) => Err(error(format!("the quant_method {method:?} is not supported"))),
        None => Err(error("it has no quant_method".into())),
    }
}

/// Names the linear `layers` that stay floats in a `quantization_config` that a [`Convention`] has made, where its
/// readers look for them: `ignore` of compressed-tensors, `modules_to_not_convert` of AWQ and FP8,
/// `llm_int8_skip_modules` of bitsandbytes, `dynamic` of GPTQ. The readers of other methods look at the tensors.
///
/// # Example
/// ```
/// use lowbit_formats::conventions::leave_out;
/// use serde_json::json;
///
/// let mut config = json!({"quant_method": "gptq", "bits": 4});
/// leave_out(&mut config, &["model.layers.0.mlp.gate"]);
/// assert_eq!(config["dynamic"], json!({"-:model\\.layers\\.0\\.mlp\\.gate$": {}}));
/// ```
pub fn leave_out(config: &mut Value, layers: &[&str]) {
    let method = config.get("quant_method").and_then(Value::as_str).unwrap_or_default();
    let key = match method {
        "compressed-tensors" => "ignore",
        "awq" | "fp8" => "modules_to_not_convert",
        "bitsandbytes" => "llm_int8_skip_modules",
        "gptq" => {
            // Regular expressions for what stands at the start of a name; `-:` leaves layers out.
            let pattern = |layer: &&str| (format!("-:{}$", layer.replace('.', "\\.")), json!({}));
            let patterns: serde_json::Map<_, _> = layers.iter().map(pattern).collect();
            config["dynamic"] = patterns.into();
            return;
        }
        _ => return,
    };
    config[key] = layers.into();
}

/// A whole number of a configuration; `None` where it is absent or, as a group size of −1, negative.
fn number(config: &Value, keys: &[&str]) -> Option<usize> {
    let value = keys.iter().find_map(|key| config.get(key))?;
    value.as_u64().and_then(|x| usize::try_from(x).ok())
}

/// The convention in which `source` holds `layer`, by its tensors alone: for files without a
/// configuration. `None` if it is not quantized, or in no convention of this crate.
///
/// What tensors do not say is as in a [`Default`]: version 1 of GPTQ, blocks of 128 × 128 in FP8, f32
/// inputs.
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
    let size = |part: &str, dim: usize| {
        source.tensor(&format!("{layer}.{part}")).ok()?.shape.get(dim).copied()
    };
    // Words of AWQ hold 8 outputs, those of GPTQ 1; `gemv` has a row for each output.
    let awq = if size("qweight", 0) == size("scales", 0) {
        Some(AwqVersion::Gemv)
    } else if size("qweight", 1) != size("scales", 1) {
        Some(AwqVersion::Gemm)
    } else {
        None
    };
    let mut all: Vec<Box<dyn Convention>> = vec![
        Box::new(Lowbit),
        Box::new(Bnb4),
        Box::new(BnbInt8 { threshold: None }),
        Box::new(Nvfp4 { reciprocal: true }),
        Box::new(Nvfp4 { reciprocal: false }),
        Box::new(CompressedPacked::default()),
        Box::new(Mxfp4),
        Box::new(CompressedInt::default()),
        Box::new(Fp8::default()),
        Box::new(GptOss { experts: 1 }),
        Box::new(Ggml),
    ];
    match awq {
        Some(version) => all.push(Box::new(Awq { version, group_size: None })),
        None => all.push(Box::new(Gptq::default())),
    }
    all.into_iter().find(|convention| convention.holds(source, layer))
}
