"""Continues to train a checkpoint with MoBA on your text, next to a dense control on the same tokens.

    moba-hf convert SRC out/model --preset default
    python examples/adapt.py out/model --text my_code/ --held-out other_code/ --out out/adapt
    python examples/adapt.py out/model --text train.npy --held-out held_out.npy \\
        --setting plain=128/8 --setting forced=128/8/1/1 --length 8192 --steps 300

Uses the plain transformers Trainer with `MobaCallback`. A CPU is enough for a tiny model; a GPU trains in
bf16 autocast with fp32 weights. Every run starts from the same checkpoint, sees the same rows in the same
order, and takes at most as many steps as the run before it. Before and after training, the loss on the last
tokens of held-out rows is measured with the run's attention; afterwards also with dense attention. The script
prints a table and writes it with the loss curves to `results.json` in `--out`
(`examples/notebooks/adapt.ipynb` plots them). With `--save`, the trained checkpoints are written there too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moba_hf import MobaConfig
from moba_hf.evaluate.perplexity import token_losses
from moba_hf.hf.loading import dense_on_purpose
from moba_hf.training import RECIPES, MobaCallback

CUDA = torch.cuda.is_available()
DENSE = "dense"


@dataclass(frozen=True)
class Run:
    """One training run: its name, and its MoBA settings (None for the dense control)."""

    name: str
    moba: MobaConfig | None


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Consecutive rows of `length` tokens; an incomplete last row is dropped.

    Args:
        ids: token ids, one-dimensional.
        length: tokens in a row.
    """

    def __init__(self, ids: np.ndarray[Any, Any], length: int) -> None:
        count = len(ids) // length
        if not count:
            raise SystemExit(f"{len(ids)} tokens do not fill one row of {length}: pass more text")
        self.rows = torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def read_text(paths: list[Path], suffix: str) -> str:
    """The text of the files in `paths`, sorted, each preceded by a line with its name."""
    parts = []
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
        if not files:
            raise SystemExit(f"{path}: no such file, or a folder without files that end in {suffix}")
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            parts.append(f"# {file.relative_to(path.parent)}\n{text}\n")
    return "\n".join(parts)


def read_tokens(paths: list[Path], args: argparse.Namespace) -> np.ndarray[Any, Any]:
    """Token ids from text files and folders, or from `.npy` and `.npz` files of token ids."""
    parts = []
    for path in paths:
        if path.suffix in (".npy", ".npz"):
            loaded = np.load(path)
            parts.append(loaded[loaded.files[0]] if path.suffix == ".npz" else loaded)
        else:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            parts.append(np.asarray(tokenizer(read_text([path], args.suffix)).input_ids))
    return np.concatenate(parts)


@torch.no_grad()
def trailing(model: Any, rows: Tensor, moba: MobaConfig | None, count: int) -> float:
    """Mean loss in nats of the last `count` tokens of `rows (n, length)`; `moba` None: dense."""
    training = model.training
    model.eval()
    with torch.autocast("cuda" if CUDA else "cpu", torch.bfloat16, enabled=CUDA):
        losses = [token_losses(model, row[None], moba)[-count:].double().mean() for row in rows]
    model.train(training)
    return float(torch.stack(losses).mean())


class HeldOut(TrainerCallback):
    """Records the held-out loss of a few rows during training; ends a run by steps or by the clock."""

    def __init__(self, rows: Tensor, run: Run, args: argparse.Namespace, limit: int) -> None:
        self.rows, self.run, self.args, self.limit = rows, run, args, limit
        self.points: list[dict[str, float]] = []
        self.paused = 0.0  # seconds spent here

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self._measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        late = self.args.max_seconds and self.seconds() > self.args.max_seconds
        if step == self.limit or late:
            control.should_training_stop = True
        if step % self.args.curve_every == 0 or control.should_training_stop:
            self._measure(step, model)

    def seconds(self) -> float:
        """Seconds of training so far, without the time spent in this callback."""
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - self.start - self.paused

    def _measure(self, step: int, model: Any) -> None:
        seconds, before = self.seconds(), time.perf_counter()
        loss = trailing(model, self.rows, self.run.moba, self.args.trailing)
        self.points.append({"step": step, "seconds": round(seconds, 2), "held_out_trailing": loss})
        self.paused += time.perf_counter() - before


