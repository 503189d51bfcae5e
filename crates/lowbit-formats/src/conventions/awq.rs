//! AWQ checkpoints of AutoAWQ (`awq/modules/linear/{gemm,gemv}.py`): 4 bits, with zeros.
//!
//! | version | `qweight` I32 | `qzeros` I32 | `scales` F16 |
//! |---|---|---|---|
//! | `gemm` | (k, n/8), packed along n | (groups, n/8), packed along n | (groups, n) |
//! | `gemv` | (n, k/8), packed along k | (n, z), packed along groups | (n, 8z): padded |
//!
//! In a word of `gemm`, nibble i is column `[0, 2, 4, 6, 1, 3, 5, 7][i]`; `gemv` keeps the order. The
//! z of `gemv` is ⌈groups/8⌉, a multiple of 2 for groups of 64 and of 4 for groups of 32. Zeros are
//! stored as they are.

use lowbit_core::{QLinear, QMatrix, ScaleFormat};
use lowbit_dtypes::NibbleOrder;
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource};

const NAME: &str = "awq";
/// Codes in a word.
const PER_WORD: usize = 8;

/// The tensors of AutoAWQ.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_formats::conventions::{Awq, Convention};
///
/// let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let scheme = QuantScheme::affine(4, Granularity::PerGroup(32));
/// let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme)?);
/// let tensors = Awq::default().write(&layer, "q_proj")?;
/// assert_eq!(tensors[0].shape, [64, 2]);
/// assert_eq!(Awq::default().read(&tensors, "q_proj")?, layer);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Awq {
    /// Which of the two layouts.
    pub version: AwqVersion,
    /// The group size, for layers whose last group is shorter, and for padded scales.
    pub group_size: Option<usize>,
}

/// The layouts of AutoAWQ that are not made for a single GPU kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AwqVersion {
    /// Packed along the outputs, shuffled: the default of AutoAWQ.
    #[default]
    Gemm,
    /// Packed along the inputs, in order.
    Gemv,
}

impl Awq {
    fn read_gemm(self, layer: Layer<'_>) -> Result<QLinear> {
        let (qweight, [k, words]) = layer.matrix("qweight", Dtype::I32)?;
        let (scales, scale_format, [groups, n]) = layer.scales("scales")?;
        parts::expect_shape(&qweight, &[k, n / PER_WORD])?;
        parts::expect_shape(&scales, &[groups, words * PER_WORD])?;
        let (qzeros, _) = layer.matrix("qzeros", Dtype::I32)?;
        parts::expect_shape(&qzeros, &[groups, words])?;
        let group_size = parts::group_size(k, groups, self.group_size)
            .ok_or_else(|| scales.error(format!("{groups} groups of one size are not {k}")))?;

        let columns = to_columns(qweight.bytes, k, words);
        let stride = k.div_ceil(2);
        let codes = parts::transposed::<4>(&columns, k.div_ceil(PER_WORD), n);
        let codes = parts::restride(codes, n, 4 * k.div_ceil(PER_WORD), stride);

        let mut zeros = vec![0; groups * n];
        NibbleOrder::Awq
            .unpack(qzeros.bytes, &mut zeros)
            .map_err(|cause| layer.error(qzeros.file, cause.into()))?;
        let zeros = parts::transposed::<1>(&zeros, groups, n);
        let scales = parts::transposed_scales(scale_format, scales.bytes, groups, n);
        let parts = Parts { codes, scales, zeros, groups, group_size, scale_format };
        layer.finish(parts.matrix(n, k), qweight.file)
    }

