//! `lowbit quantize`: a checkpoint becomes another one, block by block.
//!
//! Methods that need no statistics take any checkpoint, layer by layer. Methods that calibrate run the model
//! as far as it is quantized ([`Quantization`]), and so must know its architecture.

mod format;
mod gguf;
mod input;
mod stage;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use indicatif::ProgressBar;
use lowbit::{
    Calibration, Context, Needs, QLinear, Quantizer, Report as Decisions,
    formats::{
        Dtype, Tensor, TensorSource, TensorView,
        conventions::{self, QuantizationConfig},
    },
};
use lowbit_lm::{
    Finished, LinearWeights, Tensors, Unpacked, Windows, is_gguf,
    llama_gguf::{self, Metadata},
    quantize::{self, LayerReport, Quantization, relative_error},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::{
    format::{Format, Shapes},
    input::Input,
    stage::{HIDDEN, Stage, fingerprint},
};
use crate::{
    Threads, model, progress,
    scheme::{Defaults, MethodOptions, Scheme},
    text,
};

/// Options of `lowbit quantize`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the model (config.json, tokenizer.json, model.safetensors), or its GGUF file
    model: PathBuf,
    #[command(flatten)]
    method: MethodOptions,
    #[command(flatten)]
    calibration: model::CalibrationOptions,
    /// Convention to store the layers in
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Format::Lowbit)]
    format: Format,
    /// Layers to leave as they are: their names, in which * stands for any characters; repeatable
    #[arg(long, value_name = "PATTERN")]
    skip: Vec<String>,
    /// Folder to make; an interrupted run continues in FOLDER.part
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    threads: Threads,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// What was done to a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    name: String,
    convention: String,
    weights: usize,
    /// Stored for them, the bias not included.
    bytes: usize,
    /// `‖W − Ŵ‖ / ‖W‖`, for the weights Ŵ that the file is read as; W with the scales that have been folded
    /// into it.
    relative_error: f64,
    /// The relative squared error of its outputs on the calibration texts, if their second moment was looked at.
    output_error: Option<f64>,
    /// The strength of the scale of channels, and the damping of the second moment.
    alpha: Option<f32>,
    damping: Option<f64>,
    /// Weights kept beside the codes.
    outliers: usize,
    /// Where the file is not what was asked for.
    substitutions: Vec<String>,
}

/// What stands in the report about a file of the checkpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Part {
    layers: Vec<Layer>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Report {
    model: String,
    out: String,
    method: String,
    format: String,
    /// Tokens that were calibrated on.
    calibration_tokens: usize,
    bits_per_weight: f64,
    /// Of the quantized layers.
    weight_bytes: usize,
    /// Of all tensors, before and after.
    bytes_before: usize,
    bytes_after: usize,
    mean_relative_error: f64,
    layers: Vec<Layer>,
    /// Tensors that were copied as they are.
    copied: Vec<String>,
    /// Tensors into which scales of channels were folded, in f32.
    folded: Vec<String>,
    /// Linear layers that stay floats, and are named so in config.json.
    floats: Vec<String>,
    /// Where the result is not what was asked for.
    substitutions: Vec<String>,
    /// Tells runs apart: the same for the same model, method, format and texts.
    job: Value,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let scheme = options.method.scheme(match options.format {
        Format::Gguf => gguf::DEFAULTS,
        _ => Defaults::default(),
    })?;
    if options.out.symlink_metadata().is_ok() {
        let out = options.out.display();
        bail!("{out} exists already; remove it or name another folder");
    }
    let mut ctx = options.threads.context()?;
    let needs = scheme.recipe.needs();
    let why = match (needs, options.format) {
        (Needs::Nothing, Format::Gguf) => Some("GGUF needs a model's names and metadata".into()),
        (Needs::Nothing, _) => None,
        _ => Some(format!("{} is calibrated block by block", scheme.name)),
    };
    let mut input = Input::open(&options.model, why.as_deref())?;
    input.config_json(&options.model)?; // which is written at the end, and must be there
    input.leave_out(&options.skip)?;
    if !options.skip.is_empty() && scheme.recipe.scale.is_some() && needs > Needs::Nothing {
        bail!(
            "--skip does not go with {}, which folds scales of channels into neighbouring layers: choose a method without such scales, such as gptq",
            scheme.name
        );
    }
    let names = input.blocks().iter().flatten();
    let shapes = names.map(|name| input.shape(name)).collect::<Result<Shapes>>()?;
    options.format.check(&scheme, options.method.is_family(), &shapes)?;
    let gguf = match input.checkpoint().filter(|_| options.format == Format::Gguf) {
        Some(checkpoint) => Some(gguf::metadata(&options.model, checkpoint)?),
        None => None,
    };
    options.calibration.check_used(&scheme.name, needs > Needs::Nothing)?;
    let windows = match input.checkpoint().filter(|_| needs > Needs::Nothing) {
        Some(checkpoint) => options.calibration.windows(checkpoint, Some(&options.model), true)?,
        None => None,
    };
    let (windows, gguf) = (windows.as_ref(), gguf.as_ref());
    let run = Run { options, scheme: &scheme, input: &input, windows, gguf };
    let job = run.job()?;
    let report_file = report_file(&options.model)?;
    let stage = Stage::open(&options.out, options.format == Format::Gguf, &job, &report_file)?;
    let report = if stage.is_complete() {
        serde_json::from_slice(&model::read(&stage.path(&report_file))?)?
    } else {
        let parts = run.parts(&stage, &mut ctx);
        let report = parts.and_then(|parts| run.finish(&stage, parts, &job, &report_file));
        report.inspect_err(|_| stage.discard_if_empty())?
    };
    stage.rename(&options.out)?;
    print(options, &report, &report_file)
}

