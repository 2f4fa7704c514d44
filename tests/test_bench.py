"""The benchmark's arithmetic, its tables and pictures for made-up results, and its refusals."""

from __future__ import annotations

import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moba_cases import chosen_keys

from moba_hf.bench import Options, measure, peers, report
from moba_hf.bench.rows import FIGURES, ROWS, TINY, Row
from moba_hf.bench.stages import STAGES, stage_of, totals
from moba_hf.op import checks
from moba_hf.op.checks import Case, assert_attention, assert_choice
from moba_hf.op.reference import select_blocks_ref


@pytest.mark.parametrize("row", [TINY, Row("ragged", 117, 3, 1, 16, 4), Row("own", 90, 2, 1, 32, 1)])
def test_attended_pairs(row: Row) -> None:
    q, k = torch.randn(row.length, row.num_heads, 8), torch.randn(row.length, row.num_kv_heads, 8)
    choice = select_blocks_ref(q, k, block_size=row.block_size, topk=row.topk)
    mask = chosen_keys(choice, row.length, row.length, row.block_size)
    assert sum(measure.attended_pairs(row)) == int(mask.sum())
    own = choice[:, :, :1]
    assert measure.attended_pairs(row)[0] == int(
        chosen_keys(own, row.length, row.length, row.block_size).sum()
    )


