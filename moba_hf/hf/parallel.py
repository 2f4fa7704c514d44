"""Checks for models that are distributed over several processes.

Each query head chooses its blocks independently, so tensor parallelism, Ulysses (each rank has all tokens of
some heads) and FSDP2 need nothing from this package. Unsupported combinations are refused here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moba_hf.config import NAME


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Raises ValueError if `ranks` does not divide the number of key-value heads of a config.

    transformers shards the key projection by features, so it would cut inside a head.
    """
    text = config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if ranks > 1 and heads % ranks:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"{heads} key-value heads cannot be divided among {ranks} ranks: tensor parallelism would cut "
            f"inside a head. Use {', '.join(map(str, fitting))} ranks, or sequence parallelism"
        )


def launched_ranks() -> int:
    """Number of processes that `torchrun` started; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first_rank() -> bool:
    """Whether this is rank 0, from torch.distributed or, before its initialisation, from the launcher."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def tensor_parallel_ranks(kwargs: Mapping[str, Any]) -> int:
    """Number of ranks over which `from_pretrained(**kwargs)` shards each layer; 1: it does not."""
    sizes = kwargs.get("distributed_config")
    if sizes is None and kwargs.get("tp_plan") is None and kwargs.get("tp_size") is None:
        return 1
    size = kwargs.get("tp_size")
    planned = kwargs.get("tp_plan") is not None
    others = 1
    if sizes is not None:
        size, planned = getattr(sizes, "tp_size", None), getattr(sizes, "tp_plan", None) is not None
        for name in ("fsdp_size", "dp_replicate_size", "pp_size"):
            others *= getattr(sizes, name, None) or 1
    if size is not None:
        return int(size)
    return int(os.environ.get("WORLD_SIZE", "1")) // others if planned else 1


def refuse_ring_attention() -> None:
    """Raises ValueError under accelerate's context parallelism (`cp_size`).

    It passes keys from rank to rank inside torch's own attention. Any other attention function would silently
    see only the keys of its own rank.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return
    parallel = getattr(state.AcceleratorState(), "parallelism_config", None)
    if parallel is not None and parallel.cp_enabled:
        raise ValueError(
            f"MoBA cannot run under ring attention (context parallelism, cp_size={parallel.cp_size}): a rank "
            "would see only its own keys. Use sequence parallelism (Ulysses, sp_size) instead"
        )


def refuse_lost_padding(attention_mask: Tensor | None) -> None:
    """Raises ValueError if DeepSpeed's Ulysses would drop a mask that MoBA needs.

    It wraps the attention function and passes it no mask. Padding on the right is harmless, because no real
    token attends to it.

    Args:
        attention_mask: `(batch, length)` of this rank's part of the rows, 0 for padding.
    """
    if attention_mask is None or not _under_ulysses():
        return
    from deepspeed.runtime.sequence_parallel.parallel_state_sp import get_sequence_parallel_rank

    real = attention_mask.bool()
    lost = (~real[:, :-1] & real[:, 1:]).any()
    if get_sequence_parallel_rank() == 0:  # if this part is all padding, it is on the left
        lost = lost | ~real[:, 0].all()
    if lost:
        raise ValueError(
            "padding on the left of rows, or holes, under DeepSpeed's Ulysses: it passes no mask to the "
            "attention function, so tokens would attend to the padding. Pad on the right "
            '(tokenizer.padding_side = "right"), or pack rows without padding and restart position_ids at '
            "each document"
        )


def _under_ulysses() -> bool:
    """Whether DeepSpeed has wrapped the attention function that transformers knows as "moba"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # slow; `inspect` does not need it

    function = ALL_ATTENTION_FUNCTIONS[NAME]
    return str(getattr(function, "__module__", "")).partition(".")[0] == "deepspeed"
