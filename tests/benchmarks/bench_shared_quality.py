"""The cost of block-choosing rules for a model that was never trained with them, on a GPU, in fp32.

    python tests/benchmarks/shared_texts.py packages texts.npz
    python tests/benchmarks/bench_shared_quality.py --check     # the rules against loops, on the CPU
    python tests/benchmarks/bench_shared_quality.py --model DIR --texts texts.npz --out OUT --suite questions
    python tests/benchmarks/bench_shared_quality.py --model DIR --texts texts.npz --out OUT --suite curves
    python tests/benchmarks/bench_shared_quality.py --out OUT --report

All full-attention layers go through `shared_rules.attend`; window layers keep their windows. For each rule
and text, the results are the rise over dense of the mean loss in the last quarter, and the share of causal
pairs attended over all rows, heads and layers. Means over texts have a 95 % interval from the spread of
64-token stretches of the rise, comparing rule and dense token by token. "causal" is the loss with lists that
each row could have computed from earlier rows. Results are saved to OUT/shared.json at once, so that an
interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from shared_rules import Rule, attend, windowed

NAME, STRETCH = "masked_blocks", 64
DENSE = Rule("dense")
PLAIN, COPIES, RECURRING = "test/", "test-copies/", "test-recurring/"


class Attention:
    """The model's attention function: runs one rule at a time and counts the pairs that it attends."""

    def __init__(self) -> None:
        self.rule = DENSE
        self.pairs: list[Tensor] = []
        AttentionInterface.register(NAME, self)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        q, k, v = query[0].float(), key[0].float(), value[0].float()
        window = kwargs.get("sliding_window")
        if window and window < k.shape[1]:
            out = windowed(q, k, v, window, scaling)
        else:
            out, pairs = attend(q, k, v, self.rule, scaling)
            self.pairs.append(pairs)
        return out.transpose(0, 1)[None].to(query.dtype), None


ATTENTION = Attention()


