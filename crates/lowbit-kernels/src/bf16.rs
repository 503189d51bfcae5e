//! Products of weights and activations in bfloat16, two input features at a time, summed in f32.
//!
//! A word holds the numbers of two input features, the first in its lower half: a quad of
//! [`Storage`] becomes two words.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "no kernel elsewhere has it"))]

use core::marker::PhantomData;

use lowbit_core::QuantType;
use lowbit_dtypes::{Overflow, Rounding, SmallFloat, bf16};

use crate::{
    panel::{Meaning, NR, Panel, Zeros, part},
    storage::{Bits3, Bits5, Bits6, Bytes, Codes, Crumbs, Nibbles, Storage},
    tile::{Decode, Integer, Isa, Step, store},
};

/// The instructions that are needed beside those of [`Isa`].
pub(crate) trait Bf16<const L: usize>: Isa<L> {
    /// The first 32 numbers to choose from, and all 128.
    type Few: Copy;
    type Many: Copy;

    fn few(self, numbers: &Numbers) -> Self::Few;
    fn many(self, numbers: &Numbers) -> Self::Many;
    /// What the lowest five bits of each byte choose, as two words.
    fn choose_few(self, numbers: Self::Few, codes: Self::I32) -> [Self::I32; 2];
    /// What the lowest seven bits of each byte choose, as two words, with its highest bit as the sign.
    fn choose_many(self, numbers: Self::Many, codes: Self::I32) -> [Self::I32; 2];
    fn bits(self, x: Self::F32) -> Self::I32;
    /// `acc + w_1·x_1 + w_0·x_0` in every lane.
    fn dot_bf16(self, acc: Self::F32, w: Self::I32, x: Self::I32) -> Self::F32;
}

/// What codes choose from, as bfloat16: the level of each, or for integers of at most 4 bits their
/// difference from a zero, modulo 32.
pub(crate) type Numbers = [u16; 128];

pub(crate) fn numbers(dtype: QuantType) -> Numbers {
    core::array::from_fn(|i| {
        let level = match dtype {
            QuantType::Int { .. } => (i % 32) as f32 - if i % 32 < 16 { 0.0 } else { 32.0 },
            _ => dtype.level(i as u8),
        };
        bf16::from_f32_with(level, Rounding::NearestEven, Overflow::Saturate).to_bits()
    })
}

/// How the codes of a quad become words.
trait Convert<V: Bf16<L>, const L: usize>: Copy {
    /// `zero` is an integer in every lane.
    fn convert(self, isa: V, codes: V::I32, zero: V::I32) -> [V::I32; 2];
}

/// Codes of at most 4 bits.
#[derive(Clone, Copy)]
struct Few<T>(T);

impl<V: Bf16<L>, const L: usize> Convert<V, L> for Few<V::Few> {
    #[inline(always)]
    fn convert(self, isa: V, codes: V::I32, zero: V::I32) -> [V::I32; 2] {
        // 32 − zero in every byte, so that none borrows from the next.
        let offset = isa.sub_i32(isa.splat_i32(32), zero);
        let offset = isa.or(offset, isa.shl(offset, 8));
        let offset = isa.or(offset, isa.shl(offset, 16));
        isa.choose_few(self.0, isa.add_i32(codes, offset))
    }
}

/// Codes of floats, whose sign is the highest of 8 bits. They have no zeros.
#[derive(Clone, Copy)]
struct Many<T>(T);

impl<V: Bf16<L>, const L: usize> Convert<V, L> for Many<V::Many> {
    #[inline(always)]
    fn convert(self, isa: V, codes: V::I32, _: V::I32) -> [V::I32; 2] {
        isa.choose_many(self.0, codes)
    }
}

/// Integers whose differences from a zero are computed in f32, and are bfloat16 numbers.
#[derive(Clone, Copy)]
struct Subtracted;

