//! Number formats of at most 16 bits: small floats, tables, packed integers.
//!
//! | kind | what | where |
//! |---|---|---|
//! | floats | E4M3, E5M2, their FNUZ relatives, E3M4, E8M0, FP6, FP4: 8 bits and fewer | [`Format`], or a type each such as [`F8E4M3`] |
//! | | `f16` and `bf16`, from `half`; TF32 | [`f16`](struct@f16), [`bf16`], [`tf32`] |
//! | tables | NF4, AF4, IQ4_NL, bitsandbytes' FP4, your own 16 numbers | [`Table16`] |
//! | integers | signed and unsigned, 1 to 16 bits | [`pack`], [`unpack`], [`NibbleOrder`] |
//! | blocks | MXFP8, MXFP6, MXFP4, MXINT8; NVFP4 | [`Mx`], [`Nvfp4`] |
//!
//! Every conversion rounds once, by an explicit [`Rounding`] and [`Overflow`], and gives the same bits for one number
//! and for a slice, on any instruction set.
#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_code)]

mod block;
mod convert;
mod error;
mod format;
mod formats;
mod pack;
mod pod;
mod simd;
mod table;
mod types;

pub use block::{Mx, Nvfp4, ScaleRule};
pub use convert::{Real, SmallFloat, decode_slice, encode_slice, tf32, tf32_slice};
#[doc(hidden)]
pub use convert::{decode_slice_on, encode_slice_on, tf32_slice_on};
pub use error::{Error, Result};
pub use format::{Format, Overflow, Rounding, Specials, random};
pub use formats::*;
pub use half::{bf16, f16};
pub use pack::{NibbleOrder, Packed, pack, packed_len, unpack};
#[doc(hidden)]
pub use simd::Isa;
pub use table::{Table16, nf4_from_quantiles};
