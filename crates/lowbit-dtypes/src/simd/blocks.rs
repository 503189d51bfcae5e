//! Blocks of small floats that share a scale.

use super::lanes::{Decoder, Encoder, NearestAway, NearestEven, Round, Stochastic, TowardZero};
use super::table::GROUP;
use super::{Kernel, Simd};
use crate::Rounding;
use crate::block::ScaleRule;
use crate::format::{Format, Overflow};

/// The fraction bits of an f32.
const FRACTION: u32 = 0x7f_ffff;

/// The elements of an MX format.
pub(crate) trait Element: Copy {
    fn encode(self, x: f32, round: &impl Round) -> u8;
    /// With `FINITE` the code must be finite, or the result is anything.
    fn decode<const FINITE: bool>(self, code: u8) -> f32;
    fn are_finite(self, codes: &[u8]) -> bool;
}

/// Small floats, saturating.
#[derive(Clone, Copy)]
pub(crate) struct Float {
    e: Encoder,
    d: Decoder,
}

impl Float {
    pub(crate) fn new(format: Format) -> Self {
        Self { e: Encoder::new(format, Overflow::Saturate), d: Decoder::new(format) }
    }
}

impl Element for Float {
    #[inline(always)]
    fn encode(self, x: f32, round: &impl Round) -> u8 {
        round.float(&self.e, x) as u8
    }

    #[inline(always)]
    fn decode<const FINITE: bool>(self, code: u8) -> f32 {
        self.d.lane::<FINITE>(code)
    }

    #[inline(always)]
    fn are_finite(self, codes: &[u8]) -> bool {
        self.d.are_finite(codes)
    }
}

/// Integers in units of 1/64, −127 … 127.
#[derive(Clone, Copy)]
pub(crate) struct Int8;

impl Element for Int8 {
    #[inline(always)]
    fn encode(self, x: f32, round: &impl Round) -> u8 {
        round.integer((x * 64.0).clamp(-127.0, 127.0)) as u8
    }

    #[inline(always)]
    fn decode<const FINITE: bool>(self, code: u8) -> f32 {
        f32::from(code as i8) / 64.0
    }

    #[inline(always)]
    fn are_finite(self, _: &[u8]) -> bool {
        true
    }
}

/// How an MX scale follows from the maximum of a block.
#[derive(Clone, Copy)]
pub(crate) struct Scaling {
    /// Added to the bits of the maximum, where a carry out of the fraction raises the exponent.
    add: u32,
    /// The exponent of the largest element.
    max_exponent: i32,
}

impl Scaling {
    pub(crate) fn new(rule: ScaleRule, largest: f32, fraction_bits: u32) -> Self {
        let bits = largest.to_bits();
        let add = match rule {
            ScaleRule::Floor => 0,
            ScaleRule::Ceil => FRACTION, // carries if there is any fraction
            ScaleRule::Even => 1 << (22 - fraction_bits), // half of the element's last bit
            ScaleRule::Rceil => FRACTION - (bits & FRACTION), // carries if the fraction is above the largest's
        };
        Self { add, max_exponent: (bits >> 23) as i32 - 127 }
    }

    /// The exponent of the scale, from the bits of the maximum: `log2` would err next to powers of two.
    #[inline(always)]
    fn exponent(self, max: u32) -> i32 {
        ((max.wrapping_add(self.add) >> 23) as i32 - 127 - self.max_exponent).clamp(-127, 127)
    }
}

/// `2^e` for -127 <= e <= 127; the lowest is subnormal.
#[inline(always)]
fn pow2(e: i32) -> f32 {
    f32::from_bits(if e == -127 { 1 << 22 } else { ((e + 127) as u32) << 23 })
}

pub(crate) struct MxQuantize<'a, E> {
    pub(crate) element: E,
    pub(crate) scaling: Scaling,
    pub(crate) rounding: Rounding,
    pub(crate) src: &'a [f32],
    pub(crate) scales: &'a mut [u8],
    pub(crate) codes: &'a mut [u8],
}

impl<E: Element> Kernel for MxQuantize<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.rounding {
            Rounding::NearestEven => self.quantize(simd, NearestEven),
            Rounding::NearestAway => self.quantize(simd, NearestAway),
            Rounding::TowardZero => self.quantize(simd, TowardZero),
            Rounding::Stochastic { seed, index } => {
                self.quantize(simd, Stochastic::new(seed, index));
            }
        }
    }
}

