//! The loop nest that every kernel shares, over the few instructions in which they differ.

use std::hint::black_box;

use crate::{
    panel::{Float, Meaning, NR, Panel, Zeros, part},
    roofline::Peak,
    storage::{Bits3, Bits5, Bits6, Bytes, Codes, Crumbs, Nibbles, Storage},
};

/// Rows of activations that a kernel is given at most; it takes them in tiles of its own height `R`.
pub(crate) const MR: usize = 32;

/// One row of int8 activations, each group padded with zeros to whole steps.
#[derive(Clone, Copy, Default)]
pub(crate) struct Int8Row<'a> {
    /// In −127..=127, or −128..=127 if the panel has sums.
    pub(crate) codes: &'a [i8],
    /// `Σ codes` of each group.
    pub(crate) sums: &'a [i32],
    /// What the codes of each group count from, and the group's own scale; read only if the panel has
    /// sums.
    pub(crate) zeros: &'a [i32],
    pub(crate) scales: &'a [f32],
}

/// What a kernel has to bring: vectors of `L` lanes, one output feature each.
///
/// A value is the proof that this CPU has the instructions.
pub(crate) trait Isa<const L: usize>: Copy {
    type I32: Copy;
    type F32: Copy;
    /// Sixteen numbers to choose from.
    type Levels: Copy;

    /// What [`dot_bytes`](Self::dot_bytes) subtracts from each code.
    const BYTES_OFFSET: i32;

    fn zero_i32(self) -> Self::I32;
    fn zero_f32(self) -> Self::F32;
    fn load_codes(self, codes: &[[u8; 4]; L]) -> Self::I32;
    fn load_u8(self, x: &[u8; L]) -> Self::I32;
    fn load_u16(self, x: &[u16; L]) -> Self::I32;
    fn load_i32(self, x: &[i32; L]) -> Self::I32;
    fn load_f32(self, x: &[f32; L]) -> Self::F32;
    /// Asks for the cache line [`AHEAD`] bytes behind `codes`, if there is an instruction for it.
    #[inline(always)]
    fn prefetch(self, _codes: &[[u8; 4]; L]) {}
    fn store_codes(self, x: Self::I32, to: &mut [[u8; 4]; L]);
    fn store_f32(self, x: Self::F32, to: &mut [f32; L]);
    fn splat_a(self, a: [i8; 4]) -> Self::I32;
    fn splat_i32(self, x: i32) -> Self::I32;
    fn splat_f32(self, x: f32) -> Self::F32;

    /// Finite numbers of 16 bits.
    #[inline(always)]
    fn load_f16(self, x: &[u16; L]) -> Self::F32 {
        let bits = self.load_u16(x);
        let magnitude = self.shl(self.and(bits, self.splat_i32(0x7fff)), 13);
        let sign = self.shl(self.and(bits, self.splat_i32(0x8000)), 16);
        // 2^(127 − 15), exactly: subnormal numbers too.
        let scale = self.splat_f32(f32::from_bits((254 - 15) << 23));
        self.mul(self.reinterpret(self.or(magnitude, sign)), scale)
    }

