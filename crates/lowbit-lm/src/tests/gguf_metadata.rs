//! What is written into GGUF files beside the quantized layers, against values from the definitions.

use half::bf16;
use lowbit::formats::{Dtype, Tensor, gguf::Value};
use serde_json::{Value as Json, json};

use super::tiny::Tiny;
use crate::{
    Config,
    llama_gguf::{Metadata, Texts, metadata, to_gguf},
};

fn config(changes: Json) -> Config {
    let mut all = Tiny::new(json!({})).config;
    for (field, value) in changes.as_object().unwrap() {
        all[field] = value.clone();
    }
    Config::parse("config.json", all.to_string().as_bytes()).unwrap()
}

/// A byte-level BPE of seven tokens that splits digits one by one, in 8 places.
fn byte_level() -> Json {
    json!({
        "added_tokens": [
            {"id": 0, "content": "<eos>", "special": true},
            {"id": 5, "content": "<tool>", "special": false}
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}
        ]},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ]},
        "model": {"type": "BPE", "vocab": {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4},
            "merges": ["a b", "ab a"]}
    })
}

/// As llama2 has it: ▁, bytes, merges.
fn sentencepiece() -> Json {
    let mut vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 259, "\u{2581}": 260, "\u{2581}a": 261, "aa": 262});
    for byte in 0..256 {
        vocab[format!("<0x{byte:02X}>")] = (byte + 3).into();
    }
    json!({
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 1, "content": "<s>", "special": true},
            {"id": 2, "content": "</s>", "special": true},
            {"id": 263, "content": "\u{2581}\u{2581}x", "special": false}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}
        ]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ]},
        "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": vocab,
            "merges": [["\u{2581}", "a"], ["a", "a"]]}
    })
}

fn of(config: &Config, tokenizer: &Json, settings: &Json) -> crate::Result<Metadata> {
    let (tokenizer, settings) = (tokenizer.to_string(), settings.to_string());
    let texts = Texts {
        tokenizer: tokenizer.as_bytes(),
        tokenizer_config: Some(settings.as_bytes()),
        chat_template: None,
    };
    metadata("tiny", config, &texts)
}

fn get<'a>(metadata: &'a Metadata, key: &str) -> Option<&'a Value<'static>> {
    metadata.keys.iter().find(|(known, _)| known == key).map(|(_, value)| value)
}

fn list(metadata: &Metadata, key: &str) -> Vec<Value<'static>> {
    let array = get(metadata, key).unwrap().as_array().unwrap();
    array
        .iter()
        .map(|value| match value {
            Value::String(text) => Value::String(text.into_owned().into()),
            Value::I32(x) => Value::I32(x),
            Value::F32(x) => Value::F32(x),
            other => panic!("{other:?}"),
        })
        .collect()
}

fn texts(metadata: &Metadata, key: &str) -> Vec<String> {
    list(metadata, key).iter().map(|text| text.as_str().unwrap().to_string()).collect()
}

#[test]
fn the_architecture_is_that_of_the_class_whatever_biases_there_are() {
    for (changes, architecture) in [
        (json!({"attention_bias": true, "mlp_bias": true}), "llama"),
        (json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}), "llama"),
        (json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}), "qwen2"),
    ] {
        let metadata = of(&config(changes), &sentencepiece(), &json!({})).unwrap();
        assert_eq!(metadata.keys[0].0, "general.architecture");
        assert_eq!(metadata.keys[0].1, architecture.into());
        let key = format!("{architecture}.attention.head_count");
        assert_eq!(get(&metadata, &key), Some(&Value::U32(4)));
    }
    let qwen2 = json!({"architectures": ["Qwen2ForCausalLM"], "mlp_bias": true});
    let error = of(&config(qwen2), &sentencepiece(), &json!({})).unwrap_err().to_string();
    assert!(error.contains("qwen2 has no place for biases"), "{error}");
}

/// Row 2i + s of a head of 6 is row i + 3s.
#[test]
fn rows_and_biases_of_q_are_sorted_and_vectors_are_f32() {
    let name = "model.layers.0.self_attn.q_proj.bias";
    let bytes: Vec<u8> =
        (0..24).flat_map(|x| bf16::from_f32(x as f32).to_bits().to_le_bytes()).collect();
    let bias = Tensor::new(name, Dtype::Bf16, vec![24], bytes);
    let llama = config(json!({"attention_bias": true}));
    let sorted = to_gguf(&llama, bias.view()).unwrap().unwrap();
    assert_eq!(sorted.dtype, Dtype::F32);
    let first = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0];
    assert_eq!(sorted.view().to_f32().unwrap()[..8], first);
    let qwen2 = config(json!({"architectures": ["Qwen2ForCausalLM"]}));
    let kept = to_gguf(&qwen2, bias.view()).unwrap().unwrap();
    assert_eq!(kept.view().to_f32().unwrap()[..4], [0.0, 1.0, 2.0, 3.0]);
}

