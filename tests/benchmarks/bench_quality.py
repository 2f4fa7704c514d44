"""The cost of each setting for a model never trained with MoBA: loss at 5 % to 100 % of the keys, and tasks.

    python tests/benchmarks/quality_texts.py .carry/texts --genesis genesis.txt
    python tests/benchmarks/bench_quality.py --model DIR --texts .carry/texts --out out/quality --limit 180
    python tests/benchmarks/bench_quality.py --out out/quality --report     # only rewrites the report

Parts, in this order. Each result is saved to OUT/quality.json at once, so that an interrupted run resumes:
1. calibrate: layer-local costs on three texts, from one dense pass each; topk by layer at every budget.
2. loss: rise of the loss over dense on texts that calibration did not read, 8,192 tokens, first at 25 % and
   12.5 % of the keys, with other ways to calibrate, then on the whole curve, with a 95 % interval from the
   spread of 64-token stretches.
3. tasks: RULER-like needles and key-value pairs at 8K, 4K, 2K tokens, 128 questions per cell.
Then it writes OUT/quality.md, loss.png and tasks.png. Everything runs in fp32 with the portable backend, so
that no Triton kernel is compiled.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moba_hf import MobaConfig, plots
from moba_hf.calibrate import SHARES, allocate, config_of
from moba_hf.config import LayerConfig
from moba_hf.evaluate.local import LocalCosts, local_costs, sensitivities
from moba_hf.evaluate.passes import family_of
from moba_hf.evaluate.perplexity import token_losses
from moba_hf.evaluate.results import Store, format_table
from moba_hf.evaluate.run import read_ids
from moba_hf.evaluate.tasks import SampleSize, run_task

LENGTH, TAIL, STRETCH, COPIED = 8192, 2048, 64, 256
BUDGETS = (0.25, 0.125, 0.0625, 0.5, 0.05, 0.18, 0.09, 0.35, 0.7, 1.0)
TEXTS = (
    "language-reference",
    "genesis",
    "asyncio",
    "multiprocessing",
    "copies",
    "validate-copy",
)
CALIBRATION = ("calibrate-prose", "calibrate-code", "calibrate-copy")
# name -> block size, keys in a part of a block
RULES = {"32": (32, 16), "32 parts of 8": (32, 8), "16": (16, 16)}
# name -> rule, weight of each text of CALIBRATION
CALIBRATED = {
    "calibrated": ("32", (1, 1, 1)),
    "copies x4": ("32", (1, 1, 4)),
    "no copies": ("32", (1, 1, 0)),
    "parts of 8": ("32 parts of 8", (1, 1, 1)),
    "blocks of 16, copies x4": ("16", (1, 1, 4)),
}
MAIN = ("calibrated", "forced", "plain")
TRIED = (*list(CALIBRATED)[1:], "forced, mass")
CURVE_ON = ("language-reference", "genesis", "asyncio", "copies")
TRIED_ON = ("language-reference", "asyncio", "genesis", "validate-copy")
TASKS = ("multi-needle", "key-value")
ASKED = (("dense", 1.0), ("plain", 0.25), ("calibrated", 0.25))
ASKED_LAST = (("calibrated", 0.125), ("forced", 0.25))
ROOM = 64  # tokens of a question and its answer
QUESTIONS, CONTEXTS = 16, 8


Setting = Callable[[float], MobaConfig]


class TimeIsUp(Exception):
    """The time limit has passed."""


@contextmanager
def parts_of(size: int) -> Iterator[None]:
    """The mass gate with parts of `size` keys."""
    with mock.patch("moba_hf.op.gates.part_size", lambda block_size: min(size, block_size)):
        yield


class Runner:
    """The model, the texts, and the results so far."""

    def __init__(self, args: argparse.Namespace):
        self.end = time.monotonic() + args.limit
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.model: Any = model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
        adapter, text_config = family_of(self.model)
        self.layers = adapter.num_layers(text_config)
        self.texts = Path(args.texts)
        self.length = args.length
        self.task_lengths = tuple(args.task_lengths)
        self.contexts, self.tasks_only = args.contexts, args.tasks_only
        self.store = Store(args.out / "quality.json", {"length": args.length, "rules": RULES})
        self.losses = Store(args.out / "dense.json", {"length": args.length})
        self.dense: dict[str, Tensor] = {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result for `key`; raises TimeIsUp if it would have to be computed after the time limit."""
        if key not in self.store.answers and time.monotonic() > self.end:
            raise TimeIsUp
        return self.store.get(key, compute)

    def ids(self, name: str) -> Tensor:
        return read_ids(self.tokenizer, self.texts / f"{name}.txt", self.length)

    def costs(self) -> dict[str, dict[str, Any]]:
        """Rule -> text -> layer -> topk -> cost."""

        def weights() -> dict[int, float]:
            return sensitivities(self.model, self.ids(CALIBRATION[0])[:, -2048:])

        def measure(name: str) -> dict[str, Any]:
            scale = {int(i): w for i, w in self.get("sensitivities", weights).items()}
            found = {}
            for rule, (block_size, size) in RULES.items():
                with parts_of(size):
                    made = [LayerConfig(block_size, 3, 1, 1, "mass")]
                    table = local_costs(self.model, [self.ids(name)], made, SHARES, scale, samples=96)
                found[rule] = table[0].costs
            return found

        by_text = {name: self.get(f"costs/{name}", lambda name=name: measure(name)) for name in CALIBRATION}
        return {rule: {name: by_text[name][rule] for name in CALIBRATION} for rule in RULES}

    def loss(self, text: str, setting: str, config: MobaConfig) -> None:
        """Measures how much the loss on `text` rises under `config`."""
        if text not in self.dense:

            def read() -> list[float]:
                return [round(x, 5) for x in token_losses(self.model, self.ids(text)).tolist()]

            self.dense[text] = torch.tensor(self.losses.get(text, read), dtype=torch.float64)

        def measure() -> dict[str, Any]:
            started = time.monotonic()
            size = RULES[CALIBRATED[setting][0]][1] if setting in CALIBRATED else 16
            with parts_of(size):
                rise = token_losses(self.model, self.ids(text), config).double() - self.dense[text]
            tail = rise[-TAIL:]
            stretches = tail[len(tail) % STRETCH :].view(-1, STRETCH).mean(1)
            return {
                "keys": config.key_budget(self.length, self.layers),
                "tail": float(tail.mean()),
                "error": float(stretches.std() / len(stretches) ** 0.5),
                "before the last 256": float(tail[:-COPIED].mean()),
                "all": float(rise.mean()),
                "seconds": time.monotonic() - started,
            }

        self.get(f"loss/{text}/{setting}/{config.key_budget(self.length, self.layers):.4f}", measure)

    def task(self, task: str, length: int, setting: str, config: MobaConfig | None, context: int) -> None:
        """Asks the questions about one context."""

        def one() -> list[list[float]]:
            size = SampleSize(1, QUESTIONS, seed=context)
            score = run_task(self.model, self.tokenizer, task, length - ROOM, config, size)
            return [list(mark) for mark in score.by_depth]

        self.get(f"task/{task}/{length}/{setting}/{context}", one)