def load(folder: str, device: str) -> Any:
    """The model, in fp32, with this module's attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME)
    return model.to(device).eval()


@torch.no_grad()
def tail_losses(model: Any, ids: Tensor, rule: Rule, tail: int) -> tuple[Tensor, Tensor]:
    """Losses on the last `tail` tokens of `ids (N,)`, and the share of causal pairs by `(layer, head)`."""
    ATTENTION.rule, ATTENTION.pairs = rule, []
    logits = model(input_ids=ids[None], logits_to_keep=tail + 1, use_cache=False).logits[0, :-1].float()
    losses = F.cross_entropy(logits, ids[-tail:], reduction="none")
    return losses, torch.stack(ATTENTION.pairs) / (len(ids) * (len(ids) + 1) / 2)


def with_causal(rules: Sequence[Rule]) -> list[Rule]:
    """Each rule in both variants, the causal one first."""
    return [one for rule in rules for one in (rule.read_causally(), rule)]


def questions() -> Iterator[Rule]:
    """The rules to compare on the development texts, the most important first."""
    p, a = Rule(share=0.95), Rule(alpha=0.01)
    causal = [p, a, replace(p, means=True), replace(a, means=True)]
    causal += [replace(p, own=True), replace(p, own=True, share=0.98), replace(p, own=True, means=True)]
    causal += [Rule(share=0.98), Rule(alpha=0.003), Rule(alpha=0.005), Rule(own=True, share=0.99)]
    causal += [Rule(share=0.95, alpha=0.01), Rule(share=0.98, alpha=0.005, both="and")]
    causal += [Rule(share=0.95, alpha=0.02, means=True), Rule(own=True, floor=0.001)]
    causal += [Rule(own=True, floor=0.001, means=True), Rule(own=True, share=0.95, alpha=0.02, means=True)]
    yield from (r.read_causally() for r in causal)
    yield from (p, a, replace(p, means=True), replace(a, means=True))
    # a choice per query, with the variance per rotary pair and per dimension
    for gate in ("mass", "unpaired"):
        yield Rule(tile=1, block=32, topk=64, gate=gate)
        yield Rule(tile=1, block=32, topk=32, gate=gate)
        yield replace(p, gate=gate).read_causally()
    for tile, block in ((128, 64), (64, 32), (32, 32), (16, 32), (128, 128)):
        yield Rule(tile=tile, block=block, share=0.95, causal=True)
        yield Rule(tile=tile, block=block, alpha=0.01, causal=True)
        yield Rule(tile=tile, block=block, alpha=0.01, means=True, causal=True)
    for changes in ({"stride": 2}, {"stride": 4}, {"stride": 8}, {"strongest": 0.1}, {"strongest": 0.3}):
        yield replace(p, causal=True, **changes)
        yield replace(a, causal=True, **changes)
    for changes in ({"part": 32}, {"part": 64}, {"part": 8}, {"gate": "true"}):
        yield replace(p, causal=True, **changes)
    for below in (512, 1024, 2048):
        yield replace(p, causal=True, dense_below=below)
        yield replace(a, causal=True, means=True, dense_below=below)
    for changes in ({"sink": 2}, {"local": 2}, {"local": 0}):
        yield replace(a, causal=True, means=True, **changes)
    yield replace(a, causal=True, means=True, cap=32)
    yield replace(a, causal=True, means=True, cap=24)


def curves() -> Iterator[Rule]:
    """The rules to measure on the test texts, the most important first."""
    alphas = (0.01, 0.03, 0.005, 0.002, 0.1, 0.3, 0.0005)
    for alpha in alphas[:3]:
        yield from with_causal([Rule(alpha=alpha, means=True)])
    shares = (0.95, 0.9, 0.98, 0.8, 0.99, 0.6)
    yield from (Rule(share=s, causal=True) for s in shares[:3])
    yield from (Rule(share=s, own=True, means=True, causal=True) for s in (0.95, 0.98))
    query = [Rule(tile=1, block=32, topk=k, gate=g) for k in (64, 32, 16, 112) for g in ("mass", "mean")]
    yield from query[:4]
    published = [
        *(Rule("antidiagonal", 128, 128, share=s) for s in (0.9, 0.8, 0.95, 0.7, 0.5)),
        *(Rule("pooled", 128, 128, share=s) for s in (0.9, 0.95, 0.8, 0.98, 0.6)),
        *(
            Rule("relative", 32, 128, "mean", alpha=a, means=True, sink=2, local=4)
            for a in (0.1, 0.18, 0.03, 0.01, 0.003)
        ),
    ]
    yield from published
    for alpha in alphas[3:]:
        yield from with_causal([Rule(alpha=alpha, means=True)])
    yield from query[4:]
    yield Rule("antidiagonal", 128, 128, share=0.9, antidiagonal=16)
    yield Rule("relative", 32, 128, "mean", alpha=0.1, means=True, sink=2, local=4, dense_last=256)
    yield from (Rule(share=s) for s in shares[:3])
    yield from (Rule(share=s, causal=True) for s in shares[3:])
    yield from (Rule(alpha=a, causal=True) for a in alphas[:4])


def cheaper() -> Iterator[Rule]:
    """Which rules keep the loss with fewer sampled rows, on development texts; then blocks, thresholds."""
    base = Rule(tile=64, block=32, alpha=0.01, means=True, causal=True)
    yield base
    for changes in (
        {"stride": 2},
        {"stride": 2, "before": 0.5},
        {"stride": 2, "before": 1.0},
        {"stride": 4, "before": 0.5},
        {"stride": 4, "before": 1.0},
        {"stride": 8, "before": 1.0},
        {"before": 0.5},
        {"pool": 2},
        {"pool": 4},
        {"pool": 4, "before": 0.5},
        {"part": 32},
        {"part": 32, "before": 0.5},
        {"part": 8},
        {"strongest": 0.1},
        {"strongest": 0.2, "alpha": 0.015},
        {"tile": 128},
        {"tile": 128, "stride": 2, "before": 0.5},
        {"block": 16, "alpha": 0.005},
        {"block": 16},
        {"alpha": 0.005},
        {"alpha": 0.02},
        {"own": True, "share": 0.9, "alpha": 0.015},
        {"own": True, "share": 0.93, "alpha": 0.02},
    ):
        yield replace(base, **changes)
    for changes in ({"stride": 2}, {"stride": 4}, {"stride": 8}, {"stride": 8, "before": 1.0}):
        yield replace(base, causal=False, **changes)


def chosen() -> Iterator[Rule]:
    """The whole curve of the shipped rule, on the test texts, in both variants."""
    for alpha in (0.01, 0.008, 0.002, 0.003, 0.02, 0.04, 0.1, 0.3, 0.001):
        yield from with_causal([Rule(tile=64, block=32, alpha=alpha, means=True)])


def kernel() -> Iterator[Rule]:
    """Tiles, blocks and sampled rows that suit a kernel, on the test texts, causal; some as run."""
    base = Rule(tile=128, block=32, alpha=0.01, means=True, causal=True)
    for changes in (
        {},
        {"stride": 4, "before": 0.5},
        {"stride": 4, "before": 0.5, "alpha": 0.015},
        {"stride": 2, "before": 0.5},
        {"stride": 2, "before": 0.5, "alpha": 0.015},
        {"stride": 4, "alpha": 0.007},
        {"stride": 2, "alpha": 0.008},
        {"block": 64, "alpha": 0.02},
        {"block": 64, "alpha": 0.02, "stride": 4, "before": 0.5},
        {"block": 64, "alpha": 0.02, "stride": 8},
        {"alpha": 0.015, "stride": 4, "before": 0.5, "tile": 64},
        {"alpha": 0.015, "stride": 2, "before": 0.5, "tile": 64},
    ):
        yield replace(base, **changes)
    for changes in ({"stride": 4}, {"stride": 8}, {"block": 64, "alpha": 0.02, "stride": 8}):
        yield replace(base, causal=False, **changes)


def shipped() -> Iterator[Rule]:
    """The preset's tile and sampling, and their neighbours, on the test texts."""
    for tile, stride, alpha in (
        (128, 2, 0.01),
        (64, 2, 0.01),
        (128, 2, 0.0125),
        (128, 4, 0.01),
        (128, 1, 0.0125),
        (64, 4, 0.01),
        (128, 2, 0.003),
        (64, 2, 0.003),
        (128, 2, 0.03),
        (64, 2, 0.03),
        (128, 8, 0.01),
    ):
        rule = Rule(tile=tile, block=32, alpha=alpha, stride=stride, hears_itself=True)
        yield from with_causal([rule])


