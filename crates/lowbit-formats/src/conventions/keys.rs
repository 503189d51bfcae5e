//! Every key of a configuration: used, harmless, or refused by its name.

use serde_json::{Map, Value};

use super::config::short;
use crate::{Error, Result};

/// What a key is to a reader of weights.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key {
    /// It says what the tensors leave open.
    Used,
    /// It says what the tensors show anyway, or how they came about.
    Harmless,
    /// Another value than these (JSON texts in lower case) would mean other weights than are read.
    Only(&'static [&'static str]),
}

use Key::{Harmless, Only, Used};

/// The keys of a kind of object.
pub(super) type Keys = &'static [(&'static str, Key)];

/// A method as `quant_method` calls it.
pub(super) struct Method {
    /// Its own name, and others under which its files go.
    pub(super) names: &'static [&'static str],
    pub(super) keys: Keys,
}

impl Method {
    /// The first of its names.
    pub(super) fn name(&self) -> &'static str {
        self.names[0]
    }
}

const NOTHING: Key = Only(&[]);
const FALSE: Key = Only(&["false"]);

pub(super) const GPTQ: Method = Method {
    names: &["gptq", "gptqmodel", "auto_gptq", "auto-gptq", "autogptq", "gptq_marlin", "gptq_v2"],
    keys: &[
        ("quant_method", Used),
        ("bits", Only(&["2", "3", "4", "8"])),
        ("group_size", Used),
        ("sym", Used),
        ("desc_act", Used),
        ("checkpoint_format", Only(&["\"gptq\"", "\"gptq_v2\""])),
        ("format", Only(&["\"gptq\"", "\"gptq_v2\""])),
        ("dynamic", Used),
        ("pack_dtype", Only(&["\"int32\"", "\"torch.int32\""])),
        ("is_marlin_format", FALSE),
        ("awq_gemm_checkpoint", FALSE),
        ("adapter", NOTHING),
        ("rotation", NOTHING),
        ("method", Harmless),
        ("lm_head", Harmless),
        ("static_groups", Harmless),
        ("act_group_aware", Harmless),
        ("hyb_act", Harmless),
        ("true_sequential", Harmless),
        ("damp_percent", Harmless),
        ("damp_auto_increment", Harmless),
        ("mse", Harmless),
        ("scale_search", Harmless),
        ("v2", Harmless),
        ("v2_alpha", Harmless),
        ("gptaq", Harmless),
        ("gptaq_alpha", Harmless),
        ("foem", Harmless),
        ("fallback", Harmless),
        ("failsafe", Harmless),
        ("failsafe_strategy", Harmless),
        ("meta", Harmless),
        ("pack_impl", Harmless),
        ("offload_to_disk", Harmless),
        ("offload_to_disk_path", Harmless),
        ("parallel_packing", Harmless),
        ("model_name_or_path", Harmless),
        ("model_file_base_name", Harmless),
        ("tokenizer", Harmless),
        ("dataset", Harmless),
        ("batch_size", Harmless),
        ("block_name_to_quantize", Harmless),
        ("modules_in_block_to_quantize", Harmless),
        ("module_name_preceding_first_block", Harmless),
        ("inside_layer_modules", Harmless),
        ("modules_to_not_convert", Harmless),
        ("backend", Harmless),
        ("use_cuda_fp16", Harmless),
        ("use_exllama", Harmless),
        ("disable_exllama", Harmless),
        ("exllama_config", Harmless),
        ("max_input_length", Harmless),
        ("cache_block_outputs", Harmless),
        ("cache_examples_on_gpu", Harmless),
        ("pad_token_id", Harmless),
        ("model_seqlen", Harmless),
        ("provider", Harmless),
        ("autoround_version", Harmless),
        ("data_type", Only(&["\"int\""])),
        ("packing_format", Used),
        ("iters", Harmless),
        ("nsamples", Harmless),
        ("seqlen", Harmless),
        ("lr", Harmless),
        ("minmax_lr", Harmless),
        ("enable_quanted_input", Harmless),
        ("enable_minmax_tuning", Harmless),
        ("low_gpu_mem_usage", Harmless),
        ("gradient_accumulate_steps", Harmless),
        ("scale_dtype", Harmless),
    ],
};

