//! `lowbit generate`: a model continues a text.

use std::{io::Write, ops::ControlFlow, path::PathBuf};

use anyhow::{Result, bail};
use lowbit::{Method, Needs, Quantizer};
use lowbit_lm::{Sampling, generate};

use crate::{Threads, model};

/// Options of `lowbit generate`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the model (config.json, tokenizer.json, model.safetensors), or its GGUF file [default: the embedded one]
    model: Option<PathBuf>,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Method to quantize the model by first [default: none]
    #[arg(long, value_name = "NAME", value_parser = model::method())]
    method: Option<&'static Method>,
    /// Tokens to write, at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,
    /// 0 always takes the likeliest token; 1 samples from the model as it is
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Sample from the K likeliest tokens only
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample from the likeliest tokens only that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// The same seed gives the same text [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    #[command(flatten)]
    calibration: model::CalibrationOptions,
    #[command(flatten)]
    threads: Threads,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut ctx = options.threads.context()?;
    let given = [
        (options.top_k.is_some(), "--top-k"),
        (options.top_p.is_some(), "--top-p"),
        (options.seed.is_some(), "--seed"),
    ];
    if let Some((_, option)) = given.into_iter().find(|(given, _)| *given)
        && options.temperature == 0.0
    {
        bail!(
            "temperature 0 always takes the likeliest token: leave {option} out, or give --temperature 1"
        );
    }
    let method = options.method.map(|method| (method.name, method.quantizer.needs()));
    let (name, needs) = method.unwrap_or(("a model as it is", Needs::Nothing));
    options.calibration.check_used(name, needs > Needs::Nothing)?;
    let checkpoint = model::open(options.model.as_ref())?;
    let mut model = model::load(&checkpoint)?;
    if let Some(method) = options.method {
        let calibration = &options.calibration;
        let needed = method.quantizer.needs() > Needs::Nothing;
        let texts = calibration.windows(&checkpoint, options.model.as_deref(), needed)?;
        let (texts, how) = (texts.as_ref(), calibration.how(None, false));
        (model, _) = model::quantize(&model, &checkpoint, method, texts, how, None, &mut ctx)?;
    }
    let sampling = Sampling {
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        seed: options.seed.unwrap_or(0),
    };

    // The prompt is shown with the first new text, so that a refusal prints nothing.
    let mut out = std::io::stdout();
    let mut prompt = options.prompt.as_str();
    let mut printed = Ok(());
    let mut print = |text: &str| {
        printed = write!(out, "{prompt}{text}").and_then(|()| out.flush());
        prompt = "";
        if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let tokenizer = checkpoint.tokenizer();
    let (text, n) = (options.prompt.as_str(), options.max_tokens);
    generate(&model, tokenizer, text, n, sampling, &mut ctx, &mut print)?;
    printed?;
    writeln!(std::io::stdout(), "{prompt}")?;
    Ok(())
}
