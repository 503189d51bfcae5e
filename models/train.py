#!/usr/bin/env python3
"""Trains models/stories3m: a small Llama on TinyStories, on the CPU, and writes everything the repository holds for it.

    python models/train.py TEXT --out models/stories3m            everything (about a quarter of an hour on 2 idle cores)
    python models/train.py TEXT --out models/stories3m --reuse    keep the weights and tokenizer, redo samples and figures

TEXT is UTF-8, documents separated by <|endoftext|>. The last documents (HELD_OUT of them) are never trained on.
Weights are rounded to bf16 first; perplexities, samples and golden values are computed in f32 from the rounded weights.
"""

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
BOS, EOS = CONFIG["bos_token_id"], CONFIG["eos_token_id"]
WINDOW = CONFIG["max_position_embeddings"]
HELD_OUT = 0.06  # share of the documents, the last ones

TRAIN_SEED, EVAL_SEED, CALIBRATION_SEED, SAMPLE_SEED = 1, 20, 30, 40
EVAL_TOKENS, CALIBRATION_TOKENS = 10_000, 32_000

EPOCHS = 6
BATCH_TOKENS = 2048
MUON_LR, ADAM_LR, WEIGHT_DECAY = 3e-3, 2e-3, 0.2
WARMUP = 0.04  # share of the steps; then linear to zero

LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


# ---- text and tokenizer ---------------------------------------------------------------------------------------------


def read_documents(path):
    """Documents for training and held-out ones. What follows the last separator is a cut document: dropped."""
    text = open(path, encoding="utf-8", errors="ignore", newline="").read().replace("\r\n", "\n")
    documents = [d.strip() for d in text.split("<|endoftext|>")[:-1]]
    documents = [d for d in documents if d]
    held = round(len(documents) * HELD_OUT)
    return documents[:-held], documents[-held:]


def train_tokenizer(documents):
    """BPE with byte fallback, in the form of Llama 2's tokenizer.json: ids 0-2 special, 3-258 bytes, then pieces.

    The trainer sees words (an optional leading space, then letters, or else other characters), so that no piece spans
    a space; encoding needs no such split, because no merge joins across a space. Newlines and rare characters are not
    in the alphabet: they are encoded as bytes.
    """
    fixed = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|▁?[^A-Za-z▁]+|▁"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=fixed, limit_alphabet=72, show_progress=False
    )
    trained.train_from_iterator((d.replace("\n", " ") for d in documents), trainer)
    model = json.loads(trained.to_str())["model"]
    assert len(model["vocab"]) == CONFIG["vocab_size"]

    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return tokenizer


def encode(tokenizer, documents):
    """BOS, the text, EOS; cut to the window."""
    out = []
    for document, encoding in zip(documents, tokenizer.encode_batch(documents)):
        assert encoding.ids[0] == BOS and tokenizer.decode(encoding.ids) == document
        out.append((encoding.ids + [EOS])[:WINDOW])
    return out


def pad(rows):
    """Rows of ids as inputs and targets; padding is target -1, which the loss ignores."""
    length = max(map(len, rows)) - 1
    inputs = torch.full((len(rows), length), EOS)
    targets = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    return inputs, targets


def batches(rows, generator):
    """Every document once, in batches of similar length and about BATCH_TOKENS tokens, in random order."""
    noise = torch.rand(len(rows), generator=generator)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) * (1 + 0.1 * float(noise[i])))
    groups, group, longest = [], [], 0
    for i in order:
        longest = max(longest, len(rows[i]))
        if group and longest * (len(group) + 1) > BATCH_TOKENS:
            groups.append(group)
            group, longest = [], len(rows[i])
        group.append(i)
    groups.append(group)
    return [[rows[i] for i in groups[j]] for j in torch.randperm(len(groups), generator=generator).tolist()]


# ---- model ----------------------------------------------------------------------------------------------------------


