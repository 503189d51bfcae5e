//! AMX for tests on a CPU without it.
//!
//! An instruction that the CPU does not know raises SIGILL. The handler installed here decodes the
//! ones that the kernel uses from their bytes, does what Intel's manual says on registers of the
//! thread, steps over them and returns; so the tests run the very code that users run, encodings
//! included. What real hardware would refuse, or would do differently from what the kernel can mean,
//! ends the process: tiles that are not configured or do not fit each other, reserved bits, and
//! every instruction that the kernel does not use.
//!
//! Written from "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2:
//! LDTILECFG, TDPBSUD, TILELOADD, TILERELEASE, TILESTORED, TILEZERO; it shares nothing with the kernel.

use core::{cell::RefCell, ffi::c_void};
use std::sync::Once;

/// Palette 1: registers, rows of each, bytes of a row.
const TILES: usize = 8;
const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    row_bytes: usize,
    data: [[u8; ROW_BYTES]; ROWS],
}

impl Tile {
    const UNUSED: Self = Self { rows: 0, row_bytes: 0, data: [[0; ROW_BYTES]; ROWS] };
}

/// What `ldtilecfg` and the tile instructions change: nothing before the first, or after `tilerelease`.
struct State {
    configured: bool,
    tiles: [Tile; TILES],
}

impl State {
    const RELEASED: Self = Self { configured: false, tiles: [Tile::UNUSED; TILES] };
}

thread_local! {
    static STATE: RefCell<State> = const { RefCell::new(State::RELEASED) };
}

/// General registers in the order of their numbers in an encoding.
type Registers = [u64; 16];

/// Why the process ends.
type Fault = String;

#[derive(Debug, PartialEq)]
enum Instruction {
    LoadConfig(u64),
    Release,
    Zero(usize),
    /// Register, address of row 0, distance from one row to the next.
    Load(usize, u64, u64),
    Store(usize, u64, u64),
    /// `C += A · B`, with signed bytes in `A` and unsigned ones in `B`.
    DotSignedUnsigned {
        c: usize,
        a: usize,
        b: usize,
    },
}

/// The instruction at the start of `code`, which lies at address `rip`, and its length; `None` if
/// it is not AMX at all.
fn decode(
    code: &[u8; 15],
    rip: u64,
    registers: &Registers,
) -> Result<Option<(Instruction, usize)>, Fault> {
    // VEX in three bytes: C4, then R' X' B' mmmmm, then W vvvv' L pp, where ' is inverted.
    let [0xc4, p1, p2, opcode, modrm, ..] = *code else { return Ok(None) };
    if p1 & 31 != 2 || !matches!(opcode, 0x49 | 0x4b | 0x5e) {
        return Ok(None);
    }
    let (r, x, b) = (!p1 >> 7 & 1, !p1 >> 6 & 1, !p1 >> 5 & 1);
    let (w, v, l, prefix) = (p2 >> 7, !p2 >> 3 & 15, p2 >> 2 & 1, p2 & 3);
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7 | r << 3, modrm & 7 | b << 3);
    let fault = || format!("no instruction of the kernel: {:02x?} at {rip:#x}", &code[..8]);
    if w != 0 || l != 0 {
        return Err(fault());
    }
    let tile = |number: u8| if number < 8 { Ok(usize::from(number)) } else { Err(fault()) };
    let in_memory = mode != 3;
    let no_v = v == 0;
    let (instruction, length) = match (opcode, prefix) {
        (0x49, 0) if in_memory && reg == 0 && no_v => {
            let (memory, length) = operand(code, rip, (x, b), registers);
            (Instruction::LoadConfig(memory.base.wrapping_add(memory.index)), length)
        }
        (0x49, 0) if modrm == 0xc0 && r == 0 && no_v => (Instruction::Release, 5),
        (0x49, 3) if !in_memory && rm == 0 && no_v => (Instruction::Zero(tile(reg)?), 5),
        // A base and an index, which is the stride, are required.
        (0x4b, 2 | 3) if in_memory && modrm & 7 == 4 && no_v => {
            let (memory, length) = operand(code, rip, (x, b), registers);
            let (reg, base, stride) = (tile(reg)?, memory.base, memory.index);
            match prefix {
                3 => (Instruction::Load(reg, base, stride), length),
                _ => (Instruction::Store(reg, base, stride), length),
            }
        }
        (0x5e, 2) if !in_memory => {
            (Instruction::DotSignedUnsigned { c: tile(reg)?, a: tile(rm)?, b: tile(v)? }, 5)
        }
        _ => return Err(fault()),
    };
    Ok(Some((instruction, length)))
}

