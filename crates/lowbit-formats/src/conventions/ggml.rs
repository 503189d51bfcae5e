//! The blocks of ggml whose numbers all have a place in a [`QMatrix`].
//!
//! The tensor is `weight`, (n, k), k a multiple of the block. `gguf/decode.rs` draws the blocks.
//!
//! | type | codes | groups of | scales | zeros |
//! |---|---|---|---|---|
//! | Q4_0, Q5_0, Q8_0 | 4, 5, 8 bits | 32 | f16 | midpoint |
//! | Q4_1, Q5_1 | 4, 5 bits | 32 | f16 | f16 offset |
//! | Q2_K | 2 bits | 16 | 4 bits × f16 | 4 bits × f16, an offset |
//! | Q4_K, Q5_K | 4, 5 bits | 32 | 6 bits × f16 | 6 bits × f16, an offset |
//! | Q3_K, Q6_K | 3, 6 bits | 16 | signed 6, 8 bits × f16 | midpoint |
//! | IQ4_NL, IQ4_XS | a table of 16 | 32 | f16; signed 6 bits × f16 | |
//! | TQ1_0, TQ2_0, Q2_0 | −1, 0, 1, 2 | 256, 256, 64 | f16 | |
//! | Q1_0 | −1, 1 | 128 | f16 | |
//! | MXFP4 | FP4 E2M1 | 32 | E8M0 | |
//! | NVFP4 | FP4 E2M1 | 16 | FP8 E4M3 | |
//!
//! The scales of a super-block of 256 share an f16, "× f16": a
//! [`TwoLevel`](lowbit_core::TwoLevel). Minima that ggml subtracts are offsets with the sign of their
//! f16 turned. Scales may be negative.

use lowbit_core::{
    Base, Granularity, Levels, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, StepFormat,
    TwoLevel, ZeroFormat,
};
use lowbit_dtypes::Format;
use serde_json::Value;

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{
    Dtype, Result, Tensor, TensorSource,
    gguf::{GgmlType, scale_and_min, trit},
};

const NAME: &str = "ggml";
/// The types of the table above that users of integers ask for.
const HELD: &str =
    "groups of 32 of int4, int5 and int8, or of int4 and int5 with f16 offsets, and its k-quants";
/// The largest block.
const BLOCK: usize = 256;
/// The most groups in a block.
const GROUPS: usize = 16;

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

impl Ggml {
    /// The scheme of layers that [`write`](Convention::write) stores as `dtype`; `None` for types that
    /// are only [decoded](crate::TensorView::to_f32), or not known at all.
    ///
    /// # Example
    /// ```
    /// use lowbit_formats::{conventions::Ggml, gguf::GgmlType};
    ///
    /// let q4_k = Ggml::scheme(GgmlType::Q4_K).unwrap();
    /// assert_eq!(q4_k.bytes(1, 256)?, 144);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn scheme(dtype: GgmlType) -> Option<QuantScheme> {
        let found = FORMATS.iter().find(|format| format.dtype == dtype && format.join.is_some());
        found.map(BlockFormat::scheme)
    }
}

/// A block taken apart, codes one a byte.
struct Block {
    codes: [u8; BLOCK],
    /// Scales of groups on two levels: their codes.
    scales: [u8; GROUPS],
    /// The same of offsets.
    minima: [u8; GROUPS],
    /// The scale of the block, or the step of its scales.
    step: [u8; 2],
    /// The offset of the block, or the step of its offsets.
    offset: [u8; 2],
}

/// How a type stores its blocks.
struct BlockFormat {
    dtype: GgmlType,
    codes: Codes,
    /// Weights that share a scale.
    group: usize,
    scales: Scales,
    split: fn(&[u8], &mut Block),
    /// The reverse of `split`, onto zeros; `None` where another type of the same scheme is written.
    join: Option<fn(&Block, &mut [u8])>,
}

#[derive(Clone, Copy)]
enum Codes {
    /// Bits of integers around their midpoint, or over an offset.
    Int(u8),
    Iq4,
    /// −1, 0, 1, 2
    Ternary,
    /// −1, 1
    Sign,
    E2m1,
}