impl<V: Bf16<L>, const L: usize> Convert<V, L> for Subtracted {
    #[inline(always)]
    fn convert(self, isa: V, codes: V::I32, zero: V::I32) -> [V::I32; 2] {
        let zero = isa.to_f32(zero);
        let first = isa.bits(isa.sub(Integer.decode::<0>(isa, codes), zero));
        let second = isa.bits(isa.sub(Integer.decode::<8>(isa, codes), zero));
        let third = isa.bits(isa.sub(Integer.decode::<16>(isa, codes), zero));
        let fourth = isa.bits(isa.sub(Integer.decode::<24>(isa, codes), zero));
        let upper = isa.splat_i32(-1 << 16);
        [
            isa.or(isa.shr(first, 16), isa.and(second, upper)),
            isa.or(isa.shr(third, 16), isa.and(fourth, upper)),
        ]
    }
}

/// How the `W` words of a step become two words for each of its `Q` quads.
trait Unpack<V: Bf16<L>, const W: usize, const Q: usize, const L: usize>: Copy {
    fn unpack(self, isa: V, words: [V::I32; W], zero: V::I32) -> [[V::I32; 2]; Q];
}

struct Stored<C, D>(D, PhantomData<C>);

impl<C, D: Copy> Clone for Stored<C, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C, D: Copy> Copy for Stored<C, D> {}

#[allow(clippy::needless_range_loop, reason = "as in tile::int8_rows")]
impl<V, C, D, const W: usize, const Q: usize, const L: usize> Unpack<V, W, Q, L> for Stored<C, D>
where
    V: Bf16<L>,
    C: Codes<W, Q>,
    D: Convert<V, L>,
{
    #[inline(always)]
    fn unpack(self, isa: V, words: [V::I32; W], zero: V::I32) -> [[V::I32; 2]; Q] {
        let quads = C::quads(isa, words);
        let mut converted = [[isa.zero_i32(); 2]; Q];
        for q in 0..Q {
            converted[q] = self.0.convert(isa, quads[q], zero);
        }
        converted
    }
}

/// Words already.
#[derive(Clone, Copy)]
struct Widened;

impl<V: Bf16<L>, const L: usize> Unpack<V, 2, 1, L> for Widened {
    #[inline(always)]
    fn unpack(self, _: V, words: [V::I32; 2], _: V::I32) -> [[V::I32; 2]; 1] {
        [words]
    }
}

/// Calls a macro with words and quads of a step, and how they are unpacked.
macro_rules! with_codes {
    ($isa:ident, $panel:ident, $numbers:ident, $do:ident) => {{
        macro_rules! stored {
            ($codes:ty, $w:literal, $q:literal, $convert:expr) => {
                $do!($w, $q, Stored($convert, PhantomData::<$codes>))
            };
        }
        match ($panel.storage, $panel.meaning) {
            (Storage::Pairs, _) => $do!(2, 1, Widened),
            (Storage::Nibbles, _) => stored!(Nibbles, 1, 2, Few($isa.few($numbers))),
            (Storage::Bits3, _) => stored!(Bits3, 3, 8, Few($isa.few($numbers))),
            (Storage::Crumbs, _) => stored!(Crumbs, 1, 4, Few($isa.few($numbers))),
            (Storage::Bits6, Meaning::Float(_)) => stored!(Bits6, 3, 4, Many($isa.many($numbers))),
            (Storage::Bits5, Meaning::Float(_)) => stored!(Bits5, 5, 8, Many($isa.many($numbers))),
            (Storage::Bytes, Meaning::Float(_)) => stored!(Bytes, 1, 1, Many($isa.many($numbers))),
            (Storage::Bits6, _) => stored!(Bits6, 3, 4, Subtracted),
            (Storage::Bits5, _) => stored!(Bits5, 5, 8, Subtracted),
            // Codes of tables have at most 4 bits.
            (Storage::Bytes, _) => stored!(Bytes, 1, 1, Subtracted),
        }
    }};
}

