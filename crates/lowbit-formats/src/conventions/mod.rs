//! How checkpoints store quantized layers: which tensors, in which order of bits.
//!
//! A [`Convention`] turns the named tensors of a layer into a [`QLinear`] and back, bit by bit; it
//! looks at nothing else. Which one a layer is in, its tensors show ([`detect`]); [`QuantizationConfig`] is
//! what a `config.json` says beyond that, and reads layers with an account of all their tensors.

mod awq;
mod bitsandbytes;
mod compressed_tensors;
mod config;
mod fp4;
mod fp8;
mod ggml;
mod gptq;
mod keys;
mod lowbit;
mod mlx;
mod parts;
mod pattern;
mod read;
mod rotation;

use std::fmt;

use lowbit_core::QLinear;
use serde_json::{Value, json};

pub use awq::{Awq, AwqVersion};
pub use bitsandbytes::{Bnb4, BnbInt8};
pub use compressed_tensors::{CompressedInt, CompressedPacked};
pub use config::QuantizationConfig;
pub use fp4::{GptOss, Mxfp4, Nvfp4};
pub use fp8::{CompressedFloat, Fp8};
pub use ggml::Ggml;
pub use gptq::Gptq;
pub use lowbit::Lowbit;
pub use mlx::Mlx;
pub use read::{Stored, detect};

use crate::{Result, Tensor, TensorSource};

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
    /// [`Error::Missing`](crate::Error::Missing) for a tensor that is not there, [`Error::Tensor`](crate::Error::Tensor) for one of the wrong type
    /// or shape, [`Error::Layer`](crate::Error::Layer) for numbers that no layer has, such as an infinite scale.
    fn read(&self, source: &dyn TensorSource, layer: &str) -> Result<QLinear>;

    /// Do other programs round the inputs of such layers to FP8 or FP4? Here they stay f32, and scales for
    /// that are passed over.
    fn rounds_inputs_to_floats(&self) -> bool {
        false
    }

    /// The tensors of `layer` under the name `name`. Reading them gives a layer of the same weights.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a layer that the convention cannot hold.
    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>>;

    /// The `quantization_config` of a `config.json` for a model of layers such as `layer`; `None` where
    /// files need none.
    fn config(&self, layer: &QLinear) -> Option<Value>;
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