impl<E: Element> MxQuantize<'_, E> {
    #[inline(always)]
    fn quantize<S: Simd, R: Round>(self, simd: S, mut round: R) {
        let groups = self.src.chunks(32 * GROUP).zip(self.codes.chunks_mut(32 * GROUP));
        for ((x, codes), scales) in groups.zip(self.scales.chunks_mut(GROUP)) {
            let (blocks, rest) = x.as_chunks::<32>();
            let mut maxima = [0.0; GROUP];
            for (max, x) in maxima.iter_mut().zip(blocks) {
                *max = simd.abs_max(x);
            }
            if !rest.is_empty() {
                maxima[blocks.len()] = simd.abs_max(rest);
            }
            let mut scale_codes = [0; GROUP];
            let mut factors = [0.0; GROUP];
            for ((max, code), factor) in maxima.iter().zip(&mut scale_codes).zip(&mut factors) {
                let exponent = self.scaling.exponent(max.to_bits());
                let finite = max.is_finite();
                *code = if finite { (exponent + 127) as u8 } else { 0xff };
                // NaN as a factor would leave signs.
                *factor = if finite { pow2(-exponent) } else { 0.0 };
            }
            scales.copy_from_slice(&scale_codes[..scales.len()]);
            let (codes, codes_rest) = codes.as_chunks_mut::<32>();
            for ((x, codes), factor) in blocks.iter().zip(codes).zip(factors) {
                multiply_block(self.element, &mut round, factor, x, codes);
            }
            if !rest.is_empty() {
                multiply_block(self.element, &mut round, factors[blocks.len()], rest, codes_rest);
            }
        }
    }
}

#[inline(always)]
fn multiply_block<E: Element, R: Round>(
    element: E,
    round: &mut R,
    factor: f32,
    x: &[f32],
    codes: &mut [u8],
) {
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = element.encode(x * factor, round);
        round.next();
    }
}

pub(crate) struct MxDequantize<'a, E> {
    pub(crate) element: E,
    pub(crate) scales: &'a [u8],
    pub(crate) codes: &'a [u8],
    pub(crate) dst: &'a mut [f32],
}

impl<E: Element> Kernel for MxDequantize<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let groups = self.codes.chunks(32 * GROUP).zip(self.dst.chunks_mut(32 * GROUP));
        for ((codes, dst), scales) in groups.zip(self.scales.chunks(GROUP)) {
            let mut scale_codes = [0; GROUP];
            scale_codes[..scales.len()].copy_from_slice(scales);
            let mut factors = [0.0; GROUP];
            for (factor, code) in factors.iter_mut().zip(scale_codes) {
                *factor = mx_scale(code);
            }
            decode_blocks::<_, 32>(self.element, &factors, codes, dst);
        }
    }
}

#[inline(always)]
fn mx_scale(code: u8) -> f32 {
    if code == 0xff { f32::NAN } else { pow2(i32::from(code) - 127) }
}

/// At most [`GROUP`] blocks, the last of which may be short.
#[inline(always)]
fn decode_blocks<E: Element, const BLOCK: usize>(
    element: E,
    factors: &[f32; GROUP],
    codes: &[u8],
    dst: &mut [f32],
) {
    if element.are_finite(codes) {
        decode_blocks_if::<E, BLOCK, true>(element, factors, codes, dst);
    } else {
        decode_blocks_if::<E, BLOCK, false>(element, factors, codes, dst);
    }
}

#[inline(always)]
fn decode_blocks_if<E: Element, const BLOCK: usize, const FINITE: bool>(
    element: E,
    factors: &[f32; GROUP],
    codes: &[u8],
    dst: &mut [f32],
) {
    let (codes, codes_rest) = codes.as_chunks::<BLOCK>();
    let (dst, dst_rest) = dst.as_chunks_mut::<BLOCK>();
    for ((codes, dst), factor) in codes.iter().zip(dst).zip(factors) {
        for (x, &code) in dst.iter_mut().zip(codes) {
            *x = element.decode::<FINITE>(code) * factor;
        }
    }
    if !codes_rest.is_empty() {
        for (x, &code) in dst_rest.iter_mut().zip(codes_rest) {
            *x = element.decode::<FINITE>(code) * factors[codes.len()];
        }
    }
}

