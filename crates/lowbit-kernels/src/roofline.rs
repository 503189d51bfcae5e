//! What this machine can do at best, so that a rate can be given as a share of it.
//!
//! # Example
//! ```
//! use lowbit_kernels::roofline;
//!
//! let int8 = roofline::peak("scalar", roofline::Peak::Int8, 1000)?;
//! assert!(int8.operations > 0.0 && int8.seconds > 0.0);
//! let read = roofline::read(&[1; 4096], 10);
//! assert_eq!(read.bytes, 8.0 * 4096.0 * 10.0);
//! # Ok::<(), lowbit_core::Error>(())
//! ```

use std::{hint::black_box, time::Instant};

use lowbit_core::Result;

use crate::isa;

/// An arithmetic peak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peak {
    /// Multiplications and additions of bytes into i32.
    Int8,
    /// Multiplications and additions of f32, fused where the CPU can.
    F32,
}

/// Work done in registers alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arithmetic {
    /// Multiplications and additions, counted apart.
    pub operations: f64,
    /// Time they took.
    pub seconds: f64,
}

/// Memory read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Read {
    /// Bytes read.
    pub bytes: f64,
    /// Time that took.
    pub seconds: f64,
}

/// Runs the inner operation of a kernel `rounds` times on each of twelve accumulators, with all
/// operands in registers, on this thread.
///
/// # Errors
/// [`Error::Unsupported`](lowbit_core::Error::Unsupported) if this CPU has no kernel called
/// `kernel`.
pub fn peak(kernel: &str, peak: Peak, rounds: u64) -> Result<Arithmetic> {
    let kernel = isa::named(kernel)?;
    let start = Instant::now();
    let operations = kernel.peak(peak, black_box(rounds));
    Ok(Arithmetic { operations, seconds: start.elapsed().as_secs_f64() })
}

/// Reads `data` `rounds` times from front to back, on this thread. Its size decides which cache it
/// comes from.
pub fn read(data: &[u64], rounds: usize) -> Read {
    struct Sum<'a>(&'a [u64]);
    impl pulp::WithSimd for Sum<'_> {
        type Output = u64;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> u64 {
            let (vectors, rest) = S::as_simd_u64s(self.0);
            let (eights, vectors) = vectors.as_chunks::<8>();
            let mut sums = [simd.splat_u64s(0); 8];
            for eight in eights {
                for i in 0..8 {
                    sums[i] = simd.xor_u64s(sums[i], eight[i]);
                }
            }
            for &vector in vectors {
                sums[0] = simd.xor_u64s(sums[0], vector);
            }
            black_box(sums);
            rest.iter().fold(0, |sum, x| sum ^ x)
        }
    }
    let arch = pulp::Arch::new();
    let start = Instant::now();
    for _ in 0..rounds {
        black_box(arch.dispatch(Sum(black_box(data))));
    }
    let bytes = size_of_val(data) as f64 * rounds as f64;
    Read { bytes, seconds: start.elapsed().as_secs_f64() }
}
