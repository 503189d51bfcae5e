//! MLX's layers (`mlx.core.quantize`): rows of codes in 32-bit words.
//!
//! | mode | `weight` U32 | `scales` | `biases` | |
//! |---|---|---|---|---|
//! | `affine` | (n, k·bits/32), 2, 3, 4, 5, 6 or 8 bits | (n, k/group) | as scales | `w = scale · code + bias` |
//! | `mxfp4` | (n, k/8) | U8 (n, k/32) | | E2M1 codes, `2^(byte − 127)` |
//! | `nvfp4` | (n, k/8) | U8 (n, k/16): E4M3 | | E2M1 codes |
//! | `mxfp8` | (n, k/4) | U8 (n, k/32) | | E4M3 codes, `2^(byte − 127)` |
//!
//! Codes are one stream of bits a row, least significant first, which is that of [`QMatrix`]. Modes without
//! biases are told apart by the ratio of words to scales. Bits and group size of `affine` are not to be seen
//! in the shapes (words / groups = bits · group / 32): the configuration says them, for all layers and for
//! single ones. A `bias` is that of the layer.

use lowbit_core::{
    Granularity, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, TwoLevel, ZeroFormat,
};
use lowbit_dtypes::Format;
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource, TensorView};

const NAME: &str = "mlx";
const WORDS: Dtype = Dtype::Other("U32");
/// The widths of codes that MLX has.
pub(super) const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];

/// The tensors of MLX.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme, ScaleFormat, ZeroFormat};
/// use lowbit_formats::conventions::{Convention, Mlx};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme {
///     zero: ZeroFormat::Offset(ScaleFormat::F16),
///     ..QuantScheme::symmetric(6, Granularity::PerGroup(32))
/// };
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let mlx = Mlx { bits: Some(6), group_size: Some(32) };
/// let tensors = mlx.write(&layer, "q_proj")?;
/// assert_eq!((tensors[0].name.as_str(), &tensors[0].shape[..]), ("q_proj.weight", &[4, 12][..]));
/// assert_eq!(mlx.read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mlx {
    /// Bits of a code.
    pub bits: Option<u8>,
    /// The group size.
    pub group_size: Option<usize>,
}

impl Mlx {
    /// Bits of a code and in_features of rows of `words` in `groups`.
    fn shape(self, weight: &TensorView<'_>, words: usize, groups: usize) -> Result<(u8, usize)> {
        let fits = |bits: u8| {
            let all = words.checked_mul(32)?;
            let k = all / usize::from(bits);
            let whole = all.is_multiple_of(bits.into()) && k.is_multiple_of(groups);
            let asked = self.group_size.is_none_or(|size| Some(k) == size.checked_mul(groups));
            (whole && asked && self.bits.is_none_or(|asked| asked == bits)).then_some((bits, k))
        };
        let usual = |&(_, k): &(u8, usize)| [32, 64, 128].contains(&(k / groups));
        let all: Vec<_> = BITS.into_iter().filter_map(fits).collect();
        let likely: Vec<_> = all.iter().copied().filter(usual).collect();
        match (&all[..], &likely[..]) {
            ([found], _) | (_, [found]) => Ok(*found),
            ([], _) => Err(weight.error(format!(
                "rows of {words} words and {groups} scales are not what the configuration says: {}",
                self.says()
            ))),
            _ => Err(weight.error(format!(
                "rows of {words} words and {groups} scales leave bits and group size open: expected \
                 both in \"quantization\" of config.json"
            ))),
        }
    }

