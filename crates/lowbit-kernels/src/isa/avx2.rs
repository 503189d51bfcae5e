//! AVX2 and FMA, with and without VNNI: 256-bit vectors, eight output features each.

use core::arch::x86_64::*;

use super::Kernel;
use crate::{
    panel::{NR, Panel},
    roofline::Peak,
    tile::{self, Int8Row, Isa},
};

pub(super) const AVX_VNNI: Kernel = Kernel {
    name: "avx_vnni",
    is_available: || (AVX2.is_available)() && is_x86_feature_detected!("avxvnni"),
    rows: 24,
    direct_rows: 4,
    task_rows: 72,
    keeps_rows: false,
    int8: int8_vnni,
    f32,
    widen,
    bf16: None,
    peak: peak_vnni,
};

pub(super) const AVX2: Kernel = Kernel {
    name: "avx2",
    is_available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
    rows: 24,
    direct_rows: 4,
    task_rows: 72,
    keeps_rows: false,
    int8,
    f32,
    widen,
    bf16: None,
    peak,
};

#[target_feature(enable = "avx2,fma,avxvnni")]
fn int8_vnni(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 6, 4, 2, 6, 2, 2, 1, 4, 8>(Avx::<true>::with_vnni(), panel, rows, out);
}

#[target_feature(enable = "avx2,fma")]
fn int8(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 4, 3, 2, 4, 2, 2, 1, 4, 8>(Avx::<false>::new(), panel, rows, out);
}

#[target_feature(enable = "avx2,fma")]
fn f32(panel: &Panel<'_>, rows: &[&[f32]], out: &mut [[f32; NR]]) {
    tile::f32::<_, 4, 2, 2, 2, 1, 4, 8>(Avx::<false>::new(), panel, rows, out);
}

#[target_feature(enable = "avx2,fma")]
fn widen(panel: &Panel<'_>, look_up: bool, to: &mut [u8]) {
    tile::widen::<_, 4, 8>(Avx::<false>::new(), panel, look_up, to);
}

#[target_feature(enable = "avx2,fma,avxvnni")]
fn peak_vnni(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Avx::<true>::with_vnni(), peak, rounds)
}

#[target_feature(enable = "avx2,fma")]
fn peak(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Avx::<false>::new(), peak, rounds)
}

#[derive(Clone, Copy)]
struct Avx<const VNNI: bool>(());

impl Avx<false> {
    /// Safe to call only where the features are on, so that a value proves they are.
    #[target_feature(enable = "avx2,fma")]
    fn new() -> Self {
        Self(())
    }
}

impl Avx<true> {
    /// As [`new`](Avx::new).
    #[target_feature(enable = "avx2,fma,avxvnni")]
    fn with_vnni() -> Self {
        Self(())
    }
}

// SAFETY (of every block below): `self` proves avx2 and fma, and avxvnni if VNNI; loads and stores
// go through references to arrays of exactly a vector's size.
impl<const VNNI: bool> Isa<8> for Avx<VNNI> {
    type I32 = __m256i;
    type F32 = __m256;
    type Levels = [__m256; 2];

    /// With VNNI, `vpdpbusd` multiplies unsigned by signed bytes and adds without an intermediate.
    ///
    /// Without, codes become signed: of `|code − 128| ≤ 128` and `|a| ≤ 127`, two products add up to at most
    /// 2·128·127 = 32512, which fits an i16. Unsigned, 2·255·127 = 64770 would not, and
    /// `vpmaddubsw` would say 32767.
    const BYTES_OFFSET: i32 = if VNNI { 0 } else { 128 };