def preset() -> Iterator[Rule]:
    """The preset `default` and other thresholds, on the test texts."""
    rule = Rule(tile=128, block=32, stride=2, hears_itself=True, dense_below=2048)
    for alpha in (0.01, 0.003, 0.015, 0.03, 0.1, 0.001):
        yield from with_causal([replace(rule, alpha=alpha)])


def long() -> Iterator[Rule]:
    """16K and 32K, on the test texts: the shipped rule, per-query choices, the published rules."""
    shipped = Rule(tile=128, block=32, stride=2, hears_itself=True, dense_below=2048)
    yield from with_causal([replace(shipped, alpha=0.01)])
    yield from (Rule(tile=1, block=32, topk=k, gate=g) for k in (128, 64) for g in ("mass", "mean"))
    for alpha in (0.03, 0.1, 0.003):
        yield from with_causal([replace(shipped, alpha=alpha)])
    yield from (Rule("antidiagonal", 128, 128, share=s) for s in (0.9, 0.95))
    yield from (Rule("pooled", 128, 128, share=s) for s in (0.9, 0.98))
    yield from (Rule("relative", 32, 128, "mean", alpha=a, means=True, sink=2, local=4) for a in (0.1, 0.01))


SUITES = {
    "kernel": (kernel, (PLAIN, COPIES)),
    "shipped": (shipped, (PLAIN, COPIES)),
    "preset": (preset, (PLAIN, COPIES)),
    "long": (long, (PLAIN, COPIES)),
    "questions": (questions, ("dev/", "dev-copies/")),
    "cheaper": (cheaper, ("dev/", "dev-copies/")),
    "chosen": (chosen, (PLAIN, COPIES, RECURRING)),
    "curves": (curves, (PLAIN, COPIES, RECURRING)),
}