    fn says(self) -> String {
        let bits = self.bits.map(|bits| format!("{bits} bits"));
        let groups = self.group_size.map(|size| format!("groups of {size}"));
        [bits, groups].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// Codes of floats in rows of words, by the words for each scale.
fn floats(words: usize, groups: usize) -> Option<(usize, QuantScheme)> {
    let scheme = |format, group, scale_format| QuantScheme {
        scale_format,
        ..QuantScheme::levels(QuantType::Float(format), Granularity::PerGroup(group))
    };
    let ratio = if words.is_multiple_of(groups) { words / groups } else { 0 };
    match ratio {
        2 => {
            let scales = ScaleFormat::TwoLevel(TwoLevel::NVFP4);
            Some((8 * words, scheme(Format::F4E2M1, 16, scales)))
        }
        4 => Some((8 * words, scheme(Format::F4E2M1, 32, ScaleFormat::E8m0))),
        8 => Some((4 * words, scheme(Format::F8E4M3, 32, ScaleFormat::E8m0))),
        _ => None,
    }
}

impl Convention for Mlx {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        layer.find("weight").is_some_and(|weight| weight.dtype == WORDS) && layer.has("scales")
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let (weight, [n, words]) = layer.matrix("weight", WORDS)?;
        let codes = weight.bytes.to_vec();
        if layer.find("scales").is_some_and(|scales| scales.dtype == Dtype::U8) {
            let (scales, [rows, groups]) = layer.matrix("scales", Dtype::U8)?;
            parts::expect_rows(&scales, n)?;
            let Some((k, scheme)) = floats(words, groups) else {
                return Err(scales.error(format!("{rows} x {groups} scales for {words} words")));
            };
            let mut bytes = scales.bytes.to_vec();
            if let ScaleFormat::TwoLevel(_) = scheme.scale_format {
                bytes.extend(1.0_f32.to_le_bytes());
            }
            return layer
                .finish(QMatrix::from_parts(n, k, scheme, codes, bytes, None), weight.file);
        }
        let (scales, scale_format, [_, groups]) = layer.scales("scales")?;
        let (biases, zero_format, _) = layer.scales("biases")?;
        parts::expect_rows(&scales, n)?;
        parts::expect_shape(&biases, scales.shape)?;
        let (bits, k) = self.shape(&weight, words, groups)?;
        let scheme = QuantScheme {
            zero: ZeroFormat::Offset(zero_format),
            scale_format,
            ..QuantScheme::symmetric(bits, parts::granularity(k, k / groups))
        };
        let (scales, zeros) = (scales.bytes.to_vec(), biases.bytes.to_vec());
        layer.finish(QMatrix::from_parts(n, k, scheme, codes, scales, Some(zeros)), weight.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        writer.plain(false, false)?;
        let weight = writer.weight();
        let (bits, group_size) = (writer.bits()?, writer.group_size()?);
        let (n, k, groups) = (weight.rows(), weight.cols(), weight.grid().1);
        if !BITS.contains(&bits) {
            return Err(writer.unsupported(format!("codes of {bits} bits")));
        }
        if !k.is_multiple_of(group_size) || !(k * usize::from(bits)).is_multiple_of(32) {
            return Err(writer.unsupported(format!("rows of {k} in groups of {group_size}")));
        }
        let (ZeroFormat::Offset(zero), Some(zeros)) = (weight.scheme().zero, weight.zeros()) else {
            return Err(writer.unsupported("zeros that are no offsets"));
        };
        let scale_dtype = writer.scale_dtype()?;
        if zero != weight.scheme().scale_format {
            return Err(writer.unsupported("offsets of another type than the scales"));
        }
        let words = k * usize::from(bits) / 32;
        let scales = weight.scales().to_vec();
        let mut tensors = vec![
            writer.tensor("weight", WORDS, &[n, words], weight.codes().to_vec()),
            writer.tensor("scales", scale_dtype, &[n, groups], scales),
            writer.tensor("biases", scale_dtype, &[n, groups], zeros.to_vec()),
        ];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let scheme = layer.weight().scheme();
        let group_size = match scheme.granularity {
            Granularity::PerGroup(size) => size,
            _ => layer.weight().cols(),
        };
        Some(json!({"group_size": group_size, "bits": scheme.dtype.bits(), "mode": "affine"}))
    }
}
