"""Evaluates an extended model: loss by position, short texts, lookups in held-out codebases, first token.

    python tests/benchmarks/bench_extend.py --model out/extend/stage1 --tokens held_out.npz \\
        --tokenizer DIR --length 131072 --rule 256/8 --rule 256/8/dense-question --rule shared --rule dense
    python tests/benchmarks/bench_extend.py --model ORIGINAL --tokens held_out.npz --length 32768 \\
        --rope yarn --contexts 0 --rule dense             # only the config changes

Rules: `B/K` is MoBA with blocks of B and topk K, also for question and answer; with `B/K/dense-question` they
attend every key; `window B/K` is the own block and the K - 1 before it; `shared/T` is blocks of 64 shared by
tiles of 64 with threshold T (.01); `preset/T` is the preset `default` with T; and `dense`.

A tile that shares a choice hears its later rows, so its loss is too low. `tile_ends` holds the losses of the
last rows of all tiles of 64 alone, which no later row can help; the same rows are taken for every rule.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moba_hf import MobaConfig
from moba_hf.checkpoints.context_length import ContextLength, with_context_length
from moba_hf.evaluate.attended import count_pairs
from moba_hf.evaluate.code_lookup import run_code_lookup, sliding_window
from moba_hf.evaluate.passes import attention
from moba_hf.evaluate.perplexity import by_position, token_losses
from moba_hf.evaluate.repositories import Repository, load_repositories
from moba_hf.evaluate.tasks import SampleSize
from moba_hf.hf.loading import dense_on_purpose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE, SHORT = 64, 2048
MOST_COUNTED = 1 << 18  # longest row whose pairs are counted: the count runs on the CPU


def rule_of(name: str) -> tuple[MobaConfig | None, bool]:
    """The settings of a rule, and whether the question is read dense."""
    name, dense = name.removesuffix("/dense-question"), name.endswith("/dense-question")
    decode = "full" if dense else "sparse"
    if name == "dense":
        return None, True
    kind, _, threshold = name.partition("/")
    if kind == "shared":
        forced = {"sink_blocks": 1, "local_blocks": 1, "gate": "mass", "tile": 64}
        return MobaConfig(64, decode=decode, threshold=float(threshold or 0.01), **forced), dense
    if kind == "preset":
        preset = MobaConfig.from_preset("default")
        wanted = preset.threshold if threshold == "" else float(threshold)
        return replace(preset, decode=decode, threshold=wanted), dense
    block, topk = map(int, name.removeprefix("window ").split("/"))
    moba = MobaConfig(block, topk, decode=decode)
    return (sliding_window(moba) if name.startswith("window") else moba), dense


def load_model(path: Path, wanted: ContextLength | None = None) -> Any:
    """The checkpoint with dense attention, in bf16 on a GPU; `wanted` changes its rotary parameters."""
    config = AutoConfig.from_pretrained(path)
    if wanted is not None and wanted.length > config.max_position_embeddings:
        changed = with_context_length(config.to_dict(), config, wanted)
        config.rope_parameters = changed["rope_parameters"]
        config.max_position_embeddings = wanted.length
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    with dense_on_purpose():
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.to(DEVICE).eval()


def long_texts(held_out: Sequence[Repository], length: int, count: int) -> list[Tensor]:
    """Up to `count` rows `(1, length)`, spread over the repositories that are long enough."""
    long = [one for one in held_out if len(one.ids) >= length]
    starts = [(one, i * length) for one in long for i in range(len(one.ids) // length)]
    chosen = np.linspace(0, len(starts) - 1, min(count, len(starts))).round().astype(int)
    rows = [starts[i][0].ids[starts[i][1] : starts[i][1] + length] for i in chosen]
    return [torch.from_numpy(row.astype(np.int64))[None] for row in rows]


def short_texts(held_out: Sequence[Repository], count: int) -> list[Tensor]:
    """The first `SHORT` tokens of up to `count` files that are longer, each `(1, SHORT)`."""
    files = [
        one.ids[begin : begin + SHORT]
        for one in held_out
        for begin, end in itertools.pairwise([*one.files.tolist(), len(one.ids)])
        if end - begin > SHORT
    ]
    chosen = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [torch.from_numpy(files[i].astype(np.int64))[None] for i in chosen]


def tile_ends(losses: Tensor) -> list[tuple[int, int, float]]:
    """Means of `losses (length - 1,)` over the last rows of tiles, by ranges as in `by_position`."""
    ends = [(begin, end, losses[begin - 1 : end - 1]) for begin, end, _ in by_position(losses).ranges]
    kept = [(begin, end, part[(-begin) % TILE :: TILE]) for begin, end, part in ends]
    return [(begin, end, float(part.double().mean())) for begin, end, part in kept if len(part)]


def first_token(model: Any, ids: Tensor, rule: MobaConfig | None, repeats: int) -> float:
    """Median seconds of a prefill in one call, after a warm-up."""
    times = []
    with attention(model, rule), torch.no_grad():
        for _ in range(repeats + 1):
            begun = time.monotonic()
            int(model(ids.to(DEVICE), use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            times.append(time.monotonic() - begun)
    return statistics.median(times[1:])


def losses_of(model: Any, texts: Sequence[Tensor], rule: MobaConfig | None, length: int) -> dict[str, Any]:
    """Losses by position, those at tile ends, and the share of the causal pairs."""
    found: dict[str, Any] = {"texts": len(texts)}
    if rule is not None and length <= MOST_COUNTED:
        with count_pairs(model, rule, length) as attended:
            first = token_losses(model, texts[0], rule)
        found["pairs"] = attended.share()
    else:
        first = token_losses(model, texts[0], rule)
    losses = torch.stack([first, *(token_losses(model, ids, rule) for ids in texts[1:])])
    found["positions"] = by_position(losses.mean(0)).ranges
    found["tile_ends"] = tile_ends(losses.mean(0))
    return found


def measure(args: argparse.Namespace, model: Any, tokenizer: Any, name: str) -> dict[str, Any]:
    """What `args` asks for under the rule `name`; an error becomes part of the result, so others run."""
    (rule, dense), row = rule_of(name), {"rule": name, "length": args.length, "label": args.label}
    started = time.monotonic()
    try:
        texts = [] if "dense-question" in name else long_texts(args.held_out, args.length, args.texts)
        if texts:
            row |= losses_of(model, texts, rule, args.length)
        if args.first_token and texts:
            row["first_token"] = first_token(model, texts[0], rule, args.first_token)
        if args.short:
            short = [token_losses(model, ids, rule) for ids in short_texts(args.held_out, args.short)]
            row["short"] = float(torch.stack(short).mean())
        if args.contexts:
            size = SampleSize(args.contexts, args.questions, seed=args.seed)
            looked = run_code_lookup(
                model, tokenizer, args.held_out, args.length, rule, size, dense_question=dense
            )
            row |= {"lookups": looked.score, "low": looked.low, "high": looked.high, "kinds": looked.by_kind}
            row |= {"asked": looked.samples, "by_context": looked.by_context}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def shown(row: dict[str, Any]) -> str:
    """A result as one line."""
    losses = " ".join(f"{end - 1}:{loss:.3f}" for _, end, loss in row.get("positions", ()))
    names = ("lookups", "low", "high", "pairs", "first_token", "short", "seconds", "error")
    values = {k: v if isinstance(v, str) else round(v, 3) for k, v in row.items() if k in names}
    kinds = {k: round(v, 2) for k, v in row.get("kinds", {}).items()}
    return " ".join(map(str, (row["label"], row["length"], row["rule"], values, kinds or "", losses)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--model", type=Path, required=True)
    add("--tokens", type=Path, required=True, help="held-out repositories (examples/extend.py --save-tokens)")
    add("--tokenizer", type=Path, help="the model's")
    add("--out", type=Path, default=Path("out/extend"))
    add("--label", default="")
    add("--length", type=int, default=32768)
    add("--rule", action="append", required=True)
    add("--texts", type=int, default=4, help="rows whose loss is measured (default 4)")
    add("--short", type=int, default=0, help=f"files whose first {SHORT} tokens are measured (default 0)")
    add("--first-token", type=int, default=0, help="times that the prefill is timed (default 0)")
    add("--contexts", type=int, default=8)
    add("--questions", type=int, default=16)
    add("--seed", type=int, default=0, help="seed of the first context (default 0)")
    add("--rope", help="change only the config, by theta, linear or yarn, to read --length tokens")
    add("--theta", type=float, help="the base for --rope theta")
    add("--limit", type=float, default=1e9, help="seconds after which no new rule starts")
    return made


def main() -> None:
    args, begun = parser().parse_args(), time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    args.held_out = load_repositories(args.tokens)
    wanted = None if args.rope is None else ContextLength(args.length, args.rope, args.theta)
    model = load_model(args.model, wanted)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lookups.jsonl", "a", encoding="utf-8") as file:
        for name in args.rule:
            if time.monotonic() - begun > args.limit:
                print("skipped, the time limit has passed:", name)
                break
            row = measure(args, model, tokenizer, name)
            print(shown(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    sys.exit(main())
