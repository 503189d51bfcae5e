//! NEON, alone, with sdot and with usdot: 128-bit vectors, four output features each.

use core::arch::{aarch64::*, asm};
use std::arch::is_aarch64_feature_detected;

use super::Kernel;
use crate::{
    panel::{NR, Panel},
    roofline::Peak,
    tile::{self, Int8Row, Isa},
};

pub(super) const I8MM: Kernel = Kernel {
    name: "neon_i8mm",
    is_available: || (NEON.is_available)() && is_aarch64_feature_detected!("i8mm"),
    rows: 24,
    direct_rows: 4,
    task_rows: 72,
    keeps_rows: false,
    int8: int8_i8mm,
    f32,
    widen,
    bf16: None,
    peak: peak_i8mm,
};

pub(super) const DOTPROD: Kernel = Kernel {
    name: "neon_dotprod",
    is_available: || (NEON.is_available)() && is_aarch64_feature_detected!("dotprod"),
    rows: 24,
    direct_rows: 4,
    task_rows: 72,
    keeps_rows: false,
    int8: int8_dotprod,
    f32,
    widen,
    bf16: None,
    peak: peak_dotprod,
};

pub(super) const NEON: Kernel = Kernel {
    name: "neon",
    is_available: || is_aarch64_feature_detected!("neon"),
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

// Of 32 registers a tile takes 16 for sums, 8 where each product needs some of its own. For int8, 4 by
// 4 vectors leave room for 8 of codes; for f32, 8 by 2 share the work of a level among more rows.

#[target_feature(enable = "neon,i8mm")]
fn int8_i8mm(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 4, 3, 2, 4, 2, 4, 1, 8, 4>(Neon::<USDOT>::with_i8mm(), panel, rows, out);
}

#[target_feature(enable = "neon,dotprod")]
fn int8_dotprod(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 4, 3, 2, 4, 2, 4, 1, 8, 4>(Neon::<SDOT>::with_dotprod(), panel, rows, out);
}

#[target_feature(enable = "neon")]
fn int8(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    tile::int8::<_, 4, 3, 2, 4, 4, 2, 1, 8, 4>(Neon::<SMULL>::new(), panel, rows, out);
}

#[target_feature(enable = "neon")]
fn f32(panel: &Panel<'_>, rows: &[&[f32]], out: &mut [[f32; NR]]) {
    tile::f32::<_, 8, 4, 4, 2, 1, 8, 4>(Neon::<SMULL>::new(), panel, rows, out);
}

#[target_feature(enable = "neon")]
fn widen(panel: &Panel<'_>, look_up: bool, to: &mut [u8]) {
    tile::widen::<_, 8, 4>(Neon::<SMULL>::new(), panel, look_up, to);
}

#[target_feature(enable = "neon,i8mm")]
fn peak_i8mm(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Neon::<USDOT>::with_i8mm(), peak, rounds)
}

#[target_feature(enable = "neon,dotprod")]
fn peak_dotprod(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Neon::<SDOT>::with_dotprod(), peak, rounds)
}

#[target_feature(enable = "neon")]
fn peak(peak: Peak, rounds: u64) -> f64 {
    tile::peak(Neon::<SMULL>::new(), peak, rounds)
}

/// What multiplies bytes.
const SMULL: u8 = 0;
const SDOT: u8 = 1;
const USDOT: u8 = 2;

#[derive(Clone, Copy)]
struct Neon<const DOT: u8>(());

impl Neon<SMULL> {
    /// Safe to call only where the features are on, so that a value proves they are.
    #[target_feature(enable = "neon")]
    fn new() -> Self {
        Self(())
    }
}

impl Neon<SDOT> {
    /// As [`new`](Neon::new).
    #[target_feature(enable = "neon,dotprod")]
    fn with_dotprod() -> Self {
        Self(())
    }
}

