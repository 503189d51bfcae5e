//! Layers as programs of several kinds store them, with their configurations: the weights that they mean,
//! by arithmetic written out here, or an error that names what is not known.

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Mat, MatRef, QLinear, Transform, f16,
};
use lowbit_dtypes::Format;
use lowbit_formats::{
    Dtype, Tensor,
    conventions::{QuantizationConfig, Stored},
};
use serde_json::{Value, json};

/// Layers of 8 outputs and 32 inputs in groups of 16.
const N: usize = 8;
const K: usize = 32;
const GROUP: usize = 16;
const LAYER: &str = "model.layers.0.mlp.down_proj";

fn tensor(part: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    Tensor::new(format!("{LAYER}.{part}"), dtype, shape.into(), bytes)
}

fn floats(part: &str, shape: &[usize], numbers: &[f32]) -> Tensor {
    Tensor::f32(format!("{LAYER}.{part}"), shape.into(), numbers)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A code of `bits` bits at (r, c).
fn code(r: usize, c: usize, bits: u32) -> u32 {
    (r * 7 + c * 5 + r * c) as u32 % (1 << bits)
}

/// The scale of group g of row r: a number that every format has.
fn scale(r: usize, g: usize) -> f32 {
    (1 + r + 2 * g) as f32 / 64.0
}

fn scales(groups: usize) -> Vec<f32> {
    (0..N * groups).map(|i| scale(i / groups, i % groups)).collect()
}

/// Codes along a row in 32-bit words, least significant first.
fn rows(bits: u32) -> Vec<u32> {
    let mut all = Vec::new();
    for r in 0..N {
        let mut stream = vec![0_u32; K * bits as usize / 32];
        for bit in 0..K * bits as usize {
            let value = code(r, bit / bits as usize, bits) >> (bit % bits as usize) & 1;
            stream[bit / 32] |= value << (bit % 32);
        }
        all.extend(stream);
    }
    all
}

fn parse(config: &Value) -> QuantizationConfig {
    QuantizationConfig::parse(config).unwrap()
}

fn stored(config: &Value, tensors: &Vec<Tensor>) -> Stored {
    parse(config).read(tensors, LAYER).unwrap().unwrap()
}

fn weights(layer: &QLinear) -> Mat<f32> {
    layer.effective_weight().unwrap()
}

fn error(config: &Value, tensors: &Vec<Tensor>) -> String {
    match QuantizationConfig::parse(config) {
        Ok(config) => config.read(tensors, LAYER).unwrap_err().to_string(),
        Err(e) => e.to_string(),
    }
}

fn check(config: &Value, tensors: &Vec<Tensor>, expected: impl Fn(usize, usize) -> f32) -> Stored {
    let stored = stored(config, tensors);
    let w = weights(&stored.layer);
    assert_eq!((w.rows(), w.cols()), (N, K));
    for r in 0..N {
        for c in 0..K {
            let (got, expected) = (w.data()[r * K + c], expected(r, c));
            assert!(
                (got - expected).abs() <= 1e-6,
                "{config}: ({r}, {c}): {got}, right {expected}"
            );
        }
    }
    stored
}

/// 4 bits packed by compressed-tensors, `w = scale · (code − 8)`.
fn packed() -> Vec<Tensor> {
    vec![
        tensor("weight_packed", Dtype::I32, &[N, K / 8], words(&rows(4))),
        floats("weight_scale", &[N, K / GROUP], &scales(K / GROUP)),
        tensor(
            "weight_shape",
            Dtype::I64,
            &[2],
            [N, K].map(|n| n as u64).map(u64::to_le_bytes).concat(),
        ),
    ]
}

fn packed_weight(r: usize, c: usize) -> f32 {
    scale(r, c / GROUP) * (code(r, c, 4) as f32 - 8.0)
}

fn group(format: &str, weights: Value, input: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": format,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": weights, "input_activations": input
        }}
    })
}

fn int4() -> Value {
    json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16})
}

fn int8_tensors(groups: usize) -> Vec<Tensor> {
    let codes = (0..N * K).map(|i| (code(i / K, i % K, 8) as i32 - 128) as u8).collect();
    vec![
        tensor("weight", Dtype::I8, &[N, K], codes),
        floats("weight_scale", &[N, groups], &scales(groups)),
    ]
}

fn fp8_tensors(scale_name: &str, shape: &[usize], scales: &[f32]) -> Vec<Tensor> {
    let codes = (0..N * K).map(|i| code(i / K, i % K, 7) as u8 % 0x7f).collect();
    vec![tensor("weight", Dtype::F8E4M3, &[N, K], codes), floats(scale_name, shape, scales)]
}

