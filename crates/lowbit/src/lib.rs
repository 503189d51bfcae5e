//! Quantize language-model weights and multiply with them, on the CPU.
#![forbid(unsafe_code)]

pub use lowbit_algorithms::{Calibration, METHODS, Method, Quantizer, Rtn};
pub use lowbit_core::*;
/// Number formats.
pub use lowbit_dtypes as dtypes;
/// Checkpoint containers.
pub use lowbit_formats as formats;
pub use lowbit_kernels::PackedLinear;
