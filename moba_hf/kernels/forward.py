"""Attention over chosen blocks on the GPU, one chunk of queries at a time: own blocks, routed blocks, merge.

Legend: H query heads, HK kv heads, D and DV head dims, K topk, K1 = K - 1 routed slots.

For each chunk of flat query rows, whose size follows from a memory budget:
1. own: every query attends its own block causally, directly into `out` and `lse` (`own`).
2. route: the other chosen (query, head, slot) pairs are regrouped by (kv head, block) (`routing`).
3. routed: each group attends its block and writes one partial output per pair (`routed`).
4. merge: the own and the K1 partial outputs are added, weighted by their softmax masses (`merge`).
A row's result does not depend on its chunk, so the budget trades memory for speed without changing a bit. A
few queries go through `sparse_decode` instead. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_hf.kernels import budgets, sparse_decode, tuning
from moba_hf.kernels.hopper import dispatch as hopper
from moba_hf.kernels.inputs import Inputs
from moba_hf.kernels.launch import padded, rows_contiguous
from moba_hf.kernels.merge import merge
from moba_hf.kernels.own import own_attention
from moba_hf.kernels.routed import routed_attention
from moba_hf.kernels.routing import Routes, key_format, pair_keys, route
from moba_hf.kernels.tiling import head_split, make_tiling
from moba_hf.op.numerics import with_positive_scale
from moba_hf.op.sequences import Sequences, covers_queries


@dataclass(frozen=True)
class Forced:
    """Choices of `attend` that tests and benchmarks make themselves; None: `attend` makes them.

    Attributes:
        workspace: maximum bytes for partial outputs and pairs; None: `budgets.WORKSPACE`. It does not affect
            the result.
        resident: use the kernel that keeps a block's keys resident; None: by `tuning.routed_tile`.
        use_decode: use the decode kernel; None: only for a few queries.
        use_hopper: False: never use Gluon kernels; None: use them if `hopper.dispatch.available`.
    """

    workspace: int | None = None
    resident: bool | None = None
    use_decode: bool | None = None
    use_hopper: bool | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    sequences: Sequences,
    block_size: int,
    softmax_scale: float,
    *,
    by_row: bool = False,
    forced: Forced | None = None,
) -> tuple[Tensor, Tensor]:
    """`out (batch, q_len, H, DV)` in q's dtype and `lse (batch, H, q_len)`, fp32, natural logarithm.

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, DV)`.
        block_indices: int32 `(batch, q_len, H, K)`, the own block in any slot, -1 for empty slots.
        block_size: keys in a block.
        softmax_scale: factor of the scores.
        by_row: row r of the table is batch row r, for every r, so the decode kernel writes every row.
        forced: choices that are otherwise made here.
    """
    forced, table, max_seqlen_q = forced or Forced(), sequences.table, sequences.max_seqlen_q
    use_decode, resident = forced.use_decode, forced.resident
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    block_indices = block_indices.contiguous()
    batch, num_heads, q_len, _ = q.shape
    topk, v_dim = block_indices.shape[3], v.shape[3]
    if use_decode is None:
        use_decode = sparse_decode.takes(q, topk, max_seqlen_q, block_size)
    if use_decode and q.numel() > 0:
        return sparse_decode.decode_attention(
            q, k, v, block_indices, sequences, block_size, softmax_scale, by_row=by_row
        )
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=torch.float32, device=q.device)
    budget = budgets.WORKSPACE if forced.workspace is None else forced.workspace
    rows = budgets.chunk_rows(batch * q_len, num_heads, topk - 1, v_dim, q.element_size(), budget)
    on_hopper = forced.use_hopper is not False and resident is None and hopper.available(q, k, v)
    all_complete = covers_queries(table) and k.shape[2] % block_size == 0
    own = _own_stage(q, k, v, block_size, on_hopper, all_complete)
    _, tokens = head_split(num_heads // k.shape[1], own.tile.m)
    if q.numel() == 0 or table.shape[0] == 0:
        return q.new_zeros(batch, q_len, num_heads, v_dim), lse
    tiling = make_tiling(
        q, k, table, max_seqlen_q, sequences.max_seqlen_k, block_size=block_size, tile=tokens, chunk_rows=rows
    )
    inputs = Inputs(q, k, v, tiling, softmax_scale)
    final = topk == 1 or tiling.num_blocks == 0
    # The merge writes zeros to rows outside all sequences; without a merge, start from zeros.
    out = (torch.zeros if final else torch.empty)(
        batch, q_len, num_heads, v_dim, dtype=q.dtype, device=q.device
    )
    space = None
    if not final:
        shape = (tiling.chunk_rows, num_heads, topk - 1)
        space = (
            torch.empty(*shape, v_dim, dtype=q.dtype, device=q.device),
            torch.empty(shape, dtype=torch.float32, device=q.device),
        )
    routed = _routed_stage(q, k, v, block_size, on_hopper, resident)
    for chunk in range(tiling.num_chunks):
        own.run(inputs, chunk, out, lse, final)
        if space is not None:
            _earlier_blocks(inputs, block_indices, chunk, out, lse, space, routed)
    return out, lse


@dataclass(frozen=True)
class OwnStage:
    """The kernels that attend own blocks.

    Attributes:
        tile: their tile.
        gluon: whether a Gluon kernel attends the complete blocks.
        triton: whether a Triton kernel attends the others, or all.
    """

    tile: tuning.Tile
    gluon: bool
    triton: bool

    def run(
        self,
        inputs: Inputs,
        chunk: int,
        out: Tensor,
        lse: Tensor,
        final: bool,
    ) -> None:
        """Writes the own blocks' part of `out` and `lse` for a chunk; see `own.own_attention`."""
        if self.gluon:
            hopper.own_attention(inputs, chunk, out, lse, final)
        if self.triton:
            own_attention(inputs, chunk, out, lse, self.tile, final, only_partial=self.gluon)


@dataclass(frozen=True)
class RoutedStage:
    """The kernel that attends routed blocks.

    Attributes:
        tile: its tile.
        resident: whether it keeps a block's keys resident.
        tiles: if resident, the number of row tiles that a program processes with these keys.
        on_hopper: whether it is a Gluon kernel.
    """

    tile: tuning.Tile
    resident: bool
    tiles: int
    on_hopper: bool

    @property
    def rows(self) -> int:
        """Number of pairs in a tile of `routing`."""
        many = self.resident and not self.on_hopper
        return self.tile.m * (self.tiles if many else 1)

    def run(
        self,
        inputs: Inputs,
        routes: Routes,
        partial: Tensor,
        partial_lse: Tensor,
        first_row: int,
    ) -> None:
        """Writes the partial outputs; see `routed.routed_attention`."""
        kernel = hopper.routed_attention if self.on_hopper else routed_attention
        kernel(inputs, routes, partial, partial_lse, first_row, self.tile, self.resident)


def _own_stage(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, on_hopper: bool, all_complete: bool
) -> OwnStage:
    if on_hopper and hopper.takes_own(block_size):
        return OwnStage(tuning.HOPPER.own_partial, True, not all_complete)
    dims = (padded(q.shape[3]), padded(v.shape[3]))
    return OwnStage(tuning.own_tile(dims, q.element_size(), tuning.capability(q.device)), False, True)


def _routed_stage(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, on_hopper: bool, resident: bool | None
) -> RoutedStage:
    found = hopper.routed_tile(block_size, (q.shape[3], v.shape[3])) if on_hopper else None
    if found is not None:
        return RoutedStage(*found, 1, True)
    dims = (padded(q.shape[3]), padded(v.shape[3]))
    tile = tuning.routed_tile(dims, q.element_size(), block_size, tuning.capability(q.device), resident)
    return RoutedStage(*tile, tuning.choices_for(q).resident_tiles, False)


def _earlier_blocks(
    inputs: Inputs,
    block_indices: Tensor,
    chunk: int,
    out: Tensor,
    lse: Tensor,
    space: tuple[Tensor, Tensor],
    routed: RoutedStage,
) -> None:
    """Adds the routed blocks of one chunk to `out` and `lse`, which already hold the own blocks' part."""
    tiling, num_kv_heads = inputs.tiling, inputs.k.shape[1]
    num_bins = num_kv_heads * tiling.num_blocks
    keys = pair_keys(block_indices, tiling, chunk, num_kv_heads)
    routes = route(keys, tiling, num_kv_heads, routed.rows)
    first_row = chunk * tiling.chunk_rows
    partial, partial_lse = (x[: keys.shape[0]] for x in space)
    routed.run(inputs, routes, partial, partial_lse, first_row)
    merge(out, lse, partial, partial_lse, keys, num_bins + key_format(num_bins)[1], first_row)