/// Factors by PyTorch, after the rule of Llama 3 in terms of wavelengths.
#[test]
fn the_factors_of_llama3_are_a_tensor() {
    let llama3 = |original: usize| {
        json!({"head_dim": 16, "rope_theta": 10000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original
        }})
    };
    for (original, expected) in [
        (32, [1.0, 3.299_538_980_499_763, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]),
        (64, [1.0, 1.293_975_845_169_675_7, 7.667_384_865_753_284, 8.0, 8.0, 8.0, 8.0, 8.0]),
    ] {
        let metadata = of(&config(llama3(original)), &sentencepiece(), &json!({})).unwrap();
        let [factors] = &metadata.tensors[..] else { panic!() };
        assert_eq!((factors.name.as_str(), &factors.shape[..]), ("rope_freqs.weight", &[8][..]));
        for (got, want) in factors.view().to_f32().unwrap().iter().zip(expected) {
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "{got} {want}");
        }
        assert!(get(&metadata, "llama.rope.scaling.type").is_none());
    }
    let mut qwen2 = llama3(32);
    qwen2["architectures"] = json!(["Qwen2ForCausalLM"]);
    assert!(of(&config(qwen2), &sentencepiece(), &json!({})).is_err());
}

#[test]
fn linear_and_yarn_are_keys() {
    let linear = json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}});
    let metadata = of(&config(linear), &sentencepiece(), &json!({})).unwrap();
    assert_eq!(get(&metadata, "llama.rope.scaling.type"), Some(&"linear".into()));
    assert_eq!(get(&metadata, "llama.rope.scaling.factor"), Some(&Value::F32(4.0)));
    assert!(metadata.tensors.is_empty());

    let yarn = |more: Json| {
        let mut scaling = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12
        });
        for (field, value) in more.as_object().unwrap() {
            scaling[field] = value.clone();
        }
        of(&config(json!({"rope_scaling": scaling})), &sentencepiece(), &json!({}))
    };
    let metadata = yarn(json!({"beta_fast": 16.0})).unwrap();
    for (key, value) in [
        ("type", "yarn".into()),
        ("factor", Value::F32(4.0)),
        ("original_context_length", Value::U32(12)),
        ("yarn_beta_fast", Value::F32(16.0)),
        ("yarn_beta_slow", Value::F32(1.0)),
    ] {
        assert_eq!(get(&metadata, &format!("llama.rope.scaling.{key}")), Some(&value), "{key}");
    }
    assert!(get(&metadata, "llama.rope.scaling.attn_factor").is_none());
    // 2 / (1 + 0.1 ln 4)
    let metadata = yarn(json!({"attention_factor": 2.0})).unwrap();
    let factor = get(&metadata, "llama.rope.scaling.attn_factor").unwrap().as_f64().unwrap();
    assert!((factor - 1.756_497_712_573_883_9).abs() < 1e-6, "{factor}");
    assert!(yarn(json!({"truncate": false})).unwrap_err().to_string().contains("truncate"));
}

