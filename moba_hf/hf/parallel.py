"""What MoBA needs to know of a model that is spread over processes.

Query heads choose their blocks alone, so tensor parallelism, Ulysses (which gives each rank all tokens of
some heads) and FSDP2 need nothing from this package. What they cannot do is refused here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Raises ValueError where `ranks` do not divide the key-value heads of a config.

    transformers cuts the key projection by features, so it would cut inside a head.
    """
    text = config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if ranks > 1 and heads % ranks:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"{heads} key-value heads cannot be divided among {ranks} ranks: tensor parallelism would cut "
            f"inside a head. Use {', '.join(map(str, fitting))} ranks, or sequence parallelism"
        )


def tensor_parallel_ranks(kwargs: Mapping[str, Any]) -> int:
    """Ranks that `from_pretrained(**kwargs)` spreads each layer over; 1: it does not."""
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

    It passes keys from rank to rank inside torch's own attention. Any other attention function would see the
    keys of its own rank only, without an error.
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