impl Neon<USDOT> {
    /// As [`new`](Neon::new).
    #[target_feature(enable = "neon,i8mm")]
    fn with_i8mm() -> Self {
        Self(())
    }
}

// The intrinsics for these two are not stable yet.

/// `acc + Σ_{i<4} w_i·a_i` in every lane, both signed.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
    // SAFETY: the instruction is on here, and touches nothing but these registers.
    unsafe {
        asm!("sdot {acc:v}.4s, {w:v}.16b, {a:v}.16b",
            acc = inout(vreg) acc, w = in(vreg) w, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc + Σ_{i<4} code_i·a_i` in every lane, codes unsigned and activations signed.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot(mut acc: int32x4_t, codes: int32x4_t, a: int32x4_t) -> int32x4_t {
    // SAFETY: as in `sdot`.
    unsafe {
        asm!("usdot {acc:v}.4s, {codes:v}.16b, {a:v}.16b",
            acc = inout(vreg) acc, codes = in(vreg) codes, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `code − 128` of every byte, signed.
#[inline]
#[target_feature(enable = "neon")]
fn less_128(codes: int32x4_t) -> int32x4_t {
    vreinterpretq_s32_s8(veorq_s8(vreinterpretq_s8_s32(codes), vdupq_n_s8(i8::MIN)))
}

/// As [`sdot`], where no `a` is −128 (or no code above 127): two products add up to at most
/// 2·128·127 = 32512, which fits an i16.
#[inline]
#[target_feature(enable = "neon")]
fn smull(acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
    let (w, a) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
    let (low, high) = (vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a));
    vpadalq_s16(acc, vpaddq_s16(low, high))
}

/// As [`sdot`]: products are added in 32 bits.
#[inline]
#[target_feature(enable = "neon")]
fn smull_by_any(acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
    let (w, a) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
    let (low, high) = (vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a));
    vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
}

// SAFETY (of every block below): `self` proves neon, and dotprod or i8mm if DOT is SDOT or USDOT;
// loads and stores go through references to arrays of exactly a vector's size.
impl<const DOT: u8> Isa<4> for Neon<DOT> {
    type I32 = int32x4_t;
    type F32 = float32x4_t;
    type Levels = uint8x16x4_t;

    /// `usdot` multiplies unsigned by signed bytes; for the others, codes become signed.
    const BYTES_OFFSET: i32 = if DOT == USDOT { 0 } else { 128 };

    #[inline(always)]
    fn zero_i32(self) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vdupq_n_s32(0) }
    }

    #[inline(always)]
    fn zero_f32(self) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    fn load_codes(self, codes: &[[u8; 4]; 4]) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vreinterpretq_s32_u8(vld1q_u8(codes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_u8(self, x: &[u8; 4]) -> int32x4_t {
        // SAFETY: see above.
        unsafe {
            let x = vreinterpret_u8_u32(vdup_n_u32(u32::from_le_bytes(*x)));
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))))
        }
    }

    #[inline(always)]
    fn load_u16(self, x: &[u16; 4]) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vreinterpretq_s32_u32(vmovl_u16(vld1_u16(x.as_ptr()))) }
    }

    #[inline(always)]
    fn load_i32(self, x: &[i32; 4]) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vld1q_s32(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; 4]) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vld1q_f32(x.as_ptr()) }
    }

    #[inline(always)]
    fn store_codes(self, x: int32x4_t, to: &mut [[u8; 4]; 4]) {
        // SAFETY: see above.
        unsafe { vst1q_u8(to.as_mut_ptr().cast(), vreinterpretq_u8_s32(x)) }
    }

    #[inline(always)]
    fn store_f32(self, x: float32x4_t, to: &mut [f32; 4]) {
        // SAFETY: see above.
        unsafe { vst1q_f32(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn splat_a(self, a: [i8; 4]) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vdupq_n_s32(i32::from_le_bytes([a[0] as u8, a[1] as u8, a[2] as u8, a[3] as u8])) }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vdupq_n_s32(x) }
    }

    #[inline(always)]
    fn splat_f32(self, x: f32) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    fn field<const RIGHT: u32, const LEFT: u32, const MASK: u8>(self, x: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe {
            // Of bytes; to the left, then as far as the count says, which may be negative.
            let by = vdupq_n_s8(LEFT as i8 - RIGHT as i8);
            let shifted = vshlq_u8(vreinterpretq_u8_s32(x), by);
            vreinterpretq_s32_u8(vandq_u8(shifted, vdupq_n_u8(MASK)))
        }
    }

    #[inline(always)]
    fn and(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vandq_s32(a, b) }
    }

    #[inline(always)]
    fn or(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vorrq_s32(a, b) }
    }

    #[inline(always)]
    fn shl(self, x: int32x4_t, by: u32) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vshlq_s32(x, vdupq_n_s32(by as i32)) }
    }

    #[inline(always)]
    fn shr(self, x: int32x4_t, by: u32) -> int32x4_t {
        // SAFETY: see above.
        unsafe {
            let shifted = vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-(by as i32)));
            vreinterpretq_s32_u32(shifted)
        }
    }

    #[inline(always)]
    fn mul_u16(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe {
            let product = vmulq_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
            vreinterpretq_s32_u16(product)
        }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], codes: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(codes)))
        }
    }

    #[inline(always)]
    fn dot_small(self, acc: int32x4_t, codes: int32x4_t, a: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe {
            match DOT {
                USDOT => usdot(acc, codes, a),
                SDOT => sdot(acc, codes, a),
                _ => smull(acc, codes, a),
            }
        }
    }

    #[inline(always)]
    fn dot_bytes(self, acc: int32x4_t, codes: int32x4_t, a: int32x4_t) -> int32x4_t {
        if DOT == USDOT {
            return self.dot_small(acc, codes, a);
        }
        // SAFETY: see above.
        let w = unsafe { less_128(codes) };
        self.dot_small(acc, w, a)
    }

    #[inline(always)]
    fn dot_bytes_by_any(self, acc: int32x4_t, codes: int32x4_t, a: int32x4_t) -> int32x4_t {
        if DOT != SMULL {
            return self.dot_bytes(acc, codes, a);
        }
        // SAFETY: see above.
        unsafe { smull_by_any(acc, less_128(codes), a) }
    }

    #[inline(always)]
    fn add_i32(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vaddq_s32(a, b) }
    }

    #[inline(always)]
    fn sub_i32(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vsubq_s32(a, b) }
    }

    #[inline(always)]
    fn sub_mul(self, acc: int32x4_t, x: int32x4_t, by: i32) -> int32x4_t {
        // SAFETY: see above.
        unsafe { vmlsq_s32(acc, x, vdupq_n_s32(by)) }
    }

    #[inline(always)]
    fn levels(self, levels: &[f32; 16]) -> uint8x16x4_t {
        // SAFETY: see above; sixteen numbers are four vectors.
        unsafe { vld1q_u8_x4(levels.as_ptr().cast()) }
    }

    #[inline(always)]
    fn level(self, levels: uint8x16x4_t, codes: int32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe {
            // The bytes of number c are 4c, 4c + 1, …
            let codes = vandq_s32(codes, vdupq_n_s32(15));
            let bytes = vmlaq_s32(vdupq_n_s32(0x0302_0100), codes, vdupq_n_s32(0x0404_0404));
            let bytes = vreinterpretq_u8_s32(bytes);
            vreinterpretq_f32_u8(vqtbl4q_u8(levels, bytes))
        }
    }

    #[inline(always)]
    fn reinterpret(self, x: int32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vreinterpretq_f32_s32(x) }
    }

    #[inline(always)]
    fn to_f32(self, x: int32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vcvtq_f32_s32(x) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, acc: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vfmaq_f32(acc, a, b) }
    }
}
