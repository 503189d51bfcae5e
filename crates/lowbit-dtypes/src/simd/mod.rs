//! Instruction sets, and the loops that are compiled once for each of them.
//!
//! A loop is plain Rust, without branches, over lanes that know nothing of each other: the compiler turns it into the
//! instructions of whatever set it may use. So the result cannot depend on the set. [`Isa::run`] chooses the set at
//! run time. Only looking things up in tables is written in instructions, [`Simd`], since no compiler finds those.

pub(crate) mod blocks;
pub(crate) mod lanes;
#[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
mod neon;
pub(crate) mod table;
#[cfg(all(target_arch = "x86_64", feature = "std"))]
mod x86;

/// An instruction set that this machine has.
///
/// Conversions choose the best by themselves; the tests and benchmarks walk through all of them.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// What the crate was compiled for: SSE2 on x86-64, NEON on AArch64.
    Baseline,
    #[cfg(all(target_arch = "x86_64", feature = "std"))]
    Avx2,
    #[cfg(all(target_arch = "x86_64", feature = "std"))]
    Avx512,
}

/// A loop over lanes. `run` and all that it calls must be `#[inline(always)]`, so that it takes on the features of its
/// caller. Closures cannot be, so there are none.
pub(crate) trait Kernel {
    fn run<S: Simd>(self, simd: S);
}

impl Isa {
    /// Every set this machine has, the best last.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(all(target_arch = "x86_64", feature = "std"))]
        let more = [(Self::has_avx2(), Kind::Avx2), (Self::has_avx512(), Kind::Avx512)];
        #[cfg(not(all(target_arch = "x86_64", feature = "std")))]
        let more: [(bool, Kind); 0] = [];
        [(true, Kind::Baseline)]
            .into_iter()
            .chain(more)
            .filter_map(|(has, kind)| has.then_some(Self(kind)))
    }

    /// The best of them.
    #[inline]
    pub fn best() -> Self {
        #[cfg(all(target_arch = "x86_64", feature = "std"))]
        if Self::has_avx512() {
            return Self(Kind::Avx512);
        } else if Self::has_avx2() {
            return Self(Kind::Avx2);
        }
        Self(Kind::Baseline)
    }

    /// The largest magnitude, 0 if there is none; NaN counts as larger than infinity.
    pub(crate) fn abs_max(self, x: &[f32]) -> f32 {
        let mut max = 0.0;
        self.run(AbsMax(x, &mut max));
        max
    }

    /// The one that needs no detection.
    pub(crate) fn baseline() -> Self {
        Self(Kind::Baseline)
    }

    /// `sse2`, `avx2`, `avx512`, `neon` or `scalar`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Baseline if cfg!(target_arch = "x86_64") => "sse2",
            Kind::Baseline if cfg!(target_arch = "aarch64") => "neon",
            Kind::Baseline => "scalar",
            #[cfg(all(target_arch = "x86_64", feature = "std"))]
            Kind::Avx2 => "avx2",
            #[cfg(all(target_arch = "x86_64", feature = "std"))]
            Kind::Avx512 => "avx512",
        }
    }
}

#[cfg(not(any(
    all(target_arch = "x86_64", feature = "std"),
    all(target_arch = "aarch64", target_feature = "neon", target_endian = "little")
)))]
impl Isa {
    #[inline(always)]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        kernel.run(Plain);
    }
}

/// What compilers do not find by themselves: look-ups in tables of 16 entries, and maxima of short slices.
pub(crate) trait Simd: Copy {
    /// The largest magnitude, 0 if there is none; NaN counts as larger than infinity.
    fn abs_max(self, x: &[f32]) -> f32;
    /// For each lane the code of x, which must be within the reach of `search`.
    fn find<const N: usize>(self, search: &Search, x: &[[f32; 16]; N]) -> [[u8; 16]; N];
    /// For each lane, the entry at the low four bits of its index.
    fn entry(self, entries: &[f32; 16], indices: &[u8; 16]) -> [f32; 16];
}

struct AbsMax<'a>(&'a [f32], &'a mut f32);

