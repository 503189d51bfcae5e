//! bitsandbytes' layers (`bitsandbytes/nn/modules.py`, `Linear8bitLt` and `Linear4bit`).
//!
//! int8:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `weight` | I8 (n, k) | codes −127 … 127 |
//! | `SCB` | F32 (n) | max\|w\| of each row: `w = code · SCB / 127` |
//! | `weight_format` | U8 () | 0: rows as they are |
//!
//! NF4 and FP4, blocks of the rows back to back, the code of the even element in the high nibble:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `weight` | (n·k/2, 1) | codes, of any type of bytes |
//! | `weight.quant_map` | F32 (16) | the levels |
//! | `weight.absmax` | F32 (n·k/blocksize) | the scale of each block |
//! | `weight.quant_state.bitsandbytes__nf4`, `…__fp4` | U8 | JSON: `blocksize`, `shape`, … |
//!
//! With double quantization `weight.absmax` is U8, and the scale of block i is
//! `nested_quant_map[absmax[i]] · nested_absmax[i / nested_blocksize] + nested_offset`. It is read as
//! an f32, so that the layer has the same numbers but takes 4.5 bits a weight, not 4.13. Blocks that run
//! across rows become groups of as many weights as divide both, with the same numbers and more scales.

use lowbit_core::{
    ActivationScheme, Granularity, Levels, Outliers, QLinear, QMatrix, QuantScheme, QuantType,
    ScaleFormat, ZeroFormat,
};
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource};

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

/// NF4 and FP4 of bitsandbytes (QLoRA), with or without double quantization.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat};
/// use lowbit_formats::conventions::{Bnb4, Convention};
///
/// let w = Mat::from_fn(4, 128, |r, c| ((r * 128 + c) as f32).sin());
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::F32,
///     ..QuantScheme::levels(QuantType::NF4, Granularity::PerGroup(64))
/// };
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let tensors = Bnb4.write(&layer, "q_proj")?;
/// assert_eq!((tensors[0].name.as_str(), &tensors[0].shape[..]), ("q_proj.weight", &[256, 1][..]));
/// assert_eq!(Bnb4.read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bnb4;

const NAME4: &str = "bitsandbytes 4-bit";
const STATES: [(&str, QuantType); 2] = [("nf4", QuantType::NF4), ("fp4", QuantType::FP4_BNB)];

fn state_part(kind: &str) -> String {
    format!("weight.quant_state.bitsandbytes__{kind}")
}

