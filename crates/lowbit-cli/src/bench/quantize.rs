//! `lowbit bench quantize`: round to nearest, in GB/s of f32 read.

use std::{hint::black_box, io::Write};

use anyhow::{Result, anyhow};
use lowbit::{
    Granularity, MatRef, QMatrix, QuantScheme, group_sums, quantize_row_int8, quantize_row_uint8,
};
use serde::Serialize;

use super::{Times, numbers};
use crate::progress;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Only the scheme of this name
    #[arg(long, value_name = "NAME")]
    scheme: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    scheme: &'static str,
    rows: usize,
    cols: usize,
    /// Of f32 read.
    bytes: usize,
    /// Bytes of f32 read a second, median.
    gbps: f64,
    repetitions: usize,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
}

/// Of weights: read from memory.
const N: usize = 4096;
/// Of weights, and of the one row of activations: in cache.
const K: usize = 4096;

pub(super) fn run(options: &Options) -> Result<()> {
    let channels = Granularity::PerChannel;
    let groups = Granularity::PerGroup;
    let weights = [
        ("int8", QuantScheme::symmetric(8, channels)),
        ("int8-zp", QuantScheme::affine(8, channels)),
        ("int8-g128", QuantScheme::symmetric(8, groups(128))),
        ("int4", QuantScheme::symmetric(4, channels)),
        ("int4-g128", QuantScheme::symmetric(4, groups(128))),
        ("int4-g32", QuantScheme::symmetric(4, groups(32))),
        ("int4-g32-zp", QuantScheme::affine(4, groups(32))),
        ("int3-g32", QuantScheme::symmetric(3, groups(32))),
        ("int2-g32", QuantScheme::symmetric(2, groups(32))),
    ];
    let mut signed = vec![0_i8; K];
    let mut unsigned = vec![0_u8; K];
    let mut sums = vec![0_i32; K / 128];
    type Activation<'a> = (&'static str, &'a mut dyn FnMut(&[f32]) -> Result<()>);
    let activations: [Activation<'_>; 2] = [
        ("activation-int8", &mut |x| {
            quantize_row_int8(black_box(x), &mut signed)?;
            group_sums(&signed, 128, &mut sums);
            Ok(())
        }),
        ("activation-uint8", &mut |x| {
            quantize_row_uint8(black_box(x), &mut unsigned)?;
            Ok(())
        }),
    ];

    let names: Vec<_> =
        weights.iter().map(|w| w.0).chain(activations.iter().map(|a| a.0)).collect();
    let wanted = |name: &str| options.scheme.as_deref().is_none_or(|only| only == name);
    let count = names.iter().filter(|name| wanted(name)).count();
    if count == 0 {
        let only = options.scheme.as_deref().unwrap_or_default();
        return Err(anyhow!("no scheme {only}; there are {}", names.join(", ")));
    }
    let x = numbers(N * K);
    let bar = progress(count, "quantizing");
    let mut rows = Vec::new();
    let mut measure = |scheme, n: usize, work: &mut dyn FnMut() -> Result<()>| {
        let times = Times::of(work)?;
        let bytes = 4 * n * K;
        let gbps = bytes as f64 / times.median() / 1e9;
        let repetitions = times.0.len();
        rows.push(Row { scheme, rows: n, cols: K, bytes, gbps, repetitions });
        bar.inc(1);
        Ok::<_, anyhow::Error>(())
    };
    let w = MatRef::new(&x, N, K)?;
    for (name, scheme) in weights.into_iter().filter(|w| wanted(w.0)) {
        measure(name, N, &mut || {
            black_box(QMatrix::quantize(black_box(w), scheme)?);
            Ok(())
        })?;
    }
    for (name, work) in activations.into_iter().filter(|a| wanted(a.0)) {
        measure(name, 1, &mut || work(&x[..K]))?;
    }
    bar.finish_and_clear();

    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&Report { rows })?)?;
        return Ok(());
    }
    writeln!(out, "{:<18} {:>6} {:>6} {:>10} {:>8}", "scheme", "rows", "cols", "bytes", "GB/s")?;
    for row in rows {
        let Row { scheme, rows, cols, bytes, gbps, .. } = row;
        writeln!(out, "{scheme:<18} {rows:>6} {cols:>6} {bytes:>10} {gbps:>8.1}")?;
    }
    Ok(())
}