    /// `(x >> RIGHT) << LEFT` of every byte, of which one is 0, and the bits of `MASK`.
    fn field<const RIGHT: u32, const LEFT: u32, const MASK: u8>(self, x: Self::I32) -> Self::I32;

    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn or(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Of every lane, as the next.
    fn shl(self, x: Self::I32, by: u32) -> Self::I32;
    /// Zeros come in.
    fn shr(self, x: Self::I32, by: u32) -> Self::I32;
    /// Of every half of a lane, the lower half of the product.
    fn mul_u16(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `table[code]` of every byte, where codes lie in 0..=15.
    fn lookup(self, table: &[u8; 16], codes: Self::I32) -> Self::I32;

    /// `acc + Σ_{i<4} code_i·a_i` in every lane, exactly. Codes lie in 0..=127, a in −128..=127.
    fn dot_small(self, acc: Self::I32, codes: Self::I32, a: Self::I32) -> Self::I32;

    /// `acc + Σ_{i<4} (code_i − BYTES_OFFSET)·a_i` in every lane, exactly. Codes lie in 0..=255, a in
    /// −127..=127.
    fn dot_bytes(self, acc: Self::I32, codes: Self::I32, a: Self::I32) -> Self::I32;

    /// As [`dot_bytes`](Self::dot_bytes), with a in −128..=127.
    #[inline(always)]
    fn dot_bytes_by_any(self, acc: Self::I32, codes: Self::I32, a: Self::I32) -> Self::I32 {
        self.dot_bytes(acc, codes, a)
    }

    /// Modulo 2^32, as the next two.
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `acc − x·by`
    fn sub_mul(self, acc: Self::I32, x: Self::I32, by: i32) -> Self::I32;

    fn levels(self, levels: &[f32; 16]) -> Self::Levels;
    /// `levels[code]` in every lane, by the lowest four bits.
    fn level(self, levels: Self::Levels, codes: Self::I32) -> Self::F32;

    fn reinterpret(self, x: Self::I32) -> Self::F32;
    fn to_f32(self, x: Self::I32) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `acc + a·b`, fused where the CPU can.
    fn mul_add(self, acc: Self::F32, a: Self::F32, b: Self::F32) -> Self::F32;
}

/// How far ahead of its use a code is fetched where each is used by a few rows only: memory is all that
/// counts then.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "nothing is fetched elsewhere"))]
pub(crate) const AHEAD: usize = 2048;

/// The codes of a step: words of a panel's rows, in `H` parts of `NV` vectors.
pub(crate) type Step<const W: usize, const H: usize, const NV: usize, const L: usize> =
    [[[[[u8; 4]; L]; NV]; H]; W];

/// What the codes of [`int8_rows`] are, known to the compiler.
mod product {
    /// Below 128, multiplied as they are.
    pub(super) const SMALL: u8 = 0;
    /// Bytes.
    pub(super) const BYTES: u8 = 1;
    /// Bytes, by activations of −128 too.
    pub(super) const BYTES_BY_ANY: u8 = 2;
    /// Looked up in a table of bytes.
    pub(super) const TABLE: u8 = 3;
    /// Looked up in two tables, of low and of high bytes.
    pub(super) const TWO_TABLES: u8 = 4;
    /// Multiplied by the scale of their group, of a panel with one sum.
    pub(super) const SCALED: u8 = 5;
}

/// `out[row] = Σ_groups Σ (level − zero)·a · scale` for one panel and up to [`MR`] rows, every product
/// and sum of f32 rounded on its own. With a panel that has sums,
/// `out[row] = Σ_groups Σ (level − zero)·(a − row's zero) · scale · row's scale`.
///
/// Tiles have `R` rows by `NV` vectors, as many as there are registers for; `H` of them side by side
/// make a panel. Rows that are left over make tiles of `R2` and of `R3`, and the last ones go one by
/// one, by `NV1` vectors, `H1` times. In short groups tiles have `RG` rows, if fewer are faster because
/// sums and totals are in registers together. Codes that have to be unpacked first are meant for a few rows:
/// for more, [`widen`] them.
#[inline(always)]
pub(crate) fn int8<
    V: Isa<L>,
    const R: usize,
    const R2: usize,
    const R3: usize,
    const RG: usize,
    const H: usize,
    const NV: usize,
    const H1: usize,
    const NV1: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[Int8Row<'_>],
    out: &mut [[f32; NR]],
) {
    macro_rules! tiles {
        ($codes:ty, $w:literal, $q:literal, $product:expr, $($height:ident),*) => {{
            const PRODUCT: u8 = $product;
            $(let (rows, out) =
                int8_tiles::<V, $codes, $w, $q, PRODUCT, $height, H, NV, L>(isa, panel, rows, out);)*
            int8_tiles::<V, $codes, $w, $q, PRODUCT, 1, H1, NV1, L>(isa, panel, rows, out);
        }};
    }
    use product::*;
    // Of several in a row.
    let group = if panel.groups > 1 { panel.padded_group() } else { usize::MAX };
    if panel.one_sum {
        match panel.storage {
            Storage::Bytes => tiles!(Bytes, 1, 1, SCALED, R3),
            Storage::Bits6 => tiles!(Bits6, 3, 4, SCALED, R3),
            Storage::Bits5 => tiles!(Bits5, 5, 8, SCALED, R3),
            Storage::Nibbles => tiles!(Nibbles, 1, 2, SCALED, R2, R3),
            Storage::Bits3 => tiles!(Bits3, 3, 8, SCALED, R3),
            Storage::Crumbs => tiles!(Crumbs, 1, 4, SCALED, R3),
            Storage::Pairs => {}
        }
        return;
    }
    match (panel.storage, panel.meaning) {
        (Storage::Bytes, Meaning::Int) if panel.sums.is_empty() && RG < R && group <= 128 => {
            tiles!(Bytes, 1, 1, BYTES, RG, R3);
        }
        (Storage::Bytes, Meaning::Int) if panel.sums.is_empty() => {
            tiles!(Bytes, 1, 1, BYTES, R, R2, R3);
        }
        (Storage::Bytes, Meaning::Int) => tiles!(Bytes, 1, 1, BYTES_BY_ANY, R3),
        (Storage::Bits6, _) => tiles!(Bits6, 3, 4, SMALL, R3),
        (Storage::Bits5, _) => tiles!(Bits5, 5, 8, SMALL, R3),
        (Storage::Nibbles, Meaning::Table(table)) => match table.high {
            None if group < 64 => tiles!(Nibbles, 1, 2, TABLE, R3),
            None => tiles!(Nibbles, 1, 2, TABLE, R2, R3),
            Some(_) => tiles!(Nibbles, 1, 2, TWO_TABLES, R3),
        },
        (Storage::Nibbles, _) if group < 64 => tiles!(Nibbles, 1, 2, SMALL, R3),
        (Storage::Nibbles, _) => tiles!(Nibbles, 1, 2, SMALL, R2, R3),
        (Storage::Bits3, Meaning::Table(table)) => match table.high {
            None => tiles!(Bits3, 3, 8, TABLE, R3),
            Some(_) => tiles!(Bits3, 3, 8, TWO_TABLES,),
        },
        (Storage::Bits3, _) => tiles!(Bits3, 3, 8, SMALL, R3),
        (Storage::Crumbs, Meaning::Table(table)) => match table.high {
            None => tiles!(Crumbs, 1, 4, TABLE, R3),
            Some(_) => tiles!(Crumbs, 1, 4, TWO_TABLES,),
        },
        (Storage::Crumbs, _) => tiles!(Crumbs, 1, 4, SMALL, R3),
        // Packing makes none of these.
        (Storage::Pairs, _) | (Storage::Bytes, Meaning::Table(_) | Meaning::Float(_)) => {}
    };
}

/// As many tiles of `R` rows as there are; the rows that are left over.
#[inline(always)]
fn int8_tiles<
    'r,
    'o,
    V: Isa<L>,
    C: Codes<W, Q>,
    const W: usize,
    const Q: usize,
    const PRODUCT: u8,
    const R: usize,
    const H: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &'r [Int8Row<'r>],
    out: &'o mut [[f32; NR]],
) -> (&'r [Int8Row<'r>], &'o mut [[f32; NR]]) {
    let ((full, rest), (full_out, rest_out)) = (rows.as_chunks::<R>(), out.as_chunks_mut::<R>());
    for (rows, out) in full.iter().zip(full_out) {
        int8_rows::<V, C, W, Q, PRODUCT, R, H, NV, L>(isa, panel, rows, out);
    }
    (rest, rest_out)
}

