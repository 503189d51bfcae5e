//! AVX2 and AVX-512: calling what was compiled for them, and their table look-ups.
#![allow(unsafe_code, reason = "instruction sets are found at run time; look-ups are intrinsics")]

use core::arch::x86_64::*;
use std::is_x86_feature_detected as has;

use super::{Isa, Kernel, Kind, MAGNITUDE, Plain, Simd, Tree, abs_max};

impl Isa {
    pub(super) fn has_avx2() -> bool {
        has!("avx2") && has!("fma") && has!("f16c")
    }

    pub(super) fn has_avx512() -> bool {
        Self::has_avx2()
            && has!("avx512f")
            && has!("avx512bw")
            && has!("avx512dq")
            && has!("avx512vl")
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            Kind::Baseline => kernel.run(Plain),
            // SAFETY: an Isa of this kind exists only where `has_avx2` was true.
            Kind::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: an Isa of this kind exists only where `has_avx512` was true.
            Kind::Avx512 => unsafe { avx512(kernel) },
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// Made only in [`avx2`], so whoever holds one may use AVX2.
#[derive(Clone, Copy)]
struct Avx2(());

/// Made only in [`avx512`], so whoever holds one may use AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
struct Avx512(());

impl Simd for Avx512 {
    #[inline(always)]
    fn abs_max(self, x: &[f32]) -> f32 {
        let (chunks, rest) = x.as_chunks::<16>();
        // SAFETY: self proves AVX-512; each load reads one [f32; 16].
        let max = unsafe {
            let mut max = _mm512_setzero_si512();
            for x in chunks {
                let bits = _mm512_loadu_si512(x.as_ptr().cast());
                let magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(MAGNITUDE as i32));
                max = _mm512_max_epu32(max, magnitude);
            }
            _mm512_reduce_max_epu32(max)
        };
        f32::from_bits(max.max(abs_max(rest)))
    }

    #[inline(always)]
    fn rank<const N: usize>(self, tree: &Tree, x: &[[f32; 16]; N]) -> [[u8; 16]; N] {
        let mut ranks = [[0; 16]; N];
        // SAFETY: self proves AVX-512; every load reads one [f32; 16], each store writes one [u8; 16].
        unsafe {
            let mut paths = [_mm512_setzero_si512(); N];
            for thresholds in &tree.0 {
                let thresholds = _mm512_loadu_ps(thresholds.as_ptr());
                for (path, x) in paths.iter_mut().zip(x) {
                    let threshold = _mm512_permutexvar_ps(*path, thresholds);
                    let above =
                        _mm512_cmp_ps_mask::<_CMP_GT_OQ>(_mm512_loadu_ps(x.as_ptr()), threshold);
                    *path = _mm512_add_epi32(*path, *path);
                    *path = _mm512_mask_add_epi32(*path, above, *path, _mm512_set1_epi32(1));
                }
            }
            for (ranks, path) in ranks.iter_mut().zip(paths) {
                _mm_storeu_si128(ranks.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(path));
            }
        }
        ranks
    }

    #[inline(always)]
    fn entry(self, entries: &[f32; 16], indices: &[u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: self proves AVX-512; the loads read one [u8; 16] and one [f32; 16], the store writes one [f32; 16].
        unsafe {
            let indices = _mm512_cvtepu8_epi32(_mm_loadu_si128(indices.as_ptr().cast()));
            // vpermps takes the low four bits.
            let entries = _mm512_permutexvar_ps(indices, _mm512_loadu_ps(entries.as_ptr()));
            _mm512_storeu_ps(out.as_mut_ptr(), entries);
        }
        out
    }
}

impl Simd for Avx2 {
    #[inline(always)]
    fn abs_max(self, x: &[f32]) -> f32 {
        let (chunks, rest) = x.as_chunks::<8>();
        // SAFETY: self proves AVX2; each load reads one [f32; 8].
        let max = unsafe {
            let mut max = _mm256_setzero_si256();
            for x in chunks {
                let bits = _mm256_loadu_si256(x.as_ptr().cast());
                let magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(MAGNITUDE as i32));
                max = _mm256_max_epu32(max, magnitude);
            }
            // Halves, then pairs, then neighbours.
            let max =
                _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
            let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
            let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
            _mm_cvtsi128_si32(max) as u32
        };
        f32::from_bits(max.max(abs_max(rest)))
    }

    #[inline(always)]
    fn rank<const N: usize>(self, tree: &Tree, x: &[[f32; 16]; N]) -> [[u8; 16]; N] {
        let mut ranks = [[0; 16]; N];
        for (ranks, x) in ranks.iter_mut().zip(x) {
            // SAFETY: self proves AVX2; the loads read 8 floats of a half of x, or the first 8 of a level, which are all
            // that the level has; the store writes one [u8; 16].
            unsafe {
                let x = [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))];
                let mut paths = [_mm256_setzero_si256(); 2];
                for thresholds in &tree.0 {
                    let thresholds = _mm256_loadu_ps(thresholds.as_ptr());
                    for (path, x) in paths.iter_mut().zip(x) {
                        let threshold = _mm256_permutevar8x32_ps(thresholds, *path);
                        // 0 or -1
                        let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, threshold));
                        *path = _mm256_sub_epi32(_mm256_add_epi32(*path, *path), above);
                    }
                }
                // Packing works in 128-bit halves: 0..4 8..12 | 4..8 12..16, put in order before the last step.
                let words = _mm256_packus_epi32(paths[0], paths[1]);
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                let (low, high) =
                    (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                _mm_storeu_si128(ranks.as_mut_ptr().cast(), _mm_packus_epi16(low, high));
            }
        }
        ranks
    }

    #[inline(always)]
    fn entry(self, entries: &[f32; 16], indices: &[u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: self proves AVX2; the loads read both halves of `entries` and both of `indices`, the stores write both
        // halves of `out`.
        unsafe {
            let low = _mm256_loadu_ps(entries.as_ptr());
            let high = _mm256_loadu_ps(entries.as_ptr().add(8));
            for half in [0, 8] {
                let indices = _mm_loadl_epi64(indices.as_ptr().add(half).cast());
                let indices = _mm256_cvtepu8_epi32(indices);
                // vpermps takes the low three bits; the fourth, moved to the sign, chooses the half.
                let entries = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, indices),
                    _mm256_permutevar8x32_ps(high, indices),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices)),
                );
                _mm256_storeu_ps(out.as_mut_ptr().add(half), entries);
            }
        }
        out
    }
}
