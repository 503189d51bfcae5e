//! Blocks of ggml to f32, with the operations and the order of ggml's own decoders.
//!
//! Element `j` of a half, quarter … is drawn where it is read; `d` is a scale, `m` a minimum. See ggml
//! `src/ggml-quants.c` and `src/ggml-common.h` for the layouts.

use half::f16;
use lowbit_dtypes::{F8E4M3, Format, Table16};
use pulp::{Arch, Simd, WithSimd};

use super::GgmlType;

/// Decodes whole blocks of `bytes` to `to`. `None` if this crate has no decoder for the type; nothing
/// is written then.
pub(crate) fn decode(dtype: GgmlType, bytes: &[u8], to: &mut [f32]) -> Option<()> {
    match dtype {
        GgmlType::Q4_0 => run::<Q4_0, 18, 32>(bytes, to),
        GgmlType::Q4_1 => run::<Q4_1, 20, 32>(bytes, to),
        GgmlType::Q5_0 => run::<Q5_0, 22, 32>(bytes, to),
        GgmlType::Q5_1 => run::<Q5_1, 24, 32>(bytes, to),
        GgmlType::Q8_0 => run::<Q8_0, 34, 32>(bytes, to),
        GgmlType::Q2_K => run::<Q2_K, 84, 256>(bytes, to),
        GgmlType::Q3_K => run::<Q3_K, 110, 256>(bytes, to),
        GgmlType::Q4_K => run::<Q4_K, 144, 256>(bytes, to),
        GgmlType::Q5_K => run::<Q5_K, 176, 256>(bytes, to),
        GgmlType::Q6_K => run::<Q6_K, 210, 256>(bytes, to),
        GgmlType::Q8_K => run::<Q8_K, 292, 256>(bytes, to),
        GgmlType::IQ4_NL => run::<IQ4_NL, 18, 32>(bytes, to),
        GgmlType::IQ4_XS => run::<IQ4_XS, 136, 256>(bytes, to),
        GgmlType::TQ1_0 => run::<TQ1_0, 54, 256>(bytes, to),
        GgmlType::TQ2_0 => run::<TQ2_0, 66, 256>(bytes, to),
        GgmlType::MXFP4 => run::<MXFP4, 17, 32>(bytes, to),
        GgmlType::NVFP4 => run::<NVFP4, 36, 64>(bytes, to),
        GgmlType::Q1_0 => run::<Q1_0, 18, 128>(bytes, to),
        GgmlType::Q2_0 => run::<Q2_0, 18, 64>(bytes, to),
        _ => return None,
    }
    Some(())
}

/// A block of `BYTES` bytes that holds `WEIGHTS` weights.
trait Block<const BYTES: usize, const WEIGHTS: usize> {
    fn decode(block: &[u8; BYTES], to: &mut [f32; WEIGHTS]);
}

struct Run<'a, B, const BYTES: usize, const WEIGHTS: usize> {
    blocks: &'a [[u8; BYTES]],
    to: &'a mut [[f32; WEIGHTS]],
    format: std::marker::PhantomData<B>,
}

impl<B: Block<BYTES, WEIGHTS>, const BYTES: usize, const WEIGHTS: usize> WithSimd
    for Run<'_, B, BYTES, WEIGHTS>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (block, to) in self.blocks.iter().zip(self.to) {
            B::decode(block, to);
        }
    }
}

fn run<B: Block<BYTES, WEIGHTS>, const BYTES: usize, const WEIGHTS: usize>(
    bytes: &[u8],
    to: &mut [f32],
) {
    let (blocks, to) = (bytes.as_chunks().0, to.as_chunks_mut().0);
    Arch::new().dispatch(Run::<B, BYTES, WEIGHTS> { blocks, to, format: std::marker::PhantomData });
}

/// A block format: its name, its bytes, its weights, and how the latter become numbers.
macro_rules! block {
    ($name:ident $bytes:literal $weights:literal, |$block:ident, $to:ident| $body:block) => {
        #[allow(non_camel_case_types, reason = "as ggml calls it")]
        struct $name;

        impl Block<$bytes, $weights> for $name {
            #[inline(always)]
            fn decode($block: &[u8; $bytes], $to: &mut [f32; $weights]) $body
        }
    };
}

#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[inline(always)]
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

// d, then byte j: element j low, j + 16 high
block!(Q4_0 18 32, |b, to| {
    let d = half(b, 0);
    for j in 0..16 {
        to[j] = d * (f32::from(b[2 + j] & 15) - 8.0);
        to[j + 16] = d * (f32::from(b[2 + j] >> 4) - 8.0);
    }
});

block!(Q4_1 20 32, |b, to| {
    let (d, m) = (half(b, 0), half(b, 2));
    for j in 0..16 {
        to[j] = d * f32::from(b[4 + j] & 15) + m;
        to[j + 16] = d * f32::from(b[4 + j] >> 4) + m;
    }
});

