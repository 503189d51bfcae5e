//! A tokenizer.json as the metadata of a GGUF file.
//!
//! | tokenizer.json | `tokenizer.ggml.model` | |
//! |---|---|---|
//! | BPE over bytes | `gpt2` | `merges`; `pre` names the way to split a text into words |
//! | BPE with byte_fallback | `llama` | a score for each token, from the rank of the merge that makes it |
//!
//! llama.cpp has no place for any other way from a text to tokens. Where a BPE differs in what comes before
//! its merges, the file is written, since tokens that somebody else makes of a text are right, and what
//! differs is a substitution. Other kinds of models are refused.

use std::collections::{BTreeMap, BTreeSet};

use lowbit::formats::gguf::{Array, Value};
use serde_json::Value as Json;

use crate::{Config, Error, Result, pre_tokenizer};

/// The files of a model that say how it sees a text.
///
/// # Example
/// ```
/// use lowbit_lm::llama_gguf::Texts;
///
/// let texts = Texts { tokenizer: br#"{"model": {"type": "BPE"}}"#, ..Texts::default() };
/// assert!(texts.chat_template.is_none());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Texts<'a> {
    /// tokenizer.json.
    pub tokenizer: &'a [u8],
    /// tokenizer_config.json.
    pub tokenizer_config: Option<&'a [u8]>,
    /// chat_template.jinja, which counts more than the template in tokenizer_config.json.
    pub chat_template: Option<&'a [u8]>,
}

/// Keys and values, and what llama.cpp does otherwise.
pub(crate) struct Vocabulary {
    pub(crate) keys: Vec<(String, Value<'static>)>,
    pub(crate) substitutions: Vec<String>,
}

/// Types of tokens in llama.cpp.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What sentencepiece writes for a space.
const SPACE: &str = "\u{2581}";

/// # Errors
/// [`Error::Invalid`] for a tokenizer that llama.cpp has nothing like.
pub(crate) fn of(config: &Config, texts: &Texts<'_>) -> Result<Vocabulary> {
    let json = parse("tokenizer.json", texts.tokenizer)?;
    let settings = match texts.tokenizer_config {
        Some(settings) => parse("tokenizer_config.json", settings)?,
        None => Json::Null,
    };
    let model = &json["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    let Some(vocab) = model["vocab"].as_object().filter(|_| kind == "BPE") else {
        return Err(invalid(&format!(
            "cannot hold the tokenizer, which is {kind}: expected BPE; choose another --format"
        )));
    };
    let merges = merges(&model["merges"])
        .ok_or_else(|| invalid("tokenizer.json: expected a list of pairs in merges"))?;
    let mut writer = Writer { config, json: &json, keys: Vec::new(), substitutions: Vec::new() };
    let spm = model["byte_fallback"] == true;
    let tokens = writer.tokens(vocab, spm)?;
    if spm {
        writer.sentencepiece(&tokens, &merges);
    } else {
        writer.byte_level(&merges);
    }
    writer.special_tokens(&settings, &tokens);
    writer.chat_template(&settings, texts.chat_template)?;
    let Writer { keys, substitutions, .. } = writer;
    Ok(Vocabulary { keys, substitutions })
}

fn invalid(what: &str) -> Error {
    Error::Invalid(format!("GGUF: {what}"))
}

fn parse(file: &str, json: &[u8]) -> Result<Json> {
    serde_json::from_slice(json).map_err(|e| Error::File {
        file: file.into(),
        reason: format!("expected a JSON text, but {e}"),
    })
}

/// Pairs of tokens, which older files write with a space between.
fn merges(json: &Json) -> Option<Vec<(&str, &str)>> {
    let all = json.as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter()
        .map(|merge| match merge {
            // A space may be the first token itself.
            Json::String(text) => {
                let second = text.char_indices().nth(1)?.0;
                let space = second + text[second..].find(' ')?;
                Some((&text[..space], &text[space + 1..]))
            }
            pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
        })
        .collect()
}

fn text(text: &str) -> Value<'static> {
    Value::String(text.as_bytes().to_vec().into())
}

