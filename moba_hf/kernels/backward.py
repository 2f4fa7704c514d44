"""Gradients of queries, keys and values on the GPU, computed from the saved choice and log-sum-exps.

Legend: H query heads, HK kv heads, D and DV head dims, K topk, K1 = K - 1 routed slots.

Kv heads are independent, so they are processed in groups, as many at a time as fit the memory budget. Only if
a single one does not fit, its queries are also split into chunks. For each group of kv heads:
1. per row: lse and delta side by side (`backward_rows`).
2. per chunk of rows: pairs grouped by (kv head, block) as in the forward (`routing`); dk and dv of each block
   in fp32 and dq of each pair (`backward_routed`); a row's dq summed over its pairs (`backward_rows`).
3. own blocks add their part and write dq, dk, dv (`backward_own`).
The inputs fix the order of every sum, so two runs agree bit for bit. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_hf.kernels import budgets, tuning
from moba_hf.kernels.backward_own import own_dq, own_gradients
from moba_hf.kernels.backward_routed import BinSums, Rows, pair_dq, pair_gradients
from moba_hf.kernels.backward_rows import row_stats, sum_partials
from moba_hf.kernels.launch import padded, rows_contiguous
from moba_hf.kernels.routing import key_format, pair_keys, retile, route
from moba_hf.kernels.tiling import Tiling, head_split, make_tiling
from moba_hf.kernels.tuning_backward import BackwardTiles, backward_tiles
from moba_hf.op.sequences import Attended, Sequences


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    saved: Attended,
    sequences: Sequences,
    block_size: int,
    softmax_scale: float,
    *,
    workspace: int | None = None,
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v with the choice held fixed, contiguous, in their dtypes; 0 where nothing attends.

    Args:
        grad_out: `(batch, q_len, H, DV)`, any strides.
        grad_lse: fp32 `(batch, H, q_len)`, any strides.
        saved: inputs and results of `forward.attend`.
        sequences: as in `forward.attend`.
        block_size: as in `forward.attend`.
        softmax_scale: as in `forward.attend`.
        workspace: maximum bytes for the pairs and sums of a group; None: `budgets.BACKWARD_WORKSPACE`.
        tiles: tiles of the kernels; None: those of `backward_tiles`.
    """
    q, k, v, out, grad_out = (rows_contiguous(x) for x in (*saved[:4], grad_out))
    lse, block_indices, table = saved.lse, saved.block_indices, sequences.table
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, v_dim, slots = k.shape[1], v.shape[3], block_indices.shape[3] - 1
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]
    if q.numel() == 0 or table.shape[0] == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), grads[0], grads[1]
    if tiles is None:
        dims = (padded(head_dim), padded(v_dim))
        tiles = backward_tiles(dims, q.element_size(), block_size, tuning.capability(q.device))
    budget = budgets.BACKWARD_WORKSPACE if workspace is None else workspace
    kv_heads, chunk_rows = budgets.backward_split(q, k, v, slots, budget)
    group_size = num_heads // num_kv_heads
    _, tokens = head_split(group_size, tuning.choices_for(q).route_rows)
    tiling = make_tiling(
        q,
        k,
        table,
        sequences.max_seqlen_q,
        sequences.max_seqlen_k,
        block_size=block_size,
        tile=tokens,
        chunk_rows=chunk_rows,
    )
    routed = slots > 0 and tiling.num_blocks > 0
    # The sum over pairs writes zeros to rows outside all sequences; without that sum, start from zeros.
    grad_q = (torch.empty if routed else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    space = _Space(q, v, tiling, kv_heads, group_size, slots, tiles) if routed else None
    for first in range(0, num_kv_heads, kv_heads):
        kv = slice(first, min(num_kv_heads, first + kv_heads))
        heads = slice(kv.start * group_size, kv.stop * group_size)
        grad = grad_out[:, :, heads]
        stats = row_stats(out[:, :, heads], grad, lse[:, heads], grad_lse[:, heads])
        rows = Rows(q[:, heads], k[:, kv], v[:, kv], grad, stats, softmax_scale)
        choice = block_indices[:, :, heads].contiguous()
        _one_group(rows, choice, tiling, tiles, space, grad_q[:, heads], grads[0][:, kv], grads[1][:, kv])
    return grad_q, grads[0], grads[1]


class _Space:
    """Temporary memory that is reused by each group of kv heads.

    Attributes:
        partial: dq of each pair of a chunk, `(rows, H, K1, D)` in q's dtype.
        sums: dk and dv of each bin, fp32 `(bins, B * (D + DV))`, see `backward_routed`.
        extra: the same per segment.
        segment: number of pairs in a segment.
    """

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        tiling: Tiling,
        kv_heads: int,
        group_size: int,
        slots: int,
        tiles: BackwardTiles,
    ) -> None:
        head_dim = q.shape[3]
        shape = (tiling.chunk_rows, kv_heads * group_size, slots, head_dim)
        pairs, size = shape[0] * shape[1] * slots, tiling.block_size * (head_dim + v.shape[3])
        self.segment = budgets.segment_rows(tiling.block_size, head_dim, v.shape[3], tiles.held.m)
        self.partial = torch.empty(shape, dtype=q.dtype, device=q.device)
        self.sums = torch.empty(kv_heads * tiling.num_blocks, size, dtype=torch.float32, device=q.device)
        self.extra = torch.empty(max(1, pairs // self.segment), size, dtype=torch.float32, device=q.device)


def _one_group(
    rows: Rows,
    choice: Tensor,
    tiling: Tiling,
    tiles: BackwardTiles,
    space: _Space | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Writes the gradients of one group of kv heads; `choice (batch, q_len, H, K)` must be contiguous."""
    sums = bin_begin = None
    if space is not None:
        num_bins = grad_k.shape[1] * tiling.num_blocks
        sums, fresh = space.sums[:num_bins], tiling.num_chunks == 1
        if not fresh:
            sums.zero_()
        for chunk in range(tiling.num_chunks):
            keys = pair_keys(choice, tiling, chunk, grad_k.shape[1])
            routes = route(keys, tiling, grad_k.shape[1], space.segment)
            first_row, slots = chunk * tiling.chunk_rows, keys.shape[2]
            partial = space.partial.flatten()[: keys.numel() * grad_q.shape[3]]
            whole = tiling.block_size <= tiles.held.n  # one kernel computes dq too
            into = BinSums(sums, space.extra, fresh)
            pair_gradients(
                rows, tiling, routes, partial if whole else None, into, slots, first_row, tiles.held
            )
            if not whole:
                pair_dq(rows, tiling, retile(routes, tiling, tiles.dq.m), partial, slots, first_row, tiles.dq)
            no_bin = num_bins + key_format(num_bins)[1]
            sum_partials(grad_q, partial, keys, no_bin, first_row)
            bin_begin = routes.bin_begin if fresh else None
    whole = tiling.block_size <= tiles.own.n
    own_gradients(rows, tiling, sums, bin_begin, grad_q if whole else None, grad_k, grad_v, tiles.own)
    if not whole:
        own_dq(rows, tiling, grad_q, space is not None, tiles.own_dq)
