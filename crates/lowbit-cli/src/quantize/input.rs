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

pub(super) struct Input {
    source: Source,
    /// The names of the linear layers to quantize, by block.
    blocks: Vec<Vec<String>>,
    /// Those that `--skip` has taken out.
    left_out: Vec<String>,
}

enum Source {
    Known(Box<Checkpoint>),
    Other(Tensors),
}

impl Input {
    /// Opens a folder or a GGUF file, whose weights are taken as they are in f32. `why` a model must be one
    /// that the decoder knows, if it must.
    pub(super) fn open(folder: &Path, why: Option<&str>) -> Result<Self> {
        let name = folder.display();
        let quantized = "is quantized already; give the checkpoint as it was before";
        let (source, blocks) = match (Checkpoint::open(folder), why) {
            (Ok(checkpoint), _) => {
                let names = checkpoint.linear_names();
                // Blocks of ggml are how GGUF stores weights.
                let layers = if checkpoint.is_gguf() { &[] } else { &names[..] };
                for layer in layers {
                    ensure!(checkpoint.quantized(layer)?.is_none(), "{name} {quantized}");
                }
                let blocks = checkpoint.config().num_hidden_layers.max(1);
                let blocks = names.chunks((names.len() / blocks).max(1)).map(<[String]>::to_vec);
                let blocks = blocks.collect();
                (Source::Known(Box::new(checkpoint)), blocks)
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
                (Source::Other(tensors), blocks)
            }
            (Err(e @ Error::Config { .. }), Some(why)) => {
                return Err(e).context(format!("{why}, and so an architecture that is known here"));
            }
            (Err(e), _) => return Err(e.into()),
        };
        Ok(Self { source, blocks, left_out: Vec::new() })
    }

    /// Leaves out the layers that a pattern matches, in which `*` stands for any characters.
    pub(super) fn leave_out(&mut self, patterns: &[String]) -> Result<()> {
        if patterns.is_empty() {
            return Ok(());
        }
        let floats = self.linear_floats()?;
        for pattern in patterns {
            let before = self.left_out.len();
            for block in &mut self.blocks {
                let left_out = block.extract_if(.., |name| matches(pattern, name));
                self.left_out.extend(left_out);
            }
            // Some layers stay floats anyway.
            let of_others = floats.iter().any(|name| matches(pattern, name));
            let twice = self.left_out.iter().any(|name| matches(pattern, name));
            if self.left_out.len() == before && !of_others && !twice {
                let example = self.blocks.iter().flatten().next().map_or("layer", String::as_str);
                bail!(
                    "--skip {pattern} matches no layer: name a whole layer, such as {example}, or write * for any characters, as in '*.down_proj'"
                );
            }
        }
        ensure!(
            self.blocks.iter().any(|block| !block.is_empty()),
            "--skip leaves no layer to quantize"
        );
        Ok(())
    }

    /// The layers that [`leave_out`](Self::leave_out) has taken out.
    pub(super) fn left_out(&self) -> &[String] {
        &self.left_out
    }