// the fifth bit of element j is bit j of a word before the nibbles
block!(Q5_0 22 32, |b, to| {
    let (d, high) = (half(b, 0), word(b, 2));
    for j in 0..16 {
        let (low, up) = (u32::from(b[6 + j] & 15), u32::from(b[6 + j] >> 4));
        to[j] = d * ((low | (high >> j & 1) << 4) as i32 - 16) as f32;
        to[j + 16] = d * ((up | (high >> (j + 16) & 1) << 4) as i32 - 16) as f32;
    }
});

block!(Q5_1 24 32, |b, to| {
    let (d, m, high) = (half(b, 0), half(b, 2), word(b, 4));
    for j in 0..16 {
        let (low, up) = (u32::from(b[8 + j] & 15), u32::from(b[8 + j] >> 4));
        to[j] = d * (low | (high >> j & 1) << 4) as i32 as f32 + m;
        to[j + 16] = d * (up | (high >> (j + 16) & 1) << 4) as i32 as f32 + m;
    }
});

block!(Q8_0 34 32, |b, to| {
    let d = half(b, 0);
    for j in 0..32 {
        to[j] = d * f32::from(b[2 + j] as i8);
    }
});

// 16 bytes of scale (low) and minimum (high) a group of 16; 64 bytes of codes; d, dmin
block!(Q2_K 84 256, |b, to| {
    let (d, dmin) = (half(b, 80), half(b, 82));
    for group in 0..16 {
        let (scale, m) = (d * f32::from(b[group] & 15), dmin * f32::from(b[group] >> 4));
        // runs of 32 on one shift, four runs on the same 32 bytes
        let (codes, shift) = (16 + group / 8 * 32 + group % 2 * 16, group / 2 % 4 * 2);
        for j in 0..16 {
            to[16 * group + j] = scale * f32::from(b[codes + j] >> shift & 3) - m;
        }
    }
});

// 32 bytes of high bits (bit g: run g of 32); 64 bytes of low bits; 12 bytes of scales; d
block!(Q3_K 110 256, |b, to| {
    let d = half(b, 108);
    for group in 0..16 {
        let low = b[96 + group % 8] >> (group / 8 * 4) & 15;
        let up = b[104 + group % 4] >> (group / 4 * 2) & 3;
        let scale = d * (f32::from(low | up << 4) - 32.0);
        let (codes, shift) = (32 + group / 8 * 32 + group % 2 * 16, group / 2 % 4 * 2);
        let (mask, bit) = (group % 2 * 16, group / 2);
        for j in 0..16 {
            let code = b[codes + j] >> shift & 3 | (b[mask + j] >> bit & 1) << 2;
            to[16 * group + j] = scale * (f32::from(code) - 4.0);
        }
    }
});

/// The 6-bit scale and minimum of group `j` of eight, in 12 bytes: those of the first four in the low
/// bits of bytes j and j + 4; of the last four, the low bits in byte j + 4, the high ones above the
/// former.
#[inline(always)]
pub(crate) fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

// d, dmin, 12 bytes of scales and minima; for 64 elements 32 bytes: first 32 low, next 32 high
block!(Q4_K 144 256, |b, to| {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for pair in 0..4 {
        let (low, low_min) = scale_and_min(&b[4..16], 2 * pair);
        let (up, up_min) = scale_and_min(&b[4..16], 2 * pair + 1);
        let (low, low_min) = (d * f32::from(low), dmin * f32::from(low_min));
        let (up, up_min) = (d * f32::from(up), dmin * f32::from(up_min));
        for j in 0..32 {
            let byte = b[16 + 32 * pair + j];
            to[64 * pair + j] = low * f32::from(byte & 15) - low_min;
            to[64 * pair + 32 + j] = up * f32::from(byte >> 4) - up_min;
        }
    }
});

// as Q4_K, with 32 bytes of fifth bits (bit g: run g of 32) before the nibbles
block!(Q5_K 176 256, |b, to| {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for pair in 0..4 {
        let (low, low_min) = scale_and_min(&b[4..16], 2 * pair);
        let (up, up_min) = scale_and_min(&b[4..16], 2 * pair + 1);
        let (low, low_min) = (d * f32::from(low), dmin * f32::from(low_min));
        let (up, up_min) = (d * f32::from(up), dmin * f32::from(up_min));
        for j in 0..32 {
            let (byte, high) = (b[48 + 32 * pair + j], b[16 + j] >> (2 * pair));
            to[64 * pair + j] = low * f32::from(byte & 15 | (high & 1) << 4) - low_min;
            to[64 * pair + 32 + j] = up * f32::from(byte >> 4 | (high >> 1 & 1) << 4) - up_min;
        }
    }
});

