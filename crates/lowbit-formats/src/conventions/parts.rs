//! What the conventions have in common: looking tensors up, and turning matrices of fields over.

use std::borrow::Cow;

use lowbit_core::{
    Granularity, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, Transform, ZeroFormat,
};
use lowbit_dtypes::{pack, packed_len, unpack};

use crate::{Dtype, Error, Result, Tensor, TensorSource, TensorView};

/// The tensors of a layer.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) source: &'a dyn TensorSource,
    pub(super) name: &'a str,
}

impl<'a> Layer<'a> {
    pub(super) fn has(self, part: &str) -> bool {
        self.find(part).is_some()
    }

    pub(super) fn find(self, part: &str) -> Option<TensorView<'a>> {
        self.get(part).ok()
    }

    pub(super) fn get(self, part: &str) -> Result<TensorView<'a>> {
        self.source.tensor(&format!("{}.{part}", self.name))
    }

    /// A matrix of `dtype`, and its shape.
    pub(super) fn matrix(self, part: &str, dtype: Dtype) -> Result<(TensorView<'a>, [usize; 2])> {
        let view = self.get(part)?;
        expect_dtype(&view, dtype)?;
        let shape = view.matrix_shape()?;
        Ok((view, shape))
    }

    /// Scales of any float type: their format, and rows and columns.
    pub(super) fn scales(self, part: &str) -> Result<(TensorView<'a>, ScaleFormat, [usize; 2])> {
        let view = self.get(part)?;
        let format = match view.dtype {
            Dtype::F32 => ScaleFormat::F32,
            Dtype::F16 => ScaleFormat::F16,
            Dtype::Bf16 => ScaleFormat::Bf16,
            got => return Err(view.error(format!("it is {got}, expected F32, F16 or BF16"))),
        };
        let shape = match *view.shape {
            [] => [1, 1],
            [rows] if rows > 0 => [rows, 1],
            _ => view.matrix_shape()?,
        };
        view.check_len()?;
        Ok((view, format, shape))
    }

    /// The layer of `weight`, with the bias that its name has.
    pub(super) fn finish(
        self,
        weight: lowbit_core::Result<QMatrix>,
        file: &str,
    ) -> Result<QLinear> {
        let bias = self.find("bias").map(|bias| bias.to_f32()).transpose()?;
        let layer = weight.and_then(|weight| QLinear::new(weight).with_bias(bias));
        layer.map_err(|cause| self.error(file, cause))
    }

    /// The layer whose columns are in this `order` of the input.
    pub(super) fn permuted(
        self,
        linear: QLinear,
        order: Option<Vec<usize>>,
        file: &str,
    ) -> Result<QLinear> {
        let Some(order) = order else { return Ok(linear) };
        let places = order.iter().map(|&place| place as u32).collect();
        let permuted = linear.with_transforms(vec![Transform::Permute(places)]);
        permuted.map_err(|cause| self.error(file, cause))
    }

    pub(super) fn error(self, file: &str, cause: lowbit_core::Error) -> Error {
        Error::Layer { file: file.into(), layer: self.name.into(), cause }
    }
}

/// The group of each feature; `None` if none is set (−1).
pub(super) fn groups_of(view: &TensorView<'_>) -> Result<Option<Vec<i32>>> {
    expect_dtype(view, Dtype::I32)?;
    let groups: Vec<_> =
        view.bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect();
    Ok(groups.iter().any(|&group| group != -1).then_some(groups))
}

/// The group size, and the features in the order of their groups unless they are already.
pub(super) fn order(g_idx: &[i32], groups: usize) -> Option<(usize, Option<Vec<usize>>)> {
    let mut sizes = vec![0_usize; groups];
    for &group in g_idx {
        *sizes.get_mut(usize::try_from(group).ok()?)? += 1;
    }
    let (&last, full) = sizes.split_last()?;
    let size = full.first().copied().unwrap_or(last);
    if full.iter().any(|&other| other != size) || last > size || (last == 0 && groups > 1) {
        return None;
    }
    if g_idx.is_sorted() {
        return Some((size, None));
    }
    let mut order: Vec<usize> = (0..g_idx.len()).collect();
    order.sort_by_key(|&feature| g_idx[feature]);
    Some((size, Some(order)))
}

