//! AVX-512 with VNNI: 512-bit vectors, sixteen output features each.

use core::{arch::x86_64::*, mem::transmute};

use super::{Bf16Kernel, Kernel};
use crate::{
    bf16::{self, Bf16, Numbers},
    panel::{NR, Panel},
    roofline::Peak,
    tile::{self, Int8Row, Isa},
};

pub(super) const KERNEL: Kernel = Kernel {
    name: "avx512_vnni",
    is_available: || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
    },
    rows: 24,
    direct_rows: 32,
    task_rows: 72,
    keeps_rows: false,
    int8,
    f32,
    widen,
    bf16: None,
    peak,
};

/// The same, and bfloat16.
pub(super) const BF16: Kernel = Kernel {
    name: "avx512_bf16",
    is_available: || (KERNEL.is_available)() && is_x86_feature_detected!("avx512bf16"),
    bf16: Some(Bf16Kernel { product: bf16_product, widen: bf16_widen }),
    ..KERNEL
};

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn int8(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 12, 8, 4, 6, 1, 2, 1, 2, 16>(Avx512::<false>::new(), panel, rows, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn f32(panel: &Panel<'_>, rows: &[&[f32]], out: &mut [[f32; NR]]) {
    tile::f32::<_, 12, 4, 1, 2, 1, 2, 16>(Avx512::<false>::new(), panel, rows, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn widen(panel: &Panel<'_>, look_up: bool, to: &mut [u8]) {
    tile::widen::<_, 2, 16>(Avx512::<false>::new(), panel, look_up, to);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16")]
fn bf16_product(panel: &Panel<'_>, numbers: &Numbers, rows: &[&[i32]], out: &mut [[f32; NR]]) {
    bf16::product::<_, 12, 8, 4, 6, 2, 16>(Avx512::with_bf16(), panel, numbers, rows, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16")]
fn bf16_widen(panel: &Panel<'_>, numbers: &Numbers, to: &mut [u8]) {
    bf16::widen::<_, 2, 16>(Avx512::with_bf16(), panel, numbers, to);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn peak(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Avx512::<false>::new(), peak, rounds)
}

#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(());

impl Avx512<false> {
    /// Safe to call only where the features are on, so that a value proves they are.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn new() -> Self {
        Self(())
    }
}

impl Avx512<true> {
    /// As [`new`](Avx512::new).
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16")]
    fn with_bf16() -> Self {
        Self(())
    }
}

// SAFETY (of every block below): `self` proves the features; loads and stores go through
// references to arrays of exactly a vector's size.
impl<const BF16: bool> Isa<16> for Avx512<BF16> {
    type I32 = __m512i;
    type F32 = __m512;
    type Levels = __m512;

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
    fn load_u8(self, x: &[u8; 16]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_u16(self, x: &[u16; 16]) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; 16]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
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
    fn prefetch(self, codes: &[[u8; 4]; 16]) {
        let ahead = codes.as_ptr().wrapping_byte_add(tile::AHEAD);
        // SAFETY: see above; any address may be prefetched.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) }
    }

    #[inline(always)]
    fn store_codes(self, x: __m512i, to: &mut [[u8; 4]; 16]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) }
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
    fn splat_i32(self, x: i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn splat_f32(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn field<const RIGHT: u32, const LEFT: u32, const MASK: u8>(self, x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm512_slli_epi32::<LEFT>(_mm512_srli_epi32::<RIGHT>(x));
            _mm512_and_si512(shifted, _mm512_set1_epi8(MASK as i8))
        }
    }

    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn shl(self, x: __m512i, by: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sll_epi32(x, _mm_cvtsi32_si128(by as i32)) }
    }

    #[inline(always)]
    fn shr(self, x: __m512i, by: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_srl_epi32(x, _mm_cvtsi32_si128(by as i32)) }
    }

    #[inline(always)]
    fn mul_u16(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_mullo_epi16(a, b) }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], codes: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, codes)
        }
    }

    #[inline(always)]
    fn dot_small(self, acc: __m512i, codes: __m512i, a: __m512i) -> __m512i {
        self.dot_bytes(acc, codes, a)
    }

    #[inline(always)]
    fn dot_bytes(self, acc: __m512i, codes: __m512i, a: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(acc, codes, a) }
    }

    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(a, b) }
    }

    #[inline(always)]
    fn sub_mul(self, acc: __m512i, x: __m512i, by: i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(acc, _mm512_mullo_epi32(x, _mm512_set1_epi32(by))) }
    }

    #[inline(always)]
    fn levels(self, levels: &[f32; 16]) -> __m512 {
        self.load_f32(levels)
    }

    #[inline(always)]
    fn level(self, levels: __m512, codes: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_permutexvar_ps(codes, levels) }
    }

    #[inline(always)]
    fn reinterpret(self, x: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(x) }
    }

    #[inline(always)]
    fn to_f32(self, x: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(x) }
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

