use tokenizers::ModelWrapper;

use crate::{Error, Result, files::not_json, growth};

/// The text side of a model: `tokenizer.json`.
pub struct Tokenizer {
    file: String,
    inner: tokenizers::Tokenizer,
    /// Bytes that it has no token for, which it would leave out.
    lacking: Vec<u8>,
}

impl Tokenizer {
    /// Reads tokenizer.json, which error messages call `file`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is not one, or one that makes a text many times longer.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self> {
        let error = |reason: String| Error::Tokenizer { file: file.into(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| error(format!("expected a tokenizer, but {}", not_json(json, e))))?;
        // Some files ask for texts to be cut or padded, or for merges to be left out by chance.
        inner.with_truncation(None).map_err(|e| error(e.to_string()))?;
        inner.with_padding(None);
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            inner.with_model(model);
        }
        growth::check(&inner).map_err(error)?;
        Ok(Self { file: file.into(), inner, lacking: Vec::new() })
    }

    /// The tokenizer, which has no tokens for the bytes `lacking`.
    pub(crate) fn lacking(self, lacking: Vec<u8>) -> Self {
        Self { lacking, ..self }
    }

    /// The tokens of `text`, with the special ones (such as BOS) that the tokenizer adds.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails, or has no token for a byte of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The tokens of `text` alone.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        if let Some(byte) = text.bytes().find(|byte| self.lacking.contains(byte)) {
            let reason = format!("the text has the byte 0x{byte:02x}, for which there is no token");
            return Err(Error::Tokenizer { file: self.file.clone(), reason });
        }
        let encoding = self.inner.encode_fast(text, special).map_err(|e| self.error(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| self.error(&e))
    }

    fn error(&self, e: &tokenizers::Error) -> Error {
        Error::Tokenizer { file: self.file.clone(), reason: e.to_string() }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("file", &self.file).finish_non_exhaustive()
    }
}

/// Turns tokens that arrive one by one into pieces of text that can be printed as they come.
pub(crate) struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens from `done`'s first on; older ones cannot change the text any more.
    ids: Vec<u32>,
    /// How many of `ids` are printed: they give the context (such as a leading space) for the rest.
    done: usize,
}

impl<'a> Stream<'a> {
    /// `ids` have been printed already.
    pub(crate) fn new(tokenizer: &'a Tokenizer, ids: &[u32]) -> Self {
        Self { tokenizer, ids: ids.to_vec(), done: ids.len() }
    }

    /// The text that `id` completes; empty as long as a character lacks bytes.
    pub(crate) fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.take(&text)
    }

    /// What is left, complete or not.
    pub(crate) fn finish(mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        self.take(&text)
    }

    fn take(&mut self, text: &str) -> Result<String> {
        let printed = self.tokenizer.decode(&self.ids[..self.done])?;
        let piece = match text.strip_prefix(&printed) {
            Some(piece) => piece.to_owned(),
            // Bytes that are no text have changed what came before them; that is printed already.
            None => self.tokenizer.decode(&self.ids[self.done..])?,
        };
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let json = crate::tests::tiny::tokenizer().to_string();
        Tokenizer::parse("tokenizer.json", json.as_bytes()).unwrap()
    }

    #[test]
    fn text_survives_and_special_tokens_are_optional() {
        let t = tokenizer();
        for text in ["abc ab", " a", "é\n漢", "x"] {
            assert_eq!(t.decode(&t.encode(text).unwrap()).unwrap(), text);
            assert_eq!(t.encode(text).unwrap()[1..], t.encode_plain(text).unwrap());
        }
    }

    #[test]
    fn merges_are_not_left_out_by_chance() {
        let mut json = crate::tests::tiny::tokenizer();
        json["model"]["dropout"] = 1.0.into();
        let t = Tokenizer::parse("tokenizer.json", json.to_string().as_bytes()).unwrap();
        assert_eq!(t.encode_plain("ab").unwrap(), tokenizer().encode_plain("ab").unwrap());
    }

    #[test]
    fn rules_that_double_a_text_again_and_again_are_refused() {
        use serde_json::{Value, json};
        let parse = |part: &str, rules: Vec<Value>| {
            let mut json = crate::tests::tiny::tokenizer();
            let key = format!("{part}s").replace("pre_tokenizers", "pretokenizers");
            json[part] = json!({"type": "Sequence", key: rules});
            Tokenizer::parse("t.json", json.to_string().as_bytes()).map(|_| ())
        };
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                           "use_regex": false});
        for (part, rule) in [
            ("normalizer", replace("e", "eeee")),
            ("normalizer", replace("ħ", "ħħħħ")),
            ("pre_tokenizer", bytes),
            ("decoder", replace("e", "eeee")),
        ] {
            let error = parse(part, vec![rule.clone(); 14]).unwrap_err().to_string();
            assert_eq!(error, format!("t.json: its {part} makes a text more than 64 times longer"));
            parse(part, vec![rule]).unwrap();
        }
        // Each letter once: the text grows three times, no matter how many rules.
        let fractions: Vec<Value> =
            ('a'..='z').map(|c| replace(&c.to_string(), &format!("{c}/2"))).collect();
        parse("normalizer", fractions).unwrap();
        // One rule that would write a gigabyte.
        let any =
            json!({"type": "Replace", "pattern": {"Regex": "."}, "content": "e".repeat(1 << 20)});
        assert!(parse("normalizer", vec![any]).is_err());
    }

    #[test]
    fn pieces_are_whole_characters_and_join_to_the_text() {
        let t = tokenizer();
        let text = "ab c漢é a";
        let ids = t.encode(text).unwrap();
        for printed in 1..ids.len() {
            let mut stream = Stream::new(&t, &ids[..printed]);
            let mut joined = t.decode(&ids[..printed]).unwrap();
            if joined.ends_with('\u{fffd}') {
                continue;
            }
            for &id in &ids[printed..] {
                joined += &stream.push(id).unwrap();
            }
            assert_eq!(joined + &stream.finish().unwrap(), text);
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_printed_once() {
        let t = tokenizer();
        // é, a byte that continues nothing, then a
        let mut stream = Stream::new(&t, &[1]);
        let pieces: Vec<String> = [0xc3 + 3, 0xa9 + 3, 0xa9 + 3, 260]
            .iter()
            .map(|&id| stream.push(id).unwrap())
            .collect();
        assert_eq!(pieces, ["", "é", "", "\u{fffd}a"]);
        assert_eq!(stream.finish().unwrap(), "");
    }
}
