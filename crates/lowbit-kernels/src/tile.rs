//! The loop nest that every kernel shares, over the few instructions in which they differ.

use std::hint::black_box;

use crate::roofline::Peak;

/// Output features of a panel. Two vectors of AVX-512, four of AVX2.
pub(crate) const NR: usize = 32;

/// Rows of activations that a kernel is given at most; it takes them in tiles of its own height `R`.
pub(crate) const MR: usize = 32;

/// How a panel holds its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// A byte each, for 5 to 8 bits. A step is 4 input features.
    Bytes,
    /// Two to a byte, for 1 to 4 bits. A step is 8 input features: byte `j` of a row's four holds
    /// feature `j` in its low and feature `4 + j` in its high half.
    Nibbles,
}

impl Storage {
    /// Input features whose codes fill the four bytes that a row has in a step.
    pub(crate) const fn k_per_step(self) -> usize {
        match self {
            Self::Bytes => 4,
            Self::Nibbles => 8,
        }
    }

    /// Steps of a group of `group_size`, the last one padded.
    pub(crate) const fn steps_of_group(self, group_size: usize) -> usize {
        group_size.div_ceil(self.k_per_step())
    }

    /// Steps of a row of `k` in groups of `group_size`, the last group short or not.
    pub(crate) const fn steps(self, group_size: usize, k: usize) -> usize {
        k / group_size * self.steps_of_group(group_size) + self.steps_of_group(k % group_size)
    }

    /// Step, byte and shift of the `j`th code of a group.
    pub(crate) const fn place(self, j: usize) -> (usize, usize, u32) {
        let within = j % self.k_per_step();
        (j / self.k_per_step(), within % 4, if within < 4 { 0 } else { 4 })
    }
}

/// The packed weights of [`NR`] output features.
pub(crate) struct Panel<'a> {
    /// `[steps of all groups][NR][4]`
    pub(crate) codes: &'a [u8],
    /// `[groups][NR]`
    pub(crate) scales: &'a [[f32; NR]],
    /// `[groups][NR]`
    pub(crate) zeros: &'a [[u8; NR]],
    /// `Σ (code − zero)`, `[groups][NR]`; empty unless activations have zeros, or scales for each group.
    pub(crate) sums: &'a [[i32; NR]],
    /// Do totals become the bits of the integer sums of the only group? The panel has sums then.
    pub(crate) exact: bool,
    pub(crate) storage: Storage,
    /// Steps of a full group.
    pub(crate) steps: usize,
    /// Codes that a later call reads, to be fetched into L2 meanwhile.
    pub(crate) next: &'a [u8],
}

impl Panel<'_> {
    /// Input features of a full group, padded to whole steps.
    #[inline(always)]
    pub(crate) fn padded_group(&self) -> usize {
        self.steps * self.storage.k_per_step()
    }

    /// The codes of group `g`; the last group may be shorter.
    #[inline(always)]
    pub(crate) fn codes_of(&self, g: usize) -> &[u8] {
        let full = self.steps * 4 * NR;
        let rest = &self.codes[g * full..];
        &rest[..if rest.len() < full { rest.len() } else { full }]
    }
}

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

    /// What [`dot_bytes`](Self::dot_bytes) subtracts from each code.
    const BYTES_OFFSET: i32;

    fn zero_i32(self) -> Self::I32;
    fn zero_f32(self) -> Self::F32;
    fn load_codes(self, codes: &[[u8; 4]; L]) -> Self::I32;
    /// `zeros − offset`
    fn load_zeros(self, zeros: &[u8; L], offset: i32) -> Self::I32;
    fn load_i32(self, x: &[i32; L]) -> Self::I32;
    fn load_f32(self, x: &[f32; L]) -> Self::F32;
    fn store_f32(self, x: Self::F32, to: &mut [f32; L]);
    fn splat_a(self, a: [i8; 4]) -> Self::I32;
    fn splat_f32(self, x: f32) -> Self::F32;

    /// The low and the high halves of all bytes.
    fn nibbles(self, codes: Self::I32) -> (Self::I32, Self::I32);

    /// `acc + Σ_{i<4} code_i·a_i` in every lane, exactly. Codes lie in 0..=15, a in −128..=127.
    fn dot_nibbles(self, acc: Self::I32, codes: Self::I32, a: Self::I32) -> Self::I32;

    /// `acc + Σ_{i<4} (code_i − BYTES_OFFSET)·a_i` in every lane, exactly. Codes lie in 0..=255, a in
    /// −127..=127.
    fn dot_bytes(self, acc: Self::I32, codes: Self::I32, a: Self::I32) -> Self::I32;

    /// As [`dot_bytes`](Self::dot_bytes), with a in −128..=127.
    #[inline(always)]
    fn dot_bytes_by_any(self, acc: Self::I32, codes: Self::I32, a: Self::I32) -> Self::I32 {
        self.dot_bytes(acc, codes, a)
    }

    /// `acc − x·by`, modulo 2^32.
    fn sub_mul(self, acc: Self::I32, x: Self::I32, by: i32) -> Self::I32;

    /// `f32((codes >> shift) & mask)`
    fn level<const SHIFT: u32, const MASK: i32>(self, codes: Self::I32) -> Self::F32;

    fn to_f32(self, x: Self::I32) -> Self::F32;
    fn reinterpret(self, x: Self::I32) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `acc + a·b`, fused where the CPU can.
    fn mul_add(self, acc: Self::F32, a: Self::F32, b: Self::F32) -> Self::F32;
}

