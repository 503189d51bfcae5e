//! `lowbit quantize`: a checkpoint becomes another one, block by block.
//!
//! The work is done in a folder beside the one that is asked for, `OUT.part`, one file for each block
//! under its final name; a file that is there is done. The folder is renamed at the end.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use lowbit::{
    Calibration, Context, METHODS, Method, Needs, QLinear, QuantType, Quantizer, ScaleFormat,
    TwoLevel, ZeroFormat,
    dtypes::Format as Float,
    formats::{
        Tensor, TensorView,
        conventions::{
            self, Awq, Bnb4, BnbInt8, CompressedInt, CompressedPacked, Convention, Fp8, Ggml, Gptq,
            Lowbit, Mxfp4, Nvfp4,
        },
        gguf, write_safetensors,
    },
};
use lowbit_lm::{Checkpoint, LinearWeights, llama_gguf, open_tensors};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Threads, model, progress};

/// Options of `lowbit quantize`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the model: config.json, tokenizer.json, model.safetensors
    model: PathBuf,
    /// Method to quantize by
    #[arg(long, value_name = "NAME", value_parser = model::method())]
    method: &'static Method,
    /// Convention to store the layers in
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Format::Lowbit)]
    format: Format,
    /// Folder to make; an interrupted run continues in FOLDER.part
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    threads: Threads,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// A family of conventions; which of them a layer is stored in depends on its scheme.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Format {
    /// Our own, which holds every layer
    Lowbit,
    /// GPTQ: 2, 3, 4 or 8 bits
    Gptq,
    /// AWQ: 4 bits
    Awq,
    /// bitsandbytes: int8, NF4
    Bnb,
    /// compressed-tensors of vLLM: integers, FP8, FP4
    CompressedTensors,
    /// GGUF of llama.cpp: groups of 32
    Gguf,
}

impl Format {
    fn convention(self, layer: &QLinear) -> Box<dyn Convention> {
        let scheme = layer.weight().scheme();
        let affine = scheme.zero == ZeroFormat::Int;
        let plain = layer.activation().is_none() && layer.outliers().is_none();
        let two_level = ScaleFormat::TwoLevel(TwoLevel::NVFP4);
        match (self, scheme.dtype) {
            (Self::Lowbit, _) => Box::new(Lowbit),
            (Self::Gptq, _) => Box::new(Gptq { v2: affine, symmetric: !affine, ..Gptq::default() }),
            (Self::Awq, _) => Box::new(Awq::default()),
            (Self::Bnb, QuantType::Int { .. }) => {
                // A threshold of 0 quantizes all features.
                let threshold = match layer.outliers() {
                    Some(lowbit::Outliers::Threshold(threshold)) => *threshold,
                    _ => 0.0,
                };
                Box::new(BnbInt8 { threshold: (!plain).then_some(threshold) })
            }
            (Self::Bnb, _) => Box::new(Bnb4),
            (Self::Gguf, _) => Box::new(Ggml),
            (Self::CompressedTensors, QuantType::Int { bits: 8 }) => {
                Box::new(CompressedInt { dynamic: !plain })
            }
            (Self::CompressedTensors, QuantType::Float(Float::F4E2M1)) => {
                match scheme.scale_format == two_level {
                    true => Box::new(Nvfp4 { reciprocal: true }),
                    false => Box::new(Mxfp4),
                }
            }
            (Self::CompressedTensors, QuantType::Float(_)) => Box::new(Fp8::default()),
            (Self::CompressedTensors, _) => Box::new(CompressedPacked::default()),
        }
    }
}

/// What was done to a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    name: String,
    convention: String,
    weights: usize,
    /// Stored for them, the bias not included.
    bytes: usize,
    /// `‖W − Ŵ‖ / ‖W‖`, for the weights Ŵ that the file is read as.
    relative_error: f64,
    /// Where the file is not what was asked for.
    substitutions: Vec<String>,
}

