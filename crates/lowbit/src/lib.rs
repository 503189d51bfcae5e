//! Quantize language-model weights and multiply with them, on the CPU.
