//! AVX-512 with VNNI: 512-bit vectors, sixteen output features each.

use core::arch::x86_64::*;

use super::Kernel;
use crate::{
    roofline::Peak,
    tile::{self, Int8Row, Isa, NR, Panel},
};

pub(super) const KERNEL: Kernel = Kernel {
    name: "avx512_vnni",
    is_available: || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
    },
    rows: 24,
    task_rows: 72,
    keeps_rows: false,
    int8,
    f32,
    peak,
};

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn int8(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 12, 8, 4, 1, 2, 2, 16>(Avx512Vnni::new(), panel, rows, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn f32(panel: &Panel<'_>, rows: &[&[f32]], out: &mut [[f32; NR]]) {
    tile::f32::<_, 12, 8, 4, 1, 2, 2, 16>(Avx512Vnni::new(), panel, rows, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn peak(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Avx512Vnni::new(), peak, rounds)
}

#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni(());

impl Avx512Vnni {
    /// Safe to call only where the features are on, so that a value proves they are.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn new() -> Self {
        Self(())
    }
}

// SAFETY (of every block below): `self` proves the features; loads and stores go through
// references to arrays of exactly a vector's size.
impl Isa<16> for Avx512Vnni {
    type I32 = __m512i;
    type F32 = __m512;

    /// `vpdpbusd` multiplies unsigned by signed bytes and adds without an intermediate.
    const BYTES_OFFSET: i32 = 0;

    #[inline(always)]
    fn zero_i32(self) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn zero_f32(self) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn load_codes(self, codes: &[[u8; 4]; 16]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_zeros(self, zeros: &[u8; 16], offset: i32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().cast()));
            _mm512_sub_epi32(zeros, _mm512_set1_epi32(offset))
        }
    }

    #[inline(always)]
    fn load_i32(self, x: &[i32; 16]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; 16]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store_f32(self, x: __m512, to: &mut [f32; 16]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn splat_a(self, a: [i8; 4]) -> __m512i {
        // SAFETY: see above.
        unsafe {
            _mm512_set1_epi32(i32::from_le_bytes([a[0] as u8, a[1] as u8, a[2] as u8, a[3] as u8]))
        }
    }

    #[inline(always)]
    fn splat_f32(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn nibbles(self, codes: __m512i) -> (__m512i, __m512i) {
        // SAFETY: see above.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            (_mm512_and_si512(codes, mask), _mm512_and_si512(_mm512_srli_epi32::<4>(codes), mask))
        }
    }

    #[inline(always)]
    fn dot_nibbles(self, acc: __m512i, codes: __m512i, a: __m512i) -> __m512i {
        self.dot_bytes(acc, codes, a)
    }

    #[inline(always)]
    fn dot_bytes(self, acc: __m512i, codes: __m512i, a: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(acc, codes, a) }
    }

    #[inline(always)]
    fn sub_mul(self, acc: __m512i, x: __m512i, by: i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(acc, _mm512_mullo_epi32(x, _mm512_set1_epi32(by))) }
    }

    #[inline(always)]
    fn level<const SHIFT: u32, const MASK: i32>(self, codes: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm512_srl_epi32(codes, _mm_cvtsi32_si128(SHIFT as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(MASK)))
        }
    }

    #[inline(always)]
    fn to_f32(self, x: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn reinterpret(self, x: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, acc) }
    }
}
