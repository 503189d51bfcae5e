//! Models and tokenizers of GGUF files made on the spot: the same model as safetensors has the right values.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lowbit::{
    Context,
    formats::{
        Tensor,
        gguf::{self, Array, GgmlType, Value},
    },
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::tiny::{self, Tiny, VOCAB};
use crate::{Checkpoint, KvCache, Model};

type Metadata = Vec<(String, Value<'static>)>;

fn strings<'a>(items: impl IntoIterator<Item = &'a str>) -> Value<'static> {
    let items: Vec<_> = items.into_iter().map(text).collect();
    Value::Array(Array::new(&items).unwrap())
}

fn text(text: &str) -> Value<'static> {
    Value::String(text.as_bytes().to_vec().into())
}

fn list(items: &[Value<'static>]) -> Value<'static> {
    Value::Array(Array::new(items).unwrap())
}

/// What llama.cpp's converter says of a model of config.json `c`.
fn metadata(c: &Json, architecture: &str) -> Metadata {
    let number = |field: &str| Value::U32(c[field].as_u64().unwrap() as u32);
    let float = |field: &str| Value::F32(c[field].as_f64().unwrap() as f32);
    let mut all = vec![
        ("general.architecture".to_string(), text(architecture)),
        ("general.quantization_version".to_string(), Value::U32(2)),
    ];
    for (key, value) in [
        ("block_count", number("num_hidden_layers")),
        ("context_length", number("max_position_embeddings")),
        ("embedding_length", number("hidden_size")),
        ("feed_forward_length", number("intermediate_size")),
        ("attention.head_count", number("num_attention_heads")),
        ("attention.head_count_kv", number("num_key_value_heads")),
        ("attention.layer_norm_rms_epsilon", float("rms_norm_eps")),
        ("rope.freq_base", float("rope_theta")),
    ] {
        all.push((format!("{architecture}.{key}"), value));
    }
    if let Some(dim) = c["head_dim"].as_u64() {
        all.push((format!("{architecture}.attention.key_length"), Value::U32(dim as u32)));
    }
    all.extend(sentencepiece());
    all
}

/// The tokenizer of [`tiny::tokenizer`].
fn sentencepiece() -> Metadata {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["\u{2581}", "a", "b", "c", "ab"].map(str::to_owned));
    let kind = |id| match id {
        0 => 2,
        1 | 2 => 3,
        3..=258 => 6,
        _ => 1,
    };
    let kinds: Vec<_> = (0..tokens.len()).map(|id| Value::I32(kind(id))).collect();
    let scores: Vec<_> = (0..tokens.len()).map(|id| Value::F32(-(id as f32))).collect();
    [
        ("model", text("llama")),
        ("tokens", strings(tokens.iter().map(String::as_str))),
        ("token_type", list(&kinds)),
        ("scores", list(&scores)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
    ]
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .into()
}

const NAMES: [(&str, &str); 11] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The tensors as llama.cpp's converter writes them. In `llama`, row 2i + s of a head of q or k is row
/// i + s·dim/2 of the checkpoint.
fn tensors(tiny: &Tiny, architecture: &str) -> Vec<Tensor> {
    let c = &tiny.config;
    let mut all = Vec::new();
    for (name, (shape, values)) in &tiny.tensors {
        let mut new = name.replace("model.layers.", "blk.").replace("lm_head", "output");
        for (checkpoint, gguf) in NAMES {
            new = new.replace(checkpoint, gguf);
        }
        let heads = match () {
            () if name.contains("q_proj") => c["num_attention_heads"].as_u64(),
            () if name.contains("k_proj") => c["num_key_value_heads"].as_u64(),
            () => None,
        };
        let mut values = values.clone();
        if let (Some(heads), "llama") = (heads, architecture) {
            let dim = shape[0] / heads as usize;
            let row = values.len() / shape[0];
            let old = values.clone();
            for at in 0..shape[0] {
                let (head, place) = (at / dim, at % dim);
                let from = head * dim + place / 2 + place % 2 * (dim / 2);
                values[at * row..][..row].copy_from_slice(&old[from * row..][..row]);
            }
        }
        all.push(Tensor::f32(new, shape.clone(), &values));
    }
    all
}

fn bytes(metadata: &Metadata, tensors: &[Tensor]) -> Vec<u8> {
    let metadata: Vec<_> = metadata.iter().map(|(key, v)| (key.as_str(), v.clone())).collect();
    let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    let mut file = Vec::new();
    gguf::write(&mut file, &metadata, &views).unwrap();
    file
}

/// A folder with one GGUF file and nothing else.
fn alone(name: &str, metadata: &Metadata, tensors: &[Tensor]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(name);
    fs::write(&file, bytes(metadata, tensors)).unwrap();
    (folder, file)
}

fn set(metadata: &mut Metadata, key: &str, value: Value<'static>) {
    metadata.retain(|(old, _)| old != key);
    metadata.push((key.into(), value));
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let tokens: Vec<u32> = (0..45).map(|i| (i * 37 + 5) % VOCAB as u32).collect();
    let model = Model::load(checkpoint).unwrap();
    let mut cache = KvCache::new(model.config());
    model.forward(&tokens, &mut cache, &mut Context::new()).unwrap().data().to_vec()
}

/// The message for a file, with the folder's name taken out.
fn refusal(path: &Path) -> String {
    let error = Checkpoint::open(path).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    let folder = if path.is_dir() { path } else { path.parent().unwrap() };
    error.replace(&folder.display().to_string(), "tiny")
}

/// The message for a llama with `change` in its metadata or tensors.
fn refused(change: impl FnOnce(&mut Metadata, &mut Vec<Tensor>)) -> String {
    let tiny = Tiny::new(json!({}));
    let (mut metadata, mut tensors) = (metadata(&tiny.config, "llama"), tensors(&tiny, "llama"));
    change(&mut metadata, &mut tensors);
    refusal(&alone("a.gguf", &metadata, &tensors).1)
}

#[test]
fn a_file_alone_is_the_model_that_it_was_made_from() {
    let qwen2 = json!({"architectures": ["Qwen2ForCausalLM"]});
    for (changes, architecture) in [
        (json!({}), "llama"),
        (json!({"tie_word_embeddings": false, "num_key_value_heads": 4}), "llama"),
        (json!({"num_key_value_heads": 1, "head_dim": 10}), "llama"),
        (json!({"attention_bias": true, "mlp_bias": true}), "llama"),
        // Biases on q, k and v alone, and yet the rows of a llama are sorted.
        (qwen2.clone(), "llama"),
        (qwen2, "qwen2"),
    ] {
        let tiny = Tiny::new(changes.clone());
        let right = tiny.open().unwrap();
        let (metadata, tensors) =
            (metadata(&tiny.config, architecture), tensors(&tiny, architecture));
        for name in ["tiny.gguf", "tiny.GGUF", "blob"] {
            let (folder, file) = alone(name, &metadata, &tensors);
            for path in [file.as_path(), folder.path()] {
                let checkpoint = Checkpoint::open(path).unwrap();
                assert_eq!(checkpoint.config(), right.config(), "{changes} {architecture}");
                assert_eq!(logits(&checkpoint), logits(&right), "{changes} {architecture}");
            }
        }
    }
}

#[test]
fn factors_of_rotary_frequencies_are_those_of_llama_3() {
    let rule = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    let tiny = Tiny::new(json!({"rope_scaling": rule, "head_dim": 16}));
    // By the rule, in f64: 8 where fewer than 1 turn, 1 where more than 4, between by the share.
    let factors: Vec<f32> = (0..8)
        .map(|i| {
            let turns = 32.0 * 1000_f64.powf(-2.0 * f64::from(i) / 16.0) / std::f64::consts::TAU;
            let keep = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 / (keep + (1.0 - keep) / 8.0)) as f32
        })
        .collect();
    let mut tensors = tensors(&tiny, "llama");
    tensors.push(Tensor::f32("rope_freqs.weight", vec![8], &factors));
    let metadata = metadata(&tiny.config, "llama");
    let (folder, file) = alone("a.gguf", &metadata, &tensors);
    let right = logits(&tiny.open().unwrap());
    let close = |checkpoint: &Checkpoint| {
        let got = logits(checkpoint);
        assert!(got.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs().max(1.0)));
    };
    let checkpoint = Checkpoint::open(&file).unwrap();
    assert_eq!(checkpoint.config().rope_factors.as_ref(), Some(&factors));
    close(&checkpoint);
    // The rule is found again.
    assert_eq!(checkpoint.config_json().unwrap()["rope_scaling"], rule);
    // With the rule in a config.json beside it, which agrees; and with another, which does not.
    let config = folder.path().join("config.json");
    fs::write(&config, tiny.config.to_string()).unwrap();
    close(&Checkpoint::open(&file).unwrap());
    for other in [
        json!(null),
        json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    ] {
        let mut json = tiny.config.clone();
        json["rope_scaling"] = other;
        fs::write(&config, json.to_string()).unwrap();
        let error = refusal(&file);
        assert!(
            error.starts_with("tiny/config.json: rope_theta and rope_scaling: expected"),
            "{error}"
        );
        assert!(error.contains("rope_freqs.weight"), "{error}");
    }
    // Numbers that follow no rule are computed with, too, but no config.json can say them.
    let odd: Vec<f32> = (0..8).map(|i| 1.0 + i as f32).collect();
    *tensors.last_mut().unwrap() = Tensor::f32("rope_freqs.weight", vec![8], &odd);
    let checkpoint = Checkpoint::open(alone("a.gguf", &metadata, &tensors).1);
    let error = checkpoint.unwrap().config_json().unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight"), "{error}");
}

