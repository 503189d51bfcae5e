//! Weights in FP4 E2M1, two a byte, the one of the even column in the low nibble.
//!
//! | | codes U8 (n, k/2) | scales | tensor's scale |
//! |---|---|---|---|
//! | NVFP4 of compressed-tensors | `weight_packed` | `weight_scale` F8_E4M3 (n, k/16) | divided by `weight_global_scale` F32 (1) |
//! | NVFP4 of ModelOpt | `weight` | `weight_scale` F8_E4M3 (n, k/16) | times `weight_scale_2` F32 () |
//! | MXFP4 of compressed-tensors | `weight_packed` | `weight_scale` U8 (n, k/32), `2^(byte − 127)` | |
//! | MXFP4 of Quark (read only) | `weight` | `weight_scale` U8 (n, k/32), `2^(byte − 127)` | |
//! | MXFP4 of gpt-oss | `…_blocks` (experts, n, k/32, 16) | `…_scales` U8 (experts, n, k/32) | |
//!
//! Inputs stay f32.

use lowbit_core::{Granularity, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, TwoLevel};
use lowbit_dtypes::Format;
use serde_json::{Value, json};

use super::{
    Convention, compressed_tensors,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource, TensorView};

const E2M1: QuantType = QuantType::Float(Format::F4E2M1);

const NVFP4: QuantScheme = QuantScheme {
    scale_format: ScaleFormat::TwoLevel(TwoLevel::NVFP4),
    ..QuantScheme::levels(E2M1, Granularity::PerGroup(16))
};

const MXFP4: QuantScheme = QuantScheme {
    scale_format: ScaleFormat::E8m0,
    ..QuantScheme::levels(E2M1, Granularity::PerGroup(32))
};

/// NVIDIA's FP4: groups of 16 with E4M3 scales, over one f32 for the tensor.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, TwoLevel};
/// use lowbit_dtypes::Format;
/// use lowbit_formats::conventions::{Convention, Nvfp4};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::TwoLevel(TwoLevel::NVFP4),
///     ..QuantScheme::levels(QuantType::Float(Format::F4E2M1), Granularity::PerGroup(16))
/// };
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let modelopt = Nvfp4 { reciprocal: false };
/// assert_eq!(modelopt.read(&modelopt.write(&layer, "q_proj")?, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nvfp4 {
    /// Is the tensor's scale stored as its reciprocal, as in compressed-tensors? It then comes back
    /// within one unit in the last place. Otherwise the tensors are those of ModelOpt.
    pub reciprocal: bool,
}

impl Nvfp4 {
    fn parts(self) -> (&'static str, &'static str) {
        match self.reciprocal {
            true => ("weight_packed", "weight_global_scale"),
            false => ("weight", "weight_scale_2"),
        }
    }
}

impl Convention for Nvfp4 {
    fn name(&self) -> &'static str {
        match self.reciprocal {
            true => "compressed-tensors nvfp4-pack-quantized",
            false => "modelopt nvfp4",
        }
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        let (codes, step) = self.parts();
        let bytes = layer.find(codes).is_some_and(|codes| codes.dtype == Dtype::U8);
        bytes && layer.has("weight_scale") && layer.has(step)
    }

    fn rounds_inputs_to_floats(&self) -> bool {
        true
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let (part, step) = self.parts();
        let (codes, [n, half]) = layer.matrix(part, Dtype::U8)?;
        let (scales, _) = layer.matrix("weight_scale", Dtype::F8E4M3)?;
        parts::expect_shape(&scales, &[n, (2 * half).div_ceil(16)])?;
        let step = layer.get(step)?;
        parts::expect_dtype(&step, Dtype::F32)?;
        let [factor] = step.to_f32()?[..] else {
            return Err(step.error(format!("its shape is {:?}, expected one number", step.shape)));
        };
        let factor = if self.reciprocal { 1.0 / factor } else { factor };
        let bytes = [scales.bytes, &factor.to_le_bytes()].concat();
        let matrix = QMatrix::from_parts(n, 2 * half, NVFP4, codes.bytes.to_vec(), bytes, None);
        layer.finish(matrix, codes.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: self.name(), layer, name };
        let (n, k) = scheme_of(writer, NVFP4, 16)?;
        let (part, step) = self.parts();
        let weight = writer.weight();
        let (scales, bytes) = weight.scales().split_at(weight.scales().len().saturating_sub(4));
        let factor = bytes.first_chunk().map_or(1.0, |&bytes| f32::from_le_bytes(bytes));
        let factor = if self.reciprocal { reciprocal(factor) } else { factor };
        let shape = if self.reciprocal { vec![1] } else { vec![] };
        let scales = scales.to_vec();
        let mut tensors = vec![
            writer.tensor(part, Dtype::U8, &[n, k / 2], weight.codes().to_vec()),
            writer.tensor("weight_scale", Dtype::F8E4M3, &[n, k / 16], scales),
            Tensor::f32(format!("{name}.{step}"), shape, &[factor]),
        ];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, _: &QLinear) -> Option<Value> {
        Some(match self.reciprocal {
            true => compressed("nvfp4-pack-quantized", "tensor_group", 16, "torch.float8_e4m3fn"),
            false => json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
        })
    }
}

