//! Number formats of at most 16 bits: small floats, tables, packed integers.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

mod error;
mod format;
mod formats;
mod pack;

pub use error::{Error, Result};
pub use format::{Format, Overflow, Rounding, Specials};
pub use half::{bf16, f16};
pub use pack::{NibbleOrder, Packed, pack, packed_len, unpack};