// Hot loops count with indices: an iterator's adapters are functions that may stay calls, into code
// that is not compiled for the instruction set at hand.
#[allow(clippy::needless_range_loop, reason = "see above")]
#[inline(always)]
fn int8_rows<
    V: Isa<L>,
    C: Codes<W, Q>,
    const W: usize,
    const Q: usize,
    const PRODUCT: u8,
    const R: usize,
    const H: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[Int8Row<'_>; R],
    out: &mut [[f32; NR]; R],
) {
    const NO_TABLE: [u8; 16] = [0; 16];
    let (low_table, high_table) = match panel.meaning {
        Meaning::Table(table) => (&table.low, table.high.as_ref().unwrap_or(&NO_TABLE)),
        _ => (&NO_TABLE, &NO_TABLE),
    };
    // What the products below have subtracted from each level.
    let offset = match PRODUCT {
        product::SMALL => 0,
        product::TWO_TABLES => 257 * V::BYTES_OFFSET,
        _ => V::BYTES_OFFSET,
    };
    for h in 0..H {
        let mut total = [[isa.zero_f32(); NV]; R];
        let mut dots = [[isa.zero_i32(); NV]; R];
        for g in 0..panel.groups {
            let codes: &[Step<W, H, NV, L>] = bytemuck::cast_slice(panel.codes_of(g));
            let (steps, first) = (codes.len(), g * panel.padded_group());
            let mut a: [&[[[i8; 4]; Q]]; R] = [&[]; R];
            for r in 0..R {
                a[r] = bytemuck::cast_slice(&rows[r].codes[first..][..steps * 4 * Q]);
                a[r] = &a[r][..steps];
            }
            let mut factors = [(isa.zero_i32(), isa.zero_i32()); NV];
            if PRODUCT == product::SCALED {
                for v in 0..NV {
                    factors[v] = panel.factors::<V, NV, L>(isa, g, (h, v));
                }
            } else {
                dots = [[isa.zero_i32(); NV]; R];
            }
            let mut high_dots = [[isa.zero_i32(); NV]; R];
            for s in 0..steps {
                let mut words = [[isa.zero_i32(); W]; NV];
                for w in 0..W {
                    for v in 0..NV {
                        words[v][w] = isa.load_codes(&codes[s][w][h][v]);
                        if R <= 8 {
                            isa.prefetch(&codes[s][w][h][v]);
                        }
                    }
                }
                let mut quads = [[isa.zero_i32(); Q]; NV];
                for v in 0..NV {
                    quads[v] = C::quads(isa, words[v]);
                }
                for q in 0..Q {
                    let (mut low, mut high) = ([isa.zero_i32(); NV], [isa.zero_i32(); NV]);
                    for v in 0..NV {
                        low[v] = match PRODUCT {
                            product::TABLE | product::TWO_TABLES => {
                                isa.lookup(low_table, quads[v][q])
                            }
                            product::SCALED => scaled(isa, quads[v][q], factors[v]),
                            _ => quads[v][q],
                        };
                        if PRODUCT == product::TWO_TABLES {
                            high[v] = isa.lookup(high_table, quads[v][q]);
                        }
                    }
                    for r in 0..R {
                        let a = isa.splat_a(a[r][s][q]);
                        for v in 0..NV {
                            let (dot, low) = (dots[r][v], low[v]);
                            dots[r][v] = match PRODUCT {
                                product::SMALL => isa.dot_small(dot, low, a),
                                product::BYTES => isa.dot_bytes(dot, low, a),
                                _ => isa.dot_bytes_by_any(dot, low, a),
                            };
                            if PRODUCT == product::TWO_TABLES {
                                high_dots[r][v] = isa.dot_bytes_by_any(high_dots[r][v], high[v], a);
                            }
                        }
                    }
                }
            }
            if PRODUCT == product::TWO_TABLES {
                for r in 0..R {
                    for v in 0..NV {
                        dots[r][v] = isa.add_i32(dots[r][v], isa.shl(high_dots[r][v], 8));
                    }
                }
            }
            if PRODUCT != product::SCALED {
                flush_group(isa, panel, (g, h, offset), rows, &dots, &mut total);
            }
        }
        if PRODUCT == product::SCALED && panel.groups > 0 {
            let panel = &panel.of_scaled(&[]);
            flush_group(isa, panel, (0, h, offset), rows, &dots, &mut total);
        }
        store(isa, h, &total, out);
    }
}

