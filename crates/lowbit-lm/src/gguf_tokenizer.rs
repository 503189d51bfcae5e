//! The tokenizer in the metadata of a GGUF file, as a tokenizer.json.
//!
//! | `tokenizer.ggml.model` | |
//! |---|---|
//! | `gpt2` | byte-level BPE: `merges`, and the way to split a text that `pre` names |
//! | `llama` | BPE of sentencepiece: neighbours merge into the piece of the highest score; bytes for the rest |
//!
//! Sentencepiece has no list of merges. Every way to cut a piece into two pieces is one here, ranked by the
//! score of the piece; ways to cut the same piece are ranked by the length of their left part, since
//! sentencepiece merges from the left and leaves the shorter rest at the right.

use std::collections::{BTreeMap, BTreeSet};

use lowbit::formats::gguf::Value;
use serde_json::{Value as Json, json};

use crate::{Error, Result, gguf_files::GgufFiles, pre_tokenizer::PRE};

/// Keys that are looked at here and in the description of the model.
const USED: [&str; 16] = [
    "add_bos_token",
    "add_eos_token",
    "add_sep_token",
    "add_space_prefix",
    "bos_token_id",
    "eom_token_id",
    "eos_token_id",
    "eot_token_id",
    "merges",
    "model",
    "pre",
    "remove_extra_whitespaces",
    "scores",
    "token_type",
    "tokens",
    "unknown_token_id",
];

/// Keys that change nothing when a text is encoded.
const HARMLESS: [&str; 15] = [
    "cls_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_pre_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "fim_suf_token_id",
    "mask_token_id",
    "middle_token_id",
    "padding_token_id",
    "prefix_token_id",
    "separator_token_id",
    "seperator_token_id", // as llama.cpp spells it
    "suffix_token_id",
    "token_type_count",
];

/// Types of tokens in llama.cpp.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// What sentencepiece writes for a space.
const SPACE: &str = "\u{2581}";
/// Cutting a longer piece in all ways would take too long; sentencepiece makes none of more than 16 characters
/// unless it is told to.
const LONGEST_PIECE: usize = 256;

/// A tokenizer.json that encodes as the metadata say, and the bytes for which a byte-level vocabulary has
/// neither a token nor an unknown one.
///
/// # Errors
/// [`Error::File`] naming the key that is missing, contradictory or not known here, with its value.
pub(crate) fn json<S: AsRef<[u8]>>(files: &GgufFiles<S>) -> Result<(Json, Vec<u8>)> {
    let metadata = Metadata { files };
    metadata.check_keys()?;
    let vocabulary = Vocabulary::of(files)?;
    let model = files.get("tokenizer.ggml.model");
    match model.as_ref().and_then(Value::as_str) {
        Some("gpt2") => byte_level(&metadata, &vocabulary),
        Some("llama") => Ok((sentencepiece(&metadata, &vocabulary)?, Vec::new())),
        _ => Err(metadata.wrong("model", "\"gpt2\" or \"llama\"")),
    }
}

/// Does tokenizer.json, which messages call `file`, have the tokens of the metadata, if those have any?
///
/// # Errors
/// [`Error::File`] naming the first token that is another.
pub(crate) fn agree<S: AsRef<[u8]>>(files: &GgufFiles<S>, file: &str, json: &Json) -> Result<()> {
    if files.get(TOKENS).is_none() {
        return Ok(());
    }
    let Vocabulary { tokens, kinds, .. } = Vocabulary::of(files)?;
    let check = |token: &str, id: u64| {
        let Some((there, kind)) =
            usize::try_from(id).ok().and_then(|id| tokens.get(id).zip(kinds.get(id)))
        else {
            return Ok(());
        };
        // Spaces of user-defined tokens are spaces in GGUF.
        if there == token || *kind == UNUSED || *there == token.replace(SPACE, " ") {
            return Ok(());
        }
        Err(Error::File {
            file: file.into(),
            reason: format!(
                "token {id} is {token:?}, but {there:?} in {TOKENS} of {}: mend it, or move it away to go by the GGUF file alone",
                files.file()
            ),
        })
    };
    match &json["model"]["vocab"] {
        Json::Object(vocab) => {
            let ids = vocab.iter().filter_map(|(token, id)| Some((token, id.as_u64()?)));
            ids.into_iter().try_for_each(|(token, id)| check(token, id))?;
        }
        Json::Array(pieces) => {
            let pieces = pieces.iter().map(|piece| piece[0].as_str().unwrap_or_default());
            pieces.zip(0..).try_for_each(|(token, id)| check(token, id))?;
        }
        _ => {}
    }
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter_map(|token| Some((token["content"].as_str()?, token["id"].as_u64()?)));
    added.into_iter().try_for_each(|(token, id)| check(token, id))
}

