//! compressed-tensors checkpoints of vLLM and llm-compressor: integers. (Floats: `fp8.rs`, `fp4.rs`.)
//!
//! | format | tensor | shape | |
//! |---|---|---|---|
//! | `pack-quantized` | `weight_packed` | I32 (n, ⌈k·bits/32⌉) | one stream of bits a row |
//! | | `weight_scale` | (n, groups) | |
//! | | `weight_zero_point` | I32 (⌈n·bits/32⌉, groups) | packed along n; absent if symmetric |
//! | | `weight_shape` | I64 (2) | n, k |
//! | | `weight_g_idx` | I32 (k) | the group of each input feature (−1: unset), of activation order; read only |
//! | `int-quantized` | `weight` | I8 (n, k) | |
//! | | `weight_scale` | (n, groups), (n), (1) or () | |
//! | | `weight_zero_point` | I8, as the scale | absent if symmetric |
//! | | `weight_g_idx` | I32 (k) | as above |
//! | | `input_scale` | (1) | of static int8 activations |
//! | | `input_zero_point` | I8 (1) | of such activations with a zero |
//!
//! Codes and zeros are signed, −2^(bits−1) … 2^(bits−1) − 1; packed ones have 2^(bits−1) added, which
//! makes them those of [`QMatrix`]. `w = scale · (code − zero)`. Groups that activation order has scattered become
//! consecutive, behind a permutation of the input.

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Granularity, QLinear, QMatrix, ZeroFormat,
};
use lowbit_dtypes::packed_len;
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource, TensorView};

/// The format `pack-quantized`: integers of 1 to 8 bits.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_formats::conventions::{CompressedPacked, Convention};
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme::affine(3, Granularity::PerGroup(32));
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let tensors = CompressedPacked::default().write(&layer, "q_proj")?;
/// assert_eq!(CompressedPacked::default().read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompressedPacked {
    /// Bits of a code, for layers whose shapes leave it open.
    pub bits: Option<u8>,
    /// The group size, for layers whose last group is shorter.
    pub group_size: Option<usize>,
}

impl Convention for CompressedPacked {
    fn name(&self) -> &'static str {
        "compressed-tensors pack-quantized"
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        layer.has("weight_packed") && layer.has("weight_shape")
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let (packed, [n, words]) = layer.matrix("weight_packed", Dtype::I32)?;
        let shape = layer.get("weight_shape")?;
        parts::expect_dtype(&shape, Dtype::I64)?;
        let (numbers, _) = shape.bytes.as_chunks();
        let sizes: Vec<_> =
            numbers.iter().map(|&b| usize::try_from(i64::from_le_bytes(b))).collect();
        let [Ok(rows), Ok(k)] = sizes[..] else {
            return Err(shape.error("expected two sizes".into()));
        };
        // One code of a bit or more: 32 a word at most.
        if rows != n || k == 0 || k.div_ceil(32) > words {
            return Err(shape.error(format!("it is {rows} x {k} for {n} x {words} words")));
        }
        let fits = |bits: &u8| packed_len(k, (*bits).into()).div_ceil(4) == words;
        let mut all = (1..=8).filter(fits);
        let bits = match self.bits.filter(|bits| (1..=8).contains(bits)).filter(fits) {
            Some(bits) => bits,
            None => match (all.next(), all.next()) {
                (Some(bits), None) => bits,
                _ => {
                    let reason = format!("rows of {words} words leave the bits of {k} codes open");
                    return Err(packed.error(reason));
                }
            },
        };
        let (scales, scale_format, [_, groups]) = layer.scales("weight_scale")?;
        parts::expect_rows(&scales, n)?;
        let (group_size, order) = groups_of(layer, &scales, (k, groups), self.group_size)?;
        let width = u32::from(bits);
        let mut codes = parts::restride(packed.bytes.to_vec(), n, 4 * words, packed_len(k, width));
        parts::clear_padding(&mut codes, k, width);
        if let Some(order) = &order {
            parts::gather_columns(width, &mut codes, order);
        }
        let zeros = match layer.has("weight_zero_point") {
            false => None,
            true => {
                let (zeros, _) = layer.matrix("weight_zero_point", Dtype::I32)?;
                let stride = packed_len(n, width);
                parts::expect_shape(&zeros, &[stride.div_ceil(4), groups])?;
                let rows = parts::transposed::<4>(zeros.bytes, stride.div_ceil(4), groups);
                let rows = parts::restride(rows, groups, stride.next_multiple_of(4), stride);
                let mut codes = vec![0; groups * n];
                parts::unpack_rows(width, &rows, n, &mut codes);
                Some(parts::transposed::<1>(&codes, groups, n))
            }
        };
        let granularity = parts::granularity(k, group_size);
        let scheme = parts::integers(bits, granularity, scale_format, zeros.as_deref());
        let zeros = zeros.map(|zeros| parts::pack_rows(width, &zeros, groups));
        let weight = QMatrix::from_parts(n, k, scheme, codes, scales.bytes.to_vec(), zeros);
        layer.permuted(layer.finish(weight, packed.file)?, order, packed.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: self.name(), layer, name };
        // compressed-tensors has removed `actorder: group` and looks at no `weight_g_idx` (0.20.1).
        writer.plain(false, false)?;
        let weight = writer.weight();
        let bits = writer.bits()?;
        writer.full_groups()?;
        let ((n, k), (_, groups)) = ((weight.rows(), weight.cols()), weight.grid());
        let width = u32::from(bits);
        let (stride, words) = (packed_len(k, width), packed_len(k, width).div_ceil(4));
        let scale_dtype = writer.scale_dtype()?;
        let packed = parts::restride(weight.codes().to_vec(), n, stride, 4 * words);
        let shape = [n as i64, k as i64].into_iter().flat_map(i64::to_le_bytes).collect();
        let mut tensors = vec![
            writer.tensor("weight_packed", Dtype::I32, &[n, words], packed),
            writer.tensor("weight_scale", scale_dtype, &[n, groups], weight.scales().to_vec()),
            writer.tensor("weight_shape", Dtype::I64, &[2], shape),
        ];
        if let Some(zeros) = writer.zeros()? {
            let stride = packed_len(n, width);
            let zeros = parts::pack_rows(width, &parts::transposed::<1>(&zeros, n, groups), n);
            let zeros = parts::restride(zeros, groups, stride, stride.next_multiple_of(4));
            let words = stride.div_ceil(4);
            let zeros = parts::transposed::<4>(&zeros, groups, words);
            tensors.push(writer.tensor("weight_zero_point", Dtype::I32, &[words, groups], zeros));
        }
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        Some(integers("pack-quantized", layer, Value::Null))
    }
}