#[derive(Clone, Copy, PartialEq)]
enum Scales {
    F16,
    F16AndOffset,
    /// So many bits over an f16 step, signed.
    Signed(u8),
    /// So many bits over an f16 step, and offsets in the same way.
    WithMinima(u8),
    E8m0,
    /// FP8 without a step.
    E4m3,
}

/// −1, 0, 1, 2 by their code.
const TERNARY: [f32; 4] = [-1.0, 0.0, 1.0, 2.0];

impl BlockFormat {
    /// Groups in a block.
    fn groups(&self) -> usize {
        self.weights() / self.group
    }

    fn weights(&self) -> usize {
        self.dtype.block().map_or(BLOCK, |(weights, _)| weights)
    }

    fn bytes(&self) -> usize {
        self.dtype.block().map_or(1, |(_, bytes)| bytes)
    }

    fn scheme(&self) -> QuantScheme {
        let two_level = |bits, base| {
            ScaleFormat::TwoLevel(TwoLevel {
                dtype: QuantType::Int { bits },
                granularity: Granularity::PerGroup(self.groups()),
                base,
                format: StepFormat::F16,
            })
        };
        let (scale_format, zero) = match self.scales {
            Scales::F16 => (ScaleFormat::F16, ZeroFormat::Midpoint),
            Scales::F16AndOffset => (ScaleFormat::F16, ZeroFormat::Offset(ScaleFormat::F16)),
            Scales::Signed(bits) => (two_level(bits, Base::Midpoint), ZeroFormat::Midpoint),
            Scales::WithMinima(bits) => {
                let format = two_level(bits, Base::Zero);
                (format, ZeroFormat::Offset(format))
            }
            Scales::E8m0 => (ScaleFormat::E8m0, ZeroFormat::None),
            Scales::E4m3 => (ScaleFormat::TwoLevel(TwoLevel::NVFP4), ZeroFormat::None),
        };
        let granularity = Granularity::PerGroup(self.group);
        let table = |levels: &[f32]| Levels::new(levels).map_or(QuantType::NF4, QuantType::Table);
        let dtype = match self.codes {
            Codes::Int(bits) => {
                let dtype = QuantType::Int { bits };
                return QuantScheme { dtype, granularity, zero, scale_format };
            }
            Codes::Iq4 => QuantType::IQ4_NL,
            Codes::Ternary => table(&TERNARY),
            Codes::Sign => table(&[-1.0, 1.0]),
            Codes::E2m1 => QuantType::Float(Format::F4E2M1),
        };
        QuantScheme { scale_format, ..QuantScheme::levels(dtype, granularity) }
    }
}

impl Convention for Ggml {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let weight = Layer { source, name: layer }.find("weight");
        weight.is_some_and(|weight| FORMATS.iter().any(|f| weight.dtype == Dtype::Ggml(f.dtype)))
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let weight = layer.get("weight")?;
        let [n, k] = weight.matrix_shape()?;
        let found = FORMATS.iter().find(|format| weight.dtype == Dtype::Ggml(format.dtype));
        let Some(format) = found else {
            return Err(weight.error(format!("it is {}, no block of ggml", weight.dtype)));
        };
        let (scheme, groups) = (format.scheme(), format.groups());
        let bits = u32::from(scheme.dtype.bits());
        let blocks = k / format.weights();