def load(args: argparse.Namespace, run: Run) -> Any:
    """The checkpoint with fp32 weights, ready for `run`."""
    torch.manual_seed(args.seed)
    attention = "sdpa" if run.moba is None else "moba"
    with dense_on_purpose():  # the control must not trigger the warning
        model = AutoModelForCausalLM.from_pretrained(
            args.model, attn_implementation=attention, dtype=torch.float32
        )
    return model.to("cuda" if CUDA else "cpu")


def arguments(args: argparse.Namespace, run: Run) -> TrainingArguments:
    """The arguments for Trainer, the same for every run."""
    return TrainingArguments(
        output_dir=str(args.out / run.name),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if CUDA else "adamw_torch",
        bf16=CUDA,
        use_cpu=not CUDA,
        logging_steps=args.log_every,
        logging_nan_inf_filter=False,  # the filter syncs with the device at every step
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
        data_seed=args.seed,
    )


def train(
    run: Run, args: argparse.Namespace, data: TokenBlocks, held_out: Tensor, dense_before: float, limit: int
) -> dict[str, Any]:
    """Trains one run, for at most `limit` steps, and returns its row of the results."""
    model = load(args, run)
    before = dense_before if run.moba is None else trailing(model, held_out, run.moba, args.trailing)
    curve = HeldOut(held_out[: args.curve_rows], run, args, limit)
    callbacks: list[TrainerCallback] = [curve]
    if run.moba is not None:
        callbacks.append(MobaCallback(args.recipe, run.moba, trailing_tokens=args.trailing))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(model=model, args=arguments(args, run), train_dataset=data, callbacks=callbacks)
    trainer.train()
    seconds = curve.points[-1]["seconds"]
    steps = trainer.state.global_step
    tokens = steps * args.batch * args.accumulate * args.length
    if args.save:
        trainer.save_model(str(args.out / run.name))
        if (args.model / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out / run.name)
    after = trailing(model, held_out, run.moba, args.trailing)
    return {
        "name": run.name,
        "moba": None if run.moba is None else run.moba.to_dict(),
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None,
        "before": before,
        "after": after,
        "after_dense": after if run.moba is None else trailing(model, held_out, None, args.trailing),
        "curve": curve.points,
        "log": [line for line in trainer.state.log_history if "loss" in line],
    }


