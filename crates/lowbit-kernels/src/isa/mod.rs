//! One small file of instructions for each instruction set, and the table of kernels.

use lowbit_core::{Error, Result};

use crate::{
    bf16::Numbers,
    panel::{NR, Panel},
    roofline::Peak,
    tile::Int8Row,
};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod amx_emulator;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod scalar;

/// The seam between the loops that are the same everywhere and the code for one CPU.
///
/// `int8` and `f32` compute one panel for a few rows (see [`tile`](crate::tile)). They are unsafe
/// for one reason only: `is_available` must have returned `true`.
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    is_available: fn() -> bool,
    /// Rows that a call takes at most, and no more than [`MR`](crate::tile::MR).
    pub(crate) rows: usize,
    /// Rows up to which codes of 4 bits are unpacked again in each tile of rows; for more, they are widened
    /// to bytes first. At most 16 for other codes of less than a byte.
    pub(crate) direct_rows: usize,
    /// Rows of a task at most: enough that a panel, once in L2, is used often.
    pub(crate) task_rows: usize,
    /// The next task takes the next panel and the same rows, as many as fit L2, rather than the same
    /// panel and the next rows.
    pub(crate) keeps_rows: bool,
    int8: Int8Tile,
    f32: F32Tile,
    /// [`tile::widen`](crate::tile::widen)
    widen: unsafe fn(&Panel<'_>, bool, &mut [u8]),
    /// Products in bfloat16, if the CPU has them; otherwise they are made in f32.
    pub(crate) bf16: Option<Bf16Kernel>,
    /// [`tile::peak`](crate::tile::peak)
    peak: unsafe fn(Peak, u64) -> f64,
}

/// As the functions of [`Kernel`].
#[derive(Clone, Copy)]
pub(crate) struct Bf16Kernel {
    /// [`bf16::product`](crate::bf16::product)
    product: Bf16Tile,
    /// [`bf16::widen`](crate::bf16::widen)
    widen: unsafe fn(&Panel<'_>, &Numbers, &mut [u8]),
}

impl Bf16Kernel {
    pub(crate) fn product(
        &self,
        panel: &Panel<'_>,
        numbers: &Numbers,
        rows: &[&[i32]],
        out: &mut [[f32; NR]],
    ) {
        // SAFETY: `best` and `named` hand out available kernels only.
        unsafe { (self.product)(panel, numbers, rows, out) }
    }

    pub(crate) fn widen(&self, panel: &Panel<'_>, numbers: &Numbers, to: &mut [u8]) {
        // SAFETY: as above.
        unsafe { (self.widen)(panel, numbers, to) }
    }
}

type Bf16Tile = unsafe fn(&Panel<'_>, &Numbers, &[&[i32]], &mut [[f32; NR]]);
type Int8Tile = unsafe fn(&Panel<'_>, &[Int8Row<'_>], &mut [[f32; NR]]);
type F32Tile = unsafe fn(&Panel<'_>, &[&[f32]], &mut [[f32; NR]]);

/// Best first. Tests, benchmarks and dispatch all walk this table; `scalar` runs everywhere.
const KERNELS: &[Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    amx::KERNEL,
    #[cfg(target_arch = "x86_64")]
    avx512_vnni::BF16,
    #[cfg(target_arch = "x86_64")]
    avx512_vnni::KERNEL,
    #[cfg(target_arch = "x86_64")]
    avx2::AVX_VNNI,
    #[cfg(target_arch = "x86_64")]
    avx2::AVX2,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neon::I8MM,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neon::DOTPROD,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neon::NEON,
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

    pub(crate) fn widen(&self, panel: &Panel<'_>, look_up: bool, to: &mut [u8]) {
        // SAFETY: as above.
        unsafe { (self.widen)(panel, look_up, to) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        panel::{Meaning, Scales, Zeros},
        storage::Storage,
    };

    #[test]
    fn a_kernel_is_found_by_its_name_exactly_where_it_runs() {
        for kernel in KERNELS {
            match named(kernel.name) {
                Ok(found) => assert!((kernel.is_available)() && found.name == kernel.name),
                Err(error) => {
                    let error = error.to_string();
                    assert!(!(kernel.is_available)() && error.contains(kernel.name), "{error}");
                }
            }
        }
    }

    /// Equal products in all bytes of a step: the largest sums that each pair can come into.
    #[test]
    fn every_kernel_multiplies_every_code_by_every_activation() {
        let storages = [(Storage::Bytes, 255), (Storage::Bits6, 63), (Storage::Nibbles, 15)];
        for (storage, max_code) in storages {
            let codes: Vec<u8> = (0..=max_code).collect();
            let k = storage.k_per_step();
            for (zero, affine) in
                [0, max_code].into_iter().flat_map(|zero| [(zero, false), (zero, true)])
            {
                let activations: Vec<i8> = if affine { -128..=127 } else { -127..=127 }.collect();
                for codes in codes.chunks(NR) {
                    let code = |n: usize| codes[n % codes.len()];
                    let w = |n: usize| i32::from(code(n)) - i32::from(zero);
                    let mut words = vec![[0; 4]; NR * storage.words()];
                    for n in 0..NR {
                        for j in 0..k {
                            storage.put(code(n), j, &mut words[n..], NR);
                        }
                    }
                    let sums = [core::array::from_fn(|n| k as i32 * w(n))];
                    let panel = Panel {
                        codes: words.as_flattened(),
                        storage,
                        steps: 1,
                        groups: 1,
                        meaning: &Meaning::Int,
                        unit: 1.0,
                        scales: Scales::F32(&[[1.0; NR]]),
                        zeros: Zeros::Bytes(&[[zero; NR]]),
                        sums: if affine { &sums } else { &[] },
                        exact: false,
                        next: &[],
                        one_sum: false,
                    };
                    for activations in activations.chunks(8) {
                        // At one distance from each other, as AMX needs them.
                        let codes: Vec<_> = activations.iter().map(|&a| [a; 16]).collect();
                        let sum = |&a: &i8| [k as i32 * i32::from(a)];
                        let sums: Vec<_> = activations.iter().map(sum).collect();
                        let rows: Vec<_> = codes
                            .iter()
                            .zip(&sums)
                            .map(|(codes, sums)| Int8Row {
                                codes: &codes[..k],
                                sums,
                                zeros: &[5],
                                scales: &[0.5],
                            })
                            .collect();
                        for kernel in available() {
                            let mut out = vec![[f32::NAN; NR]; rows.len()];
                            kernel.int8(&panel, &rows, &mut out);
                            for (&a, out) in activations.iter().zip(out) {
                                let (row_zero, scale) = if affine { (5, 0.5) } else { (0, 1.0) };
                                for (n, out) in out.into_iter().enumerate() {
                                    let dot = k as i32 * (i32::from(a) - row_zero) * w(n);
                                    let (name, expected) = (kernel.name, dot as f32 * scale);
                                    assert_eq!(out, expected, "{name}, {} by {a}", code(n));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