        // What each block has, block after block; codes of scales a row at a time.
        let mut parts = Parts::default();
        let mut row = Row::new(k, blocks * groups);
        let mut block = Block {
            codes: [0; BLOCK],
            scales: [0; GROUPS],
            minima: [0; GROUPS],
            step: [0; 2],
            offset: [0; 2],
        };
        for bytes in weight.bytes.chunks_exact(blocks * format.bytes()) {
            let targets = row.codes.chunks_exact_mut(format.weights());
            for (i, (bytes, to)) in bytes.chunks_exact(format.bytes()).zip(targets).enumerate() {
                (format.split)(bytes, &mut block);
                to.copy_from_slice(&block.codes[..to.len()]);
                row.scales[i * groups..][..groups].copy_from_slice(&block.scales[..groups]);
                row.minima[i * groups..][..groups].copy_from_slice(&block.minima[..groups]);
                parts.steps.extend(block.step);
                parts.offsets.extend(block.offset);
            }
            parts.codes.extend(parts::pack_rows(bits, &row.codes, k));
            match format.scales {
                Scales::F16 | Scales::F16AndOffset => {}
                Scales::Signed(bits) => parts.pack_scales(bits, &row),
                Scales::WithMinima(bits) => {
                    parts.pack_scales(bits, &row);
                    parts.pack_minima(bits, &row);
                }
                Scales::E8m0 | Scales::E4m3 => parts.pack_scales(8, &row),
            }
        }
        let Parts { codes, scales, minima, steps, offsets } = parts;
        let (scales, zeros) = match format.scales {
            Scales::F16 => (steps, None),
            Scales::F16AndOffset => (steps, Some(offsets)),
            Scales::Signed(_) => ([scales, steps].concat(), None),
            Scales::WithMinima(_) => ([scales, steps].concat(), Some([minima, offsets].concat())),
            Scales::E8m0 => (scales, None),
            Scales::E4m3 => ([scales, 1_f32.to_le_bytes().to_vec()].concat(), None),
        };
        let matrix = QMatrix::from_parts(n, k, scheme, codes, scales, zeros);
        layer.finish(matrix, weight.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        writer.plain(false, false)?;
        let weight = writer.weight();
        let (n, k) = (weight.rows(), weight.cols());
        let writes = |format: &BlockFormat| weight.scheme() == format.scheme();
        let found = FORMATS.iter().filter(|format| writes(format));
        let Some((format, join)) =
            found.map(|f| (f, f.join)).find_map(|(f, join)| Some((f, join?)))
        else {
            return Err(writer.unsupported(format!("{}: it has {HELD}", weight.scheme())));
        };
        let (weights, groups) = (format.weights(), format.groups());
        if !k.is_multiple_of(weights) {
            let what = format!("rows of {k} in {}, only multiples of {weights}", format.dtype);
            return Err(writer.unsupported(what));
        }
        let (blocks, scales) = (k / weights, weight.scales());
        let unpacked = |bits: u8, bytes: &[u8]| {
            let mut codes = vec![0; n * blocks * groups];
            parts::unpack_rows(bits.into(), bytes, blocks * groups, &mut codes);
            codes
        };
        let zeros = weight.zeros().unwrap_or(&[]);
        let halves = 2 * n * blocks;
        // Codes of scales come before their steps.
        let steps = &scales[scales.len().saturating_sub(halves)..];
        let offsets = &zeros[zeros.len().saturating_sub(halves)..];
        let (scale_codes, minima) = match format.scales {
            Scales::F16 | Scales::F16AndOffset => (Vec::new(), Vec::new()),
            Scales::Signed(bits) => (unpacked(bits, scales), Vec::new()),
            Scales::WithMinima(bits) => (unpacked(bits, scales), unpacked(bits, zeros)),
            Scales::E8m0 => (scales.to_vec(), Vec::new()),
            Scales::E4m3 => {
                let (codes, step) = scales.split_at(scales.len().saturating_sub(4));
                if step != 1_f32.to_le_bytes() {
                    return Err(writer.unsupported("a scale of the whole tensor in NVFP4"));
                }
                if codes.iter().any(|&code| code >= 0x7f) {
                    return Err(writer.unsupported("negative scales in NVFP4"));
                }
                (codes.to_vec(), Vec::new())
            }
        };
        let mut bytes = vec![0; n * blocks * format.bytes()];
        let mut row = vec![0; k];
        for (r, bytes) in bytes.chunks_exact_mut((blocks * format.bytes()).max(1)).enumerate() {
            weight.unpack_row(r, &mut row).map_err(|e| writer.unsupported(e.to_string()))?;
            for (i, bytes) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
                let at = r * blocks + i;
                let mut block = Block {
                    codes: [0; BLOCK],
                    scales: [0; GROUPS],
                    minima: [0; GROUPS],
                    step: [0; 2],
                    offset: [0; 2],
                };
                block.codes[..weights].copy_from_slice(&row[i * weights..][..weights]);
                for (to, from) in [(&mut block.scales, &scale_codes), (&mut block.minima, &minima)]
                {
                    if let Some(from) = from.get(at * groups..(at + 1) * groups) {
                        to[..groups].copy_from_slice(from);
                    }
                }
                for (to, from) in [(&mut block.step, steps), (&mut block.offset, offsets)] {
                    if let Some(from) = from.get(2 * at..2 * at + 2) {
                        to.copy_from_slice(from);
                    }
                }
                join(&block, bytes);
            }
        }
        let dtype = Dtype::Ggml(format.dtype);
        let mut tensors = vec![writer.tensor("weight", dtype, &[n, k], bytes)];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, _: &QLinear) -> Option<Value> {
        None
    }
}

