"""Times the kernels of the shared choice, by stage and as a whole, next to dense attention, after a check.

    python tests/benchmarks/bench_shared.py                         # every row, on one GPU
    python tests/benchmarks/bench_shared.py --rows 8K-25 32K-10 --backward
    python tests/benchmarks/bench_shared.py --tile 64 --sample 4

All stages of the choice run on random normal inputs, whose masses are flat. The choice is then replaced by a
random causal one with the stated share of the (query, key) pairs, kept blocks included (`shared_masks`).
`whole` is the operator: the choice, and the attention under the replaced mask, queued behind work that keeps
the GPU busy, so that launch overhead is not counted; `eager` includes it. Times are medians of CUDA events,
bf16, head_dim 128, causal. TFLOP/s count attended pairs. Nothing is timed unless the gate is green.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_checks import assert_attention, assert_gradients, checked_choice
from shared_masks import random_mask, share_of

from moba_hf.bench import peers
from moba_hf.bench.timing import elapsed_ms, median_ms
from moba_hf.kernels import shared, shared_hopper, shared_tuning, tuning
from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.shared_attend import attend_lists
from moba_hf.kernels.shared_choose import choose
from moba_hf.kernels.shared_lists import Lists, block_lists
from moba_hf.kernels.shared_mass import Masses, row_masses
from moba_hf.kernels.shared_plan import make_shared_plan
from moba_hf.kernels.shared_summary import shared_summary
from moba_hf.op.checks import Case
from moba_hf.op.sequences import Attended, Sequences, batched_table
from moba_hf.op.shared import SharedRule

HEAD_DIM, K = 128, 1024


@dataclass(frozen=True)
class Row:
    """One line of the table: share of the pairs, and the goals to reach and to aim for, in milliseconds."""

    name: str
    length: int
    share: float
    reach: float | None = None
    aim: float | None = None
    num_heads: int = 32
    num_kv_heads: int = 8


ROWS = (
    Row("8K-25", 8 * K, 0.25, 0.55, 0.35),
    Row("32K-25", 32 * K, 0.25, 7.5),
    Row("32K-10", 32 * K, 0.10, 3.8, 2.5),
    Row("131K-5", 128 * K, 0.05, 30.0, 17.0),
    Row("1M-2", 1024 * K, 0.02, num_heads=8, num_kv_heads=2),
)


def gate(rule: SharedRule) -> None:
    """The tests' own checks, at lengths that fill tiles and at ragged ones; two runs must be identical."""
    for lengths in ([(512, 1024), (640, 640), (192, 320)], [(300, 1000), (1, 513), (129, 129)]):
        case = Case(
            lengths,
            num_heads=8,
            num_kv_heads=2,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device="cuda",
            backend="triton",
        )
        mask = checked_choice(case, rule)
        first, second = (assert_attention(case, rule, mask) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert_gradients(case, rule, mask)


class Call:
    """The inputs of one row, and its stages as calls without arguments."""

    def __init__(self, row: Row, rule: SharedRule):
        torch.manual_seed(0)
        self.row, self.rule, self.scale = row, rule, HEAD_DIM**-0.5
        n, heads, kv_heads = row.length, row.num_heads, row.num_kv_heads
        self.q, self.k, self.v = (
            torch.randn(1, x, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for x in (heads, kv_heads, kv_heads)
        )
        self.sequences = Sequences(batched_table(1, n, n, self.q.device), n, n)
        self.mask = random_mask(n, heads, rule, row.share, "cuda")
        self.share = share_of(self.mask, n, rule)

    def choose(self) -> Tensor:
        return shared.select(self.q, self.k, self.sequences, self.rule, self.scale)

    def attend(self) -> tuple[Tensor, Tensor]:
        limits = (self.rule.block_size, self.rule.tile, self.scale)
        return shared.attend(self.q, self.k, self.v, self.mask, self.sequences, *limits)

    def whole(self) -> None:
        self.choose()
        self.attend()

    def backward(self, saved: Attended, grad_out: Tensor, grad_lse: Tensor) -> None:
        limits = (self.rule.block_size, self.rule.tile, self.scale)
        shared.attend_backward(grad_out, grad_lse, saved, self.sequences, *limits)

    def stages(self) -> dict[str, Callable[[], Any]]:
        """The launches of `shared.select` and `shared.attend`, stage by stage."""
        q, k, rule = self.q, self.k, self.rule
        table, n = self.sequences.table, self.row.length
        make = partial(make_shared_plan, q, k, table, n, n, block_size=rule.block_size, tile=rule.tile)
        plan = make()
        summary = shared_summary(k, plan, rule.rotary_pairs)
        tile = shared.tile_of_masses(q, k, rule)
        heads, rows = q.shape[1], rule.tile // rule.sample
        each = Masses.tile_bytes(heads, rows, plan.max_blocks, tile.n)
        chunk = max(16, min(plan.num_tiles, shared_tuning.MASS_WORKSPACE // each // 16 * 16))
        masses = Masses.empty(chunk, heads, rows, plan.max_blocks, tile.n, q, tile.hopper)
        scratch = torch.empty(chunk, heads, masses.mass.shape[3], device=q.device)
        mask = torch.empty_like(self.mask)
        firsts = range(0, plan.num_tiles, chunk)
        list_chunk = shared_tuning.LIST_WORKSPACE // Lists.tile_bytes(heads, plan.max_blocks)
        lists = Lists.empty(min(plan.num_tiles, list_chunk), heads, plan.max_blocks, q)
        block_lists(self.mask, plan, 0, lists)
        out = torch.empty(1, n, heads, HEAD_DIM, dtype=q.dtype, device=q.device)
        lse = torch.empty(1, heads, n, device=q.device)
        shape = shared_tuning.attend_tile(
            (128, 128), 2, rule.tile, rule.block_size, tuning.capability(q.device)
        )
        given = (SharedInputs(q, k, self.v, plan, self.scale), out, lse, lists, 0)
        list_firsts = range(0, plan.num_tiles, lists.counts.shape[0])

        def every(call: Callable[[int], Any], starts: range) -> Callable[[], None]:
            def run() -> None:
                for first in starts:
                    call(first)

            return run

        result: dict[str, Callable[[], Any]] = {
            "plan": make,
            "summary": lambda: shared_summary(k, plan, rule.rotary_pairs),
            "mass": every(
                lambda at: row_masses(q, summary, plan, rule, self.scale, masses, at, tile), firsts
            ),
            "choose": every(lambda at: choose(masses, scratch, plan, rule, at, mask), firsts),
            "lists": every(lambda at: block_lists(self.mask, plan, at, lists), list_firsts),
        }
        if len(list_firsts) == 1:
            result["attend, Triton"] = lambda: attend_lists(*given, shape)
            if shared_hopper.takes(q, k, self.v, rule.block_size, rule.tile):
                result["attend, Gluon"] = lambda: shared_hopper.attend_lists(*given)
        return result


def behind_work_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of `call` on the GPU alone, while the host runs ahead."""
    call()
    return statistics.median(elapsed_ms(call, head_start=True) for _ in range(repeats))


def measure(row: Row, rule: SharedRule, args: argparse.Namespace) -> None:
    """Prints one row and its stages."""
    call = Call(row, rule)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = behind_work_ms(call.whole, args.repeats)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    attend = behind_work_ms(call.attend, args.repeats)
    pairs = call.share * row.length * (row.length + 1) / 2 * row.num_heads
    cells = {
        "pairs": f"{call.share:.4f}",
        "whole ms": f"{whole:.3f}",
        "eager ms": f"{median_ms(call.whole, args.repeats):.3f}",
        "choose ms": f"{behind_work_ms(call.choose, args.repeats):.3f}",
        "attend ms": f"{attend:.3f}",
        "TFLOP/s": f"{4 * HEAD_DIM * pairs / attend / 1e9:.0f}",
        "GiB": f"{peak:.2f}",
    }
    if row.reach is not None:
        cells["reach"] = f"{row.reach} {'held' if whole <= row.reach else 'MISSED'}"
    if row.aim is not None:
        cells["aim"] = f"{row.aim} {'held' if whole <= row.aim else 'missed'}"
    print(row.name, "|", ", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
    stages = {name: behind_work_ms(stage, args.repeats) for name, stage in call.stages().items()}
    print("  stages:", ", ".join(f"{name} {ms:.3f}" for name, ms in stages.items()), flush=True)
    if args.backward:
        limits = (rule.block_size, rule.tile, call.scale)
        out, lse = shared.attend(call.q, call.k, call.v, call.mask, call.sequences, *limits)
        saved = Attended(call.q, call.k, call.v, out, lse, call.mask)
        run = partial(call.backward, saved, torch.randn_like(out), torch.zeros_like(lse))
        ms = behind_work_ms(run, args.repeats)
        print(
            f"  backward {ms:.2f}, with the forward {(ms + whole) / whole:.2f} times the forward", flush=True
        )
    if args.dense and row.length <= args.dense_limit:
        found = peers.implementations(False)
        times = {
            name: behind_work_ms(partial(dense, call.q, call.k, call.v, True), min(3, args.repeats))
            for name, dense in found.items()
        }
        print(
            "  dense:",
            ", ".join(f"{k} {v:.3f} ({v / whole:.1f}x)" for k, v in times.items() if v),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[], help=", ".join(row.name for row in ROWS))
    parser.add_argument("--tile", type=int, default=128, help="queries that share a choice")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--sample", type=int, default=8, help="score every N-th row")
    parser.add_argument("--repeats", type=int, default=7, help="runs per median")
    parser.add_argument("--backward", action="store_true", help="time the gradients too")
    parser.add_argument("--no-dense", dest="dense", action="store_false", help="leave out dense attention")
    parser.add_argument("--dense-limit", type=int, default=128 * K, help="longest dense baseline, tokens")
    args = parser.parse_args()
    rule = SharedRule(args.block_size, args.tile, threshold=0.01, sample=args.sample)
    gate(rule)
    print("gate: green", torch.cuda.get_device_name(), torch.__version__, flush=True)
    for row in ROWS:
        if not args.rows or row.name in args.rows:
            measure(row, rule, args)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
