//! Models of the Llama family in GGUF: the names, the order of rows and the metadata of llama.cpp.
//!
//! In architecture `llama` the rows of q and k are sorted for rotary pairs of neighbours: row `2i + s` of a
//! head is row `i + s·dim/2` of the checkpoint. In `qwen2`, for models with a bias on q, k and v, rows stay
//! where they are.

use lowbit::formats::{
    Tensor, TensorView,
    gguf::{Array, Value},
};
use serde_json::Value as Json;

use crate::{Config, Error, Result};

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
        () if config.qkv_bias => None,
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

/// A tensor of a checkpoint as it is in GGUF, but for its name: q and k sorted, norms in f32. `None` if it
/// is the same.
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
    Ok(match sorted_heads(config, view.name) {
        Some(heads) => Some(sort_rows(view, heads, false).ok_or_else(invalid)?),
        None if view.shape.len() == 1 => {
            Some(Tensor::f32(view.name, view.shape.to_vec(), &view.to_f32()?))
        }
        None => None,
    })
}

/// What llama.cpp wants to know of a model beside its tensors.
///
/// # Errors
/// [`Error::Invalid`] for a tokenizer that is no byte-pair encoding, and for rotary frequencies that are
/// scaled, which this does not write.
pub fn metadata(
    name: &str,
    config: &Config,
    tokenizer: &[u8],
) -> Result<Vec<(String, Value<'static>)>> {
    let invalid = |what: &str| Error::Invalid(format!("GGUF: {what}"));
    if config.rope_scaling.is_some() || config.rope_factors.is_some() {
        return Err(invalid("rotary frequencies that are scaled are not supported"));
    }
    let text = |text: &str| Value::String(text.as_bytes().to_vec().into());
    let number = |x: usize| Value::U32(x as u32);
    let architecture = if config.qkv_bias { "qwen2" } else { "llama" };
    let mut all = vec![
        ("general.architecture".into(), text(architecture)),
        ("general.name".into(), text(name)),
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    let hidden = config.hidden_size;
    for (key, value) in [
        ("block_count", number(config.num_hidden_layers)),
        ("context_length", number(config.max_position_embeddings)),
        ("embedding_length", number(hidden)),
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
        all.push((format!("{architecture}.{key}"), value));
    }
    all.extend(tokens(config, tokenizer).ok_or_else(|| invalid("expected a BPE tokenizer"))?);
    Ok(all)
}

/// Tokens, their types and the merges, of tokenizer.json.
fn tokens(config: &Config, tokenizer: &[u8]) -> Option<Vec<(String, Value<'static>)>> {
    /// Types of tokens in llama.cpp.
    const NORMAL: i32 = 1;
    const UNKNOWN: i32 = 2;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    const BYTE: i32 = 6;

    let json: Json = serde_json::from_slice(tokenizer).ok()?;
    let model = json.get("model")?;
    let vocab = model.get("vocab")?.as_object()?;
    let mut tokens = vec![(String::new(), UNUSED); config.vocab_size];
    let mut set = |id: &Json, token: &str, kind: i32| {
        let at = id.as_u64().and_then(|id| usize::try_from(id).ok())?;
        *tokens.get_mut(at)? = (token.into(), kind);
        Some(())
    };
    let fallback = model.get("byte_fallback").and_then(Json::as_bool).unwrap_or(false);
    let unknown = model.get("unk_token").and_then(Json::as_str);
    for (token, id) in vocab {
        let byte = fallback && token.len() == 6 && token.starts_with("<0x");
        let kind = match () {
            () if byte => BYTE,
            () if Some(token.as_str()) == unknown => UNKNOWN,
            () => NORMAL,
        };
        set(id, token, kind);
    }
    for added in json.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
        let special = added.get("special").and_then(Json::as_bool) == Some(true);
        let content = added.get("content")?.as_str()?;
        set(added.get("id")?, content, if special { CONTROL } else { NORMAL });
    }
    let string = |text: &str| Value::String(text.as_bytes().to_vec().into());
    let array = |items: Vec<Value<'static>>| Array::new(&items).map(Value::Array);
    let names = tokens.iter().enumerate().map(|(id, (token, _))| match token.as_str() {
        "" => string(&format!("[PAD{id}]")),
        token => string(token),
    });
    let mut all = vec![
        ("tokenizer.ggml.model".into(), string(if fallback { "llama" } else { "gpt2" })),
        ("tokenizer.ggml.pre".into(), string("default")),
        ("tokenizer.ggml.tokens".into(), array(names.collect())?),
        (
            "tokenizer.ggml.token_type".into(),
            array(tokens.iter().map(|(_, kind)| Value::I32(*kind)).collect())?,
        ),
    ];
    let merges = model.get("merges").and_then(Json::as_array)?;
    let merges: Option<Vec<String>> = merges
        .iter()
        .map(|merge| match merge {
            Json::String(merge) => Some(merge.clone()),
            pair => Some(format!("{} {}", pair.get(0)?.as_str()?, pair.get(1)?.as_str()?)),
        })
        .collect();
    if fallback {
        // A score for each token: the sooner its merge, the higher.
        let mut scores = vec![0.0; tokens.len()];
        for (rank, merge) in merges?.iter().enumerate() {
            let id = vocab.get(&merge.replacen(' ', "", 1)).and_then(Json::as_u64);
            if let Some(score) = id.and_then(|id| scores.get_mut(id as usize)) {
                *score = -(rank as f32);
            }
        }
        let scores = scores.into_iter().map(Value::F32).collect();
        all.push(("tokenizer.ggml.scores".into(), array(scores)?));
    } else {
        let merges: Vec<_> = merges?.iter().map(|merge| string(merge)).collect();
        all.extend(array(merges).map(|merges| ("tokenizer.ggml.merges".to_string(), merges)));
    }
    if let Some(bos) = config.bos_token_id {
        all.push(("tokenizer.ggml.bos_token_id".into(), Value::U32(bos)));
    }
    if let Some(&eos) = config.eos_token_id.first() {
        all.push(("tokenizer.ggml.eos_token_id".into(), Value::U32(eos)));
    }
    Some(all)
}
