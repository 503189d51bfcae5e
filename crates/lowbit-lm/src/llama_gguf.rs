//! Models of the Llama family in GGUF: the names, the order of rows and the metadata of llama.cpp.
//!
//! In architecture `llama` the rows of q and k are sorted for rotary pairs of neighbours: row `2i + s` of a
//! head is row `i + s·dim/2` of the checkpoint. Their biases go with
//! them. In `qwen2` rows stay where they are.

use lowbit::formats::{Tensor, TensorView, gguf::Value};

pub use crate::gguf_vocabulary::Texts;
use crate::{
    Architecture, Config, Error, Result, RopeScaling,
    gguf_vocabulary::{self, Vocabulary},
    rope,
};

/// Names without their block: in a checkpoint, in GGUF.
const NAMES: [(&str, &str); 12] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
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

/// The name of a checkpoint's tensor in GGUF; `None` if llama.cpp has no place for it.
///
/// # Example
/// ```
/// use lowbit_lm::llama_gguf;
///
/// let name = llama_gguf::gguf_name("model.layers.3.mlp.up_proj.weight");
/// assert_eq!(name.as_deref(), Some("blk.3.ffn_up.weight"));
/// ```
pub fn gguf_name(name: &str) -> Option<String> {
    rename(name, "model.layers.", "blk.", |(checkpoint, gguf)| (*checkpoint, *gguf))
}

pub(crate) fn checkpoint_name(name: &str) -> Option<String> {
    rename(name, "blk.", "model.layers.", |(checkpoint, gguf)| (*gguf, *checkpoint))
}

fn rename<'a>(
    name: &str,
    from: &str,
    to: &str,
    pair: impl Fn(&'a (&'a str, &'a str)) -> (&'a str, &'a str),
) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let block = stem.strip_prefix(from).and_then(|rest| rest.split_once('.'));
    let (prefix, part) = match block {
        Some((index, part)) => (format!("{to}{index}."), part),
        None => (String::new(), stem),
    };
    let (_, new) = NAMES.iter().map(pair).find(|(known, _)| *known == part)?;
    Some(format!("{prefix}{new}.{kind}"))
}

/// The heads of q or k, if `name` is a tensor of theirs in a model whose rows are sorted.
fn sorted_heads(config: &Config, name: &str) -> Option<usize> {
    let of = |part: &str| name.contains(&format!(".self_attn.{part}."));
    match () {
        () if architecture(config) == QWEN2 => None,
        () if of("q_proj") => Some(config.num_attention_heads),
        () if of("k_proj") => Some(config.num_key_value_heads),
        () => None,
    }
}

/// Rows in the order of llama.cpp, or back to that of the checkpoint.
pub(crate) fn sort_rows(view: TensorView<'_>, heads: usize, back: bool) -> Option<Tensor> {
    let rows = *view.shape.first()?;
    let dim = rows.checked_div(heads).filter(|dim| dim.is_multiple_of(2) && dim * heads == rows)?;
    let row = view.bytes.len().checked_div(rows).filter(|row| row * rows == view.bytes.len())?;
    let mut bytes = Vec::with_capacity(view.bytes.len());
    for head in 0..heads {
        for at in 0..dim {
            let place = match back {
                false => at / 2 + at % 2 * (dim / 2),
                true => at % (dim / 2) * 2 + at / (dim / 2),
            };
            bytes.extend_from_slice(view.bytes.get((head * dim + place) * row..)?.get(..row)?);
        }
    }
    Some(Tensor::new(view.name, view.dtype, view.shape.to_vec(), bytes))
}

/// A tensor of a checkpoint as it is in GGUF, but for its name: q and k sorted, norms and biases in f32. `None`
/// if it is the same.
///
/// # Errors
/// [`Error::Invalid`] if the rows of q or k do not make heads, [`Error::Format`] if a norm is no tensor of
/// floats.
///
/// # Example
/// ```no_run
/// use lowbit::formats::TensorSource;
/// use lowbit_lm::{Checkpoint, llama_gguf};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let embedding = checkpoint.tensors().tensor("model.embed_tokens.weight")?;
/// assert!(llama_gguf::to_gguf(checkpoint.config(), embedding)?.is_none());
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
pub fn to_gguf(config: &Config, view: TensorView<'_>) -> Result<Option<Tensor>> {
    let invalid = || Error::Invalid(format!("{}: its rows do not make heads", view.name));
    let float = |view: TensorView<'_>| -> Result<Tensor> {
        Ok(Tensor::f32(view.name, view.shape.to_vec(), &view.to_f32()?))
    };
    let vector = view.shape.len() == 1;
    Ok(match sorted_heads(config, view.name) {
        Some(heads) => {
            let sorted = sort_rows(view, heads, false).ok_or_else(invalid)?;
            Some(if vector { float(sorted.view())? } else { sorted })
        }
        None if vector => Some(float(view)?),
        None => None,
    })
}

/// What a GGUF file holds of a model beside its own tensors.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Metadata {
    /// Keys and their values, in the order of the file.
    pub keys: Vec<(String, Value<'static>)>,
    /// Tensors that no checkpoint has, under their names in GGUF: the factors of scaled rotary frequencies.
    pub tensors: Vec<Tensor>,
    /// Where llama.cpp will not do as the model does, in plain words.
    pub substitutions: Vec<String>,
}

