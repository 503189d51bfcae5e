#!/usr/bin/env python3
"""Low-bit weights: `lowbit bench gemm`, onnxruntime, OpenVINO, bitsandbytes, one after the other in rounds.

usage: lowbit.py LOWBIT [--rounds 3] [--threads 1] [--shapes 1,4096,4096,cold 512,4096,4096] [--peer "NAME=COMMAND"]...
                 [--ours int4-g128:int8 nf4-g64:bf16 ...]

LOWBIT is the program; --ours are its schemes and what activations are multiplied in. Packages: numpy, onnx, onnxruntime,
openvino, torch, bitsandbytes; what cannot be imported is left out. A peer's COMMAND is called with m, n, k and 1 if weights are to
come from memory, else 0; it prints a line of JSON with min_s and median_s. f32 in and out, operands random. Prints, for each
shape, the least time and the least median of the rounds, as a table.
"""
import sys
from common import COLD_BYTES, options, others, ours, tables, timed

args = options(["1,4096,4096,cold", "1,4096,4096", "16,4096,4096", "512,4096,4096"], ours=[
    "int8:int8", "int4:int8", "int4-g128:int8", "int4-g64:int8", "int4-g32:int8", "int4-g128-zp:int8", "int4-g128-is4:int8",
    "int4-g32-is4:int8", "nf4-g64:int8", "mxfp4:int8", "nvfp4:int8", "int2-g32:int8", "int3-g32:int8", "int5-g32:int8",
    "int6-g32:int8", "int4-g128:bf16", "int4-g32:bf16", "nf4-g64:bf16", "mxfp4:bf16", "fp8:bf16", "int4-g128:f32", "nf4-g64:f32",
    "fp8:f32"])
contenders = {}
for name in args.ours:
    scheme, compute = name.split(":")
    contenders[f"lowbit {scheme}, {compute}"] = ours(args, "--scheme", scheme, "--compute", compute)
contenders |= others(args)

try:
    import numpy as np, onnx, onnxruntime as ort
    from onnx import TensorProto as T, helper, numpy_helper

    def matmul_n_bits(block, level):
        def measure(m, n, k, cold):
            random = np.random.default_rng(1)
            blocks = k // block
            w = random.integers(0, 256, (n, blocks, block // 2), dtype=np.uint8)
            copies = COLD_BYTES // w.nbytes + 1 if cold else 1
            weights = [numpy_helper.from_array(np.full(n * blocks, 0.01, np.float32), "scales")]
            nodes = []
            for i in range(copies):
                weights.append(numpy_helper.from_array(np.roll(w, i, 0), f"w{i}"))
                nodes.append(helper.make_node("MatMulNBits", ["x", f"w{i}", "scales"], [f"y{i}"], domain="com.microsoft",
                                              K=k, N=n, bits=4, block_size=block, accuracy_level=level))
            outputs = [helper.make_tensor_value_info(f"y{i}", T.FLOAT, [m, n]) for i in range(copies)]
            graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", T.FLOAT, [m, k])], outputs, weights)
            opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
            model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(random.standard_normal((m, k), dtype=np.float32)))
            results = [ort.OrtValue.ortvalue_from_numpy(np.zeros((m, n), np.float32)) for _ in range(copies)]
            for i, result in enumerate(results):
                binding.bind_ortvalue_output(f"y{i}", result)
            least, median = timed([lambda: session.run_with_iobinding(binding)])
            return least / copies, median / copies
        return measure

    contenders[f"onnxruntime {ort.__version__} MatMulNBits, b128, int8"] = matmul_n_bits(128, 4)
    contenders[f"onnxruntime {ort.__version__} MatMulNBits, b32, int8"] = matmul_n_bits(32, 4)
except ImportError as error:
    print(f"left out: {error}", file=sys.stderr)

try:
    import numpy as np, openvino as ov
    from openvino import opset13 as op
    core = ov.Core()

    def openvino(group_size, precision, dynamic):
        def measure(m, n, k, cold):
            random = np.random.default_rng(1)
            groups = k // group_size
            w = random.integers(0, 256, n * k // 2, dtype=np.uint8)
            copies = COLD_BYTES // w.nbytes + 1 if cold else 1
            x = op.parameter([m, k], ov.Type.f32)

            def u4(values, shape):
                tensor = ov.Tensor(ov.Type.u4, ov.Shape(shape))
                np.copyto(tensor.data.view(np.uint8).reshape(-1), values)
                return op.convert(op.constant(tensor), "f16")

            results = []
            for i in range(copies):
                levels = op.subtract(u4(np.roll(w, i), [n, groups, group_size]),
                                     u4(np.full(n * groups // 2, 0x88, np.uint8), [n, groups, 1]))
                scaled = op.multiply(levels, op.constant(np.full((n, groups, 1), 0.01, np.float16)))
                flat = op.reshape(scaled, op.constant(np.array([n, k], np.int64)), False)
                results.append(op.result(op.matmul(x, op.convert(flat, "f32"), False, True)))
            model = core.compile_model(ov.Model(results, [x], "m"), "CPU", {
                "INFERENCE_NUM_THREADS": args.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision,
                "ENABLE_CPU_PINNING": False, "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic})
            request = model.create_infer_request()
            request.set_input_tensor(ov.Tensor(random.standard_normal((m, k), dtype=np.float32)))
            least, median = timed([request.infer])
            return least / copies, median / copies
        return measure

    version = ov.__version__.split("-")[0]
    contenders[f"OpenVINO {version}, u4 g128, int8 in groups of 32"] = openvino(128, "f32", 32)
    contenders[f"OpenVINO {version}, u4 g128, bf16"] = openvino(128, "bf16", 0)
    contenders[f"OpenVINO {version}, u4 g128, f32"] = openvino(128, "f32", 0)
except ImportError as error:
    print(f"left out: {error}", file=sys.stderr)

try:
    import torch, bitsandbytes as bnb
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    def bitsandbytes(dtype):
        def measure(m, n, k, cold):
            calls = []
            for _ in range(COLD_BYTES // (n * k // 2) + 1 if cold else 1):
                layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
                w = (torch.randn(n, k) * 0.02).to(dtype) if not calls else w
                layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=False)
                layer, x = layer.to("cpu").eval(), torch.randn(m, k).to(dtype)
                calls.append(lambda layer=layer, x=x: layer(x))
            return timed(calls)
        return measure

    contenders[f"bitsandbytes {bnb.__version__} NF4, f32"] = bitsandbytes(torch.float32)
    contenders[f"bitsandbytes {bnb.__version__} NF4, bf16"] = bitsandbytes(torch.bfloat16)
except ImportError as error:
    print(f"left out: {error}", file=sys.stderr)

tables(args, contenders)
