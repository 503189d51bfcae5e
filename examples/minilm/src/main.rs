//! What methods lose on the real activations of a BERT encoder:
//! `cargo run --release -p minilm -- FOLDER_OF_MINILM TEXT`
//!
//! Squared error of the outputs over their squares, the geometric mean of six layers: calibrated on the
//! first 32 windows of 128 tokens, measured on the next 32.

use std::{io::Write, path::Path, sync::Arc};

use lowbit::{Context, Method};
use minilm::{Encoder, Kind, Result, Study, mean};

/// Methods, behind the one that they are compared with.
const TABLE: &[&[&str]] = &[
    &["w8a8", "llm-int8", "smoothquant", "smoothquant-auto", "w8a8-rot", "smoothquant-rot-gptq"],
    &["w8a8-tensor", "llm-int8-tensor", "smoothquant-tensor", "smoothquant-rot-gptq-tensor"],
    &["int4-g32-zp", "awq-g32", "gptq-int4-g32-zp", "best-int4-g32-zp", "spqr-int4-g16"],
    &["int3-g32-zp", "gptq-int3-g32-zp", "best-int3-g32-zp", "spqr-int3-g16"],
];

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(text)) = (args.next(), args.next()) else {
        return Err("usage: minilm FOLDER_OF_MINILM TEXT".into());
    };
    let folder = Path::new(&folder);
    let threads = std::thread::available_parallelism()?.get();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let ctx = &mut Context::with_pool(Arc::new(pool));
    let encoder = Encoder::open(folder)?;
    let windows = encoder.windows(&std::fs::read_to_string(text)?, 128, 64)?;
    let windows = windows.split_at(32);
    let kinds = [Kind::Query, Kind::Intermediate];
    let [query, intermediate] = kinds.map(|kind| Study::new(&encoder, folder, kind, windows, ctx));
    let studies = [query?, intermediate?];

    let mut out = std::io::stdout();
    writeln!(
        out,
        "| method | bits | query | below the first | intermediate.dense | below the first |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|")?;
    for part in TABLE {
        let mut first = None;
        for name in *part {
            let method = Method::named(name).ok_or_else(|| format!("there is no method {name}"))?;
            let recipe = &method.quantizer;
            let mut errors = [0.0; 2];
            for (error, study) in errors.iter_mut().zip(&studies) {
                *error = mean(&study.errors(recipe, ctx)?);
            }
            let bits = studies[1].bits_per_weight(recipe)?;
            let first = first.get_or_insert(errors);
            let [(q, q_times), (i, i_times)] = [0, 1].map(|k| (errors[k], first[k] / errors[k]));
            writeln!(
                out,
                "| `{name}` | {bits:.2} | {q:.2e} | {q_times:.2} | {i:.2e} | {i_times:.2} |"
            )?;
        }
    }
    Ok(())
}
