//! AVX2 and AVX-512: calling what was compiled for them, and their table look-ups.
#![allow(unsafe_code, reason = "instruction sets are found at run time; look-ups are intrinsics")]

use core::arch::x86_64::*;
use std::is_x86_feature_detected as has;

use super::{CELL, Isa, Kernel, Kind, MAGNITUDE, Plain, Search, Simd, abs_max};

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
    fn find<const N: usize>(self, search: &Search, x: &[[f32; 16]; N]) -> [[u8; 16]; N] {
        let mut codes = [[0; 16]; N];
        // SAFETY: self proves AVX-512; each load reads one [f32; 16], one [u8; 16] or a half
        // of `below`, each store writes one [u8; 16].
        unsafe {
            let below = search.below.as_ptr();
            let below_low = _mm512_cvtepu8_epi32(_mm_loadu_si128(below.cast()));
            let below_high = _mm512_cvtepu8_epi32(_mm_loadu_si128(below.add(16).cast()));
            let thresholds = _mm512_loadu_ps(search.thresholds.as_ptr());
            let all_codes = _mm_loadu_si128(search.codes.as_ptr().cast());
            let scale = _mm512_set1_ps(search.cells_per_unit);
            for (codes, x) in codes.iter_mut().zip(x) {
                let x = _mm512_loadu_ps(x.as_ptr());
                // Permutations take the low five bits here, the low four below.
                let cell = _mm512_castps_si512(_mm512_fmadd_ps(x, scale, _mm512_set1_ps(CELL)));
                let mut rank = _mm512_permutex2var_epi32(below_low, cell, below_high);
                for _ in 0..search.steps {
                    let threshold = _mm512_permutexvar_ps(rank, thresholds);
                    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, threshold);
                    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
                }
                let found = _mm_shuffle_epi8(all_codes, _mm512_cvtepi32_epi8(rank));
                _mm_storeu_si128(codes.as_mut_ptr().cast(), found);
            }
        }
        codes
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
    fn find<const N: usize>(self, search: &Search, x: &[[f32; 16]; N]) -> [[u8; 16]; N] {
        let mut codes = [[0; 16]; N];
        // SAFETY: self proves AVX2; the loads read `below`, `codes` and both halves of `thresholds` and of each [f32; 16], the
        // stores write one [u8; 16].
        unsafe {
            let below = _mm256_loadu_si256(search.below.as_ptr().cast());
            let below_low = _mm256_permute2x128_si256::<0x00>(below, below);
            let below_high = _mm256_permute2x128_si256::<0x11>(below, below);
            let low = _mm256_loadu_ps(search.thresholds.as_ptr());
            let high = _mm256_loadu_ps(search.thresholds.as_ptr().add(8));
            let all_codes = _mm_loadu_si128(search.codes.as_ptr().cast());
            let scale = _mm256_set1_ps(search.cells_per_unit);
            for (codes, x) in codes.iter_mut().zip(x) {
                let mut halves = [_mm256_setzero_si256(); 2];
                for (rank, x) in halves.iter_mut().zip(x.as_chunks::<8>().0) {
                    let x = _mm256_loadu_ps(x.as_ptr());
                    let cell = _mm256_fmadd_ps(x, scale, _mm256_set1_ps(CELL));
                    // Only the low byte chooses; bytes with the top bit set look up 0.
                    let cell = _mm256_or_si256(
                        _mm256_castps_si256(cell),
                        _mm256_set1_epi32(0x8080_8000_u32 as i32),
                    );
                    *rank = _mm256_blendv_epi8(
                        _mm256_shuffle_epi8(below_low, cell),
                        _mm256_shuffle_epi8(below_high, cell),
                        _mm256_slli_epi16::<3>(cell),
                    );
                    for _ in 0..search.steps {
                        // vpermps takes the low three bits; the fourth, moved to the sign, chooses the half.
                        let threshold = _mm256_blendv_ps(
                            _mm256_permutevar8x32_ps(low, *rank),
                            _mm256_permutevar8x32_ps(high, *rank),
                            _mm256_castsi256_ps(_mm256_slli_epi32::<28>(*rank)),
                        );
                        // 0 or -1
                        let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, threshold));
                        *rank = _mm256_sub_epi32(*rank, above);
                    }
                }
                // Packing works in 128-bit halves: 0..4 8..12 | 4..8 12..16, put in order before the last step.
                let words = _mm256_packus_epi32(halves[0], halves[1]);
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                let (first, second) =
                    (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                let found = _mm_shuffle_epi8(all_codes, _mm_packus_epi16(first, second));
                _mm_storeu_si128(codes.as_mut_ptr().cast(), found);
            }
        }
        codes
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