pub(super) fn expect_dtype(view: &TensorView<'_>, expected: Dtype) -> Result<()> {
    if view.dtype == expected {
        return view.check_len();
    }
    Err(view.error(format!("it is {}, expected {expected}", view.dtype)))
}

pub(super) fn expect_shape(view: &TensorView<'_>, expected: &[usize]) -> Result<()> {
    if view.shape == expected {
        return Ok(());
    }
    Err(view.error(format!("its shape is {:?}, expected {expected:?}", view.shape)))
}

/// A layer on its way out, and who is to hold it.
#[derive(Clone, Copy)]
pub(super) struct Writer<'a> {
    pub(super) convention: &'static str,
    pub(super) layer: &'a QLinear,
    pub(super) name: &'a str,
}

impl<'a> Writer<'a> {
    pub(super) fn weight(self) -> &'a QMatrix {
        self.layer.weight()
    }

    pub(super) fn unsupported(self, what: impl Into<String>) -> Error {
        let Self { convention, name, .. } = self;
        Error::Unsupported { layer: name.into(), convention, what: what.into() }
    }

    /// Refuses all but a weight and a bias. Transforms and quantized inputs are for the caller to
    /// look at if it can hold them.
    pub(super) fn plain(self, transforms: bool, activation: bool) -> Result<()> {
        for (refused, what) in [
            (!transforms && !self.layer.transforms().is_empty(), "a transform of the input"),
            (!activation && self.layer.activation().is_some(), "quantized activations"),
            (!activation && self.layer.outliers().is_some(), "outliers"),
            (self.layer.adapter().is_some(), "a low-rank term"),
        ] {
            if refused {
                return Err(self.unsupported(what));
            }
        }
        Ok(())
    }

    /// For each feature of the input its column in the weight, if the input is permuted.
    pub(super) fn order(self) -> Result<Option<Vec<usize>>> {
        match self.layer.transforms() {
            [] => Ok(None),
            [Transform::Permute(places)] => {
                let mut columns = vec![0; places.len()];
                for (column, &feature) in places.iter().enumerate() {
                    columns[feature as usize] = column;
                }
                Ok(Some(columns))
            }
            _ => Err(self.unsupported("a transform of the input but a permutation")),
        }
    }

    /// The width of integer codes.
    pub(super) fn bits(self) -> Result<u8> {
        match self.weight().scheme().dtype {
            QuantType::Int { bits } => Ok(bits),
            other => Err(self.unsupported(format!("{other} codes"))),
        }
    }

    /// The group size along a row; the whole row for one scale per channel.
    pub(super) fn group_size(self) -> Result<usize> {
        match self.weight().scheme().granularity {
            Granularity::PerChannel => Ok(self.weight().cols().max(1)),
            Granularity::PerGroup(group_size) => Ok(group_size),
            other => Err(self.unsupported(format!("scales ({other})"))),
        }
    }

    /// The [`group_size`](Self::group_size), where all groups must be full.
    pub(super) fn full_groups(self) -> Result<usize> {
        let (size, k) = (self.group_size()?, self.weight().cols());
        if k.is_multiple_of(size) {
            return Ok(size);
        }
        Err(self
            .unsupported(format!("rows of {k} in groups of {size}, only groups that divide rows")))
    }

    /// The scales in their own format.
    pub(super) fn scale_dtype(self) -> Result<Dtype> {
        match self.weight().scheme().scale_format {
            ScaleFormat::F32 => Ok(Dtype::F32),
            ScaleFormat::F16 => Ok(Dtype::F16),
            ScaleFormat::Bf16 => Ok(Dtype::Bf16),
            ScaleFormat::TwoLevel(_) => {
                Err(self.unsupported("scales that are quantized themselves (two-level)"))
            }
            other => Err(self.unsupported(format!("{other} scales"))),
        }
    }

    /// The integer zeros, one a byte, over the grid of blocks; `None` if they are all the midpoint.
    pub(super) fn zeros(self) -> Result<Option<Vec<u8>>> {
        let weight = self.weight();
        let bits = u32::from(self.bits()?);
        match (weight.scheme().zero, weight.zeros()) {
            (ZeroFormat::Midpoint, _) => Ok(None),
            (ZeroFormat::Int, Some(zeros)) => {
                let (rows, cols) = weight.grid();
                let mut codes = vec![0; rows * cols];
                unpack_rows(bits, zeros, cols, &mut codes);
                Ok(Some(codes))
            }
            (other, _) => Err(self.unsupported(other.to_string())),
        }
    }

    pub(super) fn tensor(
        self,
        part: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Tensor {
        Tensor::new(format!("{}.{part}", self.name), dtype, shape.into(), bytes)
    }

    pub(super) fn bias(self) -> Option<Tensor> {
        let bias = self.layer.bias()?;
        Some(Tensor::f32(format!("{}.bias", self.name), vec![bias.len()], bias))
    }
}