pub(crate) struct Nvfp4Quantize<'a> {
    pub(crate) global: f32,
    pub(crate) min_scale: f32,
    pub(crate) rounding: Rounding,
    pub(crate) src: &'a [f32],
    pub(crate) scales: &'a mut [u8],
    pub(crate) codes: &'a mut [u8],
    /// Set if there is a NaN or an infinity.
    pub(crate) not_finite: &'a mut bool,
}

impl Kernel for Nvfp4Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.rounding {
            Rounding::NearestEven => self.quantize(simd, NearestEven),
            Rounding::NearestAway => self.quantize(simd, NearestAway),
            Rounding::TowardZero => self.quantize(simd, TowardZero),
            Rounding::Stochastic { seed, index } => {
                self.quantize(simd, Stochastic::new(seed, index));
            }
        }
    }
}

impl Nvfp4Quantize<'_> {
    #[inline(always)]
    fn quantize<S: Simd, R: Round>(self, simd: S, mut round: R) {
        let nvfp4 = Nvfp4Lanes::new();
        let groups = self.src.chunks(16 * GROUP).zip(self.codes.chunks_mut(16 * GROUP));
        for ((x, codes), scales) in groups.zip(self.scales.chunks_mut(GROUP)) {
            // All scales of a group first, so that they vectorize, too.
            let (blocks, rest) = x.as_chunks::<16>();
            let mut steps = [0.0; GROUP];
            for (max, x) in steps.iter_mut().zip(blocks) {
                *max = simd.abs_max(x);
            }
            if !rest.is_empty() {
                steps[blocks.len()] = simd.abs_max(rest);
            }
            let mut scale_codes = [0; GROUP];
            for (step, code) in steps.iter_mut().zip(&mut scale_codes) {
                *self.not_finite |= !step.is_finite();
                *code = nvfp4
                    .scale
                    .encode((*step / 6.0 / self.global).max(self.min_scale), &NearestEven);
                *step = nvfp4.scale.decode::<false>(*code) * self.global;
            }
            scales.copy_from_slice(&scale_codes[..scales.len()]);
            let (codes, codes_rest) = codes.as_chunks_mut::<16>();
            for ((x, codes), step) in blocks.iter().zip(codes).zip(steps) {
                divide_block(nvfp4.element, &mut round, step, x, codes);
            }
            if !rest.is_empty() {
                divide_block(nvfp4.element, &mut round, steps[blocks.len()], rest, codes_rest);
            }
        }
    }
}

#[inline(always)]
fn divide_block<R: Round>(element: Float, round: &mut R, step: f32, x: &[f32], codes: &mut [u8]) {
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = element.encode(x / step, round);
        round.next();
    }
}

#[derive(Clone, Copy)]
struct Nvfp4Lanes {
    element: Float,
    scale: Float,
}

impl Nvfp4Lanes {
    #[inline(always)]
    fn new() -> Self {
        Self { element: Float::new(Format::F4E2M1), scale: Float::new(Format::F8E4M3) }
    }
}

pub(crate) struct Nvfp4Dequantize<'a> {
    pub(crate) global: f32,
    pub(crate) scales: &'a [u8],
    pub(crate) codes: &'a [u8],
    pub(crate) dst: &'a mut [f32],
}

impl Kernel for Nvfp4Dequantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let nvfp4 = Nvfp4Lanes::new();
        let groups = self.codes.chunks(16 * GROUP).zip(self.dst.chunks_mut(16 * GROUP));
        for ((codes, dst), scales) in groups.zip(self.scales.chunks(GROUP)) {
            let mut scale_codes = [0; GROUP];
            scale_codes[..scales.len()].copy_from_slice(scales);
            let mut steps = [0.0; GROUP];
            for (step, code) in steps.iter_mut().zip(scale_codes) {
                *step = nvfp4.scale.decode::<false>(code) * self.global;
            }
            decode_blocks::<_, 16>(nvfp4.element, &steps, codes, dst);
        }
    }
}
