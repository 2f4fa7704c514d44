"""Time to first token for a model of Llama-3.1-8B's shape: MoBA, dense attention, and no attention.

    python tests/benchmarks/bench_ttft.py                          # about two minutes on an H200
    python tests/benchmarks/bench_ttft.py --sdpa-limit 131072      # 40 seconds less
    python tests/benchmarks/bench_ttft.py --tiny                   # toy size, on a CPU

One prompt of random ids in one call, bf16, random weights drawn on the GPU, logits of the last position only;
the time ends when its argmax is on the host. MoBA is 128/8 in every layer; dense attention is torch's cuDNN;
"none" returns the queries as the output. The cache is kept if it fits. No time is printed before the operator
has passed the correctness gate. `attention` is the time inside the attention functions, by CUDA events.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))

from moba_hf import MobaConfig
from moba_hf.bench.measure import prove
from moba_hf.bench.rows import ROWS
from moba_hf.bench.timing import GIB
from moba_hf.hf.attention import moba_attention_forward
from moba_hf.hf.mask import moba_mask

CUDA = torch.cuda.is_available()
WARM_UP = 4096
# Peak bytes per token of a forward without a cache, mostly for the projections of the MLP.
ACTIVATIONS = 170 << 10
_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []


def no_attention(module: Any, query: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
    """The queries as the output."""
    return query.transpose(1, 2), None


def timed(function: Any) -> Any:
    """`function`, timed by two CUDA events."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not CUDA:
            return function(*args, **kwargs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = function(*args, **kwargs)
        end.record()
        _events.append((begin, end))
        return result

    return wrapped


def register() -> None:
    """Registers the three attention functions under separate names, each with its own kind of mask."""
    no_mask = lambda *_args, **_kwargs: None  # noqa: E731
    for name, function, mask in (
        ("timed_moba", moba_attention_forward, moba_mask),
        ("timed_sdpa", sdpa_attention_forward, no_mask),
        ("timed_none", no_attention, no_mask),
    ):
        AttentionInterface.register(name, timed(function))
        AttentionMaskInterface.register(name, mask)


def build(tiny: bool) -> Any:
    """A model with random weights on the GPU."""
    config = LlamaConfig(
        vocab_size=1000 if tiny else 128_256,
        hidden_size=256 if tiny else 4096,
        intermediate_size=512 if tiny else 14_336,
        num_hidden_layers=2 if tiny else 32,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        head_dim=64 if tiny else 128,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
    )
    config.moba = MobaConfig(128, 8).to_dict()
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def cache_fits(model: Any, length: int) -> bool:
    """Whether weights, cache and activations of a prompt fit into nine tenths of the GPU's memory."""
    config = model.config
    if not CUDA:
        return True
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    return bool(weights + cache + ACTIVATIONS * length < 0.9 * total)


def reserve() -> None:
    """Makes torch allocate the GPU's memory once, so that no run pays for growing the pool."""
    if CUDA:
        free, _ = torch.cuda.mem_get_info()
        torch.empty(max(0, free - 6 * GIB), dtype=torch.uint8, device="cuda")


@torch.no_grad()
def first_token(model: Any, ids: Tensor, name: str, use_cache: bool) -> tuple[float, float]:
    """Seconds until the first new token is on the host, and how many of them are spent in attention."""
    model.set_attn_implementation(f"timed_{name}")
    _events.clear()
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if name == "sdpa" and CUDA else nullcontext():
        logits = model(ids, use_cache=use_cache, logits_to_keep=1).logits
    int(logits[0, -1].argmax())
    seconds = time.perf_counter() - start
    return seconds, sum(begin.elapsed_time(end) for begin, end in _events) / 1e3


@torch.no_grad()
def warm_up(model: Any, args: argparse.Namespace) -> None:
    """Runs a short forward of each kind, then attention alone at each length, which selects its kernels."""
    short = torch.randint(model.config.vocab_size, (1, min(WARM_UP, max(args.lengths))), device=model.device)
    for name in ("none", "moba", "sdpa"):
        first_token(model, short, name, True)
    config, layer = model.config, model.model.layers[0].self_attn
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    for length in args.lengths:
        q, k, v = (
            torch.randn(1, length, h, config.head_dim, dtype=torch.bfloat16, device=model.device)
            for h in heads
        )
        views = [x.transpose(1, 2) for x in (q, k, v)]
        moba_attention_forward(layer, *views, None, scaling=layer.scaling)
        if length <= args.sdpa_limit:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if CUDA else nullcontext():
                sdpa_attention_forward(layer, *views, None, scaling=layer.scaling)


def measure(model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per length."""
    lines = []
    limits = {"none": args.none_limit, "moba": max(args.lengths), "sdpa": args.sdpa_limit}
    for length in args.lengths:
        torch.manual_seed(length)
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        line: dict[str, Any] = {"tokens": length, "cache": cache_fits(model, length)}
        for name, limit in limits.items():
            if length > limit:
                continue
            runs = args.runs if name == "moba" and length <= args.repeat_limit else 1
            tries = [first_token(model, ids, name, line["cache"]) for _ in range(runs)]
            line[name], line[f"{name}_attention"] = min(tries)
            line[f"{name}_all"] = " ".join(f"{seconds:.3f}" for seconds, _ in tries)
        if CUDA:
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        if "sdpa" in line:
            line["speedup"] = line["sdpa"] / line["moba"]
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in line.items()}, flush=True)
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of the results."""
    head = ["tokens", "cache kept", "dense (cuDNN)", "MoBA 128/8", "no attention", "dense / MoBA"]
    head += ["in MoBA's attention", "in dense attention"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        seconds = [
            f"{line[name]:.2f} s" if name in line else "-"
            for name in ("sdpa", "moba", "none", "moba_attention", "sdpa_attention")
        ]
        speedup = f"{line['speedup']:.2f} x" if "speedup" in line else "-"
        kept = "yes" if line["cache"] else "no"
        rows.append([f"{line['tokens']:,}", kept, *seconds[:3], speedup, *seconds[3:]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(lines: list[dict[str, Any]], header: str, folder: Path) -> None:
    """`bench_ttft.csv` and `.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with (folder / "bench_ttft.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    text = f"{header}\n\n{table(lines)}"
    (folder / "bench_ttft.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072, 262_144, 524_288])
    parser.add_argument("--sdpa-limit", type=int, default=262_144, help="longest dense prompt")
    parser.add_argument("--none-limit", type=int, default=131_072, help="longest prompt without attention")
    parser.add_argument("--runs", type=int, default=2, help="runs of MoBA; the best one counts")
    parser.add_argument(
        "--repeat-limit", type=int, default=131_072, help="longest prompt with this many runs"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the code runs, nothing is measured")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder for the results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.set_verbosity_error()
    if args.tiny:
        args.lengths = [1500, 3000]
    elif not CUDA:
        print("no CUDA device: only --tiny runs here")
        return 2
    if CUDA:
        row = next(row for row in ROWS if row.name == "131K-128/8")
        problem = prove(row)
        if problem is not None:
            print(f"gate: RED: {problem}")
            return 1
    register()
    start = time.perf_counter()
    model = build(args.tiny)
    reserve()
    warm_up(model, args)
    print(f"built and warm after {time.perf_counter() - start:.1f} s", flush=True)
    lines = measure(model, args)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    header = f"{name}, torch {torch.__version__}, Llama-3.1-8B's shape, random weights, bf16, one prompt"
    write(lines, header, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