fn fp8_weight(r: usize, c: usize) -> f32 {
    // E4M3 by its definition: 4 bits of exponent, 3 of fraction, no sign here.
    let code = code(r, c, 7) % 0x7f;
    let (exponent, fraction) = ((code >> 3) as i32, (code & 7) as f32);
    match exponent {
        0 => fraction / 8.0 * 2.0_f32.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2.0_f32.powi(exponent - 7),
    }
}

/// 4 bits of GPTQ, with zeros as they are stored.
fn gptq(zero: impl Fn(usize, usize) -> u32) -> Vec<Tensor> {
    let groups = K / GROUP;
    let mut qweight = vec![0_u32; K / 8 * N];
    let mut qzeros = vec![0_u32; groups * N / 8];
    for r in 0..N {
        for c in 0..K {
            qweight[c / 8 * N + r] |= code(r, c, 4) << (c % 8 * 4);
        }
        for g in 0..groups {
            qzeros[g * N / 8 + r / 8] |= zero(r, g) << (r % 8 * 4);
        }
    }
    let scales: Vec<u8> =
        (0..groups * N).flat_map(|i| f16::from_f32(scale(i % N, i / N)).to_le_bytes()).collect();
    vec![
        tensor("qweight", Dtype::I32, &[K / 8, N], words(&qweight)),
        tensor("qzeros", Dtype::I32, &[groups, N / 8], words(&qzeros)),
        tensor("scales", Dtype::F16, &[groups, N], scales),
    ]
}

#[test]
fn groups_that_activation_order_scattered_are_used_beside_int8() {
    let mut tensors = int8_tensors(2);
    // Odd features in group 1.
    let g_idx: Vec<u32> = (0..K as u32).map(|c| c % 2).collect();
    tensors.push(tensor("weight_g_idx", Dtype::I32, &[K], words(&g_idx)));
    let weights =
        json!({"num_bits": 8, "strategy": "group", "group_size": 16, "actorder": "group"});
    let config = group("int-quantized", weights, Value::Null);
    check(&config, &tensors, |r, c| scale(r, c % 2) * (code(r, c, 8) as f32 - 128.0));

    tensors.pop();
    let error = error(&config, &tensors);
    assert_eq!(
        error,
        format!(
            "quantization_config: it speaks of the tensor {LAYER}.weight_g_idx, which is not there"
        )
    );
}

#[test]
fn every_layer_is_read_by_its_own_tensors_whatever_the_others_are() {
    let ct = group("pack-quantized", int4(), Value::Null);
    let fp8 = json!({"quant_method": "fp8", "activation_scheme": "dynamic"});
    for config in [&ct, &fp8, &json!({"quant_method": "awq", "bits": 4})] {
        check(config, &packed(), packed_weight);
        let one = check(config, &fp8_tensors("weight_scale", &[1], &[0.5]), |r, c| {
            fp8_weight(r, c) * 0.5
        });
        assert_eq!(one.convention.name(), "fp8");
    }
}

#[test]
fn the_scale_of_fp8_is_found_under_every_name_it_has() {
    let config = json!({"quant_method": "fp8"});
    for name in ["weight_scale", "weight_scale_inv", "scale"] {
        check(&config, &fp8_tensors(name, &[N, 1], &scales(1)), |r, c| {
            fp8_weight(r, c) * scale(r, 0)
        });
    }
    // Powers of two in blocks: 2^(126 − 127) and so on.
    let mut powers = fp8_tensors("weight_scale_inv", &[1], &[0.0]);
    powers[1] = tensor("weight_scale_inv", Dtype::F8E8M0, &[2, 2], vec![126, 127, 128, 129]);
    let blocks = json!({"quant_method": "fp8", "weight_block_size": [4, 16]});
    check(&blocks, &powers, |r, c| fp8_weight(r, c) * [0.5, 1.0, 2.0, 4.0][r / 4 * 2 + c / 16]);
    // In groups along the row.
    check(&config, &fp8_tensors("weight_scale", &[N, 2], &scales(2)), |r, c| {
        fp8_weight(r, c) * scale(r, c / 16)
    });
    let divided = json!({"quant_method": "fp8", "weight_scale_semantics": "inverse",
                         "weight_block_size": [4, 16]});
    let blocks = [1.0, 2.0, 4.0, 8.0];
    check(&divided, &fp8_tensors("weight_scale_inv", &[2, 2], &blocks), |r, c| {
        fp8_weight(r, c) / blocks[r / 4 * 2 + c / 16]
    });
}

