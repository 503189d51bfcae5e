//! `lowbit bench algorithms`: seconds to quantize one layer, its statistics given.

use std::{hint::black_box, io::Write, num::NonZeroUsize, time::Instant};

use anyhow::{Result, anyhow};
use lowbit::{Calibration, METHODS, Mat, MatRef, Method, Needs, Quantizer};
use serde::Serialize;

use super::numbers;
use crate::{Threads, model, progress};

#[derive(clap::Args)]
pub(super) struct Options {
    /// Methods [default: all that look at the inputs]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…", value_parser = model::method())]
    methods: Option<Vec<&'static Method>>,
    /// Output features
    #[arg(long, default_value = "4096")]
    n: NonZeroUsize,
    /// Input features
    #[arg(long, default_value = "4096")]
    k: NonZeroUsize,
    /// Tokens that the statistics are made of
    #[arg(long, default_value = "1024")]
    tokens: NonZeroUsize,
    /// How often each method runs
    #[arg(long, default_value = "3", value_name = "N")]
    repetitions: NonZeroUsize,
    #[command(flatten)]
    threads: Threads,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    n: usize,
    k: usize,
    threads: usize,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    method: &'static str,
    bits_per_weight: f64,
    /// Of repetitions.
    min_s: f64,
    median_s: f64,
    repetitions: usize,
}

pub(super) fn run(options: &Options) -> Result<()> {
    let (n, k, tokens) = (options.n.get(), options.k.get(), options.tokens.get());
    let weights = n.checked_mul(k).filter(|x| *x <= 1 << 40);
    let inputs = tokens.checked_mul(k).filter(|x| *x <= 1 << 40);
    let (Some(weights), Some(inputs)) = (weights, inputs) else {
        return Err(anyhow!("a layer of {n} x {k} with {tokens} tokens does not fit this machine"));
    };
    let uses_inputs = |method: &&Method| method.quantizer.needs() > Needs::Nothing;
    let methods = match &options.methods {
        Some(methods) => methods.clone(),
        None => METHODS.iter().filter(uses_inputs).collect(),
    };
    let mut ctx = options.threads.context()?;
    let noise = numbers(weights.max(inputs));
    let w = MatRef::new(&noise[..weights], n, k)?;
    // Every channel has a part of one of 16 signals.
    let signal = |t: usize, c: usize| noise[(t * 16 + c % 16) % noise.len()];
    let x = Mat::from_fn(tokens, k, |t, c| noise[t * k + c] + signal(t, c));
    let bar = progress(1 + methods.len() * options.repetitions.get(), "observing");
    let mut calibration = Calibration::with_second_moment(k)?;
    calibration.observe(x.as_ref(), &mut ctx)?;
    bar.inc(1);

    let mut rows = Vec::new();
    for method in methods {
        bar.set_message(method.name);
        let (mut seconds, mut bits_per_weight) = (Vec::new(), 0.0);
        for _ in 0..options.repetitions.get() {
            let start = Instant::now();
            let q = method.quantizer.quantize(black_box(w), &calibration, &mut ctx)?;
            seconds.push(start.elapsed().as_secs_f64());
            bits_per_weight = q.layer.bytes() as f64 * 8.0 / weights as f64;
            bar.inc(1);
        }
        seconds.sort_by(f64::total_cmp);
        rows.push(Row {
            method: method.name,
            bits_per_weight,
            min_s: seconds[0],
            median_s: seconds[seconds.len() / 2],
            repetitions: seconds.len(),
        });
    }
    bar.finish_and_clear();

    let mut out = std::io::stdout();
    let report = Report { n, k, threads: ctx.threads(), rows };
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    writeln!(out, "{n} x {k}, {} threads", report.threads)?;
    writeln!(out, "{:<20} {:>8} {:>8} {:>8}", "method", "bits/w", "min s", "median s")?;
    for Row { method, bits_per_weight, min_s, median_s, .. } in report.rows {
        writeln!(out, "{method:<20} {bits_per_weight:>8.3} {min_s:>8.3} {median_s:>8.3}")?;
    }
    Ok(())
}