    fn read_gemv(self, layer: Layer<'_>) -> Result<QLinear> {
        let (qweight, [n, words]) = layer.matrix("qweight", Dtype::I32)?;
        let (scales, scale_format, [_, padded]) = layer.scales("scales")?;
        let (qzeros, [_, zero_words]) = layer.matrix("qzeros", Dtype::I32)?;
        parts::expect_shape(&scales, &[n, padded])?;
        parts::expect_shape(&qzeros, &[n, padded.div_ceil(PER_WORD)])?;
        let k = words * PER_WORD;
        let size = self.group_size.unwrap_or(k);
        let groups = if size == 0 { 0 } else { k.div_ceil(size) };
        let group_size = parts::group_size(k, groups, self.group_size)
            .filter(|_| groups > 0 && groups <= padded)
            .ok_or_else(|| scales.error(format!("{padded} scales a row, expected {groups}")))?;
        let mut zeros = vec![0; n * zero_words * PER_WORD];
        parts::unpack_rows(4, qzeros.bytes, zero_words * PER_WORD, &mut zeros);
        let zeros = parts::restride(zeros, n, zero_words * PER_WORD, groups);
        let bytes = parts::scale_len(scale_format);
        let scales = parts::restride(scales.bytes.to_vec(), n, padded * bytes, groups * bytes);
        let codes = qweight.bytes.to_vec();
        let parts = Parts { codes, scales, zeros, groups, group_size, scale_format };
        layer.finish(parts.matrix(n, k), qweight.file)
    }
}

/// A matrix in the order of [`QMatrix`], but zeros one a byte.
struct Parts {
    codes: Vec<u8>,
    scales: Vec<u8>,
    zeros: Vec<u8>,
    groups: usize,
    group_size: usize,
    scale_format: ScaleFormat,
}

impl Parts {
    fn matrix(self, n: usize, k: usize) -> lowbit_core::Result<QMatrix> {
        let zeros = self.zeros.iter().any(|&zero| zero != 8).then_some(self.zeros);
        let granularity = parts::granularity(k, self.group_size);
        let scheme = parts::integers(4, granularity, self.scale_format, zeros.as_deref());
        let zeros = zeros.map(|zeros| parts::pack_rows(4, &zeros, self.groups));
        QMatrix::from_parts(n, k, scheme, self.codes, self.scales, zeros)
    }
}

impl Convention for Awq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        layer.has("qweight") && layer.has("qzeros") && layer.has("scales") && !layer.has("g_idx")
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        match self.version {
            AwqVersion::Gemm => self.read_gemm(layer),
            AwqVersion::Gemv => self.read_gemv(layer),
        }
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        writer.plain(false, false)?;
        let bits = writer.bits()?;
        if bits != 4 {
            return Err(writer.unsupported(format!("codes of {bits} bits, only of 4")));
        }
        let weight = writer.weight();
        let ((n, k), (_, groups)) = ((weight.rows(), weight.cols()), weight.grid());
        let scale_dtype = writer.scale_dtype()?;
        let zeros = writer.zeros()?.unwrap_or_else(|| vec![8; n * groups]);
        let format = weight.scheme().scale_format;
        let mut tensors = match self.version {
            AwqVersion::Gemm => {
                if !n.is_multiple_of(PER_WORD) {
                    return Err(writer.unsupported(format!("{n} outputs, only multiples of 8")));
                }
                writer.full_groups()?;
                let (codes, words) = parts::words(weight.codes(), n, k.div_ceil(2));
                let columns = parts::transposed::<4>(&codes, n, words);
                let zeros = parts::transposed::<1>(&zeros, n, groups);
                let mut qzeros = vec![0; zeros.len() / 2];
                NibbleOrder::Awq
                    .pack(&zeros, &mut qzeros)
                    .map_err(|cause| writer.unsupported(cause.to_string()))?;
                let scales = parts::transposed_scales(format, weight.scales(), n, groups);
                let qweight = from_columns(&columns, k, n / PER_WORD);
                vec![
                    writer.tensor("qweight", Dtype::I32, &[k, n / PER_WORD], qweight),
                    writer.tensor("qzeros", Dtype::I32, &[groups, n / PER_WORD], qzeros),
                    writer.tensor("scales", scale_dtype, &[groups, n], scales),
                ]
            }
            AwqVersion::Gemv => {
                if !k.is_multiple_of(PER_WORD) {
                    return Err(writer.unsupported(format!("{k} inputs, only multiples of 8")));
                }
                let multiple = match writer.full_groups()? {
                    0..64 => 4,
                    64..128 => 2,
                    _ => 1,
                };
                let words = groups.div_ceil(PER_WORD).next_multiple_of(multiple);
                let padded = words * PER_WORD;
                let zeros = parts::restride(zeros, n, groups, padded);
                let bytes = parts::scale_len(format);
                let scales = weight.scales().to_vec();
                let scales = parts::restride(scales, n, groups * bytes, padded * bytes);
                let qzeros = parts::pack_rows(4, &zeros, padded);
                let qweight = weight.codes().to_vec();
                vec![
                    writer.tensor("qweight", Dtype::I32, &[n, k / PER_WORD], qweight),
                    writer.tensor("qzeros", Dtype::I32, &[n, words], qzeros),
                    writer.tensor("scales", scale_dtype, &[n, padded], scales),
                ]
            }
        };
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        Some(json!({
            "quant_method": NAME,
            "bits": 4,
            "group_size": parts::config_group_size(layer.weight().scheme()),
            "zero_point": true,
            "version": match self.version {
                AwqVersion::Gemm => "gemm",
                AwqVersion::Gemv => "gemv",
            },
        }))
    }
}