/// `out[row] = Σ_groups Σ (code − zero)·a · scale` for one panel and up to [`MR`] rows, every product
/// and sum of f32 rounded on its own. With a panel that has sums,
/// `out[row] = Σ_groups Σ (code − zero)·(a − row's zero) · scale · row's scale`.
///
/// Tiles have `R` rows by `NV` vectors, as many as there are registers for; `H` of them side by side
/// make a panel. Rows that are left over make tiles of `R2` and of `R3`, and the last ones go one by
/// one, with all `PANEL` vectors of a panel.
#[inline(always)]
pub(crate) fn int8<
    V: Isa<L>,
    const R: usize,
    const R2: usize,
    const R3: usize,
    const H: usize,
    const NV: usize,
    const PANEL: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[Int8Row<'_>],
    out: &mut [[f32; NR]],
) {
    if panel.sums.is_empty() {
        let (rows, out) = int8_tiles::<V, R, H, NV, L, false>(isa, panel, rows, out);
        let (rows, out) = int8_tiles::<V, R2, H, NV, L, false>(isa, panel, rows, out);
        let (rows, out) = int8_tiles::<V, R3, H, NV, L, false>(isa, panel, rows, out);
        int8_tiles::<V, 1, 1, PANEL, L, false>(isa, panel, rows, out);
    } else {
        let (rows, out) = int8_tiles::<V, R, H, NV, L, true>(isa, panel, rows, out);
        let (rows, out) = int8_tiles::<V, R2, H, NV, L, true>(isa, panel, rows, out);
        let (rows, out) = int8_tiles::<V, R3, H, NV, L, true>(isa, panel, rows, out);
        int8_tiles::<V, 1, 1, PANEL, L, true>(isa, panel, rows, out);
    }
}

/// As many tiles of `R` rows as there are; the rows that are left over.
#[inline(always)]
fn int8_tiles<
    'r,
    'o,
    V: Isa<L>,
    const R: usize,
    const H: usize,
    const NV: usize,
    const L: usize,
    const AFFINE: bool,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &'r [Int8Row<'r>],
    out: &'o mut [[f32; NR]],
) -> (&'r [Int8Row<'r>], &'o mut [[f32; NR]]) {
    let ((full, rest), (full_out, rest_out)) = (rows.as_chunks::<R>(), out.as_chunks_mut::<R>());
    for (rows, out) in full.iter().zip(full_out) {
        int8_rows::<V, R, H, NV, L, AFFINE>(isa, panel, rows, out);
    }
    (rest, rest_out)
}