/// The name of the report: the model may have a file of that name itself, which is copied.
fn report_file(model: &Path) -> Result<String> {
    let hidden = model.join(HIDDEN);
    if hidden.is_file() {
        bail!("{} is in the way of the work: give it another name", hidden.display());
    }
    let mut name = "quantization.json".to_string();
    for number in 2.. {
        if !model.join(&name).exists() {
            break;
        }
        name = format!("quantization-{number}.json");
    }
    Ok(name)
}

/// What is to be done.
struct Run<'a> {
    options: &'a Options,
    scheme: &'a Scheme,
    input: &'a Input,
    windows: Option<&'a Windows>,
    /// What a GGUF file holds beside its tensors, if that is the format.
    gguf: Option<&'a Metadata>,
}

impl Run<'_> {
    /// Writes what is not there yet, and returns what the report says of each file.
    fn parts(&self, stage: &Stage, ctx: &mut Context) -> Result<Vec<Part>> {
        let Self { options, scheme, input, windows, .. } = *self;
        let needs = scheme.recipe.needs();
        let kept = stage.blocks();
        let label = format!("{} {}", scheme.name, env!("CARGO_PKG_VERSION"));
        let mut calibrated = match input.checkpoint().filter(|_| needs > Needs::Nothing) {
            Some(checkpoint) => {
                let finished = Some(Finished { folder: &kept, label: &label });
                let folded_scales_only = !options.format.holds_scales();
                let how = options.calibration.how(finished, folded_scales_only);
                let how = quantize::Options { left_out: input.left_out(), ..how };
                Some(Quantization::new(checkpoint, &scheme.recipe, windows, how)?)
            }
            None => None,
        };
        let memory = match &calibrated {
            Some(run) => run.memory(ctx.threads())?,
            None => streaming_memory(input, scheme, ctx.threads())?,
        };
        let blocks = input.blocks();
        let layers = blocks.iter().flatten().count();
        let _ = writeln!(
            std::io::stderr(), // which may be closed
            "{} by {}: {} blocks, {layers} layers; needs up to {:.0} MiB of memory beside the mapped files",
            options.model.display(),
            scheme.name,
            blocks.len(),
            memory as f64 / f64::from(1 << 20),
        );
        let bar = progress(layers, &scheme.name);
        let mut unpacked = Vec::new();
        let mut parts = vec![others(input, options, needs, stage)?];
        for (names, index) in blocks.iter().zip(1..) {
            let done = stage.part(index, blocks.len());
            // The blocks behind it need the output of a block that is done.
            let block = match (&mut calibrated, &done) {
                (Some(run), _) => {
                    let (layers, norms, slow) = calibrated_block(run, input, ctx, &bar)?;
                    unpacked.extend(slow);
                    Some((layers, norms))
                }
                (None, None) => {
                    Some((streamed_block(input, names, scheme, ctx, &bar)?, Vec::new()))
                }
                (None, Some(_)) => {
                    bar.inc(names.len() as u64);
                    None
                }
            };
            parts.push(match (done, block) {
                (None, Some((layers, norms))) => {
                    let (part, tensors) = store(input, options, scheme, layers, norms, ctx)?;
                    let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
                    stage.write_part((index, blocks.len()), &part, &views)?;
                    input.tensors().release();
                    part
                }
                (done, _) => done.unwrap_or_default(),
            });
        }
        bar.finish_and_clear();
        model::say(&unpacked);
        Ok(parts)
    }

    /// What the run is about: another one may continue it only if it is the same.
    fn job(&self) -> Result<Value> {
        let Self { options, scheme, input, windows, .. } = *self;
        let model = fs::canonicalize(&options.model)?;
        let (folder, file) = match (model.parent(), model.file_name()) {
            (Some(folder), Some(file)) if model.is_file() => (folder, Some(file.to_string_lossy())),
            _ => (model.as_path(), None),
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if file.as_ref().is_some_and(|file| !belongs_to(file, &name)) {
                continue;
            }
            // Of what a link leads to: caches of models are full of them.
            let data = fs::metadata(entry.path())?;
            if !data.is_file() {
                continue;
            }
            let modified = data.modified()?.duration_since(std::time::UNIX_EPOCH);
            files.push((name, data.len(), modified.map_or(0, |time| time.as_secs())));
        }
        files.sort();
        Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": model.display().to_string(),
            "files": files,
            "method": scheme.name,
            "format": options.format.name(),
            "left_out": input.left_out(),
            "true_sequential": options.calibration.is_true_sequential(),
            "calibration": windows.map(|windows| {
                // FNV-1a, to tell texts apart.
                let fnv = |hash: u64, token: &u32| (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3);
                let hash = windows.iter().flatten().fold(0xcbf2_9ce4_8422_2325, fnv);
                (windows.len(), windows.predicted(), format!("{hash:016x}"))
            }),
        }))
    }

    /// Writes index, configuration, the model's other files and, last, the report.
    fn finish(&self, stage: &Stage, parts: Vec<Part>, job: &Value, file: &str) -> Result<Report> {
        let Self { options, input, .. } = *self;
        let blocks = parts.len() - 1;
        let files: Vec<_> = (0..=blocks).map(|index| stage.part_name(index, blocks)).collect();
        let opened = files.iter().map(|file| Tensors::open_file(&stage.path(file)));
        let opened: Vec<_> = opened.collect::<Result<_, _>>()?;
        let mut map = serde_json::Map::new();
        let mut views = BTreeMap::new();
        for (file, tensors) in files.iter().zip(&opened) {
            for name in tensors.names() {
                views.insert(name, tensors.tensor(name)?);
                map.insert(name.into(), file.clone().into());
            }
        }
        let bytes_after = views.values().map(|view| view.bytes.len()).sum();
        let (mut copied, mut folded) = (Vec::new(), Vec::new());
        for name in input.others() {
            let old = input.tensors().tensor(name)?;
            let same = views.get(name).is_some_and(|new| same_numbers(&old, new));
            if same { &mut copied } else { &mut folded }.push(name.to_string());
        }
        let mut config = input.config_json(&options.model)?;
        let floats = floats(input)?;
        match self.gguf {
            Some(metadata) => {
                gguf::write(stage, metadata, views.into_values().collect())?;
                drop(opened);
                files.iter().try_for_each(|file| fs::remove_file(stage.path(file)))?;
            }
            None => {
                let index = json!({"metadata": {"total_size": bytes_after}, "weight_map": map});
                stage.write_json("model.safetensors.index.json", &index)?;
                let quantization = parts.iter().find_map(|part| part.quantization_config.clone());
                if let Some(mut quantization) = quantization {
                    let floats: Vec<_> = floats.iter().map(String::as_str).collect();
                    conventions::leave_out(&mut quantization, &floats);
                    config["quantization_config"] = quantization;
                }
            }
        }
        stage.write_json("config.json", &config)?;
        if options.model.is_dir() {
            copy_others(&options.model, stage)?;
        }
        if let Some(checkpoint) = input.checkpoint().filter(|checkpoint| checkpoint.is_gguf()) {
            let tokenizer = checkpoint.tokenizer_json();
            stage.write("tokenizer.json", |to| Ok(to.write_all(tokenizer)?))?;
        }
        let layers = parts.into_iter().flat_map(|part| part.layers).collect();
        let report = Report { copied, folded, floats, ..self.report(layers, bytes_after, job)? };
        stage.write_json(file, &report)?;
        Ok(report)
    }

    fn report(&self, layers: Vec<Layer>, bytes_after: usize, job: &Value) -> Result<Report> {
        let Self { options, scheme, input, windows, gguf } = *self;
        let other = gguf.map_or(&[][..], |metadata| &metadata.substitutions);
        let tensors = input.tensors();
        let mut bytes_before = 0;
        for name in tensors.names() {
            bytes_before += tensors.tensor(name)?.bytes.len();
        }
        let weights: usize = layers.iter().map(|layer| layer.weights).sum();
        let bytes: usize = layers.iter().map(|layer| layer.bytes).sum();
        let errors: f64 = layers.iter().map(|layer| layer.relative_error).sum();
        let substitutions = layers.iter().flat_map(|layer| {
            layer.substitutions.iter().map(|what| format!("{}: {what}", layer.name))
        });
        Ok(Report {
            model: options.model.display().to_string(),
            out: options.out.display().to_string(),
            method: scheme.name.clone(),
            format: options.format.name(),
            calibration_tokens: windows.map_or(0, Windows::predicted),
            bits_per_weight: bytes as f64 * 8.0 / weights.max(1) as f64,
            weight_bytes: bytes,
            bytes_before,
            bytes_after,
            mean_relative_error: errors / layers.len().max(1) as f64,
            substitutions: other.iter().cloned().chain(substitutions).collect(),
            copied: Vec::new(),
            folded: Vec::new(),
            floats: Vec::new(),
            job: fingerprint(job),
            layers,
        })
    }
}

