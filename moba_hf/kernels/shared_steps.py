"""Decode steps of the shared choice: chooses blocks from the summaries of a cache, then attends to them.

Legend: B block size, H query heads, HK kv heads, P parts of a block, NB blocks, M steps per batch row, R
sampled rows of a tile.

A step takes blocks by the mean mass over the rows of its tile up to itself (`moba_hf.op.shared`):
1. masses: unnormalised masses of blocks, as in `shared_mass`. A program scores some sections of the blocks
   for sampled rows of the tile and the heads of a kv head, so that summaries are read once for all of them.
2. means: the sections' totals are merged and the rows averaged, for some columns per program.
3. choose: the second half of `shared_choose`, which writes a bit mask per head.
4. list and attend: `shared_steps_attend`.
Masses of earlier rows are recomputed at every step. They cost no bytes of device memory beyond the summaries,
which the step's own row needs anyway, whereas kept sums of masses could not be cropped with the cache.

The sections follow from the number of candidates alone, and each has its own units and total. So the choice
depends neither on how many programs share the sections nor on the number of slots of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moba_hf.kernels import shared_tuning, tuning
from moba_hf.kernels.launch import (
    cdiv,
    device_of,
    next_power_of_2,
    num_processors,
    padded,
    rows_contiguous,
)
from moba_hf.kernels.shared_choose import choice_arguments
from moba_hf.kernels.shared_mass import Masses, score_arguments
from moba_hf.kernels.shared_steps_attend import attend
from moba_hf.kernels.shared_steps_kernels import choose_step_kernel, step_masses_kernel, step_means_kernel
from moba_hf.op.numerics import part_size, spread_dtype, with_positive_scale
from moba_hf.op.shared_rule import SharedRule


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    table: Tensor,
    rule: SharedRule,
    softmax_scale: float,
    heard: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, M, H, DV)` in q's dtype and `lse (batch, H, M)` fp32; see `SharedKernels.decode`.

    Args:
        q: `(batch, H, M, D)`.
        k, v: `(batch, HK, kv_len, D or DV)`.
        kept: `(batch, HK, NB, width)`.
        table: int32 `(batch, 5)`, one sequence per batch row, in order.
        heard: `(batch, H, rows, D)`, the queries just before `q`; None: each step chooses alone.
    """
    heard = None if heard is None else with_positive_scale(heard, softmax_scale)[0]
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    q, k, v, kept = (rows_contiguous(x) for x in (q, k, v, kept))
    block_mask = choose(q, kept[:, :, : k.shape[2] // rule.block_size], table, rule, softmax_scale, heard)
    return attend(q, k, v, block_mask, table, rule.block_size, softmax_scale)


def choose(
    q: Tensor,
    kept: Tensor,
    table: Tensor,
    rule: SharedRule,
    softmax_scale: float,
    heard: Tensor | None,
    *,
    workspace: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """The choice of every step, bits int32 `(batch * M, H, words)`; arguments as for `decode`.

    Args:
        workspace: maximum bytes for the masses; None: `shared_tuning.MASS_WORKSPACE`. It changes no result.
        splits: number of programs that share the blocks; None: enough to fill the device. It changes no
            result.
    """
    batch, num_heads, length, head_dim = q.shape
    items, blocks = batch * length, kept.shape[2]
    words = blocks // 32 + 1
    block_mask = torch.empty(items, num_heads, words, dtype=torch.int32, device=q.device)
    if block_mask.numel() == 0:
        return block_mask
    if heard is None:  # the step is the only row of its tile that is sampled
        rule, known = replace(rule, sample=rule.tile), 0
        heard = q
    else:
        heard, known = rows_contiguous(heard), heard.shape[2]
    shape = _shape(q, kept, rule, splits)
    tile, rows = shape.tile, rule.tile // rule.sample
    columns, sections = shared_tuning.STEP_COLUMNS, shared_tuning.STEP_SECTIONS
    each = Masses.tile_bytes(num_heads, rows, blocks + tile.n, tile.n)
    each += 4 * num_heads * (blocks + tile.n + 2 * rows * sections)
    budget = shared_tuning.MASS_WORKSPACE if workspace is None else workspace
    chunk = max(1, min(items, budget // each))
    masses = Masses.empty(chunk, num_heads, rows, blocks, tile.n, q)
    stored = masses.mass.shape[3]
    totals = torch.empty(chunk, num_heads, rows, sections, 2, dtype=torch.float32, device=q.device)
    means = torch.empty(chunk, num_heads, stored, dtype=torch.float32, device=q.device)
    table = table.contiguous()
    for first in range(0, items, chunk):
        count = min(chunk, items - first)
        shared = (table, first, length, known)
        with device_of(q):
            step_masses_kernel[(count, kept.shape[1] * shape.row_parts, shape.splits)](
                q, heard, kept, kept.view(spread_dtype(kept.dtype)), masses.mass, masses.high, totals,
                *shared, q.stride()[:3], heard.stride()[:3], kept.stride()[:3], stored, num_heads,
                num_heads // kept.shape[1], HEADS=shape.heads, ROW_PARTS=shape.row_parts, HEAD_DIM=head_dim,
                PADDED_DIM=padded(head_dim), PADDED_HALF=padded(head_dim // 2), BLOCK_M=shape.block_m,
                BLOCK_N=tile.n, SECTIONS=sections, STAGES=tile.stages, num_warps=tile.warps,
                **score_arguments(rule, softmax_scale),
            )  # fmt: skip
            step_means_kernel[(count, num_heads, cdiv(stored, columns))](
                masses.mass, masses.high, totals, means, *shared, stored, rule.block_size, rule.dense_below,
                TILE=rule.tile, SAMPLE=rule.sample, ROWS=rows, BLOCK_R=min(rows, shared_tuning.STEP_ROWS),
                SECTIONS=sections, BLOCK_N=columns, STEP=tile.n, num_warps=4,
            )  # fmt: skip
            choose_step_kernel[(count, num_heads)](
                means, block_mask, *shared[:3], stored, words, BLOCK_N=shared_tuning.STEP_CHOICE_COLUMNS,
                num_warps=4, **choice_arguments(rule),
            )  # fmt: skip
    return block_mask


@dataclass(frozen=True)
class _Shape:
    """How the masses of the steps are divided among programs.

    Attributes:
        tile: the tile of a program.
        heads: heads of a kv head, rounded up to a power of two.
        block_m: rows of a program, sampled rows times heads.
        row_parts: number of programs that share the rows of a kv head.
        splits: number of programs that share the blocks.
    """

    tile: shared_tuning.MassTile
    heads: int
    block_m: int
    row_parts: int
    splits: int


def _shape(q: Tensor, kept: Tensor, rule: SharedRule, splits: int | None) -> _Shape:
    """The shape of the launch of the masses; arguments as for `choose`."""
    parts = rule.block_size // part_size(rule.block_size)
    capability = tuning.capability(q.device)
    tile = shared_tuning.step_mass_tile(padded(q.shape[3]), q.element_size(), parts, capability)
    num_kv_heads = kept.shape[1]
    heads = next_power_of_2(q.shape[1] // num_kv_heads)
    rows = heads * (rule.tile // rule.sample)
    block_m = max(16, min(tile.m, rows))
    row_parts = cdiv(rows, block_m)
    if splits is None:
        programs = q.shape[0] * q.shape[2] * num_kv_heads * row_parts
        wanted = num_processors(q) * shared_tuning.STEP_PROGRAMS // programs
        splits = max(1, min(wanted, cdiv(kept.shape[2], tile.n), shared_tuning.STEP_SECTIONS))
    return _Shape(tile, heads, block_m, row_parts, splits)