impl Kernel for AbsMax<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        *self.1 = simd.abs_max(self.0);
    }
}

/// 15 ascending thresholds (infinity where there are fewer), the codes between them, and where to look.
///
/// A number with r thresholds below it has code `codes[r]`; NaN has none below.
///
/// The numbers up to `reach` are cut into equal cells. `below` says how many thresholds lie in the cells before one, and
/// from there on a linear search takes as many steps as any cell has thresholds: one for NF4, whose levels are all
/// farther apart than a cell is wide. A cell is a monotonic function of a number, so thresholds in lower cells are
/// below it and those in higher cells above it, however the function rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Search {
    thresholds: [f32; 16],
    codes: [u8; 16],
    below: [u8; 32],
    cells_per_unit: f32,
    steps: u32,
}

impl Search {
    pub(crate) const fn new(thresholds: &[f32; 15], codes: [u8; 16], reach: f32) -> Self {
        let mut this = Self {
            thresholds: [f32::INFINITY; 16],
            codes,
            below: [0; 32],
            // Cells 1 to 31, and no rounding leads out of them.
            cells_per_unit: (15.4 / reach).min(f32::MAX),
            steps: 0,
        };
        let mut i = 0;
        let mut steps = [0; 32];
        while i < 15 && thresholds[i] < f32::INFINITY {
            this.thresholds[i] = thresholds[i];
            let mut cell = this.cell(thresholds[i]);
            steps[cell] += 1;
            if steps[cell] > this.steps {
                this.steps = steps[cell];
            }
            cell += 1;
            while cell < 32 {
                this.below[cell] += 1;
                cell += 1;
            }
            i += 1;
        }
        this
    }

    /// What the low 5 bits of `x · cells_per_unit + CELL` are if it is rounded once: the product is exact in f64, whose
    /// last bit is worth 1 at 1.5·2^52.
    const fn cell(&self, x: f32) -> usize {
        const WIDE: f64 = CELL as f64 + 1.5 * ((1u64 << 52) - (1 << 23)) as f64;
        ((x as f64 * self.cells_per_unit as f64 + WIDE).to_bits() & 31) as usize
    }
}

/// At 1.5·2^23 the last bit of an f32 is worth 1; and 0 is in the middle of cell 16.
const CELL: f32 = 12_582_928.0;

/// Whatever the compiler may use, and what the others are held against.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

/// All but the sign bit.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// Magnitudes compare as their bits do, and maxima of integers may be taken in any order.
#[inline(always)]
fn abs_max(x: &[f32]) -> u32 {
    let mut max = 0;
    for x in x {
        max = (x.to_bits() & MAGNITUDE).max(max);
    }
    max
}

impl Simd for Plain {
    #[inline(always)]
    fn abs_max(self, x: &[f32]) -> f32 {
        f32::from_bits(abs_max(x))
    }

    #[inline(always)]
    fn find<const N: usize>(self, search: &Search, x: &[[f32; 16]; N]) -> [[u8; 16]; N] {
        // Counting the thresholds one by one costs 15 comparisons, but vectorizes everywhere.
        let mut codes = [[0; 16]; N];
        for threshold in &search.thresholds[..15] {
            for (rank, x) in codes.as_flattened_mut().iter_mut().zip(x.as_flattened()) {
                *rank += u8::from(x > threshold);
            }
        }
        for code in codes.as_flattened_mut() {
            *code = search.codes[usize::from(*code)];
        }
        codes
    }

    #[inline(always)]
    fn entry(self, entries: &[f32; 16], indices: &[u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for (x, i) in out.iter_mut().zip(indices) {
            *x = entries[usize::from(i & 15)];
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use crate::Table16;

    #[test]
    fn the_usual_tables_take_few_steps() {
        let steps = |table: Table16| table.search.steps;
        assert_eq!([Table16::NF4, Table16::IQ4_NL].map(steps), [1; 2]);
        assert_eq!([Table16::AF4, Table16::FP4_BNB].map(steps), [2, 3]);
    }
}
