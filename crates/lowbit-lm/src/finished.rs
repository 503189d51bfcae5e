//! Blocks that are finished, in a folder: an interrupted run continues behind them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lowbit::{
    QLinear, Report,
    formats::{
        Dtype, Safetensors, Tensor, TensorSource,
        conventions::{Convention, Lowbit},
        write_safetensors,
    },
};
use serde_json::{Value, json};

use crate::{Error, Result, quantize::LayerReport};

/// A folder for finished blocks, `block-0000.safetensors` and so on, each with its quantized layers, its
/// norms and the reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished<'a> {
    /// The folder, which is made if there is none.
    pub folder: &'a Path,
    /// Names the recipe: a folder of another one, of other texts or other weights is refused.
    pub label: &'a str,
}

/// A block as it is kept.
pub(crate) struct Kept {
    pub(crate) norms: [Vec<f32>; 2],
    pub(crate) layers: Vec<(QLinear, LayerReport)>,
}

impl Finished<'_> {
    fn path(&self, block: usize) -> PathBuf {
        self.folder.join(format!("block-{block:04}.safetensors"))
    }

    /// What [`write`](Self::write) has kept of a block of layers with these names; `None` if nothing, or not all of it.
    pub(crate) fn read(&self, block: usize, names: &[&str], key: u64) -> Result<Option<Kept>> {
        let path = self.path(block);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(Error::Io { path, cause }),
        };
        let file = path.display().to_string();
        // One that is cut is no block.
        let Ok(source) = Safetensors::new(file.clone(), bytes) else { return Ok(None) };
        let wrong = |reason: &str| Error::File { file: file.clone(), reason: reason.into() };
        let about = source.tensor("about")?;
        let about: Value =
            serde_json::from_slice(about.bytes).map_err(|e| wrong(&e.to_string()))?;
        if about["key"] != json!(format!("{key:016x}")) {
            return Err(wrong(
                "it is of another recipe, text or model: choose another folder, or empty this one",
            ));
        }
        let layers = names.iter().map(|&name| {
            let layer = Lowbit.read(&source, name)?;
            let report = report(name, &layer, &about["reports"][name]);
            Ok((layer, report))
        });
        let norm = |name: &str| Ok::<_, Error>(source.tensor(name)?.to_f32()?);
        let (norms, layers) = ([norm("norm.0")?, norm("norm.1")?], layers.collect::<Result<_>>()?);
        Ok(Some(Kept { norms, layers }))
    }

    /// Keeps a block: first beside its place, then moved there.
    pub(crate) fn write(&self, block: usize, kept: &Kept, key: u64) -> Result<()> {
        let path = self.path(block);
        let mut tensors = Vec::new();
        let mut reports = serde_json::Map::new();
        for (layer, report) in &kept.layers {
            tensors.extend(Lowbit.write(layer, &report.name)?);
            let LayerReport { error, weight_error, scaled_at_run_time, report: r, .. } = report;
            let value = json!({
                "error": error, "weight_error": weight_error, "scaled_at_run_time": scaled_at_run_time, "alpha": r.alpha,
                "damping": r.damping, "dead_columns": r.dead_columns, "outliers": r.outliers,
                "fallback": r.fallback,
            });
            reports.insert(report.name.clone(), value);
        }
        for (i, norm) in kept.norms.iter().enumerate() {
            tensors.push(Tensor::f32(format!("norm.{i}"), vec![norm.len()], norm));
        }
        let about = json!({ "key": format!("{key:016x}"), "reports": reports }).to_string();
        let len = about.len();
        tensors.push(Tensor::new("about", Dtype::U8, vec![len], about.into_bytes()));

        let beside = path.with_extension(format!("{}.part", std::process::id()));
        let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
        let written = fs::create_dir_all(self.folder)
            .and_then(|()| fs::File::create(&beside))
            .and_then(|file| {
                let mut file = std::io::BufWriter::new(file);
                write_safetensors(&mut file, &[("label", self.label)], &views)?;
                file.into_inner()?.sync_all()
            })
            .and_then(|()| fs::rename(&beside, &path));
        written.map_err(|cause| {
            // What is beside is of no use to anyone; the error says what went wrong first.
            let _ = fs::remove_file(&beside);
            Error::Io { path, cause }
        })
    }
}

fn report(name: &str, layer: &QLinear, kept: &Value) -> LayerReport {
    let count = |key: &str| kept[key].as_u64().unwrap_or(0) as usize;
    let mut report = Report::default();
    report.alpha = kept["alpha"].as_f64().map(|alpha| alpha as f32);
    report.damping = kept["damping"].as_f64();
    report.dead_columns = count("dead_columns");
    report.outliers = count("outliers");
    report.fallback = kept["fallback"].as_bool().unwrap_or(false);
    LayerReport {
        name: name.into(),
        weights: layer.weight().rows() * layer.weight().cols(),
        bytes: layer.bytes(),
        error: kept["error"].as_f64(),
        weight_error: kept["weight_error"].as_f64().unwrap_or(0.0),
        scaled_at_run_time: kept["scaled_at_run_time"].as_bool().unwrap_or(false),
        report,
    }
}

/// FNV-1a of 32-bit words, to tell runs apart.
#[derive(Clone, Copy)]
pub(crate) struct Key(pub(crate) u64);

impl Key {
    pub(crate) const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    pub(crate) fn add(&mut self, words: impl IntoIterator<Item = u32>) {
        for word in words {
            self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