const TOKENS: &str = "tokenizer.ggml.tokens";

struct Metadata<'a, S> {
    files: &'a GgufFiles<S>,
}

impl<S: AsRef<[u8]>> Metadata<'_, S> {
    fn get(&self, key: &str) -> Option<Value<'_>> {
        self.files.get(&format!("tokenizer.ggml.{key}"))
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let got = self.get(key).map_or("nothing".into(), |got| got.to_string());
        self.files.wrong(format!(
            "tokenizer.ggml.{key}: expected {expected}, got {got}: put the model's tokenizer.json beside the file"
        ))
    }

    fn bool(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(value),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn check_keys(&self) -> Result<()> {
        for key in self.files.keys().filter_map(|key| key.strip_prefix("tokenizer.ggml.")) {
            if !USED.contains(&key) && !HARMLESS.contains(&key) {
                return Err(self.wrong(key, "no such key, whose meaning is not known here"));
            }
        }
        for key in ["add_sep_token", "remove_extra_whitespaces"] {
            if self.bool(key, false)? {
                return Err(self.wrong(key, "false"));
            }
        }
        Ok(())
    }

    /// A special token; its text must be there.
    fn special<'v>(
        &self,
        key: &str,
        default: Option<usize>,
        vocabulary: &'v Vocabulary,
    ) -> Result<Option<(usize, &'v str)>> {
        let id = match self.get(key) {
            None => default,
            Some(id) => id.as_u64().and_then(|id| usize::try_from(id).ok()).or(Some(usize::MAX)),
        };
        match id.map(|id| (id, vocabulary.tokens.get(id))) {
            None => Ok(None),
            Some((id, Some(token))) => Ok(Some((id, token))),
            Some((_, None)) if self.get(key).is_none() => Ok(None),
            Some((_, None)) => {
                Err(self.wrong(key, &format!("a token below {}", vocabulary.tokens.len())))
            }
        }
    }

    /// What puts BOS in front and EOS behind, where they are wanted.
    fn post_processor(&self, vocabulary: &Vocabulary, defaults: Defaults) -> Result<Json> {
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut specials = serde_json::Map::new();
        for (adds, wanted, key, default) in [
            ("add_bos_token", defaults.adds_bos, "bos_token_id", defaults.bos),
            ("add_eos_token", false, "eos_token_id", defaults.eos),
        ] {
            if !self.bool(adds, wanted)? {
                continue;
            }
            let Some((id, token)) = self.special(key, default, vocabulary)? else {
                // A habit of other files of this kind needs no token; a wish of this one does.
                match self.get(adds) {
                    None => continue,
                    Some(_) => {
                        return Err(self.wrong(key, "a token, which is to be added to texts"));
                    }
                }
            };
            let place = if key == "bos_token_id" { 0 } else { single.len() };
            single.insert(place, json!({"SpecialToken": {"id": token, "type_id": 0}}));
            specials.insert(token.into(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        if specials.is_empty() {
            return Ok(Json::Null);
        }
        let second: Vec<_> = single.iter().map(|part| of_type_1(part.clone())).collect();
        let pair = [single.clone(), second].concat();
        Ok(
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": specials}),
        )
    }
}

/// The part of a template for the second of two texts.
fn of_type_1(mut part: Json) -> Json {
    for (kind, content) in part.as_object_mut().into_iter().flatten() {
        content["type_id"] = 1.into();
        if kind == "Sequence" {
            content["id"] = "B".into();
        }
    }
    part
}

/// What a kind of tokenizer does where the metadata do not say it.
struct Defaults {
    adds_bos: bool,
    bos: Option<usize>,
    eos: Option<usize>,
}

struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<u64>,
    ids: BTreeMap<String, usize>,
}

impl Vocabulary {
    fn of<S: AsRef<[u8]>>(files: &GgufFiles<S>) -> Result<Self> {
        let metadata = Metadata { files };
        let list = files.get(TOKENS);
        let Some(list) = list.as_ref().and_then(Value::as_array) else {
            return Err(metadata.wrong("tokens", "a list of tokens"));
        };
        let (mut tokens, mut ids) = (Vec::new(), BTreeMap::new());
        for (id, token) in list.iter().enumerate() {
            let Some(token) = token.as_str() else {
                return Err(
                    files.wrong(format!("{TOKENS}: expected texts in UTF-8, got {token} at {id}"))
                );
            };
            // As llama.cpp has it: padding may have no text.
            let token = if token.is_empty() { format!("[EMPTY_{id}]") } else { token.into() };
            if let Some(other) = ids.insert(token.clone(), id) {
                return Err(files.wrong(format!("{TOKENS}: {other} and {id} are both {token:?}")));
            }
            tokens.push(token);
        }
        let spm =
            files.get("tokenizer.ggml.model").is_some_and(|model| model.as_str() == Some("llama"));
        let kinds = metadata.kinds(&tokens, spm)?;
        Ok(Self { tokens, kinds, ids })
    }

    fn is_normal(&self, token: &str) -> bool {
        self.ids.get(token).is_some_and(|&id| self.kinds[id] == NORMAL)
    }

    /// Of tokens that are matched in the text before anything else.
    fn added(&self) -> Vec<Json> {
        let all = self.tokens.iter().zip(&self.kinds).enumerate();
        all.filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == CONTROL,
                })
            })
            .collect()
    }
}

