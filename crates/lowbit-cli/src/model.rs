//! The model to work on: a folder of the user's, or the one that is part of the program.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Result, anyhow, bail};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use lowbit::{Context, Linear, METHODS, Method, PackedLinear, QLinear, kernels};
pub(crate) use lowbit_lm::read_file as read;
use lowbit_lm::{
    Checkpoint, Finished, Model, Protocol, Unpacked, Windows,
    quantize::{self, LayerReport},
};

use crate::{counted, note, progress};

const NAME: &str = "stories3m (embedded)";
const CONFIG: &[u8] = include_bytes!("../../../models/stories3m/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../../models/stories3m/model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("../../../models/stories3m/tokenizer.json");

/// Documents that the embedded model itself has written, so that it predicts them as well as they
/// can be predicted: whatever a quantized version predicts worse is its own loss.
const EVAL_TOKENS: &str = include_str!("../../../models/stories3m/eval.tokens");

/// Other documents of its own, for methods that look at a layer's inputs.
const CALIBRATION_TOKENS: &str = include_str!("../../../models/stories3m/calibration.tokens");

/// Opens a folder or file, or the embedded model.
pub(crate) fn open(folder: Option<&PathBuf>) -> Result<Checkpoint> {
    let checkpoint = match folder {
        Some(folder) => Checkpoint::open(folder)?,
        None => Checkpoint::from_bytes(NAME, CONFIG, WEIGHTS, TOKENIZER)?,
    };
    print_notes(checkpoint.notes());
    Ok(checkpoint)
}

/// Says what is done without, of all that a file asks for.
pub(crate) fn print_notes<'a>(notes: impl IntoIterator<Item = &'a String>) {
    for note in notes {
        eprintln!("note: {note}");
    }
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

/// The model in memory, with a word on layers that no kernel takes.
pub(crate) fn load(checkpoint: &Checkpoint) -> Result<Model> {
    let model = Model::load(checkpoint)?;
    say(&model.unpacked());
    Ok(model)
}

/// Says which layers no kernel takes.
pub(crate) fn say(unpacked: &[Unpacked]) {
    Unpacked::sentences(unpacked).iter().for_each(|sentence| note(sentence));
}

/// A file of a text or of tokens, read before the model is, which takes longer.
pub(crate) struct Text {
    file: String,
    bytes: Vec<u8>,
}

impl Text {
    pub(crate) fn read(file: &Path) -> Result<Self> {
        Ok(Self { file: file.display().to_string(), bytes: read(file)? })
    }

    /// Its windows; says so if they are tokens.
    pub(crate) fn windows(&self, checkpoint: &Checkpoint, protocol: &Protocol) -> Result<Windows> {
        let Self { file, bytes } = self;
        let windows = Windows::from_bytes(checkpoint, file, bytes, protocol)?;
        if Windows::is_token_file(file, bytes) {
            let tokens = counted(windows.predicted(), "token");
            let lines = counted(windows.len(), "line");
            note(&format!("{file} is a file of tokens, not a text: read as {tokens} on {lines}"));
        }
        Ok(windows)
    }
}

/// The windows to measure a loss on: those of `text`, or of eval.tokens of the model.
pub(crate) fn windows_to_predict(
    checkpoint: &Checkpoint,
    folder: Option<&Path>,
    text: Option<&Text>,
    protocol: &Protocol,
) -> Result<Windows> {
    match (text, folder) {
        (Some(text), _) => text.windows(checkpoint, protocol),
        (None, Some(folder)) => {
            own_windows(checkpoint, &beside(folder, "eval.tokens"), protocol, "--text")
        }
        (None, None) => {
            Ok(Windows::from_bytes(checkpoint, "eval.tokens", EVAL_TOKENS.as_bytes(), protocol)?)
        }
    }
}

/// A file in the folder of a model, or in that of a model's file.
fn beside(model: &Path, name: &str) -> PathBuf {
    match model.is_file() {
        true => model.with_file_name(name),
        false => model.join(name),
    }
}

/// The windows of a token file that a model may have; `option` names another one.
fn own_windows(
    checkpoint: &Checkpoint,
    file: &Path,
    protocol: &Protocol,
    option: &str,
) -> Result<Windows> {
    let bytes = read(file).map_err(|e| anyhow!("{e}; or give a text with {option} FILE"))?;
    Ok(Windows::from_bytes(checkpoint, &file.display().to_string(), &bytes, protocol)?)
}

/// The texts that methods look at for statistics of the layers' inputs.
#[derive(clap::Args)]
pub(crate) struct CalibrationOptions {
    /// Text to calibrate on [default: calibration.tokens of the model, where it has one]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// What stands between two documents of a text, each of which then stands on its own
    #[arg(long, value_name = "STRING")]
    pub(crate) document_mark: Option<String>,
    /// Tokens to calibrate on, at most
    #[arg(long, value_name = "N", default_value = "16000")]
    calibration_tokens: NonZeroUsize,
    /// Calibrate each set of layers on what the quantized sets before it in the same block give
    #[arg(long)]
    true_sequential: bool,
}

impl CalibrationOptions {
    /// The texts; none if there are none and none are `needed`.
    pub(crate) fn windows(
        &self,
        checkpoint: &Checkpoint,
        folder: Option<&Path>,
        needed: bool,
    ) -> Result<Option<Windows>> {
        let max_tokens = self.calibration_tokens.get();
        let mut protocol = Protocol { max_tokens, ..Protocol::default() };
        let windows = match (&self.calibration, folder) {
            (Some(file), _) => {
                protocol.document_mark = self.document_mark.clone();
                Text::read(file)?.windows(checkpoint, &protocol)?
            }
            (None, Some(_)) if !needed => return Ok(None),
            (None, Some(folder)) => {
                let file = beside(folder, "calibration.tokens");
                own_windows(checkpoint, &file, &protocol, "--calibration")?
            }
            (None, None) => {
                let (file, tokens) = ("calibration.tokens", CALIBRATION_TOKENS.as_bytes());
                Windows::from_bytes(checkpoint, file, tokens, &protocol)?
            }
        };
        if let Some(few) = windows.check_calibration(checkpoint.config())? {
            note(&few);
        }
        Ok(Some(windows))
    }

    /// How to quantize a whole model on them.
    pub(crate) fn how<'a>(
        &self,
        finished: Option<Finished<'a>>,
        folded_scales_only: bool,
    ) -> quantize::Options<'a> {
        let true_sequential = self.true_sequential;
        quantize::Options { true_sequential, folded_scales_only, finished, left_out: &[] }
    }

    /// Refuses options that `method` does not look at.
    pub(crate) fn check_used(&self, method: &str, used: bool) -> Result<()> {
        let given = [
            (self.calibration.is_some(), "--calibration"),
            (self.document_mark.is_some(), "--document-mark"),
            (self.true_sequential, "--true-sequential"),
        ];
        match given.into_iter().find(|(given, _)| *given && !used) {
            Some((_, option)) => bail!("{method} looks at no text: leave {option} out"),
            None => Ok(()),
        }
    }

    pub(crate) fn is_true_sequential(&self) -> bool {
        self.true_sequential
    }

    /// Whether a text to calibrate on was asked for.
    pub(crate) fn is_asked_for(&self) -> bool {
        self.calibration.is_some()
    }
}

/// The layer packed for a kernel; for the best of this CPU, or else the reference, if none was asked for.
pub(crate) fn pack(layer: &QLinear, kernel: Option<&str>) -> lowbit::Result<Arc<dyn Linear>> {
    match kernel {
        Some(kernel) => Ok(Arc::new(PackedLinear::with_kernel(layer, kernel)?)),
        None => lowbit_lm::pack(layer),
    }
}

/// The model with every linear layer quantized and packed, and what was done to each.
pub(crate) fn quantize(
    model: &Model,
    checkpoint: &Checkpoint,
    method: &Method,
    windows: Option<&Windows>,
    options: quantize::Options<'_>,
    kernel: Option<&str>,
    ctx: &mut Context,
) -> Result<(Model, Vec<LayerReport>)> {
    let bar = progress(checkpoint.linear_names().len(), &format!("{}: quantizing", method.name));
    let mut reports = Vec::new();
    let quantized = quantize::quantize(
        model,
        checkpoint,
        &method.quantizer,
        windows,
        options,
        ctx,
        |layer| pack(layer, kernel),
        |report| {
            reports.push(report.clone());
            bar.inc(1);
        },
    )?;
    bar.finish_and_clear();
    say(&quantized.unpacked());
    Ok((quantized, reports))
}
