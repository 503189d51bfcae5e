use std::path::PathBuf;

/// What can be wrong with a checkpoint, a text or a request. Messages are one line: the file, the
/// tensor or field, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("{}: {cause}{}", path.display(), hint(path, cause))]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        cause: std::io::Error,
    },
    /// A file that is not in the form it should have.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What is expected and what is there.
        reason: String,
    },
    /// A tokenizer that cannot be read, or fails.
    #[error("{file}: {reason}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is expected and what is there.
        reason: String,
    },
    /// A field of config.json that is missing, contradictory, or asks for what this decoder does
    /// not have.
    #[error("{file}: {field}: expected {expected}, got {got}")]
    Config {
        /// The file.
        file: String,
        /// The field.
        field: &'static str,
        /// What would be right.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A safetensors file is damaged, or a tensor is missing or of another type.
    #[error(transparent)]
    Format(#[from] lowbit::formats::Error),
    /// A tensor has another shape than config.json says.
    #[error(
        "{file}: tensor {tensor}: expected shape {expected:?}, got {got:?}: it does not belong to this config.json"
    )]
    TensorShape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shape that config.json implies.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor that this architecture has no place for.
    #[error(
        "{file}: tensor {tensor} has no place in this architecture: is config.json of another model?"
    )]
    TensorUnknown {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// NaN or infinity in a weight.
    #[error(
        "{file}: tensor {tensor} is not finite at {position:?}: the checkpoint is damaged, convert or download it again"
    )]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Index of the first such element, in each dimension.
        position: Vec<usize>,
    },
    /// Something went wrong in one linear layer.
    #[error("{layer}: {cause}")]
    Layer {
        /// Its name in the checkpoint.
        layer: String,
        /// What.
        cause: lowbit::Error,
    },
    /// The layer built for a place has another shape than the place.
    #[error("{layer}: expected a layer of {} inputs and {} outputs, got {} and {}",
        .expected.1, .expected.0, .got.1, .got.0)]
    LayerShape {
        /// The place's name in the checkpoint.
        layer: String,
        /// Expected out_features and in_features.
        expected: (usize, usize),
        /// Those of the layer.
        got: (usize, usize),
    },
    /// More tokens than the model has positions.
    #[error(
        "{what} of {tokens} tokens does not fit the model's context of {context}: make it shorter"
    )]
    Context {
        /// What is too long.
        what: &'static str,
        /// Its tokens, with those already in the cache.
        tokens: usize,
        /// max_position_embeddings.
        context: usize,
    },
    /// A token that the model does not know.
    #[error("token {token} is outside the model's vocabulary of {vocab_size}")]
    Token {
        /// The token.
        token: u32,
        /// vocab_size.
        vocab_size: usize,
    },
    /// Nothing to work on.
    #[error("{what}")]
    Empty {
        /// What is empty and what would be needed.
        what: String,
    },
    /// A request that makes no sense: the message says which and what would.
    #[error("{0}")]
    Invalid(String),
    /// The model's output is NaN or infinite.
    #[error("the logits after {place} are not finite: the model is damaged")]
    Logits {
        /// Which token of which window.
        place: String,
    },
    /// Two models of different vocabularies cannot be compared.
    #[error("the model has a vocabulary of {got}, its baseline one of {expected}")]
    Baseline {
        /// The baseline's vocab_size.
        expected: usize,
        /// The model's.
        got: usize,
    },
}

fn hint(path: &std::path::Path, cause: &std::io::Error) -> &'static str {
    let parts = ["config.json", "tokenizer.json", "model.safetensors"];
    let is_part = path.file_name().is_some_and(|name| parts.iter().any(|part| name == *part));
    match cause.kind() {
        std::io::ErrorKind::NotFound if is_part => {
            ": a model folder has config.json, tokenizer.json and model.safetensors, or a GGUF file"
        }
        _ => "",
    }
}
