//! The project's own layout, which loses nothing of a [`QLinear`]. `docs/formats.md` describes it.
//!
//! A layer `X` is the tensor `X.lowbit`, a JSON text of bytes that says how the others are to be
//! read, and those others.

use half::f16;
use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Base, Granularity, Levels, Mat,
    OutlierColumns, Outliers, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, SparseRows,
    StepFormat, Transform, TwoLevel, ZeroFormat,
};
use lowbit_dtypes::{Format, Specials};
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Error, Result, Tensor, TensorSource, TensorView};

const NAME: &str = "lowbit";
const VERSION: u64 = 1;

/// The layout that holds every layer.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, QuantType, Transform};
/// use lowbit_formats::conventions::{Convention, Lowbit};
///
/// let w = Mat::from_fn(6, 50, |r, c| ((r * 50 + c) as f32).sin());
/// let scheme = QuantScheme::levels(QuantType::NF4, Granularity::PerGroup(32));
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?)
///     .with_transforms(vec![Transform::hadamard(50, 1)])?;
/// let tensors = Lowbit.write(&layer, "q_proj")?;
/// assert_eq!(Lowbit.read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lowbit;

impl Convention for Lowbit {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        Layer { source, name: layer }.has(NAME)
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let header = layer.get(NAME)?;
        parts::expect_dtype(&header, Dtype::U8)?;
        let json: Value =
            serde_json::from_slice(header.bytes).map_err(|e| header.error(e.to_string()))?;
        let json = Json { header, value: &json, key: NAME };
        match json.get("version")?.whole()? {
            VERSION => {}
            other => return Err(header.error(format!("version {other}, expected {VERSION}"))),
        }
        let core = |cause| layer.error(header.file, cause);
        let shape = json.get("shape")?.list()?;
        let size = |i: usize| shape.get(i).map_or(Ok(0), |size| size.size());
        let [Ok(n @ 1..), Ok(k @ 1..)] = [0, 1].map(size) else {
            return Err(header.error("expected a shape of two sizes of 1 or more".into()));
        };
        if n == 0 || k == 0 {
            return Err(header.error(format!("a weight of {n} x {k} has no elements")));
        }
        let scheme = scheme(json.get("scheme")?)?;
        let bytes = |part: &str| {
            let view = layer.get(part)?;
            parts::expect_dtype(&view, Dtype::U8)?;
            Ok::<_, Error>(view.bytes.to_vec())
        };
        let stored =
            matches!(scheme.zero, ZeroFormat::Int | ZeroFormat::Real(_) | ZeroFormat::Offset(_));
        let zeros = stored.then(|| bytes("zeros")).transpose()?;
        let matrix = QMatrix::from_parts(n, k, scheme, bytes("codes")?, bytes("scales")?, zeros);
        let transforms = json.get("transforms")?.list()?;
        let transforms = transforms
            .into_iter()
            .enumerate()
            .map(|(i, kind)| transform(layer, kind, i, k))
            .collect::<Result<_>>()?;
        let activation = json.find("activation").map(activation).transpose()?;
        let outliers = json.find("outliers").map(|kind| outliers(layer, kind, (n, k)));
        let adapter = match json.find("adapter") {
            None => None,
            Some(_) => {
                let matrix = |part: &str| {
                    let (view, [rows, cols]) = layer.matrix(part, Dtype::F32)?;
                    Mat::new(view.to_f32()?, rows, cols).map_err(core)
                };
                Some(Adapter::new(matrix("adapter.a")?, matrix("adapter.b")?).map_err(core)?)
            }
        };
        layer
            .finish(matrix, header.file)?
            .with_transforms(transforms)
            .map_err(core)?
            .with_activation(activation)
            .with_outliers(outliers.transpose()?)
            .and_then(|layer| layer.with_adapter(adapter))
            .map_err(core)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        let weight = writer.weight();
        let (n, k) = (weight.rows(), weight.cols());
        if n == 0 || k == 0 {
            return Err(writer.unsupported(format!("a weight of {n} x {k}, which has no elements")));
        }
        let bytes = |part: &str, bytes: Vec<u8>| {
            let len = bytes.len();
            writer.tensor(part, Dtype::U8, &[len], bytes)
        };
        let mut tensors = vec![
            bytes("codes", weight.codes().to_vec()),
            bytes("scales", weight.scales().to_vec()),
        ];
        tensors.extend(weight.zeros().map(|zeros| bytes("zeros", zeros.to_vec())));
        let mut header = json!({
            "version": VERSION,
            "shape": [n, k],
            "scheme": write_scheme(writer, weight.scheme())?,
        });
        let mut kinds = Vec::new();
        for (i, transform) in layer.transforms().iter().enumerate() {
            let part = format!("transform.{i}");
            let (kind, tensor) = match transform {
                Transform::Scale(scales) => {
                    ("scale", Tensor::f32(format!("{name}.{part}"), vec![k], scales))
                }
                Transform::Permute(places) => {
                    ("permute", writer.tensor(&part, Dtype::I32, &[k], u32_bytes(places)))
                }
                Transform::Hadamard { negate } => ("hadamard", {
                    let signs = negate.chunks(8).map(|signs| {
                        signs.iter().rev().fold(0, |byte, &sign| byte << 1 | u8::from(sign))
                    });
                    bytes(&part, signs.collect())
                }),
                other => return Err(writer.unsupported(other.to_string())),
            };
            kinds.push(kind);
            tensors.push(tensor);
        }
        header["transforms"] = kinds.into();
        if let Some(activation) = layer.activation() {
            header["activation"] = write_activation(writer, activation)?;
        }
        match layer.outliers() {
            None => {}
            Some(Outliers::Threshold(threshold)) => {
                header["outliers"] = json!({"threshold": threshold});
            }
            Some(Outliers::Columns(known)) => {
                header["outliers"] = "columns".into();
                let columns: Vec<u32> = known.columns().iter().map(|&c| c as u32).collect();
                let count = columns.len();
                let dtype = Dtype::I32;
                tensors.push(writer.tensor(
                    "outliers.columns",
                    dtype,
                    &[count],
                    u32_bytes(&columns),
                ));
                let weight = f16_bytes(known.weight().data());
                tensors.push(writer.tensor("outliers.weight", Dtype::F16, &[count, n], weight));
            }
            Some(Outliers::Sparse(sparse)) => {
                header["outliers"] = "sparse".into();
                let count = sparse.values().len();
                let (starts, columns) = (u32_bytes(sparse.starts()), u32_bytes(sparse.columns()));
                tensors.extend([
                    writer.tensor("outliers.starts", Dtype::I32, &[n + 1], starts),
                    writer.tensor("outliers.columns", Dtype::I32, &[count], columns),
                    writer.tensor(
                        "outliers.values",
                        Dtype::F16,
                        &[count],
                        f16_bytes(sparse.values()),
                    ),
                ]);
            }
            Some(other) => return Err(writer.unsupported(other.to_string())),
        }
        if let Some(adapter) = layer.adapter() {
            header["adapter"] = true.into();
            for (part, m) in [("adapter.a", adapter.a()), ("adapter.b", adapter.b())] {
                let shape = vec![m.rows(), m.cols()];
                tensors.push(Tensor::f32(format!("{name}.{part}"), shape, m.data()));
            }
        }
        tensors.extend(writer.bias());
        tensors.insert(0, bytes(NAME, header.to_string().into_bytes()));
        Ok(tensors)
    }

    fn config(&self, _: &QLinear) -> Option<Value> {
        Some(json!({"quant_method": NAME}))
    }
}

