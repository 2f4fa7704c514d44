"""The GPU half of `bench_decode.py`: stages of a decode step, then a whole model, all in CUDA graphs.

A static cache of the longest length is filled with random keys and values; shorter lengths use its first
slots.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from decode_gates import gate, gate_model
from decode_model import bench_model, fused_elementwise, profile
from decode_setup import Clock, Row, filled_cache, model_config, take_means
from decode_shared import SharedStages, gate_shared, take_summaries
from decode_stages import bench_stages
from transformers import LlamaForCausalLM


def write(out: str | None, name: str, rows: list[Row]) -> None:
    """Writes the rows as CSV and as a Markdown table."""
    if out is None or not rows:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def bench(args: argparse.Namespace) -> None:
    """Runs the gate, the stages and the model; see the module docstring."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    torch.manual_seed(0)
    clock, config = Clock(device, args.runs), model_config(args)
    cache = filled_cache(config, max(args.lengths), device)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="moba").eval()
    gate(cache, config, args)
    gate_model(model, cache, config, args)
    gate_shared(config, args, device)
    print("gate: green (choices equal prefill's; rows equal the reference and dense attention)", flush=True)
    stages, best = [], {}
    for length in args.lengths:
        rows, best[length] = bench_stages(cache, config, length, args, clock)
        stages += rows
        write(args.out, "decode_stages", stages)
    shared = {}
    for length, share in zip(args.lengths, args.shares, strict=True):
        shared[length] = SharedStages(cache, config, length, share, args)
        take_summaries(cache, shared[length].rule, length)
        stages += shared[length].measure(clock)
        write(args.out, "decode_stages", stages)
    results = []
    with fused_elementwise(not args.whole and device == "cuda"):
        for length in args.lengths:
            take_means(cache, config, length)
            results += bench_model(model, cache, config, shared[length], best[length], args, clock)
            write(args.out, "decode_model", results)
        if args.profile and device == "cuda":
            profile(model, cache)
    take_means(cache, config, max(args.lengths))
    gate_model(model, cache, config, args)  # still right after all the overwriting
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, block {args.block_size}"
    print(f"{shape}, topk {args.topk}, bf16, batch 1, CUDA graphs")
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
