//! Number formats of at most 16 bits: small floats, tables, packed integers.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]
pub use half::{bf16, f16};
