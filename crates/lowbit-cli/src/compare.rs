//! `lowbit compare`: one model, every method, a table.

use std::{
    io::{IsTerminal, Write},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};
use lowbit::{Linear, METHODS, Method, Needs, Quantizer, kernels};
use lowbit_lm::{Finished, Protocol, eval::Baseline, measure_speed, quantize::LayerReport};
use serde::Serialize;

use crate::{
    Threads, counted,
    model::{self, Text},
    new_file::NewFile,
    plot, progress,
};

/// Options of `lowbit compare`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of a model (config.json, tokenizer.json, model.safetensors), or its GGUF file [default: the embedded one]
    model: Option<PathBuf>,
    /// Methods to compare, separated by commas [default: those that need no calibration; all if
    /// `--calibration` is given]
    #[arg(long, value_delimiter = ',', value_name = "A,B", value_parser = model::method())]
    methods: Option<Vec<&'static Method>>,
    /// Text or tokens to measure the loss on [default: eval.tokens of the model, where it has one]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Bytes at the start of the text to pass over
    #[arg(long, value_name = "N", requires = "text", default_value_t = 0)]
    skip_bytes: usize,
    /// Tokens to measure the loss on, at most
    #[arg(long, value_name = "N", default_value = "12000")]
    max_tokens: NonZeroUsize,
    #[command(flatten)]
    calibration: model::CalibrationOptions,
    /// Folder for finished blocks: an interrupted command continues behind them
    #[arg(long, value_name = "FOLDER")]
    resume: Option<PathBuf>,
    /// Show what was done to each layer
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    threads: Threads,
    /// Kernel to multiply with [default: the best of this CPU]
    #[arg(long, value_name = "NAME", value_parser = model::kernel())]
    kernel: Option<&'static str>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Draw loss against size
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// How long to measure each of prefill and decode.
const SPEED_TIME: Duration = Duration::from_millis(200);

/// One method's line of the table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) method: String,
    /// Of the quantized layers: everything stored, divided by their weights.
    pub(crate) bits_per_weight: f64,
    /// Of the quantized layers; embedding, norms and head stay as they are.
    pub(crate) weight_bytes: usize,
    pub(crate) perplexity: f64,
    /// Mean divergence from the f32 model, in nats.
    pub(crate) kl: f64,
    /// Share of tokens, 0 to 1, that both models rank first.
    pub(crate) top1: f64,
    pub(crate) prefill_tokens_per_s: f64,
    pub(crate) decode_tokens_per_s: f64,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    tokens: usize,
    rows: &'a [Row],
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let plot_file = options.plot.as_deref().map(NewFile::prepare).transpose()?;
    let mut ctx = options.threads.context()?;
    let text = options.text.as_deref().map(Text::read).transpose()?;
    let checkpoint = model::open(options.model.as_ref())?;
    let protocol = Protocol {
        max_tokens: options.max_tokens.get(),
        document_mark: options.calibration.document_mark.clone(),
        skip_bytes: options.skip_bytes,
        ..Protocol::default()
    };
    let folder = options.model.as_deref();
    let windows = model::windows_to_predict(&checkpoint, folder, text.as_ref(), &protocol)?;
    let methods: Vec<_> = match &options.methods {
        Some(methods) => methods.clone(),
        // Methods that calibrate take minutes together.
        None => {
            let calibrated = options.calibration.is_asked_for();
            let possible = |m: &&Method| calibrated || m.quantizer.needs() == Needs::Nothing;
            METHODS.iter().filter(possible).collect()
        }
    };

    let mut table = Table::new(options.json);
    let kernel = options.kernel.or_else(|| kernels().next()).unwrap_or_default();
    let title = format!(
        "{}: {} in {}, {}, kernel {kernel}",
        checkpoint.name(),
        counted(windows.predicted(), "token"),
        counted(windows.len(), "window"),
        counted(ctx.threads(), "thread"),
    );

    let bar = progress(windows.predicted(), "f32: loss");
    let model = model::load(&checkpoint)?;
    let baseline = Baseline::new(&model, &windows, &mut ctx, |done| bar.set_position(done as u64))?;
    bar.set_message("f32: speed");
    let weights = |linear: &dyn Linear| linear.in_features() * linear.out_features();
    let weights: usize = model.linears().map(|(_, linear)| weights(&**linear)).sum();
    let speed = measure_speed(&model, SPEED_TIME, &mut ctx)?;
    let mut rows = vec![Row {
        method: "f32".into(),
        bits_per_weight: 32.0,
        weight_bytes: 4 * weights,
        perplexity: baseline.perplexity().value,
        kl: 0.0,
        top1: 1.0,
        prefill_tokens_per_s: speed.prefill_tokens_per_s,
        decode_tokens_per_s: speed.decode_tokens_per_s,
    }];
    bar.finish_and_clear();
    table.head(&title)?;
    table.row(&rows[0])?;

    let calibration = &options.calibration;
    let needed = methods.iter().any(|method| method.quantizer.needs() > Needs::Nothing);
    let texts = calibration.windows(&checkpoint, options.model.as_deref(), needed)?;
    for method in methods {
        let folder = options.resume.as_ref().map(|folder| folder.join(method.name));
        let label = format!("{} {}", method.name, env!("CARGO_PKG_VERSION"));
        let finished = folder.as_ref().map(|folder| Finished { folder, label: &label });
        let (texts, how) = (texts.as_ref(), calibration.how(finished, false));
        let (quantized, layers) =
            model::quantize(&model, &checkpoint, method, texts, how, options.kernel, &mut ctx)
                .context(method.name)?;
        let weight_bytes: usize = layers.iter().map(|layer| layer.bytes).sum();
        let bar = progress(windows.predicted(), &format!("{}: loss", method.name));
        let comparison =
            baseline.compare(&quantized, &mut ctx, |done| bar.set_position(done as u64))?;
        bar.set_message(format!("{}: speed", method.name));
        let speed = measure_speed(&quantized, SPEED_TIME, &mut ctx)?;
        bar.finish_and_clear();
        rows.push(Row {
            method: method.name.into(),
            bits_per_weight: weight_bytes as f64 * 8.0 / weights as f64,
            weight_bytes,
            perplexity: comparison.perplexity.value,
            kl: comparison.kl,
            top1: comparison.top1,
            prefill_tokens_per_s: speed.prefill_tokens_per_s,
            decode_tokens_per_s: speed.decode_tokens_per_s,
        });
        table.row(&rows[rows.len() - 1])?;
        if options.layers {
            table.layers(&layers)?;
        }
    }

    if let Some(file) = plot_file {
        file.write(&plot::svg(checkpoint.name(), &rows)?)?;
    }
    if options.json {
        let report = Report { model: checkpoint.name(), tokens: windows.predicted(), rows: &rows };
        table.line(serde_json::to_string_pretty(&report)?)?;
    }
    table.finish()
}