fn u32_bytes(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn f16_bytes(numbers: &[f16]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn u32s(view: &TensorView<'_>) -> Result<Vec<u32>> {
    parts::expect_dtype(view, Dtype::I32)?;
    Ok(view.bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
}

fn f16s(view: &TensorView<'_>) -> Result<Vec<f16>> {
    parts::expect_dtype(view, Dtype::F16)?;
    Ok(view.bytes.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes)).collect())
}

fn transform(layer: Layer<'_>, kind: Json<'_>, i: usize, k: usize) -> Result<Transform> {
    let view = layer.get(&format!("transform.{i}"))?;
    match kind.text()? {
        "scale" => {
            parts::expect_dtype(&view, Dtype::F32)?;
            Ok(Transform::Scale(view.to_f32()?))
        }
        "permute" => Ok(Transform::Permute(u32s(&view)?)),
        "hadamard" => {
            parts::expect_dtype(&view, Dtype::U8)?;
            parts::expect_shape(&view, &[k.div_ceil(8)])?;
            let sign = |j: usize| view.bytes[j / 8] >> (j % 8) & 1 == 1;
            Ok(Transform::Hadamard { negate: (0..k).map(sign).collect() })
        }
        other => Err(kind.error(&format!("unknown transform {other:?}"))),
    }
}

fn outliers(layer: Layer<'_>, kind: Json<'_>, (n, k): (usize, usize)) -> Result<Outliers> {
    if let Some(threshold) = kind.find("threshold") {
        return Ok(Outliers::Threshold(threshold.real()?));
    }
    let columns = layer.get("outliers.columns")?;
    let core = |cause| layer.error(columns.file, cause);
    match kind.text()? {
        "columns" => {
            let places = u32s(&columns)?;
            let weight = layer.get("outliers.weight")?;
            parts::expect_shape(&weight, &[places.len(), n])?;
            let weight = Mat::new(f16s(&weight)?, places.len(), n).map_err(core)?;
            let places = places.into_iter().map(|place| place as usize).collect();
            Ok(Outliers::Columns(OutlierColumns::new(places, weight).map_err(core)?))
        }
        "sparse" => {
            let starts = u32s(&layer.get("outliers.starts")?)?;
            let values = f16s(&layer.get("outliers.values")?)?;
            let sparse = SparseRows::new(n, k, starts, u32s(&columns)?, values);
            Ok(Outliers::Sparse(sparse.map_err(core)?))
        }
        other => Err(kind.error(&format!("unknown outliers {other:?}"))),
    }
}

/// A part of the header, and where it stands.
#[derive(Clone, Copy)]
struct Json<'a> {
    header: TensorView<'a>,
    value: &'a Value,
    key: &'a str,
}