/// A file of the checkpoint, and what stands in the report about it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Part {
    layers: Vec<Layer>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    out: String,
    method: &'static str,
    format: String,
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
    /// Where the result is not what was asked for.
    substitutions: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let method = options.method;
    if method.quantizer.needs() != Needs::Nothing {
        let free = METHODS.iter().filter(|method| method.quantizer.needs() == Needs::Nothing);
        let names: Vec<_> = free.map(|method| method.name).collect();
        let (name, names) = (method.name, names.join(", "));
        bail!("{name} needs calibration, which quantize does not do yet; choose one of {names}");
    }
    let out = options.out.display().to_string();
    if options.out.exists() {
        bail!("{out} exists already; remove it or name another folder");
    }
    let ctx = options.threads.context()?;
    let checkpoint = Checkpoint::open(&options.model)?;
    let linears = checkpoint.linear_names();
    for name in &linears {
        if checkpoint.quantized(name)?.is_some() {
            bail!("{name} is quantized already; give the checkpoint as it was before");
        }
    }
    let stage = Stage::open(options)?;
    let blocks = checkpoint.config().num_hidden_layers;
    let mut parts = Vec::new();
    let memory = peak_memory(&checkpoint, &linears)?;
    eprintln!(
        "{blocks} blocks, {} layers; memory for the largest block: {:.0} MiB beside the mapped files",
        linears.len(),
        mebibytes(memory)
    );
    let bar = progress(linears.len(), method.name);
    for index in 0..=blocks {
        let part = match index {
            0 => stage.part(index, blocks, || others(&checkpoint, options.format)),
            _ => {
                let each = linears.len() / blocks;
                let names = &linears[(index - 1) * each..index * each];
                stage.part(index, blocks, || block(&checkpoint, names, options, &ctx))
            }
        };
        let part = part.inspect_err(|_| stage.discard_if_empty())?;
        bar.inc(part.layers.len() as u64);
        parts.push(part);
    }
    bar.finish_and_clear();
    let report = finish(options, &checkpoint, &stage, parts)?;
    print(options, &report)
}

/// Everything but the linear layers, as it is.
fn others(checkpoint: &Checkpoint, format: Format) -> Result<(Part, Vec<Tensor>)> {
    let tensors = checkpoint.tensors();
    let owned = |view: TensorView<'_>| {
        Tensor::new(view.name, view.dtype, view.shape.to_vec(), view.bytes.to_vec())
    };
    let names = checkpoint.other_names();
    let copies = names.into_iter().map(|name| Ok(owned(tensors.tensor(name)?)));
    let copies = copies.collect::<Result<_>>()?;
    Ok((Part::default(), in_format(checkpoint, format, copies)?))
}

/// GGUF has another order of rows.
fn in_format(checkpoint: &Checkpoint, format: Format, tensors: Vec<Tensor>) -> Result<Vec<Tensor>> {
    if format != Format::Gguf {
        return Ok(tensors);
    }
    let config = checkpoint.config();
    tensors.into_iter().map(|tensor| Ok(llama_gguf::to_gguf(config, tensor)?)).collect()
}

/// The layers of a block, quantized side by side.
fn block(
    checkpoint: &Checkpoint,
    names: &[String],
    options: &Options,
    ctx: &Context,
) -> Result<(Part, Vec<Tensor>)> {
    let quantize = || -> Result<Vec<_>> {
        let layers = names.par_iter();
        layers.map(|name| layer(checkpoint, name, options).context(name.clone())).collect()
    };
    let done = match ctx.pool() {
        Some(pool) => pool.install(quantize),
        None => quantize(),
    }?;
    let mut part = Part::default();
    let mut tensors = Vec::new();
    for (layer, config, layer_tensors) in done {
        part.layers.push(layer);
        part.quantization_config = config;
        tensors.extend(layer_tensors);
    }
    Ok((part, in_format(checkpoint, options.format, tensors)?))
}

