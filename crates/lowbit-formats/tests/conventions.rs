//! Conventions against packed tensors of other programs, against their definitions, and back.

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Base, Granularity, Levels, Mat,
    OutlierColumns, Outliers, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, SparseRows,
    StepFormat, Transform, TwoLevel, ZeroFormat, f16,
};
use lowbit_dtypes::{Format, pack, packed_len, unpack};
use lowbit_formats::{
    Dtype, Tensor, TensorSource,
    conventions::{
        Awq, AwqVersion, Bnb4, BnbInt8, CompressedFloat, CompressedInt, CompressedPacked,
        Convention, Fp8, Ggml, GptOss, Gptq, Lowbit, Mlx, Mxfp4, Nvfp4, QuantizationConfig,
    },
    gguf::GgmlType,
};
use proptest::prelude::*;
use serde_json::json;

/// Codes, zeros and their words of 96 inputs in groups of 32 and 64 outputs, packed by numpy after
/// the definition of the format (`pack_gptq` of the project's oracle `o06_gptq.py`).
macro_rules! gptq {
    ($($bits:literal)+) => {
        [$((
            $bits,
            &include_bytes!(concat!("golden/gptq_b", $bits, "_codes_out_in.bin"))[..],
            &include_bytes!(concat!("golden/gptq_b", $bits, "_zeros_out_group.bin"))[..],
            &include_bytes!(concat!("golden/gptq_b", $bits, "_qweight.bin"))[..],
            [
                &include_bytes!(concat!("golden/gptq_b", $bits, "_qzeros_v1.bin"))[..],
                &include_bytes!(concat!("golden/gptq_b", $bits, "_qzeros_v2.bin"))[..],
            ],
        )),+]
    };
}

