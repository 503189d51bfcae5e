//! bitsandbytes' int8 layers (`bitsandbytes/nn/modules.py`, `Linear8bitLt`).
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `weight` | I8 (n, k) | codes −127 … 127 |
//! | `SCB` | F32 (n) | max\|w\| of each row: `w = code · SCB / 127` |
//! | `weight_format` | U8 () | 0: rows as they are |

use lowbit_core::{
    ActivationScheme, Granularity, Outliers, QLinear, QMatrix, QuantScheme, ScaleFormat, ZeroFormat,
};
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Error, Result, Tensor, TensorSource};

const NAME: &str = "bitsandbytes int8";

/// LLM.int8() as bitsandbytes stores it: a scale per row, and features beyond the threshold in f32.
///
/// Scales are `SCB / 127` rounded to f32, so they come back within one unit in the last place, the
/// codes exactly.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_formats::conventions::{BnbInt8, Convention};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let int8 = BnbInt8 { threshold: None };
/// let tensors = int8.write(&QLinear::new(q.clone()), "q_proj")?;
/// assert_eq!(tensors[1].name, "q_proj.SCB");
/// assert_eq!(int8.read(&tensors, "q_proj")?.weight().codes(), q.codes());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BnbInt8 {
    /// From which magnitude on features stay in f32; `None` for layers with f32 inputs.
    pub threshold: Option<f32>,
}

pub(super) fn from_config(config: &Value) -> Result<Box<dyn Convention>> {
    let is = |key| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    if !is("load_in_8bit") && !is("_load_in_8bit") {
        let reason = "bitsandbytes without load_in_8bit is not supported".into();
        return Err(Error::Config { reason });
    }
    let threshold = config.get("llm_int8_threshold").and_then(Value::as_f64).unwrap_or(6.0);
    // A threshold of 0 means none: all features are int8.
    Ok(Box::new(BnbInt8 { threshold: Some(threshold as f32) }))
}

impl Convention for BnbInt8 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        layer.has("SCB") && layer.has("weight")
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let (weight, [n, k]) = layer.matrix("weight", Dtype::I8)?;
        let scb = layer.get("SCB")?;
        parts::expect_dtype(&scb, Dtype::F32)?;
        parts::expect_shape(&scb, &[n])?;
        if let Some(format) = layer.find("weight_format")
            && format.bytes.first().is_some_and(|&format| format != 0)
        {
            return Err(format.error(format!(
                "it is {}, a layout for old GPUs, expected 0: convert the checkpoint",
                format.bytes[0]
            )));
        }
        let scales = scb.to_f32()?.into_iter().flat_map(|max| (max / 127.0).to_le_bytes());
        let scheme = QuantScheme {
            scale_format: ScaleFormat::F32,
            ..QuantScheme::symmetric(8, Granularity::PerChannel)
        };
        let codes = weight.bytes.iter().map(|code| code ^ 0x80).collect();
        let matrix = QMatrix::from_parts(n, k, scheme, codes, scales.collect(), None);
        let linear = layer.finish(matrix, weight.file)?;
        let Some(threshold) = self.threshold else { return Ok(linear) };
        let outliers = (threshold > 0.0).then_some(Outliers::Threshold(threshold));
        linear
            .with_activation(Some(ActivationScheme::INT8_PER_TOKEN))
            .with_outliers(outliers)
            .map_err(|cause| layer.error(weight.file, cause))
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        writer.plain(false, true)?;
        let weight = writer.weight();
        let scheme = weight.scheme();
        if writer.bits()? != 8
            || scheme.zero != ZeroFormat::Midpoint
            || scheme.granularity != Granularity::PerChannel
        {
            return Err(writer.unsupported("anything but 8 bits, symmetric, a scale per channel"));
        }
        match (layer.activation(), layer.outliers()) {
            (None, None) => {}
            (Some(ActivationScheme::INT8_PER_TOKEN), None | Some(Outliers::Threshold(_))) => {}
            _ => return Err(writer.unsupported("activations but int8 per token with a threshold")),
        }
        let (n, k) = (weight.rows(), weight.cols());
        let codes = weight.codes().iter().map(|code| code ^ 0x80).collect();
        let scb: Vec<f32> = (0..n).map(|row| row_max(weight.params(row, 0).scale)).collect();
        let mut tensors = vec![
            writer.tensor("weight", Dtype::I8, &[n, k], codes),
            Tensor::f32(format!("{name}.SCB"), vec![n], &scb),
            writer.tensor("weight_format", Dtype::U8, &[], vec![0]),
        ];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let threshold = match layer.outliers() {
            Some(Outliers::Threshold(threshold)) => *threshold,
            _ => 0.0,
        };
        Some(json!({
            "quant_method": "bitsandbytes",
            "load_in_8bit": true,
            "llm_int8_threshold": threshold,
        }))
    }
}

/// The f32 whose 127th part is `scale`, or next to it.
fn row_max(scale: f32) -> f32 {
    let max = scale * 127.0;
    let exact = [max, max.next_down(), max.next_up()].into_iter().find(|max| max / 127.0 == scale);
    exact.unwrap_or(max)
}