impl<'a> Json<'a> {
    fn error(self, reason: &str) -> Error {
        self.header.error(format!("{}: {reason}", self.key))
    }

    fn find(self, key: &'a str) -> Option<Self> {
        Some(Self { value: self.value.get(key)?, key, ..self })
    }

    fn get(self, key: &'a str) -> Result<Self> {
        self.find(key).ok_or_else(|| self.error(&format!("expected a {key}")))
    }

    fn whole(self) -> Result<u64> {
        self.value.as_u64().ok_or_else(|| self.error("expected a whole number"))
    }

    fn size(self) -> Result<usize> {
        usize::try_from(self.whole()?).map_err(|_| self.error("it is too large"))
    }

    fn real(self) -> Result<f32> {
        let real = self.value.as_f64().ok_or_else(|| self.error("expected a number"))?;
        Ok(real as f32)
    }

    fn text(self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.error("expected a name"))
    }

    fn list(self) -> Result<Vec<Self>> {
        let list = self.value.as_array().ok_or_else(|| self.error("expected a list"))?;
        Ok(list.iter().map(|value| Self { value, ..self }).collect())
    }

    /// A name, or an object of one.
    fn kind(self) -> Result<&'a str> {
        let one = |object: &'a serde_json::Map<String, Value>| object.keys().next();
        let key = self.value.as_object().and_then(one).map(String::as_str);
        key.map_or_else(|| self.text(), Ok)
    }
}

fn scheme(json: Json<'_>) -> Result<QuantScheme> {
    let zero = json.get("zero")?;
    let zero = match zero.kind()? {
        "none" => ZeroFormat::None,
        "midpoint" => ZeroFormat::Midpoint,
        "int" => ZeroFormat::Int,
        "real" => ZeroFormat::Real(scale_format(zero.get("real")?)?),
        "offset" => ZeroFormat::Offset(scale_format(zero.get("offset")?)?),
        other => return Err(zero.error(&format!("unknown kind {other:?}"))),
    };
    Ok(QuantScheme {
        dtype: dtype(json.get("dtype")?)?,
        granularity: granularity(json.get("granularity")?)?,
        zero,
        scale_format: scale_format(json.get("scale")?)?,
    })
}