/// The linear layers that stay floats. A head that is tied to the embedding has no tensor of its own.
fn floats(input: &Input) -> Result<Vec<String>> {
    let mut floats = input.linear_floats()?;
    if !input.tensors().names().iter().any(|name| name.ends_with("lm_head.weight")) {
        floats.push("lm_head".into());
    }
    Ok(floats)
}

/// Compares a few numbers at a time: embeddings are large.
fn same_numbers(a: &TensorView<'_>, b: &TensorView<'_>) -> bool {
    const NUMBERS: usize = 1 << 16;
    if a.dtype == b.dtype {
        return a.bytes == b.bytes;
    }
    // Blocks of ggml are of up to 256 numbers.
    let bytes =
        |view: &TensorView<'_>| view.dtype.block().map(|(numbers, size)| NUMBERS / numbers * size);
    let (Some(step_a), Some(step_b)) = (bytes(a), bytes(b)) else { return false };
    let f32 = |view: &TensorView<'_>, bytes: &[u8]| {
        let shape = [bytes.len() / view.dtype.block()?.1 * view.dtype.block()?.0];
        TensorView { bytes, shape: &shape, ..*view }.to_f32().ok()
    };
    a.shape == b.shape
        && a.bytes
            .chunks(step_a)
            .zip(b.bytes.chunks(step_b))
            .all(|(x, y)| f32(a, x).is_some_and(|x| Some(x) == f32(b, y)))
}

