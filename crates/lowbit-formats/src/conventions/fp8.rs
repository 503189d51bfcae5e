//! Weights in FP8, one code a byte, with scales of several shapes.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `weight` | F8_E4M3 or F8_E5M2 (n, k) | |
//! | `weight_scale` | (), (1), (n), (n, 1), (n, groups) or blocks | compressed-tensors, llm-compressor, ModelOpt: `w = code · scale` |
//! | `weight_scale_inv` | (⌈n/128⌉, ⌈k/128⌉) | DeepSeek: also `code · scale`, whatever its name says |
//! | `weight_scale_inv` | as above | GPTQModel with `weight_scale_semantics: inverse`: `code / scale` |
//! | `scale` | as `weight_scale` | other programs: `w = code · scale` |
//! | any of them | U8 or F8_E8M0, blocks | powers of two, `2^(byte − 127)` |
//! | `weight_scale` | U8 (n, k/32) | MXFP8: powers of two, `2^(byte − 127)` |
//!
//! Inputs stay f32: that some of these systems round them to FP8 too is not imitated. What is written is E4M3, which
//! is all that these systems compute with.

use lowbit_core::{Granularity, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat};
use lowbit_dtypes::Format;
use serde_json::{Value, json};

use super::{
    Convention, compressed_tensors,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource};

const NAME: &str = "fp8";

/// FP8 weights of DeepSeek, compressed-tensors, llm-compressor, ModelOpt and GPTQModel.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat};
/// use lowbit_dtypes::Format;
/// use lowbit_formats::conventions::{Convention, Fp8};
///
/// let w = Mat::from_fn(130, 200, |r, c| ((r * 200 + c) as f32).sin());
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::F32,
///     ..QuantScheme::levels(QuantType::Float(Format::F8E4M3), Granularity::PerBlock(128, 128))
/// };
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let tensors = Fp8::default().write(&layer, "q_proj")?;
/// assert_eq!((tensors[1].name.as_str(), &tensors[1].shape[..]), ("q_proj.weight_scale_inv", &[2, 2][..]));
/// assert_eq!(Fp8::default().read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8 {
    /// Rows and columns of a block, for scales in two dimensions.
    pub block: (usize, usize),
    /// Does `weight_scale_inv` hold what codes are divided by?
    pub divides: bool,
}

impl Default for Fp8 {
    fn default() -> Self {
        Self { block: (128, 128), divides: false }
    }
}

/// What scales are called, of which a layer has one.
const SCALES: [&str; 3] = ["weight_scale_inv", "weight_scale", "scale"];

/// The types of weights.
const TYPES: [(Dtype, Format); 2] =
    [(Dtype::F8E4M3, Format::F8E4M3), (Dtype::F8E5M2, Format::F8E5M2)];

impl Convention for Fp8 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        let weight = layer.find("weight");
        weight.is_some_and(|weight| TYPES.iter().any(|(dtype, _)| *dtype == weight.dtype))
            && SCALES.iter().any(|part| layer.has(part))
    }

    fn rounds_inputs_to_floats(&self) -> bool {
        true
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let weight = layer.get("weight")?;
        let [n, k] = weight.matrix_shape()?;
        let format = TYPES.iter().find(|(dtype, _)| *dtype == weight.dtype);
        let Some((_, format)) = format else {
            let got = weight.dtype;
            return Err(weight.error(format!("it is {got}, expected F8_E4M3 or F8_E5M2")));
        };
        let finite: Vec<_> = (0..=u8::MAX).map(|code| format.decode(code).is_finite()).collect();
        if let Some(at) = weight.bytes.iter().position(|&code| !finite[usize::from(code)]) {
            return Err(weight.error(format!(
                "it is not finite at row {}, column {}",
                at / k,
                at % k
            )));
        }
        let part = SCALES.into_iter().find(|part| layer.has(part)).unwrap_or(SCALES[0]);
        let inverse = part == SCALES[0];
        let dtype = QuantType::Float(*format);
        if let Some(scales) = layer.find(part)
            && matches!(scales.dtype, Dtype::U8 | Dtype::F8E8M0)
        {
            let (rows, cols) = self.block;
            let blocks = rows > 0
                && cols > 0
                && *scales.shape == [n.div_ceil(rows), k.div_ceil(cols)]
                && *scales.shape != [n, k.div_ceil(32)];
            let granularity = match blocks {
                true => Granularity::PerBlock(rows, cols),
                false => {
                    parts::expect_shape(&scales, &[n, k.div_ceil(32)])?;
                    Granularity::PerGroup(32)
                }
            };
            scales.check_len()?;
            let scheme = QuantScheme {
                scale_format: ScaleFormat::E8m0,
                ..QuantScheme::levels(dtype, granularity)
            };
            let (codes, scales) = (weight.bytes.to_vec(), scales.bytes.to_vec());
            let matrix = QMatrix::from_parts(n, k, scheme, codes, scales, None);
            return layer.finish(matrix, weight.file);
        }
        let (scales, scale_format, shape) = layer.scales(part)?;
        let (block_rows, block_cols) = self.block;
        let blocks = block_rows > 0
            && block_cols > 0
            && shape == [n.div_ceil(block_rows), k.div_ceil(block_cols)];
        let granularity = match shape {
            // One block or one tensor: what is called inverse comes in blocks.
            _ if blocks && inverse => Granularity::PerBlock(block_rows, block_cols),
            [1, 1] => Granularity::PerTensor,
            [rows, 1] if rows == n => Granularity::PerChannel,
            _ if blocks => Granularity::PerBlock(block_rows, block_cols),
            [rows, groups] if rows == n && k.is_multiple_of(groups) => {
                Granularity::PerGroup(k / groups)
            }
            shape => {
                return Err(scales.error(format!(
                    "its shape {shape:?} is no tensor, channels, groups or blocks of {block_rows} x \
                     {block_cols} of {n} x {k} weights"
                )));
            }
        };
        let (scale_format, bytes) = if inverse && self.divides {
            let factors = scales.to_f32()?.into_iter().flat_map(|x| (1.0 / x).to_le_bytes());
            (ScaleFormat::F32, factors.collect())
        } else {
            (scale_format, scales.bytes.to_vec())
        };
        let scheme = QuantScheme { scale_format, ..QuantScheme::levels(dtype, granularity) };
        let matrix = QMatrix::from_parts(n, k, scheme, weight.bytes.to_vec(), bytes, None);
        layer.finish(matrix, weight.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        let scheme = layer.weight().scheme();
        // Scales of other shapes are called `weight_scale`, which transformers passes over (5.24).
        match scheme.granularity {
            Granularity::PerBlock(rows, cols) if (rows, cols) == self.block && !self.divides => {
                let (rows, cols) = layer.weight().grid();
                write(writer, "weight_scale_inv", &[rows, cols])
            }
            other => {
                let (rows, cols) = self.block;
                let what = format!("scales ({other}), only blocks of {rows} x {cols}");
                Err(writer.unsupported(what))
            }
        }
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let (rows, cols) = match layer.weight().scheme().granularity {
            Granularity::PerBlock(rows, cols) => (rows, cols),
            _ => self.block,
        };
        Some(json!({
            "quant_method": NAME,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [rows, cols],
        }))
    }
}

