//! `lowbit bench roofline`: what this machine can do at best.

use std::io::Write;

use anyhow::Result;
use lowbit::{kernels, roofline};
use serde::Serialize;

use crate::progress;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    what: String,
    /// 10^9 multiplications and additions a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    gops: Option<f64>,
    /// 10^9 bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    gbps: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
}

/// Sizes that lie in L1, L2, L3 and memory of most machines.
const SIZES: [(&str, usize); 4] = [
    ("read 16 KiB", 16 << 10),
    ("read 512 KiB", 512 << 10),
    ("read 8 MiB", 8 << 20),
    ("read 1 GiB", 1 << 30),
];

/// The best of many short runs: a peak is what is possible, not what is usual, and a short run may
/// pass undisturbed.
const RUNS: usize = 200;
const SECONDS: f64 = 0.002;

pub(super) fn run(options: &Options) -> Result<()> {
    let names: Vec<_> = kernels().collect();
    let bar = progress(2 * names.len() + SIZES.len(), "measuring");
    let mut rows = Vec::new();
    for kernel in names {
        for (name, peak) in [("int8", roofline::Peak::Int8), ("f32", roofline::Peak::F32)] {
            let once = roofline::peak(kernel, peak, 10_000)?;
            let rounds = (10_000.0 * SECONDS / once.seconds.max(1e-9)) as u64;
            let mut best = 0.0_f64;
            for _ in 0..RUNS {
                let run = roofline::peak(kernel, peak, rounds.max(1))?;
                best = best.max(run.operations / run.seconds.max(1e-9) / 1e9);
            }
            rows.push(Row { what: format!("{name} {kernel}"), gops: Some(best), gbps: None });
            bar.inc(1);
        }
    }
    for (what, bytes) in SIZES {
        let data = vec![1_u64; bytes / 8];
        let once = roofline::read(&data, 1);
        let rounds = (SECONDS / once.seconds.max(1e-9)) as usize;
        let mut best = 0.0_f64;
        for _ in 0..if rounds == 0 { 9 } else { RUNS } {
            let run = roofline::read(&data, rounds.max(1));
            best = best.max(run.bytes / run.seconds.max(1e-9) / 1e9);
        }
        rows.push(Row { what: what.to_string(), gops: None, gbps: Some(best) });
        bar.inc(1);
    }
    bar.finish_and_clear();

    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&Report { rows })?)?;
        return Ok(());
    }
    writeln!(out, "{:<20} {:>10} {:>8}", "what", "Gop/s", "GB/s")?;
    for row in rows {
        let cell = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.1}"));
        writeln!(out, "{:<20} {:>10} {:>8}", row.what, cell(row.gops), cell(row.gbps))?;
    }
    Ok(())
}
