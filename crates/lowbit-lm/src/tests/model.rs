use std::sync::Arc;

use lowbit::{Context, Linear, Mat};
use serde_json::json;

use super::{
    oracle,
    tiny::{Tiny, VOCAB},
};
use crate::{DenseLinear, KvCache, Model};

/// Longer than a block of query rows, and no multiple of it.
fn tokens() -> Vec<u32> {
    (0..45).map(|i| (i * 37 + 5) % VOCAB as u32).collect()
}

fn forward(model: &Model, ctx: &mut Context) -> Mat<f32> {
    model.forward(&tokens(), &mut KvCache::new(model.config()), ctx).unwrap()
}

fn with_threads(threads: usize) -> Context {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    Context::with_pool(Arc::new(pool))
}

#[test]
fn every_variant_computes_its_equations() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    for changes in [
        json!({}),
        json!({"tie_word_embeddings": false, "num_key_value_heads": 4}),
        json!({"num_key_value_heads": 1, "head_dim": 10}),
        json!({"attention_bias": true, "mlp_bias": true}),
        json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": false}),
        json!({"rope_scaling": llama3, "head_dim": 16}),
        json!({"num_attention_heads": 1, "num_key_value_heads": 1}),
    ] {
        let tiny = Tiny::new(changes.clone());
        let model = Model::load(&tiny.open().unwrap()).unwrap();
        let logits = forward(&model, &mut Context::new());
        let expected = oracle::logits(&tiny, &tokens());
        for (row, expected) in logits.as_ref().iter_rows().zip(&expected) {
            for (got, expected) in row.iter().zip(expected) {
                assert!((f64::from(*got) - expected).abs() < 2e-4, "{got} {expected} {changes}");
            }
        }
    }
}

#[test]
fn storage_does_not_change_the_model() {
    let mut tiny = Tiny::new(json!({"tie_word_embeddings": false}));
    let run =
        |tiny: &Tiny| forward(&Model::load(&tiny.open().unwrap()).unwrap(), &mut Context::new());
    let expected = run(&tiny);
    for (dtype, shards) in [("F16", 1), ("BF16", 1), ("F32", 3), ("BF16", 2)] {
        (tiny.dtype, tiny.shards) = (dtype, shards);
        assert_eq!(run(&tiny), expected, "{dtype}, {shards} shards");
    }
    let (config, tokenizer) = (tiny.config.to_string(), super::tiny::tokenizer().to_string());
    let (config, tokenizer) = (config.as_bytes(), tokenizer.as_bytes());
    let bytes = tiny.safetensors();
    let embedded = crate::Checkpoint::from_bytes("tiny", config, bytes, tokenizer).unwrap();
    assert_eq!(forward(&Model::load(&embedded).unwrap(), &mut Context::new()), expected);
}

#[test]
fn any_thread_count_gives_the_same_bits() {
    let model = Model::load(&Tiny::new(json!({})).open().unwrap()).unwrap();
    let expected = forward(&model, &mut Context::new());
    for threads in [1, 2, 5] {
        assert_eq!(forward(&model, &mut with_threads(threads)), expected);
    }
}