pub(super) const AWQ: Method = Method {
    names: &["awq", "autoawq", "auto_awq", "auto-awq", "llm-awq", "awq_marlin"],
    keys: &[
        ("quant_method", Used),
        ("bits", Only(&["4"])),
        ("w_bit", Only(&["4"])),
        ("group_size", Used),
        ("q_group_size", Used),
        // Which of the two it is, the shapes show.
        ("version", Only(&["\"gemm\"", "\"gemv\""])),
        ("format", Only(&["\"gemm\"", "\"gemv\""])),
        ("checkpoint_format", Only(&["\"gemm\"", "\"gemv\""])),
        ("pack_dtype", Only(&["\"int32\"", "\"torch.int32\""])),
        ("desc_act", FALSE),
        ("adapter", NOTHING),
        ("rotation", NOTHING),
        ("dynamic", Used),
        ("zero_point", Harmless),
        ("sym", Harmless),
        ("method", Harmless),
        ("lm_head", Harmless),
        ("modules_to_not_convert", Harmless),
        ("backend", Harmless),
        ("do_fuse", Harmless),
        ("fuse_max_seq_len", Harmless),
        ("modules_to_fuse", Harmless),
        ("exllama_config", Harmless),
        ("true_sequential", Harmless),
        ("static_groups", Harmless),
        ("damp_percent", Harmless),
        ("pack_impl", Harmless),
        ("meta", Harmless),
        ("provider", Harmless),
        ("model_name_or_path", Harmless),
        ("model_file_base_name", Harmless),
    ],
};

pub(super) const BITSANDBYTES: Method = Method {
    names: &["bitsandbytes", "bnb"],
    keys: &[
        ("quant_method", Used),
        ("llm_int8_threshold", Used),
        ("load_in_8bit", Used),
        ("_load_in_8bit", Used),
        ("load_in_4bit", Used),
        ("_load_in_4bit", Used),
        ("bnb_4bit_quant_type", Harmless),
        ("bnb_4bit_use_double_quant", Harmless),
        ("bnb_4bit_compute_dtype", Harmless),
        ("bnb_4bit_quant_storage", Harmless),
        ("bnb_4bit_blocksize", Harmless),
        ("llm_int8_enable_fp32_cpu_offload", Harmless),
        ("llm_int8_has_fp16_weight", Harmless),
        ("llm_int8_skip_modules", Harmless),
        ("modules_to_not_convert", Harmless),
    ],
};

pub(super) const COMPRESSED_TENSORS: Method = Method {
    names: &["compressed-tensors", "compressed_tensors"],
    keys: &[
        ("quant_method", Used),
        (
            "format",
            Only(&[
                "\"pack-quantized\"",
                "\"int-quantized\"",
                "\"float-quantized\"",
                "\"naive-quantized\"",
                "\"nvfp4-pack-quantized\"",
                "\"mxfp4-pack-quantized\"",
                "\"mxfp8-quantized\"",
                "\"mixed-precision\"",
                "\"dense\"",
            ]),
        ),
        ("config_groups", Used),
        ("kv_cache_scheme", Used),
        ("transform_config", Used),
        ("sparsity_config", Used),
        ("ignore", Harmless),
        ("quantization_status", Harmless),
        ("global_compression_ratio", Harmless),
        ("version", Harmless),
        ("run_compressed", Harmless),
        ("provider", Harmless),
        ("autoround_version", Harmless),
    ],
};

