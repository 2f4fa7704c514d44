"""Trains a model to answer lookups in 32,768 tokens, and counts its answers with dense attention and rules.

    python tests/benchmarks/adapt_inputs.py tokens inputs
    python tests/benchmarks/lookup_fixture.py --model DIR --tokens inputs/part1 --out OUT --seconds 170

SmolLM2-135M is trained further on rows of Python sources, with plain MoBA (blocks of 128, topk 8) in every
layer and rotary base 1e6. Each row contains 64 definitions (three fixed and three random tokens, `=`, four
random tokens) and later repeats each of them. Then rows of unseen packages contain 64 definitions at even
depths and ask for 24 of them at the end, one after another, under each rule of `rules`. A lookup counts if
all four tokens are predicted from the true tokens before them; since lists are causal, this equals asking
token by token. Without `--seconds`, the model is evaluated without training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moba_hf.evaluate.lookups import weave

sys.path.insert(0, str(Path(__file__).parent))
from bench_shared_quality import ATTENTION, DENSE, NAME
from shared_rules import Rule

FIXED, EQUALS = (198, 44534, 1646), 45  # "\nrecall key" and "=" of SmolLM2's tokenizer
KEY, VALUE = 3, 4
SIZE = len(FIXED) + KEY + 1 + VALUE
PAIRS, ASKED = 64, 24
BASE, STEPS, RATE, WARMUP = 1e6, 400, 6e-4, 20


def facts(rng: np.random.Generator, count: int, vocabulary: int) -> np.ndarray[Any, Any]:
    """Definitions `(count, SIZE)`; the value to look up is in the last `VALUE` tokens."""
    made = rng.integers(min(1000, vocabulary // 2), vocabulary, (count, SIZE))
    made[:, : len(FIXED)] = [x % vocabulary for x in FIXED]
    made[:, len(FIXED) + KEY] = EQUALS
    return made


def training_row(rng: np.random.Generator, ids: np.ndarray[Any, Any], length: int, vocabulary: int) -> Tensor:
    """A row of text with definitions and a later lookup of each of them."""
    count = min(PAIRS, length // (8 * SIZE))
    size = length - 2 * count * SIZE
    begin = int(rng.integers(len(ids) - size))
    made, order = facts(rng, count, vocabulary), rng.permutation(2 * count) % count
    at = np.sort(rng.integers(0, size + 1, 2 * count))
    row, _ = weave(ids[begin : begin + size].astype(np.int64), [made[i] for i in order], at)
    return torch.from_numpy(row)


def asking_row(
    rng: np.random.Generator, ids: np.ndarray[Any, Any], length: int, vocabulary: int
) -> tuple[Tensor, int]:
    """A row whose last tokens look up definitions at even depths, and the number of lookups."""
    asked = min(ASKED, length // (8 * SIZE))
    count = max(asked, min(PAIRS, length // (8 * SIZE)))
    size = length - (count + asked) * SIZE
    made = facts(rng, count, vocabulary)
    at = (np.arange(count) + 0.5) * size / count
    chosen = rng.permutation(np.linspace(0, count - 1, asked).round().astype(int))
    row, _ = weave(ids[:size].astype(np.int64), list(made), at.astype(int))
    return torch.from_numpy(np.concatenate([row, made[chosen].reshape(-1)])), asked


def train(model: Any, ids: np.ndarray[Any, Any], length: int, seconds: float) -> int:
    """Trains for `STEPS` steps or `seconds`, whichever ends first, and returns the number of steps."""
    device, rng = model.device, np.random.default_rng(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    started, step = time.monotonic(), 0
    while step < STEPS and time.monotonic() - started < seconds:
        done = max(step / STEPS, (time.monotonic() - started) / seconds)
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + np.cos(np.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        row = training_row(rng, ids, length, model.config.vocab_size).to(device)[None]
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
            logits = model.get_output_embeddings()(hidden)
        loss = F.cross_entropy(logits.float(), row[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0 or step == 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.gradient_checkpointing_disable()
    return step


@torch.no_grad()
def lookups(model: Any, rows: list[tuple[Tensor, int]], rule: Rule) -> dict[str, float]:
    """Share of lookups answered, mean loss on their tokens, and share of causal pairs attended."""
    right = asked = 0
    losses, pairs = [], []
    for row, count in rows:
        ids, tail = row.to(model.device), count * SIZE
        ATTENTION.rule, ATTENTION.pairs = rule, []
        logits = model(input_ids=ids[None], logits_to_keep=tail + 1, use_cache=False).logits[0, :-1].float()
        want = ids[-tail:].view(count, SIZE)[:, -VALUE:]
        got = logits.argmax(1).view(count, SIZE)[:, -VALUE:]
        right += int((want == got).all(1).sum())
        asked += count
        answers = logits.view(count, SIZE, -1)[:, -VALUE:].flatten(0, 1)
        losses.append(float(F.cross_entropy(answers, want.flatten())))
        shares = torch.stack(ATTENTION.pairs) / (len(ids) * (len(ids) + 1) / 2)
        pairs.append(float(shares.mean()))
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    return {"answered": right / asked, "asked": asked, "loss": mean(losses), "pairs": mean(pairs)}


def rules() -> Iterator[Rule]:
    """The rules to test, the most important first; all lists are causal."""
    base = Rule(tile=64, block=32, alpha=0.01, means=True, causal=True)
    yield DENSE
    yield base
    yield Rule(alpha=0.01, causal=True)
    yield replace(base, stride=2)
    yield replace(base, strongest=0.1)
    yield replace(base, stride=4, before=0.5)
    yield replace(base, alpha=0.003)
    yield replace(base, dense_last=ASKED * SIZE)
    yield replace(base, alpha=0.03, dense_last=ASKED * SIZE)
    yield replace(base, pool=2)
    yield replace(base, part=8)
    yield replace(base, alpha=0.0, share=0.95)
    yield replace(base, stride=8, dense_last=ASKED * SIZE)
    yield replace(base, tile=16)
    yield replace(base, alpha=0.03)
    yield replace(base, stride=2, strongest=0.2)
    yield replace(base, alpha=0.03, strongest=0.2)
    yield replace(base, gate="true")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="folder with train.npz and held_out.npy")
    parser.add_argument("--out", type=Path, default=Path("out/lookups"))
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--seconds", type=float, help="train for at most this long")
    parser.add_argument(
        "--attention", choices=("moba", "sdpa"), default="moba", help="attention used in training"
    )
    parser.add_argument("--save", type=Path, help="save the trained model, in bf16")
    parser.add_argument("--rows", type=int, default=4, help="rows of questions")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new rule starts")
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(args.model)
    config.rope_parameters = {"rope_type": "default", "rope_theta": BASE}
    config.max_position_embeddings = args.length
    load = {"config": config, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation=NAME, **load).to(device)
    if args.seconds:
        learner = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sdpa", **load)
        learner.to(device)
        if args.attention == "moba":
            from moba_hf import MobaConfig, patch_model

            patch_model(learner, MobaConfig(block_size=128, topk=8))
        stored = np.load(args.tokens / "train.npz")
        steps = train(learner, stored[stored.files[0]], args.length, args.seconds)
        print(f"{steps} steps, {steps * args.length / 1e6:.1f} M tokens, {time.monotonic() - started:.0f} s")
        model.load_state_dict(learner.state_dict())
        if args.save:
            learner.to(torch.bfloat16).save_pretrained(args.save)
        del learner
    model.eval()
    torch.set_float32_matmul_precision("high")  # TF32 is precise enough for lookups
    held_out = np.load(args.tokens / "held_out.npy")
    rng = np.random.default_rng(1)
    starts = range(0, len(held_out) - args.length + 1, args.length)
    rows = [
        asking_row(rng, held_out[i : i + args.length], args.length, model.config.vocab_size)
        for i in list(starts)[: args.rows]
    ]
    answers = {}
    for rule in rules():
        if time.monotonic() - started > args.limit:
            print("the time limit has passed")
            break
        one = answers[rule.label()] = lookups(model, rows, rule)
        (args.out / "lookups.json").write_text(json.dumps(answers))
        print(", ".join([rule.label(), *(f"{name} {value:.3f}" for name, value in one.items())]))


if __name__ == "__main__":
    main()