/// MXFP4 of compressed-tensors: groups of 32 with powers of two.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat};
/// use lowbit_dtypes::Format;
/// use lowbit_formats::conventions::{Convention, GptOss, Mxfp4};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::E8m0,
///     ..QuantScheme::levels(QuantType::Float(Format::F4E2M1), Granularity::PerGroup(32))
/// };
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// assert_eq!(Mxfp4.read(&Mxfp4.write(&layer, "q_proj")?, "q_proj")?, layer);
///
/// // The same numbers as two experts of two outputs each.
/// let gpt_oss = GptOss { experts: 2 };
/// let tensors = gpt_oss.write(&layer, "experts.down_proj")?;
/// assert_eq!(tensors[0].shape, [2, 2, 2, 16]);
/// assert_eq!(gpt_oss.read(&tensors, "experts.down_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mxfp4;

impl Convention for Mxfp4 {
    fn name(&self) -> &'static str {
        "compressed-tensors mxfp4-pack-quantized"
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        match layer.find("weight_packed") {
            Some(_) => layer.has("weight_scale") && !layer.has("weight_global_scale"),
            None => of_quark(layer),
        }
    }

    fn rounds_inputs_to_floats(&self) -> bool {
        true
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let part = if layer.has("weight_packed") { "weight_packed" } else { "weight" };
        let (codes, [n, half]) = layer.matrix(part, Dtype::U8)?;
        let scales = layer.get("weight_scale")?;
        if scales.dtype != Dtype::F8E8M0 {
            parts::expect_dtype(&scales, Dtype::U8)?;
        }
        parts::expect_shape(&scales, &[n, (2 * half).div_ceil(32)])?;
        let (bytes, scales) = (codes.bytes.to_vec(), scales.bytes.to_vec());
        let matrix = QMatrix::from_parts(n, 2 * half, MXFP4, bytes, scales, None);
        layer.finish(matrix, codes.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: self.name(), layer, name };
        let (n, k) = scheme_of(writer, MXFP4, 32)?;
        let weight = writer.weight();
        let (codes, scales) = (weight.codes().to_vec(), weight.scales().to_vec());
        let mut tensors = vec![
            writer.tensor("weight_packed", Dtype::U8, &[n, k / 2], codes),
            writer.tensor("weight_scale", Dtype::U8, &[n, k / 32], scales),
        ];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, _: &QLinear) -> Option<Value> {
        Some(compressed("mxfp4-pack-quantized", "group", 32, "torch.uint8"))
    }
}

/// Are these bytes of two codes each, 16 for a scale?
fn of_quark(layer: Layer<'_>) -> bool {
    let (Some(codes), Some(scales)) = (layer.find("weight"), layer.find("weight_scale")) else {
        return false;
    };
    let bytes = codes.dtype == Dtype::U8 && matches!(scales.dtype, Dtype::U8 | Dtype::F8E8M0);
    let last = |view: &TensorView<'_>| view.shape.last().copied().unwrap_or(0);
    bytes && last(&codes).div_ceil(16) == last(&scales)
}

