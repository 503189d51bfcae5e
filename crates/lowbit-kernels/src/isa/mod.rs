//! One small file of instructions for each instruction set, and the table of kernels.

use lowbit_core::{Error, Result};

use crate::{
    roofline::Peak,
    tile::{Int8Row, NR, Panel},
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
mod scalar;

/// The seam between the loops that are the same everywhere and the code for one CPU.
///
/// `int8` and `f32` compute one panel for a few rows (see [`tile`](crate::tile)). They are unsafe
/// for one reason only: `is_available` must have returned `true`.
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    is_available: fn() -> bool,
    int8: Int8Tile,
    f32: F32Tile,
    /// [`tile::peak`](crate::tile::peak)
    peak: unsafe fn(Peak, u64) -> f64,
}

type Int8Tile = unsafe fn(&Panel<'_>, &[Int8Row<'_>], &mut [[f32; NR]]);
type F32Tile = unsafe fn(&Panel<'_>, &[&[f32]], &mut [[f32; NR]]);

/// Best first. Tests, benchmarks and dispatch all walk this table; `scalar` runs everywhere.
const KERNELS: &[Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    avx512_vnni::KERNEL,
    #[cfg(target_arch = "x86_64")]
    avx2::AVX_VNNI,
    #[cfg(target_arch = "x86_64")]
    avx2::AVX2,
    scalar::KERNEL,
];

impl Kernel {
    pub(crate) fn int8(&self, panel: &Panel<'_>, rows: &[Int8Row<'_>], out: &mut [[f32; NR]]) {
        // SAFETY: `best` and `named` hand out available kernels only.
        unsafe { (self.int8)(panel, rows, out) }
    }

    pub(crate) fn f32(&self, panel: &Panel<'_>, rows: &[&[f32]], out: &mut [[f32; NR]]) {
        // SAFETY: as above.
        unsafe { (self.f32)(panel, rows, out) }
    }
}

impl Kernel {
    pub(crate) fn peak(&self, peak: Peak, rounds: u64) -> f64 {
        // SAFETY: as above.
        unsafe { (self.peak)(peak, rounds) }
    }
}

fn available() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().filter(|kernel| (kernel.is_available)())
}

/// The names of the kernels that this CPU can run, best first.
///
/// # Example
/// ```
/// assert_eq!(lowbit_kernels::kernels().last(), Some("scalar"));
/// ```
pub fn kernels() -> impl Iterator<Item = &'static str> {
    available().map(|kernel| kernel.name)
}

pub(crate) fn best() -> &'static Kernel {
    available().next().unwrap_or(&scalar::KERNEL)
}

pub(crate) fn named(name: &str) -> Result<&'static Kernel> {
    available().find(|kernel| kernel.name == name).ok_or_else(|| {
        let names: Vec<_> = kernels().collect();
        let what = format!("kernel {name:?}; it has {}", names.join(", "));
        Error::Unsupported { by: "this CPU", what }
    })
}
