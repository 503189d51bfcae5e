//! The blocks of ggml in which all numbers of a [`QMatrix`] have a place: groups of 32 along a row.
//!
//! The tensor is `weight`, (n, k), k a multiple of 32. A block is drawn in `gguf/decode.rs`.
//!
//! | type | scheme | fields of a block |
//! |---|---|---|
//! | Q4_0, Q5_0, Q8_0 | 4, 5, 8 bits, symmetric | f16 scale; codes |
//! | Q4_1, Q5_1 | 4, 5 bits, an offset | f16 scale, f16 offset; codes |
//!
//! Scales may be negative.

use lowbit_core::{Granularity, QLinear, QMatrix, QuantScheme, ScaleFormat, ZeroFormat};
use lowbit_dtypes::{NibbleOrder, packed_len};
use serde_json::Value;

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource, gguf::GgmlType};

const NAME: &str = "ggml";
const GROUP: usize = 32;

/// The blocks of ggml: the type is that of the scheme.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_formats::{Dtype, conventions::{Convention, Ggml}, gguf::GgmlType};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(32));
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let tensors = Ggml.write(&layer, "blk.0.attn_q")?;
/// assert_eq!(tensors[0].dtype, Dtype::Ggml(GgmlType::Q4_0));
/// assert_eq!(Ggml.read(&tensors, "blk.0.attn_q")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ggml;

/// A type, its bits, and whether blocks have an offset.
const TYPES: [(GgmlType, u8, bool); 5] = [
    (GgmlType::Q4_0, 4, false),
    (GgmlType::Q4_1, 4, true),
    (GgmlType::Q5_0, 5, false),
    (GgmlType::Q5_1, 5, true),
    (GgmlType::Q8_0, 8, false),
];

fn scheme(bits: u8, offset: bool) -> QuantScheme {
    let scheme = QuantScheme::symmetric(bits, Granularity::PerGroup(GROUP));
    match offset {
        true => QuantScheme { zero: ZeroFormat::Offset(ScaleFormat::F16), ..scheme },
        false => scheme,
    }
}

impl Convention for Ggml {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let weight = Layer { source, name: layer }.find("weight");
        weight.is_some_and(|weight| TYPES.iter().any(|t| weight.dtype == Dtype::Ggml(t.0)))
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let weight = layer.get("weight")?;
        let [n, k] = weight.matrix_shape()?;
        let found = TYPES.iter().find(|t| weight.dtype == Dtype::Ggml(t.0));
        let Some(&(dtype, bits, offset)) = found else {
            return Err(weight.error(format!(
                "it is {}, expected Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0",
                weight.dtype
            )));
        };
        let (_, size) = dtype.block().unwrap_or((GROUP, 1));
        let groups = n * k / GROUP;
        let mut scales = Vec::with_capacity(2 * groups);
        let mut offsets = Vec::with_capacity(if offset { 2 * groups } else { 0 });
        let start = if offset { 4 } else { 2 };
        // Nibbles, and what comes before them, of one row.
        let (mut nibbles, mut high) = (Vec::with_capacity(k / 2), Vec::with_capacity(k / 8));
        let mut codes = vec![0; k];
        let mut packed = Vec::with_capacity(n * packed_len(k, bits.into()));
        for row in weight.bytes.chunks_exact(k / GROUP * size) {
            nibbles.clear();
            high.clear();
            for block in row.chunks_exact(size) {
                scales.extend_from_slice(&block[..2]);
                offsets.extend_from_slice(&block[2..start]);
                match bits {
                    8 => packed.extend(block[start..].iter().map(|code| code ^ 0x80)),
                    5 => {
                        high.extend_from_slice(&block[start..start + 4]);
                        nibbles.extend_from_slice(&block[start + 4..]);
                    }
                    _ => nibbles.extend_from_slice(&block[start..]),
                }
            }
            if bits == 8 {
                continue;
            }
            let order = NibbleOrder::Halves { block: GROUP };
            order
                .unpack(&nibbles, &mut codes)
                .map_err(|cause| layer.error(weight.file, cause.into()))?;
            for (codes, byte) in codes.chunks_exact_mut(8).zip(&high) {
                for (bit, code) in codes.iter_mut().enumerate() {
                    *code |= (byte >> bit & 1) << 4;
                }
            }
            packed.extend(parts::pack_rows(bits.into(), &codes, k));
        }
        let zeros = offset.then_some(offsets);
        let matrix = QMatrix::from_parts(n, k, scheme(bits, offset), packed, scales, zeros);
        layer.finish(matrix, weight.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        writer.plain(false, false)?;
        let weight = writer.weight();
        let (n, k) = (weight.rows(), weight.cols());
        let found =
            TYPES.iter().find(|(_, bits, offset)| weight.scheme() == scheme(*bits, *offset));
        let Some(&(dtype, bits, _)) = found else {
            return Err(writer.unsupported(format!("the scheme {:?}", weight.scheme())));
        };
        if !k.is_multiple_of(GROUP) {
            return Err(writer.unsupported(format!("rows of {k}, only multiples of {GROUP}")));
        }
        let (_, size) = dtype.block().unwrap_or((GROUP, 1));
        let mut blocks = Vec::with_capacity(n * k / GROUP * size);
        let mut codes = vec![0; k];
        let mut nibbles = vec![0; k / 2];
        let mut scales = weight.scales().chunks_exact(2);
        let mut offsets = weight.zeros().map(|zeros| zeros.chunks_exact(2));
        let core = |cause: lowbit_core::Error| writer.unsupported(cause.to_string());
        for row in 0..n {
            weight.unpack_row(row, &mut codes).map_err(core)?;
            let high: Vec<u8> = (codes.chunks_exact(8))
                .map(|codes| (0..8).fold(0, |byte, bit| byte | (codes[bit] >> 4 & 1) << bit))
                .collect();
            if bits < 8 {
                let low: Vec<u8> = codes.iter().map(|code| code & 15).collect();
                let order = NibbleOrder::Halves { block: GROUP };
                order.pack(&low, &mut nibbles).map_err(|cause| core(cause.into()))?;
            }
            for block in 0..k / GROUP {
                blocks.extend_from_slice(scales.next().unwrap_or(&[]));
                let offset = offsets.as_mut().and_then(Iterator::next);
                blocks.extend_from_slice(offset.unwrap_or(&[]));
                match bits {
                    8 => blocks
                        .extend(codes[GROUP * block..][..GROUP].iter().map(|code| code ^ 0x80)),
                    5 => {
                        blocks.extend_from_slice(&high[4 * block..][..4]);
                        blocks.extend_from_slice(&nibbles[16 * block..][..16]);
                    }
                    _ => blocks.extend_from_slice(&nibbles[16 * block..][..16]),
                }
            }
        }
        let mut tensors = vec![writer.tensor("weight", Dtype::Ggml(dtype), &[n, k], blocks)];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, _: &QLinear) -> Option<Value> {
        None
    }
}