class Runner:
    """Texts and the results so far: label -> text -> numbers."""

    def __init__(self, args: argparse.Namespace):
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(args.model, self.device)
        stored = np.load(args.texts)
        self.ids = {n: torch.from_numpy(stored[n][: args.length].astype(np.int64)) for n in stored.files}
        self.tail = args.length // 4
        self.end = time.monotonic() + args.limit
        self.path = args.out / "shared.json"
        args.out.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.dense: dict[str, Tensor] = {}

    def measure(self, rule: Rule, names: Sequence[str]) -> bool:
        """Measures `rule` on texts; returns False if the time is up."""
        found = self.answers.setdefault(rule.label(), {})
        for name in names:
            if time.monotonic() > self.end:
                return False
            if name not in self.dense:
                self.dense[name] = tail_losses(self.model, self.ids[name].to(self.device), DENSE, self.tail)[
                    0
                ]
            if name in found:
                continue
            losses, pairs = tail_losses(self.model, self.ids[name].to(self.device), rule, self.tail)
            rise = (losses - self.dense[name]).double()
            stretches = rise[len(rise) % STRETCH :].view(-1, STRETCH).mean(1)
            found[name] = {
                "rise": float(rise.mean()),
                "error": float(stretches.std() / len(stretches) ** 0.5),
                "loss": float(losses.mean()),
                "pairs": float(pairs.mean()),
                "by layer": [round(x, 4) for x in pairs.mean(1).tolist()],
            }
        self.path.write_text(json.dumps(self.answers))
        return True


def summary(found: dict[str, Any], prefix: str) -> tuple[int, float, float, float] | None:
    """Number of texts with `prefix`, mean rise, half of its 95 % interval, and share of pairs."""
    rows = [one for name, one in found.items() if name.startswith(prefix)]
    if not rows:
        return None
    error = sum(r["error"] ** 2 for r in rows) ** 0.5 / len(rows)
    pairs = sum(r["pairs"] for r in rows) / len(rows)
    return len(rows), sum(r["rise"] for r in rows) / len(rows), 1.96 * error, pairs


def report(answers: dict[str, Any]) -> None:
    """One line per rule: pairs, mean rise and interval on plain texts, then on texts with copies."""
    for label, found in answers.items():
        cells = []
        for prefix in ("dev/", "dev-copies/", PLAIN, COPIES, RECURRING):
            one = summary(found, prefix)
            if one:
                cells.append(f"{prefix[:-1]}({one[0]}) {one[3]:.3f} {one[1]:+.4f}±{one[2]:.4f}")
        if cells:
            print(f"{label}: " + " | ".join(cells))


