//! Models small enough to be made in a test, written as a folder.

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Checkpoint;

pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub(crate) struct Tiny {
    pub(crate) config: Value,
    pub(crate) tensors: Tensors,
    pub(crate) dtype: &'static str,
    pub(crate) shards: usize,
}

/// Three special tokens, all bytes, some letters.
pub(crate) const VOCAB: usize = 3 + 256 + 5;

impl Tiny {
    /// A Llama with `changes` in its config.json. Weights are random multiples of 1/64 below 1/2,
    /// exact in every format.
    pub(crate) fn new(changes: Value) -> Self {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 48,
            "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": true,
            "bos_token_id": 1, "eos_token_id": 2
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        let c = crate::Config::parse("config.json", config.to_string().as_bytes()).unwrap();
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, c.hidden_size]),
            ("model.norm.weight".to_owned(), vec![c.hidden_size]),
        ];
        if !c.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![VOCAB, c.hidden_size]));
        }
        for layer in 0..c.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                shapes.push((name(&format!("{norm}.weight")), vec![c.hidden_size]));
            }
            let (q, kv, inner) = (c.q_size(), c.kv_size(), c.intermediate_size);
            for (part, rows, cols, bias) in [
                ("self_attn.q_proj", q, c.hidden_size, c.qkv_bias),
                ("self_attn.k_proj", kv, c.hidden_size, c.qkv_bias),
                ("self_attn.v_proj", kv, c.hidden_size, c.qkv_bias),
                ("self_attn.o_proj", c.hidden_size, q, c.o_bias),
                ("mlp.gate_proj", inner, c.hidden_size, c.mlp_bias),
                ("mlp.up_proj", inner, c.hidden_size, c.mlp_bias),
                ("mlp.down_proj", c.hidden_size, inner, c.mlp_bias),
            ] {
                shapes.push((name(&format!("{part}.weight")), vec![rows, cols]));
                if bias {
                    shapes.push((name(&format!("{part}.bias")), vec![rows]));
                }
            }
        }
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 58) as f32 - 32.0) / 64.0
        };
        let tensors = shapes
            .into_iter()
            .map(|(name, shape)| {
                let gain = if name.contains("norm") { 1.0 } else { 0.0 };
                let data = (0..shape.iter().product()).map(|_| random() + gain).collect();
                (name, (shape, data))
            })
            .collect();
        Self { config, tensors, dtype: "F32", shards: 1 }
    }

    /// The contents of model.safetensors.
    pub(crate) fn safetensors(&self) -> Vec<u8> {
        container(&self.tensors, self.dtype)
    }

    pub(crate) fn write(&self, folder: &Path) {
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
        if self.shards == 1 {
            fs::write(folder.join("model.safetensors"), self.safetensors()).unwrap();
            return;
        }
        let mut map = BTreeMap::new();
        for shard in 0..self.shards {
            let file = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.shards);
            let mine: Tensors = (self.tensors.iter().enumerate())
                .filter(|(i, _)| i % self.shards == shard)
                .map(|(_, (name, tensor))| (name.clone(), tensor.clone()))
                .collect();
            map.extend(mine.keys().map(|name| (name.clone(), file.clone())));
            fs::write(folder.join(file), container(&mine, self.dtype)).unwrap();
        }
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    }

    pub(crate) fn folder(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        folder
    }

    pub(crate) fn open(&self) -> crate::Result<Checkpoint> {
        Checkpoint::open(self.folder().path())
    }
}

fn container(tensors: &Tensors, dtype: &str) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        for &x in values {
            match dtype {
                "F16" => data.extend(f16::from_f32(x).to_le_bytes()),
                "BF16" => data.extend(bf16::from_f32(x).to_le_bytes()),
                _ => data.extend(x.to_le_bytes()),
            }
        }
        let offsets = [start, data.len()];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    // an odd length, so that no tensor is aligned
    let mut header = Value::Object(header).to_string();
    while header.len().is_multiple_of(2) {
        header.push(' ');
    }
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// Byte fallback and the letters a, b, c and space, in the form of Llama 2's tokenizer.
pub(crate) fn tokenizer() -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["\u{2581}", "a", "b", "c", "ab"].map(str::to_owned));
    let vocab: BTreeMap<_, _> = tokens.into_iter().zip(0..).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"]]}
    })
}