#[test]
fn factors_that_make_no_frequencies_are_refused() {
    for (shape, factors, expected) in [
        (vec![4], vec![1.0; 4], "expected shape [3], got [4]"),
        (vec![3], vec![1.0, 0.0, 8.0], "expected positive numbers, got 0 at 1"),
        (vec![3], vec![1.0, 2.0, f32::NAN], "expected positive numbers, got NaN at 2"),
    ] {
        let error = refused(|_, tensors| {
            tensors.push(Tensor::f32("rope_freqs.weight", shape, &factors));
        });
        assert!(error.contains("rope_freqs.weight") && error.contains(expected), "{error}");
    }
}

#[test]
fn every_key_is_used_or_refused_by_name() {
    for (key, value, expected) in [
        ("general.architecture", text("grok"), r#"expected "llama" or "qwen2", got "grok""#),
        ("general.type", text("adapter"), r#"expected "model", got "adapter""#),
        ("general.quantization_version", Value::U32(1), "expected 2, got 1"),
        ("llama.rope.dimension_count", Value::U32(4), "expected the width of a head, 6, got 4"),
        ("llama.attention.value_length", Value::U32(8), "expected the width of a head, 6, got 8"),
        ("llama.attention.sliding_window", Value::U32(16), "at least context_length, 48"),
        ("llama.logit_scale", Value::F32(0.5), "expected 1, or none, got 0.5"),
        ("llama.embedding_scale", Value::F32(12.0), "expected 1, or none, got 12.0"),
        ("llama.attention.scale", Value::F32(1.0), "got 1.0"),
        ("llama.rope.scaling.attn_factor", Value::F32(1.2), "expected 1, or none, got 1.2"),
        ("llama.rope.scaling.type", text("longrope"), r#"got "longrope""#),
        ("llama.expert_count", Value::U32(8), "expected 0, for what this decoder does not"),
        ("llama.attention.causal", Value::Bool(false), "expected true, got false"),
        ("llama.tensor_data_layout", text("other"), r#"expected "reference", got "other""#),
        ("llama.something_new", Value::U32(1), "expected no such key, whose meaning is not"),
        ("llama.vocab_size", Value::U32(7), "expected 264, the rows of token_embd.weight, got 7"),
        (
            "llama.attention.head_count",
            text("4"),
            r#"expected an integer from 1 to 16777216, got "4""#,
        ),
        (
            "llama.attention.head_count",
            list(&[Value::U32(4), Value::U32(2)]),
            "the same number for all layers",
        ),
        ("llama.attention.head_count", Value::U32(0), "expected an integer from 1 to"),
        ("llama.attention.head_count", Value::U64(1 << 60), "expected an integer from 1 to"),
        ("llama.attention.head_count", Value::U32(5), "expected a divisor of embedding_length, 24"),
        ("llama.rope.freq_base", Value::F32(f32::NAN), "expected a number, got NaN"),
        ("llama.rope.freq_base", Value::F32(-1.0), "expected a positive number, got -1.0"),
        ("tokenizer.ggml.bos_token_id", Value::U32(264), "expected a token below 264, got 264"),
        ("tokenizer.ggml.model", text("t5"), r#"expected "gpt2" or "llama", got "t5""#),
        ("tokenizer.ggml.precompiled_charsmap", list(&[Value::U8(0)]), "expected no such key"),
        ("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(true), "expected false, got true"),
        ("tokenizer.ggml.add_bos_token", Value::U32(1), "expected true or false, got 1"),
        ("tokenizer.ggml.token_type", list(&[Value::I32(1)]), "expected 264 numbers from 0 to 6"),
        ("tokenizer.ggml.scores", list(&[Value::F32(1.0)]), "expected 264 finite numbers"),
        ("tokenizer.ggml.tokens", Value::U32(1), "expected a list of tokens, got 1"),
    ] {
        let error = refused(|metadata, _| set(metadata, key, value.clone()));
        assert!(error.starts_with(&format!("tiny/a.gguf: {key}: ")), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    // What means nothing is accepted: off, neutral, or information.
    let tiny = Tiny::new(json!({}));
    let mut metadata = metadata(&tiny.config, "llama");
    for (key, value) in [
        ("general.name", text("x")),
        ("llama.expert_count", Value::U32(0)),
        ("llama.use_parallel_residual", Value::Bool(false)),
        ("llama.logit_scale", Value::F32(1.0)),
        ("llama.attention.sliding_window", Value::U32(48)),
        ("llama.attention.head_count", list(&[Value::I32(4), Value::I32(4)])),
        ("llama.rope.dimension_count", Value::U32(6)),
        ("llama.rope.scaling.type", text("none")),
        ("llama.rope.scaling.factor", Value::F32(4.0)),
        ("llama.vocab_size", Value::U32(264)),
        ("tokenizer.chat_template", text("{{ x }}")),
        ("tokenizer.ggml.padding_token_id", Value::U32(2)),
        ("quantize.imatrix.entries_count", Value::I32(7)),
    ] {
        set(&mut metadata, key, value);
    }
    let (_folder, file) = alone("a.gguf", &metadata, &tensors(&tiny, "llama"));
    assert_eq!(logits(&Checkpoint::open(file).unwrap()), logits(&tiny.open().unwrap()));
}

#[test]
fn what_is_missing_is_named() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
    ] {
        let error = refused(|metadata, _| metadata.retain(|(old, _)| old != key));
        let start = format!("tiny/a.gguf: {key}: expected ");
        assert!(error.starts_with(&start) && error.contains("got nothing"), "{error}");
    }
    let error = refused(|_, tensors| tensors.retain(|t| t.name != "token_embd.weight"));
    assert_eq!(error, "tiny/a.gguf: tensor token_embd.weight is missing");
    let error = refused(|_, tensors| tensors.retain(|t| t.name != "blk.1.attn_q.weight"));
    assert!(error.ends_with("q_proj.weight is missing"), "{error}");
    let error = refused(|_, tensors| {
        tensors.push(Tensor::f32("blk.0.attn_sinks.weight", vec![4], &[0.0; 4]));
    });
    assert!(error.contains("blk.0.attn_sinks.weight has no place"), "{error}");
    let error = refused(|_, tensors| {
        tensors.push(Tensor::f32("model.norm.weight", vec![24], &[0.0; 24]));
    });
    assert!(
        error.contains("output_norm.weight and model.norm.weight are the same tensor"),
        "{error}"
    );
}

#[test]
fn files_cut_at_any_length_are_errors() {
    let tiny = Tiny::new(json!({"num_hidden_layers": 1}));
    let whole = bytes(&metadata(&tiny.config, "llama"), &tensors(&tiny, "llama"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.gguf");
    let header = whole.len() - 20_000;
    for len in (0..header).step_by(97).chain([whole.len() - 1]) {
        fs::write(&file, &whole[..len]).unwrap();
        let error = refusal(&file);
        assert!(error.starts_with("tiny"), "{len}: {error}");
    }
}

/// The tensors in `count` parts, as `NAME-00001-of-0000N.gguf` with the metadata of gguf-split.
fn split(folder: &Path, metadata: &Metadata, tensors: &[Tensor], count: usize) -> Vec<PathBuf> {
    let size = tensors.len().div_ceil(count);
    let part = |at: usize| {
        let mut keys = if at == 0 { metadata.clone() } else { Vec::new() };
        set(&mut keys, "split.no", Value::U16(at as u16));
        set(&mut keys, "split.count", Value::U16(count as u16));
        set(&mut keys, "split.tensors.count", Value::I32(tensors.len() as i32));
        let file = folder.join(format!("tiny-{:05}-of-{count:05}.gguf", at + 1));
        let part: Vec<_> = tensors.iter().skip(at * size).take(size).cloned().collect();
        fs::write(&file, bytes(&keys, &part)).unwrap();
        file
    };
    (0..count).map(part).collect()
}

#[test]
fn parts_are_put_together_whichever_is_given() {
    let tiny = Tiny::new(json!({}));
    let (metadata, tensors) = (metadata(&tiny.config, "llama"), tensors(&tiny, "llama"));
    let folder = tempfile::tempdir().unwrap();
    let files = split(folder.path(), &metadata, &tensors, 3);
    let right = logits(&tiny.open().unwrap());
    for path in files.iter().map(PathBuf::as_path).chain([folder.path()]) {
        assert_eq!(logits(&Checkpoint::open(path).unwrap()), right);
    }
    let all = crate::Tensors::open(&files[1]).unwrap();
    assert_eq!(lowbit::formats::TensorSource::names(&all).len(), tensors.len());

    let replace = |at: usize, with: usize| {
        let kept = fs::read(&files[at]).unwrap();
        fs::copy(&files[with], &files[at]).unwrap();
        let error = refusal(&files[0]);
        fs::write(&files[at], kept).unwrap();
        error
    };
    let error = replace(1, 2);
    assert!(error.starts_with("tiny/tiny-00002-of-00003.gguf: split.no: expected 1"), "{error}");
    let one = folder.path().join("blob");
    fs::rename(&files[1], &one).unwrap();
    let error = refusal(&files[2]);
    assert_eq!(
        error,
        "tiny/tiny-00002-of-00003.gguf: this part is missing: tiny-00003-of-00003.gguf is part 3 of 3, which belong into one folder"
    );
    let error = refusal(&one);
    assert!(error.contains("it is one of 3 parts: give the parts their names back"), "{error}");
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let tiny = Tiny::new(json!({}));
    let (metadata, tensors) = (metadata(&tiny.config, "llama"), tensors(&tiny, "llama"));
    let folder = tempfile::tempdir().unwrap();
    let files = split(folder.path(), &metadata, &tensors, 2);
    let rewrite = |change: &dyn Fn(&mut Metadata, &mut Vec<Tensor>)| {
        let (mut keys, mut part) = (Metadata::new(), tensors[tensors.len().div_ceil(2)..].to_vec());
        set(&mut keys, "split.no", Value::U16(1));
        set(&mut keys, "split.count", Value::U16(2));
        change(&mut keys, &mut part);
        fs::write(&files[1], bytes(&keys, &part)).unwrap();
        refusal(folder.path())
    };
    let error = rewrite(&|keys, _| set(keys, "split.count", Value::U16(3)));
    assert!(error.contains("split.count: expected 2, as its name says, got 3"), "{error}");
    let error = rewrite(&|keys, _| keys.clear());
    assert!(error.contains("split.count: expected 2, as its name says, got nothing"), "{error}");
    let error = rewrite(&|keys, _| set(keys, "split.count", text("2")));
    assert!(error.contains(r#"split.count: expected a number, got "2""#), "{error}");
    let error = rewrite(&|keys, _| set(keys, "llama.block_count", Value::U32(9)));
    assert!(error.contains("llama.block_count is not the same in"), "{error}");
    let error = rewrite(&|_, part| part.truncate(2));
    assert!(error.contains("split.tensors.count: expected"), "{error}");
    let error = rewrite(&|_, part| part.push(tensors[0].clone()));
    assert!(error.contains("which tiny/tiny-00001-of-00002.gguf has, too"), "{error}");
}

#[test]
fn folders_say_what_is_in_them() {
    let tiny = Tiny::new(json!({}));
    let (metadata, tensors) = (metadata(&tiny.config, "llama"), tensors(&tiny, "llama"));
    let (folder, file) = alone("a.gguf", &metadata, &tensors);
    fs::copy(&file, folder.path().join("b.gguf")).unwrap();
    assert_eq!(
        refusal(folder.path()),
        "tiny: it has several GGUF models, a.gguf, b.gguf: give one of the files"
    );
    // The one that is named as a model is.
    fs::rename(&file, folder.path().join("model.gguf")).unwrap();
    Checkpoint::open(folder.path()).unwrap();
    let other = folder.path().join("notes.txt");
    fs::write(&other, "text").unwrap();
    let error = refusal(&other);
    assert!(
        error.starts_with("tiny/notes.txt: expected the folder of a model or a GGUF file"),
        "{error}"
    );
    let error = refusal(&folder.path().join("c.gguf"));
    assert!(error.starts_with("tiny/c.gguf: No such file"), "{error}");
}

#[test]
fn texts_beside_a_file_are_used_if_they_agree() {
    let tiny = Tiny::new(json!({}));
    let (metadata, tensors) = (metadata(&tiny.config, "llama"), tensors(&tiny, "llama"));
    let (folder, file) = alone("a.gguf", &metadata, &tensors);
    let path = |name: &str| folder.path().join(name);
    // Another token that ends a text, which only config.json knows.
    let mut config = tiny.config.clone();
    config["eos_token_id"] = json!([2, 5]);
    fs::write(path("config.json"), config.to_string()).unwrap();
    fs::write(path("tokenizer.json"), tiny::tokenizer().to_string()).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    assert_eq!(checkpoint.config().eos_token_id, [2, 5]);
    assert_eq!(logits(&checkpoint), logits(&tiny.open().unwrap()));
    assert_eq!(checkpoint.config_json().unwrap(), config);

    for (field, value, expected) in [
        ("hidden_size", json!(48), "expected 24, by llama.embedding_length of tiny/a.gguf, got 48"),
        ("head_dim", json!(12), "expected 6, by llama.attention.key_length of tiny/a.gguf"),
        ("num_key_value_heads", json!(4), "expected 2, by llama.attention.head_count_kv of"),
        ("vocab_size", json!(300), "expected 264, by llama.vocab_size of tiny/a.gguf, got 300"),
        ("rms_norm_eps", json!(1e-6), "expected 0.00001, by"),
        ("rope_theta", json!(500.0), "rope.freq_base"),
        ("tie_word_embeddings", json!(false), "expected true, by output.weight of"),
        ("attention_bias", json!(true), "expected false, by blk.0.attn_q.bias of"),
        (
            "bos_token_id",
            json!(0),
            "expected 1, by tokenizer.ggml.bos_token_id of tiny/a.gguf, got 0",
        ),
        ("eos_token_id", json!([0, 5]), "expected 2, by tokenizer.ggml.eos_token_id"),
        (
            "architectures",
            json!(["Qwen2ForCausalLM"]),
            "expected llama, by general.architecture of",
        ),
        ("architectures", json!(["GPT2LMHeadModel"]), "expected LlamaForCausalLM"),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "expected null, by the tensors of",
        ),
    ] {
        let mut other = config.clone();
        other[field] = value;
        fs::write(path("config.json"), other.to_string()).unwrap();
        let error = refusal(&file);
        assert!(error.starts_with("tiny/config.json: ") && error.contains(field), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    fs::write(path("config.json"), config.to_string()).unwrap();
    let json = tiny::tokenizer()
        .to_string()
        .replace("\"ab\"", "\"bb\"")
        .replace(r#"["a","b"]"#, r#"["b","b"]"#);
    fs::write(path("tokenizer.json"), json).unwrap();
    let error = refusal(&file);
    let expected = r#"tiny/tokenizer.json: token 263 is "bb", but "ab" in tokenizer.ggml.tokens of tiny/a.gguf"#;
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_head_beside_a_tied_config_must_be_the_embedding() {
    let tiny = Tiny::new(json!({}));
    let (metadata, mut tensors) = (metadata(&tiny.config, "llama"), tensors(&tiny, "llama"));
    let embedding = tensors.iter().find(|t| t.name == "token_embd.weight").unwrap().clone();
    tensors.push(Tensor { name: "output.weight".into(), ..embedding });
    let (folder, file) = alone("a.gguf", &metadata, &tensors);
    fs::write(folder.path().join("config.json"), tiny.config.to_string()).unwrap();
    let right = logits(&tiny.open().unwrap());
    assert_eq!(logits(&Checkpoint::open(&file).unwrap()), right);
    tensors.last_mut().unwrap().bytes[0] ^= 1;
    fs::write(&file, bytes(&metadata, &tensors)).unwrap();
    assert!(refusal(&file).contains("tie_word_embeddings: expected false"));
}

#[test]
fn blocks_of_ggml_are_read_and_their_rows_sorted_back() {
    let tiny =
        Tiny::new(json!({"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}));
    // Multiples of 1/64 below 1/2 are codes of Q8_0 with the scale 1/64.
    let mut tensors = tensors(&tiny, "llama");
    for tensor in tensors.iter_mut().filter(|t| t.shape.len() == 2) {
        let values = tensor.view().to_f32().unwrap();
        let block = |block: &[f32]| {
            let codes = block.iter().map(|x| (x * 64.0) as i8 as u8);
            [0x00, 0x24].into_iter().chain(codes).collect::<Vec<_>>() // 2^-6 in f16
        };
        tensor.bytes = values.chunks(32).flat_map(block).collect();
        tensor.dtype = lowbit::formats::Dtype::Ggml(GgmlType::Q8_0);
    }
    let (_folder, file) = alone("a.gguf", &metadata(&tiny.config, "llama"), &tensors);
    let (checkpoint, right) = (Checkpoint::open(file).unwrap(), tiny.open().unwrap());
    for name in right.linear_names() {
        assert_eq!(checkpoint.linear(&name).unwrap(), right.linear(&name).unwrap());
    }
    let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-3 * b.abs().max(1.0);
    assert!(logits(&checkpoint).iter().zip(&logits(&right)).all(close));
}

/// A vocabulary of all bytes and of what `merges` make, in the order of the merges.
fn byte_level(pre: Option<&str>, merges: &[&str]) -> Metadata {
    // Bytes that are no printable characters of Latin 1 are U+0100, U+0101, … in their order (GPT-2).
    let printable =
        |b: u32| (33..127).contains(&b) || (161..173).contains(&b) || (174..256).contains(&b);
    let mut others = 256..;
    let code = |b| if printable(b) { b } else { others.next().unwrap() };
    let mut tokens: Vec<String> =
        (0..256).map(code).map(|code| char::from_u32(code).unwrap().to_string()).collect();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut all: Metadata = [
        ("model", text("gpt2")),
        ("tokens", strings(tokens.iter().map(String::as_str))),
        ("merges", strings(merges.iter().copied())),
    ]
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .into();
    all.extend(pre.map(|pre| ("tokenizer.ggml.pre".to_string(), text(pre))));
    all
}

/// A checkpoint of which only the tokenizer matters.
fn with_tokenizer(tokenizer: Metadata) -> crate::Result<Checkpoint> {
    let list = &tokenizer.iter().find(|(key, _)| key == "tokenizer.ggml.tokens").unwrap().1;
    let size = list.as_array().unwrap().len();
    let tiny = Tiny::new(json!({"num_hidden_layers": 1}));
    let mut metadata = metadata(&tiny.config, "llama");
    metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    metadata.extend(tokenizer);
    let mut tensors = tensors(&tiny, "llama");
    let embedding = tensors.iter_mut().find(|t| t.name == "token_embd.weight").unwrap();
    *embedding = Tensor::f32("token_embd.weight", vec![size, 24], &vec![0.0; size * 24]);
    Checkpoint::open(alone("a.gguf", &metadata, &tensors).1)
}

#[test]
fn texts_are_split_in_the_way_that_pre_names() {
    let merges = &["1 2", "12 3", "123 4", "d o"];
    let split = |pre: Option<&str>, text: &str| {
        let checkpoint = with_tokenizer(byte_level(pre, merges)).unwrap();
        let ids = checkpoint.tokenizer().encode_plain(text).unwrap();
        assert_eq!(checkpoint.tokenizer().decode(&ids).unwrap(), text);
        ids
    };
    let byte = |b: u8| u32::from(b);
    let (d123, d1234, word) = (257, 258, 259);
    let alone: Vec<u32> = b"1234".iter().map(|&b| byte(b)).collect();
    for pre in ["smollm", "starcoder", "qwen2", "tekken", "deepseek-coder", "command-r", "viking"] {
        assert_eq!(split(Some(pre), "1234"), alone, "{pre}");
    }
    for pre in ["llama-bpe", "llama3", "default", "falcon", "gpt-4o", "deepseek-v3", "glm4"] {
        assert_eq!(split(Some(pre), "1234"), [d123, byte(b'4')], "{pre}");
    }
    for pre in ["gpt-2", "mpt", "olmo", "bloom"] {
        assert_eq!(split(Some(pre), "1234"), [d1234], "{pre}");
    }
    assert_eq!(split(None, "1234"), [d123, byte(b'4')]);
    // A space goes with letters behind it and not with digits; whatever it is, it comes back.
    for pre in ["llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o", "deepseek-v3", "deepseek-coder"]
    {
        let ids = split(Some(pre), "do 12é漢\u{300}\r\n\n  DON'T\tx's …");
        assert_eq!(ids[..2], [word, byte(b' ')], "{pre}");
    }
    let error = with_tokenizer(byte_level(Some("kimi-k2"), merges)).unwrap_err().to_string();
    assert!(error.contains(
        r#"tokenizer.ggml.pre: expected a way to split texts that is known here, got "kimi-k2""#
    ));
    assert!(error.ends_with("put the model's tokenizer.json beside the file"), "{error}");
}

#[test]
fn types_of_tokens_are_looked_at() {
    let mut metadata = byte_level(Some("llama-bpe"), &["a b", "< |", "<| x"]);
    let tokens: Vec<_> = metadata[1].1.as_array().unwrap().iter().collect();
    let mut names: Vec<_> = tokens.iter().map(|t| t.as_str().unwrap().to_owned()).collect();
    names.extend(["<|begin|>", "<tool call>", "[PAD]", "", "aba"].map(str::to_owned));
    let last = names.len() as u32;
    let mut kinds = vec![Value::I32(1); names.len()];
    for (back, kind) in [(5, 3), (4, 4), (3, 5), (2, 5)] {
        kinds[names.len() - back] = Value::I32(kind);
    }
    set(&mut metadata, "tokenizer.ggml.tokens", strings(names.iter().map(String::as_str)));
    set(&mut metadata, "tokenizer.ggml.token_type", list(&kinds));
    set(&mut metadata, "tokenizer.ggml.bos_token_id", Value::U32(last - 5));
    let tokenizer = with_tokenizer(metadata.clone()).unwrap();
    let tokenizer = tokenizer.tokenizer();
    let a = u32::from(b'a');
    // Llama 3 puts BOS in front without being told; control and user-defined tokens are matched whole, and the
    // latter are text; a word that is a token needs no merges.
    assert_eq!(tokenizer.encode("ab<tool call>a").unwrap(), [last - 5, 256, last - 4, a]);
    assert_eq!(
        tokenizer.encode_plain("<|begin|>a aba").unwrap(),
        [last - 5, a, u32::from(b' '), 256, a]
    );
    assert_eq!(tokenizer.encode_plain("aba").unwrap(), [last - 1]);
    assert_eq!(tokenizer.decode(&[last - 5, 256, last - 4]).unwrap(), "ab<tool call>");
    set(&mut metadata, "tokenizer.ggml.add_bos_token", Value::Bool(false));
    set(&mut metadata, "tokenizer.ggml.eos_token_id", Value::U32(last - 5));
    set(&mut metadata, "tokenizer.ggml.add_eos_token", Value::Bool(true));
    let checkpoint = with_tokenizer(metadata.clone()).unwrap();
    assert_eq!(checkpoint.tokenizer().encode("ab").unwrap(), [256, last - 5]);
    set(&mut metadata, "tokenizer.ggml.pre", text("qwen2"));
    metadata.retain(|(key, _)| key != "tokenizer.ggml.eos_token_id");
    let error = with_tokenizer(metadata).unwrap_err().to_string();
    assert!(error.contains("eos_token_id: expected a token, which is to be added"), "{error}");
}

#[test]
fn a_vocabulary_of_characters_and_one_that_lacks_bytes() {
    let tokens = ["<unk>", "<s>", "a", "b", " "];
    let metadata = |tokens: &[&str]| -> Metadata {
        vec![
            ("tokenizer.ggml.model".into(), text("gpt2")),
            ("tokenizer.ggml.tokens".into(), strings(tokens.iter().copied())),
        ]
    };
    let checkpoint = with_tokenizer(metadata(&tokens)).unwrap();
    assert_eq!(checkpoint.tokenizer().encode("ab ac").unwrap(), [2, 3, 4, 2, 0]);
    // Nothing is left out in silence.
    let checkpoint = with_tokenizer(metadata(&["a", "b", "Ġ"])).unwrap();
    assert_eq!(checkpoint.tokenizer().encode("ab a").unwrap(), [0, 1, 2, 0]);
    let error = checkpoint.tokenizer().encode("abc").unwrap_err().to_string();
    assert!(error.ends_with("the text has the byte 0x63, for which there is no token"), "{error}");
    let error = with_tokenizer(metadata(&["a", "b", "a"])).unwrap_err().to_string();
    assert!(error.contains(r#"0 and 2 are both "a""#), "{error}");
}

/// Ids that the package sentencepiece 0.2.3 gives for a model of type BPE with these pieces and scores, with
/// byte_fallback, without normalization.
#[test]
fn pieces_merge_as_in_sentencepiece() {
    let merged = ["bc", "__", "ab", "_a", "____", "aa", "abc", "___", "cab", "aaa", "_ab"];
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens
        .extend(merged.into_iter().chain(["_", "a", "b", "c"]).map(|p| p.replace('_', "\u{2581}")));
    let scores = (0..tokens.len()).map(|id| match id {
        0..259 => 0.0,
        259..270 => 259.0 - id as f32,
        _ => 170.0 - id as f32,
    });
    let kinds = (0..tokens.len()).map(|id| [2, 3, 3, 6, 1][id.min(3) + usize::from(id >= 259)]);
    let mut metadata = sentencepiece();
    let scores: Vec<_> = scores.map(Value::F32).collect();
    let kinds: Vec<_> = kinds.map(Value::I32).collect();
    set(&mut metadata, "tokenizer.ggml.tokens", strings(tokens.iter().map(String::as_str)));
    set(&mut metadata, "tokenizer.ggml.scores", list(&scores));
    set(&mut metadata, "tokenizer.ggml.token_type", list(&kinds));
    let checkpoint = with_tokenizer(metadata.clone()).unwrap();
    let tokenizer = checkpoint.tokenizer();
    for (text, ids) in [
        ("abc cab", &[262, 259, 270, 267][..]),
        ("aaaaa aab", &[262, 264, 264, 262, 261]),
        ("     a", &[263, 260, 271]),
        ("a       abcbcab", &[262, 263, 260, 262, 259, 259, 261]),
        ("<0x41>é\n", &[270, 63, 51, 123, 55, 52, 65, 198, 172, 13]),
        ("<unk>", &[270, 63, 120, 113, 110, 65]),
    ] {
        assert_eq!(tokenizer.encode_plain(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.encode(text).unwrap(), [&[1], ids].concat(), "{text:?}");
        assert_eq!(tokenizer.decode(ids).unwrap(), text);
    }
    set(&mut metadata, "tokenizer.ggml.add_space_prefix", Value::Bool(false));
    set(&mut metadata, "tokenizer.ggml.add_bos_token", Value::Bool(false));
    set(&mut metadata, "tokenizer.ggml.add_eos_token", Value::Bool(true));
    let checkpoint = with_tokenizer(metadata.clone()).unwrap();
    let tokenizer = checkpoint.tokenizer();
    assert_eq!(tokenizer.encode("abc cab").unwrap(), [265, 270, 267, 2]);
    assert_eq!(tokenizer.encode("   ab").unwrap(), [266, 261, 2]);
    assert_eq!(tokenizer.decode(&[266, 261]).unwrap(), "   ab");
    assert_eq!(tokenizer.encode_plain("ab</s>a").unwrap(), [261, 2, 271]);

    let long = "a".repeat(257);
    tokens[266] = long;
    set(&mut metadata, "tokenizer.ggml.tokens", strings(tokens.iter().map(String::as_str)));
    let error = with_tokenizer(metadata).unwrap_err().to_string();
    assert!(
        error.contains("tokenizer.ggml.tokens: expected at most 256 bytes, got 257 at 266"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_is_written_as_a_tokenizer_json() {
    let checkpoint = with_tokenizer(byte_level(Some("smollm"), &["a b", "Ġ a"])).unwrap();
    let json: Json = serde_json::from_slice(checkpoint.tokenizer_json()).unwrap();
    assert_eq!(json["model"]["merges"], json!([["a", "b"], ["Ġ", "a"]]));
    assert_eq!(json["model"]["vocab"]["Ġa"], 257);
    assert_eq!(json["pre_tokenizer"]["pretokenizers"][0]["pattern"], json!({"Regex": r"\p{N}"}));
    let again = crate::Tokenizer::parse("x", checkpoint.tokenizer_json()).unwrap();
    assert_eq!(again.encode("ab a1").unwrap(), checkpoint.tokenizer().encode("ab a1").unwrap());
}