/// A member of `config_groups`.
pub(super) const CONFIG_GROUP: Keys = &[
    ("targets", Used),
    ("weights", Used),
    ("input_activations", Used),
    ("output_activations", Used),
    ("format", COMPRESSED_TENSORS.keys[1].1),
];

/// `weights` and `input_activations` of such a member.
pub(super) const QUANTIZATION_ARGS: Keys = &[
    ("num_bits", Used),
    ("type", Used),
    ("symmetric", Used),
    ("strategy", Used),
    ("group_size", Used),
    ("block_structure", Used),
    ("dynamic", Used),
    ("actorder", Used),
    ("scale_dtype", Harmless),
    ("zp_dtype", Harmless),
    ("observer", Harmless),
    ("observer_kwargs", Harmless),
];

/// A member of `transform_config.config_groups`.
pub(super) const TRANSFORM_SCHEME: Keys = &[
    ("type", Only(&["\"hadamard\"", "\"random-hadamard\""])),
    ("apply", Used),
    ("randomize", Used),
    ("head_dim", Used),
    ("block_size", Used),
    ("requires_grad", Harmless),
    ("precision", Harmless),
];

/// A member of its `apply`.
pub(super) const TRANSFORM_ARGS: Keys =
    &[("targets", Used), ("location", Used), ("inverse", Used), ("ignore", Used)];

pub(super) const FP8: Method = Method {
    names: &["fp8", "fbgemm_fp8", "ptpc_fp8", "finegrained_fp8", "mxfp8"],
    keys: &[
        ("quant_method", Used),
        ("weight_block_size", Used),
        ("weight_scale_semantics", Only(&["\"inverse\"", "\"multiply\"", "\"scale\""])),
        ("kv_cache_scheme", Used),
        ("kv_cache_quant_method", Used),
        ("activation_scheme", Only(&["\"dynamic\"", "\"static\"", "\"none\""])),
        ("activation_scale_ub", Harmless),
        (
            "fmt",
            Only(&[
                "\"e4m3\"",
                "\"e5m2\"",
                "\"e4m3fn\"",
                "\"float8_e4m3fn\"",
                "\"float8_e5m2\"",
                "\"torch.float8_e4m3fn\"",
                "\"torch.float8_e5m2\"",
            ]),
        ),
        (
            "format",
            Only(&["\"fp8\"", "\"e4m3\"", "\"e5m2\"", "\"float8_e4m3fn\"", "\"float8_e5m2\""]),
        ),
        (
            "checkpoint_format",
            Only(&["\"fp8\"", "\"e4m3\"", "\"e5m2\"", "\"float8_e4m3fn\"", "\"float8_e5m2\""]),
        ),
        ("bits", Only(&["8"])),
        ("adapter", NOTHING),
        ("rotation", NOTHING),
        ("weight_scale_method", Harmless),
        ("scale_fmt", Harmless),
        ("method", Harmless),
        ("lm_head", Harmless),
        ("modules_to_not_convert", Harmless),
        ("ignored_layers", Harmless),
        ("ignore", Harmless),
        ("dequantize", Harmless),
        ("group_size", Harmless),
        ("sym", Harmless),
        ("desc_act", Harmless),
        ("meta", Harmless),
        ("provider", Harmless),
    ],
};

pub(super) const MXFP4: Method = Method {
    names: &["mxfp4", "gpt_oss_mxfp4", "nvfp4"],
    keys: &[
        ("quant_method", Used),
        ("kv_cache_scheme", Used),
        ("modules_to_not_convert", Harmless),
        ("dequantize", Harmless),
        ("group_size", Harmless),
        ("bits", Only(&["4"])),
    ],
};