/// Writes what belongs to no linear layer, as it is; but for the norms of blocks that may take scales.
fn others(input: &Input, options: &Options, needs: Needs, stage: &Stage) -> Result<Part> {
    let (part, blocks) = (Part::default(), input.blocks().len());
    if stage.part(0, blocks).is_some() {
        return Ok(part);
    }
    let tensors = input.tensors();
    let copied = copied(input, needs).into_iter().map(|name| tensors.tensor(name));
    let copied: Vec<_> = copied.collect::<Result<_, _>>()?;
    let gguf = input.checkpoint().filter(|_| options.format == Format::Gguf);
    let change = |view: &TensorView<'_>| -> Result<Option<Tensor>> {
        Ok(match (gguf, view.dtype) {
            (Some(checkpoint), _) => llama_gguf::to_gguf(checkpoint.config(), *view)?,
            // Blocks of ggml have no place in safetensors.
            (None, Dtype::Ggml(_)) => {
                Some(Tensor::f32(view.name, view.shape.to_vec(), &view.to_f32()?))
            }
            (None, _) => None,
        })
    };
    let changed = copied.iter().map(change).collect::<Result<Vec<_>>>()?;
    let views: Vec<_> = copied
        .iter()
        .zip(&changed)
        .map(|(view, changed)| changed.as_ref().map_or(*view, Tensor::view))
        .collect();
    stage.write_part((0, blocks), &part, &views)?;
    tensors.release();
    Ok(part)
}

