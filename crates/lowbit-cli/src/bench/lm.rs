//! `lowbit bench lm`: tokens per second of a model that does not fit the cache.

use std::{io::Write, num::NonZeroUsize, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use lowbit::{Context, Linear, PackedLinear};
use lowbit_lm::{Config, DenseLinear, Model, measure_speed};
use serde::Serialize;
use serde_json::json;

use crate::{
    Threads, progress,
    scheme::{self, Scheme},
};

#[derive(clap::Args)]
pub(super) struct Options {
    /// Ways to quantize, separated by commas: f32, or what `bench gemm --scheme` takes
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "A,B",
        default_value = "f32,int8,int8-a8,int4-g128,int4-g128-a8,int4-g32,int4-g32-a8",
        long_help = format!("Ways to quantize, separated by commas: f32; {}", scheme::HELP)
    )]
    methods: Vec<Way>,
    /// Blocks; Llama 3.2 1B has 16
    #[arg(long, value_name = "N", default_value = "16")]
    layers: NonZeroUsize,
    /// Tokens of the vocabulary; Llama 3.2 1B has 128256, whose embedding and head would take 1 GiB each in
    /// f32, as they are for every method here
    #[arg(long, value_name = "N", default_value = "2048")]
    vocab: NonZeroUsize,
    #[command(flatten)]
    threads: Threads,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// How the linear layers compute.
#[derive(Clone)]
enum Way {
    F32,
    Quantized(Scheme),
}

impl std::str::FromStr for Way {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(if name == "f32" { Self::F32 } else { Self::Quantized(name.parse()?) })
    }
}

#[derive(Serialize)]
struct Row {
    method: String,
    /// Of the linear layers, in memory.
    weight_bytes: usize,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

#[derive(Serialize)]
struct Report {
    op: &'static str,
    layers: usize,
    vocab: usize,
    threads: usize,
    rows: Vec<Row>,
}

/// How long to measure each of prefill and decode, at least.
const TIME: Duration = Duration::from_secs(1);

pub(super) fn run(options: &Options) -> Result<()> {
    let (layers, vocab) = (options.layers.get(), options.vocab.get());
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 512,
        "tie_word_embeddings": true
    });
    let config = Config::parse("the shape of the model", config.to_string().as_bytes())?;
    let mut ctx = options.threads.context()?;
    let threads = ctx.threads();
    let mut out = std::io::stdout();
    if !options.json {
        writeln!(
            out,
            "random weights, {layers} layers of 2048 x 8192, vocabulary {vocab}, {threads} threads\n\n\
             {:<16} {:>9} {:>14} {:>13}",
            "method", "MiB", "prefill tok/s", "decode tok/s"
        )?;
    }
    let mut rows = Vec::new();
    for way in &options.methods {
        let name = match way {
            Way::F32 => "f32",
            Way::Quantized(scheme) => &scheme.name,
        };
        let row = measure(&config, way, name, &mut ctx).with_context(|| name.to_string())?;
        if !options.json {
            writeln!(
                out,
                "{:<16} {:>9.0} {:>14.1} {:>13.2}",
                row.method,
                row.weight_bytes as f64 / f64::from(1 << 20),
                row.prefill_tokens_per_s,
                row.decode_tokens_per_s
            )?;
        }
        rows.push(row);
    }
    if options.json {
        let report = Report { op: "lm", layers, vocab, threads, rows };
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// Builds the model, which is dropped before that of the next method.
fn measure(config: &Config, way: &Way, name: &str, ctx: &mut Context) -> Result<Row> {
    let bar = progress(7 * config.num_hidden_layers, &format!("{name}: packing"));
    let mut weight_bytes = 0;
    let model = Model::random(config.clone(), |layer| {
        bar.inc(1);
        let w = layer.weight.as_ref();
        Ok(match way {
            Way::F32 => {
                weight_bytes += size_of_val(layer.weight.data());
                Arc::new(DenseLinear::new(w, layer.bias)?) as Arc<dyn Linear>
            }
            Way::Quantized(scheme) => {
                let packed = PackedLinear::new(&scheme.quantize(w, ctx)?)?;
                weight_bytes += packed.packed_bytes();
                Arc::new(packed)
            }
        })
    })?;
    bar.set_message(format!("{name}: speed"));
    let speed = measure_speed(&model, TIME, ctx)?;
    bar.finish_and_clear();
    Ok(Row {
        method: name.into(),
        weight_bytes,
        prefill_tokens_per_s: speed.prefill_tokens_per_s,
        decode_tokens_per_s: speed.decode_tokens_per_s,
    })
}