pub(super) const MODELOPT: Method = Method {
    names: &["modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"],
    keys: &[
        ("quant_method", Used),
        (
            "quant_algo",
            Only(&[
                "\"fp8\"",
                "\"fp8_per_channel_per_token\"",
                "\"fp8_pb_wo\"",
                "\"fp8_pb_real\"",
                "\"mxfp8\"",
                "\"nvfp4\"",
                "\"nvfp4_awq\"",
                "\"nvfp4_svdquant\"",
                "\"w4a16_nvfp4\"",
                "\"w4a8_nvfp4_fp8\"",
                "\"mxfp4\"",
                "\"w4a8_mxfp4_fp8\"",
                "\"mixed_precision\"",
            ]),
        ),
        ("kv_cache_quant_algo", Used),
        ("kv_cache_scheme", Used),
        ("quantization", Used),
        ("config_groups", Used),
        ("has_zero_point", FALSE),
        ("pre_quant_scale", Harmless),
        ("group_size", Harmless),
        ("awq_block_size", Harmless),
        ("smoothquant_val", Harmless),
        ("exclude_modules", Harmless),
        ("ignore", Harmless),
        ("quantized_layers", Harmless),
        ("producer", Harmless),
        ("version", Harmless),
    ],
};

pub(super) const AUTO_ROUND: Method = Method {
    names: &[
        "auto-round",
        "auto_round",
        "autoround",
        "intel/auto-round",
        "inc",
        "intel_neural_compressor",
    ],
    keys: &[
        ("quant_method", Used),
        ("bits", Used),
        ("group_size", Used),
        ("sym", Used),
        ("packing_format", Used),
        ("backend", Used),
        ("extra_config", Used),
        ("act_bits", Used),
        ("act_data_type", Used),
        ("rotation_config", NOTHING),
        ("hadamard_config", NOTHING),
        ("transform_config", NOTHING),
        ("data_type", Harmless),
        ("weight_format", Harmless),
        ("act_dynamic", Harmless),
        ("act_group_size", Harmless),
        ("act_sym", Harmless),
        ("super_bits", Harmless),
        ("super_group_size", Harmless),
        ("autoround_version", Harmless),
        ("block_name_to_quantize", Harmless),
        ("to_quant_block_names", Harmless),
        ("quant_block_list", Harmless),
        ("modules_to_not_convert", Harmless),
        ("batch_size", Harmless),
        ("iters", Harmless),
        ("lr", Harmless),
        ("minmax_lr", Harmless),
        ("momentum", Harmless),
        ("seqlen", Harmless),
        ("nsamples", Harmless),
        ("dataset", Harmless),
        ("seed", Harmless),
        ("amp", Harmless),
        ("scheme", Harmless),
        ("model_free", Harmless),
        ("enable_quanted_input", Harmless),
        ("enable_minmax_tuning", Harmless),
        ("enable_norm_bias_tuning", Harmless),
        ("enable_alg_ext", Harmless),
        ("low_gpu_mem_usage", Harmless),
        ("low_cpu_mem_usage", Harmless),
        ("gradient_accumulate_steps", Harmless),
        ("not_use_best_mse", Harmless),
        ("dynamic_max_gap", Harmless),
        ("scale_dtype", Harmless),
        ("supported_types", Harmless),
        ("static_kv_dtype", Harmless),
        ("damp_percent", Harmless),
        ("true_sequential", Harmless),
        ("desc_act", FALSE),
        ("provider", Harmless),
    ],
};

pub(super) const QUARK: Method = Method {
    names: &["quark"],
    keys: &[
        ("quant_method", Used),
        ("global_quant_config", Used),
        ("layer_quant_config", Used),
        ("layer_type_quant_config", Used),
        ("kv_cache_quant_config", Used),
        ("softmax_quant_spec", NOTHING),
        ("export", Harmless),
        ("exclude", Harmless),
        ("algo_config", Harmless),
        ("quant_mode", Harmless),
        ("kv_cache_group", Harmless),
        ("kv_cache_post_rope", Harmless),
        ("kv_cache_quant_config_post_rope", Harmless),
        ("min_kv_scale", Harmless),
        ("version", Harmless),
    ],
};

