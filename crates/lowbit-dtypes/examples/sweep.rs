//! Every one of the 2^32 f32 through every format, against the slow exact model of the tests: slices to nearest even, ties away and
//! toward zero, saturating and not, on every instruction set of the machine; slices at random on the best; one by one to
//! nearest even, saturating.
//!
//! `cargo run --release -p lowbit-dtypes --example sweep [format…]`; minutes to an hour, by machine. The recorded result
//! is in docs/dtypes.md.

#[path = "../tests/it/reference.rs"]
mod reference;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lowbit_dtypes::{
    Format, Isa, Overflow, Rounding, SmallFloat, bf16, encode_slice_on, f16, tf32, tf32_slice_on,
};
use reference::{Kind, Reference, widen};

/// Inputs at a time: consecutive bit patterns of one sign.
const CHUNK: u32 = 1 << 16;

const ROUNDINGS: [Rounding; 3] =
    [Rounding::NearestEven, Rounding::NearestAway, Rounding::TowardZero];

/// What the model says of `first + i`: it is monotonic, so where both ends agree all between do.
fn fill(model: &dyn Fn(u32) -> u32, first: u32, expected: &mut [u32]) {
    let last = expected.len() - 1;
    let (low, high) = (model(first), model(first + last as u32));
    if low == high {
        expected.fill(low);
    } else if last == 1 {
        expected.copy_from_slice(&[low, high]);
    } else {
        let middle = expected.len() / 2;
        let (a, b) = expected.split_at_mut(middle);
        fill(model, first, a);
        fill(model, first + middle as u32, b);
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let isas: Vec<_> = Isa::available().map(Isa::name).collect();
    println!("instruction sets: {}", isas.join(", "));
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    for reference in Reference::small() {
        let format: Format = reference.name.parse().unwrap();
        if wants(reference.name) {
            sweep::<u8>(
                &reference,
                |isa, x, codes, r, o| format.encode_slice_on(isa, x, codes, r, o).unwrap(),
                |x, r, o| format.encode_with(x, r, o),
            );
        }
    }
    if wants("float16") {
        sweep::<u16>(
            &Reference::ieee("float16", 5, 10),
            |isa, x, codes, r, o| {
                let small: &mut [f16] = bytemuck::cast_slice_mut(codes);
                encode_slice_on(isa, x, small, r, o).unwrap();
            },
            |x, r, o| f16::from_f32_with(x, r, o).to_bits(),
        );
    }
    if wants("bfloat16") {
        sweep::<u16>(
            &Reference::ieee("bfloat16", 8, 7),
            |isa, x, codes, r, o| {
                let small: &mut [bf16] = bytemuck::cast_slice_mut(codes);
                encode_slice_on(isa, x, small, r, o).unwrap();
            },
            |x, r, o| bf16::from_f32_with(x, r, o).to_bits(),
        );
    }
    if wants("tf32") {
        // Overflow always goes to infinity, and saturating codes are made of that here.
        sweep::<u32>(
            &Reference::ieee("tf32", 8, 10),
            |isa, x, codes, r, o| {
                tf32_slice_on(isa, x, bytemuck::cast_slice_mut(codes), r).unwrap();
                for code in codes {
                    *code = tf32_code(*code, o);
                }
            },
            |x, r, o| tf32_code(tf32(x, r).to_bits(), o),
        );
    }
}

/// The 19 bits of a TF32 in an f32, infinities made the largest number if that is what `overflow` asks for.
fn tf32_code(bits: u32, overflow: Overflow) -> u32 {
    let code = bits >> 13;
    code - u32::from(overflow == Overflow::Saturate && code & 0x3_ffff == 0x3_fc00)
}

/// What the codes of a format are stored in.
trait Code: Copy + Default + Eq + Into<u32> {
    fn new(code: u32) -> Self;
}
impl Code for u8 {
    fn new(code: u32) -> Self {
        code as u8
    }
}
impl Code for u16 {
    fn new(code: u32) -> Self {
        code as u16
    }
}
impl Code for u32 {
    fn new(code: u32) -> Self {
        code
    }
}

/// Checks all inputs on all threads and prints a line.
fn sweep<C: Code>(
    reference: &Reference,
    slice: impl Fn(Isa, &[f32], &mut [C], Rounding, Overflow) + Sync,
    single: impl Fn(f32, Rounding, Overflow) -> C + Sync,
) {
    let start = std::time::Instant::now();
    let chunk = AtomicU32::new(0);
    let checked = AtomicU64::new(0);
    let wrong = AtomicU64::new(0);
    let work = || {
        let mut x = vec![0f32; CHUNK as usize];
        let mut model = vec![0u32; CHUNK as usize];
        let mut expected = vec![C::default(); CHUNK as usize];
        let mut codes = vec![C::default(); CHUNK as usize];
        loop {
            let chunk = chunk.fetch_add(1, Ordering::Relaxed);
            if chunk > u32::MAX / CHUNK {
                return;
            }
            let first = chunk * CHUNK;
            for (i, x) in x.iter_mut().enumerate() {
                *x = f32::from_bits(first + i as u32);
            }
            let differ = |codes: &[C], expected: &[C], what: &str| {
                checked.fetch_add(codes.len() as u64, Ordering::Relaxed);
                if codes == expected {
                    return;
                }
                for (i, (&code, &expected)) in codes.iter().zip(expected).enumerate() {
                    if code != expected && wrong.fetch_add(1, Ordering::Relaxed) < 10 {
                        let (code, expected): (u32, u32) = (code.into(), expected.into());
                        let bits = first + i as u32;
                        println!("{bits:#x}: {code:#x}, expected {expected:#x}, {what}");
                    }
                }
            };
            for overflow in [Overflow::Infinity, Overflow::Saturate] {
                for rounding in ROUNDINGS {
                    let encode =
                        |bits| reference.encode(widen(f32::from_bits(bits)), rounding, overflow);
                    fill(&encode, first, &mut model);
                    for (expected, &model) in expected.iter_mut().zip(&model) {
                        *expected = C::new(model);
                    }
                    for isa in Isa::available() {
                        slice(isa, &x, &mut codes, rounding, overflow);
                        differ(&codes, &expected, isa.name());
                    }
                }
            }
            // Saturating, toward zero: `model` and `expected`. At random a code is that or, unless exact, the next.
            let rounding = Rounding::Stochastic { seed: 1, index: first.into() };
            slice(Isa::best(), &x, &mut codes, rounding, Overflow::Saturate);
            for (i, code) in codes.iter_mut().enumerate() {
                let random: u32 = (*code).into();
                if random != model[i]
                    && random == next(reference, model[i], x[i])
                    && reference.value(model[i]) != f64::from(x[i])
                {
                    *code = expected[i];
                }
            }
            differ(&codes, &expected, "at random");
            // One by one, in the usual mode.
            let (rounding, overflow) = (Rounding::NearestEven, Overflow::Saturate);
            let encode = |bits| reference.encode(widen(f32::from_bits(bits)), rounding, overflow);
            fill(&encode, first, &mut model);
            for (i, code) in codes.iter_mut().enumerate() {
                *code = single(x[i], rounding, overflow);
                expected[i] = C::new(model[i]);
            }
            differ(&codes, &expected, "alone");
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    println!(
        "{:20} {:>14} codes checked, {} differ ({:.0} s)",
        reference.name,
        checked.into_inner(),
        wrong.into_inner(),
        start.elapsed().as_secs_f64()
    );
}

/// The code one farther from zero than that of x toward zero; the largest has none.
fn next(reference: &Reference, down: u32, x: f32) -> u32 {
    if reference.kind == Kind::Scale {
        return (down + 1).min(reference.values.len() as u32 - 1);
    }
    let sign = if x.is_sign_negative() { reference.sign_bit } else { 0 };
    let magnitude = down & !reference.sign_bit;
    (magnitude + 1).min(reference.values.len() as u32 - 1) | sign
}
