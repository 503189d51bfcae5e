use std::fs;

use serde_json::json;

use super::tiny::Tiny;
use crate::Checkpoint;

/// The message for a model that `change` has spoiled, with the folder's name taken out.
fn error(change: impl FnOnce(&mut Tiny)) -> String {
    let mut tiny = Tiny::new(json!({}));
    change(&mut tiny);
    let folder = tiny.folder();
    message(&folder)
}

fn message(folder: &tempfile::TempDir) -> String {
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error.replace(&folder.path().display().to_string(), "tiny")
}

#[test]
fn each_missing_file_is_named() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Tiny::new(json!({})).folder();
        fs::remove_file(folder.path().join(file)).unwrap();
        let error = message(&folder);
        assert!(error.starts_with(&format!("tiny/{file}: ")), "{error}");
        assert!(error.ends_with(
            "a model folder has config.json, tokenizer.json and model.safetensors, or a GGUF file"
        ));
    }
    let mut tiny = Tiny::new(json!({}));
    tiny.shards = 2;
    let folder = tiny.folder();
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    let error = message(&folder);
    assert!(error.starts_with("tiny/model-00002-of-00002.safetensors: "), "{error}");
}

#[test]
fn a_truncated_file_is_an_error_at_any_length() {
    let tiny = Tiny::new(json!({}));
    let (folder, bytes) = (tiny.folder(), tiny.safetensors());
    for len in [0, 1, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(folder.path().join("model.safetensors"), &bytes[..len]).unwrap();
        let error = message(&folder);
        assert!(error.starts_with("tiny/model.safetensors: expected "), "{error}");
        let end = format!("got {len}: the file is truncated, copy or download it again");
        assert!(error.ends_with(&end), "{error}");
    }
}

#[test]
fn weights_that_do_not_fit_are_named() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    let wrong = error(|tiny| tiny.tensors.get_mut(Q).unwrap().0 = vec![12, 48]);
    assert_eq!(
        wrong,
        format!(
            "tiny/model.safetensors: tensor {Q}: expected shape [24, 24], got [12, 48]: it does not belong to this config.json"
        )
    );
    let missing = error(|tiny| drop(tiny.tensors.remove(Q)));
    assert_eq!(missing, format!("tiny/model.safetensors: tensor {Q} is missing"));
    let nan = error(|tiny| tiny.tensors.get_mut(Q).unwrap().1[24 * 3 + 5] = f32::NAN);
    assert_eq!(
        nan,
        format!(
            "tiny/model.safetensors: tensor {Q} is not finite at [3, 5]: the checkpoint is damaged, convert or download it again"
        )
    );
    let infinite = error(|tiny| {
        tiny.dtype = "BF16";
        tiny.tensors.get_mut("model.norm.weight").unwrap().1[7] = f32::INFINITY;
    });
    assert!(infinite.contains("tensor model.norm.weight is not finite at [7]"), "{infinite}");
    let integers = error(|tiny| tiny.dtype = "I32");
    assert_eq!(
        integers,
        "tiny/model.safetensors: tensor model.embed_tokens.weight is I32, expected F32, F16 or BF16: convert the checkpoint"
    );
    let unknown = error(|tiny| tiny.dtype = "F31");
    assert_eq!(
        unknown,
        r#"tiny/model.safetensors: tensor model.embed_tokens.weight: unknown dtype "F31", expected F32, F16 or BF16: convert the checkpoint"#
    );
}

#[test]
fn tensors_without_a_place_are_named_unless_they_are_redundant() {
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let error = error(|tiny| drop(tiny.tensors.insert(bias.into(), (vec![24], vec![0.0; 24]))));
    assert_eq!(
        error,
        format!(
            "tiny/model.safetensors: tensor {bias} has no place in this architecture: is config.json of another model?"
        )
    );
    let mut tiny = Tiny::new(json!({}));
    for name in ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"] {
        tiny.tensors.insert(name.into(), (vec![1], vec![0.0]));
    }
    tiny.open().unwrap();
}

#[test]
fn other_architectures_and_broken_json_are_errors() {
    let gpt2 = error(|tiny| tiny.config["architectures"] = json!(["GPT2LMHeadModel"]));
    assert!(gpt2.starts_with("tiny/config.json: architectures: expected Llama"), "{gpt2}");
    let folder = Tiny::new(json!({})).folder();
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let tokenizer = message(&folder);
    assert!(tokenizer.starts_with("tiny/tokenizer.json: expected a tokenizer, but"), "{tokenizer}");
}