def test_slices_cover_their_share_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If calls cost in proportion to their pairs, a scaled slice costs as much as the whole."""

    def counted(q, k, v, causal):  # type: ignore[no-untyped-def]
        nonlocal cost
        cost = q.shape[2] * (q.shape[2] + 1) / 2 if causal else q.shape[2] * k.shape[2]

    def ms(call, *_, **__):  # type: ignore[no-untyped-def]
        call()
        return cost

    cost = 0.0
    monkeypatch.setattr(peers, "median_ms", ms)
    q = torch.zeros(320, 1, 4)
    whole = peers.times(q, q, q, {"x": counted}, 1)["x"]
    assert whole == 320 * 321 / 2
    assert peers.sliced_times(q, q, q, {"x": counted}, 1, 32)["x"] == pytest.approx(whole)


def test_dense_implementations_agree() -> None:
    q, k, v = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = peers.implementations()
    assert {"fa2", "cudnn"} <= set(found)
    assert torch.allclose(found["fa2"](q, k, v, True), expected, atol=1e-5)


KERNELS = Path(measure.__file__).parents[1] / "kernels"


def test_every_kernel_of_the_forward_has_a_stage() -> None:
    for path in KERNELS.rglob("*.py"):
        if path.stem.startswith(
            ("append", "bounds", "sparse_decode", "dense_decode", "choose", "backward", "mass", "shared")
        ):
            continue
        for name in re.findall(r"^def (\w*_kernel)\(", path.read_text(), re.MULTILINE):
            stage = stage_of(name)
            assert stage != "other", f"{path.name}: {name} belongs to no stage of moba_hf.bench.stages"
            expected = {"block_mean": "means", "own": "own", "routed": "routed", "merge": "merge"}
            assert stage == expected.get(path.stem, stage)


def test_stages_add_up() -> None:
    sort = "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>"
    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>"
    sums = totals([("_gate_fwd_kernel", 2.0), ("_gate_rest_kernel", 0.5), (sort, 1.0), (fill, 0.25)])
    assert sums == dict.fromkeys(STAGES, 0.0) | {"gate": 2.5, "route": 1.0, "other": 0.25}


_GOALS = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "goals.py"))


def made_up(green: bool = True) -> list[report.Result]:
    """Results for all rows: MoBA as fast as the goals require, dense attention ten times slower."""
    results = []
    for row in ROWS:
        result = {
            "row": row.name,
            "tokens": row.length,
            "heads": "8/2",
            "rule": f"{row.block_size}/{row.topk}",
        }
        ms = _GOALS["GOALS"][row.name][0]
        result |= {"ms": ms, "peak_gib": 1.5, "tflops": 300.0}
        result |= {"fa2_ms": 12 * ms, "cudnn_ms": 10 * ms, "fa4_ms": None}
        result |= {f"{name}_ms": 0.5 for name in STAGES}
        result |= {f"{name}_of_ceiling": 0.81 for name in ("means", "gate", "own", "routed", "merge")}
        results.append(result | (measure._speedup(result) if green else {}))
    return results


@pytest.mark.parametrize("green", [True, False])
def test_rows_are_written(green: bool, tmp_path: Path) -> None:
    report.write_rows(made_up(green), "a machine", tmp_path, green=green)
    text = (tmp_path / "bench_kernels.md").read_text()
    assert ("10.0 x" in text) == green
    assert (tmp_path / "bench_kernels.png").exists() == green
    assert "| 131,072 | 8/2 | 64/16 | 38 | " in text
    with (tmp_path / "bench_kernels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row.name for row in ROWS]
    assert lines[0]["gate_ms"] == "0.5"


def test_goals_are_judged() -> None:
    assert list(_GOALS["GOALS"]) == [row.name for row in ROWS]
    assert [_GOALS["verdict"]("131K-64/16", ms) for ms in (27.9, 28.1, 38.1)] == ["aim", "reached", "missed"]
    assert "| 1M-128/8 | 50 | 56 | 40 | reached |" in _GOALS["table"]([{"row": "1M-128/8", "ms": "50.0"}])


@pytest.mark.parametrize("green", [True, False])
def test_figures_are_written(green: bool, tmp_path: Path) -> None:
    lines = []
    for figure in FIGURES["paper"]:
        for row in figure.rows:
            line = {"figure": figure.name, "row": row.name, "tokens": row.length, "rule": "b/k", "ms": 2.0}
            line |= {"fa2_ms": 13.0, "cudnn_ms": None, "dense": "whole"}
            lines.append(line | ({"over_fa2": 6.5} if green else {}))
    report.write_figure("paper", FIGURES["paper"], lines, "a machine", tmp_path, green)
    text = (tmp_path / "bench_paper.md").read_text()
    assert text.count("6.50 x") == (len(lines) if green else 0)
    assert (tmp_path / "bench_paper.png").exists() == green


def test_rows_reach_what_the_paper_shows() -> None:
    first, second = FIGURES["paper"]
    assert (first.rows[0].length, first.rows[-1].length) == (8 << 10, 1 << 20)
    assert second.rows[-1].length == 10 << 20
    assert second.rows[-1].block_size == 163840
    assert all(row.length // row.block_size == 64 for row in second.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ["131K"]}, "unknown row '131K'; known are 32K-128/8"),
        ({"figure": "x"}, "unknown figure 'x'; known are paper"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_what_it_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)  # type: ignore[arg-type]


RUN_OFTEN = """
import json, runpy, sys
script, runs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, script.rpartition("/")[0])
for sys.argv[1:] in runs:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_time_to_first_token_runs(tmp_path: Path) -> None:
    """Under a choice per query and under a shared one."""
    script = Path(__file__).parent / "benchmarks" / "bench_ttft.py"
    shared = ["--shared", "200=.8", "400=.7", "--candidates", "128/32/2", "128/32/4/256", "--runs", "1"]
    runs = [["--tiny", *options, "--out", str(tmp_path)] for options in ([], shared)]
    command = [sys.executable, "-c", RUN_OFTEN, str(script), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| 3,000 | yes |" in (tmp_path / "bench_ttft.md").read_text()
    text = (tmp_path / "bench_ttft_shared.md").read_text()
    assert "| 200 | 128/32/4/256 | all |" in text
    assert "| 400 | 128/32/2 | 0.6" in text


class TestTheGate:
    """The correctness gate notices the faults that it must catch."""

    case = Case([(40, 100)], num_heads=4, num_kv_heads=2, topk=3, backend="portable")

    def test_accepts_correct_results(self) -> None:
        choice = self.case.select()
        assert_choice(self.case, choice)
        assert_attention(self.case, choice)

    def test_refuses_a_worse_block(self) -> None:
        choice = self.case.select()
        last = choice[0, -1, 0]
        others = [b for b in range(int(last[0])) if b not in last.tolist()]
        choice[0, -1, 0, 2] = others[0]
        with pytest.raises(AssertionError, match="scores of the chosen blocks are off"):
            assert_choice(self.case, choice)

    def test_refuses_a_block_twice(self) -> None:
        choice = self.case.select()
        choice[0, -1, 0, 2] = choice[0, -1, 0, 1]
        with pytest.raises(AssertionError, match="no block twice"):
            assert_choice(self.case, choice)

    def test_refuses_a_wrong_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choice = self.case.select()
        other = choice.clone()
        other[:, :, :, 2] = -1
        wrong = self.case.attend(other)
        monkeypatch.setattr(Case, "attend", lambda *_, **__: wrong)
        with pytest.raises(AssertionError, match="above"):
            checks.assert_attention(self.case, choice)

    def test_prove_says_what_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise AssertionError("own block first")

        assert measure.prove(TINY, "portable", device="cpu", head_dim=16) is None
        monkeypatch.setattr(measure, "assert_choice", fail)
        said = measure.prove(TINY, "portable", device="cpu", head_dim=16)
        assert said == "tiny, portable: own block first"
