//! `lowbit compare`: one model, every method, a table.

use std::{
    io::{IsTerminal, Write},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use lowbit::{Linear, METHODS, Method, kernels};
use lowbit_lm::{Checkpoint, Model, Protocol, Windows, eval::Baseline, measure_speed};
use serde::Serialize;

use crate::{Threads, model, new_file::NewFile, plot, progress};

/// Options of `lowbit compare`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of a model: config.json, tokenizer.json, model.safetensors [default: the embedded one]
    model: Option<PathBuf>,
    /// Methods to compare, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "A,B", value_parser = model::method())]
    methods: Option<Vec<&'static Method>>,
    /// Text to measure the loss on [default: eval.tokens of the model, where it has one]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// What stands between two documents of the text, each of which is evaluated on its own
    #[arg(long, value_name = "STRING", requires = "text")]
    document_mark: Option<String>,
    /// Tokens to measure the loss on, at most
    #[arg(long, value_name = "N", default_value = "12000")]
    max_tokens: NonZeroUsize,
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
    let checkpoint = model::open(options.model.as_ref())?;
    let windows = windows(options, &checkpoint)?;
    let methods: Vec<_> = match &options.methods {
        Some(methods) => methods.clone(),
        None => METHODS.iter().collect(),
    };

    let mut table = Table::new(options.json);
    let kernel = options.kernel.or_else(|| kernels().next()).unwrap_or_default();
    let title = format!(
        "{}: {} tokens in {} windows, {} threads, kernel {kernel}",
        checkpoint.name(),
        windows.predicted(),
        windows.len(),
        ctx.threads(),
    );

    let bar = progress(windows.predicted(), "f32: loss");
    let model = Model::load(&checkpoint)?;
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

    let calibrations = model::calibrate(&model, options.model.as_ref(), &methods, &mut ctx)?;
    for method in methods {
        let (quantized, weight_bytes) =
            model::quantize(&model, &checkpoint, method, &calibrations, options.kernel, &mut ctx)
                .context(method.name)?;
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

/// The text that the losses are measured on.
fn windows(options: &Options, checkpoint: &Checkpoint) -> Result<Windows> {
    if let Some(file) = &options.text {
        let protocol = Protocol {
            max_tokens: options.max_tokens.get(),
            document_mark: options.document_mark.clone(),
            ..Protocol::default()
        };
        let text = model::read(file)?;
        return Ok(Windows::from_text(checkpoint, &file.display().to_string(), &text, &protocol)?);
    }
    let windows = match &options.model {
        None => Windows::from_tokens(checkpoint.config(), "eval.tokens", model::EVAL_TOKENS)?,
        Some(folder) => {
            let file = folder.join("eval.tokens");
            let tokens = std::fs::read_to_string(&file).map_err(|e| {
                anyhow!("cannot read {}: {e}; or give a text with --text FILE", file.display())
            })?;
            Windows::from_tokens(checkpoint.config(), &file.display().to_string(), &tokens)?
        }
    };
    Ok(windows.first(options.max_tokens.get()))
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
            "{title}\n\n{:<14} {:>8} {:>9} {:>10} {:>9} {:>7} {:>13} {:>12}",
            "method", "bits/w", "MiB", "perplexity", "KL", "top-1", "prefill tok/s", "decode tok/s"
        ))
    }

    fn row(&mut self, row: &Row) -> Result<()> {
        if self.json {
            return Ok(());
        }
        self.line(format!(
            "{:<14} {:>8.2} {:>9.2} {:>10.4} {:>9.5} {:>6.1}% {:>13.0} {:>12.0}",
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