/// `out[row] = Σ_groups scale·Σ (level − zero)·x` for one panel and a few rows of words, each group
/// padded with zeros to whole steps.
///
/// Tiles have `R` rows by the `NV` vectors of a panel, then `R3`, then one; in short groups `RG`, then
/// `R3`. What is not widened is meant for a few rows: `R2`, then `R3`, then one.
#[inline(always)]
pub(crate) fn product<
    V: Bf16<L>,
    const R: usize,
    const R2: usize,
    const R3: usize,
    const RG: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    numbers: &Numbers,
    rows: &[&[i32]],
    out: &mut [[f32; NR]],
) {
    let short = panel.groups > 1 && panel.padded_group() <= 128;
    match panel.storage {
        Storage::Pairs if !short => {
            let (rows, out) = tiles::<V, _, 2, 1, R, NV, L>(isa, panel, Widened, rows, out);
            let (rows, out) = tiles::<V, _, 2, 1, R3, NV, L>(isa, panel, Widened, rows, out);
            tiles::<V, _, 2, 1, 1, NV, L>(isa, panel, Widened, rows, out);
        }
        Storage::Pairs => {
            let (rows, out) = tiles::<V, _, 2, 1, RG, NV, L>(isa, panel, Widened, rows, out);
            let (rows, out) = tiles::<V, _, 2, 1, R3, NV, L>(isa, panel, Widened, rows, out);
            tiles::<V, _, 2, 1, 1, NV, L>(isa, panel, Widened, rows, out);
        }
        _ => {
            macro_rules! few {
                ($w:literal, $q:literal, $unpack:expr) => {{
                    let u = $unpack;
                    let (rows, out) = tiles::<V, _, $w, $q, R2, NV, L>(isa, panel, u, rows, out);
                    let (rows, out) = tiles::<V, _, $w, $q, R3, NV, L>(isa, panel, u, rows, out);
                    tiles::<V, _, $w, $q, 1, NV, L>(isa, panel, u, rows, out);
                }};
            }
            with_codes!(isa, panel, numbers, few)
        }
    }
}

/// As many tiles of `R` rows as there are; the rows that are left over.
#[inline(always)]
fn tiles<
    'r,
    'o,
    V: Bf16<L>,
    U: Unpack<V, W, Q, L>,
    const W: usize,
    const Q: usize,
    const R: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    unpack: U,
    rows: &'r [&'r [i32]],
    out: &'o mut [[f32; NR]],
) -> (&'r [&'r [i32]], &'o mut [[f32; NR]]) {
    let ((full, rest), (full_out, rest_out)) = (rows.as_chunks::<R>(), out.as_chunks_mut::<R>());
    for (rows, out) in full.iter().zip(full_out) {
        tile::<V, U, W, Q, R, NV, L>(isa, panel, unpack, rows, out);
    }
    (rest, rest_out)
}

#[allow(clippy::needless_range_loop, reason = "as in tile::int8_rows")]
#[inline(always)]
fn tile<
    V: Bf16<L>,
    U: Unpack<V, W, Q, L>,
    const W: usize,
    const Q: usize,
    const R: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    unpack: U,
    rows: &[&[i32]; R],
    out: &mut [[f32; NR]; R],
) {
    let mut total = [[isa.zero_f32(); NV]; R];
    for g in 0..panel.groups {
        let codes: &[Step<W, 1, NV, L>] = bytemuck::cast_slice(panel.codes_of(g));
        let (steps, first) = (codes.len(), g * panel.padded_group() / 2);
        let mut zero = [isa.zero_i32(); NV];
        for v in 0..NV {
            zero[v] = integer_zero::<V, NV, L>(isa, panel, g, v);
        }
        let mut x: [&[[[i32; 2]; Q]]; R] = [&[]; R];
        for r in 0..R {
            x[r] = bytemuck::cast_slice(&rows[r][first..][..steps * 2 * Q]);
            x[r] = &x[r][..steps];
        }
        let mut sums = [[isa.zero_f32(); NV]; R];
        // One output feature is one lane and adds from left to right, whatever R is.
        for s in 0..steps {
            // All vectors side by side, or where the words of one fill the registers, one by one.
            let (turns, vectors) = if Q > 2 { (NV, 1) } else { (1, NV) };
            for turn in 0..turns {
                let mut quads = [[[isa.zero_i32(); 2]; Q]; NV];
                for i in 0..vectors {
                    let v = turn * vectors + i;
                    let mut words = [isa.zero_i32(); W];
                    for w in 0..W {
                        words[w] = isa.load_codes(&codes[s][w][0][v]);
                        if R <= 8 {
                            isa.prefetch(&codes[s][w][0][v]);
                        }
                    }
                    quads[i] = unpack.unpack(isa, words, zero[v]);
                }
                for q in 0..Q {
                    for half in 0..2 {
                        for r in 0..R {
                            let x = isa.splat_i32(x[r][s][q][half]);
                            for i in 0..vectors {
                                let sum = &mut sums[r][turn * vectors + i];
                                *sum = isa.dot_bf16(*sum, quads[i][q][half], x);
                            }
                        }
                    }
                }
            }
        }
        for v in 0..NV {
            let scale = panel.scales.load::<V, NV, L>(isa, g, (0, v));
            for r in 0..R {
                total[r][v] = isa.mul_add(total[r][v], sums[r][v], scale);
            }
        }
        if let Zeros::Offset(offsets) = panel.zeros {
            for r in 0..R {
                let mut sum = 0.0;
                for x in x[r].as_flattened().as_flattened() {
                    sum += f32::from_bits((*x as u32) << 16);
                    sum += f32::from_bits(*x as u32 & 0xffff_0000);
                }
                for v in 0..NV {
                    let offset = isa.load_f32(part::<_, NV, L>(&offsets[g], 0, v));
                    total[r][v] = isa.mul_add(total[r][v], isa.splat_f32(sum), offset);
                }
            }
        }
    }
    store(isa, 0, &total, out);
}

