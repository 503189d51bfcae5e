//! `lowbit eval`: the perplexity of a model on a text.

use std::{io::Write, path::PathBuf};

use anyhow::Result;
use lowbit_lm::{Protocol, eval};
use serde::Serialize;

use crate::{
    Threads, counted,
    model::{self, Text},
    progress,
};

/// Options of `lowbit eval`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the model (config.json, tokenizer.json, model.safetensors), or its GGUF file
    model: PathBuf,
    /// Text or tokens to evaluate on [default: eval.tokens of the model, where it has one]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens to evaluate on, at most
    #[arg(long, value_name = "N", default_value_t = Protocol::default().max_tokens)]
    max_tokens: usize,
    /// Tokens of a window, which BOS opens [default: the model's context less one]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// What stands between two documents, each of which then is a window of its own
    #[arg(long, value_name = "STRING")]
    document_mark: Option<String>,
    /// Bytes at the start of the text to pass over
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip_bytes: usize,
    #[command(flatten)]
    threads: Threads,
    /// Print JSON instead of a line
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    text: String,
    tokens: usize,
    windows: usize,
    perplexity: f64,
    /// Missing for a single token.
    standard_error: Option<f64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut ctx = options.threads.context()?;
    let text = options.text.as_deref().map(Text::read).transpose()?;
    let checkpoint = model::open(Some(&options.model))?;
    let protocol = Protocol {
        max_tokens: options.max_tokens,
        window: options.window,
        document_mark: options.document_mark.clone(),
        skip_bytes: options.skip_bytes,
    };
    let folder = Some(options.model.as_path());
    let windows = model::windows_to_predict(&checkpoint, folder, text.as_ref(), &protocol)?;
    let model = model::load(&checkpoint)?;
    let bar = progress(windows.predicted(), "perplexity");
    let result =
        eval::perplexity(&model, &windows, &mut ctx, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();

    let report = Report {
        model: checkpoint.name().to_string(),
        text: options.text.as_ref().map_or("eval.tokens".into(), |text| text.display().to_string()),
        tokens: result.tokens,
        windows: windows.len(),
        perplexity: result.value,
        standard_error: Some(result.standard_error).filter(|e| e.is_finite()),
    };
    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        let error = report.standard_error.map_or(String::new(), |e| format!(" ± {e:.6}"));
        let (tokens, windows) =
            (counted(report.tokens, "token"), counted(report.windows, "window"));
        let perplexity = report.perplexity;
        writeln!(out, "perplexity {perplexity:.6}{error} ({tokens} in {windows})")?;
    }
    Ok(())
}
