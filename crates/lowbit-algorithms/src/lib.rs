//! Quantization algorithms for language models, one paper a file.