struct Memory {
    /// Base and displacement.
    base: u64,
    /// Index times scale.
    index: u64,
}

/// The memory operand of an instruction whose ModRM is its fifth byte, and the instruction's length.
fn operand(code: &[u8; 15], rip: u64, (x, b): (u8, u8), registers: &Registers) -> (Memory, usize) {
    let (mode, rm) = (code[4] >> 6, code[4] & 7);
    let register = |low: u8, high: u8| registers[usize::from(low | high << 3)];
    let mut at = 5;
    let (mut base, mut index, mut no_base) = (0, 0, false);
    if rm == 4 {
        let sib = code[at];
        at += 1;
        let (scale, number, low) = (sib >> 6, sib >> 3 & 7, sib & 7);
        if number != 4 || x == 1 {
            index = register(number, x) << scale;
        }
        no_base = mode == 0 && low == 5;
        if !no_base {
            base = register(low, b);
        }
    } else if !(mode == 0 && rm == 5) {
        base = register(rm, b);
    }
    let relative = mode == 0 && rm == 5;
    let displacement = match mode {
        1 => {
            at += 1;
            i64::from(code[at - 1] as i8)
        }
        2 => {
            at += 4;
            i64::from(i32::from_le_bytes([code[at - 4], code[at - 3], code[at - 2], code[at - 1]]))
        }
        _ if relative || no_base => {
            at += 4;
            i64::from(i32::from_le_bytes([code[at - 4], code[at - 3], code[at - 2], code[at - 1]]))
        }
        _ => 0,
    };
    if relative {
        base = rip.wrapping_add(at as u64);
    }
    (Memory { base: base.wrapping_add_signed(displacement), index }, at)
}

impl State {
    /// # Safety
    /// The memory that the instruction names may be read or written, as it would.
    unsafe fn execute(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        match *instruction {
            Instruction::LoadConfig(from) => {
                // SAFETY: the caller's promise.
                let config = unsafe { (from as *const [u8; 64]).read_unaligned() };
                *self = Self::from_config(&config)?;
            }
            Instruction::Release => *self = Self::RELEASED,
            Instruction::Zero(t) => self.tile(t)?.data = [[0; ROW_BYTES]; ROWS],
            Instruction::Load(t, base, stride) => {
                let tile = self.tile(t)?;
                tile.data = [[0; ROW_BYTES]; ROWS];
                for r in 0..tile.rows {
                    let from = base.wrapping_add(stride.wrapping_mul(r as u64)) as *const u8;
                    let to = tile.data[r].as_mut_ptr();
                    // SAFETY: the caller's promise; a row has 64 bytes at least.
                    unsafe { core::ptr::copy_nonoverlapping(from, to, tile.row_bytes) }
                }
            }
            Instruction::Store(t, base, stride) => {
                let tile = self.tile(t)?;
                for r in 0..tile.rows {
                    let to = base.wrapping_add(stride.wrapping_mul(r as u64)) as *mut u8;
                    // SAFETY: as above.
                    unsafe {
                        core::ptr::copy_nonoverlapping(tile.data[r].as_ptr(), to, tile.row_bytes)
                    }
                }
            }
            Instruction::DotSignedUnsigned { c, a, b } => {
                if c == a || a == b || b == c {
                    return Err(format!("one register twice: tmm{c}, tmm{a}, tmm{b}"));
                }
                let (a, b) = (*self.tile(a)?, *self.tile(b)?);
                let c = self.tile(c)?;
                let fits =
                    c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows;
                if !fits {
                    let shape = |tile: &Tile| format!("{} x {}", tile.rows, tile.row_bytes);
                    return Err(format!("{} += {} . {}", shape(c), shape(&a), shape(&b)));
                }
                for m in 0..c.rows {
                    for n in 0..c.row_bytes / 4 {
                        let to: &mut [u8; 4] = (&mut c.data[m][4 * n..][..4]).try_into().unwrap();
                        let mut sum = i32::from_le_bytes(*to);
                        for k in 0..b.rows {
                            for i in 0..4 {
                                let a = a.data[m][4 * k + i] as i8;
                                sum = sum
                                    .wrapping_add(i32::from(a) * i32::from(b.data[k][4 * n + i]));
                            }
                        }
                        *to = sum.to_le_bytes();
                    }
                }
            }
        }
        Ok(())
    }