fn tensor(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Tensor {
    Tensor::new(format!("l.{name}"), dtype, shape.to_vec(), bytes.to_vec())
}

/// The layer `l` of a model with this `quantization_config`.
fn read(config: &serde_json::Value, tensors: &Vec<Tensor>) -> lowbit_formats::Result<QLinear> {
    Ok(QuantizationConfig::parse(config)?.read(tensors, "l")?.unwrap().layer)
}

fn codes(weight: &QMatrix) -> Vec<u8> {
    let mut codes = vec![0; weight.rows() * weight.cols()];
    for (r, row) in codes.chunks_exact_mut(weight.cols()).enumerate() {
        weight.unpack_row(r, row).unwrap();
    }
    codes
}

#[test]
fn gptq_words_of_every_width_and_version_are_read_and_written_bit_for_bit() {
    let (n, k, groups) = (64, 96, 3);
    for (bits, expected, zeros, qweight, qzeros) in gptq!(2 3 4 8) {
        for (v2, qzeros) in [false, true].into_iter().zip(qzeros) {
            let words = k * bits / 32;
            let mut tensors = vec![
                tensor("qweight", Dtype::I32, &[words, n], qweight),
                tensor("qzeros", Dtype::I32, &[groups, n * bits / 32], qzeros),
                tensor("scales", Dtype::F16, &[groups, n], &[0x00, 0x3c].repeat(groups * n)),
            ];
            let gptq = Gptq { v2, ..Gptq::default() };
            let layer = gptq.read(&tensors, "l").unwrap();
            assert_eq!(codes(layer.weight()), expected);
            for (r, zeros) in zeros.chunks_exact(groups).enumerate() {
                for (group, &zero) in zeros.iter().enumerate() {
                    assert_eq!(layer.weight().params(r, group).zero, f32::from(zero), "{bits}");
                }
            }
            let g_idx: Vec<u8> = (0..k as i32).flat_map(|j| (j / 32).to_le_bytes()).collect();
            tensors.push(tensor("g_idx", Dtype::I32, &[k], &g_idx));
            assert_eq!(gptq.write(&layer, "l").unwrap(), tensors);
        }
    }
}

fn levels(dtype: QuantType, granularity: Granularity, scale_format: ScaleFormat) -> QLinear {
    layer(64, 64, QuantScheme { scale_format, ..QuantScheme::levels(dtype, granularity) })
}

fn layer(n: usize, k: usize, scheme: QuantScheme) -> QLinear {
    let w = Mat::from_fn(n, k, |r, c| ((r * k + c) as f32 * 0.61).sin() + 0.1);
    QLinear::new(QMatrix::quantize(w.as_ref(), scheme).unwrap())
}

#[test]
fn scattered_groups_become_a_permutation_of_the_input() {
    let plain = layer(8, 64, QuantScheme::affine(4, Granularity::PerGroup(16)));
    let gptq = Gptq { v2: true, ..Gptq::default() };
    let mut tensors = gptq.write(&plain, "l").unwrap();
    // Feature j joins group j % 4: the layer whose weight in the order 0 4 8 … 1 5 9 … is `plain`.
    let place = |j: usize| j % 16 * 4 + j / 16;
    let mut permuted = plain.clone();
    permuted = permuted
        .with_transforms(vec![Transform::Permute((0..64).map(|j| place(j) as u32).collect())])
        .unwrap();
    let written = gptq.write(&permuted, "l").unwrap();
    let g_idx: Vec<u8> = (0..64_i32).flat_map(|j| (j % 4).to_le_bytes()).collect();
    assert_eq!(written.tensor("l.g_idx").unwrap().bytes, g_idx);
    assert_eq!(gptq.read(&written, "l").unwrap(), permuted);
    assert_eq!(gptq.config(&permuted).unwrap()["desc_act"], true);

    // Groups that are not all of one size are none.
    let view = tensors.iter_mut().find(|tensor| tensor.name == "l.g_idx").unwrap();
    view.bytes[0] = 1;
    let error = gptq.read(&tensors, "l").unwrap_err().to_string();
    assert_eq!(error, "memory: tensor l.scales: g_idx does not make 4 groups of one size");
}

#[test]
fn scattered_groups_of_compressed_tensors_do_so_too() {
    for (bits, k) in [(4, 64), (3, 48)] {
        let plain = layer(8, k, QuantScheme::affine(bits, Granularity::PerGroup(16)));
        // The input from last to first: the file has the columns in the order of the features.
        let reversed = Transform::Permute((0..k as u32).rev().collect());
        let permuted = plain.clone().with_transforms(vec![reversed]).unwrap();
        let weight = plain.weight();
        let (width, mut codes) = (u32::from(bits), Vec::new());
        for mut row in self::codes(weight).chunks(k).map(<[u8]>::to_vec) {
            row.reverse();
            let mut packed = vec![0; packed_len(k, width)];
            pack(width, &row, &mut packed).unwrap();
            codes.extend(packed);
        }
        let (scales, zeros) = (weight.scales().to_vec(), weight.zeros().map(<[u8]>::to_vec));
        let columns = QMatrix::from_parts(8, k, weight.scheme(), codes, scales, zeros).unwrap();
        let ct = CompressedPacked::default();
        let mut tensors = ct.write(&QLinear::new(columns), "l").unwrap();
        let g_idx = |group: &dyn Fn(usize) -> i32| {
            (0..k).flat_map(|column| group(column).to_le_bytes()).collect::<Vec<_>>()
        };
        let mut set = |bytes: Vec<u8>| {
            tensors.retain(|tensor| tensor.name != "l.weight_g_idx");
            tensors.push(Tensor::new("l.weight_g_idx", Dtype::I32, vec![k], bytes));
            CompressedPacked { bits: Some(bits), group_size: Some(16) }.read(&tensors, "l")
        };
        let read = set(g_idx(&|column| ((k - 1 - column) / 16) as i32)).unwrap();
        let weight = |layer: &QLinear| layer.effective_weight().unwrap();
        assert_eq!(weight(&read), weight(&permuted));
        assert!(set(g_idx(&|_| -1)).unwrap().transforms().is_empty()); // unset
        let error = set(g_idx(&|_| 0)).unwrap_err().to_string();
        let wrong = format!("weight_g_idx does not make {} groups of one size", k / 16);
        assert!(error.contains(&wrong), "{error}");
        // compressed-tensors itself looks at no such tensor any more.
        let error = ct.write(&permuted, "l").unwrap_err().to_string();
        assert!(error.contains("a transform of the input"), "{error}");
    }
}

#[test]
fn the_version_of_symmetric_gptq_is_seen_not_believed() {
    for bits in [2, 3, 4, 8] {
        let layer = layer(64, 96, QuantScheme::symmetric(bits, Granularity::PerGroup(32)));
        for (written, label) in [(false, true), (true, false), (true, true), (false, false)] {
            let tensors = Gptq { v2: written, ..Gptq::default() }.write(&layer, "l").unwrap();
            let read =
                Gptq { v2: label, symmetric: true, ..Gptq::default() }.read(&tensors, "l").unwrap();
            assert_eq!(read, layer, "{bits} bits, v2 {written}, labelled {label}");
        }
    }
    let four = layer(8, 32, QuantScheme::symmetric(4, Granularity::PerChannel));
    for (v2, byte) in [(false, 0x77), (true, 0x88)] {
        let tensors = Gptq { v2, ..Gptq::default() }.write(&four, "l").unwrap();
        assert_eq!(tensors.tensor("l.qzeros").unwrap().bytes, [byte; 4]);
    }
}

#[test]
fn version_1_of_gptq_reads_all_ones_as_0_and_does_not_write_it() {
    let scheme = QuantScheme::affine(4, Granularity::PerChannel);
    let w = Mat::from_fn(8, 32, |_, c| c as f32); // no negative weight: zero 0
    let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme).unwrap());
    let v2 = Gptq { v2: true, ..Gptq::default() };
    let mut tensors = v2.write(&layer, "l").unwrap();
    assert_eq!(tensors[1].bytes, [0; 4]);
    tensors[1].bytes.fill(0xff);
    assert_eq!(Gptq::default().read(&tensors, "l").unwrap(), layer);
    assert_eq!(
        Gptq::default().write(&layer, "l").unwrap_err().to_string(),
        "layer l: gptq cannot hold a zero of 0 in version 1 of the format"
    );
}

#[test]
fn awq_words_are_what_the_definition_says() {
    let (n, k, group) = (24, 64, 32);
    let layer = layer(n, k, QuantScheme::affine(4, Granularity::PerGroup(group)));
    let tensors = Awq::default().write(&layer, "l").unwrap();
    let word = |name: &str, at: usize| {
        let bytes = tensors.tensor(name).unwrap().bytes;
        u32::from_le_bytes(bytes.as_chunks().0[at])
    };
    let codes = codes(layer.weight());
    for (nibble, column) in [0, 2, 4, 6, 1, 3, 5, 7].into_iter().enumerate() {
        for w in 0..n / 8 {
            for row in 0..k {
                let code = word("l.qweight", row * n / 8 + w) >> (4 * nibble) & 15;
                assert_eq!(code, u32::from(codes[(8 * w + column) * k + row]));
            }
            for g in 0..k / group {
                let zero = word("l.qzeros", g * n / 8 + w) >> (4 * nibble) & 15;
                assert_eq!(zero as f32, layer.weight().params(8 * w + column, g).zero);
            }
        }
    }
}

#[test]
fn awq_for_vectors_pads_zeros_and_scales() {
    let gemv = Awq { version: AwqVersion::Gemv, group_size: Some(32) };
    let layer = layer(4, 96, QuantScheme::affine(4, Granularity::PerGroup(32)));
    let tensors = gemv.write(&layer, "l").unwrap();
    assert_eq!(tensors.tensor("l.qweight").unwrap().bytes, layer.weight().codes());
    assert_eq!(tensors.tensor("l.qzeros").unwrap().shape, [4, 4]);
    assert_eq!(tensors.tensor("l.scales").unwrap().shape, [4, 32]);
    assert_eq!(gemv.read(&tensors, "l").unwrap(), layer);
}