impl Convention for Bnb4 {
    fn name(&self) -> &'static str {
        NAME4
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        STATES.iter().any(|(kind, _)| layer.has(&state_part(kind)))
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let [nf4, fp4] = STATES.map(|(kind, _)| state_part(kind));
        let state = layer.get(&nf4).or_else(|_| layer.get(&fp4))?;
        let json: Value =
            serde_json::from_slice(state.bytes).map_err(|e| state.error(e.to_string()))?;
        // Old files have 64.0 for 64.
        let size = |value: &Value| {
            let size = value.as_u64().or_else(|| value.as_f64().map(|size| size as u64))?;
            usize::try_from(size).ok().filter(|&size| size > 0)
        };
        let number = |key: &str| {
            let found = json.get(key).and_then(size);
            found.ok_or_else(|| state.error(format!("expected a positive {key}")))
        };
        let shape = json.get("shape").and_then(Value::as_array);
        let shape: Option<Vec<_>> = shape.and_then(|s| s.iter().map(size).collect());
        let Some([n, k]) = shape.as_deref().and_then(|shape| <[usize; 2]>::try_from(shape).ok())
        else {
            return Err(state.error("expected a shape of two sizes".into()));
        };
        let block = number("blocksize")?;
        let weight = layer.get("weight")?;
        // The bytes may be viewed as another type.
        weight.check_len()?;
        let elements = n.checked_mul(k).filter(|n| n.div_ceil(2) == weight.bytes.len());
        let Some(elements) = elements else {
            let bytes = weight.bytes.len();
            return Err(weight.error(format!("{bytes} bytes are no codes of {n} x {k} weights")));
        };
        let map = layer.get("weight.quant_map")?;
        let levels = Levels::new(&map.to_f32()?).map_err(|cause| layer.error(map.file, cause))?;
        let absmax = layer.get("weight.absmax")?;
        let scales = match absmax.dtype {
            Dtype::U8 => {
                let floats = |part: &str| layer.get(part)?.to_f32();
                let map = floats("weight.nested_quant_map")?;
                let maxima = floats("weight.nested_absmax")?;
                let nested = number("nested_blocksize")?;
                let offset = json.get("nested_offset").and_then(Value::as_f64);
                let offset =
                    offset.ok_or_else(|| state.error("expected a nested_offset".into()))?;
                let scale = |(i, &code): (usize, &u8)| {
                    let (level, max) = (map.get(usize::from(code))?, maxima.get(i / nested)?);
                    Some(level * max + offset as f32)
                };
                let scales: Option<Vec<f32>> = absmax.bytes.iter().enumerate().map(scale).collect();
                scales.ok_or_else(|| {
                    absmax.error("nested_quant_map or nested_absmax is too short".into())
                })?
            }
            _ => absmax.to_f32()?,
        };
        if scales.len() != elements.div_ceil(block) {
            let (got, expected) = (scales.len(), elements.div_ceil(block));
            return Err(absmax.error(format!("it has {got} scales, expected {expected}")));
        }
        // Blocks may run across rows. The largest groups that end where rows and blocks end have one scale
        // each, that of their block.
        let group = gcd(k, block);
        let groups = elements / group;
        let scales = (0..groups).flat_map(|i| scales[i * group / block].to_le_bytes()).collect();
        let codes: Vec<u8> = weight.bytes.iter().map(|byte| byte.rotate_left(4)).collect();
        // An odd row does not end with a byte there.
        let codes = match k.is_multiple_of(2) {
            true => codes,
            false => {
                let all = codes.iter().flat_map(|byte| [byte & 15, byte >> 4]);
                parts::pack_rows(4, &all.take(elements).collect::<Vec<_>>(), k)
            }
        };
        let scheme = QuantScheme {
            scale_format: ScaleFormat::F32,
            ..QuantScheme::levels(QuantType::Table(levels), Granularity::PerGroup(group))
        };
        layer.finish(QMatrix::from_parts(n, k, scheme, codes, scales, None), weight.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME4, layer, name };
        writer.plain(false, false)?;
        let weight = writer.weight();
        let scheme = weight.scheme();
        let state = STATES.iter().find(|(_, dtype)| *dtype == scheme.dtype);
        let (Some((kind, _)), QuantType::Table(levels)) = (state, scheme.dtype) else {
            return Err(writer.unsupported("anything but NF4 and its own FP4"));
        };
        let (n, k, group) = (weight.rows(), weight.cols(), writer.group_size()?);
        if !k.is_multiple_of(group) || !k.is_multiple_of(2) {
            return Err(writer.unsupported(format!("rows of {k} in groups of {group}")));
        }
        writer.scale_dtype()?;
        let codes = weight.codes().iter().map(|byte| byte.rotate_left(4)).collect();
        let (_, groups) = weight.grid();
        let scales: Vec<f32> =
            (0..n * groups).map(|i| weight.params(i / groups, i % groups).scale).collect();
        let json = json!({
            "quant_type": kind, "blocksize": group, "dtype": "float32", "shape": [n, k],
        });
        let json = json.to_string().into_bytes();
        let map = levels.as_slice();
        let mut tensors = vec![
            writer.tensor("weight", Dtype::U8, &[n * k / 2, 1], codes),
            Tensor::f32(format!("{name}.weight.absmax"), vec![scales.len()], &scales),
            Tensor::f32(format!("{name}.weight.quant_map"), vec![map.len()], map),
            writer.tensor(&state_part(kind), Dtype::U8, &[json.len()], json),
        ];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let kind = STATES.iter().find(|(_, dtype)| *dtype == layer.weight().scheme().dtype);
        Some(json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "bnb_4bit_quant_type": kind.map(|(kind, _)| kind),
            "bnb_4bit_use_double_quant": false,
            "bnb_4bit_compute_dtype": "float32",
        }))
    }
}

fn gcd(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// The f32 whose 127th part is `scale`, or next to it.
fn row_max(scale: f32) -> f32 {
    let max = scale * 127.0;
    let exact = [max, max.next_down(), max.next_up()].into_iter().find(|max| max / 127.0 == scale);
    exact.unwrap_or(max)
}
