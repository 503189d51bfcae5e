//! AMX: eight tile registers of up to 16 rows by 64 bytes, and an instruction that multiplies two.
//!
//! ```text
//! C (rows, 16 i32) += A (rows, 4·depth i8) · B (depth, 16 × 4 u8)        rows, depth ≤ 16
//! ```
//!
//! A step of a [`Panel`] is two rows of `B` side by side, so tiles are loaded from it as it is
//! packed, 128 bytes apart. A block of the output is up to 32 rows by a panel, in four tiles that stay in
//! registers for a whole group, `2·2` products for each 16 steps:
//!
//! ```text
//!             B0 (tmm6)   B1 (tmm7)
//! A0 (tmm4)   C00 (tmm0)  C01 (tmm1)
//! A1 (tmm5)   C10 (tmm2)  C11 (tmm3)
//! ```
//!
//! Fewer than 32 rows: the lower tiles begin so far up that they end with the last row, and compute
//! some rows twice. Steps that do not fill a tile are multiplied in flatter ones.
//!
//! The instructions are written by name, since stable Rust has no intrinsics for them.

use core::{arch::asm, arch::x86_64::*, ptr::with_exposed_provenance};
use std::sync::OnceLock;

use super::{
    Kernel,
    avx512_vnni::{self, Avx512},
};
use crate::{
    panel::{NR, Panel},
    roofline::Peak,
    storage::Storage,
    tile::{self, Int8Row, Isa, MR},
};

pub(super) const KERNEL: Kernel = Kernel {
    name: "amx_int8",
    is_available: || (avx512_vnni::BF16.is_available)() && has_tiles(),
    rows: MR,
    direct_rows: 7,
    task_rows: 256, // 1 MiB at 4096 features
    keeps_rows: true,
    int8,
    f32: avx512_vnni::f32,
    widen: avx512_vnni::widen,
    bf16: avx512_vnni::BF16.bf16,
    peak,
};

/// Rows below which vectors are as fast: a block takes as long for one row as for 32.
const MIN_ROWS: usize = 8;

/// Rows of a tile at most.
const TILE: usize = 16;

/// Bytes of a panel's step, once its codes are bytes.
const STEP: usize = 4 * NR;

/// Whether the CPU has the instructions and the operating system saves the registers.
fn has_tiles() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        #[cfg(all(test, target_os = "linux"))]
        if !cpu_has_tiles() {
            super::amx_emulator::install();
            return true;
        }
        allowed(cpu_has_tiles(), ask_permission)
    })
}

/// `ask` gives what the operating system answers, 0 for yes. Only a CPU with tiles has it asked.
fn allowed(cpu_has_tiles: bool, ask: impl FnOnce() -> isize) -> bool {
    cpu_has_tiles && ask() == 0
}

#[allow(unused_unsafe, reason = "cpuid is safe to call in newer versions of Rust")]
pub(super) fn cpu_has_tiles() -> bool {
    /// Leaf 7, edx: AMX-TILE, AMX-INT8.
    const AMX: u32 = 1 << 24 | 1 << 25;
    /// Leaf 1, ecx: xgetbv may be used.
    const OSXSAVE: u32 = 1 << 27;
    /// Register XCR0: the operating system has switched on tile configuration and tile data.
    const XTILE: u64 = 1 << 17 | 1 << 18;
    // SAFETY: x86-64 has cpuid, and xgetbv is used where OSXSAVE says that it may be.
    unsafe {
        __cpuid(0).eax >= 7
            && __cpuid_count(7, 0).edx & AMX == AMX
            && __cpuid(1).ecx & OSXSAVE != 0
            && _xgetbv(0) & XTILE == XTILE
    }
}

/// Linux gives tile registers to processes that ask: `arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)`.
#[cfg(target_os = "linux")]
fn ask_permission() -> isize {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let answer;
    // SAFETY: a system call that reads and writes no memory, and the registers that it changes.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer
}