class Norm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, CONFIG["rms_norm_eps"])


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
        linear = lambda inputs, outputs: torch.nn.Linear(inputs, outputs, bias=False)
        self.q, self.k, self.v, self.o = linear(width, width), linear(width, keys), linear(width, keys), linear(width, width)
        self.gate, self.up, self.down = linear(width, inner), linear(width, inner), linear(inner, width)
        self.norm1, self.norm2 = Norm(width), Norm(width)

    def forward(self, x, cos, sin, cache):
        batch, length, width = x.shape
        heads = lambda y: y.view(batch, length, -1, CONFIG["head_dim"]).transpose(1, 2)
        half = CONFIG["head_dim"] // 2
        turn = lambda y: y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin
        h = self.norm1(x)
        q, k, v = turn(heads(self.q(h))), turn(heads(self.k(h))), heads(self.v(h))
        if cache is not None:
            cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v))] if cache else [k, v]
            k, v = cache
        groups = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        a = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=length > 1)
        x = x + self.o(a.transpose(1, 2).reshape(batch, length, width))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = torch.nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(CONFIG["hidden_size"])
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o.weight", "down.weight"))
                torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.layers)) if residual else 0.02)
        dim = CONFIG["head_dim"]
        angle = torch.outer(torch.arange(WINDOW).float(), CONFIG["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim))
        self.cos, self.sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def forward(self, ids, caches=None, start=0):
        x = self.embed(ids)
        cos, sin = self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if caches is None else caches[i])
        return F.linear(self.norm(x), self.embed.weight)


def named_weights(model):
    """Parameters by their Hugging Face names. The head is the embedding: it has no tensor of its own."""
    out = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        for short, name in LAYER_NAMES.items():
            out[f"model.layers.{i}.{name}.weight"] = getattr(layer, short).weight
    return out


def to_bf16(model):
    return {name: p.detach().to(torch.bfloat16).contiguous() for name, p in named_weights(model).items()}


def from_bf16(tensors):
    """The f32 model of a bf16 file."""
    model = Llama().eval()
    with torch.no_grad():
        for name, p in named_weights(model).items():
            p.copy_(tensors[name].float())
    return model


# ---- training -------------------------------------------------------------------------------------------------------


def train(rows, held_out, epochs, bf16, checkpoint):
    torch.manual_seed(TRAIN_SEED)
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    model = Llama()
    matrices = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": [model.embed.weight], "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}],
        lr=ADAM_LR,
        betas=(0.9, 0.98),
    )
    schedule = [batch for _ in range(epochs) for batch in batches(rows, generator)]
    ends = {round(len(schedule) * (e + 1) / epochs) for e in range(epochs)}
    best, best_tensors, done = math.inf, None, 0
    if checkpoint and os.path.exists(checkpoint):
        state = torch.load(checkpoint)
        best, best_tensors, done = state["best"], state["best_tensors"], state["done"]
        for part, name in ((model, "model"), (muon, "muon"), (adam, "adam")):
            part.load_state_dict(state[name])
    total, tokens, began = 0.0, 0, time.time()
    for step, batch in enumerate(schedule[done:], done + 1):
        at = step / len(schedule)
        scale = min(at / WARMUP, (1 - at) / (1 - WARMUP))
        for optimizer, lr in ((muon, MUON_LR), (adam, ADAM_LR)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        inputs, targets = pad(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        count = int((targets >= 0).sum())
        total, tokens = total + loss.item() * count, tokens + count
        if step % 20 == 0 or step in ends:
            line = f"step {step}/{len(schedule)} loss {total / tokens:.4f} {time.time() - began:.0f} s"
            if step in ends:
                tensors = to_bf16(model)
                perplexity, _ = evaluate(from_bf16(tensors), held_out)
                line += f" held-out perplexity {perplexity:.4f}"
                if perplexity < best:
                    best, best_tensors = perplexity, tensors
            print(line, flush=True)
            total, tokens = 0.0, 0
        if checkpoint and step % 100 == 0:
            state = {"best": best, "best_tensors": best_tensors, "done": step}
            state |= {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            torch.save(state, checkpoint + ".new")
            os.replace(checkpoint + ".new", checkpoint)
    return best_tensors


# ---- evaluation and sampling, f32 -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, rows):
    """exp of the mean negative log-likelihood of every token after BOS, and how many they are."""
    loss, count = 0.0, 0
    for start in range(0, len(rows), 8):
        inputs, targets = pad(rows[start : start + 8])
        logits = model(inputs).double().flatten(0, 1)
        loss += F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum").item()
        count += int((targets >= 0).sum())
    return math.exp(loss / count), count


@torch.no_grad()
def sample(model, seed, want):
    """Documents drawn at temperature 1 from the full softmax, in order until they hold `want` tokens.

    Each begins with BOS and ends with EOS, or is cut at WINDOW - 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    while sum(map(len, out)) < want:
        rows, caches = torch.full((48, 1), BOS), [[] for _ in model.layers]
        while rows.shape[1] < WINDOW - 1 and not bool((rows == EOS).any(1).all()):
            logits = model(rows[:, -1:], caches, rows.shape[1] - 1)[:, -1]
            rows = torch.cat([rows, torch.multinomial(logits.double().softmax(-1), 1, generator=generator)], 1)
        for row in rows.tolist():
            if sum(map(len, out)) < want:
                out.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return out


@torch.no_grad()
def golden(model, tokenizer, prompt="Once upon a time", new=60):
    ids = tokenizer.encode(prompt).ids
    caches = [[] for _ in model.layers]
    logits = model(torch.tensor([ids]), caches)[0, -1]
    first, margin, greedy = logits, math.inf, []
    for _ in range(new):
        top = logits.topk(2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        greedy.append(int(top.indices[0]))
        logits = model(torch.tensor([greedy[-1:]]), caches, len(ids) + len(greedy) - 1)[0, -1]
    return {
        "prompt": prompt,
        "prompt_ids": ids,
        "greedy_ids": greedy,
        "greedy_text": tokenizer.decode(ids + greedy),
        "greedy_min_margin": margin,
        "logits_first8": first[:8].tolist(),
        "logits_max": float(first.max()),
        "logits_argmax": int(first.argmax()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--reuse", action="store_true", help="keep the folder's weights and tokenizer")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--f32", action="store_true", help="train without bf16 autocast")
    parser.add_argument("--checkpoint", help="file to keep the state of training in, and to go on from if it exists")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    path = lambda name: os.path.join(args.out, name)

    documents, held_documents = read_documents(args.text)
    tokenizer = Tokenizer.from_file(path("tokenizer.json")) if args.reuse else train_tokenizer(documents)
    rows, held_out = encode(tokenizer, documents), encode(tokenizer, held_documents)
    for name, part in (("train", rows), ("held-out", held_out)):
        print(f"{name}: {len(part)} documents, {sum(len(r) - 1 for r in part)} tokens")

    if not args.reuse:
        tensors = train(rows, held_out, args.epochs, not args.f32, args.checkpoint)
        tokenizer.save(path("tokenizer.json"))
        save_file(tensors, path("model.safetensors"), {"format": "pt"})
        with open(path("config.json"), "w") as f:
            f.write(json.dumps(CONFIG, indent=2) + "\n")

    model = from_bf16(load_file(path("model.safetensors")))
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    samples = {"eval": sample(model, EVAL_SEED, EVAL_TOKENS), "calibration": sample(model, CALIBRATION_SEED, CALIBRATION_TOKENS)}
    for name, part in samples.items():
        with open(path(name + ".tokens"), "w") as f:
            f.writelines(" ".join(map(str, row)) + "\n" for row in part)
    result = golden(model, tokenizer)
    result["eval_perplexity"], result["eval_tokens"] = evaluate(model, samples["eval"])
    result["held_out_perplexity"], result["held_out_tokens"] = evaluate(model, held_out)
    with open(path("golden.json"), "w") as f:
        f.write(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))
    print("calibration perplexity, tokens:", *evaluate(model, samples["calibration"]))
    print("sample:", tokenizer.decode(sample(model, SAMPLE_SEED, 1)[0]))


if __name__ == "__main__":
    main()
