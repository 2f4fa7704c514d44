"""When the Gluon kernel of the shared choice is used, and how it is launched; see `hopper.dispatch`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moba_hf.kernels.hopper import dispatch
from moba_hf.kernels.inputs import SharedInputs
from moba_hf.kernels.launch import cdiv, device_of, num_processors
from moba_hf.kernels.layout import LOG2_E
from moba_hf.kernels.shared_lists import Lists
from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.shared_tuning import HOPPER_MASS, MassTile
from moba_hf.kernels.tuning import Tile
from moba_hf.op.numerics import part_size
from moba_hf.op.shared import SharedRule

if TYPE_CHECKING:
    from moba_hf.kernels.shared_mass import Masses

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
    """The tile of `row_masses`; None if it does not support these tensors or this rule."""
    from moba_hf.kernels.shared_mass import heads_and_rows

    tile = HOPPER_MASS.get(parts)
    if tile is None or q.shape[3] != 128 or not dispatch.available(q, k, k):
        return None
    heads, rows = heads_and_rows(q.shape[1] // k.shape[1], rule.tile // rule.sample, tile.m)
    return tile if heads * rows == tile.m else None


def row_masses(
    q: Tensor,
    summary: tuple[Tensor, Tensor],
    plan: SharedPlan,
    rule: SharedRule,
    softmax_scale: float,
    masses: Masses,
    first_tile: int,
    tile: MassTile,
) -> None:
    """`shared_mass.row_masses` with masses in slots, where `mass_tile` found a tile."""
    from moba_hf.kernels.shared_hopper_mass import row_masses_kernel
    from moba_hf.kernels.shared_mass import heads_and_rows

    centers, spreads = summary
    num_heads, head_dim, group = q.shape[1], q.shape[3], q.shape[1] // centers.shape[0]
    rows, size = rule.tile // rule.sample, part_size(rule.block_size)
    heads, block_rows = heads_and_rows(group, rows, tile.m)
    chunk = masses.mass.shape[0]
    with device_of(q):
        row_masses_kernel[(chunk * (rows // block_rows), centers.shape[0] * cdiv(group, heads))](
            q,
            dispatch._descriptor(centers, tile.n),
            dispatch._descriptor(spreads, tile.n),
            masses.mass,
            masses.high,
            masses.total,
            plan.tiles,
            q.stride()[:3],
            masses.mass.shape[3],
            first_tile,
            min(first_tile + chunk, plan.num_tiles),
            num_heads,
            group,
            rule.block_size,
            rule.dense_below,
            softmax_scale * LOG2_E.value,
            softmax_scale**2 * LOG2_E.value,
            TILE=rule.tile,
            SAMPLE=rule.sample,
            ROWS=rows,
            BLOCK_ROWS=block_rows,
            HEADS=heads,
            PARTS=rule.block_size // size,
            LOG2_SIZE=math.log2(size),
            D=head_dim,
            HALVES=rule.rotary_pairs == "halves",
            N=tile.n,
            STAGES=tile.stages,
            num_warps=4,
        )