impl<S: AsRef<[u8]>> Metadata<'_, S> {
    /// The type of each token; where there are none, those that names and ids tell.
    fn kinds(&self, tokens: &[String], spm: bool) -> Result<Vec<u64>> {
        let Some(list) = self.get("token_type") else {
            let id = |key: &str| self.get(key).and_then(|id| id.as_u64());
            let (unknown, ends) =
                (id("unknown_token_id"), [id("bos_token_id"), id("eos_token_id")]);
            let kind = |(token, id): (&String, u64)| match () {
                () if Some(id) == unknown => UNKNOWN,
                () if ends.contains(&Some(id)) => CONTROL,
                () if spm && byte_of(token).is_some() => BYTE,
                () => NORMAL,
            };
            return Ok(tokens.iter().zip(0..).map(kind).collect());
        };
        let list: Option<Vec<_>> =
            list.as_array().and_then(|list| list.iter().map(|kind| kind.as_u64()).collect());
        match list {
            Some(kinds)
                if kinds.len() == tokens.len() && kinds.iter().all(|kind| *kind <= BYTE) =>
            {
                Ok(kinds)
            }
            _ => {
                Err(self.wrong("token_type", &format!("{} numbers from 0 to {BYTE}", tokens.len())))
            }
        }
    }

    fn scores(&self, tokens: usize) -> Result<Vec<f64>> {
        let list = self.get("scores");
        let score = |score: Value<'_>| match score {
            Value::I32(score) => Some(score.into()),
            score => score.as_f64().filter(|score| score.is_finite()),
        };
        let list: Option<Vec<_>> = list
            .as_ref()
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(score).collect());
        match list {
            Some(scores) if scores.len() == tokens => Ok(scores),
            _ => Err(self.wrong("scores", &format!("{tokens} finite numbers"))),
        }
    }

    /// Pairs of tokens, each in two strings.
    fn merges(&self) -> Result<Vec<Json>> {
        let list = self.get("merges");
        // A vocabulary of single bytes has none, and GGUF has no empty lists in some programs.
        let Some(list) = list.as_ref() else { return Ok(Vec::new()) };
        let pair = |merge: Value<'_>| {
            let merge = merge.as_str()?;
            // The first part may be a space itself.
            let (first, _) = merge.char_indices().nth(1)?;
            let space = first + merge[first..].find(' ')?;
            Some(json!([merge[..space], merge[space + 1..]]))
        };
        let merges = list.as_array().and_then(|list| list.iter().map(pair).collect());
        merges.ok_or_else(|| self.wrong("merges", "a list of two tokens with a space between them"))
    }
}

/// The byte that a token `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The character that stands for a byte in a byte-level vocabulary (GPT-2): itself if it is printable, else
/// one of those from U+0100 on, in turn.
fn characters_of_bytes() -> [char; 256] {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..);
    let mut others = ('\u{100}'..).take(256);
    std::array::from_fn(|byte| match byte as u8 {
        byte if printable(byte) => byte.into(),
        _ => others.next().unwrap_or_default(),
    })
}

