"""When the Gluon kernel of the shared choice is used, and how it is launched; see `hopper.dispatch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba_hf.kernels.hopper import dispatch
from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.launch import device_of, num_processors
from moba_hf.kernels.layout import LOG2_E
from moba_hf.kernels.shared_lists import Lists
from moba_hf.kernels.shared_tuning import HOPPER_MASS, MassTile
from moba_hf.kernels.tuning import Tile
from moba_hf.op.shared import SharedRule

SHAPE = Tile(m=128, n=64, warps=4, stages=4)
_SMALL_BLOCK = SHAPE.n // 2  # two of them are one step


def takes(q: Tensor, k: Tensor, v: Tensor, block_size: int, tile: int) -> bool:
    """Whether `attend_lists` supports these `(batch, heads, length, dim)` tensors and this rule."""
    if tile != SHAPE.m or (block_size % SHAPE.n and block_size != _SMALL_BLOCK):
        return False
    return dispatch.available(q, k, v)


def whole_keys(block_size: int) -> int:
    """`attend_lists` handles the tiles whose keys in overlapped blocks are a multiple of this number."""
    return min(block_size, SHAPE.n)


def attend_lists(
    inputs: SharedInputs,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    first_tile: int,
) -> None:
    """`shared_attend.attend_lists` for the tiles that `whole_keys` allows."""
    from moba_hf.kernels.shared_hopper_attend import attend_lists_kernel

    q, k, v, plan = inputs.q, inputs.k, inputs.v, inputs.plan
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    piece = (SHAPE.n, None) if plan.block_size >= SHAPE.n else (plan.block_size, 64)
    tiles = min(lists.counts.shape[0], plan.num_tiles - first_tile)
    with device_of(q):
        attend_lists_kernel[(num_processors(q),)](
            q,
            dispatch._descriptor(k, *piece),
            dispatch._descriptor(v, *piece),
            out,
            lse,
            plan.tiles,
            lists.blocks,
            lists.counts,
            counter,
            first_tile,
            tiles,
            lists.blocks.shape[2],
            k.shape[1],
            q.shape[2],
            q.stride()[:3],
            inputs.softmax_scale * LOG2_E.value,
            G=q.shape[1] // k.shape[1],
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            BLOCK_N=SHAPE.n,
            D=q.shape[3],
            DV=v.shape[3],
            STAGES=SHAPE.stages,
            num_warps=4,
        )


def mass_tile(q: Tensor, k: Tensor, rule: SharedRule, parts: int) -> MassTile | None:
    """The tile of `start_row_masses`; None if the kernel does not support these tensors or this rule."""
    from moba_hf.kernels.shared_mass import heads_and_rows

    tile = HOPPER_MASS.get(parts)
    if tile is None or q.shape[3] != 128 or not dispatch.available(q, k, k):
        return None
    heads, rows = heads_and_rows(q.shape[1] // k.shape[1], rule.tile // rule.sample, tile.m)
    return tile if heads * rows == tile.m else None


def start_row_masses(
    grid: tuple[int, int], summary: tuple[Tensor, Tensor], step: int, **arguments: Any
) -> None:
    """Launches the mass kernel, with masses in slots.

    Args:
        summary: the result of `shared_summary`.
        step: blocks per step.
        arguments: the remaining arguments of the kernel; see `shared_mass.row_masses`.
    """
    from moba_hf.kernels.shared_hopper_mass import row_masses_kernel

    centers, spreads = (dispatch._descriptor(x, step) for x in summary)
    row_masses_kernel[grid](center_desc=centers, spread_desc=spreads, N=step, **arguments)
