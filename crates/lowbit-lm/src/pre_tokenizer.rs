//! How byte-level tokenizers split a text into words: the names of llama.cpp, `tokenizer.ggml.pre`, and the
//! patterns of tokenizer.json that they stand for.

use serde_json::Value as Json;

/// A way to split a text into words, which no merge crosses.
pub(crate) struct Pre {
    pub(crate) names: &'static [&'static str],
    /// Each splits what the ones before have left into its matches and what is between them.
    pub(crate) patterns: &'static [&'static str],
    /// The same patterns in the words of tokenizer.json, where those differ.
    spelling: &'static [&'static str],
    /// A word that is a token is not put together from merges.
    pub(crate) whole_words: bool,
    /// BOS is put in front unless `add_bos_token` says otherwise.
    pub(crate) adds_bos: bool,
}

/// What tokenizer.json calls punctuation.
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|`]+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The pattern of GPT-4 with its contractions, letters, digits and ends of line.
macro_rules! gpt4 {
    ($letters:literal, $digits:literal, $rest:literal) => {
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?",
            $letters,
            "|",
            $digits,
            "|",
            $rest,
            r"|\s+(?!\S)|\s+"
        )
    };
}
const LLAMA3: &str = gpt4!(r"\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+");
const QWEN2: &str = gpt4!(r"\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+");
/// Words of capitals and small letters, as GPT-4o and Tekken tell them apart.
macro_rules! gpt4o {
    ($contractions:literal, $digits:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $contractions,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $contractions,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}
const CJK: &str = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+";
const DEEPSEEK3: &str = concat!(
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const SENTENCES: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// From the pre_tokenizer of the tokenizer.json of these models, by the names that llama.cpp gives them.
pub(crate) const PRE: [Pre; 19] = [
    Pre::new(
        // What llama.cpp takes where no name is given, too.
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
    Pre::new(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[GPT2],
    ),
    Pre::new(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[r"\p{N}", GPT2],
    ),
    Pre::new(&["falcon"], &[PUNCTUATION, GPT2, "[0-9][0-9][0-9]"]),
    Pre {
        whole_words: true,
        adds_bos: true,
        ..Pre::new(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
            ],
            &[LLAMA3],
        )
    },
    Pre::new(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    Pre::new(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    Pre::new(
        &["qwen35"],
        &[gpt4!(r"[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+")],
    ),
    Pre::new(&["seed-coder"], &[gpt4!(r"\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+")]),
    Pre::new(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[gpt4!(r"\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]")],
    ),
    Pre {
        whole_words: true,
        ..Pre::new(
            &["minicpm5"],
            &[r"\p{N}{1,3}", gpt4!(r"\p{L}+", r"\p{N}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+")],
        )
    },
    Pre { whole_words: true, adds_bos: true, ..Pre::new(&["tekken"], &[gpt4o!("", r"\p{N}")]) },
    Pre::new(
        &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        &[gpt4o!("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}")],
    ),
    Pre {
        spelling: &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+",
            r"\p{N}",
        ],
        ..Pre::new(
            &["deepseek-coder"],
            &[
                r"[\r\n]",
                r"\s?\p{L}+",
                r"\s?\p{P}+",
                r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
                r"\p{N}",
            ],
        )
    },
    Pre {
        spelling: &[
            r"\p{N}{1,3}",
            "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
                r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        ],
        ..Pre::new(
            &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
            &[r"\p{N}{1,3}", CJK, DEEPSEEK3],
        )
    },
    Pre::new(&["poro-chat", "bloom", "gpt3-finnish"], &[SENTENCES]),
    Pre::new(&["viking"], &[SENTENCES, r"\p{N}"]),
    Pre::new(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    Pre::new(
        &["ufakzeka"],
        &[r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    ),
];

impl Pre {
    const fn new(names: &'static [&'static str], patterns: &'static [&'static str]) -> Self {
        Self { names, patterns, spelling: &[], whole_words: false, adds_bos: false }
    }
}

/// The patterns that a pre-tokenizer of tokenizer.json splits by, one after the other, if it works on bytes
/// behind them; `None` for other ways to split.
pub(crate) fn patterns(pre_tokenizer: &Json) -> Option<Vec<String>> {
    let mut patterns = Vec::new();
    let steps = match pre_tokenizer["type"].as_str()? {
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.as_slice(),
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let (last, splits) = steps.split_last()?;
    for split in splits {
        patterns.push(match split["type"].as_str()? {
            "Digits" if split["individual_digits"] == true => r"\p{N}".into(),
            "Digits" => r"\p{N}+".into(),
            "Punctuation" if split["behavior"] == "Contiguous" => PUNCTUATION.into(),
            "Split" => split_pattern(split)?,
            _ => return None,
        });
    }
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    // What files leave out is true.
    if last["use_regex"] != false {
        patterns.push(GPT2.into());
    }
    Some(patterns)
}

/// The pattern of a step that keeps what matches apart from what does not.
fn split_pattern(split: &Json) -> Option<String> {
    let pattern = match (&split["pattern"]["Regex"], &split["pattern"]["String"]) {
        (Json::String(regex), Json::Null) => regex,
        _ => return None,
    };
    match (split["behavior"].as_str()?, split["invert"] == true) {
        // Nothing is left beside the matches of patterns that end in spaces.
        ("Isolated", _) => {}
        ("Removed", true) if pattern.ends_with(r"|\s+") => {}
        _ => return None,
    }
    // Some files have the characters where others escape them.
    Some(pattern.replace('\r', r"\r").replace('\n', r"\n").replace(r"\p{N}{1}", r"\p{N}"))
}

/// The way to split that these patterns are; words that are tokens are looked up whole in those that
/// `whole_words` says, if there is the choice.
pub(crate) fn recognise(patterns: &[String], whole_words: bool) -> Option<&'static Pre> {
    let same = |pre: &&Pre| {
        [pre.patterns, pre.spelling].iter().any(|known| !known.is_empty() && *known == patterns)
    };
    // The first is what llama.cpp does where it does not know better.
    let known = || PRE.iter().skip(1).filter(same);
    known().find(|pre| pre.whole_words == whole_words).or_else(|| known().next())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn name(pre_tokenizer: &Json, whole_words: bool) -> Option<&'static str> {
        let pre = recognise(&patterns(pre_tokenizer)?, whole_words)?;
        pre.names.first().copied()
    }

    fn split(pattern: &str) -> Json {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    fn byte_level(use_regex: bool) -> Json {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    fn sequence(steps: &[Json]) -> Json {
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    /// As the tokenizer.json of these models have them.
    #[test]
    fn pre_tokenizers_have_the_names_of_llama_cpp() {
        let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let digits = json!({"type": "Digits", "individual_digits": true});
        assert_eq!(name(&byte_level(true), false), Some("gpt-2"));
        assert_eq!(name(&sequence(&[digits, byte_level(true)]), false), Some("smollm"));
        let bytes = byte_level(false);
        let of = |pattern: &str| sequence(&[split(pattern), bytes.clone()]);
        assert_eq!(name(&of(llama3), true), Some("llama-bpe"));
        assert_eq!(name(&of(llama3), false), Some("dbrx"));
        let qwen2 = llama3.replace("{1,3}", "");
        assert_eq!(name(&of(&qwen2), false), Some("qwen2"));
        // The characters themselves in place of their escapes.
        let raw = qwen2.replace(r"\r", "\r").replace(r"\n", "\n");
        assert_eq!(name(&of(&raw), false), Some("qwen2"));
        let deepseek = sequence(&[
            split(r"\p{N}{1,3}"),
            split("[一-龥぀-ゟ゠-ヿ]+"),
            split(concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
                "\r\n",
                r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
                "\r\n]*",
                r"|\s*[",
                "\r\n]+",
                r"|\s+(?!\S)|\s+"
            )),
            bytes.clone(),
        ]);
        assert_eq!(name(&deepseek, false), Some("deepseek-v3"));
    }

    #[test]
    fn other_ways_to_split_have_no_name() {
        for other in [
            Json::Null,
            json!({"type": "Whitespace"}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}),
            sequence(&[split(r"\p{N}{1,2}"), byte_level(true)]),
            sequence(&[json!({"type": "Metaspace"}), byte_level(true)]),
            sequence(&[]),
        ] {
            assert_eq!(name(&other, false), None, "{other}");
        }
    }
}