def settings(costs: dict[str, dict[str, Any]], layers: int, length: int) -> dict[str, Setting]:
    """Name -> function that gives the setting at a key budget."""

    def even(**changes: Any) -> Setting:
        return lambda budget: MobaConfig(32, max(3, round(budget * length / 32)), **changes)

    def calibrated(rule: str, counts: tuple[int, ...]) -> Setting:
        counted = [(costs[rule][name], n) for name, n in zip(CALIBRATION, counts, strict=True)]
        mean = {
            int(i): {int(k): sum(n * t[i][k] for t, n in counted) / sum(counts) for k in by}
            for i, by in counted[0][0].items()
        }
        table = LocalCosts(LayerConfig(RULES[rule][0], 3, 1, 1, "mass"), length, mean)
        return lambda budget: config_of(table, allocate(table, budget)[0], layers)

    forced = {"sink_blocks": 1, "local_blocks": 1}
    made = {"plain": even(), "forced": even(**forced), "forced, mass": even(**forced, gate="mass")}
    return made | {name: calibrated(*how) for name, how in CALIBRATED.items()}


def steps(run: Runner) -> Iterator[Callable[[], None]]:
    """The steps to run, the most important first."""
    made = settings(json.loads(json.dumps(run.costs())), run.layers, run.length)

    def losses(
        budgets: tuple[float, ...], names: tuple[str, ...], texts: tuple[str, ...] = TEXTS
    ) -> Iterator[Callable[[], None]]:
        for budget in budgets:
            for name in names:
                for text in texts:
                    if (run.texts / f"{text}.txt").exists():
                        yield lambda b=budget, n=name, t=text: run.loss(t, n, made[n](b))

    def tasks(lengths: tuple[int, ...], asked: tuple[tuple[str, float], ...]) -> Iterator[Callable[[], None]]:
        # all settings on one context before the next context, so that an interrupted run stays comparable
        for length, context, (name, budget) in product(lengths, range(run.contexts), asked):
            config = None if name == "dense" else made[name](budget).scaled(run.length, length)
            label = name if name == "dense" else f"{name}, {budget:.1%}"
            for task in TASKS:
                yield lambda t=task, n=length, s=label, c=config, i=context: run.task(t, n, s, c, i)

    if run.tasks_only:
        yield from tasks(run.task_lengths, ASKED)
        return
    yield from losses(BUDGETS[:2], MAIN)
    yield from losses(BUDGETS[:2], TRIED, TRIED_ON)
    yield from losses(BUDGETS[2:], MAIN, CURVE_ON)
    yield from tasks(run.task_lengths, ASKED)
    yield from tasks(run.task_lengths, ASKED_LAST)
    yield from losses(BUDGETS[2:], MAIN)