#[test]
fn codes_without_a_scale_are_no_weights() {
    let config = json!({"quant_method": "fp8"});
    let tensors = fp8_tensors("weight_scale_of_ours", &[1], &[0.5]);
    assert_eq!(
        error(&config, &tensors),
        format!(
            "memory: tensor {LAYER}.weight: it is F8_E4M3, but its scale is not there under a known name; \
             beside it lies weight_scale_of_ours"
        )
    );
    let both =
        [fp8_tensors("weight_scale", &[1], &[0.5]), vec![floats("scale", &[1], &[2.0])]].concat();
    assert!(error(&config, &both).contains("it lies beside the tensors of fp8"));
    for dtype in [Dtype::I8, Dtype::U8, Dtype::F8E5M2] {
        let alone = vec![tensor("weight", dtype, &[N, K], vec![1; N * K])];
        let expected = format!(
            "memory: tensor {LAYER}.weight is {dtype}, expected F32, F16 or BF16: convert the checkpoint"
        );
        assert_eq!(error(&config, &alone), expected);
    }
    let mut nan = fp8_tensors("weight_scale", &[1], &[0.5]);
    nan[0].bytes[K + 3] = 0xff;
    assert!(error(&config, &nan).ends_with("it is not finite at row 1, column 3"));
    // A GPTQ layer without its scales.
    let mut parts = gptq(|_, _| 7);
    parts.pop();
    let error = error(&config, &parts);
    assert!(error.contains("stored in no known way: of it there is qweight, qzeros"), "{error}");
}

#[test]
fn a_tensor_beside_a_layer_is_used_or_an_error_that_names_it() {
    let ct = group("pack-quantized", int4(), Value::Null);
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "FP8"});
    let gptq_config = json!({"quant_method": "gptq", "bits": 4, "sym": true});
    let fp8 = fp8_tensors("weight_scale", &[1], &[0.5]);
    for (config, tensors, part) in [
        (&ct, packed(), "input_scale"),
        (&ct, packed(), "output_scale"),
        (&ct, packed(), "weight_global_scale"),
        (&modelopt, fp8.clone(), "output_scale"),
        (&modelopt, fp8.clone(), "smoother.scale"),
        (&gptq_config, gptq(|_, _| 7), "channel_scale"),
        (&gptq_config, gptq(|_, _| 7), "lora_A"),
    ] {
        let mut more = tensors.clone();
        more.push(floats(part, &[K], &[1.5; K]));
        let error = error(config, &more);
        let start = format!("memory: tensor {LAYER}.{part}: it lies beside the tensors of ");
        assert!(error.starts_with(&start), "{error}");
    }
    // A zero of 0 and groups that are unset change nothing; others would.
    for (part, dtype, harmless) in
        [("weight_zero_point", Dtype::I8, 0_u8), ("weight_g_idx", Dtype::I32, 0xff)]
    {
        let mut more = fp8.clone();
        more.push(tensor(part, dtype, &[4 / dtype.block().unwrap().1], vec![harmless; 4]));
        check(&modelopt, &more, |r, c| fp8_weight(r, c) * 0.5);
        more.last_mut().unwrap().bytes[0] = 3;
        assert!(error(&modelopt, &more).contains(part));
    }
}

#[test]
fn the_scale_that_modelopt_multiplies_inputs_with_is_used() {
    let factors: Vec<f32> = (0..K).map(|c| (c + 1) as f32 / 8.0).collect();
    let mut tensors = fp8_tensors("weight_scale", &[1], &[0.5]);
    tensors.push(floats("pre_quant_scale", &[K], &factors));
    let config = json!({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}});
    check(&config, &tensors, |r, c| fp8_weight(r, c) * 0.5 * factors[c]);
}