// Hot loops count with indices: an iterator's adapters are functions that may stay calls, into code
// that is not compiled for the instruction set at hand.
#[allow(clippy::needless_range_loop, reason = "see above")]
#[inline(always)]
fn int8_rows<
    V: Isa<L>,
    const R: usize,
    const H: usize,
    const NV: usize,
    const L: usize,
    const AFFINE: bool,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[Int8Row<'_>; R],
    out: &mut [[f32; NR]; R],
) {
    for h in 0..H {
        let mut total = [[isa.zero_f32(); NV]; R];
        for g in 0..panel.scales.len() {
            let codes: &[[[[[u8; 4]; L]; NV]; H]] = bytemuck::cast_slice(panel.codes_of(g));
            let (steps, first) = (codes.len(), g * panel.padded_group());
            let mut dots = [[isa.zero_i32(); NV]; R];
            let offset = match panel.storage {
                Storage::Nibbles => {
                    let mut a: [&[[[i8; 4]; 2]]; R] = [&[]; R];
                    for r in 0..R {
                        a[r] = bytemuck::cast_slice(&rows[r].codes[first..][..steps * 8]);
                        a[r] = &a[r][..steps];
                    }
                    for s in 0..steps {
                        let mut halves = [(isa.zero_i32(), isa.zero_i32()); NV];
                        for v in 0..NV {
                            halves[v] = isa.nibbles(isa.load_codes(&codes[s][h][v]));
                        }
                        for r in 0..R {
                            let (low, high) = (isa.splat_a(a[r][s][0]), isa.splat_a(a[r][s][1]));
                            for v in 0..NV {
                                let dot = isa.dot_nibbles(dots[r][v], halves[v].0, low);
                                dots[r][v] = isa.dot_nibbles(dot, halves[v].1, high);
                            }
                        }
                    }
                    0
                }
                Storage::Bytes => {
                    let mut a: [&[[i8; 4]]; R] = [&[]; R];
                    for r in 0..R {
                        a[r] = bytemuck::cast_slice(&rows[r].codes[first..][..steps * 4]);
                        a[r] = &a[r][..steps];
                    }
                    for s in 0..steps {
                        let mut loaded = [isa.zero_i32(); NV];
                        for v in 0..NV {
                            loaded[v] = isa.load_codes(&codes[s][h][v]);
                        }
                        for r in 0..R {
                            let a = isa.splat_a(a[r][s]);
                            for v in 0..NV {
                                dots[r][v] = match AFFINE {
                                    false => isa.dot_bytes(dots[r][v], loaded[v], a),
                                    true => isa.dot_bytes_by_any(dots[r][v], loaded[v], a),
                                };
                            }
                        }
                    }
                    V::BYTES_OFFSET
                }
            };
            flush_group::<V, R, NV, L, AFFINE>(isa, panel, (g, h, offset), rows, &dots, &mut total);
        }
        store(isa, h, &total, out);
    }
}

/// Adds the integer sums of group `g` to the totals of the `h`th part of a panel. `offset` has been
/// subtracted from every code. `AFFINE` says whether the panel has sums.
#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
pub(crate) fn flush_group<
    V: Isa<L>,
    const R: usize,
    const NV: usize,
    const L: usize,
    const AFFINE: bool,
>(
    isa: V,
    panel: &Panel<'_>,
    (g, h, offset): (usize, usize, i32),
    rows: &[Int8Row<'_>; R],
    dots: &[[V::I32; NV]; R],
    total: &mut [[V::F32; NV]; R],
) {
    let scales: &[[[f32; L]; NV]] = bytemuck::cast_slice(&panel.scales[g]);
    let zeros: &[[[u8; L]; NV]] = bytemuck::cast_slice(&panel.zeros[g]);
    for v in 0..NV {
        let scale = isa.load_f32(&scales[h][v]);
        let zero = isa.load_zeros(&zeros[h][v], offset);
        for r in 0..R {
            // The difference fits; dot and zero·sum alone need not, and wrap around consistently.
            let mut dot = isa.sub_mul(dots[r][v], zero, rows[r].sums[g]);
            if AFFINE {
                let sums: &[[[i32; L]; NV]] = bytemuck::cast_slice(&panel.sums[g]);
                dot = isa.sub_mul(dot, isa.load_i32(&sums[h][v]), rows[r].zeros[g]);
                if panel.exact {
                    total[r][v] = isa.reinterpret(dot);
                    continue;
                }
            }
            let mut term = isa.mul(isa.to_f32(dot), scale);
            if AFFINE {
                term = isa.mul(term, isa.splat_f32(rows[r].scales[g]));
            }
            total[r][v] = isa.add(total[r][v], term);
        }
    }
}

/// `out[row] = Σ_groups scale·Σ (code − zero)·x` for one panel and up to [`MR`] rows, each group
/// of a row padded with zeros to whole steps.
#[inline(always)]
pub(crate) fn f32<
    V: Isa<L>,
    const R: usize,
    const R2: usize,
    const R3: usize,
    const H: usize,
    const NV: usize,
    const PANEL: usize,
    const L: usize,
>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[&[f32]],
    out: &mut [[f32; NR]],
) {
    let (rows, out) = f32_tiles::<V, R, H, NV, L>(isa, panel, rows, out);
    let (rows, out) = f32_tiles::<V, R2, H, NV, L>(isa, panel, rows, out);
    let (rows, out) = f32_tiles::<V, R3, H, NV, L>(isa, panel, rows, out);
    f32_tiles::<V, 1, 1, PANEL, L>(isa, panel, rows, out);
}