/// `code·scale + bias` of every byte, which fits it, see [`Panel::factors`].
#[inline(always)]
fn scaled<V: Isa<L>, const L: usize>(
    isa: V,
    codes: V::I32,
    (scale, bias): (V::I32, V::I32),
) -> V::I32 {
    isa.add_i32(isa.mul_u16(codes, scale), bias)
}

/// Adds the integer sums of group `g` to the totals of the `h`th part of a panel. `offset` has been
/// subtracted from every level.
#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
pub(crate) fn flush_group<V: Isa<L>, const R: usize, const NV: usize, const L: usize>(
    isa: V,
    panel: &Panel<'_>,
    (g, h, offset): (usize, usize, i32),
    rows: &[Int8Row<'_>; R],
    dots: &[[V::I32; NV]; R],
    total: &mut [[V::F32; NV]; R],
) {
    let unit = isa.splat_f32(panel.unit);
    let mut scales = [isa.zero_f32(); NV];
    let mut zeros = [isa.zero_i32(); NV];
    for v in 0..NV {
        scales[v] = isa.mul(panel.scales.load::<V, NV, L>(isa, g, (h, v)), unit);
        if let Zeros::Bytes(bytes) = panel.zeros {
            let bytes = isa.load_u8(part::<_, NV, L>(&bytes[g], h, v));
            zeros[v] = isa.sub_i32(bytes, isa.splat_i32(offset));
        }
    }
    let shared_zero = match panel.zeros {
        Zeros::Constant(zero) => Some(zero - offset),
        Zeros::Offset(_) => Some(-offset),
        Zeros::Bytes(_) => None,
    };
    // Loops over dots and totals are short enough to be unrolled, or both would live in memory.
    let mut differences = *dots;
    // Differences fit; dot and zero·sum alone need not, and wrap around consistently.
    if let Some(zero) = shared_zero {
        for r in 0..R {
            let product = isa.splat_i32(zero.wrapping_mul(rows[r].sums[g]));
            for v in 0..NV {
                differences[r][v] = isa.sub_i32(differences[r][v], product);
            }
        }
    } else {
        for r in 0..R {
            for v in 0..NV {
                differences[r][v] = isa.sub_mul(differences[r][v], zeros[v], rows[r].sums[g]);
            }
        }
    }
    if panel.sums.is_empty() {
        for r in 0..R {
            for v in 0..NV {
                let term = isa.mul(isa.to_f32(differences[r][v]), scales[v]);
                total[r][v] = isa.add(total[r][v], term);
            }
        }
    } else {
        for r in 0..R {
            for v in 0..NV {
                let sums = isa.load_i32(part::<_, NV, L>(&panel.sums[g], h, v));
                let dot = isa.sub_mul(differences[r][v], sums, rows[r].zeros[g]);
                if panel.exact {
                    total[r][v] = isa.reinterpret(dot);
                    continue;
                }
                let term = isa.mul(isa.to_f32(dot), scales[v]);
                let term = isa.mul(term, isa.splat_f32(rows[r].scales[g]));
                total[r][v] = isa.add(total[r][v], term);
            }
        }
    }
    if let Zeros::Offset(offsets) = panel.zeros {
        for r in 0..R {
            for v in 0..NV {
                let offset = isa.load_f32(part::<_, NV, L>(&offsets[g], h, v));
                let term = isa.mul(offset, isa.splat_f32(rows[r].sums[g] as f32));
                total[r][v] = isa.add(total[r][v], term);
            }
        }
    }
}

/// `out[row] = Σ_groups scale·Σ (level − zero)·x` for one panel and up to [`MR`] rows, each group
/// of a row padded with zeros to whole steps.
#[inline(always)]
pub(crate) fn f32<
    V: Isa<L>,
    const R: usize,
    const R3: usize,
    const H: usize,
    const NV: usize,
    const H1: usize,
    const NV1: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[&[f32]],
    out: &mut [[f32; NR]],
) {
    macro_rules! tiles {
        ($codes:ty, $w:literal, $q:literal, $decode:expr, $($height:ident),*) => {{
            let decode = $decode;
            $(let (rows, out) =
                f32_tiles::<V, $codes, _, $w, $q, $height, H, NV, L>(isa, panel, decode, rows, out);)*
            f32_tiles::<V, $codes, _, $w, $q, 1, H1, NV1, L>(isa, panel, decode, rows, out);
        }};
    }
    match (panel.storage, panel.meaning) {
        (Storage::Bytes, Meaning::Int) => tiles!(Bytes, 1, 1, Integer, R, R3),
        (Storage::Bytes, Meaning::Float(float)) => tiles!(Bytes, 1, 1, *float, R, R3),
        (Storage::Bytes, Meaning::Table(table)) => {
            tiles!(Bytes, 1, 1, Looked(isa.levels(&table.levels)), R, R3);
        }
        (Storage::Bits6, Meaning::Float(float)) => tiles!(Bits6, 3, 4, *float,),
        (Storage::Bits5, Meaning::Float(float)) => tiles!(Bits5, 5, 8, *float,),
        (Storage::Nibbles, Meaning::Table(table)) => {
            tiles!(Nibbles, 1, 2, Looked(isa.levels(&table.levels)),);
        }
        (Storage::Bits3, Meaning::Table(table)) => {
            tiles!(Bits3, 3, 8, Looked(isa.levels(&table.levels)),);
        }
        (Storage::Crumbs, Meaning::Table(table)) => {
            tiles!(Crumbs, 1, 4, Looked(isa.levels(&table.levels)),);
        }
        (Storage::Bits6, _) => tiles!(Bits6, 3, 4, Integer,),
        (Storage::Bits5, _) => tiles!(Bits5, 5, 8, Integer,),
        (Storage::Nibbles, _) => tiles!(Nibbles, 1, 2, Integer,),
        (Storage::Bits3, _) => tiles!(Bits3, 3, 8, Integer,),
        (Storage::Crumbs, _) => tiles!(Crumbs, 1, 4, Integer,),
        (Storage::Pairs, _) => {} // as for int8
    };
}