/// The tensors that are copied.
fn copied(input: &Input, needs: Needs) -> Vec<&str> {
    let left_out = |layer: &str| input.left_out().iter().any(|name| name == layer);
    let of_block = |name: &str| {
        let layer = name.rsplit_once('.').map_or(name, |(layer, _)| layer);
        needs > Needs::Nothing && name.starts_with("model.layers.") && !left_out(layer)
    };
    input.others().into_iter().filter(|name| !of_block(name)).collect()
}

/// The layers of a block and what was done to them.
type Layers = Vec<(QLinear, LayerReport)>;

/// The layers of a block and the norms that belong to it, quantized on what the blocks before it give, and
/// which of the layers no kernel takes.
fn calibrated_block(
    run: &mut Quantization<'_>,
    input: &Input,
    ctx: &mut Context,
    bar: &ProgressBar,
) -> Result<(Layers, Vec<Tensor>, Vec<Unpacked>)> {
    let block = run.next_block(ctx, |layer| model::pack(layer, None), |_| bar.inc(1))?;
    let block = block.ok_or_else(|| anyhow!("the model has fewer blocks than names of layers"))?;
    let norm = |(name, gains): (String, Vec<f32>)| -> Result<Tensor> {
        let stored = input.tensors().tensor(&name)?;
        // Gains that a scale was folded into may have no place in 16 bits.
        Ok(match stored.to_f32()? == gains {
            true => Tensor::new(name, stored.dtype, stored.shape.to_vec(), stored.bytes.to_vec()),
            false => Tensor::f32(name, vec![gains.len()], &gains),
        })
    };
    let unpacked = block.unpacked();
    let norms = block.norms.into_iter().map(norm).collect::<Result<_>>()?;
    Ok((block.layers, norms, unpacked))
}

/// The layers of a block, quantized side by side, each by itself.
fn streamed_block(
    input: &Input,
    names: &[String],
    scheme: &Scheme,
    ctx: &Context,
    bar: &ProgressBar,
) -> Result<Layers> {
    let quantize = |name: &String| -> Result<(QLinear, LayerReport)> {
        let LinearWeights { weight, bias, .. } = input.linear(name)?;
        // Layers are quantized side by side, so each on one thread.
        let (calibration, mut ctx) = (Calibration::new(weight.cols()), Context::new());
        let quantized = scheme.recipe.quantize(weight.as_ref(), &calibration, &mut ctx)?;
        let layer = quantized.layer.with_bias(bias)?;
        let report = LayerReport {
            name: name.clone(),
            weights: weight.data().len(),
            bytes: layer.bytes(),
            error: None,
            weight_error: relative_error(weight.as_ref(), &layer)?,
            scaled_at_run_time: false,
            report: quantized.report,
        };
        bar.inc(1);
        Ok((layer, report))
    };
    on_threads(ctx, || {
        names.par_iter().map(|name| quantize(name).with_context(|| name.clone())).collect()
    })
}