#[test]
fn scales_of_inputs_in_floats_and_of_a_cache_are_said() {
    let mut tensors = fp8_tensors("weight_scale", &[1], &[0.5]);
    tensors.push(floats("input_scale", &[1], &[0.1]));
    let config =
        json!({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"});
    let stored = check(&config, &tensors, |r, c| fp8_weight(r, c) * 0.5);
    assert_eq!(
        stored.notes,
        ["inputs of layers stay f32: they are not rounded to FP8 or FP4 as the file says"]
    );
    let config = parse(&config);
    assert_eq!(config.notes(), ["the KV cache stays f32: the file's scheme for it is not used"]);
    for name in ["self_attn.k_scale", "self_attn.qkv_proj.v_scale", "self_attn.attn.k_scale"] {
        assert!(config.passes_over(&format!("model.layers.3.{name}")).is_some(), "{name}");
    }
    assert!(config.passes_over("model.layers.3.self_attn.k_proj.output_scale").is_some());
    assert!(config.passes_over("model.layers.3.mlp.k_scale").is_none());
    assert!(config.passes_over("model.layers.3.self_attn.q_proj.output_scale").is_none());
}

#[test]
fn inputs_are_quantized_as_the_group_of_the_layer_says() {
    let int8 = |more: Value| {
        let mut all = json!({"num_bits": 8, "type": "int"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        group("int-quantized", json!({"num_bits": 8, "strategy": "channel"}), all)
    };
    let mut tensors = int8_tensors(1);
    let activation =
        |config: &Value, tensors: &Vec<Tensor>| stored(config, tensors).layer.activation();
    let scheme = |dtype, scales| Some(ActivationScheme { dtype, scales });
    for (config, expected) in [
        (
            int8(json!({"dynamic": true, "strategy": "token"})),
            scheme(ActivationType::Int8, ActivationScales::PerToken),
        ),
        (
            int8(json!({"dynamic": true, "strategy": "token", "symmetric": false})),
            scheme(ActivationType::UInt8, ActivationScales::PerToken),
        ),
        (
            int8(json!({"dynamic": true, "strategy": "group", "group_size": 16})),
            scheme(ActivationType::Int8, ActivationScales::PerTokenGroup(16)),
        ),
        (group("int-quantized", json!({"num_bits": 8}), Value::Null), None),
    ] {
        assert_eq!(activation(&config, &tensors), expected, "{config}");
    }
    // By int4 weights, too.
    let w4a8 = group("pack-quantized", int4(), json!({"num_bits": 8, "dynamic": true}));
    assert_eq!(activation(&w4a8, &packed()), Some(ActivationScheme::INT8_PER_TOKEN));
    let fixed = int8(json!({"dynamic": false, "strategy": "tensor", "symmetric": false}));
    assert!(error(&fixed, &tensors).contains("input_scale, which is not there"));
    tensors.push(floats("input_scale", &[1], &[0.25]));
    tensors.push(tensor("input_zero_point", Dtype::I8, &[1], vec![5_i8.cast_unsigned()]));
    let zero_point = 128 + 5;
    let scales = ActivationScales::Static { scale: 0.25, zero_point };
    assert_eq!(activation(&fixed, &tensors), scheme(ActivationType::UInt8, scales));
    for (input, expected) in [
        (
            json!({"num_bits": 4, "dynamic": true}),
            "quantization_config: num_bits of input_activations of group_0 is 4, expected 8",
        ),
        (
            json!({"num_bits": 8, "dynamic": true, "strategy": "channel"}),
            "quantization_config: strategy of input_activations of group_0 is \"channel\", expected",
        ),
        (
            json!({"num_bits": 8, "rounding": "up"}),
            "quantization_config: the key rounding of input_activations of group_0 is not known",
        ),
    ] {
        let error = error(&group("int-quantized", json!({"num_bits": 8}), input), &tensors);
        assert!(error.starts_with(expected), "{error}");
    }
    let no_zeros = group("pack-quantized", json!({"num_bits": 4, "symmetric": false}), Value::Null);
    assert!(error(&no_zeros, &packed()).contains("weight_zero_point, which is not there"));
}

#[test]
fn of_several_groups_the_one_that_targets_the_layer_counts() {
    let int8 = json!({"num_bits": 8, "type": "int", "dynamic": true, "strategy": "token"});
    let weights = json!({"num_bits": 8, "strategy": "channel"});
    let config = |targets: Value| {
        json!({
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": {
                "group_0": {"targets": ["re:.*attn.*"], "weights": weights, "input_activations": null},
                "group_1": {"targets": targets, "weights": weights, "input_activations": int8},
            }
        })
    };
    let tensors = int8_tensors(1);
    for targets in [json!(["Linear"]), json!(["re:.*down_proj$"]), json!([LAYER])] {
        let activation = stored(&config(targets), &tensors).layer.activation();
        assert_eq!(activation, Some(ActivationScheme::INT8_PER_TOKEN));
    }
    assert_eq!(
        error(&config(json!(["re:.*up_proj$"])), &tensors),
        format!("quantization_config: no group of config_groups targets layer {LAYER}")
    );
    // Blocks of FP8, each group its own.
    let float =
        |block: [usize; 2]| json!({"num_bits": 8, "type": "float", "block_structure": block});
    let blocks = json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": float([128, 128])},
            "group_1": {"targets": ["re:.*down_proj$"], "weights": float([4, 16])},
        }
    });
    let scales = [1.0, 2.0, 4.0, 8.0];
    check(&blocks, &fp8_tensors("weight_scale", &[2, 2], &scales), |r, c| {
        fp8_weight(r, c) * scales[r / 4 * 2 + c / 16]
    });
}