fn layer(
    checkpoint: &Checkpoint,
    name: &str,
    options: &Options,
) -> Result<(Layer, Option<Value>, Vec<Tensor>)> {
    let LinearWeights { weight, bias, .. } = checkpoint.linear(name)?;
    // Layers are quantized side by side, so each on one thread.
    let (calibration, mut ctx) = (Calibration::new(weight.cols()), Context::new());
    let quantized = options.method.quantizer.quantize(weight.as_ref(), &calibration, &mut ctx)?;
    let layer = quantized.layer.with_bias(bias)?;
    let convention = options.format.convention(&layer);
    let tensors = convention.write(&layer, name)?;

    // What the files say to whoever reads them, not what was meant to be written.
    let config = convention.config(&layer);
    let reader = config.as_ref().map(conventions::from_config).transpose()?;
    let back = reader.as_ref().unwrap_or(&convention).read(&tensors, name)?;
    let read = back.effective_weight()?;
    let mut substitutions = Vec::new();
    if quantized.report.fallback {
        substitutions.push("rounded to nearest, since nothing is known of its inputs".into());
    }
    let (a, b) = (back.weight(), layer.weight());
    if (a.codes(), a.scales(), a.zeros()) != (b.codes(), b.scales(), b.zeros()) {
        let meant = layer.effective_weight()?;
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
    let (mut error, mut norm) = (0.0, 0.0);
    for (w, read) in weight.data().iter().zip(read.data()) {
        let difference = f64::from(w - read);
        error += difference * difference;
        norm += f64::from(*w) * f64::from(*w);
    }
    let bias = format!("{name}.bias");
    let stored = tensors.iter().filter(|tensor| tensor.name != bias);
    let report = Layer {
        name: name.into(),
        convention: convention.name().into(),
        weights: weight.data().len(),
        bytes: stored.map(|tensor| tensor.bytes.len()).sum(),
        relative_error: if norm == 0.0 { 0.0 } else { (error / norm).sqrt() },
        substitutions,
    };
    Ok((report, config, tensors))
}

/// The largest block: weights in f32, as they are read back, and twice what is stored.
fn peak_memory(checkpoint: &Checkpoint, linears: &[String]) -> Result<usize> {
    let each = linears.len() / checkpoint.config().num_hidden_layers.max(1);
    let mut largest = 0;
    for block in linears.chunks(each.max(1)) {
        let mut weights = 0;
        for name in block {
            let tensor = checkpoint.tensors().tensor(&format!("{name}.weight"))?;
            weights += tensor.shape.iter().product::<usize>();
        }
        largest = largest.max(10 * weights);
    }
    Ok(largest)
}

/// The folder in which the work is done, and whether its parts are GGUF files.
struct Stage {
    folder: PathBuf,
    gguf: bool,
}

impl Stage {
    /// Makes the folder, or opens one in which the same work was begun.
    fn open(options: &Options) -> Result<Self> {
        let mut folder = options.out.as_os_str().to_os_string();
        folder.push(".part");
        let stage = Self { folder: folder.into(), gguf: options.format == Format::Gguf };
        let job = job(options)?;
        let name = stage.folder.display();
        if stage.folder.exists() {
            let begun = fs::read(stage.path("job.json")).ok();
            let begun: Option<Value> = begun.and_then(|text| serde_json::from_slice(&text).ok());
            if begun.as_ref() != Some(&job) {
                bail!("{name} belongs to another model, method or format; remove it first");
            }
        } else {
            fs::create_dir(&stage.folder).map_err(|e| anyhow!("cannot make {name}: {e}"))?;
            stage.write("job.json", |to| Ok(to.write_all(job.to_string().as_bytes())?))?;
        }
        Ok(stage)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Writes a file that appears whole or not at all.
    fn write(
        &self,
        file: &str,
        content: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
    ) -> Result<()> {
        let (path, beside) = (self.path(file), self.path(&format!("{file}.tmp")));
        let error = |e: std::io::Error| anyhow!("cannot write {}: {e}", path.display());
        let mut to = BufWriter::new(File::create(&beside).map_err(error)?);
        content(&mut to)?;
        let done = to.into_inner().map_err(|e| error(e.into_error()))?;
        // What is not on the disk before the file has its name may be missing after a power failure.
        done.sync_all().map_err(error)?;
        fs::rename(&beside, &path).map_err(error)
    }

    fn write_json(&self, file: &str, json: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(json)?;
        self.write(file, |to| Ok(to.write_all(text.as_bytes())?))
    }

    /// Part `index`: what `make` gives, unless it is there already.
    fn part(
        &self,
        index: usize,
        blocks: usize,
        make: impl FnOnce() -> Result<(Part, Vec<Tensor>)>,
    ) -> Result<Part> {
        let (file, report) = (self.part_name(index, blocks), report_name(index));
        if self.path(&file).exists()
            && let Ok(text) = fs::read(self.path(&report))
            && let Ok(part) = serde_json::from_slice(&text)
        {
            return Ok(part);
        }
        let (part, tensors) = make()?;
        self.write_json(&report, &part)?;
        let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
        self.write(&file, |to| match self.gguf {
            true => Ok(gguf::write(to, &[], &views)?),
            false => Ok(write_safetensors(to, &[("format", "pt")], &views)?),
        })?;
        Ok(part)
    }

    fn part_name(&self, index: usize, blocks: usize) -> String {
        let extension = if self.gguf { "gguf" } else { "safetensors" };
        format!("model-{:05}-of-{:05}.{extension}", index + 1, blocks + 1)
    }

    /// Leaves nothing behind where nothing was done.
    fn discard_if_empty(&self) {
        let parts = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let has_block = |name: &str| name.starts_with("model-") && !name.contains("-00001-of-");
        if !parts.into_iter().any(|entry| has_block(&entry.file_name().to_string_lossy())) {
            // It is of no use to anyone; the error says what went wrong first.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn report_name(index: usize) -> String {
    format!("report-{index:05}.json")
}

/// What a run is about: another one may continue it only if it is the same.
fn job(options: &Options) -> Result<Value> {
    let model = fs::canonicalize(&options.model)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(&model)? {
        let entry = entry?;
        let data = entry.metadata()?;
        let modified = data.modified()?.duration_since(std::time::UNIX_EPOCH);
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push((name, data.len(), modified.map_or(0, |time| time.as_secs())));
    }
    files.sort();
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": model.display().to_string(),
        "files": files,
        "method": options.method.name,
        "format": format_name(options.format),
    }))
}

fn format_name(format: Format) -> String {
    let value = clap::ValueEnum::to_possible_value(&format);
    value.map_or_else(String::new, |value| value.get_name().into())
}

/// Index, configuration, the model's other files and the report; then the folder gets its name.
fn finish(
    options: &Options,
    checkpoint: &Checkpoint,
    stage: &Stage,
    parts: Vec<Part>,
) -> Result<Report> {
    let blocks = parts.len() - 1;
    let files: Vec<_> = (0..=blocks).map(|index| stage.part_name(index, blocks)).collect();
    let opened = files.iter().map(|file| Ok(open_tensors(&stage.path(file))?));
    let opened: Vec<_> = opened.collect::<Result<_>>()?;
    let mut map = serde_json::Map::new();
    let mut views = Vec::new();
    for (file, tensors) in files.iter().zip(&opened) {
        for name in tensors.names() {
            views.push(tensors.tensor(name)?);
            map.insert(name.into(), file.clone().into());
        }
    }
    let after: usize = views.iter().map(|view| view.bytes.len()).sum();
    let mut config: Value =
        serde_json::from_slice(&model::read(&options.model.join("config.json"))?)?;
    if stage.gguf {
        assemble(options, checkpoint, stage, views)?;
        drop(opened);
        files.iter().try_for_each(|file| fs::remove_file(stage.path(file)))?;
    } else {
        let index = json!({"metadata": {"total_size": after}, "weight_map": map});
        stage.write_json("model.safetensors.index.json", &index)?;
        let quantization = parts.iter().find_map(|part| part.quantization_config.clone());
        config["quantization_config"] = quantization.unwrap_or(Value::Null);
    }
    stage.write_json("config.json", &config)?;
    copy_others(&options.model, &stage.folder)?;

    let layers: Vec<Layer> = parts.into_iter().flat_map(|part| part.layers).collect();
    let tensors = checkpoint.tensors();
    let mut before = 0;
    for name in tensors.names() {
        before += tensors.tensor(name)?.bytes.len();
    }
    let weights: usize = layers.iter().map(|layer| layer.weights).sum();
    let bytes: usize = layers.iter().map(|layer| layer.bytes).sum();
    let errors: f64 = layers.iter().map(|layer| layer.relative_error).sum();
    let substitutions = layers
        .iter()
        .flat_map(|layer| layer.substitutions.iter().map(|what| format!("{}: {what}", layer.name)));
    let report = Report {
        model: checkpoint.name().into(),
        out: options.out.display().to_string(),
        method: options.method.name,
        format: format_name(options.format),
        bits_per_weight: bytes as f64 * 8.0 / weights.max(1) as f64,
        weight_bytes: bytes,
        bytes_before: before,
        bytes_after: after,
        mean_relative_error: errors / layers.len().max(1) as f64,
        substitutions: substitutions.collect(),
        copied: checkpoint.other_names().into_iter().map(String::from).collect(),
        layers,
    };
    stage.write_json("quantization.json", &report)?;
    for index in 0..=blocks {
        fs::remove_file(stage.path(&report_name(index)))?;
    }
    fs::remove_file(stage.path("job.json"))?;
    fs::rename(&stage.folder, &options.out).map_err(|e| {
        let (from, to) = (stage.folder.display(), options.out.display());
        anyhow!("cannot rename {from} to {to}: {e}")
    })?;
    Ok(report)
}

/// One GGUF file of all parts, with the metadata of llama.cpp.
fn assemble(
    options: &Options,
    checkpoint: &Checkpoint,
    stage: &Stage,
    views: Vec<TensorView<'_>>,
) -> Result<()> {
    let named = |view: &TensorView<'_>| {
        llama_gguf::gguf_name(view.name)
            .ok_or_else(|| anyhow!("{} has no place in a GGUF file", view.name))
    };
    let names: Vec<_> = views.iter().map(named).collect::<Result<_>>()?;
    let tensors: Vec<_> =
        views.iter().zip(&names).map(|(view, name)| TensorView { name, ..*view }).collect();
    let name = options.model.file_name().unwrap_or_default().to_string_lossy();
    let tokenizer = model::read(&options.model.join("tokenizer.json"))?;
    let metadata = llama_gguf::metadata(&name, checkpoint.config(), &tokenizer)?;
    let metadata: Vec<_> = metadata.iter().map(|(key, v)| (key.as_str(), v.clone())).collect();
    stage.write("model.gguf", |to| Ok(gguf::write(to, &metadata, &tensors)?))
}

