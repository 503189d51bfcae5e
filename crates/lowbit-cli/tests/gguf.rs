//! `lowbit quantize --format gguf`: its defaults, its refusals, and what other programs see.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use lowbit::formats::{Tensor, gguf::Gguf, write_safetensors};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn lowbit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lowbit")).args(args).output().unwrap()
}

fn json_of(args: &[&str]) -> Json {
    let output = lowbit(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A Llama of one block with `changes` in its config.json, 32 wide.
fn model(folder: &Path, changes: &Json) {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
    });
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    let mut vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2});
    for (id, letter) in ('a'..='z').enumerate() {
        vocab[letter.to_string()] = (id + 3).into();
    }
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []}
    });
    let biases = config["attention_bias"] == true;
    let layer = |name: &str| format!("model.layers.0.{name}");
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![64, 32]),
        ("model.norm.weight".to_string(), vec![32]),
        ("lm_head.weight".to_string(), vec![64, 32]),
        (layer("input_layernorm.weight"), vec![32]),
        (layer("post_attention_layernorm.weight"), vec![32]),
    ];
    for (name, n, k) in [
        ("self_attn.q_proj", 32, 32),
        ("self_attn.k_proj", 16, 32),
        ("self_attn.v_proj", 16, 32),
        ("self_attn.o_proj", 32, 32),
        ("mlp.gate_proj", 64, 32),
        ("mlp.up_proj", 64, 32),
        ("mlp.down_proj", 32, 64),
    ] {
        shapes.push((layer(&format!("{name}.weight")), vec![n, k]));
        if biases {
            shapes.push((layer(&format!("{name}.bias")), vec![n]));
        }
    }
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 40) as f32 / 16_777_216.0 - 0.5) * 1.5
    };
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| random()).collect();
        Tensor::f32(name, shape, &data)
    });
    let tensors: Vec<_> = tensors.collect();
    let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    let file = BufWriter::new(File::create(folder.join("model.safetensors")).unwrap());
    write_safetensors(file, &[], &views).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let lines = (0..6).map(|line| {
        let ids = (0..40).map(|i| (3 + (line * 17 + i * i * 5) % 26).to_string());
        format!("1 {}\n", ids.collect::<Vec<_>>().join(" "))
    });
    let lines: String = lines.collect();
    fs::write(folder.join("eval.tokens"), &lines).unwrap();
    fs::write(folder.join("calibration.tokens"), lines).unwrap();
}

struct Place(TempDir);

impl Place {
    fn new(changes: &Json) -> Self {
        let folder = TempDir::new().unwrap();
        model(folder.path(), changes);
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn quantize(&self, out: &str, args: &[&str]) -> Output {
        let (model, out) = (self.0.path().to_str().unwrap(), self.path(out));
        let start = ["quantize", model, "--format", "gguf", "--out", out.to_str().unwrap()];
        lowbit(&[&start[..], args].concat())
    }
}

#[test]
fn groups_are_of_32_and_zero_points_are_offsets_unless_something_else_is_asked_for() {
    let place = Place::new(&json!({}));
    for (out, args, scheme) in [
        ("rtn", &["--method", "rtn"][..], "Q4_0"),
        ("rtn8", &["--method", "rtn", "--bits", "8"], "Q8_0"),
        ("rtn5", &["--method", "rtn", "--bits", "5", "--zero-points"], "Q5_1"),
        ("gptq", &["--method", "gptq", "--zero-points"], "Q4_1"),
        ("awq", &["--method", "awq"], "Q4_1"),
        ("best", &["--method", "best"], "Q4_1"),
    ] {
        let output = place.quantize(out, args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{out}: {said}");
        let bytes = fs::read(place.path(out).join("model.gguf")).unwrap();
        let file = Gguf::new("model.gguf", bytes).unwrap();
        let tensor = lowbit::formats::TensorSource::tensor(&file, "blk.0.ffn_up.weight").unwrap();
        assert_eq!(tensor.dtype.to_string(), scheme, "{out}");
        // Nothing moves between what the method computed and what is read.
        let report = fs::read_to_string(place.path(out).join("quantization.json")).unwrap();
        let report: Json = serde_json::from_str(&report).unwrap();
        let moved = |what: &Json| what.as_str().unwrap().contains("stored within");
        assert!(!report["substitutions"].as_array().unwrap().iter().any(moved), "{report}");
    }
}

#[test]
fn what_gguf_cannot_hold_is_refused_before_any_work_and_in_words() {
    let place = Place::new(&json!({}));
    for (args, words) in [
        (
            &["--method", "rtn", "--group-size", "128"][..],
            &["groups of 128", "--group-size 32"][..],
        ),
        (&["--method", "awq", "--bits", "8"], &["int8", "f16 offsets", "--bits 4"]),
        (&["--method", "rtn", "--bits", "3"], &["int3", "int4, int5 and int8", "--bits 4"]),
    ] {
        let output = place.quantize("out", args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert!(!said.contains('{') && said.lines().count() == 1, "{said}");
    }
    let tokenizer =
        json!({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}});
    fs::write(place.path("tokenizer.json"), tokenizer.to_string()).unwrap();
    let output = place.quantize("out", &["--method", "gptq"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("Unigram"), "{said}");
    assert!(!place.path("out.part").exists() && !place.path("out").exists());
}

/// Biases, scaled rotary frequencies, and the order of rows: two programs, the same perplexity.
#[test]
fn transformers_gives_the_perplexity_of_lowbit() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32
    });
    for changes in [
        json!({"attention_bias": true, "mlp_bias": true}),
        json!({"rope_scaling": llama3}),
        json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ] {
        let place = Place::new(&changes);
        let output = place.quantize("out", &["--method", "rtn", "--zero-points"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (out, tokens) = (place.path("out"), place.path("eval.tokens"));
        let [folder, text] = [&out, &tokens].map(|path| path.to_str().unwrap());
        let eval = json_of(&["eval", folder, "--text", text, "--json"]);
        let ours = eval["perplexity"].as_f64().unwrap();
        // The file alone says the same.
        let file = out.join("model.gguf");
        let alone = place.path("alone.gguf");
        fs::copy(file, &alone).unwrap();
        let eval = json_of(&["eval", alone.to_str().unwrap(), "--text", text, "--json"]);
        let alone = eval["perplexity"].as_f64().unwrap();
        assert!((alone / ours - 1.0).abs() < 1e-6, "{changes}: {alone} {ours}");

        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf_perplexity.py");
        let python = Command::new("python3").arg(script).args([&out, &tokens]).output();
        let Ok(output) = python else {
            eprintln!("skipped: there is no python3");
            continue;
        };
        let printed = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => {
                let theirs: f64 = printed.trim().lines().last().unwrap().parse().unwrap();
                assert!((theirs / ours - 1.0).abs() < 1e-4, "{changes}: {theirs} {ours}");
                eprintln!("{changes}: {theirs} by transformers, {ours} here");
            }
            Some(3) => eprintln!("skipped: {}", printed.trim()),
            _ => panic!("{changes}: {printed}{said}"),
        }
    }
}