def report(folder: Path) -> None:
    """Makes tables and pictures from the numbers in `folder`."""
    answers = json.loads((folder / "quality.json").read_text())["answers"]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    head = ["text", "setting", "keys", "rise, last quarter", "before its last 256", "all"]
    rows: list[list[object]] = []
    for key, one in answers.items():
        if key.startswith("loss/"):
            _, text, setting, _ = key.split("/")
            curves.setdefault(text, {}).setdefault(setting, []).append((one["keys"], one["tail"]))
            rise = f"{one['tail']:+.4f} ± {1.96 * one['error']:.4f}"
            rest = (f"{one['before the last 256']:+.4f}", f"{one['all']:+.4f}")
            rows.append([text, setting, f"{one['keys']:.1%}", rise, *rest])
    rows.sort(key=lambda row: (str(row[0]), str(row[1]), float(str(row[2])[:-1])))
    parts = [format_table([head, *rows])] if rows else []
    scores = list(_scores(answers))
    if scores:
        parts.append(_task_table(scores))
        plots.plot_tasks(scores).savefig(folder / "tasks.png", dpi=130)
    if curves:
        most = max(len(by.get(MAIN[0], ())) for by in curves.values())  # texts with the longest curve
        shown = {t: {s: p for s, p in by.items() if s in MAIN} for t, by in curves.items()}
        shown = {t: by for t, by in shown.items() if len(by.get(MAIN[0], ())) == most}
        plots.plot_budgets(shown, targets=(0.015, 0.03)).savefig(folder / "loss.png", dpi=130)
    text = "\n\n".join(parts)
    (folder / "quality.md").write_text(text + "\n")
    print(text)


def _task_table(scores: Sequence[tuple[str, plots.TaskScore]]) -> str:
    """A row per task and length, a column per setting: score, 95 % interval, number of questions."""
    names = list(dict.fromkeys(name for name, _ in scores))
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for name, one in sorted(scores, key=lambda pair: (pair[1].task, pair[1].length)):
        cell = f"{one.score:.2f} ({one.low:.2f} - {one.high:.2f}), n = {one.samples}"
        rows.setdefault((one.task, one.length), {})[name] = cell
    cells = [[*key, *(row.get(name, "-") for name in names)] for key, row in rows.items()]
    return format_table([["task", "tokens", *names], *cells])


def _scores(answers: dict[str, Any]) -> Iterator[tuple[str, plots.TaskScore]]:
    from moba_hf.evaluate.tasks import wilson

    cells: dict[tuple[str, int, str], list[list[float]]] = {}
    for key, marks in answers.items():
        if key.startswith("task/"):
            _, task, length, setting, _ = key.split("/")
            cells.setdefault((task, int(length), setting), []).extend(marks)
    for (task, length, setting), marks in cells.items():
        score = sum(mark for _, mark in marks) / len(marks)
        interval = wilson(score, len(marks))
        by_depth = tuple((depth, mark) for depth, mark in marks)
        yield setting, plots.TaskScore(task, length, len(marks), score, *interval, by_depth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the checkpoint")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the model's")
    parser.add_argument("--texts", default=".carry/texts", help="folder written by quality_texts.py")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new step starts")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of each text")
    parser.add_argument("--task-lengths", type=int, nargs="*", default=[8192, 4096, 2048])
    parser.add_argument("--contexts", type=int, default=CONTEXTS, help="contexts per task and length")
    parser.add_argument("--tasks-only", action="store_true", help="reuse earlier calibrated settings")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--report", action="store_true", help="only tables and pictures")
    args = parser.parse_args()
    if not args.report:
        started = time.monotonic()
        run = Runner(args)
        try:
            for step in steps(run):
                step()
        except TimeIsUp:
            print("the time limit has passed; run the same command to continue")
        print(f"{time.monotonic() - started:.0f} s, {len(run.store.answers)} answers")
    report(args.out)


if __name__ == "__main__":
    main()
