//! One GGUF file of all parts, with the metadata of llama.cpp.

use std::path::Path;

use anyhow::{Result, anyhow};
use lowbit::{
    ScaleFormat, ZeroFormat,
    formats::{Tensor, TensorSource as _, TensorView, gguf},
};
use lowbit_lm::{
    Checkpoint,
    llama_gguf::{self, Metadata, Texts},
};

use super::stage::Stage;
use crate::{model, scheme::Defaults};

/// Groups of the blocks of ggml, whose zero-points are offsets.
pub(super) const DEFAULTS: Defaults =
    Defaults { group_size: 32, zero_points: ZeroFormat::Offset(ScaleFormat::F16) };

/// What stands in the file beside the tensors of the model in `folder`; an error if there is anything that the
/// file cannot hold.
pub(super) fn metadata(folder: &Path, checkpoint: &Checkpoint) -> Result<Metadata> {
    for name in checkpoint.tensors().names() {
        place(name)?;
    }
    let beside = |name: &str| -> Result<Option<Vec<u8>>> {
        let path = folder.join(name);
        Ok(path.is_file().then(|| model::read(&path)).transpose()?)
    };
    let (settings, template) = (beside("tokenizer_config.json")?, beside("chat_template.jinja")?);
    let texts = Texts {
        tokenizer: checkpoint.tokenizer_json(),
        tokenizer_config: settings.as_deref(),
        chat_template: template.as_deref(),
    };
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let mut metadata = llama_gguf::metadata(&name, checkpoint.config(), &texts)?;
    let template = |(key, _): &(String, String)| key.starts_with("tokenizer.chat_template");
    if checkpoint.tensors().metadata().iter().any(template) {
        metadata.substitutions.push("the chat template of the GGUF file is left out".into());
    }
    Ok(metadata)
}

/// Writes the file.
pub(super) fn write(stage: &Stage, metadata: &Metadata, views: Vec<TensorView<'_>>) -> Result<()> {
    let names: Vec<_> = views.iter().map(|view| place(view.name)).collect::<Result<_>>()?;
    let named = views.iter().zip(&names).map(|(view, name)| TensorView { name, ..*view });
    let tensors: Vec<_> = metadata.tensors.iter().map(Tensor::view).chain(named).collect();
    let keys: Vec<_> = metadata.keys.iter().map(|(key, v)| (key.as_str(), v.clone())).collect();
    stage.write("model.gguf", |to| Ok(gguf::write(to, &keys, &tensors)?))
}

/// The name of a checkpoint's tensor in the file.
fn place(name: &str) -> Result<String> {
    llama_gguf::gguf_name(name)
        .ok_or_else(|| anyhow!("{name} has no place in a GGUF file: choose another --format"))
}