#[test]
fn compressed_zero_points_are_packed_along_the_outputs() {
    let layer = layer(20, 48, QuantScheme::affine(3, Granularity::PerGroup(16)));
    let tensors = CompressedPacked::default().write(&layer, "l").unwrap();
    let zeros = tensors.tensor("l.weight_zero_point").unwrap();
    assert_eq!(zeros.shape, [2, 3]); // 60 bits are 2 words
    let words = zeros.bytes.as_chunks::<4>().0;
    for group in 0..3 {
        let column = [words[group], words[3 + group]].concat();
        let mut codes = [0_u8; 20];
        unpack(3, &column[..packed_len(20, 3)], &mut codes).unwrap();
        for (r, code) in codes.into_iter().enumerate() {
            assert_eq!(layer.weight().params(r, group).zero, f32::from(code));
        }
    }
}

#[test]
fn int8_of_bitsandbytes_is_code_times_row_maximum_over_127() {
    let tensors = vec![
        tensor("weight", Dtype::I8, &[2, 2], &[127, 0, 0x81, 64]),
        Tensor::f32("l.SCB", vec![2], &[1.5, 0.25]),
        tensor("weight_format", Dtype::U8, &[], &[0]),
    ];
    let config = json!({"quant_method": "bitsandbytes", "load_in_8bit": true});
    let layer = read(&config, &tensors).unwrap();
    assert_eq!(layer.outliers(), Some(&Outliers::Threshold(6.0)));
    for (w, expected) in
        layer.weight().dequantize().data().iter().zip([1.5, 0.0, -0.25, 16. / 127.])
    {
        assert!((w - expected).abs() <= 1e-7, "{w} {expected}");
    }
    let mut old = tensors;
    old[2].bytes = vec![1];
    let error = BnbInt8 { threshold: None }.read(&old, "l").unwrap_err().to_string();
    assert_eq!(
        error,
        "memory: tensor l.weight_format: it is 1, a layout for old GPUs, expected 0: convert the checkpoint"
    );
}

