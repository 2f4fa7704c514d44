"""Evaluates an extended model: loss by position, and lookups in held-out codebases.

    python tests/benchmarks/bench_extend.py --model out/extend/stage1 --tokens held_out.npz \\
        --tokenizer DIR --length 131072 --rule 256/8 --rule 256/8/dense-question --rule shared --rule dense

Rules: `B/K` is MoBA with blocks of B and topk K, also for question and answer; with `B/K/dense-question` they
attend every key; `window B/K` is the own block and the K - 1 before it; `shared` is blocks of 64 shared by
tiles of 64 with threshold .01; and `dense`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moba_hf import MobaConfig
from moba_hf.evaluate.code_lookup import run_code_lookup, sliding_window
from moba_hf.evaluate.perplexity import by_position, token_losses
from moba_hf.evaluate.repositories import load_repositories
from moba_hf.evaluate.tasks import SampleSize
from moba_hf.hf.loading import dense_on_purpose


def rule_of(name: str) -> tuple[MobaConfig | None, bool]:
    """The settings of a rule, and whether the question is read dense."""
    name, dense = name.removesuffix("/dense-question"), name.endswith("/dense-question")
    decode = "full" if dense else "sparse"
    if name == "dense":
        return None, True
    if name.startswith("shared"):
        threshold = float(name.partition("/")[2] or 0.01)
        forced = {"sink_blocks": 1, "local_blocks": 1, "gate": "mass", "tile": 64, "threshold": threshold}
        return MobaConfig(64, decode=decode, **forced), dense
    block, topk = map(int, name.removeprefix("window ").split("/"))
    moba = MobaConfig(block, topk, decode=decode)
    return (sliding_window(moba) if name.startswith("window") else moba), dense


def with_theta(config: Any, theta: float, length: int) -> None:
    """Sets a larger rotary base, in place."""
    config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    config.max_position_embeddings = length


def measure(
    args: argparse.Namespace, model: Any, tokenizer: Any, texts: list[torch.Tensor]
) -> list[dict[str, Any]]:
    """One row of results per rule."""
    found = []
    begun = time.monotonic()
    for name in args.rule:
        if time.monotonic() - begun > args.limit:
            print("skipped, the time limit has passed:", name)
            break
        (rule, dense), row = rule_of(name), {"rule": name, "length": args.length}
        started = time.monotonic()
        try:
            if texts and "dense-question" not in name:
                losses = torch.stack([token_losses(model, ids, rule) for ids in texts]).mean(0)
                row["positions"] = by_position(losses).ranges
            row["loss_seconds"] = round(time.monotonic() - started, 1)
            if args.contexts:
                looked = run_code_lookup(
                    model,
                    tokenizer,
                    args.held_out,
                    args.length,
                    rule,
                    SampleSize(args.contexts, args.questions),
                    dense_question=dense,
                )
                row |= {
                    "lookups": looked.score,
                    "low": looked.low,
                    "high": looked.high,
                    "kinds": looked.by_kind,
                }
        except Exception as error:  # the other rules still run
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        row["seconds"] = round(time.monotonic() - started, 1)
        found.append(row)
        losses_shown = " ".join(f"{end - 1}:{loss:.3f}" for _, end, loss in row.get("positions", ()))
        names = ("lookups", "low", "high", "seconds", "loss_seconds", "error")
        shown = {k: v if isinstance(v, str) else round(v, 3) for k, v in row.items() if k in names}
        print(args.label, args.length, name, shown, row.get("kinds", ""), losses_shown, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--tokens", type=Path, required=True, help="held-out repositories (examples/extend.py --save-tokens)")
    add("--tokenizer", type=Path, help="the model's")
    add("--out", type=Path, default=Path("out/extend"))
    add("--label", default="")
    add("--length", type=int, default=32768)
    add("--rule", action="append", required=True)
    add("--texts", type=int, default=4, help="rows whose loss is measured")
    add("--contexts", type=int, default=8)
    add("--questions", type=int, default=16)
    add("--theta", type=float, help="change only the rotary base")
    add("--limit", type=float, default=1e9, help="seconds after which no new rule starts")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    args.held_out = load_repositories(args.tokens)
    with dense_on_purpose():
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
    if args.theta:
        with_theta(model.config, args.theta, args.length)
        model = type(model).from_pretrained(args.model, config=model.config, dtype=dtype)
    model.to(device).eval()
    long = [one for one in args.held_out if len(one.ids) >= args.length]
    starts = [(one, i * args.length) for one in long for i in range(len(one.ids) // args.length)]
    starts = [
        starts[i] for i in np.linspace(0, len(starts) - 1, min(args.texts, len(starts))).round().astype(int)
    ]
    texts = [torch.from_numpy(one.ids[i : i + args.length].astype(np.int64))[None] for one, i in starts]
    rows = measure(args, model, tokenizer, texts)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lookups.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"label": args.label, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
