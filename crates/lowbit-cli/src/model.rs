//! The model to work on: a folder of the user's, or the one that is part of the program.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Result, anyhow};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use lowbit::{
    Calibration, Calibrations, Context, METHODS, Method, Needs, PackedLinear, Quantizer, kernels,
};
use lowbit_lm::{Checkpoint, Model, Windows, eval};

use crate::progress;

const NAME: &str = "stories3m (embedded)";
const CONFIG: &[u8] = include_bytes!("../../../models/stories3m/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../../models/stories3m/model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("../../../models/stories3m/tokenizer.json");

/// Documents that the embedded model itself has written, so that it predicts them as well as they
/// can be predicted: whatever a quantized version predicts worse is its own loss.
pub(crate) const EVAL_TOKENS: &str = include_str!("../../../models/stories3m/eval.tokens");

/// Other documents of its own, for methods that look at a layer's inputs.
const CALIBRATION_TOKENS: &str = include_str!("../../../models/stories3m/calibration.tokens");

/// Opens `folder`, or the embedded model.
pub(crate) fn open(folder: Option<&PathBuf>) -> Result<Checkpoint> {
    Ok(match folder {
        Some(folder) => Checkpoint::open(folder)?,
        None => Checkpoint::from_bytes(NAME, CONFIG, WEIGHTS, TOKENIZER)?,
    })
}

/// Knows the methods by name, and lists them with what they are.
pub(crate) fn method() -> impl TypedValueParser<Value = &'static Method> {
    let names = METHODS.iter().map(|method| PossibleValue::new(method.name).help(method.about));
    PossibleValuesParser::new(names)
        .try_map(|name| Method::named(&name).ok_or("a method without a name"))
}

/// Knows the kernels of this CPU.
pub(crate) fn kernel() -> impl TypedValueParser<Value = &'static str> {
    PossibleValuesParser::new(kernels())
        .try_map(|name| kernels().find(|&kernel| kernel == name).ok_or("no kernel of this CPU"))
}

/// Reads a file that the user named.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).map_err(|e| anyhow!("cannot read {}: {e}", file.display()))
}

/// What `methods` need to know of the layers' inputs: nothing, or statistics over the documents in
/// calibration.tokens of the model.
pub(crate) fn calibrate(
    model: &Model,
    folder: Option<&PathBuf>,
    methods: &[&Method],
    ctx: &mut Context,
) -> Result<Calibrations> {
    let needs = methods.iter().map(|method| method.quantizer.needs()).max();
    if needs.is_none_or(|needs| needs == Needs::Nothing) {
        return Ok(Calibrations::new());
    }
    let second_moment = needs == Some(Needs::SecondMoment);
    let file = folder.map(|folder| folder.join("calibration.tokens"));
    let (file, tokens) = match &file {
        None => ("calibration.tokens".to_string(), CALIBRATION_TOKENS.into()),
        Some(file) => (file.display().to_string(), String::from_utf8(read(file)?)?),
    };
    let windows = Windows::from_tokens(model.config(), &file, &tokens)?;
    let bar = progress(windows.predicted(), "calibrating");
    let calibrations =
        eval::calibrate(model, &windows, second_moment, ctx, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(calibrations)
}

/// The model with every linear layer quantized and packed, and the bytes that those layers store.
pub(crate) fn quantize(
    model: &Model,
    checkpoint: &Checkpoint,
    method: &Method,
    calibrations: &Calibrations,
    kernel: Option<&str>,
    ctx: &mut Context,
) -> Result<(Model, usize)> {
    let bar = progress(checkpoint.linear_names().len(), &format!("{}: quantizing", method.name));
    let mut bytes = 0;
    let quantized = model.with_linears(checkpoint, |layer| {
        let weight = layer.weight.as_ref();
        let none = || Arc::new(Calibration::new(weight.cols()));
        let calibration = calibrations.get(&layer.name).cloned().unwrap_or_else(none);
        let q = method.quantizer.quantize(weight, &calibration, ctx)?.layer;
        let q = q.with_bias(layer.bias)?;
        bytes += q.bytes();
        bar.inc(1);
        Ok(Arc::new(match kernel {
            Some(kernel) => PackedLinear::with_kernel(&q, kernel)?,
            None => PackedLinear::new(&q)?,
        }))
    })?;
    bar.finish_and_clear();
    Ok((quantized, bytes))
}
