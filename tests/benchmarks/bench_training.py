"""Training throughput of a random model of Llama-1B's shape with gradient checkpointing, MoBA against sdpa.

    python tests/benchmarks/bench_training.py --out out/bench          # 64K and 128K tokens, on one GPU
    python tests/benchmarks/bench_training.py --tiny                   # only runs the code, on a CPU

A step is the forward, the backward and a fused AdamW step for one sequence, with bf16 weights, every decoder
layer checkpointed (non-reentrant), and the loss computed over 4,096 tokens at a time. The gradients of the
attention operator are first checked against fp64 under the same choice of blocks; if they are wrong, no speed
is printed. sdpa uses the faster of torch's flash and cuDNN backends on this machine, chosen by timing one
layer. Seconds are those of whole steps between device synchronisations, the median of `--steps` (dense: one
at 128K). Results go to a CSV and a Markdown file.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import moba_hf
from moba_hf import MobaConfig, moba_attention, select_blocks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GIB = 1 << 30
LOSS_CHUNK = 4096
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def prove(moba: MobaConfig, heads: tuple[int, int, int]) -> str | None:
    """None if the operator's gradients pass the tolerance rule on this machine, else what failed."""
    num_heads, num_kv_heads, head_dim = heads
    length = min(4096, 12 * moba.block_size + 37)
    make = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(length, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    q, k, v, grad = (torch.randn(s, generator=make, device=DEVICE).bfloat16() for s in shapes)
    rule: dict[str, Any] = {"block_size": moba.block_size, "topk": moba.topk}
    choice = select_blocks(q, k, **rule)

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = moba_attention(*inputs, block_indices=choice, backend=backend, **rule)
        return [x.double() for x in torch.autograd.grad(out, inputs, grad.to(dtype))]

    truth, plain, ours = (
        gradients(dtype, backend)
        for dtype, backend in (
            (torch.float64, "portable"),
            (torch.bfloat16, "portable"),
            (torch.bfloat16, "auto"),
        )
    )
    for name, exact, low, got in zip(("dq", "dk", "dv"), truth, plain, ours, strict=True):
        allowed = 2 * float((low - exact).abs().max()) + 2**-8 * float(exact.abs().max())
        error = float((got - exact).abs().max())
        if not error <= allowed:
            return f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return None


def best_sdpa(heads: tuple[int, int, int], length: int) -> SDPBackend | None:
    """The faster of flash and cuDNN for one layer's forward and backward; None on a CPU."""
    if not CUDA:
        return None
    num_heads, num_kv_heads, head_dim = heads
    shapes = [(1, h, length, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for s in shapes)
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            for _ in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    out.backward(out.detach())
                torch.cuda.synchronize()
                times[backend] = time.perf_counter() - start
        except RuntimeError as error:  # noqa: PERF203
            print(f"sdpa {backend.name}: {str(error).splitlines()[0]}")
    for backend, seconds in times.items():
        print(
            f"sdpa {backend.name}: {seconds * 1e3:.1f} ms per layer at {length} tokens, forward and backward"
        )
    return min(times, key=lambda backend: times[backend])


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Next-token loss with logits of `LOSS_CHUNK` tokens at a time, recomputed in the backward pass."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, :-1]

    def part(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(x).float(), target, reduction="sum")

    parts = zip(hidden.split(LOSS_CHUNK), ids[0, 1:].split(LOSS_CHUNK), strict=True)
    losses = [checkpoint(part, x, target, use_reentrant=False) for x, target in parts]
    return torch.stack(losses).sum() / (ids.shape[1] - 1)


def step(model: Any, optimizer: Any, ids: Tensor) -> tuple[float, float]:
    """Seconds of one training step, and its loss."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = loss_of(model, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())  # waits for the device
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def measure(name: str, shape: dict[str, int], moba: MobaConfig, length: int, steps: int) -> dict[str, Any]:
    """One row of results: a new model, a warm-up, `steps` timed steps."""
    config = LlamaConfig(**shape, max_position_embeddings=2 * length, tie_word_embeddings=True)
    config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": 500000.0}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    if name == "moba":
        moba_hf.patch_model(model, moba)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA)
    ids = torch.randint(0, shape["vocab_size"], (1, length), device=DEVICE)
    # MoBA's kernels may depend on the length; dense ones are warmed up on a short text
    step(model, optimizer, ids if name == "moba" else ids[:, : min(length, 4096)])
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    timed = [step(model, optimizer, ids) for _ in range(steps)]
    seconds = statistics.median(seconds for seconds, _ in timed)
    assert all(0 < loss < 100 for _, loss in timed), timed
    row = {
        "attention": name,
        "length": length,
        "steps": steps,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(length / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 1) if CUDA else None,
        "loss": round(timed[-1][1], 3),
    }
    print(row, flush=True)
    del model, optimizer
    if CUDA:
        torch.cuda.empty_cache()
    return row


def table(rows: list[dict[str, Any]], backend: SDPBackend | None, moba: MobaConfig) -> str:
    """The rows as Markdown, with the ratio of throughputs per length."""
    dense = f"sdpa ({'CPU' if backend is None else backend.name.lower()})"
    names = {"sdpa": dense, "moba": f"moba {moba.block_size}/{moba.topk}"}
    lines = [
        "| tokens | attention | tokens/s | s per step | peak GiB | speed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        base = next((r for r in rows if r["length"] == row["length"] and r["attention"] == "sdpa"), None)
        speed = "-" if base is None else f"{row['tokens_per_second'] / base['tokens_per_second']:.2f} x"
        cells = [f"{row['length']:,}", names[row["attention"]], f"{row['tokens_per_second']:,}"]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.2f}", f"{row['peak_gib']}", speed]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 131072])
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="timed steps for MoBA, and for sdpa up to 64K")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model: the code runs, nothing is measured"
    )
    args = parser.parse_args()
    moba = MobaConfig(args.block_size, args.topk)
    shape, lengths = LLAMA_1B, args.lengths
    if args.tiny:
        shape, lengths, moba = TINY, [256], MobaConfig(16, 3)
    heads = (shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"])
    if (problem := prove(moba, heads)) is not None:
        raise SystemExit(f"the gate is red, nothing is timed: {problem}")
    print("gate: gradients pass the tolerance rule")
    backend = best_sdpa(heads, min(lengths))
    rows = []
    args.out.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        for name in ("moba", "sdpa"):
            steps = 1 if name == "sdpa" and length > 65536 else args.steps
            with nullcontext() if name == "moba" or backend is None else sdpa_kernel(backend):
                rows.append(measure(name, shape, moba, length, steps))
            with (args.out / "training.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            (args.out / "training.md").write_text(table(rows, backend, moba) + "\n")
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"\n{device}, torch {torch.__version__}\n{table(rows, backend, moba)}")


if __name__ == "__main__":
    main()