pub(super) const MLX: Method = Method {
    names: &["mlx"],
    keys: &[
        ("quant_method", Used),
        ("bits", Only(&["2", "3", "4", "5", "6", "8"])),
        ("group_size", Used),
        ("mode", Only(&["\"affine\"", "\"mxfp4\"", "\"mxfp8\"", "\"nvfp4\""])),
    ],
};

pub(super) const LOWBIT: Method = Method { names: &["lowbit"], keys: &[("quant_method", Used)] };

pub(super) const METHODS: [&Method; 11] = [
    &GPTQ,
    &AWQ,
    &BITSANDBYTES,
    &COMPRESSED_TENSORS,
    &FP8,
    &MXFP4,
    &MODELOPT,
    &AUTO_ROUND,
    &QUARK,
    &MLX,
    &LOWBIT,
];

/// Methods whose tensors this crate does not read.
pub(super) const REFUSED: [&str; 23] = [
    "aqlm",
    "bitblas",
    "bitnet",
    "eetq",
    "exl2",
    "exl3",
    "exllamav2",
    "exllamav3",
    "fp_quant",
    "gguf",
    "higgs",
    "hqq",
    "marlin",
    "paroquant",
    "qqq",
    "quanto",
    "quip",
    "qvq",
    "sinq",
    "spqr",
    "squeezellm",
    "torchao",
    "vptq",
];

/// Every key of `map`: used, harmless or of a known value. `owner` is what messages call the object.
pub(super) fn check(map: &Map<String, Value>, keys: &[Keys], owner: &str) -> Result<()> {
    for (name, value) in map {
        if is_nothing(value) {
            continue;
        }
        let found = keys.iter().copied().flatten().find(|(key, _)| key == name);
        let reason = match found {
            Some((_, Used | Harmless)) => continue,
            Some((_, Only(values))) => {
                if values.contains(&value.to_string().to_lowercase().as_str()) {
                    continue;
                }
                match values {
                    [] => format!(
                        "{name} of {owner} is {}, expected nothing: such weights are not read",
                        short(value)
                    ),
                    _ => format!(
                        "{name} of {owner} is {}, expected {}",
                        short(value),
                        values.join(" or ")
                    ),
                }
            }
            None => format!(
                "the key {name} of {owner} is not known (its value is {}), and might mean other weights: \
                 remove it if it does not",
                short(value)
            ),
        };
        return Err(Error::Config { reason });
    }
    Ok(())
}

/// Does a value ask for nothing?
pub(super) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(x) => !x,
        Value::String(x) => x.is_empty(),
        Value::Array(x) => x.is_empty(),
        Value::Object(x) => x.is_empty(),
        Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conventions::read::{CACHE_SCALES, INPUT_SCALES};

    /// The documentation lies outside of the package.
    #[test]
    fn the_documentation_lists_every_key_and_tensor() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats.md");
        let Ok(docs) = std::fs::read_to_string(docs) else {
            return println!("skipped: {docs} is not there");
        };
        let row = |name: &str| {
            let start = format!("| `{name}`");
            docs.lines().find(|line| line.starts_with(&start) && line.contains("| `quant_method`"))
        };
        for method in METHODS {
            let row = row(method.name()).unwrap_or_else(|| panic!("no row of {}", method.name()));
            for name in method.keys.iter().map(|(key, _)| key).chain(method.names) {
                assert!(row.contains(&format!("`{name}`")), "{name} of {}", method.name());
            }
        }
        let others = [CONFIG_GROUP, QUANTIZATION_ARGS, TRANSFORM_SCHEME, TRANSFORM_ARGS];
        let others = others.into_iter().flatten().map(|(key, _)| key);
        for name in others.chain(&REFUSED).chain(&INPUT_SCALES).chain(&CACHE_SCALES) {
            assert!(docs.contains(&format!("`{name}`")), "{name}");
        }
    }
}
