"""MoBA in pure torch on any device: block-sparse, differentiable, bounded memory.

Legend: H query heads, HK kv heads, D head dim, B block size, K topk, N keys, M queries of a chunk.

For each sequence and each chunk of its queries:
1. select: means of complete blocks, scores `(H, M, blocks)`, top-k; see `portable_select`.
2. route: every (query head, query, slot) is a *pair*; pairs are sorted by (kv head, block, own or earlier)
   and split into tiles of up to T pairs with the same block, so that keys are gathered once per tile.
3. attend: two batched matmuls per group of tiles; the partial output of each pair is stored separately.
4. merge: adds the K partial outputs of a query, weighted by their softmax masses.

Peak memory is O(chunk of queries x K x D) for partial outputs plus a fixed budget for tiles, never N x N.
Sums are in fp32 (fp64 for fp64 inputs). Reading the sequence table waits for the device, so this path is for
CPUs, MPS and GPUs without a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moba_hf.op.numerics import accumulate_dtype, all_finite, full_precision, masked_product
from moba_hf.op.portable_select import budget
from moba_hf.op.sequences import Attended, rows_of

# Maximum numbers of elements of partial outputs, and of one group of tiles, on a CPU; see `budget`.
_PARTIAL_BUDGET = 1 << 24
_TILE_BUDGET = 1 << 20
_TILE_ROWS = (16, 128)


@dataclass
class _Chunk:
    """A chunk of one sequence's queries, routed by block.

    Attributes:
        pairs: `(tiles, T)` pair numbers `(h * M + i) * K + slot`; `num_pairs` means "no pair".
        kv_head: `(tiles,)`, the kv head of each tile.
        block: `(tiles,)`, the block of each tile.
        num_own: tiles `[0, num_own)` are of own blocks and need the causal mask.
    """

    pairs: Tensor
    kv_head: Tensor
    block: Tensor
    num_own: int
    num_pairs: int

    def groups(self, block_size: int) -> Iterator[tuple[slice, bool]]:
        """Yields slices of tiles that fit the tile budget, and whether they need the causal mask."""
        step = max(1, budget(_TILE_BUDGET, self.pairs) // (self.pairs.shape[1] * block_size))
        for begin, end, own in ((0, self.num_own, True), (self.num_own, len(self.block), False)):
            for start in range(begin, end, step):
                yield slice(start, min(end, start + step)), own


def _route(choice: Tensor, own: Tensor, num_kv_heads: int, num_blocks: int) -> _Chunk:
    """Sorts the pairs of `choice (M, H, K)` by block and splits them into tiles; `own (M,)`: own blocks."""
    num_heads, device = choice.shape[1], choice.device
    blocks = choice.permute(1, 0, 2).long()
    kv_head = torch.arange(num_kv_heads, device=device).repeat_interleave(num_heads // num_kv_heads)
    # own tiles first: key = earlier?, kv head, block
    bins = num_kv_heads * num_blocks
    key = (blocks != own[:, None]) * bins + kv_head[:, None, None] * num_blocks + blocks
    key = key.masked_fill(blocks < 0, 2 * bins).reshape(-1)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=2 * bins + 1)[: 2 * bins]
    used = counts.nonzero()[:, 0]
    counts_used = counts[used]
    mean_rows = int(counts_used.sum()) // max(1, len(used))
    rows = min(max(1 << mean_rows.bit_length(), _TILE_ROWS[0]), _TILE_ROWS[1])
    tiles = (counts_used + rows - 1) // rows
    which = torch.repeat_interleave(torch.arange(len(used), device=device), tiles)
    number = torch.arange(len(which), device=device) - (tiles.cumsum(0) - tiles)[which]
    first = (counts_used.cumsum(0) - counts_used)[which] + number * rows
    left = counts_used[which] - number * rows
    lane = torch.arange(rows, device=device)
    index = (first[:, None] + lane).clamp(max=len(order) - 1)
    pairs = order[index].masked_fill(lane >= left[:, None], len(order))
    tile_key = used[which]
    own_tiles = int((tile_key < bins).sum())
    return _Chunk(pairs, tile_key % bins // num_blocks, tile_key % num_blocks, own_tiles, len(order))


class _Tile(NamedTuple):
    """The gathered inputs of a group of tiles.

    Attributes:
        row: `(t, T)` row numbers; `len(q)` of the chunk means "no pair".
        keys: `(t, B, D)`.
        values: `(t, B, Dv)`.
        scores: `(t, T, B)`, -inf where `hidden`.
        hidden: bool `(t, T, B)`, keys after the query; None: there are none.
    """

    row: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    hidden: Tensor | None


class _Tiles:
    """Gathers the inputs of one chunk's tiles from a sequence's strided `(heads, length, dim)` tensors."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, choice: Tensor, first: int, block_size: int, scale: float
    ):
        """`block_size` is at most the number of keys; `choice` is `(M, H, K)`."""
        self.dtype = accumulate_dtype(q.dtype)
        self.k, self.v, self.block_size = k, v, block_size
        self.choice, self.topk = choice, choice.shape[2]
        self.position = torch.arange(q.shape[1], device=q.device) + first
        num_blocks = -(-k.shape[1] // block_size)
        self.routed = _route(choice, self.position // block_size, k.shape[0], num_blocks)
        # an additional row is for "no pair"
        self.q = self.rows((q.to(self.dtype) * scale).reshape(-1, q.shape[2]))
        self.offset = torch.arange(block_size, device=q.device)

    @staticmethod
    def rows(x: Tensor, fill: float = 0.0) -> Tensor:
        """`x (H * M, ...)` with an additional row of `fill`, for entries without a pair."""
        return torch.cat([x, x.new_full((1, *x.shape[1:]), fill)])

    def groups(self) -> Iterator[tuple[slice, Tensor, _Tile]]:
        """Yields slices of tiles that fit the tile budget, their pairs (flat), and the result of `load`."""
        for group, own in self.routed.groups(self.block_size):
            yield group, self.routed.pairs[group].reshape(-1), self.load(group, own)

    def load(self, tiles: slice, own: bool) -> _Tile:
        """Gathers keys, values and scores of `tiles`; with `own` they are masked causally."""
        row = self.routed.pairs[tiles] // self.topk
        kv_head = self.routed.kv_head[tiles]
        block = self.routed.block[tiles]
        if own:  # the last block may be incomplete; keys after its end are masked
            key = block[:, None] * self.block_size + self.offset
            index = key.clamp(max=self.k.shape[1] - 1)
            keys, values = (x[kv_head[:, None], index].to(self.dtype) for x in (self.k, self.v))
        else:
            keys, values = (self.blocks(x)[kv_head, block].to(self.dtype) for x in (self.k, self.v))
        scores = torch.bmm(self.gather(self.q, row), keys.transpose(1, 2))
        hidden = None
        if own:
            position = self.position[row.clamp(max=len(self.q) - 2) % len(self.position)]
            hidden = key[:, None, :] > position[:, :, None]
            scores.masked_fill_(hidden, -torch.inf)
        return _Tile(row, keys, values, scores, hidden)

    def blocks(self, x: Tensor) -> Tensor:
        """A view `(HK, N // B, B, D)` of the complete blocks of `x (HK, N, D)`."""
        count = x.shape[1] // self.block_size
        return x[:, : count * self.block_size].unflatten(1, (count, self.block_size))

    @staticmethod
    def gather(x: Tensor, row: Tensor) -> Tensor:
        """Gathers `x (rows, D)` at `row (t, T)`: `(t, T, D)`."""
        return x.index_select(0, row.reshape(-1)).view(*row.shape, -1)


class _Partials:
    """A buffer of partial rows `(pairs + 1, width)`, reused by all chunks: touching new pages is slow."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        self.buffer = torch.empty(0, width, dtype=dtype, device=device)

    def take(self, tiles: _Tiles) -> Tensor:
        """The buffer for one chunk. Rows whose choice is -1 are zero; the caller must write the others."""
        routed = tiles.routed
        if len(self.buffer) < routed.num_pairs + 1:
            self.buffer = self.buffer.new_empty(routed.num_pairs + 1, self.buffer.shape[1])
        view = self.buffer[: routed.num_pairs + 1]
        missing = tiles.choice.transpose(0, 1).reshape(-1) < 0
        if bool(missing.any()):
            view[:-1][missing] = 0.0
        return view


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, table: Tensor, block_size: int, scale: float
) -> Iterator[tuple[int, slice, slice, _Tiles]]:
    """Yields (batch row, query slice, key slice, tiles) of every chunk of every sequence that has queries."""
    num_heads, width = q.shape[1], max(q.shape[3], v.shape[3])
    for row, q_begin, q_end, k_begin, k_end in rows_of(table):
        if q_begin == q_end:
            continue
        keys, values = k[row, :, k_begin:k_end], v[row, :, k_begin:k_end]
        # limit the block size, so that a short sequence costs no more than its keys
        size = min(block_size, k_end - k_begin)
        topk = min(block_indices.shape[3], -(-(k_end - k_begin) // size))
        chunk = max(1, budget(_PARTIAL_BUDGET, q) // (num_heads * topk * width))
        if (q_end - q_begin) * topk >= k_end - k_begin:  # enough gathers to make a contiguous copy worthwhile
            keys, values = keys.contiguous(), values.contiguous()
        for start in range(q_begin, q_end, chunk):
            part = slice(start, min(q_end, start + chunk))
            first = (k_end - k_begin) - (q_end - start)
            choice = block_indices[row, part, :, :topk]
            tiles = _Tiles(q[row, :, part], keys, values, choice, first, size, scale)
            yield row, part, slice(k_begin, k_end), tiles


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    table: Tensor,
    *,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the chosen blocks: `out (batch, q_len, H, Dv)`, `lse (batch, H, q_len)` in fp32 (fp64).

    Args:
        q: `(batch, H, q_len, D)`.
        k: `(batch, HK, kv_len, D)`.
        v: `(batch, HK, kv_len, Dv)`.
        block_indices: `(batch, q_len, H, topk)`, -1 last, otherwise in any order.
        table: see `moba_hf.op.sequences`.
    """
    batch, num_heads, q_len, _ = q.shape
    dtype, finite = accumulate_dtype(q.dtype), all_finite(v)
    out = q.new_zeros(batch, q_len, num_heads, v.shape[3])
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=dtype, device=q.device)
    space = _Partials(v.shape[3], dtype, q.device)
    with full_precision(q.device):
        for row, part, _, tiles in _chunks(q, k, v, block_indices, table, block_size, softmax_scale):
            partial = space.take(tiles)
            top = torch.full((tiles.routed.num_pairs + 1,), -torch.inf, dtype=dtype, device=q.device)
            mass = torch.zeros_like(top)
            for _, pairs, tile in tiles.groups():
                high = tile.scores.amax(2, keepdim=True).clamp_(min=torch.finfo(dtype).min)  # all may be -inf
                weights = tile.scores.sub_(high).exp_()
                partial.index_copy_(
                    0,
                    pairs,
                    masked_product(weights, tile.values, None if finite else tile.hidden).flatten(0, 1),
                )
                top.scatter_(0, pairs, high.flatten())
                mass.scatter_(0, pairs, weights.sum(2).flatten())
            top, mass = (x[:-1].view(num_heads, -1, tiles.topk) for x in (top, mass))
            high = top.amax(2, keepdim=True)
            weights = torch.exp(top - high)
            total = (weights * mass).sum(2)
            parts = partial[:-1].view(num_heads, -1, tiles.topk, v.shape[3])
            merged = parts.mul_(weights[..., None]).sum(2)
            out[row, part] = (merged / total[..., None]).transpose(0, 1).to(out.dtype)
            lse[row, :, part] = high[..., 0] + total.log()
    return out, lse


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    saved: Attended,
    table: Tensor,
    *,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for a fixed choice, from `lse`; shapes as in `attend`."""
    q, k, v, out, lse, block_indices = saved
    num_heads, dtype = q.shape[1], accumulate_dtype(q.dtype)
    finite = all_finite(q, k, v, grad_out, grad_lse, out)
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sums = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v)]
    space = _Partials(q.shape[3], dtype, q.device)
    with full_precision(q.device):
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(3).transpose(1, 2) - grad_lse.to(dtype)
        for row, part, keys_at, tiles in _chunks(q, k, v, block_indices, table, block_size, softmax_scale):
            d_out = tiles.rows(grad_out[row, part].transpose(0, 1).to(dtype).reshape(-1, v.shape[3]))
            d_row = tiles.rows(delta[row, :, part].reshape(-1, 1))
            lse_row = tiles.rows(lse[row, :, part].reshape(-1, 1), fill=torch.inf)
            partial = space.take(tiles)
            grad_kv = [x[row, :, keys_at] for x in sums]
            for group, pairs, tile in tiles.groups():
                at, hidden = tile.row, None if finite else tile.hidden
                turned = None if hidden is None else hidden.transpose(1, 2)
                d_tile = tiles.gather(d_out, at)
                weights = tile.scores.sub_(tiles.gather(lse_row, at)).exp_()
                d_scores = torch.bmm(d_tile, tile.values.transpose(1, 2))
                d_scores.sub_(tiles.gather(d_row, at)).mul_(weights)
                partial.index_copy_(0, pairs, masked_product(d_scores, tile.keys, hidden).flatten(0, 1))
                queries = tiles.gather(tiles.q, at)
                grads = (
                    masked_product(d_scores.transpose(1, 2), queries, turned),
                    masked_product(weights.transpose(1, 2), d_tile, turned),
                )
                for total, grad in zip(grad_kv, grads, strict=True):
                    _add_blocks(total, grad, tiles.routed.kv_head[group], tiles.routed.block[group])
            d_q = partial[:-1].view(num_heads, -1, tiles.topk, q.shape[3]).sum(2) * softmax_scale
            grad_q[row, :, part] = d_q.to(q.dtype)
    return grad_q, sums[0].to(k.dtype), sums[1].to(v.dtype)


def _add_blocks(total: Tensor, grad: Tensor, kv_head: Tensor, block: Tensor) -> None:
    """Adds `grad (tiles, B, D)` to blocks of `total (HK, N, D)`; rows after the end are ignored."""
    block_size, length = grad.shape[1], total.shape[1]
    key = block[:, None] * block_size + torch.arange(block_size, device=grad.device)
    inside = key < length
    head = kv_head[:, None].expand_as(key)
    total.index_put_((head[inside], key[inside]), grad[inside], accumulate=True)
