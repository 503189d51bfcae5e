use crate::Dtype;

/// What can be wrong with a checkpoint file. Messages name the file and the tensor.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file ends too early.
    #[error(
        "{file}: expected {expected} bytes, got {got}: the file is truncated, copy or download it again"
    )]
    Truncated {
        /// The file.
        file: String,
        /// Bytes that the file should have, or at least.
        expected: u64,
        /// Bytes that it has.
        got: u64,
    },
    /// The file is not what its name says.
    #[error("{file}: expected a {format} file, but {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// The container it should be.
        format: &'static str,
        /// What contradicts that.
        reason: String,
    },
    /// A tensor's entry in the header contradicts itself or the file.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is expected and what is there.
        reason: String,
    },
    /// There is no tensor of that name.
    #[error("{file}: tensor {tensor} is missing")]
    Missing {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of numbers that are not weights.
    #[error("{file}: tensor {tensor} is {got}, expected F32, F16 or BF16: convert the checkpoint")]
    Dtype {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The type found.
        got: Dtype,
    },
    /// A layer's tensors do not make a layer.
    #[error("{file}: layer {layer}: {cause}")]
    Layer {
        /// The file.
        file: String,
        /// The layer.
        layer: String,
        /// What contradicts.
        cause: lowbit_core::Error,
    },
    /// A layer that a convention has no tensors for.
    #[error("layer {layer}: {convention} cannot hold {what}")]
    Unsupported {
        /// The layer.
        layer: String,
        /// The convention.
        convention: &'static str,
        /// What it lacks.
        what: String,
    },
    /// A `quantization_config` that names no convention of this crate, or one of another meaning.
    #[error("quantization_config: {reason}")]
    Config {
        /// What is expected and what is there.
        reason: String,
    },
}