#[test]
fn a_byte_level_tokenizer_keeps_its_merges_types_and_way_to_split() {
    let config = config(json!({"vocab_size": 8, "bos_token_id": 1, "eos_token_id": [2, 0]}));
    let settings = json!({
        "eos_token": {"content": "<eos>"}, "pad_token": "b", "unk_token": null,
        "chat_template": [
            {"name": "default", "template": "{{ x }}"}, {"name": "tools", "template": "{{ y }}"}
        ]
    });
    let metadata = of(&config, &byte_level(), &settings).unwrap();
    assert_eq!(metadata.substitutions, [""; 0]);
    assert_eq!(get(&metadata, "tokenizer.ggml.model"), Some(&"gpt2".into()));
    assert_eq!(get(&metadata, "tokenizer.ggml.pre"), Some(&"smollm".into()));
    let tokens = ["<eos>", "a", "b", "ab", "aba", "<tool>", "[PAD6]", "[PAD7]"];
    assert_eq!(texts(&metadata, "tokenizer.ggml.tokens"), tokens);
    let kinds = [3, 1, 1, 1, 1, 4, 5, 5].map(Value::I32);
    assert_eq!(list(&metadata, "tokenizer.ggml.token_type"), kinds);
    assert_eq!(texts(&metadata, "tokenizer.ggml.merges"), ["a b", "ab a"]);
    // The end that the tokenizer names comes first.
    for (key, id) in [("bos", 1), ("eos", 0), ("eot", 2), ("padding", 2)] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        assert_eq!(get(&metadata, &key), Some(&Value::U32(id)), "{key}");
    }
    assert_eq!(get(&metadata, "tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    assert_eq!(get(&metadata, "tokenizer.ggml.add_eos_token"), Some(&Value::Bool(false)));
    assert_eq!(get(&metadata, "tokenizer.chat_template"), Some(&"{{ x }}".into()));
    assert_eq!(get(&metadata, "tokenizer.chat_template.tools"), Some(&"{{ y }}".into()));
    assert_eq!(texts(&metadata, "tokenizer.chat_templates"), ["tools"]);
}

#[test]
fn what_llama_cpp_does_otherwise_is_said() {
    let config = config(json!({"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 0}));
    let mut tokenizer = byte_level();
    tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
    tokenizer["normalizer"] = json!({"type": "NFC"});
    tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = "b".into();
    tokenizer["model"]["merges"] = json!([]);
    tokenizer["model"]["vocab"]["c"] = 9.into();
    let metadata = of(&config, &tokenizer, &json!({})).unwrap();
    assert_eq!(get(&metadata, "tokenizer.ggml.pre"), Some(&"default".into()));
    assert_eq!(texts(&metadata, "tokenizer.ggml.merges"), [""; 0]);
    assert_eq!(get(&metadata, "tokenizer.ggml.add_bos_token"), Some(&Value::Bool(false)));
    let said = metadata.substitutions.join("\n");
    for word in ["Whitespace", "NFC", "b is not added", "vocab_size, 8, are left out: c"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(metadata.substitutions.len(), 4);
}

#[test]
fn a_tokenizer_of_sentencepiece_has_scores_by_the_rank_of_merges() {
    let config = config(json!({}));
    let metadata = of(&config, &sentencepiece(), &json!({})).unwrap();
    assert_eq!(metadata.substitutions, [""; 0]);
    assert_eq!(get(&metadata, "tokenizer.ggml.model"), Some(&"llama".into()));
    assert_eq!(get(&metadata, "tokenizer.ggml.add_space_prefix"), Some(&Value::Bool(true)));
    assert_eq!(get(&metadata, "tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    assert_eq!(get(&metadata, "tokenizer.ggml.unknown_token_id"), Some(&Value::U32(0)));
    let kinds = list(&metadata, "tokenizer.ggml.token_type");
    assert_eq!(kinds[..4], [2, 3, 3, 6].map(Value::I32));
    assert_eq!(kinds[258..], [6, 1, 1, 1, 1, 4].map(Value::I32));
    let scores = list(&metadata, "tokenizer.ggml.scores");
    assert_eq!(scores[259..], [-2.0, -2.0, 0.0, -1.0, -2.0].map(Value::F32));
    // Looked for in texts, in which spaces are spaces.
    assert_eq!(texts(&metadata, "tokenizer.ggml.tokens")[263], "  x");

    let mut without = sentencepiece();
    without["normalizer"] =
        json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let metadata = of(&config, &without, &json!({})).unwrap();
    assert_eq!(get(&metadata, "tokenizer.ggml.add_space_prefix"), Some(&Value::Bool(false)));
    without["normalizer"] = json!({"type": "Lowercase"});
    let metadata = of(&config, &without, &json!({})).unwrap();
    assert!(metadata.substitutions[0].contains("Lowercase"), "{:?}", metadata.substitutions);
}

#[test]
fn other_kinds_of_tokenizers_are_refused_by_name() {
    for (model, word) in [
        (json!({"type": "Unigram", "vocab": [["a", -1.0]]}), "Unigram"),
        (json!({"type": "WordPiece", "vocab": {"a": 0}}), "WordPiece"),
        (json!({"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}), "merges"),
        (json!({"type": "BPE", "vocab": {"a": 0, "[PAD1]": 2}, "merges": []}), "[PAD1]"),
    ] {
        let error = of(&config(json!({})), &json!({"model": model}), &json!({})).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}