fn on_threads<T: Send>(ctx: &Context, f: impl FnOnce() -> T + Send) -> T {
    match ctx.pool() {
        Some(pool) => pool.install(f),
        None => f(),
    }
}

/// The tensors of a block, its `norms` among them.
fn store(
    input: &Input,
    options: &Options,
    scheme: &Scheme,
    layers: Layers,
    norms: Vec<Tensor>,
    ctx: &Context,
) -> Result<(Part, Vec<Tensor>)> {
    let stored = on_threads(ctx, || {
        let store = |(layer, report)| store_layer(options.format, scheme, layer, report);
        layers.into_par_iter().map(store).collect::<Result<Vec<_>>>()
    })?;
    let (mut part, mut tensors) = (Part::default(), norms);
    for (layer, config, layer_tensors) in stored {
        part.layers.push(layer);
        part.quantization_config = config;
        tensors.extend(layer_tensors);
    }
    if let Some(checkpoint) = input.checkpoint().filter(|_| options.format == Format::Gguf) {
        for tensor in &mut tensors {
            if let Some(changed) = llama_gguf::to_gguf(checkpoint.config(), tensor.view())? {
                *tensor = changed;
            }
        }
    }
    Ok((part, tensors))
}

fn store_layer(
    format: Format,
    scheme: &Scheme,
    layer: QLinear,
    done: LayerReport,
) -> Result<(Layer, Option<Value>, Vec<Tensor>)> {
    let LayerReport { name, weights, error, weight_error, scaled_at_run_time, report, .. } = done;
    let Decisions { damping, alpha, dead_columns, outliers, fallback, .. } = report;
    let convention = format.convention(&layer);
    let tensors = convention.write(&layer, &name)?;

    let mut substitutions = Vec::new();
    if fallback {
        substitutions.push("rounded to nearest, since nothing is known of its inputs".into());
    }
    if scaled_at_run_time {
        substitutions
            .push("its input is scaled at run time: no layer before it can take the scale".into());
    }
    if scheme.recipe.scale.is_some() && alpha.is_none() {
        let (no_layer, format) = ("no layer before it can take a scale", format.name());
        substitutions
            .push(format!("its input is not scaled: {no_layer}, and {format} has no place"));
    }
    if dead_columns > 0 {
        substitutions.push(format!("weights of {dead_columns} inputs without a signal became 0"));
    }
    // What the files say to whoever reads them, not what was meant to be written.
    let config = convention.config(&layer);
    let reader = config.as_ref().map(QuantizationConfig::parse).transpose()?.unwrap_or_default();
    let back = match reader.read(&tensors, &name)? {
        Some(back) => back.layer,
        None => convention.read(&tensors, &name)?,
    };
    if back.weight() != layer.weight() || back.transforms() != layer.transforms() {
        let (meant, read) = (layer.effective_weight()?, back.effective_weight()?);
        let difference = |(a, b): (&f32, &f32)| (a - b).abs();
        let largest = meant.data().iter().zip(read.data()).map(difference).fold(0.0, f32::max);
        if largest > 0.0 {
            let what = format!("weights are stored within {largest:e} of those computed");
            substitutions.push(what);
        }
    }
    if back.activation() != layer.activation() || back.outliers() != layer.outliers() {
        substitutions.push("inputs are quantized in another way when the file is read".into());
    }
    let bias = format!("{name}.bias");
    let stored = tensors.iter().filter(|tensor| tensor.name != bias);
    let report = Layer {
        convention: convention.name().into(),
        weights,
        bytes: stored.map(|tensor| tensor.bytes.len()).sum(),
        relative_error: weight_error,
        output_error: error,
        alpha,
        damping,
        outliers,
        substitutions,
        name,
    };
    Ok((report, config, tensors))
}

