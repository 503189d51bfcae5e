"""Reads what `lowbit quantize` has written as the programs do that define the formats, and compares.

usage: python3 readers.py READER FOLDER…

FOLDER is what `lowbit quantize` has made. Beside it lies FOLDER.weights with the weights that lowbit computes with: a
safetensors file of `X.weight` in f32 for each linear layer X. Every weight must agree within a millionth of the largest of its layer, or within
a rounding to bfloat16 where the reader ends in that type.

READER is one of:

compressed-tensors  compressed-tensors' own decompression of each layer, and which layers its configuration covers
transformers        the logits of the model that transformers loads, against those of the same model with these weights
bitsandbytes        bitsandbytes' own dequantization
autoawq, autogptq   the layouts of these programs, written down here again in numpy: neither installs without a GPU
gguf                the package gguf, with rows of q and k in the order of llama.cpp

Packages that are missing are named, and the exit status is 3.
"""

import json
import sys
from pathlib import Path


def load(folder):
    from safetensors import safe_open

    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def quantization(folder):
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def parts_of(tensors, layer):
    start = layer + "."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def compressed_tensors(folder, layers):
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = quantization(folder)
    config = QuantizationConfig.model_validate(raw)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors = load(folder)
    for layer in layers:
        state = parts_of(tensors, layer)
        # Products are computed in the type of the scales.
        if state["weight_scale"].dtype != torch.uint8 and state["weight_scale"].dtype.itemsize > 1:
            state["weight_scale"] = state["weight_scale"].float()
        yield layer, compressor.decompress(state, scheme)["weight"]
    # Every linear layer is either quantized or ignored by name.
    model = AutoConfig.from_pretrained(folder)
    del model.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model)
    covered = {name for name, _ in match_named_modules(model, scheme.targets, config.ignore)}
    assert covered == set(layers), covered ^ set(layers)


def transformers(folder, layers):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    options, raw = {}, quantization(folder)
    groups = raw.get("config_groups", {}).values()
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    if not symmetric or raw.get("format", "")[:2] in ("mx", "nv"):
        # transformers 5.24 makes no place for packed zero-points unless layers are dequantized when they are loaded, and
        # multiplies weights of MX and NV formats in bfloat16 with inputs in f32, which PyTorch refuses.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    if options:
        torch.nn.Module.float(model)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load(folder)
    state = {name: value for name, value in tensors.items() if name.rsplit(".", 1)[0] not in layers}
    state |= {f"{layer}.weight": weight for layer, weight in layers.items()}
    state = {name: value for name, value in state.items() if name in expected.state_dict()}
    left_out = expected.load_state_dict(state, strict=False).missing_keys
    assert set(left_out) <= {"lm_head.weight"}, left_out
    expected.tie_weights()
    tokens = torch.tensor([[1, 403, 407, 261, 378, 432, 10, 20, 30, 40]]) % config.vocab_size
    with torch.no_grad():
        got, want = model(tokens).logits.float(), expected(tokens).logits
    error = ((got - want).norm() / want.norm()).item()
    # compressed-tensors rounds weights to the type of their scales, f16, or to bfloat16 (NVFP4).
    most = 1e-2 if raw.get("format", "").startswith("nv") else 1e-3
    assert error < most, f"logits differ by {error}"
    print(f"{Path(folder).name}: logits agree within {error:.1e}")
    return []


def bitsandbytes(folder, layers):
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    tensors = load(folder)
    for layer in layers:
        state = parts_of(tensors, layer)
        weight = state.pop("weight")
        if "SCB" in state:
            yield layer, int8_vectorwise_dequant(weight, state["SCB"])
            continue
        state = {name: value for name, value in state.items() if name.startswith("weight.")}
        state = QuantState.from_dict(state, torch.device("cpu"))
        yield layer, dequantize_4bit(weight, state)


