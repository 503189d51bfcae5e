//! `lowbit bench convert`: whole slices between number formats.

use std::{hint::black_box, io::Write};

use anyhow::{Result, anyhow};
use lowbit::dtypes::{
    F8E4M3, F8E8M0, Format, Mx, NibbleOrder, Nvfp4, Overflow, Rounding, ScaleRule, Table16, bf16,
    decode_slice, encode_slice, f16, pack, unpack,
};
use serde::Serialize;

use super::{Times, numbers};
use crate::progress;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Only conversions to this format
    #[arg(long, value_name = "FORMAT")]
    to: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    from: &'static str,
    to: &'static str,
    /// Of the wider side.
    bytes: usize,
    /// Bytes of the wider side a second, median.
    gbps: f64,
    repetitions: usize,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
}

pub(super) fn run(options: &Options) -> Result<()> {
    let mut names = Vec::new();
    conversions(64, &mut |from, to, _, _| {
        names.push((from, to));
        Ok(())
    })?;
    let wanted = |to: &str| options.to.as_deref().is_none_or(|only| only == to);
    let count = names.iter().filter(|(_, to)| wanted(to)).count();
    if count == 0 {
        let mut formats: Vec<_> = names.iter().map(|(_, to)| *to).collect();
        formats.sort_unstable();
        formats.dedup();
        let only = options.to.as_deref().unwrap_or_default();
        return Err(anyhow!("no conversion to {only}; there are those to {}", formats.join(", ")));
    }

    let sizes = [256 << 10, 64 << 20];
    let bar = progress(count * sizes.len(), "converting");
    let mut rows = Vec::new();
    for bytes in sizes {
        conversions(bytes, &mut |from, to, wide, work| {
            if wanted(to) {
                let times = Times::of(work)?;
                let gbps = wide as f64 / times.median() / 1e9;
                let repetitions = times.0.len();
                rows.push(Row { from, to, bytes: wide, gbps, repetitions });
                bar.inc(1);
            }
            Ok(())
        })?;
    }
    bar.finish_and_clear();

    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&Report { rows })?)?;
        return Ok(());
    }
    writeln!(out, "{:<8} {:<8} {:>10} {:>8}", "from", "to", "bytes", "GB/s")?;
    for row in rows {
        writeln!(out, "{:<8} {:<8} {:>10} {:>8.1}", row.from, row.to, row.bytes, row.gbps)?;
    }
    Ok(())
}

/// Is given each conversion: from, to, bytes of the wider side, and what does it once.
type Visit<'a> =
    dyn FnMut(&'static str, &'static str, usize, &mut dyn FnMut() -> Result<()>) -> Result<()> + 'a;

/// Numbers of a block format handled at a time, so that codes are in cache when they are packed.
const CHUNK: usize = 4096;

/// Shows every conversion of `bytes` bytes of f32 to `visit`.
fn conversions(bytes: usize, visit: &mut Visit<'_>) -> Result<()> {
    let count = bytes / 4;
    let (nearest, saturate) = (Rounding::NearestEven, Overflow::Saturate);
    let x = numbers(count);
    let mut y = vec![0.0_f32; count];
    let mut codes = vec![0_u8; count];
    for (name, format) in [
        ("e4m3", Format::F8E4M3),
        ("e5m2", Format::F8E5M2),
        ("e2m3", Format::F6E2M3),
        ("e3m2", Format::F6E3M2),
        ("e2m1", Format::F4E2M1),
    ] {
        visit("f32", name, bytes, &mut || {
            Ok(format.encode_slice(black_box(&x), &mut codes, nearest, saturate)?)
        })?;
        visit(name, "f32", bytes, &mut || Ok(format.decode_slice(black_box(&codes), &mut y)?))?;
    }

    let stochastic = Rounding::Stochastic { seed: 1, index: 0 };
    visit("f32", "e4m3-sr", bytes, &mut || {
        Ok(Format::F8E4M3.encode_slice(black_box(&x), &mut codes, stochastic, saturate)?)
    })?;
    let wide: Vec<f64> = x[..count / 2].iter().map(|&x| f64::from(x)).collect();
    visit("f64", "e4m3", bytes, &mut || {
        let codes = &mut codes[..count / 2];
        Ok(Format::F8E4M3.encode_slice(black_box(&wide), codes, nearest, saturate)?)
    })?;

    let mut halves = vec![f16::ZERO; count];
    visit("f32", "f16", bytes, &mut || {
        Ok(encode_slice(black_box(&x), &mut halves, nearest, Overflow::Infinity)?)
    })?;
    visit("f16", "f32", bytes, &mut || Ok(decode_slice(black_box(&halves), &mut y)?))?;
    let mut brains = vec![bf16::ZERO; count];
    visit("f32", "bf16", bytes, &mut || {
        Ok(encode_slice(black_box(&x), &mut brains, nearest, Overflow::Infinity)?)
    })?;
    visit("bf16", "f32", bytes, &mut || Ok(decode_slice(black_box(&brains), &mut y)?))?;

    // The block formats of 4 bits are packed, two codes to a byte.
    let mut packed = vec![0_u8; count / 2];
    let mut chunk = vec![0_u8; CHUNK];
    let mut scales = vec![0.0_f32; count.div_ceil(64)];
    visit("f32", "nf4", bytes, &mut || {
        let to = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 64));
        for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(to) {
            let codes = &mut chunk[..x.len()];
            Table16::NF4.quantize(64, x, scales, codes)?;
            NibbleOrder::HighFirst.pack(codes, packed)?;
        }
        Ok(())
    })?;
    visit("nf4", "f32", bytes, &mut || {
        let from = black_box(&packed).chunks(CHUNK / 2).zip(scales.chunks(CHUNK / 64));
        for (y, (packed, scales)) in y.chunks_mut(CHUNK).zip(from) {
            let codes = &mut chunk[..y.len()];
            NibbleOrder::HighFirst.unpack(packed, codes)?;
            Table16::NF4.dequantize(64, scales, codes, y)?;
        }
        Ok(())
    })?;
    let mut scales = vec![F8E8M0::ONE; count.div_ceil(32)];
    visit("f32", "mxfp8", bytes, &mut || {
        Ok(Mx::Fp8E4M3.quantize(
            ScaleRule::Floor,
            nearest,
            black_box(&x),
            &mut scales,
            &mut codes,
        )?)
    })?;
    visit("f32", "mxfp4", bytes, &mut || {
        let to = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 32));
        for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(to) {
            let codes = &mut chunk[..x.len()];
            Mx::Fp4.quantize(ScaleRule::Floor, nearest, x, scales, codes)?;
            pack(4, codes, packed)?;
        }
        Ok(())
    })?;
    visit("mxfp4", "f32", bytes, &mut || {
        let from = black_box(&packed).chunks(CHUNK / 2).zip(scales.chunks(CHUNK / 32));
        for (y, (packed, scales)) in y.chunks_mut(CHUNK).zip(from) {
            let codes = &mut chunk[..y.len()];
            unpack(4, packed, codes)?;
            Mx::Fp4.dequantize(scales, codes, y)?;
        }
        Ok(())
    })?;
    let nvfp4 = Nvfp4::fit(&x)?;
    let mut scales = vec![F8E4M3::ONE; count.div_ceil(16)];
    visit("f32", "nvfp4", bytes, &mut || {
        let to = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 16));
        for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(to) {
            let codes = &mut chunk[..x.len()];
            nvfp4.quantize(nearest, x, scales, codes)?;
            pack(4, codes, packed)?;
        }
        Ok(())
    })
}
