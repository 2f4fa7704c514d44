"""Extends the context of a checkpoint, stage by stage, on repositories of source code.

    python examples/extend.py MODEL --schedule schedule.json --text numpy/ --text sympy/ --out out/extend
    python examples/extend.py MODEL --schedule schedule.json --tokens train.npz --out out/extend \\
        --lookups 512 --max-seconds 540

Each stage loads the weights of the previous one in fp32, takes context length, block size and topk from the
schedule, trains with AdamW in bf16 autocast (with gradient checkpointing and the loss in pieces), and saves
bf16 weights to `OUT/stage0`, `OUT/stage1`, ... After an interruption, run the same command again: it
continues after the last finished stage, and within a stage from the last Trainer checkpoint (written every
`--save-steps`, and when `--max-seconds` or `--stop-after` ends the run). `--write-schedule` writes an example
schedule to start from.

After each stage the script prints a table: tokens, seconds, tokens/s, peak memory, and with `--dense-steps`
the time of a step with dense attention. `OUT/stageN/stage.json` keeps the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from moba_hf import MobaConfig
from moba_hf.evaluate.repositories import load_repositories, save_repositories
from moba_hf.hf.patching import suspend_moba
from moba_hf.training import LongRowTrainer, MobaCallback, Repository, Rows, Schedule, Stage, read_repository
from moba_hf.training.stages import load_stage, save_stage, stages_done

CUDA = torch.cuda.is_available()
# The choice of blocks is shared by 64 queries; it takes more blocks of the same size in longer rows
SHARED = MobaConfig(64, sink_blocks=1, local_blocks=1, gate="mass", tile=64, threshold=0.01)
# SmolLM2-135M from 8,192 to 131,072 tokens (docs/training.md); the rotary base grows faster than the length
EXAMPLE = Schedule(
    (
        Stage(
            32768,
            SHARED,
            tokens=7_438_336,
            learning_rate=6e-4,
            warmup_steps=20,
            theta=1e6,
            dense_tail=2048,
        ),
        Stage(
            131072,
            SHARED,
            tokens=5_373_952,
            learning_rate=3e-4,
            warmup_steps=5,
            theta=8e6,
            dense_tail=4096,
        ),
    )
)


class Clock(TrainerCallback):
    """Times training; ends a run with a checkpoint at a deadline or after `stop_after` steps.

    After `stage_seconds` it ends the stage instead, which then counts as finished.
    """

    def __init__(
        self, deadline: float | None, stop_after: int | None, stage_seconds: float | None = None
    ) -> None:
        self.deadline, self.stop_after, self.stage_seconds = deadline, stop_after, stage_seconds
        self.ended = False
        self.begun = 0.0
        self.first_step = self.steps = 0
        self.times: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step - self.first_step
        self.times.append(self.seconds())
        late = self.deadline is not None and time.monotonic() > self.deadline
        if state.global_step < state.max_steps and (late or self.steps == self.stop_after):
            self.ended = control.should_save = control.should_training_stop = True
        elif self.stage_seconds is not None and self.times[-1] > self.stage_seconds:
            control.should_training_stop = True

    def per_step(self) -> float:
        """Median seconds per step."""
        return statistics.median(b - a for a, b in itertools.pairwise([0.0, *self.times]))

    def seconds(self) -> float:
        """Seconds since training began."""
        if CUDA:
            torch.cuda.synchronize()
        return time.monotonic() - self.begun


def arguments(args: argparse.Namespace, stage: Stage, folder: Path) -> TrainingArguments:
    """The arguments for Trainer in a stage."""
    # transformers 5.24 renamed the gradient checkpointing options
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    recompute = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if x in known)
    return TrainingArguments(
        **{recompute: stage.length >= args.recompute_from, f"{recompute}_kwargs": {"use_reentrant": False}},
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=stage.rows,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=stage.warmup_steps,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if CUDA else "adamw_torch",
        bf16=CUDA,
        use_cpu=not CUDA,
        dataloader_num_workers=2 if CUDA else 0,
        logging_steps=args.log_every,
        logging_nan_inf_filter=False,  # the filter syncs with the device at every step
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
        data_seed=args.seed,
    )


def dense_seconds(trainer: LongRowTrainer, rows: Rows, steps: int) -> float:
    """Seconds of a forward and backward pass with dense attention in every layer.

    Each row counts as one document, since document boundaries would rule out torch's fast causal kernels.
    """
    model = trainer.model
    suspend_moba(model, True)
    model.train()
    times = []
    for i in range(steps + 1):  # the first step is a warm-up
        begun = time.monotonic()
        inputs = {name: x[None].to(model.device) for name, x in rows[i % len(rows)].items()}
        del inputs["position_ids"]
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad(set_to_none=True)
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.monotonic() - begun)
    suspend_moba(model, False)
    return sum(times[1:]) / steps


def tokenizer_of(args: argparse.Namespace) -> Any:
    """The tokenizer of `--tokenizer` or of the model; None if it has none and nothing is tokenised."""
    folder = args.tokenizer or args.model
    if args.text or args.lookups or (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return None


def run_stage(
    args: argparse.Namespace,
    schedule: Schedule,
    index: int,
    source: Path,
    repositories: list[Repository],
    deadline: float | None,
) -> dict[str, Any] | None:
    """Trains stage `index`, starting from `source`; returns its results, or None if the run ended early."""
    stage, folder = schedule.stages[index], args.out / f"stage{index}"
    running = args.out / f"stage{index}-running"
    torch.manual_seed(args.seed)
    model = load_stage(schedule, index, source).to("cuda" if CUDA else "cpu")
    tokenizer = tokenizer_of(args)
    count = min(args.lookups, stage.length // args.lookup_spacing)
    rows = Rows(
        repositories,
        stage.length,
        max(1, stage.steps * stage.rows),
        seed=args.seed + 1000 * index,
        short_share=args.short_share,
        short_length=args.short_length,
        lookups=count,
        tail=stage.dense_tail,
        lookup_weight=args.lookup_weight,
        tokenizer=tokenizer,
    )
    clock = Clock(deadline, args.stop_after, args.stage_seconds)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer = LongRowTrainer(
        model=model,
        args=arguments(args, stage, running),
        train_dataset=rows,
        callbacks=[clock, MobaCallback(config=stage.moba)],
        offload=stage.length >= args.offload_from,
        dense_tail=stage.dense_tail,
    )
    checkpoint = get_last_checkpoint(str(running)) if running.is_dir() else None
    if stage.steps:
        trainer.train(resume_from_checkpoint=checkpoint)
    if clock.ended:
        return None
    seconds, tokens = clock.seconds() if stage.steps else 0.0, clock.steps * stage.rows * stage.length
    result = {
        "stage": index,
        "length": stage.length,
        "moba": stage.moba.to_dict(),
        "theta": model.config.get_text_config().rope_parameters.get("rope_theta"),
        "steps": stage.steps,
        "steps_of_this_run": clock.steps,
        "tokens": tokens,
        "lookups_per_row": count,
        "dense_tail": stage.dense_tail,
        "lookup_weight": args.lookup_weight,
        "recompute": stage.length >= args.recompute_from,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds) if seconds else 0,
        "seconds_per_step": round(clock.per_step(), 3) if clock.steps else 0,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if CUDA else None,
        "log": [line for line in trainer.state.log_history if "loss" in line],
    }
    if args.dense_steps:
        result["dense_seconds_per_step"] = round(dense_seconds(trainer, rows, args.dense_steps), 3)
    save_stage(schedule, index, model, folder, tokenizer)
    (folder / "stage.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if running.is_dir():
        shutil.rmtree(running)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The results of the stages as a Markdown table."""
    names = (
        "length",
        "block / topk",
        "steps",
        "tokens",
        "s",
        "tokens/s",
        "s/step",
        "GiB",
        "dense s/step",
        "loss",
    )
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    for one in results:
        moba, log = one["moba"], one["log"]
        cells = [
            f"{one['length']:,}",
            f"{moba['block_size']}/{moba['topk'] or 'tile ' + str(moba['tile'])}",
            one["steps"],
            f"{one['tokens']:,}",
            one["seconds"],
            f"{one['tokens_per_second']:,}",
            one["seconds_per_step"],
            one["peak_gib"] or "-",
            one.get("dense_seconds_per_step", "-"),
            f"{log[0]['loss']:.3f} - {log[-1]['loss']:.3f}" if log else "-",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def read(args: argparse.Namespace) -> list[Repository]:
    """The repositories given by `--text` and `--tokens`."""
    found = [one for path in args.tokens or () for one in load_repositories(path)]
    if args.text:
        found += [read_repository(path, tokenizer_of(args), args.suffix) for path in args.text]
    if not found:
        raise SystemExit("there is nothing to train on: pass --text FOLDER or --tokens FILE.npz")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="the checkpoint to extend; not needed for --write-schedule")
    add("--schedule", type=Path, help="JSON file of a moba_hf.training.Schedule")
    add("--write-schedule", type=Path, help="write an example schedule (SmolLM2-135M to 131,072) and exit")
    add("--text", type=Path, action="append", help="folder of a repository; repeatable")
    add("--tokens", type=Path, action="append", help="file written by --save-tokens; repeatable")
    add("--save-tokens", type=Path, help="write the token ids of --text to this file and exit")
    add("--suffix", default=".py", help="suffix of the files to read")
    add("--tokenizer", type=Path, help="folder of the tokenizer (default: the model's)")
    add("--out", type=Path, default=Path("out/extend"))
    add("--stages", type=int, help="run only the first N stages (default: all)")
    add("--max-seconds", type=float, help="end after this many seconds, with a checkpoint to continue from")
    add("--stage-seconds", type=float, help="end a stage after this many seconds, as if its steps were done")
    add("--stop-after", type=int, help="end after this many optimizer steps of a stage, in the same way")
    add("--save-steps", type=int, default=0, help="steps between two checkpoints within a stage (0: none)")
    add("--lookups", type=int, default=0, help="maximum number of definitions to look up per row (default 0)")
    add("--lookup-spacing", type=int, default=512, help="minimum tokens per lookup (default 512)")
    add(
        "--lookup-weight", type=float, default=1.0, help="weight of looked-up answers in the loss (default 1)"
    )
    add("--short-share", type=float, default=0.1, help="share of rows made of short texts (default 0.1)")
    add("--short-length", type=int, default=2048, help="maximum tokens of a short text (default 2048)")
    add("--dense-steps", type=int, default=0, help="dense-attention steps to time after each stage")
    add("--offload-from", type=int, default=1 << 20, help="offload activations from this row length on")
    add("--recompute-from", type=int, default=0, help="recompute activations from this row length on")
    add("--log-every", type=int, default=10, help="steps between two lines of the log")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.schedule is None) == (args.write_schedule is None) and args.save_tokens is None:
        parser.error("pass either --schedule FILE, or --write-schedule FILE to get an example schedule")
    if args.model is None and args.write_schedule is None:
        parser.error("MODEL is missing: pass the folder of the checkpoint to extend")
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    begun, args = time.monotonic(), parse(argv)
    if args.write_schedule:
        EXAMPLE.save(args.write_schedule)
        return []
    repositories = read(args)
    if args.save_tokens:
        save_repositories(args.save_tokens, repositories)
        return []
    schedule = Schedule.load(args.schedule)
    deadline = None if args.max_seconds is None else begun + args.max_seconds
    args.out.mkdir(parents=True, exist_ok=True)
    source, results = args.model, []
    for index in range(len(schedule.stages) if args.stages is None else args.stages):
        folder = args.out / f"stage{index}"
        if stages_done(folder) == index + 1:
            results.append(json.loads((folder / "stage.json").read_text(encoding="utf-8")))
        else:
            result = run_stage(args, schedule, index, source, repositories, deadline)
            if result is None:
                print(f"stage {index} stopped at a checkpoint; run the same command to continue")
                return results
            results.append(result)
        source = folder
        print(table(results), flush=True)
    return results


if __name__ == "__main__":
    main()