/// A row on its way in, codes one a byte.
struct Row {
    codes: Vec<u8>,
    scales: Vec<u8>,
    minima: Vec<u8>,
}

impl Row {
    fn new(k: usize, groups: usize) -> Self {
        Self { codes: vec![0; k], scales: vec![0; groups], minima: vec![0; groups] }
    }
}

/// The buffers of a matrix as they grow.
#[derive(Default)]
struct Parts {
    codes: Vec<u8>,
    scales: Vec<u8>,
    minima: Vec<u8>,
    steps: Vec<u8>,
    offsets: Vec<u8>,
}

impl Parts {
    fn pack_scales(&mut self, bits: u8, row: &Row) {
        self.scales.extend(parts::pack_rows(bits.into(), &row.scales, row.scales.len()));
    }

    fn pack_minima(&mut self, bits: u8, row: &Row) {
        self.minima.extend(parts::pack_rows(bits.into(), &row.minima, row.minima.len()));
    }
}

/// Two bytes from `at`.
fn pair(bytes: &[u8], at: usize) -> [u8; 2] {
    [bytes[at], bytes[at + 1]]
}

/// The sign of an f16 turned: ggml subtracts what an offset adds.
fn turned([low, high]: [u8; 2]) -> [u8; 2] {
    [low, high ^ 0x80]
}

/// Byte j: code j low, code j + half high, in each block of `2·half` codes.
fn split_nibbles(bytes: &[u8], half: usize, codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(half).zip(codes.chunks_exact_mut(2 * half)) {
        let (low, high) = codes.split_at_mut(half);
        for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
            (*low, *high) = (byte & 15, byte >> 4);
        }
    }
}

fn join_nibbles(codes: &[u8], half: usize, bytes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact_mut(half).zip(codes.chunks_exact(2 * half)) {
        let (low, high) = codes.split_at(half);
        for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
            *byte = low & 15 | high << 4;
        }
    }
}

/// Fields of `bits` bits of 32 bytes, field by field: run r of 32 codes at shift `bits·r`.
fn split_runs(bytes: &[u8], bits: usize, codes: &mut [u8]) {
    let mask = (1 << bits) - 1;
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(32 * 8 / bits)) {
        for (run, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code = byte >> (bits * run) & mask;
            }
        }
    }
}

fn join_runs(codes: &[u8], bits: usize, bytes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact_mut(32).zip(codes.chunks_exact(32 * 8 / bits)) {
        for (run, codes) in codes.chunks_exact(32).enumerate() {
            for (code, byte) in codes.iter().zip(&mut *bytes) {
                *byte |= code << (bits * run);
            }
        }
    }
}

/// The bits of `codes` at `bit`, one for each code, LSB first.
fn or_bits(bytes: &[u8], bit: u32, codes: &mut [u8]) {
    for (codes, byte) in codes.chunks_exact_mut(8).zip(bytes) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= (byte >> i & 1) << bit;
        }
    }
}