/// Of the layers that are worked on at the same time, weights in f32 as they are and as they will be read,
/// and what the method takes; of the largest block, what is stored, before and behind the convention.
fn streaming_memory(input: &Input, scheme: &Scheme, threads: usize) -> Result<u64> {
    let mut largest = 0;
    for names in input.blocks() {
        let (mut stored, mut layers) = (0, Vec::new());
        for name in names {
            let (n, k) = input.shape(name)?;
            let plan = scheme.recipe.plan(n, k)?;
            stored += plan.bytes as u64;
            layers.push(8 * plan.weights + plan.memory);
        }
        layers.sort_unstable_by(|a, b| b.cmp(a));
        largest = largest.max(3 * stored + layers.iter().take(threads).sum::<u64>());
    }
    Ok(largest)
}

/// Is `name` what a GGUF file is read with: itself, its other parts, and the texts beside it?
fn belongs_to(file: &str, name: &str) -> bool {
    // But for its number, NAME-00001-of-00003.gguf is the name of all parts.
    let unnumbered = |name: &str| {
        let (start, count) = name.rsplit_once("-of-")?;
        Some((start.rsplit_once('-')?.0.to_owned(), count.to_owned()))
    };
    let texts = ["config.json", "tokenizer.json"];
    let is_part = || unnumbered(file).is_some_and(|file| unnumbered(name) == Some(file));
    name == file || texts.contains(&name) || is_part()
}

/// Tokenizer and whatever else belongs to a model, but not its weights.
fn copy_others(from: &Path, stage: &Stage) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let weights = [".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json"];
        // The configuration is another one; the weights are in files of other names.
        let skip = name == "config.json" || weights.iter().any(|end| name.ends_with(end));
        if skip || !fs::metadata(entry.path())?.is_file() || is_gguf(&entry.path()) {
            continue;
        }
        let bytes = model::read(&entry.path())?;
        stage.write(&name, |to| Ok(to.write_all(&bytes)?))?;
    }
    Ok(())
}

fn print(options: &Options, report: &Report, file: &str) -> Result<()> {
    let mut to = std::io::stdout();
    if options.json {
        writeln!(to, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    let Report { out, layers, bits_per_weight, weight_bytes, bytes_before, bytes_after, .. } =
        report;
    writeln!(
        to,
        "{out}: {} layers by {}, {bits_per_weight:.2} bits a weight, {:.1} MiB; with the rest {:.1} MiB, was {:.1} MiB",
        layers.len(),
        report.method,
        mebibytes(*weight_bytes),
        mebibytes(*bytes_after),
        mebibytes(*bytes_before),
    )?;
    let errors = |what: &str, of: &dyn Fn(&Layer) -> Option<f64>| {
        let all: Vec<_> = layers.iter().filter_map(|l| of(l).map(|e| (e, &l.name))).collect();
        let mean = all.iter().map(|(error, _)| error).sum::<f64>() / all.len() as f64;
        let worst = all.iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        let (error, name) = worst;
        let name = text::name(name);
        Some(format!("{what}: {mean:.2e} on average, at most {error:.2e} in {name}"))
    };
    for line in [
        errors("relative error of weights", &|layer| Some(layer.relative_error)),
        errors("relative squared error of outputs", &|layer| layer.output_error),
    ] {
        line.map_or(Ok(()), |line| writeln!(to, "{line}"))?;
    }
    if report.calibration_tokens > 0 {
        writeln!(to, "calibrated on {} tokens", report.calibration_tokens)?;
    }
    match &report.folded[..] {
        [] => {}
        folded => writeln!(to, "scales of channels are folded into {} norms", folded.len())?,
    }
    writeln!(to, "{} other tensors copied as they are; the report is {file}", report.copied.len())?;
    match &report.substitutions[..] {
        [] => writeln!(to, "no substitutions")?,
        all => {
            writeln!(to, "substitutions:")?;
            all.iter().try_for_each(|what| writeln!(to, "  {}", text::message(what)))?;
        }
    }
    Ok(())
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
