//! Matrices, quantization schemes, quantized layers and their reference arithmetic.
