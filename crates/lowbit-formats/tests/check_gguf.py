"""Reads a GGUF file with the Python package `gguf` (pip install gguf) and compares.

usage: python3 check_gguf.py FILE.gguf FILE.f32

FILE.f32 holds, in the order of the tensors in the file, the numbers that each stands for, as
little-endian f32. Every tensor must decode to the same bits, but for the sign of zero.
"""

import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


def main(path, expected):
    expected = np.fromfile(expected, "<f4")
    tensors = GGUFReader(path).tensors
    at = 0
    for tensor in tensors:
        got = dequantize(tensor.data, tensor.tensor_type).astype("<f4").reshape(-1)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        want = expected[at : at + got.size]
        at += got.size
        if got.size != int(np.prod(shape)) or not np.array_equal(got, want):
            sys.exit(f"{tensor.name}, {tensor.tensor_type.name}: other numbers")
        print(f"{tensor.name}: {tensor.tensor_type.name} {shape}")
    if at != expected.size:
        sys.exit(f"expected {expected.size} numbers, got {at}")
    print(f"{len(tensors)} tensors agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
