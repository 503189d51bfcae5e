//! `lowbit bench gemm`: how fast a quantized layer multiplies.

use std::{hint::black_box, io::Write, num::NonZeroUsize};

use anyhow::{Result, anyhow};
use lowbit::{ActivationScheme, Context, Linear, Mat, MatRef, PackedLinear};
use serde::Serialize;

use super::{Times, numbers};
use crate::{
    Threads,
    scheme::{self, Scheme},
};

#[derive(clap::Args)]
pub(super) struct Options {
    #[arg(long, value_name = "NAME", default_value = "w8a8", help = scheme::HELP)]
    scheme: Scheme,
    /// What activations are multiplied in [default: what the scheme says, otherwise f32]
    #[arg(long)]
    compute: Option<Compute>,
    /// Rows of activations (tokens)
    #[arg(long, default_value = "512")]
    m: NonZeroUsize,
    /// Output features
    #[arg(long, default_value = "4096")]
    n: NonZeroUsize,
    /// Input features
    #[arg(long, default_value = "4096")]
    k: NonZeroUsize,
    /// A kernel by name [default: the best one]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Rotate over more than 1 GiB of copies of the weights, so that they come from memory
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    threads: Threads,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Compute {
    /// f32
    F32,
    /// bfloat16, rounded on the way in
    Bf16,
    /// int8 with a scale for each row, quantized on the way in
    Int8,
}

#[derive(Serialize)]
struct Report {
    op: &'static str,
    scheme: String,
    /// What activations are multiplied in.
    compute: String,
    kernel: String,
    m: usize,
    n: usize,
    k: usize,
    threads: usize,
    cold: bool,
    median_s: f64,
    min_s: f64,
    max_s: f64,
    /// 2·m·n·k operations, in 10^9 a second.
    gops: f64,
    /// Packed weights, in 10^9 bytes a second.
    weight_gbps: f64,
    /// In memory, scales and padding included.
    packed_bits_per_weight: f64,
}

const COLD_BYTES: usize = 1 << 30;

pub(super) fn run(options: &Options) -> Result<()> {
    let (m, n, k) = (options.m.get(), options.n.get(), options.k.get());
    let scheme = options.scheme.clone();
    let scheme = match options.compute {
        None => scheme,
        Some(Compute::F32) => scheme.with_activation(None),
        Some(Compute::Bf16) => scheme.with_activation(Some(ActivationScheme::BF16)),
        Some(Compute::Int8) => scheme.with_activation(Some(ActivationScheme::INT8_PER_TOKEN)),
    };
    // An unknown kernel, or a scheme that it does not know, is an error before anything long begins.
    let pack = |w: MatRef<'_, f32>| -> Result<PackedLinear> {
        let layer = scheme.quantize(w, &mut Context::new())?;
        Ok(match &options.kernel {
            Some(kernel) => PackedLinear::with_kernel(&layer, kernel)?,
            None => PackedLinear::new(&layer)?,
        })
    };
    let one = MatRef::new(&[1.0], 1, 1)?;
    pack(one)?;
    let compute = match scheme.quantize(one, &mut Context::new())?.activation() {
        None => "f32".to_string(),
        Some(activation) => activation.dtype.to_string(),
    };
    let too_large = || anyhow!("a layer of {n} x {k} with {m} rows does not fit this machine");
    let weights = n.checked_mul(k).filter(|x| *x <= 1 << 40).ok_or_else(too_large)?;
    let inputs = m.checked_mul(k.max(n)).filter(|x| *x <= 1 << 40).ok_or_else(too_large)?;

    let mut layers = vec![pack(MatRef::new(&numbers(weights), n, k)?)?];
    if options.cold {
        // What counts is that they lie in other places.
        layers.resize(COLD_BYTES / layers[0].packed_bytes().max(1) + 1, layers[0].clone());
    }
    let x = Mat::new(numbers(inputs)[..m * k].to_vec(), m, k)?;
    let mut y = Mat::zeros(m, n);
    let mut ctx = options.threads.context()?;
    let mut next = 0;
    let times = Times::of(&mut || {
        let layer = &layers[next % layers.len()];
        next += 1;
        Ok(layer.forward(black_box(x.as_ref()), y.as_mut(), &mut ctx)?)
    })?;
    let report = Report {
        op: "gemm",
        scheme: scheme.name.clone(),
        compute,
        kernel: layers[0].kernel().to_string(),
        m,
        n,
        k,
        threads: ctx.threads(),
        cold: options.cold,
        median_s: times.median(),
        min_s: times.min(),
        max_s: times.max(),
        gops: 2.0 * m as f64 * n as f64 * k as f64 / times.median() / 1e9,
        weight_gbps: layers[0].packed_bytes() as f64 / times.median() / 1e9,
        packed_bits_per_weight: layers[0].packed_bytes() as f64 * 8.0 / (n * k) as f64,
    };
    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    let Report { scheme, compute, kernel, threads, median_s, gops, weight_gbps, .. } = report;
    let cold = if options.cold { ", weights from memory" } else { "" };
    writeln!(out, "{scheme} in {compute}, {m} x {n} x {k}, {kernel}, {threads} threads{cold}:")?;
    let bits = report.packed_bits_per_weight;
    writeln!(
        out,
        "{:.1} us, {gops:.0} Gop/s, weights of {bits:.2} bits at {weight_gbps:.1} GB/s",
        median_s * 1e6
    )?;
    Ok(())
}