def add_gaps(rows: list[dict[str, Any]], dense_before: float) -> None:
    """Adds to each MoBA row its gaps and the share of the gap that training closed.

    The gap before is to dense attention, the gap after to the dense control, if it took as many steps. The
    share needs a positive gap before.
    """
    control = next((row for row in rows if row["name"] == DENSE), None)
    for row in rows:
        if row["moba"] is not None:
            row["gap_before"] = row["before"] - dense_before
            if control is not None and control["steps"] == row["steps"]:
                row["gap_after"] = row["after"] - control["after"]
                if row["gap_before"] > 0:
                    row["closed"] = 1 - row["gap_after"] / row["gap_before"]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| attention | steps | before | after | run dense | gap before | gap after | closed | tokens/s | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["runs"]:
        gaps = [
            f"{row[k]:{form}}" if k in row else "-"
            for k, form in (("gap_before", "+.4f"), ("gap_after", "+.4f"), ("closed", ".0%"))
        ]
        losses = [f"{row[name]:.4f}" for name in ("before", "after", "after_dense")]
        speed = [f"{row['tokens_per_second']:,}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join([row["name"], str(row["steps"]), *losses, *gaps, *speed]) + " |")
    return "\n".join(lines)


def parse_setting(text: str) -> Run:
    """`NAME=BLOCK/TOPK` or `NAME=BLOCK/TOPK/SINK/LOCAL`."""
    try:
        name, numbers = text.split("=")
        block_size, topk, *forced = (int(part) for part in numbers.split("/"))
        sink, local = forced or (0, 0)
        return Run(name, MobaConfig(block_size, topk, sink, local))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=BLOCK/TOPK[/SINK/LOCAL] ({error})") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="a converted checkpoint; with --setting, any supported one")
    add("--text", type=Path, action="append", required=True, help="text file, folder or .npy; repeatable")
    add("--held-out", type=Path, action="append", required=True, help="the same, for evaluation")
    add("--suffix", default=".py", help="suffix of the files to read in folders")
    add("--setting", type=parse_setting, action="append", help="NAME=BLOCK/TOPK[/SINK/LOCAL]; repeatable")
    add("--recipe", choices=sorted(RECIPES), default="moba", help="when and where full attention runs")
    add("--no-dense", action="store_true", help="leave out the dense control")
    add("--out", type=Path, default=Path("out/adapt"))
    add("--save", action="store_true", help="save the trained checkpoints under --out")
    for name, default, words in (
        ("--length", 8192, "tokens in a row"),
        ("--steps", 300, "optimizer steps"),
        ("--batch", 2, "rows in a batch"),
        ("--accumulate", 1, "batches per optimizer step"),
        ("--warmup", 20, "steps in which the learning rate rises"),
        ("--seed", 0, "seed for the order of the rows"),
        ("--trailing", 2048, "tokens at the end of a row whose loss is measured"),
        ("--held-out-rows", 32, "rows measured before and after training"),
        ("--curve-rows", 8, "how many of these are also measured during training"),
        ("--curve-every", 50, "steps between two points of the curve"),
        ("--log-every", 10, "steps between two lines of the log"),
        ("--max-seconds", 0, "end each training run after this many seconds; 0: never"),
    ):
        add(name, type=int, default=default, help=f"{words} (default {default})")
    add("--lr", type=float, default=3e-4, help="peak learning rate, cosine to zero (default 3e-4)")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "warmup", "max_seconds") else 1
        if type(value) is int and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The requested runs, the dense control first."""
    settings = args.setting
    if not settings:
        config = AutoConfig.from_pretrained(args.model).get_text_config()
        raw = getattr(config, "moba", None)
        if raw is None:
            raise SystemExit(f"{args.model} has no MoBA settings: convert it, or pass --setting")
        settings = [Run("moba", MobaConfig.from_dict(raw))]
    runs = [*([] if args.no_dense else [Run(DENSE, None)]), *settings]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SystemExit(f"--setting names two runs {twice[0]!r}")
    return runs


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    runs = runs_of(args)
    data = TokenBlocks(read_tokens(args.text, args), args.length)
    held_out = TokenBlocks(read_tokens(args.held_out, args), args.length).rows[: args.held_out_rows]
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    shown.update(text=[p.name for p in args.text], held_out=[p.name for p in args.held_out], setting=None)
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    results: dict[str, Any] = {"arguments": shown, "device": device, "torch": torch.__version__, "runs": []}
    results["train_rows"], results["held_out_rows"] = len(data), len(held_out)
    base = load(args, Run(DENSE, None))
    results["dense_before"] = trailing(base, held_out, None, args.trailing)
    del base
    args.out.mkdir(parents=True, exist_ok=True)
    limit = args.steps
    for run in runs:
        print(f"training {run.name} ...", file=sys.stderr, flush=True)
        results["runs"].append(train(run, args, data, held_out, results["dense_before"], limit))
        limit = min(limit, results["runs"][-1]["steps"])
        add_gaps(results["runs"], results["dense_before"])
        (args.out / "results.json").write_text(
            json.dumps(results, indent=1)
        )  # after each run, so that an interrupted script keeps its results
        print(table(results), file=sys.stderr, flush=True)
    print(f"loss in nats on the last {args.trailing} of {args.length} tokens, {len(held_out)} held-out rows")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