/// How the byte of a code becomes a number.
pub(crate) trait Decode<V: Isa<L>, const L: usize>: Copy {
    /// The level of the code in byte `SHIFT / 8` of every lane.
    fn decode<const SHIFT: u32>(self, isa: V, codes: V::I32) -> V::F32;
}

#[derive(Clone, Copy)]
pub(crate) struct Integer;

impl<V: Isa<L>, const L: usize> Decode<V, L> for Integer {
    #[inline(always)]
    fn decode<const SHIFT: u32>(self, isa: V, codes: V::I32) -> V::F32 {
        isa.to_f32(isa.and(isa.shr(codes, SHIFT), isa.splat_i32(255)))
    }
}

#[derive(Clone, Copy)]
struct Looked<T>(T);

impl<V: Isa<L>, const L: usize> Decode<V, L> for Looked<V::Levels> {
    #[inline(always)]
    fn decode<const SHIFT: u32>(self, isa: V, codes: V::I32) -> V::F32 {
        isa.level(self.0, isa.shr(codes, SHIFT))
    }
}

impl<V: Isa<L>, const L: usize> Decode<V, L> for Float {
    #[inline(always)]
    fn decode<const SHIFT: u32>(self, isa: V, codes: V::I32) -> V::F32 {
        let code = isa.and(isa.shr(codes, SHIFT), isa.splat_i32(255));
        let magnitude = isa.shl(isa.and(code, isa.splat_i32(self.magnitude)), self.shift);
        let sign = isa.and(isa.shl(code, self.sign_shift), isa.splat_i32(i32::MIN));
        isa.mul(isa.reinterpret(isa.or(magnitude, sign)), isa.splat_f32(self.scale))
    }
}