    pub(super) fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.source {
            Source::Known(checkpoint) => Some(checkpoint),
            Source::Other(_) => None,
        }
    }

    /// The config.json of `folder`, or what stands for it in a GGUF file.
    pub(super) fn config_json(&self, folder: &Path) -> Result<Value> {
        match &self.source {
            Source::Known(checkpoint) => Ok(checkpoint.config_json()?),
            Source::Other(_) => {
                Ok(serde_json::from_slice(&model::read(&folder.join("config.json"))?)?)
            }
        }
    }

    pub(super) fn tensors(&self) -> &Tensors {
        match &self.source {
            Source::Known(checkpoint) => checkpoint.tensors(),
            Source::Other(tensors) => tensors,
        }
    }

    /// The names of the linear layers of each block.
    pub(super) fn blocks(&self) -> &[Vec<String>] {
        &self.blocks
    }

    /// The tensors that belong to no linear layer that is quantized.
    pub(super) fn others(&self) -> Vec<&str> {
        let linears: BTreeSet<&str> = self.blocks.iter().flatten().map(String::as_str).collect();
        let is_other =
            |name: &&str| name.rsplit_once('.').is_none_or(|(layer, _)| !linears.contains(layer));
        self.tensors().names().into_iter().filter(is_other).collect()
    }

    /// The linear layers that stay floats.
    pub(super) fn linear_floats(&self) -> Result<Vec<String>> {
        let mut floats = Vec::new();
        for name in self.others() {
            let view = self.tensors().tensor(name)?;
            let Some(layer) = name.strip_suffix(".weight") else { continue };
            if is_float(view.dtype) && view.shape.len() == 2 && !is_embedding(layer) {
                floats.push(layer.to_string());
            }
        }
        Ok(floats)
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
        match &self.source {
            Source::Known(checkpoint) => Ok(checkpoint.linear(layer)?),
            Source::Other(tensors) => {
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
/// none, and routers of experts stay as they are: every other tool leaves them, and so do loaders.
fn matrices(tensors: &Tensors) -> Result<Vec<Vec<String>>> {
    let names = tensors.names();
    let mut blocks: BTreeMap<(&str, u64), Vec<String>> = BTreeMap::new();
    for name in &names {
        let TensorView { dtype, shape, .. } = tensors.tensor(name)?;
        let (Some(layer), Some(block)) = (name.strip_suffix(".weight"), block_of(name)) else {
            continue;
        };
        let matrix = is_float(dtype) && shape.len() == 2 && !shape.contains(&0);
        if matrix && !is_embedding(layer) && !is_router(layer, &names) {
            blocks.entry(block).or_default().push(layer.into());
        }
    }
    Ok(blocks.into_values().collect())
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16)
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

/// Does a layer look numbers up instead of multiplying?
fn is_embedding(layer: &str) -> bool {
    let last = layer.rsplit('.').next().unwrap_or(layer);
    matches!(last, "wte" | "wpe" | "shared" | "embed" | "relative_attention_bias")
        || ["embedding", "embeddings", "embed_tokens", "embed_positions", "embed_in"]
            .iter()
            .any(|end| last.ends_with(end))
}

/// Does a layer choose among experts? `router` says so (gpt-oss, DBRX, Switch), and `gate` where experts are
/// beside it (Mixtral, Qwen, DeepSeek; `gate.wg` of Hunyuan): elsewhere that is a part of the MLP.
fn is_router(layer: &str, names: &[&str]) -> bool {
    let mut start = 0;
    for part in layer.split('.') {
        let before = &layer[..start];
        let has_experts = || {
            let experts = format!("{before}experts");
            let at = names.partition_point(|name| *name < experts.as_str());
            names.get(at).is_some_and(|name| name.starts_with(&experts))
        };
        match part {
            "router" | "shared_expert_gate" | "shared_experts_gate" => return true,
            "gate" if has_experts() => return true,
            _ => start += part.len() + 1,
        }
    }
    false
}

/// Is `name` what `pattern` says, in which `*` stands for any characters?
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(end)
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

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*.down_proj", "model.layers.0.mlp.down_proj", true),
            ("*.down_proj", "model.layers.0.mlp.down_proj.x", false),
            ("model.layers.1.*", "model.layers.1.mlp.up_proj", true),
            ("model.layers.1.*", "model.layers.11.mlp.up_proj", false),
            ("*vision*", "vision_tower.0.q", true),
            ("a*b*c", "abc", true),
            ("a*bb*b", "abb", false),
            ("a*a", "a", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn routers_choose_experts_and_gates_of_an_mlp_do_not() {
        let names = [
            "h.0.ffn.router.layer.weight",
            "h.0.mlp.experts.0.gate_proj.weight",
            "h.0.mlp.gate.weight",
            "h.0.mlp.gate.wg.weight",
            "h.1.mlp.gate.weight",
            "h.1.mlp.up.weight",
        ];
        for (layer, expected) in [
            ("h.0.mlp.gate", true),
            ("h.0.mlp.gate.wg", true),
            ("h.0.ffn.router.layer", true),
            ("h.0.mlp.shared_expert_gate", true),
            ("h.0.mlp.experts.0.gate_proj", false),
            ("h.1.mlp.gate", false),
            ("h.1.mlp.up", false),
        ] {
            assert_eq!(is_router(layer, &names), expected, "{layer}");
        }
    }
}