struct Tokens {
    ids: BTreeMap<String, usize>,
    kinds: Vec<i32>,
}

struct Writer<'a> {
    config: &'a Config,
    json: &'a Json,
    keys: Vec<(String, Value<'static>)>,
    substitutions: Vec<String>,
}

impl Writer<'_> {
    fn put(&mut self, key: &str, value: Value<'static>) {
        self.keys.push((format!("tokenizer.ggml.{key}"), value));
    }

    fn numbers(&mut self, key: &str, numbers: impl Iterator<Item = Value<'static>>) {
        if let Some(array) = Array::new(&numbers.collect::<Vec<_>>()) {
            self.put(key, Value::Array(array));
        }
    }

    fn note(&mut self, what: impl std::fmt::Display) {
        self.substitutions.push(format!("tokenizer in llama.cpp: {what}"));
    }

    /// The tokens and their types.
    fn tokens(&mut self, vocab: &serde_json::Map<String, Json>, spm: bool) -> Result<Tokens> {
        let unknown = self.json["model"]["unk_token"].as_str();
        let mut all: Vec<(Option<String>, i32)> = vec![(None, UNUSED); self.config.vocab_size];
        let mut outside = Vec::new();
        let mut set = |id: &Json, token: &str, kind: i32| match id
            .as_u64()
            .and_then(|id| all.get_mut(usize::try_from(id).ok()?))
        {
            Some(place) => *place = (Some(token.into()), kind),
            None => outside.push(token.to_string()),
        };
        for (token, id) in vocab {
            let kind = match () {
                () if Some(token.as_str()) == unknown => UNKNOWN,
                () if spm && is_byte(token) => BYTE,
                () => NORMAL,
            };
            set(id, token, kind);
        }
        let mut strips = false;
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let Some(token) = added["content"].as_str() else {
                return Err(invalid("tokenizer.json: expected a text in content of added_tokens"));
            };
            strips |= ["lstrip", "rstrip", "single_word"].iter().any(|key| added[key] == true);
            match added["special"] == true {
                true if Some(token) == unknown => set(&added["id"], token, UNKNOWN),
                true => set(&added["id"], token, CONTROL),
                // Looked for in the text as it is, before spaces become anything else.
                false => set(&added["id"], &token.replace(SPACE, " "), USER_DEFINED),
            }
        }
        if strips {
            self.note("added tokens take no spaces with them, nor stand for whole words only");
        }
        if let Some(first) = outside.first() {
            let (count, size) = (outside.len(), self.config.vocab_size);
            self.note(format!("{count} tokens beyond vocab_size, {size}, are left out: {first}"));
        }
        let name = |(id, (token, _)): (usize, &(Option<String>, i32))| {
            token.clone().unwrap_or_else(|| format!("[PAD{id}]"))
        };
        let names: Vec<String> = all.iter().enumerate().map(name).collect();
        let mut ids = BTreeMap::new();
        for (id, token) in names.iter().enumerate() {
            if let Some(other) = ids.insert(token.clone(), id) {
                return Err(invalid(&format!(
                    "cannot hold the tokenizer: tokens {other} and {id} are both {token:?}"
                )));
            }
        }
        self.put("model", text(if spm { "llama" } else { "gpt2" }));
        self.put("tokens", Value::Array(Array::strings(names.iter().map(String::as_str))));
        let kinds: Vec<i32> = all.into_iter().map(|(_, kind)| kind).collect();
        self.numbers("token_type", kinds.iter().map(|kind| Value::I32(*kind)));
        Ok(Tokens { ids, kinds })
    }

    /// A piece becomes what its neighbours merge into as soon as no other piece has a higher score: the
    /// sooner its merge, the higher.
    fn sentencepiece(&mut self, tokens: &Tokens, merges: &[(&str, &str)]) {
        self.put("pre", text("default"));
        let last = -(merges.len() as f32);
        let mut scores = vec![last; tokens.kinds.len()];
        // Where a piece can be made in several ways, the first of them counts.
        for (rank, (left, right)) in merges.iter().enumerate().rev() {
            let id = tokens.ids.get(&format!("{left}{right}"));
            if let Some(score) = id.and_then(|&id| scores.get_mut(id)) {
                *score = -(rank as f32);
            }
        }
        self.numbers("scores", scores.into_iter().map(Value::F32));
        let bytes = tokens.kinds.iter().filter(|kind| **kind == BYTE).count();
        if bytes < 256 {
            self.note(format!("{} bytes have no token of their own", 256 - bytes));
        }
        let (spaces, prefix) = self.spaces();
        if !spaces {
            let (normalizer, pre) = (&self.json["normalizer"], &self.json["pre_tokenizer"]);
            let what = format!("spaces become {SPACE}, whatever {normalizer} and {pre} do");
            self.note(what);
        }
        self.put("add_space_prefix", Value::Bool(prefix));
    }

    /// Do spaces become ▁ and nothing else change, and is there one more in front of a text?
    fn spaces(&self) -> (bool, bool) {
        let list = |json: &Json, steps: &str| match json {
            Json::Null => Vec::new(),
            json if json["type"] == "Sequence" => {
                json[steps].as_array().cloned().unwrap_or_default()
            }
            json => vec![json.clone()],
        };
        let (mut known, mut replaced, mut prefix) = (true, false, false);
        for step in list(&self.json["normalizer"], "normalizers") {
            match step["type"].as_str() {
                Some("Prepend") if step["prepend"] == SPACE => prefix = true,
                Some("Replace") if step["pattern"]["String"] == " " && step["content"] == SPACE => {
                    replaced = true;
                }
                _ => known = false,
            }
        }
        for step in list(&self.json["pre_tokenizer"], "pretokenizers") {
            match step["type"].as_str() {
                Some("Metaspace") if step["replacement"] == SPACE => {
                    replaced = true;
                    // Older files say whether, newer ones when.
                    let scheme = step["prepend_scheme"].as_str();
                    prefix |= match scheme {
                        Some(scheme) => scheme != "never",
                        None => step["add_prefix_space"] != false,
                    };
                }
                // There are no spaces left to split at.
                Some("Split") if replaced && step["pattern"]["String"] == " " => {}
                _ => known = false,
            }
        }
        (known && replaced, prefix)
    }

    fn byte_level(&mut self, merges: &[(&str, &str)]) {
        let (model, pre_tokenizer) = (&self.json["model"], &self.json["pre_tokenizer"]);
        let whole_words = model["ignore_merges"] == true;
        let patterns = pre_tokenizer::patterns(pre_tokenizer);
        let found = patterns.as_ref().and_then(|p| pre_tokenizer::recognise(p, whole_words));
        self.put("pre", text(found.map_or("default", |pre| pre.names[0])));
        match found {
            None => self.note(format!(
                "texts are split into words in another way (tokenizer.ggml.pre is \"default\") and give other tokens: it knows none like pre_tokenizer {pre_tokenizer}"
            )),
            Some(pre) if pre.whole_words && !whole_words => {
                self.note("words that are tokens are not put together from merges");
            }
            Some(pre) if !pre.whole_words && whole_words => {
                self.note("words that are tokens are put together from merges like others");
            }
            Some(_) => {}
        }
        match self.json["normalizer"]["type"].as_str() {
            None => {}
            Some(normalizer) => {
                self.note(format!("texts are taken as they are, without {normalizer}"))
            }
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if model[key].as_str().is_some_and(|text| !text.is_empty()) {
                self.note(format!("there is no {key}, {}", model[key]));
            }
        }
        // A space is between the two.
        let part = |part: &str| part.replace(' ', "\u{120}");
        let merges: Vec<_> =
            merges.iter().map(|(left, right)| format!("{} {}", part(left), part(right))).collect();
        let merges = Array::strings(merges.iter().map(String::as_str));
        self.put("merges", Value::Array(merges));
    }

    /// Which tokens begin and end a text, and which of them are added to it.
    fn special_tokens(&mut self, settings: &Json, tokens: &Tokens) {
        let id = |token: &Json| {
            let token = token["content"].as_str().or(token.as_str())?;
            tokens.ids.get(token).and_then(|&id| u32::try_from(id).ok())
        };
        let config = self.config;
        let bos = config.bos_token_id.or_else(|| id(&settings["bos_token"]));
        // The end that chats have, of those that the model knows.
        let own = id(&settings["eos_token"]);
        let mut ends = config.eos_token_id.clone();
        match own.and_then(|own| ends.iter().position(|end| *end == own)) {
            Some(at) => ends[..=at].rotate_right(1),
            None if ends.is_empty() => ends.extend(own),
            None => {}
        }
        let unknown = id(&self.json["model"]["unk_token"]).or_else(|| id(&settings["unk_token"]));
        let mut ends = ends.into_iter();
        for (key, token) in [
            ("bos", bos),
            ("eos", ends.next()),
            ("eot", ends.next()),
            ("eom", ends.next()),
            ("unknown", unknown),
            ("padding", id(&settings["pad_token"])),
        ] {
            if let Some(token) = token {
                self.put(&format!("{key}_token_id"), Value::U32(token));
            }
        }
        let more: Vec<_> = ends.map(|end| end.to_string()).collect();
        if !more.is_empty() {
            self.note(format!("tokens {} do not end a text", more.join(", ")));
        }
        let (before, after) = added(&self.json["post_processor"]);
        let as_id = |token: &str| tokens.ids.get(token).map(|id| *id as u64);
        let first = self.config.eos_token_id.first().copied().or(own);
        for (key, tokens, special) in
            [("add_bos_token", before, bos), ("add_eos_token", after, own.or(first))]
        {
            let adds = match tokens.as_slice() {
                [] => false,
                [one] if special.is_some() && as_id(one) == special.map(u64::from) => true,
                other => {
                    self.note(format!("{} is not added to texts", other.join(" ")));
                    false
                }
            };
            self.put(key, Value::Bool(adds));
        }
    }

    fn chat_template(&mut self, settings: &Json, file: Option<&[u8]>) -> Result<()> {
        let key = "tokenizer.chat_template";
        if let Some(file) = file {
            let template = str::from_utf8(file).map_err(|_| Error::File {
                file: "chat_template.jinja".into(),
                reason: "expected a text in UTF-8".into(),
            })?;
            self.keys.push((key.into(), text(template)));
            return Ok(());
        }
        let mut names = BTreeSet::new();
        match &settings["chat_template"] {
            Json::String(template) => self.keys.push((key.into(), text(template))),
            Json::Array(templates) => {
                for template in templates {
                    let (Some(name), Some(template)) =
                        (template["name"].as_str(), template["template"].as_str())
                    else {
                        self.note(format!("a chat template has no name or no text: {template}"));
                        continue;
                    };
                    match name {
                        "default" => self.keys.push((key.into(), text(template))),
                        name if names.insert(name) => {
                            self.keys.push((format!("{key}.{name}"), text(template)));
                        }
                        name => self.note(format!("there are two chat templates named {name}")),
                    }
                }
            }
            _ => {}
        }
        if !names.is_empty() {
            let names = Array::strings(names);
            self.keys.push(("tokenizer.chat_templates".into(), Value::Array(names)));
        }
        Ok(())
    }
}

fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// The special tokens in front of a text and behind it.
fn added(post_processor: &Json) -> (Vec<&str>, Vec<&str>) {
    let all = match &post_processor["processors"] {
        Json::Array(all) => all.as_slice(),
        _ => std::slice::from_ref(post_processor),
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for processor in all {
        let mut seen = false;
        for part in processor["single"].as_array().into_iter().flatten() {
            match part["SpecialToken"]["id"].as_str() {
                Some(token) => if seen { &mut after } else { &mut before }.push(token),
                None => seen = true,
            }
        }
        // BERT and RoBERTa: a token on either side.
        before.extend(processor["cls"][0].as_str());
        after.extend(processor["sep"][0].as_str());
    }
    (before, after)
}