fn take_bits(codes: &[u8], bit: u32, bytes: &mut [u8]) {
    for (codes, byte) in codes.chunks_exact(8).zip(bytes) {
        *byte = (0..8).fold(0, |byte, i| byte | (codes[i] >> bit & 1) << i);
    }
}

/// `codes |= high << bit` with the bits that [`split_runs`] finds.
fn or_runs(bytes: &[u8], bits: usize, bit: u32, codes: &mut [u8]) {
    let mut high = [0; BLOCK];
    split_runs(bytes, bits, &mut high);
    for (code, high) in codes.iter_mut().zip(high) {
        *code |= high << bit;
    }
}

fn join_high_runs(codes: &[u8; BLOCK], bits: usize, bit: u32, bytes: &mut [u8]) {
    join_runs(&codes.map(|code| code >> bit), bits, bytes);
}

/// The 12 bytes of eight 6-bit scales and eight 6-bit minima.
fn split_scales(packed: &[u8], block: &mut Block) {
    for j in 0..8 {
        (block.scales[j], block.minima[j]) = scale_and_min(packed, j);
    }
}

fn join_scales(block: &Block, packed: &mut [u8]) {
    for j in 0..4 {
        let (scale, min) = (block.scales[j + 4], block.minima[j + 4]);
        packed[j] = block.scales[j] | scale >> 4 << 6;
        packed[j + 4] = block.minima[j] | min >> 4 << 6;
        packed[j + 8] = scale & 15 | min << 4;
    }
}

/// Q6_K: per 128 codes, runs 0 to 3 of 32: low nibbles in byte 32·(r % 2) + j, low or high half.
fn split_q6_low(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(64).zip(codes.chunks_exact_mut(128)) {
        for (i, &byte) in bytes.iter().enumerate() {
            (codes[i], codes[64 + i]) = (byte & 15, byte >> 4);
        }
    }
}

fn join_q6_low(codes: &[u8], bytes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact_mut(64).zip(codes.chunks_exact(128)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[i] & 15 | codes[64 + i] << 4;
        }
    }
}

