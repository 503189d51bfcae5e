//! Plain Rust: the kernel that every CPU has, and the one to read first.

use super::Kernel;
use crate::tile::{self, Isa};

pub(super) const KERNEL: Kernel = Kernel {
    name: "scalar",
    is_available: || true,
    rows: 24,
    direct_rows: 2,
    task_rows: 72,
    keeps_rows: false,
    int8: |panel, rows, out| tile::int8::<_, 1, 1, 1, 1, 4, 1, 4, 1, 8>(Scalar, panel, rows, out),
    widen: |panel, look_up, to| tile::widen::<_, 4, 8>(Scalar, panel, look_up, to),
    bf16: None,
    peak: |peak, rounds| tile::peak(Scalar, peak, rounds),
    f32: |panel, rows, out| tile::f32::<_, 1, 1, 4, 1, 4, 1, 8>(Scalar, panel, rows, out),
};

#[derive(Clone, Copy)]
struct Scalar;

/// Four bytes a lane, as loaded.
fn dot4(acc: [i32; 8], codes: [i32; 8], a: [i32; 8]) -> [i32; 8] {
    let dot = |codes: i32, a: i32| -> i32 {
        let pairs = codes.to_le_bytes().into_iter().zip(a.to_le_bytes());
        pairs.map(|(code, a)| i32::from(code) * i32::from(a as i8)).sum()
    };
    core::array::from_fn(|i| acc[i] + dot(codes[i], a[i]))
}

impl Isa<8> for Scalar {
    type I32 = [i32; 8];
    type F32 = [f32; 8];
    type Levels = [f32; 16];

    const BYTES_OFFSET: i32 = 0;

    fn zero_i32(self) -> [i32; 8] {
        [0; 8]
    }

    fn zero_f32(self) -> [f32; 8] {
        [0.0; 8]
    }

    fn load_codes(self, codes: &[[u8; 4]; 8]) -> [i32; 8] {
        codes.map(i32::from_le_bytes)
    }

    fn load_u8(self, x: &[u8; 8]) -> [i32; 8] {
        x.map(i32::from)
    }

    fn load_u16(self, x: &[u16; 8]) -> [i32; 8] {
        x.map(i32::from)
    }

    fn load_i32(self, x: &[i32; 8]) -> [i32; 8] {
        *x
    }

    fn load_f32(self, x: &[f32; 8]) -> [f32; 8] {
        *x
    }

    fn store_codes(self, x: [i32; 8], to: &mut [[u8; 4]; 8]) {
        *to = x.map(i32::to_le_bytes);
    }

    fn store_f32(self, x: [f32; 8], to: &mut [f32; 8]) {
        *to = x;
    }

    fn splat_a(self, a: [i8; 4]) -> [i32; 8] {
        [i32::from_le_bytes([a[0] as u8, a[1] as u8, a[2] as u8, a[3] as u8]); 8]
    }

    fn splat_i32(self, x: i32) -> [i32; 8] {
        [x; 8]
    }

    fn splat_f32(self, x: f32) -> [f32; 8] {
        [x; 8]
    }

    fn field<const RIGHT: u32, const LEFT: u32, const MASK: u8>(self, x: [i32; 8]) -> [i32; 8] {
        x.map(|x| i32::from_le_bytes(x.to_le_bytes().map(|byte| byte >> RIGHT << LEFT & MASK)))
    }

    fn and(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        core::array::from_fn(|i| a[i] & b[i])
    }

    fn or(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        core::array::from_fn(|i| a[i] | b[i])
    }

    fn shl(self, x: [i32; 8], by: u32) -> [i32; 8] {
        x.map(|x| x << by)
    }

    fn shr(self, x: [i32; 8], by: u32) -> [i32; 8] {
        x.map(|x| (x as u32 >> by) as i32)
    }

    fn mul_u16(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        core::array::from_fn(|i| {
            let low = a[i].wrapping_mul(b[i] & 0xffff) & 0xffff;
            let high = (a[i] >> 16).wrapping_mul(b[i] >> 16) << 16;
            low | high
        })
    }

    fn lookup(self, table: &[u8; 16], codes: [i32; 8]) -> [i32; 8] {
        let level = |code: u8| table[usize::from(code & 15)];
        codes.map(|codes| i32::from_le_bytes(codes.to_le_bytes().map(level)))
    }

    fn dot_small(self, acc: [i32; 8], codes: [i32; 8], a: [i32; 8]) -> [i32; 8] {
        dot4(acc, codes, a)
    }

    fn dot_bytes(self, acc: [i32; 8], codes: [i32; 8], a: [i32; 8]) -> [i32; 8] {
        dot4(acc, codes, a)
    }

    fn add_i32(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        core::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    fn sub_i32(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        core::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    fn sub_mul(self, acc: [i32; 8], x: [i32; 8], by: i32) -> [i32; 8] {
        core::array::from_fn(|i| acc[i].wrapping_sub(x[i].wrapping_mul(by)))
    }

    fn levels(self, levels: &[f32; 16]) -> [f32; 16] {
        *levels
    }

    fn level(self, levels: [f32; 16], codes: [i32; 8]) -> [f32; 8] {
        codes.map(|code| levels[(code & 15) as usize])
    }

    fn reinterpret(self, x: [i32; 8]) -> [f32; 8] {
        x.map(|x| f32::from_bits(x as u32))
    }

    fn to_f32(self, x: [i32; 8]) -> [f32; 8] {
        x.map(|x| x as f32)
    }

    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        core::array::from_fn(|i| a[i] + b[i])
    }

    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        core::array::from_fn(|i| a[i] * b[i])
    }

    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        core::array::from_fn(|i| a[i] - b[i])
    }

    fn mul_add(self, acc: [f32; 8], a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        core::array::from_fn(|i| acc[i] + a[i] * b[i])
    }
}
