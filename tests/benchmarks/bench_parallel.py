"""Many GPUs: prefill, decoding and training of MoBA models sharded over the ranks of `torchrun`.

    torchrun --standalone --nproc-per-node=4 tests/benchmarks/bench_parallel.py --seconds 190
    torchrun --standalone --nproc-per-node=4 tests/benchmarks/bench_parallel.py --parts d
    torchrun --standalone --nproc-per-node=2 tests/benchmarks/bench_parallel.py --tiny    # on a CPU

Parts, which run in the order of `--parts`; each prints its lines as soon as they are measured:
    b        a model of Llama-3.1-8B's shape, bf16, tensor parallel, reads prompts in chunks: MoBA 128/8
             ("fine"), the shared choice at 2 % of the pairs, dense cuDNN attention in one call; then one GPU
    e        64 tokens after the longest prompt of b, ms per token: decode full, sparse, and stock sdpa
    c-layer  attention of one 32/8-head layer at 10M tokens, 64 blocks and top-3, next to dense attention
    a        tensor parallel against one GPU: logits and choices, fp32 and bf16
    c-10m    a model of Llama-3.2-1B's shape reads 10M tokens, as far as memory and time allow
    d        training steps of the 1B shape with DeepSpeed Ulysses, MoBA against dense

Weights are random (`parallel_model`). Whatever does not fit into memory or the remaining time is skipped with
a message. `of linear` is the time on one GPU, divided by the number of GPUs and by the time on all of them.
The shared choice is computed as usual, then replaced by a random causal one, since random weights have flat
mass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from parallel_model import CUDA, RESERVE, Ranks, alone, llama, random_ids, spread
from parallel_parts import equality, one_layer, training
from shared_masks import RandomLists, share_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

import moba_hf
from moba_hf import MobaCache, MobaConfig
from moba_hf.hf.cache_names import cache_kwargs
from moba_hf.op.shared import SharedRule

K = 1024
PARTS = ("b", "e", "c-layer", "a", "c-10m", "d")
SHARE = 0.02
# Dense attention that would take longer than this is left out.
DENSE_LIMIT = 60.0


def read(model: Any, ids: Tensor, cache: MobaCache, chunk: int, **kwargs: Any) -> None:
    """Reads a prompt into an empty cache in chunks, every token under the rule (`dense_tail=0`)."""
    cache.reset()
    kwargs = {"dense_tail": 0, "progress": False, **cache_kwargs(moba_hf.prefill, cache), **kwargs}
    moba_hf.prefill(model, ids, chunk, **kwargs)


def random_lists(rule: MobaConfig) -> AbstractContextManager[RandomLists | None]:
    """Replaces the choices of a shared rule; None: another rule, which is left alone."""
    return RandomLists(lambda _keys, _queries: SHARE) if rule.tile > 1 else nullcontext()


def rates(length: int, seconds: float, peak: float) -> dict[str, str]:
    return {
        "seconds": f"{seconds:.2f}",
        "tokens/s": f"{length / seconds:,.0f}",
        "peak_GiB_per_GPU": f"{peak:.1f}",
    }


def fitting(config: Any, ranks: Ranks, shared_by: int) -> int:
    """Number of tokens whose cache fits next to the memory allocated now."""
    heads = config.num_key_value_heads // shared_by
    return (ranks.free() - RESERVE) // (4 * config.num_hidden_layers * heads * config.head_dim)


class Prefills:
    """Parts b and e."""

    def __init__(self, ranks: Ranks, args: argparse.Namespace):
        self.ranks, self.tiny, self.decode = ranks, args.tiny, "e" in args.parts
        self.lengths = [512, 1024] if args.tiny else args.lengths
        self.chunk = 256 if args.tiny else 64 * K
        self.config = llama("8B", args.tiny)
        shared = MobaConfig.from_preset("default")
        if args.tiny:
            shared = MobaConfig(8, tile=16, threshold=0.01, gate="mass")
        elif args.rule:
            tile, block, sample = map(int, args.rule.split("/"))
            shared = replace(shared, tile=tile, block_size=block, sample=sample)
        self.rules = {
            "fine": MobaConfig(16, 3) if args.tiny else MobaConfig(128, 8),
            "shared choice, 2 % of pairs": shared,
        }
        self.seconds: dict[tuple[str, int], float] = {}

    def run(self) -> None:
        begin = time.monotonic()
        model = spread(self.config, self.ranks)
        self.ranks.say(f"the model is loaded and drawn after {time.monotonic() - begin:.1f} s")
        self.chunked(model)
        self.dense(model, self.lengths[:2])
        self.one_gpu(self.lengths[:1])
        self.dense(model, self.lengths[2:])

    def chunked(self, model: Any) -> None:
        fits = fitting(self.config, self.ranks, self.ranks.count)
        lengths = [x for x in self.lengths if x + 256 <= fits]
        for length in self.lengths:
            if length not in lengths:
                self.ranks.say(f"| skipped: b, {length:,} tokens: caches of {fits:,} fit into memory |")
        cache = MobaCache(model.config, max_cache_len=max(lengths) + 256)
        for name, rule in self.rules.items():
            moba_hf.patch_model(model, rule)
            last = 0.0
            with random_lists(rule) as lists:
                for length in lengths:
                    if not self.ranks.room(2.6 * last + 1, f"b, {name}, {length:,}"):
                        break
                    ids = random_ids(self.config, length, self.ranks.device)
                    share = None if lists is None else self.drawn(lists, rule, length, self.ranks.count)
                    if last == 0.0:
                        begin = time.monotonic()
                        read(model, ids, cache, self.chunk)  # compiles
                        self.ranks.say(f"{name}: first run {time.monotonic() - begin:.1f} s")
                    last, peak = self.ranks.timed(partial(read, model, ids, cache, self.chunk))
                    self.seconds[name, length] = last
                    cells = rates(length, last, peak)
                    if share is not None:
                        cells["share_of_pairs"] = f"{share:.4f}"
                    self.ranks.row("b", f"8B, {name}", length, **cells)
            if name == "fine" and self.decode and self.ranks.room(10, "e"):
                self.steps(model, cache)

    def drawn(self, lists: RandomLists, settings: MobaConfig, length: int, shared_by: int) -> float:
        """Draws the choices of a prompt in chunks; returns their share of its pairs."""
        rule = settings.for_layer(0, 1)
        assert isinstance(rule, SharedRule)
        lists.clear()
        heads, attended, begin = self.config.num_attention_heads // shared_by, 0.0, 0
        for end in [*range(self.chunk, length - 1, self.chunk), length - 1]:
            mask = lists.draw(end, end - begin, heads, rule, self.ranks.device)
            causal = (end * (end + 1) - begin * (begin + 1)) / 2
            attended += causal * share_of(mask, end, rule, end - begin)
            begin = end
        return attended / (begin * (begin + 1) / 2)

    @torch.no_grad()
    def steps(self, model: Any, cache: MobaCache) -> None:
        """Part e: decodes tokens one by one on top of the cache."""
        fine = self.rules["fine"]
        token = torch.zeros(1, 1, dtype=torch.long, device=self.ranks.device)
        for decode in ("full", "sparse", "by stock sdpa"):
            if decode == "by stock sdpa":
                model.set_attn_implementation("sdpa")
            else:
                moba_hf.patch_model(model, MobaConfig(fine.block_size, fine.topk, decode=decode))
            times = []
            for _ in range(8 + 64):
                dist.barrier()
                start = time.perf_counter()
                logits = model(token, use_cache=True, **cache_kwargs(model, cache)).logits
                token = logits[:, -1:].argmax(-1)
                int(token)  # waits
                times.append(1e3 * (time.perf_counter() - start))
            times = times[8:]
            cells = {"ms_per_token": f"{statistics.median(times):.2f}", "slowest": f"{max(times):.2f}"}
            self.ranks.row("e", f"8B, decode {decode}, 64 tokens", int(cache.get_seq_length()), **cells)
        moba_hf.patch_model(model, fine)

    @torch.no_grad()
    def dense(self, model: Any, lengths: list[int]) -> None:
        """Stock attention with cuDNN, the prompt in one call, with its cache kept."""
        name = "dense cuDNN, one call"
        model.set_attn_implementation("bench_dense")
        for length in lengths:
            known = [(n, s) for (what, n), s in self.seconds.items() if what == name]
            expected = known[-1][1] * (length / known[-1][0]) ** 2 if known else 10.0
            if expected > DENSE_LIMIT:
                self.ranks.say(f"| skipped: b, {name}, {length:,}: about {expected:.0f} s |")
                continue
            if not self.ranks.room(expected + 1, f"b, {name}, {length:,}"):
                continue
            if fitting(self.config, self.ranks, self.ranks.count) < 2 * length:
                self.ranks.say(f"| skipped: b, {name}, {length:,} does not fit into memory |")
                continue
            ids = random_ids(self.config, length, self.ranks.device)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if CUDA else nullcontext():
                if not known:
                    model(ids, logits_to_keep=1)
                seconds, peak = self.ranks.timed(partial(model, ids, logits_to_keep=1))
            self.seconds[name, length] = seconds
            self.ranks.row("b", f"8B, {name}", length, **rates(length, seconds, peak))
        model.set_attn_implementation("moba")

    def one_gpu(self, lengths: list[int]) -> None:
        """The same prefills on rank 0 alone, while the other ranks wait."""
        known = [s for (name, n), s in self.seconds.items() if n in lengths and name in self.rules]
        need = 1.5 * self.ranks.count * sum(known) + 8
        fits = fitting(self.config, self.ranks, 1) - (0 if self.tiny else (16 << 30) // (128 << 10))
        lengths = [x for x in lengths if x + 256 <= fits]
        if self.ranks.count == 1 or not lengths or not self.ranks.room(need, "b on one GPU"):
            return
        if self.ranks.rank == 0:
            model = alone(self.config, self.ranks)
            cache = MobaCache(model.config, max_cache_len=max(lengths) + 256)
            for name, rule in self.rules.items():
                moba_hf.patch_model(model, rule)
                with random_lists(rule) as lists:
                    for length in lengths:
                        if (name, length) not in self.seconds:
                            continue
                        if lists is not None:
                            self.drawn(lists, rule, length, 1)
                        self._alone(model, name, length, cache)
        dist.barrier()

    def _alone(self, model: Any, name: str, length: int, cache: MobaCache) -> None:
        ids = random_ids(self.config, length, self.ranks.device)
        if length == self.lengths[0]:
            read(model, ids[:, : self.chunk], cache, self.chunk)
        start = time.perf_counter()
        read(model, ids, cache, self.chunk)
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        spread_over = self.seconds[name, length]
        share = f"{seconds / self.ranks.count / spread_over:.0%} of linear with {self.ranks.count}"
        self.ranks.say(f"| b | 8B, {name} | 1 GPU | {length:,} | seconds {seconds:.2f} | {share} |")


class Stop(Exception):
    """The time is up."""


def ten_million(ranks: Ranks, tiny: bool) -> None:
    """Part c-10m: as many tokens as fit, reported at every doubling."""
    config = llama("1B", tiny)
    config.moba = (MobaConfig(16, 3) if tiny else MobaConfig(128, 8)).to_dict()
    model = spread(config, ranks)
    chunk = 256 if tiny else 64 * K
    length = min(4 * K if tiny else 10 << 20, fitting(config, ranks, ranks.count) // chunk * chunk)
    cache = MobaCache(model.config, max_cache_len=length)
    ids = random_ids(config, length, ranks.device)
    read(model, ids[:, : 2 * chunk], cache, chunk)  # compiles
    state = {"tokens": 0, "next": 2 * chunk, "start": time.perf_counter()}

    def after(count: int) -> None:
        state["tokens"] += count
        done = state["tokens"] >= length - 1
        if state["tokens"] < state["next"] and not done:
            return
        if CUDA:
            torch.cuda.synchronize()
        seconds = ranks.agreed(time.perf_counter() - state["start"])
        peak = ranks.agreed(torch.cuda.max_memory_allocated() / (1 << 30) if CUDA else 0.0)
        ranks.row(
            "c-10m",
            "1B, fine, so far" if not done else "1B, fine",
            int(state["tokens"]),
            **rates(int(state["tokens"]), seconds, peak),
        )
        state["next"] += (1 << 20) if state["tokens"] >= (1 << 20) and not tiny else state["tokens"]
        if not done and not ranks.room(seconds * 0.5, "c-10m, the rest"):
            raise Stop

    try:
        read(model, ids, cache, chunk, on_chunk=after)
    except Stop:
        return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128 * K, 256 * K, 512 * K, 1024 * K])
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="start nothing that would end after this time"
    )
    parser.add_argument("--rule", metavar="TILE/BLOCK/SAMPLE", help="the shared choice; default: the preset")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    ranks = Ranks(args.seconds)
    AttentionInterface.register("bench_dense", sdpa_attention_forward)
    AttentionMaskInterface.register("bench_dense", lambda *_args, **_kwargs: None)
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = torch.cuda.get_device_name() if CUDA else "CPU"
    ranks.say(f"{ranks.count} x {machine}, torch {torch.__version__}")
    lengths = [512, 1024] if args.tiny else [x for x in args.lengths if x <= 512 * K]
    work = {
        "b": lambda: Prefills(ranks, args).run(),
        "e": lambda: None if "b" in args.parts else ranks.say("| e is measured with b |"),
        "c-layer": lambda: one_layer(ranks, args.tiny),
        "a": lambda: equality(ranks, args.tiny),
        "c-10m": lambda: ten_million(ranks, args.tiny),
        "d": lambda: training(ranks, args.tiny, lengths),
    }
    for part in args.parts:
        if ranks.room(2.0 if args.tiny else 15.0, f"part {part}"):
            try:
                work[part]()
            except torch.OutOfMemoryError as error:  # every rank asks for as many bytes
                print(f"| {part} | rank {ranks.rank}: {str(error).splitlines()[0]}", flush=True)
            ranks.free()
    ranks.say(f"ends after {time.monotonic() - ranks.start:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
