//! Blocks of small floats that share a scale.

use super::lanes::{Decoder, Encoder};
use super::table::abs_max;
use super::{Kernel, Simd};
use crate::block::ScaleRule;
use crate::format::{Format, Overflow};

const FRACTION: u32 = 0x7f_ffff;

/// The elements of an MX format.
pub(crate) trait Element: Copy {
    fn encode(self, x: f32) -> u8;
    fn decode(self, code: u8) -> f32;
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
    fn encode(self, x: f32) -> u8 {
        self.e.add::<true>(x.to_bits()) as u8
    }

    #[inline(always)]
    fn decode(self, code: u8) -> f32 {
        self.d.lane(code)
    }
}

/// Integers in units of 1/64, −127 … 127.
#[derive(Clone, Copy)]
pub(crate) struct Int8;

impl Element for Int8 {
    #[inline(always)]
    fn encode(self, x: f32) -> u8 {
        let x = (x * 64.0).clamp(-127.0, 127.0);
        // At 1.5·2^23 the last bit is worth 1, and the low byte is the integer in two's complement.
        (x + 12_582_912.0).to_bits() as u8
    }

    #[inline(always)]
    fn decode(self, code: u8) -> f32 {
        f32::from(code as i8) / 64.0
    }
}

/// How an MX scale follows from the maximum of a block.
#[derive(Clone, Copy)]
pub(crate) struct Scaling {
    pub(crate) rule: ScaleRule,
    /// The exponent of the largest element.
    pub(crate) max_exponent: i32,
    /// The fraction of the largest element, as f32 has it.
    pub(crate) max_fraction: u32,
    pub(crate) fraction_bits: u32,
}

impl Scaling {
    /// The exponent of the scale, from the bits of the maximum: `log2` would err next to powers of two.
    #[inline(always)]
    fn exponent(self, max: u32) -> i32 {
        let (max, up) = match self.rule {
            ScaleRule::Floor => (max, false),
            ScaleRule::Ceil => (max, max & FRACTION > 0),
            ScaleRule::Even => (max + (1 << (22 - self.fraction_bits)), false),
            ScaleRule::Rceil => (max, max & FRACTION > self.max_fraction),
        };
        ((max >> 23) as i32 - 127 - self.max_exponent + i32::from(up)).clamp(-127, 127)
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
    pub(crate) src: &'a [f32],
    pub(crate) scales: &'a mut [u8],
    pub(crate) codes: &'a mut [u8],
}

impl<E: Element> Kernel for MxQuantize<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (element, scaling) = (self.element, self.scaling);
        let block = |x: &[f32], scale: &mut u8, codes: &mut [u8]| {
            let max = abs_max(x);
            if !max.is_finite() {
                *scale = 0xff;
                codes.fill(0);
                return;
            }
            let exponent = scaling.exponent(max.to_bits());
            *scale = (exponent + 127) as u8;
            let factor = pow2(-exponent);
            for (code, &x) in codes.iter_mut().zip(x) {
                *code = element.encode(x * factor);
            }
        };
        let (x, x_rest) = self.src.as_chunks::<32>();
        let (codes, codes_rest) = self.codes.as_chunks_mut::<32>();
        let (scales, scales_rest) = self.scales.split_at_mut(x.len());
        for ((x, codes), scale) in x.iter().zip(codes).zip(scales) {
            block(x, scale, codes);
        }
        if let [scale] = scales_rest {
            block(x_rest, scale, codes_rest);
        }
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
        let element = self.element;
        let block = |codes: &[u8], scale: u8, dst: &mut [f32]| {
            let scale = if scale == 0xff { f32::NAN } else { pow2(i32::from(scale) - 127) };
            for (x, &code) in dst.iter_mut().zip(codes) {
                *x = element.decode(code) * scale;
            }
        };
        let (codes, codes_rest) = self.codes.as_chunks::<32>();
        let (dst, dst_rest) = self.dst.as_chunks_mut::<32>();
        let (scales, scales_rest) = self.scales.split_at(codes.len());
        for ((codes, dst), &scale) in codes.iter().zip(dst).zip(scales) {
            block(codes, scale, dst);
        }
        if let [scale] = scales_rest {
            block(codes_rest, *scale, dst_rest);
        }
    }
}

pub(crate) struct Nvfp4Quantize<'a> {
    pub(crate) global: f32,
    pub(crate) min_scale: f32,
    pub(crate) src: &'a [f32],
    pub(crate) scales: &'a mut [u8],
    pub(crate) codes: &'a mut [u8],
    /// Set if there is a NaN or an infinity.
    pub(crate) not_finite: &'a mut bool,
}

impl Kernel for Nvfp4Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (global, min_scale, not_finite) = (self.global, self.min_scale, self.not_finite);
        let (element, scales_format) = (Float::new(Format::F4E2M1), Float::new(Format::F8E4M3));
        let mut block = |x: &[f32], scale: &mut u8, codes: &mut [u8]| {
            let max = abs_max(x);
            *not_finite |= !max.is_finite();
            *scale = scales_format.encode((max / 6.0 / global).max(min_scale));
            let step = scales_format.decode(*scale) * global;
            for (code, &x) in codes.iter_mut().zip(x) {
                *code = element.encode(x / step);
            }
        };
        let (x, x_rest) = self.src.as_chunks::<16>();
        let (codes, codes_rest) = self.codes.as_chunks_mut::<16>();
        let (scales, scales_rest) = self.scales.split_at_mut(x.len());
        for ((x, codes), scale) in x.iter().zip(codes).zip(scales) {
            block(x, scale, codes);
        }
        if let [scale] = scales_rest {
            block(x_rest, scale, codes_rest);
        }
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
        let (element, scales_format) = (Float::new(Format::F4E2M1), Float::new(Format::F8E4M3));
        let block = |codes: &[u8], scale: u8, dst: &mut [f32]| {
            let step = scales_format.decode(scale) * self.global;
            for (x, &code) in dst.iter_mut().zip(codes) {
                *x = element.decode(code) * step;
            }
        };
        let (codes, codes_rest) = self.codes.as_chunks::<16>();
        let (dst, dst_rest) = self.dst.as_chunks_mut::<16>();
        let (scales, scales_rest) = self.scales.split_at(codes.len());
        for ((codes, dst), &scale) in codes.iter().zip(dst).zip(scales) {
            block(codes, scale, dst);
        }
        if let [scale] = scales_rest {
            block(codes_rest, *scale, dst_rest);
        }
    }
}
