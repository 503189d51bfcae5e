use crate::{Checkpoint, Config, Error, Result};

/// How a text becomes the windows that a model is evaluated on.
///
/// With a document mark, each document is a window of its own, cut to `window` tokens; documents
/// are taken in order until the next one would bring the total above `max_tokens`. Without, the
/// text is one stream: its first `12 · max_tokens` characters are encoded, cut to `max_tokens`
/// tokens, and dealt out in windows of `window` tokens without overlap; the last may be shorter.
/// BOS opens every window and is not counted.
///
/// # Example
/// ```
/// use lowbit_lm::Protocol;
///
/// let stories = Protocol { document_mark: Some("<|endoftext|>".into()), ..Protocol::default() };
/// assert_eq!((stories.max_tokens, stories.window), (30_000, None));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Tokens to evaluate on, at most.
    pub max_tokens: usize,
    /// Tokens of a window, at most; `None` for max_position_embeddings − 1.
    pub window: Option<usize>,
    /// What stands between two documents.
    pub document_mark: Option<String>,
    /// Bytes of the file to pass over.
    pub skip_bytes: usize,
}

impl Default for Protocol {
    /// A stream of 30,000 tokens in the longest windows.
    fn default() -> Self {
        Self { max_tokens: 30_000, window: None, document_mark: None, skip_bytes: 0 }
    }
}

/// Texts for evaluation or calibration, as tokens: at least one window, each of at least two
/// tokens, of which the first is given (BOS) and the others are predicted, and none longer than
/// the model's context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows(Vec<Vec<u32>>);

impl Windows {
    /// The windows of `text`, the bytes of a file that error messages call `file`. Bytes that are
    /// not UTF-8 are left out, CR LF counts as LF, and documents are stripped of white space.
    ///
    /// # Errors
    /// [`Error::Empty`] if there is no text, no document of at most max_tokens, or no room for a
    /// token; [`Error::Context`] if `window` and BOS exceed the model's context;
    /// [`Error::Config`] if config.json names no BOS; [`Error::Token`] if tokenizer and model do
    /// not belong together.
    pub fn from_text(
        checkpoint: &Checkpoint,
        file: &str,
        text: &[u8],
        protocol: &Protocol,
    ) -> Result<Self> {
        let Protocol { max_tokens, window, ref document_mark, skip_bytes } = *protocol;
        let config = checkpoint.config();
        let context = config.max_position_embeddings;
        let window = window.unwrap_or(context - 1);
        if window >= context {
            let tokens = window.saturating_add(1);
            return Err(Error::Context { what: "a window with its BOS", tokens, context });
        }
        if window == 0 || max_tokens == 0 {
            let what =
                format!("window {window} and max_tokens {max_tokens}: both must be at least 1");
            return Err(Error::Empty { what });
        }
        let bos = config.bos_token_id.ok_or_else(|| Error::Config {
            file: format!("{}/config.json", checkpoint.name()),
            field: "bos_token_id",
            expected: "the token that opens a window".into(),
            got: "nothing".into(),
        })?;
        let rest = text.get(skip_bytes..).unwrap_or(&[]);
        let valid: String = rest.utf8_chunks().map(|chunk| chunk.valid()).collect();
        let clean = valid.replace("\r\n", "\n");
        if clean.trim().is_empty() {
            let (len, what) = (text.len(), "there is no text to evaluate on");
            let what = format!("{file}: {what} in its {len} bytes after the first {skip_bytes}");
            return Err(Error::Empty { what });
        }

        let encode = |text: &str| checkpoint.tokenizer().encode_plain(text);
        let open = |tokens: &[u32]| [&[bos], tokens].concat();
        let (mut windows, mut total) = (Vec::new(), 0);
        match document_mark.as_deref() {
            Some("") => return Err(Error::Invalid("the document mark is empty".into())),
            Some(mark) => {
                for document in clean.split(mark).map(str::trim).filter(|d| !d.is_empty()) {
                    let mut tokens = encode(document)?;
                    tokens.truncate(window);
                    total += tokens.len();
                    if total > max_tokens {
                        break;
                    }
                    windows.push(open(&tokens));
                }
            }
            None => {
                let end = clean.char_indices().nth(max_tokens.saturating_mul(12));
                let mut tokens = encode(&clean[..end.map_or(clean.len(), |(i, _)| i)])?;
                tokens.truncate(max_tokens);
                windows.extend(tokens.chunks(window).map(open));
            }
        }
        windows.retain(|window| window.len() > 1);
        if windows.is_empty() {
            let what = match (document_mark, total) {
                (Some(_), 0) => "there is no document between the marks".into(),
                _ => format!("its first document has more than {max_tokens} tokens"),
            };
            let what = format!("{file}: {what}");
            return Err(Error::Empty { what });
        }
        Self::new(config, windows)
    }

    /// The windows of a token file, which error messages call `file`: one on each line, its tokens
    /// as numbers between spaces, the first of them BOS.
    ///
    /// # Errors
    /// [`Error::File`] naming the line that is not like that; [`Error::Empty`] if there is none;
    /// [`Error::Token`] or [`Error::Context`] if it is of another model.
    pub fn from_tokens(config: &Config, file: &str, text: &str) -> Result<Self> {
        let mut windows = Vec::new();
        for (line, text) in text.lines().enumerate() {
            let error = |reason: String| Error::File {
                file: file.into(),
                reason: format!("line {}: {reason}", line + 1),
            };
            let tokens: Vec<u32> = text
                .split_ascii_whitespace()
                .map(|t| t.parse().map_err(|_| error(format!("expected tokens, got {t:?}"))))
                .collect::<Result<_>>()?;
            match (tokens.first(), config.bos_token_id) {
                (None, _) => continue,
                (Some(&got), Some(bos)) if got != bos => {
                    return Err(error(format!(
                        "expected {bos}, BOS, as the first token, got {got}"
                    )));
                }
                _ => {}
            }
            if tokens.len() < 2 {
                return Err(error("expected at least two tokens, got one".into()));
            }
            windows.push(tokens);
        }
        if windows.is_empty() {
            return Err(Error::Empty { what: format!("{file}: there are no tokens in it") });
        }
        Self::new(config, windows)
    }

    fn new(config: &Config, windows: Vec<Vec<u32>>) -> Result<Self> {
        let (context, vocab_size) = (config.max_position_embeddings, config.vocab_size);
        for window in &windows {
            let tokens = window.len();
            if tokens > context {
                return Err(Error::Context { what: "a window", tokens, context });
            }
            if let Some(&token) = window.iter().find(|&&token| token as usize >= vocab_size) {
                return Err(Error::Token { token, vocab_size });
            }
        }
        Ok(Self(windows))
    }

    /// The windows, each opened by BOS.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// How many windows there are; at least one.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one window")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Tokens to predict: all but the first of each window.
    pub fn predicted(&self) -> usize {
        self.iter().map(|window| window.len() - 1).sum()
    }

    /// The first windows, as many as hold `max_tokens` predicted tokens, but at least one.
    #[must_use]
    pub fn first(&self, max_tokens: usize) -> Self {
        let mut total = 0;
        let fits = |window: &&Vec<u32>| {
            total += window.len() - 1;
            total <= max_tokens
        };
        let count = self.0.iter().take_while(fits).count().max(1);
        Self(self.0[..count].to_vec())
    }
}