/// Standard output: line by line for someone who watches, at once and only after everything went
/// well for a file or a program.
struct Table {
    json: bool,
    pending: Option<String>,
}

impl Table {
    fn new(json: bool) -> Self {
        let watched = std::io::stdout().is_terminal();
        Self { json, pending: (!watched || json).then(String::new) }
    }

    fn head(&mut self, title: &str) -> Result<()> {
        if self.json {
            return Ok(());
        }
        self.line(format!(
            "{title}\n\n{:<20} {:>8} {:>9} {:>10} {:>9} {:>7} {:>13} {:>12}",
            "method", "bits/w", "MiB", "perplexity", "KL", "top-1", "prefill tok/s", "decode tok/s"
        ))
    }

    fn row(&mut self, row: &Row) -> Result<()> {
        if self.json {
            return Ok(());
        }
        self.line(format!(
            "{:<20} {:>8.2} {:>9.2} {:>10.4} {:>9.5} {:>6.1}% {:>13.0} {:>12.0}",
            row.method,
            row.bits_per_weight,
            row.weight_bytes as f64 / f64::from(1 << 20),
            row.perplexity,
            row.kl,
            row.top1 * 100.0,
            row.prefill_tokens_per_s,
            row.decode_tokens_per_s
        ))
    }

    fn layers(&mut self, layers: &[LayerReport]) -> Result<()> {
        if self.json {
            return Ok(());
        }
        self.line(format!(
            "  {:<36} {:>8} {:>10} {:>6} {:>8} {:>9}  ",
            "layer", "bits/w", "error", "alpha", "damping", "outliers"
        ))?;
        for layer in layers {
            let dash = || "-".to_string();
            let report = &layer.report;
            let weights = layer.weights.max(1) as f64;
            let mut notes = Vec::new();
            if layer.scaled_at_run_time {
                notes.push("input scaled at run time".to_string());
            }
            if report.fallback {
                notes.push("rounded to nearest for want of calibration".to_string());
            }
            if report.dead_columns > 0 {
                notes.push(format!("{} dead inputs", report.dead_columns));
            }
            self.line(format!(
                "  {:<36} {:>8.2} {:>10} {:>6} {:>8} {:>8.2}%  {}",
                layer.name,
                layer.bytes as f64 * 8.0 / weights,
                layer.error.map_or_else(dash, |error| format!("{error:.2e}")),
                report.alpha.map_or_else(dash, |alpha| format!("{alpha:.2}")),
                report.damping.map_or_else(dash, |damping| format!("{damping:.3}")),
                report.outliers as f64 * 100.0 / weights,
                notes.join(", "),
            ))?;
        }
        Ok(())
    }

    fn line(&mut self, line: String) -> Result<()> {
        match &mut self.pending {
            Some(pending) => *pending += &(line + "\n"),
            None => writeln!(std::io::stdout(), "{line}")?,
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        write!(std::io::stdout(), "{}", self.pending.unwrap_or_default())?;
        Ok(())
    }
}
