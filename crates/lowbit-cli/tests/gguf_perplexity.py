"""The perplexity that transformers gives a model in GGUF, to be compared with that of `lowbit eval`.

usage: python3 gguf_perplexity.py FOLDER TOKENS

FOLDER is what `lowbit quantize --format gguf` has made; TOKENS has one window of ids on each line, the first of which is given.
The shape comes from config.json, since transformers reads neither biases nor rope_freqs.weight from a GGUF file's metadata.
Packages that are missing are named, and the exit status is 3.
"""

import sys


def main(folder, tokens):
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as missing:
        print(missing)
        sys.exit(3)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        config=AutoConfig.from_pretrained(folder),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    loss, count = 0.0, 0
    with torch.no_grad():
        for line in open(tokens):
            ids = torch.tensor([[int(token) for token in line.split()]])
            logits = model(ids).logits[0, :-1].double().log_softmax(-1)
            loss -= logits.gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    print(torch.tensor(loss / count, dtype=torch.float64).exp().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