/// As many tiles of `R` rows as there are; the rows that are left over.
#[inline(always)]
fn f32_tiles<
    'r,
    'o,
    V: Isa<L>,
    C: Codes<W, Q>,
    D: Decode<V, L>,
    const W: usize,
    const Q: usize,
    const R: usize,
    const H: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    decode: D,
    rows: &'r [&'r [f32]],
    out: &'o mut [[f32; NR]],
) -> (&'r [&'r [f32]], &'o mut [[f32; NR]]) {
    let ((full, rest), (full_out, rest_out)) = (rows.as_chunks::<R>(), out.as_chunks_mut::<R>());
    for (rows, out) in full.iter().zip(full_out) {
        f32_rows::<V, C, D, W, Q, R, H, NV, L>(isa, panel, decode, rows, out);
    }
    (rest, rest_out)
}

#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
fn f32_rows<
    V: Isa<L>,
    C: Codes<W, Q>,
    D: Decode<V, L>,
    const W: usize,
    const Q: usize,
    const R: usize,
    const H: usize,
    const NV: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    decode: D,
    rows: &[&[f32]; R],
    out: &mut [[f32; NR]; R],
) {
    for h in 0..H {
        let mut total = [[isa.zero_f32(); NV]; R];
        for g in 0..panel.groups {
            let codes: &[Step<W, H, NV, L>] = bytemuck::cast_slice(panel.codes_of(g));
            let (steps, first) = (codes.len(), g * panel.padded_group());
            let mut zero = [isa.zero_f32(); NV];
            for v in 0..NV {
                zero[v] = match panel.zeros {
                    Zeros::Constant(x) => isa.splat_f32(x as f32),
                    Zeros::Bytes(x) => isa.to_f32(isa.load_u8(part::<_, NV, L>(&x[g], h, v))),
                    Zeros::Offset(_) => isa.zero_f32(),
                };
            }
            let mut x: [&[[[f32; 4]; Q]]; R] = [&[]; R];
            for r in 0..R {
                x[r] = bytemuck::cast_slice(&rows[r][first..][..steps * 4 * Q]);
                x[r] = &x[r][..steps];
            }
            let mut sums = [[isa.zero_f32(); NV]; R];
            // One output feature is one lane and adds from left to right, whatever R and NV are.
            for s in 0..steps {
                let mut words = [[isa.zero_i32(); W]; NV];
                for w in 0..W {
                    for v in 0..NV {
                        words[v][w] = isa.load_codes(&codes[s][w][h][v]);
                        if R <= 8 {
                            isa.prefetch(&codes[s][w][h][v]);
                        }
                    }
                }
                let mut quads = [[isa.zero_i32(); Q]; NV];
                for v in 0..NV {
                    quads[v] = C::quads(isa, words[v]);
                }
                for q in 0..Q {
                    macro_rules! feature {
                        ($j:literal, $shift:literal) => {
                            let mut levels = [isa.zero_f32(); NV];
                            for v in 0..NV {
                                let level = decode.decode::<$shift>(isa, quads[v][q]);
                                levels[v] = isa.sub(level, zero[v]);
                            }
                            for r in 0..R {
                                let x = isa.splat_f32(x[r][s][q][$j]);
                                for v in 0..NV {
                                    sums[r][v] = isa.mul_add(sums[r][v], x, levels[v]);
                                }
                            }
                        };
                    }
                    feature!(0, 0);
                    feature!(1, 8);
                    feature!(2, 16);
                    feature!(3, 24);
                }
            }
            for v in 0..NV {
                let scale = panel.scales.load::<V, NV, L>(isa, g, (h, v));
                for r in 0..R {
                    total[r][v] = isa.mul_add(total[r][v], sums[r][v], scale);
                }
                if let Zeros::Offset(offsets) = panel.zeros {
                    let offset = isa.load_f32(part::<_, NV, L>(&offsets[g], h, v));
                    for r in 0..R {
                        let mut sum = 0.0;
                        for x in x[r].as_flattened().as_flattened() {
                            sum += *x;
                        }
                        total[r][v] = isa.mul_add(total[r][v], isa.splat_f32(sum), offset);
                    }
                }
            }
        }
        store(isa, h, &total, out);
    }
}