/// MXFP4 of gpt-oss: the rows of all experts one below the other, `(experts·n, k)`.
///
/// In `gate_up_proj` rows of gate and up alternate; here they stay where they are.
///
/// # Example
/// See [`Mxfp4`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptOss {
    /// The experts whose rows a layer that is written consists of.
    pub experts: usize,
}

impl Convention for GptOss {
    fn name(&self) -> &'static str {
        "gpt-oss mxfp4"
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        ["blocks", "scales"].iter().all(|part| source.tensor(&format!("{layer}_{part}")).is_ok())
    }

    fn rounds_inputs_to_floats(&self) -> bool {
        true
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let blocks = source.tensor(&format!("{name}_blocks"))?;
        let scales = source.tensor(&format!("{name}_scales"))?;
        parts::expect_dtype(&blocks, Dtype::U8)?;
        parts::expect_dtype(&scales, Dtype::U8)?;
        let [experts, rows, groups, 16] = *blocks.shape else {
            let shape = blocks.shape;
            return Err(blocks.error(format!("its shape is {shape:?}, expected (e, n, k/32, 16)")));
        };
        parts::expect_shape(&scales, &[experts, rows, groups])?;
        let sizes = experts.checked_mul(rows).zip(groups.checked_mul(32));
        let Some((n, k)) = sizes.filter(|&(n, k)| n > 0 && k > 0) else {
            return Err(blocks.error("it is empty".into()));
        };
        let bias = source.tensor(&format!("{name}_bias")).ok();
        let bias = bias.map(|bias| bias.to_f32()).transpose()?;
        let (bytes, scales) = (blocks.bytes.to_vec(), scales.bytes.to_vec());
        let matrix = QMatrix::from_parts(n, k, MXFP4, bytes, scales, None);
        let linear = matrix.and_then(|weight| QLinear::new(weight).with_bias(bias));
        linear.map_err(|cause| layer.error(blocks.file, cause))
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: self.name(), layer, name };
        let (n, k) = scheme_of(writer, MXFP4, 32)?;
        let experts = self.experts;
        if experts == 0 || !n.is_multiple_of(experts) {
            return Err(writer.unsupported(format!("{n} rows of {experts} experts")));
        }
        let (rows, groups) = (n / experts, k / 32);
        let weight = writer.weight();
        let tensor = |part: &str, shape: Vec<usize>, bytes: &[u8]| {
            Tensor::new(format!("{name}_{part}"), Dtype::U8, shape, bytes.to_vec())
        };
        let mut tensors = vec![
            tensor("blocks", vec![experts, rows, groups, 16], weight.codes()),
            tensor("scales", vec![experts, rows, groups], weight.scales()),
        ];
        if let Some(bias) = layer.bias() {
            tensors.push(Tensor::f32(format!("{name}_bias"), vec![experts, rows], bias));
        }
        Ok(tensors)
    }

    fn config(&self, _: &QLinear) -> Option<Value> {
        Some(json!({"quant_method": "mxfp4"}))
    }
}

/// Rows and columns of a layer of `scheme` whose groups are all full.
fn scheme_of(writer: Writer<'_>, scheme: QuantScheme, group: usize) -> Result<(usize, usize)> {
    writer.plain(false, false)?;
    let weight = writer.weight();
    if weight.scheme() != scheme {
        return Err(writer.unsupported(format!("{}, only {scheme}", weight.scheme())));
    }
    if !weight.cols().is_multiple_of(group) {
        let what = format!("rows of {}, only multiples of {group}", weight.cols());
        return Err(writer.unsupported(what));
    }
    Ok((weight.rows(), weight.cols()))
}

/// The f32 whose reciprocal is `x`, or next to it.
fn reciprocal(x: f32) -> f32 {
    let near = 1.0 / x;
    let exact = [near, near.next_down(), near.next_up()].into_iter().find(|y| 1.0 / y == x);
    exact.unwrap_or(near)
}

fn compressed(format: &str, strategy: &str, group_size: usize, scale_dtype: &str) -> Value {
    let weights = json!({
        "num_bits": 4,
        "type": "float",
        "symmetric": true,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": false,
        "scale_dtype": scale_dtype,
    });
    compressed_tensors::config(format, weights, Value::Null)
}
