#!/usr/bin/env python3
"""int8 products of `lowbit bench gemm`, onnxruntime and PyTorch (oneDNN), one after the other in rounds.

usage: gemm.py LOWBIT [--rounds 3] [--threads 1] [--kernels a b] [--shapes 128,4096,4096 1,4096,4096,cold]
               [--peer "NAME=COMMAND"]...

LOWBIT is the program. Packages: numpy, onnx, onnxruntime, torch; what cannot be imported is left out. A peer's
COMMAND is called with m, n, k and 1 if weights are to come from memory, else 0; it prints a line of JSON with min_s
and median_s. Prints, for each shape, the least time and the least median of the rounds, as a table. Operands are random.
"""
import sys
from common import COLD_BYTES, options, others, ours, tables, timed

args = options(["128,4096,4096", "512,4096,4096", "1024,4096,4096", "512,11008,4096", "16,4096,4096", "1,4096,4096,cold"],
               kernels=["avx512_vnni", "avx_vnni", "avx2"])
contenders = {f"lowbit {kernel}, f32 to f32": ours(args, "--scheme", "w8a8", "--kernel", kernel) for kernel in args.kernels}
contenders |= others(args)

try:
    import numpy as np, onnx, onnxruntime as ort
    from onnx import TensorProto as T, helper, numpy_helper

    def onnxruntime(dynamic):
        def measure(m, n, k, cold):
            random = np.random.default_rng(1)
            w = random.integers(-127, 128, (k, n), dtype=np.int8)
            copies = COLD_BYTES // w.nbytes + 1 if cold else 1
            scale, zero = np.full(n, 0.01, np.float32), np.array(128, np.uint8)
            nodes, weights = [], [numpy_helper.from_array(scale if dynamic else zero, "third")]
            for i in range(copies):
                weights.append(numpy_helper.from_array(np.roll(w, i, 0), f"w{i}"))
                op = ("DynamicQuantizeMatMul", ["x", f"w{i}", "third"], "com.microsoft") if dynamic else (
                    "MatMulInteger", ["x", f"w{i}", "third"], "")
                nodes.append(helper.make_node(op[0], op[1], [f"y{i}"], domain=op[2]))
            given, made = (T.FLOAT, T.FLOAT) if dynamic else (T.UINT8, T.INT32)
            outputs = [helper.make_tensor_value_info(f"y{i}", made, [m, n]) for i in range(copies)]
            graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", given, [m, k])], outputs, weights)
            opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
            model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            x = random.standard_normal((m, k), dtype=np.float32) if dynamic else random.integers(0, 256, (m, k), dtype=np.uint8)
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
            results = [ort.OrtValue.ortvalue_from_numpy(np.zeros((m, n), np.float32 if dynamic else np.int32)) for _ in range(copies)]
            for i, result in enumerate(results):
                binding.bind_ortvalue_output(f"y{i}", result)
            least, median = timed([lambda: session.run_with_iobinding(binding)])
            return least / copies, median / copies
        return measure

    contenders[f"onnxruntime {ort.__version__} MatMulInteger, u8 to i32"] = onnxruntime(False)
    contenders[f"onnxruntime {ort.__version__} DynamicQuantizeMatMul, f32 to f32"] = onnxruntime(True)
except ImportError as error:
    print(f"left out: {error}", file=sys.stderr)

try:
    import torch
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    def onednn(dynamic):
        def measure(m, n, k, cold):
            torch.backends.quantized.engine = "onednn"
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int32)
            calls = []
            for i in range(COLD_BYTES // (n * k) + 1 if cold else 1):
                rolled = w.roll(i, 0)
                if dynamic:
                    x = torch.randn(m, k)
                    q = torch._make_per_channel_quantized_tensor(rolled, scales.double(), zeros.long(), 0)
                    packed = torch.ops.quantized.linear_prepack(q, None)
                    calls.append(lambda x=x, p=packed: torch.ops.quantized.linear_dynamic(x, p, False))
                else:
                    x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
                    packed = torch.ops.onednn.qlinear_prepack(rolled, [m, k])
                    calls.append(lambda x=x, p=packed: torch.ops.onednn.qlinear_pointwise(
                        x, 0.02, 128, p, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""))
            return timed(calls)
        return measure

    contenders[f"oneDNN (torch {torch.__version__}), u8 to f32"] = onednn(False)
    contenders[f"oneDNN (torch {torch.__version__}), f32 to f32"] = onednn(True)
except ImportError as error:
    print(f"left out: {error}", file=sys.stderr)

tables(args, contenders)