def naive(q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` for the kind "shared", written as loops over heads and rows, in fp64."""
    heads, length, _ = q.shape
    out = torch.zeros(heads, length, v.shape[2], dtype=torch.float64)
    pairs = torch.zeros(heads, dtype=torch.float64)
    group = heads // k.shape[0]
    for h in range(heads):
        keys, values = k[h // group].double(), v[h // group].double()
        for row in range(length):
            begin = row // rule.tile * rule.tile
            chosen = chosen_blocks(q[h].double(), keys, rule, scale, row)
            kept = [j for j in range(row + 1) if j // rule.block in chosen]
            if row < rule.dense_below:
                kept = list(range(row + 1))
            pairs[h] += len(kept)
            logits = [q[h, row].double() @ keys[j] * scale for j in kept]
            read = [values[j] for j in kept]
            if rule.means and row >= rule.dense_below:
                for b in range(begin // rule.block):
                    if b not in chosen:
                        span = slice(b * rule.block, (b + 1) * rule.block)
                        mean = q[h, row].double() @ keys[span].mean(0) * scale
                        logits.append(mean + torch.tensor(float(rule.block)).double().log())
                        read.append(values[span].mean(0))
            out[h, row] = torch.stack(logits).softmax(0) @ torch.stack(read)
    return out, pairs


def chosen_blocks(q: Tensor, k: Tensor, rule: Rule, scale: float, row: int) -> set[int]:
    """The blocks that one row attends."""
    begin, size = row // rule.tile * rule.tile, rule.block
    own = range(begin // size, (begin + rule.tile - 1) // size + 1)
    forced = {*own, *range(max(0, own[0] - rule.local), own[0]), *range(min(rule.sink, own[0]))}
    end = row + 1 if rule.causal else begin + rule.tile
    voters: Sequence[int] = range(begin, end, rule.stride)
    if rule.hears_itself:
        voters = sorted({*range(begin + rule.stride - 1, end, rule.stride), end - 1})
    mean: dict[int, float] = dict.fromkeys(range(begin // size), 0.0)
    top = dict(mean)
    for i in voters:
        total = {}
        for b in mean:
            keys = k[b * size : (b + 1) * size]
            mass = (q[i] @ keys[keys.square().sum(1).argmin()] * scale).exp()
            for at in range(0, size, min(rule.part, size)):
                part = keys[at : at + min(rule.part, size)]
                var, count = part.var(0, unbiased=False), torch.tensor(float(len(part))).double()
                half = len(var) // 2
                var = torch.cat([var[:half] + var[half:]] * 2) / 2
                spread = (scale * q[i]).square() @ var
                far = (2 * spread * count.log()).sqrt() - count.log()
                gain = spread / 2 if spread <= 2 * count.log() else far
                mass = mass + (count.log() + scale * q[i] @ part.mean(0) + gain).exp()
            total[b] = float(mass)
        whole = sum(total.values())
        if rule.own:
            near = range(own[0] * size, i + 1)
            whole += sum(float((q[i] @ k[j] * scale).exp()) for j in near)
        for b in mean:
            mean[b] += total[b] / whole / len(voters)
            top[b] = max(top[b], total[b] / whole)
    mass_of = {b: max(mean[b], rule.strongest * top[b]) for b in mean}
    ranked = sorted(mass_of, key=lambda b: -mass_of[b])
    sum_of = sum(mass_of.values())
    by_share, reached = set(), 1 - min(sum_of, 1.0) if rule.own else 0.0
    for b in ranked:
        if reached < rule.share * (1.0 if rule.own else sum_of):
            by_share.add(b)
        reached += mass_of[b]
    above = {b for b in ranked if rule.alpha and mass_of[b] >= rule.alpha * mass_of[ranked[0]]}
    taken = above & by_share if rule.both == "and" else above | (by_share if rule.share else set())
    if rule.cap:
        taken &= set([b for b in ranked if b not in forced][: rule.cap])
    return taken | forced


def check() -> None:
    """Compares every part of the shared rule with loops, and the published rules in their limiting cases."""
    torch.manual_seed(0)
    length, scale = 96, 0.35
    q, k, v = (torch.randn(h, length, 8) * 2.0 for h in (2, 1, 1))
    base = Rule(tile=8, block=8, part=4, share=0.8)
    rules = [base, replace(base, causal=True), replace(base, tile=16), replace(base, tile=4, causal=True)]
    rules += [replace(base, share=0.0, alpha=0.4, means=True), replace(base, stride=4, causal=True)]
    rules += [replace(base, own=True, means=True), replace(base, strongest=0.3, causal=True)]
    rules += [replace(base, stride=4, hears_itself=True, causal=c) for c in (False, True)]
    rules += [replace(base, alpha=0.1, both="and", cap=3), replace(base, dense_below=48, local=2, sink=2)]
    for rule in rules:
        got, pairs = attend(q, k, v, rule, scale)
        want, counted = naive(q, k, v, rule, scale)
        error = float((got - want).norm() / want.norm())
        assert error < 1e-5, (rule.label(), error)
        assert torch.equal(pairs, counted), (rule.label(), pairs, counted)
        share = float(pairs.mean()) / (length * (length + 1) / 2)
        print(f"{rule.label()}: error {error:.1e}, pairs {share:.3f}")
    votes = (
        {"before": 0.5},
        {"before": 1.0, "stride": 2, "causal": True},
        {"pool": 4},
        {"pool": 2, "causal": True},
    )
    for changes in votes:
        rule = replace(base, **changes)
        whole = attend(q, k, v, rule, scale)
        with mock.patch("shared_rules.ROWS", 16):
            pieces = attend(q, k, v, rule, scale)
        assert torch.equal(whole[1], pieces[1]), rule.label()
        assert torch.allclose(whole[0], pieces[0], atol=1e-5), rule.label()
        later = q.clone()
        later[:, 50:] = 5
        moved = attend(later, k, v, rule, scale)[0]
        assert torch.allclose(moved[:, :48], whole[0][:, :48], atol=1e-6), rule.label()
        if rule.causal:
            assert torch.allclose(moved[:, :50], whole[0][:, :50], atol=1e-6), rule.label()
    want, _ = attend(q, k, v, DENSE, scale)
    exact = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True, scale=scale)
    assert torch.allclose(want, exact, atol=1e-5)
    for kind in ("antidiagonal", "pooled"):
        full, _ = attend(q, k, v, Rule(kind, 16, 16, share=1.1), scale)
        assert torch.allclose(full, exact, atol=1e-5), kind
    for causal in (False, True):
        full, _ = attend(q, k, v, Rule("relative", 16, 16, alpha=1e-30, causal=causal), scale)
        assert torch.allclose(full, exact, atol=1e-5)
    turned = torch.polar(torch.ones(4), torch.rand(4) * 6)
    turn = lambda x: torch.view_as_real(torch.complex(x[..., :4], x[..., 4:]) * turned)  # noqa: E731
    turn_all = lambda x: torch.cat(turn(x).unbind(-1), -1)  # noqa: E731
    here, there = attend(q, k, v, base, scale), attend(turn_all(q), turn_all(k), v, base, scale)
    assert torch.equal(here[1], there[1]), "a rotation of queries and keys changes the choice"
    assert torch.allclose(here[0], there[0], atol=1e-5)
    for kind, rule in (("shared", base), ("relative", Rule("relative", 16, 16, alpha=0.3))):
        one = replace(rule, causal=True)
        short, _ = attend(q[:, :48], k[:, :48], v[:, :48], one, scale)
        assert torch.allclose(short, attend(q, k, v, one, scale)[0][:, :48], atol=1e-6), kind
        later = q.clone()
        later[:, 50:] = 5
        moved = attend(later, k, v, one, scale)[0][:, :50]
        assert torch.allclose(moved, attend(q, k, v, one, scale)[0][:, :50], atol=1e-6), kind
    print("all checks passed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the checkpoint")
    parser.add_argument("--texts", help="file written by shared_texts.py")
    parser.add_argument("--out", type=Path, default=Path("out/shared"))
    parser.add_argument("--suite", nargs="*", default=["questions"], choices=SUITES)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new text starts")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--report", action="store_true", help="only the table")
    parser.add_argument("--check", action="store_true", help="compare with loops on the CPU, and exit")
    args = parser.parse_args()
    if args.check:
        check()
        return
    if not args.report:
        started = time.monotonic()
        run = Runner(args)
        for name in args.suite:
            rules, prefixes = SUITES[name]
            names = [n for n in run.ids if n.startswith(prefixes)]
            done = all(run.measure(rule, names) for rule in rules())
            print(f"{name}: {'all' if done else 'stopped by the limit'}, {time.monotonic() - started:.0f} s")
    report(json.loads((args.out / "shared.json").read_text()))


if __name__ == "__main__":
    main()