/// Writes the codes of a panel as those of [`Storage::Bytes`], with the same groups. With `look_up`, what
/// a table of bytes says of them. Those of a panel with one sum are multiplied by their scales, see
/// [`Panel::of_scaled`].
#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
pub(crate) fn widen<V: Isa<L>, const PANEL: usize, const L: usize>(
    isa: V,
    panel: &Panel<'_>,
    look_up: bool,
    to: &mut [u8],
) {
    match panel.storage {
        Storage::Bytes | Storage::Pairs => {}
        Storage::Bits6 => widen_codes::<V, Bits6, 3, 4, PANEL, L>(isa, panel, look_up, to),
        Storage::Bits5 => widen_codes::<V, Bits5, 5, 8, PANEL, L>(isa, panel, look_up, to),
        Storage::Nibbles => widen_codes::<V, Nibbles, 1, 2, PANEL, L>(isa, panel, look_up, to),
        Storage::Bits3 => widen_codes::<V, Bits3, 3, 8, PANEL, L>(isa, panel, look_up, to),
        Storage::Crumbs => widen_codes::<V, Crumbs, 1, 4, PANEL, L>(isa, panel, look_up, to),
    }
}

#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
fn widen_codes<
    V: Isa<L>,
    C: Codes<W, Q>,
    const W: usize,
    const Q: usize,
    const PANEL: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    look_up: bool,
    to: &mut [u8],
) {
    let mut to: &mut [Step<Q, 1, PANEL, L>] = bytemuck::cast_slice_mut(to);
    // All codes at once where nothing depends on the group.
    let groups = if panel.one_sum { panel.groups } else { 1 };
    for g in 0..groups {
        let codes = if panel.one_sum { panel.codes_of(g) } else { panel.codes };
        let codes: &[Step<W, 1, PANEL, L>] = bytemuck::cast_slice(codes);
        let steps = if codes.len() < to.len() { codes.len() } else { to.len() };
        let (these, rest) = to.split_at_mut(steps);
        let codes = &codes[..steps];
        to = rest;
        let mut factors = [(isa.zero_i32(), isa.zero_i32()); PANEL];
        if panel.one_sum {
            for v in 0..PANEL {
                factors[v] = panel.factors::<V, PANEL, L>(isa, g, (0, v));
            }
        }
        for s in 0..steps {
            for v in 0..PANEL {
                let mut words = [isa.zero_i32(); W];
                for w in 0..W {
                    words[w] = isa.load_codes(&codes[s][w][0][v]);
                }
                let quads = C::quads(isa, words);
                for q in 0..Q {
                    let codes = match panel.meaning {
                        _ if panel.one_sum => scaled(isa, quads[q], factors[v]),
                        Meaning::Table(table) if look_up => isa.lookup(&table.low, quads[q]),
                        _ => quads[q],
                    };
                    isa.store_codes(codes, &mut these[s][q][0][v]);
                }
            }
        }
    }
}

