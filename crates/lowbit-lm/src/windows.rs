use std::str;

use lowbit::formats::recognize;

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

/// How much of a file decides what it is.
const START: usize = 1 << 16;
/// Fewer tokens say nothing about a layer's inputs.
const LEAST_CALIBRATION: usize = 16;

impl Windows {
    /// The windows of a file, whose bytes are either a [token file](Self::is_token_file), of which whole
    /// windows are taken up to `max_tokens`, or [a text](Self::from_text).
    ///
    /// # Errors
    /// Those of [`from_tokens`](Self::from_tokens) or [`from_text`](Self::from_text); [`Error::Invalid`] if
    /// `protocol` cuts a token file, whose lines are its windows, into others.
    ///
    /// # Example
    /// ```no_run
    /// use lowbit_lm::{Checkpoint, Protocol, Windows, read_file};
    ///
    /// let checkpoint = Checkpoint::open("models/stories3m")?;
    /// let file = "models/stories3m/eval.tokens";
    /// let bytes = read_file(file.as_ref())?;
    /// let windows = Windows::from_bytes(&checkpoint, file, &bytes, &Protocol::default())?;
    /// println!("{} windows", windows.len());
    /// # Ok::<(), lowbit_lm::Error>(())
    /// ```
    pub fn from_bytes(
        checkpoint: &Checkpoint,
        file: &str,
        bytes: &[u8],
        protocol: &Protocol,
    ) -> Result<Self> {
        if !Self::is_token_file(file, bytes) {
            return Self::from_text(checkpoint, file, bytes, protocol);
        }
        if protocol.window.is_some() || protocol.skip_bytes != 0 {
            let what = "its lines are its windows: leave window and skipped bytes out";
            return Err(Error::Invalid(format!("{file} is a file of tokens, and {what}")));
        }
        if protocol.max_tokens == 0 {
            return Err(Error::Empty { what: "max_tokens 0: must be at least 1".into() });
        }
        let text = utf8(file, bytes, 0)?;
        Ok(Self::from_tokens(checkpoint.config(), file, text)?.first(protocol.max_tokens))
    }

    /// Is this a file of tokens, as [`from_tokens`](Self::from_tokens) reads it, and no text? It is if its
    /// name ends in `.tokens`, or if nine of ten words at its start are numbers, in whatever brackets and
    /// with whatever commas. Whether they are tokens of a model shows when it is read.
    ///
    /// # Example
    /// ```
    /// use lowbit_lm::Windows;
    ///
    /// assert!(Windows::is_token_file("story", b"1 403 407 261\n1 410 469"));
    /// assert!(!Windows::is_token_file("story", b"3 little pigs lived in 3 houses"));
    /// ```
    pub fn is_token_file(file: &str, bytes: &[u8]) -> bool {
        if file.ends_with(".tokens") {
            return true;
        }
        let start = &bytes[..bytes.len().min(START)];
        let (mut words, mut numbers) = (0_usize, 0_usize);
        let between = |byte: &u8| byte.is_ascii_whitespace() || b",[]".contains(byte);
        for word in start.split(between).filter(|word| !word.is_empty()) {
            words += 1;
            numbers += usize::from(word.len() <= 10 && word.iter().all(u8::is_ascii_digit));
        }
        words > 1 && numbers * 10 >= words * 9
    }

    /// Are these enough tokens to calibrate a model of this shape on? If not quite, what to say about it.
    ///
    /// The statistics of a layer of `k` inputs have `k` independent rows, or more than that many free
    /// numbers: fewer tokens than the widest layer has inputs leave some of them to chance.
    ///
    /// # Errors
    /// [`Error::Invalid`] for fewer than 16 tokens.
    ///
    /// # Example
    /// ```no_run
    /// use lowbit_lm::{Checkpoint, Windows};
    ///
    /// let checkpoint = Checkpoint::open("models/stories3m")?;
    /// let windows = Windows::from_tokens(checkpoint.config(), "text", "1 403 407 261 378 432")?;
    /// assert!(windows.check_calibration(checkpoint.config()).is_err());
    /// # Ok::<(), lowbit_lm::Error>(())
    /// ```
    pub fn check_calibration(&self, config: &Config) -> Result<Option<String>> {
        let widest = config.hidden_size.max(config.intermediate_size).max(config.q_size());
        let tokens = self.predicted();
        let few = format!(
            "{tokens} tokens to calibrate on, for layers of up to {widest} inputs: give a text of at least"
        );
        match tokens {
            ..LEAST_CALIBRATION => {
                Err(Error::Invalid(format!("{few} {LEAST_CALIBRATION} tokens, better {widest}")))
            }
            _ if tokens < widest => Ok(Some(format!("{few} {widest} tokens"))),
            _ => Ok(None),
        }
    }

    /// The windows of `text`, the bytes of a file that error messages call `file`, whatever they are. CR LF
    /// counts as LF, a byte order mark is left out, and so are parts of a character where `skip_bytes` or
    /// the end of the file cut one; documents are stripped of white space.
    ///
    /// # Errors
    /// [`Error::File`] naming the first byte that is no UTF-8, or 0; [`Error::Empty`] if there is no text, no document of at most max_tokens, or no room for a
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
        let clean = utf8(file, text, skip_bytes)?.replace("\r\n", "\n");
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

    /// The first windows, as many as hold `max_tokens` predicted tokens. If the first has more, it is cut;
    /// one token is left at least.
    #[must_use]
    pub fn first(&self, max_tokens: usize) -> Self {
        let mut total = 0;
        let fits = |window: &&Vec<u32>| {
            total += window.len() - 1;
            total <= max_tokens
        };
        let count = self.0.iter().take_while(fits).count();
        let mut windows = self.0[..count.max(1)].to_vec();
        if count == 0 {
            windows[0].truncate(max_tokens.max(1).saturating_add(1));
        }
        Self(windows)
    }
}

/// The text in the bytes of a file, from byte `start` on.
fn utf8<'a>(file: &str, bytes: &'a [u8], start: usize) -> Result<&'a str> {
    let error = |reason: String| Error::File { file: file.into(), reason };
    let something_else = |reason: String| match recognize(bytes) {
        Some(kind) => error(format!("expected a text, but it is {kind}")),
        None => error(format!("expected a text in UTF-8, but {reason}: is this another file?")),
    };
    let mut start = start.min(bytes.len());
    if start == 0 && bytes.starts_with(b"\xef\xbb\xbf") {
        start = 3;
    }
    // Whoever passes over a number of bytes may hit the middle of a character, which has four at most.
    let cut = |byte: &&u8| start > 0 && **byte & 0xc0 == 0x80;
    start += bytes[start..].iter().take(3).take_while(cut).count();
    let rest = &bytes[start..];
    let text = match str::from_utf8(rest) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() => str::from_utf8(&rest[..e.valid_up_to()]).unwrap_or(""),
        Err(e) => {
            let at = start + e.valid_up_to();
            return Err(something_else(format!("byte {at} is 0x{:02x}", bytes[at])));
        }
    };
    match text.bytes().position(|byte| byte == 0) {
        None => Ok(text),
        Some(at) => Err(something_else(format!("byte {} is 0", start + at))),
    }
}