/// The tensors of an FP8 layer whose scales are called `part`.
fn write(writer: Writer<'_>, part: &str, shape: &[usize]) -> Result<Vec<Tensor>> {
    writer.plain(false, false)?;
    let weight = writer.weight();
    let scheme = weight.scheme();
    if scheme.dtype != QuantType::Float(Format::F8E4M3) {
        return Err(writer.unsupported(format!("{} codes, only fp8 E4M3", scheme.dtype)));
    }
    let scale_dtype = match scheme.scale_format {
        ScaleFormat::E8m0 => Dtype::U8,
        _ => writer.scale_dtype()?,
    };
    let codes = weight.codes().to_vec();
    let mut tensors = vec![
        writer.tensor("weight", Dtype::F8E4M3, &[weight.rows(), weight.cols()], codes),
        writer.tensor(part, scale_dtype, shape, weight.scales().to_vec()),
    ];
    tensors.extend(writer.bias());
    Ok(tensors)
}

/// FP8 of compressed-tensors: `float-quantized` with a scale per tensor, channel or block, and
/// `mxfp8-quantized` with powers of two for groups of 32.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat};
/// use lowbit_dtypes::Format;
/// use lowbit_formats::conventions::{CompressedFloat, Convention};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme {
///     scale_format: ScaleFormat::F32,
///     ..QuantScheme::levels(QuantType::Float(Format::F8E4M3), Granularity::PerChannel)
/// };
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let float = CompressedFloat::default();
/// let tensors = float.write(&layer, "q_proj")?;
/// assert_eq!((tensors[1].name.as_str(), &tensors[1].shape[..]), ("q_proj.weight_scale", &[4, 1][..]));
/// assert_eq!(float.read(&tensors, "q_proj")?, layer);
/// let config = float.config(&layer).expect("it has one");
/// assert_eq!(config["format"], "float-quantized");
/// assert_eq!(config["config_groups"]["group_0"]["weights"]["strategy"], "channel");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedFloat {
    /// Rows and columns of a block, for scales in two dimensions.
    pub block: (usize, usize),
}

impl Default for CompressedFloat {
    fn default() -> Self {
        Self { block: (128, 128) }
    }
}

impl CompressedFloat {
    fn tensors(self) -> Fp8 {
        Fp8 { block: self.block, divides: false }
    }
}

impl Convention for CompressedFloat {
    fn name(&self) -> &'static str {
        "compressed-tensors fp8"
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        self.tensors().holds(source, layer)
    }

    fn rounds_inputs_to_floats(&self) -> bool {
        true
    }

    fn read(&self, source: &dyn TensorSource, layer: &str) -> Result<QLinear> {
        self.tensors().read(source, layer)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: self.name(), layer, name };
        let weight = layer.weight();
        let scheme = weight.scheme();
        let (rows, cols) = weight.grid();
        let powers = scheme.scale_format == ScaleFormat::E8m0;
        let shape = match scheme.granularity {
            Granularity::PerGroup(32) if powers => {
                writer.full_groups()?;
                vec![rows, cols]
            }
            Granularity::PerTensor if !powers => vec![1],
            Granularity::PerChannel if !powers => vec![rows, 1],
            Granularity::PerBlock(block_rows, block_cols)
                if (block_rows, block_cols) == self.block && !powers =>
            {
                vec![rows, cols]
            }
            other => {
                let format = scheme.scale_format;
                return Err(writer.unsupported(format!("{format} scales ({other})")));
            }
        };
        write(writer, "weight_scale", &shape)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let mut weights = json!({
            "num_bits": 8,
            "type": "float",
            "symmetric": true,
            "dynamic": false,
        });
        let (format, strategy) = match layer.weight().scheme().granularity {
            Granularity::PerGroup(size) => {
                weights["group_size"] = size.into();
                weights["scale_dtype"] = "torch.uint8".into();
                ("mxfp8-quantized", "group")
            }
            Granularity::PerBlock(rows, cols) => {
                weights["block_structure"] = json!([rows, cols]);
                ("float-quantized", "block")
            }
            Granularity::PerTensor => ("float-quantized", "tensor"),
            _ => ("float-quantized", "channel"),
        };
        weights["strategy"] = strategy.into();
        Some(compressed_tensors::config(format, weights, Value::Null))
    }
}
