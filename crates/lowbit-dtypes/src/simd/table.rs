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

/// The codes of `src · factor`.
#[inline(always)]
fn encode<S: Simd>(simd: S, table: &Table16, factor: f32, src: &[f32], codes: &mut [u8]) {
    let (x, x_rest) = src.as_chunks::<16>();
    let (codes, codes_rest) = codes.as_chunks_mut::<16>();
    // Four at a time, as each takes steps that wait for one another.
    let (x4, x1) = x.as_chunks::<4>();
    let (codes4, codes1) = codes.as_chunks_mut::<4>();
    for (codes, x) in codes4.iter_mut().zip(x4) {
        *codes = encode16s(simd, table, factor, x);
    }
    for (codes, x) in codes1.iter_mut().zip(x1) {
        [*codes] = encode16s(simd, table, factor, &[*x]);
    }
    if !x_rest.is_empty() {
        let mut x = [0.0; 16];
        x[..x_rest.len()].copy_from_slice(x_rest);
        let [codes] = encode16s(simd, table, factor, &[x]);
        codes_rest.copy_from_slice(&codes[..x_rest.len()]);
    }
}

#[inline(always)]
fn encode16s<S: Simd, const N: usize>(
    simd: S,
    table: &Table16,
    factor: f32,
    x: &[[f32; 16]; N],
) -> [[u8; 16]; N] {
    let mut x = *x;
    for x in x.as_flattened_mut() {
        *x *= factor;
        // Also of NaN this makes the lowest.
        *x = if *x > -table.reach { *x } else { -table.reach };
        *x = if *x < table.reach { *x } else { table.reach };
    }
    simd.find(&table.search, &x)
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
        // The usual sizes are known to the compiler.
        match self.block {
            32 => self.quantize(simd, 32),
            64 => self.quantize(simd, 64),
            128 => self.quantize(simd, 128),
            block => self.quantize(simd, block),
        }
    }
}

impl QuantizeBlocks<'_> {
    #[inline(always)]
    fn quantize<S: Simd>(self, simd: S, block: usize) {
        let (x, x_rest) = self.src.split_at(self.src.len() - self.src.len() % block);
        let (codes, codes_rest) = self.codes.split_at_mut(x.len());
        let (scales, scales_rest) = self.scales.split_at_mut(x.len() / block);
        // The maxima of some blocks first, then their codes: one block after the other would wait for each division.
        let group = GROUP.saturating_mul(block);
        let groups = x.chunks(group).zip(codes.chunks_mut(group));
        for ((x, codes), scales) in groups.zip(scales.chunks_mut(GROUP)) {
            let mut factors = [0.0; GROUP];
            for ((scale, factor), x) in
                scales.iter_mut().zip(&mut factors).zip(x.chunks_exact(block))
            {
                *factor = simd.abs_max(x);
                *scale = *factor;
            }
            for factor in &mut factors {
                *self.not_finite |= !factor.is_finite();
                *factor = self.table.factor(*factor);
            }
            for scale in scales {
                *scale = self.table.scale(*scale);
            }
            let blocks = x.chunks_exact(block).zip(codes.chunks_exact_mut(block));
            for ((x, codes), factor) in blocks.zip(factors) {
                encode(simd, self.table, factor, x, codes);
            }
        }
        if let [scale] = scales_rest {
            let max = simd.abs_max(x_rest);
            *self.not_finite |= !max.is_finite();
            *scale = self.table.scale(max);
            encode(simd, self.table, self.table.factor(max), x_rest, codes_rest);
        }
    }
}

impl Table16 {
    /// What a block with this maximum is multiplied with on decoding.
    #[inline(always)]
    fn scale(&self, max: f32) -> f32 {
        if self.reach > 0.0 { max / self.reach } else { 0.0 }
    }

    /// And on encoding.
    #[inline(always)]
    fn factor(&self, max: f32) -> f32 {
        // Below 2^-128 the quotient would be infinite, and zeros NaN.
        if max > 0.0 { (self.reach / max).min(f32::MAX) } else { 0.0 }
    }
}

/// Blocks that are quantized together.
pub(crate) const GROUP: usize = 16;

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
