//! A small, readable Llama-family decoder whose linear layers can be swapped, and its evaluation.
//!
//! ```text
//! folder ─ Checkpoint ─ Model ─┬─ forward, with a KvCache      tokens → logits
//!          (checked)    (f32)  ├─ generate                     prompt → text
//!                              ├─ eval, over Windows           perplexity, KL, top-1 agreement
//!                              ├─ eval::calibrate              statistics of each layer's inputs
//!                              ├─ measure_speed                tokens/s
//!                              ├─ with_linears                 the same model, quantized
//!                              └─ quantize                     block by block, on its own inputs
//! ```
//!
//! Everything runs on the [`Context`](lowbit::Context)'s threads, and gives the same bits for any
//! number of them.
//!
//! # Example
//! ```no_run
//! # fn main() -> Result<(), lowbit_lm::Error> {
//! use std::{sync::Arc, time::Duration};
//! use lowbit::{Context, Method, PackedLinear, Quantizer};
//! use lowbit_lm::{Checkpoint, Model, Protocol, Windows, eval, measure_speed};
//!
//! let checkpoint = Checkpoint::open("models/stories3m")?;
//! let tokens = "1 403 407 261 378 432\n1 410 469 414"; // one document on each line
//! let windows = Windows::from_tokens(checkpoint.config(), "eval.tokens", tokens)?;
//! let ctx = &mut Context::new();
//!
//! let model = Model::load(&checkpoint)?;
//! let baseline = eval::Baseline::new(&model, &windows, ctx, |_| ())?;
//! let calibration = eval::calibrate(&model, &windows.first(2000), false, ctx, |_| ())?;
//!
//! let method = Method::named("int4-g32").expect("a method");
//! let quantized = model.with_linears(&checkpoint, |layer| {
//!     let w = layer.weight.as_ref();
//!     let q = method.quantizer.quantize(w, &calibration[&layer.name], ctx)?;
//!     Ok(Arc::new(PackedLinear::new(&q.layer.with_bias(layer.bias)?)?))
//! })?;
//! let comparison = baseline.compare(&quantized, ctx, |_| ())?;
//! let speed = measure_speed(&quantized, Duration::from_millis(300), ctx)?;
//! println!("{comparison:?} {speed:?}");
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod dense;
mod error;
pub mod eval;
mod files;
mod finished;
mod generate;
mod gguf_files;
mod gguf_model;
mod gguf_tokenizer;
mod gguf_vocabulary;
mod growth;
mod kv;
pub mod llama_gguf;
mod model;
mod ops;
pub mod outliers;
mod pack;
mod pre_tokenizer;
pub mod quantize;
mod rope;
mod speed;
mod tensors;
#[cfg(test)]
mod tests;
mod tokenizer;
mod windows;

pub use checkpoint::{Checkpoint, LinearWeights, quantization_config};
pub use config::{Architecture, Config};
pub use dense::DenseLinear;
pub use error::Error;
pub use files::read_file;
pub use finished::Finished;
pub use generate::{Generated, Sampling, Stop, generate};
pub use gguf_files::is_gguf;
pub use kv::KvCache;
pub use model::Model;
pub use pack::{Unpacked, pack};
pub use rope::{Llama3Scaling, RopeScaling, YarnScaling};
pub use speed::{PROMPT, Speed, measure_speed};
pub use tensors::Tensors;
pub use tokenizer::Tokenizer;
pub use windows::{Protocol, Windows};

/// A result whose error is [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