/// Where nibble `c` of eight columns lies in a word.
const PLACE: [u32; PER_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// From words of 8 columns each, `(k, words)`, to words of 8 rows each, `(⌈k/8⌉, 8·words)`.
fn to_columns(from: &[u8], k: usize, words: usize) -> Vec<u8> {
    let mut to = vec![0; k.div_ceil(PER_WORD) * words * PER_WORD * 4];
    let (from, _) = from.as_chunks::<4>();
    for (rows, to) in from.chunks(PER_WORD * words).zip(to.chunks_exact_mut(words * PER_WORD * 4)) {
        for (word, to) in to.as_chunks_mut::<{ 4 * PER_WORD }>().0.iter_mut().enumerate() {
            let mut block = [0; PER_WORD];
            for (block, row) in block.iter_mut().zip(rows.chunks_exact(words)) {
                *block = u32::from_le_bytes(row[word]);
            }
            turn(&mut block);
            for (to, place) in to.as_chunks_mut().0.iter_mut().zip(PLACE) {
                *to = block[place as usize].to_le_bytes();
            }
        }
    }
    to
}

/// The reverse of [`to_columns`].
fn from_columns(from: &[u8], k: usize, words: usize) -> Vec<u8> {
    let mut to = vec![0; k * words * 4];
    let (from, _) = from.as_chunks::<4>();
    let rows = to.chunks_mut(PER_WORD * words * 4);
    for (from, to) in from.chunks_exact(words * PER_WORD).zip(rows) {
        for (word, columns) in from.as_chunks::<PER_WORD>().0.iter().enumerate() {
            let mut block = [0; PER_WORD];
            for (column, place) in columns.iter().zip(PLACE) {
                block[place as usize] = u32::from_le_bytes(*column);
            }
            turn(&mut block);
            for (block, row) in block.iter().zip(to.chunks_exact_mut(words * 4)) {
                row[4 * word..][..4].copy_from_slice(&block.to_le_bytes());
            }
        }
    }
    to
}

/// Exchanges nibble i of word j with nibble j of word i: first halves of words, then quarters, then nibbles.
#[inline(always)]
fn turn(words: &mut [u32; PER_WORD]) {
    for (apart, low) in [(4, 0x0000_ffff), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f)] {
        for i in (0..PER_WORD).filter(|i| i & apart == 0) {
            let shift = 4 * apart;
            let (a, b) = (words[i], words[i + apart]);
            words[i] = a & low | (b & low) << shift;
            words[i + apart] = a >> shift & low | b & !low;
        }
    }
}