/// The zeros of the `v`th vector of a panel that are subtracted from levels.
#[inline(always)]
fn integer_zero<V: Isa<L>, const NV: usize, const L: usize>(
    isa: V,
    panel: &Panel<'_>,
    g: usize,
    v: usize,
) -> V::I32 {
    match panel.zeros {
        Zeros::Constant(zero) => isa.splat_i32(zero),
        Zeros::Bytes(zeros) => isa.load_u8(part::<_, NV, L>(&zeros[g], 0, v)),
        Zeros::Offset(_) => isa.zero_i32(),
    }
}

/// Writes the levels of a panel, zeros subtracted, as those of [`Storage::Pairs`], with the same groups.
#[inline(always)]
pub(crate) fn widen<V: Bf16<L>, const NV: usize, const L: usize>(
    isa: V,
    panel: &Panel<'_>,
    numbers: &Numbers,
    to: &mut [u8],
) {
    macro_rules! all {
        ($w:literal, $q:literal, $unpack:expr) => {
            widen_codes::<V, _, $w, $q, NV, L>(isa, panel, $unpack, to)
        };
    }
    with_codes!(isa, panel, numbers, all)
}

#[allow(clippy::needless_range_loop, reason = "as in tile::int8_rows")]
#[inline(always)]
fn widen_codes<
    V: Bf16<L>,
    U: Unpack<V, W, Q, L>,
    const W: usize,
    const Q: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    unpack: U,
    to: &mut [u8],
) {
    let mut to: &mut [[Step<2, 1, NV, L>; Q]] = bytemuck::cast_slice_mut(to);
    for g in 0..panel.groups {
        let codes: &[Step<W, 1, NV, L>] = bytemuck::cast_slice(panel.codes_of(g));
        let steps = if codes.len() < to.len() { codes.len() } else { to.len() };
        let (these, rest) = to.split_at_mut(steps);
        let codes = &codes[..steps];
        to = rest;
        let mut zero = [isa.zero_i32(); NV];
        for v in 0..NV {
            zero[v] = integer_zero::<V, NV, L>(isa, panel, g, v);
        }
        for s in 0..steps {
            for v in 0..NV {
                let mut words = [isa.zero_i32(); W];
                for w in 0..W {
                    words[w] = isa.load_codes(&codes[s][w][0][v]);
                }
                let quads = unpack.unpack(isa, words, zero[v]);
                for q in 0..Q {
                    for half in 0..2 {
                        isa.store_codes(quads[q][half], &mut these[s][q][half][0][v]);
                    }
                }
            }
        }
    }
}