fn byte_level<S: AsRef<[u8]>>(
    metadata: &Metadata<'_, S>,
    vocabulary: &Vocabulary,
) -> Result<(Json, Vec<u8>)> {
    let name = metadata.get("pre");
    let pre = match name.as_ref().map(|name| name.as_str().unwrap_or("")) {
        None => &PRE[0],
        Some(name) => PRE
            .iter()
            .find(|pre| pre.names.contains(&name))
            .ok_or_else(|| metadata.wrong("pre", "a way to split texts that is known here"))?,
    };
    if metadata.bool("add_space_prefix", false)? {
        return Err(metadata.wrong("add_space_prefix", "false beside the model gpt2"));
    }
    // Small vocabularies may be of characters as they are.
    let of_bytes = vocabulary.ids.contains_key("Ġ") || !vocabulary.ids.contains_key(" ");
    let unknown = match metadata.special("unknown_token_id", None, vocabulary)? {
        Some((_, token)) => Some(token),
        None => {
            let by_kind = vocabulary.kinds.iter().position(|kind| *kind == UNKNOWN);
            let by_name = || vocabulary.ids.get("<unk>").copied().filter(|_| !of_bytes);
            by_kind.or_else(by_name).map(|id| vocabulary.tokens[id].as_str())
        }
    };
    let characters = characters_of_bytes();
    let lacking: Vec<u8> = (0..=255)
        .filter(|&byte| {
            !vocabulary.ids.contains_key(characters[usize::from(byte)].to_string().as_str())
        })
        .collect();
    let lacks = of_bytes && !lacking.is_empty();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let splits = pre.patterns.iter().map(|pattern| {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    });
    let splits: Vec<_> = splits.chain([byte_level.clone()]).collect();
    let defaults = Defaults { adds_bos: pre.adds_bos, bos: None, eos: None };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": null,
        "pre_tokenizer": of_bytes.then(|| json!({"type": "Sequence", "pretokenizers": splits})),
        "post_processor": metadata.post_processor(vocabulary, defaults)?,
        "decoder": if of_bytes { byte_level } else { json!({"type": "Fuse"}) },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown.filter(|_| lacks || !of_bytes),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": pre.whole_words,
            "vocab": vocabulary.ids, "merges": metadata.merges()?,
        },
    });
    Ok((json, if lacks && unknown.is_none() { lacking } else { Vec::new() }))
}

fn sentencepiece<S: AsRef<[u8]>>(
    metadata: &Metadata<'_, S>,
    vocabulary: &Vocabulary,
) -> Result<Json> {
    if metadata.get("pre").is_some_and(|pre| pre.as_str() != Some("default")) {
        return Err(metadata.wrong("pre", "\"default\" beside the model llama"));
    }
    let prefix = metadata.bool("add_space_prefix", true)?;
    let by_kind = vocabulary.kinds.iter().position(|kind| *kind == UNKNOWN);
    let unknown = metadata.special("unknown_token_id", by_kind.or(Some(0)), vocabulary)?;
    let bytes: BTreeSet<u8> = (vocabulary.tokens.iter().zip(&vocabulary.kinds))
        .filter(|(_, kind)| **kind == BYTE)
        .filter_map(|(token, _)| byte_of(token))
        .collect();
    let to_space = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let mut normalizers = vec![to_space];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let defaults = Defaults { adds_bos: true, bos: Some(1), eos: Some(2) };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": metadata.post_processor(vocabulary, defaults)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown.map(|(_, token)| token),
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            // Sentencepiece makes one unknown token of neighbours.
            "fuse_unk": true, "byte_fallback": bytes.len() == 256, "ignore_merges": false,
            "vocab": vocabulary.ids, "merges": merges_of_scores(metadata, vocabulary)?,
        },
    }))
}

/// See the top of the file.
fn merges_of_scores<S: AsRef<[u8]>>(
    metadata: &Metadata<'_, S>,
    vocabulary: &Vocabulary,
) -> Result<Vec<Json>> {
    let scores = metadata.scores(vocabulary.tokens.len())?;
    let mut merges = Vec::new();
    for (id, piece) in vocabulary.tokens.iter().enumerate() {
        if vocabulary.kinds[id] != NORMAL {
            continue;
        }
        if piece.len() > LONGEST_PIECE {
            let reason = format!(
                "{TOKENS}: expected at most {LONGEST_PIECE} bytes, got {} at {id}",
                piece.len()
            );
            return Err(metadata.files.wrong(reason));
        }
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if vocabulary.is_normal(left) && vocabulary.is_normal(right) {
                merges.push((scores[id], id, at));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(b.2.cmp(&a.2)));
    let pair = |(_, id, at): (f64, usize, usize)| {
        let (left, right) = vocabulary.tokens[id].split_at(at);
        json!([left, right])
    };
    Ok(merges.into_iter().map(pair).collect())
}
