//! Tokenizers that make so much of a short text that nobody would wait for it: a kilobyte of rules that
//! double some letter makes gigabytes.

use serde_json::{Value, to_value};
use tokenizers::{
    Decoder, DecoderWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Tokenizer,
};

/// How many times longer a text may become. Bytes written as letters double, a space of three bytes triples,
/// and compatibility decomposition makes up to 18 letters of one.
const MOST: usize = 64;
/// Bytes that a rule may write before anybody looks.
const LONG: usize = 1 << 26;
/// Letters of a pattern or a replacement that count.
const LETTERS: usize = 64;

/// Runs a text with all that the rules look for through them, one after the other.
///
/// # Errors
/// What grows, and how far.
pub(crate) fn check(tokenizer: &Tokenizer) -> Result<(), String> {
    let (normalizer, pre_tokenizer, decoder) =
        (tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer(), tokenizer.get_decoder());
    let mut probe: String = (' '..='~').chain("\n\té漢\u{2581}\u{fb01}".chars()).collect();
    collect(&to_value(normalizer).unwrap_or_default(), &mut probe);
    collect(&to_value(pre_tokenizer).unwrap_or_default(), &mut probe);
    collect(&to_value(decoder).unwrap_or_default(), &mut probe);
    let most = MOST * probe.len();

    let mut text = NormalizedString::from(probe.as_str());
    let mut rules = Vec::new();
    normalizer.iter().for_each(|rule| normalizers(rule, &mut rules));
    for rule in rules {
        let longest = longest(&to_value(rule).unwrap_or_default());
        bound("normalizer", LONG, text.get().chars().count().saturating_mul(longest))?;
        // A rule that cannot be applied says so when a text is encoded.
        if rule.normalize(&mut text).is_err() {
            return Ok(());
        }
        bound("normalizer", most, text.len())?;
    }

    let mut text = PreTokenizedString::from(text);
    let mut rules = Vec::new();
    pre_tokenizer.iter().for_each(|rule| pre_tokenizers(rule, &mut rules));
    for rule in rules {
        if rule.pre_tokenize(&mut text).is_err() {
            return Ok(());
        }
        let parts = text.get_splits(OffsetReferential::Normalized, OffsetType::None);
        bound("pre_tokenizer", most, parts.iter().map(|(part, ..)| part.len()).sum())?;
    }

    let mut tokens = vec![probe];
    let mut rules = Vec::new();
    decoder.iter().for_each(|rule| decoders(rule, &mut rules));
    for rule in rules {
        let letters = tokens.iter().map(|token| token.chars().count()).sum();
        let longest = longest(&to_value(rule).unwrap_or_default());
        bound("decoder", LONG, longest.saturating_mul(letters))?;
        tokens = match rule.decode_chain(tokens) {
            Ok(tokens) => tokens,
            Err(_) => return Ok(()),
        };
        bound("decoder", most, tokens.iter().map(String::len).sum())?;
    }
    Ok(())
}

/// Refuses more than `most` bytes.
fn bound(what: &str, most: usize, bytes: usize) -> Result<(), String> {
    match bytes <= most {
        true => Ok(()),
        false => Err(format!("its {what} makes a text more than {MOST} times longer")),
    }
}

/// Bytes that a rule may put in the place of a letter.
fn longest(rule: &Value) -> usize {
    let len = |key| rule.get(key).and_then(Value::as_str).map_or(0, str::len);
    len("content").max(len("prepend")).max(1)
}

/// The strings in the rules, but for binary tables.
fn collect(rules: &Value, probe: &mut String) {
    match rules {
        Value::String(text) => probe.extend(text.chars().take(LETTERS)),
        Value::Array(list) => list.iter().for_each(|value| collect(value, probe)),
        Value::Object(map) => {
            let rules =
                map.iter().filter(|(key, _)| *key != "type" && *key != "precompiled_charsmap");
            rules.for_each(|(_, value)| collect(value, probe));
        }
        _ => {}
    }
}

fn normalizers<'a>(rule: &'a NormalizerWrapper, all: &mut Vec<&'a NormalizerWrapper>) {
    match rule {
        NormalizerWrapper::Sequence(list) => {
            list.as_ref().iter().for_each(|rule| normalizers(rule, all));
        }
        rule => all.push(rule),
    }
}

fn pre_tokenizers<'a>(rule: &'a PreTokenizerWrapper, all: &mut Vec<&'a PreTokenizerWrapper>) {
    match rule {
        PreTokenizerWrapper::Sequence(list) => {
            list.as_ref().iter().for_each(|rule| pre_tokenizers(rule, all));
        }
        rule => all.push(rule),
    }
}

fn decoders<'a>(rule: &'a DecoderWrapper, all: &mut Vec<&'a DecoderWrapper>) {
    match rule {
        DecoderWrapper::Sequence(list) => {
            list.get_decoders().iter().for_each(|rule| decoders(rule, all));
        }
        rule => all.push(rule),
    }
}
