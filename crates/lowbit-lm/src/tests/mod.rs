//! Tests on models made on the spot. Those on real models are in `tests/`.

mod checkpoint;
mod eval;
mod gguf;
mod gguf_metadata;
mod model;
mod oracle;
mod quantized;
pub(crate) mod tiny;