def fields(words, bits):
    """The unsigned fields of a stream of bits, the least significant first, along axis 0: (words, n) to (fields, n)."""
    import numpy as np

    words = words.astype(np.int64) & 0xFFFFFFFF
    stream = (words[:, None, :] >> np.arange(32)[None, :, None]) & 1
    stream = stream.reshape(-1, words.shape[1])
    count = stream.shape[0] // bits
    stream = stream[: count * bits].reshape(count, bits, -1)
    return (stream << np.arange(bits)[None, :, None]).sum(1)


def autogptq(folder, layers):
    """AutoGPTQ's QuantLinear: w[n, k] = scales[g, n] * (q[k, n] - (z[g, n] + 1)), g = g_idx[k]."""
    import numpy as np

    config, tensors = quantization(folder), load(folder)
    for layer in layers:
        state = {name: value.numpy() for name, value in parts_of(tensors, layer).items()}
        bits, (groups, n) = config["bits"], state["scales"].shape
        q = fields(state["qweight"], bits)[: len(state["g_idx"])]
        z = fields(np.ascontiguousarray(state["qzeros"].T), bits)[:n].T
        v1 = config.get("checkpoint_format", "gptq") == "gptq"
        z = (z + 1) % 2**bits if v1 else z
        g = state["g_idx"]
        yield layer, (state["scales"].astype(np.float32)[g] * (q - z[g])).T


def autoawq(folder, layers):
    """AutoAWQ's WQLinear_GEMM: nibble i of a word of eight outputs is that of output [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    import numpy as np

    config, tensors = quantization(folder), load(folder)
    assert (config["bits"], config["version"], config["zero_point"]) == (4, "gemm", True)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def nibbles(words):
        rows, count = words.shape
        values = np.empty((rows, count, 8), np.int64)
        for i, place in enumerate(order):
            values[:, :, place] = (words.astype(np.int64) >> (4 * i)) & 15
        return values.reshape(rows, 8 * count)

    for layer in layers:
        state = {name: value.numpy() for name, value in parts_of(tensors, layer).items()}
        q, z = nibbles(state["qweight"]), nibbles(state["qzeros"])
        size = config["group_size"] if config["group_size"] > 0 else len(q)
        assert len(q) % size == 0
        g = np.arange(len(q)) // size
        yield layer, (state["scales"].astype(np.float32)[g] * (q - z[g])).T


def gguf(folder, layers):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = json.loads((Path(folder) / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    tensors = {tensor.name: tensor for tensor in GGUFReader(Path(folder) / "model.gguf").tensors}
    for layer in layers:
        _, _, block, _, last = layer.split(".")
        tensor = tensors[f"blk.{block}.{names[last]}.weight"]
        weight = dequantize(tensor.data, tensor.tensor_type)
        if last in heads:
            # Rows of a head alternate between its halves there.
            n, k = weight.shape
            weight = weight.reshape(heads[last], n // heads[last] // 2, 2, k).swapaxes(1, 2).reshape(n, k)
        yield layer, weight


READERS = {
    "compressed-tensors": compressed_tensors,
    "transformers": transformers,
    "bitsandbytes": bitsandbytes,
    "autoawq": autoawq,
    "autogptq": autogptq,
    "gguf": gguf,
}


def main(reader, *folders):
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"{reader} {version(reader)}")
    except PackageNotFoundError:
        print(reader)
    for folder in folders:
        compare(reader, folder)


def compare(reader, folder):
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder + ".weights")
    layers = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    count, largest = 0, 0.0
    for layer, got in READERS[reader](folder, layers):
        want, got = layers[layer], torch.as_tensor(got)
        # NVFP4 of compressed-tensors ends in bfloat16.
        most = 2**-8 if got.dtype == torch.bfloat16 else 1e-6
        got = got.float()
        assert got.shape == want.shape, (layer, got.shape, want.shape)
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error < most, f"{layer}: weights differ by {error}"
        count, largest = count + 1, max(largest, error)
    if count:
        assert count == len(layers)
        print(f"{Path(folder).name}: {count} layers agree within {largest:.1e}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ModuleNotFoundError as missing:
        print(missing)
        sys.exit(3)
