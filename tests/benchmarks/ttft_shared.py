"""Time to first token under the shared choice, beside dense attention, in one process.

    python tests/benchmarks/bench_ttft.py --shared
    python tests/benchmarks/bench_ttft.py --shared --candidates default 128/32/4 128/32/4/2048 128/32/4/4096
    python tests/benchmarks/bench_ttft.py --shared 8192=.3 --lengths 8192

All stages of the choice run; it is then replaced by a random causal one with a stated share of the pairs,
kept blocks included (`shared_masks`). Every length is run several times, dense attention and the candidates
in turn. Each candidate is also run with 64 tokens more than its `dense_below`. Wherever torch's own attention
runs, in the dense model or in a candidate below its `dense_below`, it is restricted to cuDNN.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from shared_checks import assert_attention, checked_choice
from shared_masks import RandomLists, share_of
from ttft_model import CUDA, attention_alone, build, cache_fits, first_token, register, reserve

from moba_hf import MobaConfig
from moba_hf.bench.timing import GIB
from moba_hf.op.checks import Case
from moba_hf.op.shared import SharedRule

# Shares of the causal pairs by prompt length, as the preset takes on text.
DEFAULT_SHARES = {
    1024: 0.8,
    2048: 0.6,
    4096: 0.45,
    8192: 0.27,
    16_384: 0.18,
    32_768: 0.13,
    131_072: 0.05,
}
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 131_072)
# Longer prompts are run three times; beyond `LONG` twice, and not warmed up as a whole.
SHORT, LONG = 8192, 32_768


def parse_shares(given: list[str]) -> dict[int, float]:
    """`TOKENS=SHARE` items."""
    pairs = [item.partition("=") for item in given]
    return {int(length): float(share) for length, _, share in pairs} or DEFAULT_SHARES


def share_at(length: int, shares: dict[int, float]) -> float:
    """The share at a length: piecewise linear between the given ones, in logarithms of both."""
    known = sorted(shares)
    if length <= known[0] or length >= known[-1]:
        return shares[known[0] if length <= known[0] else known[-1]]
    high = next(i for i, x in enumerate(known) if x >= length)
    low, up = known[high - 1], known[high]
    part = math.log(length / low) / math.log(up / low)
    return math.exp((1 - part) * math.log(shares[low]) + part * math.log(shares[up]))


def candidate(name: str) -> MobaConfig:
    """The settings `TILE/BLOCK/SAMPLE[/DENSE_BELOW]`, all else as in the preset."""
    preset = MobaConfig.from_preset("default")
    if name == "default":
        return preset
    tile, block, sample, *dense = map(int, name.split("/"))
    return replace(preset, tile=tile, block_size=block, sample=sample, dense_below=dense[0] if dense else 0)


def gate(rule: SharedRule) -> str | None:
    """None if choice and attention are right at small lengths and equal in two runs, else what failed."""
    for lengths in ([(512, 1024), (640, 640)], [(300, 1000), (1, 513), (129, 129)]):
        case = Case(
            lengths,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128 if CUDA else 16,
            dtype=torch.bfloat16,
            device="cuda" if CUDA else "cpu",
            backend="triton",
        )
        try:
            mask = checked_choice(case, rule)
            first, second = (assert_attention(case, rule, mask) for _ in range(2))
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                raise AssertionError("two runs differ")
        except Exception as error:  # any exception counts as a failed check
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def rule_of(settings: MobaConfig) -> SharedRule:
    """The rule of the first layer."""
    rule = settings.for_layer(0, 1)
    assert isinstance(rule, SharedRule)
    return rule


class Runs:
    """The model and the candidates."""

    def __init__(self, args: Any):
        self.settings = {name: candidate(name) for name in args.candidates}
        self.shares = parse_shares(args.shared)
        self.runs, self.none = args.runs, args.none
        lengths = args.lengths or ([200, 400] if args.tiny else LENGTHS)
        edges = {x.dense_below + 64 for x in self.settings.values() if x.dense_below}
        self.lengths = sorted({*lengths, *(() if args.tiny else edges)})
        self.lists = RandomLists(lambda length, _: share_at(length, self.shares))
        self.model = build(args.tiny)
        reserve()

    def candidates(self, length: int) -> dict[str, MobaConfig]:
        """The candidates to time at a length.

        On prompts of many times its `dense_below`, a candidate is as fast as the same one without.
        """
        plain = [x for x in self.settings.values() if not x.dense_below]
        return {
            name: settings
            for name, settings in self.settings.items()
            if length <= 8 * settings.dense_below
            or settings in plain
            or replace(settings, dense_below=0) not in plain
        }

    def repeats(self, length: int) -> int:
        """Number of timed runs at a length."""
        return self.runs or (7 if length <= SHORT else 3 if length <= LONG else 2)

    def once(self, ids: torch.Tensor, name: str, cache: bool) -> Any:
        """One timed forward; `name` is "sdpa", "none" or a candidate."""
        if name in self.settings:
            self.model.config.moba = self.settings[name].to_dict()
            return first_token(self.model, ids, "moba", cache, dense_by_cudnn=True)
        return first_token(self.model, ids, name, cache)

    def line(self, length: int) -> dict[str, Any]:
        """Measures one length."""
        config, device = self.model.config, self.model.device
        torch.manual_seed(length)
        ids = torch.randint(config.vocab_size, (1, length), device=device)
        line: dict[str, Any] = {"tokens": length, "cache": cache_fits(self.model, length)}
        candidates = self.candidates(length)
        for name, settings in candidates.items():
            rule = rule_of(settings)
            if length > rule.dense_len:
                mask = self.lists.draw(length, length, config.num_attention_heads, rule, device)
                line[f"{name}_share"] = share_of(mask, length, rule)
            config.moba = settings.to_dict()
            attention_alone(self.model, length, "moba")
        attention_alone(self.model, length, "sdpa")
        names = ["sdpa", *candidates, *(["none"] if self.none else [])]
        if length <= LONG:
            for name in names:
                self.once(ids, name, line["cache"])
        tries: dict[str, list[Any]] = {name: [] for name in names}
        for number in range(self.repeats(length)):
            for name in names if number % 2 == 0 else reversed(names):
                tries[name].append(self.once(ids, name, line["cache"]))
        for name, found in tries.items():
            line[name] = min(found).seconds
            line[f"{name}_median"] = statistics.median(one.seconds for one in found)
            line[f"{name}_attention"] = min(one.attention for one in found)
            line[f"{name}_host"] = min(one.host for one in found)
        self.lists.clear()
        if CUDA:
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        return line


def shared_rows(args: Any) -> tuple[list[dict[str, Any]], str]:
    """Measures every length; returns the lines, none if the gate is red, and the text of the result."""
    start = time.perf_counter()
    for name in args.candidates if CUDA else []:
        problem = gate(rule_of(candidate(name)))
        print(f"gate: {name}: {'green' if problem is None else f'RED: {problem}'}", flush=True)
        if problem is not None:
            return [], ""
    register()
    runs = Runs(args)
    print(f"built after {time.perf_counter() - start:.1f} s", flush=True)
    lines = []
    with runs.lists:
        for length in runs.lengths:
            lines.append(runs.line(length))
            for text in cells(lines[-1], runs.settings):
                print(text, flush=True)
    print(f"ends after {time.perf_counter() - start:.1f} s")
    machine = torch.cuda.get_device_name() if CUDA else "CPU"
    header = (
        f"{machine}, torch {torch.__version__}, Llama-3.1-8B's shape, random weights, bf16, one prompt, best "
        "(median) of the runs; attention: seconds in attention functions; host: seconds until all is launched"
    )
    names = "tokens | rule | pairs | dense (cuDNN) | shared | dense / shared | attention | dense attention"
    head = [f"| {names} | host | dense host |", "|" + " --- |" * 10]
    return lines, "\n".join([header, "", *head, *(x for line in lines for x in cells(line, runs.settings))])


def cells(line: dict[str, Any], settings: dict[str, MobaConfig]) -> list[str]:
    """A line of the Markdown table per candidate."""

    def both(name: str) -> str:
        return f"{line[name]:.4f} ({line[f'{name}_median']:.4f})"

    found = []
    for name in (x for x in settings if x in line):
        share = line.get(f"{name}_share")
        row = [
            f"{line['tokens']:,}",
            name,
            "all" if share is None else f"{share:.3f}",
            both("sdpa"),
            both(name),
        ]
        row += [f"{line['sdpa'] / line[name]:.3f} ({line['sdpa_median'] / line[f'{name}_median']:.3f})"]
        row += [f"{line[f'{x}_{what}']:.4f}" for what in ("attention", "host") for x in (name, "sdpa")]
        found.append("| " + " | ".join(row) + " |")
    if "none" in line:
        found.append(f"| {line['tokens']:,} | no attention | - | - | {both('none')} | - | - | - | - | - |")
    return found
