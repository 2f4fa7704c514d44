"""The loss that a preset with a shared choice costs, as run and with a causal choice.

    python tests/benchmarks/bench_causal_lists.py --check
    python tests/benchmarks/bench_causal_lists.py --model DIR --texts texts.npz --out OUT
    python tests/benchmarks/bench_causal_lists.py --model DIR --texts texts.npz --out OUT --neighbours
    python tests/benchmarks/bench_causal_lists.py --out OUT --report

"as run": a tile's blocks are chosen from its sampled rows, including rows after the one that attends.
"causal": each row gets the blocks that its tile would have if the tile ended with this row (`cuts` of
`moba_hf.op.shared_reference`), so only the sampled rows before it and the row itself are used. Attention runs
block by block, over the blocks of any row of a tile. For each text of `shared_texts.py`, the
script measures mean losses of 64-token stretches of the last quarter, and the share of causal pairs over all
rows, heads and layers. Results are written to OUT/causal.json immediately, so an interrupted run can be
resumed. 95% intervals are computed from stretches, paired with dense attention.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from moba_hf import MobaConfig
from moba_hf.op.gates import PairedMassSummary
from moba_hf.op.shared_portable import row_masses, take_candidates
from moba_hf.op.shared_reference import attend_shared_ref, select_shared_ref
from moba_hf.op.shared_rule import SharedRule

NAME, STRETCH = "lists_of_rows", 64
TILES = {"cpu": 8, "cuda": 64}  # number of tiles to score at a time
PAIRS = {"cpu": 1 << 20, "cuda": 1 << 26}  # number of (row, key) pairs per call
KINDS = ("test/", "test-copies/", "test-recurring/", "dev/", "dev-copies/")


@dataclass(frozen=True)
class Setting:
    """A rule and how it is applied.

    Attributes:
        rule: the rule; None: dense attention.
        causal: each row's blocks are chosen from rows of its tile up to itself.
        means: represent each dropped block by its mean key and value, weighted by its number of keys.
    """

    rule: SharedRule | None = None
    causal: bool = False
    means: bool = False

    def label(self) -> str:
        """A short name."""
        if self.rule is None:
            return "dense"
        name = f"{self.rule.tile}/{self.rule.block_size} threshold {self.rule.threshold:g}"
        name += f" sample {self.rule.sample}" + (" means" if self.means else "")
        name += f" dense below {self.rule.dense_below}" if self.rule.dense_below else ""
        return name + (" causal" if self.causal else " as run")


def choose(q: Tensor, k: Tensor, setting: Setting, scale: float) -> Tensor:
    """Candidates that rows attend to, bool `(H, tiles, T or 1, N / B)`; 1 if all rows of a tile share them.

    Args:
        q: `(H, N, D)`, whole tiles.
        k: `(HK, N, D)`.
    """
    rule = setting.rule
    assert rule is not None
    gate = PairedMassSummary(k, rule.block_size, scale, rule.rotary_pairs)
    tiles, lists = q.shape[1] // rule.tile, rule.tile if setting.causal else 1
    chosen = torch.zeros(q.shape[0], tiles, lists, q.shape[1] // rule.block_size, dtype=torch.bool)
    step = TILES[q.device.type]
    for first in range(0, tiles, step):
        number = torch.arange(first, min(tiles, first + step))
        mass = tile_masses(q, gate, setting, number)
        candidates = (number * rule.tile // rule.block_size).repeat_interleave(lists)
        taken = take_candidates(mass.flatten(1, 2), candidates, rule)
        chosen[:, number, :, : mass.shape[3]] = taken.unflatten(1, (-1, lists))
    begin = torch.arange(-(-rule.dense_below // rule.tile))[:tiles, None] * rule.tile
    chosen[:, : len(begin)] |= (torch.arange(chosen.shape[3]) < begin // rule.block_size)[:, None]
    return chosen


def tile_masses(q: Tensor, gate: PairedMassSummary, setting: Setting, number: Tensor) -> Tensor:
    """Masses `(H, tiles, T or 1, columns)` of the candidates of the tiles `number`."""
    rule = setting.rule
    assert rule is not None
    inside = torch.arange(rule.tile)
    speaks = inside % rule.sample == rule.sample - 1
    if not setting.causal:
        inside = inside[speaks]
    rows = (number[:, None] * rule.tile + inside).flatten()
    candidates = rows // rule.tile * rule.tile // rule.block_size
    seen = int(candidates[0])
    hidden = torch.arange(seen, int(candidates[-1])) >= candidates[:, None]
    mass = row_masses(q[:, rows], gate, hidden, seen).unflatten(1, (len(number), -1))
    if not setting.causal:
        return mass.mean(2, keepdim=True)
    if rule.sample == 1:
        heard = mass.cumsum(2)
    else:  # the sampled rows so far, and the row itself
        silent = mass.masked_fill(speaks[:, None], 0.0)
        heard = (mass - silent).cumsum_(2).add_(silent)
    return heard.div_((inside // rule.sample + 1)[:, None])


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, setting: Setting, scale: float) -> Tensor:
    """Output `(H, N, D)` over the candidates `chosen`, the blocks that tiles overlap, and means (if wanted).

    Each (head, tile) is one dense problem over the blocks of any of its rows; problems with equally many
    blocks run in one call.

    Args:
        q: `(H, N, D)`.
        k: `(HK, N, D)`.
        v: `(HK, N, D)`.
        chosen: the result of `choose`.
    """
    rule = setting.rule
    assert rule is not None
    heads, tiles, _, blocks = chosen.shape
    size, inside = rule.block_size, torch.arange(rule.tile)
    block, begin = torch.arange(blocks), torch.arange(tiles)[:, None] * rule.tile
    own = (block >= begin // size) & (block * size < begin + rule.tile)
    rows = (chosen | own[:, None]).flatten(0, 1)  # (H * tiles, T or 1, blocks)
    listed = rows.any(1)
    queries = q.reshape(heads * tiles, rule.tile, -1)
    keys, values = (x.unflatten(1, (blocks, size)) for x in (k, v))
    out = torch.empty_like(queries)
    for some, count in batches(listed.sum(1), rule.tile * size):
        kv_head, position = some // tiles // (heads // len(k)), (some % tiles * rule.tile)[:, None] + inside
        lists = listed[some].nonzero()[:, 1].view(-1, count)
        kept = rows[some].gather(2, lists[:, None].expand(-1, rows.shape[1], -1))
        bias = torch.zeros(kept.shape).masked_fill_(~kept, -math.inf)
        bias = bias[..., None].expand(-1, rule.tile, -1, size).flatten(2).contiguous()
        last = -max(1, rule.tile // size)  # the blocks that the tile overlaps
        key_at = (lists[:, last:, None] * size + torch.arange(size)).flatten(1)
        bias[:, :, last * size :].masked_fill_(key_at[:, None] > position[:, :, None], -math.inf)
        key, value = (x[kv_head[:, None], lists].flatten(1, 2) for x in (keys, values))
        if setting.means:
            dropped = ~rows[some] & (block < position[:, :1] // size)[:, None]
            extra = torch.full(dropped.shape, math.log(size)).masked_fill_(~dropped, -math.inf)
            bias = torch.cat([bias, extra.expand(-1, rule.tile, -1)], 2)
            key, value = (torch.cat([x, y.mean(2)[kv_head]], 1) for x, y in ((key, keys), (value, values)))
        out[some] = F.scaled_dot_product_attention(
            queries[some][None], key[None], value[None], attn_mask=bias[None], scale=scale
        )[0]
    return out.view(q.shape)


def batches(counts: Tensor, pairs: int) -> Iterator[tuple[Tensor, int]]:
    """Yields batches of problems with equally many blocks, up to `pairs` (row, key) pairs, and the number."""
    order = counts.argsort(stable=True)
    sizes = counts[order]
    for count, number in zip(
        *(x.tolist() for x in sizes.unique_consecutive(return_counts=True)), strict=True
    ):
        some, order = order[:number], order[number:]
        yield from (
            (part, count) for part in some.split(max(1, PAIRS[counts.device.type] // (pairs * count)))
        )


def pairs_of(chosen: Tensor, rule: SharedRule) -> Tensor:
    """Number of causal pairs that each head attends to, fp64 `(H,)`."""
    _, tiles, lists, _ = chosen.shape
    row = torch.arange(tiles * rule.tile)
    inside = row + 1 - row // rule.tile * rule.tile // rule.block_size * rule.block_size
    return chosen.sum((1, 2, 3)).double() * (rule.block_size * rule.tile // lists) + inside.sum()


class Attention:
    """The attention function of the model for the current setting; it counts the attended pairs."""

    def __init__(self) -> None:
        self.setting = Setting()
        self.pairs: list[Tensor] = []
        AttentionInterface.register(NAME, self)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if self.setting.rule is None:
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2), None
        chosen = choose(query[0], key[0], self.setting, scaling)
        self.pairs.append(pairs_of(chosen, self.setting.rule))
        out = attend(query[0], key[0], value[0], chosen, self.setting, scaling)
        return out.transpose(0, 1)[None], None


ATTENTION = Attention()


@torch.no_grad()
def measure(model: Any, ids: Tensor, setting: Setting) -> dict[str, Any]:
    """Mean losses of stretches of the last quarter of `ids (N,)`, and the share of causal pairs by layer."""
    ATTENTION.setting, ATTENTION.pairs = setting, []
    tail = len(ids) // 4
    logits = model(input_ids=ids[None], logits_to_keep=tail + 1, use_cache=False).logits[0, :-1].float()
    losses = F.cross_entropy(logits, ids[-tail:], reduction="none").view(-1, STRETCH).mean(1)
    whole = len(ids) * (len(ids) + 1) / 2
    layers = [round(float(pairs.mean() / whole), 4) for pairs in ATTENTION.pairs]
    return {"losses": losses.tolist(), "pairs by layer": layers}


def report(answers: dict[str, dict[str, Any]]) -> None:
    """Prints number of texts, pairs, and mean increase over dense with its 95% interval."""
    dense = answers.get("dense", {})
    for label, found in answers.items():
        for kind in KINDS:
            names = [n for n in found if n.startswith(kind) and n in dense]
            if label == "dense" or not names:
                continue
            rises = np.array([np.subtract(found[n]["losses"], dense[n]["losses"]) for n in names])
            errors = rises.std(1, ddof=1) / rises.shape[1] ** 0.5
            error = 1.96 * float((errors**2).sum() ** 0.5) / len(names)
            pairs = np.mean([found[n]["pairs by layer"] for n in names])
            each = " ".join(f"{x:+.4f}" for x in rises.mean(1))
            print(f"{label}, {kind}({len(names)}): {pairs:.3f} {rises.mean():+.4f} ± {error:.4f} | {each}")


def check() -> None:
    """Compares choice and attention with the package's reference, row by row for causal choices."""
    torch.manual_seed(0)
    scale, length = 0.5, 192
    q, k, v = (torch.randn(h, length, 16) * 2.0 for h in (4, 2, 2))
    rows = [x.transpose(0, 1) for x in (q, k, v)]
    base = SharedRule(block_size=16, tile=32, threshold=0.5)
    tiles = (replace(base, block_size=32), replace(base, tile=16, block_size=32))
    dense = replace(base, sample=2, dense_below=96)
    for rule in (base, replace(base, sample=2), replace(base, sample=4, tile=16), *tiles, dense):
        limits = {"block_size": rule.block_size, "tile": rule.tile, "softmax_scale": scale}
        blocks = length // rule.block_size
        for setting in (Setting(rule), Setting(rule, causal=True)):
            chosen = choose(q, k, setting, scale)
            got = attend(q, k, v, chosen, setting, scale).transpose(0, 1)
            if setting.causal:
                lists = torch.zeros(4, length, blocks, dtype=torch.bool)
                for row in range(length):  # the list of the tile, cut after this row
                    cut = select_shared_ref(rows[0][: row + 1], rows[1][: row + 1], rule, scale)
                    lists[:, row, : cut.shape[2]] = cut[:, -1]
                cuts = list(range(1, length))
                want, _ = attend_shared_ref(*rows, lists, **limits, cuts=cuts)
            else:
                lists = select_shared_ref(rows[0], rows[1], rule, scale)
                want, _ = attend_shared_ref(*rows, lists, **limits)
                lists = lists.repeat_interleave(rule.tile, 1)
            error = float((got - want).abs().max())
            at = torch.arange(length)
            seen = (at[:, None] + 1 - torch.arange(blocks) * rule.block_size).clamp(0, rule.block_size)
            pairs = (lists * seen).sum((1, 2)).double()
            assert error < 1e-5, (setting.label(), error)
            assert torch.equal(pairs_of(chosen, rule), pairs), (
                setting.label(),
                pairs_of(chosen, rule),
                pairs,
            )
            share = float(pairs.mean()) / (length * (length + 1) / 2)
            print(f"{setting.label()}: error {error:.1e}, pairs {share:.3f}")
            check_means(q, k, v, chosen, replace(setting, means=True), scale)
    print("all checks passed")


