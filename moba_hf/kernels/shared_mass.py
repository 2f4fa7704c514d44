"""Estimates each block's attention mass for the sampled rows of a tile: the expensive half of the choice.

Legend: T tile, B block size, D head dim, G query heads of a kv head, P parts of a block, R sampled rows of a
tile, N blocks of a step.

A program holds the sampled rows of a few tiles times the heads of one kv head, so that block summaries are
read once for all of them, and loops over the candidates, N at a time. A block's score is the log-sum-exp, in
log2 units, of its P parts and its smallest key (`moba_hf.op.gates`). With `high` the largest term of the row
so far, `sum of exp2(term - high)` is the block's unnormalised mass; it takes P + 1 exponentials and no
logarithm. The mass is stored in fp16 together with its `high`. `shared_choose` combines the rows of a tile
once their totals are known. Masses that underflow are below 2^-24 of the row's heaviest block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moba_hf.kernels import shared_hopper
from moba_hf.kernels.launch import cdiv, device_of, next_power_of_2, padded
from moba_hf.kernels.layout import LOG2_E
from moba_hf.kernels.shared_mass_kernels import _row_masses_kernel
from moba_hf.kernels.shared_plan import SharedPlan
from moba_hf.kernels.shared_tuning import MassTile
from moba_hf.op.numerics import part_size
from moba_hf.op.shared import SharedRule


@dataclass(frozen=True)
class Masses:
    """Unnormalised masses of a chunk of tiles; the memory is reused for each chunk.

    Legend: C tiles of a chunk, H query heads, R sampled rows, NB blocks, N blocks of a step.

    Attributes:
        mass: fp16 `(C, H, R, NB)`, relative to the `high` of its step.
        high: fp32 `(C, H, R, NB / N)`, log2 of the unit of each step.
        total: fp32 `(C, H, R, 2)`, log2 of a unit of the row, and the sum of all its masses relative to it.
        step: N.
        slots: the masses of 32 blocks are in the order of `shared_hopper_mass`, see `shared_choose`.
    """

    mass: Tensor
    high: Tensor
    total: Tensor
    step: int
    slots: bool = False

    @classmethod
    def empty(
        cls, chunk: int, num_heads: int, rows: int, blocks: int, step: int, like: Tensor, slots: bool = False
    ) -> Masses:
        """Uninitialised masses for `chunk` tiles."""
        blocks = cdiv(max(1, blocks), step) * step
        shape = (chunk, num_heads, rows)
        return cls(
            torch.empty(*shape, blocks, dtype=torch.float16, device=like.device),
            torch.empty(*shape, blocks // step, dtype=torch.float32, device=like.device),
            torch.empty(*shape, 2, dtype=torch.float32, device=like.device),
            step,
            slots,
        )

    @staticmethod
    def tile_bytes(num_heads: int, rows: int, blocks: int, step: int) -> int:
        """Bytes per tile."""
        return num_heads * rows * (2 * blocks + 4 * blocks // step + 8)


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
    """Fills `masses` for the tiles from `first_tile` on, as many as it has room for; skips dense tiles.

    Args:
        q: `(batch, H, q_len, D)`, last dimension contiguous.
        summary: the result of `shared_summary`.
    """
    centers, spreads = summary
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[3], centers.shape[0]
    group = num_heads // num_kv_heads
    rows = rule.tile // rule.sample
    heads, block_rows = heads_and_rows(group, rows, tile.m)
    tiles = tile.m // (heads * block_rows)
    chunk = masses.mass.shape[0]
    common: dict[str, Any] = {
        "q_ptr": q,
        "mass_ptr": masses.mass,
        "high_ptr": masses.high,
        "total_ptr": masses.total,
        "tile_ptr": plan.tiles,
        "q_strides": q.stride()[:3],
        "mass_blocks": masses.mass.shape[3],
        "first_tile": first_tile,
        "last_tile": min(first_tile + chunk, plan.num_tiles),
        "num_heads": num_heads,
        "group_size": group,
        **score_arguments(rule, softmax_scale),
        "BLOCK_ROWS": block_rows,
        "HEADS": heads,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    grid = (cdiv(chunk, tiles) * cdiv(rows, block_rows), num_kv_heads * cdiv(group, heads))
    with device_of(q):
        if tile.hopper:
            shared_hopper.start_row_masses(grid, summary, tile.n, D=head_dim, **common)
            return
        _row_masses_kernel[grid](
            center_ptr=centers,
            spread_ptr=spreads,
            blocks=centers.shape[2],
            TILES=tiles,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            PADDED_HALF=padded(head_dim // 2),
            BLOCK_N=tile.n,
            WIDE=tile.wide,
            **common,
        )


def score_arguments(rule: SharedRule, softmax_scale: float) -> dict[str, Any]:
    """The arguments that the kernels which estimate masses take from a rule, by name."""
    size = part_size(rule.block_size)
    return {
        "block_size": rule.block_size,
        "dense_below": rule.dense_below,
        "scale": softmax_scale * LOG2_E.value,
        "square_scale": softmax_scale**2 * LOG2_E.value,
        "TILE": rule.tile,
        "SAMPLE": rule.sample,
        "ROWS": rule.tile // rule.sample,
        "PARTS": rule.block_size // size,
        "LOG2_SIZE": math.log2(size),
        "HALVES": rule.rotary_pairs == "halves",
    }


def heads_and_rows(group: int, rows: int, m: int) -> tuple[int, int]:
    """How many heads of a `group`, and how many of a tile's sampled `rows`, a program of `m` rows takes."""
    block_rows = min(rows, m)
    return min(next_power_of_2(group), m // block_rows), block_rows
