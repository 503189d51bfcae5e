//! Low-bit matrix products: layers packed once for the CPU at hand, then multiplied by fast.
//!
//! ```text
//! y (m, n) = x (m, k) · Wᵀ + bias        W (n, k): 1 to 8 bits, any block of scales and zeros
//! ```
//!
//! [`PackedLinear`] computes what [`QLinear`](lowbit_core::QLinear) means. Layers with int8 or uint8
//! activations give the reference's bits on every kernel, thread count and batch size; layers with
//! f32 or bfloat16 activations stay within a computed bound of it, with the same bits for every thread count
//! and for the same row in any batch.
//!
//! # Example
//! ```
//! use lowbit_core::{Context, Granularity, Linear, Mat, QLinear, QMatrix, QuantScheme};
//! use lowbit_kernels::PackedLinear;
//!
//! let w = Mat::from_fn(64, 128, |r, c| ((r * 128 + c) as f32).sin());
//! let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(4, Granularity::PerGroup(32)))?;
//! let layer = PackedLinear::new(&QLinear::new(q))?; // the best kernel of this CPU
//!
//! let x = Mat::from_fn(3, 128, |r, c| ((r + c) as f32).cos());
//! let mut y = Mat::zeros(3, 64);
//! layer.forward(x.as_ref(), y.as_mut(), &mut Context::new())?;
//! # Ok::<(), lowbit_core::Error>(())
//! ```
#![deny(unsafe_code)]

mod bf16;
mod experts;
mod forward;
mod io;
#[allow(unsafe_code, reason = "instructions of particular CPUs are unsafe to call on others")]
mod isa;
mod packed;
mod panel;
pub mod roofline;
mod rows;
mod shared;
mod storage;
mod tile;

#[cfg(test)]
mod tests;

pub use experts::{Route, forward_experts};
pub use io::{Input, Output};
pub use isa::kernels;
pub use packed::PackedLinear;
pub use shared::forward_shared;
