"""The gain of the Gluon kernels with the installed Triton: a table of times and differences.

    python tests/benchmarks/bench_gluon.py [--length 131072] [--repeats 30]

One bf16 sequence with 32 query and 8 kv heads of dim 128; blocks are chosen once, then attention is timed.
"""

from __future__ import annotations

import argparse

import torch
import triton

from moba_hf.bench.timing import median_ms
from moba_hf.config import LayerConfig
from moba_hf.kernels import attend, select_blocks
from moba_hf.kernels.forward import Forced
from moba_hf.kernels.hopper import dispatch as hopper
from moba_hf.op.sequences import Sequences, batched_table

SETTINGS = ((128, 8), (512, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1 << 17)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, n = torch.device("cuda", torch.cuda.current_device()), args.length
    q = torch.randn(1, n, 32, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(1, n, 8, 128, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    sequences = Sequences(batched_table(1, n, n, device), n, n)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"Gluon is used: {hopper.available(q, k, v)}\n")
    print("| block/topk | Gluon ms | plain ms | largest difference |\n| --- | --- | --- | --- |")
    for block_size, topk in SETTINGS:
        choice = select_blocks(q, k, sequences, LayerConfig(block_size, topk))
        given = (q, k, v, choice, sequences, block_size, 128**-0.5)
        outs = [attend(*given, forced=Forced(use_hopper=use))[0] for use in (None, False)]
        apart = (outs[0].float() - outs[1].float()).abs().max().item()
        times = [
            median_ms(lambda use=use, given=given: attend(*given, forced=use), args.repeats)
            for use in (None, Forced(use_hopper=False))
        ]
        print(f"| {block_size}/{topk} | {times[0]:.2f} | {times[1]:.2f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