/// What llama.cpp wants to know of a model beside its tensors. It fails before there is any work to lose:
/// call it first.
///
/// # Errors
/// [`Error::Invalid`] for what llama.cpp cannot hold: a tokenizer that is no byte-pair encoding, biases or
/// rotary frequencies that an architecture has no place for. [`Error::File`] for a text that is damaged.
///
/// # Example
/// ```no_run
/// use lowbit_lm::{Checkpoint, llama_gguf::{Texts, metadata}};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let tokenizer = std::fs::read("models/stories3m/tokenizer.json").expect("a file");
/// let texts = Texts { tokenizer: &tokenizer, ..Texts::default() };
/// let metadata = metadata("stories3m", checkpoint.config(), &texts)?;
/// assert_eq!(metadata.keys[0].1.as_str(), Some("llama"));
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
pub fn metadata(name: &str, config: &Config, texts: &Texts<'_>) -> Result<Metadata> {
    let text = |text: &str| Value::String(text.as_bytes().to_vec().into());
    let number = |x: usize| Value::U32(x as u32);
    let architecture = architecture(config);
    if architecture == QWEN2 && (config.o_bias || config.mlp_bias) {
        let what = "architecture qwen2 has no place for biases of o, gate, up and down";
        return Err(Error::Invalid(format!("GGUF: {what}; choose another --format")));
    }
    let mut keys = vec![
        ("general.architecture".into(), text(architecture)),
        ("general.type".into(), text("model")),
        ("general.name".into(), text(name)),
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    for (key, value) in [
        ("block_count", number(config.num_hidden_layers)),
        ("context_length", number(config.max_position_embeddings)),
        ("embedding_length", number(config.hidden_size)),
        ("feed_forward_length", number(config.intermediate_size)),
        ("attention.head_count", number(config.num_attention_heads)),
        ("attention.head_count_kv", number(config.num_key_value_heads)),
        ("attention.key_length", number(config.head_dim)),
        ("attention.value_length", number(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps)),
        ("rope.freq_base", Value::F32(config.rope_theta)),
        ("rope.dimension_count", number(config.head_dim)),
        ("vocab_size", number(config.vocab_size)),
    ] {
        keys.push((format!("{architecture}.{key}"), value));
    }
    let (scaling, factors) = rope(config)?;
    keys.extend(scaling.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)));
    let Vocabulary { keys: vocabulary, substitutions } = gguf_vocabulary::of(config, texts)?;
    keys.extend(vocabulary);
    let tensors = factors.map(|all| Tensor::f32("rope_freqs.weight", vec![all.len()], &all));
    Ok(Metadata { keys, tensors: tensors.into_iter().collect(), substitutions })
}

/// The architecture in which the rows of q and k stay where they are.
const QWEN2: &str = "qwen2";

/// What llama.cpp calls this model; Mistral is a Llama there.
fn architecture(config: &Config) -> &'static str {
    match config.architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => QWEN2,
    }
}

/// Keys of rotary frequencies that are scaled, or what each of them is divided by.
type RopeKeys = (Vec<(&'static str, Value<'static>)>, Option<Vec<f32>>);

fn rope(config: &Config) -> Result<RopeKeys> {
    let text = |text: &'static str| Value::from(text);
    let refuse = |what: &str| Err(Error::Invalid(format!("GGUF: {what}; choose another --format")));
    if let Some(factors) = &config.rope_factors {
        return Ok((vec![], Some(factors.clone())));
    }
    Ok(match config.rope_scaling {
        None => (vec![], None),
        Some(RopeScaling::Linear(factor)) => (
            vec![
                ("rope.scaling.type", text("linear")),
                ("rope.scaling.factor", Value::F32(factor)),
            ],
            None,
        ),
        Some(RopeScaling::Llama3(_)) if architecture(config) == QWEN2 => {
            return refuse("architecture qwen2 has no place for rope_scaling of the type llama3");
        }
        Some(RopeScaling::Llama3(scaling)) => {
            let frequencies = rope::unscaled(config);
            (vec![], Some(frequencies.map(|frequency| scaling.divisor(frequency)).collect()))
        }
        Some(RopeScaling::Yarn(yarn)) if !yarn.truncate => {
            return refuse("YaRN interpolates between whole pairs, so truncate must be true");
        }
        Some(RopeScaling::Yarn(yarn)) => {
            let mut keys = vec![
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", Value::F32(yarn.factor)),
                (
                    "rope.scaling.original_context_length",
                    Value::U32(yarn.original_max_position_embeddings as u32),
                ),
                ("rope.scaling.yarn_beta_fast", Value::F32(yarn.beta_fast)),
                ("rope.scaling.yarn_beta_slow", Value::F32(yarn.beta_slow)),
            ];
            // llama.cpp multiplies by the paper's factor itself.
            let attention = yarn.attention_factor / (1.0 + 0.1 * yarn.factor.ln());
            if (attention - 1.0).abs() > 1e-6 {
                keys.push(("rope.scaling.attn_factor", Value::F32(attention)));
            }
            (keys, None)
        }
    })
}