/// The granularity of `groups` scales a row, and the group size: one that is asked for if it fits, or
/// else the one that divides the row.
pub(super) fn group_size(k: usize, groups: usize, asked: Option<usize>) -> Option<usize> {
    match asked {
        _ if groups <= 1 => Some(k),
        Some(size) if size > 0 && k.div_ceil(size) == groups => Some(size),
        _ if k.is_multiple_of(groups) => Some(k / groups),
        _ => None,
    }
}

pub(super) fn granularity(k: usize, group_size: usize) -> Granularity {
    if group_size >= k { Granularity::PerChannel } else { Granularity::PerGroup(group_size) }
}

/// A scheme of integers; zeros that are all the midpoint need not be stored.
pub(super) fn integers(
    bits: u8,
    granularity: Granularity,
    scale_format: ScaleFormat,
    zeros: Option<&[u8]>,
) -> QuantScheme {
    let scheme = QuantScheme { scale_format, ..QuantScheme::symmetric(bits, granularity) };
    match zeros {
        Some(_) => QuantScheme { zero: ZeroFormat::Int, ..scheme },
        None => scheme,
    }
}

/// `to[c][r] = from[r][c]`, in squares by way of a small buffer: rows of a power of two are so far apart that
/// few of them are in the cache together.
pub(super) fn transpose<T: Copy>(from: &[T], rows: usize, cols: usize, to: &mut [T]) {
    const SIDE: usize = 16;
    let Some(&any) = from.first() else { return };
    let mut square = [[any; SIDE]; SIDE];
    for r0 in (0..rows).step_by(SIDE) {
        for c0 in (0..cols).step_by(SIDE) {
            let (height, width) = (SIDE.min(rows - r0), SIDE.min(cols - c0));
            for r in 0..height {
                let from = &from[(r0 + r) * cols + c0..][..width];
                match from.first_chunk::<SIDE>() {
                    Some(from) => (0..SIDE).for_each(|c| square[c][r] = from[c]),
                    None => (0..width).for_each(|c| square[c][r] = from[c]),
                }
            }
            for (c, from) in square.iter().enumerate().take(width) {
                let to = &mut to[(c0 + c) * rows + r0..][..height];
                match to.first_chunk_mut::<SIDE>() {
                    Some(to) => *to = *from,
                    None => to.copy_from_slice(&from[..height]),
                }
            }
        }
    }
}

/// [`transpose`] of elements of `N` bytes.
pub(super) fn transposed<const N: usize>(from: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let mut to = vec![0; from.len()];
    transpose(from.as_chunks::<N>().0, rows, cols, to.as_chunks_mut::<N>().0);
    to
}