#[test]
fn ggml_blocks_become_layers_of_the_same_weights() {
    macro_rules! golden {
        ($($name:ident)+) => {
            [$((GgmlType::$name, &include_bytes!(concat!("golden/", stringify!($name), ".blocks"))[..])),+]
        };
    }
    let golden = golden! {
        Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4
    };
    let signs: Vec<u8> = (0..36).map(|i| (i * 91 + 7) as u8 & 0x3f).collect();
    let two = [(GgmlType::Q1_0, &signs[..]), (GgmlType::Q2_0, &signs[..])];
    for (dtype, bytes) in golden.into_iter().chain(two) {
        let (weights, size) = dtype.block().unwrap();
        let blocks = bytes.len() / size;
        // Two rows, or three for three super-blocks.
        let rows = if blocks.is_multiple_of(2) { 2 } else { 3 };
        let shape = [rows, blocks / rows * weights];
        let weight = tensor("weight", Dtype::Ggml(dtype), &shape, bytes);
        let layer = Ggml.read(&vec![weight.clone()], "l").unwrap();
        let expected = weight.view().to_f32().unwrap();
        assert_eq!(layer.weight().dequantize().data(), expected, "{dtype}");
        let scheme = layer.weight().scheme();
        if dtype == GgmlType::TQ1_0 {
            let written = Ggml.write(&layer, "l").unwrap();
            assert_eq!(written[0].dtype, Dtype::Ggml(GgmlType::TQ2_0));
            assert_eq!(Ggml.read(&written, "l").unwrap(), layer);
        } else {
            assert_eq!(Ggml::scheme(dtype), Some(scheme));
            assert_eq!(Ggml.write(&layer, "l").unwrap(), [weight], "{dtype}");
        }
        // All that ggml stores and nothing else, but for the tensor's scale of NVFP4.
        if !matches!(dtype, GgmlType::TQ1_0 | GgmlType::NVFP4) {
            assert_eq!(layer.weight().bytes(), bytes.len(), "{dtype}");
        }
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn packed(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect()
}

/// Four rows of 1024 weights in blocks of 64, quantized by numpy after the published constants of
/// bitsandbytes (the project's oracle `o05_nf4.py`).
#[test]
fn nf4_and_fp4_of_bitsandbytes_have_the_bits_of_the_oracle() {
    let map = |dtype: QuantType| -> Vec<f32> { (0..16).map(|i| dtype.level(i)).collect() };
    let state = |kind: &str, extra: &str| {
        let json = format!(
            r#"{{"quant_type": "{kind}", "blocksize": 64, "dtype": "float16", "shape": [4, 1024]{extra}}}"#
        );
        let name = format!("weight.quant_state.bitsandbytes__{kind}");
        tensor(&name, Dtype::U8, &[json.len()], json.as_bytes())
    };
    let absmax = include_bytes!("golden/nf4_absmax.f32");
    let nf4 = vec![
        tensor("weight", Dtype::U8, &[2048, 1], include_bytes!("golden/nf4_packed.bin")),
        Tensor::f32("l.weight.quant_map", vec![16], &map(QuantType::NF4)),
        tensor("weight.absmax", Dtype::F32, &[64], absmax),
        state("nf4", ""),
    ];
    let layer = Bnb4.read(&nf4, "l").unwrap();
    assert_eq!(layer.weight().dequantize().data(), f32s(include_bytes!("golden/nf4_deq.f32")));
    assert_eq!(Bnb4.write(&layer, "l").unwrap()[0], nf4[0]);

    let mut nested = nf4;
    nested[2] = tensor("weight.absmax", Dtype::U8, &[64], include_bytes!("golden/dq_codes.bin"));
    let offset = f32s(include_bytes!("golden/dq_offset.f32"))[0];
    let extra = format!(r#", "nested_blocksize": 256, "nested_offset": {}"#, f64::from(offset));
    nested[3] = state("nf4", &extra);
    for (name, bytes) in [
        ("weight.nested_quant_map", &include_bytes!("golden/dynamic8.f32")[..]),
        ("weight.nested_absmax", include_bytes!("golden/dq_absmax2.f32")),
    ] {
        nested.push(tensor(name, Dtype::F32, &[bytes.len() / 4], bytes));
    }
    let layer = Bnb4.read(&nested, "l").unwrap();
    assert_eq!(layer.weight().dequantize().data(), f32s(include_bytes!("golden/dq_deq.f32")));
    nested.pop();
    assert!(Bnb4.read(&nested, "l").is_err());

    let codes = include_bytes!("golden/fp4_codes.bin");
    let high_first: Vec<u8> = packed(codes).iter().map(|byte| byte.rotate_left(4)).collect();
    let fp4 = vec![
        tensor("weight", Dtype::U8, &[2048, 1], &high_first),
        Tensor::f32("l.weight.quant_map", vec![16], &map(QuantType::FP4_BNB)),
        tensor("weight.absmax", Dtype::F32, &[64], absmax),
        state("fp4", ""),
    ];
    let layer = Bnb4.read(&fp4, "l").unwrap();
    assert_eq!(layer.weight().dequantize().data(), f32s(include_bytes!("golden/fp4_deq.f32")));
}

/// Quantized by numpy and ml_dtypes (the project's oracle `o16_mx.py`).
#[test]
fn microscaling_formats_have_the_bits_of_the_oracle() {
    let scales = include_bytes!("golden/mxfp4_scales.bin");
    let codes = packed(include_bytes!("golden/mxfp4_codes.bin"));
    let expected = f32s(include_bytes!("golden/mxfp4_deq.f32"));
    let tensors = vec![
        tensor("weight_packed", Dtype::U8, &[16, 16], &codes),
        tensor("weight_scale", Dtype::U8, &[16, 1], scales),
    ];
    let layer = Mxfp4.read(&tensors, "l").unwrap();
    assert_eq!(layer.weight().dequantize().data(), expected);
    assert_eq!(Mxfp4.write(&layer, "l").unwrap(), tensors);
    let experts = vec![
        Tensor::new("l_blocks", Dtype::U8, vec![4, 4, 1, 16], codes),
        Tensor::new("l_scales", Dtype::U8, vec![4, 4, 1], scales.to_vec()),
    ];
    let gpt_oss = GptOss { experts: 4 };
    assert_eq!(gpt_oss.read(&experts, "l").unwrap(), layer);
    assert_eq!(gpt_oss.write(&layer, "l").unwrap(), experts);

    let mxfp8 = vec![
        tensor("weight", Dtype::F8E4M3, &[16, 32], include_bytes!("golden/mxfp8_codes.bin")),
        tensor("weight_scale", Dtype::U8, &[16, 1], include_bytes!("golden/mxfp8_scales.bin")),
    ];
    let layer = Fp8::default().read(&mxfp8, "l").unwrap();
    assert_eq!(layer.weight().dequantize().data(), f32s(include_bytes!("golden/mxfp8_deq.f32")));
    assert_eq!(CompressedFloat::default().write(&layer, "l").unwrap(), mxfp8);

    let global = f32s(include_bytes!("golden/nvfp4_global.f32"))[0];
    let nvfp4 = vec![
        tensor("weight", Dtype::U8, &[8, 32], include_bytes!("golden/nvfp4_packed.bin")),
        tensor("weight_scale", Dtype::F8E4M3, &[8, 4], include_bytes!("golden/nvfp4_scales.bin")),
        Tensor::f32("l.weight_scale_2", vec![], &[global]),
    ];
    let modelopt = Nvfp4 { reciprocal: false };
    let layer = modelopt.read(&nvfp4, "l").unwrap();
    assert_eq!(layer.weight().dequantize().data(), f32s(include_bytes!("golden/nvfp4_deq.f32")));
    assert_eq!(modelopt.write(&layer, "l").unwrap(), nvfp4);
    let compressed = Nvfp4 { reciprocal: true };
    let tensors = compressed.write(&layer, "l").unwrap();
    let back = compressed.read(&tensors, "l").unwrap();
    assert_eq!(back.weight().codes(), layer.weight().codes());
    let scale = |layer: &QLinear| layer.weight().params(0, 0).scale.to_bits();
    assert!(scale(&back).abs_diff(scale(&layer)) <= 1);
}

#[test]
fn scales_of_fp8_have_many_shapes_and_two_senses() {
    let weight = tensor("weight", Dtype::F8E4M3, &[3, 4], &[0x38; 12]); // 1.0
    let read = |name: &str, shape: &[usize], scales: &[f32], fp8: Fp8| {
        let scales = Tensor::f32(format!("l.{name}"), shape.to_vec(), scales);
        Ok::<_, lowbit_formats::Error>(
            fp8.read(&vec![weight.clone(), scales], "l")?.weight().dequantize().data().to_vec(),
        )
    };
    let fp8 = Fp8 { block: (2, 3), divides: false };
    for shape in [vec![], vec![1], vec![1, 1]] {
        assert_eq!(read("weight_scale", &shape, &[2.0], fp8).unwrap(), [2.0; 12]);
    }
    for shape in [vec![3], vec![3, 1]] {
        let w = read("weight_scale", &shape, &[1.0, 2.0, 4.0], fp8).unwrap();
        assert_eq!(w, [1., 1., 1., 1., 2., 2., 2., 2., 4., 4., 4., 4.]);
    }
    let blocks = [1.0, 2.0, 4.0, 8.0];
    let w = read("weight_scale_inv", &[2, 2], &blocks, fp8).unwrap();
    assert_eq!(w, [1., 1., 1., 2., 1., 1., 1., 2., 4., 4., 4., 8.]);
    let config = json!({
        "quant_method": "fp8", "weight_block_size": [2, 3], "weight_scale_semantics": "inverse"
    });
    let scales = Tensor::f32("l.weight_scale_inv", vec![2, 2], &blocks);
    let layer = self::read(&config, &vec![weight.clone(), scales]).unwrap();
    assert_eq!(layer.weight().dequantize().data()[11], 0.125);
    let error = read("weight_scale_inv", &[2, 3], &[1.0; 6], fp8).unwrap_err().to_string();
    assert_eq!(
        error,
        "memory: tensor l.weight_scale_inv: its shape [2, 3] is no tensor, channels, groups or blocks of 2 x 3 of 3 x 4 weights"
    );
}

#[test]
fn what_a_convention_cannot_hold_is_refused_by_name() {
    let int4 = layer(8, 64, QuantScheme::symmetric(4, Granularity::PerGroup(32)));
    let int5 = layer(8, 64, QuantScheme::symmetric(5, Granularity::PerGroup(32)));
    let real = ZeroFormat::Real(ScaleFormat::F16);
    let real = layer(8, 64, QuantScheme { zero: real, ..int4.weight().scheme() });
    let w8a8 = int4.clone().with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let hadamard = int4.clone().with_transforms(vec![Transform::hadamard(64, 1)]).unwrap();
    let tensor = layer(8, 64, QuantScheme::symmetric(4, Granularity::PerTensor));
    let odd = layer(7, 63, QuantScheme::symmetric(4, Granularity::PerGroup(32)));
    let gemv = Awq { version: AwqVersion::Gemv, group_size: None };
    let int8 = BnbInt8 { threshold: None };
    let rest = layer(8, 72, QuantScheme::symmetric(4, Granularity::PerGroup(32)));
    let large = layer(8, 72, QuantScheme::affine(8, Granularity::PerGroup(128)));
    let e4m3 = |granularity, format| levels(QuantType::Float(Format::F8E4M3), granularity, format);
    let channel = e4m3(Granularity::PerChannel, ScaleFormat::F32);
    let f32_groups = e4m3(Granularity::PerGroup(32), ScaleFormat::F32);
    let e5m2 = QuantType::Float(Format::F8E5M2);
    let e5m2 = levels(e5m2, Granularity::PerChannel, ScaleFormat::F32);
    let in_groups = "rows of 72 in groups of 32, only groups that divide rows";
    let int8_only = layer(8, 64, QuantScheme::symmetric(8, Granularity::PerChannel));
    let all: [(&dyn Convention, &QLinear, &str); 20] = [
        (&Awq::default(), &rest, in_groups),
        (&gemv, &rest, in_groups),
        (&CompressedPacked::default(), &rest, in_groups),
        (
            &CompressedInt::default(),
            &large,
            "rows of 72 in groups of 128, only groups that divide rows",
        ),
        (&Fp8::default(), &channel, "scales (per channel), only blocks of 128 x 128"),
        (&CompressedFloat::default(), &f32_groups, "f32 scales (groups of 32)"),
        (&CompressedFloat::default(), &e5m2, "fp8 E5M2 codes, only fp8 E4M3"),
        (&Gptq::default(), &int5, "codes of 5 bits, only of 2, 3, 4 or 8"),
        (&Gptq::default(), &real, "real zero-points in f16"),
        (&Gptq::default(), &w8a8, "quantized activations"),
        (&Gptq::default(), &hadamard, "a transform of the input but a permutation"),
        (&Gptq::default(), &tensor, "scales (per tensor)"),
        (&Awq::default(), &int5, "codes of 5 bits, only of 4"),
        (&Awq::default(), &odd, "7 outputs, only multiples of 8"),
        (&gemv, &odd, "63 inputs, only multiples of 8"),
        (&int8, &int4, "anything but 8 bits, symmetric, a scale per channel"),
        (&CompressedInt::default(), &int4, "anything but codes of 8 bits"),
        (&CompressedInt::default(), &int8_only, "inputs in f32, which are for pack-quantized"),
        (&CompressedPacked::default(), &hadamard, "a transform of the input"),
        (&Ggml, &odd, "rows of 63 in Q4_0, only multiples of 32"),
    ];
    for (convention, layer, expected) in all {
        let error = convention.write(layer, "l").unwrap_err().to_string();
        assert_eq!(error, format!("layer l: {} cannot hold {expected}", convention.name()));
    }
}

#[test]
fn the_convention_is_found_in_the_configuration_that_it_writes() {
    let int4 = layer(64, 64, QuantScheme::affine(4, Granularity::PerGroup(32)));
    let int8 = layer(64, 64, QuantScheme::symmetric(8, Granularity::PerChannel));
    let w8a8 = int8.clone().with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let zero = ZeroFormat::Offset(ScaleFormat::F16);
    let offset = self::layer(8, 64, QuantScheme { zero, ..int4.weight().scheme() });
    let scales = ActivationScales::Static { scale: 0.5, zero_point: 0 };
    let fixed = ActivationScheme { dtype: ActivationType::Int8, scales };
    let fixed = int8.clone().with_activation(Some(fixed));
    let nf4 = levels(QuantType::NF4, Granularity::PerGroup(32), ScaleFormat::F32);
    let e4m3 = QuantType::Float(Format::F8E4M3);
    let fp8 = levels(e4m3, Granularity::PerBlock(32, 32), ScaleFormat::Bf16);
    let e2m1 = QuantType::Float(Format::F4E2M1);
    let mxfp4 = levels(e2m1, Granularity::PerGroup(32), ScaleFormat::E8m0);
    let two = ScaleFormat::TwoLevel(TwoLevel::NVFP4);
    let nvfp4 = levels(e2m1, Granularity::PerGroup(16), two);
    let float = |granularity, format| levels(e4m3, granularity, format);
    let tensor = float(Granularity::PerTensor, ScaleFormat::F32);
    let channel = float(Granularity::PerChannel, ScaleFormat::F16);
    let mxfp8 = float(Granularity::PerGroup(32), ScaleFormat::E8m0);
    let all: [(&dyn Convention, &QLinear); 18] = [
        (&CompressedFloat::default(), &tensor),
        (&CompressedFloat::default(), &channel),
        (&CompressedFloat { block: (32, 32) }, &fp8),
        (&CompressedFloat::default(), &mxfp8),
        (&Lowbit, &w8a8),
        (&Bnb4, &nf4),
        (&Fp8 { block: (32, 32), divides: false }, &fp8),
        (&Mxfp4, &mxfp4),
        (&GptOss { experts: 2 }, &mxfp4),
        (&Nvfp4 { reciprocal: false }, &nvfp4),
        (&Gptq::default(), &int4),
        (&Gptq { v2: true, ..Gptq::default() }, &int4),
        (&Awq::default(), &int4),
        (&Awq { version: AwqVersion::Gemv, group_size: None }, &int4),
        (&CompressedPacked::default(), &int4),
        (&CompressedInt { dynamic: false }, &fixed),
        (&CompressedInt { dynamic: true }, &w8a8),
        (&Mlx { bits: Some(4), group_size: Some(32) }, &offset),
    ];
    for (convention, layer) in all {
        let tensors = convention.write(layer, "l").unwrap();
        assert!(convention.holds(&tensors, "l"));
        // The experts of gpt-oss are under names of their own.
        let read = read(&convention.config(layer).unwrap(), &tensors).unwrap();
        assert_eq!(read, *layer, "{convention:?}");
    }
    for (config, expected) in [
        (json!({}), "quantization_config: it has no quant_method"),
        (
            json!({"quant_method": "quip"}),
            "quantization_config: tensors of the quant_method quip are",
        ),
        (
            json!({"quant_method": "gptq", "checkpoint_format": "marlin"}),
            "quantization_config: checkpoint_format of gptq is \"marlin\", expected \"gptq\" or",
        ),
        (
            json!({"quant_method": "awq", "version": "marlin"}),
            "quantization_config: version of awq is \"marlin\", expected \"gemm\" or \"gemv\"",
        ),
    ] {
        let error = QuantizationConfig::parse(&config).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

/// Every convention, and schemes that it holds.
fn conventions() -> Vec<(Box<dyn Convention>, Vec<QuantScheme>)> {
    let per = [Granularity::PerChannel, Granularity::PerGroup(32), Granularity::PerGroup(64)];
    let formats = [ScaleFormat::F16, ScaleFormat::Bf16, ScaleFormat::F32];
    let schemes = |bits: &[u8], zeros: &[ZeroFormat]| -> Vec<QuantScheme> {
        let mut all = Vec::new();
        for &bits in bits {
            for &zero in zeros {
                for (granularity, scale_format) in per.into_iter().zip(formats) {
                    let scheme = QuantScheme::symmetric(bits, granularity);
                    all.push(QuantScheme { zero, scale_format, ..scheme });
                }
            }
        }
        all
    };
    let (both, symmetric) = ([ZeroFormat::Midpoint, ZeroFormat::Int], [ZeroFormat::Midpoint]);
    let gguf = |bits, zero| QuantScheme {
        zero,
        ..QuantScheme::symmetric(bits, Granularity::PerGroup(32))
    };
    let offset = ZeroFormat::Offset(ScaleFormat::F16);
    let levels = |dtype, granularity, scale_format| QuantScheme {
        scale_format,
        ..QuantScheme::levels(dtype, granularity)
    };
    let e2m1 = QuantType::Float(Format::F4E2M1);
    let e4m3 = QuantType::Float(Format::F8E4M3);
    let nvfp4 = ScaleFormat::TwoLevel(TwoLevel::NVFP4);
    let group = Granularity::PerGroup;
    vec![
        (
            Box::new(Bnb4),
            vec![
                levels(QuantType::NF4, group(64), ScaleFormat::F32),
                levels(QuantType::FP4_BNB, group(32), ScaleFormat::F32),
            ],
        ),
        (Box::new(Mxfp4), vec![levels(e2m1, group(32), ScaleFormat::E8m0)]),
        (Box::new(GptOss { experts: 4 }), vec![levels(e2m1, group(32), ScaleFormat::E8m0)]),
        (Box::new(Nvfp4 { reciprocal: false }), vec![levels(e2m1, group(16), nvfp4)]),
        (
            Box::new(CompressedFloat { block: (4, 32) }),
            vec![
                levels(e4m3, Granularity::PerTensor, ScaleFormat::F32),
                levels(e4m3, Granularity::PerChannel, ScaleFormat::Bf16),
                levels(e4m3, Granularity::PerBlock(4, 32), ScaleFormat::F32),
                levels(e4m3, group(32), ScaleFormat::E8m0),
            ],
        ),
        (
            Box::new(Fp8::default()),
            vec![levels(e4m3, Granularity::PerBlock(128, 128), ScaleFormat::F32)],
        ),
        (
            Box::new(Lowbit),
            vec![
                levels(QuantType::AF4, group(32), ScaleFormat::TwoLevel(TwoLevel::BILEVEL4)),
                levels(e2m1, group(16), nvfp4),
                gguf(6, ZeroFormat::Real(ScaleFormat::Bf16)),
            ],
        ),
        (Box::new(Gptq { v2: true, ..Gptq::default() }), schemes(&[2, 3, 4, 8], &both)),
        (Box::new(Gptq::default()), schemes(&[2, 3, 4, 8], &symmetric)),
        (Box::new(Awq::default()), schemes(&[4], &both)),
        (Box::new(CompressedPacked::default()), schemes(&[1, 2, 3, 4, 5, 6, 7, 8], &both)),
        (Box::new(CompressedInt { dynamic: true }), schemes(&[8], &both)),
        (
            Box::new(Mlx { bits: Some(6), group_size: Some(32) }),
            vec![QuantScheme {
                zero: ZeroFormat::Offset(ScaleFormat::Bf16),
                scale_format: ScaleFormat::Bf16,
                ..QuantScheme::symmetric(6, Granularity::PerGroup(32))
            }],
        ),
        (
            Box::new(Ggml),
            vec![
                gguf(4, ZeroFormat::Midpoint),
                gguf(5, ZeroFormat::Midpoint),
                gguf(8, ZeroFormat::Midpoint),
                gguf(4, offset),
                gguf(5, offset),
                levels(QuantType::IQ4_NL, group(32), ScaleFormat::F16),
                levels(e2m1, group(32), ScaleFormat::E8m0),
            ],
        ),
    ]
}

/// With the inputs that a convention asks for.
fn with_inputs(convention: &dyn Convention, layer: QLinear) -> QLinear {
    let inputs = convention.name().ends_with("int-quantized");
    layer.with_activation(inputs.then_some(ActivationScheme::INT8_PER_TOKEN))
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        convention in 0..14_usize,
        scheme in any::<prop::sample::Index>(),
        rows in 1..5_usize,
        cols in 1..5_usize,
        seed: u32,
        bias: bool,
    ) {
        let (convention, schemes) = &conventions()[convention];
        // Rows of whole words and columns of whole groups, as the tools that write such files have.
        let (n, k) = (8 * rows, 64 * cols);
        let scheme = schemes[scheme.index(schemes.len())];
        let w = Mat::from_fn(n, k, |r, c| {
            let x = (r * k + c) as u32;
            (x.wrapping_mul(0x9e37_79b9).wrapping_add(seed) >> 8) as f32 / 16_777_216.0 - 0.4
        });
        let weight = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let bias = bias.then(|| (0..n).map(|i| i as f32).collect());
        let layer = with_inputs(&**convention, QLinear::new(weight).with_bias(bias).unwrap());
        let tensors = convention.write(&layer, "l").unwrap();
        prop_assert!(convention.holds(&tensors, "l"));
        let read = convention.read(&tensors, "l").unwrap();
        prop_assert_eq!(read.weight().dequantize(), layer.weight().dequantize());
        prop_assert_eq!(read.bias(), layer.bias());
        // A whole row in one group is one scale per channel, and zeros that are all the midpoint are
        // none: but for that, the same layer, and the same tensors.
        prop_assert_eq!(codes(read.weight()), codes(layer.weight()));
        prop_assert_eq!(read.weight().scales(), layer.weight().scales());
        prop_assert_eq!(convention.write(&read, "l").unwrap(), tensors);
    }

    #[test]
    fn codes_of_bitsandbytes_come_back_and_scales_almost(seed: u32, rows in 1..9_usize) {
        let w = Mat::from_fn(rows, 40, |r, c| ((r * 40 + c) as f32 + seed as f32).sin());
        for scale_format in [ScaleFormat::F32, ScaleFormat::F16, ScaleFormat::Bf16] {
            let scheme = QuantScheme::symmetric(8, Granularity::PerChannel);
            let weight = QMatrix::quantize(w.as_ref(), QuantScheme { scale_format, ..scheme });
            let layer = QLinear::new(weight.unwrap());
            let int8 = BnbInt8 { threshold: None };
            let read = int8.read(&int8.write(&layer, "l").unwrap(), "l").unwrap();
            prop_assert_eq!(read.weight().codes(), layer.weight().codes());
            for row in 0..rows {
                let (a, b) = (read.weight().params(row, 0).scale, layer.weight().params(row, 0).scale);
                prop_assert!(a.to_bits().abs_diff(b.to_bits()) <= 1, "{a} {b}");
            }
        }
    }

    #[test]
    fn wrong_tensors_are_errors(
        convention in 0..14_usize,
        scheme in any::<prop::sample::Index>(),
        tensor in any::<prop::sample::Index>(),
        shape in prop::collection::vec(prop_oneof![0..70_usize, Just(usize::MAX)], 0..4),
        dtype in 0..6_usize,
        what in 0..4_u8,
        fill: u8,
    ) {
        let (convention, schemes) = &conventions()[convention];
        let layer = layer(16, 64, schemes[scheme.index(schemes.len())]);
        let layer = with_inputs(&**convention, layer);
        let mut tensors = convention.write(&layer, "l").unwrap();
        let at = tensor.index(tensors.len());
        let types = [Dtype::F32, Dtype::F16, Dtype::I8, Dtype::I32, Dtype::I64, Dtype::U8];
        let broken = &mut tensors[at];
        match what {
            0 => broken.shape = shape,
            1 => broken.dtype = types[dtype],
            2 => broken.bytes.truncate(usize::from(fill)),
            _ => broken.bytes.fill(fill),
        }
        if what == 0 && let Some((weights, bytes)) = broken.dtype.block() {
            // In files the bytes fit the shape, so that what is behind this check is seen too.
            let len = broken.shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
            if let Some(len) = len.filter(|&len| len < 1 << 16) {
                broken.bytes.resize(len / weights * bytes, fill);
            }
        }
        if let Ok(layer) = convention.read(&tensors, "l") {
            let _ = layer.weight().dequantize();
        }
        tensors.remove(at);
        let _ = convention.read(&tensors, "l");
    }
}

#[test]
fn static_activations_keep_their_scale() {
    let scales = ActivationScales::Static { scale: 0.03, zero_point: 0 };
    let activation = Some(ActivationScheme { dtype: ActivationType::Int8, scales });
    let int8 = layer(16, 32, QuantScheme::symmetric(8, Granularity::PerTensor));
    let layer = int8.with_activation(activation);
    let convention = CompressedInt::default();
    assert_eq!(convention.read(&convention.write(&layer, "l").unwrap(), "l").unwrap(), layer);
}

#[test]
fn our_own_layout_loses_nothing() {
    let (n, k) = (20, 50);
    let two = |dtype, base, format| {
        ScaleFormat::TwoLevel(TwoLevel {
            dtype,
            granularity: Granularity::PerGroup(3),
            base,
            format,
        })
    };
    let int = |bits| QuantType::Int { bits };
    let odd = Format::new(3, 2, 4, lowbit_dtypes::Specials::None).unwrap();
    let table = QuantType::Table(Levels::new(&[-1.0, -0.1, 0.3, 1.0]).unwrap());
    let with = |zero, scheme| QuantScheme { zero, ..scheme };
    let group = |dtype, scale_format| QuantScheme {
        scale_format,
        ..QuantScheme::levels(dtype, Granularity::PerGroup(16))
    };
    let schemes = [
        QuantScheme::symmetric(3, Granularity::PerTensor),
        QuantScheme::affine(5, Granularity::PerBlock(3, 7)),
        with(ZeroFormat::Real(ScaleFormat::F32), QuantScheme::affine(2, Granularity::PerColumn)),
        with(
            ZeroFormat::Offset(ScaleFormat::Bf16),
            QuantScheme::affine(4, Granularity::PerChannel),
        ),
        with(
            ZeroFormat::Offset(two(int(6), Base::Minimum, StepFormat::F32)),
            group(int(4), two(int(6), Base::Zero, StepFormat::F16)),
        ),
        group(QuantType::Float(odd), ScaleFormat::E8m0),
        group(table, two(QuantType::Float(Format::F8E4M3), Base::Zero, StepFormat::Bf16)),
    ];
    let half = |x: f32| f16::from_f32(x);
    let known = Mat::from_fn(2, n, |r, c| half((r * n + c) as f32));
    let starts = (0..=n as u32).map(|r| r.min(3)).collect();
    let outliers = [
        None,
        Some(Outliers::Threshold(6.1)),
        Some(Outliers::Columns(OutlierColumns::new(vec![3, 49], known).unwrap())),
        Some(Outliers::Sparse(
            SparseRows::new(n, k, starts, vec![1, 7, 49], vec![half(0.5); 3]).unwrap(),
        )),
    ];
    let transforms = [
        vec![],
        vec![Transform::Scale((0..k).map(|j| 0.1 + j as f32).collect()), Transform::hadamard(k, 3)],
        vec![Transform::Permute((0..k as u32).rev().collect())],
    ];
    let activations = [
        None,
        Some(ActivationScheme::INT8_PER_TOKEN),
        Some(ActivationScheme {
            dtype: ActivationType::UInt8,
            scales: ActivationScales::Static { scale: 0.1, zero_point: 7 },
        }),
        Some(ActivationScheme {
            dtype: ActivationType::Float(Format::F8E4M3),
            scales: ActivationScales::PerTokenGroup(16),
        }),
        Some(ActivationScheme {
            dtype: ActivationType::Int16,
            scales: ActivationScales::PerTensor,
        }),
    ];
    let adapter =
        Adapter::new(Mat::from_fn(2, k, |_, c| c as f32), Mat::from_fn(n, 2, |r, _| r as f32));
    for i in 0..4 * 3 * 5 * 7 {
        let adapter = (i % 2 == 0).then(|| adapter.clone().unwrap());
        let layer = layer(n, k, schemes[i % 7])
            .with_transforms(transforms[i % 3].clone())
            .unwrap()
            .with_activation(activations[i % 5])
            .with_outliers(outliers[i % 4].clone())
            .and_then(|layer| layer.with_adapter(adapter))
            .and_then(|layer| layer.with_bias((i % 2 == 1).then(|| vec![0.3; n])))
            .unwrap();
        let tensors = Lowbit.write(&layer, "l").unwrap();
        assert_eq!(Lowbit.read(&tensors, "l").unwrap(), layer, "{i}");

        // Through a file, too.
        let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
        let mut bytes = Vec::new();
        lowbit_formats::write_safetensors(&mut bytes, &[], &views).unwrap();
        let file = lowbit_formats::Safetensors::new("f", bytes).unwrap();
        assert_eq!(Lowbit.read(&file, "l").unwrap(), layer, "{i}");
    }
}

#[test]
fn another_version_of_our_layout_is_refused() {
    let mut tensors =
        Lowbit.write(&layer(2, 2, QuantScheme::symmetric(8, Granularity::PerTensor)), "l").unwrap();
    let text = String::from_utf8(tensors[0].bytes.clone()).unwrap();
    tensors[0].bytes = text.replace(r#""version":1"#, r#""version":2"#).into_bytes();
    tensors[0].shape = vec![tensors[0].bytes.len()];
    let error = Lowbit.read(&tensors, "l").unwrap_err().to_string();
    assert_eq!(error, "memory: tensor l.lowbit: version 2, expected 1");
}

proptest! {
    #[test]
    fn any_header_of_our_layout_gives_a_result(at in any::<prop::sample::Index>(), byte: u8) {
        let layer = layer(4, 40, QuantScheme::affine(4, Granularity::PerGroup(16)))
            .with_transforms(vec![Transform::hadamard(40, 3)])
            .unwrap()
            .with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
        let mut tensors = Lowbit.write(&layer, "l").unwrap();
        let header = &mut tensors[0].bytes;
        let at = at.index(header.len());
        header[at] = byte;
        if let Ok(layer) = Lowbit.read(&tensors, "l") {
            let _ = layer.weight().dequantize();
        }
    }
}