    #[inline(always)]
    fn zero_i32(self) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn zero_f32(self) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    fn load_codes(self, codes: &[[u8; 4]; 8]) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_u8(self, x: &[u8; 8]) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_u16(self, x: &[u16; 8]) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_i32(self, x: &[i32; 8]) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; 8]) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn prefetch(self, codes: &[[u8; 4]; 8]) {
        let ahead = codes.as_ptr().wrapping_byte_add(tile::AHEAD);
        // SAFETY: see above; any address may be prefetched.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) }
    }

    #[inline(always)]
    fn store_codes(self, x: __m256i, to: &mut [[u8; 4]; 8]) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) }
    }

    #[inline(always)]
    fn store_f32(self, x: __m256, to: &mut [f32; 8]) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn splat_a(self, a: [i8; 4]) -> __m256i {
        // SAFETY: see above.
        unsafe {
            _mm256_set1_epi32(i32::from_le_bytes([a[0] as u8, a[1] as u8, a[2] as u8, a[3] as u8]))
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_set1_epi32(x) }
    }

    #[inline(always)]
    fn splat_f32(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn field<const RIGHT: u32, const LEFT: u32, const MASK: u8>(self, x: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe {
            // The counts are constants, so these become the shifts by one.
            let shifted = self.shl(self.shr(x, RIGHT), LEFT);
            _mm256_and_si256(shifted, _mm256_set1_epi8(MASK as i8))
        }
    }

    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_and_si256(a, b) }
    }

    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    fn shl(self, x: __m256i, by: u32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sll_epi32(x, _mm_cvtsi32_si128(by as i32)) }
    }

    #[inline(always)]
    fn shr(self, x: __m256i, by: u32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_srl_epi32(x, _mm_cvtsi32_si128(by as i32)) }
    }

    #[inline(always)]
    fn mul_u16(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_mullo_epi16(a, b) }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], codes: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, codes)
        }
    }

    #[inline(always)]
    fn dot_small(self, acc: __m256i, codes: __m256i, a: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, codes, a);
            }
            let pairs = _mm256_maddubs_epi16(codes, a); // at most 2·127·128 = 32512
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn dot_bytes(self, acc: __m256i, codes: __m256i, a: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, codes, a);
            }
            let w = _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN)); // code − 128
            // |w|·(sign(w)·a) = w·a. |−128| is 128 as u8, and a is never −128, so both are exact.
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn dot_bytes_by_any(self, acc: __m256i, codes: __m256i, a: __m256i) -> __m256i {
        if VNNI {
            return self.dot_bytes(acc, codes, a);
        }
        // SAFETY: see above.
        unsafe {
            let w = _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN)); // code − 128
            // Widened to 16 bits, the even bytes and the odd ones.
            let even_w = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w));
            let even_a = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(a));
            let (odd_w, odd_a) = (_mm256_srai_epi16::<8>(w), _mm256_srai_epi16::<8>(a));
            let acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even_w, even_a));
            _mm256_add_epi32(acc, _mm256_madd_epi16(odd_w, odd_a))
        }
    }

    #[inline(always)]
    fn add_i32(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    fn sub_i32(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sub_epi32(a, b) }
    }

    #[inline(always)]
    fn sub_mul(self, acc: __m256i, x: __m256i, by: i32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sub_epi32(acc, _mm256_mullo_epi32(x, _mm256_set1_epi32(by))) }
    }

    #[inline(always)]
    fn levels(self, levels: &[f32; 16]) -> [__m256; 2] {
        let (halves, _) = levels.as_chunks();
        [self.load_f32(&halves[0]), self.load_f32(&halves[1])]
    }

    #[inline(always)]
    fn level(self, levels: [__m256; 2], codes: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe {
            // The lowest three bits choose within the halves, the sign between them.
            let low = _mm256_permutevar8x32_ps(levels[0], codes);
            let high = _mm256_permutevar8x32_ps(levels[1], codes);
            _mm256_blendv_ps(low, high, self.reinterpret(_mm256_slli_epi32::<28>(codes)))
        }
    }

    #[inline(always)]
    fn reinterpret(self, x: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(x) }
    }

    #[inline(always)]
    fn to_f32(self, x: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, acc: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, acc) }
    }
}
