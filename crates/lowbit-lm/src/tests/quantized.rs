//! Models whose layers are stored in several ways: they compute what their dequantized weights do.

use std::fs;

use lowbit::{
    Context, Mat,
    formats::{Dtype, Tensor, write_safetensors},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::tiny::Tiny;
use crate::{Checkpoint, KvCache, Model};

const BLOCK: &str = "model.layers.0";

/// A model, tensor by tensor as it is stored, and the same in floats.
struct Stored {
    tiny: Tiny,
    tensors: Vec<Tensor>,
}

fn code(r: usize, c: usize) -> u32 {
    (r * 7 + c * 5 + r * c) as u32 % 16
}

impl Stored {
    fn new(changes: Value) -> Self {
        let mut all = json!({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let tiny = Tiny::new(all);
        let floats = tiny.tensors.iter();
        let tensors = floats.map(|(name, (shape, x))| Tensor::f32(name.clone(), shape.clone(), x));
        Self { tensors: tensors.collect(), tiny }
    }

    /// Takes the weight of `layer` out, and gives it new numbers in the model of floats.
    fn replace(&mut self, layer: &str, weight: impl Fn(usize, usize) -> f32) -> [usize; 2] {
        let name = format!("{layer}.weight");
        self.tensors.retain(|tensor| tensor.name != name);
        let (shape, data) = self.tiny.tensors.get_mut(&name).unwrap();
        let [n, k] = shape[..] else { panic!("{name} is no matrix") };
        *data = (0..n * k).map(|i| weight(i / k, i % k)).collect();
        [n, k]
    }

    fn add(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.push(Tensor::new(name, dtype, shape.into(), bytes));
    }

    /// FP8 of one scale: codes 0x30 … 0x3f are 0.5 … 1.875 by their definition.
    fn fp8(&mut self, layer: &str, scale: &str) {
        let value = |code: u32| (1.0 + (code % 8) as f32 / 8.0) * if code < 8 { 0.5 } else { 1.0 };
        let sign = |r: usize, c: usize| if (r + c).is_multiple_of(3) { -0.25 } else { 0.25 };
        let [n, k] = self.replace(layer, |r, c| value(code(r, c)) * sign(r, c));
        let byte = |i: usize| {
            let (r, c) = (i / k, i % k);
            0x30 | code(r, c) as u8 | if (r + c).is_multiple_of(3) { 0x80 } else { 0 }
        };
        self.add(format!("{layer}.weight"), Dtype::F8E4M3, &[n, k], (0..n * k).map(byte).collect());
        self.tensors.push(Tensor::f32(format!("{layer}.{scale}"), vec![1], &[0.25]));
    }

    /// GPTQ of 4 bits, symmetric, one group, with a bias of zeros.
    fn gptq(&mut self, layer: &str) {
        let [n, k] = self.replace(layer, |r, c| (code(r, c) as f32 - 8.0) / 16.0);
        let mut words = vec![0_u32; k / 8 * n];
        for r in 0..n {
            for c in 0..k {
                words[c / 8 * n + r] |= code(r, c) << (c % 8 * 4);
            }
        }
        let words = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.add(format!("{layer}.qweight"), Dtype::I32, &[k / 8, n], words);
        self.add(format!("{layer}.qzeros"), Dtype::I32, &[1, n / 8], vec![0x77; n / 2]);
        self.tensors.push(Tensor::f32(format!("{layer}.scales"), vec![1, n], &vec![0.0625; n]));
        self.tensors.push(Tensor::f32(format!("{layer}.bias"), vec![n], &vec![0.0; n]));
    }

    /// MLX of 4 bits, one group of 32.
    fn mlx(&mut self, layer: &str) {
        let bias = |r: usize| r as f32 / 128.0 - 0.5;
        let [n, k] = self.replace(layer, |r, c| code(r, c) as f32 / 32.0 + bias(r));
        let byte = |i: usize| {
            let (r, c) = (2 * i / k, 2 * i % k);
            (code(r, c) | code(r, c + 1) << 4) as u8
        };
        let words = (0..n * k / 2).map(byte).collect();
        self.add(format!("{layer}.weight"), Dtype::Other("U32"), &[n, k / 8], words);
        let biases: Vec<_> = (0..n).map(bias).collect();
        self.tensors.push(Tensor::f32(format!("{layer}.scales"), vec![n, 1], &vec![0.03125; n]));
        self.tensors.push(Tensor::f32(format!("{layer}.biases"), vec![n, 1], &biases));
    }

    fn folder(&self, config: &Value) -> TempDir {
        let folder = self.tiny.folder();
        let mut all = self.tiny.config.clone();
        all.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        fs::write(folder.path().join("config.json"), all.to_string()).unwrap();
        let views: Vec<_> = self.tensors.iter().map(Tensor::view).collect();
        let file = fs::File::create(folder.path().join("model.safetensors")).unwrap();
        write_safetensors(file, &[], &views).unwrap();
        folder
    }

    fn error(&self, config: &Value) -> String {
        let folder = self.folder(config);
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        error.replace(&folder.path().display().to_string(), "tiny")
    }

    /// Opens the model, which must compute what that of floats does.
    fn check(&self, folder: &TempDir) -> Checkpoint {
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let (got, right) = (logits(&checkpoint), logits(&self.tiny.open().unwrap()));
        for (got, right) in got.data().iter().zip(right.data()) {
            assert!((got - right).abs() <= 1e-3 * right.abs().max(1.0), "{got}, right {right}");
        }
        checkpoint
    }
}

fn logits(checkpoint: &Checkpoint) -> Mat<f32> {
    let model = Model::load(checkpoint).unwrap();
    let mut cache = KvCache::new(model.config());
    model.forward(&[1, 70, 200, 5, 9], &mut cache, &mut Context::new()).unwrap()
}

fn config(config: Value) -> Value {
    json!({ "quantization_config": config })
}

#[test]
fn a_model_that_mixes_conventions_computes_what_its_weights_say() {
    let mut stored = Stored::new(json!({"tie_word_embeddings": false}));
    stored.fp8(&format!("{BLOCK}.self_attn.q_proj"), "weight_scale");
    stored.fp8(&format!("{BLOCK}.mlp.up_proj"), "scale");
    stored.gptq(&format!("{BLOCK}.self_attn.o_proj"));
    stored.gptq("lm_head");
    for scale in ["self_attn.k_scale", "self_attn.q_proj.q_scale"] {
        stored.tensors.push(Tensor::f32(format!("{BLOCK}.{scale}"), vec![1], &[0.5]));
    }
    let gptq = json!({"quant_method": "gptq", "bits": 4, "sym": true, "lm_head": true});
    let checkpoint = stored.check(&stored.folder(&config(gptq)));
    assert_eq!(
        checkpoint.notes(),
        ["the KV cache stays f32: the file's scales for it are not used"]
    );
    // A bias of zeros is none.
    let layer = checkpoint.quantized(&format!("{BLOCK}.self_attn.o_proj")).unwrap().unwrap();
    assert_eq!(layer.bias(), None);

    // Without any configuration, and with one beside config.json.
    let folder = stored.folder(&json!({"quantization_config": null}));
    stored.check(&folder);
    let other = json!({"bits": 4, "group_size": 32, "desc_act": false, "sym": true});
    fs::write(folder.path().join("quantize_config.json"), other.to_string()).unwrap();
    stored.check(&folder);
    fs::write(folder.path().join("quantize_config.json"), r#"{"bits": 5, "sym": true}"#).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert_eq!(error, "quantization_config: bits of gptq is 5, expected 2 or 3 or 4 or 8");
}

#[test]
fn embeddings_of_mlx_are_the_head_too() {
    for tied in [true, false] {
        let mut stored = Stored::new(json!({"tie_word_embeddings": tied}));
        stored.mlx("model.embed_tokens");
        stored.mlx(&format!("{BLOCK}.mlp.down_proj"));
        if !tied {
            stored.mlx("lm_head");
        }
        let folder = stored.folder(&json!({"quantization": {"group_size": 32, "bits": 4}}));
        let checkpoint = stored.check(&folder);
        let embedding = &stored.tiny.tensors["model.embed_tokens.weight"].1;
        let rows = [&embedding[7 * 32..8 * 32], &embedding[263 * 32..264 * 32]].concat();
        assert_eq!(checkpoint.embed(&[7, 263]).unwrap(), rows);
        assert!(checkpoint.embed(&[264]).is_err());
    }
}

#[test]
fn what_might_mean_other_numbers_is_an_error_that_names_it() {
    let q = format!("{BLOCK}.self_attn.q_proj");
    let fp8 = config(json!({"quant_method": "fp8"}));
    let gptq = config(json!({"quant_method": "gptq", "bits": 4, "sym": true}));

    let floats = Stored::new(json!({}));
    assert_eq!(
        floats.error(&gptq),
        "tiny: the quantization_config says gptq, but no layer is quantized: take it out of config.json if \
         the weights are right as they are"
    );

    let mut no_scale = Stored::new(json!({}));
    no_scale.fp8(&q, "scales_of_ours");
    assert_eq!(
        no_scale.error(&fp8),
        format!(
            "tiny/model.safetensors: tensor {q}.weight: it is F8_E4M3, but its scale is not there under a \
             known name; beside it lies scales_of_ours"
        )
    );

    let mut bias = Stored::new(json!({}));
    bias.gptq(&q);
    bias.tensors.last_mut().unwrap().bytes[3] = 0x3f;
    assert_eq!(
        bias.error(&gptq),
        format!(
            "tiny: tensor {q}.bias is not zero, but config.json announces no bias there: set attention_bias \
             or mlp_bias if the model has one"
        )
    );

    let mut more = Stored::new(json!({}));
    more.gptq(&q);
    more.tensors.push(Tensor::f32(format!("{BLOCK}.mlp.up_proj.weight_scale"), vec![1], &[0.5]));
    assert!(more.error(&gptq).contains("up_proj.weight_scale: it lies beside weights in floats"));
    more.tensors.last_mut().unwrap().name = format!("{q}.pre_scale");
    assert!(more.error(&gptq).contains("q_proj.pre_scale: it lies beside the tensors of gptq"));
    more.tensors.last_mut().unwrap().name = format!("{BLOCK}.mlp.k_scale");
    assert!(more.error(&gptq).contains("mlp.k_scale has no place in this architecture"));
}
