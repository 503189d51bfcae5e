//! Rows of activations as kernels read them: int8 codes, group by group, with what belongs to a group.

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Error, MatRef, Outliers, Result,
    encode_row_int8, encode_row_uint8, group_sums, quantize_row_int8, quantize_row_uint8,
    range::min_max,
};

use crate::{packed::PackedLinear, tile::Int8Row};

/// How rows become integers.
#[derive(Clone, Copy)]
pub(crate) struct Quantizer {
    pub(crate) scheme: ActivationScheme,
    /// Scale and zero-point, where they do not depend on the row.
    pub(crate) known: Option<(f32, u8)>,
}

impl Quantizer {
    /// Quantizes numbers that share a scale. Gives it, and what the codes count from.
    ///
    /// Codes of uint8 are stored as `code − 128`, which kernels multiply as they do those of int8.
    fn encode(self, x: &[f32], codes: &mut [i8]) -> Result<(f32, i32)> {
        match (self.scheme.dtype, self.known) {
            (ActivationType::UInt8, known) => {
                let unsigned: &mut [u8] = bytemuck::cast_slice_mut(codes);
                let (scale, zero) = match known {
                    None => quantize_row_uint8(x, unsigned)?,
                    Some((scale, zero)) => {
                        encode_row_uint8(x, scale, zero, unsigned)?;
                        (scale, zero)
                    }
                };
                for code in unsigned {
                    *code ^= 128;
                }
                Ok((scale, i32::from(zero) - 128))
            }
            (_, None) => Ok((quantize_row_int8(x, codes)?, 0)),
            (_, Some((scale, _))) => {
                encode_row_int8(x, scale, codes)?;
                Ok((scale, 0))
            }
        }
    }
}

/// A quantized row in scratch memory:
/// `[codes i8; width][scale f32][sums i32; groups][zeros i32; groups][scales f32; groups]`, zeros and
/// scales only if `affine`. The codes begin with a cache line.
#[derive(Clone, Copy)]
pub(crate) struct RowLayout {
    pub(crate) width: usize,
    pub(crate) groups: usize,
    pub(crate) affine: bool,
}

pub(crate) struct RowMut<'a> {
    codes: &'a mut [i8],
    pub(crate) scale: &'a mut f32,
    sums: &'a mut [i32],
    zeros: &'a mut [i32],
    scales: &'a mut [f32],
}

impl RowLayout {
    /// A multiple of a cache line.
    pub(crate) fn bytes(self) -> usize {
        (self.width + 4 + 4 * (self.groups + 2 * self.extra())).next_multiple_of(64)
    }

    fn extra(self) -> usize {
        if self.affine { self.groups } else { 0 }
    }

    pub(crate) fn split_mut(self, row: &mut [u8]) -> RowMut<'_> {
        let (codes, row) = row.split_at_mut(self.width);
        let (scale, row) = row.split_at_mut(4);
        let (sums, row) = row.split_at_mut(4 * self.groups);
        let (zeros, row) = row.split_at_mut(4 * self.extra());
        RowMut {
            codes: bytemuck::cast_slice_mut(codes),
            scale: bytemuck::from_bytes_mut(scale),
            sums: bytemuck::cast_slice_mut(sums),
            zeros: bytemuck::cast_slice_mut(zeros),
            scales: bytemuck::cast_slice_mut(&mut row[..4 * self.extra()]),
        }
    }

    /// The scale of the row, and the rest.
    pub(crate) fn split(self, row: &[u8]) -> (f32, Int8Row<'_>) {
        let (codes, row) = row.split_at(self.width);
        let (scale, row) = row.split_at(4);
        let (sums, row) = row.split_at(4 * self.groups);
        let (zeros, row) = row.split_at(4 * self.extra());
        let row = Int8Row {
            codes: bytemuck::cast_slice(codes),
            sums: bytemuck::cast_slice(sums),
            zeros: bytemuck::cast_slice(zeros),
            scales: bytemuck::cast_slice(&row[..4 * self.extra()]),
        };
        (*bytemuck::from_bytes(scale), row)
    }
}

