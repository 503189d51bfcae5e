//! `lowbit inspect`: what is in a file or a folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Result;
use lowbit::{
    QLinear, QuantType,
    formats::{
        Dtype, TensorSource,
        conventions::{self, QuantizationConfig},
    },
};
use lowbit_lm::{Tensors, quantization_config};
use serde::Serialize;

use crate::{model, text};

/// Options of `lowbit inspect`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A safetensors or GGUF file, or the folder of a model
    path: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    path: String,
    /// Of all tensors.
    bytes: usize,
    /// Of a GGUF file; of long values, the beginning.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
    layers: Vec<Layer>,
    /// Those that belong to no quantized layer.
    tensors: Vec<Tensor>,
}

/// A quantized layer.
#[derive(Debug, Serialize)]
struct Layer {
    name: String,
    convention: String,
    /// out_features and in_features.
    shape: Option<[usize; 2]>,
    scheme: Option<String>,
    /// Everything stored for the weights, as a matrix of this library has it.
    bits_per_weight: Option<f64>,
    /// Share of codes that are the smallest or the largest, 0 to 1; for integers.
    saturated: Option<f64>,
    /// Why it cannot be read.
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
    /// What is wrong with its numbers.
    problem: Option<String>,
}

/// How the names of the tensors of quantized layers end.
const ENDS: [&str; 8] = [
    ".qweight",
    ".weight",
    ".weight_packed",
    ".lowbit",
    "_blocks",
    ".SCB",
    ".weight_scale",
    ".scales",
];

pub(crate) fn run(options: &Options) -> Result<()> {
    let source = Tensors::open(&options.path)?;
    let config = configured(&options.path)?;
    let names = source.names();
    let candidates: BTreeSet<&str> = names
        .iter()
        .filter_map(|name| ENDS.iter().find_map(|end| name.strip_suffix(end)))
        .collect();
    let mut notes: BTreeSet<String> = config.notes().iter().cloned().collect();
    let layers: Vec<_> = candidates
        .into_iter()
        .filter_map(|name| layer(&source, name, &config, &mut notes))
        .collect();
    model::print_notes(&notes);
    let mut of_layers = BTreeSet::new();
    for layer in &layers {
        let at = names.partition_point(|name| *name < layer.name.as_str());
        let rests =
            names[at..].iter().map_while(|name| Some((name, name.strip_prefix(&layer.name)?)));
        of_layers
            .extend(rests.filter(|(_, rest)| rest.starts_with(['.', '_'])).map(|(name, _)| *name));
    }
    let mut bytes = 0;
    let mut tensors = Vec::new();
    for name in names {
        let view = source.tensor(name)?;
        bytes += view.bytes.len();
        if of_layers.contains(name) {
            continue;
        }
        let finite = match view.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => view.first_not_finite()?,
            _ => None,
        };
        tensors.push(Tensor {
            name: name.into(),
            dtype: view.dtype.to_string(),
            shape: view.shape.to_vec(),
            bytes: view.bytes.len(),
            problem: finite.map(|at| format!("element {at} is not finite")),
        });
    }
    let (path, metadata) = (options.path.display().to_string(), source.metadata());
    let metadata = metadata.iter().cloned().collect();
    let report = Report { path, bytes, metadata, layers, tensors };
    print(options, &report)
}

/// What lies beside the tensors says of quantized layers, as for whoever runs the model.
fn configured(path: &Path) -> Result<QuantizationConfig> {
    let folder = if path.is_dir() { Some(path) } else { path.parent() };
    let safetensors = path.is_dir() || path.extension().is_some_and(|end| end == "safetensors");
    Ok(match folder {
        Some(folder) if safetensors => quantization_config(folder)?,
        _ => QuantizationConfig::default(),
    })
}