fn write_scheme(writer: Writer<'_>, scheme: QuantScheme) -> Result<Value> {
    let zero = match scheme.zero {
        ZeroFormat::None => "none".into(),
        ZeroFormat::Midpoint => "midpoint".into(),
        ZeroFormat::Int => "int".into(),
        ZeroFormat::Real(format) => json!({"real": write_scale_format(writer, format)?}),
        ZeroFormat::Offset(format) => json!({"offset": write_scale_format(writer, format)?}),
    };
    Ok(json!({
        "dtype": write_dtype(writer, scheme.dtype)?,
        "granularity": write_granularity(scheme.granularity),
        "zero": zero,
        "scale": write_scale_format(writer, scheme.scale_format)?,
    }))
}

const SPECIALS: [(&str, Specials); 5] = [
    ("ieee", Specials::Ieee),
    ("nan_only", Specials::NanOnly),
    ("nan_is_negative_zero", Specials::NanIsNegativeZero),
    ("none", Specials::None),
    ("scale", Specials::Scale),
];

fn float(json: Json<'_>) -> Result<Format> {
    let specials = json.get("specials")?;
    let name = specials.text()?;
    let (_, kind) = SPECIALS
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| specials.error(&format!("unknown kind {name:?}")))?;
    let bits = |key| {
        let json = json.get(key)?;
        u32::try_from(json.whole()?).map_err(|_| json.error("it is too large"))
    };
    let bias = json.get("bias")?;
    let number = bias.value.as_i64().and_then(|bias| i32::try_from(bias).ok());
    let number = number.ok_or_else(|| bias.error("expected a whole number"))?;
    let format = Format::new(bits("exponent_bits")?, bits("fraction_bits")?, number, *kind);
    format.map_err(|cause| json.error(&cause.to_string()))
}

fn write_float(format: Format) -> Value {
    let specials = SPECIALS.iter().find(|(_, kind)| *kind == format.specials());
    json!({
        "exponent_bits": format.exponent_bits(),
        "fraction_bits": format.fraction_bits(),
        "bias": format.bias(),
        "specials": specials.map_or("none", |(name, _)| name),
    })
}

fn dtype(json: Json<'_>) -> Result<QuantType> {
    match json.kind()? {
        "int" => {
            let bits = json.get("int")?;
            let width = u8::try_from(bits.whole()?).map_err(|_| bits.error("it is too large"))?;
            Ok(QuantType::Int { bits: width })
        }
        "float" => Ok(QuantType::Float(float(json.get("float")?)?)),
        "table" => {
            let levels = json.get("table")?.list()?;
            let levels = levels.into_iter().map(Json::real).collect::<Result<Vec<_>>>()?;
            let levels = Levels::new(&levels).map_err(|cause| json.error(&cause.to_string()))?;
            Ok(QuantType::Table(levels))
        }
        other => Err(json.error(&format!("unknown kind {other:?}"))),
    }
}

fn write_dtype(writer: Writer<'_>, dtype: QuantType) -> Result<Value> {
    match dtype {
        QuantType::Int { bits } => Ok(json!({"int": bits})),
        QuantType::Float(format) => Ok(json!({"float": write_float(format)})),
        QuantType::Table(levels) => Ok(json!({"table": levels.as_slice()})),
        other => Err(writer.unsupported(format!("{other} codes"))),
    }
}

fn granularity(json: Json<'_>) -> Result<Granularity> {
    match json.kind()? {
        "tensor" => Ok(Granularity::PerTensor),
        "channel" => Ok(Granularity::PerChannel),
        "column" => Ok(Granularity::PerColumn),
        "group" => Ok(Granularity::PerGroup(json.get("group")?.size()?)),
        "block" => match json.get("block")?.list()?[..] {
            [rows, cols] => Ok(Granularity::PerBlock(rows.size()?, cols.size()?)),
            _ => Err(json.error("expected rows and columns of a block")),
        },
        other => Err(json.error(&format!("unknown kind {other:?}"))),
    }
}

fn write_granularity(granularity: Granularity) -> Value {
    match granularity {
        Granularity::PerTensor => "tensor".into(),
        Granularity::PerChannel => "channel".into(),
        Granularity::PerColumn => "column".into(),
        Granularity::PerGroup(size) => json!({"group": size}),
        Granularity::PerBlock(rows, cols) => json!({"block": [rows, cols]}),
    }
}

const BASES: [(&str, Base); 3] =
    [("zero", Base::Zero), ("midpoint", Base::Midpoint), ("minimum", Base::Minimum)];

const STEPS: [(&str, StepFormat); 3] =
    [("f32", StepFormat::F32), ("f16", StepFormat::F16), ("bf16", StepFormat::Bf16)];

