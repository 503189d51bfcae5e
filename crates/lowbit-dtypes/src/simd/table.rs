//! Tables of 16 levels, over slices.

use super::{Kernel, Simd};
use crate::table::Table16;

/// `codes[i]` becomes the code of `src[i]`.
pub(crate) struct Encode<'a> {
    pub(crate) table: &'a Table16,
    pub(crate) src: &'a [f32],
    pub(crate) codes: &'a mut [u8],
}

impl Kernel for Encode<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        encode(simd, self.table, 1.0, self.src, self.codes);
    }
}

#[inline(always)]
fn encode<S: Simd>(simd: S, table: &Table16, factor: f32, src: &[f32], codes: &mut [u8]) {
    let (x, x_rest) = src.as_chunks::<16>();
    let (codes, codes_rest) = codes.as_chunks_mut::<16>();
    let code16 = |x: &[f32; 16]| {
        let mut x = *x;
        for x in &mut x {
            *x *= factor;
        }
        let ranks = simd.rank(&table.tree, &x);
        if table.is_sorted { ranks } else { ranks.map(|rank| table.order[usize::from(rank & 15)]) }
    };
    for (codes, x) in codes.iter_mut().zip(x) {
        *codes = code16(x);
    }
    if !x_rest.is_empty() {
        let mut x = [0.0; 16];
        x[..x_rest.len()].copy_from_slice(x_rest);
        codes_rest.copy_from_slice(&code16(&x)[..x_rest.len()]);
    }
}

/// Absolute maxima of the blocks, and the codes of `x / maximum · reach`.
pub(crate) struct QuantizeBlocks<'a> {
    pub(crate) table: &'a Table16,
    pub(crate) block: usize,
    pub(crate) src: &'a [f32],
    pub(crate) scales: &'a mut [f32],
    pub(crate) codes: &'a mut [u8],
    /// Set if there is a NaN or an infinity.
    pub(crate) not_finite: &'a mut bool,
}

impl Kernel for QuantizeBlocks<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (x, codes) = (self.src.chunks(self.block), self.codes.chunks_mut(self.block));
        for ((x, codes), scale) in x.zip(codes).zip(self.scales) {
            let max = abs_max(x);
            *self.not_finite |= !max.is_finite();
            let reach = self.table.reach;
            *scale = if reach > 0.0 { max / reach } else { 0.0 };
            // Below 2^-128 the quotient would be infinite, and zeros NaN.
            let factor = if max > 0.0 { (reach / max).min(f32::MAX) } else { 0.0 };
            encode(simd, self.table, factor, x, codes);
        }
    }
}

/// The largest magnitude; NaN counts as larger than infinity.
#[inline(always)]
pub(crate) fn abs_max(x: &[f32]) -> f32 {
    // Magnitudes compare as their bits do, and maxima of integers may be taken in any order.
    f32::from_bits(x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff)))
}

/// `dst[i]` becomes `level(codes[i]) · scale` of its block.
pub(crate) struct DequantizeBlocks<'a> {
    pub(crate) levels: &'a [f32; 16],
    pub(crate) block: usize,
    pub(crate) scales: &'a [f32],
    pub(crate) codes: &'a [u8],
    pub(crate) dst: &'a mut [f32],
}

impl Kernel for DequantizeBlocks<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (codes, dst) = (self.codes.chunks(self.block), self.dst.chunks_mut(self.block));
        for ((codes, dst), &scale) in codes.zip(dst).zip(self.scales) {
            decode(simd, self.levels, scale, codes, dst);
        }
    }
}

#[inline(always)]
fn decode<S: Simd>(simd: S, levels: &[f32; 16], scale: f32, codes: &[u8], dst: &mut [f32]) {
    let (codes, codes_rest) = codes.as_chunks::<16>();
    let (dst, dst_rest) = dst.as_chunks_mut::<16>();
    for (dst, codes) in dst.iter_mut().zip(codes) {
        *dst = simd.entry(levels, codes);
        for x in dst {
            *x *= scale;
        }
    }
    for (x, &code) in dst_rest.iter_mut().zip(codes_rest) {
        *x = levels[usize::from(code & 15)] * scale;
    }
}