/// The layer called `name`, as whoever runs the model reads it; `None` if it is not quantized.
fn layer(
    source: &dyn TensorSource,
    name: &str,
    config: &QuantizationConfig,
    notes: &mut BTreeSet<String>,
) -> Option<Layer> {
    let mut layer = Layer {
        name: name.into(),
        convention: String::new(),
        shape: None,
        scheme: None,
        bits_per_weight: None,
        saturated: None,
        problem: None,
    };
    match config.read(source, name) {
        Ok(None) => return None,
        Ok(Some(stored)) => {
            let weight = stored.layer.weight();
            layer.convention = stored.convention.name().into();
            layer.shape = Some([weight.rows(), weight.cols()]);
            layer.scheme = Some(weight.scheme().to_string());
            layer.bits_per_weight = Some(weight.bits_per_weight());
            layer.saturated = saturated(&stored.layer);
            notes.extend(stored.notes.into_iter().map(String::from));
        }
        Err(e) => {
            let detected = conventions::detect(source, name);
            layer.convention = detected.map_or("unknown".into(), |found| found.name().into());
            layer.problem = Some(e.to_string());
        }
    }
    Some(layer)
}

/// The share of integers at the ends of their range.
fn saturated(layer: &QLinear) -> Option<f64> {
    let weight = layer.weight();
    let QuantType::Int { .. } = weight.scheme().dtype else { return None };
    if weight.rows() == 0 || weight.cols() == 0 {
        return None;
    }
    let max = weight.scheme().dtype.max_code();
    let mut codes = vec![0; weight.cols()];
    let mut ends = 0;
    for row in 0..weight.rows() {
        weight.unpack_row(row, &mut codes).ok()?;
        ends += codes.iter().filter(|&&code| code == 0 || code == max).count();
    }
    Some(ends as f64 / (weight.rows() * weight.cols()).max(1) as f64)
}

/// A shape as a table shows it.
fn shape(shape: &[usize]) -> String {
    const MOST: usize = 8;
    let sizes: Vec<_> = shape.iter().take(MOST).map(ToString::to_string).collect();
    let sizes = sizes.join(", ");
    match shape.len() {
        0..=MOST => format!("[{sizes}]"),
        dimensions => format!("[{sizes}, … ({dimensions} dimensions)]"),
    }
}

/// Names as they are printed, and the width of their column.
fn column<'a>(names: impl Iterator<Item = &'a String>) -> (Vec<String>, usize) {
    let names: Vec<_> = names.map(|name| text::name(name)).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    (names, width)
}

fn print(options: &Options, report: &Report) -> Result<()> {
    let mut to = std::io::stdout();
    if options.json {
        writeln!(to, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    let Report { path, bytes, metadata, layers, tensors } = report;
    let count = layers.len() + tensors.len();
    let size = *bytes as f64 / f64::from(1 << 20);
    writeln!(to, "{path}: {size:.1} MiB, {} quantized layers of {count}", layers.len())?;
    let (keys, wide) = column(metadata.keys());
    for (value, key) in metadata.values().zip(keys) {
        writeln!(to, "{key:wide$}  {}", text::message(value))?;
    }
    let (names, wide) = column(layers.iter().map(|layer| &layer.name));
    for (layer, name) in layers.iter().zip(names) {
        write!(to, "{name:wide$}  ")?;
        match (layer.shape, layer.bits_per_weight, &layer.scheme, &layer.problem) {
            (Some([n, k]), Some(bits), Some(scheme), None) => {
                let convention = &layer.convention;
                write!(to, "{n} x {k}  {bits:.2} bits  {convention}: {scheme}")?;
                match layer.saturated {
                    Some(share) => writeln!(to, "  {:.1}% at the ends", 100.0 * share)?,
                    None => writeln!(to)?,
                }
            }
            (.., problem) => {
                let problem = problem.as_deref().unwrap_or("no reason known");
                writeln!(to, "damaged: {}", text::message(problem))?;
            }
        }
    }
    let (names, wide) = column(tensors.iter().map(|tensor| &tensor.name));
    for (tensor, name) in tensors.iter().zip(names) {
        let (dtype, shape) = (&tensor.dtype, shape(&tensor.shape));
        let problem = tensor.problem.as_ref().map_or(String::new(), |p| format!("  damaged: {p}"));
        writeln!(to, "{name:wide$}  {dtype} {shape}{problem}")?;
    }
    Ok(())
}
