//! Low-bit matrix products with run-time SIMD dispatch.