/// Two bytes of every lane as the low bytes of its halves: the first two, and the last two.
#[inline(always)]
fn halves(_: Avx512<true>, codes: __m512i) -> [__m512i; 2] {
    // SAFETY: see above.
    unsafe {
        let first = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
        let last = _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
        [
            _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(first)),
            _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(last)),
        ]
    }
}

impl Bf16<16> for Avx512<true> {
    type Few = __m512i;
    type Many = [__m512i; 4];

    #[inline(always)]
    fn few(self, numbers: &Numbers) -> __m512i {
        self.many(numbers)[0]
    }

    #[inline(always)]
    fn many(self, numbers: &Numbers) -> [__m512i; 4] {
        let parts: &[[u16; 32]; 4] = bytemuck::cast_ref(numbers);
        // SAFETY: see above.
        unsafe {
            [
                _mm512_loadu_si512(parts[0].as_ptr().cast()),
                _mm512_loadu_si512(parts[1].as_ptr().cast()),
                _mm512_loadu_si512(parts[2].as_ptr().cast()),
                _mm512_loadu_si512(parts[3].as_ptr().cast()),
            ]
        }
    }

    #[inline(always)]
    fn choose_few(self, numbers: __m512i, codes: __m512i) -> [__m512i; 2] {
        let [first, last] = halves(self, codes);
        // SAFETY: see above.
        unsafe {
            [_mm512_permutexvar_epi16(first, numbers), _mm512_permutexvar_epi16(last, numbers)]
        }
    }

    #[inline(always)]
    fn choose_many(self, numbers: [__m512i; 4], codes: __m512i) -> [__m512i; 2] {
        let [first, last] = halves(self, codes);
        [choose(self, numbers, first), choose(self, numbers, last)]
    }

    #[inline(always)]
    fn bits(self, x: __m512) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_castps_si512(x) }
    }

    #[inline(always)]
    fn dot_bf16(self, acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        // SAFETY: see above; the vectors have the same size, and every bit pattern is a value.
        unsafe {
            let (w, x) = (transmute::<__m512i, __m512bh>(w), transmute::<__m512i, __m512bh>(x));
            _mm512_dpbf16_ps(acc, w, x)
        }
    }
}

/// The number that the lowest seven bits of each half choose, with bit 7 as its sign.
#[inline(always)]
fn choose(_: Avx512<true>, numbers: [__m512i; 4], codes: __m512i) -> __m512i {
    // SAFETY: see above.
    unsafe {
        let low = _mm512_permutex2var_epi16(numbers[0], codes, numbers[1]);
        let high = _mm512_permutex2var_epi16(numbers[2], codes, numbers[3]);
        let is_high = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
        let sign = _mm512_and_si512(_mm512_slli_epi16::<8>(codes), _mm512_set1_epi16(i16::MIN));
        _mm512_or_si512(_mm512_mask_blend_epi16(is_high, low, high), sign)
    }
}