/// How to ask others is not known here.
#[cfg(not(target_os = "linux"))]
fn ask_permission() -> isize {
    -1
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8(panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
    // Other codes are widened first where there are more than a few rows.
    let bytes = panel.storage == Storage::Bytes && !panel.one_sum;
    let Some(a) = Activations::new(rows).filter(|a| a.rows >= MIN_ROWS && bytes) else {
        return avx512_vnni::int8(panel, rows, out);
    };
    let isa = Avx512::<false>::new();
    // SAFETY: whoever calls a kernel knows that it is available.
    let mut tiles = unsafe { Tiles::new(panel.next, a.width.div_ceil(4 * TILE)) };
    let mut dots = Dots([[0; NR]; MR]);
    out.fill([0.0; NR]);
    for g in 0..panel.groups {
        let (codes, first) = (panel.codes_of(g), g * panel.padded_group());
        tiles.multiply(a, first, codes.as_chunks().0, &mut dots);
        let part = (g, 0, 0);
        for (r, row) in rows.iter().enumerate() {
            let row = &[*row];
            let dots: &[[i32; 16]; 2] = bytemuck::cast_ref(&dots.0[r]);
            let dots = [[isa.load_i32(&dots[0]), isa.load_i32(&dots[1])]];
            let out: &mut [[f32; 16]; 2] = bytemuck::cast_mut(&mut out[r]);
            let mut total = [[isa.load_f32(&out[0]), isa.load_f32(&out[1])]];
            tile::flush_group(isa, panel, part, row, &dots, &mut total);
            isa.store_f32(total[0][0], &mut out[0]);
            isa.store_f32(total[0][1], &mut out[1]);
        }
    }
}

/// Rows of int8 that lie at one distance from each other.
#[derive(Clone, Copy)]
struct Activations {
    /// Exposed addresses: a tile is loaded from all rows through one pointer.
    start: usize,
    stride: usize,
    rows: usize,
    width: usize,
}

impl Activations {
    fn new(rows: &[Int8Row<'_>]) -> Option<Self> {
        let address = |row: &Int8Row<'_>| row.codes.as_ptr().expose_provenance();
        let (start, width) = (address(rows.first()?), rows[0].codes.len());
        let stride = rows.get(1).map_or(0, address).wrapping_sub(start);
        let mut expected = start;
        for row in rows {
            if address(row) != expected || row.codes.len() != width {
                return None;
            }
            expected = expected.wrapping_add(stride);
        }
        Some(Self { start, stride, rows: rows.len(), width })
    }
}

/// The sums of a block.
#[repr(C, align(64))]
struct Dots([[i32; NR]; MR]);

/// The tile registers of this thread. They are released when it is dropped.
struct Tiles {
    /// Rows of `C` and steps of `B`, once configured.
    shape: Option<(usize, usize)>,
    /// What to prefetch for later calls, and how many cache lines of it with each product of tiles.
    next: *const u8,
    lines: usize,
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// This CPU has tiles, and the operating system has allowed them.
    unsafe fn new(next: &[u8], blocks: usize) -> Self {
        let lines = next.len().div_ceil(64).div_ceil(blocks.max(1));
        Self { shape: None, next: next.as_ptr(), lines }
    }

    /// `dots = a[.., first..] · codes`
    #[target_feature(enable = "avx512f")]
    fn multiply(&mut self, a: Activations, first: usize, codes: &[[u8; STEP]], dots: &mut Dots) {
        assert!(a.rows <= MR && first + 4 * codes.len() <= a.width, "rows of another width");
        let (full, rest) = codes.as_chunks::<TILE>();
        let middle = first + 4 * TILE * full.len();
        // SAFETY: by the assertion, every row has four activations for each step.
        unsafe {
            if !full.is_empty() {
                self.block(a, first, full.as_ptr().cast(), (TILE, full.len()), true, dots);
            }
            if !rest.is_empty() {
                let zeroed = full.is_empty();
                self.block(a, middle, rest.as_ptr().cast(), (rest.len(), 1), zeroed, dots);
            }
        }
    }

    /// The `tiles · depth` steps at `b`.
    ///
    /// # Safety
    /// There are so many steps of [`STEP`] bytes at `b`, `depth` is in 1..=16, `a` has 1 to [`MR`] rows,
    /// each with four activations for each step from `first` on.
    #[target_feature(enable = "avx512f")]
    unsafe fn block(
        &mut self,
        a: Activations,
        first: usize,
        b: *const u8,
        (depth, tiles): (usize, usize),
        zeroed: bool,
        dots: &mut Dots,
    ) {
        let height = a.rows.min(TILE);
        self.configure(height, depth);
        let lower = a.rows - height;
        let a0 = a.start + first;
        let c0 = dots.0.as_mut_ptr();
        // SAFETY: tiles of A are `height` rows at `stride` of `4·depth` bytes, the last ones those of row
        // `lower + height`, the last; tiles of B `depth` rows of 64 bytes, of C `height` rows of 64 bytes
        // inside of `dots`. A prefetch may name any address.
        unsafe {
            asm!(
                "test {zeroed:e}, {zeroed:e}",
                "jnz 2f",
                "tileloadd tmm0, [{c0} + {row}*1]",
                "tileloadd tmm1, [{c0} + {row}*1 + 64]",
                "tileloadd tmm2, [{c1} + {row}*1]",
                "tileloadd tmm3, [{c1} + {row}*1 + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm6, [{b} + {row}*1]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row}*1 + 64]",
                "tdpbsud tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                "mov {left}, {lines}",
                "jmp 5f",
                "4:",
                "prefetcht1 byte ptr [{next}]",
                "add {next}, 64",
                "dec {left}",
                "5:",
                "test {left}, {left}",
                "jnz 4b",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b}, 16 * 128",
                "dec {tiles}",
                "jnz 3b",
                "tilestored [{c0} + {row}*1], tmm0",
                "tilestored [{c0} + {row}*1 + 64], tmm1",
                "tilestored [{c1} + {row}*1], tmm2",
                "tilestored [{c1} + {row}*1 + 64], tmm3",
                zeroed = in(reg) u32::from(zeroed),
                c0 = in(reg) c0,
                c1 = in(reg) c0.add(lower),
                row = in(reg) STEP,
                a0 = inout(reg) with_exposed_provenance::<i8>(a0) => _,
                a1 = inout(reg) with_exposed_provenance::<i8>(a0 + lower * a.stride) => _,
                stride = in(reg) a.stride,
                b = inout(reg) b => _,
                tiles = inout(reg) tiles => _,
                next = inout(reg) self.next,
                lines = in(reg) self.lines,
                left = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Gives `C` tiles of `height` rows and `B` tiles of `depth`. What the registers held is lost.
    fn configure(&mut self, height: usize, depth: usize) {
        if self.shape.replace((height, depth)) == Some((height, depth)) {
            return;
        }
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (tiles, rows, row_bytes) in
            [(0..4, height, 64), (4..6, height, 4 * depth), (6..8, depth, 64)]
        {
            config.rows[tiles.clone()].fill(rows as u8);
            config.row_bytes[tiles].fill(row_bytes as u16);
        }
        // SAFETY: `self` proves that there are tiles; reads the 64 bytes of `config`.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                config = in(reg) &raw const config,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly, preserves_flags),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.shape.is_some() {
            // SAFETY: `self` proves that there are tiles, and nobody needs what they hold.
            unsafe {
                asm!(
                    "tilerelease",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem, preserves_flags),
                );
            }
        }
    }
}

/// The four products of a block, `rounds` times on the same operands. They are not zero: zeros take
/// less power and run at a higher clock.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn peak(peak: Peak, rounds: u64) -> f64 {
    let Peak::Int8 = peak else { return avx512_vnni::peak(peak, rounds) };
    let operand: [[u8; 64]; TILE] =
        core::array::from_fn(|r| core::array::from_fn(|c| (37 * r + 101 * c + 13) as u8));
    // SAFETY: whoever calls a kernel knows that it is available.
    let mut tiles = unsafe { Tiles::new(&[], 0) };
    tiles.configure(TILE, TILE);
    // SAFETY: the tiles have 16 rows of 64 bytes, as `operand` has.
    unsafe {
        asm!(
            "tileloadd tmm4, [{operand} + {row}*1]",
            "tileloadd tmm5, [{operand} + {row}*1]",
            "tileloadd tmm6, [{operand} + {row}*1]",
            "tileloadd tmm7, [{operand} + {row}*1]",
            "2:",
            "tdpbsud tmm0, tmm4, tmm6",
            "tdpbsud tmm1, tmm4, tmm7",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            operand = in(reg) &operand,
            row = in(reg) 64_usize,
            rounds = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
    (rounds.max(1) as usize * 4 * 2 * TILE * TILE * 64) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::{Meaning, Scales, Zeros};

    #[test]
    fn the_operating_system_is_asked_once_the_cpu_has_tiles_and_may_refuse() {
        const EINVAL: isize = -22;
        assert!(allowed(true, || 0));
        assert!(!allowed(true, || EINVAL));
        assert!(!allowed(false, || unreachable!("asked for what the CPU does not have")));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn tiles_are_released_behind_a_product() {
        use super::super::amx_emulator;
        if !(KERNEL.is_available)() {
            return println!("skipped: no AVX-512, which the rest of the kernel needs");
        }
        let (codes, activations) = ([3; 3 * STEP], [-7; 12]);
        let row = Int8Row { codes: &activations, sums: &[-84], ..Int8Row::default() };
        let panel = Panel {
            codes: &codes,
            storage: Storage::Bytes,
            steps: 3,
            groups: 1,
            meaning: &Meaning::Int,
            unit: 1.0,
            scales: Scales::F32(&[[0.5; NR]]),
            zeros: Zeros::Constant(1),
            sums: &[],
            exact: false,
            next: &[],
            one_sum: false,
        };
        let mut out = [[0.0; NR]; 20];
        KERNEL.int8(&panel, &[row; 20], &mut out);
        assert_eq!(out, [[0.5 * (2 * -84) as f32; NR]; 20]);
        assert!(!amx_emulator::is_configured());

        let operations = super::super::named("amx_int8").unwrap().peak(Peak::Int8, 3);
        assert_eq!(operations, 3.0 * 4.0 * (2 * 16 * 16 * 64) as f64);
        assert!(!amx_emulator::is_configured());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_operating_system_refuses_what_the_cpu_does_not_have() {
        if !cpu_has_tiles() {
            assert!(ask_permission() < 0);
        }
    }
}