const FORMATS: &[BlockFormat] = &[
    BlockFormat {
        dtype: GgmlType::Q4_0,
        codes: Codes::Int(4),
        group: 32,
        scales: Scales::F16,
        split: |b, to| {
            to.step = pair(b, 0);
            split_nibbles(&b[2..], 16, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            join_nibbles(&from.codes, 16, &mut b[2..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q4_1,
        codes: Codes::Int(4),
        group: 32,
        scales: Scales::F16AndOffset,
        split: |b, to| {
            (to.step, to.offset) = (pair(b, 0), pair(b, 2));
            split_nibbles(&b[4..], 16, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            b[2..4].copy_from_slice(&from.offset);
            join_nibbles(&from.codes, 16, &mut b[4..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q5_0,
        codes: Codes::Int(5),
        group: 32,
        scales: Scales::F16,
        split: |b, to| {
            to.step = pair(b, 0);
            split_nibbles(&b[6..], 16, &mut to.codes);
            or_bits(&b[2..6], 4, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            take_bits(&from.codes, 4, &mut b[2..6]);
            join_nibbles(&from.codes, 16, &mut b[6..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q5_1,
        codes: Codes::Int(5),
        group: 32,
        scales: Scales::F16AndOffset,
        split: |b, to| {
            (to.step, to.offset) = (pair(b, 0), pair(b, 2));
            split_nibbles(&b[8..], 16, &mut to.codes);
            or_bits(&b[4..8], 4, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            b[2..4].copy_from_slice(&from.offset);
            take_bits(&from.codes, 4, &mut b[4..8]);
            join_nibbles(&from.codes, 16, &mut b[8..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q8_0,
        codes: Codes::Int(8),
        group: 32,
        scales: Scales::F16,
        split: |b, to| {
            to.step = pair(b, 0);
            to.codes.iter_mut().zip(&b[2..]).for_each(|(code, byte)| *code = byte ^ 0x80);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            b[2..].iter_mut().zip(&from.codes).for_each(|(byte, code)| *byte = code ^ 0x80);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q2_K,
        codes: Codes::Int(2),
        group: 16,
        scales: Scales::WithMinima(4),
        split: |b, to| {
            for ((scale, min), byte) in to.scales.iter_mut().zip(&mut to.minima).zip(b) {
                (*scale, *min) = (byte & 15, byte >> 4);
            }
            split_runs(&b[16..80], 2, &mut to.codes);
            (to.step, to.offset) = (pair(b, 80), turned(pair(b, 82)));
        },
        join: Some(|from, b| {
            for ((scale, min), byte) in from.scales.iter().zip(&from.minima).zip(&mut *b) {
                *byte = scale | min << 4;
            }
            join_runs(&from.codes, 2, &mut b[16..80]);
            b[80..82].copy_from_slice(&from.step);
            b[82..].copy_from_slice(&turned(from.offset));
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q3_K,
        codes: Codes::Int(3),
        group: 16,
        scales: Scales::Signed(6),
        split: |b, to| {
            split_runs(&b[32..96], 2, &mut to.codes);
            or_runs(&b[..32], 1, 2, &mut to.codes);
            for j in 0..16 {
                let low = b[96 + j % 8] >> (j / 8 * 4) & 15;
                to.scales[j] = low | (b[104 + j % 4] >> (j / 4 * 2) & 3) << 4;
            }
            to.step = pair(b, 108);
        },
        join: Some(|from, b| {
            join_high_runs(&from.codes, 1, 2, &mut b[..32]);
            join_runs(&from.codes.map(|code| code & 3), 2, &mut b[32..96]);
            for j in 0..16 {
                b[96 + j % 8] |= (from.scales[j] & 15) << (j / 8 * 4);
                b[104 + j % 4] |= from.scales[j] >> 4 << (j / 4 * 2);
            }
            b[108..].copy_from_slice(&from.step);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q4_K,
        codes: Codes::Int(4),
        group: 32,
        scales: Scales::WithMinima(6),
        split: |b, to| {
            (to.step, to.offset) = (pair(b, 0), turned(pair(b, 2)));
            split_scales(&b[4..16], to);
            split_nibbles(&b[16..], 32, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            b[2..4].copy_from_slice(&turned(from.offset));
            join_scales(from, &mut b[4..16]);
            join_nibbles(&from.codes, 32, &mut b[16..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q5_K,
        codes: Codes::Int(5),
        group: 32,
        scales: Scales::WithMinima(6),
        split: |b, to| {
            (to.step, to.offset) = (pair(b, 0), turned(pair(b, 2)));
            split_scales(&b[4..16], to);
            split_nibbles(&b[48..], 32, &mut to.codes);
            or_runs(&b[16..48], 1, 4, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            b[2..4].copy_from_slice(&turned(from.offset));
            join_scales(from, &mut b[4..16]);
            join_high_runs(&from.codes, 1, 4, &mut b[16..48]);
            join_nibbles(&from.codes, 32, &mut b[48..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q6_K,
        codes: Codes::Int(6),
        group: 16,
        scales: Scales::Signed(8),
        split: |b, to| {
            split_q6_low(&b[..128], &mut to.codes);
            or_runs(&b[128..192], 2, 4, &mut to.codes);
            to.scales.iter_mut().zip(&b[192..208]).for_each(|(scale, b)| *scale = b ^ 0x80);
            to.step = pair(b, 208);
        },
        join: Some(|from, b| {
            join_q6_low(&from.codes, &mut b[..128]);
            join_high_runs(&from.codes, 2, 4, &mut b[128..192]);
            b[192..208].iter_mut().zip(&from.scales).for_each(|(b, scale)| *b = scale ^ 0x80);
            b[208..].copy_from_slice(&from.step);
        }),
    },
    BlockFormat {
        dtype: GgmlType::IQ4_NL,
        codes: Codes::Iq4,
        group: 32,
        scales: Scales::F16,
        split: |b, to| {
            to.step = pair(b, 0);
            split_nibbles(&b[2..], 16, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            join_nibbles(&from.codes, 16, &mut b[2..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::IQ4_XS,
        codes: Codes::Iq4,
        group: 32,
        scales: Scales::Signed(6),
        split: |b, to| {
            to.step = pair(b, 0);
            let high = u16::from_le_bytes(pair(b, 2));
            for j in 0..8 {
                let low = b[4 + j / 2] >> (j % 2 * 4) & 15;
                to.scales[j] = low | ((high >> (2 * j) & 3) as u8) << 4;
            }
            split_nibbles(&b[8..], 16, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            let mut high = 0;
            for j in 0..8 {
                high |= u16::from(from.scales[j] >> 4) << (2 * j);
                b[4 + j / 2] |= (from.scales[j] & 15) << (j % 2 * 4);
            }
            b[2..4].copy_from_slice(&high.to_le_bytes());
            join_nibbles(&from.codes, 16, &mut b[8..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::TQ2_0,
        codes: Codes::Ternary,
        group: 256,
        scales: Scales::F16,
        split: |b, to| {
            split_runs(&b[..64], 2, &mut to.codes);
            to.step = pair(b, 64);
        },
        join: Some(|from, b| {
            join_runs(&from.codes, 2, &mut b[..64]);
            b[64..].copy_from_slice(&from.step);
        }),
    },
    BlockFormat {
        dtype: GgmlType::TQ1_0,
        codes: Codes::Ternary,
        group: 256,
        scales: Scales::F16,
        split: |b, to| {
            for (i, code) in to.codes.iter_mut().enumerate() {
                *code = match i {
                    0..160 => trit(b[i % 32], i / 32),
                    160..240 => trit(b[32 + (i - 160) % 16], (i - 160) / 16),
                    _ => trit(b[48 + (i - 240) % 4], (i - 240) / 4),
                };
            }
            to.step = pair(b, 52);
        },
        join: None,
    },
    BlockFormat {
        dtype: GgmlType::MXFP4,
        codes: Codes::E2m1,
        group: 32,
        scales: Scales::E8m0,
        split: |b, to| {
            to.scales[0] = b[0];
            split_nibbles(&b[1..], 16, &mut to.codes);
        },
        join: Some(|from, b| {
            b[0] = from.scales[0];
            join_nibbles(&from.codes, 16, &mut b[1..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::NVFP4,
        codes: Codes::E2m1,
        group: 16,
        scales: Scales::E4m3,
        split: |b, to| {
            // ggml ignores the sign, and 7F is 0 to it.
            for (to, &scale) in to.scales.iter_mut().zip(&b[..4]) {
                *to = if scale == 0x7f { 0 } else { scale & 0x7f };
            }
            split_nibbles(&b[4..], 8, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..4].copy_from_slice(&from.scales[..4]);
            join_nibbles(&from.codes, 8, &mut b[4..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q1_0,
        codes: Codes::Sign,
        group: 128,
        scales: Scales::F16,
        split: |b, to| {
            to.step = pair(b, 0);
            to.codes[..128].fill(0);
            or_bits(&b[2..], 0, &mut to.codes);
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            take_bits(&from.codes, 0, &mut b[2..]);
        }),
    },
    BlockFormat {
        dtype: GgmlType::Q2_0,
        codes: Codes::Ternary,
        group: 64,
        scales: Scales::F16,
        split: |b, to| {
            to.step = pair(b, 0);
            for (codes, byte) in to.codes.chunks_exact_mut(4).zip(&b[2..]) {
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = byte >> (2 * i) & 3;
                }
            }
        },
        join: Some(|from, b| {
            b[..2].copy_from_slice(&from.step);
            for (codes, byte) in from.codes.chunks_exact(4).zip(&mut b[2..]) {
                *byte = (0..4).fold(0, |byte, i| byte | codes[i] << (2 * i));
            }
        }),
    },
];