/// `y = Σ x_c w_c` of the first row, by the layer's own reference.
fn product(layer: &QLinear, x: &[f32]) -> f32 {
    use lowbit_core::{Context, Linear};
    let mut y = Mat::zeros(1, N);
    layer.forward(MatRef::new(x, 1, K).unwrap(), y.as_mut(), &mut Context::new()).unwrap();
    y.data()[0]
}

#[test]
fn a_hadamard_product_of_the_input_is_computed() {
    let transform = |kind: &str, more: Value| {
        let mut scheme = json!({"type": kind, "apply": [
            {"targets": ["re:.*down_proj$"], "location": "input"},
            {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": true},
        ]});
        scheme.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let mut config = group("pack-quantized", int4(), Value::Null);
        config["transform_config"] = json!({"config_groups": {"R4": scheme}});
        config
    };
    // Any signs of the rows and any order of the columns.
    let sign = |i: usize, j: usize| {
        let column = (j * 5 + 3) % K;
        if ((i & column).count_ones() % 2 == 1) != i.is_multiple_of(3) { -1.0_f32 } else { 1.0 }
    };
    let matrix: Vec<f32> = (0..K * K).map(|i| sign(i / K, i % K)).collect();
    let x: Vec<f32> = (0..K).map(|c| (c as f32 * 0.7).sin()).collect();
    let rotated = |sign: &dyn Fn(usize, usize) -> f32| -> f32 {
        let of = |j: usize| (0..K).map(|i| x[i] * sign(i, j)).sum::<f32>() / (K as f32).sqrt();
        (0..K).map(|j| of(j) * packed_weight(0, j)).sum()
    };
    let mut tensors = packed();
    let sylvester = |i: usize, j: usize| if (i & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
    let plain = stored(&transform("hadamard", json!({})), &tensors).layer;
    assert_eq!(plain.transforms(), [Transform::Hadamard { negate: vec![false; K] }]);
    assert!((product(&plain, &x) - rotated(&sylvester)).abs() < 1e-4);
    let random = transform("random-hadamard", json!({}));
    assert!(error(&random, &tensors).contains("expected its matrix as the tensor"));
    tensors.push(floats("R4_input.weight", &[K, K], &matrix));
    let layer = stored(&random, &tensors).layer;
    assert!((product(&layer, &x) - rotated(&sign)).abs() < 1e-4);

    let blocks = error(&transform("hadamard", json!({"head_dim": 16})), &tensors);
    assert!(blocks.contains("blocks of 16 in rows of 32 are not held"), "{blocks}");
    let kind = error(&transform("random-matrix", json!({})), &tensors);
    assert!(kind.contains("type of the transform R4 is \"random-matrix\", expected"), "{kind}");
    tensors.last_mut().unwrap().bytes[0..4].copy_from_slice(&0.5_f32.to_le_bytes());
    assert!(error(&random, &tensors).contains("it is no Hadamard matrix"));
    // Without the key the tensor is not known.
    tensors.last_mut().unwrap().bytes[0..4].copy_from_slice(&1.0_f32.to_le_bytes());
    let unknown = error(&group("pack-quantized", int4(), Value::Null), &tensors);
    assert!(unknown.contains("R4_input.weight: it lies beside"), "{unknown}");
    // A layer in floats.
    let floats = vec![floats("weight", &[N, K], &[1.0; N * K])];
    let error = error(&transform("hadamard", json!({})), &floats);
    assert!(error.contains("which is not quantized: that is not computed"), "{error}");
}

#[test]
fn locations_of_transforms_that_are_not_computed_are_refused() {
    let config = |apply: Value| {
        let mut config = group("pack-quantized", int4(), Value::Null);
        config["transform_config"] =
            json!({"config_groups": {"R3": {"type": "hadamard", "apply": apply}}});
        config
    };
    let at = |location: &str, inverse| json!({"targets": ["self_attn"], "location": location, "inverse": inverse});
    let both = config(json!([at("q_attn", false), at("k_cache", false)]));
    check(&both, &packed(), packed_weight);
    let parsed = parse(&both);
    assert!(parsed.passes_over("model.layers.0.self_attn.R3_q_attn.weight").is_some());
    assert!(parsed.passes_over("model.layers.0.self_attn.R2_q_attn.weight").is_none());
    for apply in [
        json!([at("q_attn", false)]),
        json!([at("q_attn", false), at("k_cache", true)]),
        json!([at("output", false)]),
    ] {
        assert!(error(&config(apply), &packed()).contains("the transform R3"));
    }
}

#[test]
fn the_version_of_gptq_is_what_something_says_or_the_zeros_show() {
    let v1 = |r: usize, c: usize| scale(r, c / GROUP) * (code(r, c, 4) as f32 - 8.0);
    let base = json!({"quant_method": "gptq", "bits": 4, "group_size": 16});
    let with = |key: &str, value: Value| {
        let mut config = base.clone();
        config[key] = value;
        config
    };
    // All zeros are 8, stored less 1 or not.
    for stored in [7, 8] {
        let tensors = gptq(|_, _| stored);
        check(&base, &tensors, v1);
        check(&with("sym", json!(true)), &tensors, v1);
        assert_eq!(
            parse(&json!({"quant_method": "auto-round", "bits": 4})).method(),
            Some("auto-round")
        );
        check(&json!({"quant_method": "auto-round", "bits": 4}), &tensors, v1);
    }
    let zero = |r: usize, g: usize| (3 + r + g) as u32 % 15;
    let tensors = gptq(zero);
    let asymmetric = |more: f32| {
        move |r: usize, c: usize| {
            scale(r, c / GROUP) * (code(r, c, 4) as f32 - zero(r, c / GROUP) as f32 - more)
        }
    };
    for (config, more) in [
        (with("sym", json!(false)), 1.0),
        (with("checkpoint_format", json!("gptq")), 1.0),
        (with("checkpoint_format", json!("gptq_v2")), 0.0),
        (with("format", json!("gptq_v2")), 0.0),
        (
            json!({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}),
            1.0,
        ),
        (
            json!({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:gptqmodel"}),
            0.0,
        ),
        (json!({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round"}), 0.0),
        (
            json!({"quant_method": "intel/auto-round", "bits": 4, "backend": "auto_round:auto_gptq"}),
            1.0,
        ),
    ] {
        check(&config, &tensors, asymmetric(more));
    }
    for config in [base, json!({"quant_method": "awq", "bits": 4})] {
        let error = error(&config, &tensors);
        assert!(
            error.contains("qzeros: its zeros do not show whether they are stored less 1"),
            "{error}"
        );
    }
}

#[test]
fn act_order_without_its_groups_is_an_error() {
    let config = json!({"quant_method": "gptq", "bits": 4, "desc_act": true, "sym": true});
    let mut tensors = gptq(|_, _| 7);
    assert_eq!(
        error(&config, &tensors),
        format!("quantization_config: it speaks of the tensor {LAYER}.g_idx, which is not there")
    );
    let g_idx: Vec<u32> = (0..K as u32).map(|c| c % 2).collect();
    tensors.push(tensor("g_idx", Dtype::I32, &[K], words(&g_idx)));
    check(&config, &tensors, |r, c| scale(r, c % 2) * (code(r, c, 4) as f32 - 8.0));
}

#[test]
fn mlx_has_a_scale_and_a_bias_for_each_group() {
    let bias = |r: usize, g: usize| (r as f32 - 3.0 * g as f32) / 16.0;
    for bits in [2, 3, 4, 5, 6, 8_u32] {
        let biases: Vec<f32> = (0..2 * N).map(|i| bias(i / 2, i % 2)).collect();
        let tensors = vec![
            tensor("weight", Dtype::Other("U32"), &[N, K * bits as usize / 32], words(&rows(bits))),
            floats("scales", &[N, 2], &scales(2)),
            floats("biases", &[N, 2], &biases),
        ];
        let expected =
            |r: usize, c: usize| scale(r, c / 16) * code(r, c, bits) as f32 + bias(r, c / 16);
        let stored = check(&json!({"bits": bits, "group_size": 16}), &tensors, expected);
        assert_eq!(stored.convention.name(), "mlx");
        // For this layer alone.
        let other = if bits == 4 { 8 } else { 4 };
        let config =
            json!({"bits": other, "group_size": 64, LAYER: {"bits": bits, "group_size": 16}});
        check(&config, &tensors, expected);
        assert!(
            error(&json!({"bits": other, "group_size": 16}), &tensors).contains("are not what")
        );
    }
    let codes = vec![
        tensor("weight", Dtype::Other("U32"), &[N, K / 8], words(&rows(4))),
        tensor("scales", Dtype::U8, &[N, 1], (0..N as u8).map(|r| 120 + r).collect()),
    ];
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let fp4 = |code: u32| if code < 8 { e2m1[code as usize] } else { -e2m1[code as usize - 8] };
    check(&json!({"bits": 4, "group_size": 32, "mode": "mxfp4"}), &codes, |r, c| {
        fp4(code(r, c, 4)) * 2.0_f32.powi(120 + r as i32 - 127)
    });
}

#[test]
fn blocks_of_nf4_may_run_across_rows_of_any_length() {
    let map: Vec<f32> = (0..16).map(|i| (i as f32 - 7.0) / 8.0).collect();
    for (n, k, block) in [(3, 40, 64), (4, 7, 8), (5, 3, 64), (2, 96, 64), (1, 33, 32)] {
        let elements: usize = n * k;
        let code = |i: usize| (i * 11 + 2) % 16;
        let bytes: Vec<u8> = (0..elements.div_ceil(2))
            .map(|i| {
                let low = if 2 * i + 1 < elements { code(2 * i + 1) } else { 0 };
                (code(2 * i) << 4 | low) as u8
            })
            .collect();
        let absmax: Vec<f32> =
            (0..elements.div_ceil(block)).map(|i| (i + 1) as f32 / 4.0).collect();
        let state = json!({"quant_type": "nf4", "blocksize": block, "shape": [n, k]}).to_string();
        let tensors = vec![
            tensor("weight", Dtype::U8, &[bytes.len(), 1], bytes),
            floats("weight.absmax", &[absmax.len()], &absmax),
            floats("weight.quant_map", &[16], &map),
            tensor(
                "weight.quant_state.bitsandbytes__nf4",
                Dtype::U8,
                &[state.len()],
                state.into_bytes(),
            ),
        ];
        let config = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
        let w = weights(&stored(&config, &tensors).layer);
        for (i, w) in w.data().iter().enumerate() {
            assert_eq!(*w, map[code(i)] * absmax[i / block], "{n} x {k}, {i}");
        }
        let mut short = tensors;
        short[1] = floats("weight.absmax", &[1], &[1.0]);
        assert_eq!(parse(&config).read(&short, LAYER).is_err(), absmax.len() != 1);
    }
}

#[test]
fn mxfp4_of_quark_lies_under_the_name_of_a_weight() {
    let bytes: Vec<u8> = rows(4).into_iter().flat_map(u32::to_le_bytes).collect();
    let tensors = vec![
        tensor("weight", Dtype::U8, &[N, K / 2], bytes),
        tensor("weight_scale", Dtype::U8, &[N, 1], vec![128; N]),
    ];
    let config = json!({
        "quant_method": "quark", "export": {"pack_method": "reorder"},
        "global_quant_config": {
            "weight": {"dtype": "fp4", "group_size": 32}, "input_tensors": {"dtype": "fp4"},
            "output_tensors": null, "bias": null
        }
    });
    check(&config, &tensors, |r, c| Format::F4E2M1.decode(code(r, c, 4) as u8) * 2.0);
    let int8 = json!({"quant_method": "quark", "global_quant_config": {"input_tensors": {"dtype": "int8"}}});
    assert!(error(&int8, &tensors).contains("input_tensors of quark is {\"dtype\":\"int8\"}"));
}

#[test]
fn a_configuration_is_found_wherever_it_lies() {
    let from = |config: Value| {
        let found = QuantizationConfig::from_model(&config).unwrap();
        found.and_then(|found| found.method().map(str::to_string))
    };
    let gptq = json!({"bits": 4, "group_size": 32, "desc_act": false});
    for (config, method) in [
        (json!({}), None),
        (json!({"quantization_config": null}), None),
        (json!({"quantization_config": {}}), None),
        (json!({"quantization_config": gptq}), Some("gptq")),
        (json!({"text_config": {"quantization_config": gptq}}), Some("gptq")),
        (
            json!({"compression_config": group("pack-quantized", int4(), Value::Null)}),
            Some("compressed-tensors"),
        ),
        (
            json!({"compression_config": {
                "quantization_config": group("pack-quantized", int4(), Value::Null),
                "sparsity_config": {"format": "dense"}
            }}),
            Some("compressed-tensors"),
        ),
        (json!({"quantization": {"bits": 4, "group_size": 64}}), Some("mlx")),
        (json!({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}), Some("modelopt")),
        (
            json!({"quantization_config": {
                "producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}
            }}),
            Some("modelopt"),
        ),
        (
            json!({"quantization_config": {"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}}),
            Some("awq"),
        ),
    ] {
        assert_eq!(from(config.clone()).as_deref(), method, "{config}");
    }
}

#[test]
fn a_key_is_used_or_harmless_or_refused_by_its_name() {
    for (config, expected) in [
        (
            json!({"quant_method": "gptq", "bits": 5}),
            "bits of gptq is 5, expected 2 or 3 or 4 or 8",
        ),
        (
            json!({"quant_method": "gptq", "adapter": {"rank": 8}}),
            "adapter of gptq is {\"rank\":8}, expected nothing",
        ),
        (
            json!({"quant_method": "gptq", "rotation": "hadamard"}),
            "rotation of gptq is \"hadamard\"",
        ),
        (
            json!({"quant_method": "gptq", "colour": 1}),
            "the key colour of gptq is not known (its value is 1)",
        ),
        (
            json!({"quant_method": "gptq", "dynamic": {"(": {}}}),
            "the pattern \"(\" is not understood",
        ),
        (
            json!({"quant_method": "gptq", "dynamic": {".*": {"adapter": "x"}}}),
            "adapter of gptq for \".*\" is \"x\"",
        ),
        (json!({"quant_method": "fp8", "fmt": "e4m3fnuz"}), "fmt of fp8 is \"e4m3fnuz\", expected"),
        (
            json!({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}),
            "quant_algo of modelopt is \"W4A16_AWQ\"",
        ),
        (
            json!({"quant_method": "auto-round", "act_bits": 8, "data_type": "int"}),
            "act_bits of auto-round is 8",
        ),
        (json!({"quant_method": "hqq"}), "tensors of the quant_method hqq are not read"),
        (
            json!({"quant_method": "compressed-tensors", "format": "marlin-24"}),
            "format of compressed-tensors is \"marlin-24\"",
        ),
        (
            json!({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}),
            "format of sparsity_config is \"sparse-24-bitmask\"",
        ),
        (
            json!({"quant_method": "compressed-tensors", "config_groups": {"g": {
                "targets": ["Linear"], "weights": int4(), "output_activations": {"num_bits": 8}
            }}}),
            "output_activations of g is {\"num_bits\":8}, expected null",
        ),
        (
            json!({"quant_method": "unheard-of", "twist": 3}),
            "the key twist of the quant_method \"unheard-of\"",
        ),
    ] {
        let error = QuantizationConfig::parse(&config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("quantization_config: {expected}")), "{error}");
        assert!(!error.contains('\n'));
    }
    // What asks for nothing is nothing, whatever it is called.
    parse(
        &json!({"quant_method": "gptq", "colour": null, "shape": false, "rotation": null, "sym": true}),
    );
    let unheard = json!({"quant_method": "unheard-of", "bits": 4, "group_size": 16, "sym": true});
    assert_eq!(parse(&unheard).notes().len(), 1);
    check(&unheard, &gptq(|_, _| 7), |r, c| scale(r, c / GROUP) * (code(r, c, 4) as f32 - 8.0));
}

#[test]
fn numbers_of_single_layers_fill_what_their_shapes_leave_open() {
    // 24 words of 8 columns: 3, 4 … bits all fit some row without qzeros and g_idx.
    let words_of = |bits: usize| vec![0x1234_5678_u32; 3 * bits * N];
    let tensors = |bits: usize| {
        let scales = (0..N).flat_map(|_| f16::from_f32(0.5).to_le_bytes()).collect();
        vec![
            tensor("qweight", Dtype::I32, &[3 * bits, N], words(&words_of(bits))),
            tensor("scales", Dtype::F16, &[1, N], scales),
        ]
    };
    let config = json!({"quant_method": "gptq", "bits": 4, "sym": true,
                        "dynamic": {"+:.*\\.0\\.mlp\\.down_proj": {"bits": 8}, "-:.*up.*": {}}});
    let eight = stored(&config, &tensors(8)).layer;
    assert_eq!((eight.weight().cols(), eight.weight().scheme().dtype.bits()), (96, 8));
    let config = json!({"quant_method": "gptq", "bits": 4, "sym": true});
    let four = stored(&config, &tensors(8)).layer;
    assert_eq!((four.weight().cols(), four.weight().scheme().dtype.bits()), (192, 4));
    let extra = json!({"quant_method": "auto-round", "bits": 4, "sym": true,
                       "extra_config": {LAYER: {"bits": 2}}});
    assert_eq!(stored(&extra, &tensors(2)).layer.weight().cols(), 96);
}