    fn from_config(config: &[u8; 64]) -> Result<Self, Fault> {
        let fault = |why: &str| Err(format!("ldtilecfg: {why}: {config:02x?}"));
        // Byte 0 is the palette, 1 the row to go on with after a page fault.
        if config[..2] != [1, 0] || config[2..16].iter().any(|&reserved| reserved != 0) {
            return fault("palette, first row or reserved bytes");
        }
        let mut state = Self { configured: true, ..Self::RELEASED };
        for t in 0..ROWS {
            let row_bytes =
                usize::from(u16::from_le_bytes([config[16 + 2 * t], config[17 + 2 * t]]));
            let rows = usize::from(config[48 + t]);
            if t >= TILES {
                if rows != 0 || row_bytes != 0 {
                    return fault("a tile that does not exist");
                }
                continue;
            }
            if rows > ROWS || row_bytes > ROW_BYTES || (rows == 0) != (row_bytes == 0) {
                return fault("rows or bytes of a row");
            }
            state.tiles[t] = Tile { rows, row_bytes, ..Tile::UNUSED };
        }
        Ok(state)
    }

    fn tile(&mut self, t: usize) -> Result<&mut Tile, Fault> {
        match &mut self.tiles[t] {
            tile if self.configured && tile.rows != 0 && tile.row_bytes % 4 == 0 => Ok(tile),
            _ => Err(format!("tmm{t} is not configured, or not for i32")),
        }
    }
}

/// From now on, AMX instructions on any thread are emulated.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: all zeros is an action without flags, whose mask blocks nothing.
        let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction = on_illegal_instruction as *const () as usize;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for.
        let result = unsafe { libc::sigaction(libc::SIGILL, &action, core::ptr::null_mut()) };
        assert_eq!(result, 0, "no handler for SIGILL");
    });
}

/// Whether the kernel runs on emulated instructions in this process.
pub(crate) fn is_used() -> bool {
    !super::amx::cpu_has_tiles()
}