/// The format `int-quantized`: 8 bits, one a byte, beside inputs that are quantized too. (Layers with inputs in f32 are
/// written as [`CompressedPacked`].)
///
/// # Example
/// ```
/// use lowbit_core::{ActivationScheme, Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_formats::conventions::{CompressedInt, Convention};
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let layer = QLinear::new(q).with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
/// let w8a8 = CompressedInt { dynamic: true };
/// assert_eq!(w8a8.read(&w8a8.write(&layer, "q_proj")?, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompressedInt {
    /// Are inputs quantized to int8 per token when they arrive?
    pub dynamic: bool,
}

impl Convention for CompressedInt {
    fn name(&self) -> &'static str {
        "compressed-tensors int-quantized"
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        layer.find("weight").is_some_and(|weight| weight.dtype == Dtype::I8)
            && layer.has("weight_scale")
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let (weight, [n, k]) = layer.matrix("weight", Dtype::I8)?;
        let (scales, scale_format, [rows, groups]) = layer.scales("weight_scale")?;
        let (granularity, order) = match (rows, groups) {
            (1, 1) if n > 1 => (Granularity::PerTensor, None),
            _ if rows == n => {
                let (size, order) = groups_of(layer, &scales, (k, groups), None)?;
                (parts::granularity(k, size), order)
            }
            _ => return Err(scales.error(format!("its shape is {:?}", scales.shape))),
        };
        let zeros = match layer.find("weight_zero_point") {
            None => None,
            Some(zeros) => {
                parts::expect_dtype(&zeros, Dtype::I8)?;
                parts::expect_shape(&zeros, scales.shape)?;
                Some(zeros.bytes.iter().map(|zero| zero ^ 0x80).collect::<Vec<_>>())
            }
        };
        let scheme = parts::integers(8, granularity, scale_format, zeros.as_deref());
        let mut codes: Vec<u8> = weight.bytes.iter().map(|code| code ^ 0x80).collect();
        if let Some(order) = &order {
            parts::gather_columns(8, &mut codes, order);
        }
        let scales = scales.bytes.to_vec();
        let matrix = QMatrix::from_parts(n, k, scheme, codes, scales, zeros);
        let linear = layer.permuted(layer.finish(matrix, weight.file)?, order, weight.file)?;
        let per_token = self.dynamic.then_some(ActivationScheme::INT8_PER_TOKEN);
        Ok(linear.with_activation(static_inputs(layer)?.or(per_token)))
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: self.name(), layer, name };
        writer.plain(false, true)?;
        let weight = writer.weight();
        if writer.bits()? != 8 {
            return Err(writer.unsupported("anything but codes of 8 bits"));
        }
        if layer.outliers().is_some() {
            return Err(writer.unsupported("outliers"));
        }
        let (n, k) = (weight.rows(), weight.cols());
        let shape = match weight.scheme().granularity {
            Granularity::PerTensor => [1, 1],
            _ => {
                writer.full_groups()?;
                [n, weight.grid().1]
            }
        };
        let codes = weight.codes().iter().map(|code| code ^ 0x80).collect();
        let scales = weight.scales().to_vec();
        let mut tensors = vec![
            writer.tensor("weight", Dtype::I8, &[n, k], codes),
            writer.tensor("weight_scale", writer.scale_dtype()?, &shape, scales),
        ];
        if let Some(zeros) = writer.zeros()? {
            let zeros = zeros.iter().map(|zero| zero ^ 0x80).collect();
            tensors.push(writer.tensor("weight_zero_point", Dtype::I8, &shape, zeros));
        }
        match layer.activation() {
            None => {
                // Its readers look for `weight_packed` then (0.20.1).
                return Err(writer.unsupported("inputs in f32, which are for pack-quantized"));
            }
            Some(ActivationScheme::INT8_PER_TOKEN) if self.dynamic => {}
            Some(ActivationScheme {
                dtype: ActivationType::Int8,
                scales: ActivationScales::Static { scale, .. },
            }) => tensors.push(Tensor::f32(format!("{name}.input_scale"), vec![1], &[scale])),
            Some(other) => return Err(writer.unsupported(format!("inputs of {other}"))),
        }
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let static_scale = layer
            .activation()
            .is_some_and(|activation| matches!(activation.scales, ActivationScales::Static { .. }));
        let input = match (self.dynamic, static_scale) {
            (true, _) => json!({
                "num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true
            }),
            (false, true) => json!({
                "num_bits": 8, "type": "int", "symmetric": true, "strategy": "tensor", "dynamic": false
            }),
            (false, false) => Value::Null, // which is not written
        };
        Some(integers("int-quantized", layer, input))
    }
}