// 128 bytes of low nibbles, 64 of high pairs, 16 i8 scales, d; per 128 elements, run r of 32: low
// nibbles in byte 32·(r % 2) + j, low or high half; high pair r of byte j
block!(Q6_K 210 256, |b, to| {
    let d = half(b, 208);
    for run in 0..8 {
        let (side, r) = (run / 4, run % 4);
        for half in 0..2 {
            let scale = d * f32::from(b[192 + 2 * run + half] as i8);
            for j in 0..16 {
                let at = 16 * half + j;
                let low = b[64 * side + r % 2 * 32 + at] >> (r / 2 * 4) & 15;
                let high = b[128 + 32 * side + at] >> (2 * r) & 3;
                to[32 * run + at] = scale * (f32::from(low | high << 4) - 32.0);
            }
        }
    }
});

block!(Q8_K 292 256, |b, to| {
    let d = f32::from_bits(word(b, 0));
    for j in 0..256 {
        to[j] = d * f32::from(b[4 + j] as i8);
    }
});

const IQ4: &[f32; 16] = Table16::IQ4_NL.levels();

block!(IQ4_NL 18 32, |b, to| {
    let d = half(b, 0);
    for j in 0..16 {
        to[j] = d * IQ4[usize::from(b[2 + j] & 15)];
        to[j + 16] = d * IQ4[usize::from(b[2 + j] >> 4)];
    }
});

// d, u16 of high pairs, 4 bytes of low nibbles of the 8 scales, 128 bytes of codes
block!(IQ4_XS 136 256, |b, to| {
    let d = half(b, 0);
    let high = u16::from_le_bytes([b[2], b[3]]);
    for group in 0..8 {
        let low = b[4 + group / 2] >> (group % 2 * 4) & 15;
        let scale = d * (f32::from(low | ((high >> (2 * group) & 3) as u8) << 4) - 32.0);
        for j in 0..16 {
            let byte = b[8 + 16 * group + j];
            to[32 * group + j] = scale * IQ4[usize::from(byte & 15)];
            to[32 * group + 16 + j] = scale * IQ4[usize::from(byte >> 4)];
        }
    }
});

/// Digit `n`, from the most significant, of a byte of five base-3 digits, stored as a fraction of 256.
#[inline(always)]
pub(crate) fn trit(byte: u8, n: usize) -> u8 {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    ((u16::from(byte.wrapping_mul(POWERS[n])) * 3) >> 8) as u8
}

// 32 bytes with digit n of byte m = element 32n + m; 16 bytes: 160 + 16n + m; 4 bytes of four digits:
// 240 + 4n + m; d
block!(TQ1_0 54 256, |b, to| {
    let d = half(b, 52);
    for n in 0..5 {
        for m in 0..32 {
            to[32 * n + m] = d * (f32::from(trit(b[m], n)) - 1.0);
        }
        for m in 0..16 {
            to[160 + 16 * n + m] = d * (f32::from(trit(b[32 + m], n)) - 1.0);
        }
    }
    for n in 0..4 {
        for m in 0..4 {
            to[240 + 4 * n + m] = d * (f32::from(trit(b[48 + m], n)) - 1.0);
        }
    }
});

// per 128 elements 32 bytes: run n of 32 at bits 2n; d
block!(TQ2_0 66 256, |b, to| {
    let d = half(b, 64);
    for run in 0..8 {
        for j in 0..32 {
            let code = b[run / 4 * 32 + j] >> (run % 4 * 2) & 3;
            to[32 * run + j] = d * (f32::from(code) - 1.0);
        }
    }
});

/// As [`Format::F4E2M1`], but that ggml's table has no −0.
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

// E8M0 scale, then byte j: element j low, j + 16 high
block!(MXFP4 17 32, |b, to| {
    let d = Format::F8E8M0.decode(b[0]);
    for j in 0..16 {
        to[j] = d * E2M1[usize::from(b[1 + j] & 15)];
        to[j + 16] = d * E2M1[usize::from(b[1 + j] >> 4)];
    }
});

// 4 E4M3 scales without sign, then per 16 elements 8 bytes: element j low, j + 8 high
block!(NVFP4 36 64, |b, to| {
    for group in 0..4 {
        // ggml knows no NaN here: 7F is 0
        let d = match b[group] {
            0x7f => 0.0,
            scale => F8E4M3::from_bits(scale & 0x7f).to_f32(),
        };
        for j in 0..8 {
            let byte = b[4 + 8 * group + j];
            to[16 * group + j] = d * E2M1[usize::from(byte & 15)];
            to[16 * group + 8 + j] = d * E2M1[usize::from(byte >> 4)];
        }
    }
});

block!(Q1_0 18 128, |b, to| {
    let d = half(b, 0);
    for j in 0..128 {
        to[j] = if b[2 + j / 8] >> (j % 8) & 1 == 1 { d } else { -d };
    }
});

block!(Q2_0 18 64, |b, to| {
    let d = half(b, 0);
    for j in 0..64 {
        to[j] = d * (f32::from(b[2 + j / 4] >> (j % 4 * 2) & 3) - 1.0);
    }
});
