"""When the Gluon kernel of the shared choice is used, and how it is launched; see `hopper.dispatch`."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.kernels.hopper import dispatch
from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.launch import device_of, num_processors
from moba_hf.kernels.shared_lists import Lists
from moba_hf.kernels.tuning import Tile

SHAPE = Tile(m=128, n=64, warps=4, stages=4)


def takes(q: Tensor, k: Tensor, v: Tensor, block_size: int, tile: int) -> bool:
    """Whether `attend_lists` supports these `(batch, heads, length, dim)` tensors and this rule."""
    if tile != SHAPE.m or block_size % SHAPE.n:
        return False
    return dispatch.available(q, k, v)


def attend_lists(
    inputs: SharedInputs,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    first_tile: int,
) -> None:
    """`shared_attend.attend_lists` for tiles whose keys in overlapped blocks are a multiple of `SHAPE.n`."""
    from moba_hf.kernels.shared_hopper_attend import attend_lists_kernel

    q, k, v, plan = inputs.q, inputs.k, inputs.v, inputs.plan
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    tiles = min(lists.counts.shape[0], plan.num_tiles - first_tile)
    with device_of(q):
        attend_lists_kernel[(num_processors(q),)](
            q,
            dispatch._descriptor(k, SHAPE.n),
            dispatch._descriptor(v, SHAPE.n),
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
            *q.stride()[:3],
            inputs.softmax_scale * 1.4426950408889634,
            G=q.shape[1] // k.shape[1],
            TILE=plan.tile,
            BLOCK_SIZE=plan.block_size,
            BLOCK_N=SHAPE.n,
            D=q.shape[3],
            DV=v.shape[3],
            STAGES=SHAPE.stages,
            num_warps=4,
        )
