"""Llama models with random weights over the ranks of `torchrun`, and helpers for the parts of bench_parallel.

transformers shards a model only while loading it. So rank 0 writes a checkpoint of zeros without their
storage. Then every rank draws each weight, with a seed derived from its name, and
keeps its part, so that the weights are the same for any number of ranks.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.utils import WEIGHTS_NAME

from moba_hf import MobaConfig

CUDA = torch.cuda.is_available()
GIB = 1 << 30
# Bytes on a GPU in addition to weights and cache: activations of a chunk, workspaces, libraries.
RESERVE = 12 * GIB
# A rank that waits longer than this for the others ends the run.
HANG = timedelta(seconds=90)


class Ranks:
    """This process among those of `torchrun`, and their remaining time."""

    def __init__(self, seconds: float):
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.start, self.seconds = time.monotonic(), seconds
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local) if CUDA else torch.device("cpu")
        given: dict[str, Any] = {"timeout": HANG}
        if CUDA:
            torch.cuda.set_device(local)
            given["device_id"] = self.device
        dist.init_process_group("nccl" if CUDA else "gloo", **given)

    def say(self, *words: Any) -> None:
        """Prints on rank 0, without buffering."""
        if self.rank == 0:
            print(*words, flush=True)

    def row(self, part: str, what: str, tokens: int | str, **cells: str) -> None:
        """One line of the table."""
        values = " | ".join(f"{name.replace('_', ' ')} {value}" for name, value in cells.items())
        length = f"{tokens:,}" if isinstance(tokens, int) else tokens
        self.say(f"| {part} | {what} | {self.count} GPUs | {length} | {values} |")

    def agreed(self, value: float, operation: Any = dist.ReduceOp.MAX) -> float:
        """The largest `value` of all ranks, or another reduction of it."""
        held = torch.tensor([value], device=self.device)
        dist.all_reduce(held, operation)
        return float(held)

    def room(self, needed: float, what: str) -> bool:
        """Whether `needed` seconds are left, agreed by all ranks; prints a message if not."""
        left = self.seconds - (time.monotonic() - self.start)
        fits = self.agreed(left, dist.ReduceOp.MIN) >= needed
        if not fits:
            self.say(f"| skipped: {what}, would take about {needed:.0f} s, {max(0, left):.0f} s are left |")
        return fits

    def timed(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until all ranks have finished `call`, and the largest peak of a rank's memory in GiB."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        seconds = self.agreed(time.perf_counter() - start)
        return seconds, self.agreed(torch.cuda.max_memory_allocated() / GIB if CUDA else 0.0)

    def free(self) -> int:
        """Bytes that every rank can still allocate."""
        gc.collect()
        if not CUDA:
            return 1 << 62
        torch.cuda.empty_cache()
        return int(self.agreed(torch.cuda.mem_get_info()[0] / GIB, dist.ReduceOp.MIN) * GIB)


def llama(size: str, tiny: bool, **values: Any) -> LlamaConfig:
    """The config of Llama-3.1-8B ("8B") or Llama-3.2-1B ("1B"), or of a toy model of the same kind."""
    shape: dict[str, Any] = {
        "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128},
        "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    }[size]
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}
        shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256}
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0 if size == "8B" else 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    given = {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    config = LlamaConfig(rope_parameters=rope, **(shape | given | values))
    config.moba = MobaConfig(128, 8).to_dict()
    return config


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name -> its full shape."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def write_zeros(config: LlamaConfig, dtype: torch.dtype, folder: Path) -> None:
    """Writes a checkpoint of zeros; each weight is a view of one number, so there is nothing to read."""
    zero = torch.zeros((), dtype=dtype)
    torch.save({name: zero.expand(shape) for name, shape in _shapes(config).items()}, folder / WEIGHTS_NAME)
    config.save_pretrained(folder)


@torch.no_grad()
def draw_weights(model: Any, config: LlamaConfig, ranks: Ranks) -> None:
    """Fills every parameter with this rank's part of random normal values; norms are ones."""
    whole = _shapes(config)
    for name, parameter in model.named_parameters():
        if not parameter.is_contiguous():  # still a view of the zero in the checkpoint
            parameter.data = parameter.data.contiguous()
        local = parameter.data
        local = local.to_local() if hasattr(local, "to_local") else local
        if local.dim() == 1:
            local.fill_(1.0)
            continue
        generator = torch.Generator(ranks.device).manual_seed(zlib.crc32(name.encode()))
        full = torch.empty(whole[name], dtype=local.dtype, device=ranks.device)
        full.normal_(0.0, 0.02, generator=generator)
        for dim, (have, want) in enumerate(zip(local.shape, whole[name], strict=True)):
            if have != want:
                assert have * ranks.count == want, f"{name}: {tuple(local.shape)} of {whole[name]}"
                full = full.narrow(dim, ranks.rank * have, have)
        local.copy_(full)


def spread(config: LlamaConfig, ranks: Ranks, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model sharded over all ranks by transformers' tensor parallelism; the whole model on one rank."""
    if ranks.count == 1:
        return alone(config, ranks, dtype)
    names: list[str | None] = [None]
    if ranks.rank == 0:
        folder = Path(tempfile.mkdtemp())
        write_zeros(config, dtype, folder)
        names = [str(folder)]
    dist.broadcast_object_list(names, device=ranks.device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            names[0],
            attn_implementation="moba",
            dtype=dtype,
            use_safetensors=False,
            distributed_config=DistributedConfig(tp_size=ranks.count),
        )
        dist.barrier()
    finally:
        if ranks.rank == 0:
            shutil.rmtree(str(names[0]), ignore_errors=True)
    draw_weights(model, config, ranks)
    query = model.model.layers[0].self_attn.q_proj.weight
    query = query.to_local() if hasattr(query, "to_local") else query
    assert query.shape[0] * ranks.count == config.num_attention_heads * config.head_dim, query.shape
    return model.eval()


def alone(config: LlamaConfig, ranks: Ranks, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The whole model on this rank, with the same weights."""
    with torch.device(ranks.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="moba")
    draw_weights(model, config, ranks)
    return model.eval()


def random_ids(config: LlamaConfig, length: int, device: torch.device) -> Tensor:
    """The same ids `(1, length)` on every rank."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(config.vocab_size, (1, length), generator=generator).to(device)