/// [`transposed`] scales of 2 or 4 bytes.
pub(super) fn transposed_scales(
    format: ScaleFormat,
    from: &[u8],
    rows: usize,
    cols: usize,
) -> Vec<u8> {
    match scale_len(format) {
        4 => transposed::<4>(from, rows, cols),
        _ => transposed::<2>(from, rows, cols),
    }
}

/// Bytes of a scale in F32, F16 or BF16.
pub(super) fn scale_len(format: ScaleFormat) -> usize {
    format.bytes((1, 1)).unwrap_or(4)
}

/// Rows of bytes made shorter or longer; what is new is 0.
pub(super) fn restride(from: Vec<u8>, rows: usize, from_stride: usize, stride: usize) -> Vec<u8> {
    if from_stride == stride {
        return from;
    }
    let mut to = vec![0; rows * stride];
    if from_stride > 0 && stride > 0 {
        for (to, from) in to.chunks_exact_mut(stride).zip(from.chunks_exact(from_stride)) {
            let len = stride.min(from_stride);
            to[..len].copy_from_slice(&from[..len]);
        }
    }
    to
}

/// Rows of `stride` bytes, padded to whole words; and the words of a row.
pub(super) fn words(from: &[u8], rows: usize, stride: usize) -> (Cow<'_, [u8]>, usize) {
    let words = stride.div_ceil(4);
    match stride.is_multiple_of(4) {
        true => (from.into(), words),
        false => (restride(from.to_vec(), rows, stride, 4 * words).into(), words),
    }
}

/// Unpacks rows of `cols` codes, each padded to whole bytes.
pub(super) fn unpack_rows(bits: u32, packed: &[u8], cols: usize, codes: &mut [u8]) {
    let stride = packed_len(cols, bits);
    if stride == 0 {
        return;
    }
    for (codes, packed) in codes.chunks_exact_mut(cols).zip(packed.chunks_exact(stride)) {
        // It fails on other lengths and widths only.
        let _ = unpack(bits, packed, codes);
    }
}

/// The reverse of [`unpack_rows`].
pub(super) fn pack_rows(bits: u32, codes: &[u8], cols: usize) -> Vec<u8> {
    let stride = packed_len(cols, bits);
    if stride == 0 {
        return Vec::new();
    }
    let mut packed = vec![0; codes.len() / cols * stride];
    for (codes, packed) in codes.chunks_exact(cols).zip(packed.chunks_exact_mut(stride)) {
        let _ = pack(bits, codes, packed);
    }
    packed
}

/// Clears what is behind the last code of each row, for files that leave something there.
pub(super) fn clear_padding(packed: &mut [u8], cols: usize, bits: u32) {
    let used = (cols % 8 * bits as usize) % 8;
    let stride = packed_len(cols, bits);
    if used != 0 {
        for row in packed.chunks_exact_mut(stride) {
            row[stride - 1] &= (1 << used) - 1;
        }
    }
}

/// Moves columns: `to[j] = from[places[j]]` in each row of packed codes.
pub(super) fn gather_columns(bits: u32, packed: &mut [u8], places: &[usize]) {
    let cols = places.len();
    let stride = packed_len(cols, bits);
    if stride == 0 {
        return;
    }
    let (mut codes, mut moved) = (vec![0_u8; cols], vec![0_u8; cols]);
    for row in packed.chunks_exact_mut(stride) {
        let _ = unpack(bits, row, &mut codes);
        for (to, &place) in moved.iter_mut().zip(places) {
            *to = codes[place];
        }
        let _ = pack(bits, &moved, row);
    }
}

/// The group size as a `quantization_config` says it: −1 for a whole row.
pub(super) fn config_group_size(scheme: QuantScheme) -> i64 {
    match scheme.granularity {
        Granularity::PerGroup(group_size) => i64::try_from(group_size).unwrap_or(-1),
        _ => -1,
    }
}

pub(super) fn expect_rows(view: &TensorView<'_>, rows: usize) -> Result<()> {
    if view.shape.first() == Some(&rows) {
        return Ok(());
    }
    Err(view.error(format!("its shape is {:?}, expected {rows} rows", view.shape)))
}