fn scale_format(json: Json<'_>) -> Result<ScaleFormat> {
    match json.kind()? {
        "f32" => Ok(ScaleFormat::F32),
        "f16" => Ok(ScaleFormat::F16),
        "bf16" => Ok(ScaleFormat::Bf16),
        "e8m0" => Ok(ScaleFormat::E8m0),
        "two_level" => {
            let json = json.get("two_level")?;
            Ok(ScaleFormat::TwoLevel(TwoLevel {
                dtype: dtype(json.get("dtype")?)?,
                granularity: granularity(json.get("granularity")?)?,
                base: named(json.get("base")?, &BASES)?,
                format: named(json.get("step")?, &STEPS)?,
            }))
        }
        other => Err(json.error(&format!("unknown kind {other:?}"))),
    }
}

fn named<T: Copy>(json: Json<'_>, all: &[(&str, T)]) -> Result<T> {
    let name = json.text()?;
    let found = all.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| *value).ok_or_else(|| json.error(&format!("unknown kind {name:?}")))
}

fn write_scale_format(writer: Writer<'_>, format: ScaleFormat) -> Result<Value> {
    Ok(match format {
        ScaleFormat::F32 => "f32".into(),
        ScaleFormat::F16 => "f16".into(),
        ScaleFormat::Bf16 => "bf16".into(),
        ScaleFormat::E8m0 => "e8m0".into(),
        ScaleFormat::TwoLevel(two) => {
            let base = BASES.iter().find(|(_, base)| *base == two.base);
            let step = STEPS.iter().find(|(_, step)| *step == two.format);
            json!({"two_level": {
                "dtype": write_dtype(writer, two.dtype)?,
                "granularity": write_granularity(two.granularity),
                "base": base.map(|(name, _)| name),
                "step": step.map(|(name, _)| name),
            }})
        }
        other => return Err(writer.unsupported(format!("{other} scales"))),
    })
}

fn activation(json: Json<'_>) -> Result<ActivationScheme> {
    let kind = json.get("dtype")?;
    let dtype = match kind.kind()? {
        "int8" => ActivationType::Int8,
        "uint8" => ActivationType::UInt8,
        "int16" => ActivationType::Int16,
        "bf16" => ActivationType::Bf16,
        "float" => ActivationType::Float(float(kind.get("float")?)?),
        other => return Err(kind.error(&format!("unknown kind {other:?}"))),
    };
    let kind = json.get("scales")?;
    let scales = match kind.kind()? {
        "token" => ActivationScales::PerToken,
        "tensor" => ActivationScales::PerTensor,
        "group" => ActivationScales::PerTokenGroup(kind.get("group")?.size()?),
        "static" => {
            let fixed = kind.get("static")?;
            let zero = fixed.get("zero_point")?;
            let zero_point =
                u8::try_from(zero.whole()?).map_err(|_| zero.error("it is too large"))?;
            ActivationScales::Static { scale: fixed.get("scale")?.real()?, zero_point }
        }
        other => return Err(kind.error(&format!("unknown kind {other:?}"))),
    };
    let scheme = ActivationScheme { dtype, scales };
    scheme.check().map_err(|cause| json.error(&cause.to_string()))?;
    Ok(scheme)
}

fn write_activation(writer: Writer<'_>, scheme: ActivationScheme) -> Result<Value> {
    let dtype = match scheme.dtype {
        ActivationType::Int8 => "int8".into(),
        ActivationType::UInt8 => "uint8".into(),
        ActivationType::Int16 => "int16".into(),
        ActivationType::Bf16 => "bf16".into(),
        ActivationType::Float(format) => json!({"float": write_float(format)}),
        other => return Err(writer.unsupported(format!("{other} activations"))),
    };
    let scales = match scheme.scales {
        ActivationScales::PerToken => "token".into(),
        ActivationScales::PerTensor => "tensor".into(),
        ActivationScales::PerTokenGroup(size) => json!({"group": size}),
        ActivationScales::Static { scale, zero_point } => {
            json!({"static": {"scale": scale, "zero_point": zero_point}})
        }
        other => return Err(writer.unsupported(format!("activations with {other}"))),
    };
    Ok(json!({"dtype": dtype, "scales": scales}))
}
