//! `lowbit eval`: the perplexity of a model on a text.

use std::{io::Write, path::PathBuf};

use anyhow::Result;
use lowbit_lm::{Model, Protocol, Windows, eval};
use serde::Serialize;

use crate::{Threads, model, progress};

/// Options of `lowbit eval`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the model (config.json, tokenizer.json, model.safetensors), or its GGUF file
    model: PathBuf,
    /// Text to evaluate on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
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
    let text = model::read(&options.text)?;
    let checkpoint = model::open(Some(&options.model))?;
    let protocol = Protocol {
        max_tokens: options.max_tokens,
        window: options.window,
        document_mark: options.document_mark.clone(),
        skip_bytes: options.skip_bytes,
    };
    let file = options.text.display().to_string();
    let windows = Windows::from_text(&checkpoint, &file, &text, &protocol)?;
    let model = Model::load(&checkpoint)?;
    let bar = progress(windows.predicted(), "perplexity");
    let result =
        eval::perplexity(&model, &windows, &mut ctx, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();

    let report = Report {
        model: checkpoint.name().to_string(),
        text: file,
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
        let (tokens, windows) = (report.tokens, report.windows);
        let perplexity = report.perplexity;
        writeln!(out, "perplexity {perplexity:.6}{error} ({tokens} tokens in {windows} windows)")?;
    }
    Ok(())
}
