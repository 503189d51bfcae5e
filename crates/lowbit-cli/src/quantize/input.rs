//! What is quantized: a model that the decoder knows, or the matrices of any other.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use lowbit::{
    Mat,
    formats::{Dtype, TensorSource, TensorView},
};
use lowbit_lm::{Checkpoint, Error, LinearWeights, Tensors};
use serde_json::Value;

use crate::model;

pub(super) enum Input {
    Known(Box<Checkpoint>),
    /// Its linear layers, by block.
    Other(Tensors, Vec<Vec<String>>),
}

impl Input {
    /// Opens a folder or a GGUF file, whose weights are taken as they are in f32. `why` a model must be one
    /// that the decoder knows, if it must.
    pub(super) fn open(folder: &Path, why: Option<&str>) -> Result<Self> {
        let name = folder.display();
        let quantized = "is quantized already; give the checkpoint as it was before";
        match (Checkpoint::open(folder), why) {
            (Ok(checkpoint), _) => {
                // Blocks of ggml are how GGUF stores weights.
                let layers = if checkpoint.is_gguf() { vec![] } else { checkpoint.linear_names() };
                for layer in layers {
                    ensure!(checkpoint.quantized(&layer)?.is_none(), "{name} {quantized}");
                }
                Ok(Self::Known(Box::new(checkpoint)))
            }
            (Err(e), None) if !concerns_weights(&e) => {
                // The names of GGUF tensors say nothing to those who read what is written.
                let tensors = Tensors::open(folder)?;
                if !tensors.metadata().is_empty() {
                    return Err(e.into());
                }
                let config: Value =
                    serde_json::from_slice(&model::read(&folder.join("config.json"))?)?;
                ensure!(
                    config.get("quantization_config").is_none_or(Value::is_null),
                    "{name} {quantized}"
                );
                let blocks = matrices(&tensors)?;
                ensure!(!blocks.is_empty(), "{name}: there is no matrix X.N.Y.weight in it");
                Ok(Self::Other(tensors, blocks))
            }
            (Err(e @ Error::Config { .. }), Some(why)) => {
                Err(e).context(format!("{why}, and so an architecture that is known here"))
            }
            (Err(e), _) => Err(e.into()),
        }
    }

    pub(super) fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            Self::Known(checkpoint) => Some(checkpoint),
            Self::Other(..) => None,
        }
    }

    /// The config.json of `folder`, or what stands for it in a GGUF file.
    pub(super) fn config_json(&self, folder: &Path) -> Result<Value> {
        match self {
            Self::Known(checkpoint) => Ok(checkpoint.config_json()?),
            Self::Other(..) => {
                Ok(serde_json::from_slice(&model::read(&folder.join("config.json"))?)?)
            }
        }
    }

    pub(super) fn tensors(&self) -> &Tensors {
        match self {
            Self::Known(checkpoint) => checkpoint.tensors(),
            Self::Other(tensors, _) => tensors,
        }
    }

    /// The names of the linear layers of each block.
    pub(super) fn blocks(&self) -> Vec<Vec<String>> {
        match self {
            Self::Known(checkpoint) => {
                let names = checkpoint.linear_names();
                let blocks = checkpoint.config().num_hidden_layers.max(1);
                names.chunks((names.len() / blocks).max(1)).map(<[String]>::to_vec).collect()
            }
            Self::Other(_, blocks) => blocks.clone(),
        }
    }

    /// The tensors that belong to no linear layer.
    pub(super) fn others(&self) -> Vec<&str> {
        let blocks = self.blocks();
        let linears: BTreeSet<&str> = blocks.iter().flatten().map(String::as_str).collect();
        let is_other =
            |name: &&str| name.rsplit_once('.').is_none_or(|(layer, _)| !linears.contains(layer));
        self.tensors().names().into_iter().filter(is_other).collect()
    }

    /// The `(out_features, in_features)` of a linear layer.
    pub(super) fn shape(&self, layer: &str) -> Result<(usize, usize)> {
        let view = self.tensors().tensor(&format!("{layer}.weight"))?;
        match *view.shape {
            [rows, cols] => Ok((rows, cols)),
            _ => bail!("{layer}.weight is no matrix"),
        }
    }

    pub(super) fn linear(&self, layer: &str) -> Result<LinearWeights> {
        match self {
            Self::Known(checkpoint) => Ok(checkpoint.linear(layer)?),
            Self::Other(tensors, _) => {
                let (rows, cols) = self.shape(layer)?;
                let weight = tensors.tensor(&format!("{layer}.weight"))?.to_f32()?;
                let weight = Mat::new(weight, rows, cols)?;
                let bias = tensors.tensor(&format!("{layer}.bias")).ok();
                let bias = bias.map(|bias| bias.to_f32()).transpose()?;
                Ok(LinearWeights { name: layer.into(), weight, bias })
            }
        }
    }
}

/// Is it something else than what the model computes, or how it reads texts?
fn concerns_weights(error: &Error) -> bool {
    match error {
        Error::Config { .. } | Error::Tokenizer { .. } => false,
        Error::Io { path, .. } => !path.ends_with("tokenizer.json"),
        _ => true,
    }
}

/// The matrices `X.N.Y.weight` of floats, by the number N of their block; embedding, head and norms are
/// none.
fn matrices(tensors: &Tensors) -> Result<Vec<Vec<String>>> {
    let mut blocks: BTreeMap<(&str, u64), Vec<String>> = BTreeMap::new();
    for name in tensors.names() {
        let TensorView { dtype, shape, .. } = tensors.tensor(name)?;
        let float = matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
        let (Some(layer), Some(block)) = (name.strip_suffix(".weight"), block_of(name)) else {
            continue;
        };
        if float && shape.len() == 2 && !shape.contains(&0) {
            blocks.entry(block).or_default().push(layer.into());
        }
    }
    Ok(blocks.into_values().collect())
}

/// What stands in front of the first number of a name, and the number.
fn block_of(name: &str) -> Option<(&str, u64)> {
    let mut start = 0;
    for part in name.split('.') {
        if let Ok(number) = part.parse() {
            return Some((&name[..start], number));
        }
        start += part.len() + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_told_apart_by_the_first_number() {
        assert_eq!(block_of("model.layers.12.experts.3.up.weight"), Some(("model.layers.", 12)));
        assert_eq!(block_of("h.0.attn.weight"), Some(("h.", 0)));
        assert_eq!(block_of("lm_head.weight"), None);
    }
}