/// The group size, and the features in the order of their groups unless they are already.
fn groups_of(
    layer: Layer<'_>,
    scales: &TensorView<'_>,
    (k, groups): (usize, usize),
    asked: Option<usize>,
) -> Result<(usize, Option<Vec<usize>>)> {
    let g_idx = layer.find("weight_g_idx").map(|view| {
        parts::expect_shape(&view, &[k])?;
        parts::groups_of(&view)
    });
    match g_idx.transpose()?.flatten() {
        Some(g_idx) => parts::order(&g_idx, groups).ok_or_else(|| {
            scales.error(format!("weight_g_idx does not make {groups} groups of one size"))
        }),
        None => {
            let size = parts::group_size(k, groups, asked);
            let wrong = || scales.error(format!("{groups} groups of one size are not {k}"));
            Ok((size.ok_or_else(wrong)?, None))
        }
    }
}

/// Inputs that are quantized to int8 by `input_scale` and `input_zero_point`, where they are there. With a
/// zero, codes −128 … 127 become 0 … 255.
pub(super) fn static_inputs(layer: Layer<'_>) -> Result<Option<ActivationScheme>> {
    let Some(view) = layer.find("input_scale") else { return Ok(None) };
    let [scale] = view.to_f32()?[..] else {
        return Err(view.error(format!("its shape is {:?}, expected one number", view.shape)));
    };
    let zero = match layer.find("input_zero_point") {
        None => 0,
        Some(zero) => {
            parts::expect_dtype(&zero, Dtype::I8)?;
            match *zero.bytes {
                [zero] => zero,
                _ => {
                    let shape = zero.shape;
                    return Err(zero.error(format!("its shape is {shape:?}, expected one number")));
                }
            }
        }
    };
    let (dtype, zero_point) = match zero {
        0 => (ActivationType::Int8, 0),
        zero => (ActivationType::UInt8, zero ^ 0x80),
    };
    let scales = ActivationScales::Static { scale, zero_point };
    let scheme = ActivationScheme { dtype, scales };
    scheme.check().map_err(|cause| layer.error(view.file, cause))?;
    Ok(Some(scheme))
}

fn integers(format: &str, layer: &QLinear, input: Value) -> Value {
    let scheme = layer.weight().scheme();
    let (strategy, group_size) = match scheme.granularity {
        Granularity::PerTensor => ("tensor", Value::Null),
        Granularity::PerGroup(size) => ("group", size.into()),
        _ => ("channel", Value::Null),
    };
    let weights = json!({
        "num_bits": scheme.dtype.bits(),
        "type": "int",
        "symmetric": scheme.zero == ZeroFormat::Midpoint,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": false,
    });
    config(format, weights, input)
}

/// The configuration of all linear layers, whose weights and inputs are described.
pub(super) fn config(format: &str, weights: Value, input: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": input,
        }},
        "ignore": ["lm_head"],
    })
}
