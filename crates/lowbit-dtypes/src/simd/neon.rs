//! NEON, which every AArch64 has: its table look-ups.
#![allow(unsafe_code, reason = "loads and stores of intrinsics")]

use core::arch::aarch64::*;

use super::{CELL, Isa, Kernel, Search, Simd, abs_max};

impl Isa {
    #[inline(always)]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        kernel.run(Neon);
    }
}

#[derive(Clone, Copy)]
struct Neon;

/// The places of the four bytes of an f32.
const BYTES: u32 = 0x03_02_01_00;

impl Simd for Neon {
    #[inline(always)]
    fn abs_max(self, x: &[f32]) -> f32 {
        f32::from_bits(abs_max(x))
    }

    #[inline(always)]
    fn find<const N: usize>(self, search: &Search, x: &[[f32; 16]; N]) -> [[u8; 16]; N] {
        let mut codes = [[0; 16]; N];
        // SAFETY: the loads read `thresholds`, `below`, `codes` and quarters of each [f32; 16], the stores write one
        // [u8; 16]; this module is compiled only where NEON is.
        unsafe {
            let thresholds = vld1q_u8_x4(search.thresholds.as_ptr().cast());
            let below = vld1q_u8_x2(search.below.as_ptr());
            let all_codes = vld1q_u8(search.codes.as_ptr());
            let scale = vdupq_n_f32(search.cells_per_unit);
            for (codes, x) in codes.iter_mut().zip(x) {
                let mut ranks = [vdupq_n_u32(0); 4];
                for (rank, x) in ranks.iter_mut().zip(x.as_chunks::<4>().0) {
                    let x = vld1q_f32(x.as_ptr());
                    let cell = vfmaq_f32(vdupq_n_f32(CELL), x, scale);
                    // The bytes of a cell are 4b 40 00 and its number: two find nothing, one the 0 below the first cell.
                    *rank = vreinterpretq_u32_u8(vqtbl2q_u8(below, vreinterpretq_u8_f32(cell)));
                    for _ in 0..search.steps {
                        let places = vmlaq_n_u32(vdupq_n_u32(BYTES), *rank, 0x0404_0404);
                        let threshold = vqtbl4q_u8(thresholds, vreinterpretq_u8_u32(places));
                        // 0 or -1
                        let above = vcgtq_f32(x, vreinterpretq_f32_u8(threshold));
                        *rank = vsubq_u32(*rank, above);
                    }
                }
                // The low bytes are those at even places of those at even places.
                let [a, b, c, d] = ranks;
                let ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
                let cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
                let ranks = vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
                vst1q_u8(codes.as_mut_ptr(), vqtbl1q_u8(all_codes, ranks));
            }
        }
        codes
    }

    #[inline(always)]
    fn entry(self, entries: &[f32; 16], indices: &[u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: the loads read `entries` and `indices`, the stores write quarters of `out`; this module is compiled only
        // where NEON is.
        unsafe {
            let entries = vld1q_u8_x4(entries.as_ptr().cast());
            let indices = vandq_u8(vld1q_u8(indices.as_ptr()), vdupq_n_u8(15));
            let bytes = vreinterpretq_u8_u32(vdupq_n_u32(BYTES));
            // Every index four times: 0 0 0 0 1 1 1 1 …, then those four further on.
            let mut copies = vreinterpretq_u8_u32(vld1q_u32(
                [0, 0x0101_0101, 0x0202_0202, 0x0303_0303].as_ptr(),
            ));
            for out in out.as_chunks_mut::<4>().0 {
                let places = vaddq_u8(vshlq_n_u8::<2>(vqtbl1q_u8(indices, copies)), bytes);
                vst1q_f32(out.as_mut_ptr(), vreinterpretq_f32_u8(vqtbl4q_u8(entries, places)));
                copies = vaddq_u8(copies, vdupq_n_u8(4));
            }
        }
        out
    }
}
