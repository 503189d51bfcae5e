//! `lowbit outliers`: which features of a model's activations are large.

use std::{io::Write, num::NonZeroUsize, path::PathBuf};

use anyhow::Result;
use lowbit_lm::{
    Protocol,
    outliers::{self, Outliers},
};
use serde_json::json;

use crate::{
    Threads,
    model::{self, Text},
    new_file::NewFile,
    plot, progress,
};

/// Options of `lowbit outliers`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the model (config.json, tokenizer.json, model.safetensors), or its GGUF file
    model: PathBuf,
    /// Text or tokens to run it on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// What stands between two documents, each of which then stands on its own
    #[arg(long, value_name = "STRING")]
    document_mark: Option<String>,
    /// Tokens to look at, at most
    #[arg(long, value_name = "N", default_value = "2000")]
    max_tokens: NonZeroUsize,
    /// From which magnitude on a value is large
    #[arg(long, value_name = "X", default_value_t = 6.0)]
    threshold: f32,
    #[command(flatten)]
    threads: Threads,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Draw the largest magnitude of every feature in every layer
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let plot_file = options.plot.as_deref().map(NewFile::prepare).transpose()?;
    let mut ctx = options.threads.context()?;
    let text = Text::read(&options.text)?;
    let checkpoint = model::open(Some(&options.model))?;
    let protocol = Protocol {
        max_tokens: options.max_tokens.get(),
        document_mark: options.document_mark.clone(),
        ..Protocol::default()
    };
    let windows = text.windows(&checkpoint, &protocol)?;
    let model = model::load(&checkpoint)?;
    let bar = progress(windows.predicted() + windows.len(), "activations");
    let found = outliers::find(&model, &windows, options.threshold, &mut ctx, |done| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if let Some(file) = plot_file {
        file.write(&plot::outliers(checkpoint.name(), &found)?)?;
    }
    let report = if options.json { json(&found)? } else { tables(checkpoint.name(), &found) };
    write!(std::io::stdout(), "{report}")?;
    Ok(())
}

fn tables(model: &str, found: &Outliers) -> String {
    let Outliers { threshold, positions, inputs, features } = found;
    let mut lines = vec![
        format!("{model}: values of {threshold} and more at {positions} positions"),
        String::new(),
        format!("{:<36} {:>9} {:>9} {:>9}  largest", "input of", "max |x|", "features", "values"),
    ];
    for input in inputs {
        let values = input.counts.iter().sum::<usize>() as f64;
        let all = (positions * input.counts.len()).max(1) as f64;
        let mut order: Vec<_> = (0..input.counts.len()).filter(|&j| input.counts[j] > 0).collect();
        order.sort_by(|&a, &b| input.largest[b].total_cmp(&input.largest[a]));
        let largest: Vec<_> = order.iter().take(6).map(|j| j.to_string()).collect();
        lines.push(format!(
            "{:<36} {:>9.2} {:>9} {:>8.3}%  {}",
            input.layers.first().map_or("", String::as_str),
            input.largest.iter().fold(0.0_f32, |max, x| max.max(*x)),
            input.features(),
            values * 100.0 / all,
            largest.join(" "),
        ));
    }
    let count = features.iter().filter(|feature| feature.is_outlier()).count();
    lines.push(String::new());
    lines.push(format!(
        "{count} outlier features of the residual stream: in at least 25 % of the layers and 6 % of the positions"
    ));
    if !features.is_empty() {
        lines.push(format!(
            "{:>8} {:>9} {:>11} {:>9}  outlier",
            "feature", "layers", "positions", "max |x|"
        ));
    }
    for feature in features {
        lines.push(format!(
            "{:>8} {:>8.1}% {:>10.1}% {:>9.2}  {}",
            feature.feature,
            feature.layers * 100.0,
            feature.positions * 100.0,
            feature.largest,
            if feature.is_outlier() { "yes" } else { "no" }
        ));
    }
    lines.join("\n") + "\n"
}

fn json(found: &Outliers) -> Result<String> {
    let inputs = found.inputs.iter().map(
        |input| json!({ "layers": input.layers, "largest": input.largest, "counts": input.counts }),
    );
    let features = found.features.iter().map(|feature| {
        json!({
            "feature": feature.feature,
            "layers": feature.layers,
            "positions": feature.positions,
            "largest": feature.largest,
            "outlier": feature.is_outlier(),
        })
    });
    let report = json!({
        "threshold": found.threshold,
        "positions": found.positions,
        "inputs": inputs.collect::<Vec<_>>(),
        "features": features.collect::<Vec<_>>(),
    });
    Ok(serde_json::to_string_pretty(&report)? + "\n")
}