/// The inner operation of a product, `rounds` times on twelve accumulators and nothing else. Gives
/// the number of multiplications and additions.
#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
pub(crate) fn peak<V: Isa<L>, const L: usize>(isa: V, peak: Peak, rounds: u64) -> f64 {
    const ACCUMULATORS: usize = 12;
    let mut out = [0.0; L];
    let per_operation = match peak {
        Peak::Int8 => {
            let (codes, a) = ([[7; 4]; L], [3; 4]);
            let mut dots = [isa.zero_i32(); ACCUMULATORS];
            for _ in 0..rounds {
                // Loaded anew, so that nothing of the product is known before the loop.
                let (codes, a) = (isa.load_codes(black_box(&codes)), isa.splat_a(*black_box(&a)));
                for i in 0..ACCUMULATORS {
                    dots[i] = isa.dot_bytes(dots[i], codes, a);
                }
            }
            for dot in dots {
                isa.store_f32(isa.to_f32(dot), &mut out);
                black_box(&out);
            }
            8
        }
        Peak::F32 => {
            let x = isa.load_f32(&black_box([0.75; L]));
            let scale = isa.splat_f32(1.0);
            let mut sums = [isa.zero_f32(); ACCUMULATORS];
            for _ in 0..rounds {
                for i in 0..ACCUMULATORS {
                    sums[i] = isa.mul_add(sums[i], x, scale);
                }
            }
            for sum in sums {
                isa.store_f32(sum, &mut out);
                black_box(&out);
            }
            2
        }
    };
    rounds as f64 * (ACCUMULATORS * L * per_operation) as f64
}

/// Stores the `h`th part of a panel.
#[inline(always)]
pub(crate) fn store<V: Isa<L>, const R: usize, const NV: usize, const L: usize>(
    isa: V,
    h: usize,
    total: &[[V::F32; NV]; R],
    out: &mut [[f32; NR]; R],
) {
    for r in 0..R {
        let out: &mut [[[f32; L]; NV]] = bytemuck::cast_slice_mut(&mut out[r]);
        for v in 0..NV {
            isa.store_f32(total[r][v], &mut out[h][v]);
        }
    }
}