def check_means(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, setting: Setting, scale: float) -> None:
    """Compares some rows with a softmax over the single keys and the means of dropped blocks."""
    rule = setting.rule
    assert rule is not None
    got, size = attend(q, k, v, chosen, setting, scale), rule.block_size
    for head in range(len(q)):
        key, value = k[head // 2], v[head // 2]
        for row in range(0, q.shape[1], 7):
            tile, inside = divmod(row, rule.tile)
            first = tile * rule.tile // size
            kept = chosen[head, tile, inside if setting.causal else 0].tolist()
            at = [i for i in range(row + 1) if i // size >= first or kept[i // size]]
            logits, read = [q[head, row] @ key[at].T * scale], [value[at]]
            for block in (b for b in range(first) if not kept[b]):
                span = slice(block * size, (block + 1) * size)
                logits.append((q[head, row] @ key[span].mean(0) * scale + math.log(size))[None])
                read.append(value[span].mean(0)[None])
            want = torch.cat(logits).softmax(0) @ torch.cat(read)
            assert torch.allclose(got[head, row], want, atol=1e-5), (setting.label(), head, row)


def settings(args: argparse.Namespace) -> list[Setting]:
    """Dense and the preset, as run and causal; with `--neighbours`, similar settings instead."""
    rule = MobaConfig.from_preset(args.preset).for_layer(0, 1)
    if not isinstance(rule, SharedRule):
        raise SystemExit(f"preset {args.preset!r} has no shared choice (tile > 1)")
    given = {name: getattr(args, name) for name in ("tile", "block_size", "threshold", "sample")}
    rule = replace(rule, **{name: value for name, value in given.items() if value is not None})
    if not args.neighbours:
        return [Setting(rule, causal=True), Setting(), Setting(rule)]
    others = [replace(rule, sample=n) for n in (1, 4)]
    causal = [Setting(others[0], causal=True), Setting(rule, causal=True, means=True)]
    return [*causal, Setting(), Setting(others[1], causal=True), *(Setting(r) for r in others)]


def run(args: argparse.Namespace, path: Path) -> None:
    """Measures, text by text, what is not yet in `path`."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=NAME)
    model.eval().to(args.device)
    torch.set_default_device(args.device)
    stored, end = np.load(args.texts), time.monotonic() + args.limit
    path.parent.mkdir(parents=True, exist_ok=True)
    answers: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    names = [n for prefix in args.names for n in stored.files if n.startswith(prefix)]
    for setting, name in product(settings(args), names):
        found = answers.setdefault(setting.label(), {})
        if name in found or time.monotonic() > end:
            continue
        begin = time.process_time()
        ids = torch.from_numpy(stored[name][: args.length].astype(np.int64)).to(args.device)
        found[name] = measure(model, ids, setting)
        path.write_text(json.dumps(answers))
        print(f"{name}, {setting.label()}: {time.process_time() - begin:.0f} CPU s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the checkpoint")
    parser.add_argument("--texts", help="file written by shared_texts.py")
    parser.add_argument("--out", type=Path, default=Path("out/causal"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", default="default", help="a preset with tile > 1")
    for option, kind in (("--tile", int), ("--block-size", int), ("--threshold", float), ("--sample", int)):
        parser.add_argument(option, type=kind, help="instead of the preset's")
    parser.add_argument(
        "--neighbours", action="store_true", help="other samples, and means of dropped blocks"
    )
    parser.add_argument(
        "--names", nargs="+", default=["test/", "test-copies/"], help="prefixes of text names"
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens per text, a multiple of the tile")
    parser.add_argument("--limit", type=float, default=1e9, help="start no new text after this many seconds")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--check", action="store_true", help="compare with the reference, then exit")
    args = parser.parse_args()
    if args.check:
        check()
        return
    path = args.out / "causal.json"
    if not args.report:
        run(args, path)
    report(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
