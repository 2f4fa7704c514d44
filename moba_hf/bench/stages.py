"""Where the Triton forward spends its time: GPU time of its kernels in whole calls, by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Substrings of kernel names by stage; the first match wins. The rest ("other") is fills and small sums.
_NAMES = {
    "tiling": ("_tiling_kernel", "_tile_table_kernel"),
    "means": ("_block_mean_kernel", "_update_means_kernel"),
    "gate": ("gate_fwd_kernel", "gate_rest_kernel"),
    "own": ("own_kernel",),
    "keys": ("_pair_key_kernel",),
    "route": ("_tile_info_kernel", "sort", "Sort", "searchsorted", "scan", "Scan"),
    "routed": ("routed_kernel", "resident_kernel", "stream_kernel"),
    "merge": ("_merge_kernel",),
}
STAGES = (*_NAMES, "other")


def stage_of(kernel: str) -> str:
    """The stage of the kernel with this name."""
    return next((stage for stage, parts in _NAMES.items() if any(part in kernel for part in parts)), "other")


def totals(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums of `(name, time)` by stage; stages without kernels get 0."""
    sums = dict.fromkeys(STAGES, 0.0)
    for name, time in kernels:
        sums[stage_of(name)] += time
    return sums


def stage_times(call: Callable[[], Any], runs: int) -> dict[str, float]:
    """Milliseconds of each stage in one run of `call`, averaged over `runs` runs.

    The kernels must be compiled already. Idle time between kernels belongs to no stage.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    kernels = (
        (event.key, event.self_device_time_total / 1e3 / runs)
        for event in found.key_averages()
        if str(event.device_type).endswith("CUDA")
    )
    return totals(kernels)
