//! `lowbit bench gemm`: how fast a quantized layer multiplies.

use std::{hint::black_box, io::Write, num::NonZeroUsize};

use anyhow::{Result, anyhow};
use lowbit::{Calibration, Context, Linear, Mat, MatRef, Method, PackedLinear, Quantizer};
use serde::Serialize;

use super::{Times, numbers};
use crate::{Threads, progress};

#[derive(clap::Args)]
pub(super) struct Options {
    /// How the layer is quantized: a method of `compare`
    #[arg(long, value_name = "NAME", default_value = "w8a8")]
    scheme: String,
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
    /// Rotate over more than 1 GiB of weights, so that they come from memory
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    threads: Threads,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    op: &'static str,
    scheme: String,
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
}

const COLD_BYTES: usize = 1 << 30;

pub(super) fn run(options: &Options) -> Result<()> {
    let (m, n, k) = (options.m.get(), options.n.get(), options.k.get());
    let method = Method::named(&options.scheme).ok_or_else(|| {
        let names: Vec<_> = lowbit::METHODS.iter().map(|method| method.name).collect();
        anyhow!("no scheme {}; there are {}", options.scheme, names.join(", "))
    })?;
    // An unknown kernel is an error before anything long begins.
    let pack = |w: MatRef<'_, f32>| -> Result<PackedLinear> {
        let calibration = Calibration::new(w.cols());
        let layer = method.quantizer.quantize(w, &calibration, &mut Context::new())?.layer;
        Ok(match &options.kernel {
            Some(kernel) => PackedLinear::with_kernel(&layer, kernel)?,
            None => PackedLinear::new(&layer)?,
        })
    };
    pack(MatRef::new(&[1.0], 1, 1)?)?;
    let too_large = || anyhow!("a layer of {n} x {k} with {m} rows does not fit this machine");
    let weights = n.checked_mul(k).filter(|x| *x <= 1 << 40).ok_or_else(too_large)?;
    let inputs = m.checked_mul(k.max(n)).filter(|x| *x <= 1 << 40).ok_or_else(too_large)?;

    // Each layer has other weights: the same numbers, started elsewhere.
    let noise = numbers(weights + 4096);
    let layer = |i: usize| pack(MatRef::new(&noise[i * 61 % 4096..][..weights], n, k)?);
    let mut layers = vec![layer(0)?];
    if options.cold {
        let count = COLD_BYTES / layers[0].packed_bytes().max(1) + 1;
        let bar = progress(count, "packing");
        for i in 1..count {
            layers.push(layer(i)?);
            bar.inc(1);
        }
        bar.finish_and_clear();
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
        scheme: options.scheme.clone(),
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
    };
    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    let Report { scheme, kernel, threads, median_s, gops, weight_gbps, .. } = report;
    let cold = if options.cold { ", weights from memory" } else { "" };
    writeln!(out, "{scheme} {m} x {n} x {k}, {kernel}, {threads} threads{cold}:")?;
    writeln!(out, "{:.1} us, {gops:.0} Gop/s, weights at {weight_gbps:.1} GB/s", median_s * 1e6)?;
    Ok(())
}