/// Tokenizer and whatever else belongs to a model, but not its weights.
fn copy_others(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let weights = [".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json"];
        let skip = name == "config.json" || weights.iter().any(|end| name.ends_with(end));
        if skip || !entry.file_type()?.is_file() {
            continue;
        }
        fs::copy(entry.path(), to.join(&name))
            .map_err(|e| anyhow!("cannot copy {}: {e}", entry.path().display()))?;
    }
    Ok(())
}

fn print(options: &Options, report: &Report) -> Result<()> {
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
    let worst = layers.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
    if let Some(worst) = worst {
        writeln!(
            to,
            "relative error of weights: {:.4} on average, at most {:.4} in {}",
            report.mean_relative_error, worst.relative_error, worst.name
        )?;
    }
    writeln!(
        to,
        "{} other tensors copied as they are; the report is quantization.json",
        report.copied.len()
    )?;
    match &report.substitutions[..] {
        [] => writeln!(to, "no substitutions")?,
        all => {
            writeln!(to, "substitutions:")?;
            all.iter().try_for_each(|what| writeln!(to, "  {what}"))?;
        }
    }
    Ok(())
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_there_is_not_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let stage = Stage { folder: folder.path().to_path_buf(), gguf: false };
        let make = || Ok((Part::default(), vec![Tensor::f32("a", vec![1], &[1.0])]));
        stage.part(1, 2, make).unwrap();
        stage.part(1, 2, || panic!("made again")).unwrap();
        // One whose file was not finished is.
        fs::remove_file(stage.path(&stage.part_name(1, 2))).unwrap();
        stage.part(1, 2, make).unwrap();
        assert!(stage.path("model-00002-of-00003.safetensors").exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
