//! `lowbit bench`: what this machine does.

mod algorithms;
mod convert;
mod gemm;
mod lm;
mod quantize;
mod roofline;

use std::time::Instant;

use anyhow::Result;

/// Options of `lowbit bench`.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Quantizing a layer whose statistics are known
    Algorithms(algorithms::Options),
    /// Conversions of whole slices between number formats, on one thread
    Convert(convert::Options),
    /// A product of a quantized layer with a batch of activations
    Gemm(gemm::Options),
    /// A model of random weights in the shape of Llama 3.2 1B, with a smaller vocabulary
    Lm(lm::Options),
    /// This machine's peaks and its caches' and memory's speed, on one thread
    Roofline(roofline::Options),
    /// Rounding weights and activations to nearest, on one thread
    Quantize(quantize::Options),
}

pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.what {
        What::Algorithms(options) => algorithms::run(options),
        What::Convert(options) => convert::run(options),
        What::Gemm(options) => gemm::run(options),
        What::Lm(options) => lm::run(options),
        What::Roofline(options) => roofline::run(options),
        What::Quantize(options) => quantize::run(options),
    }
}

/// Times of repetitions of the same work, ascending.
struct Times(Vec<f64>);

impl Times {
    /// Repetitions over about a fifth of a second, at least five, after one to warm up.
    fn of(work: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        work()?;
        let began = Instant::now();
        let mut seconds = Vec::new();
        while seconds.len() < 5 || began.elapsed().as_secs_f64() < 0.2 {
            let start = Instant::now();
            work()?;
            seconds.push(start.elapsed().as_secs_f64().max(1e-9));
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Self(seconds))
    }

    fn min(&self) -> f64 {
        self.0[0]
    }

    fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }
}

/// Numbers such as weights have: of many magnitudes, both signs, and the same every time.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| uniform() * (0.01 + uniform().abs())).collect()
}
