//! Tests on models made on the spot. Those on real models are in `tests/`.

mod checkpoint;
mod eval;
mod model;
mod oracle;
mod quantized;
pub(crate) mod tiny;
