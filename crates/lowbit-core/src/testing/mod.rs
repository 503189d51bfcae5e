//! A kit to test numerical code with: ours, and that of a host which brings kernels of its own.
//! Feature `testing`.
//!
//! | | |
//! |---|---|
//! | [`strategies`] | matrices, shapes, schemes and whole problems for proptest, which shrink well |
//! | [`Family`] | the same matrices from a seed, for plain loops |
//! | [`bounds`] | how large an error can be, computed from the operands |
//! | [`Int8Problem`], [`LinearProblem`] | a problem, its reference, and `check`, which takes your kernel |
//! | [`Failure`] | where, what was expected, what came, and which products it takes |
//! | [`metrics`](crate::metrics) | how large an error is |
//!
//! A problem knows its `reference()`, can `run()` a kernel and `check()` what the kernel has written:
//! integers must be equal, floats must lie within the bound. A kernel is a closure; nothing has to be
//! implemented.
//!
//! # Example
//! ```
//! use lowbit_core::testing::{Int8Problem, proptest::prelude::*, strategies};
//! use lowbit_core::{MatMut, MatRef};
//!
//! /// The kernel under test: c = a·bᵀ.
//! fn gemm(a: MatRef<'_, u8>, b: MatRef<'_, i8>, mut c: MatMut<'_, i32>) -> Result<(), String> {
//!     for (a, c) in a.iter_rows().zip(c.iter_rows_mut()) {
//!         for (b, c) in b.iter_rows().zip(c) {
//!             *c = a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
//!         }
//!     }
//!     Ok(())
//! }
//!
//! // In a plain loop …
//! for problem in Int8Problem::adversarial() {
//!     problem.check(gemm).unwrap();
//! }
//! // … and with proptest. (In a test, `#[test]` goes above the function.)
//! proptest! {
//!     fn the_gemm_is_exact(problem in strategies::int8_problems::<u8>(0..=9, 0..=40, 0..=200)) {
//!         problem.check(gemm)?;
//!     }
//! }
//! the_gemm_is_exact();
//! ```

pub mod bounds;
mod failure;
mod family;
mod int8;
mod linear;
mod random;
mod shrink;
pub mod strategies;

pub use failure::{Cause, Failure, Mismatch};
pub use family::Family;
pub use int8::{Int8, Int8Problem};
pub use linear::{LinearProblem, Promise};

/// The proptest that [`strategies`] are for; a host need not depend on the same version itself.
pub use proptest;
