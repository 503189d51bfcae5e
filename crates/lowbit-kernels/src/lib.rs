//! Low-bit matrix products with run-time SIMD dispatch.
pub use lowbit_core::QLinear as PackedLinear;
