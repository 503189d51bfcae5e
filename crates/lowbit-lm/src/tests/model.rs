use std::sync::Arc;

use lowbit::{
    ActivationScheme, Context, Granularity, Linear, Mat, Outliers, QLinear, QMatrix, QuantScheme,
    QuantType, dtypes::Format,
};
use serde_json::json;

use super::{
    oracle,
    tiny::{Tiny, VOCAB},
};
use crate::{DenseLinear, KvCache, Model, Unpacked, pack};

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
        json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
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

/// Logits 0, 44, 88, … behind the last token, of LlamaForCausalLM in transformers 5.24 with the same weights
/// in f64.
#[test]
fn stretched_positions_give_the_logits_of_transformers() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12});
    let (linear, dynamic) =
        (json!({"type": "linear", "factor": 4.0}), json!({"type": "dynamic", "factor": 2.0}));
    let plain = [-0.1128091, -0.2515203, 0.2950936, -0.0208321, -0.223577, -0.863445];
    for (scaling, expected) in [
        (json!(null), plain),
        (linear, [-0.7278069, 1.0911846, 2.3826334, 0.9195686, 0.2962586, 1.1382776]),
        (yarn, [0.2194752, 0.9866732, 2.7320602, 1.3000904, -0.2525676, 0.8920247]),
        (dynamic, plain),
    ] {
        for field in ["rope_scaling", "rope_parameters"] {
            let tiny = Tiny::new(json!({field: scaling, "head_dim": 16}));
            let logits = forward(&Model::load(&tiny.open().unwrap()).unwrap(), &mut Context::new());
            let last = logits.as_ref().row(44).unwrap();
            for (got, expected) in last.iter().step_by(44).zip(expected) {
                assert!((got - expected).abs() < 2e-4, "{scaling} {got} {expected}");
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
fn a_layer_that_no_kernel_takes_is_computed_by_the_reference_and_listed() {
    let checkpoint = Tiny::new(json!({})).open().unwrap();
    let model = Model::load(&checkpoint).unwrap();
    assert_eq!(model.unpacked(), []);
    let fp8 = QuantScheme::levels(QuantType::Float(Format::F8E4M3), Granularity::PerChannel);
    let quantize = |w: &Mat<f32>, activation| {
        QLinear::new(QMatrix::quantize(w.as_ref(), fp8).unwrap()).with_activation(activation)
    };
    for (activation, outliers) in [
        (Some(ActivationScheme::INT8_PER_TOKEN), None),
        (None, Some(Outliers::Threshold(2.0))), // by its weights in f32, in another order
    ] {
        let of = |w: &Mat<f32>| quantize(w, activation).with_outliers(outliers.clone()).unwrap();
        let make = |reference: bool| {
            model.with_linears(&checkpoint, |layer| {
                let is_up = layer.name.ends_with(".mlp.up_proj");
                let q = of(&layer.weight);
                Ok(match (is_up, reference) {
                    (true, true) => Arc::new(q),
                    (true, false) => pack(&q)?,
                    (false, _) => pack(&quantize(&layer.weight, None))?,
                })
            })
        };
        let (packed, reference) = (make(false).unwrap(), make(true).unwrap());
        let unpacked = packed.unpacked();
        let names: Vec<_> = unpacked.iter().map(|one| one.layer.as_str()).collect();
        assert_eq!(names, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]);
        let sentences = Unpacked::sentences(&unpacked);
        assert_eq!(sentences.len(), 1);
        let start =
            "no kernel computes model.layers.0.mlp.up_proj and 1 other layer, the reference";
        assert!(sentences[0].starts_with(start), "{}", sentences[0]);
        assert_eq!(reference.unpacked(), []);
        let ctx = &mut Context::new();
        let (got, expected) = (forward(&packed, ctx), forward(&reference, ctx));
        match activation {
            Some(_) => assert_eq!(got, expected),
            None => {
                let pairs = got.data().iter().zip(expected.data());
                assert!(pairs.into_iter().all(|(x, y)| (x - y).abs() < 1e-4));
            }
        }
    }
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