/// Scale and zero-point that all rows share, known outlier features left out. (Packing has refused a
/// threshold beside them.)
pub(crate) fn tensor_params(
    dtype: ActivationType,
    x: MatRef<'_, f32>,
    outliers: Option<&Outliers>,
) -> Result<(f32, u8)> {
    let known = match outliers {
        Some(Outliers::Columns(known)) => known.columns(),
        _ => &[],
    };
    let mut all = (0.0_f32, 0.0_f32);
    for (row, x) in x.iter_rows().enumerate() {
        // What lies between one of them and the next; they too must be finite.
        let mut start = 0;
        for end in known.iter().copied().chain([x.len()]) {
            let outlier = x.get(end).is_none_or(|x| x.is_finite());
            let between = x.get(start..end).filter(|between| !between.is_empty());
            match between.map(min_max).transpose() {
                Ok(range) if outlier => {
                    let (lo, hi) = range.unwrap_or_default();
                    all = (all.0.min(lo), all.1.max(hi));
                }
                _ => {
                    let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
                    return Err(Error::NotFinite { what: "activation", row, col });
                }
            }
            start = end + 1;
        }
    }
    dtype.params(all)
}

impl PackedLinear {
    /// Quantizes a row.
    pub(crate) fn quantize_row(
        &self,
        x: &[f32],
        quantizer: Quantizer,
        to: &mut RowMut<'_>,
    ) -> Result<()> {
        let group_size = self.group().0;
        let groups = self.sums_of_row();
        let shared = match quantizer.scheme.scales {
            ActivationScales::PerTokenGroup(shared) => Some(shared),
            _ => None,
        };
        let chunk = shared.unwrap_or(x.len()).max(1);
        let chunk_groups = chunk.div_ceil(group_size);
        let codes = &mut to.codes[..x.len()];
        *to.scale = 1.0;
        for (i, (x, codes)) in x.chunks(chunk).zip(codes.chunks_mut(chunk)).enumerate() {
            let (scale, zero) = quantizer.encode(x, codes)?;
            if shared.is_none() {
                *to.scale = scale;
            }
            if !to.zeros.is_empty() {
                let these = i * chunk_groups..groups.min((i + 1) * chunk_groups);
                to.zeros[these.clone()].fill(zero);
                to.scales[these].fill(if shared.is_some() { scale } else { 1.0 });
            }
        }
        self.spread(x.len(), to);
        Ok(())
    }

    /// Takes over a row of int8, where −128 has no place.
    pub(crate) fn load_int8(&self, codes: &[i8], scale: f32, to: &mut RowMut<'_>) -> Result<()> {
        if codes.contains(&i8::MIN) {
            let what = "int8 code of an activation";
            return Err(Error::OutOfRange { what, min: -127, max: 127, got: -128 });
        }
        to.codes[..codes.len()].copy_from_slice(codes);
        *to.scale = scale;
        self.spread(codes.len(), to);
        Ok(())
    }

    /// Takes over a row of uint8.
    pub(crate) fn load_uint8(&self, codes: &[u8], scale: f32, zero: u8, to: &mut RowMut<'_>) {
        for (to, code) in to.codes.iter_mut().zip(codes) {
            *to = (code ^ 128) as i8;
        }
        to.zeros.fill(i32::from(zero) - 128);
        to.scales.fill(1.0);
        *to.scale = scale;
        self.spread(codes.len(), to);
    }

    /// Sums the `k` codes of a row group by group, and pads each group with zeros to whole steps.
    fn spread(&self, k: usize, to: &mut RowMut<'_>) {
        let ((group_size, groups), padded) = (self.group(), self.padded_group());
        let (codes, rest) = to.codes.split_at_mut(k);
        rest.fill(0);
        group_sums(codes, if self.one_sum() { k } else { group_size }, to.sums);
        if padded != group_size {
            // From the last group backwards, so that none is overwritten before it has moved.
            for g in (0..groups).rev() {
                let (from, start) = (g * group_size, g * padded);
                let len = group_size.min(k - from);
                to.codes.copy_within(from..from + len, start);
                let end = to.codes.len().min(start + padded);
                to.codes[start + len..end].fill(0);
            }
        }
    }
}