/// As many tiles of `R` rows as there are; the rows that are left over.
#[inline(always)]
fn f32_tiles<'r, 'o, V: Isa<L>, const R: usize, const H: usize, const NV: usize, const L: usize>(
    isa: V,
    panel: &Panel<'_>,
    rows: &'r [&'r [f32]],
    out: &'o mut [[f32; NR]],
) -> (&'r [&'r [f32]], &'o mut [[f32; NR]]) {
    let ((full, rest), (full_out, rest_out)) = (rows.as_chunks::<R>(), out.as_chunks_mut::<R>());
    for (rows, out) in full.iter().zip(full_out) {
        f32_rows::<V, R, H, NV, L>(isa, panel, rows, out);
    }
    (rest, rest_out)
}

#[allow(clippy::needless_range_loop, reason = "as in int8_rows")]
#[inline(always)]
fn f32_rows<V: Isa<L>, const R: usize, const H: usize, const NV: usize, const L: usize>(
    isa: V,
    panel: &Panel<'_>,
    rows: &[&[f32]; R],
    out: &mut [[f32; NR]; R],
) {
    for h in 0..H {
        let mut total = [[isa.zero_f32(); NV]; R];
        for g in 0..panel.scales.len() {
            let codes: &[[[[[u8; 4]; L]; NV]; H]] = bytemuck::cast_slice(panel.codes_of(g));
            let scales: &[[[f32; L]; NV]] = bytemuck::cast_slice(&panel.scales[g]);
            let zeros: &[[[u8; L]; NV]] = bytemuck::cast_slice(&panel.zeros[g]);
            let (steps, first) = (codes.len(), g * panel.padded_group());
            let mut zero = [isa.zero_f32(); NV];
            for v in 0..NV {
                zero[v] = isa.to_f32(isa.load_zeros(&zeros[h][v], 0));
            }
            let mut sums = [[isa.zero_f32(); NV]; R];
            // One output feature is one lane and adds from left to right, whatever R and NV are.
            macro_rules! steps_of {
                ($k:literal features, $($j:literal: $shift:literal, $mask:literal;)*) => {
                    let mut x: [&[[f32; $k]]; R] = [&[]; R];
                    for r in 0..R {
                        x[r] = bytemuck::cast_slice(&rows[r][first..][..steps * $k]);
                        x[r] = &x[r][..steps];
                    }
                    for s in 0..steps {
                        let mut loaded = [isa.zero_i32(); NV];
                        for v in 0..NV {
                            loaded[v] = isa.load_codes(&codes[s][h][v]);
                        }
                        $(
                            let mut levels = [isa.zero_f32(); NV];
                            for v in 0..NV {
                                let level = isa.level::<$shift, $mask>(loaded[v]);
                                levels[v] = isa.sub(level, zero[v]);
                            }
                            for r in 0..R {
                                let x = isa.splat_f32(x[r][s][$j]);
                                for v in 0..NV {
                                    sums[r][v] = isa.mul_add(sums[r][v], x, levels[v]);
                                }
                            }
                        )*
                    }
                };
            }
            match panel.storage {
                Storage::Nibbles => {
                    steps_of!(8 features, 0: 0, 15; 1: 8, 15; 2: 16, 15; 3: 24, 15;
                                          4: 4, 15; 5: 12, 15; 6: 20, 15; 7: 28, 15;);
                }
                Storage::Bytes => {
                    steps_of!(4 features, 0: 0, 255; 1: 8, 255; 2: 16, 255; 3: 24, 255;);
                }
            }
            for v in 0..NV {
                let scale = isa.load_f32(&scales[h][v]);
                for r in 0..R {
                    total[r][v] = isa.mul_add(total[r][v], sums[r][v], scale);
                }
            }
        }
        store(isa, h, &total, out);
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
fn store<V: Isa<L>, const R: usize, const NV: usize, const L: usize>(
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