#[test]
fn decoding_with_the_cache_agrees_with_reading_at_once() {
    let model = Model::load(&Tiny::new(json!({})).open().unwrap()).unwrap();
    let ctx = &mut with_threads(2);
    let at_once = forward(&model, ctx);
    for pieces in [vec![1; 45], vec![33, 1, 11], vec![2, 40, 3]] {
        let mut cache = KvCache::new(model.config());
        let mut row = 0;
        for piece in pieces {
            let tokens = &tokens()[row..row + piece];
            let before = cache.len();
            let logits = model.forward(tokens, &mut cache, ctx).unwrap();
            cache.truncate(before);
            let last = model.forward_last(tokens, &mut cache, ctx).unwrap();
            row += piece;
            assert_eq!(cache.len(), row);
            for (x, y) in last.iter().zip(logits.as_ref().row(piece - 1).unwrap()) {
                assert!((x - y).abs() < 1e-4);
            }
            for (x, y) in last.iter().zip(at_once.as_ref().row(row - 1).unwrap()) {
                // the gemm crate sums in another order for another number of rows
                assert!((x - y).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn requests_that_make_no_sense_are_errors_and_leave_the_cache_alone() {
    let model = Model::load(&Tiny::new(json!({})).open().unwrap()).unwrap();
    let ctx = &mut Context::new();
    let mut cache = KvCache::new(model.config());
    model.forward(&tokens(), &mut cache, ctx).unwrap();
    let mut error = |tokens: &[u32]| {
        let error = model.forward(tokens, &mut cache, ctx).unwrap_err().to_string();
        assert_eq!(cache.len(), 45);
        error
    };
    assert_eq!(
        error(&[3; 4]),
        "a text of 49 tokens does not fit the model's context of 48: make it shorter"
    );
    assert_eq!(error(&[264]), "token 264 is outside the model's vocabulary of 264");
    assert_eq!(error(&[]), "no tokens: a model needs at least one");
    model.forward(&[3; 3], &mut cache, ctx).unwrap();

    let other = Tiny::new(json!({"num_hidden_layers": 1})).open().unwrap();
    let mut cache = KvCache::new(other.config());
    assert!(model.forward(&[3], &mut cache, ctx).is_err());
}

#[test]
fn linear_layers_can_be_swapped_and_the_rest_is_shared() {
    let checkpoint = Tiny::new(json!({"attention_bias": true})).open().unwrap();
    let model = Model::load(&checkpoint).unwrap();
    let mut names = Vec::new();
    let same = model
        .with_linears(&checkpoint, |layer| {
            names.push(layer.name);
            Ok(Arc::new(DenseLinear::new(layer.weight.as_ref(), layer.bias)?))
        })
        .unwrap();
    assert_eq!(names, checkpoint.linear_names());
    assert_eq!(names, same.linears().map(|(name, _)| name).collect::<Vec<_>>());
    assert_eq!((names.len(), names[0].as_str()), (14, "model.layers.0.self_attn.q_proj"));
    let ctx = &mut Context::new();
    assert_eq!(forward(&same, ctx), forward(&model, ctx));

    let twice = model
        .with_linears(&checkpoint, |mut layer| {
            layer.weight.data_mut().iter_mut().for_each(|w| *w *= 2.0);
            Ok(Arc::new(DenseLinear::new(layer.weight.as_ref(), layer.bias)?))
        })
        .unwrap();
    assert_ne!(forward(&twice, ctx), forward(&model, ctx));
}

#[test]
fn errors_of_layers_carry_their_names() {
    let checkpoint = Tiny::new(json!({})).open().unwrap();
    let refused = Model::load_with(&checkpoint, |layer| match layer.name.contains("1.mlp.up") {
        true => Err(lowbit::Error::Bits { bits: 9 }),
        false => Ok(Arc::new(DenseLinear::new(layer.weight.as_ref(), None)?)),
    });
    let error = refused.unwrap_err().to_string();
    assert_eq!(error, "model.layers.1.mlp.up_proj: codes of 9 bits: expected 1 to 8");

    let layer: Arc<dyn Linear> =
        Arc::new(DenseLinear::new(Mat::zeros(24, 24).as_ref(), None).unwrap());
    let error = Model::load_with(&checkpoint, |_| Ok(layer.clone())).unwrap_err().to_string();
    assert_eq!(
        error,
        "model.layers.0.self_attn.k_proj: expected a layer of 24 inputs and 12 outputs, got 24 and 24"
    );

    let model = Model::load(&checkpoint).unwrap();
    let other = Tiny::new(json!({"intermediate_size": 41})).open().unwrap();
    assert!(model.with_linears(&other, |_| Ok(layer.clone())).is_err());
}