/// Runs on the thread that met the instruction, which is inside of the kernel: no lock is held.
extern "C" fn on_illegal_instruction(_: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    /// Where Linux saves the registers, in the order of their numbers in an encoding.
    const ORDER: [i32; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: with SA_SIGINFO the third argument is a ucontext_t of this thread.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let saved = &mut context.uc_mcontext.gregs;
    let rip = saved[libc::REG_RIP as usize] as u64;
    let registers = ORDER.map(|register| saved[register as usize] as u64);
    // SAFETY: no instruction is longer, and code that follows the kernel's is in the same pages or the
    // next ones of the program.
    let code = unsafe { (rip as *const [u8; 15]).read_unaligned() };
    let done = decode(&code, rip, &registers).and_then(|decoded| match decoded {
        None => Err(format!("an illegal instruction that is not AMX: {code:02x?} at {rip:#x}")),
        Some((instruction, length)) => STATE.with_borrow_mut(|state| {
            // SAFETY: the instruction names the memory that the kernel wants it to use.
            unsafe { state.execute(&instruction) }.map(|()| length)
        }),
    });
    match done {
        Ok(length) => saved[libc::REG_RIP as usize] += length as i64,
        Err(fault) => {
            eprintln!("AMX emulator: {fault}");
            std::process::abort();
        }
    }
}

/// Whether this thread has tiles that are not released.
pub(super) fn is_configured() -> bool {
    STATE.with_borrow(|state| state.configured)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(bytes: &[u8]) -> [u8; 15] {
        core::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0x90))
    }

    /// The encodings are those that LLVM's assembler gives.
    #[test]
    fn instructions_are_decoded() {
        use Instruction::*;
        let registers: Registers = core::array::from_fn(|i| 1000 * i as u64);
        for (bytes, expected) in [
            (&[0xc4, 0xe2, 0x78, 0x49, 0x00][..], LoadConfig(0)), // [rax]
            (&[0xc4, 0xc2, 0x78, 0x49, 0x45, 0x10], LoadConfig(13_016)), // [r13 + 16]
            (&[0xc4, 0xe2, 0x78, 0x49, 0x44, 0x24, 0x40], LoadConfig(4064)), // [rsp + 64]
            (&[0xc4, 0xe2, 0x78, 0x49, 0x05, 1, 1, 0, 0], LoadConfig(0x10_0000 + 9 + 257)), // [rip + 257]
            (&[0xc4, 0xe2, 0x78, 0x49, 0xc0], Release),
            (&[0xc4, 0xe2, 0x7b, 0x49, 0xd8], Zero(3)),
            (&[0xc4, 0xe2, 0x7b, 0x4b, 0x24, 0x08], Load(4, 0, 1000)), // [rax + rcx]
            (&[0xc4, 0x82, 0x7b, 0x4b, 0x6c, 0x08, 0x40], Load(5, 8064, 9000)), // [r8 + r9 + 64]
            (&[0xc4, 0xc2, 0x7a, 0x4b, 0x4c, 0x0d, 0x40], Store(1, 13_064, 1000)), // [r13 + rcx + 64]
            (&[0xc4, 0xe2, 0x4a, 0x5e, 0xc4], DotSignedUnsigned { c: 0, a: 4, b: 6 }),
        ] {
            let decoded = decode(&code(bytes), 0x10_0000, &registers);
            assert_eq!(decoded, Ok(Some((expected, bytes.len()))), "{bytes:02x?}");
        }
    }

    #[test]
    fn what_hardware_refuses_is_refused() {
        let registers = [0; 16];
        for bytes in [
            [0xc4, 0xe2, 0xf8, 0x49, 0xc0], // W = 1
            [0xc4, 0xe2, 0x7c, 0x49, 0xc0], // L = 1
            [0xc4, 0xe2, 0x70, 0x49, 0xc0], // tilerelease with an operand in vvvv
            [0xc4, 0x62, 0x7b, 0x49, 0xd8], // tmm11
            [0xc4, 0xe2, 0x7b, 0x4b, 0x00], // tileloadd without an index
            [0xc4, 0xe2, 0x0a, 0x5e, 0xc4], // tmm14 as an operand
            [0xc4, 0xe2, 0x4b, 0x5e, 0xc4], // tdpbssd, which the kernel does not use
        ] {
            assert!(decode(&code(&bytes), 0, &registers).is_err(), "{bytes:02x?}");
        }
        assert_eq!(decode(&code(&[0x0f, 0x0b]), 0, &registers), Ok(None));

        let config = |change: &dyn Fn(&mut [u8; 64])| {
            let mut config = [0; 64];
            config[0] = 1;
            // tmm0 2 x 8, tmm1 2 x 12, tmm2 3 x 8
            for (t, (rows, row_bytes)) in [(2, 8), (2, 12), (3, 8)].into_iter().enumerate() {
                (config[48 + t], config[16 + 2 * t]) = (rows, row_bytes);
            }
            change(&mut config);
            State::from_config(&config)
        };
        for change in [
            &|c: &mut [u8; 64]| c[0] = 2 as _,
            &|c: &mut [u8; 64]| c[1] = 1,
            &|c: &mut [u8; 64]| c[9] = 1,
            &|c: &mut [u8; 64]| c[48] = 17,
            &|c: &mut [u8; 64]| c[16] = 65,
            &|c: &mut [u8; 64]| c[50] = 0,
            &|c: &mut [u8; 64]| c[57] = 1,
        ] as [&dyn Fn(&mut [u8; 64]); 7]
        {
            assert!(config(change).is_err());
        }
        let dot = |c, a, b| Instruction::DotSignedUnsigned { c, a, b };
        let run = |state: &mut State, instruction| {
            // SAFETY: no instruction below touches memory.
            unsafe { state.execute(&instruction) }
        };
        let mut state = config(&|_| ()).unwrap_or(State::RELEASED);
        assert!(run(&mut state, dot(0, 1, 2)).is_ok());
        for (c, a, b) in [(0, 2, 1), (1, 0, 2), (0, 0, 2), (0, 1, 1), (0, 1, 3)] {
            assert!(run(&mut state, dot(c, a, b)).is_err(), "{c} {a} {b}");
        }
        assert!(run(&mut state, Instruction::Zero(3)).is_err());
        assert!(run(&mut state, Instruction::Release).is_ok());
        assert!(run(&mut state, dot(0, 1, 2)).is_err());
    }

    /// `[[-1, 2, 3, 4]] · [[255, 1, 2, 3], [5, 6, 7, 8]]ᵀ`, by hand.
    #[test]
    fn signed_bytes_are_multiplied_by_unsigned_ones() {
        let mut state = State { configured: true, ..State::RELEASED };
        for (t, bytes) in [(0, 8), (1, 4), (2, 8)] {
            (state.tiles[t].rows, state.tiles[t].row_bytes) = (1, bytes);
        }
        state.tiles[1].data[0][..4].copy_from_slice(&[255, 2, 3, 4]);
        state.tiles[2].data[0][..8].copy_from_slice(&[255, 1, 2, 3, 5, 6, 7, 8]);
        // SAFETY: touches no memory.
        unsafe { state.execute(&Instruction::DotSignedUnsigned { c: 0, a: 1, b: 2 }) }.unwrap();
        let sums = state.tiles[0].data[0];
        assert_eq!(i32::from_le_bytes(sums[..4].try_into().unwrap()), -255 + 2 + 6 + 12);
        assert_eq!(i32::from_le_bytes(sums[4..8].try_into().unwrap()), -5 + 12 + 21 + 32);
    }
}
